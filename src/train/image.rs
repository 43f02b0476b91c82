//! The state at a batch boundary as a checkpoint holds it, and its two digests.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::core::{Image, Place, Restored};
use crate::event::Time;
use crate::join::{self, SeenInfo, Segment};
use crate::merge::{Click, JournalEntry, PartitionPosition};
use crate::model::logistic::{FeatureCounts, Intercept};
use crate::model::optim::DenseState;
use crate::model::table::Rows;
use crate::model::{State, admission, embedding, logistic, two_tower};
use crate::snapshot::codec::{self, Arrays};

/// Version of the checkpoint's content. A reader refuses another one.
pub const FORMAT: u32 = 2;

/// What sets a lineage apart from others of the same job under the same settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Branch {
    pub name: String,
    /// It learns from no impression before this.
    pub from: Option<Time>,
    /// What its model began as, if not empty.
    pub began_as: Option<String>,
}

/// The part of a checkpoint that is small and worth reading by eye.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Head {
    pub format: u32,
    pub job: String,
    pub lineage: String,
    /// None: what `tidemill train` begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub branch: Option<Branch>,
    /// The feature schema, as snapshots have it. None: the checkpoint is older than this field.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schema: Option<serde_json::Value>,
    /// Settings that the state is bound to, by key.
    pub binding: BTreeMap<String, String>,
    /// Version of the crate, and machine class.
    pub build: String,
    pub place: Place,
    pub partitions: Vec<PartitionPosition>,
    pub journal: Vec<JournalEntry>,
    pub counts: join::Counts,
    pub delays: join::DelayCurve,
    /// What the fuse knows of click-through rates.
    #[serde(default)]
    pub fuse: join::fuse::State,
    pub periods: Vec<(u32, i64)>,
    pub features: FeatureCounts,
    /// Bytes of the predictions file that belong to this state; `None` where none is written.
    pub predictions: Option<u64>,
}

/// The digests of a state: equal for equal log, config and frontier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Digests {
    /// Parameters, optimizer, tables.
    pub model: String,
    /// The model, and counters, metrics, seen ids, clicks up to frontier + window, first unreleased positions, journal.
    pub order: String,
}

/// What the order digest is made of beside the model.
#[derive(Clone, Copy)]
pub struct Ordered<'a> {
    pub place: &'a Place,
    pub counts: &'a join::Counts,
    pub delays: &'a join::DelayCurve,
    pub progress: &'a [u64],
    pub seen: &'a [Arc<Segment>],
    pub clicks: &'a [Click],
    pub journal: &'a [JournalEntry],
}

impl<'a> Ordered<'a> {
    #[must_use]
    pub fn of(image: &'a Image) -> Self {
        let Image { place, counts, delays, progress, seen, clicks, journal, .. } = image;
        Self { place, counts, delays, progress, seen, clicks, journal }
    }

    /// Of what [`read`] gave.
    #[must_use]
    pub fn of_restored(restored: &'a Restored, progress: &'a [u64]) -> Self {
        let Restored { place, counts, delays, seen, clicks, journal, .. } = restored;
        Self { place, counts, delays, progress, seen, clicks, journal }
    }
}

/// Computes both digests. `model` is in canonical order. `window` in ms.
#[must_use]
pub fn digests(image: &Ordered<'_>, model: &State, window: i64) -> Digests {
    let model = format!("{:032x}", model.digest());
    let mut hash = Xxh3::new();
    let mut words = |words: &mut dyn Iterator<Item = u64>| {
        let mut buffer = Vec::with_capacity(1 << 13);
        let mut count = 0_u64;
        for word in words {
            buffer.extend_from_slice(&word.to_le_bytes());
            count += 1;
            if buffer.len() == 1 << 13 {
                hash.update(&buffer);
                buffer.clear();
            }
        }
        buffer.extend_from_slice(&count.to_le_bytes());
        hash.update(&buffer);
    };
    let frontier = image.place.frontier.map_or(Time::MIN, |key| key.time);
    let passed = frontier.plus(window);
    let small = serde_json::to_vec(&(&model, image.place, image.counts, image.delays)).expect("plain data");
    words(&mut small.iter().map(|byte| u64::from(*byte)));
    words(&mut image.progress.iter().copied());
    words(&mut image.seen.iter().flat_map(|segment| segment.ids.iter().copied()));
    words(&mut image.seen.iter().flat_map(|segment| segment.infos.iter().map(|info| info.to_bits() as u64)));
    let mut clicks: Vec<&Click> = image.clicks.iter().filter(|click| click.time <= passed).collect();
    clicks.sort_unstable();
    words(&mut clicks.iter().flat_map(|c| {
        [c.time.0 as u64, c.id, c.content, u64::from(c.partition), c.offset, u64::from(c.row), c.event_time.0 as u64]
    }));
    let journal = image.journal.iter().filter(|entry| entry.time <= frontier);
    let mut journal: Vec<String> = journal.map(|entry| format!("{entry:?}")).collect();
    journal.sort_unstable();
    words(&mut journal.iter().map(|line| xxhash_rust::xxh3::xxh3_64(line.as_bytes())));
    Digests { model, order: format!("{:032x}", hash.digest128()) }
}

