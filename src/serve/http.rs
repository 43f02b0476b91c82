//! The HTTP server of a node. `docs/serving.md` says what it answers.

use std::cell::RefCell;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use super::score::{Score, Scorer};
use super::{Error, Node, Part, Refused, SHORTEST, Wrong, at_least};
use crate::clock;
use crate::telemetry;

/// `[http]`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Address and port; port 0 takes a free one. Default `"127.0.0.1:8787"`, which only this machine reaches.
    pub listen: String,
    /// Threads that answer requests. Default 0: one per core.
    pub threads: usize,
    /// Largest body of a request, in bytes. Default 1048576.
    pub max_body: usize,
    /// Most candidates in a request. Default 1000.
    pub max_candidates: usize,
    /// A request whose body has not come in this time is answered with 408. Default 2s.
    #[serde(with = "humantime_serde")]
    pub timeout: Duration,
    /// Requests for scores at a time; more are answered with 503 at once. Default 256.
    pub max_requests: usize,
    /// Open connections; more wait to be accepted. Default 4096.
    pub max_connections: usize,
    /// A connection over which no request came for so long is closed; also the time that a request's head may take.
    /// Default 75s.
    #[serde(with = "humantime_serde")]
    pub idle: Duration,
    /// After SIGTERM the node goes on for so long with `/readyz` at 503, so that load balancers turn away. Default 0s.
    #[serde(with = "humantime_serde")]
    pub drain_delay: Duration,
    /// Then it takes no more connections, and those that are open have so long to finish their request. Default 10s.
    #[serde(with = "humantime_serde")]
    pub grace: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            listen: "127.0.0.1:8787".into(),
            threads: 0,
            max_body: 1 << 20,
            max_candidates: 1000,
            timeout: Duration::from_secs(2),
            max_requests: 256,
            max_connections: 4096,
            idle: Duration::from_secs(75),
            drain_delay: Duration::ZERO,
            grace: Duration::from_secs(10),
        }
    }
}

impl Settings {
    pub(super) fn check(&self) -> Result<(), Error> {
        for (key, value) in [
            ("http.max_body", self.max_body),
            ("http.max_candidates", self.max_candidates),
            ("http.max_requests", self.max_requests),
            ("http.max_connections", self.max_connections),
        ] {
            if !(1..=1 << 30).contains(&value) {
                return Err(Error::Setting { key, value: value.to_string(), expected: "must be 1 to 1073741824" });
            }
        }
        if self.threads > 1024 {
            let value = self.threads.to_string();
            return Err(Error::Setting { key: "http.threads", value, expected: "must be at most 1024" });
        }
        at_least("http.timeout", self.timeout, SHORTEST, "must be at least 1ms")?;
        at_least("http.idle", self.idle, SHORTEST, "must be at least 1ms")
    }
}

/// A running server. Dropping it without [`Server::drain`] cuts its connections.
pub struct Server {
    address: SocketAddr,
    shared: Arc<Shared>,
    runtime: tokio::runtime::Runtime,
    accepting: tokio::task::JoinHandle<usize>,
}

struct Shared {
    node: Arc<Node>,
    settings: Settings,
    permits: Semaphore,
    phase: watch::Sender<Phase>,
    metrics: Box<dyn Fn() -> String + Send + Sync>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    /// `/readyz` says no, all else goes on.
    Leaving,
    /// No new connections; open ones finish.
    Closing,
}

