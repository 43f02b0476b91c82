//! The promise that reading Parquet allocates by the batch of rows and not by the row, counted by the allocator itself.

#[path = "common/columns.rs"]
mod columns;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tidemill::event::Stream;
use tidemill::feature::{FeatureSettings, Schema};
use tidemill::position::NextOffset;
use tidemill::source::decode::{Decoder, RecordSettings};
use tidemill::source::{Arrival, Decode, Mode, NewDecoder, Sources, Spec};

/// By all threads: the reader's and the decoder's are what this is about.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

// SAFETY: every call is handed to the system allocator unchanged; the counter neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations(path: &Path, rows: usize) -> u64 {
    let features = r#"[{"name": "user", "from": "user.id"}, {"name": "age", "from": "user.age", "kind": "numeric"}, {"name": "item"},
        {"name": "tags", "kind": "multi"}, {"name": "history", "kind": "sequence"}]"#;
    let features: Vec<FeatureSettings> = serde_json::from_str(features).unwrap();
    let schema = Schema::new(&features, &[]).unwrap();
    let decoder: NewDecoder = Arc::new(move || {
        Box::new(Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), true).unwrap())
            as Box<dyn Decode>
    });
    let (stream, mode, from) = (Stream::Impressions, Mode::Bounded, NextOffset::default());
    let spec = Spec { path: path.into(), object: None, stream, mode, from, decoder, max_record: 1 << 20, queue: 4 };
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    let (_sources, mut partitions, recycler) = Sources::open(vec![spec], 1).unwrap();
    let mut read = 0;
    loop {
        match partitions[0].next_timeout(Duration::from_secs(10)).unwrap() {
            Arrival::Records(chunk) => {
                assert!(chunk.rejects.is_empty());
                read += chunk.records.len();
                recycler.give(chunk);
            }
            Arrival::Ended { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(read, rows);
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

#[test]
fn reading_rows_allocates_by_the_batch() {
    let dir = tempfile::tempdir().unwrap();
    let record = |i: usize| {
        json!({
            "id": format!("impression-{i}"), "ts": 1_700_000_000_000_u64 + i as u64, "user": {"id": i % 97, "age": i % 80},
            "item": format!("item-{}", i % 1009), "tags": ["a", "b", "c"], "history": [1, 2, i % 7],
        })
    };
    let count = |rows: usize| {
        let path = dir.path().join(format!("{rows}.parquet"));
        let records: Vec<Value> = (0..rows).map(record).collect();
        // Pages as large as they are by default: each costs some allocations.
        columns::write(&path, &records, &columns::Layout { page: 20_000, ..columns::Layout::default() });
        allocations(&path, rows)
    };
    let (few, many) = (count(20_000), count(80_000));
    let each = (many - few) as f64 / 60_000.0;
    println!("{few} allocations for 20000 rows, {many} for 80000: {each:.4} for each more");
    // Some hundred for a batch of 2048 rows and for a page.
    assert!(each < 0.2, "{each} allocations for each row");
}
