//! A node: follows a channel on a thread of its own, proves what it finds, and swaps it in.

use std::hash::{BuildHasher, Hasher};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::timeout;

use super::model::Model;
use super::{Error, Settings};
use crate::clock;
use crate::event::Time;
use crate::snapshot::load::{Chain, Objects};
use crate::snapshot::{self, Follower, Remedy, Store, Version, chain};
use crate::telemetry::{self, Stage};

/// A model that follows its channel. What serves goes on whatever the store or a new version does. Dropping it stops its
/// thread; models that were handed out stay.
pub struct Node {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What a node knows about itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Status {
    /// What serves; none as long as nothing was loaded.
    pub version: Option<Version>,
    /// What the channel names.
    pub named: Option<Version>,
    /// When the version that serves was published, by its trainer's clock.
    pub published: Option<Time>,
    /// Place in the order of the last impression in it.
    pub frontier: Option<Time>,
    /// When this node swapped it in.
    pub loaded: Option<Time>,
    /// It came from the cache, and the store has not answered since.
    pub from_cache: bool,
    /// Why the channel cannot be followed, and since when.
    pub store_problem: Option<Problem>,
    /// The version that was refused last.
    pub refused: Option<Refusal>,
    /// How many versions were swapped in and refused.
    pub swaps: u64,
    pub refusals: u64,
}

/// Something that has gone on for a while.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Problem {
    pub since: Time,
    pub reason: String,
}

/// A version that this node does not serve.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Refusal {
    pub version: Version,
    pub at: Time,
    pub reason: String,
}

impl Status {
    /// What an operator should know, in sentences; empty when all is well.
    #[must_use]
    pub fn reasons(&self) -> Vec<String> {
        let mut reasons = Vec::new();
        if self.version.is_none() {
            reasons.push(match (self.named, &self.store_problem) {
                (None, None) => "no model yet: the channel names no version".to_owned(),
                (Some(version), None) => format!("no model yet: version {version} is being loaded or was refused"),
                (_, Some(_)) => "no model yet".to_owned(),
            });
        }
        if let Some(problem) = &self.store_problem {
            reasons.push(format!("the store does not answer since {}: {}", problem.since, problem.reason));
        }
        if let Some(refusal) = self.refused.as_ref().filter(|refusal| Some(refusal.version) == self.named) {
            reasons.push(format!("version {} was refused: {}", refusal.version, refusal.reason));
        }
        reasons
    }
}

struct Shared {
    model: ArcSwapOption<Model>,
    status: Mutex<Status>,
    swapped: Condvar,
    stop: Notify,
}

