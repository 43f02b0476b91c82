//! The state at a batch boundary as a checkpoint holds it, and its two digests.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::checkpoint::Loaded;
use super::core::{Image, Place, Restored};
use super::digest::Mark;
use crate::event::Time;
use crate::join::{self, SeenInfo, Segment};
use crate::merge::{Click, JournalEntry, PartitionPosition};
use crate::model::logistic::{FeatureCounts, Intercept};
use crate::model::optim::DenseState;
use crate::model::table::Rows;
use crate::model::{State, admission, embedding, logistic, two_tower};
use crate::snapshot::codec::{self, Arrays};

/// Version of the checkpoint's content. A reader refuses another one.
pub const FORMAT: u32 = 4;

/// Names of segments: stretches of seen ids, and rows of tables.
pub const SEEN: &str = "seen";
pub const ROWS: &str = "rows";

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
    /// The feature schema, as snapshots have it.
    pub schema: serde_json::Value,
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
    /// Rows of the logistic and of the embedding table, which the chain of model files must come to.
    pub rows: [usize; 2],
    /// Bytes of the predictions file that belong to this state; `None` where none is written.
    pub predictions: Option<u64>,
    /// What another run must come to here. None before the first batch boundary.
    pub mark: Option<Mark>,
}

/// The small arrays of a checkpoint. Neither seen ids nor the rows of tables are among them: those are in files of their own,
/// see [`segment_arrays`] and [`row_arrays`].
#[must_use]
pub fn arrays(image: &Image, model: &State) -> Arrays {
    let mut arrays = Arrays::new();
    if let Some(towers) = &model.towers {
        tower_arrays(towers, &mut arrays);
    }
    let model = &model.logistic;
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

/// The rows of an image's tables as a file of its own: all of them, or those that changed behind the batch of the file before
/// it in its chain, with the ids that went. `model` is the image's model in canonical order.
#[must_use]
pub fn row_arrays(image: &Image, model: &State) -> Arrays {
    let mut arrays = Arrays::new();
    let rows = &model.logistic.rows;
    arrays.push_u64("model.ids", &[rows.ids.len()], &rows.ids);
    arrays.push_f32("model.w", &[rows.w.len()], &rows.w);
    arrays.push_f32("model.n", &[rows.n.len()], &rows.n);
    if let Some(z) = &rows.z {
        arrays.push_f32("model.z", &[z.len()], z);
    }
    arrays.push_u32("model.touched", &[rows.touched.len()], &rows.touched);
    if let Some(towers) = &model.towers {
        let rows = &towers.rows;
        arrays.push_u64("towers.ids", &[rows.ids.len()], &rows.ids);
        arrays.push_f32("towers.w", &[rows.w.len()], &rows.w);
        arrays.push_f32("towers.n", &[rows.n.len()], &rows.n);
        arrays.push_u32("towers.touched", &[rows.touched.len()], &rows.touched);
    }
    let [logistic, towers] = image.model.removed();
    arrays.push_u64("model.removed", &[logistic.len()], logistic);
    arrays.push_u64("towers.removed", &[towers.len()], towers);
    let span: Vec<u64> = image.since.map(u64::from).into_iter().chain([image.place.batches]).collect();
    arrays.push_u64("batches", &[span.len()], &span);
    arrays
}

/// Refuses files of rows that do not follow one another from one with all rows up to number `batch`.
fn check_chain(chain: &[RowFile], batch: u64) -> codec::Result<()> {
    let mut at = None;
    for RowFile { span, .. } in chain {
        at = match (at, &span[..]) {
            (None, &[to]) => Some(to),
            (Some(from), &[after, to]) if after == from => Some(to),
            _ => {
                let expected = at.map_or("with all rows".to_owned(), |at| format!("of changes behind batch {at}"));
                return Err(codec::Error::Missing(format!("batches of a file {expected}, found {span:?}")));
            }
        };
    }
    if at == Some(batch) {
        return Ok(());
    }
    Err(codec::Error::Missing(format!("batches of files of rows that come to batch {batch}, they come to {at:?}")))
}

/// Columns of rows by id: for the logistic table w, n and perhaps z, for the embedding table w and n.
struct Columns {
    ids: Vec<u64>,
    floats: Vec<Vec<f32>>,
    touched: Vec<u32>,
}

impl Columns {
    fn read(table: &str, arrays: &Arrays) -> codec::Result<Self> {
        let name = |column: &str| format!("{table}.{column}");
        let columns = ["w", "n", "z"].map(name).into_iter().filter(|name| arrays.get(name).is_some());
        let floats = columns.map(|name| arrays.f32s(&name)).collect::<codec::Result<Vec<_>>>()?;
        let (ids, touched) = (arrays.u64s(&name("ids"))?, arrays.u32s(&name("touched"))?);
        if touched.len() != ids.len() || floats.iter().any(|column| column.len() % ids.len().max(1) != 0) {
            return Err(codec::Error::Missing(format!("columns of {table} of one length")));
        }
        Ok(Self { ids, floats, touched })
    }
}

/// What a file of rows says of one table: rows, and ids that went.
struct Piece {
    rows: Columns,
    removed: Vec<u64>,
}

impl Piece {
    fn read(table: &str, arrays: &Arrays) -> codec::Result<Self> {
        Ok(Self { rows: Columns::read(table, arrays)?, removed: arrays.u64s(&format!("{table}.removed"))? })
    }
}

/// What [`row_arrays`] wrote.
pub struct RowFile {
    /// Number of the batch behind which its rows are those that changed, if they are not all, and of the batch they stand at.
    span: Vec<u64>,
    logistic: Piece,
    embedding: Option<Piece>,
}

impl RowFile {
    pub fn read(arrays: &Arrays) -> codec::Result<Self> {
        let has = arrays.get("towers.ids").is_some();
        Ok(Self {
            span: arrays.u64s("batches")?,
            logistic: Piece::read("model", arrays)?,
            embedding: has.then(|| Piece::read("towers", arrays)).transpose()?,
        })
    }
}

/// The file with all rows that a chain of files comes to, of which the last is that of `image`. So all rows are written now and
/// then, and the core copies none of them.
pub fn whole_rows(chain: Vec<RowFile>, image: &Image) -> codec::Result<Arrays> {
    let batch = image.place.batches;
    check_chain(&chain, batch)?;
    let (logistic, embedding): (_, Vec<_>) = chain.into_iter().map(|file| (file.logistic, file.embedding)).unzip();
    let embedding = embedding.into_iter().collect::<Option<Vec<_>>>();
    let tables = [("model", Some(logistic)), ("towers", embedding)];
    let mut arrays = Arrays::new();
    for (i, (table, files)) in tables.into_iter().enumerate() {
        let Some(files) = files else { continue };
        let rows = merge(table, files, image.model.rows[i])?;
        if rows.ids.iter().fold(0, |sum: u64, id| sum.wrapping_add(*id)) != image.model.id_sums[i] {
            return Err(codec::Error::Missing(format!("the ids that {table} has: its files come to others")));
        }
        arrays.push_u64(format!("{table}.ids"), &[rows.ids.len()], &rows.ids);
        for (name, column) in ["w", "n", "z"].iter().zip(&rows.floats) {
            arrays.push_f32(format!("{table}.{name}"), &[column.len()], column);
        }
        arrays.push_u32(format!("{table}.touched"), &[rows.touched.len()], &rows.touched);
    }
    ["model.removed", "towers.removed"].into_iter().for_each(|name| arrays.push_u64(name, &[0], &[]));
    arrays.push_u64("batches", &[1], &[batch]);
    Ok(arrays)
}

/// The rows of a table that a chain of files comes to: the first holds all rows, each other one what changed since.
fn merge(table: &str, files: Vec<Piece>, count: usize) -> codec::Result<Columns> {
    // What became of each id last: a row of a file, or nothing.
    let mut last: Vec<(u64, Reverse<usize>, Option<usize>)> = Vec::new();
    for (at, Piece { rows, removed }) in files.iter().enumerate().skip(1) {
        last.extend((0..).zip(&rows.ids).map(|(row, &id)| (id, Reverse(at), Some(row))));
        last.extend(removed.iter().map(|&id| (id, Reverse(at), None)));
    }
    let mut files: Vec<Columns> = files.into_iter().map(|piece| piece.rows).collect();
    last.sort_unstable();
    last.dedup_by_key(|(id, ..)| *id);
    let mut from: Vec<(usize, usize)> = Vec::with_capacity(files.first().map_or(0, |full| full.ids.len()) + last.len());
    let mut last = last.into_iter().peekable();
    for (row, &id) in files.first().map_or(&[][..], |full| &full.ids).iter().enumerate() {
        while let Some((_, Reverse(at), new)) = last.next_if(|(changed, ..)| *changed < id) {
            from.extend(new.map(|row| (at, row)));
        }
        match last.next_if(|(changed, ..)| *changed == id) {
            Some((_, Reverse(at), new)) => from.extend(new.map(|row| (at, row))),
            None => from.push((0, row)),
        }
    }
    from.extend(last.filter_map(|(_, Reverse(at), new)| Some((at, new?))));
    if from.len() != count {
        let found = from.len();
        return Err(codec::Error::Missing(format!("{count} rows of {table}: its files come to {found}")));
    }
    if files.len() == 1 {
        return Ok(files.remove(0));
    }
    let columns = files.first().map_or(0, |full| full.floats.len());
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let mut widths = files.iter().filter(|file| !file.ids.is_empty()).map(|file| {
                let values = file.floats.get(column)?.len();
                Some(values / file.ids.len())
            });
            let width = widths.next().unwrap_or(Some(0));
            width.filter(|_| widths.all(|other| other == width))
        })
        .collect::<Option<_>>()
        .ok_or_else(|| codec::Error::Missing(format!("columns of {table} of one width in each file of rows")))?;
    Ok(Columns {
        ids: from.iter().map(|&(at, row)| files[at].ids[row]).collect(),
        floats: (0..)
            .zip(widths)
            .map(|(column, width)| {
                let mut values = Vec::with_capacity(from.len() * width);
                from.iter().for_each(|&(at, row)| {
                    values.extend_from_slice(&files[at].floats[column][row * width..][..width]);
                });
                values
            })
            .collect(),
        touched: from.iter().map(|&(at, row)| files[at].touched[row]).collect(),
    })
}

