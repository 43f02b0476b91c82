//! Logistic regression with a rate per coordinate, learned example by example in order.
//!
//! The rule is FTRL-Proximal (McMahan et al., *Ad Click Prediction: a View from the Trenches*, KDD 2013) with n0 added
//! under the root. While `l1 = 0` it needs no `z` and reads, with `g` the gradient of one coordinate:
//!
//! ```text
//! n += g^2;   w -= g / ((b + sqrt(n0 + n)) / a + l2)
//! ```
//!
//! which with `b = l2 = 0` is AdaGrad (Duchi et al., JMLR 2011). With `l1 > 0` every row also holds `z`, and a row that
//! comes without (warm start, decay) gets the `z` that leaves its `w` where it is.
//!
//! `logit = sum over slots, in their order, of w[row] * value, then + intercept`, all in f32. A batch is only a number for
//! `touched` and a moment for decay: learning does not see where batches, or the blocks below, begin and end.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::Error;
use super::admission::{self, Gate};
use super::changes::{Changes, Part};
use super::decay::Decay;
pub use super::decay::DecaySettings;
use super::table::{At, Row, Rows, Table};
use crate::event::{Example, Slot, Time};

/// Largest |value| of a slot and largest weight of an example; what lies beyond is quarantined. With it no update
/// overflows: a gradient is at most 1e12, its square 1e24, and a step of the rule is never longer than `a` (+ l1's part).
const LARGEST: f32 = 1e6;
/// Largest offset of down-sampling: one negative kept in e^64.
const LARGEST_OFFSET: f32 = 64.0;
/// Examples looked up ahead of the arithmetic. Invisible in the result.
const BLOCK: usize = 16;

/// How a row changes with an example.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Rule {
    /// Per-coordinate AdaGrad, which is FTRL-Proximal where l1 or l2 is set.
    #[default]
    Adagrad,
    /// Adds exactly 1 to the weight of each row of an example, and to the intercept; every logit is 0. Shows that every
    /// example was applied exactly once.
    Count,
}

/// `[model.logistic]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// `adagrad` or `count`. Default `adagrad`.
    pub rule: Rule,
    /// Learning rate: no step is longer. `0 < a <= 10`. Default: 0.4 over the root of the number of features and crosses,
    /// since all of an example's rows step together: 0.06 with 46 of them, 0.11 with 13. One rule was best, or level with
    /// the best, on all sets that we measured (`scripts/quality.py`).
    pub a: Option<f32>,
    /// Added to the root of the accumulator; larger: slower starts. `>= 0`. Default 0.
    pub b: f32,
    /// Added to the accumulator under the root; keeps the first steps of a row short. `>= 0`. Default 0.2.
    pub n0: f32,
    /// Pull to exactly 0, in summed gradient. `>= 0`. Default 0. Costs 4 bytes a row (`z`); the intercept is exempt.
    pub l1: f32,
    /// Pull towards 0. `>= 0`. Default 0. The intercept is exempt.
    pub l2: f32,
    /// Click-through rate to start from, between 0 and 1, both exclusive: the intercept starts at its logit. Without it
    /// 0.5, so an intercept of 0, and the first few thousand examples pay for finding the level.
    pub prior_ctr: Option<f64>,
    /// Forgetting of the accumulators, so that rates do not die in a job that runs for months. Default: none.
    pub decay: Option<DecaySettings>,
    /// Which ids have a weight of their own.
    pub table: admission::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rule: Rule::Adagrad,
            a: None,
            b: 0.0,
            n0: 0.2,
            l1: 0.0,
            l2: 0.0,
            prior_ctr: None,
            decay: None,
            table: admission::Settings::default(),
        }
    }
}

impl Settings {
    /// The learning rate under a schema of so many features and crosses.
    #[must_use]
    pub fn rate(&self, features: usize) -> f32 {
        self.a.unwrap_or_else(|| 0.4 / (features.max(1) as f32).sqrt())
    }

    /// The checked form, which alone can make a model, under a schema of so many features and crosses. `seed` decides what is
    /// left to chance.
    pub fn check(&self, features: usize, seed: u64) -> Result<Checked, Error> {
        fn must(holds: bool, key: &'static str, expected: &'static str, got: impl ToString) -> Result<(), Error> {
            if holds { Ok(()) } else { Err(Error::Setting { key, expected, got: got.to_string() }) }
        }
        let &Self { rule, b, n0, l1, l2, prior_ctr, ref decay, .. } = self;
        let a = self.rate(features);
        must(a > 0.0 && a <= 10.0, "logistic.a", "above 0 and at most 10", a)?;
        for (key, value) in [("logistic.b", b), ("logistic.n0", n0), ("logistic.l1", l1), ("logistic.l2", l2)] {
            must((0.0..=1e6).contains(&value), key, "between 0 and 1e6", value)?;
        }
        let c = b + a * l2;
        must(
            c + n0.sqrt() >= 1e-6,
            "logistic.n0",
            "above 1e-12 where b and l2 are 0: the first step would divide by 0",
            n0,
        )?;
        let ctr = prior_ctr.unwrap_or(0.5);
        must(ctr > 0.0 && ctr < 1.0, "logistic.prior_ctr", "between 0 and 1, both exclusive", ctr)?;
        let keys = ["logistic.decay.per", "logistic.decay.keep", "logistic.decay.floor"];
        let decay = decay.as_ref().map(|decay| decay.check(keys)).transpose()?;
        let keys = admission::Keys {
            admit: "logistic.table.admit",
            occurrences: "logistic.table.count.occurrences",
            bytes: "logistic.table.count.bytes",
            per: "logistic.table.count.per",
            expire_after: "logistic.table.expire_after",
            capacity: "logistic.table.capacity",
        };
        let gate = self.table.check(&keys, seed)?;
        Ok(Checked { rule, a, b, n0, l1, c, start: libm::log(ctr / (1.0 - ctr)), decay, gate })
    }
}

/// Settings that were found good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Checked {
    rule: Rule,
    a: f32,
    b: f32,
    n0: f32,
    l1: f32,
    /// `b + a * l2`: the rule is computed as `w -= a * g / (sqrt(n0 + n) + c)`.
    c: f32,
    /// Where the intercept starts.
    start: f64,
    decay: Option<Decay>,
    gate: admission::Rules,
}

impl Checked {
    /// The `z` of a weight: zero gradient leaves `w` where it is.
    fn z_of(&self, w: f32, n: f32) -> f32 {
        if w == 0.0 { 0.0 } else { -w * ((self.n0 + n).sqrt() + self.c) / self.a - self.l1.copysign(w) }
    }
}

/// What the model said to one example, before it learned from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Outcome {
    /// Without the offset of down-sampling. 0 if quarantined, and under [`Rule::Count`].
    pub logit: f32,
    /// `exp(-|logit|)`, which sigmoid and logloss share.
    pub e: f32,
    /// Of its loss by its logit, weight included; 0 if quarantined.
    pub gradient: f32,
    /// The example was not finite or out of bounds; it changed nothing.
    pub quarantined: bool,
}

/// How often a feature's value was missing, or had no row when the example came. Quarantined examples do not count.
#[derive(Clone, Default, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeatureCounts {
    pub examples: u64,
    /// Slots flagged [`Slot::MISSING`], by feature.
    pub missing: Vec<u64>,
    /// Slots whose id had no row at that moment, by feature.
    pub unseen: Vec<u64>,
}

/// The bias: an ordinary row, kept apart, in f64, because its steps become shorter than the spacing of f32 near -4 after
/// some 1e8 examples, first those of the negatives. Logits use its f32 rounding.
#[derive(Clone, Copy, Default, Debug, PartialEq, Serialize, Deserialize)]
pub struct Intercept {
    pub w: f64,
    pub n: f64,
    pub touched: u32,
}

/// What a checkpoint holds of the model: all that learning depends on.
#[derive(Clone, Default, Debug, PartialEq)]
pub struct State {
    pub rows: Rows,
    pub intercept: Intercept,
    /// (number of its first batch, event-time period), both ascending: in which period a `touched` lies. Empty without decay.
    pub periods: Vec<(u32, i64)>,
    pub counts: FeatureCounts,
    /// What decides which ids have a row.
    pub admission: admission::State,
}

