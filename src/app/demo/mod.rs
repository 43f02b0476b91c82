//! The whole loop in one process: a log that is being written (files, or topics of a real Kafka), the real training job on
//! it, the real serving node behind its HTTP server, and requests all the time. Nothing here is a stand-in; only the
//! durations are short.

mod feed;
mod learning;
mod sender;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::app::topics::{self, Topics};
use crate::app::train::{self, Options as TrainOptions, Progress, Summary, Tick, Until};
use crate::clock;
use crate::config::{self, Checked, Config, ModelKind};
use crate::event::{Stream, Time};
use crate::serve::http::{self, Server};
use crate::serve::{self, Model, Node, Scorer};
use crate::snapshot::{self, Store, Version, chain};
use crate::source::kafka::{self, Cluster, OwnTopics};
use crate::source::{self, Kind, file};
use feed::{Ledger, Live, Log, Replay};
pub use learning::Figures;
use learning::Learning;
use sender::{Sender, bodies, quantiles};

/// The training config of the demo; the quoted paths that begin with `demo/` are put into its directory.
pub const CONFIG: &str = include_str!("../../../configs/demo.toml");

/// What to show.
#[derive(Clone, Debug)]
pub struct Options {
    /// How long it is live.
    pub length: Duration,
    /// An empty directory; all that is written goes there.
    pub dir: PathBuf,
    pub input: Input,
    /// The log is in Kafka, at these brokers (`host:port`, several separated by commas), rather than in files.
    pub kafka: Option<String>,
    /// Where snapshots go, a prefix without versions; none: a directory of `dir`.
    pub store: Option<String>,
    /// Requests a second, and candidates in each.
    pub requests: f64,
    pub candidates: usize,
}

/// Where impressions and clicks come from.
#[derive(Clone, Debug)]
pub enum Input {
    /// A generated stream of so many impressions a second, that began so long ago: what has happened by the start is
    /// written at once. A model of this kind learns it.
    Generated { rate: f64, history: Duration, seed: u64, model: ModelKind },
    /// The files `impressions*` and `clicks*` of a directory, at so many times their speed; none: all within the demo.
    Files { data: PathBuf, config: Box<Config>, speed: Option<f64> },
}

