//! Every metric by name, with its unit: one function per event.
//!
//! Counters end in `_total`, times are seconds, sizes bytes. They go through the `metrics` facade.

use metrics::{counter, gauge, histogram};

use crate::event::{Stream, Time};
use crate::join::Counts;
use crate::merge::{Attention, ReadCounts};
use crate::train::progressive::Metrics;

/// A stage between an event and a model that has learned from it; each comes after the one above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A chunk of impressions or clicks was offered to the merge. What nobody needs yet is left in the log, so impressions
    /// are consumed about when their window closes.
    Consumed(Stream),
    /// Impressions have met their clicks and were released, to the batch that is open.
    Joined,
    /// A batch was scored and learned from.
    Learned,
    /// A version of the model was published.
    Published,
    /// A node serves it.
    Served,
}

/// Upper bounds of the histogram of [`reached`], in seconds.
pub const AGES: [f64; 20] = [
    0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 900.0, 1800.0, 3600.0,
    21_600.0,
];

/// Name of the histogram of [`reached`].
pub const FRESHNESS: &str = "tidemill_freshness_seconds";

/// A chunk, a batch or a version has reached a stage, the newest of its records with this time (its event time, or its place
/// in the order where it has one).
///
/// Of each stage there is the histogram of how old that record was at that moment, seconds, and its time, seconds since
/// 1970: what has got stuck shows in the second alone, as `time() - tidemill_freshness_timestamp_seconds`.
pub fn reached(stage: Stage, newest: Time, now: Time) {
    let name = match stage {
        Stage::Consumed(Stream::Impressions) => "consumed_impressions",
        Stage::Consumed(Stream::Clicks) => "consumed_clicks",
        Stage::Joined => "joined",
        Stage::Learned => "learned",
        Stage::Published => "published",
        Stage::Served => "served",
    };
    // A client's clock may be ahead of ours.
    let age = (now.0 - newest.0).max(0) as f64 / 1000.0;
    histogram!(FRESHNESS, "stage" => name).record(age);
    gauge!("tidemill_freshness_timestamp_seconds", "stage" => name).set(newest.0 as f64 / 1000.0);
}

/// A batch boundary was reached. Counts are absolute since the start of the lineage.
pub fn boundary(counts: &Counts, read: &ReadCounts, waiting_clicks: u64, frontier: Time, batches: u64) {
    let impressions = [
        ("positive", counts.positives),
        ("negative", counts.negatives),
        ("sampled_out", counts.sampled_out),
        ("duplicate", counts.duplicates),
        ("too_late", counts.too_late),
        ("rejected", counts.rejected),
        ("quarantined", counts.quarantined),
        ("before_start", counts.before_start),
    ];
    for (outcome, n) in impressions {
        counter!("tidemill_impressions_total", "outcome" => outcome).absolute(n);
    }
    let clicks = [
        ("attributed", counts.clicks_attributed),
        ("duplicate", counts.clicks_duplicate),
        ("missed", counts.clicks_missed),
        ("outside", counts.clicks_outside),
        ("orphan", counts.clicks_orphan),
        ("rejected", counts.clicks_rejected),
    ];
    for (outcome, n) in clicks {
        counter!("tidemill_clicks_total", "outcome" => outcome).absolute(n);
    }
    counter!("tidemill_late_records_total", "stream" => "impressions").absolute(counts.late);
    counter!("tidemill_late_records_total", "stream" => "clicks").absolute(counts.clicks_late);
    counter!("tidemill_overtaken_records_total").absolute(read.overtaken);
    counter!("tidemill_batches_total").absolute(batches);
    gauge!("tidemill_waiting_clicks").set(waiting_clicks as f64);
    gauge!("tidemill_frontier_seconds").set(frontier.0 as f64 / 1000.0);
    gauge!("tidemill_conservation_gap", "of" => "impressions").set(counts.impression_gap() as f64);
    gauge!("tidemill_conservation_gap", "of" => "clicks").set(counts.click_gap(waiting_clicks) as f64);
}

