//! `tidemill verify`: the promise that the same log and the same configuration give the same bytes, put to the test.
//!
//! [`replay`] learns the log again that a job has learned, with its journal, and compares: with the digests of every checkpoint
//! that the job has written, with its newest checkpoint, row by row, and with the versions of its lineage that are in the store.
//! [`restart`] runs a job twice, once in peace and once killed over and over, and compares their digests.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::job::{self, Journal, Options, Until};
use super::publisher;
use super::train::{self, Progress, Tick};
use super::warm::WarmStart;
use crate::config::{self, Checked, Config, DeadLetterSettings};
use crate::event::Time;
use crate::merge::Key;
use crate::model::State;
use crate::snapshot::codec::{self, Digest};
use crate::snapshot::manifest::PAYLOAD_FORMAT;
use crate::snapshot::{self, Manifest, Precision, Store, Version, Weights};
use crate::train::checkpoint::{self, Checkpoints};
use crate::train::core::{Core, Place};
use crate::train::digest::{self, Digests, Marker, Ordered, Past};
use crate::train::image;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Config(#[from] config::Error),
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    #[error(transparent)]
    Content(#[from] codec::Error),
    #[error(transparent)]
    Job(#[from] job::Error),
    #[error(transparent)]
    Snapshot(#[from] snapshot::Error),
    #[error("there is nothing to compare with: {0}")]
    Nothing(String),
    #[error("`{}`: cannot {action}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("the run that was not disturbed failed: {0}")]
    Undisturbed(String),
}

/// Something of a job that a replay must come to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Of {
    /// A checkpoint, by the digests that the history has of it.
    Digests(u64),
    /// The newest checkpoint, all of it.
    Checkpoint(u64),
    Version(u64),
}

/// How one comparison went.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Compared {
    pub of: Of,
    pub batch: u64,
    pub frontier: Option<Time>,
    pub same: bool,
    /// What differs first, where that can be said.
    pub difference: Option<String>,
}

/// What a replay came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Replayed {
    pub lineage: String,
    pub same: bool,
    /// What the job and this replay were computed with, where that is not the same: then a difference is no fault.
    pub builds: Option<[String; 2]>,
    /// The last batch that is equal, and the first that may differ.
    pub differs_between: Option<[u64; 2]>,
    pub marks: Vec<Compared>,
    /// Versions of the lineage that lie past the checkpoint.
    pub versions_past: usize,
    pub seconds: f64,
}

/// Rows that a difference began in: those that changed in the batches behind `after` up to `to`, where it was noticed first.
struct Suspects {
    after: u64,
    to: u64,
    /// Ids of the logistic and of the embedding table that the replay changed there.
    changed: [HashSet<u64>; 2],
}

struct Auditor<'a> {
    checked: &'a Checked,
    progress: &'a mut dyn Progress,
    /// What checkpoints came to, in their order.
    past: VecDeque<Past>,
    marker: Marker,
    suspects: Option<Suspects>,
    /// The newest checkpoint, and where it was written.
    newest: Option<(u64, Place)>,
    /// Versions by batch.
    versions: BTreeMap<u64, Vec<(Version, Precision, Digest)>>,
    digests: Digests,
    stored: &'a State,
    marks: Vec<Compared>,
    /// Of each version that differs, what the replay has.
    differ: Vec<(usize, Version, Weights)>,
    failed: Option<codec::Error>,
}

