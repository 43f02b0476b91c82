//! The feature schema: which fields of a record become which rows of the model.
//!
//! [`FeatureSettings`] and [`CrossSettings`] are what a user writes; [`Schema`] is what was checked. A schema travels in
//! every snapshot as canonical JSON, and its [`hash`](Schema::hash) says whether two encode alike.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::Error;
use crate::event::Slot;

/// The version of the rules in `docs/encoding.md`; part of the canonical JSON, so of the hash.
pub const ENCODING: u32 = 2;

/// How many low bits of a row say which feature's it is. Fewer would leave more rows that could be of several features; each
/// one more doubles the pairs of values that share a row, which are about n² / 2^53 among n values of a feature.
const MARK_BITS: u32 = 12;

/// One `[[features]]` entry.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureSettings {
    /// Unique among features and crosses; part of every id, so renaming a feature forgets what was learned.
    pub name: String,
    /// Where the value is: keys joined by dots, array positions as numbers (`user.onehot.3`), `\.` for a dot inside a
    /// key. With `explode`, a leading dot starts at the element (`.item_id`). Default: the name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// `categorical` (default), `numeric`, `multi` (a bag) or `sequence` (the last values of an array).
    #[serde(default)]
    pub kind: FeatureKind,
    /// Which tower sees it: `user`, `item` or `none` (default). The logistic part sees all.
    #[serde(default)]
    pub tower: Tower,
    /// The feature whose vectors it uses in the towers, so that a value has one vector in both. Default: its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding: Option<String>,
    /// `presentation`: explains the click and is unknown when candidates are scored; needs `at_serving`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<Role>,
    /// The value that a presentation feature has at serving: a string, number or boolean.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub at_serving: Option<Scalar>,
    /// Numeric: `[low, high]`, applied first. Default: no clipping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub clip: Option<[f64; 2]>,
    /// Numeric: the multiplier applied after `clip`. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Numeric: `bucket` (default, signed log2), `bins` (by edges) or `value` (linear).
    #[serde(rename = "as", skip_serializing_if = "Option::is_none")]
    pub form: Option<Form>,
    /// Numeric as buckets: how many buckets a doubling has; a power of two up to 1024. Default: 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub per_octave: Option<u32>,
    /// Numeric as bins: ascending edges; an edge belongs to the bin above it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bins: Option<Vec<f64>>,
    /// Numeric as value: use the signed `ln(1 + |x|)` of the clipped and scaled number. Default: false.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log: Option<bool>,
    /// Bags: how many values count at most (1 to 65536). A `multi` keeps the first, a `sequence` the last. Default: 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_len: Option<u32>,
}

/// One `[[crosses]]` entry: two or three features whose values together are a value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossSettings {
    /// The names of two or three features.
    pub of: Vec<String>,
    /// Default: the parts joined by `*`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How many combinations of bag values count at most (1 to 4096); the last part turns fastest. Default: 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
}

/// What a field holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FeatureKind {
    #[default]
    Categorical,
    Numeric,
    Multi,
    Sequence,
}

/// Which tower of the two-tower model a feature belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tower {
    User,
    Item,
    #[default]
    None,
}

/// A feature that is treated apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    Presentation,
}

/// How a number enters the logistic model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    #[default]
    Bucket,
    Bins,
    Value,
}

/// A value fixed in the settings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Scalar {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
}

/// A checked path into a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Path {
    /// Starts at the element of the exploded array rather than at the record.
    pub of_element: bool,
    /// Keys, or positions in arrays; empty only for the element itself (`.`).
    pub parts: Vec<String>,
}

impl Path {
    /// Reads `a.b.3`, `.a` (of the element) or `.` (the element itself); `\` makes the next character part of the key.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (of_element, body) = text.strip_prefix('.').map_or((false, text), |rest| (true, rest));
        if of_element && body.is_empty() {
            return Ok(Self { of_element, parts: Vec::new() });
        }
        let mut parts = vec![String::new()];
        let mut chars = body.chars();
        while let Some(c) = chars.next() {
            match c {
                '.' => parts.push(String::new()),
                '\\' => match chars.next() {
                    Some(next) => parts.last_mut().expect("never empty").push(next),
                    None => return Err(format!("is the path `{text}`, which ends in a lone backslash")),
                },
                c => parts.last_mut().expect("never empty").push(c),
            }
        }
        if parts.iter().any(String::is_empty) {
            return Err(format!("is the path `{text}`, which has an empty key; write it like `user.id`"));
        }
        Ok(Self { of_element, parts })
    }
}

