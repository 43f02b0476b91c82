//! The whole configuration: gathers each room's settings, refuses unknown keys, and checks them once.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::event::Time;
use crate::feature::schema::{self, CrossSettings, FeatureSettings, Schema, Tower};
use crate::merge::{self, Bounds, StreamRules};
use crate::model::two_tower::{self, Side};
use crate::model::{self, logistic};
use crate::snapshot::gate;
use crate::source::decode::RecordSettings;
use crate::train::image::Branch;
use crate::train::progressive;
use crate::{join, snapshot, source};

/// Why a configuration cannot be used. Each message names the file or the key, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot read the config `{}`", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error("config `{}`", path.display())]
    Syntax { path: PathBuf, source: Box<toml::de::Error> },
    #[error("the config cannot be written as TOML")]
    Unwritable { source: Box<toml::ser::Error> },
    #[error("`--set {text}`: {reason}; write it as key.path=value with a TOML value, such as batch.examples=1024")]
    Override { text: String, reason: String },
    #[error("`{key}` {expected}, got {value}")]
    Setting { key: String, expected: String, value: String },
    #[error(transparent)]
    Feature(#[from] crate::feature::Error),
    #[error(transparent)]
    Source(#[from] crate::source::Error),
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    #[error(transparent)]
    Progressive(#[from] progressive::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
}

/// A duration, or `"never"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrNever(pub Option<Duration>);

impl Serialize for OrNever {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Some(duration) => humantime_serde::serialize(&duration, serializer),
            None => serializer.serialize_str("never"),
        }
    }
}

impl<'de> Deserialize<'de> for OrNever {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::IntoDeserializer;
        let text = String::deserialize(deserializer)?;
        if text == "never" {
            return Ok(Self(None));
        }
        let duration: Result<Duration, serde::de::value::Error> =
            humantime_serde::deserialize(text.as_str().into_deserializer());
        duration.map(|d| Self(Some(d))).map_err(|_| {
            serde::de::Error::custom(format!("expected a duration such as \"30s\", or \"never\", got \"{text}\""))
        })
    }
}

/// `[job]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobSettings {
    /// Names the training job in snapshots and logs. Default `"tidemill"`.
    pub name: String,
    /// Seed of every choice that is left to chance (down-sampling, admission, the weights that towers begin with). Default 0.
    pub seed: u64,
    /// Threads that decode records. Default 0: one per core, less the one that learns, at least one.
    pub decode_threads: usize,
    /// Threads that compute the towers of a two-tower model. Default 0: one per core. Does not show in the result.
    pub learn_threads: usize,
}

impl Default for JobSettings {
    fn default() -> Self {
        Self { name: "tidemill".into(), seed: 0, decode_threads: 0, learn_threads: 0 }
    }
}

/// `[impressions]` and `[clicks]`: a stream, its clocks, where it comes from and how its records are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StreamSettings {
    /// How much later than a younger record of its partition a record may come and still keep its event time as its
    /// place in the order. Longer: fewer late records, later training, more memory. Default 10s.
    #[serde(with = "humantime_serde", default = "ten_seconds")]
    pub max_out_of_order: Duration,
    /// How far past its log time a record may be stamped; further, it is rejected. Without a log time the clock at
    /// reading takes its place, and this may not exceed `max_out_of_order`. Default 10s.
    #[serde(with = "humantime_serde", default = "ten_seconds")]
    pub max_ahead: Duration,
    /// A followed partition that has been read to its end and was silent for this long is no longer waited for, or
    /// "never". Default 30s. Clicks as a whole are always waited for, see `clicks.quiet_after`.
    #[serde(default = "thirty_seconds")]
    pub idle_after: OrNever,
    /// A partition that lies further than this behind the others of its stream is no longer waited for, or "never".
    /// Default "never".
    #[serde(default = "never")]
    pub max_lag: OrNever,
    /// Only for clicks: after this much silence of all click partitions impressions are released without them, as
    /// negatives. "never": a dead click feed holds training. Default "never".
    #[serde(default = "never")]
    pub quiet_after: OrNever,
    pub source: source::Settings,
    #[serde(default)]
    pub record: RecordSettings,
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn thirty_seconds() -> OrNever {
    OrNever(Some(Duration::from_secs(30)))
}

