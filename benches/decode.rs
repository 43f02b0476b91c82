//! JSON lines of about 250 bytes with ten fields: decoded and encoded, beside parsing the same lines into a DOM.
//!
//! `cargo bench --bench decode`; items are records, one core.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use tidemill::event::{Chunk, Stream};
use tidemill::feature::{CrossSettings, FeatureSettings, Schema};
use tidemill::position::Fingerprint;
use tidemill::source::decode::{Decoder, RecordSettings};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A chunk of the size that travels; short enough to run undisturbed now and then on a busy machine.
const LINES: usize = 1000;

fn main() {
    divan::main();
}

fn lines() -> Vec<String> {
    let mut rng = Pcg64Mcg::seed_from_u64(7);
    let countries = ["DE", "FR", "PL", "US", "BR", "IN", "JP", "NG"];
    (0..LINES as u64)
        .map(|i| {
            let mut below = |n: u64| rng.next_u64() % n;
            format!(
                concat!(
                    r#"{{"id":"req-{:08x}-{}","ts":{},"user":{{"id":{},"country":"{}","device":"{}","age":{}}},"#,
                    r#""item":{{"id":{},"category":"cat-{}","price":{}.{:02},"author":"a{:06x}"}},"#,
                    r#""position":{},"page":"{}","server":"fe-{:02}","bid":0.{:04}}}"#
                ),
                below(u64::from(u32::MAX)),
                below(40),
                1_700_000_000_000 + i * 3,
                below(5_000_000),
                countries[below(8) as usize],
                ["phone", "desktop", "tablet"][below(3) as usize],
                18 + below(60),
                below(1_000_000),
                below(300),
                below(400),
                below(100),
                below(1 << 24),
                1 + below(20),
                ["home", "search", "detail"][below(3) as usize],
                below(64),
                below(10_000),
            )
        })
        .collect()
}

fn schema(crosses: bool) -> Schema {
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
        let kind = tidemill::feature::schema::FeatureKind::Numeric;
        features.push(FeatureSettings { name: name.into(), from: Some(from.into()), kind, ..Default::default() });
    }
    let cross = |a: &str, b: &str| CrossSettings { of: vec![a.into(), b.into()], ..Default::default() };
    let crosses = if crosses { vec![cross("country", "category"), cross("device", "page")] } else { Vec::new() };
    Schema::new(&features, &crosses).unwrap()
}

fn decode(bencher: Bencher<'_, '_>, schema: Option<&Schema>) {
    let lines = lines();
    let stream = if schema.is_some() { Stream::Impressions } else { Stream::Clicks };
    let mut decoder = Decoder::new(stream, &RecordSettings::default(), schema, false).unwrap();
    let mut chunk = Chunk::default();
    bencher
        .counter(ItemsCount::new(LINES))
        .counter(BytesCount::new(lines.iter().map(String::len).sum::<usize>()))
        .bench_local(|| {
            chunk.clear();
            for line in &lines {
                decoder.decode(line.as_bytes(), 0, Fingerprint::NONE, &mut chunk);
            }
            assert_eq!((chunk.records.len(), chunk.rejects.len()), (LINES, 0));
        });
}

#[divan::bench]
fn ten_fields(bencher: Bencher<'_, '_>) {
    decode(bencher, Some(&schema(false)));
}

#[divan::bench]
fn ten_fields_two_crosses(bencher: Bencher<'_, '_>) {
    decode(bencher, Some(&schema(true)));
}

/// Id and time only; the rest is skipped.
#[divan::bench]
fn clicks(bencher: Bencher<'_, '_>) {
    decode(bencher, None);
}

/// The bound: fixed structs with borrowed strings, and nothing hashed.
#[divan::bench]
fn sonic_rs_typed(bencher: Bencher<'_, '_>) {
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Line<'a> {
        id: &'a str,
        ts: i64,
        #[serde(borrow)]
        user: User<'a>,
        item: Item<'a>,
        position: u32,
        page: &'a str,
    }
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct User<'a> {
        id: u64,
        country: &'a str,
        device: &'a str,
        age: f64,
    }
    #[derive(serde::Deserialize)]
    #[expect(dead_code, reason = "only parsed")]
    struct Item<'a> {
        id: u64,
        category: &'a str,
        price: f64,
        author: &'a str,
    }
    let lines = lines();
    bencher
        .counter(ItemsCount::new(LINES))
        .counter(BytesCount::new(lines.iter().map(String::len).sum::<usize>()))
        .bench_local(|| {
            lines.iter().map(|line| sonic_rs::from_slice::<Line<'_>>(line.as_bytes()).unwrap().ts).sum::<i64>()
        });
}

#[divan::bench]
fn serde_json_value(bencher: Bencher<'_, '_>) {
    let lines = lines();
    bencher
        .counter(ItemsCount::new(LINES))
        .counter(BytesCount::new(lines.iter().map(String::len).sum::<usize>()))
        .bench_local(|| {
            lines.iter().filter(|line| serde_json::from_str::<serde_json::Value>(line).unwrap().is_object()).count()
        });
}