impl std::fmt::Display for Path {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let escaped: Vec<_> = self.parts.iter().map(|part| part.replace('\\', "\\\\").replace('.', "\\.")).collect();
        write!(f, "{}{}", if self.of_element { "." } else { "" }, escaped.join("."))
    }
}

/// How a feature's value becomes rows, with everything looked up once.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Rule {
    Category,
    Bucket { number: Number, shift: u32 },
    Bins { number: Number, edges: Box<[f64]> },
    Value { number: Number, log: bool },
    Bag { max_len: usize, last: bool },
}

/// What happens to a number before its bucket, bin or value is taken.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Number {
    pub low: f64,
    pub high: f64,
    pub scale: f64,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Feature {
    pub settings: FeatureSettings,
    pub path: Path,
    pub rule: Rule,
    pub seed: u64,
    /// XORed with the hash of a value's text; 0 where the embedding is its own.
    pub key: u64,
}

impl Feature {
    /// The row of a value's text.
    #[inline]
    pub fn row_of(&self, text: &[u8]) -> u64 {
        (row_of(text, self.seed) ^ self.key).max(1)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cross {
    pub settings: CrossSettings,
    pub name: String,
    /// Indices of the base features, two or three.
    pub parts: Vec<usize>,
    pub max: usize,
    pub seed: u64,
    /// No part is a bag, so there is exactly one slot.
    pub plain: bool,
}

/// The checked features and crosses, in the order of the settings: features are `0..features()`, crosses follow.
#[derive(Clone, Debug, PartialEq)]
pub struct Schema {
    pub(super) features: Vec<Feature>,
    pub(super) crosses: Vec<Cross>,
}

/// The canonical form: every default spelled out, keys in the order of the settings structs.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Canonical {
    encoding: u32,
    features: Vec<FeatureSettings>,
    crosses: Vec<CrossSettings>,
}

/// xxh3 of a value's canonical text with its feature's seed, the low bits replaced by a mark that follows from the others and
/// the seed: by that a row tells its feature. 0 becomes 1, for tables use 0 for an empty place.
#[inline]
#[must_use]
pub fn row_of(text: &[u8], seed: u64) -> u64 {
    let hash = xxh3_64_with_seed(text, seed) >> MARK_BITS;
    (hash << MARK_BITS | mark_of(hash, seed)).max(1)
}

/// The mark of a row whose other bits are `hash`: the top bits of a product, which depend on all of its factor's.
#[inline]
fn mark_of(hash: u64, seed: u64) -> u64 {
    (hash ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - MARK_BITS)
}

/// Whether a row may be one of the feature or cross with this seed. Always true of its own; of another's with a chance of
/// 2^-12.
#[inline]
#[must_use]
fn may_be_of(row: u64, seed: u64) -> bool {
    row & ((1 << MARK_BITS) - 1) == mark_of(row >> MARK_BITS, seed)
}

/// The seed of a feature's or cross's rows.
#[must_use]
pub fn seed_of(name: &str) -> u64 {
    xxh3_64(name.as_bytes())
}

/// The hash of an impression id's canonical text; 0 becomes 1.
#[must_use]
pub fn id_of(text: &[u8]) -> u64 {
    xxh3_64(text).max(1)
}

impl Schema {
    /// Checks the settings. Messages name the key, such as `features[2].bins`.
    pub fn new(features: &[FeatureSettings], crosses: &[CrossSettings]) -> Result<Self, Error> {
        if features.is_empty() {
            return Err(setting("features", "is empty; a model needs at least one [[features]] entry"));
        }
        if features.len() + crosses.len() > usize::from(u16::MAX) {
            let problem = format!("has {} entries with crosses, the limit is 65535", features.len() + crosses.len());
            return Err(setting("features", problem));
        }
        let mut names = BTreeMap::new();
        let mut checked = Vec::with_capacity(features.len());
        for (i, settings) in features.iter().enumerate() {
            let key = |field: &str| format!("features[{i}].{field}");
            check_name(&key("name"), &settings.name)?;
            if names.insert(settings.name.clone(), i).is_some() {
                return Err(setting(key("name"), format!("is `{}`, which another feature has too", settings.name)));
            }
            checked.push(check_feature(settings, key)?);
        }
        for (i, settings) in features.iter().enumerate() {
            if let Some(name) = &settings.embedding {
                let key = |field: &str| format!("features[{i}].{field}");
                check_embedding(i, name, features, &names, key)?;
                (checked[i].seed, checked[i].key) = (seed_of(name), seed_of(&settings.name));
            }
        }
        let mut checked_crosses: Vec<Cross> = Vec::with_capacity(crosses.len());
        for (i, settings) in crosses.iter().enumerate() {
            let key = |field: &str| format!("crosses[{i}].{field}");
            let cross = check_cross(settings, &names, &checked, key)?;
            if names.contains_key(&cross.name) || checked_crosses.iter().any(|other| other.name == cross.name) {
                return Err(setting(key("name"), format!("is `{}`, which is taken; set another name", cross.name)));
            }
            checked_crosses.push(cross);
        }
        Ok(Self { features: checked, crosses: checked_crosses })
    }

