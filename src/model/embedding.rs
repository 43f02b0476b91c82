//! Sparse vectors: a table from row id to `dim` weights, their accumulators and `touched`, without collisions.
//!
//! An index of cache lines leads from an id to a place in an arena, which grows by chunks. The table is cut
//! into stripes by the lowest bits of the id; a batch's update runs over the stripes, on any number of threads, and what it
//! does to a row does not depend on the others. Where a row lies is *not* state: all that leaves the table is sorted by id.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::Error;
use super::admission::Aged;
use super::changes::{Changes, Log, firsts};
use super::optim::length;
use super::table::retain_column;

/// Stripes of a table.
pub const STRIPES: usize = 8;
const STRIPE_BITS: u32 = STRIPES.trailing_zeros();
/// Rows of one chunk of a stripe's arena. Large, because finding a chunk is a look-up of its own: with 2^12, 10 M rows ran
/// 0.73 as fast as 1 M (benches/towers.rs).
const CHUNK: usize = if cfg!(test) { 1 << 10 } else { 1 << 17 };
/// Rows that the first chunk begins with; it doubles until it is like the others.
const FIRST: usize = if cfg!(test) { 1 << 8 } else { 1 << 12 };
/// Ids in a line of the index.
const LANES: usize = 5;
/// Largest |weight|.
const LARGEST: f32 = 1e3;
/// How many occurrences ahead a row is asked for.
const AHEAD: usize = 12;

/// How wide the accumulators of a row are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowRule {
    /// One accumulator a row: the sum of the mean squared gradient of its weights.
    #[default]
    RowWise,
    /// One accumulator a weight, as AdaGrad has it.
    ElementWise,
}

/// How rows learn and begin.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rules {
    pub dim: usize,
    pub rule: RowRule,
    pub rate: f32,
    /// Added to the accumulator under the root.
    pub n0: f32,
    /// Longest gradient of a row in a batch.
    pub clip: f64,
    /// Initial weights lie evenly in `-initial..initial`.
    pub initial: f32,
    pub seed: u64,
}

impl Rules {
    /// Accumulators of a row.
    #[must_use]
    pub fn accumulators(&self) -> usize {
        if self.rule == RowRule::RowWise { 1 } else { self.dim }
    }

    /// The weights that a row begins with: a function of seed and id.
    pub fn begin(&self, id: u64, out: &mut [f32]) {
        for (i, w) in out.iter_mut().enumerate() {
            *w = self.initial * uniform(self.seed, id, i as u64);
        }
    }
}

/// Evenly in `-1..1`, from a hash.
pub(super) fn uniform(seed: u64, id: u64, index: u64) -> f32 {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&id.to_le_bytes());
    bytes[8..].copy_from_slice(&index.to_le_bytes());
    // 24 bits are exact in f32, and so is what is done to them.
    ((xxh3_64_with_seed(&bytes, seed) >> 40) as f32) * (2.0 / (1 << 24) as f32) - 1.0
}

/// Where a row lies: its stripe in the lowest bits, its place there above them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place(u32);

impl Place {
    /// No row.
    pub const NONE: Self = Self(u32::MAX);

    fn new(stripe: usize, at: u32) -> Self {
        Self(at << STRIPE_BITS | stripe as u32)
    }

    #[inline(always)]
    fn stripe(self) -> usize {
        self.0 as usize % STRIPES
    }

    #[inline(always)]
    fn at(self) -> usize {
        (self.0 >> STRIPE_BITS) as usize
    }
}

/// The stripe of an id.
#[inline(always)]
#[must_use]
pub fn stripe_of(id: u64) -> usize {
    id as usize % STRIPES
}

/// That an example of a batch has a row, and how much of the gradient of its tower's input falls to it.
#[derive(Clone, Copy, Debug)]
pub struct Occurrence {
    pub id: u64,
    /// The row, or [`Place::NONE`] where the id has none yet and is to get one.
    pub place: Place,
    /// Number of the example in its shard.
    pub example: u32,
    /// First column of the row's weights in the pooled input.
    pub column: u32,
    pub tower: usize,
    pub value: f32,
}

