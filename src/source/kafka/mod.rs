//! Kafka topics as a log: one partition of a topic is one partition of the stream.
//!
//! | | |
//! |---|---|
//! | offset | that of the message; a message is a record, or several (a slate) |
//! | log time | the message's timestamp (`log_time`), unless the record carries its own |
//! | tombstone (no value) | no record; its offset counts |
//! | too long a record | rejected with its first 4 KiB |
//! | compaction, transaction markers, aborted records | gaps between offsets, which mean nothing |
//! | bounded | to the high watermark that a partition had at the start, also behind an open transaction |
//! | followed | caught up once the broker has confirmed, after all was handed on, that there is no more: also nothing that an open transaction hides |
//! | refused | a partition that no longer has what is to be read next, or holds another record before it |
//!
//! Partitions are assigned by the job, never by a group; positions come from its checkpoint. What is committed to a group
//! is for lag tools to see and is never read.
//!
//! Reading is pulled: a partition's reader polls its own queue of the client only while its place in the decoding queue
//! is free, so a partition that nobody needs stands still with a bounded prefetch, and none can hold another up.

mod admin;
mod desk;
mod log;
mod reader;
mod sink;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, ConsumerContext};
use rdkafka::error::KafkaError;
use rdkafka::statistics::Statistics;
use rdkafka::types::RDKafkaErrorCode;
use serde::{Deserialize, Serialize};

use crate::event::Time;
use crate::position::Fingerprint;
use crate::source::pool::lock;

pub use admin::OwnTopics;
pub use log::{Log, PartitionState};
pub use sink::{Header, Message, Sink};

/// `[kafka]`: how Kafka is reached. Every librdkafka property can be given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cluster {
    /// `host:port` of one or more brokers, separated by commas.
    pub brokers: String,
    /// Consumer group under which positions are committed after each checkpoint, so that lag tools see them; they are
    /// never read. Default: none is committed.
    pub group: Option<String>,
    /// How often brokers are asked where partitions begin and end and whether there are new ones; 100ms or more. Default 1s.
    #[serde(with = "humantime_serde", default = "one_second")]
    pub refresh: Duration,
    /// Properties of librdkafka, such as `"security.protocol"`. A value is a text, a number, a truth value, or
    /// `{ env = "NAME" }` or `{ file = "PATH" }` where it is a secret.
    #[serde(default)]
    pub properties: BTreeMap<String, Property>,
}

fn one_second() -> Duration {
    Duration::from_secs(1)
}

/// The value of a librdkafka property.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Property {
    Text(String),
    Number(i64),
    Flag(bool),
    Secret(Secret),
}

/// Where a value is that is not written in the config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Secret {
    /// In this variable of the environment.
    Env(String),
    /// In this file, without the line end at its end.
    File(PathBuf),
}

/// What a message's timestamp says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LogTime {
    /// When the log took the record.
    #[default]
    Timestamp,
    /// Nothing to rely on.
    None,
}

/// Where a partition without a position is read from.
#[derive(Clone, Debug, PartialEq)]
pub enum Start {
    Earliest,
    Latest,
    /// From the first record whose timestamp is not before this.
    Time(Time),
    /// By `topic/number`.
    Offsets(BTreeMap<String, u64>),
}

/// Which partitions are read: those whose number is `index` modulo `of`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: u32,
    pub of: u32,
}

impl Shard {
    pub const ALL: Self = Self { index: 0, of: 1 };

    /// Reads `i/n`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (index, of) = text.split_once('/')?;
        let (index, of) = (index.trim().parse().ok()?, of.trim().parse().ok()?);
        (index < of).then_some(Self { index, of })
    }

    fn has(self, partition: i32) -> bool {
        partition as u32 % self.of == self.index
    }
}

/// The checked settings of a stream that comes from Kafka.
#[derive(Clone, Debug, PartialEq)]
pub struct Topics {
    /// Sorted by name, each once.
    pub topics: Vec<String>,
    pub start: Start,
    pub shard: Shard,
    pub log_time: LogTime,
    /// Bytes fetched ahead, for all partitions together.
    pub memory: u64,
    pub max_record: usize,
    pub queue: usize,
}

