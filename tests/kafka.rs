//! What Tidemill promises about Kafka, shown against a real broker: `scripts/services.sh up kafka`, then the variables of its
//! env file. `scripts/test.sh` does both.

mod common;
#[path = "common/kafka.rs"]
mod kafka;

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Job, Kills, TIDEMILL, generate, newest_checkpoint, outcome, summary};
use futures::executor::block_on;
use kafka::*;
use rdkafka::admin::{AdminOptions, NewPartitions};
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::{Value, json};

// --------------------------------------------------------------------------------------------------------- same bytes

#[test]
fn files_and_kafka_give_the_same_model_however_the_events_are_spread_over_partitions() {
    let input = generate(IN_ORDER);
    let files = Job::over(&input.path().join("in")).train(&["--until-end"]);
    for partitions in [(1, 1), (3, 2), (4, 5)] {
        let (impressions, clicks) = (Topic::new("impressions", partitions.0), Topic::new("clicks", partitions.1));
        let job = job(&impressions, &clicks);
        replay(&job, &input.path().join("in"), &[]);
        let kafka = job.train(&["--until-end"]);
        assert_eq!(kafka["counts"], files["counts"]);
        assert_eq!(kafka["model_digest"], files["model_digest"]);
    }
}

/// Writes a generated stream into the topics of a job.
fn generating(job: &Job, more: &[&str]) -> Child {
    let mut command = Command::new(TIDEMILL);
    command.args(["generate", "--to", "kafka", "-c"]).arg(job.path("job.toml"));
    command.args(["--users", "500", "--items", "100", "--ctr", "0.1", "--rate", "30"]);
    command.args(["--delay-median", "5s", "--window", "40s"]).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_stream_generated_into_topics_is_the_one_that_is_generated_into_files() {
    let input = generate(IN_ORDER);
    let files = Job::over(&input.path().join("in")).train(&["--until-end"]);
    let (impressions, clicks) = (Topic::new("impressions", 3), Topic::new("clicks", 2));
    let job = job(&impressions, &clicks);
    let out = job.path("generated");
    let more = ["--out", out.to_str().unwrap()];
    let stats = summary(&generating(&job, &[IN_ORDER, &more].concat()).wait_with_output().unwrap());
    let kafka = job.train(&["--until-end"]);
    assert_eq!(kafka["counts"], files["counts"]);
    assert_eq!(kafka["model_digest"], files["model_digest"]);
    assert_eq!(kafka["counts"]["late"], 0, "each partition has the order of arrival");

    let read = |dir: &Path, name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    for name in ["truth.csv", "stats.json"] {
        assert_eq!(read(&out, name), read(&input.path().join("in"), name), "{name}");
    }
    assert_eq!(serde_json::from_str::<Value>(&read(&out, "stats.json")).unwrap(), stats);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2, "the records are in Kafka alone");
    for (key, value, _) in [impressions.read(), clicks.read()].concat() {
        let value: Value = serde_json::from_str(&value).unwrap();
        assert_eq!(value["id"].as_str(), key.as_deref());
    }
}

#[test]
fn a_generator_that_is_stopped_has_written_what_it_says() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let job = job(&impressions, &clicks);
    let child = generating(&job, &["-n", "100000", "--garbage", "0.01", "--speed", "50"]);
    wait_for("the first records", || impressions.high(0) > 100 && clicks.high(0) > 10);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let stats = summary(&child.wait_with_output().unwrap());
    let count = |keys: &[&str]| keys.iter().map(|key| stats[*key].as_u64().unwrap()).sum::<u64>();
    let (shown, clicked) = (count(&["impressions", "garbage_impressions"]), count(&["clicks", "garbage_clicks"]));
    assert!(shown < 90_000, "{stats}");
    assert_eq!(impressions.high(0) + impressions.high(1), shown);
    assert_eq!(clicks.high(0) + clicks.high(1), clicked);
}

#[test]
fn a_topic_that_is_made_a_moment_after_it_is_asked_for_is_waited_for() {
    let input = generate(&["-n", "500"]);
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    let job = job(&impressions, &clicks);
    let made_late = |topic: &Topic, partitions: i32, start: &dyn Fn() -> Child| {
        delete(&topic.name);
        let child = start();
        std::thread::sleep(Duration::from_secs(1));
        create(&topic.name, partitions, &[("retention.ms", "-1")]);
        summary(&child.wait_with_output().unwrap())
    };
    let end = made_late(&impressions, 2, &|| job.command(&["--json", "--until-end"]).spawn().unwrap());
    assert_eq!(end["counts"]["impressions"], 0);
    made_late(&clicks, 1, &|| replaying(&job, &input.path().join("in"), &[]));
    assert_eq!(impressions.high(0) + impressions.high(1), 500);
}

