//! Which ids have a row of their own: admission, expiry and eviction, the same for every table.
//!
//! An id is admitted by chance, or with its n-th occurrence, or both (McMahan et al., *Ad Click Prediction: a View from the
//! Trenches*, KDD 2013, section 4.1). Rows that nobody names expire, and the oldest make room, behind a batch. All of it is a
//! function of the examples in their order; whatever has no row counts as its feature's default row, which is never removed.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use super::Error;
use super::logistic::column;
use crate::event::Time;

/// `[model.logistic.table]`, `[model.two_tower.table]`: which ids have a row of their own. Those that have none share their
/// feature's default row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Chance by which an example gives a new id its row: of two examples with 0.5, one does. A hash of seed, id and
    /// impression decides. Above 0, at most 1. Default 1.
    pub admit: f64,
    /// An id gets its row only once it has come so often. Default: with its first occurrence.
    pub count: Option<CountSettings>,
    /// A row that no example has named for this long in event time goes; it is looked for eight times in that time, so it
    /// goes at most an eighth later. Default: rows stay.
    #[serde(with = "humantime_serde")]
    pub expire_after: Option<Duration>,
    /// Most rows after a batch, at least 1024. When there are more, those touched longest ago go (equal ones by id), until an
    /// eighth is free. Default: no bound.
    pub capacity: Option<usize>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { admit: 1.0, count: None, expire_after: None, capacity: None }
    }
}

/// `[model.logistic.table.count]`, `[model.two_tower.table.count]`: how often an id must come before it has a row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CountSettings {
    /// The occurrence that brings the row, counted in the current and the last period. 2 to 15. Default 2.
    pub occurrences: u8,
    /// Memory of the counters, a multiple of 64. Fewer bytes: more ids that get a row too early, never one too late.
    /// Default 16777216.
    pub bytes: usize,
    /// Length of a period of event time. Default 1d.
    #[serde(with = "humantime_serde")]
    pub per: Duration,
}

impl Default for CountSettings {
    fn default() -> Self {
        Self { occurrences: 2, bytes: 16 << 20, per: Duration::from_secs(24 * 60 * 60) }
    }
}

/// Where the settings stand, for messages.
pub(super) struct Keys {
    pub admit: &'static str,
    pub occurrences: &'static str,
    pub bytes: &'static str,
    pub per: &'static str,
    pub expire_after: &'static str,
    pub capacity: &'static str,
}

impl Settings {
    /// The checked form.
    pub(super) fn check(&self, keys: &Keys, seed: u64) -> Result<Rules, Error> {
        fn must(holds: bool, key: &'static str, expected: &'static str, got: impl ToString) -> Result<(), Error> {
            if holds { Ok(()) } else { Err(Error::Setting { key, expected, got: got.to_string() }) }
        }
        let text = |duration| humantime_serde::re::humantime::format_duration(duration).to_string();
        let ms = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let Self { admit, ref count, expire_after, capacity } = *self;
        must(admit > 0.0 && admit <= 1.0, keys.admit, "above 0 and at most 1", admit)?;
        if let Some(CountSettings { occurrences, bytes, per }) = *count {
            must((2..=15).contains(&occurrences), keys.occurrences, "2 to 15", occurrences)?;
            let fits = bytes.is_multiple_of(64) && (64..=1 << 38).contains(&bytes);
            must(fits, keys.bytes, "a multiple of 64, at most 274877906944", bytes)?;
            must(ms(per) >= 1, keys.per, "at least 1ms", text(per))?;
        }
        if let Some(after) = expire_after {
            must(ms(after) >= 8, keys.expire_after, "at least 8ms", text(after))?;
        }
        let capacity = capacity.unwrap_or(usize::MAX);
        must(capacity >= 1024, keys.capacity, "at least 1024", capacity)?;
        Ok(Rules {
            chance: if admit >= 1.0 { u64::MAX } else { (admit * u64::MAX as f64) as u64 },
            count: count.as_ref().map(|count| Count {
                occurrences: count.occurrences,
                lines: count.bytes / 64,
                per: ms(count.per),
            }),
            eighth: expire_after.map(|after| ms(after) / 8),
            capacity,
            seed: seed.wrapping_add(1),
        })
    }
}

/// Settings that were found good.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rules {
    chance: u64,
    count: Option<Count>,
    /// An eighth of the age at which rows expire, in ms.
    eighth: Option<i64>,
    capacity: usize,
    seed: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Count {
    occurrences: u8,
    lines: usize,
    /// In ms.
    per: i64,
}