/// Why a demo cannot start or go on. A promise that broke is no error, see [`Report::promises`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Generate(#[from] crate::generate::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Mapping(#[from] source::decode::Error),
    #[error(transparent)]
    Topics(#[from] topics::Error),
    #[error(transparent)]
    Kafka(#[from] kafka::Error),
    #[error("the training job: {0}")]
    Train(#[from] train::Error),
    #[error(transparent)]
    Serve(#[from] serve::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error("`{}`", path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("`{}` holds no {what}", dir.display())]
    NoData { dir: PathBuf, what: &'static str },
    #[error("`{}` holds `{line}`, which is no prediction", path.display())]
    Prediction { path: PathBuf, line: String },
    #[error("`impressions.record.explode` is set; the demo replays logs of one impression a line")]
    Slates,
    #[error("`--store {url}` holds {count} version(s) already; give a prefix of the demo's own")]
    StoreTaken { url: String, count: usize },
    #[error("cannot start a thread: {0}")]
    Thread(#[source] std::io::Error),
    #[error("the thread `{0}` panicked; this is a bug of tidemill")]
    Panicked(&'static str),
}

/// What goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Live,
    /// The log has ended; the trainer writes its last checkpoint and snapshot.
    Stopping,
    /// Every version that answered is loaded again, and answers are compared.
    Verifying,
    Done,
}

/// All that there is to see at a moment.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    #[serde(skip)]
    pub phase: Phase,
    #[serde(skip)]
    pub left: Duration,
    /// Seconds since it went live.
    pub seconds: f64,
    pub dir: PathBuf,
    /// Where the node listens.
    pub url: String,
    /// Or else replayed.
    pub generated: bool,
    /// The kind of model, as `model.kind` has it.
    pub model: &'static str,
    /// None: the log is files.
    pub kafka: Option<InKafka>,
    /// How many times faster than the clock event time runs; 1 for the generated stream.
    pub speed: f64,
    pub impressions_written: u64,
    pub clicks_written: u64,
    pub history_written: u64,
    pub duplicates_written: u64,
    pub orphans_written: u64,
    pub garbage_written: u64,
    pub bytes_written: u64,
    /// A second, over the last seconds.
    pub impressions_rate: f64,
    pub clicks_rate: f64,
    pub trained: u64,
    pub trained_rate: f64,
    /// Impressions written and not released yet: their window is open.
    pub waiting: u64,
    /// From the event time to which the log is written back to that of the last impression learned from, seconds.
    pub frontier_age: Option<f64>,
    /// About the last 20,000 impressions.
    pub recent: Option<Figures>,
    /// See [`Figures::closed`], by thousand impressions.
    #[serde(skip)]
    pub curve: Vec<f64>,
    pub version_published: Option<u64>,
    pub version_served: Option<u64>,
    /// Since the version that serves was published, seconds.
    pub version_age: Option<f64>,
    pub swaps: u64,
    pub refusals: u64,
    /// From a click to the moment when weights that have learned from it served, p50 and p99, seconds.
    pub click_to_served: Option<(f64, f64)>,
    pub clicks_served: u64,
    pub requests_answered: u64,
    pub requests_failed: u64,
    /// Answered "no model yet", before there was one.
    pub requests_before_first: u64,
    pub requests_rate: f64,
    /// Of the last answers, from when each request was due, milliseconds.
    pub latency_p50_ms: Option<f64>,
    pub latency_p99_ms: Option<f64>,
}

/// Where the log is in Kafka.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InKafka {
    pub brokers: String,
    /// The topics, which are the demo's own: of impressions and, where there are some, of clicks.
    pub topics: Vec<String>,
}

impl InKafka {
    /// The topics, with what their names have in common only once.
    #[must_use]
    pub fn short(&self) -> String {
        let rest = |topic: &String| topic.rsplit('-').next().unwrap_or_default().to_owned();
        let first = self.topics.first().cloned().unwrap_or_default();
        self.topics.iter().skip(1).fold(first, |text, topic| format!("{text}, …{}", rest(topic)))
    }
}

/// Something that must hold.
#[derive(Clone, Debug, Serialize)]
pub struct Promise {
    pub name: &'static str,
    /// None where there was too little to judge it by.
    pub kept: Option<bool>,
    /// In words and numbers.
    pub found: String,
}

/// How it ended.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub ok: bool,
    pub promises: Vec<Promise>,
    pub last: View,
    /// About the last third of all examples.
    pub last_third: Option<Figures>,
    /// About all examples.
    pub all: Option<Figures>,
    pub versions_answered: usize,
    pub answers_compared: u64,
    /// Of all answers.
    pub latency_p50_ms: Option<f64>,
    pub latency_p99_ms: Option<f64>,
    /// Why topics that the demo made are still there; none if they are gone, or were never made.
    pub topics_left: Option<String>,
    pub training: Summary,
}

/// How much of the way from the best constant to the best reachable logloss the last third of a generated run must have
/// behind it, by the number of examples; fewer than the first say nothing. Measured with seeds 1 to 4: 0.70 to 0.75 in 60 s
/// (131,000 examples), 0.56 to 0.64 in 15 s at 1,500 impressions a second (29,000 examples).
pub const MUST_CLOSE: [(u64, f64); 2] = [(10_000, 0.4), (80_000, 0.6)];
/// Versions that must have been swapped in.
pub const SWAPS: u64 = 3;
/// On real files no best is known: the last third must not be worse than the best constant in hindsight by more.
pub const SLACK: f64 = 0.001;
/// Fewer clicks than these say nothing about a difference that small.
pub const CLICKS: u64 = 500;

/// Runs it, showing what happens about ten times a second. `stop` ends the live part early. `metrics` writes what
/// `/metrics` shows.
pub fn run(
    options: &Options,
    stop: &AtomicBool,
    metrics: impl Fn() -> String + Send + Sync + 'static,
    show: &mut dyn FnMut(&View),
) -> Result<Report, Error> {
    let dir = &options.dir;
    let began = clock::now();
    let ledger = Arc::new(Ledger::default());
    // What follows is dropped, and so stopped, in the opposite order.
    options.check_store()?;
    let topics = own_topics(options, began)?;
    let Parts { checked, source, log, sample, speed } = prepare(options, topics.as_ref(), began)?;
    let generated = matches!(source, Source::Live(_));
    let settings = serve::Settings {
        store: options.snapshots(),
        poll: Duration::from_millis(200),
        http: http::Settings { listen: "127.0.0.1:0".into(), grace: Duration::from_secs(5), ..Default::default() },
        ..Default::default()
    };
    let node = Arc::new(Node::open(&settings)?);
    let server = Server::start(Arc::clone(&node), &settings.http, metrics)?;
    let requests = bodies(&sample, &checked.config, options.candidates, 1000);
    if let Some(first) = requests.first() {
        write(&dir.join("request.json"), &first.text)?;
    }
    let predictions = dir.join("predictions.csv");
    let mut demo = Demo {
        options,
        ledger: Arc::clone(&ledger),
        learning: Learning::new(predictions.clone(), generated),
        tick: Arc::default(),
        node,
        sender: Arc::new(Sender::new(server.address(), requests, options.requests)),
        url: format!("http://{}", server.address()),
        kafka: options
            .kafka
            .clone()
            .zip(topics.as_ref())
            .map(|(brokers, topics)| InKafka { brokers, topics: topics.names().to_vec() }),
        model: checked.config.model.kind,
        speed,
        began: Instant::now(),
        served: None,
        delays: Vec::new(),
        samples: VecDeque::new(),
        recent: None,
        curve: Vec::new(),
        measured: None,
    };

    let writing = Guarded::start("feed", {
        let ledger = Arc::clone(&ledger);
        move |stop| match source {
            Source::Live(live) => live.run(log, &ledger, stop),
            Source::Replay(replay) => replay.run(log, &ledger, stop),
        }
    })?;
    let training = Guarded::start("train", {
        let (progress, predictions) = (Arc::clone(&demo.tick), Some(predictions));
        move |stop| {
            let options = TrainOptions { predictions, ..TrainOptions::until(Until::Stopped) };
            train::run(&checked, &options, stop, &mut Ticks(progress))
        }
    })?;
    let senders = (0..sender::CONNECTIONS).map(|_| {
        let sender = Arc::clone(&demo.sender);
        Guarded::start("sender", move |stop| sender.run(stop))
    });
    let senders = senders.collect::<Result<Vec<_>, _>>()?;

    while demo.began.elapsed() < options.length && !stop.load(Ordering::Relaxed) {
        if writing.is_finished() || training.is_finished() {
            break; // the data is over, or an error that comes up below
        }
        show(&demo.view(Phase::Live)?);
        thread::sleep(Duration::from_millis(100));
    }

    writing.stop();
    writing.join()??;
    training.stop();
    while !training.is_finished() {
        show(&demo.view(Phase::Stopping)?);
        thread::sleep(Duration::from_millis(100));
    }
    let summary = training.join()??;
    // Its last version is still to be served.
    let patience = Instant::now();
    let last = |demo: &Demo<'_>| demo.node.status().version.map(|version| version.0) < summary.snapshot_version;
    while last(&demo) && patience.elapsed() < Duration::from_secs(10) {
        show(&demo.view(Phase::Stopping)?);
        thread::sleep(Duration::from_millis(100));
    }
    thread::sleep(Duration::from_millis(300)); // some answers with it
    senders.iter().for_each(Guarded::stop);
    for sender in senders {
        sender.join()?;
    }
    demo.measured = None;
    let view = demo.view(Phase::Verifying)?;
    show(&view);
    let cut = server.drain();
    let verified = verify(&Store::open(&options.snapshots())?, &demo.sender)?;
    let topics_left = topics.and_then(|topics| topics.delete().err()).map(|error| chain(&error));
    let view = View { phase: Phase::Done, ..view };
    show(&view);
    Ok(Report { topics_left, ..report(&demo, view, summary, cut, verified) })
}

/// What a run is made of.
struct Parts {
    checked: Checked,
    source: Source,
    log: Log,
    /// Impressions to make requests of.
    sample: Vec<Vec<u8>>,
    speed: f64,
}

enum Source {
    Live(Box<Live>),
    Replay(Box<Replay>),
}

/// Lines that requests are made of.
const SAMPLE: usize = 5000;
/// Partitions of each topic.
const PARTITIONS: u32 = 4;

impl Options {
    fn streams(&self) -> &'static [Stream] {
        match &self.input {
            Input::Files { config, .. } if config.clicks.is_none() => &[Stream::Impressions],
            _ => &[Stream::Impressions, Stream::Clicks],
        }
    }

    /// Address of the store of snapshots.
    fn snapshots(&self) -> String {
        self.store.clone().unwrap_or_else(|| text(&self.dir.join("snapshots")))
    }

    /// Refuses a store with versions: they would be served before the demo's own, and take part in its promises.
    fn check_store(&self) -> Result<(), Error> {
        let Some(url) = &self.store else { return Ok(()) };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
        let store = Store::create(url)?;
        match runtime.block_on(store.versions())?.len() {
            0 => Ok(()),
            count => Err(Error::StoreTaken { url: url.clone(), count }),
        }
    }

    /// How Kafka is reached: with the properties that the config has for it, if there is one.
    fn cluster(&self) -> Option<Cluster> {
        let brokers = self.kafka.clone()?;
        let given = match &self.input {
            Input::Files { config, .. } => config.kafka.as_ref(),
            Input::Generated { .. } => None,
        };
        let properties = given.map(|given| given.properties.clone()).unwrap_or_default();
        Some(Cluster { brokers, group: None, refresh: Duration::from_secs(1), properties })
    }
}

/// Makes the topics of this demo, if it is on Kafka.
fn own_topics(options: &Options, began: Time) -> Result<Option<OwnTopics>, Error> {
    let Some(cluster) = options.cluster() else { return Ok(None) };
    let name = |stream: &Stream| format!("tidemill-demo-{}-{}-{}", began.0 / 1000, std::process::id(), stream.name());
    let names: Vec<String> = options.streams().iter().map(name).collect();
    let topics = OwnTopics::create(&cluster, &names, PARTITIONS)?;
    tracing::info!(brokers = cluster.brokers, topics = names.join(", "), "made topics; they are deleted at the end");
    Ok(Some(topics))
}

/// The config of the demo for a model of this kind, with its files in `dir`, or with these topics in their place.
fn own_config(dir: &Path, model: ModelKind, kafka: Option<(&Cluster, &OwnTopics)>) -> String {
    let quoted = |text: &str| serde_json::to_string(text).expect("a string");
    let kind = |kind: ModelKind| format!("[model]\n# What --model says.\nkind = {}\n", quoted(kind.name()));
    debug_assert!(CONFIG.contains(&kind(ModelKind::Logistic)), "configs/demo.toml has another model");
    let mut config = CONFIG.replace(&kind(ModelKind::Logistic), &kind(model));
    if let Some((cluster, topics)) = kafka {
        for (stream, topic) in [Stream::Impressions, Stream::Clicks].iter().zip(topics.names()) {
            let (name, topic) = (stream.name(), quoted(topic));
            let files = format!("kind = \"file\"\npaths = [\"demo/{name}-*.jsonl\"]\npoll = \"50ms\"\n");
            debug_assert!(config.contains(&files), "configs/demo.toml has another source");
            config = config.replace(&files, &format!("kind = \"kafka\"\ntopics = [{topic}]\n"));
        }
        config += &format!("\n[kafka]\nbrokers = {}\n", quoted(&cluster.brokers));
    }
    let here = format!("{}/", quoted(&text(dir)).trim_end_matches('"'));
    config.replace("\"demo/", &here)
}

fn prepare(options: &Options, topics: Option<&OwnTopics>, began: Time) -> Result<Parts, Error> {
    let dir = &options.dir;
    let cluster = options.cluster();
    let (config, source, sample, speed) = match &options.input {
        Input::Generated { rate, history, seed, model } => {
            let path = dir.join("demo.toml");
            let mut config = own_config(dir, *model, cluster.as_ref().zip(topics));
            if let Some(store) = &options.store {
                let quoted = |text: &str| serde_json::to_string(text).expect("a string");
                let ours = quoted(&text(&dir.join("snapshots")));
                debug_assert!(config.contains(&ours), "configs/demo.toml has another store");
                config = config.replace(&ours, &quoted(store));
            }
            write(&path, config.as_bytes())?;
            let settings = feed::settings(*seed, began, *rate, *history, options.length);
            let impressions = crate::generate::Generator::new(settings.clone())?
                .filter(|event| matches!(event.what, crate::generate::What::Impression { .. }));
            let line = |event: crate::generate::Event| {
                let mut line = Vec::new();
                event.write_line(&mut line);
                line
            };
            let sample = impressions.take(SAMPLE).map(line).collect();
            let live = Live::new(settings, began)?;
            (Config::load(&path, &[])?, Source::Live(Box::new(live)), sample, 1.0)
        }
        Input::Files { data, config, speed } => {
            if config.impressions.record.explode.is_some() {
                return Err(Error::Slates);
            }
            let mut config = (**config).clone();
            let replay = Replay::new(data, &config, *speed, options.length)?;
            let first = &feed::files(data, Stream::Impressions)?[0];
            let sample = file::first_records(first, SAMPLE, config.impressions.source.max_record)?;
            let of = |stream: Stream, given: &source::Settings| {
                let common =
                    source::Settings { max_record: given.max_record, queue: given.queue, ..Default::default() };
                let topic = topics.map(|topics| topics.names()[stream as usize].clone());
                match topic {
                    Some(topic) => source::Settings { kind: Kind::Kafka, topics: Some(vec![topic]), ..common },
                    None => source::Settings {
                        paths: vec![text(&dir.join(format!("{}*", stream.name())))],
                        poll: Duration::from_millis(50),
                        ..common
                    },
                }
            };
            config.impressions.source = of(Stream::Impressions, &config.impressions.source);
            if let Some(clicks) = &mut config.clicks {
                clicks.source = of(Stream::Clicks, &clicks.source);
            }
            config.kafka = cluster;
            config.checkpoint = Some(config::CheckpointSettings {
                dir: dir.join("checkpoints"),
                every: Duration::from_secs(10),
                every_batches: 0,
            });
            config.snapshots = Some(snapshot::Settings { store: options.snapshots(), ..Default::default() });
            config.dead_letters =
                Some(config::DeadLetterSettings { path: Some(dir.join("dead-letters.jsonl")), topic: None });
            // As often by the clock as on the generated stream.
            let every = Duration::from_secs_f64(2.0 * replay.speed).max(Duration::from_millis(1));
            config.publish = config::PublishSettings { every, min_interval: Duration::from_secs(1) };
            let (speed, sample) = (replay.speed, sample.into_iter().map(|(_, line)| line).collect());
            (config, Source::Replay(Box::new(replay)), sample, speed)
        }
    };
    let checked = config.check(None)?;
    let log = match (topics, &source) {
        (Some(_), _) => Log::Kafka(Box::new(Topics::open(&checked, options.streams(), "demo")?)),
        (None, Source::Live(live)) => Log::files(dir, live.names())?,
        (None, Source::Replay(replay)) => Log::files(dir, replay.names())?,
    };
    Ok(Parts { checked, source, log, sample, speed })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    std::fs::write(path, bytes).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// A thread that is told to stop, and waited for, however its owner ends.
struct Guarded<T> {
    name: &'static str,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<T>>,
}

impl<T: Send + 'static> Guarded<T> {
    fn start(name: &'static str, body: impl FnOnce(&AtomicBool) -> T + Send + 'static) -> Result<Self, Error> {
        let stop = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&stop);
        let thread = thread::Builder::new().name(name.into()).spawn(move || body(&flag)).map_err(Error::Thread)?;
        Ok(Self { name, stop, thread: Some(thread) })
    }

    fn join(mut self) -> Result<T, Error> {
        let thread = self.thread.take().expect("joined once");
        thread.join().map_err(|_| Error::Panicked(self.name))
    }
}

