//! What an operator sees of a running job, and what he tells it: shared by the core's thread and the HTTP listener.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use super::publisher::Withheld;
use crate::event::Time;
use crate::join::fuse::Jump;
use crate::merge::Attention;

/// Why nothing is released although impressions wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// No click partition speaks.
    ClickSilence,
    /// A click partition is silent and its clicks are missing.
    ClickStalled,
    /// The click-through rate of a batch has left the band.
    CtrJump,
}

impl Why {
    pub const ALL: [Self; 3] = [Self::ClickSilence, Self::ClickStalled, Self::CtrJump];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ClickSilence => "click_silence",
            Self::ClickStalled => "click_stalled",
            Self::CtrJump => "ctr_jump",
        }
    }
}

/// A held release.
#[derive(Clone, Debug, Serialize)]
pub struct Hold {
    pub why: Why,
    /// For how long, in seconds of wall time.
    pub seconds: f64,
    /// Impressions that were read and wait. What nobody has read yet waits in the log.
    pub impressions_waiting: u64,
    /// Click partitions that are waited for. None of a `ctr_jump`: the labels are final, only an operator lets it go on.
    pub waiting_for: Vec<String>,
    /// The batch, of a `ctr_jump`.
    pub batch: Option<HeldBatch>,
    /// What lets it go on.
    pub remedy: &'static str,
}

/// The batch that is held.
#[derive(Clone, Debug, Serialize)]
pub struct HeldBatch {
    /// Its number, if it is learned.
    pub number: u64,
    /// Place and position of its first impression.
    pub time: String,
    pub partition: String,
    pub offset: u64,
    #[serde(flatten)]
    pub jump: Jump,
}

/// One partition.
#[derive(Clone, Debug, Serialize)]
pub struct PartitionStatus {
    pub stream: &'static str,
    pub name: String,
    pub state: Attention,
    /// RFC 3339; none before anything was read.
    pub watermark: Option<String>,
    /// Event time behind the furthest partition of its stream, in seconds.
    pub behind_seconds: Option<f64>,
    /// Clicks that a silent partition misses by its share of the stream.
    pub clicks_missing: f64,
}

/// What `GET /status` shows.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub job: String,
    /// `starting`, `running` or `held`.
    pub state: &'static str,
    pub held: Option<Hold>,
    /// What the merge reads next, when it waits: `impressions` or `clicks`.
    pub reading: Option<&'static str>,
    /// Place of the last impression learned, RFC 3339.
    pub frontier: Option<String>,
    /// Wall time since that place, in seconds.
    pub frontier_behind_seconds: Option<f64>,
    pub impressions_waiting: u64,
    pub clicks_ahead: u64,
    pub journal_entries: u64,
    pub recent_ctr: Option<f64>,
    pub batches: u64,
    pub examples: u64,
    pub snapshot_version: Option<u64>,
    /// The newest version, if the gate held it.
    pub snapshot_held: Option<Withheld>,
    pub partitions: Vec<PartitionStatus>,
}

impl Status {
    /// Before the first look at the job.
    #[must_use]
    pub fn starting(job: &str) -> Self {
        Self {
            job: job.to_owned(),
            state: "starting",
            held: None,
            reading: None,
            frontier: None,
            frontier_behind_seconds: None,
            impressions_waiting: 0,
            clicks_ahead: 0,
            journal_entries: 0,
            recent_ctr: None,
            batches: 0,
            examples: 0,
            snapshot_version: None,
            snapshot_held: None,
            partitions: Vec::new(),
        }
    }
}

/// RFC 3339, or nothing for the two ends of time.
#[must_use]
pub fn shown(time: Time) -> Option<String> {
    (time != Time::MIN && time != Time::MAX).then(|| time.to_string())
}

/// What an operator tells the job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Do not wait for silent click partitions, or for this one, until their next record.
    Release { partition: Option<String> },
    /// Learn the held batch; where a number is given, only if it has that.
    Accept { batch: Option<u64> },
}

/// The job's answer: what it did, or why it did nothing.
pub type Answer = Result<serde_json::Value, String>;
type Reply = Box<dyn FnOnce(Answer) + Send>;

/// Shared by the core and the listener. The core looks at it between two steps and never waits for it.
pub struct Control {
    status: Mutex<Status>,
    commands: Mutex<VecDeque<(Command, Reply)>>,
    waiting: AtomicBool,
}

impl std::fmt::Debug for Control {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("status", &*lock(&self.status)).finish_non_exhaustive()
    }
}

impl Control {
    #[must_use]
    pub fn new(job: &str) -> Self {
        let (commands, waiting) = (Mutex::new(VecDeque::new()), AtomicBool::new(false));
        Self { status: Mutex::new(Status::starting(job)), commands, waiting }
    }

    #[must_use]
    pub fn status(&self) -> Status {
        lock(&self.status).clone()
    }

    pub fn show(&self, status: Status) {
        *lock(&self.status) = status;
    }

    /// Leaves a command to the core, which answers by `reply`.
    pub fn tell(&self, command: Command, reply: Reply) {
        lock(&self.commands).push_back((command, reply));
        self.waiting.store(true, Ordering::Release);
    }

    /// Whether a command waits. Costs a look at a flag.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.waiting.load(Ordering::Acquire)
    }

    /// The next command, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<(Command, Reply)> {
        let mut commands = lock(&self.commands);
        let next = commands.pop_front();
        self.waiting.store(!commands.is_empty(), Ordering::Release);
        next
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
