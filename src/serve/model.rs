//! One version, ready to score.

use std::sync::Arc;

use super::Error;
use super::index::{Layered, Row, Sorted, prefetch};
use super::towers::{self, Towers};
use crate::clock;
use crate::event::{Slot, Time};
use crate::feature::Overlay;
use crate::feature::Schema;
use crate::model::tower::Pair;
use crate::snapshot::codec::Digest;
use crate::snapshot::load::{Sealed, prove};
use crate::snapshot::{Delta, Manifest, Snapshot, Vectors, Version};

/// How many rows ahead of its use a line is asked for, and what says where that line is.
pub(super) const AHEAD: usize = 24;
pub(super) const FURTHER: usize = 2 * AHEAD;

/// A version that passed every check. Immutable: a request that holds it scores with this version from start to end.
pub struct Model {
    manifest: Manifest,
    /// Of the manifest's bytes.
    digest: Digest,
    schema: Arc<Schema>,
    rows: Layered<f32>,
    /// Of the rows of the full, which versions share.
    weights: Arc<Vectors>,
    /// The full lies in a mapped file.
    mapped: bool,
    intercept: f32,
    /// Of each feature and cross: the weight of its default row.
    defaults: Vec<f32>,
    towers: Option<Towers>,
    loaded: Time,
}

impl Model {
    /// Makes a model of a snapshot that [`Store::load`](crate::snapshot::Store::load) checked. Refuses what this build
    /// cannot encode for, and weights with which this scorer does not reproduce the golden vectors.
    pub fn new(snapshot: Snapshot) -> Result<Self, Error> {
        let digest = snapshot.digest();
        let mapped = snapshot.is_mapped();
        let Snapshot { manifest, weights, .. } = snapshot;
        let refuse = |reason: String| Error::Unservable { version: manifest.version, reason };
        let schema = Schema::from_json(&manifest.model.schema.to_string())
            .map_err(|e| refuse(format!("its schema cannot be used: {e}")))?;
        let (hash, named) = (schema.hash(), &manifest.model.schema_hash);
        if hash != *named {
            return Err(refuse(format!("its schema has the hash {hash}, the manifest says {named}")));
        }
        let defaults: Vec<u64> = (0..schema.len()).map(|i| schema.default_row(i)).collect();
        if weights.default_rows() != defaults {
            return Err(refuse("its default rows are not those of its schema".to_owned()));
        }
        let too_many = || refuse("it has more than 4294967295 rows".to_owned());
        let intercept = weights.intercept();
        let (ids, weights, towers) = weights.into_columns();
        let towers = towers.map(|towers| Towers::new(towers).ok_or_else(too_many)).transpose()?;
        let rows = Layered::new(Sorted::new(ids).ok_or_else(too_many)?);
        let (defaults, loaded) = (Vec::new(), clock::now());
        let (schema, weights) = (Arc::new(schema), Arc::new(weights));
        Self { manifest, digest, schema, rows, weights, mapped, intercept, defaults, towers, loaded }.proved()
    }

    /// This model after the deltas of a later version, which share its tables. Refuses deltas that were not made for it.
    pub fn with(&self, deltas: &[Delta], last: &Sealed) -> Result<Self, Error> {
        let manifest = &last.manifest;
        let refuse = |reason: String| Error::Unservable { version: manifest.version, reason };
        if manifest.model.schema_hash != self.manifest.model.schema_hash {
            return Err(refuse("it is a delta, but its schema is another one".to_owned()));
        }
        if manifest.model.kind != self.manifest.model.kind {
            return Err(refuse("a delta to it is of a model of another kind".to_owned()));
        }
        let mut next: Option<(Layered<f32>, Option<Towers>)> = None;
        for delta in deltas {
            let (rows, towers) = match &next {
                None => (&self.rows, self.towers.as_ref()),
                Some((rows, towers)) => (rows, towers.as_ref()),
            };
            let rows = rows.with(delta.ids(), delta.weights().iter().copied(), delta.removed(), |weight| weight);
            let rows = rows.ok_or_else(|| refuse("a delta to it removes a row that is not there".to_owned()))?;
            let towers = match (towers, delta.towers()) {
                (None, None) => None,
                (Some(towers), Some(delta)) => Some(towers.with(delta).map_err(refuse)?),
                _ => return Err(refuse("a delta to it is of a model of another kind".to_owned())),
            };
            next = Some((rows, towers));
        }
        let (Some((rows, towers)), Some(delta)) = (next, deltas.last()) else {
            return Err(refuse("there is no delta to it".to_owned()));
        };
        let next = Self {
            manifest: manifest.clone(),
            digest: last.digest,
            schema: Arc::clone(&self.schema),
            rows,
            weights: Arc::clone(&self.weights),
            mapped: self.mapped,
            intercept: delta.intercept(),
            defaults: Vec::new(),
            towers,
            loaded: clock::now(),
        };
        next.proved()
    }

    /// Looks up the default rows, and checks the number of rows and the golden vectors, which it lets go.
    fn proved(mut self) -> Result<Self, Error> {
        let features = self.schema.len();
        let default = |i| self.weight(self.schema.default_row(i)).unwrap_or(0.0);
        self.defaults = (0..features).map(default).collect();
        if self.rows() as u64 != self.manifest.rows {
            let reason = format!("its manifest says {} rows, there are {}", self.manifest.rows, self.rows());
            return Err(Error::Unservable { version: self.manifest.version, reason });
        }
        prove(&self.manifest, features, |slots| self.logit(slots))?;
        self.manifest.golden = Vec::new();
        self.loaded = clock::now();
        Ok(self)
    }

