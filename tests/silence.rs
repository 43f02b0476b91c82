//! Who is awaited when click partitions fall silent: the merge against the definitions, in virtual wall time.

use proptest::prelude::*;
use tidemill::event::{Chunk, Kind, Record, Stream, Time};
use tidemill::merge::{Attention, Bounds, Decision, Merge, Rules, Step, StreamRules, WaitReason};
use tidemill::position::{Fingerprint, NextOffset};

const OUT_OF_ORDER: i64 = 50;
const WINDOW: i64 = 200;
const IDLE: i64 = 100;
const EXPECTED: u64 = 5;

fn rules() -> Rules {
    let bounds = Bounds { out_of_order: OUT_OF_ORDER, ahead: OUT_OF_ORDER };
    let stream = StreamRules { bounds, idle_after: Some(IDLE), max_lag: None };
    Rules { impressions: stream, clicks: stream, window: WINDOW, until: None, quiet_after: None, expected: EXPECTED }
}

fn chunk(kind: Kind, times: &[i64], first: u64) -> Box<Chunk> {
    let mut chunk = Chunk::default();
    for (index, &time) in times.iter().enumerate() {
        chunk.records.push(Record {
            id: first + index as u64 + 1,
            event_time: Time(time),
            log_time: Time::MIN,
            offset: first + index as u64,
            row: 0,
            weight: 1.0,
            slots_start: 0,
            slots_len: 0,
            text_start: 0,
            text_len: 0,
            before: 0,
            content: 0,
            kind,
        });
    }
    chunk.next = NextOffset { offset: first + times.len() as u64, before: Fingerprint::NONE };
    chunk.seal();
    Box::new(chunk)
}

/// A merge of impressions every `10` ms in one partition and of clicks in others, each with what was read of it.
struct Live {
    merge: Merge,
    impressions: usize,
    clicks: Vec<usize>,
    /// Event times read, by click partition.
    read: Vec<Vec<i64>>,
    released: Vec<i64>,
    passed: Vec<u64>,
    /// Wall time, later than all event times.
    now: i64,
}

impl Live {
    fn new(rules: Rules, clicks: usize) -> Self {
        let mut merge = Merge::new(rules);
        let impressions = merge.add_partition("i", Stream::Impressions);
        let clicks: Vec<usize> = (0..clicks).map(|c| merge.add_partition(&format!("c{c}"), Stream::Clicks)).collect();
        let (read, passed) = (vec![Vec::new(); clicks.len()], vec![0; clicks.len()]);
        Self { merge, impressions, clicks, read, released: Vec::new(), passed, now: 1_000_000 }
    }

    fn impressions(&mut self, times: &[i64]) {
        let first = self.merge.counts().impressions_read;
        self.merge.offer(self.impressions, chunk(Kind::Impression, times, first), Time(self.now)).unwrap();
    }

    fn click(&mut self, c: usize, times: &[i64]) {
        let first = self.read[c].len() as u64;
        self.merge.offer(self.clicks[c], chunk(Kind::Click, times, first), Time(self.now)).unwrap();
        self.read[c].extend(times);
    }

    fn caught_up(&mut self, clicks: &[usize]) {
        for &c in clicks {
            self.merge.caught_up(self.clicks[c], Time(self.now));
        }
    }

    /// Wall time passes; the merge looks around twice, as its driver does.
    fn wait(&mut self, ms: i64) {
        self.now += ms;
        self.merge.tick(Time(self.now));
        self.merge.tick(Time(self.now));
    }

    fn release(&mut self) -> Option<WaitReason> {
        loop {
            match self.merge.release() {
                Step::Click(click) => {
                    let c = self.clicks.iter().position(|p| *p == click.partition as usize).unwrap();
                    self.passed[c] += 1;
                }
                Step::Impression(released) => self.released.push(released.key.time.0),
                Step::Wait { why, .. } => return Some(why),
                Step::End => return None,
            }
        }
    }

    fn attention(&self, c: usize) -> Attention {
        self.merge.attention(self.clicks[c])
    }
}

