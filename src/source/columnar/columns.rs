//! Columns as records: which of them the paths of a decoder ask for, and their values row by row.
//!
//! | column | is |
//! |---|---|
//! | boolean, integers, floats | what JSON has; a float that is not finite is null |
//! | string; bytes that are UTF-8 | a string |
//! | timestamp of any unit, with a zone or without (then UTC) | milliseconds since the epoch; what is finer is cut |
//! | struct, or map with string keys | an object |
//! | list | an array |
//! | map with string keys, at a `multi` | an object of weights |
//!
//! All others are refused where a path asks for them, and cost nothing where none does.

use std::collections::BTreeSet;
use std::ops::Range;

use arrow_array::cast::AsArray as _;
use arrow_array::{Array, ArrayRef, ArrowPrimitiveType, BooleanArray, StringArray, types};
use arrow_buffer::{NullBuffer, OffsetBuffer, ScalarBuffer};
use arrow_schema::{DataType, Fields, TimeUnit};

use crate::feature::encode::Digits;
use crate::source::decode::{Decoder, ELEMENT, ROOT, Row, Scalar, Stop, Target, Walker};

/// Which columns a file must be read for.
#[derive(Debug, PartialEq)]
pub struct Choice {
    /// Columns without columns inside of them, by their numbers in the file, ascending.
    pub leaves: Vec<usize>,
    /// Paths that no column is for; all of them may be missing in a record, too.
    pub missing: Vec<String>,
}

/// Chooses the columns that the paths of `decoder` name, and checks that they hold what is needed.
pub fn choose(decoder: &Decoder, columns: &Fields) -> Result<Choice, String> {
    let mut chooser = Chooser { decoder, leaf: 0, leaves: BTreeSet::new(), found: BTreeSet::new() };
    chooser.members(ROOT, columns)?;
    let Chooser { leaves, found, .. } = chooser;
    let mut missing = Vec::new();
    for (node, path, targets) in decoder.paths() {
        if targets.is_empty() || found.contains(&node) {
            continue;
        }
        let needs = targets.iter().find_map(|target| match target {
            Target::Id(_) if !decoder.is_labelled() => Some("the id"),
            Target::Time => Some("the event time"),
            Target::Label => Some("the label"),
            Target::Slate => Some("the array that `explode` names"),
            _ => None,
        });
        if let Some(needs) = needs {
            let names: Vec<_> = columns.iter().map(|column| format!("`{}`", column.name())).collect();
            return Err(format!("it has no column `{path}` for {needs}; it has {}", names.join(", ")));
        }
        missing.push(path.to_owned());
    }
    Ok(Choice { leaves: leaves.into_iter().collect(), missing })
}

struct Chooser<'a> {
    decoder: &'a Decoder,
    /// Number of the next column without columns inside of it.
    leaf: usize,
    leaves: BTreeSet<usize>,
    /// Nodes of the trie that a column was found for.
    found: BTreeSet<usize>,
}

