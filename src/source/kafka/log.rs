//! One stream's topics: what partitions there are, where they begin and end, and who reads them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rdkafka::Message as _;
use rdkafka::consumer::{CommitMode, Consumer as _};
use rdkafka::error::KafkaError;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use rdkafka::types::RDKafkaErrorCode;

use super::desk::{Desk, Ends};
use super::reader::Reader;
use super::{Cluster, Consumer, Error, Start, Topics, name_of, once_known};
use crate::event::{Stream, Time};
use crate::position::{Fingerprint, NextOffset};
use crate::source::NewDecoder;
use crate::source::pool::{Partition, lock, text_of_panic};
use crate::source::readers::Sources;

/// How long a broker may take to answer before it counts as away.
const ANSWER: Duration = Duration::from_secs(15);
/// The same while running, where it is asked again anyway.
const QUICK: Duration = Duration::from_secs(5);
/// How often the client is served; also the longest that a reader waits for an answer to begin.
const TICK: Duration = Duration::from_millis(20);

/// A partition as its broker and its reader last saw it; all but `lag` and `margin` are offsets or counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionState {
    pub name: String,
    /// First offset that there is.
    pub low: u64,
    /// First offset that was not written.
    pub high: u64,
    /// First offset that was not read.
    pub position: u64,
    pub tombstones: u64,
    /// The broker did not answer when it was last asked.
    pub away: bool,
    /// By how many records retention last moved the beginning.
    pub last_drop: u64,
}

/// The topics of one stream, connected. Dropping it ends its thread; to be dropped after the readers have ended.
pub struct Log {
    stream: Stream,
    topics: Topics,
    cluster: Cluster,
    consumer: Arc<Consumer>,
    desk: Arc<Desk>,
    /// By name.
    names: BTreeMap<String, (String, i32)>,
    watch: Option<JoinHandle<()>>,
}

impl Log {
    /// Connects, finds the partitions of all topics and where they begin and end.
    pub fn connect(stream: Stream, cluster: &Cluster, topics: &Topics) -> Result<Self, Error> {
        cluster.check()?;
        let prober = cluster.prober(stream.name())?;
        let mut names = BTreeMap::new();
        for topic in &topics.topics {
            let count = once_known(|| partitions(&prober, cluster, topic, ANSWER))?;
            let mine: Vec<i32> = (0..count as i32).filter(|partition| topics.shard.has(*partition)).collect();
            if mine.is_empty() {
                return Err(Error::EmptyShard { topic: topic.clone(), partitions: count, shard: topics.shard });
            }
            names.extend(mine.into_iter().map(|partition| (name_of(topic, partition), (topic.clone(), partition))));
        }
        let each = (topics.memory / names.len() as u64).max(64 << 10);
        let consumer = Arc::new(cluster.consumer(
            stream.name(),
            &[
                ("enable.partition.eof", "true".into()),
                ("statistics.interval.ms", "500".into()),
                // Both bounds are a partition's: librdkafka counts per queue where each partition has its own.
                ("queued.max.messages.kbytes", (each >> 10).clamp(1, 2_097_151).to_string()),
                ("queued.min.messages", "1000000".into()),
                ("fetch.message.max.bytes", (each / 2).clamp(32 << 10, 1 << 20).to_string()),
                // How long a queue that was full waits before it is filled again; the default starves a fast reader.
                ("fetch.queue.backoff.ms", "5".into()),
                ("fetch.error.backoff.ms", "100".into()),
                ("reconnect.backoff.max.ms", "2000".into()),
            ],
        )?);
        let desk = Arc::new(Desk {
            stop: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            begun: AtomicU64::new(0),
            partitions: Mutex::new(names.values().map(|at| (at.clone(), Arc::default())).collect()),
            found: Mutex::default(),
            commit: Mutex::default(),
            fatal: Mutex::default(),
        });
        let watch = Watch {
            prober,
            consumer: Arc::clone(&consumer),
            desk: Arc::clone(&desk),
            topics: topics.clone(),
            cluster: cluster.clone(),
            group: cluster.group.is_some(),
        };
        once_known(|| {
            watch.round(ANSWER, true).map_err(|source| Error::Unreachable {
                brokers: cluster.brokers.clone(),
                what: "where partitions begin and end".into(),
                last: watch.prober.context().last_error(),
                source,
            })
        })?;
        let thread = thread::Builder::new().name(format!("kafka-{}", stream.name())).spawn(move || watch.run());
        let mut log =
            Self { stream, topics: topics.clone(), cluster: cluster.clone(), consumer, desk, names, watch: None };
        log.watch = Some(thread.map_err(|error| Error::Fatal(format!("its thread cannot be started: {error}")))?);
        Ok(log)
    }

