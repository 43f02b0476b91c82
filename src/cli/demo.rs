//! `tidemill demo`: the whole loop in one process, to be watched.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use humantime_serde::re::humantime;

use crate::app::demo::{self, Figures, Input, Options, Phase, Report, View, thousands};
use crate::app::recorder;
use crate::config::{Config, ModelKind};

/// Demo: watch impressions and clicks become a fresh model that answers requests
///
/// Writes a live stream into files, trains on it, publishes every two seconds, serves, and sends requests all the time,
/// all in this process and in one directory. Ends by itself with a list of promises; the exit code is 1 if one broke.
/// With --data it does the same on real event files, replayed at a multiple of their speed; with --kafka the log is in topics
/// of a Kafka rather than in files.
#[derive(clap::Args, Clone, Debug)]
pub struct Demo {
    /// How long it is live.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(10..=86_400))]
    pub seconds: u64,
    /// Impressions a second of the generated stream.
    #[arg(long, default_value_t = 2000.0, value_parser = positive, conflicts_with = "data")]
    pub rate: f64,
    /// How long ago the generated stream began: what has happened by the start is written at once.
    #[arg(long, default_value = "10s", conflicts_with = "data")]
    pub history: humantime::Duration,
    /// Seed of the generated stream: who likes what.
    #[arg(long, default_value_t = 1, conflicts_with = "data")]
    pub seed: u64,
    /// Model that learns the generated stream: logistic or two_tower. With --data the config says it.
    #[arg(long, default_value = "logistic", value_parser = model, conflicts_with = "data")]
    pub model: ModelKind,
    /// Directory with files impressions* and clicks* (.jsonl, .jsonl.gz, .jsonl.zst) to replay instead.
    #[arg(long, value_name = "DIR", requires = "config")]
    pub data: Option<PathBuf>,
    /// With --data: the training configuration that says how its records are read and which features they have.
    #[arg(short, long, value_name = "FILE", requires = "data")]
    pub config: Option<PathBuf>,
    /// With --config: lay a setting over the file. May be given often.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// With --data: so many times as fast as it happened. Default: so that all of it fits into --seconds.
    #[arg(long, value_parser = positive, requires = "data")]
    pub speed: Option<f64>,
    /// Write to Kafka and read from there, at these brokers (several separated by commas): into two topics of its own, which
    /// it makes and deletes. With --config, `kafka.properties` of the file say how they are reached.
    #[arg(long, value_name = "HOST:PORT")]
    pub kafka: Option<String>,
    /// Publish to this store, a directory or an address such as `s3://bucket/prefix`, which must hold no versions yet; they
    /// stay there. Default: a directory of the demo's.
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// Requests a second.
    #[arg(long, default_value_t = 100.0, value_parser = positive)]
    pub requests: f64,
    /// Candidates in each request.
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=1000))]
    pub candidates: u64,
    /// Write everything to this directory, which must be empty or not there, and leave it. Default: a temporary one that is
    /// removed at the end.
    #[arg(long)]
    pub dir: Option<PathBuf>,
    /// Leave the temporary directory.
    #[arg(long)]
    pub keep: bool,
    /// Show nothing, and print one JSON object at the end.
    #[arg(long)]
    pub json: bool,
}

fn model(text: &str) -> Result<ModelKind, String> {
    let kinds = [ModelKind::Logistic, ModelKind::TwoTower];
    kinds.into_iter().find(|kind| kind.name() == text).ok_or_else(|| "expected logistic or two_tower".to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && number <= 1e9 => Ok(number),
        _ => Err("expected a number above 0 and at most 1e9".to_owned()),
    }
}

