//! The towers of a version, laid out for scoring: no graph, no allocation for a candidate once the scratch has grown.

use std::sync::Arc;

use super::index::{Layered, Row, Sorted, prefetch};
use super::model::{AHEAD, FURTHER};
use crate::event::Slot;
use crate::feature::Overlay;
use crate::model::tower::{Pair, Work};
use crate::model::two_tower::Plan;
use crate::snapshot::delta::TowersDelta;
use crate::snapshot::{self, Vectors};

/// Candidates that run through a tower together.
const BLOCK: usize = 32;

/// Both towers, and the vectors behind an index.
pub struct Towers {
    plan: Plan,
    pair: Pair,
    dim: usize,
    /// Where a row's vector lies: in `base` or in `over`.
    index: Layered<u32>,
    base: Arc<Vectors>,
    /// Those that deltas changed since.
    over: Vectors,
    params: Vec<f32>,
    /// Of each feature that a tower sees: its default row.
    default_rows: Vec<Option<u64>>,
    /// Where it lies.
    defaults: Vec<Row<u32>>,
}

/// What scoring needs room for.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    /// The towers' inputs of the context alone.
    ground: [Vec<f32>; 2],
    /// The inputs of a block of candidates, `[BLOCK, width]`.
    inputs: [Vec<f32>; 2],
    work: [Work<f32>; 2],
    /// What the user tower says of the context.
    user: Vec<f32>,
}

impl Towers {
    /// None if there are more than 2^32 rows.
    #[must_use]
    pub fn new(towers: snapshot::Towers) -> Option<Self> {
        let layout = towers.layout();
        let default_rows: Vec<_> = towers.defaults().iter().map(|at| at.map(|at| towers.ids()[at])).collect();
        let defaults = towers.defaults().iter().map(|at| Row::Base(at.unwrap_or(0))).collect();
        let (plan, pair, dim) = (layout.plan(), layout.pair(), layout.dim);
        let over = Vectors::new(dim, towers.rows().precision());
        let (ids, rows, params) = towers.into_columns();
        let index = Layered::new(Sorted::new(ids)?);
        Some(Self { plan, pair, dim, index, base: Arc::new(rows), over, params, default_rows, defaults })
    }

    /// These towers after a delta. What is wrong, where it was not made for them.
    pub fn with(&self, delta: &TowersDelta) -> Result<Self, String> {
        if delta.rows().precision() != self.over.precision() || delta.rows().dim() != self.dim {
            return Err("it has vectors of another kind".to_owned());
        }
        let mut over = Vectors::new(self.dim, self.over.precision());
        over.extend(delta.rows(), 0..delta.rows().len());
        let stays = |at: u32| {
            over.extend(&self.over, at as usize..at as usize + 1);
            over.len() as u32 - 1
        };
        let index = self.index.with(delta.ids(), 0.., delta.removed(), stays);
        let index = index.ok_or_else(|| "it removes a vector that is not there".to_owned())?;
        let place = |row: &Option<u64>| row.map_or(Some(Row::Base(0)), |row| index.find(row));
        let defaults = self.default_rows.iter().map(place).collect::<Option<Vec<_>>>();
        let defaults = defaults.ok_or_else(|| "it removes a default row".to_owned())?;
        Ok(Self {
            plan: self.plan.clone(),
            pair: self.pair.clone(),
            dim: self.dim,
            index,
            base: Arc::clone(&self.base),
            over,
            params: delta.params().to_vec(),
            default_rows: self.default_rows.clone(),
            defaults,
        })
    }

