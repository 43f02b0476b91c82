//! Values as the records have them, kept where examples are written out. They travel as the text of their event.
//!
//! Nothing is kept where only slots are wanted, which is everywhere else.

use super::Scalar;
use crate::feature::encode::Digits;

/// The values of one record that the features took, in a row.
#[derive(Clone, Debug, Default)]
pub(super) struct Kept {
    bytes: Vec<u8>,
    /// How much of it all elements of a slate share.
    shared: usize,
}

const NUMBER: u8 = 0;
const TEXT: u8 = 1;
const WEIGHTED: u8 = 2;

impl Kept {
    pub fn begin(&mut self) {
        self.bytes.clear();
        self.shared = 0;
    }

    /// What follows belongs to an element of the slate.
    pub fn begin_elements(&mut self) {
        self.shared = self.bytes.len();
    }

    pub fn begin_element(&mut self) {
        self.bytes.truncate(self.shared);
    }

    /// Keeps a value: of a numeric feature the number, of others the canonical text. Null is nothing.
    pub fn keep(&mut self, feature: usize, numeric: bool, value: Scalar<'_>) {
        if let (true, Some(number)) = (numeric, as_number(value)) {
            self.head(feature, NUMBER);
            self.bytes.extend_from_slice(&number.to_le_bytes());
            return;
        }
        let (mut digits, mut moment) = (Digits::default(), itoa::Buffer::new());
        let text = match value {
            Scalar::Null => return,
            Scalar::Bool(v) => {
                if v {
                    "true"
                } else {
                    "false"
                }
            }
            Scalar::I64(_, text) | Scalar::U64(_, text) | Scalar::Str(text) => text,
            Scalar::F64(v) => digits.f64(v),
            Scalar::Moment(ms) => moment.format(ms),
        };
        self.head(feature, TEXT);
        self.text(text);
    }

    pub fn keep_weighted(&mut self, feature: usize, text: &str, weight: f64) {
        self.head(feature, WEIGHTED);
        self.bytes.extend_from_slice(&weight.to_le_bytes());
        self.text(text);
    }

    /// Appends the id's text and the values.
    pub fn write(&self, id: &[u8], out: &mut Vec<u8>) {
        out.extend_from_slice(&(id.len() as u32).to_le_bytes());
        out.extend_from_slice(id);
        out.extend_from_slice(&self.bytes);
    }

    fn head(&mut self, feature: usize, kind: u8) {
        self.bytes.extend_from_slice(&(feature as u16).to_le_bytes());
        self.bytes.push(kind);
    }

    fn text(&mut self, text: &str) {
        self.bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(text.as_bytes());
    }
}

fn as_number(value: Scalar<'_>) -> Option<f64> {
    match value {
        Scalar::Bool(v) => Some(f64::from(u8::from(v))),
        Scalar::Moment(ms) => Some(ms as f64),
        other => other.number(),
    }
}

/// A value that a feature took.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Value<'a> {
    /// Of a numeric feature.
    Number(f64),
    /// Canonical text: of a category, or one of a bag.
    Text(&'a str),
    /// One of a `multi` with its weight.
    Weighted(&'a str, f64),
}

/// The id and the values (feature, value) of an event whose decoder [keeps values](super::Decoder::keeping_values), from the
/// event's text. Values of a bag are in their order.
#[must_use]
pub fn read(text: &[u8]) -> (&str, Values<'_>) {
    let mut rest = text;
    let id = take_text(&mut rest);
    (id, Values { rest })
}

/// See [`read`].
pub struct Values<'a> {
    rest: &'a [u8],
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let (head, tail) = rest.split_first_chunk::<N>().expect("written by `Kept`");
    *rest = tail;
    *head
}

fn take_text<'a>(rest: &mut &'a [u8]) -> &'a str {
    let len = u32::from_le_bytes(take(rest)) as usize;
    let (text, tail) = rest.split_at(len);
    *rest = tail;
    std::str::from_utf8(text).expect("written by `Kept`")
}

impl<'a> Iterator for Values<'a> {
    type Item = (usize, Value<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.rest.is_empty() {
            return None;
        }
        let feature = usize::from(u16::from_le_bytes(take(&mut self.rest)));
        let [kind] = take(&mut self.rest);
        let value = match kind {
            NUMBER => Value::Number(f64::from_le_bytes(take(&mut self.rest))),
            TEXT => Value::Text(take_text(&mut self.rest)),
            _ => {
                let weight = f64::from_le_bytes(take(&mut self.rest));
                Value::Weighted(take_text(&mut self.rest), weight)
            }
        };
        Some((feature, value))
    }
}
