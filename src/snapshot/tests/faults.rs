//! Publishing and following on a store where any operation may fail, before or after it took effect.

use std::collections::BTreeMap;

use futures::future::join_all;
use futures::stream;
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};

use super::*;
use crate::snapshot::decide::Wish;
use crate::snapshot::manifest::Act;
use crate::snapshot::operate::operate;

/// When operations are broken; they are counted from 0, reads, lists and deletes among them.
#[derive(Clone, Copy, Debug)]
enum Faults {
    None,
    /// This one fails, once, before or after it took effect.
    Once {
        at: usize,
        after: bool,
    },
    /// The process dies at this one: nothing is answered any more.
    Death {
        at: usize,
        after: bool,
    },
    /// So many of a hundred fail, half of them after they took effect; as many answer late; lists lack what is new.
    Chance(u64),
}

#[derive(Debug)]
struct State {
    calls: usize,
    faults: Faults,
    random: Pcg64Mcg,
    /// When each key was created, in calls: what a late list does not show yet.
    created: BTreeMap<Path, usize>,
}

/// What becomes of an operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Done,
    Late,
    FailsBefore,
    FailsAfter,
}

/// A store that breaks what is asked of it, in front of one that does not, and a reader that looks at the latter after every
/// effect.
#[derive(Debug)]
struct Breaking {
    inner: Arc<dyn ObjectStore>,
    state: Mutex<State>,
    /// A read may give fewer bytes than there are, without an error.
    torn: bool,
    watcher: Option<Arc<Watcher>>,
}

impl fmt::Display for Breaking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("breaking")
    }
}

impl Breaking {
    fn new(inner: &Arc<dyn ObjectStore>, faults: Faults, seed: u64, watcher: Option<Arc<Watcher>>) -> Arc<Self> {
        let state = State { calls: 0, faults, random: Pcg64Mcg::seed_from_u64(seed), created: BTreeMap::new() };
        Arc::new(Self { inner: Arc::clone(inner), state: Mutex::new(state), torn: false, watcher })
    }

    fn torn(inner: &Arc<dyn ObjectStore>, percent: u64, seed: u64) -> Arc<Self> {
        let store = Self::new(inner, Faults::Chance(percent), seed, None);
        Arc::new(Self { torn: true, ..Arc::into_inner(store).unwrap() })
    }

    fn store(self: &Arc<Self>) -> Store {
        Store::over(Arc::clone(self) as Arc<dyn ObjectStore>)
    }

    fn calls(&self) -> usize {
        self.state.lock().unwrap().calls
    }

    fn fate(&self) -> Fate {
        let mut state = self.state.lock().unwrap();
        let call = state.calls;
        state.calls += 1;
        match state.faults {
            Faults::None => Fate::Done,
            Faults::Once { at, after } if call == at => [Fate::FailsBefore, Fate::FailsAfter][usize::from(after)],
            Faults::Once { .. } => Fate::Done,
            Faults::Death { at, after } => match call.cmp(&at) {
                std::cmp::Ordering::Less => Fate::Done,
                std::cmp::Ordering::Equal if after => Fate::FailsAfter,
                _ => Fate::FailsBefore,
            },
            Faults::Chance(percent) => match state.random.next_u64() % 200 {
                roll if roll < percent => Fate::FailsBefore,
                roll if roll < 2 * percent => Fate::FailsAfter,
                roll if roll < 4 * percent => Fate::Late,
                _ => Fate::Done,
            },
        }
    }