fn never() -> OrNever {
    OrNever(None)
}

/// `[join]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JoinSettings {
    /// Attribution window: how long after its impression a click still counts. Longer: fewer false negatives, later
    /// labels, more clicks in memory. Both ends are inclusive. Default 30m.
    #[serde(with = "humantime_serde")]
    pub window: Duration,
    /// How far before its impression a click may be stamped by a client's clock. Default 0s.
    #[serde(with = "humantime_serde")]
    pub click_skew: Duration,
    /// An impression whose place in the order is further than this past its event time is not trained: its clicks may
    /// be gone. Default 10m.
    #[serde(with = "humantime_serde")]
    pub max_lateness: Duration,
    /// How long impression ids are remembered, to find duplicates and to sort late clicks. At least window + max_lateness
    /// + click_skew, which is also the default. For streams of labelled records "0s" looks for no duplicates.
    #[serde(with = "humantime_serde")]
    pub dedup_horizon: Option<Duration>,
}

impl Default for JoinSettings {
    fn default() -> Self {
        Self {
            window: Duration::from_secs(30 * 60),
            click_skew: Duration::ZERO,
            max_lateness: Duration::from_secs(10 * 60),
            dedup_horizon: None,
        }
    }
}

/// `[batch]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BatchSettings {
    /// Examples in a mini-batch: the unit of transaction, checkpoint and publication. Default 512.
    pub examples: usize,
    /// A batch also ends where event time crosses a multiple of this, or "never". Default 10s.
    pub period: OrNever,
}

impl Default for BatchSettings {
    fn default() -> Self {
        Self { examples: 512, period: OrNever(Some(Duration::from_secs(10))) }
    }
}

/// Which model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelKind {
    #[default]
    Logistic,
    TwoTower,
}

impl ModelKind {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Logistic => "logistic",
            Self::TwoTower => "two_tower",
        }
    }
}

/// `[model]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSettings {
    /// `"logistic"`, or `"two_tower"`: two towers beside the logistic part.
    pub kind: ModelKind,
    pub logistic: logistic::Settings,
    /// Only looked at under `two_tower`.
    pub two_tower: two_tower::Settings,
}

impl ModelSettings {
    /// What the model depends on, as JSON: the settings of its kind and no others.
    #[must_use]
    pub fn in_use(&self) -> String {
        #[derive(Serialize)]
        struct InUse<'a> {
            kind: ModelKind,
            logistic: &'a logistic::Settings,
            #[serde(skip_serializing_if = "Option::is_none")]
            two_tower: Option<&'a two_tower::Settings>,
        }
        let two_tower = (self.kind == ModelKind::TwoTower).then_some(&self.two_tower);
        let in_use = InUse { kind: self.kind, logistic: &self.logistic, two_tower };
        serde_json::to_string(&in_use).expect("settings are plain data")
    }

    fn check(&mut self, schema: &Schema, job: &JobSettings) -> Result<model::Checked, Error> {
        // Spelled out, so that checkpoints and manifests say what was used.
        self.logistic.a = Some(self.logistic.rate(schema.len()));
        let logistic = self.logistic.check(schema.len(), job.seed)?;
        let feature = |i| two_tower::Feature {
            side: match schema.tower(i) {
                Tower::User => Some(Side::User),
                Tower::Item => Some(Side::Item),
                Tower::None => None,
            },
            presentation: schema.is_presentation(i),
            key: schema.embedding_key(i),
        };
        let towers = match self.kind {
            ModelKind::Logistic => None,
            ModelKind::TwoTower if self.logistic.rule == logistic::Rule::Count => {
                return refuse("model.logistic.rule", "must be \"adagrad\" under kind = \"two_tower\"", "\"count\"");
            }
            ModelKind::TwoTower => {
                let features: Vec<two_tower::Feature> = (0..schema.len()).map(feature).collect();
                Some(self.two_tower.check(&features, job.seed)?)
            }
        };
        let default_rows = (0..schema.len()).map(|i| schema.default_row(i)).collect();
        let threads = match job.learn_threads {
            0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            threads => threads,
        };
        Ok(model::Checked { logistic, towers, default_rows, threads })
    }
}

