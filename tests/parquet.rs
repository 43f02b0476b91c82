//! The same events from Parquet are the same model, and a file that cannot be read says why.

mod common;
#[path = "common/columns.rs"]
mod columns;

use std::path::{Path, PathBuf};

use columns::{Layout, lines, write};
use common::{Job, generate, outcome, train_through_kills};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};
use serde_json::{Map, Value, json};
use tidemill::event::{Kind, Slot, Stream};
use tidemill::feature::{CrossSettings, FeatureSettings, Schema};
use tidemill::position::NextOffset;
use tidemill::source::decode::{Decoder, RecordSettings};
use tidemill::source::{Arrival, Decode, Mode, NewDecoder, Sources, Spec};

const CALM: &[&str] = &["-n", "8000", "--disorder", "2s", "--duplicates", "0.02", "--orphans", "0.03"];
const DISTURBED: &[&str] =
    &["-n", "9000", "--partitions", "2", "--disorder", "2s", "--late", "0.003", "--duplicates", "0.02"];

fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "expected `{part}` in: {text}");
    }
}

/// Copies the streams of `from` file by file.
fn convert(from: &Path, layout: &Layout) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "jsonl") {
            let name = path.file_stem().unwrap().to_string_lossy().into_owned();
            write(&to.path().join(format!("{name}.parquet")), &lines(&path), layout);
        }
    }
    to
}

/// Deals the records of both streams out to files of their own, keeping their order within each.
fn deal(from: &Path, files: usize, layout: &Layout) -> tempfile::TempDir {
    let to = tempfile::tempdir().unwrap();
    for stream in ["impressions", "clicks"] {
        let all = lines(&from.join(format!("{stream}-000.jsonl")));
        for file in 0..files {
            let mine = all.iter().enumerate().filter(|(i, _)| (i * 7 + i / 13) % files == file);
            let mine: Vec<Value> = mine.map(|(_, record)| record.clone()).collect();
            write(&to.path().join(format!("{stream}-{file:03}.parquet")), &mine, layout);
        }
    }
    to
}