    /// The names of the partitions, sorted by topic and number.
    #[must_use]
    pub fn partitions(&self) -> Vec<String> {
        let mut all: Vec<_> = self.names.iter().collect();
        all.sort_by_key(|(_, at)| *at);
        all.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// How many partitions each topic has, also those of other shards.
    pub fn counts(&self) -> Result<Vec<(String, usize)>, Error> {
        let count = |topic: &String| Ok((topic.clone(), partitions(&self.consumer, &self.cluster, topic, ANSWER)?));
        self.topics.topics.iter().map(count).collect()
    }

    /// Whether a partition without a position is read from its first record.
    #[must_use]
    pub fn starts_at_first(&self) -> bool {
        self.topics.start == Start::Earliest
    }

    #[must_use]
    pub fn shard(&self) -> super::Shard {
        self.topics.shard
    }

    /// Where each partition stands.
    #[must_use]
    pub fn states(&self) -> Vec<PartitionState> {
        let partitions = lock(&self.desk.partitions);
        let state = |((topic, partition), ends): (&(String, i32), &Arc<Ends>)| PartitionState {
            name: name_of(topic, *partition),
            low: ends.low.load(Ordering::Relaxed),
            high: ends.high(),
            position: ends.position.load(Ordering::Relaxed),
            tombstones: ends.tombstones.load(Ordering::Relaxed),
            away: ends.away.load(Ordering::Relaxed),
            last_drop: ends.jump.load(Ordering::Relaxed),
        };
        partitions.iter().map(state).collect()
    }

    /// Where a partition that no position is known of is to be read from: as the settings say, but from its first record
    /// where `known` has another partition of its topic, which it has then got since.
    pub fn start_of<'a>(&self, name: &str, mut known: impl Iterator<Item = &'a str>) -> Result<NextOffset, Error> {
        let (topic, partition) = &self.names[name];
        let ends = self.ends(topic, *partition);
        let (low, high) = (ends.low.load(Ordering::Acquire), ends.high());
        let grown = known.any(|known| known.rsplit_once('/').is_some_and(|(of, _)| of == topic));
        let offset = match &self.topics.start {
            _ if grown => low,
            Start::Earliest => low,
            Start::Latest => high,
            Start::Time(time) => self.offset_at(topic, *partition, *time)?.unwrap_or(high),
            Start::Offsets(offsets) => match offsets.get(name) {
                Some(offset) if (low..=high).contains(offset) => *offset,
                found => {
                    let key = format!("{}.source.start.\"{name}\"", self.stream.name());
                    let value = found.map_or("nothing".to_owned(), |found| format!("{found} (it has {low} to {high})"));
                    return Err(Error::Setting { key, expected: "an offset that the partition has", value });
                }
            },
        };
        Ok(NextOffset { offset, before: Fingerprint::NONE })
    }

    fn offset_at(&self, topic: &str, partition: i32, time: Time) -> Result<Option<u64>, Error> {
        let mut asked = TopicPartitionList::new();
        let unreachable = |source| Error::Unreachable {
            brokers: self.cluster.brokers.clone(),
            what: format!("for the first record of `{topic}` at or after {time}"),
            last: self.consumer.context().last_error(),
            source,
        };
        asked.add_partition_offset(topic, partition, Offset::Offset(time.0.max(0))).map_err(unreachable)?;
        let answer = self.consumer.offsets_for_times(asked, ANSWER).map_err(unreachable)?;
        let found = answer.elements().first().map(|element| (element.offset(), element.error()));
        match found {
            Some((Offset::Offset(offset), Ok(()))) => Ok(u64::try_from(offset).ok()),
            Some((_, Err(source))) => Err(unreachable(source)),
            _ => Ok(None),
        }
    }