/// `[sampling]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SamplingSettings {
    /// Share of negatives that are learned from, in (0, 1]. Predictions stay calibrated for the whole stream. Default 1.
    pub negatives: f64,
}

impl Default for SamplingSettings {
    fn default() -> Self {
        Self { negatives: 1.0 }
    }
}

/// `[checkpoint]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CheckpointSettings {
    /// Directory of the job's checkpoints; one job at a time may use it.
    pub dir: PathBuf,
    /// Wall time between checkpoints, taken at the next batch boundary. Default 1m.
    #[serde(with = "humantime_serde", default = "one_minute")]
    pub every: Duration,
    /// A checkpoint is also taken after so many batches; 0: by time only. Default 0.
    #[serde(default)]
    pub every_batches: u64,
}

fn one_minute() -> Duration {
    Duration::from_secs(60)
}

/// `[publish]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PublishSettings {
    /// Event time between snapshots: one is due at the batch boundary that passes a multiple of this. Default 1m.
    #[serde(with = "humantime_serde")]
    pub every: Duration,
    /// Least wall time between two snapshots; marks that come sooner are passed over. Default 5s.
    #[serde(with = "humantime_serde")]
    pub min_interval: Duration,
}

impl Default for PublishSettings {
    fn default() -> Self {
        Self { every: Duration::from_secs(60), min_interval: Duration::from_secs(5) }
    }
}

/// `[dead_letters]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterSettings {
    /// JSON-lines file that rejected records are appended to, with position and reason; at least once each.
    pub path: Option<PathBuf>,
    /// Kafka topic that they are written to instead: key and value as they were, position and reason in headers.
    pub topic: Option<String>,
}

/// `[telemetry]`
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TelemetrySettings {
    /// Address and port at which the running job shows its metrics and its state, and takes an operator's word, such as
    /// `"127.0.0.1:9464"`. Whoever reaches it can do that. Default: nowhere.
    pub listen: Option<std::net::SocketAddr>,
}

/// The configuration file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    #[serde(default)]
    pub job: JobSettings,
    pub impressions: StreamSettings,
    /// Left out for streams of labelled records (`impressions.record.label`).
    pub clicks: Option<StreamSettings>,
    #[serde(default)]
    pub join: JoinSettings,
    #[serde(default)]
    pub fuse: join::fuse::Settings,
    pub features: Vec<FeatureSettings>,
    #[serde(default)]
    pub crosses: Vec<CrossSettings>,
    #[serde(default)]
    pub batch: BatchSettings,
    #[serde(default)]
    pub model: ModelSettings,
    #[serde(default)]
    pub sampling: SamplingSettings,
    #[serde(default)]
    pub metrics: progressive::Settings,
    /// Left out: no checkpoints; the job starts anew each time.
    pub checkpoint: Option<CheckpointSettings>,
    /// Left out: nothing is published.
    pub snapshots: Option<snapshot::Settings>,
    #[serde(default)]
    pub gate: gate::Settings,
    #[serde(default)]
    pub publish: PublishSettings,
    /// Left out: rejected records are counted and logged, not kept.
    pub dead_letters: Option<DeadLetterSettings>,
    #[serde(default)]
    pub telemetry: TelemetrySettings,
    /// How Kafka is reached; needed where a source, or the dead letters, are in Kafka.
    pub kafka: Option<source::kafka::Cluster>,
}

/// A configuration that was found to fit together.
#[derive(Clone)]
pub struct Checked {
    pub config: Config,
    pub schema: Schema,
    pub merge: merge::Rules,
    pub join: join::Rules,
    pub model: model::Checked,
    /// None: every version that is well formed is named.
    pub gate: Option<gate::Rules>,
    /// Every setting that decides the order or the bytes, by key: a checkpoint is only resumed under equal ones.
    pub binding: BTreeMap<String, String>,
    /// Of a lineage that a retrain began: it comes from the command, or from the checkpoint, never from the file.
    pub branch: Option<Branch>,
}

