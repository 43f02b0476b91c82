//! The promises of publishing, on a store that fails on purpose and on a real directory.

mod faults;

use std::fmt;
use std::future::Future;
use std::ops::Range;
use std::path::Path as FsPath;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::decide::{Writer, next_entry};
use super::manifest::Document;
use super::publish::Plan;
use super::retain::{Removed, retain};
use super::store::{Created, entry_key, manifest_key};
use super::{Epoch, Error, Facts, Follower, Golden, ModelInfo, Outcome, Publisher, Remedy, Settings, Snapshot, Store};
use super::{Version, Weights};
use crate::clock;
use crate::event::{Slot, Time};

type Answer<'a, T> = Pin<Box<dyn Future<Output = object_store::Result<T>> + Send + 'a>>;

/// What happens to which writes, counted from 0 over everything that is asked of the store.
#[derive(Clone, Debug, Default)]
enum Rule {
    #[default]
    None,
    /// They are not done.
    Fail(Range<usize>),
    /// They are done, and the answer is lost.
    LoseReply(Range<usize>),
    /// The process dies after the first `n` writes: nothing is answered any more.
    Die(usize),
    /// The disk is full for these.
    Full(Range<usize>),
    /// Just before it, another writer takes the same channel entry.
    Rival(usize),
}

/// A store in memory that breaks writes by a rule.
#[derive(Debug)]
struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    state: Mutex<(usize, Rule)>,
    parts: Arc<Mutex<Parts>>,
}

/// What became of uploads in parts, and which parts shall fail, counted from 0 over all uploads.
#[derive(Debug, Default)]
struct Parts {
    fail: Range<usize>,
    sizes: Vec<usize>,
    under_way: usize,
    most_under_way: usize,
    aborted: usize,
}

#[derive(Debug)]
struct Upload {
    inner: Box<dyn MultipartUpload>,
    parts: Arc<Mutex<Parts>>,
}

impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let parts = Arc::clone(&self.parts);
        let fails = {
            let mut parts = parts.lock().unwrap();
            parts.sizes.push(data.content_length());
            parts.under_way += 1;
            parts.most_under_way = parts.most_under_way.max(parts.under_way);
            parts.fail.contains(&(parts.sizes.len() - 1))
        };
        let sent = self.inner.put_part(data);
        Box::pin(async move {
            tokio::task::yield_now().await;
            let done = if fails { Err(FaultStore::broken(std::io::ErrorKind::TimedOut)) } else { sent.await };
            parts.lock().unwrap().under_way -= 1;
            done
        })
    }

    fn complete<'a, 'c>(&'a mut self) -> Answer<'c, PutResult>
    where
        'a: 'c,
        Self: 'c,
    {
        self.inner.complete()
    }

    fn abort<'a, 'c>(&'a mut self) -> Answer<'c, ()>
    where
        'a: 'c,
        Self: 'c,
    {
        self.parts.lock().unwrap().aborted += 1;
        self.inner.abort()
    }
}

impl FaultStore {
    fn over(inner: &Arc<dyn ObjectStore>, rule: Rule) -> Arc<Self> {
        Arc::new(Self { inner: Arc::clone(inner), state: Mutex::new((0, rule)), parts: Arc::default() })
    }

    fn set(&self, rule: Rule) {
        *self.state.lock().unwrap() = (0, rule);
    }

    fn puts(&self) -> usize {
        self.state.lock().unwrap().0
    }

    fn dead(&self) -> bool {
        matches!(*self.state.lock().unwrap(), (puts, Rule::Die(n)) if puts >= n)
    }

    fn broken(kind: std::io::ErrorKind) -> object_store::Error {
        object_store::Error::Generic { store: "fault", source: Box::new(std::io::Error::from(kind)) }
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fault")
    }
}

impl ObjectStore for FaultStore {
    fn put_opts<'a, 'b, 'c>(&'a self, key: &'b Path, payload: PutPayload, opts: PutOptions) -> Answer<'c, PutResult>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            assert!(matches!(opts.mode, PutMode::Create), "every write is create-only");
            let (at, rule) = {
                let mut state = self.state.lock().unwrap();
                state.0 += 1;
                (state.0 - 1, state.1.clone())
            };
            match rule {
                Rule::Fail(range) if range.contains(&at) => return Err(Self::broken(std::io::ErrorKind::TimedOut)),
                Rule::Full(range) if range.contains(&at) => return Err(Self::broken(std::io::ErrorKind::StorageFull)),
                Rule::Die(n) if at >= n => return Err(Self::broken(std::io::ErrorKind::BrokenPipe)),
                Rule::LoseReply(range) if range.contains(&at) => {
                    let _ = self.inner.put_opts(key, payload, opts).await;
                    return Err(Self::broken(std::io::ErrorKind::TimedOut));
                }
                Rule::Rival(n) if at == n => {
                    let number = key.filename().unwrap().strip_suffix(".json").unwrap().parse::<u64>().unwrap();
                    let rival = Writer { channel: "live".to_owned(), epoch: Epoch(99), name: "rival".to_owned() };
                    let entry = next_entry(number - 1, &rival, None, Time(0)).to_bytes().unwrap();
                    self.inner.put_opts(key, entry.into(), PutMode::Create.into()).await?;
                }
                _ => {}
            }
            self.inner.put_opts(key, payload, opts).await
        })
    }

    fn put_multipart_opts<'a, 'b, 'c>(
        &'a self,
        key: &'b Path,
        opts: PutMultipartOptions,
    ) -> Answer<'c, Box<dyn MultipartUpload>>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            let inner = self.inner.put_multipart_opts(key, opts).await?;
            Ok(Box::new(Upload { inner, parts: Arc::clone(&self.parts) }) as Box<dyn MultipartUpload>)
        })
    }

    fn get_opts<'a, 'b, 'c>(&'a self, key: &'b Path, options: GetOptions) -> Answer<'c, GetResult>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            if self.dead() {
                return Err(Self::broken(std::io::ErrorKind::BrokenPipe));
            }
            self.inner.get_opts(key, options).await
        })
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(keys)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_delimiter<'a, 'b, 'c>(&'a self, prefix: Option<&'b Path>) -> Answer<'c, ListResult>
    where
        'a: 'c,
        'b: 'c,
    {
        self.inner.list_with_delimiter(prefix)
    }

    fn copy_opts<'a, 'b, 'd, 'c>(&'a self, from: &'b Path, to: &'d Path, options: CopyOptions) -> Answer<'c, ()>
    where
        'a: 'c,
        'b: 'c,
        'd: 'c,
    {
        self.inner.copy_opts(from, to, options)
    }
}

