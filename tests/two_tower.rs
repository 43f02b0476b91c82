//! The two-tower model through the real command: same bytes however it runs, and one score wherever it is computed.

mod common;

use std::path::Path;

use common::{Job, generate, outcome, train_through_kills};
use tempfile::TempDir;
use tidemill::event::{Chunk, Stream};
use tidemill::feature::Schema;
use tidemill::position::Fingerprint;
use tidemill::serve::{Model, Scorer};
use tidemill::snapshot::{Snapshot, Store};
use tidemill::source::decode::{Decoder, RecordSettings};

const DISTURBED: &[&str] =
    &["-n", "6000", "--partitions", "2", "--disorder", "2s", "--duplicates", "0.02", "--garbage", "0.003"];

/// A generated stream whose impressions also say what their user has seen before: the items of three others.
fn stream(options: &[&str]) -> TempDir {
    let dir = generate(options);
    let mut seen: Vec<String> = Vec::new();
    rewrite(&dir.path().join("in"), |_, record| {
        record["seen"] = seen.iter().rev().take(3).cloned().collect();
        seen.extend(record["item"]["id"].as_str().map(str::to_owned));
    });
    dir
}

/// Changes each impression that is one, in place; `change` also hears which line it is of all.
fn rewrite(folder: &Path, mut change: impl FnMut(usize, &mut serde_json::Value)) {
    let mut number = 0;
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    for file in files.iter().filter(|file| file.file_name().unwrap().to_string_lossy().starts_with("impressions")) {
        let text = std::fs::read(file).unwrap();
        let mut lines: Vec<Vec<u8>> = Vec::new();
        for line in text.split(|b| *b == b'\n').filter(|line| !line.is_empty()) {
            number += 1;
            lines.push(match serde_json::from_slice(line) {
                Ok(mut record @ serde_json::Value::Object(_)) => {
                    change(number, &mut record);
                    record.to_string().into_bytes()
                }
                _ => line.to_vec(),
            });
        }
        lines.push(Vec::new());
        std::fs::write(file, lines.join(&b'\n')).unwrap();
    }
}

/// A job whose features have towers, with every part of the model switched on.
fn job(input: &std::path::Path) -> Job {
    let job = Job::over(input);
    for (feature, tower) in [("user_id", "user"), ("age", "user"), ("item_id", "item"), ("tags", "item")] {
        job.edit(&format!("name = \"{feature}\""), &format!("name = \"{feature}\"\ntower = \"{tower}\""));
    }
    let towers = "[model]\nkind = \"two_tower\"\n[model.two_tower]\ndim = 6\nlayers = [12, 8]\nlayer_norm = true\n\
        [model.two_tower.table]\nadmit = 0.8\nexpire_after = \"24s\"\ncapacity = 1024\n\
        [model.two_tower.dense]\nrate = 0.01\nwarm_up = 20\n\
        [model.two_tower.embeddings.decay]\nper = \"20s\"\nfloor = 0.0\n\n[model.logistic]";
    job.edit("[model.logistic]", towers);
    job.edit("examples = 64", "examples = 300");
    // Ids without end: every impression brings a new one. And one vector an item, whichever tower names it.
    let more = "[[features]]\nname = \"trace\"\nfrom = \"id\"\ntower = \"user\"\n\
        [[features]]\nname = \"seen\"\nkind = \"sequence\"\ntower = \"user\"\nembedding = \"item_id\"\n[[crosses]]";
    job.edit("[[crosses]]", more);
    job
}

#[test]
fn the_number_of_threads_does_not_show() {
    let input = stream(DISTURBED);
    let runs = ["1", "2", "4"].map(|threads| {
        let (decode, learn) = (format!("job.decode_threads={threads}"), format!("job.learn_threads={threads}"));
        let done = job(&input.path().join("in")).train(&["--until-end", "--set", &decode, "--set", &learn]);
        assert!(done["examples"].as_u64().unwrap() > 5000);
        outcome(&done)
    });
    assert_eq!(runs[0], runs[1]);
    assert_eq!(runs[0], runs[2]);
}

