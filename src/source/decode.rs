//! JSON lines, and rows of tables, to encoded records.
//!
//! A [`Decoder`] walks the bytes of a record once, along a trie of the paths that the settings and the schema name, and
//! pushes what it finds straight into the [`Encoder`]. There is no JSON value and no string per field. Members that no
//! path names are checked and skipped. Records of one stream tend to have their keys in one order, so each object
//! remembers which key came after which, and a key that comes where it is expected costs one comparison.
//!
//! A [`Row`] of a table gives its values at the same trie, so what becomes of a value does not depend on the format.

mod json;
pub mod kept;
pub mod request;
mod row;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::event::{Chunk, Kind, Record, Stream, Time};
use crate::feature::encode::Digits;
use crate::feature::schema::{FeatureKind, Path, Schema, id_of};
use crate::feature::{Encoder, Mismatch};
use crate::position::Fingerprint;

use json::{Expected, Scanner};
pub use json::{Scalar, Stop};
pub(super) use row::Raw;
pub use row::Row;

/// Times of records lie in `0..END_OF_TIME`: from 1970 to before 2200.
pub const END_OF_TIME: i64 = 7_258_118_400_000;
/// The longest canonical text of an id, in bytes.
pub const LONGEST_ID: usize = 1024;
/// Stands between the parts of a composed id.
const BETWEEN_PARTS: u8 = 0x1F;
/// How many keys that no path names an object remembers, to recognise them where they are expected.
const LEARNED_KEYS: usize = 64;

/// Why a mapping cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{key}` of the {stream} mapping {problem}")]
    Mapping { stream: &'static str, key: &'static str, problem: String },
    #[error("feature `{feature}` {problem}")]
    Feature { feature: String, problem: String },
}

/// Where a stream's records keep what the join needs. Paths are keys joined by dots (`meta.request_id`), array positions
/// are numbers, `\.` is a dot inside a key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RecordSettings {
    /// Path, or list of paths for a composed id. An impression and its clicks must have equal texts. Default: `"id"`.
    pub id: IdPaths,
    /// Path of the event time. Default: `"ts"`.
    pub time: String,
    /// `"ms"` or `"s"` since the Unix epoch, `"rfc3339"`, or `"auto"` (default): strings are RFC 3339, numbers below
    /// 1e11 are seconds, others milliseconds.
    pub time_format: TimeFormat,
    /// Path of the time at which the log took the record, in the same formats. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_time: Option<String>,
    /// Impressions: path of a label (true, false, 1 or 0). The stream then enters behind the join, and a record without
    /// an id gets one from its bytes. Default: none, the clicks are the labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    /// Impressions: path of the example's importance weight, above 0 and up to 1e6; 1 where a record has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight: Option<String>,
    /// Path of an array, each element of which is an event of its own (a slate). Paths with a leading dot, here and in
    /// the features' `from`, start at the element: `.item_id`. Default: none, a record is an event.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub explode: Option<String>,
    /// Clicks: path of a mark (true, a number other than 0, a string other than the empty one) of records that only say
    /// that the stream is alive at their time. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<String>,
}

impl Default for RecordSettings {
    fn default() -> Self {
        Self {
            id: IdPaths::One("id".into()),
            time: "ts".into(),
            time_format: TimeFormat::Auto,
            log_time: None,
            label: None,
            weight: None,
            explode: None,
            heartbeat: None,
        }
    }
}

/// One path, or several whose texts are joined by 0x1F.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum IdPaths {
    One(String),
    Many(Vec<String>),
}