#[test]
fn the_same_events_in_any_layout_give_the_model_of_json_lines() {
    let input = generate(CALM);
    let dir = input.path().join("in");
    // Some ids are numbers in JSON.
    let path = dir.join("impressions-000.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    let numbered: String = lines(&path)
        .iter()
        .map(|record| {
            let mut record = record.clone();
            let id: u64 = record["user"]["id"].as_str().unwrap()[1..].parse().unwrap();
            record["user"]["id"] = id.into();
            format!("{record}\n")
        })
        .collect();
    assert_ne!(numbered, text);
    std::fs::write(&path, numbered).unwrap();
    let json = Job::over(&dir).train(&["--until-end"]);
    assert_eq!(json["counts"]["late"], 0);

    let as_text = |column: &str| matches!(column, "id" | "position");
    for (files, layout) in [
        (1, Layout::default()),
        (3, Layout { group: 700, dictionary: false, reversed: true, ..Layout::default() }),
        (2, Layout { group: 100, time: columns::Time::Micros, as_text, ..Layout::default() }),
        (1, Layout { compressed: false, time: columns::Time::Rfc3339, as_text, reversed: true, ..Layout::default() }),
    ] {
        let parquet = deal(&dir, files, &layout);
        for threads in ["1", "3"] {
            let s =
                Job::over(parquet.path()).train(&["--until-end", "--set", &format!("job.decode_threads={threads}")]);
            assert_eq!(json["model_digest"], s["model_digest"]);
            assert_eq!(json["counts"], s["counts"]);
        }
    }
}

#[test]
fn late_records_are_late_in_parquet_too() {
    let input = generate(DISTURBED);
    let dir = input.path().join("in");
    let json = Job::over(&dir).train(&["--until-end"]);
    let parquet = convert(&dir, &Layout { group: 333, ..Layout::default() });
    let s = Job::over(parquet.path()).train(&["--until-end"]);
    assert!(json["counts"]["late"].as_u64().unwrap() > 0);
    assert_eq!(json["model_digest"], s["model_digest"]);
    assert_eq!(json["counts"], s["counts"]);
}

#[test]
fn a_job_over_parquet_killed_at_random_moments_ends_in_the_bytes_of_one_that_never_was() {
    let input = generate(DISTURBED);
    let parquet = convert(&input.path().join("in"), &Layout { group: 500, ..Layout::default() });
    let new = || Job::over(parquet.path());
    let undisturbed = new().train(&["--until-end"]);
    let job = new();
    for until in ["2026-01-01T00:00:31.007Z", "2026-01-01T00:02:12.5Z"] {
        job.train(&["--until", until]);
    }
    let stopped = job.train(&["--until-end"]);
    assert_eq!(stopped["resumed"], true);
    assert_eq!(outcome(&undisturbed), outcome(&stopped));
    let (ends, _) = train_through_kills(8, 77, new);
    for killed in &ends {
        assert_eq!(outcome(&undisturbed), outcome(killed));
    }
}

#[test]
fn parquet_files_that_appear_under_a_followed_pattern_are_read() {
    let input = generate(&["-n", "6000", "--partitions", "2"]);
    let whole = convert(&input.path().join("in"), &Layout::default());
    let until = "2026-01-01T00:01:40Z";
    let growing = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        // As a writer should: complete, then moved into its place.
        std::fs::copy(whole.path().join(name), growing.path().join("part")).unwrap();
        std::fs::rename(growing.path().join("part"), growing.path().join(name)).unwrap();
    };
    for name in ["impressions-000.parquet", "clicks-000.parquet", "clicks-001.parquet"] {
        copy(name);
    }
    let job = Job::over(growing.path());
    job.edit("[join]", "idle_after = \"never\"\n[join]");
    // Holds everything back until the other file is there.
    let held = growing.path().join("clicks-002.jsonl");
    std::fs::write(&held, "").unwrap();
    let child = job.command(&["--json", "--until", until, "--follow"]).spawn().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1500));
    copy("impressions-001.parquet");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    std::fs::write(&held, "{\"id\":\"none\",\"ts\":1767230000000}\n").unwrap();
    let followed = common::summary(&child.wait_with_output().unwrap());
    let bounded = Job::over(whole.path()).train(&["--until", until]);
    assert_eq!(bounded["model_digest"], followed["model_digest"]);
}

#[test]
fn only_the_columns_that_are_asked_for_are_read() {
    let input = generate(&["-n", "3000"]);
    let parquet = convert(&input.path().join("in"), &Layout { dictionary: false, ..Layout::default() });
    let whole = Job::over(parquet.path()).train(&["--until-end"]);
    let victim = parquet.path().join("impressions-000.parquet");
    let content = std::fs::read(&victim).unwrap();
    let damage = |column: &str| {
        let mut damaged = content.clone();
        let (from, to) = columns::bytes_of(&victim, column);
        damaged[from..to].fill(0xAA);
        damaged
    };
    // `price` lies in the same struct as the item's id.
    let (price, age) = (damage("item.price"), damage("user.age"));
    std::fs::write(&victim, price).unwrap();
    assert_eq!(outcome(&whole), outcome(&Job::over(parquet.path()).train(&["--until-end"])));
    std::fs::write(&victim, age).unwrap();
    let job = Job::over(parquet.path());
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "is damaged", "row 0", "put an intact copy"]);
    std::fs::write(&victim, content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_damaged_row_group_stops_the_job_and_an_intact_file_lets_it_go_on_to_the_same_bytes() {
    let input = generate(&["-n", "9000"]);
    let layout = Layout { dictionary: false, group: 1000, ..Layout::default() };
    let parquet = convert(&input.path().join("in"), &layout);
    let whole = Job::over(parquet.path()).train(&["--until-end"]);
    let victim = parquet.path().join("impressions-000.parquet");
    let content = std::fs::read(&victim).unwrap();
    let mut damaged = content.clone();
    let (from, to) = columns::bytes_of_group(&victim, "user.age", 5);
    damaged[from..to].fill(0xAA);
    std::fs::write(&victim, damaged).unwrap();
    let job = Job::over(parquet.path());
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "is damaged", "reading goes on from there"]);
    std::fs::write(&victim, content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

#[test]
fn a_file_without_a_footer_is_refused_with_what_to_do() {
    let input = generate(&["-n", "600"]);
    let parquet = convert(&input.path().join("in"), &Layout::default());
    let victim = parquet.path().join("impressions-000.parquet");
    let content = std::fs::read(&victim).unwrap();
    let job = Job::over(parquet.path());
    for length in [content.len() / 2, content.len() - 1, 6, 0] {
        std::fs::write(&victim, &content[..length]).unwrap();
        let said = job.fails(&["--until-end"]);
        contains(&said, &[victim.to_str().unwrap(), "cut off", "move it into its place when it is complete"]);
    }
    // A footer that is there and makes no sense.
    let mut damaged = content.clone();
    let end = content.len() - 8;
    damaged[end - 200..end].fill(0xFF);
    std::fs::write(&victim, &damaged).unwrap();
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "its footer is damaged"]);
    std::fs::write(&victim, b"{\"id\":\"a\",\"ts\":1767225600001}\n").unwrap();
    contains(&job.fails(&["--until-end"]), &["has the name of a Parquet file, but does not begin as one"]);
    std::fs::write(&victim, content).unwrap();
    job.train(&["--until-end"]);
}

