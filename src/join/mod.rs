//! Ordered clicks and impressions become labelled examples. Pure.
//!
//! The rules are those of `docs/semantics.md`. The caller places every click up to an impression's `time + window` and
//! then releases the impression, so a label depends on the order alone, not on what else happens to have been read.

mod attribution;
mod dedup;
pub mod fuse;

pub use attribution::{Counts, DelayCurve, Image, Join, Label, Rules, Verdict};
pub use dedup::{Seen, SeenInfo, Segment};
