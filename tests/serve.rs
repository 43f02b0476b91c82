//! What a serving node promises, over real HTTP to the real command.

mod common;
#[path = "common/node.rs"]
mod node;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read as _;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Job, TIDEMILL, generate};
use node::{Client, Serving};
use serde_json::{Value, json};
use tempfile::TempDir;
use tidemill::event::{Chunk, Stream, Time};
use tidemill::feature::Schema;
use tidemill::feature::schema::ENCODING;
use tidemill::position::Fingerprint;
use tidemill::serve::{Node, Scorer, Settings};
use tidemill::snapshot::manifest::Document as _;
use tidemill::snapshot::{self, Facts, Manifest, ModelInfo, Outcome, Publisher, Snapshot, Store, Version, Weights};
use tidemill::source::decode::{Decoder, RecordSettings};

// -------------------------------------------------------------------------------------------------------- what is there

/// A small trained model and the records it came from, made once.
struct Trained {
    input: TempDir,
    job: Job,
}

fn trained() -> &'static Trained {
    static TRAINED: OnceLock<Trained> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let input = generate(&["--impressions", "3000"]);
        let job = Job::over(&input.path().join("in"));
        job.train(&["--until-end"]);
        Trained { input, job }
    })
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn trained_snapshot() -> Snapshot {
    let store = Store::open(trained().job.path("snapshots").to_str().unwrap()).unwrap();
    block_on(store.load_latest("live")).unwrap().unwrap()
}

fn records() -> Vec<Value> {
    let folder = trained().input.path().join("in");
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("impressions"));
    files.sort();
    let text = std::fs::read_to_string(&files[0]).unwrap();
    let records: Vec<Value> = text.lines().take(200).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(records.len(), 200);
    records
}

/// A record as a request has it: what is of the item in the candidate, the rest in the context.
fn split(record: &Value) -> (Value, Value) {
    let (mut context, mut candidate) = (record.as_object().unwrap().clone(), serde_json::Map::new());
    for key in ["item", "tags", "position"] {
        if let Some(value) = context.remove(key) {
            candidate.insert(key.to_owned(), value);
        }
    }
    (context.into(), candidate.into())
}

/// The logit of a record by another way than serving: the decoder of the log, and the sorted columns of the snapshot.
fn logit_of(snapshot: &Snapshot, context: &Value, candidate: &Value) -> f32 {
    let schema = Schema::from_json(&snapshot.manifest.model.schema.to_string()).unwrap();
    let mut record = context.as_object().unwrap().clone();
    record.extend(candidate.as_object().unwrap().clone());
    record.extend([("id".to_owned(), json!("x")), ("ts".to_owned(), json!(1))]);
    let mut decoder =
        Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), false).unwrap().at_serving();
    let mut chunk = Chunk::default();
    decoder.decode(Value::from(record).to_string().as_bytes(), 0, Fingerprint::NONE, &mut chunk);
    assert!(chunk.rejects.is_empty(), "{:?}", chunk.rejects);
    snapshot.logit(chunk.slots_of(&chunk.records[0]))
}

/// A store with versions that the test publishes: the trained weights, each time times another factor.
struct Shop {
    dir: TempDir,
    base: Snapshot,
    publisher: Option<Publisher>,
    published: u64,
}

