//! Payloads in files of this machine: written under another name, given their own once they are whole, and from then on only
//! read, as memory.

use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use bytes::Bytes;
use memmap2::Mmap;
use tempfile::NamedTempFile;

use super::codec::{Digest, Digesting};

/// A file that is being written. Dropped before it is finished it leaves nothing behind; a process that dies leaves a file
/// whose name ends like those of other staging files of a store.
#[derive(Debug)]
pub(super) struct Draft {
    file: NamedTempFile,
    digest: Digesting,
}

impl Draft {
    /// For the file `path`, in its directory, which is made where there is none.
    pub fn new(path: &Path) -> io::Result<Self> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::other(format!("`{}` names no file", path.display())));
        };
        std::fs::create_dir_all(dir)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(name).suffix("#0").permissions(Permissions::from_mode(0o644));
        Ok(Self { file: builder.tempfile_in(dir)?, digest: Digesting::default() })
    }

    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.digest.update(piece);
        self.file.write_all(piece)
    }

    /// Of all that was written.
    pub fn digest(&self) -> Digest {
        self.digest.digest()
    }

    /// Gives the file its name, for good also if the power goes. What had it before goes on for those who have it mapped.
    pub fn finish(self, path: &Path) -> io::Result<()> {
        self.file.as_file().sync_all()?;
        self.file.persist(path)?;
        File::open(path.parent().unwrap_or(path))?.sync_all()
    }
}

/// The bytes of a file, mapped: they take no memory that the system could not take back. None if there is no such file. They
/// stay when the file is deleted or replaced.
pub(super) fn map(path: &Path) -> io::Result<Option<Bytes>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // SAFETY: the bytes of a mapping must not change while it is read. Files here are payloads in the directory of a cache, which
    // belongs to this node alone: each comes from a `Draft`, so it has its name only once it is whole, and nothing of ours opens
    // one for writing again; it is deleted or replaced by another file, and the mapping keeps the one that it has. Against
    // somebody else who writes into such a file there is no guard: numbers would change under the scores, and reading where it was
    // cut short ends the process with SIGBUS (docs/serving.md says so). Reason: a table of 1M rows takes 0.5 MB of memory for its
    // index instead of 18 MB, and none twice while a full is loaded (tests/reload_memory.rs).
    let mapping = unsafe { Mmap::map(&file)? };
    Ok(Some(Bytes::from_owner(mapping)))
}
