//! Labelled examples as Parquet files; `docs/parquet.md` says what is in them.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::builder::{
    BooleanBuilder, Float32Builder, Float64Builder, ListBuilder, MapBuilder, MapFieldNames, StringBuilder,
    TimestampMillisecondBuilder, UInt16Builder, UInt64Builder,
};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{DataType, Field, Schema as Columns, TimeUnit};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::WriterProperties;

use crate::event::{Slot, Time};
use crate::feature::Schema;
use crate::feature::schema::FeatureKind;
use crate::source::decode::kept::{self, Value};

/// Rows that are held before they are encoded.
const BATCH: usize = 8 << 10;
/// Rows of a row group: what is held, encoded, before it is written.
const GROUP: usize = 128 << 10;

/// Why examples cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot write examples to `{}`", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("cannot write examples to `{}`: {why}", path.display())]
    Format { path: PathBuf, why: String },
    #[error("there are examples already: `{}`; give --out another place, or remove them", path.display())]
    Exists { path: PathBuf },
    #[error(
        "feature `{feature}` is a list of values, but this one has weights: give --weighted {feature}, so that it is written as a map"
    )]
    Weights { feature: String },
}

/// How examples are written.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// A directory for files of `rows` examples each, or one file whose name ends in `.parquet`.
    pub out: PathBuf,
    /// Most examples in a file of a directory, at least 1.
    pub rows: u64,
    /// Features of kind `multi` that are written as maps from values to weights; others are lists.
    pub weighted: BTreeSet<String>,
    /// Also write what the model sees: rows, values and features of the slots.
    pub slots: bool,
}

/// One example.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// Its event's text, from a decoder that keeps values.
    pub text: &'a [u8],
    pub slots: &'a [Slot],
    /// Its place in the order.
    pub time: Time,
    pub event_time: Time,
    pub positive: bool,
    pub weight: f32,
}

/// Writes examples, file by file. A file has its name once it is complete.
pub struct Sink {
    settings: Settings,
    schema: Schema,
    /// Of each feature.
    names: Vec<String>,
    columns: Arc<Columns>,
    current: Option<Current>,
    builders: Builders,
    /// Examples in `builders`.
    waiting: usize,
    written: Vec<PathBuf>,
    bytes: u64,
}

struct Current {
    path: PathBuf,
    part: PathBuf,
    writer: ArrowWriter<File>,
    rows: u64,
}

struct Builders {
    id: StringBuilder,
    time: TimestampMillisecondBuilder,
    event_time: TimestampMillisecondBuilder,
    label: BooleanBuilder,
    weight: Float32Builder,
    features: Vec<FeatureBuilder>,
    slots: Option<(ListBuilder<UInt16Builder>, ListBuilder<UInt64Builder>, ListBuilder<Float32Builder>)>,
    /// Whether the example that is being built has a value of each feature.
    has: Vec<bool>,
}

enum FeatureBuilder {
    Number(Float64Builder),
    Text(StringBuilder),
    List(ListBuilder<StringBuilder>),
    Map(MapBuilder<StringBuilder, Float64Builder>),
}

/// Columns that are no features.
const OWN: [&str; 8] = ["id", "time", "event_time", "label", "weight", "slot_feature", "slot_row", "slot_value"];

/// The column of each feature: its name, unless that of another column.
#[must_use]
pub fn names(schema: &Schema) -> Vec<String> {
    let mut taken: BTreeSet<String> = OWN.iter().map(|name| (*name).to_owned()).collect();
    let features: Vec<&str> = (0..schema.features()).map(|i| schema.name(i)).collect();
    let name = |name: &&str| {
        let mut column = (*name).to_owned();
        while taken.contains(&column) || column != *name && features.contains(&column.as_str()) {
            column.insert_str(0, "feature_");
        }
        taken.insert(column.clone());
        column
    };
    features.iter().map(name).collect()
}

fn millis() -> TimestampMillisecondBuilder {
    TimestampMillisecondBuilder::new().with_timezone("UTC")
}

fn element(column: DataType) -> Field {
    Field::new("element", column, false)
}

