//! Examples a second of the logistic model on one core, on encoded examples: ids kept, counters on.
//!
//! `cargo bench --bench logistic`. 13 ids an example, each feature Zipf(1) over its share of 2^24 rows, which all exist
//! before the first example; batches of 4096 of which no two are alike.

use divan::counter::ItemsCount;
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use tidemill::event::{Example, Slot, Time};
use tidemill::model::logistic::{Logistic, Settings, State};
use tidemill::model::table::Rows;
use tidemill::train::progressive::{self, Progressive};
use xxhash_rust::xxh3::xxh3_64;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FEATURES: u64 = 13;
const ROWS: u64 = 1 << 24;
const EXAMPLES: usize = 1 << 21;
const BATCH: usize = 4096;

fn main() {
    divan::main();
}

fn id(feature: u64, rank: u64) -> u64 {
    xxh3_64(&(feature << 32 | rank).to_le_bytes()).max(1)
}

fn uniform(random: &mut Pcg64Mcg) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn slots() -> Vec<Slot> {
    let mut random = Pcg64Mcg::seed_from_u64(7);
    let log_n = libm::log((ROWS / FEATURES) as f64);
    (0..EXAMPLES as u64 * FEATURES)
        .map(|i| {
            let rank = libm::exp(uniform(&mut random) * log_n) as u64;
            Slot { row: id(i % FEATURES, rank), value: 1.0, feature: (i % FEATURES) as u16, flags: 0 }
        })
        .collect()
}

fn examples(slots: &[Slot]) -> Vec<Example<'_>> {
    let mut random = Pcg64Mcg::seed_from_u64(8);
    slots
        .chunks(FEATURES as usize)
        .enumerate()
        .map(|(i, slots)| Example {
            slots,
            positive: uniform(&mut random) < 0.05,
            weight: 1.0,
            sampling_offset: 0.0,
            time: Time(i as i64),
            id: i as u64,
        })
        .collect()
}

fn model() -> Logistic {
    let mut ids: Vec<u64> =
        (0..FEATURES).flat_map(|f| (0..ROWS.div_ceil(FEATURES)).map(move |rank| id(f, rank))).collect();
    ids.sort_unstable();
    let len = ids.len();
    let rows = Rows { ids, w: vec![0.0; len], n: vec![0.0; len], z: None, touched: vec![0; len] };
    let settings = Settings { prior_ctr: Some(0.05), ..Settings::default() };
    let defaults = (0..FEATURES).map(|feature| id(feature, u64::from(u32::MAX))).collect();
    Logistic::from_state(settings.check(13, 5).unwrap(), defaults, State { rows, ..State::default() }).unwrap()
}

fn pass(bencher: divan::Bencher<'_, '_>, observe: bool) {
    let slots = slots();
    let examples = examples(&slots);
    let mut model = model();
    let mut progressive = Progressive::new(&progressive::Settings::default()).unwrap();
    let mut outcomes = Vec::new();
    let mut batch = 0;
    bencher.counter(ItemsCount::new(EXAMPLES)).bench_local(|| {
        for examples in examples.chunks(BATCH) {
            batch += 1;
            model.learn(batch, examples[0].time, examples, &mut outcomes);
            if observe {
                outcomes.iter().zip(examples).for_each(|(outcome, example)| progressive.observe(outcome, example));
            }
        }
    });
    divan::black_box((model.intercept(), progressive.report()));
}

/// What a trainer does for every example: score, count, learn, measure.
#[divan::bench(sample_count = 8, sample_size = 1)]
fn learn_and_measure(bencher: divan::Bencher<'_, '_>) {
    pass(bencher, true);
}

/// The same without the metrics.
#[divan::bench(sample_count = 8, sample_size = 1)]
fn learn(bencher: divan::Bencher<'_, '_>) {
    pass(bencher, false);
}