/// Rows as columns, ids strictly ascending: the canonical form of a table.
#[derive(Clone, Default, PartialEq, Debug)]
pub struct Rows {
    pub ids: Vec<u64>,
    /// `[rows, dim]`
    pub w: Vec<f32>,
    /// `[rows, accumulators]`
    pub n: Vec<f32>,
    /// Number of the batch that last changed the row.
    pub touched: Vec<u32>,
}

impl Rows {
    /// Drops the rows of ids that `keep` refuses.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        let kept: Vec<bool> = self.ids.iter().map(|&id| keep(id)).collect();
        let count = kept.len().max(1);
        let (dim, width) = (self.w.len() / count, self.n.len() / count);
        retain_column(&mut self.ids, 1, &kept);
        retain_column(&mut self.w, dim, &kept);
        retain_column(&mut self.n, width, &kept);
        retain_column(&mut self.touched, 1, &kept);
    }
}

#[derive(Clone, Copy, Default)]
#[repr(C, align(64))]
struct Line {
    ids: [u64; LANES],
    at: [u32; LANES],
}

/// Open addressing from id to place: lanes fill from the first; id 0 is an empty lane.
#[derive(Clone)]
struct Index {
    lines: Vec<Line>,
    len: usize,
}

impl Index {
    /// An index that takes `ids` ids before it grows.
    fn with_room(ids: usize) -> Self {
        let lines = (ids * 10).div_ceil(LANES * 7).next_power_of_two().max(16);
        Self { lines: vec![Line::default(); lines], len: 0 }
    }

    #[inline(always)]
    fn home(&self, id: u64) -> usize {
        ((u128::from(id) * self.lines.len() as u128) >> 64) as usize
    }

    #[inline(always)]
    fn get(&self, id: u64) -> Option<u32> {
        let mut line = self.home(id);
        loop {
            let there = &self.lines[line];
            if let Some(lane) = there.ids.iter().position(|&other| other == id) {
                return Some(there.at[lane]);
            }
            if there.ids[LANES - 1] == 0 {
                return None;
            }
            line = if line + 1 == self.lines.len() { 0 } else { line + 1 };
        }
    }

    /// Adds an id that is not there. At most 70 % of the lanes are taken.
    fn insert(&mut self, id: u64, at: u32) {
        if (self.len + 1) * 10 > self.lines.len() * LANES * 7 {
            let grown = vec![Line::default(); self.lines.len() * 2];
            let old = std::mem::replace(&mut self.lines, grown);
            for line in &old {
                for (&id, &at) in line.ids.iter().zip(&line.at).filter(|(id, _)| **id != 0) {
                    self.place(id, at);
                }
            }
        }
        self.place(id, at);
        self.len += 1;
    }

    fn place(&mut self, id: u64, at: u32) {
        let mut line = self.home(id);
        loop {
            let there = &mut self.lines[line];
            if let Some(lane) = there.ids.iter().position(|&other| other == 0) {
                (there.ids[lane], there.at[lane]) = (id, at);
                return;
            }
            line = if line + 1 == self.lines.len() { 0 } else { line + 1 };
        }
    }
}

