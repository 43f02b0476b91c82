//! Deletes what is no longer needed: old versions, their payloads, and the debris of crashes.

use std::collections::{BTreeMap, BTreeSet};

use super::decide::{self, Inventory};
use super::publish::Plan;
use super::store::{Store, manifest_key};
use super::{Manifest, Remedy, Result, Version};
use crate::event::Time;

/// What [`retain`] deletes, or deleted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Removed {
    pub versions: Vec<Version>,
    /// Payloads that no remaining manifest names.
    pub objects: Vec<String>,
    /// What crashes left behind: half-written files of a local store, and objects of probes.
    pub debris: Vec<String>,
}

/// Finds what [`retain`] would delete: all versions but the newest `keep`, those that a channel names, those younger than the
/// grace time, and what the chains of these need; then the objects that no remaining manifest names. Never a channel entry,
/// never what a kept manifest needs: if one cannot be read, the error names it.
pub async fn outdated(store: &Store, plan: &Plan, now: Time) -> Result<Removed> {
    // Objects before manifests: what is named by a manifest written in between is then seen as needed.
    let objects = store.list("objects").await?;
    let mut seen = Inventory { versions: store.versions().await?, named: named(store).await?, ..Inventory::default() };
    let mut manifests = BTreeMap::new();
    for version in seen.versions.keys() {
        let manifest = store.manifest(*version, "retention").await;
        if let Err(error) = &manifest
            && error.remedy() == Remedy::Retry
        {
            return Err(manifest.expect_err("an error"));
        }
        manifests.insert(*version, manifest);
    }
    let link = |manifest: &Manifest| Some((manifest.version, manifest.delta.as_ref()?.after));
    seen.after = manifests.values().flatten().filter_map(link).collect();
    let versions = decide::outdated(&seen, plan.keep, plan.grace_ms, now);
    let mut needed = BTreeSet::new();
    for (_, manifest) in manifests.into_iter().filter(|(version, _)| !versions.contains(version)) {
        needed.extend(manifest?.objects.into_iter().map(|object| object.name));
    }
    let objects = decide::unneeded(&objects, &needed, plan.grace_ms, now);
    let mut debris = store.staged(now.minus(plan.grace_ms))?;
    let probes = store.list("probe").await?;
    debris.extend(decide::unneeded(&probes, &BTreeSet::new(), plan.grace_ms, now));
    Ok(Removed { versions, objects, debris })
}

/// Deletes what [`outdated`] finds and returns it.
pub async fn retain(store: &Store, plan: &Plan, now: Time) -> Result<Removed> {
    let mut doomed = outdated(store, plan, now).await?;
    if !doomed.versions.is_empty() {
        // An operator may have gone back to one of them since; then this pass is over, and the next sees it.
        let named = named(store).await?;
        if doomed.versions.iter().any(|version| named.contains(version)) {
            doomed = Removed { debris: doomed.debris, ..Removed::default() };
        }
    }
    // Manifests before objects: a reader never meets a manifest whose payload is gone. The newest first: where this ends in
    // the middle, no delta is left without what it changes.
    for version in doomed.versions.iter().rev() {
        store.delete(&manifest_key(*version)).await?;
    }
    for key in &doomed.objects {
        store.delete(key).await?;
    }
    for key in &doomed.debris {
        store.clear(key).await?;
    }
    Ok(doomed)
}

/// What the channels name now.
async fn named(store: &Store) -> Result<BTreeSet<Version>> {
    let mut named = BTreeSet::new();
    for channel in store.channels().await? {
        named.extend(store.latest(&channel).await?.and_then(|entry| entry.version));
    }
    Ok(named)
}
