//! The heart: ordered records in, learned weights out. Plain calls on one thread, no I/O.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::compare::Kept;
use super::fresh::Fresh;
use super::progressive::Progressive;
use crate::batch::Cutter;
use crate::event::{Chunk, Example, Kind, Slot, Stream, Time};
use crate::join::fuse::{self, Fuse, Jump, Tally};
use crate::join::{self, Join, Label, Segment, Verdict};
use crate::merge::{
    Click, Decision, JournalEntry, Key, Merge, PartitionPosition, ReadCounts, Ready, Rewritten, Step, WaitReason,
};
use crate::model::logistic::Outcome;
use crate::model::{self, Model};
use crate::position::NextOffset;

/// Keeps a share of the negatives, chosen by their ids, so that the choice is the same in every run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    seed: u64,
    /// A negative is kept when its hash is at most this.
    keep_below: u64,
    /// ln(1/rate).
    offset: f32,
}

impl Sampling {
    /// `rate` in (0, 1].
    #[must_use]
    pub fn new(seed: u64, rate: f64) -> Self {
        let keep_below = if rate >= 1.0 { u64::MAX } else { (rate * u64::MAX as f64) as u64 };
        Self { seed, keep_below, offset: -libm::log(rate) as f32 }
    }

    fn keeps(self, id: u64) -> bool {
        self.keep_below == u64::MAX
            || xxhash_rust::xxh3::xxh3_64_with_seed(&id.to_le_bytes(), self.seed) <= self.keep_below
    }
}

/// Why [`Core::advance`] came back.
#[derive(Clone, Copy, Debug)]
pub enum Advance {
    /// A batch boundary: the batch is learned, and [`Core::image`] shows this moment until the next boundary.
    Boundary,
    /// What comes next would come out otherwise if the input went on: a window that reaches past the end of the click
    /// log, or a batch that only the end of the input closes. The image of the last boundary is the one to resume from.
    /// Said once.
    Unfinished,
    /// The click-through rate of the open batch is not believed, and nothing of the batch is applied. Said until the
    /// batch is accepted or the core is [rewound](Core::rewind).
    Held,
    /// Nothing can be released; see [`Step::Wait`].
    Wait { on: Option<usize>, why: WaitReason },
    /// Bounded input: all has been released and learned.
    End,
}

/// One example of the open batch; its slots are `slots[start..][..len]`, its id text `text[text_start..][..text_len]`.
#[derive(Clone, Copy, Debug)]
struct Item {
    id: u64,
    time: Time,
    event_time: Time,
    start: u32,
    len: u32,
    text_start: u32,
    text_len: u32,
    weight: f32,
    positive: bool,
    /// Where it came from, for its dead letter if it is quarantined.
    partition: u32,
    offset: u64,
    row: u32,
}

/// An example that the model refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quarantined {
    pub partition: u32,
    pub offset: u64,
    pub row: u32,
    pub id: u64,
}

/// What an example came to, as [`Core::take_predictions`] keeps it.
#[derive(Clone, Debug, PartialEq)]
pub struct Prediction {
    pub id: String,
    pub p: f64,
    pub positive: bool,
}

/// A joined, labelled example, as [`Core::take_examples`] gives it.
#[derive(Clone, Copy, Debug)]
pub struct Joined<'a> {
    /// Of its event, as its decoder keeps it.
    pub text: &'a [u8],
    pub slots: &'a [Slot],
    pub time: Time,
    pub event_time: Time,
    pub weight: f32,
    pub positive: bool,
}

/// A batch that is held, or that is labelled anew because it was.
#[derive(Clone, Debug)]
pub struct Held {
    /// The batch's first impression.
    pub first: Key,
    pub jump: Jump,
    /// Click partitions that it was labelled without: it is labelled anew when they speak. None: its labels are final.
    pub unheard: Vec<usize>,
    /// It stands there as it was labelled; else it was given back and is being labelled anew.
    pub formed: bool,
}

/// How many golden examples the core keeps ready.
const GOLDEN: usize = 14;

/// Everything along the order, at one batch boundary.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The last impression released.
    pub frontier: Option<Key>,
    /// Batches learned.
    pub batches: u64,
    /// Examples learned from, quarantined ones not counted.
    pub examples: u64,
    /// Smallest and largest event time of the examples.
    pub event_times: Option<(Time, Time)>,
    /// Of each impression partition, the first (offset, row) not released.
    pub first_unreleased: Vec<(u64, u32)>,
}

