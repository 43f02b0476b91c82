//! `docs/metrics.md` and `src/telemetry.rs` name the same metrics.

use std::collections::BTreeSet;
use std::path::Path;

fn read(file: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap()
}

/// Every name that stands between `open` and `close` and is a metric's.
fn names(text: &str, open: char, close: char) -> Vec<String> {
    let pieces = text.split(open).skip(1).filter_map(|rest| rest.split(close).next());
    let metric = |name: &&str| {
        name.starts_with("tidemill_") && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    pieces.filter(metric).map(str::to_owned).collect()
}

#[test]
fn the_table_of_metrics_has_a_row_for_each_that_the_code_records_and_no_other() {
    let code: BTreeSet<String> = names(&read("src/telemetry.rs"), '"', '"').into_iter().collect();
    assert!(code.len() > 30, "only {} metrics were found in the code", code.len());
    let page = read("docs/metrics.md");
    let rows: Vec<String> =
        page.lines().filter(|line| line.starts_with("| `")).flat_map(|line| names(line, '`', '`')).collect();
    let table: BTreeSet<String> = rows.iter().cloned().collect();
    assert_eq!(rows.len(), table.len(), "a metric has two rows");
    assert_eq!(table, code, "docs/metrics.md (left), src/telemetry.rs (right)");
}
