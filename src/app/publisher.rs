//! The publishing thread: takes the newest image, turns it into weights, and publishes it.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::clock;
use crate::config::Checked;
use crate::event::Slot;
use crate::model::changes::Changes;
use crate::model::{self, TableFigures};
use crate::snapshot::codec;
use crate::snapshot::delta::{Delta, TowersDelta};
use crate::snapshot::gate;
use crate::snapshot::manifest::PartitionPosition;
use crate::snapshot::publish::{Content, Plan};
use crate::snapshot::retain::retain;
use crate::snapshot::store::Traffic;
use crate::snapshot::towers::Towers;
use crate::snapshot::{
    self, Facts, Golden, ModelInfo, Outcome, Publisher, Remedy, Store, Vectors, Version, Weights, chain,
};
use crate::telemetry::{self, Stage};
use crate::train::core::{Core, Image, Standing};
use crate::train::digest::{self, Digests, Ordered};
use crate::train::fresh::{self, Fresh};
use crate::train::progressive;

/// What is to be published of a boundary, and fresh examples to prove and to judge it with.
pub struct Job {
    pub standing: Standing,
    pub tables: Vec<TableFigures>,
    pub report: progressive::Report,
    /// With the logits of the model itself.
    pub golden: Vec<Golden>,
    /// Examples since the job before, for the gate.
    pub fresh: Fresh,
    pub model: Part,
}

/// The model, or what of it was touched since the batch that was published last.
pub enum Part {
    Whole(Box<Image>),
    Touched { since: u64, changes: Box<model::Changes> },
}

impl Job {
    /// Takes what is published of the core's last boundary. `since` is the batch that was published last, if that is certain.
    pub fn new(core: &mut Core, since: Option<u64>) -> Self {
        let changes = |since: u64| Some((since, core.model.changes_after(u32::try_from(since).ok()?)?));
        let model = match since.and_then(changes) {
            Some((since, changes)) => Part::Touched { since, changes: Box::new(changes) },
            None => Part::Whole(Box::new(core.image())),
        };
        let golden = golden(core);
        let (standing, tables, report) = (core.standing(), core.model.tables(), core.progress.report());
        Self { standing, tables, report, golden, fresh: core.fresh.take(), model }
    }
}

/// A version that the gate did not let pass.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Withheld {
    pub version: Version,
    pub reason: String,
}

/// What has become of versions.
#[derive(Clone, Debug, Default)]
pub struct Published {
    /// The newest version published in this lineage.
    pub version: Option<Version>,
    /// A newer one, if the gate held it.
    pub withheld: Option<Withheld>,
}

#[derive(Default)]
struct State {
    slot: Option<Job>,
    busy: bool,
    closed: bool,
    published: Published,
    /// The batch of the version that the next one changes.
    acknowledged: Option<u64>,
    /// Publishing is over for good: fenced, or a person is needed.
    stopped: Option<String>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Hands images to the publishing thread. A newer image replaces one that was not taken yet.
pub struct Handle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    deltas: bool,
}

/// Why publishing cannot start or has stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error("cannot start the publishing thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error("publishing has stopped: {0}")]
    Stopped(String),
}

impl Handle {
    /// Takes the channel (which fences any other writer) and starts the thread.
    pub fn start(checked: &Checked, settings: &snapshot::Settings) -> Result<Self, Error> {
        let plan = settings.check()?;
        let runtime = super::runtime()?;
        let model = ModelInfo {
            kind: checked.config.model.kind.name().to_owned(),
            // By way of text, which keeps an f32 as short as it is.
            config: serde_json::from_str(&checked.config.model.in_use()).expect("plain data"),
            schema: serde_json::from_str(&checked.schema.to_json()).expect("the schema writes JSON"),
            schema_hash: checked.schema.hash(),
        };
        let store = plan.open()?;
        if store.is_single_writer() {
            tracing::warn!(
                store = store.url(),
                "`unsafe_create=single-writer`: nothing keeps a second trainer, or a paused one that wakes up, from overwriting what this one publishes"
            );
        } else {
            // Once here and thoroughly in `tidemill check`.
            runtime.block_on(store.race(1, 4))?;
        }
        let publisher = runtime.block_on(Publisher::open(store.clone(), &plan, checked.lineage(), model))?;
        let shared = Arc::new(Shared::default());
        lock(&shared).published.version = publisher.newest().map(|(version, _)| version);
        let (ours, window) = (Arc::clone(&shared), checked.join.window);
        let (model, gate) = (checked.model.clone(), checked.gate.clone());
        let counted = store.traffic();
        let worker =
            Worker { publisher, store, plan, runtime, model, gate, report: None, window, counted, swept: None };
        let body = move || worker.run(&ours);
        let thread = thread::Builder::new().name("publish".into()).spawn(body)?;
        Ok(Self { shared, thread: Some(thread), deltas: settings.deltas > 0 })
    }