#[inline(always)]
fn ask<T>(line: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch is a hint; it reads nothing and faults on no address. The intrinsic is unsafe only by its signature.
    // Reason: the same as in `table.rs`, three misses a row here: index, head, weights.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// What a row has beside its weights.
#[derive(Clone, Copy, Default)]
struct Head {
    id: u64,
    touched: u32,
    /// Number among the rows of the batch in work. Not state.
    local: u32,
}

#[derive(Clone)]
struct Stripe {
    index: Index,
    heads: Vec<Head>,
    /// `CHUNK` rows each: `dim` weights a row.
    weights: Vec<Vec<f32>>,
    /// `CHUNK` rows each: one accumulator or `dim`.
    accumulators: Vec<Vec<f32>>,
    /// Gradients of the batch in work, `dim` a row, in the order of first occurrence; and whose they are.
    gradients: Vec<f32>,
    local: Vec<u32>,
    /// Of all ids, wrapping.
    id_sum: u64,
    log: Log,
}

impl Stripe {
    fn new() -> Self {
        Self {
            index: Index::with_room(0),
            heads: Vec::new(),
            weights: Vec::new(),
            accumulators: Vec::new(),
            gradients: Vec::new(),
            local: Vec::new(),
            id_sum: 0,
            log: Log::default(),
        }
    }

    fn insert(&mut self, rules: &Rules, id: u64) -> u32 {
        let at = self.heads.len();
        assert!(at < (u32::MAX >> STRIPE_BITS) as usize, "a stripe of {at} rows is full");
        make_room(&mut self.weights, at, rules.dim);
        make_room(&mut self.accumulators, at, rules.accumulators());
        self.heads.push(Head { id, touched: 0, local: 0 });
        self.index.insert(id, at as u32);
        self.log.birth(id);
        self.id_sum = self.id_sum.wrapping_add(id);
        rules.begin(id, self.row_mut(rules.dim, at));
        at as u32
    }

    #[inline(always)]
    fn row(&self, dim: usize, at: usize) -> &[f32] {
        &self.weights[at / CHUNK][at % CHUNK * dim..][..dim]
    }

    #[inline(always)]
    fn row_mut(&mut self, dim: usize, at: usize) -> &mut [f32] {
        &mut self.weights[at / CHUNK][at % CHUNK * dim..][..dim]
    }

    /// Keeps the rows that `keep` (of id and touched) says, closes the gaps, and makes the index anew. Returns how many went.
    fn retain(&mut self, rules: &Rules, keep: impl Fn(u64, u32) -> bool) -> u64 {
        let (dim, width, before) = (rules.dim, rules.accumulators(), self.heads.len());
        let Some(first) = self.heads.iter().position(|head| !keep(head.id, head.touched)) else { return 0 };
        self.remove(self.heads[first].id);
        let mut to = first;
        for from in first + 1..before {
            let head = self.heads[from];
            if keep(head.id, head.touched) {
                self.heads[to] = head;
                shift(&mut self.weights, dim, from, to);
                shift(&mut self.accumulators, width, from, to);
                to += 1;
            } else {
                self.remove(head.id);
            }
        }
        self.heads.truncate(to);
        self.weights.truncate(to.div_ceil(CHUNK));
        self.accumulators.truncate(to.div_ceil(CHUNK));
        // A row that is added later must find accumulators of 0 where another one was.
        if let Some(last) = self.accumulators.last_mut() {
            last[(to - 1) % CHUNK * width + width..].fill(0.0);
        }
        self.index = Index::with_room(to);
        for (at, head) in self.heads.iter().enumerate() {
            self.index.insert(head.id, at as u32);
        }
        (before - to) as u64
    }

    /// Notes that a row goes.
    fn remove(&mut self, id: u64) {
        self.log.remove(id);
        self.id_sum = self.id_sum.wrapping_sub(id);
    }

    fn accumulators_mut(&mut self, width: usize, at: usize) -> &mut [f32] {
        &mut self.accumulators[at / CHUNK][at % CHUNK * width..][..width]
    }

    /// One batch: sums what falls to each row, in order, then moves each row once.
    fn update<'a>(
        &mut self,
        rules: &Rules,
        batch: u32,
        shards: impl Iterator<Item = (&'a [Occurrence], [&'a [f32]; 2], [usize; 2])>,
        rested: &(impl Fn(f64, u32) -> f64 + ?Sized),
    ) {
        let dim = rules.dim;
        self.gradients.clear();
        self.local.clear();
        for (occurrences, inputs, widths) in shards {
            for (i, occurrence) in occurrences.iter().enumerate() {
                if let Some(next) = occurrences.get(i + AHEAD)
                    && next.place != Place::NONE
                {
                    ask(self.heads.as_ptr().wrapping_add(next.place.at()));
                }
                let at = if occurrence.place == Place::NONE {
                    match self.index.get(occurrence.id) {
                        Some(at) => at,
                        None => self.insert(rules, occurrence.id),
                    }
                } else {
                    occurrence.place.at() as u32
                };
                let head = &mut self.heads[at as usize];
                // The number of another batch points elsewhere, or past the end.
                if self.local.get(head.local as usize) != Some(&at) {
                    head.local = self.local.len() as u32;
                    self.local.push(at);
                    self.gradients.resize(self.gradients.len() + dim, 0.0);
                }
                let sum = &mut self.gradients[head.local as usize * dim..][..dim];
                let start = occurrence.example as usize * widths[occurrence.tower] + occurrence.column as usize;
                let from = &inputs[occurrence.tower][start..][..dim];
                let value = occurrence.value;
                sum.iter_mut().zip(from).for_each(|(sum, &d)| *sum += value * d);
            }
        }
        let (local, gradients) = (std::mem::take(&mut self.local), std::mem::take(&mut self.gradients));
        for (i, (&at, gradient)) in local.iter().zip(gradients.chunks_exact(dim)).enumerate() {
            if let Some(&next) = local.get(i + AHEAD) {
                let next = next as usize;
                ask(self.weights[next / CHUNK].as_ptr().wrapping_add(next % CHUNK * dim));
                ask(self.accumulators[next / CHUNK].as_ptr().wrapping_add(next % CHUNK * rules.accumulators()));
            }
            self.step(rules, batch, at as usize, gradient, rested);
        }
        (self.local, self.gradients) = (local, gradients);
    }

    fn step(
        &mut self,
        rules: &Rules,
        batch: u32,
        at: usize,
        gradient: &[f32],
        rested: &(impl Fn(f64, u32) -> f64 + ?Sized),
    ) {
        let (dim, width) = (rules.dim, rules.accumulators());
        let square = gradient.iter().fold(0.0f32, |sum, &g| sum + g * g);
        // The exact length only where it may matter.
        let share = if f64::from(square) > 0.9 * rules.clip * rules.clip {
            let long = length(gradient);
            if long > rules.clip { (rules.clip / long) as f32 } else { 1.0 }
        } else {
            1.0
        };
        let Head { id, touched: before, .. } = self.heads[at];
        self.log.touch(id, before);
        self.heads[at].touched = batch;
        let n = &mut self.accumulators[at / CHUNK][at % CHUNK * width..][..width];
        if before != 0 {
            n.iter_mut().for_each(|n| *n = rested(f64::from(*n), before) as f32);
        }
        let weights = &mut self.weights[at / CHUNK][at % CHUNK * dim..][..dim];
        match rules.rule {
            RowRule::RowWise => {
                n[0] += share * share * square / dim as f32;
                let step = rules.rate * share / (rules.n0 + n[0]).sqrt();
                weights.iter_mut().zip(gradient).for_each(|(w, &g)| *w = (*w - step * g).clamp(-LARGEST, LARGEST));
            }
            RowRule::ElementWise => {
                for ((w, n), &g) in weights.iter_mut().zip(n).zip(gradient) {
                    let g = share * g;
                    *n += g * g;
                    *w = (*w - rules.rate * g / (rules.n0 + *n).sqrt()).clamp(-LARGEST, LARGEST);
                }
            }
        }
    }
}