impl Rules {
    /// Whether chance lets this impression give the id a row.
    #[inline]
    pub fn by_chance(&self, id: u64, impression: u64) -> bool {
        let hash = || {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&id.to_le_bytes());
            bytes[8..].copy_from_slice(&impression.to_le_bytes());
            xxh3_64_with_seed(&bytes, self.seed)
        };
        self.chance == u64::MAX || hash() <= self.chance
    }
}

/// What became of ids, since the start of the lineage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows that were made, default rows not counted.
    pub admitted: u64,
    /// Occurrences of ids without a row that did not get one.
    pub refused: u64,
    /// Rows removed for their age.
    pub expired: u64,
    /// Rows removed for want of room.
    pub evicted: u64,
}

impl Counts {
    /// By name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 4] {
        let Self { admitted, refused, expired, evicted } = *self;
        [("admitted", admitted), ("refused", refused), ("expired", expired), ("evicted", evicted)]
    }
}

/// Cells of a line, and of an id.
const CELLS: usize = 64;
const PROBES: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C, align(64))]
struct Line([u8; CELLS]);

/// How often ids without a row came, never less than it was, in memory of a fixed size: a counting Bloom filter (Fan et al.,
/// *Summary Cache*, IEEE/ACM ToN 2000) whose counters of an id share a cache line (Putze et al., WEA 2007) and are updated
/// conservatively (Estan and Varghese, SIGCOMM 2002). A cell holds two counts of 4 bits: that of the current period in the
/// low ones, that of the last in the high ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Counter {
    /// The current period, in event time.
    period: i64,
    lines: Vec<Line>,
}

impl Counter {
    fn new(lines: usize) -> Self {
        Self { period: i64::MIN, lines: vec![Line([0; CELLS]); lines] }
    }

    /// The counter with these cells; their number is a multiple of 64.
    #[must_use]
    pub fn from_cells(period: i64, cells: &[u8]) -> Self {
        Self { period, lines: cells.as_chunks().0.iter().map(|cells| Line(*cells)).collect() }
    }

    #[must_use]
    pub fn period(&self) -> i64 {
        self.period
    }

    #[must_use]
    pub fn cells(&self) -> Vec<u8> {
        self.lines.iter().flat_map(|line| line.0).collect()
    }

    /// Enters a period: the current one becomes the last. An earlier one changes nothing.
    fn enter(&mut self, period: i64) {
        if period <= self.period {
            return;
        }
        let follows = self.period.checked_add(1) == Some(period);
        for line in &mut self.lines {
            line.0.iter_mut().for_each(|cell| *cell = if follows { *cell << 4 } else { 0 });
        }
        self.period = period;
    }

    /// Whether this is at least the `occurrences`-th occurrence (at most 15) of an id; if not, it is counted. Ids are spread
    /// evenly, so their own bits say where their cells are.
    fn see(&mut self, id: u64, occurrences: u8) -> bool {
        let line = ((u128::from(id) * self.lines.len() as u128) >> 64) as usize;
        let cells = &mut self.lines[line].0;
        let at: [usize; PROBES] = std::array::from_fn(|probe| (id >> (6 * probe)) as usize % CELLS);
        let least = |count: fn(u8) -> u8| at.iter().fold(15, |least, &at| count(cells[at]).min(least));
        let (now, last) = (least(|cell| cell & 15), least(|cell| cell >> 4));
        if now + last + 1 >= occurrences {
            return true;
        }
        for at in at {
            if cells[at] & 15 == now {
                cells[at] += 1;
            }
        }
        false
    }
}

/// What a checkpoint holds beside a table's rows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// (number of its first batch, eighth of the age of expiry), both ascending, the last nine. Empty without expiry.
    pub eighths: Vec<(u32, i64)>,
    /// Only under admission by count.
    pub counter: Option<Counter>,
    pub counts: Counts,
}

impl State {
    /// Takes what later decisions depend on into a digest, so all but the counts. Takes nothing where there is nothing.
    pub(super) fn add_to(&self, hash: &mut Xxh3) {
        if !self.eighths.is_empty() {
            let eighths =
                self.eighths.iter().map(|&(batch, number)| ((number as u128) << 32 | u128::from(batch)).to_le_bytes());
            column(hash, self.eighths.len(), eighths);
        }
        if let Some(counter) = &self.counter {
            hash.update(&counter.period.to_le_bytes());
            column(hash, counter.lines.len(), counter.lines.iter().map(|line| line.0));
        }
    }
}