/// A batch boundary, without the state there.
#[derive(Clone, Debug)]
pub struct Standing {
    pub place: Place,
    pub partitions: Vec<PartitionPosition>,
    pub journal: Vec<JournalEntry>,
    pub counts: join::Counts,
}

/// A complete copy of the state at a batch boundary: what a checkpoint is made from.
pub struct Image {
    pub place: Place,
    pub partitions: Vec<PartitionPosition>,
    pub journal: Vec<JournalEntry>,
    /// All clicks that were read and still matter: those with a place of at most frontier + window wait in the join.
    pub clicks: Vec<Click>,
    pub seen: Vec<Arc<Segment>>,
    pub counts: join::Counts,
    pub delays: join::DelayCurve,
    /// What the fuse knows of click-through rates.
    pub fuse: fuse::State,
    /// What [`Progressive::export`] gave.
    pub progress: Vec<u64>,
    /// What [`Kept::export`] gave.
    pub compare: Option<Vec<u64>>,
    pub model: model::Image,
    /// Number of the batch behind which the model's rows are those that changed; None where they are all.
    pub since: Option<u32>,
}

/// Merge, join, batches, model and progressive validation, driven by whoever feeds it.
pub struct Core {
    merge: Merge,
    join: Join,
    cutter: Cutter,
    sampling: Sampling,
    window: i64,
    items: Vec<Item>,
    slots: Vec<Slot>,
    text: Vec<u8>,
    outcomes: Vec<Outcome>,
    pub model: Model,
    pub progress: Progressive,
    place: Place,
    /// Positions at the last boundary, all partitions.
    positions: Vec<(NextOffset, Time)>,
    /// Smallest (offset, row) released since the boundary, by partition.
    since: Vec<Option<(u64, u32)>>,
    released_since: u64,
    fuse: Fuse,
    open: Open,
    held: Option<Held>,
    /// An operator accepted the open batch, which ends here.
    closing: bool,
    /// Journal entries and records read at the boundary.
    journaled: usize,
    read: ReadCounts,
    unfinished: bool,
    keep_predictions: bool,
    predictions: Vec<Prediction>,
    /// Nothing is learned: the examples of a batch are for whoever takes them.
    keep_examples: bool,
    quarantined: Vec<Quarantined>,
    golden: VecDeque<Vec<Slot>>,
    /// A sample of what was learned since it was taken last.
    pub fresh: Fresh,
    /// Sums over the stretch in which this model is compared with another.
    pub compare: Option<Kept>,
    /// Impressions before this are only remembered as seen.
    learn_from: Time,
    /// What has ended may go on one day.
    growing: bool,
}

/// What the fuse must know of the open batch.
#[derive(Clone, Copy, Debug, Default)]
struct Open {
    first: Option<Key>,
    labelled: Tally,
    /// Some window reached past the end of the click log.
    cut: bool,
}

impl Core {
    #[must_use]
    pub fn new(
        merge: Merge,
        join: Join,
        cutter: Cutter,
        sampling: Sampling,
        fuse: Fuse,
        model: Model,
        progress: Progressive,
    ) -> Self {
        let window = join.rules().window;
        Self {
            merge,
            join,
            cutter,
            sampling,
            window,
            items: Vec::new(),
            slots: Vec::new(),
            text: Vec::new(),
            outcomes: Vec::new(),
            model,
            progress,
            place: Place::default(),
            positions: Vec::new(),
            since: Vec::new(),
            released_since: 0,
            fuse,
            open: Open::default(),
            held: None,
            closing: false,
            journaled: 0,
            read: ReadCounts::default(),
            unfinished: false,
            keep_predictions: false,
            predictions: Vec::new(),
            keep_examples: false,
            quarantined: Vec::new(),
            golden: VecDeque::new(),
            fresh: Fresh::default(),
            compare: None,
            learn_from: Time::MIN,
            growing: false,
        }
    }

