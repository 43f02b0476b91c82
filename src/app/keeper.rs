//! The checkpoint thread: sorts, encodes and writes images while the core goes on.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::config::Checked;
use crate::event::Time;
use crate::merge::PartitionPosition;
use crate::snapshot::codec::Arrays;
use crate::telemetry;
use crate::train::checkpoint::{self, Checkpoints, Loaded, SegmentRef};
use crate::train::core::Image;
use crate::train::digest::{Marker, Past};
use crate::train::image::{self, Branch, FORMAT, Head, ROWS, RowFile, SEEN};

/// Most files with changed rows behind one with all rows: a resume reads them all.
const INCREMENTS: usize = 20;

/// Writes checkpoints, one at a time, off the core thread.
pub struct Keeper {
    jobs: Option<Sender<Job>>,
    shared: Arc<Shared>,
    durable: Durable,
    thread: Option<JoinHandle<()>>,
}

/// Where a restart would read, as the newest checkpoint has it; taken by whoever shows it to others.
pub type Durable = Arc<Mutex<Option<Vec<PartitionPosition>>>>;

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    busy: bool,
    /// Batch of the newest durable checkpoint.
    batch: Option<u64>,
    /// The next checkpoint must hold all rows.
    whole: bool,
}

/// The checkpoint that a job goes on from.
pub struct Resumed {
    number: u64,
    pub batch: u64,
    /// The files that its rows are in.
    rows: Vec<SegmentRef>,
    past: Option<Past>,
}

impl Resumed {
    #[must_use]
    pub fn new(head: &Head, loaded: &Loaded) -> Self {
        let rows = loaded.segments.iter().map(|(file, _)| file).filter(|file| file.name == ROWS).cloned().collect();
        let number = loaded.number;
        let past = head.mark.clone().map(|mark| Past { number, lineage: head.lineage.clone(), mark });
        Self { number, batch: head.place.batches, rows, past }
    }
}

struct Job {
    image: Image,
    predictions: Option<u64>,
    done: Sender<Result<(), checkpoint::Error>>,
}

/// A checkpoint under way.
pub struct Underway(Receiver<Result<(), checkpoint::Error>>);

impl Underway {
    /// Waits until it is durable.
    pub fn wait(self) -> Result<(), checkpoint::Error> {
        // No answer: the thread panicked, which `finish` reports.
        self.0.recv().unwrap_or(Ok(()))
    }
}

impl Keeper {
    /// Starts the thread. `resumed` is what the job goes on from: the core then keeps a log of changes from there on.
    pub fn start(checked: &Checked, store: Checkpoints, resumed: Option<Resumed>) -> std::io::Result<Self> {
        let (jobs, inbox) = bounded(1);
        let next = resumed.as_ref().map_or(1, |resumed| resumed.number + 1);
        let batch = resumed.as_ref().map(|resumed| resumed.batch);
        let (past, rows) = resumed.map(|resumed| (resumed.past, resumed.rows)).unwrap_or_default();
        let marked = past.as_ref().map(|past| past.mark.batch);
        if let Some(past) = past {
            // A run that was killed between a checkpoint and this line, or a lineage that was handed over.
            if store.last_of_history().unwrap_or_default().as_ref() != Some(&past) {
                note(&store, &past);
            }
        }
        let writer = Writer {
            store,
            next,
            job: checked.config.job.name.clone(),
            lineage: checked.lineage(),
            branch: checked.branch.clone(),
            schema: serde_json::from_str(&checked.schema.to_json()).expect("the schema writes JSON"),
            binding: checked.binding.clone(),
            build: checked.build(),
            chain: Chain { rows, ..Chain::default() },
            marker: Marker::new(checked.join.window),
            marked,
            unreadable: false,
            durable: Durable::default(),
        };
        let state = Mutex::new(State { batch, ..State::default() });
        let (durable, shared) = (Arc::clone(&writer.durable), Arc::new(Shared { state, ..Shared::default() }));
        let ours = Arc::clone(&shared);
        let thread = thread::Builder::new().name("checkpoint".into()).spawn(move || writer.run(&inbox, &ours))?;
        Ok(Self { jobs: Some(jobs), shared, durable, thread: Some(thread) })
    }

