//! Load on a server of scores: sends the requests of a file over TCP, and prints what came of it as one JSON object.
//!
//! `scripts/bench_serve.py` puts `tidemill serve` beside the daemon of Vowpal Wabbit with it, so it speaks both protocols, takes
//! requests as bytes that are ready, and reads no more of an answer than where it ends and how many scores it has.
//!
//! ```text
//! cargo run --release --example load -- --protocol http --address 127.0.0.1:8787 --requests bodies.jsonl --candidates 100
//! ```

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use memchr::memmem::Finder;
use serde_json::json;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    address: String,
    #[arg(long)]
    protocol: Protocol,
    /// http: a body a line. lines: an example a line, `--candidates` of them a request.
    #[arg(long)]
    requests: PathBuf,
    /// Scores that every answer must have.
    #[arg(long)]
    candidates: usize,
    #[arg(long, default_value_t = 4)]
    connections: usize,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Requests a second on a fixed schedule that all connections share; latencies count from when a request was due. Without
    /// it a connection sends its next request when it has the answer to the one before, and latencies count from the sending.
    #[arg(long)]
    rate: Option<f64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Protocol {
    /// `POST /v1/score` of `tidemill serve`.
    Http,
    /// Vowpal Wabbit's daemon: an example a line, a prediction a line.
    Lines,
}

/// An answer that does not come in this time has failed.
const PATIENCE: Duration = Duration::from_secs(5);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let requests = requests(&args)?;
    let (next, began) = (AtomicU64::new(0), Instant::now());
    let ran: Vec<Ran> = std::thread::scope(|scope| {
        let run = || run(&args, &requests, &next, began);
        let threads: Vec<_> = (0..args.connections).map(|_| scope.spawn(run)).collect();
        threads.into_iter().map(|thread| thread.join().expect("does not panic")).collect()
    });
    let seconds = began.elapsed().as_secs_f64();
    let mut latencies: Vec<Duration> = ran.iter().flat_map(|ran| ran.latencies.iter().copied()).collect();
    latencies.sort_unstable();
    let at = |q: f64| latencies.get((latencies.len() as f64 * q) as usize).map(|took| took.as_secs_f64() * 1e6);
    let failures: Vec<&String> = ran.iter().flat_map(|ran| &ran.failures).collect();
    let report = json!({
        "answered": latencies.len(),
        "failed": failures.len(),
        "first_failure": failures.first(),
        "seconds": seconds,
        "candidates_per_second": (latencies.len() * args.candidates) as f64 / seconds,
        "p50_us": at(0.5),
        "p99_us": at(0.99),
        "p999_us": at(0.999),
    });
    println!("{report}");
    Ok(())
}

/// The bytes of each request.
fn requests(args: &Args) -> Result<Vec<Vec<u8>>, Box<dyn std::error::Error>> {
    let text = std::fs::read_to_string(&args.requests)?;
    let lines: Vec<&str> = text.lines().collect();
    let requests: Vec<Vec<u8>> = match args.protocol {
        Protocol::Http => lines.iter().map(|body| http(body)).collect(),
        Protocol::Lines => lines.chunks(args.candidates).map(|lines| (lines.join("\n") + "\n").into_bytes()).collect(),
    };
    if requests.is_empty() || lines.last().is_some_and(|line| line.is_empty()) {
        return Err(format!("`{}` holds no requests, or an empty line", args.requests.display()).into());
    }
    Ok(requests)
}

fn http(body: &str) -> Vec<u8> {
    let head = "POST /v1/score HTTP/1.1\r\nhost: load\r\ncontent-type: application/json\r\ncontent-length";
    format!("{head}: {}\r\n\r\n{body}", body.len()).into_bytes()
}

/// What one connection saw.
#[derive(Default)]
struct Ran {
    latencies: Vec<Duration>,
    failures: Vec<String>,
}

fn run(args: &Args, requests: &[Vec<u8>], next: &AtomicU64, began: Instant) -> Ran {
    let end = began + Duration::from_secs_f64(args.seconds);
    let (mut ran, mut stream, mut answer) = (Ran::default(), None, Vec::new());
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let due = match args.rate {
            Some(rate) => began + Duration::from_secs_f64(number as f64 / rate),
            None => Instant::now(),
        };
        if due >= end {
            return ran;
        }
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let request = &requests[number as usize % requests.len()];
        match ask(args, &mut stream, request, &mut answer) {
            Ok(scores) if scores == args.candidates => ran.latencies.push(due.elapsed()),
            Ok(scores) => ran.failures.push(format!("{scores} scores: {}", String::from_utf8_lossy(&answer))),
            Err(error) => {
                ran.failures.push(error.to_string());
                stream = None;
            }
        }
    }
}

/// Sends a request and reads its answer; returns how many scores it has.
fn ask(args: &Args, stream: &mut Option<TcpStream>, request: &[u8], answer: &mut Vec<u8>) -> io::Result<usize> {
    let stream = match stream {
        Some(stream) => stream,
        None => {
            let connected = TcpStream::connect(&args.address)?;
            connected.set_nodelay(true)?;
            connected.set_read_timeout(Some(PATIENCE))?;
            stream.insert(connected)
        }
    };
    stream.write_all(request)?;
    answer.clear();
    let (mut buffer, mut lines, mut whole) = ([0; 1 << 16], 0, None);
    loop {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Err(io::Error::other("the connection was closed before the answer was complete"));
        }
        answer.extend_from_slice(&buffer[..read]);
        match args.protocol {
            Protocol::Lines => {
                lines += memchr::memchr_iter(b'\n', &buffer[..read]).count();
                if lines >= args.candidates {
                    return Ok(lines);
                }
            }
            Protocol::Http => {
                whole = whole.or_else(|| length(answer));
                if whole.is_some_and(|whole| answer.len() >= whole) {
                    let ok = answer.starts_with(b"HTTP/1.1 200 ");
                    return Ok(if ok { Finder::new(b"\"logit\":").find_iter(answer).count() } else { 0 });
                }
            }
        }
    }
}

/// Length of an HTTP answer, head and body, once its head is there.
fn length(answer: &[u8]) -> Option<usize> {
    let head = memchr::memmem::find(answer, b"\r\n\r\n")?;
    let text = std::str::from_utf8(&answer[..head]).ok()?;
    let lengths = text.lines().filter_map(|line| line.split_once(':'));
    let mut lengths = lengths.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
    Some(head + 4 + lengths.next()?.1.trim().parse::<usize>().ok()?)
}
