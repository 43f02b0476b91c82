//! The impression ids that were released, for as long as a duplicate or a late click may still come.

use std::collections::VecDeque;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;

use crate::event::Time;

/// Ids are already uniform hashes: the table takes them as they are.
#[derive(Default, Clone, Copy, Debug)]
pub struct Uniform(u64);

impl Hasher for Uniform {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 keys are hashed");
    }

    fn write_u64(&mut self, key: u64) {
        self.0 = key;
    }
}

pub(super) type ById<V> = hashbrown::HashMap<u64, V, BuildHasherDefault<Uniform>>;

/// What a click that comes after its impression's release must know of it: event time, and what became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenInfo(i64);

impl SeenInfo {
    #[must_use]
    pub fn new(event_time: Time, positive: bool) -> Self {
        Self(event_time.0 << 1 | i64::from(positive))
    }

    #[must_use]
    pub fn event_time(self) -> Time {
        Time(self.0 >> 1)
    }

    /// A click was attributed to it.
    #[must_use]
    pub fn positive(self) -> bool {
        self.0 & 1 == 1
    }

    #[must_use]
    pub fn to_bits(self) -> i64 {
        self.0
    }

    #[must_use]
    pub fn from_bits(bits: i64) -> Self {
        Self(bits)
    }
}

/// Ids whose impressions have a `time` in `[start, start + length)`, in the order of release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    pub start: Time,
    pub ids: Vec<u64>,
    pub infos: Vec<SeenInfo>,
}

/// Seen ids in segments by time. A closed segment never changes, so a checkpoint shares it and writes it once.
#[derive(Debug)]
pub struct Seen {
    length: i64,
    horizon: i64,
    by_id: ById<SeenInfo>,
    closed: VecDeque<Arc<Segment>>,
    open: Segment,
    /// Batch boundary: (closed segments, ids in the open one) back then.
    mark: (usize, usize),
}

impl Seen {
    /// Segments are an eighth of the horizon long (`horizon` in ms, > 0), so at most 9/8 of it is held.
    #[must_use]
    pub fn new(horizon: i64) -> Self {
        Self {
            length: (horizon / 8).max(1),
            horizon,
            by_id: ById::default(),
            closed: VecDeque::new(),
            open: Segment { start: Time::MIN, ids: Vec::new(), infos: Vec::new() },
            mark: (0, 0),
        }
    }

    #[must_use]
    pub fn get(&self, id: u64) -> Option<SeenInfo> {
        self.by_id.get(&id).copied()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Adds an id that is not there yet; `time` is its impression's place and never falls.
    pub fn insert(&mut self, id: u64, time: Time, info: SeenInfo) {
        if self.open.ids.is_empty() {
            self.open.start = self.segment_start(time);
        } else if time >= self.open.start.plus(self.length) {
            let next = Segment { start: self.segment_start(time), ids: Vec::new(), infos: Vec::new() };
            let full = std::mem::replace(&mut self.open, next);
            self.closed.push_back(Arc::new(full));
        }
        self.open.ids.push(id);
        self.open.infos.push(info);
        self.by_id.insert(id, info);
    }

    fn segment_start(&self, time: Time) -> Time {
        if time == Time::MIN { time } else { Time(time.0.div_euclid(self.length) * self.length) }
    }

    /// A batch boundary at `frontier`: what was added is now settled, and segments whose ids can no longer matter go.
    pub fn settle(&mut self, frontier: Time) {
        while let Some(first) = self.closed.front() {
            if frontier <= first.start.plus(self.length + self.horizon) {
                break;
            }
            for id in &first.ids {
                self.by_id.remove(id);
            }
            self.closed.pop_front();
        }
        self.mark = (self.closed.len(), self.open.ids.len());
    }

    /// Ids at the last boundary, oldest segment first. Closed segments are shared, the open one is copied.
    #[must_use]
    pub fn at_boundary(&self) -> Vec<Arc<Segment>> {
        let (closed, open) = self.mark;
        let mut segments: Vec<_> = self.closed.iter().take(closed).cloned().collect();
        let at_mark = self.closed.get(closed).map_or(&self.open, |then_open| then_open.as_ref());
        if open > 0 {
            let (ids, infos) = (at_mark.ids[..open].to_vec(), at_mark.infos[..open].to_vec());
            segments.push(Arc::new(Segment { start: at_mark.start, ids, infos }));
        }
        segments
    }

    /// Takes over the segments of a checkpoint, oldest first; the last one stays open.
    pub fn restore(&mut self, mut segments: Vec<Arc<Segment>>) {
        for segment in &segments {
            self.by_id.extend(segment.ids.iter().copied().zip(segment.infos.iter().copied()));
        }
        if let Some(open) = segments.pop() {
            self.open = Arc::unwrap_or_clone(open);
        }
        self.closed = segments.into();
        self.mark = (self.closed.len(), self.open.ids.len());
    }
}
