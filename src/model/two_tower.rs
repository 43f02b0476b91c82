//! Two towers beside the logistic model: `logit = logistic part + product of user tower and item tower`.
//!
//! A batch is one transaction. Its examples are cut into shards of a fixed size. Over the shards, the rows of each feature are
//! pooled and laid side by side, and the towers run forward; then the logistic part walks all examples in order with the
//! products as offsets, which gives the progressive scores and each example's gradient; then the towers run backward, and
//! each row learns once, from the sum of what its examples say, in their order. An example whose numbers are no good is known
//! before anything was written, and quarantined; so there is nothing to take back.
//!
//! Shards and stripes are fixed, sums over them have an order, and threads only take them: the number of threads does not
//! show in the result. On a GPU the towers run over all of the batch at once; the rest is the same.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Var};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::Error;
use super::admission::{self, Gate};
use super::changes::{self, Part};
use super::decay::{Decay, DecaySettings};
use super::device::DevicePair;
use super::embedding::{Embeddings, Occurrence, Place, RowRule, Rows, Rules, STRIPES, stripe_of, uniform};
use super::logistic::{Logistic, Outcome, column};
use super::optim::{self, DenseSettings, DenseState};
use super::tower::{self, Activation, Dots, Pair, Tower, Work};
use crate::event::{Example, Slot, Time};

/// Examples of a shard. Fixed, for sums over shards are part of the result; past 512 `gemm` cuts its inner sums by the size
/// of caches.
pub const SHARD: usize = 256;
/// Largest |value| of a slot and of a pooled input.
const LARGEST: f32 = 1e6;
/// Scale that normalised outputs start with.
const FIRST_SCALE: f32 = 4.0;

/// `[model.two_tower]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Weights of a row's vector, 1 to 256. Default 16.
    pub dim: usize,
    /// Outputs of each layer of a tower, the last of which is what it says; at most 4 of 1 to 1024. Default [64, 32].
    pub layers: Vec<usize>,
    /// Between layers: `relu` or `tanh`. Default `relu`.
    pub activation: Activation,
    /// Centre and scale what goes into each activation, by gains and shifts that are learned. Default false.
    pub layer_norm: bool,
    /// Scale what the towers say to length 1, and the product by a number that is learned. Default false.
    pub normalize: bool,
    /// The logistic part sees all features and crosses; false: the intercept and presentation features only, which leaves
    /// the pure two-tower model. Default true.
    pub wide: bool,
    /// Where the towers run: `cpu`, or `cuda:N` or `metal:N` where the build has it. The examples and their order are the same
    /// everywhere, weights differ in their last bits. Default `cpu`.
    pub device: String,
    pub embeddings: EmbeddingSettings,
    /// Which ids have a vector of their own.
    pub table: admission::Settings,
    pub dense: DenseSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            dim: 16,
            layers: vec![64, 32],
            activation: Activation::Relu,
            layer_norm: false,
            normalize: false,
            wide: true,
            device: "cpu".to_owned(),
            embeddings: EmbeddingSettings::default(),
            table: admission::Settings::default(),
            dense: DenseSettings::default(),
        }
    }
}

/// `[model.two_tower.embeddings]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EmbeddingSettings {
    /// `row_wise` (one accumulator a row) or `element_wise` (one a weight): AdaGrad. Default `row_wise`.
    pub rule: RowRule,
    /// Learning rate. Above 0, at most 10. Default 0.1.
    pub rate: f32,
    /// Added to the accumulator under the root, above 0. Default 0.01.
    pub n0: f32,
    /// Longest gradient of a row (Euclidean, summed over the batch); a longer one is shortened to it. Default 10.
    pub clip: f64,
    /// A row begins evenly in `-initial..initial`, by a hash of seed and id. 0 to 1. Default 0.05.
    pub initial: f32,
    /// Forgetting of the accumulators, as `model.logistic.decay`. Default: none.
    pub decay: Option<DecaySettings>,
}

impl Default for EmbeddingSettings {
    fn default() -> Self {
        Self { rule: RowRule::RowWise, rate: 0.1, n0: 0.01, clip: 10.0, initial: 0.05, decay: None }
    }
}

/// Which tower sees a feature.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    User,
    Item,
}

/// What the model must know of a feature or cross.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Feature {
    pub side: Option<Side>,
    pub presentation: bool,
    /// XORed with a row id it gives the id of the vector; 0: they are one. See [`Plan::id`].
    pub key: u64,
}

/// Which columns of which tower's input the vectors of each feature are pooled into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// By feature: tower (0 user, 1 item), first column and key.
    columns: Vec<Option<(usize, usize, u64)>>,
    /// Of each tower's input.
    widths: [usize; 2],
}

impl Plan {
    /// Features side by side in schema order, `dim` columns each: the side of each, and its key.
    #[must_use]
    pub fn new(features: impl IntoIterator<Item = (Option<Side>, u64)>, dim: usize) -> Self {
        let mut widths = [0, 0];
        let place = |(side, key): (Option<Side>, u64)| {
            let tower = match side? {
                Side::User => 0,
                Side::Item => 1,
            };
            let at = widths[tower];
            widths[tower] += dim;
            Some((tower, at, key))
        };
        let columns = features.into_iter().map(place).collect();
        Self { columns, widths }
    }

    /// Tower and first column of a feature.
    #[inline(always)]
    #[must_use]
    pub fn of(&self, feature: u16) -> Option<(usize, usize)> {
        let (tower, column, _) = self.columns.get(usize::from(feature)).copied().flatten()?;
        Some((tower, column))
    }

    /// The id of the vector that a row of a feature has. Features that share an embedding differ in their rows by their keys
    /// alone, so the same value leads both to the same vector.
    #[inline(always)]
    #[must_use]
    pub fn id(&self, feature: u16, row: u64) -> u64 {
        match self.columns.get(usize::from(feature)) {
            Some(&Some((_, _, key))) => (row ^ key).max(1),
            _ => row,
        }
    }

    #[must_use]
    pub fn widths(&self) -> [usize; 2] {
        self.widths
    }
}

/// What must be known of towers to compute with their parameters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// By feature or cross: the tower that sees it.
    pub sides: Vec<Option<Side>>,
    /// By feature or cross: see [`Feature::key`].
    pub keys: Vec<u64>,
    /// Weights of a row.
    pub dim: usize,
    /// Outputs of each layer.
    pub layers: Vec<usize>,
    pub activation: Activation,
    pub layer_norm: bool,
    pub normalize: bool,
}

impl Layout {
    #[must_use]
    pub fn plan(&self) -> Plan {
        Plan::new(self.sides.iter().copied().zip(self.keys.iter().copied()), self.dim)
    }

    #[must_use]
    pub fn pair(&self) -> Pair {
        Pair::new(self.plan().widths, &self.layers, self.activation, self.layer_norm, self.normalize)
    }
}

/// Settings that were found good, under a schema.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    pub settings: Settings,
    pub plan: Plan,
    sides: Vec<Option<Side>>,
    keys: Vec<u64>,
    /// By feature: the logistic part sees it.
    wide: Vec<bool>,
    decay: Option<Decay>,
    gate: admission::Rules,
    seed: u64,
}

impl Settings {
    /// The checked form, which alone can make a model.
    pub fn check(&self, features: &[Feature], seed: u64) -> Result<Checked, Error> {
        fn must(holds: bool, key: &'static str, expected: &'static str, got: impl ToString) -> Result<(), Error> {
            if holds { Ok(()) } else { Err(Error::Setting { key, expected, got: got.to_string() }) }
        }
        must((1..=256).contains(&self.dim), "two_tower.dim", "1 to 256", self.dim)?;
        let layers = &self.layers;
        let fit = !layers.is_empty()
            && layers.len() <= tower::MOST_LAYERS
            && layers.iter().all(|&n| (1..=tower::WIDEST).contains(&n));
        must(fit, "two_tower.layers", "1 to 4 numbers of 1 to 1024", format!("{layers:?}"))?;
        let EmbeddingSettings { rate, n0, clip, initial, ref decay, .. } = self.embeddings;
        must(rate > 0.0 && rate <= 10.0, "two_tower.embeddings.rate", "above 0 and at most 10", rate)?;
        must((1e-12..=1e6).contains(&n0), "two_tower.embeddings.n0", "1e-12 to 1e6", n0)?;
        must(clip > 0.0 && clip <= 1e12, "two_tower.embeddings.clip", "above 0 and at most 1e12", clip)?;
        must((0.0..=1.0).contains(&initial), "two_tower.embeddings.initial", "0 to 1", initial)?;
        let keys =
            ["two_tower.embeddings.decay.per", "two_tower.embeddings.decay.keep", "two_tower.embeddings.decay.floor"];
        let decay = decay.as_ref().map(|decay| decay.check(keys)).transpose()?;
        let keys = admission::Keys {
            admit: "two_tower.table.admit",
            occurrences: "two_tower.table.count.occurrences",
            bytes: "two_tower.table.count.bytes",
            per: "two_tower.table.count.per",
            expire_after: "two_tower.table.expire_after",
            capacity: "two_tower.table.capacity",
        };
        let gate = self.table.check(&keys, seed)?;
        self.dense.check()?;
        let key = "two_tower.device";
        match parse_device(&self.device) {
            None => must(false, key, "`cpu`, `cuda:N` or `metal:N`", &self.device)?,
            Some(("cuda", _)) => {
                let expected = "`cpu`: this build has no CUDA, scripts/build_cuda.sh makes one that has";
                must(cfg!(feature = "cuda"), key, expected, &self.device)?;
            }
            Some(("metal", _)) => {
                let expected =
                    "`cpu`: this build has no Metal, `cargo build --release --features metal` makes one that has";
                must(cfg!(feature = "metal"), key, expected, &self.device)?;
            }
            Some(_) => {}
        }
        let sides: Vec<Option<Side>> = features.iter().map(|feature| feature.side).collect();
        let keys: Vec<u64> = features.iter().map(|feature| feature.key).collect();
        let plan = Plan::new(sides.iter().copied().zip(keys.iter().copied()), self.dim);
        let expected = "features of both towers: give some `tower = \"user\"` and some `tower = \"item\"`";
        let count = |side| features.iter().filter(|feature| feature.side == Some(side)).count();
        let (users, items) = (count(Side::User), count(Side::Item));
        must(
            users > 0 && items > 0,
            "kind",
            expected,
            format!("two_tower with {users} of the user, {items} of the item"),
        )?;
        let widest = plan.widths[0].max(plan.widths[1]);
        must(
            widest <= 4096,
            "two_tower.dim",
            "so small that the features of a tower have at most 4096 columns",
            widest,
        )?;
        let seen = features.iter().filter(|feature| feature.presentation && feature.side.is_some()).count();
        let expected =
            "no tower's, where a feature has `role = \"presentation\"`: it is unknown when candidates are scored";
        must(seen == 0, "two_tower", expected, format!("{seen} such features"))?;
        let wide = features.iter().map(|feature| self.wide || feature.presentation).collect();
        Ok(Checked { settings: self.clone(), plan, sides, keys, wide, decay, gate, seed })
    }
}

