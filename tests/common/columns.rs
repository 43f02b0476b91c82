//! JSON records as Parquet files, in any layout.
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::collections::BTreeSet;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use arrow_array::{
    ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, ListArray, MapArray, NullArray, RecordBatch,
    StringArray, StructArray, TimestampMicrosecondArray,
};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader as _, SerializedFileReader};
use serde_json::Value;

#[derive(Clone, Copy)]
pub struct Layout {
    /// Rows in a row group.
    pub group: usize,
    /// Most rows in a page.
    pub page: usize,
    pub dictionary: bool,
    pub compressed: bool,
    /// Columns, and members of structs, in falling order of their names.
    pub reversed: bool,
    /// How `ts` is written.
    pub time: Time,
    /// Names of integer columns that are written as strings.
    pub as_text: fn(&str) -> bool,
    /// Names of objects that are written as maps.
    pub as_map: fn(&str) -> bool,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Time {
    Millis,
    Micros,
    Rfc3339,
}

impl Default for Layout {
    fn default() -> Self {
        let (group, time, none) = (1 << 20, Time::Millis, |_: &str| false);
        Self {
            group,
            page: 400,
            dictionary: true,
            compressed: true,
            reversed: false,
            time,
            as_text: none,
            as_map: none,
        }
    }
}

pub fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn write(path: &Path, records: &[Value], layout: &Layout) {
    let records: Vec<Option<&Value>> = records.iter().map(Some).collect();
    let root = array("", &records, layout);
    let batch = RecordBatch::from(arrow_array::cast::as_struct_array(&root).clone());
    let compression =
        if layout.compressed { Compression::ZSTD(ZstdLevel::default()) } else { Compression::UNCOMPRESSED };
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(layout.group))
        .set_dictionary_enabled(layout.dictionary)
        .set_compression(compression)
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_data_page_row_count_limit(layout.page)
        .set_write_batch_size(100)
        .build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

/// The array of values of one column; its type is that of the first that is not null.
fn array(name: &str, values: &[Option<&Value>], layout: &Layout) -> ArrayRef {
    let values: Vec<Option<&Value>> = values.iter().map(|v| v.filter(|v| !v.is_null())).collect();
    let Some(first) = values.iter().flatten().next() else { return Arc::new(NullArray::new(values.len())) };
    let nulls = || NullBuffer::from(values.iter().map(Option::is_some).collect::<Vec<bool>>());
    match first {
        Value::Bool(_) => Arc::new(values.iter().map(|v| v.and_then(Value::as_bool)).collect::<BooleanArray>()),
        Value::Number(_) if name == "ts" && layout.time != Time::Millis => {
            let times = values.iter().map(|v| v.and_then(Value::as_i64));
            match layout.time {
                // Half a millisecond more, which is cut.
                Time::Micros => Arc::new(times.map(|ms| Some(ms? * 1000 + 500)).collect::<TimestampMicrosecondArray>()),
                _ => {
                    let text = |ms| chrono::DateTime::from_timestamp_millis(ms).unwrap().to_rfc3339();
                    Arc::new(times.map(|ms| ms.map(text)).collect::<StringArray>())
                }
            }
        }
        Value::Number(_) if values.iter().flatten().all(|v| v.is_i64()) => {
            let numbers = values.iter().map(|v| v.and_then(Value::as_i64));
            if (layout.as_text)(name) {
                Arc::new(numbers.map(|v| v.map(|v| v.to_string())).collect::<StringArray>())
            } else {
                Arc::new(numbers.collect::<Int64Array>())
            }
        }
        Value::Number(_) => Arc::new(values.iter().map(|v| v.and_then(Value::as_f64)).collect::<Float64Array>()),
        Value::String(text) if text.starts_with("decimal:") => {
            let digits = values.iter().map(|v| v.and_then(Value::as_str).map(|v| v[8..].parse::<i128>().unwrap()));
            Arc::new(digits.collect::<Decimal128Array>().with_precision_and_scale(9, 2).unwrap())
        }
        Value::String(_) => Arc::new(values.iter().map(|v| v.and_then(Value::as_str)).collect::<StringArray>()),
        Value::Array(_) => {
            let lists = values.iter().map(|v| v.and_then(Value::as_array));
            let lengths = OffsetBuffer::from_lengths(lists.clone().map(|v| v.map_or(0, Vec::len)));
            let elements: Vec<Option<&Value>> = lists.flatten().flatten().map(Some).collect();
            let elements = array("", &elements, layout);
            let field = Field::new("element", elements.data_type().clone(), true);
            Arc::new(ListArray::new(Arc::new(field), lengths, elements, Some(nulls())))
        }
        Value::Object(_) if (layout.as_map)(name) => {
            let maps = values.iter().map(|v| v.and_then(Value::as_object));
            let offsets = OffsetBuffer::from_lengths(maps.clone().map(|v| v.map_or(0, serde_json::Map::len)));
            let keys: StringArray = maps.clone().flatten().flat_map(|v| v.keys()).map(Some).collect();
            let entries: Vec<Option<&Value>> = maps.flatten().flat_map(|v| v.values()).map(Some).collect();
            let entries = array("", &entries, layout);
            let key = Field::new("key", DataType::Utf8, false);
            let fields = Fields::from(vec![key, Field::new("value", entries.data_type().clone(), true)]);
            let entries = StructArray::new(fields.clone(), vec![Arc::new(keys), entries], None);
            let field = Arc::new(Field::new("entries", DataType::Struct(fields), false));
            Arc::new(MapArray::new(field, offsets, entries, Some(nulls()), false))
        }
        Value::Object(_) => {
            let names: BTreeSet<&String> =
                values.iter().flatten().flat_map(|v| v.as_object().unwrap().keys()).collect();
            let mut names: Vec<_> = names.into_iter().collect();
            if layout.reversed {
                names.reverse();
            }
            let members = names.iter().map(|name| {
                let members: Vec<_> = values.iter().map(|v| v.and_then(|v| v.get(name.as_str()))).collect();
                array(name, &members, layout)
            });
            let members: Vec<ArrayRef> = members.collect();
            let fields = names.iter().zip(&members);
            let fields: Fields =
                fields.map(|(name, member)| Field::new(name.as_str(), member.data_type().clone(), true)).collect();
            let nulls = values.iter().any(Option::is_none).then(nulls);
            Arc::new(StructArray::new(fields, members, nulls))
        }
        Value::Null => unreachable!("they were taken out"),
    }
}

/// Where the data of a column's first row group lies in a file.
pub fn bytes_of(path: &Path, column: &str) -> (usize, usize) {
    bytes_of_group(path, column, 0)
}

pub fn bytes_of_group(path: &Path, column: &str, group: usize) -> (usize, usize) {
    let reader = SerializedFileReader::new(File::open(path).unwrap()).unwrap();
    let group = reader.metadata().row_group(group);
    let column = group.columns().iter().find(|c| c.column_path().string() == column).unwrap();
    let (start, length) = column.byte_range();
    (start as usize, (start + length) as usize)
}