// ---------------------------------------------------------------------------------------------------------- helpers

fn weights(seed: u64) -> Weights {
    let ids: Vec<u64> = (1..=20).map(|i| i * 0x0c00_0000_0000_0001 + seed).collect();
    let values = (0..20).map(|i| seed as f32 * 0.25 + i as f32 * 0.125 - 1.0).collect();
    let defaults = vec![ids[0], ids[1]];
    Weights::new(ids, values, -3.0, defaults).unwrap()
}

fn golden(weights: &Weights) -> Vec<Golden> {
    let slots = [
        Slot { row: weights.ids()[3], value: 1.0, feature: 0, flags: 0 },
        Slot { row: 42, value: 0.3, feature: 1, flags: Slot::MISSING },
    ];
    vec![Golden::new(&slots, weights.logit(&slots)), Golden::new(&[], weights.intercept())]
}

fn facts(batch: u64) -> Facts {
    let mut facts = Facts { batch, frontier_time: Some(Time(batch as i64 * 1000)), ..Facts::default() };
    facts.counts.insert("positives".to_owned(), batch * 3);
    facts
}

fn plan() -> Plan {
    Settings::default().check().unwrap()
}

async fn open(store: &Store) -> Publisher {
    try_open(store).await.unwrap()
}

async fn try_open(store: &Store) -> super::Result<Publisher> {
    let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
    Publisher::open(store.clone(), &plan(), "main", model).await
}

async fn publish(publisher: &mut Publisher, batch: u64) -> super::Result<Outcome> {
    let weights = weights(batch);
    publisher.publish(&weights.clone().into(), facts(batch), &golden(&weights), None).await
}

fn memory() -> Arc<dyn ObjectStore> {
    Arc::new(object_store::memory::InMemory::new())
}

async fn versions(store: &Store) -> Vec<u64> {
    store.versions().await.unwrap().keys().map(|version| version.0).collect()
}

async fn live(store: &Store) -> Option<Snapshot> {
    store.load_latest("live").await.unwrap()
}

/// Writes of one open and one publish on an empty store.
const OPEN: usize = 1;
const PUBLISH: usize = 3;

// ------------------------------------------------------------------------------------------------------------ tests

#[tokio::test]
async fn what_was_published_is_what_is_loaded() {
    let store = Store::over(memory());
    assert_eq!(store.latest("live").await.unwrap(), None);
    let mut publisher = open(&store).await;
    assert_eq!(live(&store).await, None, "an epoch alone names no version");
    assert_eq!(publish(&mut publisher, 5).await.unwrap(), Outcome::Published(Version(1)));
    assert_eq!(publish(&mut publisher, 6).await.unwrap(), Outcome::Published(Version(2)));
    let snapshot = live(&store).await.unwrap();
    assert_eq!(snapshot.weights, weights(6));
    assert_eq!(snapshot.manifest.facts, facts(6));
    assert_eq!(snapshot.manifest.parent, Some(Version(1)));
    assert_eq!(snapshot.manifest.rows, 20);
    assert_eq!(snapshot.manifest.golden, golden(&weights(6)));
}

#[tokio::test]
async fn a_lost_reply_does_not_lose_or_repeat_a_version() {
    for at in 0..OPEN + PUBLISH {
        let inner = memory();
        let faults = FaultStore::over(&inner, Rule::LoseReply(at..at + 1));
        let store = Store::over(faults);
        let mut publisher = open(&store).await;
        assert_eq!(publish(&mut publisher, 1).await.unwrap(), Outcome::Published(Version(1)), "write {at}");
        assert_eq!(versions(&store).await, [1], "write {at}");
        let entry = store.latest("live").await.unwrap().unwrap();
        assert_eq!((entry.number, entry.epoch, entry.version), (2, Epoch(1), Some(Version(1))), "write {at}");
    }
}

#[tokio::test]
async fn a_write_that_fails_once_is_made_again() {
    for at in 0..OPEN + PUBLISH {
        let faults = FaultStore::over(&memory(), Rule::Fail(at..at + 1));
        let store = Store::over(faults);
        let mut publisher = open(&store).await;
        assert_eq!(publish(&mut publisher, 1).await.unwrap(), Outcome::Published(Version(1)), "write {at}");
    }
}

#[tokio::test]
async fn a_store_that_is_away_is_a_retry_and_the_next_publish_succeeds() {
    for (at, lost) in (0..PUBLISH).flat_map(|at| [(at, false), (at, true)]) {
        let inner = memory();
        let faults = FaultStore::over(&inner, Rule::None);
        let store = Store::over(Arc::clone(&faults) as Arc<dyn ObjectStore>);
        let mut publisher = open(&store).await;
        faults.set(if lost { Rule::LoseReply(at..usize::MAX) } else { Rule::Fail(at..usize::MAX) });
        let error = publish(&mut publisher, 1).await;
        if let Err(error) = &error {
            assert_eq!(error.remedy(), Remedy::Retry, "{error}");
        }
        faults.set(Rule::None);
        let outcome = publish(&mut publisher, 2).await.unwrap();
        let Outcome::Published(version) = outcome else { panic!("{outcome:?} at {at}") };
        let snapshot = live(&store).await.unwrap();
        assert_eq!((snapshot.manifest.version, snapshot.weights), (version, weights(2)));
    }
}

