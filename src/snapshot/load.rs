//! Reading versions: a full, or the chain of deltas that a version is; every link, byte and golden vector checked.

use bytes::Bytes;

use super::codec::{Arrays, Digest};
use super::delta::Delta;
use super::manifest::{DELTA_FORMAT, Document, Kind, Link, Manifest, ObjectRef, PAYLOAD_FORMAT, Version};
use super::store::{Created, Store, document, manifest_key, object_key};
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
}

impl Snapshot {
    /// What a trainer would load of weights that it published under this manifest. Nothing is checked.
    #[must_use]
    pub fn new(manifest: Manifest, weights: Weights) -> Self {
        let digest = manifest.to_bytes().map(|bytes| Digest::of(&bytes)).unwrap_or(Digest(0));
        Self { manifest, weights, digest }
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
}

/// Objects of a store with their keys, in the order in which they are to be written elsewhere.
pub type Objects = Vec<(String, Bytes)>;

impl Store {
    /// Loads a version and checks all of it: digests, lengths, names, types, shapes, the order of ids, that all weights are
    /// finite, and the golden vectors; of a delta, the whole chain from its full on, and that it gives the very bytes that a
    /// full in its place has.
    pub async fn load(&self, version: Version) -> Result<Snapshot> {
        Ok(self.load_raw(version).await?.0)
    }

    /// As [`Store::load`], with the bytes that were read, for [`Store::keep_only`].
    pub async fn load_raw(&self, version: Version) -> Result<(Snapshot, Objects)> {
        let chain = self.chain(version, None).await?;
        let mut objects = Objects::new();
        let mut links = chain.links.into_iter();
        let mut last = links.next().expect("a chain has a link");
        let mut weights = self.full(&last, &mut objects).await?;
        for link in links {
            let delta = self.delta(&link, weights.towers().map(|towers| towers.pair()), &mut objects).await?;
            let key = &link.manifest.objects[0].name;
            weights = delta.apply(&weights).map_err(|source| Error::Corrupt {
                key: key.clone(),
                reason: "is not a delta for the version before it",
                source,
            })?;
            last = link;
        }
        let manifest = last.manifest;
        let content = |reason: String| Error::Content { key: manifest_key(manifest.version), reason };
        if weights.kind() != manifest.model.kind {
            return Err(content(format!("says `{}`, the payload holds a `{}`", manifest.model.kind, weights.kind())));
        }
        if weights.rows() as u64 != manifest.rows {
            return Err(content(format!("says {} rows, the payload has {}", manifest.rows, weights.rows())));
        }
        if let Some(Link { result, .. }) = &manifest.delta {
            let encoded = weights.to_arrays().encode(PAYLOAD_FORMAT).map_err(|e| content(e.to_string()))?;
            if (encoded.length, encoded.digest) != (result.length, result.digest) {
                return Err(content(format!(
                    "its chain gives weights with the digest {}, a full has {}",
                    encoded.digest, result.digest
                )));
            }
        }
        let snapshot = Snapshot { manifest, weights, digest: last.digest };
        snapshot.prove(|slots| snapshot.logit(slots))?;
        Ok((snapshot, objects))
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

    /// The deltas of a chain that starts at what the reader holds, oldest first. `towers` are those of the model.
    pub async fn deltas(&self, chain: &Chain, towers: Option<&Pair>) -> Result<(Vec<Delta>, Objects)> {
        let (mut deltas, mut objects) = (Vec::with_capacity(chain.links.len()), Objects::new());
        for link in &chain.links {
            deltas.push(self.delta(link, towers, &mut objects).await?);
        }
        Ok((deltas, objects))
    }

    async fn full(&self, link: &Sealed, objects: &mut Objects) -> Result<Weights> {
        let (object, arrays) = self.payload(link, PAYLOAD_FORMAT, objects).await?;
        Weights::from_arrays(&arrays).map_err(|source| Error::Corrupt {
            key: object.name.clone(),
            reason: "does not hold a model",
            source,
        })
    }

    async fn delta(&self, link: &Sealed, towers: Option<&Pair>, objects: &mut Objects) -> Result<Delta> {
        let (object, arrays) = self.payload(link, DELTA_FORMAT, objects).await?;
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

    /// Reads the one payload of a version, and adds it and the manifest to `objects`.
    async fn payload<'a>(
        &self,
        link: &'a Sealed,
        format: &str,
        objects: &mut Objects,
    ) -> Result<(&'a ObjectRef, Arrays)> {
        let (manifest, key) = (&link.manifest, manifest_key(link.manifest.version));
        let content = |reason: String| Error::Content { key: key.clone(), reason };
        let kind = &manifest.model.kind;
        if !["logistic", "two_tower"].contains(&kind.as_str()) {
            return Err(content(format!(
                "holds a model of kind `{kind}`, this reader knows `logistic` and `two_tower`"
            )));
        }
        let [object] = manifest.objects.as_slice() else {
            return Err(content(format!("names {} objects, a model has one", manifest.objects.len())));
        };
        if object.name != object_key(object.digest) {
            return Err(content(format!("names `{}`, which does not fit its digest {}", object.name, object.digest)));
        }
        let Some(bytes) = self.read_large(&object.name, object.length).await? else {
            return Err(Error::Missing { key: object.name.clone(), named_by: format!("`{key}`") });
        };
        let corrupt = |reason| {
            let key = object.name.clone();
            move |source| Error::Corrupt { key, reason, source }
        };
        object.digest.check(object.length, &bytes).map_err(corrupt("bytes are not those that were published"))?;
        let arrays = Arrays::decode(&bytes, format).map_err(corrupt("cannot be read"))?;
        objects.push((object.name.clone(), bytes));
        objects.push((key, link.bytes.clone()));
        Ok((object, arrays))
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

    /// Makes this store hold these objects and what is already there of `keys`, nothing else, and no channel: a cache. What is new
    /// is complete before anything goes.
    pub async fn keep_only(&self, objects: &Objects, keys: &[String]) -> Result<()> {
        for (key, bytes) in objects {
            if let Created::Taken(_) = self.create_only(key, std::slice::from_ref(bytes)).await? {
                self.delete(key).await?;
                self.create_only(key, std::slice::from_ref(bytes)).await?;
            }
        }
        for folder in ["manifests", "objects"] {
            for key in self.list(folder).await?.into_keys() {
                if !keys.contains(&key) {
                    self.delete(&key).await?;
                }
            }
        }
        self.sweep_all().await
    }
}
