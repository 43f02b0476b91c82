//! The metrics of a training job, for Prometheus to read.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusBuilder;

/// Why the metrics cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`telemetry.listen` = `{listen}` cannot be listened at; choose a free port of this machine, or leave it out"
    )]
    Listen { listen: SocketAddr, source: std::io::Error },
    #[error("metrics cannot be collected")]
    Recorder(#[from] metrics_exporter_prometheus::BuildError),
    #[error("the thread that shows metrics cannot be started")]
    Thread(#[source] std::io::Error),
}

/// How often the exporter tidies up when nobody reads it.
const UPKEEP: Duration = Duration::from_secs(5);

/// Collects the process's metrics from now on and shows them until it ends. Returns the address, whose port is a free one
/// where `listen` has port 0.
pub fn start(listen: SocketAddr) -> Result<SocketAddr, Error> {
    let recorder = PrometheusBuilder::new().install_recorder()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
    let refused = |source| Error::Listen { listen, source };
    let socket = runtime.block_on(tokio::net::TcpListener::bind(listen)).map_err(refused)?;
    let address = socket.local_addr().map_err(refused)?;
    let show = recorder.clone();
    let routes = Router::new()
        .route("/metrics", get(move || std::future::ready(show.render())))
        .route("/healthz", get(|| std::future::ready("ok\n")));
    let body = move || {
        runtime.block_on(async {
            let tidy = async {
                loop {
                    tokio::time::sleep(UPKEEP).await;
                    recorder.run_upkeep();
                }
            };
            tokio::select! {
                ended = axum::serve(socket, routes) => tracing::error!(?ended, "metrics are no longer shown"),
                () = tidy => {}
            }
        });
    };
    std::thread::Builder::new().name("metrics".into()).spawn(body).map_err(Error::Thread)?;
    tracing::info!("metrics at http://{address}/metrics");
    Ok(address)
}
