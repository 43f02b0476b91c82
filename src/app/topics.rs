//! Writing into the topics of a job: which they are, and how fast.

use std::fmt;
use std::time::{Duration, Instant};

use crate::config::Checked;
use crate::event::{Stream, Time};
use crate::generate::{Event, write_hex};
use crate::source::kafka::{self, Message, Sink};
use crate::source::{self, Origin};

/// Why the topics of a job cannot be written to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Source(#[from] source::Error),
    #[error(transparent)]
    Kafka(#[from] kafka::Error),
    #[error("`{stream}.source` of the config must be of kind \"kafka\" with one topic to write to, got {found}")]
    NoTopic { stream: &'static str, found: String },
}

/// What was written.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Written {
    pub impressions: u64,
    pub clicks: u64,
    /// Of these, records in which no id and time was found; written like the others, without a key.
    pub without_key: u64,
    pub bytes: u64,
    /// Time to which it got.
    pub until: Option<Time>,
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { impressions, clicks, without_key, .. } = self;
        write!(f, "{impressions} impressions, {clicks} clicks, {without_key} of them without an id, to ")?;
        match self.until {
            Some(time) => write!(f, "{time}"),
            None => f.write_str("-"),
        }
    }
}

/// The topics that a job reads, one a stream. A message's timestamp is the moment of writing.
pub struct Topics {
    sink: Sink,
    names: Vec<(Stream, String)>,
    pub written: Written,
    line: Vec<u8>,
    key: Vec<u8>,
}

impl Topics {
    /// Those of the given streams, which must be there.
    pub fn open(checked: &Checked, streams: &[Stream], label: &'static str) -> Result<Self, Error> {
        let config = &checked.config;
        let mut names = Vec::new();
        for &stream in streams {
            let name = stream.name();
            let missing = |found: String| Error::NoTopic { stream: name, found };
            let settings = match stream {
                Stream::Impressions => Some(&config.impressions),
                Stream::Clicks => config.clicks.as_ref(),
            };
            let settings = &settings.ok_or_else(|| missing("no such stream".into()))?.source;
            if settings.kind == source::Kind::File {
                return Err(missing("kind = \"file\"".into()));
            }
            let Origin::Kafka(topics) = settings.find(&format!("{name}.source"))? else { unreachable!("its kind") };
            match &topics.topics[..] {
                [topic] => names.push((stream, topic.clone())),
                topics => return Err(missing(format!("the topics {topics:?}"))),
            }
        }
        let cluster = config.kafka.as_ref().expect("the config was checked");
        let sink = Sink::new(cluster, label)?;
        for (_, topic) in &names {
            sink.partitions(topic)?;
        }
        Ok(Self { sink, names, written: Written::default(), line: Vec::new(), key: Vec::new() })
    }

    /// Writes a record of one of the streams it was opened for. The partition follows from the key.
    pub fn write(&mut self, stream: Stream, key: Option<&[u8]>, time: Time, value: &[u8]) -> Result<(), Error> {
        let (_, topic) = self.names.iter().find(|(of, _)| *of == stream).expect("it was opened for this stream");
        self.sink.write(&Message { topic, key, value, ..Message::default() })?;
        match stream {
            Stream::Impressions => self.written.impressions += 1,
            Stream::Clicks => self.written.clicks += 1,
        }
        self.written.without_key += u64::from(key.is_none());
        self.written.bytes += value.len() as u64;
        self.written.until = Some(time);
        Ok(())
    }

    /// Writes a generated record, under its impression's id. Gives the length of its message.
    pub fn write_event(&mut self, event: &Event) -> Result<usize, Error> {
        let (mut line, mut key) = (std::mem::take(&mut self.line), std::mem::take(&mut self.key));
        line.clear();
        key.clear();
        event.write_line(&mut line);
        line.pop(); // a message has no line end
        let id = event.id().map(|id| {
            write_hex(&mut key, id);
            key.as_slice()
        });
        let written = self.write(event.stream, id, event.arrival, &line);
        let length = line.len();
        (self.line, self.key) = (line, key);
        written.map(|()| length)
    }

    /// Waits until the brokers have taken everything; an error if they have not.
    pub fn flush(&mut self) -> Result<(), Error> {
        Ok(self.sink.flush(Duration::from_secs(120))?)
    }
}

/// How fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Speed {
    /// As fast as the brokers take it.
    Max,
    /// So many times as fast as it happened.
    Times(f64),
}

/// Holds what is written to a speed.
pub struct Pace {
    speed: Speed,
    /// When the first record was written, and its time.
    first: Option<(Instant, Time)>,
}

impl Pace {
    #[must_use]
    pub fn new(speed: Speed) -> Self {
        Self { speed, first: None }
    }

    /// Whether it is the moment for a record of this time; if not, waits for it, but so briefly that its caller can be
    /// stopped, and is to be asked again.
    pub fn is_due(&mut self, time: Time) -> bool {
        let Speed::Times(times) = self.speed else { return true };
        let (began, first) = *self.first.get_or_insert_with(|| (Instant::now(), time));
        let due = Duration::from_secs_f64((time.0 - first.0).max(0) as f64 / 1000.0 / times);
        let wait = due.saturating_sub(began.elapsed());
        std::thread::sleep(wait.min(Duration::from_millis(50)));
        wait.is_zero()
    }
}

/// Says once a second that it is time to show how far it is.
pub struct Ticker(Instant);

impl Ticker {
    #[must_use]
    pub fn start() -> Self {
        Self(Instant::now())
    }

    pub fn ticks(&mut self) -> bool {
        let ticks = self.0.elapsed() >= Duration::from_secs(1);
        if ticks {
            self.0 = Instant::now();
        }
        ticks
    }
}
