//! The ordered merge: what may be released, and what has to be read before more may.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::reorder::Reorder;
use super::silence::{Heard, MEMORY, Silence};
use super::watermark::{Bounds, Placing, Watermark};
use crate::event::{Chunk, Kind, Record, Stream, Time};
use crate::position::{Fingerprint, NextOffset};

/// A record's place in the total order. Position comes last: while nothing is late, the layout does not matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Key {
    pub time: Time,
    pub stream: Stream,
    pub id: u64,
    pub content: u64,
    pub partition: u32,
    pub offset: u64,
    pub row: u32,
}

/// Rules of one stream.
#[derive(Clone, Copy, Debug)]
pub struct StreamRules {
    pub bounds: Bounds,
    /// A caught-up partition that is silent for this long (ms of wall time) is no longer awaited; `None`: for ever awaited.
    pub idle_after: Option<i64>,
    /// A partition whose watermark is this far (ms) behind the furthest of its stream is no longer awaited.
    pub max_lag: Option<i64>,
}

/// Rules of the merge.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    pub impressions: StreamRules,
    pub clicks: StreamRules,
    /// Attribution window, ms. Only meaningful where there are click partitions.
    pub window: i64,
    /// Impressions at or after this time are not released; the merge ends there.
    pub until: Option<Time>,
    /// After this much silence (ms of wall time) of the whole click stream, it is no longer awaited; `None`: for ever.
    pub quiet_after: Option<i64>,
    /// A silent click partition that should have brought this many clicks since is stalled, and awaited; 0: none ever is.
    pub expected: u64,
}

/// What the runtime decided about one record, and a replay must decide again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum Decision {
    /// Came when its stream had already passed its place: it and its partition's watermark were moved to this time.
    Overtaken(Time),
    /// Its event time was too far past the clock at reading.
    Rejected,
    /// The log had dropped the records from this offset on before they were read, and an operator let it go on at `to`.
    Skipped { to: u64 },
    /// By an operator's word: a click partition is not awaited before the record at this offset comes.
    Waived,
    /// By an operator's word: the batch that starts with this impression is learned, whatever its click-through rate.
    Accepted,
}

impl Decision {
    /// Whether it moved or rejected the record at its offset.
    fn places(self) -> bool {
        matches!(self, Self::Overtaken(_) | Self::Rejected)
    }
}

/// One decision of the runtime, with the record it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JournalEntry {
    pub partition: u32,
    pub offset: u64,
    pub row: u32,
    pub decision: Decision,
    /// The place the record took, so that a reader knows which entries lie before a frontier.
    pub time: Time,
}

/// A click as the merge and the join keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Click {
    pub time: Time,
    pub id: u64,
    pub content: u64,
    pub partition: u32,
    pub offset: u64,
    pub row: u32,
    pub event_time: Time,
    /// Not a usable click; only counted when its place is passed.
    pub rejected: bool,
    pub late: bool,
}

/// A released impression; its data is reached through [`Merge::record`] until the next call of [`Merge::release`].
#[derive(Clone, Copy, Debug)]
pub struct Released {
    pub key: Key,
    pub late: bool,
    pub rejected: bool,
    /// The click log ended before this impression's window did.
    pub cut: bool,
    chunk: u64,
    index: u32,
}

/// Why nothing can be released just now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitReason {
    /// More impressions must be read.
    Impressions,
    /// More clicks must be read.
    Clicks,
    /// No click partition speaks, and the click stream as a whole is always awaited; or one is silent that is never idle.
    ClickSilence,
    /// A click partition is silent while others bring so many clicks that its own must be missing somewhere.
    ClickStalled,
    /// Nothing is known to be there at all.
    Idle,
}

/// Whether an impression can be released.
#[derive(Clone, Copy, Debug)]
pub enum Ready {
    /// The next impression lies at `time` in partition `from`; `cut`: the click log ended before its window did.
    Impression { from: usize, time: Time, cut: bool },
    /// Not yet; reading partition `on` brings the release closest, if anything does.
    Wait { on: Option<usize>, why: WaitReason },
    /// Bounded input: all that was to be released has been.
    End,
}

/// A partition does not hold what was read of it before.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{partition}` is not the log that was read before: what stands before offset {offset} is another record. A log may only \
     grow: bring the old content back to go on, or give the new content a new name"
)]
pub struct Rewritten {
    pub partition: String,
    pub offset: u64,
}

/// Whether a partition is awaited, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Attention {
    /// Nothing is released that it could still come before.
    Awaited,
    /// Awaited although it is silent: its clicks are missing.
    Stalled,
    /// Not awaited until its next record: silent, and credibly so.
    Idle,
    /// Not awaited until it has caught up: too far behind the others.
    LeftBehind,
    /// Not awaited until its next record, by an operator's word.
    Waived,
    /// Bounded input that was read to its end, or a file that is gone.
    Ended,
}

impl Attention {
    /// All, as metrics name them.
    pub const ALL: [Self; 6] = [Self::Awaited, Self::Stalled, Self::Idle, Self::LeftBehind, Self::Waived, Self::Ended];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Awaited => "awaited",
            Self::Stalled => "stalled",
            Self::Idle => "idle",
            Self::LeftBehind => "left_behind",
            Self::Waived => "waived",
            Self::Ended => "ended",
        }
    }
}

/// What the merge says when asked for the next record.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    Click(Click),
    Impression(Released),
    /// Nothing yet; reading partition `on` brings the release closest, if anything does.
    Wait {
        on: Option<usize>,
        why: WaitReason,
    },
    /// Bounded input: all that was to be released has been.
    End,
}

/// Where a partition stood, for a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PartitionPosition {
    pub name: String,
    pub stream: Stream,
    /// Where to read on. Impressions: the chunk that holds the first unreleased record. Clicks: the read point.
    pub from: NextOffset,
    /// The watermark before `from`.
    pub watermark: Time,
    /// First offset never read. Records from `from` to here with a key at or before the frontier are skipped.
    pub read: NextOffset,
    /// Clicks: its part in the stream, by which its silence is judged.
    #[serde(default, skip_serializing_if = "Heard::is_unknown")]
    pub heard: Heard,
}