/// Makes room for a row of `width` numbers at place `at`, where all places before it are taken.
fn make_room(chunks: &mut Vec<Vec<f32>>, at: usize, width: usize) {
    let first = chunks.first().map_or(0, |first| first.len() / width);
    if at < first + chunks.len().saturating_sub(1) * CHUNK {
        return;
    }
    let mut more = vec![0.0; if first == 0 { FIRST } else { CHUNK.min(first * 2) } * width];
    if first < CHUNK
        && let Some(first) = chunks.pop()
    {
        more[..first.len()].copy_from_slice(&first);
    }
    chunks.push(more);
}

/// Copies a row of `width` numbers from place `from` to an earlier place.
fn shift(chunks: &mut [Vec<f32>], width: usize, from: usize, to: usize) {
    let (f, t) = (from % CHUNK * width, to % CHUNK * width);
    if from / CHUNK == to / CHUNK {
        chunks[from / CHUNK].copy_within(f..f + width, t);
    } else {
        let (before, after) = chunks.split_at_mut(from / CHUNK);
        before[to / CHUNK][t..t + width].copy_from_slice(&after[0][f..f + width]);
    }
}

/// A table of vectors. Ids must be spread evenly over `u64`, as hashes are, and not be 0.
#[derive(Clone)]
pub struct Embeddings {
    rules: Rules,
    stripes: Vec<Stripe>,
}

