//! Where events come from: bytes of a log to decoded records with positions.
//!
//! A *partition* (a file, or one of a Kafka topic) has one reader thread, which cuts it into blocks of whole records, and
//! one bounded queue, on which the decoded blocks arrive in order. Blocks of all partitions are decoded by one pool of
//! workers. A worker never waits for a queue, so a partition whose records nobody takes stops its own reader and nothing
//! else.
pub mod blob;
pub mod columnar;
pub mod decode;
pub mod file;
pub mod kafka;
pub mod pool;
mod readers;
mod settings;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::event::Chunk;
use crate::position::{Fingerprint, NextOffset};

pub use file::{Mode, Spec, expand};
pub use pool::{Partition, Recycler};
pub use readers::Sources;
pub use settings::{Kind, Origin, Settings, StartSetting};

/// Turns one raw record into encoded ones.
///
/// Which worker decodes which record is up to chance, so a decoder keeps buffers from one record to the next, never
/// anything that shows in what it writes.
pub trait Decode: Send {
    /// Appends what the record `raw` holds to `out`: one [`Record`](crate::event::Record), several (a slate), or one of
    /// kind [`Rejected`](crate::event::Kind::Rejected) with its reason. `raw` has no line end and is not blank; it starts at
    /// `offset` of its partition, behind a record with the fingerprint `before`. Leaves `out.next` and `out.bytes` alone.
    fn decode(&mut self, raw: &[u8], offset: u64, before: Fingerprint, out: &mut Chunk);

    /// The same for a row of a table; without a method of its own, by way of the row's text.
    fn decode_row(&mut self, row: &dyn decode::Row, offset: u64, before: Fingerprint, out: &mut Chunk) {
        let mut text = Vec::new();
        row.append_text(&mut text);
        self.decode(&text, offset, before, out);
    }

    /// The decoder whose paths say which columns of a table are read; without one, tables cannot be read.
    fn as_decoder(&self) -> Option<&decode::Decoder> {
        None
    }
}

/// Makes a decoder; each worker makes its own, once per distinct `Arc`, so the partitions of a stream should share one.
pub type NewDecoder = Arc<dyn Fn() -> Box<dyn Decode> + Send + Sync>;

/// What arrives on a partition's queue, in the order of the partition.
#[derive(Debug)]
pub enum Arrival {
    /// The next records; `chunk.next` is where the partition goes on. May hold no record (blank lines).
    Records(Box<Chunk>),
    /// Following: all that the partition had was delivered, and its end was confirmed at `next` after that.
    /// Sent once per time that the reader catches up.
    CaughtUp { next: NextOffset },
    /// Following: what [`Arrival::CaughtUp`] said does not hold any more: nobody answers, or there is more to come.
    Unconfirmed,
    /// Bounded input: the end that was fixed at the start has been reached. Nothing follows.
    Ended { next: NextOffset },
    /// The partition cannot be read on. Nothing follows.
    Failed(Error),
}

/// Why a source cannot be opened or read on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read `{}`; check that it exists and that this user may read it", file.display())]
    Unreadable { file: PathBuf, source: io::Error },

    #[error("`{pattern}` matches no file; a pattern may hold `*` and `?` in its last part, after the last `/`")]
    NoMatch { pattern: String },

    #[error("`{pattern}` cannot be read: {why}")]
    Store { pattern: String, why: String },

    #[error("`{key}` must be {expected}, got {value}")]
    Setting { key: String, expected: &'static str, value: String },

    #[error(
        "`{}` is cut off: its compressed data ends too early. The {offset} bytes (decompressed) before that were read; \
         put the complete file in its place and start again, reading goes on from there",
        file.display()
    )]
    Truncated { file: PathBuf, offset: u64 },

    #[error(
        "`{}` is damaged: its compressed data cannot be read past {offset} bytes (decompressed); put an intact \
         copy of the same content in its place and start again, reading goes on from there",
        file.display()
    )]
    Corrupt { file: PathBuf, offset: u64, source: io::Error },

    #[error("`{}` cannot be read as Parquet: {problem}", file.display())]
    Parquet { file: PathBuf, problem: String },

    #[error(
        "`{}` is damaged: what follows row {row} cannot be read ({why}); put an intact copy of the same file in its place and \
         start again, reading goes on from there",
        file.display()
    )]
    DamagedRows { file: PathBuf, row: u64, why: String },

    #[error(
        "`{}` is not the file that was read before: at byte {offset}, {why}. A log may only grow: bring the old content back \
         to go on, or give the new content a new file name, or start without the old positions",
        file.display()
    )]
    Rewritten { file: PathBuf, offset: u64, why: String },

    #[error("reading `{partition}` panicked in the {at}: {message}; this is a bug of tidemill, please report it")]
    Panicked { partition: String, at: String, message: String },

    #[error(transparent)]
    Kafka(Box<kafka::Error>),

    #[error("cannot start a thread to {what}; raise the limit on threads or read fewer files")]
    Thread { what: String, source: io::Error },
}

impl std::convert::From<kafka::Error> for Error {
    fn from(error: kafka::Error) -> Self {
        Self::Kafka(Box::new(error))
    }
}

#[cfg(test)]
mod tests;
