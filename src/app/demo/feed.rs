//! What writes the log of a demo: a generated stream at the pace of the clock, or real files at a multiple of theirs.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Error;
use crate::app::topics::Topics;
use crate::clock;
use crate::config::Config;
use crate::event::{Chunk, Kind, Stream, Time};
use crate::generate::{Event, Generator, Origin, Settings, What};
use crate::position::Fingerprint;
use crate::source::decode::{Decoder, RecordSettings};
use crate::source::file;

/// What was written so far, and what the learner is not told.
#[derive(Default)]
pub struct Ledger {
    /// Lines of each stream, duplicates, orphans and garbage with them.
    pub impressions: AtomicU64,
    pub clicks: AtomicU64,
    pub garbage: AtomicU64,
    pub duplicates: AtomicU64,
    pub orphans: AtomicU64,
    /// Bytes of both streams.
    pub bytes: AtomicU64,
    /// Lines that stood in the files before the live part began.
    pub history: AtomicU64,
    /// Event time up to which the log is written, ms.
    now: AtomicI64,
    /// By id of the impressions that were written; an entry goes when it was asked for.
    truth: Mutex<HashMap<u64, Known>>,
    /// Clicks that happened live and count: (event time of the impression, when the click happened by the clock), ms.
    happened: Mutex<BinaryHeap<Reverse<(i64, i64)>>>,
}

/// What the generator knows of an impression.
#[derive(Clone, Copy, Debug)]
pub struct Known {
    /// True probability of a click inside the window.
    pub p: f32,
    pub time: Time,
}

impl Ledger {
    /// How far the log is written, in event time.
    pub fn now(&self) -> Time {
        Time(self.now.load(Ordering::Relaxed))
    }

    pub fn truth(&self) -> MutexGuard<'_, HashMap<u64, Known>> {
        self.truth.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn happened(&self) -> MutexGuard<'_, BinaryHeap<Reverse<(i64, i64)>>> {
        self.happened.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the clicks on impressions up to `frontier`: a model with this frontier has learned from them. Gives when
    /// each happened.
    pub fn take_learned(&self, frontier: Time) -> Vec<Time> {
        let mut heap = self.happened();
        let mut taken = Vec::new();
        while let Some(&Reverse((impression, click))) = heap.peek() {
            if impression > frontier.0 {
                break;
            }
            heap.pop();
            taken.push(Time(click));
        }
        taken
    }