impl Chooser<'_> {
    fn members(&mut self, node: usize, members: &Fields) -> Result<(), String> {
        let mut seen = BTreeSet::new();
        for member in members {
            match self.decoder.child(node, member.name()) {
                Some(child) if !seen.insert(child) => {
                    return Err(format!("column `{}` is there twice", self.decoder.path(child)));
                }
                Some(child) => self.column(child, member.data_type())?,
                None => self.leaf += leaves(member.data_type()),
            }
        }
        Ok(())
    }

    /// Takes the column for a node. What it leaves out it steps over.
    fn column(&mut self, node: usize, column: &DataType) -> Result<(), String> {
        self.found.insert(node);
        let first = self.leaf;
        match column {
            DataType::Struct(members) => {
                if self.decoder.has_bag(node) || !self.decoder.takes_object(node) {
                    return Err(self.refuse(node, column));
                }
                self.members(node, members)?;
            }
            DataType::Map(entries, _) => {
                let DataType::Struct(entry) = entries.data_type() else { return Err(self.refuse(node, column)) };
                let [key, value] = &entry[..] else { return Err(self.refuse(node, column)) };
                if !self.decoder.takes_object(node) || *key.data_type() != DataType::Utf8 {
                    return Err(self.refuse(node, column));
                }
                self.leaves.insert(first);
                if self.decoder.has_bag(node) {
                    if !is_number(value.data_type()) && *value.data_type() != DataType::Boolean {
                        return Err(self.refuse(node, column));
                    }
                    self.leaves.insert(first + 1);
                }
                for (_, child) in self.decoder.children(node) {
                    self.leaf = first + 1;
                    self.column(child, value.data_type())?;
                }
            }
            DataType::List(element) if self.decoder.is_slate(node) => self.column(ELEMENT, element.data_type())?,
            DataType::List(element) => {
                if !self.decoder.takes_array(node) {
                    return Err(self.refuse(node, column));
                }
                if self.decoder.has_bag(node) {
                    self.scalar(node, element.data_type(), column)?;
                }
                for (_, child) in self.decoder.positions(node) {
                    self.leaf = first;
                    self.column(child, element.data_type())?;
                }
            }
            scalar => self.scalar(node, scalar, column)?,
        }
        self.leaf = first + leaves(column);
        Ok(())
    }

    /// Takes scalars: a column for a node, or the elements of one for its bags.
    fn scalar(&mut self, node: usize, scalar: &DataType, column: &DataType) -> Result<(), String> {
        let goes_on = self.decoder.goes_on(node) && *scalar != DataType::Null && scalar == column;
        let fits = |target: &Target| self.fits(*target, scalar);
        if !is_scalar(scalar) || goes_on || !self.decoder.targets(node).iter().all(fits) {
            return Err(self.refuse(node, column));
        }
        self.leaves.insert(self.leaf);
        Ok(())
    }

    fn fits(&self, target: Target, column: &DataType) -> bool {
        if *column == DataType::Null {
            return true;
        }
        let number = is_number(column);
        match target {
            Target::Id(_) | Target::Heartbeat | Target::Bag(..) => true,
            Target::Field(feature) => {
                let text = matches!(column, DataType::Utf8 | DataType::Binary);
                !(text && self.decoder.is_numeric(feature))
            }
            Target::Time | Target::LogTime => match column {
                DataType::Timestamp(..) => true,
                DataType::Utf8 | DataType::Binary => self.decoder.reads_times_as_text(),
                _ => number && self.decoder.reads_times_as_numbers(),
            },
            Target::Label => number || *column == DataType::Boolean,
            Target::Weight => number,
            Target::Slate => false,
        }
    }

    #[cold]
    fn refuse(&self, node: usize, column: &DataType) -> String {
        let (path, is) = (self.decoder.path(node), plain(column));
        if !is_scalar(column) && !has_inside(column) {
            return format!(
                "column `{path}` is {is}, which is not read; cast it to a string, integer, double or timestamp"
            );
        }
        let needs = self.decoder.targets(node).iter().map(|target| match target {
            Target::Id(_) => "an id is a string, number, boolean or timestamp".to_owned(),
            Target::Time | Target::LogTime => {
                let text = if self.decoder.reads_times_as_text() { ", RFC 3339 strings" } else { "" };
                let numbers = if self.decoder.reads_times_as_numbers() { ", numbers" } else { "" };
                format!("a time is of timestamps{numbers}{text} under this `time_format`")
            }
            Target::Label => "a label is a boolean, or a number that is 1 or 0".to_owned(),
            Target::Weight => "a weight is a number".to_owned(),
            Target::Heartbeat => "a heartbeat is marked by a string, number or boolean".to_owned(),
            Target::Slate => "`explode` needs a list".to_owned(),
            Target::Field(feature) if self.decoder.is_numeric(*feature) => {
                format!("feature `{}` needs numbers or booleans", self.decoder.feature(*feature))
            }
            Target::Field(feature) => {
                format!("feature `{}` needs strings, numbers or booleans", self.decoder.feature(*feature))
            }
            Target::Bag(feature, true) => {
                format!(
                    "feature `{}` needs a list of scalars, or a map from strings to weights",
                    self.decoder.feature(*feature)
                )
            }
            Target::Bag(feature, false) => {
                format!("feature `{}` needs a list of scalars", self.decoder.feature(*feature))
            }
        });
        let needs: Vec<_> = needs.collect();
        let inside = "paths go on inside of it, so it must be a struct, or a map with string keys".to_owned();
        format!("column `{path}` is {is}; {}", if needs.is_empty() { inside } else { needs.join(", and ") })
    }
}

/// How many columns there are inside of one that have none inside of them.
fn leaves(column: &DataType) -> usize {
    match column {
        DataType::Struct(members) => members.iter().map(|member| leaves(member.data_type())).sum(),
        DataType::List(inside) | DataType::Map(inside, _) => leaves(inside.data_type()),
        _ => 1,
    }
}

fn is_number(column: &DataType) -> bool {
    column.is_integer() || column.is_floating()
}

fn is_scalar(column: &DataType) -> bool {
    use DataType::{Binary, Boolean, Null, Timestamp, Utf8};
    is_number(column) || matches!(column, Null | Boolean | Utf8 | Binary | Timestamp(..))
}

