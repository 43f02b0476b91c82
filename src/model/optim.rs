//! Optimizers of the dense parameters, whose whole state can be seen, stored and taken up again.

use serde::{Deserialize, Serialize};

use super::Error;

/// Which rule moves the dense parameters.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DenseRule {
    /// Adam (Kingma and Ba, ICLR 2015).
    #[default]
    Adam,
    /// AdaGrad (Duchi et al., JMLR 2011).
    Adagrad,
}

/// `[model.two_tower.dense]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DenseSettings {
    /// `adam` or `adagrad`. Default `adam`.
    pub rule: DenseRule,
    /// Learning rate, behind the warm-up, of a batch of `examples`. Above 0, at most 1. Default 0.001.
    pub rate: f64,
    /// Examples of a whole step. A batch of `n` is `n / examples` of one: so far goes the rate, and so much does Adam forget.
    /// At least 1. Default 512.
    pub examples: u64,
    /// Whole steps in which the rate rises from 0 to `rate`, evenly; 0: none. Default 200.
    pub warm_up: u64,
    /// Longest gradient (Euclidean, summed over the batch); a longer one is shortened to it. Above 0. Default 10.
    pub clip: f64,
}

impl Default for DenseSettings {
    fn default() -> Self {
        Self { rule: DenseRule::Adam, rate: 1e-3, examples: 512, warm_up: 200, clip: 10.0 }
    }
}

impl DenseSettings {
    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |key, expected, got: f64| Err(Error::Setting { key, expected, got: got.to_string() });
        if !(self.rate > 0.0 && self.rate <= 1.0) {
            return refuse("two_tower.dense.rate", "above 0 and at most 1", self.rate);
        }
        if self.examples == 0 {
            return refuse("two_tower.dense.examples", "at least 1", 0.0);
        }
        if !(self.clip > 0.0 && self.clip <= 1e12) {
            return refuse("two_tower.dense.clip", "above 0 and at most 1e12", self.clip);
        }
        Ok(())
    }
}

/// What a checkpoint holds of the optimizer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct DenseState {
    /// Examples learned from.
    pub examples: u64,
    /// Adam: running mean of the gradient of a whole step. Empty under AdaGrad.
    pub mean: Vec<f32>,
    /// Adam: running mean of its square. AdaGrad: sum of the square of each batch's.
    pub square: Vec<f32>,
}

impl DenseState {
    #[must_use]
    pub fn new(rule: DenseRule, len: usize) -> Self {
        Self { examples: 0, mean: vec![0.0; if rule == DenseRule::Adam { len } else { 0 }], square: vec![0.0; len] }
    }
}

/// Largest |parameter|.
const LARGEST: f32 = 1e3;
const FORGET_MEAN: f64 = 0.9;
const FORGET_SQUARE: f64 = 0.999;

/// The Euclidean length, summed in order in f64.
pub(super) fn length(values: &[f32]) -> f64 {
    values.iter().map(|&v| f64::from(v) * f64::from(v)).sum::<f64>().sqrt()
}

