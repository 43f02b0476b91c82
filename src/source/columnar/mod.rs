//! Parquet files as partitions of a log: one record a row, one partition a file.
//!
//! | | |
//! |---|---|
//! | format | told by the first bytes; a file whose name ends in `.parquet` must be one |
//! | read | only the columns that the mapping and the schema name, of nested ones only what lies on their paths |
//! | values | by the rules of `columns`, then by those of JSON: the same values give the same record |
//! | offset | number of the row in the file, from 0; reading on skips whole row groups |
//! | fingerprint | of the file's footer (sizes, places and statistics of all columns), the same for all its records: a file that was written anew is another log, even with the same rows |
//! | end | that of the file. A Parquet file is complete or none at all, so a followed one is read to its end, too, and must not change |
//! | refused | a file without footer, a column that is missing and cannot be, a column of a type that its path cannot take |
//!
//! Compression may be none, Snappy, gzip, Zstandard, LZ4 or LZ4 raw. Checksums of pages are verified where a file has them.
//!
//! Memory per partition: a page of each column and `ROWS` rows of them, in the reader's hands and in the blocks that wait,
//! and up to `queue` decoded chunks.

mod columns;
pub mod sink;

use std::fs;
use std::io::{self, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow_array::RecordBatch;
use bytes::Bytes;
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::basic::Compression;
use parquet::errors::ParquetError;
use parquet::file::reader::{ChunkReader, Length};

use crate::position::{Fingerprint, NextOffset};
use crate::source::blob::{self, Blob, Object, Stream};
use crate::source::decode::{Decoder, EventView};
use crate::source::file::{Mode, Spec};
use crate::source::pool::{self, Content, Desk, Halt, Job, Queue, RECORDS, Stop};
use crate::source::{Arrival, Decode, Error};
use columns::{RowOf, Table};

/// Rows that are read at a time.
const ROWS: usize = 4 * RECORDS;
/// What a Parquet file begins and ends with.
const MAGIC: &[u8; 4] = b"PAR1";

/// Some consecutive rows of a file.
pub(super) struct Rows {
    table: Arc<Table>,
    from: usize,
    to: usize,
    bytes: u64,
}

impl Rows {
    pub(super) fn iter(&self) -> impl Iterator<Item = RowOf<'_>> {
        (self.from..self.to).map(|row| RowOf { table: &self.table, row })
    }

    /// Bytes in the file that they are made of, more or less.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Whether the file at `path`, or the object of this name, is read as Parquet.
pub fn is_parquet(path: &Path, object: Option<&Arc<dyn Object>>) -> Result<bool, Error> {
    let unreadable = |source| Error::Unreadable { file: path.to_owned(), source };
    let refuse = |problem: &str| Err(Error::Parquet { file: path.to_owned(), problem: problem.into() });
    let blob = Blob::open(path, object).map_err(unreadable)?;
    let mut magic = [0; 4];
    match blob.read_exact_at(&mut magic, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
        Err(error) => return Err(unreadable(error)),
    }
    let named = path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet"));
    match &magic {
        MAGIC => Ok(true),
        b"PARE" => refuse("its footer is encrypted"),
        [0, 0, 0, 0] if named => refuse(INCOMPLETE),
        _ if named => {
            refuse("it has the name of a Parquet file, but does not begin as one; give it the name of what it is")
        }
        _ => Ok(false),
    }
}

const INCOMPLETE: &str = "it does not end as a Parquet file does, so it is being written or was cut off; write such a file \
                          under another name and move it into its place when it is complete";

/// A file that was opened, with what is to be read of it.
struct Opened {
    blob: Blob,
    metadata: ArrowReaderMetadata,
    projection: ProjectionMask,
    fingerprint: Fingerprint,
    length: u64,
    rows: u64,
    /// Bytes of the chosen columns.
    bytes: u64,
    missing: Vec<String>,
}

impl Opened {
    fn open(path: &Path, object: Option<&Arc<dyn Object>>, decoder: &dyn Decode) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { file: path.to_owned(), source };
        let refuse = |problem: String| Error::Parquet { file: path.to_owned(), problem };
        let Some(decoder) = decoder.as_decoder() else {
            return Err(refuse("what reads it does not name the columns that it needs".into()));
        };
        let blob = Blob::open(path, object).map_err(unreadable)?;
        let length = blob.length().map_err(unreadable)?;
        let fingerprint = footer(&blob, length).map_err(unreadable)?.ok_or_else(|| refuse(INCOMPLETE.into()))?;
        // Types are those of Parquet, whatever the writer had in memory.
        let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
        let metadata = guarded(|| ArrowReaderMetadata::load(&Chunks::of(&blob, length), options))
            .map_err(|why| refuse(format!("its footer is damaged ({why}); put an intact copy in its place")))?;
        let choice = columns::choose(decoder, metadata.schema().fields()).map_err(refuse)?;
        let (mut bytes, mut rows) = (0, 0);
        for group in metadata.metadata().row_groups() {
            rows += u64::try_from(group.num_rows()).unwrap_or(0);
            for &leaf in &choice.leaves {
                let column = group.column(leaf);
                bytes += u64::try_from(column.compressed_size()).unwrap_or(0);
                let unknown = match column.compression() {
                    Compression::BROTLI(_) => "Brotli",
                    Compression::LZO => "LZO",
                    _ => continue,
                };
                let name = column.column_path().string();
                let problem = format!(
                    "column `{name}` is compressed by {unknown}; known are none, Snappy, gzip, Zstandard and LZ4"
                );
                return Err(refuse(problem));
            }
        }
        let projection = ProjectionMask::leaves(metadata.metadata().file_metadata().schema_descr(), choice.leaves);
        Ok(Self { blob, metadata, projection, fingerprint, length, rows, bytes, missing: choice.missing })
    }

    /// The rows from `first` on, up to `batch` at a time.
    fn read(
        &self,
        first: u64,
        batch: usize,
    ) -> Result<impl Iterator<Item = Result<RecordBatch, Trouble>> + use<>, Trouble> {
        let mut skipped = 0;
        let mut groups = Vec::new();
        for (index, group) in self.metadata.metadata().row_groups().iter().enumerate() {
            let rows = u64::try_from(group.num_rows()).unwrap_or(0);
            if groups.is_empty() && skipped + rows <= first {
                skipped += rows;
            } else {
                groups.push(index);
            }
        }
        let chunks = Chunks::of(&self.blob, self.length);
        let unread = Arc::clone(&chunks.unread);
        let builder = ParquetRecordBatchReaderBuilder::new_with_metadata(chunks, self.metadata.clone())
            .with_projection(self.projection.clone())
            .with_row_groups(groups)
            .with_offset((first - skipped) as usize)
            .with_batch_size(batch);
        // What could not be read makes no sense either; the first of both is the reason.
        let trouble = move |why| match pool::lock(&unread).take() {
            Some(error) => Trouble::Unread(error),
            None => Trouble::Damaged(why),
        };
        let mut reader = guarded(|| builder.build()).map_err(&trouble)?;
        Ok(std::iter::from_fn(move || {
            let batch = guarded(|| reader.next().transpose().map_err(ParquetError::from));
            batch.map_err(&trouble).transpose()
        }))
    }

    fn position(&self, row: u64) -> NextOffset {
        NextOffset { offset: row, before: if row == 0 { Fingerprint::NONE } else { self.fingerprint } }
    }
}

