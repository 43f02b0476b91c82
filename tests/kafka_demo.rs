//! `tidemill demo --kafka` keeps the promises of the demo on a real Kafka, and leaves nothing there: `scripts/services.sh up
//! kafka`, then the variables of its env file. `scripts/test.sh` does both.

mod common;
#[path = "common/kafka.rs"]
mod kafka;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::TIDEMILL;
use kafka::{brokers, config, wait_for};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use serde_json::Value;

/// The topics that there are, with the number of their partitions.
fn topics() -> Vec<(String, usize)> {
    let consumer: BaseConsumer = config().create().unwrap();
    let metadata = consumer.fetch_metadata(None, Duration::from_secs(10)).unwrap();
    metadata.topics().iter().map(|topic| (topic.name().to_owned(), topic.partitions().len())).collect()
}

fn names(report: &Value) -> Vec<String> {
    let topics = report["last"]["kafka"]["topics"].as_array().unwrap();
    topics.iter().map(|topic| topic.as_str().unwrap().to_owned()).collect()
}

fn are_gone(names: &[String]) {
    wait_for("the demo's topics to go", || topics().iter().all(|(topic, _)| !names.contains(topic)));
}

fn demo(dir: &Path, args: &[&str]) -> Value {
    let mut command = Command::new(TIDEMILL);
    command.args(["demo", "--json", "--kafka", &brokers(), "--dir"]).arg(dir).args(args);
    let output = command.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON; stderr: {stderr}"));
    assert!(output.status.success(), "{report:#}");
    for promise in report["promises"].as_array().unwrap() {
        assert_ne!(promise["kept"], false, "{promise}");
    }
    assert_eq!(report["last"]["kafka"]["brokers"], brokers());
    assert_eq!(report["topics_left"], Value::Null);
    report
}

#[test]
fn a_live_stream_through_kafka_keeps_every_promise_and_its_topics_go() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("demo");
    let report = demo(&dir, &["--seconds", "15", "--rate", "1500"]);
    let promises = report["promises"].as_array().unwrap();
    assert_eq!(promises.len(), 7);
    assert!(promises.iter().all(|promise| promise["kept"] == true), "{promises:?}");
    // What a real log has was there, and the join met it.
    let counts = &report["training"]["counts"];
    for key in ["duplicates", "rejected", "clicks_orphan", "clicks_outside"] {
        assert!(counts[key].as_u64().unwrap() > 0, "{key}: {counts}");
    }
    assert_eq!((&report["training"]["impression_gap"], &report["training"]["click_gap"]), (&0.into(), &0.into()));

    let topics = names(&report);
    assert_eq!(topics.len(), 2);
    are_gone(&topics);
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let (config, log) = (read("demo.toml"), read("demo.log"));
    for topic in &topics {
        assert!(config.contains(topic) && log.contains(topic), "{topic}");
    }
    assert!(!log.contains("end of partition"), "to be level with the log is nothing to warn of");
    let files = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let written: Vec<_> = files.filter(|name| name.starts_with("impressions") || name.starts_with("clicks")).collect();
    assert!(written.is_empty(), "the log is in Kafka alone, not in {written:?}");
}

#[test]
fn real_files_are_replayed_through_kafka() {
    let dir = tempfile::tempdir().unwrap();
    let data = ["--data", "tests/data/obd", "-c", "configs/obd.toml"];
    let report = demo(&dir.path().join("demo"), &[&["--seconds", "15"], &data[..]].concat());
    assert!(report["training"]["examples"].as_u64().unwrap() > 30_000);
    are_gone(&names(&report));
}

#[test]
fn a_demo_that_fails_deletes_its_topics_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new(TIDEMILL);
    command.args(["demo", "--json", "--kafka", &brokers(), "--seconds", "60", "--rate", "500", "--dir"]);
    let running = command.arg(dir.path().join("demo")).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Its topics have its process in their names.
    let mine = format!("-{}-", running.id());
    let found = || topics().into_iter().filter(|(topic, _)| topic.contains(&mine)).collect::<Vec<_>>();
    wait_for("the demo's topics", || found().len() == 2);
    assert!(found().iter().all(|(_, partitions)| *partitions == 4), "{:?}", found());
    // Too early for three swaps, so a promise breaks.
    wait_for("the demo to be live", || dir.path().join("demo/predictions.csv").exists());
    assert!(Command::new("kill").args(["-INT", &running.id().to_string()]).status().unwrap().success());
    let output = running.wait_with_output().unwrap();
    assert!(!output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    wait_for("the demo's topics to go", || found().is_empty());
}

#[test]
fn a_kafka_that_is_not_there_is_named() {
    let output = Command::new(TIDEMILL).args(["demo", "--json", "--kafka", "127.0.0.1:1"]).output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr);
    for part in ["no Kafka broker at `127.0.0.1:1`", "to make `tidemill-demo-"] {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
}
