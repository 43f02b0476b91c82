//! Records into topics: dead letters, replays, generated streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rdkafka::ClientContext;
use rdkafka::Statistics;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::error::KafkaError;
use rdkafka::message::{DeliveryResult, Header as NativeHeader, OwnedHeaders};
use rdkafka::producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer};
use rdkafka::types::RDKafkaErrorCode;

use super::{Cluster, Context, Error, once_known, refused};
use crate::event::Time;

/// A header of a message.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a> {
    pub name: &'a str,
    pub value: &'a str,
}

/// A message to be written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Message<'a> {
    pub topic: &'a str,
    /// By default the partition follows from the key, as Java's clients choose it (murmur2); without a key it is any.
    pub partition: Option<i32>,
    pub key: Option<&'a [u8]>,
    pub value: &'a [u8],
    /// Default: now.
    pub timestamp: Option<Time>,
    pub headers: &'a [Header<'a>],
}

/// Writes messages to topics, in order for each key, each at least once (idempotently, so that only a restart repeats one).
pub struct Sink {
    producer: ThreadedProducer<Acks>,
    failed: Arc<AtomicU64>,
    /// The topic that was written last, for messages.
    topic: String,
}

/// Sees what became of each message.
struct Acks {
    client: Context,
    failed: Arc<AtomicU64>,
}

impl ClientContext for Acks {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.client.log(level, facility, message);
    }

    fn stats(&self, _: Statistics) {}

    fn error(&self, error: KafkaError, reason: &str) {
        self.client.error(error, reason);
    }
}

impl ProducerContext for Acks {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, (): ()) {
        if let Err((error, _)) = result {
            self.failed.fetch_add(1, Ordering::AcqRel);
            tracing::warn!(client = self.client.label, %error, "kafka: a record was not taken");
        }
    }
}

impl Sink {
    /// Makes the client; touches no broker.
    pub fn new(cluster: &Cluster, label: &'static str) -> Result<Self, Error> {
        let mut config = cluster.base()?;
        let defaults = [
            ("enable.idempotence", "true"),
            ("partitioner", "murmur2_random"),
            ("linger.ms", "20"),
            ("compression.type", "zstd"),
            ("message.timeout.ms", "60000"),
        ];
        for (name, value) in defaults.iter().filter(|(name, _)| !cluster.properties.contains_key(*name)) {
            config.set(*name, *value);
        }
        let failed = Arc::new(AtomicU64::new(0));
        let context = Acks { client: Context::new(label), failed: Arc::clone(&failed) };
        let producer = config.create_with_context(context).map_err(refused)?;
        Ok(Self { producer, failed, topic: String::new() })
    }

    /// How many partitions a topic has; an error if there is no such topic.
    pub fn partitions(&self, topic: &str) -> Result<usize, Error> {
        once_known(|| self.ask_partitions(topic))
    }

    fn ask_partitions(&self, topic: &str) -> Result<usize, Error> {
        let metadata = self.producer.client().fetch_metadata(Some(topic), Duration::from_secs(15));
        let metadata = metadata.map_err(|source| self.unwritable(topic, source))?;
        let found = metadata.topics().iter().find(|found| found.name() == topic && found.error().is_none());
        match found.map(|found| found.partitions().len()) {
            Some(count) if count > 0 => Ok(count),
            _ => Err(self.unwritable(topic, KafkaError::MetadataFetch(RDKafkaErrorCode::UnknownTopicOrPartition))),
        }
    }

    /// Hands a message to the client, which holds it until it is written; waits while it holds too many.
    pub fn write(&mut self, message: &Message<'_>) -> Result<(), Error> {
        if self.topic != message.topic {
            message.topic.clone_into(&mut self.topic);
        }
        let mut record: BaseRecord<'_, [u8], [u8]> = BaseRecord::to(message.topic).payload(message.value);
        record.key = message.key;
        record.partition = message.partition;
        record.timestamp = message.timestamp.map(|time| time.0);
        if !message.headers.is_empty() {
            let headers = OwnedHeaders::new_with_capacity(message.headers.len());
            record.headers = Some(message.headers.iter().fold(headers, |headers, header| {
                headers.insert(NativeHeader { key: header.name, value: Some(header.value) })
            }));
        }
        let full_since = Instant::now();
        loop {
            match self.producer.send(record) {
                Ok(()) => return Ok(()),
                Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back))
                    if full_since.elapsed() < Duration::from_secs(60) =>
                {
                    record = back;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err((source, _)) => return Err(self.unwritable(message.topic, source)),
            }
        }
    }

    /// Waits until everything that was handed over is written; an error if something was not.
    pub fn flush(&mut self, timeout: Duration) -> Result<(), Error> {
        self.producer.flush(timeout).map_err(|source| self.unwritable(&self.topic, source))?;
        if self.failed.load(Ordering::Acquire) > 0 {
            return Err(self.unwritable(&self.topic, KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut)));
        }
        Ok(())
    }

    fn unwritable(&self, topic: &str, source: KafkaError) -> Error {
        Error::Unwritable { topic: topic.to_owned(), undelivered: self.failed.load(Ordering::Acquire), source }
    }
}