/// Why rows cannot be read.
enum Trouble {
    Unread(io::Error),
    Damaged(String),
}

impl Trouble {
    fn at(self, file: &Path, row: u64) -> Error {
        match self {
            Self::Unread(source) => Error::Unreadable { file: file.to_owned(), source },
            Self::Damaged(why) => Error::DamagedRows { file: file.to_owned(), row, why },
        }
    }
}

/// A file or an object, as the library of the format reads it.
struct Chunks {
    blob: Blob,
    length: u64,
    /// Why it could not be read, if it could not; the library makes a text of it.
    unread: Arc<Mutex<Option<io::Error>>>,
}

impl Chunks {
    fn of(blob: &Blob, length: u64) -> Self {
        Self { blob: blob.clone(), length, unread: Arc::default() }
    }
}

impl Length for Chunks {
    fn len(&self) -> u64 {
        self.length
    }
}

impl ChunkReader for Chunks {
    type T = BufReader<Stream>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(BufReader::new(self.blob.from(start)))
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        if start.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(ParquetError::EOF(format!("{length} bytes at {start} reach past its end")));
        }
        let mut bytes = vec![0; length];
        self.blob.read_exact_at(&mut bytes, start).map_err(|error| {
            let why = ParquetError::General(error.to_string());
            if blob::is_unread(&error) {
                pool::lock(&self.unread).get_or_insert(error);
            }
            why
        })?;
        Ok(bytes.into())
    }
}

