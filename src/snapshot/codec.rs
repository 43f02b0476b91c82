//! Canonical safetensors bytes, and the seal under which small JSON documents travel.
//!
//! [`Arrays`] is what both snapshots and checkpoints are made of: named little-endian arrays. The same arrays under the
//! same format name always give the same bytes, so a file can be named by its [`Digest`]. The format is safetensors
//! (<https://github.com/huggingface/safetensors>); `docs/snapshot-format.md` writes down what we add.

use std::collections::HashMap;
use std::fmt;

use bytes::Bytes;
use half::f16;
use safetensors::tensor::{Metadata, SafeTensors, TensorInfo};
use xxhash_rust::xxh3::Xxh3;

use super::column::{Column, Element};

/// The only metadata key of a file, since the safetensors crate writes its metadata map in random order.
pub const METADATA_KEY: &str = "tidemill";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not a safetensors file: {0}")]
    Malformed(String),
    #[error(
        "made for `{found}`, expected `{expected}`: a checkpoint is not a snapshot, and a newer format needs a newer tidemill"
    )]
    Format { expected: String, found: String },
    #[error("header is not the canonical one, so the file was not written by tidemill or was changed")]
    NotCanonical,
    #[error("tensor `{0}` is missing")]
    Missing(String),
    #[error("tensor `{name}` must be {expected}, found {found}")]
    Wrong { name: String, expected: String, found: String },
    #[error("{length} bytes, expected {expected}: the file was cut short or replaced")]
    Length { expected: u64, length: u64 },
    #[error("digest is {found}, expected {expected}: at least one byte differs from what was written")]
    Digest { expected: Digest, found: Digest },
    #[error("does not end with its check, so it was cut short or not written by tidemill")]
    Unsealed,
    #[error("is not the JSON expected here")]
    Json(#[from] serde_json::Error),
}

pub type Result<T> = std::result::Result<T, Error>;

// ---------------------------------------------------------------------------------------------------------- digests

/// xxh3-128 of some bytes, written as 32 lower-case hex digits. Guards against accidents, not against adversaries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(pub u128);

impl Digest {
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxhash_rust::xxh3::xxh3_128(bytes))
    }

    fn of_pieces(pieces: &[Bytes]) -> Self {
        let mut digest = Digesting::default();
        pieces.iter().for_each(|piece| digest.update(piece));
        digest.digest()
    }

    /// Reads 32 lower-case hex digits, and nothing else.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let canonical = text.len() == 32 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if canonical { u128::from_str_radix(text, 16).ok().map(Self) } else { None }
    }

    /// Compares `bytes` with what was promised about them.
    pub fn check(self, expected_length: u64, bytes: &[u8]) -> Result<()> {
        let length = bytes.len() as u64;
        if length != expected_length {
            return Err(Error::Length { expected: expected_length, length });
        }
        let found = Self::of(bytes);
        if found == self { Ok(()) } else { Err(Error::Digest { expected: self, found }) }
    }
}

/// The digest of bytes that come in pieces.
#[derive(Clone, Default)]
pub(super) struct Digesting(Xxh3);

impl Digesting {
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// Of all pieces so far.
    pub fn digest(&self) -> Digest {
        Digest(self.0.digest128())
    }
}

impl fmt::Debug for Digesting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.digest(), f)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom(format!("`{text}` is not 32 lower-case hex digits")))
    }
}

// ------------------------------------------------------------------------------------------------------------- seal

const SEAL_OPEN: &str = ",\"check\":\"";
const SEAL_CLOSE: &str = "\"}\n";
const SEAL_LENGTH: usize = SEAL_OPEN.len() + 32 + SEAL_CLOSE.len();

/// Writes `document` (a struct or map with at least one member) as compact JSON whose last member `check` is the digest
/// of all bytes before the last 45, that is before `,"check":"..."}` and the line end.
pub fn seal(document: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec(document)?;
    assert!(bytes.pop() == Some(b'}') && bytes.len() > 1, "only a JSON object with a member can be sealed");
    let check = Digest::of(&bytes);
    bytes.extend_from_slice(format!("{SEAL_OPEN}{check}{SEAL_CLOSE}").as_bytes());
    Ok(bytes)
}

