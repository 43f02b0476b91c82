//! How a value becomes table rows. Pure; the same code in training, scoring and on a serving node.
//!
//! A caller pushes raw values by feature index into an [`Encoder`] and asks it for the slots. `docs/encoding.md` says
//! what comes out, for readers in other languages.

use std::fmt::{Display, Write};

use super::schema::{Cross, Number, Role, Rule, Scalar, Schema, row_of};
use crate::event::Slot;

/// Slot values lie in `-BOUND..=BOUND`.
pub const BOUND: f64 = 1e6;
/// A bag weight closer to 0 than this counts as none.
pub const LEAST_WEIGHT: f64 = 1e-6;

/// A value of a type that its feature cannot take.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("needs {needs}")]
pub struct Mismatch {
    pub needs: &'static str,
}

const A_NUMBER: Mismatch = Mismatch { needs: "a number or boolean" };
const A_WEIGHT: Mismatch = Mismatch { needs: "no weights (only a multi takes an object of weights)" };

/// Room for a number's text on the stack.
#[derive(Default)]
pub struct Digits {
    int: itoa::Buffer,
    float: ryu::Buffer,
}

impl Digits {
    /// The canonical text of a finite float: as an integer where it is one below 2^53, else the shortest text that
    /// reads back as the same number, in the format of the `ryu` crate.
    pub fn f64(&mut self, v: f64) -> &str {
        if v.trunc() == v && v.abs() < (1u64 << 53) as f64 {
            self.int.format(v as i64)
        } else {
            self.float.format_finite(v)
        }
    }
}

/// Turns the values of one record after the other into slots. Allocates nothing once its bags have grown.
///
/// Pushing a scalar again replaces it; pushing to a bag adds to it. What was not pushed is missing.
#[derive(Clone, Debug)]
pub struct Encoder {
    schema: Schema,
    /// The slot of each scalar feature, the missing slot of each bag, as pushed so far.
    cells: Vec<Slot>,
    /// `cells` of a record without values.
    blank: Vec<Slot>,
    /// Row and weight of each bag's values, by feature.
    bags: Vec<Vec<(u64, f64)>>,
    has_bags: bool,
    /// Presentation features keep the value that they have at serving.
    serving: bool,
    /// Where each feature's slots start in the output; only kept up where there are bags.
    starts: Vec<usize>,
    /// What was pushed, as text, while somebody wants to see it.
    texts: Option<Vec<String>>,
}

impl Encoder {
    /// Encodes records of the log: presentation features as they were.
    #[must_use]
    pub fn new(schema: &Schema) -> Self {
        let blank: Vec<Slot> = (0..schema.features()).map(|i| schema.missing_slot(i)).collect();
        Self {
            cells: blank.clone(),
            bags: vec![Vec::new(); schema.features()],
            has_bags: schema.features.iter().any(|feature| matches!(feature.rule, Rule::Bag { .. })),
            serving: false,
            starts: vec![0; schema.features() + 1],
            texts: None,
            schema: schema.clone(),
            blank,
        }
    }

    /// Encodes candidates: presentation features have their `at_serving` value, whatever is pushed.
    #[must_use]
    pub fn at_serving(schema: &Schema) -> Self {
        let mut encoder = Self::new(schema);
        for (i, feature) in schema.features.iter().enumerate() {
            let pushed = match &feature.settings.at_serving {
                Some(Scalar::Bool(v)) => encoder.push_bool(i, *v),
                Some(Scalar::Int(v)) => encoder.push_i64(i, *v),
                Some(Scalar::Float(v)) => encoder.push_f64(i, *v),
                Some(Scalar::Text(v)) => encoder.push_str(i, v),
                None => Ok(()),
            };
            pushed.expect("the schema checked `at_serving`");
        }
        encoder.blank.clone_from(&encoder.cells);
        encoder.serving = true;
        encoder
    }

