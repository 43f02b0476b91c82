//! What feeds the core: the files of both streams, read as the merge asks for them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::dead_letters::DeadLetters;
use super::job::{Error, Options, Until};
use crate::clock;
use crate::config::Checked;
use crate::event::Stream;
use crate::merge::PartitionPosition;
use crate::position::NextOffset;
use crate::source::decode::Decoder;
use crate::source::file;
use crate::source::{self, Arrival, Decode, NewDecoder, Partition, Recycler, Sources};
use crate::train::core::Core;

/// The sources of a job: partitions of both streams in the order of the checkpoint, then of the config.
pub struct Input {
    /// By partition number; none for a file that is gone.
    partitions: Vec<Option<Partition>>,
    pub recycler: Recycler,
    sources: Sources,
    streams: Vec<(Stream, file::Settings, NewDecoder)>,
    follow: bool,
    /// When the patterns were last looked at for new files.
    looked: Instant,
}

impl Input {
    /// Following: a file that has appeared under a pattern is a new partition, awaited from first sight.
    fn discover(&mut self, core: &mut Core) -> Result<(), Error> {
        if !self.follow || self.looked.elapsed() < LOOK {
            return Ok(());
        }
        self.looked = Instant::now();
        // A file that was there at the start and is gone now is the reader's business.
        let Ok(specs) = specs(&self.streams, self.follow) else { return Ok(()) };
        for spec in specs {
            let (name, stream) = (file::name_of(&spec.path), spec.stream);
            if (0..core.merge().partitions()).any(|p| core.merge().stream(p) == stream && core.merge().name(p) == name)
            {
                continue;
            }
            tracing::info!(stream = stream.name(), name, "a new partition");
            self.partitions.push(Some(self.sources.add(spec)?));
            core.merge_mut().add_partition(&name, stream);
        }
        Ok(())
    }
}

/// How often followed patterns are looked at for new files.
const LOOK: Duration = Duration::from_secs(1);

fn specs(streams: &[(Stream, file::Settings, NewDecoder)], follow: bool) -> Result<Vec<source::Spec>, Error> {
    let mut all = Vec::new();
    for (stream, settings, decoder) in streams {
        let files = settings.check(&format!("{}.source", stream.name()))?;
        all.extend(files.specs(*stream, follow, decoder, |_| NextOffset::default()));
    }
    Ok(all)
}

/// Makes decoders for a stream, after one was made to see that the mapping is sound.
pub fn decoder(checked: &Checked, stream: Stream, keep_text: bool) -> Result<NewDecoder, Error> {
    let (settings, schema) = match stream {
        Stream::Impressions => (checked.config.impressions.record.clone(), Some(checked.schema.clone())),
        Stream::Clicks => {
            let clicks = checked.config.clicks.as_ref().expect("asked for only where there are clicks");
            (clicks.record.clone(), None)
        }
    };
    let make = move || Decoder::new(stream, &settings, schema.as_ref(), keep_text);
    make()?;
    Ok(Arc::new(move || Box::new(make().expect("made once before")) as Box<dyn Decode>))
}

/// Opens all files: those of the checkpoint where it ended, others at their start.
pub fn open(
    checked: &Checked,
    options: &Options,
    known: &[PartitionPosition],
    core: &mut Core,
) -> Result<Input, Error> {
    let follow = options.until == Until::Stopped || options.follow;
    let config = &checked.config;
    let keep_ids = options.predictions.is_some();
    let mut streams = vec![(
        Stream::Impressions,
        config.impressions.source.clone(),
        decoder(checked, Stream::Impressions, keep_ids)?,
    )];
    if let Some(clicks) = &config.clicks {
        streams.push((Stream::Clicks, clicks.source.clone(), decoder(checked, Stream::Clicks, false)?));
    }
    let mut specs = specs(&streams, follow)?;
    // Partitions keep their numbers: the checkpoint's first, in its order.
    let place = |spec: &source::Spec| {
        let name = file::name_of(&spec.path);
        known.iter().position(|known| known.name == name && known.stream == spec.stream)
    };
    for spec in &mut specs {
        spec.from = place(spec).map_or_else(NextOffset::default, |at| known[at].from);
    }
    // A file that was trained to its end may leave; its number stays taken.
    let mut slots: Vec<Option<usize>> = Vec::new();
    for (index, position) in known.iter().enumerate() {
        let found = specs.iter().position(|spec| place(spec) == Some(index));
        if found.is_none() {
            let PartitionPosition { name, stream, from, read, .. } = position;
            if from.offset < read.offset {
                return Err(Error::PartitionGone { name: name.clone(), stream: stream.name() });
            }
            tracing::warn!(
                name,
                stream = stream.name(),
                offset = read.offset,
                "a file is gone; it counts as ended there"
            );
            core.merge_mut().ended(index)?;
        }
        slots.push(found);
    }
    for (at, spec) in specs.iter().enumerate() {
        if place(spec).is_none() {
            core.merge_mut().add_partition(&file::name_of(&spec.path), spec.stream);
            slots.push(Some(at));
        }
    }
    let (sources, opened, recycler) = Sources::open(specs, checked.decode_threads())?;
    let mut opened: Vec<Option<Partition>> = opened.into_iter().map(Some).collect();
    let partitions = slots.into_iter().map(|slot| slot.and_then(|at| opened[at].take())).collect();
    Ok(Input { partitions, recycler, sources, streams, follow, looked: Instant::now() })
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
            core.merge_mut().tick(clock::now());
            Ok(())
        }
    }
}

fn accept(core: &mut Core, partition: usize, arrival: Arrival, dead: &mut DeadLetters) -> Result<(), Error> {
    match arrival {
        Arrival::Records(chunk) => {
            if !chunk.rejects.is_empty() {
                let merge = core.merge();
                dead.keep_rejects(merge.stream(partition), merge.name(partition), &chunk)?;
            }
            core.offer(partition, chunk, clock::now())?;
        }
        Arrival::CaughtUp { .. } => core.merge_mut().caught_up(partition, clock::now()),
        Arrival::Ended { .. } => core.merge_mut().ended(partition)?,
        Arrival::Failed(error) => return Err(error.into()),
    }
    Ok(())
}
