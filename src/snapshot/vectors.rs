//! A column of vectors as it travels: f32, f16, or int8 with a scale a row. Rounding is a pure function of the f32 row.

use std::borrow::Cow;

use half::f16;
use half::slice::HalfFloatSliceExt;
use serde::{Deserialize, Serialize};

use super::codec::{Arrays, Dtype, Error, Result};
use super::column::Column;

/// Longest vector.
pub const WIDEST_ROW: usize = 256;

/// How exactly rows are published.
///
/// | | a vector of `d` numbers | error |
/// | --- | --- | --- |
/// | `f32` | `4 d` bytes | none |
/// | `f16` | `2 d` bytes | `2^-11` of each number, those below 6e-5 up to 3e-8 |
/// | `int8` | `d + 4` bytes: codes and a scale | half a step of `max(abs(w)) / 127` |
///
/// Weights of the logistic part are single numbers, which `int8` publishes as f16.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    F16,
    Int8,
}

/// `[len, dim]` numbers.
#[derive(Clone, PartialEq, Debug)]
pub struct Vectors {
    dim: usize,
    data: Data,
}

#[derive(Clone, PartialEq, Debug)]
enum Data {
    F32(Column<f32>),
    F16(Column<f16>),
    /// A number is `scale * code`.
    Int8 {
        codes: Column<i8>,
        scales: Column<f32>,
    },
}

impl Vectors {
    /// None in `[0, dim]`.
    #[must_use]
    pub fn new(dim: usize, precision: Precision) -> Self {
        let data = match precision {
            Precision::F32 => Data::F32(Column::default()),
            Precision::F16 => Data::F16(Column::default()),
            Precision::Int8 => Data::Int8 { codes: Column::default(), scales: Column::default() },
        };
        Self { dim, data }
    }

    /// Takes finite `[len, dim]` numbers as they are. `dim` is 1 to [`WIDEST_ROW`].
    #[must_use]
    pub fn exact(dim: usize, numbers: Vec<f32>) -> Self {
        assert!((1..=WIDEST_ROW).contains(&dim) && numbers.len().is_multiple_of(dim), "whole vectors of {dim}");
        Self { dim, data: Data::F32(numbers.into()) }
    }

    /// The same vectors, rounded. An error names the first that f16 cannot hold, with its greatest number.
    pub fn rounded(&self, precision: Precision) -> std::result::Result<Self, (usize, f32)> {
        let mut rounded = Self::new(self.dim, precision);
        let mut row = [0.0; WIDEST_ROW];
        let row = &mut row[..self.dim];
        for at in 0..self.len() {
            self.read(at, row);
            rounded.push(row).map_err(|most| (at, most))?;
        }
        Ok(rounded)
    }

    /// Adds a vector, rounded; an error is the number that f16 cannot hold.
    fn push(&mut self, row: &[f32]) -> std::result::Result<(), f32> {
        match &mut self.data {
            Data::F32(numbers) => numbers.to_mut().extend_from_slice(row),
            Data::F16(numbers) => {
                let numbers = numbers.to_mut();
                let start = numbers.len();
                numbers.resize(start + row.len(), f16::ZERO);
                numbers[start..].convert_from_f32_slice(row);
                if let Some(at) = numbers[start..].iter().position(|w| !w.is_finite()) {
                    return Err(row[at]);
                }
            }
            Data::Int8 { codes, scales } => {
                let scale = row.iter().fold(0.0_f32, |most, w| most.max(w.abs())) / 127.0;
                // A row of zeros, or so near to it that a step cannot be told from zero.
                let step = if scale > 0.0 { scale } else { f32::INFINITY };
                codes.to_mut().extend(row.iter().map(|w| (w / step).round_ties_even().clamp(-127.0, 127.0) as i8));
                scales.to_mut().push(scale);
            }
        }
        Ok(())
    }

    #[must_use]
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Number of vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        match &self.data {
            Data::F32(numbers) => numbers.len() / self.dim,
            Data::F16(numbers) => numbers.len() / self.dim,
            Data::Int8 { scales, .. } => scales.len(),
        }
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    #[must_use]
    pub fn precision(&self) -> Precision {
        match self.data {
            Data::F32(_) => Precision::F32,
            Data::F16(_) => Precision::F16,
            Data::Int8 { .. } => Precision::Int8,
        }
    }