#[test]
fn a_generator_says_which_job_it_cannot_write_for() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    let fails = |job: &Job, more: &[&str]| {
        let output = generating(job, more).wait_with_output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    says(&fails(&Job::over(Path::new("IN")), &[]), &["`impressions.source`", "\"kafka\"", "got kind = \"file\""]);
    let two = job(&impressions, &clicks);
    two.edit(&format!("\"{}\"]", clicks.name), &format!("\"{}\", \"more\"]", clicks.name));
    says(&fails(&two, &[]), &["`clicks.source`", "one topic to write to", &clicks.name, "\"more\""]);
    let gone = job(&impressions, &clicks);
    gone.edit(&clicks.name, "no-such-topic");
    says(&fails(&gone, &[]), &["`no-such-topic`"]);
    says(&fails(&job(&impressions, &clicks), &["--partitions", "3"]), &["`--partitions`", "the key decides"]);
}

#[test]
fn events_that_come_slowly_give_the_bytes_of_events_that_were_there() {
    let input = generate(IN_ORDER);
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let live = job(&impressions, &clicks);
    live.edit(KAFKA, ALWAYS_AWAITED);
    let until = ["--until", "2026-01-01T00:02:00Z"];
    let following = live.command(&[&["--json", "--follow"], &until[..]].concat()).spawn().unwrap();
    replay(&live, &input.path().join("in"), &["--speed", "40"]);
    let followed = summary(&following.wait_with_output().unwrap());
    let again = job(&impressions, &clicks);
    again.edit(KAFKA, ALWAYS_AWAITED);
    assert_eq!(outcome(&followed), outcome(&again.train(&until)));
    assert_eq!(followed["journal_entries"], 0);
}

#[test]
fn what_the_runtime_decided_is_in_the_journal_and_a_replay_under_it_comes_to_the_same_bytes() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    let put = |partition: i32, range: std::ops::Range<u64>| {
        range.for_each(|n| impressions.put(partition, &impression(n)));
        impressions.flush();
    };
    put(0, 0..100);
    for n in 0..500 {
        clicks.put(0, &click(n));
    }
    clicks.flush();
    let until = ["--json", "--until", "2026-01-01T00:05:00Z"];
    let idle = ["--follow", "--set", "impressions.idle_after=1s"];
    let job = || job(&impressions, &clicks);
    let live = job();
    let run = Live::start(&live, &[&until[..], &idle, &LISTEN].concat());
    let address = metrics_of(&run);
    wait_for("the silent partition to be passed over", || released(&address) >= 60.0);
    // What it brings now lies behind the frontier.
    for n in 10..30 {
        impressions.put(1, &impression(n).replace(&format!("i{n}"), &format!("other{n}")));
    }
    impressions.flush();
    wait_for("it to be read", || metric(&address, "tidemill_overtaken_records_total").is_some_and(|n| n >= 1.0));
    put(0, 100..500);
    let followed = run.finish();
    // The first of them was overtaken and lifted the partition's watermark, past which the others are merely late.
    assert_eq!(followed["journal_entries"], 1);
    let manifest =
        std::fs::read_dir(live.path("snapshots/manifests")).unwrap().map(|entry| entry.unwrap().path()).max();
    let manifest = manifest.unwrap();
    let again = job().train(&[&until[1..], &["--journal", manifest.to_str().unwrap()]].concat());
    assert_eq!(outcome(&followed), outcome(&again));
    let free = job().train(&until[1..]);
    assert_ne!(followed["model_digest"], free["model_digest"], "the log alone gives another order");
}

#[test]
fn a_job_killed_at_20_random_moments_ends_in_the_bytes_of_one_that_never_was() {
    let input = generate(DISTURBED);
    let (impressions, clicks) = (Topic::new("impressions", 3), Topic::new("clicks", 2));
    let new = || job(&impressions, &clicks);
    replay(&new(), &input.path().join("in"), &[]);
    let undisturbed = new().train(&["--until-end"]);
    let mut killing = Kills::new(4, Duration::from_millis(600));
    let (mut ends, mut killed, mut one) = (Vec::new(), 0, new());
    while killed < 20 {
        if let Some(ended) = killing.kill(&one, &["--json", "--until-end"]) {
            ends.push(summary(&ended));
            one = new();
        } else {
            killed += 1;
        }
    }
    ends.push(one.train(&["--until-end"]));
    for end in &ends {
        assert_eq!(outcome(&undisturbed), outcome(end));
    }
    assert!(ends.iter().any(|end| end["resumed"] == true), "no job was killed after its first checkpoint");
}

/// Runs another command of tidemill on the configuration of a job.
fn ask(job: &Job, command: &[&str], more: &[&str]) -> Value {
    let mut asked = Command::new(TIDEMILL);
    asked.args(command).args(["--json", "-c"]).arg(job.path("job.toml")).args(more);
    summary(&asked.stdin(Stdio::null()).output().unwrap())
}