    /// Puts a job into the slot. An error means that publishing has stopped for good.
    pub fn offer(&self, job: Job) -> Result<(), Error> {
        let mut state = lock(&self.shared);
        if let Some(why) = &state.stopped {
            return Err(Error::Stopped(why.clone()));
        }
        state.slot = Some(job);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Whether a job is waiting or being published.
    #[must_use]
    pub fn busy(&self) -> bool {
        let state = lock(&self.shared);
        state.busy || state.slot.is_some()
    }

    /// Waits until no job is waiting or being published, or none will be.
    pub fn wait(&self) {
        let over = || self.thread.as_ref().is_none_or(JoinHandle::is_finished);
        let mut state = lock(&self.shared);
        while state.stopped.is_none() && (state.busy || state.slot.is_some()) && !over() {
            let waited = self.shared.changed.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The batch that was published last. None where that is not certain, since a job is under way, or where it does not
    /// matter.
    #[must_use]
    pub fn acknowledged(&self) -> Option<u64> {
        let state = lock(&self.shared);
        if self.deltas && !state.busy && state.slot.is_none() { state.acknowledged } else { None }
    }

    /// Whether versions are made of what was touched.
    #[must_use]
    pub fn deltas(&self) -> bool {
        self.deltas
    }

    /// What has become of versions.
    #[must_use]
    pub fn published(&self) -> Published {
        lock(&self.shared).published.clone()
    }

    /// Waits until the slot is empty and the thread has ended.
    pub fn finish(mut self) -> Result<Option<Version>, Error> {
        self.close();
        let state = lock(&self.shared);
        match &state.stopped {
            Some(why) => Err(Error::Stopped(why.clone())),
            None => Ok(state.published.version),
        }
    }

    fn close(&mut self) {
        lock(&self.shared).closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            lock(&self.shared).stopped = Some("its thread panicked; this is a bug of tidemill".into());
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.close();
    }
}

fn lock(shared: &Shared) -> std::sync::MutexGuard<'_, State> {
    shared.state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a failed publish is tried before the job waits for the next mark.
const TRIES: u32 = 3;

/// Least time between two clean-ups of the store, each of which lists it.
const SWEEP: Duration = Duration::from_secs(60);

/// What the publishing thread owns.
struct Worker {
    publisher: Publisher,
    store: Store,
    plan: Plan,
    runtime: tokio::runtime::Runtime,
    model: model::Checked,
    gate: Option<gate::Rules>,
    /// What it said of the last candidate.
    report: Option<gate::Report>,
    /// Attribution window, ms.
    window: i64,
    /// What the store was asked for, as far as the metrics know.
    counted: Traffic,
    /// When versions that are no longer needed were last removed.
    swept: Option<Instant>,
}

impl Worker {
    fn run(mut self, shared: &Shared) {
        loop {
            let job = {
                let mut state = lock(shared);
                loop {
                    if let Some(job) = state.slot.take() {
                        state.busy = true;
                        break job;
                    }
                    if state.closed {
                        return;
                    }
                    state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            };
            let began = Instant::now();
            let result = self.publish(&job);
            let traffic = self.store.traffic();
            telemetry::asked_store(traffic.written - self.counted.written, traffic.retries - self.counted.retries);
            self.counted = traffic;
            let published = matches!(result, Ok(Outcome::Published(_) | Outcome::Held(_) | Outcome::Pinned { .. }));
            telemetry::pinned(matches!(result, Ok(Outcome::Pinned { .. })));
            let mut state = lock(shared);
            state.busy = false;
            state.acknowledged = self.publisher.acknowledged();
            match result {
                Ok(Outcome::Held(version)) => {
                    let reason = self.report.take().and_then(|report| report.reason).unwrap_or_default();
                    telemetry::snapshot_held();
                    tracing::error!(
                        version = version.0,
                        reason,
                        "a version was held; what was published before goes on serving (`tidemill snapshots promote` names it all the same)"
                    );
                    state.published.withheld = Some(Withheld { version, reason });
                }
                Ok(Outcome::Published(version)) => {
                    state.published = Published { version: Some(version), withheld: None };
                    telemetry::published(version.0, began.elapsed().as_secs_f64());
                    if let Some(frontier) = job.standing.place.frontier {
                        telemetry::reached(Stage::Published, frontier.time, clock::now());
                    }
                }
                Ok(Outcome::Pinned { version, at }) => {
                    state.published = Published { version: Some(version), withheld: None };
                    telemetry::published(version.0, began.elapsed().as_secs_f64());
                    tracing::info!(
                        version = version.0,
                        pinned = at.0,
                        "published; the channel is pinned and stays where it is"
                    );
                }
                Ok(Outcome::Behind { newest }) => {
                    tracing::info!(newest = newest.0, "this stretch is already published; waiting until it is passed");
                }
                Ok(Outcome::Fenced { by }) => {
                    tracing::error!(epoch = by.0, "another trainer has taken the channel; this one publishes no more");
                    state.stopped = Some(format!("another trainer has taken the channel with epoch {by}"));
                }
                Err(error) => {
                    telemetry::publish_failed();
                    tracing::error!(error = %chain(&error), "a snapshot could not be published; training goes on");
                    if error.remedy() == Remedy::Stop {
                        state.stopped = Some(chain(&error));
                    }
                }
            }
            drop(state);
            shared.changed.notify_all();
            if published && self.swept.is_none_or(|swept| swept.elapsed() >= SWEEP) {
                self.sweep();
            }
        }
    }

    /// Removes versions that nothing needs any more.
    fn sweep(&mut self) {
        self.swept = Some(Instant::now());
        match self.runtime.block_on(retain(&self.store, &self.plan, clock::now())) {
            Ok(removed) => tracing::debug!(?removed, "cleaned the store"),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "old snapshots could not be removed; tried again later")
            }
        }
    }

    /// What the gate says of a candidate.
    fn judge(&mut self, fresh: &Fresh) -> Option<gate::Report> {
        let rules = self.gate.as_ref()?;
        let before = match self.runtime.block_on(self.publisher.before()) {
            Ok(Some(before)) => before,
            Ok(None) => return Some(gate::form_only("there is no version before it that encodes alike")),
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the version that serves cannot be loaded to be compared with");
                return Some(gate::form_only("the version before it could not be loaded"));
            }
        };
        let unseen = |(item, _): &(&fresh::Item, &[Slot])| before.frontier.is_none_or(|seen| item.time > seen);
        let pair = |(item, slots): (&fresh::Item, &[Slot])| gate::Pair {
            candidate: item.logit,
            before: before.weights.logit(slots),
            positive: item.positive,
            weight: item.weight,
        };
        let report = gate::judge(rules, &fresh.iter().filter(unseen).map(pair).collect::<Vec<_>>());
        let served = &report.as_served;
        telemetry::as_served(served.logloss, served.auc, served.calibration);
        Some(report)
    }

    fn publish(&mut self, job: &Job) -> snapshot::Result<Outcome> {
        let unfit = |error: codec::Error| snapshot::Error::Unfit(error.to_string());
        let (content, digests) = match &job.model {
            Part::Whole(image) => {
                let model = image.model.sorted();
                let digests = digest::digests(&Ordered::of(image), &model, self.window);
                (Content::from(weights(&self.model, model).map_err(unfit)?), Some(digests))
            }
            Part::Touched { since, changes } => {
                let touched = Arc::new(touched(&self.model, changes).map_err(unfit)?);
                (Content::Changes { since: *since, touched }, None)
            }
        };
        let facts = facts(job, digests);
        self.report = self.judge(&job.fresh);
        let mut wait = Duration::from_millis(200);
        for attempt in 1.. {
            match self.runtime.block_on(self.publisher.publish(
                &content,
                facts.clone(),
                &job.golden,
                self.report.clone(),
            )) {
                Err(error) if error.remedy() == Remedy::Retry && attempt < TRIES => {
                    tracing::warn!(error = %chain(&error), attempt, "publishing failed, trying again");
                    thread::sleep(wait);
                    wait *= 4;
                }
                done => return done,
            }
        }
        unreachable!("the last attempt returns")
    }
}

/// What is published of a model.
pub(super) fn weights(checked: &model::Checked, state: model::State) -> Result<Weights, codec::Error> {
    let logistic = state.logistic;
    let intercept = logistic.intercept.w as f32;
    let weights = Weights::new(logistic.rows.ids, logistic.rows.w, intercept, checked.default_rows.clone())?;
    let (Some(checked), Some(towers)) = (&checked.towers, state.towers) else { return Ok(weights) };
    let rows = Vectors::exact(checked.settings.dim, towers.rows.w);
    let towers = Towers::new(checked.layout(), towers.rows.ids, rows, towers.params, weights.default_rows())?;
    Ok(weights.with_towers(towers))
}

/// What is published of a model's changes.
fn touched(checked: &model::Checked, changes: &model::Changes) -> Result<Delta, codec::Error> {
    let model::Changes { logistic: Changes { rows, removed }, intercept, towers } = changes;
    let towers = checked.towers.as_ref().zip(towers.as_ref()).map(|(checked, changes)| {
        let Changes { rows, removed } = &changes.embedding;
        let vectors = Vectors::exact(checked.settings.dim, rows.w.clone());
        let pair = checked.layout().pair();
        TowersDelta::new(pair, rows.ids.clone(), vectors, removed.clone(), changes.params.clone())
    });
    Delta::touched(rows.ids.clone(), rows.w.clone(), removed.clone(), intercept.w as f32, towers)
}

/// What the manifest says of a job.
fn facts(job: &Job, digests: Option<Digests>) -> Facts {
    let Standing { place, partitions, journal, counts } = &job.standing;
    let counts = serde_json::to_value(counts).expect("plain data");
    let counts = counts.as_object().into_iter().flatten().filter_map(|(k, v)| Some((k.clone(), v.as_u64()?)));
    let of_table = |table: &TableFigures| {
        let ids = table.ids.iter().map(|(what, n)| (format!("{}_{what}", table.name), *n));
        std::iter::once((format!("{}_rows", table.name), table.rows as u64)).chain(ids).collect::<Vec<_>>()
    };
    let position = |p: &crate::merge::PartitionPosition| PartitionPosition {
        name: p.name.clone(),
        stream: p.stream,
        offset: p.from.offset,
    };
    Facts {
        frontier_time: place.frontier.map(|key| key.time),
        positions: partitions.iter().map(position).collect(),
        event_times: place.event_times,
        batch: place.batches,
        counts: counts.chain(job.tables.iter().flat_map(of_table)).collect(),
        journal: journal.iter().map(|entry| serde_json::to_string(entry).expect("plain data")).collect(),
        metrics: serde_json::to_value(job.report).expect("plain data"),
        model_digest: digests.as_ref().map(|digests| digests.model.clone()),
        order_digest: digests.map(|digests| digests.order),
    }
}

/// Fresh examples, one of them with ids that no row has, each with the logit of the model.
fn golden(core: &Core) -> Vec<Golden> {
    let mut examples = core.golden();
    let unknown = |slot: &Slot| {
        let near = (1..).map(|step| Slot { row: slot.row.wrapping_add(step), ..*slot });
        near.into_iter().find(|slot| slot.row != 0 && !core.model.has(slot)).expect("fewer than 2^64 rows")
    };
    examples.extend(examples.first().map(|first| first.iter().map(unknown).collect()));
    examples.iter().map(|slots| Golden::new(slots, core.model.score(slots))).collect()
}