#[tokio::test]
async fn a_full_disk_names_the_key_and_says_that_nothing_is_lost() {
    for at in 0..PUBLISH {
        let faults = FaultStore::over(&memory(), Rule::None);
        let store = Store::over(Arc::clone(&faults) as Arc<dyn ObjectStore>);
        let mut publisher = open(&store).await;
        publish(&mut publisher, 1).await.unwrap();
        faults.set(Rule::Full(at..at + 1));
        let error = publish(&mut publisher, 2).await.unwrap_err();
        assert!(matches!(&error, Error::Full { key, .. } if key.contains('/')), "{error}");
        assert_eq!(error.remedy(), Remedy::Retry);
        assert!(error.to_string().contains("no space left"), "{error}");
        assert_eq!(live(&store).await.unwrap().manifest.version, Version(1));
        assert!(matches!(publish(&mut publisher, 3).await.unwrap(), Outcome::Published(v) if v > Version(1)));
    }
}

#[tokio::test]
async fn wherever_a_publisher_dies_readers_see_a_whole_version_and_the_next_one_goes_on() {
    let total = {
        let faults = FaultStore::over(&memory(), Rule::None);
        let store = Store::over(Arc::clone(&faults) as Arc<dyn ObjectStore>);
        let mut publisher = open(&store).await;
        publish(&mut publisher, 1).await.unwrap();
        publish(&mut publisher, 2).await.unwrap();
        faults.puts()
    };
    assert_eq!(total, OPEN + 2 * PUBLISH);
    for writes in 0..=total {
        let inner = memory();
        let dying = Store::over(FaultStore::over(&inner, Rule::Die(writes)));
        if let Ok(mut publisher) = try_open(&dying).await {
            for batch in 1..=2 {
                let _ = publish(&mut publisher, batch).await;
            }
        }
        let store = Store::over(Arc::clone(&inner));
        let before = live(&store).await.map_or(0, |snapshot| snapshot.manifest.version.0);
        assert_eq!(before, (writes.saturating_sub(OPEN) / PUBLISH) as u64, "after {writes} writes");
        let highest = versions(&store).await.last().copied().unwrap_or(0);
        let mut next = open(&store).await;
        // The resumed trainer goes over the same batches again.
        for batch in 1..=3 {
            match publish(&mut next, batch).await.unwrap() {
                Outcome::Published(version) => assert!(version.0 > highest, "after {writes} writes"),
                Outcome::Behind { .. } => assert!(batch <= 2),
                Outcome::Fenced { .. } | Outcome::Pinned { .. } | Outcome::Held(_) => panic!("nobody else is there"),
            }
        }
        let snapshot = live(&store).await.unwrap();
        assert!(snapshot.manifest.version.0 > highest.max(before));
        assert_eq!(snapshot.weights, weights(3));
    }
}

#[tokio::test]
async fn after_a_restart_nothing_is_published_twice_or_backwards() {
    let store = Store::over(memory());
    let mut first = open(&store).await;
    publish(&mut first, 10).await.unwrap();
    let mut second = open(&store).await;
    assert_eq!(second.newest(), Some((Version(1), 10)));
    for batch in [8, 10] {
        assert_eq!(publish(&mut second, batch).await.unwrap(), Outcome::Behind { newest: Version(1) });
    }
    assert_eq!(publish(&mut second, 11).await.unwrap(), Outcome::Published(Version(2)));
    let mut other = Publisher::open(store.clone(), &plan(), "other", ModelInfo::default()).await.unwrap();
    let weights = weights(1);
    let outcome = other.publish(&weights.into(), facts(1), &[], None).await.unwrap();
    assert_eq!(outcome, Outcome::Published(Version(3)), "another lineage has batches of its own");
}

#[tokio::test]
async fn the_older_of_two_publishers_is_fenced_and_stays_so() {
    let store = Store::over(memory());
    let mut old = open(&store).await;
    publish(&mut old, 1).await.unwrap();
    let mut new = open(&store).await;
    assert!(new.epoch() > old.epoch());
    assert_eq!(publish(&mut old, 2).await.unwrap(), Outcome::Fenced { by: Epoch(2) });
    assert_eq!(publish(&mut new, 2).await.unwrap(), Outcome::Published(Version(2)));
    assert_eq!(publish(&mut old, 9).await.unwrap(), Outcome::Fenced { by: Epoch(2) });
    assert_eq!(live(&store).await.unwrap().weights, weights(2));
}

#[tokio::test]
async fn a_publisher_that_slept_between_manifest_and_entry_is_fenced_at_the_entry() {
    let faults = FaultStore::over(&memory(), Rule::None);
    let store = Store::over(Arc::clone(&faults) as Arc<dyn ObjectStore>);
    let mut publisher = open(&store).await;
    faults.set(Rule::Rival(PUBLISH - 1));
    assert_eq!(publish(&mut publisher, 1).await.unwrap(), Outcome::Fenced { by: Epoch(99) });
    assert_eq!(live(&store).await, None);
}

#[tokio::test]
async fn two_writers_that_start_at_once_get_different_epochs() {
    let faults = FaultStore::over(&memory(), Rule::Rival(0));
    let store = Store::over(faults);
    assert_eq!(open(&store).await.epoch(), Epoch(100));
}

#[tokio::test]
async fn a_payload_larger_than_a_part_is_the_same_object_as_one_in_one_piece() {
    let (whole, parts) = (Store::over(memory()), Store::over(memory()).in_parts(100));
    for store in [&whole, &parts] {
        let mut publisher = open(store).await;
        publish(&mut publisher, 1).await.unwrap();
        assert_eq!(live(store).await.unwrap().weights, weights(1));
    }
    let keys = whole.list("objects").await.unwrap().into_keys().collect::<Vec<_>>();
    assert_eq!(parts.list("objects").await.unwrap().into_keys().collect::<Vec<_>>(), keys);
    assert_eq!(parts.read(&keys[0]).await.unwrap(), whole.read(&keys[0]).await.unwrap());
}