fn has_inside(column: &DataType) -> bool {
    matches!(column, DataType::Struct(_) | DataType::List(_) | DataType::Map(..))
}

/// The type in a few words.
fn plain(column: &DataType) -> String {
    match column {
        DataType::Struct(_) => "a struct".into(),
        DataType::List(element) => format!("a list of {}", element.data_type()),
        DataType::Map(entries, _) => match entries.data_type() {
            DataType::Struct(entry) if entry.len() == 2 => {
                format!("a map from {} to {}", entry[0].data_type(), entry[1].data_type())
            }
            other => format!("a map of {other}"),
        },
        other => format!("of type {other}"),
    }
}

/// The chosen columns of some consecutive rows.
pub struct Table {
    members: Vec<Column>,
    /// Number of the slate's column among the members.
    slate: Option<usize>,
}

/// A column, or one inside of another, at its node of the trie.
struct Column {
    name: Box<str>,
    node: usize,
    nulls: Option<NullBuffer>,
    values: Values,
}

enum Values {
    Null,
    Bool(BooleanArray),
    I8(ScalarBuffer<i8>),
    I16(ScalarBuffer<i16>),
    I32(ScalarBuffer<i32>),
    I64(ScalarBuffer<i64>),
    U8(ScalarBuffer<u8>),
    U16(ScalarBuffer<u16>),
    U32(ScalarBuffer<u32>),
    U64(ScalarBuffer<u64>),
    /// Half floats are few; they are widened once.
    F32(ScalarBuffer<f32>),
    F64(ScalarBuffer<f64>),
    Text(StringArray),
    /// To be multiplied, then divided, to give milliseconds.
    Moment(ScalarBuffer<i64>, i64, i64),
    Struct(Vec<Column>),
    List {
        offsets: OffsetBuffer<i32>,
        /// The elements; unless `bag`, for their text only.
        whole: Option<Box<Column>>,
        bag: bool,
        at: Vec<(usize, Column)>,
    },
    Map {
        offsets: OffsetBuffer<i32>,
        keys: StringArray,
        weights: Option<Box<Column>>,
        at: Vec<(Box<str>, Column)>,
    },
}

impl Table {
    /// Binds columns that [`choose`] has chosen.
    pub fn new(decoder: &Decoder, names: &Fields, columns: &[ArrayRef]) -> Result<Self, String> {
        let members = members(decoder, ROOT, names, columns)?;
        let slate = members.iter().position(|column| decoder.is_slate(column.node));
        Ok(Self { members, slate })
    }
}

fn members(decoder: &Decoder, node: usize, names: &Fields, columns: &[ArrayRef]) -> Result<Vec<Column>, String> {
    let mut members = Vec::with_capacity(columns.len());
    for (name, column) in names.iter().zip(columns) {
        if let Some(child) = decoder.child(node, name.name()) {
            members.push(Column::new(decoder, child, name.name(), column)?);
        }
    }
    members.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(members)
}

