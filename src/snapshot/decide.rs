//! The rules of publishing and retention, as functions of what was read. No I/O, no clock.

use std::collections::{BTreeMap, BTreeSet};

use super::manifest::{Act, ENTRY_FORMAT, Entry, Epoch, Version};
use crate::event::Time;

/// Who writes, in the words of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Writer {
    pub channel: String,
    pub epoch: Epoch,
    /// Random, one per process.
    pub name: String,
}

/// The entry by which a writer that starts takes the channel: a larger epoch, the version unchanged, pinned if it was.
#[must_use]
pub fn take_epoch(last: Option<&Entry>, channel: &str, name: &str, now: Time) -> Entry {
    let epoch = Epoch(last.map_or(0, |entry| entry.epoch.0) + 1);
    let writer = Writer { channel: channel.to_owned(), epoch, name: name.to_owned() };
    let number = last.map_or(0, |entry| entry.number);
    let pinned = last.is_some_and(|entry| entry.pinned);
    Entry { act: Act::Start, pinned, ..next_entry(number, &writer, last.and_then(|entry| entry.version), now) }
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
        act: Act::Publish,
        version,
        pinned: false,
        created: now,
    }
}

/// What an operator wants of a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wish {
    /// Hold what it names, or this version.
    Pin(Option<Version>),
    Unpin,
    /// Go back to this version, and hold it.
    Rollback(Version),
    /// Name this version; hold it too if `pin`.
    Promote {
        version: Version,
        pin: bool,
    },
}

/// Why a wish is not granted.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Objection {
    #[error("it names no version yet, so there is nothing to hold or to go back from")]
    Empty,
    #[error("it is so already")]
    Already,
    #[error("it is pinned at version {0}: `unpin` it first, or use `rollback` or `pin`, which move it")]
    Pinned(Version),
    #[error("version {wanted} is not earlier than version {current}, which it names; `promote` goes forward")]
    NotEarlier { wanted: Version, current: Version },
}

