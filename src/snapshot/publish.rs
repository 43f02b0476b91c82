//! The writer of a channel: takes an epoch, then publishes payload, manifest and channel entry, in this order.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::codec::{self, Digest, Encoded};
use super::decide::{self, Standing, Writer};
use super::delta::Delta;
use super::gate;
use super::load::Snapshot;
use super::manifest::{
    Build, DELTA_FORMAT, Document, Entry, Epoch, Facts, Golden, Kind, Link, MANIFEST_FORMAT, Manifest, ModelInfo,
    ObjectRef, PAYLOAD_FORMAT, Version,
};
use super::store::{Created, Store, document, entry_key, manifest_key, object_key, random};
use super::vectors::Precision;
use super::weights::{self, Weights};
use super::{Error, Remedy, Result};
use crate::clock;
use crate::event::Time;

/// Where snapshots go, and how long they stay.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Directory, `file://` and an absolute path, or a bucket: `s3://bucket/prefix`, `gs://`, `az://`, `abfss://`, with
    /// options behind a `?` (`docs/stores.md`). Default `snapshots`, in the working directory.
    pub store: String,
    /// Channel that names the version to serve: letters, digits, `-` and `_`. Default `live`.
    pub channel: String,
    /// How exactly rows are published: `f32`, `f16` or `int8` ([`Precision`]). Training is always f32. Default `f32`.
    pub precision: Precision,
    /// A full comes after so many deltas at the latest, or when they are together as large as it. 0: fulls only. Default 20.
    pub deltas: u32,
    /// How many of the newest versions stay. At least 1. Default 10.
    pub keep: usize,
    /// Nothing younger is ever deleted; longer than a publish or a load can take. Default `15m`.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            store: "snapshots".to_owned(),
            channel: "live".to_owned(),
            precision: Precision::F32,
            deltas: 20,
            keep: 10,
            grace: Duration::from_secs(15 * 60),
        }
    }
}

/// [`Settings`] that were checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub(super) store: String,
    pub(super) channel: String,
    pub(super) precision: Precision,
    pub(super) deltas: u32,
    pub(super) keep: usize,
    pub(super) grace_ms: i64,
}

impl Settings {
    pub fn check(&self) -> Result<Plan> {
        check_channel(&self.channel)?;
        if self.keep == 0 {
            return Err(Error::Setting { key: "keep", value: "0".to_owned(), expected: "at least 1" });
        }
        let Ok(grace_ms) = i64::try_from(self.grace.as_millis()) else {
            return Err(Error::Setting { key: "grace", value: format!("{:?}", self.grace), expected: "less" });
        };
        Ok(Plan {
            store: self.store.clone(),
            channel: self.channel.clone(),
            precision: self.precision,
            deltas: self.deltas,
            keep: self.keep,
            grace_ms,
        })
    }
}

impl Plan {
    /// Opens the store for writing.
    pub fn open(&self) -> Result<Store> {
        Store::create(&self.store)
    }

    /// A plan for retention alone, by hand.
    pub fn of_retention(keep: usize, grace: Duration) -> Result<Self> {
        Settings { keep, grace, ..Settings::default() }.check()
    }
}

/// Refuses names that are not a single plain part of a key.
pub fn check_channel(name: &str) -> Result<()> {
    if !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
        return Ok(());
    }
    Err(Error::Setting {
        key: "channel",
        value: name.to_owned(),
        expected: "letters, digits, `-` and `_`, at least one",
    })
}

/// What is to be published.
#[derive(Clone, Debug)]
pub enum Content {
    /// All weights, in f32.
    Whole(Arc<Weights>),
    /// What was touched, in f32, since a batch, which must be the one that [`Publisher::acknowledged`] names.
    Changes { since: u64, touched: Arc<Delta> },
}

impl From<Weights> for Content {
    fn from(weights: Weights) -> Self {
        Self::Whole(Arc::new(weights))
    }
}

