//! What a training job is asked for, and why it cannot start or go on.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::control::Control;
use super::warm::WarmStart;
use super::{dead_letters, publisher};
use crate::config;
use crate::event::{Stream, Time};
use crate::join::fuse::Jump;
use crate::merge::JournalEntry;
use crate::source;
use crate::train::checkpoint;
use crate::train::compare::Stretch;
use crate::train::image::FORMAT;

/// How long the job reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// For ever: follows growing files.
    Stopped,
    /// To the end that the files have at the start.
    End,
    /// Impressions before this time, clicks up to a window later.
    Time(Time),
}

/// Where the decisions of an earlier run are.
#[derive(Clone, Debug)]
pub enum Journal {
    /// In a manifest of its.
    Manifest(PathBuf),
    /// Here, and the partitions that they are about, by number.
    Entries { entries: Vec<JournalEntry>, partitions: Vec<(Stream, String)> },
}

/// What one run is asked for, beside its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    pub until: Until,
    /// With [`Until::Time`]: wait for files to grow rather than end where they end.
    pub follow: bool,
    /// Go on where retention has dropped records that were not trained, rather than stop.
    pub skip_lost: bool,
    /// What the runtime of an earlier run over the same log decided, which is decided again.
    pub journal: Option<Journal>,
    /// File for id, prediction and label of every example.
    pub predictions: Option<PathBuf>,
    /// Where operators look and speak; none: nobody does.
    pub control: Option<Arc<Control>>,
    /// A bounded run ends before the first window that the end of the click log cuts, and learns nothing of what is cut.
    pub whole: bool,
    /// What a new start begins with; none: nothing is known.
    pub warm: Option<WarmStart>,
    /// Where this model is compared with another one.
    pub compare: Option<Stretch>,
    /// The configuration file and what is laid over it: read again when a retrained model is handed over.
    pub config: Option<(PathBuf, Vec<String>)>,
}

impl Options {
    /// A run that nobody watches and that writes no more than its configuration says.
    #[must_use]
    pub fn until(until: Until) -> Self {
        Self {
            until,
            follow: false,
            skip_lost: false,
            journal: None,
            predictions: None,
            control: None,
            whole: false,
            warm: None,
            compare: None,
            config: None,
        }
    }

    /// Whether the input may still grow.
    #[must_use]
    pub fn follows(&self) -> bool {
        self.until == Until::Stopped || self.follow
    }
}

/// Why a job cannot start or go on. Nothing that was checkpointed is lost by any of them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Rewritten(#[from] crate::merge::Rewritten),
    #[error(
        "this lineage has learned {0} batches, the most that a row can remember; start a new one by a retrain into another `checkpoint.dir`"
    )]
    TooManyBatches(u64),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Content(#[from] crate::snapshot::codec::Error),
    #[error(transparent)]
    Publish(#[from] publisher::Error),
    #[error(transparent)]
    DeadLetters(#[from] dead_letters::Error),
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    #[error(transparent)]
    Progressive(#[from] crate::train::progressive::Error),
    #[error(transparent)]
    Mapping(#[from] source::decode::Error),
    #[error(
        "the checkpoint in `{}` was made under other settings: {differences}. Put them back to go on from it; for a new \
         start under the new settings give `checkpoint.dir` another directory",
        dir.display()
    )]
    OtherSettings { dir: PathBuf, differences: String },
    #[error("the checkpoint in `{}` has format {found}, this build reads {FORMAT}", dir.display())]
    OtherFormat { dir: PathBuf, found: u32 },
    #[error("the head of the checkpoint in `{}` cannot be read", dir.display())]
    Head { dir: PathBuf, source: serde_json::Error },
    #[error(
        "the checkpoint has read `{name}` of {stream} further than it has trained, but the config no longer finds it: bring \
         it back until its impressions are trained (a partition that was trained to its end may go)"
    )]
    PartitionGone { name: String, stream: &'static str },
    #[error("the journal in `{from}` cannot be obeyed: {why}")]
    Journal { from: String, why: String },
    #[error(
        "the click-through rate jumped: {} clicks in {} impressions where {:.5} of them were clicked before (batch {batch}, \
         from {time}). Bounded input brings no more clicks, so nothing of it was learned. Look for the cause; \
         `--set 'fuse.ctr_band=\"never\"'` learns it as it is",
        jump.run.clicks,
        jump.run.impressions,
        jump.recent_ctr
    )]
    CtrJump { batch: u64, time: Time, jump: Jump },
    #[error("cannot write predictions to `{}`", path.display())]
    Predictions { path: PathBuf, source: io::Error },
    #[error(transparent)]
    WarmStart(#[from] super::warm::Error),
    #[error(transparent)]
    HandOver(#[from] super::handover::Error),
    #[error(
        "the checkpoint in `{}` belongs to another retrain ({found}), not to {expected}; give this one another directory",
        dir.display()
    )]
    OtherBranch { dir: PathBuf, found: String, expected: String },
    #[error(transparent)]
    Examples(#[from] source::columnar::sink::Error),
    #[error("a thread cannot be started: {0}")]
    Thread(#[source] io::Error),
}