/// Clicks every `every` ms of event time up to and without `to`.
fn every(every: i64, from: i64, to: i64) -> Vec<i64> {
    (from..to).step_by(every as usize).collect()
}

/// Four click partitions of equal share that were read to 2000, with impressions to 5000.
fn four(rules: Rules) -> Live {
    let mut live = Live::new(rules, 4);
    live.impressions(&every(10, 0, 5000));
    for c in 0..4 {
        live.click(c, &every(20, 0, 2000));
    }
    live.release();
    live
}

#[test]
fn one_of_four_click_partitions_that_falls_silent_is_stalled_and_awaited_once_its_clicks_are_missing() {
    let mut live = four(rules());
    let before = live.released.len();
    live.caught_up(&[0]);
    // The others go on; a quarter of the clicks is missing, some 30 where 5 are allowed.
    live.now += IDLE;
    live.merge.tick(Time(live.now));
    assert!(live.clicks[1..].iter().all(|&c| live.merge.wants(c)), "the others are read ahead, to judge the silence");
    for c in 1..4 {
        live.click(c, &every(20, 2000, 2600));
    }
    live.caught_up(&[1, 2, 3]);
    live.wait(0);
    assert_eq!(live.attention(0), Attention::Stalled);
    assert!(live.merge.missing(live.clicks[0]) > 15.0);
    assert_eq!(live.release(), Some(WaitReason::ClickStalled));
    assert_eq!(live.released.len(), before, "nothing was released without it");
    live.wait(1_000_000);
    assert_eq!(live.release(), Some(WaitReason::ClickStalled), "however long it takes");
    // It returns, and nothing that it brings was overtaken.
    live.click(0, &every(20, 2000, 2600));
    live.release();
    assert_eq!(live.attention(0), Attention::Awaited);
    assert!(live.released.len() > before);
    assert!(live.merge.journal().is_empty());
}

#[test]
fn a_partition_with_a_small_share_is_idle_until_as_many_clicks_are_missing() {
    let mut live = Live::new(rules(), 2);
    live.impressions(&every(10, 0, 50_000));
    live.click(0, &every(100, 0, 2000)); // 20 of some 400: after the discount for chance 12 of 380
    live.click(1, &every(5, 0, 2000));
    live.caught_up(&[0]);
    live.release();
    live.now += IDLE;
    live.merge.tick(Time(live.now));
    live.click(1, &every(5, 2000, 2400));
    live.caught_up(&[1]);
    live.wait(0);
    assert_eq!(live.attention(0), Attention::Idle);
    let before = live.released.len();
    live.release();
    assert!(live.released.len() > before, "it is not waited for");
    // Without its driver's looking around, as soon as the clicks are read.
    live.click(1, &every(5, 2400, 3200));
    assert_eq!(live.attention(0), Attention::Stalled);
    assert_eq!(live.release(), Some(WaitReason::ClickStalled));
}

#[test]
fn a_partition_that_was_rotated_away_is_not_missed_where_its_successor_brings_its_clicks() {
    let mut live = Live::new(rules(), 2);
    live.impressions(&every(10, 0, 9000));
    live.click(0, &every(20, 0, 2000));
    live.click(1, &every(20, 0, 2000));
    live.caught_up(&[0]);
    live.release();
    // The clicks of the first go on in a new partition.
    live.clicks.push(live.merge.add_partition("new", Stream::Clicks));
    live.read.push(Vec::new());
    live.passed.push(0);
    for (from, to) in [(2000, 2500), (2500, 3000), (3000, 8000)] {
        live.click(2, &every(20, from, to));
        live.click(1, &every(20, from, to));
        live.caught_up(&[1, 2]);
        live.wait(IDLE);
        live.release();
    }
    assert_eq!(live.attention(0), Attention::Idle);
    assert!(*live.released.last().unwrap() > 7000);
}

