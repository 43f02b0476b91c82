//! Two models on the same examples: what a run keeps of a stretch of the order, and what two runs come to beside each other.
//!
//! Each run scores every example before it learns from it. Sums are kept by block of event time and by slice, so two runs of
//! any length are compared in little memory, and a digest of the examples of each block says that both were asked about the
//! same. The confidence interval of the difference is a paired bootstrap over blocks (Efron and Tibshirani, An Introduction to
//! the Bootstrap, 1993, section 16.4; blocks, because examples that are near in time go together).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::progressive::{Error, Metrics, Sums};
use crate::event::{Example, Time};
use crate::model::logistic::Outcome;

/// First word of exported sums.
const FORMAT: u64 = 0x636f_6d70_0000_0001;
/// Resamples of the bootstrap.
const RESAMPLES: u64 = 2000;
/// With fewer blocks nothing is said of how certain a difference is.
const FEWEST_BLOCKS: usize = 10;

/// A place in the order of examples: time, then id.
pub type At = (Time, u64);

/// Examples that are looked at apart: those that have a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slice {
    pub name: String,
    /// Row id of the feature's value.
    pub row: u64,
}

/// Which examples are compared, and how they are cut.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stretch {
    /// Only examples behind this one.
    pub after: Option<At>,
    /// None: to the end.
    pub through: Option<At>,
    /// Length of a block, in ms of event time.
    pub block: i64,
    pub slices: Vec<Slice>,
}

/// What a run keeps of the examples of one block.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Block {
    examples: u64,
    /// Sum over the examples of a hash of what identifies each and its label.
    digest: u64,
    weight: f64,
    clicks: f64,
    predicted: f64,
    loss: f64,
}

/// One slice of a stretch; the first is everything.
#[derive(Clone, PartialEq)]
struct Part {
    sums: Sums,
    blocks: BTreeMap<i64, Block>,
}

impl Part {
    fn new() -> Self {
        Self { sums: Sums::new(), blocks: BTreeMap::new() }
    }
}

/// What a run keeps of a stretch.
pub struct Kept {
    stretch: Stretch,
    parts: Vec<Part>,
}

impl Kept {
    #[must_use]
    pub fn new(stretch: Stretch) -> Self {
        let parts = (0..=stretch.slices.len()).map(|_| Part::new()).collect();
        Self { stretch, parts }
    }

    /// Takes what the model said of an example before it learned from it; a quarantined one does not count.
    pub fn observe(&mut self, outcome: &Outcome, example: &Example<'_>) {
        let Stretch { after, through, block, slices } = &self.stretch;
        let at = (example.time, example.id);
        if outcome.quarantined || after.is_some_and(|after| at <= after) || through.is_some_and(|through| at > through)
        {
            return;
        }
        let mut weight = f64::from(example.weight);
        if !example.positive && example.sampling_offset != 0.0 {
            weight *= libm::exp(f64::from(example.sampling_offset));
        }
        let (x, e) = (f64::from(outcome.logit), f64::from(outcome.e));
        let p = if x >= 0.0 { 1.0 } else { e } / (1.0 + e);
        let loss = (if example.positive { -x } else { x }).max(0.0) + libm::log1p(e);
        let digest = xxh3_64_with_seed(&example.id.to_le_bytes(), u64::from(example.positive));
        let rows = slices.iter().map(|slice| example.slots.iter().any(|slot| slot.row == slice.row));
        for (part, _) in self.parts.iter_mut().zip(std::iter::once(true).chain(rows)).filter(|(_, is_in)| *is_in) {
            part.sums.observe(outcome, example.positive, weight);
            let block = part.blocks.entry(example.time.0.div_euclid(*block)).or_default();
            block.examples += 1;
            block.digest = block.digest.wrapping_add(digest);
            block.weight += weight;
            block.clicks += if example.positive { weight } else { 0.0 };
            block.predicted += weight * p;
            block.loss += weight * loss;
        }
    }

