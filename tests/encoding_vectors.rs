//! The test vectors of `docs/encoding.md`, which were made by `scripts/tidemill_encoding.py`.

use serde_json::{Value, json};
use tidemill::event::{Chunk, Slot, Stream};
use tidemill::feature::schema::{row_of, seed_of};
use tidemill::feature::{FeatureSettings, Schema};
use tidemill::position::Fingerprint;
use tidemill::source::decode::{Decoder, IdPaths, RecordSettings};

const DOC: &str = include_str!("../docs/encoding.md");

/// What follows the marker of this name, up to the next marker.
fn after(name: &str) -> &'static str {
    let marker = format!("<!-- vectors: {name} -->\n\n");
    let (_, rest) = DOC.split_once(&marker).unwrap_or_else(|| panic!("no vectors called {name}"));
    rest.split("<!-- vectors:").next().unwrap()
}

fn table(name: &str) -> Vec<Vec<&'static str>> {
    let rows: Vec<Vec<_>> = after(name)
        .lines()
        .take_while(|line| line.starts_with('|'))
        .skip(2)
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect())
        .collect();
    assert!(rows.len() > 3, "{name} has vectors");
    rows
}

fn decode(settings: &RecordSettings, schema: Option<&Schema>, record: &str) -> Chunk {
    let stream = if schema.is_some() { Stream::Impressions } else { Stream::Clicks };
    let mut chunk = Chunk::default();
    Decoder::new(stream, settings, schema, true).unwrap().decode(record.as_bytes(), 0, Fingerprint::NONE, &mut chunk);
    assert_eq!((chunk.records.len(), chunk.reason_of(0)), (1, ""), "{record}");
    chunk
}

#[test]
fn canonical_texts_are_as_documented() {
    for row in table("texts") {
        let [value, text] = row[..] else { panic!("two cells: {row:?}") };
        let chunk = decode(&RecordSettings::default(), None, &format!(r#"{{"id":{value},"ts":0}}"#));
        assert_eq!(String::from_utf8_lossy(&chunk.text), text, "{value}");
    }
}

#[test]
fn rows_are_as_documented() {
    for row in table("rows") {
        let [feature, text, row] = row[..] else { panic!("three cells: {row:?}") };
        let text = match text {
            "missing" => vec![0xFF],
            "default" => vec![0xFE],
            text => serde_json::from_str::<String>(text).unwrap().into_bytes(),
        };
        assert_eq!(format!("{:016x}", row_of(&text, seed_of(feature))), row, "{feature}");
    }
}

#[test]
fn ids_are_as_documented() {
    for row in table("ids") {
        let [parts, id] = row[..] else { panic!("two cells: {row:?}") };
        let parts: Vec<Value> = serde_json::from_str(parts).unwrap();
        let mut record = json!({"ts": 0});
        for (i, part) in parts.iter().enumerate() {
            record[format!("part{i}")] = part.clone();
        }
        let paths = (0..parts.len()).map(|i| format!("part{i}")).collect();
        let settings = RecordSettings { id: IdPaths::Many(paths), ..RecordSettings::default() };
        assert_eq!(format!("{:016x}", decode(&settings, None, &record.to_string()).records[0].id), id, "{parts:?}");
    }
}

#[test]
fn numbers_are_as_documented() {
    for row in table("numbers") {
        let [settings, value, expected] = row[..] else { panic!("three cells: {row:?}") };
        let mut feature: Value = serde_json::from_str(settings).unwrap();
        feature["name"] = json!("x");
        feature["kind"] = json!("numeric");
        let feature: FeatureSettings = serde_json::from_value(feature).unwrap();
        let schema = Schema::new(&[feature], &[]).unwrap();
        let record = format!(r#"{{"id":1,"ts":0,"x":{value}}}"#);
        let (text, number) = expected.split_once(' ').unwrap_or((expected, "1"));
        let slot =
            Slot { row: row_of(text.as_bytes(), seed_of("x")), value: number.parse().unwrap(), ..Slot::default() };
        assert_eq!(decode(&RecordSettings::default(), Some(&schema), &record).slots, [slot], "{settings} of {value}");
    }
}

#[test]
fn whole_records_are_as_documented() {
    for name in ["record_plain", "record_bags", "record_shared"] {
        let blocks: Vec<_> = after(name).split("```").skip(1).step_by(2).collect();
        let [schema, record, slots] = blocks[..] else { panic!("three blocks after {name}") };
        let schema = Schema::from_json(schema.trim_start_matches("json")).unwrap();
        let chunk = decode(&RecordSettings::default(), Some(&schema), record.trim_start_matches("json"));
        let lines = chunk.slots.iter().map(|slot| {
            let flags = slot.flags & Slot::MISSING;
            (slot.feature, format!("{:016x}", slot.row), slot.value, flags, schema.name(slot.feature.into()).to_owned())
        });
        let expected = slots.trim_start_matches("text\n").lines().map(|line| {
            let cells: Vec<_> = line.split_whitespace().collect();
            let number = |i: usize| cells[i].parse().unwrap();
            (number(0), cells[1].to_owned(), cells[2].parse::<f32>().unwrap(), number(3), cells[4].to_owned())
        });
        assert_eq!(lines.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{name}");
    }
}
