//! The promises of publishing against a real S3 server, which `scripts/services.sh up s3` starts.

mod common;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Job, TIDEMILL, generate};
use serde_json::{Value, json};
use tidemill::event::Time;
use tidemill::snapshot::manifest::Act;
use tidemill::snapshot::publish::Content;
use tidemill::snapshot::{
    Epoch, Facts, Follower, Golden, ModelInfo, Outcome, Publisher, Settings, Store, Version, Weights,
};

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "`{name}` is not set: these tests need a real S3 server. Run `scripts/services.sh up s3`, then \
             `set -a; . .services/s3/env; set +a`; or run scripts/test.sh, which does it all"
        )
    })
}

/// A prefix of its own in the bucket, with more options.
fn address(what: &str, options: &str) -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let now = tidemill::clock::now().0;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let (bucket, endpoint) = (variable("TIDEMILL_TEST_S3_BUCKET"), variable("TIDEMILL_TEST_S3"));
    format!("s3://{bucket}/{what}-{now}-{}-{number}?endpoint={endpoint}&allow_http=true{options}", std::process::id())
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
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

#[test]
fn fulls_and_deltas_are_followed_as_they_were_published() {
    let url = address("follow", "");
    block_on(async {
        let (store, mut publisher) = open(&url).await;
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

#[test]
fn a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel() {
    let url = address("fence", "");
    block_on(async {
        let (store, mut paused) = open(&url).await;
        assert_eq!(publish(&mut paused, 100, 1).await, Outcome::Published(Version(1)));
        let (_, mut next) = open(&url).await;
        assert!(matches!(publish(&mut paused, 100, 2).await, Outcome::Fenced { by } if by == next.epoch()));
        assert_eq!(publish(&mut next, 100, 3).await, Outcome::Published(Version(2)));
        assert!(matches!(publish(&mut paused, 100, 4).await, Outcome::Fenced { .. }));
        assert_eq!(store.load_latest("live").await.unwrap().unwrap().weights, weights(100, 3));
    });
}

#[test]
fn what_is_larger_than_a_part_travels_in_parts() {
    let url = address("parts", "&part_mib=5&parallel=2");
    block_on(async {
        let (store, mut publisher) = open(&url).await;
        // 12 bytes a row: three parts and a bit.
        assert_eq!(publish(&mut publisher, 1_400_000, 1).await, Outcome::Published(Version(1)));
        let snapshot = store.load(Version(1)).await.unwrap();
        assert!(snapshot.manifest.objects[0].length > 16_000_000);
        assert!(snapshot.weights == weights(1_400_000, 1));
        let traffic = store.traffic();
        assert!(traffic.written > 16_000_000, "{traffic:?}");
    });
}

#[test]
fn create_if_absent_is_real_when_writers_race() {
    let store = Store::create(&address("race", "")).unwrap();
    let race = block_on(store.race(5, 8)).unwrap();
    assert_eq!((race.rounds, race.writers), (5, 8));
}

fn snapshots(url: &str, args: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(TIDEMILL);
    command.arg("snapshots").args(args).args(["--store", url]).envs(environment.iter().copied());
    command.output().unwrap()
}

fn refused(url: &str, environment: &[(&str, &str)]) -> String {
    let output = snapshots(url, &["list"], environment);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "it should have been refused: {said}");
    said
}

#[test]
fn what_is_wrong_with_a_store_is_said_with_what_to_do() {
    let url = address("wrong", "");
    let said = refused(&url, &[("AWS_SECRET_ACCESS_KEY", "another")]);
    assert!(said.contains("correct AWS_SECRET_ACCESS_KEY") && said.contains(&url[..20]), "{said}");
    let said = refused(&url, &[("AWS_ACCESS_KEY_ID", "nobody")]);
    assert!(said.contains("AWS_ACCESS_KEY_ID"), "{said}");
    let bucket = variable("TIDEMILL_TEST_S3_BUCKET");
    let said = refused(&url.replace(&format!("s3://{bucket}/"), "s3://no-such-bucket/"), &[]);
    assert!(said.contains("no such bucket"), "{said}");
    let said = refused(&url.replace(&variable("TIDEMILL_TEST_S3"), "http://127.0.0.1:9"), &[]);
    assert!(said.contains("nothing answers at the endpoint"), "{said}");
    let said = refused(&url.replace("&allow_http=true", ""), &[]);
    assert!(said.contains("allow_http=true"), "{said}");
    // One that may only read.
    let (key, secret) = (variable("TIDEMILL_TEST_S3_READER_KEY"), variable("TIDEMILL_TEST_S3_READER_SECRET"));
    let input = generate(&["-n", "500"]);
    let job = Job::over(&input.path().join("in"));
    let mut command = job.command(&["--until-end", "--set", &format!("snapshots.store={url:?}")]);
    let output = command.env("AWS_ACCESS_KEY_ID", key).env("AWS_SECRET_ACCESS_KEY", secret).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("access is denied"), "{said}");
}

#[test]
fn tls_needs_the_authority_that_signed_the_certificate() {
    let (tls, ca) = (variable("TIDEMILL_TEST_S3_TLS"), variable("TIDEMILL_TEST_S3_CA"));
    let url = address("tls", "").replace(&variable("TIDEMILL_TEST_S3"), &tls).replace("&allow_http=true", "");
    let said = refused(&url, &[]);
    assert!(said.contains("`ca_file`"), "{said}");
    let store = Store::create(&format!("{url}&ca_file={ca}")).unwrap();
    block_on(async {
        assert!(store.versions().await.unwrap().is_empty());
        store.race(1, 4).await.unwrap();
    });
}

/// Lines of the streams in files that grow, stretch by stretch.
struct Growing {
    dir: PathBuf,
    files: Vec<(PathBuf, Vec<String>)>,
    /// How far they have grown, in thousandths.
    grown: usize,
}

impl Growing {
    fn new(from: &Path, dir: PathBuf) -> Self {
        std::fs::create_dir(&dir).unwrap();
        let files = std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap().path());
        let lines = |path: &PathBuf| std::fs::read_to_string(path).unwrap().lines().map(|l| format!("{l}\n")).collect();
        let files = files.map(|path| (dir.join(path.file_name().unwrap()), lines(&path))).collect();
        let mut growing = Self { dir, files, grown: 0 };
        growing.grow();
        growing
    }

    /// Lets all files grow by a thousandth, while there is more.
    fn grow(&mut self) {
        let to = (self.grown + 1).min(1000);
        for (path, lines) in &self.files {
            let part = &lines[lines.len() * self.grown / 1000..lines.len() * to / 1000];
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(path).unwrap();
            file.write_all(part.concat().as_bytes()).unwrap();
        }
        self.grown = to;
    }

    /// Grows until `done` gives something.
    fn until<T>(&mut self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        loop {
            if let Some(done) = done() {
                return done;
            }
            assert!(began.elapsed() < Duration::from_secs(60), "{what}: not within a minute, log at {}", self.grown);
            self.grow();
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Grows until the channel names a version of at least `least`, and gives it.
    fn until_version(&mut self, store: &Store, least: u64) -> u64 {
        self.until(&format!("version {least}"), || {
            let named = block_on(store.latest("live")).unwrap().and_then(|entry| entry.version);
            named.map(|version| version.0).filter(|version| *version >= least)
        })
    }
}

/// Reads all that a channel names, as it comes, until told to stop. Each must be complete, valid and newer than the one before.
fn read_all(url: &str, stop: Arc<AtomicBool>) -> JoinHandle<Vec<Version>> {
    let store = Store::open(url).unwrap();
    std::thread::spawn(move || {
        let (mut follower, mut seen) = (Follower::new(store.clone(), "live"), Vec::new());
        block_on(async {
            loop {
                let last = stop.load(Ordering::Acquire);
                if let Some(version) = follower.poll().await.unwrap() {
                    let snapshot = store.load(version).await.unwrap();
                    snapshot.prove(|slots| snapshot.logit(slots)).unwrap();
                    seen.push(version);
                }
                if last {
                    return seen;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
    })
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn of_two_processes_the_one_that_was_paused_wakes_up_and_publishes_nothing() {
    // Where the first one is caught differs each time: learning, uploading, committing, writing a checkpoint.
    let input = generate(&["-n", "40000"]);
    for pause in [0, 40, 90, 150] {
        let url = address("zombie", "");
        let mut log = Growing::new(&input.path().join("in"), input.path().join(format!("grows-{pause}")));
        let job = Job::over(&log.dir);
        job.edit("every = \"30s\"", "every = \"5s\"");
        let set = format!("snapshots.store={url:?}");
        let spawn = |dir: &Path| {
            let dir = format!("checkpoint.dir={:?}", dir.display().to_string());
            job.command(&["--set", &set, "--set", "snapshots.keep=1000", "--set", &dir]).spawn().unwrap()
        };
        let store = Store::create(&url).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let reader = read_all(&url, Arc::clone(&stop));

        let mut paused = spawn(&job.path("checkpoints"));
        log.until_version(&store, 2);
        std::thread::sleep(Duration::from_millis(pause));
        signal(&paused, "-STOP");

        // Elsewhere, from a copy of its checkpoints: on the same directory the lock of the paused one would refuse it.
        let copy = job.path("copied");
        std::fs::create_dir(&copy).unwrap();
        for file in std::fs::read_dir(job.path("checkpoints")).unwrap().map(|entry| entry.unwrap().path()) {
            std::fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
        }
        let taken = block_on(store.latest("live")).unwrap().unwrap();
        let next = spawn(&copy);
        let version = log.until_version(&store, taken.version.unwrap().0 + 2);
        signal(&paused, "-CONT");
        log.until("the paused one ends", || paused.try_wait().unwrap());
        let output = paused.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "paused at {pause} ms: {said}");
        assert!(said.contains("another trainer has taken the channel with epoch 2"), "paused at {pause} ms: {said}");

        // The other one does not mind.
        log.until_version(&store, version + 1);
        signal(&next, "-TERM");
        let output = next.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        stop.store(true, Ordering::Release);
        let seen = reader.join().unwrap();
        assert!(seen.is_sorted_by(|a, b| a < b), "the reader saw {seen:?}");

        block_on(async {
            let newest = store.latest("live").await.unwrap().unwrap();
            assert_eq!(seen.last().copied(), newest.version);
            let mut epoch = Epoch(0);
            for number in 1..=newest.number {
                let entry = store.entry("live", number).await.unwrap().expect("entries are never deleted");
                assert!(entry.epoch >= epoch, "entry {number} is of {}, after {epoch}", entry.epoch);
                if let Some(version) = entry.version.filter(|_| entry.act == Act::Publish) {
                    let manifest = store.manifest(version, "a test").await.unwrap();
                    assert_eq!((manifest.epoch, &manifest.writer), (entry.epoch, &entry.writer));
                }
                epoch = entry.epoch;
            }
            assert_eq!((newest.epoch, epoch), (Epoch(2), Epoch(2)));
        });
    }
}

/// Asks a node until the answer is as wished.
fn get_until(address: &str, path: &str, wished: impl Fn(&Value) -> bool) -> Value {
    let began = Instant::now();
    loop {
        let mut stream = TcpStream::connect(address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n").unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let answer: Value = serde_json::from_str(body).unwrap_or(Value::Null);
        if wished(&answer) {
            return answer;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{path} says {text}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back() {
    let url = address("loop", "");
    let input = generate(&["-n", "8000"]);
    let job = Job::over(&input.path().join("in"));
    let store = format!("snapshots.store={url:?}");
    let check =
        Command::new(TIDEMILL).arg("check").arg("-c").arg(job.path("job.toml")).args(["--set", &store]).output();
    let check = check.unwrap();
    let said = String::from_utf8_lossy(&check.stdout).into_owned() + &String::from_utf8_lossy(&check.stderr);
    assert!(check.status.success() && said.contains("create-only writes work"), "{said}");

    let trained = job.train(&["--until-end", "--set", &store, "--set", "snapshots.keep=100"]);
    let newest = trained["snapshot_version"].as_u64().unwrap();
    let mut serve = Command::new(TIDEMILL);
    serve.args(["serve", "-c"]).arg(concat!(env!("CARGO_MANIFEST_DIR"), "/configs/serve.toml"));
    for set in [format!("store={url:?}"), "http.listen=\"127.0.0.1:0\"".into(), "poll=\"50ms\"".into()] {
        serve.arg("--set").arg(set);
    }
    let mut child = serve.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let node = line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("it said {line}")).to_owned();
    get_until(&node, "/readyz", |ready| ready["version"] == newest);

    let said = |args: &[&str]| {
        let output = snapshots(&url, args, &[]);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let list: Value = serde_json::from_str(&said(&["list", "--json"])).unwrap();
    let first = list[0]["version"].as_u64().unwrap();
    assert!(first < newest, "{list}");
    said(&["rollback", &first.to_string()]);
    get_until(&node, "/readyz", |ready| ready["version"] == first);
    said(&["unpin"]);
    said(&["promote", &newest.to_string()]);
    get_until(&node, "/readyz", |ready| ready["version"] == newest);
    assert!(said(&["verify"]).contains("channel live: ok"));
    child.kill().unwrap();
    child.wait().unwrap();

    // Retention deletes in the bucket too, and spares the chain of what is named.
    let gone: Value = serde_json::from_str(&said(&["gc", "--keep", "1", "--grace", "0s", "--json"])).unwrap();
    assert_eq!(gone["dry_run"], json!(false));
    said(&["verify"]);
}

#[test]
fn the_demo_over_a_bucket_keeps_its_promises() {
    let url = address("demo", "");
    let demo = |seconds: &str| {
        Command::new(TIDEMILL).args(["demo", "--json", "--seconds", seconds, "--rate", "500", "--store", &url]).output()
    };
    let output = demo("12").unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no JSON; stderr: {said}"));
    assert!(output.status.success(), "{report:#}");
    // So short a stream is too few examples to judge the learning by.
    let broken = |promise: &Value| promise["kept"] == false;
    assert!(!report["promises"].as_array().unwrap().iter().any(broken), "{report:#}");
    let output = demo("10").unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("already; give a prefix"), "{said}");
}

#[test]
fn a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed() {
    let input = generate(&["-n", "9000", "--partitions", "2", "--disorder", "2s", "--late", "0.003", "--zst"]);
    let dir = input.path().join("in");
    let files = Job::over(&dir).train(&["--until-end"]);
    let url = address("log", "");
    let (place, options) = url.split_once('?').unwrap();
    let prefix = place.rsplit_once('/').unwrap().1;
    let bucket = object_store::aws::AmazonS3Builder::from_env()
        .with_bucket_name(variable("TIDEMILL_TEST_S3_BUCKET"))
        .with_endpoint(variable("TIDEMILL_TEST_S3"))
        .with_allow_http(true)
        .build()
        .unwrap();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let key = object_store::path::Path::from(format!("{prefix}/{}", path.file_name().unwrap().to_str().unwrap()));
        let bytes = std::fs::read(&path).unwrap();
        block_on(object_store::ObjectStoreExt::put(&bucket, &key, bytes.into())).unwrap();
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