impl Embeddings {
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { rules, stripes: vec![Stripe::new(); STRIPES] }
    }

    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.stripes.iter().map(|stripe| stripe.heads.len()).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Memory held, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let of = |stripe: &Stripe| {
            let chunks = stripe.weights.iter().chain(&stripe.accumulators).map(|chunk| chunk.len() * 4).sum::<usize>();
            stripe.index.lines.len() * size_of::<Line>()
                + stripe.heads.capacity() * size_of::<Head>()
                + chunks
                + stripe.log.bytes()
        };
        self.stripes.iter().map(of).sum()
    }

    /// Asks the memory for the line of the index where `id` most likely stands.
    #[inline(always)]
    pub fn prefetch(&self, id: u64) {
        let index = &self.stripes[stripe_of(id)].index;
        ask(index.lines.as_ptr().wrapping_add(index.home(id)));
    }

    /// Asks the memory for the weights of a row.
    #[inline(always)]
    pub fn prefetch_row(&self, place: Place) {
        if place != Place::NONE {
            let (stripe, at) = (&self.stripes[place.stripe()], place.at());
            ask(stripe.weights[at / CHUNK].as_ptr().wrapping_add(at % CHUNK * self.rules.dim));
        }
    }

    /// The row of `id`, or [`Place::NONE`].
    #[inline(always)]
    #[must_use]
    pub fn find(&self, id: u64) -> Place {
        let stripe = stripe_of(id);
        self.stripes[stripe].index.get(id).map_or(Place::NONE, |at| Place::new(stripe, at))
    }

    /// The weights of a row.
    #[inline(always)]
    #[must_use]
    pub fn row(&self, place: Place) -> &[f32] {
        self.stripes[place.stripe()].row(self.rules.dim, place.at())
    }

    /// The row of `id`; a new one has its initial weights.
    pub fn find_or_insert(&mut self, id: u64) -> Place {
        let (stripe, found) = (stripe_of(id), self.find(id));
        if found != Place::NONE { found } else { Place::new(stripe, self.stripes[stripe].insert(&self.rules, id)) }
    }

    /// The sum of all ids, as [`Table::id_sum`](super::table::Table::id_sum).
    #[must_use]
    pub fn id_sum(&self) -> u64 {
        self.stripes.iter().fold(0, |sum, stripe| sum.wrapping_add(stripe.id_sum))
    }

    /// Begins a segment of the log of changes behind `batch`; the first one turns it on.
    pub fn mark(&mut self, batch: u32) {
        self.stripes.iter_mut().for_each(|stripe| stripe.log.mark(batch, stripe.heads.len()));
    }

    /// Drops what the log of changes holds for one who has not heard of `batch`.
    pub fn forget_changes_to(&mut self, batch: u32) {
        self.stripes.iter_mut().for_each(|stripe| stripe.log.forget_to(batch));
    }

    /// What became of rows behind number `batch`, at a cost that follows what was touched; None where the log does not reach
    /// back so far.
    #[must_use]
    pub fn changes_after(&self, batch: u32) -> Option<Changes<Rows>> {
        let mut ids = Vec::new();
        if !self.stripes.iter().all(|stripe| stripe.log.since(batch, &mut ids)) {
            return None;
        }
        let (mut found, mut removed) = (Vec::with_capacity(ids.len()), Vec::new());
        for (id, born) in firsts(ids) {
            match self.find(id) {
                Place::NONE if born => {}
                Place::NONE => removed.push(id),
                place if self.stripes[place.stripe()].heads[place.at()].touched > batch => found.push((id, place)),
                _ => {}
            }
        }
        Some(Changes { rows: self.rows_at(found), removed })
    }

    /// The stripes, to be updated each on its own; see [`Update::run`].
    pub fn stripes(&mut self) -> Vec<Update<'_>> {
        let rules = &self.rules;
        self.stripes.iter_mut().enumerate().map(|(number, stripe)| Update { number, rules, stripe }).collect()
    }

    /// All rows in canonical order.
    #[must_use]
    pub fn rows(&self) -> Rows {
        let mut found: Vec<(u64, Place)> = Vec::with_capacity(self.len());
        for (s, stripe) in self.stripes.iter().enumerate() {
            found.extend(stripe.heads.iter().enumerate().map(|(at, head)| (head.id, Place::new(s, at as u32))));
        }
        found.sort_unstable_by_key(|&(id, _)| id);
        self.rows_at(found)
    }

    fn rows_at(&self, found: Vec<(u64, Place)>) -> Rows {
        let width = self.rules.accumulators();
        let mut rows = Rows::default();
        rows.w.reserve_exact(found.len() * self.rules.dim);
        rows.n.reserve_exact(found.len() * width);
        for (id, place) in found {
            let (stripe, at) = (&self.stripes[place.stripe()], place.at());
            rows.ids.push(id);
            rows.w.extend_from_slice(self.row(place));
            rows.n.extend_from_slice(&stripe.accumulators[at / CHUNK][at % CHUNK * width..][..width]);
            rows.touched.push(stripe.heads[at].touched);
        }
        rows
    }

    /// The table that holds `rows`. Refuses columns of unequal length, ids that are 0 or not strictly ascending, and
    /// numbers that no training gives.
    pub fn from_rows(rules: Rules, rows: &Rows) -> Result<Self, Error> {
        let refuse = |what: String| Err(Error::State { part: "embedding rows", what });
        let (count, dim, width) = (rows.ids.len(), rules.dim, rules.accumulators());
        if [rows.w.len(), rows.n.len(), rows.touched.len()] != [count * dim, count * width, count] {
            return refuse(format!("columns of the wrong length beside {count} ids of {dim} weights"));
        }
        let mut table = Self::new(rules);
        for stripe in &mut table.stripes {
            stripe.index = Index::with_room(count / STRIPES);
        }
        let mut before = 0;
        for (i, &id) in rows.ids.iter().enumerate() {
            if id <= before {
                return refuse(format!("id {id:016x} at row {i} is not above the one before, {before:016x}"));
            }
            before = id;
            let (w, n) = (&rows.w[i * dim..][..dim], &rows.n[i * width..][..width]);
            if w.iter().any(|w| !w.is_finite()) || n.iter().any(|n| !(n.is_finite() && *n >= 0.0)) {
                return refuse(format!("row {id:016x} holds weights {w:?}, accumulators {n:?}"));
            }
            let stripe = &mut table.stripes[stripe_of(id)];
            let at = stripe.insert(&rules, id) as usize;
            stripe.row_mut(dim, at).copy_from_slice(w);
            stripe.accumulators_mut(width, at).copy_from_slice(n);
            stripe.heads[at].touched = rows.touched[i];
        }
        Ok(table)
    }
}

