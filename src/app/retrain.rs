//! `tidemill retrain`: rebuilds a model from history beside the live job, compares the two on the same examples, and hands
//! the better one over.
//!
//! All of it is the training job again, over bounded stretches of the same log: the candidate from where it begins to now, and
//! a copy of the live model (from its newest checkpoint at the start) over what has come since. Everything is kept in one
//! directory, with the plan in `plan.json`: the same command goes on where it was interrupted.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::handover::{self, Answer, Offer};
use super::job::{self, Journal, Options, Until};
use super::train::{self, Progress, Summary};
use super::warm::{Brought, WarmStart};
use crate::clock;
use crate::config::{self, Checked, CheckpointSettings, Config, DeadLetterSettings};
use crate::event::Time;
use crate::feature::schema::Schema;
use crate::snapshot::decide::Wish;
use crate::snapshot::operate::{Done, operate};
use crate::snapshot::{self, Store, Version};
use crate::train::checkpoint::{self, Checkpoints};
use crate::train::compare::{At, Kept, Report as Comparison, Rules, Slice, Stretch, Verdict, compare};
use crate::train::image::{Branch, Head};

/// When the candidate takes the live one's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Promote {
    Always,
    IfNotWorse,
    Never,
}

/// What a retrain is asked for, beside the configuration.
#[derive(Clone, Debug)]
pub struct Request {
    /// Everything of this retrain is kept here.
    pub dir: PathBuf,
    /// Learn from no impression before this.
    pub from: Option<Time>,
    /// Impressions before this time; none: to where the log ends by then, following the live job.
    pub until: Option<Time>,
    /// Times that history is learned.
    pub passes: u32,
    /// What the model begins as.
    pub warm: Option<WarmStart>,
    /// Manifest whose journal is obeyed.
    pub journal: Option<PathBuf>,
    pub promote: Promote,
    pub rules: Rules,
    /// Length of a block of the comparison.
    pub block: Duration,
    /// Slices of it: feature and value.
    pub slices: Vec<(String, String)>,
    /// How long the live job is waited for.
    pub patience: Duration,
    /// Channel of the candidate's versions.
    pub channel: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error("{stage}")]
    Job { stage: &'static str, source: job::Error },
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error(transparent)]
    HandOver(#[from] handover::Error),
    #[error("`{}`: cannot {action}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error(
        "`{}` holds a retrain that was asked for otherwise: {differences}. Ask again as then to go on with it, or give `--dir` another directory, or remove this one",
        dir.display()
    )]
    OtherPlan { dir: PathBuf, differences: String },
    #[error("`{}` cannot be read as the plan of a retrain: {why}; remove the directory to begin anew", path.display())]
    Plan { path: PathBuf, why: String },
    #[error("`--slice {name}={value}`: {why}")]
    Slice { name: String, value: String, why: &'static str },
    #[error("the sums of the comparison cannot be read: {0}")]
    Sums(#[from] crate::train::progressive::Error),
    #[error("nothing of the log can be learned before its end: {0}")]
    Empty(&'static str),
}

/// What became of the candidate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "outcome")]
pub enum Outcome {
    /// A signal ended it before it was done; the same command goes on.
    Interrupted,
    /// It was not to be promoted.
    Kept,
    /// It was not promoted, and why.
    NotPromoted { reason: String },
    /// `live` names it, and the live job goes on from it or will when it starts.
    Promoted { job: Job },
    /// It is offered, and is not everywhere yet.
    Pending { reason: String },
}

/// How the hand-over to the job went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Job {
    /// It was running, and has taken it.
    TookOver,
    /// It is down, and will take it when it starts.
    AtItsStart,
}

/// What a retrain came to.
#[derive(Debug, Serialize)]
pub struct Report {
    #[serde(flatten)]
    pub outcome: Outcome,
    pub lineage: String,
    pub from: Option<Time>,
    /// Where the candidate's checkpoint is, in event time.
    pub frontier: Option<Time>,
    pub version: Option<u64>,
    /// What the first pass began with, if not with nothing; none also where that was killed before its end.
    pub warm_start: Option<Brought>,
    pub comparison: Option<Comparison>,
    pub candidate: Summary,
    /// Over everything that was learned in this run.
    pub impressions_this_run: u64,
    pub seconds: f64,
    /// Event time that was learned in this run, over the time that it took.
    pub hours_per_minute: Option<f64>,
}

impl Report {
    /// Of one that has got so far.
    fn of(plan: &Plan, lineage: String, candidate: Summary, impressions_this_run: u64, learned: Duration) -> Self {
        Self {
            outcome: Outcome::Interrupted,
            lineage,
            from: plan.from,
            frontier: candidate.frontier,
            version: candidate.snapshot_version,
            warm_start: None,
            comparison: None,
            impressions_this_run,
            seconds: learned.as_secs_f64(),
            hours_per_minute: None,
            candidate,
        }
    }
}

/// What was decided at the start, and holds until the retrain is done.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    name: String,
    from: Option<Time>,
    until: Option<Time>,
    passes: u32,
    warm: Option<String>,
    /// Settings of the candidate.
    lineage: String,
    /// Where the live job's newest checkpoint was at the start; behind it both are compared.
    after: Option<At>,
    stretch: Stretch,
}

