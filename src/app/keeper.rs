//! The checkpoint thread: sorts, encodes and writes images while the core goes on.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config::Checked;
use crate::event::Time;
use crate::merge::PartitionPosition;
use crate::telemetry;
use crate::train::checkpoint::{self, Checkpoints, SegmentRef};
use crate::train::core::Image;
use crate::train::image::{self, Branch, FORMAT, Head};

/// Writes checkpoints, one at a time, off the core thread.
pub struct Keeper {
    jobs: Option<Sender<Job>>,
    busy: Arc<AtomicBool>,
    durable: Durable,
    thread: Option<JoinHandle<Result<(), checkpoint::Error>>>,
}

/// Where a restart would read, as the newest checkpoint has it; taken by whoever shows it to others.
pub type Durable = Arc<Mutex<Option<Vec<PartitionPosition>>>>;

struct Job {
    image: Image,
    predictions: Option<u64>,
    done: Option<Sender<Result<(), checkpoint::Error>>>,
}

impl Keeper {
    /// Starts the thread. `next` is the number of the first checkpoint it writes.
    pub fn start(checked: &Checked, store: Checkpoints, next: u64) -> std::io::Result<Self> {
        let (jobs, inbox) = bounded(1);
        let busy = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            store,
            next,
            job: checked.config.job.name.clone(),
            lineage: checked.lineage(),
            branch: checked.branch.clone(),
            schema: serde_json::from_str(&checked.schema.to_json()).expect("the schema writes JSON"),
            binding: checked.binding.clone(),
            build: checked.build(),
            segments: HashMap::new(),
            durable: Durable::default(),
        };
        let durable = Arc::clone(&writer.durable);
        let flag = Arc::clone(&busy);
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(move || writer.run(&inbox, &flag))?;
        Ok(Self { jobs: Some(jobs), busy, durable, thread: Some(thread) })
    }

    /// The positions of the newest checkpoint, once it is durable.
    #[must_use]
    pub fn durable(&self) -> Durable {
        Arc::clone(&self.durable)
    }

    /// Whether a checkpoint is being written; then the next one waits for another boundary.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Leaves an image to the thread. A failure is logged and counted; older checkpoints stay as they are.
    pub fn offer(&self, image: Image, predictions: Option<u64>) {
        self.send(Job { image, predictions, done: None });
    }

    /// Writes an image and waits until it is durable.
    pub fn write(&self, image: Image, predictions: Option<u64>) -> Result<(), checkpoint::Error> {
        let (done, answer) = bounded(1);
        self.send(Job { image, predictions, done: Some(done) });
        // No answer: the thread panicked, which `finish` reports.
        answer.recv().unwrap_or(Ok(()))
    }

    fn send(&self, job: Job) {
        self.busy.store(true, Ordering::Release);
        if let Some(jobs) = &self.jobs {
            // A closed channel means that the thread is gone, which `finish` reports.
            let _ = jobs.send(job);
        }
    }

    /// Waits for the last checkpoint. Returns its error, if it failed.
    pub fn finish(mut self) -> Result<(), checkpoint::Error> {
        drop(self.jobs.take());
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(()),
        }
    }
}

struct Writer {
    store: Checkpoints,
    next: u64,
    job: String,
    lineage: String,
    branch: Option<Branch>,
    schema: serde_json::Value,
    binding: BTreeMap<String, String>,
    /// What the model is computed with.
    build: String,
    /// Segments of seen ids that the last checkpoint holds: by (start, ids), since a closed segment never changes.
    segments: HashMap<(Time, usize), SegmentRef>,
    durable: Durable,
}

impl Writer {
    fn run(mut self, inbox: &Receiver<Job>, busy: &AtomicBool) -> Result<(), checkpoint::Error> {
        let mut last = Ok(());
        while let Ok(job) = inbox.recv() {
            let started = Instant::now();
            last = self.write(&job.image, job.predictions);
            match &last {
                Ok(()) => telemetry::checkpointed(started.elapsed().as_secs_f64()),
                Err(error) => {
                    telemetry::checkpoint_failed();
                    let error = super::publisher::chain(error);
                    tracing::error!(error, "a checkpoint could not be written; the one before stays, training goes on");
                }
            }
            busy.store(inbox.is_full(), Ordering::Release);
            if let Some(done) = job.done {
                let _ = done.send(std::mem::replace(&mut last, Ok(())));
            }
        }
        last
    }

    fn write(&mut self, image: &Image, predictions: Option<u64>) -> Result<(), checkpoint::Error> {
        let mut segments = HashMap::new();
        let mut list = Vec::new();
        for segment in &image.seen {
            let key = (segment.start, segment.ids.len());
            let known = match self.segments.get(&key) {
                Some(known) => known.clone(),
                None => self.store.write_segment("seen", &image::segment_arrays(segment))?,
            };
            list.push(known.clone());
            segments.insert(key, known);
        }
        self.segments = segments;
        let model = image.model.sorted();
        let head = Head {
            format: FORMAT,
            job: self.job.clone(),
            lineage: self.lineage.clone(),
            branch: self.branch.clone(),
            schema: Some(self.schema.clone()),
            binding: self.binding.clone(),
            build: self.build.clone(),
            place: image.place.clone(),
            partitions: image.partitions.clone(),
            journal: image.journal.clone(),
            counts: image.counts,
            delays: image.delays.clone(),
            fuse: image.fuse,
            periods: model.logistic.periods.clone(),
            features: model.logistic.counts.clone(),
            predictions,
        };
        self.store.write(self.next, &head, &image::arrays(image, &model), &list)?;
        self.next += 1;
        *self.durable.lock().unwrap_or_else(PoisonError::into_inner) = Some(head.partitions);
        Ok(())
    }
}