#[test]
fn deltas_of_what_was_touched_end_in_the_full_that_a_job_without_deltas_publishes() {
    let input = stream(DISTURBED);
    let last = |settings: &[&str]| {
        let job = job(&input.path().join("in"));
        job.edit("prior_ctr = 0.1", "prior_ctr = 0.1\n[model.logistic.table]\nexpire_after = \"24s\"\ncapacity = 1024");
        job.train(
            &[&["--until-end", "--set", "snapshots.keep=1000", "--set", "publish.every=\"10s\""], settings].concat(),
        );
        let store = Store::open(job.path("snapshots").to_str().unwrap()).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut touched = 0;
        for version in runtime.block_on(store.versions()).unwrap().into_keys() {
            let manifest = runtime.block_on(store.manifest(version, "a test")).unwrap();
            touched += u32::from(manifest.facts.model_digest.is_none());
        }
        (runtime.block_on(store.load_latest("live")).unwrap().unwrap(), touched)
    };
    for precision in ["snapshots.precision=\"f32\"", "snapshots.precision=\"int8\""] {
        let (full, none) = last(&["--set", precision, "--set", "snapshots.deltas=0"]);
        let (delta, touched) = last(&["--set", precision, "--set", "snapshots.deltas=1000"]);
        assert_eq!((none, full.manifest.facts.model_digest.is_some()), (0, true));
        assert!(touched > 0 && delta.manifest.facts.model_digest.is_none(), "{touched} versions of what was touched");
        assert_eq!(delta.weights, full.weights, "{precision}");
        assert_eq!(delta.manifest.golden, full.manifest.golden);
        let counts = |snapshot: &Snapshot| snapshot.manifest.facts.counts.clone();
        assert_eq!(counts(&delta), counts(&full));
        assert!(counts(&full)["embedding_evicted"] > 0 && counts(&full)["logistic_evicted"] > 0, "{:?}", counts(&full));
    }
}

#[test]
fn a_job_killed_at_random_moments_ends_in_the_bytes_of_one_that_never_was() {
    let input = stream(DISTURBED);
    // Ids that come several times and never again: in the first half of each file so many that rows are evicted, in the
    // second so few that they expire. And now and then an example that no model can learn from.
    rewrite(&input.path().join("in"), |line, record| {
        let session = if line % 3000 < 1500 { line / 2 } else { 100_000 + line / 40 };
        (record["session"], record["visit"]) = (session.into(), session.into());
        if line % 700 == 699 {
            (record["load"], record["size"]) = (1e6.into(), (-1e6).into());
        }
    });
    let new = || {
        let job = job(&input.path().join("in"));
        let count = "count = { occurrences = 2, bytes = 65536, per = \"20s\" }\n";
        let table = format!("expire_after = \"24s\"\ncapacity = 1024\n{count}");
        job.edit("expire_after = \"24s\"\ncapacity = 1024\n", &table);
        job.edit("prior_ctr = 0.1", &format!("prior_ctr = 0.1\n[model.logistic.table]\nadmit = 0.8\n{table}"));
        // Centred, the towers would bear numbers of any size.
        job.edit("layer_norm = true", "layer_norm = false");
        let feature = |name: &str, tower: &str, kind: &str| {
            format!("[[features]]\nname = \"{name}\"\ntower = \"{tower}\"\n{kind}\n")
        };
        let features =
            [("session", "user", ""), ("visit", "item", "")].map(|(name, tower, kind)| feature(name, tower, kind));
        let number = "kind = \"numeric\"\nas = \"value\"";
        let numbers = [feature("load", "user", number), feature("size", "item", number)];
        job.edit("[[crosses]]", &format!("{}{}[[crosses]]", features.concat(), numbers.concat()));
        job
    };
    let undisturbed = new().train(&["--until-end"]);
    let (ends, last) = train_through_kills(10, 77, new);
    println!("{} jobs", ends.len());
    for killed in &ends {
        assert_eq!(outcome(&undisturbed), outcome(killed));
    }
    assert!(ends.iter().any(|end| end["resumed"] == true), "no job was killed after its first checkpoint");
    // Admission, expiry, eviction and quarantine were all at work.
    for table in ["logistic", "embedding"] {
        let ids = |summary: &serde_json::Value| {
            let figures = &summary["tables"][table];
            ["admitted", "refused", "expired", "evicted", "rows"].map(|what| figures[what].as_u64().unwrap())
        };
        let expected = ids(&undisturbed);
        assert!(expected.iter().all(|n| *n > 0), "{table}: {expected:?}");
        assert!(expected[4] <= 1024, "{table}: {expected:?}");
        assert!(ends.iter().all(|killed| ids(killed) == expected), "{table}");
    }
    let quarantined = undisturbed["counts"]["quarantined"].as_u64().unwrap();
    assert!(quarantined > 0, "{}", undisturbed["counts"]);
    let letters = std::fs::read_to_string(last.path("dead-letters.jsonl")).unwrap();
    let poisoned = letters.lines().filter(|line| line.contains("quarantined"));
    assert!(poisoned.count() as u64 >= quarantined, "each has a dead letter");
}