/// `cpu`, `cuda:N` or `metal:N`.
fn parse_device(text: &str) -> Option<(&str, usize)> {
    if text == "cpu" {
        return Some(("cpu", 0));
    }
    let (kind, number) = text.split_once(':')?;
    (kind == "cuda" || kind == "metal").then_some(())?;
    Some((kind, number.parse().ok()?))
}

impl Checked {
    /// How rows of the embedding table learn and begin.
    #[must_use]
    pub fn rules(&self) -> Rules {
        let EmbeddingSettings { rule, rate, n0, clip, initial, .. } = self.settings.embeddings;
        Rules { dim: self.settings.dim, rule, rate, n0, clip, initial, seed: self.seed }
    }

    /// What a reader of the parameters must know.
    #[must_use]
    pub fn layout(&self) -> Layout {
        let Settings { dim, ref layers, activation, layer_norm, normalize, .. } = self.settings;
        let (sides, keys) = (self.sides.clone(), self.keys.clone());
        Layout { sides, keys, dim, layers: layers.clone(), activation, layer_norm, normalize }
    }

    /// The device, opened: here it shows whether it is there.
    pub(super) fn device(&self) -> Result<Device, Error> {
        let (kind, number) = parse_device(&self.settings.device).unwrap_or(("cpu", 0));
        let device = match kind {
            "cuda" => Device::new_cuda(number),
            "metal" => Device::new_metal(number),
            _ => Ok(Device::Cpu),
        };
        let expected = "a device of this machine (`cpu` always is)";
        device.map_err(|error| {
            let got = format!("{}, which cannot be used: {}", self.settings.device, reason(error));
            Error::Setting { key: "two_tower.device", expected, got }
        })
    }

    /// The dense parameters that a model begins with: weights even in +-sqrt(6 / inputs) (+-sqrt(3 / inputs) in the last
    /// layer), by a hash of seed, name and place; gains 1; the item tower's last layer and all else 0.
    fn begin(&self, pair: &Pair) -> Vec<f32> {
        let mut params = vec![0.0; pair.len];
        for (name, tower) in [("user", &pair.user), ("item", &pair.item)] {
            for (i, layer) in tower.layers.iter().enumerate() {
                let last = i + 1 == tower.layers.len();
                if let Some(norm) = layer.norm {
                    params[norm..norm + layer.outputs].fill(1.0);
                }
                if last && name == "item" {
                    continue;
                }
                let bound = (if last { 3.0 } else { 6.0 } / layer.inputs as f64).sqrt() as f32;
                let id = xxh3_64(format!("towers.{name}.{i}.weight").as_bytes());
                for (k, w) in params[layer.weight..layer.bias()].iter_mut().enumerate() {
                    *w = bound * uniform(self.seed, id, k as u64);
                }
            }
        }
        if let Some(scale) = pair.scale {
            params[scale] = FIRST_SCALE;
        }
        params
    }
}

/// What a checkpoint holds of the towers: all that learning depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub rows: Rows,
    /// Packed as [`tower`] has it.
    pub params: Vec<f32>,
    pub dense: DenseState,
    /// (number of its first batch, event-time period), both ascending. Empty without decay.
    pub periods: Vec<(u32, i64)>,
    /// What decides which ids have a row.
    pub admission: admission::State,
    /// Batches whose dense gradient was not finite, and moved no dense parameter.
    pub skipped: u64,
}

impl State {
    /// Of towers that know nothing.
    #[must_use]
    pub fn fresh(checked: &Checked) -> Self {
        let pair = checked.layout().pair();
        let dense = DenseState::new(checked.settings.dense.rule, pair.len);
        Self { params: checked.begin(&pair), dense, ..Self::default() }
    }

    /// Takes all of the state into a digest, little-endian, each column led by its length.
    pub fn add_to(&self, hash: &mut Xxh3) {
        hash.update(b"tidemill towers 1");
        column(hash, self.rows.ids.len(), self.rows.ids.iter().map(|id| id.to_le_bytes()));
        floats(hash, &self.rows.w);
        floats(hash, &self.rows.n);
        column(hash, self.rows.touched.len(), self.rows.touched.iter().map(|touched| touched.to_le_bytes()));
        self.add_beside_to(hash);
    }

    /// Takes all but the rows into a digest.
    pub(super) fn add_beside_to(&self, hash: &mut Xxh3) {
        floats(hash, &self.params);
        floats(hash, &self.dense.mean);
        floats(hash, &self.dense.square);
        let admission::Counts { admitted, refused, expired, evicted } = self.admission.counts;
        let numbers = [self.dense.examples, self.skipped, admitted, refused, expired, evicted];
        column(hash, numbers.len(), numbers.iter().map(|number| number.to_le_bytes()));
        let periods =
            self.periods.iter().map(|&(batch, period)| ((period as u128) << 32 | u128::from(batch)).to_le_bytes());
        column(hash, self.periods.len(), periods);
        self.admission.add_to(hash);
    }
}

fn floats(hash: &mut Xxh3, values: &[f32]) {
    column(hash, values.len(), values.iter().map(|v| v.to_le_bytes()));
}

/// A copy of the towers at a batch boundary, for another thread to sort and write.
pub struct Image {
    table: Part<Embeddings, Rows>,
    params: Vec<f32>,
    dense: DenseState,
    periods: Vec<(u32, i64)>,
    admission: admission::State,
    skipped: u64,
}

impl Image {
    /// Does the work that the copy left undone: canonical order.
    #[must_use]
    pub fn sorted(&self) -> State {
        State {
            rows: self.table.rows(Embeddings::rows),
            params: self.params.clone(),
            dense: self.dense.clone(),
            periods: self.periods.clone(),
            admission: self.admission.clone(),
            skipped: self.skipped,
        }
    }

    /// Ids that went since the batch behind which it holds what changed; none where it holds all.
    pub(super) fn removed(&self) -> &[u64] {
        self.table.removed()
    }
}

/// What became of the towers since a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Changes {
    pub embedding: changes::Changes<Rows>,
    /// All of them, packed as [`tower`] has it: every batch moves them.
    pub params: Vec<f32>,
}

/// One shard's room, used again and again.
struct Shard {
    op: Dots,
    /// The towers' inputs, `[examples, width]`, and the same as leaves of the graph.
    inputs: [Vec<f32>; 2],
    leaves: Option<[Var; 2]>,
    places: Vec<Place>,
    /// What falls to each stripe of the table, in the order of the examples.
    occurrences: Vec<Vec<Occurrence>>,
    /// Of each occurrence of an id without a row: it has come often enough. Empty where ids are not counted.
    often: Vec<bool>,
    /// Occurrences of ids that got no row.
    refused: u64,
    fit: Vec<bool>,
    /// Of each example; NaN where it must not be learned from.
    products: Vec<f32>,
    g: Vec<f32>,
    /// Gradients of the inputs, and of the parameters.
    pulled: [Vec<f32>; 2],
    gradient: Vec<f32>,
}

impl Shard {
    fn new(pair: &Arc<Pair>) -> Self {
        Self {
            op: Dots::new(Arc::clone(pair)),
            inputs: [Vec::new(), Vec::new()],
            leaves: None,
            places: Vec::new(),
            occurrences: vec![Vec::new(); STRIPES],
            often: Vec::new(),
            refused: 0,
            fit: Vec::new(),
            products: Vec::new(),
            g: Vec::new(),
            pulled: [Vec::new(), Vec::new()],
            gradient: Vec::new(),
        }
    }