/// The fingerprint of a file's footer and length; `None` if it has no footer.
fn footer(file: &Blob, length: u64) -> io::Result<Option<Fingerprint>> {
    let mut tail = [0; 8];
    if length < 12 {
        return Ok(None);
    }
    file.read_exact_at(&mut tail, length - 8)?;
    let size = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if &tail[4..] != MAGIC || size + 12 > length {
        return Ok(None);
    }
    let mut footer = vec![0; size as usize + 8];
    file.read_exact_at(&mut footer[..size as usize], length - 8 - size)?;
    footer[size as usize..].copy_from_slice(&length.to_le_bytes());
    Ok(Some(Fingerprint::of(&footer)))
}

/// Calls into the library of the format, which may panic on bytes that are not what they should be.
fn guarded<T>(read: impl FnOnce() -> Result<T, ParquetError>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(read)) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(panic) => Err(pool::text_of_panic(panic.as_ref())),
    }
}

/// How a row is decoded, event by event, or why it is rejected.
pub type Described = Result<Vec<EventView>, String>;

/// How the first `n` rows of a file are decoded, with their numbers. For looking at it.
pub fn describe(path: &Path, decoder: &Decoder, n: usize) -> Result<Vec<(u64, Described)>, Error> {
    let opened = Opened::open(path, None, decoder)?;
    let (mut decoder, mut views) = (decoder.clone(), Vec::new());
    for batch in opened.read(0, n.clamp(1, ROWS)).map_err(|trouble| trouble.at(path, 0))? {
        let batch = batch.map_err(|trouble| trouble.at(path, 0))?;
        let table = Table::new(&decoder, batch.schema_ref().fields(), batch.columns());
        let table = table.map_err(|problem| Error::Parquet { file: path.to_owned(), problem })?;
        for row in 0..batch.num_rows().min(n - views.len()) {
            views.push((views.len() as u64, decoder.describe_row(&RowOf { table: &table, row })));
        }
        if views.len() >= n {
            break;
        }
    }
    Ok(views)
}

/// Reads one file.
pub(super) struct Reader {
    spec: Spec,
    decoder: Box<dyn Decode>,
    opened: Opened,
    queue: Arc<Queue>,
    desk: Desk,
    stop: Arc<Stop>,
}

impl Reader {
    pub(super) fn open(spec: Spec, queue: Arc<Queue>, desk: &Desk, stop: Arc<Stop>) -> Result<Self, Error> {
        let decoder = (spec.decoder)();
        let opened = Opened::open(&spec.path, spec.object.as_ref(), decoder.as_ref())?;
        if !opened.missing.is_empty() {
            let columns = opened.missing.join(", ");
            tracing::warn!(file = %spec.path.display(), columns, "columns that the config names are not in this file: they count as missing");
        }
        let from = spec.from;
        let rewritten = |why| Error::Rewritten { file: spec.path.clone(), offset: from.offset, why };
        if from.offset > opened.rows {
            return Err(rewritten(format!("it must have at least {} rows, but has {}", from.offset, opened.rows)));
        }
        let found = opened.position(from.offset).before;
        if found != from.before {
            let why = "its footer is another one, so it was written anew, or its position is of another format";
            return Err(rewritten(why.into()));
        }
        Ok(Self { spec, decoder, opened, queue, desk: desk.clone(), stop })
    }