#[test]
fn what_it_is_goes_by_the_first_bytes_and_not_by_the_name() {
    let input = generate(&["-n", "600"]);
    let parquet = convert(&input.path().join("in"), &Layout::default());
    let s = Job::over(parquet.path()).train(&["--until-end"]);
    std::fs::rename(parquet.path().join("impressions-000.parquet"), parquet.path().join("impressions-000.pq")).unwrap();
    assert_eq!(s["model_digest"], Job::over(parquet.path()).train(&["--until-end"])["model_digest"]);
}

#[test]
fn a_file_that_was_written_anew_is_refused_and_the_old_one_goes_on() {
    let input = generate(&["-n", "6000"]);
    let dir = input.path().join("in");
    let parquet = convert(&dir, &Layout { group: 1000, ..Layout::default() });
    let whole = Job::over(parquet.path()).train(&["--until-end"]);
    let job = Job::over(parquet.path());
    job.train(&["--until", "2026-01-01T00:01:00Z"]);
    let victim = parquet.path().join("impressions-000.parquet");
    let content = std::fs::read(&victim).unwrap();
    write(&victim, &lines(&dir.join("impressions-000.jsonl")), &Layout { group: 500, ..Layout::default() });
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "is not the", "read before"]);
    write(&victim, &lines(&dir.join("impressions-000.jsonl"))[..50], &Layout::default());
    contains(&job.fails(&["--until-end"]), &[victim.to_str().unwrap(), "is not the", "read before"]);
    std::fs::write(&victim, content).unwrap();
    assert_eq!(outcome(&whole), outcome(&job.train(&["--until-end"])));
}

/// A job over one impression file with these records, whose clicks are in JSON lines.
fn job_over(records: &[Value]) -> (tempfile::TempDir, Job, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("impressions-0.parquet");
    write(&file, records, &Layout::default());
    std::fs::write(dir.path().join("clicks-0.jsonl"), "{\"id\":\"a\",\"ts\":1767225605000}\n").unwrap();
    let job = Job::over(dir.path());
    (dir, job, file)
}