#[test]
fn a_checkpoint_of_one_kind_is_refused_by_the_other() {
    let input = generate(&["-n", "2000"]);
    let job = job(&input.path().join("in"));
    job.train(&["--until-end"]);
    let said = job.fails(&["--until-end", "--set", "model.kind=\"logistic\""]);
    assert!(said.contains("`model` was") && said.contains("two_tower"), "{said}");
}

#[test]
#[cfg_attr(not(feature = "cuda"), ignore = "needs a GPU: scripts/build_cuda.sh test --test two_tower on_a_gpu")]
fn on_a_gpu_a_job_sees_the_same_examples_and_says_nearly_the_same() {
    // Without a GPU it fails, with what is missing: nothing was compared.
    let input = generate(DISTURBED);
    let run = |device: &str| {
        let job = job(&input.path().join("in"));
        let (device, predictions) = (format!("model.two_tower.device={device}"), job.path("predictions.csv"));
        let done = job.train(&["--until-end", "--set", &device, "--predictions", predictions.to_str().unwrap()]);
        (job, done, std::fs::read_to_string(predictions).unwrap())
    };
    let ((cpu, there, expected), (_, done, said)) = (run("cpu"), run("cuda:0"));
    assert_eq!(
        (&done["counts"], &done["examples"], &done["rows"]),
        (&there["counts"], &there["examples"], &there["rows"])
    );
    assert_eq!(said.lines().count(), expected.lines().count());
    for (said, expected) in said.lines().zip(expected.lines()).skip(1) {
        let ((id, p, y), (of, q, label)) = (columns(said), columns(expected));
        assert_eq!((id, y), (of, label));
        assert!((p - q).abs() < 1e-3, "{said} on the GPU, {expected} on the CPU");
    }
    // The device binds no checkpoint.
    assert_eq!(cpu.train(&["--until-end", "--set", "model.two_tower.device=cuda:0"])["resumed"], true);
}

fn columns(line: &str) -> (&str, f64, &str) {
    let mut columns = line.split(',');
    let mut next = || columns.next().unwrap();
    (next(), next().parse().unwrap(), next())
}

#[test]
fn a_model_without_features_for_a_tower_is_refused_with_the_key_to_set() {
    let input = generate(&["-n", "10"]);
    let job = Job::over(&input.path().join("in"));
    let said = job.fails(&["--until-end", "--set", "model.kind=\"two_tower\""]);
    assert!(said.contains("`model.kind` must be") && said.contains("tower = \"user\""), "{said}");
}

