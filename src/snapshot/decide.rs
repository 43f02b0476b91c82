//! The rules of publishing and retention, as functions of what was read. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::{ENTRY_FORMAT, Entry, Epoch, Version};
use crate::event::Time;

/// Who writes, in the words of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Writer {
    pub channel: String,
    pub epoch: Epoch,
    /// Random, one per process.
    pub name: String,
}

/// The entry by which a writer that starts takes the channel: a larger epoch, the version unchanged.
#[must_use]
pub fn take_epoch(last: Option<&Entry>, channel: &str, name: &str, now: Time) -> Entry {
    let epoch = Epoch(last.map_or(0, |entry| entry.epoch.0) + 1);
    let writer = Writer { channel: channel.to_owned(), epoch, name: name.to_owned() };
    next_entry(last.map_or(0, |entry| entry.number), &writer, last.and_then(|entry| entry.version), now)
}

/// The entry after number `last` by which `writer` names `version`.
#[must_use]
pub fn next_entry(last: u64, writer: &Writer, version: Option<Version>, now: Time) -> Entry {
    Entry {
        format: ENTRY_FORMAT.to_owned(),
        channel: writer.channel.clone(),
        number: last + 1,
        epoch: writer.epoch,
        writer: writer.name.clone(),
        version,
        created: now,
    }
}

/// What an entry found in the channel means for a writer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// An earlier write of ours, or a late one of a writer that we fence: we stand behind it and may go on.
    Holds,
    /// Somebody else has taken the channel since.
    Fenced { by: Epoch },
}

/// Judges an entry found past the last one that `ours` knows.
///
/// | its epoch | its writer | standing |
/// |-----------|------------|----------|
/// | smaller   | any        | holds    |
/// | ours      | ours       | holds    |
/// | ours      | another    | fenced: two writers with one epoch cannot be, so nothing is risked |
/// | larger    | any        | fenced   |
#[must_use]
pub fn standing(ours: &Writer, found: &Entry) -> Standing {
    if found.epoch < ours.epoch || (found.epoch == ours.epoch && found.writer == ours.name) {
        Standing::Holds
    } else {
        Standing::Fenced { by: found.epoch }
    }
}

/// Whether "already exists" was our own write whose answer was lost. Bytes carry the writer's random name, so equal
/// bytes are ours.
#[must_use]
pub fn is_ours(written: &[u8], found: &[u8]) -> bool {
    written == found
}

/// Whether a version with batches up to `batch` may be published.
///
/// After a crash the trainer goes through batches again that the lineage has published: those wait, so that neither the
/// channel nor the versions go back in time. A version that was written but that the channel never came to name may be
/// repeated. `newest` and `live` are the last batch of the lineage's newest version and of what the channel names, none
/// where that is of another lineage.
#[must_use]
pub fn goes_forward(batch: u64, newest: Option<u64>, live: Option<u64>) -> bool {
    newest.is_none_or(|newest| batch >= newest) && live.is_none_or(|live| batch > live)
}

/// Whether a chain of deltas of so many bytes is worth more than a full: who starts reads the full and the chain, so the
/// chain may not be larger.
#[must_use]
pub fn is_worth(chain: u64, full: u64) -> bool {
    chain <= full
}

/// Adds to `kept` every version that a chain of deltas to one of them needs. `after` says what each delta changes.
#[must_use]
pub fn with_chains(kept: impl IntoIterator<Item = Version>, after: &BTreeMap<Version, Version>) -> BTreeSet<Version> {
    let mut all = BTreeSet::new();
    for version in kept {
        let mut next = Some(version);
        while let Some(version) = next.filter(|version| all.insert(*version)) {
            next = after.get(&version).copied();
        }
    }
    all
}

/// What retention sees.
#[derive(Clone, Debug, Default)]
pub struct Inventory {
    /// Of each manifest, when it was written.
    pub versions: BTreeMap<Version, Time>,
    /// Versions that the current entry of some channel names.
    pub named: BTreeSet<Version>,
    /// Of each delta, the version that it changes.
    pub after: BTreeMap<Version, Version>,
}

/// Versions that retention deletes: all but the newest `keep`, those a channel names, those younger than `grace`
/// milliseconds, and what a chain to one of these needs. Channel entries are never deleted: the whole history is what fences a writer that slept.
#[must_use]
pub fn outdated(seen: &Inventory, keep: usize, grace_ms: i64, now: Time) -> Vec<Version> {
    let old: BTreeSet<Version> = seen.versions.keys().rev().skip(keep).copied().collect();
    let stays = |(version, written): &(&Version, &Time)| {
        !old.contains(version) || seen.named.contains(version) || **written >= now.minus(grace_ms)
    };
    let kept = with_chains(seen.versions.iter().filter(stays).map(|(version, _)| *version), &seen.after);
    old.into_iter().filter(|version| !kept.contains(version)).collect()
}

