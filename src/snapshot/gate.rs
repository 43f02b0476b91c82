//! Whether a new version may be named: it must not be worse than the one before it on the same fresh examples. Pure.
//!
//! Two scores of each example of a sample are compared: what the trainer's model said before it learned from it, and what the
//! version published last says, which is what the fleet serves meanwhile. Both have not seen the example, so the difference of
//! their losses is a paired test of what would replace what. That the older one is a little behind is in the candidate's
//! favour: a candidate that is worse all the same has learned something wrong.

use serde::{Deserialize, Serialize};

use super::{Error, Result};

/// `[gate]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Most examples that are compared, a sample of all since the version before. 0: no gate. Default 20000.
    pub examples: usize,
    /// With fewer clicks among them only form is checked, and the manifest says so. At least 1. Default 100.
    pub positives: u64,
    /// A version is held when its log loss is greater by more than this share of that of the version before. Default 0.01.
    pub margin: f64,
    /// How certain that must be, one-sided; 0.5 to 1, both exclusive. Default 0.99.
    pub confidence: f64,
    /// A version is held when clicks predicted over clicks seen leave this band, and lie further from 1 than those of the
    /// version before. Default [0.5, 2.0].
    pub calibration: [f64; 2],
    /// A version is held when the mean of its predictions leaves this band. Default [0.0, 1.0]: any.
    pub ctr: [f64; 2],
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            examples: 20_000,
            positives: 100,
            margin: 0.01,
            confidence: 0.99,
            calibration: [0.5, 2.0],
            ctr: [0.0, 1.0],
        }
    }
}

/// Settings that were found good.
#[derive(Clone, Debug, PartialEq)]
pub struct Rules {
    settings: Settings,
    /// So many standard errors.
    quantile: f64,
}

impl Settings {
    pub fn check(&self) -> Result<Rules> {
        let refuse = |key, value: String, expected| Err(Error::Gate { key, value, expected });
        if self.examples > 10_000_000 {
            return refuse("examples", self.examples.to_string(), "at most 10000000");
        }
        if self.positives == 0 {
            return refuse("positives", "0".to_owned(), "at least 1");
        }
        if !(0.0..=10.0).contains(&self.margin) {
            return refuse("margin", self.margin.to_string(), "0 to 10");
        }
        if !(self.confidence > 0.5 && self.confidence < 1.0) {
            return refuse("confidence", self.confidence.to_string(), "between 0.5 and 1, both exclusive");
        }
        for (key, [low, high], most) in [("calibration", self.calibration, f64::MAX), ("ctr", self.ctr, 1.0)] {
            if !(low >= 0.0 && low < high && high <= most) {
                let expected = "two numbers of at least 0, the smaller first (at most 1 for ctr)";
                return refuse(key, format!("[{low:?}, {high:?}]"), expected);
            }
        }
        Ok(Rules { settings: self.clone(), quantile: quantile(self.confidence) })
    }
}

impl Rules {
    /// Most examples that are compared; 0: there is no gate.
    #[must_use]
    pub fn examples(&self) -> usize {
        self.settings.examples
    }
}

/// One example, as both scored it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pair {
    /// Logits of the candidate and of the version before.
    pub candidate: f32,
    pub before: f32,
    pub positive: bool,
    pub weight: f64,
}

/// What became of a candidate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Report {
    pub verdict: Verdict,
    /// Why it was held, or why only form was checked.
    pub reason: Option<String>,
    pub examples: u64,
    pub positives: u64,
    /// Of the candidate, at age zero.
    pub candidate: Figures,
    /// Of the version before, as it served: at the age that it has when it is replaced.
    pub as_served: Figures,
    /// Mean of candidate's loss less the other's, in nats, and its standard error.
    pub difference: Option<f64>,
    pub standard_error: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Passed,
    /// Too little to compare: its bytes, finite weights and golden vectors are all that was checked.
    Form,
    /// It is kept and can be named by hand; what serves goes on.
    Held,
}

