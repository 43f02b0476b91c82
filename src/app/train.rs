//! The training job: reads both streams, drives the core, checkpoints and publishes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::dead_letters::{self, DeadLetters};
use super::keeper::Keeper;
use super::publisher::{self, Handle, Job};
use crate::batch::Cutter;
use crate::clock;
use crate::config::{self, Checked};
use crate::event::{Stream, Time};
use crate::join::{Counts, DelayCurve, Join};
use crate::merge::{Merge, PartitionPosition, ReadCounts, WaitReason};
use crate::model::logistic::Logistic;
use crate::position::NextOffset;
use crate::source::decode::Decoder;
use crate::source::file;
use crate::source::{self, Arrival, Decode, NewDecoder, Partition, Recycler, Sources};
use crate::telemetry;
use crate::train::checkpoint::{self, Checkpoints};
use crate::train::core::{Advance, Core, Image, Sampling};
use crate::train::image::{self, Digests, FORMAT, Head};
use crate::train::progressive::{Metrics, Progressive, Report};

/// How long the job reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// For ever: follows growing files.
    Stopped,
    /// To the end that the files have at the start.
    End,
    /// Impressions before this time, clicks up to a window later.
    Time(Time),
}

/// What one run is asked for, beside its configuration.
#[derive(Clone, Debug)]
pub struct Options {
    pub until: Until,
    /// With [`Until::Time`]: wait for files to grow rather than end where they end.
    pub follow: bool,
    /// File for id, prediction and label of every example.
    pub predictions: Option<PathBuf>,
}

