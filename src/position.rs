//! Where in a partition something stands.

use std::fmt;

/// First offset of a partition that has **not** been read; equals what Kafka expects in a commit and where a file is
/// to be read on. Carries a fingerprint of the record before it, so that a rewritten file or a recreated topic is noticed.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextOffset {
    /// Byte offset in the decompressed file, row of a Parquet file, or Kafka offset.
    pub offset: u64,
    /// Of the record that ends at `offset`; [`Fingerprint::NONE`] at the start of a partition.
    pub before: Fingerprint,
}

/// Low 32 bits of the xxh3 of a raw record, without its line end.
#[derive(Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(pub u32);

impl Fingerprint {
    /// Nothing stands before.
    pub const NONE: Self = Self(0);

    #[must_use]
    pub fn of(raw: &[u8]) -> Self {
        // 0 means "nothing before", so a record never has it.
        Self((xxhash_rust::xxh3::xxh3_64(raw) as u32).max(1))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}
