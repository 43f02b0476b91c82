//! `tidemill examples`: what it writes is what was joined, and learns to the same bytes.

mod common;
#[path = "common/columns.rs"]
mod columns;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use arrow_array::cast::AsArray as _;
use arrow_array::types::{Float32Type, Float64Type, TimestampMillisecondType, UInt16Type, UInt64Type};
use arrow_array::{Array as _, RecordBatch};
use common::{Job, TIDEMILL, generate, summary};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;
use tidemill::feature::schema::{row_of, seed_of};

const DISTURBED: &[&str] = &[
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
    "--orphans",
    "0.03",
    "--garbage",
    "0.003",
];

fn examples(job: &Job, out: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(TIDEMILL);
    command.args(["examples", "--json", "-c"]).arg(job.path("job.toml")).arg("--out").arg(out).args(args);
    command.output().unwrap()
}

fn fails(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Learns from examples by the config that was written beside them.
fn train(config: &Path) -> Value {
    let output = Command::new(TIDEMILL).args(["train", "--json", "--until-end", "-c"]).arg(config).output().unwrap();
    summary(&output)
}

fn read(files: &[PathBuf]) -> Vec<RecordBatch> {
    let open = |path: &PathBuf| ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    files.iter().flat_map(|path| open(path).build().unwrap()).map(Result::unwrap).collect()
}

fn files(summary: &Value) -> Vec<PathBuf> {
    summary["files"].as_array().unwrap().iter().map(|path| path.as_str().unwrap().into()).collect()
}

#[test]
fn learning_from_the_examples_gives_the_weights_of_learning_from_the_log() {
    let input = generate(DISTURBED);
    let job = Job::over(&input.path().join("in"));
    let direct = job.train(&["--until", "2026-01-01T00:04:00Z", "--predictions", job.path("p.csv").to_str().unwrap()]);
    assert_eq!(direct["counts"]["windows_cut"], 0);
    let out = job.path("examples");
    let written = summary(&examples(&job, &out, &["--until", "2026-01-01T00:04:00Z", "--rows", "2500"]));
    assert!(written["files"].as_array().unwrap().len() > 2);
    for count in ["positives", "negatives"] {
        assert_eq!(written[count], direct["counts"][count]);
        assert_eq!(written["counts"][count], direct["counts"][count]);
    }
    for count in ["duplicates", "too_late", "rejected", "late", "clicks", "clicks_orphan", "clicks_missed"] {
        assert_eq!(written["counts"][count], direct["counts"][count], "{count}");
    }
    // The same examples, with the same labels, in the same order.
    let mut lines = String::from("id,label\n");
    for batch in read(&files(&written)) {
        let (ids, labels) = (batch["id"].as_string::<i32>(), batch["label"].as_boolean());
        for row in 0..batch.num_rows() {
            lines.push_str(&format!("{},{}\n", ids.value(row), u8::from(labels.value(row))));
        }
    }
    let predicted = std::fs::read_to_string(job.path("p.csv")).unwrap();
    let predicted: String = predicted
        .lines()
        .map(|line| {
            let parts: Vec<&str> = line.split(',').collect();
            format!("{},{}\n", parts[0], parts[2])
        })
        .collect();
    assert_eq!(predicted, lines);

    let again = train(&out.join("job.toml"));
    assert_eq!(direct["model_digest"], again["model_digest"]);
    assert_eq!(direct["examples"], again["examples"]);
    assert_eq!((&again["counts"]["duplicates"], &again["counts"]["late"]), (&0.into(), &0.into()));
}

#[test]
fn examples_hold_the_values_as_they_were_and_the_rows_that_the_model_sees() {
    let input = generate(&["-n", "3000"]);
    let job = Job::over(&input.path().join("in"));
    let out = job.path("all.parquet");
    let written = summary(&examples(&job, &out, &["--until-end"]));
    assert_eq!(files(&written), std::slice::from_ref(&out));
    let log = columns::lines(&input.path().join("in/impressions-000.jsonl"));
    let by_id: std::collections::HashMap<&str, &Value> = log.iter().map(|r| (r["id"].as_str().unwrap(), r)).collect();
    let mut seen = 0;
    for batch in read(&files(&written)) {
        let names: Vec<_> = batch.schema().fields().iter().map(|field| field.name().clone()).collect();
        let features = ["user_id", "item_id", "age", "position", "tags"];
        let own = ["id", "time", "event_time", "label", "weight"];
        assert_eq!(names, [&own[..], &features[..], &["slot_feature", "slot_row", "slot_value"]].concat());
        for row in 0..batch.num_rows() {
            let record = by_id[batch["id"].as_string::<i32>().value(row)];
            let user = batch["user_id"].as_string::<i32>().value(row);
            assert_eq!(record["user"]["id"], user);
            assert_eq!(record["event_time"].as_i64(), None);
            let times =
                ["time", "event_time"].map(|name| batch[name].as_primitive::<TimestampMillisecondType>().value(row));
            assert_eq!(Some(times[1]), record["ts"].as_i64());
            assert!(times[0] >= times[1]);
            let age = batch["age"].as_primitive::<Float64Type>();
            assert_eq!(record["user"]["age"].as_f64(), age.is_valid(row).then(|| age.value(row)));
            assert_eq!(record["position"].to_string(), batch["position"].as_string::<i32>().value(row));
            let tags = batch["tags"].as_list::<i32>();
            let tags: Vec<Value> = match tags.is_valid(row) {
                true => tags.value(row).as_string::<i32>().iter().map(|tag| tag.unwrap().into()).collect(),
                false => Vec::new(),
            };
            assert_eq!(record["tags"].as_array().cloned().unwrap_or_default(), tags);
            let list = |name: &str| batch[name].as_list::<i32>().value(row);
            let (of, rows, values) = (list("slot_feature"), list("slot_row"), list("slot_value"));
            let of = of.as_primitive::<UInt16Type>().values().to_vec();
            assert_eq!((rows.len(), values.len()), (of.len(), of.len()));
            assert_eq!((of[0], of[1]), (0, 1));
            assert_eq!(rows.as_primitive::<UInt64Type>().value(0), row_of(user.as_bytes(), seed_of("user_id")));
            assert_eq!(values.as_primitive::<Float32Type>().value(0), 1.0);
            seen += 1;
        }
    }
    assert_eq!(Some(seen), written["counts"]["impressions"].as_u64());
    // It is read back from one file, too.
    assert_eq!(job.train(&["--until-end"])["model_digest"], train(&job.path("all.toml"))["model_digest"]);
}

#[test]
fn examples_of_parquet_are_those_of_json_lines() {
    let input = generate(&["-n", "3000", "--disorder", "2s", "--duplicates", "0.02"]);
    let dir = input.path().join("in");
    let (json, rows) = (Job::over(&dir), tempfile::tempdir().unwrap());
    for name in ["impressions-000", "clicks-000"] {
        let layout = columns::Layout { group: 500, as_text: |name| name == "position", ..columns::Layout::default() };
        let records = columns::lines(&dir.join(format!("{name}.jsonl")));
        columns::write(&rows.path().join(format!("{name}.parquet")), &records, &layout);
    }
    let rows = Job::over(rows.path());
    let written = [&json, &rows].map(|job| {
        let out = job.path("e.parquet");
        summary(&examples(job, &out, &["--until-end"]));
        std::fs::read(out).unwrap()
    });
    assert!(written[0] == written[1]);
}

#[test]
fn from_leaves_out_what_came_before_and_changes_no_label() {
    let input = generate(&["-n", "4000", "--disorder", "2s"]);
    let job = Job::over(&input.path().join("in"));
    let rows = |out: &str, args: &[&str]| {
        let written = summary(&examples(&job, &job.path(out), args));
        let batches = read(&files(&written));
        batches
            .iter()
            .flat_map(|batch| {
                let (ids, labels) = (batch["id"].as_string::<i32>(), batch["label"].as_boolean());
                let time = batch["time"].as_primitive::<TimestampMillisecondType>();
                let row = |row| (ids.value(row).to_owned(), labels.value(row), time.value(row));
                (0..batch.num_rows()).map(row).collect::<Vec<_>>()
            })
            .collect::<Vec<_>>()
    };
    let all = rows("all.parquet", &["--until", "2026-01-01T00:01:30Z"]);
    let some =
        rows("some.parquet", &["--from", "2026-01-01T00:00:40Z", "--until", "2026-01-01T00:01:30Z", "--without-slots"]);
    let from = 1_767_225_640_000;
    assert!(some.len() > 500 && some.len() < all.len());
    assert_eq!(all.into_iter().filter(|row| row.2 >= from).collect::<Vec<_>>(), some);
}

#[test]
fn weights_of_a_bag_are_kept_where_they_are_asked_for_and_never_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for i in 0..200 {
        let ts = 1_767_225_600_000_i64 + i * 50;
        lines.push_str(&format!(
            "{{\"id\":{i},\"ts\":{ts},\"user\":{{\"id\":{}}},\"tags\":{{\"a\":0.5,\"b\":{}}}}}\n",
            i % 7,
            i % 3
        ));
    }
    std::fs::write(dir.path().join("impressions-0.jsonl"), lines).unwrap();
    std::fs::write(dir.path().join("clicks-0.jsonl"), "{\"id\":3,\"ts\":1767225600900}\n").unwrap();
    let job = Job::over(dir.path());
    let said = fails(&examples(&job, &job.path("e"), &["--until-end"]));
    assert!(said.contains("feature `tags` is a list of values") && said.contains("--weighted tags"), "{said}");
    assert_eq!(std::fs::read_dir(job.path("e")).unwrap().count(), 0, "nothing half written stays");
    let said = fails(&examples(&job, &job.path("e"), &["--until-end", "--weighted", "age"]));
    assert!(said.contains("only a feature of kind \"multi\" has weights"), "{said}");
    summary(&examples(&job, &job.path("e"), &["--until-end", "--weighted", "tags"]));
    assert_eq!(job.train(&["--until-end"])["model_digest"], train(&job.path("e/job.toml"))["model_digest"]);
}