    /// The positions of the newest checkpoint, once it is durable.
    #[must_use]
    pub fn durable(&self) -> Durable {
        Arc::clone(&self.durable)
    }

    /// The batch behind which changes are still needed: that of the newest durable checkpoint. None until there is one.
    #[must_use]
    pub fn acknowledged(&self) -> Option<u64> {
        self.shared.lock().batch
    }

    /// Whether a checkpoint is being written; then the next one waits for another boundary.
    #[must_use]
    pub fn busy(&self) -> bool {
        self.shared.lock().busy
    }

    /// Leaves an image to the thread. A failure is logged and counted; older checkpoints stay as they are.
    ///
    /// `image` is told the batch of the newest durable checkpoint, behind which it may hold only what changed; or nothing,
    /// and then it must hold all. Another one that is being written is waited for, since of a row that came before that one
    /// and went behind it, changes since an earlier one say nothing.
    pub fn offer(&self, image: impl FnOnce(Option<u32>) -> Image, predictions: Option<u64>) -> Underway {
        let mut state = self.shared.lock();
        while state.busy && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let waited = self.shared.idle.wait_timeout(state, Duration::from_millis(100));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.busy = true;
        let since = state.batch.filter(|_| !state.whole).and_then(|batch| u32::try_from(batch).ok());
        drop(state);
        let started = Instant::now();
        let image = image(since);
        telemetry::checkpoint_copied(started.elapsed().as_secs_f64());
        let (done, answer) = bounded(1);
        if let Some(jobs) = &self.jobs {
            // A closed channel means that the thread is gone, which `finish` reports.
            let _ = jobs.send(Job { image, predictions, done });
        }
        Underway(answer)
    }

    /// The same, and waits until it is durable.
    pub fn write(
        &self,
        image: impl FnOnce(Option<u32>) -> Image,
        predictions: Option<u64>,
    ) -> Result<(), checkpoint::Error> {
        self.offer(image, predictions).wait()
    }

    /// Waits for the thread, which writes what it was left, and goes on with its panic.
    pub fn finish(mut self) {
        drop(self.jobs.take());
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
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
    /// Of the newest durable checkpoint.
    chain: Chain,
    marker: Marker,
    /// Batch of the last mark.
    marked: Option<u64>,
    /// The files of the chain could not be laid over each other: the next checkpoint must do without them.
    unreadable: bool,
    durable: Durable,
}

/// Adds to the history. The checkpoint itself is there already, so a failure is said and no more.
fn note(store: &Checkpoints, past: &Past) {
    if let Err(error) = store.append_history(past) {
        let error = crate::snapshot::chain(&error);
        tracing::warn!(error, "a checkpoint is not in the history, `verify replay` cannot compare with it later");
    }
}

/// Files that the next checkpoint may name without writing them again.
#[derive(Clone, Default)]
struct Chain {
    /// Number of its first checkpoint.
    number: u64,
    /// One file with all rows, then one for each checkpoint with those that changed.
    rows: Vec<SegmentRef>,
    /// Segments of seen ids by (start, ids), since a closed segment never changes.
    seen: HashMap<(Time, usize), SegmentRef>,
}

impl Chain {
    /// Enough for a resume to read, and at most twice the bytes of a checkpoint with all rows.
    fn is_long(&self) -> bool {
        let (full, changes) = self.rows.split_first().map_or((0, &[][..]), |(full, changes)| (full.length, changes));
        changes.len() >= INCREMENTS || changes.iter().map(|file| file.length).sum::<u64>() >= full
    }
}

impl Writer {
    fn run(mut self, inbox: &Receiver<Job>, shared: &Shared) {
        while let Ok(job) = inbox.recv() {
            let started = Instant::now();
            let written = self.write(&job.image, job.predictions).map(|bytes| {
                let seconds = started.elapsed().as_secs_f64();
                telemetry::checkpointed(seconds, bytes);
                tracing::debug!(
                    number = self.next - 1,
                    chain = self.chain.number,
                    bytes,
                    seconds,
                    "a checkpoint is written"
                );
            });
            if let Err(error) = &written {
                telemetry::checkpoint_failed();
                let error = crate::snapshot::chain(error);
                tracing::error!(error, "a checkpoint could not be written; the one before stays, training goes on");
            }
            let mut state = shared.lock();
            state.busy = false;
            if written.is_ok() {
                state.batch = Some(job.image.place.batches);
            }
            state.whole = self.unreadable;
            drop(state);
            shared.idle.notify_all();
            // Nobody may want to know.
            let _ = job.done.send(written);
        }
    }

