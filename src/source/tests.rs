//! What the rest of Tidemill may rely on when it reads files. All on real files, with a decoder that keeps the raw record.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use tempfile::TempDir;

use super::file::name_of;
use super::*;
use crate::event::{Kind, Record, Stream, Time};

/// Keeps each record's bytes as its text; panics on `panic`, and is not to be used again after that.
#[derive(Default)]
struct Raw {
    at_work: bool,
}

impl Decode for Raw {
    fn decode(&mut self, raw: &[u8], offset: u64, before: Fingerprint, out: &mut Chunk) {
        assert!(!self.at_work, "used again after a panic");
        self.at_work = true;
        assert!(raw != b"panic", "told to");
        let (text_start, text_len) = (out.text.len() as u32, raw.len() as u32);
        out.text.extend_from_slice(raw);
        out.records.push(Record {
            id: 1,
            event_time: Time(0),
            log_time: Time::MIN,
            offset,
            row: 0,
            weight: 1.0,
            slots_start: 0,
            slots_len: 0,
            text_start,
            text_len,
            before: before.0,
            content: 0,
            kind: Kind::Click,
        });
        self.at_work = false;
    }
}

fn raw() -> NewDecoder {
    Arc::new(|| Box::new(Raw::default()))
}

const FOLLOW: Mode = Mode::Follow { poll: Duration::from_millis(1) };

fn spec(path: &Path, mode: Mode) -> Spec {
    let (stream, from) = (Stream::Clicks, NextOffset::default());
    Spec { path: path.into(), object: None, stream, mode, from, decoder: raw(), max_record: 1 << 20, queue: 4 }
}

fn from(spec: Spec, from: NextOffset) -> Spec {
    Spec { from, ..spec }
}

/// One record as it arrived, or as it should.
#[derive(PartialEq, Clone, Debug)]
struct Seen {
    offset: u64,
    before: Fingerprint,
    text: Vec<u8>,
    reason: String,
}

impl Seen {
    fn position(&self) -> NextOffset {
        NextOffset { offset: self.offset, before: self.before }
    }
}

/// Waits for the next arrival; a test that waits longer than this is broken.
fn arrival(partition: &mut Partition) -> Arrival {
    partition.next_timeout(Duration::from_secs(60)).expect("something arrives")
}

/// Takes records until something else arrives, which comes second.
fn take(partition: &mut Partition, recycler: &Recycler) -> (Vec<Seen>, Arrival) {
    let mut seen = Vec::new();
    let mut at = None;
    loop {
        match arrival(partition) {
            Arrival::Records(chunk) => {
                for (index, record) in chunk.records.iter().enumerate() {
                    assert_eq!(record.kind == Kind::Rejected, !chunk.reason_of(index).is_empty());
                    seen.push(Seen {
                        offset: record.offset,
                        before: Fingerprint(record.before),
                        text: chunk.text_of(record).to_vec(),
                        reason: chunk.reason_of(index).into(),
                    });
                }
                if let Some(at) = at.replace(chunk.next.offset) {
                    assert_eq!(chunk.next.offset - at, chunk.bytes, "chunks follow each other without a gap");
                }
                recycler.give(chunk);
            }
            other => return (seen, other),
        }
    }
}

fn read(spec: Spec, threads: usize) -> (Vec<Seen>, Arrival) {
    let (_sources, mut partitions, recycler) = Sources::open(vec![spec], threads).unwrap();
    take(&mut partitions[0], &recycler)
}

/// The records of a bounded file, and its end.
fn read_all(spec: Spec) -> (Vec<Seen>, NextOffset) {
    match read(spec, 2) {
        (seen, Arrival::Ended { next }) => (seen, next),
        (_, other) => panic!("{other:?}"),
    }
}

fn failure(spec: Spec) -> (Vec<Seen>, Error) {
    match read(spec, 2) {
        (seen, Arrival::Failed(error)) => (seen, error),
        (_, other) => panic!("{other:?}"),
    }
}

