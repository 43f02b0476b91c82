//! The only place that talks to the store: create-only writes, reads, lists, and following a channel.
//!
//! Layout: `objects/<digest>.safetensors`, `manifests/<version>.json`, `channels/<channel>/<number>.json`, numbers with
//! 12 digits. Every write is create-if-absent, which is all that is asked of a store. On a local directory
//! `object_store` writes a staging file `<name>#<n>`, syncs it, hard-links it to its name (fails if taken) and syncs the
//! directory: no torn file ever has a final name, and what a crash leaves behind is not listed.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::codec::Digest;
use super::manifest::{Document, Entry, Version};
use super::{Error, Result};
use crate::event::Time;

/// How often a request without an answer is made again, and the first pause, which grows fourfold.
const ATTEMPTS: u32 = 3;
const PAUSE: Duration = Duration::from_millis(25);

/// How many entries a follower walks one by one before it lists.
const WALK: u64 = 16;

/// A place for snapshots. Clones share the connection. Its calls need a tokio runtime with time enabled.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    url: String,
    /// The directory, for a local store.
    local: Option<PathBuf>,
}

/// How a create-only write ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Created {
    /// By this call, or by an earlier attempt of it whose answer was lost.
    Ours,
    /// Not at all: the key holds these other bytes.
    Taken(Bytes),
}

impl Store {
    /// Opens a store for reading: a path, or `file://` and an absolute path, of a directory that exists.
    pub fn open(url: &str) -> Result<Self> {
        let dir = directory(url)?;
        if !dir.is_dir() {
            let reason = "there is no such directory; is the name right, and has a trainer published there".to_owned();
            return Err(Error::Address { url: url.to_owned(), reason });
        }
        Self::at(url, dir)
    }

    /// Opens a store for writing: as [`Store::open`], but makes the directory where there is none.
    pub fn create(url: &str) -> Result<Self> {
        let dir = directory(url)?;
        std::fs::create_dir_all(&dir)
            .map_err(|e| Error::Address { url: url.to_owned(), reason: format!("cannot make the directory: {e}") })?;
        Self::at(url, dir)
    }

    fn at(url: &str, dir: PathBuf) -> Result<Self> {
        let reason = |e: &dyn std::fmt::Display| Error::Address { url: url.to_owned(), reason: e.to_string() };
        let dir = dir.canonicalize().map_err(|e| reason(&e))?;
        let inner =
            object_store::local::LocalFileSystem::new_with_prefix(&dir).map_err(|e| reason(&e))?.with_fsync(true);
        Ok(Self { inner: Arc::new(inner), url: url.to_owned(), local: Some(dir) })
    }

    #[cfg(test)]
    pub(super) fn over(inner: Arc<dyn ObjectStore>) -> Self {
        Self { inner, url: "test".to_owned(), local: None }
    }

    /// As it was given to [`Store::open`].
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    // ------------------------------------------------------------------------------------------------- what is there

    /// Every version that has a manifest, ascending, with the time it was written.
    pub async fn versions(&self) -> Result<BTreeMap<Version, Time>> {
        let list = self.numbered("manifests").await?;
        Ok(list.into_iter().map(|(number, written)| (Version(number), written)).collect())
    }

    /// Names of all channels, ascending.
    pub async fn channels(&self) -> Result<Vec<String>> {
        let list = self.inner.list_with_delimiter(Some(&Path::from("channels"))).await;
        let list = list.map_err(|source| refusal("channels/", source))?;
        Ok(list.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect())
    }

    /// The entry of a channel that counts; none if nobody has ever written to it.
    pub async fn latest(&self, channel: &str) -> Result<Option<Entry>> {
        match self.numbered(&format!("channels/{channel}")).await?.last_key_value() {
            None => Ok(None),
            Some((&number, _)) => self.entry(channel, number).await,
        }
    }

    /// One entry of a channel; none if there is no such number.
    pub async fn entry(&self, channel: &str, number: u64) -> Result<Option<Entry>> {
        let key = entry_key(channel, number);
        let Some(bytes) = self.read(&key).await? else { return Ok(None) };
        let entry: Entry = document(&key, &bytes)?;
        if entry.number == number && entry.channel == channel {
            Ok(Some(entry))
        } else {
            let reason = format!("is entry {} of channel `{}`, which is not its place", entry.number, entry.channel);
            Err(Error::Content { key, reason })
        }
    }

    // ------------------------------------------------------------------------------------------------- plain requests

    /// Tries the one thing that the protocol asks of a store: that an object is created only if it is absent. Leaves
    /// nothing behind.
    pub async fn probe(&self) -> Result<()> {
        let key = format!("probe/{:016x}", crate::clock::now().0 ^ i64::from(std::process::id()) << 32);
        let first = self.create_only(&key, &[Bytes::from_static(b"first")]).await?;
        let second = self.create_only(&key, &[Bytes::from_static(b"second")]).await;
        self.inner.delete(&Path::from(key.as_str())).await.map_err(|source| refusal(&key, source))?;
        match (first, second?) {
            (Created::Ours, Created::Taken(found)) if found == b"first"[..] => Ok(()),
            _ => Err(Error::Unfit(format!("`{}` let a second writer replace an object that was there", self.url))),
        }
    }

