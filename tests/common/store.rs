//! The promises of publishing to a bucket, by its address: each provider's tests make them of their own server.
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::StreamExt as _;
use serde_json::{Value, json};
use tidemill::event::Time;
use tidemill::serve::{Node, Scorer};
use tidemill::snapshot::publish::Content;
use tidemill::snapshot::{Facts, Follower, Golden, ModelInfo, Outcome, Publisher, Settings, Store, Version, Weights};

use crate::common::{Job, TIDEMILL, generate};
use crate::node::Serving;

/// A variable that `scripts/services.sh up SERVICE` gives.
pub fn variable(service: &str, name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "`{name}` is not set: these tests need a real server. Run `scripts/services.sh up {service}`, then \
             `set -a; . .services/{service}/env; set +a`; or run scripts/test.sh, which does it all"
        )
    })
}

/// A prefix that no other test has.
pub fn prefix(what: &str) -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("{what}-{}-{}-{number}", tidemill::clock::now().0, std::process::id())
}

pub fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// `rows` rows, of which each batch changes every hundredth.
fn weights(rows: u64, batch: u64) -> Weights {
    let id = |i: u64| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let value = |i: u64| i as f32 * 0.001 + if i % 100 == batch % 100 { batch as f32 } else { 0.0 };
    let mut rows: Vec<(u64, f32)> = (0..rows).map(|i| (id(i), value(i))).collect();
    rows.sort_by_key(|row| row.0);
    let defaults = vec![rows[0].0];
    let (ids, values) = rows.into_iter().unzip();
    Weights::new(ids, values, batch as f32, defaults).unwrap()
}

async fn open(url: &str) -> (Store, Publisher) {
    let settings = Settings { store: url.to_owned(), ..Settings::default() };
    let plan = settings.check().unwrap();
    let store = plan.open().unwrap();
    let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
    (store.clone(), Publisher::open(store, &plan, "main", model).await.unwrap())
}

async fn publish(publisher: &mut Publisher, rows: u64, batch: u64) -> Outcome {
    let weights = weights(rows, batch);
    let golden = [Golden::new(&[], weights.logit(&[]))];
    let facts = Facts { batch, frontier_time: Some(Time(batch as i64)), ..Facts::default() };
    publisher.publish(&Content::Whole(Arc::new(weights)), facts, &golden, None).await.unwrap()
}

pub fn fulls_and_deltas_are_followed_as_they_were_published(url: &str) {
    block_on(async {
        let (store, mut publisher) = open(url).await;
        let mut follower = Follower::new(store.clone(), "live");
        for batch in 1..=4 {
            assert_eq!(publish(&mut publisher, 5000, batch).await, Outcome::Published(Version(batch)));
            assert_eq!(follower.poll().await.unwrap(), Some(Version(batch)));
            let snapshot = store.load(Version(batch)).await.unwrap();
            assert_eq!(snapshot.weights, weights(5000, batch));
            assert_eq!(snapshot.manifest.delta.is_some(), batch > 1);
        }
        assert!(follower.still_there().await.unwrap());
        assert_eq!(store.versions().await.unwrap().len(), 4);
    });
}

pub fn a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel(url: &str) {
    block_on(async {
        let (store, mut paused) = open(url).await;
        assert_eq!(publish(&mut paused, 100, 1).await, Outcome::Published(Version(1)));
        let (_, mut next) = open(url).await;
        assert!(matches!(publish(&mut paused, 100, 2).await, Outcome::Fenced { by } if by == next.epoch()));
        assert_eq!(publish(&mut next, 100, 3).await, Outcome::Published(Version(2)));
        assert!(matches!(publish(&mut paused, 100, 4).await, Outcome::Fenced { .. }));
        assert_eq!(store.load_latest("live").await.unwrap().unwrap().weights, weights(100, 3));
    });
}