    /// Bytes of all numbers.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::F32(numbers) => size_of_val(&**numbers),
            Data::F16(numbers) => size_of_val(&**numbers),
            Data::Int8 { codes, scales } => codes.len() + size_of_val(&**scales),
        }
    }

    /// Number `at`, where all numbers stand vector by vector.
    #[inline]
    #[must_use]
    pub fn number(&self, at: usize) -> f32 {
        match &self.data {
            Data::F32(numbers) => numbers.number(at),
            Data::F16(numbers) => numbers.number(at).to_f32(),
            Data::Int8 { codes, scales } => scales.number(at / self.dim) * f32::from(codes.number(at)),
        }
    }

    /// Where vector `at` begins in memory, or would, if there is none: for hints only.
    #[inline(always)]
    #[must_use]
    pub fn place(&self, at: usize) -> *const u8 {
        let at = at * self.dim;
        match &self.data {
            Data::F32(numbers) => numbers.place(at).cast(),
            Data::F16(numbers) => numbers.place(at).cast(),
            Data::Int8 { codes, .. } => codes.place(at).cast(),
        }
    }

    /// All numbers, vector by vector, copied only where they are of another precision.
    #[must_use]
    pub fn as_f32(&self) -> Cow<'_, [f32]> {
        match &self.data {
            Data::F32(numbers) => Cow::Borrowed(numbers),
            _ => Cow::Owned(self.to_f32()),
        }
    }

    /// All numbers, vector by vector.
    #[must_use]
    pub fn to_f32(&self) -> Vec<f32> {
        let mut numbers = vec![0.0; self.len() * self.dim];
        numbers.chunks_exact_mut(self.dim).enumerate().for_each(|(at, row)| self.read(at, row));
        numbers
    }

    /// Writes vector `at` to `row`, which is `dim` long.
    pub fn read(&self, at: usize, row: &mut [f32]) {
        let range = at * self.dim..(at + 1) * self.dim;
        match &self.data {
            Data::F32(numbers) => row.copy_from_slice(&numbers[range]),
            Data::F16(numbers) => numbers[range].convert_to_f32_slice(row),
            Data::Int8 { codes, scales } => {
                row.iter_mut().zip(&codes[range]).for_each(|(w, code)| *w = scales[at] * f32::from(*code));
            }
        }
    }

    /// Adds `value` times vector `at` to `sums`, which is `dim` long.
    #[inline]
    pub fn add(&self, at: usize, value: f32, sums: &mut [f32]) {
        let range = at * self.dim..(at + 1) * self.dim;
        if let Data::F32(numbers) = &self.data {
            sums.iter_mut().zip(&numbers[range]).for_each(|(sum, w)| *sum += value * w);
            return;
        }
        let mut row = [0.0; WIDEST_ROW];
        let row = &mut row[..self.dim];
        self.read(at, row);
        sums.iter_mut().zip(row).for_each(|(sum, w)| *sum += value * *w);
    }

    /// Position of the first vector that is not finite.
    #[must_use]
    pub fn unfit(&self) -> Option<usize> {
        match &self.data {
            Data::F32(numbers) => numbers.iter().position(|w| !w.is_finite()).map(|at| at / self.dim),
            Data::F16(numbers) => numbers.iter().position(|w| !w.is_finite()).map(|at| at / self.dim),
            Data::Int8 { scales, .. } => scales.iter().position(|scale| !(scale.is_finite() && *scale >= 0.0)),
        }
    }

    /// Whether vector `at` and vector `theirs` of `other`, of one precision, are the same bytes.
    #[must_use]
    pub fn same(&self, at: usize, other: &Self, theirs: usize) -> bool {
        let (ours, theirs_at) = (at * self.dim..(at + 1) * self.dim, theirs * self.dim..(theirs + 1) * self.dim);
        match (&self.data, &other.data) {
            (Data::F32(a), Data::F32(b)) => a[ours].iter().zip(&b[theirs_at]).all(|(a, b)| a.to_bits() == b.to_bits()),
            (Data::F16(a), Data::F16(b)) => a[ours].iter().zip(&b[theirs_at]).all(|(a, b)| a.to_bits() == b.to_bits()),
            (Data::Int8 { codes: a, scales: s }, Data::Int8 { codes: b, scales: t }) => {
                s[at].to_bits() == t[theirs].to_bits() && a[ours] == b[theirs_at]
            }
            _ => false,
        }
    }

    /// Appends vectors `range` of `other`, which must be of this shape and precision.
    pub fn extend(&mut self, other: &Self, range: std::ops::Range<usize>) {
        assert_eq!(self.dim, other.dim, "vectors of one width");
        let numbers = range.start * self.dim..range.end * self.dim;
        match (&mut self.data, &other.data) {
            (Data::F32(ours), Data::F32(theirs)) => ours.to_mut().extend_from_slice(&theirs[numbers]),
            (Data::F16(ours), Data::F16(theirs)) => ours.to_mut().extend_from_slice(&theirs[numbers]),
            (Data::Int8 { codes, scales }, Data::Int8 { codes: more, scales: more_scales }) => {
                codes.to_mut().extend_from_slice(&more[numbers]);
                scales.to_mut().extend_from_slice(&more_scales[range]);
            }
            _ => panic!("vectors of one precision"),
        }
    }

    /// Adds an array `name` of shape `[len, dim]`, and `name` + `.scales` of `[len]` with int8.
    pub(super) fn to_arrays(&self, name: &str, arrays: &mut Arrays) {
        self.push_to(name, &[self.len(), self.dim], arrays);
    }

    /// Adds an array `name` of shape `[len]`, of vectors of one number, which are not int8.
    pub(super) fn to_numbers(&self, name: &str, arrays: &mut Arrays) {
        assert!(self.dim == 1 && self.precision() != Precision::Int8, "single numbers");
        self.push_to(name, &[self.len()], arrays);
    }

    fn push_to(&self, name: &str, shape: &[usize], arrays: &mut Arrays) {
        match &self.data {
            Data::F32(numbers) => arrays.push_f32(name, shape, numbers),
            Data::F16(numbers) => arrays.push_f16(name, shape, numbers),
            Data::Int8 { codes, scales } => {
                arrays.push_i8(name, shape, codes);
                arrays.push_f32(scales_of(name), &[scales.len()], scales);
            }
        }
    }

    /// Reads what [`Vectors::to_numbers`] wrote; the shape is not looked at.
    pub(super) fn from_numbers(name: &str, arrays: &Arrays) -> Result<Self> {
        let data = match arrays.get(name).map(|array| array.dtype) {
            Some(Dtype::F16) => Data::F16(arrays.column(name)?),
            _ => Data::F32(arrays.column(name)?),
        };
        Ok(Self { dim: 1, data })
    }

    /// Reads what [`Vectors::to_arrays`] wrote.
    pub(super) fn from_arrays(name: &str, arrays: &Arrays) -> Result<Self> {
        let wrong =
            |name: &str, expected: String, found: String| Err(Error::Wrong { name: name.to_owned(), expected, found });
        let &[count, dim] = arrays.shape(name)? else {
            return wrong(name, "of two dimensions".to_owned(), format!("{:?}", arrays.shape(name)?));
        };
        if !(1..=WIDEST_ROW).contains(&dim) {
            return wrong(name, format!("1 to {WIDEST_ROW} wide"), dim.to_string());
        }
        let dtype = arrays.get(name).map(|array| array.dtype);
        let data = match dtype {
            Some(Dtype::F16) => Data::F16(arrays.column(name)?),
            Some(Dtype::I8) => {
                let scales = scales_of(name);
                if arrays.shape(&scales)? != [count] {
                    return wrong(&scales, format!("of shape [{count}]"), format!("{:?}", arrays.shape(&scales)?));
                }
                Data::Int8 { codes: arrays.column(name)?, scales: arrays.column(&scales)? }
            }
            // Says what is wrong with any other type.
            _ => Data::F32(arrays.column(name)?),
        };
        Ok(Self { dim, data })
    }

    /// Whether an array of this name is one of those that hold these vectors under `name`.
    pub(super) fn has_array(&self, name: &str, array: &str) -> bool {
        array == name || (matches!(self.data, Data::Int8 { .. }) && array == scales_of(name))
    }
}

