//! The promise that scoring allocates nothing per candidate once warm, counted by the allocator itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use serde_json::json;
use tidemill::feature::Schema;
use tidemill::model::tower::Activation;
use tidemill::model::two_tower::{self, Side};
use tidemill::serve::{Model, Scorer};
use tidemill::snapshot::manifest::{Build, Kind, MANIFEST_FORMAT};
use tidemill::snapshot::{Epoch, Facts, Golden, Manifest, ModelInfo, Snapshot, Towers, Version, Weights};

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

fn model(with_towers: bool) -> Model {
    let features = json!([{"name": "user"}, {"name": "age", "kind": "numeric"}, {"name": "history", "kind": "sequence"},
        {"name": "item", "from": "item.id"}, {"name": "tags", "from": "item.tags", "kind": "multi"}, {"name": "price"}]);
    let crosses = json!([{"of": ["user", "item"]}, {"of": ["history", "tags"]}, {"of": ["user", "age"]}]);
    let schema = Schema::new(
        &serde_json::from_value::<Vec<_>>(features).unwrap(),
        &serde_json::from_value::<Vec<_>>(crosses).unwrap(),
    )
    .unwrap();
    let default_rows: Vec<u64> = (0..schema.len()).map(|i| schema.default_row(i)).collect();
    let mut ids = default_rows.clone();
    ids.sort_unstable();
    let values = (1..=ids.len()).map(|i| i as f32).collect();
    let mut weights = Weights::new(ids.clone(), values, 0.5, default_rows.clone()).unwrap();
    let mut golden = Golden::new(&[], 0.5);
    if with_towers {
        // User, age and history are of the user; item, tags and price of the item; crosses of neither.
        let side = |i| (i < 6).then_some(if i < 3 { Side::User } else { Side::Item });
        let layout = two_tower::Layout {
            sides: (0..schema.len()).map(side).collect(),
            keys: vec![0; schema.len()],
            dim: 16,
            layers: vec![64, 32],
            activation: Activation::Relu,
            layer_norm: true,
            normalize: true,
        };
        let mut seen = default_rows[..6].to_vec();
        seen.sort_unstable();
        let rows = (0..seen.len() * layout.dim).map(|i| (i % 7) as f32 - 3.0).collect();
        let params = (0..layout.pair().len).map(|i| (i % 11) as f32 * 0.01 - 0.05).collect();
        weights = weights.with_towers(
            Towers::new(layout, seen, tidemill::snapshot::Vectors::exact(16, rows), params, &default_rows).unwrap(),
        );
        golden = Golden::new(&[], weights.logit(&[]));
        assert_ne!(golden.logit, 0.5);
    }
    let manifest = Manifest {
        format: MANIFEST_FORMAT.to_owned(),
        version: Version(1),
        parent: None,
        epoch: Epoch(1),
        writer: "w".to_owned(),
        lineage: "main".to_owned(),
        created: tidemill::event::Time(0),
        kind: Kind::Full,
        delta: None,
        precision: tidemill::snapshot::Precision::F32,
        rounding: 0.0,
        gate: None,
        objects: Vec::new(),
        rows: weights.rows() as u64,
        facts: Facts::default(),
        model: ModelInfo {
            kind: weights.kind().to_owned(),
            schema: serde_json::from_str(&schema.to_json()).unwrap(),
            schema_hash: schema.hash(),
            ..ModelInfo::default()
        },
        build: Build::this(),
        golden: vec![golden],
    };
    Model::new(Snapshot::new(manifest, weights)).unwrap()
}

fn body(candidates: usize) -> String {
    let candidate = |i: usize| {
        let tag = format!("caf\u{e9}\n{i}");
        json!({"item": {"id": i, "tags": ["a", tag]}, "price": 1.5 * i as f64, "unknown": {"deep": [i, null]}})
    };
    let candidates: Vec<_> = (0..candidates).map(candidate).collect();
    let ids: Vec<_> = (0..candidates.len()).collect();
    json!({"context": {"user": "u7", "age": 31.5, "history": [1, 2, 3]}, "candidates": candidates, "ids": ids})
        .to_string()
}

/// Allocations of one request that comes after others like it.
fn count(candidates: usize, with_towers: bool) -> u64 {
    let (model, body, mut scorer) = (model(with_towers), body(candidates), Scorer::new());
    let mut run = || scorer.score_body(&model, body.as_bytes(), 1000).unwrap().0.len();
    run();
    let before = ALLOCATIONS.get();
    assert!(before > 0, "the counter counts");
    assert_eq!(run(), candidates);
    ALLOCATIONS.get() - before
}

#[test]
fn a_warm_scorer_allocates_nothing() {
    for with_towers in [false, true] {
        assert_eq!(count(1, with_towers), 0);
        assert_eq!(count(500, with_towers), 0);
    }
}
