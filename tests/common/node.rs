//! The real serving command, and a plain client of it.
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use tidemill::snapshot::Version;

use crate::common::TIDEMILL;

/// A running `tidemill serve`, killed when dropped.
pub struct Serving {
    pub child: Child,
    _stdout: BufReader<ChildStdout>,
    pub address: String,
}

impl Serving {
    pub fn start(store: &Path, settings: &[&str]) -> Self {
        let mut command = Command::new(TIDEMILL);
        command.stderr(Stdio::null());
        Self::start_by(command, store, settings)
    }

    /// By a command that runs `tidemill` with the arguments that it is given.
    pub fn start_by(mut command: Command, store: &Path, settings: &[&str]) -> Self {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/serve.toml");
        command.arg("serve").arg("-c").arg(config);
        let store = format!("store=\"{}\"", store.display());
        for set in [&store, "http.listen=\"127.0.0.1:0\"", "poll=\"20ms\"", "poll_max=\"100ms\""].iter().chain(settings)
        {
            command.args(["--set", set]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        let address = line.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("it said `{line}`"));
        Self { address: address.to_owned(), child, _stdout: stdout }
    }

    pub fn connect(&self) -> Client {
        Client::new(&self.address)
    }

    pub fn get(&self, path: &str) -> (u16, Value) {
        let (status, text) = self.connect().request("GET", path, "");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    pub fn score(&self, body: &str) -> (u16, Value) {
        let (status, text) = self.connect().request("POST", "/v1/score", body);
        (status, serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")))
    }

    /// Asks `/readyz` until it says what is expected.
    pub fn ready_when(&self, what: &str, expected: impl Fn(u16, &Value) -> bool) -> Value {
        let began = Instant::now();
        loop {
            let (status, ready) = self.get("/readyz");
            if expected(status, &ready) {
                return ready;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "waited for {what}, but /readyz says {status} {ready}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn serves(&self, version: Version) -> Value {
        self.ready_when(&format!("version {version}"), |status, ready| status == 200 && ready["version"] == version.0)
    }

    pub fn metric(&self, line: &str) -> f64 {
        let (status, text) = self.connect().request("GET", "/metrics", "");
        assert_eq!(status, 200);
        let value =
            text.lines().find_map(|have| have.strip_prefix(line)).unwrap_or_else(|| panic!("no `{line}` in {text}"));
        value.trim().parse().unwrap()
    }

    /// Memory of the process in MiB: its own, and with the files that it has mapped.
    pub fn memory(&self) -> [f64; 2] {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_else(|| panic!("no {name}"));
            line.trim().strip_suffix(" kB").unwrap().parse::<f64>().unwrap() / 1024.0
        };
        [of("RssAnon:"), of("VmRSS:")]
    }

    /// Waits until one request for scores is being answered, and no more.
    pub fn answers_one(&self) {
        let began = Instant::now();
        while !self.connect().request("GET", "/metrics", "").1.contains("tidemill_serve_requests_in_flight 1\n") {
            assert!(began.elapsed() < Duration::from_secs(30), "no request came to be answered");
        }
    }

    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A plain HTTP/1.1 client on one connection.
pub struct Client(pub BufReader<TcpStream>);

impl Client {
    pub fn new(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        Self(BufReader::new(stream))
    }

    pub fn send(&mut self, text: &str) {
        self.0.get_mut().write_all(text.as_bytes()).unwrap();
    }

    pub fn request(&mut self, method: &str, path: &str, body: &str) -> (u16, String) {
        self.send(&format!("{method} {path} HTTP/1.1\r\nhost: t\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
        self.answer().unwrap()
    }

    pub fn answer(&mut self) -> std::io::Result<(u16, String)> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| std::io::Error::other(format!("no status line: `{line}`")))?;
        let mut length = 0;
        loop {
            line.clear();
            self.0.read_line(&mut line)?;
            match line.trim().split_once(':') {
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.trim().parse().unwrap()
                }
                Some(_) => {}
                None => break,
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status, String::from_utf8(body).unwrap()))
    }
}