    #[must_use]
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// Forgets the record.
    #[inline]
    pub fn reset(&mut self) {
        self.cells.copy_from_slice(&self.blank);
        if self.has_bags {
            self.bags.iter_mut().for_each(Vec::clear);
        }
        if let Some(texts) = &mut self.texts {
            texts.iter_mut().for_each(String::clear);
        }
    }

    /// Forgets one feature's value.
    pub fn clear(&mut self, feature: usize) {
        self.cells[feature] = self.blank[feature];
        self.bags[feature].clear();
        if let Some(texts) = &mut self.texts {
            texts[feature].clear();
        }
    }

    #[inline]
    pub fn push_str(&mut self, feature: usize, v: &str) -> Result<(), Mismatch> {
        self.push_text(feature, v.as_bytes())
    }

    #[inline]
    pub fn push_bool(&mut self, feature: usize, v: bool) -> Result<(), Mismatch> {
        if self.is_number(feature) {
            self.push_number(feature, f64::from(u8::from(v)));
            return Ok(());
        }
        self.push_text(feature, if v { b"true" } else { b"false" })
    }

    #[inline]
    pub fn push_i64(&mut self, feature: usize, v: i64) -> Result<(), Mismatch> {
        self.push_integer(feature, v as f64, itoa::Buffer::new().format(v))
    }

    #[inline]
    pub fn push_u64(&mut self, feature: usize, v: u64) -> Result<(), Mismatch> {
        self.push_integer(feature, v as f64, itoa::Buffer::new().format(v))
    }

    /// An integer whose decimal digits are there already.
    #[inline]
    pub fn push_integer(&mut self, feature: usize, v: f64, digits: &str) -> Result<(), Mismatch> {
        if self.is_number(feature) {
            self.push_number(feature, v);
            return Ok(());
        }
        self.push_text(feature, digits.as_bytes())
    }

    /// A float that is not finite counts as null.
    #[inline]
    pub fn push_f64(&mut self, feature: usize, v: f64) -> Result<(), Mismatch> {
        if !v.is_finite() {
            self.push_null(feature);
            return Ok(());
        }
        if self.is_number(feature) {
            self.push_number(feature, v);
            return Ok(());
        }
        self.push_text(feature, Digits::default().f64(v).as_bytes())
    }

    /// A scalar becomes missing; a bag stays as it is.
    #[inline]
    pub fn push_null(&mut self, feature: usize) {
        if !matches!(self.schema.features[feature].rule, Rule::Bag { .. }) {
            self.clear(feature);
        }
    }

    /// Adds a value with a weight to a `multi`; a weight within 1e-6 of 0 adds nothing, one past 1e6 counts as 1e6.
    pub fn push_weighted(&mut self, feature: usize, v: &str, weight: f64) -> Result<(), Mismatch> {
        let spec = &self.schema.features[feature];
        let Rule::Bag { last: false, .. } = spec.rule else { return Err(A_WEIGHT) };
        if weight.is_finite() && weight.abs() >= LEAST_WEIGHT {
            self.bags[feature].push((spec.row_of(v.as_bytes()), weight.clamp(-BOUND, BOUND)));
            if self.texts.is_some() {
                self.note(feature, format_args!("{v}:{weight}"));
            }
        }
        Ok(())
    }

    /// Adds the slots of the record to `out`: features in schema order, then crosses. Keeps the record.
    pub fn write(&mut self, out: &mut Vec<Slot>) {
        let base = out.len();
        if self.has_bags {
            self.write_bags(out);
        } else {
            out.extend_from_slice(&self.cells);
        }
        for (i, cross) in self.schema.crosses.iter().enumerate() {
            let feature = (self.cells.len() + i) as u16;
            match cross.parts[..] {
                [a, b] if cross.plain => {
                    let (a, b) = (self.cells[a], self.cells[b]);
                    let value = bounded(a.value * b.value);
                    out.push(Slot { row: cross_row(cross.seed, &[a.row, b.row]), value, feature, flags: 0 });
                }
                [a, b, c] if cross.plain => {
                    let (a, b, c) = (self.cells[a], self.cells[b], self.cells[c]);
                    let value = bounded(bounded(a.value * b.value) * c.value);
                    out.push(Slot { row: cross_row(cross.seed, &[a.row, b.row, c.row]), value, feature, flags: 0 });
                }
                _ => {
                    let (starts, parts) = (&self.starts, &cross.parts);
                    let mut lens = [0; 3];
                    for (len, &part) in lens.iter_mut().zip(parts) {
                        *len = starts[part + 1] - starts[part];
                    }
                    write_cross(cross, feature, lens, out, |out, part, k| out[base + starts[parts[part]] + k]);
                }
            }
        }
    }