#[tokio::test]
async fn the_same_weights_are_one_object() {
    let store = Store::over(memory());
    for batch in 1..=2 {
        // Each begins with a full.
        open(&store).await.publish(&weights(7).into(), facts(batch), &[], None).await.unwrap();
    }
    assert_eq!(store.list("objects").await.unwrap().len(), 1);
    assert_eq!(versions(&store).await, [1, 2]);
}

#[tokio::test]
async fn a_model_that_differs_from_its_export_is_not_published() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    let mut golden = golden(&weights(1));
    golden[0].logit += 0.001;
    let error = publisher.publish(&weights(1).into(), facts(1), &golden, None).await.unwrap_err();
    assert!(error.to_string().contains("golden vector 0"), "{error}");
    assert_eq!(versions(&store).await, [0u64; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_polls_sees_only_whole_versions_that_grow() {
    let dir = tempfile::tempdir().unwrap();
    let url = dir.path().to_str().unwrap().to_owned();
    let store = Store::create(&url).unwrap();
    let writer = tokio::spawn(async move {
        for first in [1, 5, 9] {
            // Restarted now and then: each start adds an entry that names no new version.
            let mut publisher = open(&store).await;
            for batch in first..first + 4 {
                publish(&mut publisher, batch).await.unwrap();
            }
        }
    });
    let store = Store::open(&format!("file://{url}")).unwrap();
    let mut follower = Follower::new(store.clone(), "live");
    let mut seen = Version(0);
    while seen < Version(12) {
        if let Some(version) = follower.poll().await.unwrap() {
            assert!(version > seen, "{version} after {seen}");
            let snapshot = store.load(version).await.unwrap();
            assert_eq!(snapshot.weights, weights(snapshot.manifest.facts.batch));
            seen = version;
        }
        tokio::task::yield_now().await;
    }
    writer.await.unwrap();
    assert_eq!(follower.poll().await.unwrap(), None);
}

#[tokio::test]
async fn a_reader_far_behind_lists_instead_of_walking() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    let mut follower = Follower::new(store.clone(), "live");
    assert_eq!(follower.poll().await.unwrap(), None);
    for batch in 1..=40 {
        publish(&mut publisher, batch).await.unwrap();
    }
    assert_eq!(follower.poll().await.unwrap(), Some(Version(40)));
    assert_eq!(follower.poll().await.unwrap(), None);
}

// ------------------------------------------------------------------------------------------- damage, on a directory

async fn published(dir: &FsPath) -> Store {
    let store = Store::create(dir.to_str().unwrap()).unwrap();
    let mut publisher = open(&store).await;
    publish(&mut publisher, 1).await.unwrap();
    publish(&mut publisher, 2).await.unwrap();
    store
}

#[test]
fn one_flipped_byte_anywhere_in_a_version_is_refused_with_its_key() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = runtime.block_on(published(dir.path()));
    let snapshot = runtime.block_on(live(&store)).unwrap();
    let keys = [snapshot.manifest.objects[0].name.clone(), manifest_key(Version(2)), entry_key("live", 3)];
    let strategy = (0usize..3, any::<prop::sample::Index>(), 1u8..);
    let outcome = TestRunner::new(Config::with_cases(256)).run(&strategy, |(which, at, mask)| {
        let path = dir.path().join(&keys[which]);
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        let at = at.index(bad.len());
        bad[at] ^= mask;
        std::fs::write(&path, bad).unwrap();
        let loaded = runtime.block_on(store.load_latest("live"));
        std::fs::write(&path, good).unwrap();
        let error = loaded.err().ok_or_else(|| TestCaseError::fail("a damaged version was loaded"))?;
        prop_assert!(error.to_string().contains(&keys[which]), "{}", error);
        prop_assert_eq!(error.remedy(), if which == 2 { Remedy::Stop } else { Remedy::SkipVersion });
        Ok(())
    });
    outcome.unwrap();
    assert_eq!(runtime.block_on(live(&store)).unwrap(), snapshot);
}

#[tokio::test]
async fn a_cut_a_missing_and_a_misplaced_object_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = published(dir.path()).await;
    let object = live(&store).await.unwrap().manifest.objects[0].name.clone();
    let path = dir.path().join(&object);
    let good = std::fs::read(&path).unwrap();
    std::fs::write(&path, &good[..good.len() - 4]).unwrap();
    let error = store.load(Version(2)).await.unwrap_err();
    assert!(matches!(&error, Error::Corrupt { key, .. } if *key == object), "{error}");
    std::fs::remove_file(&path).unwrap();
    let error = store.load(Version(2)).await.unwrap_err();
    assert!(
        matches!(&error, Error::Missing { key, named_by } if *key == object && named_by.contains("000002")),
        "{error}"
    );
    assert_eq!(error.remedy(), Remedy::SkipVersion);
    assert!(matches!(store.load(Version(9)).await.unwrap_err(), Error::Missing { .. }));

    std::fs::copy(dir.path().join(manifest_key(Version(1))), dir.path().join(manifest_key(Version(7)))).unwrap();
    let error = store.load(Version(7)).await.unwrap_err();
    assert!(error.to_string().contains("manifest of version 1"), "{error}");
}

#[tokio::test]
async fn foreign_files_do_not_stop_a_publisher_and_damaged_versions_are_passed_over() {
    let dir = tempfile::tempdir().unwrap();
    let store = published(dir.path()).await;
    std::fs::write(dir.path().join("manifests/notes.txt"), "mine").unwrap();
    std::fs::write(dir.path().join("manifests/7.json"), "mine").unwrap();
    std::fs::write(dir.path().join(manifest_key(Version(5))), "{}").unwrap();
    let error = store.load(Version(5)).await.unwrap_err();
    assert!(error.to_string().contains("manifests/000000000005.json"), "{error}");
    let mut publisher = open(&store).await;
    assert_eq!(publish(&mut publisher, 3).await.unwrap(), Outcome::Published(Version(6)));
    assert_eq!(live(&store).await.unwrap().weights, weights(3));
}

