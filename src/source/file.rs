//! Files of lines as partitions of a log: one record a line, one partition a file. Parquet has a reader of its own.
//!
//! | | |
//! |---|---|
//! | format | plain, gzip (any number of members) or zstd (any number of frames); told by the first bytes, not by the name |
//! | offset | byte at which a record starts, in the decompressed content |
//! | line end | `\n` or `\r\n`; lines of nothing but white space are skipped, their bytes count |
//! | last line without `\n` | bounded: a record; plain file that is followed or may grow: not there yet |
//! | too long a record | rejected with its first 4 KiB; never held whole |
//! | bounded | to the length that a plain file had when it was opened; to the end of a compressed stream |
//! | followed | a plain file may grow. A compressed one must be complete: it is read to its end and counts as caught up from then on |
//! | object | of a store, in the place of a file: bounded only |
//! | refused | a file that shrank, or whose record before the place where reading goes on is not the one that was read |
//!
//! A stream that was cut exactly between two gzip members or zstd frames cannot be told from a complete one.
//!
//! Memory per partition: up to `queue` decoded chunks of about 128 KiB of log each, one such block in the reader's hands, and
//! for zstd the window of the stream. Nothing is allocated before there is something to read.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read};
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use memchr::{memchr, memchr_iter, memrchr};
use xxhash_rust::xxh3::Xxh3Default;

use super::blob::{self, Blob, Object};
use super::pool::{self, BLOCK, Content, Desk, HEAD, Halt, Job, Queue, RECORDS, Stop, Ticket};
use super::{Arrival, Error, NewDecoder};
use crate::event::Stream;
use crate::position::{Fingerprint, NextOffset};

/// Blocks of short records are smaller than [`BLOCK`], down to this many bytes.
const SMALLEST: usize = 16 << 10;

/// The checked settings of a stream that comes from files, with the files that were there.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    /// Sorted by name, each once.
    pub paths: Vec<PathBuf>,
    /// Addresses of objects, which somebody else finds.
    pub objects: Vec<String>,
    pub max_record: usize,
    pub poll: Duration,
    pub queue: usize,
}

impl Files {
    /// One [`Spec`] for each file, to be read from where `from` says for its name, then for each of the `objects` that were found.
    pub fn specs(
        &self,
        stream: Stream,
        follow: bool,
        decoder: &NewDecoder,
        objects: Vec<(PathBuf, Arc<dyn Object>)>,
        from: impl Fn(&str) -> NextOffset,
    ) -> Vec<Spec> {
        let files = self.paths.iter().map(|path| (path.clone(), None));
        let objects = objects.into_iter().map(|(name, object)| (name, Some(object)));
        let spec = |(path, object): (PathBuf, Option<Arc<dyn Object>>)| Spec {
            stream,
            mode: if follow { Mode::Follow { poll: self.poll } } else { Mode::Bounded },
            from: from(&name_of(&path)),
            decoder: Arc::clone(decoder),
            max_record: self.max_record,
            queue: self.queue,
            path,
            object,
        };
        files.chain(objects).map(spec).collect()
    }
}

/// One file to read.
#[derive(Clone)]
pub struct Spec {
    pub path: PathBuf,
    /// What is read in the place of a file; `path` is then its name.
    pub object: Option<Arc<dyn Object>>,
    pub stream: Stream,
    pub mode: Mode,
    /// Where to start; the default is the start of the file.
    pub from: NextOffset,
    pub decoder: NewDecoder,
    /// Longest record in bytes without its line end, at least 1.
    pub max_record: usize,
    /// Chunks decoded ahead, at least 1.
    pub queue: usize,
}

/// When a partition is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// At the end that it has when it is opened.
    Bounded,
    /// Likewise, for one that may be growing: a last line of a plain file without its line end is not there yet.
    Growing,
    /// Never; it is looked at for growth every `poll`.
    Follow { poll: Duration },
}

/// The name of the partition that the file at `path` is: the path as configured.
#[must_use]
pub fn name_of(path: &Path) -> String {
    path.display().to_string()
}

