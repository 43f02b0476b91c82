//! The model as it travels: sorted ids with their weights, and how a score is computed from them.

use std::borrow::Cow;

use half::f16;

use super::codec::{Arrays, Dtype, Error, Result};
use super::column::Column;
use super::manifest::Golden;
use super::towers::{ROWS, Towers};
use super::vectors::{Precision, Vectors};
use crate::event::Slot;

pub(super) const IDS: &str = "logistic.ids";
pub(super) const WEIGHTS: &str = "logistic.weights";
pub(super) const INTERCEPT: &str = "logistic.intercept";
const DEFAULT_ROWS: &str = "logistic.default_rows";

/// How far a reader's logit may lie from that of the manifest: absolute up to a logit of 1, relative beyond.
pub const TOLERANCE: f32 = 1e-5;

/// Everything that scoring needs. Ids are uniform hashes, so the sorted column is its own index.
#[derive(Clone, PartialEq, Debug)]
pub struct Weights {
    pub(super) ids: Column<u64>,
    /// Of one number each, f32 or f16.
    pub(super) weights: Vectors,
    intercept: f32,
    pub(super) default_rows: Vec<u64>,
    /// Of each feature: the weight of its default row.
    defaults: Vec<f32>,
    pub(super) towers: Option<Towers>,
}

impl Weights {
    /// Checks and keeps a model: `ids` ascending strictly and never 0, one weight for each, all finite; `default_rows`
    /// names each feature's default row in schema order, which counts as 0 as long as it is not among `ids`.
    pub fn new(ids: Vec<u64>, weights: Vec<f32>, intercept: f32, default_rows: Vec<u64>) -> Result<Self> {
        Self::checked(ids.into(), Vectors::exact(1, weights), intercept, default_rows)
    }

    fn checked(ids: Column<u64>, weights: Vectors, intercept: f32, default_rows: Vec<u64>) -> Result<Self> {
        let wrong = |name: &str, expected: &str, found: String| {
            Err(Error::Wrong { name: name.to_owned(), expected: expected.to_owned(), found })
        };
        if weights.len() != ids.len() {
            return wrong(WEIGHTS, &format!("{} long, like `{IDS}`", ids.len()), weights.len().to_string());
        }
        ascending(IDS, &ids)?;
        if let Some(at) = weights.unfit() {
            return wrong(WEIGHTS, "finite", format!("{} at {at}, row {:016x}", weights.number(at), ids[at]));
        }
        if !intercept.is_finite() {
            return wrong(INTERCEPT, "finite", intercept.to_string());
        }
        let defaults = default_rows.iter().map(|row| find(&ids, *row).map_or(0.0, |at| weights.number(at))).collect();
        Ok(Self { ids, weights, intercept, default_rows, defaults, towers: None })
    }

    /// The same model with towers beside it.
    #[must_use]
    pub fn with_towers(self, towers: Towers) -> Self {
        Self { towers: Some(towers), ..self }
    }

    /// The same model with its rows rounded. An error names a row that f16 cannot hold.
    pub fn rounded(&self, precision: Precision) -> Result<Self> {
        let of = if precision == Precision::F32 { Precision::F32 } else { Precision::F16 };
        let numbers = self.weights.rounded(of).map_err(|(at, found)| past_f16(WEIGHTS, self.ids[at], found))?;
        let rounded = Self::checked(self.ids.clone(), numbers, self.intercept, self.default_rows.clone())?;
        let Some(towers) = &self.towers else { return Ok(rounded) };
        let rows = round_vectors(towers.ids(), towers.rows(), precision)?;
        Ok(rounded.with_towers(towers.with_rows(rows)))
    }

    /// Whether weights are numbers of f16.
    pub(super) fn half(&self) -> bool {
        self.weights.precision() == Precision::F16
    }

    /// The same weights, held and published as f16, which they must be numbers of.
    pub(super) fn of_halves(self) -> Self {
        let weights = self.weights.rounded(Precision::F16).expect("numbers of f16");
        Self { weights, ..self }
    }

    /// How exactly rows are published.
    #[must_use]
    pub fn precision(&self) -> Precision {
        match &self.towers {
            Some(towers) => towers.rows().precision(),
            None => self.weights.precision(),
        }
    }

    /// Takes the towers out of it.
    #[must_use]
    pub fn take_towers(&mut self) -> Option<Towers> {
        self.towers.take()
    }

