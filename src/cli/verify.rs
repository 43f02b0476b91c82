//! `tidemill verify`: the same log gives the same bytes, and a kill changes none of them, as commands.

use std::process::ExitCode;

use anyhow::Context as _;

use super::ConfigArgs;
use super::train::Lines;
use crate::app::verify::{self, Compared, Of};
use crate::app::warm::WarmStart;
use crate::event::Time;

/// Exit status where bytes differ.
const DIFFERS: u8 = 3;

/// Verify: learn a job's log again and compare, or kill a job over and over and compare
///
/// Exit status: 0 the same bytes, or other ones that another build or machine explains; 1 failed; 2 wrong usage; 3 a difference
/// that nothing explains.
#[derive(clap::Args, Clone, Debug)]
pub struct Verify {
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand, Clone, Debug)]
enum What {
    /// Learn again what a job has learned up to its newest checkpoint, with its journal, and compare it with the digests of
    /// every checkpoint on the way, with the newest one row by row, and with each version that is still in the store. The job
    /// may be running.
    Replay {
        #[command(flatten)]
        config: ConfigArgs,
        /// What the lineage began as, if not as nothing.
        #[arg(long, value_name = "WHERE")]
        warm_start: Option<String>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Run the job from the start of its log in a scratch directory, once in peace and once killed again and again, and
    /// compare what comes of it.
    Restart {
        #[command(flatten)]
        config: ConfigArgs,
        /// Learn impressions before this time. Default: to the end of the log.
        #[arg(long, value_name = "TIME", value_parser = super::parse_time)]
        until: Option<Time>,
        /// How often it is killed.
        #[arg(long, default_value_t = 20)]
        kills: u32,
        /// Decides when. Default: by the clock; it is said.
        #[arg(long)]
        seed: Option<u64>,
        /// Print one JSON object.
        #[arg(long)]
        json: bool,
    },
}

impl Verify {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let stop = super::stop_on_signal()?;
        let explained = match self.what {
            What::Replay { config, warm_start, json } => {
                let mut progress = Lines::new(json);
                let warm = warm_start.as_deref().map(WarmStart::parse);
                let replayed = verify::replay(&config.load()?, warm, &stop, &mut progress)?;
                progress.done();
                if json {
                    println!("{}", serde_json::to_string(&replayed)?);
                } else {
                    print_replayed(&replayed)?;
                }
                replayed.same || replayed.builds.is_some()
            }
            What::Restart { config, until, kills, seed, json } => {
                let executable = std::env::current_exe().context("cannot find this executable")?;
                let seed = seed.unwrap_or_else(|| crate::clock::now().0 as u64);
                let mut said = |n: u32| {
                    if !json {
                        eprintln!("killed {n} of {kills} times");
                    }
                };
                let done = verify::restart(&config.load()?, &executable, until, kills, seed, &stop, &mut said)?;
                if json {
                    println!("{}", serde_json::to_string(&done)?);
                } else {
                    println!("killed      {} times (seed {}) in {:.1} s", done.kills, done.seed, done.seconds);
                    println!("in peace    model {}, order {}", done.undisturbed[0], done.undisturbed[1]);
                    println!("killed      model {}, order {}", done.killed[0], done.killed[1]);
                    println!("verdict     {}", if done.same { "the same bytes" } else { "THE BYTES DIFFER" });
                }
                done.same
            }
        };
        Ok(if explained { ExitCode::SUCCESS } else { ExitCode::from(DIFFERS) })
    }
}

fn name(of: &Of) -> String {
    match of {
        Of::Digests(number) => format!("checkpoint {number}"),
        Of::Checkpoint(number) => format!("checkpoint {number}, all of it"),
        Of::Version(version) => format!("version {version}"),
    }
}

fn print_replayed(replayed: &verify::Replayed) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    writeln!(out, "lineage     {}, replayed in {:.1} s", replayed.lineage, replayed.seconds)?;
    let digests = |mark: &Compared| matches!(mark.of, Of::Digests(_)) && mark.same;
    let at = |mark: &Compared| mark.frontier.map_or(String::new(), |time| format!(", {time}"));
    // Checkpoints that are the same fill one line, however many there are.
    for marks in replayed.marks.chunk_by(|a, b| digests(a) && digests(b)) {
        let [first, .., last] = marks else {
            let mark = &marks[0];
            let verdict = match (mark.same, digests(mark)) {
                (true, true) => "the same digests",
                (true, false) => "the same bytes",
                (false, _) => "DIFFERS",
            };
            let why = mark.difference.as_ref().map_or(String::new(), |why| format!(": {why}"));
            writeln!(out, "batch {:<8} {}{}: {verdict}{why}", mark.batch, name(&mark.of), at(mark))?;
            continue;
        };
        let (from, to, count) = (name(&first.of), name(&last.of), marks.len());
        writeln!(out, "batch {:<8} {from} to {to}, {count} of them{}: the same digests", last.batch, at(last))?;
    }
    if replayed.versions_past > 0 {
        writeln!(out, "not compared: {} versions lie past the newest checkpoint", replayed.versions_past)?;
    }
    if let Some([from, to]) = replayed.differs_between {
        writeln!(out, "the first difference lies behind batch {from} and not behind batch {to}")?;
    }
    if let (false, Some([theirs, ours])) = (replayed.same, &replayed.builds) {
        return writeln!(
            out,
            "verdict     not comparable: the job ran as `{theirs}`, this is `{ours}`; replay on the same build and class of machine"
        );
    }
    writeln!(out, "verdict     {}", if replayed.same { "the same bytes" } else { "THE BYTES DIFFER" })
}
