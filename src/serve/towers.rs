//! The towers of a version, laid out for scoring: no graph, no allocation for a candidate once the scratch has grown.

use super::index::Index;
use crate::event::Slot;
use crate::feature::Overlay;
use crate::model::tower::{Pair, Work};
use crate::model::two_tower::Plan;
use crate::snapshot;

/// Candidates that run through a tower together.
const BLOCK: usize = 32;

/// Both towers, and the vectors behind an index.
pub struct Towers {
    plan: Plan,
    pair: Pair,
    dim: usize,
    index: Index<u32>,
    /// `[rows, dim]`
    rows: Vec<f32>,
    params: Vec<f32>,
    /// Of each feature: where its default row lies.
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
    pub fn new(towers: &snapshot::Towers) -> Self {
        let layout = towers.layout();
        Self {
            plan: layout.plan(),
            pair: layout.pair(),
            dim: layout.dim,
            index: Index::new(towers.ids(), 0..),
            rows: towers.rows().to_vec(),
            params: towers.params().to_vec(),
            defaults: towers.defaults().iter().map(|at| at.unwrap_or(0) as u32).collect(),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.index.len()
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.index.bytes() + size_of_val(self.rows.as_slice()) + size_of_val(self.params.as_slice())
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
        overlay.slots().iter().take(2 * BLOCK).for_each(|slot| self.index.prefetch(slot.row));
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
        let at = self.index.get(slot.row).unwrap_or_else(|| self.defaults[usize::from(slot.feature)]);
        let from = &self.rows[at as usize * self.dim..][..self.dim];
        let to = &mut inputs[tower][row * self.plan.widths()[tower] + column..][..self.dim];
        to.iter_mut().zip(from).for_each(|(sum, &w)| *sum += slot.value * w);
    }
}