#[tokio::test]
async fn a_payload_name_that_holds_other_bytes_stops_the_publish() {
    let dir = tempfile::tempdir().unwrap();
    let store = published(dir.path()).await;
    let object = live(&store).await.unwrap().manifest.objects[0].name.clone();
    std::fs::write(dir.path().join(&object), "torn").unwrap();
    let mut publisher = open(&store).await;
    let error = publisher.publish(&weights(2).into(), facts(3), &[], None).await.unwrap_err();
    assert!(matches!(&error, Error::Collision { key } if *key == object), "{error}");
    assert_eq!(error.remedy(), Remedy::Stop);
}

// -------------------------------------------------------------------------------------------------------- retention

#[tokio::test]
async fn retention_keeps_what_is_needed_and_removes_the_debris_of_crashes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::create(dir.path().to_str().unwrap()).unwrap();
    let mut publisher = open(&store).await;
    // Version 6 has the weights of version 1, so its payload is an old one.
    for (batch, seed) in (1..=6).zip([1, 2, 3, 4, 5, 1]) {
        publisher.publish(&weights(seed).into(), facts(batch), &[], None).await.unwrap();
    }
    let other = Settings { channel: "held".to_owned(), ..Settings::default() }.check().unwrap();
    drop(Publisher::open(store.clone(), &other, "main", ModelInfo::default()).await.unwrap());
    let held = Writer { channel: "held".to_owned(), epoch: Epoch(1), name: "w".to_owned() };
    let entry = next_entry(1, &held, Some(Version(2)), Time(0)).to_bytes().unwrap();
    store.create_only(&entry_key("held", 2), &[entry.into()]).await.unwrap();
    let debris = dir.path().join("objects/00000000000000000000000000000000.safetensors");
    std::fs::write(&debris, "left by a crash").unwrap();
    let staging = dir.path().join("objects/00000000000000000000000000000001.safetensors#1");
    std::fs::write(&staging, "left by a crash").unwrap();

    let settings = Settings { keep: 2, grace: Duration::from_secs(3600), ..Settings::default() };
    let plan = settings.check().unwrap();
    assert_eq!(retain(&store, &plan, clock::now()).await.unwrap(), Removed::default(), "all is younger than grace");

    let later = clock::now().plus(2 * 3600 * 1000);
    let removed = retain(&store, &plan, later).await.unwrap();
    assert_eq!(removed.versions, [1, 3, 4].map(Version));
    assert_eq!((removed.objects.len(), removed.debris.len()), (3, 1), "{removed:?}");
    assert!(!debris.exists() && !staging.exists());
    assert_eq!(versions(&store).await, [2, 5, 6]);
    for version in [2, 5, 6] {
        store.load(Version(version)).await.unwrap_or_else(|e| panic!("version {version}: {e}"));
    }
    assert_eq!(store.latest("live").await.unwrap().unwrap().number, 7, "channel history stays");
    assert_eq!(publish(&mut publisher, 7).await.unwrap(), Outcome::Published(Version(7)));
}

#[tokio::test]
async fn retention_deletes_nothing_while_a_kept_manifest_cannot_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let store = published(dir.path()).await;
    std::fs::write(dir.path().join(manifest_key(Version(2))), "{}").unwrap();
    let plan = Settings { keep: 1, grace: Duration::ZERO, ..Settings::default() }.check().unwrap();
    let error = retain(&store, &plan, clock::now().plus(10_000)).await.unwrap_err();
    assert!(error.to_string().contains("manifests/000000000002.json"), "{error}");
    assert_eq!(store.list("objects").await.unwrap().len(), 2);
    assert_eq!(versions(&store).await, [1, 2]);
}

// --------------------------------------------------------------------------------------------------------- settings

#[test]
fn an_address_or_setting_that_cannot_be_used_says_why() {
    let error = Store::open("hdfs://host/models").unwrap_err().to_string();
    assert!(error.contains("hdfs://host/models") && error.contains("`hdfs://` is not known"), "{error}");
    let error = Store::open("/no/such/place").unwrap_err().to_string();
    assert!(error.contains("no such directory"), "{error}");
    assert!(Store::open("file://relative").unwrap_err().to_string().contains("absolute"));
    let error = Settings { keep: 0, ..Settings::default() }.check().unwrap_err().to_string();
    assert!(error.contains("`snapshots.keep` is `0`"), "{error}");
    let error = Settings { channel: "a/b".to_owned(), ..Settings::default() }.check().unwrap_err().to_string();
    assert!(error.contains("`snapshots.channel` is `a/b`"), "{error}");
    assert!(toml::from_str::<Settings>("kepe = 3").unwrap_err().to_string().contains("kepe"));
    assert_eq!(toml::from_str::<Settings>("grace = \"2h\"").unwrap().grace, Duration::from_secs(7200));
}

#[tokio::test]
async fn the_fault_store_lists_what_is_there() {
    let inner = memory();
    let store = Store::over(FaultStore::over(&inner, Rule::None));
    let mut publisher = open(&store).await;
    publish(&mut publisher, 1).await.unwrap();
    assert_eq!(inner.list(None).count().await, OPEN + PUBLISH);
}

// ------------------------------------------------------------------------------------------------------------ deltas

/// A model of 5000 rows of which each batch changes four and removes one.
fn grown(batch: u64) -> Weights {
    let id = |i: u64| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut rows: Vec<(u64, f32)> = (batch..5000).map(|i| (id(i), i as f32 * 0.25)).collect();
    for (changed, row) in rows.iter_mut().skip(20).take(4).enumerate() {
        row.1 = batch as f32 + changed as f32;
    }
    rows.sort_by_key(|row| row.0);
    let (ids, values) = rows.into_iter().unzip();
    Weights::new(ids, values, batch as f32, vec![id(4999), id(4998)]).unwrap()
}

