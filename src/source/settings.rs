//! Where a stream comes from, as the config says it.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Error;
use super::file::{Files, expand};
use super::kafka::{LogTime, Shard, Start, Topics};

/// `[impressions.source]`, `[clicks.source]`: where a stream's records come from. Keys of another kind are refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `"file"` or `"kafka"`. Default `"file"`.
    pub kind: Kind,
    /// Files only. Files of JSON lines, plain, gzip or zstd, or Parquet. The last part of a path may hold `*` (any characters)
    /// and `?` (one). Each file is a partition, named by its path as written here. In runs that end, also objects of a store, by
    /// an address such as `s3://bucket/logs/impressions-*.jsonl.zst`.
    pub paths: Vec<String>,
    /// Files only. How often a followed file is looked at for growth; 1ms or more. Default 200ms.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// Kafka only. Topics of JSON records. Each partition is a partition, named `topic/number`.
    pub topics: Option<Vec<String>>,
    /// Kafka only. Where partitions that the checkpoint does not know are read from: `"earliest"` (the default),
    /// `"latest"`, a time as RFC 3339 (the first record that the log took at or after it), or a table from `topic/number` to
    /// offset, in which each partition must be. A partition that a topic gets later is read from its first record.
    pub start: Option<StartSetting>,
    /// Kafka only. `"i/n"`: this job reads the partitions whose number modulo n is i, from 0. Default: all.
    pub shard: Option<String>,
    /// Kafka only. What a message's timestamp is: `"timestamp"` (the default), the time at which the log took the record, or
    /// `"none"`, nothing to rely on, because clients set it. `record.log_time` goes before it.
    pub log_time: Option<LogTime>,
    /// Kafka only. Bytes that are fetched ahead for all partitions of the stream together, 1 MiB or more. Default 32 MiB
    /// (33554432). One fetched batch a partition may come on top.
    pub memory: Option<u64>,
    /// Longest record, in bytes without its line end, 1 to 1 GiB. Longer ones are rejected. Default 1 MiB (1048576).
    pub max_record: usize,
    /// How many chunks (about 512 records each) are decoded ahead per partition, 1 to 1024. Default 4. More evens out bursts
    /// and costs memory.
    pub queue: usize,
}

/// What a stream comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    #[default]
    File,
    Kafka,
}

/// `start`, as it is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum StartSetting {
    Word(String),
    Offsets(BTreeMap<String, u64>),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            kind: Kind::File,
            paths: Vec::new(),
            poll: Duration::from_millis(200),
            topics: None,
            start: None,
            shard: None,
            log_time: None,
            memory: None,
            max_record: 1 << 20,
            queue: 4,
        }
    }
}

/// Checked [`Settings`].
#[derive(Clone, Debug, PartialEq)]
pub enum Origin {
    Files(Files),
    Kafka(Topics),
}

impl Settings {
    /// Whether each record comes with the time at which the log took it, without a path that says where.
    #[must_use]
    pub fn has_log_time(&self) -> bool {
        self.kind == Kind::Kafka && self.log_time.unwrap_or_default() == LogTime::Timestamp
    }

    /// Checks the settings found under `key` (such as `impressions.source`). Touches no file and no broker.
    pub fn check(&self, key: &str) -> Result<(), Error> {
        match self.kind {
            Kind::File => self.check_files(key),
            Kind::Kafka => self.topics(key).map(drop),
        }
    }

    /// Checks the settings, and finds the files where it is files.
    pub fn find(&self, key: &str) -> Result<Origin, Error> {
        match self.kind {
            Kind::File => {
                self.check_files(key)?;
                let (objects, local): (Vec<String>, Vec<String>) =
                    self.paths.iter().cloned().partition(|path| path.contains("://"));
                let (paths, max_record, poll, queue) = (expand(&local)?, self.max_record, self.poll, self.queue);
                Ok(Origin::Files(Files { paths, objects, max_record, poll, queue }))
            }
            Kind::Kafka => self.topics(key).map(Origin::Kafka),
        }
    }

    fn check_files(&self, key: &str) -> Result<(), Error> {
        self.check_common(key)?;
        let foreign = [
            ("topics", self.topics.is_some()),
            ("start", self.start.is_some()),
            ("shard", self.shard.is_some()),
            ("log_time", self.log_time.is_some()),
            ("memory", self.memory.is_some()),
        ];
        if let Some((name, _)) = foreign.into_iter().find(|(_, given)| *given) {
            return refuse(key, name, "left out where kind = \"file\"; it is a setting of kind = \"kafka\"", "a value");
        }
        if self.paths.is_empty() {
            return refuse(key, "paths", "a list of at least one file", "[]");
        }
        if self.poll < Duration::from_millis(1) {
            return refuse(key, "poll", "at least 1ms", format!("{:?}", self.poll));
        }
        Ok(())
    }

    fn topics(&self, key: &str) -> Result<Topics, Error> {
        self.check_common(key)?;
        if !self.paths.is_empty() {
            let value = format!("{:?}", self.paths);
            return refuse(key, "paths", "left out where kind = \"kafka\"; it is a setting of kind = \"file\"", value);
        }
        let mut topics = self.topics.clone().unwrap_or_default();
        topics.sort();
        topics.dedup();
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if topics.is_empty() || topics.iter().any(|topic| topic.is_empty() || !topic.chars().all(legal)) {
            let expected = "a list of at least one topic; names are letters, digits, `.`, `_` and `-`";
            return refuse(key, "topics", expected, format!("{topics:?}"));
        }
        let memory = self.memory.unwrap_or(32 << 20);
        if memory < 1 << 20 {
            return refuse(key, "memory", "at least 1048576 (bytes)", memory.to_string());
        }
        let start = match &self.start {
            None => Start::Earliest,
            Some(StartSetting::Offsets(offsets)) => Start::Offsets(offsets.clone()),
            Some(StartSetting::Word(word)) => match word.as_str() {
                "earliest" => Start::Earliest,
                "latest" => Start::Latest,
                word => match chrono::DateTime::parse_from_rfc3339(word) {
                    Ok(at) => Start::Time(crate::event::Time(at.timestamp_millis())),
                    Err(_) => {
                        let expected =
                            "\"earliest\", \"latest\", a time as RFC 3339, or a table from topic/number to offset";
                        return refuse(key, "start", expected, format!("\"{word}\""));
                    }
                },
            },
        };
        let shard = match &self.shard {
            None => Shard::ALL,
            Some(text) => match Shard::parse(text) {
                Some(shard) => shard,
                None => return refuse(key, "shard", "\"i/n\" with 0 <= i < n, such as \"0/4\"", format!("\"{text}\"")),
            },
        };
        let (max_record, queue) = (self.max_record, self.queue);
        Ok(Topics { topics, start, shard, log_time: self.log_time.unwrap_or_default(), memory, max_record, queue })
    }

    fn check_common(&self, key: &str) -> Result<(), Error> {
        if !(1..=1 << 30).contains(&self.max_record) {
            return refuse(key, "max_record", "1 to 1073741824 (bytes)", self.max_record.to_string());
        }
        if !(1..=1024).contains(&self.queue) {
            return refuse(key, "queue", "1 to 1024 (chunks)", self.queue.to_string());
        }
        Ok(())
    }
}

fn refuse<T>(key: &str, name: &str, expected: &'static str, value: impl Into<String>) -> Result<T, Error> {
    Err(Error::Setting { key: format!("{key}.{name}"), expected, value: value.into() })
}
