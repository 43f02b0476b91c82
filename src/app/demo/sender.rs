//! Sends requests for scores on a fixed schedule, over real connections, and checks every answer.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config::Config;
use crate::feature::schema::Tower;
use crate::serve::Score;

/// Connections that share the schedule.
pub const CONNECTIONS: usize = 4;
/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Latencies that the figures of the moment are about.
const RECENT: usize = 2000;
/// Of every version the first answer is kept, and one in so many.
const KEEP_ONE_IN: u64 = 50;

/// When what is sent, and what came of it.
pub struct Sender {
    address: SocketAddr,
    bodies: Vec<Body>,
    began: Instant,
    /// Between two requests.
    gap: Duration,
    /// Next in the schedule.
    next: AtomicU64,
    pub answered: AtomicU64,
    pub failed: AtomicU64,
    /// Answers "no model yet", all of them before the first scores.
    pub waited: AtomicU64,
    /// Answers by an older version than an answer that had come before the request was sent.
    pub went_back: AtomicU64,
    newest: AtomicU64,
    notes: Mutex<Notes>,
}

/// A request.
pub struct Body {
    pub text: Vec<u8>,
    pub candidates: usize,
}

#[derive(Default)]
struct Notes {
    versions: BTreeMap<u64, u64>,
    kept: Vec<Kept>,
    first_failure: Option<String>,
    recent: VecDeque<Duration>,
    latencies: Latencies,
}

/// An answer, to be compared with what its version gives later.
pub struct Kept {
    pub version: u64,
    /// Which body was sent.
    pub body: usize,
    pub scores: Vec<Score>,
}

#[derive(Deserialize)]
struct Answer {
    version: u64,
    scores: Vec<Score>,
}

enum Wrong {
    NotReady,
    Failed(String),
}

