//! Events a second from files to encoded records: JSON lines beside Parquet, with the ten fields of `benches/decode.rs`, an id and
//! a time. Reading, unpacking, decoding, hashing and queues; no merge. Run with `cargo bench --bench columnar`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow_array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, StructArray};
use arrow_schema::Field;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use tidemill::event::Stream;
use tidemill::feature::schema::FeatureKind;
use tidemill::feature::{FeatureSettings, Schema};
use tidemill::position::NextOffset;
use tidemill::source::decode::{Decoder, RecordSettings};
use tidemill::source::{Arrival, Decode, Mode, NewDecoder, Sources, Spec};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EVENTS: usize = 1_000_000;

struct Event {
    id: String,
    ts: i64,
    user: i64,
    country: &'static str,
    device: &'static str,
    age: i64,
    item: i64,
    category: String,
    price: f64,
    author: String,
    position: i64,
    page: &'static str,
    server: String,
    bid: f64,
}

fn events() -> Vec<Event> {
    let mut rng = Pcg64Mcg::seed_from_u64(7);
    let countries = ["DE", "FR", "PL", "US", "BR", "IN", "JP", "NG"];
    (0..EVENTS as i64)
        .map(|i| {
            let mut below = |n: u64| (rng.next_u64() % n) as i64;
            Event {
                id: format!("req-{:08x}-{}", below(u64::from(u32::MAX)), below(40)),
                ts: 1_700_000_000_000 + i * 3,
                user: below(5_000_000),
                country: countries[below(8) as usize],
                device: ["phone", "desktop", "tablet"][below(3) as usize],
                age: 18 + below(60),
                item: below(1_000_000),
                category: format!("cat-{}", below(300)),
                price: below(40_000) as f64 / 100.0,
                author: format!("a{:06x}", below(1 << 24)),
                position: 1 + below(20),
                page: ["home", "search", "detail"][below(3) as usize],
                server: format!("fe-{:02}", below(64)),
                bid: below(10_000) as f64 / 10_000.0,
            }
        })
        .collect()
}

fn lines(events: &[Event]) -> Vec<u8> {
    let mut out = String::new();
    for e in events {
        out.push_str(&format!(
            concat!(
                r#"{{"id":"{}","ts":{},"user":{{"id":{},"country":"{}","device":"{}","age":{}}},"#,
                r#""item":{{"id":{},"category":"{}","price":{},"author":"{}"}},"position":{},"page":"{}","server":"{}","bid":{}}}"#,
                "\n"
            ),
            e.id,
            e.ts,
            e.user,
            e.country,
            e.device,
            e.age,
            e.item,
            e.category,
            e.price,
            e.author,
            e.position,
            e.page,
            e.server,
            e.bid
        ));
    }
    out.into_bytes()
}

fn parquet(path: &Path, events: &[Event], compression: Compression, dictionary: bool) {
    let numbers = |get: fn(&Event) -> i64| Arc::new(events.iter().map(get).collect::<Int64Array>()) as ArrayRef;
    let floats = |get: fn(&Event) -> f64| Arc::new(events.iter().map(get).collect::<Float64Array>()) as ArrayRef;
    fn texts<'a>(events: &'a [Event], get: fn(&'a Event) -> &'a str) -> ArrayRef {
        Arc::new(events.iter().map(get).map(Some).collect::<StringArray>())
    }
    let inside = |members: Vec<(&str, ArrayRef)>| {
        let field =
            |(name, column): (&str, ArrayRef)| (Arc::new(Field::new(name, column.data_type().clone(), false)), column);
        Arc::new(StructArray::from(members.into_iter().map(field).collect::<Vec<_>>())) as ArrayRef
    };
    let user = inside(vec![
        ("id", numbers(|e| e.user)),
        ("country", texts(events, |e| e.country)),
        ("device", texts(events, |e| e.device)),
        ("age", numbers(|e| e.age)),
    ]);
    let item = inside(vec![
        ("id", numbers(|e| e.item)),
        ("category", texts(events, |e| &e.category)),
        ("price", floats(|e| e.price)),
        ("author", texts(events, |e| &e.author)),
    ]);
    let batch = RecordBatch::try_from_iter([
        ("id", texts(events, |e| &e.id)),
        ("ts", numbers(|e| e.ts)),
        ("user", user),
        ("item", item),
        ("position", numbers(|e| e.position)),
        ("page", texts(events, |e| e.page)),
        ("server", texts(events, |e| &e.server)),
        ("bid", floats(|e| e.bid)),
    ])
    .unwrap();
    let properties = WriterProperties::builder()
        .set_compression(compression)
        .set_dictionary_enabled(dictionary)
        .set_max_row_group_row_count(Some(EVENTS / 8))
        .build();
    let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
}