fn ms(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

fn refuse<T>(key: impl Into<String>, expected: impl Into<String>, value: impl std::fmt::Display) -> Result<T, Error> {
    Err(Error::Setting { key: key.into(), expected: expected.into(), value: value.to_string() })
}

/// Reads a TOML file and lays `key.path=value` settings over it.
pub fn read<T: serde::de::DeserializeOwned>(path: &Path, overrides: &[String]) -> Result<T, Error> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::Unreadable { path: path.to_owned(), source })?;
    let syntax = |source| Error::Syntax { path: path.to_owned(), source: Box::new(source) };
    if overrides.is_empty() {
        return toml::from_str(&text).map_err(syntax); // keeps line numbers in messages
    }
    let mut table: toml::Table = toml::from_str(&text).map_err(syntax)?;
    for text in overrides {
        set(&mut table, text).map_err(|reason| Error::Override { text: text.clone(), reason })?;
    }
    table.try_into().map_err(syntax)
}

impl Config {
    /// Reads the file of a training job, see [`read`].
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, Error> {
        read(path, overrides)
    }

    /// Reads topics, which can be entered anywhere, from where everything is known that an impression at `from` needs: seen ids, and
    /// clicks that came before their impression. Where a start is set, it stays.
    pub fn start_before(&mut self, from: Time) {
        let join = &self.join;
        let least = join.window + join.max_lateness + join.click_skew;
        let reach = join.dedup_horizon.unwrap_or(least).max(least) + join.max_lateness;
        for stream in std::iter::once(&mut self.impressions).chain(self.clicks.as_mut()) {
            let reach = reach + stream.max_out_of_order + stream.max_ahead;
            if stream.source.kind == source::Kind::Kafka && stream.source.start.is_none() {
                let at = Time(from.0.saturating_sub(reach.as_millis() as i64));
                stream.source.start = Some(source::StartSetting::Word(at.to_string()));
            }
        }
    }

    /// The file that gives these settings.
    pub fn to_toml(&self) -> Result<String, Error> {
        toml::to_string(self).map_err(|source| Error::Unwritable { source: Box::new(source) })
    }

    /// The configuration, as TOML, of a job that learns from the examples of this one, which lie in Parquet files at `path`
    /// with a column `columns[i]` for feature i. It writes nothing anywhere until it is told to.
    pub fn over_examples(mut self, path: String, columns: &[String]) -> Result<String, Error> {
        (self.clicks, self.kafka, self.checkpoint, self.snapshots, self.dead_letters) = (None, None, None, None, None);
        self.telemetry = TelemetrySettings::default();
        let stream = &mut self.impressions;
        stream.source = source::Settings { paths: vec![path], ..source::Settings::default() };
        stream.max_ahead = stream.max_ahead.min(stream.max_out_of_order);
        stream.record = RecordSettings {
            time: "time".into(),
            label: Some("label".into()),
            weight: Some("weight".into()),
            ..RecordSettings::default()
        };
        for (feature, column) in self.features.iter_mut().zip(columns) {
            feature.from = Some(schema::Path { of_element: false, parts: vec![column.clone()] }.to_string());
        }
        self.to_toml()
    }

