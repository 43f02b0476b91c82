//! A broker that dies, in a test binary of its own: others that use the broker at the same time would see it too.

mod common;
#[path = "common/kafka.rs"]
mod kafka;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{generate, outcome, summary};
use kafka::*;

#[test]
fn a_broker_that_dies_in_the_middle_costs_nothing() {
    let input = generate(DISTURBED);
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let until = ["--until", "2026-01-01T00:03:00Z"];
    let live = job(&impressions, &clicks);
    live.edit(KAFKA, ALWAYS_AWAITED);
    let following = live.command(&[&["--json", "--follow"], &until[..]].concat()).spawn().unwrap();
    let sending = replaying(&live, &input.path().join("in"), &["--speed", "20"]);
    std::thread::sleep(Duration::from_secs(4));
    let restarted = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/services.sh"))
        .args(["restart", "kafka"])
        .stdout(Stdio::null())
        .status()
        .unwrap();
    assert!(restarted.success(), "scripts/services.sh restart kafka failed");
    summary(&sending.wait_with_output().unwrap());
    let followed = summary(&following.wait_with_output().unwrap());
    let again = job(&impressions, &clicks);
    again.edit(KAFKA, ALWAYS_AWAITED);
    assert_eq!(outcome(&followed), outcome(&again.train(&until)));
}