impl<T> Guarded<T> {
    fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(thread::JoinHandle::is_finished)
    }

    fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Keeps the trainer's last word.
struct Ticks(Arc<Mutex<Option<Tick>>>);

impl Progress for Ticks {
    fn show(&mut self, line: &Tick) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(*line);
    }
}

struct Demo<'a> {
    options: &'a Options,
    ledger: Arc<Ledger>,
    learning: Learning,
    tick: Arc<Mutex<Option<Tick>>>,
    node: Arc<Node>,
    sender: Arc<Sender>,
    url: String,
    kafka: Option<InKafka>,
    model: ModelKind,
    speed: f64,
    began: Instant,
    /// The version whose clicks were counted last.
    served: Option<Version>,
    /// From click to served, ms.
    delays: Vec<i64>,
    /// (when, impressions, clicks, trained, answered), of the last seconds.
    samples: VecDeque<(Instant, [u64; 4])>,
    /// Figures that take long, and when they were made.
    recent: Option<Figures>,
    curve: Vec<f64>,
    measured: Option<Instant>,
}

/// Rates are about so long.
const RATES: Duration = Duration::from_secs(3);
/// How often the figures about the last examples are made anew.
const MEASURE: Duration = Duration::from_millis(500);

impl Demo<'_> {
    fn view(&mut self, phase: Phase) -> Result<View, Error> {
        let model = self.node.model();
        if let Some(model) = &model {
            self.note_served(model);
        }
        self.learning.read(&self.ledger)?;
        if self.measured.is_none_or(|at| at.elapsed() >= MEASURE) {
            self.measured = Some(Instant::now());
            self.recent = self.learning.recent();
            self.curve = self.learning.curve();
        }
        let (ledger, sender) = (&self.ledger, &self.sender);
        let get = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let tick = *self.tick.lock().unwrap_or_else(PoisonError::into_inner);
        let trained = self.learning.examples;
        // Released without being learned from, as far as the last tick knew.
        let aside = tick.map_or(0, |tick| tick.impressions.saturating_sub(tick.examples));
        let impressions = get(&ledger.impressions);
        let frontier = self.learning.last.max(tick.and_then(|tick| tick.frontier));
        let status = self.node.status();
        let recent = sender.recent();
        let seconds = |ms: i64| ms as f64 / 1000.0;
        let ms = |took: Duration| took.as_secs_f64() * 1000.0;

        let now = [impressions, get(&ledger.clicks), trained, get(&sender.answered)];
        while self.samples.front().is_some_and(|(at, _)| at.elapsed() > RATES) {
            self.samples.pop_front();
        }
        self.samples.push_back((Instant::now(), now));
        let (since, then) = self.samples[0];
        let over = since.elapsed().as_secs_f64();
        let rate = |i: usize| if over > 0.2 { (now[i] - then[i]) as f64 / over } else { 0.0 };

        let click_to_served = quantiles(&mut self.delays).map(|(p50, p99)| (seconds(p50), seconds(p99)));
        Ok(View {
            phase,
            left: self.options.length.saturating_sub(self.began.elapsed()),
            seconds: self.began.elapsed().as_secs_f64(),
            dir: self.options.dir.clone(),
            url: self.url.clone(),
            generated: self.learning.has_truth,
            model: self.model.name(),
            kafka: self.kafka.clone(),
            speed: self.speed,
            impressions_written: impressions,
            clicks_written: now[1],
            history_written: get(&ledger.history),
            duplicates_written: get(&ledger.duplicates),
            orphans_written: get(&ledger.orphans),
            garbage_written: get(&ledger.garbage),
            bytes_written: get(&ledger.bytes),
            impressions_rate: rate(0),
            clicks_rate: rate(1),
            trained,
            trained_rate: rate(2),
            waiting: impressions.saturating_sub(trained + aside),
            frontier_age: frontier.map(|frontier| seconds(ledger.now().0 - frontier.0).max(0.0)),
            recent: self.recent,
            curve: self.curve.clone(),
            version_published: status.named.max(status.version).map(|version| version.0),
            version_served: status.version.map(|version| version.0),
            version_age: status.published.map(|published| seconds(clock::now().0 - published.0)),
            swaps: status.swaps,
            refusals: status.refusals,
            click_to_served,
            clicks_served: self.delays.len() as u64,
            requests_answered: now[3],
            requests_failed: get(&sender.failed),
            requests_before_first: get(&sender.waited),
            requests_rate: rate(3),
            latency_p50_ms: recent.map(|(p50, _)| ms(p50)),
            latency_p99_ms: recent.map(|(_, p99)| ms(p99)),
        })
    }

    /// A version was swapped in: the clicks that it has learned from are served from now on.
    fn note_served(&mut self, model: &Model) {
        if self.served.replace(model.version()) == Some(model.version()) {
            return;
        }
        if let Some(frontier) = model.manifest().facts.frontier_time {
            let learned = self.ledger.take_learned(frontier);
            self.delays.extend(learned.iter().map(|click| model.loaded().0 - click.0));
        }
    }
}