#[test]
fn a_column_that_is_missing_or_of_the_wrong_type_is_named_with_what_is_needed() {
    let ts = 1_767_225_600_000_u64;
    let good =
        json!({"id": "a", "ts": ts, "user": {"id": "u", "age": 3}, "item": {"id": 4}, "position": 1, "tags": ["x"]});
    let without = |key: &str| {
        let mut record = good.clone();
        record.as_object_mut().unwrap().remove(key);
        record
    };
    let with = |key: &str, value: Value| {
        let mut record = good.clone();
        record[key] = value;
        record
    };
    for (record, parts) in [
        (without("id"), vec!["has no column `id` for the id", "it has", "`ts`"]),
        (without("ts"), vec!["has no column `ts` for the event time"]),
        (with("id", json!(["a"])), vec!["column `id` is a list of Utf8; an id is a string"]),
        (with("ts", json!(true)), vec!["column `ts` is of type Boolean; a time is of timestamps, numbers, RFC 3339"]),
        (with("user", json!("u")), vec!["column `user` is of type Utf8; paths go on inside of it"]),
        (
            with("user", json!({"id": "u", "age": "3"})),
            vec!["column `user.age` is of type Utf8; feature `age` needs numbers"],
        ),
        (with("position", json!({"x": 1})), vec!["column `position` is a struct; feature `position` needs strings"]),
        (
            with("tags", json!({"x": 1})),
            vec!["column `tags` is a struct; feature `tags` needs a list of scalars, or a map"],
        ),
        (
            with("tags", json!([["x"]])),
            vec!["column `tags` is a list of List", "feature `tags` needs a list of scalars"],
        ),
        // The converter makes a decimal of this one.
        (
            with("user", json!({"id": "u", "age": "decimal:3"})),
            vec!["column `user.age` is of type Decimal", "cast it to a"],
        ),
    ] {
        let (_dir, job, file) = job_over(std::slice::from_ref(&record));
        let said = job.fails(&["--until-end"]);
        contains(&said, &[&[file.to_str().unwrap(), "cannot be read as Parquet"], &parts[..]].concat());
    }
    // What may be missing in a record may be missing in a file.
    let (_dir, job, _) = job_over(&[without("tags")]);
    let output = job.command(&["--until-end"]).output().unwrap();
    assert!(output.status.success());
    contains(&String::from_utf8_lossy(&output.stderr), &["WARN", "count as missing", "tags"]);
    let (_dir, job, _) = job_over(&[good]);
    assert_eq!(job.train(&["--until-end"])["counts"]["impressions"], 1);
}

