//! A small job in a temporary directory, run through the real command.
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
use serde_json::Value;
use tempfile::TempDir;

pub const TIDEMILL: &str = env!("CARGO_BIN_EXE_tidemill");

/// The job's configuration, with every path inside its directory.
const CONFIG: &str = r#"
[job]
name = "test"
seed = 7
decode_threads = 2

[impressions]
max_out_of_order = "2s"
max_ahead = "2s"
source = { paths = ["IN/impressions-*"], poll = "10ms" }

[clicks]
max_out_of_order = "2s"
max_ahead = "2s"
source = { paths = ["IN/clicks-*"], poll = "10ms" }

[join]
window = "40s"
click_skew = "1s"
max_lateness = "10s"

[batch]
examples = 64
period = "5s"

[checkpoint]
dir = "DIR/checkpoints"
every = "1h"
every_batches = 3

[publish]
every = "30s"
min_interval = "0s"

[snapshots]
store = "DIR/snapshots"

[dead_letters]
path = "DIR/dead-letters.jsonl"

[model.logistic]
prior_ctr = 0.1
"#;

const FEATURES: &str = r#"
[[features]]
name = "user_id"
from = "user.id"
[[features]]
name = "item_id"
from = "item.id"
[[features]]
name = "age"
from = "user.age"
kind = "numeric"
[[features]]
name = "position"
role = "presentation"
at_serving = "1"
[[features]]
name = "tags"
kind = "multi"
[[crosses]]
of = ["user_id", "tags"]
"#;

pub struct Job {
    pub dir: TempDir,
    pub input: PathBuf,
}

impl Job {
    /// A job over the files in `input`.
    pub fn over(input: &Path) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = CONFIG
            .replace("IN/", &format!("{}/", input.display()))
            .replace("DIR/", &format!("{}/", dir.path().display()));
        std::fs::write(dir.path().join("job.toml"), format!("{config}{FEATURES}")).unwrap();
        Self { dir, input: input.to_owned() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn edit(&self, from: &str, to: &str) {
        let path = self.path("job.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "the config has no `{from}`");
        std::fs::write(path, text.replace(from, to)).unwrap();
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(TIDEMILL);
        command.arg("train").arg("-c").arg(self.path("job.toml")).args(args);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs to the end and gives the summary.
    pub fn train(&self, args: &[&str]) -> Value {
        let output = self.command(&[&["--json"], args].concat()).output().unwrap();
        summary(&output)
    }

    /// Runs and gives what it says on stderr, which must be a failure.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.command(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "the job should have failed; it said: {text}");
        text
    }
}

pub fn summary(output: &Output) -> Value {
    assert!(output.status.success(), "the job failed: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Writes a generated stream; options as `tidemill generate` takes them.
pub fn generate(options: &[&str]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("in");
    let output = Command::new(TIDEMILL)
        .args(["generate", "--users", "500", "--items", "100", "--ctr", "0.1"])
        .args(if options.contains(&"--rate") { &[][..] } else { &["--rate", "30"] })
        .args(["--delay-median", "5s", "--window", "40s"])
        .args(options)
        .arg("--out")
        .arg(&out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    dir
}

/// The digests and counts that equal runs must share.
pub fn outcome(summary: &Value) -> Value {
    let keys = ["model_digest", "order_digest", "counts", "examples", "batches", "frontier", "clicks_waiting"];
    keys.iter().map(|key| ((*key).to_owned(), summary[*key].clone())).collect::<serde_json::Map<_, _>>().into()
}

/// Kills jobs with SIGKILL at moments drawn at random. While that leaves no checkpoint behind it comes twice as late each time,
/// so that a job gets somewhere on a slow machine too.
pub struct Kills {
    chance: Pcg64Mcg,
    /// The latest moment, ms after the start.
    most: u64,
    in_vain: u32,
}

impl Kills {
    pub fn new(seed: u64, most: Duration) -> Self {
        println!("seed {seed}");
        Self { chance: Pcg64Mcg::seed_from_u64(seed), most: most.as_millis() as u64, in_vain: 0 }
    }

    /// Starts the job and kills it. Gives what it said if it came to its end before.
    pub fn kill(&mut self, job: &Job, args: &[&str]) -> Option<Output> {
        let before = newest_checkpoint(job);
        let mut child = job.command(args).spawn().unwrap();
        let moment =
            Instant::now() + Duration::from_millis((self.chance.next_u64() % self.most) << self.in_vain.min(6));
        while Instant::now() < moment {
            if child.try_wait().unwrap().is_some() {
                self.in_vain = 0;
                return Some(child.wait_with_output().unwrap());
            }
            std::thread::sleep(Duration::from_millis(2).min(moment - Instant::now()));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        self.in_vain = if newest_checkpoint(job) == before { self.in_vain + 1 } else { 0 };
        None
    }
}

/// The file of a job's newest checkpoint.
pub fn newest_checkpoint(job: &Job) -> Option<PathBuf> {
    let files = std::fs::read_dir(job.path("checkpoints")).into_iter().flatten().map(|entry| entry.unwrap().path());
    let head = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("checkpoint-"));
    files.filter(|path| head(path) && path.extension().is_some_and(|extension| extension == "json")).max()
}

/// Kills jobs at random moments, `kills` times in all, and lets them go on. A job that comes to its end all the same gives
/// its summary and is followed by a fresh one; the last one is let finish.
pub fn train_through_kills(kills: usize, seed: u64, new: impl Fn() -> Job) -> (Vec<serde_json::Value>, Job) {
    let mut killing = Kills::new(seed, Duration::from_millis(300));
    let (mut ends, mut job, mut killed) = (Vec::new(), new(), 0);
    while killed < kills {
        if let Some(ended) = killing.kill(&job, &["--json", "--until-end"]) {
            ends.push(summary(&ended));
            job = new();
        } else {
            killed += 1;
        }
    }
    ends.push(job.train(&["--until-end"]));
    (ends, job)
}