/// The address must have `part_mib=5`.
pub fn what_is_larger_than_a_part_travels_in_parts(url: &str) {
    block_on(async {
        let (store, mut publisher) = open(url).await;
        // 12 bytes a row: three parts and a bit.
        assert_eq!(publish(&mut publisher, 1_400_000, 1).await, Outcome::Published(Version(1)));
        let snapshot = store.load(Version(1)).await.unwrap();
        assert!(snapshot.manifest.objects[0].length > 16_000_000);
        assert!(snapshot.weights == weights(1_400_000, 1));
        let traffic = store.traffic();
        assert!(traffic.written > 16_000_000, "{traffic:?}");
    });
}

pub fn create_if_absent_is_real_when_writers_race(url: &str) {
    let race = block_on(Store::create(url).unwrap().race(5, 8)).unwrap();
    assert_eq!((race.rounds, race.writers), (5, 8));
}

/// Runs `tidemill snapshots` on a store, in an environment that `with` changes.
pub fn snapshots(url: &str, args: &[&str], with: impl FnOnce(&mut Command)) -> Output {
    let mut command = Command::new(TIDEMILL);
    command.arg("snapshots").args(args).args(["--store", url]);
    with(&mut command);
    command.output().unwrap()
}

/// What `tidemill snapshots list` says, which must be a failure; on one line, whatever the store answered.
pub fn refused(url: &str, with: impl FnOnce(&mut Command)) -> String {
    let output = snapshots(url, &["list"], with);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it should have been refused: {said}");
    let last = said.trim_end().lines().last().unwrap_or_default();
    assert!(last.starts_with("tidemill: "), "{said}");
    last.to_owned()
}

/// What `tidemill check` says of a job with this store, and whether it is content.
pub fn check(job: &Job, url: &str) -> (bool, String) {
    let mut command = Command::new(TIDEMILL);
    command.arg("check").arg("-c").arg(job.path("job.toml"));
    let output = command.args(["--set", &format!("snapshots.store={url:?}")]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), said)
}

