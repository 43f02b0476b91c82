//! The listener of a training job: its metrics for Prometheus, its state, and an operator's word.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde_json::{Value, json};

use super::control::{Command, Control};

/// Why the job cannot be listened to.
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

/// How long an operator's word may wait for the core, which takes it between two batches.
const PATIENCE: Duration = Duration::from_secs(60);

/// Collects the process's metrics from now on and shows them until it ends, and lets operators speak to the job through
/// `control`. Returns the address, whose port is a free one where `listen` has port 0.
pub fn start(listen: SocketAddr, control: Arc<Control>) -> Result<SocketAddr, Error> {
    let recorder = super::recorder::install()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Thread)?;
    let refused = |source| Error::Listen { listen, source };
    let socket = runtime.block_on(tokio::net::TcpListener::bind(listen)).map_err(refused)?;
    let address = socket.local_addr().map_err(refused)?;
    let show = recorder.clone();
    let routes = Router::new()
        .route("/metrics", get(move || std::future::ready(show.render())))
        .route("/healthz", get(|| std::future::ready("ok\n")))
        .route("/readyz", get(ready))
        .route("/status", get(status))
        .route("/release", post(release))
        .route("/accept", post(accept))
        .with_state(control);
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

fn answer(status: StatusCode, body: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n")).into_response()
}

/// Whether the job follows its input: 503 while it starts and while the fuse holds it.
async fn ready(State(control): State<Arc<Control>>) -> Response {
    let status = control.status();
    let ready = status.state == "running";
    let code = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    answer(code, &json!({ "ready": ready, "state": status.state, "held": status.held }))
}

async fn status(State(control): State<Arc<Control>>) -> Response {
    answer(StatusCode::OK, &json!(control.status()))
}

async fn release(State(control): State<Arc<Control>>, uri: Uri) -> Response {
    match parameter(&uri, "partition") {
        Ok(partition) => tell(&control, Command::Release { partition }).await,
        Err(error) => answer(StatusCode::BAD_REQUEST, &json!({ "error": error })),
    }
}

async fn accept(State(control): State<Arc<Control>>, uri: Uri) -> Response {
    let number = parameter(&uri, "batch").and_then(|text| {
        let parse = |text: String| text.parse().map_err(|_| format!("`batch` must be a number, got `{text}`"));
        text.map(parse).transpose()
    });
    match number {
        Ok(batch) => tell(&control, Command::Accept { batch }).await,
        Err(error) => answer(StatusCode::BAD_REQUEST, &json!({ "error": error })),
    }
}

/// The one parameter that a request may have.
fn parameter(uri: &Uri, name: &str) -> Result<Option<String>, String> {
    let Some(query) = uri.query().filter(|query| !query.is_empty()) else { return Ok(None) };
    match query.split_once('=') {
        Some((key, value)) if key == name => {
            let decoded = percent_encoding::percent_decode_str(value).decode_utf8();
            decoded.map(|text| Some(text.into_owned())).map_err(|_| format!("`{value}` is not percent-encoded UTF-8"))
        }
        _ => Err(format!("expected `?{name}=...` or nothing, got `?{query}`")),
    }
}

/// Leaves a command to the core and waits for its answer.
async fn tell(control: &Control, command: Command) -> Response {
    let (reply, answered) = tokio::sync::oneshot::channel();
    // Nobody waits for the answer any more: the operator has hung up.
    control.tell(command, Box::new(move |done| drop(reply.send(done))));
    match tokio::time::timeout(PATIENCE, answered).await {
        Ok(Ok(Ok(done))) => answer(StatusCode::OK, &done),
        Ok(Ok(Err(error))) => answer(StatusCode::CONFLICT, &json!({ "error": error })),
        Ok(Err(_)) | Err(_) => {
            let error =
                format!("the job did not answer within {PATIENCE:?}; see GET /status for whether it did as told");
            answer(StatusCode::GATEWAY_TIMEOUT, &json!({ "error": error }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_may_have_its_one_parameter_and_no_other() {
        let ask = |uri: &str| parameter(&uri.parse().unwrap(), "partition");
        assert_eq!(ask("/release"), Ok(None));
        assert_eq!(ask("/release?partition=a%2Fclicks-0.jsonl"), Ok(Some("a/clicks-0.jsonl".into())));
        assert!(ask("/release?batch=3").unwrap_err().contains("expected `?partition=...`"));
        assert!(ask("/release?partition=%ff").unwrap_err().contains("not percent-encoded UTF-8"));
    }
}
