//! A bare rdkafka consumer: reads topics from their beginning to the end that they have, and does nothing with the records. What
//! scripts/bench_kafka.py holds Tidemill against.
//!
//!     drain BROKERS TOPIC...        prints {"records": N, "bytes": N, "seconds": S}

use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let brokers = arguments.next().ok_or("drain BROKERS TOPIC...")?;
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "drain")
        .set("enable.auto.commit", "false")
        .set("enable.partition.eof", "true")
        .create()?;
    let began = Instant::now();
    let mut all = TopicPartitionList::new();
    let mut open = 0;
    for topic in arguments {
        let metadata = consumer.fetch_metadata(Some(&topic), Duration::from_secs(10))?;
        for partition in metadata.topics()[0].partitions() {
            all.add_partition_offset(&topic, partition.id(), Offset::Beginning)?;
            open += 1;
        }
    }
    consumer.assign(&all)?;
    let (mut records, mut bytes) = (0_u64, 0_usize);
    while open > 0 {
        match consumer.poll(Duration::from_secs(10)) {
            Some(Ok(message)) => {
                records += 1;
                bytes += message.payload_len();
            }
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(error)) => return Err(error.into()),
            None => return Err("nothing came for ten seconds".into()),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    println!("{{\"records\": {records}, \"bytes\": {bytes}, \"seconds\": {seconds:.3}}}");
    Ok(())
}
