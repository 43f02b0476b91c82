//! From row id to weight (or to where a row's vector lies), one cache line a look-up.

use std::sync::Arc;

/// Rows in a line.
const LANES: usize = 5;

/// Five rows in one cache line. Lanes fill from the first; id 0 is an empty lane.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line<V> {
    ids: [u64; LANES],
    values: [V; LANES],
}

/// An open-addressing table of values of 4 bytes, filled once. Ids are uniform hashes, so an id's place in `u64` is its home line.
/// 70 % of the lanes are taken: 18 bytes a row. The sorted columns of a snapshot have 12, and take ten times as long:
/// 118 ms instead of 12 ms for 25600 examples of 13 slots over 1M rows (`benches/score.rs`).
pub struct Index<V> {
    lines: Vec<Line<V>>,
    rows: usize,
}

impl<V: Copy + Default> Index<V> {
    /// Takes ids, ascending and free of 0 (as [`Weights`](crate::snapshot::Weights) has checked), and a value for each.
    #[must_use]
    pub fn new(ids: &[u64], values: impl Iterator<Item = V>) -> Self {
        let mut index = Self::with_room(ids.len());
        ids.iter().zip(values).for_each(|(&id, value)| index.insert(id, value));
        index
    }

    /// Room for so many rows, with none in it.
    fn with_room(rows: usize) -> Self {
        Self { lines: vec![Line::default(); (rows * 10).div_ceil(LANES * 7).max(1)], rows: 0 }
    }

    /// Adds a row that is not there yet. There must be room.
    fn insert(&mut self, id: u64, value: V) {
        let mut at = home(&self.lines, id);
        loop {
            if let Some(lane) = self.lines[at].ids.iter().position(|id| *id == 0) {
                (self.lines[at].ids[lane], self.lines[at].values[lane]) = (id, value);
                self.rows += 1;
                return;
            }
            at = after(&self.lines, at);
        }
    }

    /// All rows, in no order.
    fn iter(&self) -> impl Iterator<Item = (u64, V)> {
        let lanes = self.lines.iter().flat_map(|line| line.ids.into_iter().zip(line.values));
        lanes.filter(|(id, _)| *id != 0)
    }

    /// Value of a row, if it has one.
    #[inline]
    #[must_use]
    pub fn get(&self, id: u64) -> Option<V> {
        if id == 0 {
            return None;
        }
        let mut at = home(&self.lines, id);
        loop {
            let line = &self.lines[at];
            // Without a branch for each lane.
            let mut found = LANES;
            for lane in (0..LANES).rev() {
                found = if line.ids[lane] == id { lane } else { found };
            }
            if found < LANES {
                return Some(line.values[found]);
            }
            if line.ids[LANES - 1] == 0 {
                return None;
            }
            at = after(&self.lines, at);
        }
    }

    /// Asks the memory for the line where the row of `id` most likely lies.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) {
        let line = self.lines.as_ptr().wrapping_add(home(&self.lines, id));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint; it reads nothing and faults on no address. The intrinsic is unsafe only by its
        // signature. Reason: 100 candidates over 1M rows go from 41 to 28 us with it (`benches/score.rs`, values_to_scores).
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.lines.len() * size_of::<Line<V>>()
    }
}

/// What stands for a row that a delta removed.
pub trait Gone: Copy + Default {
    const GONE: Self;
    fn is_gone(self) -> bool;
}

impl Gone for f32 {
    // Weights are finite.
    const GONE: Self = Self::NAN;

    #[inline(always)]
    fn is_gone(self) -> bool {
        self.is_nan()
    }
}

impl Gone for u32 {
    const GONE: Self = Self::MAX;

    #[inline(always)]
    fn is_gone(self) -> bool {
        self == Self::GONE
    }
}

/// The rows of a full, which versions share, under those that deltas changed since. So a delta costs what it changes, and no
/// table is held twice.
pub struct Layered<V> {
    base: Arc<Index<V>>,
    over: Index<V>,
    rows: usize,
}

