//! JSON lines to encoded records.
//!
//! A [`Decoder`] walks the bytes of a record once, along a trie of the paths that the settings and the schema name, and
//! pushes what it finds straight into the [`Encoder`]. There is no JSON value and no string per field. Members that no
//! path names are checked and skipped. Records of one stream tend to have their keys in one order, so each object
//! remembers which key came after which, and a key that comes where it is expected costs one comparison.

use std::fmt;

use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use sonic_rs::LazyValue;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::event::{Chunk, Kind, Record, Stream, Time};
use crate::feature::encode::Digits;
use crate::feature::schema::{FeatureKind, Path, Schema, first_line, id_of};
use crate::feature::{Encoder, Mismatch};
use crate::position::Fingerprint;

/// Times of records lie in `0..END_OF_TIME`: from 1970 to before 2200.
pub const END_OF_TIME: i64 = 7_258_118_400_000;
/// The longest canonical text of an id, in bytes.
pub const LONGEST_ID: usize = 1024;
/// The deepest nesting of arrays and objects in a record.
pub const DEEPEST: usize = 128;
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
/// rejects and for records with escape sequences in their strings.
#[derive(Clone, Debug)]
pub struct Decoder {
    walker: Walker,
    stream: Stream,
    labelled: bool,
    keep_text: bool,
    root: usize,
    /// The trie of element paths, if records are exploded.
    element: Option<usize>,
    /// What the element paths fill, to be cleared between the elements of a slate.
    of_element: Vec<Target>,
    id_text: Vec<u8>,
    views: Option<Vec<EventView>>,
}

/// What a path is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
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
    takes_array: bool,
    takes_object: bool,
}