impl IdPaths {
    fn paths(&self) -> &[String] {
        match self {
            Self::One(path) => std::slice::from_ref(path),
            Self::Many(paths) => paths,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeFormat {
    #[default]
    Auto,
    Ms,
    S,
    Rfc3339,
}

/// What one event looks like once decoded, for people: see [`Decoder::describe`].
#[derive(Clone, Debug, PartialEq)]
pub struct EventView {
    pub kind: Kind,
    /// The canonical text of the id; empty for heartbeats.
    pub id: String,
    pub event_time: Time,
    pub log_time: Time,
    pub weight: f32,
    /// One per feature and cross, in schema order; empty for clicks.
    pub fields: Vec<FieldView>,
}

/// How one feature or cross of an event was decoded.
#[derive(Clone, Debug, PartialEq)]
pub struct FieldView {
    pub feature: String,
    /// The value as text; for numerics with the bucket, bin or value it became; empty for crosses and missing values.
    pub value: String,
    pub missing: bool,
    /// Row and value of each slot.
    pub rows: Vec<(u64, f32)>,
}

/// Decodes the records of one partition or file after the other. Allocates nothing per record once warm, except for
/// rejects.
#[derive(Clone, Debug)]
pub struct Decoder {
    walker: Walker,
    stream: Stream,
    labelled: bool,
    keep_text: bool,
    /// Records are slates; the trie of element paths starts at [`ELEMENT`].
    explodes: bool,
    /// What the element paths fill, to be cleared between the elements of a slate.
    of_element: Vec<Target>,
    id_text: Vec<u8>,
    /// Where a string with escapes is put together.
    scratch: String,
    /// The text of a row that has no id.
    row_text: Vec<u8>,
    views: Option<Vec<EventView>>,
}

/// The nodes at which the two tries start.
pub(super) const ROOT: usize = 0;
pub(super) const ELEMENT: usize = 1;

/// What a path is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Id(usize),
    Time,
    LogTime,
    Label,
    Weight,
    Heartbeat,
    /// A feature that takes scalars.
    Field(usize),
    /// A feature that takes scalars and arrays, and objects if it is `weighted`.
    Bag(usize, bool),
    Slate,
}

/// One place in a record that some path passes or ends at.
#[derive(Clone, Debug, Default)]
struct Node {
    /// As the settings spell it, for messages.
    path: String,
    targets: Vec<Target>,
    /// Children by key: first those that a path names, then keys that were learned to be skipped.
    keys: Vec<Key>,
    named: usize,
    /// Children by array position, ascending.
    positions: Vec<(usize, usize)>,
    /// Key that came first in the last object.
    first: usize,
    /// The record itself, or the element of a slate.
    is_root: bool,
    has_bag: bool,
    is_slate: bool,
    /// Paths go on inside of it.
    goes_on: bool,
    takes_array: bool,
    takes_object: bool,
}

#[derive(Clone, Debug)]
struct Key {
    text: Box<str>,
    written: Expected,
    node: Option<usize>,
    /// Key that came after this one in the last object.
    next: usize,
    /// Number of the last object that had this key.
    object: u64,
}

impl Key {
    fn new(text: &str, node: Option<usize>) -> Self {
        Self { text: text.into(), written: Expected::new(text), node, next: NO_KEY, object: 0 }
    }
}

impl Node {
    /// Which key this is, and from now on the one expected after `before`; [`NO_KEY`] if it is too much to remember.
    #[inline(never)]
    fn find(&mut self, before: usize, text: &str) -> usize {
        let found = self.keys.iter().position(|key| *key.text == *text).unwrap_or_else(|| {
            if self.keys.len() == self.named + LEARNED_KEYS {
                return NO_KEY;
            }
            self.keys.push(Key::new(text, None));
            self.keys.len() - 1
        });
        if found != NO_KEY {
            match self.keys.get_mut(before) {
                Some(key) => key.next = found,
                None => self.first = found,
            }
        }
        found
    }
}

/// What a record says besides its features.
#[derive(Clone, Debug, Default)]
struct Fields {
    /// Canonical text of each part of the id; empty if the record has none.
    id: Vec<Vec<u8>>,
    time: Option<i64>,
    log_time: Option<i64>,
    label: Option<bool>,
    weight: Option<f32>,
    heartbeat: bool,
}

/// The tries and what a walk along them fills.
#[derive(Clone, Debug)]
pub struct Walker {
    nodes: Vec<Node>,
    encoder: Option<Encoder>,
    time_format: TimeFormat,
    fields: Fields,
    /// The key of the weight that is read next.
    key: String,
    /// Objects walked so far.
    objects: u64,
    /// Where the array of the slate starts in the text.
    slate: Option<usize>,
    /// Why the record cannot be used.
    problem: String,
    /// The node at which it was refused.
    refused: usize,
    /// Values as they came; only where they are wanted.
    kept: Option<kept::Kept>,
}

impl super::Decode for Decoder {
    fn decode(&mut self, raw: &[u8], offset: u64, before: Fingerprint, out: &mut Chunk) {
        self.decode(raw, offset, before, out);
    }

    fn decode_row(&mut self, row: &dyn Row, offset: u64, before: Fingerprint, out: &mut Chunk) {
        self.take(Place { raw: Raw::Row(row), offset, before }, out);
    }

    fn as_decoder(&self) -> Option<&Self> {
        Some(self)
    }
}

impl Decoder {
    /// Compiles the mapping. `schema` is `None` for clicks. `keep_text` keeps each id's canonical text in the chunk.
    pub fn new(
        stream: Stream,
        settings: &RecordSettings,
        schema: Option<&Schema>,
        keep_text: bool,
    ) -> Result<Self, Error> {
        let mapping = |key, problem: String| Error::Mapping { stream: stream.name(), key, problem };
        let elsewhere = |key, owner| mapping(key, format!("belongs to the {owner} mapping; remove it"));
        match stream {
            Stream::Clicks if settings.label.is_some() => return Err(elsewhere("label", "impressions")),
            Stream::Clicks if settings.weight.is_some() => return Err(elsewhere("weight", "impressions")),
            Stream::Impressions if settings.heartbeat.is_some() => return Err(elsewhere("heartbeat", "clicks")),
            _ => {}
        }
        let ids = settings.id.paths();
        if ids.is_empty() {
            return Err(mapping("id", "is an empty list; it must name at least one path".into()));
        }
        let walker = Walker {
            nodes: vec![Node { is_root: true, ..Node::default() }],
            encoder: schema.map(Encoder::new),
            time_format: settings.time_format,
            fields: Fields { id: vec![Vec::new(); ids.len()], ..Fields::default() },
            key: String::new(),
            objects: 0,
            slate: None,
            problem: String::new(),
            refused: ROOT,
            kept: None,
        };
        let mut decoder = Self {
            walker,
            stream,
            labelled: settings.label.is_some(),
            keep_text,
            explodes: settings.explode.is_some(),
            of_element: Vec::new(),
            id_text: Vec::new(),
            scratch: String::new(),
            row_text: Vec::new(),
            views: None,
        };
        if settings.explode.is_some() {
            decoder.walker.nodes.push(Node { path: ".".into(), is_root: true, ..Node::default() });
        }
        let fields = ids.iter().enumerate().map(|(i, path)| ("id", path, Target::Id(i)));
        let fields = fields.chain([("time", &settings.time, Target::Time)]);
        let optional = [
            ("log_time", &settings.log_time, Target::LogTime),
            ("label", &settings.label, Target::Label),
            ("weight", &settings.weight, Target::Weight),
            ("heartbeat", &settings.heartbeat, Target::Heartbeat),
            ("explode", &settings.explode, Target::Slate),
        ];
        let optional =
            optional.iter().filter_map(|(key, path, target)| path.as_ref().map(|path| (*key, path, *target)));
        for (key, text, target) in fields.chain(optional) {
            let path = Path::parse(text).map_err(|problem| mapping(key, problem))?;
            if path.of_element && matches!(target, Target::Slate | Target::Heartbeat) {
                return Err(mapping(
                    key,
                    format!("is `{text}`; it must be a path of the record, without a leading dot"),
                ));
            }
            decoder.add(&path, text, target).map_err(|problem| mapping(key, problem))?;
        }
        if decoder.explodes && !decoder.of_element.iter().any(|target| matches!(target, Target::Id(_))) {
            let problem =
                "must tell the elements of a slate apart: name an element path, as in [\"request_id\", \".item_id\"]";
            return Err(mapping("id", problem.into()));
        }
        for (i, schema) in schema.iter().flat_map(|schema| (0..schema.features()).map(move |i| (i, schema))) {
            let path = schema.path(i).expect("`i` is a feature");
            let target = match schema.kind(i) {
                Some(FeatureKind::Multi) => Target::Bag(i, true),
                Some(FeatureKind::Sequence) => Target::Bag(i, false),
                _ => Target::Field(i),
            };
            let text = path.to_string();
            let refuse = |problem| Error::Feature { feature: schema.name(i).to_owned(), problem };
            decoder.add(path, &text, target).map_err(refuse)?;
        }
        decoder.walker.seal().map_err(|problem| mapping("explode", problem))?;
        Ok(decoder)
    }

    /// Appends one record to `out`, several for a slate, or exactly one [`Kind::Rejected`] with its reason and its bytes.
    /// `out.next` and `out.bytes` are the reader's.
    pub fn decode(&mut self, raw: &[u8], offset: u64, before: Fingerprint, out: &mut Chunk) {
        self.take(Place { raw: Raw::Text(raw), offset, before }, out);
    }

    fn take(&mut self, place: Place<'_>, out: &mut Chunk) {
        let Place { raw, offset, before } = place;
        let (records, slots, text) = (out.records.len(), out.slots.len(), out.text.len());
        if let Err(reason) = self.walk(place, out) {
            out.records.truncate(records);
            out.slots.truncate(slots);
            out.text.truncate(text);
            out.rejects.push((records as u32, reason));
            raw.append_to(&mut out.text);
            out.records.push(Record {
                id: 0,
                event_time: Time::MIN,
                log_time: Time::MIN,
                offset,
                row: 0,
                weight: 1.0,
                slots_start: slots as u32,
                slots_len: 0,
                text_start: text as u32,
                text_len: (out.text.len() - text) as u32,
                before: before.0,
                content: 0,
                kind: Kind::Rejected,
            });
        }
    }

    /// From now on decodes for scoring: presentation features have their `at_serving` value, whatever the record says.
    #[must_use]
    pub fn at_serving(mut self) -> Self {
        self.walker.encoder = self.walker.encoder.map(|encoder| Encoder::at_serving(encoder.schema()));
        self
    }

    /// From now on the text of each event is its id and the values that its features took: see [`kept::read`].
    #[must_use]
    pub fn keeping_values(mut self) -> Self {
        self.walker.kept = Some(kept::Kept::default());
        self
    }

    /// Says how a record is decoded, event by event, or why it is rejected. For `tidemill check`; slow.
    pub fn describe(&mut self, raw: &[u8]) -> Result<Vec<EventView>, String> {
        self.describe_raw(Raw::Text(raw))
    }

    /// The same for a row of a table.
    pub fn describe_row(&mut self, row: &dyn Row) -> Result<Vec<EventView>, String> {
        self.describe_raw(Raw::Row(row))
    }

    fn describe_raw(&mut self, raw: Raw<'_>) -> Result<Vec<EventView>, String> {
        let keep_text = std::mem::replace(&mut self.keep_text, true);
        self.keep_views(true);
        let mut chunk = Chunk::default();
        let outcome = self.walk(Place { raw, offset: 0, before: Fingerprint::NONE }, &mut chunk);
        let views = self.views.take().unwrap_or_default();
        self.keep_views(false);
        self.keep_text = keep_text;
        outcome.map(|()| views)
    }

    fn keep_views(&mut self, keep: bool) {
        self.views = keep.then(Vec::new);
        if let Some(encoder) = &mut self.walker.encoder {
            encoder.keep_texts(keep);
        }
    }

    fn add(&mut self, path: &Path, text: &str, target: Target) -> Result<(), String> {
        let start = match (path.of_element, self.explodes) {
            (false, _) => ROOT,
            (true, true) => {
                self.of_element.push(target);
                ELEMENT
            }
            (true, false) => {
                return Err(format!("is `{text}`, a path of an element, but the mapping has no `explode`"));
            }
        };
        let end = self.walker.reach(start, path);
        self.walker.nodes[end].targets.push(target);
        Ok(())
    }

    fn walk(&mut self, place: Place<'_>, out: &mut Chunk) -> Result<(), String> {
        let raw = match place.raw {
            Raw::Text(raw) => raw,
            Raw::Row(row) => {
                self.walker.begin();
                let walked = self.walk_row(row, place, out);
                return walked.map_err(|_| std::mem::take(&mut self.walker.problem));
            }
        };
        let text = std::str::from_utf8(raw).map_err(|e| format!("invalid UTF-8 after {} bytes", e.valid_up_to()))?;
        self.walker.begin();
        let mut json = Scanner::new(text);
        let mut scratch = std::mem::take(&mut self.scratch);
        let walked = self.walk_record(&mut json, &mut scratch, place, out);
        self.scratch = scratch;
        walked.map_err(|stop| match stop {
            Stop::Syntax(problem) => format!("invalid JSON: {problem}, at byte {}", json.at()),
            Stop::Refused => std::mem::take(&mut self.walker.problem),
        })
    }

    fn walk_record(
        &mut self,
        json: &mut Scanner<'_>,
        scratch: &mut String,
        place: Place<'_>,
        out: &mut Chunk,
    ) -> Result<(), Stop> {
        self.walker.value(json, scratch, Some(ROOT), None, false)?;
        json.end()?;
        // Out of a heartbeat's slate nothing is read.
        if !self.explodes || self.walker.fields.heartbeat {
            return self.event(place, 0, out);
        }
        // Its elements need the whole record, so they are read now.
        let Some(slate) = self.walker.slate else {
            return self.walker.refuse_event(Target::Slate, "is missing");
        };
        json.seek(slate);
        self.walker.begin_elements();
        let mut rows = 0;
        let mut more = json.open(b']')?;
        while more {
            self.clear_element();
            self.walker.value(json, scratch, Some(ELEMENT), None, false)?;
            self.event(place, rows, out)?;
            rows += 1;
            more = json.more(b']')?;
        }
        if rows == 0 {
            return self.walker.refuse_event(Target::Slate, "is empty, so the record holds no event");
        }
        Ok(())
    }

    /// The same steps as [`walk_record`](Self::walk_record).
    fn walk_row(&mut self, row: &dyn Row, place: Place<'_>, out: &mut Chunk) -> Result<(), Stop> {
        row.give(&mut self.walker)?;
        if !self.explodes || self.walker.fields.heartbeat {
            return self.event(place, 0, out);
        }
        let Some(elements) = row.elements() else {
            return self.walker.refuse_event(Target::Slate, "is missing");
        };
        self.walker.begin_elements();
        for element in 0..elements {
            self.clear_element();
            row.give_element(element, &mut self.walker)?;
            self.event(place, element as u32, out)?;
        }
        if elements == 0 {
            return self.walker.refuse_event(Target::Slate, "is empty, so the record holds no event");
        }
        Ok(())
    }

    /// Appends the event that the walker holds.
    fn event(&mut self, place: Place<'_>, row: u32, out: &mut Chunk) -> Result<(), Stop> {
        let fields = &self.walker.fields;
        let Some(time) = fields.time else {
            return self.walker.refuse_event(Target::Time, "is missing: no event time");
        };
        let text_start = out.text.len();
        let mut id = 0;
        let mut kind = match self.stream {
            Stream::Impressions => Kind::Impression,
            Stream::Clicks if fields.heartbeat => Kind::Heartbeat,
            Stream::Clicks => Kind::Click,
        };
        if self.labelled {
            let Some(positive) = fields.label else {
                return self.walker.refuse_event(Target::Label, "is missing: no label");
            };
            kind = Kind::Labelled { positive };
        }
        if kind != Kind::Heartbeat {
            if let Some(missing) = fields.id.iter().position(Vec::is_empty) {
                if !self.labelled {
                    return self.walker.refuse_event(Target::Id(missing), "is missing: no id");
                }
                let raw = match place.raw {
                    Raw::Text(raw) => raw,
                    of_row @ Raw::Row(_) => {
                        self.row_text.clear();
                        of_row.append_to(&mut self.row_text);
                        &self.row_text
                    }
                };
                id = xxh3_64_with_seed(raw, u64::from(row)).max(1);
                if self.keep_text || self.walker.kept.is_some() {
                    keep_id(format!("{id:016x}").as_bytes(), &self.walker.kept, out);
                }
            } else {
                let text = match &fields.id[..] {
                    [only] => only,
                    parts => {
                        self.id_text.clear();
                        for (i, part) in parts.iter().enumerate() {
                            if i > 0 {
                                self.id_text.push(BETWEEN_PARTS);
                            }
                            self.id_text.extend_from_slice(part);
                        }
                        &self.id_text
                    }
                };
                if text.len() > LONGEST_ID {
                    let problem = format!("starts an id of {} bytes, the limit is {LONGEST_ID}", text.len());
                    return self.walker.refuse_event(Target::Id(0), &problem);
                }
                id = id_of(text);
                if self.keep_text || self.walker.kept.is_some() {
                    keep_id(text, &self.walker.kept, out);
                }
            }
        }
        let slots_start = out.slots.len();
        if let Some(encoder) = &mut self.walker.encoder {
            encoder.write(&mut out.slots);
        }
        let fields = &self.walker.fields;
        let record = Record {
            id,
            event_time: Time(time),
            log_time: fields.log_time.map_or(Time::MIN, Time),
            offset: place.offset,
            row,
            weight: fields.weight.unwrap_or(1.0),
            slots_start: slots_start as u32,
            slots_len: (out.slots.len() - slots_start) as u32,
            text_start: text_start as u32,
            text_len: (out.text.len() - text_start) as u32,
            before: place.before.0,
            content: 0,
            kind,
        };
        out.records.push(record);
        if self.views.is_some() {
            self.view(&record, out);
        }
        Ok(())
    }

    #[cold]
    fn view(&mut self, record: &Record, out: &Chunk) {
        let fields = self.walker.encoder.iter().flat_map(|encoder| {
            let schema = encoder.schema();
            (0..schema.len()).map(move |i| {
                let slots = out.slots_of(record).iter().filter(|slot| usize::from(slot.feature) == i);
                FieldView {
                    feature: schema.name(i).to_owned(),
                    value: if i < schema.features() { encoder.text(i).to_owned() } else { String::new() },
                    missing: slots.clone().any(|slot| slot.flags & crate::event::Slot::MISSING != 0),
                    rows: slots.map(|slot| (slot.row, slot.value)).collect(),
                }
            })
        });
        let view = EventView {
            kind: record.kind,
            id: String::from_utf8_lossy(out.text_of(record)).into_owned(),
            event_time: record.event_time,
            log_time: record.log_time,
            weight: record.weight,
            fields: fields.collect(),
        };
        self.views.get_or_insert_default().push(view);
    }
}

/// Keeps the text of an id, with the values if they are kept.
fn keep_id(id: &[u8], kept: &Option<kept::Kept>, out: &mut Chunk) {
    match kept {
        Some(kept) => kept.write(id, &mut out.text),
        None => out.text.extend_from_slice(id),
    }
}

/// Where a record is in its partition.
#[derive(Clone, Copy)]
struct Place<'a> {
    raw: Raw<'a>,
    offset: u64,
    before: Fingerprint,
}

const NO_KEY: usize = usize::MAX;

impl Walker {
    fn begin(&mut self) {
        let fields = &mut self.fields;
        fields.id.iter_mut().for_each(Vec::clear);
        (fields.time, fields.log_time, fields.label, fields.weight) = (None, None, None, None);
        fields.heartbeat = false;
        self.slate = None;
        if let Some(encoder) = &mut self.encoder {
            encoder.reset();
        }
        if let Some(kept) = &mut self.kept {
            kept.begin();
        }
    }

