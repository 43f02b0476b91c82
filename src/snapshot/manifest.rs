//! What stands in the store beside the weights: the manifest of a version and the entries of a channel.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::codec::{self, Digest};
use super::gate;
use super::vectors::Precision;
use crate::event::{Slot, Stream, Time};

/// Format name in every manifest. A reader refuses another one.
pub const MANIFEST_FORMAT: &str = "tidemill-manifest/2";
/// Format name in every channel entry.
pub const ENTRY_FORMAT: &str = "tidemill-channel/1";
/// Format name in the metadata of every payload.
pub const PAYLOAD_FORMAT: &str = "snapshot/1";
/// Format name in the metadata of the payload of a delta.
pub const DELTA_FORMAT: &str = "delta/1";

/// Number of a snapshot in a store, from 1. Strictly increasing, across restarts too; never used twice.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Version(pub u64);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Number of a writer of a channel, from 1. A larger one fences a smaller one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Everything about one version. Once written it never changes.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`MANIFEST_FORMAT`].
    pub format: String,
    /// Also the name of the object.
    pub version: Version,
    /// What the channel named when this was written.
    pub parent: Option<Version>,
    /// Of the trainer that wrote it.
    pub epoch: Epoch,
    /// Random name of that trainer's process, by which it knows its own writes.
    pub writer: String,
    /// Which line of training this belongs to: versions of one lineage have seen the same log and the same decisions.
    pub lineage: String,
    /// When it was written, by the writer's clock. For people; nothing depends on it.
    pub created: Time,
    pub kind: Kind,
    /// What a delta changes; none in a full.
    pub delta: Option<Link>,
    pub objects: Vec<ObjectRef>,
    /// Rows of all sparse tables.
    pub rows: u64,
    /// How exactly rows are published.
    pub precision: Precision,
    /// Largest distance that rounding put between a golden logit and that of the f32 rows. 0 with f32.
    pub rounding: f32,
    pub facts: Facts,
    /// How the gate judged it; none where there is no gate.
    pub gate: Option<gate::Report>,
    pub model: ModelInfo,
    pub build: Build,
    /// Examples with the logits that these weights give. A reader that computes others must not serve.
    pub golden: Vec<Golden>,
}

/// Whether a version stands alone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// All weights.
    Full,
    /// What changed since another version.
    Delta,
}

/// What a delta stands on. The hash chains versions: a reader that holds another version, or one of the same number out of
/// another store, finds out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// The version that it changes, a full or a delta.
    pub after: Version,
    /// Of the bytes of that version's manifest.
    pub after_digest: Digest,
    /// The full at the start of the chain.
    pub full: Version,
    /// Deltas from there to here, this one included.
    pub number: u32,
    /// Rows that are new or other, and rows that are gone, in all tables.
    pub changed: u64,
    pub removed: u64,
    /// The payload that a full in its place has, byte for byte; whether the store holds it too does not matter.
    pub result: ObjectRef,
}

/// A payload object that a version needs.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ObjectRef {
    /// Key in the store, `objects/<digest>.safetensors`.
    pub name: String,
    /// In bytes.
    pub length: u64,
    pub digest: Digest,
}

/// What the trainer knows about a version.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Facts {
    /// Place in the order of the last impression that was released into this version; none when there was none.
    pub frontier_time: Option<Time>,
    /// Where each partition is to be read on.
    pub positions: Vec<PartitionPosition>,
    /// Smallest and largest event time of the examples learned from.
    pub event_times: Option<(Time, Time)>,
    /// Number of the last batch learned from; grows along the order of a lineage.
    pub batch: u64,
    /// Every counter along the order: positives, negatives, late, missed, rejected and so on.
    pub counts: BTreeMap<String, u64>,
    /// The decisions of the runtime that replay needs, one line each; normally empty.
    pub journal: Vec<String>,
    /// The progressive report, of a model of age zero.
    pub metrics: serde_json::Value,
    /// Of parameters, optimizer, tables and feature state. None where the version was made from what was touched alone.
    pub model_digest: Option<String>,
    /// The model digest and everything else that the order decides.
    pub order_digest: Option<String>,
}

/// Where a partition is to be read on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionPosition {
    /// File name, or topic and partition.
    pub name: String,
    pub stream: Stream,
    /// First offset that was not released.
    pub offset: u64,
}

/// What a reader needs to know about the model besides its weights. The same for a whole run.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelInfo {
    /// `logistic` or `two_tower`.
    pub kind: String,
    pub config: serde_json::Value,
    /// The feature schema, as in the training config.
    pub schema: serde_json::Value,
    /// A node that encodes under another schema hash must refuse the version.
    pub schema_hash: String,
}

/// What the weights were computed with: bytes are equal on machines of one class.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Build {
    /// Of the tidemill crate.
    pub crate_version: String,
    /// Architecture and operating system, `x86_64-linux`.
    pub target: String,
}

impl Build {
    #[must_use]
    pub fn this() -> Self {
        let target = format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS);
        Self { crate_version: env!("CARGO_PKG_VERSION").to_owned(), target }
    }
}

/// An encoded example and its logit.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Golden {
    pub slots: Vec<GoldenSlot>,
    pub logit: f32,
}

/// A [`Slot`] as it is written down.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenSlot {
    /// 16 lower-case hex digits, since JSON readers lose integers past 2^53.
    #[serde(with = "hex64")]
    pub row: u64,
    pub value: f32,
    pub feature: u16,
}

