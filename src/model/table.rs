//! Sparse parameters: a collisionless table from row id to weight and accumulator.
//!
//! Every id has a row of its own, and three rows share one cache line, so that a touch costs one miss. Where a row lies,
//! how large the table is and in which order rows came are *not* state: all that leaves the table is sorted by id, and a
//! table made from that behaves as the one it came from.

use super::Error;
use super::admission::Aged;
use super::changes::{Changes, Log, firsts};
use crate::event::Slot;

/// Rows in a bucket.
const LANES: usize = 3;
/// Buckets of an empty table.
const SMALLEST: usize = 64;

/// Three rows in one cache line, as words: the ids, low half first, then w, n and touched. Lanes fill from the first; id
/// 0 is an empty lane. Words instead of fields, because 6 + lane is below 16 for whatever two bits say: no bounds check.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Bucket([u32; 16]);

const EMPTY: Bucket = Bucket([0; 16]);
const W: usize = 2 * LANES;
const N: usize = 3 * LANES;
const TOUCHED: usize = 4 * LANES;

impl Bucket {
    #[inline(always)]
    fn id(&self, lane: usize) -> u64 {
        u64::from(self.0[2 * lane]) | u64::from(self.0[2 * lane + 1]) << 32
    }

    fn row(&self, lane: usize) -> Row {
        Row {
            w: f32::from_bits(self.0[W + lane]),
            n: f32::from_bits(self.0[N + lane]),
            touched: self.0[TOUCHED + lane],
        }
    }
}

/// Where a row lies, until the table grows: bucket * 4 + lane.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct At(u32);

impl At {
    /// No row.
    pub const NONE: Self = Self(u32::MAX);

    fn new(bucket: usize, lane: usize) -> Self {
        Self((bucket * 4 + lane) as u32)
    }

    fn bucket(self) -> usize {
        (self.0 >> 2) as usize
    }

    fn lane(self) -> usize {
        (self.0 & 3) as usize
    }
}

/// What a row holds beside its id (and `z`).
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Row {
    pub w: f32,
    pub n: f32,
    pub touched: u32,
}

/// Rows as columns of one length, ids strictly ascending: the canonical form of a table.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Rows {
    pub ids: Vec<u64>,
    /// Weight.
    pub w: Vec<f32>,
    /// Sum of squared gradients, decayed as of the row's last touch.
    pub n: Vec<f32>,
    /// FTRL-Proximal's `z`; only where l1 > 0.
    pub z: Option<Vec<f32>>,
    /// Number of the batch that last changed the row; 0 for a row that came with a warm start.
    pub touched: Vec<u32>,
}

impl Rows {
    /// Drops the rows of ids that `keep` refuses.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        let kept: Vec<bool> = self.ids.iter().map(|&id| keep(id)).collect();
        retain_column(&mut self.ids, 1, &kept);
        [&mut self.w, &mut self.n].into_iter().chain(&mut self.z).for_each(|column| retain_column(column, 1, &kept));
        retain_column(&mut self.touched, 1, &kept);
    }
}

/// Drops from a column of rows, `width` elements each, those that are not `kept`.
pub(super) fn retain_column<T: Copy>(column: &mut Vec<T>, width: usize, kept: &[bool]) {
    let mut to = 0;
    for (row, _) in kept.iter().enumerate().filter(|&(_, &kept)| kept) {
        column.copy_within(row * width..(row + 1) * width, to);
        to += width;
    }
    column.truncate(to);
}

/// A table of rows (id, w, n, touched), and `z` beside it if it was made with it.
///
/// Ids must be spread evenly over `u64`, as hashes are, and not be 0. A bucket is found by the id's place in `u64`,
/// so a walk over the buckets is a walk in nearly sorted order. At most [`Table::capacity`] rows fit before
/// [`Table::reserve`] must be called; rows stay where they are until then.
#[derive(Clone)]
pub struct Table {
    buckets: Vec<Bucket>,
    z: Option<Vec<[f32; LANES]>>,
    len: usize,
    /// Of all ids, wrapping.
    id_sum: u64,
    pub(super) log: Log,
}

