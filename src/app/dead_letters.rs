//! Records that cannot be used, kept with their position and the reason.

use std::fs::File;
use std::io::{self, BufWriter, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::event::{Chunk, Stream};

/// A line of the dead-letter file.
#[derive(Serialize)]
struct Letter<'a> {
    stream: Stream,
    partition: &'a str,
    offset: u64,
    row: u32,
    reason: &'a str,
    /// The raw record; bytes that are not UTF-8 are replaced by U+FFFD. Empty where only its position is known.
    record: &'a str,
}

/// Why dead letters cannot be kept.
#[derive(Debug, thiserror::Error)]
#[error("cannot write dead letters to `{}`; the job stops so that none is lost: free space or change `dead_letters.path`, then start it again", path.display())]
pub struct Error {
    path: PathBuf,
    source: io::Error,
}

/// Appends rejected records to a JSON-lines file. At least once: what was read again after a restart is written again.
pub struct DeadLetters {
    file: Option<(PathBuf, BufWriter<File>)>,
    /// Rejected records since the start, re-read ones included.
    pub count: u64,
}

impl DeadLetters {
    /// Opens the file for appending; without a path, rejected records are only counted and logged.
    pub fn open(path: Option<&Path>) -> Result<Self, Error> {
        let file = path.map(|path| {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let made = directory.map_or(Ok(()), std::fs::create_dir_all);
            let file = made.and_then(|()| File::options().create(true).append(true).open(path));
            file.map(|file| (path.to_owned(), BufWriter::new(file)))
                .map_err(|source| Error { path: path.to_owned(), source })
        });
        Ok(Self { file: file.transpose()?, count: 0 })
    }

    /// Keeps what the decoder rejected in a chunk.
    pub fn keep_rejects(&mut self, stream: Stream, partition: &str, chunk: &Chunk) -> Result<(), Error> {
        for (index, reason) in &chunk.rejects {
            let record = &chunk.records[*index as usize];
            let raw = String::from_utf8_lossy(chunk.text_of(record));
            self.keep(stream, partition, record.offset, record.row, reason, &raw)?;
        }
        Ok(())
    }

    pub fn keep(
        &mut self,
        stream: Stream,
        partition: &str,
        offset: u64,
        row: u32,
        reason: &str,
        record: &str,
    ) -> Result<(), Error> {
        self.count += 1;
        if self.count <= 10 {
            tracing::warn!(stream = stream.name(), partition, offset, reason, "rejected a record");
        } else if self.count == 11 {
            tracing::warn!("more records are rejected; they are counted and no longer logged one by one");
        }
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        let line =
            serde_json::to_string(&Letter { stream, partition, offset, row, reason, record }).expect("plain data");
        writeln!(file, "{line}").map_err(|source| Error { path: path.clone(), source })
    }

    /// Makes sure that what was kept is with the operating system, before a checkpoint says that it was read.
    pub fn flush(&mut self) -> Result<(), Error> {
        let Some((path, file)) = &mut self.file else { return Ok(()) };
        file.flush().map_err(|source| Error { path: path.clone(), source })
    }
}
