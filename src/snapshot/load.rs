//! Reading versions: a full, or the chain of deltas that a version is; every link, byte and golden vector checked.

use bytes::Bytes;

use super::address::chain;
use super::codec::{Arrays, Digest};
use super::delta::Delta;
use super::manifest::{DELTA_FORMAT, Document, Kind, Link, Manifest, ObjectRef, PAYLOAD_FORMAT, Version};
use super::mapped::Draft;
use super::store::{Copied, Created, Store, document, manifest_key, not_published, object_key};
use super::weights::{self, Weights};
use super::{Error, Result};
use crate::event::Slot;
use crate::model::tower::Pair;

/// A version that was loaded and passed every check.
#[derive(Clone, PartialEq, Debug)]
pub struct Snapshot {
    pub manifest: Manifest,
    pub weights: Weights,
    digest: Digest,
    /// Its columns lie in a mapped file.
    mapped: bool,
}

impl Snapshot {
    /// What a trainer would load of weights that it published under this manifest. Nothing is checked.
    #[must_use]
    pub fn new(manifest: Manifest, weights: Weights) -> Self {
        let digest = manifest.to_bytes().map(|bytes| Digest::of(&bytes)).unwrap_or(Digest(0));
        Self { manifest, weights, digest, mapped: false }
    }

    /// Whether its columns lie in a mapped file, not in memory.
    #[must_use]
    pub fn is_mapped(&self) -> bool {
        self.mapped
    }

    /// Of the bytes of its manifest: a delta names it by that.
    #[must_use]
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Logit of an encoded example; see [`Weights::logit`].
    #[must_use]
    pub fn logit(&self, slots: &[Slot]) -> f32 {
        self.weights.logit(slots)
    }

    /// Checks that another scorer of these weights reproduces the golden vectors.
    pub fn prove(&self, score: impl FnMut(&[Slot]) -> f32) -> Result<()> {
        prove(&self.manifest, self.weights.default_rows().len(), score)
    }
}

/// Checks that a scorer of `features` features reproduces the golden vectors of a manifest.
pub fn prove(manifest: &Manifest, features: usize, score: impl FnMut(&[Slot]) -> f32) -> Result<()> {
    weights::prove(&manifest.golden, features, score)
        .map_err(|reason| Error::Content { key: manifest_key(manifest.version), reason })
}

/// A manifest as it stands in the store, verified.
#[derive(Clone, Debug)]
pub struct Sealed {
    pub manifest: Manifest,
    /// Of its bytes.
    pub digest: Digest,
    bytes: Bytes,
}

/// What must be read for a version, oldest first. Never empty.
#[derive(Clone, Debug)]
pub struct Chain {
    links: Vec<Sealed>,
    /// The first link changes the version that the reader holds; else it is a full.
    pub from_held: bool,
}

impl Chain {
    /// The manifest of the version itself.
    #[must_use]
    pub fn last(&self) -> &Sealed {
        self.links.last().expect("a chain has a link")
    }

    /// Keys of the objects that it is read from.
    pub fn keys(&self) -> impl Iterator<Item = String> {
        self.links.iter().flat_map(|link| {
            let objects = link.manifest.objects.iter().map(|object| object.name.clone());
            objects.chain([manifest_key(link.manifest.version)])
        })
    }
}

/// Objects of a store with their keys, in the order in which they are to be written elsewhere.
pub type Objects = Vec<(String, Bytes)>;