fn tower_arrays(towers: &two_tower::State, arrays: &mut Arrays) {
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

fn read_towers(arrays: &Arrays, chain: Option<Vec<Piece>>, count: usize) -> codec::Result<Option<two_tower::State>> {
    if arrays.get("towers.params").is_none() {
        return Ok(None);
    }
    let chain = chain.ok_or_else(|| codec::Error::Missing("rows of towers in each file of rows".to_owned()))?;
    let Columns { ids, floats, touched } = merge("towers", chain, count)?;
    let Ok([w, n]) = <[_; 2]>::try_from(floats) else {
        return Err(codec::Error::Missing("towers.w and towers.n".to_owned()));
    };
    let rows = embedding::Rows { ids, w, n, touched };
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
fn read_segment(arrays: &Arrays) -> codec::Result<Arc<Segment>> {
    let start = Time(arrays.i64s("start")?.first().copied().unwrap_or(i64::MIN));
    let ids = arrays.u64s("ids")?;
    let infos = arrays.i64s("infos")?.into_iter().map(SeenInfo::from_bits).collect();
    Ok(Arc::new(Segment { start, ids, infos }))
}

/// Reads what [`arrays`], [`segment_arrays`] and, in their order, [`row_arrays`] wrote: the state to restore, the model's and
/// the metrics' state. `head` is that of `loaded`.
pub fn read(head: &Head, loaded: &Loaded) -> codec::Result<(Restored, State, Vec<u64>)> {
    let arrays = &loaded.arrays;
    let segments = |name: &'static str| {
        loaded.segments.iter().filter(move |(segment, _)| segment.name == name).map(|(_, arrays)| arrays)
    };
    let seen = segments(SEEN).map(read_segment).collect::<codec::Result<_>>()?;
    let chain = segments(ROWS).map(RowFile::read).collect::<codec::Result<Vec<_>>>()?;
    check_chain(&chain, head.place.batches)?;
    let (rows, vectors): (_, Vec<_>) = chain.into_iter().map(|file| (file.logistic, file.embedding)).unzip();
    let Columns { ids, floats, touched } = merge("model", rows, head.rows[0])?;
    let mut floats = floats.into_iter();
    let (Some(w), Some(n), z) = (floats.next(), floats.next(), floats.next()) else {
        return Err(codec::Error::Missing("model.w and model.n".to_owned()));
    };
    let rows = Rows { ids, w, n, z, touched };
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
    let model = State { logistic, towers: read_towers(arrays, vectors.into_iter().collect(), head.rows[1])? };
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