    /// [`write`](Self::write), then [`reset`](Self::reset).
    pub fn finish(&mut self, out: &mut Vec<Slot>) {
        self.write(out);
        self.reset();
    }

    /// Starts or stops to keep the text behind each feature, for people to look at.
    pub fn keep_texts(&mut self, keep: bool) {
        self.texts = keep.then(|| vec![String::new(); self.cells.len()]);
    }

    /// What was pushed to a feature since the last reset, if texts are kept: `10`, `12.5 -> b14`, `a, b`; empty if
    /// nothing was.
    #[must_use]
    pub fn text(&self, feature: usize) -> &str {
        self.texts.as_ref().map_or("", |texts| &texts[feature])
    }

    fn write_bags(&mut self, out: &mut Vec<Slot>) {
        let base = out.len();
        for i in 0..self.cells.len() {
            self.starts[i] = out.len() - base;
            self.write_feature(i, out);
        }
        self.starts[self.cells.len()] = out.len() - base;
    }

    /// Adds the slots of one feature, at least one.
    pub(super) fn write_feature(&self, feature: usize, out: &mut Vec<Slot>) {
        let bag = &self.bags[feature];
        let Rule::Bag { max_len, last } = self.schema.features[feature].rule else {
            out.push(self.cells[feature]);
            return;
        };
        let cut = bag.len().saturating_sub(max_len);
        let kept = if last { &bag[cut..] } else { &bag[..bag.len() - cut] };
        if kept.is_empty() {
            out.push(self.cells[feature]);
            return;
        }
        let norm = kept.iter().map(|(_, weight)| weight * weight).sum::<f64>().sqrt();
        out.extend(kept.iter().map(|&(row, weight)| Slot {
            row,
            value: (weight / norm) as f32,
            feature: feature as u16,
            flags: 0,
        }));
    }

    #[inline]
    fn is_number(&self, feature: usize) -> bool {
        matches!(self.schema.features[feature].rule, Rule::Bucket { .. } | Rule::Bins { .. } | Rule::Value { .. })
    }

    #[inline]
    fn is_fixed(&self, feature: usize) -> bool {
        self.serving && self.schema.features[feature].settings.role == Some(Role::Presentation)
    }

    #[inline]
    fn push_text(&mut self, feature: usize, text: &[u8]) -> Result<(), Mismatch> {
        let spec = &self.schema.features[feature];
        match spec.rule {
            Rule::Category => {
                if self.is_fixed(feature) {
                    return Ok(());
                }
                let row = spec.row_of(text);
                self.cells[feature] = Slot { row, value: 1.0, feature: feature as u16, flags: 0 };
            }
            Rule::Bag { .. } => self.bags[feature].push((spec.row_of(text), 1.0)),
            Rule::Bucket { .. } | Rule::Bins { .. } | Rule::Value { .. } => return Err(A_NUMBER),
        }
        if self.texts.is_some() {
            self.note(feature, String::from_utf8_lossy(text));
        }
        Ok(())
    }

