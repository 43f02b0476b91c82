//! Bad input gets a clear message, and nothing already learned is lost.

mod common;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Job, TIDEMILL, generate, outcome, summary};

const STREAM: &[&str] = &["-n", "6000", "--partitions", "2", "--disorder", "2s"];

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
}

/// Splits a file at the line nearest its middle.
fn halves(path: &Path) -> (Vec<u8>, Vec<u8>) {
    let all = std::fs::read(path).unwrap();
    let middle = all.len() / 2 + all[all.len() / 2..].iter().position(|b| *b == b'\n').unwrap() + 1;
    (all[..middle].to_vec(), all[middle..].to_vec())
}

fn files(dir: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> =
        entries.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with(prefix)).collect();
    found.sort();
    found
}

#[test]
fn an_unknown_key_is_refused_with_its_line() {
    let input = generate(&["-n", "10"]);
    let job = Job::over(&input.path().join("in"));
    job.edit("window = \"40s\"", "windw = \"40s\"");
    contains(&job.fails(&["--until-end"]), &["job.toml", "windw", "window"]);
}

#[test]
fn settings_that_contradict_each_other_are_refused_with_what_was_expected() {
    let input = generate(&["-n", "10"]);
    let job = Job::over(&input.path().join("in"));
    let said = job.fails(&["--until-end", "--set", "join.dedup_horizon=10s"]);
    contains(&said, &["join.dedup_horizon", "at least window + max_lateness + click_skew", "51s", "10s"]);
    let said = job.fails(&["--until-end", "--set", "impressions.max_ahead=1h"]);
    contains(&said, &["impressions.max_ahead", "at most impressions.max_out_of_order", "2s"]);
    let said = job.fails(&["--until-end", "--set", "sampling.negatives=0"]);
    contains(&said, &["sampling.negatives", "(0, 1]"]);
    let said = job.fails(&["--until-end", "--set", "features=[]"]);
    contains(&said, &["features"]);
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let job = Job::over(Path::new("/nowhere"));
    contains(&job.fails(&["--until-end"]), &["cannot read `/nowhere`", "No such file"]);
    let empty = tempfile::tempdir().unwrap();
    let said = Job::over(empty.path()).fails(&["--until-end"]);
    contains(&said, &["/impressions-*", "matches no file"]);
}

#[test]
fn a_truncated_gzip_stops_the_job_and_a_whole_one_lets_it_go_on_to_the_same_bytes() {
    let input = generate(&[STREAM, &["--gz"]].concat());
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    let victim = files(&dir, "impressions-")[0].clone();
    let content = std::fs::read(&victim).unwrap();
    std::fs::write(&victim, &content[..content.len() / 2]).unwrap();
    let job = Job::over(&dir);
    let said = job.fails(&["--until-end"]);
    contains(&said, &[victim.to_str().unwrap(), "cut off", "put the complete file in its place"]);
    std::fs::write(&victim, &content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_record_from_the_far_future_is_rejected_and_drags_nothing() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let clean = Job::over(&dir).train(&["--until-end"]);
    let victim = files(&dir, "impressions-")[0].clone();
    let (mut first, second) = halves(&victim);
    first.extend_from_slice(b"{\"id\":\"tomorrow\",\"ts\":4102444800000,\"user\":{\"id\":\"u1\"}}\n");
    std::fs::write(&victim, [first, second].concat()).unwrap();
    let job = Job::over(&dir);
    let s = job.train(&["--until-end"]);
    assert_eq!(s["counts"]["rejected"], 1);
    assert_eq!(s["counts"]["late"], clean["counts"]["late"]);
    assert_eq!(s["model_digest"], clean["model_digest"]);
    assert_eq!(s["journal_entries"], 1, "what the clock decided is journaled");
    let letters = std::fs::read_to_string(job.path("dead-letters.jsonl")).unwrap();
    contains(&letters, &["ahead of its clock", "max_ahead"]);
}

#[test]
fn a_rewritten_file_is_refused_and_the_old_content_goes_on() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    let job = Job::over(&dir);
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    let victim = files(&dir, "impressions-")[0].clone();
    let content = std::fs::read(&victim).unwrap();
    let rewritten = String::from_utf8(content.clone()).unwrap().replace("\"hour\":", "\"Hour\":");
    std::fs::write(&victim, rewritten).unwrap();
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "is not the file that was read before"]);
    std::fs::write(&victim, content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_rewritten_file_is_refused_also_where_reading_goes_on_in_its_first_chunk() {
    // So short that the whole file is one chunk: it is read again from its start, where no record stands before.
    let input = generate(&["-n", "600", "--rate", "5"]);
    let dir = input.path().join("in");
    let victim = dir.join("impressions-000.jsonl");
    let content = std::fs::read_to_string(&victim).unwrap();
    for (from, to) in
        [("\"user\":{\"id\":\"u", "\"user\":{\"id\":\"w"), ("\"user\":{\"id\":\"u", "\"user\":{\"id\":\"longer")]
    {
        let job = Job::over(&dir);
        job.train(&["--until", "2026-01-01T00:01:00Z"]);
        std::fs::write(&victim, content.replace(from, to)).unwrap();
        contains(&job.fails(&["--until-end"]), &["impressions-000.jsonl", "is not the log that was read before"]);
        std::fs::write(&victim, &content[..content.len() / 9]).unwrap();
        contains(&job.fails(&["--until-end"]), &["impressions-000.jsonl", "is not the"]);
        std::fs::write(&victim, &content).unwrap();
        assert_eq!(job.train(&["--until-end"])["resumed"], true);
    }
}

#[test]
fn a_file_that_was_trained_to_its_end_may_go_and_one_that_was_not_is_missed() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    // A first pair of files that ends long before the others begin to matter.
    let old = generate(&["-n", "900", "--start", "2025-12-31T23:00:00Z"]);
    for stream in ["impressions", "clicks"] {
        std::fs::copy(old.path().join(format!("in/{stream}-000.jsonl")), dir.join(format!("{stream}-old.jsonl")))
            .unwrap();
    }
    let job = Job::over(&dir);
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    std::fs::remove_file(dir.join("impressions-old.jsonl")).unwrap();
    std::fs::remove_file(dir.join("clicks-old.jsonl")).unwrap();
    let gone = job.train(&["--until", "2026-01-01T00:02:00Z"]);
    assert_eq!(gone["resumed"], true);
    std::fs::remove_file(dir.join("impressions-001.jsonl")).unwrap();
    contains(&job.fails(&["--until-end"]), &["impressions-001.jsonl", "further than it has trained", "bring it back"]);
}