    /// Takes up at a checkpoint: all of it but model and progress, which are given to [`Core::new`].
    pub fn restore(&mut self, image: Restored) {
        let frontier = image.place.frontier;
        let passed = frontier.map_or(Time::MIN, |key| key.time.plus(self.window));
        self.merge.resume(frontier, image.journal);
        let (placed, ahead): (Vec<Click>, Vec<Click>) =
            image.clicks.into_iter().partition(|click| frontier.is_some() && click.time <= passed);
        for (index, position) in image.partitions.iter().enumerate() {
            let mine = ahead.iter().copied().filter(|click| click.partition as usize == index);
            self.merge.add_resumed(position, mine);
        }
        let join = join::Image { clicks: Vec::new(), seen: image.seen, counts: image.counts, delays: image.delays };
        self.join.restore(join, placed.into_iter());
        self.cutter.resume(frontier.map(|key| key.time));
        self.fuse.restore(image.fuse);
        self.place = image.place;
        self.mark();
    }

    /// Where [`Core::rewind`] goes back to.
    fn mark(&mut self) {
        self.merge.positions(&mut self.positions);
        self.since.fill(None);
        self.released_since = 0;
        self.open = Open::default();
        self.journaled = self.merge.journal().len();
        self.read = self.merge.counts();
    }

    /// Goes back to the last batch boundary as if nothing had been read since: what a held batch was labelled with is
    /// forgotten, and the click partitions that it was labelled without are awaited. Returns where to read on.
    pub fn rewind(&mut self) -> Vec<PartitionPosition> {
        let join = self.join.at_boundary();
        let mut clicks = join.clicks;
        clicks.extend(self.merge.waiting_clicks().copied());
        let mut partitions = self.merge.checkpoint(&self.positions);
        let boundary =
            |partition: usize| self.positions.get(partition).copied().unwrap_or((NextOffset::default(), Time::MIN));
        for (index, position) in partitions.iter_mut().enumerate().filter(|(_, p)| p.stream == Stream::Clicks) {
            (position.from, position.watermark) = boundary(index);
            position.read = position.from;
            position.heard.silence = None;
        }
        clicks.retain(|click| click.offset < boundary(click.partition as usize).0.offset);
        // What was decided about clicks since is decided anew; what is known of impressions, and what operators said, stays.
        let stays = |entry: &&JournalEntry| {
            let partition = entry.partition as usize;
            let placed = matches!(entry.decision, Decision::Overtaken(_) | Decision::Rejected);
            !placed
                || partitions[partition].stream == Stream::Impressions
                || entry.offset < boundary(partition).0.offset
        };
        let journal: Vec<JournalEntry> = self.merge.journal().iter().filter(stays).copied().collect();
        let dropped = (self.merge.journal().len() - journal.len()) as u64;
        let now = self.merge.counts();
        let unread = self.merge.pending() as u64 + self.released_since;
        let counts = ReadCounts {
            impressions_read: now.impressions_read - unread,
            impressions_skipped: now.impressions_skipped,
            overtaken: now.overtaken - dropped.min(now.overtaken),
            ..self.read
        };
        self.items.clear();
        self.slots.clear();
        self.text.clear();
        self.merge = Merge::new(self.merge.rules());
        self.merge.set_counts(counts);
        self.join = Join::new(self.join.rules());
        let (place, fuse) = (self.place.clone(), self.fuse.state());
        let (seen, counts, delays) = (join.seen, join.counts, join.delays);
        self.restore(Restored { place, partitions: partitions.clone(), journal, clicks, seen, counts, delays, fuse });
        if let Some(held) = &mut self.held {
            held.formed = false;
            self.merge.suspect(&held.unheard);
        }
        partitions
    }

    /// The batch that is held, or that is being labelled anew because it was.
    #[must_use]
    pub fn held(&self) -> Option<&Held> {
        self.held.as_ref()
    }

    /// Impressions that were read and wait: those of the open batch, and those that were not released.
    #[must_use]
    pub fn impressions_waiting(&self) -> u64 {
        self.released_since + self.merge.pending() as u64
    }

    /// The recent click-through rate, as the fuse knows it.
    #[must_use]
    pub fn recent_ctr(&self) -> Option<f64> {
        self.fuse.recent_ctr()
    }

    /// An operator's word: the held batch is to be learned. Journaled; make a checkpoint before going on, so that the word
    /// outlives this run. Where it is labelled without some click partitions, these are not awaited until they speak.
    /// Returns what was held, if anything.
    pub fn accept(&mut self) -> Option<Held> {
        let held = self.held.take()?;
        for &partition in &held.unheard {
            self.merge.waive(partition);
        }
        self.merge.accept(held.first);
        // One that was given back is formed and judged again, and then the journal speaks for it.
        self.closing = held.formed;
        Some(held)
    }

