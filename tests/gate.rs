//! The gate: a version that is worse than what serves is not named, through the real command.

mod common;

use common::{Job, TIDEMILL, generate};
use serde_json::Value;

fn manifest(job: &Job, channel: &str) -> Value {
    let store = job.path("snapshots");
    let mut show = std::process::Command::new(TIDEMILL);
    show.args(["snapshots", "show", "--json", "--channel", channel, "--store"]).arg(store);
    let output = show.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A job that learned the first half of a stream, and published once.
fn half_way() -> (Job, tempfile::TempDir) {
    let input = generate(&["-n", "40000"]);
    let job = Job::over(&input.path().join("in"));
    job.edit("every = \"30s\"", "every = \"1000d\"");
    let all = Job::over(&input.path().join("in"));
    all.train(&["--until-end"]);
    let times = &manifest(&all, "live")["facts"]["event_times"];
    let middle = ((times[0].as_i64().unwrap() + times[1].as_i64().unwrap()) / 2).to_string();
    job.train(&["--until", &middle]);
    (job, input)
}

#[test]
fn a_worse_model_is_held_with_its_reason_and_what_served_goes_on_serving() {
    let (job, _input) = half_way();
    let before = manifest(&job, "live");
    assert_eq!(before["gate"]["verdict"], "form");
    // Another lineage, with a rate that tears the weights about.
    job.edit("name = \"test\"", "name = \"torn\"");
    job.edit("checkpoints", "others");
    let output = job.command(&["--until-end", "--json", "--set", "model.logistic.a=8.0"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(manifest(&job, "live")["version"], before["version"]);
    let held = manifest(&job, "live-held");
    assert_eq!((&held["gate"]["verdict"], held["lineage"] == before["lineage"]), (&"held".into(), false));
    let reason = held["gate"]["reason"].as_str().unwrap();
    assert!(reason.contains("its log loss is"), "{reason}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("was held") && said.contains(reason), "{said}");
    // Without a gate it would have been named.
    job.edit("others", "third");
    job.train(&["--until-end", "--set", "model.logistic.a=8.0", "--set", "gate.examples=0"]);
    let named = manifest(&job, "live");
    assert_eq!((&named["gate"], &named["lineage"]), (&Value::Null, &held["lineage"]));
}

#[test]
fn the_job_that_goes_on_passes_with_the_figures_of_both() {
    let (job, _input) = half_way();
    job.train(&["--until-end"]);
    let passed = manifest(&job, "live");
    let gate = &passed["gate"];
    assert_eq!(gate["verdict"], "passed", "{gate}");
    assert!(gate["examples"].as_u64().unwrap() > 5000 && gate["positives"].as_u64().unwrap() > 500, "{gate}");
    let loss = |of: &str| gate[of]["logloss"].as_f64().unwrap();
    let difference = gate["difference"].as_f64().unwrap();
    assert!((loss("candidate") - loss("as_served") - difference).abs() < 1e-9, "{gate}");
    assert!(difference < 0.0, "a model of age zero is better than one that is half a stream old: {gate}");
}

#[test]
fn examples_that_the_other_has_learned_are_not_compared() {
    let (job, _input) = half_way();
    job.train(&["--until-end"]);
    job.edit("name = \"test\"", "name = \"again\"");
    job.edit("checkpoints", "others");
    job.train(&["--until-end"]);
    let again = manifest(&job, "live");
    assert_eq!(
        (&again["gate"]["verdict"], &again["gate"]["examples"]),
        (&"form".into(), &0.into()),
        "{}",
        again["gate"]
    );
}