/// Why a job cannot start or go on. Nothing that was checkpointed is lost by any of them.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Rewritten(#[from] crate::merge::Rewritten),
    #[error(
        "this lineage has learned {0} batches, the most that a row can remember; start a new one by a retrain into another `checkpoint.dir`"
    )]
    TooManyBatches(u64),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Content(#[from] crate::snapshot::codec::Error),
    #[error(transparent)]
    Publish(#[from] publisher::Error),
    #[error(transparent)]
    DeadLetters(#[from] dead_letters::Error),
    #[error(transparent)]
    Model(#[from] crate::model::Error),
    #[error(transparent)]
    Progressive(#[from] crate::train::progressive::Error),
    #[error(transparent)]
    Mapping(#[from] source::decode::Error),
    #[error(
        "the checkpoint in `{}` was made under other settings: {differences}. Put them back to go on from it; for a new \
         start under the new settings give `checkpoint.dir` another directory",
        dir.display()
    )]
    OtherSettings { dir: PathBuf, differences: String },
    #[error("the checkpoint in `{}` has format {found}, this build reads {FORMAT}", dir.display())]
    OtherFormat { dir: PathBuf, found: u32 },
    #[error("the head of the checkpoint in `{}` cannot be read", dir.display())]
    Head { dir: PathBuf, source: serde_json::Error },
    #[error(
        "the checkpoint has read the file `{name}` of {stream} further than it has trained, but the config no longer finds \
         it: bring it back until its impressions are trained (a file that was trained to its end may go)"
    )]
    PartitionGone { name: String, stream: &'static str },
    #[error("cannot write predictions to `{}`", path.display())]
    Predictions { path: PathBuf, source: io::Error },
    #[error("a thread cannot be started: {0}")]
    Thread(#[source] io::Error),
}

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub job: String,
    /// `end`: bounded input was read to its end; `stopped`: by a signal.
    pub ended_by: &'static str,
    /// Whether this run went on from a checkpoint.
    pub resumed: bool,
    /// Place of the last impression released.
    pub frontier: Option<Time>,
    pub counts: Counts,
    pub clicks_waiting: u64,
    /// Impressions and clicks accounted for in no class or in two; 0 unless there is a bug.
    pub impression_gap: i64,
    pub click_gap: i64,
    pub click_coverage: Option<f64>,
    pub delays: DelayCurve,
    pub read: ReadCounts,
    pub impressions_pending: usize,
    pub clicks_pending: usize,
    pub journal_entries: usize,
    pub dead_letters: u64,
    pub batches: u64,
    pub examples: u64,
    /// Progressive validation: of a model of age zero.
    pub metrics: Metrics,
    pub last_window: Option<crate::train::progressive::Window>,
    pub missing_rate: BTreeMap<String, f64>,
    pub new_id_rate: BTreeMap<String, f64>,
    pub rows: usize,
    pub model_bytes: usize,
    pub peak_pending_impressions: usize,
    pub examples_this_run: u64,
    pub impressions_this_run: u64,
    pub seconds: f64,
    pub examples_per_second: f64,
    pub impressions_per_second: f64,
    pub snapshot_version: Option<u64>,
    pub model_digest: String,
    pub order_digest: String,
}

/// A line now and then while a job runs, for a person to follow.
pub trait Progress {
    fn show(&mut self, line: &Tick);
}

/// What [`Progress`] is shown.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    pub impressions: u64,
    pub examples: u64,
    pub per_second: f64,
    pub frontier: Option<Time>,
    pub waiting_for: Option<WaitReason>,
    pub logloss: Option<f64>,
    pub auc: Option<f64>,
    pub version: Option<u64>,
}

/// The sources of a job: partitions of both streams in the order of the checkpoint, then of the config.
struct Input {
    /// By partition number; none for a file that is gone.
    partitions: Vec<Option<Partition>>,
    recycler: Recycler,
    sources: Sources,
    streams: Vec<(Stream, file::Settings, NewDecoder)>,
    follow: bool,
    /// When the patterns were last looked at for new files.
    looked: Instant,
}

impl Input {
    /// Following: a file that has appeared under a pattern is a new partition, awaited from first sight.
    fn discover(&mut self, core: &mut Core) -> Result<(), Error> {
        if !self.follow || self.looked.elapsed() < LOOK {
            return Ok(());
        }
        self.looked = Instant::now();
        // A file that was there at the start and is gone now is the reader's business.
        let Ok(specs) = specs(&self.streams, self.follow) else { return Ok(()) };
        for spec in specs {
            let (name, stream) = (file::name_of(&spec.path), spec.stream);
            if (0..core.merge().partitions()).any(|p| core.merge().stream(p) == stream && core.merge().name(p) == name)
            {
                continue;
            }
            tracing::info!(stream = stream.name(), name, "a new partition");
            self.partitions.push(Some(self.sources.add(spec)?));
            core.merge_mut().add_partition(&name, stream);
        }
        Ok(())
    }
}

/// How often followed patterns are looked at for new files.
const LOOK: Duration = Duration::from_secs(1);

fn specs(streams: &[(Stream, file::Settings, NewDecoder)], follow: bool) -> Result<Vec<source::Spec>, Error> {
    let mut all = Vec::new();
    for (stream, settings, decoder) in streams {
        let files = settings.check(&format!("{}.source", stream.name()))?;
        all.extend(files.specs(*stream, follow, decoder, |_| NextOffset::default()));
    }
    Ok(all)
}

/// Adapts the decoder to the source's seam.
struct Lines(Decoder);

impl Decode for Lines {
    fn decode(&mut self, raw: &[u8], offset: u64, before: crate::position::Fingerprint, out: &mut crate::event::Chunk) {
        self.0.decode(raw, offset, before, out);
    }
}

/// Makes decoders for a stream, after one was made to see that the mapping is sound.
pub fn decoder(checked: &Checked, stream: Stream, keep_text: bool) -> Result<NewDecoder, Error> {
    let (settings, schema) = match stream {
        Stream::Impressions => (checked.config.impressions.record.clone(), Some(checked.schema.clone())),
        Stream::Clicks => {
            let clicks = checked.config.clicks.as_ref().expect("asked for only where there are clicks");
            (clicks.record.clone(), None)
        }
    };
    let make = move || Decoder::new(stream, &settings, schema.as_ref(), keep_text);
    make()?;
    Ok(Arc::new(move || Box::new(Lines(make().expect("made once before"))) as Box<dyn Decode>))
}

/// Runs a job until its input ends or `stop` is set.
pub fn run(
    checked: &Checked,
    options: &Options,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Summary, Error> {
    let started = Instant::now();
    let config = &checked.config;

    let checkpoints = config.checkpoint.as_ref().map(|settings| Checkpoints::open(&settings.dir)).transpose()?;
    let loaded = match &checkpoints {
        Some(checkpoints) => checkpoints.newest()?,
        None => {
            tracing::warn!("no [checkpoint] in the config: this run starts anew and cannot be resumed");
            None
        }
    };
    let mut next_checkpoint = 1;
    let default_rows: Vec<u64> = (0..checked.schema.len()).map(|feature| checked.schema.default_row(feature)).collect();
    let (restored, model, measured, predictions_at) = match loaded {
        Some(loaded) => {
            let dir = config.checkpoint.as_ref().map(|settings| settings.dir.clone()).unwrap_or_default();
            next_checkpoint = loaded.number + 1;
            let head: Head = read_head(&loaded.head, &dir, checked)?;
            let seen =
                loaded.segments.iter().map(|(_, arrays)| image::read_segment(arrays)).collect::<Result<Vec<_>, _>>()?;
            let (restored, state, words) = image::read(&head, &loaded.arrays, seen)?;
            let model = Logistic::from_state(checked.logistic, default_rows.clone(), state)?;
            let measured = Progressive::import(&config.metrics, &words)?;
            tracing::info!(number = loaded.number, examples = head.place.examples, "resuming from a checkpoint");
            (Some(restored), model, measured, head.predictions)
        }
        None => {
            let model = Logistic::new(checked.logistic, default_rows.clone());
            (None, model, Progressive::new(&config.metrics)?, None)
        }
    };
    let resumed = restored.is_some();

    let mut predictions = options
        .predictions
        .as_deref()
        .map(|path| Predictions::open(path, if resumed { predictions_at } else { None }))
        .transpose()?;
    let mut dead = DeadLetters::open(config.dead_letters.as_ref().map(|letters| letters.path.as_path()))?;

    // Last stage first: publisher and checkpoint writer, the core, then what feeds it.
    let publisher = config.snapshots.as_ref().map(|settings| Handle::start(checked, settings)).transpose()?;
    let keeper =
        checkpoints.map(|store| Keeper::start(checked, store, next_checkpoint)).transpose().map_err(Error::Thread)?;

    let batch = &config.batch;
    let period = batch.period.0.map(|period| period.as_millis() as i64);
    let mut core = Core::new(
        Merge::new(checked.merge),
        Join::new(checked.join),
        Cutter::new(batch.examples, period),
        Sampling::new(config.job.seed, config.sampling.negatives),
        checked.join.window,
        model,
        measured,
    );
    let known: Vec<PartitionPosition> = restored.as_ref().map(|r| r.partitions.clone()).unwrap_or_default();
    let first_impression = restored.as_ref().map_or(0, |r| r.counts.impressions);
    if let Some(restored) = restored {
        core.restore(restored);
    }
    if predictions.is_some() {
        core.keep_predictions();
    }
    let mut input = open_input(checked, options, &known, &mut core)?;

    let mut job = Running {
        checked,
        publisher,
        keeper,
        default_rows,
        last_checkpoint: Instant::now(),
        batches_at_checkpoint: core.place().batches,
        last_publish: None,
        measured: Instant::now(),
        next_mark: None,
        frozen: false,
        kept: Ok(()),
    };
    let first_example = core.place().examples;
    let learning = Instant::now();
    let mut shown = Instant::now();
    let mut waiting_for = None;
    let mut peak_pending = 0;
    let ended = loop {
        match core.advance() {
            Advance::Boundary => {
                waiting_for = None;
                peak_pending = peak_pending.max(core.merge().pending());
                while let Some(chunk) = core.merge_mut().take_recycled() {
                    input.recycler.give(chunk);
                }
                drain(&mut core, predictions.as_mut(), &mut dead)?;
                job.boundary(&mut core, predictions.as_mut(), &mut dead)?;
            }
            Advance::Unfinished => {
                tracing::info!(
                    "what follows would come out otherwise if the log went on; a later run resumes before it"
                );
                if core.place().frontier.is_some() {
                    // If it fails, the job still learns and publishes the rest, and ends with this error.
                    job.kept = job.checkpoint(&core, predictions.as_mut(), &mut dead);
                }
                job.frozen = true;
            }
            Advance::Wait { on, why } => {
                waiting_for = Some(why);
                pump(&mut core, &mut input, on, &mut dead)?;
            }
            Advance::End => break true,
        }
        if stop.load(Ordering::Relaxed) {
            break false;
        }
        if shown.elapsed() > Duration::from_secs(1) {
            shown = Instant::now();
            let report = core.progress.report();
            progress.show(&Tick {
                impressions: core.join().counts.impressions,
                examples: core.place().examples,
                per_second: (core.place().examples - first_example) as f64 / learning.elapsed().as_secs_f64(),
                frontier: core.place().frontier.map(|key| key.time),
                waiting_for,
                logloss: report.cumulative.logloss,
                auc: report.cumulative.auc,
                version: job.publisher.as_ref().and_then(Handle::last).map(|version| version.0),
            });
        }
    };
    let seconds = learning.elapsed().as_secs_f64();
    drain(&mut core, predictions.as_mut(), &mut dead)?;

    let version = job.finish(&core, predictions.as_mut(), &mut dead)?;
    let image = core.image();
    let digests = image::digests(&image, &image.model.sorted(), checked.join.window);
    let run = Run { ended, resumed, seconds, first_example, first_impression, peak_pending, version };
    tracing::debug!(seconds = started.elapsed().as_secs_f64(), "done");
    Ok(summary(checked, &core, &image, digests, dead.count, &run))
}

/// What [`summary`] needs to know of the run itself.
struct Run {
    ended: bool,
    resumed: bool,
    seconds: f64,
    first_example: u64,
    first_impression: u64,
    peak_pending: usize,
    version: Option<u64>,
}

fn summary(checked: &Checked, core: &Core, image: &Image, digests: Digests, dead: u64, run: &Run) -> Summary {
    let passed = image.place.frontier.map_or(Time::MIN, |key| key.time.plus(checked.join.window));
    let waiting = image.clicks.iter().filter(|click| click.time <= passed && !click.rejected).count() as u64;
    let Report { cumulative, open } = core.progress.report();
    let features = core.model.counts();
    let rate = |of: &[u64]| {
        let named = of.iter().enumerate().filter(|(_, n)| **n > 0);
        let named =
            named.map(|(i, n)| (checked.schema.name(i).to_owned(), *n as f64 / features.examples.max(1) as f64));
        named.collect::<BTreeMap<_, _>>()
    };
    let examples = image.place.examples - run.first_example;
    let impressions = image.counts.impressions - run.first_impression;
    Summary {
        job: checked.config.job.name.clone(),
        ended_by: if run.ended { "end" } else { "stopped" },
        resumed: run.resumed,
        frontier: image.place.frontier.map(|key| key.time),
        counts: image.counts,
        clicks_waiting: waiting,
        impression_gap: image.counts.impression_gap(),
        click_gap: image.counts.click_gap(waiting),
        click_coverage: image.counts.click_coverage(),
        delays: image.delays.clone(),
        read: core.merge().counts(),
        impressions_pending: core.merge().pending(),
        clicks_pending: core.merge().clicks_ahead(),
        journal_entries: image.journal.len(),
        dead_letters: dead,
        batches: image.place.batches,
        examples: image.place.examples,
        metrics: cumulative,
        last_window: open,
        missing_rate: rate(&features.missing),
        new_id_rate: rate(&features.unseen),
        rows: core.model.len(),
        model_bytes: core.model.bytes(),
        peak_pending_impressions: run.peak_pending,
        examples_this_run: examples,
        impressions_this_run: impressions,
        seconds: run.seconds,
        examples_per_second: examples as f64 / run.seconds,
        impressions_per_second: impressions as f64 / run.seconds,
        snapshot_version: run.version,
        model_digest: digests.model,
        order_digest: digests.order,
    }
}

/// Reads the head of a checkpoint and refuses one that was made under other settings, naming each.
pub fn read_head(head: &serde_json::Value, dir: &Path, checked: &Checked) -> Result<Head, Error> {
    let format = head.get("format").and_then(serde_json::Value::as_u64).unwrap_or(0) as u32;
    if format != FORMAT {
        return Err(Error::OtherFormat { dir: dir.to_owned(), found: format });
    }
    let head: Head =
        serde_json::from_value(head.clone()).map_err(|source| Error::Head { dir: dir.to_owned(), source })?;
    let keys = head.binding.keys().chain(checked.binding.keys().filter(|key| !head.binding.contains_key(*key)));
    let (nothing, mut differences) = (String::from("nothing"), Vec::new());
    for key in keys {
        let (then, now) = (head.binding.get(key), checked.binding.get(key));
        if then != now {
            let (then, now) = (then.unwrap_or(&nothing), now.unwrap_or(&nothing));
            differences.push(format!("`{key}` was {then} and is {now}"));
        }
    }
    if differences.is_empty() {
        return Ok(head);
    }
    Err(Error::OtherSettings { dir: dir.to_owned(), differences: differences.join("; ") })
}

/// Opens all files: those of the checkpoint where it ended, others at their start.
fn open_input(
    checked: &Checked,
    options: &Options,
    known: &[PartitionPosition],
    core: &mut Core,
) -> Result<Input, Error> {
    let follow = options.until == Until::Stopped || options.follow;
    let config = &checked.config;
    let keep_ids = options.predictions.is_some();
    let mut streams = vec![(
        Stream::Impressions,
        config.impressions.source.clone(),
        decoder(checked, Stream::Impressions, keep_ids)?,
    )];
    if let Some(clicks) = &config.clicks {
        streams.push((Stream::Clicks, clicks.source.clone(), decoder(checked, Stream::Clicks, false)?));
    }
    let mut specs = specs(&streams, follow)?;
    // Partitions keep their numbers: the checkpoint's first, in its order.
    let place = |spec: &source::Spec| {
        let name = file::name_of(&spec.path);
        known.iter().position(|known| known.name == name && known.stream == spec.stream)
    };
    for spec in &mut specs {
        spec.from = place(spec).map_or_else(NextOffset::default, |at| known[at].from);
    }
    // A file that was trained to its end may leave; its number stays taken.
    let mut slots: Vec<Option<usize>> = Vec::new();
    for (index, position) in known.iter().enumerate() {
        let found = specs.iter().position(|spec| place(spec) == Some(index));
        if found.is_none() {
            let PartitionPosition { name, stream, from, read, .. } = position;
            if from.offset < read.offset {
                return Err(Error::PartitionGone { name: name.clone(), stream: stream.name() });
            }
            tracing::warn!(
                name,
                stream = stream.name(),
                offset = read.offset,
                "a file is gone; it counts as ended there"
            );
            core.merge_mut().ended(index)?;
        }
        slots.push(found);
    }
    for (at, spec) in specs.iter().enumerate() {
        if place(spec).is_none() {
            core.merge_mut().add_partition(&file::name_of(&spec.path), spec.stream);
            slots.push(Some(at));
        }
    }
    let (sources, opened, recycler) = Sources::open(specs, checked.decode_threads())?;
    let mut opened: Vec<Option<Partition>> = opened.into_iter().map(Some).collect();
    let partitions = slots.into_iter().map(|slot| slot.and_then(|at| opened[at].take())).collect();
    Ok(Input { partitions, recycler, sources, streams, follow, looked: Instant::now() })
}

/// How long the merge waits for the partition it needs before it looks around.
const PATIENCE: Duration = Duration::from_millis(20);

/// Reads what the merge needs: waits for one partition, and looks at those that are not awaited.
fn pump(core: &mut Core, input: &mut Input, on: Option<usize>, dead: &mut DeadLetters) -> Result<(), Error> {
    input.discover(core)?;
    let mut moved = false;
    for partition in 0..input.partitions.len() {
        while core.merge().wants(partition) {
            let Some(arrival) = input.partitions[partition].as_mut().and_then(Partition::try_next) else { break };
            moved = true;
            accept(core, partition, arrival, dead)?;
        }
    }
    if moved {
        return Ok(());
    }
    let arrival = match on {
        Some(partition) => {
            let from = input.partitions[partition].as_mut();
            from.and_then(|from| from.next_timeout(PATIENCE)).map(|arrival| (partition, arrival))
        }
        None => {
            std::thread::sleep(PATIENCE);
            None
        }
    };
    match arrival {
        Some((partition, arrival)) => accept(core, partition, arrival, dead),
        None => {
            core.merge_mut().tick(clock::now());
            Ok(())
        }
    }
}

fn accept(core: &mut Core, partition: usize, arrival: Arrival, dead: &mut DeadLetters) -> Result<(), Error> {
    match arrival {
        Arrival::Records(chunk) => {
            if !chunk.rejects.is_empty() {
                let merge = core.merge();
                dead.keep_rejects(merge.stream(partition), merge.name(partition), &chunk)?;
            }
            core.offer(partition, chunk, clock::now())?;
        }
        Arrival::CaughtUp { .. } => core.merge_mut().caught_up(partition, clock::now()),
        Arrival::Ended { .. } => core.merge_mut().ended(partition)?,
        Arrival::Failed(error) => return Err(error.into()),
    }
    Ok(())
}

/// Writes down what the core has kept for the outside.
fn drain(core: &mut Core, predictions: Option<&mut Predictions>, dead: &mut DeadLetters) -> Result<(), Error> {
    if let Some(predictions) = predictions {
        predictions.write(&core.take_predictions())?;
    }
    for (partition, offset, row, reason) in core.merge_mut().take_rejected() {
        let merge = core.merge();
        dead.keep(merge.stream(partition as usize), merge.name(partition as usize), offset, row, &reason, "")?;
    }
    for bad in core.take_quarantined() {
        let merge = core.merge();
        let reason =
            format!("example {:016x} was quarantined: its logit or step is not finite or out of bounds", bad.id);
        let partition = bad.partition as usize;
        dead.keep(merge.stream(partition), merge.name(partition), bad.offset, bad.row, &reason, "")?;
    }
    Ok(())
}

/// The parts of a running job that act at batch boundaries.
struct Running<'a> {
    checked: &'a Checked,
    publisher: Option<Handle>,
    keeper: Option<Keeper>,
    default_rows: Vec<u64>,
    last_checkpoint: Instant,
    batches_at_checkpoint: u64,
    last_publish: Option<Instant>,
    /// When the counters were last handed to telemetry.
    measured: Instant,
    /// Event time of the next publication mark.
    next_mark: Option<Time>,
    /// The checkpoint to resume from lies behind: windows are cut from here on.
    frozen: bool,
    /// How writing that checkpoint went.
    kept: Result<(), Error>,
}

impl Running<'_> {
    fn boundary(
        &mut self,
        core: &mut Core,
        predictions: Option<&mut Predictions>,
        dead: &mut DeadLetters,
    ) -> Result<(), Error> {
        let Some(frontier) = core.place().frontier.map(|key| key.time) else { return Ok(()) };
        if core.place().batches >= u64::from(u32::MAX) - 1 {
            return Err(Error::TooManyBatches(core.place().batches));
        }
        if self.measured.elapsed() >= Duration::from_secs(1) {
            self.measured = Instant::now();
            let (merge, join) = (core.merge(), core.join());
            telemetry::boundary(&join.counts, &merge.counts(), join.waiting(), frontier, core.place().batches);
        }
        for window in core.progress.take_closed_windows() {
            telemetry::window(&window.metrics);
            let m = &window.metrics;
            tracing::debug!(end = %window.end, examples = m.examples, logloss = m.logloss, auc = m.auc, ctr = m.ctr, "window");
        }
        if let (Some(keeper), Some(settings)) = (&self.keeper, &self.checked.config.checkpoint)
            && !self.frozen
            && !keeper.busy()
        {
            let batches = core.place().batches - self.batches_at_checkpoint;
            let due = settings.every_batches > 0 && batches >= settings.every_batches;
            if due || self.last_checkpoint.elapsed() >= settings.every {
                self.last_checkpoint = Instant::now();
                self.batches_at_checkpoint = core.place().batches;
                dead.flush()?;
                let written = predictions.map(Predictions::flush).transpose()?;
                keeper.offer(core.image(), written);
            }
        }
        let every = self.checked.config.publish.every.as_millis() as i64;
        let mark =
            *self.next_mark.get_or_insert_with(|| Time((frontier.0.div_euclid(every) + 1).saturating_mul(every)));
        if frontier >= mark
            && let Some(publisher) = &self.publisher
        {
            self.next_mark = Some(Time((frontier.0.div_euclid(every) + 1).saturating_mul(every)));
            let least = self.checked.config.publish.min_interval;
            if self.last_publish.is_none_or(|last| last.elapsed() >= least) && !publisher.busy() {
                self.last_publish = Some(Instant::now());
                publisher.offer(self.job(core))?;
            }
        }
        Ok(())
    }

    fn job(&self, core: &Core) -> Job {
        Job {
            image: core.image(),
            report: core.progress.report(),
            golden: core.golden(),
            default_rows: self.default_rows.clone(),
        }
    }

    /// Writes a checkpoint of the last boundary and waits for it.
    fn checkpoint(
        &mut self,
        core: &Core,
        predictions: Option<&mut Predictions>,
        dead: &mut DeadLetters,
    ) -> Result<(), Error> {
        dead.flush()?;
        let written = predictions.map(Predictions::flush).transpose()?;
        if let Some(keeper) = &self.keeper {
            keeper.write(core.image(), written)?;
        }
        Ok(())
    }

    /// The last checkpoint and the last snapshot. Both are tried before an error of either is returned.
    fn finish(
        mut self,
        core: &Core,
        predictions: Option<&mut Predictions>,
        dead: &mut DeadLetters,
    ) -> Result<Option<u64>, Error> {
        let mut kept = std::mem::replace(&mut self.kept, Ok(()));
        if core.place().frontier.is_some() {
            if let Some(publisher) = &self.publisher {
                publisher.offer(self.job(core))?;
            }
            if self.frozen {
                dead.flush()?;
                predictions.map(Predictions::flush).transpose()?;
            } else {
                kept = self.checkpoint(core, predictions, dead);
            }
        }
        let version = self.publisher.take().map(Handle::finish).transpose()?.flatten().map(|version| version.0);
        kept?;
        if let Some(keeper) = self.keeper.take() {
            keeper.finish()?;
        }
        Ok(version)
    }
}

