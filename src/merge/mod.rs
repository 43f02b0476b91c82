//! Many partitions of two streams become one total order that is a function of the log alone.
//!
//! The rules are those of `docs/semantics.md`: a record's place is `max(event_time, W)`, an impression at `t` is released
//! once every awaited partition has `W > t` and every awaited click partition `W > t + window`. Pure: chunks come in
//! through [`Merge::offer`], ordered records leave through [`Merge::release`], and what to read next is said, not done.

mod frontier;
mod reorder;
mod silence;
mod watermark;

pub use frontier::{
    Attention, Click, Decision, Held, JournalEntry, Key, Merge, PartitionPosition, ReadCounts, Ready, Rejected,
    Released, Rewritten, Rules, Step, StreamRules, WaitReason,
};
pub use silence::{Heard, Silence};
pub use watermark::{Bounds, Placing, Watermark};
