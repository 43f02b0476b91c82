//! Same log, same config, same bytes: however many threads, whatever is published, however often it was killed.

mod common;

use std::collections::{BTreeMap, HashSet};
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use common::{Job, Kills, generate, outcome, summary, train_through_kills};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
use tidemill::feature::schema::{row_of, seed_of};

const DISTURBED: &[&str] = &[
    "-n",
    "12000",
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

#[test]
fn the_number_of_decoding_threads_does_not_show() {
    let input = generate(DISTURBED);
    let runs = ["1", "2", "4"].map(|threads| {
        let job = Job::over(&input.path().join("in"));
        outcome(&job.train(&["--until-end", "--set", &format!("job.decode_threads={threads}")]))
    });
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0], runs[2]);
}

#[test]
fn checkpoints_and_snapshots_do_not_change_what_is_learned() {
    let input = generate(DISTURBED);
    let job = Job::over(&input.path().join("in"));
    let with = job.train(&["--until-end"]);
    assert!(with["snapshot_version"].as_u64().unwrap() > 1);
    let bare = Job::over(&input.path().join("in"));
    for section in ["[checkpoint]", "[snapshots]"] {
        let text = std::fs::read_to_string(bare.path("job.toml")).unwrap();
        let start = text.find(section).unwrap();
        let end = start + 1 + text[start + 1..].find("\n[").unwrap();
        std::fs::write(bare.path("job.toml"), format!("{}{}", &text[..start], &text[end..])).unwrap();
    }
    let without = bare.train(&["--until-end"]);
    assert!(without["snapshot_version"].is_null());
    assert_eq!(outcome(&with), outcome(&without));
}

#[test]
fn every_record_is_accounted_for() {
    let input = generate(DISTURBED);
    let job = Job::over(&input.path().join("in"));
    let s = job.train(&["--until-end"]);
    let stats: serde_json::Value =
        serde_json::from_slice(&std::fs::read(input.path().join("in/stats.json")).unwrap()).unwrap();
    let counts = &s["counts"];
    let n = |v: &serde_json::Value| v.as_u64().unwrap();
    assert_eq!((s["impression_gap"].as_i64(), s["click_gap"].as_i64()), (Some(0), Some(0)));
    assert_eq!(n(&counts["duplicates"]), n(&stats["duplicate_impressions"]));
    assert_eq!(n(&counts["rejected"]), n(&stats["garbage_impressions"]));
    assert_eq!(n(&counts["impressions"]), n(&s["read"]["impressions_read"]) - n(&s["read"]["impressions_skipped"]));
    assert!(n(&counts["late"]) > 0 && n(&counts["clicks_orphan"]) > 0);
    // Dead letters say where each came from, and hold the record.
    let letters = std::fs::read_to_string(job.path("dead-letters.jsonl")).unwrap();
    assert_eq!(letters.lines().count() as u64, n(&stats["garbage_impressions"]) + n(&stats["garbage_clicks"]));
    for letter in letters.lines() {
        let letter: serde_json::Value = serde_json::from_str(letter).unwrap();
        let file = std::fs::read(letter["partition"].as_str().unwrap()).unwrap();
        let rest = &file[n(&letter["offset"]) as usize..];
        let line = &rest[..rest.iter().position(|b| *b == b'\n').unwrap()];
        assert_eq!(String::from_utf8_lossy(line), letter["record"].as_str().unwrap());
    }
}

/// Deals the lines of a stream out to `n` files, keeping their order within each.
fn deal(from: &Path, to: &Path, stream: &str, n: usize) {
    std::fs::create_dir_all(to).unwrap();
    let text = std::fs::read_to_string(from.join(format!("{stream}-000.jsonl"))).unwrap();
    let mut files: Vec<_> =
        (0..n).map(|i| std::fs::File::create(to.join(format!("{stream}-{i:03}.jsonl"))).unwrap()).collect();
    for (i, line) in text.lines().enumerate() {
        writeln!(files[(i * 7 + i / 13) % n], "{line}").unwrap();
    }
}

