//! The only place that talks to the store: create-only writes, reads, lists, and following a channel.
//!
//! Layout: `objects/<digest>.safetensors`, `manifests/<version>.json`, `channels/<channel>/<number>.json`, numbers with
//! 12 digits. Every write is create-if-absent, which is all that is asked of a store, but for payloads that travel in
//! parts: their name is the digest of their bytes, so whoever overwrites one overwrites it with the same bytes. On a
//! local directory `object_store` writes a staging file `<name>#<n>`, syncs it, hard-links it to its name (fails if
//! taken) and syncs the directory: no torn file ever has a final name, and what a crash leaves behind is not listed.

use std::collections::BTreeMap;
use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use futures::stream::{self, StreamExt};
use object_store::path::Path;
use object_store::{GetOptions, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::address::{self, Limits, Place};
use super::codec::{self, Digest};
use super::manifest::{Document, Entry, ObjectRef, Version};
use super::mapped::{self, Draft};
use super::{Error, Result};
use crate::event::Time;

/// The first pause before a request without an answer is made again, half more or less by chance; it grows fourfold.
const PAUSE: Duration = Duration::from_millis(25);

/// How many entries a follower walks one by one before it lists.
const WALK: u64 = 16;

/// A place for snapshots. Clones share the connection. Its calls need a tokio runtime with time and I/O enabled.
#[derive(Clone, Debug)]
pub struct Store {
    inner: Arc<dyn ObjectStore>,
    url: String,
    /// The directory, for a local store.
    local: Option<PathBuf>,
    limits: Limits,
    /// Bytes a second at which large objects are read.
    pace: Option<u64>,
    /// Create-if-absent is not asked of the store: `unsafe_create=single-writer`.
    single_writer: bool,
    counts: Arc<Counts>,
}

/// What was asked of a store since it was opened, by all clones.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Traffic {
    /// Bytes of objects written, with those of attempts that failed.
    pub written: u64,
    /// Bytes of objects read.
    pub read: u64,
    /// Requests made again because no answer came, on top of those that the client of the store makes by itself.
    pub retries: u64,
}

#[derive(Debug, Default)]
struct Counts {
    written: AtomicU64,
    read: AtomicU64,
    retries: AtomicU64,
}

/// How a create-only write ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Created {
    /// By this call, or by an earlier attempt of it whose answer was lost.
    Ours,
    /// Not at all: the key holds these other bytes.
    Taken(Bytes),
}

/// An object as a list shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Below the prefix.
    pub key: String,
    pub size: u64,
    /// Changes whenever the object is written; where a store gives none, a change is not noticed.
    pub tag: Option<String>,
}

/// How writers fared who raced for the same keys.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Race {
    pub rounds: usize,
    pub writers: usize,
}

impl Store {
    /// Opens a store for reading: a directory that exists, `file://` and its absolute path, or `s3://`, `gs://`, `az://`,
    /// `abfss://` with a bucket and a prefix, and options behind a `?` (`docs/stores.md`). A bucket is not asked yet.
    pub fn open(url: &str) -> Result<Self> {
        Ok(Self::at(url, address::open(url, false)?))
    }

    /// Opens a store for writing: as [`Store::open`], but makes the directory where there is none.
    pub fn create(url: &str) -> Result<Self> {
        Ok(Self::at(url, address::open(url, true)?))
    }

    fn at(url: &str, place: Place) -> Self {
        let Place { inner, local, limits, single_writer } = place;
        Self { inner, url: url.to_owned(), local, limits, pace: None, single_writer, counts: Arc::default() }
    }

    #[cfg(test)]
    pub(super) fn over(inner: Arc<dyn ObjectStore>) -> Self {
        let place = Place { inner, local: None, limits: Limits::default(), single_writer: false };
        Self::at("test", place)
    }

    /// As [`Store::over`], with parts of so many bytes.
    #[cfg(test)]
    pub(super) fn in_parts(self, part: usize) -> Self {
        Self { limits: Limits { part, ..self.limits }, ..self }
    }

    /// The same store, whose large objects are read at no more than so many bytes a second.
    #[must_use]
    pub fn paced(self, bytes_per_second: u64) -> Self {
        Self { pace: Some(bytes_per_second.max(1)), ..self }
    }

