//! `tidemill train`: the long-lived job, or a bounded stretch of it.

use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ConfigArgs;
use crate::app::control::{Control, Why};
use crate::app::job::Journal;
use crate::app::train::{self, Options, Progress, Summary, Tick, Until};
use crate::event::Time;
use crate::merge::WaitReason;

/// Train: join impressions and clicks, learn in their order, checkpoint and publish
///
/// Without --until-end or --until it follows growing files and topics until it gets SIGTERM or Ctrl-C, writes a last checkpoint and
/// snapshot, and goes on from there the next time.
#[derive(clap::Args, Clone, Debug)]
pub struct Train {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Read to the end that files and topics have now, then stop.
    #[arg(long, conflicts_with = "until")]
    pub until_end: bool,
    /// Train impressions before this time (RFC 3339 or Unix milliseconds), reading clicks one window further, then stop.
    #[arg(long, value_name = "TIME", value_parser = super::parse_time)]
    pub until: Option<Time>,
    /// With --until: wait for files to grow, rather than stop where they end.
    #[arg(long, requires = "until")]
    pub follow: bool,
    /// Where Kafka's retention has dropped records before they were trained: go on with the first that is left, and say in
    /// the journal what was skipped. Without it the job stops there.
    #[arg(long)]
    pub skip_lost: bool,
    /// Start anew from the log and decide again what the runtime of an earlier run over it decided (which records were
    /// overtaken, or rejected by the clock): FILE is a manifest of that run, from its snapshot store.
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Write `id,prediction,label` of every example, predicted before it was learned from.
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,
    /// Print one JSON object at the end instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Train {
    pub fn run(self) -> anyhow::Result<()> {
        let checked = self.config.load()?.check(self.until)?;
        if checked.config.checkpoint.is_none() {
            tracing::warn!("no [checkpoint] in the config: this run starts anew and cannot be resumed");
        }
        let until = match self.until {
            Some(time) => Until::Time(time),
            None if self.until_end => Until::End,
            None => Until::Stopped,
        };
        let mut options = Options {
            follow: self.follow,
            skip_lost: self.skip_lost,
            journal: self.journal.clone().map(Journal::Manifest),
            predictions: self.predictions.clone(),
            config: Some((self.config.config.clone(), self.config.set.clone())),
            ..Options::until(until)
        };
        if let Some(listen) = checked.config.telemetry.listen {
            let control = Arc::new(Control::new(&checked.config.job.name));
            crate::app::exporter::start(listen, Arc::clone(&control))?;
            options.control = Some(control);
        }
        let stop = super::stop_on_signal()?;
        let mut progress = Lines::new(self.json);
        let summary = train::run(&checked, &options, &stop, &mut progress)?;
        progress.done();
        if self.json {
            println!("{}", serde_json::to_string(&summary)?);
        } else {
            print_table(&summary)?;
        }
        anyhow::ensure!(
            summary.impression_gap == 0 && summary.click_gap == 0,
            "records are not accounted for (impressions {}, clicks {}); this is a bug of tidemill",
            summary.impression_gap,
            summary.click_gap
        );
        Ok(())
    }
}

/// Progress on stderr: one line that renews itself on a terminal, else a line every ten seconds.
pub(super) struct Lines {
    terminal: bool,
    quiet: bool,
    last: Option<Instant>,
}

impl Lines {
    pub(super) fn new(quiet: bool) -> Self {
        Self { terminal: std::io::stderr().is_terminal(), quiet, last: None }
    }

    pub(super) fn done(&self) {
        if self.terminal && !self.quiet && self.last.is_some() {
            eprintln!();
        }
    }
}

