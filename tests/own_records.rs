//! Users' own records fit: slates, composed ids, labelled streams, times as people write them.

mod common;

use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use common::{TIDEMILL, summary};
use serde_json::Value;

fn train(dir: &Path, config: &str) -> Value {
    std::fs::write(dir.join("job.toml"), config).unwrap();
    let mut command = Command::new(TIDEMILL);
    summary(&command.args(["train", "--until-end", "--json", "-c", "job.toml"]).current_dir(dir).output().unwrap())
}

#[test]
fn a_slate_is_as_many_impressions_as_it_shows_items_and_ids_may_be_composed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut impressions, mut clicks) = (String::new(), String::new());
    for request in 0..200 {
        let (minute, second) = (request / 60, request % 60);
        let items: Vec<String> = (0..3).map(|i| format!(r#"{{"sku":{i},"slot":{i}}}"#)).collect();
        writeln!(
            impressions,
            r#"{{"request":"r{request}","at":"2026-02-01T10:{minute:02}:{second:02}Z","who":{{"uid":{}}},"shown":[{}]}}"#,
            request % 7,
            items.join(",")
        )
        .unwrap();
        writeln!(clicks, r#"{{"req":"r{request}","sku":"1","when":{}}}"#, 1_769_940_000 + request + 2).unwrap();
    }
    std::fs::write(dir.path().join("impressions.jsonl"), impressions).unwrap();
    std::fs::write(dir.path().join("clicks.jsonl"), clicks).unwrap();
    let s = train(
        dir.path(),
        r#"
        [impressions]
        source = { paths = ["impressions.jsonl"] }
        record = { id = ["request", ".sku"], time = "at", explode = "shown" }
        [clicks]
        source = { paths = ["clicks.jsonl"] }
        record = { id = ["req", "sku"], time = "when", time_format = "s" }
        [join]
        window = "5s"
        [snapshots]
        store = "snapshots"
        [[features]]
        name = "user"
        from = "who.uid"
        [[features]]
        name = "item"
        from = ".sku"
        [[features]]
        name = "slot"
        from = ".slot"
        role = "presentation"
        at_serving = 0
    "#,
    );
    assert_eq!(s["counts"]["impressions"], 600);
    assert_eq!(s["counts"]["positives"], 200, "item 1 of every slate was clicked");
    assert_eq!(s["counts"]["clicks_attributed"], 200);

    // Every feature's contribution is there, and they add up to the logit.
    let output = Command::new(TIDEMILL)
        .args(["score", "--store", "snapshots", "-c", "job.toml", "--explain", "impressions.jsonl"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 600);
    for line in &lines {
        let parts = line["contributions"].as_array().unwrap();
        let sum: f64 = parts.iter().map(|part| part["contribution"].as_f64().unwrap()).sum();
        assert!((sum + line["intercept"].as_f64().unwrap() - line["logit"].as_f64().unwrap()).abs() < 1e-5);
        assert_eq!(parts.len(), 3);
    }
    let logit = |i: usize| lines[i]["logit"].as_f64().unwrap();
    assert!(logit(601 - 5) > logit(601 - 4), "the item that was clicked scores higher: {} {}", logit(596), logit(597));
    // Scored as at serving: every candidate in the slot that the schema declares.
    assert_eq!(lines[0]["contributions"][2]["row"], lines[1]["contributions"][2]["row"]);
}

#[test]
fn records_that_carry_their_label_need_no_clicks_and_duplicates_count_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for i in 0..500 {
        let line = format!(
            r#"{{"id":{i},"ts":{},"user":"u{}","y":{},"w":{}}}"#,
            1_769_940_000_000_i64 + i * 100,
            i % 5,
            i % 5 == 0,
            if i % 2 == 0 { 1.0 } else { 0.5 }
        );
        writeln!(lines, "{line}").unwrap();
        if i % 100 == 0 {
            writeln!(lines, "{line}").unwrap();
        }
    }
    std::fs::write(dir.path().join("examples.jsonl"), lines).unwrap();
    let s = train(
        dir.path(),
        r#"
        [impressions]
        source = { paths = ["examples.jsonl"] }
        record = { label = "y", weight = "w" }
        [[features]]
        name = "user"
    "#,
    );
    assert_eq!(s["counts"]["positives"], 100);
    assert_eq!(s["counts"]["negatives"], 400);
    assert_eq!(s["counts"]["duplicates"], 5);
    let logloss = s["metrics"]["logloss"].as_f64().unwrap();
    assert!(logloss < 0.35, "the user says it all; logloss {logloss}");
}

#[test]
fn a_learned_model_stays_calibrated_when_negatives_are_sampled() {
    let input = common::generate(&["-n", "30000", "--rate", "100"]);
    let run = |rate: &str| {
        let job = common::Job::over(&input.path().join("in"));
        job.train(&["--until-end", "--set", &format!("sampling.negatives={rate}")])
    };
    let (all, sampled) = (run("1.0"), run("0.2"));
    let out = sampled["counts"]["sampled_out"].as_f64().unwrap();
    let negatives = all["counts"]["negatives"].as_f64().unwrap();
    assert!((out / negatives - 0.8).abs() < 0.02, "{out} of {negatives} negatives were left out");
    let figure = |s: &Value, name: &str| s["metrics"][name].as_f64().unwrap();
    assert!((figure(&sampled, "ctr") - figure(&all, "ctr")).abs() < 0.004);
    assert!((figure(&sampled, "calibration") - 1.0).abs() < 0.1, "{}", figure(&sampled, "calibration"));
}