    /// Features and crosses together: one more than the largest [`Slot::feature`].
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a schema is never empty")]
    pub fn len(&self) -> usize {
        self.features.len() + self.crosses.len()
    }

    /// How many of them are features; crosses come after.
    #[must_use]
    pub fn features(&self) -> usize {
        self.features.len()
    }

    /// The name of feature or cross `i`.
    #[must_use]
    pub fn name(&self, i: usize) -> &str {
        match self.features.get(i) {
            Some(feature) => &feature.settings.name,
            None => &self.crosses[i - self.features.len()].name,
        }
    }

    /// The index of the feature or cross with this name.
    #[must_use]
    pub fn index_of(&self, name: &str) -> Option<usize> {
        (0..self.len()).find(|&i| self.name(i) == name)
    }

    /// The row of a value of a categorical feature; none for features of another kind, and crosses.
    #[must_use]
    pub fn value_row(&self, i: usize, value: &str) -> Option<u64> {
        let feature = self.features.get(i)?;
        (feature.rule == Rule::Category).then(|| feature.row_of(value.as_bytes()))
    }

    /// What an id without a row of its own contributes.
    #[must_use]
    pub fn default_row(&self, i: usize) -> u64 {
        self.special_row(i, 0xFE)
    }

    /// The row of a feature that the record had no value for. Crosses never use theirs: a missing part is a value.
    #[must_use]
    pub fn missing_row(&self, i: usize) -> u64 {
        self.special_row(i, 0xFF)
    }

    /// Whether a row may be one of feature or cross `i`: true of each of its own, and by chance of one in 4096 others.
    #[inline]
    #[must_use]
    pub fn may_own(&self, i: usize, row: u64) -> bool {
        match self.features.get(i) {
            Some(feature) => may_be_of(row ^ feature.key, feature.seed),
            None => may_be_of(row, self.crosses[i - self.features.len()].seed),
        }
    }

    /// Whether a vector with this id may be one that feature `i` uses, likewise. Never of a cross, or a feature in no tower.
    #[inline]
    #[must_use]
    pub fn may_use_vector(&self, i: usize, id: u64) -> bool {
        self.tower(i) != Tower::None && self.features.get(i).is_some_and(|feature| may_be_of(id, feature.seed))
    }

    /// What a row of feature `i` is XORed with to give the id of its vector: 0 unless it uses the vectors of another.
    #[must_use]
    pub fn embedding_key(&self, i: usize) -> u64 {
        self.features.get(i).map_or(0, |feature| feature.key)
    }

    /// Adds to the logit in training and is fixed at serving.
    #[must_use]
    pub fn is_presentation(&self, i: usize) -> bool {
        self.features.get(i).is_some_and(|feature| feature.settings.role == Some(Role::Presentation))
    }

    /// Which tower sees it; crosses belong to none.
    #[must_use]
    pub fn tower(&self, i: usize) -> Tower {
        self.features.get(i).map_or(Tower::None, |feature| feature.settings.tower)
    }

    /// Where feature `i` is in a record; `None` for crosses.
    #[must_use]
    pub fn path(&self, i: usize) -> Option<&Path> {
        self.features.get(i).map(|feature| &feature.path)
    }

    /// What feature `i` holds; `None` for crosses.
    #[must_use]
    pub fn kind(&self, i: usize) -> Option<FeatureKind> {
        self.features.get(i).map(|feature| feature.settings.kind)
    }

