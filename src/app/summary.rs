//! What a run came to.

use std::collections::BTreeMap;

use serde::Serialize;

use super::warm::Brought;
use crate::config::Checked;
use crate::event::Time;
use crate::join::{Counts, DelayCurve};
use crate::merge::ReadCounts;
use crate::train::core::{Core, Image};
use crate::train::digest::Digests;
use crate::train::progressive::{Metrics, Report, Window};

/// What a run came to.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    pub job: String,
    /// `end`: bounded input was read to its end; `stopped`: by a signal.
    pub ended_by: &'static str,
    /// Whether this run went on from a checkpoint.
    pub resumed: bool,
    /// What it began with, if not with nothing or a checkpoint of its own.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm_start: Option<Brought>,
    /// Place of the last impression released.
    pub frontier: Option<Time>,
    pub counts: Counts,
    pub clicks_waiting: u64,
    /// Impressions and clicks accounted for in no class or in two; 0 unless there is a bug.
    pub impression_gap: i64,
    pub click_gap: i64,
    pub click_coverage: Option<f64>,
    pub delays: DelayCurve,
    pub read: ReadCounts,
    pub impressions_pending: usize,
    pub clicks_pending: usize,
    pub journal_entries: usize,
    pub dead_letters: u64,
    pub batches: u64,
    pub examples: u64,
    /// Progressive validation: of a model of age zero.
    pub metrics: Metrics,
    pub last_window: Option<Window>,
    pub missing_rate: BTreeMap<String, f64>,
    pub new_id_rate: BTreeMap<String, f64>,
    pub rows: usize,
    pub model_bytes: usize,
    /// By table: `rows`, `bytes`, and what became of ids.
    pub tables: BTreeMap<&'static str, BTreeMap<&'static str, u64>>,
    pub peak_pending_impressions: usize,
    pub examples_this_run: u64,
    pub impressions_this_run: u64,
    pub seconds: f64,
    pub examples_per_second: f64,
    pub impressions_per_second: f64,
    pub snapshot_version: Option<u64>,
    pub model_digest: String,
    pub order_digest: String,
    /// Event time where this run began.
    #[serde(skip)]
    pub first_frontier: Option<Time>,
    /// The last batch boundary, as a place among the examples.
    #[serde(skip)]
    pub place: Option<(Time, u64)>,
    /// What was kept for a comparison, up to there.
    #[serde(skip)]
    pub compare: Option<Vec<u64>>,
}

/// What [`summary`] needs to know of the run itself.
pub struct Run {
    pub ended: bool,
    pub resumed: bool,
    pub warm_start: Option<Brought>,
    pub seconds: f64,
    pub first_example: u64,
    pub first_impression: u64,
    pub first_frontier: Option<Time>,
    pub peak_pending: usize,
    pub version: Option<u64>,
}

pub fn summary(checked: &Checked, core: &Core, image: &Image, digests: Digests, dead: u64, run: &Run) -> Summary {
    let passed = image.place.frontier.map_or(Time::MIN, |key| key.time.plus(checked.join.window));
    let waiting = image.clicks.iter().filter(|click| click.time <= passed && !click.rejected).count() as u64;
    let Report { cumulative, open } = core.progress.report();
    let features = core.model.counts();
    let rate = |of: &[u64]| {
        let named = of.iter().enumerate().filter(|(_, n)| **n > 0);
        let named =
            named.map(|(i, n)| (checked.schema.name(i).to_owned(), *n as f64 / features.examples.max(1) as f64));
        named.collect::<BTreeMap<_, _>>()
    };
    let tables = core.model.tables().into_iter().map(|table| {
        let sizes = [("rows", table.rows as u64), ("bytes", table.bytes as u64)];
        (table.name, sizes.into_iter().chain(table.ids).collect())
    });
    let examples = image.place.examples - run.first_example;
    let impressions = image.counts.impressions - run.first_impression;
    Summary {
        job: checked.config.job.name.clone(),
        ended_by: if run.ended { "end" } else { "stopped" },
        resumed: run.resumed,
        warm_start: run.warm_start.clone(),
        frontier: image.place.frontier.map(|key| key.time),
        counts: image.counts,
        clicks_waiting: waiting,
        impression_gap: image.counts.impression_gap(),
        click_gap: image.counts.click_gap(waiting),
        click_coverage: image.counts.click_coverage(),
        delays: image.delays.clone(),
        read: core.merge().counts(),
        impressions_pending: core.merge().pending(),
        clicks_pending: core.merge().clicks_ahead(),
        journal_entries: image.journal.len(),
        dead_letters: dead,
        batches: image.place.batches,
        examples: image.place.examples,
        metrics: cumulative,
        last_window: open,
        missing_rate: rate(&features.missing),
        new_id_rate: rate(&features.unseen),
        rows: core.model.rows(),
        model_bytes: core.model.bytes(),
        tables: tables.collect(),
        peak_pending_impressions: run.peak_pending,
        examples_this_run: examples,
        impressions_this_run: impressions,
        seconds: run.seconds,
        examples_per_second: examples as f64 / run.seconds,
        impressions_per_second: impressions as f64 / run.seconds,
        snapshot_version: run.version,
        model_digest: digests.model,
        order_digest: digests.order,
        first_frontier: run.first_frontier.or(image.place.event_times.map(|(first, _)| first)),
        place: image.place.frontier.map(|key| (key.time, key.id)),
        compare: image.compare.clone(),
    }
}
