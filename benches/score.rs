//! Candidates a second of a node: one context and 100 candidates, 10 features and 3 crosses, 1M rows, one core.
//!
//! `cargo bench --bench score`; items are candidates. `body` is what a request costs from its JSON to its scores, without
//! HTTP; `values` leaves out the JSON; `slots` is what comes after the values are encoded, and says what the index is worth.

use std::path::Path;

use divan::Bencher;
use divan::counter::ItemsCount;
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use serde_json::json;
use tidemill::event::{Slot, Time};
use tidemill::feature::{Encoder, Schema};
use tidemill::model::tower::Activation;
use tidemill::model::two_tower::{Layout, Side};
use tidemill::serve::{Model, Scorer};
use tidemill::snapshot::manifest::{Build, Kind, MANIFEST_FORMAT};
use tidemill::snapshot::{
    self, Epoch, Facts, Manifest, ModelInfo, Publisher, Snapshot, Store, Towers, Vectors, Version, Weights,
};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const ROWS: usize = 1_000_000;
const CANDIDATES: u64 = 100;
/// Requests that are taken in turn, so that the rows of one are not all in the cache when it comes again.
const REQUESTS: u64 = 256;
const ITEMS: u64 = 200_000;
const USERS: u64 = 300_000;

fn main() {
    divan::main();
}

fn schema() -> Schema {
    let feature = |name: &str, from: &str| json!({"name": name, "from": from});
    let features = json!([
        feature("user", "user.id"), feature("country", "user.country"), feature("device", "device"),
        feature("hour", "hour"), {"name": "age", "from": "user.age", "kind": "numeric"},
        feature("item", "item.id"), feature("category", "item.category"), feature("author", "item.author"),
        {"name": "price", "from": "item.price", "kind": "numeric"},
        {"name": "position", "role": "presentation", "at_serving": 1}
    ]);
    let crosses =
        json!([{"of": ["user", "category"]}, {"of": ["country", "category"]}, {"of": ["device", "category"]}]);
    Schema::new(
        &serde_json::from_value::<Vec<_>>(features).unwrap(),
        &serde_json::from_value::<Vec<_>>(crosses).unwrap(),
    )
    .unwrap()
}

fn category(item: u64) -> u64 {
    item % 300
}

fn snapshot(schema: &Schema) -> Snapshot {
    let mut random = Pcg64Mcg::seed_from_u64(1);
    let default_rows: Vec<u64> = (0..schema.len()).map(|i| schema.default_row(i)).collect();
    let mut ids = default_rows.clone();
    let mut encoder = Encoder::at_serving(schema);
    let of = |name: &str| schema.index_of(name).unwrap();
    let (user, item, author, cat) = (of("user"), of("item"), of("author"), of("category"));
    let mut slots = Vec::new();
    // The rows that requests ask for come from here: users, items, authors and users crossed with categories.
    for i in 0.. {
        if i % 50_000 == 0 {
            ids.sort_unstable();
            ids.dedup();
            if ids.len() >= ROWS {
                break;
            }
        }
        slots.clear();
        let chosen = random.next_u64() % ITEMS;
        encoder.push_u64(user, if i < USERS { i } else { random.next_u64() % USERS }).unwrap();
        encoder.push_u64(item, if i < ITEMS { i } else { chosen }).unwrap();
        encoder.push_u64(author, chosen / 4).unwrap();
        encoder.push_u64(cat, category(chosen)).unwrap();
        encoder.finish(&mut slots);
        ids.extend(slots.iter().map(|slot| slot.row));
    }
    let values = (0..ids.len()).map(|_| (random.next_u64() % 2000) as f32 / 1000.0 - 1.0).collect();
    let manifest = Manifest {
        format: MANIFEST_FORMAT.to_owned(),
        version: Version(1),
        parent: None,
        epoch: Epoch(1),
        writer: String::new(),
        lineage: String::new(),
        created: Time(0),
        kind: Kind::Full,
        delta: None,
        precision: tidemill::snapshot::Precision::F32,
        rounding: 0.0,
        gate: None,
        objects: Vec::new(),
        rows: ids.len() as u64,
        facts: Facts::default(),
        model: ModelInfo {
            kind: "logistic".to_owned(),
            schema: serde_json::from_str(&schema.to_json()).unwrap(),
            schema_hash: schema.hash(),
            ..ModelInfo::default()
        },
        build: Build::this(),
        golden: Vec::new(),
    };
    Snapshot::new(manifest, Weights::new(ids, values, -2.0, default_rows).unwrap())
}

