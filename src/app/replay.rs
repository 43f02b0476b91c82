//! Files into topics: a log that was, written again at a chosen speed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::input;
use crate::config::Checked;
use crate::event::{Chunk, Kind, Stream, Time};
use crate::position::Fingerprint;
use crate::source::file::{Lines, expand};
use crate::source::kafka::{self, Message, Sink};
use crate::source::{self, Decode, Origin};

/// How fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// As fast as the brokers take it.
    Max,
    /// So many times as fast as it happened.
    Times(f64),
}

/// Why a replay cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Job(#[from] super::job::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Kafka(#[from] kafka::Error),
    #[error("`{stream}.source` of the config must be of kind \"kafka\" with one topic to write to, got {found}")]
    NoTopic { stream: &'static str, found: String },
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Written {
    pub impressions: u64,
    pub clicks: u64,
    /// Of these, records in which no id and time was found; written like the others, without a key.
    pub without_key: u64,
    pub bytes: u64,
    /// Event time to which it got.
    pub until: Option<Time>,
}

/// One file on its way into a topic.
struct Tape {
    stream: Stream,
    topic: String,
    lines: Lines,
    decoder: Box<dyn Decode>,
    /// The next record and the one after it.
    next: Option<Head>,
    after: Option<Head>,
    /// The largest time at which a record of this file was due: a file keeps its order.
    due: Time,
    chunk: Chunk,
}

#[derive(Default)]
struct Head {
    raw: Vec<u8>,
    key: Vec<u8>,
    /// `None`: it has no id or no time.
    time: Option<Time>,
}

impl Tape {
    fn read(&mut self, mut head: Head) -> Result<Option<Head>, source::Error> {
        if self.lines.next(&mut head.raw)?.is_none() {
            return Ok(None);
        }
        self.chunk.clear();
        self.decoder.decode(&head.raw, 0, Fingerprint::NONE, &mut self.chunk);
        head.key.clear();
        head.time = None;
        // Of a slate, the first.
        if let Some(first) = self.chunk.records.first().filter(|record| record.kind != Kind::Rejected) {
            head.time = Some(first.event_time);
            head.key.extend_from_slice(self.chunk.text_of(first));
        }
        Ok(Some(head))
    }

    /// Goes to the next record, and settles when it is due: at its time, but not before the records before it, and not when
    /// a clock that was ahead says so, as the record after it shows.
    fn advance(&mut self) -> Result<(), source::Error> {
        let used = self.next.take().unwrap_or_default();
        self.next = self.after.take();
        self.after = self.read(used)?;
        let times = [self.next.as_ref(), self.after.as_ref()].map(|head| head.and_then(|head| head.time));
        if let Some(time) = times.into_iter().flatten().min() {
            self.due = self.due.max(time);
        }
        Ok(())
    }
}

/// Writes the records of files to the topics of a job, by event time, each file in its order; the key of a message is the
/// impression's id, its timestamp the moment of writing. Ends early, at any record, if `stop` is set.
pub fn run(
    checked: &Checked,
    files: &[(Stream, Vec<String>)],
    speed: Speed,
    stop: &AtomicBool,
    mut progress: impl FnMut(&Written),
) -> Result<Written, Error> {
    let config = &checked.config;
    let mut tapes = Vec::new();
    let mut sink = None;
    for (stream, patterns) in files.iter().filter(|(_, patterns)| !patterns.is_empty()) {
        let name = stream.name();
        let missing = |found: String| Error::NoTopic { stream: name, found };
        let settings = match stream {
            Stream::Impressions => Some(&config.impressions),
            Stream::Clicks => config.clicks.as_ref(),
        };
        let settings = &settings.ok_or_else(|| missing("no such stream".into()))?.source;
        let Origin::Kafka(topics) = settings.find(&format!("{name}.source"))? else {
            return Err(missing("kind = \"file\"".into()));
        };
        let [topic] = &topics.topics[..] else { return Err(missing(format!("the topics {:?}", topics.topics))) };
        let cluster = config.kafka.as_ref().expect("the config was checked");
        let sink = match &mut sink {
            Some(sink) => sink,
            none => none.insert(Sink::new(cluster, "replay")?),
        };
        sink.partitions(topic)?;
        let decoder = input::decoder(checked, *stream, true)?;
        for path in expand(patterns)? {
            tapes.push(open(*stream, topic, path, decoder())?);
        }
    }
    let mut written = Written::default();
    let Some(mut sink) = sink else { return Ok(written) };
    let began = Instant::now();
    let mut first = None;
    let mut shown = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        // Few files, so a look at all is as quick as a heap.
        let earliest = tapes.iter_mut().filter(|tape| tape.next.is_some()).min_by_key(|tape| (tape.due, tape.stream));
        let Some(tape) = earliest else { break };
        if let Speed::Times(times) = speed {
            let first = *first.get_or_insert(tape.due);
            let due = Duration::from_secs_f64((tape.due.0 - first.0).max(0) as f64 / 1000.0 / times);
            if let Some(wait) = due.checked_sub(began.elapsed()).filter(|wait| !wait.is_zero()) {
                // In steps, so that it can be stopped.
                std::thread::sleep(wait.min(Duration::from_millis(50)));
                continue;
            }
        }
        let head = tape.next.as_ref().expect("just seen");
        let key = head.time.map(|_| head.key.as_slice());
        sink.write(&Message { topic: &tape.topic, key, value: &head.raw, ..Message::default() })?;
        match tape.stream {
            Stream::Impressions => written.impressions += 1,
            Stream::Clicks => written.clicks += 1,
        }
        written.without_key += u64::from(key.is_none());
        written.bytes += head.raw.len() as u64;
        written.until = Some(tape.due);
        tape.advance()?;
        if shown.elapsed() >= Duration::from_secs(1) {
            shown = Instant::now();
            progress(&written);
        }
    }
    sink.flush(Duration::from_secs(120))?;
    Ok(written)
}

fn open(stream: Stream, topic: &str, path: PathBuf, decoder: Box<dyn Decode>) -> Result<Tape, source::Error> {
    let (lines, topic, chunk) = (Lines::open(&path)?, topic.to_owned(), Chunk::default());
    let mut tape = Tape { stream, topic, lines, decoder, next: None, after: None, due: Time::MIN, chunk };
    tape.after = tape.read(Head::default())?;
    tape.advance()?;
    Ok(tape)
}