    /// Pools the rows of the examples into the towers' inputs.
    fn pool(&mut self, plan: &Plan, table: &Embeddings, defaults: &[Place], examples: &[Example<'_>]) {
        let dim = table.rules().dim;
        self.places.clear();
        let ask = |example: &Example<'_>| {
            example
                .slots
                .iter()
                .filter(|slot| plan.of(slot.feature).is_some())
                .for_each(|slot| table.prefetch(plan.id(slot.feature, slot.row)));
        };
        examples.iter().take(2).for_each(ask);
        for (i, example) in examples.iter().enumerate() {
            examples.get(i + 2).into_iter().for_each(ask);
            for slot in example.slots.iter().filter(|slot| plan.of(slot.feature).is_some()) {
                // Id 0 stands for an empty place; its example is quarantined below.
                let place = if slot.row == 0 { Place::NONE } else { table.find(plan.id(slot.feature, slot.row)) };
                table.prefetch_row(place);
                self.places.push(place);
            }
        }
        for (input, width) in self.inputs.iter_mut().zip(plan.widths) {
            input.clear();
            input.resize(examples.len() * width, 0.0);
        }
        self.occurrences.iter_mut().for_each(Vec::clear);
        self.fit.clear();
        let mut places = self.places.iter();
        for (i, example) in examples.iter().enumerate() {
            let mut fit = example.slots.iter().all(|slot| slot.value.abs() <= LARGEST && slot.row != 0);
            for slot in example.slots {
                let Some((tower, column)) = plan.of(slot.feature) else { continue };
                let place = places.next().copied().unwrap_or(Place::NONE);
                if !fit {
                    continue;
                }
                let default = defaults[usize::from(slot.feature)];
                let from = table.row(if place == Place::NONE { default } else { place });
                let start = i * plan.widths[tower] + column;
                let to = &mut self.inputs[tower][start..start + dim];
                to.iter_mut().zip(from).for_each(|(sum, &w)| *sum += slot.value * w);
            }
            let width = |tower: usize| plan.widths[tower];
            // Without a way out, so that it takes many at once; false for NaN.
            let bounded = |x: &[f32]| x.iter().fold(true, |fit, x| fit & (x.abs() <= LARGEST));
            fit = fit && (0..2).all(|tower| bounded(&self.inputs[tower][i * width(tower)..][..width(tower)]));
            if !fit {
                for tower in 0..2 {
                    self.inputs[tower][i * width(tower)..][..width(tower)].fill(0.0);
                }
            }
            self.fit.push(fit);
        }
    }

    /// Counts the ids without a row, in the order of the examples.
    fn count(&mut self, plan: &Plan, examples: &[Example<'_>], outcomes: &[Outcome], gate: &mut Gate) {
        self.often.clear();
        let mut places = self.places.iter();
        for (example, outcome) in examples.iter().zip(outcomes) {
            for slot in example.slots.iter().filter(|slot| plan.of(slot.feature).is_some()) {
                if places.next() == Some(&Place::NONE) && !outcome.quarantined {
                    self.often.push(gate.by_count(plan.id(slot.feature, slot.row)));
                }
            }
        }
    }

    /// Notes to which rows the examples' gradients fall, once it is known which are learned from. `admit` says whether chance
    /// lets an example give an id its row. `default_rows` are ids of vectors.
    fn note(
        &mut self,
        plan: &Plan,
        defaults: &[Place],
        default_rows: &[u64],
        examples: &[Example<'_>],
        outcomes: &[Outcome],
        admit: impl Fn(u64, u64) -> bool,
    ) {
        self.refused = 0;
        let (mut places, mut often) = (self.places.iter(), self.often.iter().copied());
        for (i, (example, outcome)) in examples.iter().zip(outcomes).enumerate() {
            for slot in example.slots {
                let Some((tower, column)) = plan.of(slot.feature) else { continue };
                let place = places.next().copied().unwrap_or(Place::NONE);
                if outcome.quarantined {
                    continue;
                }
                let (impression, example, column, value) = (example.id, i as u32, column as u32, slot.value);
                let id = plan.id(slot.feature, slot.row);
                let feature = usize::from(slot.feature);
                let mut note = |id, place| {
                    self.occurrences[stripe_of(id)].push(Occurrence { id, place, example, column, tower, value });
                };
                if place == Place::NONE {
                    note(default_rows[feature], defaults[feature]);
                    if !(often.next().unwrap_or(true) && admit(id, impression)) {
                        self.refused += 1;
                        continue;
                    }
                }
                note(id, place);
            }
        }
    }

    fn forward(&mut self, params: &Var) -> candle_core::Result<()> {
        let rows = self.fit.len();
        let widths = self.inputs.each_ref().map(|input| input.len() / rows);
        if self.leaves.as_ref().is_none_or(|leaves| leaves[0].dim(0).ok() != Some(rows)) {
            let leaf = |width: usize| Var::zeros((rows, width), candle_core::DType::F32, &Device::Cpu);
            self.leaves = Some([leaf(widths[0])?, leaf(widths[1])?]);
        }
        let Some([user, item]) = &self.leaves else { unreachable!("made just now") };
        tower::assign(user, &self.inputs[0])?;
        tower::assign(item, &self.inputs[1])?;
        let products = user.apply_op3(item, params, self.op.clone())?;
        let mut judged = Vec::new();
        self.op.fit(&mut judged);
        tower::with_elements(&products, |products| self.say(products, &judged))
    }

    /// Notes the products of its examples, given those and what was found of the numbers behind them.
    fn say(&mut self, products: &[f32], judged: &[bool]) {
        self.products.clear();
        let all = products.iter().zip(&self.fit).zip(judged);
        self.products.extend(all.map(|((&product, fit), judged)| if *fit && *judged { product } else { f32::NAN }));
    }

    fn backward(&mut self, parameters: usize, outcomes: &[Outcome]) {
        self.g.clear();
        self.g.extend(outcomes.iter().map(|outcome| outcome.gradient));
        self.gradient.clear();
        self.gradient.resize(parameters, 0.0);
        self.op.pull(self.inputs.each_ref().map(Vec::as_slice), &self.g, &mut self.pulled, &mut self.gradient);
    }
}

/// Where the towers are computed.
enum On {
    /// Here, by [`Dots`], a shard at a time. With the parameters as a leaf of Candle's.
    Shards(Var),
    /// There, a batch at a time.
    Device(Box<DevicePair>),
}

impl On {
    fn new(device: Device, pair: &Arc<Pair>, params: &[f32]) -> candle_core::Result<Self> {
        if !device.is_cpu() {
            return Ok(Self::Device(Box::new(DevicePair::new(Arc::clone(pair), device))));
        }
        Ok(Self::Shards(Var::from_slice(params, params.len(), &device)?))
    }

    /// The products of the examples, once `pool` has pooled each shard's inputs.
    fn forward(
        &mut self,
        threads: Option<&rayon::ThreadPool>,
        shards: &mut [Shard],
        params: &[f32],
        pool: impl Fn(usize, &mut Shard) + Sync,
    ) -> candle_core::Result<()> {
        match self {
            Self::Shards(leaf) => each(threads, shards, |i, shard| {
                pool(i, shard);
                shard.forward(leaf).expect(FAILS);
            }),
            Self::Device(towers) => {
                each(threads, shards, pool);
                for (side, input) in towers.inputs.iter_mut().enumerate() {
                    input.clear();
                    shards.iter().for_each(|shard| input.extend_from_slice(&shard.inputs[side]));
                }
                towers.forward(params)?;
                for (i, shard) in shards.iter_mut().enumerate() {
                    let mine = part(i, towers.products.len());
                    shard.say(&towers.products[mine.clone()], &towers.fit[mine]);
                }
            }
        }
        Ok(())
    }

    /// The gradient of the parameters, and in [`pulled`](Self::pulled) that of the inputs, given what became of the products;
    /// `note` is done to each shard on the way.
    fn backward(
        &mut self,
        threads: Option<&rayon::ThreadPool>,
        shards: &mut [Shard],
        outcomes: &[Outcome],
        gradient: &mut Vec<f32>,
        note: impl Fn(usize, &mut Shard) + Sync,
    ) -> candle_core::Result<()> {
        match self {
            Self::Shards(leaf) => {
                let length = leaf.elem_count();
                each(threads, shards, |i, shard| {
                    note(i, shard);
                    shard.backward(length, &outcomes[part(i, outcomes.len())]);
                });
                gradient.clear();
                gradient.resize(length, 0.0);
                // In the order of the shards.
                for shard in shards {
                    gradient.iter_mut().zip(&shard.gradient).for_each(|(sum, &d)| *sum += d);
                }
            }
            Self::Device(towers) => {
                each(threads, shards, note);
                let g: Vec<f32> = outcomes.iter().map(|outcome| outcome.gradient).collect();
                *gradient = towers.gradient(&g)?;
            }
        }
        Ok(())
    }

    /// The parameters have moved.
    fn take(&mut self, params: &[f32]) {
        match self {
            Self::Shards(leaf) => tower::assign(leaf, params).expect(FAILS),
            Self::Device(_) => {} // is given them with each batch
        }
    }

    /// Of each shard: the gradients of its inputs, `[examples, width]`.
    fn pulled<'a>(&'a self, shards: &'a [Shard]) -> Vec<[&'a [f32]; 2]> {
        match self {
            Self::Shards(_) => shards.iter().map(|shard| shard.pulled.each_ref().map(Vec::as_slice)).collect(),
            Self::Device(towers) => (0..shards.len()).map(|i| towers.pulled(part(i, towers.products.len()))).collect(),
        }
    }
}

/// Which of `examples` are of shard `i`.
fn part(i: usize, examples: usize) -> Range<usize> {
    i * SHARD..((i + 1) * SHARD).min(examples)
}

/// The towers with their table and optimizers; the logistic part is lent for each batch.
pub struct TwoTower {
    checked: Checked,
    pair: Arc<Pair>,
    on: On,
    table: Embeddings,
    /// Ids of the vectors.
    default_rows: Vec<u64>,
    /// Of the features that a tower sees; they are there from the start.
    defaults: Vec<Place>,
    /// The ids of these.
    always: Vec<u64>,
    params: Vec<f32>,
    dense: DenseState,
    periods: Vec<(u32, i64)>,
    gate: Gate,
    skipped: u64,
    shards: Vec<Shard>,
    threads: Option<rayon::ThreadPool>,
    gradient: Vec<f32>,
    products: Vec<f32>,
    /// Slots that the logistic part sees, where that is not all of them.
    seen: Vec<Slot>,
}

/// What Candle says on the CPU only where there is a bug.
const FAILS: &str = "the towers can be computed on the CPU";

/// What a device says, without where in Candle it was said.
fn reason(error: candle_core::Error) -> String {
    match error {
        candle_core::Error::WithBacktrace { inner, .. } => inner.to_string(),
        error => error.to_string(),
    }
}

impl TwoTower {
    /// Towers that know nothing. `default_rows` holds the row id of each feature's default row; `threads` compute.
    pub fn new(checked: Checked, default_rows: Vec<u64>, threads: usize) -> Result<Self, Error> {
        let state = State::fresh(&checked);
        Self::from_state(checked, default_rows, threads, state)
    }

