//! How well the model does, measured apart from the trainer: its predictions beside the labels and the truth.
//!
//! The trainer writes what it predicted for each impression before it learned from it. Here that is read as it grows, and
//! the same impressions are scored with the probabilities that the generator drew their clicks from (what a model that
//! knew the truth would get) and with the best constant in hindsight.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use serde::Serialize;

use super::Error;
use super::feed::{Known, Ledger};
use crate::event::Time;

/// Examples that the figures of the moment are about.
const RECENT: usize = 20_000;
/// Examples between two points of the curve.
const POINT: u64 = 1_000;
/// A point of the curve is about so many parts before it.
const SMOOTH: usize = 5;

/// Sums over examples.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    examples: u64,
    positives: u64,
    predicted: f64,
    loss: f64,
    /// Of the truth, over those examples whose truth is known.
    best: f64,
    known: u64,
}

impl Sums {
    fn add(&mut self, other: &Self) {
        self.examples += other.examples;
        self.positives += other.positives;
        self.predicted += other.predicted;
        self.loss += other.loss;
        self.best += other.best;
        self.known += other.known;
    }

    fn figures(&self) -> Option<Figures> {
        let n = self.examples as f64;
        let share = self.positives as f64 / n;
        if self.positives == 0 || self.positives == self.examples {
            return None;
        }
        let constant = -share * libm::log(share) - (1.0 - share) * libm::log1p(-share);
        let best = (self.known == self.examples).then(|| self.best / n);
        let logloss = self.loss / n;
        Some(Figures {
            examples: self.examples,
            ctr: share,
            logloss,
            constant,
            best,
            closed: best.map(|best| (constant - logloss) / (constant - best)),
            calibration: self.predicted / self.positives as f64,
            auc: None,
            best_auc: None,
        })
    }
}

/// How well some examples were predicted.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Figures {
    pub examples: u64,
    pub ctr: f64,
    /// Of the model, of the best constant in hindsight and of the truth, on the very same examples.
    pub logloss: f64,
    pub constant: f64,
    pub best: Option<f64>,
    /// How much of the way from the constant to the best reachable is behind the model.
    pub closed: Option<f64>,
    /// Clicks predicted over clicks seen.
    pub calibration: f64,
    pub auc: Option<f64>,
    pub best_auc: Option<f64>,
}

#[derive(Clone, Copy, Debug)]
struct Scored {
    p: f32,
    truth: f32,
    positive: bool,
}

/// Follows the file of predictions.
pub struct Learning {
    path: PathBuf,
    file: Option<File>,
    /// The begin of a line that is not complete yet.
    rest: Vec<u8>,
    /// The header was read.
    begun: bool,
    /// The ids are those of a generated stream.
    pub has_truth: bool,
    recent: VecDeque<Scored>,
    parts: Vec<Sums>,
    open: Sums,
    pub examples: u64,
    /// Event time of the last example, where it is known.
    pub last: Option<Time>,
}

impl Learning {
    pub fn new(path: PathBuf, has_truth: bool) -> Self {
        Self {
            path,
            file: None,
            rest: Vec::new(),
            begun: false,
            has_truth,
            recent: VecDeque::new(),
            parts: Vec::new(),
            open: Sums::default(),
            examples: 0,
            last: None,
        }
    }

    /// Reads what was written since the last call.
    pub fn read(&mut self, ledger: &Ledger) -> Result<(), Error> {
        if self.file.is_none() {
            self.file = File::open(&self.path).ok(); // the trainer makes it when it starts
        }
        let Some(file) = &mut self.file else { return Ok(()) };
        let read = file.read_to_end(&mut self.rest);
        read.map_err(|source| Error::File { path: self.path.clone(), source })?;
        let Some(end) = self.rest.iter().rposition(|byte| *byte == b'\n') else { return Ok(()) };
        let bytes = std::mem::take(&mut self.rest);
        self.rest.extend_from_slice(&bytes[end + 1..]);
        let mut truth = ledger.truth();
        for line in bytes[..end].split(|byte| *byte == b'\n') {
            if !std::mem::replace(&mut self.begun, true) {
                continue;
            }
            let Some((id, p, positive)) = parse(line) else {
                let line = String::from_utf8_lossy(line).into_owned();
                return Err(Error::Prediction { path: self.path.clone(), line });
            };
            let known = if self.has_truth { hex(id).and_then(|id| truth.remove(&id)) } else { None };
            self.add(p, positive, known);
        }
        Ok(())
    }