impl Table {
    #[must_use]
    pub fn new(with_z: bool) -> Self {
        Self::with_buckets(SMALLEST, with_z)
    }

    /// A table that takes `rows` rows without growing.
    #[must_use]
    pub fn with_capacity(rows: usize, with_z: bool) -> Self {
        Self::with_buckets(buckets_for(rows).max(SMALLEST), with_z)
    }

    fn with_buckets(count: usize, with_z: bool) -> Self {
        assert!(count <= 1 << 30, "a table of {count} buckets is past what a u32 position can name (3.2e9 rows)");
        let z = with_z.then(|| vec![[0.0; LANES]; count]);
        Self { buckets: vec![EMPTY; count], z, len: 0, id_sum: 0, log: Log::default() }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The sum of all ids, modulo 2^64. Ids are hashes, so two tables with the same sum hold the same ids, but for a chance of
    /// 2^-64.
    #[must_use]
    pub fn id_sum(&self) -> u64 {
        self.id_sum
    }

    /// Number of rows that fit before the table grows: 60 % of its lanes.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.buckets.len() * 9 / 5
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let z = self.z.as_ref().map_or(0, |z| z.len() * size_of::<[f32; LANES]>());
        self.buckets.len() * size_of::<Bucket>() + z + self.log.bytes()
    }

    /// Makes room for `more` rows beyond those there, at least doubling if it must grow. Every [`At`] is void after growth;
    /// returns whether it grew.
    pub fn reserve(&mut self, more: usize) -> bool {
        let needed = self.len + more;
        if needed <= self.capacity() {
            return false;
        }
        let mut grown =
            Self::with_buckets(buckets_for(needed).max(self.buckets.len() * 2).min(1 << 30), self.z.is_some());
        assert!(needed <= grown.capacity(), "the table is full: {needed} rows");
        for (from, bucket) in self.buckets.iter().enumerate() {
            for lane in 0..LANES {
                let id = bucket.id(lane);
                if id == 0 {
                    break;
                }
                let at = grown.insert_new(id);
                grown.set(at, bucket.row(lane));
                if let (Some(new), Some(old)) = (&mut grown.z, &self.z) {
                    new[at.bucket()][at.lane()] = old[from][lane];
                }
            }
        }
        (grown.id_sum, grown.log) = (self.id_sum, std::mem::take(&mut self.log));
        *self = grown;
        true
    }

    /// Asks the memory for the line where the row of `id` most likely lies.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) {
        let line = self.buckets.as_ptr().wrapping_add(home(&self.buckets, id));
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a prefetch is a hint; it reads nothing and faults on no address. The intrinsic is unsafe only by its
        // signature. Reason: learning over 2^24 rows (568 MiB) goes from 2.1 to 3.5 M examples/s with it.
        unsafe {
            std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = line;
    }

    /// The row of `id`, or [`At::NONE`].
    #[inline]
    #[must_use]
    pub fn find(&self, id: u64) -> At {
        find(&self.buckets, id)
    }

    /// The row of each slot's id, or [`At::NONE`].
    #[inline(always)]
    pub fn find_all(&self, slots: &[Slot], found: &mut [At]) {
        let buckets = self.buckets.as_slice();
        for (slot, at) in slots.iter().zip(found) {
            *at = find(buckets, slot.row);
        }
    }

    /// The row of `id`; a new one is all zeros. Panics if the table is full: [`Table::reserve`] comes first.
    #[inline]
    pub fn find_or_insert(&mut self, id: u64) -> At {
        let at = self.find(id);
        if at == At::NONE { self.insert(id) } else { at }
    }