    fn push_number(&mut self, feature: usize, v: f64) {
        if self.is_fixed(feature) {
            return;
        }
        let spec = &self.schema.features[feature];
        let mut value = 1.0;
        let mut text = [0; 16];
        let text = match &spec.rule {
            Rule::Bucket { number, shift } => label(&mut text, b'b', bucket(number.apply(v), *shift)),
            Rule::Bins { number, edges } => {
                let x = number.apply(v);
                label(&mut text, b'n', edges.partition_point(|&edge| edge <= x) as i64)
            }
            Rule::Value { number, log } => {
                let x = number.apply(v);
                let x = if *log { libm::copysign(libm::log1p(x.abs()), x) } else { x };
                value = x.clamp(-BOUND, BOUND) as f32;
                b"v"
            }
            Rule::Category | Rule::Bag { .. } => unreachable!("callers ask `is_number`"),
        };
        self.cells[feature] = Slot { row: spec.row_of(text), value, feature: feature as u16, flags: 0 };
        if self.texts.is_some() {
            let shown = String::from_utf8_lossy(text).into_owned();
            match spec.rule {
                Rule::Value { .. } => self.note(feature, format_args!("{v} -> {value}")),
                _ => self.note(feature, format_args!("{v} -> {shown}")),
            }
        }
    }

    #[cold]
    fn note(&mut self, feature: usize, shown: impl Display) {
        let is_bag = matches!(self.schema.features[feature].rule, Rule::Bag { .. });
        if let Some(texts) = &mut self.texts {
            let text = &mut texts[feature];
            if !is_bag {
                text.clear();
            } else if !text.is_empty() {
                text.push_str(", ");
            }
            write!(text, "{shown}").expect("a String takes all");
        }
    }
}

/// Adds the slots of a cross, at least one: all combinations of its parts' slots up to its maximum, the last part turning
/// fastest. `lens` says how many slots each part has; `slot(out, part, k)` is the `k`-th of them, which may lie in `out`.
#[inline]
pub(super) fn write_cross(
    cross: &Cross,
    feature: u16,
    lens: [usize; 3],
    out: &mut Vec<Slot>,
    slot: impl Fn(&[Slot], usize, usize) -> Slot,
) {
    let mut left = cross.max;
    for a in 0..lens[0] {
        for b in 0..lens[1] {
            let (a, b) = (slot(out, 0, a), slot(out, 1, b));
            let pair = bounded(a.value * b.value);
            if cross.parts.len() == 2 {
                if left == 0 {
                    return;
                }
                left -= 1;
                out.push(Slot { row: cross_row(cross.seed, &[a.row, b.row]), value: pair, feature, flags: 0 });
                continue;
            }
            for c in 0..lens[2] {
                if left == 0 {
                    return;
                }
                left -= 1;
                let c = slot(out, 2, c);
                let row = cross_row(cross.seed, &[a.row, b.row, c.row]);
                out.push(Slot { row, value: bounded(pair * c.value), feature, flags: 0 });
            }
        }
    }
}

impl Number {
    #[inline]
    fn apply(&self, v: f64) -> f64 {
        // Finite times finite may overflow; the ends of the range serve as well as infinity.
        (v.clamp(self.low, self.high) * self.scale).clamp(f64::MIN, f64::MAX)
    }
}

/// `sign(x) * (1 + (floor(log2|x| * 2^shift, piecewise linear) + 10 * 2^shift))`, and 0 where `|x| < 2^-10`: the
/// exponent and the first `shift` bits of the mantissa, so exact everywhere.
#[inline]
fn bucket(x: f64, shift: u32) -> i64 {
    const LEAST: f64 = 1.0 / 1024.0;
    if x.abs() < LEAST {
        return 0;
    }
    // Exponent and leading mantissa bits of a float, read as one integer, count the steps of its magnitude.
    let steps = |x: f64| (x.to_bits() >> (52 - shift)) as i64;
    let k = 1 + steps(x.abs()) - steps(LEAST);
    if x < 0.0 { -k } else { k }
}

#[inline]
fn label(out: &mut [u8; 16], letter: u8, k: i64) -> &[u8] {
    let mut digits = itoa::Buffer::new();
    let digits = digits.format(k).as_bytes();
    out[0] = letter;
    out[1..=digits.len()].copy_from_slice(digits);
    &out[..=digits.len()]
}

#[inline]
fn cross_row(seed: u64, rows: &[u64]) -> u64 {
    let mut bytes = [0; 24];
    for (to, row) in bytes.chunks_exact_mut(8).zip(rows) {
        to.copy_from_slice(&row.to_le_bytes());
    }
    row_of(&bytes[..rows.len() * 8], seed)
}

