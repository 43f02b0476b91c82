//! What a person does to a channel: pin, unpin, rollback, promote, and clean-ups. The rules are in [`decide`].

use super::decide::{self, Objection, Wish};
use super::manifest::Entry;
use super::publish::{Plan, sealed};
use super::retain::{Removed, outdated, retain};
use super::store::{Created, Store, entry_key, random};
use super::{Error, Result, Version};
use crate::clock;

/// What became of a wish.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// This entry was written, after `before`.
    Written { entry: Entry, before: Option<Entry> },
    /// The channel was as wished before.
    Already(Entry),
    /// It was not granted.
    Refused(Objection),
}

/// Writes the entry of a channel that grants a wish. Fences no trainer, and none overwrites it: where a trainer or another
/// operator is faster, what they wrote is read and the wish weighed anew. A version that the channel is to name is loaded
/// and proved first, and looked for again afterwards, since retention may have taken it meanwhile.
pub async fn operate(store: &Store, channel: &str, wish: Wish) -> Result<Done> {
    let name = format!("{:016x}", random());
    let mut proved = None;
    loop {
        let before = store.latest(channel).await?;
        let entry = match decide::operate(before.as_ref(), channel, &name, wish, clock::now()) {
            Ok(entry) => entry,
            Err(Objection::Already) => {
                let entry = before.expect("a channel without entries is never as wished");
                return Ok(Done::Already(entry));
            }
            Err(objection) => return Ok(Done::Refused(objection)),
        };
        // To let go of a version must be possible whatever became of it.
        let moves = !matches!(wish, Wish::Unpin);
        if let Some(version) = entry.version.filter(|version| moves && proved != Some(*version)) {
            store.load(version).await?;
            proved = Some(version);
        }
        let key = entry_key(channel, entry.number);
        if let Created::Taken(_) = store.create_only(&key, &[sealed(&key, &entry)?]).await? {
            tracing::info!(key, "another writer took this entry; looking again");
            continue;
        }
        if let Some(version) = entry.version.filter(|_| moves) {
            let manifest = store.manifest(version, &format!("`{key}`, which was just written")).await?;
            for object in manifest.objects {
                if !store.exists(&object.name).await? {
                    return Err(Error::Missing { key: object.name, named_by: format!("`{key}`, just written,") });
                }
            }
        }
        return Ok(Done::Written { entry, before });
    }
}

/// Retention by hand; `dry_run` deletes nothing and says what would go.
pub async fn collect(store: &Store, plan: &Plan, dry_run: bool) -> Result<Removed> {
    let now = clock::now();
    if dry_run { outdated(store, plan, now).await } else { retain(store, plan, now).await }
}

/// The version that a channel named before the one that it names now, the latest that is earlier and still there.
pub async fn earlier(store: &Store, channel: &str) -> Result<Option<Version>> {
    let Some(last) = store.latest(channel).await? else { return Ok(None) };
    let Some(current) = last.version else { return Ok(None) };
    let there = store.versions().await?;
    for number in (1..last.number).rev() {
        let entry = store.entry(channel, number).await?;
        let version = entry.and_then(|entry| entry.version);
        if let Some(version) = version.filter(|version| *version < current && there.contains_key(version)) {
            return Ok(Some(version));
        }
    }
    Ok(None)
}
