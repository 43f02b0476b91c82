//! Checkpoint files: what the trainer resumes from. The trainer says what is in them; this room makes them last.
//!
//! A generation is two files: `checkpoint-<number>.safetensors` with the arrays and `checkpoint-<number>.json`, the sealed
//! head, which is the commit point: it names the payload and the segments (arrays that are written once and shared by
//! generations) with length and digest. Every file is written under another name, synced, renamed, and its directory
//! synced.
//!
//! Generations that share segments form a *chain*, and no two chains share a file. The two newest generations stay, and at
//! least one of another chain than the newest, so that damage in any one file leaves one to resume from; what is older goes
//! only after a new generation is on the disk.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::snapshot::codec::{self, Arrays, Digest, Encoded};

/// Format name in every head.
const HEAD_FORMAT: &str = "tidemill-checkpoint/1";
/// Format names in the metadata of payloads and segments.
const PAYLOAD_FORMAT: &str = "checkpoint/1";
const SEGMENT_FORMAT: &str = "segment/1";
const LOCK: &str = "LOCK";
/// One line for each generation that ever was, for whoever compares another run with this one.
const HISTORY: &str = "history.jsonl";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "`checkpoint.dir` `{dir}`: another trainer is using this directory; stop it, or give this one a directory of its own"
    )]
    Locked { dir: PathBuf },
    #[error("`{path}`: cannot {action}; earlier checkpoints are untouched")]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error(
        "`{path}`: the disk is full; earlier checkpoints are untouched, it is tried again at the next mark: free space"
    )]
    Full { path: PathBuf, source: io::Error },
    #[error("`{path}` is damaged: {reason}")]
    Damaged { path: PathBuf, reason: String },
    #[error(
        "no checkpoint in `{dir}` can be used: {reasons}. Restore one from a backup, or move the files away to train anew from the start of the log"
    )]
    NoneUsable { dir: PathBuf, reasons: String },
    #[error("checkpoint cannot be written: {0}")]
    Content(#[from] codec::Error),
}

type Result<T> = std::result::Result<T, Error>;

/// An immutable file of arrays that generations of one chain may share.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentRef {
    /// What the trainer calls it.
    pub name: String,
    /// File in the directory, `segment-<chain>-<digest>.safetensors`.
    pub file: String,
    /// In bytes.
    pub length: u64,
    pub digest: Digest,
}

/// A generation that was read and verified completely.
#[derive(Clone, Debug)]
pub struct Loaded {
    pub number: u64,
    /// What the trainer passed to [`Checkpoints::write`].
    pub head: serde_json::Value,
    pub arrays: Arrays,
    /// In the order in which they were passed.
    pub segments: Vec<(SegmentRef, Arrays)>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head<T> {
    format: String,
    number: u64,
    #[serde(default)]
    chain: u64,
    length: u64,
    digest: Digest,
    segments: Vec<SegmentRef>,
    head: T,
}

/// A generation on the disk.
#[derive(Debug)]
struct Kept {
    number: u64,
    chain: u64,
    segments: Vec<SegmentRef>,
}

/// The checkpoints of one trainer. Holds the directory's lock as long as it lives.
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    _lock: Option<File>,
    /// Generations known to be good, newest first: read and verified, or written, by us.
    good: Mutex<Vec<Kept>>,
    #[cfg(test)]
    faults: tests::Faults,
}

