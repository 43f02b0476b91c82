//! `tidemill examples`: joined, labelled examples as Parquet.

use std::collections::BTreeSet;
use std::path::PathBuf;

use anyhow::{Context as _, bail};

use super::ConfigArgs;
use crate::app::examples;
use crate::app::job::Journal;
use crate::app::train::{Options, Until};
use crate::event::Time;
use crate::source::columnar::sink;

/// Write the joined, labelled examples of a stretch of the log as Parquet, without training
///
/// The order, the labels and what is dropped are those of `tidemill train`; docs/parquet.md describes the columns. Beside the
/// files a configuration is written, under which `tidemill train` reads them and comes to the weights of a run over the log. With
/// --from, enough in front of it is read to know what its labels and duplicates depend on: of files and objects all of it.
#[derive(clap::Args, Clone, Debug)]
pub struct Examples {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// A directory, made if it is not there, for `examples-NNNNN.parquet` and `job.toml`; or one file whose name ends in
    /// `.parquet`, with its configuration beside it.
    #[arg(long, value_name = "DIR|FILE.parquet")]
    pub out: PathBuf,
    /// Leave out examples whose place is before this time (RFC 3339 or Unix milliseconds).
    #[arg(long, value_name = "TIME", value_parser = super::parse_time)]
    pub from: Option<Time>,
    /// Examples whose place is before this time, reading clicks one window further.
    #[arg(long, value_name = "TIME", value_parser = super::parse_time, conflicts_with = "until_end", required_unless_present = "until_end")]
    pub until: Option<Time>,
    /// All examples, to the end that files and topics have now. Windows that reach past the end of the clicks are cut.
    #[arg(long)]
    pub until_end: bool,
    /// Most examples in a file of a directory.
    #[arg(long, value_name = "N", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub rows: u64,
    /// A feature of kind `multi` whose values have weights: it is written as a map rather than a list. May be given often.
    #[arg(long, value_name = "FEATURE")]
    pub weighted: Vec<String>,
    /// Leave out what the model sees: rows and values of the slots.
    #[arg(long)]
    pub without_slots: bool,
    /// Decide again what the runtime of an earlier run over this log decided: FILE is a manifest of that run.
    #[arg(long, value_name = "FILE")]
    pub journal: Option<PathBuf>,
    /// Print one JSON object at the end instead of a table.
    #[arg(long)]
    pub json: bool,
}

impl Examples {
    pub fn run(self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        let mut reads = config.clone();
        if let Some(from) = self.from {
            reads.start_before(from);
        }
        let checked = reads.check(self.until)?;
        let kind = |name: &String| config.features.iter().find(|feature| feature.name == *name).map(|f| f.kind);
        for name in &self.weighted {
            match kind(name) {
                Some(crate::feature::schema::FeatureKind::Multi) => {}
                Some(_) => bail!("--weighted {name}: only a feature of kind \"multi\" has weights"),
                None => bail!("--weighted {name}: there is no such feature"),
            }
        }
        let until = self.until.map_or(Until::End, Until::Time);
        let options = Options { journal: self.journal.clone().map(Journal::Manifest), ..Options::until(until) };
        let weighted: BTreeSet<String> = self.weighted.into_iter().collect();
        let out = self.out;
        let settings = sink::Settings { out: out.clone(), rows: self.rows, weighted, slots: !self.without_slots };
        let stop = super::stop_on_signal()?;
        let mut show = |tick: &examples::Tick| {
            let frontier = tick.frontier.map_or("-".to_owned(), |time| time.to_string());
            eprintln!("at {frontier}: {} examples, {:.0}/s", tick.examples, tick.per_second);
        };
        let written = examples::run(&checked, &options, self.from, settings, &stop, &mut show)?;
        let Some(summary) = written else {
            bail!("stopped before the end; files in `{}` that are complete hold the first examples", out.display());
        };
        let (beside, paths) = if sink::is_file(&out) {
            (out.with_extension("toml"), out.clone())
        } else {
            (out.join("job.toml"), out.join("examples-*.parquet"))
        };
        let text = config.over_examples(paths.display().to_string(), &sink::names(&checked.schema))?;
        std::fs::write(&beside, text).with_context(|| format!("cannot write `{}`", beside.display()))?;
        if self.json {
            println!("{}", serde_json::to_string(&summary)?);
        } else {
            let c = &summary.counts;
            println!("examples     {} positive, {} negative", summary.positives, summary.negatives);
            let time = |time: Option<Time>| time.map_or("-".to_owned(), |time| time.to_string());
            println!("places       {} to {}", time(summary.first), time(summary.last));
            println!("left out     {} duplicate, {} too late, {} rejected", c.duplicates, c.too_late, c.rejected);
            println!("windows cut  {}", c.windows_cut);
            println!("files        {}, {} bytes", summary.files.len(), summary.bytes);
            println!("config       `{}`", beside.display());
            println!("speed        {:.2} s, {:.0} examples/s", summary.seconds, summary.examples_per_second);
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