impl Demo {
    pub fn run(self) -> anyhow::Result<()> {
        let (dir, mut temporary) = self.directory()?;
        log_to(&dir.join("demo.log"))?;
        let options = self.options(dir.clone())?;
        let metrics = recorder::install()?;
        let stop = super::stop_on_signal()?;
        let mut screen = Screen::new(&options, self.json);
        screen.begin(&dir, temporary.is_some() && !self.keep)?;
        let mut failed = Ok(());
        let ran = demo::run(&options, &stop, move || metrics.render(), &mut |view| {
            if let Err(error) = screen.show(view) {
                failed = Err(error); // whoever read our output has gone; the promises are still worth the exit code
            }
        });
        let kept = ran.as_ref().is_ok_and(|report| report.ok);
        // With nothing but its own log in it, it did not come so far that there is something to look into.
        let begun = std::fs::read_dir(&dir).is_ok_and(|files| files.count() > 1);
        if (self.keep || (!kept && begun))
            && let Some(dir) = temporary.take()
        {
            let _ = dir.keep();
        }
        let left = temporary.is_none();
        let report = match ran {
            Ok(report) => report,
            Err(error) if left => return Err(error).with_context(|| format!("the demo in `{}`", dir.display())),
            Err(error) => return Err(error.into()),
        };
        if self.json {
            println!("{}", serde_json::to_string(&report)?);
        } else {
            failed.and_then(|()| verdict(&report, left, screen.colours()))?;
        }
        let broken = report.promises.iter().filter(|promise| promise.kept == Some(false)).count();
        anyhow::ensure!(report.ok, "promises that broke: {broken}; everything is left in `{}`", dir.display());
        Ok(())
    }

    fn options(&self, dir: PathBuf) -> anyhow::Result<Options> {
        let input = match (&self.data, &self.config) {
            (Some(data), Some(config)) => Input::Files {
                data: data.clone(),
                config: Box::new(Config::load(config, &self.set)?),
                speed: self.speed,
            },
            _ => {
                let Self { rate, history, seed, model, .. } = *self;
                Input::Generated { rate, history: *history, seed, model }
            }
        };
        let length = Duration::from_secs(self.seconds);
        let (kafka, store) = (self.kafka.clone(), self.store.clone());
        let (requests, candidates) = (self.requests, self.candidates as usize);
        Ok(Options { length, dir, input, kafka, store, requests, candidates })
    }

    /// An empty directory, and its guard if it is to be removed.
    fn directory(&self) -> anyhow::Result<(PathBuf, Option<tempfile::TempDir>)> {
        let Some(dir) = &self.dir else {
            let made = tempfile::Builder::new().prefix("tidemill-demo-").tempdir();
            let dir = made.context("cannot make a temporary directory; name one by --dir")?;
            return Ok((dir.path().canonicalize()?, Some(dir)));
        };
        let at = || format!("cannot use `{}`", dir.display());
        std::fs::create_dir_all(dir).with_context(at)?;
        anyhow::ensure!(
            std::fs::read_dir(dir).with_context(at)?.next().is_none(),
            "`{}` is not empty: remove what is in it or choose another --dir",
            dir.display()
        );
        Ok((dir.canonicalize().with_context(at)?, None))
    }
}

/// What would go to stderr goes to a file, away from the panel.
fn log_to(path: &Path) -> anyhow::Result<()> {
    let file = File::create(path).with_context(|| format!("cannot write `{}`", path.display()))?;
    tracing_subscriber::fmt()
        .with_env_filter(super::log_filter())
        .with_writer(Mutex::new(file))
        .with_ansi(false)
        .with_target(false)
        .init();
    Ok(())
}

// ----------------------------------------------------------------------------------------------------------- screen

/// How often a line is printed where there is no terminal, and the panel is drawn where there is one.
const LINE: Duration = Duration::from_secs(5);
const FRAME: Duration = Duration::from_millis(200);