#[test]
fn a_live_job_that_crashed_twice_is_replayed_and_retrained_to_the_same_bytes() {
    let input = generate(IN_ORDER);
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let live = job(&impressions, &clicks);
    live.edit(KAFKA, ALWAYS_AWAITED);
    let until = ["--until", "2026-01-01T00:02:00Z"];
    let mut writing = replaying(&live, &input.path().join("in"), &["--speed", "20"]);
    for _ in 0..2 {
        let before = newest_checkpoint(&live);
        let mut child = live.command(&[&["--follow"], &until[..]].concat()).spawn().unwrap();
        wait_for("a checkpoint of this process", || newest_checkpoint(&live) != before);
        std::thread::sleep(Duration::from_millis(500));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let followed = summary(&live.command(&[&["--json", "--follow"], &until[..]].concat()).output().unwrap());
    assert_eq!(followed["resumed"], true);
    // Each of its checkpoints, before and behind the crashes, and each of its versions.
    let replayed = ask(&live, &["verify", "replay"], &[]);
    assert_eq!(replayed["same"], true, "{replayed}");
    let numbers = |kind: &str| -> Vec<u64> {
        replayed["marks"].as_array().unwrap().iter().filter_map(|mark| mark["of"][kind].as_u64()).collect()
    };
    assert_eq!(numbers("digests"), (1..=numbers("checkpoint")[0]).collect::<Vec<_>>());
    assert!(numbers("digests").len() > 1 && !numbers("version").is_empty(), "{replayed}");
    // A retrain over the same offsets, in a place of its own, and what goes on from it.
    let other = job(&impressions, &clicks);
    other.edit(KAFKA, ALWAYS_AWAITED);
    let report = ask(&other, &["retrain"], &[&["--promote", "always"], &until[..]].concat());
    assert_eq!(report["outcome"], "promoted", "{report}");
    let handed = other.train(&until);
    assert_eq!(handed["resumed"], true);
    assert_eq!(outcome(&handed), outcome(&followed));
    assert!(writing.wait().unwrap().success());
}

#[test]
fn a_retrain_and_examples_read_a_topic_from_where_their_start_needs_and_have_nothing_of_before() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    let put = |topic: &Topic, partition: i32, value: &str, n: u64| {
        let record = BaseRecord::<str, str>::to(&topic.name).partition(partition).payload(value);
        // The log took it when it happened.
        topic.send(record.timestamp(1_767_225_601_000 + n as i64 * 1000));
    };
    for n in 0..2000 {
        put(&impressions, (n % 2) as i32, &impression(n), n);
        if n % 10 == 0 {
            put(&clicks, 0, &click(n), n);
        }
    }
    impressions.flush();
    clicks.flush();
    let job = job(&impressions, &clicks);
    let report = ask(&job, &["retrain"], &["--promote", "never", "--from", "2026-01-01T00:20:00Z"]);
    let counts = &report["candidate"]["counts"];
    let n = |key: &str| counts[key].as_u64().unwrap();
    // All windows of the last 800 but those that the end cuts; of the 1200 before only what seen ids and clicks need.
    assert!(n("positives") >= 70 && n("positives") + n("negatives") > 700, "{counts}");
    assert!(n("before_start") > 20 && n("before_start") < 200, "{counts}");
    // So do examples.
    let out = job.path("some.parquet");
    let stretch = ["--from", "2026-01-01T00:20:00Z", "--until", "2026-01-01T00:30:00Z", "--out"];
    let examples = ask(&job, &["examples"], &[&stretch[..], &[out.to_str().unwrap()]].concat());
    let n = |value: &Value| value.as_u64().unwrap();
    assert_eq!((n(&examples["positives"]), n(&examples["negatives"])), (60, 540), "{examples}");
    assert!(n(&examples["counts"]["impressions"]) < 800, "{examples}");
}

#[test]
fn a_counting_model_shows_that_every_example_was_learned_exactly_once_over_kills() {
    let input = generate(DISTURBED);
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let job = job(&impressions, &clicks);
    replay(&job, &input.path().join("in"), &[]);
    let predictions = job.path("predictions.csv");
    let args = ["--json", "--until-end", "--predictions", predictions.to_str().unwrap()];
    let mut killing = Kills::new(5, Duration::from_millis(900));
    for _ in 0..4 {
        killing.kill(&job, &args);
    }
    let end = summary(&job.command(&args).output().unwrap());
    let text = std::fs::read_to_string(predictions).unwrap();
    let mut seen = BTreeMap::<&str, u32>::new();
    text.lines().skip(1).for_each(|line| *seen.entry(line.split(',').next().unwrap()).or_default() += 1);
    assert!(seen.values().all(|times| *times == 1), "an example was learned twice");
    assert_eq!(seen.len() as u64, end["examples"].as_u64().unwrap());
    let counts = &end["counts"];
    let learned = counts["positives"].as_u64().unwrap() + counts["negatives"].as_u64().unwrap();
    assert_eq!(learned, seen.len() as u64);
}

