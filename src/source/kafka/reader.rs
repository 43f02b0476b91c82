//! The thread that reads one partition: messages of the client to blocks for the decoders.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rdkafka::consumer::Consumer as _;
use rdkafka::consumer::base_consumer::PartitionQueue;
use rdkafka::error::KafkaError;
use rdkafka::message::{BorrowedMessage, Message as _, Timestamp};
use rdkafka::topic_partition_list::Offset;
use rdkafka::types::RDKafkaErrorCode as Code;

use super::desk::{Desk, Ends};
use super::{Consumer, Context, Error, LogTime, Topics, fingerprint, name_of};
use crate::event::Time;
use crate::position::{Fingerprint, NextOffset};
use crate::source::pool::{self, BLOCK, Content, Halt, Job, Mark, Queue, RECORDS, Ticket, lock};
use crate::source::{Arrival, Error as SourceError, NewDecoder};

/// How long it waits for a message before it looks whether it is to end or has caught up.
const PATIENCE: Duration = Duration::from_millis(20);

/// Reads one partition.
pub(super) struct Reader {
    name: String,
    topic: String,
    partition: i32,
    log_time: LogTime,
    max_record: usize,
    queue: PartitionQueue<Context>,
    consumer: Arc<Consumer>,
    watch: Arc<Desk>,
    ends: Arc<Ends>,
    /// Where it hands on.
    pub(super) out: Arc<Queue>,
    desk: pool::Desk,
    decoder: NewDecoder,
    /// First record that was not taken.
    next: NextOffset,
    /// The record before `next` is still to come, to be seen that it is the one that was read.
    check: bool,
    /// The topic was away: what comes next may be of another topic of its name.
    suspect: bool,
    /// Bounded: the end that was fixed at the start.
    end: Option<u64>,
    /// The client came to the end, with nothing after it: the round of questions that must be answered to confirm that.
    at_end: Option<u64>,
    /// Up to where the client said that it had come before its queue was found empty.
    emptied: Option<u64>,
    /// The consumer has been told that this is the end.
    caught_up: bool,
    block: Block,
}

/// Messages on their way to the decoders.
#[derive(Default)]
struct Block {
    /// Keys and records are `bytes[..len]`.
    bytes: Vec<u8>,
    len: usize,
    marks: Vec<Mark>,
    /// Where the first one starts, and what stands before it.
    at: NextOffset,
}

impl Block {
    fn push(&mut self, message: &BorrowedMessage<'_>, log_time: LogTime, desk: &pool::Desk) {
        let (key, value) = (message.key(), message.payload());
        let (key_bytes, raw) = (key.unwrap_or_default(), value.unwrap_or_default());
        let end = self.len + key_bytes.len() + raw.len();
        if self.bytes.len() < end {
            let mut larger = desk.block(end);
            larger[..self.len].copy_from_slice(&self.bytes[..self.len]);
            desk.give_block(std::mem::replace(&mut self.bytes, larger));
        }
        let start = self.len + key_bytes.len();
        self.bytes[self.len..start].copy_from_slice(key_bytes);
        self.bytes[start..end].copy_from_slice(raw);
        self.len = end;
        let log_time = match (log_time, message.timestamp()) {
            (LogTime::Timestamp, Timestamp::CreateTime(ms) | Timestamp::LogAppendTime(ms)) => Time(ms),
            _ => Time::MIN,
        };
        self.marks.push(Mark {
            offset: message.offset() as u64,
            start: start as u32,
            len: raw.len() as u32,
            key_len: key.map(|key| key.len() as u32),
            log_time,
            tombstone: value.is_none(),
        });
    }
}

impl Reader {
    #[expect(clippy::too_many_arguments, reason = "made in one place, from what lies at hand there")]
    pub(super) fn new(
        topics: &Topics,
        (topic, partition): (String, i32),
        queue: PartitionQueue<Context>,
        consumer: Arc<Consumer>,
        watch: Arc<Desk>,
        ends: Arc<Ends>,
        from: NextOffset,
        check: bool,
        end: Option<u64>,
        decoder: NewDecoder,
        desk: &pool::Desk,
    ) -> Self {
        let name = name_of(&topic, partition);
        Self {
            out: Queue::new(name.clone(), topics.queue),
            name,
            topic,
            partition,
            log_time: topics.log_time,
            max_record: topics.max_record,
            queue,
            consumer,
            watch,
            ends,
            desk: desk.clone(),
            decoder,
            next: from,
            check,
            suspect: false,
            end,
            at_end: None,
            emptied: None,
            caught_up: false,
            block: Block::default(),
        }
    }

