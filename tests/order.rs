//! Merge and join against a brute-force oracle: any disorder, any split into partitions, any polling schedule.

use proptest::prelude::*;
use tidemill::event::{Chunk, Kind, Record, Slot, Stream, Time};
use tidemill::join::{Counts, Join, Label, Rules as JoinRules, Verdict};
use tidemill::merge::{Bounds, Merge, Rules, Step, StreamRules};
use tidemill::position::{Fingerprint, NextOffset};

const OUT_OF_ORDER: i64 = 50;
const WINDOW: i64 = 200;
const SKEW: i64 = 10;
const LATENESS: i64 = 60;

/// A record before it was decoded.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Raw {
    stream: Stream,
    id: u64,
    event_time: i64,
    /// Arrival in its partition: records of a partition are sorted by it.
    arrival: i64,
    content: u64,
    partition: usize,
    bad: bool,
}

type Log = Vec<(Stream, Vec<Raw>)>;

fn rules() -> Rules {
    let bounds = Bounds { out_of_order: OUT_OF_ORDER, ahead: OUT_OF_ORDER };
    let stream = StreamRules { bounds, idle_after: None, max_lag: None };
    Rules { impressions: stream, clicks: stream, window: WINDOW, until: None, quiet_after: None, expected: 20 }
}

fn join_rules() -> JoinRules {
    JoinRules { window: WINDOW, click_skew: SKEW, max_lateness: LATENESS, dedup_horizon: 1_000_000 }
}

/// Records with delays of up to `delay` ms: past the disorder bound they are late.
fn records(delay: i64) -> impl Strategy<Value = Vec<Raw>> {
    let impression = (0u64..30, 0i64..2000, 0..=delay, 0u64..3, 0usize..3, prop::bool::weighted(0.05));
    let impression = impression.prop_map(|(id, event_time, wait, content, partition, bad)| Raw {
        stream: Stream::Impressions,
        id: id + 1,
        event_time,
        arrival: event_time + wait,
        content,
        partition,
        bad,
    });
    let click = (0u64..32, 0i64..2300, 0..=delay, 0usize..3, prop::bool::weighted(0.05));
    let click = click.prop_map(|(id, event_time, wait, partition, bad)| Raw {
        stream: Stream::Clicks,
        id: id + 1,
        event_time,
        arrival: event_time + wait,
        content: 0,
        partition,
        bad,
    });
    (prop::collection::vec(impression, 1..60), prop::collection::vec(click, 1..60)).prop_map(|(mut a, b)| {
        a.extend(b);
        a
    })
}

/// Three partitions a stream; which record lies where is given by `at`.
fn log(records: &[Raw], at: impl Fn(&Raw) -> usize) -> Log {
    let mut log: Log = (0..6).map(|p| (if p < 3 { Stream::Impressions } else { Stream::Clicks }, Vec::new())).collect();
    for record in records {
        log[at(record) + 3 * record.stream as usize].1.push(*record);
    }
    for (_, records) in &mut log {
        records.sort_by_key(|record| record.arrival);
    }
    log
}

/// What an impression came to, and by which place: the oracle's and the product's answer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Answer {
    time: i64,
    id: u64,
    content: u64,
    partition: usize,
    offset: usize,
    what: &'static str,
}

fn seal(raw: &Raw, offset: usize, chunk: &mut Chunk) {
    let start = chunk.slots.len() as u32;
    chunk.slots.push(Slot { row: raw.content + 1, value: 1.0, feature: 0, flags: 0 });
    let kind = match (raw.bad, raw.stream) {
        (true, _) => Kind::Rejected,
        (_, Stream::Impressions) => Kind::Impression,
        (_, Stream::Clicks) => Kind::Click,
    };
    let (text_start, text) = (chunk.text.len() as u32, offset.to_le_bytes());
    if raw.bad {
        chunk.rejects.push((chunk.records.len() as u32, "bad".into()));
        chunk.text.extend_from_slice(&text);
    }
    chunk.records.push(Record {
        id: if raw.bad { 0 } else { raw.id },
        event_time: if raw.bad { Time::MIN } else { Time(raw.event_time) },
        log_time: Time::MIN,
        offset: offset as u64,
        row: 0,
        weight: 1.0,
        slots_start: start,
        slots_len: 1,
        text_start,
        text_len: if raw.bad { text.len() as u32 } else { 0 },
        before: 0,
        content: 0,
        kind,
    });
}

