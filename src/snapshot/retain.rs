//! Deletes what is no longer needed: old versions, their payloads, and the debris of crashes.

use std::collections::{BTreeMap, BTreeSet};

use super::decide::{self, Inventory};
use super::publish::Plan;
use super::store::{Store, manifest_key};
use super::{Error, Manifest, Result, Version};
use crate::event::Time;

/// What a pass of [`retain`] deleted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Removed {
    pub versions: Vec<Version>,
    pub objects: Vec<String>,
    /// Half-written files of a local store.
    pub debris: usize,
}

/// Deletes all versions but the newest `keep`, those that a channel names, those younger than the grace time, and what the
/// chains of these need; then the objects that no remaining manifest names. Never deletes a channel entry, never what a kept manifest needs: if one
/// cannot be read, nothing is deleted and the error names it.
pub async fn retain(store: &Store, plan: &Plan, now: Time) -> Result<Removed> {
    // Objects before manifests: what is named by a manifest written in between is then seen as needed.
    let objects = store.list("objects").await?;
    let mut seen = Inventory { versions: store.versions().await?, ..Inventory::default() };
    for channel in store.channels().await? {
        seen.named.extend(store.latest(&channel).await?.and_then(|entry| entry.version));
    }
    let mut manifests = BTreeMap::new();
    for version in seen.versions.keys() {
        let manifest = store.manifest(*version, "retention").await;
        if let Err(error @ Error::Unavailable { .. }) = manifest {
            return Err(error);
        }
        manifests.insert(*version, manifest);
    }
    let link = |manifest: &Manifest| Some((manifest.version, manifest.delta.as_ref()?.after));
    seen.after = manifests.values().flatten().filter_map(link).collect();
    let outdated = decide::outdated(&seen, plan.keep, plan.grace_ms, now);
    let gone: BTreeSet<Version> = outdated.iter().copied().collect();
    let mut needed = BTreeSet::new();
    for (_, manifest) in manifests.into_iter().filter(|(version, _)| !gone.contains(version)) {
        needed.extend(manifest?.objects.into_iter().map(|object| object.name));
    }
    let unneeded = decide::unneeded(&objects, &needed, plan.grace_ms, now);
    // Manifests before objects: a reader never meets a manifest whose payload is gone.
    for version in &outdated {
        store.delete(&manifest_key(*version)).await?;
    }
    for key in &unneeded {
        store.delete(key).await?;
    }
    let debris = store.sweep(now.minus(plan.grace_ms)).map_err(|e| Error::Unavailable {
        key: "staging files".to_owned(),
        source: object_store::Error::Generic { store: "LocalFileSystem", source: e.into() },
    })?;
    Ok(Removed { versions: outdated, objects: unneeded, debris })
}