    /// All that later sums depend on, exactly.
    #[must_use]
    pub fn export(&self) -> Vec<u64> {
        let mut words = vec![FORMAT, self.parts.len() as u64];
        for Part { sums, blocks } in &self.parts {
            sums.export(&mut words);
            words.push(blocks.len() as u64);
            for (index, b) in blocks {
                words.extend([*index as u64, b.examples, b.digest]);
                words.extend([b.weight, b.clicks, b.predicted, b.loss].map(f64::to_bits));
            }
        }
        words
    }

    /// Goes on from exported words.
    pub fn import(stretch: Stretch, words: &[u64]) -> Result<Self, Error> {
        let mut words = words.iter().copied();
        let early = Error::State("they end early");
        if words.next().ok_or(early)? != FORMAT {
            return Err(Error::State("unknown format"));
        }
        let mut made = Self::new(stretch);
        if words.next() != Some(made.parts.len() as u64) {
            return Err(Error::State("they have other slices"));
        }
        for part in &mut made.parts {
            part.sums = Sums::import(&mut words)?;
            let mut next = || words.next().ok_or(Error::State("they end early"));
            for _ in 0..next()? {
                let index = next()? as i64;
                let (examples, digest) = (next()?, next()?);
                let mut float = || next().map(f64::from_bits);
                let (weight, clicks, predicted, loss) = (float()?, float()?, float()?, float()?);
                part.blocks.insert(index, Block { examples, digest, weight, clicks, predicted, loss });
            }
        }
        match words.next() {
            None => Ok(made),
            Some(_) => Err(Error::State("something follows their end")),
        }
    }
}

/// A mean difference of losses, candidate less live, in nats an impression: below 0 the candidate is better.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Difference {
    pub logloss: f64,
    /// As a share of the live model's loss.
    pub relative: f64,
    /// The interval in which `relative` lies, at [`Rules::confidence`]; none with fewer than 10 blocks.
    pub interval: Option<[f64; 2]>,
}

/// Two models on a slice.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SliceReport {
    pub name: String,
    pub candidate: Metrics,
    pub live: Metrics,
    pub difference: Option<Difference>,
}

/// What came of a comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    pub verdict: Verdict,
    /// Why, in words.
    pub reason: String,
    pub examples: u64,
    pub clicks: u64,
    /// Event time of the first and behind the last block that both were asked about.
    pub from: Option<Time>,
    pub until: Option<Time>,
    pub blocks: usize,
    /// Blocks that are left out because the runs did not have the same examples in them.
    pub blocks_that_differ: usize,
    /// All examples first, then each slice.
    pub slices: Vec<SliceReport>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    Better,
    NotWorse,
    Worse,
    /// Too little to tell.
    Undecided,
}

/// When a candidate counts as not worse.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rules {
    /// Of the interval of the difference, two-sided.
    pub confidence: f64,
    /// The candidate's loss may be greater by this share of the live model's.
    pub margin: f64,
    /// Fewest clicks.
    pub clicks: u64,
    /// Band of clicks predicted over clicks seen.
    pub calibration: [f64; 2],
}

impl Default for Rules {
    fn default() -> Self {
        Self { confidence: 0.95, margin: 0.002, clicks: 100, calibration: [0.5, 2.0] }
    }
}

/// Sets two runs over the same stretch beside each other.
#[must_use]
pub fn compare(candidate: &Kept, live: &Kept, rules: &Rules) -> Report {
    let names = std::iter::once("all").chain(candidate.stretch.slices.iter().map(|slice| slice.name.as_str()));
    let all = Paired::of(&candidate.parts[0], &live.parts[0]);
    let slices: Vec<SliceReport> = names
        .zip(candidate.parts.iter().zip(&live.parts))
        .map(|(name, (candidate, live))| {
            let difference = Paired::of(candidate, live).difference(rules.confidence);
            let (candidate, live) = (candidate.sums.metrics(), live.sums.metrics());
            SliceReport { name: name.to_owned(), candidate, live, difference }
        })
        .collect();
    let block = candidate.stretch.block;
    let (verdict, reason) = all.verdict(&slices[0], rules);
    Report {
        verdict,
        reason,
        examples: all.pairs.iter().map(|(_, candidate, _)| candidate.examples).sum(),
        clicks: slices[0].candidate.positives,
        from: all.pairs.first().map(|(index, ..)| Time(index * block)),
        until: all.pairs.last().map(|(index, ..)| Time((index + 1) * block)),
        blocks: all.pairs.len(),
        blocks_that_differ: all.differ,
        slices,
    }
}

