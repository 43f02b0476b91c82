//! Objects of a store as input: the same bytes as files, in runs that end. Through `file://` addresses here; `tests/s3.rs` and its like have buckets.

mod common;
#[path = "common/columns.rs"]
mod columns;

use std::path::Path;

use common::{Job, generate, outcome};

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
    "--garbage",
    "0.003",
];

/// A job whose paths are addresses.
fn job_over(dir: &Path) -> Job {
    let job = Job::over(dir);
    let text = std::fs::read_to_string(job.path("job.toml")).unwrap();
    let addressed = text.replace("paths = [\"/", "paths = [\"file:///");
    assert_eq!(addressed.matches("file://").count(), 2);
    std::fs::write(job.path("job.toml"), addressed).unwrap();
    job
}

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
}

#[test]
fn objects_give_the_bytes_of_files_in_every_format() {
    for gz in [&[][..], &["--gz"][..]] {
        let input = generate(&[DISTURBED, gz].concat());
        let dir = input.path().join("in");
        let (files, objects) = (Job::over(&dir).train(&["--until-end"]), job_over(&dir).train(&["--until-end"]));
        assert_eq!(files["model_digest"], objects["model_digest"]);
        assert_eq!(files["order_digest"], objects["order_digest"]);
    }
    let input = generate(&["-n", "6000"]);
    let rows = tempfile::tempdir().unwrap();
    for name in ["impressions-000", "clicks-000"] {
        let records = columns::lines(&input.path().join(format!("in/{name}.jsonl")));
        let layout = columns::Layout { group: 1000, ..columns::Layout::default() };
        columns::write(&rows.path().join(format!("{name}.parquet")), &records, &layout);
    }
    let (files, objects) =
        (Job::over(rows.path()).train(&["--until-end"]), job_over(rows.path()).train(&["--until-end"]));
    assert_eq!(outcome(&files), outcome(&objects));
}

#[test]
fn a_run_over_objects_that_stops_and_goes_on_gives_the_bytes_of_one_run() {
    let input = generate(&[DISTURBED, &["--gz"]].concat());
    let dir = input.path().join("in");
    let whole = job_over(&dir).train(&["--until-end"]);
    let job = job_over(&dir);
    for until in ["2026-01-01T00:00:31.007Z", "2026-01-01T00:01:12.5Z"] {
        job.train(&["--until", until]);
    }
    let victim = dir.join("impressions-000.jsonl.gz");
    let content = std::fs::read(&victim).unwrap();
    std::fs::copy(dir.join("impressions-001.jsonl.gz"), &victim).unwrap();
    contains(&job.fails(&["--until-end"]), &["file://", "impressions-000.jsonl.gz", "is not the", "read before"]);
    std::fs::write(&victim, &content[..content.len() / 2]).unwrap();
    contains(&job.fails(&["--until-end"]), &["file://", "impressions-000.jsonl.gz", "cut off"]);
    std::fs::write(&victim, content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn objects_are_for_runs_that_end() {
    let input = generate(&["-n", "300"]);
    let job = job_over(&input.path().join("in"));
    contains(&job.fails(&[]), &["`impressions.source.paths`", "only in a run that ends", "file://"]);
    let check =
        std::process::Command::new(common::TIDEMILL).args(["check", "-c"]).arg(job.path("job.toml")).output().unwrap();
    contains(&String::from_utf8_lossy(&check.stdout), &["ok  impressions", "1 object(s) are there"]);
    let gone = job_over(Path::new("/nowhere"));
    contains(&gone.fails(&["--until-end"]), &["`file:///nowhere/impressions-*` cannot be read", "no such directory"]);
}