fn chunk(records: &[Raw], first: usize) -> Box<Chunk> {
    let mut chunk = Chunk::default();
    for (index, raw) in records.iter().enumerate() {
        seal(raw, first + index, &mut chunk);
    }
    chunk.next = NextOffset { offset: (first + records.len()) as u64, before: Fingerprint::NONE };
    chunk.seal();
    Box::new(chunk)
}

/// The definitions of `docs/semantics.md`, in quadratic time over the complete log.
fn oracle(log: &Log) -> (Vec<Answer>, Counts, u64) {
    struct Placed {
        raw: Raw,
        time: i64,
        partition: usize,
        offset: usize,
        content: u64,
        late: bool,
    }
    let mut placed: Vec<Placed> = Vec::new();
    for (partition, (_, records)) in log.iter().enumerate() {
        let mut newest = i64::MIN;
        let all = chunk(records, 0);
        for (offset, raw) in records.iter().enumerate() {
            let w = if newest == i64::MIN { i64::MIN } else { newest - OUT_OF_ORDER };
            let (time, late) = if raw.bad { (w, false) } else { (raw.event_time.max(w), raw.event_time < w) };
            if !raw.bad {
                newest = newest.max(raw.event_time);
            }
            let content = all.records[offset].content;
            placed.push(Placed { raw: *raw, time, partition, offset, content, late });
        }
    }
    placed.sort_by_key(|p| {
        let id = if p.raw.bad { 0 } else { p.raw.id };
        (p.time, p.raw.stream, id, p.content, p.partition, p.offset)
    });
    let (impressions, clicks): (Vec<&Placed>, Vec<&Placed>) =
        placed.iter().partition(|p| p.raw.stream == Stream::Impressions);
    let mut counts = Counts::default();
    let plus = |t: i64, ms: i64| if t == i64::MIN { t } else { t + ms };
    let in_window = |click: &Placed, e: i64| (-SKEW..=WINDOW).contains(&(click.raw.event_time - e));
    let mut answers = Vec::new();
    let mut owners: Vec<(&Placed, bool, bool)> = Vec::new(); // impression, positive, too late
    for i in &impressions {
        counts.impressions += 1;
        counts.late += u64::from(i.late);
        let what = if i.raw.bad {
            counts.rejected += 1;
            "rejected"
        } else if owners.iter().any(|(o, ..)| o.raw.id == i.raw.id) {
            counts.duplicates += 1;
            "duplicate"
        } else {
            let too_late = i.time - i.raw.event_time > LATENESS;
            let hit = |c: &&Placed| {
                !c.raw.bad && c.raw.id == i.raw.id && in_window(c, i.raw.event_time) && c.time <= i.time + WINDOW
            };
            let positive = !too_late && clicks.iter().copied().any(|c| hit(&c));
            owners.push((i, positive, too_late));
            match (too_late, positive) {
                (true, _) => {
                    counts.too_late += 1;
                    "too late"
                }
                (_, true) => {
                    counts.positives += 1;
                    "positive"
                }
                _ => {
                    counts.negatives += 1;
                    "negative"
                }
            }
        };
        let id = if i.raw.bad { 0 } else { i.raw.id };
        let (partition, offset) = (i.partition, i.offset);
        answers.push(Answer { time: i.time, id, content: i.content, partition, offset, what });
    }
    let frontier = impressions.last().map_or(i64::MIN, |i| i.time);
    let mut waiting = 0;
    let mut attributed: Vec<u64> = Vec::new();
    for c in clicks.iter().filter(|c| c.time <= plus(frontier, WINDOW)) {
        counts.clicks += 1;
        counts.clicks_late += u64::from(c.late);
        if c.raw.bad {
            counts.clicks_rejected += 1;
            continue;
        }
        let gone = |t: i64| t > plus(c.time, LATENESS + SKEW);
        let owner = owners.iter().find(|(o, ..)| o.raw.id == c.raw.id);
        // Given up before its impression came?
        let given_up = |o: &Placed| {
            let place = impressions.iter().position(|i| std::ptr::eq(*i, o)).unwrap();
            impressions[..=place].iter().any(|i| !i.raw.bad && gone(i.time))
        };
        match owner {
            Some((o, positive, too_late)) if c.time <= plus(o.time, WINDOW) && !given_up(o) => {
                let id = o.raw.id;
                if !in_window(c, o.raw.event_time) {
                    counts.clicks_outside += 1;
                } else if *too_late {
                    counts.clicks_missed += 1;
                } else if attributed.contains(&id) {
                    counts.clicks_duplicate += 1;
                } else {
                    assert!(*positive);
                    attributed.push(id);
                    counts.clicks_attributed += 1;
                }
            }
            Some((o, positive, _)) if c.time > plus(o.time, WINDOW) => {
                if !in_window(c, o.raw.event_time) {
                    counts.clicks_outside += 1;
                } else if *positive {
                    counts.clicks_duplicate += 1;
                } else {
                    counts.clicks_missed += 1;
                }
            }
            Some(_) => counts.clicks_orphan += 1,
            None if impressions.iter().any(|i| !i.raw.bad && gone(i.time)) => counts.clicks_orphan += 1,
            None => waiting += 1,
        }
    }
    (answers, counts, waiting)
}