/// Blocks in which both runs had the same examples.
struct Paired {
    pairs: Vec<(i64, Block, Block)>,
    differ: usize,
}

impl Paired {
    fn of(candidate: &Part, live: &Part) -> Self {
        let (mut pairs, mut differ) = (Vec::new(), 0);
        for (&index, ours) in &candidate.blocks {
            match live.blocks.get(&index) {
                Some(theirs) if (ours.examples, ours.digest) == (theirs.examples, theirs.digest) => {
                    pairs.push((index, *ours, *theirs));
                }
                _ => differ += 1,
            }
        }
        differ += live.blocks.keys().filter(|index| !candidate.blocks.contains_key(index)).count();
        Self { pairs, differ }
    }

    fn difference(&self, confidence: f64) -> Option<Difference> {
        let of = |chosen: &mut dyn Iterator<Item = &(i64, Block, Block)>| {
            let (mut more, mut loss, mut weight) = (0.0, 0.0, 0.0);
            for (_, candidate, live) in chosen {
                more += candidate.loss - live.loss;
                loss += live.loss;
                weight += live.weight;
            }
            (more / weight, more / loss)
        };
        let (logloss, relative) = of(&mut self.pairs.iter());
        if !(logloss.is_finite() && relative.is_finite()) {
            return None;
        }
        let count = self.pairs.len() as u64;
        let resampled = |round: u64| {
            let draw = move |i: u64| {
                let hash = xxh3_64_with_seed(&i.to_le_bytes(), round);
                ((u128::from(hash) * u128::from(count)) >> 64) as usize
            };
            of(&mut (0..count).map(|i| &self.pairs[draw(i)])).1
        };
        let interval = (self.pairs.len() >= FEWEST_BLOCKS).then(|| {
            let mut all: Vec<f64> = (0..RESAMPLES).map(resampled).filter(|share| share.is_finite()).collect();
            all.sort_by(f64::total_cmp);
            let tail = ((1.0 - confidence) / 2.0 * all.len() as f64) as usize;
            [all[tail], all[all.len() - 1 - tail]]
        });
        Some(Difference { logloss, relative, interval })
    }

