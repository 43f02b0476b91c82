//! Examples a second of the two-tower model on encoded examples, as one line of JSON: scripts/bench_towers.py runs it beside PyTorch.
//!
//! `ROWS=1000000 THREADS=2 cargo bench --bench towers`. 12 ids an example, six a tower, each feature Zipf(1) over its share of the rows,
//! which all exist before the first example; vectors of 16, towers 96-64-32, batches of 1024 of which no two are alike. LAYERS=64,32 and
//! DEVICE=cpu say otherwise.

use std::time::Instant;

use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng, SeedableRng};
use tidemill::event::{Example, Slot, Time};
use tidemill::model::embedding::Rows;
use tidemill::model::logistic::{self, Logistic};
use tidemill::model::optim::{DenseRule, DenseState};
use tidemill::model::two_tower::{Feature, Settings, Side, State, TwoTower};
use xxhash_rust::xxh3::xxh3_64;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const FEATURES: u64 = 12;
const EXAMPLES: usize = 1 << 18;
const BATCH: usize = 1024;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn id(feature: u64, rank: u64) -> u64 {
    xxh3_64(&(feature << 32 | rank).to_le_bytes()).max(1)
}

fn uniform(random: &mut Pcg64Mcg) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

fn main() {
    let (rows, threads) = (setting("ROWS", 1_000_000) as u64, setting("THREADS", 2));
    let (seconds, wide) = (setting("SECONDS", 8), setting("WIDE", 1) == 1);
    let mut random = Pcg64Mcg::seed_from_u64(7);
    let log_n = libm::log((rows / FEATURES) as f64);
    let mut slot = |i: u64| {
        let rank = libm::exp(uniform(&mut random) * log_n) as u64;
        Slot { row: id(i % FEATURES, rank), value: 1.0, feature: (i % FEATURES) as u16, flags: 0 }
    };
    let slots: Vec<Slot> = (0..EXAMPLES as u64 * FEATURES).map(&mut slot).collect();
    let mut random = Pcg64Mcg::seed_from_u64(8);
    let example = |slots| Example {
        slots,
        positive: uniform(&mut random) < 0.05,
        weight: 1.0,
        sampling_offset: 0.0,
        time: Time(0),
        id: 1,
    };
    let examples: Vec<Example<'_>> = slots.chunks(FEATURES as usize).map(example).collect();

    let text = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let layers = text("LAYERS", "64,32").split(',').map(|outputs| outputs.parse().unwrap()).collect();
    let settings = Settings { wide, layers, device: text("DEVICE", "cpu"), ..Settings::default() };
    let feature =
        |i| Feature { side: Some(if i < FEATURES / 2 { Side::User } else { Side::Item }), presentation: false, key: 0 };
    let features: Vec<Feature> = (0..FEATURES).map(feature).collect();
    let checked = settings.check(&features, 1).unwrap();
    let mut ids: Vec<u64> =
        (0..FEATURES).flat_map(|f| (0..rows.div_ceil(FEATURES)).map(move |rank| id(f, rank))).collect();
    ids.sort_unstable();
    let len = ids.len();
    let w = (0..len * settings.dim).map(|i| (i % 13) as f32 * 0.01 - 0.06).collect();
    let rows = Rows { ids, w, n: vec![0.0; len], touched: vec![0; len] };
    let pair = checked.layout().pair();
    let params = (0..pair.len).map(|i| (i * 7919 % 101) as f32 * 0.004 - 0.2).collect();
    let dense = DenseState::new(DenseRule::Adam, pair.len);
    let defaults: Vec<u64> = (0..FEATURES).map(|feature| id(feature, u64::from(u32::MAX))).collect();
    let state = State { rows, params, dense, ..State::default() };
    let mut towers = TwoTower::from_state(checked, defaults.clone(), threads, state).unwrap();
    let mut logistic = Logistic::new(logistic::Settings::default().check(12, 5).unwrap(), defaults);

    let (mut outcomes, mut batch, mut best) = (Vec::new(), 0, 0.0f64);
    let began = Instant::now();
    let mut passes = Vec::new();
    while began.elapsed().as_secs_f64() < seconds as f64 || passes.len() < 3 {
        let pass = Instant::now();
        for examples in examples.chunks(BATCH) {
            batch += 1;
            towers.learn(&mut logistic, batch, Time(0), examples, &mut outcomes).unwrap();
        }
        let rate = EXAMPLES as f64 / pass.elapsed().as_secs_f64();
        best = best.max(rate);
        passes.push(rate);
    }
    passes.sort_by(f64::total_cmp);
    println!(
        "{{\"rows\":{},\"threads\":{threads},\"wide\":{wide},\"best\":{best:.0},\"median\":{:.0},\"bytes_a_row\":{:.1}}}",
        towers.rows(),
        passes[passes.len() / 2],
        towers.bytes() as f64 / towers.rows() as f64
    );
}
