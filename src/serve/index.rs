//! From row id to where the row lies: in the sorted column of a full, which is its own index, or in what deltas changed since.

use std::sync::Arc;

use crate::snapshot::column::Column;

/// Rows that one entry of [`Sorted`] leads to, about.
const REACH: usize = 8;

/// Asks the memory for a line.
#[inline(always)]
pub fn prefetch<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; it reads nothing and faults on no address. The intrinsic is unsafe only by its
    // signature. Reason: 100 candidates over 1M rows went from 41 to 28 us with it when all rows were in a table as `Index` is
    // (`benches/score.rs`, values_to_scores), and a sorted column has more lines to wait for.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// The ids of a full, ascending, where they are, under a table of where each stretch of them begins. Ids are uniform hashes, so
/// an id's place in `u64` is its stretch, and that has about `REACH` rows; among ids of any other distribution it is found by
/// halving, in `log2(rows)` steps at most. The table takes half a byte a row.
pub struct Sorted {
    ids: Column<u64>,
    /// Where each stretch begins, and where the last one ends.
    starts: Vec<u32>,
}

impl Sorted {
    /// Takes ids, ascending and free of 0 (as [`Weights`](crate::snapshot::Weights) has checked). None if there are more
    /// than 2^32.
    #[must_use]
    pub fn new(ids: Column<u64>) -> Option<Self> {
        let rows = u32::try_from(ids.len()).ok()?;
        let stretches = (ids.len() / REACH).max(1);
        let mut starts = Vec::with_capacity(stretches + 1);
        for (at, id) in (0..rows).zip(&*ids) {
            while starts.len() <= place(*id, stretches) {
                starts.push(at);
            }
        }
        starts.resize(stretches + 1, rows);
        Some(Self { ids, starts })
    }

    #[inline(always)]
    fn stretch(&self, id: u64) -> (usize, usize) {
        let at = place(id, self.starts.len() - 1);
        (self.starts[at] as usize, self.starts[at + 1] as usize)
    }

    /// Place of an id in the column, if it is there.
    #[inline]
    #[must_use]
    pub fn find(&self, id: u64) -> Option<usize> {
        let (start, end) = self.stretch(id);
        self.ids[start..end].binary_search(&id).ok().map(|at| start + at)
    }

    /// The first of two hints, the further ahead: asks for what [`Sorted::prefetch`] reads.
    #[inline(always)]
    pub fn prefetch_stretch(&self, id: u64) {
        prefetch(self.starts.as_ptr().wrapping_add(place(id, self.starts.len() - 1)));
    }

    /// Asks the memory for the ids among which `id` is. Returns about where.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) -> usize {
        let (start, end) = self.stretch(id);
        prefetch(self.ids.place(start));
        prefetch(self.ids.place(end.max(1) - 1));
        (start + end) / 2
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Bytes of the column.
    #[must_use]
    pub fn column_bytes(&self) -> usize {
        size_of_val(&*self.ids)
    }

    /// Memory of the table over it, in bytes.
    #[must_use]
    pub fn table_bytes(&self) -> usize {
        size_of_val(self.starts.as_slice())
    }
}

/// Rows in a line.
const LANES: usize = 5;

/// Five rows in one cache line. Lanes fill from the first; id 0 is an empty lane.
#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line<V> {
    ids: [u64; LANES],
    values: [V; LANES],
}

/// An open-addressing table of values of 4 bytes, filled once, for rows that have no sorted column. Ids are uniform hashes, so an
/// id's place in `u64` is its home line. 70 % of the lanes are taken: 18 bytes a row.
pub struct Index<V> {
    lines: Vec<Line<V>>,
    rows: usize,
}

impl<V: Copy + Default> Index<V> {
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
        prefetch(self.lines.as_ptr().wrapping_add(home(&self.lines, id)));
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

/// Where a row is.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Row<V> {
    /// In the full, there.
    Base(usize),
    /// In what deltas changed: its value.
    Over(V),
}

/// The rows of a full, which versions share, under those that deltas changed since, which each version holds folded to one table.
/// So a delta costs what the deltas of its chain changed, and no table is held twice.
pub struct Layered<V> {
    base: Arc<Sorted>,
    over: Index<V>,
    rows: usize,
}

impl<V: Gone> Layered<V> {
    /// The rows of a full.
    #[must_use]
    pub fn new(base: Sorted) -> Self {
        Self { rows: base.len(), base: Arc::new(base), over: Index::with_room(0) }
    }

    /// These rows with some changed or added and others removed; the two lists share no id. A value that an earlier delta gave and
    /// that stays goes through `stays`. None if a row is to be removed that is not there.
    #[must_use]
    pub fn with(
        &self,
        changed: &[u64],
        values: impl Iterator<Item = V>,
        removed: &[u64],
        mut stays: impl FnMut(V) -> V,
    ) -> Option<Self> {
        let mut over = Index::with_room(self.over.len() + changed.len() + removed.len());
        let mut rows = self.rows;
        for (&id, value) in changed.iter().zip(values) {
            rows += usize::from(self.find(id).is_none());
            over.insert(id, value);
        }
        for &id in removed {
            self.find(id)?;
            rows -= 1;
            over.insert(id, V::GONE);
        }
        for (id, value) in self.over.iter() {
            if over.get(id).is_none() {
                over.insert(id, if value.is_gone() { value } else { stays(value) });
            }
        }
        Some(Self { base: Arc::clone(&self.base), over, rows })
    }