async fn publish_grown(publisher: &mut Publisher, batch: u64) -> super::Result<Outcome> {
    let weights = grown(batch);
    publisher.publish(&weights.clone().into(), facts(batch), &golden(&weights), None).await
}

async fn manifest(store: &Store, version: u64) -> super::Manifest {
    store.manifest(Version(version), "a test").await.unwrap()
}

#[tokio::test]
async fn after_a_full_come_deltas_and_each_version_loads_as_it_was_published() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    for batch in 1..=30 {
        let published = publish_grown(&mut publisher, batch).await.unwrap();
        assert_eq!(published, Outcome::Published(Version(batch)));
    }
    for version in 1..=30 {
        assert_eq!(store.load(Version(version)).await.unwrap().weights, grown(version), "version {version}");
        let manifest = manifest(&store, version).await;
        let number = manifest.delta.as_ref().map_or(0, |link| u64::from(link.number));
        assert_eq!(number, (version - 1) % 21, "a full, then 20 deltas");
        if let Some(link) = manifest.delta {
            assert_eq!((link.after.0, link.full.0), (version - 1, if version > 21 { 22 } else { 1 }));
            assert!(manifest.objects[0].length * 5 < link.result.length, "{} bytes", manifest.objects[0].length);
        }
    }
}

#[tokio::test]
async fn a_chain_never_grows_past_its_full_and_a_setting_turns_deltas_off() {
    let store = Store::over(memory());
    let settings = Settings { deltas: 1000, ..Settings::default() };
    let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
    let mut publisher =
        Publisher::open(store.clone(), &settings.check().unwrap(), "main", model.clone()).await.unwrap();
    let (mut chain, mut fulls) = (0, 0);
    for batch in 1..=300 {
        publish_grown(&mut publisher, batch).await.unwrap();
        let manifest = manifest(&store, batch).await;
        let length = manifest.objects[0].length;
        match manifest.delta {
            None => (chain, fulls) = (0, fulls + 1),
            Some(link) => {
                chain += length;
                assert!(chain <= link.result.length);
            }
        }
    }
    assert!((2..10).contains(&fulls), "{fulls}");
    let settings = Settings { deltas: 0, ..Settings::default() };
    let mut publisher = Publisher::open(store.clone(), &settings.check().unwrap(), "main", model).await.unwrap();
    for batch in 301..=303 {
        publish_grown(&mut publisher, batch).await.unwrap();
        assert_eq!(manifest(&store, batch).await.delta, None);
    }
}

#[tokio::test]
async fn a_publish_that_was_tried_again_gives_the_bytes_of_one_that_was_not() {
    let clean = Store::over(memory());
    let mut publisher = open(&clean).await;
    for batch in 1..=3 {
        publish_grown(&mut publisher, batch).await.unwrap();
    }
    let payload = async |store: &Store| {
        let live = store.latest("live").await.unwrap().unwrap().version.unwrap();
        manifest(store, live.0).await.objects[0].digest
    };
    let expected = payload(&clean).await;
    for fault in 0..3 * 3 {
        for rule in [Rule::LoseReply(fault..fault + 3), Rule::Fail(fault..fault + 3), Rule::Full(fault..fault + 1)] {
            let inner = memory();
            let faults = FaultStore::over(&inner, Rule::None);
            let store = Store::over(Arc::clone(&faults) as Arc<dyn ObjectStore>);
            let mut publisher = open(&store).await;
            publish_grown(&mut publisher, 1).await.unwrap();
            publish_grown(&mut publisher, 2).await.unwrap();
            faults.set(rule.clone());
            while publish_grown(&mut publisher, 3).await.is_err() {}
            assert_eq!(payload(&store).await, expected, "{rule:?}");
            assert_eq!(live(&store).await.unwrap().weights, grown(3), "{rule:?}");
        }
    }
}

#[tokio::test]
async fn a_trainer_that_starts_anew_begins_with_a_full() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 1).await.unwrap();
    publish_grown(&mut publisher, 2).await.unwrap();
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 3).await.unwrap();
    assert_eq!(manifest(&store, 3).await.delta, None);
    publish_grown(&mut publisher, 4).await.unwrap();
    assert_eq!(manifest(&store, 4).await.delta.unwrap().after, Version(3));
}

#[tokio::test]
async fn a_dropped_a_repeated_and_a_swapped_delta_are_noticed() {
    let inner = memory();
    let store = Store::over(Arc::clone(&inner));
    let mut publisher = open(&store).await;
    for batch in 1..=5 {
        publish_grown(&mut publisher, batch).await.unwrap();
    }
    let key = |version| Path::from(manifest_key(Version(version)));
    let read = async |version| inner.get(&key(version)).await.unwrap().bytes().await.unwrap();
    let (third, fourth) = (read(3).await, read(4).await);
    let error = async || store.load(Version(5)).await.unwrap_err().to_string();

    inner.delete(&key(3)).await.unwrap();
    assert!(error().await.contains("manifests/000000000003.json"), "dropped: {}", error().await);
    // Version 3 again, in the place of 4: it has the wrong number even if all of it is sealed anew.
    let mut again = super::Manifest::from_bytes(&third).unwrap();
    again.version = Version(4);
    inner.put(&key(3), third.clone().into()).await.unwrap();
    inner.put(&key(4), again.to_bytes().unwrap().into()).await.unwrap();
    assert!(error().await.contains("manifest digest"), "repeated: {}", error().await);
    inner.put(&key(3), fourth.into()).await.unwrap();
    inner.put(&key(4), third.into()).await.unwrap();
    assert!(error().await.contains("not its place") || error().await.contains("manifest digest"), "swapped");
}

