//! Collects the metrics of this process, for Prometheus to read.

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use crate::telemetry;

/// Upper bounds of histograms of latencies, in seconds.
const LATENCIES: [f64; 14] = [5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0];

/// Begins to collect. A process does so once.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    PrometheusBuilder::new()
        .set_buckets(&LATENCIES)?
        .set_buckets_for_metric(Matcher::Full(telemetry::FRESHNESS.into()), &telemetry::AGES)?
        .install_recorder()
}