/// `None` where the sample does not define it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// Mean of -ln p(label), weighted, in nats.
    pub logloss: Option<f64>,
    /// Clicks predicted over clicks seen.
    pub calibration: Option<f64>,
    /// Mean prediction.
    pub ctr: Option<f64>,
    /// Reported, not gated.
    pub auc: Option<f64>,
}

/// Only form was checked, because of this.
#[must_use]
pub fn form_only(reason: &str) -> Report {
    Report {
        verdict: Verdict::Form,
        reason: Some(reason.to_owned()),
        examples: 0,
        positives: 0,
        candidate: Figures::default(),
        as_served: Figures::default(),
        difference: None,
        standard_error: None,
    }
}

/// Judges a candidate by a sample.
#[must_use]
pub fn judge(rules: &Rules, sample: &[Pair]) -> Report {
    let Settings { positives: least, margin, confidence, calibration, ctr, .. } = rules.settings;
    let weight: f64 = sample.iter().map(|pair| pair.weight).sum();
    let positives = sample.iter().filter(|pair| pair.positive).count() as u64;
    let candidate = figures(sample, |pair| pair.candidate);
    let as_served = figures(sample, |pair| pair.before);
    let difference = |pair: &Pair| loss(pair.candidate, pair.positive) - loss(pair.before, pair.positive);
    let mean = if weight > 0.0 { sample.iter().map(|p| p.weight * difference(p)).sum::<f64>() / weight } else { 0.0 };
    // Of a weighted mean of independent examples.
    let squares: f64 = sample.iter().map(|p| (p.weight * (difference(p) - mean)).powi(2)).sum();
    let standard_error = if weight > 0.0 { squares.sqrt() / weight } else { 0.0 };

    let outside = |[low, high]: [f64; 2], value: f64| !(low..=high).contains(&value);
    let far = |calibration: Option<f64>| calibration.map_or(f64::INFINITY, |c| libm::log(c).abs());
    let mut report = Report {
        verdict: Verdict::Passed,
        reason: None,
        examples: sample.len() as u64,
        positives,
        candidate,
        as_served,
        difference: mean.is_finite().then_some(mean),
        standard_error: standard_error.is_finite().then_some(standard_error),
    };
    let (verdict, reason) = if let Some(p) = candidate.ctr.filter(|p| outside(ctr, *p)) {
        (Verdict::Held, format!("its mean prediction is {p:.4}, outside of `gate.ctr` = {ctr:?}"))
    } else if positives < least {
        (Verdict::Form, format!("{positives} clicks are fewer than `gate.positives` = {least}"))
    } else if candidate.logloss.is_none() {
        (Verdict::Held, "its log loss on fresh examples is not finite".to_owned())
    } else if let (Some(loss), Some(before)) = (candidate.logloss, as_served.logloss)
        && mean - rules.quantile * standard_error > margin * before
    {
        let reason = format!(
            "its log loss is {loss:.5}, that of the version before {before:.5} on the same {} examples: greater by more than {margin} of it at a confidence of {confidence}",
            sample.len()
        );
        (Verdict::Held, reason)
    } else if let Some(c) = candidate.calibration.filter(|c| outside(calibration, *c))
        && far(Some(c)) > far(as_served.calibration)
    {
        (
            Verdict::Held,
            format!("it predicts {c:.3} clicks for each seen, outside of `gate.calibration` = {calibration:?}"),
        )
    } else {
        return report;
    };
    (report.verdict, report.reason) = (verdict, Some(reason));
    report
}

/// -ln p(label), in nats.
fn loss(logit: f32, positive: bool) -> f64 {
    let x = f64::from(if positive { -logit } else { logit });
    x.max(0.0) + libm::log1p(libm::exp(-x.abs()))
}