#[tokio::test]
async fn a_delta_whose_payload_does_not_give_the_promised_bytes_is_refused() {
    let inner = memory();
    let store = Store::over(Arc::clone(&inner));
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 1).await.unwrap();
    publish_grown(&mut publisher, 2).await.unwrap();
    let mut forged = manifest(&store, 2).await;
    forged.delta.as_mut().unwrap().result.digest.0 ^= 1;
    inner.put(&Path::from(manifest_key(Version(2))), forged.to_bytes().unwrap().into()).await.unwrap();
    let error = store.load(Version(2)).await.unwrap_err().to_string();
    assert!(error.contains("its chain gives weights with the digest"), "{error}");
}

#[tokio::test]
async fn retention_keeps_the_chain_of_what_it_keeps() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    for batch in 1..=8 {
        publish_grown(&mut publisher, batch).await.unwrap();
    }
    let keep_one = Plan { keep: 1, grace_ms: -1000, ..plan() };
    retain(&store, &keep_one, clock::now()).await.unwrap();
    assert_eq!(versions(&store).await, (1..=8).collect::<Vec<_>>(), "8 needs them all");
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 9).await.unwrap();
    retain(&store, &keep_one, clock::now()).await.unwrap();
    assert_eq!(versions(&store).await, [9]);
    assert_eq!(live(&store).await.unwrap().weights, grown(9));
}

#[tokio::test]
async fn rounded_rows_are_published_with_the_distance_that_rounding_made() {
    for precision in [super::Precision::F16, super::Precision::Int8] {
        let store = Store::over(memory());
        let settings = Settings { precision, ..Settings::default() };
        let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
        let mut publisher = Publisher::open(store.clone(), &settings.check().unwrap(), "main", model).await.unwrap();
        let exact = weights(7);
        let third: Vec<f32> = exact.weights().iter().map(|w| w / 3.0).collect();
        let exact = Weights::new(exact.ids().to_vec(), third, -3.0, exact.default_rows().to_vec()).unwrap();
        publisher.publish(&exact.clone().into(), facts(1), &golden(&exact), None).await.unwrap();
        let snapshot = live(&store).await.unwrap();
        assert_ne!(snapshot.weights, exact);
        assert_eq!(snapshot.weights, exact.rounded(precision).unwrap());
        let distance = (snapshot.manifest.golden[0].logit - golden(&exact)[0].logit).abs();
        assert!(distance > 0.0 && distance < 1e-3);
        assert_eq!((snapshot.manifest.rounding, snapshot.manifest.precision), (distance, precision));
    }
}

#[tokio::test]
async fn a_version_that_the_gate_held_is_kept_and_named_and_what_was_published_before_goes_on() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 1).await.unwrap();
    let held = super::gate::Report {
        verdict: super::gate::Verdict::Held,
        ..super::gate::form_only("its log loss is greater")
    };
    let weights = grown(2);
    let outcome = publisher.publish(&weights.into(), facts(2), &[], Some(held.clone())).await.unwrap();
    assert_eq!(outcome, Outcome::Held(Version(2)));
    assert_eq!(live(&store).await.unwrap().manifest.version, Version(1));
    assert_eq!(store.latest("live-held").await.unwrap().unwrap().version, Some(Version(2)));
    assert_eq!(manifest(&store, 2).await.gate, Some(held));
    assert_eq!(store.load(Version(2)).await.unwrap().weights, grown(2));
    // The next is compared with, and changes, what was published.
    publish_grown(&mut publisher, 3).await.unwrap();
    assert_eq!(manifest(&store, 3).await.delta.unwrap().after, Version(1));
    assert_eq!(publisher.before().await.unwrap().unwrap().weights.as_ref(), &grown(3));
    let keep_one = Plan { keep: 1, grace_ms: -1000, ..plan() };
    retain(&store, &keep_one, clock::now()).await.unwrap();
    assert_eq!(versions(&store).await, [1, 2, 3], "2 can still be named by hand");
}

#[tokio::test]
async fn a_trainer_that_starts_compares_with_what_serves_if_that_encodes_alike() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    assert!(publisher.before().await.unwrap().is_none());
    publish_grown(&mut publisher, 1).await.unwrap();
    let mut publisher = open(&store).await;
    assert_eq!(publisher.before().await.unwrap().unwrap().weights.as_ref(), &grown(1));
    let model = ModelInfo { schema_hash: "another".to_owned(), ..ModelInfo::default() };
    let mut publisher = Publisher::open(store, &plan(), "main", model).await.unwrap();
    assert!(publisher.before().await.unwrap().is_none());
}

#[tokio::test]
async fn a_paced_store_reads_large_objects_no_faster_than_it_may() {
    let store = Store::over(memory());
    let mut publisher = open(&store).await;
    publish_grown(&mut publisher, 1).await.unwrap();
    let length = manifest(&store, 1).await.objects[0].length;
    let (paced, began) = (store.clone().paced(length * 4), tokio::time::Instant::now());
    assert_eq!(paced.load(Version(1)).await.unwrap().weights, grown(1));
    assert!(began.elapsed() >= Duration::from_millis(250), "{length} bytes in {:?}", began.elapsed());
}

#[tokio::test]
async fn a_payload_that_travels_in_parts_is_the_one_that_was_published() {
    let store = Store::over(memory()).in_parts(10_000);
    let mut publisher = open(&store).await;
    for batch in 1..=2 {
        publish_grown(&mut publisher, batch).await.unwrap();
        assert_eq!(live(&store).await.unwrap().weights, grown(batch));
    }
    assert!(manifest(&store, 1).await.objects[0].length > 50_000);
}

// -------------------------------------------------------------------------------------------------------------- parts

/// Pieces of uneven length, 3500 bytes in all.
fn pieces() -> Vec<bytes::Bytes> {
    [1, 1999, 700, 800].iter().map(|&n: &usize| (0..n).map(|i| (i * 7 + n) as u8).collect()).collect()
}