impl Auditor<'_> {
    /// Takes the next mark if it stands at a place of this kind.
    fn next_mark(&mut self, is: impl Fn(Key) -> bool) -> Option<Past> {
        if self.past.front().is_some_and(|past| is(past.mark.frontier)) { self.past.pop_front() } else { None }
    }

    /// Compares the marks of checkpoints that were written here.
    fn compare_marks(&mut self, core: &mut Core) {
        let (batch, frontier) = (core.place().batches, core.place().frontier);
        let Some(here) = frontier else { return };
        // Where the replay has cut its batches otherwise, it comes by a mark without standing there.
        while let Some(past) = self.next_mark(|there| there < here) {
            self.marks.push(missed(Of::Digests(past.number), past.mark.batch));
        }
        while let Some(past) = self.next_mark(|there| there == here) {
            let image = core.image_after(past.mark.since.and_then(|since| u32::try_from(since).ok()));
            let model = image.model.sorted();
            let ours = self.marker.mark(&image, &model, past.mark.since);
            let Some(ours) = ours else { continue };
            let differs = ours.differs(&past.mark);
            if ours.rows_differ(&past.mark) && self.suspects.is_none() {
                let after = past.mark.since.unwrap_or(0);
                let towers = model.towers.as_ref().map(|towers| (&towers.rows.ids, &towers.rows.touched));
                let changed = [Some((&model.logistic.rows.ids, &model.logistic.rows.touched)), towers].map(|rows| {
                    let rows = rows.into_iter().flat_map(|(ids, touched)| ids.iter().zip(touched));
                    rows.filter(|&(_, &touched)| u64::from(touched) > after).map(|(&id, _)| id).collect()
                });
                self.suspects = Some(Suspects { after, to: batch, changed });
            }
            self.marks.push(Compared {
                of: Of::Digests(past.number),
                batch,
                frontier: Some(here.time),
                same: differs.is_none(),
                difference: differs.map(|what| format!("other: {what}")),
            });
            // The next one covers what changes behind this.
            if let Some(since) = self.past.front().and_then(|next| next.mark.since) {
                core.model.forget_changes_to(u32::try_from(since.min(batch)).unwrap_or(0));
            }
            core.model.mark(u32::try_from(batch).expect("the job stops before 2^32 batches"));
        }
    }

    fn audit(&mut self, core: &Core) -> Result<(), codec::Error> {
        let (batch, frontier) = (core.place().batches, core.place().frontier);
        let newest = self.newest.take_if(|(_, place)| place.frontier == frontier);
        let versions = self.versions.remove(&batch).unwrap_or_default();
        if newest.is_none() && versions.is_empty() {
            return Ok(());
        }
        let image = core.image();
        let model = image.model.sorted();
        let frontier = frontier.map(|key| key.time);
        if let Some((number, _)) = newest {
            let ours = digest::digests(&Ordered::of(&image), &model, self.checked.join.window);
            let same = ours == self.digests;
            let difference = (!same).then(|| {
                first_row(self.stored, &model, self.suspects.as_ref()).unwrap_or_else(|| "the model is the same; what the order decides beside it differs (counts, metrics, seen ids, clicks or positions)".into())
            });
            self.marks.push(Compared { of: Of::Checkpoint(number), batch, frontier, same, difference });
        }
        if versions.is_empty() {
            return Ok(());
        }
        let exact = publisher::weights(&self.checked.model, model)?;
        for (version, precision, digest) in versions {
            let ours = exact.rounded(precision)?;
            let same = ours.to_arrays().encode(PAYLOAD_FORMAT)?.digest == digest;
            if !same {
                self.differ.push((self.marks.len(), version, ours));
            }
            self.marks.push(Compared { of: Of::Version(version.0), batch, frontier, same, difference: None });
        }
        Ok(())
    }
}

/// What the replay never stood at.
fn missed(of: Of, batch: u64) -> Compared {
    let difference = Some("the replay has no batch that ends there".to_owned());
    Compared { of, batch, frontier: None, same: false, difference }
}

impl Progress for Auditor<'_> {
    fn show(&mut self, line: &Tick) {
        self.progress.show(line);
    }

    fn boundary(&mut self, core: &mut Core) -> bool {
        self.compare_marks(core);
        if let Err(error) = self.audit(core) {
            self.failed = Some(error);
            return false;
        }
        self.newest.is_some()
    }
}