struct Screen {
    style: Style,
    intro: Vec<String>,
    last: Option<(Instant, Phase)>,
    /// Lines of the panel on the terminal.
    drawn: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Style {
    Panel { width: usize },
    Lines,
    Nothing,
}

impl Screen {
    fn new(options: &Options, json: bool) -> Self {
        let intro = match &options.input {
            Input::Generated { rate, history, .. } => format!(
                "A stream of {} impressions a second for {} s, after {:.0} s of history.",
                thousands(*rate as u64),
                options.length.as_secs(),
                history.as_secs_f64(),
            ),
            Input::Files { data, .. } => format!("The events in `{}` are replayed.", data.display()),
        };
        let style = match terminal_size() {
            _ if json => Style::Nothing,
            Some((rows, columns)) if rows > PANEL + 6 + 2 * usize::from(options.kafka.is_some()) && columns >= 60 => {
                Style::Panel { width: columns.min(100) }
            }
            _ => Style::Lines,
        };
        let kafka = options.kafka.as_ref();
        let intro = std::iter::once(intro).chain(
            kafka.map(|brokers| format!("The log is two topics of the Kafka at {brokers}, deleted at the end.")),
        );
        Self { style, intro: intro.collect(), last: None, drawn: 0 }
    }

    fn colours(&self) -> bool {
        matches!(self.style, Style::Panel { .. }) && std::env::var_os("NO_COLOR").is_none()
    }

    fn begin(&mut self, dir: &Path, removed: bool) -> io::Result<()> {
        if self.style == Style::Nothing {
            return Ok(());
        }
        let kept = if removed { ", until it ends" } else { "" };
        self.intro.push(format!("Everything is in {}{kept}.", dir.display()));
        let mut out = io::stdout().lock();
        self.intro.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        out.flush()
    }