impl Progress for Lines {
    fn show(&mut self, tick: &Tick) {
        let due = self.terminal || self.last.is_none_or(|last| last.elapsed() >= Duration::from_secs(10));
        if self.quiet || !due {
            return;
        }
        self.last = Some(Instant::now());
        let figure = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.4}"));
        let frontier = tick.frontier.map_or("-".to_owned(), |time| time.to_string());
        let version = tick.version.map_or("-".to_owned(), |v| format!("v{v}"));
        let held = |what: &str| format!(", held: {what}; {} impressions wait", tick.impressions_waiting);
        let wait = match (tick.held, tick.waiting_for) {
            (Some(Why::ClickSilence), _) => held("the click stream is silent"),
            (Some(Why::ClickStalled), _) => held("a click partition has stalled"),
            (Some(Why::CtrJump), _) => held("the click-through rate has jumped"),
            (None, Some(WaitReason::Impressions)) => ", waiting for impressions".to_owned(),
            (None, Some(WaitReason::Idle)) => ", idle".to_owned(),
            (None, Some(_)) => ", waiting for clicks".to_owned(),
            (None, None) => String::new(),
        };
        let line = format!(
            "at {frontier}: {} impressions, {} examples, {:.0}/s, logloss {}, AUC {}, snapshot {version}{wait}",
            tick.impressions,
            tick.examples,
            tick.per_second,
            figure(tick.logloss),
            figure(tick.auc),
        );
        if self.terminal {
            eprint!("\r\x1b[2K{line}");
            let _ = std::io::stderr().flush();
        } else {
            eprintln!("{line}");
        }
    }
}

fn print_table(s: &Summary) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let figure = |value: Option<f64>, digits: usize| value.map_or("-".to_owned(), |v| format!("{v:.digits$}"));
    let (c, m) = (&s.counts, &s.metrics);
    let mut row = |name: &str, value: String| writeln!(out, "  {name:<26} {value}");
    row("job", format!("{} ({}{})", s.job, s.ended_by, if s.resumed { ", resumed" } else { "" }))?;
    row("frontier", s.frontier.map_or("-".into(), |time| time.to_string()))?;
    row("impressions released", c.impressions.to_string())?;
    row("  positive + negative", format!("{} + {}", c.positives, c.negatives))?;
    row(
        "  not learned from",
        format!(
            "{} sampled out, {} duplicate, {} too late, {} rejected, {} quarantined{}",
            c.sampled_out,
            c.duplicates,
            c.too_late,
            c.rejected,
            c.quarantined,
            if c.before_start > 0 { format!(", {} before the start", c.before_start) } else { String::new() }
        ),
    )?;
    row("  late / windows cut", format!("{} / {}", c.late, c.windows_cut))?;
    row("clicks placed", c.clicks.to_string())?;
    row("  attributed", c.clicks_attributed.to_string())?;
    row(
        "  not attributed",
        format!(
            "{} duplicate, {} missed, {} outside, {} orphan, {} rejected, {} waiting",
            c.clicks_duplicate, c.clicks_missed, c.clicks_outside, c.clicks_orphan, c.clicks_rejected, s.clicks_waiting
        ),
    )?;
    row("  coverage", figure(s.click_coverage, 4))?;
    row("conservation gap", format!("{} impressions, {} clicks", s.impression_gap, s.click_gap))?;
    row("progressive logloss", format!("{} (model age zero)", figure(m.logloss, 5)))?;
    row("  normalised entropy", figure(m.normalised_entropy, 5))?;
    row("  AUC", figure(m.auc, 5))?;
    row("  calibration / CTR", format!("{} / {}", figure(m.calibration, 4), figure(m.ctr, 5)))?;
    row("examples", format!("{} in {} batches, {} rows", s.examples, s.batches, s.rows))?;
    row(
        "speed",
        format!(
            "{:.2} s, {:.0} examples/s, {:.0} impressions/s",
            s.seconds, s.examples_per_second, s.impressions_per_second
        ),
    )?;
    row("snapshot", s.snapshot_version.map_or("none".into(), |version| format!("version {version}")))?;
    row("model digest", s.model_digest.clone())?;
    row("order digest", s.order_digest.clone())?;
    let worst = |rates: &std::collections::BTreeMap<String, f64>| {
        let mut rates: Vec<_> = rates.iter().collect();
        rates.sort_by(|a, b| b.1.total_cmp(a.1).then(a.0.cmp(b.0)));
        let rates: Vec<_> = rates.iter().take(5).map(|(name, rate)| format!("{name} {rate:.4}")).collect();
        if rates.is_empty() { "none".to_owned() } else { rates.join(", ") }
    };
    row("most missing", worst(&s.missing_rate))?;
    row("most new ids", worst(&s.new_id_rate))
}