impl Shop {
    fn new() -> Self {
        let mut shop =
            Self { dir: tempfile::tempdir().unwrap(), base: trained_snapshot(), publisher: None, published: 0 };
        shop.open(shop.base.manifest.model.clone());
        shop
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    fn open(&mut self, model: ModelInfo) {
        let store = Store::create(self.path().to_str().unwrap()).unwrap();
        let plan = snapshot::Settings::default().check().unwrap();
        self.publisher = Some(block_on(Publisher::open(store, &plan, "test", model)).unwrap());
    }

    fn publish(&mut self) -> Version {
        let factor = 1.0 + (self.published + 1) as f32 / 64.0;
        self.publish_rows(|_, w| Some(w * factor))
    }

    /// Of the trained rows every fortieth has another weight, and of those one is gone; each time others.
    fn publish_a_few(&mut self) -> Version {
        let number = self.published as usize + 1;
        self.publish_rows(|at, w| match at % 40 == number % 40 {
            true => (at / 40 != number).then_some(w + number as f32 / 8.0),
            false => Some(w),
        })
    }

    fn publish_rows(&mut self, row: impl Fn(usize, f32) -> Option<f32>) -> Version {
        self.published += 1;
        let base = &self.base.weights;
        let weights = base.weights();
        let rows = base.ids().iter().zip(&*weights).enumerate();
        let rows = rows.filter_map(|(at, (id, w))| Some((*id, row(at, *w)?)));
        let (ids, values) = rows.unzip();
        let weights = Weights::new(ids, values, base.intercept(), base.default_rows().to_vec()).unwrap();
        let golden: Vec<_> = self.base.manifest.golden.iter().map(|g| g.slots()).collect();
        let golden: Vec<_> = golden.iter().map(|s| snapshot::Golden::new(s, weights.logit(s))).collect();
        assert!(!golden.is_empty());
        let facts = Facts { batch: self.published, frontier_time: Some(Time(1_767_225_600_000)), ..Facts::default() };
        let published =
            block_on(self.publisher.as_mut().unwrap().publish(&weights.into(), facts, &golden, None)).unwrap();
        let Outcome::Published(version) = published else { panic!("{published:?}") };
        version
    }

    /// Puts a version with new weights into the store by hand, and names it: changed by `manifest` before it is sealed, and
    /// by `bytes` (payload, sealed manifest) after.
    fn put(&mut self, manifest: impl FnOnce(&mut Manifest), bytes: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>)) -> Version {
        let store = Store::open(self.path().to_str().unwrap()).unwrap();
        let last = block_on(store.latest("live")).unwrap().unwrap();
        let version = Version(block_on(store.versions()).unwrap().keys().last().map_or(0, |v| v.0) + 1);
        self.published += 1;
        let base = &self.base.weights;
        let intercept = base.intercept() + self.published as f32;
        let ids = base.ids().to_vec();
        let weights = Weights::new(ids, base.weights().to_vec(), intercept, base.default_rows().to_vec()).unwrap();
        let payload = weights.to_arrays().encode(snapshot::manifest::PAYLOAD_FORMAT).unwrap();
        let key = snapshot::store::object_key(payload.digest);
        let mut made = self.base.manifest.clone();
        made.version = version;
        (made.kind, made.delta) = (snapshot::manifest::Kind::Full, None);
        made.objects[0] =
            snapshot::manifest::ObjectRef { name: key.clone(), length: payload.length, digest: payload.digest };
        for golden in &mut made.golden {
            golden.logit = weights.logit(&golden.slots());
        }
        manifest(&mut made);
        let (mut payload, mut sealed) = (payload.to_vec(), made.to_bytes().unwrap());
        bytes(&mut payload, &mut sealed);
        std::fs::write(self.path().join(key), payload).unwrap();
        std::fs::write(self.path().join(snapshot::store::manifest_key(version)), sealed).unwrap();
        // In the name of the publisher, so that it is not fenced.
        let writer = snapshot::decide::Writer { channel: last.channel, epoch: last.epoch, name: last.writer };
        let entry = snapshot::decide::next_entry(last.number, &writer, Some(version), last.created);
        let at = self.path().join(snapshot::store::entry_key("live", entry.number));
        std::fs::write(self.path().join("new"), entry.to_bytes().unwrap()).unwrap();
        std::fs::rename(self.path().join("new"), at).unwrap();
        version
    }
}

// ------------------------------------------------------------------------------------------------------------ the node

fn logits(answer: &Value) -> Vec<f32> {
    answer["scores"].as_array().unwrap().iter().map(|score| score["logit"].as_f64().unwrap() as f32).collect()
}

// ------------------------------------------------------------------------------------------------------------ promises

#[test]
fn scores_equal_those_of_tidemill_score_exactly() {
    let records = records();
    let trained = trained();
    let input = trained.job.path("to-score.jsonl");
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    std::fs::write(&input, lines).unwrap();
    let output = Command::new(TIDEMILL)
        .args(["score", "--store"])
        .arg(trained.job.path("snapshots"))
        .arg(&input)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected = String::from_utf8(output.stdout).unwrap();
    let expected: Vec<Vec<&str>> = expected.lines().skip(1).map(|line| line.split(',').collect()).collect();
    assert_eq!(expected.len(), records.len());

    let serving = Serving::start(&trained.job.path("snapshots"), &[]);
    serving.ready_when("a model", |status, _| status == 200);
    let mut client = serving.connect();
    let mut different = BTreeSet::new();
    for (record, expected) in records.iter().zip(&expected) {
        // As a record and nothing over it, as an item over the rest, and as a record over another one.
        let (context, candidate) = split(record);
        let body = json!({"context": context, "candidates": [candidate, records[0], record]});
        let (status, text) = client.request("POST", "/v1/score", &body.to_string());
        assert_eq!(status, 200, "{text}");
        let answer: Value = serde_json::from_str(&text).unwrap();
        for i in [0, 2] {
            let score = &answer["scores"][i];
            assert_eq!(score["logit"].as_f64().unwrap() as f32, expected[1].parse::<f32>().unwrap(), "{record}");
            assert_eq!(score["prediction"].as_f64().unwrap(), expected[2].parse::<f64>().unwrap(), "{record}");
        }
        different.insert(expected[1]);
    }
    assert!(different.len() > 100, "only {} different scores", different.len());
    let (status, model) = serving.get("/v1/model");
    assert_eq!((status, &model["version"]), (200, &json!(trained_snapshot().manifest.version)));
    assert_eq!(model["schema_hash"], json!(trained_snapshot().manifest.model.schema_hash));
    assert!(model["age_seconds"].as_f64().unwrap() >= 0.0 && model["frontier"].is_string(), "{model}");
}

/// The minute: so many versions, one every second, under requests at a fixed schedule over so many connections.
const RELOADS: u32 = 60;
const EVERY: Duration = Duration::from_secs(1);
const GAP: Duration = Duration::from_millis(5);
const CONNECTIONS: usize = 4;