impl Golden {
    #[must_use]
    pub fn new(slots: &[Slot], logit: f32) -> Self {
        let slots = slots.iter().map(|s| GoldenSlot { row: s.row, value: s.value, feature: s.feature }).collect();
        Self { slots, logit }
    }

    #[must_use]
    pub fn slots(&self) -> Vec<Slot> {
        let slot = |s: &GoldenSlot| Slot { row: s.row, value: s.value, feature: s.feature, flags: 0 };
        self.slots.iter().map(slot).collect()
    }
}

mod hex64 {
    use serde::Deserialize;

    pub fn serialize<S: serde::Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:016x}"))
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let canonical = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        let parsed = if canonical { u64::from_str_radix(&text, 16).ok() } else { None };
        parsed.ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not 16 lower-case hex digits")))
    }
}

/// One entry of a channel. The one with the highest number counts; the others are its history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// [`ENTRY_FORMAT`].
    pub format: String,
    pub channel: String,
    /// Also the name of the object; from 1, without gaps.
    pub number: u64,
    /// Never falls along a channel.
    pub epoch: Epoch,
    /// Random name of the writer's process, by which it knows its own writes.
    pub writer: String,
    /// What was done.
    pub act: Act,
    /// What to serve; none as long as nothing was published.
    pub version: Option<Version>,
    /// While this is so no trainer moves the channel; it publishes versions all the same.
    pub pinned: bool,
    /// By the writer's clock. For people; nothing depends on it.
    pub created: Time,
}

/// What an entry of a channel does. The last four are an operator's, who has no epoch of their own.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Act {
    /// A trainer takes the channel, with a new epoch; the version stays.
    Start,
    /// A trainer names a version that it has published.
    Publish,
    /// Names a version by hand.
    Promote,
    /// Holds a version.
    Pin,
    /// Goes back to an earlier version, and holds it.
    Rollback,
    /// Lets go of the version held; the trainer's next publication moves the channel.
    Unpin,
}

impl Act {
    #[must_use]
    pub fn is_by_operator(self) -> bool {
        !matches!(self, Self::Start | Self::Publish)
    }

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Publish => "publish",
            Self::Promote => "promote",
            Self::Pin => "pin",
            Self::Rollback => "rollback",
            Self::Unpin => "unpin",
        }
    }
}

/// A sealed document of the store: its first member is its format.
pub trait Document: Serialize + serde::de::DeserializeOwned {
    const FORMAT: &'static str;

    fn to_bytes(&self) -> codec::Result<Vec<u8>> {
        codec::seal(self)
    }

    /// Verifies the check, the format, and that there is no field that we do not know.
    fn from_bytes(bytes: &[u8]) -> codec::Result<Self> {
        #[derive(Deserialize)]
        struct Probe {
            format: String,
        }
        let json = codec::unseal(bytes)?;
        let Probe { format } = serde_json::from_slice(&json)?;
        if format != Self::FORMAT {
            return Err(codec::Error::Format { expected: Self::FORMAT.to_owned(), found: format });
        }
        Ok(serde_json::from_slice(&json)?)
    }
}

impl Document for Manifest {
    const FORMAT: &'static str = MANIFEST_FORMAT;
}

impl Document for Entry {
    const FORMAT: &'static str = ENTRY_FORMAT;
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub fn manifest(version: u64) -> Manifest {
        Manifest {
            format: MANIFEST_FORMAT.to_owned(),
            version: Version(version),
            parent: None,
            epoch: Epoch(1),
            writer: "w".to_owned(),
            lineage: "main".to_owned(),
            created: Time(0),
            kind: Kind::Full,
            delta: None,
            objects: Vec::new(),
            rows: 0,
            precision: Precision::F32,
            rounding: 0.0,
            facts: Facts::default(),
            gate: None,
            model: ModelInfo::default(),
            build: Build::this(),
            golden: vec![Golden::new(&[Slot { row: u64::MAX, value: 0.1, feature: 3, flags: 0 }], -1.5e-8)],
        }
    }

    #[test]
    fn an_unknown_field_or_a_newer_format_is_refused_and_named() {
        let mut value = serde_json::to_value(manifest(1)).unwrap();
        value["surprise"] = 1.into();
        let error = Manifest::from_bytes(&codec::seal(&value).unwrap()).unwrap_err();
        assert!(format!("{error:?}").contains("surprise"), "{error:?}");
        value["format"] = "tidemill-manifest/3".into();
        let error = Manifest::from_bytes(&codec::seal(&value).unwrap()).unwrap_err();
        assert!(error.to_string().contains("tidemill-manifest/3"), "{error}");
    }

    proptest! {
        #[test]
        fn floats_and_rows_come_back_exactly(row in any::<u64>(), value in any::<f32>(), logit in any::<f32>(), metric in any::<f64>()) {
            prop_assume!(value.is_finite() && logit.is_finite() && metric.is_finite());
            let mut before = manifest(7);
            before.golden = vec![Golden::new(&[Slot { row, value, feature: 1, flags: 0 }], logit)];
            before.facts.metrics = serde_json::json!({ "logloss": metric });
            let after = Manifest::from_bytes(&before.to_bytes().unwrap()).unwrap();
            prop_assert_eq!(after.golden[0].logit.to_bits(), logit.to_bits());
            prop_assert_eq!(after.golden[0].slots()[0].value.to_bits(), value.to_bits());
            prop_assert_eq!(after.golden[0].slots()[0].row, row);
            prop_assert_eq!(after.facts.metrics["logloss"].as_f64().unwrap().to_bits(), metric.to_bits());
            prop_assert_eq!(after, before);
        }
    }
}