    /// Makes a row of zeros for an id that has none. Panics as [`Table::find_or_insert`] does.
    pub(super) fn insert(&mut self, id: u64) -> At {
        self.log.birth(id);
        self.id_sum = self.id_sum.wrapping_add(id);
        self.insert_new(id)
    }

    fn insert_new(&mut self, id: u64) -> At {
        assert!(self.len < self.capacity(), "no room was reserved for row {id:016x}");
        debug_assert_ne!(id, 0, "0 is the id of an empty place");
        let mut bucket = home(&self.buckets, id);
        loop {
            let there = &mut self.buckets[bucket];
            if let Some(lane) = (0..LANES).find(|&lane| there.id(lane) == 0) {
                (there.0[2 * lane], there.0[2 * lane + 1]) = (id as u32, (id >> 32) as u32);
                self.len += 1;
                return At::new(bucket, lane);
            }
            bucket = if bucket + 1 == self.buckets.len() { 0 } else { bucket + 1 };
        }
    }

    /// Weight of the row at `at`.
    #[inline(always)]
    #[must_use]
    pub fn w(&self, at: At) -> f32 {
        f32::from_bits(self.buckets[at.bucket()].0[W + at.lane()])
    }

    #[inline(always)]
    #[must_use]
    pub fn row(&self, at: At) -> Row {
        self.buckets[at.bucket()].row(at.lane())
    }

    #[inline(always)]
    pub fn set(&mut self, at: At, row: Row) {
        let words = &mut self.buckets[at.bucket()].0;
        words[W + at.lane()] = row.w.to_bits();
        words[N + at.lane()] = row.n.to_bits();
        words[TOUCHED + at.lane()] = row.touched;
    }

    /// Tells the log of changes, if it is on, that the row at `at` is about to be touched.
    #[inline(always)]
    pub(super) fn log_touch(&mut self, at: At) {
        let bucket = &self.buckets[at.bucket()];
        self.log.touch(bucket.id(at.lane()), bucket.0[TOUCHED + at.lane()]);
    }

