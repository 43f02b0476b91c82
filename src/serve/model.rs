//! One version, ready to score.

use std::sync::Arc;

use super::Error;
use super::index::Layered;
use super::towers::{self, Towers};
use crate::clock;
use crate::event::{Slot, Time};
use crate::feature::Overlay;
use crate::feature::Schema;
use crate::model::tower::Pair;
use crate::snapshot::codec::Digest;
use crate::snapshot::load::{Sealed, prove};
use crate::snapshot::{Delta, Manifest, Snapshot, Version};

/// How many rows ahead of its use a line is asked for.
const AHEAD: usize = 24;

/// A version that passed every check. Immutable: a request that holds it scores with this version from start to end.
pub struct Model {
    manifest: Manifest,
    /// Of the manifest's bytes.
    digest: Digest,
    schema: Arc<Schema>,
    rows: Layered<f32>,
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
        let Snapshot { manifest, mut weights, .. } = snapshot;
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
        let towers = weights.take_towers().map(Towers::new);
        let rows = Layered::new(weights.ids(), weights.weights().iter().copied());
        Self::proved(manifest, digest, Arc::new(schema), rows, weights.intercept(), towers)
    }

    /// This model after the deltas of a later version, which share its tables. Refuses deltas that were not made for it.
    pub fn with(&self, deltas: &[Delta], last: &Sealed) -> Result<Self, Error> {
        let manifest = &last.manifest;
        let refuse = |reason: String| Error::Unservable { version: manifest.version, reason };
        if manifest.model.schema_hash != self.manifest.model.schema_hash {
            return Err(refuse("it is a delta, but its schema is another one".to_owned()));
        }
        let mut next: Option<(Layered<f32>, Option<Towers>)> = None;
        for delta in deltas {
            let (rows, towers) = match &next {
                None => (&self.rows, self.towers.as_ref()),
                Some((rows, towers)) => (rows, towers.as_ref()),
            };
            let rows = rows.with(delta.ids(), delta.weights().iter().copied(), delta.removed());
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
        let schema = Arc::clone(&self.schema);
        Self::proved(manifest.clone(), last.digest, schema, rows, delta.intercept(), towers)
    }

    fn proved(
        manifest: Manifest,
        digest: Digest,
        schema: Arc<Schema>,
        rows: Layered<f32>,
        intercept: f32,
        towers: Option<Towers>,
    ) -> Result<Self, Error> {
        let defaults = (0..schema.len()).map(|i| rows.get(schema.default_row(i)).unwrap_or(0.0)).collect();
        let (golden, features) = (Manifest { golden: Vec::new(), ..manifest.clone() }, schema.len());
        let mut model =
            Self { manifest: golden, digest, schema, rows, intercept, defaults, towers, loaded: clock::now() };
        if model.rows() as u64 != manifest.rows {
            let reason = format!("its manifest says {} rows, there are {}", manifest.rows, model.rows());
            return Err(Error::Unservable { version: manifest.version, reason });
        }
        prove(&manifest, features, |slots| model.logit(slots))?;
        model.loaded = clock::now();
        Ok(model)
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

    /// Memory of the weights, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows.bytes() + self.towers.as_ref().map_or(0, Towers::bytes)
    }

    /// Logit of an encoded example, bit for bit that of [`Weights::logit`](crate::snapshot::Weights::logit).
    #[must_use]
    pub fn logit(&self, slots: &[Slot]) -> f32 {
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
        ground.iter().chain(changed.iter().take(AHEAD)).for_each(|slot| self.rows.prefetch(slot.row));
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
        let mut ahead = changed.iter().skip(AHEAD);
        for slots in overlay.candidates() {
            let mut next = slots.first().map_or(features, |slot| usize::from(slot.feature));
            let mut sum = sums[next];
            for slot in slots {
                let feature = usize::from(slot.feature);
                if feature >= next {
                    sum = terms[starts[next]..starts[feature]].iter().fold(sum, |sum, term| sum + term);
                    next = feature + 1;
                }
                if let Some(slot) = ahead.next() {
                    self.rows.prefetch(slot.row);
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
    fn term(&self, slot: &Slot) -> f32 {
        let weight = match self.rows.get(slot.row) {
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