/// The first row, by table and id, that differs between what a job has stored and what a replay has, and in what. Of those
/// that a difference began in, if one of them still differs.
fn first_row(stored: &State, ours: &State, suspects: Option<&Suspects>) -> Option<String> {
    let began = |suspects: &Suspects| {
        let within = |touched: u32| suspects.after < u64::from(touched) && u64::from(touched) <= suspects.to;
        first_row_of(stored, ours, |table, id, touched| {
            suspects.changed[table].contains(&id) || touched.into_iter().flatten().any(within)
        })
    };
    let first = suspects.and_then(|suspects| {
        let row = began(suspects)?;
        Some(format!("it began behind batch {} and not behind {}: {row}", suspects.after, suspects.to))
    });
    first.or_else(|| first_row_of(stored, ours, |_, _, _| true))
}

/// The first row that differs of those that `wanted` says, by table, id and last batch in both.
fn first_row_of(stored: &State, ours: &State, wanted: impl Fn(usize, u64, [Option<u32>; 2]) -> bool) -> Option<String> {
    let say =
        |table: &str, id: u64, what: String| Some(format!("{table}, row {id:016x}: {what} (stored, then replayed)"));
    let (a, b) = (&stored.logistic.rows, &ours.logistic.rows);
    let row = |rows: &crate::model::table::Rows, i: usize| (rows.w[i], rows.n[i], rows.touched[i]);
    let looked =
        |id, i: Option<usize>, j: Option<usize>| wanted(0, id, [i.map(|i| a.touched[i]), j.map(|j| b.touched[j])]);
    if let Some((id, i, j)) = first_unequal(&a.ids, &b.ids, looked, |i, j| row(a, i) == row(b, j)) {
        let text = |rows, i: Option<usize>| {
            i.map_or("is not there".to_owned(), |i| {
                let (w, n, touched) = row(rows, i);
                format!("w {w}, n {n}, touched by batch {touched}")
            })
        };
        return say("logistic", id, format!("{}; {}", text(a, i), text(b, j)));
    }
    if stored.logistic.intercept != ours.logistic.intercept {
        return Some(format!("the intercept: {:?}; {:?}", stored.logistic.intercept, ours.logistic.intercept));
    }
    let (a, b) = (stored.towers.as_ref()?, ours.towers.as_ref()?);
    let (dim, width) = (a.rows.w.len() / a.rows.ids.len().max(1), a.rows.n.len() / a.rows.ids.len().max(1));
    let same = |i: usize, j: usize| {
        a.rows.w[i * dim..][..dim] == b.rows.w[j * dim..][..dim]
            && a.rows.n[i * width..][..width] == b.rows.n[j * width..][..width]
            && a.rows.touched[i] == b.rows.touched[j]
    };
    let looked = |id, i: Option<usize>, j: Option<usize>| {
        wanted(1, id, [i.map(|i| a.rows.touched[i]), j.map(|j| b.rows.touched[j])])
    };
    if let Some((id, i, j)) = first_unequal(&a.rows.ids, &b.rows.ids, looked, same) {
        let text = |rows: &crate::model::embedding::Rows, i: Option<usize>| {
            i.map_or("is not there".to_owned(), |i| {
                let row = &rows.w[i * dim..][..dim];
                format!("{:?}, touched by batch {}", &row[..row.len().min(4)], rows.touched[i])
            })
        };
        return say("embedding", id, format!("{}; {}", text(&a.rows, i), text(&b.rows, j)));
    }
    let dense = a.params.iter().zip(&b.params).position(|(a, b)| a != b);
    dense.map(|i| format!("dense parameter {i}: {}; {} (stored, then replayed)", a.params[i], b.params[i]))
}