/// A sparse table at a batch boundary. What became of ids is absolute since the start of the lineage.
pub fn table(name: &'static str, rows: usize, bytes: usize, ids: &[(&'static str, u64)]) {
    gauge!("tidemill_table_rows", "table" => name).set(rows as f64);
    gauge!("tidemill_table_bytes", "table" => name).set(bytes as f64);
    for &(outcome, n) in ids {
        counter!("tidemill_table_ids_total", "table" => name, "outcome" => outcome).absolute(n);
    }
}

/// Where a partition of a Kafka topic stands: records that were not trained, records between what its log still has and what
/// is to be trained next, messages without a value, and whether its broker did not answer.
pub fn kafka_partition(stream: Stream, partition: &str, lag: u64, margin: u64, tombstones: u64, away: bool) {
    let labels = [("stream", stream.name().to_owned()), ("partition", partition.to_owned())];
    gauge!("tidemill_kafka_lag_records", &labels).set(lag as f64);
    gauge!("tidemill_kafka_retention_margin_records", &labels).set(margin as f64);
    gauge!("tidemill_kafka_away", &labels).set(if away { 1.0 } else { 0.0 });
    counter!("tidemill_kafka_tombstones_total", &labels).absolute(tombstones);
}

/// Where a partition stands. `behind`: event time behind the furthest of its stream, seconds; `missing`: clicks that it
/// should have brought while it is silent.
pub fn partition(
    stream: &'static str,
    name: &str,
    state: Attention,
    watermark: Time,
    behind: Option<f64>,
    missing: f64,
) {
    let name = || name.to_owned();
    if let Some(behind) = behind {
        gauge!("tidemill_partition_watermark_seconds", "stream" => stream, "partition" => name())
            .set(watermark.0 as f64 / 1000.0);
        gauge!("tidemill_partition_behind_seconds", "stream" => stream, "partition" => name()).set(behind);
    }
    for each in Attention::ALL {
        gauge!("tidemill_partition_state", "stream" => stream, "partition" => name(), "state" => each.name())
            .set(if each == state { 1.0 } else { 0.0 });
    }
    if stream == "clicks" {
        gauge!("tidemill_partition_clicks_missing", "partition" => name()).set(missing);
    }
}

/// Whether the fuse holds the release for this reason.
pub fn held(why: &'static str, now: bool) {
    gauge!("tidemill_held", "why" => why).set(if now { 1.0 } else { 0.0 });
}

/// The fuse has begun to hold the release for this reason.
pub fn hold(why: &'static str) {
    counter!("tidemill_holds_total", "why" => why).increment(1);
}

