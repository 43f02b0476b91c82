//! Payloads in files of this machine, written once and from then on only read, as memory: those of a cache have a name, which they
//! get once they are whole; others have none, so they are gone with whoever reads them.

use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use memmap2::Mmap;
use tempfile::TempPath;

use super::codec::{Digest, Digesting};

/// A file that is being written. Dropped before it is finished it leaves nothing behind; a process that dies leaves of one that is
/// to have a name a file whose name ends like those of other staging files of a store, and of one without nothing.
#[derive(Debug)]
pub(super) struct Draft {
    file: File,
    /// The name that it has, and the one that it is to have.
    names: Option<(TempPath, PathBuf)>,
    digest: Digesting,
}

impl Draft {
    /// For the file `path`, in its directory, which is made where there is none.
    pub fn named(path: PathBuf) -> io::Result<Self> {
        let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(io::Error::other(format!("`{}` names no file", path.display())));
        };
        std::fs::create_dir_all(dir)?;
        let mut builder = tempfile::Builder::new();
        builder.prefix(name).suffix("#0").permissions(Permissions::from_mode(0o644));
        let (file, draft) = builder.tempfile_in(dir)?.into_parts();
        Ok(Self { file, names: Some((draft, path)), digest: Digesting::default() })
    }

    /// For a file without a name, on the disk of `dir`.
    pub fn unnamed(dir: &Path) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(dir)?, names: None, digest: Digesting::default() })
    }

    pub fn write(&mut self, piece: &[u8]) -> io::Result<()> {
        self.digest.update(piece);
        self.file.write_all(piece)
    }

    /// Of all that was written.
    pub fn digest(&self) -> Digest {
        self.digest.digest()
    }

    /// What was written, mapped as by [`map`], once it is on the disk and reads back as it was: so a disk that fails does so here,
    /// and the system may take back what it holds of the file. If the file is to have a name it has it from now on, for good also if
    /// the power goes; what had it before goes on for those who have it mapped.
    pub fn finish(self) -> io::Result<Bytes> {
        self.file.sync_all()?;
        let bytes = mapping(&self.file)?;
        if Digest::of(&bytes) != self.digest() {
            return Err(io::Error::other("the file reads back otherwise than it was written"));
        }
        if let Some((draft, path)) = self.names {
            draft.persist(&path)?;
            File::open(path.parent().unwrap_or(&path))?.sync_all()?;
        }
        Ok(bytes)
    }
}

/// The bytes of a file, mapped: they take no memory that the system could not take back. None if there is no such file. They
/// stay when the file is deleted or replaced.
pub(super) fn map(path: &Path) -> io::Result<Option<Bytes>> {
    match File::open(path) {
        Ok(file) => mapping(&file).map(Some),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn mapping(file: &File) -> io::Result<Bytes> {
    // SAFETY: the bytes of a mapping must not change while it is read. Files here are payloads, each from a `Draft`, which is used up
    // before its mapping is handed out, so that nothing of ours writes to one again. One without a name cannot be opened by others
    // either. One with a name lies in the directory of a cache, which belongs to this node alone; it has its name only once it is
    // whole, and is deleted or replaced by another file, while the mapping keeps the one that it has. Against somebody else who
    // writes into such a file there is no guard: numbers would change under the scores, and reading where it was cut short ends
    // the process with SIGBUS (docs/serving.md says so). Reason: a table of 1M rows takes 0.5 MB of memory for its index instead
    // of 18 MB, and none twice while a full is loaded (tests/reload_memory.rs).
    let mapping = unsafe { Mmap::map(file)? };
    Ok(Bytes::from_owner(mapping))
}
