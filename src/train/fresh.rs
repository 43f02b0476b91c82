//! A sample of the examples since the last version, with what the model said of each before it learned from it.

use crate::event::{Example, Slot, Time};
use crate::model::logistic::Outcome;

/// An example of the sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Item {
    id: u64,
    /// Place in the order.
    pub time: Time,
    start: u32,
    len: u32,
    /// Of a model of age zero.
    pub logit: f32,
    pub positive: bool,
    /// Impressions that it stands for: its weight, by the rate of a kept negative.
    pub weight: f64,
}

/// A uniform sample, chosen by the impressions' ids alone: those with the smallest ones, which are hashes.
#[derive(Clone, Debug, Default)]
pub struct Fresh {
    most: usize,
    /// Ids up to this one are in the sample.
    below: u64,
    slots: Vec<Slot>,
    items: Vec<Item>,
}

impl Fresh {
    /// A sample of at most `most` examples; 0 takes none.
    #[must_use]
    pub fn new(most: usize) -> Self {
        let below = if most == 0 { 0 } else { u64::MAX };
        Self { most, below, slots: Vec::new(), items: Vec::new() }
    }

    /// Takes an example in if its id is small enough. Quarantined ones have said nothing.
    #[inline]
    pub fn see(&mut self, example: &Example<'_>, outcome: &Outcome) {
        if example.id > self.below || self.most == 0 {
            return;
        }
        let mut weight = f64::from(example.weight);
        if !example.positive {
            weight *= libm::exp(f64::from(example.sampling_offset));
        }
        let (start, len) = (self.slots.len() as u32, example.slots.len() as u32);
        let (id, time, positive) = (example.id, example.time, example.positive);
        self.items.push(Item { id, time, start, len, logit: outcome.logit, positive, weight });
        self.slots.extend_from_slice(example.slots);
        if self.items.len() > self.most {
            self.thin();
        }
    }

    /// Halves the range of ids until the rest fits.
    fn thin(&mut self) {
        while self.items.len() > self.most && self.below > 0 {
            self.below /= 2;
            let below = self.below;
            self.items.retain(|item| item.id <= below);
        }
        let mut slots = Vec::with_capacity(self.slots.len() / 2);
        for item in &mut self.items {
            let start = slots.len() as u32;
            slots.extend_from_slice(&self.slots[item.start as usize..][..item.len as usize]);
            item.start = start;
        }
        self.slots = slots;
    }

    /// Hands out the sample and begins anew.
    #[must_use]
    pub fn take(&mut self) -> Self {
        std::mem::replace(self, Self::new(self.most))
    }

    /// The examples, in their order, with their slots.
    pub fn iter(&self) -> impl Iterator<Item = (&Item, &[Slot])> {
        self.items.iter().map(|item| (item, &self.slots[item.start as usize..][..item.len as usize]))
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.items.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;

    proptest! {
        #[test]
        fn it_holds_the_examples_with_the_smallest_ids_each_with_its_own_slots(n in 0u32..3000, most in 0usize..200) {
            let mut fresh = Fresh::new(most);
            let id = |i: u32| xxh3_64(&i.to_le_bytes());
            for i in 0..n {
                let slots = vec![Slot { row: u64::from(i), value: 1.0, feature: 0, flags: 0 }; i as usize % 4];
                let example = Example { slots: &slots, positive: i % 3 == 0, weight: 2.0, sampling_offset: 1.0, time: Time(0), id: id(i) };
                fresh.see(&example, &Outcome { logit: i as f32, e: 0.0, gradient: 0.0, quarantined: false });
            }
            prop_assert!(fresh.len() <= most);
            prop_assert!((n as usize) <= most || most < 16 || fresh.len() * 6 >= most, "{} of {most}", fresh.len());
            let largest = fresh.iter().map(|(item, _)| item.id).max();
            let smaller = (0..n).filter(|i| Some(id(*i)) <= largest).count();
            prop_assert!(fresh.is_empty() || smaller == fresh.len(), "none with a smaller id is left out");
            for (item, slots) in fresh.iter() {
                let i = item.logit as u32;
                prop_assert_eq!((item.id, slots.len()), (id(i), i as usize % 4));
                prop_assert!(slots.iter().all(|slot| slot.row == u64::from(i)));
                prop_assert_eq!(item.weight, if item.positive { 2.0 } else { 2.0 * libm::exp(1.0) });
            }
            let taken = fresh.take();
            prop_assert_eq!((fresh.len(), taken.len() <= most), (0, true));
        }
    }
}
