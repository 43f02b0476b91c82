//! `tidemill generate`: writes a synthetic stream with a known truth to a directory or to Kafka.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::Context as _;
use crossbeam_channel::Sender;

use humantime_serde::re::humantime::Duration;

use super::ConfigArgs;
use super::{parse_speed, parse_time};
use crate::app::topics::{Pace, Speed, Ticker, Topics};
use crate::event::{Stream, Time};
use crate::generate::{Generator, Settings, Stats, What, write_hex};

/// Write a synthetic stream of impressions and clicks, with its truth
///
/// Writes `impressions-NNN.jsonl` and `clicks-NNN.jsonl` (lines in order of arrival), `truth.csv` (id, p = probability of
/// a click inside the window, y = was there one) and `stats.json` (counts, best reachable log loss and AUC) to --out.
/// Same options, same bytes, on every machine.
///
/// With `--to kafka` impressions and clicks go to the topics of the job that -c names, in order of arrival; the key of a
/// message is the impression's id, its timestamp the moment of writing. What else there is goes to --out, if it is given.
#[derive(clap::Args, Clone, Debug)]
pub struct Generate {
    /// Directory to write to; made if it is not there, refused if it holds a generated stream.
    #[arg(long, value_name = "DIR", required_unless_present = "to", required_if_eq("to", "files"))]
    pub out: Option<PathBuf>,
    /// Where impressions and clicks go. Default: files.
    #[arg(long)]
    pub to: Option<To>,
    /// With `--to kafka`: configuration of the job whose topics are written to.
    #[arg(short, long, value_name = "FILE", required_if_eq("to", "kafka"))]
    pub config: Option<PathBuf>,
    /// With --config: lay a setting over the file. May be given often.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "config")]
    pub set: Vec<String>,
    /// With `--to kafka`: `max`: as fast as the brokers take it; 1: as it happens; 60: a minute a second.
    #[arg(long, value_name = "N", default_value = "max", value_parser = parse_speed, requires = "config")]
    pub speed: Speed,
    /// Seed of everything.
    #[arg(long, default_value_t = Settings::default().seed)]
    pub seed: u64,
    /// Distinct impressions; duplicates and garbage come on top.
    #[arg(long, short = 'n', default_value_t = Settings::default().impressions)]
    pub impressions: u64,
    #[arg(long, default_value_t = Settings::default().users)]
    pub users: u64,
    #[arg(long, default_value_t = Settings::default().items)]
    pub items: u64,
    #[arg(long, default_value_t = Settings::default().categories)]
    pub categories: u64,
    /// Exponent of the users' Zipf law.
    #[arg(long, default_value_t = Settings::default().user_skew)]
    pub user_skew: f64,
    /// Exponent of the items' Zipf law.
    #[arg(long, default_value_t = Settings::default().item_skew)]
    pub item_skew: f64,
    /// Event time of the first impression: RFC 3339 or Unix milliseconds.
    #[arg(long, default_value_t = Settings::default().start, value_parser = parse_time)]
    pub start: Time,
    /// Impressions per second of event time.
    #[arg(long, default_value_t = Settings::default().rate)]
    pub rate: f64,
    /// Mean probability of a click, whenever it comes.
    #[arg(long, default_value_t = Settings::default().ctr)]
    pub ctr: f64,
    /// Days of event time in which tastes turn once around.
    #[arg(long, default_value_t = Settings::default().drift_days)]
    pub drift_days: f64,
    /// Median of the log-normal click delay.
    #[arg(long, default_value = "15s")]
    pub delay_median: Duration,
    /// Sigma of the logarithm of the click delay.
    #[arg(long, default_value_t = Settings::default().delay_sigma)]
    pub delay_sigma: f64,
    /// Clicks later than this after their impression are written, but are no positives of the truth.
    #[arg(long, default_value = "30m")]
    pub window: Duration,
    /// How long after its event time a record that is not late arrives at most.
    #[arg(long, default_value = "2s")]
    pub disorder: Duration,
    /// Share of records that arrive after more than --disorder (up to five times that and a second).
    #[arg(long, default_value_t = Settings::default().late)]
    pub late: f64,
    /// Share of records that arrive twice.
    #[arg(long, default_value_t = Settings::default().duplicates)]
    pub duplicates: f64,
    /// Share of clicks that belong to no impression.
    #[arg(long, default_value_t = Settings::default().orphans)]
    pub orphans: f64,
    /// Share of lines that cannot be read as a record.
    #[arg(long, default_value_t = Settings::default().garbage)]
    pub garbage: f64,
    /// Files per stream; a user's records share one. A topic has the partitions that it has.
    #[arg(long, default_value_t = Settings::default().partitions)]
    pub partitions: u32,
    /// Compress with zstd.
    #[arg(long, conflicts_with = "gz")]
    pub zst: bool,
    /// Compress with gzip.
    #[arg(long)]
    pub gz: bool,
}