    /// The towers that go on from `state`.
    pub fn from_state(checked: Checked, default_rows: Vec<u64>, threads: usize, state: State) -> Result<Self, Error> {
        let refuse = |part, what| Err(Error::State { part, what });
        let pair = Arc::new(checked.layout().pair());
        let fresh = DenseState::new(checked.settings.dense.rule, pair.len);
        let lengths = |dense: &DenseState| [dense.mean.len(), dense.square.len()];
        if state.params.len() != pair.len || lengths(&state.dense) != lengths(&fresh) {
            let found = state.params.len();
            return refuse("towers", format!("{found} parameters where the settings give {}", pair.len));
        }
        let State { rows, params, dense, periods, admission, skipped } = state;
        if !params.iter().chain(&dense.mean).chain(&dense.square).all(|v| v.is_finite()) {
            return refuse("towers", "a number is not finite".to_owned());
        }
        if !periods.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) {
            return refuse("decay periods of the towers", "not ascending".to_owned());
        }
        let gate = Gate::new(checked.gate, admission, "embedding table")?;
        let default_rows: Vec<u64> =
            default_rows.iter().enumerate().map(|(feature, &row)| checked.plan.id(feature as u16, row)).collect();
        let mut table = Embeddings::from_rows(checked.rules(), &rows)?;
        let place = |(feature, &row): (usize, &u64)| match checked.plan.of(feature as u16) {
            Some(_) => table.find_or_insert(row),
            None => Place::NONE,
        };
        let defaults: Vec<Place> = default_rows.iter().enumerate().map(place).collect();
        let seen = default_rows.iter().zip(&defaults).filter(|(_, at)| **at != Place::NONE);
        let mut always: Vec<u64> = seen.map(|(row, _)| *row).collect();
        always.sort_unstable();
        always.dedup();
        let threads = if threads > 1 {
            let pool =
                rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(|i| format!("tower-{i}")).build();
            Some(pool.map_err(|e| Error::Threads { threads, reason: e.to_string() })?)
        } else {
            None
        };
        let on = On::new(checked.device()?, &pair, &params).expect(FAILS);
        Ok(Self {
            pair,
            on,
            table,
            default_rows,
            defaults,
            always,
            params,
            dense,
            periods,
            gate,
            skipped,
            shards: Vec::new(),
            threads,
            gradient: Vec::new(),
            products: Vec::new(),
            seen: Vec::new(),
            checked,
        })
    }

    /// Number of rows of the table.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.table.len()
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