/// The product, fed in chunks of random lengths in an order given by `schedule`.
fn product(log: &Log, schedule: &[(usize, usize)]) -> (Vec<Answer>, Counts, u64) {
    let mut merge = Merge::new(rules());
    let mut join = Join::new(join_rules());
    for (index, (stream, _)) in log.iter().enumerate() {
        merge.add_partition(&index.to_string(), *stream);
    }
    let mut at = vec![0; log.len()];
    let mut ended = vec![false; log.len()];
    let mut answers = Vec::new();
    let mut steps = schedule.iter().copied().cycle();
    let mut drain = |merge: &mut Merge, join: &mut Join| loop {
        match merge.release() {
            Step::Click(click) => join.place(click),
            Step::Impression(released) => {
                join.counts.impressions += 1;
                join.counts.late += u64::from(released.late);
                let (_, record) = merge.record(&released);
                let key = released.key;
                let what = if released.rejected {
                    join.counts.rejected += 1;
                    "rejected"
                } else {
                    match join.release(key.id, key.time, record.event_time) {
                        Verdict::Duplicate => "duplicate",
                        Verdict::TooLate => "too late",
                        Verdict::Labelled(Label::Positive) => {
                            join.counts.positives += 1;
                            "positive"
                        }
                        Verdict::Labelled(Label::Negative) => {
                            join.counts.negatives += 1;
                            "negative"
                        }
                    }
                };
                let (partition, offset) = (key.partition as usize, key.offset as usize);
                answers.push(Answer { time: key.time.0, id: key.id, content: key.content, partition, offset, what });
            }
            Step::Wait { .. } => return false,
            Step::End => return true,
        }
    };
    for _ in 0..100_000 {
        let (pick, len) = steps.next().unwrap();
        let open: Vec<usize> = (0..log.len()).filter(|p| !ended[*p]).collect();
        if let Some(&partition) = open.get(pick % open.len().max(1)) {
            let rest = &log[partition].1[at[partition]..];
            if rest.is_empty() {
                ended[partition] = true;
                merge.ended(partition).unwrap();
            } else {
                let len = (len % 7 + 1).min(rest.len());
                merge.offer(partition, chunk(&rest[..len], at[partition]), Time::MAX).unwrap();
                at[partition] += len;
            }
        }
        if drain(&mut merge, &mut join) {
            return (answers, join.counts, join.waiting());
        }
    }
    panic!("the merge did not come to its end");
}