/// Where a generated stream goes.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum To {
    Files,
    Kafka,
}

impl Generate {
    pub fn run(self) -> anyhow::Result<()> {
        // A directory that is not complete is of no use, a topic is.
        let stop = if self.to == Some(To::Kafka) { super::stop_on_signal()? } else { Default::default() };
        let stats = self.write(&stop)?;
        let text = serde_json::to_string_pretty(&stats)?;
        println!("{text}");
        Ok(())
    }

    /// Writes the stream, or as much of it as there is when `stop` is set, and gives its statistics.
    fn write(&self, stop: &AtomicBool) -> anyhow::Result<Stats> {
        let settings = self.settings();
        let partitions = settings.partitions as usize;
        let mut generator = Generator::new(settings)?;
        let mut topics = self.topics()?;
        // Partition p of stream s is file s * partitions + p; the last one is the truth.
        let mut names = Vec::new();
        if topics.is_none() {
            for stream in [Stream::Impressions, Stream::Clicks] {
                names.extend((0..partitions).map(|p| format!("{}-{p:03}.jsonl", stream.name())));
            }
        }
        let truth = names.len();
        names.push("truth.csv".to_owned());
        let mut files = self.out.as_ref().map(|out| Files::create(out, &names, self.coding())).transpose()?;
        if let Some(files) = &mut files {
            files.blocks[truth].extend_from_slice(b"id,p,y\n");
        }

        let (mut pace, mut ticker) = (Pace::new(self.speed), Ticker::start());
        for event in generator.by_ref() {
            if let Some(topics) = &mut topics {
                // What was drawn is written also when it is stopped, so that the statistics hold.
                while !stop.load(Ordering::Relaxed) && !pace.is_due(event.arrival) {}
                topics.write_event(&event)?;
                if ticker.ticks() {
                    eprintln!("{}", topics.written);
                }
            }
            if let Some(files) = &mut files {
                let mut at = truth;
                if topics.is_none() {
                    at = event.stream as usize * partitions + event.partition as usize;
                    event.write_line(&mut files.blocks[at]);
                }
                if let (What::Impression { impression, truth: known }, false) = (&event.what, event.copy) {
                    let block = &mut files.blocks[truth];
                    write_hex(block, impression.id);
                    block.push(b',');
                    block.extend_from_slice(ryu::Buffer::new().format(known.p).as_bytes());
                    block.extend_from_slice(if known.positive { b",1\n" } else { b",0\n" });
                }
                if !files.pass_on(at) || !files.pass_on(truth) {
                    break; // the writer has failed and says why below
                }
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        if let Some(topics) = &mut topics {
            topics.flush()?;
        }
        let stats = generator.stats();
        if let Some(files) = files {
            files.finish(&stats)?;
        }
        Ok(stats)
    }

    /// The topics to write to, if it is to Kafka.
    fn topics(&self) -> anyhow::Result<Option<Topics>> {
        let (Some(To::Kafka), Some(config)) = (self.to, &self.config) else {
            anyhow::ensure!(self.config.is_none(), "`--config` names the topics of `--to kafka`; files need none");
            return Ok(None);
        };
        anyhow::ensure!(
            self.partitions == Settings::default().partitions,
            "`--partitions` {} is for files: in Kafka the key decides, and a topic has the partitions that it has",
            self.partitions
        );
        let config = ConfigArgs { config: config.clone(), set: self.set.clone() }.load()?.check(None)?;
        Ok(Some(Topics::open(&config, &[Stream::Impressions, Stream::Clicks], "generate")?))
    }

    fn coding(&self) -> Coding {
        match (self.zst, self.gz) {
            (true, _) => Coding::Zst,
            (_, true) => Coding::Gz,
            _ => Coding::Plain,
        }
    }

    fn settings(&self) -> Settings {
        let ms = |d: Duration| i64::try_from(d.as_millis()).unwrap_or(i64::MAX);
        Settings {
            seed: self.seed,
            impressions: self.impressions,
            users: self.users,
            items: self.items,
            categories: self.categories,
            user_skew: self.user_skew,
            item_skew: self.item_skew,
            start: self.start,
            rate: self.rate,
            ctr: self.ctr,
            drift_days: self.drift_days,
            delay_median: self.delay_median.as_secs_f64(),
            delay_sigma: self.delay_sigma,
            window: ms(self.window),
            disorder: ms(self.disorder),
            late: self.late,
            duplicates: self.duplicates,
            orphans: self.orphans,
            garbage: self.garbage,
            partitions: self.partitions,
        }
    }
}

/// The files of a directory, written by a thread of their own: compressing is slower than generating.
struct Files {
    /// By file, what was not handed over yet.
    blocks: Vec<Vec<u8>>,
    full: Sender<(usize, Vec<u8>)>,
    writer: thread::JoinHandle<anyhow::Result<()>>,
    stats: PathBuf,
}

impl Files {
    fn create(out: &Path, names: &[String], coding: Coding) -> anyhow::Result<Self> {
        let stats = out.join("stats.json");
        anyhow::ensure!(
            !stats.exists(),
            "`{}` already holds a generated stream: remove it or choose another --out",
            out.display()
        );
        std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        let mut files = names.iter().map(|name| Output::create(out, name, coding)).collect::<Result<Vec<_>, _>>()?;
        let (full, to_write) = crossbeam_channel::bounded::<(usize, Vec<u8>)>(16);
        let writer = thread::Builder::new().name("writer".into()).spawn(move || -> anyhow::Result<()> {
            for (at, block) in to_write {
                files[at].write(&block)?;
            }
            files.into_iter().try_for_each(Output::finish)
        })?;
        let blocks = names.iter().map(|_| Vec::with_capacity(BLOCK + 1024)).collect();
        Ok(Self { blocks, full, writer, stats })
    }

    /// Hands a file's block over if it is full; false if nobody takes it.
    fn pass_on(&mut self, at: usize) -> bool {
        let block = &mut self.blocks[at];
        block.len() < BLOCK || self.full.send((at, std::mem::replace(block, Vec::with_capacity(BLOCK + 1024)))).is_ok()
    }

    fn finish(self, stats: &Stats) -> anyhow::Result<()> {
        for block in self.blocks.into_iter().enumerate() {
            let _ = self.full.send(block); // the writer says below why it takes nothing
        }
        drop(self.full);
        self.writer.join().map_err(|_| anyhow::anyhow!("the writer thread panicked"))??;
        let text = serde_json::to_string_pretty(stats)? + "\n";
        std::fs::write(&self.stats, text).with_context(|| format!("cannot write `{}`", self.stats.display()))
    }
}

/// Bytes of a file that travel to the writer together.
const BLOCK: usize = 256 * 1024;

#[derive(Clone, Copy)]
enum Coding {
    Plain,
    Gz,
    Zst,
}

/// One file of the stream.
struct Output {
    path: PathBuf,
    sink: Sink,
}

enum Sink {
    Plain(BufWriter<File>),
    Gz(flate2::write::GzEncoder<BufWriter<File>>),
    Zst(zstd::Encoder<'static, BufWriter<File>>),
}

impl Output {
    fn create(dir: &Path, name: &str, coding: Coding) -> anyhow::Result<Self> {
        let ending = match coding {
            Coding::Plain => "",
            Coding::Gz => ".gz",
            Coding::Zst => ".zst",
        };
        let path = dir.join(format!("{name}{ending}"));
        let file = File::create(&path).with_context(|| format!("cannot create `{}`", path.display()))?;
        let file = BufWriter::with_capacity(BLOCK, file);
        let sink = match coding {
            Coding::Plain => Sink::Plain(file),
            Coding::Gz => Sink::Gz(flate2::write::GzEncoder::new(file, flate2::Compression::fast())),
            Coding::Zst => Sink::Zst(zstd::Encoder::new(file, 3)?),
        };
        Ok(Self { path, sink })
    }

    fn write(&mut self, block: &[u8]) -> anyhow::Result<()> {
        match &mut self.sink {
            Sink::Plain(sink) => sink.write_all(block),
            Sink::Gz(sink) => sink.write_all(block),
            Sink::Zst(sink) => sink.write_all(block),
        }
        .with_context(|| format!("cannot write `{}`", self.path.display()))
    }

    fn finish(self) -> anyhow::Result<()> {
        let end = || -> std::io::Result<()> {
            match self.sink {
                Sink::Plain(sink) => sink,
                Sink::Gz(sink) => sink.finish()?,
                Sink::Zst(sink) => sink.finish()?,
            }
            .flush()
        };
        end().with_context(|| format!("cannot write `{}`", self.path.display()))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        generate: Generate,
    }

    fn generate(dir: &Path, more: &[&str]) -> anyhow::Result<Stats> {
        let out = dir.to_str().unwrap();
        let line =
            ["generate", "-n", "3000", "--partitions", "2", "--duplicates", "0.1", "--garbage", "0.05", "--out", out];
        Line::parse_from(line.iter().chain(more)).generate.write(&AtomicBool::new(false))
    }

    fn read(dir: &Path, name: &str) -> String {
        let mut bytes = Vec::new();
        for ending in ["", ".gz", ".zst"] {
            let Ok(file) = File::open(dir.join(format!("{name}{ending}"))) else { continue };
            match ending {
                ".gz" => flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap(),
                ".zst" => zstd::Decoder::new(file).unwrap().read_to_end(&mut bytes).unwrap(),
                _ => (&file).read_to_end(&mut bytes).unwrap(),
            };
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    #[test]
    fn the_files_hold_what_the_statistics_say_however_they_are_compressed() {
        let dir = tempfile::tempdir().unwrap();
        let plain = dir.path().join("plain");
        let stats = generate(&plain, &[]).unwrap();
        let written: Stats = serde_json::from_str(&read(&plain, "stats.json")).unwrap();
        assert_eq!(written, stats);

        let count = |name: &str| read(&plain, name).lines().count() as u64;
        assert_eq!(
            count("impressions-000.jsonl") + count("impressions-001.jsonl"),
            stats.impressions + stats.duplicate_impressions + stats.garbage_impressions
        );
        assert_eq!(
            count("clicks-000.jsonl") + count("clicks-001.jsonl"),
            stats.clicks + stats.duplicate_clicks + stats.garbage_clicks + stats.orphans
        );
        let truth = read(&plain, "truth.csv");
        assert_eq!(truth.lines().count() as u64, stats.impressions + 1);
        assert_eq!(truth.lines().filter(|line| line.ends_with(",1")).count() as u64, stats.positives);
        let p: f64 = truth.lines().skip(1).map(|l| l.split(',').nth(1).unwrap().parse::<f64>().unwrap()).sum();
        assert!((p / stats.positives as f64 - 1.0).abs() < 0.25, "{p}");

        for coding in ["--zst", "--gz"] {
            let packed = dir.path().join(coding);
            assert_eq!(generate(&packed, &[coding]).unwrap(), stats);
            for name in ["impressions-000.jsonl", "impressions-001.jsonl", "clicks-001.jsonl", "truth.csv"] {
                assert_eq!(read(&packed, name), read(&plain, name), "{coding} {name}");
            }
        }
    }

    #[test]
    fn a_directory_that_holds_a_stream_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        generate(dir.path(), &[]).unwrap();
        let refused = generate(dir.path(), &[]).unwrap_err().to_string();
        assert!(refused.contains("already holds a generated stream"), "{refused}");
    }

    #[test]
    fn start_takes_both_ways_of_writing_a_time() {
        assert_eq!(parse_time("1767225600000"), Ok(Time(1_767_225_600_000)));
        assert_eq!(parse_time("2026-01-01T00:00:00Z"), Ok(Time(1_767_225_600_000)));
        assert!(parse_time("tomorrow").is_err());
    }
}