/// A table whose rows can be removed by age.
pub(super) trait Aged {
    fn len(&self) -> usize;
    /// Removes all rows but those that `keep` (of id and touched) says, and returns how many went.
    fn retain(&mut self, keep: impl Fn(u64, u32) -> bool) -> u64;
    /// The `count`-th smallest (touched, id) of the rows, from 0.
    fn by_age(&self, count: usize) -> Option<(u32, u64)>;
}

/// Who comes into a table, and who must leave.
pub(super) struct Gate {
    pub rules: Rules,
    pub state: State,
}

impl Gate {
    /// The gate that goes on from `state`. `part` names the table, for messages.
    pub fn new(rules: Rules, mut state: State, part: &'static str) -> Result<Self, Error> {
        let refuse = |what: String| Err(Error::State { part, what });
        if !state.eighths.is_sorted_by(|a, b| a.0 < b.0 && a.1 < b.1) {
            return refuse("ages of rows are not ascending".to_owned());
        }
        let lines = rules.count.map_or(0, |count| count.lines);
        let there = state.counter.as_ref().map(|counter| counter.lines.len());
        if there.is_some_and(|there| there != lines) {
            let there = there.unwrap_or(0) * CELLS;
            return refuse(format!("{there} bytes of counters where the settings give {}", lines * CELLS));
        }
        if lines > 0 && there.is_none() {
            state.counter = Some(Counter::new(lines));
        }
        Ok(Self { rules, state })
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        self.state.counter.as_ref().map_or(0, |counter| counter.lines.len() * size_of::<Line>())
    }

    /// In front of a batch.
    pub fn enter(&mut self, time: Time) {
        if let (Some(count), Some(counter)) = (self.rules.count, &mut self.state.counter) {
            counter.enter(time.0.div_euclid(count.per));
        }
    }

    /// Whether ids are counted before they get a row.
    pub fn counts(&self) -> bool {
        self.rules.count.is_some()
    }

    /// Whether an id without a row has come often enough, this time included. Asked in the order of the examples.
    pub fn by_count(&mut self, id: u64) -> bool {
        match (self.rules.count, &mut self.state.counter) {
            (Some(count), Some(counter)) => counter.see(id, count.occurrences),
            _ => true,
        }
    }

    /// Whether an id without a row gets one by this impression; counts what became of it.
    pub fn admits(&mut self, id: u64, impression: u64) -> bool {
        let admitted = self.by_count(id) && self.rules.by_chance(id, impression);
        let counts = &mut self.state.counts;
        *(if admitted { &mut counts.admitted } else { &mut counts.refused }) += 1;
        admitted
    }

