//! What feeds the core: the partitions of both streams, read as the merge asks for them.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::dead_letters::DeadLetters;
use super::job::{Error, Journal, Options};
use super::keeper::Durable;
use super::objects;
use crate::clock;
use crate::config::{self, Checked, StreamSettings};
use crate::event::{Kind, Stream, Time};
use crate::merge::{Heard, JournalEntry, PartitionPosition};
use crate::position::NextOffset;
use crate::snapshot::manifest::{Document as _, Facts, Manifest};
use crate::source::decode::Decoder;
use crate::source::kafka::{Log, PartitionState};
use crate::source::{self, Arrival, Decode, NewDecoder, Origin, Partition, Recycler, Sources, file};
use crate::telemetry::{self, Stage};
use crate::train::core::Core;

/// The sources of a job: partitions of both streams in the order of the checkpoint, then of the config.
pub struct Input {
    /// By partition number; none for a file that is gone.
    partitions: Vec<Option<Partition>>,
    pub recycler: Recycler,
    sources: Sources,
    feeds: Vec<Feed>, // after `sources`, whose readers use them
    follow: bool,
    /// When it was last looked for new files and partitions.
    looked: Instant,
    /// Partitions of which the log may soon drop what was not trained.
    in_danger: BTreeSet<String>,
}

/// Where one stream comes from.
struct Feed {
    stream: Stream,
    settings: source::Settings,
    decoder: NewDecoder,
    /// None: from files.
    log: Option<Log>,
}

/// A partition that there is, before it is read.
struct Found {
    feed: usize,
    name: String,
    /// Of a file.
    spec: Option<source::Spec>,
}

impl Feed {
    fn open(checked: &Checked, stream: Stream, settings: &StreamSettings, keep: Keep) -> Result<Self, Error> {
        let decoder = decoder(checked, stream, keep)?;
        let log = match (settings.source.find(&key(stream))?, &checked.config.kafka) {
            (Origin::Files(_), _) => None,
            (Origin::Kafka(topics), Some(cluster)) => Some(Log::connect(stream, cluster, &topics).map_err(kafka)?),
            (Origin::Kafka(_), None) => unreachable!("the config was checked"),
        };
        Ok(Self { stream, settings: settings.source.clone(), decoder, log })
    }

    /// All partitions that there are, in a fixed order.
    fn partitions(&self, feed: usize, follow: bool) -> Result<Vec<Found>, Error> {
        if let Some(log) = &self.log {
            return Ok(log.partitions().into_iter().map(|name| Found { feed, name, spec: None }).collect());
        }
        let Origin::Files(files) = self.settings.find(&key(self.stream))? else { unreachable!("it has no log") };
        let mut remote = Vec::new();
        for pattern in &files.objects {
            if follow {
                return Err(Error::Config(config::Error::Setting {
                    key: format!("{}.paths", key(self.stream)),
                    expected:
                        "may name objects of a store only in a run that ends (--until-end, or --until without --follow)"
                            .into(),
                    value: format!("`{pattern}`"),
                }));
            }
            remote.extend(objects::find(pattern)?);
        }
        remote.sort_by(|a, b| a.0.cmp(&b.0));
        remote.dedup_by(|a, b| a.0 == b.0);
        let specs = files.specs(self.stream, follow, &self.decoder, remote, |_| NextOffset::default());
        let found = |spec: source::Spec| Found { feed, name: file::name_of(&spec.path), spec: Some(spec) };
        Ok(specs.into_iter().map(found).collect())
    }
}

fn key(stream: Stream) -> String {
    format!("{}.source", stream.name())
}

fn kafka(error: source::kafka::Error) -> Error {
    Error::Source(error.into())
}

impl Input {
    /// Following: a file that has appeared under a pattern, or a partition that a topic has got, is awaited from first sight.
    fn discover(&mut self, core: &mut Core) -> Result<(), Error> {
        if !self.follow || self.looked.elapsed() < LOOK {
            return Ok(());
        }
        self.looked = Instant::now();
        for feed in 0..self.feeds.len() {
            let Feed { stream, decoder, log, .. } = &mut self.feeds[feed];
            let stream = *stream;
            if let Some(log) = log {
                for (name, from) in log.found() {
                    tracing::info!(stream = stream.name(), name, offset = from.offset, "a new partition");
                    let read = log.read(&mut self.sources, &[(name.clone(), from)], false, decoder)?;
                    self.partitions.extend(read.into_iter().map(Some));
                    core.merge_mut().add_resumed(&fresh(&name, stream, from), std::iter::empty());
                }
                continue;
            }
            // A file that was there at the start and is gone now is the reader's business.
            let Ok(found) = self.feeds[feed].partitions(feed, self.follow) else { continue };
            for Found { name, spec, .. } in found {
                let merge = core.merge();
                if (0..merge.partitions()).any(|p| merge.stream(p) == stream && merge.name(p) == name) {
                    continue;
                }
                tracing::info!(stream = stream.name(), name, "a new partition");
                let read = self.sources.add_files(spec.into_iter().collect())?;
                self.partitions.extend(read.into_iter().map(Some));
                core.merge_mut().add_partition(&name, stream);
            }
        }
        Ok(())
    }