/// How short a pass must have been for the candidate to be as far as the log.
const CAUGHT_UP: Duration = Duration::from_secs(10);
/// Most times that it follows the log again.
const FOLLOWS: usize = 20;

/// Runs a retrain, or goes on with one. `live` is the configuration of the live job.
pub fn run(
    config: &Config,
    live: &Config,
    request: &Request,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Report, Error> {
    let began = Instant::now();
    let dir = &request.dir;
    fs::create_dir_all(dir).map_err(|source| Error::Io { path: dir.clone(), action: "make the directory", source })?;
    let plan = plan(config, live, request)?;
    let (mut impressions, mut first) = (0, None);
    let brought = dir.join("warm-start.json");
    let mut count = |summary: &Summary| {
        impressions += summary.impressions_this_run;
        first.get_or_insert(summary.first_frontier);
        // A later pass begins with the one before.
        let asked = request.warm.as_ref().map(ToString::to_string);
        match &summary.warm_start {
            Some(warm) if asked.as_ref() == Some(&warm.from) => write(&brought, warm),
            _ => Ok(()),
        }
    };

    // Earlier passes end where the comparison begins, or its examples would be known to the candidate.
    let mut warm = request.warm.clone();
    for pass in 1..plan.passes {
        let name = format!("{} pass {pass}", plan.name);
        let checked = candidate(config, request, &plan, &dir.join(format!("pass-{pass}")), &name, warm.as_ref())?;
        let checked = Checked { config: Config { snapshots: None, ..checked.config.clone() }, ..checked };
        let end = plan.after.map(|(time, _)| time).or(plan.until);
        let (checked, until) = bounded(checked, end);
        let options =
            Options { warm: warm.take(), journal: request.journal.clone().map(Journal::Manifest), ..once(until) };
        let summary = train::run(&checked, &options, stop, progress);
        let summary = summary.map_err(|source| Error::Job { stage: "an earlier pass of the candidate", source })?;
        count(&summary)?;
        if stop.load(Ordering::Relaxed) {
            // Nothing may begin as what a pass had learned by then.
            let warm_start = read(&brought)?;
            let report = Report::of(&plan, checked.lineage(), summary, impressions, began.elapsed());
            return Ok(Report { warm_start, ..report });
        }
        warm = Some(WarmStart::Checkpoint(dir.join(format!("pass-{pass}"))));
    }

    let checkpoints = dir.join("candidate");
    let checked = candidate(config, request, &plan, &checkpoints, &plan.name, warm.as_ref())?;
    let lineage = checked.lineage();
    let (checked, until) = bounded(checked, plan.until);
    let options = Options {
        warm,
        journal: request.journal.clone().map(Journal::Manifest),
        compare: plan.after.map(|_| plan.stretch.clone()),
        ..once(until)
    };
    let mut summary;
    let mut follows = 0;
    loop {
        let pass = Instant::now();
        let ran = train::run(&checked, &options, stop, progress);
        summary = ran.map_err(|source| Error::Job { stage: "the candidate", source })?;
        count(&summary)?;
        follows += 1;
        let far = plan.until.is_some() || pass.elapsed() < CAUGHT_UP || follows > FOLLOWS;
        if stop.load(Ordering::Relaxed) || far || summary.impressions_this_run == 0 {
            break;
        }
        tracing::info!("the log has grown meanwhile; the candidate follows it");
    }
    let learned = began.elapsed();
    let hours = summary.frontier.zip(first.flatten()).map(|(last, first)| (last.0 - first.0) as f64 / 3.6e6);
    let mut report = Report::of(&plan, lineage, summary, impressions, learned);
    report.warm_start = read(&brought)?;
    report.hours_per_minute = hours.map(|hours| hours * 60.0 / learned.as_secs_f64());
    if stop.load(Ordering::Relaxed) {
        return Ok(report);
    }
    let Some(through) = report.candidate.place else {
        return Err(Error::Empty("no window of it has closed"));
    };

    // The live model over what has come since, on a copy of its own.
    if let Some(after) = plan.after.filter(|after| *after < through) {
        let stretch = Stretch { through: Some(through), ..plan.stretch.clone() };
        let checked = shadow(live, &dir.join("live"))?;
        // The stretch of the copy changes as the candidate gets further: it begins again from the start.
        if read::<At>(&dir.join("through.json"))? != Some(through) {
            lay_anew(&dir.join("live-pinned"), &dir.join("live"))?;
            write(&dir.join("through.json"), &through)?;
        }
        let (checked, until) = bounded(checked, Some(Time(through.0.0 + 1)));
        // To the last example, whether or not a batch ends there: nothing goes on from this.
        let options = Options { compare: Some(stretch.clone()), ..Options::until(until) };
        let ran = train::run(&checked, &options, stop, progress);
        let ran = ran.map_err(|source| Error::Job {
            stage: "the copy of the live model (--live names its configuration)",
            source,
        })?;
        if stop.load(Ordering::Relaxed) {
            return Ok(report);
        }
        let words = |summary: &Summary| summary.compare.clone().unwrap_or_default();
        let ours = Kept::import(stretch.clone(), &words(&report.candidate))?;
        let theirs = Kept::import(stretch, &words(&ran))?;
        report.comparison = Some(compare(&ours, &theirs, &request.rules));
        tracing::debug!(?after, ?through, "compared");
    }

    report.outcome = match (request.promote, &report.comparison) {
        (Promote::Never, _) => Outcome::Kept,
        (Promote::Always, _) => promote(live, request, &report, &checkpoints)?,
        (Promote::IfNotWorse, Some(Comparison { verdict: Verdict::Better | Verdict::NotWorse, .. })) => {
            promote(live, request, &report, &checkpoints)?
        }
        (Promote::IfNotWorse, Some(Comparison { verdict: Verdict::Worse, reason, .. })) => {
            Outcome::NotPromoted { reason: format!("it is worse: {reason}") }
        }
        (Promote::IfNotWorse, Some(Comparison { verdict: Verdict::Undecided, reason, .. })) => {
            Outcome::NotPromoted { reason: format!("that it is not worse is not shown: {reason}") }
        }
        (Promote::IfNotWorse, None) => Outcome::NotPromoted {
            reason: match plan.after {
                None => "there is no checkpoint of a live job to compare it with",
                Some(_) => "it has not come further than the live job's checkpoint was at the start, so there is nothing new to compare on",
            }
            .into(),
        },
    };
    write(&dir.join("report.json"), &report)?;
    Ok(report)
}

fn once(until: Until) -> Options {
    Options { whole: true, ..Options::until(until) }
}

/// The same settings, for impressions before `until`.
fn bounded(mut checked: Checked, until: Option<Time>) -> (Checked, Until) {
    checked.merge.until = until;
    (checked, until.map_or(Until::End, Until::Time))
}

/// The plan in the directory, or a new one.
fn plan(config: &Config, live: &Config, request: &Request) -> Result<Plan, Error> {
    let path = request.dir.join("plan.json");
    let checked = config.clone().check(None)?;
    let slices = request.slices.iter().map(|(name, value)| slice(&checked.schema, name, value));
    let block = i64::try_from(request.block.as_millis()).unwrap_or(i64::MAX).max(1);
    let mut plan = Plan {
        name: String::new(),
        from: request.from,
        until: request.until,
        passes: request.passes.max(1),
        warm: request.warm.as_ref().map(ToString::to_string),
        lineage: checked.lineage(),
        after: None,
        stretch: Stretch { after: None, through: None, block, slices: slices.collect::<Result<_, _>>()? },
    };
    if let Ok(text) = fs::read(&path) {
        let known: Plan = serde_json::from_slice(&text)
            .map_err(|error| Error::Plan { path: path.clone(), why: error.to_string() })?;
        (plan.name, plan.after, plan.stretch.after) = (known.name.clone(), known.after, known.after);
        if plan == known {
            tracing::info!(name = plan.name, dir = %request.dir.display(), "going on with a retrain that was interrupted");
            return Ok(plan);
        }
        let json = |plan: &Plan| serde_json::to_value(plan).expect("plain data");
        let (then, now) = (json(&known), json(&plan));
        let keys = then.as_object().into_iter().flatten().filter(|(key, value)| now.get(*key) != Some(value));
        let keys = keys.map(|(key, value)| format!("`{key}` was {value} and is {}", now[key]));
        return Err(Error::OtherPlan { dir: request.dir.clone(), differences: keys.collect::<Vec<_>>().join("; ") });
    }
    plan.name = format!("retrain of {}", clock::now());
    if let Some(settings) = &live.checkpoint {
        let pinned = request.dir.join("live-pinned");
        if let Some(number) = Checkpoints::look(&settings.dir).copy_newest(&pinned)? {
            let loaded = Checkpoints::look(&pinned).newest()?;
            let head = loaded.and_then(|loaded| serde_json::from_value::<Head>(loaded.head).ok());
            plan.after = head.and_then(|head| head.place.frontier).map(|key| (key.time, key.id));
            tracing::info!(number, after = ?plan.after, "compared with the live job from its newest checkpoint on");
        }
    }
    plan.stretch.after = plan.after;
    write(&path, &plan)?;
    Ok(plan)
}

fn slice(schema: &Schema, name: &str, value: &str) -> Result<Slice, Error> {
    let fail = |why| Error::Slice { name: name.to_owned(), value: value.to_owned(), why };
    let feature = schema.index_of(name).ok_or_else(|| fail("there is no such feature in the configuration"))?;
    let row = schema
        .value_row(feature, value)
        .ok_or_else(|| fail("only the values of a categorical feature make a slice"))?;
    Ok(Slice { name: format!("{name}={value}"), row })
}

fn write(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    super::put_json(path, value).map_err(|source| Error::Io { path: path.to_owned(), action: "write", source })
}

/// What [`write`] wrote; none if it is not there, or not that.
fn read<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Io { path: path.to_owned(), action: "read", source }),
    }
}