    /// What a delta must name to be one for this model.
    #[must_use]
    pub fn held(&self) -> (Version, Digest) {
        (self.manifest.version, self.digest)
    }

    /// Layers of the towers, if there are any.
    #[must_use]
    pub fn layers(&self) -> Option<&Pair> {
        self.towers.as_ref().map(Towers::pair)
    }

    #[must_use]
    pub fn version(&self) -> Version {
        self.manifest.version
    }

    /// All that the trainer said of this version, less its golden vectors.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// When this node had proved it.
    #[must_use]
    pub fn loaded(&self) -> Time {
        self.loaded
    }

    /// Rows of all tables.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows.len() + self.towers.as_ref().map_or(0, Towers::rows)
    }

    /// What the weights take, in bytes, of memory or of a mapped file; what a version shares with others counts whole.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let over = self.rows.base().table_bytes() + self.rows.over_bytes();
        self.base_bytes() + over + self.towers.as_ref().map_or(0, Towers::over_bytes)
    }

    /// What of [`Model::bytes`] lies in a mapped file, which is memory that the system can take back.
    #[must_use]
    pub fn mapped_bytes(&self) -> usize {
        if self.mapped { self.base_bytes() } else { 0 }
    }

    fn base_bytes(&self) -> usize {
        let own = self.rows.base().column_bytes() + self.weights.bytes();
        own + self.towers.as_ref().map_or(0, Towers::base_bytes)
    }

    /// Logit of an encoded example, bit for bit that of [`Weights::logit`](crate::snapshot::Weights::logit).
    #[must_use]
    pub fn logit(&self, slots: &[Slot]) -> f32 {
        slots.iter().for_each(|slot| self.prefetch(slot));
        let logit = slots.iter().fold(0.0, |sum, slot| sum + self.term(slot)) + self.intercept;
        self.towers.as_ref().map_or(logit, |towers| logit + towers.product(slots))
    }

    /// Adds the logit of each candidate to `out`: bit for bit the same as [`Model::logit`] of its whole record, but rows of
    /// the context are looked up once, and the user tower runs once if no candidate changes a feature of it.
    pub(super) fn logits(&self, overlay: &Overlay, scratch: &mut Scratch, out: &mut Vec<f32>) {
        let Scratch { terms, sums, towers } = scratch;
        let first = out.len();
        let (ground, starts) = (overlay.ground(), overlay.starts());
        let changed = overlay.slots();
        ground.iter().chain(changed.iter().take(FURTHER)).for_each(|slot| self.rows.prefetch_stretch(slot.row));
        ground.iter().chain(changed.iter().take(AHEAD)).for_each(|slot| self.prefetch(slot));
        terms.clear();
        terms.extend(ground.iter().map(|slot| self.term(slot)));
        // The sum of all context slots in front of each feature.
        sums.clear();
        let (mut sum, mut at) = (0.0, 0);
        for &start in starts {
            sum = terms[at..start].iter().fold(sum, |sum, term| sum + term);
            at = start;
            sums.push(sum);
        }
        let features = starts.len() - 1;
        let (mut ahead, mut further) = (changed.iter().skip(AHEAD), changed.iter().skip(FURTHER));
        for slots in overlay.candidates() {
            let mut next = slots.first().map_or(features, |slot| usize::from(slot.feature));
            let mut sum = sums[next];
            for slot in slots {
                let feature = usize::from(slot.feature);
                if feature >= next {
                    sum = terms[starts[next]..starts[feature]].iter().fold(sum, |sum, term| sum + term);
                    next = feature + 1;
                }
                if let Some(slot) = further.next() {
                    self.rows.prefetch_stretch(slot.row);
                }
                if let Some(slot) = ahead.next() {
                    self.prefetch(slot);
                }
                sum += self.term(slot);
            }
            sum = terms[starts[next.min(features)]..].iter().fold(sum, |sum, term| sum + term);
            out.push(sum + self.intercept);
        }
        if let Some(ours) = &self.towers {
            ours.add_products(overlay, towers, &mut out[first..]);
        }
    }

    #[inline(always)]
    fn prefetch(&self, slot: &Slot) {
        prefetch(self.weights.place(self.rows.prefetch(slot.row)));
    }

    /// Of a row that has one of its own.
    #[inline(always)]
    fn weight(&self, row: u64) -> Option<f32> {
        self.rows.find(row).map(|found| match found {
            Row::Base(at) => self.weights.number(at),
            Row::Over(weight) => weight,
        })
    }

    #[inline(always)]
    fn term(&self, slot: &Slot) -> f32 {
        let weight = match self.weight(slot.row) {
            Some(weight) => weight,
            None => self.defaults.get(usize::from(slot.feature)).copied().unwrap_or(0.0),
        };
        weight * slot.value
    }
}

/// What scoring needs room for.
#[derive(Clone, Debug, Default)]
pub(super) struct Scratch {
    terms: Vec<f32>,
    /// The sum of all context slots in front of each feature.
    sums: Vec<f32>,
    towers: towers::Scratch,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("version", &self.version()).field("rows", &self.rows()).finish_non_exhaustive()
    }
}