/// Verifies what [`seal`] wrote and returns the JSON without its `check`.
pub fn unseal(bytes: &[u8]) -> Result<Vec<u8>> {
    let at = bytes.len().checked_sub(SEAL_LENGTH).ok_or(Error::Unsealed)?;
    let (body, end) = bytes.split_at(at);
    let check = std::str::from_utf8(end)
        .ok()
        .and_then(|end| end.strip_prefix(SEAL_OPEN)?.strip_suffix(SEAL_CLOSE))
        .and_then(Digest::parse)
        .ok_or(Error::Unsealed)?;
    check.check(at as u64, body)?;
    let mut json = body.to_vec();
    json.push(b'}');
    Ok(json)
}

// ----------------------------------------------------------------------------------------------------------- arrays

/// Element types that our files use, in the order in which they stand in a file: widest first, so all are aligned.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Dtype {
    U64,
    I64,
    F64,
    F32,
    U32,
    I32,
    F16,
    U8,
    I8,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::U64 | Self::I64 | Self::F64 => 8,
            Self::F32 | Self::U32 | Self::I32 => 4,
            Self::F16 => 2,
            Self::U8 | Self::I8 => 1,
        }
    }

    fn to_safetensors(self) -> safetensors::Dtype {
        match self {
            Self::U64 => safetensors::Dtype::U64,
            Self::I64 => safetensors::Dtype::I64,
            Self::F64 => safetensors::Dtype::F64,
            Self::F32 => safetensors::Dtype::F32,
            Self::U32 => safetensors::Dtype::U32,
            Self::I32 => safetensors::Dtype::I32,
            Self::F16 => safetensors::Dtype::F16,
            Self::U8 => safetensors::Dtype::U8,
            Self::I8 => safetensors::Dtype::I8,
        }
    }

    fn from_safetensors(dtype: safetensors::Dtype) -> Option<Self> {
        use Dtype::{F16, F32, F64, I8, I32, I64, U8, U32, U64};
        [U64, I64, F64, F32, U32, I32, F16, U8, I8].into_iter().find(|ours| ours.to_safetensors() == dtype)
    }
}

/// One named array. `data` is little endian, row major, `shape.product() * dtype.size()` bytes.
#[derive(Clone, PartialEq, Debug)]
pub struct Array {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub data: Bytes,
}

/// Named arrays, in the order they were pushed; names are unique. Clones share the data.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Arrays {
    list: Vec<Array>,
}

/// A file that is yet to be written: its pieces one after the other.
#[derive(Clone, Debug)]
pub struct Encoded {
    pub pieces: Vec<Bytes>,
    pub length: u64,
    pub digest: Digest,
}

macro_rules! typed {
    ($push:ident, $get:ident, $type:ty, $dtype:ident) => {
        /// Adds an array; panics when `shape` does not hold `values.len()` elements or the name is taken.
        pub fn $push(&mut self, name: impl Into<String>, shape: &[usize], values: &[$type]) {
            let mut data = Vec::with_capacity(std::mem::size_of_val(values));
            values.iter().for_each(|value| data.extend_from_slice(&value.to_le_bytes()));
            self.push(Array { name: name.into(), dtype: Dtype::$dtype, shape: shape.to_vec(), data: data.into() });
        }

        /// Copies out the elements of an array, row major.
        pub fn $get(&self, name: &str) -> Result<Vec<$type>> {
            let data = self.typed(name, Dtype::$dtype)?;
            let elements = data.chunks_exact(size_of::<$type>());
            Ok(elements.map(|e| <$type>::from_le_bytes(e.try_into().expect("exact chunks"))).collect())
        }
    };
}

impl Arrays {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    typed!(push_u64, u64s, u64, U64);
    typed!(push_i64, i64s, i64, I64);
    typed!(push_f64, f64s, f64, F64);
    typed!(push_f32, f32s, f32, F32);
    typed!(push_u32, u32s, u32, U32);
    typed!(push_i32, i32s, i32, I32);
    typed!(push_f16, f16s, f16, F16);
    typed!(push_u8, u8s, u8, U8);
    typed!(push_i8, i8s, i8, I8);