/// Lays the pinned checkpoint of the live job into the directory that its copy runs in, in place of what is there.
fn lay_anew(pinned: &Path, to: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(to) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            return Err(Error::Io { path: to.to_owned(), action: "remove", source });
        }
        _ => {}
    }
    Checkpoints::look(pinned).copy_newest(to)?;
    Ok(())
}

/// The configuration of one of our runs: it writes nothing but its checkpoints, and shows itself to nobody.
fn apart(config: &Config, dir: &Path) -> Config {
    let mut config = config.clone();
    let settings = config.checkpoint.take();
    let every = settings.as_ref().map_or(Duration::from_secs(60), |settings| settings.every);
    let every_batches = settings.map_or(0, |settings| settings.every_batches);
    config.checkpoint = Some(CheckpointSettings { dir: dir.to_owned(), every, every_batches });
    config.telemetry.listen = None;
    if let Some(cluster) = &mut config.kafka {
        cluster.group = None;
    }
    config
}

fn candidate(
    config: &Config,
    request: &Request,
    plan: &Plan,
    dir: &Path,
    name: &str,
    warm: Option<&WarmStart>,
) -> Result<Checked, Error> {
    let mut config = apart(config, dir);
    if let Some(snapshots) = &mut config.snapshots {
        snapshots.channel.clone_from(&request.channel);
    }
    // Its versions are for the end; what the gate would ask is asked by the comparison.
    config.publish.every = Duration::from_secs(100 * 365 * 86_400);
    config.publish.min_interval = Duration::ZERO;
    config.gate.examples = 0;
    config.dead_letters = config
        .dead_letters
        .map(|_| DeadLetterSettings { path: Some(request.dir.join("dead-letters.jsonl")), topic: None });
    if let Some(from) = plan.from {
        config.start_before(from);
    }
    let mut checked = config.check(None)?;
    let began_as = warm.map(ToString::to_string);
    checked.branch = Some(Branch { name: name.to_owned(), from: plan.from, began_as });
    Ok(checked)
}

