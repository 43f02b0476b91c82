//! Every metric by name, with its unit: one function per event.
//!
//! Counters end in `_total`, times are seconds, sizes bytes. They go through the `metrics` facade.

use metrics::{counter, gauge};

use crate::event::Time;
use crate::join::Counts;
use crate::merge::ReadCounts;
use crate::train::progressive::Metrics;

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

/// A snapshot version was published.
pub fn published(version: u64) {
    counter!("tidemill_snapshots_published_total").increment(1);
    gauge!("tidemill_snapshot_version").set(version as f64);
}

/// A snapshot could not be published.
pub fn publish_failed() {
    counter!("tidemill_snapshot_failures_total").increment(1);
}

/// A checkpoint was written, in so many seconds.
pub fn checkpointed(seconds: f64) {
    counter!("tidemill_checkpoints_total").increment(1);
    gauge!("tidemill_checkpoint_seconds").set(seconds);
}

/// A checkpoint could not be written.
pub fn checkpoint_failed() {
    counter!("tidemill_checkpoint_failures_total").increment(1);
}