    /// Learns from no impression before this time. Part of the lineage: to be said before anything is read, the same in each run.
    pub fn learn_from(&mut self, time: Time) {
        self.learn_from = time;
    }

    /// The log goes on behind the end of bounded input: [`Advance::Unfinished`] is also said of what could come out otherwise
    /// then.
    pub fn expect_growth(&mut self) {
        self.growing = true;
    }

    #[must_use]
    pub fn merge(&self) -> &Merge {
        &self.merge
    }

    pub fn merge_mut(&mut self) -> &mut Merge {
        &mut self.merge
    }

    #[must_use]
    pub fn join(&self) -> &Join {
        &self.join
    }

    /// The last batch boundary.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// From now on keeps what was predicted for each example, until it is taken.
    pub fn keep_predictions(&mut self) {
        self.keep_predictions = true;
    }

    /// From now on learns nothing and samples nothing out. Each batch's examples are there from its end until they are
    /// [taken](Self::take_examples), which must be before the next.
    pub fn keep_examples(&mut self) {
        self.keep_examples = true;
    }

    /// Whether events need their values as text.
    #[must_use]
    pub fn keeps_examples(&self) -> bool {
        self.keep_examples
    }

    /// Gives the examples of the batch that has ended, in their order.
    pub fn take_examples<E>(&mut self, mut each: impl FnMut(Joined<'_>) -> Result<(), E>) -> Result<(), E> {
        for item in &self.items {
            each(Joined {
                text: &self.text[item.text_start as usize..][..item.text_len as usize],
                slots: &self.slots[item.start as usize..][..item.len as usize],
                time: item.time,
                event_time: item.event_time,
                weight: item.weight,
                positive: item.positive,
            })?;
        }
        self.items.clear();
        self.slots.clear();
        self.text.clear();
        Ok(())
    }

    pub fn take_predictions(&mut self) -> Vec<Prediction> {
        std::mem::take(&mut self.predictions)
    }

    pub fn take_quarantined(&mut self) -> Vec<Quarantined> {
        std::mem::take(&mut self.quarantined)
    }

    /// The latest encoded examples, a few from each batch: what golden vectors are made from.
    #[must_use]
    pub fn golden(&self) -> Vec<Vec<Slot>> {
        self.golden.iter().cloned().collect()
    }

    /// Goes on until a batch ends or nothing more can be released. Fails where the model's device does; then there is no going on.
    pub fn advance(&mut self) -> Result<Advance, model::Error> {
        if std::mem::take(&mut self.closing) {
            return self.end_batch();
        }
        if self.held.as_ref().is_some_and(|held| held.formed) {
            return Ok(Advance::Held);
        }
        loop {
            match self.merge.ready() {
                Ready::Impression { time, cut, .. } => {
                    let uncertain = cut || self.growing && !self.merge.is_certain(time);
                    if uncertain && !self.unfinished {
                        self.unfinished = true;
                        return Ok(Advance::Unfinished);
                    }
                    if self.cutter.crosses(time) && self.released_since > 0 {
                        return self.end_batch();
                    }
                    if self.release(cut) {
                        return self.end_batch();
                    }
                }
                Ready::Wait { on, why } => return Ok(Advance::Wait { on, why }),
                Ready::End if self.released_since > 0 && !self.unfinished => {
                    self.unfinished = true;
                    return Ok(Advance::Unfinished);
                }
                Ready::End if self.released_since > 0 => return self.end_batch(),
                Ready::End => return Ok(Advance::End),
            }
        }
    }

    /// Passes the clicks that come before the next impression's window closes, then releases it. Whether that fills a batch.
    fn release(&mut self, cut: bool) -> bool {
        let released = loop {
            match self.merge.release() {
                Step::Click(click) => self.join.place(click),
                Step::Impression(released) => break released,
                Step::Wait { .. } | Step::End => unreachable!("an impression was ready"),
            }
        };
        let key = released.key;
        self.released_since += 1;
        self.open.first.get_or_insert(key);
        self.open.cut |= cut;
        if self.since.len() <= key.partition as usize {
            self.since.resize(key.partition as usize + 1, None);
        }
        let since = &mut self.since[key.partition as usize];
        *since = Some(since.map_or((key.offset, key.row), |first| first.min((key.offset, key.row))));

        let counts = &mut self.join.counts;
        counts.impressions += 1;
        counts.late += u64::from(released.late);
        counts.windows_cut += u64::from(cut);
        if released.rejected {
            counts.rejected += 1;
            return false;
        }
        let (chunk, record) = self.merge.record(&released);
        let verdict = match record.kind {
            Kind::Labelled { positive } => self.join.release_labelled(key.id, key.time, record.event_time, positive),
            _ => self.join.release(key.id, key.time, record.event_time),
        };
        let Verdict::Labelled(label) = verdict else { return false };
        if key.time < self.learn_from {
            self.join.counts.before_start += 1;
            return false;
        }
        let positive = label == Label::Positive;
        self.open.labelled.impressions += 1;
        self.open.labelled.clicks += u64::from(positive);
        if !positive && !self.keep_examples && !self.sampling.keeps(key.id) {
            self.join.counts.sampled_out += 1;
            return false;
        }
        let (start, text_start) = (self.slots.len() as u32, self.text.len() as u32);
        self.slots.extend_from_slice(chunk.slots_of(record));
        if self.keep_predictions || self.keep_examples {
            self.text.extend_from_slice(chunk.text_of(record));
        }
        self.items.push(Item {
            id: key.id,
            time: key.time,
            event_time: record.event_time,
            start,
            len: record.slots_len,
            text_start,
            text_len: self.text.len() as u32 - text_start,
            weight: record.weight,
            positive,
            partition: key.partition,
            offset: key.offset,
            row: key.row,
        });
        self.cutter.fills()
    }

    /// Ends the open batch, unless its click-through rate is not believed.
    fn end_batch(&mut self) -> Result<Advance, model::Error> {
        let Open { first, labelled, cut } = self.open;
        // Clicks are missing where the click log has ended, and that is known.
        if !cut && let Some(first) = first {
            match self.fuse.judge(labelled) {
                None => self.fuse.learned(labelled),
                Some(_) if self.merge.is_accepted(first) => self.fuse.accepted(labelled),
                Some(jump) => {
                    let through = self.merge.frontier().map_or(Time::MIN, |key| key.time.plus(self.window));
                    let unheard = self.merge.unheard(through, self.journaled);
                    self.held = Some(Held { first, jump, unheard, formed: true });
                    return Ok(Advance::Held);
                }
            }
        }
        self.held = None;
        self.finish_batch()?;
        Ok(Advance::Boundary)
    }

    /// Scores the open batch, learns from it, and settles everything at its end.
    fn finish_batch(&mut self) -> Result<(), model::Error> {
        if self.keep_examples {
            self.count_examples();
        } else if !self.items.is_empty() {
            self.learn()?;
        }
        let frontier = self.merge.frontier().expect("something was released");
        self.place.frontier = Some(frontier);
        self.join.settle(frontier.time);
        self.mark();
        Ok(())
    }

    fn count_examples(&mut self) {
        self.place.batches += u64::from(!self.items.is_empty());
        self.place.examples += self.items.len() as u64;
        let mut range = self.place.event_times;
        for item in &self.items {
            let counts = &mut self.join.counts;
            *(if item.positive { &mut counts.positives } else { &mut counts.negatives }) += 1;
            let (first, last) = range.unwrap_or((item.event_time, item.event_time));
            range = Some((first.min(item.event_time), last.max(item.event_time)));
        }
        self.place.event_times = range;
    }

    fn learn(&mut self) -> Result<(), model::Error> {
        let examples: Vec<Example<'_>> = self
            .items
            .iter()
            .map(|item| Example {
                slots: &self.slots[item.start as usize..][..item.len as usize],
                positive: item.positive,
                weight: item.weight,
                sampling_offset: self.sampling.offset,
                time: item.time,
                id: item.id,
            })
            .collect();
        self.place.batches += 1;
        let number = u32::try_from(self.place.batches).expect("the job stops before 2^32 batches");
        self.model.learn(number, self.items[0].time, &examples, &mut self.outcomes)?;
        let counts = &mut self.join.counts;
        let mut range = self.place.event_times;
        for ((item, example), outcome) in self.items.iter().zip(&examples).zip(&self.outcomes) {
            if outcome.quarantined {
                counts.quarantined += 1;
                let Item { partition, offset, row, id, .. } = *item;
                self.quarantined.push(Quarantined { partition, offset, row, id });
                continue;
            }
            if item.positive {
                counts.positives += 1
            } else {
                counts.negatives += 1
            }
            self.place.examples += 1;
            let (first, last) = range.unwrap_or((item.event_time, item.event_time));
            range = Some((first.min(item.event_time), last.max(item.event_time)));
            self.progress.observe(outcome, example);
            self.fresh.see(example, outcome);
            if let Some(compare) = &mut self.compare {
                compare.observe(outcome, example);
            }
            if self.keep_predictions {
                let id = &self.text[item.text_start as usize..][..item.text_len as usize];
                let id = String::from_utf8_lossy(id).into_owned();
                let p = 1.0 / (1.0 + libm::exp(-f64::from(outcome.logit)));
                self.predictions.push(Prediction { id, p, positive: item.positive });
            }
        }
        self.place.event_times = range;
        let stride = (examples.len() / GOLDEN).max(1);
        for example in examples.iter().step_by(stride).take(GOLDEN) {
            let mut kept =
                if self.golden.len() < GOLDEN { Vec::new() } else { self.golden.pop_front().unwrap_or_default() };
            kept.clear();
            kept.extend_from_slice(example.slots);
            self.golden.push_back(kept);
        }
        drop(examples);
        self.items.clear();
        self.slots.clear();
        self.text.clear();
        Ok(())
    }

    /// All partitions are open, and nothing was offered yet: a checkpoint of this moment says where each starts.
    pub fn opened(&mut self) {
        self.merge.positions(&mut self.positions);
    }

    /// Where reading would start again if the run ended now, for every partition in order.
    #[must_use]
    pub fn positions(&self) -> Vec<PartitionPosition> {
        self.merge.checkpoint(&self.positions)
    }

    /// Where the last batch boundary is, and what is known of the way there.
    #[must_use]
    pub fn standing(&self) -> Standing {
        let mut place = self.place.clone();
        place.first_unreleased = self.merge.first_unreleased();
        let impressions = self.merge.impression_partitions();
        for (first, partition) in place.first_unreleased.iter_mut().zip(impressions) {
            if let Some(Some(since)) = self.since.get(partition) {
                *first = (*first).min(*since);
            }
        }
        let (counts, _) = self.join.settled();
        Standing { place, partitions: self.positions(), journal: self.merge.journal().to_vec(), counts: *counts }
    }

    /// A copy of the state at the last batch boundary. Costs a copy of the model and of what waits; sorting and writing
    /// are left to whoever takes it.
    #[must_use]
    pub fn image(&self) -> Image {
        self.image_with(self.model.image(), None)
    }

    /// The same, of the tables only the rows that changed behind number `batch`, or all where the log of changes is not that
    /// long.
    #[must_use]
    pub fn image_after(&self, batch: Option<u32>) -> Image {
        match batch.and_then(|batch| self.model.image_after(batch)) {
            Some(changed) => self.image_with(changed, batch),
            None => self.image(),
        }
    }

    fn image_with(&self, model: model::Image, since: Option<u32>) -> Image {
        let Standing { place, partitions, journal, .. } = self.standing();
        let join = self.join.at_boundary();
        let mut clicks = join.clicks;
        clicks.extend(self.merge.waiting_clicks().copied());
        Image {
            place,
            partitions,
            journal,
            clicks,
            seen: join.seen,
            counts: join.counts,
            delays: join.delays,
            fuse: self.fuse.state(),
            progress: self.progress.export(),
            compare: self.compare.as_ref().map(Kept::export),
            model,
            since,
        }
    }

    /// Offers a chunk to the merge; see [`Merge::offer`].
    pub fn offer(&mut self, partition: usize, chunk: Box<Chunk>, now: Time) -> Result<(), Rewritten> {
        self.merge.offer(partition, chunk, now)
    }
}

/// What [`Core::restore`] takes up: an [`Image`] without model and progress.
pub struct Restored {
    pub place: Place,
    pub partitions: Vec<PartitionPosition>,
    pub journal: Vec<JournalEntry>,
    pub clicks: Vec<Click>,
    pub seen: Vec<Arc<Segment>>,
    pub counts: join::Counts,
    pub delays: join::DelayCurve,
    pub fuse: fuse::State,
}