    /// All rows, open for change, without growth: a loop over many keeps it in registers.
    #[inline(always)]
    pub fn open(&mut self) -> Open<'_> {
        Open(&mut self.buckets)
    }

    /// `z` of the row at `at`. Panics if the table was made without.
    #[inline(always)]
    pub fn z(&mut self, at: At) -> &mut f32 {
        &mut self.z.as_mut().expect("a table made with z")[at.bucket()][at.lane()]
    }

    /// All rows.
    #[must_use]
    pub fn rows(&self) -> Rows {
        self.rows_where(|_| true)
    }

    /// The rows that a batch after number `batch` changed. Walks the whole table.
    #[must_use]
    pub fn rows_touched_after(&self, batch: u32) -> Rows {
        self.rows_where(|touched| touched > batch)
    }

    /// What became of rows behind number `batch`, at a cost that follows what was touched; None where the log does not reach
    /// back so far.
    #[must_use]
    pub fn changes_after(&self, batch: u32) -> Option<Changes<Rows>> {
        let mut ids = Vec::new();
        if !self.log.since(batch, &mut ids) {
            return None;
        }
        let (mut found, mut removed) = (Vec::with_capacity(ids.len()), Vec::new());
        for (id, born) in firsts(ids) {
            match self.find(id) {
                At::NONE if born => {}
                At::NONE => removed.push(id),
                at if self.row(at).touched > batch => found.push((id, at)),
                _ => {}
            }
        }
        Some(Changes { rows: self.rows_at(&found), removed })
    }

    fn rows_where(&self, wanted: impl Fn(u32) -> bool) -> Rows {
        let mut found: Vec<(u64, At)> = Vec::with_capacity(self.len);
        for (at, bucket) in self.buckets.iter().enumerate() {
            for lane in 0..LANES {
                if bucket.id(lane) != 0 && wanted(bucket.row(lane).touched) {
                    found.push((bucket.id(lane), At::new(at, lane)));
                }
            }
        }
        found.sort_unstable_by_key(|&(id, _)| id);
        self.rows_at(&found)
    }

    fn rows_at(&self, found: &[(u64, At)]) -> Rows {
        Rows {
            ids: found.iter().map(|&(id, _)| id).collect(),
            w: found.iter().map(|&(_, at)| self.w(at)).collect(),
            n: found.iter().map(|&(_, at)| self.row(at).n).collect(),
            z: self.z.as_ref().map(|z| found.iter().map(|&(_, at)| z[at.bucket()][at.lane()]).collect()),
            touched: found.iter().map(|&(_, at)| self.row(at).touched).collect(),
        }
    }

    /// The table that holds `rows`; it has `z` where `rows` has. Refuses columns of unequal length, ids that are 0 or not
    /// strictly ascending, and numbers that no training gives (not finite, a negative `n`).
    pub fn from_rows(rows: &Rows) -> Result<Self, Error> {
        let refuse = |what: String| Err(Error::State { part: "logistic rows", what });
        let count = rows.ids.len();
        let z = rows.z.as_deref();
        if [rows.w.len(), rows.n.len(), rows.touched.len(), z.map_or(count, <[f32]>::len)] != [count; 4] {
            return refuse(format!("columns of unequal length beside {count} ids"));
        }
        let mut table = Self::with_capacity(count, z.is_some());
        let mut before = 0;
        for (i, &id) in rows.ids.iter().enumerate() {
            if id <= before {
                return refuse(format!("id {id:016x} at row {i} is not above the one before, {before:016x}"));
            }
            before = id;
            let (w, n, z) = (rows.w[i], rows.n[i], z.map_or(0.0, |z| z[i]));
            if !(w.is_finite() && n.is_finite() && n >= 0.0 && z.is_finite()) {
                return refuse(format!("row {id:016x} holds w {w}, n {n}, z {z}"));
            }
            let at = table.insert(id);
            table.set(at, Row { w, n, touched: rows.touched[i] });
            if rows.z.is_some() {
                *table.z(at) = z;
            }
        }
        Ok(table)
    }
}

impl Aged for Table {
    fn len(&self) -> usize {
        self.len
    }

    /// Every [`At`] is void. Takes a walk over the table, and no memory.
    fn retain(&mut self, keep: impl Fn(u64, u32) -> bool) -> u64 {
        let (count, before) = (self.buckets.len(), self.len);
        // No row in front of `start` was put behind it for want of room. From there on, rows that stay are put back in the
        // order in which they are met, so each lands where it was or nearer to its home.
        let open = (0..count).find(|&at| self.buckets[at].id(LANES - 1) == 0).expect("a load of at most 0.6");
        for at in (open + 1..count).chain(0..=open) {
            let bucket = std::mem::replace(&mut self.buckets[at], EMPTY);
            let z = self.z.as_mut().map(|z| std::mem::take(&mut z[at]));
            for lane in 0..LANES {
                let (id, row) = (bucket.id(lane), bucket.row(lane));
                if id == 0 {
                    break;
                }
                self.len -= 1;
                if !keep(id, row.touched) {
                    self.log.remove(id);
                    self.id_sum = self.id_sum.wrapping_sub(id);
                    continue;
                }
                let to = self.insert_new(id);
                self.set(to, row);
                if let Some(z) = z {
                    *self.z(to) = z[lane];
                }
            }
        }
        (before - self.len) as u64
    }

    fn by_age(&self, count: usize) -> Option<(u32, u64)> {
        let mut ages = Vec::with_capacity(self.len);
        for bucket in &self.buckets {
            let lanes = (0..LANES).filter(|&lane| bucket.id(lane) != 0);
            ages.extend(lanes.map(|lane| (bucket.row(lane).touched, bucket.id(lane))));
        }
        (count < ages.len()).then(|| *ages.select_nth_unstable(count).1)
    }
}

