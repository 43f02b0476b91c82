//! Progressive validation: every example is scored before the model learns from it, so these are the metrics of a model
//! of age zero, on data that it has never seen. What serves is older, and a little worse.
//!
//! All sums are f64 in the order of the examples, so equal streams give equal bytes. A negative that was kept at rate r
//! counts 1/r times its weight, so every figure is about the whole stream.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::{Example, Time};
use crate::model::logistic::Outcome;

/// The histogram for AUC covers logits of -16 to 16 in bins of 1/256; what lies beyond enters the outermost bins.
const BINS: usize = 8192;
const FIRST_BIN: f32 = -16.0;
const BINS_PER_LOGIT: f32 = 256.0;
/// First word of an exported state.
const FORMAT: u64 = 0x7072_6f67_0000_0001;

/// The `[metrics]` part of the config.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Length of the windows of event time that metrics are also given for, each aligned to a multiple of it. Default 1h.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { window: Duration::from_secs(60 * 60) }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`metrics.window` must be at least 1ms, got {0:?}")]
    Window(Duration),
    #[error("the stored metrics do not fit: {0}; they are damaged or of another version, take an older checkpoint")]
    State(&'static str),
}

/// Metrics of a set of examples. `None` where the set does not define them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    pub examples: u64,
    pub positives: u64,
    /// Sum of weights; the number of impressions that the examples stand for.
    pub weight: f64,
    /// Weighted share of positives.
    pub ctr: Option<f64>,
    /// Mean of -ln p(label), weighted, in nats.
    pub logloss: Option<f64>,
    /// Log loss over the entropy of `ctr`: below 1 is better than the best constant (He et al., ADKDD 2014).
    pub normalised_entropy: Option<f64>,
    /// Probability that a positive scores above a negative, equal scores half.
    pub auc: Option<f64>,
    /// `auc` is off by no more than this: half the weight of the pairs that share a bin of the histogram (1/256 of
    /// a logit; one bin each below -16 and above 16).
    pub auc_error: Option<f64>,
    /// Clicks predicted over clicks seen.
    pub calibration: Option<f64>,
}

/// Metrics of the examples with `start <= time < end`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Window {
    pub start: Time,
    pub end: Time,
    pub metrics: Metrics,
}

/// The metrics so far.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Report {
    /// Of all examples.
    pub cumulative: Metrics,
    /// Of the window that is still open.
    pub open: Option<Window>,
}

#[derive(Clone, PartialEq)]
pub(super) struct Sums {
    examples: u64,
    positives: u64,
    weight: f64,
    clicks: f64,
    predicted: f64,
    loss: f64,
    /// The loss of examples of weight 1 holds `ln(1 + e)`; here is the product of those `1 + e` that are not in `loss` yet.
    product: f64,
    /// Weights of negatives and positives by logit.
    bins: Vec<[f64; 2]>,
}

impl Sums {
    pub(super) fn new() -> Self {
        let (weight, clicks, predicted, loss, product) = (0.0, 0.0, 0.0, 0.0, 1.0);
        Self { examples: 0, positives: 0, weight, clicks, predicted, loss, product, bins: vec![[0.0; 2]; BINS] }
    }

    /// Takes a score with its label; `weight` says how many impressions it stands for.
    pub(super) fn observe(&mut self, outcome: &Outcome, positive: bool, weight: f64) {
        let Outcome { logit, e, .. } = *outcome;
        let (x, e) = (f64::from(logit), f64::from(e));
        let p = if x >= 0.0 { 1.0 } else { e } / (1.0 + e);
        let wrong = if positive { -x } else { x };
        let clicked = u64::from(positive);

        // -ln p(label) is max(wrong, 0) + ln(1 + e).
        self.examples += 1;
        self.positives += clicked;
        self.weight += weight;
        self.clicks += weight * clicked as f64;
        self.predicted += weight * p;
        self.loss += weight * wrong.max(0.0);
        if weight == 1.0 {
            // One logarithm for many examples; each factor is at most 2, so nothing overflows.
            self.product *= 1.0 + e;
            if self.product > 1e300 {
                self.loss += libm::log(self.product);
                self.product = 1.0;
            }
        } else {
            self.loss += weight * libm::log1p(e);
        }
        // The cast saturates, so what lies outside enters the outermost bins.
        let bin = (((logit - FIRST_BIN) * BINS_PER_LOGIT) as usize).min(BINS - 1);
        self.bins[bin][usize::from(positive)] += weight;
    }