    /// Whether this is a directory of this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Whether create-if-absent is not asked of the store, as `unsafe_create=single-writer` in its address says.
    #[must_use]
    pub fn is_single_writer(&self) -> bool {
        self.single_writer
    }

    #[must_use]
    pub fn traffic(&self) -> Traffic {
        let count = |count: &AtomicU64| count.load(Ordering::Relaxed);
        Traffic {
            written: count(&self.counts.written),
            read: count(&self.counts.read),
            retries: count(&self.counts.retries),
        }
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
        let path = Path::from("channels");
        let list = self.attempt(|| self.inner.list_with_delimiter(Some(&path))).await;
        let list = list.map_err(|source| self.refusal("channels/", source))?;
        Ok(list.common_prefixes.iter().filter_map(|path| path.filename().map(str::to_owned)).collect())
    }

    /// The entry of a channel that counts; none if nobody has ever written to it. A list may be older than what was
    /// written last, so its end is not believed: the next number is asked for.
    pub async fn latest(&self, channel: &str) -> Result<Option<Entry>> {
        let listed = self.numbered(&format!("channels/{channel}")).await?.last_key_value().map(|(&number, _)| number);
        let mut newest = match listed {
            None => None,
            Some(number) => self.entry(channel, number).await?,
        };
        while let Some(entry) = self.entry(channel, newest.as_ref().map_or(0, |entry| entry.number) + 1).await? {
            newest = Some(entry);
        }
        Ok(newest)
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

    /// All objects directly below the prefix, whatever they are.
    pub async fn parts(&self) -> Result<Vec<Part>> {
        let list = self.attempt(|| self.inner.list_with_delimiter(None)).await;
        let list = list.map_err(|source| self.refusal("", source))?;
        let part = |meta: ObjectMeta| Part { key: meta.location.to_string(), size: meta.size, tag: meta.e_tag };
        Ok(list.objects.into_iter().map(part).collect())
    }

    /// Bytes of an object that was listed; none if it is gone or was written anew since.
    pub async fn read_part(&self, part: &Part, range: Range<u64>) -> Result<Option<Bytes>> {
        let path = Path::from(part.key.as_str());
        let length = range.end - range.start;
        let get = || async {
            let options =
                GetOptions { range: Some(range.clone().into()), if_match: part.tag.clone(), ..GetOptions::default() };
            self.inner.get_opts(&path, options).await?.bytes().await
        };
        let bytes = match self.attempt(get).await {
            Err(object_store::Error::Precondition { .. }) => return Ok(None),
            answer => self.found(&part.key, answer)?,
        };
        let Some(bytes) = bytes.filter(|bytes| bytes.len() as u64 == length) else { return Ok(None) };
        self.counts.read.fetch_add(length, Ordering::Relaxed);
        Ok(Some(bytes))
    }

    // ------------------------------------------------------------------------------------------------- plain requests

    /// Tries the one thing that the protocol asks of a store: that an object is created only if it is absent, also when
    /// several ask at once. Leaves nothing behind. An error says what the store did instead.
    pub async fn race(&self, rounds: usize, writers: usize) -> Result<Race> {
        for _ in 0..rounds {
            let key = format!("probe/{:016x}", random());
            let outcome = self.race_for(&key, writers).await;
            let gone = self.delete(&key).await;
            outcome?;
            gone?;
        }
        Ok(Race { rounds, writers })
    }

    async fn race_for(&self, key: &str, writers: usize) -> Result<()> {
        let bytes = |writer: usize| Bytes::from(format!("writer {writer} of {key}"));
        let racing = (0..writers).map(|writer| async move { self.create_only(key, &[bytes(writer)]).await });
        let mut outcomes = Vec::new();
        for outcome in futures::future::join_all(racing).await {
            outcomes.push(outcome?);
        }
        // One more, long after the others.
        outcomes.push(self.create_only(key, &[bytes(writers)]).await?);
        let won = outcomes.iter().filter(|outcome| **outcome == Created::Ours).count();
        if won == 1 {
            return Ok(());
        }
        Err(Error::NotCreateOnly {
            url: self.url.clone(),
            reason: format!("of {} writers that created one object, {won} were told that they did", writers + 1),
        })
    }

    /// Writes `pieces` under `key` unless the key is taken. When the answer is "taken", what is there is compared, since
    /// it may be our own write whose answer was lost.
    pub(super) async fn create_only(&self, key: &str, pieces: &[Bytes]) -> Result<Created> {
        let path = Path::from(key);
        let length: usize = pieces.iter().map(Bytes::len).sum();
        let put = |mode: PutMode| {
            let payload: PutPayload = pieces.iter().cloned().collect();
            self.counts.written.fetch_add(length as u64, Ordering::Relaxed);
            self.inner.put_opts(&path, payload, PutOptions::from(mode))
        };
        if self.single_writer {
            if let Some(found) = self.read(key).await? {
                return Ok(if same(&found, pieces) { Created::Ours } else { Created::Taken(found) });
            }
            let put = self.attempt(|| put(PutMode::Overwrite)).await;
            return put.map(|_| Created::Ours).map_err(|source| self.refusal(key, source));
        }
        for _ in 0..self.limits.attempts.max(2) {
            match self.attempt(|| put(PutMode::Create)).await {
                Ok(_) => return Ok(Created::Ours),
                Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. }) => {}
                Err(source) if address::not_offered(&source) => {
                    let reason = format!("it does not offer it: {}", address::chain(&source));
                    return Err(Error::NotCreateOnly { url: self.url.clone(), reason });
                }
                Err(source) => return Err(self.refusal(key, source)),
            }
            if let Some(found) = self.read(key).await? {
                self.settle(key)?;
                return Ok(if same(&found, pieces) { Created::Ours } else { Created::Taken(found) });
            }
            // S3 also says so while another write of the key is under way, which may fail; or it was deleted since.
            tokio::time::sleep(jittered(PAUSE)).await;
        }
        Err(Error::Missing { key: key.to_owned(), named_by: "the store, which said that it exists,".to_owned() })
    }

    /// Writes a payload under the name that its digest gives it. What is too large for one request goes to a bucket in
    /// parts, several at a time, none of them copied. There is no create-only for parts, and no need: the name stands for
    /// the bytes, so one that is there is complete and equal, or has another length.
    pub(super) async fn put_object(&self, key: &str, pieces: &[Bytes]) -> Result<Created> {
        let length: u64 = pieces.iter().map(|piece| piece.len() as u64).sum();
        if self.local.is_some() || length <= self.limits.part as u64 {
            return self.create_only(key, pieces).await;
        }
        let path = Path::from(key);
        for attempt in 1.. {
            match self.size(key).await? {
                Some(found) if found == length => return Ok(Created::Ours),
                Some(_) => return Ok(Created::Taken(Bytes::new())),
                None => {}
            }
            match self.put_parts(&path, pieces).await {
                Ok(()) => return Ok(Created::Ours),
                Err(source) if may_pass(&source) && attempt < self.limits.attempts => {
                    self.counts.retries.fetch_add(1, Ordering::Relaxed);
                    tracing::debug!(error = %source, key, "an upload in parts failed, starting it again");
                    tokio::time::sleep(jittered(PAUSE * 4)).await;
                }
                Err(source) => return Err(self.refusal(key, source)),
            }
        }
        unreachable!("the last attempt returns")
    }

    async fn put_parts(&self, path: &Path, pieces: &[Bytes]) -> object_store::Result<()> {
        let mut upload = self.inner.put_multipart(path).await?;
        let parts = stream::iter(split(pieces, self.limits.part)).map(|part| {
            self.counts.written.fetch_add(part.content_length() as u64, Ordering::Relaxed);
            upload.put_part(part)
        });
        let sent = parts.buffer_unordered(self.limits.parallel).try_collect::<Vec<()>>().await;
        let done = match sent {
            Ok(_) => upload.complete().await.map(|_| ()),
            Err(error) => Err(error),
        };
        if done.is_err() {
            // What cannot be taken back now, the bucket's rule for incomplete uploads takes later.
            let _ = upload.abort().await;
        }
        done
    }

    /// Makes sure that a name which was found on a local disk outlives a power cut: its writer may have died between
    /// linking it and syncing the directory.
    fn settle(&self, key: &str) -> Result<()> {
        let Some(dir) = self.local.as_ref().and_then(|root| root.join(key).parent().map(FsPath::to_owned)) else {
            return Ok(());
        };
        let synced = std::fs::File::open(dir).and_then(|dir| dir.sync_all());
        synced.map_err(|e| self.refusal(key, local_error(e)))
    }

    /// All bytes of a key; none if it is not there.
    pub(super) async fn read(&self, key: &str) -> Result<Option<Bytes>> {
        let path = Path::from(key);
        let get = || async { self.inner.get(&path).await?.bytes().await };
        let bytes = self.found(key, self.attempt(get).await)?;
        if let Some(bytes) = &bytes {
            self.counts.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        }
        Ok(bytes)
    }

    /// As [`Store::read`], for an object that should have `length` bytes: a large one comes from a bucket in parts,
    /// several at a time, or from anywhere one after the other at the pace that is set. One of another length is returned as it is.
    pub(super) async fn read_large(&self, key: &str, length: u64) -> Result<Option<Bytes>> {
        let (part, _) = self.pieces();
        let large = if self.pace.is_some() { length > part } else { self.local.is_none() && length > 2 * part };
        if !large {
            return self.read(key).await;
        }
        match self.size(key).await? {
            Some(size) if size == length => {}
            Some(_) => return self.read(key).await,
            None => return Ok(None),
        }
        let mut whole = BytesMut::with_capacity(usize::try_from(length).expect("checked against the store"));
        let take = |bytes: &Bytes| {
            whole.extend_from_slice(bytes);
            true
        };
        let there = self.in_parts_of(key, length, take).await?;
        Ok(there.then(|| whole.freeze()))
    }

    /// Bytes of a part that is read, and how many are under way at a time.
    fn pieces(&self) -> (u64, usize) {
        match self.pace {
            Some(pace) => ((pace / 20).clamp(1 << 14, 1 << 20), 1),
            None if self.local.is_some() => (1 << 20, 1),
            None => (self.limits.part as u64, self.limits.parallel),
        }
    }

    /// Hands the parts of an object, which has `length` bytes, to `take` in their order and at the pace that is set, until it says
    /// that it wants no more. False if the object is not there.
    async fn in_parts_of(&self, key: &str, length: u64, mut take: impl FnMut(&Bytes) -> bool) -> Result<bool> {
        let (path, (part, parallel)) = (Path::from(key), self.pieces());
        let began = tokio::time::Instant::now();
        let mut parts = stream::iter((0..length).step_by(part as usize))
            .map(|start| {
                let (range, path) = (start..(start + part).min(length), &path);
                self.attempt(move || self.inner.get_range(path, range.clone()))
            })
            .buffered(parallel);
        let mut read = 0;
        while let Some(bytes) = parts.next().await {
            let Some(bytes) = self.found(key, bytes)? else { return Ok(false) };
            self.counts.read.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            read += bytes.len();
            if !take(&bytes) {
                break;
            }
            if let Some(pace) = self.pace {
                tokio::time::sleep_until(began + Duration::from_secs_f64(read as f64 / pace as f64)).await;
            }
        }
        Ok(true)
    }

    // ----------------------------------------------------------------------------------------------------- mapped files

    /// Whether both are one directory of this machine.
    #[must_use]
    pub fn is_same_directory(&self, other: &Self) -> bool {
        self.local.is_some() && self.local == other.local
    }

    /// A file for a payload in this cache, a directory of this machine.
    pub(super) fn draft(&self, object: &ObjectRef) -> std::io::Result<Draft> {
        match &self.local {
            Some(root) => Draft::named(root.join(&object.name)),
            None => Err(std::io::Error::other("only a directory of this machine holds files to map")),
        }
    }

    /// Copies a payload to a file of this machine, part by part, and maps it: it is finished only if its bytes are those that the
    /// name of the payload says. Files are written on the thread that asks.
    pub(super) async fn copy(&self, object: &ObjectRef, to: std::io::Result<Draft>) -> Result<Copied> {
        let key = object.name.as_str();
        match self.size(key).await? {
            None => return Ok(Copied::Absent),
            Some(size) if size == object.length => {}
            Some(length) => return Err(not_published(key, codec::Error::Length { expected: object.length, length })),
        }
        let (mut draft, mut failure) = match to {
            Ok(draft) => (draft, None),
            Err(error) => return Ok(Copied::Failed(error)),
        };
        let take = |part: &Bytes| {
            failure = draft.write(part).err();
            failure.is_none()
        };
        if !self.in_parts_of(key, object.length, take).await? {
            return Ok(Copied::Absent);
        }
        if let Some(error) = failure {
            return Ok(Copied::Failed(error));
        }
        if draft.digest() != object.digest {
            let (expected, found) = (object.digest, draft.digest());
            return Err(not_published(key, codec::Error::Digest { expected, found }));
        }
        Ok(draft.finish().map_or_else(Copied::Failed, Copied::Whole))
    }

    /// The bytes of a payload of a directory of this machine, mapped from its file and checked. None if it is not there.
    pub(super) fn map(&self, object: &ObjectRef) -> Result<Option<Bytes>> {
        let Some(root) = &self.local else { return Ok(None) };
        let mapped = mapped::map(&root.join(&object.name));
        let mapped = mapped.map_err(|error| self.refusal(&object.name, local_error(error)))?;
        if let Some(bytes) = &mapped {
            object.digest.check(object.length, bytes).map_err(|source| not_published(&object.name, source))?;
        }
        Ok(mapped)
    }

    pub(super) async fn exists(&self, key: &str) -> Result<bool> {
        Ok(self.size(key).await?.is_some())
    }

    /// Length of an object; none if it is not there.
    async fn size(&self, key: &str) -> Result<Option<u64>> {
        let path = Path::from(key);
        let head = self.found(key, self.attempt(|| self.inner.head(&path)).await)?;
        Ok(head.map(|meta| meta.size))
    }

    /// Turns "not found" into nothing, unless it is the bucket that is not there.
    fn found<T>(&self, key: &str, answer: object_store::Result<T>) -> Result<Option<T>> {
        match answer {
            Ok(found) => Ok(Some(found)),
            Err(error @ object_store::Error::NotFound { .. }) if !address::no_bucket(&error) => Ok(None),
            Err(source) => Err(self.refusal(key, source)),
        }
    }

    /// Deletes a key; it is fine if it is gone already.
    pub(super) async fn delete(&self, key: &str) -> Result<()> {
        let path = Path::from(key);
        self.found(key, self.attempt(|| self.inner.delete(&path)).await).map(|_| ())
    }

    /// Keys directly under a folder, with the time they were written.
    pub(super) async fn list(&self, folder: &str) -> Result<BTreeMap<String, Time>> {
        let path = Path::from(folder);
        let list = self.attempt(|| self.inner.list(Some(&path)).try_collect::<Vec<_>>()).await;
        let list = list.map_err(|source| self.refusal(folder, source))?;
        let direct = list.into_iter().filter(|meta| meta.location.parts().count() == path.parts().count() + 1);
        Ok(direct.map(|meta| (meta.location.to_string(), Time(meta.last_modified.timestamp_millis()))).collect())
    }

    /// Makes a request again after a failure that may pass.
    async fn attempt<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        mut request: impl FnMut() -> F,
    ) -> object_store::Result<T> {
        let mut pause = PAUSE;
        for _ in 1..self.limits.attempts {
            match request().await {
                Err(e) if may_pass(&e) => tracing::debug!(error = %e, "store did not answer, asking again"),
                done => return done,
            }
            self.counts.retries.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(jittered(pause)).await;
            pause *= 4;
        }
        request().await
    }

    pub(super) fn refusal(&self, key: &str, source: object_store::Error) -> Error {
        let key = key.to_owned();
        if is_full(&source) {
            return Error::Full { key, source: source.into() };
        }
        match address::advice(&source).filter(|_| self.local.is_none()) {
            Some(advice) => Error::Refused { key, url: self.url.clone(), advice, source: source.into() },
            None => Error::Unavailable { key, source: source.into() },
        }
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

    /// Deletes staging files of all ages, of a store that nobody else writes to.
    pub(super) async fn sweep_all(&self) -> Result<()> {
        for key in self.staged(crate::clock::now())? {
            self.clear(&key).await?;
        }
        Ok(())
    }

    /// Staging files of a local store that a crash left behind, last written before `before`. Other stores have none.
    pub(super) fn staged(&self, before: Time) -> Result<Vec<String>> {
        let Some(root) = &self.local else { return Ok(Vec::new()) };
        let mut folders = vec!["objects".to_owned(), "manifests".to_owned(), "probe".to_owned()];
        if let Ok(channels) = std::fs::read_dir(root.join("channels")) {
            let names = channels.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
            folders.extend(names.map(|name| format!("channels/{name}")));
        }
        let mut staged = Vec::new();
        for folder in folders {
            let Ok(files) = std::fs::read_dir(root.join(&folder)) else { continue };
            for file in files {
                let file = file.map_err(|e| self.refusal(&folder, local_error(e)))?;
                let Ok(name) = file.file_name().into_string() else { continue };
                let suffix = name.rsplit_once('#').map_or("", |(_, suffix)| suffix);
                let is_staged = !suffix.is_empty() && suffix.bytes().all(|b| b.is_ascii_digit());
                // A file that vanishes meanwhile was finished by its writer.
                let Ok(written) = file.metadata().and_then(|meta| meta.modified()) else { continue };
                let written = written.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_millis() as i64);
                if is_staged && Time(written) < before {
                    staged.push(format!("{folder}/{name}"));
                }
            }
        }
        Ok(staged)
    }

    /// Deletes debris: also a file that is no object.
    pub(super) async fn clear(&self, key: &str) -> Result<()> {
        match &self.local {
            None => self.delete(key).await,
            Some(root) => match std::fs::remove_file(root.join(key)) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(self.refusal(key, local_error(e))),
                _ => Ok(()),
            },
        }
    }
}