    fn wrote(&self, stream: Stream, bytes: usize) {
        match stream {
            Stream::Impressions => self.impressions.fetch_add(1, Ordering::Relaxed),
            Stream::Clicks => self.clicks.fetch_add(1, Ordering::Relaxed),
        };
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// How long a writer sleeps between looks at the clock.
const STEP: Duration = Duration::from_millis(5);

/// A long history is written in pieces of so many bytes.
const BLOCK: usize = 1 << 20;

/// What is written to.
pub enum Log {
    /// Files that grow.
    Files(Vec<Output>),
    Kafka(Box<Topics>),
}

impl Log {
    /// Makes the files; nothing is written yet.
    pub fn files(dir: &Path, names: Vec<String>) -> Result<Self, Error> {
        let made = names.into_iter().map(|name| Output::create(dir.join(name)));
        Ok(Self::Files(made.collect::<Result<_, _>>()?))
    }

    /// Lets readers have what was written so far. To Kafka it is on its way by itself.
    fn flush(&mut self) -> Result<(), Error> {
        match self {
            Self::Files(files) => files.iter_mut().try_for_each(Output::flush),
            Self::Kafka(_) => Ok(()),
        }
    }

    /// Waits until all of it is written.
    fn finish(mut self) -> Result<(), Error> {
        self.flush()?;
        match self {
            Self::Files(_) => Ok(()),
            Self::Kafka(mut topics) => Ok(topics.flush()?),
        }
    }
}

/// The generated stream: its event time is the clock's.
pub struct Live {
    generator: Generator,
    next: Option<Event>,
    /// From here on nothing is history.
    began: Time,
}

/// Files that impressions are written to.
const PARTITIONS: u32 = 2;

/// A stream that begins `history` before now. Users and items are few enough that their tastes can be learned within a
/// minute at 2,000 impressions a second.
pub fn settings(seed: u64, now: Time, rate: f64, history: Duration, seconds: Duration) -> Settings {
    let span = history + seconds + Duration::from_secs(600);
    Settings {
        seed,
        impressions: (rate * span.as_secs_f64()) as u64 + 1,
        users: 1000,
        items: 200,
        categories: 10,
        start: now.minus(history.as_millis() as i64),
        rate,
        ctr: 0.1,
        delay_median: 1.0,
        delay_sigma: 0.8,
        window: 5000,
        disorder: 200,
        late: 0.001,
        duplicates: 0.005,
        orphans: 0.01,
        garbage: 0.001,
        partitions: PARTITIONS,
        ..Settings::default()
    }
}

impl Live {
    pub fn new(settings: Settings, began: Time) -> Result<Self, Error> {
        let mut generator = Generator::new(settings)?;
        let next = generator.next();
        Ok(Self { generator, next, began })
    }

    /// The names of its files: two of impressions, then one of clicks.
    pub fn names(&self) -> Vec<String> {
        ["impressions-0.jsonl", "impressions-1.jsonl", "clicks-0.jsonl"].map(str::to_owned).into()
    }

    /// Writes what has arrived by now: at the first call, the history.
    fn catch_up(&mut self, log: &mut Log, ledger: &Ledger) -> Result<(), Error> {
        let now = clock::now();
        while let Some(event) = self.next.filter(|event| event.arrival <= now) {
            let bytes = match log {
                Log::Files(files) => {
                    let at = match event.stream {
                        Stream::Impressions => event.partition as usize,
                        Stream::Clicks => PARTITIONS as usize,
                    };
                    files[at].write(|buffer| event.write_line(buffer))?
                }
                Log::Kafka(topics) => topics.write_event(&event)?,
            };
            ledger.wrote(event.stream, bytes);
            if event.arrival < self.began {
                ledger.history.fetch_add(1, Ordering::Relaxed);
            }
            self.note(&event, ledger);
            self.next = self.generator.next();
        }
        ledger.now.store(now.0, Ordering::Relaxed);
        log.flush()
    }

    fn note(&self, event: &Event, ledger: &Ledger) {
        if event.copy {
            ledger.duplicates.fetch_add(1, Ordering::Relaxed);
            return;
        }
        match &event.what {
            What::Impression { impression, truth } => {
                ledger.truth().insert(impression.id, Known { p: truth.p as f32, time: impression.time });
            }
            What::Click { origin: Origin::Orphan, .. } => {
                ledger.orphans.fetch_add(1, Ordering::Relaxed);
            }
            What::Click { id, time, origin: Origin::InsideWindow } if *time >= self.began => {
                // Not there when the impression arrives after its click, which is rare.
                let impression = ledger.truth().get(id).map(|known| known.time);
                ledger.happened().extend(impression.map(|impression| Reverse((impression.0, time.0))));
            }
            What::Click { .. } => {}
            What::Garbage { .. } => {
                ledger.garbage.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes until `stop`.
    pub fn run(mut self, mut log: Log, ledger: &Ledger, stop: &AtomicBool) -> Result<(), Error> {
        while !stop.load(Ordering::Relaxed) {
            self.catch_up(&mut log, ledger)?;
            std::thread::sleep(STEP);
        }
        log.finish()
    }
}

/// Real files, written again at a multiple of their speed.
pub struct Replay {
    inputs: Vec<Input>,
    /// Event time of the first impression.
    first: Time,
    /// Of the impressions, by id: to say when a click's impression was.
    impressions: HashMap<u64, Time>,
    pub speed: f64,
}

struct Input {
    stream: Stream,
    /// The name of its file.
    name: String,
    /// In the order of the log, each with the largest event time up to it and the id and time of its first record.
    lines: std::vec::IntoIter<Line>,
    next: Option<Line>,
}

struct Line {
    due: Time,
    first: Option<(u64, Time)>,
    /// The text of that id.
    key: Box<[u8]>,
    text: Vec<u8>,
}

impl Replay {
    /// Reads the files `impressions*` and `clicks*` of `data` into memory. `speed`: as many times as fast as they were
    /// written; none: so that all of it takes `seconds`.
    pub fn new(data: &Path, config: &Config, speed: Option<f64>, seconds: Duration) -> Result<Self, Error> {
        let mut inputs = Vec::new();
        let mut impressions = HashMap::new();
        let mut streams = vec![(Stream::Impressions, &config.impressions)];
        streams.extend(config.clicks.as_ref().map(|clicks| (Stream::Clicks, clicks)));
        for (stream, settings) in streams {
            for path in files(data, stream)? {
                let lines = lines(&path, stream, &settings.record, settings.source.max_record)?;
                if stream == Stream::Impressions {
                    impressions.extend(lines.iter().filter_map(|line| line.first));
                }
                let mut lines = lines.into_iter();
                inputs.push(Input { stream, name: plain_name(&path), next: lines.next(), lines });
            }
        }
        let times = || impressions.values().copied();
        let (Some(first), Some(last)) = (times().min(), times().max()) else {
            return Err(Error::NoData { dir: data.to_owned(), what: "impressions that its config can read" });
        };
        let span = (last.0 - first.0).max(1) as f64 / 1000.0;
        let speed = speed.unwrap_or(span / seconds.as_secs_f64());
        Ok(Self { inputs, first, impressions, speed })
    }

    /// The names of the files that are written, in the order of their inputs.
    pub fn names(&self) -> Vec<String> {
        self.inputs.iter().map(|input| input.name.clone()).collect()
    }

    /// Writes until `stop`, or until all is written.
    pub fn run(mut self, mut log: Log, ledger: &Ledger, stop: &AtomicBool) -> Result<(), Error> {
        let began = clock::now();
        while !stop.load(Ordering::Relaxed) {
            let wall = clock::now();
            let now = self.first.plus(((wall.0 - began.0) as f64 * self.speed) as i64);
            let mut left = false;
            for (at, input) in self.inputs.iter_mut().enumerate() {
                while let Some(line) = input.next.take_if(|line| line.due <= now) {
                    let bytes = match &mut log {
                        Log::Files(files) => files[at].write(|buffer| {
                            buffer.extend_from_slice(&line.text);
                            buffer.push(b'\n');
                        })?,
                        Log::Kafka(topics) => {
                            let key = line.first.map(|_| &*line.key);
                            topics.write(input.stream, key, line.due, &line.text)?;
                            line.text.len()
                        }
                    };
                    ledger.wrote(input.stream, bytes);
                    if input.stream == Stream::Clicks
                        && let Some((id, click)) = line.first
                        && let Some(impression) = self.impressions.get(&id)
                    {
                        let happened = began.plus(((click.0 - self.first.0) as f64 / self.speed) as i64);
                        ledger.happened().push(Reverse((impression.0, happened.0)));
                    }
                    input.next = input.lines.next();
                }
                left |= input.next.is_some();
            }
            log.flush()?;
            ledger.now.store(now.0, Ordering::Relaxed);
            if !left {
                break;
            }
            std::thread::sleep(STEP);
        }
        log.finish()
    }
}

/// The files of a stream in a directory of data, by name.
pub fn files(data: &Path, stream: Stream) -> Result<Vec<PathBuf>, Error> {
    let unreadable = |source| Error::File { path: data.to_owned(), source };
    let mut found = Vec::new();
    for entry in std::fs::read_dir(data).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let kind = [".jsonl", ".jsonl.gz", ".jsonl.zst"].iter().any(|ending| name.ends_with(ending));
        if kind && name.starts_with(stream.name()) {
            found.push(path);
        }
    }
    found.sort();
    if found.is_empty() {
        let what = match stream {
            Stream::Impressions => "files impressions*.jsonl, .jsonl.gz or .jsonl.zst",
            Stream::Clicks => "files clicks*.jsonl, .jsonl.gz or .jsonl.zst",
        };
        return Err(Error::NoData { dir: data.to_owned(), what });
    }
    Ok(found)
}

fn plain_name(path: &Path) -> String {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.trim_end_matches(".gz").trim_end_matches(".zst").to_owned()
}

fn lines(path: &Path, stream: Stream, record: &RecordSettings, longest: usize) -> Result<Vec<Line>, Error> {
    let mut decoder = Decoder::new(stream, record, None, true)?;
    let mut chunk = Chunk::default();
    let mut due = Time::MIN;
    let read = file::first_records(path, usize::MAX, longest)?;
    let line = |(offset, text): (u64, Vec<u8>)| {
        chunk.clear();
        decoder.decode(&text, offset, Fingerprint::NONE, &mut chunk);
        let first = chunk.records.iter().find(|record| record.kind != Kind::Rejected);
        let key = first.map(|record| chunk.text_of(record).into()).unwrap_or_default();
        let first = first.map(|record| (record.id, record.event_time));
        due = first.map_or(due, |(_, time)| due.max(time));
        Line { due, first, key, text }
    };
    Ok(read.into_iter().map(line).collect())
}

/// A file that grows.
pub struct Output {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
}

impl Output {
    fn create(path: PathBuf) -> Result<Self, Error> {
        let made = File::options().create_new(true).append(true).open(&path);
        let file = made.map_err(|source| Error::File { path: path.clone(), source })?;
        Ok(Self { path, file, buffer: Vec::new() })
    }

    /// Takes a line and gives its length, with its end.
    fn write(&mut self, line: impl FnOnce(&mut Vec<u8>)) -> Result<usize, Error> {
        let before = self.buffer.len();
        line(&mut self.buffer);
        let bytes = self.buffer.len() - before;
        if self.buffer.len() >= BLOCK {
            self.flush()?;
        }
        Ok(bytes)
    }

    fn flush(&mut self) -> Result<(), Error> {
        let written: io::Result<()> = self.file.write_all(&self.buffer);
        self.buffer.clear();
        written.map_err(|source| Error::File { path: self.path.clone(), source })
    }
}