impl Server {
    /// Listens and answers, on threads of its own. `metrics` writes what `/metrics` shows.
    pub fn start(
        node: Arc<Node>,
        settings: &Settings,
        metrics: impl Fn() -> String + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        settings.check()?;
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        if settings.threads > 0 {
            builder.worker_threads(settings.threads);
        }
        let runtime = builder.thread_name("http").enable_all().build();
        let runtime = runtime.map_err(|source| Error::Start { what: "the threads of the server", source })?;
        let listen = |source| Error::Listen { address: settings.listen.clone(), source };
        let listener = runtime.block_on(TcpListener::bind(&settings.listen)).map_err(listen)?;
        let address = listener.local_addr().map_err(listen)?;
        let shared = Arc::new(Shared {
            node,
            settings: settings.clone(),
            permits: Semaphore::new(settings.max_requests),
            phase: watch::Sender::new(Phase::Running),
            metrics: Box::new(metrics),
        });
        let accepting = runtime.spawn(accept(listener, Arc::clone(&shared)));
        Ok(Self { address, shared, runtime, accepting })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Stops in good order, see `drain_delay` and `grace` in [`Settings`]. Returns how many connections had to be cut.
    #[must_use]
    pub fn drain(self) -> usize {
        let Self { shared, runtime, accepting, .. } = self;
        let cut = runtime.block_on(async {
            shared.phase.send_replace(Phase::Leaving);
            tokio::time::sleep(shared.settings.drain_delay).await;
            shared.phase.send_replace(Phase::Closing);
            accepting.await.unwrap_or(0)
        });
        runtime.shutdown_background();
        cut
    }
}

/// Accepts until the server closes, then lets the connections finish; returns how many did not.
async fn accept(listener: TcpListener, shared: Arc<Shared>) -> usize {
    let router = router(Arc::clone(&shared));
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(shared.settings.max_connections));
    let mut phase = shared.phase.subscribe();
    loop {
        let next = async {
            let place = Arc::clone(&room).acquire_owned().await.expect("never closed");
            (place, listener.accept().await)
        };
        let (place, accepted) = tokio::select! {
            _ = phase.wait_for(|phase| *phase == Phase::Closing) => break,
            next = next => next,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Of one connection, or too many open files: either passes.
                tracing::debug!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(shared.settings.idle)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
            drop(place);
        });
    }
    drop(listener);
    let open = shared.settings.max_connections;
    match tokio::time::timeout(shared.settings.grace, graceful.shutdown()).await {
        Ok(()) => 0,
        Err(_) => open - room.available_permits(),
    }
}

fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/score", post(score))
        .route("/v1/model", get(model))
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(|| async { Failure::new(StatusCode::NOT_FOUND, "not_found", "there is nothing here") })
        .method_not_allowed_fallback(|| async {
            Failure::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "not by this method")
        })
        .layer(DefaultBodyLimit::max(shared.settings.max_body))
        .with_state(shared)
}

/// An answer other than scores.
struct Failure {
    status: StatusCode,
    code: &'static str,
    message: String,
    candidate: Option<usize>,
    field: Option<String>,
}

impl Failure {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), candidate: None, field: None }
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        let (status, code) = match refused.wrong {
            Wrong::Syntax => (StatusCode::BAD_REQUEST, "bad_json"),
            Wrong::Form => (StatusCode::BAD_REQUEST, "bad_request"),
            Wrong::Field => (StatusCode::BAD_REQUEST, "bad_field"),
            Wrong::TooMany => (StatusCode::UNPROCESSABLE_ENTITY, "too_many_candidates"),
        };
        let candidate = match refused.part {
            Part::Candidate(i) => Some(i),
            Part::Body | Part::Context => None,
        };
        Self { status, code, message: refused.to_string(), candidate, field: refused.field }
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let mut error = json!({"code": self.code, "message": self.message});
        if let Some(candidate) = self.candidate {
            error["candidate"] = candidate.into();
        }
        if let Some(field) = self.field {
            error["field"] = field.into();
        }
        let mut response = answer(self.status, json!({"error": error}).to_string().into_bytes());
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
        }
        response
    }
}

fn answer(status: StatusCode, body: Vec<u8>) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], Body::from(body)).into_response()
}

async fn score(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let began = Instant::now();
    let (outcome, candidates, response) = match shared.score(request).await {
        Ok((body, candidates)) => ("ok", candidates, answer(StatusCode::OK, body)),
        Err(failure) => (failure.code, 0, failure.into_response()),
    };
    telemetry::request(outcome, candidates, began.elapsed().as_secs_f64());
    response
}

thread_local! {
    static SCORER: RefCell<Scorer> = RefCell::default();
}