fn schedule() -> impl Strategy<Value = Vec<(usize, usize)>> {
    prop::collection::vec((0usize..60, 0usize..60), 1..50)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn labels_order_and_counts_equal_the_definitions_under_any_disorder_and_schedule(
        records in records(160), schedule in schedule(),
    ) {
        let log = log(&records, |record| record.partition);
        let (answers, counts, waiting) = product(&log, &schedule);
        let (expected, expected_counts, expected_waiting) = oracle(&log);
        prop_assert_eq!(answers, expected);
        prop_assert_eq!(counts, expected_counts);
        prop_assert_eq!(waiting, expected_waiting);
        prop_assert_eq!(counts.impression_gap(), 0);
        prop_assert_eq!(counts.click_gap(waiting), 0);
    }

    #[test]
    fn while_nothing_is_late_the_layout_does_not_matter(
        records in records(OUT_OF_ORDER), schedule in schedule(), other in 0usize..3,
    ) {
        // Rejects take their partition's watermark as their place, so they do depend on where they lie.
        let records: Vec<Raw> = records.into_iter().filter(|record| !record.bad).collect();
        let here = product(&log(&records, |record| record.partition), &schedule);
        let there = product(&log(&records, |record| (record.partition * 2 + other) % 3), &schedule);
        let one = product(&log(&records, |_| 0), &schedule);
        let seen = |answers: &[Answer]| answers.iter().map(|a| (a.time, a.id, a.content, a.what)).collect::<Vec<_>>();
        prop_assert_eq!(seen(&here.0), seen(&there.0));
        prop_assert_eq!(seen(&here.0), seen(&one.0));
        prop_assert_eq!((here.1, here.2), (there.1, there.2));
    }
}

/// A log of one impression partition and one click partition.
fn small(impressions: &[(u64, i64)], clicks: &[(u64, i64)]) -> Log {
    let raw = |stream, &(id, event_time): &(u64, i64)| Raw {
        stream,
        id,
        event_time,
        arrival: event_time,
        content: 0,
        partition: 0,
        bad: false,
    };
    vec![
        (Stream::Impressions, impressions.iter().map(|r| raw(Stream::Impressions, r)).collect()),
        (Stream::Clicks, clicks.iter().map(|r| raw(Stream::Clicks, r)).collect()),
    ]
}

fn labels(log: &Log) -> Vec<&'static str> {
    product(log, &[(0, 0), (1, 0)]).0.iter().map(|answer| answer.what).collect()
}

#[test]
fn a_click_at_the_very_end_of_the_window_counts_and_one_a_millisecond_later_does_not() {
    assert_eq!(labels(&small(&[(1, 1000)], &[(1, 1000 + WINDOW)])), ["positive"]);
    assert_eq!(labels(&small(&[(1, 1000)], &[(1, 1001 + WINDOW)])), ["negative"]);
}

#[test]
fn a_click_stamped_before_its_impression_counts_up_to_the_clock_skew() {
    assert_eq!(labels(&small(&[(1, 1000)], &[(1, 1000 - SKEW)])), ["positive"]);
    assert_eq!(labels(&small(&[(1, 1000)], &[(1, 999 - SKEW)])), ["negative"]);
}

#[test]
fn an_impression_is_held_until_every_awaited_click_partition_is_strictly_past_its_window() {
    let mut merge = Merge::new(rules());
    let impressions = merge.add_partition("i", Stream::Impressions);
    let clicks = [merge.add_partition("c0", Stream::Clicks), merge.add_partition("c1", Stream::Clicks)];
    let log = small(&[(1, 1000), (2, 5000)], &[(9, 1000 + WINDOW + OUT_OF_ORDER), (9, 1001 + WINDOW + OUT_OF_ORDER)]);
    merge.offer(impressions, chunk(&log[0].1, 0), Time::MAX).unwrap();
    merge.offer(clicks[0], chunk(&log[1].1, 0), Time::MAX).unwrap();
    merge.offer(clicks[1], chunk(&log[1].1[..1], 0), Time::MAX).unwrap();
    // The second partition's watermark equals the end of the window: an equal time may still come.
    assert!(matches!(merge.release(), Step::Wait { on: Some(p), .. } if p == clicks[1]));
    merge.offer(clicks[1], chunk(&log[1].1[1..], 1), Time::MAX).unwrap();
    assert!(matches!(merge.release(), Step::Impression(_)));
}

#[test]
fn a_silent_click_stream_holds_the_release_even_when_all_its_partitions_are_idle() {
    let mut rules = rules();
    rules.clicks.idle_after = Some(100);
    rules.impressions.idle_after = Some(100);
    let mut merge = Merge::new(rules);
    let impressions = merge.add_partition("i", Stream::Impressions);
    let clicks = merge.add_partition("c", Stream::Clicks);
    let log = small(&[(1, 1000), (2, 5000)], &[(9, 1100)]);
    merge.offer(impressions, chunk(&log[0].1, 0), Time::MAX).unwrap();
    merge.offer(clicks, chunk(&log[1].1, 0), Time::MAX).unwrap();
    merge.caught_up(clicks, Time(0));
    merge.caught_up(impressions, Time(0));
    merge.tick(Time(1_000_000));
    assert!(matches!(merge.release(), Step::Wait { on: None, why: tidemill::merge::WaitReason::ClickSilence }));
    // A heartbeat is enough to let it go on.
    let mut alive = chunk(&[], 1);
    alive.records.push(Record {
        kind: Kind::Heartbeat,
        event_time: Time(3000),
        id: 0,
        ..chunk(&log[1].1, 1).records[0]
    });
    merge.offer(clicks, alive, Time::MAX).unwrap();
    assert!(matches!(merge.release(), Step::Click(_)));
    assert!(matches!(merge.release(), Step::Impression(_)));
}