    /// Whether this run has settled where a partition starts, in a way that would come out otherwise another time.
    pub fn starts_anywhere(&self, resumed: bool) -> bool {
        !resumed && self.feeds.iter().any(|feed| feed.log.as_ref().is_some_and(|log| !log.starts_at_first()))
    }

    /// Shows how far each partition of Kafka is behind, and warns before its log drops what was not trained. `positions` are
    /// those from which a restart would read.
    pub fn report(&mut self, positions: &[PartitionPosition]) {
        for feed in &self.feeds {
            let states = feed.log.iter().flat_map(Log::states);
            for state in states {
                let position = positions.iter().find(|at| at.stream == feed.stream && at.name == state.name);
                let trained = position.map_or(state.position, |at| at.from.offset);
                let (lag, margin) = (state.high.saturating_sub(trained), trained.saturating_sub(state.low));
                telemetry::kafka_partition(feed.stream, &state.name, lag, margin, state.tombstones, state.away);
                // Retention drops whole segments: the next may be as long as the last.
                let danger = state.last_drop > 0 && lag > 0 && margin <= state.last_drop;
                if !danger {
                    self.in_danger.remove(&state.name);
                } else if self.in_danger.insert(state.name.clone()) {
                    let PartitionState { name, last_drop, .. } = state;
                    tracing::warn!(
                        name,
                        lag,
                        margin,
                        last_drop,
                        "the log's retention may soon drop records that were not trained: let it keep more, or the job catch up"
                    );
                }
            }
        }
    }

    /// Shows lag tools from where a restart would read, once a checkpoint says so.
    pub fn commit(&self, durable: &Durable) {
        let Some(positions) = durable.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        for (feed, log) in self.feeds.iter().filter_map(|feed| Some((feed, feed.log.as_ref()?))) {
            let mine = positions.iter().filter(|position| position.stream == feed.stream);
            log.commit(mine.map(|position| (position.name.clone(), position.from)));
        }
    }
}

/// The position of a partition of which nothing was read.
fn fresh(name: &str, stream: Stream, from: NextOffset) -> PartitionPosition {
    let heard = Heard::default();
    PartitionPosition { name: name.to_owned(), stream, from, watermark: Time::MIN, read: from, heard }
}

/// How often it is looked for new partitions.
const LOOK: Duration = Duration::from_secs(1);

/// What is kept of an event as text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    Nothing,
    Ids,
    /// The id and the values of all features.
    Values,
}

/// Makes decoders for a stream, after one was made to see that the mapping is sound.
pub fn decoder(checked: &Checked, stream: Stream, keep: Keep) -> Result<NewDecoder, Error> {
    let (settings, schema) = match stream {
        Stream::Impressions => (checked.config.impressions.record.clone(), Some(checked.schema.clone())),
        Stream::Clicks => {
            let clicks = checked.config.clicks.as_ref().expect("asked for only where there are clicks");
            (clicks.record.clone(), None)
        }
    };
    let make = move || {
        let decoder = Decoder::new(stream, &settings, schema.as_ref(), keep == Keep::Ids)?;
        Ok::<_, source::decode::Error>(if keep == Keep::Values { decoder.keeping_values() } else { decoder })
    };
    make()?;
    Ok(Arc::new(move || Box::new(make().expect("made once before")) as Box<dyn Decode>))
}