#[test]
fn through_a_minute_of_load_and_reloads_no_request_fails_memory_does_not_grow_and_every_answer_is_of_one_version() {
    let mut shop = Shop::new();
    let first = shop.publish();
    let cache = shop.dir.path().join("cache");
    let serving = Serving::start(&shop.path(), &[&format!("cache=\"{}\"", cache.display())]);
    serving.serves(first);
    let records = records();
    let requests: Vec<(Value, Vec<Value>)> = (0..20)
        .map(|i| (split(&records[i]).0, records[20 + i * 5..30 + i * 5].iter().map(|r| split(r).1).collect()))
        .collect();
    let bodies: Vec<String> =
        requests.iter().map(|(c, k)| json!({"context": c, "candidates": k}).to_string()).collect();

    // Request n is due at n * GAP, whatever became of those before it; n counts over all connections.
    let (next, end, newest) = (AtomicU64::new(0), AtomicU64::new(u64::MAX), AtomicU64::new(0));
    let began = Instant::now();
    let sleep_until = |due: Instant| std::thread::sleep(due.saturating_duration_since(Instant::now()));
    let send = |mut client: Client| {
        let mut answers = Vec::new();
        loop {
            let n = next.fetch_add(1, Ordering::SeqCst);
            sleep_until(began + GAP * n as u32);
            if n >= end.load(Ordering::SeqCst) {
                return answers;
            }
            let which = n as usize % bodies.len();
            let before = newest.load(Ordering::SeqCst);
            let (status, text) = client.request("POST", "/v1/score", &bodies[which]);
            assert_eq!(status, 200, "request {n} failed: {text}");
            let answer: Value = serde_json::from_str(&text).unwrap();
            let version = answer["version"].as_u64().unwrap();
            assert!(version >= before, "request {n} was answered by version {version}, after an answer by {before}");
            newest.fetch_max(version, Ordering::SeqCst);
            answers.push((which, version, logits(&answer)));
        }
    };
    let (mut published, mut memory) = (BTreeSet::from([first.0]), Vec::new());
    let answers: Vec<_> = std::thread::scope(|scope| {
        let senders: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(|| send(serving.connect()))).collect();
        for second in 1..=RELOADS {
            sleep_until(began + EVERY * second);
            // Fulls, and deltas between them.
            let version = if second % 6 == 0 { shop.publish() } else { shop.publish_a_few() };
            serving.serves(version);
            published.insert(version.0);
            memory.push(serving.memory());
        }
        std::thread::sleep(Duration::from_millis(200)); // some answers by the last one
        end.store((began.elapsed().as_nanos() / GAP.as_nanos()) as u64 + 1, Ordering::SeqCst);
        senders.into_iter().flat_map(|sender| sender.join().unwrap()).collect()
    });

    assert_eq!(answers.len() as u64, end.load(Ordering::SeqCst), "every request that was due was sent, and answered");
    assert!(answers.len() as u32 >= RELOADS * 200, "only {} requests", answers.len());
    let (early, late) = memory.split_at(memory.len() / 2);
    for (which, of) in ["its own", "with mapped files"].into_iter().enumerate() {
        let most = |part: &[[f64; 2]]| part.iter().map(|m| m[which]).fold(0.0, f64::max);
        let (before, after) = (most(early), most(late));
        println!("memory in MiB, {of}: at most {before:.1}, then {after:.1}");
        assert!(before > 0.0 && after < 1.2 * before + 4.0, "memory, {of}, went from {before} to {after} MiB");
    }
    let kept = std::fs::read_dir(cache.join("objects")).unwrap().count();
    assert!(kept <= 7, "the cache holds {kept} payloads, of a full and at most five deltas, and of one that comes");
    let answered: BTreeSet<u64> = answers.iter().map(|(_, version, _)| *version).collect();
    assert_eq!(answered, published, "every version answered");
    let store = Store::open(shop.path().to_str().unwrap()).unwrap();
    let (mut snapshots, mut expected) = (BTreeMap::new(), BTreeMap::new());
    for (which, version, found) in &answers {
        let expected = expected.entry((version, which)).or_insert_with(|| {
            let load = || block_on(store.load(Version(*version))).unwrap();
            let snapshot = snapshots.entry(version).or_insert_with(load);
            let (context, candidates) = &requests[*which];
            candidates.iter().map(|candidate| logit_of(snapshot, context, candidate)).collect::<Vec<f32>>()
        });
        assert_eq!(found, expected, "version {version}");
    }
    let ok = serving.metric("tidemill_serve_requests_total{outcome=\"ok\"}");
    assert_eq!(ok as usize, answers.len());
    assert_eq!(serving.metric("tidemill_serve_requests_in_flight"), 0.0);
    assert_eq!(serving.metric("tidemill_serve_swaps_total") as u32, 1 + RELOADS);
    assert_eq!(serving.metric("tidemill_serve_version"), *published.last().unwrap() as f64);
}

