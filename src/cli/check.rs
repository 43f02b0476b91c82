//! `tidemill check`: would this job run?

use std::io::Write as _;

use anyhow::Context as _;

use super::ConfigArgs;
use crate::app::dead_letters::DeadLetters;
use crate::app::{input, objects, train};
use crate::config::Checked;
use crate::event::Stream;
use crate::snapshot::store::Race;
use crate::source::decode::{Decoder, EventView};
use crate::source::kafka::Log;
use crate::source::{Origin, columnar, file};
use crate::train::checkpoint::{self, Checkpoints};

/// Check a configuration: every setting, every file, and every path the job will write to
///
/// With --sample also shows how the first records of each stream are decoded: field, value, row. It makes the directories
/// that the job would make; what it writes there to try them it removes.
#[derive(clap::Args, Clone, Debug)]
pub struct Check {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Show how the first N records of each stream are decoded.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub sample: usize,
}

impl Check {
    pub fn run(self) -> anyhow::Result<()> {
        let checked = self.config.load()?.check(None)?;
        let mut out = std::io::stdout().lock();
        let mut ok = |what: &str, detail: String| writeln!(out, "ok  {what:<14} {detail}");
        let config = &checked.config;
        ok("config", format!("`{}`, lineage {}", self.config.config.display(), checked.lineage()))?;
        let schema = &checked.schema;
        ok(
            "schema",
            format!(
                "{} features, {} crosses, hash {}",
                schema.features(),
                schema.len() - schema.features(),
                schema.hash()
            ),
        )?;
        let mut streams = vec![(Stream::Impressions, &config.impressions)];
        streams.extend(config.clicks.as_ref().map(|clicks| (Stream::Clicks, clicks)));
        for (stream, settings) in &streams {
            input::decoder(&checked, *stream, input::Keep::Nothing)?;
            match (settings.source.find(&format!("{}.source", stream.name()))?, &config.kafka) {
                (Origin::Files(files), _) => {
                    let schema = (*stream == Stream::Impressions).then_some(schema);
                    let decoder = Decoder::new(*stream, &settings.record, schema, true)?;
                    for path in &files.paths {
                        if columnar::is_parquet(path, None)? {
                            columnar::describe(path, &decoder, 1)?;
                        } else {
                            file::first_records(path, 1, files.max_record)?;
                        }
                    }
                    if !files.paths.is_empty() {
                        ok(stream.name(), format!("{} file(s) can be read", files.paths.len()))?;
                    }
                    for pattern in &files.objects {
                        let found = objects::find(pattern)?;
                        let bytes: u64 = found.iter().map(|(_, object)| object.length()).sum();
                        let count = found.len();
                        ok(
                            stream.name(),
                            format!("`{pattern}`: {count} object(s) are there, {bytes} bytes, for runs that end"),
                        )?;
                    }
                }
                (Origin::Kafka(topics), Some(cluster)) => {
                    let log = Log::connect(*stream, cluster, &topics)?;
                    Log::first_records(cluster, &topics, 1)?;
                    let there: u64 = log.states().iter().map(|state| state.high - state.low).sum();
                    let (topics, partitions) = (topics.topics.join("`, `"), log.partitions().len());
                    ok(stream.name(), format!("`{topics}`: {partitions} partition(s) can be read, {there} records"))?;
                }
                (Origin::Kafka(_), None) => unreachable!("the config was checked"),
            }
        }
        if let Some(device) = checked.model.reach_device()? {
            ok("device", format!("`{device}` can compute towers"))?;
        }
        if let Some(settings) = &config.checkpoint {
            let dir = settings.dir.display();
            let detail = match Checkpoints::open(&settings.dir) {
                Err(checkpoint::Error::Locked { .. }) => format!("`{dir}`: in use by a job that is running now"),
                opened => match opened?.newest()? {
                    Some(loaded) => {
                        train::read_head(&loaded.head, &settings.dir, &checked)?;
                        format!("`{dir}`: the job would go on from checkpoint {}", loaded.number)
                    }
                    None => format!("`{dir}`: empty, the job would start anew"),
                },
            };
            try_write(&settings.dir).with_context(|| format!("`checkpoint.dir` = `{}`", settings.dir.display()))?;
            ok("checkpoint", detail)?;
        }
        if let Some(settings) = &config.snapshots {
            let store = settings.check()?.open()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let raced = if store.is_single_writer() { None } else { Some(runtime.block_on(store.race(8, 8))?) };
            let newest = runtime.block_on(store.latest(&settings.channel))?;
            let names = match newest.and_then(|entry| Some((entry.version?, entry.pinned))) {
                None => "names no version yet".to_owned(),
                Some((version, false)) => format!("names version {version}"),
                Some((version, true)) => format!("names version {version} and is pinned"),
            };
            let create = match raced {
                Some(Race { rounds, writers }) => {
                    format!("create-only writes work, {rounds} times out of {rounds} with {writers} writers at once")
                }
                None => "UNSAFE, single-writer: a second trainer, or a paused one that wakes up, overwrites what this one publishes".to_owned(),
            };
            ok("snapshots", format!("`{}`: {create}; channel `{}` {names}", store.url(), settings.channel))?;
        }
        if let Some(place) = DeadLetters::open(config)?.place() {
            ok("dead letters", place)?;
        }
        drop(out);
        for (stream, settings) in &streams {
            if self.sample > 0 {
                show(&checked, *stream, settings, self.sample)?;
            }
        }
        Ok(())
    }
}

