//! Requests for scores: a context and its candidates, by the rules by which records of the log are decoded.
//!
//! The body is `{"context": {…}, "candidates": [{…}, …], "ids": […]}`, in any order. Where no path of the schema starts at
//! the element of a slate, a candidate is scored as the record that has the context's members, with those of the candidate
//! in the place of members of the same name (of the top level; they are not merged further down). Otherwise the context is
//! the record without its slate, and each candidate is an element.

use super::json::{Scanner, Stop};
use super::{ELEMENT, Error, Fields, NO_KEY, Node, ROOT, Target, TimeFormat, Walker};
use crate::feature::overlay::Values;
use crate::feature::schema::{FeatureKind, Schema};
use crate::feature::{Encoder, Overlay};

/// Decodes one request after the other. Allocates nothing per candidate once warm.
#[derive(Clone, Debug)]
pub struct RequestDecoder {
    walker: Walker,
    overlay: Overlay,
    /// Where a string with escapes is put together.
    scratch: String,
    /// Of each node: the features at it and inside of it.
    inside: Vec<Vec<usize>>,
    /// Features of the element of a slate; empty where candidates are laid over the context.
    of_element: Vec<usize>,
}

/// Which part of a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Body,
    Context,
    /// By its place in the array, from 0.
    Candidate(usize),
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It is no JSON.
    Syntax,
    /// The request as a whole is not of the form that is expected.
    Form,
    /// A value is of a kind that its feature cannot take.
    Field,
    /// There are more candidates than allowed.
    TooMany,
}

/// Why a request cannot be scored.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}{problem}", match part { Part::Body => String::new(), Part::Context => "context: ".to_owned(), Part::Candidate(i) => format!("candidate {i}: ") })]
pub struct Refused {
    pub part: Part,
    pub wrong: Wrong,
    /// Path of the value that was refused, as the schema spells it.
    pub field: Option<String>,
    pub problem: String,
}

/// What a body held besides the values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Body<'a> {
    /// The array `ids` as it was written, to be given back.
    pub ids: Option<&'a str>,
}

impl RequestDecoder {
    /// Compiles the paths of a schema. Presentation features have their `at_serving` value, whatever a request says.
    pub fn new(schema: &Schema) -> Result<Self, Error> {
        let mut walker = Walker {
            nodes: vec![Node { is_root: true, ..Node::default() }, Node { is_root: true, ..Node::default() }],
            encoder: Some(Encoder::at_serving(schema)),
            time_format: TimeFormat::Auto,
            fields: Fields::default(),
            key: String::new(),
            objects: 0,
            slate: None,
            problem: String::new(),
            refused: ROOT,
            kept: None,
        };
        let mut of_element = Vec::new();
        let mut ends = Vec::new();
        for i in 0..schema.features() {
            let path = schema.path(i).expect("`i` is a feature");
            let target = match schema.kind(i) {
                Some(FeatureKind::Multi) => Target::Bag(i, true),
                Some(FeatureKind::Sequence) => Target::Bag(i, false),
                _ => Target::Field(i),
            };
            if path.of_element {
                of_element.push(i);
            }
            let end = walker.reach(if path.of_element { ELEMENT } else { ROOT }, path);
            walker.nodes[end].targets.push(target);
            ends.push(end);
        }
        walker.seal().map_err(|problem| Error::Feature { feature: schema.name(0).to_owned(), problem })?;
        let mut inside = vec![Vec::new(); walker.nodes.len()];
        for (node, features) in inside.iter_mut().enumerate() {
            walker.collect(node, features);
        }
        Ok(Self { walker, overlay: Overlay::new(schema), scratch: String::new(), inside, of_element })
    }

    #[must_use]
    pub fn schema(&self) -> &Schema {
        self.encoder().schema()
    }

    /// The context and candidates decoded last; incomplete after an error.
    #[must_use]
    pub fn overlay(&self) -> &Overlay {
        &self.overlay
    }