impl State {
    /// The state of a model that starts from published weights: accumulators 0, nothing counted, no row touched yet.
    #[must_use]
    pub fn warm(weights: Weights) -> Self {
        let zeros = vec![0.0; weights.ids.len()];
        let touched = vec![0; weights.ids.len()];
        let intercept = Intercept { w: f64::from(weights.intercept), ..Intercept::default() };
        let rows = Rows { ids: weights.ids, w: weights.w, n: zeros, z: None, touched };
        Self { rows, intercept, ..Self::default() }
    }

    /// xxh3-128 over parameters and optimizer (not the counts), little-endian, each column led by its length.
    #[must_use]
    pub fn digest(&self) -> u128 {
        let mut hash = Xxh3::new();
        let rows = &self.rows;
        hash.update(b"tidemill logistic 1");
        column(&mut hash, rows.ids.len(), rows.ids.iter().map(|id| id.to_le_bytes()));
        column(&mut hash, rows.w.len(), rows.w.iter().map(|w| w.to_le_bytes()));
        column(&mut hash, rows.n.len(), rows.n.iter().map(|n| n.to_le_bytes()));
        let z = rows.z.as_deref().unwrap_or_default();
        column(&mut hash, z.len(), z.iter().map(|z| z.to_le_bytes()));
        column(&mut hash, rows.touched.len(), rows.touched.iter().map(|touched| touched.to_le_bytes()));
        self.add_beside_to(&mut hash);
        hash.digest128()
    }

    /// Takes all but the rows into a digest.
    pub(super) fn add_beside_to(&self, hash: &mut Xxh3) {
        hash.update(&self.intercept.w.to_le_bytes());
        hash.update(&self.intercept.n.to_le_bytes());
        hash.update(&self.intercept.touched.to_le_bytes());
        let periods =
            self.periods.iter().map(|&(batch, period)| ((period as u128) << 32 | u128::from(batch)).to_le_bytes());
        column(hash, self.periods.len(), periods);
        self.admission.add_to(hash);
    }
}

/// Takes a column into a digest, led by its length.
pub(super) fn column<const N: usize>(hash: &mut Xxh3, len: usize, words: impl Iterator<Item = [u8; N]>) {
    hash.update(&(len as u64).to_le_bytes());
    let mut buffer = Vec::with_capacity(1 << 16);
    for word in words {
        buffer.extend_from_slice(&word);
        if buffer.len() >= (1 << 16) - N {
            hash.update(&buffer);
            buffer.clear();
        }
    }
    hash.update(&buffer);
}

/// What a snapshot holds: ids strictly ascending, their weights, and the bias.
#[derive(Clone, Default, Debug, PartialEq)]
pub struct Weights {
    pub ids: Vec<u64>,
    pub w: Vec<f32>,
    pub intercept: f32,
}

/// A copy of the model at a batch boundary, for another thread to sort and write.
pub struct Image {
    table: Part<Table, Rows>,
    intercept: Intercept,
    periods: Vec<(u32, i64)>,
    counts: FeatureCounts,
    admission: admission::State,
}

impl Image {
    /// Does the work that the copy left undone: canonical order.
    #[must_use]
    pub fn sorted(&self) -> State {
        State {
            rows: self.table.rows(Table::rows),
            intercept: self.intercept,
            periods: self.periods.clone(),
            counts: self.counts.clone(),
            admission: self.admission.clone(),
        }
    }

    /// Ids that went since the batch behind which it holds what changed; none where it holds all.
    pub(super) fn removed(&self) -> &[u64] {
        self.table.removed()
    }
}

/// What one slot adds to a logit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contribution {
    pub feature: u16,
    pub row: u64,
    pub value: f32,
    /// Weight times value; the weight is that of the feature's default row where `known` is false.
    pub logit: f32,
    /// The id has a row of its own.
    pub known: bool,
}

/// The model: a table, an intercept, and for each feature the id of the row that answers for ids without one.
pub struct Logistic {
    rule: Checked,
    table: Table,
    intercept: Intercept,
    default_rows: Vec<u64>,
    /// Where the default rows lie; [`At::NONE`] while unknown. Void when the table grows.
    defaults_at: Vec<At>,
    periods: Vec<(u32, i64)>,
    counts: FeatureCounts,
    /// Number of the newest batch.
    batch: u32,
    /// First batch of the current period of decay; 0 without decay, and then no row is older.
    since: u32,
    gate: Gate,
    /// Where the rows of the current block's slots lie; kept for its memory.
    found: Vec<At>,
}

impl Logistic {
    /// A model that knows nothing. `default_rows` holds the row id of each feature's default row, by feature index.
    #[must_use]
    pub fn new(rule: Checked, default_rows: Vec<u64>) -> Self {
        let state = State { intercept: Intercept { w: rule.start, ..Intercept::default() }, ..State::default() };
        let gate = Gate::new(rule.gate, admission::State::default(), "logistic table").expect("nothing to refuse");
        Self::with_table(rule, default_rows, Table::new(rule.l1 > 0.0), gate, state)
    }

