//! Decoding in parallel, arriving in order.
//!
//! A reader first reserves the next place in its partition's queue, then hands the block to the pool with the `Ticket` of
//! that place. The worker puts the decoded chunk into the place, whenever that is; the consumer waits for the place at the
//! front. So places are bounded per partition, order is that of reservation, and a worker always has somewhere to put
//! what it made.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use memchr::{memchr_iter, memrchr};

use super::columnar::Rows;
use super::decode::Raw;
use super::{Arrival, Decode, Error, NewDecoder};
use crate::clock;
use crate::event::{Chunk, Kind, Original, Record, Stream, Time};
use crate::position::{Fingerprint, NextOffset};

/// Size of a block that is not stretched by a long record, in bytes.
pub(super) const BLOCK: usize = 128 << 10;
/// How much of a record that is too long is kept, in bytes.
pub(super) const HEAD: usize = 4 << 10;

/// Records that a block aims at; the last block and long or very uneven records miss it.
pub(super) const RECORDS: usize = 512;

/// Why a reader ends before its partition does.
pub(super) enum Halt {
    /// Nobody takes any more.
    Closed,
    Failed(Error),
}

impl From<Error> for Halt {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// What a timeout too long for the clock is cut to.
const FOREVER: Duration = Duration::from_secs(3600 * 24 * 365);

/// A lock whose holder cannot have left half-done work: every section below is a few plain assignments.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells waiting readers to end.
#[derive(Default)]
pub(super) struct Stop {
    stopped: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    pub(super) fn now(&self) {
        *lock(&self.stopped) = true;
        self.changed.notify_all();
    }

    /// Waits for `time`, less if it is stopped; says whether it is.
    pub(super) fn within(&self, time: Duration) -> bool {
        let wait = self.changed.wait_timeout_while(lock(&self.stopped), time, |stopped| !*stopped);
        *wait.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Gives used chunks back, so that their memory serves again. Clones share one store.
#[derive(Clone, Default)]
pub struct Recycler {
    // Grows to the most chunks that were ever alive at once, which the queues bound.
    #[expect(clippy::vec_box, reason = "the box travels on, with its address and its memory")]
    chunks: Arc<Mutex<Vec<Box<Chunk>>>>,
}

impl Recycler {
    pub fn give(&self, mut chunk: Box<Chunk>) {
        chunk.clear();
        lock(&self.chunks).push(chunk);
    }

    /// An empty chunk, used before if there is one.
    #[must_use]
    pub fn take(&self) -> Box<Chunk> {
        lock(&self.chunks).pop().unwrap_or_default()
    }
}

/// One partition as its consumer sees it: a name and what arrives, in order.
pub struct Partition {
    pub stream: Stream,
    queue: Arc<Queue>,
    over: bool,
}

impl Partition {
    pub(super) fn new(stream: Stream, queue: Arc<Queue>) -> Self {
        Self { stream, queue, over: false }
    }

    /// The path of a file as configured, or `topic/number`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.queue.name
    }

    /// What has arrived, or `None` if nothing has. After `Ended` or `Failed` always `None`.
    pub fn try_next(&mut self) -> Option<Arrival> {
        self.take(Duration::ZERO)
    }

    /// Like [`Self::try_next`], but waits up to `timeout` for something to arrive. Does not wait where nothing can
    /// come any more.
    pub fn next_timeout(&mut self, timeout: Duration) -> Option<Arrival> {
        self.take(timeout)
    }

    /// What has arrived at the front if it is no records: news of the partition's end, which need not wait until records are
    /// wanted.
    pub fn try_news(&mut self) -> Option<Arrival> {
        if self.over || !self.queue.has_news() { None } else { self.take(Duration::ZERO) }
    }

    /// Whether something has been read of the log that was not taken yet, decoded or not.
    #[must_use]
    pub fn has_more(&self) -> bool {
        !self.over && !lock(&self.queue.state).waiting.is_empty()
    }

    fn take(&mut self, timeout: Duration) -> Option<Arrival> {
        if self.over {
            return None;
        }
        let arrival = self.queue.take(timeout)?;
        if matches!(arrival, Arrival::Ended { .. } | Arrival::Failed(_)) {
            self.over = true;
            self.queue.abandon();
        }
        Some(arrival)
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        self.queue.abandon();
    }
}

/// The bounded queue of one partition: places in order of reservation, each empty until it is filled.
pub(super) struct Queue {
    state: Mutex<Places>,
    /// The place at the front was filled, or the queue was closed.
    ready: Condvar,
    /// A place was freed, or the queue was closed.
    room: Condvar,
    depth: usize,
    /// Of the partition, for messages.
    pub(super) name: String,
}

struct Places {
    waiting: VecDeque<Option<Arrival>>,
    /// Number of the place at the front.
    first: u64,
    closed: bool,
}

impl Queue {
    pub(super) fn new(name: String, depth: usize) -> Arc<Self> {
        let places = Places { waiting: VecDeque::with_capacity(depth), first: 0, closed: false };
        let (ready, room) = (Condvar::new(), Condvar::new());
        Arc::new(Self { state: Mutex::new(places), ready, room, depth: depth.max(1), name })
    }

