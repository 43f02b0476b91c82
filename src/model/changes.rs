//! What has changed since a batch: ids of rows touched or removed, gathered as it happens, so that asking costs what was
//! touched and not the table.

use std::collections::VecDeque;

/// What became of a table's rows since a batch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Changes<R> {
    /// The rows that are there and were touched since, ids ascending.
    pub rows: R,
    /// Ids that had a row then and have none now, ascending. (Where the batch is not one that was marked, also of rows that
    /// came and went since the last mark before it.)
    pub removed: Vec<u64>,
}

/// A table in an image of a model: all of it, or what became of it since a batch.
pub(super) enum Part<T, R> {
    Whole(T),
    Changed(Changes<R>),
}

impl<T, R: Clone> Part<T, R> {
    /// The rows that are there, of a whole table by `all`.
    pub fn rows(&self, all: impl Fn(&T) -> R) -> R {
        match self {
            Self::Whole(table) => all(table),
            Self::Changed(changes) => changes.rows.clone(),
        }
    }

    pub fn removed(&self) -> &[u64] {
        match self {
            Self::Whole(_) => &[],
            Self::Changed(changes) => &changes.removed,
        }
    }
}

/// The ids of rows touched or removed, in segments that begin at marked batches. Off, and without memory, until the first
/// mark. Not state: nothing that is learned depends on it, and a copy of a table begins without.
#[derive(Debug, Default)]
pub(super) struct Log {
    segments: VecDeque<Segment>,
    /// A row touched before this batch is not in the open segment yet; 0 while the log is off.
    from: u32,
}

#[derive(Debug)]
struct Segment {
    /// Number of the batch behind which it begins.
    after: u32,
    /// In the order in which it happened.
    ids: Vec<u64>,
    /// Which of `ids`, by position, had no row before.
    born: Vec<u32>,
}

impl Clone for Log {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// Most segments; while nobody says what he has heard, the last one grows.
const SEGMENTS: usize = 16;
/// Ids that any log may hold, beside four for each row of its table.
const ROOM: usize = 1 << 16;

impl Log {
    /// Begins a segment behind `batch`, in the log of a table of so many rows. A log that has grown far beyond its table begins
    /// anew: to copy all rows then costs less.
    pub fn mark(&mut self, batch: u32, rows: usize) {
        if self.segments.iter().map(|segment| segment.ids.len()).sum::<usize>() > 4 * rows + ROOM {
            self.segments.clear();
        }
        if self.segments.len() < SEGMENTS && self.segments.back().is_none_or(|open| open.after < batch) {
            self.segments.push_back(Segment { after: batch, ids: Vec::new(), born: Vec::new() });
            self.from = batch.saturating_add(1);
        }
    }

    /// Drops what only matters to one who has not heard of `batch`.
    pub fn forget_to(&mut self, batch: u32) {
        while self.segments.get(1).is_some_and(|next| next.after <= batch) {
            self.segments.pop_front();
        }
    }

    #[inline(always)]
    pub fn is_on(&self) -> bool {
        self.from > 0
    }

    /// A row is made.
    #[inline]
    pub fn birth(&mut self, id: u64) {
        if self.is_on() {
            if let Some(open) = self.segments.back_mut() {
                open.born.push(open.ids.len() as u32);
            }
            self.push(id);
        }
    }

    /// A row that was touched last in batch `before` is touched.
    #[inline(always)]
    pub fn touch(&mut self, id: u64, before: u32) {
        if before < self.from {
            self.push(id);
        }
    }

    /// A row is removed.
    pub fn remove(&mut self, id: u64) {
        if self.is_on() {
            self.push(id);
        }
    }

    #[inline(never)]
    fn push(&mut self, id: u64) {
        if let Some(open) = self.segments.back_mut() {
            open.ids.push(id);
        }
    }

    /// Adds the ids touched or removed behind `batch`, and perhaps some more, and whether each had no row then; several times
    /// where several things happened, the first of which counts. False where the log does not reach back so far.
    pub fn since(&self, batch: u32, ids: &mut Vec<(u64, bool)>) -> bool {
        let ends = self.segments.iter().skip(1).map(|next| next.after).chain([u32::MAX]);
        for (segment, _) in self.segments.iter().zip(ends).filter(|(_, end)| *end > batch) {
            let first = ids.len();
            ids.extend(segment.ids.iter().map(|&id| (id, false)));
            // In a segment that began before `batch`, a row may have come before it as well as behind it.
            if segment.after >= batch {
                segment.born.iter().for_each(|&at| ids[first + at as usize].1 = true);
            }
        }
        self.segments.front().is_some_and(|first| first.after <= batch)
    }

    /// Memory held, in bytes.
    pub fn bytes(&self) -> usize {
        let of = |s: &Segment| s.ids.capacity() * size_of::<u64>() + s.born.capacity() * size_of::<u32>();
        self.segments.iter().map(of).sum()
    }
}

/// Each id once, ascending, as what happened to it first.
pub(super) fn firsts(mut ids: Vec<(u64, bool)>) -> impl Iterator<Item = (u64, bool)> {
    ids.sort_by_key(|&(id, _)| id);
    ids.dedup_by_key(|&mut (id, _)| id);
    ids.into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_nobody_hears_does_not_grow_without_end_and_says_when_it_has_forgotten() {
        let (mut log, mut ids) = (Log::default(), Vec::new());
        for batch in 1..=500 {
            log.mark(batch, 100);
            assert!(log.since(batch, &mut ids), "it begins here");
            (1..=1000).for_each(|id| log.birth(id));
            (1..=1000).for_each(|id| log.remove(id));
            assert!(log.bytes() < 1 << 21, "{} bytes after batch {batch}", log.bytes());
        }
        assert!(!log.since(1, &mut ids));
        let (mut kept, mut batches) = (Log::default(), 0..);
        batches.by_ref().take(40).for_each(|batch| kept.mark(batch, 100));
        assert!(kept.since(0, &mut ids) && kept.segments.len() == SEGMENTS, "marks alone forget nothing");
    }

    #[test]
    fn a_row_that_came_before_an_unmarked_batch_and_went_behind_it_is_not_taken_for_one_that_never_was() {
        let mut log = Log::default();
        log.mark(1, 10);
        log.birth(7); // in batch 2
        log.remove(7); // in batch 4
        let since = |batch| {
            let mut ids = Vec::new();
            assert!(log.since(batch, &mut ids));
            firsts(ids).collect::<Vec<_>>()
        };
        assert_eq!(since(1), [(7, true)], "it came and went: no one has heard of it");
        assert_eq!(since(3), [(7, false)], "who knows batch 3 holds it");
    }
}
