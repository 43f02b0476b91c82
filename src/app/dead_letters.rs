//! Records that cannot be used, kept with their position and the reason.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::config::Config;
use crate::event::{Chunk, Stream};
use crate::merge::Merge;
use crate::source::kafka::{self, Header, Message, Sink};

/// A line of the dead-letter file.
#[derive(Serialize)]
struct Letter<'a> {
    stream: Stream,
    partition: &'a str,
    offset: u64,
    row: u32,
    reason: &'a str,
    /// The raw record; bytes that are not UTF-8 are replaced by U+FFFD. Empty where only its position is known.
    record: &'a str,
}

/// Where a record stands.
pub struct At<'a> {
    stream: Stream,
    partition: &'a str,
    offset: u64,
    row: u32,
}

impl<'a> At<'a> {
    #[must_use]
    pub fn new(merge: &'a Merge, partition: u32, offset: u64, row: u32) -> Self {
        let index = partition as usize;
        Self { stream: merge.stream(index), partition: merge.name(index), offset, row }
    }
}

/// Why dead letters cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write dead letters to `{}`; the job stops so that none is lost: free space or change `dead_letters.path`, then start it again", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error(
        "cannot write dead letters to the topic `{topic}`; the job stops so that none is lost: create the topic, allow writing to \
         it, or change `dead_letters.topic`, then start it again"
    )]
    Topic { topic: String, source: Box<kafka::Error> },
}

/// Keeps rejected records. At least once: what was read again after a restart is written again.
pub struct DeadLetters {
    to: To,
    /// Rejected records since the start, re-read ones included.
    pub count: u64,
}

enum To {
    /// Only counted and logged.
    Nowhere,
    File(PathBuf, BufWriter<File>),
    Topic(String, Box<Sink>),
}

/// How long a checkpoint waits for dead letters to be written.
const PATIENCE: Duration = Duration::from_secs(60);

impl DeadLetters {
    /// Opens the file for appending, or sees that there is the topic; without `[dead_letters]`, rejected records are only
    /// counted and logged.
    pub fn open(config: &Config) -> Result<Self, Error> {
        let settings = config.dead_letters.as_ref().map(|letters| (&letters.path, &letters.topic));
        let to = match settings {
            None | Some((None, None)) => To::Nowhere,
            Some((Some(path), _)) => {
                let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
                let made = directory.map_or(Ok(()), std::fs::create_dir_all);
                let file = made.and_then(|()| File::options().create(true).append(true).open(path));
                let file = file.map_err(|source| Error::File { path: path.clone(), source })?;
                To::File(path.clone(), BufWriter::new(file))
            }
            Some((None, Some(topic))) => {
                let cluster = config.kafka.as_ref().expect("the config was checked");
                let sink = Sink::new(cluster, "dead-letters").and_then(|sink| sink.partitions(topic).map(|_| sink));
                let sink = sink.map_err(|error| Error::Topic { topic: topic.clone(), source: error.into() })?;
                To::Topic(topic.clone(), Box::new(sink))
            }
        };
        Ok(Self { to, count: 0 })
    }

    /// Where they go, in words; `None` if nowhere.
    #[must_use]
    pub fn place(&self) -> Option<String> {
        match &self.to {
            To::Nowhere => None,
            To::File(path, _) => Some(format!("`{}`", path.display())),
            To::Topic(topic, _) => Some(format!("topic `{topic}`")),
        }
    }

    /// Keeps what the decoder rejected in a chunk of a partition.
    pub fn keep_rejects(&mut self, merge: &Merge, partition: usize, chunk: &Chunk) -> Result<(), Error> {
        for (index, reason) in &chunk.rejects {
            let record = &chunk.records[*index as usize];
            let (key, value) = chunk.original_of(*index as usize).unwrap_or((None, chunk.text_of(record)));
            self.keep(&At::new(merge, partition as u32, record.offset, record.row), reason, key, value)?;
        }
        Ok(())
    }

    pub fn keep(&mut self, at: &At<'_>, reason: &str, key: Option<&[u8]>, value: &[u8]) -> Result<(), Error> {
        let At { stream, partition, offset, row } = *at;
        self.count += 1;
        if self.count <= 10 {
            tracing::warn!(stream = stream.name(), partition, offset, reason, "rejected a record");
        } else if self.count == 11 {
            tracing::warn!("more records are rejected; they are counted and no longer logged one by one");
        }
        match &mut self.to {
            To::Nowhere => Ok(()),
            To::File(path, file) => {
                let record = &String::from_utf8_lossy(value);
                let line = serde_json::to_string(&Letter { stream, partition, offset, row, reason, record })
                    .expect("plain data");
                writeln!(file, "{line}").map_err(|source| Error::File { path: path.clone(), source })
            }
            To::Topic(topic, sink) => {
                let headers = [
                    Header { name: "tidemill.stream", value: stream.name() },
                    Header { name: "tidemill.partition", value: partition },
                    Header { name: "tidemill.offset", value: &offset.to_string() },
                    Header { name: "tidemill.row", value: &row.to_string() },
                    Header { name: "tidemill.reason", value: reason },
                ];
                let message = Message { topic: topic.as_str(), key, value, headers: &headers, ..Message::default() };
                sink.write(&message).map_err(|error| Error::Topic { topic: topic.clone(), source: error.into() })
            }
        }
    }

    /// Makes sure that what was kept is with the operating system or the brokers, before a checkpoint says that it was read.
    pub fn flush(&mut self) -> Result<(), Error> {
        match &mut self.to {
            To::Nowhere => Ok(()),
            To::File(path, file) => file.flush().map_err(|source| Error::File { path: path.clone(), source }),
            To::Topic(topic, sink) => {
                sink.flush(PATIENCE).map_err(|error| Error::Topic { topic: topic.clone(), source: error.into() })
            }
        }
    }
}