#[test]
fn two_shards_learn_the_impressions_of_one_job_between_them() {
    let input = generate(IN_ORDER);
    let (impressions, clicks) = (Topic::new("impressions", 4), Topic::new("clicks", 4));
    let whole = job(&impressions, &clicks);
    replay(&whole, &input.path().join("in"), &[]);
    let whole = whole.train(&["--until-end"]);
    let sum = |more: &[&str]| {
        let mut sums = (0, 0, 0);
        for shard in ["0/2", "1/2"] {
            let setting = format!("impressions.source.shard=\"{shard}\"");
            let mut args = vec!["--until-end".to_owned(), "--set".into(), setting];
            args.extend(more.iter().flat_map(|key| ["--set".to_owned(), format!("{key}=\"{shard}\"")]));
            let args: Vec<_> = args.iter().map(String::as_str).collect();
            let end = job(&impressions, &clicks).train(&args);
            let count = |key: &str| end["counts"][key].as_u64().unwrap();
            sums = (sums.0 + count("impressions"), sums.1 + count("positives"), sums.2 + count("clicks_attributed"));
        }
        sums
    };
    let count = |key: &str| whole["counts"][key].as_u64().unwrap();
    let expected = (count("impressions"), count("positives"), count("clicks_attributed"));
    assert_eq!(sum(&[]), expected, "every shard reads all clicks");
    assert_eq!(sum(&["clicks.source.shard"]), expected, "topics partitioned alike");
    let other = Topic::new("clicks", 3);
    let said = job(&impressions, &other).fails(&[
        "--until-end",
        "--set",
        "impressions.source.shard=\"0/2\"",
        "--set",
        "clicks.source.shard=\"0/2\"",
    ]);
    says(&said, &["clicks.source.shard", "equally many partitions", ": 4", ": 3"]);
}

// ---------------------------------------------------------------------------------------------------- disturbed producers

#[test]
fn every_record_of_a_bad_producer_is_accounted_for_and_none_drags_the_watermark() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    let letters = Topic::new("dead-letters", 1);
    let now = 1_767_225_600_000;
    let put = |n: u64, value: &str, key: &str| {
        let at = now + n as i64 * 1000 + 500;
        impressions.send(BaseRecord::to(&impressions.name).partition(0).timestamp(at).key(key).payload(value));
    };
    for n in 0..100 {
        put(n, &impression(n), &format!("k{n}"));
        clicks
            .send(BaseRecord::<str, str>::to(&clicks.name).timestamp(now + n as i64 * 1000 + 1500).payload(&click(n)));
        match n {
            20 => put(n, &impression(n), "again"),
            30 => put(n, "\u{1}\u{2} no record", "garbage"),
            40 => put(n, &impression(n + 86_400), "a day ahead"),
            50 => put(n, &impression(10).replace("\"i10\"", "\"late\""), "late"),
            60 => put(n, "", "empty"),
            _ => {}
        }
    }
    impressions.flush();
    clicks.flush();
    let job = job(&impressions, &clicks);
    job.edit(
        &format!("path = \"{}\"", job.path("dead-letters.jsonl").display()),
        &format!("topic = \"{}\"", letters.name),
    );
    let end = job.train(&["--until-end"]);
    let count = |key: &str| end["counts"][key].as_u64().unwrap();
    assert_eq!(count("impressions"), 105);
    assert_eq!(count("duplicates"), 1);
    assert_eq!(count("rejected"), 3, "garbage, empty, and a day ahead");
    assert_eq!(count("late"), 1);
    assert_eq!(count("too_late"), 1);
    assert_eq!(count("positives"), 100, "nobody was left without its click");
    assert_eq!((&end["impression_gap"], &end["click_gap"]), (&json!(0), &json!(0)));
    let mut letters = letters.read();
    letters.sort();
    let summary: Vec<_> = letters
        .iter()
        .map(|(key, value, headers)| {
            assert_eq!(headers["tidemill.partition"], format!("{}/0", impressions.name));
            assert!(!headers["tidemill.reason"].is_empty());
            (key.as_deref().unwrap(), value.as_str(), headers["tidemill.offset"].as_str())
        })
        .collect();
    let ahead = impression(40 + 86_400);
    assert_eq!(
        summary,
        [("a day ahead", ahead.as_str(), "43"), ("empty", "", "65"), ("garbage", "\u{1}\u{2} no record", "32")],
        "key, value and offset as they were"
    );
    says(&letters[0].2["tidemill.reason"], &["ahead of its log time", "max_ahead"]);
}

#[test]
fn messages_of_every_compression_tombstones_headers_and_messages_that_are_too_long_are_read() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    let mut n = 0;
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let producer: BaseProducer = config().set("compression.type", codec).create().unwrap();
        for _ in 0..50 {
            let headers = rdkafka::message::OwnedHeaders::new()
                .insert(rdkafka::message::Header { key: "trace", value: Some("abc") });
            let value = impression(n);
            producer
                .send(BaseRecord::<str, str>::to(&impressions.name).partition(0).headers(headers).payload(&value))
                .unwrap();
            n += 1;
        }
        producer.flush(Duration::from_secs(30)).unwrap();
    }
    impressions.send(BaseRecord::<str, str>::to(&impressions.name).partition(0).key("gone"));
    impressions.put(0, &format!("{{\"id\": \"long\", \"pad\": \"{}\"}}", "x".repeat(300_000)));
    impressions.put(0, &impression(n));
    impressions.flush();
    clicks.put(0, &click(n + 100));
    clicks.flush();
    let end = job(&impressions, &clicks).train(&["--until-end", "--set", "impressions.source.max_record=100000"]);
    let count = |key: &str| end["counts"][key].as_u64().unwrap();
    assert_eq!((count("impressions"), count("negatives"), count("rejected")), (n + 2, n + 1, 1));
}