/// What [`verify`] found.
#[derive(Default)]
struct Verified {
    /// Versions that are gone: retention has removed them, in long runs.
    gone: usize,
    broken: Vec<String>,
    compared: u64,
    differ: Vec<String>,
}

/// Loads every version that answered, which checks digests, form and golden vectors, and scores the kept requests again.
fn verify(store: &Store, sender: &Sender) -> Result<Verified, Error> {
    let start = |source| Error::Thread(source);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(start)?;
    let present = runtime.block_on(store.versions())?;
    let kept = sender.take_kept();
    let mut found = Verified::default();
    let mut scorer = Scorer::new();
    for version in sender.versions().into_keys() {
        if !present.contains_key(&Version(version)) {
            found.gone += 1;
            continue;
        }
        let loaded = runtime.block_on(store.load(Version(version)));
        let model = match loaded.map_err(serve::Error::from).and_then(Model::new) {
            Ok(model) => model,
            Err(error) => {
                found.broken.push(chain(&error));
                continue;
            }
        };
        for answer in kept.iter().filter(|answer| answer.version == version) {
            found.compared += 1;
            let body = sender.body(answer.body);
            let again = scorer.score_body(&model, &body.text, body.candidates);
            // Bit for bit: JSON carries floats exactly.
            if again.ok().is_none_or(|(scores, _)| scores != answer.scores) {
                found.differ.push(format!("request {} by version {version}", answer.body));
            }
        }
    }
    Ok(found)
}

