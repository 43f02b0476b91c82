//! The towers as they travel beside the logistic part: sorted ids with their vectors, the layers, and which feature is seen by
//! which tower. The arrays say all of it, so a reader needs no settings.

use std::cell::RefCell;

use super::codec::{Arrays, Error, Result};
use super::column::Column;
use super::vectors::Vectors;
use super::weights::{ascending, find};
use crate::event::Slot;
use crate::model::tower::{Activation, MOST_LAYERS, Pair, WIDEST, Work};
use crate::model::two_tower::{Layout, Plan, Side, names};

pub(super) const IDS: &str = "embedding.ids";
pub(super) const ROWS: &str = "embedding.rows";
const FEATURES: &str = "towers.features";
const ACTIVATION: &str = "towers.activation";
/// Only where some feature uses the vectors of another.
const KEYS: &str = "towers.keys";
const SCALE: &str = "towers.scale";

/// Towers with their table. Ids are uniform hashes, so the sorted column is its own index.
#[derive(Clone, PartialEq, Debug)]
pub struct Towers {
    layout: Layout,
    plan: Plan,
    pair: Pair,
    ids: Column<u64>,
    rows: Vectors,
    /// Packed as [`Pair`] has it.
    params: Vec<f32>,
    /// Of each feature that a tower sees: position of its default row.
    defaults: Vec<Option<usize>>,
}

impl Towers {
    /// Checks and keeps towers: `ids` ascending strictly and never 0, a row of `dim` for each, all finite, and among them the
    /// default row of each feature that a tower sees.
    pub fn new(layout: Layout, ids: Vec<u64>, rows: Vectors, params: Vec<f32>, default_rows: &[u64]) -> Result<Self> {
        Self::checked(layout, ids.into(), rows, params, default_rows)
    }

    fn checked(
        layout: Layout,
        ids: Column<u64>,
        rows: Vectors,
        params: Vec<f32>,
        default_rows: &[u64],
    ) -> Result<Self> {
        let wrong = |name: &str, expected: &str, found: String| {
            Err(Error::Wrong { name: name.to_owned(), expected: expected.to_owned(), found })
        };
        let (plan, pair) = (layout.plan(), layout.pair());
        if layout.sides.len() != default_rows.len() {
            return wrong(FEATURES, &format!("{} long", default_rows.len()), layout.sides.len().to_string());
        }
        if (rows.len(), rows.dim()) != (ids.len(), layout.dim) {
            let found = format!("{} x {}", rows.len(), rows.dim());
            return wrong(ROWS, &format!("{} x {}, like `{IDS}`", ids.len(), layout.dim), found);
        }
        ascending(IDS, &ids)?;
        if let Some(at) = rows.unfit() {
            return wrong(ROWS, "finite", format!("a number that is not in row {:016x}", ids[at]));
        }
        if params.len() != pair.len {
            return wrong("towers.*", &format!("{} numbers together", pair.len), params.len().to_string());
        }
        if let Some((name, _, _)) =
            names(&pair).into_iter().find(|(_, _, at)| params[at.clone()].iter().any(|w| !w.is_finite()))
        {
            return wrong(&name, "finite", "a number that is not".to_owned());
        }
        let mut defaults = vec![None; default_rows.len()];
        for (feature, row) in default_rows.iter().enumerate().filter(|(i, _)| layout.sides[*i].is_some()) {
            let row = plan.id(feature as u16, *row);
            defaults[feature] = find(&ids, row);
            if defaults[feature].is_none() {
                return wrong(IDS, &format!("with the default row {row:016x} of feature {feature}"), "none".to_owned());
            }
        }
        Ok(Self { layout, plan, pair, ids, rows, params, defaults })
    }

    /// The same towers with their vectors at another precision.
    pub(super) fn with_rows(&self, rows: Vectors) -> Self {
        let Self { layout, plan, pair, ids, params, defaults, .. } = self.clone();
        Self { layout, plan, pair, ids, rows, params, defaults }
    }

    /// What the towers add to the logit of an encoded example.
    #[must_use]
    pub fn product(&self, slots: &[Slot]) -> f32 {
        #[derive(Default)]
        struct Scratch {
            inputs: [Vec<f32>; 2],
            work: [Work<f32>; 2],
        }
        thread_local!(static SCRATCH: RefCell<Scratch> = RefCell::default());
        SCRATCH.with_borrow_mut(|Scratch { inputs, work: [user, item] }| {
            for (input, width) in inputs.iter_mut().zip(self.plan.widths()) {
                input.clear();
                input.resize(width, 0.0);
            }
            for slot in slots {
                let Some((tower, column)) = self.plan.of(slot.feature) else { continue };
                let own = find(&self.ids, self.plan.id(slot.feature, slot.row))
                    .or_else(|| self.defaults[usize::from(slot.feature)]);
                let Some(at) = own else { continue };
                self.rows.add(at, slot.value, &mut inputs[tower][column..column + self.layout.dim]);
            }
            let u = self.pair.user.says(&self.params, &inputs[0], 1, user);
            let v = self.pair.item.says(&self.params, &inputs[1], 1, item);
            self.pair.product(&self.params, u, v)
        })
    }