#[test]
fn a_row_that_cannot_be_used_goes_to_the_dead_letters_as_json_with_its_number() {
    let ts = 1_767_225_600_000_u64;
    let row = |id: Value, ts: u64| json!({"id": id, "ts": ts, "user": {"id": "u\"1", "age": 3}, "unasked": 5, "tags": ["x", "y"]});
    let (_dir, job, file) =
        job_over(&[row("a".into(), ts), row(Value::Null, ts + 1), row("b".into(), 9_000_000_000_000)]);
    let s = job.train(&["--until-end"]);
    assert_eq!((&s["counts"]["rejected"], &s["examples"]), (&json!(2), &json!(1)));
    let letters = std::fs::read_to_string(job.path("dead-letters.jsonl")).unwrap();
    let letters: Vec<Value> = letters.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(letters[0]["partition"], file.to_str().unwrap());
    assert_eq!((&letters[0]["offset"], &letters[1]["offset"]), (&json!(1), &json!(2)));
    assert_eq!(letters[0]["reason"], "`id` is missing: no id");
    contains(letters[1]["reason"].as_str().unwrap(), &["`ts` is 9000000000000 ms", "outside of 1970 to 2200"]);
    assert_eq!(letters[0]["record"], format!(r#"{{"tags":["x","y"],"ts":{},"user":{{"age":3,"id":"u\"1"}}}}"#, ts + 1));
}

#[test]
fn check_shows_how_rows_are_decoded() {
    let ts = 1_767_225_600_000_u64;
    let (_dir, job, file) =
        job_over(&[json!({"id": 17, "ts": ts, "user": {"id": "u1", "age": 3}, "tags": ["x", "y"], "position": null})]);
    let check = |args: &[&str]| {
        std::process::Command::new(common::TIDEMILL)
            .args(["check", "-c", job.path("job.toml").to_str().unwrap()])
            .args(args)
            .output()
            .unwrap()
    };
    let output = check(&["--sample", "2"]);
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    contains(&said, &[&format!("`{}` at row 0", file.display()), "id `17`", "x, y", "u1", "(missing)"]);
    write(&file, &[json!({"id": 17})], &Layout::default());
    let output = check(&[]);
    assert!(!output.status.success());
    contains(&String::from_utf8_lossy(&output.stderr), &["has no column `ts`"]);
}

/// What a record of a file came to: id, event time, log time, row in its slate, weight, kind, content, slots, reason.
type Seen = (u64, i64, i64, u32, f32, Kind, u64, Vec<Slot>, String);

fn read(path: &Path, decoder: &NewDecoder) -> Vec<Seen> {
    let (stream, mode, from) = (Stream::Impressions, Mode::Bounded, NextOffset::default());
    let spec = Spec {
        path: path.into(),
        object: None,
        stream,
        mode,
        from,
        decoder: decoder.clone(),
        max_record: 1 << 20,
        queue: 4,
    };
    let (_sources, mut partitions, _) = Sources::open(vec![spec], 2).unwrap();
    let mut seen = Vec::new();
    loop {
        match partitions[0].next_timeout(std::time::Duration::from_secs(10)).unwrap() {
            Arrival::Records(chunk) => seen.extend(chunk.records.iter().enumerate().map(|(i, r)| {
                let slots = chunk.slots_of(r).to_vec();
                // What is kept of a rejected row is another text.
                let content = if r.kind == Kind::Rejected { 0 } else { r.content };
                let reason = chunk.reason_of(i).to_owned();
                (r.id, r.event_time.0, r.log_time.0, r.row, r.weight, r.kind, content, slots, reason)
            })),
            Arrival::Ended { .. } => return seen,
            other => panic!("{other:?}"),
        }
    }
}

/// Records whose columns each have one type, drawn from `chance`.
fn records(chance: &mut Pcg64Mcg) -> Vec<Value> {
    /// A value of a type.
    fn scalar(kind: u64, chance: &mut Pcg64Mcg) -> Value {
        let n = chance.next_u64();
        match kind {
            0 => n.is_multiple_of(2).into(),
            1 => ((n % 41) as i64 - 20).into(),
            2 => ((n >> 1) as i64).into(),
            // Halves and such, and one that has no short text.
            3 => {
                if n.is_multiple_of(9) {
                    (1.0 / 3.0).into()
                } else {
                    (((n % 2001) as f64 - 1000.0) / 8.0).into()
                }
            }
            _ => ["a", "b", "", "é\"\\", "10"][n as usize % 5].into(),
        }
    }
    let types: Vec<u64> = (0..12).map(|_| chance.next_u64() % 5).collect();
    let number = |i: usize| types[i] % 4;
    let maybe = |value: Value, chance: &mut Pcg64Mcg| match chance.next_u64() % 8 {
        0 => Value::Null,
        _ => value,
    };
    (0..120)
        .map(|i| {
            let c = &mut *chance;
            let list = |kind: u64, c: &mut Pcg64Mcg| {
                Value::from((0..c.next_u64() % 4).map(|_| maybe(scalar(kind, c), c)).collect::<Vec<_>>())
            };
            let weights = |c: &mut Pcg64Mcg| {
                let mut map = Map::new();
                for key in ["x", "y", "z"] {
                    if c.next_u64().is_multiple_of(2) {
                        map.insert(key.into(), maybe(scalar(3, c), c));
                    }
                }
                Value::from(map)
            };
            let elements: Vec<Value> = (0..c.next_u64() % 3)
                .map(|_| json!({"i": maybe(scalar(types[0], c), c), "x": maybe(scalar(number(1), c), c)}))
                .collect();
            let user = json!({
                "b": maybe(scalar(types[2], c), c), "list": maybe(list(types[3], c), c), "n": maybe(scalar(number(4), c), c),
                "seq": maybe(list(types[5], c), c), "v": maybe(json!({"w": maybe(json!({"x": scalar(types[6], c)}), c)}), c),
            });
            json!({
                "id": maybe(scalar(types[7], c), c), "ts": 1_700_000_000_000_i64 + i, "log": maybe(json!(1_700_000_000_000_i64), c),
                "label": maybe(scalar(0, c), c), "w": maybe(json!(0.5 + i as f64), c),
                "a": maybe(scalar(types[8], c), c), "u": maybe(user, c), "bag": maybe(weights(c), c),
                "plain": maybe(list(types[9], c), c), "d.e": maybe(scalar(types[10], c), c), "items": maybe(elements.into(), c),
                "unasked": maybe(list(types[11], c), c),
            })
        })
        .collect()
}

#[test]
fn a_row_is_decoded_as_the_json_of_the_same_values() {
    let features = r#"[{"name": "a"}, {"name": "b", "from": "u.b"}, {"name": "third", "from": "u.list.2"},
        {"name": "n", "from": "u.n", "kind": "numeric", "per_octave": 4}, {"name": "again", "from": "a"},
        {"name": "bag", "kind": "multi", "max_len": 2}, {"name": "x", "from": "attrs.x"}, {"name": "plain", "kind": "multi"},
        {"name": "first", "from": "plain.0"}, {"name": "seq", "from": "u.seq", "kind": "sequence", "max_len": 2},
        {"name": "dotted", "from": "d\\.e"}, {"name": "deep", "from": "u.v.w.x"}]"#;
    let element = r#"[{"name": "a"}, {"name": "i", "from": ".i"}, {"name": "x", "from": ".x", "kind": "numeric"},
        {"name": "plain", "kind": "multi"}]"#;
    let crosses = r#"[{"of": ["a", "plain"]}]"#;
    let mappings = [
        ("", features),
        ("label = 'label'\nweight = 'w'\nlog_time = 'log'", features),
        ("id = ['a', 'id']\ntime_format = 'ms'", features),
        ("explode = 'items'\nid = ['id', '.i']", element),
        ("explode = 'items'\nid = ['id', '.i']\nlabel = '.x'", element),
    ];
    let dir = tempfile::tempdir().unwrap();
    let (json, rows) = (dir.path().join("r.jsonl"), dir.path().join("r.parquet"));
    let (mut decoded, mut rejected) = (0, 0);
    for seed in 0..40 {
        let mut chance = Pcg64Mcg::seed_from_u64(seed);
        let records = records(&mut chance);
        // The same weights are attributes, too.
        let records: Vec<Value> = records
            .into_iter()
            .map(|mut r| {
                r["attrs"] = r["bag"].clone();
                r
            })
            .collect();
        let text: String = records.iter().map(|record| format!("{record}\n")).collect();
        std::fs::write(&json, text).unwrap();
        let as_map = |name: &str| matches!(name, "bag" | "attrs");
        write(&rows, &records, &Layout { group: 50, reversed: seed.is_multiple_of(2), as_map, ..Layout::default() });
        for (mapping, features) in mappings {
            let settings: RecordSettings = toml::from_str(mapping).unwrap();
            let features: Vec<FeatureSettings> = serde_json::from_str(features).unwrap();
            let crosses: Vec<CrossSettings> = serde_json::from_str(crosses).unwrap();
            let schema = Schema::new(&features, &crosses).unwrap();
            let decoder: NewDecoder = std::sync::Arc::new(move || {
                Box::new(Decoder::new(Stream::Impressions, &settings, Some(&schema), false).unwrap()) as Box<dyn Decode>
            });
            let as_json = read(&json, &decoder);
            let mut as_rows = read(&rows, &decoder);
            if mapping.contains("label") {
                // Without an id they get one from their bytes, which are others.
                for (row, json) in as_rows.iter_mut().zip(&as_json) {
                    if row.5 != Kind::Rejected && json.7 == row.7 && json.1 == row.1 {
                        row.0 = json.0;
                    }
                }
            }
            assert_eq!(as_json, as_rows, "seed {seed}, {mapping}");
            rejected += as_rows.iter().filter(|seen| seen.5 == Kind::Rejected).count();
            decoded += as_rows.iter().filter(|seen| seen.5 != Kind::Rejected).count();
        }
    }
    println!("{decoded} decoded, {rejected} rejected");
    assert!(decoded > 5 * 1000 && rejected > 500);
}
