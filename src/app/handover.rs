//! How a retrained model gets to the job that is live: an offer in the job's checkpoint directory, and an answer beside it.
//!
//! The offer names a checkpoint of another lineage. A running job looks for one every second; where it fits the job's
//! configuration, as it runs or as its file has it now, the job writes its last checkpoint, takes the offered one as its
//! newest and goes on from that frontier. A job that is down takes it when it starts. Nothing is deleted: the offered
//! checkpoint stays where it is, and the job's own one before it stays as the generation before.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::job::Options;
use crate::config::{Checked, Config};
use crate::event::Time;
use crate::snapshot::codec::Arrays;
use crate::train::checkpoint::{self, Checkpoints, Loaded};
use crate::train::image::Head;

const OFFER: &str = "handover.json";
const ANSWER: &str = "handover-answer.json";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`{}`: cannot {action}", path.display())]
    Io { path: PathBuf, action: &'static str, source: io::Error },
    #[error("`{}` cannot be read as an offer of `tidemill retrain`; remove it to go on without", path.display())]
    Unreadable { path: PathBuf, source: serde_json::Error },
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
}

/// A checkpoint that a job is to go on from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Offer {
    /// Directory of the checkpoint, absolute.
    pub dir: PathBuf,
    pub number: u64,
    pub lineage: String,
    pub frontier: Option<Time>,
}

/// What the job made of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    pub lineage: String,
    pub taken: bool,
    /// Why not.
    pub reason: Option<String>,
}

fn put(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    super::put_json(path, value).map_err(|source| Error::Io { path: path.to_owned(), action: "write", source })
}

fn get<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>, Error> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Io { path: path.to_owned(), action: "read", source }),
    };
    serde_json::from_slice(&text).map(Some).map_err(|source| Error::Unreadable { path: path.to_owned(), source })
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Error::Io { path: path.to_owned(), action: "remove", source: e })
        }
        _ => Ok(()),
    }
}

/// Offers a checkpoint to the job whose checkpoints are in `dir`; an earlier offer that was not taken is replaced.
pub fn offer(dir: &Path, offer: &Offer) -> Result<(), Error> {
    remove(&dir.join(ANSWER))?;
    put(&dir.join(OFFER), offer)
}

/// Takes an offer back.
fn withdraw(dir: &Path) -> Result<(), Error> {
    remove(&dir.join(OFFER))
}

/// What the job has said of the offer of a lineage; none: nothing yet.
pub fn answer(dir: &Path, lineage: &str) -> Result<Option<Answer>, Error> {
    Ok(get::<Answer>(&dir.join(ANSWER))?.filter(|answer| answer.lineage == lineage))
}

fn say(dir: &Path, offer: &Offer, refused: Option<String>) -> Result<(), Error> {
    match &refused {
        None => tracing::info!(lineage = offer.lineage, frontier = ?offer.frontier, "a retrained model was taken over"),
        Some(reason) => tracing::error!(lineage = offer.lineage, reason, "a retrained model was not taken over"),
    }
    let taken = refused.is_none();
    put(&dir.join(ANSWER), &Answer { lineage: offer.lineage.clone(), taken, reason: refused })?;
    withdraw(dir)
}

/// The offered checkpoint and the settings that it is bound to, or why it cannot be taken.
fn offered(offer: &Offer) -> Result<(BTreeMap<String, String>, Loaded), String> {
    let loaded = Checkpoints::look(&offer.dir).newest().map_err(|error| crate::snapshot::chain(&error))?;
    let loaded = loaded.ok_or_else(|| format!("there is no checkpoint in `{}`", offer.dir.display()))?;
    let head: Head =
        serde_json::from_value(loaded.head.clone()).map_err(|error| format!("its head cannot be read: {error}"))?;
    if loaded.number != offer.number || head.lineage != offer.lineage {
        return Err(format!(
            "`{}` holds checkpoint {} of lineage {} now",
            offer.dir.display(),
            loaded.number,
            head.lineage
        ));
    }
    Ok((head.binding, loaded))
}

/// Asked by a running job now and then: whether it is to go on as another lineage, and under which configuration. An
/// offer that does not fit is answered, and the job goes on.
pub fn asked(checked: &Checked, options: &Options) -> Result<Option<Checked>, Error> {
    let Some(settings) = &checked.config.checkpoint else { return Ok(None) };
    let dir = &settings.dir;
    let Some(offer) = get::<Offer>(&dir.join(OFFER))? else { return Ok(None) };
    let fits = offered(&offer).and_then(|(wanted, _)| {
        if wanted == checked.binding {
            return Ok(Checked { branch: None, ..checked.clone() });
        }
        let now = options.config.as_ref().map(|(path, set)| {
            let config = Config::load(path, set).map_err(|error| crate::snapshot::chain(&error))?;
            config.check(checked.merge.until).map_err(|error| crate::snapshot::chain(&error))
        });
        match now.transpose()? {
            Some(now) if now.binding == wanted && now.config.checkpoint.as_ref().is_some_and(|now| now.dir == *dir) => {
                Ok(now)
            }
            now => {
                let now = now.map_or_else(|| checked.binding.clone(), |now| now.binding);
                let names = wanted.keys().chain(now.keys());
                let mut differ: Vec<&str> =
                    names.filter(|key| wanted.get(*key) != now.get(*key)).map(String::as_str).collect();
                differ.sort_unstable();
                differ.dedup();
                Err(format!(
                    "it was trained under other settings than this job's configuration file has: {}. Give the job the configuration of the retrain, then offer it again",
                    differ.join(", ")
                ))
            }
        }
    });
    match fits {
        Ok(next) => {
            tracing::info!(
                lineage = offer.lineage,
                "a retrained model is handed over; this one's last checkpoint is written"
            );
            Ok(Some(next))
        }
        Err(reason) => {
            say(dir, &offer, Some(reason))?;
            Ok(None)
        }
    }
}

/// At a start: makes an offer that fits the newest checkpoint. Whether there was one.
pub fn take(own: &Checkpoints, checked: &Checked) -> Result<bool, Error> {
    let dir = own.dir();
    let Some(offer) = get::<Offer>(&dir.join(OFFER))? else { return Ok(false) };
    let newest = own.newest()?;
    let lineage = |head: &serde_json::Value| head.get("lineage").and_then(|l| l.as_str()) == Some(&offer.lineage);
    if newest.as_ref().is_some_and(|newest| lineage(&newest.head)) {
        // It was taken, and the answer was not written any more.
        say(dir, &offer, None)?;
        return Ok(true);
    }
    let refuse = |reason: String| say(dir, &offer, Some(reason)).map(|()| false);
    let loaded = match offered(&offer) {
        Ok((wanted, loaded)) if wanted == checked.binding => loaded,
        Ok(_) => return refuse("it was trained under other settings than this job was started with".to_owned()),
        Err(reason) => return refuse(reason),
    };
    let number = newest.map_or(1, |newest| newest.number + 1);
    let segments = loaded.segments.iter();
    let segments = segments.map(|(segment, arrays)| own.write_segment(number, segment.name.as_str(), arrays));
    let segments = segments.collect::<Result<Vec<_>, _>>()?;
    // The sums of the comparison were the candidate's; the job compares nothing.
    let mut arrays = Arrays::new();
    loaded.arrays.iter().filter(|array| array.name != "compare").cloned().for_each(|array| arrays.push(array));
    own.write(number, number, &loaded.head, &arrays, &segments)?;
    say(dir, &offer, None)?;
    Ok(true)
}