#[test]
fn an_idle_impression_partition_is_not_waited_for_and_what_it_brings_later_is_overtaken_and_journaled() {
    let mut rules = rules();
    rules.impressions.idle_after = Some(100);
    let mut merge = Merge::new(rules);
    let (busy, idle) = (merge.add_partition("a", Stream::Impressions), merge.add_partition("b", Stream::Impressions));
    let clicks = merge.add_partition("c", Stream::Clicks);
    let log = small(&[(1, 1000), (2, 5000)], &[(9, 9000)]);
    merge.offer(busy, chunk(&log[0].1, 0), Time::MAX).unwrap();
    merge.offer(clicks, chunk(&log[1].1, 0), Time::MAX).unwrap();
    assert!(matches!(merge.release(), Step::Wait { on: Some(p), .. } if p == idle));
    merge.caught_up(idle, Time(0));
    merge.tick(Time(99));
    assert!(matches!(merge.release(), Step::Wait { .. }));
    merge.tick(Time(100));
    let Step::Impression(first) = merge.release() else { panic!("released") };
    assert_eq!(first.key.time, Time(1000));
    // Now the idle partition brings something older than what was released.
    let late = small(&[(3, 900), (4, 1500)], &[]);
    merge.offer(idle, chunk(&late[0].1, 0), Time::MAX).unwrap();
    assert_eq!(merge.counts().overtaken, 1);
    let [entry] = merge.journal() else { panic!("one entry") };
    assert_eq!((entry.offset, entry.time), (0, Time(2000)));

    // A replay under this journal gives the same places, though nothing is idle there.
    let mut replay = Merge::new(rules);
    let journal = merge.journal().to_vec();
    replay.resume(None, journal);
    for (name, stream) in [("a", Stream::Impressions), ("b", Stream::Impressions), ("c", Stream::Clicks)] {
        replay.add_partition(name, stream);
    }
    replay.offer(busy, chunk(&log[0].1, 0), Time::MAX).unwrap();
    replay.offer(idle, chunk(&late[0].1, 0), Time::MAX).unwrap();
    replay.offer(clicks, chunk(&log[1].1, 0), Time::MAX).unwrap();
    merge.ended(idle).unwrap();
    replay.ended(idle).unwrap();
    let places = |merge: &mut Merge| {
        let mut places = Vec::new();
        loop {
            match merge.release() {
                Step::Impression(released) => places.push((released.key.time.0, released.key.id)),
                Step::Click(_) => {}
                Step::Wait { .. } | Step::End => return places,
            }
        }
    };
    let live: Vec<_> = [(1000, 1)].into_iter().chain(places(&mut merge)).collect();
    assert_eq!(live, places(&mut replay));
    assert_eq!(live, [(1000, 1), (2000, 3), (2000, 4)]);
}

#[test]
fn a_record_from_the_future_is_rejected_and_does_not_drag_the_watermark() {
    let mut merge = Merge::new(rules());
    let impressions = merge.add_partition("i", Stream::Impressions);
    let day = 24 * 3600 * 1000;
    let log = small(&[(1, 1000), (2, 1000 + day), (3, 1010)], &[]);
    merge.offer(impressions, chunk(&log[0].1, 0), Time(1005)).unwrap();
    assert_eq!(merge.watermark(impressions), Time(1010 - OUT_OF_ORDER));
    let [tidemill::merge::Rejected { offset, reason, .. }] = &merge.take_rejected()[..] else { panic!("one reject") };
    assert_eq!(*offset, 1);
    assert!(reason.contains("ahead of its clock"), "{reason}");
    assert_eq!(merge.journal().len(), 1, "what the clock decided is journaled");
}