/// The entry that grants an operator's wish. It stays in the epoch of the entry before it, so that it fences nobody, and
/// takes the next number, so that a trainer cannot overwrite it without having read it.
///
/// | wish     | the channel names | is pinned | then                       |
/// |----------|-------------------|-----------|----------------------------|
/// | any      | nothing           |           | `Empty`, but for promote   |
/// | pin      | the version       | yes       | `Already`                  |
/// | pin      | any               | any       | that version, pinned       |
/// | unpin    | any               | no        | `Already`                  |
/// | unpin    | any               | yes       | the same, not pinned       |
/// | rollback | a later version   | any       | the earlier one, pinned    |
/// | promote  | any               | yes       | `Pinned`                   |
/// | promote  | the version       | no        | `Already`, unless to pin   |
pub fn operate(
    last: Option<&Entry>,
    channel: &str,
    name: &str,
    wish: Wish,
    now: Time,
) -> std::result::Result<Entry, Objection> {
    let current = last.and_then(|entry| entry.version);
    let pinned = last.is_some_and(|entry| entry.pinned);
    let (act, version, pin) = match (wish, current) {
        (Wish::Promote { version, .. }, Some(held)) if pinned && version != held => {
            return Err(Objection::Pinned(held));
        }
        (Wish::Promote { version, pin }, _) => (Act::Promote, version, pin || pinned),
        (_, None) => return Err(Objection::Empty),
        (Wish::Pin(wanted), Some(current)) => (Act::Pin, wanted.unwrap_or(current), true),
        (Wish::Unpin, Some(current)) => (Act::Unpin, current, false),
        (Wish::Rollback(wanted), Some(current)) if wanted >= current => {
            return Err(Objection::NotEarlier { wanted, current });
        }
        (Wish::Rollback(wanted), Some(_)) => (Act::Rollback, wanted, true),
    };
    if current == Some(version) && pinned == pin {
        return Err(Objection::Already);
    }
    let epoch = last.map_or(Epoch(1), |entry| entry.epoch);
    let writer = Writer { channel: channel.to_owned(), epoch, name: name.to_owned() };
    let number = last.map_or(0, |entry| entry.number);
    Ok(Entry { act, pinned: pin, ..next_entry(number, &writer, Some(version), now) })
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
/// | its epoch | its writer  | standing |
/// |-----------|-------------|----------|
/// | smaller   | any         | holds    |
/// | ours      | ours        | holds    |
/// | ours      | an operator | holds: what they say about the version is obeyed |
/// | ours      | another     | fenced: two writers with one epoch cannot be, so nothing is risked |
/// | larger    | any         | fenced   |
#[must_use]
pub fn standing(ours: &Writer, found: &Entry) -> Standing {
    let allowed = found.writer == ours.name || found.act.is_by_operator();
    if found.epoch < ours.epoch || (found.epoch == ours.epoch && allowed) {
        Standing::Holds
    } else {
        Standing::Fenced { by: found.epoch }
    }
}

/// Whether a version with batches up to `batch` may be published.
///
/// After a crash the trainer goes through batches again that the lineage has published: those wait, so that neither the
/// channel nor the versions go back in time. A version that was written but that the channel never came to name may be
/// repeated. `newest` and `live` are the last batch of the lineage's newest version and of what the channel names, none
/// where that is of another lineage. While the channel is `pinned` it names no version, so none is repeated.
#[must_use]
pub fn goes_forward(batch: u64, newest: Option<u64>, live: Option<u64>, pinned: bool) -> bool {
    newest.is_none_or(|newest| batch > newest || (batch == newest && !pinned)) && live.is_none_or(|live| batch > live)
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
    fn an_operator_of_the_same_epoch_fences_nobody_and_one_of_a_later_epoch_is_the_word_of_a_successor() {
        let found = |epoch, act| Entry { act, ..next_entry(7, &writer(epoch, "operator"), Some(Version(1)), Time(0)) };
        let ours = writer(5, "a");
        for act in [Act::Pin, Act::Unpin, Act::Rollback, Act::Promote] {
            assert_eq!(standing(&ours, &found(5, act)), Standing::Holds);
            assert_eq!(standing(&ours, &found(6, act)), Standing::Fenced { by: Epoch(6) });
        }
        assert_eq!(standing(&ours, &found(5, Act::Start)), Standing::Fenced { by: Epoch(5) });
    }

    #[test]
    fn an_operators_entry_takes_the_next_number_and_keeps_the_epoch() {
        let named = next_entry(4, &writer(3, "a"), Some(Version(9)), Time(0));
        let ask = |last: &Entry, wish| operate(Some(last), "live", "op", wish, Time(1));
        let entry = ask(&named, Wish::Rollback(Version(7))).unwrap();
        assert_eq!((entry.number, entry.epoch, entry.writer.as_str()), (6, Epoch(3), "op"));
        assert_eq!((entry.act, entry.version, entry.pinned), (Act::Rollback, Some(Version(7)), true));
        let taken = take_epoch(Some(&entry), "live", "b", Time(2));
        assert_eq!(
            (taken.epoch, taken.version, taken.pinned),
            (Epoch(4), Some(Version(7)), true),
            "a restart keeps it"
        );
        let free = ask(&entry, Wish::Unpin).unwrap();
        assert_eq!((free.act, free.version, free.pinned), (Act::Unpin, Some(Version(7)), false));
    }

    #[test]
    fn wishes_that_make_no_sense_are_objected_to() {
        let named = next_entry(4, &writer(3, "a"), Some(Version(9)), Time(0));
        let pinned = Entry { pinned: true, ..named.clone() };
        let ask =
            |last: Option<&Entry>, wish| operate(last, "live", "op", wish, Time(1)).map(|e| (e.version, e.pinned));
        let promote = |version, pin| Wish::Promote { version: Version(version), pin };
        assert_eq!(ask(None, Wish::Pin(None)), Err(Objection::Empty));
        assert_eq!(ask(None, Wish::Unpin), Err(Objection::Empty));
        assert_eq!(ask(None, promote(2, false)), Ok((Some(Version(2)), false)), "the first entry of a channel");
        assert_eq!(ask(Some(&named), Wish::Unpin), Err(Objection::Already));
        assert_eq!(ask(Some(&pinned), Wish::Pin(None)), Err(Objection::Already));
        assert_eq!(ask(Some(&pinned), Wish::Pin(Some(Version(8)))), Ok((Some(Version(8)), true)));
        let later = Objection::NotEarlier { wanted: Version(9), current: Version(9) };
        assert_eq!(ask(Some(&named), Wish::Rollback(Version(9))), Err(later));
        assert_eq!(ask(Some(&named), promote(9, false)), Err(Objection::Already));
        assert_eq!(ask(Some(&named), promote(9, true)), Ok((Some(Version(9)), true)));
        assert_eq!(ask(Some(&pinned), promote(12, false)), Err(Objection::Pinned(Version(9))));
    }

    #[test]
    fn batches_that_the_lineage_has_published_are_not_published_again() {
        assert!(goes_forward(1, None, None, false));
        assert!(!goes_forward(9, Some(10), None, false), "older than the newest version");
        assert!(!goes_forward(10, Some(10), Some(10), false), "is live already");
        assert!(goes_forward(10, Some(10), Some(8), false), "was written, but the channel never named it");
        assert!(!goes_forward(10, Some(10), Some(8), true), "was written, and the pinned channel names none");
        assert!(goes_forward(11, Some(10), Some(8), true));
        assert!(goes_forward(11, Some(10), Some(10), false));
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
