//! The words of the log: times, ids, and what one decoded record is.
//!
//! An event in memory is already encoded: hashed feature ids and floats in the arenas of a [`Chunk`]. Nothing here
//! holds a JSON value or a `String` per record.

use std::fmt;

/// A moment or a place in the order, in milliseconds since the Unix epoch, UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Time(pub i64);

impl Time {
    /// Before every record: the watermark of a partition of which nothing was read.
    pub const MIN: Self = Self(i64::MIN);
    /// After every record: the watermark of a partition that has ended.
    pub const MAX: Self = Self(i64::MAX);

    /// Later by `ms`; [`Time::MIN`] and [`Time::MAX`] stay what they are.
    #[must_use]
    pub fn plus(self, ms: i64) -> Self {
        if self == Self::MIN || self == Self::MAX { self } else { Self(self.0.saturating_add(ms)) }
    }

    /// Earlier by `ms`; [`Time::MIN`] and [`Time::MAX`] stay what they are.
    #[must_use]
    pub fn minus(self, ms: i64) -> Self {
        self.plus(-ms)
    }
}

impl fmt::Debug for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::MIN => f.write_str("-inf"),
            Self::MAX => f.write_str("+inf"),
            Self(ms) => write!(f, "{ms}ms"),
        }
    }
}

/// `2026-11-23T20:09:00.123Z`, or `-inf` and `+inf` for the two ends.
impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match chrono::DateTime::from_timestamp_millis(self.0) {
            Some(at) => write!(f, "{}", at.format("%Y-%m-%dT%H:%M:%S%.3fZ")),
            None => fmt::Debug::fmt(self, f),
        }
    }
}

/// Which stream a record belongs to. At equal time impressions come before clicks in the order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Stream {
    Impressions = 0,
    Clicks = 1,
}

impl Stream {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Impressions => "impressions",
            Self::Clicks => "clicks",
        }
    }
}

/// One feature value of an example as the model sees it: a table row and how strongly it is on.
///
/// The slots of an example are grouped by `feature`, in schema order, base features before crosses.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
#[repr(C)]
pub struct Slot {
    /// Hash of (feature, value) that tells its feature, see `docs/encoding.md`. Never 0: tables use 0 for an empty place.
    pub row: u64,
    /// 1 for a category, `1/sqrt(n)` for each of a bag of n, the scaled number for a linear numeric. Finite, `|v| <= 1e6`.
    pub value: f32,
    /// Index of the feature or cross in the schema.
    pub feature: u16,
    /// [`Slot::MISSING`] and no others yet.
    pub flags: u16,
}

impl Slot {
    /// The record had no value for this feature; the row is the feature's *missing* row.
    pub const MISSING: u16 = 1;
}

/// What a record turned out to be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(u8)]
pub enum Kind {
    /// An impression whose label comes from the click stream.
    #[default]
    Impression,
    /// An impression that carries its label: it enters behind the join.
    Labelled { positive: bool },
    /// A click; `id` is its impression's id.
    Click,
    /// A click-stream record that only says "alive at this time".
    Heartbeat,
    /// Not usable; takes the local watermark as its place, is counted along the order and goes to the dead letters.
    /// Its reason is in [`Chunk::rejects`], its raw bytes are its `text`.
    Rejected,
}

/// One decoded record, without its features' data, which lies in the chunk's arenas.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Record {
    /// xxh3 of the canonical text of the id (`10` and `"10"` are one); 0 for rejects and heartbeats.
    pub id: u64,
    /// When it happened, as the record says. For rejects [`Time::MIN`].
    pub event_time: Time,
    /// When the log took it, if the log says; else [`Time::MIN`].
    pub log_time: Time,
    /// Where the record starts in its partition: byte offset in the (decompressed) file, row of a Parquet file, or Kafka offset.
    pub offset: u64,
    /// Index inside the record's slate; 0 for records that hold one event.
    pub row: u32,
    /// Importance weight of the example, `0 < weight <= 1e6`.
    pub weight: f32,
    /// The features: `chunk.slots[slots_start..][..slots_len]`.
    pub slots_start: u32,
    pub slots_len: u32,
    /// The id as text if the decoder was asked to keep it, the raw record for rejects: `chunk.text[text_start..][..text_len]`.
    pub text_start: u32,
    pub text_len: u32,
    /// Fingerprint of the raw record *before* the one at `offset` ([`crate::position::Fingerprint`]).
    pub before: u32,
    /// Digest of the encoded record, independent of where it lay; breaks ties in the order. Set by [`Chunk::seal`].
    pub content: u64,
    pub kind: Kind,
}