    /// All rows, of the files of the chain and of those that changed since.
    fn whole_rows(&self, changed: &Arrays, image: &Image) -> Result<Arrays, checkpoint::Error> {
        let before = self.chain.rows.iter().map(|file| Ok(RowFile::read(&self.store.read_segment(file)?)?));
        let mut files = before.collect::<Result<Vec<_>, checkpoint::Error>>()?;
        files.push(RowFile::read(changed)?);
        Ok(image::whole_rows(files, image)?)
    }

    /// Returns how many bytes it wrote.
    fn write(&mut self, image: &Image, predictions: Option<u64>) -> Result<u64, checkpoint::Error> {
        // A second chain as soon as can be, so that damage in one leaves the other.
        let begins = image.since.is_none() || self.chain.is_long() || !self.store.has_apart();
        let mut chain = if begins { Chain { number: self.next, ..Chain::default() } } else { self.chain.clone() };
        let mut bytes = 0;
        let mut put = |name: &str, arrays: &Arrays| {
            let file = self.store.write_segment(chain.number, name, arrays)?;
            bytes += file.length;
            Ok::<_, checkpoint::Error>(file)
        };
        let (mut segments, mut seen) = (Vec::new(), HashMap::new());
        for segment in &image.seen {
            let key = (segment.start, segment.ids.len());
            let file = match chain.seen.remove(&key) {
                Some(file) => file,
                None => put(SEEN, &image::segment_arrays(segment))?,
            };
            segments.push(file.clone());
            seen.insert(key, file);
        }
        let model = image.model.sorted();
        let mark = self.marker.mark(image, &model, image.since.map(u64::from).or(self.marked));
        let mut rows = image::row_arrays(image, &model);
        if begins && image.since.is_some() {
            let whole = self.whole_rows(&rows, image);
            self.unreadable = whole.is_err();
            rows = whole?;
        }
        chain.rows.push(put(ROWS, &rows)?);
        chain.seen = seen;
        segments.extend(chain.rows.iter().cloned());
        let head = Head {
            format: FORMAT,
            job: self.job.clone(),
            lineage: self.lineage.clone(),
            branch: self.branch.clone(),
            schema: self.schema.clone(),
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
            rows: image.model.rows,
            predictions,
            mark,
        };
        bytes += self.store.write(self.next, chain.number, &head, &image::arrays(image, &model), &segments)?;
        if let Some(mark) = head.mark {
            self.marked = Some(mark.batch);
            note(&self.store, &Past { number: self.next, lineage: head.lineage, mark });
        }
        self.next += 1;
        self.chain = chain;
        self.unreadable = false;
        *self.durable.lock().unwrap_or_else(PoisonError::into_inner) = Some(head.partitions);
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::path::Path;

    use proptest::prelude::*;
    use proptest::test_runner::{Config as Cases, TestRunner};
    use xxhash_rust::xxh3::xxh3_64;

    use super::*;
    use crate::config::Config;
    use crate::event::{Example, Slot, Stream};
    use crate::join;
    use crate::merge::Key;
    use crate::model::{self, Model};
    use crate::train::core::Place;
    use crate::train::digest;

    /// A job in which ids are admitted by chance and count, expire, and are evicted, in both tables.
    const CONFIG: &str = r#"
        [job]
        seed = 7
        learn_threads = 1
        [impressions]
        source = { paths = ["DIR/impressions-*"] }
        [clicks]
        source = { paths = ["DIR/clicks-*"] }
        [model]
        kind = "two_tower"
        [model.logistic.table]
        admit = 0.8
        count = { occurrences = 2, bytes = 4096, per = "20s" }
        expire_after = "16s"
        capacity = 1024
        [model.two_tower]
        dim = 2
        layers = [4]
        [model.two_tower.table]
        admit = 0.8
        count = { occurrences = 2, bytes = 4096, per = "20s" }
        expire_after = "16s"
        capacity = 1024
        [[features]]
        name = "user"
        tower = "user"
        [[features]]
        name = "item"
        tower = "item"
    "#;

    fn checked(dir: &Path) -> Checked {
        let path = dir.join("job.toml");
        fs::write(&path, CONFIG.replace("DIR", &dir.display().to_string())).unwrap();
        Config::load(&path, &[]).unwrap().check(None).unwrap()
    }

    /// Users that come three times in one batch and never again, so many in six batches of sixteen that they are
    /// evicted and so few in the others that they expire; items that come again and again; and one example that no model can learn from.
    fn learn(model: &mut Model, batch: u32) -> u64 {
        let hash = |words: [u32; 3]| xxh3_64(&words.map(u32::to_le_bytes).concat()).max(1);
        let slot = |row, value, feature| Slot { row, value, feature, flags: 0 };
        let count = if batch % 16 < 6 { 1200 } else { 60 };
        let slots: Vec<[Slot; 2]> = (0..count)
            .map(|i| {
                let item = hash([1, 0, (hash([2, batch, i]) % 50) as u32]);
                [slot(hash([0, batch, i / 3]), if i == 9 { f32::NAN } else { 1.0 }, 0), slot(item, 1.0, 1)]
            })
            .collect();
        let time = Time(i64::from(batch) * 2000);
        let example = |(i, slots)| {
            let id = hash([3, batch, i]);
            Example { slots, positive: id % 4 == 0, weight: 1.0, sampling_offset: 0.0, time, id }
        };
        let examples: Vec<Example<'_>> = (0..).zip(slots.iter().map(|slots| &slots[..])).map(example).collect();
        let mut outcomes = Vec::new();
        model.learn(batch, time, &examples, &mut outcomes).unwrap();
        outcomes.iter().filter(|outcome| outcome.quarantined).count() as u64
    }

    /// As `Core::image_after` makes it.
    fn image(model: &Model, batch: u32, since: Option<u32>) -> Image {
        let changed = since.and_then(|since| model.image_after(since));
        let since = since.filter(|_| changed.is_some());
        let at = Key {
            time: Time(i64::from(batch)),
            stream: Stream::Impressions,
            id: 0,
            content: 0,
            partition: 0,
            offset: 0,
            row: 0,
        };
        let seen = |at: u32| join::Segment {
            start: Time(i64::from(at)),
            ids: (1..=u64::from(at)).collect(),
            infos: vec![join::SeenInfo::from_bits(0); at as usize],
        };
        Image {
            place: Place { batches: u64::from(batch), frontier: Some(at), ..Place::default() },
            partitions: Vec::new(),
            journal: Vec::new(),
            clicks: Vec::new(),
            seen: (batch.saturating_sub(4)..=batch).map(|at| Arc::new(seen(at))).collect(),
            counts: join::Counts::default(),
            delays: join::DelayCurve::default(),
            fuse: join::fuse::State::default(),
            progress: Vec::new(),
            compare: None,
            model: changed.unwrap_or_else(|| model.image()),
            since,
        }
    }

    fn state(loaded: &Loaded) -> (u32, model::State) {
        let head: Head = serde_json::from_value(loaded.head.clone()).unwrap();
        let (_, state, _) = image::read(&head, loaded).unwrap();
        (head.place.batches as u32, state)
    }

    #[test]
    fn all_rows_are_written_now_and_then_without_a_copy_of_them_unless_a_file_of_the_chain_is_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let checked = checked(dir.path());
        let at = dir.path().join("checkpoints");
        let keeper = Keeper::start(&checked, Checkpoints::open(&at).unwrap(), None).unwrap();
        let mut model = checked.model.start().unwrap();
        let row_files = || {
            let loaded = Checkpoints::look(&at).newest().unwrap().unwrap();
            let files: Vec<_> = loaded.segments.iter().map(|(file, _)| file).filter(|file| file.name == ROWS).collect();
            files.iter().map(|file| at.join(&file.file)).collect::<Vec<_>>()
        };
        let mut next = |batch: u32, sound: bool| {
            learn(&mut model, batch);
            let mut copied = false;
            let copy = |since: Option<u32>| {
                copied = since.is_none();
                image(&model, batch, since)
            };
            let written = keeper.write(copy, None);
            model.forget_changes_to(keeper.acknowledged().unwrap() as u32);
            model.mark(batch);
            let (_, stored) = state(&Checkpoints::look(&at).newest().unwrap().unwrap());
            assert_eq!(sound, stored == model.image().sorted(), "batch {batch}");
            (written, copied)
        };
        let mut chains = std::collections::BTreeSet::new();
        for batch in 1..=60 {
            let (written, copied) = next(batch, true);
            written.unwrap();
            assert_eq!(copied, batch == 1);
            let files = row_files();
            assert!(files.len() <= INCREMENTS + 1);
            chains.insert(files[0].clone());
        }
        assert!(chains.len() > 3, "{chains:?}");
        // Until the chain is to be read, what is damaged in it is not noticed.
        let full = row_files().swap_remove(0);
        fs::write(&full, "damaged").unwrap();
        let mut batches = 61..=62 + INCREMENTS as u32;
        let error = batches.find_map(|batch| next(batch, false).0.err()).expect("the chain ends one day");
        assert!(error.to_string().contains(full.to_str().unwrap()) && error.to_string().contains("is damaged"));
        let (written, copied) = next(101, true);
        written.unwrap();
        assert!(copied);
        let (written, copied) = next(102, true);
        written.unwrap();
        assert!(!copied);
    }

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Learn,
        /// Offered while the core goes on.
        Offer,
        Write,
        /// Written while the disk is away.
        Fail,
    }

