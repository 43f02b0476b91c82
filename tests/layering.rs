//! The rooms of src/ import what `src/lib.rs` says, and each foreign crate stays in its room. Read from the text of src/;
//! test modules do not count.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Every room with the rooms that it may import. Each comes after all that it may import, so there is no way in a circle.
const ROOMS: &[(&str, &[&str])] = &[
    ("position", &[]),
    ("event", &["position"]),
    ("clock", &["event"]),
    ("telemetry", &["event"]),
    ("feature", &["event"]),
    ("source", &["event", "position", "clock", "feature"]),
    ("merge", &["event", "position"]),
    ("join", &["event", "merge"]),
    ("batch", &["event"]),
    ("model", &["event"]),
    ("train", &["event", "position", "merge", "join", "batch", "model"]),
    ("snapshot", &["event", "clock", "model"]),
    ("serve", &["event", "clock", "telemetry", "feature", "source", "model", "snapshot"]),
    ("generate", &["event"]),
    ("config", &["event", "feature", "source", "merge", "join", "model", "train", "snapshot"]),
    (
        "app",
        &[
            "event",
            "position",
            "clock",
            "telemetry",
            "feature",
            "source",
            "merge",
            "join",
            "batch",
            "model",
            "train",
            "snapshot",
            "serve",
            "generate",
            "config",
        ],
    ),
    (
        "cli",
        &[
            "event", "position", "clock", "feature", "source", "merge", "join", "train", "snapshot", "serve",
            "generate", "config", "app",
        ],
    ),
];

/// Imports that break the table, each with its reason. One that is gone must leave this list.
const UPWARD: &[(&str, &str, &str)] = &[
    ("src/telemetry.rs", "join", "takes its plain counters"),
    ("src/telemetry.rs", "merge", "takes its plain counters"),
    ("src/telemetry.rs", "train", "takes its plain metrics"),
    ("src/train/checkpoint.rs", "snapshot", "checkpoints use the codec of snapshots: arrays, digests, sealed JSON"),
    ("src/train/image.rs", "snapshot", "the same codec"),
];

/// Foreign crates that only these files know; an entry that ends in `/` is a folder.
const FOREIGN: &[(&str, &[&str])] = &[
    ("object_store", &["src/snapshot/"]),
    ("safetensors", &["src/snapshot/codec.rs"]),
    ("half", &["src/snapshot/"]),
    ("memmap2", &["src/snapshot/mapped.rs"]),
    ("bytemuck", &["src/snapshot/column.rs"]),
    ("tempfile", &["src/snapshot/mapped.rs", "src/app/verify.rs", "src/cli/"]),
    ("futures", &["src/snapshot/store.rs", "src/source/kafka/admin.rs"]),
    ("percent_encoding", &["src/snapshot/address.rs", "src/app/exporter.rs"]),
    ("flate2", &["src/source/file.rs", "src/cli/generate.rs"]),
    ("zstd", &["src/source/file.rs", "src/cli/generate.rs"]),
    ("parquet", &["src/source/columnar/"]),
    ("arrow_array", &["src/source/columnar/"]),
    ("arrow_buffer", &["src/source/columnar/"]),
    ("arrow_schema", &["src/source/columnar/"]),
    ("clap", &["src/cli/"]),
    ("anyhow", &["src/cli/"]),
    (
        "tokio",
        &[
            "src/app/demo/",
            "src/app/exporter.rs",
            "src/app/mod.rs",
            "src/app/objects.rs",
            "src/app/publisher.rs",
            "src/cli/",
            "src/snapshot/store.rs",
            "src/serve/reload.rs",
            "src/serve/http.rs",
        ],
    ),
    ("axum", &["src/serve/http.rs", "src/app/exporter.rs"]),
    ("hyper", &["src/serve/http.rs"]),
    ("hyper_util", &["src/serve/http.rs"]),
    ("arc_swap", &["src/serve/reload.rs"]),
    ("metrics_exporter_prometheus", &["src/app/recorder.rs", "src/app/exporter.rs"]),
    ("crossbeam_channel", &["src/app/keeper.rs", "src/cli/generate.rs", "src/source/pool.rs"]),
    ("metrics", &["src/telemetry.rs"]),
    ("toml", &["src/config.rs"]),
    ("rdkafka", &["src/source/kafka/"]),
    ("indicatif", &["src/cli/"]),
    ("rand_pcg", &["src/generate.rs"]),
    ("candle_core", &["src/model/"]),
    ("candle_nn", &["src/model/"]),
    ("gemm", &["src/model/tower.rs"]),
    ("rayon", &["src/model/two_tower.rs"]),
    ("mimalloc", &["src/main.rs"]),
];

struct File {
    /// From the root of the repository, with `/`.
    name: String,
    room: String,
    /// The code, line by line: without comments, and without what follows `#[cfg(test)] mod tests {`.
    lines: Vec<String>,
}

