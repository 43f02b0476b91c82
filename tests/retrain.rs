//! A full retrain: the same rooms as the live job, an honest comparison, and a hand-over without a gap.

mod common;
#[path = "common/node.rs"]
mod node;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Job, TIDEMILL, generate, outcome, summary};
use node::Serving;
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::feature::Schema;
use tidemill::snapshot::manifest::Document as _;
use tidemill::snapshot::{Manifest, Store};

/// About 400 s of log, 10 % of 12,000 impressions clicked.
const LOG: &[&str] = &["-n", "12000", "--partitions", "2", "--disorder", "2s", "--duplicates", "0.02"];
const HALF: &str = "2026-01-01T00:02:30Z";

fn command(job: &Job, args: &[&str]) -> Command {
    let mut command = Command::new(TIDEMILL);
    command.arg("retrain").arg("-c").arg(job.path("job.toml")).args(["--json", "--block", "5s"]).args(args);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn report(output: &Output, status: i32) -> Value {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{text}{}", String::from_utf8_lossy(&output.stdout));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn retrain(job: &Job, args: &[&str], status: i32) -> Value {
    report(&command(job, args).output().unwrap(), status)
}

#[test]
fn a_retrain_of_the_same_log_under_the_same_settings_is_the_live_model_and_is_handed_over() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    let report = retrain(&job, &["--slice", "position=1"], 0);
    let comparison = &report["comparison"];
    assert_eq!((&report["outcome"], &report["job"]), (&"promoted".into(), &"at_its_start".into()), "{report}");
    assert_eq!((&comparison["verdict"], &comparison["blocks_that_differ"]), (&"not_worse".into(), &0.into()));
    assert!(comparison["examples"].as_u64().unwrap() > 3000, "{comparison}");
    for slice in comparison["slices"].as_array().unwrap() {
        assert_eq!(slice["candidate"], slice["live"]);
        assert_eq!(slice["difference"]["interval"], json!([0.0, 0.0]));
    }
    // The live job goes on from the candidate's frontier, and comes to what one run over the whole log comes to.
    let handed = job.train(&["--until-end"]);
    assert_eq!(handed["resumed"], true);
    assert!(handed["impressions_this_run"].as_u64().unwrap() < 3000, "{}", handed["impressions_this_run"]);
    let once = Job::over(&input.path().join("in")).train(&["--until-end"]);
    assert_eq!(outcome(&handed), outcome(&once));
    // And a replay comes to each checkpoint that the job has written since, as the candidate.
    let mut verify = Command::new(TIDEMILL);
    verify.args(["verify", "replay", "--json", "-c"]).arg(job.path("job.toml"));
    let replayed = summary(&verify.output().unwrap());
    assert_eq!((&replayed["same"], &replayed["lineage"]), (&true.into(), &report["lineage"]), "{replayed}");
    let digests = replayed["marks"].as_array().unwrap().iter().filter(|mark| !mark["of"]["digests"].is_null());
    assert!(digests.count() >= 2, "{replayed}");
    // The end may as well be where a version ends.
    let manifest = job.path("snapshots/manifests/000000000002.json");
    let through = job.path("through");
    let args = ["--promote", "never", "--through", manifest.to_str().unwrap(), "--dir", through.to_str().unwrap()];
    let frontier = Manifest::from_bytes(&std::fs::read(&manifest).unwrap()).unwrap().facts.frontier_time.unwrap();
    assert!(retrain(&job, &args, 0)["frontier"].as_i64().unwrap() <= frontier.0);
    // What it publishes is of the lineage that was handed over.
    let shown = show(&job);
    assert_eq!(
        (&shown["lineage"], shown["version"].as_u64()),
        (&report["lineage"], handed["snapshot_version"].as_u64())
    );
}

