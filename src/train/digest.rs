//! The digests of a state, and the marks that checkpoints leave: digests that stay when the checkpoint goes, for another run over
//! the same log to come to.
//!
//! A mark covers the rows that changed since the checkpoint before, and all that stands beside the rows, so it costs what a
//! checkpoint in increments costs. Where two runs have one mark after the other in common from the first on, they had the same
//! state at each: a row that no mark covers was not touched, and the sums of ids show what was removed.

use std::collections::HashMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::Xxh3;

use super::core::{Image, Place, Restored};
use crate::event::Time;
use crate::join::{self, Segment};
use crate::merge::{Click, JournalEntry, Key};
use crate::model::State;

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

    /// Of what [`image::read`](super::image::read) gave.
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
    let order = order_digest(image, &model, window, segment_digest);
    Digests { model, order }
}

/// The digest of what the order decides, with that of a model. `of_segment` is [`segment_digest`], or remembers what it gave.
#[must_use]
pub fn order_digest(
    image: &Ordered<'_>,
    model: &str,
    window: i64,
    mut of_segment: impl FnMut(&Segment) -> u128,
) -> String {
    let mut hash = Xxh3::new();
    let frontier = image.place.frontier.map_or(Time::MIN, |key| key.time);
    let passed = frontier.plus(window);
    let small = serde_json::to_vec(&(model, image.place, image.counts, image.delays)).expect("plain data");
    words(&mut hash, small.iter().map(|byte| u64::from(*byte)));
    words(&mut hash, image.progress.iter().copied());
    let seen = image.seen.iter().map(|segment| of_segment(segment));
    words(&mut hash, seen.flat_map(|digest| [digest as u64, (digest >> 64) as u64]));
    let mut clicks: Vec<&Click> = image.clicks.iter().filter(|click| click.time <= passed).collect();
    clicks.sort_unstable();
    words(
        &mut hash,
        clicks.iter().flat_map(|c| {
            [
                c.time.0 as u64,
                c.id,
                c.content,
                u64::from(c.partition),
                c.offset,
                u64::from(c.row),
                c.event_time.0 as u64,
            ]
        }),
    );
    let journal = image.journal.iter().filter(|entry| entry.time <= frontier);
    let mut journal: Vec<String> = journal.map(|entry| format!("{entry:?}")).collect();
    journal.sort_unstable();
    words(&mut hash, journal.iter().map(|line| xxhash_rust::xxh3::xxh3_64(line.as_bytes())));
    format!("{:032x}", hash.digest128())
}

/// The digest of a segment of seen ids.
#[must_use]
pub fn segment_digest(segment: &Segment) -> u128 {
    let mut hash = Xxh3::new();
    words(&mut hash, segment.ids.iter().copied());
    words(&mut hash, segment.infos.iter().map(|info| info.to_bits() as u64));
    hash.digest128()
}

/// Takes words into a digest, and their number.
fn words(hash: &mut Xxh3, words: impl Iterator<Item = u64>) {
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
}

/// Digests of a state at a batch boundary. xxh3-128 in hex, where no other type is said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    pub batch: u64,
    pub frontier: Key,
    /// Covered are rows that a batch behind this one changed. None: all rows.
    pub since: Option<u64>,
    /// Rows of the logistic and of the embedding table, and the sums of their ids, in hex.
    pub rows: [usize; 2],
    pub ids: [String; 2],
    /// Covered rows of the two tables.
    pub logistic: String,
    pub embedding: String,
    /// All of the model but rows: intercept, dense parameters, optimizers, admission.
    pub beside: String,
    /// Counters, metrics, seen ids, clicks up to frontier + window, first unreleased positions, journal.
    pub order: String,
}

impl Mark {
    /// Whether the tables have other rows.
    #[must_use]
    pub fn rows_differ(&self, other: &Self) -> bool {
        (self.rows, &self.ids, &self.logistic, &self.embedding)
            != (other.rows, &other.ids, &other.logistic, &other.embedding)
    }