impl Store {
    /// Loads a version and checks all of it: digests, lengths, names, types, shapes, the order of ids, that all weights are
    /// finite, and the golden vectors; of a delta, the whole chain from its full on, and that it gives the very bytes that a
    /// full in its place has.
    pub async fn load(&self, version: Version) -> Result<Snapshot> {
        let chain = self.chain(version, None).await?;
        let mut objects = Objects::new();
        let object = payload_of(&chain.links[0])?;
        let mut weights = weights_in(object, &self.payload(&chain.links[0], object).await?)?;
        for link in &chain.links[1..] {
            let delta = self.delta(link, weights.towers().map(|towers| towers.pair()), &mut objects).await?;
            let key = &link.manifest.objects[0].name;
            weights = delta.apply(&weights).map_err(|source| Error::Corrupt {
                key: key.clone(),
                reason: "is not a delta for the version before it",
                source,
            })?;
        }
        let last = chain.last();
        let manifest = last.manifest.clone();
        let content = |reason: String| Error::Content { key: manifest_key(manifest.version), reason };
        says_what_it_holds(&manifest, &weights)?;
        if let Some(Link { result, .. }) = &manifest.delta {
            let encoded = weights.to_arrays().encode(PAYLOAD_FORMAT).map_err(|e| content(e.to_string()))?;
            if (encoded.length, encoded.digest) != (result.length, result.digest) {
                return Err(content(format!(
                    "its chain gives weights with the digest {}, a full has {}",
                    encoded.digest, result.digest
                )));
            }
        }
        let snapshot = Snapshot { manifest, weights, digest: last.digest, mapped: false };
        snapshot.prove(|slots| snapshot.logit(slots))?;
        Ok(snapshot)
    }

    /// Loads what a channel names now; none if it names nothing yet.
    pub async fn load_latest(&self, channel: &str) -> Result<Option<Snapshot>> {
        match self.latest(channel).await?.and_then(|entry| entry.version) {
            None => Ok(None),
            Some(version) => self.load(version).await.map(Some),
        }
    }

    /// The manifests that a version needs, back to its full, or to the version that the reader holds (with the digest of its
    /// manifest) if the chain comes by it. Refuses a chain with a wrong link.
    pub async fn chain(&self, version: Version, held: Option<(Version, Digest)>) -> Result<Chain> {
        let mut links = vec![self.sealed(version, "who asked for this version").await?];
        let from_held = loop {
            let newest = &links[links.len() - 1];
            let (manifest, key) = (&newest.manifest, manifest_key(newest.manifest.version));
            let content = |reason: String| Err(Error::Content { key: key.clone(), reason });
            let link = match (manifest.kind, &manifest.delta) {
                (Kind::Full, None) => break false,
                (Kind::Delta, Some(link)) => link.clone(),
                _ => return content("a delta must say what it changes, and a full nothing".to_owned()),
            };
            if held == Some((link.after, link.after_digest)) {
                break true;
            }
            let before = self.sealed(link.after, &format!("`{key}`")).await?;
            if before.digest != link.after_digest {
                return content(format!(
                    "changes version {} with the manifest digest {}, but there it is {}: an object was replaced or copied from another store",
                    link.after, link.after_digest, before.digest
                ));
            }
            let (number, full) = match &before.manifest.delta {
                None => (0, before.manifest.version),
                Some(before) => (before.number, before.full),
            };
            if link.number != number + 1 || link.full != full {
                return content(format!(
                    "is number {} after the full {}, but the version before it is number {number} after {full}",
                    link.number, link.full
                ));
            }
            links.push(before);
        };
        links.reverse();
        Ok(Chain { links, from_held })
    }

    /// The full that a chain begins with, to be served: its columns lie in the bytes of its payload, and these in a mapped file: the one
    /// that it has in the cache, or without a cache one that has no name and is gone with the snapshot, in the directory for
    /// temporary files. What the cache lacks, or has otherwise than it was published, is copied to it first. What neither of them can
    /// hold is held in memory. All of it is checked but for the golden vectors. What was read and is not in the cache yet comes with
    /// it.
    pub async fn full(&self, chain: &Chain, cache: Option<&Self>) -> Result<(Snapshot, Objects)> {
        let link = &chain.links[0];
        let object = payload_of(link)?;
        let (bytes, place) = self.held(link, object, cache).await?;
        let weights = weights_in(object, &bytes)?;
        says_what_it_holds(&link.manifest, &weights)?;
        let mut objects = Objects::new();
        if place != Place::Cache {
            objects.push((object.name.clone(), bytes));
        }
        objects.push((manifest_key(link.manifest.version), link.bytes.clone()));
        let Sealed { manifest, digest, .. } = link.clone();
        Ok((Snapshot { manifest, weights, digest, mapped: place != Place::Memory }, objects))
    }