    fn add(&mut self, p: f64, positive: bool, known: Option<Known>) {
        let loss = |p: f64| if positive { -libm::log(p) } else { -libm::log1p(-p) };
        let open = &mut self.open;
        open.examples += 1;
        open.positives += u64::from(positive);
        open.predicted += p;
        open.loss += loss(p);
        if let Some(known) = known {
            open.best += loss(f64::from(known.p));
            open.known += 1;
            self.last = self.last.max(Some(known.time));
        }
        if open.examples == POINT {
            self.parts.push(std::mem::take(open));
        }
        self.examples += 1;
        if self.recent.len() == RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Scored { p: p as f32, truth: known.map_or(f32::NAN, |known| known.p), positive });
    }

    /// About the last examples, 20,000 at most.
    pub fn recent(&self) -> Option<Figures> {
        let mut sums = Sums::default();
        for scored in &self.recent {
            let loss = |p: f32| {
                let p = f64::from(p);
                if scored.positive { -libm::log(p) } else { -libm::log1p(-p) }
            };
            sums.examples += 1;
            sums.positives += u64::from(scored.positive);
            sums.predicted += f64::from(scored.p);
            sums.loss += loss(scored.p);
            if !scored.truth.is_nan() {
                sums.best += loss(scored.truth);
                sums.known += 1;
            }
        }
        let mut figures = sums.figures()?;
        let auc_by = |score: fn(&Scored) -> f32| {
            auc(&mut self.recent.iter().map(|scored| (score(scored), scored.positive)).collect::<Vec<_>>())
        };
        figures.auc = auc_by(|scored| scored.p);
        figures.best_auc = figures.best.and_then(|_| auc_by(|scored| scored.truth));
        Some(figures)
    }

    /// About the last third of all examples, to the thousand.
    pub fn last_third(&self) -> Option<Figures> {
        let all = self.parts.iter().chain((self.open.examples > 0).then_some(&self.open));
        let mut sums = Sums::default();
        all.skip(self.parts.len() * 2 / 3).for_each(|part| sums.add(part));
        sums.figures()
    }

    /// About all examples.
    pub fn all(&self) -> Option<Figures> {
        let mut sums = self.open;
        self.parts.iter().for_each(|part| sums.add(part));
        sums.figures()
    }

    /// For every thousand examples: how much of the way from the constant to the best reachable was behind the model in
    /// these and the 4,000 before; where no best is known, from the constant to a loss of half of it.
    pub fn curve(&self) -> Vec<f64> {
        let point = |end: usize| {
            let mut sums = Sums::default();
            self.parts[end.saturating_sub(SMOOTH)..end].iter().for_each(|part| sums.add(part));
            let figures = sums.figures();
            figures.map_or(0.0, |f| f.closed.unwrap_or((f.constant - f.logloss) / (0.5 * f.constant)))
        };
        (1..=self.parts.len()).map(point).collect()
    }
}

/// `id,prediction,label`; the id may be quoted.
fn parse(line: &[u8]) -> Option<(&[u8], f64, bool)> {
    let label = line.iter().rposition(|byte| *byte == b',')?;
    let p = line[..label].iter().rposition(|byte| *byte == b',')?;
    let number = std::str::from_utf8(&line[p + 1..label]).ok()?.parse().ok()?;
    let positive = match &line[label + 1..] {
        b"0" => false,
        b"1" => true,
        _ => return None,
    };
    Some((&line[..p], number, positive))
}

fn hex(id: &[u8]) -> Option<u64> {
    u64::from_str_radix(std::str::from_utf8(id).ok()?, 16).ok()
}

/// Probability that a positive scores above a negative, equal scores half.
fn auc(scored: &mut [(f32, bool)]) -> Option<f64> {
    scored.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    let (mut wins, mut negatives, mut positives) = (0.0, 0.0, 0.0);
    for equal in scored.chunk_by(|a, b| a.0 == b.0) {
        let hits = equal.iter().filter(|(_, positive)| *positive).count() as f64;
        let misses = equal.len() as f64 - hits;
        wins += hits * (negatives + 0.5 * misses);
        negatives += misses;
        positives += hits;
    }
    (positives * negatives > 0.0).then(|| wins / (positives * negatives))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_predictions_is_read_whatever_its_id() {
        assert_eq!(parse(b"00ff,0.25,1"), Some((&b"00ff"[..], 0.25, true)));
        assert_eq!(parse(b"\"a,\"\"b\",0.5,0"), Some((&b"\"a,\"\"b\""[..], 0.5, false)));
        assert_eq!(parse(b"a,0.5"), None);
        assert_eq!(parse(b"a,0.5,2"), None);
    }

    #[test]
    fn equal_scores_count_half_in_the_auc() {
        let two = |a: f32, b: f32| auc(&mut [(a, false), (b, true)]);
        assert_eq!((two(0.1, 0.2), two(0.2, 0.1), two(0.2, 0.2)), (Some(1.0), Some(0.0), Some(0.5)));
        assert_eq!(auc(&mut [(0.1, true)]), None);
    }

    #[test]
    fn the_truth_closes_the_whole_way_and_the_constant_nothing() {
        let ledger = Ledger::default();
        let dir = tempfile::tempdir().unwrap();
        for (truthful, expected) in [(true, 1.0), (false, 0.0)] {
            let path = dir.path().join(format!("{truthful}.csv"));
            let mut text = "id,prediction,label\n".to_owned();
            for id in 0..3000_u64 {
                let p = if id % 2 == 0 { 0.25 } else { 0.75 };
                let positive = if id % 2 == 0 { id % 8 == 0 } else { id % 8 != 1 };
                ledger.truth().insert(id, Known { p, time: Time(id as i64) });
                let said = if truthful { f64::from(p) } else { 0.5 };
                text += &format!("{id:016x},{said},{}\n", u8::from(positive));
            }
            std::fs::write(&path, text + "0000").unwrap();
            let mut learning = Learning::new(path, true);
            learning.read(&ledger).unwrap();
            assert_eq!((learning.examples, learning.last), (3000, Some(Time(2999))));
            for figures in [learning.all(), learning.last_third(), learning.recent()] {
                assert!((figures.unwrap().closed.unwrap() - expected).abs() < 1e-6, "{figures:?}");
            }
            assert_eq!(learning.last_third().unwrap().examples, 1000);
            assert_eq!(learning.curve().len(), 3);
        }
    }
}
