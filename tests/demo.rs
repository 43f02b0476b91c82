//! The whole loop through the real command: `tidemill demo` keeps its promises, and leaves what it says.

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::TIDEMILL;
use serde_json::Value;

fn demo(args: &[&str]) -> Value {
    let output = Command::new(TIDEMILL).arg("demo").arg("--json").args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = serde_json::from_str(&text)
        .unwrap_or_else(|_| panic!("no JSON but `{text}`; stderr: {}", String::from_utf8_lossy(&output.stderr)));
    assert!(output.status.success(), "{report:#}");
    assert_eq!(report["ok"], true);
    for promise in report["promises"].as_array().unwrap() {
        assert_ne!(promise["kept"], false, "{promise}");
    }
    let number = |value: &Value| value.as_u64().unwrap();
    assert!(number(&report["last"]["requests_answered"]) > 0);
    assert_eq!(number(&report["last"]["requests_failed"]), 0);
    assert!(number(&report["last"]["swaps"]) >= 3);
    assert!(number(&report["answers_compared"]) >= number(&report["versions_answered"]));
    assert_eq!(report["training"]["impression_gap"], 0);
    assert_eq!(report["training"]["click_gap"], 0);
    report
}

fn lines(path: &Path) -> u64 {
    std::fs::read_to_string(path)
        .map_or_else(|_| std::fs::read(path).unwrap(), String::into_bytes)
        .iter()
        .filter(|byte| **byte == b'\n')
        .count() as u64
}

#[test]
fn a_live_stream_is_learned_published_served_and_asked_for_without_a_failure() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("demo");
    let report = demo(&["--seconds", "15", "--rate", "1500", "--dir", dir.to_str().unwrap()]);
    let (last, training) = (&report["last"], &report["training"]);

    let written = lines(&dir.join("impressions-0.jsonl")) + lines(&dir.join("impressions-1.jsonl"));
    assert_eq!(last["impressions_written"], written);
    assert_eq!(last["clicks_written"], lines(&dir.join("clicks-0.jsonl")));
    // What a real log has was there, and the join met it.
    let counts = &training["counts"];
    for (name, key) in
        [("duplicate", "duplicates"), ("garbage", "rejected"), ("orphan", "clicks_orphan"), ("late", "late")]
    {
        assert!(counts[key].as_u64().unwrap() > 0, "no {name} record: {counts}");
    }
    assert_eq!(lines(&dir.join("predictions.csv")), training["examples"].as_u64().unwrap() + 1);
    assert!(report["promises"].as_array().unwrap().iter().all(|promise| promise["kept"] == true));
    let closed = report["last_third"]["closed"].as_f64().unwrap();
    assert!(closed < 1.0, "nobody beats the truth on thousands of examples: {closed}");

    // The directory is a job like any other: its config goes on from its checkpoint.
    let config = dir.join("demo.toml");
    let train = Command::new(TIDEMILL).args(["train", "--until-end", "--json", "-c"]).arg(&config).output().unwrap();
    let resumed = common::summary(&train);
    assert_eq!(resumed["resumed"], true);
    assert_eq!(resumed["counts"]["impressions"], written, "what waited for its window was not lost");
}

#[test]
fn two_towers_keep_the_same_promises() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("demo");
    let report = demo(&["--model", "two_tower", "--seconds", "15", "--rate", "1500", "--dir", dir.to_str().unwrap()]);
    assert_eq!(report["last"]["model"], "two_tower");
    assert!(report["promises"].as_array().unwrap().iter().all(|promise| promise["kept"] == true));
    // Vectors were learned, published and scored with: every answer was compared with what its version says.
    assert!(report["training"]["tables"]["embedding"]["rows"].as_u64().unwrap() > 1000, "{}", report["training"]);
    assert!(report["answers_compared"].as_u64().unwrap() > 0);
    let config = std::fs::read_to_string(dir.join("demo.toml")).unwrap();
    assert!(config.contains("kind = \"two_tower\""), "its directory is a job of the same model");
}

#[test]
fn real_files_are_replayed_through_the_same_loop() {
    let report = demo(&["--seconds", "15", "--data", "tests/data/obd", "-c", "configs/obd.toml"]);
    assert!(report["training"]["examples"].as_u64().unwrap() > 30_000);
    assert_eq!(report["last_third"]["best"], Value::Null);
    // 207 clicks say nothing about learning, and the demo does not claim that they do.
    assert_eq!(report["promises"].as_array().unwrap().last().unwrap()["kept"], Value::Null);
}

#[test]
fn a_version_that_was_damaged_after_it_answered_breaks_a_promise_and_the_exit_code_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("demo");
    let mut command = Command::new(TIDEMILL);
    command.args(["demo", "--json", "--seconds", "10", "--rate", "500", "--dir"]).arg(&dir);
    let mut running = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let objects = dir.join("snapshots/objects");
    let mut written = Vec::new();
    while written.len() < 3 {
        assert!(running.try_wait().unwrap().is_none(), "it ended with {} versions", written.len());
        std::thread::sleep(Duration::from_millis(50));
        let entries = std::fs::read_dir(&objects).into_iter().flatten();
        let paths = entries.map(|entry| entry.unwrap().path());
        written = paths.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors")).collect();
    }
    // The oldest: it has answered, and the node is done with it.
    written.sort_by_key(|path| std::fs::metadata(path).unwrap().modified().unwrap());
    let mut bytes = std::fs::read(&written[0]).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&written[0], bytes).unwrap();

    let output = running.wait_with_output().unwrap();
    assert!(!output.status.success());
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["ok"], false);
    let promises = report["promises"].as_array().unwrap();
    let broken: Vec<_> = promises.iter().filter(|promise| promise["kept"] == false).collect();
    assert_eq!(broken.len(), 1, "{broken:?}");
    assert_eq!(broken[0]["name"], "every version that answered verifies");
    let name = written[0].file_name().unwrap().to_str().unwrap();
    assert!(broken[0]["found"].as_str().unwrap().contains(name), "{broken:?}");
}

#[test]
fn a_directory_with_something_in_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("mine"), "").unwrap();
    let output = Command::new(TIDEMILL).args(["demo", "--dir"]).arg(dir.path()).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("is not empty"));
}
