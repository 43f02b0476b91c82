//! Warm starts: a new lineage whose model begins with what another one has learned.
//!
//! From a checkpoint come weights and accumulators, from a snapshot weights alone, whose accumulators start at 0; `z` is
//! derived from both where l1 > 0, so that no weight moves. Nothing counts as touched, seen or counted yet. A feature that
//! the other lineage did not have starts cold. The rows and vectors of one that is gone are dropped: a row tells whose it is
//! ([`Schema::may_own`]), but for one in some hundreds that another feature could own as well, which stays and is never read.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::config::Checked;
use crate::feature::schema::Schema;
use crate::model::logistic::{FeatureCounts, Intercept, State as LogisticState, Weights};
use crate::model::optim::DenseState;
use crate::model::{State, admission, embedding, two_tower};
use crate::snapshot::{Manifest, Snapshot, Store, Version};
use crate::train::checkpoint::{self, Checkpoints};
use crate::train::image::{self, Head};

/// What a model begins as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum WarmStart {
    /// The newest checkpoint in a directory.
    Checkpoint(PathBuf),
    /// A version in a snapshot store; none: what the channel `live` names.
    Snapshot { store: String, version: Option<Version> },
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("a warm start from {from}: {why}")]
    Nothing { from: WarmStart, why: String },
    #[error("a warm start from {from}")]
    Checkpoint { from: WarmStart, source: checkpoint::Error },
    #[error("a warm start from {from}")]
    Content { from: WarmStart, source: crate::snapshot::codec::Error },
    #[error("a warm start from {from}")]
    Snapshot { from: WarmStart, source: crate::snapshot::Error },
}

impl fmt::Display for WarmStart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint(dir) => write!(f, "the checkpoint in `{}`", dir.display()),
            Self::Snapshot { store, version: Some(version) } => write!(f, "version {version} in `{store}`"),
            Self::Snapshot { store, version: None } => write!(f, "the live version in `{store}`"),
        }
    }
}

/// What a warm start came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Brought {
    /// What it is from, in words.
    pub from: String,
    /// Rows of the logistic table, and vectors.
    pub rows: usize,
    pub vectors: usize,
    /// Features that the other lineage does not have.
    pub start_cold: Vec<String>,
    /// Features that it has and this one does not.
    pub gone: Vec<String>,
    /// What belongs to no feature of this one.
    pub dropped_rows: usize,
    pub dropped_vectors: usize,
}

/// What another lineage has learned.
struct Learned {
    logistic: LogisticState,
    towers: Option<two_tower::State>,
    schema: Schema,
    same_features: bool,
}

