//! What a checkpoint of a large model costs, as one line of JSON: with all rows copied (the first of a job), with all rows laid
//! together from files (the first of each later chain), and with those that changed. Bytes written, how long training stands still for
//! the copy, and seconds until it is durable.
//!
//! `ROWS=1000000 TOUCHED=0.01 cargo bench --bench checkpoint`. Two towers beside the logistic part, a row of each table for every id,
//! vectors of 16; between two checkpoints a batch touches a share of the ids. Through the job's own checkpoint thread, to real files.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use tidemill::app::keeper::Keeper;
use tidemill::config::{Checked, Config};
use tidemill::event::{Example, Slot, Time};
use tidemill::join;
use tidemill::model::Model;
use tidemill::train::checkpoint::Checkpoints;
use tidemill::train::core::{Image, Place};
use xxhash_rust::xxh3::xxh3_64;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const CONFIG: &str = r#"
[impressions]
source = { paths = ["impressions-*"] }
[clicks]
source = { paths = ["clicks-*"] }
[model]
kind = "two_tower"
[model.two_tower]
dim = 16
[[features]]
name = "user"
tower = "user"
[[features]]
name = "item"
tower = "item"
"#;
const DIM: usize = 16;
const ROUNDS: usize = 7;

fn setting(name: &str, default: f64) -> f64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn id(number: u64) -> u64 {
    xxh3_64(&number.to_le_bytes()).max(1)
}

/// A model with a row of both tables for each of so many ids.
fn model(checked: &Checked, rows: u64) -> Model {
    let mut state = checked.model.start().unwrap().image().sorted();
    let mut ids: Vec<u64> = (0..rows).map(id).chain(state.logistic.rows.ids.iter().copied()).collect();
    ids.sort_unstable();
    ids.dedup();
    let len = ids.len();
    let towers = state.towers.as_mut().unwrap();
    towers.rows.w = (0..len * DIM).map(|i| (i % 13) as f32 * 0.01 - 0.06).collect();
    (towers.rows.n, towers.rows.touched) = (vec![0.1; len], vec![0; len]);
    towers.rows.ids.clone_from(&ids);
    let logistic = &mut state.logistic.rows;
    (logistic.w, logistic.n, logistic.touched) = (vec![0.01; len], vec![0.1; len], vec![0; len]);
    logistic.ids = ids;
    checked.model.resume(state).unwrap()
}

fn image(model: &Model, batch: u32, since: Option<u32>) -> Image {
    let changed = since.and_then(|since| model.image_after(since));
    let since = since.filter(|_| changed.is_some());
    Image {
        place: Place { batches: u64::from(batch), ..Place::default() },
        partitions: Vec::new(),
        journal: Vec::new(),
        clicks: Vec::new(),
        seen: Vec::new(),
        counts: join::Counts::default(),
        delays: join::DelayCurve::default(),
        fuse: join::fuse::State::default(),
        progress: Vec::new(),
        compare: None,
        model: changed.unwrap_or_else(|| model.image()),
        since,
    }
}

fn files(dir: &Path) -> BTreeMap<String, u64> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), entry.metadata().unwrap().len())).collect()
}

/// Bytes, seconds of the copy and seconds in all of one checkpoint.
#[derive(Clone, Copy, Debug)]
struct Cost([f64; 3]);

fn median(costs: &[Cost]) -> [f64; 3] {
    [0, 1, 2].map(|at| {
        let mut values: Vec<f64> = costs.iter().map(|cost| cost.0[at]).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    })
}

fn main() {
    let (rows, share) = (setting("ROWS", 1e6) as u64, setting("TOUCHED", 0.01));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("job.toml");
    std::fs::write(&path, CONFIG).unwrap();
    let checked = Config::load(&path, &[]).unwrap().check(None).unwrap();
    let mut model = model(&checked, rows);
    let at = dir.path().join("checkpoints");
    let keeper = Keeper::start(&checked, Checkpoints::open(&at).unwrap(), None).unwrap();

    let (mut outcomes, [mut copied_whole, mut laid, mut increments]) =
        (Vec::new(), [(); 3].map(|()| Vec::<Cost>::new()));
    for batch in 1..=ROUNDS as u32 {
        let examples = (rows as f64 * share / 2.0) as u64;
        let slot = |number, feature| Slot { row: id(number % rows), value: 1.0, feature, flags: 0 };
        let from = u64::from(batch) * examples * 2;
        let slots: Vec<[Slot; 2]> = (0..examples).map(|i| [slot(from + 2 * i, 0), slot(from + 2 * i + 1, 1)]).collect();
        let example = |(i, slots)| {
            let positive = i % 16 == 0;
            Example { slots, positive, weight: 1.0, sampling_offset: 0.0, time: Time(0), id: i }
        };
        let examples: Vec<Example<'_>> = (0..).zip(slots.iter().map(|slots| &slots[..])).map(example).collect();
        model.learn(batch, Time(0), &examples, &mut outcomes).unwrap();

        let before = files(&at);
        let (mut copied, mut whole) = (0.0, true);
        let began = Instant::now();
        keeper
            .write(
                |since| {
                    let began = Instant::now();
                    let image = image(&model, batch, since);
                    (copied, whole) = (began.elapsed().as_secs_f64(), image.since.is_none());
                    image
                },
                None,
            )
            .unwrap();
        let seconds = began.elapsed().as_secs_f64();
        let bytes: u64 = files(&at).iter().filter(|(name, _)| !before.contains_key(*name)).map(|(_, len)| len).sum();
        let large = copied_whole.first().is_none_or(|first| bytes as f64 > first.0[0] / 2.0);
        let costs = if whole {
            &mut copied_whole
        } else if large {
            &mut laid
        } else {
            &mut increments
        };
        costs.push(Cost([bytes as f64, copied, seconds]));
        model.forget_changes_to(keeper.acknowledged().unwrap() as u32);
        model.mark(batch);
    }
    keeper.finish();
    let costs = [copied_whole, laid, increments].map(|costs| median(&costs));
    let [copied, laid, increment] = costs.map(|[bytes, copy, seconds]| {
        format!("{{\"bytes\":{bytes:.0},\"copy_ms\":{:.1},\"seconds\":{seconds:.2}}}", copy * 1e3)
    });
    let [bytes, copy, seconds] = [0, 1, 2].map(|at| costs[0][at] / costs[2][at]);
    println!(
        "{{\"rows\":{rows},\"touched\":{share},\"copied\":{copied},\"laid_together\":{laid},\"increment\":{increment},\
         \"ratio\":{{\"bytes\":{bytes:.1},\"copy\":{copy:.1},\"seconds\":{seconds:.1}}}}}"
    );
}