#[test]
fn a_bad_version_is_refused_with_its_reason_and_the_old_one_serves() {
    let mut shop = Shop::new();
    let good = shop.publish();
    let serving = Serving::start(&shop.path(), &[]);
    serving.serves(good);
    let (context, candidate) = split(&records()[3]);
    let body = json!({"context": context, "candidates": [candidate]}).to_string();
    let expected = logits(&serving.score(&body).1);

    type Bad = Box<dyn Fn(&mut Shop) -> Version>;
    let nothing = |_: &mut Manifest| ();
    let as_is = |_: &mut Vec<u8>, _: &mut Vec<u8>| ();
    let bad: Vec<(&str, Bad)> = vec![
        ("cut short", Box::new(move |s| s.put(nothing, |payload, _| payload.truncate(payload.len() / 2)))),
        (
            "at least one byte differs",
            Box::new(move |s| {
                s.put(nothing, |payload, _| {
                    let at = payload.len() - 5;
                    payload[at] ^= 1;
                })
            }),
        ),
        ("does not end with its check", Box::new(move |s| s.put(nothing, |_, manifest| manifest.truncate(100)))),
        ("at least one byte differs", Box::new(move |s| s.put(nothing, |_, manifest| manifest[40] ^= 1))),
        ("hash", Box::new(move |s| s.put(|m| m.model.schema_hash = "0123456789abcdef".to_owned(), as_is))),
        (
            "schema cannot be used",
            Box::new(move |s| s.put(|m| m.model.schema["encoding"] = (ENCODING + 1).into(), as_is)),
        ),
        (
            "default rows are not those of its schema",
            Box::new(move |s| {
                s.put(
                    |m| {
                        m.model.schema["features"][0]["name"] = "another".into();
                        m.model.schema["crosses"] = json!([]);
                        let schema = Schema::from_json(&m.model.schema.to_string()).unwrap();
                        m.model.schema_hash = schema.hash();
                    },
                    as_is,
                )
            }),
        ),
        ("golden vector 0 gives a logit of", Box::new(move |s| s.put(|m| m.golden[0].logit += 0.5, as_is))),
        ("two_tower", Box::new(move |s| s.put(|m| m.model.kind = "two_tower".to_owned(), as_is))),
    ];
    for (n, (reason, put)) in bad.iter().enumerate() {
        let version = put(&mut shop);
        let ready = serving.ready_when(reason, |_, ready| ready["refused"]["version"] == version.0);
        let said = ready["refused"]["reason"].as_str().unwrap();
        assert!(said.contains(reason), "version {version} was refused because `{said}`, expected `{reason}`");
        assert_eq!((&ready["ready"], &ready["version"]), (&json!(true), &json!(good)));
        assert!(ready["reasons"][0].as_str().unwrap().contains("was refused"), "{ready}");
        assert_eq!(serving.metric("tidemill_serve_refused_total") as usize, n + 1);
        assert_eq!(serving.metric("tidemill_serve_refused_version") as u64, version.0);
        let (status, answer) = serving.score(&body);
        assert_eq!((status, &answer["version"], logits(&answer)), (200, &json!(good), expected.clone()));
    }
    // The next good one is taken as ever.
    let next = shop.publish();
    let ready = serving.serves(next);
    assert_eq!(ready["reasons"], json!([]));
    assert_ne!(logits(&serving.score(&body).1), expected);
}