#[derive(Clone, Debug)]
struct Key {
    text: Box<str>,
    node: Option<usize>,
    /// Key that came after this one in the last object.
    next: usize,
    /// Number of the last object that had this key.
    object: u64,
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
struct Walker {
    nodes: Vec<Node>,
    encoder: Option<Encoder>,
    time_format: TimeFormat,
    fields: Fields,
    /// The key of the weight that is read next.
    key: String,
    /// Objects walked so far.
    objects: u64,
    /// Why the record cannot be used.
    problem: String,
}

/// A JSON scalar.
#[derive(Clone, Copy)]
enum Value<'a> {
    Null,
    Bool(bool),
    I64(i64),
    U64(u64),
    F64(f64),
    Str(&'a str),
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
            problem: String::new(),
        };
        let mut decoder = Self {
            walker,
            stream,
            labelled: settings.label.is_some(),
            keep_text,
            root: 0,
            element: None,
            of_element: Vec::new(),
            id_text: Vec::new(),
            views: None,
        };
        if settings.explode.is_some() {
            decoder.walker.nodes.push(Node { path: ".".into(), is_root: true, ..Node::default() });
            decoder.element = Some(1);
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
        if decoder.element.is_some() && !decoder.of_element.iter().any(|target| matches!(target, Target::Id(_))) {
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
        let (records, slots, text) = (out.records.len(), out.slots.len(), out.text.len());
        let place = Place { raw, offset, before };
        if let Err(reason) = self.walk(place, out) {
            out.records.truncate(records);
            out.slots.truncate(slots);
            out.text.truncate(text);
            out.rejects.push((records as u32, reason));
            out.text.extend_from_slice(raw);
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
                text_len: raw.len() as u32,
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

    /// Says how a record is decoded, event by event, or why it is rejected. For `tidemill check`; slow.
    pub fn describe(&mut self, raw: &[u8]) -> Result<Vec<EventView>, String> {
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
        let start = match (path.of_element, self.element) {
            (false, _) => self.root,
            (true, Some(element)) => {
                self.of_element.push(target);
                element
            }
            (true, None) => {
                return Err(format!("is `{text}`, a path of an element, but the mapping has no `explode`"));
            }
        };
        let end = self.walker.reach(start, path);
        self.walker.nodes[end].targets.push(target);
        Ok(())
    }

    fn walk(&mut self, place: Place<'_>, out: &mut Chunk) -> Result<(), String> {
        let text =
            std::str::from_utf8(place.raw).map_err(|e| format!("invalid UTF-8 after {} bytes", e.valid_up_to()))?;
        check_depth(place.raw)?;
        self.walker.begin();
        let mut slate = None;
        let mut json = sonic_rs::Deserializer::from_str(text);
        let seed =
            At { walker: &mut self.walker, node: Some(self.root), bag: None, weighted: false, slate: &mut slate };
        let walked = seed.deserialize(&mut json).and_then(|()| json.end());
        walked.map_err(|error| self.walker.reason(&error))?;
        // Out of a heartbeat's slate nothing is read.
        if self.element.is_none() || self.walker.fields.heartbeat {
            return self.event(place, 0, out);
        }
        let Some(slate) = slate else { return Err(format!("`{}` is missing", self.walker.slate_path())) };
        let mut json = sonic_rs::Deserializer::from_str(slate.as_raw_str());
        let mut rows = 0;
        let elements = Elements { decoder: self, place, out, rows: &mut rows };
        let walked = de::Deserializer::deserialize_seq(&mut json, elements);
        walked.map_err(|error| self.walker.reason(&error))?;
        if rows == 0 {
            return Err(format!("`{}` is empty, so the record holds no event", self.walker.slate_path()));
        }
        Ok(())
    }

    /// Appends the event that the walker holds.
    fn event(&mut self, place: Place<'_>, row: u32, out: &mut Chunk) -> Result<(), String> {
        let fields = &self.walker.fields;
        let Some(time) = fields.time else {
            return Err(format!("`{}` is missing: no event time", self.path_of(Target::Time)));
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
                return Err(format!("`{}` is missing: no label", self.path_of(Target::Label)));
            };
            kind = Kind::Labelled { positive };
        }
        if kind != Kind::Heartbeat {
            if let Some(missing) = fields.id.iter().position(Vec::is_empty) {
                if !self.labelled {
                    return Err(format!("`{}` is missing: no id", self.path_of(Target::Id(missing))));
                }
                id = xxh3_64_with_seed(place.raw, u64::from(row)).max(1);
                if self.keep_text {
                    out.text.extend_from_slice(format!("{id:016x}").as_bytes());
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
                    return Err(format!("the id is {} bytes long, the limit is {LONGEST_ID}", text.len()));
                }
                id = id_of(text);
                if self.keep_text {
                    out.text.extend_from_slice(text);
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

    /// How the settings spell the path of a field, for messages.
    #[cold]
    fn path_of(&self, target: Target) -> &str {
        self.walker.nodes.iter().find(|node| node.targets.contains(&target)).map_or("", |node| &node.path)
    }
}

/// Where a record is in its partition.
#[derive(Clone, Copy)]
struct Place<'a> {
    raw: &'a [u8],
    offset: u64,
    before: Fingerprint,
}

/// sonic-rs skips nested values by recursion without a bound, so a line of brackets could end the process.
fn check_depth(raw: &[u8]) -> Result<(), String> {
    // `[` and `{` differ in the bit 0x20 only. Most records have too few of either to be deep.
    if raw.iter().filter(|&&byte| byte | 0x20 == b'{').count() <= DEEPEST {
        return Ok(());
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for &byte in raw {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                if depth > DEEPEST {
                    return Err(format!("arrays and objects are nested more than {DEEPEST} deep"));
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(())
}

const NO_KEY: usize = usize::MAX;

impl Walker {
    fn begin(&mut self) {
        let fields = &mut self.fields;
        fields.id.iter_mut().for_each(Vec::clear);
        (fields.time, fields.log_time, fields.label, fields.weight) = (None, None, None, None);
        fields.heartbeat = false;
        if let Some(encoder) = &mut self.encoder {
            encoder.reset();
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
                let key = Key { text: part.as_str().into(), node: Some(child), next: NO_KEY, object: 0 };
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

    /// Which key of the object at `node` this is, after the key `before`; [`NO_KEY`] if no path goes on there.
    #[inline]
    fn find(&mut self, node: usize, before: usize, text: &str) -> usize {
        let node = &mut self.nodes[node];
        let guess = if before == NO_KEY { node.first } else { node.keys[before].next };
        match node.keys.get(guess) {
            Some(key) if *key.text == *text => guess,
            _ => Self::find_elsewhere(node, before, text),
        }
    }

    #[inline(never)]
    fn find_elsewhere(node: &mut Node, before: usize, text: &str) -> usize {
        let found = node.keys.iter().position(|key| *key.text == *text).unwrap_or_else(|| {
            if node.keys.len() == node.named + LEARNED_KEYS {
                return NO_KEY;
            }
            node.keys.push(Key { text: text.into(), node: None, next: NO_KEY, object: 0 });
            node.keys.len() - 1
        });
        if found != NO_KEY {
            if before == NO_KEY {
                node.first = found;
            } else {
                node.keys[before].next = found;
            }
        }
        found
    }

    /// Gives a scalar to all that the node is for.
    #[inline]
    fn give(&mut self, node: usize, value: Value<'_>) -> Result<(), ()> {
        let targets = self.nodes[node].targets.len();
        if targets == 0 && !matches!(value, Value::Null) {
            return self.refuse(node, &format!("is {}, but paths go on inside of it", value.name()));
        }
        for i in 0..targets {
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
    fn feature(&mut self, feature: usize, value: Value<'_>) -> Result<(), Mismatch> {
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        match value {
            Value::Null => {
                encoder.push_null(feature);
                Ok(())
            }
            Value::Bool(v) => encoder.push_bool(feature, v),
            Value::I64(v) => encoder.push_i64(feature, v),
            Value::U64(v) => encoder.push_u64(feature, v),
            Value::F64(v) => encoder.push_f64(feature, v),
            Value::Str(v) => encoder.push_str(feature, v),
        }
    }

    fn field(&mut self, node: usize, target: Target, value: Value<'_>) -> Result<(), ()> {
        let fields = &mut self.fields;
        let needs = match (target, value) {
            (Target::Heartbeat, value) => {
                fields.heartbeat = match value {
                    Value::Null => false,
                    Value::Bool(v) => v,
                    Value::I64(v) => v != 0,
                    Value::U64(v) => v != 0,
                    Value::F64(v) => v != 0.0,
                    Value::Str(v) => !v.is_empty(),
                };
                return Ok(());
            }
            (_, Value::Null) => return Ok(()),
            (Target::Id(part), value) => {
                let mut digits = Digits::default();
                let text = match value {
                    Value::Null => "",
                    Value::Bool(v) => {
                        if v {
                            "true"
                        } else {
                            "false"
                        }
                    }
                    Value::I64(v) => digits.i64(v),
                    Value::U64(v) => digits.u64(v),
                    Value::F64(v) => digits.f64(v),
                    Value::Str(v) => v,
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
                    Value::Bool(v) => fields.label = Some(v),
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
    fn give_bags(&mut self, node: usize, weighted: bool, value: Value<'_>) -> Result<(), ()> {
        for i in 0..self.nodes[node].targets.len() {
            let Target::Bag(feature, _) = self.nodes[node].targets[i] else { continue };
            let given = if weighted {
                let weight = match value {
                    Value::Null => continue,
                    Value::Bool(v) => f64::from(u8::from(v)),
                    other => match other.number() {
                        Some(weight) => weight,
                        None => return self.refuse(node, "has a member that is a string; weights are numbers"),
                    },
                };
                let Some(encoder) = &mut self.encoder else { continue };
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
    fn refuse(&mut self, node: usize, problem: &str) -> Result<(), ()> {
        let path = &self.nodes[node].path;
        self.problem = if path.is_empty() { format!("the record {problem}") } else { format!("`{path}` {problem}") };
        Err(())
    }

    #[cold]
    fn refuse_feature(&mut self, node: usize, feature: usize, is: &str, mismatch: Mismatch) -> Result<(), ()> {
        let name = self.encoder.as_ref().map_or("", |encoder| encoder.schema().name(feature));
        let problem = format!("is {is}; feature `{name}` {mismatch}");
        self.refuse(node, &problem)
    }

    /// Refuses an array or object where the node takes none.
    #[cold]
    fn refuse_container(&mut self, node: usize, is: &'static str) -> Result<(), ()> {
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

    /// Why the walk ended early: what we found, or what the parser says.
    #[cold]
    fn reason(&mut self, error: &sonic_rs::Error) -> String {
        if self.problem.is_empty() {
            format!("invalid JSON: {}", first_line(error))
        } else {
            std::mem::take(&mut self.problem)
        }
    }

    #[cold]
    fn slate_path(&self) -> &str {
        self.nodes.iter().find(|node| node.is_slate).map_or("", |node| &node.path)
    }
}

impl Value<'_> {
    fn number(&self) -> Option<f64> {
        match *self {
            Self::I64(v) => Some(v as f64),
            Self::U64(v) => Some(v as f64),
            Self::F64(v) => Some(v),
            Self::Null | Self::Bool(_) | Self::Str(_) => None,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a boolean",
            Self::I64(_) | Self::U64(_) | Self::F64(_) => "a number",
            Self::Str(_) => "a string",
        }
    }
}

/// Milliseconds since the epoch. Fractions of a millisecond are rounded for numbers, cut for RFC 3339.
fn time_of(value: Value<'_>, format: TimeFormat) -> Result<i64, String> {
    let seconds = |v: f64| match format {
        TimeFormat::Auto => v.abs() < 1e11,
        TimeFormat::S => true,
        TimeFormat::Ms | TimeFormat::Rfc3339 => false,
    };
    let ms = match (value, format) {
        (Value::Str(text), TimeFormat::Auto | TimeFormat::Rfc3339) => {
            match chrono::DateTime::parse_from_rfc3339(text) {
                Ok(time) => time.timestamp_millis(),
                Err(error) => return Err(format!("is {:?}, not an RFC 3339 time: {error}", shortened(text))),
            }
        }
        (Value::I64(v), _) if format != TimeFormat::Rfc3339 => {
            v.saturating_mul(if seconds(v as f64) { 1000 } else { 1 })
        }
        (Value::U64(v), _) if format != TimeFormat::Rfc3339 => {
            let v = i64::try_from(v).unwrap_or(i64::MAX);
            v.saturating_mul(if seconds(v as f64) { 1000 } else { 1 })
        }
        // `as` saturates.
        (Value::F64(v), _) if format != TimeFormat::Rfc3339 => {
            (v * if seconds(v) { 1000.0 } else { 1.0 }).round() as i64
        }
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

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(64)]
}

/// A value in the record: at a node, an element of the bags of another, or both.
struct At<'w, 's, 'de> {
    walker: &'w mut Walker,
    node: Option<usize>,
    bag: Option<usize>,
    /// The value is the weight of `walker.key`.
    weighted: bool,
    slate: &'s mut Option<LazyValue<'de>>,
}

/// The walker has written down why; sonic-rs needs an error of its own to stop.
#[cold]
fn stop<E: de::Error>((): ()) -> E {
    E::custom("")
}

impl At<'_, '_, '_> {
    #[inline]
    fn give<E: de::Error>(self, value: Value<'_>) -> Result<(), E> {
        if let Some(node) = self.node {
            self.walker.give(node, value).map_err(stop)?;
        }
        if let Some(bag) = self.bag {
            self.walker.give_bags(bag, self.weighted, value).map_err(stop)?;
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for At<'_, '_, 'de> {
    type Value = ();

    #[inline]
    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        if let Some(node) = self.node
            && self.walker.nodes[node].is_slate
        {
            // Its elements need the whole record, so they are read afterwards.
            let lazy = LazyValue::deserialize(json)?;
            return match lazy.as_raw_str().as_bytes() {
                [b'[', ..] => {
                    *self.slate = Some(lazy);
                    Ok(())
                }
                b"null" => Ok(()),
                [b'{', ..] => self.walker.refuse_container(node, "an object").map_err(stop),
                _ => self.walker.refuse(node, "is a scalar; `explode` needs an array").map_err(stop),
            };
        }
        json.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for At<'_, '_, 'de> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    #[inline]
    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        match self.node {
            // Null is a missing object, but not a missing record.
            Some(node) if self.walker.nodes[node].is_root && self.walker.nodes[node].targets.is_empty() => {
                self.walker.refuse_container(node, "null").map_err(stop)
            }
            _ => self.give(Value::Null),
        }
    }

    #[inline]
    fn visit_bool<E: de::Error>(self, v: bool) -> Result<(), E> {
        self.give(Value::Bool(v))
    }

    #[inline]
    fn visit_i64<E: de::Error>(self, v: i64) -> Result<(), E> {
        self.give(Value::I64(v))
    }

    #[inline]
    fn visit_u64<E: de::Error>(self, v: u64) -> Result<(), E> {
        self.give(Value::U64(v))
    }

    #[inline]
    fn visit_f64<E: de::Error>(self, v: f64) -> Result<(), E> {
        self.give(Value::F64(v))
    }

    #[inline]
    fn visit_str<E: de::Error>(self, v: &str) -> Result<(), E> {
        self.give(Value::Str(v))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        let Self { walker, node, bag, slate, .. } = self;
        if let Some(bag) = bag {
            return walker.refuse(bag, "holds an array inside of it; the values of a bag are scalars").map_err(stop);
        }
        let node = node.expect("a value is at a node or in a bag");
        if !walker.nodes[node].takes_array {
            return walker.refuse_container(node, "an array").map_err(stop);
        }
        let bag = walker.nodes[node].has_bag.then_some(node);
        let mut ahead = 0;
        for position in 0.. {
            let child = match walker.nodes[node].positions.get(ahead) {
                Some(&(at, child)) if at == position => {
                    ahead += 1;
                    Some(child)
                }
                _ => None,
            };
            let more = if child.is_none() && bag.is_none() {
                array.next_element::<IgnoredAny>()?.is_some()
            } else {
                array.next_element_seed(At { walker, node: child, bag, weighted: false, slate })?.is_some()
            };
            if !more {
                break;
            }
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        let Self { walker, node, bag, slate, .. } = self;
        if let Some(bag) = bag {
            return walker.refuse(bag, "holds an object inside of it; the values of a bag are scalars").map_err(stop);
        }
        let node = node.expect("a value is at a node or in a bag");
        if !walker.nodes[node].takes_object {
            return walker.refuse_container(node, "an object").map_err(stop);
        }
        if walker.nodes[node].has_bag {
            return walk_weights(walker, node, slate, object);
        }
        walker.objects += 1;
        let this = walker.objects;
        let mut before = NO_KEY;
        while let Some(found) = object.next_key_seed(KeyAt { walker, node, before })? {
            let child = match walker.nodes[node].keys.get_mut(found) {
                Some(key) => {
                    before = found;
                    let twice = key.object == this;
                    key.object = this;
                    match key.node {
                        Some(child) if twice => return walker.refuse(child, "is there twice").map_err(stop),
                        child => child,
                    }
                }
                None => None,
            };
            match child {
                Some(_) => object.next_value_seed(At { walker, node: child, bag: None, weighted: false, slate })?,
                None => {
                    object.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(())
    }
}

/// An object whose keys are the values of a bag.
fn walk_weights<'de, A: MapAccess<'de>>(
    walker: &mut Walker,
    node: usize,
    slate: &mut Option<LazyValue<'de>>,
    mut object: A,
) -> Result<(), A::Error> {
    while object.next_key_seed(KeyText { key: &mut walker.key })?.is_some() {
        let child = walker.nodes[node].keys.iter().find(|key| *key.text == *walker.key).and_then(|key| key.node);
        object.next_value_seed(At { walker, node: child, bag: Some(node), weighted: true, slate })?;
    }
    Ok(())
}

/// Finds which key of a node comes.
struct KeyAt<'w> {
    walker: &'w mut Walker,
    node: usize,
    before: usize,
}

impl<'de> DeserializeSeed<'de> for KeyAt<'_> {
    type Value = usize;

    #[inline]
    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<usize, D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyAt<'_> {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    #[inline]
    fn visit_str<E: de::Error>(self, text: &str) -> Result<usize, E> {
        Ok(self.walker.find(self.node, self.before, text))
    }
}

/// Copies a key.
struct KeyText<'w> {
    key: &'w mut String,
}

impl<'de> DeserializeSeed<'de> for KeyText<'_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_str(self)
    }
}

impl Visitor<'_> for KeyText<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.key.clear();
        self.key.push_str(text);
        Ok(())
    }
}

/// The elements of a slate, each an event.
struct Elements<'d, 'r> {
    decoder: &'d mut Decoder,
    place: Place<'r>,
    out: &'d mut Chunk,
    rows: &'d mut u32,
}

impl<'de> Visitor<'de> for Elements<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut array: A) -> Result<(), A::Error> {
        let Self { decoder, place, out, rows } = self;
        loop {
            decoder.clear_element();
            let seed =
                At { walker: &mut decoder.walker, node: decoder.element, bag: None, weighted: false, slate: &mut None };
            if array.next_element_seed(seed)?.is_none() {
                return Ok(());
            }
            if let Err(reason) = decoder.event(place, *rows, out) {
                decoder.walker.problem = reason;
                return Err(stop(()));
            }
            *rows += 1;
        }
    }
}

impl Decoder {
    fn clear_element(&mut self) {
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