/// The bucket where the search for `id` starts: its share of `u64` scaled to the number of buckets.
#[inline(always)]
fn home(buckets: &[Bucket], id: u64) -> usize {
    ((u128::from(id) * buckets.len() as u128) >> 64) as usize
}

#[inline(always)]
fn find(buckets: &[Bucket], id: u64) -> At {
    let mut at = home(buckets, id);
    loop {
        let bucket = &buckets[at];
        // Without a branch on the lane: it is chance where an id lies, and a wrong guess costs more than this.
        let lane = usize::from(bucket.id(1) == id) + 2 * usize::from(bucket.id(2) == id);
        if bucket.id(lane) == id {
            return At::new(at, lane);
        }
        if bucket.id(LANES - 1) == 0 {
            return At::NONE;
        }
        at = if at + 1 == buckets.len() { 0 } else { at + 1 };
    }
}

/// The rows of a table, in place.
pub struct Open<'a>(&'a mut [Bucket]);

impl Open<'_> {
    #[inline(always)]
    #[must_use]
    pub fn w(&self, at: At) -> f32 {
        f32::from_bits(self.0[at.bucket()].0[W + at.lane()])
    }

    #[inline(always)]
    pub fn set_w(&mut self, at: At, w: f32) {
        self.0[at.bucket()].0[W + at.lane()] = w.to_bits();
    }

    /// Adds `squared` to the accumulator and marks the row as touched by `batch`. Returns the accumulator.
    #[inline(always)]
    pub fn accumulate(&mut self, at: At, squared: f32, batch: u32) -> f32 {
        let words = &mut self.0[at.bucket()].0;
        let n = f32::from_bits(words[N + at.lane()]) + squared;
        words[N + at.lane()] = n.to_bits();
        words[TOUCHED + at.lane()] = batch;
        n
    }

    /// Number of the batch that last changed the row.
    #[inline(always)]
    #[must_use]
    pub fn touched(&self, at: At) -> u32 {
        self.0[at.bucket()].0[TOUCHED + at.lane()]
    }
}

