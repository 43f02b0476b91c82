//! What a person does to a store by `tidemill snapshots`, while a job goes on.

mod common;

use std::process::Command;

use common::{Job, TIDEMILL, generate};
use serde_json::{Value, json};

fn snapshots(job: &Job, args: &[&str]) -> (bool, String) {
    let output = Command::new(TIDEMILL).arg("snapshots").args(args).arg("--store").arg(job.path("snapshots")).output();
    let output = output.unwrap();
    let said = if output.status.success() { &output.stdout } else { &output.stderr };
    (output.status.success(), String::from_utf8_lossy(said).into_owned())
}

fn ask(job: &Job, args: &[&str]) -> Value {
    let (well, said) = snapshots(job, &[args, &["--json"]].concat());
    assert!(well, "{args:?}: {said}");
    serde_json::from_str(&said).unwrap()
}

fn live(job: &Job) -> u64 {
    ask(job, &["show"])["version"].as_u64().unwrap()
}

/// A stream in four parts of equal length, by the times between them, and a job over it that keeps all versions.
fn parts() -> (tempfile::TempDir, Job, [String; 3]) {
    let input = generate(&["-n", "12000"]);
    let all = Job::over(&input.path().join("in"));
    all.train(&["--until-end"]);
    let times = &ask(&all, &["show"])["facts"]["event_times"];
    let (first, last) = (times[0].as_i64().unwrap(), times[1].as_i64().unwrap());
    let job = Job::over(&input.path().join("in"));
    let at = [1, 2, 3].map(|part| (first + (last - first) * part / 4).to_string());
    (input, job, at)
}

#[test]
fn a_rollback_holds_the_channel_while_the_trainer_publishes_on_until_it_is_let_go() {
    let (_input, job, [first, second, third]) = parts();
    job.train(&["--until", &first]);
    let old = live(&job);
    job.train(&["--until", &second]);
    let new = live(&job);
    assert!(new > old);

    let (well, said) = snapshots(&job, &["rollback", &old.to_string()]);
    assert!(well && said.contains("pinned") && said.contains("unpin"), "{said}");
    assert_eq!(live(&job), old);
    let trained = job.train(&["--until", &third]);
    let published = trained["snapshot_version"].as_u64().unwrap();
    assert!(published > new, "the trainer publishes on");
    assert_eq!(live(&job), old, "and the channel stays");
    let list = ask(&job, &["list"]);
    let row = list.as_array().unwrap().iter().find(|row| row["version"] == old).unwrap();
    assert_eq!((&row["channels"], &row["pinned"]), (&json!(["live"]), &json!(["live"])));

    let (well, said) = snapshots(&job, &["promote", &published.to_string()]);
    assert!(!well && said.contains("pinned") && said.contains("unpin"), "{said}");
    let done = ask(&job, &["unpin"]);
    assert_eq!((&done["changed"], &done["after"]["pinned"]), (&json!(true), &json!(false)));
    assert_eq!(live(&job), old, "until the next publication");
    let last = job.train(&["--until-end"])["snapshot_version"].as_u64().unwrap();
    assert_eq!(live(&job), last);
    let (well, said) = snapshots(&job, &["verify"]);
    assert!(well, "{said}");
}

#[test]
fn a_version_is_promoted_from_one_channel_to_another() {
    let (_input, job, [first, ..]) = parts();
    job.train(&["--until", &first]);
    let named = live(&job);
    let (well, said) = snapshots(&job, &["promote"]);
    assert!(!well && said.contains("candidate") && said.contains("names no version"), "{said}");
    let done = ask(&job, &["promote", "--from", "live", "--channel", "stable"]);
    assert_eq!((&done["after"]["version"], &done["before"]), (&json!(named), &Value::Null));
    assert_eq!(ask(&job, &["show", "--channel", "stable"])["version"], named);
    let again = ask(&job, &["promote", "--from", "live", "--channel", "stable"]);
    assert_eq!(again["changed"], false);
    let (well, said) = snapshots(&job, &["promote", "99", "--channel", "stable"]);
    assert!(!well && said.contains("manifests/000000000099.json"), "{said}");
    let (well, said) = snapshots(&job, &["pin", "--channel", "no/name"]);
    assert!(!well && said.contains("letters, digits"), "{said}");
}

#[test]
fn a_difference_names_rows_counts_and_metrics() {
    let (_input, job, [first, second, _]) = parts();
    job.train(&["--until", &first]);
    let old = live(&job);
    job.train(&["--until", &second]);
    let new = live(&job);
    let diff = ask(&job, &["diff", &old.to_string(), &new.to_string()]);
    let rows = |name: &str| diff["rows"][name].as_u64().unwrap();
    let count = |side: &str| diff["fields"]["logistic rows"][side].as_u64().unwrap();
    assert_eq!(count("to"), count("from") + rows("logistic rows new") - rows("logistic rows gone"));
    assert!(rows("logistic rows new") > 0 && rows("logistic rows changed") > 0);
    assert!(diff["fields"]["count positives"]["to"].as_u64() > diff["fields"]["count positives"]["from"].as_u64());
    let (well, said) = snapshots(&job, &["diff", &old.to_string(), &new.to_string()]);
    assert!(well && said.contains("metric logloss") && said.contains("largest change of a weight"), "{said}");
    assert_eq!(ask(&job, &["diff", &new.to_string(), &new.to_string()])["rows"]["logistic rows changed"], 0);
}

#[test]
fn cleaning_by_hand_spares_what_a_channel_names_with_its_chain() {
    let (_input, job, [first, second, third]) = parts();
    job.train(&["--until", &first]);
    let kept = live(&job);
    ask(&job, &["promote", "--from", "live", "--channel", "stable"]);
    job.train(&["--until", &second]);
    let doomed = live(&job);
    job.train(&["--until", &third]);
    job.train(&["--until-end"]);
    let versions = |job: &Job| -> Vec<u64> {
        ask(job, &["list"]).as_array().unwrap().iter().map(|row| row["version"].as_u64().unwrap()).collect()
    };
    let before = versions(&job);
    let would = ask(&job, &["gc", "--keep", "1", "--grace", "0s", "--dry-run"]);
    assert_eq!((versions(&job), &would["dry_run"]), (before.clone(), &json!(true)));
    let done = ask(&job, &["gc", "--keep", "1", "--grace", "0s"]);
    assert_eq!(done["versions"], would["versions"]);
    let after = versions(&job);
    assert!(after.contains(&kept) && after.contains(before.last().unwrap()) && !after.contains(&doomed), "{after:?}");
    let (well, said) = snapshots(&job, &["verify"]);
    assert!(well, "{said}");
    assert_eq!(ask(&job, &["gc", "--keep", "1", "--grace", "0s"])["versions"], json!([]));
}
