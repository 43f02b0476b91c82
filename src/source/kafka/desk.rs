//! What the thread that serves a stream's client and the readers of its partitions share.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// Where a partition begins and ends, as the broker last said, and how far it has been read.
#[derive(Debug, Default)]
pub(super) struct Ends {
    /// First offset that there is.
    pub(super) low: AtomicU64,
    /// First offset that was not written: the high watermark, open transactions included.
    pub(super) high: AtomicU64,
    /// Number of the last round of questions that the broker answered, from 1.
    pub(super) round: AtomicU64,
    /// The last round got no answer for this partition.
    pub(super) away: AtomicBool,
    /// First offset that was not handed on to be decoded.
    pub(super) position: AtomicU64,
    pub(super) tombstones: AtomicU64,
    /// By how much retention last moved `low`.
    pub(super) jump: AtomicU64,
}

impl Ends {
    pub(super) fn high(&self) -> u64 {
        self.high.load(Ordering::Acquire)
    }
}

/// What the thread that serves the client and the readers share.
pub(super) struct Desk {
    pub(super) stop: AtomicBool,
    /// A reader waits for a round of questions.
    pub(super) asked: AtomicBool,
    /// Number of the round that was begun last.
    pub(super) begun: AtomicU64,
    pub(super) partitions: Mutex<BTreeMap<(String, i32), Arc<Ends>>>,
    /// Partitions that were seen first while running, with their first offset.
    pub(super) found: Mutex<Vec<(String, i32, u64)>>,
    pub(super) commit: Mutex<Option<Vec<(String, i32, u64)>>>,
    /// The client is of no more use.
    pub(super) fatal: Mutex<Option<String>>,
}