/// Finds the files that `paths` name, sorted by name, each once. The last part of a path may hold `*` and `?`, which do not
/// stand for a leading `.`; a pattern that matches no file is an error, so is a path without pattern that is not there.
pub fn expand(paths: &[String]) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    for pattern in paths {
        let path = Path::new(pattern);
        let last = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !last.contains(['*', '?']) || path.is_file() {
            fs::metadata(path).map_err(|source| Error::Unreadable { file: path.into(), source })?;
            found.push(path.to_path_buf());
            continue;
        }
        let parent = path.parent().unwrap_or(Path::new(""));
        let folder = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
        let unreadable = |source| Error::Unreadable { file: folder.into(), source };
        let before = found.len();
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            let hit = name.to_str().is_some_and(|name| matches(last.as_bytes(), name.as_bytes()));
            if hit && parent.join(&name).is_file() {
                found.push(parent.join(name));
            }
        }
        if found.len() == before {
            return Err(Error::NoMatch { pattern: pattern.clone() });
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}

/// Does `name` match `pattern`, where `*` stands for any characters and `?` for one (of UTF-8: one byte or more).
#[must_use]
pub fn matches(pattern: &[u8], name: &[u8]) -> bool {
    if name.first() == Some(&b'.') && pattern.first() != Some(&b'.') {
        return false;
    }
    // Greedy with one step back: only the latest `*` ever needs to take more.
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(b'?') => {
                n += 1;
                while name.get(n).is_some_and(|byte| byte & 0xC0 == 0x80) {
                    n += 1;
                }
                p += 1;
            }
            Some(byte) if *byte == name[n] => (p, n) = (p + 1, n + 1),
            _ => match &mut star {
                Some((at, taken)) => {
                    *taken += 1;
                    (p, n) = (*at + 1, *taken);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

/// The records of a file, one after the other. For looking at a file or copying it, not for training from it.
pub struct Lines {
    path: PathBuf,
    input: BufReader<Box<dyn Read + Send>>,
    offset: u64,
}

impl Lines {
    pub fn open(path: &Path) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { file: path.to_owned(), source };
        let input = Blob::open(path, None).and_then(Input::of).map_err(unreadable)?;
        let input: BufReader<Box<dyn Read + Send>> = match input {
            Input::Plain(blob) => BufReader::new(Box::new(blob.from(0))),
            Input::Packed(reader) => BufReader::new(reader),
        };
        Ok(Self { path: path.to_owned(), input, offset: 0 })
    }

    /// Puts the next record into `record`, without its line end, and says at which byte it starts; `None` at the end.
    pub fn next(&mut self, record: &mut Vec<u8>) -> Result<Option<u64>, Error> {
        loop {
            record.clear();
            let len = self.input.read_until(b'\n', record);
            let len = len.map_err(|source| Error::Unreadable { file: self.path.clone(), source })?;
            if len == 0 {
                return Ok(None);
            }
            let start = self.offset;
            self.offset += len as u64;
            record.truncate(pool::without_cr(record.strip_suffix(b"\n").unwrap_or(record)).len());
            if !pool::is_blank(record) {
                return Ok(Some(start));
            }
        }
    }
}

/// The first `n` records of a file, with the byte at which each starts; records past `max_record` bytes are cut there.
/// For looking at a file, not for reading it.
pub fn first_records(path: &Path, n: usize, max_record: usize) -> Result<Vec<(u64, Vec<u8>)>, Error> {
    let (mut lines, mut records) = (Lines::open(path)?, Vec::new());
    let mut record = Vec::new();
    while records.len() < n
        && let Some(offset) = lines.next(&mut record)?
    {
        record.truncate(max_record);
        records.push((offset, std::mem::take(&mut record)));
    }
    Ok(records)
}

enum Input {
    Plain(Blob),
    Packed(Box<dyn Read + Send>),
}

impl Input {
    /// Looks at the first bytes of `blob` to see what it is.
    fn of(blob: Blob) -> io::Result<Self> {
        let mut magic = [0; 4];
        let mut len = 0;
        while len < 4 {
            match blob.read_at(&mut magic[len..], len as u64)? {
                0 => break,
                n => len += n,
            }
        }
        Ok(match magic {
            [0x1f, 0x8b, ..] => {
                let bytes = BufReader::with_capacity(BLOCK, blob.from(0));
                Self::Packed(Box::new(flate2::bufread::MultiGzDecoder::new(bytes)))
            }
            // A frame, or one to be skipped, with which some tools begin.
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
                Self::Packed(Box::new(zstd::Decoder::new(blob.from(0))?))
            }
            // Read by another reader, which knows it when it opens the file.
            [b'P', b'A', b'R', b'1'] => return Err(io::Error::other("a Parquet file, where lines are needed")),
            _ => Self::Plain(blob),
        })
    }

    /// Reads some bytes, which stand at `offset`; 0 at the end. A compressed input is always read on where it stands.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Plain(blob) => blob.read_at(into, offset),
                Self::Packed(stream) => stream.read(into),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }
}

