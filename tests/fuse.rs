//! The fuse through the real command: no dead or half-dead click feed becomes a false negative, training resumes by itself,
//! and what an operator says outlives the job.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use common::{Job, generate, outcome, summary};
use serde_json::Value;
use tempfile::TempDir;

/// 2026-01-01T00:00:00Z, where the generated stream begins.
const START: i64 = 1_767_225_600_000;

/// A file, its lines with their event times in ms, and how many of them it has.
type Part = (File, Vec<(i64, String)>, usize);

/// The files of a generated stream, written anew piece by piece.
struct Feed {
    dir: TempDir,
    files: BTreeMap<String, Part>,
}

impl Feed {
    fn over(whole: &Path) -> Self {
        let (dir, mut files) = (tempfile::tempdir().unwrap(), BTreeMap::new());
        for entry in std::fs::read_dir(whole).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "jsonl") {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                let text = std::fs::read_to_string(&path).unwrap();
                let time = |line: &str| serde_json::from_str::<Value>(line).unwrap()["ts"].as_i64().unwrap() - START;
                let lines = text.lines().map(|line| (time(line), format!("{line}\n"))).collect();
                files.insert(name.clone(), (File::create(dir.path().join(name)).unwrap(), lines, 0));
            }
        }
        Self { dir, files }
    }

    /// Appends what the files whose names begin so have up to `seconds` of the stream.
    fn grow(&mut self, prefix: &str, seconds: i64) {
        for (_, (file, lines, at)) in self.files.iter_mut().filter(|(name, _)| name.starts_with(prefix)) {
            let end = *at + lines[*at..].iter().take_while(|(time, _)| *time <= seconds * 1000).count();
            let piece: String = lines[*at..end].iter().map(|(_, line)| line.as_str()).collect();
            file.write_all(piece.as_bytes()).unwrap();
            *at = end;
        }
    }
}

/// A running job with its listener.
struct Running {
    child: Child,
    address: String,
}

/// Long enough for any machine; what is waited for comes much sooner.
const PATIENCE: Duration = Duration::from_secs(120);