/// An impression that was read and not yet released.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Pending {
    time: Time,
    id: u64,
    content: u64,
    offset: u64,
    row: u32,
    index: u32,
    chunk: u64,
    late: bool,
    rejected: bool,
}

/// A chunk with records that were not yet released.
#[derive(Debug)]
pub struct Held {
    chunk: Box<Chunk>,
    start: NextOffset,
    /// The watermark before the chunk's first record.
    watermark: Time,
    left: u32,
}

#[derive(Debug)]
enum Queue {
    Impressions { pending: Reorder<Pending>, held: VecDeque<Held>, first_held: u64 },
    Clicks(Reorder<Click>),
}

#[derive(Debug)]
struct Partition {
    name: String,
    stream: Stream,
    watermark: Watermark,
    queue: Queue,
    read: NextOffset,
    /// Before this offset everything was read by an earlier run: nothing there is overtaken or rejected anew.
    known: NextOffset,
    /// Journal entries of this partition at or after `from`, by (offset, row).
    decided: BTreeMap<(u64, u32), (Option<Time>, bool)>,
    caught_up: Option<Time>,
    /// When its end was confirmed last, whether or not more has come since.
    last_end: Option<Time>,
    /// Caught up, and silent for `idle_after`.
    silent: bool,
    idle: bool,
    left_behind: bool,
    ended: bool,
    heard: Heard,
    /// Silent, and its clicks are missing.
    stalled: bool,
    /// A batch was held that was labelled without it: awaited until one of those that were missing speaks.
    suspect: bool,
    /// The others have been read ahead since it fell silent, to see whether that is credible.
    looked: bool,
    /// An operator's word: not awaited while it reads on from here.
    waived: Option<u64>,
    /// The watermark that the records alone gave, kept when the end lifts `watermark` to the end of time.
    real: Time,
    /// Where this run began to read it, and the watermark there.
    start: (NextOffset, Time),
}

impl Partition {
    fn awaited(&self) -> bool {
        matches!(self.attention(), Attention::Awaited | Attention::Stalled | Attention::Ended)
    }

    fn attention(&self) -> Attention {
        if self.ended {
            Attention::Ended
        } else if self.waived == Some(self.read.offset) {
            Attention::Waived
        } else if self.stalled || self.suspect {
            Attention::Stalled
        } else if self.idle {
            Attention::Idle
        } else if self.left_behind {
            Attention::LeftBehind
        } else {
            Attention::Awaited
        }
    }

    /// Clicks of which others at or before this time say nothing about its silence: the latest that it has brought.
    fn heard_up_to(&self, bounds: Bounds) -> Time {
        self.real.plus(bounds.out_of_order)
    }

    /// It has spoken: all that was held against it is over.
    fn spoke(&mut self) {
        (self.idle, self.silent, self.looked) = (false, false, false);
        (self.stalled, self.suspect, self.heard.silence) = (false, false, None);
        self.caught_up = None;
    }

    fn head_time(&self) -> Option<(Time, u64, u64)> {
        match &self.queue {
            Queue::Impressions { pending, .. } => pending.peek().map(|p| (p.time, p.id, p.content)),
            Queue::Clicks(clicks) => clicks.peek().map(|c| (c.time, c.id, c.content)),
        }
    }
}

/// How far release may go, given what has been read.
#[derive(Clone, Copy, Debug)]
struct Limits {
    /// Impressions strictly before this time may go, as far as impressions are concerned.
    impressions: Time,
    /// An impression may go if its time plus the window is strictly before this.
    clicks: Time,
}

/// The ordered merge of all partitions. See the module's documentation.
#[derive(Debug)]
pub struct Merge {
    rules: Rules,
    partitions: Vec<Partition>,
    frontier: Option<Key>,
    /// The frontier this run started from: re-read records at or before it are skipped.
    resumed: Option<Key>,
    journal: Vec<JournalEntry>,
    limits: Limits,
    /// See [`Merge::is_certain`].
    certain: Limits,
    /// (partition, time) of the smallest click, if any is queued.
    next_click: Option<(usize, Time)>,
    /// (partition, time) of the smallest impression, if any is pending.
    next_impression: Option<(usize, Time)>,
    last: Option<Released>,
    #[expect(clippy::vec_box, reason = "the box travels on, with its address and its memory")]
    recycled: Vec<Box<Chunk>>,
    quiet: bool,
    /// Sum of [`Heard::clicks`].
    heard: u64,
    /// Click partitions are read ahead of what release needs, to judge the silence of others.
    look: bool,
    /// Records rejected here rather than by the decoder. Drained by the caller.
    rejected: Vec<Rejected>,
    counts: ReadCounts,
}

/// A record that was rejected for its times.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejected {
    pub partition: u32,
    pub offset: u64,
    pub row: u32,
    pub reason: String,
    pub key: Option<Vec<u8>>,
    /// The record as the log has it; empty where it was not kept.
    pub value: Vec<u8>,
}

impl Rejected {
    fn new(partition: usize, chunk: &Chunk, index: usize, reason: String) -> Self {
        let Record { offset, row, .. } = chunk.records[index];
        let (key, value) = chunk.original_of(index).unwrap_or_default();
        Self { partition: partition as u32, offset, row, reason, key: key.map(<[u8]>::to_vec), value: value.to_vec() }
    }
}

/// What was read, as opposed to what was released: differs between runs, as reading ahead does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ReadCounts {
    pub impressions_read: u64,
    pub impressions_skipped: u64,
    pub clicks_read: u64,
    pub clicks_skipped: u64,
    pub heartbeats: u64,
    pub overtaken: u64,
}

/// A caught-up partition that is always awaited is called silent after this long, ms of wall time.
const SILENT: i64 = 30_000;