/// How a publish ended when nothing failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The channel names this version.
    Published(Version),
    /// The gate held this version: it is in the store, and the channel that ends in `-held` names it.
    Held(Version),
    /// This version is in the store. An operator has pinned the channel to `at`, which goes on being served.
    Pinned { version: Version, at: Version },
    /// Another trainer took the channel. This one must not publish any more.
    Fenced { by: Epoch },
    /// The lineage has published this batch or a later one: a trainer that goes over its log again after a crash waits
    /// until it has passed it.
    Behind { newest: Version },
}

/// The writer of a channel. There is one at a time: opening a second one fences the first.
#[derive(Debug)]
pub struct Publisher {
    store: Store,
    writer: Writer,
    lineage: String,
    model: ModelInfo,
    /// Number of the newest entry of the channel that we know.
    last: u64,
    /// What that entry names, and its last batch if it is of our lineage.
    live: Option<(Version, Option<u64>)>,
    /// Whether that entry is pinned.
    pinned: bool,
    /// Our lineage's newest version and its last batch.
    newest: Option<(Version, u64)>,
    /// The version to try next.
    next: Version,
    precision: Precision,
    /// Most deltas after a full.
    deltas: u32,
    /// What was published last, by this process: the next delta changes it.
    base: Option<Base>,
    /// What the channel named when this process began, if it encodes alike.
    taken_over: Option<(Version, Option<Before>)>,
}

/// A version that a new one is compared with.
#[derive(Clone, Debug)]
pub struct Before {
    pub weights: Arc<Weights>,
    /// Examples up to this place in the order may have been learned by it; to compare on them would be unfair.
    pub frontier: Option<Time>,
}

/// A version that this process published.
#[derive(Debug)]
struct Base {
    version: Version,
    /// Of its manifest's bytes.
    digest: Digest,
    /// As they were published.
    weights: Arc<Weights>,
    frontier: Option<Time>,
    batch: u64,
    /// The full at the start of its chain, the deltas since, and their bytes.
    full: Version,
    number: u32,
    bytes: u64,
}

impl Publisher {
    /// Takes the channel: finds out what is there and writes an entry with a new epoch and the version unchanged.
    pub async fn open(store: Store, plan: &Plan, lineage: impl Into<String>, model: ModelInfo) -> Result<Self> {
        let (lineage, name) = (lineage.into(), format!("{:016x}", random()));
        let entry = loop {
            let last = store.latest(&plan.channel).await?;
            let entry = decide::take_epoch(last.as_ref(), &plan.channel, &name, clock::now());
            let key = entry_key(&plan.channel, entry.number);
            match store.create_only(&key, &[sealed(&key, &entry)?]).await? {
                Created::Ours => break entry,
                Created::Taken(_) => tracing::info!(key, "another writer took this entry, taking the next"),
            }
        };
        let writer = Writer { channel: plan.channel.clone(), epoch: entry.epoch, name };
        let mut publisher = Self {
            store,
            writer,
            lineage,
            model,
            last: 0,
            live: None,
            pinned: false,
            newest: None,
            next: Version(1),
            precision: plan.precision,
            deltas: plan.deltas,
            base: None,
            taken_over: None,
        };
        publisher.see(&entry).await?;
        publisher.survey().await?;
        tracing::info!(channel = plan.channel, epoch = entry.epoch.0, next = publisher.next.0, "took the channel");
        Ok(publisher)
    }

    #[must_use]
    pub fn epoch(&self) -> Epoch {
        self.writer.epoch
    }

    /// The newest version of our lineage and its last batch: before that, [`Publisher::publish`] answers `Behind`.
    #[must_use]
    pub fn newest(&self) -> Option<(Version, u64)> {
        self.newest
    }

    /// The last batch of the version that this process published last: what was touched since makes the next.
    #[must_use]
    pub fn acknowledged(&self) -> Option<u64> {
        self.base.as_ref().map(|base| base.batch)
    }