    #[must_use]
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Row ids, strictly ascending.
    #[must_use]
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// Vectors beside [`Towers::ids`].
    #[must_use]
    pub fn rows(&self) -> &Vectors {
        &self.rows
    }

    /// Row ids, vectors, and the parameters of the layers.
    #[must_use]
    pub fn into_columns(self) -> (Column<u64>, Vectors, Vec<f32>) {
        (self.ids, self.rows, self.params)
    }

    /// Parameters of the layers, packed as [`Pair`] has it.
    #[must_use]
    pub fn params(&self) -> &[f32] {
        &self.params
    }

    /// Of each feature that a tower sees: where its default row is among [`Towers::ids`].
    #[must_use]
    pub fn defaults(&self) -> &[Option<usize>] {
        &self.defaults
    }

    pub(super) fn has_array(&self, name: &str) -> bool {
        [IDS, FEATURES, ACTIVATION].contains(&name)
            || (name == KEYS && self.has_keys())
            || self.rows.has_array(ROWS, name)
            || names(&self.pair).iter().any(|(other, _, _)| other == name)
    }

    fn has_keys(&self) -> bool {
        self.layout.keys.iter().any(|key| *key != 0)
    }

    pub(super) fn to_arrays(&self, arrays: &mut Arrays) {
        arrays.push_u64(IDS, &[self.ids.len()], &self.ids);
        self.rows.to_arrays(ROWS, arrays);
        let code = |side: &Option<Side>| match side {
            None => 0,
            Some(Side::User) => 1,
            Some(Side::Item) => 2,
        };
        let features: Vec<u8> = self.layout.sides.iter().map(code).collect();
        arrays.push_u8(FEATURES, &[features.len()], &features);
        if self.has_keys() {
            arrays.push_u64(KEYS, &[features.len()], &self.layout.keys);
        }
        arrays.push_u8(ACTIVATION, &[1], &[u8::from(self.layout.activation == Activation::Tanh)]);
        for (name, shape, at) in names(&self.pair) {
            arrays.push_f32(name, &shape, &self.params[at]);
        }
    }

    /// Reads what [`Towers::to_arrays`] wrote, if it is there.
    pub(super) fn from_arrays(arrays: &Arrays, default_rows: &[u64]) -> Result<Option<Self>> {
        if arrays.get(IDS).is_none() {
            return Ok(None);
        }
        let wrong = |name: &str, expected: &str, found: String| {
            Err(Error::Wrong { name: name.to_owned(), expected: expected.to_owned(), found })
        };
        let ids = arrays.column(IDS)?;
        let rows = Vectors::from_arrays(ROWS, arrays)?;
        let mut sides = Vec::new();
        for code in arrays.u8s(FEATURES)? {
            sides.push(match code {
                0 => None,
                1 => Some(Side::User),
                2 => Some(Side::Item),
                other => return wrong(FEATURES, "0, 1 or 2", other.to_string()),
            });
        }
        for side in [Side::User, Side::Item] {
            if !sides.contains(&Some(side)) {
                return wrong(FEATURES, "of both towers", format!("nothing of {side:?}"));
            }
        }
        let keys = match arrays.get(KEYS) {
            Some(_) => arrays.u64s(KEYS)?,
            None => vec![0; sides.len()],
        };
        if keys.len() != sides.len() {
            return wrong(KEYS, &format!("{} long, like `{FEATURES}`", sides.len()), keys.len().to_string());
        }
        let activation = match arrays.u8s(ACTIVATION)?[..] {
            [0] => Activation::Relu,
            [1] => Activation::Tanh,
            ref other => return wrong(ACTIVATION, "[0] (relu) or [1] (tanh)", format!("{other:?}")),
        };
        let mut layers = Vec::new();
        while layers.len() < MOST_LAYERS
            && let Some(bias) = arrays.get(&format!("towers.user.{}.bias", layers.len()))
        {
            layers.push(bias.shape.iter().product());
        }
        if layers.is_empty() || layers.iter().any(|n| !(1..=WIDEST).contains(n)) {
            return wrong("towers.user.*.bias", "1 to 4 layers of 1 to 1024", format!("{layers:?}"));
        }
        let layer_norm = arrays.get("towers.user.0.gain").is_some();
        let normalize = arrays.get(SCALE).is_some();
        let layout = Layout { sides, keys, dim: rows.dim(), layers, activation, layer_norm, normalize };
        let params = read_params(arrays, &layout.pair())?;
        Self::checked(layout, ids, rows, params, default_rows).map(Some)
    }
}

/// The parameters of all layers, packed as `pair` has them.
pub(super) fn read_params(arrays: &Arrays, pair: &Pair) -> Result<Vec<f32>> {
    let mut params = vec![0.0; pair.len];
    for (name, shape, at) in names(pair) {
        let found = arrays.shape(&name)?;
        if found != shape {
            let (expected, found) = (format!("of shape {shape:?}"), format!("{found:?}"));
            return Err(Error::Wrong { name, expected, found });
        }
        params[at].copy_from_slice(&arrays.f32s(&name)?);
    }
    Ok(params)
}