impl WarmStart {
    /// A directory with checkpoints, or the address of a store with `@version` behind it or not.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let has_checkpoints = |dir: &Path| {
            let names = std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.file_name());
            names.into_iter().any(|name| name.to_string_lossy().starts_with("checkpoint-"))
        };
        if has_checkpoints(Path::new(text)) {
            return Self::Checkpoint(PathBuf::from(text));
        }
        let version = text.rsplit_once('@').and_then(|(store, version)| Some((store, version.parse().ok()?)));
        match version {
            Some((store, version)) => Self::Snapshot { store: store.to_owned(), version: Some(Version(version)) },
            None => Self::Snapshot { store: text.to_owned(), version: None },
        }
    }

    /// The state that a model begins with, and what that brings and what starts cold, which is in the log, too.
    pub fn load(&self, checked: &Checked) -> Result<(State, Brought), Error> {
        let learned = match self {
            Self::Checkpoint(dir) => self.of_checkpoint(dir, checked)?,
            Self::Snapshot { store, version } => self.of_snapshot(store, *version, checked)?,
        };
        let names = |schema: &Schema| (0..schema.len()).map(|i| schema.name(i).to_owned()).collect::<BTreeSet<_>>();
        let Learned { mut logistic, towers, schema, same_features } = learned;
        let (had, has) = (names(&schema), names(&checked.schema));
        let new: Vec<_> = has.difference(&had).cloned().collect();
        let gone: Vec<_> = had.difference(&has).cloned().collect();
        let (ours, brought) = (&checked.schema, logistic.rows.ids.len());
        // Also of a feature that uses other vectors now, whose rows are others.
        logistic.rows.retain(|id| (0..ours.len()).any(|i| ours.may_own(i, id)));
        let dropped_rows = brought - logistic.rows.ids.len();
        let mut dropped_vectors = 0;
        let towers = checked.model.towers.as_ref().map(|settings| {
            let fresh = two_tower::State::fresh(settings);
            let Some(towers) = towers.filter(|towers| fits(towers, settings)) else {
                tracing::warn!("the towers start cold: there were none, or their vectors have another size");
                return fresh;
            };
            let same = same_features && towers.params.len() == fresh.params.len();
            if !same {
                tracing::warn!(
                    "the dense part of the towers starts cold, for features or sizes are others; vectors stay"
                );
            }
            let (params, dense) = if same { (towers.params, towers.dense) } else { (fresh.params, fresh.dense) };
            let lengths = |dense: &DenseState| [dense.mean.len(), dense.square.len()];
            let fresh = DenseState::new(settings.settings.dense.rule, params.len());
            let dense = if lengths(&dense) == lengths(&fresh) { dense } else { fresh };
            let mut rows = towers.rows;
            // Also of a feature that has left its tower.
            let brought = rows.ids.len();
            rows.retain(|id| (0..ours.len()).any(|i| ours.may_use_vector(i, id)));
            dropped_vectors = brought - rows.ids.len();
            rows.touched.fill(0);
            two_tower::State { rows, params, dense, ..two_tower::State::default() }
        });
        let brought = Brought {
            from: self.to_string(),
            rows: logistic.rows.ids.len(),
            vectors: towers.as_ref().map_or(0, |towers| towers.rows.ids.len()),
            start_cold: new,
            gone,
            dropped_rows,
            dropped_vectors,
        };
        let Brought { from, rows, vectors, start_cold, gone, dropped_rows, dropped_vectors } = &brought;
        tracing::info!(from, rows, vectors, ?start_cold, ?gone, dropped_rows, dropped_vectors, "warm start");
        Ok((State { logistic, towers }, brought))
    }

    fn of_checkpoint(&self, dir: &Path, checked: &Checked) -> Result<Learned, Error> {
        let nothing = |why: String| Error::Nothing { from: self.clone(), why };
        let loaded = Checkpoints::look(dir).newest();
        let loaded = loaded.map_err(|source| Error::Checkpoint { from: self.clone(), source })?;
        let loaded = loaded.ok_or_else(|| nothing("there is none".into()))?;
        let head: Head = serde_json::from_value(loaded.head.clone())
            .map_err(|error| nothing(format!("its head cannot be read: {error}")))?;
        let content = |source| Error::Content { from: self.clone(), source };
        let (_, state, _) = image::read(&head, &loaded).map_err(content)?;
        let State { logistic, towers } = state;
        let touched = vec![0; logistic.rows.ids.len()];
        let rows = crate::model::table::Rows { touched, z: None, ..logistic.rows };
        let intercept = Intercept { touched: 0, ..logistic.intercept };
        let (counts, admission) = (FeatureCounts::default(), admission::State::default());
        let logistic = LogisticState { rows, intercept, periods: Vec::new(), counts, admission };
        let schema = self.schema(&head.schema)?;
        let same_features = head.binding.get("features") == checked.binding.get("features");
        Ok(Learned { logistic, towers, schema, same_features })
    }

    /// Refuses one of another encoding, whose rows are others.
    fn schema(&self, json: &serde_json::Value) -> Result<Schema, Error> {
        let read = Schema::from_json(&json.to_string());
        read.map_err(|error| Error::Nothing { from: self.clone(), why: format!("its features: {error}") })
    }

    fn of_snapshot(&self, url: &str, version: Option<Version>, checked: &Checked) -> Result<Learned, Error> {
        let fail = |source| Error::Snapshot { from: self.clone(), source };
        let store = Store::open(url).map_err(fail)?;
        let runtime = super::runtime();
        let runtime = runtime.map_err(|error| Error::Nothing { from: self.clone(), why: error.to_string() })?;
        let found = match version {
            Some(version) => runtime.block_on(store.load(version)).map(Some),
            None => runtime.block_on(store.load_latest("live")),
        };
        let Some(Snapshot { manifest, mut weights, .. }) = found.map_err(fail)? else {
            return Err(Error::Nothing { from: self.clone(), why: "the channel names no version".into() });
        };
        let towers = weights.take_towers().map(|towers| {
            let (ids, params) = (towers.ids().to_vec(), towers.params().to_vec());
            let (w, count) = (towers.rows().to_f32(), towers.ids().len());
            // Accumulators of the width that the settings ask for.
            let width = checked.model.towers.as_ref().map_or(1, |settings| settings.rules().accumulators());
            let rows = embedding::Rows { ids, w, n: vec![0.0; count * width], touched: vec![0; count] };
            two_tower::State { rows, params, ..two_tower::State::default() }
        });
        let Manifest { model, .. } = manifest;
        let logistic =
            Weights { ids: weights.ids().to_vec(), w: weights.weights().to_vec(), intercept: weights.intercept() };
        let schema = self.schema(&model.schema)?;
        let same_features = model.schema_hash == checked.schema.hash();
        Ok(Learned { logistic: LogisticState::warm(logistic), towers, schema, same_features })
    }
}

/// Whether vectors and accumulators have the widths that the settings ask for.
fn fits(towers: &two_tower::State, settings: &two_tower::Checked) -> bool {
    let (rules, count) = (settings.rules(), towers.rows.ids.len());
    towers.rows.w.len() == count * rules.dim && towers.rows.n.len() == count * rules.accumulators()
}