fn report(demo: &Demo<'_>, last: View, training: Summary, cut: usize, verified: Verified) -> Report {
    let sender = &demo.sender;
    let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    let versions = sender.versions();
    let (third, all) = (demo.learning.last_third(), demo.learning.all());
    let mut promises = Vec::new();
    let mut promise = |name, kept: bool, found| promises.push(Promise { name, kept: Some(kept), found });

    let (answered, failed) = (count(&sender.answered), count(&sender.failed));
    let mut found = format!("{} answered, {failed} failed", thousands(answered));
    if let Some(why) = sender.first_failure() {
        found += &format!(", the first: {why}");
    }
    if cut > 0 {
        found += &format!(", {cut} connections cut at the end");
    }
    promise("every request is answered", answered > 0 && failed == 0 && cut == 0, found);

    let back = count(&sender.went_back);
    let first_to_last = match (versions.keys().next(), versions.keys().last()) {
        (Some(first), Some(last)) => format!("{first} to {last}"),
        _ => "none".to_owned(),
    };
    promise(
        "versions only grow",
        back == 0,
        format!("{} versions answered, {first_to_last}, {back} steps back", versions.len()),
    );
    promise(
        "a new version is swapped in every few seconds",
        last.swaps >= SWAPS && last.refusals == 0,
        format!("{} swapped in, {} refused, at least {SWAPS} expected", last.swaps, last.refusals),
    );

    let Verified { gone, broken, compared, differ } = verified;
    let mut found = format!("{} of {} versions checked", versions.len() - gone, versions.len());
    match broken.first() {
        Some(first) => found += &format!(", {} broken, the first: {first}", broken.len()),
        None => found += ": digests, form, golden vectors",
    }
    promise("every version that answered verifies", broken.is_empty() && gone < versions.len(), found);
    let mut found = format!("{} answers scored again, {} differ", thousands(compared), differ.len());
    if let Some(first) = differ.first() {
        found += &format!(", the first: {first}");
    }
    promise("answers reproduce bit for bit with the version they name", compared > 0 && differ.is_empty(), found);

    let (c, gaps) = (&training.counts, (training.impression_gap, training.click_gap));
    let predictions = demo.learning.examples;
    let mut found = format!(
        "{} impressions, {} clicks: gaps {} and {}; {} examples",
        thousands(c.impressions),
        thousands(c.clicks),
        gaps.0,
        gaps.1,
        thousands(training.examples)
    );
    if predictions != training.examples {
        found += &format!(", but {} predictions", thousands(predictions));
    }
    promise("every record is accounted for", gaps == (0, 0) && predictions == training.examples, found);
    promises.push(judge(third, training.examples));

    let ms = |took: Duration| took.as_secs_f64() * 1000.0;
    let overall = sender.overall();
    Report {
        ok: promises.iter().all(|promise| promise.kept != Some(false)),
        promises,
        last,
        last_third: third,
        all,
        versions_answered: versions.len(),
        answers_compared: compared,
        latency_p50_ms: overall.map(|(p50, _)| ms(p50)),
        latency_p99_ms: overall.map(|(_, p99)| ms(p99)),
        topics_left: None,
        training,
    }
}