    /// Checks everything that can be checked without touching a file or a store.
    pub fn check(mut self, until: Option<Time>) -> Result<Checked, Error> {
        if let Some(cluster) = &self.kafka {
            cluster.check().map_err(source::Error::from)?;
        }
        let schema = Schema::new(&self.features, &self.crosses)?;
        let model = self.model.check(&schema, &self.job)?;
        let labelled = self.impressions.record.label.is_some();
        if self.clicks.is_none() && !labelled {
            return refuse(
                "clicks",
                "must be given, unless `impressions.record.label` says where records carry their label",
                "nothing",
            );
        }
        if self.clicks.is_some() && labelled {
            return refuse(
                "impressions.record.label",
                "must not be given beside [clicks]: labels come from one place",
                "both",
            );
        }
        let mut streams = vec![("impressions", &self.impressions)];
        streams.extend(self.clicks.as_ref().map(|clicks| ("clicks", clicks)));
        for (name, stream) in &streams {
            stream.source.check(&format!("{name}.source"))?;
            if stream.source.kind == source::Kind::Kafka && self.kafka.is_none() {
                return refuse("kafka", format!("must be given, for {name}.source.kind is \"kafka\""), "nothing");
            }
            let longest = stream.max_out_of_order;
            let timed = stream.record.log_time.is_some() || stream.source.has_log_time();
            if !timed && stream.max_ahead > longest {
                return refuse(
                    format!("{name}.max_ahead"),
                    format!("must be at most {name}.max_out_of_order ({longest:?}) where records carry no log time"),
                    format!("{:?}", stream.max_ahead),
                );
            }
        }
        if let Some(shard) = self.clicks.as_ref().and_then(|clicks| clicks.source.shard.as_ref())
            && self.impressions.source.shard.as_ref() != Some(shard)
        {
            let ours = self.impressions.source.shard.as_ref().map_or("nothing".into(), |ours| format!("\"{ours}\""));
            let expected =
                format!("must be left out (every shard reads all clicks) or that of the impressions ({ours})");
            return refuse("clicks.source.shard", expected, format!("\"{shard}\""));
        }
        if self.impressions.quiet_after.0.is_some() {
            return refuse("impressions.quiet_after", "is a setting of [clicks] only", "a duration");
        }
        if let Some(letters) = &self.dead_letters {
            match (&letters.path, &letters.topic) {
                (Some(_), None) => {}
                (None, Some(_)) if self.kafka.is_some() => {}
                (None, Some(_)) => {
                    return refuse("kafka", "must be given, for dead_letters.topic is", "nothing");
                }
                (path, _) => {
                    let value = if path.is_some() { "both" } else { "neither" };
                    return refuse("dead_letters", "must have either `path` or `topic`", value);
                }
            }
        }
        if self.batch.examples == 0 || self.batch.examples > 1 << 20 {
            return refuse("batch.examples", "must be 1 to 1048576", self.batch.examples);
        }
        if self.batch.period.0.is_some_and(|period| period < Duration::from_millis(1)) {
            return refuse("batch.period", "must be at least 1ms, or \"never\"", "less");
        }
        if !(self.sampling.negatives > 0.0 && self.sampling.negatives <= 1.0) {
            return refuse("sampling.negatives", "must be in (0, 1]", self.sampling.negatives);
        }
        if self.fuse.ctr_clicks == 0 {
            return refuse("fuse.ctr_clicks", "must be at least 1", 0);
        }
        if let Some([low, high]) = self.fuse.ctr_band.0
            && !((0.0..1.0).contains(&low) && low > 0.0 && high > 1.0 && high.is_finite())
        {
            let expected = "must be a multiple above 0 and below 1, and one above 1, or \"never\"";
            return refuse("fuse.ctr_band", expected, format!("[{low:?}, {high:?}]"));
        }
        if self.publish.every < Duration::from_millis(1) {
            return refuse("publish.every", "must be at least 1ms", format!("{:?}", self.publish.every));
        }
        let least = self.join.window + self.join.max_lateness + self.join.click_skew;
        let horizon = match self.join.dedup_horizon {
            Some(horizon) if labelled => horizon,
            None => least,
            Some(horizon) if horizon >= least => horizon,
            Some(horizon) => {
                return refuse(
                    "join.dedup_horizon",
                    format!("must be at least window + max_lateness + click_skew ({least:?})"),
                    format!("{horizon:?}"),
                );
            }
        };
        let join = join::Rules {
            window: if labelled { 0 } else { ms(self.join.window) },
            click_skew: ms(self.join.click_skew),
            max_lateness: ms(self.join.max_lateness),
            dedup_horizon: ms(horizon),
        };
        let rules = |stream: &StreamSettings| StreamRules {
            bounds: Bounds { out_of_order: ms(stream.max_out_of_order), ahead: ms(stream.max_ahead) },
            idle_after: stream.idle_after.0.map(ms),
            max_lag: stream.max_lag.0.map(ms),
        };
        let merge = merge::Rules {
            impressions: rules(&self.impressions),
            clicks: rules(self.clicks.as_ref().unwrap_or(&self.impressions)),
            window: join.window,
            until,
            quiet_after: self.clicks.as_ref().and_then(|clicks| clicks.quiet_after.0).map(ms),
            expected: self.fuse.expected,
        };
        let mut gate = Some(self.gate.check()?).filter(|rules| rules.examples() > 0);
        if self.model.logistic.rule == logistic::Rule::Count {
            // It says nothing of an example that could be compared.
            gate = None;
        }
        let mut checked =
            Checked { schema, merge, join, model, gate, binding: BTreeMap::new(), branch: None, config: self };
        checked.binding = checked.bindings();
        Ok(checked)
    }
}