/// What stopped [`Reader::advance`].
#[derive(PartialEq, Clone, Copy)]
enum Edge {
    /// The offset up to which it was to read.
    Limit,
    /// There is nothing more in the input.
    End,
}

/// What to do with what [`Reader::advance`] reads.
#[derive(PartialEq, Clone, Copy)]
enum Purpose {
    Deliver,
    /// Only to learn what stands before the place where reading starts.
    Skip,
}

/// Cuts one file into blocks of whole lines.
pub(super) struct Reader {
    file: Arc<Path>,
    /// Device and inode, to notice another file in its place.
    identity: (u64, u64),
    /// Length of the file when it was opened.
    length: u64,
    spec: Spec,
    input: Input,
    queue: Arc<Queue>,
    desk: Desk,
    stop: Arc<Stop>,
    /// Start of the first line that was not handed on; inside a long record, the next byte of it.
    offset: u64,
    before: Fingerprint,
    /// `block[..len]` is what was read from `offset` on.
    block: Vec<u8>,
    len: usize,
    /// Bytes that the next block should have, for about [`RECORDS`] records.
    target: usize,
    /// A record that is known to be too long and not read to its end.
    long: Option<Long>,
    /// The line before `offset` was taken as a record though it had no line end; one must come next, if anything.
    unended: bool,
    /// Something was handed on since the consumer was last told that this is the end.
    news: bool,
}

/// A record that is too long to be held, seen in pieces.
struct Long {
    start: u64,
    head: Vec<u8>,
    hash: Box<Xxh3Default>,
    /// Bytes so far, without a `\r` at the end.
    len: u64,
    /// The last byte so far is a `\r`, which belongs to the record if the line goes on.
    cr: bool,
    blank: bool,
}

impl Long {
    fn new(start: u64) -> Self {
        let (head, hash) = (Vec::with_capacity(HEAD), Box::new(Xxh3Default::new()));
        Self { start, head, hash, len: 0, cr: false, blank: true }
    }

    fn feed(&mut self, bytes: &[u8]) {
        let Some(last) = bytes.last() else { return };
        if self.cr {
            self.take(b"\r");
        }
        self.cr = *last == b'\r';
        self.take(pool::without_cr(bytes));
    }

    fn take(&mut self, bytes: &[u8]) {
        self.head.extend_from_slice(&bytes[..bytes.len().min(HEAD - self.head.len())]);
        self.hash.update(bytes);
        self.len += bytes.len() as u64;
        self.blank &= pool::is_blank(bytes);
    }

    /// Of all bytes so far; `None` if they are blank.
    fn fingerprint(&self) -> Option<Fingerprint> {
        // The same as `Fingerprint::of`, in pieces.
        (!self.blank).then(|| Fingerprint((self.hash.digest() as u32).max(1)))
    }
}