    /// The deltas of a chain, oldest first. `towers` are those of the model.
    pub async fn deltas(&self, chain: &Chain, towers: Option<&Pair>) -> Result<(Vec<Delta>, Objects)> {
        let (mut deltas, mut objects) = (Vec::with_capacity(chain.links.len()), Objects::new());
        for link in chain.links.iter().skip(usize::from(!chain.from_held)) {
            deltas.push(self.delta(link, towers, &mut objects).await?);
        }
        Ok((deltas, objects))
    }

    /// The bytes of a payload, and where they lie.
    async fn held(&self, link: &Sealed, object: &ObjectRef, cache: Option<&Self>) -> Result<(Bytes, Place)> {
        let key = object.name.as_str();
        if let Some(cache) = cache {
            match cache.map(object) {
                Ok(Some(bytes)) => return Ok((bytes, Place::Cache)),
                Ok(None) if self.is_same_directory(cache) => return Err(missing(link, object)),
                Ok(None) => {}
                Err(error) if self.is_same_directory(cache) => return Err(error),
                // What is copied takes its place.
                Err(error) => {
                    tracing::warn!(error = %chain(&error), "what the cache has is not used, it is fetched anew");
                }
            }
            match self.copy(object, cache.draft(object)).await? {
                Copied::Absent => return Err(missing(link, object)),
                Copied::Whole(bytes) => return Ok((bytes, Place::Cache)),
                Copied::Failed(error) => {
                    tracing::warn!(key, %error, "the cache cannot hold a payload, so it goes to a temporary file");
                }
            }
        }
        let dir = std::env::temp_dir();
        match self.copy(object, Draft::unnamed(&dir)).await? {
            Copied::Absent => return Err(missing(link, object)),
            Copied::Whole(bytes) => return Ok((bytes, Place::Unnamed)),
            Copied::Failed(error) => tracing::warn!(
                key,
                dir = %dir.display(),
                %error,
                "no temporary file can hold a payload, so it is held in memory, and two while one loads; set TMPDIR, or `cache`, to a directory that can be written, with room for two fulls"
            ),
        }
        Ok((self.payload(link, object).await?, Place::Memory))
    }

    async fn delta(&self, link: &Sealed, towers: Option<&Pair>, objects: &mut Objects) -> Result<Delta> {
        let object = payload_of(link)?;
        let bytes = self.payload(link, object).await?;
        let corrupt = |source| Error::Corrupt { key: object.name.clone(), reason: "cannot be read", source };
        let arrays = Arrays::decode(&bytes, DELTA_FORMAT).map_err(corrupt)?;
        objects.push((object.name.clone(), bytes));
        objects.push((manifest_key(link.manifest.version), link.bytes.clone()));
        let delta = Delta::from_arrays(&arrays, towers).map_err(|source| Error::Corrupt {
            key: object.name.clone(),
            reason: "does not hold a delta for this model",
            source,
        })?;
        let counts = (delta.changed_rows() as u64, delta.removed_rows() as u64);
        if link.manifest.delta.as_ref().is_some_and(|link| (link.changed, link.removed) != counts) {
            let reason = format!("the payload changes {} rows and removes {}, it says others", counts.0, counts.1);
            return Err(Error::Content { key: manifest_key(link.manifest.version), reason });
        }
        Ok(delta)
    }

    /// Reads the payload of a version to memory.
    async fn payload(&self, link: &Sealed, object: &ObjectRef) -> Result<Bytes> {
        let Some(bytes) = self.read_large(&object.name, object.length).await? else {
            return Err(missing(link, object));
        };
        object.digest.check(object.length, &bytes).map_err(|source| not_published(&object.name, source))?;
        Ok(bytes)
    }