/// How copying a payload ended.
#[derive(Debug)]
pub(super) enum Copied {
    /// With its bytes, mapped.
    Whole(Bytes),
    /// The store does not have it.
    Absent,
    /// The file cannot be written.
    Failed(std::io::Error),
}

pub(super) fn not_published(key: &str, source: codec::Error) -> Error {
    Error::Corrupt { key: key.to_owned(), reason: "bytes are not those that were published", source }
}

fn local_error(error: std::io::Error) -> object_store::Error {
    object_store::Error::Generic { store: "LocalFileSystem", source: error.into() }
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

pub(super) fn document<D: Document>(key: &str, bytes: &[u8]) -> Result<D> {
    D::from_bytes(bytes).map_err(|source| Error::Corrupt {
        key: key.to_owned(),
        reason: "bytes are not those that were written; move the object away to go on without it",
        source,
    })
}

/// A number that hardly comes twice. Nothing that is learned or written depends on it, but for names of probes.
pub(super) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.write_i64(crate::clock::now().0);
    hasher.finish()
}

/// A pause, half more or less by chance, so that writers and nodes do not come back all at once.
fn jittered(pause: Duration) -> Duration {
    pause.mul_f64(0.5 + (random() >> 11) as f64 / (1_u64 << 53) as f64)
}