/// Clicks that may be read past what release needs, to judge whether a silent partition is idle or stalled.
const LOOK_AHEAD: usize = 1 << 16;

/// The next full second after `time`: what an overtaken record takes as its place.
fn next_second(time: Time) -> Time {
    if time == Time::MIN { Time(0) } else { Time((time.0.div_euclid(1000) + 1) * 1000) }
}

impl Merge {
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            partitions: Vec::new(),
            frontier: None,
            resumed: None,
            journal: Vec::new(),
            limits: Limits { impressions: Time::MIN, clicks: Time::MIN },
            certain: Limits { impressions: Time::MAX, clicks: Time::MAX },
            next_click: None,
            next_impression: None,
            last: None,
            recycled: Vec::new(),
            quiet: false,
            heard: 0,
            look: false,
            rejected: Vec::new(),
            counts: ReadCounts::default(),
        }
    }

    /// Takes up where a checkpoint ended. Partitions are added afterwards, those of the checkpoint first and in its order.
    pub fn resume(&mut self, frontier: Option<Key>, journal: Vec<JournalEntry>) {
        self.frontier = frontier;
        self.resumed = frontier;
        self.journal = journal;
    }

    /// Adds a partition that nothing was read of; it is awaited from now on. Returns its index.
    pub fn add_partition(&mut self, name: &str, stream: Stream) -> usize {
        let start = PartitionPosition {
            name: name.to_owned(),
            stream,
            from: NextOffset::default(),
            watermark: Time::MIN,
            read: NextOffset::default(),
            heard: Heard::default(),
        };
        self.add_resumed(&start, std::iter::empty())
    }

    /// Adds a partition at the position of a checkpoint. `clicks` are its clicks that were read and not yet passed.
    pub fn add_resumed(&mut self, at: &PartitionPosition, clicks: impl Iterator<Item = Click>) -> usize {
        let index = self.partitions.len();
        let mut decided: BTreeMap<(u64, u32), (Option<Time>, bool)> = BTreeMap::new();
        let mine = |entry: &&JournalEntry| entry.partition as usize == index && entry.offset >= at.from.offset;
        let mut waived = None;
        for entry in self.journal.iter().filter(mine) {
            if entry.decision == Decision::Waived {
                waived = Some(entry.offset);
            }
            if !entry.decision.places() {
                continue;
            }
            let known = decided.entry((entry.offset, entry.row)).or_default();
            match entry.decision {
                Decision::Overtaken(w) => known.0 = Some(w),
                _ => known.1 = true,
            }
        }
        let queue = match at.stream {
            Stream::Impressions => {
                Queue::Impressions { pending: Reorder::default(), held: VecDeque::new(), first_held: 0 }
            }
            Stream::Clicks => {
                let mut waiting = Reorder::default();
                clicks.for_each(|click| waiting.push(Click { partition: index as u32, ..click }));
                Queue::Clicks(waiting)
            }
        };
        self.partitions.push(Partition {
            name: at.name.clone(),
            stream: at.stream,
            watermark: Watermark(at.watermark),
            queue,
            read: at.from,
            known: at.read,
            decided,
            caught_up: None,
            last_end: None,
            silent: false,
            idle: false,
            left_behind: false,
            ended: false,
            heard: at.heard,
            stalled: false,
            suspect: false,
            looked: false,
            waived,
            real: at.watermark,
            start: (at.from, at.watermark),
        });
        self.heard += at.heard.clicks;
        self.refresh();
        index
    }

    #[must_use]
    pub fn frontier(&self) -> Option<Key> {
        self.frontier
    }

    #[must_use]
    pub fn counts(&self) -> ReadCounts {
        self.counts
    }

    #[must_use]
    pub fn journal(&self) -> &[JournalEntry] {
        &self.journal
    }

    /// How many partitions there are; they are numbered from 0 in the order in which they were added.
    #[must_use]
    pub fn partitions(&self) -> usize {
        self.partitions.len()
    }

    #[must_use]
    pub fn stream(&self, partition: usize) -> Stream {
        self.partitions[partition].stream
    }

    #[must_use]
    pub fn name(&self, partition: usize) -> &str {
        &self.partitions[partition].name
    }

    /// Impressions read and not yet released.
    #[must_use]
    pub fn pending(&self) -> usize {
        let of = |p: &Partition| match &p.queue {
            Queue::Impressions { pending, .. } => pending.len(),
            Queue::Clicks(_) => 0,
        };
        self.partitions.iter().map(of).sum()
    }

    /// Clicks read and not yet passed.
    #[must_use]
    pub fn clicks_ahead(&self) -> usize {
        let of = |p: &Partition| match &p.queue {
            Queue::Impressions { .. } => 0,
            Queue::Clicks(clicks) => clicks.len(),
        };
        self.partitions.iter().map(of).sum()
    }

    /// Local watermark of a partition, as its records alone give it.
    #[must_use]
    pub fn watermark(&self, partition: usize) -> Time {
        self.partitions[partition].real
    }

    #[must_use]
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Whether a partition is awaited, and why.
    #[must_use]
    pub fn attention(&self, partition: usize) -> Attention {
        self.partitions[partition].attention()
    }

    /// How many clicks a silent click partition misses by its share of the stream; 0 for others.
    #[must_use]
    pub fn missing(&self, partition: usize) -> f64 {
        self.partitions[partition].heard.silence.map_or(0.0, |silence| silence.missing())
    }

    /// Place of the next impression that was read, released or not.
    #[must_use]
    pub fn next_impression(&self) -> Option<Time> {
        self.next_impression.map(|(_, time)| time)
    }

    /// Silent click partitions that hold the next impression: what an operator can let go. With a confirmed end, so not
    /// those that are merely slow.
    #[must_use]
    pub fn holding(&self) -> Vec<usize> {
        let Some(need) = self.next_impression().map(|time| time.plus(self.rules.window)) else { return Vec::new() };
        let holds = |p: &Partition| {
            let closed = matches!(p.attention(), Attention::Ended | Attention::Waived);
            p.stream == Stream::Clicks && !closed && p.real <= need && p.caught_up.is_some()
        };
        (0..self.partitions.len()).filter(|&index| holds(&self.partitions[index])).collect()
    }

    /// Click partitions that brought less than all their clicks up to `through`, as far as is known, when impressions were
    /// released: they were not awaited, or the journal has moved their records since its entry `since`. Those that ended,
    /// were waived or left behind are as they are meant to be.
    #[must_use]
    pub fn unheard(&self, through: Time, since: usize) -> Vec<usize> {
        let moved = |index: usize| {
            let mut entries = self.journal[since..].iter();
            entries.any(|e| e.partition as usize == index && matches!(e.decision, Decision::Overtaken(_)))
        };
        let unheard = |index: usize| {
            let p = &self.partitions[index];
            let meant = matches!(p.attention(), Attention::Ended | Attention::Waived | Attention::LeftBehind);
            p.stream == Stream::Clicks && !meant && (p.real <= through || moved(index))
        };
        (0..self.partitions.len()).filter(|&index| unheard(index)).collect()
    }

    /// A batch was held that was labelled without these click partitions: they are awaited until one of them speaks.
    pub fn suspect(&mut self, partitions: &[usize]) {
        for &index in partitions {
            self.partitions[index].suspect = true;
        }
        self.refresh();
    }

    /// An operator's word: partition is not awaited until its next record. Journaled.
    pub fn waive(&mut self, partition: usize) {
        let p = &mut self.partitions[partition];
        let (offset, time) = (p.read.offset, p.real);
        p.waived = Some(offset);
        let decision = Decision::Waived;
        self.journal.push(JournalEntry { partition: partition as u32, offset, row: 0, decision, time });
        self.refresh();
    }

    /// An operator's word: the batch that starts with this impression is learned. Journaled.
    pub fn accept(&mut self, first: Key) {
        let Key { partition, offset, row, time, .. } = first;
        self.journal.push(JournalEntry { partition, offset, row, decision: Decision::Accepted, time });
    }

    /// Whether an operator accepted the batch that starts with this impression.
    #[must_use]
    pub fn is_accepted(&self, first: Key) -> bool {
        let mut entries = self.journal.iter().filter(|entry| entry.decision == Decision::Accepted);
        entries.any(|e| (e.partition, e.offset, e.row) == (first.partition, first.offset, first.row))
    }

    /// Takes over what was read by the merge that this one replaces.
    pub fn set_counts(&mut self, counts: ReadCounts) {
        self.counts = counts;
    }

    /// Records that were rejected for their times since the last call.
    pub fn take_rejected(&mut self) -> Vec<Rejected> {
        std::mem::take(&mut self.rejected)
    }

    /// A chunk that is no longer needed, to be filled anew.
    pub fn take_recycled(&mut self) -> Option<Box<Chunk>> {
        self.recycled.pop()
    }

    /// How far a stream has been passed: a record never read before whose time is not after this is overtaken.
    fn passed(&self, stream: Stream) -> Option<Time> {
        let frontier = self.frontier?.time;
        Some(match stream {
            Stream::Impressions => frontier,
            Stream::Clicks => frontier.plus(self.rules.window),
        })
    }

    /// Whether `chunk` belongs to the log that an earlier run has read up to `known`: where reading passes that point, the
    /// record before it must be the one that stood there.
    fn fits(partition: &Partition, chunk: &Chunk) -> bool {
        let known = partition.known;
        if partition.read.offset >= known.offset || chunk.next.offset < known.offset {
            return true;
        }
        let first_new = chunk.records.iter().find(|record| record.offset >= known.offset);
        first_new.map_or(chunk.next.before, |record| Fingerprint(record.before)) == known.before
    }

    /// Takes the next records of a partition, unless they show that it is not the log that was read before. `now` is the clock at reading, which only ever rejects records that carry
    /// no log time; what it rejects is journaled.
    pub fn offer(&mut self, partition: usize, chunk: Box<Chunk>, now: Time) -> Result<(), Rewritten> {
        let p = &self.partitions[partition];
        if !Self::fits(p, &chunk) {
            return Err(Rewritten { partition: p.name.clone(), offset: p.known.offset });
        }
        let passed = self.passed(self.partitions[partition].stream);
        let resumed = self.resumed;
        let stream = self.partitions[partition].stream;
        if stream == Stream::Clicks {
            self.heard_again(partition, now);
        }
        let p = &mut self.partitions[partition];
        let bounds = match stream {
            Stream::Impressions => self.rules.impressions.bounds,
            Stream::Clicks => self.rules.clicks.bounds,
        };
        p.spoke();
        let (start, start_watermark) = (p.read, p.watermark.0);
        let mut kept = 0_u32;
        let sequence = match &p.queue {
            Queue::Impressions { held, first_held, .. } => first_held + held.len() as u64,
            Queue::Clicks(_) => 0,
        };
        let mut skipped = 0;
        for (index, record) in chunk.records.iter().enumerate() {
            let known = record.offset < p.known.offset;
            let mut rejected = record.kind == Kind::Rejected;
            let decided =
                if p.decided.is_empty() { None } else { p.decided.get(&(record.offset, record.row)).copied() };
            if let Some((Some(w), _)) = decided {
                p.watermark.lift(w);
            }
            let log = (record.log_time != Time::MIN).then_some(record.log_time);
            let by_clock = match decided {
                Some((_, rejected)) => rejected,
                None => !known && !rejected && log.is_none() && record.event_time > now.plus(bounds.ahead),
            };
            let (mut time, mut late) = if rejected || by_clock {
                rejected = true;
                (p.watermark.0, false)
            } else {
                match p.watermark.place(record.event_time, log, bounds) {
                    Placing::Accepted { time, late } => (time, late),
                    Placing::Ahead { time } => {
                        rejected = true;
                        let by = record.event_time.0 - record.log_time.0;
                        self.rejected.push(Rejected::new(partition, &chunk, index, ahead_of("log time", by, bounds)));
                        (time, false)
                    }
                }
            };
            late |= matches!(decided, Some((Some(_), _)));
            if !known && decided.is_none() {
                if let Some(passed) = passed.filter(|passed| time <= *passed) {
                    let w = next_second(passed);
                    p.watermark.lift(w);
                    (time, late) = (p.watermark.0, !rejected);
                    self.counts.overtaken += 1;
                    self.journal.push(JournalEntry {
                        partition: partition as u32,
                        offset: record.offset,
                        row: record.row,
                        decision: Decision::Overtaken(w),
                        time,
                    });
                }
                if by_clock {
                    let by = record.event_time.0.saturating_sub(now.0);
                    self.rejected.push(Rejected::new(partition, &chunk, index, ahead_of("clock", by, bounds)));
                    self.journal.push(JournalEntry {
                        partition: partition as u32,
                        offset: record.offset,
                        row: record.row,
                        decision: Decision::Rejected,
                        time,
                    });
                }
            }
            match &mut p.queue {
                Queue::Impressions { pending, .. } => {
                    let entry = Pending {
                        time,
                        id: record.id,
                        content: record.content,
                        offset: record.offset,
                        row: record.row,
                        index: index as u32,
                        chunk: sequence,
                        late,
                        rejected,
                    };
                    if known && resumed.is_some_and(|frontier| key_of(&entry, partition) <= frontier) {
                        skipped += 1;
                        continue;
                    }
                    pending.push(entry);
                    kept += 1;
                }
                Queue::Clicks(clicks) => {
                    if known {
                        skipped += 1; // the checkpoint holds all clicks before its read point
                    } else if record.kind == Kind::Heartbeat {
                        self.counts.heartbeats += 1;
                    } else {
                        if !rejected {
                            let first = p.heard.first.unwrap_or(record.event_time);
                            p.heard.first = Some(first.min(record.event_time));
                        }
                        clicks.push(Click {
                            time,
                            id: record.id,
                            content: record.content,
                            partition: partition as u32,
                            offset: record.offset,
                            row: record.row,
                            event_time: record.event_time,
                            rejected,
                            late,
                        });
                    }
                }
            }
        }
        p.read = chunk.next;
        p.real = p.watermark.0;
        if stream == Stream::Clicks {
            self.count_against_silent(partition, &chunk);
        }
        let p = &mut self.partitions[partition];
        let read = chunk.records.len() as u64;
        match &mut p.queue {
            Queue::Impressions { held, .. } if kept > 0 => {
                held.push_back(Held { chunk, start, watermark: start_watermark, left: kept });
            }
            _ => self.recycled.push(chunk),
        }
        match stream {
            Stream::Impressions => {
                self.counts.impressions_read += read;
                self.counts.impressions_skipped += skipped;
            }
            Stream::Clicks => {
                self.counts.clicks_read += read;
                self.counts.clicks_skipped += skipped;
            }
        }
        self.refresh();
        Ok(())
    }

    /// All that the partition has was offered, and its end was confirmed after that, at `now`.
    pub fn caught_up(&mut self, partition: usize, now: Time) {
        let p = &mut self.partitions[partition];
        (p.caught_up, p.last_end) = (Some(now), Some(now));
    }

    /// Whether the partition's silence counts just now.
    #[must_use]
    pub fn is_caught_up(&self, partition: usize) -> bool {
        self.partitions[partition].caught_up.is_some()
    }

    /// What was said by [`Merge::caught_up`] does not hold any more, or something waits to be read: the partition is awaited.
    pub fn unconfirmed(&mut self, partition: usize) {
        let p = &mut self.partitions[partition];
        (p.idle, p.silent, p.looked, p.caught_up) = (false, false, false, None);
        self.judge();
        self.refresh();
    }

    /// Goes on at `to`: what lay before it and was not read is lost, and an operator has said so. Called before anything was
    /// offered of the partition.
    pub fn skip(&mut self, partition: usize, to: NextOffset) {
        let time = self.frontier.map_or(Time::MIN, |frontier| frontier.time);
        let p = &mut self.partitions[partition];
        let (offset, decision) = (p.read.offset, Decision::Skipped { to: to.offset });
        self.journal.push(JournalEntry { partition: partition as u32, offset, row: 0, decision, time });
        p.read = to;
        if p.known.offset < to.offset {
            p.known = to;
        }
    }

    /// Bounded input: the partition's end has been reached. It must not lie before what an earlier run has read.
    pub fn ended(&mut self, partition: usize) -> Result<(), Rewritten> {
        let p = &mut self.partitions[partition];
        if p.read.offset < p.known.offset {
            return Err(Rewritten { partition: p.name.clone(), offset: p.known.offset });
        }
        p.ended = true;
        p.watermark.lift(Time::MAX);
        self.refresh();
        Ok(())
    }

    /// A click partition brings something. The silence of the others counts from anew where it says nothing any more: if
    /// the stream as a whole was silent, or if a batch was held that was labelled without this partition.
    fn heard_again(&mut self, partition: usize, now: Time) {
        self.quiet = false;
        let mut open = self.partitions.iter().filter(|p| p.stream == Stream::Clicks && !p.ended);
        if !self.partitions[partition].suspect && !open.all(|p| p.silent) {
            return;
        }
        for p in self.partitions.iter_mut().filter(|p| p.stream == Stream::Clicks) {
            (p.idle, p.silent, p.suspect, p.looked) = (false, false, false, false);
            p.caught_up = p.caught_up.map(|since| since.max(now));
        }
    }

    /// Counts what `chunk` of click partition `from` shows about the silence of others.
    fn count_against_silent(&mut self, from: usize, chunk: &Chunk) {
        let first = self.partitions[from].heard.first;
        let bounds = self.rules.clicks.bounds;
        for (index, p) in self.partitions.iter_mut().enumerate() {
            let up_to = p.heard_up_to(bounds);
            if index == from {
                continue;
            }
            if let Some(silence) = &mut p.heard.silence {
                let clicks = chunk.records.iter().filter(|record| record.kind == Kind::Click);
                let beyond = clicks.filter(|record| record.event_time > up_to).count() as u64;
                let known = first.is_some_and(|first| first <= up_to);
                *(if known { &mut silence.old } else { &mut silence.new }) += beyond;
            }
        }
        self.judge();
    }

    /// What was read of the other click partitions past the end of this one, which has fallen silent.
    fn silence_of(&self, partition: usize) -> Silence {
        let p = &self.partitions[partition];
        let up_to = p.heard_up_to(self.rules.clicks.bounds);
        let own = p.heard.clicks;
        let mut silence = Silence { own, others: self.heard - own, old: 0, new: 0 };
        for other in self.partitions.iter().enumerate().filter(|(index, _)| *index != partition).map(|(_, p)| p) {
            if let Queue::Clicks(clicks) = &other.queue {
                let beyond = clicks.iter().filter(|click| !click.rejected && click.event_time > up_to).count() as u64;
                let known = other.heard.first.is_some_and(|first| first <= up_to);
                *(if known { &mut silence.old } else { &mut silence.new }) += beyond;
            }
        }
        silence
    }

    /// Says which silent click partitions are stalled.
    fn judge(&mut self) {
        let expected = self.rules.expected;
        let may_idle = self.rules.clicks.idle_after.is_some();
        for p in &mut self.partitions {
            let missing = p.heard.silence.map_or(0.0, |silence| silence.missing());
            p.stalled = may_idle && p.silent && !p.ended && expected > 0 && missing >= expected as f64;
        }
    }

    /// Lets silence count: idle and left-behind partitions are no longer awaited. Call when nothing can be released, and
    /// only after all that [`Merge::wants`] named has been looked at.
    pub fn tick(&mut self, now: Time) {
        let ahead = |stream| self.partitions.iter().filter(|p| p.stream == stream).map(|p| p.real).max();
        let furthest = [ahead(Stream::Impressions), ahead(Stream::Clicks)];
        for p in &mut self.partitions {
            let rules = match p.stream {
                Stream::Impressions => self.rules.impressions,
                Stream::Clicks => self.rules.clicks,
            };
            let silent_for = p.caught_up.map(|since| now.0 - since.0);
            p.silent = !p.ended && silent_for >= Some(rules.idle_after.unwrap_or(SILENT));
            p.idle &= p.silent;
            if p.stream == Stream::Impressions {
                p.idle = p.silent && rules.idle_after.is_some();
            }
            p.left_behind = !p.ended
                && rules.max_lag.zip(furthest[p.stream as usize]).is_some_and(|(lag, head)| p.real < head.minus(lag));
        }
        self.silence_of_clicks();
        let quiet = |p: &Partition, after| {
            let silent = p.caught_up.is_some_and(|since| now.0 - since.0 >= after);
            p.ended || silent && p.attention() != Attention::Stalled
        };
        let clicks = || self.partitions.iter().filter(|p| p.stream == Stream::Clicks);
        self.quiet = self.rules.quiet_after.is_some_and(|after| clicks().all(|p| quiet(p, after)));
        self.refresh();
    }

    /// Lets the silence of click partitions count where it is credible.
    fn silence_of_clicks(&mut self) {
        let Some(after) = self.rules.clicks.idle_after else { return };
        let judged = self.rules.expected > 0;
        for index in 0..self.partitions.len() {
            let p = &self.partitions[index];
            if p.stream == Stream::Clicks && p.silent && p.heard.silence.is_none() {
                self.partitions[index].heard.silence = Some(self.silence_of(index));
            }
        }
        self.judge();
        self.look = false;
        for index in 0..self.partitions.len() {
            let p = &self.partitions[index];
            if p.stream == Stream::Impressions || !p.silent {
                continue;
            }
            // The others are read ahead first: what they bring may show that it is not idle, before anything is released.
            let missed = judged && p.heard.silence.is_some_and(|silence| silence.has_share());
            self.look |= missed;
            let since = p.caught_up.map(|since| since.plus(after));
            let heard_out = |q: &Partition| p.looked && q.caught_up.is_some() || q.last_end >= since;
            let mut others = self.partitions.iter().filter(|q| q.stream == Stream::Clicks && !q.ended);
            let credible = !missed
                || p.idle
                || p.looked && self.clicks_ahead() >= LOOK_AHEAD
                || others.all(|q| std::ptr::eq(p, q) || heard_out(q));
            let p = &mut self.partitions[index];
            (p.idle, p.looked) = (credible && !p.stalled, true);
        }
    }

    /// Recomputes what follows from the partitions. Called when one of them changed, not per record.
    fn refresh(&mut self) {
        let mut limits = Limits { impressions: Time::MAX, clicks: Time::MAX };
        let (mut furthest, mut open) = (None, false);
        for p in &self.partitions {
            match p.stream {
                Stream::Impressions if p.awaited() => limits.impressions = limits.impressions.min(p.watermark.0),
                Stream::Clicks => {
                    furthest = furthest.max(Some(p.real));
                    open |= !matches!(p.attention(), Attention::Ended | Attention::Waived);
                    if p.awaited() {
                        limits.clicks = limits.clicks.min(p.watermark.0);
                    }
                }
                Stream::Impressions => {}
            }
        }
        if self.quiet {
            limits.clicks = Time::MAX;
        } else if let Some(furthest) = furthest.filter(|_| open) {
            // The click stream as a whole is always awaited: one partition must itself have gone past the window.
            limits.clicks = limits.clicks.min(furthest);
        }
        self.limits = limits;
        self.certain = self.limits_of_ended();
        self.next_click = self.smallest(Stream::Clicks);
        self.next_impression = self.smallest(Stream::Impressions);
    }

    fn smallest(&self, stream: Stream) -> Option<(usize, Time)> {
        let heads = self.partitions.iter().enumerate().filter(|(_, p)| p.stream == stream);
        heads.filter_map(|(index, p)| Some((p.head_time()?, index))).min().map(|((time, ..), index)| (index, time))
    }

    /// Whether an impression can be released now. Changes nothing.
    pub fn ready(&self) -> Ready {
        let until = self.rules.until.unwrap_or(Time::MAX);
        let Some((from, time)) = self.next_impression.filter(|&(_, time)| time < until) else {
            return if self.limits.impressions >= until { self.end_or_idle() } else { self.wait(until, false) };
        };
        let close = time.plus(self.rules.window);
        if time >= self.limits.impressions || close >= self.limits.clicks {
            return self.wait(time, true);
        }
        Ready::Impression { from, time, cut: self.click_log_end().is_some_and(|end| close >= end) }
    }

    /// The next record of the order, or what is missing for it.
    pub fn release(&mut self) -> Step {
        self.let_go();
        let (from, time, cut) = match self.ready() {
            Ready::Impression { from, time, cut } => (from, time, cut),
            Ready::Wait { on, why } => return Step::Wait { on, why },
            Ready::End => return Step::End,
        };
        let close = time.plus(self.rules.window);
        if let Some((partition, _)) = self.next_click.filter(|&(_, click)| click <= close) {
            let Queue::Clicks(clicks) = &mut self.partitions[partition].queue else {
                unreachable!("a click partition")
            };
            let click = clicks.pop().expect("its head was just seen");
            self.partitions[partition].heard.clicks += 1;
            self.heard += 1;
            if self.heard >= MEMORY {
                self.forget_half();
            }
            self.next_click = self.smallest(Stream::Clicks);
            return Step::Click(click);
        }
        let Queue::Impressions { pending, .. } = &mut self.partitions[from].queue else {
            unreachable!("an impression partition")
        };
        let next = pending.pop().expect("its head was just seen");
        let key = key_of(&next, from);
        let released =
            Released { key, late: next.late, rejected: next.rejected, cut, chunk: next.chunk, index: next.index };
        self.frontier = Some(key);
        self.last = Some(released);
        self.next_impression = self.smallest(Stream::Impressions);
        Step::Impression(released)
    }

    /// Halves what is remembered of the shares of click partitions.
    fn forget_half(&mut self) {
        self.partitions.iter_mut().for_each(|p| p.heard.clicks /= 2);
        self.heard = self.partitions.iter().map(|p| p.heard.clicks).sum();
    }

    /// How far what has ended says all there is to say, if it goes on one day. One that lies further back than a silent
    /// partition is waited for is taken to be over.
    fn limits_of_ended(&self) -> Limits {
        let mut limits = Limits { impressions: Time::MAX, clicks: Time::MAX };
        for (stream, limit) in [(Stream::Impressions, &mut limits.impressions), (Stream::Clicks, &mut limits.clicks)] {
            let all = || self.partitions.iter().filter(move |p| p.stream == stream);
            let Some(furthest) = all().map(|p| p.real).max() else { continue };
            let rules = if stream == Stream::Impressions { self.rules.impressions } else { self.rules.clicks };
            let after = rules.idle_after;
            let over = |p: &&Partition| after.is_some_and(|after| p.real < furthest.minus(after));
            *limit = all().filter(|p| p.ended && !over(p)).map(|p| p.real).min().unwrap_or(Time::MAX);
        }
        limits
    }

    /// Whether the release of an impression at `time` would be the same if all that has ended went on: no record that could
    /// still come would lie before it, and no click in its window.
    #[must_use]
    pub fn is_certain(&self, time: Time) -> bool {
        time < self.certain.impressions && time.plus(self.rules.window) < self.certain.clicks
    }

    /// Where the click log ends, if all of it has ended: windows that reach this time are cut.
    fn click_log_end(&self) -> Option<Time> {
        if self.limits.clicks != Time::MAX {
            return None;
        }
        let mut end = None;
        for p in self.partitions.iter().filter(|p| p.stream == Stream::Clicks) {
            if !p.ended {
                return None;
            }
            end = end.max(Some(p.real));
        }
        end
    }

    fn end_or_idle(&self) -> Ready {
        let mut impressions = self.partitions.iter().filter(|p| p.stream == Stream::Impressions);
        let reached = |until| self.partitions.iter().any(|p| p.stream == Stream::Impressions && p.real >= until);
        if impressions.all(|p| p.ended) || self.rules.until.is_some_and(reached) {
            Ready::End
        } else {
            Ready::Wait { on: None, why: WaitReason::Idle }
        }
    }

    /// Says which awaited partition is furthest behind what the release of an impression at `time` needs. Without a
    /// `candidate` clicks are not needed yet.
    fn wait(&self, time: Time, candidate: bool) -> Ready {
        let behind = |stream, need: Time| {
            let awaited = self.partitions.iter().enumerate();
            let awaited =
                awaited.filter(move |(_, p)| p.stream == stream && p.awaited() && !p.ended && p.watermark.0 <= need);
            awaited.map(|(index, p)| (p.watermark.0, index)).min()
        };
        let why = |click: usize| match &self.partitions[click] {
            p if p.attention() == Attention::Stalled => WaitReason::ClickStalled,
            p if p.silent => WaitReason::ClickSilence,
            _ => WaitReason::Clicks,
        };
        if let Some((watermark, index)) = behind(Stream::Impressions, time) {
            let clicks = behind(Stream::Clicks, time.plus(self.rules.window));
            // Both may be behind; the one that lacks more goes first, counted from its own need.
            return match clicks.filter(|_| candidate) {
                Some((click, at)) if click.minus(self.rules.window) < watermark => {
                    Ready::Wait { on: Some(at), why: why(at) }
                }
                _ => Ready::Wait { on: Some(index), why: WaitReason::Impressions },
            };
        }
        match behind(Stream::Clicks, time.plus(self.rules.window)) {
            Some((_, index)) => Ready::Wait { on: Some(index), why: why(index) },
            None => Ready::Wait { on: None, why: WaitReason::ClickSilence },
        }
    }

    /// Whether a partition should be looked at although nobody waits for it just now: one that is not awaited, but clicks no
    /// further than is needed; and clicks, up to a bound, where the silence of another partition of theirs is to be judged.
    #[must_use]
    pub fn wants(&self, partition: usize) -> bool {
        let p = &self.partitions[partition];
        if p.ended {
            return false;
        }
        match (p.stream, self.next_impression) {
            (Stream::Clicks, _) if self.look && self.clicks_ahead() < LOOK_AHEAD => true,
            _ if p.awaited() => false,
            (Stream::Impressions, _) | (Stream::Clicks, None) => true,
            (Stream::Clicks, Some((_, time))) => p.real <= time.plus(self.rules.window),
        }
    }

    #[must_use]
    pub fn has_ended(&self, partition: usize) -> bool {
        self.partitions[partition].ended
    }

    /// Frees what the impression handed out last still held.
    fn let_go(&mut self) {
        let Some(last) = self.last.take() else { return };
        let Queue::Impressions { held, first_held, .. } = &mut self.partitions[last.key.partition as usize].queue
        else {
            unreachable!("an impression partition")
        };
        held[(last.chunk - *first_held) as usize].left -= 1;
        while held.front().is_some_and(|first| first.left == 0) {
            let done = held.pop_front().expect("its front was just seen");
            *first_held += 1;
            self.recycled.push(done.chunk);
        }
    }

    /// The data of the impression handed out last.
    #[must_use]
    pub fn record(&self, released: &Released) -> (&Chunk, &Record) {
        let Queue::Impressions { held, first_held, .. } = &self.partitions[released.key.partition as usize].queue
        else {
            unreachable!("an impression partition")
        };
        let chunk = &held[(released.chunk - first_held) as usize].chunk;
        (chunk, &chunk.records[released.index as usize])
    }

    /// Where reading would have to start again if the run ended now, for every partition in order.
    ///
    /// Cheap enough for every batch boundary: one look at each partition.
    pub fn positions(&self, out: &mut Vec<(NextOffset, Time)>) {
        out.clear();
        // What was handed out last is released already, though it may still be held.
        let last = self.last.map(|last| (last.key.partition as usize, last.chunk));
        out.extend(self.partitions.iter().enumerate().map(|(index, p)| match &p.queue {
            Queue::Impressions { held, first_held, .. } => {
                let unreleased = held.iter().zip(*first_held..);
                let mut unreleased = unreleased
                    .filter(|(held, chunk)| held.left > u32::from(last == Some((index, *chunk))))
                    .map(|(held, _)| (held.start, held.watermark));
                unreleased.next().unwrap_or((p.read, p.watermark_now()))
            }
            Queue::Clicks(_) => (p.read, p.watermark_now()),
        }));
    }

    /// The positions for a checkpoint, given what [`Merge::positions`] said at the boundary.
    #[must_use]
    pub fn checkpoint(&self, at_boundary: &[(NextOffset, Time)]) -> Vec<PartitionPosition> {
        let both = self.partitions.iter().enumerate();
        both.map(|(index, p)| {
            // A partition that is younger than the boundary starts where it started.
            let boundary = at_boundary.get(index).copied().unwrap_or(p.start);
            let (from, watermark) = match p.stream {
                Stream::Impressions => boundary,
                Stream::Clicks => (p.read, p.watermark_now()),
            };
            let (name, read) = (p.name.clone(), p.known_or_read());
            PartitionPosition { name, stream: p.stream, from, watermark, read, heard: p.heard }
        })
        .collect()
    }

    /// Clicks read and not yet passed, of all partitions, in no order.
    pub fn waiting_clicks(&self) -> impl Iterator<Item = &Click> {
        self.partitions
            .iter()
            .filter_map(|p| match &p.queue {
                Queue::Clicks(clicks) => Some(clicks.iter()),
                Queue::Impressions { .. } => None,
            })
            .flatten()
    }

    /// Indices of the impression partitions, in order.
    pub fn impression_partitions(&self) -> impl Iterator<Item = usize> {
        self.partitions.iter().enumerate().filter(|(_, p)| p.stream == Stream::Impressions).map(|(index, _)| index)
    }

    /// Of each impression partition, the smallest (offset, row) not released yet, or where it goes on: part of the order
    /// digest. Not for every batch: looks at all that is pending.
    #[must_use]
    pub fn first_unreleased(&self) -> Vec<(u64, u32)> {
        let impressions = self.partitions.iter().filter_map(|p| match &p.queue {
            Queue::Impressions { pending, .. } => {
                Some(pending.iter().map(|e| (e.offset, e.row)).min().unwrap_or((p.read.offset, 0)))
            }
            Queue::Clicks(_) => None,
        });
        impressions.collect()
    }
}

impl Partition {
    /// The watermark before the next record to be read; the end of bounded input does not count.
    fn watermark_now(&self) -> Time {
        self.real
    }

    /// The read point: what an earlier run had read counts as read until this run has passed it.
    fn known_or_read(&self) -> NextOffset {
        if self.read.offset < self.known.offset { self.known } else { self.read }
    }
}

fn key_of(entry: &Pending, partition: usize) -> Key {
    Key {
        time: entry.time,
        stream: Stream::Impressions,
        id: entry.id,
        content: entry.content,
        partition: partition as u32,
        offset: entry.offset,
        row: entry.row,
    }
}

fn ahead_of(what: &str, by: i64, bounds: Bounds) -> String {
    format!("event time is {by} ms ahead of its {what}; max_ahead allows {} ms", bounds.ahead)
}