/// Why Kafka cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{key}` must be {expected}, got {value}")]
    Setting { key: String, expected: &'static str, value: String },
    #[error("`kafka.properties.\"{name}\"`: {why}")]
    Property { name: String, why: String },
    #[error("a Kafka client cannot be made from [kafka]")]
    Client { source: KafkaError },
    #[error(
        "no Kafka broker at `{brokers}` answers when asked {what}{}; check `kafka.brokers`, the network, and \"security.protocol\" and \
         the keys that go with it in `kafka.properties`",
        last.as_ref().map(|last| format!(" (the client says: {last})")).unwrap_or_default()
    )]
    Unreachable { brokers: String, what: String, last: Option<String>, source: KafkaError },
    #[error("there is no topic `{topic}` at `{brokers}`; create it, or correct the name ({why})")]
    NoTopic { topic: String, brokers: String, why: String },
    #[error("the topic `{topic}` cannot be {done} at `{brokers}`: {why}")]
    Topic { topic: String, done: &'static str, brokers: String, why: String },
    #[error("`{topic}` has {partitions} partitions, none of which belongs to shard {}/{}", shard.index, shard.of)]
    EmptyShard { topic: String, partitions: usize, shard: Shard },
    #[error(
        "`{partition}` no longer has its records from offset {from} to {low} (at most {} of them): the log's retention dropped \
         them before they were trained. Nothing was skipped. If they can be brought back (another copy of the log), start anew from \
         it; to go on without them run once with --skip-lost, which says in the journal what was skipped",
        low - from
    )]
    Lost { partition: String, from: u64, low: u64 },
    #[error(
        "`{partition}` is not the log that was read before: {why}. The topic was made anew or cut back. Bring the old content back \
         to go on, or give the new content a topic of another name, or start anew with another `checkpoint.dir`"
    )]
    Rewritten { partition: String, why: String },
    #[error("`{partition}` cannot be read on at offset {offset}: {why}")]
    Unreadable { partition: String, offset: u64, why: String },
    #[error("the Kafka client has failed for good: {0}")]
    Fatal(String),
    #[error("cannot write to the topic `{topic}`{}", if *.undelivered > 0 { format!(" ({undelivered} records were not taken)") } else { String::new() })]
    Unwritable { topic: String, undelivered: u64, source: KafkaError },
}

/// Properties that Tidemill sets, with what to use instead.
const OURS: &[(&str, &str)] = &[
    ("bootstrap.servers", "it is `kafka.brokers`"),
    ("metadata.broker.list", "it is `kafka.brokers`"),
    ("group.id", "it is `kafka.group`"),
    ("enable.auto.commit", "positions are in the checkpoint; `kafka.group` says whether they are shown to a group"),
    ("enable.auto.offset.store", "positions are in the checkpoint"),
    ("auto.offset.reset", "a position that the log no longer has stops the job; `source.start` says where to begin"),
    ("enable.partition.eof", "it is needed to know that a partition has been read to its end"),
    ("statistics.interval.ms", "it is needed to know that a partition has been read to its end"),
    ("queued.max.messages.kbytes", "it is `source.memory`, shared by the partitions"),
];

impl Cluster {
    /// Checks what can be checked without a broker, secrets included.
    pub fn check(&self) -> Result<(), Error> {
        if self.brokers.trim().is_empty() {
            let key = "kafka.brokers".to_owned();
            return Err(Error::Setting {
                key,
                expected: "host:port, or several separated by commas",
                value: "\"\"".into(),
            });
        }
        if self.refresh < Duration::from_millis(100) {
            let (key, value) = ("kafka.refresh".to_owned(), format!("{:?}", self.refresh));
            return Err(Error::Setting { key, expected: "at least 100ms", value });
        }
        if self.group.as_ref().is_some_and(String::is_empty) {
            let (key, value) = ("kafka.group".to_owned(), "\"\"".to_owned());
            return Err(Error::Setting { key, expected: "a name, or left out", value });
        }
        self.base()?.create_native_config().map_err(refused)?;
        Ok(())
    }

    /// What all clients have in common.
    fn base(&self) -> Result<ClientConfig, Error> {
        let mut config = ClientConfig::new();
        config.set("client.id", "tidemill").set_log_level(RDKafkaLogLevel::Info);
        for (name, value) in &self.properties {
            if let Some((_, instead)) = OURS.iter().find(|(ours, _)| ours == name) {
                return Err(Error::Property { name: name.clone(), why: format!("cannot be given: {instead}") });
            }
            config.set(name, value.text().map_err(|why| Error::Property { name: name.clone(), why })?);
        }
        config.set("bootstrap.servers", &self.brokers);
        Ok(config)
    }

    /// A consumer that never reads: it sees also what open transactions hide, whatever the properties say.
    fn prober(&self, label: &'static str) -> Result<Consumer, Error> {
        let mut config = self.assigning()?;
        config.set("isolation.level", "read_uncommitted");
        config.create_with_context(Context::new(label)).map_err(refused)
    }

    /// A consumer with defaults of its own, which properties override.
    fn consumer(&self, label: &'static str, defaults: &[(&str, String)]) -> Result<Consumer, Error> {
        let mut config = self.assigning()?;
        for (name, value) in defaults.iter().filter(|(name, _)| !self.properties.contains_key(*name)) {
            config.set(*name, value);
        }
        config.create_with_context(Context::new(label)).map_err(refused)
    }