    /// Canonical JSON: the same text for schemas that encode alike.
    #[must_use]
    pub fn to_json(&self) -> String {
        let canonical = Canonical {
            encoding: ENCODING,
            features: self.features.iter().map(|feature| feature.settings.clone()).collect(),
            crosses: self.crosses.iter().map(|cross| cross.settings.clone()).collect(),
        };
        serde_json::to_string(&canonical).expect("a checked schema has finite numbers and string keys")
    }

    /// Reads what [`to_json`](Self::to_json) wrote, and checks it again.
    pub fn from_json(json: &str) -> Result<Self, Error> {
        let canonical: Canonical = serde_json::from_str(json).map_err(|e| Error::Json(e.to_string()))?;
        if canonical.encoding != ENCODING {
            return Err(Error::Version { found: canonical.encoding, known: ENCODING });
        }
        Self::new(&canonical.features, &canonical.crosses)
    }

    /// 16 hex digits: the xxh3 of the canonical JSON. The order of features matters, for slots carry their index.
    #[must_use]
    pub fn hash(&self) -> String {
        format!("{:016x}", xxh3_64(self.to_json().as_bytes()))
    }

    pub(super) fn missing_slot(&self, i: usize) -> Slot {
        Slot { row: self.missing_row(i), value: 1.0, feature: i as u16, flags: Slot::MISSING }
    }