    fn add(&mut self, other: &Self) {
        self.examples += other.examples;
        self.positives += other.positives;
        self.weight += other.weight;
        self.clicks += other.clicks;
        self.predicted += other.predicted;
        self.loss += other.loss + libm::log(other.product);
        for (sum, more) in self.bins.iter_mut().zip(&other.bins) {
            sum[0] += more[0];
            sum[1] += more[1];
        }
    }

    pub(super) fn metrics(&self) -> Metrics {
        let over = |sum: f64, by: f64| (by > 0.0).then(|| sum / by);
        let ctr = over(self.clicks, self.weight);
        let logloss = over(self.loss + libm::log(self.product), self.weight);
        let entropy = ctr
            .filter(|ctr| *ctr > 0.0 && *ctr < 1.0)
            .map(|ctr| -ctr * libm::log(ctr) - (1.0 - ctr) * libm::log1p(-ctr));
        let (mut negatives, mut positives, mut above, mut shared) = (0.0, 0.0, 0.0, 0.0);
        for &[negative, positive] in &self.bins {
            above += positive * negatives;
            shared += positive * negative;
            negatives += negative;
            positives += positive;
        }
        let pairs = positives * negatives;
        Metrics {
            examples: self.examples,
            positives: self.positives,
            weight: self.weight,
            ctr,
            logloss,
            normalised_entropy: logloss.zip(entropy).map(|(loss, entropy)| loss / entropy),
            auc: over(above + shared / 2.0, pairs),
            auc_error: over(shared / 2.0, pairs),
            calibration: over(self.predicted, self.clicks),
        }
    }

    pub(super) fn export(&self, words: &mut Vec<u64>) {
        words.extend([self.examples, self.positives]);
        words.extend([self.weight, self.clicks, self.predicted, self.loss, self.product].map(f64::to_bits));
        let used = || self.bins.iter().enumerate().filter(|(_, bin)| **bin != [0.0; 2]);
        words.push(used().count() as u64);
        words.extend(used().flat_map(|(at, bin)| [at as u64, bin[0].to_bits(), bin[1].to_bits()]));
    }

    pub(super) fn import(words: &mut impl Iterator<Item = u64>) -> Result<Self, Error> {
        let mut next = || words.next().ok_or(Error::State("they end early"));
        let mut sums = Self::new();
        (sums.examples, sums.positives) = (next()?, next()?);
        for sum in [&mut sums.weight, &mut sums.clicks, &mut sums.predicted, &mut sums.loss, &mut sums.product] {
            *sum = f64::from_bits(next()?);
        }
        for _ in 0..next()? {
            let bin = sums.bins.get_mut(next()? as usize).ok_or(Error::State("a bin lies outside of the histogram"))?;
            *bin = [f64::from_bits(next()?), f64::from_bits(next()?)];
        }
        Ok(sums)
    }
}

/// Takes scores with their labels, in order, and keeps the metrics of all of them and of windows of event time.
pub struct Progressive {
    window_ms: i64,
    /// All closed windows together.
    closed: Sums,
    open: Sums,
    /// Which multiple of the window is open.
    index: Option<i64>,
    finished: Vec<Window>,
    /// The offset seen last and its exponential, 1/r: it hardly ever changes.
    offset: (f32, f64),
}

impl Progressive {
    pub fn new(settings: &Settings) -> Result<Self, Error> {
        let window_ms = i64::try_from(settings.window.as_millis()).unwrap_or(0);
        if window_ms == 0 {
            return Err(Error::Window(settings.window));
        }
        let (closed, open) = (Sums::new(), Sums::new());
        Ok(Self { window_ms, closed, open, index: None, finished: Vec::new(), offset: (0.0, 1.0) })
    }

    /// Counts what the model said of an example before it learned from it; a quarantined one does not count. Windows follow
    /// `example.time`, which must not fall: an example from before the open window counts into that.
    pub fn observe(&mut self, outcome: &Outcome, example: &Example<'_>) {
        if outcome.quarantined {
            return;
        }
        let index = example.time.0.div_euclid(self.window_ms);
        if self.index.is_none_or(|open| open < index) {
            self.close();
            self.index = Some(index);
        }
        let mut weight = f64::from(example.weight);
        if !example.positive && example.sampling_offset != 0.0 {
            if example.sampling_offset != self.offset.0 {
                self.offset = (example.sampling_offset, libm::exp(f64::from(example.sampling_offset)));
            }
            weight *= self.offset.1;
        }
        self.open.observe(outcome, example.positive, weight);
    }