/// Trains, follows with a node, takes back and puts forward again by hand, and deletes what is old. `creates` is what
/// `tidemill check` says of create-if-absent.
pub fn a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back(url: &str, creates: &str) {
    let input = generate(&["-n", "8000"]);
    let job = Job::over(&input.path().join("in"));
    let (content, said) = check(&job, url);
    assert!(content && said.contains(creates), "{said}");

    let store = format!("snapshots.store={url:?}");
    let set = ["--set", &store, "--set", "snapshots.keep=100"];
    // Fulls alone at first, so that none needs another one.
    let fulls = ["--until", "2026-01-01T00:02:30Z", "--set", "snapshots.deltas=0"];
    let trained = job.train(&[&fulls[..], &set].concat());
    let newest = Version(trained["snapshot_version"].as_u64().unwrap());
    let serving = Serving::start(Path::new(url), &[]);
    serving.serves(newest);

    let said = |args: &[&str]| {
        let output = snapshots(url, args, |_| ());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let list: Value = serde_json::from_str(&said(&["list", "--json"])).unwrap();
    let first = Version(list[0]["version"].as_u64().unwrap());
    assert!(first < newest, "{list}");
    said(&["rollback", &first.to_string()]);
    serving.serves(first);
    said(&["unpin"]);
    said(&["promote", &newest.to_string()]);
    serving.serves(newest);
    assert!(said(&["verify"]).contains("channel live: ok"));

    // Retention deletes in the bucket too, and spares the chain of what is named.
    let dry: Value =
        serde_json::from_str(&said(&["gc", "--keep", "1", "--grace", "0s", "--dry-run", "--json"])).unwrap();
    let gone: Value = serde_json::from_str(&said(&["gc", "--keep", "1", "--grace", "0s", "--json"])).unwrap();
    assert_eq!(gone["dry_run"], json!(false));
    assert_eq!((&gone["versions"], &gone["objects"]), (&dry["versions"], &dry["objects"]));
    said(&["verify"]);
    let left: Value = serde_json::from_str(&said(&["list", "--json"])).unwrap();
    assert!(left.as_array().unwrap().len() < list.as_array().unwrap().len(), "{gone}");

    // A node inside of a program, which keeps what it fetches on a disk.
    let settings = tidemill::serve::Settings {
        store: url.to_owned(),
        cache: Some(job.path("cache")),
        poll: Duration::from_millis(20),
        ..tidemill::serve::Settings::default()
    };
    let node = Node::open(&settings).unwrap();
    let model = node.wait(Duration::from_secs(30)).unwrap_or_else(|| panic!("{:?}", node.status().reasons()));
    assert_eq!(model.version(), newest);
    let (mut scorer, context, candidate) = (Scorer::new(), r#"{"user":{"id":7}}"#, r#"{"item":{"id":1}}"#);
    let logit = scorer.score(&model, context.as_bytes(), [candidate.as_bytes()]).unwrap()[0].logit;
    let (status, served) = serving.score(&format!(r#"{{"context":{context},"candidates":[{candidate}]}}"#));
    assert_eq!(
        (status, served["scores"][0]["logit"].as_f64().map(|logit| logit as f32)),
        (200, Some(logit)),
        "{served}"
    );

    let last = job.train(&[&["--until-end"][..], &set].concat())["snapshot_version"].as_u64().map(Version);
    assert!(last > Some(newest), "{last:?}");
    serving.serves(last.unwrap());
    let began = Instant::now();
    while node.status().version != last {
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", node.status().reasons());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The store lists `page` objects at a time. `bucket` is the place of the address, without its prefix.
pub fn a_list_of_more_than_a_page_is_whole(url: &str, bucket: &impl object_store::ObjectStoreExt, page: usize) {
    let prefix = url.split_once('?').unwrap().0.rsplit_once('/').unwrap().1;
    let names: Vec<String> = (0..=page).map(|i| format!("{i:05}")).collect();
    let put = |name| async move {
        let key = object_store::path::Path::from(format!("{prefix}/{name}"));
        bucket.put(&key, "x".into()).await.unwrap();
    };
    block_on(futures::stream::iter(&names).for_each_concurrent(16, put));
    let parts = block_on(Store::open(url).unwrap().parts()).unwrap();
    assert_eq!(parts.into_iter().map(|part| part.key).collect::<Vec<_>>(), names);
}

/// `bucket` is the place of the address, without its prefix.
pub fn a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed(
    url: &str,
    bucket: &impl object_store::ObjectStoreExt,
) {
    let input = generate(&["-n", "9000", "--partitions", "2", "--disorder", "2s", "--late", "0.003", "--zst"]);
    let dir = input.path().join("in");
    let files = Job::over(&dir).train(&["--until-end"]);
    let (place, options) = url.split_once('?').unwrap();
    let prefix = place.rsplit_once('/').unwrap().1;
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let key = object_store::path::Path::from(format!("{prefix}/{}", path.file_name().unwrap().to_str().unwrap()));
        block_on(bucket.put(&key, std::fs::read(&path).unwrap().into())).unwrap();
    }
    let new = || {
        let job = Job::over(&dir);
        for stream in ["impressions", "clicks"] {
            job.edit(&format!("{}/{stream}-*", dir.display()), &format!("{place}/{stream}-*?{options}"));
        }
        job
    };
    let whole = new().train(&["--until-end"]);
    assert_eq!(files["model_digest"], whole["model_digest"]);
    assert_eq!(files["order_digest"], whole["order_digest"]);
    let job = new();
    job.train(&["--until", "2026-01-01T00:01:12.5Z"]);
    let resumed = job.train(&["--until-end"]);
    assert_eq!((&resumed["resumed"], &resumed["order_digest"]), (&true.into(), &whole["order_digest"]));
}