    fn special_row(&self, i: usize, byte: u8) -> u64 {
        match self.features.get(i) {
            Some(feature) => feature.row_of(&[byte]),
            None => row_of(&[byte], self.crosses[i - self.features.len()].seed),
        }
    }
}

fn setting(key: impl Into<String>, problem: impl Into<String>) -> Error {
    Error::Setting { key: key.into(), problem: problem.into() }
}

fn check_name(key: &str, name: &str) -> Result<(), Error> {
    if name.is_empty() {
        return Err(setting(key, "is empty; every feature needs a name"));
    }
    if name.len() > 256 || name.chars().any(char::is_control) {
        return Err(setting(key, format!("is {name:?}; at most 256 bytes and no control characters")));
    }
    Ok(())
}

fn check_feature(settings: &FeatureSettings, key: impl Fn(&str) -> String) -> Result<Feature, Error> {
    let mut canonical = settings.clone();
    let from = canonical.from.get_or_insert_with(|| settings.name.clone());
    let path = Path::parse(from).map_err(|problem| setting(key("from"), problem))?;
    let numeric = settings.kind == FeatureKind::Numeric;
    let bag = matches!(settings.kind, FeatureKind::Multi | FeatureKind::Sequence);
    let form = settings.form.unwrap_or_default();
    for (field, given, fits, owner) in [
        ("clip", settings.clip.is_some(), numeric, "kind = \"numeric\""),
        ("scale", settings.scale.is_some(), numeric, "kind = \"numeric\""),
        ("as", settings.form.is_some(), numeric, "kind = \"numeric\""),
        ("per_octave", settings.per_octave.is_some(), numeric && form == Form::Bucket, "a numeric as = \"bucket\""),
        ("bins", settings.bins.is_some(), numeric && form == Form::Bins, "a numeric as = \"bins\""),
        ("log", settings.log.is_some(), numeric && form == Form::Value, "a numeric as = \"value\""),
        ("max_len", settings.max_len.is_some(), bag, "kind = \"multi\" or \"sequence\""),
        ("at_serving", settings.at_serving.is_some(), settings.role.is_some(), "role = \"presentation\""),
    ] {
        if given && !fits {
            return Err(setting(key(field), format!("belongs to {owner}; remove it or change the feature")));
        }
    }
    let number = Number {
        low: settings.clip.map_or(f64::NEG_INFINITY, |clip| clip[0]),
        high: settings.clip.map_or(f64::INFINITY, |clip| clip[1]),
        scale: settings.scale.unwrap_or(1.0),
    };
    if let Some([low, high]) = settings.clip
        && !(low < high && low.is_finite() && high.is_finite())
    {
        return Err(setting(
            key("clip"),
            format!("is [{low}, {high}]; it must be two finite numbers, the lower first"),
        ));
    }
    if !number.scale.is_finite() || number.scale == 0.0 {
        return Err(setting(key("scale"), format!("is {}; it must be finite and not 0", number.scale)));
    }
    let rule = match settings.kind {
        FeatureKind::Categorical => Rule::Category,
        FeatureKind::Multi | FeatureKind::Sequence => {
            let max_len = *canonical.max_len.get_or_insert(64);
            if !(1..=65536).contains(&max_len) {
                return Err(setting(key("max_len"), format!("is {max_len}; it must be 1 to 65536")));
            }
            Rule::Bag { max_len: max_len as usize, last: settings.kind == FeatureKind::Sequence }
        }
        FeatureKind::Numeric => {
            canonical.form = Some(form);
            match form {
                Form::Bucket => {
                    let per_octave = *canonical.per_octave.get_or_insert(1);
                    if !per_octave.is_power_of_two() || per_octave > 1024 {
                        let problem = format!("is {per_octave}; it must be a power of two up to 1024");
                        return Err(setting(key("per_octave"), problem));
                    }
                    Rule::Bucket { number, shift: per_octave.trailing_zeros() }
                }
                Form::Bins => {
                    let edges = settings.bins.clone().unwrap_or_default();
                    let ascending = edges.windows(2).all(|pair| pair[0] < pair[1]);
                    if edges.is_empty() || edges.len() > 4096 || !ascending || edges.iter().any(|e| !e.is_finite()) {
                        return Err(setting(key("bins"), "must be 1 to 4096 finite numbers in ascending order"));
                    }
                    Rule::Bins { number, edges: edges.into() }
                }
                Form::Value => Rule::Value { number, log: *canonical.log.get_or_insert(false) },
            }
        }
    };
    if settings.role == Some(Role::Presentation) {
        let fits = match (&settings.at_serving, settings.kind) {
            (None, _) => {
                return Err(setting(
                    key("at_serving"),
                    "is missing; a presentation feature needs its value at serving",
                ));
            }
            (Some(Scalar::Text(_)), FeatureKind::Numeric) => false,
            (Some(Scalar::Float(x)), _) if !x.is_finite() => false,
            (Some(_), _) => true,
        };
        if !fits {
            return Err(setting(key("at_serving"), "must be a finite number for a numeric feature"));
        }
        if bag {
            return Err(setting(key("role"), "is presentation, which only categorical and numeric features can have"));
        }
    }
    Ok(Feature { path, rule, seed: seed_of(&settings.name), key: 0, settings: canonical })
}

/// Whether feature `i` can use the vectors of the feature `name`.
fn check_embedding(
    i: usize,
    name: &str,
    features: &[FeatureSettings],
    names: &BTreeMap<String, usize>,
    key: impl Fn(&str) -> String,
) -> Result<(), Error> {
    let refuse = |problem: String| Err(setting(key("embedding"), format!("names `{name}`, {problem}")));
    let Some(&of) = names.get(name) else {
        return refuse("which is no feature".to_owned());
    };
    if of == i {
        return refuse("which is the feature itself; leave it out".to_owned());
    }
    if let Some(other) = &features[of].embedding {
        return refuse(format!("which uses the vectors of `{other}`; name that one"));
    }
    for (which, feature) in [("the feature", &features[i]), ("the one it names", &features[of])] {
        if feature.kind == FeatureKind::Numeric {
            return refuse(format!("but {which} is numeric; both must be categorical, multi or sequence"));
        }
    }
    if features[i].tower == Tower::None {
        return refuse("but no tower sees the feature; set `tower`".to_owned());
    }
    Ok(())
}

fn check_cross(
    settings: &CrossSettings,
    names: &BTreeMap<String, usize>,
    features: &[Feature],
    key: impl Fn(&str) -> String,
) -> Result<Cross, Error> {
    if !(2..=3).contains(&settings.of.len()) {
        return Err(setting(key("of"), format!("names {} features; a cross has two or three", settings.of.len())));
    }
    let mut parts = Vec::with_capacity(3);
    for part in &settings.of {
        let Some(&index) = names.get(part) else {
            return Err(setting(key("of"), format!("names `{part}`, which no [[features]] entry is called")));
        };
        if features[index].settings.role == Some(Role::Presentation) {
            return Err(setting(
                key("of"),
                format!("names `{part}`, a presentation feature; those stay out of crosses"),
            ));
        }
        if parts.contains(&index) {
            return Err(setting(key("of"), format!("names `{part}` twice")));
        }
        parts.push(index);
    }
    let mut canonical = settings.clone();
    let name = canonical.name.get_or_insert_with(|| settings.of.join("*")).clone();
    check_name(&key("name"), &name)?;
    let max = *canonical.max.get_or_insert(64);
    if !(1..=4096).contains(&max) {
        return Err(setting(key("max"), format!("is {max}; it must be 1 to 4096")));
    }
    let plain = !parts.iter().any(|&part| matches!(features[part].rule, Rule::Bag { .. }));
    Ok(Cross { seed: seed_of(&name), name, parts, max: max as usize, plain, settings: canonical })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn features(toml: &str) -> (Vec<FeatureSettings>, Vec<CrossSettings>) {
        #[derive(Deserialize)]
        struct Both {
            #[serde(default)]
            features: Vec<FeatureSettings>,
            #[serde(default)]
            crosses: Vec<CrossSettings>,
        }
        let both: Both = toml::from_str(toml).unwrap();
        (both.features, both.crosses)
    }

    fn schema(toml: &str) -> Result<Schema, Error> {
        let (features, crosses) = features(toml);
        Schema::new(&features, &crosses)
    }

    const EXAMPLE: &str = r#"
        [[features]]
        name = "user_id"
        from = "user.id"
        tower = "user"
        [[features]]
        name = "category"
        [[features]]
        name = "position"
        role = "presentation"
        at_serving = "1"
        [[features]]
        name = "age"
        kind = "numeric"
        clip = [0, 100]
        [[crosses]]
        of = ["user_id", "category"]
    "#;

    #[test]
    fn the_design_s_example_is_a_schema() {
        let schema = schema(EXAMPLE).unwrap();
        assert_eq!((schema.features(), schema.len()), (4, 5));
        assert_eq!(schema.name(4), "user_id*category");
        assert_eq!(schema.index_of("age"), Some(3));
        assert!(schema.is_presentation(2) && !schema.is_presentation(0) && !schema.is_presentation(4));
        assert_eq!((schema.tower(0), schema.tower(4)), (Tower::User, Tower::None));
        let rows: std::collections::BTreeSet<u64> =
            (0..schema.len()).flat_map(|i| [schema.default_row(i), schema.missing_row(i)]).collect();
        assert_eq!(rows.len(), 2 * schema.len());
    }

    #[test]
    fn the_hash_is_the_same_for_ever() {
        let schema = schema(EXAMPLE).unwrap();
        assert_eq!(
            schema.to_json(),
            concat!(
                r#"{"encoding":2,"features":[{"name":"user_id","from":"user.id","kind":"categorical","tower":"user"},"#,
                r#"{"name":"category","from":"category","kind":"categorical","tower":"none"},"#,
                r#"{"name":"position","from":"position","kind":"categorical","tower":"none","role":"presentation","at_serving":"1"},"#,
                r#"{"name":"age","from":"age","kind":"numeric","tower":"none","clip":[0.0,100.0],"as":"bucket","per_octave":1}],"#,
                r#""crosses":[{"of":["user_id","category"],"name":"user_id*category","max":64}]}"#,
            )
        );
        assert_eq!(schema.hash(), "4497e9fc8ac2e793");
    }

    #[test]
    fn spelling_out_a_default_changes_no_hash_but_the_order_of_features_does() {
        let hash = |toml: &str| schema(toml).unwrap().hash();
        let plain = "[[features]]\nname = 'a'\n[[features]]\nname = 'b'\nkind = 'numeric'";
        let spelled = "[[features]]\nname = 'a'\nfrom = 'a'\nkind = 'categorical'\n[[features]]\nname = 'b'\nkind = 'numeric'\nas = 'bucket'";
        let turned = "[[features]]\nname = 'b'\nkind = 'numeric'\n[[features]]\nname = 'a'";
        assert_eq!(hash(plain), hash(spelled));
        assert_ne!(hash(plain), hash(turned));
    }

    #[test]
    fn mistakes_are_refused_with_their_key() {
        for (toml, expected) in [
            ("", "`features` is empty"),
            ("[[features]]\nname = ''", "`features[0].name` is empty"),
            ("[[features]]\nname = 'a'\n[[features]]\nname = 'a'", "`features[1].name` is `a`, which another"),
            ("[[features]]\nname = 'a..b'", "`features[0].from` is the path `a..b`, which has an empty key"),
            (
                "[[features]]\nname = 'a'\nfrom = 'b\\'",
                "`features[0].from` is the path `b\\`, which ends in a lone backslash",
            ),
            ("[[features]]\nname = 'a'\nscale = 2", "`features[0].scale` belongs to kind = \"numeric\""),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nbins = [1]", "`features[0].bins` belongs to a numeric as"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nas = 'bins'", "`features[0].bins` must be 1 to 4096"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nas = 'bins'\nbins = [1, 1]", "`features[0].bins` must be"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nclip = [1, 1]", "`features[0].clip` is [1, 1]"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nclip = [nan, 1]", "`features[0].clip` is [NaN, 1]"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nscale = 0", "`features[0].scale` is 0"),
            ("[[features]]\nname = 'a'\nkind = 'numeric'\nper_octave = 3", "`features[0].per_octave` is 3"),
            ("[[features]]\nname = 'a'\nkind = 'multi'\nmax_len = 0", "`features[0].max_len` is 0"),
            ("[[features]]\nname = 'a'\nat_serving = 1", "`features[0].at_serving` belongs to role"),
            ("[[features]]\nname = 'a'\nrole = 'presentation'", "`features[0].at_serving` is missing"),
            (
                "[[features]]\nname = 'a'\nkind = 'numeric'\nrole = 'presentation'\nat_serving = '1'",
                "`features[0].at_serving` must be a finite",
            ),
            (
                "[[features]]\nname = 'a'\nkind = 'multi'\nrole = 'presentation'\nat_serving = '1'",
                "`features[0].role` is presentation",
            ),
            ("[[features]]\nname = 'a'\nembedding = 'b'", "`features[0].embedding` names `b`, which is no feature"),
            (
                "[[features]]\nname = 'a'\nembedding = 'a'",
                "`features[0].embedding` names `a`, which is the feature itself",
            ),
            (
                "[[features]]\nname = 'a'\ntower = 'user'\nembedding = 'b'\n[[features]]\nname = 'b'\ntower = 'item'\nembedding = 'c'\n[[features]]\nname = 'c'",
                "`features[0].embedding` names `b`, which uses the vectors of `c`",
            ),
            (
                "[[features]]\nname = 'a'\ntower = 'user'\nembedding = 'b'\n[[features]]\nname = 'b'\nkind = 'numeric'",
                "`features[0].embedding` names `b`, but the one it names is numeric",
            ),
            (
                "[[features]]\nname = 'a'\ntower = 'user'\nkind = 'numeric'\nembedding = 'b'\n[[features]]\nname = 'b'",
                "`features[0].embedding` names `b`, but the feature is numeric",
            ),
            (
                "[[features]]\nname = 'a'\nembedding = 'b'\n[[features]]\nname = 'b'",
                "`features[0].embedding` names `b`, but no tower sees the feature",
            ),
            ("[[features]]\nname = 'a'\n[[crosses]]\nof = ['a']", "`crosses[0].of` names 1 features"),
            ("[[features]]\nname = 'a'\n[[crosses]]\nof = ['a', 'x']", "`crosses[0].of` names `x`"),
            ("[[features]]\nname = 'a'\n[[crosses]]\nof = ['a', 'a']", "`crosses[0].of` names `a` twice"),
            (
                "[[features]]\nname = 'a'\n[[features]]\nname = 'b'\n[[crosses]]\nof = ['a', 'b']\nmax = 0",
                "`crosses[0].max` is 0",
            ),
            (
                "[[features]]\nname = 'a'\n[[features]]\nname = 'b'\n[[crosses]]\nof = ['a', 'b']\nname = 'b'",
                "`crosses[0].name` is `b`",
            ),
            (
                "[[features]]\nname = 'a'\n[[features]]\nname = 'p'\nrole = 'presentation'\nat_serving = true\n[[crosses]]\nof = ['a', 'p']",
                "`crosses[0].of` names `p`, a presentation",
            ),
        ] {
            let message = schema(toml).unwrap_err().to_string();
            assert!(message.starts_with(expected), "{toml}\n{message}");
        }
    }

