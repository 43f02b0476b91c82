//! The promises of publishing against a real S3 server, which `scripts/services.sh up s3` starts.

mod common;
#[path = "common/node.rs"]
mod node;
#[path = "common/store.rs"]
mod store;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use common::{Job, TIDEMILL, generate};
use serde_json::Value;
use store::{block_on, refused};
use tidemill::snapshot::manifest::Act;
use tidemill::snapshot::{Epoch, Follower, Store, Version};

fn variable(name: &str) -> String {
    store::variable("s3", name)
}

/// A prefix of its own in the bucket, with more options.
fn address(what: &str, options: &str) -> String {
    let (bucket, endpoint) = (variable("TIDEMILL_TEST_S3_BUCKET"), variable("TIDEMILL_TEST_S3"));
    format!("s3://{bucket}/{}?endpoint={endpoint}&allow_http=true{options}", store::prefix(what))
}

/// The bucket, by its provider's own client.
fn bucket() -> object_store::aws::AmazonS3 {
    object_store::aws::AmazonS3Builder::from_env()
        .with_bucket_name(variable("TIDEMILL_TEST_S3_BUCKET"))
        .with_endpoint(variable("TIDEMILL_TEST_S3"))
        .with_allow_http(true)
        .build()
        .unwrap()
}

#[test]
fn a_list_of_more_than_a_page_is_whole() {
    store::a_list_of_more_than_a_page_is_whole(&address("page", ""), &bucket(), 1000);
}

#[test]
fn fulls_and_deltas_are_followed_as_they_were_published() {
    store::fulls_and_deltas_are_followed_as_they_were_published(&address("follow", ""));
}

#[test]
fn a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel() {
    store::a_trainer_that_was_paused_cannot_publish_once_another_has_taken_the_channel(&address("fence", ""));
}

#[test]
fn what_is_larger_than_a_part_travels_in_parts() {
    store::what_is_larger_than_a_part_travels_in_parts(&address("parts", "&part_mib=5&parallel=2"));
}

#[test]
fn create_if_absent_is_real_when_writers_race() {
    store::create_if_absent_is_real_when_writers_race(&address("race", ""));
}

#[test]
fn a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back() {
    let url = address("loop", "");
    store::a_job_publishes_to_a_bucket_a_node_follows_and_a_person_takes_it_back(&url, "create-only writes work");
}

#[test]
fn a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed() {
    store::a_log_in_a_bucket_is_learned_to_the_bytes_of_the_same_files_and_resumed(&address("log", ""), &bucket());
}

#[test]
fn what_is_wrong_with_a_store_is_said_with_what_to_do() {
    let url = address("wrong", "");
    let said = refused(&url, |command| _ = command.env("AWS_SECRET_ACCESS_KEY", "another"));
    assert!(said.contains("correct AWS_SECRET_ACCESS_KEY") && said.contains(&url[..20]), "{said}");
    let said = refused(&url, |command| _ = command.env("AWS_ACCESS_KEY_ID", "nobody"));
    assert!(said.contains("AWS_ACCESS_KEY_ID"), "{said}");
    let bucket = variable("TIDEMILL_TEST_S3_BUCKET");
    let said = refused(&url.replace(&format!("s3://{bucket}/"), "s3://no-such-bucket/"), |_| ());
    assert!(said.contains("no such bucket"), "{said}");
    let said = refused(&url.replace(&variable("TIDEMILL_TEST_S3"), "http://127.0.0.1:9"), |_| ());
    assert!(said.contains("nothing answers at the endpoint"), "{said}");
    let said = refused(&url.replace("&allow_http=true", ""), |_| ());
    assert!(said.contains("allow_http=true"), "{said}");
    let said = refused(&format!("{url}&anonymous=true"), |_| ());
    assert!(said.contains("access is denied"), "{said}");
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
    let said = refused(&url, |_| ());
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