/// Payload objects that retention deletes: needed by no manifest that stays, and older than `grace`, so that no publish
/// is under way that is about to name them.
#[must_use]
pub fn unneeded(objects: &BTreeMap<String, Time>, needed: &BTreeSet<String>, grace_ms: i64, now: Time) -> Vec<String> {
    let debris = objects.iter().filter(|(key, written)| !needed.contains(*key) && **written < now.minus(grace_ms));
    debris.map(|(key, _)| key.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn writer(epoch: u64, name: &str) -> Writer {
        Writer { channel: "live".to_owned(), epoch: Epoch(epoch), name: name.to_owned() }
    }

    #[test]
    fn taking_an_epoch_leaves_the_version_as_it_is() {
        let first = take_epoch(None, "live", "a", Time(1));
        assert_eq!((first.number, first.epoch, first.version), (1, Epoch(1), None));
        let named = next_entry(first.number, &writer(1, "a"), Some(Version(4)), Time(2));
        let second = take_epoch(Some(&named), "live", "b", Time(3));
        assert_eq!((second.number, second.epoch, second.version), (3, Epoch(2), Some(Version(4))));
    }

    #[test]
    fn a_larger_epoch_fences_and_a_smaller_one_does_not() {
        let found = |epoch, name| next_entry(7, &writer(epoch, name), None, Time(0));
        let ours = writer(5, "a");
        assert_eq!(standing(&ours, &found(4, "b")), Standing::Holds);
        assert_eq!(standing(&ours, &found(5, "a")), Standing::Holds);
        assert_eq!(standing(&ours, &found(5, "b")), Standing::Fenced { by: Epoch(5) });
        assert_eq!(standing(&ours, &found(6, "b")), Standing::Fenced { by: Epoch(6) });
    }

    #[test]
    fn batches_that_the_lineage_has_published_are_not_published_again() {
        assert!(goes_forward(1, None, None));
        assert!(!goes_forward(9, Some(10), None), "older than the newest version");
        assert!(!goes_forward(10, Some(10), Some(10)), "is live already");
        assert!(goes_forward(10, Some(10), Some(8)), "was written, but the channel never named it");
        assert!(goes_forward(11, Some(10), Some(10)));
    }

    #[test]
    fn retention_keeps_the_newest_the_named_and_the_young() {
        let versions = (1..=8).map(|v| (Version(v), Time(v as i64 * 100))).collect();
        let seen = Inventory { versions, named: BTreeSet::from([Version(2)]), after: BTreeMap::new() };
        let gone = |keep, grace, now| outdated(&seen, keep, grace, Time(now)).iter().map(|v| v.0).collect::<Vec<_>>();
        assert_eq!(gone(3, 0, 10_000), [1, 3, 4, 5]);
        assert_eq!(gone(3, 600, 1_000), [1, 3], "5 and 4 are not older than the grace time");
        assert_eq!(gone(8, 0, 10_000), [0u64; 0]);
    }

    #[test]
    fn retention_keeps_what_a_chain_needs() {
        let versions = (1..=8).map(|v| (Version(v), Time(0))).collect();
        // 1 and 5 are fulls; 4 is a branch off 2.
        let after = [(2, 1), (3, 2), (4, 2), (6, 5), (7, 6), (8, 7)];
        let after = after.map(|(delta, of)| (Version(delta), Version(of))).into();
        let mut seen = Inventory { versions, named: BTreeSet::new(), after };
        let gone = |seen: &Inventory| outdated(seen, 1, 0, Time(9)).iter().map(|v| v.0).collect::<Vec<_>>();
        assert_eq!(gone(&seen), [1, 2, 3, 4]);
        seen.named = BTreeSet::from([Version(4)]);
        assert_eq!(gone(&seen), [3]);
    }

    #[test]
    fn retention_deletes_only_old_objects_that_nobody_needs() {
        let objects =
            BTreeMap::from([("a".to_owned(), Time(0)), ("b".to_owned(), Time(0)), ("c".to_owned(), Time(95))]);
        let needed = BTreeSet::from(["a".to_owned()]);
        assert_eq!(unneeded(&objects, &needed, 10, Time(100)), ["b"]);
    }
}