    /// Waits for a free place at the end; `None` once the queue is closed.
    pub(super) fn reserve(self: &Arc<Self>) -> Option<Ticket> {
        let full = |places: &mut Places| !places.closed && places.waiting.len() >= self.depth;
        let mut places = self.room.wait_while(lock(&self.state), full).unwrap_or_else(PoisonError::into_inner);
        if places.closed {
            return None;
        }
        places.waiting.push_back(None);
        let place = places.first + places.waiting.len() as u64 - 1;
        drop(places);
        Some(Ticket { queue: Arc::clone(self), place, filled: false })
    }

    /// Whether what stands at the front is there and is no records.
    fn has_news(&self) -> bool {
        matches!(lock(&self.state).waiting.front(), Some(Some(arrival)) if !matches!(arrival, Arrival::Records(_)))
    }

    fn fill(&self, place: u64, arrival: Arrival) {
        let mut places = lock(&self.state);
        let Some(index) = place.checked_sub(places.first) else { return }; // the consumer is gone
        if let Some(empty) = places.waiting.get_mut(index as usize) {
            *empty = Some(arrival);
            if index == 0 {
                self.ready.notify_one();
            }
        }
    }

    fn take(&self, timeout: Duration) -> Option<Arrival> {
        let mut deadline = None; // the clock is asked only where there is nothing
        let mut places = lock(&self.state);
        loop {
            if let Some(Some(_)) = places.waiting.front() {
                places.first += 1;
                self.room.notify_one();
                return places.waiting.pop_front().flatten();
            }
            if places.closed && places.waiting.is_empty() {
                return None;
            }
            let now = Instant::now();
            let deadline = *deadline.get_or_insert_with(|| now.checked_add(timeout).unwrap_or(now + FOREVER));
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return None;
            }
            places = self.ready.wait_timeout(places, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Lets nothing more in; what has a place can still be taken.
    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.ready.notify_all();
        self.room.notify_all();
    }

    /// The consumer is gone: closes, and frees what waits.
    fn abandon(&self) {
        let mut places = lock(&self.state);
        places.first += places.waiting.len() as u64;
        places.waiting.clear();
        drop(places);
        self.close();
    }

    pub(super) fn is_closed(&self) -> bool {
        lock(&self.state).closed
    }
}

/// The right and duty to fill one place. Dropped unused (its holder panicked), it fills the place with a failure.
pub(super) struct Ticket {
    queue: Arc<Queue>,
    place: u64,
    filled: bool,
}

impl Ticket {
    pub(super) fn fill(mut self, arrival: Arrival) {
        self.filled = true;
        self.queue.fill(self.place, arrival);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.filled {
            let (at, message) = ("reader or decoder".into(), "a block was never decoded".into());
            let partition = self.queue.name.clone();
            self.queue.fill(self.place, Arrival::Failed(Error::Panicked { partition, at, message }));
        }
    }
}

/// What the bytes of a block are.
pub(super) enum Content {
    /// Whole lines, so many bytes of them; what lies behind is leftover of earlier use.
    Lines(usize),
    /// One record a mark.
    Messages(Vec<Mark>),
    /// Rows of a table; there are no bytes.
    Rows(Rows),
}

/// One message of a log that keeps its records apart, inside of a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mark {
    pub offset: u64,
    /// The record is `bytes[start..][..len]`, its key the `key_len` bytes before it.
    pub start: u32,
    pub len: u32,
    /// `None`: it has no key, which is not the same as an empty one.
    pub key_len: Option<u32>,
    /// When the log took it, or [`Time::MIN`].
    pub log_time: Time,
    /// It has no value: it says that its key is deleted, and is no record.
    pub tombstone: bool,
}

/// A block of records on its way to a worker.
pub(super) struct Job {
    pub ticket: Ticket,
    pub decoder: NewDecoder,
    pub bytes: Vec<u8>,
    pub content: Content,
    /// Where the first record starts, and what stands before it.
    pub at: NextOffset,
    pub next: NextOffset,
    /// Longest record in bytes without line end; longer ones are rejected.
    pub max_record: usize,
}

/// What readers and workers share: the way to the workers, and used memory.
#[derive(Clone)]
pub(super) struct Desk {
    pub work: Sender<Job>,
    pub chunks: Recycler,
    blocks: Blocks,
    marks: Marks,
}

impl Desk {
    /// An empty list of marks, used before if there is one.
    pub(super) fn marks(&self) -> Vec<Mark> {
        lock(&self.marks).pop().unwrap_or_default()
    }