    /// Does what fate says around the operation, and lets the watcher look if it took effect.
    async fn broken<T>(&self, operation: impl Future<Output = object_store::Result<T>>) -> object_store::Result<T> {
        let lost = || Err(object_store::Error::Generic { store: "breaking", source: "503 Service Unavailable".into() });
        let fate = self.fate();
        if fate == Fate::FailsBefore {
            return lost();
        }
        if fate == Fate::Late {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let answer = operation.await;
        if let Some(watcher) = &self.watcher {
            watcher.look().await;
        }
        if fate == Fate::FailsAfter { lost() } else { answer }
    }

    /// Whether a list shows a key; one that was created a few calls ago may not be there yet.
    fn shows(&self, key: &Path) -> bool {
        let mut state = self.state.lock().unwrap();
        let lag = if matches!(state.faults, Faults::Chance(_)) { state.random.next_u64() % 12 } else { 0 };
        let calls = state.calls;
        state.created.get(key).is_none_or(|created| created + lag as usize <= calls)
    }
}

impl ObjectStore for Breaking {
    fn put_opts<'a, 'b, 'c>(&'a self, key: &'b Path, payload: PutPayload, opts: PutOptions) -> Answer<'c, PutResult>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            assert!(matches!(opts.mode, PutMode::Create), "every write is create-only");
            let put = async {
                let done = self.inner.put_opts(key, payload, opts).await?;
                let mut state = self.state.lock().unwrap();
                let calls = state.calls;
                state.created.insert(key.clone(), calls);
                Ok(done)
            };
            self.broken(put).await
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
        Box::pin(async move { self.broken(self.inner.put_multipart_opts(key, opts)).await })
    }

    fn get_opts<'a, 'b, 'c>(&'a self, key: &'b Path, options: GetOptions) -> Answer<'c, GetResult>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move {
            let mut found = self.broken(self.inner.get_opts(key, options)).await?;
            let fate = if self.torn { self.fate() } else { Fate::Done };
            if fate == Fate::FailsBefore || fate == Fate::FailsAfter {
                let (meta, range) = (found.meta.clone(), found.range.clone());
                let whole = found.bytes().await?;
                let half = whole.slice(..whole.len() / 2);
                // The connection breaks, or, worse, nothing says that something is missing.
                let broken = object_store::Error::Generic { store: "breaking", source: "connection reset".into() };
                let pieces = match fate {
                    Fate::FailsBefore => vec![Ok(half), Err(broken)],
                    _ => vec![Ok(half)],
                };
                let payload = GetResultPayload::Stream(stream::iter(pieces).boxed());
                found = GetResult {
                    payload,
                    meta,
                    range,
                    attributes: Attributes::default(),
                    extensions: Extensions::default(),
                };
            }
            Ok(found)
        })
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        match self.fate() {
            Fate::FailsBefore | Fate::FailsAfter => {
                let lost = object_store::Error::Generic { store: "breaking", source: "503".into() };
                stream::iter([Err(lost)]).boxed()
            }
            _ => self.inner.delete_stream(keys),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        if matches!(self.fate(), Fate::FailsBefore | Fate::FailsAfter) {
            let lost = object_store::Error::Generic { store: "breaking", source: "503".into() };
            return stream::iter([Err(lost)]).boxed();
        }
        let all = futures::executor::block_on(self.inner.list(prefix).collect::<Vec<_>>());
        let shown: Vec<_> =
            all.into_iter().filter(|meta| meta.as_ref().map_or(true, |meta| self.shows(&meta.location))).collect();
        stream::iter(shown).boxed()
    }

    fn list_with_delimiter<'a, 'b, 'c>(&'a self, prefix: Option<&'b Path>) -> Answer<'c, ListResult>
    where
        'a: 'c,
        'b: 'c,
    {
        Box::pin(async move { self.broken(self.inner.list_with_delimiter(prefix)).await })
    }

    fn copy_opts<'a, 'b, 'd, 'c>(&'a self, from: &'b Path, to: &'d Path, options: CopyOptions) -> Answer<'c, ()>
    where
        'a: 'c,
        'b: 'c,
        'd: 'c,
    {
        Box::pin(async move { self.broken(self.inner.copy_opts(from, to, options)).await })
    }
}

/// A reader that follows all the time: what it is shown is complete, valid, what was trained, and newer than before.
#[derive(Debug)]
struct Watcher {
    store: Store,
    state: tokio::sync::Mutex<(Follower, Version)>,
}

impl Watcher {
    fn over(inner: &Arc<dyn ObjectStore>) -> Arc<Self> {
        let store = Store::over(Arc::clone(inner));
        let follower = Follower::new(store.clone(), "live");
        Arc::new(Self { store, state: tokio::sync::Mutex::new((follower, Version(0))) })
    }