impl Sender {
    pub fn new(address: SocketAddr, bodies: Vec<Body>, per_second: f64) -> Self {
        Self {
            address,
            bodies,
            began: Instant::now(),
            gap: Duration::from_secs_f64(1.0 / per_second),
            next: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            waited: AtomicU64::new(0),
            went_back: AtomicU64::new(0),
            newest: AtomicU64::new(0),
            notes: Mutex::default(),
        }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends what falls to this connection until `stop`. Latencies count from when a request was due, so an answer that
    /// holds up the next ones counts for them too.
    pub fn run(&self, stop: &AtomicBool) {
        let mut connection = None;
        while !stop.load(Ordering::Relaxed) {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let due = self.began + self.gap.mul_f64(number as f64);
            if !sleep_until(due, stop) {
                return;
            }
            let at = (number % self.bodies.len() as u64) as usize;
            let before = self.newest.load(Ordering::SeqCst);
            match self.ask(&mut connection, &self.bodies[at]) {
                Ok(answer) => self.count(answer, at, before, due.elapsed()),
                Err(Wrong::NotReady) if before == 0 => {
                    self.waited.fetch_add(1, Ordering::Relaxed);
                }
                Err(wrong) => {
                    connection = None;
                    self.failed.fetch_add(1, Ordering::Relaxed);
                    let why = match wrong {
                        Wrong::NotReady => "no model, after there was one".to_owned(),
                        Wrong::Failed(why) => why,
                    };
                    self.notes().first_failure.get_or_insert(why);
                }
            }
        }
    }

    fn ask(&self, connection: &mut Option<BufReader<TcpStream>>, body: &Body) -> Result<Answer, Wrong> {
        let failed = |what: &str, error: &dyn std::fmt::Display| Wrong::Failed(format!("{what}: {error}"));
        let stream = match connection {
            Some(stream) => stream,
            None => connection.insert(connect(self.address).map_err(|e| failed("cannot connect", &e))?),
        };
        let (status, text) = exchange(stream, &body.text).map_err(|e| failed("no answer", &e))?;
        if status == 503 && text.windows(11).any(|part| part == b"\"not_ready\"") {
            return Err(Wrong::NotReady);
        }
        if status != 200 {
            return Err(Wrong::Failed(format!("status {status}: {}", String::from_utf8_lossy(&text))));
        }
        let answer: Answer = serde_json::from_slice(&text).map_err(|e| failed("an answer that is none", &e))?;
        let sound = |s: &Score| s.logit.is_finite() && (0.0..=1.0).contains(&s.prediction);
        if answer.version == 0 || answer.scores.len() != body.candidates || !answer.scores.iter().all(sound) {
            let text = String::from_utf8_lossy(&text).into_owned();
            return Err(Wrong::Failed(format!("{} scores were asked for, got {text}", body.candidates)));
        }
        Ok(answer)
    }

    fn count(&self, answer: Answer, body: usize, before: u64, took: Duration) {
        let answered = self.answered.fetch_add(1, Ordering::Relaxed);
        if answer.version < before {
            self.went_back.fetch_add(1, Ordering::Relaxed);
        }
        self.newest.fetch_max(answer.version, Ordering::SeqCst);
        let mut notes = self.notes();
        let seen = notes.versions.entry(answer.version).or_default();
        *seen += 1;
        if *seen == 1 || answered.is_multiple_of(KEEP_ONE_IN) {
            notes.kept.push(Kept { version: answer.version, body, scores: answer.scores });
        }
        if notes.recent.len() == RECENT {
            notes.recent.pop_front();
        }
        notes.recent.push_back(took);
        notes.latencies.add(took);
    }

    /// Versions that answered, each with the number of answers.
    pub fn versions(&self) -> BTreeMap<u64, u64> {
        self.notes().versions.clone()
    }

    pub fn take_kept(&self) -> Vec<Kept> {
        std::mem::take(&mut self.notes().kept)
    }

    pub fn body(&self, at: usize) -> &Body {
        &self.bodies[at]
    }

    pub fn first_failure(&self) -> Option<String> {
        self.notes().first_failure.clone()
    }

    /// p50 and p99 of the last answers.
    pub fn recent(&self) -> Option<(Duration, Duration)> {
        let mut recent: Vec<Duration> = self.notes().recent.iter().copied().collect();
        quantiles(&mut recent)
    }

    /// p50 and p99 of all answers, 2 % too large at most.
    pub fn overall(&self) -> Option<(Duration, Duration)> {
        let notes = self.notes();
        Some((notes.latencies.quantile(0.5)?, notes.latencies.quantile(0.99)?))
    }
}

/// Whether it was not told to stop meanwhile.
fn sleep_until(due: Instant, stop: &AtomicBool) -> bool {
    loop {
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() || stop.load(Ordering::Relaxed) {
            return !stop.load(Ordering::Relaxed);
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// p50 and p99.
pub fn quantiles<T: Copy + Ord>(values: &mut [T]) -> Option<(T, T)> {
    values.sort_unstable();
    let at = |q: f64| values.get(((values.len() as f64 * q) as usize).min(values.len().checked_sub(1)?)).copied();
    Some((at(0.5)?, at(0.99)?))
}

/// Counts by the logarithm of the latency, 50 bins for each factor of e.
#[derive(Default)]
struct Latencies {
    bins: BTreeMap<u16, u64>,
    count: u64,
}

impl Latencies {
    fn add(&mut self, took: Duration) {
        let bin = libm::ceil(libm::log((took.as_micros() as f64).max(1.0)) * 50.0) as u16;
        *self.bins.entry(bin).or_default() += 1;
        self.count += 1;
    }

    fn quantile(&self, q: f64) -> Option<Duration> {
        let wanted = (self.count as f64 * q) as u64;
        let mut below = 0;
        let bin = self.bins.iter().find(|(_, n)| {
            below += **n;
            below > wanted || below == self.count
        });
        bin.map(|(bin, _)| Duration::from_secs_f64(libm::exp(f64::from(*bin) / 50.0) / 1e6))
    }
}

fn connect(address: SocketAddr) -> io::Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(BufReader::new(stream))
}

/// One request and its answer over HTTP/1.1; the connection stays open.
fn exchange(stream: &mut BufReader<TcpStream>, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let wrong = |what: &str| io::Error::other(what.to_owned());
    let mut request = Vec::with_capacity(body.len() + 128);
    write!(request, "POST /v1/score HTTP/1.1\r\nhost: demo\r\ncontent-type: application/json\r\n")?;
    write!(request, "content-length: {}\r\n\r\n", body.len())?;
    request.extend_from_slice(body);
    stream.get_mut().write_all(&request)?;

    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status = status.ok_or_else(|| wrong(&format!("`{}` is no status line", line.trim_end())))?;
    let mut length = None;
    loop {
        line.clear();
        if stream.read_line(&mut line)? == 0 {
            return Err(wrong("the connection was closed"));
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse().ok();
        }
    }
    let mut body = vec![0; length.ok_or_else(|| wrong("the answer has no content-length"))?];
    stream.read_exact(&mut body)?;
    Ok((status, body))
}

/// Makes requests of impressions as the log has them: user and context of one, the items of others. Only members that
/// some feature reads are sent.
pub fn bodies(lines: &[Vec<u8>], config: &Config, candidates: usize, count: usize) -> Vec<Body> {
    let records: Vec<Map<String, Value>> = lines.iter().filter_map(|line| serde_json::from_slice(line).ok()).collect();
    if records.is_empty() {
        return Vec::new();
    }
    let member = |from: &str| from.split('.').next().unwrap_or_default().to_owned();
    let of = |wanted: &dyn Fn(Tower) -> bool| -> Vec<String> {
        let features = config.features.iter().filter(|feature| feature.role.is_none() && wanted(feature.tower));
        features.map(|feature| member(feature.from.as_ref().unwrap_or(&feature.name))).collect()
    };
    let of_item = of(&|tower| tower == Tower::Item);
    let of_context: Vec<String> =
        of(&|tower| tower != Tower::Item).into_iter().filter(|m| !of_item.contains(m)).collect();
    let part = |record: &Map<String, Value>, members: &[String]| -> Value {
        let kept = record.iter().filter(|(name, _)| members.contains(name));
        Value::Object(kept.map(|(name, value)| (name.clone(), value.clone())).collect())
    };
    let pick = |at: usize| &records[xxhash_rust::xxh3::xxh3_64(&at.to_le_bytes()) as usize % records.len()];
    let body = |n: usize| {
        // Distinct, unless there are too few items.
        let mut of_candidates: Vec<Value> = Vec::new();
        for i in 0.. {
            let candidate = part(pick((n * candidates + i) * 31 + 7), &of_item);
            if i >= 10 * candidates || !of_candidates.contains(&candidate) {
                of_candidates.push(candidate);
            }
            if of_candidates.len() == candidates {
                break;
            }
        }
        let request = json!({"context": part(pick(usize::MAX - n), &of_context), "candidates": of_candidates});
        Body { text: request.to_string().into_bytes(), candidates }
    };
    (0..count).map(body).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_sorted_values() {
        let mut values: Vec<u32> = (0..100).rev().collect();
        assert_eq!(quantiles(&mut values), Some((50, 99)));
        assert_eq!(quantiles::<u32>(&mut []), None);
        let mut latencies = Latencies::default();
        (1..=1000).for_each(|ms| latencies.add(Duration::from_millis(ms)));
        let p99 = latencies.quantile(0.99).unwrap().as_secs_f64();
        assert!((0.985..1.02).contains(&p99), "{p99}");
    }

    #[test]
    fn a_request_has_the_user_of_one_impression_and_the_items_of_others() {
        let config: Config = toml_of_demo();
        let line = |user: &str, item: &str| {
            json!({"id": "x", "ts": 1, "user": {"id": user}, "device": "ios", "position": 3, "item": {"id": item}, "tags": ["a"]})
                .to_string()
                .into_bytes()
        };
        let bodies = bodies(&[line("u1", "i1"), line("u2", "i2")], &config, 3, 2);
        for body in &bodies {
            let request: Value = serde_json::from_slice(&body.text).unwrap();
            let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
            assert_eq!(keys(&request["context"]), ["device", "user"]);
            let candidates = request["candidates"].as_array().unwrap();
            assert_eq!(candidates.len(), 3);
            assert!(candidates.iter().all(|candidate| keys(candidate) == ["item", "tags"]));
        }
        assert_eq!(bodies.len(), 2);
    }

    fn toml_of_demo() -> Config {
        crate::config::read(std::path::Path::new("configs/demo.toml"), &[]).unwrap()
    }
}