impl Shared {
    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Node {
    /// Starts to follow the channel and returns at once, also while the store cannot be reached: then it tries for ever.
    /// [`Node::wait`] waits for the first model.
    pub fn open(settings: &Settings) -> Result<Self, Error> {
        settings.check()?;
        let cache = match &settings.cache {
            None => None,
            Some(path) => {
                let cache = Store::create(&path.to_string_lossy())?;
                // Of a cache all is deleted that the version being served does not need.
                if Store::open(&settings.store).is_ok_and(|store| store.is_same_directory(&cache)) {
                    let (value, expected) = (path.display().to_string(), "must be another directory than `store`");
                    return Err(Error::Setting { key: "cache", value, expected });
                }
                Some(cache)
            }
        };
        let start = |source| Error::Start { what: "the thread that loads versions", source };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(start)?;
        let shared = Arc::new(Shared {
            model: ArcSwapOption::empty(),
            status: Mutex::default(),
            swapped: Condvar::new(),
            stop: Notify::new(),
        });
        let mut worker = Worker {
            shared: Arc::clone(&shared),
            settings: settings.clone(),
            cache,
            follower: None,
            keys: Vec::new(),
            wanted: None,
            retired: Vec::new(),
            random: std::hash::RandomState::new().build_hasher().finish(),
        };
        let body = move || {
            runtime.block_on(async {
                let stop = Arc::clone(&worker.shared);
                tokio::select! {
                    () = stop.stop.notified() => {}
                    () = worker.run() => {}
                }
            });
            // A store that hangs must not keep the node from stopping.
            runtime.shutdown_background();
        };
        let thread = thread::Builder::new().name("reload".into()).spawn(body).map_err(start)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The newest version that was proved. Holding it is holding one version; take it once for each request.
    #[must_use]
    pub fn model(&self) -> Option<Arc<Model>> {
        self.shared.model.load_full()
    }

    /// Waits for the first model, at most this long.
    #[must_use]
    pub fn wait(&self, at_most: Duration) -> Option<Arc<Model>> {
        let none = |status: &mut Status| status.version.is_none();
        drop(self.shared.swapped.wait_timeout_while(self.shared.status(), at_most, none));
        self.model()
    }

    #[must_use]
    pub fn status(&self) -> Status {
        self.shared.status().clone()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.stop.notify_one();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("status", &self.status()).finish_non_exhaustive()
    }
}

/// What the thread owns.
struct Worker {
    shared: Arc<Shared>,
    settings: Settings,
    cache: Option<Store>,
    /// None until the store has been opened.
    follower: Option<(Store, Follower)>,
    /// Keys of all objects that the version being served is made of; before there is one, of all that the cache holds.
    keys: Vec<String>,
    /// Named by the channel, neither loaded nor refused yet.
    wanted: Option<Version>,
    /// Models that serve no longer. They are freed here once the last request has let go of them, for to free a large table
    /// takes milliseconds, which no request should wait for.
    retired: Vec<Arc<Model>>,
    random: u64,
}

impl Worker {
    async fn run(&mut self) {
        self.load_cached().await;
        let mut failures = 0;
        loop {
            let outcome = self.round().await;
            telemetry::followed(outcome.is_err());
            match outcome {
                Ok(()) => failures = 0,
                Err(_) => failures += 1,
            }
            self.note(outcome.err());
            self.retired.retain(|model| Arc::strong_count(model) > 1);
            tokio::time::sleep(self.pause(failures)).await;
        }
    }

    /// Asks the channel once, and loads what it names. An error is one of the store, to be tried again.
    async fn round(&mut self) -> Result<(), String> {
        self.follow().await?;
        let Some(version) = self.wanted else { return Ok(()) };
        if self.is_served(version).await? {
            self.shared.status().from_cache = false;
            self.wanted = None;
            return Ok(());
        }
        let Some((store, _)) = &self.follower else { return Ok(()) };
        let began = Instant::now();
        let held = self.shared.model.load_full();
        let loading = load(store, version, held.as_deref(), self.cache.as_ref());
        let loaded = match timeout(self.settings.load_timeout, loading).await {
            Err(_) => return Err(format!("version {version} did not come within {:?}", self.settings.load_timeout)),
            Ok(loaded) => loaded,
        };
        // Before the old model is retired, or this handle would keep it.
        drop(held);
        let loaded = match loaded {
            // A copy of a store may get its objects after the entry that names them.
            Err(Error::Snapshot(error @ snapshot::Error::Missing { .. })) => return Err(chain(&error)),
            Err(Error::Snapshot(error)) if error.remedy() == Remedy::Retry => return Err(chain(&error)),
            loaded => loaded.map_err(|error| chain(&error)),
        };
        self.wanted = None;
        match loaded {
            Err(reason) => {
                self.refuse(version, reason);
                // Its payload may have been copied there.
                self.tidy(&Objects::new()).await;
            }
            Ok(Loaded { model, chain, objects }) => {
                // Deltas come after what was held, of which they share the tables.
                if !chain.from_held {
                    self.keys.clear();
                }
                self.keys.extend(chain.keys());
                self.swap(model, false, began);
                self.tidy(&objects).await;
            }
        }
        Ok(())
    }

    /// Makes the cache hold what the version being served is made of, and these objects of it, which it may not have yet.
    async fn tidy(&self, objects: &Objects) {
        if let Some(cache) = &self.cache
            && let Err(error) = cache.keep_only(objects, &self.keys).await
        {
            tracing::warn!(error = %chain(&error), "the cache could not be brought up to date; it is served all the same");
        }
    }

    /// Finds out what the channel names.
    async fn follow(&mut self) -> Result<(), String> {
        let (store, channel) = (&self.settings.store, &self.settings.channel);
        // As long as there is no entry to look for, only opening tells an empty directory from one that is away. A bucket
        // that is away does not answer, and its connections are worth keeping.
        if self.follower.as_ref().is_none_or(|(store, follower)| store.is_local() && follower.named().is_none()) {
            let store = Store::open(store).map_err(|error| chain(&error))?;
            let pace = self.settings.load_bytes_per_second;
            let store = if pace > 0 { store.paced(pace) } else { store };
            self.follower = Some((store.clone(), Follower::new(store, channel.as_str())));
        }
        let Some((_, follower)) = &mut self.follower else { return Ok(()) };
        let polled = async {
            match follower.poll().await? {
                Some(version) => Ok((Some(version), true)),
                None => Ok((None, follower.still_there().await?)),
            }
        };
        let polled: Result<_, snapshot::Error> = match timeout(self.settings.load_timeout, polled).await {
            Err(_) => return Err(format!("no answer within {:?}", self.settings.load_timeout)),
            Ok(polled) => polled,
        };
        match polled.map_err(|error| chain(&error))? {
            (_, false) => Err(format!(
                "the entry of channel `{channel}` that was there is gone, so the store is away or was replaced; start the node anew to take it as it is"
            )),
            (None, true) => Ok(()),
            (version @ Some(_), true) => {
                self.shared.status().named = version;
                self.wanted = version;
                Ok(())
            }
        }
    }

    /// Whether what serves is this very version, and not one of the same number out of the cache of another store.
    async fn is_served(&self, version: Version) -> Result<bool, String> {
        let model = self.shared.model.load_full();
        let Some((model, (store, _))) = model.filter(|model| model.version() == version).zip(self.follower.as_ref())
        else {
            return Ok(false);
        };
        match store.manifest(version, "the channel").await {
            Ok(manifest) => {
                let ours = model.manifest();
                Ok(manifest.writer == ours.writer && manifest.objects == ours.objects)
            }
            Err(error) if error.remedy() == Remedy::Retry => Err(chain(&error)),
            // Loading says what is wrong with it.
            Err(_) => Ok(false),
        }
    }

    async fn load_cached(&mut self) {
        let Some(cache) = &self.cache else { return };
        let began = Instant::now();
        self.keys = cache.keys().await.unwrap_or_default();
        let versions = match cache.versions().await {
            Ok(versions) => versions,
            Err(error) => {
                tracing::warn!(error = %chain(&error), "the cache cannot be read");
                return;
            }
        };
        // There is one, or two if the node was killed while it took a new one: then the one written last.
        let mut versions: Vec<_> = versions.into_iter().map(|(version, written)| (written, version)).collect();
        versions.sort_unstable();
        for (_, version) in versions.into_iter().rev() {
            match load(cache, version, None, Some(cache)).await {
                Ok(Loaded { model, chain, .. }) => {
                    self.keys = chain.keys().collect();
                    return self.swap(model, true, began);
                }
                Err(error) => {
                    tracing::warn!(version = version.0, error = %chain(&error), "what is in the cache cannot be served");
                }
            }
        }
    }

    fn swap(&mut self, model: Model, from_cache: bool, began: Instant) {
        let (version, manifest) = (model.version(), model.manifest());
        let (published, frontier, rows) = (manifest.created, manifest.facts.frontier_time, model.rows());
        let seconds = began.elapsed().as_secs_f64();
        let loaded = model.loaded();
        let mapped = model.mapped_bytes();
        telemetry::serves(rows, model.bytes() - mapped, mapped);
        let mut status = self.shared.status();
        self.retired.extend(self.shared.model.swap(Some(Arc::new(model))));
        status.version = Some(version);
        status.published = Some(published);
        status.frontier = frontier;
        status.loaded = Some(loaded);
        status.from_cache = from_cache;
        status.swaps += 1;
        drop(status);
        self.shared.swapped.notify_all();
        telemetry::swapped(version.0, published, frontier, seconds);
        if let Some(frontier) = frontier {
            telemetry::reached(Stage::Served, frontier, clock::now());
        }
        tracing::info!(version = version.0, rows, seconds, from_cache, "serving");
    }

    fn refuse(&self, version: Version, reason: String) {
        telemetry::refused(version.0);
        let mut status = self.shared.status();
        let serving = status.version.map_or("nothing".to_owned(), |version| format!("version {version}"));
        tracing::error!(version = version.0, reason, "refused; {serving} goes on serving");
        status.refused = Some(Refusal { version, at: clock::now(), reason });
        status.refusals += 1;
    }

    fn note(&self, problem: Option<String>) {
        let mut status = self.shared.status();
        status.store_problem = problem.map(|reason| {
            let since = match &status.store_problem {
                Some(problem) => problem.since,
                None => {
                    tracing::warn!(reason, "the channel cannot be followed; what serves goes on");
                    clock::now()
                }
            };
            Problem { since, reason }
        });
    }

    /// The time until the next round, a quarter more or less by chance.
    fn pause(&mut self, failures: u32) -> Duration {
        let longer = self.settings.poll.saturating_mul(1 << failures.min(16)).min(self.settings.poll_max);
        let pause = if failures == 0 { self.settings.poll } else { longer };
        let mut hasher = xxhash_rust::xxh3::Xxh3::new();
        hasher.write_u64(self.random);
        self.random = hasher.finish();
        pause.mul_f64(0.75 + (self.random >> 11) as f64 / (1_u64 << 54) as f64)
    }
}

/// A version that was proved.
struct Loaded {
    model: Model,
    chain: Chain,
    /// What was read for it and is not in the cache yet.
    objects: Objects,
}

/// Loads a version: by its deltas if they lead on from the model that is held, else from its full on, which lies in the cache.
async fn load(store: &Store, version: Version, held: Option<&Model>, cache: Option<&Store>) -> Result<Loaded, Error> {
    let mut chain = store.chain(version, held.map(Model::held)).await?;
    if let Some(held) = held.filter(|_| chain.from_held) {
        let (deltas, objects) = store.deltas(&chain, held.layers()).await?;
        match held.with(&deltas, chain.last()) {
            Ok(model) => return Ok(Loaded { model, chain, objects }),
            Err(error) => {
                tracing::warn!(error = %snapshot::chain(&error), "its deltas do not fit what serves; loading all of it");
            }
        }
        chain = store.chain(version, None).await?;
    }
    let (full, mut objects) = store.full(&chain, cache).await?;
    let mut model = Model::new(full)?;
    let (deltas, more) = store.deltas(&chain, model.layers()).await?;
    objects.extend(more);
    if !deltas.is_empty() {
        model = model.with(&deltas, chain.last())?;
    }
    Ok(Loaded { model, chain, objects })
}