impl Checkpoints {
    /// Opens a directory, makes it where there is none, and locks it against other trainers.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir).map_err(|e| failed(&dir, "make the directory", e))?;
        let path = dir.join(LOCK);
        let lock = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| failed(&path, "open the lock file", e))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(Error::Locked { dir }),
            Err(TryLockError::Error(e)) => return Err(failed(&path, "lock", e)),
        }
        Ok(Self {
            dir,
            _lock: Some(lock),
            good: Mutex::default(),
            #[cfg(test)]
            faults: tests::Faults::default(),
        })
    }

    /// Looks at the checkpoints of another trainer, which may be writing new ones meanwhile.
    #[must_use]
    pub fn look(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            _lock: None,
            good: Mutex::default(),
            #[cfg(test)]
            faults: tests::Faults::default(),
        }
    }

    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts the newest generation of this directory, which may belong to a running trainer, into another one, as links
    /// where the file system has them. Returns its number; none if there is no checkpoint.
    pub fn copy_newest(&self, to: &Path) -> Result<Option<u64>> {
        fs::create_dir_all(to).map_err(|e| failed(to, "make the directory", e))?;
        for attempt in 1.. {
            let numbers = if self.dir.is_dir() { self.numbers()? } else { Vec::new() };
            let Some(&number) = numbers.last() else { return Ok(None) };
            let copied = self.read_head(number).and_then(|head| {
                let segments = head.segments.iter().map(|segment| segment.file.clone());
                // The head last: it says that the rest is there.
                for name in segments.chain([payload_name(number), head_name(number)]) {
                    self.copy(&name, to)?;
                }
                Ok(())
            });
            match copied {
                Ok(()) => return Ok(Some(number)),
                // Its trainer has written two more meanwhile, and cleaned up.
                Err(Error::Damaged { .. }) if attempt < 10 => {}
                Err(error) => return Err(error),
            }
        }
        unreachable!("the last attempt returns")
    }

    fn copy(&self, name: &str, to: &Path) -> Result<()> {
        let (from, to) = (self.dir.join(name), to.join(name));
        // Files are never written to under their name, so a link is as good as a copy.
        match fs::hard_link(&from, &to) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                Err(Error::Damaged { path: from, reason: "the file is missing".to_owned() })
            }
            Err(_) => fs::copy(&from, &to).map(drop).map_err(|e| failed(&to, "copy", e)),
        }
    }

    /// Writes a generation; when this returns it is on the disk, and what nobody needs any more is gone. Returns the bytes
    /// written.
    ///
    /// `number` grows along the order (a batch number); writing one again replaces it. `chain` is the number with which its
    /// chain began, its own for the first. `segments` were all returned by [`Checkpoints::write_segment`] for this chain; any
    /// other segment goes. After an error the generations before are as they were, and the next call may succeed.
    pub fn write(
        &self,
        number: u64,
        chain: u64,
        head: &impl Serialize,
        arrays: &Arrays,
        segments: &[SegmentRef],
    ) -> Result<u64> {
        let payload = arrays.encode(PAYLOAD_FORMAT)?;
        let Encoded { length, digest, .. } = payload;
        let segments = segments.to_vec();
        let head = Head { format: HEAD_FORMAT.to_owned(), number, chain, length, digest, segments, head };
        let sealed = Bytes::from(codec::seal(&head)?);
        let written = length + sealed.len() as u64;
        self.put(&payload_name(number), &payload.pieces)?;
        self.put(&head_name(number), &[sealed])?;

        let mut good = self.good.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        good.retain(|kept| kept.number != number);
        if good.is_empty() {
            // Written over, or never looked at: the newest other one whose head can be read.
            let others = self.numbers()?.into_iter().rev().filter(|other| *other != number);
            good.extend(others.filter_map(|other| self.read_head(other).ok()).next().map(Kept::from));
        }
        good.insert(0, Kept::from(head));
        let stay = [number_of(good.get(1)), number_of(good.iter().find(|kept| kept.chain != chain))];
        good.retain(|kept| kept.number == number || stay.contains(&Some(kept.number)));
        // The new generation is safe: what cannot be deleted now is deleted the next time.
        if let Err(e) = self.clean(&good) {
            tracing::warn!(dir = %self.dir.display(), error = %e, "old checkpoint files could not be deleted");
        }
        Ok(written)
    }

    /// Whether a generation stays that shares no file with the newest one.
    #[must_use]
    pub fn has_apart(&self) -> bool {
        let good = self.good.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        good.first().is_some_and(|newest| good.iter().any(|kept| kept.chain != newest.chain))
    }

    /// Writes arrays to a file of a chain named by its digest, unless it is there and intact. It stays as long as a
    /// generation that is kept names it, so pass it to the very next [`Checkpoints::write`].
    pub fn write_segment(&self, chain: u64, name: impl Into<String>, arrays: &Arrays) -> Result<SegmentRef> {
        let encoded = arrays.encode(SEGMENT_FORMAT)?;
        let file = format!("segment-{chain:012}-{}.safetensors", encoded.digest);
        let segment = SegmentRef { name: name.into(), file, length: encoded.length, digest: encoded.digest };
        let intact =
            fs::read(self.dir.join(&segment.file)).is_ok_and(|b| segment.digest.check(segment.length, &b).is_ok());
        if !intact {
            self.put(&segment.file, &encoded.pieces)?;
        }
        Ok(segment)
    }

    /// Adds a line to the history of the directory, behind a line that a crash has cut short.
    pub fn append_history(&self, line: &impl Serialize) -> Result<()> {
        let path = self.dir.join(HISTORY);
        let append = || {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(&path)?;
            let mut text = Vec::new();
            let mut last = [b'\n'];
            if file.metadata()?.len() > 0 {
                file.seek(SeekFrom::End(-1))?;
                file.read_exact(&mut last)?;
            }
            if last != [b'\n'] {
                text.push(b'\n');
            }
            serde_json::to_writer(&mut text, line)?;
            text.push(b'\n');
            file.write_all(&text)?;
            file.sync_data()
        };
        append().map_err(|e| failed(&path, "add to", e))
    }

    /// The lines of the history, oldest first. Empty if there is none. What a crash has cut short, or cannot be read, is left
    /// out.
    pub fn history<T: for<'de> Deserialize<'de>>(&self) -> Result<Vec<T>> {
        let lines = self.read_history(u64::MAX)?;
        let mut read = Vec::new();
        for line in lines.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            match serde_json::from_slice(line) {
                Ok(line) => read.push(line),
                Err(error) => {
                    let line = String::from_utf8_lossy(line);
                    tracing::warn!(dir = %self.dir.display(), %line, %error, "a line of the history is left out");
                }
            }
        }
        Ok(read)
    }

    /// The last line of the history, if it can be read.
    pub fn last_of_history<T: for<'de> Deserialize<'de>>(&self) -> Result<Option<T>> {
        let lines = self.read_history(1 << 16)?;
        let last = lines.split(|byte| *byte == b'\n').rfind(|line| !line.is_empty());
        Ok(last.and_then(|line| serde_json::from_slice(line).ok()))
    }

    /// At most so many bytes of the history, from its end.
    fn read_history(&self, most: u64) -> Result<Vec<u8>> {
        let path = self.dir.join(HISTORY);
        let read = || {
            let mut file = match File::open(&path) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                file => file?,
            };
            file.seek(SeekFrom::Start(file.metadata()?.len().saturating_sub(most)))?;
            let mut text = Vec::new();
            file.read_to_end(&mut text)?;
            Ok(text)
        };
        read().map_err(|e| failed(&path, "read", e))
    }

    /// Reads a segment and verifies every byte of it.
    pub fn read_segment(&self, segment: &SegmentRef) -> Result<Arrays> {
        self.read_arrays(&segment.file, segment.length, segment.digest, SEGMENT_FORMAT)
    }

    /// Reads the newest generation and verifies every byte of it and of the segments it names. A damaged one is reported and
    /// the one before is taken; if there are generations and none is intact that is an error, never a start from nothing. None if there is none.
    pub fn newest(&self) -> Result<Option<Loaded>> {
        let mut reasons = Vec::new();
        for number in self.numbers()?.into_iter().rev() {
            match self.load(number) {
                Ok((loaded, kept)) => {
                    *self.good.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = vec![kept];
                    return Ok(Some(loaded));
                }
                Err(e @ Error::Damaged { .. }) => {
                    tracing::error!(checkpoint = number, reason = %e, "checkpoint is damaged, taking the one before");
                    reasons.push(e.to_string());
                }
                Err(e) => return Err(e),
            }
        }
        if reasons.is_empty() {
            // A payload without any head is what the very first write leaves when it is interrupted.
            return Ok(None);
        }
        Err(Error::NoneUsable { dir: self.dir.clone(), reasons: reasons.join("; ") })
    }

    fn load(&self, number: u64) -> Result<(Loaded, Kept)> {
        let head = self.read_head(number)?;
        let arrays = self.read_arrays(&payload_name(number), head.length, head.digest, PAYLOAD_FORMAT)?;
        let segments = head.segments.iter().map(|segment| Ok((segment.clone(), self.read_segment(segment)?)));
        let segments = segments.collect::<Result<_>>()?;
        Ok((Loaded { number, head: head.head.clone(), arrays, segments }, Kept::from(head)))
    }

    fn read_head(&self, number: u64) -> Result<Head<serde_json::Value>> {
        let path = self.dir.join(head_name(number));
        let damaged = |reason: String| Error::Damaged { path: path.clone(), reason };
        let json = codec::unseal(&self.read(&path)?).map_err(|e| damaged(e.to_string()))?;
        let head: Head<serde_json::Value> = serde_json::from_slice(&json).map_err(|e| damaged(e.to_string()))?;
        if head.format != HEAD_FORMAT {
            return Err(damaged(format!("is a `{}`, this tidemill reads `{HEAD_FORMAT}`", head.format)));
        }
        if head.number != number {
            return Err(damaged(format!("holds checkpoint {}: the file was renamed", head.number)));
        }
        Ok(head)
    }

    fn read_arrays(&self, file: &str, length: u64, digest: Digest, format: &str) -> Result<Arrays> {
        let path = self.dir.join(file);
        let bytes = Bytes::from(self.read(&path)?);
        let arrays = digest.check(length, &bytes).and_then(|()| Arrays::decode(&bytes, format));
        arrays.map_err(|e| Error::Damaged { path, reason: e.to_string() })
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>> {
        fs::read(path).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => {
                Error::Damaged { path: path.to_owned(), reason: "the file is missing".to_owned() }
            }
            _ => failed(path, "read", e),
        })
    }

    /// Numbers of all generations that have a head, ascending.
    fn numbers(&self) -> Result<Vec<u64>> {
        let mut numbers = Vec::new();
        for name in self.names().map_err(|e| failed(&self.dir, "list", e))? {
            let digits = name.strip_prefix("checkpoint-").and_then(|rest| rest.strip_suffix(".json"));
            numbers.extend(digits.and_then(|d| d.parse().ok()).filter(|number| head_name(*number) == name));
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    /// Deletes our files that `keep` does not need; heads first, so that no head is left without its payload.
    fn clean(&self, keep: &[Kept]) -> io::Result<()> {
        let needed = |name: &str| {
            keep.iter().any(|Kept { number, segments, .. }| {
                name == head_name(*number) || name == payload_name(*number) || segments.iter().any(|s| s.file == name)
            })
        };
        let ours = |name: &str| {
            let arrays =
                name.ends_with(".safetensors") && (name.starts_with("checkpoint-") || name.starts_with("segment-"));
            arrays || name.ends_with(".tmp") || (name.starts_with("checkpoint-") && name.ends_with(".json"))
        };
        let mut unneeded: Vec<_> = self.names()?.into_iter().filter(|name| ours(name) && !needed(name)).collect();
        unneeded.sort_by_key(|name| !name.ends_with(".json"));
        let heads = unneeded.iter().filter(|name| name.ends_with(".json")).count();
        for (at, name) in unneeded.iter().enumerate() {
            if at == heads && heads > 0 {
                self.sync_dir()?;
            }
            self.step("remove")?;
            fs::remove_file(self.dir.join(name))?;
        }
        Ok(())
    }

    /// Writes a file so that under its name there is either what was there before or all of `pieces`.
    fn put(&self, name: &str, pieces: &[Bytes]) -> Result<()> {
        let (path, staged) = (self.dir.join(name), self.dir.join(format!("{name}.tmp")));
        let done = self.stage(&staged, pieces).and_then(|()| {
            self.step("rename")?;
            fs::rename(&staged, &path)?;
            self.sync_dir()
        });
        done.map_err(|e| {
            // If this fails too, the next generation's clean-up takes it.
            let _ = self.step("remove").and_then(|()| fs::remove_file(&staged));
            failed(&path, "write", e)
        })
    }

    fn stage(&self, staged: &Path, pieces: &[Bytes]) -> io::Result<()> {
        self.step("create")?;
        let mut file = File::create(staged)?;
        for piece in pieces {
            let (start, end) = piece.split_at(piece.len() / 2);
            file.write_all(start)?;
            self.step("write")?;
            file.write_all(end)?;
        }
        self.step("sync")?;
        file.sync_all()
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.step("sync directory")?;
        if cfg!(unix) { File::open(&self.dir)?.sync_all() } else { Ok(()) }
    }

    /// Where tests let a call fail.
    #[cfg_attr(not(test), expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "a hook for tests"))]
    fn step(&self, _what: &'static str) -> io::Result<()> {
        #[cfg(test)]
        self.faults.step(_what)?;
        Ok(())
    }
}

impl<T> From<Head<T>> for Kept {
    fn from(Head { number, chain, segments, .. }: Head<T>) -> Self {
        Self { number, chain, segments }
    }
}

fn number_of(kept: Option<&Kept>) -> Option<u64> {
    kept.map(|kept| kept.number)
}

fn head_name(number: u64) -> String {
    format!("checkpoint-{number:012}.json")
}

fn payload_name(number: u64) -> String {
    format!("checkpoint-{number:012}.safetensors")
}

fn failed(path: &Path, action: &'static str, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::Full { path, source },
        _ => Error::Io { path, action, source },
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};

    use super::*;

    /// Lets the calls with these numbers fail.
    #[derive(Debug, Default)]
    pub struct Faults {
        state: Mutex<(usize, Range<usize>)>,
    }

    impl Faults {
        pub fn step(&self, what: &str) -> io::Result<()> {
            let mut state = self.state.lock().unwrap();
            state.0 += 1;
            if state.1.contains(&(state.0 - 1)) {
                return Err(io::Error::new(io::ErrorKind::StorageFull, format!("no space left to {what}")));
            }
            Ok(())
        }

        fn fail(&self, calls: Range<usize>) {
            *self.state.lock().unwrap() = (0, calls);
        }

        fn calls(&self) -> usize {
            self.state.lock().unwrap().0
        }
    }

    fn arrays(seed: u64) -> Arrays {
        let mut arrays = Arrays::new();
        arrays.push_u64("ids", &[3], &[seed, seed + 1, seed + 2]);
        arrays.push_f32("w", &[2], &[seed as f32, 0.5]);
        arrays
    }

    /// Writes generation `number` with a segment of its own and one that all of its chain share.
    fn write_in(checkpoints: &Checkpoints, chain: u64, number: u64) -> Result<()> {
        let own = checkpoints.write_segment(chain, "own", &arrays(1000 + number))?;
        let shared = checkpoints.write_segment(chain, "shared", &arrays(7))?;
        let head = serde_json::json!({ "batch": number, "loss": 0.1 });
        checkpoints.write(number, chain, &head, &arrays(number), &[own, shared]).map(|_| ())
    }

    /// The same in one chain of all.
    fn write(checkpoints: &Checkpoints, number: u64) -> Result<()> {
        write_in(checkpoints, 1, number)
    }

    fn assert_is(loaded: Option<Loaded>, number: u64) {
        let loaded = loaded.unwrap_or_else(|| panic!("checkpoint {number} is gone"));
        assert_eq!(loaded.number, number);
        assert_eq!(loaded.head, serde_json::json!({ "batch": number, "loss": 0.1 }));
        assert_eq!(loaded.arrays, arrays(number));
        assert_eq!(loaded.segments.len(), 2);
        assert_eq!((&loaded.segments[0].0.name[..], &loaded.segments[0].1), ("own", &arrays(1000 + number)));
        assert_eq!((&loaded.segments[1].0.name[..], &loaded.segments[1].1), ("shared", &arrays(7)));
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_line_of_the_history_that_a_crash_has_cut_short_costs_itself_alone() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        assert!(checkpoints.history::<u64>().unwrap().is_empty());
        (1..=3_u64).for_each(|number| checkpoints.append_history(&number).unwrap());
        let path = dir.path().join(HISTORY);
        let mut text = fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"number\":4,\"ma");
        fs::write(&path, text).unwrap();
        assert_eq!(checkpoints.history::<u64>().unwrap(), [1, 2, 3]);
        assert_eq!(checkpoints.last_of_history::<u64>().unwrap(), None);
        checkpoints.append_history(&5_u64).unwrap();
        assert_eq!(checkpoints.last_of_history::<u64>().unwrap(), Some(5));
        assert_eq!(checkpoints.history::<u64>().unwrap(), [1, 2, 3, 5]);
        // It outlives generations.
        (1..=4).for_each(|number| write(&checkpoints, number).unwrap());
        assert_eq!(checkpoints.history::<u64>().unwrap().len(), 4);
    }

    #[test]
    fn two_generations_stay_with_what_they_need_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        assert!(checkpoints.newest().unwrap().is_none());
        fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        fs::write(dir.path().join("checkpoint-000000000009.safetensors.tmp"), "debris").unwrap();
        (1..=4).for_each(|number| write(&checkpoints, number).unwrap());
        assert_is(checkpoints.newest().unwrap(), 4);
        let names = files(dir.path());
        assert_eq!(names.iter().filter(|name| name.starts_with("checkpoint-")).count(), 4, "{names:?}");
        assert_eq!(names.iter().filter(|name| name.starts_with("segment-")).count(), 3, "{names:?}");
        assert_eq!(names.len(), 4 + 3 + 2, "{names:?}");
        drop(checkpoints);
        assert_is(Checkpoints::open(dir.path()).unwrap().newest().unwrap(), 4);
    }

    #[test]
    fn two_trainers_cannot_share_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let first = Checkpoints::open(dir.path()).unwrap();
        let error = Checkpoints::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(dir.path().to_str().unwrap()) && error.contains("another trainer"), "{error}");
        drop(first);
        Checkpoints::open(dir.path()).unwrap();
    }

    /// A directory with three generations written, of which two are left.
    fn three_generations() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        (1..=3).for_each(|number| write(&checkpoints, number).unwrap());
        dir
    }

    /// A copy of a directory, without the time that syncing costs.
    fn copy(dir: &Path) -> tempfile::TempDir {
        let to = tempfile::tempdir().unwrap();
        for name in files(dir) {
            fs::copy(dir.join(&name), to.path().join(&name)).unwrap();
        }
        to
    }

    /// How often the fault hook is called while generation 4 is written after three others.
    fn calls_of_a_write(template: &Path) -> usize {
        let dir = copy(template);
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        write(&checkpoints, 4).unwrap();
        checkpoints.faults.calls()
    }

    #[test]
    fn any_single_call_may_fail_and_the_next_mark_succeeds() {
        let template = three_generations();
        let calls = calls_of_a_write(template.path());
        assert!(calls > 20, "{calls}");
        for at in 0..calls {
            let dir = copy(template.path());
            let checkpoints = Checkpoints::open(dir.path()).unwrap();
            let before = files(dir.path());
            checkpoints.faults.fail(at..at + 1);
            let written = write(&checkpoints, 4);
            if let Err(e) = &written {
                assert!(matches!(e, Error::Full { .. }), "{e}");
                assert!(e.to_string().contains("disk is full"), "{e}");
                let after = files(dir.path());
                assert!(before.iter().all(|name| after.contains(name)), "call {at} lost one of {before:?}: {after:?}");
                assert!(after.iter().all(|name| !name.ends_with(".tmp")), "call {at} left {after:?}");
            }
            write(&checkpoints, 5).unwrap();
            assert_is(checkpoints.newest().unwrap(), 5);
            assert_eq!(files(dir.path()).len(), 4 + 3 + 1, "call {at}: {:?}", files(dir.path()));
        }
    }

    #[test]
    fn a_crash_at_any_call_loses_at_most_the_generation_being_written() {
        let template = three_generations();
        for at in 0..calls_of_a_write(template.path()) {
            let dir = copy(template.path());
            let checkpoints = Checkpoints::open(dir.path()).unwrap();
            checkpoints.faults.fail(at..usize::MAX);
            let _ = write(&checkpoints, 4);
            drop(checkpoints);
            let checkpoints = Checkpoints::open(dir.path()).unwrap();
            let loaded = checkpoints.newest().unwrap();
            let number = loaded.as_ref().map_or(0, |loaded| loaded.number);
            assert!(number == 3 || number == 4, "call {at}: {number}");
            assert_is(loaded, number);
            write(&checkpoints, 4).unwrap();
            assert_is(checkpoints.newest().unwrap(), 4);
            assert!(files(dir.path()).iter().all(|name| !name.ends_with(".tmp")));
        }
    }

    #[test]
    fn a_damaged_newest_falls_back_and_a_damaged_one_is_never_counted_as_a_generation() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        (1..=2).for_each(|number| write(&checkpoints, number).unwrap());
        fs::remove_file(dir.path().join(payload_name(2))).unwrap();
        assert_is(checkpoints.newest().unwrap(), 1);
        write(&checkpoints, 3).unwrap();
        fs::write(dir.path().join(head_name(3)), b"{}").unwrap();
        assert_is(checkpoints.newest().unwrap(), 1);
        let path = dir.path().join(payload_name(1));
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = checkpoints.newest().unwrap_err().to_string();
        assert!(
            error.contains(&head_name(3)) && error.contains(&payload_name(1)) && error.contains("cut short"),
            "{error}"
        );
        assert!(error.contains("backup"), "{error}");
    }

    #[test]
    fn whichever_file_is_damaged_one_of_the_generations_that_stay_does_not_lean_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        let chains = [(1, 1..=3), (4, 4..=4), (5, 5..=8), (9, 9..=11)];
        for (chain, number) in chains.into_iter().flat_map(|(chain, numbers)| numbers.map(move |n| (chain, n))) {
            write_in(&checkpoints, chain, number).unwrap();
            assert_is(checkpoints.load(number).ok().map(|(loaded, _)| loaded), number);
            let kept: Vec<u64> = checkpoints.numbers().unwrap();
            let expected: &[u64] = match number {
                1 => &[1],
                2 => &[1, 2],
                3 => &[2, 3],
                4 => &[3, 4],
                5 => &[4, 5],
                6 => &[4, 5, 6],
                7 => &[4, 6, 7],
                8 => &[4, 7, 8],
                9 => &[8, 9],
                10 => &[8, 9, 10],
                _ => &[8, 10, 11],
            };
            assert_eq!(kept, expected);
            assert_eq!(checkpoints.has_apart(), chain != 1, "nothing else was ever written");
            if chain == 1 {
                continue;
            }
            for name in files(dir.path()).into_iter().filter(|name| name != LOCK) {
                let path = dir.path().join(&name);
                let good = fs::read(&path).unwrap();
                fs::write(&path, &good[..good.len() / 2]).unwrap();
                let left = kept.iter().rev().find_map(|number| checkpoints.load(*number).ok());
                assert!(left.is_some(), "without {name} nothing of {kept:?} can be read");
                fs::write(&path, good).unwrap();
            }
        }
    }

    #[test]
    fn a_job_that_fell_back_goes_on_in_a_chain_of_its_own_and_keeps_what_it_fell_back_to() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        write_in(&checkpoints, 1, 1).unwrap();
        (2..=4).for_each(|number| write_in(&checkpoints, 2, number).unwrap());
        let shared = checkpoints.write_segment(2, "shared", &arrays(7)).unwrap().file;
        drop(checkpoints);
        fs::write(dir.path().join(shared), b"x").unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        assert_is(checkpoints.newest().unwrap(), 1);
        for number in 2..=4 {
            write_in(&checkpoints, 2, number).unwrap();
            assert_is(checkpoints.load(number).ok().map(|(loaded, _)| loaded), number);
            assert!(checkpoints.numbers().unwrap().contains(&1));
        }
        assert_is(checkpoints.newest().unwrap(), 4);
    }

    #[test]
    fn a_segment_that_was_damaged_is_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        let segment = checkpoints.write_segment(1, "s", &arrays(1)).unwrap();
        fs::write(dir.path().join(&segment.file), b"x").unwrap();
        assert_eq!(checkpoints.write_segment(1, "s", &arrays(1)).unwrap(), segment);
        checkpoints.write(1, 1, &(), &arrays(1), &[segment]).unwrap();
        assert_eq!(checkpoints.newest().unwrap().unwrap().segments[0].1, arrays(1));
    }

    #[test]
    fn one_flipped_byte_in_any_file_of_the_newest_falls_back_to_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::open(dir.path()).unwrap();
        write(&checkpoints, 1).unwrap();
        write(&checkpoints, 2).unwrap();
        let own = checkpoints.write_segment(1, "own", &arrays(1002)).unwrap().file;
        let names = [head_name(2), payload_name(2), own];
        let strategy = (0usize..3, any::<prop::sample::Index>(), 1u8..);
        let outcome = TestRunner::new(Config::with_cases(256)).run(&strategy, |(which, at, mask)| {
            let path = dir.path().join(&names[which]);
            let good = fs::read(&path).unwrap();
            let mut bad = good.clone();
            let at = at.index(bad.len());
            bad[at] ^= mask;
            fs::write(&path, bad).unwrap();
            let loaded = checkpoints.newest();
            fs::write(&path, good).unwrap();
            assert_is(loaded.unwrap(), 1);
            Ok(())
        });
        outcome.unwrap();
        assert_is(checkpoints.newest().unwrap(), 2);
    }
}