    #[test]
    fn a_full_and_what_changed_since_is_the_state_copied_whole() {
        let step =
            prop_oneof![4 => Just(Step::Learn), 2 => Just(Step::Offer), 2 => Just(Step::Write), 1 => Just(Step::Fail)];
        let steps = prop::collection::vec((step, any::<bool>()), 10..60);
        let [increments, longest, removed, quarantined, fell_back] = [const { Cell::new(0) }; 5];
        let [refused, expired, evicted, marked] = [const { Cell::new(0) }; 4];
        let add = |cell: &Cell<u64>, more: u64| cell.set(cell.get() + more);
        let run = |(steps, damaged): (Vec<(Step, bool)>, prop::sample::Index)| {
            let dir = tempfile::tempdir().unwrap();
            let checked = checked(dir.path());
            let (at, away) = (dir.path().join("checkpoints"), dir.path().join("away"));
            let keeper = Keeper::start(&checked, Checkpoints::open(&at).unwrap(), None).unwrap();
            let (mut model, mut plain) = (checked.model.start().unwrap(), checked.model.start().unwrap());
            let (mut batch, mut states, mut images, mut offered) = (1, HashMap::new(), HashMap::new(), Vec::new());
            learn(&mut model, batch);
            learn(&mut plain, batch);
            for (step, marks) in steps {
                let copy = |since: Option<u32>| {
                    let image = image(&model, batch, since);
                    add(&increments, u64::from(image.since.is_some()));
                    add(&removed, image.model.removed().iter().map(|ids| ids.len() as u64).sum());
                    image
                };
                match step {
                    Step::Learn => {
                        batch += 1;
                        add(&quarantined, learn(&mut model, batch));
                        learn(&mut plain, batch);
                        continue;
                    }
                    Step::Offer => offered.push(keeper.offer(copy, None)),
                    Step::Write => keeper.write(copy, None).unwrap(),
                    Step::Fail => {
                        // What was offered before is durable.
                        keeper.write(copy, None).unwrap();
                        fs::rename(&at, &away).unwrap();
                        keeper.write(copy, None).unwrap_err();
                        fs::rename(&away, &at).unwrap();
                    }
                }
                states.insert(batch, model.image().sorted());
                images.insert(u64::from(batch), image(&plain, batch, None));
                // As the training loop does, but for marks that are left out as they are once there are many.
                if let Some(known) = keeper.acknowledged() {
                    model.forget_changes_to(known as u32);
                }
                if marks || states.len() == 1 {
                    model.mark(batch);
                }
            }
            keeper.finish();
            offered.into_iter().for_each(|underway| underway.wait().unwrap());
            let counts = plain.image().sorted().logistic.admission.counts;
            for (cell, count) in [(&refused, counts.refused), (&expired, counts.expired), (&evicted, counts.evicted)] {
                add(cell, count);
            }
            prop_assert_eq!(model.image().sorted().digest(), plain.image().sorted().digest(), "saving shows");

            let store = Checkpoints::open(&at).unwrap();
            // What was written of each checkpoint, mostly from an image of what changed, is what the whole state comes to.
            let past: Vec<Past> = store.history().unwrap();
            for Past { mark, .. } in &past {
                let whole = &images[&mark.batch];
                let expected = Marker::new(checked.join.window).mark(whole, &whole.model.sorted(), mark.since);
                prop_assert_eq!(expected.as_ref(), Some(mark));
                add(&marked, u64::from(mark.since.is_some_and(|since| since < mark.batch)));
            }
            prop_assert_eq!(digest::way(past.clone(), &checked.lineage()), past, "nothing of it was taken back");
            let Some(loaded) = store.newest().unwrap() else { return Ok(()) };
            let (then, state) = state(&loaded);
            let length = loaded.segments.iter().filter(|(file, _)| file.name == ROWS).count() as u64;
            longest.set(longest.get().max(length));
            prop_assert_eq!(states.keys().max(), Some(&then));
            prop_assert_eq!(state.digest(), states[&then].digest());
            prop_assert!(state == states[&then], "restored is not what was copied at batch {}", then);
            let mut resumed = checked.model.resume(state).unwrap();
            (then + 1..=batch).for_each(|batch| {
                learn(&mut resumed, batch);
            });
            prop_assert_eq!(resumed.image().sorted().digest(), plain.image().sorted().digest(), "resuming shows");

            let mut names: Vec<_> = fs::read_dir(&at).unwrap().map(|entry| entry.unwrap().path()).collect();
            names.retain(|path| path.file_name().is_some_and(|name| name != "LOCK" && name != "history.jsonl"));
            names.sort();
            if names.iter().filter(|path| path.extension().is_some_and(|end| end == "json")).count() > 1 {
                let path = damaged.get(&names);
                let mut content = fs::read(path).unwrap();
                let middle = content.len() / 2;
                content[middle] ^= 1;
                fs::write(path, content).unwrap();
                let (then, state) = self::state(&store.newest().unwrap().unwrap());
                prop_assert!(state == states[&then], "fell back to another state at batch {}", then);
                add(&fell_back, u64::from(states.keys().max() != Some(&then)));
            }
            Ok(())
        };
        TestRunner::new(Cases::with_cases(40)).run(&(steps, any::<prop::sample::Index>()), run).unwrap();
        let counts = [increments, longest, removed, quarantined, fell_back, refused, expired, evicted, marked]
            .map(Cell::into_inner);
        assert!(
            counts.iter().all(|count| *count > 3),
            "increments, longest chain, removed, quarantined, fallbacks, refused, expired, evicted, marks: {counts:?}"
        );
    }
}