    /// The life of the reader's thread.
    pub(super) fn run(mut self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.read()));
        let failure = match end {
            Ok(Ok(()) | Err(Halt::Closed)) => return,
            Ok(Err(Halt::Failed(error))) => error,
            Err(panic) => SourceError::Panicked {
                partition: self.name.clone(),
                at: format!("reader, at offset {}", self.next.offset),
                message: pool::text_of_panic(panic.as_ref()),
            },
        };
        if let Some(ticket) = self.out.reserve() {
            ticket.fill(Arrival::Failed(failure));
        }
    }

    fn read(&mut self) -> Result<(), Halt> {
        loop {
            if self.end.is_some_and(|end| self.next.offset >= end) && !self.check {
                return self.finish();
            }
            self.gather()?;
            if !self.block.marks.is_empty() {
                self.hand_on()?;
            } else if self.out.is_closed() {
                return Err(Halt::Closed);
            } else if self.idle()? {
                return self.finish();
            }
        }
    }

    /// Bounded: the end is reached.
    fn finish(&mut self) -> Result<(), Halt> {
        let next = self.next;
        self.reserve()?.fill(Arrival::Ended { next });
        Ok(())
    }

    fn reserve(&self) -> Result<Ticket, Halt> {
        self.out.reserve().ok_or(Halt::Closed)
    }

    /// Takes what the client has, up to a block; waits a little for the first message.
    fn gather(&mut self) -> Result<(), Halt> {
        let mut wait = PATIENCE;
        // Asked before the queue is found empty: what was said to be fetched by then has been taken.
        let fetched = match self.at_end {
            Some(_) => self.consumer.context().end_of(&self.topic, self.partition),
            None => None,
        };
        while self.block.marks.len() < RECORDS && self.block.len < BLOCK {
            let polled = self.queue.poll(wait);
            wait = Duration::ZERO;
            match polled {
                None => {
                    if self.block.marks.is_empty() {
                        self.emptied = fetched;
                    }
                    break;
                }
                Some(Ok(message)) => {
                    (self.at_end, self.caught_up) = (None, false);
                    let offset = message.offset() as u64;
                    if self.check {
                        if offset + 1 == self.next.offset && fingerprint(message.payload()) != self.next.before {
                            return Err(self.other_record(fingerprint(message.payload())));
                        }
                        self.check = offset < self.next.offset;
                    }
                    if offset < self.next.offset {
                        self.check = false; // it was the record before, and no other
                        continue;
                    }
                    if std::mem::take(&mut self.suspect) && self.next.before != Fingerprint::NONE {
                        drop(message);
                        self.look_again()?;
                        continue;
                    }
                    if let Some(end) = self.end.filter(|end| offset >= *end) {
                        self.next.offset = end; // all up to it has come, for here is one behind it
                        break;
                    }
                    if self.block.marks.is_empty() {
                        self.block.at = self.next;
                    }
                    self.block.push(&message, self.log_time, &self.desk);
                    self.next = NextOffset { offset: offset + 1, before: fingerprint(message.payload()) };
                }
                Some(Err(KafkaError::PartitionEOF(_))) => {
                    // A round that has begun already may have its answer from before.
                    self.at_end = Some(self.watch.begun.load(Ordering::Acquire) + 1);
                    self.emptied = None;
                    self.watch.asked.store(true, Ordering::Release);
                    self.check = false; // the record before is gone: nothing came to compare
                    break;
                }
                Some(Err(error)) => self.trouble(&error)?,
            }
        }
        Ok(())
    }

    /// Reads the record before the next one again, to see that it is the one that was read.
    fn look_again(&mut self) -> Result<(), Halt> {
        let before = Offset::Offset(self.next.offset.saturating_sub(1) as i64);
        let sought = self.consumer.seek(&self.topic, self.partition, before, Duration::from_secs(10));
        sought.map_err(|error| self.unreadable(&error.to_string()))?;
        self.check = true;
        Ok(())
    }

    /// An error in place of a message.
    fn trouble(&mut self, error: &KafkaError) -> Result<(), Halt> {
        let code = error.rdkafka_error_code();
        match code {
            Some(Code::AutoOffsetReset | Code::OffsetOutOfRange) => Err(self.out_of_range()),
            Some(
                Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition | Code::UnknownTopicId,
            ) => {
                if !self.suspect {
                    tracing::warn!(partition = self.name, %error, "the topic is away; waiting for it");
                }
                self.suspect = true;
                Ok(())
            }
            Some(
                Code::AllBrokersDown
                | Code::BrokerTransportFailure
                | Code::BrokerNotAvailable
                | Code::BrokerDestroy
                | Code::Resolve
                | Code::OperationTimedOut
                | Code::RequestTimedOut
                | Code::NetworkException
                | Code::LeaderNotAvailable
                | Code::NotLeaderForPartition
                | Code::ReplicaNotAvailable
                | Code::OffsetNotAvailable
                | Code::FencedLeaderEpoch
                | Code::UnknownLeaderEpoch
                | Code::KafkaStorageError
                | Code::Authentication
                | Code::SaslAuthenticationFailed
                | Code::WaitingForCoordinator
                | Code::InProgress,
            ) => {
                tracing::warn!(partition = self.name, %error, "kafka: reading is tried again");
                Ok(())
            }
            _ => Err(self.unreadable(&error.to_string())),
        }
    }

    fn unreadable(&self, why: &str) -> Halt {
        let (partition, offset, why) = (self.name.clone(), self.next.offset, why.to_owned());
        Halt::Failed(Error::Unreadable { partition, offset, why }.into())
    }

    /// The log does not have what is to be read next: too old, or never there.
    fn out_of_range(&self) -> Halt {
        let partition = self.name.clone();
        let ends = self.consumer.fetch_watermarks(&self.topic, self.partition, Duration::from_secs(10));
        let error = match ends {
            Ok((low, _)) if (low as u64) > self.next.offset => {
                Error::Lost { partition, from: self.next.offset, low: low as u64 }
            }
            Ok((low, high)) => {
                let why = format!("offset {} was to be read next, but it has {low} to {high}", self.next.offset);
                Error::Rewritten { partition, why }
            }
            Err(error) => Error::Unreadable { partition, offset: self.next.offset, why: error.to_string() },
        };
        Halt::Failed(error.into())
    }

    fn other_record(&self, found: Fingerprint) -> Halt {
        let (partition, known) = (self.name.clone(), self.next.before);
        let at = self.next.offset - 1;
        let why = format!("its record at offset {at} has the fingerprint {found:?}, but {known:?} was read");
        Halt::Failed(Error::Rewritten { partition, why }.into())
    }

    /// Nothing comes: tells the consumer when that is the confirmed end, and when it no longer is. Says whether bounded
    /// input has ended.
    fn idle(&mut self) -> Result<bool, Halt> {
        if let Some(why) = lock(&self.watch.fatal).clone() {
            return Err(Halt::Failed(Error::Fatal(why).into()));
        }
        let Some(round) = self.at_end else { return Ok(false) };
        if self.end.is_some_and(|end| self.covers(end)) {
            return Ok(true);
        }
        let away = self.ends.away.load(Ordering::Acquire);
        if self.caught_up && (away || !self.covers(self.ends.high())) {
            self.caught_up = false;
            self.at_end = Some(self.watch.begun.load(Ordering::Acquire) + 1);
            self.reserve()?.fill(Arrival::Unconfirmed);
        } else if !self.caught_up && !away && self.ends.round.load(Ordering::Acquire) >= round {
            if self.covers(self.ends.high()) {
                self.caught_up = true;
                let next = self.next;
                self.reserve()?.fill(Arrival::CaughtUp { next });
            }
        } else if !self.caught_up {
            self.watch.asked.store(true, Ordering::Release);
        }
        Ok(false)
    }

    /// Whether all before `end` that can be read has been handed on. Offsets that no record has (markers, aborted records,
    /// compaction) may lie before it; then only the client knows that it is there.
    fn covers(&self, end: u64) -> bool {
        self.next.offset >= end || self.emptied.is_some_and(|at| at >= end)
    }

    /// Hands the block to the workers.
    fn hand_on(&mut self) -> Result<(), Halt> {
        let fresh = Block { marks: self.desk.marks(), bytes: self.desk.block(BLOCK), ..Block::default() };
        let block = std::mem::replace(&mut self.block, fresh);
        let tombstones = block.marks.iter().filter(|mark| mark.tombstone).count();
        let job = Job {
            ticket: self.reserve()?,
            decoder: Arc::clone(&self.decoder),
            bytes: block.bytes,
            content: Content::Messages(block.marks),
            at: block.at,
            next: self.next,
            max_record: self.max_record,
        };
        // Were the workers gone, the ticket inside would say so.
        self.desk.work.send(job).map_err(|_| Halt::Closed)?;
        self.ends.tombstones.fetch_add(tombstones as u64, Ordering::Relaxed);
        self.ends.position.store(self.next.offset, Ordering::Relaxed);
        Ok(())
    }
}