#[test]
fn while_the_store_is_away_serving_goes_on_and_then_catches_up() {
    let mut shop = Shop::new();
    let first = shop.publish();
    let cache = shop.dir.path().join("cache");
    let cached = format!("cache=\"{}\"", cache.display());
    let serving = Serving::start(&shop.path(), &[&cached]);
    serving.serves(first);
    let body = r#"{"context":{},"candidates":[{}]}"#;
    let before = serving.score(body);
    let away = shop.dir.path().join("away");
    let wait_for_the_copy = |version: Version| {
        let began = Instant::now();
        let files = |folder: &str| std::fs::read_dir(cache.join(folder)).unwrap().count();
        let whole = || {
            let copy = block_on(Store::open(cache.to_str().unwrap()).unwrap().load(version)).ok()?;
            let chain = 1 + copy.manifest.delta.map_or(0, |link| link.number as usize);
            Some((files("manifests"), files("objects")) == (chain, chain))
        };
        while whole() != Some(true) {
            assert!(began.elapsed() < Duration::from_secs(30), "version {version} was not copied");
        }
    };
    wait_for_the_copy(first);

    std::fs::rename(shop.path(), &away).unwrap();
    let ready = serving.ready_when("the store to be missed", |_, ready| ready["store_problem"].is_object());
    assert_eq!(ready["ready"], json!(true));
    assert!(ready["reasons"][0].as_str().unwrap().contains("does not answer since"), "{ready}");
    assert_eq!(serving.metric("tidemill_serve_store_away"), 1.0);
    let frontier = serving.metric("tidemill_serve_frontier_timestamp_seconds");
    assert_eq!(serving.metric("tidemill_freshness_timestamp_seconds{stage=\"served\"}"), frontier);
    assert_eq!(serving.score(body), before);

    // Another node starts meanwhile: from its copy.
    drop(serving);
    let serving = Serving::start(&shop.path(), &[&cached]);
    let ready = serving.serves(first);
    assert_eq!(ready["from_cache"], json!(true));
    assert_eq!(serving.score(body), before);

    std::fs::rename(&away, shop.path()).unwrap();
    let ready = serving.ready_when("the store", |_, ready| ready["from_cache"] == false);
    assert_eq!(ready["version"], json!(first));
    let next = shop.publish();
    let ready = serving.serves(next);
    assert_eq!((&ready["reasons"], &ready["from_cache"]), (&json!([]), &json!(false)));
    wait_for_the_copy(next);

    // What is in the cache is trusted no more than what is in the store.
    drop(serving);
    std::fs::rename(shop.path(), &away).unwrap();
    for file in std::fs::read_dir(cache.join("objects")).unwrap() {
        let path = file.unwrap().path();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[999] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let serving = Serving::start(&shop.path(), &[&cached]);
    let ready = serving.ready_when("the store to be missed", |_, ready| ready["store_problem"].is_object());
    assert_eq!((&ready["ready"], &ready["version"]), (&json!(false), &Value::Null));
    assert_eq!(serving.score(body).0, 503);
}

#[test]
fn a_node_follows_deltas_and_takes_a_full_where_they_do_not_lead_on_from_what_it_holds() {
    let mut shop = Shop::new();
    let first = shop.publish_a_few();
    let cache = shop.dir.path().join("cache");
    let cached = format!("cache=\"{}\"", cache.display());
    let mut serving = Serving::start(&shop.path(), &[&cached]);
    serving.serves(first);
    let records = records();
    let store = Store::open(shop.path().to_str().unwrap()).unwrap();
    let (context, _) = split(&records[0]);
    let candidates: Vec<Value> = records[..200].iter().map(|record| split(record).1).collect();
    let body = json!({"context": context, "candidates": candidates}).to_string();
    let equals_the_store = |serving: &Serving, version: Version, deltas: u32| {
        serving.serves(version);
        let snapshot = block_on(store.load(version)).unwrap();
        assert_eq!(snapshot.manifest.delta.as_ref().map_or(0, |link| link.number), deltas);
        let (status, answer) = serving.score(&body);
        assert_eq!((status, &answer["version"]), (200, &json!(version)), "{answer}");
        let expected: Vec<f32> = candidates.iter().map(|c| logit_of(&snapshot, &context, c)).collect();
        assert_eq!(logits(&answer), expected, "version {version}");
        let (_, model) = serving.get("/v1/model");
        assert_eq!((&model["deltas"], &model["rows"]), (&json!(deltas), &json!(snapshot.manifest.rows)));
    };
    for deltas in 1..=5 {
        let version = shop.publish_a_few();
        equals_the_store(&serving, version, deltas);
    }

    // It was away for the sixth, and starts from its copy of the fifth.
    until("the copy", || cache.join(snapshot::store::manifest_key(Version(6))).is_file());
    drop(serving);
    shop.publish_a_few();
    let away = shop.dir.path().join("away");
    std::fs::rename(shop.path(), &away).unwrap();
    serving = Serving::start(&shop.path(), &[&cached]);
    assert_eq!(serving.serves(Version(6))["from_cache"], json!(true));
    std::fs::rename(&away, shop.path()).unwrap();
    equals_the_store(&serving, Version(7), 6);
    let seventh = shop.publish_a_few();
    equals_the_store(&serving, seventh, 7);

    // A trainer that starts anew begins another chain.
    shop.open(shop.base.manifest.model.clone());
    let full = shop.publish_a_few();
    equals_the_store(&serving, full, 0);
    let (skipped, last) = (shop.publish_a_few(), shop.publish_a_few());
    equals_the_store(&serving, last, 2);
    assert!(skipped < last);
}

/// A node in this process, with a cache, that asks often.
fn node_with(shop: &Shop, cache: &Path) -> Node {
    let store = shop.path().to_str().unwrap().to_owned();
    let (poll, poll_max) = (Duration::from_millis(10), Duration::from_millis(50));
    let settings = Settings { store, cache: Some(cache.to_owned()), poll, poll_max, ..Settings::default() };
    Node::open(&settings).unwrap()
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(30), "waited for {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn objects(cache: &Path) -> BTreeSet<PathBuf> {
    std::fs::read_dir(cache.join("objects")).unwrap().map(|entry| entry.unwrap().path()).collect()
}

/// Key of the payload of a version.
fn payload(shop: &Shop, version: Version) -> String {
    let store = Store::open(shop.path().to_str().unwrap()).unwrap();
    block_on(store.manifest(version, "the test")).unwrap().objects[0].name.clone()
}

#[test]
fn a_request_keeps_its_version_though_the_file_it_is_mapped_from_is_gone() {
    let mut shop = Shop::new();
    let cache = shop.dir.path().join("cache");
    let first = shop.publish();
    let node = node_with(&shop, &cache);
    let held = node.wait(Duration::from_secs(30)).unwrap();
    assert_eq!(held.version(), first);
    assert!(held.mapped_bytes() > 0 && held.mapped_bytes() < held.bytes());
    let rows = shop.base.weights.ids().to_vec();
    let slot = |row: u64| tidemill::event::Slot { row, value: 1.0, feature: 0, flags: 0 };
    let all = |model: &tidemill::serve::Model| rows.iter().map(|row| model.logit(&[slot(*row)])).collect::<Vec<f32>>();
    let before = all(&held);
    let file = cache.join(payload(&shop, first));
    assert!(file.is_file());

    // Deltas lie over the same file; a full takes another.
    let mut last = shop.publish_a_few();
    until("a delta", || node.status().version == Some(last));
    assert!(file.is_file() && node.model().unwrap().mapped_bytes() == held.mapped_bytes());
    assert_ne!(all(&node.model().unwrap()), before);
    shop.open(shop.base.manifest.model.clone());
    last = shop.publish();
    until("a full", || node.status().version == Some(last) && !file.exists());
    assert_eq!(objects(&cache), BTreeSet::from([cache.join(payload(&shop, last))]));
    assert_ne!(all(&node.model().unwrap()), before);
    assert_eq!((held.version(), all(&held)), (first, before));
}

#[test]
fn a_byte_that_flipped_in_the_cache_is_noticed_and_the_payload_fetched_anew() {
    let mut shop = Shop::new();
    let cache = shop.dir.path().join("cache");
    let version = shop.publish();
    let wait = |node: &Node| node.wait(Duration::from_secs(30)).unwrap().version();
    drop({
        let node = node_with(&shop, &cache);
        assert_eq!(wait(&node), version);
        until("the copy", || cache.join(snapshot::store::manifest_key(version)).is_file());
        node
    });
    let key = payload(&shop, version);
    let (whole, length) = (std::fs::read(shop.path().join(&key)).unwrap(), 8);
    for at in [3, whole.len() / 2, whole.len() - 1] {
        for cut in [false, true] {
            let mut bytes = whole.clone();
            bytes[at] ^= 1;
            bytes.truncate(if cut { at + length } else { bytes.len() });
            std::fs::write(cache.join(&key), bytes).unwrap();
            let node = node_with(&shop, &cache);
            assert_eq!(wait(&node), version);
            until("the payload", || std::fs::read(cache.join(&key)).unwrap() == whole);
            assert!(!node.status().from_cache && node.model().unwrap().mapped_bytes() > 0);
            assert_eq!(node.status().refusals, 0);
        }
    }
}

#[test]
fn a_cache_that_is_the_store_is_refused_before_anything_is_deleted_from_it() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let store = shop.path().to_str().unwrap().to_owned();
    let error = Node::open(&Settings { cache: Some(shop.path()), store, ..Settings::default() }).unwrap_err();
    assert!(error.to_string().contains("must be another directory than `store`"), "{error}");
    assert!(shop.path().join(payload(&shop, version)).is_file());
}