/// The live job's configuration, for a copy of it that learns on and writes nothing.
fn shadow(live: &Config, dir: &Path) -> Result<Checked, Error> {
    let mut config = apart(live, dir);
    config.snapshots = None;
    config.dead_letters = None;
    Ok(config.check(None)?)
}

/// Hands the candidate over: to the job, and to the channel that the fleet follows.
fn promote(live: &Config, request: &Request, report: &Report, checkpoints: &Path) -> Result<Outcome, Error> {
    let pending = |reason: &str| Ok(Outcome::Pending { reason: reason.to_owned() });
    let mut job = Job::AtItsStart;
    if let Some(settings) = &live.checkpoint {
        let dir = &settings.dir;
        let absolute = |path: &Path| {
            let fail = |source| Error::Io { path: path.to_owned(), action: "find", source };
            fs::canonicalize(path).map_err(fail)
        };
        let newest = Checkpoints::look(checkpoints).newest()?.ok_or(Error::Empty("it has no checkpoint"))?;
        fs::create_dir_all(dir).map_err(|source| Error::Io {
            path: dir.clone(),
            action: "make the directory",
            source,
        })?;
        let offer = Offer {
            dir: absolute(checkpoints)?,
            number: newest.number,
            lineage: report.lineage.clone(),
            frontier: report.frontier,
        };
        handover::offer(dir, &offer)?;
        tracing::info!(dir = %dir.display(), "the candidate's checkpoint is offered to the live job");
        let asked = Instant::now();
        loop {
            match handover::answer(dir, &report.lineage)? {
                Some(Answer { taken: true, .. }) => {
                    job = Job::TookOver;
                    break;
                }
                Some(Answer { reason, .. }) => {
                    return Ok(Outcome::NotPromoted {
                        reason: format!("the live job did not take it: {}", reason.unwrap_or_default()),
                    });
                }
                None => {}
            }
            // Nobody holds the lock: the job is down.
            if asked.elapsed() > Duration::from_secs(3) && Checkpoints::open(dir).is_ok() {
                break;
            }
            if asked.elapsed() > request.patience {
                return pending(
                    "the live job runs and has not answered; it takes the offer when it can, then run `tidemill snapshots promote`",
                );
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    let (Some(settings), Some(version)) = (&live.snapshots, report.version) else {
        return Ok(Outcome::Promoted { job });
    };
    let runtime = super::runtime();
    let runtime =
        runtime.map_err(|source| Error::Io { path: request.dir.clone(), action: "start a runtime", source })?;
    let done = runtime.block_on(async {
        let store = Store::open(&settings.store)?;
        // The job may have published one that is further by now.
        if let Some(named) = store.latest(&settings.channel).await?.and_then(|entry| entry.version)
            && named > Version(version)
            && store.manifest(named, "the channel").await?.lineage == report.lineage
        {
            return Ok(None);
        }
        operate(&store, &settings.channel, Wish::Promote { version: Version(version), pin: false }).await.map(Some)
    });
    match done? {
        None | Some(Done::Written { .. } | Done::Already(_)) => Ok(Outcome::Promoted { job }),
        Some(Done::Refused(objection)) => pending(&format!("channel `{}`: {objection}", settings.channel)),
    }
}
