//! The training job: reads both streams, drives the core, checkpoints and publishes.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::control::Why;
use super::dead_letters::{At, DeadLetters};
use super::handover;
use super::input;
pub use super::job::{Error, Options, Until};
use super::keeper::{Keeper, Resumed, Underway};
use super::operator::Desk;
use super::predictions::Predictions;
use super::publisher::{Handle, Job, Published};
pub use super::summary::Summary;
use super::summary::{Run, summary};
use crate::batch::Cutter;
use crate::clock;
use crate::config::Checked;
use crate::event::Time;
use crate::join::Join;
use crate::join::fuse::Fuse;
use crate::merge::{self, Key, Merge, PartitionPosition, WaitReason};
use crate::telemetry::{self, Stage};
use crate::train::checkpoint::Checkpoints;
use crate::train::compare::Kept;
use crate::train::core::{Advance, Core, Sampling};
use crate::train::digest::{self, Ordered};
use crate::train::fresh::Fresh;
use crate::train::image::{self, FORMAT, Head};
use crate::train::progressive::Progressive;

/// A line now and then while a job runs, for a person to follow.
pub trait Progress {
    fn show(&mut self, line: &Tick);

    /// Looks at the core at a batch boundary. Whether the run goes on.
    fn boundary(&mut self, _core: &mut Core) -> bool {
        true
    }
}

/// What [`Progress`] is shown.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    pub impressions: u64,
    pub examples: u64,
    pub per_second: f64,
    /// Event time of the first example of the lineage.
    pub first: Option<Time>,
    pub frontier: Option<Time>,
    pub waiting_for: Option<WaitReason>,
    /// Why the fuse holds the training, if it does.
    pub held: Option<Why>,
    /// Impressions read and not yet learned.
    pub impressions_waiting: u64,
    pub logloss: Option<f64>,
    pub auc: Option<f64>,
    pub version: Option<u64>,
}