    /// Adds an array; panics when `shape` and `data` do not fit each other or the name is taken.
    pub fn push(&mut self, array: Array) {
        let elements: usize = array.shape.iter().product();
        assert_eq!(elements * array.dtype.size(), array.data.len(), "shape of `{}`", array.name);
        assert!(self.get(&array.name).is_none(), "two arrays named `{}`", array.name);
        self.list.push(array);
    }

    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Array> {
        self.list.iter().find(|array| array.name == name)
    }

    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        self.get(name).map(|array| array.shape.as_slice()).ok_or_else(|| Error::Missing(name.to_owned()))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Array> {
        self.list.iter()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.list.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The elements of an array, row major, which share its data where they can.
    pub fn column<T: Element>(&self, name: &str) -> Result<Column<T>> {
        Ok(Column::of(self.typed(name, T::DTYPE)?))
    }

    fn typed(&self, name: &str, dtype: Dtype) -> Result<&Bytes> {
        let array = self.get(name).ok_or_else(|| Error::Missing(name.to_owned()))?;
        if array.dtype == dtype {
            return Ok(&array.data);
        }
        let (expected, found) = (format!("{dtype:?}"), format!("{:?}", array.dtype));
        Err(Error::Wrong { name: name.to_owned(), expected, found })
    }

    /// The canonical file: arrays ordered by type (see [`Dtype`]), then by name. Costs no copy of the data.
    pub fn encode(&self, format: &str) -> Result<Encoded> {
        let mut sorted: Vec<&Array> = self.list.iter().collect();
        sorted.sort_by(|a, b| canonical(a, b));
        let mut pieces = vec![Bytes::from(header(&sorted, format)?)];
        pieces.extend(sorted.iter().map(|array| array.data.clone()));
        let length = pieces.iter().map(|piece| piece.len() as u64).sum();
        let digest = Digest::of_pieces(&pieces);
        Ok(Encoded { pieces, length, digest })
    }

    /// Reads what [`Arrays::encode`] wrote under the same format name; the arrays share `bytes`.
    pub fn decode(bytes: &Bytes, format: &str) -> Result<Self> {
        let malformed = |e: safetensors::SafeTensorError| Error::Malformed(e.to_string());
        let (header_length, metadata) = SafeTensors::read_metadata(bytes).map_err(malformed)?;
        let found = metadata.metadata().as_ref().and_then(|map| map.get(METADATA_KEY)).cloned().unwrap_or_default();
        if found != format {
            return Err(Error::Format { expected: format.to_owned(), found });
        }
        let data = 8 + header_length;
        let mut list = Vec::new();
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).ok_or_else(|| Error::Missing(name.clone()))?;
            let dtype = Dtype::from_safetensors(info.dtype).ok_or_else(|| Error::Wrong {
                name: name.clone(),
                expected: "of a type that tidemill writes".to_owned(),
                found: format!("{:?}", info.dtype),
            })?;
            let (start, end) = info.data_offsets;
            list.push(Array { name, dtype, shape: info.shape.clone(), data: bytes.slice(data + start..data + end) });
        }
        list.sort_by(canonical);
        if header(&list.iter().collect::<Vec<_>>(), format)? != bytes[..data] {
            return Err(Error::NotCanonical);
        }
        Ok(Self { list })
    }
}

/// The order of arrays in a file.
fn canonical(a: &Array, b: &Array) -> std::cmp::Ordering {
    a.dtype.cmp(&b.dtype).then_with(|| a.name.cmp(&b.name))
}