impl Shared {
    /// Reads and scores a request: the body of the answer, and how many candidates there were.
    async fn score(&self, request: Request) -> Result<(Vec<u8>, usize), Failure> {
        let unavailable = |code, message| Failure::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        let Ok(_permit) = self.permits.try_acquire() else {
            return Err(unavailable("overloaded", "too many requests at a time; try again"));
        };
        let _in_flight = telemetry::InFlight::begin();
        let body = match tokio::time::timeout(self.settings.timeout, Bytes::from_request(request, &())).await {
            Err(_) => {
                let message = format!("the body did not come within {:?}", self.settings.timeout);
                return Err(Failure::new(StatusCode::REQUEST_TIMEOUT, "timeout", message));
            }
            Ok(Err(error)) if error.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                let message = format!("the body is larger than {} bytes", self.settings.max_body);
                return Err(Failure::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message));
            }
            Ok(Err(error)) => return Err(Failure::new(error.status(), "bad_request", error.body_text())),
            Ok(Ok(body)) => body,
        };
        // One version from here to the end.
        let Some(model) = self.node.model() else {
            return Err(unavailable("not_ready", "no model yet; /readyz says why"));
        };
        SCORER.with_borrow_mut(|scorer| {
            let (scores, rest) = scorer.score_body(&model, &body, self.settings.max_candidates)?;
            Ok((write(model.version().0, scores, rest.ids), scores.len()))
        })
    }
}

/// Writes `{"version":…,"scores":[…]}`. Floats are the shortest that read back as the same f32 and f64.
fn write(version: u64, scores: &[Score], ids: Option<&str>) -> Vec<u8> {
    let (mut int, mut float) = (itoa::Buffer::new(), ryu::Buffer::new());
    let mut out = Vec::with_capacity(64 + ids.map_or(0, str::len) + scores.len() * 64);
    out.extend_from_slice(b"{\"version\":");
    out.extend_from_slice(int.format(version).as_bytes());
    out.extend_from_slice(b",\"scores\":[");
    for (i, score) in scores.iter().enumerate() {
        out.extend_from_slice(if i == 0 { b"{\"logit\":" } else { b",{\"logit\":" });
        // JSON knows no infinity, which only absurd weights could give.
        let finite = score.logit.is_finite() && score.prediction.is_finite();
        out.extend_from_slice(if finite { float.format_finite(score.logit).as_bytes() } else { b"null" });
        out.extend_from_slice(b",\"prediction\":");
        out.extend_from_slice(if finite { float.format_finite(score.prediction).as_bytes() } else { b"null" });
        out.push(b'}');
    }
    out.push(b']');
    if let Some(ids) = ids {
        out.extend_from_slice(b",\"ids\":");
        out.extend_from_slice(ids.as_bytes());
    }
    out.push(b'}');
    out
}

async fn model(State(shared): State<Arc<Shared>>) -> Response {
    let Some(model) = shared.node.model() else {
        return Failure::new(StatusCode::SERVICE_UNAVAILABLE, "not_ready", "no model yet; /readyz says why")
            .into_response();
    };
    let (manifest, now) = (model.manifest(), clock::now());
    let seconds = |ms: i64| ms as f64 / 1000.0;
    let body = json!({
        "version": model.version(),
        "kind": manifest.model.kind,
        "lineage": manifest.lineage,
        "schema_hash": manifest.model.schema_hash,
        "rows": model.rows(),
        "deltas": manifest.delta.as_ref().map_or(0, |link| link.number),
        "bytes": model.bytes(),
        "mapped_bytes": model.mapped_bytes(),
        "published": manifest.created.to_string(),
        "age_seconds": seconds(now.0 - manifest.created.0),
        "loaded": model.loaded().to_string(),
        "frontier": manifest.facts.frontier_time.map(|time| time.to_string()),
        "frontier_age_seconds": manifest.facts.frontier_time.map(|time| seconds(now.0 - time.0)),
    });
    answer(StatusCode::OK, body.to_string().into_bytes())
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    let (status, phase) = (shared.node.status(), *shared.phase.borrow());
    let ready = status.version.is_some() && phase == Phase::Running;
    let mut reasons = status.reasons();
    if phase != Phase::Running {
        reasons.insert(0, "this node is stopping".to_owned());
    }
    let age = status.published.map(|time| (clock::now().0 - time.0) as f64 / 1000.0);
    let body = json!({
        "ready": ready,
        "version": status.version,
        "age_seconds": age,
        "from_cache": status.from_cache,
        "reasons": reasons,
        "refused": status.refused.map(|r| json!({"version": r.version, "at": r.at.to_string(), "reason": r.reason})),
        "store_problem": status.store_problem.map(|p| json!({"since": p.since.to_string(), "reason": p.reason})),
    });
    answer(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body.to_string().into_bytes())
}

async fn metrics(State(shared): State<Arc<Shared>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], (shared.metrics)()).into_response()
}