    fn ends(&self, topic: &str, partition: i32) -> Arc<Ends> {
        Arc::clone(lock(&self.desk.partitions).entry((topic.to_owned(), partition)).or_default())
    }

    /// The position to go on from, if the log still has what comes next: `from`, or with `skip_lost` the first record that
    /// retention has left. `read` is how far it was read before.
    pub fn resume(&self, name: &str, from: NextOffset, read: NextOffset, skip_lost: bool) -> Result<NextOffset, Error> {
        let (topic, partition) = &self.names[name];
        let ends = self.ends(topic, *partition);
        let (low, high) = (ends.low.load(Ordering::Acquire), ends.high());
        if read.offset > high {
            let why = format!("it was read to offset {}, but ends at {high}", read.offset);
            return Err(Error::Rewritten { partition: name.to_owned(), why });
        }
        if from.offset >= low {
            return Ok(from);
        }
        if !skip_lost {
            return Err(Error::Lost { partition: name.to_owned(), from: from.offset, low });
        }
        Ok(NextOffset { offset: low, before: Fingerprint::NONE })
    }

    /// Starts to read partitions from the given places: bounded to the end that they have now, or following.
    pub fn read(
        &self,
        sources: &mut Sources,
        from: &[(String, NextOffset)],
        bounded: bool,
        decoder: &NewDecoder,
    ) -> Result<Vec<Partition>, crate::source::Error> {
        let mut assigned = TopicPartitionList::new();
        let mut readers = Vec::new();
        for (name, from) in from {
            let (topic, partition) = &self.names[name];
            let ends = self.ends(topic, *partition);
            let low = ends.low.load(Ordering::Acquire);
            // Begins with the record before, to see that it is the one that was read; retention may have dropped it.
            let check = from.before != Fingerprint::NONE && from.offset > low;
            let first = if check { from.offset - 1 } else { from.offset };
            // Before it is assigned, so that no record can come by the way of all.
            let queue = self.consumer.split_partition_queue(topic, *partition);
            let queue = queue.ok_or_else(|| Error::Fatal(format!("`{name}` has no queue")))?;
            assigned
                .add_partition_offset(topic, *partition, Offset::Offset(first as i64))
                .map_err(|source| Error::Client { source })?;
            ends.position.store(from.offset, Ordering::Relaxed);
            readers.push(Reader::new(
                &self.topics,
                (topic.clone(), *partition),
                queue,
                Arc::clone(&self.consumer),
                Arc::clone(&self.desk),
                Arc::clone(&ends),
                *from,
                check,
                bounded.then(|| ends.high()),
                Arc::clone(decoder),
                sources.desk(),
            ));
        }
        self.consumer.incremental_assign(&assigned).map_err(|source| Error::Client { source })?;
        let launch = |reader: Reader| {
            let queue = Arc::clone(&reader.out);
            sources.launch(self.stream, queue, move || reader.run())
        };
        readers.into_iter().map(launch).collect()
    }

    /// Partitions that have appeared since they were last asked for, each with its first offset. They belong to it from now on.
    pub fn found(&mut self) -> Vec<(String, NextOffset)> {
        let found = std::mem::take(&mut *lock(&self.desk.found));
        let name = |(topic, partition, low): (String, i32, u64)| {
            let name = name_of(&topic, partition);
            self.names.insert(name.clone(), (topic, partition));
            (name, NextOffset { offset: low, before: Fingerprint::NONE })
        };
        found.into_iter().map(name).collect()
    }

    /// Shows a group, if one is configured, where reading would begin again; the latest call counts.
    pub fn commit(&self, positions: impl Iterator<Item = (String, NextOffset)>) {
        let named = positions.filter_map(|(name, at)| {
            let (topic, partition) = self.names.get(&name)?;
            Some((topic.clone(), *partition, at.offset))
        });
        *lock(&self.desk.commit) = Some(named.collect());
    }