    /// Writes `pieces` under `key` unless the key is taken. When the answer is "taken", what is there is compared, since
    /// it may be our own write whose answer was lost.
    pub(super) async fn create_only(&self, key: &str, pieces: &[Bytes]) -> Result<Created> {
        let path = Path::from(key);
        let put = || {
            let payload: PutPayload = pieces.iter().cloned().collect();
            self.inner.put_opts(&path, payload, PutOptions::from(PutMode::Create))
        };
        match attempt(put).await {
            Ok(_) => return Ok(Created::Ours),
            Err(object_store::Error::AlreadyExists { .. }) => {}
            Err(source) => return Err(refusal(key, source)),
        }
        let Some(found) = self.read(key).await? else {
            return Err(Error::Missing {
                key: key.to_owned(),
                named_by: "the store, which said that it exists,".to_owned(),
            });
        };
        self.settle(key)?;
        let length: usize = pieces.iter().map(Bytes::len).sum();
        let mut rest = &found[..];
        let same = length == found.len()
            && pieces.iter().all(|piece| {
                let (start, end) = rest.split_at(piece.len());
                rest = end;
                start == piece
            });
        Ok(if same { Created::Ours } else { Created::Taken(found) })
    }

    /// Makes sure that a name which was found on a local disk outlives a power cut: its writer may have died between
    /// linking it and syncing the directory.
    fn settle(&self, key: &str) -> Result<()> {
        let Some(dir) = self.local.as_ref().and_then(|root| root.join(key).parent().map(FsPath::to_owned)) else {
            return Ok(());
        };
        let synced = std::fs::File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| refusal(key, object_store::Error::Generic { store: "LocalFileSystem", source: e.into() }))
    }

    /// All bytes of a key; none if it is not there.
    pub(super) async fn read(&self, key: &str) -> Result<Option<Bytes>> {
        let path = Path::from(key);
        let get = || async { self.inner.get(&path).await?.bytes().await };
        match attempt(get).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(source) => Err(refusal(key, source)),
        }
    }

    pub(super) async fn exists(&self, key: &str) -> Result<bool> {
        let path = Path::from(key);
        match attempt(|| self.inner.head(&path)).await {
            Ok(_) => Ok(true),
            Err(object_store::Error::NotFound { .. }) => Ok(false),
            Err(source) => Err(refusal(key, source)),
        }
    }

    /// Deletes a key; it is fine if it is gone already.
    pub(super) async fn delete(&self, key: &str) -> Result<()> {
        let path = Path::from(key);
        match attempt(|| self.inner.delete(&path)).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(source) => Err(refusal(key, source)),
        }
    }

    /// Keys directly under a folder, with the time they were written.
    pub(super) async fn list(&self, folder: &str) -> Result<BTreeMap<String, Time>> {
        let path = Path::from(folder);
        let list = attempt(|| self.inner.list(Some(&path)).try_collect::<Vec<_>>()).await;
        let list = list.map_err(|source| refusal(folder, source))?;
        let direct = list.into_iter().filter(|meta| meta.location.parts().count() == path.parts().count() + 1);
        Ok(direct.map(|meta| (meta.location.to_string(), Time(meta.last_modified.timestamp_millis()))).collect())
    }

    /// Numbers of the documents of a folder. Files with other names are not ours and are left alone.
    async fn numbered(&self, folder: &str) -> Result<BTreeMap<u64, Time>> {
        let mut numbers = BTreeMap::new();
        for (key, written) in self.list(folder).await? {
            match number(&key) {
                Some(number) => _ = numbers.insert(number, written),
                None => tracing::warn!(key, "not a name that tidemill gives; ignored"),
            }
        }
        Ok(numbers)
    }

    /// Staging files of all ages, for a store that nobody else writes to.
    pub(super) fn sweep_all(&self) -> Result<usize> {
        self.sweep(crate::clock::now()).map_err(|e| {
            refusal("staging files", object_store::Error::Generic { store: "LocalFileSystem", source: e.into() })
        })
    }

    /// Staging files of a local store that a crash left behind, last written before `before`. Deletes them and returns
    /// how many they were. Other stores have none.
    pub(super) fn sweep(&self, before: Time) -> std::io::Result<usize> {
        let Some(root) = &self.local else { return Ok(0) };
        let mut folders = vec![root.join("objects"), root.join("manifests")];
        if let Ok(channels) = std::fs::read_dir(root.join("channels")) {
            folders.extend(channels.filter_map(|entry| entry.ok().map(|entry| entry.path())));
        }
        let mut swept = 0;
        for file in folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten() {
            let file = file?;
            let name = file.file_name();
            let suffix = name.to_str().and_then(|name| name.rsplit_once('#')).map_or("", |(_, suffix)| suffix);
            let staged = !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit());
            // A file that vanishes meanwhile was finished by its writer.
            let Ok(written) = file.metadata().and_then(|meta| meta.modified()) else { continue };
            let written = written.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
            if staged && Time(written) < before {
                std::fs::remove_file(file.path())?;
                swept += 1;
            }
        }
        Ok(swept)
    }
}