fn load(job: &Job) -> Snapshot {
    let store = Store::open(job.path("snapshots").to_str().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(store.load_latest("live")).unwrap().unwrap()
}

#[test]
fn a_node_s_score_is_bit_for_bit_that_of_the_snapshot_one_candidate_or_many() {
    let input = stream(&["-n", "5000"]);
    let job = job(&input.path().join("in"));
    job.train(&["--until-end"]);
    let snapshot = load(&job);
    assert_eq!(snapshot.manifest.model.kind, "two_tower");
    assert!(snapshot.manifest.golden.len() > 5);
    let schema = Schema::from_json(&snapshot.manifest.model.schema.to_string()).unwrap();
    let text = std::fs::read_to_string(input.path().join("in/impressions-000.jsonl")).unwrap();
    let records: Vec<serde_json::Value> =
        text.lines().take(150).map(|line| serde_json::from_str(line).unwrap()).collect();
    let mut decoder =
        Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), false).unwrap().at_serving();
    let mut expected = |user: &serde_json::Value, record: &serde_json::Value| {
        let mut record = record.clone();
        (record["user"], record["id"], record["seen"]) = (user.clone(), "x".into(), records[70]["seen"].clone());
        let mut chunk = Chunk::default();
        decoder.decode(record.to_string().as_bytes(), 0, Fingerprint::NONE, &mut chunk);
        snapshot.logit(chunk.slots_of(&chunk.records[0]))
    };
    let model = Model::new(load(&job)).unwrap();
    let mut scorer = Scorer::new();
    let mut products = std::collections::BTreeSet::new();
    for user in [&records[0]["user"], &records[3]["user"], &serde_json::json!({"id": "nobody knows me", "age": null})] {
        // The user stands in the context, and once more in every candidate, where the user tower must run for each.
        for own in [false, true] {
            let context =
                serde_json::json!({ "id": "x", "user": if own { &records[9]["user"] } else { user }, "seen": records[70]["seen"] }).to_string();
            let candidate = |record: &serde_json::Value| {
                let mut candidate = serde_json::json!({"item": record["item"], "tags": record["tags"]});
                if own {
                    candidate["user"] = user.clone();
                }
                candidate.to_string()
            };
            let candidates: Vec<String> = records.iter().map(candidate).collect();
            for count in [1, 15, 16, 17, 150] {
                let some = candidates[..count].iter().map(|candidate| candidate.as_bytes());
                let scores = scorer.score(&model, context.as_bytes(), some).unwrap();
                for (score, record) in scores.iter().zip(&records) {
                    assert_eq!(score.logit.to_bits(), expected(user, record).to_bits());
                    products.insert(score.logit.to_bits());
                }
            }
        }
    }
    assert!(products.len() > 50, "scores that are all alike compare nothing");
}

#[test]
fn what_the_trainer_says_is_what_the_published_towers_say() {
    let input = stream(&["-n", "4000"]);
    let job = job(&input.path().join("in"));
    let done = job.train(&["--until-end"]);
    let snapshot = load(&job);
    // The golden vectors were computed from the published bytes by `Weights::logit`; the reader proves them again.
    snapshot.prove(|slots| snapshot.logit(slots)).unwrap();
    let towers = snapshot.weights.towers().unwrap();
    let said: Vec<f32> = snapshot.manifest.golden.iter().map(|golden| towers.product(&golden.slots())).collect();
    assert!(said.iter().any(|product| product.abs() > 1e-3), "{said:?}");
    assert_eq!(snapshot.manifest.rows, done["rows"].as_u64().unwrap());
}

#[test]
fn a_version_says_how_many_rows_and_vectors_each_feature_has() {
    let input = stream(&["-n", "6000"]);
    let job = job(&input.path().join("in"));
    job.train(&["--until-end"]);
    let mut show = std::process::Command::new(common::TIDEMILL);
    show.args(["snapshots", "show", "--features", "--json", "--store"]).arg(job.path("snapshots"));
    let shown: serde_json::Value = serde_json::from_slice(&show.output().unwrap().stdout).unwrap();
    let store = Store::open(job.path("snapshots").to_str().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let weights = runtime.block_on(store.load_latest("live")).unwrap().unwrap().weights;
    let held = shown["features"]["by_name"].as_array().unwrap();
    let of = |name: &str, what: &str| {
        let held = held.iter().find(|held| held["name"] == name).unwrap_or_else(|| panic!("no {name} in {shown}"));
        held[what].as_u64().unwrap()
    };
    // Each table is counted whole, and what is unclear is little.
    for (what, i, total) in [("rows", 0, weights.ids().len()), ("vectors", 1, weights.towers().unwrap().ids().len())] {
        let unclear = shown["features"]["unclear"][i].as_u64().unwrap();
        let sum: u64 = held.iter().map(|held| held[what].as_u64().unwrap()).sum();
        assert_eq!(sum + unclear, total as u64);
        assert!(unclear * 100 < sum, "{shown}");
    }
    // An age has few values and an item's vectors are those of what was seen; an impression's id is one of its own.
    assert!((3..40).contains(&of("age", "rows")) && of("trace", "rows") > 5000, "{shown}");
    assert!(of("item_id", "vectors") > 10 && of("seen", "vectors") == 0 && of("seen", "rows") > 10, "{shown}");
    assert_eq!((of("user_id*tags", "vectors"), of("position", "vectors")), (0, 0));
}