/// The file of `--predictions`: CSV with a header; on resume it is cut back to what the checkpoint knows.
struct Predictions {
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
}

impl Predictions {
    const HEADER: &'static str = "id,prediction,label\n";

    fn open(path: &Path, at: Option<u64>) -> Result<Self, Error> {
        let fail = |source| Error::Predictions { path: path.to_owned(), source };
        let mut file = File::options().create(true).truncate(false).write(true).open(path).map_err(fail)?;
        let length = at.unwrap_or(0);
        let found = file.metadata().map_err(fail)?.len();
        if found < length {
            let why = format!(
                "it has {found} bytes, but the checkpoint has written {length}; name the file of the earlier run"
            );
            return Err(fail(io::Error::other(why)));
        }
        file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length))).map_err(fail)?;
        let mut this = Self { path: path.to_owned(), file: BufWriter::new(file), length };
        if length == 0 {
            this.line(Self::HEADER)?;
        }
        Ok(this)
    }

    fn line(&mut self, line: &str) -> Result<(), Error> {
        self.length += line.len() as u64;
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|source| Error::Predictions { path: self.path.clone(), source })
    }

    fn write(&mut self, predictions: &[crate::train::core::Prediction]) -> Result<(), Error> {
        for p in predictions {
            let quoted = p.id.contains([',', '"', '\n', '\r']);
            let id = if quoted { format!("\"{}\"", p.id.replace('"', "\"\"")) } else { p.id.clone() };
            self.line(&format!("{id},{},{}\n", p.p, u8::from(p.positive)))?;
        }
        Ok(())
    }

    /// Returns the bytes written since the file was begun.
    fn flush(&mut self) -> Result<u64, Error> {
        self.file.flush().map_err(|source| Error::Predictions { path: self.path.clone(), source })?;
        Ok(self.length)
    }
}