    #[test]
    fn a_shared_embedding_gives_one_value_one_vector_and_two_rows() {
        let plain = "[[features]]\nname = 'item'\ntower = 'item'\n[[features]]\nname = 'seen'\nkind = 'sequence'\ntower = 'user'";
        let apart = schema(plain).unwrap();
        let shared = schema(&format!("{plain}\nembedding = 'item'")).unwrap();
        assert_ne!(apart.hash(), shared.hash());
        assert!(!apart.to_json().contains("embedding"));
        assert_eq!(Schema::from_json(&shared.to_json()).unwrap(), shared);
        let vector = |i: usize, row: u64| row ^ shared.embedding_key(i);
        assert_eq!((shared.embedding_key(0), apart.embedding_key(1)), (0, 0));
        for text in [&b"712"[..], b"", &[0xFE], &[0xFF]] {
            let rows = [0, 1].map(|i| shared.features[i].row_of(text));
            assert_ne!(rows[0], rows[1]);
            assert_eq!(vector(0, rows[0]), vector(1, rows[1]));
            assert_eq!(rows[0], apart.features[0].row_of(text), "the one that is named is as it was");
        }
        assert_eq!(vector(1, shared.default_row(1)), shared.default_row(0));
        assert_eq!(vector(1, shared.missing_row(1)), shared.missing_row(0));
    }