/// Consecutive records of one partition, decoded together. The unit that travels from source to merge, and is reused.
#[derive(Default, Debug)]
pub struct Chunk {
    pub records: Vec<Record>,
    pub slots: Vec<Slot>,
    pub text: Vec<u8>,
    /// (index in `records`, why) of each [`Kind::Rejected`], ascending.
    pub rejects: Vec<(u32, String)>,
    /// What the log holds of records that are, or may yet be, rejected; ascending by `index`.
    pub originals: Vec<Original>,
    /// Where the partition goes on after this chunk.
    pub next: crate::position::NextOffset,
    /// Bytes of log that the chunk was made of, before decoding.
    pub bytes: u64,
}

impl Chunk {
    /// Empties the chunk and keeps its memory.
    pub fn clear(&mut self) {
        self.records.clear();
        self.slots.clear();
        self.text.clear();
        self.rejects.clear();
        self.originals.clear();
        self.next = crate::position::NextOffset::default();
        self.bytes = 0;
    }

    /// Sets [`Record::content`] of every record, once the chunk is complete.
    pub fn seal(&mut self) {
        let (slots, text) = (&self.slots, &self.text);
        for record in &mut self.records {
            let mut digest = fold(record.event_time.0 as u64, u64::from(record.weight.to_bits()));
            match record.kind {
                Kind::Rejected => {
                    let raw = &text[record.text_start as usize..][..record.text_len as usize];
                    digest = fold(digest, xxhash_rust::xxh3::xxh3_64(raw));
                }
                Kind::Labelled { positive } => digest = fold(digest, 2 + u64::from(positive)),
                Kind::Impression | Kind::Click | Kind::Heartbeat => {}
            }
            for slot in &slots[record.slots_start as usize..][..record.slots_len as usize] {
                let rest =
                    u64::from(slot.value.to_bits()) << 32 | u64::from(slot.feature) << 16 | u64::from(slot.flags);
                digest = fold(digest ^ slot.row, rest);
            }
            record.content = digest;
        }
    }

    #[must_use]
    pub fn slots_of(&self, record: &Record) -> &[Slot] {
        &self.slots[record.slots_start as usize..][..record.slots_len as usize]
    }

    #[must_use]
    pub fn text_of(&self, record: &Record) -> &[u8] {
        &self.text[record.text_start as usize..][..record.text_len as usize]
    }

    /// Why the record at `index` was rejected; empty if it was not.
    #[must_use]
    pub fn reason_of(&self, index: usize) -> &str {
        self.rejects
            .binary_search_by_key(&(index as u32), |(at, _)| *at)
            .map_or("", |found| self.rejects[found].1.as_str())
    }
}

impl Chunk {
    /// The key, if it has one, and the value of the record at `index` as the log has them, if they were kept.
    #[must_use]
    pub fn original_of(&self, index: usize) -> Option<(Option<&[u8]>, &[u8])> {
        let found = self.originals.binary_search_by_key(&(index as u32), |original| original.index).ok()?;
        let bytes = |(start, len): (u32, u32)| &self.text[start as usize..][..len as usize];
        let Original { key, value, .. } = self.originals[found];
        Some((key.map(bytes), bytes(value)))
    }
}

/// A record as its log has it: start and length in the text of its chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Original {
    /// In [`Chunk::records`].
    pub index: u32,
    pub key: Option<(u32, u32)>,
    pub value: (u32, u32),
}

/// Mixes `b` into `a` by a folded 64 x 64 -> 128 bit product, as wyhash does.
fn fold(a: u64, b: u64) -> u64 {
    let product = u128::from(a ^ 0x9E37_79B9_7F4A_7C15) * u128::from(b ^ 0xE703_7ED1_A0B4_28DB);
    (product as u64) ^ ((product >> 64) as u64)
}

/// One labelled example on its way into the model: what the core hands to batch, model and metrics.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    pub slots: &'a [Slot],
    /// Did the click come.
    pub positive: bool,
    /// Importance weight from the record.
    pub weight: f32,
    /// Natural log of 1/r where negatives are kept at rate r, else 0: added to the logit in training, so that what is
    /// learned stays calibrated for the whole stream. Metrics weigh a kept negative by 1/r.
    pub sampling_offset: f32,
    /// The impression's place in the order.
    pub time: Time,
    /// xxh3 of the impression id.
    pub id: u64,
}