/// The snapshot with towers of which the user's sees the first five features, and the item's the other four.
fn with_towers(schema: &Schema) -> Snapshot {
    let Snapshot { mut manifest, weights, .. } = snapshot(schema);
    let mut random = Pcg64Mcg::seed_from_u64(3);
    let layout = Layout {
        sides: (0..schema.len()).map(|i| (i < 9).then_some(if i < 5 { Side::User } else { Side::Item })).collect(),
        keys: vec![0; schema.len()],
        dim: 16,
        layers: vec![64, 32],
        activation: Activation::Relu,
        layer_norm: false,
        normalize: true,
    };
    let mut number = || (random.next_u64() % 2000) as f32 / 10_000.0 - 0.1;
    let rows = Vectors::exact(16, (0..weights.ids().len() * 16).map(|_| number()).collect());
    let params = (0..layout.pair().len).map(|_| number()).collect();
    let towers = Towers::new(layout, weights.ids().to_vec(), rows, params, weights.default_rows()).unwrap();
    let weights = weights.with_towers(towers);
    (manifest.rows, manifest.model.kind) = (weights.rows() as u64, weights.kind().to_owned());
    Snapshot::new(manifest, weights)
}

/// The snapshot as a node holds it that has a cache.
fn in_a_cache(snapshot: &Snapshot, dir: &Path) -> Snapshot {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
        let (store, cache) = (Store::create(&path("store")).unwrap(), Store::create(&path("cache")).unwrap());
        let plan = snapshot::Settings::default().check().unwrap();
        let model = snapshot.manifest.model.clone();
        let mut publisher = Publisher::open(store.clone(), &plan, "bench", model).await.unwrap();
        publisher.publish(&snapshot.weights.clone().into(), Facts::default(), &[], None).await.unwrap();
        let chain = store.chain(Version(1), None).await.unwrap();
        let (snapshot, _) = store.full(&chain, Some(&cache)).await.unwrap();
        assert!(snapshot.is_mapped());
        snapshot
    })
}

struct Request {
    user: u64,
    items: Vec<u64>,
}

fn requests() -> Vec<Request> {
    let mut random = Pcg64Mcg::seed_from_u64(2);
    (0..REQUESTS)
        .map(|_| Request {
            user: random.next_u64() % USERS,
            items: (0..CANDIDATES).map(|_| random.next_u64() % ITEMS).collect(),
        })
        .collect()
}

fn context(request: &Request) -> String {
    let user = request.user;
    format!(
        r#"{{"user":{{"id":{user},"country":"c{}","age":{}}},"device":"phone","hour":{}}}"#,
        user % 40,
        18 + user % 60,
        user % 24
    )
}

fn candidate(item: u64) -> String {
    format!(
        r#"{{"item":{{"id":{item},"category":{},"author":{},"price":{}.5}}}}"#,
        category(item),
        item / 4,
        item % 400
    )
}

