//! `tidemill retrain`: a model anew from history, compared with the live one and handed over.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};

use super::ConfigArgs;
use super::train::Lines;
use crate::app::retrain::{self, Job, Outcome, Promote, Report, Request};
use crate::app::train::{Progress, Tick};
use crate::app::warm::{Brought, WarmStart};
use crate::config::Config;
use crate::event::Time;
use crate::snapshot::Manifest;
use crate::snapshot::manifest::Document as _;
use crate::train::compare::{self, Rules};

/// Exit status of a candidate that was not promoted, because it is worse or because that it is not was not shown.
const NOT_PROMOTED: u8 = 3;
/// Exit status of a promotion that is not everywhere yet.
const PENDING: u8 = 4;

/// Retrain: build the model anew from history, compare it with the live one, and hand it over
///
/// It runs beside the live job and takes nothing from it. The candidate learns the log from --from on with this
/// configuration, follows it to where the live job is, and is compared with a copy of the live model on the examples that have
/// come since this began. Promoted, the live job goes on from the candidate's checkpoint, and the channel names its version.
/// Interrupted, the same command goes on. Exit status: 0 done, 1 failed, 2 wrong usage, 3 not promoted, 4 promotion pending.
#[derive(clap::Args, Clone, Debug)]
pub struct Retrain {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Configuration that the live job runs with. Default: the file of --config, without --set.
    #[arg(long, value_name = "FILE")]
    pub live: Option<PathBuf>,
    /// What the live job was started with over its file. May be given often.
    #[arg(long = "live-set", value_name = "KEY=VALUE")]
    pub live_set: Vec<String>,
    /// Learn from no impression before this time (RFC 3339 or Unix milliseconds). Default: from the start of the log.
    #[arg(long, value_name = "TIME", value_parser = super::parse_time)]
    pub from: Option<Time>,
    /// End before this time, or `now`: where the log ends, following the live job.
    #[arg(long, value_name = "TIME", default_value = "now", value_parser = time_or_now)]
    pub until: When,
    /// End with the last impression that a version has learned: its manifest.
    #[arg(long, value_name = "FILE", conflicts_with = "until")]
    pub through: Option<PathBuf>,
    /// How often history is learned. All passes but the last end where the comparison begins.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub passes: u32,
    /// Begin with what another model has learned: a directory of checkpoints, or a snapshot store with `@VERSION` behind it
    /// or not.
    #[arg(long, value_name = "WHERE")]
    pub warm_start: Option<String>,
    /// Decide again what the runtime of an earlier run over the log decided: a manifest of that run.
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// When the candidate takes the live one's place.
    #[arg(long, value_enum, default_value = "if-not-worse")]
    pub promote: PromoteWhen,
    /// The candidate's log loss may be greater by this share of the live one's.
    #[arg(long, default_value_t = Rules::default().margin)]
    pub margin: f64,
    /// Of the interval that must lie within the margin, two-sided.
    #[arg(long, default_value_t = Rules::default().confidence)]
    pub confidence: f64,
    /// Fewest clicks that are enough for a judgement.
    #[arg(long, default_value_t = Rules::default().clicks)]
    pub clicks: u64,
    /// Length of the blocks of event time that the interval is made of.
    #[arg(long, default_value = "1m", value_parser = duration)]
    pub block: Duration,
    /// Look at the examples with a feature's value apart, such as `tab=1`. May be given often.
    #[arg(long = "slice", value_name = "FEATURE=VALUE")]
    pub slices: Vec<String>,
    /// Directory of this retrain; default: `checkpoint.dir` with `-retrain` behind it.
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// Channel of the candidate's versions.
    #[arg(long, default_value = "candidate")]
    pub channel: String,
    /// How long the live job is waited for when it is handed the candidate.
    #[arg(long, default_value = "2m", value_parser = duration)]
    pub wait: Duration,
    /// Print one JSON object at the end instead of a report.
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum PromoteWhen {
    Always,
    IfNotWorse,
    Never,
}

/// `--until`
#[derive(Clone, Copy, Debug)]
pub enum When {
    Now,
    At(Time),
}

fn time_or_now(text: &str) -> Result<When, String> {
    if text == "now" { Ok(When::Now) } else { super::parse_time(text).map(When::At) }
}

fn duration(text: &str) -> Result<Duration, String> {
    let duration =
        humantime_serde::re::humantime::parse_duration(text).map_err(|e| format!("{e}; write `1m`, `2h`"))?;
    if duration.is_zero() { Err("must be more than nothing".into()) } else { Ok(duration) }
}

/// Just behind the last impression of a version.
fn end_of(path: &Path) -> anyhow::Result<Time> {
    let read = || format!("`--through {}`", path.display());
    let manifest = Manifest::from_bytes(&std::fs::read(path).with_context(read)?).with_context(read)?;
    let frontier = manifest.facts.frontier_time.with_context(|| format!("{}: it has learned nothing", read()))?;
    Ok(frontier.plus(1))
}

impl Retrain {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.config.load()?;
        let live = Config::load(self.live.as_ref().unwrap_or(&self.config.config), &self.live_set)?;
        let dir = match (&self.dir, &config.checkpoint) {
            (Some(dir), _) => dir.clone(),
            (None, Some(settings)) => {
                let mut name = settings.dir.clone().into_os_string();
                name.push("-retrain");
                name.into()
            }
            (None, None) => {
                anyhow::bail!("the configuration has no [checkpoint]: say with --dir where the retrain keeps its own")
            }
        };
        let slice = |text: &String| {
            let (name, value) =
                text.split_once('=').with_context(|| format!("`--slice {text}`: expected FEATURE=VALUE"))?;
            Ok((name.to_owned(), value.to_owned()))
        };
        anyhow::ensure!(
            self.confidence > 0.5 && self.confidence < 1.0,
            "`--confidence {}`: expected more than 0.5 and less than 1",
            self.confidence
        );
        anyhow::ensure!((0.0..=10.0).contains(&self.margin), "`--margin {}`: expected 0 to 10", self.margin);
        let request = Request {
            dir,
            from: self.from,
            until: match (&self.through, self.until) {
                (Some(path), _) => Some(end_of(path)?),
                (None, When::Now) => None,
                (None, When::At(time)) => Some(time),
            },
            passes: self.passes,
            warm: self.warm_start.as_deref().map(WarmStart::parse),
            journal: self.journal.clone(),
            promote: match self.promote {
                PromoteWhen::Always => Promote::Always,
                PromoteWhen::IfNotWorse => Promote::IfNotWorse,
                PromoteWhen::Never => Promote::Never,
            },
            rules: Rules { confidence: self.confidence, margin: self.margin, clicks: self.clicks, ..Rules::default() },
            block: self.block,
            slices: self.slices.iter().map(slice).collect::<anyhow::Result<_>>()?,
            patience: self.wait,
            channel: self.channel.clone(),
        };
        let stop = super::stop_on_signal()?;
        let terminal = std::io::stderr().is_terminal() && !self.json;
        let mut progress: Box<dyn Progress> =
            if terminal { Box::new(Bar::new(request.from, request.until)) } else { Box::new(Lines::new(self.json)) };
        let report = retrain::run(&config, &live, &request, &stop, progress.as_mut())?;
        drop(progress);
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            print(&report)?;
        }
        Ok(match report.outcome {
            Outcome::Kept | Outcome::Promoted { .. } => ExitCode::SUCCESS,
            Outcome::Interrupted => ExitCode::from(130),
            Outcome::NotPromoted { .. } => ExitCode::from(NOT_PROMOTED),
            Outcome::Pending { .. } => ExitCode::from(PENDING),
        })
    }
}