    /// Scores and learns the examples of batch number `batch`, the logistic part among it: see the module. `time` is the
    /// batch's place in event time, for decay. If the device fails, some of the batch may be learned and some not.
    pub fn learn(
        &mut self,
        logistic: &mut Logistic,
        batch: u32,
        time: Time,
        examples: &[Example<'_>],
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), Error> {
        let Self { checked, on, table, default_rows, defaults, gate, .. } = self;
        let fails = |error| {
            let device = checked.settings.device.clone();
            Error::Device { device, reason: reason(error), batch }
        };
        let plan = &checked.plan;
        let threads = self.threads.as_ref();
        let part = |i| part(i, examples.len());
        let count = examples.len().div_ceil(SHARD);
        while self.shards.len() < count {
            self.shards.push(Shard::new(&self.pair));
        }
        let shards = &mut self.shards[..count];

        let pool = |i, shard: &mut Shard| shard.pool(plan, table, defaults, &examples[part(i)]);
        on.forward(threads, shards, &self.params, pool).map_err(fails)?;
        self.products.clear();
        shards.iter().for_each(|shard| self.products.extend_from_slice(&shard.products));
        if checked.settings.wide {
            logistic.learn_beside(batch, time, examples, &self.products, outcomes);
        } else {
            let sees = |slot: &Slot| checked.wide.get(usize::from(slot.feature)).copied().unwrap_or(false);
            let narrow = narrowed(examples, sees, &mut self.seen);
            logistic.learn_beside(batch, time, &narrow, &self.products, outcomes);
        }

        let said: &[Outcome] = outcomes;
        if gate.counts() {
            gate.enter(time);
            for (i, shard) in shards.iter_mut().enumerate() {
                shard.count(plan, &examples[part(i)], &said[part(i)], gate);
            }
        }
        let rules = gate.rules;
        let admit = |id: u64, impression: u64| rules.by_chance(id, impression);
        let note = |i, shard: &mut Shard| {
            shard.note(plan, defaults, default_rows, &examples[part(i)], &said[part(i)], admit);
        };
        on.backward(threads, shards, said, &mut self.gradient, note).map_err(fails)?;
        let learned = said.iter().filter(|outcome| !outcome.quarantined).count();
        if optim::step(&checked.settings.dense, &mut self.dense, &mut self.params, &self.gradient, learned) {
            on.take(&self.params);
        } else {
            self.skipped += 1;
        }
        self.step_rows(count, batch, time);
        Ok(())
    }

    /// Steps the rows that the examples of the first `count` shards named, and lets go of rows that are to go.
    fn step_rows(&mut self, count: usize, batch: u32, time: Time) {
        let decay = self.checked.decay;
        let since = decay.map_or(0, |decay| decay.enter(&mut self.periods, batch, time));
        let rested = |n: f64, touched: u32| match decay {
            Some(decay) if touched < since => decay.rested(&self.periods, batch, touched, n),
            _ => n,
        };
        let (shards, widths) = (&self.shards[..count], self.checked.plan.widths);
        let gradients = self.on.pulled(shards);
        self.gate.state.counts.refused += shards.iter().map(|shard| shard.refused).sum::<u64>();
        let before = self.table.len();
        let mut stripes = self.table.stripes();
        each(self.threads.as_ref(), &mut stripes, |_, stripe| {
            let number = stripe.number;
            let of = shards.iter().zip(&gradients);
            stripe.run(batch, of.map(|(shard, of)| (shard.occurrences[number].as_slice(), *of, widths)), &rested);
        });
        drop(stripes);
        self.gate.state.counts.admitted += (self.table.len() - before) as u64;
        if self.gate.tidy(&mut self.table, &self.always, batch, time) {
            for (row, at) in self.default_rows.iter().zip(&mut self.defaults).filter(|(_, at)| **at != Place::NONE) {
                *at = self.table.find(*row);
            }
        }
    }

    /// What became of ids.
    #[must_use]
    pub fn ids(&self) -> admission::Counts {
        self.gate.state.counts
    }

    /// Begins a segment of the log of changes behind `batch`; the first one turns it on.
    pub fn mark(&mut self, batch: u32) {
        self.table.mark(batch);
    }

    /// Drops what the log of changes holds for one who has not heard of `batch`.
    pub fn forget_changes_to(&mut self, batch: u32) {
        self.table.forget_changes_to(batch);
    }

    /// What became of the towers behind number `batch`; None where the log does not reach back so far.
    #[must_use]
    pub fn changes_after(&self, batch: u32) -> Option<Changes> {
        Some(Changes { embedding: self.table.changes_after(batch)?, params: self.params.clone() })
    }

    /// Whether a slot's id has a row.
    #[must_use]
    pub fn has(&self, slot: &Slot) -> bool {
        self.table.find(self.checked.plan.id(slot.feature, slot.row)) != Place::NONE
    }

    /// What the towers add to the logit of an example with these slots.
    #[must_use]
    pub fn product(&self, slots: &[Slot]) -> f32 {
        let mut inputs = self.checked.plan.widths.map(|width| vec![0.0; width]);
        for slot in slots {
            let Some((tower, column)) = self.checked.plan.of(slot.feature) else { continue };
            let place = self.table.find(self.checked.plan.id(slot.feature, slot.row));
            let place = if place == Place::NONE { self.defaults[usize::from(slot.feature)] } else { place };
            let to = &mut inputs[tower][column..];
            to.iter_mut().zip(self.table.row(place)).for_each(|(sum, &w)| *sum += slot.value * w);
        }
        let (mut u, mut v) = (Work::default(), Work::default());
        let u = self.pair.user.says(&self.params, &inputs[0], 1, &mut u);
        let v = self.pair.item.says(&self.params, &inputs[1], 1, &mut v);
        self.pair.product(&self.params, u, v)
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

    fn image_of(&self, table: Part<Embeddings, Rows>) -> Image {
        Image {
            table,
            params: self.params.clone(),
            dense: self.dense.clone(),
            periods: self.periods.clone(),
            admission: self.gate.state.clone(),
            skipped: self.skipped,
        }
    }
}

/// The examples with only the slots that `sees` is true of, in the room of `seen`.
fn narrowed<'a>(examples: &[Example<'_>], sees: impl Fn(&Slot) -> bool, seen: &'a mut Vec<Slot>) -> Vec<Example<'a>> {
    seen.clear();
    let mut ends = Vec::with_capacity(examples.len());
    for example in examples {
        seen.extend(example.slots.iter().filter(|slot| sees(slot)));
        ends.push(seen.len());
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let slots = starts.zip(&ends).map(|(start, &end)| &seen[start..end]);
    examples.iter().zip(slots).map(|(example, slots)| Example { slots, ..*example }).collect()
}

/// Does `work` on each item, on the threads of `pool` where there is one.
fn each<T: Send>(pool: Option<&rayon::ThreadPool>, items: &mut [T], work: impl Fn(usize, &mut T) + Sync) {
    match pool {
        Some(pool) if items.len() > 1 => {
            pool.install(|| items.par_iter_mut().with_max_len(1).enumerate().for_each(|(i, item)| work(i, item)));
        }
        _ => items.iter_mut().enumerate().for_each(|(i, item)| work(i, item)),
    }
}

/// The dense parameters of towers by the names that they have in files: (name, shape, range in the packed vector).
#[must_use]
pub fn names(pair: &Pair) -> Vec<(String, Vec<usize>, Range<usize>)> {
    let mut names = Vec::new();
    let towers: [(&str, &Tower); 2] = [("user", &pair.user), ("item", &pair.item)];
    for (name, tower) in towers {
        for (i, layer) in tower.layers.iter().enumerate() {
            let (n, bias) = (layer.outputs, layer.bias());
            let mut add = |what, shape, start: usize, len: usize| {
                names.push((format!("towers.{name}.{i}.{what}"), shape, start..start + len));
            };
            add("weight", vec![layer.inputs, n], layer.weight, layer.inputs * n);
            add("bias", vec![n], bias, n);
            if let Some(norm) = layer.norm {
                add("gain", vec![n], norm, n);
                add("shift", vec![n], norm + n, n);
            }
        }
    }
    if let Some(scale) = pair.scale {
        names.push(("towers.scale".to_owned(), vec![1], scale..scale + 1));
    }
    names
}

#[cfg(test)]
mod tests {
    use rand_pcg::Pcg64Mcg;
    use rand_pcg::rand_core::{Rng, SeedableRng};
    use xxhash_rust::xxh3::xxh3_64;

    use super::super::logistic;
    use super::*;

    const DEFAULTS: [u64; 4] = [u64::MAX / 7, u64::MAX / 3, u64::MAX / 2, u64::MAX / 5];

    fn features() -> Vec<Feature> {
        let feature = |side, presentation| Feature { side, presentation, key: 0 };
        vec![
            feature(Some(Side::User), false),
            feature(Some(Side::User), false),
            feature(Some(Side::Item), false),
            feature(None, true),
        ]
    }

    fn settings() -> Settings {
        let decay = DecaySettings { per: std::time::Duration::from_secs(10), keep: 0.5, floor: 0.0 };
        Settings {
            dim: 4,
            layers: vec![6, 3],
            embeddings: EmbeddingSettings { decay: Some(decay), ..EmbeddingSettings::default() },
            dense: DenseSettings { rate: 0.02, warm_up: 4, ..DenseSettings::default() },
            ..Settings::default()
        }
    }

    struct Both {
        logistic: Logistic,
        towers: TwoTower,
    }

    impl Both {
        fn new(settings: &Settings, threads: usize) -> Self {
            let checked = settings.check(&features(), 5).unwrap();
            Self {
                logistic: Logistic::new(logistic::Settings::default().check(4, 5).unwrap(), DEFAULTS.to_vec()),
                towers: TwoTower::new(checked, DEFAULTS.to_vec(), threads).unwrap(),
            }
        }

        fn learn(&mut self, batch: u32, examples: &[Example<'_>]) -> Vec<Outcome> {
            let mut outcomes = Vec::new();
            let time = Time(i64::from(batch) * 3000);
            self.towers.learn(&mut self.logistic, batch, time, examples, &mut outcomes).unwrap();
            outcomes
        }

        fn state(&self) -> (logistic::State, State) {
            (self.logistic.state(), self.towers.image().sorted())
        }
    }

    /// Examples with two user features (one of them a bag), one of the item and a position; taste decides.
    struct Stream {
        random: Pcg64Mcg,
    }

    impl Stream {
        fn new(seed: u64) -> Self {
            println!("seed {seed}");
            Self { random: Pcg64Mcg::seed_from_u64(seed) }
        }

        fn below(&mut self, n: u64) -> u64 {
            ((self.random.next_u64() >> 32) * n) >> 32
        }

        fn batch(&mut self, n: usize) -> Vec<(Vec<Slot>, bool)> {
            (0..n).map(|_| self.example()).collect()
        }

        fn example(&mut self) -> (Vec<Slot>, bool) {
            let slot = |feature: u16, value: u64, weight: f32| {
                let row = xxh3_64(&(u64::from(feature) << 32 | value).to_le_bytes());
                Slot { row, value: weight, feature, flags: 0 }
            };
            let (user, item) = (self.below(200), self.below(60));
            let mut slots = vec![slot(0, user, 1.0)];
            let bag = 1 + self.below(3);
            slots.extend((0..bag).map(|_| slot(1, self.below(30), 1.0 / (bag as f32).sqrt())));
            slots.push(slot(2, item, 1.0));
            slots.push(slot(3, self.below(5), 1.0));
            let likes = (user % 2 == item % 2) != (self.below(5) == 0);
            (slots, likes)
        }
    }

    fn examples(drawn: &[(Vec<Slot>, bool)]) -> Vec<Example<'_>> {
        drawn
            .iter()
            .map(|(slots, positive)| Example {
                slots,
                positive: *positive,
                weight: 1.0,
                sampling_offset: 0.0,
                time: Time(0),
                id: 1,
            })
            .collect()
    }

    #[test]
    fn steps_of_the_whole_model_equal_pytorch() {
        // Written by scripts/towers_fixture.py.
        let text = include_str!("../../tests/data/towers/steps.json");
        let cases: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(cases.len() >= 4);
        for case in &cases {
            let row = |v: &serde_json::Value| u64::from_str_radix(v.as_str().unwrap(), 16).unwrap();
            let rows = |v: &serde_json::Value| v.as_array().unwrap().iter().map(row).collect::<Vec<u64>>();
            let numbers = |v: &serde_json::Value| {
                v.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect::<Vec<f32>>()
            };
            let settings: Settings = serde_json::from_value(case["settings"].clone()).unwrap();
            let side = |side| Feature { side, presentation: false, key: 0 };
            let (user, item) = (side(Some(Side::User)), side(Some(Side::Item)));
            let checked = settings.check(&[user, user, item, item, side(None)], 1).unwrap();
            let (ids, params) = (rows(&case["before"]["ids"]), numbers(&case["before"]["params"]));
            let (n, touched) = (vec![0.0; ids.len() * checked.rules().accumulators()], vec![0; ids.len()]);
            let dense = DenseState::new(settings.dense.rule, params.len());
            let before = Rows { ids, w: numbers(&case["before"]["w"]), n, touched };
            let defaults = rows(&case["default_rows"]);
            let state = State { rows: before, params, dense, ..State::default() };
            let rule = logistic::Settings::default().check(5, 5).unwrap();
            let mut model = Both {
                logistic: Logistic::new(rule, defaults.clone()),
                towers: TwoTower::from_state(checked, defaults, 1, state).unwrap(),
            };
            let close = |ours: &[f32], theirs: &[f32], what: &str| {
                assert_eq!(ours.len(), theirs.len(), "{what}");
                for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
                    assert!((a - b).abs() <= 1e-5 * b.abs().max(1.0), "{what} {i}: {a}, PyTorch has {b}; {settings:?}");
                }
            };
            for (number, batch) in case["batches"].as_array().unwrap().iter().enumerate() {
                let slot = |s: &serde_json::Value| Slot {
                    row: row(&s[0]),
                    value: s[1].as_f64().unwrap() as f32,
                    feature: s[2].as_u64().unwrap() as u16,
                    flags: 0,
                };
                let listed = batch["examples"].as_array().unwrap();
                let slots: Vec<Vec<Slot>> =
                    listed.iter().map(|e| e["slots"].as_array().unwrap().iter().map(slot).collect()).collect();
                let examples: Vec<Example<'_>> = listed
                    .iter()
                    .zip(&slots)
                    .map(|(e, slots)| Example {
                        slots,
                        positive: e["positive"].as_bool().unwrap(),
                        weight: e["weight"].as_f64().unwrap() as f32,
                        sampling_offset: 0.0,
                        time: Time(0),
                        id: 1,
                    })
                    .collect();
                let said: Vec<f32> = model.learn(number as u32 + 1, &examples).iter().map(|o| o.logit).collect();
                close(&said, &numbers(&batch["logits"]), "logit");
            }
            let (logistic, towers) = model.state();
            assert_eq!(towers.rows.ids, rows(&case["after"]["ids"]));
            close(&towers.rows.w, &numbers(&case["after"]["w"]), "row weight");
            close(&towers.params, &numbers(&case["after"]["params"]), "parameter");
            close(&logistic.rows.w, &numbers(&case["after"]["logistic_w"]), "logistic weight");
            close(&[logistic.intercept.w as f32], &[case["after"]["intercept"].as_f64().unwrap() as f32], "intercept");
        }
    }

    #[test]
    fn the_number_of_threads_does_not_show() {
        let run = |threads: usize| {
            let (mut model, mut stream) = (Both::new(&settings(), threads), Stream::new(1));
            let mut said = Vec::new();
            for batch in 1..=6 {
                // Several shards, the last of them partly filled.
                let drawn = stream.batch(2 * SHARD + 37 * batch as usize);
                said.extend(model.learn(batch, &examples(&drawn)));
            }
            (said, model.state())
        };
        let one = run(1);
        assert_eq!(one, run(2));
        assert_eq!(one, run(3));
    }

    #[test]
    fn a_model_taken_up_from_its_state_goes_on_as_the_one_it_came_from() {
        for normalize in [false, true] {
            for (rule, dense) in
                [(RowRule::RowWise, optim::DenseRule::Adam), (RowRule::ElementWise, optim::DenseRule::Adagrad)]
            {
                let mut settings = Settings { normalize, layer_norm: normalize, ..settings() };
                settings.embeddings.rule = rule;
                settings.dense.rule = dense;
                let (mut model, mut stream) = (Both::new(&settings, 1), Stream::new(2));
                for batch in 1..=5 {
                    model.learn(batch, &examples(&stream.batch(300)));
                }
                let (logistic, towers) = model.state();
                let checked = settings.check(&features(), 5).unwrap();
                let rule = logistic::Settings::default().check(4, 5).unwrap();
                let mut again = Both {
                    logistic: Logistic::from_state(rule, DEFAULTS.to_vec(), logistic.clone()).unwrap(),
                    towers: TwoTower::from_state(checked, DEFAULTS.to_vec(), 1, towers.clone()).unwrap(),
                };
                assert_eq!(again.state(), (logistic, towers));
                for batch in 6..=9 {
                    let drawn = stream.batch(200);
                    assert_eq!(model.learn(batch, &examples(&drawn)), again.learn(batch, &examples(&drawn)));
                }
                assert_eq!(model.state(), again.state());
            }
        }
    }

    /// One stream learned by the operation of the CPU and by [`DevicePair`] on `device`: the same examples, weights within 1e-4.
    /// Not where outputs are normalised: the item tower says 0 at first, and the direction of next to nothing is all rounding;
    /// the tests of [`DevicePair`] have that.
    fn compare_with(device: &Device) {
        for (layer_norm, activation) in [(false, Activation::Relu), (true, Activation::Tanh)] {
            let dense = DenseSettings { rate: 0.002, ..settings().dense };
            let settings = Settings { layer_norm, activation, dense, ..settings() };
            let (mut here, mut there) = (Both::new(&settings, 2), Both::new(&settings, 2));
            there.towers.on = On::Device(Box::new(DevicePair::new(Arc::clone(&there.towers.pair), device.clone())));
            let mut stream = Stream::new(12);
            for batch in 1..=12 {
                let mut drawn = stream.batch(SHARD + 44);
                drawn[7].0[0].value = f32::NAN;
                let (a, b) = (here.learn(batch, &examples(&drawn)), there.learn(batch, &examples(&drawn)));
                for (a, b) in a.iter().zip(&b) {
                    assert_eq!(a.quarantined, b.quarantined);
                    assert!((a.logit - b.logit).abs() < 1e-4 || a.quarantined, "{} {}", a.logit, b.logit);
                }
                assert!(a[7].quarantined);
            }
            let (a, b) = (here.state().1, there.state().1);
            assert_eq!(
                (&a.rows.ids, &a.rows.touched, a.admission.counts),
                (&b.rows.ids, &b.rows.touched, b.admission.counts)
            );
            let furthest = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let (rows, params) = (furthest(&a.rows.w, &b.rows.w), furthest(&a.params, &b.params));
            println!("furthest apart: {rows:e} in the rows, {params:e} in the layers");
            assert!(rows < 1e-4 && params < 1e-4, "{rows} {params}");
        }
    }

    #[test]
    fn candle_s_operations_learn_what_the_fused_one_learns() {
        compare_with(&Device::Cpu);
    }

    #[test]
    #[cfg_attr(not(feature = "cuda"), ignore = "needs a GPU: scripts/build_cuda.sh test --lib on_a_gpu")]
    fn on_a_gpu_the_examples_are_the_same_and_the_weights_close() {
        // Without a GPU it fails: nothing was compared.
        let device = Device::new_cuda(0).expect("NOT RUN: this test needs a GPU that CUDA can use");
        compare_with(&device);
    }

    #[test]
    fn a_device_that_fails_ends_the_batch_with_its_name_and_what_to_do() {
        let (mut model, mut stream) = (Both::new(&settings(), 1), Stream::new(13));
        model.towers.on = On::Device(Box::new(DevicePair::new(Arc::clone(&model.towers.pair), Device::Cpu)));
        model.towers.params.truncate(5); // no device can compute with these
        let drawn = stream.batch(20);
        let (all, mut outcomes) = (examples(&drawn), Vec::new());
        let failed = model.towers.learn(&mut model.logistic, 7, Time(0), &all, &mut outcomes).unwrap_err().to_string();
        assert!(failed.starts_with("the towers cannot be computed on `cpu`: ") && !failed.contains('\n'), "{failed}");
        assert!(failed.contains("Batch 7 is not learned") && failed.contains("device = \"cpu\""), "{failed}");
        assert_eq!(model.state().0.rows.ids.len(), Both::new(&settings(), 1).state().0.rows.ids.len());
    }

    #[test]
    fn it_starts_as_the_logistic_model_and_leaves_it_where_taste_decides() {
        for normalize in [false, true] {
            let mut stream = Stream::new(3);
            let mut settings = Settings { normalize, ..settings() };
            (settings.dim, settings.layers) = (8, vec![16, 8]);
            (settings.dense.rate, settings.dense.warm_up) = (0.01, 0);
            settings.embeddings = EmbeddingSettings { rate: 0.1, initial: 0.3, ..EmbeddingSettings::default() };
            let mut model = Both::new(&settings, 1);
            let mut plain = Logistic::new(logistic::Settings::default().check(4, 5).unwrap(), DEFAULTS.to_vec());
            let (mut ours, mut theirs) = (0.0, 0.0);
            for batch in 1..=240 {
                let drawn = stream.batch(256);
                let examples = examples(&drawn);
                let said = model.learn(batch, &examples);
                let mut without = Vec::new();
                plain.learn(batch, Time(i64::from(batch) * 3000), &examples, &mut without);
                if batch == 1 {
                    assert_eq!(said, without);
                }
                if batch > 180 {
                    let loss = |said: &[Outcome]| {
                        let of = |(outcome, example): (&Outcome, &Example<'_>)| {
                            let x = f64::from(if example.positive { outcome.logit } else { -outcome.logit });
                            libm::log1p(libm::exp(-x))
                        };
                        said.iter().zip(&examples).map(of).sum::<f64>()
                    };
                    ours += loss(&said);
                    theirs += loss(&without);
                }
            }
            let n = 60.0 * 256.0;
            println!("normalize {normalize}: {} with towers, {} without", ours / n, theirs / n);
            // Labels are noisy by a fifth; users' and items' parities meet only in the product.
            assert!(ours / n < 0.6 && theirs / n > 0.68, "{} {}", ours / n, theirs / n);
        }
    }

    #[test]
    fn a_quarantined_example_is_as_if_it_had_not_been() {
        for how in 0..6 {
            let mut stream = Stream::new(10 + how);
            let (mut with, mut without) = (Both::new(&settings(), 1), Both::new(&settings(), 1));
            for batch in 1..=4 {
                let drawn = stream.batch(120);
                with.learn(batch, &examples(&drawn));
                without.learn(batch, &examples(&drawn));
            }
            let mut drawn = stream.batch(120);
            let clean = examples_without(&drawn, 50);
            // A new id, so a row that must not come to be.
            drawn[50].0[0].row = 0x1234_5678_9abc_def0;
            match how {
                0 => drawn[50].0[0].value = f32::NAN,
                1 => drawn[50].0[2].value = f32::INFINITY,
                2 => drawn[50].0[0].value = 2e6,
                3 => drawn[50].0[0].row = 0,
                4 => drawn[50].0.iter_mut().for_each(|slot| slot.value = 9e5),
                _ => {}
            }
            let mut all = examples(&drawn);
            if how == 5 {
                all[50].weight = f32::NAN;
            }
            let mut said = with.learn(5, &all);
            assert!(said.remove(50).quarantined, "{how}");
            let expected = without.learn(5, &examples(&clean));
            let (a, b) = (with.state(), without.state());
            assert_eq!(a.1.rows.ids, b.1.rows.ids);
            assert_eq!((a.1.rows.touched, &a.0.rows.ids), (b.1.rows.touched, &b.0.rows.ids));
            // An example more in a shard shifts which of its sums `gemm` makes together, so the last bits may differ.
            let close = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
            assert!(
                close(&a.1.rows.w, &b.1.rows.w) && close(&a.1.params, &b.1.params) && close(&a.0.rows.w, &b.0.rows.w)
            );
            assert!(said.iter().zip(&expected).all(|(a, b)| (a.logit - b.logit).abs() < 1e-5));
        }
    }

    fn examples_without(drawn: &[(Vec<Slot>, bool)], at: usize) -> Vec<(Vec<Slot>, bool)> {
        let mut rest = drawn.to_vec();
        rest.remove(at);
        rest
    }

    #[test]
    fn an_unknown_id_counts_as_its_feature_s_default_row_which_learns_from_it() {
        let (mut model, mut stream) = (Both::new(&settings(), 1), Stream::new(4));
        for batch in 1..=8 {
            model.learn(batch, &examples(&stream.batch(256)));
        }
        let known = stream.batch(1);
        let (mut unknown, mut default) = (known.clone(), known.clone());
        unknown[0].0[0].row = 0xabcd_ef01_2345_6789;
        default[0].0[0].row = DEFAULTS[0];
        assert_eq!(model.towers.product(&unknown[0].0), model.towers.product(&default[0].0));
        let row = |model: &Both, id: u64| model.towers.table.row(model.towers.table.find(id)).to_vec();
        let (before, other) = (row(&model, DEFAULTS[0]), row(&model, DEFAULTS[2]));
        model.learn(9, &examples(&unknown));
        assert_ne!(row(&model, DEFAULTS[0]), before);
        assert_eq!(row(&model, DEFAULTS[2]), other, "the item was known");
        let mut first = vec![0.0; 4];
        model.towers.table.rules().begin(0xabcd_ef01_2345_6789, &mut first);
        assert_ne!(row(&model, 0xabcd_ef01_2345_6789), first, "the new row learned too");
    }

    #[test]
    fn a_row_goes_when_no_example_has_named_it_for_long() {
        let mut settings = settings();
        settings.table.expire_after = Some(std::time::Duration::from_secs(80));
        let (mut model, mut stream) = (Both::new(&settings, 1), Stream::new(8));
        let once = stream.batch(1);
        model.learn(1, &examples(&once)); // at 3 s, in the eighth of 0 to 10 s
        let there = |model: &Both| model.towers.table.find(once[0].0[0].row) != Place::NONE;
        let other: Vec<_> =
            stream.batch(64).into_iter().filter(|(slots, _)| slots[0].row != once[0].0[0].row).collect();
        for batch in 2..=29 {
            model.learn(batch, &examples(&other));
            assert!(there(&model), "batch {batch}");
        }
        assert_eq!(model.towers.ids().expired, 0);
        model.learn(30, &examples(&other)); // at 90 s
        assert!(!there(&model));
        assert!(model.towers.ids().expired >= 1);
        assert_eq!(model.towers.product(&once[0].0), {
            let mut unknown = once.clone();
            unknown[0].0[0].row = 0x0123_4567_89ab_cdef;
            model.towers.product(&unknown[0].0)
        });
    }

    #[test]
    fn a_table_stays_within_its_capacity_and_keeps_what_was_touched_last() {
        let mut settings = settings();
        settings.table.capacity = Some(1024);
        let mut model = Both::new(&settings, 1);
        let mut drawn = Stream::new(9).batch(200);
        let mut next = 0;
        for batch in 1..=40 {
            for (slots, _) in &mut drawn {
                next += 1;
                slots[0].row = xxh3_64(&(1u64 << 40 | next).to_le_bytes());
            }
            model.learn(batch, &examples(&drawn));
            assert!(model.towers.rows() <= 1024, "{}", model.towers.rows());
            let newest = drawn.iter().all(|(slots, _)| model.towers.table.find(slots[0].row) != Place::NONE);
            assert!(newest, "the rows of batch {batch} stay");
        }
        let counts = model.towers.ids();
        assert!(counts.admitted > 8000 && counts.evicted > 6900, "{counts:?}");
        assert_eq!(counts.admitted - counts.evicted + 3, model.towers.rows() as u64);
        // The default rows are there, whatever their age.
        for (feature, row) in DEFAULTS[..3].iter().enumerate() {
            assert_eq!(model.towers.table.find(*row), model.towers.defaults[feature]);
        }
    }

    #[test]
    fn admission_by_chance_depends_on_ids_alone() {
        let mut settings = settings();
        settings.table.admit = 0.25;
        let run = |threads, seed| {
            let (mut model, mut stream) = (Both::new(&settings, threads), Stream::new(seed));
            let drawn = stream.batch(600);
            let mut all = examples(&drawn);
            all.iter_mut().enumerate().for_each(|(i, example)| example.id = 77 + i as u64);
            model.learn(1, &all);
            model
        };
        let (one, two) = (run(1, 11), run(2, 11));
        assert_eq!(one.state(), two.state());
        let counts = one.towers.ids();
        let mut distinct: Vec<u64> = Stream::new(11)
            .batch(600)
            .iter()
            .flat_map(|(slots, _)| slots[..slots.len() - 1].to_vec())
            .map(|slot| slot.row)
            .collect();
        let occurrences = distinct.len() as f64;
        distinct.sort_unstable();
        distinct.dedup();
        // Three of four occurrences are refused; of rows that come often most get in all the same.
        assert!((counts.refused as f64 / occurrences - 0.75).abs() < 0.05, "{counts:?} of {occurrences}");
        assert!(counts.admitted < distinct.len() as u64 && counts.admitted > distinct.len() as u64 / 4, "{counts:?}");
    }

    /// Settings under which ids come, wait and go, in both tables.
    fn crowded() -> (Settings, logistic::Settings) {
        let second = std::time::Duration::from_secs(1);
        let count = admission::CountSettings { occurrences: 3, bytes: 1 << 12, per: second * 20 };
        let table = admission::Settings {
            admit: 0.8,
            count: Some(count),
            expire_after: Some(second * 16),
            capacity: Some(1024),
        };
        (Settings { table: table.clone(), ..settings() }, logistic::Settings { table, ..logistic::Settings::default() })
    }

    /// A batch in which a user's id is new in three of four examples, and comes four times.
    fn crowd(stream: &mut Stream, batch: u32) -> Vec<(Vec<Slot>, bool)> {
        let mut drawn = stream.batch(600);
        for (i, (slots, _)) in (0u32..).zip(&mut drawn).filter(|(i, _)| i % 4 != 0) {
            let new = batch * 150 + i / 4 - i % 4 * 150;
            slots[0].row = xxh3_64(&(1u64 << 40 | u64::from(new)).to_le_bytes());
        }
        drawn
    }

    fn both(settings: &(Settings, logistic::Settings), threads: usize) -> Both {
        let checked = settings.0.check(&features(), 5).unwrap();
        Both {
            logistic: Logistic::new(settings.1.check(4, 5).unwrap(), DEFAULTS.to_vec()),
            towers: TwoTower::new(checked, DEFAULTS.to_vec(), threads).unwrap(),
        }
    }

    #[test]
    fn admission_by_count_follows_the_order_of_the_examples_and_goes_on_from_a_stored_state() {
        let settings = crowded();
        let (mut one, mut two, mut stream) = (both(&settings, 1), both(&settings, 3), Stream::new(14));
        for batch in 5..=30 {
            let drawn = crowd(&mut stream, batch);
            let mut all = examples(&drawn);
            all.iter_mut().zip(1000..).for_each(|(example, id)| example.id = id);
            assert_eq!(one.learn(batch, &all), two.learn(batch, &all), "batch {batch}");
            if batch % 7 == 0 {
                let (logistic, towers) = two.state();
                let checked = settings.0.check(&features(), 5).unwrap();
                two = Both {
                    logistic: Logistic::from_state(settings.1.check(4, 5).unwrap(), DEFAULTS.to_vec(), logistic)
                        .unwrap(),
                    towers: TwoTower::from_state(checked, DEFAULTS.to_vec(), 2, towers).unwrap(),
                };
            }
        }
        assert_eq!(one.state(), two.state());
        for ids in [one.logistic.ids(), one.towers.ids()] {
            assert!(ids.admitted > 500 && ids.refused > 5000 && ids.expired > 100, "{ids:?}");
        }
        let changed = |change: fn(&mut State)| {
            let mut state = one.state().1;
            change(&mut state);
            let digest = |state: &State| {
                let mut hash = Xxh3::new();
                state.add_to(&mut hash);
                hash.digest128()
            };
            digest(&state) != digest(&one.state().1)
        };
        assert!(changed(|s| s.admission.counter = None));
    }

    #[test]
    fn the_log_of_changes_says_what_a_comparison_of_the_whole_tables_says() {
        let mut settings = crowded();
        (settings.0.table.count, settings.0.table.admit) = (None, 1.0);
        let (mut ours, mut plain, mut stream) = (both(&settings, 2), both(&settings, 1), Stream::new(15));
        assert_eq!(ours.towers.changes_after(0), None, "off until it is asked for");
        ours.towers.mark(0);
        let (mut states, mut removed, mut back) = (vec![(0, ours.state().1.rows)], 0, 0);
        for batch in 5..=40 {
            let drawn = crowd(&mut stream, batch);
            assert_eq!(ours.learn(batch, &examples(&drawn)), plain.learn(batch, &examples(&drawn)));
            if batch % 3 == 0 {
                ours.towers.mark(batch);
                states.push((batch, ours.state().1.rows));
            }
            let now = ours.state().1;
            for (then, before) in &states {
                let changes = ours.towers.changes_after(*then).unwrap();
                assert_eq!(changes.params, now.params);
                let Changes { embedding: changes::Changes { rows, removed: gone }, .. } = changes;
                let touched: Vec<usize> = (0..now.rows.ids.len()).filter(|&i| now.rows.touched[i] > *then).collect();
                assert_eq!(rows.ids, touched.iter().map(|&i| now.rows.ids[i]).collect::<Vec<_>>());
                assert_eq!(
                    rows.w,
                    touched.iter().flat_map(|&i| &now.rows.w[i * 4..][..4]).copied().collect::<Vec<_>>()
                );
                let missing = before.ids.iter().filter(|id| now.rows.ids.binary_search(id).is_err());
                assert_eq!(gone, missing.copied().collect::<Vec<_>>(), "since {then} at {batch}");
                removed += gone.len();
                back += rows.ids.iter().filter(|id| before.ids.binary_search(id).is_ok()).count();
            }
            if states.len() > 4 {
                let (first, _) = states.remove(0);
                ours.towers.forget_changes_to(states[0].0);
                assert_eq!(ours.towers.changes_after(first), None, "{first} was forgotten");
            }
        }
        assert!(removed > 1000 && back > 1000, "{removed} {back}");
        assert_eq!(ours.state(), plain.state(), "the log does not show");
    }

    #[test]
    fn a_shared_vector_learns_from_both_towers() {
        const KEY: u64 = 0x0123_4567_89ab_cdef;
        // A user's bag holds items; the same vectors under another row.
        let mut shared = features();
        shared[1].key = KEY;
        let settings = Settings {
            activation: Activation::Tanh,
            embeddings: EmbeddingSettings { initial: 0.4, ..EmbeddingSettings::default() },
            ..settings()
        };
        let checked = settings.check(&shared, 5).unwrap();
        let mut defaults = DEFAULTS.to_vec();
        defaults[1] = DEFAULTS[2] ^ KEY;
        let mut model = Both {
            logistic: Logistic::new(logistic::Settings::default().check(4, 5).unwrap(), defaults.clone()),
            towers: TwoTower::new(checked, defaults.clone(), 1).unwrap(),
        };
        let mut stream = Stream::new(16);
        let item = |value: u64| xxh3_64(&(2u64 << 32 | value).to_le_bytes());
        for batch in 1..=6 {
            let mut drawn = stream.batch(200);
            let bags = drawn.iter_mut().flat_map(|(slots, _)| slots).filter(|slot| slot.feature == 1);
            bags.for_each(|slot| slot.row = item(slot.row % 60) ^ KEY);
            model.learn(batch, &examples(&drawn));
        }
        let ids = model.state().1.rows.ids;
        assert!(!ids.iter().any(|id| (0..60).any(|i| *id == item(i) ^ KEY)), "the bag has no vectors of its own");
        let weights = model.logistic.state().rows.ids;
        assert!((0..60).filter(|i| weights.contains(&(item(*i) ^ KEY))).count() > 15, "but weights");

        // One example that names the item in both towers: the step follows the gradient of the whole.
        let (id, place) = (item(7), model.towers.table.find(item(7)));
        let slot = |row, value, feature| Slot { row, value, feature, flags: 0 };
        let (own, bag) = (slot(id, 1.0, 2), slot(id ^ KEY, 0.6, 1));
        let slots = [slot(xxh3_64(&9u64.to_le_bytes()), 1.0, 0), bag, own, slot(5, 1.0, 3)];
        let before = model.state().1;
        let at = before.rows.ids.binary_search(&id).unwrap();
        let (row, n) = (&before.rows.w[at * 4..][..4], before.rows.n[at]);
        assert_eq!(row, model.towers.table.row(place));
        let moved = |i: usize, by: f32| {
            let mut state = before.clone();
            state.rows.w[at * 4 + i] += by;
            let checked = settings.check(&shared, 5).unwrap();
            TwoTower::from_state(checked, defaults.clone(), 1, state).unwrap().product(&slots)
        };
        let slope: Vec<f32> = (0..4).map(|i| (moved(i, 4e-3) - moved(i, -4e-3)) / 8e-3).collect();
        let outcome = model.learn(7, &[example_of(&slots)])[0];
        let g: Vec<f32> = slope.iter().map(|s| s * outcome.gradient).collect();
        let square = g.iter().map(|g| g * g).sum::<f32>() / 4.0;
        let rested = 0.5f32.powi((7 * 3 / 10) - (before.rows.touched[at] as i32 * 3 / 10)) * n;
        let step = settings.embeddings.rate / (0.01 + rested + square).sqrt();
        let after = model.towers.table.row(model.towers.table.find(id));
        for i in 0..4 {
            let (expected, found) = (-step * g[i], after[i] - row[i]);
            assert!((expected - found).abs() < 0.02 * step * square.sqrt() + 1e-6, "{i}: {found}, expected {expected}");
        }
        assert!(square > 1e-8, "{g:?}");
    }

    fn example_of(slots: &[Slot]) -> Example<'_> {
        Example { slots, positive: true, weight: 1.0, sampling_offset: 0.0, time: Time(0), id: 1 }
    }