impl Column {
    fn new(decoder: &Decoder, node: usize, name: &str, column: &ArrayRef) -> Result<Self, String> {
        fn buffer<T: ArrowPrimitiveType>(column: &ArrayRef) -> ScalarBuffer<T::Native> {
            column.as_primitive::<T>().values().clone()
        }
        let inside = |node: usize, column: &ArrayRef| Self::new(decoder, node, "", column);
        let values = match column.data_type() {
            DataType::Null => Values::Null,
            DataType::Boolean => Values::Bool(column.as_boolean().clone()),
            DataType::Int8 => Values::I8(buffer::<types::Int8Type>(column)),
            DataType::Int16 => Values::I16(buffer::<types::Int16Type>(column)),
            DataType::Int32 => Values::I32(buffer::<types::Int32Type>(column)),
            DataType::Int64 => Values::I64(buffer::<types::Int64Type>(column)),
            DataType::UInt8 => Values::U8(buffer::<types::UInt8Type>(column)),
            DataType::UInt16 => Values::U16(buffer::<types::UInt16Type>(column)),
            DataType::UInt32 => Values::U32(buffer::<types::UInt32Type>(column)),
            DataType::UInt64 => Values::U64(buffer::<types::UInt64Type>(column)),
            DataType::Float16 => {
                let halves = column.as_primitive::<types::Float16Type>();
                Values::F32(halves.values().iter().map(|half| half.to_f32()).collect())
            }
            DataType::Float32 => Values::F32(buffer::<types::Float32Type>(column)),
            DataType::Float64 => Values::F64(buffer::<types::Float64Type>(column)),
            DataType::Utf8 => Values::Text(column.as_string().clone()),
            DataType::Binary => {
                let text = StringArray::try_from_binary(column.as_binary().clone());
                let path = decoder.path(node);
                Values::Text(text.map_err(|_| format!("column `{path}` holds bytes that are no UTF-8 text"))?)
            }
            DataType::Timestamp(TimeUnit::Second, _) => {
                Values::Moment(buffer::<types::TimestampSecondType>(column), 1000, 1)
            }
            DataType::Timestamp(TimeUnit::Millisecond, _) => {
                Values::Moment(buffer::<types::TimestampMillisecondType>(column), 1, 1)
            }
            DataType::Timestamp(TimeUnit::Microsecond, _) => {
                Values::Moment(buffer::<types::TimestampMicrosecondType>(column), 1, 1000)
            }
            DataType::Timestamp(TimeUnit::Nanosecond, _) => {
                Values::Moment(buffer::<types::TimestampNanosecondType>(column), 1, 1_000_000)
            }
            DataType::Struct(names) => Values::Struct(members(decoder, node, names, column.as_struct().columns())?),
            DataType::List(_) => {
                let list = column.as_list::<i32>();
                let (bag, slate) = (decoder.has_bag(node), decoder.is_slate(node));
                let of = if slate { ELEMENT } else { node };
                let whole = if bag || slate { Some(Box::new(inside(of, list.values())?)) } else { None };
                let at = decoder.positions(node);
                let at =
                    at.map(|(at, child)| Ok((at, inside(child, list.values())?))).collect::<Result<_, String>>()?;
                Values::List { offsets: list.offsets().clone(), whole, bag, at }
            }
            DataType::Map(..) => {
                let map = column.as_map();
                let weights = if decoder.has_bag(node) { Some(Box::new(inside(node, map.values())?)) } else { None };
                let at = decoder.children(node);
                let at = at.map(|(key, child)| Ok((key.into(), inside(child, map.values())?)));
                let at = at.collect::<Result<_, String>>()?;
                Values::Map { offsets: map.offsets().clone(), keys: map.keys().as_string().clone(), weights, at }
            }
            other => return Err(format!("column `{}` is of type {other}", decoder.path(node))),
        };
        Ok(Self { name: name.into(), node, nulls: column.nulls().cloned(), values })
    }

    fn is_null(&self, row: usize) -> bool {
        matches!(self.values, Values::Null) || self.nulls.as_ref().is_some_and(|nulls| nulls.is_null(row))
    }