impl Builders {
    fn new(schema: &Schema, settings: &Settings) -> Self {
        let feature = |i: usize| match schema.kind(i) {
            Some(FeatureKind::Numeric) => FeatureBuilder::Number(Float64Builder::new()),
            Some(FeatureKind::Multi) if settings.weighted.contains(schema.name(i)) => {
                let names = MapFieldNames { entry: "key_value".into(), key: "key".into(), value: "value".into() };
                let map = MapBuilder::new(Some(names), StringBuilder::new(), Float64Builder::new());
                FeatureBuilder::Map(map.with_values_field(Field::new("value", DataType::Float64, false)))
            }
            Some(FeatureKind::Multi | FeatureKind::Sequence) => {
                FeatureBuilder::List(ListBuilder::new(StringBuilder::new()).with_field(element(DataType::Utf8)))
            }
            _ => FeatureBuilder::Text(StringBuilder::new()),
        };
        let slots = || {
            (
                ListBuilder::new(UInt16Builder::new()).with_field(element(DataType::UInt16)),
                ListBuilder::new(UInt64Builder::new()).with_field(element(DataType::UInt64)),
                ListBuilder::new(Float32Builder::new()).with_field(element(DataType::Float32)),
            )
        };
        Self {
            id: StringBuilder::new(),
            time: millis(),
            event_time: millis(),
            label: BooleanBuilder::new(),
            weight: Float32Builder::new(),
            features: (0..schema.features()).map(feature).collect(),
            slots: settings.slots.then(slots),
            has: vec![false; schema.features()],
        }
    }

    /// Adds an example, or says which feature has weights that it has no place for.
    fn push(&mut self, example: &Example<'_>) -> Result<(), usize> {
        let (id, values) = kept::read(example.text);
        self.has.fill(false);
        for (feature, value) in values {
            match (&mut self.features[feature], value) {
                (FeatureBuilder::Number(column), Value::Number(v)) => column.append_value(v),
                (FeatureBuilder::Text(column), Value::Text(v)) => column.append_value(v),
                (FeatureBuilder::List(column), Value::Text(v)) => column.values().append_value(v),
                (FeatureBuilder::Map(column), Value::Text(v)) => {
                    column.keys().append_value(v);
                    column.values().append_value(1.0);
                }
                (FeatureBuilder::Map(column), Value::Weighted(v, weight)) => {
                    column.keys().append_value(v);
                    column.values().append_value(weight);
                }
                (FeatureBuilder::List(_), Value::Weighted(..)) => return Err(feature),
                (FeatureBuilder::Number(_), Value::Text(_) | Value::Weighted(..))
                | (FeatureBuilder::Text(_), Value::Number(_) | Value::Weighted(..))
                | (FeatureBuilder::List(_) | FeatureBuilder::Map(_), Value::Number(_)) => {
                    unreachable!("the decoder keeps values by the kinds of features")
                }
            }
            self.has[feature] = true;
        }
        for (column, has) in self.features.iter_mut().zip(&self.has) {
            match column {
                FeatureBuilder::Number(column) if !has => column.append_null(),
                FeatureBuilder::Text(column) if !has => column.append_null(),
                FeatureBuilder::Number(_) | FeatureBuilder::Text(_) => {}
                FeatureBuilder::List(column) => column.append(*has),
                FeatureBuilder::Map(column) => column.append(*has).expect("as many keys as values"),
            }
        }
        self.id.append_value(id);
        self.time.append_value(example.time.0);
        self.event_time.append_value(example.event_time.0);
        self.label.append_value(example.positive);
        self.weight.append_value(example.weight);
        if let Some((features, rows, values)) = &mut self.slots {
            for slot in example.slots {
                features.values().append_value(slot.feature);
                rows.values().append_value(slot.row);
                values.values().append_value(slot.value);
            }
            features.append(true);
            rows.append(true);
            values.append(true);
        }
        Ok(())
    }

    /// The columns built so far, in the order of [`columns`].
    fn finish(&mut self) -> Vec<ArrayRef> {
        let mut columns: Vec<ArrayRef> = vec![
            Arc::new(self.id.finish()),
            Arc::new(self.time.finish()),
            Arc::new(self.event_time.finish()),
            Arc::new(self.label.finish()),
            Arc::new(self.weight.finish()),
        ];
        columns.extend(self.features.iter_mut().map(|column| match column {
            FeatureBuilder::Number(column) => Arc::new(column.finish()) as ArrayRef,
            FeatureBuilder::Text(column) => Arc::new(column.finish()),
            FeatureBuilder::List(column) => Arc::new(column.finish()),
            FeatureBuilder::Map(column) => Arc::new(column.finish()),
        }));
        if let Some((features, rows, values)) = &mut self.slots {
            columns.extend([
                Arc::new(features.finish()) as ArrayRef,
                Arc::new(rows.finish()),
                Arc::new(values.finish()),
            ]);
        }
        columns
    }
}