#[test]
fn what_a_transaction_aborted_is_not_read_and_an_open_one_is_waited_for() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    let producer: BaseProducer =
        config().set("transactional.id", &impressions.name).set("transaction.timeout.ms", "120000").create().unwrap();
    producer.init_transactions(Duration::from_secs(30)).unwrap();
    let write = |range: std::ops::Range<u64>| {
        producer.begin_transaction().unwrap();
        for n in range {
            let value = impression(n);
            producer.send(BaseRecord::<str, str>::to(&impressions.name).partition(0).payload(&value)).unwrap();
        }
        producer.flush(Duration::from_secs(30)).unwrap();
    };
    write(0..20);
    producer.commit_transaction(Duration::from_secs(30)).unwrap();
    write(500..520);
    producer.abort_transaction(Duration::from_secs(30)).unwrap();
    write(20..40);
    for n in (0..40).step_by(10) {
        clicks.put(0, &click(n));
    }
    clicks.put(0, &click(300));
    clicks.flush();
    let job = job(&impressions, &clicks);
    // Said aloud, it must not blind the question where the partition ends.
    job.edit("[join]", "[kafka.properties]\n\"isolation.level\" = \"read_committed\"\n[join]");
    let mut child = job.command(&["--json", "--until-end"]).spawn().unwrap();
    std::thread::sleep(Duration::from_secs(3));
    assert!(child.try_wait().unwrap().is_none(), "it did not wait for the open transaction");
    producer.commit_transaction(Duration::from_secs(30)).unwrap();
    let end = summary(&child.wait_with_output().unwrap());
    assert_eq!(end["counts"]["impressions"], 40);
    assert_eq!(end["counts"]["positives"], 4);
    // The last offsets are a marker, which no reader ever sees; a job that begins there has nothing to do.
    assert_eq!(job.train(&["--until-end"])["counts"]["impressions"], 40);
}

// ------------------------------------------------------------------------------------------------------- who is awaited

/// What a following job says on stderr, line by line, until it is stopped.
struct Live {
    child: Child,
    lines: std::sync::mpsc::Receiver<String>,
}

impl Live {
    fn start(job: &Job, more: &[&str]) -> Self {
        let mut child = job.command(more).spawn().unwrap();
        let (send, lines) = std::sync::mpsc::channel();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        std::thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
        Self { child, lines }
    }

    fn wait_for(&self, text: &str) -> String {
        let began = Instant::now();
        let mut all = String::new();
        while began.elapsed() < Duration::from_secs(60) {
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(100)) {
                if line.contains(text) {
                    return line;
                }
                all += &(line + "\n");
            }
        }
        panic!("waited in vain for `{text}`; it said: {all}");
    }

    fn stop(self) -> Value {
        let pid = self.child.id().to_string();
        Command::new("kill").arg(pid).status().unwrap();
        self.finish()
    }

    /// Waits for its end, and gives its summary.
    fn finish(mut self) -> Value {
        let mut out = String::new();
        std::io::Read::read_to_string(&mut self.child.stdout.take().unwrap(), &mut out).unwrap();
        assert!(self.child.wait().unwrap().success());
        serde_json::from_str(&out).unwrap()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.child.kill();
    }
}

/// Lets a job report where it stands: `--json` at the end, metrics while it runs.
fn metric(address: &str, name: &str) -> Option<f64> {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(address).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: x\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// The address in the line `metrics at http://ADDRESS/metrics`.
fn metrics_of(live: &Live) -> String {
    let line = live.wait_for("metrics at http://");
    line.split("http://").nth(1).unwrap().split('/').next().unwrap().to_owned()
}

const LISTEN: [&str; 2] = ["--set", "telemetry.listen=\"127.0.0.1:0\""];

fn released(address: &str) -> f64 {
    ["positive", "negative"]
        .iter()
        .filter_map(|kind| metric(address, &format!("tidemill_impressions_total{{outcome=\"{kind}\"}}")))
        .sum()
}

#[test]
fn an_empty_partition_holds_the_release_until_it_is_confirmed_to_be_silent() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    for n in 0..200 {
        impressions.put(0, &impression(n));
    }
    impressions.flush();
    clicks.put(0, &click(300));
    clicks.flush();
    let job = job(&impressions, &clicks);
    let never = ["--json", "--set", "impressions.idle_after=never"];
    let live = Live::start(&job, &[&never[..], &LISTEN].concat());
    let address = metrics_of(&live);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(released(&address), 0.0, "the second partition is always awaited");
    assert_eq!(live.stop()["counts"]["impressions"], 0);
    let live = Live::start(&job, &[&["--json", "--set", "impressions.idle_after=1s"][..], &LISTEN].concat());
    let address = metrics_of(&live);
    wait_for("the silent partition to be passed over", || released(&address) >= 150.0);
    live.stop();
}