    fn close(&mut self) {
        if let Some(window) = self.open_window() {
            self.finished.push(window);
            self.closed.add(&self.open);
            self.open = Sums::new();
        }
    }

    fn open_window(&self) -> Option<Window> {
        let start = self.index?.saturating_mul(self.window_ms);
        let end = start.saturating_add(self.window_ms);
        Some(Window { start: Time(start), end: Time(end), metrics: self.open.metrics() })
    }

    /// The metrics so far.
    #[must_use]
    pub fn report(&self) -> Report {
        let mut all = self.closed.clone();
        all.add(&self.open);
        Report { cumulative: all.metrics(), open: self.open_window() }
    }

    /// The windows that were closed since the last call, oldest first. A window without examples does not appear.
    pub fn take_closed_windows(&mut self) -> Vec<Window> {
        std::mem::take(&mut self.finished)
    }

    /// All that later metrics depend on, exactly. Closed windows that were not taken are not part of it: take them first.
    #[must_use]
    pub fn export(&self) -> Vec<u64> {
        let mut words = vec![FORMAT, self.window_ms as u64, u64::from(self.index.is_some())];
        words.push(self.index.unwrap_or(0) as u64);
        self.closed.export(&mut words);
        self.open.export(&mut words);
        words
    }

    /// Goes on from exported words. A window length other than the stored one is refused: it is part of the state.
    pub fn import(settings: &Settings, words: &[u64]) -> Result<Self, Error> {
        let mut made = Self::new(settings)?;
        let mut words = words.iter().copied();
        let mut next = || words.next().ok_or(Error::State("they end early"));
        if next()? != FORMAT {
            return Err(Error::State("unknown format"));
        }
        if next()? != made.window_ms as u64 {
            return Err(Error::State("`metrics.window` was another when they were stored"));
        }
        let (open, index) = (next()?, next()? as i64);
        made.index = (open == 1).then_some(index);
        made.closed = Sums::import(&mut words)?;
        made.open = Sums::import(&mut words)?;
        match words.next() {
            None => Ok(made),
            Some(_) => Err(Error::State("something follows their end")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MINUTE: Settings = Settings { window: Duration::from_secs(60) };

    fn outcome(logit: f32) -> Outcome {
        Outcome { logit, e: libm::expf(-logit.abs()), gradient: 0.0, quarantined: false }
    }

    fn example(positive: bool, weight: f32, sampling_offset: f32, time: i64) -> Example<'static> {
        Example { slots: &[], positive, weight, sampling_offset, time: Time(time), id: 1 }
    }

    /// (logit, positive, weight, offset, milliseconds since the last)
    fn stream() -> impl Strategy<Value = Vec<(f32, bool, f32, f32, i64)>> {
        let logit = prop_oneof![6 => -6.0f32..3.0, 1 => -30.0f32..30.0, 1 => Just(-1.5f32)];
        let offset = prop_oneof![2 => Just(0.0f32), 1 => Just(libm::logf(10.0))];
        let weight = prop_oneof![Just(1.0f32), 0.5f32..2.0];
        prop::collection::vec((logit, any::<bool>(), weight, offset, 0i64..20_000), 2..200)
    }

    fn exact_auc(scored: &[(f64, bool, f64)]) -> Option<f64> {
        let (mut above, mut pairs) = (0.0, 0.0);
        for (x, _, w) in scored.iter().filter(|s| s.1) {
            for (y, _, v) in scored.iter().filter(|s| !s.1) {
                pairs += w * v;
                above += w
                    * v
                    * if x > y {
                        1.0
                    } else if x == y {
                        0.5
                    } else {
                        0.0
                    };
            }
        }
        (pairs > 0.0).then(|| above / pairs)
    }

    proptest! {
        #[test]
        fn metrics_equal_their_definitions_over_all_and_over_each_window(stream in stream(), cut in any::<prop::sample::Index>()) {
            let mut progressive = Progressive::new(&MINUTE).unwrap();
            let (mut time, mut windows) = (-100_000, Vec::new());
            let mut scored: Vec<(i64, f64, bool, f64)> = Vec::new();
            let cut = cut.index(stream.len());
            for (i, &(logit, positive, weight, offset, passed)) in stream.iter().enumerate() {
                if i == cut {
                    windows.extend(progressive.take_closed_windows());
                    let words = progressive.export();
                    progressive = Progressive::import(&MINUTE, &words).unwrap();
                    prop_assert_eq!(progressive.export(), words);
                }
                time += passed;
                progressive.observe(&outcome(logit), &example(positive, weight, offset, time));
                let kept = if positive { 1.0 } else { libm::exp(f64::from(offset)) };
                scored.push((time, f64::from(logit), positive, f64::from(weight) * kept));
            }
            let report = progressive.report();
            windows.extend(progressive.take_closed_windows());
            windows.extend(report.open);
            let end = i64::MAX;
            let all = std::iter::once((i64::MIN, end, report.cumulative));
            let mut counted = 0;
            for (start, end, ours) in all.chain(windows.iter().map(|w| (w.start.0, w.end.0, w.metrics))) {
                let mine: Vec<_> = scored.iter().filter(|s| (start..end).contains(&s.0)).map(|&(_, x, y, w)| (x, y, w)).collect();
                prop_assert_eq!(ours.examples, mine.len() as u64);
                counted += ours.examples;
                let sum = |f: &dyn Fn(f64, bool) -> f64| mine.iter().map(|&(x, y, w)| w * f(x, y)).sum::<f64>();
                let sigmoid = |x: f64| 1.0 / (1.0 + libm::exp(-x));
                let (weight, clicks) = (sum(&|_, _| 1.0), sum(&|_, y| f64::from(u8::from(y))));
                let loss = sum(&|x, y| libm::log1p(libm::exp(if y { -x } else { x })));
                let close = |ours: Option<f64>, exact: f64| (ours.unwrap() - exact).abs() < 1e-6 * exact.abs().max(1e-3);
                prop_assert!(close(Some(ours.weight), weight) && close(ours.ctr, clicks / weight));
                prop_assert!(close(ours.logloss, loss / weight), "{:?} against {}", ours.logloss, loss / weight);
                match exact_auc(&mine) {
                    Some(exact) => {
                        let (auc, error) = (ours.auc.unwrap(), ours.auc_error.unwrap());
                        prop_assert!((auc - exact).abs() <= error + 1e-12, "{} against {} +- {}", auc, exact, error);
                        let ctr = clicks / weight;
                        let entropy = -(ctr * libm::log(ctr) + (1.0 - ctr) * libm::log(1.0 - ctr));
                        prop_assert!(close(ours.normalised_entropy, loss / weight / entropy));
                    }
                    None => prop_assert!(ours.auc.is_none() && ours.normalised_entropy.is_none()),
                }
                if clicks > 0.0 {
                    prop_assert!(close(ours.calibration, sum(&|x, _| sigmoid(x)) / clicks));
                }
            }
            prop_assert_eq!(counted, 2 * stream.len() as u64, "every example is in exactly one window");
            prop_assert!(windows.is_sorted_by(|a, b| a.end <= b.start && a.start.0 % 60_000 == 0));
        }
    }

    #[test]
    fn nothing_observed_defines_no_metric() {
        let mut progressive = Progressive::new(&MINUTE).unwrap();
        progressive
            .observe(&Outcome { logit: 0.0, e: 1.0, gradient: 0.0, quarantined: true }, &example(true, 1.0, 0.0, 5));
        assert_eq!(progressive.report(), Report { cumulative: Metrics::default(), open: None });
        assert!(progressive.take_closed_windows().is_empty());
    }

    #[test]
    fn damaged_words_are_refused() {
        let mut progressive = Progressive::new(&MINUTE).unwrap();
        progressive.observe(&outcome(0.5), &example(true, 1.0, 0.0, 5));
        let words = progressive.export();
        let refused =
            |settings: &Settings, words: &[u64]| Progressive::import(settings, words).err().unwrap().to_string();
        assert!(refused(&MINUTE, &words[..words.len() - 1]).contains("end early"));
        assert!(refused(&MINUTE, &[&words[..], &[0]].concat()).contains("something follows"));
        assert!(refused(&Settings::default(), &words).contains("`metrics.window` was another"));
        assert!(refused(&MINUTE, &[&[1], &words[1..]].concat()).contains("unknown format"));
        assert!(Progressive::new(&Settings { window: Duration::ZERO }).is_err());
    }
}
