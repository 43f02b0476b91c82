//! Files into topics: a log that was, written again at a chosen speed.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use super::input;
use super::topics::{self, Pace, Speed, Ticker, Topics, Written};
use crate::config::Checked;
use crate::event::{Chunk, Kind, Stream, Time};
use crate::position::Fingerprint;
use crate::source::file::{Lines, expand};
use crate::source::{self, Decode};

/// Why a replay cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Job(#[from] super::job::Error),
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Topics(#[from] topics::Error),
}

/// One file on its way into a topic.
struct Tape {
    stream: Stream,
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
    let given: Vec<_> = files.iter().filter(|(_, patterns)| !patterns.is_empty()).collect();
    if given.is_empty() {
        return Ok(Written::default());
    }
    let streams: Vec<Stream> = given.iter().map(|(stream, _)| *stream).collect();
    let mut topics = Topics::open(checked, &streams, "replay")?;
    let mut tapes = Vec::new();
    for (stream, patterns) in given {
        let decoder = input::decoder(checked, *stream, input::Keep::Ids)?;
        for path in expand(patterns)? {
            tapes.push(open(*stream, path, decoder())?);
        }
    }
    let (mut pace, mut ticker) = (Pace::new(speed), Ticker::start());
    while !stop.load(Ordering::Relaxed) {
        // Few files, so a look at all is as quick as a heap.
        let earliest = tapes.iter_mut().filter(|tape| tape.next.is_some()).min_by_key(|tape| (tape.due, tape.stream));
        let Some(tape) = earliest else { break };
        if !pace.is_due(tape.due) {
            continue;
        }
        let head = tape.next.as_ref().expect("just seen");
        let key = head.time.map(|_| head.key.as_slice());
        topics.write(tape.stream, key, tape.due, &head.raw)?;
        tape.advance()?;
        if ticker.ticks() {
            progress(&topics.written);
        }
    }
    topics.flush()?;
    Ok(topics.written)
}

fn open(stream: Stream, path: PathBuf, decoder: Box<dyn Decode>) -> Result<Tape, source::Error> {
    let (lines, chunk) = (Lines::open(&path)?, Chunk::default());
    let mut tape = Tape { stream, lines, decoder, next: None, after: None, due: Time::MIN, chunk };
    tape.after = tape.read(Head::default())?;
    tape.advance()?;
    Ok(tape)
}