fn figures(sample: &[Pair], logit: impl Fn(&Pair) -> f32) -> Figures {
    let sum = |of: &dyn Fn(&Pair) -> f64| sample.iter().map(|pair| pair.weight * of(pair)).sum::<f64>();
    let (weight, clicks) = (sum(&|_| 1.0), sum(&|pair| f64::from(u8::from(pair.positive))));
    let predicted = sum(&|pair| 1.0 / (1.0 + libm::exp(-f64::from(logit(pair)))));
    let over = |a: f64, b: f64| (b > 0.0).then(|| a / b).filter(|share| share.is_finite());
    Figures {
        logloss: over(sum(&|pair| loss(logit(pair), pair.positive)), weight),
        calibration: over(predicted, clicks),
        ctr: over(predicted, weight),
        auc: auc(sample, logit),
    }
}

/// Probability that a positive scores above a negative, equal scores half.
fn auc(sample: &[Pair], logit: impl Fn(&Pair) -> f32) -> Option<f64> {
    let mut scored: Vec<(f32, bool, f64)> = sample.iter().map(|p| (logit(p), p.positive, p.weight)).collect();
    scored.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (mut negatives, mut positives, mut above) = (0.0, 0.0, 0.0);
    for equal in scored.chunk_by(|a, b| a.0 == b.0) {
        let of = |wanted: bool| equal.iter().filter(|p| p.1 == wanted).map(|p| p.2).sum::<f64>();
        let (negative, positive) = (of(false), of(true));
        above += positive * (negatives + negative / 2.0);
        negatives += negative;
        positives += positive;
    }
    (negatives * positives > 0.0).then(|| above / (negatives * positives))
}