fn scales_of(name: &str) -> String {
    format!("{name}.scales")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PRECISIONS: [Precision; 3] = [Precision::F32, Precision::F16, Precision::Int8];

    fn row(vectors: &Vectors, at: usize) -> Vec<f32> {
        let mut row = vec![0.0; vectors.dim()];
        vectors.read(at, &mut row);
        row
    }

    proptest! {
        #[test]
        fn rounding_moves_no_number_further_than_its_precision_says(
            numbers in prop::collection::vec(prop_oneof![-60000f32..60000.0, -1f32..1.0, -1e-6f32..1e-6, Just(0.0), Just(-0.0)], 0..40),
        ) {
            let dim = 4;
            let numbers = numbers[..numbers.len() / dim * dim].to_vec();
            let exact = Vectors::exact(dim, numbers.clone());
            for precision in PRECISIONS {
                let rounded = exact.rounded(precision).unwrap();
                prop_assert_eq!((rounded.len(), rounded.precision()), (numbers.len() / dim, precision));
                for (at, before) in numbers.chunks(dim).enumerate() {
                    let most = before.iter().fold(0.0_f32, |most, w| most.max(w.abs()));
                    for (a, b) in before.iter().zip(row(&rounded, at)) {
                        let bound = match precision {
                            Precision::F32 => 0.0,
                            Precision::F16 => (a.abs() / 2048.0).max(3e-8),
                            Precision::Int8 => most / 127.0 * 0.5 * (1.0 + 1e-5),
                        };
                        prop_assert!((a - b).abs() <= bound, "{a} became {b} as {precision:?}");
                    }
                    let mut sums = [1.0; 4];
                    rounded.add(at, 0.5, &mut sums);
                    let expected: Vec<f32> = row(&rounded, at).iter().map(|w| 1.0 + 0.5 * w).collect();
                    prop_assert_eq!(&sums[..], &expected[..]);
                }
                // Rounding what is rounded changes nothing, and arrays bring back every bit.
                let again = rounded.rounded(precision).unwrap();
                let mut arrays = Arrays::new();
                rounded.to_arrays("rows", &mut arrays);
                let back = Vectors::from_arrays("rows", &arrays).unwrap();
                prop_assert!((0..rounded.len()).all(|at| rounded.same(at, &back, at)));
                prop_assert!(precision == Precision::Int8 || (0..rounded.len()).all(|at| rounded.same(at, &again, at)));
                prop_assert!(arrays.iter().all(|array| rounded.has_array("rows", &array.name)));
            }
        }
    }

    #[test]
    fn a_number_past_f16_is_named_and_int8_takes_it() {
        let exact = Vectors::exact(2, vec![1.0, 2.0, 3.0, -70000.0]);
        assert_eq!(exact.rounded(Precision::F16).unwrap_err(), (1, -70000.0));
        assert_eq!(row(&exact.rounded(Precision::Int8).unwrap(), 1)[1], -70000.0);
    }

    #[test]
    fn rows_of_zeros_and_of_the_smallest_numbers_stay_finite() {
        let least = f32::from_bits(1);
        let exact = Vectors::exact(3, vec![0.0, -0.0, 0.0, least, -least, 0.0]);
        for precision in PRECISIONS {
            let rounded = exact.rounded(precision).unwrap();
            assert_eq!(rounded.unfit(), None);
            assert!(row(&rounded, 0).iter().chain(&row(&rounded, 1)).all(|w| w.abs() <= 1e-40));
        }
    }

    #[test]
    fn a_column_that_no_rounding_gives_is_refused_with_its_row() {
        let mut arrays = Arrays::new();
        arrays.push_i8("rows", &[2, 2], &[1, 2, 3, 4]);
        arrays.push_f32("rows.scales", &[2], &[1.0, f32::NAN]);
        assert_eq!(Vectors::from_arrays("rows", &arrays).unwrap().unfit(), Some(1));
        let mut arrays = Arrays::new();
        arrays.push_i8("rows", &[2, 2], &[1, 2, 3, 4]);
        arrays.push_f32("rows.scales", &[1], &[1.0]);
        assert!(Vectors::from_arrays("rows", &arrays).unwrap_err().to_string().contains("rows.scales"));
        let mut arrays = Arrays::new();
        arrays.push_u32("rows", &[1, 2], &[1, 2]);
        assert!(Vectors::from_arrays("rows", &arrays).unwrap_err().to_string().contains("must be F32, found U32"));
    }
}