    /// Publishes a version. Payload first, then the manifest, which is the commit point, then the channel's entry; each is
    /// created only if absent. `golden` are fresh examples with the logits of the live model. What is written are the
    /// logits of the rounded weights, and how far the two lie apart; it is an error if they do where nothing was rounded.
    ///
    /// After an error the store is as before or holds objects that nothing names; the call may be repeated, with these or
    /// newer weights. A version whose manifest was written and whose entry was not is not used again.
    pub async fn publish(
        &mut self,
        content: &Content,
        facts: Facts,
        golden: &[Golden],
        gate: Option<gate::Report>,
    ) -> Result<Outcome> {
        if let Some(by) = self.catch_up().await? {
            return Ok(Outcome::Fenced { by });
        }
        let live = self.live.and_then(|(_, batch)| batch);
        if !decide::goes_forward(facts.batch, self.newest.map(|(_, batch)| batch), live, self.pinned) {
            let newest = self.newest.or(self.live.map(|(version, _)| (version, 0))).expect("something is ahead").0;
            return Ok(Outcome::Behind { newest });
        }
        let unfit = |e: codec::Error| Error::Unfit(e.to_string());
        let base = self.base.as_ref();
        let (weights, delta) = match content {
            Content::Whole(exact) => {
                let weights = match self.precision {
                    Precision::F32 => Arc::clone(exact),
                    rounded => Arc::new(exact.rounded(rounded).map_err(unfit)?),
                };
                let delta = base.and_then(|base| Delta::between(&base.weights, &weights));
                (weights, delta)
            }
            Content::Changes { since, touched } => {
                let Some(base) = base.filter(|base| base.batch == *since) else {
                    return Err(Error::Unfit(format!("the changes since batch {since} lead on from no version")));
                };
                let delta = touched.against(&base.weights).map_err(unfit)?;
                (Arc::new(delta.apply(&base.weights).map_err(unfit)?), Some(delta))
            }
        };
        let rounding = self.rounding(&weights, golden)?;
        let golden = golden.iter().map(|g| Golden::new(&g.slots(), weights.logit(&g.slots()))).collect();

        let full = weights.to_arrays().encode(PAYLOAD_FORMAT).map_err(unfit)?;
        let (encoded, link) = match self.delta(delta, &full).await? {
            Some((encoded, link)) => (encoded, Some(link)),
            None => (full, None),
        };
        let (object, reused) = self.put_payload(&encoded).await?;
        let frontier = facts.frontier_time;
        let held = gate.as_ref().is_some_and(|report| report.verdict == gate::Verdict::Held);
        let manifest = Manifest {
            format: MANIFEST_FORMAT.to_owned(),
            version: self.next,
            parent: self.live.map(|(version, _)| version),
            epoch: self.writer.epoch,
            writer: self.writer.name.clone(),
            lineage: self.lineage.clone(),
            created: clock::now(),
            kind: if link.is_some() { Kind::Delta } else { Kind::Full },
            delta: link.clone(),
            objects: vec![object.clone()],
            rows: weights.rows() as u64,
            precision: self.precision,
            rounding,
            facts,
            gate,
            model: self.model.clone(),
            build: Build::this(),
            golden,
        };
        let (version, digest, batch) = self.put_manifest(manifest).await?;
        // Retention of another writer may have found a payload of an old version unneeded just before we named it.
        if reused && !self.store.exists(&object.name).await? {
            self.put_payload(&encoded).await?;
        }
        if held {
            self.name_held(version).await?;
            return Ok(Outcome::Held(version));
        }
        let outcome = self.put_entry(version, batch).await?;
        if matches!(outcome, Outcome::Published(_) | Outcome::Pinned { .. }) {
            self.taken_over = None;
            self.base = Some(match (link, self.base.take()) {
                (Some(link), Some(base)) => {
                    let bytes = base.bytes + object.length;
                    Base { version, digest, weights, frontier, batch, full: link.full, number: link.number, bytes }
                }
                _ => Base { version, digest, weights, frontier, batch, full: version, number: 0, bytes: 0 },
            });
        }
        Ok(outcome)
    }