#[test]
fn a_partition_that_a_topic_gets_while_the_job_runs_is_read_from_its_first_record() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..100 {
        impressions.put(0, &impression(n));
    }
    impressions.flush();
    clicks.put(0, &click(400));
    clicks.flush();
    let job = job(&impressions, &clicks);
    let idle = ["--json", "--set", "impressions.idle_after=1s", "--set", "kafka.refresh=200ms"];
    let live = Live::start(&job, &[&idle[..], &LISTEN].concat());
    let address = metrics_of(&live);
    wait_for("the first partition", || released(&address) >= 60.0);
    block_on(admin().create_partitions([&NewPartitions::new(&impressions.name, 2)], &AdminOptions::new())).unwrap();
    live.wait_for("a new partition");
    let late: Topic = Topic { name: impressions.name.clone(), producer: config().create().unwrap() };
    wait_for("the producer to see the partition", || {
        late.producer.client().fetch_metadata(Some(&late.name), Duration::from_secs(5)).unwrap().topics()[0]
            .partitions()
            .len()
            == 2
    });
    for n in 150..300 {
        late.put((n % 2) as i32, &impression(n));
    }
    late.flush();
    wait_for("both partitions", || released(&address) >= 200.0);
    let end = live.stop();
    assert_eq!((&end["impression_gap"], &end["click_gap"]), (&json!(0), &json!(0)));
    assert!(job.train(&["--until-end"])["counts"]["impressions"].as_u64().unwrap() == 250);
}

#[test]
fn a_click_topic_that_stops_for_a_while_makes_no_false_negative() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 2));
    let job = job(&impressions, &clicks);
    let idle = ["--json", "--set", "impressions.idle_after=1s", "--set", "clicks.idle_after=1s"];
    let live = Live::start(&job, &[&idle[..], &LISTEN].concat());
    let address = metrics_of(&live);
    // Every impression is clicked, so any negative is a false one.
    for n in 0..100 {
        impressions.put((n % 2) as i32, &impression(n));
        clicks.put((n % 2) as i32, &click(n));
    }
    impressions.flush();
    clicks.flush();
    wait_for("what has its clicks", || released(&address) >= 20.0);
    for n in 100..300 {
        impressions.put((n % 2) as i32, &impression(n));
    }
    impressions.flush();
    std::thread::sleep(Duration::from_secs(4));
    let held = released(&address);
    assert!(held <= 100.0, "{held} were released without their clicks");
    for n in 100..400 {
        clicks.put((n % 2) as i32, &click(n));
    }
    clicks.flush();
    wait_for("training to go on by itself", || released(&address) >= 200.0);
    let end = live.stop();
    assert_eq!(end["counts"]["negatives"], 0);
    assert_eq!((&end["impression_gap"], &end["click_gap"]), (&json!(0), &json!(0)));
}

#[test]
fn one_of_four_click_partitions_that_stops_for_a_while_makes_no_false_negative() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 4));
    let job = job(&impressions, &clicks);
    // Long enough that 20 clicks of the partition are missing before it is over, however slowly records are written.
    let idle = ["--json", "--set", "impressions.idle_after=never", "--set", "clicks.idle_after=5s"];
    // Every impression is clicked, so any negative is a false one.
    let put = |from: u64, to: u64, clicked: &dyn Fn(u64) -> bool| {
        for n in from..to {
            impressions.put((n % 2) as i32, &impression(n));
            if clicked(n) {
                clicks.put((n % 4) as i32, &click(n));
            }
        }
        impressions.flush();
        clicks.flush();
    };
    put(0, 200, &|_| true);
    let live = Live::start(&job, &[&idle[..], &LISTEN].concat());
    let address = metrics_of(&live);
    wait_for("what has its clicks", || released(&address) >= 100.0);
    put(200, 600, &|n| n % 4 != 1);
    let stalled = || metric(&address, "tidemill_held{why=\"click_stalled\"}") == Some(1.0);
    wait_for("the partition to be missed", stalled);
    let held = released(&address);
    std::thread::sleep(Duration::from_secs(3));
    assert!(stalled() && released(&address) == held && held <= 200.0, "{held} were released");
    for n in (201..600).step_by(4) {
        clicks.put(1, &click(n));
    }
    put(600, 700, &|_| true);
    wait_for("training to go on by itself", || released(&address) >= 600.0);
    let end = live.stop();
    assert_eq!((&end["counts"]["negatives"], &end["journal_entries"]), (&json!(0), &json!(0)));
    assert_eq!((&end["impression_gap"], &end["click_gap"]), (&json!(0), &json!(0)));
}