/// What waits, and how far behind the frontier is. `decisions`: entries of the journal by kind.
pub fn waiting(
    held_seconds: f64,
    impressions: u64,
    clicks_ahead: u64,
    frontier_behind: Option<f64>,
    recent_ctr: Option<f64>,
    decisions: &[(&'static str, u64)],
) {
    gauge!("tidemill_held_seconds").set(held_seconds);
    gauge!("tidemill_impressions_waiting").set(impressions as f64);
    gauge!("tidemill_clicks_ahead").set(clicks_ahead as f64);
    if let Some(behind) = frontier_behind {
        gauge!("tidemill_frontier_behind_seconds").set(behind);
    }
    if let Some(ctr) = recent_ctr {
        gauge!("tidemill_recent_ctr").set(ctr);
    }
    for &(decision, entries) in decisions {
        gauge!("tidemill_journal_entries", "decision" => decision).set(entries as f64);
    }
}

/// A window of progressive validation (model age zero) was closed.
pub fn window(metrics: &Metrics) {
    let figures = [
        ("tidemill_progressive_logloss_nats", metrics.logloss),
        ("tidemill_progressive_auc", metrics.auc),
        ("tidemill_progressive_normalised_entropy", metrics.normalised_entropy),
        ("tidemill_progressive_calibration", metrics.calibration),
        ("tidemill_progressive_ctr", metrics.ctr),
    ];
    for (name, value) in figures {
        if let Some(value) = value {
            gauge!(name).set(value);
        }
    }
}

/// A snapshot version was published, in so many seconds.
pub fn published(version: u64, seconds: f64) {
    counter!("tidemill_snapshots_published_total").increment(1);
    gauge!("tidemill_snapshot_version").set(version as f64);
    gauge!("tidemill_snapshot_publish_seconds").set(seconds);
}

/// Whether an operator has pinned the channel, as the last publication found it.
pub fn pinned(pinned: bool) {
    gauge!("tidemill_snapshot_channel_pinned").set(if pinned { 1.0 } else { 0.0 });
}

/// The snapshot store was asked, by a publication or retention: bytes written, and requests made again without an answer.
pub fn asked_store(written: u64, retries: u64) {
    counter!("tidemill_snapshot_written_bytes_total").increment(written);
    counter!("tidemill_snapshot_store_retries_total").increment(retries);
}

/// The gate held a version.
pub fn snapshot_held() {
    counter!("tidemill_snapshots_held_total").increment(1);
}

/// What the version that serves said of a sample of the examples since it was published, before the next one replaces it.
pub fn as_served(logloss: Option<f64>, auc: Option<f64>, calibration: Option<f64>) {
    let figures = [
        ("tidemill_as_served_logloss_nats", logloss),
        ("tidemill_as_served_auc", auc),
        ("tidemill_as_served_calibration", calibration),
    ];
    for (name, value) in figures {
        if let Some(value) = value {
            gauge!(name).set(value);
        }
    }
}

/// A snapshot could not be published.
pub fn publish_failed() {
    counter!("tidemill_snapshot_failures_total").increment(1);
}

/// The core has copied what a checkpoint needs, in so many seconds, and goes on.
pub fn checkpoint_copied(seconds: f64) {
    gauge!("tidemill_checkpoint_copy_seconds").set(seconds);
}

/// A checkpoint was written, in so many seconds and bytes.
pub fn checkpointed(seconds: f64, bytes: u64) {
    counter!("tidemill_checkpoints_total").increment(1);
    counter!("tidemill_checkpoint_bytes_total").increment(bytes);
    gauge!("tidemill_checkpoint_seconds").set(seconds);
}

/// A checkpoint could not be written.
pub fn checkpoint_failed() {
    counter!("tidemill_checkpoint_failures_total").increment(1);
}

/// A node serves another version, which it had loaded and proved in so many seconds.
pub fn swapped(version: u64, published: Time, frontier: Option<Time>, seconds: f64) {
    counter!("tidemill_serve_swaps_total").increment(1);
    gauge!("tidemill_serve_version").set(version as f64);
    gauge!("tidemill_serve_published_timestamp_seconds").set(published.0 as f64 / 1000.0);
    if let Some(frontier) = frontier {
        gauge!("tidemill_serve_frontier_timestamp_seconds").set(frontier.0 as f64 / 1000.0);
    }
    gauge!("tidemill_serve_load_seconds").set(seconds);
}

/// What the version that a node serves takes: rows, bytes of memory, and bytes of a mapped file.
pub fn serves(rows: usize, memory: usize, mapped: usize) {
    gauge!("tidemill_serve_rows").set(rows as f64);
    gauge!("tidemill_serve_memory_bytes").set(memory as f64);
    gauge!("tidemill_serve_mapped_bytes").set(mapped as f64);
}

/// A node refused a version.
pub fn refused(version: u64) {
    counter!("tidemill_serve_refused_total").increment(1);
    gauge!("tidemill_serve_refused_version").set(version as f64);
}

/// Whether a node can follow its channel: it asked the store, in vain if `problem`.
pub fn followed(problem: bool) {
    counter!("tidemill_serve_polls_total", "outcome" => if problem { "failed" } else { "answered" }).increment(1);
    gauge!("tidemill_serve_store_away").set(if problem { 1.0 } else { 0.0 });
}

/// A request for scores was answered.
pub fn request(outcome: &'static str, candidates: usize, seconds: f64) {
    counter!("tidemill_serve_requests_total", "outcome" => outcome).increment(1);
    counter!("tidemill_serve_candidates_total").increment(candidates as u64);
    histogram!("tidemill_serve_request_seconds").record(seconds);
}

/// A request for scores that is being answered, until this is dropped.
pub struct InFlight(());

impl InFlight {
    #[must_use]
    pub fn begin() -> Self {
        gauge!("tidemill_serve_requests_in_flight").increment(1.0);
        Self(())
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        gauge!("tidemill_serve_requests_in_flight").decrement(1.0);
    }
}