/// The number that a standard normal is below with this probability.
fn quantile(probability: f64) -> f64 {
    let below = |x: f64| 0.5 * (1.0 + libm::erf(x / std::f64::consts::SQRT_2));
    let (mut low, mut high) = (0.0, 40.0);
    for _ in 0..80 {
        let middle = (low + high) / 2.0;
        if below(middle) < probability { low = middle } else { high = middle }
    }
    low
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One in ten is a click; the candidate is off by `candidate`, the version before by `before`, alternating in sign if
    /// `noise`.
    fn sample(n: usize, candidate: f32, before: f32, noise: bool) -> Vec<Pair> {
        let truth = -2.197_f32;
        let off = |i: usize, by: f32| if noise && (i / 10).is_multiple_of(2) { truth - by } else { truth + by };
        let pair =
            |i| Pair { candidate: off(i, candidate), before: off(i, before), positive: i % 10 == 0, weight: 1.0 };
        (0..n).map(pair).collect()
    }

    fn rules(change: impl FnOnce(&mut Settings)) -> Rules {
        let mut settings = Settings::default();
        change(&mut settings);
        settings.check().unwrap()
    }

    #[test]
    fn a_candidate_that_is_no_worse_passes() {
        for (candidate, before) in [(0.0, 0.0), (0.0, 0.5), (0.3, 0.3), (0.05, 0.0)] {
            let report = judge(&rules(|_| {}), &sample(20_000, candidate, before, true));
            assert_eq!((report.verdict, &report.reason), (Verdict::Passed, &None), "{candidate} {before}: {report:?}");
        }
    }

    #[test]
    fn a_candidate_that_is_worse_is_held_with_both_log_losses() {
        let report = judge(&rules(|_| {}), &sample(20_000, 1.0, 0.0, true));
        assert_eq!(report.verdict, Verdict::Held);
        assert!(report.difference.unwrap() > 4.0 * report.standard_error.unwrap());
        let reason = report.reason.unwrap();
        assert!(reason.contains("0.32508") && reason.contains("20000 examples"), "{reason}");
        // Too few to be certain.
        let report = judge(&rules(|rules| rules.positives = 1), &sample(40, 0.4, 0.0, true));
        assert_eq!(report.verdict, Verdict::Passed, "{report:?}");
        let lenient = rules(|rules| rules.margin = 1.0);
        assert_eq!(judge(&lenient, &sample(20_000, 1.0, 0.0, true)).verdict, Verdict::Passed);
    }

    #[test]
    fn a_calibration_outside_of_the_band_is_held_unless_it_has_come_nearer() {
        let loose = rules(|rules| rules.margin = 10.0);
        let report = judge(&loose, &sample(20_000, 1.0, 0.0, false));
        assert!(report.reason.as_ref().unwrap().contains("gate.calibration"), "{report:?}");
        assert_eq!(judge(&loose, &sample(20_000, 1.0, 1.5, false)).verdict, Verdict::Passed);
    }

    #[test]
    fn with_few_clicks_only_form_is_checked_and_the_mean_prediction() {
        let report = judge(&rules(|_| {}), &sample(500, 3.0, 0.0, false));
        assert_eq!(report.verdict, Verdict::Form);
        assert!(report.reason.unwrap().contains("50 clicks"));
        let report = judge(&rules(|rules| rules.ctr = [0.01, 0.3]), &sample(500, 3.0, 0.0, false));
        assert_eq!(report.verdict, Verdict::Held);
        assert_eq!(judge(&rules(|_| {}), &[]).verdict, Verdict::Form);
    }

    #[test]
    fn numbers_that_are_not_finite_are_held() {
        let mut pairs = sample(20_000, 0.0, 0.0, false);
        pairs[7].candidate = f32::INFINITY;
        assert_eq!(judge(&rules(|_| {}), &pairs).verdict, Verdict::Held);
        pairs[7].candidate = f32::NAN;
        assert_eq!(judge(&rules(|_| {}), &pairs).verdict, Verdict::Held);
    }

    #[test]
    fn weights_stand_for_as_many_examples() {
        let mut pairs = sample(2000, 0.7, 0.1, true);
        let doubled: Vec<Pair> = pairs.iter().flat_map(|pair| [*pair, *pair]).collect();
        pairs.iter_mut().for_each(|pair| pair.weight = 2.0);
        let (a, b) = (judge(&rules(|_| {}), &pairs), judge(&rules(|_| {}), &doubled));
        assert!((a.difference.unwrap() - b.difference.unwrap()).abs() < 1e-12);
        assert_eq!(a.candidate.auc, b.candidate.auc);
        assert!((a.standard_error.unwrap() / b.standard_error.unwrap() - std::f64::consts::SQRT_2).abs() < 1e-9);
    }

    #[test]
    fn auc_counts_pairs() {
        let pair = |logit, positive| Pair { candidate: logit, before: 0.0, positive, weight: 1.0 };
        let pairs = [pair(1.0, true), pair(0.0, false), pair(1.0, false), pair(-1.0, true)];
        // Of four pairs one is above, one equal, two below.
        assert_eq!(auc(&pairs, |p| p.candidate), Some(1.5 / 4.0));
        assert_eq!(auc(&pairs[..1], |p| p.candidate), None);
    }

    #[test]
    fn the_quantiles_are_those_of_the_normal_distribution() {
        for (probability, expected) in [(0.9, 1.281_551_566), (0.99, 2.326_347_874), (0.999, 3.090_232_306)] {
            assert!((quantile(probability) - expected).abs() < 1e-8, "{probability}");
        }
    }

    #[test]
    fn settings_that_make_no_sense_are_refused_by_key() {
        let text = |change: fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            settings.check().unwrap_err().to_string()
        };
        assert!(text(|s| s.confidence = 0.5).contains("`gate.confidence`"));
        assert!(text(|s| s.ctr = [0.3, 0.1]).contains("`gate.ctr`"));
        assert!(text(|s| s.calibration = [f64::NAN, 1.0]).contains("`gate.calibration`"));
        assert!(text(|s| s.margin = -1.0).contains("`gate.margin`"));
        assert!(text(|s| s.positives = 0).contains("`gate.positives`"));
    }
}
