//! What is learned: sparse tables and the models on them.
//!
//! A model knows nothing of streams, files or clocks: it takes numbered batches of encoded examples in their order, and
//! the same batches give the same bytes.

pub mod admission; // which ids have a row: admission, expiry, eviction
pub mod changes; // which rows changed since a batch
mod decay; // forgetting of accumulators, by periods of event time
pub mod device; // the towers on a GPU, in Candle's operations
pub mod embedding; // id -> vector, accumulators, touched; in stripes
pub mod logistic; // per-coordinate AdaGrad / FTRL-Proximal, example by example
pub mod optim; // Adam and AdaGrad of the dense parameters
pub mod table; // id -> (w, n, touched), three rows a cache line
pub mod tower; // the dense part of the two-tower model: on slices, in Candle
pub mod two_tower; // both, and a batch's whole step beside the logistic part

use xxhash_rust::xxh3::Xxh3;

use crate::event::{Example, Slot, Time};
use logistic::{FeatureCounts, Intercept, Logistic, Outcome};
use two_tower::TwoTower;

/// Why a model could not be made from its settings or from a stored state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`model.{key}` must be {expected}, got {got}")]
    Setting { key: &'static str, expected: &'static str, got: String },
    #[error("{threads} threads for the towers cannot be started: {reason}")]
    Threads { threads: usize, reason: String },
    #[error(
        "the towers cannot be computed on `{device}`: {reason}. Batch {batch} is not learned; a job that is started again goes on from \
         its last checkpoint, and with `model.two_tower.device = \"cpu\"` anywhere"
    )]
    Device { device: String, reason: String, batch: u32 },
    #[error("the stored {part} does not fit: {what}; it is damaged or of another model, take an older checkpoint")]
    State { part: &'static str, what: String },
}

/// Settings of a model that were found good, which alone can make one.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked {
    pub logistic: logistic::Checked,
    /// None: the model is the logistic part alone.
    pub towers: Option<two_tower::Checked>,
    /// Row id of each feature's default row, by feature.
    pub default_rows: Vec<u64>,
    /// Threads that compute. Does not show in the result.
    pub threads: usize,
}

impl Checked {
    /// A model that knows nothing.
    pub fn start(&self) -> Result<Model, Error> {
        let logistic = Logistic::new(self.logistic, self.default_rows.clone());
        let towers = self.towers.clone().map(|towers| TwoTower::new(towers, self.default_rows.clone(), self.threads));
        Ok(Model { logistic, towers: towers.transpose()?.map(Box::new) })
    }

    /// Where the towers are computed, once it is known to be there. None: no towers.
    pub fn reach_device(&self) -> Result<Option<&str>, Error> {
        let Some(towers) = &self.towers else { return Ok(None) };
        towers.device()?;
        Ok(Some(&towers.settings.device))
    }

    /// The model that goes on from `state`.
    pub fn resume(&self, state: State) -> Result<Model, Error> {
        let logistic = Logistic::from_state(self.logistic, self.default_rows.clone(), state.logistic)?;
        let towers = match (self.towers.clone(), state.towers) {
            (None, None) => None,
            (Some(checked), Some(state)) => {
                Some(Box::new(TwoTower::from_state(checked, self.default_rows.clone(), self.threads, state)?))
            }
            (Some(_), None) => return Err(Error::State { part: "towers", what: "it has none".to_owned() }),
            (None, Some(_)) => return Err(Error::State { part: "model", what: "it has towers".to_owned() }),
        };
        Ok(Model { logistic, towers })
    }
}

/// The size of a sparse table, and what became of ids, by name, since the start of the lineage.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableFigures {
    pub name: &'static str,
    pub rows: usize,
    pub bytes: usize,
    pub ids: Vec<(&'static str, u64)>,
}

/// A model of either kind: the logistic part, and towers beside it where there are any.
pub struct Model {
    pub logistic: Logistic,
    pub towers: Option<Box<TwoTower>>,
}

impl Model {
    /// Scores and learns the examples of batch number `batch`, and leaves one outcome for each; see [`Logistic::learn`] and
    /// [`TwoTower::learn`]. If the device fails, nothing can be said of the model any more.
    pub fn learn(
        &mut self,
        batch: u32,
        time: Time,
        examples: &[Example<'_>],
        outcomes: &mut Vec<Outcome>,
    ) -> Result<(), Error> {
        match &mut self.towers {
            Some(towers) => towers.learn(&mut self.logistic, batch, time, examples, outcomes),
            None => {
                self.logistic.learn(batch, time, examples, outcomes);
                Ok(())
            }
        }
    }

    #[must_use]
    pub fn counts(&self) -> &FeatureCounts {
        self.logistic.counts()
    }

    /// Rows of all tables.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.logistic.len() + self.towers.as_ref().map_or(0, |towers| towers.rows())
    }