fn sources() -> Vec<File> {
    fn walk(folder: &Path, out: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().unwrap() != "tests" {
                    walk(&path, out);
                }
            } else if path.extension().is_some_and(|e| e == "rs") && path.file_name().unwrap() != "tests.rs" {
                out.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = Vec::new();
    walk(&root.join("src"), &mut paths);
    paths.sort();
    let files = paths.iter().map(|path| {
        let parts: Vec<_> =
            path.strip_prefix(root).unwrap().iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        let text = std::fs::read_to_string(path).unwrap();
        File { name: parts.join("/"), room: parts[1].trim_end_matches(".rs").to_owned(), lines: code(&text) }
    });
    files.collect()
}

fn code(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let tests = lines.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].ends_with("mod tests {"));
    let lines = &lines[..tests.unwrap_or(lines.len())];
    let without_comment = |line: &&str| match line.find("//") {
        // Inside of a string, as in `file://`, it something else than a space comes before it.
        Some(at) if line[..at].trim().is_empty() || line[..at].ends_with(' ') => line[..at].to_owned(),
        _ => (*line).to_owned(),
    };
    let mut lines: Vec<String> = lines.iter().map(without_comment).collect();
    // A `use` of several lines becomes one, at its first.
    for at in 0..lines.len() {
        if lines[at].trim_start().trim_start_matches("pub ").starts_with("use ") {
            let mut next = at + 1;
            while !lines[at].contains(';') && next < lines.len() {
                let more = std::mem::take(&mut lines[next]);
                lines[at].push_str(more.trim());
                next += 1;
            }
        }
    }
    lines
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// What follows each `prefix` that stands on its own: one name, or those of a group in braces.
fn names_after<'a>(line: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut names = Vec::new();
    for (at, _) in line.match_indices(prefix) {
        if line[..at].chars().next_back().is_some_and(|c| is_word(c) || c == ':') {
            continue;
        }
        let rest = &line[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.push(rest.split(|c| !is_word(c)).next().unwrap_or_default());
            continue;
        };
        let mut depth = 0;
        for part in group.split_inclusive(['{', '}', ',']) {
            if depth == 0 {
                names.push(part.trim().split(|c| !is_word(c)).next().unwrap_or_default());
            }
            depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
            if depth < 0 {
                break;
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

/// (line number, room) of everything that a file takes from another room.
fn imports(file: &File) -> Vec<(usize, String)> {
    let is_top = file.name.matches('/').count() == 1 || file.name.ends_with("/mod.rs");
    let to_root = if is_top { "super::" } else { "super::super::" };
    let mut found = Vec::new();
    for (at, line) in file.lines.iter().enumerate() {
        for name in names_after(line, "crate::").into_iter().chain(names_after(line, to_root)) {
            if name != file.room {
                found.push((at + 1, name.to_owned()));
            }
        }
    }
    found
}

#[test]
fn every_room_comes_after_the_rooms_that_it_may_import() {
    for (at, (room, may)) in ROOMS.iter().enumerate() {
        for other in *may {
            assert!(
                ROOMS[..at].iter().any(|(earlier, _)| earlier == other),
                "`{room}` may import `{other}`, which does not come before it"
            );
        }
    }
}

#[test]
fn rooms_import_only_what_the_table_allows() {
    let (mut broken, mut used) = (String::new(), vec![false; UPWARD.len()]);
    for file in sources().iter().filter(|file| file.name != "src/lib.rs" && file.name != "src/main.rs") {
        let Some((_, may)) = ROOMS.iter().find(|(room, _)| *room == file.room) else {
            panic!("{}: the room `{}` is not in the table of tests/layering.rs", file.name, file.room);
        };
        for (line, other) in imports(file) {
            if may.contains(&other.as_str()) {
                continue;
            }
            match UPWARD.iter().position(|(name, room, _)| *name == file.name && *room == other) {
                Some(known) => used[known] = true,
                None => {
                    let text = file.lines[line - 1].trim();
                    writeln!(broken, "{}:{line}: `{}` may not import `{other}`: {text}", file.name, file.room).unwrap();
                }
            }
        }
    }
    for ((file, room, _), _) in UPWARD.iter().zip(&used).filter(|(_, used)| !**used) {
        writeln!(broken, "{file} imports `{room}` no longer: take it off the list of exceptions").unwrap();
    }
    assert!(broken.is_empty(), "\n{broken}");
}

#[test]
fn foreign_crates_stay_in_their_rooms() {
    let mut broken = String::new();
    for file in sources() {
        for (krate, places) in FOREIGN {
            let allowed = |place: &&str| file.name == *place || (place.ends_with('/') && file.name.starts_with(place));
            if places.iter().any(allowed) {
                continue;
            }
            for (at, line) in file.lines.iter().enumerate() {
                if !names_after(line, &format!("{krate}::")).is_empty() || line.trim() == format!("use {krate};") {
                    let text = line.trim();
                    writeln!(broken, "{}:{}: `{krate}` belongs in {places:?}: {text}", file.name, at + 1).unwrap();
                }
            }
        }
    }
    assert!(broken.is_empty(), "\n{broken}");
}

#[test]
fn the_readers_of_this_test_see_imports_of_every_form() {
    assert_eq!(names_after("use crate::event::{Chunk, Time};", "crate::"), ["event"]);
    assert_eq!(
        names_after("use crate::{join, snapshot::{codec, store}, train};", "crate::"),
        ["join", "snapshot", "train"]
    );
    assert_eq!(names_after("fn f(a: crate::event::Time, b: &crate::merge::Key) {", "crate::"), ["event", "merge"]);
    assert_eq!(names_after("my_crate::event", "crate::"), [""; 0]);
    assert_eq!(names_after("    let a = super::super::model::x();", "super::super::"), ["model"]);
    let text =
        "use a; // crate::cli\n/// crate::cli\nlet url = \"file://x\";\n#[cfg(test)]\nmod tests {\nuse crate::cli;";
    assert_eq!(code(text), ["use a; ", "", "let url = \"file://x\";"]);
    assert_eq!(code("use crate::{\n    join,\n    model,\n};")[0], "use crate::{join,model,};");
}