/// The least id, of those to look at, that only one has, or whose rows are not the same; where it stands in each.
fn first_unequal(
    a: &[u64],
    b: &[u64],
    looked: impl Fn(u64, Option<usize>, Option<usize>) -> bool,
    same: impl Fn(usize, usize) -> bool,
) -> Option<(u64, Option<usize>, Option<usize>)> {
    let (mut i, mut j) = (0, 0);
    loop {
        let (id, at) = match (a.get(i), b.get(j)) {
            (None, None) => return None,
            (Some(&x), Some(&y)) if x == y => (x, (Some(i), Some(j))),
            (Some(&x), y) if y.is_none_or(|&y| x < y) => (x, (Some(i), None)),
            (_, Some(&y)) => (y, (None, Some(j))),
            (Some(_), None) => unreachable!("taken above"),
        };
        let equal = matches!(at, (Some(i), Some(j)) if same(i, j));
        if !equal && looked(id, at.0, at.1) {
            return Some((id, at.0, at.1));
        }
        (i, j) = (i + usize::from(at.0.is_some()), j + usize::from(at.1.is_some()));
    }
}

/// Learns again what the job with these settings has learned up to its newest checkpoint, and compares.
pub fn replay(
    config: &Config,
    warm: Option<WarmStart>,
    stop: &AtomicBool,
    progress: &mut dyn Progress,
) -> Result<Replayed, Error> {
    let began = Instant::now();
    let nothing = |why: &str| Error::Nothing(why.to_owned());
    let settings = config.checkpoint.as_ref().ok_or_else(|| nothing("the configuration has no [checkpoint]"))?;
    let scratch = tempfile::tempdir().map_err(|source| Error::Io {
        path: std::env::temp_dir(),
        action: "make a directory",
        source,
    })?;
    // The job may be running and clean up while we read.
    Checkpoints::look(&settings.dir).copy_newest(scratch.path())?;
    let loaded = Checkpoints::look(scratch.path()).newest()?;
    let loaded = loaded.ok_or_else(|| Error::Nothing(format!("`{}` has no checkpoint", settings.dir.display())))?;
    let mut config = config.clone();
    config.checkpoint = None;
    let published = config.snapshots.take();
    (config.dead_letters, config.telemetry.listen) = (None, None);
    if let Some(cluster) = &mut config.kafka {
        cluster.group = None;
    }
    let mut checked = config.check(None)?;
    let head = train::read_head(&loaded.head, &settings.dir, &checked)?;
    checked.branch.clone_from(&head.branch);
    if let (Some(began_as), None) = (head.branch.as_ref().and_then(|branch| branch.began_as.as_ref()), &warm) {
        return Err(Error::Nothing(format!("its model began as {began_as}: say with --warm-start where that is")));
    }
    let frontier = head.place.frontier.ok_or_else(|| nothing("the checkpoint has learned nothing"))?;
    let (restored, state, words) = image::read(&head, &loaded)?;
    let digests = digest::digests(&Ordered::of_restored(&restored, &words), &state, checked.join.window);

    // The job may have written more since; the newest that was copied is the last on the way that is looked at.
    let past = Checkpoints::look(&settings.dir).history()?;
    let mut past = VecDeque::from(digest::way(past, &head.lineage));
    while past.back().is_some_and(|past| past.mark.frontier > frontier) {
        past.pop_back();
    }
    let mut versions = BTreeMap::<u64, Vec<_>>::new();
    let runtime = super::runtime();
    let runtime = runtime.map_err(|source| Error::Io { path: PathBuf::new(), action: "start a runtime", source })?;
    let store = published.map(|settings| Store::open(&settings.store)).transpose()?;
    let mut versions_past = 0;
    if let Some(store) = &store {
        for version in runtime.block_on(store.versions())?.into_keys() {
            // Retention may be faster than we are.
            let Ok(manifest) = runtime.block_on(store.manifest(version, "the list of versions")) else { continue };
            if manifest.lineage != head.lineage {
                continue;
            }
            let Manifest { facts, delta, objects, precision, .. } = manifest;
            if facts.batch > head.place.batches {
                versions_past += 1;
                continue;
            }
            let digest = delta.map_or(objects[0].digest, |delta| delta.result.digest);
            versions.entry(facts.batch).or_default().push((version, precision, digest));
        }
    }

    let partitions = head.partitions.iter().map(|partition| (partition.stream, partition.name.clone())).collect();
    checked.merge.until = Some(Time(frontier.time.0 + 1));
    let options = Options {
        journal: Some(Journal::Entries { entries: head.journal.clone(), partitions }),
        warm,
        ..Options::until(Until::Time(Time(frontier.time.0 + 1)))
    };
    let mut auditor = Auditor {
        checked: &checked,
        progress,
        past,
        marker: Marker::new(checked.join.window),
        suspects: None,
        newest: Some((loaded.number, head.place.clone())),
        versions,
        digests,
        stored: &state,
        marks: Vec::new(),
        differ: Vec::new(),
        failed: None,
    };
    train::run(&checked, &options, stop, &mut auditor)?;
    let Auditor { mut marks, differ, failed, past, newest, versions, .. } = auditor;
    if let Some(error) = failed {
        return Err(error.into());
    }
    for (at, version, ours) in differ {
        let theirs = store.as_ref().map(|store| runtime.block_on(store.load(version))).transpose();
        let theirs = theirs.ok().flatten().map(|snapshot| snapshot.weights);
        marks[at].difference = theirs.and_then(|theirs| first_weight(&theirs, &ours));
    }
    if !stop.load(Ordering::Relaxed) {
        // The replay cut its batches elsewhere: it never stood where the job stood.
        marks.extend(past.into_iter().map(|past| missed(Of::Digests(past.number), past.mark.batch)));
        marks.extend(newest.map(|(number, place)| missed(Of::Checkpoint(number), place.batches)));
        let versions =
            versions.into_iter().flat_map(|(batch, of)| of.into_iter().map(move |(version, ..)| (batch, version)));
        marks.extend(versions.map(|(batch, version)| missed(Of::Version(version.0), batch)));
    }
    let here = checked.build();
    let same = marks.iter().all(|mark| mark.same);
    let first = marks.iter().filter(|mark| !mark.same).map(|mark| mark.batch).min();
    let equal = marks.iter().filter(|mark| mark.same && first.is_none_or(|first| mark.batch < first));
    let equal = equal.map(|mark| mark.batch).max().unwrap_or(0);
    Ok(Replayed {
        lineage: head.lineage,
        same,
        builds: (head.build != here).then_some([head.build, here]),
        differs_between: first.map(|first| [equal, first]),
        marks,
        versions_past,
        seconds: began.elapsed().as_secs_f64(),
    })
}