    /// The first thing in which two marks of one boundary differ, in words; none if they are equal.
    #[must_use]
    pub fn differs(&self, other: &Self) -> Option<&'static str> {
        let parts = [
            (self.logistic == other.logistic, "rows of the logistic table"),
            ((self.rows[0], &self.ids[0]) == (other.rows[0], &other.ids[0]), "which ids the logistic table has"),
            (self.embedding == other.embedding, "rows of the embedding table"),
            ((self.rows[1], &self.ids[1]) == (other.rows[1], &other.ids[1]), "which ids the embedding table has"),
            (self.beside == other.beside, "the intercept, dense parameters, their optimizer or admission"),
            (self.order == other.order, "counts, metrics, seen ids, clicks or positions"),
            (self == other, "where it stands"),
        ];
        parts.into_iter().find(|(same, _)| !same).map(|(_, what)| what)
    }
}

/// A checkpoint that was written once, as the history of its directory names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Past {
    pub number: u64,
    pub lineage: String,
    pub mark: Mark,
}

/// Those of a lineage that lie on the way to where it is now, in their order: where it went on from an earlier checkpoint than
/// its newest, what it had come to before counts no more.
#[must_use]
pub fn way(history: Vec<Past>, lineage: &str) -> Vec<Past> {
    let mut way: Vec<Past> = Vec::new();
    for past in history.into_iter().filter(|past| past.lineage == lineage) {
        let keep = |before: &Past| {
            past.mark.since.is_some_and(|since| before.mark.batch <= since)
                && (before.mark.batch, before.mark.frontier) <= (past.mark.batch, past.mark.frontier)
        };
        while way.last().is_some_and(|before| !keep(before)) {
            way.pop();
        }
        way.push(past);
    }
    way
}

/// Makes the marks of one run, in their order.
#[derive(Debug)]
pub struct Marker {
    window: i64,
    /// Digests of segments of seen ids by (start, ids), since a closed segment never changes.
    seen: HashMap<(Time, usize), u128>,
}

impl Marker {
    /// `window`: the attribution window, in ms.
    #[must_use]
    pub fn new(window: i64) -> Self {
        Self { window, seen: HashMap::new() }
    }