impl Aged for Embeddings {
    fn len(&self) -> usize {
        self.len()
    }

    /// Every [`Place`] is void. Takes a walk over the table.
    fn retain(&mut self, keep: impl Fn(u64, u32) -> bool) -> u64 {
        self.stripes.iter_mut().map(|stripe| stripe.retain(&self.rules, &keep)).sum()
    }

    fn by_age(&self, count: usize) -> Option<(u32, u64)> {
        let heads = self.stripes.iter().flat_map(|stripe| &stripe.heads);
        let mut ages: Vec<(u32, u64)> = heads.map(|head| (head.touched, head.id)).collect();
        (count < ages.len()).then(|| *ages.select_nth_unstable(count).1)
    }
}

/// One stripe of a table, open for a batch's update.
pub struct Update<'a> {
    /// Of the stripe.
    pub number: usize,
    rules: &'a Rules,
    stripe: &'a mut Stripe,
}

impl Update<'_> {
    /// Learns from a batch: `shards` gives, in order, the occurrences that fall to this stripe, in the order of their
    /// examples, with the gradients of both towers' pooled inputs and their widths. `rested` brings an accumulator that was
    /// last touched in the given batch to now.
    pub fn run<'a>(
        &mut self,
        batch: u32,
        shards: impl Iterator<Item = (&'a [Occurrence], [&'a [f32]; 2], [usize; 2])>,
        rested: &(impl Fn(f64, u32) -> f64 + ?Sized),
    ) {
        self.stripe.update(self.rules, batch, shards, rested);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use std::collections::HashMap;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    fn rules(rule: RowRule) -> Rules {
        Rules { dim: 3, rule, rate: 0.1, n0: 0.01, clip: 2.0, initial: 0.05, seed: 9 }
    }

    fn id(i: u32) -> u64 {
        xxh3_64(&i.to_le_bytes()).max(1)
    }

    /// (row, example, value)
    type Drawn = (u32, u32, f32);
    const EXAMPLES: usize = 4;

    fn learn(table: &mut Embeddings, batch: u32, drawn: &[Drawn], input: &[f32]) {
        let occurrences: Vec<Occurrence> = drawn
            .iter()
            .map(|&(row, example, value)| {
                let id = id(row);
                Occurrence { id, place: table.find(id), example, column: 0, tower: 0, value }
            })
            .collect();
        for mut stripe in table.stripes() {
            let mine: Vec<Occurrence> =
                occurrences.iter().copied().filter(|o| stripe_of(o.id) == stripe.number).collect();
            // Cut anywhere: shards are summed one after the other.
            let (a, b) = mine.split_at(mine.len() / 3);
            stripe.run(batch, [a, b].into_iter().map(|mine| (mine, [input, &[][..]], [3, 0])), &|n, _| n);
        }
    }

    proptest! {
        #[test]
        fn a_sparse_step_equals_a_dense_step_with_duplicates_summed_in_example_order(
            batches in prop::collection::vec((prop::collection::vec((0u32..300, 0..EXAMPLES as u32, -2.0f32..2.0), 0..120),
                prop::collection::vec(-3.0f32..3.0, 3 * EXAMPLES)), 1..6),
            rule in prop_oneof![Just(RowRule::RowWise), Just(RowRule::ElementWise)],
        ) {
            let rules = rules(rule);
            let mut table = Embeddings::new(rules);
            // Dense: every row there is, a gradient for each, those of no occurrence left where they are.
            let mut dense: HashMap<u64, (Vec<f32>, Vec<f32>, u32)> = HashMap::new();
            for (number, (drawn, input)) in batches.iter().enumerate() {
                let batch = number as u32 + 1;
                let mut gradients: HashMap<u64, [f32; 3]> = HashMap::new();
                for &(row, example, value) in drawn {
                    let sum = gradients.entry(id(row)).or_default();
                    for (sum, d) in sum.iter_mut().zip(&input[example as usize * 3..]) {
                        *sum += value * d;
                    }
                }
                for (&id, gradient) in &gradients {
                    let (w, n, touched) = dense.entry(id).or_insert_with(|| {
                        let mut w = vec![0.0; 3];
                        rules.begin(id, &mut w);
                        (w, vec![0.0; rules.accumulators()], 0)
                    });
                    let long = length(gradient);
                    let share = if long > 2.0 { (2.0 / long) as f32 } else { 1.0 };
                    if rule == RowRule::RowWise {
                        n[0] += share * share * gradient.iter().fold(0.0f32, |sum, g| sum + g * g) / 3.0;
                        let step = rules.rate * share / (rules.n0 + n[0]).sqrt();
                        w.iter_mut().zip(gradient).for_each(|(w, g)| *w -= step * g);
                    } else {
                        for ((w, n), g) in w.iter_mut().zip(n).zip(gradient) {
                            *n += (share * g) * (share * g);
                            *w -= rules.rate * (share * g) / (rules.n0 + *n).sqrt();
                        }
                    }
                    *touched = batch;
                }
                learn(&mut table, batch, drawn, input);
            }
            let rows = table.rows();
            let mut expected: Vec<_> = dense.into_iter().collect();
            expected.sort_by_key(|row| row.0);
            prop_assert_eq!(&rows.ids, &expected.iter().map(|row| row.0).collect::<Vec<_>>());
            for (i, (_, (w, n, touched))) in expected.iter().enumerate() {
                prop_assert_eq!(&rows.w[i * 3..][..3], &w[..]);
                prop_assert_eq!(&rows.n[i * n.len()..][..n.len()], &n[..]);
                prop_assert_eq!(rows.touched[i], *touched);
            }
            let again = Embeddings::from_rows(rules, &rows).unwrap();
            prop_assert_eq!(again.rows(), rows);
        }
    }

    #[test]
    fn rows_that_no_example_names_do_not_move() {
        let mut table = Embeddings::new(rules(RowRule::RowWise));
        learn(&mut table, 1, &[(1, 0, 1.0), (2, 1, 1.0), (3, 0, 1.0)], &[1.0; 12]);
        let before = table.rows();
        learn(&mut table, 7, &[(2, 1, 1.0), (2, 0, 0.5)], &[1.0; 12]);
        let after = table.rows();
        for (i, &row) in after.ids.iter().enumerate() {
            let moved = before.w[i * 3..][..3] != after.w[i * 3..][..3];
            assert_eq!((moved, after.touched[i] == 7), (row == id(2), row == id(2)));
        }
    }

    #[test]
    fn a_row_begins_with_the_same_weights_whenever_it_comes() {
        let rules = Rules { dim: 16, ..rules(RowRule::RowWise) };
        let (mut one, mut two) = (Embeddings::new(rules), Embeddings::new(rules));
        (0..9000).for_each(|i| _ = one.find_or_insert(id(i)));
        (0..9000).rev().for_each(|i| _ = two.find_or_insert(id(i)));
        assert_eq!(one.rows(), two.rows());
        let w = one.rows().w;
        let mean = w.iter().map(|&w| f64::from(w)).sum::<f64>() / w.len() as f64;
        let spread = w.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / w.len() as f64;
        assert!(mean.abs() < 1e-3 && (spread - 0.05 * 0.05 / 3.0).abs() < 2e-5, "{mean} {spread}");
        assert!(w.iter().all(|w| w.abs() <= 0.05));
    }

    proptest! {
        #[test]
        fn what_is_left_after_removal_is_a_table_that_goes_on_as_one_that_never_held_the_rest(
            steps in prop::collection::vec((prop::collection::vec((0u32..20_000, 0..EXAMPLES as u32, -1.0f32..1.0), 0..400), 0u64..5), 1..8),
            many in 0u32..12_000,
        ) {
            let rules = rules(RowRule::ElementWise);
            let mut table = Embeddings::new(rules);
            // Several chunks a stripe.
            (0..many).for_each(|i| _ = table.find_or_insert(id(50_000 + i)));
            for (number, (drawn, part)) in steps.iter().enumerate() {
                learn(&mut table, number as u32 + 1, drawn, &[1.0; 12]);
                let before = table.rows();
                let keep = |id: u64| id % 5 != *part;
                let removed = table.retain(|id, _| keep(id));
                let mut kept = Rows::default();
                for (i, &id) in before.ids.iter().enumerate().filter(|(_, id)| keep(**id)) {
                    kept.ids.push(id);
                    kept.w.extend_from_slice(&before.w[i * 3..][..3]);
                    kept.n.extend_from_slice(&before.n[i * 3..][..3]);
                    kept.touched.push(before.touched[i]);
                }
                prop_assert_eq!(removed as usize, before.ids.len() - kept.ids.len());
                prop_assert_eq!(&table.rows(), &kept);
                for &id in &before.ids {
                    prop_assert_eq!(table.find(id) != Place::NONE, keep(id));
                }
                // Rows that come back begin anew.
                let mut other = Embeddings::from_rows(rules, &kept).unwrap();
                learn(&mut table, number as u32 + 1, drawn, &[1.0; 12]);
                learn(&mut other, number as u32 + 1, drawn, &[1.0; 12]);
                prop_assert_eq!(table.rows(), other.rows());
            }
        }
    }

    #[test]
    fn a_damaged_column_is_refused_with_its_row() {
        let mut table = Embeddings::new(rules(RowRule::RowWise));
        learn(&mut table, 1, &[(1, 0, 1.0), (2, 1, 1.0)], &[1.0; 12]);
        let good = table.rows();
        let refused = |change: fn(&mut Rows)| {
            let mut rows = good.clone();
            change(&mut rows);
            let refused = Embeddings::from_rows(*table.rules(), &rows).err();
            refused.map(|error| error.to_string()).unwrap_or_default()
        };
        assert!(refused(|rows| rows.w[1] = f32::NAN).contains("NaN"));
        assert!(refused(|rows| rows.n[0] = -1.0).contains("accumulators [-1.0]"));
        assert!(refused(|rows| rows.ids[0] = 0).contains("at row 0 is not above"));
        assert!(refused(|rows| _ = rows.touched.pop()).contains("wrong length"));
    }
}
