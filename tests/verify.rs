//! The promise of equal bytes as a command: what it says of a job that keeps it, and of one that does not.

mod common;

use std::process::{Command, Output, Stdio};

use common::{Job, TIDEMILL, generate};
use serde_json::Value;

const LOG: &[&str] = &[
    "-n",
    "9000",
    "--partitions",
    "2",
    "--disorder",
    "2s",
    "--late",
    "0.003",
    "--duplicates",
    "0.02",
    "--garbage",
    "0.003",
];

fn verify(job: &Job, what: &str, args: &[&str]) -> Output {
    let mut command = Command::new(TIDEMILL);
    command.args(["verify", what, "--json", "-c"]).arg(job.path("job.toml")).args(args);
    command.stdin(Stdio::null()).output().unwrap()
}

fn said(output: &Output, status: i32) -> Value {
    assert_eq!(output.status.code(), Some(status), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_replay_comes_to_the_checkpoint_and_to_every_version_in_the_store() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    // A lineage that was stopped and went on over and over, and publishes deltas.
    for seconds in (30..=240).step_by(30) {
        job.train(&["--until", &format!("2026-01-01T00:{:02}:{:02}Z", seconds / 60, seconds % 60)]);
    }
    let replayed = said(&verify(&job, "replay", &[]), 0);
    assert_eq!(replayed["same"], true, "{replayed}");
    let marks = replayed["marks"].as_array().unwrap();
    let of = |kind: &str| marks.iter().filter(|mark| !mark["of"][kind].is_null()).count();
    assert_eq!(of("checkpoint"), 1);
    assert!(of("version") >= 2, "{replayed}");
    // Every checkpoint there ever was, though only the newest are still on the disk.
    let newest = marks.iter().find_map(|mark| mark["of"]["checkpoint"].as_u64()).unwrap();
    let numbers: Vec<u64> = marks.iter().filter_map(|mark| mark["of"]["digests"].as_u64()).collect();
    assert_eq!(numbers, (1..=newest).collect::<Vec<_>>());
    assert!(newest > 5, "{replayed}");
    assert_eq!(replayed["builds"], Value::Null);
}

#[test]
fn a_log_that_was_changed_behind_the_job_is_noticed_with_table_and_row_and_the_first_batches_it_may_be() {
    let input = generate(&["-n", "6000"]);
    let job = Job::over(&input.path().join("in"));
    for until in ["00:30", "01:00", "01:30", "02:00", "02:30"] {
        job.train(&["--until", &format!("2026-01-01T00:{until}Z")]);
    }
    job.train(&["--until-end"]);
    let path = input.path().join("in/clicks-000.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    // The click in the middle is of another impression now, which there is none of.
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let middle = lines.len() / 2;
    let mut click: Value = serde_json::from_str(&lines[middle]).unwrap();
    let (key, _) = click.as_object().unwrap().iter().find(|(key, _)| key.contains("id")).unwrap();
    let key = key.clone();
    click[&key] = "nobody".into();
    lines[middle] = click.to_string();
    std::fs::write(&path, lines.join("\n") + "\n").unwrap();
    let replayed = said(&verify(&job, "replay", &[]), 3);
    assert_eq!(replayed["same"], false);
    let differs: Vec<&Value> =
        replayed["marks"].as_array().unwrap().iter().filter(|mark| mark["same"] == false).collect();
    assert!(!differs.is_empty());
    for mark in &differs {
        let expected = if mark["of"]["digests"].is_null() { "logistic, row " } else { "other: " };
        assert!(mark["difference"].as_str().unwrap().contains(expected), "{mark}");
    }
    // What came before the click is equal, and the first checkpoint behind it is not.
    let [equal, first] = [0, 1].map(|i| replayed["differs_between"][i].as_u64().unwrap());
    assert!(equal > 0 && equal < first, "{replayed}");
    let marks = replayed["marks"].as_array().unwrap();
    let checkpoints: Vec<&Value> = marks.iter().filter(|mark| !mark["of"]["digests"].is_null()).collect();
    let rows = |mark: &&Value| mark["difference"] == "other: rows of the logistic table";
    let at = checkpoints.iter().position(rows).unwrap();
    let [before, behind] = [at - 1, at].map(|at| checkpoints[at]["batch"].as_u64().unwrap());
    assert!(first <= behind, "{replayed}");
    assert!(
        checkpoints[at..].iter().all(|mark| mark["same"] == false),
        "what differed once does so in every later mark"
    );
    let newest = marks.iter().find(|mark| !mark["of"]["checkpoint"].is_null()).unwrap();
    let row = format!("it began behind batch {before} and not behind {behind}: logistic, row ");
    assert!(newest["difference"].as_str().unwrap().starts_with(&row), "{newest}");
}

#[test]
fn a_replay_under_other_settings_is_refused_with_their_names() {
    let input = generate(&["-n", "3000"]);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until-end"]);
    job.edit("prior_ctr = 0.1", "prior_ctr = 0.2");
    let output = verify(&job, "replay", &[]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("was made under other settings: `model` was"), "{text}");
}

#[test]
fn a_job_that_is_killed_over_and_over_comes_to_the_same_bytes() {
    let input = generate(LOG);
    let job = Job::over(&input.path().join("in"));
    let done = said(&verify(&job, "restart", &["--kills", "8", "--seed", "3"]), 0);
    assert_eq!((&done["same"], &done["kills"]), (&true.into(), &8.into()), "{done}");
    // Nothing of it went where the job writes.
    assert!(!job.path("checkpoints").exists() && !job.path("snapshots").exists());
}