    /// Where a row is, if there is one.
    #[inline]
    #[must_use]
    pub fn find(&self, id: u64) -> Option<Row<V>> {
        if !self.over.is_empty()
            && let Some(value) = self.over.get(id)
        {
            return (!value.is_gone()).then_some(Row::Over(value));
        }
        self.base.find(id).map(Row::Base)
    }

    /// See [`Sorted::prefetch_stretch`].
    #[inline(always)]
    pub fn prefetch_stretch(&self, id: u64) {
        self.base.prefetch_stretch(id);
    }

    /// Asks the memory for the lines that [`Layered::find`] reads. Returns about where in the full the row is.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) -> usize {
        if !self.over.is_empty() {
            self.over.prefetch(id);
        }
        self.base.prefetch(id)
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

    /// The ids of the full.
    #[must_use]
    pub fn base(&self) -> &Sorted {
        &self.base
    }

    /// Memory of what deltas changed, in bytes.
    #[must_use]
    pub fn over_bytes(&self) -> usize {
        self.over.bytes()
    }
}

/// Which of so many equal parts of all ids an id is in.
#[inline(always)]
fn place(id: u64, parts: usize) -> usize {
    ((u128::from(id) * parts as u128) >> 64) as usize
}

#[inline(always)]
fn home<V>(lines: &[Line<V>], id: u64) -> usize {
    place(id, lines.len())
}

#[inline(always)]
fn after<V>(lines: &[Line<V>], at: usize) -> usize {
    if at + 1 == lines.len() { 0 } else { at + 1 }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// What a delta does to a few rows: another value, or none.
    type Change = BTreeMap<u64, Option<f32>>;

    /// Ids as hashes give them, and ids that crowd in one place, at either end or all over.
    fn spread(id: u64, crowd: u8) -> u64 {
        match crowd {
            0 => id,
            1 => u64::MAX - id,
            _ => id.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    proptest! {
        #[test]
        fn layers_hold_what_the_changes_leave(
            base in prop::collection::btree_map(1u64..60, -9f32..9.0, 0..40),
            deltas in prop::collection::vec(prop::collection::btree_map(1u64..60, prop::option::of(-9f32..9.0), 0..20), 0..6),
            crowd in 0u8..3,
        ) {
            let deltas: Vec<Change> = deltas;
            let spread = |id: u64| spread(id, crowd);
            let mut expected: BTreeMap<u64, f32> = base.into_iter().map(|(id, v)| (spread(id), v)).collect();
            let values: Vec<f32> = expected.values().copied().collect();
            let ids: Vec<u64> = expected.keys().copied().collect();
            let mut layers = Layered::new(Sorted::new(ids.into()).unwrap());
            for delta in deltas {
                let (before, had) = (expected.clone(), layers.len());
                let (mut changed, mut news, mut removed) = (Vec::new(), Vec::new(), Vec::new());
                for (id, value) in delta {
                    match value {
                        Some(value) => {
                            changed.push(spread(id));
                            news.push(value);
                            expected.insert(spread(id), value);
                        }
                        None if expected.remove(&spread(id)).is_some() => removed.push(spread(id)),
                        None => prop_assert!(layers.with(&[], [].into_iter(), &[spread(id)], |v| v).is_none()),
                    }
                }
                let next = layers.with(&changed, news.into_iter(), &removed, |v| v).unwrap();
                let value = |layers: &Layered<f32>, id: u64| layers.find(id).map(|row| match row {
                    Row::Base(at) => values[at],
                    Row::Over(value) => value,
                });
                prop_assert_eq!(next.len(), expected.len());
                for id in (0..60).map(spread) {
                    prop_assert_eq!(value(&next, id), expected.get(&id).copied());
                    // The version before it is as it was.
                    prop_assert_eq!(value(&layers, id), before.get(&id).copied());
                }
                prop_assert_eq!(layers.len(), had);
                layers = next;
            }
        }

        #[test]
        fn every_row_of_a_sorted_column_is_found_where_it_is_and_no_other(
            ids in prop::collection::btree_set(prop_oneof![1u64.., 1u64..200, (u64::MAX - 200)..], 0..300),
            others in prop::collection::vec(any::<u64>(), 20),
        ) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let sorted = Sorted::new(ids.clone().into()).unwrap();
            prop_assert_eq!(sorted.len(), ids.len());
            for id in ids.iter().copied().chain(others).chain([0, 1, u64::MAX]) {
                prop_assert_eq!(sorted.find(id), ids.binary_search(&id).ok());
                prop_assert!(sorted.prefetch(id) <= ids.len());
            }
        }

        #[test]
        fn a_table_finds_what_was_put_in_it(
            ids in prop::collection::btree_set(prop_oneof![1u64.., 1u64..200, (u64::MAX - 200)..], 0..300),
            others in prop::collection::vec(any::<u64>(), 20),
        ) {
            let ids: Vec<u64> = ids.into_iter().collect();
            let mut index = Index::with_room(ids.len());
            ids.iter().enumerate().for_each(|(at, id)| index.insert(*id, at as u32));
            prop_assert_eq!(index.len(), ids.len());
            for id in ids.iter().copied().chain(others).chain([0, 1, u64::MAX]) {
                prop_assert_eq!(index.get(id).map(|at| at as usize), ids.binary_search(&id).ok());
            }
        }
    }
}