// ------------------------------------------------------------------------------------------------- logs that change

#[test]
fn records_that_retention_dropped_stop_the_job_with_what_was_lost_and_an_operator_may_go_on() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..100 {
        impressions.put(0, &impression(n));
        clicks.put(0, &click(n));
    }
    impressions.flush();
    clicks.flush();
    let job = job(&impressions, &clicks);
    job.train(&["--until", "2026-01-01T00:00:30Z"]);
    for n in 100..200 {
        impressions.put(0, &impression(n));
        clicks.put(0, &click(n));
    }
    impressions.flush();
    clicks.flush();
    drop_before(&impressions.name, 0, 120);
    let said = job.fails(&["--until-end"]);
    says(&said, &[&format!("{}/0", impressions.name), "to 120", "retention", "Nothing was skipped", "--skip-lost"]);
    let end = job.train(&["--until-end", "--skip-lost"]);
    let count = |key: &str| end["counts"][key].as_u64().unwrap();
    assert_eq!(count("impressions"), 25 + 80, "those of whole batches before, and those that were left");
    assert_eq!(end["impression_gap"], 0);
    let shown = Command::new(TIDEMILL)
        .args(["snapshots", "show", "--json", "--store", job.path("snapshots").to_str().unwrap()])
        .output()
        .unwrap();
    says(&String::from_utf8_lossy(&shown.stdout), &["skipped", "120"]);
}

#[test]
fn a_topic_that_was_made_anew_is_refused_whether_it_is_shorter_or_longer() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..100 {
        impressions.put(0, &impression(n));
        clicks.put(0, &click(n));
    }
    impressions.flush();
    clicks.flush();
    let job = job(&impressions, &clicks);
    job.train(&["--until", "2026-01-01T00:00:50Z"]);
    delete(&impressions.name);
    create(&impressions.name, 1, &[]);
    let said = job.fails(&["--until-end"]);
    says(&said, &[&format!("{}/0", impressions.name), "not the log that was read before", "ends at 0"]);
    let anew = Topic { name: impressions.name.clone(), producer: config().create().unwrap() };
    for n in 1000..1200 {
        anew.put(0, &impression(n));
    }
    anew.flush();
    let said = job.fails(&["--until-end"]);
    says(&said, &[&format!("{}/0", impressions.name), "not the log that was read before"]);
}

// ----------------------------------------------------------------------------------------------------- ways to begin

#[test]
fn a_job_begins_at_the_earliest_or_latest_record_at_a_time_or_at_given_offsets() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..100 {
        let (at, value) = (1_767_225_600_000 + n as i64 * 1000, impression(n));
        impressions.send(BaseRecord::<str, str>::to(&impressions.name).partition(0).timestamp(at).payload(&value));
    }
    impressions.flush();
    clicks.put(0, &click(300));
    clicks.flush();
    let offsets = format!("{{ \"{}/0\" = 91 }}", impressions.name);
    for (start, expected) in
        [("\"earliest\"", 100), ("\"latest\"", 0), ("\"2026-01-01T00:01:20Z\"", 20), (offsets.as_str(), 9)]
    {
        let setting = format!("impressions.source.start={start}");
        let end = job(&impressions, &clicks).train(&["--until-end", "--set", &setting]);
        assert_eq!(end["counts"]["impressions"], expected, "start = {start}");
    }
    let setting = format!("impressions.source.start={}", offsets.replace("= 91", "= 191"));
    let said = job(&impressions, &clicks).fails(&["--until-end", "--set", &setting]);
    says(&said, &["impressions.source.start", "191", "0 to 100"]);
}

#[test]
fn where_the_latest_record_was_is_known_after_a_kill() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    let put = |range: std::ops::Range<u64>| {
        range.for_each(|n| impressions.put((n % 2) as i32, &impression(n)));
        impressions.flush();
    };
    put(0..50);
    let job = job(&impressions, &clicks);
    let latest = ["--set", "impressions.source.start=latest"];
    let mut live = Live::start(&job, &[&latest[..], &LISTEN].concat());
    metrics_of(&live);
    wait_for("the first checkpoint", || newest_checkpoint(&job).is_some());
    live.child.kill().unwrap();
    live.child.wait().unwrap();
    put(50..120);
    clicks.put(0, &click(300));
    clicks.flush();
    let end = job.train(&[&["--until-end"], &latest[..]].concat());
    assert_eq!(end["counts"]["impressions"], 70);
    assert_eq!(end["resumed"], true);
}