/// Whether the last third of the examples shows that the model has learned.
fn judge(third: Option<Figures>, examples: u64) -> Promise {
    let name = "learning approaches the best reachable";
    let Some(third) = third else {
        return Promise { name, kept: Some(false), found: format!("{examples} examples, no click among them") };
    };
    let Figures { logloss, constant, .. } = third;
    if let Some((best, closed)) = third.best.zip(third.closed) {
        let needed = MUST_CLOSE.iter().rev().find(|(from, _)| examples >= *from).map(|(_, share)| *share);
        let judged = match needed {
            Some(share) => format!("{:.0} % needed", share * 100.0),
            None => format!("not judged below {} examples", thousands(MUST_CLOSE[0].0)),
        };
        let found = format!(
            "logloss {logloss:.4}, {:.0} % from constant {constant:.4} to truth {best:.4} ({judged})",
            closed * 100.0
        );
        return Promise { name, kept: needed.map(|share| closed >= share), found };
    }
    let clicks = (third.ctr * third.examples as f64).round() as u64;
    let judged = match clicks >= CLICKS {
        true => format!("{SLACK} more allowed"),
        false => format!("{clicks} clicks, not judged below {CLICKS}"),
    };
    Promise {
        name: "learning is no worse than the best constant",
        kept: (clicks >= CLICKS).then_some(logloss <= constant + SLACK),
        found: format!("logloss {logloss:.4}, best constant {constant:.4} ({judged})"),
    }
}

/// 1234567 as `1,234,567`.
pub fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}