#[test]
fn when_the_stream_was_silent_as_a_whole_and_speaks_again_all_its_partitions_are_awaited_anew() {
    let mut live = four(rules());
    live.caught_up(&[0, 1, 2, 3]);
    live.wait(IDLE);
    assert_eq!(live.release(), Some(WaitReason::ClickSilence));
    let before = live.released.len();
    live.click(2, &[2000, 2900]);
    assert!((0..4).all(|c| live.attention(c) == Attention::Awaited));
    assert_eq!(live.release(), Some(WaitReason::Clicks));
    assert_eq!(live.released.len(), before);
    for c in [0, 1, 3] {
        live.click(c, &[2000, 2900]);
    }
    live.release();
    assert!(live.released.len() > before);
    assert!(live.merge.journal().is_empty());
}

#[test]
fn a_click_partition_that_has_ended_does_not_speak_for_the_stream() {
    let mut live = Live::new(rules(), 2);
    live.impressions(&every(10, 0, 5000));
    for c in 0..2 {
        live.click(c, &every(20, 0, 1000));
    }
    live.merge.ended(live.clicks[1]).unwrap(); // its file was rotated away
    live.caught_up(&[0]);
    live.release();
    let before = live.released.len();
    live.wait(1_000_000);
    assert_eq!(live.release(), Some(WaitReason::ClickSilence));
    assert_eq!(live.released.len(), before);
}

#[test]
fn a_stream_let_go_by_quiet_after_is_awaited_again_with_its_next_click() {
    let mut rules = rules();
    rules.quiet_after = Some(1000);
    let mut live = four(rules);
    live.caught_up(&[0, 1, 2, 3]);
    live.wait(1000);
    live.release();
    assert_eq!(*live.released.last().unwrap(), 4930, "all but the disorder of the impressions");
    live.impressions(&every(10, 5000, 9000));
    live.click(1, &[5400]);
    assert_eq!(live.release(), Some(WaitReason::Clicks));
    assert_eq!(*live.released.last().unwrap(), 4930);
}

#[test]
fn an_operators_word_lets_silent_partitions_go_until_their_next_record_and_outlives_the_run() {
    let mut live = four(rules());
    live.caught_up(&[0, 1, 2, 3]);
    live.wait(IDLE);
    assert_eq!(live.release(), Some(WaitReason::ClickSilence));
    let holding = live.merge.holding();
    assert_eq!(holding, live.clicks);
    holding.iter().for_each(|&c| live.merge.waive(c));
    let mut positions = Vec::new();
    live.merge.positions(&mut positions);
    let positions = live.merge.checkpoint(&positions);
    let (frontier, journal) = (live.merge.frontier(), live.merge.journal().to_vec());
    assert!(journal.iter().all(|entry| entry.decision == Decision::Waived) && journal.len() == 4);

    let mut resumed = Live::new(rules(), 0);
    resumed.merge = Merge::new(rules());
    resumed.merge.resume(frontier, journal);
    for position in &positions {
        resumed.merge.add_resumed(position, std::iter::empty());
    }
    (resumed.clicks, resumed.passed) = (live.clicks.clone(), live.passed.clone());
    let from = positions[0].from.offset;
    let rest: Vec<i64> = every(10, 0, 5000).split_off(from as usize);
    resumed.merge.offer(0, chunk(Kind::Impression, &rest, from), Time(1_000_000)).unwrap();
    for merge in [&mut live, &mut resumed] {
        merge.release();
        assert_eq!(*merge.released.last().unwrap(), 4930);
    }
    // The next record of one ends it for that one.
    live.impressions(&every(10, 5000, 6000));
    live.click(2, &[5100]);
    assert_eq!(live.attention(2), Attention::Awaited);
    assert_eq!(live.release(), Some(WaitReason::Clicks));
}

#[test]
fn what_is_missing_of_a_partition_is_known_after_a_restart() {
    let mut live = four(rules());
    let mut positions = Vec::new();
    live.merge.positions(&mut positions);
    let positions = live.merge.checkpoint(&positions);
    let waiting: Vec<_> = live.merge.waiting_clicks().copied().collect();
    let mut merge = Merge::new(rules());
    merge.resume(live.merge.frontier(), Vec::new());
    for (index, position) in positions.iter().enumerate() {
        merge.add_resumed(position, waiting.iter().filter(|click| click.partition as usize == index).copied());
    }
    live.merge = merge;
    // The first has died with the run before.
    live.caught_up(&[0]);
    for c in 1..4 {
        live.click(c, &every(20, 2000, 2600));
    }
    live.caught_up(&[1, 2, 3]);
    live.wait(IDLE);
    assert_eq!(live.attention(0), Attention::Stalled);
}