impl Checked {
    fn bindings(&self) -> BTreeMap<String, String> {
        fn json(value: &impl Serialize) -> String {
            serde_json::to_string(value).expect("settings are plain data")
        }
        let config = &self.config;
        let mut binding = BTreeMap::new();
        let mut streams = vec![("impressions", &config.impressions)];
        streams.extend(config.clicks.as_ref().map(|clicks| ("clicks", clicks)));
        for (name, stream) in streams {
            binding.insert(format!("{name}.max_out_of_order"), format!("{:?}", stream.max_out_of_order));
            binding.insert(format!("{name}.max_ahead"), format!("{:?}", stream.max_ahead));
            binding.insert(format!("{name}.record"), json(&stream.record));
            if stream.source.kind == source::Kind::Kafka {
                binding.insert(format!("{name}.source.log_time"), json(&stream.source.log_time.unwrap_or_default()));
            }
        }
        binding.insert("clicks".into(), if config.clicks.is_some() { "a stream" } else { "none" }.into());
        binding.insert("join.window".into(), format!("{}ms", self.join.window));
        binding.insert("join.click_skew".into(), format!("{}ms", self.join.click_skew));
        binding.insert("join.max_lateness".into(), format!("{}ms", self.join.max_lateness));
        binding.insert("join.dedup_horizon".into(), format!("{}ms", self.join.dedup_horizon));
        binding.insert("batch.examples".into(), config.batch.examples.to_string());
        binding.insert("batch.period".into(), json(&config.batch.period));
        binding.insert("sampling.negatives".into(), config.sampling.negatives.to_string());
        binding.insert("job.seed".into(), config.job.seed.to_string());
        binding.insert("metrics.window".into(), format!("{:?}", config.metrics.window));
        // Where towers are computed decides no more than last bits.
        let mut model = config.model.clone();
        model.two_tower.device = two_tower::Settings::default().device;
        binding.insert("model".into(), model.in_use());
        binding.insert("features".into(), self.schema.hash());
        binding
    }

    /// Names the line of training: jobs of one name under equal binding settings.
    #[must_use]
    pub fn lineage(&self) -> String {
        let (name, binding) = (&self.config.job.name, &self.binding);
        let text = match &self.branch {
            None => serde_json::to_string(&(name, binding)),
            Some(branch) => serde_json::to_string(&(name, binding, branch)),
        };
        let text = text.expect("settings are plain data");
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }

    /// Where towers are computed, if there are any and it is not the CPU.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        let towers = self.model.towers.as_ref()?;
        (towers.settings.device != "cpu").then_some(&towers.settings.device)
    }

    /// The version, the machine's kind, and the device of the towers where that is not the CPU: all that weights' last bits
    /// may depend on.
    #[must_use]
    pub fn build(&self) -> String {
        let snapshot::manifest::Build { crate_version, target } = snapshot::manifest::Build::this();
        let device = self.device().map_or(String::new(), |device| format!(", towers on {device}"));
        format!("{crate_version} {target}{device}")
    }

    #[must_use]
    pub fn decode_threads(&self) -> usize {
        match self.config.job.decode_threads {
            0 => std::thread::available_parallelism().map_or(1, |cores| cores.get().saturating_sub(1).max(1)),
            threads => threads,
        }
    }
}

/// Lays one `key.path=value` over a table. A value that is no TOML value is taken as a string.
fn set(table: &mut toml::Table, text: &str) -> Result<(), String> {
    let (path, value) = text.split_once('=').ok_or("it has no `=`")?;
    let value = value.trim();
    let parsed: Result<toml::Table, _> = toml::from_str(&format!("value = {value}"));
    let value = match parsed {
        Ok(mut parsed) => parsed.remove("value").ok_or("its value is empty")?,
        Err(_) => toml::Value::String(value.to_owned()),
    };
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|key| !key.is_empty()).ok_or("its key is empty")?;
    let mut at = table;
    for key in keys {
        let next = at.entry(key).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(|| format!("`{key}` is not a table"))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}
