//! Many candidates over one context: what they share is encoded once.

use super::Mismatch;
use super::encode::{Encoder, write_cross};
use super::schema::Schema;
use crate::event::Slot;

/// The slots of one context and of the candidates laid over it.
///
/// A candidate replaces the context's values feature by feature. Only what it changes is written for it: the features it
/// touches, and the crosses that have one of them as a part. Allocates nothing once it has grown.
#[derive(Clone, Debug)]
pub struct Overlay {
    /// The context alone: features, then crosses.
    ground: Vec<Slot>,
    /// Where the slots of each feature or cross start in `ground`; one longer than the schema.
    starts: Vec<usize>,
    /// Whether the open candidate has touched a feature.
    changed: Vec<bool>,
    touched: Vec<usize>,
    /// Where the open candidate's slots of each touched feature lie: first and count.
    places: Vec<(usize, usize)>,
    /// The changed slots of all candidates, one candidate after the other, in schema order.
    slots: Vec<Slot>,
    ends: Vec<usize>,
}

impl Overlay {
    #[must_use]
    pub fn new(schema: &Schema) -> Self {
        Self {
            ground: Vec::new(),
            starts: vec![0; schema.len() + 1],
            changed: vec![false; schema.features()],
            touched: Vec::new(),
            places: vec![(0, 0); schema.features()],
            slots: Vec::new(),
            ends: Vec::new(),
        }
    }

    /// Starts anew: what is pushed into `encoder` from here on is the context.
    pub fn begin(&mut self, encoder: &mut Encoder) {
        encoder.reset();
        self.changed.fill(false);
        self.touched.clear();
        self.slots.clear();
        self.ends.clear();
    }

    /// Takes what was pushed as the context.
    pub fn keep(&mut self, encoder: &mut Encoder) {
        self.ground.clear();
        encoder.finish(&mut self.ground);
        // Every feature and cross has a slot.
        let mut next = 0;
        for (at, slot) in self.ground.iter().enumerate() {
            while next <= usize::from(slot.feature) {
                self.starts[next] = at;
                next += 1;
            }
        }
        self.starts[next..].fill(self.ground.len());
    }

    /// From here on the open candidate has its own value of this feature, if it pushes one; else it is missing.
    #[inline]
    pub fn touch(&mut self, feature: usize) {
        if !self.changed[feature] {
            self.changed[feature] = true;
            self.touched.push(feature);
        }
    }

    /// Takes what was pushed since the last candidate as the next one. Every feature pushed must have been touched.
    pub fn push(&mut self, encoder: &mut Encoder) {
        for (feature, _) in self.changed.iter().enumerate().filter(|(_, changed)| **changed) {
            let start = self.slots.len();
            encoder.write_feature(feature, &mut self.slots);
            self.places[feature] = (start, self.slots.len() - start);
        }
        let schema = encoder.schema();
        for (i, cross) in schema.crosses.iter().enumerate() {
            if !cross.parts.iter().any(|&part| self.changed[part]) {
                continue;
            }
            let (mut lens, mut at) = ([0; 3], [(false, 0); 3]);
            for (k, &part) in cross.parts.iter().enumerate() {
                (lens[k], at[k]) = match self.changed[part] {
                    true => (self.places[part].1, (true, self.places[part].0)),
                    false => (self.starts[part + 1] - self.starts[part], (false, self.starts[part])),
                };
            }
            let ground = &self.ground;
            write_cross(cross, (schema.features() + i) as u16, lens, &mut self.slots, |out, part, k| match at[part] {
                (true, start) => out[start + k],
                (false, start) => ground[start + k],
            });
        }
        self.ends.push(self.slots.len());
        for feature in self.touched.drain(..) {
            self.changed[feature] = false;
            encoder.clear(feature);
        }
    }

    /// The slots of the context alone: features in schema order, then crosses, each at least once.
    #[must_use]
    pub fn ground(&self) -> &[Slot] {
        &self.ground
    }

    /// Where the slots of each feature or cross start in [`Overlay::ground`], and its length at the end.
    #[must_use]
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Number of candidates.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The changed slots of all candidates, one after the other.
    #[must_use]
    pub fn slots(&self) -> &[Slot] {
        &self.slots
    }

    /// What each candidate has instead of the context's slots of the same features and crosses, in schema order.
    pub fn candidates(&self) -> impl ExactSizeIterator<Item = &[Slot]> {
        let mut start = 0;
        self.ends.iter().map(move |&end| {
            let slots = &self.slots[start..end];
            start = end;
            slots
        })
    }

    /// All slots of candidate `i`, as if it and the context were one record: what [`Encoder::write`] would give.
    #[must_use]
    pub fn whole(&self, i: usize) -> Vec<Slot> {
        let changed = self.candidates().nth(i).unwrap_or_default();
        let own = |feature: u16| changed.iter().any(|slot| slot.feature == feature);
        let mut all: Vec<Slot> = self.ground.iter().filter(|slot| !own(slot.feature)).copied().collect();
        all.extend_from_slice(changed);
        all.sort_by_key(|slot| slot.feature);
        all
    }
}

/// Where the values of a context or of one candidate go, by feature index ([`Schema::index_of`]). Pushing a scalar again
/// replaces it; pushing to a bag adds to it; what a candidate does not push is as in the context.
#[derive(Debug)]
pub struct Values<'a> {
    encoder: &'a mut Encoder,
    /// None for the context.
    overlay: Option<&'a mut Overlay>,
}

impl<'a> Values<'a> {
    /// The values of the context.
    pub fn of_context(encoder: &'a mut Encoder) -> Self {
        Self { encoder, overlay: None }
    }

    /// The values of the next candidate.
    pub fn of_candidate(encoder: &'a mut Encoder, overlay: &'a mut Overlay) -> Self {
        Self { encoder, overlay: Some(overlay) }
    }

    #[must_use]
    pub fn schema(&self) -> &Schema {
        self.encoder.schema()
    }

    pub fn str(&mut self, feature: usize, value: &str) -> Result<(), Mismatch> {
        self.touch(feature).push_str(feature, value)
    }

    pub fn i64(&mut self, feature: usize, value: i64) -> Result<(), Mismatch> {
        self.touch(feature).push_i64(feature, value)
    }

    pub fn u64(&mut self, feature: usize, value: u64) -> Result<(), Mismatch> {
        self.touch(feature).push_u64(feature, value)
    }

    pub fn f64(&mut self, feature: usize, value: f64) -> Result<(), Mismatch> {
        self.touch(feature).push_f64(feature, value)
    }

    pub fn bool(&mut self, feature: usize, value: bool) -> Result<(), Mismatch> {
        self.touch(feature).push_bool(feature, value)
    }

    /// Adds a value with a weight to a `multi`.
    pub fn weighted(&mut self, feature: usize, value: &str, weight: f64) -> Result<(), Mismatch> {
        self.touch(feature).push_weighted(feature, value, weight)
    }

    /// The feature is missing, also where the context has it.
    pub fn missing(&mut self, feature: usize) {
        self.touch(feature).clear(feature);
    }

    fn touch(&mut self, feature: usize) -> &mut Encoder {
        if let Some(overlay) = &mut self.overlay {
            overlay.touch(feature);
        }
        self.encoder
    }
}