/// What happens next: a click partition is read on by so much event time, or confirmed at its end, or wall time passes.
#[derive(Clone, Copy, Debug)]
enum Event {
    Read(usize, i64),
    CaughtUp(usize),
    Wait(i64),
}

fn events() -> impl Strategy<Value = Vec<Event>> {
    let event = prop_oneof![
        4 => (0usize..3, 1i64..400).prop_map(|(c, ms)| Event::Read(c, ms)),
        3 => (0usize..3).prop_map(Event::CaughtUp),
        2 => (1i64..150).prop_map(Event::Wait),
    ];
    prop::collection::vec(event, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    /// The definition by brute force, from all that was read: own and other clicks passed when it fell silent, and clicks of
    /// the others past the latest of its own.
    #[test]
    fn a_silent_click_partition_is_stalled_exactly_when_the_definition_says_so(
        events in events(), rates in prop::collection::vec(3i64..60, 3),
    ) {
        let mut live = Live::new(rules(), 3);
        live.impressions(&every(10, 0, 40_000));
        // Clicks passed when it fell silent, its own and of others; since when its end is confirmed; silent at the last look.
        let mut counted: [Option<(u64, u64)>; 3] = [None; 3];
        let mut confirmed: [Option<i64>; 3] = [None; 3];
        let mut silent = [false; 3];
        for event in events {
            match event {
                Event::Read(c, ms) => {
                    let from = live.read[c].last().map_or(0, |last| last + rates[c]);
                    live.click(c, &every(rates[c], from, from + ms));
                    if silent == [true; 3] {
                        (silent, confirmed) = ([false; 3], confirmed.map(|at| at.map(|_| live.now)));
                    }
                    (counted[c], confirmed[c], silent[c]) = (None, None, false);
                }
                Event::CaughtUp(c) => {
                    live.caught_up(&[c]);
                    confirmed[c] = Some(live.now);
                }
                Event::Wait(ms) => {
                    live.wait(ms);
                    for c in 0..3 {
                        silent[c] = confirmed[c].is_some_and(|at| live.now - at >= IDLE);
                        if silent[c] && counted[c].is_none() {
                            counted[c] = Some((live.passed[c], live.passed.iter().sum::<u64>() - live.passed[c]));
                        }
                    }
                }
            }
            for c in 0..3 {
                let Some((own, others)) = counted[c] else { continue };
                // An overtaken record has moved it past what was passed; else the latest that was read of it.
                let latest = live.merge.watermark(live.clicks[c]).plus(OUT_OF_ORDER).0;
                let (mut old, mut new) = (0.0, 0.0);
                for other in (0..3).filter(|other| *other != c) {
                    let beyond = live.read[other].iter().filter(|t| **t > latest).count() as f64;
                    let known = live.read[other].first().is_some_and(|first| *first <= latest);
                    *(if known { &mut old } else { &mut new }) += beyond;
                }
                let sure = ((own as f64).sqrt() - 1.0).max(0.0).powi(2);
                let missing = (sure / others.max(1) as f64 * old - new).max(0.0);
                prop_assert!((live.merge.missing(live.clicks[c]) - missing).abs() < 1e-9);
                prop_assert_eq!(live.attention(c) == Attention::Stalled, silent[c] && missing >= EXPECTED as f64);
                prop_assert!(live.attention(c) != Attention::Idle || silent[c]);
            }
            let before = live.released.len();
            live.release();
            for c in 0..3 {
                if live.attention(c) == Attention::Stalled && live.released.len() > before {
                    let last = *live.released.last().unwrap();
                    prop_assert!(Time(last + WINDOW) < live.merge.watermark(live.clicks[c]));
                }
            }
        }
    }
}
