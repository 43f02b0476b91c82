//! The promise that decoding allocates nothing per record once warm, counted by the allocator itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use tidemill::event::{Chunk, Stream};
use tidemill::feature::{CrossSettings, FeatureSettings, Schema};
use tidemill::position::Fingerprint;
use tidemill::source::decode::{Decoder, IdPaths, RecordSettings};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call is handed to the system allocator unchanged; the counter neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
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

fn schema() -> Schema {
    let features: Vec<FeatureSettings> = serde_json::from_str(
        r#"[{"name": "user"}, {"name": "age", "kind": "numeric"},
            {"name": "price", "kind": "numeric", "as": "value", "log": true}, {"name": "tags", "kind": "multi"},
            {"name": "affinity", "kind": "multi"}, {"name": "history", "kind": "sequence", "max_len": 2},
            {"name": "rate"}]"#,
    )
    .unwrap();
    let crosses: Vec<CrossSettings> =
        serde_json::from_str(r#"[{"of": ["user", "age"]}, {"of": ["tags", "affinity", "history"]}]"#).unwrap();
    Schema::new(&features, &crosses).unwrap()
}

fn count(decoder: &mut Decoder, lines: &[String]) -> u64 {
    let mut chunk = Chunk::default();
    let mut decode_all = || {
        chunk.clear();
        for line in lines {
            decoder.decode(line.as_bytes(), 0, Fingerprint::NONE, &mut chunk);
        }
        assert!(chunk.rejects.is_empty(), "{:?}", chunk.rejects);
    };
    decode_all();
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    decode_all();
    ALLOCATIONS.get() - before
}

#[test]
fn a_warm_decoder_allocates_nothing() {
    let lines: Vec<String> = (0..100)
        .map(|i| {
            format!(
                r#"{{"request":"r{i}","ts":"2026-11-23T20:09:{:02}Z","user":{i},"age":{i}.5,"price":{i}e-3,"tags":["a\u00e9\n","b{i}"],
                    "affinity":{{"{i}":2,"x":true}},"history":[1,2,{i}],"rate":0.{i}1,"unknown":{{"deep":[{i},null]}},"k{}":1}}"#,
                i % 60,
                i % 7,
            )
        })
        .collect();
    let settings =
        RecordSettings { id: IdPaths::Many(vec!["request".into(), "user".into()]), ..RecordSettings::default() };
    let mut decoder = Decoder::new(Stream::Impressions, &settings, Some(&schema()), true).unwrap();
    assert_eq!(count(&mut decoder, &lines), 0);
}

#[test]
fn a_warm_decoder_of_slates_allocates_nothing() {
    let lines: Vec<String> = (0..100)
        .map(|i| format!(r#"{{"items":[{{"id":"{i}a","user":1}},{{"id":"{i}b","tags":["q"]}}],"ts":17e8,"age":{i}}}"#))
        .collect();
    let features: Vec<FeatureSettings> = serde_json::from_str(
        r#"[{"name": "user", "from": ".user"}, {"name": "age", "kind": "numeric"},
            {"name": "tags", "from": ".tags", "kind": "multi"}]"#,
    )
    .unwrap();
    let schema = Schema::new(&features, &[]).unwrap();
    let settings =
        RecordSettings { id: IdPaths::One(".id".into()), explode: Some("items".into()), ..RecordSettings::default() };
    let mut decoder = Decoder::new(Stream::Impressions, &settings, Some(&schema), true).unwrap();
    assert_eq!(count(&mut decoder, &lines), 0);
}