    /// The model that goes on from `state`. Where l1 > 0 and the state has no `z`, it is derived such that no weight moves.
    pub fn from_state(rule: Checked, default_rows: Vec<u64>, mut state: State) -> Result<Self, Error> {
        let refuse = |part, what| Err(Error::State { part, what });
        let Intercept { w, n, .. } = state.intercept;
        if !(w.is_finite() && n.is_finite() && n >= 0.0) {
            return refuse("intercept", format!("w {w}, n {n}"));
        }
        if !state.periods.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) {
            return refuse("decay periods", "not ascending".to_owned());
        }
        let features = default_rows.len();
        for counts in [&mut state.counts.missing, &mut state.counts.unseen] {
            if counts.is_empty() {
                counts.resize(features, 0);
            }
            if counts.len() != features {
                return refuse("feature counts", format!("{} features where the schema has {features}", counts.len()));
            }
        }
        if rule.l1 == 0.0 {
            state.rows.z = None;
        } else if state.rows.z.is_none() {
            state.rows.z = Some(state.rows.w.iter().zip(&state.rows.n).map(|(&w, &n)| rule.z_of(w, n)).collect());
        }
        let table = Table::from_rows(&state.rows)?;
        let gate = Gate::new(rule.gate, std::mem::take(&mut state.admission), "logistic table")?;
        Ok(Self::with_table(rule, default_rows, table, gate, state))
    }

    fn with_table(rule: Checked, default_rows: Vec<u64>, table: Table, gate: Gate, state: State) -> Self {
        let mut counts = state.counts;
        counts.missing.resize(default_rows.len(), 0);
        counts.unseen.resize(default_rows.len(), 0);
        let batch = state.rows.touched.iter().copied().fold(state.intercept.touched, u32::max);
        Self {
            rule,
            table,
            intercept: state.intercept,
            defaults_at: vec![At::NONE; default_rows.len()],
            default_rows,
            periods: state.periods,
            counts,
            batch,
            since: 0,
            gate,
            found: Vec::new(),
        }
    }

    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.table.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// The sum of all ids; see [`table::Table::id_sum`](super::table::Table::id_sum).
    #[must_use]
    pub fn id_sum(&self) -> u64 {
        self.table.id_sum()
    }

    /// Memory of the table, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.table.bytes() + self.gate.bytes()
    }

    /// What became of ids.
    #[must_use]
    pub fn ids(&self) -> admission::Counts {
        self.gate.state.counts
    }

    #[must_use]
    pub fn counts(&self) -> &FeatureCounts {
        &self.counts
    }

    /// The bias as logits use it.
    #[must_use]
    pub fn intercept(&self) -> f32 {
        self.intercept.w as f32
    }

    /// Scores and learns the examples of batch number `batch` one after the other, and leaves one outcome for each in
    /// `outcomes`. `time` is the batch's place in event time, for decay.
    ///
    /// An id without a row adds its feature's default row to the logit; afterwards that row learns, and the id, if it is
    /// admitted, gets a row of zeros, which learns too. A row that an example names twice learns twice, from the one logit.
    /// Behind the batch, rows that are too old or too many go.
    ///
    /// # Panics
    /// If `batch` is 0 (kept for rows never touched) or less than the one before.
    pub fn learn(&mut self, batch: u32, time: Time, examples: &[Example<'_>], outcomes: &mut Vec<Outcome>) {
        self.learn_in_blocks(batch, time, examples, &[], outcomes, BLOCK);
    }

    /// The same where another part of a model adds to each logit: `offsets` holds one for each example. One that is not
    /// finite quarantines its example.
    pub fn learn_beside(
        &mut self,
        batch: u32,
        time: Time,
        examples: &[Example<'_>],
        offsets: &[f32],
        outcomes: &mut Vec<Outcome>,
    ) {
        assert_eq!(examples.len(), offsets.len(), "an offset for each example");
        self.learn_in_blocks(batch, time, examples, offsets, outcomes, BLOCK);
    }

    fn learn_in_blocks(
        &mut self,
        batch: u32,
        time: Time,
        examples: &[Example<'_>],
        offsets: &[f32],
        outcomes: &mut Vec<Outcome>,
        block: usize,
    ) {
        assert!(batch > 0 && batch >= self.batch, "batch {batch} cannot come after batch {}", self.batch);
        self.batch = batch;
        outcomes.clear();
        if let Some(decay) = self.rule.decay {
            self.since = decay.enter(&mut self.periods, batch, time);
        }
        self.gate.enter(time);
        match (self.rule.rule, self.rule.l1 > 0.0) {
            (Rule::Adagrad, false) => self.walk::<ADAGRAD>(examples, offsets, outcomes, block),
            (Rule::Adagrad, true) => self.walk::<FTRL>(examples, offsets, outcomes, block),
            (Rule::Count, _) => self.walk::<COUNT>(examples, offsets, outcomes, block),
        }
        if self.gate.tidy(&mut self.table, &self.default_rows, batch, time) {
            self.defaults_at.fill(At::NONE);
        }
    }

    /// Three passes over each block of examples: ask the memory for its lines (one block ahead), find its rows, then
    /// compute in order. Only the last one writes, so an id that is new in a block is looked up again there.
    fn walk<const KERNEL: u8>(
        &mut self,
        examples: &[Example<'_>],
        offsets: &[f32],
        outcomes: &mut Vec<Outcome>,
        block: usize,
    ) {
        let mut found = std::mem::take(&mut self.found);
        let mut blocks = examples.chunks(block).peekable();
        blocks.peek().into_iter().for_each(|block| self.prefetch(*block));
        while let Some(block) = blocks.next() {
            let slots = block.iter().map(|example| example.slots.len()).sum::<usize>();
            // Each slot can bring its own row, each feature its default row.
            if self.table.reserve(slots + self.default_rows.len()) {
                self.defaults_at.fill(At::NONE);
            }
            found.resize(slots, At::NONE);
            let mut rest = found.as_mut_slice();
            for example in block {
                let (mine, others) = rest.split_at_mut(example.slots.len());
                rest = others;
                self.table.find_all(example.slots, mine);
            }

            // The requests for the block ahead are spread over the arithmetic of this one: the memory takes some twenty
            // at a time, and a burst of more stands still.
            let mut ahead = blocks.peek().copied().unwrap_or_default().iter();
            let mut rest = found.as_mut_slice();
            for example in block {
                self.prefetch(ahead.next());
                let (mine, others) = rest.split_at_mut(example.slots.len());
                rest = others;
                let offset = offsets.get(outcomes.len()).copied().unwrap_or(0.0);
                outcomes.push(self.one::<KERNEL>(example, offset, mine));
            }
        }
        self.found = found;
    }

    #[inline(always)]
    fn prefetch<'a>(&self, examples: impl IntoIterator<Item = &'a Example<'a>>) {
        for example in examples {
            for slot in example.slots {
                self.table.prefetch(slot.row);
            }
        }
    }

    /// Scores one example, then learns from it.
    #[inline]
    fn one<const KERNEL: u8>(&mut self, example: &Example<'_>, beside: f32, found: &mut [At]) -> Outcome {
        let slots = example.slots;
        let unseen = found.contains(&At::NONE) && self.find_again(slots, found);
        let mut seen = Seen { largest: 0, lowest: u64::MAX, flags: 0 };
        let mut sum = 0.0;
        if unseen {
            slots.iter().for_each(|slot| seen.take(slot));
            sum = self.sum_with_defaults(slots, found);
        } else {
            let open = self.table.open();
            for (slot, &at) in slots.iter().zip(&*found) {
                seen.take(slot);
                sum += open.w(at) * slot.value;
            }
        }
        let logit = if KERNEL == COUNT { 0.0 } else { sum + self.intercept() + beside };
        let Example { weight, sampling_offset: offset, .. } = *example;
        let fit = seen.largest <= LARGEST.to_bits() && seen.lowest > 0 && logit.is_finite();
        if !(fit && weight > 0.0 && weight <= LARGEST && offset.abs() <= LARGEST_OFFSET) {
            return Outcome { logit: 0.0, e: 1.0, gradient: 0.0, quarantined: true };
        }
        let e = libm::expf(-logit.abs());
        let x = logit + offset;
        let p = if offset == 0.0 { sigmoid(logit, e) } else { sigmoid(x, libm::expf(-x.abs())) };
        let d = (p - f32::from(u8::from(example.positive))) * weight;

        self.counts.examples += 1;
        if seen.flags & Slot::MISSING != 0 {
            for slot in slots.iter().filter(|slot| slot.flags & Slot::MISSING != 0) {
                self.counts.missing[usize::from(slot.feature)] += 1;
            }
        }
        if KERNEL == ADAGRAD && !unseen {
            self.step_all(slots, found, d);
        } else {
            for (slot, &at) in slots.iter().zip(&*found) {
                let g = d * slot.value;
                if at == At::NONE {
                    self.learn_new::<KERNEL>(slot, g, example.id);
                } else {
                    self.step::<KERNEL>(at, g);
                }
            }
        }
        self.step_intercept::<KERNEL>(f64::from(d));
        Outcome { logit, e, gradient: d, quarantined: false }
    }

    /// [`Logistic::step`] for every slot under [`ADAGRAD`], with the roots and quotients of eight rows side by side. A step
    /// depends on the accumulator alone, not on the weight, so a row that comes twice still gets what it gets one by one.
    #[inline(always)]
    fn step_all(&mut self, slots: &[Slot], found: &[At], d: f32) {
        const WIDTH: usize = 8;
        let Checked { a, n0, c, .. } = self.rule;
        let (batch, since) = (self.batch, self.since);
        if self.table.log.is_on() {
            self.log_touches(found);
        }
        if since > 0 {
            self.decay_rows(found);
        }
        let mut open = self.table.open();
        let (mut g, mut n) = ([0.0f32; WIDTH], [1.0f32; WIDTH]);
        for (slots, found) in slots.chunks(WIDTH).zip(found.chunks(WIDTH)) {
            for (((slot, &at), g), n) in slots.iter().zip(found).zip(&mut g).zip(&mut n) {
                *g = d * slot.value;
                *n = open.accumulate(at, *g * *g, batch);
            }
            for (g, n) in g.iter_mut().zip(&n) {
                *g = a * *g / ((n0 + n).sqrt() + c);
            }
            for (&at, step) in found.iter().zip(&g) {
                open.set_w(at, open.w(at) - step);
            }
        }
    }

    /// Looks up again what had no row when the block was looked up: an example before may have brought it. Returns
    /// whether some still have none.
    #[cold]
    fn find_again(&self, slots: &[Slot], found: &mut [At]) -> bool {
        for (slot, at) in slots.iter().zip(&mut *found).filter(|(_, at)| **at == At::NONE) {
            *at = self.table.find(slot.row);
        }
        found.contains(&At::NONE)
    }

    /// The sum over the slots, where an id without a row counts as its feature's default row.
    #[cold]
    fn sum_with_defaults(&mut self, slots: &[Slot], found: &[At]) -> f32 {
        let mut sum = 0.0;
        for (slot, &at) in slots.iter().zip(found) {
            let at = if at == At::NONE { self.default_at(slot.feature) } else { at };
            sum += if at == At::NONE { 0.0 } else { self.table.w(at) } * slot.value;
        }
        sum
    }

    fn default_at(&mut self, feature: u16) -> At {
        let feature = usize::from(feature);
        if self.defaults_at[feature] == At::NONE {
            self.defaults_at[feature] = self.table.find(self.default_rows[feature]);
        }
        self.defaults_at[feature]
    }

    /// The default row learns for an id without a row; the id gets its row, if it is admitted, which learns too.
    #[cold]
    fn learn_new<const KERNEL: u8>(&mut self, slot: &Slot, g: f32, impression: u64) {
        let feature = usize::from(slot.feature);
        self.counts.unseen[feature] += 1;
        if self.defaults_at[feature] == At::NONE {
            self.defaults_at[feature] = self.table.find_or_insert(self.default_rows[feature]);
        }
        self.step::<KERNEL>(self.defaults_at[feature], g);
        // The example may name it twice.
        let mut at = self.table.find(slot.row);
        if at == At::NONE {
            if !self.gate.admits(slot.row, impression) {
                return;
            }
            at = self.table.insert(slot.row);
        }
        self.step::<KERNEL>(at, g);
    }

    /// One step of one row against the gradient `g`.
    #[inline(always)]
    fn step<const KERNEL: u8>(&mut self, at: At, g: f32) {
        let Checked { a, n0, l1, c, .. } = self.rule;
        self.table.log_touch(at);
        if KERNEL != COUNT {
            self.decay_row::<KERNEL>(at);
        }
        let Row { w, n: before, .. } = self.table.row(at);
        let n = if KERNEL == COUNT { before } else { before + g * g };
        let root = (n0 + n).sqrt();
        let w = match KERNEL {
            COUNT => w + 1.0,
            FTRL => {
                let z = self.table.z(at);
                *z += g - (root - (n0 + before).sqrt()) / a * w;
                if z.abs() <= l1 { 0.0 } else { a * (l1.copysign(*z) - *z) / (root + c) }
            }
            _ => w - a * g / (root + c),
        };
        self.table.set(at, Row { w, n, touched: self.batch });
    }

    /// The intercept's step: the same rule without l1 and l2.
    #[inline(always)]
    fn step_intercept<const KERNEL: u8>(&mut self, g: f64) {
        let Intercept { w, n, touched } = self.intercept;
        let n = if touched < self.since { self.decayed(n, touched) } else { n };
        let n = if KERNEL == COUNT { n } else { n + g * g };
        let Checked { a, b, n0, .. } = self.rule;
        let step = if KERNEL == COUNT { -1.0 } else { f64::from(a) * g / ((f64::from(n0) + n).sqrt() + f64::from(b)) };
        self.intercept = Intercept { w: w - step, n, touched: self.batch };
    }

    /// Brings the accumulator of a row last touched in an earlier period to the current one. Where it has a `z` and
    /// a weight, the `z` is derived anew; a weight that l1 holds at 0 stays there with the `z` that it has.
    #[inline(always)]
    fn decay_row<const KERNEL: u8>(&mut self, at: At) {
        let row = self.table.row(at);
        if row.touched < self.since {
            let n = self.decayed(f64::from(row.n), row.touched) as f32;
            if KERNEL == FTRL && row.w != 0.0 && n != row.n {
                *self.table.z(at) = self.rule.z_of(row.w, n);
            }
            self.table.set(at, Row { n, touched: self.batch, ..row });
        }
    }

    #[inline(never)]
    fn log_touches(&mut self, found: &[At]) {
        found.iter().for_each(|&at| self.table.log_touch(at));
    }

    #[inline(never)]
    fn decay_rows(&mut self, found: &[At]) {
        for &at in found {
            self.decay_row::<ADAGRAD>(at);
        }
    }

    #[cold]
    fn decayed(&self, n: f64, touched: u32) -> f64 {
        self.rule.decay.map_or(n, |decay| decay.rested(&self.periods, self.batch, touched, n))
    }

    /// The logit of an example with these slots. An id without a row counts as its feature's default row, and as 0
    /// where that has none either.
    #[must_use]
    pub fn score(&self, slots: &[Slot]) -> f32 {
        slots.iter().fold(0.0, |sum, slot| sum + self.weight_of(slot).0 * slot.value) + self.intercept()
    }

    /// Whether an id has a row.
    #[must_use]
    pub fn has(&self, row: u64) -> bool {
        self.table.find(row) != At::NONE
    }

    /// What each slot adds to the logit, in slot order. With [`Logistic::intercept`] added last they sum to it.
    #[must_use]
    pub fn explain(&self, slots: &[Slot]) -> Vec<Contribution> {
        let contribution = |slot: &Slot| {
            let (w, known) = self.weight_of(slot);
            Contribution { feature: slot.feature, row: slot.row, value: slot.value, logit: w * slot.value, known }
        };
        slots.iter().map(contribution).collect()
    }

    fn weight_of(&self, slot: &Slot) -> (f32, bool) {
        let at = self.table.find(slot.row);
        if at != At::NONE {
            return (self.table.w(at), true);
        }
        let default = self.table.find(self.default_rows[usize::from(slot.feature)]);
        (if default == At::NONE { 0.0 } else { self.table.w(default) }, false)
    }

    /// Everything that learning depends on, sorted. Takes seconds for a large table: see [`Logistic::image`].
    #[must_use]
    pub fn state(&self) -> State {
        State {
            rows: self.table.rows(),
            intercept: self.intercept,
            periods: self.periods.clone(),
            counts: self.counts.clone(),
            admission: self.gate.state.clone(),
        }
    }

    /// A plain copy, at the speed of memory; [`Image::sorted`] makes the state of it, on any thread.
    #[must_use]
    pub fn image(&self) -> Image {
        self.image_of(Part::Whole(self.table.clone()))
    }

    /// The same with no rows but those that changed behind `batch`; None where the log of changes does not reach so far.
    #[must_use]
    pub fn image_after(&self, batch: u32) -> Option<Image> {
        Some(self.image_of(Part::Changed(self.table.changes_after(batch)?)))
    }

    fn image_of(&self, table: Part<Table, Rows>) -> Image {
        Image {
            table,
            intercept: self.intercept,
            periods: self.periods.clone(),
            counts: self.counts.clone(),
            admission: self.gate.state.clone(),
        }
    }

    /// The rows that a batch after number `batch` changed.
    #[must_use]
    pub fn rows_touched_after(&self, batch: u32) -> Rows {
        self.table.rows_touched_after(batch)
    }

    /// Begins a segment of the log of changes behind `batch`; the first one turns it on.
    pub fn mark(&mut self, batch: u32) {
        self.table.log.mark(batch, self.table.len());
    }

    /// Drops what the log of changes holds for one who has not heard of `batch`.
    pub fn forget_changes_to(&mut self, batch: u32) {
        self.table.log.forget_to(batch);
    }

    /// See [`Table::changes_after`].
    #[must_use]
    pub fn changes_after(&self, batch: u32) -> Option<Changes<Rows>> {
        self.table.changes_after(batch)
    }

    /// The bias as it is stored.
    #[must_use]
    pub fn bias(&self) -> Intercept {
        self.intercept
    }

    /// What serving needs.
    #[must_use]
    pub fn weights(&self) -> Weights {
        let rows = self.table.rows();
        Weights { ids: rows.ids, w: rows.w, intercept: self.intercept() }
    }

    /// The model digest: [`State::digest`].
    #[must_use]
    pub fn digest(&self) -> u128 {
        self.state().digest()
    }
}

const ADAGRAD: u8 = 0;
const FTRL: u8 = 1;
const COUNT: u8 = 2;

/// What the slots of an example are like, all together.
struct Seen {
    /// Bits of the largest |value|: as integers, NaN is above every bound, too.
    largest: u32,
    /// Lowest row id.
    lowest: u64,
    /// All flags.
    flags: u16,
}

impl Seen {
    #[inline(always)]
    fn take(&mut self, slot: &Slot) {
        self.largest = self.largest.max(slot.value.abs().to_bits());
        self.lowest = self.lowest.min(slot.row);
        self.flags |= slot.flags;
    }
}

/// `1 / (1 + exp(-x))` where `e = exp(-|x|)`: no overflow on either side.
#[inline(always)]
fn sigmoid(x: f32, e: f32) -> f32 {
    (if x >= 0.0 { 1.0 } else { e }) / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand_pcg::Pcg64Mcg;
    use rand_pcg::rand_core::{Rng, SeedableRng};
    use std::collections::HashMap;
    use std::time::Duration;

    const DEFAULTS: [u64; 3] = [u64::MAX / 7, u64::MAX / 3, u64::MAX / 2];

    fn slot(row: u64, value: f32, feature: u16) -> Slot {
        Slot { row, value, feature, flags: 0 }
    }

    fn example(slots: &[Slot], positive: bool) -> Example<'_> {
        Example { slots, positive, weight: 1.0, sampling_offset: 0.0, time: Time(0), id: 1 }
    }

    fn model(settings: &Settings) -> Logistic {
        Logistic::new(settings.check(16, 5).unwrap(), DEFAULTS.to_vec())
    }

    fn learn(model: &mut Logistic, batch: u32, examples: &[Example<'_>]) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        model.learn(batch, Time(0), examples, &mut outcomes);
        outcomes
    }

    fn ftrl() -> Settings {
        Settings { l1: 0.3, l2: 0.2, b: 0.5, ..Settings::default() }
    }

    fn decaying(settings: Settings) -> Settings {
        let decay = DecaySettings { per: Duration::from_millis(10), keep: 0.5, floor: 0.25 };
        Settings { decay: Some(decay), ..settings }
    }

    /// The rule as a reader would write it: a map, one example at a time, nothing looked up ahead.
    struct Plain {
        s: Settings,
        rows: HashMap<u64, (f32, f32, f32, u32)>,
        intercept: (f64, f64, u32),
        periods: Vec<(u32, i64)>,
        unseen: [u64; 3],
    }

    impl Plain {
        fn new(s: &Settings) -> Self {
            Self { s: s.clone(), rows: HashMap::new(), intercept: (0.0, 0.0, 0), periods: vec![], unseen: [0; 3] }
        }

        fn decayed(&self, n: f64, touched: u32) -> f64 {
            let Some(DecaySettings { keep, floor, .. }) = self.s.decay else { return n };
            let last = self.periods.last().unwrap().1;
            let was = self.periods.iter().rev().find(|(first, _)| *first <= touched).unwrap_or(&self.periods[0]).1;
            if was == last || n <= floor { n } else { floor.max(n * libm::pow(keep, (last - was) as f64)) }
        }

        fn step(&mut self, id: u64, g: f32, batch: u32) {
            let Settings { rule, b, n0, l1, l2, .. } = self.s;
            let a = self.s.rate(16);
            let c = b + a * l2;
            let (mut w, mut n, mut z, touched) = self.rows.get(&id).copied().unwrap_or((0.0, 0.0, 0.0, batch));
            if rule == Rule::Count {
                self.rows.insert(id, (w + 1.0, n, z, batch));
                return;
            }
            let rested = self.decayed(f64::from(n), touched) as f32;
            if rested != n {
                n = rested;
                if l1 > 0.0 && w != 0.0 {
                    z = -w * ((n0 + n).sqrt() + c) / a - w.signum() * l1;
                }
            }
            let before = n;
            n += g * g;
            if l1 > 0.0 {
                z += g - ((n0 + n).sqrt() - (n0 + before).sqrt()) / a * w;
                w = if z.abs() <= l1 { 0.0 } else { a * (z.signum() * l1 - z) / ((n0 + n).sqrt() + c) };
            } else {
                w -= a * g / ((n0 + n).sqrt() + c);
            }
            self.rows.insert(id, (w, n, z, batch));
        }

        fn learn(&mut self, batch: u32, time: Time, example: &Example<'_>) -> Outcome {
            if let Some(decay) = &self.s.decay {
                let period = time.0.div_euclid(decay.per.as_millis() as i64);
                if self.periods.last().is_none_or(|last| last.1 < period) {
                    self.periods.push((batch, period));
                }
            }
            let weight_of = |id: u64| self.rows.get(&id).map(|row| row.0);
            let seen: Vec<bool> = example.slots.iter().map(|slot| self.rows.contains_key(&slot.row)).collect();
            let mut logit = 0.0f32;
            for slot in example.slots {
                let default = DEFAULTS[slot.feature as usize];
                logit += weight_of(slot.row).or(weight_of(default)).unwrap_or(0.0) * slot.value;
            }
            logit += self.intercept.0 as f32;
            let fine = |slot: &Slot| slot.value.is_finite() && slot.value.abs() <= 1e6 && slot.row != 0;
            if !(example.slots.iter().all(fine) && example.weight.is_finite() && logit.is_finite()) {
                return Outcome { logit: 0.0, e: 1.0, gradient: 0.0, quarantined: true };
            }
            if self.s.rule == Rule::Count {
                logit = 0.0;
            }
            let x = logit + example.sampling_offset;
            let e = libm::expf(-x.abs());
            let p = if x >= 0.0 { 1.0 / (1.0 + e) } else { e / (1.0 + e) };
            let d = (p - if example.positive { 1.0 } else { 0.0 }) * example.weight;
            for (slot, seen) in example.slots.iter().zip(seen) {
                if !seen {
                    self.unseen[slot.feature as usize] += 1;
                    self.step(DEFAULTS[slot.feature as usize], d * slot.value, batch);
                }
                self.step(slot.row, d * slot.value, batch);
            }
            let (w, n, touched) = self.intercept;
            let (w, n) = if self.s.rule == Rule::Count {
                (w + 1.0, self.decayed(n, touched))
            } else {
                let g = f64::from(d);
                let n = self.decayed(n, touched) + g * g;
                let root = (f64::from(self.s.n0) + n).sqrt();
                (w - f64::from(self.s.rate(16)) * g / (root + f64::from(self.s.b)), n)
            };
            self.intercept = (w, n, batch);
            Outcome { logit, e: libm::expf(-logit.abs()), gradient: d, quarantined: false }
        }
    }

    /// (slots, positive, weight, sampling offset)
    type Drawn = (Vec<Slot>, bool, f32, f32);

    fn drawn() -> impl Strategy<Value = Drawn> {
        let row =
            prop_oneof![20 => (1u64..60).prop_map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15)), 1 => Just(DEFAULTS[1])];
        let value = prop_oneof![20 => Just(1.0f32), 4 => Just(-2.5), 2 => Just(0.0), 2 => 0.01f32..3.0];
        let slot = (row, value, 0u16..3).prop_map(|(row, value, feature)| slot(row, value, feature));
        let weight = prop_oneof![4 => Just(1.0f32), 1 => 0.1f32..20.0];
        let offset = prop_oneof![3 => Just(0.0f32), 1 => Just(2.3)];
        (prop::collection::vec(slot, 0..7), any::<bool>(), weight, offset)
    }

    /// One way of being unfit.
    fn poison((slots, _, weight, _): &mut Drawn, how: u8) {
        match (how, slots.first_mut()) {
            (0, Some(first)) => first.value = f32::NAN,
            (1, Some(first)) => first.value = f32::NEG_INFINITY,
            (2, Some(first)) => first.value = 1.5e6,
            (3, Some(first)) => first.row = 0,
            _ => *weight = f32::NAN,
        }
    }

    fn settings() -> impl Strategy<Value = Settings> {
        let base = prop_oneof![
            3 => Just(Settings::default()),
            2 => Just(ftrl()),
            1 => Just(Settings { l2: 3.0, b: 1.0, n0: 0.0, ..Settings::default() }),
            1 => Just(Settings { rule: Rule::Count, ..Settings::default() }),
        ];
        (base, any::<bool>()).prop_map(|(base, decay)| if decay { decaying(base) } else { base })
    }

    proptest! {
        #[test]
        fn learning_equals_a_plain_map_bit_for_bit_in_blocks_of_any_size_through_poison_and_restarts(
            settings in settings(),
            mut drawn in prop::collection::vec((drawn(), 0u8..60), 1..150),
            block in prop_oneof![Just(1usize), Just(BLOCK), 2usize..40],
            batch_size in 1usize..60,
            hours in prop::collection::vec(0i64..25, 150),
            restart in 0usize..10,
        ) {
            drawn.iter_mut().for_each(|(drawn, how)| if *how < 5 { poison(drawn, *how) });
            let examples: Vec<Example<'_>> = drawn.iter().map(|((slots, positive, weight, sampling_offset), _)| Example {
                slots, positive: *positive, weight: *weight, sampling_offset: *sampling_offset, time: Time(0), id: 9,
            }).collect();
            let mut plain = Plain::new(&settings);
            let mut ours = model(&settings);
            let (mut outcomes, mut time) = (Vec::new(), Time(-30));
            for (i, examples) in examples.chunks(batch_size).enumerate() {
                let batch = i as u32 + 1;
                time = time.plus(hours[i]);
                if i == restart {
                    let state = ours.image().sorted();
                    prop_assert_eq!(&state, &ours.state());
                    ours = Logistic::from_state(settings.check(16, 5).unwrap(), DEFAULTS.to_vec(), state.clone()).unwrap();
                    prop_assert_eq!(ours.state().digest(), state.digest());
                }
                ours.learn_in_blocks(batch, time, examples, &[], &mut outcomes, block);
                let expected: Vec<_> = examples.iter().map(|example| plain.learn(batch, time, example)).collect();
                prop_assert_eq!(&outcomes, &expected);
            }
            let state = ours.state();
            let mut rows: Vec<_> = plain.rows.into_iter().collect();
            rows.sort_by_key(|row| row.0);
            prop_assert_eq!(&state.rows.ids, &rows.iter().map(|row| row.0).collect::<Vec<_>>());
            for (i, (id, (w, n, z, touched))) in rows.iter().enumerate() {
                let (rw, rn, rz) = (state.rows.w[i], state.rows.n[i], state.rows.z.as_ref().map_or(*z, |z| z[i]));
                prop_assert_eq!((rw.to_bits(), rn.to_bits(), rz.to_bits()), (w.to_bits(), n.to_bits(), z.to_bits()), "{:x}", id);
                prop_assert_eq!(state.rows.touched[i], *touched);
            }
            prop_assert_eq!((state.intercept.w, state.intercept.n, state.intercept.touched), plain.intercept);
            prop_assert_eq!(&state.periods, &plain.periods);
            prop_assert_eq!(&state.counts.unseen, &plain.unseen);
            prop_assert_eq!(state.counts.examples, examples.len() as u64 - examples.iter().filter(|e| !(e.weight.is_finite()
                && e.slots.iter().all(|s| s.row != 0 && s.value.abs() <= 1e6))).count() as u64);
        }

        #[test]
        fn a_quarantined_example_is_as_if_it_had_not_been(
            mut drawn in prop::collection::vec(drawn(), 2..80), at in any::<prop::sample::Index>(), how in 0u8..5, settings in settings(),
        ) {
            let at = at.index(drawn.len());
            poison(&mut drawn[at], how);
            let all: Vec<Example<'_>> = drawn.iter().map(|(slots, positive, weight, sampling_offset)| Example {
                slots, positive: *positive, weight: *weight, sampling_offset: *sampling_offset, time: Time(0), id: 9,
            }).collect();
            let mut without = all.clone();
            without.remove(at);
            let (mut ours, mut clean) = (model(&settings), model(&settings));
            let mut outcomes = learn(&mut ours, 1, &all);
            prop_assert!(outcomes.remove(at).quarantined);
            prop_assert_eq!(outcomes, learn(&mut clean, 1, &without));
            prop_assert_eq!(ours.state(), clean.state());
        }
    }

    /// FTRL-Proximal as in the paper (with n0), one coordinate, in f64.
    fn ftrl_in_f64(s: &Settings, gradient: impl Fn(f64, usize) -> f64, steps: usize) -> (f64, f64) {
        let [a, b, n0, l1, l2] = [s.rate(16), s.b, s.n0, s.l1, s.l2].map(f64::from);
        let (mut z, mut n, mut w) = (0.0f64, 0.0f64, 0.0f64);
        for i in 0..steps {
            let g = gradient(w, i);
            let sigma = ((n0 + n + g * g).sqrt() - (n0 + n).sqrt()) / a;
            z += g - sigma * w;
            n += g * g;
            w = if z.abs() <= l1 { 0.0 } else { -(z - z.signum() * l1) / ((b + (n0 + n).sqrt()) / a + l2) };
        }
        (w, n)
    }

    #[test]
    fn the_rule_is_ftrl_proximal() {
        for s in [Settings::default(), Settings { b: 1.0, l2: 0.7, ..Settings::default() }, ftrl()] {
            // One row at +-1 with labels of period 3; an intercept that is held at 0 by a huge b would not be the same
            // rule, so its share is taken out of the reference: the row's logit is what the model said.
            let mut ours = model(&s);
            let slots = [[slot(77, 1.0, 0)], [slot(77, -0.5, 0)]];
            let (mut logits, mut batch) = (Vec::new(), 0);
            for i in 0..400 {
                batch += 1;
                logits.push(learn(&mut ours, batch, &[example(&slots[i % 2], i % 3 == 0)])[0].logit);
            }
            let gradient = |_: f64, i: usize| {
                let p = 1.0 / (1.0 + libm::exp(-f64::from(logits[i])));
                (p - f64::from(u8::from(i.is_multiple_of(3)))) * f64::from(slots[i % 2][0].value)
            };
            let (w, n) = ftrl_in_f64(&s, gradient, 400);
            let at = ours.table.find(77);
            let row = ours.table.row(at);
            assert!((f64::from(row.n) - n).abs() < 1e-4 * n, "n {} against {n}", row.n);
            assert!((f64::from(row.w) - w).abs() < 2e-5, "w {} against {w} under {s:?}", row.w);
            assert!(w.abs() > 1e-3 || s.l1 > 0.0);
        }
    }

    #[test]
    fn a_warm_start_keeps_its_weights_at_zero_gradient_and_near_them_at_a_small_one() {
        let weights = Weights { ids: vec![10, 20, 30], w: vec![-0.8, 0.0, 2.0], intercept: -1.0 };
        let warm = || {
            Logistic::from_state(ftrl().check(16, 5).unwrap(), DEFAULTS.to_vec(), State::warm(weights.clone())).unwrap()
        };
        let still = [slot(10, 0.0, 0), slot(20, 0.0, 0), slot(30, 0.0, 0)];
        let mut ours = warm();
        learn(&mut ours, 1, &[example(&still, true), example(&still, false)]);
        for (ours, before) in ours.weights().w.iter().zip(&weights.w) {
            assert!((ours - before).abs() <= 1e-6 * before.abs(), "{ours} was {before}");
        }
        let moving = [slot(10, 0.01, 0), slot(30, 0.01, 0)];
        let mut ours = warm();
        learn(&mut ours, 1, &[example(&moving, true)]);
        for (ours, before) in ours.weights().w.iter().zip(&weights.w) {
            assert!((ours - before).abs() <= ftrl().rate(16), "{ours} was {before}: the warm start is thrown away");
        }
        // As wrong as it gets: starting from z = 0 loses the weights at the first touch.
        let mut state = State::warm(weights.clone());
        state.rows.z = Some(vec![0.0; 3]);
        let mut cold = Logistic::from_state(ftrl().check(16, 5).unwrap(), DEFAULTS.to_vec(), state).unwrap();
        learn(&mut cold, 1, &[example(&moving, true)]);
        assert_eq!(cold.weights().w[2], 0.0);
    }

    #[test]
    fn weight_two_doubles_the_gradient() {
        let slots = [slot(5, 1.0, 0)];
        let after = |weight| {
            let mut ours = model(&Settings::default());
            learn(&mut ours, 1, &[Example { weight, ..example(&slots, true) }]);
            (ours.state().rows.n[0], ours.state().rows.w[0])
        };
        // The first gradient is -0.5.
        assert_eq!(after(1.0).0, 0.25);
        assert_eq!(after(2.0).0, 1.0);
        assert_eq!(after(2.0).1, 0.1 / (0.2f32 + 1.0).sqrt());
    }

    #[test]
    fn rows_that_no_example_names_do_not_move() {
        let mut ours = model(&decaying(ftrl()));
        let (one, two) = ([slot(5, 1.0, 0), slot(6, 1.0, 1)], [slot(6, 1.0, 1), slot(8, 1.0, 2)]);
        learn(&mut ours, 1, &[example(&one, true), example(&two, false)]);
        let before = ours.state().rows;
        let mut outcomes = Vec::new();
        ours.learn(7, Time(1_000_000), &[example(&two, true)], &mut outcomes);
        let after = ours.state().rows;
        assert_eq!(before.ids, after.ids);
        for (i, id) in after.ids.iter().enumerate() {
            let row = |rows: &Rows| (rows.w[i], rows.n[i], rows.z.as_ref().unwrap()[i], rows.touched[i]);
            assert_eq!(row(&before) == row(&after), ![6, 8].contains(id), "row {id}");
        }
        assert_eq!(ours.rows_touched_after(1).ids, [6, 8]);
    }

    #[test]
    fn decay_moves_no_weight() {
        for settings in [decaying(Settings::default()), decaying(ftrl())] {
            let mut ours = model(&settings);
            let (slots, still) = ([slot(5, 1.0, 0)], [slot(5, 0.0, 0)]);
            for batch in 1..50 {
                learn(&mut ours, batch, &[example(&slots, true)]);
            }
            let before = ours.state().rows;
            ours.learn(50, Time(31), &[example(&still, true)], &mut Vec::new());
            let after = ours.state().rows;
            let at = before.ids.iter().position(|&id| id == 5).unwrap();
            assert_eq!(after.n[at], (before.n[at] * 0.125).max(0.25));
            assert!(before.w[at] > 0.1 && (after.w[at] - before.w[at]).abs() < 1e-6);
        }
    }

    #[test]
    fn down_sampling_leaves_predictions_calibrated() {
        let seed = 20_261_123;
        println!("seed {seed}");
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let mut uniform = || (random.next_u64() >> 40) as f64 / f64::from(1 << 24);
        let truth = [0.02, 0.05, 0.2];
        let rows = [11u64, 22, 33].map(|row| [slot(row, 1.0, 0)]);
        for rate in [1.0, 0.1] {
            let mut ours = model(&Settings { prior_ctr: Some(0.05), ..Settings::default() });
            let (mut said, mut counted, mut outcomes) = ([0.0; 3], [0.0; 3], Vec::new());
            for i in 0..600_000u32 {
                let which = (i % 3) as usize;
                let positive = uniform() < truth[which];
                if i > 100_000 {
                    said[which] += 1.0 / (1.0 + libm::exp(-f64::from(ours.score(&rows[which]))));
                    counted[which] += 1.0;
                }
                if positive || uniform() < rate {
                    let sampling_offset = libm::log(1.0 / rate) as f32;
                    let example = Example { sampling_offset, ..example(&rows[which], positive) };
                    ours.learn(i + 1, Time(0), &[example], &mut outcomes);
                }
            }
            for which in 0..3 {
                let (mean, truth) = (said[which] / counted[which], truth[which]);
                assert!((mean / truth - 1.0).abs() < 0.05, "predicts {mean} where {truth} is true, at rate {rate}");
            }
        }
    }

    #[test]
    fn the_count_rule_adds_exactly_one_for_each_row_of_each_example() {
        let mut ours = model(&Settings { rule: Rule::Count, ..Settings::default() });
        let slots = [slot(5, 0.25, 0), slot(6, 1.0, 1), slot(5, 1.0, 0)];
        let mut outcomes = Vec::new();
        for batch in 1..=40 {
            let example = Example { weight: 3.5, sampling_offset: 1.0, ..example(&slots, batch % 2 == 0) };
            ours.learn(batch, Time(i64::from(batch)), &[example; 5], &mut outcomes);
            assert!(outcomes.iter().all(|outcome| outcome.logit == 0.0 && !outcome.quarantined));
        }
        let (state, weight) = (ours.state(), |id| ours.table.w(ours.table.find(id)));
        assert_eq!((weight(5), weight(6), state.intercept.w), (400.0, 200.0, 200.0));
        assert_eq!((weight(DEFAULTS[0]), weight(DEFAULTS[1])), (2.0, 1.0));
        assert_eq!((state.counts.examples, &state.counts.unseen[..]), (200, &[2, 1, 0][..]));
    }

    #[test]
    fn the_explanation_sums_to_the_score_and_names_default_rows() {
        let mut ours = model(&Settings { prior_ctr: Some(0.1), ..Settings::default() });
        let known = [slot(5, 1.0, 0), Slot { flags: Slot::MISSING, ..slot(6, 0.5, 1) }];
        let unknown = [slot(5, 1.0, 0), slot(99, 2.0, 1), slot(98, 1.0, 2)];
        assert_eq!(learn(&mut ours, 1, &[example(&known, true)])[0].logit, ours.rule.start as f32);
        learn(&mut ours, 1, &[example(&known, false); 9]);
        let parts = ours.explain(&unknown);
        assert_eq!(parts.iter().map(|part| part.known).collect::<Vec<_>>(), [true, false, false]);
        assert!(
            parts[1].logit != 0.0 && parts[2].logit == 0.0,
            "feature 2 was never seen, so it has no default row yet"
        );
        assert_eq!(parts.iter().map(|part| part.logit).sum::<f32>() + ours.intercept(), ours.score(&unknown));
        let score = ours.score(&unknown);
        assert_eq!(learn(&mut ours, 2, &[example(&unknown, true)])[0].logit, score);
        assert_eq!(ours.counts().missing, [0, 10, 0]);
    }

    /// Settings under which ids come, wait and go: a row lives 80 ms, of at most 1024 rows.
    fn crowded() -> Settings {
        let count =
            admission::CountSettings { occurrences: 2, bytes: 1 << 12, per: std::time::Duration::from_millis(50) };
        let table = admission::Settings {
            admit: 0.7,
            count: Some(count),
            expire_after: Some(std::time::Duration::from_millis(80)),
            capacity: Some(1024),
        };
        Settings { table, ..ftrl() }
    }

    /// An endless stream of ids: of three, one is new, one came a moment ago, one is an old friend.
    fn crowd(batch: u32) -> Vec<[Slot; 3]> {
        let id = |i: u32| xxhash_rust::xxh3::xxh3_64(&i.to_le_bytes()).max(1);
        let one = |i: u32| {
            let new = 1000 + batch * 200 + i;
            [slot(id(new), 1.0, 0), slot(id(new - 200), 0.5, 1), slot(id(i % 40 + batch / 9), 1.0, 2)]
        };
        (0..200).map(one).collect()
    }

    #[test]
    fn a_day_of_unbounded_new_ids_stays_within_the_capacity() {
        let mut settings = crowded();
        settings.table = admission::Settings { capacity: Some(2000), ..admission::Settings::default() };
        let mut ours = model(&settings);
        for batch in 1..=200 {
            let slots = crowd(batch);
            let examples: Vec<_> = slots.iter().map(|slots| example(slots, batch % 3 == 0)).collect();
            learn(&mut ours, batch, &examples);
            assert!(ours.len() <= 2000, "{} rows behind batch {batch}", ours.len());
            let newest = slots.iter().flatten().all(|slot| ours.table.find(slot.row) != At::NONE);
            assert!(newest, "the rows of batch {batch} stay");
        }
        let ids = ours.ids();
        assert!(ids.admitted > 40_000 && ids.refused == 0 && ids.expired == 0, "{ids:?}");
        assert_eq!(ids.admitted - ids.evicted + 3, ours.len() as u64);
        assert!(ours.bytes() < 1 << 20, "{} bytes", ours.bytes());
        assert!(DEFAULTS[..3].iter().all(|row| ours.table.find(*row) != At::NONE), "default rows are there");
    }

    #[test]
    fn an_id_gets_its_row_with_its_second_occurrence_and_counts_as_its_default_row_until_then() {
        let table =
            admission::Settings { count: Some(admission::CountSettings::default()), ..admission::Settings::default() };
        let mut ours = model(&Settings { table, ..Settings::default() });
        let (one, two) = ([slot(70, 1.0, 0)], [slot(71, 1.0, 0)]);
        learn(&mut ours, 1, &[example(&one, true)]);
        assert_eq!(ours.state().rows.ids, [DEFAULTS[0]]);
        let said = learn(&mut ours, 2, &[example(&two, true)])[0].logit;
        assert!(said > 0.0, "the default row has learned for both");
        learn(&mut ours, 3, &[example(&one, true)]);
        let state = ours.state();
        assert_eq!((state.rows.ids.len(), ours.table.find(70) != At::NONE), (2, true));
        assert_eq!(state.counts.unseen[0], 3);
        let expected = admission::Counts { admitted: 1, refused: 2, expired: 0, evicted: 0 };
        assert_eq!(ours.ids(), expected);
    }

    #[test]
    fn a_row_expires_when_no_example_has_named_it_for_long_and_a_warm_start_counts_as_a_touch() {
        let table = admission::Settings {
            expire_after: Some(std::time::Duration::from_millis(80)),
            ..admission::Settings::default()
        };
        let rule = Settings { table, ..Settings::default() }.check(16, 5).unwrap();
        let warm = State::warm(Weights { ids: vec![10, 20], w: vec![1.0, 1.0], intercept: 0.0 });
        let mut ours = Logistic::from_state(rule, DEFAULTS.to_vec(), warm).unwrap();
        let (often, mut outcomes) = ([slot(10, 1.0, 0), slot(99, 1.0, 1)], Vec::new());
        for batch in 1..=9 {
            ours.learn(batch, Time(i64::from(batch) * 10 - 5), &[example(&often, true)], &mut outcomes);
            assert!(ours.table.find(20) != At::NONE, "batch {batch}");
        }
        ours.learn(10, Time(95), &[example(&often, true)], &mut outcomes);
        assert_eq!(ours.table.find(20), At::NONE);
        assert_eq!((ours.ids().expired, ours.table.find(10) != At::NONE), (1, true));
        // The default row of feature 1 was touched in the first batch alone.
        (11..40).for_each(|b| ours.learn(b, Time(i64::from(b) * 10), &[example(&often, true)], &mut outcomes));
        assert!(ours.table.find(DEFAULTS[1]) != At::NONE);
    }

    #[test]
    fn admission_expiry_and_eviction_go_on_from_a_stored_state() {
        let (mut whole, mut outcomes) = (model(&crowded()), Vec::new());
        let (mut parts, mut time) = (model(&crowded()), 0);
        for batch in 1..=60 {
            // At times so many that they are evicted, at times so few that they expire.
            time += if batch % 20 < 10 { 3 } else { 30 };
            let slots = crowd(batch);
            let examples: Vec<_> =
                slots.iter().zip(0..).map(|(slots, id)| Example { id, ..example(slots, id % 4 == 0) }).collect();
            for ours in [&mut whole, &mut parts] {
                ours.learn(batch, Time(time), &examples, &mut outcomes);
            }
            if batch % 13 == 0 {
                let state = parts.image().sorted();
                parts = Logistic::from_state(crowded().check(16, 5).unwrap(), DEFAULTS.to_vec(), state).unwrap();
            }
        }
        assert_eq!(whole.state(), parts.state());
        assert_eq!(whole.digest(), parts.digest());
        let ids = whole.ids();
        assert!(ids.admitted > 100 && ids.refused > 100 && ids.expired > 100 && ids.evicted > 100, "{ids:?}");
        let mut other = whole.state();
        other.admission.counter = None;
        assert_ne!(other.digest(), whole.digest());
    }

    #[test]
    fn the_log_of_changes_says_what_a_comparison_of_the_whole_tables_says() {
        for mut settings in [crowded(), Settings { l1: 0.0, ..crowded() }] {
            settings.table.capacity = Some(1100);
            (settings.table.admit, settings.table.count) = (1.0, None);
            let (mut ours, mut plain, mut outcomes) = (model(&settings), model(&settings), Vec::new());
            assert_eq!(ours.changes_after(0), None, "off until it is asked for");
            ours.mark(0);
            let (mut states, mut back, mut removed) = (vec![(0, ours.state().rows)], 0, 0);
            for batch in 1..=90u32 {
                let slots = crowd(batch);
                // A moment of silence lets everything expire; some come back in the very batch behind which they went.
                let time = Time(i64::from(batch) * 3 + i64::from(batch / 30) * 200);
                let examples: Vec<_> = slots.iter().map(|slots| example(slots, batch % 3 == 0)).collect();
                ours.learn(batch, time, &examples, &mut outcomes);
                plain.learn(batch, time, &examples, &mut outcomes);
                if batch % 7 == 0 {
                    ours.mark(batch);
                    states.push((batch, ours.state().rows));
                }
                let now = ours.state().rows;
                for (then, before) in &states {
                    let changes = ours.changes_after(*then).unwrap();
                    assert_eq!(changes.rows, ours.rows_touched_after(*then), "since {then} at {batch}");
                    let gone = before.ids.iter().filter(|id| now.ids.binary_search(id).is_err());
                    assert_eq!(changes.removed, gone.copied().collect::<Vec<_>>(), "since {then} at {batch}");
                    removed += changes.removed.len();
                    back += changes.rows.ids.iter().filter(|id| before.ids.binary_search(id).is_ok()).count();
                }
                if states.len() > 4 {
                    let (first, _) = states.remove(0);
                    ours.forget_changes_to(states[0].0);
                    assert_eq!(ours.changes_after(first), None, "{first} was forgotten");
                }
            }
            assert!(removed > 1000 && back > 1000, "{removed} {back}");
            assert_eq!(ours.digest(), plain.digest(), "the log does not show");
        }
    }

    #[test]
    fn the_digest_sees_every_part_of_the_state_but_the_counts() {
        let mut ours = model(&decaying(ftrl()));
        let slots = [slot(5, 1.0, 0), slot(6, 1.0, 1)];
        learn(&mut ours, 1, &[example(&slots, true), example(&slots, false)]);
        let state = ours.state();
        let changed = |change: fn(&mut State)| {
            let mut state = state.clone();
            change(&mut state);
            state.digest() != ours.digest()
        };
        assert!(changed(|s| s.rows.ids[1] += 1));
        assert!(changed(|s| s.rows.w[0] += 1e-3));
        assert!(changed(|s| s.rows.n[0] += 1e-3));
        assert!(changed(|s| s.rows.z.as_mut().unwrap()[0] += 1e-3));
        assert!(changed(|s| s.rows.touched[0] += 1));
        assert!(changed(|s| s.intercept.w += 1e-9));
        assert!(changed(|s| s.intercept.n += 1e-9));
        assert!(changed(|s| s.intercept.touched += 1));
        assert!(changed(|s| s.periods[0].1 += 1));
        assert!(!changed(|s| s.counts.examples += 1));
    }

    #[test]
    fn a_wrong_setting_is_named_with_its_value() {
        let refused = |text: &str| match toml::from_str::<Settings>(text) {
            Ok(settings) => settings.check(16, 5).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(refused("a = 0"), "`model.logistic.a` must be above 0 and at most 10, got 0");
        assert_eq!(refused("l1 = -1"), "`model.logistic.l1` must be between 0 and 1e6, got -1");
        assert!(refused("n0 = 0").starts_with("`model.logistic.n0` must be above 1e-12"));
        assert!(refused("prior_ctr = 1").starts_with("`model.logistic.prior_ctr` must be between 0 and 1"));
        assert!(refused("decay = { per = \"0s\" }").starts_with("`model.logistic.decay.per` must be at least 1ms"));
        assert!(refused("decay = { keep = 1 }").starts_with("`model.logistic.decay.keep`"));
        assert!(refused("decay = { keep = nan }").starts_with("`model.logistic.decay.keep`"));
        assert!(refused("lr = 1").contains("unknown field `lr`"));
        assert_eq!(
            refused("table = { admit = 0 }"),
            "`model.logistic.table.admit` must be above 0 and at most 1, got 0"
        );
        assert!(
            refused("table = { capacity = 5 }").starts_with("`model.logistic.table.capacity` must be at least 1024")
        );
        assert!(
            refused("table = { count = { occurrences = 16 } }").contains("table.count.occurrences` must be 2 to 15")
        );
        assert!(refused("table = { count = { bytes = 100 } }").contains("bytes` must be a multiple of 64"));
        assert!(refused("table = { count = { per = \"0s\" } }").contains("count.per` must be at least 1ms, got 0s"));
        toml::from_str::<Settings>("rule = \"count\"\ndecay = { per = \"6h\" }\nn0 = 0\nb = 1")
            .unwrap()
            .check(16, 5)
            .unwrap();
    }
}