/// Whether `pieces` one behind the other are `found`.
fn same(found: &[u8], pieces: &[Bytes]) -> bool {
    let length: usize = pieces.iter().map(Bytes::len).sum();
    let mut rest = found;
    length == found.len()
        && pieces.iter().all(|piece| {
            let (start, end) = rest.split_at(piece.len());
            rest = end;
            start == piece
        })
}

/// Cuts `pieces` into payloads of `part` bytes each, the last one shorter. They share the bytes.
fn split(pieces: &[Bytes], part: usize) -> Vec<PutPayload> {
    let mut parts = Vec::new();
    let mut open: Vec<Bytes> = Vec::new();
    let mut room = part;
    for piece in pieces {
        let mut rest = piece.clone();
        while !rest.is_empty() {
            let taken = rest.split_to(room.min(rest.len()));
            room -= taken.len();
            open.push(taken);
            if room == 0 {
                parts.push(open.drain(..).collect());
                room = part;
            }
        }
    }
    if !open.is_empty() {
        parts.push(open.into_iter().collect());
    }
    parts
}

fn may_pass(error: &object_store::Error) -> bool {
    use object_store::Error as E;
    matches!(error, E::Generic { .. } | E::JoinError { .. }) && !is_full(error) && address::advice(error).is_none()
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