/// The first published weight that differs.
fn first_weight(theirs: &Weights, ours: &Weights) -> Option<String> {
    let any = |_, _, _| true;
    let (a, b) = (theirs.weights(), ours.weights());
    if let Some((id, i, j)) = first_unequal(theirs.ids(), ours.ids(), any, |i, j| a[i] == b[j]) {
        let text = |w: &[f32], i: Option<usize>| i.map_or("not there".to_owned(), |i| w[i].to_string());
        return Some(format!("logistic, row {id:016x}: {} published, {} replayed", text(&a, i), text(&b, j)));
    }
    let (a, b) = (theirs.towers()?, ours.towers()?);
    if let Some((id, ..)) = first_unequal(a.ids(), b.ids(), any, |i, j| a.rows().same(i, b.rows(), j)) {
        return Some(format!("embedding, row {id:016x}"));
    }
    let dense = a.params().iter().zip(b.params()).position(|(a, b)| a != b);
    dense.map(|i| format!("dense parameter {i}: {} published, {} replayed", a.params()[i], b.params()[i]))
}

/// What a job killed over and over came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Restarted {
    pub same: bool,
    pub seed: u64,
    pub kills: u32,
    /// Times that a run ended before it was killed, and another was begun.
    pub ended: u32,
    /// Of the run that was left in peace, and of one that was killed: model digest, order digest.
    pub undisturbed: [String; 2],
    pub killed: [String; 2],
    pub seconds: f64,
}