    /// What a new version is to be compared with: the last one that this process published, or else what the channel names,
    /// if that encodes alike.
    pub async fn before(&mut self) -> Result<Option<Before>> {
        if let Some(Base { weights, frontier, .. }) = &self.base {
            return Ok(Some(Before { weights: Arc::clone(weights), frontier: *frontier }));
        }
        let Some((version, _)) = self.live else { return Ok(None) };
        if self.taken_over.as_ref().is_none_or(|(taken, _)| *taken != version) {
            let Snapshot { manifest, weights, .. } = self.store.load(version).await?;
            let alike = manifest.model.schema_hash == self.model.schema_hash;
            let before = Before { weights: Arc::new(weights), frontier: manifest.facts.frontier_time };
            self.taken_over = Some((version, alike.then_some(before)));
        }
        Ok(self.taken_over.as_ref().and_then(|(_, before)| before.clone()))
    }

    /// Names a version that was held in a channel of its own: so retention keeps it, and a person finds it.
    async fn name_held(&self, version: Version) -> Result<()> {
        let channel = format!("{}-held", self.writer.channel);
        let writer = Writer { channel: channel.clone(), ..self.writer.clone() };
        loop {
            let last = self.store.latest(&channel).await?.map_or(0, |entry| entry.number);
            let entry = decide::next_entry(last, &writer, Some(version), clock::now());
            let key = entry_key(&channel, entry.number);
            if self.store.create_only(&key, &[sealed(&key, &entry)?]).await? == Created::Ours {
                return Ok(());
            }
        }
    }

    /// The largest distance between the logits of what is published and those of the live model.
    fn rounding(&self, weights: &Weights, golden: &[Golden]) -> Result<f32> {
        let features = weights.default_rows().len();
        if self.precision == Precision::F32 {
            let differ = |reason| Error::Unfit(format!("the model and what was exported from it differ: {reason}"));
            weights::prove(golden, features, |slots| weights.logit(slots)).map_err(differ)?;
            return Ok(0.0);
        }
        let distance = |g: &Golden| (weights.logit(&g.slots()) - g.logit).abs();
        Ok(golden.iter().map(distance).fold(0.0, f32::max))
    }

    /// The payload of a delta from the last version that this process published, if it is to be published instead of `full`.
    async fn delta(&self, delta: Option<Delta>, full: &Encoded) -> Result<Option<(Encoded, Link)>> {
        let Some(base) = self.base.as_ref().filter(|base| base.number < self.deltas) else { return Ok(None) };
        let Some(delta) = delta else { return Ok(None) };
        let encoded = delta.to_arrays().encode(DELTA_FORMAT).map_err(|e| Error::Unfit(e.to_string()))?;
        // Other writers' versions may have pushed ours out of what retention keeps.
        if !decide::is_worth(base.bytes + encoded.length, full.length)
            || !self.store.exists(&manifest_key(base.version)).await?
        {
            return Ok(None);
        }
        let link = Link {
            after: base.version,
            after_digest: base.digest,
            full: base.full,
            number: base.number + 1,
            changed: delta.changed_rows() as u64,
            removed: delta.removed_rows() as u64,
            result: ObjectRef { name: object_key(full.digest), length: full.length, digest: full.digest },
        };
        Ok(Some((encoded, link)))
    }

    async fn put_payload(&self, encoded: &Encoded) -> Result<(ObjectRef, bool)> {
        let key = object_key(encoded.digest);
        let reused = self.store.exists(&key).await?;
        match self.store.put_object(&key, &encoded.pieces).await? {
            Created::Ours => Ok((ObjectRef { name: key, length: encoded.length, digest: encoded.digest }, reused)),
            Created::Taken(_) => Err(Error::Collision { key }),
        }
    }

