//! Joined, labelled examples to files: the order and the join of a training job, without a model.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::dead_letters::DeadLetters;
use super::input;
use super::job::{Error, Options};
use crate::batch::Cutter;
use crate::config::{Checked, Config};
use crate::event::Time;
use crate::join::fuse::Fuse;
use crate::join::{Counts, Join};
use crate::merge::Merge;
use crate::model;
use crate::source::columnar::sink::{Example, Settings, Sink};
use crate::train::core::{Advance, Core, Joined, Sampling};
use crate::train::progressive::Progressive;

/// What was written.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Examples, by their labels; those before `--from` and those that a signal cut off are not among them.
    pub positives: u64,
    pub negatives: u64,
    pub first: Option<Time>,
    pub last: Option<Time>,
    pub files: Vec<PathBuf>,
    pub bytes: u64,
    /// Of all records that were read.
    pub counts: Counts,
    pub impression_gap: i64,
    pub click_gap: i64,
    pub seconds: f64,
    pub examples_per_second: f64,
}

/// What is shown now and then.
#[derive(Clone, Copy, Debug)]
pub struct Tick {
    pub examples: u64,
    pub frontier: Option<Time>,
    pub per_second: f64,
}

/// Reads the bounded stretch that `options` name and writes its examples from `from` on. `None` if `stop` was set before
/// the end: then only files that were complete are there.
pub fn run(
    checked: &Checked,
    options: &Options,
    from: Option<Time>,
    settings: Settings,
    stop: &AtomicBool,
    progress: &mut dyn FnMut(&Tick),
) -> Result<Option<Summary>, Error> {
    let config = &checked.config;
    // Rejected records are in the dead letters of the job that trains; here they are counted.
    let mut dead = DeadLetters::open(&Config { dead_letters: None, ..config.clone() })?;
    let mut sink = Sink::create(settings, &checked.schema)?;
    let period = config.batch.period.0.map(|period| period.as_millis() as i64);
    let mut core = Core::new(
        Merge::new(checked.merge),
        Join::new(checked.join),
        Cutter::new(config.batch.examples, period),
        Sampling::new(config.job.seed, 1.0),
        Fuse::new(&config.fuse),
        // A model that nothing is learned by: the smallest there is.
        model::Checked { towers: None, ..checked.model.clone() }.start()?,
        Progressive::new(&config.metrics)?,
    );
    core.keep_examples();
    let mut input = input::open(checked, options, &[], &mut core)?;
    core.opened();
    let (begun, mut shown) = (Instant::now(), Instant::now());
    let (mut labels, mut times) = ([0; 2], None);
    loop {
        match core.advance()? {
            Advance::Boundary => {
                while let Some(chunk) = core.merge_mut().take_recycled() {
                    input.recycler.give(chunk);
                }
                core.merge_mut().take_rejected();
                core.take_examples(|joined| {
                    let Joined { text, slots, time, event_time, weight, positive } = joined;
                    if from.is_some_and(|from| time < from) {
                        return Ok(());
                    }
                    labels[usize::from(positive)] += 1;
                    times = Some((times.map_or(time, |(first, _)| first), time));
                    sink.write(&Example { text, slots, time, event_time, positive, weight })
                })?;
            }
            Advance::Unfinished => {}
            Advance::Held => {
                let held = core.held().expect("the core says so");
                return Err(Error::CtrJump { batch: core.place().batches + 1, time: held.first.time, jump: held.jump });
            }
            Advance::Wait { on, .. } => input::pump(&mut core, &mut input, on, &mut dead)?,
            Advance::End => break,
        }
        if stop.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if shown.elapsed() > Duration::from_secs(1) {
            shown = Instant::now();
            let examples = core.place().examples;
            let frontier = core.place().frontier.map(|key| key.time);
            progress(&Tick { examples, frontier, per_second: examples as f64 / begun.elapsed().as_secs_f64() });
        }
    }
    let (files, bytes) = sink.finish()?;
    let seconds = begun.elapsed().as_secs_f64();
    let counts = core.join().counts;
    let (_, clicks_waiting) = core.join().settled();
    let [negatives, positives] = labels;
    Ok(Some(Summary {
        positives,
        negatives,
        first: times.map(|(first, _)| first),
        last: times.map(|(_, last)| last),
        files,
        bytes,
        counts,
        impression_gap: counts.impression_gap(),
        click_gap: counts.click_gap(clicks_waiting),
        seconds,
        examples_per_second: (negatives + positives) as f64 / seconds,
    }))
}