impl Reader {
    pub(super) fn open(spec: Spec, queue: Arc<Queue>, desk: &Desk, stop: Arc<Stop>) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { file: spec.path.clone(), source };
        let blob = Blob::open(&spec.path, spec.object.as_ref()).map_err(unreadable)?;
        let (identity, length) = (blob.identity().map_err(unreadable)?, blob.length().map_err(unreadable)?);
        let input = Input::of(blob).map_err(unreadable)?;
        let mut reader = Self {
            file: spec.path.as_path().into(),
            identity,
            length,
            input,
            queue,
            desk: desk.clone(),
            stop,
            offset: spec.from.offset,
            before: spec.from.before,
            block: Vec::new(),
            len: 0,
            target: BLOCK,
            long: None,
            unended: false,
            news: false,
            spec,
        };
        match &reader.input {
            Input::Plain(blob) => reader.unended = reader.verify(blob)?,
            Input::Packed(_) => (reader.offset, reader.before) = (0, Fingerprint::NONE),
        }
        Ok(reader)
    }

    /// The life of the reader's thread.
    pub(super) fn run(mut self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.read()));
        let failure = match end {
            Ok(Ok(()) | Err(Halt::Closed)) => return,
            Ok(Err(Halt::Failed(error))) => error,
            Err(panic) => Error::Panicked {
                partition: self.queue.name.clone(),
                at: format!("reader, at byte {}", self.offset),
                message: pool::text_of_panic(panic.as_ref()),
            },
        };
        if let Some(ticket) = self.queue.reserve() {
            ticket.fill(Arrival::Failed(failure));
        }
    }

    fn read(&mut self) -> Result<(), Halt> {
        if let Input::Packed(_) = self.input {
            self.skip()?;
        }
        match self.spec.mode {
            Mode::Bounded | Mode::Growing => {
                let packed = matches!(self.input, Input::Packed(_));
                let limit = if packed { u64::MAX } else { self.length };
                if self.advance(limit, packed, Purpose::Deliver)? == Edge::End && !packed {
                    return Err(self.shrunk(self.position(), limit).into());
                }
                let next = self.next();
                self.reserve()?.fill(Arrival::Ended { next });
                Ok(())
            }
            Mode::Follow { poll } => {
                self.news = true;
                loop {
                    let packed = matches!(self.input, Input::Packed(_));
                    self.advance(u64::MAX, packed, Purpose::Deliver)?;
                    if self.news {
                        let next = self.next();
                        self.reserve()?.fill(Arrival::CaughtUp { next });
                        self.news = false;
                    }
                    self.wait_for_growth(poll)?;
                }
            }
        }
    }

    fn next(&self) -> NextOffset {
        // Inside a long record it goes on where that starts.
        NextOffset { offset: self.long.as_ref().map_or(self.offset, |long| long.start), before: self.before }
    }

    /// First byte that was not read.
    fn position(&self) -> u64 {
        self.offset + self.len as u64
    }

    fn reserve(&self) -> Result<Ticket, Halt> {
        self.queue.reserve().ok_or(Halt::Closed)
    }

    /// Brings a compressed stream to where reading is to start, and checks that it is the one that was read before.
    fn skip(&mut self) -> Result<(), Halt> {
        let from = self.spec.from;
        if self.advance(from.offset, false, Purpose::Skip)? == Edge::End {
            return Err(self.shrunk(self.position(), from.offset).into());
        }
        if self.before != from.before {
            return Err(self.other_content(from, self.before).into());
        }
        Ok(())
    }

    /// Reads and hands on whole lines up to `limit`, or to the end of what is there. A last line without its line end is
    /// a record at `limit`, and at the end if `last_at_end`.
    fn advance(&mut self, limit: u64, last_at_end: bool, purpose: Purpose) -> Result<Edge, Halt> {
        loop {
            let (edge, failure) = match self.fill(limit) {
                Ok(edge) => (edge, None),
                Err(error) => (None, Some(self.unreadable(error))),
            };
            let at_limit = edge == Some(Edge::Limit) && self.spec.mode != Mode::Growing;
            let take_last = at_limit || edge == Some(Edge::End) && last_at_end;
            if self.unended && self.len > 0 {
                if !matches!(self.block[0], b'\n' | b'\r') {
                    return Err(self.continued().into());
                }
                self.unended = false;
            }
            self.cut_long(take_last, purpose)?;
            self.cut_lines(take_last, purpose)?;
            if let Some(error) = failure {
                return Err(error.into());
            }
            if let Some(edge) = edge {
                return Ok(edge);
            }
        }
    }

    /// Reads until the block has the size that it should have, or to the edge.
    fn fill(&mut self, limit: u64) -> io::Result<Option<Edge>> {
        // A line that fills the block makes it grow, up to where the record is known to be too long.
        let size = self.target.max((2 * self.len).min(self.spec.max_record.saturating_add(2)));
        loop {
            let left = usize::try_from(limit.saturating_sub(self.position())).unwrap_or(usize::MAX);
            if left == 0 {
                return Ok(Some(Edge::Limit));
            }
            if self.len >= size {
                return Ok(None);
            }
            if self.block.len() < size {
                let mut larger = self.desk.block(size);
                larger[..self.len].copy_from_slice(&self.block[..self.len]);
                self.desk.give_block(std::mem::replace(&mut self.block, larger));
            }
            let (position, end) = (self.position(), self.len + left.min(size - self.len));
            match self.input.read(position, &mut self.block[self.len..end])? {
                0 => return Ok(Some(Edge::End)),
                n => self.len += n,
            }
        }
    }

    /// Goes on with a record that is too long: takes its bytes from the front of the block.
    fn cut_long(&mut self, take_last: bool, purpose: Purpose) -> Result<(), Halt> {
        let Some(mut long) = self.long.take() else { return Ok(()) };
        let newline = memchr(b'\n', &self.block[..self.len]);
        let cut = newline.map_or(self.len, |at| at + 1);
        long.feed(&self.block[..newline.unwrap_or(self.len)]);
        self.block.copy_within(cut..self.len, 0);
        (self.offset, self.len) = (self.offset + cut as u64, self.len - cut);
        if newline.is_none() && !take_last {
            self.long = Some(long);
            return Ok(());
        }
        self.unended = newline.is_none();
        let before = self.before;
        self.before = long.fingerprint().unwrap_or(before);
        if purpose == Purpose::Deliver {
            self.news = true;
            let mut chunk = self.desk.chunks.take();
            if !long.blank {
                pool::reject_long(&mut chunk, long.start, before, &long.head, long.len, self.spec.max_record);
            }
            chunk.next = self.next();
            chunk.bytes = self.offset - long.start;
            chunk.seal();
            self.reserve()?.fill(Arrival::Records(chunk));
        }
        Ok(())
    }

    /// Hands on the whole lines in the block, and keeps the rest for the next.
    fn cut_lines(&mut self, take_last: bool, purpose: Purpose) -> Result<(), Halt> {
        let held = &self.block[..self.len];
        let cut = if take_last { self.len } else { memrchr(b'\n', held).map_or(0, |at| at + 1) };
        if cut > 0 {
            let lines = &held[..cut];
            let at = NextOffset { offset: self.offset, before: self.before };
            self.unended = lines.last() != Some(&b'\n');
            self.before = pool::last_fingerprint(lines).unwrap_or(self.before);
            let average = cut / memchr_iter(b'\n', lines).count().max(1);
            self.offset += cut as u64;
            if purpose == Purpose::Deliver {
                self.target = (average * RECORDS).clamp(SMALLEST, BLOCK);
                let mut rest = Vec::new();
                if cut < self.len {
                    rest = self.desk.block(self.len - cut);
                    rest[..self.len - cut].copy_from_slice(&held[cut..]);
                }
                let bytes = std::mem::replace(&mut self.block, rest);
                self.len -= cut;
                self.news = true;
                let job = Job {
                    ticket: self.reserve()?,
                    decoder: Arc::clone(&self.spec.decoder),
                    bytes,
                    content: Content::Lines(cut),
                    at,
                    next: self.next(),
                    max_record: self.spec.max_record,
                };
                // Were the workers gone, the ticket inside would say so.
                self.desk.work.send(job).map_err(|_| Halt::Closed)?;
            } else {
                self.block.copy_within(cut..self.len, 0);
                self.len -= cut;
            }
        }
        if purpose == Purpose::Skip && self.queue.is_closed() {
            return Err(Halt::Closed);
        }
        if self.len > self.spec.max_record.saturating_add(1) {
            let mut long = Long::new(self.offset);
            long.feed(&self.block[..self.len]);
            (self.offset, self.len) = (self.position(), 0);
            self.long = Some(long);
        }
        Ok(())
    }

    /// Waits at the end of a followed file until there is more, and checks that it is still the same file.
    fn wait_for_growth(&mut self, poll: Duration) -> Result<(), Halt> {
        let seen = self.position();
        // What was read of an unfinished line is read again with the rest of it.
        self.len = 0;
        self.desk.give_block(std::mem::take(&mut self.block));
        loop {
            if self.stop.within(poll) || self.queue.is_closed() {
                return Err(Halt::Closed);
            }
            let unreadable = |source| Error::Unreadable { file: self.file.to_path_buf(), source };
            let now = match fs::metadata(&self.file) {
                Ok(now) => Some(now),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None, // moved away; something may take its place
                Err(error) => return Err(unreadable(error).into()),
            };
            let replaced = now.as_ref().is_some_and(|now| (now.dev(), now.ino()) != self.identity);
            let Input::Plain(blob) = &self.input else {
                match now.map_or(self.length, |now| now.len()) {
                    len if len == self.length => continue,
                    len => return Err(self.packed_changed(len).into()),
                }
            };
            let length = blob.length().map_err(unreadable)?;
            if length < seen {
                return Err(self.shrunk(length, seen).into());
            }
            if length == seen && !replaced {
                continue;
            }
            if length == seen {
                let blob = Blob::open(&self.file, None).map_err(unreadable)?;
                self.identity = blob.identity().map_err(unreadable)?;
                let length = blob.length().map_err(unreadable)?;
                self.input = Input::Plain(blob);
                if let Some(long) = self.long.take() {
                    self.offset = long.start;
                }
                if length < seen {
                    return Err(self.shrunk(length, seen).into());
                }
            }
            // A file that was empty shows only now what it is.
            if self.offset == 0
                && let Input::Plain(blob) = &self.input
            {
                self.length = blob.length().map_err(unreadable)?;
                self.input = Input::of(blob.clone()).map_err(unreadable)?;
            }
            if let Input::Plain(blob) = &self.input {
                self.verify(blob)?;
            }
            return Ok(());
        }
    }

    /// Checks that the record before the place where a plain file is to be read on is the one that was read. Says whether
    /// that record has no line end.
    fn verify(&self, blob: &Blob) -> Result<bool, Error> {
        let next = self.next();
        let unreadable = |source| Error::Unreadable { file: self.file.to_path_buf(), source };
        let length = blob.length().map_err(unreadable)?;
        if length < next.offset {
            return Err(self.shrunk(length, next.offset));
        }
        let (found, unended) = record_before(blob, next.offset).map_err(unreadable)?;
        if found == next.before { Ok(unended) } else { Err(self.other_content(next, found)) }
    }

    fn rewritten(&self, offset: u64, why: String) -> Error {
        Error::Rewritten { file: self.file.to_path_buf(), offset, why }
    }

    fn shrunk(&self, length: u64, read: u64) -> Error {
        self.rewritten(read, format!("it must have at least {read} bytes, but has {length}"))
    }

    fn other_content(&self, next: NextOffset, found: Fingerprint) -> Error {
        let why = match (next.before, found) {
            (Fingerprint::NONE, _) => "no record stood before, but one does".to_string(),
            (known, Fingerprint::NONE) => format!("a record stood before (fingerprint {known:?}), but none does"),
            (known, found) => format!("the record before has the fingerprint {found:?}, but {known:?} was read"),
        };
        self.rewritten(next.offset, why)
    }

    fn continued(&self) -> Error {
        let why = "the line before, which had no line end and was read as a record, goes on now";
        self.rewritten(self.offset, why.into())
    }

    fn packed_changed(&self, length: u64) -> Error {
        let why = format!(
            "after its end was read, the compressed file went from {} to {length} bytes; a compressed file that is \
             followed must be complete when it appears (write it elsewhere, then move it)",
            self.length
        );
        self.rewritten(self.offset, why)
    }

    fn unreadable(&self, source: io::Error) -> Error {
        let (file, offset) = (self.file.to_path_buf(), self.position());
        match self.input {
            Input::Packed(_) if !blob::is_unread(&source) => {
                if source.kind() == io::ErrorKind::UnexpectedEof {
                    Error::Truncated { file, offset }
                } else {
                    Error::Corrupt { file, offset, source }
                }
            }
            _ => Error::Unreadable { file, source },
        }
    }
}

