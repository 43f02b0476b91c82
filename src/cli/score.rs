//! `tidemill score`: scores records offline, from a published snapshot.

use std::io::{BufWriter, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;

use crate::app::objects;
use crate::config::Config;
use crate::event::{Kind, Slot, Stream};
use crate::feature::schema::Schema;
use crate::position::NextOffset;
use crate::snapshot::{Snapshot, Store, Version};
use crate::source::decode::{Decoder, RecordSettings};
use crate::source::{Arrival, Decode, Origin, Settings, Sources};

/// Score records offline, from a published snapshot
///
/// Reads JSON lines or Parquet and writes `id,logit,prediction` as CSV, or with --explain one JSON object a record that says what
/// each feature contributed. Presentation features have their serving value unless --as-logged is given. Records that
/// cannot be decoded are reported on stderr, and the exit code is 1.
#[derive(clap::Args, Clone, Debug)]
pub struct Score {
    /// JSON lines (plain, gzip or zstd) or Parquet to score, or objects of a store by their address. May be given often; `*` and
    /// `?` work in the last part of a path.
    #[arg(required = true, value_name = "FILE")]
    pub inputs: Vec<String>,
    /// Snapshot store: a directory.
    #[arg(long, value_name = "STORE")]
    pub store: String,
    /// Channel whose current version scores.
    #[arg(long, default_value = "live")]
    pub channel: String,
    /// Score with this version instead.
    #[arg(long, value_name = "N")]
    pub version_number: Option<u64>,
    /// Configuration whose `[impressions.record]` says where ids and times are; default: `id` and `ts`.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Keep presentation features (position and the like) as they were logged.
    #[arg(long)]
    pub as_logged: bool,
    /// One JSON object a record, with each feature's contribution to the logit.
    #[arg(long)]
    pub explain: bool,
}

#[derive(Serialize)]
struct Explained<'a> {
    id: &'a str,
    version: u64,
    logit: f32,
    prediction: f64,
    intercept: f32,
    /// What the towers add, where the model has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    towers: Option<f32>,
    contributions: Vec<Part<'a>>,
}

#[derive(Serialize)]
struct Part<'a> {
    feature: &'a str,
    row: String,
    value: f32,
    weight: f32,
    contribution: f32,
    /// The id has a row of its own; otherwise its feature's default row answered.
    known: bool,
    missing: bool,
}

impl Score {
    pub fn run(self) -> anyhow::Result<()> {
        let snapshot = self.load()?;
        let version = snapshot.manifest.version.0;
        let schema = Schema::from_json(&snapshot.manifest.model.schema.to_string())
            .with_context(|| format!("the schema in version {version} cannot be used"))?;
        let mut record = match &self.config {
            Some(path) => Config::load(path, &[])?.impressions.record,
            None => RecordSettings::default(),
        };
        record.label = None;
        record.weight = None;
        let make = {
            let (schema, as_logged) = (schema.clone(), self.as_logged);
            move || {
                let decoder = Decoder::new(Stream::Impressions, &record, Some(&schema), true)?;
                Ok::<_, crate::source::decode::Error>(if as_logged { decoder } else { decoder.at_serving() })
            }
        };
        make()?;
        let new = Arc::new(move || Box::new(make().expect("made once before")) as Box<dyn Decode>);
        let settings = Settings { paths: self.inputs.clone(), ..Settings::default() };
        let new: crate::source::NewDecoder = new;
        let Origin::Files(files) = settings.find("FILE")? else { unreachable!("files are the default") };
        let mut found = Vec::new();
        for pattern in &files.objects {
            found.extend(objects::find(pattern)?);
        }
        let specs = files.specs(Stream::Impressions, false, &new, found, |_| NextOffset::default());
        let (_sources, partitions, recycler) = Sources::open(specs, 1)?;

        let mut out = BufWriter::new(std::io::stdout().lock());
        if !self.explain {
            writeln!(out, "id,logit,prediction")?;
        }
        let mut rejected = 0_u64;
        for mut partition in partitions {
            loop {
                let chunk = match partition.next_timeout(Duration::from_millis(100)) {
                    Some(Arrival::Records(chunk)) => chunk,
                    Some(Arrival::Ended { .. }) => break,
                    Some(Arrival::Failed(error)) => return Err(error.into()),
                    Some(Arrival::CaughtUp { .. } | Arrival::Unconfirmed) | None => continue,
                };
                for (index, record) in chunk.records.iter().enumerate() {
                    if record.kind == Kind::Rejected {
                        rejected += 1;
                        let why = chunk.reason_of(index);
                        eprintln!("`{}` at offset {}: {why}", partition.name(), record.offset);
                        continue;
                    }
                    let id = String::from_utf8_lossy(chunk.text_of(record));
                    self.write(&mut out, &snapshot, &schema, &id, chunk.slots_of(record))?;
                }
                recycler.give(chunk);
            }
        }
        out.flush()?;
        if rejected > 0 {
            bail!("{rejected} records could not be decoded");
        }
        Ok(())
    }

    fn load(&self) -> anyhow::Result<Snapshot> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let store = Store::open(&self.store)?;
        runtime.block_on(async {
            match self.version_number {
                Some(number) => Ok(store.load(Version(number)).await?),
                None => match store.load_latest(&self.channel).await? {
                    Some(snapshot) => Ok(snapshot),
                    None => bail!(
                        "channel `{}` of `{}` names no version yet; `tidemill snapshots list` shows what there is",
                        self.channel,
                        self.store
                    ),
                },
            }
        })
    }

    fn write(
        &self,
        out: &mut impl std::io::Write,
        snapshot: &Snapshot,
        schema: &Schema,
        id: &str,
        slots: &[Slot],
    ) -> anyhow::Result<()> {
        let logit = snapshot.logit(slots);
        let prediction = 1.0 / (1.0 + libm::exp(-f64::from(logit)));
        if !self.explain {
            let quoted = id.contains([',', '"', '\n', '\r']);
            let id = if quoted { format!("\"{}\"", id.replace('"', "\"\"")) } else { id.to_owned() };
            writeln!(out, "{id},{logit},{prediction}")?;
            return Ok(());
        }
        let weights = &snapshot.weights;
        let part = |slot: &Slot| {
            let weight = weights.weight(slot.row, slot.feature);
            Part {
                feature: schema.name(usize::from(slot.feature)),
                row: format!("{:016x}", slot.row),
                value: slot.value,
                weight,
                contribution: weight * slot.value,
                known: weights.knows(slot.row),
                missing: slot.flags & Slot::MISSING != 0,
            }
        };
        let explained = Explained {
            id,
            version: snapshot.manifest.version.0,
            logit,
            prediction,
            intercept: weights.intercept(),
            towers: weights.towers().map(|towers| towers.product(slots)),
            contributions: slots.iter().map(part).collect(),
        };
        writeln!(out, "{}", serde_json::to_string(&explained)?)?;
        Ok(())
    }
}