    /// Writes the manifest under the next version that is free. Returns the version, the digest of the bytes, and the batch.
    async fn put_manifest(&mut self, mut manifest: Manifest) -> Result<(Version, Digest, u64)> {
        loop {
            manifest.version = self.next;
            let key = manifest_key(self.next);
            let bytes = sealed(&key, &manifest)?;
            let digest = Digest::of(&bytes);
            let created = self.store.create_only(&key, &[bytes]).await?;
            // Taken by an earlier attempt of ours, or by the writer of another channel.
            self.next = Version(self.next.0 + 1);
            if created == Created::Ours {
                self.newest = Some((manifest.version, manifest.facts.batch));
                return Ok((manifest.version, digest, manifest.facts.batch));
            }
        }
    }

    async fn put_entry(&mut self, version: Version, batch: u64) -> Result<Outcome> {
        loop {
            if let (true, Some((at, _))) = (self.pinned, self.live) {
                return Ok(Outcome::Pinned { version, at });
            }
            let entry = decide::next_entry(self.last, &self.writer, Some(version), clock::now());
            let key = entry_key(&self.writer.channel, entry.number);
            match self.store.create_only(&key, &[sealed(&key, &entry)?]).await? {
                Created::Ours => {
                    self.last = entry.number;
                    self.live = Some((version, Some(batch)));
                    return Ok(Outcome::Published(version));
                }
                Created::Taken(found) => {
                    let found: Entry = document(&key, &found)?;
                    if let Standing::Fenced { by } = decide::standing(&self.writer, &found) {
                        return Ok(Outcome::Fenced { by });
                    }
                    self.see(&found).await?;
                }
            }
        }
    }

    /// Reads the entries that came after those we know. Returns the epoch that fences us, if there is one.
    async fn catch_up(&mut self) -> Result<Option<Epoch>> {
        while let Some(entry) = self.store.entry(&self.writer.channel, self.last + 1).await? {
            if let Standing::Fenced { by } = decide::standing(&self.writer, &entry) {
                return Ok(Some(by));
            }
            self.see(&entry).await?;
        }
        Ok(None)
    }

    /// Takes note of an entry.
    async fn see(&mut self, entry: &Entry) -> Result<()> {
        self.live = match entry.version {
            None => None,
            Some(version) => {
                let manifest = self.readable(version).await?;
                Some((version, manifest.filter(|m| m.lineage == self.lineage).map(|m| m.facts.batch)))
            }
        };
        self.last = entry.number;
        self.pinned = entry.pinned;
        Ok(())
    }

    /// Finds the next version and our lineage's newest.
    async fn survey(&mut self) -> Result<()> {
        let versions = self.store.versions().await?;
        let highest = versions.last_key_value().map(|(version, _)| *version).max(self.live.map(|(version, _)| version));
        self.next = Version(highest.map_or(0, |version| version.0) + 1);
        for version in versions.into_keys().rev() {
            if let Some(manifest) = self.readable(version).await?.filter(|m| m.lineage == self.lineage) {
                self.newest = Some((version, manifest.facts.batch));
                break;
            }
        }
        Ok(())
    }

    /// A manifest, or none if it is damaged or gone: that must not keep a trainer from publishing better ones.
    async fn readable(&self, version: Version) -> Result<Option<Manifest>> {
        match self.store.manifest(version, "the channel").await {
            Ok(manifest) => Ok(Some(manifest)),
            Err(e) if e.remedy() == Remedy::Retry => Err(e),
            Err(e) => {
                tracing::error!(error = %e, "a version in the store cannot be used; publishing goes on after it");
                Ok(None)
            }
        }
    }
}

pub(super) fn sealed(key: &str, document: &impl Document) -> Result<bytes::Bytes> {
    document.to_bytes().map(Into::into).map_err(|e| Error::Unfit(format!("`{key}` cannot be written: {e}")))
}