    /// All of the record but the elements of its slate was walked.
    fn begin_elements(&mut self) {
        if let Some(kept) = &mut self.kept {
            kept.begin_elements();
        }
    }

    /// The node at the end of a path, made if needed.
    fn reach(&mut self, start: usize, path: &Path) -> usize {
        let mut at = start;
        for part in &path.parts {
            let known = self.nodes[at].keys.iter().find(|key| *key.text == **part).and_then(|key| key.node);
            at = known.unwrap_or_else(|| {
                let child = self.nodes.len();
                let above = &self.nodes[at].path;
                let dot = if self.nodes[at].is_root { "" } else { "." };
                let path = format!("{above}{dot}{part}");
                self.nodes.push(Node { path, ..Node::default() });
                let key = Key::new(part, Some(child));
                self.nodes[at].keys.push(key);
                child
            });
        }
        at
    }

    /// Works out what each node takes, once all paths are there.
    fn seal(&mut self) -> Result<(), String> {
        for node in &mut self.nodes {
            node.named = node.keys.len();
            let position = |key: &Key| {
                let position: usize = key.text.parse().ok()?;
                (position.to_string() == *key.text).then_some((position, key.node?))
            };
            node.positions = node.keys.iter().filter_map(position).collect();
            node.positions.sort_unstable();
            node.first = if node.named > 0 { 0 } else { NO_KEY };
            node.has_bag = node.targets.iter().any(|target| matches!(target, Target::Bag(..)));
            node.is_slate = node.targets.contains(&Target::Slate);
            node.goes_on = node.named > 0 || node.targets.is_empty();
            if node.is_slate && (node.targets.len() > 1 || node.named > 0) {
                return Err(format!("names `{}`, which another path uses too; start that one with a dot", node.path));
            }
            // A scalar and something inside of it cannot both be there: then every container is refused.
            let scalar = node.targets.iter().any(|target| !matches!(target, Target::Bag(..) | Target::Slate));
            let by_position = node.positions.len() == node.named && (node.has_bag || node.named > 0);
            node.takes_array = !scalar && by_position;
            let unweighted = node.targets.iter().any(|target| matches!(target, Target::Bag(_, false)));
            node.takes_object = !scalar && !unweighted && (node.has_bag || node.named > 0 || node.is_root);
        }
        Ok(())
    }

    /// Takes a value: at a node, in the bags of another, or both. `weighted`: it is the weight of `self.key`.
    fn value(
        &mut self,
        json: &mut Scanner<'_>,
        scratch: &mut String,
        node: Option<usize>,
        bag: Option<usize>,
        weighted: bool,
    ) -> Result<(), Stop> {
        let first = json.peek();
        if let Some(node) = node
            && self.nodes[node].is_slate
        {
            return self.find_slate(json, scratch, node, first);
        }
        match first {
            b'{' => self.object(json, scratch, node, bag),
            b'[' => self.array(json, scratch, node, bag),
            _ => {
                let value = json.scalar(first, scratch)?;
                if let Some(node) = node {
                    self.give(node, value)?;
                }
                bag.map_or(Ok(()), |bag| self.give_bags(bag, weighted, value))
            }
        }
    }

    fn find_slate(&mut self, json: &mut Scanner<'_>, scratch: &mut String, node: usize, first: u8) -> Result<(), Stop> {
        match first {
            b'[' => {
                self.slate = Some(json.at());
                json.skip()
            }
            b'{' => self.refuse_container(node, "an object"),
            _ => match json.scalar(first, scratch)? {
                Scalar::Null => Ok(()),
                value => self.field(node, Target::Slate, value),
            },
        }
    }

