//! `tidemill generate`: writes a synthetic stream with a known truth to a directory.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::Context as _;

use humantime_serde::re::humantime::Duration;

use crate::event::{Stream, Time};
use crate::generate::{Generator, Settings, Stats, What, write_hex};

/// Write a synthetic stream of impressions and clicks, with its truth
///
/// Writes `impressions-NNN.jsonl` and `clicks-NNN.jsonl` (lines in order of arrival), `truth.csv` (id, p = probability of
/// a click inside the window, y = was there one) and `stats.json` (counts, best reachable log loss and AUC) to --out.
/// Same options, same bytes, on every machine.
#[derive(clap::Args, Clone, Debug)]
pub struct Generate {
    /// Directory to write to; made if it is not there, refused if it holds a generated stream.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
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
    /// Files per stream; a user's records share one.
    #[arg(long, default_value_t = Settings::default().partitions)]
    pub partitions: u32,
    /// Compress with zstd.
    #[arg(long, conflicts_with = "gz")]
    pub zst: bool,
    /// Compress with gzip.
    #[arg(long)]
    pub gz: bool,
}

impl Generate {
    pub fn run(self) -> anyhow::Result<()> {
        let stats = self.write()?;
        let text = serde_json::to_string_pretty(&stats)?;
        println!("{text}");
        Ok(())
    }

    /// Writes the stream and gives its statistics.
    fn write(&self) -> anyhow::Result<Stats> {
        let settings = self.settings();
        let partitions = settings.partitions as usize;
        let mut generator = Generator::new(settings)?;
        let stats_path = self.out.join("stats.json");
        anyhow::ensure!(
            !stats_path.exists(),
            "`{}` already holds a generated stream: remove it or choose another --out",
            self.out.display()
        );
        std::fs::create_dir_all(&self.out).with_context(|| format!("cannot make `{}`", self.out.display()))?;

        let coding = if self.zst {
            Coding::Zst
        } else if self.gz {
            Coding::Gz
        } else {
            Coding::Plain
        };
        // Partition p of stream s is file s * partitions + p; the last one is the truth.
        let mut files = Vec::new();
        for stream in [Stream::Impressions, Stream::Clicks] {
            for p in 0..partitions {
                files.push(Output::create(&self.out, &format!("{}-{p:03}.jsonl", stream.name()), coding)?);
            }
        }
        files.push(Output::create(&self.out, "truth.csv", coding)?);
        let truth = files.len() - 1;

        let mut blocks: Vec<Vec<u8>> = files.iter().map(|_| Vec::with_capacity(BLOCK + 1024)).collect();
        blocks[truth].extend_from_slice(b"id,p,y\n");
        // Compressing is slower than generating, so it has its own thread.
        let (full, to_write) = crossbeam_channel::bounded::<(usize, Vec<u8>)>(16);
        let writer = thread::Builder::new().name("writer".into()).spawn(move || -> anyhow::Result<()> {
            for (at, block) in to_write {
                files[at].write(&block)?;
            }
            files.into_iter().try_for_each(Output::finish)
        })?;
        let send = |at: usize, block: &mut Vec<u8>| {
            full.send((at, std::mem::replace(block, Vec::with_capacity(BLOCK + 1024)))).is_ok()
        };
        'events: for event in generator.by_ref() {
            let at = event.stream as usize * partitions + event.partition as usize;
            event.write_line(&mut blocks[at]);
            if blocks[at].len() >= BLOCK && !send(at, &mut blocks[at]) {
                break 'events; // the writer has failed and says why below
            }
            if let (What::Impression { impression, truth: known }, false) = (&event.what, event.copy) {
                let block = &mut blocks[truth];
                write_hex(block, impression.id);
                block.push(b',');
                block.extend_from_slice(ryu::Buffer::new().format(known.p).as_bytes());
                block.extend_from_slice(if known.positive { b",1\n" } else { b",0\n" });
                if block.len() >= BLOCK && !send(truth, block) {
                    break 'events;
                }
            }
        }
        for (at, block) in blocks.iter_mut().enumerate() {
            let _ = send(at, block); // as above
        }
        drop(full);
        writer.join().map_err(|_| anyhow::anyhow!("the writer thread panicked"))??;

        let stats = generator.stats();
        let text = serde_json::to_string_pretty(&stats)? + "\n";
        std::fs::write(&stats_path, text).with_context(|| format!("cannot write `{}`", stats_path.display()))?;
        Ok(stats)
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

pub(super) fn parse_time(text: &str) -> Result<Time, String> {
    if let Ok(ms) = text.parse() {
        return Ok(Time(ms));
    }
    chrono::DateTime::parse_from_rfc3339(text)
        .map(|at| Time(at.timestamp_millis()))
        .map_err(|why| format!("expected Unix milliseconds or RFC 3339 like 2026-01-01T00:00:00Z: {why}"))
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
        Line::parse_from(line.iter().chain(more)).generate.write()
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
