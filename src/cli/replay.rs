//! `tidemill replay`: files into topics.

use super::ConfigArgs;
use crate::app::replay;
use crate::app::topics::Speed;
use crate::event::Stream;

/// Write files of impressions and clicks into the Kafka topics of a job, at a chosen speed
///
/// Records are written by event time, each file in its own order, so that impressions and clicks come as they happened. The
/// key of a message is the impression's id, its timestamp the moment of writing. `-c` names the job that will read them:
/// its topics, and where its records have id and time.
#[derive(clap::Args, Clone, Debug)]
pub struct Replay {
    #[command(flatten)]
    pub config: ConfigArgs,
    /// JSON lines of impressions; plain, gzip or zstd. May be given often; `*` and `?` work in the last part of a path.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub impressions: Vec<String>,
    /// JSON lines of clicks.
    #[arg(long, value_name = "FILE", num_args = 1.., required_unless_present = "impressions")]
    pub clicks: Vec<String>,
    /// `max`: as fast as the brokers take it; 1: as it happened; 60: a minute a second.
    #[arg(long, value_name = "N", default_value = "max", value_parser = super::parse_speed)]
    pub speed: Speed,
    /// Print one JSON object at the end instead of a line.
    #[arg(long)]
    pub json: bool,
}

impl Replay {
    pub fn run(self) -> anyhow::Result<()> {
        let checked = self.config.load()?.check(None)?;
        let stop = super::stop_on_signal()?;
        let files = [(Stream::Impressions, self.impressions), (Stream::Clicks, self.clicks)];
        let written = replay::run(&checked, &files, self.speed, &stop, |written| eprintln!("{written}"))?;
        if self.json {
            println!("{}", serde_json::to_string(&written)?);
        } else {
            println!("written: {written}");
        }
        Ok(())
    }
}