    #[test]
    fn a_row_is_owned_by_its_feature_always_and_by_another_one_time_in_4096() {
        let text = "[[features]]\nname = 'item'\ntower = 'item'\n[[features]]\nname = 'seen'\ntower = 'user'\nembedding = 'item'\n\
            [[features]]\nname = 'age'\nkind = 'numeric'\n[[features]]\nname = 'user'\n[[crosses]]\nof = ['user', 'age']";
        let schema = schema(text).unwrap();
        let count = 200_000_u64;
        let mut others = vec![vec![0; schema.len()]; schema.len()];
        for (i, others) in others.iter_mut().enumerate() {
            let row = |n: u64| match schema.features.get(i) {
                Some(feature) => feature.row_of(&n.to_le_bytes()),
                None => row_of(&n.to_le_bytes(), schema.crosses[i - schema.features.len()].seed),
            };
            for row in (0..count).map(row).chain([schema.default_row(i), schema.missing_row(i)]) {
                assert!(schema.may_own(i, row));
                let vector = row ^ schema.embedding_key(i);
                assert_eq!(schema.may_use_vector(i, vector), schema.tower(i) != Tower::None);
                others.iter_mut().enumerate().for_each(|(other, n)| *n += u64::from(schema.may_own(other, row)));
            }
            for (other, &n) in others.iter().enumerate().filter(|&(other, _)| other != i) {
                // 48.8 expected.
                assert!((15..110).contains(&n), "{n} of {count} rows of {i} could be of {other}");
            }
        }
    }