/// Opens all partitions: those of the checkpoint where it ended, others at their start.
pub fn open(
    checked: &Checked,
    options: &Options,
    known: &[PartitionPosition],
    core: &mut Core,
) -> Result<Input, Error> {
    let follow = options.follows();
    let config = &checked.config;
    let keep = match options.predictions {
        _ if core.keeps_examples() => Keep::Values,
        Some(_) => Keep::Ids,
        None => Keep::Nothing,
    };
    let impressions = Feed::open(checked, Stream::Impressions, &config.impressions, keep)?;
    let clicks = config.clicks.as_ref();
    let clicks = clicks.map(|clicks| Feed::open(checked, Stream::Clicks, clicks, Keep::Nothing)).transpose()?;
    let feeds: Vec<Feed> = std::iter::once(impressions).chain(clicks).collect();
    same_partitions(&feeds)?;
    let mut found = Vec::new();
    for (index, feed) in feeds.iter().enumerate() {
        found.extend(feed.partitions(index, follow)?);
    }
    // Partitions keep their numbers: the checkpoint's first, in its order.
    let place = |found: &Found| {
        known.iter().position(|known| known.name == found.name && known.stream == feeds[found.feed].stream)
    };
    if let Some(decided) = &options.journal {
        if known.is_empty() {
            let name = |found: &Found| (feeds[found.feed].stream, found.name.clone());
            let names: Vec<_> = found.iter().map(name).collect();
            core.merge_mut().resume(None, journal(decided, &names)?);
        } else {
            tracing::info!("the checkpoint has its own journal; --journal only counts for a new start");
        }
    }
    let mut slots: Vec<Option<usize>> = Vec::new();
    let mut from = vec![NextOffset::default(); found.len()];
    for (index, position) in known.iter().enumerate() {
        let at = found.iter().position(|found| place(found) == Some(index));
        slots.push(at);
        if let Some(at) = at {
            let log = feeds[found[at].feed].log.as_ref();
            let resumed =
                log.map(|log| log.resume(&position.name, position.from, position.read, options.skip_lost)).transpose();
            from[at] = resumed.map_err(kafka)?.unwrap_or(position.from);
            if from[at] != position.from {
                let (from, to) = (position.from.offset, from[at].offset);
                tracing::error!(
                    name = position.name,
                    from,
                    to,
                    "LOST: retention dropped records before they were trained"
                );
                core.merge_mut().skip(index, NextOffset { offset: to, ..NextOffset::default() });
            }
            continue;
        }
        // A partition that was trained to its end may leave; its number stays taken.
        let PartitionPosition { name, stream, from, read, .. } = position;
        if from.offset < read.offset {
            return Err(Error::PartitionGone { name: name.clone(), stream: stream.name() });
        }
        tracing::warn!(
            name,
            stream = stream.name(),
            offset = read.offset,
            "a partition is gone; it counts as ended there"
        );
        core.merge_mut().ended(index)?;
    }
    for (at, new) in found.iter().enumerate().filter(|(_, found)| place(found).is_none()) {
        let feed = &feeds[new.feed];
        if let Some(log) = &feed.log {
            from[at] = log.start_of(&new.name, known.iter().map(|known| known.name.as_str())).map_err(kafka)?;
        }
        core.merge_mut().add_resumed(&fresh(&new.name, feed.stream, from[at]), std::iter::empty());
        slots.push(Some(at));
    }
    let mut sources = Sources::start(checked.decode_threads())?;
    let mut opened: Vec<Option<Partition>> = Vec::new();
    for (index, feed) in feeds.iter().enumerate() {
        let mine = found.iter_mut().zip(&from).filter(|(found, _)| found.feed == index);
        opened.extend(
            match &feed.log {
                Some(log) => {
                    let names: Vec<_> = mine.map(|(found, from)| (found.name.clone(), *from)).collect();
                    log.read(&mut sources, &names, !follow, &feed.decoder)?
                }
                None => {
                    let spec = |(found, from): (&mut Found, &NextOffset)| {
                        let mode = |spec: &source::Spec| {
                            // Another one may be writing it.
                            if options.whole && !follow { file::Mode::Growing } else { spec.mode }
                        };
                        found.spec.take().map(|spec| source::Spec { from: *from, mode: mode(&spec), ..spec })
                    };
                    sources.add_files(mine.filter_map(spec).collect())?
                }
            }
            .into_iter()
            .map(Some),
        );
    }
    let partitions = slots.into_iter().map(|slot| slot.and_then(|at| opened[at].take())).collect();
    let recycler = sources.recycler();
    Ok(Input { partitions, recycler, sources, feeds, follow, looked: Instant::now(), in_danger: BTreeSet::new() })
}