#[test]
fn positions_are_shown_to_a_group_and_never_read_from_it() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..100 {
        impressions.put(0, &impression(n));
        clicks.put(0, &click(n));
    }
    impressions.flush();
    clicks.flush();
    let group = format!("group-{}", impressions.name);
    let setting = format!("kafka.group=\"{group}\"");
    let end = job(&impressions, &clicks).train(&["--until-end", "--set", &setting]);
    let consumer: BaseConsumer = config().set("group.id", &group).create().unwrap();
    let committed = |topic: &str| {
        let mut list = TopicPartitionList::new();
        list.add_partition(topic, 0);
        let list = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
        list.elements()[0].offset()
    };
    assert!(matches!(committed(&clicks.name), Offset::Offset(at) if at == 100), "{:?}", committed(&clicks.name));
    assert!(matches!(committed(&impressions.name), Offset::Offset(_)), "{:?}", committed(&impressions.name));
    let anew = job(&impressions, &clicks).train(&["--until-end", "--set", &setting]);
    assert_eq!(outcome(&end), outcome(&anew), "a job without a checkpoint begins at the start");
}

#[test]
fn a_broker_is_reached_by_tls_and_by_each_kind_of_sasl_and_a_wrong_password_is_named() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    for n in 0..50 {
        impressions.put(0, &impression(n));
    }
    impressions.flush();
    clicks.put(0, &click(300));
    clicks.flush();
    let ca = variable("TIDEMILL_TEST_KAFKA_CA");
    let train = |address: &str, properties: &[(&str, &str)]| {
        let job = job(&impressions, &clicks);
        let mut lines = format!("brokers = \"{}\"\n[kafka.properties]\n", variable(address));
        for (key, value) in properties {
            lines += &if value.starts_with('{') {
                format!("\"{key}\" = {value}\n")
            } else {
                format!("\"{key}\" = \"{value}\"\n")
            };
        }
        job.edit(&format!("brokers = \"{}\"\n", brokers()), &lines);
        job
    };
    let ends = |job: Job| job.train(&["--until-end"])["counts"]["impressions"] == 50;
    let tls = [("security.protocol", "SSL"), ("ssl.ca.location", ca.as_str())];
    assert!(ends(train("TIDEMILL_TEST_KAFKA_SSL", &tls)));
    for (mechanism, name) in
        [("PLAIN", "PLAIN"), ("SCRAM-SHA-256", "SCRAM_SHA_256"), ("SCRAM-SHA-512", "SCRAM_SHA_512")]
    {
        let user = variable(&format!("TIDEMILL_TEST_KAFKA_{name}_USER"));
        let secret = format!("{{ env = \"TIDEMILL_TEST_KAFKA_{name}_PASSWORD\" }}");
        for (address, protocol) in
            [("TIDEMILL_TEST_KAFKA_SASL_SSL", "SASL_SSL"), ("TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT", "SASL_PLAINTEXT")]
        {
            let mut properties = vec![("security.protocol", protocol), ("sasl.mechanisms", mechanism)];
            properties.extend([("sasl.username", user.as_str()), ("sasl.password", secret.as_str())]);
            if protocol == "SASL_SSL" {
                properties.push(("ssl.ca.location", &ca));
            }
            assert!(ends(train(address, &properties)), "{mechanism} over {protocol}");
        }
    }
    let wrong = [
        ("security.protocol", "SASL_PLAINTEXT"),
        ("sasl.mechanisms", "PLAIN"),
        ("sasl.username", "plain-user"),
        ("sasl.password", "wrong"),
    ];
    let said = train("TIDEMILL_TEST_KAFKA_SASL_PLAINTEXT", &wrong).fails(&["--until-end"]);
    says(&said, &["no Kafka broker at", "uthentication", "kafka.properties"]);
    let unknown = train("TIDEMILL_TEST_KAFKA", &[("securty.protocol", "SSL")]).fails(&["--until-end"]);
    says(&unknown, &["kafka.properties", "securty.protocol"]);
    let ours = train("TIDEMILL_TEST_KAFKA", &[("group.id", "mine")]).fails(&["--until-end"]);
    says(&ours, &["group.id", "kafka.group"]);
    let unset =
        train("TIDEMILL_TEST_KAFKA", &[("sasl.password", "{ env = \"NO_SUCH_VARIABLE\" }")]).fails(&["--until-end"]);
    says(&unset, &["sasl.password", "NO_SUCH_VARIABLE"]);
}

#[test]
fn a_topic_that_is_not_there_is_named() {
    let (impressions, clicks) = (Topic::new("impressions", 1), Topic::new("clicks", 1));
    let job = job(&impressions, &clicks);
    job.edit(&impressions.name, "no-such-topic");
    says(&job.fails(&["--until-end"]), &["no topic `no-such-topic`", &brokers()]);
}

#[test]
fn check_says_what_is_in_the_topics_and_how_it_is_decoded() {
    let (impressions, clicks) = (Topic::new("impressions", 2), Topic::new("clicks", 1));
    for n in 0..30 {
        impressions.put((n % 2) as i32, &impression(n));
    }
    impressions.flush();
    clicks.put(0, &click(1));
    clicks.flush();
    let job = job(&impressions, &clicks);
    let output =
        Command::new(TIDEMILL).args(["check", "--sample", "1", "-c"]).arg(job.path("job.toml")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    says(
        &text,
        &["2 partition(s) can be read, 30 records", &format!("`{}/0` at offset 0", impressions.name), "user_id"],
    );
}
