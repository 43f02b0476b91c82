//! Which click belongs to which impression.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::dedup::{ById, Seen, SeenInfo, Segment};
use crate::event::Time;
use crate::merge::Click;

/// Durations of the join, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// How long after its impression a click counts; both ends inclusive.
    pub window: i64,
    /// How far before its impression a click may be stamped.
    pub click_skew: i64,
    /// An impression whose place is further than this past its event time is not trained.
    pub max_lateness: i64,
    /// How long released ids are remembered after their time; at least window + max_lateness + click_skew. 0: no
    /// duplicates are looked for (streams of labelled records without ids).
    pub dedup_horizon: i64,
}

/// What became of a released impression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Labelled(Label),
    /// Its id was released before: feeds nothing.
    Duplicate,
    /// Came so late that its clicks may be gone: not trained.
    TooLate,
}

/// The label of an impression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Label {
    Positive,
    Negative,
}

/// Both conservation laws, along the order and so equal in every run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counts {
    pub impressions: u64,
    pub positives: u64,
    pub negatives: u64,
    pub sampled_out: u64,
    pub duplicates: u64,
    pub too_late: u64,
    pub rejected: u64,
    pub quarantined: u64,
    /// From before the time that the lineage learns from: they are known as seen, and nothing more.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub before_start: u64,
    /// Of all impressions, those that took their watermark's place.
    pub late: u64,
    /// Of all impressions, those whose window reached past the end of the click log.
    pub windows_cut: u64,
    pub clicks: u64,
    pub clicks_attributed: u64,
    pub clicks_duplicate: u64,
    pub clicks_missed: u64,
    pub clicks_outside: u64,
    pub clicks_orphan: u64,
    pub clicks_rejected: u64,
    pub clicks_late: u64,
}

/// So that lineages that learn from the start of their log keep their digests.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it so")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

impl Counts {
    /// Impressions released that are not in exactly one of their classes. Must be 0.
    #[must_use]
    pub fn impression_gap(&self) -> i64 {
        let accounted = self.positives
            + self.negatives
            + self.sampled_out
            + self.duplicates
            + self.too_late
            + self.rejected
            + self.quarantined
            + self.before_start;
        self.impressions as i64 - accounted as i64
    }

    /// Clicks placed that are not in exactly one of their classes. Must be 0.
    #[must_use]
    pub fn click_gap(&self, waiting: u64) -> i64 {
        let accounted = self.clicks_attributed
            + self.clicks_duplicate
            + self.clicks_missed
            + self.clicks_outside
            + self.clicks_orphan
            + self.clicks_rejected;
        self.clicks as i64 - (accounted + waiting) as i64
    }

    /// Clicks that became labels, of all clicks whose impression is known; `None` before the first.
    #[must_use]
    pub fn click_coverage(&self) -> Option<f64> {
        let known = self.clicks_attributed + self.clicks_missed + self.clicks_outside;
        (known > 0).then(|| self.clicks_attributed as f64 / known as f64)
    }
}

/// Delays from impression to click, of all clicks but orphans, in octaves of milliseconds.
///
/// `counts[0]`: the click is stamped before or at its impression; `counts[k]`: a delay in `[2^(k-1), 2^k)` ms.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DelayCurve {
    pub counts: Vec<u64>,
}

impl DelayCurve {
    fn add(&mut self, delay: i64, n: i64) {
        let octave = if delay <= 0 { 0 } else { 64 - delay.leading_zeros() as usize };
        if self.counts.len() <= octave {
            self.counts.resize(octave + 1, 0);
        }
        self.counts[octave] = self.counts[octave].saturating_add_signed(n);
    }
}

#[derive(Clone, Copy, Debug)]
struct Node {
    click: Click,
    next: u32,
    /// 0: free.
    serial: u64,
}

const NONE: u32 = u32::MAX;

/// The join's state at a batch boundary, for a checkpoint.
#[derive(Clone, Debug)]
pub struct Image {
    /// Clicks that were placed and wait for their impression, or were placed after the boundary.
    pub clicks: Vec<Click>,
    pub seen: Vec<Arc<Segment>>,
    pub counts: Counts,
    pub delays: DelayCurve,
}