/// The arrays of a checkpoint. Seen ids are not among them: each segment is a file of its own, see [`segment_arrays`].
#[must_use]
pub fn arrays(image: &Image, model: &State) -> Arrays {
    let mut arrays = Arrays::new();
    if let Some(towers) = &model.towers {
        tower_arrays(towers, &mut arrays);
    }
    let model = &model.logistic;
    let rows = &model.rows;
    arrays.push_u64("model.ids", &[rows.ids.len()], &rows.ids);
    arrays.push_f32("model.w", &[rows.w.len()], &rows.w);
    arrays.push_f32("model.n", &[rows.n.len()], &rows.n);
    if let Some(z) = &rows.z {
        arrays.push_f32("model.z", &[z.len()], z);
    }
    arrays.push_u32("model.touched", &[rows.touched.len()], &rows.touched);
    arrays.push_f64("model.intercept", &[2], &[model.intercept.w, model.intercept.n]);
    arrays.push_u32("model.intercept_touched", &[1], &[model.intercept.touched]);
    admission_arrays("model", &model.admission, &mut arrays);
    let progress = &image.progress;
    arrays.push_u64("progress", &[progress.len()], progress);
    if let Some(compare) = &image.compare {
        arrays.push_u64("compare", &[compare.len()], compare);
    }
    let mut clicks: Vec<&Click> = image.clicks.iter().collect();
    clicks.sort_unstable();
    let n = [clicks.len()];
    let column = |of: fn(&Click) -> u64| clicks.iter().map(|click| of(click)).collect::<Vec<u64>>();
    arrays.push_u64("clicks.time", &n, &column(|c| c.time.0 as u64));
    arrays.push_u64("clicks.id", &n, &column(|c| c.id));
    arrays.push_u64("clicks.content", &n, &column(|c| c.content));
    arrays.push_u64("clicks.partition_row", &n, &column(|c| u64::from(c.partition) << 32 | u64::from(c.row)));
    arrays.push_u64("clicks.offset", &n, &column(|c| c.offset));
    arrays.push_u64("clicks.event_time", &n, &column(|c| c.event_time.0 as u64));
    arrays.push_u64("clicks.flags", &n, &column(|c| u64::from(c.rejected) | u64::from(c.late) << 1));
    arrays
}

fn tower_arrays(towers: &two_tower::State, arrays: &mut Arrays) {
    let rows = &towers.rows;
    let count = rows.ids.len();
    arrays.push_u64("towers.ids", &[count], &rows.ids);
    arrays.push_f32("towers.w", &[rows.w.len()], &rows.w);
    arrays.push_f32("towers.n", &[rows.n.len()], &rows.n);
    arrays.push_u32("towers.touched", &[count], &rows.touched);
    arrays.push_f32("towers.params", &[towers.params.len()], &towers.params);
    arrays.push_f32("towers.mean", &[towers.dense.mean.len()], &towers.dense.mean);
    arrays.push_f32("towers.square", &[towers.dense.square.len()], &towers.dense.square);
    arrays.push_u64("towers.numbers", &[2], &[towers.dense.examples, towers.skipped]);
    push_periods("towers.periods", &towers.periods, arrays);
    admission_arrays("towers", &towers.admission, arrays);
}

/// What stands beside a table's rows, under its name.
fn admission_arrays(table: &str, state: &admission::State, arrays: &mut Arrays) {
    push_periods(&format!("{table}.eighths"), &state.eighths, arrays);
    let admission::Counts { admitted, refused, expired, evicted } = state.counts;
    arrays.push_u64(format!("{table}.admission"), &[4], &[admitted, refused, expired, evicted]);
    if let Some(counter) = &state.counter {
        let cells = counter.cells();
        arrays.push_u8(format!("{table}.counter"), &[cells.len()], &cells);
        arrays.push_i64(format!("{table}.counter_period"), &[1], &[counter.period()]);
    }
}

fn read_admission(table: &str, arrays: &Arrays) -> codec::Result<admission::State> {
    let wrong = |what: &str| codec::Error::Missing(format!("{what} of {table}"));
    let [admitted, refused, expired, evicted] = arrays.u64s(&format!("{table}.admission"))?[..] else {
        return Err(wrong("four counts of ids"));
    };
    let cells = format!("{table}.counter");
    let counter = match arrays.get(&cells) {
        Some(_) => {
            let [period] = arrays.i64s(&format!("{table}.counter_period"))?[..] else {
                return Err(wrong("the period of the counters"));
            };
            Some(admission::Counter::from_cells(period, &arrays.u8s(&cells)?))
        }
        None => None,
    };
    let counts = admission::Counts { admitted, refused, expired, evicted };
    Ok(admission::State { eighths: read_periods(&format!("{table}.eighths"), arrays)?, counter, counts })
}