/// Buckets that take `rows` rows at a load of 0.6.
fn buckets_for(rows: usize) -> usize {
    (rows * 5).div_ceil(9)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;
    use xxhash_rust::xxh3::xxh3_64;

    fn id(i: u32) -> u64 {
        xxh3_64(&i.to_le_bytes()).max(1)
    }

    proptest! {
        #[test]
        fn a_table_holds_what_a_hash_map_holds(
            // Few distinct ids, so that they repeat; some lie close together or at the ends, so that probing wraps.
            touches in prop::collection::vec((prop_oneof![(0u32..400).prop_map(id), 1u64..40, u64::MAX - 40..=u64::MAX], 0u32..9), 0..900),
            with_z in any::<bool>(),
            block in 1usize..50,
        ) {
            let mut table = Table::new(with_z);
            let mut oracle: HashMap<u64, (f32, f32, u32)> = HashMap::new();
            for touches in touches.chunks(block) {
                table.reserve(touches.len());
                for &(id, batch) in touches {
                    prop_assert_eq!(table.find(id) != At::NONE, oracle.contains_key(&id));
                    let at = table.find_or_insert(id);
                    let mut open = table.open();
                    open.accumulate(at, 1.0, batch);
                    open.set_w(at, open.w(at) + 1.5);
                    if with_z {
                        *table.z(at) -= 1.0;
                    }
                    let (w, n, touched) = oracle.entry(id).or_default();
                    (*w, *n, *touched) = (*w + 1.5, *n + 1.0, batch);
                }
            }
            prop_assert_eq!(table.len(), oracle.len());
            prop_assert!(table.len() <= table.capacity());
            let mut expected: Vec<_> = oracle.into_iter().collect();
            expected.sort_by_key(|&(id, _)| id);
            let rows = table.rows();
            for (i, (id, (w, n, touched))) in expected.iter().enumerate() {
                prop_assert_eq!((rows.ids[i], rows.w[i], rows.n[i], rows.touched[i]), (*id, *w, *n, *touched));
                prop_assert_eq!(table.w(table.find(*id)), *w);
            }
            if let Some(z) = &rows.z {
                prop_assert!(z.iter().zip(&rows.n).all(|(z, n)| *z == -n));
            }
            prop_assert_eq!(rows.z.is_some(), with_z);

            let late = table.rows_touched_after(4);
            prop_assert_eq!(late.ids, expected.iter().filter(|(_, row)| row.2 > 4).map(|(id, _)| *id).collect::<Vec<_>>());

            let again = Table::from_rows(&rows).unwrap();
            prop_assert_eq!(again.rows(), rows);
        }
    }

    proptest! {
        #[test]
        fn what_is_left_after_removal_is_a_table_that_never_held_the_rest(
            // Crowded at both ends, so that rows lie far from home and wrap.
            ids in prop::collection::vec(prop_oneof![(0u32..600).prop_map(id), 1u64..90, u64::MAX - 90..=u64::MAX], 0..700),
            parts in prop::collection::vec(0u64..4, 1..4),
            with_z in any::<bool>(),
        ) {
            let mut table = Table::new(with_z);
            for part in parts {
                table.reserve(ids.len());
                for (i, &id) in ids.iter().enumerate() {
                    let at = table.find_or_insert(id);
                    if table.row(at).n == 0.0 {
                        table.set(at, Row { w: i as f32, n: 1.0, touched: i as u32 });
                    }
                    if with_z {
                        *table.z(at) = -(table.w(at));
                    }
                }
                let before = table.rows();
                let keep = |id: u64, touched: u32| (id ^ u64::from(touched)) % 4 != part;
                let kept: Vec<usize> =
                    (0..before.ids.len()).filter(|&i| keep(before.ids[i], before.touched[i])).collect();
                let gone = Aged::retain(&mut table, keep);
                prop_assert_eq!(gone as usize, before.ids.len() - kept.len());
                let rows = table.rows();
                prop_assert_eq!(&rows.ids, &kept.iter().map(|&i| before.ids[i]).collect::<Vec<_>>());
                prop_assert_eq!(&rows.w, &kept.iter().map(|&i| before.w[i]).collect::<Vec<_>>());
                prop_assert_eq!(&rows.touched, &kept.iter().map(|&i| before.touched[i]).collect::<Vec<_>>());
                prop_assert!(rows.z.as_ref().is_none_or(|z| z.iter().zip(&rows.w).all(|(z, w)| *z == -w)));
                for (i, &id) in before.ids.iter().enumerate() {
                    prop_assert_eq!(table.find(id) != At::NONE, kept.contains(&i));
                }
                // A row that comes back begins with zeros: nothing is left in its place.
                for &id in &ids {
                    if table.find(id) == At::NONE {
                        let at = table.find_or_insert(id);
                        prop_assert_eq!(table.row(at), Row::default());
                        if with_z {
                            prop_assert_eq!(*table.z(at), 0.0);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_damaged_column_is_refused_with_its_row() {
        let good = Rows { ids: vec![5, 9], w: vec![0.5, 1.0], n: vec![1.0, 2.0], z: None, touched: vec![1, 1] };
        assert!(Table::from_rows(&good).is_ok());
        let refused = |change: fn(&mut Rows)| {
            let mut rows = good.clone();
            change(&mut rows);
            Table::from_rows(&rows).err().map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(|rows| rows.w[1] = f32::NAN).contains("row 0000000000000009 holds w NaN"));
        assert!(refused(|rows| rows.n[0] = -1.0).contains("n -1"));
        assert!(refused(|rows| rows.ids[0] = 9).contains("at row 1 is not above"));
        assert!(refused(|rows| rows.ids[0] = 0).contains("at row 0 is not above"));
        assert!(refused(|rows| rows.touched.push(0)).contains("unequal length"));
    }
}