    fn array(
        &mut self,
        json: &mut Scanner<'_>,
        scratch: &mut String,
        node: Option<usize>,
        bag: Option<usize>,
    ) -> Result<(), Stop> {
        if let Some(bag) = bag {
            return self.refuse(bag, "holds an array inside of it; the values of a bag are scalars");
        }
        let node = node.expect("a value is at a node or in a bag");
        if !self.nodes[node].takes_array {
            return self.refuse_container(node, "an array");
        }
        let bag = self.nodes[node].has_bag.then_some(node);
        let (mut position, mut ahead) = (0, 0);
        let mut more = json.open(b']')?;
        while more {
            let child = match self.nodes[node].positions.get(ahead) {
                Some(&(at, child)) if at == position => {
                    ahead += 1;
                    Some(child)
                }
                _ => None,
            };
            if child.is_none() && bag.is_none() {
                json.skip()?;
            } else {
                self.value(json, scratch, child, bag, false)?;
            }
            position += 1;
            more = json.more(b']')?;
        }
        Ok(())
    }

    fn object(
        &mut self,
        json: &mut Scanner<'_>,
        scratch: &mut String,
        node: Option<usize>,
        bag: Option<usize>,
    ) -> Result<(), Stop> {
        if let Some(bag) = bag {
            return self.refuse(bag, "holds an object inside of it; the values of a bag are scalars");
        }
        let node = node.expect("a value is at a node or in a bag");
        if !self.nodes[node].takes_object {
            return self.refuse_container(node, "an object");
        }
        let mut more = json.open(b'}')?;
        if self.nodes[node].has_bag {
            // Its keys are the values of the bag.
            while more {
                self.key.clear();
                self.key.push_str(json.key(scratch)?);
                let keys = &self.nodes[node].keys;
                let child = keys.iter().find(|key| *key.text == *self.key).and_then(|key| key.node);
                self.value(json, scratch, child, Some(node), true)?;
                more = json.more(b'}')?;
            }
            return Ok(());
        }
        self.objects += 1;
        let this = self.objects;
        let mut before = NO_KEY;
        while more {
            let child = self.member(json, scratch, node, this, &mut before)?;
            match child {
                None => json.skip()?,
                child => self.value(json, scratch, child, None, false)?,
            }
            more = json.more(b'}')?;
        }
        Ok(())
    }

    /// Takes a key of object number `this` at a node: the child that it leads to, if some path names it. `before` is the
    /// key that came before, [`NO_KEY`] at the start.
    #[inline(always)]
    fn member(
        &mut self,
        json: &mut Scanner<'_>,
        scratch: &mut String,
        node: usize,
        this: u64,
        before: &mut usize,
    ) -> Result<Option<usize>, Stop> {
        let here = &mut self.nodes[node];
        let guess = if *before == NO_KEY { here.first } else { here.keys[*before].next };
        let found = match here.keys.get(guess) {
            Some(key) if json.expect_key(&key.written) => guess,
            _ => here.find(*before, json.key(scratch)?),
        };
        let Some(key) = here.keys.get_mut(found) else { return Ok(None) };
        *before = found;
        let child = key.node;
        if key.object == this
            && let Some(child) = child
        {
            return self.refuse(child, "is there twice").map(|()| None);
        }
        key.object = this;
        Ok(child)
    }

    /// Gives a scalar to all that the node is for.
    #[inline]
    pub(super) fn give(&mut self, node: usize, value: Scalar<'_>) -> Result<(), Stop> {
        // Null is a missing object, but not a missing record.
        if self.nodes[node].goes_on && (!matches!(value, Scalar::Null) || self.nodes[node].is_root) {
            return self.refuse(node, &format!("is {}, but paths go on inside of it", value.name()));
        }
        for i in 0..self.nodes[node].targets.len() {
            let target = self.nodes[node].targets[i];
            match target {
                Target::Field(feature) | Target::Bag(feature, _) => {
                    if let Err(mismatch) = self.feature(feature, value) {
                        return self.refuse_feature(node, feature, value.name(), mismatch);
                    }
                }
                other => self.field(node, other, value)?,
            }
        }
        Ok(())
    }

    #[inline]
    fn feature(&mut self, feature: usize, value: Scalar<'_>) -> Result<(), Mismatch> {
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        if let Some(kept) = &mut self.kept {
            kept.keep(feature, encoder.schema().kind(feature) == Some(FeatureKind::Numeric), value);
        }
        match value {
            Scalar::Null => {
                encoder.push_null(feature);
                Ok(())
            }
            Scalar::Bool(v) => encoder.push_bool(feature, v),
            Scalar::I64(v, text) => encoder.push_integer(feature, v as f64, text),
            Scalar::U64(v, text) => encoder.push_integer(feature, v as f64, text),
            Scalar::F64(v) => encoder.push_f64(feature, v),
            Scalar::Str(v) => encoder.push_str(feature, v),
            Scalar::Moment(ms) => encoder.push_i64(feature, ms),
        }
    }

    fn field(&mut self, node: usize, target: Target, value: Scalar<'_>) -> Result<(), Stop> {
        let fields = &mut self.fields;
        let needs = match (target, value) {
            (Target::Heartbeat, value) => {
                fields.heartbeat = match value {
                    Scalar::Null => false,
                    Scalar::Bool(v) => v,
                    Scalar::I64(v, _) => v != 0,
                    Scalar::U64(v, _) => v != 0,
                    Scalar::F64(v) => v != 0.0,
                    Scalar::Str(v) => !v.is_empty(),
                    Scalar::Moment(_) => true,
                };
                return Ok(());
            }
            (_, Scalar::Null) => return Ok(()),
            (Target::Id(part), value) => {
                let (mut digits, mut moment) = (Digits::default(), itoa::Buffer::new());
                let text = match value {
                    Scalar::Null => "",
                    Scalar::Bool(v) => {
                        if v {
                            "true"
                        } else {
                            "false"
                        }
                    }
                    Scalar::I64(_, text) | Scalar::U64(_, text) => text,
                    Scalar::F64(v) => digits.f64(v),
                    Scalar::Str(v) => v,
                    Scalar::Moment(ms) => moment.format(ms),
                };
                if text.len() <= LONGEST_ID {
                    fields.id[part].extend_from_slice(text.as_bytes());
                    return Ok(());
                }
                return self.refuse(node, &format!("is an id of {} bytes, the limit is {LONGEST_ID}", text.len()));
            }
            (Target::Time | Target::LogTime, value) => match time_of(value, self.time_format) {
                Ok(ms) => {
                    *(if target == Target::Time { &mut fields.time } else { &mut fields.log_time }) = Some(ms);
                    return Ok(());
                }
                Err(problem) => return self.refuse(node, &problem),
            },
            (Target::Label, value) => {
                match value {
                    Scalar::Bool(v) => fields.label = Some(v),
                    _ if value.number() == Some(0.0) => fields.label = Some(false),
                    _ if value.number() == Some(1.0) => fields.label = Some(true),
                    _ => return self.refuse(node, &format!("is {}; a label is true, false, 1 or 0", value.name())),
                }
                return Ok(());
            }
            (Target::Weight, value) => match value.number() {
                Some(v) if v > 0.0 && v <= 1e6 && v as f32 > 0.0 => {
                    fields.weight = Some(v as f32);
                    return Ok(());
                }
                Some(v) => return self.refuse(node, &format!("is {v}; a weight is above 0 and at most 1e6")),
                None => "a weight is a number",
            },
            (Target::Slate, _) => "`explode` needs an array",
            (Target::Field(_) | Target::Bag(..), _) => unreachable!("`give` takes features"),
        };
        self.refuse(node, &format!("is {}; {needs}", value.name()))
    }

    /// Gives the element of an array, or the weight of an object's member, to the node's bags.
    pub(super) fn give_bags(&mut self, node: usize, weighted: bool, value: Scalar<'_>) -> Result<(), Stop> {
        for i in 0..self.nodes[node].targets.len() {
            let Target::Bag(feature, _) = self.nodes[node].targets[i] else { continue };
            let given = if weighted {
                let weight = match value {
                    Scalar::Null => continue,
                    Scalar::Bool(v) => f64::from(u8::from(v)),
                    other => match other.number() {
                        Some(weight) => weight,
                        None => return self.refuse(node, "has a member that is a string; weights are numbers"),
                    },
                };
                let Some(encoder) = &mut self.encoder else { continue };
                if let Some(kept) = &mut self.kept {
                    kept.keep_weighted(feature, &self.key, weight);
                }
                encoder.push_weighted(feature, &self.key, weight)
            } else {
                self.feature(feature, value)
            };
            if let Err(mismatch) = given {
                return self.refuse_feature(node, feature, value.name(), mismatch);
            }
        }
        Ok(())
    }

    #[cold]
    pub(super) fn refuse(&mut self, node: usize, problem: &str) -> Result<(), Stop> {
        let path = &self.nodes[node].path;
        self.refused = node;
        self.problem = if path.is_empty() { format!("the record {problem}") } else { format!("`{path}` {problem}") };
        Err(Stop::Refused)
    }

    #[cold]
    fn refuse_feature(&mut self, node: usize, feature: usize, is: &str, mismatch: Mismatch) -> Result<(), Stop> {
        let name = self.encoder.as_ref().map_or("", |encoder| encoder.schema().name(feature));
        let problem = format!("is {is}; feature `{name}` {mismatch}");
        self.refuse(node, &problem)
    }

