//! Lines per second through the source, with a decoder that does next to nothing: what reading, unpacking, cutting,
//! fingerprints and queues cost. Lines have 250 bytes. Run with `cargo bench --bench source`.

use std::fs;
use std::io::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidemill::event::{Chunk, Kind, Record, Stream, Time};
use tidemill::position::{Fingerprint, NextOffset};
use tidemill::source::{Arrival, Decode, Mode, NewDecoder, Sources, Spec};

const LINES: usize = 2_000_000;

/// One record a line, with nothing in it.
struct Bare;

impl Decode for Bare {
    fn decode(&mut self, raw: &[u8], offset: u64, before: Fingerprint, out: &mut Chunk) {
        out.records.push(Record {
            id: u64::from(raw[0]),
            event_time: Time(0),
            log_time: Time::MIN,
            offset,
            row: 0,
            weight: 1.0,
            slots_start: 0,
            slots_len: 0,
            text_start: 0,
            text_len: 0,
            before: before.0,
            content: 0,
            kind: Kind::Impression,
        });
    }
}

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut content = Vec::with_capacity(LINES * 250);
    let mut state = 7u64;
    for i in 0..LINES {
        let start = content.len();
        write!(content, "{{\"id\":\"imp-{i:09}\",\"ts\":{},\"features\":[", 1_650_000_000_000 + i as u64 * 37).unwrap();
        while content.len() - start < 230 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            write!(content, "{:07},", (state >> 40) % 50_000).unwrap();
        }
        content.resize(start + 247, b'0');
        content.extend_from_slice(b"]}\n");
    }
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::new(6));
    gzip.write_all(&content).unwrap();
    let files = [
        ("plain", write("log", &content)),
        ("gzip -6", write("log.gz", &gzip.finish().unwrap())),
        ("zstd -3", write("log.zst", &zstd::encode_all(&content[..], 3).unwrap())),
    ];
    drop(content);
    let decoder: NewDecoder = Arc::new(|| Box::new(Bare));
    println!("{LINES} lines of 250 bytes; million lines a second, best of 3");
    for (format, path) in &files {
        let size = fs::metadata(path).unwrap().len() >> 20;
        for (threads, partitions) in [(1, 1), (2, 1), (2, 2)] {
            let run = || {
                let (from, decoder) = (NextOffset::default(), Arc::clone(&decoder));
                let (stream, mode, path) = (Stream::Impressions, Mode::Bounded, path.clone());
                let spec = Spec { path, object: None, stream, mode, from, decoder, max_record: 1 << 20, queue: 4 };
                let begun = Instant::now();
                let (_sources, mut parts, recycler) = Sources::open(vec![spec; partitions], threads).unwrap();
                let mut lines = 0;
                let mut open = partitions;
                while open > 0 {
                    for part in &mut parts {
                        match part.next_timeout(Duration::from_secs(10)) {
                            Some(Arrival::Records(chunk)) => {
                                lines += chunk.records.len();
                                recycler.give(chunk);
                            }
                            Some(Arrival::Ended { .. }) => open -= 1,
                            None => {} // over
                            Some(other) => panic!("{other:?}"),
                        }
                    }
                }
                assert_eq!(lines, LINES * partitions);
                lines as f64 / begun.elapsed().as_secs_f64() / 1e6
            };
            let best = (0..3).map(|_| run()).fold(0.0, f64::max);
            println!("{format:8} {size:4} MiB  {partitions} file(s)  {threads} decoder(s)  {best:6.2}");
        }
    }
}