    /// The first `n` records that there are, with the partition's name and the offset of each. For looking at a log.
    pub fn first_records(cluster: &Cluster, topics: &Topics, n: usize) -> Result<Vec<(String, u64, Vec<u8>)>, Error> {
        let consumer = cluster.consumer("sample", &[("enable.partition.eof", "true".into())])?;
        let mut records = Vec::new();
        for topic in &topics.topics {
            for partition in 0..partitions(&consumer, cluster, topic, ANSWER)? as i32 {
                if records.len() >= n || !topics.shard.has(partition) {
                    continue;
                }
                let mut one = TopicPartitionList::new();
                let client = |source| Error::Client { source };
                one.add_partition_offset(topic, partition, Offset::Beginning).map_err(client)?;
                consumer.assign(&one).map_err(client)?;
                let deadline = Instant::now() + ANSWER;
                while records.len() < n && Instant::now() < deadline {
                    match consumer.poll(TICK) {
                        None => {}
                        Some(Ok(message)) => {
                            let Some(raw) = message.payload() else { continue };
                            let raw = raw[..raw.len().min(topics.max_record)].to_vec();
                            records.push((name_of(topic, partition), message.offset() as u64, raw));
                        }
                        Some(Err(KafkaError::PartitionEOF(_))) => break,
                        Some(Err(source)) => {
                            return Err(Error::Unreadable {
                                partition: name_of(topic, partition),
                                offset: 0,
                                why: source.to_string(),
                            });
                        }
                    }
                }
            }
        }
        Ok(records)
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.desk.stop.store(true, Ordering::Relaxed);
        if let Some(watch) = self.watch.take() {
            // What it panicked with is in `fatal` already.
            let _ = watch.join();
        }
    }
}

/// How many partitions a topic has.
fn partitions(consumer: &Consumer, cluster: &Cluster, topic: &str, timeout: Duration) -> Result<usize, Error> {
    let brokers = || cluster.brokers.clone();
    let metadata = consumer.fetch_metadata(Some(topic), timeout).map_err(|source| Error::Unreachable {
        brokers: brokers(),
        what: format!("for the partitions of `{topic}`"),
        last: consumer.context().last_error(),
        source,
    })?;
    let found = metadata.topics().iter().find(|found| found.name() == topic);
    match found.map(|found| (found.error(), found.partitions().len())) {
        Some((None, count)) if count > 0 => Ok(count),
        found => {
            let code = found.and_then(|(error, _)| error).map(RDKafkaErrorCode::from);
            let why = code.map_or("it has no partitions".to_owned(), |code| code.to_string());
            Err(Error::NoTopic { topic: topic.to_owned(), brokers: brokers(), why })
        }
    }
}

/// The thread that serves the client: logs, errors, commits, and questions to the brokers.
struct Watch {
    prober: Consumer,
    consumer: Arc<Consumer>,
    desk: Arc<Desk>,
    topics: Topics,
    cluster: Cluster,
    /// Whether positions are committed.
    group: bool,
}

