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
    /// Learning rate, behind the warm-up. Above 0, at most 1. Default 0.001.
    pub rate: f64,
    /// Steps in which the rate rises from 0 to `rate`, evenly; 0: none. Default 500.
    pub warm_up: u64,
    /// Longest gradient (Euclidean, summed over the batch); a longer one is shortened to it. Above 0. Default 10.
    pub clip: f64,
}

impl Default for DenseSettings {
    fn default() -> Self {
        Self { rule: DenseRule::Adam, rate: 1e-3, warm_up: 500, clip: 10.0 }
    }
}

impl DenseSettings {
    pub(super) fn check(&self) -> Result<(), Error> {
        let refuse = |key, expected, got: f64| Err(Error::Setting { key, expected, got: got.to_string() });
        if !(self.rate > 0.0 && self.rate <= 1.0) {
            return refuse("two_tower.dense.rate", "above 0 and at most 1", self.rate);
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
    /// Steps taken.
    pub steps: u64,
    /// Adam: running mean of the gradient. Empty under AdaGrad.
    pub mean: Vec<f32>,
    /// Adam: running mean of its square. AdaGrad: sum of its square.
    pub square: Vec<f32>,
}

impl DenseState {
    #[must_use]
    pub fn new(rule: DenseRule, len: usize) -> Self {
        Self { steps: 0, mean: vec![0.0; if rule == DenseRule::Adam { len } else { 0 }], square: vec![0.0; len] }
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

/// One step of `params` against `gradient`. A gradient that is not finite moves nothing; returns whether it did.
pub fn step(settings: &DenseSettings, state: &mut DenseState, params: &mut [f32], gradient: &[f32]) -> bool {
    let long = length(gradient);
    if !long.is_finite() {
        return false;
    }
    state.steps += 1;
    let share = if long > settings.clip { (settings.clip / long) as f32 } else { 1.0 };
    let warm = if state.steps < settings.warm_up { state.steps as f64 / settings.warm_up as f64 } else { 1.0 };
    let rate = settings.rate * warm;
    match settings.rule {
        DenseRule::Adam => {
            let (b1, b2) = (FORGET_MEAN as f32, FORGET_SQUARE as f32);
            let mean_bias = 1.0 - libm::pow(FORGET_MEAN, state.steps as f64);
            let square_bias = (1.0 - libm::pow(FORGET_SQUARE, state.steps as f64)).sqrt();
            let (rate, unbias) = ((rate / mean_bias) as f32, (1.0 / square_bias) as f32);
            for (((p, &g), m), v) in params.iter_mut().zip(gradient).zip(&mut state.mean).zip(&mut state.square) {
                let g = g * share;
                *m = b1 * *m + (1.0 - b1) * g;
                *v = b2 * *v + (1.0 - b2) * g * g;
                *p = (*p - rate * *m / (v.sqrt() * unbias + 1e-8)).clamp(-LARGEST, LARGEST);
            }
        }
        DenseRule::Adagrad => {
            let rate = rate as f32;
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
            let settings = DenseSettings { rule, rate: 0.02, warm_up: 12, clip: 3.0 };
            let (mut state, mut p) = (DenseState::new(rule, 1), [0.5f32]);
            for &g in &gradients {
                assert!(step(&settings, &mut state, &mut p, &[g as f32]));
            }
            let expected = plain(&settings, &gradients);
            assert!((f64::from(p[0]) - expected).abs() < 1e-5, "{rule:?}: {} against {expected}", p[0]);
        }
    }

    #[test]
    fn a_gradient_that_is_no_number_moves_nothing() {
        let settings = DenseSettings::default();
        let (mut state, mut params) = (DenseState::new(DenseRule::Adam, 2), [0.5f32, 1.0]);
        step(&settings, &mut state, &mut params, &[1.0, 2.0]);
        let before = (state.clone(), params);
        assert!(!step(&settings, &mut state, &mut params, &[1.0, f32::NAN]));
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
