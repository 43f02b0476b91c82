//! The promise that a node holds no table twice: what a new full takes of memory while it is loaded and proved, counted by the
//! allocator itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;
use tidemill::event::Slot;
use tidemill::feature::Schema;
use tidemill::model::tower::Activation;
use tidemill::model::two_tower::{self, Side};
use tidemill::serve::{Node, Settings};
use tidemill::snapshot::{
    self, Facts, Golden, ModelInfo, Outcome, Precision, Publisher, Store, Towers, Vectors, Version, Weights,
};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is handed to the system allocator unchanged; the counters neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROWS: u64 = 400_000;
const DIM: usize = 16;

fn schema() -> Schema {
    let features = json!([{"name": "user"}, {"name": "item"}]);
    Schema::new(&serde_json::from_value::<Vec<_>>(features).unwrap(), &[]).unwrap()
}

/// Weights of a version, which have no row in common with those of another.
fn weights(schema: &Schema, version: u64) -> Weights {
    let default_rows: Vec<u64> = (0..schema.len()).map(|i| schema.default_row(i)).collect();
    let mut ids: Vec<u64> = (1..=ROWS).map(|i| (version * ROWS + i).wrapping_mul(0x9e37_79b9_7f4a_7c15)).collect();
    ids.extend(&default_rows);
    ids.sort_unstable();
    let numbers = (0..ids.len()).map(|i| (i % 100) as f32 / 64.0 - version as f32).collect();
    let weights = Weights::new(ids, numbers, 0.5, default_rows.clone()).unwrap();
    let layout = two_tower::Layout {
        sides: vec![Some(Side::User), Some(Side::Item)],
        keys: vec![0; 2],
        dim: DIM,
        layers: vec![8],
        activation: Activation::Relu,
        layer_norm: false,
        normalize: true,
    };
    // A quarter as many.
    let mut seen: Vec<u64> = weights.ids().iter().copied().step_by(4).chain(default_rows.clone()).collect();
    seen.sort_unstable();
    seen.dedup();
    let rows = Vectors::exact(DIM, (0..seen.len() * DIM).map(|i| (i % 17) as f32 / 8.0 - 1.0).collect());
    let params = (0..layout.pair().len).map(|i| (i % 11) as f32 * 0.01 - 0.05).collect();
    weights.with_towers(Towers::new(layout, seen, rows, params, &default_rows).unwrap())
}

/// A store whose channel names its first version, though a second one, also a full, is there.
struct Shop {
    dir: tempfile::TempDir,
    later: Vec<PathBuf>,
    /// Bytes of the payload of the second.
    table: usize,
}

impl Shop {
    fn new(precision: Precision) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let schema = schema();
        let model = ModelInfo {
            kind: "two_tower".to_owned(),
            schema: serde_json::from_str(&schema.to_json()).unwrap(),
            schema_hash: schema.hash(),
            ..ModelInfo::default()
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let entries = dir.path().join("store/channels/live");
        let (mut first, mut table) = (Vec::new(), 0);
        for version in 1..=2 {
            let weights = weights(&schema, version).rounded(precision).unwrap();
            let slots: Vec<Slot> =
                (0..2).map(|f| Slot { row: weights.ids()[9], value: 1.0, feature: f, flags: 0 }).collect();
            let golden = [Golden::new(&slots, weights.logit(&slots))];
            let facts = Facts { batch: version, ..Facts::default() };
            let settings = snapshot::Settings { precision, ..snapshot::Settings::default() };
            runtime.block_on(async {
                let store = Store::create(dir.path().join("store").to_str().unwrap()).unwrap();
                // A publisher of its own, so that it is a full.
                let plan = settings.check().unwrap();
                let publisher = Publisher::open(store.clone(), &plan, "test", model.clone());
                let published = publisher.await.unwrap().publish(&weights.into(), facts, &golden, None).await;
                assert_eq!(published.unwrap(), Outcome::Published(Version(version)));
                table = store.manifest(Version(version), "the test").await.unwrap().objects[0].length as usize;
            });
            if version == 1 {
                first = files(&entries);
            }
        }
        let later: Vec<PathBuf> = files(&entries).into_iter().filter(|path| !first.contains(path)).collect();
        later.iter().for_each(|path| std::fs::rename(path, dir.path().join(path.file_name().unwrap())).unwrap());
        Self { dir, later, table }
    }

    fn name_the_second(&self) {
        for path in &self.later {
            std::fs::rename(self.dir.path().join(path.file_name().unwrap()), path).unwrap();
        }
    }
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// What memory grows by, at most, while a node takes its first version and while it takes the next, in shares of its payload; and
/// what it has of the latter once it serves.
fn growth(precision: Precision, with_cache: bool) -> ([f64; 2], f64) {
    let shop = Shop::new(precision);
    let path = |name: &str| shop.dir.path().join(name);
    let settings = Settings {
        store: path("store").to_str().unwrap().to_owned(),
        cache: with_cache.then(|| path("cache")),
        poll: Duration::from_millis(20),
        ..Settings::default()
    };
    let begin = || {
        let live = LIVE.load(Ordering::SeqCst);
        MOST.store(live, Ordering::SeqCst);
        live
    };
    let share = |bytes: usize| bytes as f64 / shop.table as f64;
    let before = begin();
    let node = Node::open(&settings).unwrap();
    assert_eq!(node.wait(Duration::from_secs(60)).unwrap().version(), Version(1));
    let first = share(MOST.load(Ordering::SeqCst) - before);
    std::thread::sleep(Duration::from_millis(200)); // what was read for the cache is let go of
    let held = begin();
    shop.name_the_second();
    let began = std::time::Instant::now();
    while node.status().version != Some(Version(2)) {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", node.status());
        std::thread::sleep(Duration::from_millis(5));
    }
    let second = share(MOST.load(Ordering::SeqCst) - held);
    let model = node.model().unwrap();
    let in_memory = model.bytes() - model.mapped_bytes();
    println!("{precision:?}, cache {with_cache}: a payload of {} bytes, {first:.3}, {second:.3}", shop.table);
    ([first, second], share(in_memory))
}

// One test, since the allocator counts for all of them.
#[test]
fn a_full_is_never_held_in_memory_with_a_cache_or_without() {
    for precision in [Precision::F32, Precision::F16, Precision::Int8] {
        for with_cache in [true, false] {
            let (grown, held) = growth(precision, with_cache);
            let of = format!("{precision:?}, cache {with_cache}");
            assert!(grown.iter().all(|share| *share < 0.2), "{of}: memory grew by {grown:?} of a full");
            assert!(held < 0.1, "{of}: {held} of a full is in memory");
        }
    }
}