    fn verdict(&self, all: &SliceReport, rules: &Rules) -> (Verdict, String) {
        let undecided = |why: String| (Verdict::Undecided, why);
        if self.pairs.is_empty() {
            return undecided("there is no block of time in which both were asked about the same examples".into());
        }
        if self.differ > self.pairs.len() {
            return undecided(format!(
                "in {} of {} blocks of time the runs had different examples: only runs that join and sample alike can be compared",
                self.differ,
                self.differ + self.pairs.len()
            ));
        }
        let clicks = all.candidate.positives;
        if clicks < rules.clicks {
            return undecided(format!("{clicks} clicks are fewer than the {} that a judgement needs", rules.clicks));
        }
        let Some(Difference { relative, interval: Some([low, high]), .. }) = all.difference else {
            return undecided(format!("{} blocks of time are too few for an interval", self.pairs.len()));
        };
        let percent = |share: f64| format!("{:+.3} %", 100.0 * share);
        let figures = format!("log loss {} ({} to {})", percent(relative), percent(low), percent(high));
        let [least, most] = rules.calibration;
        if let Some(calibration) = all.candidate.calibration.filter(|c| !(least..=most).contains(c)) {
            let why = format!("it predicts {calibration:.3} clicks for each that came, outside of {least} to {most}");
            return (Verdict::Worse, why);
        }
        let margin = percent(rules.margin);
        match (low, high) {
            (_, high) if high < 0.0 => (Verdict::Better, figures),
            (_, high) if high <= rules.margin => {
                (Verdict::NotWorse, format!("{figures}, within the margin of {margin}"))
            }
            (low, _) if low > rules.margin => (Verdict::Worse, format!("{figures}, beyond the margin of {margin}")),
            _ => undecided(format!("{figures}: that it lies within the margin of {margin} is not certain")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: i64 = 60_000;

    fn stretch() -> Stretch {
        Stretch { after: None, through: None, block: MINUTE, slices: vec![Slice { name: "odd".into(), row: 1 }] }
    }

    /// A run whose logits are off by `shift`; labels and ids are the same in all.
    fn run(examples: u64, shift: f32, stretch: Stretch) -> Kept {
        let mut kept = Kept::new(stretch);
        feed(&mut kept, 0..examples, shift);
        kept
    }

    fn feed(kept: &mut Kept, examples: std::ops::Range<u64>, shift: f32) {
        for i in examples {
            let hash = xxh3_64_with_seed(&i.to_le_bytes(), 3);
            let positive = hash.is_multiple_of(10);
            let logit = -2.2 + (hash >> 8) as f32 / (1u64 << 56) as f32 * 0.5 + shift;
            let outcome = Outcome { logit, e: libm::expf(-logit.abs()), gradient: 0.0, quarantined: false };
            let slots = [crate::event::Slot { row: i % 2, value: 1.0, feature: 0, flags: 0 }];
            let time = Time(i as i64 * 500);
            let example = Example { slots: &slots, positive, weight: 1.0, sampling_offset: 0.0, time, id: i + 1 };
            kept.observe(&outcome, &example);
        }
    }

    #[test]
    fn a_model_is_not_worse_than_itself_and_a_bent_one_is_worse_and_the_other_way_round_better() {
        let (good, bent) = (run(20_000, 0.0, stretch()), run(20_000, 0.5, stretch()));
        let verdict = |candidate: &Kept, live: &Kept| compare(candidate, live, &Rules::default()).verdict;
        assert_eq!(verdict(&good, &good), Verdict::NotWorse);
        assert_eq!(verdict(&bent, &good), Verdict::Worse);
        assert_eq!(verdict(&good, &bent), Verdict::Better);
        let report = compare(&bent, &good, &Rules::default());
        assert_eq!(report.slices.len(), 2);
        assert_eq!(report.slices[1].candidate.examples, 10_000);
        let [low, high] = report.slices[0].difference.unwrap().interval.unwrap();
        assert!(low < high && low > 0.0, "{low} {high}");
        let calibration = |metrics: Metrics| metrics.calibration.unwrap();
        assert!(calibration(report.slices[0].candidate) > 1.3 * calibration(report.slices[0].live));
    }

    #[test]
    fn too_little_is_not_judged() {
        let report = |n: u64| compare(&run(n, 0.0, stretch()), &run(n, 0.01, stretch()), &Rules::default());
        assert!(report(0).reason.contains("no block"));
        assert!(report(500).reason.contains("clicks are fewer than the 100"), "{}", report(500).reason);
        let rules = Rules { clicks: 1, ..Rules::default() };
        let few = compare(&run(500, 0.0, stretch()), &run(500, 0.01, stretch()), &rules);
        assert_eq!((few.verdict, few.blocks), (Verdict::Undecided, 5));
    }

    #[test]
    fn runs_over_other_examples_are_not_compared() {
        let live = run(20_000, 0.0, Stretch { through: Some((Time(5_000_000), 0)), ..stretch() });
        let mut other = Kept::new(stretch());
        feed(&mut other, 1..20_000, 0.0); // one is missing in the first block
        let report = compare(&other, &live, &Rules::default());
        assert_eq!(report.blocks_that_differ, 1 + 1 + 166 - 83);
        assert_eq!(report.verdict, Verdict::Undecided);
        assert!(report.reason.contains("had different examples"), "{}", report.reason);
    }

    #[test]
    fn sums_go_on_exactly_from_where_they_were_exported() {
        let whole = run(5000, 0.3, stretch());
        let mut parts = run(1234, 0.3, stretch());
        parts = Kept::import(stretch(), &parts.export()).unwrap();
        feed(&mut parts, 1234..5000, 0.3);
        assert_eq!(parts.export(), whole.export());
        assert!(Kept::import(stretch(), &whole.export()[..9]).is_err());
        let other = Stretch { slices: Vec::new(), ..stretch() };
        assert!(Kept::import(other, &whole.export()).is_err());
    }
}