    /// Memory of the tables, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.logistic.bytes() + self.towers.as_ref().map_or(0, |towers| towers.bytes())
    }

    /// The logit of an example with these slots, as a node computes it: the products of rows and values summed in slot order,
    /// then the intercept, then what the towers say.
    #[must_use]
    pub fn score(&self, slots: &[Slot]) -> f32 {
        let logit = self.logistic.score(slots);
        self.towers.as_ref().map_or(logit, |towers| logit + towers.product(slots))
    }

    /// Whether a slot's id has a row of its own in any table.
    #[must_use]
    pub fn has(&self, slot: &Slot) -> bool {
        self.logistic.has(slot.row) || self.towers.as_ref().is_some_and(|towers| towers.has(slot))
    }

    /// Begins a segment of the log of changes behind number `batch`, so to be called at a batch boundary. The first one turns
    /// the log on; it takes 8 bytes for each row that a segment touches, until it is forgotten or has grown far beyond the
    /// tables, and changes nothing learned.
    pub fn mark(&mut self, batch: u32) {
        self.logistic.mark(batch);
        self.towers.iter_mut().for_each(|towers| towers.mark(batch));
    }

    /// Drops what only matters to one who has not heard of `batch`: to be called when all have.
    pub fn forget_changes_to(&mut self, batch: u32) {
        self.logistic.forget_changes_to(batch);
        self.towers.iter_mut().for_each(|towers| towers.forget_changes_to(batch));
    }

    /// What became of the model behind number `batch`, at a cost that follows what was touched. None where the log of changes
    /// is off, began later, or was forgotten so far.
    #[must_use]
    pub fn changes_after(&self, batch: u32) -> Option<Changes> {
        let towers = match &self.towers {
            Some(towers) => Some(towers.changes_after(batch)?),
            None => None,
        };
        Some(Changes { logistic: self.logistic.changes_after(batch)?, intercept: self.logistic.bias(), towers })
    }

    /// What there is to say of each sparse table.
    #[must_use]
    pub fn tables(&self) -> Vec<TableFigures> {
        let Self { logistic, towers } = self;
        let mut tables = vec![TableFigures {
            name: "logistic",
            rows: logistic.len(),
            bytes: logistic.bytes(),
            ids: logistic.ids().named().to_vec(),
        }];
        tables.extend(towers.as_ref().map(|towers| TableFigures {
            name: "embedding",
            rows: towers.rows(),
            bytes: towers.bytes(),
            ids: towers.ids().named().to_vec(),
        }));
        tables
    }

    /// A plain copy, at the speed of memory; [`Image::sorted`] makes the state of it, on any thread.
    #[must_use]
    pub fn image(&self) -> Image {
        let towers = self.towers.as_ref().map(|towers| towers.image());
        Image { logistic: self.logistic.image(), towers, rows: self.row_counts(), id_sums: self.id_sums() }
    }

    /// The same with no rows but those that changed behind number `batch`, at a cost that follows what was touched. None as in
    /// [`Model::changes_after`].
    #[must_use]
    pub fn image_after(&self, batch: u32) -> Option<Image> {
        let towers = match &self.towers {
            Some(towers) => Some(towers.image_after(batch)?),
            None => None,
        };
        let logistic = self.logistic.image_after(batch)?;
        Some(Image { logistic, towers, rows: self.row_counts(), id_sums: self.id_sums() })
    }

    fn row_counts(&self) -> [usize; 2] {
        [self.logistic.len(), self.towers.as_ref().map_or(0, |towers| towers.rows())]
    }

    fn id_sums(&self) -> [u64; 2] {
        [self.logistic.id_sum(), self.towers.as_ref().map_or(0, |towers| towers.id_sum())]
    }
}

/// What became of a model since a batch: what a delta is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Changes {
    pub logistic: changes::Changes<table::Rows>,
    pub intercept: Intercept,
    pub towers: Option<two_tower::Changes>,
}

/// A copy of a model at a batch boundary: with all rows of its tables, or with those that changed since another boundary.
pub struct Image {
    logistic: logistic::Image,
    towers: Option<two_tower::Image>,
    /// Rows of the model's tables, logistic and embedding, whatever is copied of them.
    pub rows: [usize; 2],
    /// Sums of their ids, likewise; see [`table::Table::id_sum`].
    pub id_sums: [u64; 2],
}

impl Image {
    /// Does the work that the copy left undone: canonical order.
    #[must_use]
    pub fn sorted(&self) -> State {
        State { logistic: self.logistic.sorted(), towers: self.towers.as_ref().map(two_tower::Image::sorted) }
    }

    /// Ids that went, of the logistic and of the embedding table, where it holds what changed; none where it holds all rows.
    #[must_use]
    pub fn removed(&self) -> [&[u64]; 2] {
        [self.logistic.removed(), self.towers.as_ref().map_or(&[], two_tower::Image::removed)]
    }
}

/// What a checkpoint holds of a model: all that learning depends on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    pub logistic: logistic::State,
    pub towers: Option<two_tower::State>,
}

impl State {
    /// xxh3-128 over parameters and optimizers.
    #[must_use]
    pub fn digest(&self) -> u128 {
        let logistic = self.logistic.digest();
        let Some(towers) = &self.towers else { return logistic };
        let mut hash = Xxh3::new();
        hash.update(&logistic.to_le_bytes());
        towers.add_to(&mut hash);
        hash.digest128()
    }

    /// The same over all but the rows of the tables.
    #[must_use]
    pub fn digest_beside_rows(&self) -> u128 {
        let mut hash = Xxh3::new();
        self.logistic.add_beside_to(&mut hash);
        self.towers.iter().for_each(|towers| towers.add_beside_to(&mut hash));
        hash.digest128()
    }
}