/// Writes and removes a small file.
fn try_write(dir: &std::path::Path) -> anyhow::Result<()> {
    let mut file = tempfile::NamedTempFile::new_in(dir).context("no file can be made there")?;
    file.write_all(b"tidemill check").and_then(|()| file.as_file().sync_all()).context("nothing can be written there")
}

fn show(checked: &Checked, stream: Stream, settings: &crate::config::StreamSettings, n: usize) -> anyhow::Result<()> {
    let schema = (stream == Stream::Impressions).then_some(&checked.schema);
    let mut decoder = Decoder::new(stream, &settings.record, schema, true)?;
    let mut samples = Vec::new();
    match (settings.source.find(&format!("{}.source", stream.name()))?, &checked.config.kafka) {
        (Origin::Files(files), _) => {
            for path in &files.paths {
                let (left, name) = (n - samples.len(), file::name_of(path));
                if columnar::is_parquet(path, None)? {
                    let rows = columnar::describe(path, &decoder, left)?;
                    samples.extend(rows.into_iter().map(|(row, events)| (format!("`{name}` at row {row}"), events)));
                    continue;
                }
                for (offset, raw) in file::first_records(path, left, files.max_record)? {
                    samples.push((format!("`{name}` at byte {offset}"), decoder.describe(&raw)));
                }
            }
        }
        (Origin::Kafka(topics), Some(cluster)) => {
            let records = Log::first_records(cluster, &topics, n)?;
            for (name, offset, raw) in records {
                samples.push((format!("`{name}` at offset {offset}"), decoder.describe(&raw)));
            }
        }
        (Origin::Kafka(_), None) => unreachable!("the config was checked"),
    }
    let mut out = std::io::stdout().lock();
    for (place, events) in samples {
        writeln!(out, "\n{} {place}", stream.name())?;
        match events {
            Ok(events) => events.iter().try_for_each(|event| event_lines(&mut out, event))?,
            Err(reason) => writeln!(out, "  rejected: {reason}")?,
        }
    }
    Ok(())
}

fn event_lines(out: &mut impl std::io::Write, event: &EventView) -> std::io::Result<()> {
    writeln!(out, "  {:?} id `{}` at {} ({})", event.kind, event.id, event.event_time, event.event_time.0)?;
    for field in &event.fields {
        let value = if field.missing { "(missing)" } else { &field.value };
        let rows: Vec<String> = field.rows.iter().map(|(row, value)| format!("{row:016x} x {value}")).collect();
        let value: String = value.chars().take(40).collect();
        writeln!(out, "    {:<28} {value:<40} {}", field.feature, rows.join(", "))?;
    }
    Ok(())
}