#[test]
fn another_layout_of_the_same_events_gives_the_same_model() {
    // Nothing is late: disorder stays inside the bound, and there is no garbage, whose place is its partition's watermark.
    let input = generate(&["-n", "8000", "--disorder", "2s", "--duplicates", "0.02", "--orphans", "0.03"]);
    let one = input.path().join("in");
    let here = Job::over(&one).train(&["--until-end"]);
    assert_eq!(here["counts"]["late"], 0);
    for (impressions, clicks) in [(3, 1), (2, 4)] {
        let other = tempfile::tempdir().unwrap();
        deal(&one, other.path(), "impressions", impressions);
        deal(&one, other.path(), "clicks", clicks);
        let there = Job::over(other.path()).train(&["--until-end"]);
        assert_eq!(here["model_digest"], there["model_digest"]);
        assert_eq!(here["counts"], there["counts"]);
    }
}

#[test]
fn following_growing_files_gives_the_bytes_of_reading_them_at_once() {
    let input = generate(&["-n", "6000", "--disorder", "2s", "--late", "0.003", "--partitions", "2"]);
    let whole = input.path().join("in");
    // Far enough from the end that every window closes while the log still moves.
    let until = "2026-01-01T00:01:40Z";
    let bounded = Job::over(&whole).train(&["--until", until]);
    let growing = tempfile::tempdir().unwrap();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&whole).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            let file = std::fs::File::create(growing.path().join(path.file_name().unwrap())).unwrap();
            files.push((file, std::fs::read(&path).unwrap(), 0));
        }
    }
    let job = Job::over(growing.path());
    job.edit("[join]", "idle_after = \"never\"\n[join]");
    let child = job.command(&["--json", "--until", until, "--follow"]).spawn().unwrap();
    let seed = 11;
    println!("seed {seed}");
    let mut chance = Pcg64Mcg::seed_from_u64(seed);
    while files.iter().any(|(_, content, at)| *at < content.len()) {
        for (file, content, at) in &mut files {
            // Pieces end anywhere, also inside a record.
            let piece = (chance.next_u64() as usize % 60_000).min(content.len() - *at);
            file.write_all(&content[*at..*at + piece]).unwrap();
            *at += piece;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let followed = summary(&child.wait_with_output().unwrap());
    assert_eq!(outcome(&bounded), outcome(&followed));
}

#[test]
fn a_run_that_stops_anywhere_and_goes_on_gives_the_bytes_of_one_run() {
    let input = generate(DISTURBED);
    let whole = Job::over(&input.path().join("in")).train(&["--until-end"]);
    // In the middle of a batch, and not at a multiple of its period.
    let job = Job::over(&input.path().join("in"));
    for until in ["2026-01-01T00:00:31.007Z", "2026-01-01T00:01:12.5Z", "2026-01-01T00:03:59.999Z"] {
        job.train(&["--until", until]);
    }
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_file_that_appears_under_a_followed_pattern_is_a_new_partition() {
    let input = generate(&["-n", "6000", "--partitions", "2"]);
    let whole = input.path().join("in");
    let until = "2026-01-01T00:01:40Z";
    let growing = tempfile::tempdir().unwrap();
    let copy = |name: &str| std::fs::copy(whole.join(name), growing.path().join(name)).unwrap();
    copy("impressions-000.jsonl");
    copy("clicks-000.jsonl");
    copy("clicks-001.jsonl");
    let job = Job::over(growing.path());
    // Nothing is released before the second file comes: the first is held back by a click partition that is not there yet.
    let held = growing.path().join("clicks-002.jsonl");
    std::fs::write(&held, "").unwrap();
    let child = job.command(&["--json", "--until", until, "--follow"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    copy("impressions-001.jsonl");
    std::thread::sleep(Duration::from_millis(1500));
    std::fs::write(&held, "{\"id\":\"none\",\"ts\":1999999999000}\n".replace("1999999999000", "1767230000000"))
        .unwrap();
    let followed = summary(&child.wait_with_output().unwrap());
    std::fs::remove_file(&held).unwrap();
    let bounded = Job::over(&whole).train(&["--until", until]);
    assert_eq!(bounded["model_digest"], followed["model_digest"]);
    assert_eq!(bounded["counts"]["impressions"], followed["counts"]["impressions"]);
}

#[test]
fn memory_holds_the_disorder_of_impressions_and_not_their_window() {
    let input = generate(&["-n", "20000", "--disorder", "2s"]);
    let peak = |window: &str| {
        let s = Job::over(&input.path().join("in")).train(&["--until-end", "--set", &format!("join.window={window}")]);
        s["peak_pending_impressions"].as_u64().unwrap()
    };
    let (short, long) = (peak("5s"), peak("10m"));
    println!("most impressions pending: {short} with a window of 5 s, {long} with one of 10 m");
    // Two minutes are 3600 impressions, ten are all 18000. What is held is the disorder bound (60) and the chunks just read.
    assert!(short < 2000 && long < 2000);
}

#[test]
fn a_job_killed_at_20_random_moments_ends_in_the_bytes_of_one_that_never_was() {
    let input = generate(DISTURBED);
    let new = || Job::over(&input.path().join("in"));
    let undisturbed = new().train(&["--until-end"]);
    let (ends, _) = train_through_kills(20, 2026, new);
    println!("{} jobs", ends.len());
    for killed in &ends {
        assert_eq!(outcome(&undisturbed), outcome(killed));
    }
    assert!(ends.iter().any(|end| end["resumed"] == true), "no job was killed after its first checkpoint");
}

#[test]
fn predictions_are_written_once_each_however_often_the_job_was_killed() {
    let input = generate(DISTURBED);
    let run = |job: &Job, kills: u64| {
        let file = job.path("predictions.csv");
        let args = ["--json", "--until-end", "--predictions", file.to_str().unwrap()];
        let mut killing = Kills::new(kills, Duration::from_millis(400));
        for _ in 0..kills {
            killing.kill(job, &args);
        }
        summary(&job.command(&args).output().unwrap());
        std::fs::read_to_string(file).unwrap()
    };
    let once = run(&Job::over(&input.path().join("in")), 0);
    let killed = run(&Job::over(&input.path().join("in")), 6);
    assert_eq!(once.lines().next(), Some("id,prediction,label"));
    assert!(once == killed, "the file of the killed job differs");
    assert_eq!(
        once.lines().skip(1).map(|line| line.split(',').next().unwrap()).collect::<HashSet<_>>().len() + 1,
        once.lines().count()
    );
}

#[test]
fn a_counting_model_shows_that_every_example_was_learned_exactly_once() {
    let input = generate(DISTURBED);
    let (_, job) = train_through_kills(8, 5, || {
        let job = Job::over(&input.path().join("in"));
        job.edit("prior_ctr = 0.1", "prior_ctr = 0.1\nrule = \"count\"");
        job
    });

    // What a pair of nested loops over the files says.
    let mut expected: BTreeMap<u64, f32> = BTreeMap::new();
    let mut seen = HashSet::new();
    for partition in 0..2 {
        let text = std::fs::read(input.path().join(format!("in/impressions-{partition:03}.jsonl"))).unwrap();
        for line in text.split(|b| *b == b'\n') {
            let Ok(record) = serde_json::from_slice::<serde_json::Value>(line) else { continue };
            let (Some(id), Some(user)) = (record["id"].as_str(), record["user"]["id"].as_str()) else { continue };
            if seen.insert(id.to_owned()) {
                *expected.entry(row_of(user.as_bytes(), seed_of("user_id"))).or_default() += 1.0;
            }
        }
    }
    let store = tidemill::snapshot::Store::open(job.path("snapshots").to_str().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let snapshot = runtime.block_on(store.load_latest("live")).unwrap().unwrap();
    let too_late = snapshot.manifest.facts.counts["too_late"];
    assert_eq!(too_late, 0, "choose a stream without records that are too late: this check cannot tell which they are");
    for (row, count) in expected {
        assert_eq!(snapshot.weights.weight(row, 0), count);
    }
}

/// What a running job's `/metrics` shows once it shows all of `until`.
fn metrics(job: &Job, until: &[&str]) -> Vec<(String, f64)> {
    use std::io::Read as _;
    let mut child = job.command(&["--set", "telemetry.listen=\"127.0.0.1:0\""]).spawn().unwrap();
    // The log says which port it got.
    let mut log = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    let address = loop {
        line.clear();
        assert!(std::io::BufRead::read_line(&mut log, &mut line).unwrap() > 0, "the job ended");
        if let Some((_, rest)) = line.split_once("metrics at http://") {
            break rest.trim().trim_end_matches("/metrics").to_owned();
        }
    };
    std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    let fetch = || {
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        text
    };
    let text = loop {
        let text = fetch();
        if until.iter().all(|name| text.contains(name)) {
            break text;
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    child.kill().unwrap();
    child.wait().unwrap();
    let series = text.lines().filter(|line| line.starts_with("tidemill_")).filter_map(|line| line.rsplit_once(' '));
    series.map(|(name, value)| (name.to_owned(), value.parse().unwrap())).collect()
}

fn value(metrics: &[(String, f64)], name: &str) -> f64 {
    metrics.iter().find(|(of, _)| of == name).unwrap_or_else(|| panic!("no {name} in {metrics:?}")).1
}

#[test]
fn a_running_job_shows_its_metrics_and_they_obey_the_conservation_laws() {
    let input = generate(DISTURBED);
    let metrics = metrics(&Job::over(&input.path().join("in")), &["tidemill_impressions_total"]);
    let value = |name| value(&metrics, name);
    assert_eq!(value("tidemill_conservation_gap{of=\"impressions\"}"), 0.0);
    assert_eq!(value("tidemill_conservation_gap{of=\"clicks\"}"), 0.0);
    assert!(value("tidemill_impressions_total{outcome=\"negative\"}") > 0.0);
    assert!(value("tidemill_batches_total") > 0.0);
}

#[test]
fn a_running_job_shows_how_old_what_comes_to_each_stage_is() {
    let input = generate(DISTURBED);
    let stages = ["consumed_impressions", "consumed_clicks", "joined", "learned", "published"];
    let names = stages.map(|stage| format!("tidemill_freshness_timestamp_seconds{{stage=\"{stage}\"}}"));
    let metrics = metrics(&Job::over(&input.path().join("in")), &names.each_ref().map(String::as_str));
    // The first impression is of 2026-01-01, the last click a few minutes later; clicks may come much later.
    let (first, last) = (1_767_225_600.0, 1_767_225_600.0 + 3600.0);
    let now = tidemill::clock::now().0 as f64 / 1000.0;
    for (stage, name) in stages.iter().zip(&names) {
        let newest = value(&metrics, name);
        assert!((first..last).contains(&newest), "{stage}: {newest}");
        let of = |what: &str| value(&metrics, &format!("tidemill_freshness_seconds_{what}{{stage=\"{stage}\"}}"));
        let age = of("sum") / of("count");
        assert!((now - last - 60.0..now - first).contains(&age), "{stage}: {age} s old");
    }
}

#[test]
fn a_checkpoint_that_an_earlier_build_wrote_resumes_and_ends_where_one_run_ends() {
    // Written by the job.toml beside it, in the first format that was kept. A format that cannot be resumed from it takes a
    // decision, a line in the changelog and a new fixture.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/checkpoint");
    let run = |with_checkpoints: bool| {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["in", "checkpoints"].iter().take(1 + usize::from(with_checkpoints)) {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
            for entry in std::fs::read_dir(fixture.join(folder)).unwrap() {
                let path = entry.unwrap().path();
                std::fs::copy(&path, dir.path().join(folder).join(path.file_name().unwrap())).unwrap();
            }
        }
        let mut command = std::process::Command::new(common::TIDEMILL);
        command.current_dir(dir.path()).args(["train", "--json", "--until-end", "-c"]).arg(fixture.join("job.toml"));
        summary(&command.output().unwrap())
    };
    let (resumed, whole) = (run(true), run(false));
    assert_eq!((&resumed["resumed"], &whole["resumed"]), (&true.into(), &false.into()));
    assert!(resumed["examples_this_run"].as_u64() < whole["examples_this_run"].as_u64());
    assert_eq!(outcome(&resumed), outcome(&whole));
}