    #[test]
    fn a_schema_of_another_encoding_is_refused() {
        let json = schema(EXAMPLE).unwrap().to_json().replace(r#""encoding":2"#, r#""encoding":1"#);
        assert!(matches!(Schema::from_json(&json), Err(Error::Version { found: 1, known: 2 })));
        assert!(matches!(Schema::from_json("{}"), Err(Error::Json(_))));
    }

    #[test]
    fn paths_are_read_and_written() {
        for text in ["a", "a.b.3", ".item", ".", "a\\.b.c", "a\\\\.b"] {
            assert_eq!(Path::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Path::parse("a\\.b.c").unwrap().parts, ["a.b", "c"]);
        assert!(Path::parse(".a").unwrap().of_element);
        assert!(Path::parse("").is_err() && Path::parse("a.").is_err() && Path::parse("..a").is_err());
    }

    proptest! {
        #[test]
        fn a_schema_survives_its_json(edges in prop::collection::btree_set(any::<i32>(), 1..20), divisor in 1e-300..1e300f64) {
            let mut edges: Vec<f64> = edges.into_iter().map(|edge| f64::from(edge) / divisor).collect();
            edges.dedup();
            let feature = FeatureSettings {
                name: "x".into(),
                kind: FeatureKind::Numeric,
                form: Some(Form::Bins),
                bins: Some(edges),
                scale: Some(divisor),
                ..FeatureSettings::default()
            };
            if let Ok(schema) = Schema::new(&[feature], &[]) {
                let again = Schema::from_json(&schema.to_json()).unwrap();
                prop_assert_eq!(again.hash(), schema.hash());
                prop_assert_eq!(again, schema);
            }
        }
    }
}