#[test]
fn a_checkpoint_under_other_order_settings_is_refused_and_each_setting_is_named() {
    let input = generate(STREAM);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    let said = job.fails(&["--until-end", "--set", "join.window=50s", "--set", "batch.examples=32"]);
    contains(
        &said,
        &["`join.window` was 40000ms and is 50000ms", "`batch.examples` was 64 and is 32", "checkpoint.dir"],
    );
    job.train(&["--until-end"]);
}

#[test]
fn a_flipped_byte_in_the_newest_checkpoint_falls_back_to_the_one_before_loudly() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    for suffix in [".json", ".safetensors"] {
        let job = Job::over(&dir);
        job.train(&["--until", "2026-01-01T00:01:00Z"]);
        let generations: Vec<PathBuf> = files(&job.path("checkpoints"), "checkpoint-")
            .into_iter()
            .filter(|p| p.to_string_lossy().ends_with(suffix))
            .collect();
        assert!(generations.len() >= 2, "two generations are kept, and perhaps one of the chain before");
        let newest = generations.last().unwrap();
        let mut content = std::fs::read(newest).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        std::fs::write(newest, content).unwrap();
        let output = job.command(&["--json", "--until-end"]).output().unwrap();
        contains(&String::from_utf8_lossy(&output.stderr), &["ERROR", newest.file_name().unwrap().to_str().unwrap()]);
        let s = summary(&output);
        assert_eq!(s["resumed"], true);
        assert_eq!(outcome(&whole), outcome(&s));
    }
}

/// The heads of a job's checkpoints, oldest first.
fn heads(job: &Job) -> Vec<serde_json::Value> {
    let heads = files(&job.path("checkpoints"), "checkpoint-").into_iter();
    let heads = heads.filter(|path| path.extension().is_some_and(|extension| extension == "json"));
    // What comes behind the JSON is its check.
    let head = |path| serde_json::Deserializer::from_slice(&std::fs::read(path).unwrap()).into_iter().next();
    heads.map(|path| head(path).unwrap().unwrap()).collect()
}

