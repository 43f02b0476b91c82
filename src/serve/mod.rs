//! A serving node: follows a channel, proves each version before it swaps it in, and scores requests.
//!
//! [`Node`] is for embedding in a server of one's own (`examples/embed.rs`); [`http`] is the server that `tidemill serve`
//! runs. `docs/serving.md` is the user's page.
//!
//! ```no_run
//! use tidemill::serve::{Node, Scorer, Settings};
//!
//! let node = Node::open(&Settings { store: "snapshots".into(), ..Settings::default() })?;
//! let mut scorer = Scorer::new(); // scratch, one for each thread
//! if let Some(model) = node.model() {
//!     // This model is one version, whatever is swapped in meanwhile.
//!     let context = br#"{"user": {"id": 7}}"#;
//!     let candidates = [&br#"{"item": {"id": 1}}"#[..], br#"{"item": {"id": 2}}"#];
//!     let scores = scorer.score(&model, context, candidates)?;
//!     println!("version {}: {scores:?}", model.version());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
pub mod http;
pub mod index;
pub mod model;
pub mod reload;
pub mod score;
pub mod towers;

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use crate::source::decode::request::{Part, Refused, Wrong};
pub use model::Model;
pub use reload::{Node, Status};
pub use score::{Score, Scorer};

/// Why a node or its server cannot start, or a version cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{key}` is `{value}`: {expected}")]
    Setting { key: &'static str, value: String, expected: &'static str },
    #[error("cannot listen on `{address}` (`http.listen`)")]
    Listen { address: String, source: std::io::Error },
    #[error("cannot start {what}")]
    Start { what: &'static str, source: std::io::Error },
    #[error("the cache `{}`", path.display())]
    Cache { path: PathBuf, source: std::io::Error },
    #[error("version {version} cannot be served: {reason}")]
    Unservable { version: crate::snapshot::Version, reason: String },
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::Error),
}

/// The configuration of `tidemill serve`, and of an embedded [`Node`] (which has no use for `http`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Snapshot store: a directory, or a bucket such as `s3://bucket/prefix` (`docs/stores.md`). Default `"snapshots"`.
    pub store: String,
    /// Channel that names the version to serve. Default `"live"`.
    pub channel: String,
    /// How often the channel is asked for something new, give or take a quarter, so that many nodes do not ask at once.
    /// Default 1s.
    #[serde(with = "humantime_serde")]
    pub poll: Duration,
    /// While the store does not answer, each pause is twice the one before, up to this. Default 15s.
    #[serde(with = "humantime_serde")]
    pub poll_max: Duration,
    /// A version that did not come in this time is asked for anew. Default 5m.
    #[serde(with = "humantime_serde")]
    pub load_timeout: Duration,
    /// Payloads are read at no more than so many bytes a second, so that a fleet that loads at once does not fill the network.
    /// Default 0: no bound.
    pub load_bytes_per_second: u64,
    /// Directory for the version being served, on a local disk with room for two fulls: a full is mapped from there, and a node
    /// starts while the store is away. One node at a time may use it, and nothing else may write there. Default: none, then a full
    /// is mapped from a file without a name in the directory for temporary files (`TMPDIR`), which wants the same room; what
    /// cannot be written to either is held in memory, and two fulls while one loads.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<PathBuf>,
    pub http: http::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            store: "snapshots".into(),
            channel: "live".into(),
            poll: Duration::from_secs(1),
            poll_max: Duration::from_secs(15),
            load_timeout: Duration::from_secs(300),
            load_bytes_per_second: 0,
            cache: None,
            http: http::Settings::default(),
        }
    }
}

/// Shorter pauses and limits are mistakes.
const SHORTEST: Duration = Duration::from_millis(1);

impl Settings {
    /// Checks all that can be checked without touching a file or a store.
    pub fn check(&self) -> Result<(), Error> {
        crate::snapshot::publish::check_channel(&self.channel)?;
        at_least("poll", self.poll, SHORTEST, "must be at least 1ms")?;
        at_least("poll_max", self.poll_max, self.poll, "must be at least `poll`")?;
        at_least("load_timeout", self.load_timeout, SHORTEST, "must be at least 1ms")?;
        self.http.check()
    }
}

fn at_least(key: &'static str, value: Duration, least: Duration, expected: &'static str) -> Result<(), Error> {
    if value >= least {
        return Ok(());
    }
    Err(Error::Setting { key, value: format!("{value:?}"), expected })
}
