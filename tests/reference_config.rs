//! `configs/reference.toml` shows every key, and each that has a default at its default; so no key can be added, dropped
//! or changed without it. The other configs in `configs/` fit the code too.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use tidemill::config::Config;
use toml::{Table, Value};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/reference.toml")
}

/// The file as it is: all keys that have a default, and those that are required.
fn reference() -> Table {
    std::fs::read_to_string(path()).unwrap().parse().unwrap()
}

/// The file with the keys that have no default (`#key = value`, without a space) switched on.
fn with_examples() -> Table {
    let text = std::fs::read_to_string(path()).unwrap();
    let on = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => rest.to_owned(),
        _ => line.to_owned(),
    };
    text.lines().map(on).collect::<Vec<_>>().join("\n").parse().unwrap()
}

/// The keys without which a table of that kind cannot be; all else has a default or is off.
const REQUIRED: &[&str] = &[
    "impressions.source.paths",
    "clicks.source.paths",
    "checkpoint.dir",
    "dead_letters.path",
    "features.name",
    "crosses.of",
];

/// Tables whose keys are not ours.
const OPEN: &[&str] = &["kafka.properties"];

/// Leaves only the required keys, in the tables that are there.
fn strip(table: &mut Table, at: &str) {
    table.retain(|key, value| {
        let path = if at.is_empty() { key.to_string() } else { format!("{at}.{key}") };
        match value {
            Value::Table(inner) => strip(inner, &path),
            Value::Array(items) if items.iter().all(Value::is_table) => {
                items.iter_mut().filter_map(Value::as_table_mut).for_each(|item| strip(item, &path));
            }
            _ => return REQUIRED.contains(&path.as_str()),
        }
        true
    });
}

/// A table, or the first of an array of tables, which shows all keys.
fn as_table(value: &Value) -> Option<&Table> {
    value.as_table().or_else(|| value.as_array()?.first()?.as_table())
}

/// The paths of all keys.
fn keys(table: &Table, at: &str, out: &mut BTreeSet<String>) {
    for (key, value) in table {
        let path = if at.is_empty() { key.clone() } else { format!("{at}.{key}") };
        if let Some(inner) = as_table(value) {
            keys(inner, &path, out);
        }
        out.insert(path);
    }
}

fn all_keys(table: &Table) -> BTreeSet<String> {
    let mut out = BTreeSet::new();
    keys(table, "", &mut out);
    out
}

#[test]
fn the_reference_is_a_configuration_that_passes_every_check() {
    Config::load(&path(), &[]).unwrap().check(None).unwrap();
}

#[test]
fn every_value_in_the_reference_is_the_default() {
    let reference = reference();
    let mut bare = reference.clone();
    strip(&mut bare, "");
    let left = all_keys(&bare);
    for key in REQUIRED {
        assert!(left.contains(*key), "`{key}` is not in the reference");
    }
    let defaults: Config = bare.try_into().unwrap();
    let shown: Config = reference.try_into().unwrap();
    let (defaults, shown) = (Table::try_from(&defaults).unwrap(), Table::try_from(&shown).unwrap());
    for (section, value) in &defaults {
        assert_eq!(
            shown.get(section),
            Some(value),
            "[{section}] of the reference (left) is not at its defaults (right)"
        );
    }
    assert_eq!(shown, defaults);
}

#[test]
fn every_key_that_has_a_default_is_in_the_reference() {
    let reference = reference();
    let config: Config = reference.clone().try_into().unwrap();
    assert_eq!(all_keys(&reference), all_keys(&Table::try_from(&config).unwrap()));
}

/// What the code would have taken in the table at `path`, from its complaint about a key that it does not know.
fn known_keys(full: &Table, path: &[&str]) -> BTreeSet<String> {
    let mut table = full.clone();
    let mut at = &mut table;
    for key in path {
        at = match at.get_mut(*key).unwrap_or_else(|| panic!("the reference has no {path:?}")) {
            Value::Array(items) => items[0].as_table_mut().unwrap(),
            value => value.as_table_mut().unwrap(),
        };
    }
    at.insert("not_a_key".into(), Value::Boolean(true));
    let message = table.try_into::<Config>().expect_err("unknown keys are refused").to_string();
    let (_, expected) =
        message.split_once("unknown field `not_a_key`, expected ").unwrap_or_else(|| panic!("{message}"));
    let line = expected.lines().next().unwrap();
    line.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn every_key_that_the_code_takes_is_in_the_reference_also_those_without_a_default() {
    let full = with_examples();
    full.clone().try_into::<Config>().expect("the examples in the reference can be read");
    let mut tables = vec![(vec![], &full)];
    let mut at = 0;
    while let Some((path, table)) = tables.get(at).cloned() {
        for (key, value) in table {
            let path = [&path[..], &[key.as_str()]].concat();
            let open = OPEN.contains(&path.join(".").as_str());
            tables.extend(as_table(value).filter(|_| !open).map(|inner| (path, inner)));
        }
        let shown: BTreeSet<String> = table.keys().cloned().collect();
        assert_eq!(shown, known_keys(&full, &path), "[{}]: the reference (left), the code (right)", path.join("."));
        at += 1;
    }
    assert!(at > 15, "only {at} tables were found");
}

#[test]
fn every_shipped_configuration_fits_the_code() {
    let folder = path().parent().unwrap().to_owned();
    let mut seen = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.file_name().unwrap() == "serve.toml" {
            continue; // of another command; tests/serve.rs
        }
        let config = Config::load(&path, &[]).and_then(|config| config.check(None));
        assert!(config.is_ok(), "{}: {}", path.display(), config.err().unwrap());
        seen += 1;
    }
    assert!(seen >= 4, "only {seen} files in configs/");
}

#[test]
fn docs_configuration_names_every_key() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
    let page = std::fs::read_to_string(page).unwrap();
    let ours = |path: &String| !OPEN.iter().any(|open| path.starts_with(&format!("{open}.")));
    for path in all_keys(&with_examples()).into_iter().filter(ours) {
        let key = path.rsplit('.').next().unwrap();
        let heading = page.contains(&format!("[{path}]")) || page.contains(&format!("[[{path}]]"));
        assert!(heading || page.contains(&format!("`{key}`")), "docs/configuration.md does not name `{path}`");
    }
}