    /// The manifest of a version, verified. `named_by` says who needs it, for the message when it is not there.
    pub async fn manifest(&self, version: Version, named_by: &str) -> Result<Manifest> {
        Ok(self.sealed(version, named_by).await?.manifest)
    }

    async fn sealed(&self, version: Version, named_by: &str) -> Result<Sealed> {
        let key = manifest_key(version);
        let Some(bytes) = self.read(&key).await? else {
            return Err(Error::Missing { key, named_by: named_by.to_owned() });
        };
        let manifest: Manifest = document(&key, &bytes)?;
        if manifest.version != version {
            let reason = format!("is the manifest of version {}, which is not its place", manifest.version);
            return Err(Error::Content { key, reason });
        }
        Ok(Sealed { manifest, digest: Digest::of(&bytes), bytes })
    }

    /// Keys of all manifests and payloads.
    pub async fn keys(&self) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        for folder in ["manifests", "objects"] {
            keys.extend(self.list(folder).await?.into_keys());
        }
        Ok(keys)
    }

    /// Makes this store hold these objects and what is already there of `keys`, nothing else, and no channel: a cache. What is new
    /// is complete before anything goes.
    pub async fn keep_only(&self, objects: &Objects, keys: &[String]) -> Result<()> {
        for (key, bytes) in objects {
            if let Created::Taken(_) = self.create_only(key, std::slice::from_ref(bytes)).await? {
                self.delete(key).await?;
                self.create_only(key, std::slice::from_ref(bytes)).await?;
            }
        }
        for key in self.keys().await? {
            if !keys.contains(&key) {
                self.delete(&key).await?;
            }
        }
        self.sweep_all().await
    }
}

/// Where the payload of a full lies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// In its file in the cache, mapped.
    Cache,
    /// In a file without a name, mapped.
    Unnamed,
    Memory,
}

/// The weights of a full, which lie in the bytes of its payload.
fn weights_in(object: &ObjectRef, payload: &Bytes) -> Result<Weights> {
    let corrupt = |reason| move |source| Error::Corrupt { key: object.name.clone(), reason, source };
    let arrays = Arrays::decode(payload, PAYLOAD_FORMAT).map_err(corrupt("cannot be read"))?;
    Weights::from_arrays(&arrays).map_err(corrupt("does not hold a model"))
}

/// The one payload that a manifest names.
fn payload_of(link: &Sealed) -> Result<&ObjectRef> {
    let manifest = &link.manifest;
    let content = |reason: String| Err(Error::Content { key: manifest_key(manifest.version), reason });
    let kind = &manifest.model.kind;
    if !["logistic", "two_tower"].contains(&kind.as_str()) {
        return content(format!("holds a model of kind `{kind}`, this reader knows `logistic` and `two_tower`"));
    }
    let [object] = manifest.objects.as_slice() else {
        return content(format!("names {} objects, a model has one", manifest.objects.len()));
    };
    if object.name != object_key(object.digest) {
        return content(format!("names `{}`, which does not fit its digest {}", object.name, object.digest));
    }
    Ok(object)
}

fn missing(link: &Sealed, object: &ObjectRef) -> Error {
    Error::Missing { key: object.name.clone(), named_by: format!("`{}`", manifest_key(link.manifest.version)) }
}

/// Refuses weights of another kind or number of rows than their manifest says.
fn says_what_it_holds(manifest: &Manifest, weights: &Weights) -> Result<()> {
    let content = |reason: String| Err(Error::Content { key: manifest_key(manifest.version), reason });
    if weights.kind() != manifest.model.kind {
        return content(format!("says `{}`, the payload holds a `{}`", manifest.model.kind, weights.kind()));
    }
    if weights.rows() as u64 != manifest.rows {
        return content(format!("says {} rows, the payload has {}", manifest.rows, weights.rows()));
    }
    Ok(())
}
