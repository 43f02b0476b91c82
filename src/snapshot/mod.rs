//! Versioned weights in a store: published so that readers see all of a version or none of it.
//!
//! [`codec`] turns arrays into canonical bytes, [`manifest`] says what a version holds, [`weights`] and [`towers`] are the model as it
//! travels ([`mod@column`]: in place in its bytes), [`delta`] is what one version changes in another, [`decide`] and [`gate`] hold the rules (pure), [`store`] talks to the store, which
//! `address` opens, `mapped` keeps payloads in files; [`publish`], [`load`], [`operate`] (what a person does to a channel) and [`retain`] use it. The
//! format and the protocol are written down in `docs/snapshot-format.md`.
mod address;
pub mod codec;
pub mod column;
pub mod decide;
pub mod delta;
pub mod gate;
pub mod load;
pub mod manifest;
mod mapped;
pub mod operate;
pub mod publish;
pub mod retain;
pub mod store;
#[cfg(test)]
mod tests;
pub mod towers;
pub mod vectors;
pub mod weights;

pub use address::{Cause, chain};
pub use delta::Delta;
pub use load::Snapshot;
pub use manifest::{Epoch, Facts, Golden, Manifest, ModelInfo, Version};
pub use publish::{Outcome, Publisher, Settings};
pub use store::{Follower, Store};
pub use towers::Towers;
pub use vectors::{Precision, Vectors};
pub use weights::Weights;

/// What went wrong with a snapshot. Each message names the key in the store and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`snapshots.store` is `{url}`: {reason}")]
    Address { url: String, reason: String },
    #[error("`snapshots.{key}` is `{value}`: {expected}")]
    Setting { key: &'static str, value: String, expected: &'static str },
    #[error("`gate.{key}` is {value}, expected {expected}")]
    Gate { key: &'static str, value: String, expected: &'static str },
    #[error("`{key}` is damaged or foreign: {reason}")]
    Corrupt { key: String, reason: &'static str, source: codec::Error },
    #[error(
        "`{key}` is not in the store, but {named_by} needs it; it was deleted by hand or by retention: take a newer version, or publish anew"
    )]
    Missing { key: String, named_by: String },
    #[error("`{key}`: {reason}; move the object away and publish anew")]
    Content { key: String, reason: String },
    #[error("`{key}` already holds other bytes than its name says: move it away, then publish again")]
    Collision { key: String },
    #[error(
        "no space left for `{key}`; nothing published was touched: free space or lower `snapshots.keep`, it is tried again at the next mark"
    )]
    Full { key: String, source: Cause },
    #[error("`{key}` in `{url}`: {advice}")]
    Refused { key: String, url: String, advice: &'static str, source: Cause },
    #[error(
        "`{url}` cannot be published to: {reason}. Without create-if-absent two trainers can overwrite each other's versions, and a paused one that wakes up cannot be fenced. Use a store that has it, or, if you make sure yourself that never more than one writer is there, add the option `unsafe_create=single-writer` to the address"
    )]
    NotCreateOnly { url: String, reason: String },
    #[error("the store did not answer for `{key}`; it is tried again")]
    Unavailable { key: String, source: Cause },
    #[error("refusing to publish: {0}")]
    Unfit(String),
}

/// What the caller does about an [`Error`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Remedy {
    /// A person is needed; going on would not help.
    Stop,
    /// This version cannot be used; the one in use goes on, the next may be good.
    SkipVersion,
    /// The same call may succeed later.
    Retry,
}

impl Error {
    #[must_use]
    pub fn remedy(&self) -> Remedy {
        match self {
            Self::Address { .. }
            | Self::Setting { .. }
            | Self::Gate { .. }
            | Self::Collision { .. }
            | Self::NotCreateOnly { .. } => Remedy::Stop,
            // Without its entry nobody knows what the channel says or who may write it.
            Self::Corrupt { key, .. } if key.starts_with("channels/") => Remedy::Stop,
            Self::Corrupt { .. } | Self::Missing { .. } | Self::Content { .. } | Self::Unfit(_) => Remedy::SkipVersion,
            // Credentials are renewed and endpoints come back while a trainer or a node runs.
            Self::Full { .. } | Self::Unavailable { .. } | Self::Refused { .. } => Remedy::Retry,
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