#[test]
fn examples_that_are_there_are_not_written_over() {
    let input = generate(&["-n", "300"]);
    let job = Job::over(&input.path().join("in"));
    for out in ["e", "e.parquet"] {
        summary(&examples(&job, &job.path(out), &["--until-end"]));
        let said = fails(&examples(&job, &job.path(out), &["--until-end"]));
        assert!(said.contains("there are examples already"), "{said}");
    }
}

#[test]
fn labelled_slates_with_every_kind_of_feature_are_learned_to_the_same_weights() {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for i in 0..700_i64 {
        let ts = 1_767_225_600_000 + i * 40;
        let items: Vec<String> = (0..1 + i % 4)
            .map(|j| {
                let k = (i * 31 + j * 7) % 53;
                let tags = ["[]", "[\"a\",\"b\"]", "[\"c\",null,\"a\"]", "{\"a\":0.25,\"d\":2}"][(k % 4) as usize];
                format!(
                    "{{\"id\":{k},\"y\":{},\"price\":{},\"tags\":{tags},\"w\":{}}}",
                    i32::from(k % 5 == 0),
                    if k % 6 == 0 { "null".into() } else { format!("{}.125", k * 3 - 40) },
                    1 + k % 3
                )
            })
            .collect();
        let user = if i % 9 == 0 { "null".into() } else { format!("{{\"age\":{},\"vip\":{}}}", i % 70, i % 2 == 0) };
        let history = ["[]", "[1,2,3]", "[\"x\"]", "null"][(i % 4) as usize];
        let items = items.join(",");
        lines.push_str(&format!(
            "{{\"req\":\"r{i}\",\"ts\":{ts},\"u\":{user},\"time\":{},\"h\":{history},\"items\":[{items}]}}\n",
            i % 24
        ));
    }
    std::fs::write(dir.path().join("in.jsonl"), lines).unwrap();
    let text = format!(
        r#"
[impressions]
max_out_of_order = "1s"
max_ahead = "1s"
source = {{ paths = ["{0}/in.jsonl"] }}
record = {{ id = ["req", ".id"], explode = "items", label = ".y", weight = ".w" }}
[batch]
examples = 50
[model.logistic]
prior_ctr = 0.2
[[features]]
name = "item"
from = ".id"
[[features]]
name = "label"
from = "u.vip"
[[features]]
name = "time"
kind = "numeric"
as = "bins"
bins = [6, 12.5, 18]
[[features]]
name = "age"
from = "u.age"
kind = "numeric"
per_octave = 4
[[features]]
name = "price"
from = ".price"
kind = "numeric"
as = "value"
clip = [-30, 90]
scale = 0.1
log = true
[[features]]
name = "tags"
from = ".tags"
kind = "multi"
max_len = 2
[[features]]
name = "h.last"
from = "h"
kind = "sequence"
max_len = 2
[[crosses]]
of = ["item", "tags"]
"#,
        dir.path().display()
    );
    std::fs::write(dir.path().join("job.toml"), text).unwrap();
    let out = dir.path().join("e");
    let mut command = Command::new(TIDEMILL);
    command.args(["examples", "--json", "--until-end", "--weighted", "tags", "-c"]).arg(dir.path().join("job.toml"));
    let written = summary(&command.arg("--out").arg(&out).output().unwrap());
    let names: Vec<_> = read(&files(&written))[0].schema().fields().iter().map(|f| f.name().clone()).collect();
    assert_eq!(names[5..12], ["item", "feature_label", "feature_time", "age", "price", "tags", "h.last"]);
    let (direct, again) = (train(&dir.path().join("job.toml")), train(&out.join("job.toml")));
    assert!(direct["examples"].as_u64().unwrap() > 1500 && direct["counts"]["rejected"] == 0);
    assert_eq!(direct["model_digest"], again["model_digest"]);
    assert_eq!(direct["counts"]["positives"], again["counts"]["positives"]);
}