    /// What all consumers have in common: partitions and positions are their caller's business.
    fn assigning(&self) -> Result<ClientConfig, Error> {
        let mut config = self.base()?;
        if !self.properties.contains_key("isolation.level") {
            config.set("isolation.level", "read_committed");
        }
        config
            .set("group.id", self.group.as_deref().unwrap_or("tidemill"))
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("auto.offset.reset", "error");
        Ok(config)
    }
}

impl Error {
    /// What brokers say of a topic that was made just now, and of one that is not there.
    fn is_of_a_new_topic(&self) -> bool {
        let code = match self {
            Self::NoTopic { .. } => return true,
            Self::Unwritable { source, .. } | Self::Unreachable { source, .. } => source.rdkafka_error_code(),
            _ => None,
        };
        matches!(
            code,
            Some(
                RDKafkaErrorCode::UnknownTopicOrPartition
                    | RDKafkaErrorCode::NotLeaderForPartition
                    | RDKafkaErrorCode::LeaderNotAvailable
            )
        )
    }
}

/// A config that librdkafka refused, with the property that it names.
fn refused(error: KafkaError) -> Error {
    match error {
        KafkaError::ClientConfig(_, why, name, _) if !name.is_empty() => Error::Property { name, why },
        source => Error::Client { source },
    }
}

impl Property {
    fn text(&self) -> Result<String, String> {
        match self {
            Self::Text(text) => Ok(text.clone()),
            Self::Number(number) => Ok(number.to_string()),
            Self::Flag(flag) => Ok(flag.to_string()),
            Self::Secret(Secret::Env(name)) => {
                std::env::var(name).map_err(|_| format!("the variable `{name}` of the environment is not set"))
            }
            Self::Secret(Secret::File(path)) => std::fs::read_to_string(path)
                .map(|text| text.trim_end_matches(['\r', '\n']).to_owned())
                .map_err(|error| format!("the file `{}` cannot be read: {error}", path.display())),
        }
    }
}

type Consumer = BaseConsumer<Context>;

/// Takes what the client says aside from records.
struct Context {
    /// Which client, for the log.
    label: &'static str,
    /// The last error of the connection, for messages.
    last: Mutex<Option<String>>,
    /// Where the client has come to the end of a partition, by topic and number: the offset at which it was.
    ends: Mutex<BTreeMap<(String, i32), i64>>,
}

impl Context {
    fn new(label: &'static str) -> Self {
        Self { label, last: Mutex::default(), ends: Mutex::default() }
    }

    fn last_error(&self) -> Option<String> {
        lock(&self.last).clone()
    }

    fn end_of(&self, topic: &str, partition: i32) -> Option<u64> {
        let ends = lock(&self.ends);
        ends.get(&(topic.to_owned(), partition)).and_then(|end| u64::try_from(*end).ok())
    }
}

impl ClientContext for Context {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            // One unreachable broker is an error to librdkafka; whether it is one to us is said by what waits for it.
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning => {
                *lock(&self.last) = Some(message.to_owned());
                tracing::warn!(client = self.label, facility, "kafka: {message}");
            }
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                tracing::debug!(client = self.label, facility, "{message}")
            }
            RDKafkaLogLevel::Debug => tracing::trace!(client = self.label, facility, "{message}"),
        }
    }

    fn stats(&self, statistics: Statistics) {
        let mut ends = lock(&self.ends);
        for (name, topic) in statistics.topics {
            for (partition, state) in topic.partitions.into_iter().filter(|(_, state)| state.eof_offset >= 0) {
                ends.insert((name.clone(), partition), state.eof_offset);
            }
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        // The end of a partition is news, not an error, and its reader has it.
        if error.rdkafka_error_code() == Some(RDKafkaErrorCode::PartitionEOF) {
            return;
        }
        *lock(&self.last) = Some(reason.to_owned());
        tracing::warn!(client = self.label, %error, "kafka: {reason}");
    }
}

impl ConsumerContext for Context {}

/// How long a topic that a broker does not know, or not as its leader, may have been made just now: it hears of it a moment later.
const NEWS: Duration = Duration::from_secs(5);

/// Asks about a topic until it is known, or for so long that it is not there.
fn once_known<T>(ask: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
    let began = Instant::now();
    loop {
        match ask() {
            Err(error) if error.is_of_a_new_topic() && began.elapsed() < NEWS => {
                std::thread::sleep(Duration::from_millis(50));
            }
            answer => return answer,
        }
    }
}

/// The name of a partition.
fn name_of(topic: &str, partition: i32) -> String {
    format!("{topic}/{partition}")
}

/// What is kept of a message to know it again.
fn fingerprint(payload: Option<&[u8]>) -> Fingerprint {
    Fingerprint::of(payload.unwrap_or_default())
}