    async fn look(&self) {
        let mut state = self.state.lock().await;
        let (follower, seen) = &mut *state;
        let Some(version) = follower.poll().await.unwrap() else { return };
        assert!(version > *seen, "{version} after {seen}");
        assert_good(&self.store.load(version).await.unwrap());
        *seen = version;
    }

    async fn seen(&self) -> Version {
        self.state.lock().await.1
    }
}

/// A model of which each batch changes a few rows, so that versions are deltas.
fn model(batch: u64) -> Weights {
    let ids: Vec<u64> = (1..=200).map(|i| i * 0x0100_0000_0000_0001).collect();
    let values = (0..200).map(|i| i as f32 * 0.125 + if i % 50 == batch % 50 { batch as f32 } else { 0.0 }).collect();
    let defaults = vec![ids[0], ids[1]];
    Weights::new(ids, values, -3.0, defaults).unwrap()
}

async fn train(publisher: &mut Publisher, batch: u64) -> super::super::Result<Outcome> {
    let weights = model(batch);
    publisher.publish(&weights.clone().into(), facts(batch), &golden(&weights), None).await
}

fn assert_good(snapshot: &Snapshot) {
    assert_eq!(snapshot.weights, model(snapshot.manifest.facts.batch), "version {}", snapshot.manifest.version);
}

/// The job of one process: takes the channel, publishes some batches, cleans up. Stops at the first error.
async fn job(store: &Store) -> super::super::Result<()> {
    let mut publisher = try_open(store).await?;
    for batch in 1..=4 {
        train(&mut publisher, batch).await?;
    }
    let tidy = Settings { keep: 1, grace: Duration::ZERO, ..Settings::default() }.check()?;
    retain(store, &tidy, clock::now().plus(10_000)).await.map(|_| ())
}

async fn calls_of_a_job() -> usize {
    let store = Breaking::new(&memory(), Faults::None, 0, None);
    job(&store.store()).await.unwrap();
    store.calls()
}

/// Every operation of a job, before and after its effect.
async fn every_point() -> Vec<(usize, bool)> {
    let calls = calls_of_a_job().await;
    assert!(calls > 20, "only {calls} operations");
    (0..calls).flat_map(|at| [(at, false), (at, true)]).collect()
}

#[tokio::test]
async fn a_crash_at_any_operation_shows_a_reader_only_whole_versions_that_grow_and_the_next_trainer_goes_on() {
    let points = every_point().await.into_iter().map(|(at, after)| async move {
        let inner = memory();
        let watcher = Watcher::over(&inner);
        let dying = Breaking::new(&inner, Faults::Death { at, after }, 0, Some(Arc::clone(&watcher)));
        assert!(job(&dying.store()).await.is_err(), "the process died at operation {at}");
        watcher.look().await;
        let before = watcher.seen().await;

        let next = Breaking::new(&inner, Faults::None, 0, Some(Arc::clone(&watcher)));
        let store = next.store();
        let mut publisher = open(&store).await;
        for batch in 1..=6 {
            let outcome = train(&mut publisher, batch).await.unwrap();
            assert!(matches!(outcome, Outcome::Published(_) | Outcome::Behind { .. }), "{outcome:?} after {at}");
        }
        let newest = live(&store).await.unwrap();
        assert_eq!(newest.weights, model(6), "after {at}");
        assert!(newest.manifest.version > before);
        assert_eq!(watcher.seen().await, newest.manifest.version);
        for version in store.versions().await.unwrap().into_keys() {
            assert_good(&store.load(version).await.unwrap());
        }
    });
    join_all(points).await;
}

#[tokio::test]
async fn one_failure_or_lost_answer_at_any_operation_stops_nothing_and_publishes_nothing_twice() {
    let points = every_point().await.into_iter().map(|(at, after)| async move {
        let inner = memory();
        let store = Breaking::new(&inner, Faults::Once { at, after }, 0, Some(Watcher::over(&inner))).store();
        job(&store).await.unwrap_or_else(|e| panic!("operation {at}, after its effect: {after}: {e}"));
        let entry = store.latest("live").await.unwrap().unwrap();
        assert_eq!((entry.number, entry.epoch, entry.version), (5, Epoch(1), Some(Version(4))), "operation {at}");
        assert_eq!(live(&store).await.unwrap().weights, model(4));
    });
    join_all(points).await;
}