#[inline]
fn bounded(v: f32) -> f32 {
    v.clamp(-(BOUND as f32), BOUND as f32)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::feature::{CrossSettings, FeatureSettings};

    fn schema(features: &str, crosses: &str) -> Schema {
        let features: Vec<FeatureSettings> = serde_json::from_str(features).unwrap();
        let crosses: Vec<CrossSettings> = serde_json::from_str(crosses).unwrap();
        Schema::new(&features, &crosses).unwrap()
    }

    fn rows(slots: &[Slot], feature: u16) -> Vec<u64> {
        slots.iter().filter(|slot| slot.feature == feature).map(|slot| slot.row).collect()
    }

    #[test]
    fn one_value_has_one_text_whatever_its_type() {
        let schema = schema(r#"[{"name": "a"}]"#, "[]");
        let mut encoder = Encoder::new(&schema);
        let mut out = Vec::new();
        encoder.push_str(0, "10").unwrap();
        encoder.finish(&mut out);
        encoder.push_i64(0, 10).unwrap();
        encoder.finish(&mut out);
        encoder.push_u64(0, 10).unwrap();
        encoder.finish(&mut out);
        encoder.push_f64(0, 10.0).unwrap();
        encoder.finish(&mut out);
        assert!(out.iter().all(|slot| *slot == out[0]) && out.len() == 4);
        encoder.push_f64(0, f64::NAN).unwrap();
        encoder.finish(&mut out);
        assert_eq!(out[4], schema.missing_slot(0));
    }

    #[test]
    fn at_serving_a_presentation_feature_keeps_its_declared_value() {
        let schema =
            schema(r#"[{"name": "position", "role": "presentation", "at_serving": 1}, {"name": "item"}]"#, "[]");
        let encode = |mut encoder: Encoder, position: Option<i64>| {
            let mut out = Vec::new();
            if let Some(position) = position {
                encoder.push_i64(0, position).unwrap();
            }
            encoder.push_str(1, "x").unwrap();
            encoder.finish(&mut out);
            out
        };
        let served = encode(Encoder::at_serving(&schema), Some(7));
        assert_eq!(served, encode(Encoder::at_serving(&schema), None));
        assert_eq!(served, encode(Encoder::new(&schema), Some(1)));
        assert_ne!(served, encode(Encoder::new(&schema), Some(7)));
    }

    #[test]
    fn a_number_refuses_text_and_only_a_multi_takes_weights() {
        let schema =
            schema(r#"[{"name": "n", "kind": "numeric"}, {"name": "s", "kind": "sequence"}, {"name": "c"}]"#, "[]");
        let mut encoder = Encoder::new(&schema);
        assert_eq!(encoder.push_str(0, "1"), Err(A_NUMBER));
        assert_eq!(encoder.push_weighted(1, "1", 1.0), Err(A_WEIGHT));
        assert_eq!(encoder.push_weighted(2, "1", 1.0), Err(A_WEIGHT));
    }

    #[test]
    fn a_multi_keeps_its_first_values_and_a_sequence_its_last() {
        let schema = schema(
            r#"[{"name": "a", "kind": "multi", "max_len": 2}, {"name": "b", "kind": "sequence", "max_len": 2}]"#,
            "[]",
        );
        let mut encoder = Encoder::new(&schema);
        for value in ["x", "y", "z"] {
            encoder.push_str(0, value).unwrap();
            encoder.push_str(1, value).unwrap();
        }
        let mut out = Vec::new();
        encoder.finish(&mut out);
        let row = |name: &str, text: &str| row_of(text.as_bytes(), crate::feature::schema::seed_of(name));
        assert_eq!(rows(&out, 0), [row("a", "x"), row("a", "y")]);
        assert_eq!(rows(&out, 1), [row("b", "y"), row("b", "z")]);
    }

    proptest! {
        #[test]
        fn the_text_of_a_float_reads_back_as_the_same_float(bits in any::<u64>()) {
            let v = f64::from_bits(bits);
            prop_assume!(v.is_finite());
            let mut digits = Digits::default();
            let text = digits.f64(v);
            prop_assert_eq!(text.parse::<f64>().unwrap(), v);
            if v.trunc() == v && v.abs() < 9e15 {
                prop_assert_eq!(text, (v as i64).to_string());
            }
        }

        #[test]
        fn buckets_grow_with_the_number_and_mirror_its_sign(a in any::<f64>(), b in any::<f64>(), shift in 0u32..=10) {
            prop_assume!(!a.is_nan() && !b.is_nan());
            let (low, high) = if a <= b { (a, b) } else { (b, a) };
            prop_assert!(bucket(low, shift) <= bucket(high, shift));
            prop_assert_eq!(bucket(-a, shift), -bucket(a, shift));
            // Twice as much is an octave further.
            if (1e-3..1e300).contains(&a.abs()) {
                prop_assert_eq!(bucket(2.0 * a.abs(), shift) - bucket(a.abs(), shift), 1 << shift);
            }
        }

        #[test]
        fn a_bag_has_length_one_and_bounded_values(weights in prop::collection::vec(any::<f64>(), 0..40)) {
            let schema = schema(r#"[{"name": "a", "kind": "multi", "max_len": 20}]"#, "[]");
            let mut encoder = Encoder::new(&schema);
            for (i, weight) in weights.iter().enumerate() {
                encoder.push_weighted(0, &i.to_string(), *weight).unwrap();
            }
            let mut out = Vec::new();
            encoder.finish(&mut out);
            let squares: f64 = out.iter().map(|slot| f64::from(slot.value).powi(2)).sum();
            prop_assert!((squares - 1.0).abs() < 1e-5, "{}", squares);
            prop_assert!(out.len() <= 20);
        }

        #[test]
        fn a_cross_is_the_bounded_product_of_its_parts(
            a in prop::collection::vec(0u64..9, 0..6), b in 0u64..9, c in prop::collection::vec(0u64..9, 0..6), max in 1u32..40,
        ) {
            let crosses = format!(r#"[{{"of": ["a", "b", "c"], "max": {max}}}, {{"of": ["c", "a"], "max": {max}, "name": "ca"}}]"#);
            let schema = schema(r#"[{"name": "a", "kind": "multi"}, {"name": "b"}, {"name": "c", "kind": "sequence"}]"#, &crosses);
            let mut encoder = Encoder::new(&schema);
            for &v in &a {
                encoder.push_u64(0, v).unwrap();
            }
            encoder.push_u64(1, b).unwrap();
            for &v in &c {
                encoder.push_u64(2, v).unwrap();
            }
            // What stands in front of a record in a chunk does not matter.
            let mut out = vec![Slot::default(); 3];
            encoder.finish(&mut out);
            let out = &out[3..];
            let part = |feature: u16| out.iter().filter(move |slot| slot.feature == feature);
            let product = |parts: &[&Slot], seed: u64| {
                let bytes: Vec<u8> = parts.iter().flat_map(|slot| slot.row.to_le_bytes()).collect();
                let value = parts[1..].iter().fold(parts[0].value, |value, slot| value * slot.value);
                (row_of(&bytes, seed), value)
            };
            let mut expected = Vec::new();
            for a in part(0) {
                for b in part(1) {
                    expected.extend(part(2).map(|c| product(&[a, b, c], schema.crosses[0].seed)));
                }
            }
            expected.truncate(max as usize);
            let got: Vec<_> = part(3).map(|slot| (slot.row, slot.value)).collect();
            prop_assert_eq!(got, expected);
            let mut expected = Vec::new();
            for c in part(2) {
                expected.extend(part(0).map(|a| product(&[c, a], schema.crosses[1].seed)));
            }
            expected.truncate(max as usize);
            let got: Vec<_> = part(4).map(|slot| (slot.row, slot.value)).collect();
            prop_assert_eq!(got, expected);
        }
    }
}