    #[must_use]
    pub fn towers(&self) -> Option<&Towers> {
        self.towers.as_ref()
    }

    /// `logistic` or `two_tower`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        if self.towers.is_some() { "two_tower" } else { "logistic" }
    }

    /// Rows of all tables.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.ids.len() + self.towers.as_ref().map_or(0, |towers| towers.ids().len())
    }

    /// Logit of an encoded example: `weight * value` of the slots, summed from 0 in their order, then the intercept added,
    /// all in f32 without fused operations. A row that is not there counts as its feature's default row; a feature past the end of
    /// the default rows, which no example of this schema has, counts as 0. Last, what the towers say is added.
    #[must_use]
    pub fn logit(&self, slots: &[Slot]) -> f32 {
        let sum = slots.iter().fold(0.0, |sum, slot| sum + self.weight(slot.row, slot.feature) * slot.value);
        let logit = sum + self.intercept;
        self.towers.as_ref().map_or(logit, |towers| logit + towers.product(slots))
    }

    /// The weight that a row has in a score.
    #[must_use]
    pub fn weight(&self, row: u64, feature: u16) -> f32 {
        match find(&self.ids, row) {
            Some(at) => self.weights.number(at),
            None => self.defaults.get(usize::from(feature)).copied().unwrap_or(0.0),
        }
    }

    /// Whether a row has a weight of its own.
    #[must_use]
    pub fn knows(&self, row: u64) -> bool {
        find(&self.ids, row).is_some()
    }

    /// Whether a row is in any table.
    #[must_use]
    pub fn has(&self, row: u64) -> bool {
        self.knows(row) || self.towers.as_ref().is_some_and(|towers| find(towers.ids(), row).is_some())
    }

    /// Row ids, strictly ascending.
    #[must_use]
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// Weights beside [`Weights::ids`].
    #[must_use]
    pub fn weights(&self) -> Cow<'_, [f32]> {
        self.weights.as_f32()
    }

    /// Row ids, their weights as vectors of one number, and the towers.
    #[must_use]
    pub fn into_columns(self) -> (Column<u64>, Vectors, Option<Towers>) {
        (self.ids, self.weights, self.towers)
    }

    #[must_use]
    pub fn intercept(&self) -> f32 {
        self.intercept
    }

    /// Row id of each feature's default row, in schema order.
    #[must_use]
    pub fn default_rows(&self) -> &[u64] {
        &self.default_rows
    }

    #[must_use]
    pub fn to_arrays(&self) -> Arrays {
        let mut arrays = Arrays::new();
        arrays.push_u64(IDS, &[self.ids.len()], &self.ids);
        self.weights.to_numbers(WEIGHTS, &mut arrays);
        arrays.push_f32(INTERCEPT, &[1], &[self.intercept]);
        arrays.push_u64(DEFAULT_ROWS, &[self.default_rows.len()], &self.default_rows);
        if let Some(towers) = &self.towers {
            towers.to_arrays(&mut arrays);
        }
        arrays
    }

    /// Reads what [`Weights::to_arrays`] wrote, in place in its bytes: these four arrays, with these types and shapes, those of towers where there
    /// are any, and no others.
    pub fn from_arrays(arrays: &Arrays) -> Result<Self> {
        let ids = arrays.column::<u64>(IDS)?;
        let intercept = arrays.f32s(INTERCEPT)?;
        let default_rows = arrays.u64s(DEFAULT_ROWS)?;
        for (name, length) in
            [(IDS, ids.len()), (WEIGHTS, ids.len()), (INTERCEPT, 1), (DEFAULT_ROWS, default_rows.len())]
        {
            let shape = arrays.shape(name)?;
            if shape != [length] {
                let (expected, found) = (format!("of shape [{length}]"), format!("{shape:?}"));
                return Err(Error::Wrong { name: name.to_owned(), expected, found });
            }
        }
        let towers = Towers::from_arrays(arrays, &default_rows)?;
        let ours = |name: &str| {
            [IDS, WEIGHTS, INTERCEPT, DEFAULT_ROWS].contains(&name)
                || towers.as_ref().is_some_and(|t| t.has_array(name))
        };
        if let Some(other) = arrays.iter().find(|array| !ours(&array.name)) {
            let (expected, found) = ("absent from a model of this kind".to_owned(), "an array".to_owned());
            return Err(Error::Wrong { name: other.name.clone(), expected, found });
        }
        let numbers = Vectors::from_numbers(WEIGHTS, arrays)?;
        if let Some(towers) = &towers
            && (numbers.precision() == Precision::F32) != (towers.rows().precision() == Precision::F32)
        {
            let found = format!("vectors of {:?}", towers.rows().precision());
            return Err(Error::Wrong {
                name: WEIGHTS.to_owned(),
                expected: "rounded as the vectors are".to_owned(),
                found,
            });
        }
        let weights = Self::checked(ids, numbers, intercept[0], default_rows)?;
        Ok(match towers {
            Some(towers) => weights.with_towers(towers),
            None => weights,
        })
    }
}