fn push_periods(name: &str, list: &[(u32, i64)], arrays: &mut Arrays) {
    let (batches, periods): (Vec<u32>, Vec<i64>) = list.iter().copied().unzip();
    arrays.push_u32(format!("{name}.batches"), &[batches.len()], &batches);
    arrays.push_i64(name, &[periods.len()], &periods);
}

fn read_periods(name: &str, arrays: &Arrays) -> codec::Result<Vec<(u32, i64)>> {
    let (batches, periods) = (arrays.u32s(&format!("{name}.batches"))?, arrays.i64s(name)?);
    if batches.len() != periods.len() {
        return Err(codec::Error::Missing(format!("{name}, one for each of {name}.batches")));
    }
    Ok(batches.into_iter().zip(periods).collect())
}

fn read_towers(arrays: &Arrays) -> codec::Result<Option<two_tower::State>> {
    if arrays.get("towers.ids").is_none() {
        return Ok(None);
    }
    let rows = embedding::Rows {
        ids: arrays.u64s("towers.ids")?,
        w: arrays.f32s("towers.w")?,
        n: arrays.f32s("towers.n")?,
        touched: arrays.u32s("towers.touched")?,
    };
    let [examples, skipped] = arrays.u64s("towers.numbers")?[..] else {
        return Err(codec::Error::Missing("two of towers.numbers".to_owned()));
    };
    let dense = DenseState { examples, mean: arrays.f32s("towers.mean")?, square: arrays.f32s("towers.square")? };
    let (periods, admission) = (read_periods("towers.periods", arrays)?, read_admission("towers", arrays)?);
    let params = arrays.f32s("towers.params")?;
    Ok(Some(two_tower::State { rows, params, dense, periods, admission, skipped }))
}

/// A segment of seen ids as a file of its own.
#[must_use]
pub fn segment_arrays(segment: &Segment) -> Arrays {
    let mut arrays = Arrays::new();
    arrays.push_i64("start", &[1], &[segment.start.0]);
    arrays.push_u64("ids", &[segment.ids.len()], &segment.ids);
    let infos: Vec<i64> = segment.infos.iter().map(|info| info.to_bits()).collect();
    arrays.push_i64("infos", &[infos.len()], &infos);
    arrays
}

/// Reads what [`segment_arrays`] wrote.
pub fn read_segment(arrays: &Arrays) -> codec::Result<Arc<Segment>> {
    let start = Time(arrays.i64s("start")?.first().copied().unwrap_or(i64::MIN));
    let ids = arrays.u64s("ids")?;
    let infos = arrays.i64s("infos")?.into_iter().map(SeenInfo::from_bits).collect();
    Ok(Arc::new(Segment { start, ids, infos }))
}

/// Reads what [`arrays`] wrote: the state to restore, the model's and the metrics' state.
pub fn read(head: &Head, arrays: &Arrays, seen: Vec<Arc<Segment>>) -> codec::Result<(Restored, State, Vec<u64>)> {
    let z = arrays.get("model.z").map(|_| arrays.f32s("model.z")).transpose()?;
    let rows = Rows {
        ids: arrays.u64s("model.ids")?,
        w: arrays.f32s("model.w")?,
        n: arrays.f32s("model.n")?,
        z,
        touched: arrays.u32s("model.touched")?,
    };
    let intercept = arrays.f64s("model.intercept")?;
    let touched = arrays.u32s("model.intercept_touched")?;
    let wrong = |name: &str| codec::Error::Missing(name.to_owned());
    let [w, n] = intercept[..] else { return Err(wrong("model.intercept")) };
    let [touched] = touched[..] else { return Err(wrong("model.intercept_touched")) };
    let logistic = logistic::State {
        rows,
        intercept: Intercept { w, n, touched },
        periods: head.periods.clone(),
        counts: head.features.clone(),
        admission: read_admission("model", arrays)?,
    };
    let model = State { logistic, towers: read_towers(arrays)? };
    let columns = ["time", "id", "content", "partition_row", "offset", "event_time", "flags"];
    let columns = columns.map(|name| arrays.u64s(&format!("clicks.{name}")));
    let [time, id, content, at, offset, event_time, flags] = columns;
    let (time, id, content, at, offset, event_time, flags) = (time?, id?, content?, at?, offset?, event_time?, flags?);
    if [id.len(), content.len(), at.len(), offset.len(), event_time.len(), flags.len()] != [time.len(); 6] {
        return Err(wrong("clicks.* of one length"));
    }
    let clicks = (0..time.len()).map(|i| Click {
        time: Time(time[i] as i64),
        id: id[i],
        content: content[i],
        partition: (at[i] >> 32) as u32,
        offset: offset[i],
        row: at[i] as u32,
        event_time: Time(event_time[i] as i64),
        rejected: flags[i] & 1 != 0,
        late: flags[i] & 2 != 0,
    });
    let restored = Restored {
        place: head.place.clone(),
        partitions: head.partitions.clone(),
        journal: head.journal.clone(),
        clicks: clicks.collect(),
        seen,
        counts: head.counts,
        delays: head.delays.clone(),
        fuse: head.fuse,
    };
    Ok((restored, model, arrays.u64s("progress")?))
}
