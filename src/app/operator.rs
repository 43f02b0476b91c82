//! Where a job shows what it waits for, and takes an operator's word.

use std::sync::Arc;
use std::time::Instant;

use serde_json::json;

use super::control::{Answer, Command, Control, HeldBatch, Hold, PartitionStatus, Status, Why, shown};
use super::publisher::Published;
use crate::clock;
use crate::event::{Stream, Time};
use crate::merge::{Attention, Decision, WaitReason};
use crate::telemetry;
use crate::train::core::Core;

/// Keeps track of what holds a job.
pub struct Desk {
    job: String,
    control: Option<Arc<Control>>,
    waiting: Option<WaitReason>,
    held: Option<(Why, Instant)>,
    /// What was said of it in the log.
    said: Option<Why>,
}

impl Desk {
    #[must_use]
    pub fn new(job: &str, control: Option<Arc<Control>>) -> Self {
        Self { job: job.to_owned(), control, waiting: None, held: None, said: None }
    }

    /// What the core does just now; `None`: it goes on. Costs nothing, for every step.
    pub fn note(&mut self, waiting: Option<WaitReason>, core: &Core) {
        self.waiting = waiting;
        let why = match waiting {
            _ if core.held().is_some() => Some(Why::CtrJump),
            Some(WaitReason::ClickSilence) => Some(Why::ClickSilence),
            Some(WaitReason::ClickStalled) => Some(Why::ClickStalled),
            _ => None,
        };
        if why != self.held.map(|(why, _)| why) {
            self.held = why.map(|why| (why, Instant::now()));
        }
    }

    #[must_use]
    pub fn waiting(&self) -> Option<WaitReason> {
        self.waiting
    }

    #[must_use]
    pub fn held(&self) -> Option<Why> {
        self.held.map(|(why, _)| why)
    }

    /// Shows where the job stands: to metrics, to the log when that changes, and to the listener. Now and then.
    pub fn show(&mut self, core: &Core, published: &Published) {
        let status = self.status(core, published);
        for (index, partition) in status.partitions.iter().enumerate() {
            let (watermark, behind) = (core.merge().watermark(index), partition.behind_seconds);
            let PartitionStatus { stream, name, state, clicks_missing, .. } = partition;
            telemetry::partition(stream, name, *state, watermark, behind, *clicks_missing);
        }
        let held = status.held.as_ref();
        for why in Why::ALL {
            telemetry::held(why.name(), held.is_some_and(|held| held.why == why));
        }
        let mut decisions = [("overtaken", 0), ("rejected", 0), ("skipped", 0), ("waived", 0), ("accepted", 0)];
        for entry in core.merge().journal() {
            decisions[match entry.decision {
                Decision::Overtaken(_) => 0,
                Decision::Rejected => 1,
                Decision::Skipped { .. } => 2,
                Decision::Waived => 3,
                Decision::Accepted => 4,
            }]
            .1 += 1;
        }
        telemetry::waiting(
            held.map_or(0.0, |held| held.seconds),
            status.impressions_waiting,
            status.clicks_ahead,
            status.frontier_behind_seconds,
            status.recent_ctr,
            &decisions,
        );
        if self.said != self.held() {
            self.said = self.held();
            match held {
                Some(hold) => {
                    telemetry::hold(hold.why.name());
                    let (why, waiting_for, remedy) = (hold.why.name(), hold.waiting_for.join(", "), hold.remedy);
                    let batch = hold.batch.as_ref().map(|batch| json!(batch).to_string());
                    tracing::warn!(why, waiting_for, batch, "the fuse holds the training; {remedy}");
                }
                None => tracing::info!("the training is no longer held"),
            }
        }
        if let Some(control) = &self.control {
            control.show(status);
        }
    }

    fn status(&self, core: &Core, published: &Published) -> Status {
        let merge = core.merge();
        let furthest = |stream| {
            let all = (0..merge.partitions()).filter(|&index| merge.stream(index) == stream);
            all.map(|index| merge.watermark(index)).max().unwrap_or(Time::MIN)
        };
        let furthest = [furthest(Stream::Impressions), furthest(Stream::Clicks)];
        let seconds = |from: Time, to: Time| (to.0 - from.0) as f64 / 1000.0;
        let partition = |index: usize| {
            let (stream, watermark) = (merge.stream(index), merge.watermark(index));
            PartitionStatus {
                stream: stream.name(),
                name: merge.name(index).to_owned(),
                state: merge.attention(index),
                watermark: shown(watermark),
                behind_seconds: shown(watermark).map(|_| seconds(watermark, furthest[stream as usize])),
                clicks_missing: merge.missing(index),
            }
        };
        let partitions: Vec<PartitionStatus> = (0..merge.partitions()).map(partition).collect();
        let frontier = core.place().frontier.map(|key| key.time);
        Status {
            job: self.job.clone(),
            state: if self.held.is_some() { "held" } else { "running" },
            held: self.held.map(|(why, since)| hold(core, why, since)),
            reading: match self.waiting {
                Some(WaitReason::Impressions) => Some("impressions"),
                Some(WaitReason::Clicks | WaitReason::ClickSilence | WaitReason::ClickStalled) => Some("clicks"),
                Some(WaitReason::Idle) | None => None,
            },
            frontier: frontier.and_then(shown),
            frontier_behind_seconds: frontier.filter(|&at| shown(at).is_some()).map(|at| seconds(at, clock::now())),
            impressions_waiting: core.impressions_waiting(),
            clicks_ahead: merge.clicks_ahead() as u64,
            journal_entries: merge.journal().len() as u64,
            recent_ctr: core.recent_ctr(),
            batches: core.place().batches,
            examples: core.place().examples,
            snapshot_version: published.version.map(|version| version.0),
            snapshot_held: published.withheld.clone(),
            partitions,
        }
    }