    /// Decodes the body of a request with at most `most` candidates.
    pub fn body<'a>(&mut self, body: &'a [u8], most: usize) -> Result<Body<'a>, Refused> {
        let text = std::str::from_utf8(body).map_err(|e| {
            let problem = format!("invalid UTF-8 after {} bytes", e.valid_up_to());
            Refused { part: Part::Body, wrong: Wrong::Syntax, field: None, problem }
        })?;
        let mut json = Scanner::new(text);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut walk = Walk { decoder: self, json: &mut json, scratch: &mut scratch, most, part: Part::Body };
        let result = walk.body(text);
        let part = walk.part;
        self.scratch = scratch;
        result.map_err(|end| self.refusal(end, part, json.at()))
    }

    /// Decodes a context that comes on its own; candidates follow.
    pub fn context(&mut self, raw: &[u8]) -> Result<(), Refused> {
        self.begin();
        self.single(raw, Part::Context)
    }

    /// Decodes the next candidate over the context that was given last.
    pub fn candidate(&mut self, raw: &[u8]) -> Result<(), Refused> {
        self.single(raw, Part::Candidate(self.overlay.len()))
    }

    /// The same from values that are not JSON.
    pub fn context_of<E>(&mut self, give: impl FnOnce(&mut Values<'_>) -> Result<(), E>) -> Result<(), E> {
        self.begin();
        let encoder = self.walker.encoder.as_mut().expect("made with one");
        give(&mut Values::of_context(encoder))?;
        self.overlay.keep(encoder);
        Ok(())
    }

    /// The same from values that are not JSON.
    pub fn candidate_of<E>(&mut self, give: impl FnOnce(&mut Values<'_>) -> Result<(), E>) -> Result<(), E> {
        let encoder = self.walker.encoder.as_mut().expect("made with one");
        give(&mut Values::of_candidate(encoder, &mut self.overlay))?;
        self.overlay.push(encoder);
        Ok(())
    }

    fn single(&mut self, raw: &[u8], part: Part) -> Result<(), Refused> {
        let text = std::str::from_utf8(raw).map_err(|e| {
            let problem = format!("invalid UTF-8 after {} bytes", e.valid_up_to());
            Refused { part, wrong: Wrong::Syntax, field: None, problem }
        })?;
        let mut json = Scanner::new(text);
        let mut scratch = std::mem::take(&mut self.scratch);
        let mut walk = Walk { decoder: self, json: &mut json, scratch: &mut scratch, most: usize::MAX, part };
        let result = match part {
            Part::Candidate(_) => walk.candidate(),
            _ => walk.context(),
        };
        let result = result.and_then(|()| json.end().map_err(End::from));
        self.scratch = scratch;
        result.map_err(|end| self.refusal(end, part, json.at()))
    }

    fn begin(&mut self) {
        self.walker.begin();
        self.overlay.begin(self.walker.encoder.as_mut().expect("made with one"));
    }

    fn encoder(&self) -> &Encoder {
        self.walker.encoder.as_ref().expect("made with one")
    }

    #[cold]
    fn refusal(&mut self, end: End, part: Part, at: usize) -> Refused {
        let refused = |wrong, problem| Refused { part, wrong, field: None, problem };
        match end {
            End::Stop(Stop::Syntax(problem)) => {
                refused(Wrong::Syntax, format!("invalid JSON: {problem}, at byte {at}"))
            }
            End::Stop(Stop::Refused) => {
                let path = &self.walker.nodes[self.walker.refused].path;
                let field = (!path.is_empty()).then(|| path.clone());
                Refused { part, wrong: Wrong::Field, field, problem: std::mem::take(&mut self.walker.problem) }
            }
            End::Form(problem) => refused(Wrong::Form, problem),
            End::TooMany(most) => {
                Refused { part: Part::Body, ..refused(Wrong::TooMany, format!("more than {most} candidates")) }
            }
        }
    }
}

/// Why a walk over a request ended early.
enum End {
    Stop(Stop),
    Form(String),
    TooMany(usize),
}

impl From<Stop> for End {
    fn from(stop: Stop) -> Self {
        Self::Stop(stop)
    }
}

/// A walk over a request.
struct Walk<'w, 'a> {
    decoder: &'w mut RequestDecoder,
    json: &'w mut Scanner<'a>,
    scratch: &'w mut String,
    most: usize,
    /// Where it is, for messages.
    part: Part,
}

impl Walk<'_, '_> {
    fn body<'a>(&mut self, text: &'a str) -> Result<Body<'a>, End> {
        let form = |problem: &str| Err(End::Form(problem.to_owned()));
        self.decoder.begin();
        if self.json.peek() != b'{' {
            return form("the body must be an object with `context` and `candidates`");
        }
        let (mut context, mut candidates, mut ids) = (false, None, None);
        let mut walked = false;
        let mut more = self.json.open(b'}')?;
        while more {
            let key = self.json.key(self.scratch)?;
            match key {
                "context" if context => return form("`context` is there twice"),
                "candidates" if candidates.is_some() => return form("`candidates` is there twice"),
                "ids" if ids.is_some() => return form("`ids` is there twice"),
                "context" => {
                    context = true;
                    self.part = Part::Context;
                    self.context()?;
                    self.part = Part::Body;
                }
                "candidates" => {
                    if self.json.peek() != b'[' {
                        return form("`candidates` must be an array of objects");
                    }
                    candidates = Some(self.json.at());
                    if context {
                        self.candidates()?;
                        walked = true;
                    } else {
                        self.json.skip()?;
                    }
                }
                "ids" => ids = Some(self.ids(text)?),
                other => {
                    return Err(End::Form(format!(
                        "unknown member `{}`; a request has `context`, `candidates` and, if it likes, `ids`",
                        super::shortened(other)
                    )));
                }
            }
            more = self.json.more(b'}')?;
        }
        self.json.end()?;
        if !context {
            return form("`context` is missing; it may be {}");
        }
        let Some(start) = candidates else { return form("`candidates` is missing") };
        if !walked {
            self.json.seek(start);
            self.candidates()?;
        }
        let have = self.decoder.overlay.len();
        if let Some((_, count)) = ids.filter(|(_, count)| *count != have) {
            return Err(End::Form(format!("`ids` has {count} elements for {have} candidates")));
        }
        Ok(Body { ids: ids.map(|(text, _)| text) })
    }

    /// The array `ids` as it is written, and how many there are.
    fn ids<'a>(&mut self, text: &'a str) -> Result<(&'a str, usize), End> {
        const WRONG: &str = "`ids` must be an array of strings and numbers";
        if self.json.peek() != b'[' {
            return Err(End::Form(WRONG.to_owned()));
        }
        let (start, mut count) = (self.json.at(), 0);
        let mut more = self.json.open(b']')?;
        while more {
            if !matches!(self.json.peek(), b'"' | b'-' | b'0'..=b'9') {
                return Err(End::Form(WRONG.to_owned()));
            }
            self.json.skip()?;
            count += 1;
            more = self.json.more(b']')?;
        }
        Ok((&text[start..self.json.at()], count))
    }

    fn context(&mut self) -> Result<(), End> {
        let RequestDecoder { walker, overlay, .. } = &mut *self.decoder;
        if self.json.peek() != b'{' {
            return Err(End::Form("the context must be an object".to_owned()));
        }
        walker.value(self.json, self.scratch, Some(ROOT), None, false)?;
        overlay.keep(walker.encoder.as_mut().expect("made with one"));
        Ok(())
    }

    fn candidates(&mut self) -> Result<(), End> {
        let mut more = self.json.open(b']')?;
        let mut count = 0;
        while more {
            if count == self.most {
                return Err(End::TooMany(self.most));
            }
            self.part = Part::Candidate(count);
            self.candidate()?;
            count += 1;
            self.part = Part::Body;
            more = self.json.more(b']')?;
        }
        Ok(())
    }

    fn candidate(&mut self) -> Result<(), End> {
        let RequestDecoder { walker, overlay, inside, of_element, .. } = &mut *self.decoder;
        if of_element.is_empty() {
            if self.json.peek() != b'{' {
                return Err(End::Form("a candidate must be an object".to_owned()));
            }
            walker.objects += 1;
            let (this, mut before) = (walker.objects, NO_KEY);
            let mut more = self.json.open(b'}')?;
            while more {
                match walker.member(self.json, self.scratch, ROOT, this, &mut before)? {
                    None => self.json.skip()?,
                    Some(child) => {
                        inside[child].iter().for_each(|&feature| overlay.touch(feature));
                        walker.value(self.json, self.scratch, Some(child), None, false)?;
                    }
                }
                more = self.json.more(b'}')?;
            }
        } else {
            of_element.iter().for_each(|&feature| overlay.touch(feature));
            walker.value(self.json, self.scratch, Some(ELEMENT), None, false)?;
        }
        overlay.push(walker.encoder.as_mut().expect("made with one"));
        Ok(())
    }
}