    fn show(&mut self, view: &View) -> io::Result<()> {
        let every = match self.style {
            Style::Nothing => return Ok(()),
            Style::Panel { .. } => FRAME,
            Style::Lines => LINE,
        };
        if self.last.is_some_and(|(at, phase)| at.elapsed() < every && phase == view.phase) {
            return Ok(());
        }
        self.last = Some((Instant::now(), view.phase));
        let mut out = io::stdout().lock();
        let Style::Panel { width } = self.style else {
            // Nothing happens between the last two phases.
            return if view.phase == Phase::Done { Ok(()) } else { writeln!(out, "{}", line(view)) };
        };
        // One write within a synchronised update, over what was there: nothing flickers. Lines are not wrapped meanwhile.
        let mut frame = "\x1b[?2026h\x1b[?25l\x1b[?7l".to_owned();
        if self.drawn > 0 {
            frame += &format!("\x1b[{}A", self.drawn);
        }
        let lines = panel(view, width, Paint(self.colours()));
        for line in &lines {
            frame += &format!("\r{line}\x1b[K\n");
        }
        frame += "\x1b[J\x1b[?7h\x1b[?25h\x1b[?2026l";
        self.drawn = lines.len();
        out.write_all(frame.as_bytes())?;
        out.flush()
    }
}

/// Rows and columns, if stdout is a terminal that says so.
fn terminal_size() -> Option<(usize, usize)> {
    if !io::stdout().is_terminal() || std::env::var_os("TERM").is_some_and(|term| term == "dumb") {
        return None;
    }
    let tty = File::open("/dev/tty").ok()?;
    let output = Command::new("stty").arg("size").stdin(tty).stderr(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let mut numbers = text.split_whitespace().filter_map(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

#[derive(Clone, Copy)]
struct Paint(bool);

impl Paint {
    fn with(self, code: &str, text: impl std::fmt::Display) -> String {
        if self.0 { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_string() }
    }

    fn bold(self, text: impl std::fmt::Display) -> String {
        self.with("1", text)
    }

    fn dim(self, text: impl std::fmt::Display) -> String {
        self.with("2", text)
    }

    fn green(self, text: impl std::fmt::Display) -> String {
        self.with("32", text)
    }

    fn cyan(self, text: impl std::fmt::Display) -> String {
        self.with("36", text)
    }

    fn red(self, text: impl std::fmt::Display) -> String {
        self.with("1;31", text)
    }

    fn yellow(self, text: impl std::fmt::Display) -> String {
        self.with("33", text)
    }

    /// A count that should be 0.
    fn none(self, count: u64) -> String {
        if count == 0 { self.green(0) } else { self.red(thousands(count)) }
    }
}

/// Lines of the panel; one more where the log is in Kafka.
const PANEL: usize = 18;
/// Cells of a bar.
const BAR: usize = 24;

fn panel(v: &View, width: usize, paint: Paint) -> Vec<String> {
    let rule = paint.dim("─".repeat(width.saturating_sub(2)));
    let label = |name: &str| format!(" {}", paint.dim(format!("{name:<10}")));
    let more = " ".repeat(11);
    let wide = width >= 96;
    let phase = match v.phase {
        Phase::Live => format!("live, {} left", clock(v.left)),
        Phase::Stopping => "the log has ended; last checkpoint, last snapshot".to_owned(),
        Phase::Verifying => "verifying every version that answered".to_owned(),
        Phase::Done => "done".to_owned(),
    };
    let title = if v.model == ModelKind::TwoTower.name() { "tidemill demo: two towers" } else { "tidemill demo" };
    let room = width.saturating_sub(title.len() + phase.chars().count() + v.url.len() + 8);
    let mut lines = vec![
        format!(" {}   {phase}   {}{}", paint.bold(title), " ".repeat(room), paint.cyan(&v.url)),
        format!(" {rule}"),
    ];

    let rate = |rate: f64| paint.dim(format!("{:>7}/s", thousands(rate.round() as u64)));
    lines.push(format!(
        "{}{:>9} impressions {}   {:>8} clicks {}{}",
        label("log"),
        thousands(v.impressions_written),
        rate(v.impressions_rate),
        thousands(v.clicks_written),
        rate(v.clicks_rate),
        if wide { format!("   {:>6.1} MB", v.bytes_written as f64 / 1e6) } else { String::new() },
    ));
    lines.push(if v.generated {
        format!(
            "{more}{}",
            paint.dim(format!(
                "{} duplicates, {} orphan clicks, {} garbage, {} history",
                thousands(v.duplicates_written),
                thousands(v.orphans_written),
                thousands(v.garbage_written),
                thousands(v.history_written)
            ))
        )
    } else {
        format!("{more}{}", paint.dim(format!("replayed at {} times their speed", thousands(v.speed.round() as u64))))
    });
    if let Some(kafka) = &v.kafka {
        let at = format!("in Kafka at {}: {}", kafka.brokers, kafka.short());
        lines.push(format!("{more}{}", paint.cyan(shortened(&at, width.saturating_sub(more.len() + 1)))));
    }
    lines.push(format!(
        "{}{:>9} impressions {}   {:>8} wait for their window",
        label("trained"),
        thousands(v.trained),
        rate(v.trained_rate),
        thousands(v.waiting),
    ));
    lines.push(String::new());

    lines.extend(learning(v, wide, &label, &more, paint));
    lines.push(String::new());

    let version = |version: Option<u64>| version.map_or_else(|| "none".to_owned(), |v| v.to_string());
    lines.push(match v.version_served {
        None => format!("{}{}", label("model"), paint.yellow("waiting for the first version")),
        Some(served) => format!(
            "{}version {} serves, {} published, {} old, {} swaps, {} refused",
            label("model"),
            paint.bold(served),
            version(v.version_published),
            span(v.version_age.unwrap_or(0.0)),
            v.swaps,
            paint.none(v.refusals),
        ),
    });
    let event_time = if v.generated { "" } else { " of event time" };
    let trained_to = format!("{}{event_time}", v.frontier_age.map_or_else(|| "-".to_owned(), span));
    lines.push(match v.click_to_served {
        None => format!("{}learned up to {trained_to} ago", label("fresh")),
        Some((p50, p99)) => format!(
            "{}click to served: p50 {}, p99 {}   learned up to {trained_to} ago",
            label("fresh"),
            paint.bold(span(p50)),
            span(p99),
        ),
    });
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
    lines.push(format!(
        "{}{:>9} answered    {}   {} failed   p50 {}  p99 {}",
        label("requests"),
        thousands(v.requests_answered),
        rate(v.requests_rate),
        paint.none(v.requests_failed),
        paint.bold(ms(v.latency_p50_ms)),
        ms(v.latency_p99_ms),
    ));
    lines.push(format!(" {rule}"));
    if v.phase == Phase::Done {
        return lines; // nobody listens any more
    }
    lines.push(format!("{}curl -s {}/v1/score \\", label("try"), v.url));
    lines.push(format!("{more}  -d @{}", v.dir.join("request.json").display()));
    lines.push(format!("{more}curl -s {}/readyz", v.url));
    lines
}

fn learning(v: &View, wide: bool, label: &dyn Fn(&str) -> String, more: &str, paint: Paint) -> Vec<String> {
    let Some(f) = v.recent else {
        let wait = paint.yellow("waiting for the first impressions whose window has closed");
        return vec![format!("{}{wait}", label("learning")), String::new(), String::new(), String::new()];
    };
    let share = |from: f64, at: f64, to: f64| ((at - from) / (to - from)).clamp(0.0, 1.0);
    let auc = f.auc.unwrap_or(0.5);
    let best_name = if wide { "best reachable" } else { "best" };
    let (logloss, area) = match f.best.zip(f.best_auc) {
        Some((best, best_auc)) => (
            format!(
                "{} {} {best_name}",
                bar(share(f.constant, f.logloss, best), paint),
                paint.bold(format!("{best:.4}"))
            ),
            format!("{} {} {best_name}", bar(share(0.5, auc, best_auc), paint), paint.bold(format!("{best_auc:.4}"))),
        ),
        None => (
            format!("{} {:.4} half", bar(share(f.constant, f.logloss, f.constant / 2.0), paint), f.constant / 2.0),
            format!("{} 1.0000 perfect", bar(share(0.5, auc, 1.0), paint)),
        ),
    };
    let closed = f.closed.map_or_else(String::new, |closed| {
        format!(
            "{}{}",
            paint.bold(format!("{:.0} %", closed * 100.0)),
            if wide { " of the way to the best" } else { " there" }
        )
    });
    vec![
        format!(
            "{}logloss {}  {} {:.4} {logloss}",
            label("learning"),
            paint.bold(format!("{:.4}", f.logloss)),
            paint.dim("constant"),
            f.constant
        ),
        format!("{more}AUC     {}  {} 0.5000 {area}", paint.bold(format!("{auc:.4}")), paint.dim("chance  ")),
        format!(
            "{more}{:<31} {} {closed}",
            format!("calibration {:.3}  CTR {:.3}", f.calibration, f.ctr),
            paint.green(sparks(&v.curve))
        ),
        format!(
            "{more}{}",
            paint.dim(format!("each predicted before it was learned from; the last {}", thousands(f.examples)))
        ),
    ]
}

/// A bar of [`BAR`] cells, to an eighth of a cell.
fn bar(share: f64, paint: Paint) -> String {
    let eighths = (share * BAR as f64 * 8.0).round() as usize;
    let (full, part) = (eighths / 8, eighths % 8);
    let mut filled = "█".repeat(full);
    if part > 0 {
        filled.push(['▏', '▎', '▍', '▌', '▋', '▊', '▉'][part - 1]);
    }
    let empty = "·".repeat(BAR - full - usize::from(part > 0));
    format!("{}{}", paint.green(filled), paint.dim(empty))
}

/// At most [`BAR`] cells for a curve of shares from its first point to its last.
fn sparks(curve: &[f64]) -> String {
    let cells = curve.len().min(BAR);
    let cell = |i: usize| {
        let (from, to) = (i * curve.len() / cells, (i + 1) * curve.len() / cells);
        let mean = curve[from..to].iter().sum::<f64>() / (to - from) as f64;
        ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'][(mean.clamp(0.0, 0.999) * 8.0) as usize]
    };
    let drawn: String = (0..cells).map(cell).collect();
    drawn + &" ".repeat(BAR - cells)
}

fn line(v: &View) -> String {
    let figures = v.recent.map_or_else(String::new, |Figures { logloss, constant, best, auc, .. }| {
        let best = best.map_or_else(String::new, |best| format!(", best {best:.4}"));
        let auc = auc.map_or_else(String::new, |auc| format!(", AUC {auc:.3}"));
        format!("; logloss {logloss:.4} (constant {constant:.4}{best}){auc}")
    });
    let model = match v.version_served {
        None => "waiting for the first version".to_owned(),
        Some(version) => format!("version {version} serves, {} old", span(v.version_age.unwrap_or(0.0))),
    };
    let fresh = v.click_to_served.map_or_else(String::new, |(p50, _)| format!(", click to served {}", span(p50)));
    let p99 = v.latency_p99_ms.map_or_else(String::new, |ms| format!(", p99 {ms:.1} ms"));
    let phase = match v.phase {
        Phase::Live => "",
        Phase::Stopping => " (stopping)",
        Phase::Verifying => " (verifying)",
        Phase::Done => " (done)",
    };
    format!(
        "{:>4.0} s{phase}: {} impressions and {} clicks written, {} trained{figures}; {model}{fresh}; {} requests, {} failed{p99}",
        v.seconds,
        thousands(v.impressions_written),
        thousands(v.clicks_written),
        thousands(v.trained),
        thousands(v.requests_answered),
        v.requests_failed,
    )
}

fn verdict(report: &Report, left: bool, colours: bool) -> io::Result<()> {
    let paint = Paint(colours);
    let mut out = io::stdout().lock();
    writeln!(out)?;
    for promise in &report.promises {
        let mark = match promise.kept {
            Some(true) => paint.green("OK    "),
            Some(false) => paint.red("BROKEN"),
            None => paint.yellow("-     "),
        };
        writeln!(out, " {mark}  {}", paint.bold(promise.name))?;
        writeln!(out, "         {}", promise.found)?;
    }
    let ms = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms"));
    let fresh = report.last.click_to_served.map_or_else(
        || "-".to_owned(),
        |(p50, p99)| format!("p50 {}, p99 {} ({} clicks)", span(p50), span(p99), thousands(report.last.clicks_served)),
    );
    let c = &report.training.counts;
    writeln!(out)?;
    writeln!(
        out,
        "         met on the way: {} late, {} twice, {} too late, {} unreadable\n         \
         clicks: {} orphans, {} outside their window, {} twice",
        c.late, c.duplicates, c.too_late, c.rejected, c.clicks_orphan, c.clicks_outside, c.clicks_duplicate
    )?;
    writeln!(out, "         from a click to weights that serve: {fresh}")?;
    let (p50, p99) = (ms(report.latency_p50_ms), ms(report.latency_p99_ms));
    writeln!(out, "         answers, from when each was due: p50 {p50}, p99 {p99}")?;
    if left {
        let dir = report.last.dir.display();
        writeln!(out, "         left in {dir}; look into it by")?;
        writeln!(out, "           tidemill snapshots list --store {dir}/snapshots")?;
    } else {
        let log = if report.last.kafka.is_some() { "" } else { "log, " };
        writeln!(out, "         --keep leaves {log}config, model and snapshots to look into")?;
    }
    if let Some(why) = &report.topics_left {
        writeln!(out, "         {} {why}", paint.red("its topics were not deleted:"))?;
    }
    let broken = report.promises.iter().filter(|promise| promise.kept == Some(false)).count();
    let judged = report.promises.iter().filter(|promise| promise.kept.is_some()).count();
    let last = match broken {
        0 if judged == report.promises.len() => paint.green(format!("All {judged} promises were kept.")),
        0 => {
            paint.green(format!("{judged} promises were kept, {} could not be judged.", report.promises.len() - judged))
        }
        _ => paint.red(format!("{broken} of {} promises broke.", report.promises.len())),
    };
    writeln!(out, "\n {last}")
}

/// As much of a text as there is room for.
fn shortened(text: &str, room: usize) -> String {
    match text.char_indices().nth(room) {
        None => text.to_owned(),
        Some(_) => text.chars().take(room.saturating_sub(1)).chain(['…']).collect(),
    }
}

/// Minutes and seconds.
fn clock(left: Duration) -> String {
    let seconds = left.as_secs_f64().ceil() as u64;
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

/// A length of time in the unit that fits.
fn span(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s if s < 172_800.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.1} d", s / 86_400.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_as_people_read_them() {
        assert_eq!([0, 999, 1000, 1_234_567].map(thousands), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(
            [0.25, 119.0, 600.0, 7_200.0, 604_800.0].map(span),
            ["0.2 s", "119.0 s", "10.0 min", "2.0 h", "7.0 d"]
        );
        assert_eq!(clock(Duration::from_millis(61_001)), "1:02");
    }

    #[test]
    fn bars_and_curves_keep_their_length() {
        for share in [0.0, 0.01, 0.5, 0.999, 1.0] {
            assert_eq!(bar(share, Paint(false)).chars().count(), BAR, "{share}");
        }
        for points in [0, 1, 5, 24, 25, 1000] {
            assert_eq!(sparks(&vec![1.5; points]).chars().count(), BAR, "{points}");
        }
        assert_eq!(sparks(&[-1.0, 0.5, 1.0]).trim_end(), "▁▅█");
    }

    #[test]
    fn the_panel_has_the_lines_it_says_and_fits_a_terminal() {
        let figures = Figures {
            examples: 20_000,
            ctr: 0.1,
            logloss: 0.28,
            constant: 0.32,
            best: Some(0.25),
            closed: Some(0.57),
            calibration: 1.0,
            auc: Some(0.76),
            best_auc: Some(0.82),
        };
        let mut view = View {
            phase: Phase::Live,
            left: Duration::from_secs(30),
            seconds: 3600.0,
            dir: "/tmp/tidemill-demo-abcdef".into(),
            url: "http://127.0.0.1:65535".into(),
            generated: true,
            model: ModelKind::Logistic.name(),
            kafka: None,
            speed: 1.0,
            impressions_written: 999_999,
            clicks_written: 999_999,
            history_written: 22_000,
            duplicates_written: 55_555,
            orphans_written: 9_999,
            garbage_written: 9_999,
            bytes_written: 2_500_000_000,
            impressions_rate: 99_999.0,
            clicks_rate: 9_999.0,
            trained: 999_999,
            trained_rate: 99_999.0,
            waiting: 111_111,
            frontier_age: Some(5.7),
            recent: Some(figures),
            curve: vec![0.5; 100],
            version_published: Some(1234),
            version_served: Some(1234),
            version_age: Some(1.5),
            swaps: 1234,
            refusals: 0,
            click_to_served: Some((6.9, 8.1)),
            clicks_served: 12,
            requests_answered: 999_999,
            requests_failed: 0,
            requests_before_first: 10,
            requests_rate: 100.0,
            latency_p50_ms: Some(0.4),
            latency_p99_ms: Some(12.3),
        };
        let kafka = demo::InKafka {
            brokers: "kafka-1.example.com:9092,kafka-2.example.com:9092".into(),
            topics: ["impressions", "clicks"].map(|stream| format!("tidemill-demo-1767225600000-4711-{stream}")).into(),
        };
        for (width, kafka) in [(80, None), (100, Some(kafka.clone())), (80, Some(kafka)), (100, None)] {
            view.kafka = kafka;
            let lines = panel(&view, width, Paint(false));
            assert_eq!(lines.len(), PANEL + usize::from(view.kafka.is_some()));
            assert_eq!(lines.concat().contains("in Kafka at kafka-1.example.com:9092"), view.kafka.is_some());
            assert!(lines.iter().all(|line| line.chars().count() <= width), "{}", lines.join("\n"));
            assert!(!lines.concat().contains('\x1b'));
            if width == 100 {
                (view.recent, view.version_served, view.click_to_served, view.frontier_age) = (None, None, None, None);
            }
        }
    }
}