    /// Behind a batch: removes rows that no example has named for long, and the oldest where there are too many, but none of
    /// `always`. Returns whether any went.
    pub fn tidy(&mut self, table: &mut impl Aged, always: &[u64], batch: u32, time: Time) -> bool {
        let (mut expired, mut evicted) = (0, 0);
        if let Some(eighth) = self.rules.eighth {
            let (now, eighths) = (time.0.div_euclid(eighth), &mut self.state.eighths);
            if eighths.is_empty() {
                // Rows that were there before count as touched now.
                eighths.push((0, now));
            } else if eighths.last().is_some_and(|&(_, last)| last < now) {
                // Rows touched before the first batch that is younger than eight eighths are too old.
                let young = eighths.iter().find(|&&(_, number)| number >= now - 8).map_or(batch, |&(first, _)| first);
                eighths.retain(|&(_, number)| number >= now - 8);
                eighths.push((batch, now));
                expired = table.retain(|id, touched| touched >= young || always.contains(&id));
            }
        }
        let (rows, capacity) = (table.len(), self.rules.capacity);
        if rows > capacity {
            // So many more that it suffices if rows that stay are among the oldest.
            let going = (rows - capacity / 8 * 7 + always.len()).min(rows - 1);
            if let Some(oldest) = table.by_age(going) {
                evicted = table.retain(|id, touched| (touched, id) >= oldest || always.contains(&id));
            }
        }
        self.state.counts.expired += expired;
        self.state.counts.evicted += evicted;
        expired + evicted > 0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    fn id(i: u32) -> u64 {
        xxh3_64(&i.to_le_bytes()).max(1)
    }

    fn gate(count: CountSettings) -> Gate {
        let settings = Settings { count: Some(count), ..Settings::default() };
        let keys = Keys { admit: "", occurrences: "", bytes: "", per: "", expire_after: "", capacity: "" };
        Gate::new(settings.check(&keys, 7).unwrap(), State::default(), "table").unwrap()
    }

    /// Exact counts of the current and the last period.
    #[derive(Default)]
    struct Exact {
        period: i64,
        now: HashMap<u64, u8>,
        last: HashMap<u64, u8>,
    }

    impl Exact {
        fn see(&mut self, period: i64, id: u64, occurrences: u8) -> bool {
            if period > self.period {
                self.last = if period == self.period + 1 { std::mem::take(&mut self.now) } else { HashMap::new() };
                self.now.clear();
                self.period = period;
            }
            let now = self.now.entry(id).or_default();
            if *now + self.last.get(&id).copied().unwrap_or(0) + 1 >= occurrences {
                return true;
            }
            *now += 1;
            false
        }
    }

    proptest! {
        #[test]
        fn an_id_is_never_admitted_later_than_by_exact_counts(
            seen in prop::collection::vec((0u32..300, 0i64..40), 1..1500), occurrences in 2u8..=15, lines in 1usize..40,
        ) {
            let mut gate = gate(CountSettings { occurrences, bytes: lines * 64, per: Duration::from_millis(400) });
            let (mut exact, mut time) = (Exact::default(), 0);
            let mut admitted = HashSet::new();
            for (i, later) in seen {
                // Some steps pass over a whole period.
                time += if later == 39 { 900 } else { later };
                gate.enter(Time(time));
                // What has a row is not counted.
                if admitted.contains(&i) {
                    continue;
                }
                let due = exact.see(time / 400, id(i), occurrences);
                if gate.by_count(id(i)) {
                    admitted.insert(i);
                }
                prop_assert!(admitted.contains(&i) || !due, "id {} at {}", i, time);
            }
        }
    }

    #[test]
    fn few_ids_are_admitted_too_early_and_the_more_memory_the_fewer() {
        // Bytes for each id of a period, and the share of ids that may be admitted with their first occurrence.
        for (per_id, most) in [(4, 0.06), (8, 0.011), (16, 0.0016), (32, 0.0003)] {
            let ids = 1u32 << 17;
            let mut gate = gate(CountSettings { bytes: per_id * ids as usize, ..CountSettings::default() });
            gate.enter(Time(0));
            let early = (0..ids).filter(|&i| gate.by_count(id(i))).count();
            let share = early as f64 / f64::from(ids);
            println!("{per_id} bytes an id: {share:.5}");
            assert!(share <= most, "{share} of the ids at {per_id} bytes each");
            assert!((0..ids).all(|i| gate.by_count(id(i))), "the second occurrence admits");
        }
    }

    #[test]
    fn an_occurrence_counts_in_its_period_and_the_next() {
        let admitted = |gap: i64| {
            let mut gate = gate(CountSettings { per: Duration::from_secs(1), ..CountSettings::default() });
            gate.enter(Time(500));
            assert!(!gate.by_count(id(1)));
            gate.enter(Time(500 + gap));
            gate.by_count(id(1))
        };
        assert!(admitted(0) && admitted(400) && admitted(1_400));
        assert!(!admitted(1_500) && !admitted(90_000));
    }

    #[test]
    fn a_counter_goes_on_from_its_cells() {
        let mut gate = gate(CountSettings { occurrences: 3, bytes: 1 << 12, per: Duration::from_millis(10) });
        gate.enter(Time(5));
        (0..900).for_each(|i| _ = gate.by_count(id(i % 400)));
        let counter = gate.state.counter.clone().unwrap();
        assert_eq!(Counter::from_cells(counter.period(), &counter.cells()), counter);
        let digest = |state: &State| {
            let mut hash = Xxh3::new();
            state.add_to(&mut hash);
            hash.digest128()
        };
        let before = (digest(&gate.state), digest(&State::default()));
        gate.by_count(id(900));
        assert_ne!(digest(&gate.state), before.0);
        assert_ne!(before.0, before.1);
        let wrong = State { counter: Some(Counter::new(2)), ..State::default() };
        let refused = Gate::new(gate.rules, wrong, "rows").err().unwrap().to_string();
        assert!(refused.contains("128 bytes of counters where the settings give 4096"), "{refused}");
    }
}