#[test]
fn what_is_refused_leaves_nothing_in_the_cache() {
    let mut shop = Shop::new();
    let cache = shop.dir.path().join("cache");
    let good = shop.publish();
    let node = node_with(&shop, &cache);
    until("a model", || node.status().version == Some(good) && cache.join("manifests").is_dir());
    for _ in 0..3 {
        let bad = shop.put(|manifest| manifest.golden[0].logit += 0.5, |_, _| ());
        until("a refusal", || node.status().refused.is_some_and(|refused| refused.version == bad));
    }
    let kept = BTreeSet::from([cache.join(payload(&shop, good))]);
    until("the cache to be tidy", || objects(&cache) == kept);
    assert_eq!(node.model().unwrap().version(), good);
}

#[test]
fn a_cache_that_takes_nothing_keeps_no_version_from_being_served_and_none_in_memory() {
    let mut shop = Shop::new();
    let cache = shop.dir.path().join("cache");
    std::fs::create_dir_all(&cache).unwrap();
    std::fs::write(cache.join("objects"), "no directory").unwrap();
    let version = shop.publish();
    let node = node_with(&shop, &cache);
    let model = node.wait(Duration::from_secs(30)).unwrap();
    assert_eq!(model.version(), version);
    assert!(model.mapped_bytes() > 0 && !node.status().from_cache);
    let next = shop.publish();
    until("the next", || node.status().version == Some(next));
}

#[test]
fn what_is_mapped_without_a_cache_has_no_name_while_the_node_runs_and_after_it_is_killed() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let temporary = tempfile::tempdir().unwrap();
    let mut command = Command::new(TIDEMILL);
    command.env("TMPDIR", temporary.path()).stderr(Stdio::null());
    let mut serving = Serving::start_by(command, &shop.path(), &[]);
    let left = || std::fs::read_dir(temporary.path()).unwrap().count();
    let maps = format!("/proc/{}/maps", serving.child.id());
    let mapped = || {
        let maps = std::fs::read_to_string(&maps).unwrap();
        let ours = maps.lines().filter(|line| line.contains(temporary.path().to_str().unwrap()));
        ours.map(|line| assert!(line.ends_with("(deleted)") && line.contains(" r--s "), "{line}")).count()
    };
    serving.serves(version);
    assert_eq!((mapped(), left()), (1, 0));
    for _ in 0..3 {
        // So that it is a full.
        shop.open(shop.base.manifest.model.clone());
        serving.serves(shop.publish());
        assert_eq!(left(), 0);
        until("the file before it to be let go of", || mapped() == 1);
    }
    let (model, length) = (serving.get("/v1/model").1, serving.metric("tidemill_serve_mapped_bytes"));
    assert!(length > 0.0 && model["mapped_bytes"] == json!(length as u64), "{model}");
    assert_eq!(model["bytes"], json!((length + serving.metric("tidemill_serve_memory_bytes")) as u64));
    serving.child.kill().unwrap();
    serving.child.wait().unwrap();
    assert_eq!(left(), 0);
}

