//! Bytes that are read by place: of a local file, or of an object that somebody else fetches.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::sync::Arc;

/// An object of a store, as it was when it was listed. Whoever implements it fetches ahead as it sees fit.
pub trait Object: Send + Sync {
    /// Bytes, all of them.
    fn length(&self) -> u64;

    /// Reads some bytes at `offset`; 0 at the end. An error says what a person can do.
    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize>;
}

/// Why an object could not be fetched; what an [`Object`] puts into its errors, to be told from errors of what it holds.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unfetched(pub String);

impl From<Unfetched> for io::Error {
    fn from(unfetched: Unfetched) -> Self {
        Self::other(unfetched)
    }
}

/// Whether reading failed, rather than making sense of what was read.
pub(super) fn is_unread(error: &io::Error) -> bool {
    error.raw_os_error().is_some() || error.get_ref().is_some_and(|inner| inner.is::<Unfetched>())
}

#[derive(Clone)]
pub(super) enum Blob {
    File(Arc<File>),
    Object(Arc<dyn Object>),
}

impl Blob {
    /// The object, or else the file at `path`.
    pub fn open(path: &Path, object: Option<&Arc<dyn Object>>) -> io::Result<Self> {
        if let Some(object) = object {
            return Ok(Self::Object(Arc::clone(object)));
        }
        let file = File::open(path)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        Ok(Self::File(Arc::new(file)))
    }

    /// Length now.
    pub fn length(&self) -> io::Result<u64> {
        match self {
            Self::File(file) => Ok(file.metadata()?.len()),
            Self::Object(object) => Ok(object.length()),
        }
    }

    /// Device and inode of a file, to notice another in its place.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        match self {
            Self::File(file) => file.metadata().map(|metadata| (metadata.dev(), metadata.ino())),
            Self::Object(_) => Ok((0, 0)),
        }
    }

    /// Reads some bytes at `offset`; 0 at the end.
    pub fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::File(file) => file.read_at(into, offset),
                Self::Object(object) => object.read_at(into, offset),
            };
            match read {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                read => return read,
            }
        }
    }

    pub fn read_exact_at(&self, mut into: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !into.is_empty() {
            match self.read_at(into, offset)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                n => (into, offset) = (&mut into[n..], offset + n as u64),
            }
        }
        Ok(())
    }

    /// Its bytes from `offset` on, one after the other.
    pub fn from(&self, offset: u64) -> Stream {
        Stream { blob: self.clone(), offset }
    }
}

pub(super) struct Stream {
    blob: Blob,
    offset: u64,
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let read = self.blob.read_at(into, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}
