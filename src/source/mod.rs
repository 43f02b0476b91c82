//! Where events come from: bytes of a log to decoded records with positions.
pub mod decode;
pub mod file;

use crate::event::Chunk;
use crate::position::NextOffset;

/// What arrives on a partition's queue, in the order of the partition.
#[derive(Debug)]
pub enum Arrival {
    /// The next records; `chunk.next` is where the partition goes on.
    Records(Box<Chunk>),
    /// Following: all that the partition had was delivered, and its end was confirmed at `next` after that.
    /// Sent once per time that the reader catches up.
    CaughtUp { next: NextOffset },
    /// Bounded input: the end that was fixed at the start has been reached. Nothing follows.
    Ended { next: NextOffset },
    /// The partition cannot be read on. Nothing follows.
    Failed(Error),
}

/// Why a source cannot be opened or read on.
#[derive(Debug, thiserror::Error)]
pub enum Error {}