fn show(job: &Job) -> Value {
    let output = Command::new(TIDEMILL)
        .args(["snapshots", "show", "--json", "--store"])
        .arg(job.path("snapshots"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_worse_candidate_is_not_promoted_and_the_report_says_why() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    let before = show(&job);
    let report = retrain(&job, &["--set", "model.logistic.a=4.0"], 3);
    assert_eq!(report["outcome"], "not_promoted");
    assert!(report["reason"].as_str().unwrap().contains("it is worse: log loss +"), "{report}");
    assert_eq!(report["comparison"]["verdict"], "worse");
    assert_eq!(show(&job), before);
    // The live job knows nothing of it.
    assert_eq!(
        job.train(&["--until-end"])["model_digest"],
        Job::over(&job.input).train(&["--until-end"])["model_digest"]
    );
}

#[test]
fn without_a_live_job_to_compare_with_only_always_promotes() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    let first = retrain(&job, &[], 3);
    assert!(first["reason"].as_str().unwrap().contains("no checkpoint of a live job"), "{first}");
    let again = retrain(&job, &["--promote", "always"], 0);
    assert_eq!(again["outcome"], "promoted");
    assert_eq!(show(&job)["lineage"], again["lineage"]);
}

#[test]
fn an_interrupted_retrain_goes_on_and_comes_to_the_same() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    let began = Instant::now();
    let args = ["--promote", "never", "--passes", "2", "--dir"];
    let whole = retrain(&job, &[&args[..], &[job.path("whole").to_str().unwrap()]].concat(), 0);
    let took = began.elapsed().as_micros() as u64;
    let seed = 5;
    println!("seed {seed}");
    let mut chance = Pcg64Mcg::seed_from_u64(seed);
    let (mut killed, mut done) = (0, 0);
    let dir = |done: u32| job.path(&format!("broken-{done}"));
    while killed < 8 {
        let dir = dir(done);
        let mut child = command(&job, &[&args[..], &[dir.to_str().unwrap()]].concat()).spawn().unwrap();
        std::thread::sleep(Duration::from_micros(chance.next_u64() % took));
        match child.try_wait().unwrap() {
            None => killed += 1,
            Some(_) => done += 1, // before it could be killed: another one
        }
        // A signal that it may answer, or one that it may not.
        if chance.next_u64() % 2 == 0 {
            let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
        } else {
            let _ = child.kill();
        }
        child.wait().unwrap();
    }
    let broken = retrain(&job, &[&args[..], &[dir(done).to_str().unwrap()]].concat(), 0);
    assert_eq!(broken["candidate"]["model_digest"], whole["candidate"]["model_digest"]);
    assert_eq!(broken["candidate"]["order_digest"], whole["candidate"]["order_digest"]);
    assert_eq!(broken["comparison"], whole["comparison"]);
}

#[test]
fn a_retrain_that_is_asked_for_otherwise_does_not_go_on_from_another_one() {
    let input = generate(&["-n", "3000"]);
    let job = Job::over(&input.path().join("in"));
    retrain(&job, &["--promote", "never"], 0);
    let output = command(&job, &["--promote", "never", "--from", "2026-01-01T00:00:30Z"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("`from` was null and is") && text.contains("--dir"), "{text}");
}

#[test]
fn a_retrain_from_a_time_learns_nothing_before_it_and_knows_what_was_seen() {
    let input = generate(&["-n", "8000", "--duplicates", "0.05", "--disorder", "2s"]);
    let job = Job::over(&input.path().join("in"));
    let all = job.train(&["--until-end"]);
    let report = retrain(&job, &["--promote", "never", "--from", "2026-01-01T00:01:30Z"], 0);
    let (counts, all) = (&report["candidate"]["counts"], &all["counts"]);
    let n = |v: &Value| v.as_u64().unwrap();
    assert!(n(&counts["before_start"]) > 2000, "{counts}");
    assert_eq!(report["candidate"]["impression_gap"], 0);
    // Duplicates of impressions before the start are known, wherever the first was.
    assert!(n(&counts["duplicates"]) > 0 && n(&counts["duplicates"]) <= n(&all["duplicates"]));
    let learned = n(&counts["positives"]) + n(&counts["negatives"]);
    let accounted = learned + n(&counts["before_start"]) + n(&counts["duplicates"]) + n(&counts["too_late"]);
    assert_eq!(accounted, n(&counts["impressions"]), "{counts}");
}

#[test]
fn more_passes_and_a_warm_start_begin_with_what_was_learned() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    let dir = |name: &str| job.path(name).to_str().unwrap().to_owned();
    let loss = |report: &Value| report["candidate"]["metrics"]["logloss"].as_f64().unwrap();
    let one = retrain(&job, &["--promote", "never", "--dir", &dir("one")], 0);
    let two = retrain(&job, &["--promote", "never", "--passes", "2", "--dir", &dir("two")], 0);
    // What is learned a second time was known; what is compared is new to both.
    assert!(loss(&two) < loss(&one), "{} {}", loss(&two), loss(&one));
    assert_eq!(two["comparison"]["examples"], one["comparison"]["examples"]);
    for from in [dir("checkpoints"), dir("snapshots")] {
        let name = dir(&format!("warm-{}", from.len()));
        let warm = retrain(&job, &["--promote", "never", "--warm-start", &from, "--dir", &name], 0);
        assert!(loss(&warm) < loss(&one), "{} {}", loss(&warm), loss(&one));
        assert_ne!(warm["lineage"], one["lineage"]);
    }
}

