//! From row id to weight (or to where a row's vector lies), one cache line a look-up.

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
        let rows = ids.len();
        let mut lines = vec![Line::default(); (rows * 10).div_ceil(LANES * 7).max(1)];
        for (&id, value) in ids.iter().zip(values) {
            let mut at = home(&lines, id);
            loop {
                if let Some(lane) = lines[at].ids.iter().position(|id| *id == 0) {
                    (lines[at].ids[lane], lines[at].values[lane]) = (id, value);
                    break;
                }
                at = after(&lines, at);
            }
        }
        Self { lines, rows }
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
