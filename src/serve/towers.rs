//! The towers of a version, laid out for scoring: no graph, no allocation for a candidate once the scratch has grown.

use std::sync::Arc;

use super::index::Layered;
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
    /// Where a row's vector lies: in `base`, or past its end in `over`.
    index: Layered<u32>,
    base: Arc<Vectors>,
    /// Those that deltas changed since, also ones that were changed again.
    over: Vectors,
    params: Vec<f32>,
    /// Of each feature that a tower sees: its default row.
    default_rows: Vec<Option<u64>>,
    /// Where it lies.
    defaults: Vec<u32>,
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
    #[must_use]
    pub fn new(towers: snapshot::Towers) -> Self {
        let layout = towers.layout();
        let index = Layered::new(towers.ids(), 0..);
        let default_rows: Vec<_> = towers.defaults().iter().map(|at| at.map(|at| towers.ids()[at])).collect();
        let defaults = towers.defaults().iter().map(|at| at.unwrap_or(0) as u32).collect();
        let (plan, pair, dim) = (layout.plan(), layout.pair(), layout.dim);
        let over = Vectors::new(dim, towers.rows().precision());
        let (rows, params) = towers.into_rows();
        Self { plan, pair, dim, index, base: Arc::new(rows), over, params, default_rows, defaults }
    }

    /// These towers after a delta. What is wrong, where it was not made for them.
    pub fn with(&self, delta: &TowersDelta) -> Result<Self, String> {
        let mut over = self.over.clone();
        if delta.rows().precision() != over.precision() || delta.rows().dim() != self.dim {
            return Err("it has vectors of another kind".to_owned());
        }
        let first = self.base.len() + over.len();
        over.extend(delta.rows(), 0..delta.rows().len());
        let index = self.index.with(delta.ids(), (first..).map(|at| at as u32), delta.removed());
        let index = index.ok_or_else(|| "it removes a vector that is not there".to_owned())?;
        let place = |row: &Option<u64>| row.map_or(Some(0), |row| index.get(row));
        let defaults = self.default_rows.iter().map(place).collect::<Option<Vec<u32>>>();
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

    /// Memory held, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.index.bytes() + self.base.bytes() + self.over.bytes() + size_of_val(self.params.as_slice())
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
        overlay
            .slots()
            .iter()
            .take(2 * BLOCK)
            .for_each(|slot| self.index.prefetch(self.plan.id(slot.feature, slot.row)));
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
        let at = self
            .index
            .get(self.plan.id(slot.feature, slot.row))
            .unwrap_or_else(|| self.defaults[usize::from(slot.feature)]);
        let to = &mut inputs[tower][row * self.plan.widths()[tower] + column..][..self.dim];
        match (at as usize).checked_sub(self.base.len()) {
            None => self.base.add(at as usize, slot.value, to),
            Some(at) => self.over.add(at, slot.value, to),
        }
    }
}