/// Runs a job until its input ends or `stop` is set. Where a retrained model is handed over, the job goes on as that.
pub fn run(
    checked: &Checked,
    options: &Options,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Summary, Error> {
    let mut checked = checked.clone();
    loop {
        match run_lineage(&checked, options, stop, progress)? {
            (summary, None) => return Ok(summary),
            (_, Some(next)) => checked = *next,
        }
    }
}

/// Runs a job until then, or until another lineage takes its place, under the configuration that comes back.
fn run_lineage(
    checked: &Checked,
    options: &Options,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<(Summary, Option<Box<Checked>>), Error> {
    let started = Instant::now();

    let settings = checked.config.checkpoint.as_ref();
    let checkpoints = settings.map(|settings| Checkpoints::open(&settings.dir)).transpose()?;
    let mut handed_over = false;
    let loaded = match &checkpoints {
        Some(checkpoints) => {
            handed_over = handover::take(checkpoints, checked)?;
            checkpoints.newest()?
        }
        None => None,
    };
    let (mut from, mut warm_start) = (None, None);
    let (restored, model, measured, predictions_at, branch, words) = match loaded {
        Some(loaded) => {
            let dir = settings.map(|settings| settings.dir.clone()).unwrap_or_default();
            let head: Head = read_head(&loaded.head, &dir, checked)?;
            from = Some(Resumed::new(&head, &loaded));
            if let Some(expected) = &checked.branch
                && head.branch.as_ref() != Some(expected)
            {
                let found = head.branch.map_or("`tidemill train`".to_owned(), |branch| format!("{branch:?}"));
                return Err(Error::OtherBranch { dir, found, expected: format!("{expected:?}") });
            }
            let (restored, state, words) = image::read(&head, &loaded)?;
            let model = checked.model.resume(state)?;
            let measured = Progressive::import(&checked.config.metrics, &words)?;
            tracing::info!(number = loaded.number, examples = head.place.examples, "resuming from a checkpoint");
            let compared = loaded.arrays.get("compare").map(|_| loaded.arrays.u64s("compare")).transpose()?;
            (Some(restored), model, measured, head.predictions, head.branch, compared)
        }
        None => {
            let model = match &options.warm {
                Some(warm) => {
                    let (state, brought) = warm.load(checked)?;
                    warm_start = Some(brought);
                    checked.model.resume(state)?
                }
                None => checked.model.start()?,
            };
            (None, model, Progressive::new(&checked.config.metrics)?, None, checked.branch.clone(), None)
        }
    };
    // A job goes on with the lineage that its checkpoint is of.
    let checked = &Checked { branch, ..checked.clone() };
    let config = &checked.config;
    let resumed = restored.is_some();

    let mut predictions = options
        .predictions
        .as_deref()
        .map(|path| Predictions::open(path, if resumed { predictions_at } else { None }))
        .transpose()?;
    let mut dead = DeadLetters::open(config)?;

    // Last stage first: publisher and checkpoint writer, the core, then what feeds it.
    let publisher = config.snapshots.as_ref().map(|settings| Handle::start(checked, settings)).transpose()?;
    let known_to = from.as_ref().map(|from| from.batch);
    let keeper = checkpoints.map(|store| Keeper::start(checked, store, from)).transpose();
    let keeper = keeper.map_err(Error::Thread)?;

    let batch = &config.batch;
    let period = batch.period.0.map(|period| period.as_millis() as i64);
    let mut core = Core::new(
        Merge::new(checked.merge),
        Join::new(checked.join),
        Cutter::new(batch.examples, period),
        Sampling::new(config.job.seed, config.sampling.negatives),
        Fuse::new(&config.fuse),
        model,
        measured,
    );
    if let Some(from) = checked.branch.as_ref().and_then(|branch| branch.from) {
        core.learn_from(from);
    }
    if options.whole {
        core.expect_growth();
    }
    core.compare = match (&options.compare, words) {
        (Some(stretch), Some(words)) => Some(Kept::import(stretch.clone(), &words)?),
        (Some(stretch), None) => Some(Kept::new(stretch.clone())),
        (None, _) => None,
    };
    if let (Some(_), Some(gate)) = (&publisher, &checked.gate) {
        core.fresh = Fresh::new(gate.examples());
    }
    let known: Vec<PartitionPosition> = restored.as_ref().map(|r| r.partitions.clone()).unwrap_or_default();
    let first_impression = restored.as_ref().map_or(0, |r| r.counts.impressions);
    if let Some(restored) = restored {
        core.restore(restored);
    }
    if let Some(batch) = known_to {
        core.model.mark(u32::try_from(batch).expect("the job stops before 2^32 batches"));
    }
    if predictions.is_some() {
        core.keep_predictions();
    }
    let mut input = input::open(checked, options, &known, &mut core)?;
    core.opened();
    let durable = keeper.as_ref().map(Keeper::durable).unwrap_or_default();
    if let Some(keeper) = keeper.as_ref().filter(|_| input.starts_anywhere(resumed)) {
        // Where "latest" or a time was is not found again: kept before anything is read.
        keeper.write(|_| core.image(), None)?;
    }

    let mut job = Running {
        checked,
        publisher,
        keeper,
        last_checkpoint: Instant::now(),
        batches_at_checkpoint: core.place().batches,
        last_publish: None,
        // What was handed over is published with the first batch.
        next_mark: handed_over.then_some(Time::MIN),
        frozen: false,
        last: None,
    };
    let first_example = core.place().examples;
    let first_frontier = core.place().frontier.map(|key| key.time);
    let learning = Instant::now();
    let mut shown = Instant::now();
    let mut desk = Desk::new(&config.job.name, options.control.clone());
    let mut jumped = None;
    let mut peak_pending = 0;
    let mut fresh = Freshness { joined: core.merge().frontier() };
    let mut next = None;
    let ended = loop {
        match core.advance()? {
            Advance::Boundary => {
                desk.note(None, &core);
                fresh.joined(&core);
                fresh.learned(&core);
                peak_pending = peak_pending.max(core.merge().pending());
                while let Some(chunk) = core.merge_mut().take_recycled() {
                    input.recycler.give(chunk);
                }
                drain(&mut core, predictions.as_mut(), &mut dead)?;
                job.boundary(&mut core, predictions.as_mut(), &mut dead)?;
                if !progress.boundary(&mut core) {
                    break true;
                }
            }
            Advance::Unfinished if options.whole => break true,
            Advance::Unfinished => {
                tracing::info!(
                    "what follows would come out otherwise if the log went on; a later run resumes before it"
                );
                if core.place().frontier.is_some() {
                    // If it fails, the job still learns and publishes the rest, and ends with that error.
                    job.last = job.keep(&mut core, predictions.as_mut(), &mut dead)?;
                }
                job.frozen = true;
            }
            Advance::Held => {
                desk.note(None, &core);
                let held = core.held().expect("the core says so");
                if !held.unheard.is_empty() {
                    tracing::warn!(from = %held.first.time, "a batch goes back, to be labelled anew when clicks return");
                    let known = core.rewind();
                    // Its threads end before new ones read the same log.
                    drop(input);
                    input = input::open(checked, options, &known, &mut core)?;
                } else if options.follows() {
                    std::thread::sleep(HELD);
                } else {
                    let (batch, time, jump) = (core.place().batches + 1, held.first.time, held.jump);
                    jumped = Some(Error::CtrJump { batch, time, jump });
                    break false;
                }
            }
            Advance::Wait { on, why } => {
                desk.note(Some(why), &core);
                fresh.joined(&core);
                input::pump(&mut core, &mut input, on, &mut dead)?;
            }
            Advance::End => break true,
        }
        if stop.load(Ordering::Relaxed) {
            break false;
        }
        if desk.is_told() {
            let published = job.published();
            desk.obey(&mut core, &published, |core| job.lasts(core, predictions.as_mut(), &mut dead));
        }
        if shown.elapsed() > Duration::from_secs(1) {
            shown = Instant::now();
            next = handover::asked(checked, options).unwrap_or_else(|error| {
                let error = crate::snapshot::chain(&error);
                tracing::error!(error, "an offer of a retrained model cannot be looked at; the job goes on without it");
                None
            });
            if next.is_some() {
                break false;
            }
            desk.show(&core, &job.published());
            if let Some(frontier) = core.place().frontier {
                let (counts, waiting) = core.join().settled();
                telemetry::boundary(counts, &core.merge().counts(), waiting, frontier.time, core.place().batches);
                for table in core.model.tables() {
                    telemetry::table(table.name, table.rows, table.bytes, &table.ids);
                }
            }
            input.report(&core.positions());
            input.commit(&durable);
            let report = core.progress.report();
            progress.show(&Tick {
                impressions: core.join().counts.impressions,
                examples: core.place().examples,
                per_second: (core.place().examples - first_example) as f64 / learning.elapsed().as_secs_f64(),
                first: core.place().event_times.map(|(first, _)| first),
                frontier: core.place().frontier.map(|key| key.time),
                waiting_for: desk.waiting(),
                held: desk.held(),
                impressions_waiting: core.impressions_waiting(),
                logloss: report.cumulative.logloss,
                auc: report.cumulative.auc,
                version: job.published().version.map(|version| version.0),
            });
        }
    };
    let seconds = learning.elapsed().as_secs_f64();
    drain(&mut core, predictions.as_mut(), &mut dead)?;

    let version = job.finish(&mut core, predictions.as_mut(), &mut dead)?;
    input.commit(&durable);
    drop(input);
    if let Some(jumped) = jumped {
        return Err(jumped);
    }
    let image = core.image();
    let digests = digest::digests(&Ordered::of(&image), &image.model.sorted(), checked.join.window);
    let run = Run {
        ended,
        resumed,
        warm_start,
        seconds,
        first_example,
        first_impression,
        first_frontier,
        peak_pending,
        version,
    };
    tracing::debug!(seconds = started.elapsed().as_secs_f64(), "done");
    Ok((summary(checked, &core, &image, digests, dead.count, &run), next.map(Box::new)))
}

/// How long a held job waits before it looks again whether an operator has spoken.
const HELD: Duration = Duration::from_millis(20);

/// Shows how old what the core works on is, at the moments when it comes back: nothing of it is learned from.
struct Freshness {
    /// The last that was shown.
    joined: Option<Key>,
}

impl Freshness {
    /// All that could be released was, or a batch has ended.
    fn joined(&mut self, core: &Core) {
        if let Some(frontier) = core.merge().frontier()
            && self.joined.replace(frontier) != Some(frontier)
        {
            telemetry::reached(Stage::Joined, frontier.time, clock::now());
        }
    }

    fn learned(&self, core: &Core) {
        if let Some(frontier) = core.place().frontier {
            telemetry::reached(Stage::Learned, frontier.time, clock::now());
        }
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

/// Writes down what the core has kept for the outside.
fn drain(core: &mut Core, predictions: Option<&mut Predictions>, dead: &mut DeadLetters) -> Result<(), Error> {
    if let Some(predictions) = predictions {
        predictions.write(&core.take_predictions())?;
    }
    for merge::Rejected { partition, offset, row, reason, key, value } in core.merge_mut().take_rejected() {
        let at = At::new(core.merge(), partition, offset, row);
        dead.keep(&at, &reason, key.as_deref(), &value)?;
    }
    for bad in core.take_quarantined() {
        let reason =
            format!("example {:016x} was quarantined: its logit or step is not finite or out of bounds", bad.id);
        dead.keep(&At::new(core.merge(), bad.partition, bad.offset, bad.row), &reason, None, b"")?;
    }
    Ok(())
}

/// The parts of a running job that act at batch boundaries.
struct Running<'a> {
    checked: &'a Checked,
    publisher: Option<Handle>,
    keeper: Option<Keeper>,
    last_checkpoint: Instant,
    batches_at_checkpoint: u64,
    last_publish: Option<Instant>,
    /// Event time of the next publication mark.
    next_mark: Option<Time>,
    /// The checkpoint to resume from lies behind: windows are cut from here on.
    frozen: bool,
    /// That one, or the one at the end.
    last: Option<Underway>,
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
                self.keep(core, predictions, dead)?;
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
                let job = self.job(core);
                self.offer(job)?;
            }
        }
        Ok(())
    }

    fn offer(&self, job: Job) -> Result<(), Error> {
        self.publisher.as_ref().map_or(Ok(()), |publisher| publisher.offer(job).map_err(Error::from))
    }

    fn published(&self) -> Published {
        self.publisher.as_ref().map(Handle::published).unwrap_or_default()
    }

    fn job(&self, core: &mut Core) -> Job {
        let Some(publisher) = self.publisher.as_ref().filter(|publisher| publisher.deltas()) else {
            return Job::new(core, None);
        };
        let job = Job::new(core, publisher.acknowledged());
        self.mark(core);
        job
    }

    /// Begins a segment of the log of changes behind the last batch, and drops those that neither snapshots nor checkpoints
    /// need any more: none while one of them is made and has acknowledged nothing.
    fn mark(&self, core: &mut Core) {
        let published = self.publisher.as_ref().filter(|publisher| publisher.deltas()).map(Handle::acknowledged);
        let kept = self.keeper.as_ref().map(Keeper::acknowledged);
        if let Some(known) = [published, kept].into_iter().flatten().min().flatten() {
            core.model.forget_changes_to(known as u32);
        }
        core.model.mark(core.place().batches as u32);
    }

    /// Leaves a checkpoint of the last boundary to the keeper, if there is one.
    fn keep(
        &self,
        core: &mut Core,
        predictions: Option<&mut Predictions>,
        dead: &mut DeadLetters,
    ) -> Result<Option<Underway>, Error> {
        dead.flush()?;
        let written = predictions.map(Predictions::flush).transpose()?;
        let underway = self.keeper.as_ref().map(|keeper| keeper.offer(|since| core.image_after(since), written));
        if underway.is_some() {
            self.mark(core);
        }
        Ok(underway)
    }

    /// Makes an operator's word last: writes a checkpoint, unless there is nothing yet to resume from. Whether it lasts.
    fn lasts(&self, core: &mut Core, predictions: Option<&mut Predictions>, dead: &mut DeadLetters) -> bool {
        if self.keeper.is_none() || self.frozen || core.place().frontier.is_none() {
            return false;
        }
        let kept = self.keep(core, predictions, dead);
        let kept = kept.and_then(|underway| underway.map_or(Ok(()), |it| it.wait().map_err(Error::from)));
        if let Err(error) = &kept {
            tracing::error!(error = %crate::snapshot::chain(error), "what an operator said is not in a checkpoint yet");
        }
        kept.is_ok()
    }

    /// The last checkpoint and the last snapshot. Both are tried before an error of either is returned.
    fn finish(
        mut self,
        core: &mut Core,
        predictions: Option<&mut Predictions>,
        dead: &mut DeadLetters,
    ) -> Result<Option<u64>, Error> {
        // For memory: the copy of the rows that the checkpoint to resume from was made of goes before the next one comes.
        let kept = self.last.take().map_or(Ok(()), Underway::wait);
        if core.place().frontier.is_some() {
            if let Some(publisher) = &self.publisher {
                // Then the last version is one more delta.
                publisher.wait();
                // Where publishing has stopped, its end says so.
                let _ = self.offer(self.job(core));
            }
            if self.frozen {
                dead.flush()?;
                predictions.map(Predictions::flush).transpose()?;
            } else {
                self.last = self.keep(core, predictions, dead)?;
            }
        }
        let version = self.publisher.map(Handle::finish).transpose();
        let kept = kept.and(self.last.map_or(Ok(()), Underway::wait));
        if let Some(keeper) = self.keeper {
            keeper.finish();
        }
        let version = version?.flatten().map(|version| version.0);
        kept?;
        Ok(version)
    }
}