/// Left outer join of impressions with clicks by impression id, in the order.
#[derive(Debug)]
pub struct Join {
    rules: Rules,
    seen: Seen,
    /// First waiting click of an id, in order of place.
    first: ById<u32>,
    nodes: Vec<Node>,
    free: Vec<u32>,
    /// Waiting clicks by place: (time, node, serial).
    expiry: VecDeque<(Time, u32, u64)>,
    serial: u64,
    waiting: u64,
    pub counts: Counts,
    delays: DelayCurve,
    /// What [`Join::at_boundary`] needs to go back: the counts, delays and number of waiting clicks at the boundary, and
    /// every click decided since.
    settled: (Counts, DelayCurve, u64),
    decided: Vec<Click>,
}

impl Join {
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            seen: Seen::new(rules.dedup_horizon),
            first: ById::default(),
            nodes: Vec::new(),
            free: Vec::new(),
            expiry: VecDeque::new(),
            serial: 0,
            waiting: 0,
            counts: Counts::default(),
            delays: DelayCurve::default(),
            settled: (Counts::default(), DelayCurve::default(), 0),
            decided: Vec::new(),
        }
    }

    #[must_use]
    pub fn rules(&self) -> Rules {
        self.rules
    }

    /// Clicks placed whose impression has not come.
    #[must_use]
    pub fn waiting(&self) -> u64 {
        self.waiting
    }

    /// Counts and number of waiting clicks at the last batch boundary, where both conservation laws hold.
    #[must_use]
    pub fn settled(&self) -> (&Counts, u64) {
        (&self.settled.0, self.settled.2)
    }

    #[must_use]
    pub fn seen(&self) -> usize {
        self.seen.len()
    }

    #[must_use]
    pub fn delays(&self) -> &DelayCurve {
        &self.delays
    }

    /// Takes the next click of the order. It waits for its impression, or is counted if that was released already.
    pub fn place(&mut self, click: Click) {
        self.counts.clicks += 1;
        self.counts.clicks_late += u64::from(click.late);
        if click.rejected {
            self.counts.clicks_rejected += 1;
            self.decided.push(click);
        } else if let Some(impression) = self.seen.get(click.id) {
            self.late_click(click, impression);
            self.decided.push(click);
        } else {
            self.wait(click);
        }
    }

    /// A click whose impression was released before it was placed.
    fn late_click(&mut self, click: Click, impression: SeenInfo) {
        let delay = click.event_time.0 - impression.event_time().0;
        self.delays.add(delay, 1);
        if !self.in_window(delay) {
            self.counts.clicks_outside += 1;
        } else if impression.positive() {
            self.counts.clicks_duplicate += 1;
        } else {
            self.counts.clicks_missed += 1;
        }
    }

    fn in_window(&self, delay: i64) -> bool {
        (-self.rules.click_skew..=self.rules.window).contains(&delay)
    }

    fn wait(&mut self, click: Click) {
        self.serial += 1;
        let node = Node { click, next: NONE, serial: self.serial };
        let at = match self.free.pop() {
            Some(at) => {
                self.nodes[at as usize] = node;
                at
            }
            None => {
                self.nodes.push(node);
                u32::try_from(self.nodes.len() - 1).expect("fewer than 2^32 clicks wait")
            }
        };
        match self.first.entry(click.id) {
            hashbrown::hash_map::Entry::Vacant(slot) => {
                slot.insert(at);
            }
            hashbrown::hash_map::Entry::Occupied(slot) => {
                let mut last = *slot.get();
                while self.nodes[last as usize].next != NONE {
                    last = self.nodes[last as usize].next;
                }
                self.nodes[last as usize].next = at;
            }
        }
        self.expiry.push_back((click.time, at, self.serial));
        self.waiting += 1;
    }

    fn forget(&mut self, at: u32) -> Click {
        let node = &mut self.nodes[at as usize];
        node.serial = 0;
        let click = node.click;
        self.free.push(at);
        self.waiting -= 1;
        self.decided.push(click);
        click
    }

    /// Labels the next impression of the order. All clicks with a place of at most `time + window` have been placed, and
    /// no others. The caller counts what it does with the verdict ([`Counts::positives`] and the like).
    pub fn release(&mut self, id: u64, time: Time, event_time: Time) -> Verdict {
        self.expire(time);
        let dedup = self.rules.dedup_horizon > 0;
        if dedup && self.seen.get(id).is_some() {
            self.counts.duplicates += 1;
            return Verdict::Duplicate;
        }
        let too_late = time.0.saturating_sub(event_time.0) > self.rules.max_lateness;
        let mut positive = false;
        let mut next = if self.first.is_empty() { NONE } else { self.first.remove(&id).unwrap_or(NONE) };
        while next != NONE {
            let at = next;
            next = self.nodes[at as usize].next;
            let click = self.forget(at);
            let delay = click.event_time.0 - event_time.0;
            self.delays.add(delay, 1);
            if !self.in_window(delay) {
                self.counts.clicks_outside += 1;
            } else if too_late {
                self.counts.clicks_missed += 1;
            } else if positive {
                self.counts.clicks_duplicate += 1;
            } else {
                self.counts.clicks_attributed += 1;
                positive = true;
            }
        }
        if dedup {
            self.seen.insert(id, time, SeenInfo::new(event_time, positive));
        }
        if too_late {
            self.counts.too_late += 1;
            return Verdict::TooLate;
        }
        Verdict::Labelled(if positive { Label::Positive } else { Label::Negative })
    }

    /// Releases an impression that carries its label: no clicks, but duplicates are still found.
    pub fn release_labelled(&mut self, id: u64, time: Time, event_time: Time, positive: bool) -> Verdict {
        if self.rules.dedup_horizon > 0 {
            if self.seen.get(id).is_some() {
                self.counts.duplicates += 1;
                return Verdict::Duplicate;
            }
            self.seen.insert(id, time, SeenInfo::new(event_time, positive));
        }
        if time.0.saturating_sub(event_time.0) > self.rules.max_lateness {
            self.counts.too_late += 1;
            return Verdict::TooLate;
        }
        Verdict::Labelled(if positive { Label::Positive } else { Label::Negative })
    }

    /// Clicks that no impression may claim any more are orphans.
    fn expire(&mut self, frontier: Time) {
        let patience = self.rules.max_lateness + self.rules.click_skew;
        while let Some(&(time, at, serial)) = self.expiry.front() {
            if self.nodes[at as usize].serial == serial {
                if frontier <= time.plus(patience) {
                    break;
                }
                // The oldest of its id, since clicks were placed in order.
                let id = self.nodes[at as usize].click.id;
                match self.nodes[at as usize].next {
                    NONE => self.first.remove(&id),
                    next => self.first.insert(id, next),
                };
                self.forget(at);
                self.counts.clicks_orphan += 1;
            }
            self.expiry.pop_front();
        }
    }

    /// A batch boundary: what was released up to `frontier` is settled, and a checkpoint taken from now on, whenever it
    /// is taken, shows the state of this moment until the next boundary.
    pub fn settle(&mut self, frontier: Time) {
        self.seen.settle(frontier);
        self.decided.clear();
        self.settled.0 = self.counts;
        self.settled.1.counts.clone_from(&self.delays.counts);
        self.settled.2 = self.waiting;
    }

    /// The state at the last boundary. Clicks that were placed after it are included: their place says so.
    #[must_use]
    pub fn at_boundary(&self) -> Image {
        let live = self.nodes.iter().filter(|node| node.serial != 0).map(|node| node.click);
        let mut clicks: Vec<Click> = live.chain(self.decided.iter().copied()).collect();
        clicks.sort_unstable();
        let (counts, delays, _) = self.settled.clone();
        Image { clicks, seen: self.seen.at_boundary(), counts, delays }
    }

    /// Takes over the state of a checkpoint. `placed` are the clicks of the image with a place of at most the frontier's
    /// time plus the window; the rest is the merge's.
    pub fn restore(&mut self, image: Image, placed: impl Iterator<Item = Click>) {
        self.seen.restore(image.seen);
        self.counts = image.counts;
        self.delays = image.delays;
        placed.for_each(|click| self.wait(click));
        self.settled = (self.counts, self.delays.clone(), self.waiting);
    }
}