#[test]
fn where_no_temporary_file_can_be_written_a_full_is_held_in_memory_and_the_log_says_what_to_do() {
    let mut shop = Shop::new();
    let (context, candidate) = split(&records()[3]);
    let body = json!({"context": context, "candidates": [candidate]}).to_string();
    let dir = tempfile::tempdir().unwrap();
    let (absent, file) = (dir.path().join("absent"), dir.path().join("file"));
    std::fs::write(&file, "no directory").unwrap();
    // In the last there is room for the beginning of a payload.
    for (temporary, blocks, why) in [
        (absent.as_path(), "unlimited", "No such file"),
        (&file, "unlimited", "Not a directory"),
        (dir.path(), "1", "File too large"),
    ] {
        let mut command = Command::new("sh");
        let limited = format!("ulimit -f {blocks}; trap '' XFSZ; exec {TIDEMILL} \"$@\"");
        command.args(["-c", &limited, "sh"]).env("TMPDIR", temporary).stderr(Stdio::piped());
        let first = shop.publish();
        let mut serving = Serving::start_by(command, &shop.path(), &[]);
        serving.serves(first);
        let next = shop.publish();
        serving.serves(next);
        let model = serving.get("/v1/model").1;
        assert_eq!((&model["version"], &model["mapped_bytes"]), (&json!(next), &json!(0)));
        assert_eq!(serving.metric("tidemill_serve_mapped_bytes"), 0.0);
        assert_eq!(json!(serving.metric("tidemill_serve_memory_bytes") as u64), model["bytes"]);
        assert_eq!((serving.score(&body).0, &serving.get("/readyz").1["refused"]), (200, &Value::Null));
        serving.child.kill().unwrap();
        let mut log = String::new();
        serving.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        let warned = log.lines().filter(|line| line.contains("WARN") && line.contains(temporary.to_str().unwrap()));
        let mut warned = warned.filter(|line| line.contains("set TMPDIR, or `cache`, to") && line.contains(why));
        assert!(warned.next().is_some(), "{log}");
    }
}