/// The files of rows that a head names: one with all rows, then one for each checkpoint with what changed.
fn chain(head: &serde_json::Value) -> Vec<String> {
    let segments = head["segments"].as_array().unwrap().iter().filter(|segment| segment["name"] == "rows");
    segments.map(|segment| segment["file"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_flipped_byte_in_any_file_of_rows_falls_back_to_a_checkpoint_that_does_not_lean_on_it() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    for which in ["all rows", "what changed last"] {
        let job = Job::over(&dir);
        // The first two checkpoints of a job hold all rows, so that there are two chains.
        job.train(&["--until", "2026-01-01T00:00:30Z"]);
        job.train(&["--until", "2026-01-01T00:01:00Z"]);
        let heads = heads(&job);
        assert!(heads.iter().any(|head| chain(head).len() > 1), "no increment: {heads:#?}");
        let newest = chain(heads.last().unwrap());
        let file = if which == "all rows" { &newest[0] } else { newest.last().unwrap() };
        let sound = heads.iter().rev().find(|head| !chain(head).contains(file)).expect("a fallback")["number"].clone();
        let path = job.path("checkpoints").join(file);
        let mut content = std::fs::read(&path).unwrap();
        let middle = content.len() / 2;
        content[middle] ^= 1;
        std::fs::write(&path, content).unwrap();
        let output = job.command(&["--json", "--until-end"]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        contains(&said, &["ERROR", file, "expected", "taking the one before", &format!("number={sound}")]);
        let s = summary(&output);
        assert_eq!(s["resumed"], true);
        assert_eq!(outcome(&whole), outcome(&s), "{which}");
    }
}

#[test]
fn when_every_checkpoint_is_damaged_the_job_does_not_quietly_start_anew() {
    let input = generate(STREAM);
    let job = Job::over(&input.path().join("in"));
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    for path in files(&job.path("checkpoints"), "checkpoint-") {
        std::fs::write(&path, b"gone").unwrap();
    }
    contains(&job.fails(&["--until-end"]), &["no checkpoint", "can be used", "move the files away"]);
}

#[test]
fn a_flipped_byte_in_a_snapshot_is_refused_by_score_and_verify_and_training_goes_on() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let job = Job::over(&dir);
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    let store = job.path("snapshots");
    let score = |number: u64| {
        let mut command = Command::new(TIDEMILL);
        command.arg("score").arg("--store").arg(&store).args(["--version-number", &number.to_string()]);
        command.arg(files(&dir, "impressions-")[0].clone()).output().unwrap()
    };
    assert!(score(1).status.success());
    let manifest: serde_json::Value =
        serde_json::from_slice(&std::fs::read(files(&store.join("manifests"), "")[0].clone()).unwrap()).unwrap();
    let object = store.join(manifest["objects"][0]["name"].as_str().unwrap());
    let mut content = std::fs::read(&object).unwrap();
    let last = content.len() - 3;
    content[last] ^= 0x10;
    std::fs::write(&object, content).unwrap();
    let output = score(1);
    assert!(!output.status.success());
    contains(&String::from_utf8_lossy(&output.stderr), &[object.file_name().unwrap().to_str().unwrap()]);
    let verify = Command::new(TIDEMILL).args(["snapshots", "verify", "--store"]).arg(&store).output().unwrap();
    assert!(!verify.status.success());
    assert_eq!(job.train(&["--until-end"])["resumed"], true);
}

#[test]
fn a_second_trainer_on_the_same_checkpoints_is_refused() {
    let input = generate(STREAM);
    let job = Job::over(&input.path().join("in"));
    let mut first = job.command(&[]).spawn().unwrap(); // follows: stays alive
    let locked = job.path("checkpoints/LOCK");
    while !locked.exists() {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    std::thread::sleep(std::time::Duration::from_millis(50));
    let said = job.fails(&["--until-end"]);
    first.kill().unwrap();
    first.wait().unwrap();
    contains(&said, &["checkpoints"]);
}

#[test]
fn sigterm_ends_a_following_job_cleanly_and_it_goes_on_to_the_same_bytes() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    let job = Job::over(&dir);
    let child = job.command(&["--json"]).spawn().unwrap();
    // Once it has published it has learned something; that may take a while on a busy machine.
    while std::fs::read_dir(job.path("snapshots/manifests")).map_or(0, Iterator::count) == 0 {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let killed = Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let stopped = summary(&child.wait_with_output().unwrap());
    assert_eq!(stopped["ended_by"], "stopped");
    assert!(stopped["snapshot_version"].as_u64().is_some(), "a last snapshot is published on stop");
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_full_disk_while_checkpointing_costs_a_checkpoint_and_nothing_else() {
    let input = generate(STREAM);
    let dir = input.path().join("in");
    let whole = Job::over(&dir).train(&["--until-end"]);
    // A disk of 4 MiB, nearly full.
    let disk = tempfile::tempdir().unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"]).arg(disk.path()).status();
    if !mounted.is_ok_and(|status| status.success()) {
        // Without the right to mount, the same through a limit on the size of files.
        println!("cannot mount a small disk here; using a file size limit instead");
        let job = Job::over(&dir);
        let script = format!(
            "ulimit -f 40; trap '' XFSZ; exec {TIDEMILL} train -c {} --until-end --json",
            job.path("job.toml").display()
        );
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        contains(&said, &["a checkpoint could not be written"]);
        assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
        return;
    }
    let job = Job::over(&dir);
    let text = std::fs::read_to_string(job.path("job.toml")).unwrap();
    let own = format!("dir = \"{}", job.path("checkpoints").display());
    assert!(text.contains(&own));
    std::fs::write(job.path("job.toml"), text.replace(&own, &format!("dir = \"{}/c", disk.path().display()))).unwrap();
    let mut filler = std::fs::File::create(disk.path().join("filler")).unwrap();
    filler.write_all(&vec![0; 4000 << 10]).unwrap();
    let output = job.command(&["--json", "--until-end"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    contains(&said, &["a checkpoint could not be written", "space"]);
    drop(filler);
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    let again = job.command(&["--json", "--until-end"]).output().unwrap();
    let unmounted = Command::new("umount").arg(disk.path()).status().unwrap();
    assert!(unmounted.success());
    assert_eq!(outcome(&whole), outcome(&summary(&again)));
}