fn schema() -> Schema {
    let mut features: Vec<FeatureSettings> = [
        ("user_id", "user.id"),
        ("country", "user.country"),
        ("device", "user.device"),
        ("item_id", "item.id"),
        ("category", "item.category"),
        ("author", "item.author"),
        ("position", "position"),
        ("page", "page"),
    ]
    .map(|(name, from)| FeatureSettings { name: name.into(), from: Some(from.into()), ..Default::default() })
    .into();
    for (name, from) in [("age", "user.age"), ("price", "item.price")] {
        let kind = FeatureKind::Numeric;
        features.push(FeatureSettings { name: name.into(), from: Some(from.into()), kind, ..Default::default() });
    }
    Schema::new(&features, &[]).unwrap()
}

/// Million events a second, and a digest of what was read.
fn run(path: &Path, decoder: &NewDecoder, partitions: usize, threads: usize) -> (f64, u64) {
    let (from, stream, mode) = (NextOffset::default(), Stream::Impressions, Mode::Bounded);
    let spec = Spec {
        path: path.into(),
        object: None,
        stream,
        mode,
        from,
        decoder: decoder.clone(),
        max_record: 1 << 20,
        queue: 4,
    };
    let begun = Instant::now();
    let (_sources, mut parts, recycler) = Sources::open(vec![spec; partitions], threads).unwrap();
    let (mut events, mut digest, mut open) = (0, 0_u64, partitions);
    while open > 0 {
        for part in &mut parts {
            match part.next_timeout(Duration::from_secs(10)) {
                Some(Arrival::Records(chunk)) => {
                    assert!(chunk.rejects.is_empty());
                    events += chunk.records.len();
                    digest = chunk.records.iter().fold(digest, |digest, record| digest.wrapping_add(record.content));
                    recycler.give(chunk);
                }
                Some(Arrival::Ended { .. }) => open -= 1,
                None => {} // over
                Some(other) => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(events, EVENTS * partitions);
    (events as f64 / begun.elapsed().as_secs_f64() / 1e6, digest)
}

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = |name: &str| folder.path().join(name);
    let events = events();
    let content = lines(&events);
    let mut files: Vec<(&str, PathBuf)> = Vec::new();
    fs::write(path("e.jsonl"), &content).unwrap();
    files.push(("JSON lines", path("e.jsonl")));
    fs::write(path("e.jsonl.zst"), zstd::encode_all(&content[..], 3).unwrap()).unwrap();
    files.push(("JSON lines, zstd", path("e.jsonl.zst")));
    let zstd = Compression::ZSTD(ZstdLevel::default());
    for (name, file, compression, dictionary) in [
        ("Parquet, plain", "plain.parquet", Compression::UNCOMPRESSED, false),
        ("Parquet, dictionary", "dictionary.parquet", Compression::UNCOMPRESSED, true),
        ("Parquet, dict., Snappy", "snappy.parquet", Compression::SNAPPY, true),
        ("Parquet, dict., zstd", "zstd.parquet", zstd, true),
    ] {
        parquet(&path(file), &events, compression, dictionary);
        files.push((name, path(file)));
    }
    drop((content, events));
    let schema = schema();
    let decoder: NewDecoder = Arc::new(move || {
        Box::new(Decoder::new(Stream::Impressions, &RecordSettings::default(), Some(&schema), false).unwrap())
            as Box<dyn Decode>
    });
    println!("{EVENTS} events with ten features; million events a second, best of 3");
    let mut digests = Vec::new();
    for (format, path) in &files {
        let size = fs::metadata(path).unwrap().len() >> 20;
        for (partitions, threads) in [(1, 1), (2, 2)] {
            let runs: Vec<(f64, u64)> = (0..3).map(|_| run(path, &decoder, partitions, threads)).collect();
            let best = runs.iter().map(|run| run.0).fold(0.0, f64::max);
            digests.extend(runs.iter().filter(|_| partitions == 1).map(|run| run.1));
            println!("{format:24} {size:4} MiB  {partitions} file(s)  {threads} decoder(s)  {best:6.2}");
        }
    }
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "the formats do not decode alike");
}
