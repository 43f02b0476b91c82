//! Whether a click partition's silence is credible: what it should have brought by its share of the stream.

use serde::{Deserialize, Serialize};

use crate::event::Time;

/// Shares are those of about so many of the latest clicks of the stream: between this and half of it.
pub const MEMORY: u64 = 1 << 14;

/// A click partition's part in its stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heard {
    /// Its clicks among the latest of the stream, counted as the order passes them.
    pub clicks: u64,
    /// Event time of its first click; none before it has brought one.
    pub first: Option<Time>,
    /// What the others have brought since it fell silent; none while it is not silent.
    pub silence: Option<Silence>,
}

impl Heard {
    /// Nothing is known: what need not be written down.
    #[must_use]
    pub fn is_unknown(&self) -> bool {
        *self == Self::default()
    }
}

/// What the stream brought past the end of a silent partition, in clicks read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Silence {
    /// Of the latest clicks when it fell silent, its own and those of the others.
    pub own: u64,
    pub others: u64,
    /// Clicks since, of partitions that were there before it fell silent.
    pub old: u64,
    /// Clicks since, of partitions that began later: its successors, when files are rotated or partitions added.
    pub new: u64,
}

impl Silence {
    /// How many clicks of its own are missing, of partitions in proportion to which it brought some before:
    /// `(sqrt(own) - 1)^2 / others * old - new`, not below 0. The first term is its own count less twice its
    /// standard error, so a partition with few clicks is not taken at its word; newcomers may have taken over its part.
    #[must_use]
    pub fn missing(&self) -> f64 {
        (self.ratio() * self.old as f64 - self.new as f64).max(0.0)
    }

    /// Whether others could ever show that it is missing.
    #[must_use]
    pub fn has_share(&self) -> bool {
        self.own > 1
    }

    fn ratio(&self) -> f64 {
        let sure = ((self.own as f64).sqrt() - 1.0).max(0.0);
        sure * sure / self.others.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn missing(own: u64, others: u64, old: u64, new: u64) -> f64 {
        Silence { own, others, old, new }.missing()
    }

    #[test]
    fn a_partition_with_a_quarter_of_the_clicks_misses_a_third_of_what_the_others_bring() {
        assert_eq!(missing(2500, 7500, 300, 0), 49.0 * 49.0 / 7500.0 * 300.0);
        assert!((missing(2500, 7500, 300, 0) - 100.0).abs() < 5.0);
    }

    #[test]
    fn a_partition_that_was_hardly_heard_is_not_missed() {
        assert_eq!(missing(0, 100, 1_000_000, 0), 0.0);
        assert_eq!(missing(1, 3, 1_000_000, 0), 0.0);
    }

    #[test]
    fn what_a_successor_brings_is_not_missed() {
        assert_eq!(missing(2500, 7500, 300, 100), 0.0);
        assert_eq!(missing(2500, 0, 0, 1000), 0.0);
    }
}