    /// The mark of an image, whose model in canonical order is `model`, over the rows changed behind batch `since`: of these
    /// the image must have all. None before the first batch boundary.
    pub fn mark(&mut self, image: &Image, model: &State, since: Option<u64>) -> Option<Mark> {
        let frontier = image.place.frontier?;
        let mut seen = HashMap::with_capacity(image.seen.len());
        let order = order_digest(&Ordered::of(image), "", self.window, |segment| {
            let key = (segment.start, segment.ids.len());
            let digest = self.seen.get(&key).copied().unwrap_or_else(|| segment_digest(segment));
            seen.insert(key, digest);
            digest
        });
        self.seen = seen;
        let changed = |touched: u32| since.is_none_or(|since| u64::from(touched) > since);
        let rows = &model.logistic.rows;
        let mut logistic = Xxh3::new();
        for (i, &id) in rows.ids.iter().enumerate().filter(|&(i, _)| changed(rows.touched[i])) {
            let z = rows.z.as_ref().map_or(0.0, |z| z[i]);
            let mut bytes = [0; 24];
            bytes[..8].copy_from_slice(&id.to_le_bytes());
            let words = [rows.w[i].to_bits(), rows.n[i].to_bits(), z.to_bits(), rows.touched[i]];
            bytes[8..].chunks_exact_mut(4).zip(words).for_each(|(to, word)| to.copy_from_slice(&word.to_le_bytes()));
            logistic.update(&bytes);
        }
        let mut embedding = Xxh3::new();
        if let Some(towers) = &model.towers {
            let (rows, count) = (&towers.rows, towers.rows.ids.len().max(1));
            let (dim, width) = (rows.w.len() / count, rows.n.len() / count);
            let mut bytes = Vec::with_capacity(12 + 4 * (dim + width));
            for (i, &id) in rows.ids.iter().enumerate().filter(|&(i, _)| changed(rows.touched[i])) {
                bytes.clear();
                bytes.extend_from_slice(&id.to_le_bytes());
                bytes.extend_from_slice(&rows.touched[i].to_le_bytes());
                let numbers = rows.w[i * dim..][..dim].iter().chain(&rows.n[i * width..][..width]);
                bytes.extend(numbers.flat_map(|number| number.to_le_bytes()));
                embedding.update(&bytes);
            }
        }
        let hex = |digest: u128| format!("{digest:032x}");
        Some(Mark {
            batch: image.place.batches,
            frontier,
            since,
            rows: image.model.rows,
            ids: image.model.id_sums.map(|sum| format!("{sum:016x}")),
            logistic: hex(logistic.digest128()),
            embedding: hex(embedding.digest128()),
            beside: hex(model.digest_beside_rows()),
            order,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Stream;

    fn key(time: i64) -> Key {
        Key { time: Time(time), stream: Stream::Impressions, id: 0, content: 0, partition: 0, offset: 0, row: 0 }
    }

    /// Checkpoint `number` of a lineage at a batch and a time, behind one at batch `since`.
    fn past(number: u64, batch: u64, time: i64, since: Option<u64>) -> Past {
        let (empty, ids) = (String::new(), [String::new(), String::new()]);
        let [logistic, embedding, beside, order] = [(); 4].map(|()| empty.clone());
        let mark = Mark { batch, frontier: key(time), since, rows: [0; 2], ids, logistic, embedding, beside, order };
        Past { number, lineage: "ours".to_owned(), mark }
    }

    fn numbers(history: &[Past]) -> Vec<u64> {
        way(history.to_vec(), "ours").iter().map(|past| past.number).collect()
    }

    #[test]
    fn what_a_lineage_came_to_before_it_went_on_from_an_earlier_checkpoint_counts_no_more() {
        let other = Past { lineage: "theirs".to_owned(), ..past(9, 1, 1, None) };
        let mut history = vec![past(1, 3, 30, None), other, past(2, 5, 50, Some(3)), past(3, 8, 80, Some(5))];
        assert_eq!(numbers(&history), [1, 2, 3]);
        // Checkpoint 3 was damaged: it goes on from 2, to somewhere in front of 3.
        history.push(past(3, 7, 70, Some(5)));
        assert_eq!(numbers(&history), [1, 2, 3]);
        assert_eq!(way(history.clone(), "ours")[2].mark.batch, 7);
        // The last of a run may stand where the one before stands, and so may one of batches without examples.
        history.extend([past(4, 7, 70, Some(7)), past(5, 7, 75, Some(7))]);
        assert_eq!(numbers(&history), [1, 2, 3, 4, 5]);
        history.push(past(4, 7, 72, Some(7)));
        assert_eq!(numbers(&history), [1, 2, 3, 4, 4]);
        // Begun anew, as the same lineage.
        history.push(past(1, 2, 20, None));
        assert_eq!(numbers(&history), [1]);
    }

    #[test]
    fn marks_that_differ_say_in_what_and_the_tables_come_first() {
        let mark = past(1, 3, 30, None).mark;
        assert_eq!((mark.differs(&mark), mark.rows_differ(&mark)), (None, false));
        let with = |change: fn(&mut Mark)| {
            let mut other = mark.clone();
            change(&mut other);
            (mark.differs(&other).unwrap(), mark.rows_differ(&other))
        };
        assert_eq!(with(|mark| mark.logistic.push('0')), ("rows of the logistic table", true));
        assert_eq!(with(|mark| mark.ids[0].push('0')), ("which ids the logistic table has", true));
        assert_eq!(with(|mark| mark.rows[1] = 4), ("which ids the embedding table has", true));
        let (what, rows) = with(|mark| (mark.beside.push('0'), mark.order.push('0')).0);
        assert!(what.starts_with("the intercept") && !rows);
        assert!(with(|mark| mark.order.push('0')).0.starts_with("counts"));
        assert_eq!(with(|mark| mark.batch = 4), ("where it stands", false));
    }
}