impl Sink {
    /// Makes the directory, if it is one, and refuses one that holds examples.
    pub fn create(settings: Settings, schema: &Schema) -> Result<Self, Error> {
        let file = |source| Error::File { path: settings.out.clone(), source };
        if is_file(&settings.out) {
            if settings.out.exists() {
                return Err(Error::Exists { path: settings.out });
            }
        } else {
            fs::create_dir_all(&settings.out).map_err(file)?;
            for entry in fs::read_dir(&settings.out).map_err(file)? {
                let path = entry.map_err(file)?.path();
                if path.extension().is_some_and(|extension| extension == "parquet") {
                    return Err(Error::Exists { path });
                }
            }
        }
        let names = names(schema);
        let mut builders = Builders::new(schema, &settings);
        let own = |name: &str, column| Field::new(name, column, false);
        let time = || DataType::Timestamp(TimeUnit::Millisecond, Some("UTC".into()));
        let mut fields = vec![
            own("id", DataType::Utf8),
            own("time", time()),
            own("event_time", time()),
            own("label", DataType::Boolean),
            own("weight", DataType::Float32),
        ];
        // Types of features and slots as their builders make them.
        let made = builders.finish();
        fields.extend(names.iter().zip(&made[5..]).map(|(name, of)| Field::new(name, of.data_type().clone(), true)));
        let slots = OWN[5..].iter().zip(&made[5 + names.len()..]);
        fields.extend(slots.map(|(name, of)| Field::new(*name, of.data_type().clone(), false)));
        Ok(Self {
            settings,
            schema: schema.clone(),
            names,
            columns: Arc::new(Columns::new(fields)),
            current: None,
            builders,
            waiting: 0,
            written: Vec::new(),
            bytes: 0,
        })
    }

    /// Adds the next example of the order.
    pub fn write(&mut self, example: &Example<'_>) -> Result<(), Error> {
        let current = match &mut self.current {
            Some(current) => current,
            None => {
                let current = self.open()?;
                self.current.insert(current)
            }
        };
        let pushed = self.builders.push(example);
        pushed.map_err(|feature| Error::Weights { feature: self.schema.name(feature).to_owned() })?;
        current.rows += 1;
        self.waiting += 1;
        if !is_file(&self.settings.out) && current.rows == self.settings.rows {
            return self.close();
        }
        if self.waiting == BATCH { self.flush() } else { Ok(()) }
    }

    /// Completes the last file; one without rows where there was no example at all.
    pub fn finish(mut self) -> Result<(Vec<PathBuf>, u64), Error> {
        if self.current.is_none() && self.written.is_empty() {
            self.current = Some(self.open()?);
        }
        self.close()?;
        Ok((std::mem::take(&mut self.written), self.bytes))
    }

    /// The columns that features have, by feature.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    fn open(&self) -> Result<Current, Error> {
        let path = if is_file(&self.settings.out) {
            self.settings.out.clone()
        } else {
            self.settings.out.join(format!("examples-{:05}.parquet", self.written.len()))
        };
        let mut part = path.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        let about = [("tidemill.schema", self.schema.to_json()), ("tidemill.schema_hash", self.schema.hash())];
        let about = about.map(|(key, value)| KeyValue::new(key.to_owned(), value));
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_max_row_group_row_count(Some(GROUP))
            .set_key_value_metadata(Some(about.into()))
            .build();
        let file = File::create(&part).map_err(|source| Error::File { path: part.clone(), source })?;
        let writer = ArrowWriter::try_new(file, Arc::clone(&self.columns), Some(properties));
        let writer = writer.map_err(|error| Error::Format { path: part.clone(), why: error.to_string() })?;
        Ok(Current { path, part, writer, rows: 0 })
    }

    fn flush(&mut self) -> Result<(), Error> {
        let Some(current) = self.current.as_mut().filter(|_| self.waiting > 0) else { return Ok(()) };
        self.waiting = 0;
        let format = |why: String| Error::Format { path: current.part.clone(), why };
        let batch = RecordBatch::try_new(Arc::clone(&self.columns), self.builders.finish());
        let batch = batch.map_err(|error| format(error.to_string()))?;
        current.writer.write(&batch).map_err(|error| format(error.to_string()))
    }

    /// Completes the current file and gives it its name.
    fn close(&mut self) -> Result<(), Error> {
        self.flush()?;
        let Some(Current { path, part, mut writer, .. }) = self.current.take() else { return Ok(()) };
        writer.finish().map_err(|error| Error::Format { path: part.clone(), why: error.to_string() })?;
        let file = |source| Error::File { path: path.clone(), source };
        writer.inner().sync_all().map_err(file)?;
        self.bytes += writer.bytes_written() as u64;
        fs::rename(&part, &path).map_err(file)?;
        self.written.push(path);
        Ok(())
    }
}

impl Drop for Sink {
    /// What was not completed is no example.
    fn drop(&mut self) {
        if let Some(current) = &self.current {
            let _ = fs::remove_file(&current.part);
        }
    }
}

/// Whether examples go to one file.
#[must_use]
pub fn is_file(out: &Path) -> bool {
    out.extension().is_some_and(|extension| extension == "parquet")
}