/// Runs the job with these settings from the start of the log to `until`, or to the end of the log, once in peace and once
/// killed `kills` times at moments drawn by `seed`; everything it writes goes to a scratch directory. `executable` is tidemill.
pub fn restart(
    config: &Config,
    executable: &Path,
    until: Option<Time>,
    kills: u32,
    seed: u64,
    stop: &AtomicBool,
    said: &mut dyn FnMut(u32),
) -> Result<Restarted, Error> {
    let began = Instant::now();
    let scratch = tempfile::tempdir().map_err(|source| Error::Io {
        path: std::env::temp_dir(),
        action: "make a directory",
        source,
    })?;
    let job = |name: &str| -> Result<Command, Error> {
        let dir = scratch.path().join(name);
        let mut config = config.clone();
        let every = config.checkpoint.as_ref().map_or((Duration::from_secs(60), 0), |s| (s.every, s.every_batches));
        config.checkpoint = Some(config::CheckpointSettings {
            dir: dir.join("checkpoints"),
            every: every.0.min(Duration::from_millis(200)),
            every_batches: every.1,
        });
        if let Some(snapshots) = &mut config.snapshots {
            snapshots.store = dir.join("snapshots").display().to_string();
        }
        let path = Some(dir.join("dead-letters.jsonl"));
        config.dead_letters = config.dead_letters.map(|_| DeadLetterSettings { path, topic: None });
        config.telemetry.listen = None;
        if let Some(cluster) = &mut config.kafka {
            cluster.group = None;
        }
        let file = dir.join("job.toml");
        let fail = |source| Error::Io { path: file.clone(), action: "write", source };
        let text = config.to_toml()?;
        fs::create_dir_all(&dir).and_then(|()| fs::write(&file, text)).map_err(fail)?;
        let mut command = Command::new(executable);
        command.arg("train").arg("-c").arg(&file).arg("--json");
        match until {
            Some(until) => command.arg("--until").arg(until.0.to_string()),
            None => command.arg("--until-end"),
        };
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    };
    let fail = |source| Error::Io { path: executable.to_owned(), action: "run", source };
    let digests = |output: &std::process::Output| {
        let said = || Error::Undisturbed(String::from_utf8_lossy(&output.stderr).into_owned());
        if !output.status.success() {
            return Err(said());
        }
        let summary: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|_| said())?;
        let text = |key: &str| summary[key].as_str().map(str::to_owned).ok_or_else(said);
        Ok([text("model_digest")?, text("order_digest")?])
    };
    let peace = Instant::now();
    let undisturbed = digests(&job("undisturbed")?.output().map_err(fail)?)?;
    let length = peace.elapsed().as_millis().max(1) as u64;
    let (mut done, mut ended, mut name) = (0, 0, 0);
    let draw = |n: u32| xxh3_64_with_seed(&n.to_le_bytes(), seed);
    let mut drawn = 0;
    while done < kills && !stop.load(Ordering::Relaxed) {
        let mut child =
            job(&format!("killed-{name}"))?.stdout(Stdio::null()).stderr(Stdio::null()).spawn().map_err(fail)?;
        drawn += 1;
        // Somewhere in about a third of the way, so that most runs go on from one that was killed.
        std::thread::sleep(Duration::from_millis(draw(drawn) % (length / 3 + 2)));
        if child.try_wait().map_err(fail)?.is_some() {
            (ended, name) = (ended + 1, name + 1);
            continue;
        }
        child.kill().and_then(|()| child.wait()).map_err(fail)?;
        done += 1;
        said(done);
    }
    let killed = digests(&job(&format!("killed-{name}"))?.output().map_err(fail)?)?;
    let same = undisturbed == killed;
    Ok(Restarted { same, seed, kills: done, ended, undisturbed, killed, seconds: began.elapsed().as_secs_f64() })
}
