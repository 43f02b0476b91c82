//! A real broker, topics of one's own on it, and jobs that read them.
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::executor::block_on;
use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::message::{Headers as _, Message as _};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer as _};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use serde_json::{Value, json};

use crate::common::{Job, TIDEMILL, summary};

// ---------------------------------------------------------------------------------------------------------- the broker

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!(
            "`{name}` is not set: these tests need a real Kafka. Run `scripts/services.sh up kafka`, then \
             `set -a; . .services/kafka/env; set +a`; or run scripts/test.sh, which does it all"
        )
    })
}

pub fn brokers() -> String {
    variable("TIDEMILL_TEST_KAFKA")
}

pub fn config() -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", brokers());
    config
}

pub fn admin() -> AdminClient<DefaultClientContext> {
    config().create().unwrap()
}

/// A topic of its own for a test.
pub struct Topic {
    pub name: String,
    pub producer: BaseProducer,
}

impl Topic {
    pub fn new(what: &str, partitions: i32) -> Self {
        Self::with(what, partitions, &[])
    }

    pub fn with(what: &str, partitions: i32, settings: &[(&str, &str)]) -> Self {
        // The records of these tests are old, and retention goes by their timestamps.
        let settings = [&[("retention.ms", "-1")], settings].concat();
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{what}-{}-{number}", std::process::id());
        create(&name, partitions, &settings);
        // Idempotent: else a batch that is tried again comes behind later ones.
        let producer = config().set("enable.idempotence", "true").create().unwrap();
        Self { name, producer }
    }

    /// Writes a record without a key into a partition.
    pub fn put(&self, partition: i32, value: &str) {
        self.send(BaseRecord::<str, str>::to(&self.name).partition(partition).payload(value));
    }

    pub fn send(&self, mut record: BaseRecord<'_, str, str>) {
        while let Err((_, back)) = self.producer.send(record) {
            record = back;
            self.producer.poll(Duration::from_millis(5));
        }
    }

    pub fn flush(&self) {
        self.producer.flush(Duration::from_secs(30)).unwrap();
    }

    pub fn high(&self, partition: i32) -> u64 {
        let consumer: BaseConsumer = config().create().unwrap();
        consumer.fetch_watermarks(&self.name, partition, Duration::from_secs(10)).unwrap().1 as u64
    }

    /// All records of the topic: key, value and headers.
    pub fn read(&self) -> Vec<(Option<String>, String, BTreeMap<String, String>)> {
        let consumer: BaseConsumer = config().set("group.id", "reader").create().unwrap();
        let metadata = consumer.fetch_metadata(Some(&self.name), Duration::from_secs(10)).unwrap();
        let mut all = TopicPartitionList::new();
        let mut left = 0;
        for partition in metadata.topics()[0].partitions() {
            all.add_partition_offset(&self.name, partition.id(), Offset::Beginning).unwrap();
            left += self.high(partition.id());
        }
        consumer.assign(&all).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut records = Vec::new();
        while (records.len() as u64) < left {
            let message = consumer.poll(Duration::from_secs(10)).expect("the records that there are").unwrap();
            let headers = message.headers().map(|headers| {
                headers.iter().map(|header| (header.key.to_owned(), text(header.value.unwrap_or_default()))).collect()
            });
            let key = message.key().map(text);
            records.push((key, text(message.payload().unwrap_or_default()), headers.unwrap_or_default()));
        }
        records
    }
}

pub fn create(name: &str, partitions: i32, settings: &[(&str, &str)]) {
    let mut topic = NewTopic::new(name, partitions, TopicReplication::Fixed(1));
    for (key, value) in settings {
        topic = topic.set(key, value);
    }
    let made = block_on(admin().create_topics([&topic], &AdminOptions::new())).unwrap();
    assert!(made[0].is_ok(), "{made:?}");
    // Brokers hear of it a moment later.
    let asking: BaseConsumer = config().create().unwrap();
    wait_for("the topic to be known", || {
        let metadata = asking.fetch_metadata(Some(name), Duration::from_secs(10)).unwrap();
        let known = metadata.topics()[0].partitions();
        // That a broker leads a partition is said before it knows it itself.
        let led = |partition: i32| asking.fetch_watermarks(name, partition, Duration::from_secs(10)).is_ok();
        known.len() == partitions as usize && (0..partitions).all(led)
    });
}

pub fn delete(name: &str) {
    block_on(admin().delete_topics(&[name], &AdminOptions::new())).unwrap()[0].as_ref().unwrap();
    let consumer: BaseConsumer = config().create().unwrap();
    wait_for("the topic to go", || {
        let metadata = consumer.fetch_metadata(Some(name), Duration::from_secs(10)).unwrap();
        metadata.topics()[0].partitions().is_empty()
    });
}

/// Tells the broker to drop all records of a partition before `offset`, as retention does.
pub fn drop_before(topic: &str, partition: i32, offset: u64) {
    let mut list = TopicPartitionList::new();
    list.add_partition_offset(topic, partition, Offset::Offset(offset as i64)).unwrap();
    block_on(admin().delete_records(&list, &AdminOptions::new())).unwrap();
}

pub fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(90), "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

// ------------------------------------------------------------------------------------------------------------- the job

/// A job that reads these topics.
pub fn job(impressions: &Topic, clicks: &Topic) -> Job {
    let job = Job::over(Path::new("IN"));
    for (stream, topic) in [("impressions", impressions), ("clicks", clicks)] {
        let topic = &topic.name;
        job.edit(
            &format!("source = {{ paths = [\"IN/{stream}-*\"], poll = \"10ms\" }}"),
            &format!("source = {{ kind = \"kafka\", topics = [\"{topic}\"] }}"),
        );
    }
    job.edit("[join]", &format!("[kafka]\nbrokers = \"{}\"\n[join]", brokers()));
    job
}

pub const KAFKA: &str = "source = { kind = \"kafka\"";
pub const ALWAYS_AWAITED: &str = "idle_after = \"never\"\nsource = { kind = \"kafka\"";

/// Writes generated files into the topics of a job with `tidemill replay`, and gives what it says.
pub fn replay(job: &Job, input: &Path, more: &[&str]) -> Value {
    summary(&replaying(job, input, more).wait_with_output().unwrap())
}

pub fn replaying(job: &Job, input: &Path, more: &[&str]) -> Child {
    let files = |stream: &str| format!("{}/{stream}-*", input.display());
    let mut command = Command::new(TIDEMILL);
    command.arg("replay").arg("-c").arg(job.path("job.toml")).arg("--json");
    command.arg("--impressions").arg(files("impressions")).arg("--clicks").arg(files("clicks")).args(more);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

pub const IN_ORDER: &[&str] = &["-n", "6000", "--disorder", "2s", "--duplicates", "0.02", "--orphans", "0.03"];
pub const DISTURBED: &[&str] = &[
    "-n",
    "8000",
    "--disorder",
    "2s",
    "--late",
    "0.003",
    "--duplicates",
    "0.02",
    "--orphans",
    "0.03",
    "--garbage",
    "0.01",
];

/// Impressions `i0, i1, ..` one a second, each shown to another user; every tenth is clicked a second later.
pub fn impression(n: u64) -> String {
    json!({"id": format!("i{n}"), "ts": 1_767_225_600_000 + n * 1000, "user": {"id": n % 7}, "item": {"id": n % 5}})
        .to_string()
}

pub fn click(n: u64) -> String {
    json!({"id": format!("i{n}"), "ts": 1_767_225_601_000 + n * 1000}).to_string()
}

/// The messages of an error and what it says of each.
pub fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "`{part}` is missing in: {text}");
    }
}