/// What `content` holds, by the rules and as simply as can be.
fn oracle(content: &[u8], max_record: usize, last_counts: bool) -> (Vec<Seen>, NextOffset) {
    let (mut seen, mut next) = (Vec::new(), NextOffset::default());
    for line in content.split_inclusive(|byte| *byte == b'\n') {
        if !line.ends_with(b"\n") && !last_counts {
            break;
        }
        let raw = line.strip_suffix(b"\n").unwrap_or(line);
        let raw = raw.strip_suffix(b"\r").unwrap_or(raw);
        if !raw.trim_ascii().is_empty() {
            let long = raw.len() > max_record;
            let kept = raw.len().min(4096);
            let reason = format!(
                "the record has {} bytes, more than `max_record` = {max_record}; its first {kept} bytes are kept",
                raw.len()
            );
            seen.push(Seen {
                offset: next.offset,
                before: next.before,
                text: if long { &raw[..kept] } else { raw }.to_vec(),
                reason: if long { reason } else { String::new() },
            });
            next.before = Fingerprint::of(raw);
        }
        next.offset += line.len() as u64;
    }
    (seen, next)
}

/// `n` lines of uneven length, some blank, some with `\r`, each different.
fn log(n: usize) -> Vec<u8> {
    let mut content = Vec::new();
    for i in 0..n {
        let end = if i % 7 == 3 { "\r\n" } else { "\n" };
        let pad = "x".repeat((i * 7919) % 500);
        if i % 101 == 50 {
            content.extend_from_slice(b" \r\n\n");
        }
        write!(content, "{{\"id\":{i},\"pad\":\"{pad}\"}}{end}").unwrap();
    }
    content
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Format {
    Plain,
    Gzip,
    Zstd,
}

const FORMATS: [Format; 3] = [Format::Plain, Format::Gzip, Format::Zstd];

/// Packs `content` in two members or frames.
fn packed(content: &[u8], format: Format) -> Vec<u8> {
    let (a, b) = content.split_at(content.len() / 3);
    let pack = |piece: &[u8]| match format {
        Format::Plain => piece.to_vec(),
        Format::Gzip => {
            let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gz.write_all(piece).unwrap();
            gz.finish().unwrap()
        }
        Format::Zstd => zstd::encode_all(piece, 1).unwrap(),
    };
    [pack(a), pack(b)].concat()
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

fn append(path: &Path, bytes: &[u8]) {
    OpenOptions::new().append(true).open(path).unwrap().write_all(bytes).unwrap();
}

#[test]
fn plain_gzip_and_zstd_hold_the_same_records_whatever_their_names() {
    let (folder, content) = (Folder::new(), log(5000));
    let expected = oracle(&content, 1 << 20, true);
    for format in FORMATS {
        let path = folder.write("log.zst", &packed(&content, format));
        assert_eq!(read_all(spec(&path, Mode::Bounded)), expected, "{format:?}");
    }
}

#[test]
fn any_number_of_decoders_gives_the_same_chunks() {
    let (folder, content) = (Folder::new(), log(20_000));
    let path = folder.write("log", &content);
    let chunks = |threads| {
        let (_sources, mut partitions, _) = Sources::open(vec![spec(&path, Mode::Bounded)], threads).unwrap();
        let mut chunks = Vec::new();
        while let Arrival::Records(chunk) = arrival(&mut partitions[0]) {
            chunks.push((chunk.records, chunk.text, chunk.next, chunk.bytes));
        }
        chunks
    };
    let one = chunks(1);
    assert!(one.len() > 20, "{} chunks", one.len());
    assert!(one == chunks(2) && one == chunks(4));
}

#[test]
fn chunks_of_short_records_are_not_large() {
    let folder = Folder::new();
    let path = folder.write("log", &b"{\"id\":12345}\n".repeat(100_000));
    let (_sources, mut partitions, _) = Sources::open(vec![spec(&path, Mode::Bounded)], 1).unwrap();
    let mut sizes = Vec::new();
    while let Arrival::Records(chunk) = arrival(&mut partitions[0]) {
        sizes.push(chunk.records.len());
    }
    assert!(sizes[1..].iter().all(|size| *size <= 2048), "{sizes:?}");
}

#[test]
fn an_empty_file_ends_or_is_caught_up_at_once() {
    let path = Folder::new();
    let path = path.write("log", b"");
    assert_eq!(read_all(spec(&path, Mode::Bounded)), (vec![], NextOffset::default()));
    let (seen, end) = read(spec(&path, FOLLOW), 1);
    assert!(seen.is_empty() && matches!(end, Arrival::CaughtUp { next } if next == NextOffset::default()));
}

/// Lines of every kind: short, blank, around the longest allowed, longer than a block.
fn line() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![
        6 => 0..300usize,
        2 => 95..105usize,
        1 => 4000..5000usize,
        1 => 120_000..300_000usize,
    ];
    let byte = prop_oneof![8 => Just(b'x'), 1 => Just(b' '), 1 => Just(b'\r')];
    let end = prop_oneof![Just(&b"\n"[..]), Just(&b"\r\n"[..])];
    (length, byte, any::<u8>(), end).prop_map(|(n, byte, first, end)| {
        let mut line = vec![byte; n];
        if byte == b'\r' && first % 2 == 1 {
            line.iter_mut().step_by(3).for_each(|byte| *byte = b'y'); // a piece of it may end in `\r`
        }
        if byte == b'x' && n > 0 {
            line[0] = b'a' + first % 26;
        }
        [&line, end].concat()
    })
}

fn content() -> impl Strategy<Value = Vec<u8>> {
    (prop::collection::vec(line(), 0..40), any::<bool>()).prop_map(|(lines, ended)| {
        let mut content = lines.concat();
        if !ended {
            content.pop();
        }
        content
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn records_positions_and_fingerprints_are_those_of_the_text(content in content(), max in prop_oneof![
        Just(1usize), Just(100), Just(4500), Just(150_000), Just(1 << 20)
    ]) {
        let folder = Folder::new();
        let expected = oracle(&content, max, true);
        for format in FORMATS {
            let path = folder.write("log", &packed(&content, format));
            let spec = Spec { max_record: max, ..spec(&path, Mode::Bounded) };
            prop_assert!(read_all(spec) == expected, "{:?}", format);
        }
    }

    #[test]
    fn reading_resumes_at_every_record(content in content(), max in prop_oneof![Just(100usize), Just(1 << 20)]) {
        let folder = Folder::new();
        let (expected, end) = oracle(&content, max, true);
        for format in FORMATS {
            let path = folder.write("log", &packed(&content, format));
            let spec = Spec { max_record: max, ..spec(&path, Mode::Bounded) };
            for start in 0..=expected.len() {
                let at = expected.get(start).map_or(end, Seen::position);
                let (seen, ended) = read_all(from(spec.clone(), at));
                prop_assert!(seen == expected[start..] && ended == end, "{:?} from {:?}", format, at);
            }
        }
    }

    #[test]
    fn a_file_that_grows_by_any_pieces_gives_what_the_whole_gives(
        content in content(),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
        wait in prop::collection::vec(any::<bool>(), 12),
        max in prop_oneof![Just(100usize), Just(1 << 20)],
    ) {
        let folder = Folder::new();
        let mut cuts: Vec<_> = cuts.iter().map(|cut| cut.index(content.len() + 1)).collect();
        cuts.extend([0, content.len()]);
        cuts.sort_unstable();
        let path = folder.write("log", b"");
        let spec = Spec { max_record: max, ..spec(&path, FOLLOW) };
        let (_sources, mut partitions, recycler) = Sources::open(vec![spec], 2).unwrap();
        let (expected, end) = oracle(&content, max, false);
        let (mut all, mut last) = (Vec::new(), None);
        for (pair, wait) in cuts.windows(2).zip(wait.iter().chain([&false; 2])) {
            append(&path, &content[pair[0]..pair[1]]);
            if *wait {
                let (next, _) = oracle(&content[..pair[1]], max, false);
                while all.len() < next.len() || last.is_none() {
                    let (seen, stop) = take(&mut partitions[0], &recycler);
                    all.extend(seen);
                    last = Some(stop);
                }
            }
        }
        while !matches!(last, Some(Arrival::CaughtUp { next }) if next == end) {
            let (seen, stop) = take(&mut partitions[0], &recycler);
            prop_assert!(!matches!(stop, Arrival::Failed(_) | Arrival::Ended { .. }), "{:?}", stop);
            all.extend(seen);
            last = Some(stop);
        }
        prop_assert!(all == expected);
        prop_assert!(partitions[0].try_next().is_none());
    }
}

#[test]
fn a_bounded_file_ends_where_it_ended_when_it_was_opened() {
    let (folder, content) = (Folder::new(), log(10_000));
    let path = folder.write("log", &content);
    let (_sources, mut partitions, recycler) = Sources::open(vec![spec(&path, Mode::Bounded)], 1).unwrap();
    append(&path, b"{\"id\":\"too late\"}\n");
    let (seen, end) = take(&mut partitions[0], &recycler);
    let (expected, next) = oracle(&content, 1 << 20, true);
    assert_eq!(seen, expected);
    assert!(matches!(end, Arrival::Ended { next: at } if at == next));
    assert!(partitions[0].try_next().is_none());
    assert!(partitions[0].next_timeout(Duration::from_secs(3600)).is_none(), "does not wait for what cannot come");
}

#[test]
fn a_last_line_without_its_end_is_a_record_in_bounded_input_only() {
    let folder = Folder::new();
    let path = folder.write("log", b"one\ntwo");
    let (seen, next) = read_all(spec(&path, Mode::Bounded));
    assert_eq!(seen.len(), 2);
    assert_eq!(next, NextOffset { offset: 7, before: Fingerprint::of(b"two") });

    let (_sources, mut partitions, recycler) = Sources::open(vec![spec(&path, FOLLOW)], 1).unwrap();
    let (seen, end) = take(&mut partitions[0], &recycler);
    assert_eq!(seen.len(), 1);
    assert!(matches!(end, Arrival::CaughtUp { next } if next.offset == 4));
    append(&path, b"!\n");
    let (seen, end) = take(&mut partitions[0], &recycler);
    assert_eq!((seen[0].text.as_slice(), seen[0].offset), (&b"two!"[..], 4));
    assert!(matches!(end, Arrival::CaughtUp { next } if next.offset == 9));
}

#[test]
fn a_last_line_that_was_taken_as_a_record_may_be_ended_but_not_continued() {
    for mode in [Mode::Bounded, FOLLOW] {
        let folder = Folder::new();
        let path = folder.write("log", b"one\ntwo");
        let (_, next) = read_all(spec(&path, Mode::Bounded));
        append(&path, b"\nthree\n");
        let (seen, _) = read(from(spec(&path, mode), next), 1);
        assert_eq!(seen.iter().map(|seen| seen.text.as_slice()).collect::<Vec<_>>(), [b"three"]);

        let path = folder.write("log", b"one\ntwo and more\n");
        let (seen, error) = failure(from(spec(&path, mode), next));
        assert!(seen.is_empty() && error.to_string().contains("goes on now"), "{error}");
        let path = folder.write("log", &packed(b"one\ntwo and more\n", Format::Zstd));
        assert!(matches!(failure(from(spec(&path, mode), next)).1, Error::Rewritten { offset: 7, .. }));
    }
}

#[test]
fn a_file_with_other_content_before_the_position_is_refused() {
    let folder = Folder::new();
    let content = log(1000);
    let (expected, _) = oracle(&content, 1 << 20, true);
    let at = expected[700].position();
    let mut other = content.clone();
    other[expected[699].offset as usize + 5] ^= 1;
    let refused = |path: &Path, at| {
        let opened = Sources::open(vec![from(spec(path, Mode::Bounded), at)], 1);
        let error = match opened {
            Err(error) => error,
            Ok((_sources, mut partitions, recycler)) => match take(&mut partitions[0], &recycler) {
                (seen, Arrival::Failed(error)) if seen.is_empty() => error,
                other => panic!("{other:?}"),
            },
        };
        let Error::Rewritten { file, offset, .. } = &error else { panic!("{error}") };
        assert!(file == path && *offset == at.offset, "{error}");
        error.to_string()
    };
    for format in FORMATS {
        let path = folder.write("log", &packed(&content, format));
        read_all(from(spec(&path, Mode::Bounded), at));
        refused(&path, NextOffset { before: Fingerprint::NONE, ..at });
        refused(&path, NextOffset { offset: 0, ..at });
        let message = refused(&path, NextOffset { offset: at.offset * 10, ..at });
        assert!(message.contains("but has") && message.contains("A log may only grow"), "{message}");
        refused(&folder.write("log", &packed(&other, format)), at);
        refused(&folder.write("log", &packed(&content[..at.offset as usize / 2], format)), at);
        refused(&folder.write("log", b""), at);
    }
}

#[test]
fn a_followed_file_that_shrinks_or_is_replaced_is_refused() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 6] = [
        ("cut in the unfinished line", |path| File::options().write(true).open(path).unwrap().set_len(8).unwrap()),
        ("replaced by a copy without the unfinished line", |path| {
            fs::write(path.with_extension("new"), "one\ntwo\n").unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("shrunk", |path| File::options().write(true).open(path).unwrap().set_len(3).unwrap()),
        ("rewritten in place and longer", |path| fs::write(path, "other\nother\nother\nother\n").unwrap()),
        ("replaced by a longer one", |path| {
            fs::write(path.with_extension("new"), "other\nother\nother\nother\n").unwrap();
            fs::rename(path.with_extension("new"), path).unwrap();
        }),
        ("moved away, then an empty one", |path| {
            fs::rename(path, path.with_extension("1")).unwrap();
            fs::write(path, "").unwrap();
        }),
    ];
    for (what, change) in changes {
        let folder = Folder::new();
        let path = folder.write("log", b"one\ntwo\nthr");
        let (_sources, mut partitions, recycler) = Sources::open(vec![spec(&path, FOLLOW)], 1).unwrap();
        assert_eq!(take(&mut partitions[0], &recycler).0.len(), 2);
        change(&path);
        let (seen, end) = take(&mut partitions[0], &recycler);
        assert!(seen.is_empty() && matches!(end, Arrival::Failed(Error::Rewritten { .. })), "{what}: {end:?}");
        assert!(partitions[0].next_timeout(Duration::from_secs(3600)).is_none());
    }
}

#[test]
fn a_followed_file_replaced_by_its_own_copy_is_read_on() {
    // The second allows so little that the unfinished line is already known to be too long.
    for max_record in [100, 3] {
        let folder = Folder::new();
        let path = folder.write("log", b"one\ntwo\nthree");
        let spec = Spec { max_record, ..spec(&path, FOLLOW) };
        let (_sources, mut partitions, recycler) = Sources::open(vec![spec], 1).unwrap();
        assert_eq!(take(&mut partitions[0], &recycler).0.len(), 2);
        let content = b"one\ntwo\nthree and more\nfour\n";
        fs::rename(folder.write("copy", content), &path).unwrap();
        let (mut seen, _) = take(&mut partitions[0], &recycler);
        while seen.len() < 2 {
            seen.extend(take(&mut partitions[0], &recycler).0);
        }
        assert_eq!(seen, oracle(content, max_record, true).0[2..]);
    }
}

#[test]
fn a_followed_compressed_file_is_read_to_its_end_and_must_not_change() {
    for format in [Format::Gzip, Format::Zstd] {
        let (folder, content) = (Folder::new(), log(2000));
        // It may appear after the reader was started on an empty file.
        let path = folder.write("log", b"");
        let (_sources, mut partitions, recycler) = Sources::open(vec![spec(&path, FOLLOW)], 1).unwrap();
        assert!(matches!(arrival(&mut partitions[0]), Arrival::CaughtUp { .. }));
        fs::rename(folder.write("ready", &packed(&content, format)), &path).unwrap();
        let (expected, end) = oracle(&content, 1 << 20, true);
        let (seen, stop) = take(&mut partitions[0], &recycler);
        assert_eq!(seen, expected);
        assert!(matches!(stop, Arrival::CaughtUp { next } if next == end), "{stop:?}");
        assert!(partitions[0].next_timeout(Duration::from_millis(20)).is_none());
        append(&path, &packed(b"more\n", format));
        let error = arrival(&mut partitions[0]);
        assert!(
            matches!(&error, Arrival::Failed(error) if error.to_string().contains("must be complete")),
            "{error:?}"
        );
    }
}

#[test]
fn a_cut_off_compressed_file_gives_what_is_readable_and_then_says_so() {
    let (folder, content) = (Folder::new(), log(3000));
    let expected = oracle(&content, 1 << 20, true).0;
    for format in [Format::Gzip, Format::Zstd] {
        let whole = packed(&content, format);
        let first = packed(&content[..content.len() / 3], format).len(); // not quite the border between the two
        for cut in (5..whole.len()).step_by(whole.len() / 40).filter(|cut| cut.abs_diff(first) > 100) {
            let path = folder.write("log", &whole[..cut]);
            let (seen, error) = failure(spec(&path, Mode::Bounded));
            let Error::Truncated { file, offset } = &error else { panic!("{error}") };
            assert_eq!(*file, path);
            let readable = oracle(&content[..*offset as usize], 1 << 20, false).0;
            assert_eq!(seen, readable);
            assert_eq!(seen, expected[..seen.len()]);
        }
    }
}

#[test]
fn a_damaged_compressed_file_fails_with_its_name_and_place() {
    let (folder, content) = (Folder::new(), log(3000));
    for format in [Format::Gzip, Format::Zstd] {
        let mut bytes = packed(&content, format);
        bytes.extend_from_slice(b"not a frame of anything, but long enough to be looked at");
        let path = folder.write("log", &bytes);
        let (seen, error) = failure(spec(&path, Mode::Bounded));
        assert_eq!(seen, oracle(&content, 1 << 20, true).0);
        assert!(matches!(&error, Error::Corrupt { offset, .. } if *offset == content.len() as u64), "{error}");
    }
}

#[test]
fn a_partition_that_nobody_takes_from_does_not_hold_up_the_others() {
    let (folder, content) = (Folder::new(), log(20_000));
    let paths: Vec<_> = (0..8).map(|i| folder.write(&format!("log{i}"), &content)).collect();
    let specs = paths.iter().map(|path| Spec { queue: 1, ..spec(path, Mode::Bounded) }).collect();
    let (_sources, mut partitions, recycler) = Sources::open(specs, 1).unwrap();
    let expected = oracle(&content, 1 << 20, true).0;
    // The last first: all others have filled their queues long before they are asked.
    for partition in partitions.iter_mut().rev() {
        assert_eq!(take(partition, &recycler).0, expected);
    }
}

#[test]
fn a_dropped_source_takes_all_its_threads_along() {
    let (folder, content) = (Folder::new(), log(20_000));
    let plain = folder.write("plain", &content);
    let gzip = folder.write("gzip", &packed(&content, Format::Gzip));
    let far = NextOffset { offset: content.len() as u64 - 1, before: Fingerprint(1) };
    let decoder = raw();
    let hold = |spec: Spec| Spec { decoder: Arc::clone(&decoder), ..spec };
    for taken in [0, 1] {
        let specs = vec![
            hold(spec(&plain, Mode::Bounded)),
            hold(spec(&plain, Mode::Follow { poll: Duration::from_secs(3600) })),
            hold(from(spec(&gzip, FOLLOW), far)),
        ];
        let (sources, mut partitions, recycler) = Sources::open(specs, 3).unwrap();
        if taken == 1 {
            take(&mut partitions[1], &recycler); // that one waits to be polled, the first for room
        }
        drop(sources);
        assert_eq!(Arc::strong_count(&decoder), 1, "no thread has a decoder or a spec any more");
    }
}

#[test]
fn what_was_decoded_before_a_stop_can_still_be_taken() {
    let (folder, content) = (Folder::new(), log(20_000));
    let path = folder.write("log", &content);
    let (sources, mut partitions, _) = Sources::open(vec![spec(&path, Mode::Bounded)], 1).unwrap();
    assert!(matches!(arrival(&mut partitions[0]), Arrival::Records(_)));
    sources.stop();
    let begun = Instant::now();
    while let Some(arrival) = partitions[0].next_timeout(Duration::from_secs(3600)) {
        assert!(matches!(arrival, Arrival::Records(_)), "{arrival:?}");
    }
    assert!(begun.elapsed() < Duration::from_secs(600), "a stopped source does not let its consumer wait");
}

#[test]
fn a_partition_can_be_dropped_while_the_others_go_on() {
    let (folder, content) = (Folder::new(), log(20_000));
    let path = folder.write("log", &content);
    let specs = vec![spec(&path, Mode::Bounded), spec(&path, Mode::Bounded)];
    let (_sources, mut partitions, recycler) = Sources::open(specs, 1).unwrap();
    drop(partitions.remove(0));
    assert_eq!(take(&mut partitions[0], &recycler).0.len(), 20_000);
}

#[test]
fn a_panic_in_a_decoder_fails_its_partition_and_no_other() {
    let folder = Folder::new();
    let bad = folder.write("bad", &[&log(3000)[..], b"panic\n", &log(3000)].concat());
    let good = folder.write("good", &log(6000));
    let bad = spec(&bad, Mode::Bounded);
    let good = Spec { path: good, ..bad.clone() }; // with the same decoder
    let (_sources, mut partitions, recycler) = Sources::open(vec![bad, good], 1).unwrap();
    let (seen, end) = take(&mut partitions[0], &recycler);
    assert_eq!(seen, oracle(&log(3000), 1 << 20, true).0[..seen.len()]);
    let Arrival::Failed(error) = end else { panic!("{end:?}") };
    assert!(error.to_string().contains(&format!("on the record at offset {}: told to", log(3000).len())), "{error}");
    assert_eq!(take(&mut partitions[1], &recycler).0.len(), 6000);
}

#[test]
fn a_panic_where_a_decoder_is_made_fails_the_partition() {
    let folder = Folder::new();
    let path = folder.write("log", b"one\n");
    let decoder: NewDecoder = Arc::new(|| panic!("cannot be made"));
    let (_, error) = failure(Spec { decoder, ..spec(&path, Mode::Bounded) });
    assert!(error.to_string().contains("cannot be made"), "{error}");
}

#[test]
fn chunks_and_decoders_are_used_again() {
    let (folder, content) = (Folder::new(), log(20_000));
    let path = folder.write("log", &content);
    let made = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&made);
    let decoder: NewDecoder = Arc::new(move || {
        count.fetch_add(1, Ordering::Relaxed);
        Box::new(Raw::default())
    });
    let spec = Spec { decoder, ..spec(&path, Mode::Bounded) };
    let (_sources, mut partitions, recycler) = Sources::open(vec![spec.clone(), spec], 2).unwrap();
    let mut chunks = std::collections::BTreeSet::new();
    let mut taken = 0;
    for partition in &mut partitions {
        while let Arrival::Records(chunk) = arrival(partition) {
            chunks.insert(&raw const *chunk as usize);
            taken += 1;
            recycler.give(chunk);
        }
    }
    assert!(made.load(Ordering::Relaxed) <= 2);
    assert!(chunks.len() <= 12 && taken > 40, "{} chunks for {taken} uses", chunks.len());
}

#[test]
fn many_files_are_read_at_once_and_one_can_be_added() {
    let folder = Folder::new();
    let paths: Vec<_> = (0..200).map(|i| folder.write(&format!("log-{i:03}"), &log(50 + i))).collect();
    let found = expand(&[format!("{}/log-*", folder.0.path().display())]).unwrap();
    assert_eq!(found, paths);
    let (mut sources, mut partitions, recycler) =
        Sources::open(paths.iter().map(|path| spec(path, Mode::Bounded)).collect(), 2).unwrap();
    partitions.extend(sources.add_files(vec![spec(&folder.write("new", &log(250)), Mode::Bounded)]).unwrap());
    for (i, partition) in partitions.iter_mut().enumerate() {
        assert_eq!(take(partition, &recycler).0.len(), 50 + i);
    }
    assert_eq!(partitions[3].name(), name_of(&paths[3]));
}

/// An error and its cause.
fn chain(error: &dyn std::error::Error) -> String {
    format!("{error}: {}", error.source().map(ToString::to_string).unwrap_or_default())
}

#[test]
fn a_file_that_cannot_be_read_is_named_before_anything_starts() {
    let folder = Folder::new();
    let (good, missing) = (folder.write("good", b"one\n"), folder.0.path().join("missing"));
    for mode in [Mode::Bounded, FOLLOW] {
        let opened = Sources::open(vec![spec(&good, mode), spec(&missing, mode)], 1);
        let error = chain(&opened.err().expect("refused"));
        assert!(error.contains("missing`") && error.contains("No such file"), "{error}");
        let error = chain(&Sources::open(vec![spec(folder.0.path(), mode)], 1).err().expect("refused"));
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn patterns_stand_for_the_files_that_are_there_sorted_and_once() {
    let folder = Folder::new();
    for name in ["b.jsonl", "a.jsonl", "a.jsonl.gz", ".hidden.jsonl", "ü.jsonl"] {
        folder.write(name, b"");
    }
    fs::create_dir(folder.0.path().join("folder.jsonl")).unwrap();
    let found = |patterns: &[&str]| {
        let patterns: Vec<_> = patterns.iter().map(|name| format!("{}/{name}", folder.0.path().display())).collect();
        expand(&patterns).map(|found| {
            let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_string();
            found.iter().map(name).collect::<Vec<_>>()
        })
    };
    assert_eq!(found(&["*.jsonl"]).unwrap(), ["a.jsonl", "b.jsonl", "ü.jsonl"]);
    assert_eq!(found(&["?.jsonl", "b.jsonl"]).unwrap(), ["a.jsonl", "b.jsonl", "ü.jsonl"]);
    assert_eq!(found(&["*a*l*"]).unwrap(), ["a.jsonl", "a.jsonl.gz"]);
    assert_eq!(found(&["b*", "a.jsonl"]).unwrap(), ["a.jsonl", "b.jsonl"]);
    assert_eq!(found(&[".*"]).unwrap(), [".hidden.jsonl"]);
    assert!(found(&["*.csv"]).unwrap_err().to_string().contains("*.csv` matches no file"));
    let error = chain(&found(&["c.jsonl"]).unwrap_err());
    assert!(error.contains("c.jsonl`") && error.contains("No such file"), "{error}");
}

#[test]
fn settings_refuse_unknown_keys_and_values_that_cannot_work() {
    let parse = |text: &str| toml::from_str::<Settings>(text);
    let folder = Folder::new();
    let path = folder.write("log", b"one\n");
    let settings = parse(&format!("kind = \"file\"\npaths = [\"{}\"]\npoll = \"1s\"", path.display())).unwrap();
    let Origin::Files(files) = settings.find("clicks.source").unwrap() else { panic!("{settings:?}") };
    assert_eq!((files.poll, files.max_record, files.queue), (Duration::from_secs(1), 1 << 20, 4));
    let specs = files.specs(Stream::Clicks, true, &raw(), Vec::new(), |name| {
        assert_eq!(name, name_of(&path));
        NextOffset { offset: 4, before: Fingerprint::of(b"one") }
    });
    assert!(matches!(read(specs[0].clone(), 1), (seen, Arrival::CaughtUp { .. }) if seen.is_empty()));

    assert!(parse("path = [\"x\"]").unwrap_err().to_string().contains("unknown field `path`"));
    assert!(parse("kind = \"files\"").unwrap_err().to_string().contains("unknown variant `files`"));
    for (text, message) in [
        ("", "`clicks.source.paths` must be a list of at least one file, got []"),
        ("max_record = 0", "`clicks.source.max_record` must be 1 to 1073741824 (bytes), got 0"),
        ("poll = \"0s\"", "`clicks.source.poll` must be at least 1ms, got 0ns"),
        ("queue = 0", "`clicks.source.queue` must be 1 to 1024 (chunks), got 0"),
    ] {
        let paths = if text.is_empty() { String::new() } else { format!("paths = [\"{}\"]\n", path.display()) };
        let error = parse(&(paths + text)).unwrap().check("clicks.source").unwrap_err();
        assert_eq!(error.to_string(), message);
    }
}