#[test]
fn a_node_without_a_model_says_so_until_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let serving = Serving::start(&dir.path().join("store"), &[]);
    let ready = serving
        .ready_when("the store to be missed", |status, ready| status == 503 && ready["store_problem"].is_object());
    assert!(ready["reasons"][1].as_str().unwrap().contains("no such directory"), "{ready}");
    let (status, answer) = serving.score(r#"{"context":{},"candidates":[]}"#);
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("not_ready")));
    assert_eq!(serving.get("/v1/model").0, 503);
    assert_eq!(serving.get("/healthz").0, 200);
    let mut shop = Shop::new();
    let version = shop.publish();
    std::fs::rename(shop.path(), dir.path().join("store")).unwrap();
    serving.serves(version);
    assert_eq!(serving.score(r#"{"context":{},"candidates":[]}"#), (200, json!({"version": version, "scores": []})));
}

#[test]
fn bad_requests_are_answered_with_what_is_wrong() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let limits = ["http.max_body=2000", "http.max_candidates=3", "http.timeout=\"300ms\"", "http.max_requests=1"];
    let serving = Serving::start(&shop.path(), &limits);
    serving.serves(version);
    let long = format!(r#"{{"context":{{"x":"{}"}},"candidates":[]}}"#, "x".repeat(2000));
    for (body, status, code, says) in [
        ("{", 400, "bad_json", "invalid JSON"),
        ("[]", 400, "bad_request", "`context` and `candidates`"),
        (r#"{"context":{},"candidates":[{},{"user":{"age":"old"}}]}"#, 400, "bad_field", "candidate 1: `user.age`"),
        (r#"{"context":{"tags":3.5,"item":7},"candidates":[]}"#, 400, "bad_field", "context: `item`"),
        (r#"{"context":{},"candidates":[{},{},{},{}]}"#, 422, "too_many_candidates", "more than 3"),
        (&long, 413, "body_too_large", "2000 bytes"),
    ] {
        let (found, answer) = serving.score(body);
        assert_eq!((found, &answer["error"]["code"]), (status, &json!(code)), "{body}: {answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains(says), "{body}: {answer}");
    }
    let (_, answer) = serving.score(r#"{"context":{},"candidates":[{},{"user":{"age":"old"}}]}"#);
    assert_eq!((&answer["error"]["candidate"], &answer["error"]["field"]), (&json!(1), &json!("user.age")));
    let (status, answer) = serving.score(r#"{"ids":[7,"b"],"candidates":[{},{}],"context":{}}"#);
    assert_eq!((status, &answer["ids"], answer["scores"].as_array().unwrap().len()), (200, &json!([7, "b"]), 2));
    assert_eq!(serving.get("/v1/nothing").0, 404);
    assert_eq!(serving.get("/v1/score").0, 405);

    // A body that does not come, and the one request that is answered at a time.
    // On a busy machine either of the two may come first, or the time may be over: then they try again.
    let met = (0..50).any(|_| {
        let mut slow = serving.connect();
        slow.send("POST /v1/score HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{");
        let began = Instant::now();
        let mut overloaded = false;
        while began.elapsed() < Duration::from_millis(250) && !overloaded {
            let (status, answer) = serving.score(r#"{"context":{},"candidates":[]}"#);
            overloaded = (status, &answer["error"]["code"]) == (503, &json!("overloaded"));
        }
        let (status, answer) = slow.answer().unwrap();
        assert!(status == 408 || status == 503, "{answer}");
        overloaded && status == 408
    });
    assert!(met, "one request at a time was not the limit, or a body that does not come is not given up");
    assert_eq!(serving.score(r#"{"context":{},"candidates":[]}"#).0, 200);
}

#[test]
fn connections_that_say_nothing_are_closed() {
    let dir = tempfile::tempdir().unwrap();
    let serving = Serving::start(dir.path(), &["http.idle=\"200ms\""]);
    let (mut silent, mut half, mut idle) = (serving.connect(), serving.connect(), serving.connect());
    half.send("POST /v1/score HTTP/1.1\r\nhost:");
    assert_eq!(idle.request("GET", "/healthz", "").0, 200);
    for (what, client) in [("silent", &mut silent), ("half a head", &mut half), ("idle", &mut idle)] {
        // The end of the stream, after an answer at most; a read that timed out would be an error.
        let mut rest = Vec::new();
        let read = client.0.read_to_end(&mut rest);
        assert!(read.is_ok() && rest.len() < 500, "{what}: {read:?}");
    }
}

#[test]
fn sigterm_finishes_the_requests_that_are_open() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let mut serving = Serving::start(&shop.path(), &["http.timeout=\"20s\"", "http.drain_delay=\"300ms\""]);
    serving.serves(version);
    let body = r#"{"context":{},"candidates":[{}]}"#;
    let (mut open, mut idle) = (serving.connect(), serving.connect());
    open.send(&format!("POST /v1/score HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n{}", body.len(), &body[..9]));
    assert_eq!(idle.request("GET", "/healthz", "").0, 200);
    serving.answers_one();
    serving.terminate();
    let leaving = serving.ready_when("the node to leave", |status, _| status == 503);
    assert_eq!(leaving["reasons"][0], json!("this node is stopping"));
    assert_eq!(serving.score(body).0, 200, "it still answers while load balancers turn away");
    let began = Instant::now();
    while TcpStream::connect(&serving.address).is_ok() {
        assert!(began.elapsed() < Duration::from_secs(30), "it still takes connections");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(serving.child.try_wait().unwrap().is_none(), "it waits for the open request");
    open.send(&body[9..]);
    let (status, text) = open.answer().unwrap();
    assert_eq!(status, 200, "{text}");
    assert_eq!(serving.child.wait().unwrap().code(), Some(0));
}

#[test]
fn a_request_that_never_ends_is_cut_after_the_grace_time_and_the_exit_code_says_so() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let mut serving = Serving::start(&shop.path(), &["http.timeout=\"60s\"", "http.grace=\"200ms\""]);
    serving.serves(version);
    let mut open = serving.connect();
    open.send("POST /v1/score HTTP/1.1\r\nhost: t\r\ncontent-length: 10\r\n\r\n{");
    serving.answers_one();
    serving.terminate();
    assert_eq!(serving.child.wait().unwrap().code(), Some(1));
}

#[test]
fn an_embedded_node_scores_values_that_are_no_json() {
    let mut shop = Shop::new();
    let version = shop.publish();
    let settings = Settings { store: shop.path().to_str().unwrap().to_owned(), ..Settings::default() };
    let node = Node::open(&settings).unwrap();
    let model = node.wait(Duration::from_secs(30)).unwrap();
    assert_eq!((model.version(), node.status().version), (version, Some(version)));
    let of = |name: &str| model.schema().index_of(name).unwrap();
    let (user, age, item, tags) = (of("user_id"), of("age"), of("item_id"), of("tags"));
    let mut scorer = Scorer::new();
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let items: Vec<String> = records().iter().take(20).map(|record| text(&record["item"]["id"])).collect();
    let by_value = scorer
        .score_values::<Box<dyn std::error::Error>>(
            &model,
            |context| {
                context.u64(user, 7)?;
                Ok(context.f64(age, 31.0)?)
            },
            items.len(),
            |i, candidate| {
                candidate.str(item, &items[i])?;
                candidate.str(tags, "a")?;
                Ok(candidate.str(tags, "b")?)
            },
        )
        .unwrap()
        .to_vec();
    let candidates: Vec<String> =
        items.iter().map(|id| json!({"item": {"id": id}, "tags": ["a", "b"]}).to_string()).collect();
    let context = br#"{"user":{"id":"7","age":31}}"#;
    let by_text = scorer.score(&model, context, candidates.iter().map(String::as_bytes)).unwrap();
    assert_eq!(by_value, by_text);
    assert!(by_text.iter().any(|score| score != &by_text[0]), "{by_text:?}");
}

#[test]
fn the_shipped_settings_are_the_defaults_and_unknown_keys_are_refused() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/serve.toml");
    let shown: Settings = tidemill::config::read(&path, &[]).unwrap();
    assert_eq!(shown, Settings::default());
    shown.check().unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let all: toml::Table = text.replace("#cache", "cache").parse().unwrap();
    let defaults = Settings { cache: Some("cache/serve".into()), ..Settings::default() };
    assert_eq!(all, toml::Table::try_from(&defaults).unwrap(), "every key is in the file");
    for (set, expected) in [
        ("stroe=\"x\"", "stroe"),
        ("http.lisen=\"x\"", "lisen"),
        ("poll=\"0s\"", "`poll` is `0ns`: must be at least 1ms"),
        ("http.max_requests=0", "`http.max_requests` is `0`"),
        ("channel=\"a/b\"", "`snapshots.channel` is `a/b`"),
        ("http.listen=\"nowhere\"", "cannot listen on `nowhere`"),
    ] {
        let output = Command::new(TIDEMILL).args(["serve", "-c"]).arg(&path).args(["--set", set]).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && text.contains(expected), "{set}: {text}");
    }
}
