//! Objects of a store as partitions of bounded input: listed by their address, read where they are.
//!
//! Nothing is copied to a disk. A partition holds windows onto its object: one for each place from which it is read on (one for
//! lines, one a column for Parquet), each small until it is read on in sequence, and then twice as large each time, with the
//! next one under way. So an object that is not yet needed costs its first bytes only.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

use crate::snapshot::store::Part;
use crate::snapshot::{self, Store, chain};
use crate::source;
use crate::source::blob::{Object, Unfetched};
use crate::source::file::matches;

/// First and largest size of a window, in bytes.
const SMALL: u64 = 64 << 10;
const LARGE: u64 = 2 << 20;
/// Windows of a partition; those that were used longest ago go.
const WINDOWS: usize = 64;

/// Objects that an address names.
pub type Found = Vec<(PathBuf, Arc<dyn Object>)>;

/// Lists the objects that `pattern` names, such as `s3://bucket/logs/impressions-*.jsonl.zst?region=eu-west-1`: `*` and `?` (written
/// `%3F`) work behind the last `/`. Each has the name of its address without options. Sorted; none is an error.
pub fn find(pattern: &str) -> Result<Found, source::Error> {
    let refuse = |why: String| source::Error::Store { pattern: pattern.to_owned(), why };
    let (bare, query) = pattern.split_once('?').map_or((pattern, ""), |(bare, query)| (bare, query));
    let (folder, last) = bare.rsplit_once('/').unwrap_or((bare, ""));
    let last = last.replace("%3F", "?");
    if last.is_empty() || folder.ends_with(":/") {
        return Err(refuse("name objects below a bucket, as in `s3://bucket/logs/impressions-*.jsonl`".into()));
    }
    if folder.contains('*') {
        return Err(refuse("`*` works behind the last `/` only".into()));
    }
    let url = if query.is_empty() { folder.to_owned() } else { format!("{folder}?{query}") };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(1).thread_name("objects").enable_all().build();
    let runtime = Arc::new(runtime.map_err(|error| refuse(error.to_string()))?);
    let store = Store::open(&url).map_err(|error| match error {
        snapshot::Error::Address { reason, .. } => refuse(reason),
        error => refuse(chain(&error)),
    })?;
    let parts = runtime.block_on(store.parts()).map_err(|error| refuse(chain(&error)))?;
    let mut found: Found = Vec::new();
    for part in parts.into_iter().filter(|part| matches(last.as_bytes(), part.key.as_bytes())) {
        let name = PathBuf::from(format!("{folder}/{}", part.key));
        let fetch = Fetch { store: store.clone(), part, runtime: Arc::clone(&runtime) };
        found.push((name, Arc::new(Remote { fetch, windows: Mutex::default() })));
    }
    if found.is_empty() {
        return Err(refuse("there is no object of that name; a pattern may hold `*` behind its last `/`".into()));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    Ok(found)
}

/// One object, and how it is fetched.
#[derive(Clone)]
struct Fetch {
    store: Store,
    part: Part,
    runtime: Arc<Runtime>,
}

impl Fetch {
    fn start(&self, from: u64, length: u64) -> JoinHandle<Result<Bytes, String>> {
        let (store, part) = (self.store.clone(), self.part.clone());
        let range = from..(from + length).min(part.size);
        self.runtime.spawn(async move {
            match store.read_part(&part, range).await {
                Ok(Some(bytes)) => Ok(bytes),
                Ok(None) => Err("the object is gone, or is another one than it was when it was listed".to_owned()),
                Err(error) => Err(chain(&error)),
            }
        })
    }

    fn wait(&self, fetched: JoinHandle<Result<Bytes, String>>) -> io::Result<Bytes> {
        let fetched = self.runtime.block_on(fetched);
        Ok(fetched.map_err(|error| Unfetched(error.to_string()))?.map_err(Unfetched)?)
    }
}

/// An object that is read through windows.
struct Remote {
    fetch: Fetch,
    windows: Mutex<Windows>,
}

#[derive(Default)]
struct Windows {
    open: Vec<Window>,
    /// Counts reads, to know which was used when.
    reads: u64,
}

struct Window {
    start: u64,
    bytes: Bytes,
    /// What follows, and of which size it is to be.
    ahead: Option<JoinHandle<Result<Bytes, String>>>,
    next: u64,
    used: u64,
}

impl Window {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl Object for Remote {
    fn length(&self) -> u64 {
        self.fetch.part.size
    }

    fn read_at(&self, into: &mut [u8], offset: u64) -> io::Result<usize> {
        let size = self.length();
        if offset >= size || into.is_empty() {
            return Ok(0);
        }
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        windows.reads += 1;
        let now = windows.reads;
        let at = match windows.open.iter().position(|window| (window.start..window.end()).contains(&offset)) {
            Some(at) => at,
            None => {
                let wanted = into.len() as u64;
                match windows.open.iter().position(|window| window.end() == offset) {
                    Some(at) => {
                        let window = &mut windows.open[at];
                        let length = window.next.max(wanted);
                        let ahead = window.ahead.take();
                        let bytes = self.fetch.wait(ahead.unwrap_or_else(|| self.fetch.start(offset, length)))?;
                        (window.start, window.bytes) = (offset, bytes);
                        window.next = (2 * window.next).min(LARGE);
                        if window.end() < size {
                            window.ahead = Some(self.fetch.start(window.end(), window.next));
                        }
                        at
                    }
                    None => {
                        let bytes = self.fetch.wait(self.fetch.start(offset, SMALL.max(wanted)))?;
                        if windows.open.len() == WINDOWS {
                            let oldest = (0..WINDOWS).min_by_key(|&at| windows.open[at].used).unwrap_or(0);
                            windows.open.swap_remove(oldest);
                        }
                        windows.open.push(Window { start: offset, bytes, ahead: None, next: 2 * SMALL, used: now });
                        windows.open.len() - 1
                    }
                }
            }
        };
        let window = &mut windows.open[at];
        window.used = now;
        let bytes = &window.bytes[(offset - window.start) as usize..];
        let length = bytes.len().min(into.len());
        into[..length].copy_from_slice(&bytes[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rand_pcg::Pcg64Mcg;
    use rand_pcg::rand_core::{Rng as _, SeedableRng as _};

    use super::*;

    fn only(dir: &Path, pattern: &str) -> Arc<dyn Object> {
        let found = find(&format!("file://{}/{pattern}", dir.display())).map_err(|error| error.to_string()).unwrap();
        assert_eq!(found.len(), 1);
        Arc::clone(&found[0].1)
    }

    #[test]
    fn an_object_is_read_as_a_file_is_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut chance = Pcg64Mcg::seed_from_u64(3);
        let content: Vec<u8> = (0..9_000_001).map(|_| chance.next_u64() as u8).collect();
        std::fs::write(dir.path().join("a.bin"), &content).unwrap();
        let object = only(dir.path(), "a.*");
        assert_eq!(object.length(), content.len() as u64);
        // Several places, each read on in pieces: more of them than there are windows.
        let mut places: Vec<usize> = (0..WINDOWS + 9).map(|_| chance.next_u64() as usize % content.len()).collect();
        places[0] = 0;
        let mut buffer = vec![0; 3 << 20];
        for round in 0..3000 {
            let place = if round < 2000 { 0 } else { chance.next_u64() as usize % places.len() };
            let wanted = if round % 50 == 0 { buffer.len() } else { 1 + chance.next_u64() as usize % 20_000 };
            let at = places[place];
            let read = object.read_at(&mut buffer[..wanted], at as u64).unwrap();
            assert_eq!(read == 0, at == content.len());
            assert!(buffer[..read] == content[at..at + read]);
            places[place] += read;
        }
        assert_eq!(places[0], content.len(), "it was read to its end");
    }

    #[test]
    fn an_object_that_was_written_anew_after_it_was_listed_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a"), vec![1; 200_000]).unwrap();
        let object = only(dir.path(), "a");
        let mut buffer = [0; 10];
        object.read_at(&mut buffer, 0).unwrap();
        std::fs::write(dir.path().join("b"), vec![2; 200_000]).unwrap();
        std::fs::rename(dir.path().join("b"), dir.path().join("a")).unwrap();
        let error = object.read_at(&mut buffer, 150_000).unwrap_err();
        assert!(error.to_string().contains("is another one than it was when it was listed"), "{error}");
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert!(object.read_at(&mut buffer, 100_000).unwrap_err().to_string().contains("is gone"));
    }

    #[test]
    fn an_address_that_names_nothing_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let said = |pattern: &str| find(pattern).map(|_| ()).unwrap_err().to_string();
        assert!(said(&format!("file://{}/x-*", dir.path().display())).contains("there is no object of that name"));
        assert!(said("s3://bucket").contains("name objects below a bucket"));
        assert!(said("s3://bucket/*/x").contains("behind the last `/` only"));
        assert!(said("ftp://host/x").contains("`ftp://` is not known"));
    }
}
