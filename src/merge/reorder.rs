//! A queue that hands out the smallest entry first, cheap where entries come nearly sorted.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

/// Entries of one partition that were read and not yet released.
///
/// What arrives in order goes to the back of a sorted run, in constant time; only what arrives before the run's last
/// entry goes through a heap.
#[derive(Debug)]
pub struct Reorder<E> {
    run: VecDeque<E>,
    heap: BinaryHeap<Reverse<E>>,
}

impl<E: Ord> Default for Reorder<E> {
    fn default() -> Self {
        Self { run: VecDeque::new(), heap: BinaryHeap::new() }
    }
}

impl<E: Ord> Reorder<E> {
    pub fn push(&mut self, entry: E) {
        if self.run.back().is_none_or(|last| *last <= entry) {
            self.run.push_back(entry);
        } else {
            self.heap.push(Reverse(entry));
        }
    }

    pub fn peek(&self) -> Option<&E> {
        match (self.run.front(), self.heap.peek()) {
            (Some(a), Some(Reverse(b))) => Some(a.min(b)),
            (a, b) => a.or(b.map(|Reverse(b)| b)),
        }
    }

    pub fn pop(&mut self) -> Option<E> {
        match (self.run.front(), self.heap.peek()) {
            (Some(a), Some(Reverse(b))) if b < a => self.heap.pop().map(|Reverse(b)| b),
            (Some(_), _) => self.run.pop_front(),
            (None, _) => self.heap.pop().map(|Reverse(b)| b),
        }
    }

    pub fn len(&self) -> usize {
        self.run.len() + self.heap.len()
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = &E> {
        self.run.iter().chain(self.heap.iter().map(|Reverse(entry)| entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn entries_leave_smallest_first_however_they_came(steps in prop::collection::vec(prop::option::weighted(0.7, 0u32..50), 0..200)) {
            let mut queue = Reorder::default();
            let mut oracle: Vec<u32> = Vec::new();
            for step in steps {
                match step {
                    Some(entry) => { queue.push(entry); oracle.push(entry); oracle.sort_unstable(); }
                    None => {
                        prop_assert_eq!(queue.peek().copied(), oracle.first().copied());
                        let smallest = (!oracle.is_empty()).then(|| oracle.remove(0));
                        prop_assert_eq!(queue.pop(), smallest);
                    }
                }
                prop_assert_eq!(queue.len(), oracle.len());
            }
        }
    }
}