    /// Gives a scalar to `take`; a column that holds none gives null.
    #[inline]
    fn scalar<R>(&self, row: usize, take: impl FnOnce(Scalar<'_>) -> R) -> R {
        let mut digits = itoa::Buffer::new();
        if self.is_null(row) {
            return take(Scalar::Null);
        }
        let value = match &self.values {
            Values::Bool(v) => Scalar::Bool(v.value(row)),
            Values::I8(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::I16(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::I32(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::I64(v) => Scalar::I64(v[row], digits.format(v[row])),
            Values::U8(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::U16(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::U32(v) => Scalar::I64(v[row].into(), digits.format(v[row])),
            Values::U64(v) => Scalar::U64(v[row], digits.format(v[row])),
            Values::F32(v) if v[row].is_finite() => Scalar::F64(v[row].into()),
            Values::F64(v) if v[row].is_finite() => Scalar::F64(v[row]),
            Values::Text(v) => Scalar::Str(v.value(row)),
            Values::Moment(v, times, per) => Scalar::Moment(v[row].saturating_mul(*times).div_euclid(*per)),
            Values::Null | Values::F32(_) | Values::F64(_) => Scalar::Null,
            Values::Struct(_) | Values::List { .. } | Values::Map { .. } => Scalar::Null,
        };
        take(value)
    }

    /// Gives the value in a row to the node that the column is for, as if it had stood there in JSON.
    #[inline]
    fn give(&self, row: usize, to: &mut Walker) -> Result<(), Stop> {
        match &self.values {
            _ if self.is_null(row) => to.give(self.node, Scalar::Null),
            Values::Struct(members) => members.iter().try_for_each(|member| member.give(row, to)),
            Values::List { offsets, whole, bag, at } => {
                let elements = range(offsets, row);
                for (at, column) in at {
                    if *at < elements.len() {
                        column.give(elements.start + at, to)?;
                    }
                }
                if let Some(whole) = whole.as_ref().filter(|_| *bag) {
                    for element in elements {
                        whole.scalar(element, |value| to.give_bags(self.node, false, value))?;
                    }
                }
                Ok(())
            }
            Values::Map { offsets, keys, weights, at } => {
                for (key, column) in at {
                    let mut found = range(offsets, row).filter(|&entry| keys.value(entry) == &**key);
                    if let Some(entry) = found.next() {
                        if found.next().is_some() {
                            return to.refuse(column.node, "is there twice");
                        }
                        column.give(entry, to)?;
                    }
                }
                let Some(weights) = weights else { return Ok(()) };
                for entry in range(offsets, row) {
                    weights.scalar(entry, |weight| to.give_weight(self.node, keys.value(entry), weight))?;
                }
                Ok(())
            }
            _ => self.scalar(row, |value| to.give(self.node, value)),
        }
    }

    fn append_text(&self, row: usize, out: &mut Vec<u8>) {
        match &self.values {
            _ if self.is_null(row) => out.extend_from_slice(b"null"),
            Values::Struct(members) => append_members(members, row, out),
            Values::List { offsets, whole, at, .. } => {
                out.push(b'[');
                let elements = range(offsets, row);
                for (position, element) in elements.enumerate() {
                    if position > 0 {
                        out.push(b',');
                    }
                    match (whole, at.iter().find(|(at, _)| *at == position)) {
                        (Some(whole), _) => whole.append_text(element, out),
                        (None, Some((_, column))) => column.append_text(element, out),
                        (None, None) => out.extend_from_slice(b"null"),
                    }
                }
                out.push(b']');
            }
            Values::Map { offsets, keys, weights, at } => {
                out.push(b'{');
                let mut first = true;
                for entry in range(offsets, row) {
                    let key = keys.value(entry);
                    let at = at.iter().find(|(at, _)| **at == *key).map(|(_, column)| column);
                    if let Some(column) = weights.as_deref().or(at) {
                        append_key(key, &mut first, out);
                        column.append_text(entry, out);
                    }
                }
                out.push(b'}');
            }
            _ => self.scalar(row, |value| match value {
                Scalar::Null => out.extend_from_slice(b"null"),
                Scalar::Bool(v) => out.extend_from_slice(if v { b"true" } else { b"false" }),
                Scalar::I64(_, text) | Scalar::U64(_, text) => out.extend_from_slice(text.as_bytes()),
                Scalar::F64(v) => out.extend_from_slice(Digits::default().f64(v).as_bytes()),
                Scalar::Str(v) => append_string(v, out),
                Scalar::Moment(ms) => out.extend_from_slice(itoa::Buffer::new().format(ms).as_bytes()),
            }),
        }
    }
}

fn range(offsets: &OffsetBuffer<i32>, row: usize) -> Range<usize> {
    offsets[row] as usize..offsets[row + 1] as usize
}

fn append_string(text: &str, out: &mut Vec<u8>) {
    serde_json::to_writer(out, text).expect("a Vec takes all");
}

fn append_key(key: &str, first: &mut bool, out: &mut Vec<u8>) {
    if !std::mem::replace(first, false) {
        out.push(b',');
    }
    append_string(key, out);
    out.push(b':');
}

/// As an object without its nulls.
fn append_members(members: &[Column], row: usize, out: &mut Vec<u8>) {
    out.push(b'{');
    let mut first = true;
    for member in members.iter().filter(|member| !member.is_null(row)) {
        append_key(&member.name, &mut first, out);
        member.append_text(row, out);
    }
    out.push(b'}');
}

/// One row of a table.
#[derive(Clone, Copy)]
pub struct RowOf<'a> {
    pub table: &'a Table,
    pub row: usize,
}

impl<'a> RowOf<'a> {
    /// The elements of the slate, and where they are.
    fn slate(&self) -> Option<(Range<usize>, &'a Column)> {
        let column = &self.table.members[self.table.slate?];
        let Values::List { offsets, whole: Some(elements), .. } = &column.values else { return None };
        (!column.is_null(self.row)).then(|| (range(offsets, self.row), &**elements))
    }
}

impl Row for RowOf<'_> {
    fn give(&self, to: &mut Walker) -> Result<(), Stop> {
        for (i, member) in self.table.members.iter().enumerate() {
            if self.table.slate != Some(i) {
                member.give(self.row, to)?;
            }
        }
        Ok(())
    }

    fn elements(&self) -> Option<usize> {
        self.slate().map(|(elements, _)| elements.len())
    }

    fn give_element(&self, element: usize, to: &mut Walker) -> Result<(), Stop> {
        self.slate().map_or(Ok(()), |(elements, column)| column.give(elements.start + element, to))
    }

    fn append_text(&self, out: &mut Vec<u8>) {
        append_members(&self.table.members, self.row, out);
    }
}