impl Default for Weights {
    fn default() -> Self {
        Self::new(Vec::new(), Vec::new(), 0.0, Vec::new()).expect("nothing is wrong with no rows")
    }
}

/// Refuses ids that are 0 or not strictly ascending.
pub(super) fn ascending(name: &str, ids: &[u64]) -> Result<()> {
    let (expected, found) = if ids.first() == Some(&0) {
        ("free of 0", "0 at 0".to_owned())
    } else if let Some(at) = ids.windows(2).position(|pair| pair[0] >= pair[1]) {
        ("strictly ascending", format!("{:016x} then {:016x} at {at}", ids[at], ids[at + 1]))
    } else {
        return Ok(());
    };
    Err(Error::Wrong { name: name.to_owned(), expected: expected.to_owned(), found })
}

/// Weights as numbers of f16, if `half`.
pub(super) fn round_weights(ids: &[u64], weights: &[f32], half: bool) -> Result<Vec<f32>> {
    if !half {
        return Ok(weights.to_vec());
    }
    match Vectors::exact(1, weights.to_vec()).rounded(Precision::F16) {
        Ok(rounded) => Ok(rounded.to_f32()),
        Err((at, found)) => Err(past_f16(WEIGHTS, ids[at], found)),
    }
}

/// Vectors at another precision.
pub(super) fn round_vectors(ids: &[u64], rows: &Vectors, precision: Precision) -> Result<Vectors> {
    rows.rounded(precision).map_err(|(at, found)| past_f16(ROWS, ids[at], found))
}

fn past_f16(name: &str, row: u64, found: f32) -> Error {
    let expected = format!("within what f16 holds, 65504 (row {row:016x}; `snapshots.precision = \"f32\"` holds more)");
    Error::Wrong { name: name.to_owned(), expected, found: found.to_string() }
}

/// Adds weights, of which `half` says that they are numbers of f16.
pub(super) fn push_weights(arrays: &mut Arrays, name: &str, weights: &[f32], half: bool) {
    if half {
        let numbers: Vec<f16> = weights.iter().map(|w| f16::from_f32(*w)).collect();
        arrays.push_f16(name, &[numbers.len()], &numbers);
    } else {
        arrays.push_f32(name, &[weights.len()], weights);
    }
}

/// Reads what [`push_weights`] wrote.
pub(super) fn read_weights(arrays: &Arrays, name: &str) -> Result<(Vec<f32>, bool)> {
    let half = arrays.get(name).is_some_and(|array| array.dtype == Dtype::F16);
    let weights = match half {
        true => arrays.f16s(name)?.into_iter().map(f16::to_f32).collect(),
        false => arrays.f32s(name)?,
    };
    Ok((weights, half))
}

/// Scores the golden vectors with `score` and names the first that is not reproduced within [`TOLERANCE`].
pub fn prove(
    golden: &[Golden],
    features: usize,
    mut score: impl FnMut(&[Slot]) -> f32,
) -> std::result::Result<(), String> {
    for (at, example) in golden.iter().enumerate() {
        if let Some(slot) = example.slots.iter().find(|slot| usize::from(slot.feature) >= features) {
            return Err(format!(
                "golden vector {at} has feature {}, but there are {features} default rows",
                slot.feature
            ));
        }
        let (expected, found) = (example.logit, score(&example.slots()));
        // False when either is NaN.
        let reproduced = (found - expected).abs() <= TOLERANCE * expected.abs().max(1.0);
        if !reproduced {
            return Err(format!("golden vector {at} gives a logit of {found}, expected {expected}"));
        }
    }
    Ok(())
}

