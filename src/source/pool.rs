//! Decoding in parallel, arriving in order.
//!
//! A reader first reserves the next place in its partition's queue, then hands the block to the pool with the `Ticket` of
//! that place. The worker puts the decoded chunk into the place, whenever that is; the consumer waits for the place at the
//! front. So places are bounded per partition, order is that of reservation, and a worker always has somewhere to put
//! what it made.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use memchr::{memchr_iter, memrchr};

use super::{Arrival, Decode, Error, NewDecoder};
use crate::event::{Chunk, Kind, Record, Stream, Time};
use crate::position::{Fingerprint, NextOffset};

/// Size of a block that is not stretched by a long record, in bytes.
pub(super) const BLOCK: usize = 128 << 10;
/// How much of a record that is too long is kept, in bytes.
pub(super) const HEAD: usize = 4 << 10;

/// What a timeout too long for the clock is cut to.
const FOREVER: Duration = Duration::from_secs(3600 * 24 * 365);

/// A lock whose holder cannot have left half-done work: every section below is a few plain assignments.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// The path as configured.
    pub name: String,
    pub stream: Stream,
    queue: Arc<Queue>,
    over: bool,
}

impl Partition {
    pub(super) fn new(name: String, stream: Stream, queue: Arc<Queue>) -> Self {
        Self { name, stream, queue, over: false }
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
}

struct Places {
    waiting: VecDeque<Option<Arrival>>,
    /// Number of the place at the front.
    first: u64,
    closed: bool,
}

impl Queue {
    pub(super) fn new(depth: usize) -> Arc<Self> {
        let places = Places { waiting: VecDeque::with_capacity(depth), first: 0, closed: false };
        Arc::new(Self { state: Mutex::new(places), ready: Condvar::new(), room: Condvar::new(), depth: depth.max(1) })
    }

    /// Waits for a free place at the end; `None` once the queue is closed.
    pub(super) fn reserve(self: &Arc<Self>, file: &Arc<Path>) -> Option<Ticket> {
        let full = |places: &mut Places| !places.closed && places.waiting.len() >= self.depth;
        let mut places = self.room.wait_while(lock(&self.state), full).unwrap_or_else(PoisonError::into_inner);
        if places.closed {
            return None;
        }
        places.waiting.push_back(None);
        let place = places.first + places.waiting.len() as u64 - 1;
        drop(places);
        Some(Ticket { queue: Arc::clone(self), file: Arc::clone(file), place, filled: false })
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
    file: Arc<Path>,
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
            self.queue
                .fill(self.place, Arrival::Failed(Error::Panicked { file: self.file.to_path_buf(), at, message }));
        }
    }
}

/// A block of whole lines on its way to a worker.
pub(super) struct Job {
    pub ticket: Ticket,
    pub decoder: NewDecoder,
    /// The lines are `bytes[..len]`; what lies behind is leftover of earlier use.
    pub bytes: Vec<u8>,
    pub len: usize,
    /// Where the first line starts, and what stands before it.
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
}

impl Desk {
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
        let (chunks, blocks) = (Recycler::default(), Blocks::default());
        let desk = Desk { work, chunks: chunks.clone(), blocks: Arc::clone(&blocks) };
        let mut pool = Self { desk, workers: Vec::with_capacity(threads) };
        for index in 0..threads {
            let (jobs, chunks, blocks) = (jobs.clone(), chunks.clone(), Arc::clone(&blocks));
            let worker = thread::Builder::new()
                .name(format!("decode-{index}"))
                .spawn(move || work_off(&jobs, &chunks, &blocks))
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

fn work_off(jobs: &Receiver<Job>, chunks: &Recycler, blocks: &Blocks) {
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
            decode_lines(&job, decoders[index].1.as_mut(), &mut at, &mut chunk);
        }));
        let Job { ticket, decoder, bytes, .. } = job;
        give_block(blocks, bytes);
        match decoded {
            Ok(()) => ticket.fill(Arrival::Records(chunk)),
            Err(panic) => {
                decoders.retain(|(new, _)| !Arc::ptr_eq(new, &decoder));
                let (file, at) = (ticket.file.to_path_buf(), format!("decoder, on the record at byte {at}"));
                ticket.fill(Arrival::Failed(Error::Panicked { file, at, message: text_of_panic(panic.as_ref()) }));
            }
        }
    }
}

pub(super) fn text_of_panic(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".into())
}

/// Decodes the lines of `job` into the empty `chunk`; `at` follows, for the message of a panic.
fn decode_lines(job: &Job, decoder: &mut dyn Decode, at: &mut u64, chunk: &mut Chunk) {
    let bytes = &job.bytes[..job.len];
    let mut before = job.at.before;
    let mut start = 0;
    // The last line has no newline only where bounded input ends without one.
    let last = if bytes.last() == Some(&b'\n') { None } else { Some(bytes.len()) };
    for end in memchr_iter(b'\n', bytes).chain(last) {
        *at = job.at.offset + start as u64;
        let raw = without_cr(&bytes[start..end]);
        start = end + 1;
        if is_blank(raw) {
            continue;
        } else if raw.len() > job.max_record {
            reject_long(chunk, *at, before, raw, raw.len() as u64, job.max_record);
        } else {
            decoder.decode(raw, *at, before, chunk);
        }
        before = Fingerprint::of(raw);
    }
    debug_assert_eq!(before, job.next.before);
    chunk.next = job.next;
    chunk.bytes = bytes.len() as u64;
    chunk.seal();
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