#[tokio::test]
async fn a_large_payload_travels_in_parts_few_at_a_time() {
    let inner = memory();
    let fault = FaultStore::over(&inner, Rule::None);
    let store = Store::over(fault.clone()).in_parts(500);
    assert_eq!(store.put_object("objects/x", &pieces()).await.unwrap(), Created::Ours);
    assert_eq!(Store::over(inner).read("objects/x").await.unwrap().unwrap(), pieces().concat());
    let parts = fault.parts.lock().unwrap();
    assert_eq!((&parts.sizes[..], parts.aborted), (&[500; 7][..], 0));
    assert!((2..=4).contains(&parts.most_under_way), "{parts:?}");
    assert_eq!(fault.puts(), 0, "nothing went in one piece");
}

#[tokio::test]
async fn an_upload_whose_part_failed_is_taken_back_and_made_again() {
    let inner = memory();
    let fault = FaultStore::over(&inner, Rule::None);
    fault.parts.lock().unwrap().fail = 2..3;
    let store = Store::over(fault.clone()).in_parts(1000);
    assert_eq!(store.put_object("objects/x", &pieces()).await.unwrap(), Created::Ours);
    assert_eq!(fault.parts.lock().unwrap().aborted, 1);
    assert_eq!(Store::over(inner).read("objects/x").await.unwrap().unwrap(), pieces().concat());
}

#[tokio::test]
async fn an_upload_that_never_succeeds_leaves_no_object_and_is_a_retry() {
    let inner = memory();
    let fault = FaultStore::over(&inner, Rule::None);
    fault.parts.lock().unwrap().fail = 0..usize::MAX;
    let store = Store::over(fault.clone()).in_parts(1000);
    let error = store.put_object("objects/x", &pieces()).await.unwrap_err();
    assert_eq!(error.remedy(), Remedy::Retry, "{error}");
    assert!(!store.exists("objects/x").await.unwrap());
    assert_eq!(fault.parts.lock().unwrap().aborted, 3, "each attempt was taken back");
}

#[tokio::test]
async fn a_full_read_in_place_from_a_file_is_the_one_that_was_published() {
    for precision in [super::Precision::F32, super::Precision::F16, super::Precision::Int8] {
        for pace in [None, Some(100_000_000)] {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
            let (store, cache) = (Store::create(&path("store")).unwrap(), Store::create(&path("cache")).unwrap());
            let store = pace.map_or(store.clone(), |pace| store.clone().paced(pace));
            let settings = Settings { precision, ..Settings::default() };
            let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
            let plan = settings.check().unwrap();
            let mut publisher = Publisher::open(store.clone(), &plan, "main", model).await.unwrap();
            let exact = weights(7);
            publisher.publish(&exact.clone().into(), facts(1), &golden(&exact), None).await.unwrap();
            let chain = store.chain(Version(1), None).await.unwrap();
            let loaded = store.load(Version(1)).await.unwrap();
            for place in [None, Some(&cache), Some(&cache)] {
                let (full, objects) = store.full(&chain, place).await.unwrap();
                assert_eq!((full.is_mapped(), &full.weights), (true, &loaded.weights));
                // The payload comes along only where it is not in the cache.
                assert_eq!(objects.len(), if place.is_some() { 1 } else { 2 });
            }
            // What is in the cache is read there, also when the store is gone.
            let object = &loaded.manifest.objects[0].name;
            std::fs::remove_file(dir.path().join("store").join(object)).unwrap();
            assert!(store.full(&chain, Some(&cache)).await.unwrap().0.is_mapped());
            std::fs::remove_file(dir.path().join("cache").join(object)).unwrap();
            let error = store.full(&chain, Some(&cache)).await.unwrap_err();
            assert!(matches!(&error, Error::Missing { key, .. } if key == object), "{error}");
            assert!(cache.staged(clock::now().plus(1000)).unwrap().is_empty());
        }
    }
}

#[tokio::test]
async fn a_full_that_comes_in_parts_from_a_bucket_is_read_in_place_without_a_cache() {
    let store = Store::over(memory()).in_parts(100);
    let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
    let plan = Settings::default().check().unwrap();
    let mut publisher = Publisher::open(store.clone(), &plan, "main", model).await.unwrap();
    let exact = weights(7);
    publisher.publish(&exact.clone().into(), facts(1), &golden(&exact), None).await.unwrap();
    let chain = store.chain(Version(1), None).await.unwrap();
    let (full, _) = store.full(&chain, None).await.unwrap();
    assert!(full.is_mapped() && full.manifest.objects[0].length > 300);
    assert_eq!(full.weights, store.load(Version(1)).await.unwrap().weights);
}

#[tokio::test]
async fn a_payload_that_came_otherwise_than_published_is_refused_and_gets_no_name_in_a_cache() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (store, cache) = (Store::create(&path("store")).unwrap(), Store::create(&path("cache")).unwrap());
    let model = ModelInfo { kind: "logistic".to_owned(), ..ModelInfo::default() };
    let plan = Settings::default().check().unwrap();
    let mut publisher = Publisher::open(store.clone(), &plan, "main", model).await.unwrap();
    let exact = weights(7);
    publisher.publish(&exact.clone().into(), facts(1), &golden(&exact), None).await.unwrap();
    let chain = store.chain(Version(1), None).await.unwrap();
    let object = dir.path().join("store").join(&chain.last().manifest.objects[0].name);
    let whole = std::fs::read(&object).unwrap();
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        if at % 5 == 0 {
            bytes.truncate(at);
        }
        std::fs::write(&object, bytes).unwrap();
        for place in [Some(&cache), None] {
            let error = store.full(&chain, place).await.unwrap_err();
            assert!(matches!(&error, Error::Corrupt { .. }) && error.remedy() == Remedy::SkipVersion, "{at}: {error}");
        }
        let left = std::fs::read_dir(dir.path().join("cache/objects")).map_or(0, Iterator::count);
        assert_eq!(left, 0, "byte {at}");
    }
}