/// Fingerprint of the record before `offset`, [`Fingerprint::NONE`] if there is none, and whether it lacks a line end.
fn record_before(file: &Blob, offset: u64) -> io::Result<(Fingerprint, bool)> {
    let mut buffer = vec![0; if offset == 0 { 0 } else { SMALLEST }];
    let mut end = offset;
    let mut unended = false;
    while end > 0 {
        file.read_exact_at(&mut buffer[..1], end - 1)?;
        let line_end = if buffer[0] == b'\n' { end - 1 } else { end };
        unended |= end == offset && line_end == end;
        // Back to where the line starts, then over it again to hash it: it may be too long to be held.
        let mut start = line_end;
        while start > 0 {
            let from = start.saturating_sub(SMALLEST as u64);
            let piece = &mut buffer[..(start - from) as usize];
            file.read_exact_at(piece, from)?;
            if let Some(newline) = memrchr(b'\n', piece) {
                start = from + newline as u64 + 1;
                break;
            }
            start = from;
        }
        let mut line = Long::new(start);
        let mut at = start;
        while at < line_end {
            let size = (line_end - at).min(SMALLEST as u64) as usize;
            file.read_exact_at(&mut buffer[..size], at)?;
            line.feed(&buffer[..size]);
            at += size as u64;
        }
        if let Some(found) = line.fingerprint() {
            return Ok((found, unended));
        }
        end = start;
    }
    Ok((Fingerprint::NONE, unended))
}