/// Position of `id` among ascending `ids` by interpolation, which takes a few steps among uniform hashes; falls back to
/// halving, so ids of any distribution are found.
pub(super) fn find(ids: &[u64], id: u64) -> Option<usize> {
    let (mut start, mut end) = (0, ids.len());
    let (mut low, mut high) = (0, u64::MAX);
    for _ in 0..4 {
        if end - start <= 32 || id < low || id > high {
            break;
        }
        let share = (id - low) as f64 / ((high - low) as f64 + 1.0);
        let guess = (start + (share * (end - start) as f64) as usize).min(end - 1);
        match ids[guess].cmp(&id) {
            std::cmp::Ordering::Equal => return Some(guess),
            std::cmp::Ordering::Less => (start, low) = (guess + 1, ids[guess]),
            std::cmp::Ordering::Greater => (end, high) = (guess, ids[guess]),
        }
    }
    ids[start..end].binary_search(&id).ok().map(|at| start + at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slot(row: u64, value: f32, feature: u16) -> Slot {
        Slot { row, value, feature, flags: 0 }
    }

    #[test]
    fn an_unknown_row_counts_as_its_features_default_row() {
        let weights = Weights::new(vec![5, 9, 70], vec![1.0, 2.0, 4.0], 0.5, vec![9, 6]).unwrap();
        assert_eq!(
            weights.logit(&[slot(5, 2.0, 0), slot(8, 0.5, 0), slot(8, 1.0, 1), slot(70, 1.0, 1)]),
            0.5 + 2.0 + 1.0 + 4.0
        );
    }

    #[test]
    fn weights_that_cannot_be_served_are_refused_with_row_and_reason() {
        let text = |r: Result<Weights>| r.unwrap_err().to_string();
        assert!(text(Weights::new(vec![1, 1], vec![0.0; 2], 0.0, vec![])).contains("strictly ascending"));
        assert!(text(Weights::new(vec![0, 1], vec![0.0; 2], 0.0, vec![])).contains("free of 0"));
        assert!(text(Weights::new(vec![1, 2], vec![0.0, f32::NAN], 0.0, vec![])).contains("row 0000000000000002"));
        assert!(text(Weights::new(vec![], vec![], f32::INFINITY, vec![])).contains("logistic.intercept"));
        assert!(text(Weights::new(vec![1], vec![], 0.0, vec![])).contains("1 long"));
        let mut arrays = Weights::default().to_arrays();
        arrays.push_u8("extra", &[0], &[]);
        assert!(text(Weights::from_arrays(&arrays)).contains("`extra`"));
    }

    #[test]
    fn a_golden_vector_that_is_not_reproduced_is_named() {
        let golden = [Golden::new(&[slot(1, 1.0, 0)], 0.25), Golden::new(&[slot(2, 1.0, 0)], 0.5)];
        assert!(prove(&golden, 1, |s| if s[0].row == 1 { 0.250_001 } else { 0.5 }).is_ok());
        let error = prove(&golden, 1, |_| 0.25).unwrap_err();
        assert!(error.contains("golden vector 1"), "{error}");
        assert!(prove(&golden, 1, |_| f32::NAN).is_err());
        assert!(prove(&golden, 0, |_| 0.25).unwrap_err().contains("feature 0"));
    }

    proptest! {
        #[test]
        fn interpolation_finds_what_halving_finds(
            mut ids in prop::collection::vec(prop_oneof![any::<u64>(), 0u64..500, (u64::MAX - 500)..], 0..400),
            others in prop::collection::vec(any::<u64>(), 20),
        ) {
            ids.sort_unstable();
            ids.dedup();
            for id in ids.iter().copied().chain(others).chain([0, 1, u64::MAX]) {
                prop_assert_eq!(find(&ids, id), ids.binary_search(&id).ok());
            }
        }

        #[test]
        fn weights_come_back_bit_for_bit(rows in prop::collection::btree_map(1u64.., -1e6f32..1e6, 0..50), intercept in -9f32..9.0) {
            let (ids, values): (Vec<u64>, Vec<f32>) = rows.into_iter().unzip();
            let weights = Weights::new(ids.clone(), values, intercept, ids).unwrap();
            prop_assert_eq!(Weights::from_arrays(&weights.to_arrays()).unwrap(), weights);
        }
    }
}