/// The entries of a journal, for partitions that are numbered as `names` are.
fn journal(decided: &Journal, names: &[(Stream, String)]) -> Result<Vec<JournalEntry>, Error> {
    let from = match decided {
        Journal::Manifest(path) => path.display().to_string(),
        Journal::Entries { .. } => "the checkpoint".to_owned(),
    };
    let refuse = |why: String| Error::Journal { from: from.clone(), why };
    let (entries, partitions) = match decided {
        Journal::Manifest(path) => {
            let text = std::fs::read(path).map_err(|error| refuse(error.to_string()))?;
            let Facts { positions, journal, .. } =
                Manifest::from_bytes(&text).map_err(|error| refuse(format!("it is no manifest: {error}")))?.facts;
            let entries = journal.iter().map(|line| serde_json::from_str(line));
            let entries =
                entries.collect::<Result<Vec<JournalEntry>, _>>().map_err(|error| refuse(error.to_string()))?;
            (entries, positions.into_iter().map(|of| (of.stream, of.name)).collect())
        }
        Journal::Entries { entries, partitions } => (entries.clone(), partitions.clone()),
    };
    let entry = |mut entry: JournalEntry| {
        let at = entry.partition as usize;
        let of: &(Stream, String) =
            partitions.get(at).ok_or_else(|| refuse(format!("it is about partition {at}, which it does not name")))?;
        let (stream, name) = of;
        let missing = || refuse(format!("it is about `{name}` of {}, which this job does not read", stream.name()));
        entry.partition = names.iter().position(|here| here == of).ok_or_else(missing)? as u32;
        Ok(entry)
    };
    entries.into_iter().map(entry).collect()
}

/// Where clicks are sharded too, an impression's clicks must be in the shard that has the impression: the topics of both
/// streams must have equally many partitions.
fn same_partitions(feeds: &[Feed]) -> Result<(), Error> {
    let [Feed { log: Some(impressions), .. }, Feed { log: Some(clicks), .. }] = feeds else { return Ok(()) };
    if clicks.shard() == source::kafka::Shard::ALL {
        return Ok(());
    }
    let mut counts = impressions.counts().map_err(kafka)?;
    counts.extend(clicks.counts().map_err(kafka)?);
    if counts.windows(2).any(|pair| pair[0].1 != pair[1].1) {
        let counts: Vec<_> = counts.iter().map(|(topic, count)| format!("{topic}: {count}")).collect();
        return Err(Error::Config(config::Error::Setting {
            key: "clicks.source.shard".into(),
            expected: "says that both streams are partitioned alike, so all topics must have equally many partitions"
                .into(),
            value: counts.join(", "),
        }));
    }
    Ok(())
}

/// How long the merge waits for the partition it needs before it looks around.
const PATIENCE: Duration = Duration::from_millis(20);

/// Reads what the merge needs: waits for one partition, and looks at those that are not awaited.
pub fn pump(core: &mut Core, input: &mut Input, on: Option<usize>, dead: &mut DeadLetters) -> Result<(), Error> {
    input.discover(core)?;
    let mut moved = false;
    for partition in 0..input.partitions.len() {
        while core.merge().wants(partition) {
            let Some(arrival) = input.partitions[partition].as_mut().and_then(Partition::try_next) else { break };
            moved = true;
            accept(core, partition, arrival, dead)?;
        }
    }
    if moved {
        return Ok(());
    }
    let arrival = match on {
        Some(partition) => {
            let from = input.partitions[partition].as_mut();
            from.and_then(|from| from.next_timeout(PATIENCE)).map(|arrival| (partition, arrival))
        }
        None => {
            std::thread::sleep(PATIENCE);
            None
        }
    };
    match arrival {
        Some((partition, arrival)) => accept(core, partition, arrival, dead),
        None => {
            // Ends are heard of also where no records are wanted, so that silence counts from when it began.
            for partition in 0..input.partitions.len() {
                while let Some(news) = input.partitions[partition].as_mut().and_then(Partition::try_news) {
                    accept(core, partition, news, dead)?;
                }
                // No timer runs against records that merely wait to be read.
                let unread = || input.partitions[partition].as_ref().is_some_and(Partition::has_more);
                if core.merge().is_caught_up(partition) && unread() {
                    core.merge_mut().unconfirmed(partition);
                }
            }
            core.merge_mut().tick(clock::now());
            Ok(())
        }
    }
}

fn accept(core: &mut Core, partition: usize, arrival: Arrival, dead: &mut DeadLetters) -> Result<(), Error> {
    match arrival {
        Arrival::Records(chunk) => {
            if !chunk.rejects.is_empty() {
                dead.keep_rejects(core.merge(), partition, &chunk)?;
            }
            let now = clock::now();
            // The last record is about the newest.
            if let Some(last) = chunk.records.iter().rfind(|record| record.kind != Kind::Rejected) {
                telemetry::reached(Stage::Consumed(core.merge().stream(partition)), last.event_time, now);
            }
            core.offer(partition, chunk, now)?;
        }
        Arrival::CaughtUp { .. } => core.merge_mut().caught_up(partition, clock::now()),
        Arrival::Unconfirmed => core.merge_mut().unconfirmed(partition),
        Arrival::Ended { .. } => core.merge_mut().ended(partition)?,
        Arrival::Failed(error) => return Err(error.into()),
    }
    Ok(())
}