    #[must_use]
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.index.len()
    }

    /// Bytes of the ids and vectors of the full.
    #[must_use]
    pub fn base_bytes(&self) -> usize {
        self.index.base().column_bytes() + self.base.bytes()
    }

    /// Memory of all the rest, in bytes.
    #[must_use]
    pub fn over_bytes(&self) -> usize {
        let table = self.index.base().table_bytes() + self.index.over_bytes();
        table + self.over.bytes() + size_of_val(self.params.as_slice())
    }

    /// What the towers add to the logit of an encoded example, bit for bit that of
    /// [`Towers::product`](snapshot::Towers::product).
    #[must_use]
    pub fn product(&self, slots: &[Slot]) -> f32 {
        let mut scratch = Scratch::default();
        let Scratch { inputs, work: [user, item], .. } = &mut scratch;
        self.clear(inputs, 1);
        slots.iter().for_each(|slot| self.pool(slot, inputs, 0));
        let u = self.pair.user.says(&self.params, &inputs[0], 1, user);
        let v = self.pair.item.says(&self.params, &inputs[1], 1, item);
        self.pair.product(&self.params, u, v)
    }

    /// Adds to the logit of each candidate what the towers say. The user tower runs once, unless a candidate changes a
    /// feature of it.
    pub(super) fn add_products(&self, overlay: &Overlay, scratch: &mut Scratch, logits: &mut [f32]) {
        let Scratch { ground, inputs, work: [user, item], user: u } = scratch;
        let changed = overlay.slots();
        changed.iter().take(FURTHER).for_each(|slot| self.index.prefetch_stretch(self.id(slot)));
        changed.iter().take(AHEAD).for_each(|slot| self.prefetch(slot));
        let (mut ahead, mut further) = (changed.iter().skip(AHEAD), changed.iter().skip(FURTHER));
        self.clear(inputs, BLOCK);
        overlay.ground().iter().for_each(|slot| self.pool(slot, inputs, 0));
        let widths = self.plan.widths();
        for ((ground, input), width) in ground.iter_mut().zip(&*inputs).zip(widths) {
            ground.clear();
            ground.extend_from_slice(&input[..width]);
        }
        let n = self.pair.user.outputs();
        let one_user =
            !overlay.slots().iter().any(|slot| self.plan.of(slot.feature).is_some_and(|(tower, _)| tower == 0));
        if one_user {
            u.clear();
            u.extend_from_slice(self.pair.user.says(&self.params, &inputs[0][..widths[0]], 1, user));
        }
        let mut candidates = overlay.candidates();
        for logits in logits.chunks_mut(BLOCK) {
            for (row, slots) in candidates.by_ref().take(logits.len()).enumerate() {
                for ((input, ground), width) in inputs.iter_mut().zip(&*ground).zip(widths) {
                    input[row * width..][..width].copy_from_slice(ground);
                }
                let mut open = None;
                for slot in slots {
                    if let Some(slot) = further.next() {
                        self.index.prefetch_stretch(self.id(slot));
                    }
                    if let Some(slot) = ahead.next() {
                        self.prefetch(slot);
                    }
                    if open != Some(slot.feature)
                        && let Some((tower, column)) = self.plan.of(slot.feature)
                    {
                        inputs[tower][row * widths[tower] + column..][..self.dim].fill(0.0);
                    }
                    open = Some(slot.feature);
                    self.pool(slot, inputs, row);
                }
            }
            let count = logits.len();
            let v = self.pair.item.says(&self.params, &inputs[1][..count * widths[1]], count, item);
            let users = match one_user {
                true => &[][..],
                false => self.pair.user.says(&self.params, &inputs[0][..count * widths[0]], count, user),
            };
            for (i, (logit, v)) in logits.iter_mut().zip(v.chunks_exact(n)).enumerate() {
                let u = if one_user { u.as_slice() } else { &users[i * n..][..n] };
                *logit += self.pair.product(&self.params, u, v);
            }
        }
    }

    fn clear(&self, inputs: &mut [Vec<f32>; 2], rows: usize) {
        for (input, width) in inputs.iter_mut().zip(self.plan.widths()) {
            input.clear();
            input.resize(rows * width, 0.0);
        }
    }

    #[inline]
    fn pool(&self, slot: &Slot, inputs: &mut [Vec<f32>; 2], row: usize) {
        let Some((tower, column)) = self.plan.of(slot.feature) else { return };
        let found = self.index.find(self.id(slot)).unwrap_or_else(|| self.defaults[usize::from(slot.feature)]);
        let to = &mut inputs[tower][row * self.plan.widths()[tower] + column..][..self.dim];
        match found {
            Row::Base(at) => self.base.add(at, slot.value, to),
            Row::Over(at) => self.over.add(at as usize, slot.value, to),
        }
    }

    #[inline(always)]
    fn id(&self, slot: &Slot) -> u64 {
        self.plan.id(slot.feature, slot.row)
    }

    /// The vector itself is asked for where it most likely is, which is near enough for narrow ones.
    #[inline(always)]
    fn prefetch(&self, slot: &Slot) {
        prefetch(self.base.place(self.index.prefetch(self.id(slot))));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::model::tower::Activation;
    use crate::model::two_tower::{Layout, Side};
    use crate::snapshot::{Delta, Precision, Weights};

    const DIM: usize = 3;
    const DEFAULTS: [u64; 2] = [3 << 60, 7 << 60];

    fn weights(table: &BTreeMap<u64, f32>, precision: Precision) -> Weights {
        let layout = Layout {
            sides: vec![Some(Side::User), Some(Side::Item)],
            keys: vec![0; 2],
            dim: DIM,
            layers: vec![4],
            activation: Activation::Tanh,
            layer_norm: false,
            normalize: false,
        };
        let params = (0..layout.pair().len).map(|i| (i % 7) as f32 * 0.25 - 0.5).collect();
        let rows = Vectors::exact(DIM, table.values().flat_map(|w| [*w, 1.0 - w, w * w]).collect());
        let ids = table.keys().copied().collect();
        let towers = snapshot::Towers::new(layout, ids, rows, params, &DEFAULTS).unwrap();
        let weights = Weights::new(Vec::new(), Vec::new(), 0.0, DEFAULTS.to_vec()).unwrap();
        weights.with_towers(towers).rounded(precision).unwrap()
    }

    proptest! {
        #[test]
        fn vectors_under_deltas_are_those_of_the_full_in_their_place_and_none_is_held_twice(
            base in prop::collection::btree_map(1u64..40, -2f32..2.0, 0..30),
            deltas in prop::collection::vec(prop::collection::btree_map(1u64..40, prop::option::of(-2f32..2.0), 0..15), 1..6),
            precision in prop_oneof![Just(Precision::F32), Just(Precision::F16), Just(Precision::Int8)],
        ) {
            let spread = |id: u64| id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut table: BTreeMap<u64, f32> = base.into_iter().map(|(id, w)| (spread(id), w)).collect();
            table.extend(DEFAULTS.map(|id| (id, 0.5)));
            let mut full = weights(&table, precision);
            let mut served = Towers::new(full.towers().unwrap().clone()).unwrap();
            let mut touched = BTreeSet::new();
            for delta in deltas {
                for (id, w) in delta {
                    match w {
                        Some(w) => _ = table.insert(spread(id), w),
                        None => _ = table.remove(&spread(id)),
                    }
                }
                let next = weights(&table, precision);
                let delta = Delta::between(&full, &next).unwrap();
                let delta = delta.towers().unwrap();
                touched.extend(delta.ids().iter().chain(delta.removed()).copied());
                served = served.with(delta).unwrap();
                full = next;
                prop_assert_eq!(served.rows(), table.len());
                prop_assert!(served.over.len() <= touched.len());
                for user in (0..40).map(spread) {
                    let slot = |row, feature| Slot { row, value: 1.0, feature, flags: 0 };
                    let slots = [slot(user, 0), slot(spread(7), 1), slot(user, 1)];
                    let (ours, theirs) = (served.product(&slots), full.towers().unwrap().product(&slots));
                    prop_assert_eq!(ours.to_bits(), theirs.to_bits());
                }
            }
        }
    }
}
