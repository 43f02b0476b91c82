//! The threads that read: one a partition, and the decode workers behind them.

use std::sync::Arc;
use std::thread::{self, JoinHandle};

use super::Error;
use super::columnar;
use super::file::{self, Spec, name_of};
use super::pool::{Desk, Partition, Pool, Queue, Recycler, Stop};
use crate::event::Stream;

/// All threads that read and decode. Dropping it ends and joins them.
pub struct Sources {
    readers: Vec<JoinHandle<()>>,
    queues: Vec<Arc<Queue>>,
    stop: Arc<Stop>,
    pool: Pool, // dropped after `drop` below has joined the readers
}

impl Sources {
    /// Starts `threads` workers (at least one), which decode for all partitions; what arrives is the same for any number.
    pub fn start(threads: usize) -> Result<Self, Error> {
        let pool = Pool::start(threads)?;
        Ok(Self { readers: Vec::new(), queues: Vec::new(), stop: Arc::default(), pool })
    }

    /// Starts, opens every file and reads: one [`Partition`] for each spec, in the same order.
    pub fn open(specs: Vec<Spec>, threads: usize) -> Result<(Self, Vec<Partition>, Recycler), Error> {
        let mut sources = Self::start(threads)?;
        let partitions = sources.add_files(specs)?;
        let recycler = sources.recycler();
        Ok((sources, partitions, recycler))
    }

    /// Where used chunks go.
    #[must_use]
    pub fn recycler(&self) -> Recycler {
        self.pool.desk.chunks.clone()
    }

    /// Opens and reads more files, such as one that has appeared under a followed pattern.
    pub fn add_files(&mut self, specs: Vec<Spec>) -> Result<Vec<Partition>, Error> {
        // All are opened before any is read: one that cannot be should not cost the work on the others.
        let open = |spec: Spec| {
            let queue = Queue::new(name_of(&spec.path), spec.queue);
            let (stream, desk, stop) = (spec.stream, &self.pool.desk, Arc::clone(&self.stop));
            let run: Box<dyn FnOnce() + Send> = if columnar::is_parquet(&spec.path, spec.object.as_ref())? {
                let reader = columnar::Reader::open(spec, Arc::clone(&queue), desk, stop)?;
                Box::new(|| reader.run())
            } else {
                let reader = file::Reader::open(spec, Arc::clone(&queue), desk, stop)?;
                Box::new(|| reader.run())
            };
            Ok((stream, queue, run))
        };
        let opened = specs.into_iter().map(open).collect::<Result<Vec<_>, Error>>()?;
        opened.into_iter().map(|(stream, queue, run)| self.launch(stream, queue, run)).collect()
    }

    /// Starts the thread that reads a partition into `queue`.
    pub(super) fn launch(
        &mut self,
        stream: Stream,
        queue: Arc<Queue>,
        body: impl FnOnce() + Send + 'static,
    ) -> Result<Partition, Error> {
        let handle = thread::Builder::new()
            .name(format!("read-{}", self.readers.len()))
            .spawn(body)
            .map_err(|source| Error::Thread { what: format!("read `{}`", queue.name), source })?;
        self.readers.push(handle);
        self.queues.push(Arc::clone(&queue));
        Ok(Partition::new(stream, queue))
    }

    /// What a reader needs to hand blocks to the workers.
    pub(super) fn desk(&self) -> &Desk {
        &self.pool.desk
    }

    /// Ends and joins all threads. What was decoded before can still be taken from the partitions.
    pub fn stop(self) {}
}

impl Drop for Sources {
    fn drop(&mut self) {
        self.stop.now();
        self.queues.iter().for_each(|queue| queue.close());
        for reader in self.readers.drain(..) {
            // A reader catches its own panic and has told its consumer.
            let _ = reader.join();
        }
    }
}