#[test]
fn a_warm_start_drops_the_rows_and_vectors_of_features_that_are_gone_and_no_others() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.edit(
        "[model.logistic]",
        "[model]\nkind = \"two_tower\"\n[model.two_tower]\ndim = 4\nlayers = [8]\n[model.logistic]",
    );
    job.edit("from = \"user.id\"", "from = \"user.id\"\ntower = \"user\"");
    job.edit("from = \"item.id\"", "from = \"item.id\"\ntower = \"item\"");
    job.edit("name = \"tags\"", "name = \"tags\"\ntower = \"item\"");
    job.train(&["--until", HALF]);
    let newest = |channel: &str| {
        let store = Store::open(job.path("snapshots").to_str().unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let snapshot = runtime.block_on(store.load_latest(channel)).unwrap().unwrap();
        let schema = Schema::from_json(&snapshot.manifest.model.schema.to_string()).unwrap();
        (schema, snapshot.weights)
    };
    let (before, had) = newest("live");
    let live = job.path("live.toml");
    std::fs::copy(job.path("job.toml"), &live).unwrap();
    job.edit("[[features]]\nname = \"tags\"\ntower = \"item\"\nkind = \"multi\"\n", "");
    job.edit("[[crosses]]\nof = [\"user_id\", \"tags\"]\n", "");
    for from in ["checkpoints", "snapshots"] {
        let (dir, from) = (job.path(&format!("from-{from}")), job.path(from));
        // It learns from little, so what it holds is what it began with and a bit.
        let args = ["--promote", "never", "--from", "2026-01-01T00:02:00Z", "--warm-start"];
        let paths = [from.to_str().unwrap(), "--dir", dir.to_str().unwrap(), "--live", live.to_str().unwrap()];
        let output = command(&job, &[&args[..], &paths].concat()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{text}");
        let (after, has) = newest("candidate");
        let owned = |id: u64| (0..after.len()).any(|i| after.may_own(i, id));
        let used = |id: u64| (0..after.len()).any(|i| after.may_use_vector(i, id));
        assert!(has.ids().iter().all(|&id| owned(id)));
        let stayed = |id: &u64| has.ids().binary_search(id).is_ok();
        assert!(had.ids().iter().filter(|id| owned(**id)).all(stayed), "a row went that could be of a feature");
        let (vectors, ours) = (had.towers().unwrap().ids(), has.towers().unwrap().ids());
        assert!(ours.iter().all(|&id| used(id)));
        assert!(vectors.iter().filter(|id| used(**id)).all(|id| ours.binary_search(id).is_ok()), "a vector went");
        let of = |name: &str| {
            let i = before.index_of(name).unwrap();
            had.ids().iter().filter(|id| before.may_own(i, **id)).collect::<Vec<_>>()
        };
        for name in ["tags", "user_id*tags"] {
            let (rows, left) = (of(name), of(name).into_iter().filter(|id| stayed(id)).count());
            assert!(rows.len() > 10 && left * 50 <= rows.len(), "{left} of {} rows of {name}", rows.len());
        }
        let report = report(&output, 0);
        let warm = &report["warm_start"];
        assert_eq!((&warm["gone"], &warm["start_cold"]), (&json!(["tags", "user_id*tags"]), &json!([])), "{report}");
        assert!(warm["dropped_rows"].as_u64() > Some(100) && warm["dropped_vectors"].as_u64() > Some(10), "{report}");
    }
}

/// Appends a log to files of a directory while it lives, as fast as it takes `whole` for all; not past half of it before it
/// is let go on, however slow the machine.
struct Grows {
    dir: TempDir,
    free: std::sync::Arc<AtomicBool>,
    done: std::sync::Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Grows {
    fn start(log: &Path, whole: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Vec::new();
        for entry in std::fs::read_dir(log).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "jsonl") {
                let file = std::fs::File::create(dir.path().join(path.file_name().unwrap())).unwrap();
                files.push((file, std::fs::read(&path).unwrap(), 0));
            }
        }
        let [done, free] = [false; 2].map(|set| std::sync::Arc::new(AtomicBool::new(set)));
        let thread = std::thread::spawn({
            let (done, free) = (done.clone(), free.clone());
            move || {
                let began = Instant::now();
                while !done.load(Ordering::Relaxed) {
                    let share = (began.elapsed().as_secs_f64() / whole.as_secs_f64())
                        .min(if free.load(Ordering::Relaxed) { 1.0 } else { 0.5 });
                    for (file, content, at) in &mut files {
                        let to = (content.len() as f64 * share) as usize;
                        file.write_all(&content[*at..to]).unwrap();
                        *at = to;
                    }
                    if share >= 1.0 {
                        done.store(true, Ordering::Relaxed);
                    }
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        Self { dir, free, done, thread: Some(thread) }
    }

    fn wait(&mut self) {
        self.free.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Grows {
    fn drop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
    }
}

#[test]
fn under_requests_a_running_job_takes_a_candidate_over_and_no_impression_is_skipped_or_counted_twice() {
    let input = generate(&["-n", "30000", "--partitions", "2", "--disorder", "2s", "--duplicates", "0.02"]);
    let log = input.path().join("in");
    let mut growing = Grows::start(&log, Duration::from_secs(10));
    let count = |job: &Job| job.edit("prior_ctr = 0.1", "rule = \"count\"");
    let job = Job::over(growing.dir.path());
    count(&job);
    job.edit("[clicks]", "idle_after = \"never\"\n[clicks]");
    job.edit("[join]", "idle_after = \"never\"\n[join]");
    // Far enough from the end that every window closes while the log still moves.
    let until = "2026-01-01T00:15:00Z";
    let mut child = job.command(&["--json", "--until", until, "--follow"]).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let said = std::thread::spawn(move || {
        let mut text = String::new();
        std::io::Read::read_to_string(&mut stderr, &mut text).unwrap();
        text
    });
    while !job.path("snapshots/channels/live").is_dir()
        || std::fs::read_dir(job.path("checkpoints")).unwrap().count() < 3
    {
        assert!(child.try_wait().unwrap().is_none(), "the live job ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    // What is no offer does not end the job.
    std::fs::write(job.path("checkpoints/handover.json"), "{}").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    assert!(child.try_wait().unwrap().is_none(), "the live job ended");
    let serving = Serving::start(&job.path("snapshots"), &[]);
    serving.ready_when("a version", |status, _| status == 200);
    let over = AtomicBool::new(false);
    let (report, answers) = std::thread::scope(|scope| {
        // One request after the other, from before the retrain to behind the promotion; each answer names its version.
        let asking = scope.spawn(|| {
            let (mut client, mut answers) = (serving.connect(), Vec::new());
            while !over.load(Ordering::Relaxed) {
                let body = r#"{"context": {"user": {"id": "u1"}}, "candidates": [{"item": {"id": "i1"}}, {"item": {"id": "i2"}}]}"#;
                let (status, text) = client.request("POST", "/v1/score", body);
                assert_eq!(status, 200, "{text}");
                let answer: Value = serde_json::from_str(&text).unwrap();
                answers.push(answer["version"].as_u64().unwrap());
            }
            answers
        });
        let report = retrain(&job, &["--promote", "always"], 0);
        std::thread::sleep(Duration::from_secs(2));
        over.store(true, Ordering::Relaxed);
        (report, asking.join().unwrap())
    });
    assert_eq!((&report["outcome"], &report["job"]), (&"promoted".into(), &"took_over".into()), "{report}");
    // The candidate was published before it was promoted, so the job may have published versions since with larger numbers.
    let candidate = report["version"].as_u64().unwrap();
    let steps: Vec<_> = answers.windows(2).filter(|pair| pair[0] != pair[1]).collect();
    assert!(answers.iter().filter(|version| **version != candidate).is_sorted(), "versions changed {steps:?}");
    assert!(answers.len() > 100, "{} answers", answers.len());
    assert!(*answers.last().unwrap() >= candidate, "the fleet has not got it: versions changed {steps:?}");
    growing.wait();
    let output = child.wait_with_output().unwrap();
    let said = said.join().unwrap();
    assert!(output.status.success(), "{said}");
    let live = summary(&output);
    assert!(said.contains("a retrained model was taken over"), "{said}");
    let whole = Job::over(&log);
    count(&whole);
    let once = whole.train(&["--until", until]);
    assert_eq!(outcome(&live), outcome(&once));
    assert_eq!(show(&job)["lineage"], report["lineage"]);
}

#[test]
fn a_log_that_goes_on_behind_a_retrain_comes_to_what_it_comes_to_at_once() {
    let input = generate(&["-n", "12000", "--partitions", "2", "--disorder", "2s", "--late", "0.003"]);
    let log = input.path().join("in");
    let growing = tempfile::tempdir().unwrap();
    let files: Vec<_> = std::fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path()).collect();
    let files = files.iter().filter(|path| path.extension().is_some_and(|e| e == "jsonl"));
    // Each is cut elsewhere, within a few seconds of log, most of them inside of a line.
    for (at, path) in files.clone().enumerate() {
        let content = std::fs::read(path).unwrap();
        let cut = content.len() * (500 + 4 * at) / 1000;
        std::fs::write(growing.path().join(path.file_name().unwrap()), &content[..cut]).unwrap();
    }
    let job = Job::over(growing.path());
    let half = retrain(&job, &["--promote", "always"], 0);
    assert!(half["candidate"]["examples"].as_u64().unwrap() > 3000);
    for path in files {
        std::fs::copy(path, growing.path().join(path.file_name().unwrap())).unwrap();
    }
    let whole = job.train(&["--until-end"]);
    assert_eq!(whole["journal_entries"], 0);
    assert_eq!(outcome(&whole), outcome(&Job::over(&log).train(&["--until-end"])));
}

#[test]
fn a_job_with_other_settings_refuses_a_candidate_and_goes_on() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    retrain(&job, &["--promote", "always", "--set", "model.logistic.a=0.2"], 0);
    let output = job.command(&["--json", "--until-end"]).output().unwrap();
    let went_on = summary(&output);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("was not taken over") && text.contains("other settings"), "{text}");
    assert_eq!(went_on["model_digest"], Job::over(&job.input).train(&["--until-end"])["model_digest"]);
    // With the retrain's settings the candidate is taken, once it is offered again.
    retrain(&job, &["--promote", "always", "--set", "model.logistic.a=0.2"], 0);
    let taken = job.train(&["--until-end", "--set", "model.logistic.a=0.2"]);
    let once = Job::over(&job.input).train(&["--until-end", "--set", "model.logistic.a=0.2"]);
    assert_eq!(taken["model_digest"], once["model_digest"]);
}

#[test]
fn the_script_goes_on_with_what_was_interrupted_and_passes_the_exit_status_on() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", HALF]);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/full_retrain.sh");
    let run = |args: &[&str]| {
        let mut command = Command::new(script);
        command.env("TIDEMILL", TIDEMILL).env("TIDEMILL_RETRAINS", job.path("retrains"));
        command.arg("-c").arg(job.path("job.toml")).args(["--json", "--block", "5s"]).args(args);
        command.stdin(Stdio::null()).output().unwrap()
    };
    // Interrupted: the directory and what was asked for stay.
    let kept = job.path("retrains/20260101T000000Z");
    std::fs::create_dir_all(&kept).unwrap();
    std::os::unix::fs::symlink("20260101T000000Z", job.path("retrains/current")).unwrap();
    let asked = format!("-c\n{}\n--json\n--block\n5s\n", job.path("job.toml").display());
    std::fs::write(kept.join("asked"), asked).unwrap();
    let other = run(&["--passes", "2"]);
    assert_eq!(other.status.code(), Some(2), "{}", String::from_utf8_lossy(&other.stderr));
    let promoted = report(&run(&[]), 0);
    assert_eq!(promoted["outcome"], "promoted");
    assert!(kept.join("report.json").exists() && job.path("retrains/report-20260101T000000Z.json").exists());
    assert!(!job.path("retrains/current").is_symlink());
    // The live job has learned nothing since: there is nothing to compare on, and that has a status of its own.
    job.train(&["--until-end"]);
    assert_eq!(report(&run(&[]), 3)["outcome"], "not_promoted");
    assert_eq!(run(&["--last", "soon"]).status.code(), Some(2));
}