    /// Refuses an array or object where the node takes none.
    #[cold]
    fn refuse_container(&mut self, node: usize, is: &'static str) -> Result<(), Stop> {
        let needs = match self.nodes[node].targets.first() {
            None if self.nodes[node].is_root => "it must be an object",
            None => "paths go on inside of it by key, so it must be an object",
            Some(Target::Bag(_, false)) => "a sequence takes an array",
            Some(Target::Bag(..)) => "a bag takes an array of scalars or an object of weights",
            Some(Target::Slate) => "`explode` needs an array",
            Some(_) => "it must be a string, number or boolean",
        };
        self.refuse(node, &format!("is {is}; {needs}"))
    }

    /// Refuses an event for what it lacks, under the path that should have had it.
    #[cold]
    fn refuse_event(&mut self, target: Target, problem: &str) -> Result<(), Stop> {
        let node = self.nodes.iter().position(|node| node.targets.contains(&target));
        self.refuse(node.expect("the mapping has a path for each of its fields"), problem)
    }
}

impl Scalar<'_> {
    pub(super) fn number(&self) -> Option<f64> {
        match *self {
            Self::I64(v, _) => Some(v as f64),
            Self::U64(v, _) => Some(v as f64),
            Self::F64(v) => Some(v),
            Self::Null | Self::Bool(_) | Self::Str(_) | Self::Moment(_) => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::I64(..) | Self::U64(..) | Self::F64(_) => "a number",
            Self::Str(_) => "a string",
            Self::Moment(_) => "a timestamp",
        }
    }
}

/// Milliseconds since the epoch. Fractions of a millisecond are rounded for numbers, cut for RFC 3339.
fn time_of(value: Scalar<'_>, format: TimeFormat) -> Result<i64, String> {
    let seconds = |v: f64| match format {
        TimeFormat::Auto => v.abs() < 1e11,
        TimeFormat::S => true,
        TimeFormat::Ms | TimeFormat::Rfc3339 => false,
    };
    let ms = match (value, format) {
        (Scalar::Str(text), TimeFormat::Auto | TimeFormat::Rfc3339) => {
            match chrono::DateTime::parse_from_rfc3339(text) {
                Ok(time) => time.timestamp_millis(),
                Err(error) => return Err(format!("is {:?}, not an RFC 3339 time: {error}", shortened(text))),
            }
        }
        (Scalar::I64(v, _), _) if format != TimeFormat::Rfc3339 => {
            v.saturating_mul(if seconds(v as f64) { 1000 } else { 1 })
        }
        (Scalar::U64(v, _), _) if format != TimeFormat::Rfc3339 => {
            let v = i64::try_from(v).unwrap_or(i64::MAX);
            v.saturating_mul(if seconds(v as f64) { 1000 } else { 1 })
        }
        // `as` saturates.
        (Scalar::F64(v), _) if format != TimeFormat::Rfc3339 => {
            (v * if seconds(v) { 1000.0 } else { 1.0 }).round() as i64
        }
        (Scalar::Moment(ms), _) => ms,
        (value, TimeFormat::Rfc3339) => {
            return Err(format!("is {}; time_format = \"rfc3339\" needs a string", value.name()));
        }
        (value, _) => return Err(format!("is {}; a time is a number or an RFC 3339 string", value.name())),
    };
    if (0..END_OF_TIME).contains(&ms) {
        return Ok(ms);
    }
    Err(format!("is {ms} ms since the epoch, outside of 1970 to 2200; check `time_format`"))
}

/// The first 64 characters.
fn shortened(text: &str) -> &str {
    text.char_indices().nth(64).map_or(text, |(end, _)| &text[..end])
}

impl Decoder {
    fn clear_element(&mut self) {
        if let Some(kept) = &mut self.walker.kept {
            kept.begin_element();
        }
        let fields = &mut self.walker.fields;
        for &target in &self.of_element {
            match target {
                Target::Id(part) => fields.id[part].clear(),
                Target::Time => fields.time = None,
                Target::LogTime => fields.log_time = None,
                Target::Label => fields.label = None,
                Target::Weight => fields.weight = None,
                Target::Heartbeat | Target::Slate => {}
                Target::Field(feature) | Target::Bag(feature, _) => {
                    if let Some(encoder) = &mut self.walker.encoder {
                        encoder.clear(feature);
                    }
                }
            }
        }
    }
}

/// What a reader of columns must know of the paths.
impl Decoder {
    /// Every place that some path passes or ends at: its number, how the settings spell it, what it is for.
    pub(super) fn paths(&self) -> impl Iterator<Item = (usize, &str, &[Target])> {
        self.walker.nodes.iter().enumerate().map(|(i, node)| (i, node.path.as_str(), &node.targets[..]))
    }

    pub(super) fn path(&self, node: usize) -> &str {
        &self.walker.nodes[node].path
    }

    pub(super) fn targets(&self, node: usize) -> &[Target] {
        &self.walker.nodes[node].targets
    }

    /// Where a path goes on from a node by this key.
    pub(super) fn child(&self, node: usize, key: &str) -> Option<usize> {
        self.children(node).find(|(text, _)| *text == key).map(|(_, child)| child)
    }

    pub(super) fn children(&self, node: usize) -> impl Iterator<Item = (&str, usize)> {
        let node = &self.walker.nodes[node];
        node.keys[..node.named].iter().filter_map(|key| Some((&*key.text, key.node?)))
    }

    /// The same by position in an array.
    pub(super) fn positions(&self, node: usize) -> impl Iterator<Item = (usize, usize)> {
        self.walker.nodes[node].positions.iter().copied()
    }

    pub(super) fn has_bag(&self, node: usize) -> bool {
        self.walker.nodes[node].has_bag
    }

    pub(super) fn is_slate(&self, node: usize) -> bool {
        self.walker.nodes[node].is_slate
    }

    pub(super) fn goes_on(&self, node: usize) -> bool {
        self.walker.nodes[node].goes_on
    }

    pub(super) fn takes_array(&self, node: usize) -> bool {
        self.walker.nodes[node].takes_array
    }

    pub(super) fn takes_object(&self, node: usize) -> bool {
        self.walker.nodes[node].takes_object
    }

    pub(super) fn is_labelled(&self) -> bool {
        self.labelled
    }

    pub(super) fn feature(&self, feature: usize) -> &str {
        self.walker.encoder.as_ref().map_or("", |encoder| encoder.schema().name(feature))
    }

    pub(super) fn is_numeric(&self, feature: usize) -> bool {
        let kind = self.walker.encoder.as_ref().and_then(|encoder| encoder.schema().kind(feature));
        kind == Some(FeatureKind::Numeric)
    }

    pub(super) fn reads_times_as_text(&self) -> bool {
        matches!(self.walker.time_format, TimeFormat::Auto | TimeFormat::Rfc3339)
    }

    pub(super) fn reads_times_as_numbers(&self) -> bool {
        self.walker.time_format != TimeFormat::Rfc3339
    }
}