/// A bar over the stretch of event time, with rate and time left.
struct Bar {
    bar: ProgressBar,
    from: Option<Time>,
    until: Time,
}

impl Bar {
    fn new(from: Option<Time>, until: Option<Time>) -> Self {
        let style = "{bar:30} {percent:>3} %  {elapsed}, {eta} left  {msg}";
        let bar = ProgressBar::new(1).with_style(ProgressStyle::with_template(style).expect("a template"));
        Self { bar, from, until: until.unwrap_or_else(crate::clock::now) }
    }
}

impl Progress for Bar {
    fn show(&mut self, tick: &Tick) {
        let Some(frontier) = tick.frontier else { return };
        let from = self.from.or(tick.first).unwrap_or(frontier);
        self.bar.set_length((self.until.0 - from.0).max(1) as u64);
        self.bar.set_position((frontier.0 - from.0).max(0) as u64);
        let loss = tick.logloss.map_or(String::new(), |loss| format!(", log loss {loss:.4}"));
        self.bar.set_message(format!("at {frontier}, {:.0} examples/s{loss}", tick.per_second));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

fn print(report: &Report) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let time = |time: Option<Time>| time.map_or("the start of the log".to_owned(), |time| time.to_string());
    writeln!(out, "candidate   lineage {}, from {} to {}", report.lineage, time(report.from), time(report.frontier))?;
    if let Some(Brought { from, rows, vectors, start_cold, gone, dropped_rows, dropped_vectors }) = &report.warm_start {
        writeln!(out, "began with  {rows} rows and {vectors} vectors of {from}")?;
        if !start_cold.is_empty() {
            writeln!(out, "            {} new, which start cold: {}", start_cold.len(), start_cold.join(", "))?;
        }
        if !gone.is_empty() {
            writeln!(out, "            {} gone: {}", gone.len(), gone.join(", "))?;
        }
        if dropped_rows + dropped_vectors > 0 {
            writeln!(out, "            {dropped_rows} rows and {dropped_vectors} vectors of no feature were dropped")?;
        }
    }
    let hours = report.hours_per_minute.map_or(String::new(), |hours| format!(", {hours:.1} hours of log a minute"));
    writeln!(
        out,
        "learned     {} impressions in {:.1} s ({:.0}/s){hours}",
        report.impressions_this_run,
        report.seconds,
        report.impressions_this_run as f64 / report.seconds
    )?;
    if let Some(comparison) = &report.comparison {
        print_comparison(&mut out, comparison)?;
    }
    let (word, what) = match &report.outcome {
        Outcome::Interrupted => ("stopped", "interrupted; the same command goes on".to_owned()),
        Outcome::Kept => ("kept", "it was not to be promoted".to_owned()),
        Outcome::NotPromoted { reason } => ("NOT PROMOTED", reason.clone()),
        Outcome::Promoted { job: Job::TookOver } => ("promoted", "the live job goes on from it".to_owned()),
        Outcome::Promoted { job: Job::AtItsStart } => {
            ("promoted", "no live job was running; one that starts goes on from it".to_owned())
        }
        Outcome::Pending { reason } => ("PENDING", reason.clone()),
    };
    writeln!(out, "{word:<11} {what}")
}

fn print_comparison(out: &mut impl std::io::Write, c: &compare::Report) -> std::io::Result<()> {
    let time = |time: Option<Time>| time.map_or("-".to_owned(), |time| time.to_string());
    writeln!(
        out,
        "compared    on {} examples with {} clicks, {} to {}, {} blocks of time{}",
        c.examples,
        c.clicks,
        time(c.from),
        time(c.until),
        c.blocks,
        if c.blocks_that_differ > 0 {
            format!(" ({} more had other examples)", c.blocks_that_differ)
        } else {
            String::new()
        }
    )?;
    let name = c.slices.iter().map(|slice| slice.name.len()).max().unwrap_or(0).max(5);
    writeln!(
        out,
        "  {:<name$}  {:^19}  {:^15}  {:^15}  log loss, candidate over live",
        "", "NE", "AUC", "calibration"
    )?;
    writeln!(
        out,
        "  {:<name$}  {:>9} {:>9}  {:>7} {:>7}  {:>7} {:>7}",
        "slice", "candidate", "live", "cand.", "live", "cand.", "live"
    )?;
    let figure = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    for slice in &c.slices {
        let (a, b) = (&slice.candidate, &slice.live);
        let percent = |share: f64| format!("{:+.3} %", 100.0 * share);
        let difference = slice.difference.map_or("-".to_owned(), |d| {
            let interval =
                d.interval.map_or(String::new(), |[low, high]| format!(" ({} to {})", percent(low), percent(high)));
            format!("{}{interval}", percent(d.relative))
        });
        writeln!(
            out,
            "  {:<name$}  {:>9} {:>9}  {:>7} {:>7}  {:>7} {:>7}  {difference}",
            slice.name,
            figure(a.normalised_entropy, 5),
            figure(b.normalised_entropy, 5),
            figure(a.auc, 4),
            figure(b.auc, 4),
            figure(a.calibration, 3),
            figure(b.calibration, 3),
        )?;
    }
    let word =
        serde_json::to_value(c.verdict).ok().and_then(|v| Some(v.as_str()?.replace('_', " "))).unwrap_or_default();
    writeln!(out, "verdict     {word}: {}", c.reason)
}