    #[test]
    fn without_the_wide_part_only_presentation_features_have_weights() {
        let (mut model, mut stream) = (Both::new(&Settings { wide: false, ..settings() }, 1), Stream::new(6));
        let drawn = stream.batch(300);
        model.learn(1, &examples(&drawn));
        let mut positions: Vec<u64> = drawn.iter().map(|(slots, _)| slots[slots.len() - 1].row).collect();
        positions.push(DEFAULTS[3]);
        positions.sort_unstable();
        positions.dedup();
        assert_eq!(model.state().0.rows.ids, positions);
    }

    #[test]
    fn the_digest_sees_every_part_of_the_state() {
        let (mut model, mut stream) = (Both::new(&settings(), 1), Stream::new(7));
        model.learn(1, &examples(&stream.batch(300)));
        let state = model.state().1;
        let digest = |state: &State| {
            let mut hash = Xxh3::new();
            state.add_to(&mut hash);
            hash.digest128()
        };
        let changed = |change: fn(&mut State)| {
            let mut state = state.clone();
            change(&mut state);
            digest(&state) != digest(&model.state().1)
        };
        assert!(!changed(|_| ()));
        assert!(changed(|s| s.rows.ids[1] += 1));
        assert!(changed(|s| s.rows.w[3] += 1e-3));
        assert!(changed(|s| s.rows.n[0] += 1e-3));
        assert!(changed(|s| s.rows.touched[0] += 1));
        assert!(changed(|s| s.params[0] += 1e-3));
        assert!(changed(|s| s.dense.mean[0] += 1e-3));
        assert!(changed(|s| s.dense.square[0] += 1e-3));
        assert!(changed(|s| s.dense.examples += 1));
        assert!(changed(|s| s.skipped += 1));
        assert!(changed(|s| s.periods[0].1 += 1));
        assert!(changed(|s| s.admission.eighths.push((1, 1))));
        assert!(changed(|s| s.admission.counts.evicted += 1));
        assert!(changed(|s| s.admission.counts.refused += 1));
    }