/// Length and JSON header, padded with spaces to 8 bytes as the safetensors crate does.
fn header(sorted: &[&Array], format: &str) -> Result<Vec<u8>> {
    let mut offset = 0;
    let infos = sorted.iter().map(|array| {
        let start = offset;
        offset += array.data.len();
        let info = TensorInfo {
            dtype: array.dtype.to_safetensors(),
            shape: array.shape.clone(),
            data_offsets: (start, offset),
        };
        (array.name.clone(), info)
    });
    let map = HashMap::from([(METADATA_KEY.to_owned(), format.to_owned())]);
    let metadata = Metadata::new(Some(map), infos.collect()).map_err(|e| Error::Malformed(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata)?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok(bytes)
}

impl Encoded {
    /// The file in one piece.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        self.pieces.concat()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample() -> Arrays {
        let mut arrays = Arrays::new();
        arrays.push_f32("w", &[2, 2], &[1.0, -0.5, f32::MIN_POSITIVE, 3.25]);
        arrays.push_u8("text", &[3], b"abc");
        arrays.push_u64("ids", &[2], &[1, u64::MAX]);
        arrays.push_i64("times", &[1], &[-5]);
        arrays.push_f64("sums", &[1], &[0.1]);
        arrays.push_u32("n", &[0], &[]);
        arrays.push_i32("left", &[1], &[-1]);
        arrays
    }

    fn bytes(arrays: &Arrays) -> Bytes {
        arrays.encode("test/1").unwrap().to_vec().into()
    }

    #[test]
    fn arrays_come_back_bit_for_bit_whatever_the_order_they_were_pushed_in() {
        let arrays = sample();
        let back = Arrays::decode(&bytes(&arrays), "test/1").unwrap();
        assert_eq!(back.len(), 7);
        arrays.iter().for_each(|array| assert_eq!(back.get(&array.name), Some(array)));
        assert_eq!(back.f32s("w").unwrap(), [1.0, -0.5, f32::MIN_POSITIVE, 3.25]);
        assert_eq!(back.u64s("ids").unwrap(), [1, u64::MAX]);
        assert_eq!(back.i64s("times").unwrap(), [-5]);
        assert_eq!(back.shape("w").unwrap(), [2, 2]);
        let mut turned = Arrays::new();
        let mut list: Vec<_> = arrays.iter().cloned().collect();
        list.reverse();
        list.into_iter().for_each(|array| turned.push(array));
        assert_eq!(bytes(&turned), bytes(&arrays), "canonical bytes do not depend on the order of pushing");
    }

    #[test]
    fn the_bytes_are_those_of_the_safetensors_crate() {
        struct View<'a>(&'a Array);
        impl safetensors::View for View<'_> {
            fn dtype(&self) -> safetensors::Dtype {
                self.0.dtype.to_safetensors()
            }
            fn shape(&self) -> &[usize] {
                &self.0.shape
            }
            fn data(&self) -> std::borrow::Cow<'_, [u8]> {
                (&self.0.data[..]).into()
            }
            fn data_len(&self) -> usize {
                self.0.data.len()
            }
        }
        // Among types of one width the crate has an order of its own, which may change; ours is pinned by `Dtype`.
        let mut arrays = Arrays::new();
        arrays.push_f32("w", &[1], &[1.0]);
        arrays.push_u64("b", &[1], &[1]);
        arrays.push_u64("a", &[2], &[1, 2]);
        arrays.push_u8("c", &[1], &[1]);
        let map = HashMap::from([(METADATA_KEY.to_owned(), "test/1".to_owned())]);
        let theirs = safetensors::serialize(arrays.iter().map(|a| (a.name.clone(), View(a))), Some(map)).unwrap();
        assert_eq!(bytes(&arrays), theirs);
    }

    #[test]
    fn the_canonical_bytes_never_change() {
        assert_eq!(sample().encode("test/1").unwrap().digest.to_string(), "fdbcfb034170ddc3daaab49e970da489");
    }

    #[test]
    fn a_file_for_something_else_is_refused_by_name() {
        let error = Arrays::decode(&bytes(&sample()), "test/2").unwrap_err();
        assert!(matches!(&error, Error::Format { found, .. } if found == "test/1"), "{error}");
        let error = sample().f64s("w").unwrap_err();
        assert_eq!(error.to_string(), "tensor `w` must be F64, found F32");
    }

    #[test]
    fn a_seal_is_json_and_covers_every_byte() {
        let sealed = seal(&serde_json::json!({"a": 1, "b": [0.1]})).unwrap();
        let text = std::str::from_utf8(&sealed).unwrap();
        assert!(text.starts_with(r#"{"a":1,"b":[0.1],"check":""#) && text.ends_with("\"}\n"), "{text}");
        assert!(serde_json::from_str::<serde_json::Value>(text).is_ok());
        assert_eq!(unseal(&sealed).unwrap(), br#"{"a":1,"b":[0.1]}"#);
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut bad = sealed.clone();
                bad[at] ^= 1 << bit;
                assert!(unseal(&bad).is_err(), "byte {at} bit {bit}");
            }
            assert!(unseal(&sealed[..at]).is_err(), "cut at {at}");
        }
    }

    proptest! {
        #[test]
        fn any_changed_byte_is_noticed_by_the_digest_and_never_panics_the_reader(at in 0usize..10_000, mask in 1u8..) {
            let encoded = sample().encode("test/1").unwrap();
            let mut bad = encoded.to_vec();
            let at = at % bad.len();
            bad[at] ^= mask;
            prop_assert!(encoded.digest.check(encoded.length, &bad).is_err());
            let _ = Arrays::decode(&bad.into(), "test/1");
        }

        #[test]
        fn a_cut_or_grown_file_is_refused_even_without_its_digest(keep in 0usize..10_000, more in 1usize..9) {
            let whole = bytes(&sample());
            prop_assert!(Arrays::decode(&whole.slice(..keep % whole.len()), "test/1").is_err());
            let mut grown = whole.to_vec();
            grown.resize(grown.len() + more, 0);
            prop_assert!(Arrays::decode(&grown.into(), "test/1").is_err());
        }
    }
}