impl<V: Gone> Layered<V> {
    /// See [`Index::new`].
    #[must_use]
    pub fn new(ids: &[u64], values: impl Iterator<Item = V>) -> Self {
        let base = Index::new(ids, values);
        Self { rows: base.len(), base: Arc::new(base), over: Index::with_room(0) }
    }

    /// These rows with some changed or added and others removed; the two lists share no id. None if a row is to be removed
    /// that is not there.
    #[must_use]
    pub fn with(&self, changed: &[u64], values: impl Iterator<Item = V>, removed: &[u64]) -> Option<Self> {
        let mut over = Index::with_room(self.over.len() + changed.len() + removed.len());
        let mut rows = self.rows;
        for (&id, value) in changed.iter().zip(values) {
            rows += usize::from(self.get(id).is_none());
            over.insert(id, value);
        }
        for &id in removed {
            self.get(id)?;
            rows -= 1;
            over.insert(id, V::GONE);
        }
        for (id, value) in self.over.iter() {
            if over.get(id).is_none() {
                over.insert(id, value);
            }
        }
        Some(Self { base: Arc::clone(&self.base), over, rows })
    }

    /// Value of a row, if it has one.
    #[inline]
    #[must_use]
    pub fn get(&self, id: u64) -> Option<V> {
        if !self.over.is_empty()
            && let Some(value) = self.over.get(id)
        {
            return (!value.is_gone()).then_some(value);
        }
        self.base.get(id)
    }

    /// Asks the memory for the lines where the row of `id` most likely lies.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) {
        self.base.prefetch(id);
        if !self.over.is_empty() {
            self.over.prefetch(id);
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// Memory held, in bytes; that of the base is shared with other versions.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.base.bytes() + self.over.bytes()
    }
}

#[inline(always)]
fn home<V>(lines: &[Line<V>], id: u64) -> usize {
    ((u128::from(id) * lines.len() as u128) >> 64) as usize
}

#[inline(always)]
fn after<V>(lines: &[Line<V>], at: usize) -> usize {
    if at + 1 == lines.len() { 0 } else { at + 1 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn layers_hold_what_the_changes_leave(
            base in prop::collection::btree_map(1u64..60, -9f32..9.0, 0..40),
            deltas in prop::collection::vec(prop::collection::btree_map(1u64..60, prop::option::of(-9f32..9.0), 0..20), 0..5),
        ) {
            let spread = |id: u64| id.wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mut expected: std::collections::BTreeMap<u64, f32> = base.into_iter().map(|(id, v)| (spread(id), v)).collect();
            let ids: Vec<u64> = expected.keys().copied().collect();
            let mut layers = Layered::new(&ids, expected.values().copied());
            for delta in deltas {
                let (mut changed, mut values, mut removed) = (Vec::new(), Vec::new(), Vec::new());
                for (id, value) in delta {
                    match value {
                        Some(value) => {
                            changed.push(spread(id));
                            values.push(value);
                            expected.insert(spread(id), value);
                        }
                        None if expected.remove(&spread(id)).is_some() => removed.push(spread(id)),
                        None => prop_assert!(layers.with(&[], [].into_iter(), &[spread(id)]).is_none()),
                    }
                }
                layers = layers.with(&changed, values.into_iter(), &removed).unwrap();
                prop_assert_eq!(layers.len(), expected.len());
                for id in (0..60).map(spread) {
                    prop_assert_eq!(layers.get(id), expected.get(&id).copied());
                }
            }
        }

        #[test]
        fn it_finds_what_the_sorted_columns_hold(
            ids in prop::collection::btree_set(prop_oneof![1u64.., 1u64..200, (u64::MAX - 200)..], 0..300),
            others in prop::collection::vec(any::<u64>(), 20),
        ) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let values: Vec<f32> = (0..ids.len()).map(|i| i as f32 - 7.5).collect();
            let index = Index::new(&ids, values.iter().copied());
            prop_assert_eq!(index.len(), ids.len());
            for id in ids.iter().copied().chain(others).chain([0, 1, u64::MAX]) {
                prop_assert_eq!(index.get(id), ids.binary_search(&id).ok().map(|at| values[at]));
            }
        }
    }
}