fn body(request: &Request) -> String {
    let candidates: Vec<String> = request.items.iter().map(|item| candidate(*item)).collect();
    format!(r#"{{"context":{},"candidates":[{}]}}"#, context(request), candidates.join(","))
}

/// From the body of a request to its scores.
#[divan::bench]
fn body_to_scores(bencher: Bencher<'_, '_>) {
    let model = Model::new(snapshot(&schema())).unwrap();
    let bodies: Vec<String> = requests().iter().map(body).collect();
    let (mut scorer, mut next) = (Scorer::new(), 0);
    bencher.counter(ItemsCount::new(CANDIDATES)).bench_local(|| {
        next = (next + 1) % bodies.len();
        scorer.score_body(&model, bodies[next].as_bytes(), 1000).unwrap().0[0]
    });
}

/// The same from values that are no JSON.
#[divan::bench]
fn values_to_scores(bencher: Bencher<'_, '_>) {
    score_values(bencher, &Model::new(snapshot(&schema())).unwrap());
}

/// With the full mapped from a file of a cache, as a node has it.
#[divan::bench]
fn values_to_scores_mapped(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap();
    score_values(bencher, &Model::new(in_a_cache(&snapshot(&schema()), dir.path())).unwrap());
}

/// With towers over as many rows, 16 numbers each.
#[divan::bench]
fn values_to_scores_two_towers(bencher: Bencher<'_, '_>) {
    score_values(bencher, &Model::new(with_towers(&schema())).unwrap());
}

fn score_values(bencher: Bencher<'_, '_>, model: &Model) {
    let schema = schema();
    let requests = requests();
    let of = |name: &str| schema.index_of(name).unwrap();
    let (user, country, device, hour, age) = (of("user"), of("country"), of("device"), of("hour"), of("age"));
    let (item, cat, author, price) = (of("item"), of("category"), of("author"), of("price"));
    let (mut scorer, mut next) = (Scorer::new(), 0);
    bencher.counter(ItemsCount::new(CANDIDATES)).bench_local(|| {
        next = (next + 1) % requests.len();
        let request = &requests[next];
        let scores = scorer.score_values::<Box<dyn std::error::Error>>(
            model,
            |context| {
                context.u64(user, request.user)?;
                context.str(country, "c7")?;
                context.str(device, "phone")?;
                context.u64(hour, request.user % 24)?;
                Ok(context.u64(age, request.user % 60)?)
            },
            request.items.len(),
            |i, candidate| {
                let id = request.items[i];
                candidate.u64(item, id)?;
                candidate.u64(cat, category(id))?;
                candidate.u64(author, id / 4)?;
                Ok(candidate.f64(price, (id % 400) as f64)?)
            },
        );
        scores.unwrap()[0]
    });
}

/// Whole examples: those of all requests, each candidate with its context.
fn examples(schema: &Schema) -> Vec<Vec<Slot>> {
    let mut decoder = tidemill::source::decode::request::RequestDecoder::new(schema).unwrap();
    let mut all = Vec::new();
    for request in requests() {
        decoder.body(body(&request).as_bytes(), 1000).unwrap();
        all.extend((0..decoder.overlay().len()).map(|i| decoder.overlay().whole(i)));
    }
    all
}

/// Encoded examples of 13 slots through the columns of a full under their index, as a node has them.
#[divan::bench]
fn slots_by_index(bencher: Bencher<'_, '_>) {
    let schema = schema();
    let (model, examples) = (Model::new(snapshot(&schema)).unwrap(), examples(&schema));
    bencher
        .counter(ItemsCount::new(examples.len()))
        .bench_local(|| examples.iter().map(|slots| model.logit(slots)).sum::<f32>());
}

/// The same through the columns alone, by interpolation.
#[divan::bench]
fn slots_by_interpolation(bencher: Bencher<'_, '_>) {
    let schema = schema();
    let (snapshot, examples) = (snapshot(&schema), examples(&schema));
    bencher
        .counter(ItemsCount::new(examples.len()))
        .bench_local(|| examples.iter().map(|slots| snapshot.logit(slots)).sum::<f32>());
}

/// What a full costs between its load and its swap: the index over its ids is made.
#[divan::bench(sample_count = 10)]
fn model_of_snapshot(bencher: Bencher<'_, '_>) {
    let snapshot = snapshot(&schema());
    let rows = snapshot.weights.ids().len();
    bencher
        .counter(ItemsCount::new(rows))
        .with_inputs(|| snapshot.clone())
        .bench_local_values(|s| Model::new(s).unwrap());
}