    /// Whether an operator has spoken. Costs a look at a flag.
    #[must_use]
    pub fn is_told(&self) -> bool {
        self.control.as_ref().is_some_and(|control| control.is_told())
    }

    /// Does what operators have told the job since the last time. `keep` makes a checkpoint of the last boundary with the
    /// journal of now, and says whether that lasts.
    pub fn obey(&mut self, core: &mut Core, published: &Published, mut keep: impl FnMut(&mut Core) -> bool) {
        let Some(control) = self.control.clone() else { return };
        while let Some((command, reply)) = control.next() {
            let done = match &command {
                Command::Release { partition } => release(core, partition.as_deref(), self.held()),
                Command::Accept { batch } => accept(core, *batch),
            };
            let done = done.map(|mut done| {
                done["durable"] = json!(keep(core));
                tracing::warn!(?command, %done, "an operator's word was taken");
                done
            });
            self.note(None, core);
            self.show(core, published);
            reply(done);
        }
    }
}

fn names(core: &Core, partitions: &[usize]) -> Vec<String> {
    partitions.iter().map(|&index| core.merge().name(index).to_owned()).collect()
}

fn hold(core: &Core, why: Why, since: Instant) -> Hold {
    let merge = core.merge();
    let held = core.held();
    let waiting_for = match held {
        Some(held) => held.unheard.clone(),
        None if why == Why::ClickStalled => {
            (0..merge.partitions()).filter(|&index| merge.attention(index) == Attention::Stalled).collect()
        }
        None => merge.holding(),
    };
    let remedy = match (why, waiting_for.is_empty()) {
        (Why::CtrJump, true) => {
            "its labels are final: look for the cause, then POST /accept to learn it, or restart with another `fuse.ctr_band`"
        }
        (Why::CtrJump, false) => "it is labelled anew when these partitions speak; POST /accept learns it without them",
        _ => "it goes on with the next click or heartbeat; POST /release goes on without these partitions until then",
    };
    let batch = held.map(|held| HeldBatch {
        number: core.place().batches + 1,
        time: held.first.time.to_string(),
        partition: merge.name(held.first.partition as usize).to_owned(),
        offset: held.first.offset,
        jump: held.jump,
    });
    let (seconds, impressions_waiting) = (since.elapsed().as_secs_f64(), core.impressions_waiting());
    Hold { why, seconds, impressions_waiting, waiting_for: names(core, &waiting_for), batch, remedy }
}

fn release(core: &mut Core, partition: Option<&str>, held: Option<Why>) -> Answer {
    let merge = core.merge();
    let chosen = match (partition, held) {
        (None, Some(Why::ClickSilence | Why::ClickStalled)) => merge.holding(),
        (None, Some(Why::CtrJump)) => {
            return Err("a batch is held, not a silent click partition; POST /accept learns it as it is".into());
        }
        (None, None) => Vec::new(),
        (Some(name), _) => {
            let mut clicks = (0..merge.partitions()).filter(|&index| merge.stream(index) == Stream::Clicks);
            let found = clicks.find(|&index| merge.name(index) == name);
            let closed = |index| matches!(merge.attention(index), Attention::Ended | Attention::Waived);
            let found = found.filter(|&index| !closed(index));
            vec![found.ok_or_else(|| format!("no click partition `{name}` is waited for; GET /status names them"))?]
        }
    };
    if chosen.is_empty() {
        return Err("nothing is held by a silent click partition; GET /status says what the job does".into());
    }
    chosen.iter().for_each(|&index| core.merge_mut().waive(index));
    Ok(json!({ "released": names(core, &chosen), "until": "the next record of each" }))
}

fn accept(core: &mut Core, number: Option<u64>) -> Answer {
    let next = core.place().batches + 1;
    if core.held().is_none() {
        return Err("no batch is held; GET /status says what the job does".into());
    }
    if number.is_some_and(|number| number != next) {
        return Err(format!("the batch that is held is number {next}; GET /status shows it"));
    }
    let held = core.accept().expect("it was just seen");
    Ok(json!({ "accepted": { "batch": next, "time": held.first.time.to_string(), "jump": held.jump } }))
}