impl Walker {
    /// Gives the weight of a bag's value to the node's bags.
    pub(super) fn give_weight(&mut self, node: usize, key: &str, weight: Scalar<'_>) -> Result<(), Stop> {
        self.key.clear();
        self.key.push_str(key);
        self.give_bags(node, true, weight)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value as Json;

    use super::*;
    use crate::feature::schema::{row_of, seed_of};
    use crate::feature::{CrossSettings, FeatureSettings};

    fn schema(features: &str, crosses: &str) -> Schema {
        let features: Vec<FeatureSettings> = serde_json::from_str(features).unwrap();
        let crosses: Vec<CrossSettings> = serde_json::from_str(crosses).unwrap();
        Schema::new(&features, &crosses).unwrap()
    }

    fn settings(toml: &str) -> RecordSettings {
        toml::from_str(toml).unwrap()
    }

    fn decoder(mapping: &str, features: &str) -> Decoder {
        let schema = schema(features, "[]");
        Decoder::new(Stream::Impressions, &settings(mapping), Some(&schema), true).unwrap()
    }

    fn decode(decoder: &mut Decoder, raw: &str) -> Chunk {
        let mut chunk = Chunk::default();
        decoder.decode(raw.as_bytes(), 7, Fingerprint(9), &mut chunk);
        chunk
    }

    /// The reason for which the record is rejected, and only it.
    fn reason(decoder: &mut Decoder, raw: &str) -> String {
        let chunk = decode(decoder, raw);
        assert_eq!(chunk.records.len(), 1, "{raw}");
        assert_eq!(
            (chunk.records[0].kind, chunk.records[0].offset, chunk.records[0].before),
            (Kind::Rejected, 7, 9),
            "{raw}"
        );
        assert_eq!((chunk.records[0].id, chunk.records[0].event_time), (0, Time::MIN));
        assert_eq!(chunk.text_of(&chunk.records[0]), raw.as_bytes());
        assert!(chunk.slots.is_empty());
        chunk.reason_of(0).to_owned()
    }

    fn event(decoder: &mut Decoder, raw: &str) -> Record {
        let chunk = decode(decoder, raw);
        assert_eq!((chunk.records.len(), chunk.reason_of(0)), (1, ""), "{raw}");
        chunk.records[0]
    }

    #[test]
    fn a_record_without_an_id_or_a_time_is_rejected_with_its_position() {
        let mut decoder = decoder("", r#"[{"name": "a"}]"#);
        assert_eq!(reason(&mut decoder, r#"{"ts":1}"#), "`id` is missing: no id");
        assert_eq!(reason(&mut decoder, r#"{"id":null,"ts":1}"#), "`id` is missing: no id");
        assert_eq!(reason(&mut decoder, r#"{"id":"","ts":1}"#), "`id` is missing: no id");
        assert_eq!(reason(&mut decoder, r#"{"id":1}"#), "`ts` is missing: no event time");
        assert_eq!(reason(&mut decoder, r#"{"id":1,"ts":null}"#), "`ts` is missing: no event time");
    }

    #[test]
    fn what_is_no_record_is_rejected() {
        let mut decoder = decoder("", r#"[{"name": "a"}]"#);
        for (raw, expected) in [
            ("", "invalid JSON: "),
            ("{", "invalid JSON: "),
            (r#"{"id":1,"ts":1"#, "invalid JSON: "),
            (r#"{"id":1,"ts":1}}"#, "invalid JSON: "),
            (r#"{"id":1,"ts":1,"other":[1,}"#, "invalid JSON: "),
            (r#"{"id":1,"ts":1,"other":tru}"#, "invalid JSON: "),
            (r#"{"id":1,"ts":1,"a":1e999}"#, "invalid JSON: "),
            (r#"{"id":1,"ts":1,"a":"\ud800"}"#, "invalid JSON: "),
            ("{\"id\":1,\"ts\":1,\"a\":\"\n\"}", "invalid JSON: "),
            ("[1]", "the record is an array; it must be an object"),
            ("null", "the record is null, but paths go on inside of it"),
            ("5", "the record is a number, but paths go on inside of it"),
            (r#"{"id":{},"ts":1}"#, "`id` is an object; it must be a string, number or boolean"),
            (r#"{"id":1,"ts":1,"a":[1]}"#, "`a` is an array; it must be a string, number or boolean"),
            (r#"{"id":1,"ts":1,"id":2}"#, "`id` is there twice"),
        ] {
            let reason = reason(&mut decoder, raw);
            assert!(reason.starts_with(expected) && !reason.contains('\n'), "{raw}: {reason}");
        }
        // Members that no path names may be repeated; the decoder is none the worse for the rejects.
        event(&mut decoder, r#"{"x":1,"id":1,"x":2,"ts":1}"#);
    }

    #[test]
    fn invalid_utf8_is_rejected_wherever_it_stands() {
        let mut decoder = decoder("", r#"[{"name": "a"}]"#);
        for raw in [
            &b"{\"id\":1,\"ts\":1,\"a\":\"\xFF\"}"[..],
            b"{\"id\":1,\"ts\":1,\"skipped\":\"\xC3\"}",
            b"{\"id\":1,\"ts\":1}\xFF",
        ] {
            let mut chunk = Chunk::default();
            decoder.decode(raw, 0, Fingerprint::NONE, &mut chunk);
            assert!(chunk.reason_of(0).starts_with("invalid UTF-8 after "), "{}", chunk.reason_of(0));
            assert_eq!(chunk.text, raw);
        }
    }

    #[test]
    fn a_line_of_brackets_is_rejected_and_does_not_end_the_process() {
        let mut decoder = decoder("", r#"[{"name": "a"}]"#);
        let deep = format!(r#"{{"id":1,"ts":1,"x":{}"#, "[".repeat(1_000_000));
        assert_eq!(
            reason(&mut decoder, &deep),
            "invalid JSON: arrays and objects are nested more than 128 deep, at byte 146"
        );
        let many = format!(r#"{{"id":1,"ts":1,"x":[{}[]],"y":"{}"}}"#, "[],".repeat(1000), "[\\\"".repeat(1000));
        event(&mut decoder, &many);
    }

    #[test]
    fn a_rejected_record_leaves_the_others_of_its_chunk_alone() {
        let mut decoder = decoder("", r#"[{"name": "a"}]"#);
        let mut chunk = Chunk::default();
        for raw in [r#"{"id":"x","ts":1,"a":5}"#, r#"{"a":6,"id":[]}"#, r#"{"id":"y","ts":2}"#] {
            decoder.decode(raw.as_bytes(), 0, Fingerprint::NONE, &mut chunk);
        }
        assert_eq!(
            chunk.records.iter().map(|record| record.kind).collect::<Vec<_>>(),
            [Kind::Impression, Kind::Rejected, Kind::Impression]
        );
        let schema = schema(r#"[{"name": "a"}]"#, "[]");
        assert_eq!(chunk.slots_of(&chunk.records[0])[0].row, row_of(b"5", seed_of("a")));
        assert_eq!(chunk.slots_of(&chunk.records[2])[0].row, schema.missing_row(0));
        assert_eq!(chunk.text_of(&chunk.records[2]), b"y");
        assert_ne!(chunk.reason_of(1), "");
    }

    #[test]
    fn times_are_read_in_all_documented_forms() {
        let time = |format: &str, text: &str| {
            let mut decoder = decoder(&format!("time_format = '{format}'"), r#"[{"name": "a"}]"#);
            let chunk = decode(&mut decoder, &format!(r#"{{"id":1,"ts":{text}}}"#));
            if chunk.rejects.is_empty() {
                Ok(chunk.records[0].event_time.0)
            } else {
                Err(chunk.reason_of(0).to_owned())
            }
        };
        for (format, text, ms) in [
            ("auto", "1650812741436", 1_650_812_741_436),
            ("auto", "1650812741", 1_650_812_741_000),
            ("auto", "1650812741.436", 1_650_812_741_436),
            ("auto", "1650812741436.6", 1_650_812_741_437),
            ("auto", "0", 0),
            ("auto", r#""2022-04-24T15:05:41.436Z""#, 1_650_812_741_436),
            ("auto", r#""2022-04-24T17:05:41.4369+02:00""#, 1_650_812_741_436),
            ("rfc3339", r#""1970-01-01T00:00:00Z""#, 0),
            ("ms", "1650812741", 1_650_812_741),
            ("s", "1650812741", 1_650_812_741_000),
            ("s", "0.0005", 1),
        ] {
            assert_eq!(time(format, text), Ok(ms), "{format} {text}");
        }
        for (format, text, expected) in [
            ("auto", "-1", "`ts` is -1000 ms since the epoch, outside of 1970 to 2200; check `time_format`"),
            ("auto", "1574553663979311", "`ts` is 1574553663979311 ms since the epoch, outside"),
            ("s", "1650812741436", "`ts` is 1650812741436000 ms since the epoch, outside"),
            ("auto", "18446744073709551615", "`ts` is 9223372036854775807 ms"),
            ("auto", "1e300", "`ts` is 9223372036854775807 ms"),
            ("auto", r#""yesterday""#, "`ts` is \"yesterday\", not an RFC 3339 time"),
            ("ms", r#""1970-01-01T00:00:00Z""#, "`ts` is a string; a time is a number or"),
            ("rfc3339", "5", "`ts` is a number; time_format = \"rfc3339\" needs a string"),
            ("auto", "true", "`ts` is a boolean; a time is"),
            ("auto", r#""2200-01-01T00:00:00Z""#, "`ts` is 7258118400000 ms"),
        ] {
            let message = time(format, text).unwrap_err();
            assert!(message.starts_with(expected), "{format} {text}: {message}");
        }
    }

    #[test]
    fn log_time_label_and_weight_come_along() {
        let mut decoder = decoder("log_time = 'kafka.ts'\nlabel = 'clicked'\nweight = 'w'", r#"[{"name": "a"}]"#);
        let record = event(&mut decoder, r#"{"id":1,"ts":1,"kafka":{"ts":200000000000},"clicked":1,"w":0.5}"#);
        assert_eq!(record.kind, Kind::Labelled { positive: true });
        assert_eq!((record.log_time, record.weight), (Time(200_000_000_000), 0.5));
        let record = event(&mut decoder, r#"{"id":1,"ts":1,"clicked":false}"#);
        assert_eq!((record.kind, record.log_time, record.weight), (Kind::Labelled { positive: false }, Time::MIN, 1.0));
        assert_eq!(reason(&mut decoder, r#"{"id":1,"ts":1}"#), "`clicked` is missing: no label");
        assert_eq!(
            reason(&mut decoder, r#"{"id":1,"ts":1,"clicked":2}"#),
            "`clicked` is a number; a label is true, false, 1 or 0"
        );
        assert_eq!(
            reason(&mut decoder, r#"{"id":1,"ts":1,"clicked":1,"w":0}"#),
            "`w` is 0; a weight is above 0 and at most 1e6"
        );
        assert_eq!(
            reason(&mut decoder, r#"{"id":1,"ts":1,"clicked":1,"w":"1"}"#),
            "`w` is a string; a weight is a number"
        );
    }

    #[test]
    fn a_labelled_record_without_an_id_gets_one_from_its_bytes() {
        let mut decoder = decoder("label = 'y'", r#"[{"name": "a"}]"#);
        let one = event(&mut decoder, r#"{"ts":1,"y":1,"a":1}"#);
        assert_eq!(one.id, event(&mut decoder, r#"{"ts":1,"y":1,"a":1}"#).id);
        assert_ne!(one.id, event(&mut decoder, r#"{"ts":1,"y":1,"a":2}"#).id);
        assert_eq!(event(&mut decoder, r#"{"ts":1,"y":1,"id":10}"#).id, id_of(b"10"));
    }

    #[test]
    fn a_slate_is_one_event_an_element() {
        let mut decoder = decoder(
            "id = ['request', '.item_id']\nexplode = 'shown.items'",
            r#"[{"name": "user"}, {"name": "item", "from": ".item_id"}, {"name": "tags", "from": ".tags", "kind": "multi"}]"#,
        );
        // What the record says after its array counts as well.
        let chunk = decode(
            &mut decoder,
            r#"{"request":"r","shown":{"items":[{"item_id":1,"tags":["x"]},{"item_id":2}, {"item_id":"3"}]},"ts":5,"user":9}"#,
        );
        assert!(chunk.rejects.is_empty(), "{:?}", chunk.rejects);
        let rows: Vec<_> = chunk.records.iter().map(|record| (record.row, chunk.text_of(record))).collect();
        assert_eq!(rows, [(0, &b"r\x1f1"[..]), (1, b"r\x1f2"), (2, b"r\x1f3")]);
        for (record, item) in chunk.records.iter().zip(["1", "2", "3"]) {
            let slots = chunk.slots_of(record);
            assert_eq!(slots[0].row, row_of(b"9", seed_of("user")));
            assert_eq!(slots[1].row, row_of(item.as_bytes(), seed_of("item")));
            assert_eq!(slots[2].flags, if item == "1" { 0 } else { crate::event::Slot::MISSING });
            assert_eq!((record.offset, record.before), (7, 9));
        }
        for (raw, expected) in [
            (r#"{"request":"r","ts":5}"#, "`shown.items` is missing"),
            (r#"{"request":"r","ts":5,"shown":{"items":null}}"#, "`shown.items` is missing"),
            (r#"{"request":"r","ts":5,"shown":{"items":[]}}"#, "`shown.items` is empty, so the record holds no event"),
            (r#"{"request":"r","ts":5,"shown":{"items":{}}}"#, "`shown.items` is an object; `explode` needs an array"),
            (r#"{"request":"r","ts":5,"shown":{"items":3}}"#, "`shown.items` is a number; `explode` needs an array"),
            (r#"{"request":"r","ts":5,"shown":{"items":[{"item_id":1},{}]}}"#, "`.item_id` is missing: no id"),
            (
                r#"{"request":"r","ts":5,"shown":{"items":[{"item_id":1},null]}}"#,
                "`.` is null, but paths go on inside of it",
            ),
            (r#"{"request":"r","ts":5,"shown":{"items":[{"item_id":1},{"item_id":2]}}"#, "invalid JSON: "),
        ] {
            let reason = reason(&mut decoder, raw);
            assert!(reason.starts_with(expected), "{raw}: {reason}");
        }
    }

    #[test]
    fn the_elements_of_a_slate_may_be_scalars() {
        let mut decoder = decoder("id = ['id', '.']\nexplode = 'items'", r#"[{"name": "item", "from": "."}]"#);
        let chunk = decode(&mut decoder, r#"{"id":"r","items":["a",2],"ts":5}"#);
        let rows: Vec<_> = chunk.slots.iter().map(|slot| slot.row).collect();
        assert_eq!(rows, [row_of(b"a", seed_of("item")), row_of(b"2", seed_of("item"))]);
    }

    #[test]
    fn a_heartbeat_needs_a_time_and_nothing_else() {
        let mut decoder = Decoder::new(Stream::Clicks, &settings("heartbeat = 'alive'"), None, true).unwrap();
        for mark in ["true", "1", "\"yes\""] {
            let record = event(&mut decoder, &format!(r#"{{"alive":{mark},"ts":5}}"#));
            assert_eq!((record.kind, record.id, record.event_time), (Kind::Heartbeat, 0, Time(5000)));
        }
        for mark in ["false", "0", "\"\"", "null"] {
            let record = event(&mut decoder, &format!(r#"{{"alive":{mark},"ts":5,"id":"x"}}"#));
            assert_eq!((record.kind, record.id, record.slots_len), (Kind::Click, id_of(b"x"), 0));
        }
        assert_eq!(reason(&mut decoder, r#"{"alive":true}"#), "`ts` is missing: no event time");
    }

    #[test]
    fn an_id_is_at_most_a_kibibyte() {
        let mut decoder = decoder("id = ['a', 'b']", r#"[{"name": "f"}]"#);
        let half = "x".repeat(512);
        assert_eq!(
            reason(&mut decoder, &format!(r#"{{"a":"{half}","b":"{half}","ts":1}}"#)),
            "`a` starts an id of 1025 bytes, the limit is 1024"
        );
        event(&mut decoder, &format!(r#"{{"a":"{half}","b":"{}","ts":1}}"#, &half[1..]));
        let long = format!(r#"{{"a":"{half}{half}x","b":"1","ts":1}}"#);
        assert_eq!(reason(&mut decoder, &long), "`a` is an id of 1025 bytes, the limit is 1024");
    }

    #[test]
    fn mappings_that_cannot_work_are_refused_with_their_key() {
        let features = schema(r#"[{"name": "a"}]"#, "[]");
        let element = schema(r#"[{"name": "a", "from": ".a"}]"#, "[]");
        for (stream, mapping, schema, expected) in [
            (Stream::Clicks, "label = 'y'", None, "`label` of the clicks mapping belongs to the impressions mapping"),
            (Stream::Clicks, "weight = 'y'", None, "`weight` of the clicks mapping belongs to the impressions mapping"),
            (Stream::Impressions, "heartbeat = 'y'", Some(&features), "`heartbeat` of the impressions mapping belongs"),
            (Stream::Clicks, "id = []", None, "`id` of the clicks mapping is an empty list"),
            (Stream::Clicks, "id = 'a..b'", None, "`id` of the clicks mapping is the path `a..b`"),
            (Stream::Clicks, "id = '.a'", None, "`id` of the clicks mapping is `.a`, a path of an element, but"),
            (Stream::Impressions, "explode = 'items'", Some(&features), "`id` of the impressions mapping must tell"),
            (
                Stream::Impressions,
                "explode = '.x'\nid = '.a'",
                Some(&features),
                "`explode` of the impressions mapping is `.x`",
            ),
            (
                Stream::Impressions,
                "explode = 'a'\nid = '.x'",
                Some(&features),
                "`explode` of the impressions mapping names `a`",
            ),
            (Stream::Impressions, "", Some(&element), "feature `a` is `.a`, a path of an element, but"),
        ] {
            let message = Decoder::new(stream, &settings(mapping), schema, false).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{message}");
        }
        assert!(toml::from_str::<RecordSettings>("tiem = 'ts'").is_err());
    }

    #[test]
    fn a_record_can_be_described() {
        let schema = schema(
            r#"[{"name": "a"}, {"name": "n", "kind": "numeric"}, {"name": "tags", "kind": "multi"}, {"name": "gone"}]"#,
            r#"[{"of": ["a", "tags"]}]"#,
        );
        let mut decoder = Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), false).unwrap();
        let raw = br#"{"id":"x","ts":0,"a":1.0,"n":5,"tags":["p","q"]}"#;
        let views = decoder.describe(raw).unwrap();
        assert_eq!((views.len(), views[0].id.as_str(), views[0].event_time), (1, "x", Time(0)));
        let values: Vec<_> =
            views[0].fields.iter().map(|f| (f.feature.as_str(), f.value.as_str(), f.missing, f.rows.len())).collect();
        assert_eq!(
            values,
            [
                ("a", "1", false, 1),
                ("n", "5 -> b13", false, 1),
                ("tags", "p, q", false, 2),
                ("gone", "", true, 1),
                ("a*tags", "", false, 2)
            ]
        );
        assert_eq!(decoder.describe(b"{}").unwrap_err(), "`ts` is missing: no event time");
        // Looking changes nothing.
        let mut chunk = Chunk::default();
        decoder.decode(raw, 0, Fingerprint::NONE, &mut chunk);
        assert!(chunk.text.is_empty() && chunk.slots.len() == 7);
    }

    // --- against an oracle over `serde_json::Value` ----------------------------------------------------------------

    const FEATURES: &str = r#"[
        {"name": "a"}, {"name": "b", "from": "u.b"}, {"name": "third", "from": "u.list.2"},
        {"name": "n", "from": "u.n", "kind": "numeric", "per_octave": 4}, {"name": "again", "from": "a"},
        {"name": "bag", "from": "bag", "kind": "multi", "max_len": 3}, {"name": "first", "from": "bag.0"},
        {"name": "seq", "from": "u.seq", "kind": "sequence", "max_len": 2}, {"name": "dotted", "from": "d\\.e"},
        {"name": "deep", "from": "u.v.w.x"}]"#;
    const CROSSES: &str = r#"[{"of": ["a", "b"]}, {"of": ["bag", "seq", "n"], "max": 4}]"#;

    /// `None` if the record is to be rejected.
    fn oracle(schema: &Schema, record: &Json) -> Option<(u64, i64, Vec<crate::event::Slot>)> {
        fn lookup<'j>(mut value: &'j Json, parts: &[String]) -> Option<&'j Json> {
            for part in parts {
                value = match value {
                    Json::Null => return Some(&Json::Null),
                    Json::Object(members) => members.get(part).unwrap_or(&Json::Null),
                    Json::Array(elements) => elements.get(part.parse::<usize>().ok()?).unwrap_or(&Json::Null),
                    _ => return None,
                };
            }
            Some(value)
        }
        fn push(encoder: &mut Encoder, i: usize, value: &Json) -> Option<()> {
            match value {
                Json::Null => encoder.push_null(i),
                Json::Bool(v) => encoder.push_bool(i, *v).ok()?,
                Json::String(v) => encoder.push_str(i, v).ok()?,
                Json::Number(v) if v.is_u64() => encoder.push_u64(i, v.as_u64()?).ok()?,
                Json::Number(v) if v.is_i64() => encoder.push_i64(i, v.as_i64()?).ok()?,
                Json::Number(v) => encoder.push_f64(i, v.as_f64()?).ok()?,
                Json::Array(_) | Json::Object(_) => return None,
            }
            Some(())
        }
        let mut encoder = Encoder::new(schema);
        for i in 0..schema.features() {
            let value = lookup(record, &schema.path(i)?.parts)?;
            match (schema.kind(i)?, value) {
                (FeatureKind::Multi | FeatureKind::Sequence, Json::Array(elements)) => {
                    elements.iter().try_for_each(|element| push(&mut encoder, i, element))?;
                }
                (FeatureKind::Multi, Json::Object(members)) => {
                    for (key, weight) in members {
                        let weight = match weight {
                            Json::Null => continue,
                            Json::Bool(v) => f64::from(u8::from(*v)),
                            other => other.as_f64()?,
                        };
                        encoder.push_weighted(i, key, weight).ok()?;
                    }
                }
                (_, value) => push(&mut encoder, i, value)?,
            }
        }
        let id = match record.get("id")? {
            Json::String(text) if !text.is_empty() => text.clone(),
            Json::Bool(v) => v.to_string(),
            Json::Number(v) if v.is_f64() => Digits::default().f64(v.as_f64()?).to_owned(),
            Json::Number(v) => v.to_string(),
            _ => return None,
        };
        let time = time_of(Scalar::I64(record.get("ts")?.as_i64()?, ""), TimeFormat::Auto).ok()?;
        let mut slots = Vec::new();
        encoder.finish(&mut slots);
        Some((id_of(id.as_bytes()), time, slots))
    }

    fn scalar() -> impl Strategy<Value = Json> {
        prop_oneof![
            Just(Json::Null),
            any::<bool>().prop_map(Json::from),
            any::<i64>().prop_map(Json::from),
            any::<u64>().prop_map(Json::from),
            (-20i64..20).prop_map(Json::from),
            // Floats that serde_json reads exactly.
            (-1_000_000i32..1_000_000).prop_map(|v| Json::from(f64::from(v) / 64.0)),
            "[a-c]{0,2}".prop_map(Json::from),
            any::<String>().prop_map(Json::from),
        ]
    }

    fn anything() -> impl Strategy<Value = Json> {
        scalar().prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Json::from),
                prop::collection::btree_map("[a-c0-2]{1,2}", inner, 0..4)
                    .prop_map(|members| Json::Object(members.into_iter().collect())),
            ]
        })
    }

    /// Mostly what the schema expects, with something else in between.
    fn record() -> impl Strategy<Value = Json> {
        fn or<T: Strategy<Value = Json> + 'static>(usual: T) -> BoxedStrategy<Option<Json>> {
            prop_oneof![12 => usual.prop_map(Some), 2 => Just(None), 1 => anything().prop_map(Some)].boxed()
        }
        let number = || {
            prop_oneof![
                (-20i64..20).prop_map(Json::from),
                (-9999i32..9999).prop_map(|v| Json::from(f64::from(v) / 8.0))
            ]
        };
        let array = || prop::collection::vec(scalar(), 0..5).prop_map(Json::from);
        let weights = prop::collection::btree_map("[a-c0-2]{1,2}", number(), 0..4)
            .prop_map(|members| Json::Object(members.into_iter().collect()));
        let object = |members: Vec<(&'static str, Option<Json>)>| {
            Json::Object(members.into_iter().filter_map(|(key, value)| Some((key.to_owned(), value?))).collect())
        };
        let user = (or(scalar()), or(array()), or(number()), or(array()), or(anything()), or(anything())).prop_map(
            move |(b, list, n, seq, v, skipped)| {
                let v = v.map(|x| serde_json::json!({"w": {"x": x}}));
                object(vec![("b", b), ("list", list), ("n", n), ("seq", seq), ("v", v), ("zz", skipped)])
            },
        );
        let id = prop_oneof![9 => scalar(), 1 => anything()];
        (
            id,
            0i64..4_000_000_000_000,
            or(scalar()),
            or(user),
            or(prop_oneof![array().boxed(), weights.boxed()]),
            or(scalar()),
            or(anything()),
        )
            .prop_map(move |(id, ts, a, u, bag, dotted, skipped)| {
                let members = vec![("id", Some(id)), ("ts", Some(ts.into())), ("a", a), ("u", u)];
                object([members, vec![("bag", bag), ("d.e", dotted), ("other", skipped)]].concat())
            })
    }

    /// Writes a value with its members in an order, with spaces and with escapes drawn from `chance`.
    fn render(value: &Json, chance: &mut impl FnMut(usize) -> usize, out: &mut String) {
        let text = |text: &str, chance: &mut dyn FnMut(usize) -> usize, out: &mut String| {
            if chance(4) == 0 {
                let escaped = text.encode_utf16().map(|unit| format!("\\u{unit:04x}"));
                out.push_str(&format!("\"{}\"", escaped.collect::<String>()));
            } else {
                out.push_str(&serde_json::to_string(text).unwrap());
            }
        };
        let space = |chance: &mut dyn FnMut(usize) -> usize, out: &mut String| {
            out.push_str(["", "", "", " ", "\t ", "\r\n"][chance(6)]);
        };
        space(chance, out);
        match value {
            Json::String(string) => text(string, chance, out),
            Json::Array(elements) => {
                out.push('[');
                for (i, element) in elements.iter().enumerate() {
                    out.push_str(if i > 0 { "," } else { "" });
                    render(element, chance, out);
                }
                space(chance, out);
                out.push(']');
            }
            Json::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                // The members of a weighted bag keep their order, for it says which values are kept.
                if members.iter().any(|(key, _)| ["id", "list", "seq", "w"].contains(&key.as_str())) {
                    for i in (1..members.len()).rev() {
                        members.swap(i, chance(i + 1));
                    }
                }
                out.push('{');
                for (i, (key, value)) in members.into_iter().enumerate() {
                    out.push_str(if i > 0 { "," } else { "" });
                    space(chance, out);
                    text(key, chance, out);
                    space(chance, out);
                    out.push(':');
                    render(value, chance, out);
                }
                space(chance, out);
                out.push('}');
            }
            other => out.push_str(&other.to_string()),
        }
        space(chance, out);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        /// One decoder for all records of a case, so that what it learned from one is put to the test by the next.
        #[test]
        fn decoding_equals_looking_up_every_path(records in prop::collection::vec(record(), 1..6), seed in any::<u64>()) {
            let schema = schema(FEATURES, CROSSES);
            let mut decoder = Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), false).unwrap();
            let mut state = seed;
            let mut chance = |below: usize| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                (state >> 33) as usize % below
            };
            for record in &records {
                let mut raw = String::new();
                render(record, &mut chance, &mut raw);
                prop_assert_eq!(&serde_json::from_str::<Json>(&raw).unwrap(), record);
                let mut chunk = Chunk::default();
                decoder.decode(raw.as_bytes(), 0, Fingerprint::NONE, &mut chunk);
                prop_assert_eq!(chunk.records.len(), 1);
                let got = chunk.rejects.is_empty().then(|| (chunk.records[0].id, chunk.records[0].event_time.0, chunk.slots.clone()));
                prop_assert_eq!(got, oracle(&schema, record), "{} {}", raw, chunk.reason_of(0));
            }
        }

        #[test]
        fn no_bytes_make_the_decoder_panic(raw in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..80) {
            let schema = schema(FEATURES, CROSSES);
            let mut decoder = Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), true).unwrap();
            let mut line = br#"{"id":"a\u00e9","ts":1,"u":{"b":[1,{"c":null}]},"bag":{"x":1e3,"y":-0.5}}"#.to_vec();
            line.truncate(cut);
            line.extend_from_slice(&raw);
            let mut chunk = Chunk::default();
            decoder.decode(&line, 0, Fingerprint::NONE, &mut chunk);
            prop_assert_eq!(chunk.records.len(), 1);
        }
    }
}