impl Walker {
    /// Adds the features at a node and inside of it.
    fn collect(&self, node: usize, features: &mut Vec<usize>) {
        features.extend(self.nodes[node].targets.iter().filter_map(|target| match target {
            Target::Field(feature) | Target::Bag(feature, _) => Some(*feature),
            _ => None,
        }));
        for child in self.nodes[node].keys.iter().filter_map(|key| key.node) {
            self.collect(child, features);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Map, Value, json};

    use super::*;
    use crate::event::{Chunk, Slot, Stream};
    use crate::position::Fingerprint;
    use crate::source::decode::{Decoder, IdPaths, RecordSettings};

    fn schema(features: Value, crosses: Value) -> Schema {
        let (features, crosses) = (features.to_string(), crosses.to_string());
        Schema::new(
            &serde_json::from_str::<Vec<_>>(&features).unwrap(),
            &serde_json::from_str::<Vec<_>>(&crosses).unwrap(),
        )
        .unwrap()
    }

    fn plain() -> Schema {
        schema(
            json!([{"name": "user", "from": "user.id"}, {"name": "age", "from": "user.age", "kind": "numeric"},
                {"name": "item", "from": "item.id"}, {"name": "tags", "from": "item.tags", "kind": "multi"},
                {"name": "history", "kind": "sequence", "max_len": 2}, {"name": "hour"},
                {"name": "position", "role": "presentation", "at_serving": 1}]),
            json!([{"of": ["user", "item"]}, {"of": ["history", "tags"], "max": 3}, {"of": ["user", "hour"]},
                {"of": ["age", "hour", "tags"]}]),
        )
    }

    /// What training's decoder makes of a record, at serving.
    fn slots_of(schema: &Schema, settings: &RecordSettings, record: &Value) -> Vec<Vec<Slot>> {
        let mut decoder = Decoder::new(Stream::Impressions, settings, Some(schema), false).unwrap().at_serving();
        let mut chunk = Chunk::default();
        decoder.decode(record.to_string().as_bytes(), 0, Fingerprint::NONE, &mut chunk);
        assert!(chunk.rejects.is_empty(), "{:?}", chunk.rejects);
        chunk.records.iter().map(|record| chunk.slots_of(record).to_vec()).collect()
    }

    fn refused(decoder: &mut RequestDecoder, body: &str) -> (Part, Wrong, Option<String>, String) {
        let refused = decoder.body(body.as_bytes(), 3).unwrap_err();
        (refused.part, refused.wrong, refused.field.clone(), refused.to_string())
    }

    #[test]
    fn a_refused_request_names_its_candidate_and_field() {
        let mut decoder = RequestDecoder::new(&plain()).unwrap();
        let body = r#"{"context":{"user":{"id":1}},"candidates":[{"item":{"id":2}},{"item":{"id":[2]}}]}"#;
        let (part, wrong, field, text) = refused(&mut decoder, body);
        assert_eq!((part, wrong, field.as_deref()), (Part::Candidate(1), Wrong::Field, Some("item.id")));
        assert!(text.contains("candidate 1: `item.id` is an array"), "{text}");
        let (part, _, field, text) = refused(&mut decoder, r#"{"context":{"user":{"age":"x"}},"candidates":[]}"#);
        assert_eq!((part, field.as_deref()), (Part::Context, Some("user.age")));
        assert!(text.contains("needs a number"), "{text}");
        for (body, expected) in [
            ("[]", "must be an object"),
            (r#"{"candidates":[]}"#, "`context` is missing"),
            (r#"{"context":{}}"#, "`candidates` is missing"),
            (r#"{"context":{},"candidates":{}}"#, "array"),
            (r#"{"context":[],"candidates":[]}"#, "the context must be an object"),
            (r#"{"context":{},"candidates":[1]}"#, "candidate 0: a candidate must be an object"),
            (r#"{"context":{},"candidates":[],"kontext":1}"#, "unknown member `kontext`"),
            (r#"{"context":{},"context":{},"candidates":[]}"#, "twice"),
            (r#"{"context":{},"candidates":[{}],"ids":[]}"#, "`ids` has 0 elements for 1 candidates"),
            (r#"{"context":{},"candidates":[{}],"ids":[null]}"#, "strings and numbers"),
            (r#"{"context":{},"candidates":[{},{},{},{}]}"#, "more than 3 candidates"),
            (r#"{"candidates":[{},{},{},{}],"context":{}}"#, "more than 3 candidates"),
            (r#"{"context":{},"candidates":[{}"#, "invalid JSON"),
            (r#"{"context":{},"candidates":[]} x"#, "invalid JSON"),
            (r#"{"context":{},"candidates":[{"item":1,"item":2}]}"#, "candidate 0"),
        ] {
            let (.., text) = refused(&mut decoder, body);
            assert!(text.contains(expected), "{body}: {text}");
        }
        // What went before leaves nothing behind.
        let body = decoder.body(br#"{"ids":["a", 2],"candidates":[{},{}],"context":{}}"#, 3).unwrap();
        assert_eq!(body.ids, Some(r#"["a", 2]"#));
        let empty = slots_of(&plain(), &RecordSettings::default(), &json!({"id": 1, "ts": 1}));
        assert_eq!([decoder.overlay().whole(0), decoder.overlay().whole(1)], [empty[0].clone(), empty[0].clone()]);
    }

    #[test]
    fn the_candidates_of_a_slate_are_its_elements() {
        let schema = schema(
            json!([{"name": "user"}, {"name": "item", "from": ".id"}, {"name": "tags", "from": ".tags", "kind": "multi"}]),
            json!([{"of": ["user", "item"]}, {"of": ["user", "tags"]}]),
        );
        let settings = RecordSettings {
            id: IdPaths::One(".id".into()),
            explode: Some("items".into()),
            ..RecordSettings::default()
        };
        let items = json!([{"id": 5, "tags": ["x", "y"]}, {"id": 6, "user": 9}, {"id": 7}]);
        let expected = slots_of(&schema, &settings, &json!({"user": 3, "ts": 1, "items": items}));
        let mut decoder = RequestDecoder::new(&schema).unwrap();
        decoder.body(json!({"context": {"user": 3}, "candidates": items}).to_string().as_bytes(), 3).unwrap();
        assert_eq!((0..3).map(|i| decoder.overlay().whole(i)).collect::<Vec<_>>(), expected);
    }

    fn members() -> impl Strategy<Value = Map<String, Value>> {
        let scalar =
            || prop_oneof![Just(Value::Null), (0u64..4).prop_map(Value::from), "[a-c]{0,2}".prop_map(Value::from)];
        let number =
            prop_oneof![Just(Value::Null), (0u64..99).prop_map(Value::from), (0.0..9.0f64).prop_map(Value::from)];
        let list = || prop::collection::vec(scalar(), 0..4).prop_map(Value::from);
        let user = prop_oneof![
            1 => Just(Value::Null),
            4 => (prop::option::of(scalar()), number).prop_map(|(id, age)| match id {
                Some(id) => json!({"id": id, "age": age}),
                None => json!({"age": age}),
            }),
        ];
        let item = prop_oneof![
            (scalar(), list()).prop_map(|(id, tags)| json!({"id": id, "tags": tags})),
            (0u64..4).prop_map(|w| json!({"tags": {"a": w, "b": 1}})),
        ];
        let one = prop_oneof![
            user.prop_map(|v| ("user", v)),
            item.prop_map(|v| ("item", v)),
            list().prop_map(|v| ("history", v)),
            scalar().prop_map(|v| ("hour", v)),
            scalar().prop_map(|v| ("position", v)),
            scalar().prop_map(|v| ("other", v)),
        ];
        prop::collection::vec(one, 0..6)
            .prop_map(|members| members.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
    }

    proptest! {
        #[test]
        fn a_candidate_is_the_record_with_its_members_in_the_place_of_the_contexts(
            context in members(), candidates in prop::collection::vec(members(), 0..5), context_first: bool,
        ) {
            let schema = plain();
            let mut decoder = RequestDecoder::new(&schema).unwrap();
            let (c, k) = (Value::from(context.clone()), json!(candidates));
            let body = if context_first { format!(r#"{{"context":{c},"candidates":{k}}}"#) } else { format!(r#"{{"candidates":{k},"context":{c}}}"#) };
            // The second time it is warm.
            for _ in 0..2 {
                decoder.body(body.as_bytes(), 9).unwrap();
                prop_assert_eq!(decoder.overlay().len(), candidates.len());
                for (i, candidate) in candidates.iter().enumerate() {
                    let mut record = context.clone();
                    record.extend(candidate.clone());
                    record.extend([("id".to_owned(), json!("x")), ("ts".to_owned(), json!(1))]);
                    let expected = slots_of(&schema, &RecordSettings::default(), &record.into());
                    prop_assert_eq!(&decoder.overlay().whole(i), &expected[0]);
                }
            }
        }

        #[test]
        fn no_body_makes_it_panic(raw in prop::collection::vec(any::<u8>(), 0..64), cut in 0usize..100) {
            let mut decoder = RequestDecoder::new(&plain()).unwrap();
            let _ = decoder.body(&raw, 9);
            let body = br#"{"context":{"user":{"id":"\u00e9"}},"candidates":[{"item":{"tags":["a",1e3]}}],"ids":[1]}"#;
            let mut body = body.to_vec();
            body.truncate(cut);
            let _ = decoder.body(&body, 9);
            let at = cut.min(body.len());
            body.splice(at..at, raw);
            let _ = decoder.body(&body, 9);
        }
    }
}