    /// A block of at least `size` initialised bytes of any content.
    pub(super) fn block(&self, size: usize) -> Vec<u8> {
        let mut block = lock(&self.blocks).pop().unwrap_or_default();
        if block.len() < size {
            // A fresh block straight from the allocator needs no clearing, unlike one that grows.
            block = vec![0; size.max(BLOCK)];
        }
        block
    }

    pub(super) fn give_block(&self, block: Vec<u8>) {
        give_block(&self.blocks, block);
    }
}

type Blocks = Arc<Mutex<Vec<Vec<u8>>>>;
type Marks = Arc<Mutex<Vec<Vec<Mark>>>>;

fn give_block(blocks: &Blocks, block: Vec<u8>) {
    // One that a long record stretched would keep its size for ever.
    if block.len() == BLOCK {
        lock(blocks).push(block);
    }
}

/// The decode workers. To be dropped after all readers, which hold the way to them.
pub(super) struct Pool {
    pub desk: Desk,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    pub(super) fn start(threads: usize) -> Result<Self, Error> {
        let threads = threads.max(1);
        // Short, because waiting blocks are memory: each reader has one more in its hands.
        let (work, jobs) = bounded(2 * threads);
        let desk = Desk { work, chunks: Recycler::default(), blocks: Blocks::default(), marks: Marks::default() };
        let mut pool = Self { desk, workers: Vec::with_capacity(threads) };
        for index in 0..threads {
            // Of the desk a worker has all but the way to the workers, which would keep itself open.
            let Desk { work: _, chunks, blocks, marks } = pool.desk.clone();
            let jobs = jobs.clone();
            let worker = thread::Builder::new()
                .name(format!("decode-{index}"))
                .spawn(move || work_off(&jobs, &chunks, &blocks, &marks))
                .map_err(|source| Error::Thread { what: "decode".into(), source })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }
}

impl Drop for Pool {
    /// Lets the workers finish what was handed in, and joins them.
    fn drop(&mut self) {
        self.desk.work = bounded(0).0; // the last way to the workers goes with the one replaced
        for worker in self.workers.drain(..) {
            // A worker catches what its decoders throw; were it to die all the same, its ticket has told the consumer.
            let _ = worker.join();
        }
    }
}

fn work_off(jobs: &Receiver<Job>, chunks: &Recycler, blocks: &Blocks, marks: &Marks) {
    // One decoder per way to make them; the `Arc` beside it keeps its address from being used again.
    let mut decoders: Vec<(NewDecoder, Box<dyn Decode>)> = Vec::new();
    for job in jobs {
        let mut chunk = chunks.take();
        let mut at = job.at.offset;
        let decoded = catch_unwind(AssertUnwindSafe(|| {
            let index = decoders.iter().position(|(new, _)| Arc::ptr_eq(new, &job.decoder)).unwrap_or_else(|| {
                decoders.push((Arc::clone(&job.decoder), (job.decoder)()));
                decoders.len() - 1
            });
            let decoder = decoders[index].1.as_mut();
            match &job.content {
                Content::Lines(len) => decode_lines(&job, *len, decoder, &mut at, &mut chunk),
                Content::Messages(marks) => decode_messages(&job, marks, decoder, &mut at, &mut chunk),
                Content::Rows(rows) => decode_rows(&job, rows, decoder, &mut at, &mut chunk),
            }
            chunk.next = job.next;
            chunk.seal();
        }));
        let Job { ticket, decoder, bytes, content, .. } = job;
        give_block(blocks, bytes);
        if let Content::Messages(mut used) = content {
            used.clear();
            lock(marks).push(used);
        }
        match decoded {
            Ok(()) => ticket.fill(Arrival::Records(chunk)),
            Err(panic) => {
                decoders.retain(|(new, _)| !Arc::ptr_eq(new, &decoder));
                let (partition, at) = (ticket.queue.name.clone(), format!("decoder, on the record at offset {at}"));
                ticket.fill(Arrival::Failed(Error::Panicked { partition, at, message: text_of_panic(panic.as_ref()) }));
            }
        }
    }
}

pub(super) fn text_of_panic(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Decodes the first `len` bytes of `job`, whole lines, into the empty `chunk`; `at` follows, for the message of a panic.
fn decode_lines(job: &Job, len: usize, decoder: &mut dyn Decode, at: &mut u64, chunk: &mut Chunk) {
    let bytes = &job.bytes[..len];
    let (mut before, now) = (job.at.before, clock::now());
    let mut start = 0;
    // The last line has no newline only where bounded input ends without one.
    let last = if bytes.last() == Some(&b'\n') { None } else { Some(bytes.len()) };
    for end in memchr_iter(b'\n', bytes).chain(last) {
        *at = job.at.offset + start as u64;
        let raw = without_cr(&bytes[start..end]);
        start = end + 1;
        let records = chunk.records.len();
        if is_blank(raw) {
            continue;
        } else if raw.len() > job.max_record {
            reject_long(chunk, *at, before, raw, raw.len() as u64, job.max_record);
        } else {
            decoder.decode(raw, *at, before, chunk);
        }
        keep_originals(chunk, records, now, None, Raw::Text(raw));
        before = Fingerprint::of(raw);
    }
    debug_assert_eq!(before, job.next.before);
    chunk.bytes = len as u64;
}

/// Decodes the rows of `job` into the empty `chunk`. All records of a table have its fingerprint before them, but the first.
fn decode_rows(job: &Job, rows: &Rows, decoder: &mut dyn Decode, at: &mut u64, chunk: &mut Chunk) {
    let (mut before, now) = (job.at.before, clock::now());
    for row in rows.iter() {
        let records = chunk.records.len();
        decoder.decode_row(&row, *at, before, chunk);
        keep_originals(chunk, records, now, None, Raw::Row(&row));
        before = job.next.before;
        *at += 1;
    }
    debug_assert_eq!(*at, job.next.offset);
    chunk.bytes = rows.bytes();
}

/// Keeps what the log holds of the records from `first` on that are rejected, or whose event time is past the time at which
/// the log took them (without one: `now`), for the order may reject those.
fn keep_originals(chunk: &mut Chunk, first: usize, now: Time, key: Option<&[u8]>, raw: Raw<'_>) {
    let (mut kept_key, mut kept_value) = (None, None);
    for index in first..chunk.records.len() {
        let record = chunk.records[index];
        let log = if record.log_time == Time::MIN { now } else { record.log_time };
        let rejected = record.kind == Kind::Rejected;
        if !rejected && record.event_time <= log {
            continue;
        }
        let text = &mut chunk.text;
        let mut keep = |bytes: Raw<'_>| {
            let start = text.len();
            bytes.append_to(text);
            (start as u32, (text.len() - start) as u32)
        };
        if kept_key.is_none() {
            kept_key = key.map(|key| keep(Raw::Text(key)));
        }
        let value = match kept_value {
            _ if rejected => (record.text_start, record.text_len),
            Some(value) => value,
            None => *kept_value.insert(keep(raw)),
        };
        chunk.originals.push(Original { index: index as u32, key: kept_key, value });
    }
}

/// Decodes the messages of `job` into the empty `chunk`. A record that does not carry the time at which the log took it has
/// the message's.
fn decode_messages(job: &Job, marks: &[Mark], decoder: &mut dyn Decode, at: &mut u64, chunk: &mut Chunk) {
    let (mut before, now) = (job.at.before, clock::now());
    for mark in marks {
        *at = mark.offset;
        let raw = &job.bytes[mark.start as usize..][..mark.len as usize];
        let records = chunk.records.len();
        if raw.len() > job.max_record {
            reject_long(chunk, *at, before, raw, raw.len() as u64, job.max_record);
        } else if !mark.tombstone {
            decoder.decode(raw, *at, before, chunk);
        }
        for record in chunk.records[records..].iter_mut().filter(|record| record.log_time == Time::MIN) {
            record.log_time = mark.log_time;
        }
        let key = mark.key_len.map(|len| &job.bytes[(mark.start - len) as usize..][..len as usize]);
        keep_originals(chunk, records, now, key, Raw::Text(raw));
        before = Fingerprint::of(raw);
        chunk.bytes += raw.len() as u64;
    }
    debug_assert_eq!(before, job.next.before);
}

/// A line without the `\r` of its line end.
pub(super) fn without_cr(line: &[u8]) -> &[u8] {
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Nothing but white space: not a record.
pub(super) fn is_blank(line: &[u8]) -> bool {
    line.iter().all(u8::is_ascii_whitespace)
}

/// Fingerprint of the last record in `lines`, which ends with a line end or with the input; `None` if all are blank.
pub(super) fn last_fingerprint(lines: &[u8]) -> Option<Fingerprint> {
    let mut rest = lines.strip_suffix(b"\n").unwrap_or(lines);
    loop {
        let newline = memrchr(b'\n', rest);
        let raw = without_cr(&rest[newline.map_or(0, |at| at + 1)..]);
        if !is_blank(raw) {
            return Some(Fingerprint::of(raw));
        }
        rest = &rest[..newline?];
    }
}

/// Appends a rejected record of `len` bytes, of which `head` holds at least the first [`HEAD`].
pub(super) fn reject_long(out: &mut Chunk, offset: u64, before: Fingerprint, head: &[u8], len: u64, max_record: usize) {
    let text = &head[..head.len().min(HEAD)];
    let why = format!(
        "the record has {len} bytes, more than `max_record` = {max_record}; its first {} bytes are kept",
        text.len()
    );
    out.rejects.push((out.records.len() as u32, why));
    out.records.push(Record {
        id: 0,
        event_time: Time::MIN,
        log_time: Time::MIN,
        offset,
        row: 0,
        weight: 1.0,
        slots_start: out.slots.len() as u32,
        slots_len: 0,
        text_start: out.text.len() as u32,
        text_len: text.len() as u32,
        before: before.0,
        content: 0,
        kind: Kind::Rejected,
    });
    out.text.extend_from_slice(text);
}
