//! The file of `--predictions`.

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::job::Error;
use crate::train::core::Prediction;

/// The file of `--predictions`: CSV with a header; on resume it is cut back to what the checkpoint knows.
pub struct Predictions {
    path: PathBuf,
    file: BufWriter<File>,
    length: u64,
}

impl Predictions {
    const HEADER: &'static str = "id,prediction,label\n";

    pub fn open(path: &Path, at: Option<u64>) -> Result<Self, Error> {
        let fail = |source| Error::Predictions { path: path.to_owned(), source };
        let mut file = File::options().create(true).truncate(false).write(true).open(path).map_err(fail)?;
        let length = at.unwrap_or(0);
        let found = file.metadata().map_err(fail)?.len();
        if found < length {
            let why = format!(
                "it has {found} bytes, but the checkpoint has written {length}; name the file of the earlier run"
            );
            return Err(fail(io::Error::other(why)));
        }
        file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length))).map_err(fail)?;
        let mut this = Self { path: path.to_owned(), file: BufWriter::new(file), length };
        if length == 0 {
            this.line(Self::HEADER)?;
        }
        Ok(this)
    }

    fn line(&mut self, line: &str) -> Result<(), Error> {
        self.length += line.len() as u64;
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|source| Error::Predictions { path: self.path.clone(), source })
    }

    pub fn write(&mut self, predictions: &[Prediction]) -> Result<(), Error> {
        for p in predictions {
            let quoted = p.id.contains([',', '"', '\n', '\r']);
            let id = if quoted { format!("\"{}\"", p.id.replace('"', "\"\"")) } else { p.id.clone() };
            self.line(&format!("{id},{},{}\n", p.p, u8::from(p.positive)))?;
        }
        Ok(())
    }

    /// Returns the bytes written since the file was begun.
    pub fn flush(&mut self) -> Result<u64, Error> {
        self.file.flush().map_err(|source| Error::Predictions { path: self.path.clone(), source })?;
        Ok(self.length)
    }
}