/// One step of `params` against `gradient`, the sum over `examples`. A gradient that is not finite moves nothing; returns
/// whether it was.
///
/// Adam takes the step of `n` examples so that `n / N` of them come to the step of `N` at once where gradients are mostly
/// noise: the mean is of `g * N / n`, the mean of squares of `g^2 * N / n`, both forget by powers of `n / N`, and the rate is
/// `n / N` of its own. With plain Adam the rate of an *example* would grow as batches shrink: a stream with little traffic
/// would be learned from at 20 times the rate of a busy one.
pub fn step(
    settings: &DenseSettings,
    state: &mut DenseState,
    params: &mut [f32],
    gradient: &[f32],
    examples: usize,
) -> bool {
    let long = length(gradient);
    if !long.is_finite() {
        return false;
    }
    if examples == 0 {
        return true;
    }
    state.examples += examples as u64;
    let whole = settings.examples as f64;
    let (part, steps) = (examples as f64 / whole, state.examples as f64 / whole);
    let share = if long > settings.clip { settings.clip / long } else { 1.0 };
    let warm_up = settings.warm_up as f64;
    let rate = settings.rate * if steps < warm_up { steps / warm_up } else { 1.0 };
    match settings.rule {
        DenseRule::Adam => {
            // Not 1 less a rounded power, which for a small part is close to 1.
            let news = |forget: f64, of: f64| 1.0 - libm::pow(forget, of);
            let (mean_news, square_news) = (news(FORGET_MEAN, part) as f32, news(FORGET_SQUARE, part) as f32);
            let rate = (rate * part / news(FORGET_MEAN, steps)) as f32;
            let unbias = (1.0 / news(FORGET_SQUARE, steps).sqrt()) as f32;
            let (of_mean, of_square) = ((share / part) as f32, (share / part.sqrt()) as f32);
            for (((p, &g), m), v) in params.iter_mut().zip(gradient).zip(&mut state.mean).zip(&mut state.square) {
                let root = g * of_square;
                *m += mean_news * (g * of_mean - *m);
                *v += square_news * (root * root - *v);
                *p = (*p - rate * *m / (v.sqrt() * unbias + 1e-8)).clamp(-LARGEST, LARGEST);
            }
        }
        DenseRule::Adagrad => {
            let (rate, share) = (rate as f32, share as f32);
            for ((p, &g), sum) in params.iter_mut().zip(gradient).zip(&mut state.square) {
                let g = g * share;
                *sum += g * g;
                *p = (*p - rate * g / (sum.sqrt() + 1e-10)).clamp(-LARGEST, LARGEST);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use rand_pcg::Pcg64Mcg;
    use rand_pcg::rand_core::{Rng, SeedableRng};

    use super::*;

    /// The rules as their papers have them, in f64.
    fn plain(settings: &DenseSettings, gradients: &[f64]) -> f64 {
        let (mut p, mut m, mut v) = (0.5, 0.0, 0.0);
        for (i, &g) in gradients.iter().enumerate() {
            let t = (i + 1) as f64;
            let g = if g.abs() > settings.clip { settings.clip * g.signum() } else { g };
            let rate = settings.rate * (t / settings.warm_up as f64).min(1.0);
            match settings.rule {
                DenseRule::Adam => {
                    m = 0.9 * m + 0.1 * g;
                    v = 0.999 * v + 0.001 * g * g;
                    p -= rate * (m / (1.0 - libm::pow(0.9, t))) / ((v / (1.0 - libm::pow(0.999, t))).sqrt() + 1e-8);
                }
                DenseRule::Adagrad => {
                    v += g * g;
                    p -= rate * g / v.sqrt();
                }
            }
        }
        p
    }

    #[test]
    fn both_rules_are_those_of_their_papers_with_warm_up_and_clipping() {
        let gradients: Vec<f64> =
            (0..40).map(|i| libm::sin(f64::from(i)) * if i == 7 { 900.0 } else { 1.0 } + 0.3).collect();
        for rule in [DenseRule::Adam, DenseRule::Adagrad] {
            let settings = DenseSettings { rule, rate: 0.02, examples: 7, warm_up: 12, clip: 3.0 };
            let (mut state, mut p) = (DenseState::new(rule, 1), [0.5f32]);
            for &g in &gradients {
                assert!(step(&settings, &mut state, &mut p, &[g as f32], 7));
            }
            let expected = plain(&settings, &gradients);
            assert!((f64::from(p[0]) - expected).abs() < 1e-5, "{rule:?}: {} against {expected}", p[0]);
        }
    }

    #[test]
    fn a_walk_of_small_batches_goes_as_far_as_one_of_large() {
        // A gradient of noise with a small mean, summed over batches of 8 to 512 examples.
        let seed = 7;
        println!("seed {seed}");
        for (rule, warm_up) in [(DenseRule::Adam, 0), (DenseRule::Adam, 40), (DenseRule::Adagrad, 0)] {
            let settings = DenseSettings { rule, rate: 0.01, examples: 512, warm_up, clip: 1e9 };
            let end = |batch: usize| {
                let mut random = Pcg64Mcg::seed_from_u64(seed);
                let mut noise = || (random.next_u64() >> 40) as f32 / (1 << 23) as f32 - 1.0;
                let (mut state, mut params) = (DenseState::new(rule, 64), vec![0.0f32; 64]);
                for _ in 0..(512 * 400) / batch {
                    let gradient: Vec<f32> = (0..64).map(|_| (0..batch).map(|_| noise() - 0.004).sum()).collect();
                    assert!(step(&settings, &mut state, &mut params, &gradient, batch));
                }
                params.iter().sum::<f32>() / 64.0
            };
            let ends = [8, 64, 512].map(end);
            println!("{rule:?}, warm-up {warm_up}: {ends:?}");
            assert!(ends.iter().all(|end| *end > 0.03 && (end / ends[2] - 1.0).abs() < 0.15), "{rule:?} {ends:?}");
        }
    }

    #[test]
    fn a_gradient_that_is_no_number_moves_nothing() {
        let settings = DenseSettings::default();
        let (mut state, mut params) = (DenseState::new(DenseRule::Adam, 2), [0.5f32, 1.0]);
        step(&settings, &mut state, &mut params, &[1.0, 2.0], 512);
        let before = (state.clone(), params);
        assert!(!step(&settings, &mut state, &mut params, &[1.0, f32::NAN], 512));
        assert_eq!(before, (state, params));
    }

    #[test]
    fn a_wrong_setting_is_named_with_its_value() {
        let refused = |settings: DenseSettings| settings.check().unwrap_err().to_string();
        let rate = refused(DenseSettings { rate: 0.0, ..DenseSettings::default() });
        assert_eq!(rate, "`model.two_tower.dense.rate` must be above 0 and at most 1, got 0");
        assert!(refused(DenseSettings { clip: f64::NAN, ..DenseSettings::default() }).contains("dense.clip"));
    }
}