impl Watch {
    fn run(self) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.serve())) {
            let why = format!("its thread panicked: {}; this is a bug of tidemill", text_of_panic(panic.as_ref()));
            *lock(&self.desk.fatal) = Some(why);
        }
    }

    fn serve(&self) {
        let mut looked = Instant::now();
        let mut asked_at = Instant::now();
        while !self.desk.stop.load(Ordering::Relaxed) {
            match self.consumer.poll(TICK) {
                None => {}
                Some(Err(KafkaError::MessageConsumptionFatal(code))) => {
                    *lock(&self.desk.fatal) = Some(code.to_string());
                }
                Some(Err(error)) => tracing::warn!(%error, "kafka"),
                Some(Ok(message)) => {
                    let at = format!("{} at {}", name_of(message.topic(), message.partition()), message.offset());
                    *lock(&self.desk.fatal) = Some(format!("a record of {at} went astray; this is a bug of tidemill"));
                }
            }
            while self.prober.poll(Duration::ZERO).is_some() {}
            self.commit();
            let look = looked.elapsed() >= self.cluster.refresh;
            let asked = self.desk.asked.swap(false, Ordering::AcqRel);
            if (look || asked)
                && let Err(error) = self.round(QUICK, look)
                // Said once a while: what waits for it says so all the time.
                && asked_at.elapsed() >= Duration::from_secs(10)
            {
                asked_at = Instant::now();
                tracing::warn!(%error, "kafka: no broker says where partitions end; they are waited for");
            }
            if look {
                looked = Instant::now();
                self.discover();
            }
        }
        self.commit(); // the last word to the group
    }

    /// Asks where every partition ends, and where it begins too if `low`.
    fn round(&self, timeout: Duration, low: bool) -> Result<(), KafkaError> {
        let number = self.desk.begun.fetch_add(1, Ordering::AcqRel) + 1;
        let partitions = lock(&self.desk.partitions).clone();
        let ask = |what: Offset| {
            let mut list = TopicPartitionList::with_capacity(partitions.len());
            for (topic, partition) in partitions.keys() {
                list.add_partition_offset(topic, *partition, what)?;
            }
            self.prober.offsets_for_times(list, timeout)
        };
        // The beginning first: what is lost is judged by an end that is not older.
        let asked = (if low { ask(Offset::Beginning).map(Some) } else { Ok(None) })
            .and_then(|lows| ask(Offset::End).map(|highs| (lows, highs)));
        let (lows, highs) = match asked {
            Ok(answers) => answers,
            Err(error) => {
                partitions.values().for_each(|ends| ends.away.store(true, Ordering::Release));
                return Err(error);
            }
        };
        let answers = |list: &TopicPartitionList, take: &dyn Fn(&Arc<Ends>, u64)| {
            let mut failed = None;
            for element in list.elements() {
                let Some(ends) = partitions.get(&(element.topic().to_owned(), element.partition())) else { continue };
                match (element.error(), element.offset()) {
                    (Ok(()), Offset::Offset(offset)) => take(ends, offset as u64),
                    (Err(error), _) => {
                        ends.away.store(true, Ordering::Release);
                        failed = Some(error);
                    }
                    _ => ends.away.store(true, Ordering::Release),
                }
            }
            failed
        };
        let mut failed = None;
        if let Some(lows) = &lows {
            failed = answers(lows, &|ends, low| {
                let before = ends.low.swap(low, Ordering::AcqRel);
                if low > before && ends.round.load(Ordering::Relaxed) > 0 {
                    ends.jump.store(low - before, Ordering::Relaxed);
                }
            });
        }
        failed = answers(&highs, &|ends, high| {
            ends.high.store(high, Ordering::Release);
            ends.away.store(false, Ordering::Release);
            ends.round.store(number, Ordering::Release);
        })
        .or(failed);
        failed.map_or(Ok(()), Err)
    }

    /// Looks for partitions that were not there before.
    fn discover(&self) {
        for topic in &self.topics.topics {
            // A topic that is not there just now is its readers' business.
            let Ok(count) = partitions(&self.prober, &self.cluster, topic, QUICK) else { continue };
            for partition in (0..count as i32).filter(|partition| self.topics.shard.has(*partition)) {
                if lock(&self.desk.partitions).contains_key(&(topic.clone(), partition)) {
                    continue;
                }
                let Ok((low, high)) = self.prober.fetch_watermarks(topic, partition, QUICK) else { continue };
                let ends = Ends { low: (low as u64).into(), high: (high as u64).into(), ..Ends::default() };
                lock(&self.desk.partitions).insert((topic.clone(), partition), Arc::new(ends));
                lock(&self.desk.found).push((topic.clone(), partition, low as u64));
            }
        }
    }

    /// Shows the group the latest positions, if there are new ones and somebody to hear it.
    fn commit(&self) {
        let away = || lock(&self.desk.partitions).values().any(|ends| ends.away.load(Ordering::Relaxed));
        if !self.group || away() {
            return;
        }
        let Some(positions) = lock(&self.desk.commit).take() else { return };
        let mut list = TopicPartitionList::new();
        let added = positions.iter().try_for_each(|(topic, partition, offset)| {
            list.add_partition_offset(topic, *partition, Offset::Offset(*offset as i64))
        });
        if let Err(error) = added.and_then(|()| self.consumer.commit(&list, CommitMode::Sync)) {
            tracing::warn!(%error, "positions could not be shown to the group; the checkpoint has them");
        }
    }
}