    #[test]
    fn a_wrong_setting_is_named_with_its_value() {
        let refused = |text: &str| match toml::from_str::<Settings>(text) {
            Ok(settings) => settings.check(&features(), 1).unwrap_err().to_string(),
            Err(error) => error.to_string(),
        };
        assert_eq!(refused("dim = 0"), "`model.two_tower.dim` must be 1 to 256, got 0");
        assert!(refused("layers = []").starts_with("`model.two_tower.layers` must be 1 to 4 numbers"));
        assert!(refused("layers = [1, 2, 3, 4, 5]").starts_with("`model.two_tower.layers`"));
        assert!(refused("device = \"gpu\"").starts_with("`model.two_tower.device` must be `cpu`, `cuda:N`"));
        if !cfg!(feature = "cuda") {
            let said = refused("device = \"cuda:0\"");
            assert!(said.contains("this build has no CUDA") && said.ends_with("got cuda:0"), "{said}");
        }
        assert!(refused("embeddings = { n0 = 0 }").starts_with("`model.two_tower.embeddings.n0`"));
        assert!(
            refused("embeddings = { decay = { keep = 2 } }").starts_with("`model.two_tower.embeddings.decay.keep`")
        );
        assert!(refused("table = { admit = 0 }").starts_with("`model.two_tower.table.admit` must be above 0"));
        assert!(
            refused("table = { capacity = 5 }").starts_with("`model.two_tower.table.capacity` must be at least 1024")
        );
        assert!(refused("table = { expire_after = \"1ms\" }").contains("expire_after` must be at least 8ms, got 1ms"));
        assert!(refused("dense = { rate = 2 }").starts_with("`model.two_tower.dense.rate`"));
        assert!(refused("lr = 1").contains("unknown field `lr`"));
        let one_sided = Settings::default().check(&features()[..2], 1).unwrap_err().to_string();
        assert!(one_sided.ends_with("two_tower with 2 of the user, 0 of the item"), "{one_sided}");
        let mut seen = features();
        seen[3].side = Some(Side::Item);
        assert!(Settings::default().check(&seen, 1).unwrap_err().to_string().contains("presentation"));
    }
}