/// Two trainers, one of which is paused at times, an operator and retention on a store that fails, answers late and lists late.
async fn struggle(seed: u64) {
    let inner = memory();
    let mut random = Pcg64Mcg::seed_from_u64(seed);
    let store = Breaking::new(&inner, Faults::Chance(8), seed ^ 1, None).store();
    // Its lists are not late: `grace` has to be longer than that, and here there is none.
    let cleaner = Breaking::new(&inner, Faults::Chance(8), seed ^ 3, None).store();
    let reader = Breaking::torn(&inner, 8, seed ^ 2).store();
    let mut follower = Follower::new(reader.clone(), "live");
    let mut trainers: Vec<Option<Publisher>> = vec![None, None];
    let tidy = Settings { keep: 3, grace: Duration::ZERO, ..Settings::default() }.check().unwrap();
    for batch in 1..=60 {
        let which = usize::from(random.next_u64() % 8 == 0);
        match &mut trainers[which] {
            None => trainers[which] = try_open(&store).await.ok(),
            Some(trainer) => match train(trainer, batch).await {
                Ok(Outcome::Fenced { .. }) => trainers[which] = None,
                Ok(_) => {}
                Err(error) => assert_eq!(error.remedy(), Remedy::Retry, "seed {seed}: {error}"),
            },
        }
        match random.next_u64() % 16 {
            0 => _ = operate(&store, "live", Wish::Pin(None)).await,
            1 | 2 => _ = operate(&store, "live", Wish::Unpin).await,
            3 => {
                let current = store.latest("live").await.ok().flatten().and_then(|entry| entry.version);
                if let Some(current) = current.filter(|current| current.0 > 1) {
                    _ = operate(&store, "live", Wish::Rollback(Version(current.0 - 1))).await;
                }
            }
            4 => _ = retain(&cleaner, &tidy, clock::now().plus(1)).await,
            _ => {}
        }
        if let Ok(Some(version)) = follower.poll().await
            && let Ok(snapshot) = reader.load(version).await
        {
            assert_good(&snapshot);
        }
    }

    let clean = Store::over(Arc::clone(&inner));
    let last = clean.latest("live").await.unwrap().unwrap();
    let mut before = clean.entry("live", 1).await.unwrap().unwrap();
    for number in 2..=last.number {
        let entry = clean.entry("live", number).await.unwrap().expect("no gap");
        assert!(entry.epoch >= before.epoch, "seed {seed}: entry {number} is of a trainer that was fenced");
        if entry.act == Act::Publish {
            assert!(!before.pinned, "seed {seed}: entry {number} moves a pinned channel");
        }
        if entry.act == Act::Start {
            let kept = (entry.version, entry.pinned) == (before.version, before.pinned);
            assert!(kept, "seed {seed}: entry {number} starts and moves the channel");
        }
        before = entry;
    }
    for version in clean.versions().await.unwrap().into_keys() {
        assert_good(&clean.load(version).await.unwrap_or_else(|e| panic!("seed {seed}, version {version}: {e}")));
    }
    let _ = operate(&clean, "live", Wish::Unpin).await.unwrap();
    let mut trainer = open(&clean).await;
    let outcome = train(&mut trainer, 1000).await.unwrap();
    assert!(matches!(outcome, Outcome::Published(_)), "seed {seed}: {outcome:?}");
    assert_eq!(live(&clean).await.unwrap().weights, model(1000));
}

#[tokio::test]
async fn on_a_store_that_fails_and_lists_late_no_fenced_trainer_publishes_and_no_pinned_channel_moves() {
    let given = std::env::var("TIDEMILL_TEST_SEED").ok().and_then(|seed| seed.parse().ok());
    let first: u64 = given.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seeds {first} to {}", first + 31);
    join_all((first..first + 32).map(struggle)).await;
}