impl Running {
    fn start(job: &Job, args: &[&str]) -> Self {
        let listen = ["--json", "--set", "telemetry.listen=\"127.0.0.1:0\""];
        let mut child = job.command(&[&listen[..], args].concat()).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut all = String::new();
        let address = loop {
            let mut line = String::new();
            assert!(log.read_line(&mut line).unwrap() > 0, "the job ended: {all}");
            all.push_str(&line);
            if let Some((_, rest)) = line.split_once("metrics at http://") {
                break rest.trim().trim_end_matches("/metrics").to_owned();
            }
        };
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::stderr()));
        Self { child, address }
    }

    fn ask(&self, method: &str, path: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
    }

    fn json(&self, method: &str, path: &str) -> (u16, Value) {
        let (code, body) = self.ask(method, path);
        (code, serde_json::from_str(&body).unwrap_or_else(|_| panic!("{path}: {body}")))
    }

    /// Waits until the job is held for this reason, and gives its status.
    fn held(&self, why: &str) -> Value {
        let since = Instant::now();
        loop {
            let (code, ready) = self.json("GET", "/readyz");
            if ready["held"]["why"] == why {
                assert_eq!((code, &ready["ready"]), (503, &Value::Bool(false)));
                return self.json("GET", "/status").1;
            }
            assert!(since.elapsed() < PATIENCE, "not held by {why}: {ready}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn examples(&self) -> u64 {
        self.json("GET", "/status").1["examples"].as_u64().unwrap()
    }

    /// It learns nothing while it is held.
    fn stays_held(&self) {
        let before = self.examples();
        std::thread::sleep(Duration::from_millis(2500));
        assert_eq!(self.examples(), before);
        assert_eq!(self.json("GET", "/readyz").0, 503);
    }

    fn metric(&self, name: &str) -> f64 {
        let text = self.ask("GET", "/metrics").1;
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(self) -> Value {
        let output = self.child.wait_with_output().unwrap();
        assert!(output.status.success(), "the job failed, see its log above");
        summary(&output)
    }
}

/// A job over growing files: impressions are always awaited, clicks may be idle soon.
fn job(input: &Path) -> Job {
    let job = Job::over(input);
    job.edit("[clicks]", "idle_after = \"never\"\n\n[clicks]");
    job.edit("[join]", "idle_after = \"500ms\"\n\n[join]");
    job.edit("[batch]", "[fuse]\nctr_clicks = 100\n\n[batch]");
    job
}

fn stream(partitions: &str) -> TempDir {
    generate(&["-n", "6000", "--disorder", "1s", "--partitions", partitions])
}

const FOLLOWED: &[&str] = &["--until", "2026-01-01T00:02:30Z", "--follow"];
const BOUNDED: &[&str] = &["--until", "2026-01-01T00:02:30Z"];

#[test]
fn a_dead_click_feed_holds_the_training_and_leaves_no_trace_once_it_returns() {
    let input = stream("2");
    let whole = input.path().join("in");
    let mut feed = Feed::over(&whole);
    feed.grow("", 100);
    let growing = job(feed.dir.path());
    let running = Running::start(&growing, FOLLOWED);
    feed.grow("impressions", 1000);
    let status = running.held("click_silence");
    assert_eq!(status["held"]["waiting_for"].as_array().unwrap().len(), 2);
    assert!(status["held"]["impressions_waiting"].as_u64().unwrap() > 0);
    assert!(status["frontier"].as_str().unwrap() < "2026-01-01T00:01:00", "100 s less the window: {status}");
    running.stays_held();
    assert_eq!(running.metric("tidemill_held{why=\"click_silence\"}"), 1.0);
    assert!(running.metric("tidemill_impressions_waiting") > 0.0);
    feed.grow("clicks", 1000);
    assert_eq!(outcome(&running.end()), outcome(&job(&whole).train(BOUNDED)));
}

#[test]
fn a_half_dead_click_feed_holds_the_training_and_leaves_no_trace_once_it_returns() {
    let input = stream("4");
    let whole = input.path().join("in");
    let mut feed = Feed::over(&whole);
    feed.grow("", 80);
    let growing = job(feed.dir.path());
    let running = Running::start(&growing, FOLLOWED);
    for part in ["impressions", "clicks-000", "clicks-002", "clicks-003"] {
        feed.grow(part, 1000);
    }
    let status = running.held("click_stalled");
    let waiting_for = status["held"]["waiting_for"].as_array().unwrap();
    assert!(waiting_for.len() == 1 && waiting_for[0].as_str().unwrap().ends_with("clicks-001.jsonl"), "{status}");
    assert!(status["frontier"].as_str().unwrap() < "2026-01-01T00:00:40", "80 s less the window: {status}");
    assert_eq!(status["journal_entries"], 0);
    running.stays_held();
    let name = waiting_for[0].as_str().unwrap();
    assert!(running.metric(&format!("tidemill_partition_clicks_missing{{partition=\"{name}\"}}")) >= 20.0);
    let state = format!("tidemill_partition_state{{stream=\"clicks\",partition=\"{name}\",state=\"stalled\"}}");
    assert_eq!(running.metric(&state), 1.0);
    feed.grow("clicks", 1000);
    assert_eq!(outcome(&running.end()), outcome(&job(&whole).train(BOUNDED)));
}

/// Large batches, of which the second is labelled with half of its clicks when they stop at 125 s.
fn sensitive(input: &Path) -> Job {
    let job = job(input);
    job.edit("ctr_clicks = 100", "ctr_clicks = 100\nctr_band = [0.8, 1.25]");
    job.edit("examples = 64\nperiod = \"5s\"", "examples = 2500\nperiod = \"never\"");
    job
}

#[test]
fn a_batch_whose_ctr_fell_because_clicks_were_not_waited_for_is_labelled_anew_when_they_return() {
    let input = stream("2");
    let whole = input.path().join("in");
    let mut feed = Feed::over(&whole);
    feed.grow("", 125);
    let job = sensitive(feed.dir.path());
    job.edit("idle_after = \"500ms\"", "idle_after = \"500ms\"\nquiet_after = \"1s\"");
    let until = ["--until", "2026-01-01T00:02:52Z"];
    let running = Running::start(&job, &[&until[..], &["--follow"]].concat());
    feed.grow("impressions", 1000);
    let status = running.held("ctr_jump");
    assert_eq!(status["held"]["waiting_for"].as_array().unwrap().len(), 2, "{status}");
    assert_eq!((&status["held"]["batch"]["number"], &status["held"]["batch"]["side"]), (&2.into(), &"low".into()));
    assert_eq!(status["examples"], 2500);
    running.stays_held();
    feed.grow("clicks", 1000);
    let after = running.end();
    assert_eq!(outcome(&after), outcome(&sensitive(&whole).train(&until)));
    assert_eq!(after["journal_entries"], 0);
    let (counts, read) = (&after["counts"], &after["read"]);
    let n = |v: &Value| v.as_u64().unwrap();
    let pending = n(&after["impressions_pending"]);
    assert_eq!(n(&counts["impressions"]) + pending, n(&read["impressions_read"]) - n(&read["impressions_skipped"]));
}

/// A stream in which the clicks of 50 seconds name no impression, as after a change of the id's format.
fn with_lost_clicks() -> TempDir {
    let input = stream("2");
    for partition in 0..2 {
        let path = input.path().join(format!("in/clicks-00{partition}.jsonl"));
        let mut text = String::new();
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            let mut click: Value = serde_json::from_str(line).unwrap();
            if (90_000..140_000).contains(&(click["ts"].as_i64().unwrap() - START)) {
                click["id"] = format!("changed-{}", click["id"]).into();
            }
            text.push_str(&format!("{click}\n"));
        }
        std::fs::write(&path, text).unwrap();
    }
    input
}

#[test]
fn a_ctr_jump_in_the_log_is_held_until_an_operator_accepts_it_and_a_kill_does_not_forget_his_word() {
    let input = with_lost_clicks();
    let whole = input.path().join("in");
    let bounded = job(&whole).fails(BOUNDED);
    assert!(bounded.contains("the click-through rate jumped: ") && bounded.contains("ctr_band"), "{bounded}");

    let undisturbed = {
        let job = job(&whole);
        let running = Running::start(&job, FOLLOWED);
        running.held("ctr_jump");
        assert_eq!(running.json("POST", "/accept").0, 200);
        running.end()
    };
    let killed = job(&whole);
    let running = Running::start(&killed, FOLLOWED);
    let before = running.held("ctr_jump");
    assert_eq!(before["held"]["waiting_for"].as_array().unwrap().len(), 0, "all clicks are there: {before}");
    running.stays_held();
    running.kill();
    let running = Running::start(&killed, FOLLOWED);
    let again = running.held("ctr_jump");
    assert_eq!(again["held"]["batch"], before["held"]["batch"], "held at the same batch after a kill");
    let number = again["held"]["batch"]["number"].as_u64().unwrap();
    let (code, refused) = running.json("POST", &format!("/accept?batch={}", number + 1));
    assert_eq!(code, 409, "{refused}");
    let (code, refused) = running.json("POST", "/release");
    assert!(code == 409 && refused["error"].as_str().unwrap().contains("POST /accept"), "{refused}");
    let (code, done) = running.json("POST", &format!("/accept?batch={number}"));
    assert_eq!((code, &done["durable"]), (200, &Value::Bool(true)), "{done}");
    running.kill();
    let after = killed.train(BOUNDED);
    assert_eq!(outcome(&after), outcome(&undisturbed));
    assert_eq!(after["journal_entries"], 1);
    let unfused = job(&whole).train(&[BOUNDED, &["--set", "fuse.ctr_band=\"never\""]].concat());
    assert_eq!(after["model_digest"], unfused["model_digest"]);
}

#[test]
fn a_released_click_feed_is_not_waited_for_until_it_speaks_also_after_a_kill() {
    let input = stream("2");
    let whole = input.path().join("in");
    let mut feed = Feed::over(&whole);
    feed.grow("", 100);
    feed.grow("impressions", 1000);
    let new = || {
        let job = job(feed.dir.path());
        job.edit("ctr_clicks = 100", "ctr_band = \"never\"");
        job
    };
    let release = |running: &Running| {
        running.held("click_silence");
        let (code, done) = running.json("POST", "/release");
        assert_eq!((code, &done["durable"]), (200, &Value::Bool(true)), "{done}");
        assert_eq!(done["released"].as_array().unwrap().len(), 2);
    };
    let alive = new();
    let running = Running::start(&alive, FOLLOWED);
    assert_eq!(running.json("POST", "/release?partition=nothing").0, 409);
    assert_eq!(running.json("POST", "/release?what=1").0, 400);
    assert_eq!(running.ask("GET", "/release").0, 405);
    release(&running);
    let undisturbed = running.end();

    let killed = new();
    let running = Running::start(&killed, FOLLOWED);
    release(&running);
    running.kill();
    let after = Running::start(&killed, FOLLOWED).end();
    assert_eq!(outcome(&after), outcome(&undisturbed));
    assert_eq!(after["journal_entries"], 2);
    // The labels are those of a click log that ends there.
    let bounded = new().train(BOUNDED);
    assert_eq!(after["model_digest"], bounded["model_digest"]);
}