/// Follows a channel: lists at the start, then asks for the next number.
#[derive(Debug)]
pub struct Follower {
    store: Store,
    channel: String,
    last: Option<Entry>,
}

impl Follower {
    #[must_use]
    pub fn new(store: Store, channel: impl Into<String>) -> Self {
        Self { store, channel: channel.into(), last: None }
    }

    /// Whether the entry that counted at the last call is still there. Entries are never deleted, so if it is not, the
    /// store is away, emptied or another one; [`Follower::poll`] alone sees only that there is nothing new.
    pub async fn still_there(&self) -> Result<bool> {
        match &self.last {
            None => Ok(true),
            Some(last) => Ok(self.store.entry(&self.channel, last.number).await?.as_ref() == Some(last)),
        }
    }

    /// What the channel named at the last call.
    #[must_use]
    pub fn named(&self) -> Option<Version> {
        self.last.as_ref().and_then(|entry| entry.version)
    }

    /// Returns what the channel names, if that is another version than at the call before; else nothing. Versions
    /// between are passed over. After an error nothing has changed and the call may be repeated.
    pub async fn poll(&mut self) -> Result<Option<Version>> {
        let before = self.last.as_ref().and_then(|entry| entry.version);
        let mut newest = match &self.last {
            None => self.store.latest(&self.channel).await?,
            Some(entry) => Some(entry.clone()),
        };
        let start = newest.as_ref().map_or(0, |entry| entry.number);
        while let Some(number) = newest.as_ref().map(|entry| entry.number) {
            if number - start >= WALK {
                newest = self.store.latest(&self.channel).await?;
                break;
            }
            match self.store.entry(&self.channel, number + 1).await? {
                None => break,
                found => newest = found,
            }
        }
        self.last = newest;
        Ok(self.last.as_ref().and_then(|entry| entry.version).filter(|version| Some(*version) != before))
    }
}

// ------------------------------------------------------------------------------------------------------------- keys

#[must_use]
pub fn object_key(digest: Digest) -> String {
    format!("objects/{digest}.safetensors")
}

#[must_use]
pub fn manifest_key(version: Version) -> String {
    format!("manifests/{:012}.json", version.0)
}

#[must_use]
pub fn entry_key(channel: &str, number: u64) -> String {
    format!("channels/{channel}/{number:012}.json")
}

/// The number in the last part of a key, if it is written the way we write it.
fn number(key: &str) -> Option<u64> {
    let digits = key.rsplit('/').next()?.strip_suffix(".json")?;
    let number = digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok())??;
    (format!("{number:012}") == digits).then_some(number)
}

fn directory(url: &str) -> Result<PathBuf> {
    let refuse = |reason: String| Err(Error::Address { url: url.to_owned(), reason });
    match url.split_once("://") {
        None if url.is_empty() => refuse("give a directory".to_owned()),
        None => Ok(PathBuf::from(url)),
        Some(("file", path)) if path.starts_with('/') => Ok(PathBuf::from(path)),
        Some(("file", _)) => refuse("after `file://` comes an absolute path, `file:///srv/snapshots`".to_owned()),
        Some((scheme, _)) => {
            refuse(format!("`{scheme}` comes with object stores; this version knows a directory or `file://`"))
        }
    }
}

pub(super) fn document<D: Document>(key: &str, bytes: &[u8]) -> Result<D> {
    D::from_bytes(bytes).map_err(|source| Error::Corrupt {
        key: key.to_owned(),
        reason: "bytes are not those that were written; move the object away to go on without it",
        source,
    })
}

/// Makes a request again after a failure that may pass.
async fn attempt<T, F: Future<Output = object_store::Result<T>>>(
    mut request: impl FnMut() -> F,
) -> object_store::Result<T> {
    let mut pause = PAUSE;
    for _ in 1..ATTEMPTS {
        match request().await {
            Err(e) if may_pass(&e) => tracing::debug!(error = %e, "store did not answer, asking again"),
            done => return done,
        }
        tokio::time::sleep(pause).await;
        pause *= 4;
    }
    request().await
}

fn may_pass(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    matches!(error, E::Generic { .. } | E::JoinError { .. }) && !is_full(error)
}

fn is_full(error: &object_store::Error) -> bool {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = source {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            return matches!(io.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        }
        source = error.source();
    }
    false
}

fn refusal(key: &str, source: object_store::Error) -> Error {
    let key = key.to_owned();
    if is_full(&source) { Error::Full { key, source } } else { Error::Unavailable { key, source } }
}