    /// The life of the reader's thread.
    pub(super) fn run(self) {
        let queue = Arc::clone(&self.queue);
        let end = catch_unwind(AssertUnwindSafe(|| self.read()));
        let failure = match end {
            Ok(Ok(()) | Err(Halt::Closed)) => return,
            Ok(Err(Halt::Failed(error))) => error,
            Err(panic) => Error::Panicked {
                partition: queue.name.clone(),
                at: "reader".into(),
                message: pool::text_of_panic(panic.as_ref()),
            },
        };
        if let Some(ticket) = queue.reserve() {
            ticket.fill(Arrival::Failed(failure));
        }
    }

    fn read(&self) -> Result<(), Halt> {
        let mut row = self.spec.from.offset;
        let file = &self.spec.path;
        if row < self.opened.rows {
            for batch in self.opened.read(row, ROWS).map_err(|trouble| trouble.at(file, row))? {
                let batch = batch.map_err(|trouble| trouble.at(file, row))?;
                row = self.hand_on(row, &batch)?;
            }
        }
        if row != self.opened.rows {
            let why = format!("it should have {} rows", self.opened.rows);
            return Err(Trouble::Damaged(why).at(file, row).into());
        }
        let next = self.opened.position(row);
        match self.spec.mode {
            Mode::Bounded | Mode::Growing => {
                self.queue.reserve().ok_or(Halt::Closed)?.fill(Arrival::Ended { next });
                Ok(())
            }
            Mode::Follow { poll } => {
                self.queue.reserve().ok_or(Halt::Closed)?.fill(Arrival::CaughtUp { next });
                self.watch(poll, row)
            }
        }
    }

    /// Hands on rows in blocks, and says which row comes next.
    fn hand_on(&self, mut row: u64, batch: &RecordBatch) -> Result<u64, Halt> {
        let decoder = self.decoder.as_decoder().expect("the file was opened with it");
        let table = Table::new(decoder, batch.schema_ref().fields(), batch.columns())
            .map_err(|problem| Error::Parquet { file: self.spec.path.clone(), problem })?;
        let table = Arc::new(table);
        for from in (0..batch.num_rows()).step_by(RECORDS) {
            let to = batch.num_rows().min(from + RECORDS);
            let rows = (to - from) as u64;
            let share = u128::from(self.opened.bytes) * u128::from(rows) / u128::from(self.opened.rows.max(1));
            let job = Job {
                ticket: self.queue.reserve().ok_or(Halt::Closed)?,
                decoder: Arc::clone(&self.spec.decoder),
                bytes: Vec::new(),
                content: Content::Rows(Rows { table: Arc::clone(&table), from, to, bytes: share as u64 }),
                at: self.opened.position(row),
                next: self.opened.position(row + rows),
                max_record: self.spec.max_record,
            };
            row += rows;
            // Were the workers gone, the ticket inside would say so.
            self.desk.work.send(job).map_err(|_| Halt::Closed)?;
        }
        Ok(row)
    }

    /// A followed file has been read and must stay as it is.
    fn watch(&self, poll: Duration, rows: u64) -> Result<(), Halt> {
        let file = &self.spec.path;
        loop {
            if self.stop.within(poll) || self.queue.is_closed() {
                return Err(Halt::Closed);
            }
            match fs::metadata(file) {
                Ok(now) if now.len() == self.opened.length => {}
                Ok(now) => {
                    let why =
                        format!("after its end was read, it went from {} to {} bytes", self.opened.length, now.len());
                    return Err(Error::Rewritten { file: file.clone(), offset: rows, why }.into());
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {} // moved away
                Err(source) => return Err(Error::Unreadable { file: file.clone(), source }.into()),
            }
        }
    }
}
