//! What one version changes in another: rows that are new or other, rows that are gone, and all that is dense.
//!
//! A delta is canonical: between two sets of weights there is exactly one, it holds no row that stays as it was, and applied
//! to the first it gives the second bit for bit. So it does not matter how often a publish was tried, or what else was
//! tried in between.

use std::cmp::Ordering;
use std::ops::Range;

use super::codec::{Arrays, Error, Result};
use super::towers::{IDS as TOWER_IDS, ROWS as TOWER_ROWS, Towers, read_params};
use super::vectors::Vectors;
use super::weights::{
    IDS, INTERCEPT, WEIGHTS, Weights, ascending, find, push_weights, read_weights, round_vectors, round_weights,
};
use crate::model::tower::Pair;
use crate::model::two_tower::names;

const REMOVED: &str = "logistic.removed";
const TOWER_REMOVED: &str = "embedding.removed";

/// Changes of a model.
#[derive(Clone, PartialEq, Debug)]
pub struct Delta {
    ids: Vec<u64>,
    /// Weights beside `ids`, as they are from now on.
    weights: Vec<f32>,
    half: bool,
    removed: Vec<u64>,
    intercept: f32,
    towers: Option<TowersDelta>,
}

/// Changes of the towers.
#[derive(Clone, PartialEq, Debug)]
pub struct TowersDelta {
    pair: Pair,
    ids: Vec<u64>,
    rows: Vectors,
    removed: Vec<u64>,
    /// All parameters of the layers, packed as the model has them.
    params: Vec<f32>,
}

impl TowersDelta {
    /// Rows touched, in f32, and rows removed, both ascending; all parameters of the layers as `pair` packs them.
    #[must_use]
    pub fn new(pair: Pair, ids: Vec<u64>, rows: Vectors, removed: Vec<u64>, params: Vec<f32>) -> Self {
        Self { pair, ids, rows, removed, params }
    }

    /// Ids of rows that are new or other, strictly ascending.
    #[must_use]
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// Their vectors.
    #[must_use]
    pub fn rows(&self) -> &Vectors {
        &self.rows
    }

    /// Ids of rows that are gone, strictly ascending.
    #[must_use]
    pub fn removed(&self) -> &[u64] {
        &self.removed
    }

    #[must_use]
    pub fn params(&self) -> &[f32] {
        &self.params
    }
}

impl Delta {
    /// What turns `from` into `to`. None where a delta cannot say it: another kind, precision, layout or other default rows.
    #[must_use]
    pub fn between(from: &Weights, to: &Weights) -> Option<Self> {
        let towers = match (&from.towers, &to.towers) {
            (None, None) => None,
            (Some(from), Some(to)) => Some(Self::between_towers(from, to)?),
            _ => return None,
        };
        if from.default_rows != to.default_rows || from.half() != to.half() {
            return None;
        }
        let mut delta = Self {
            ids: Vec::new(),
            weights: Vec::new(),
            half: to.half(),
            removed: Vec::new(),
            intercept: to.intercept(),
            towers,
        };
        let same = |a: usize, b: usize| from.weights.same(a, &to.weights, b);
        let (changed, removed) = differences(&from.ids, &to.ids, same);
        delta.removed = removed;
        delta.ids.extend(changed.iter().map(|&at| to.ids[at]));
        delta.weights.extend(changed.iter().map(|&at| to.weights.number(at)));
        Some(delta)
    }

    fn between_towers(from: &Towers, to: &Towers) -> Option<TowersDelta> {
        if from.layout() != to.layout() || from.rows().precision() != to.rows().precision() {
            return None;
        }
        let (changed, removed) = differences(from.ids(), to.ids(), |a, b| from.rows().same(a, to.rows(), b));
        let mut rows = Vectors::new(to.rows().dim(), to.rows().precision());
        changed.iter().for_each(|&at| rows.extend(to.rows(), at..at + 1));
        let ids = changed.iter().map(|&at| to.ids()[at]).collect();
        Some(TowersDelta { pair: to.pair().clone(), ids, rows, removed, params: to.params().to_vec() })
    }

    /// What was touched since some version, in f32: it may hold rows that came to nothing, so [`Delta::against`] that version makes
    /// it one to publish. Ids ascending, as in [`Weights::new`].
    pub fn touched(
        ids: Vec<u64>,
        weights: Vec<f32>,
        removed: Vec<u64>,
        intercept: f32,
        towers: Option<TowersDelta>,
    ) -> Result<Self> {
        sound(IDS, &ids, REMOVED, &removed)?;
        finite(&ids, &weights, intercept)?;
        if let Some(TowersDelta { ids, rows, removed, .. }) = &towers {
            sound(TOWER_IDS, ids, TOWER_REMOVED, removed)?;
            fit(ids, rows)?;
        }
        Ok(Self { ids, weights, half: false, removed, intercept, towers })
    }

    /// The same at the precision of `from`, without rows that are in `from` as they are and without those to be removed that are
    /// not there: equal to [`Delta::between`] that and what comes of it.
    pub fn against(&self, from: &Weights) -> Result<Self> {
        let rounded = round_weights(&self.ids, &self.weights, from.half())?;
        let old = |id: &u64| find(&from.ids, *id).map(|at| from.weights.number(at).to_bits());
        let changed = self.ids.iter().zip(&rounded).filter(|(id, w)| old(id) != Some(w.to_bits()));
        let (ids, weights) = changed.unzip();
        let removed = self.removed.iter().copied().filter(|id| find(&from.ids, *id).is_some()).collect();
        let towers = match (&self.towers, &from.towers) {
            (Some(delta), Some(from)) => Some(delta.against(from)?),
            _ => None,
        };
        Ok(Self { ids, weights, half: from.half(), removed, intercept: self.intercept, towers })
    }

    /// The weights that come of `from`. Refuses a delta that was not made for them: one that removes what is not there, or has
    /// another shape.
    pub fn apply(&self, from: &Weights) -> Result<Weights> {
        if self.half != from.half() {
            return wrong(WEIGHTS, "of the precision of the version that it changes", "another".to_owned());
        }
        let pieces = pieces(&from.ids, &self.ids, &self.removed, REMOVED)?;
        let (ids, numbers) = (join(&pieces, &from.ids, &self.ids), join(&pieces, &from.weights(), &self.weights));
        let weights = Weights::new(ids, numbers, self.intercept, from.default_rows.clone())?;
        let weights = if self.half { weights.of_halves() } else { weights };
        match (&from.towers, &self.towers) {
            (None, None) => Ok(weights),
            (Some(towers), Some(delta)) => {
                let towers = delta.apply(towers, &from.default_rows)?;
                Ok(weights.with_towers(towers))
            }
            (Some(_), None) => wrong(TOWER_IDS, "there, for a model with towers", "none".to_owned()),
            (None, Some(_)) => wrong(TOWER_IDS, "absent, for a model without towers", "an array".to_owned()),
        }
    }

    /// Ids of logistic rows that are new or other, strictly ascending.
    #[must_use]
    pub fn ids(&self) -> &[u64] {
        &self.ids
    }

    /// Weights beside [`Delta::ids`].
    #[must_use]
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Ids of logistic rows that are gone, strictly ascending.
    #[must_use]
    pub fn removed(&self) -> &[u64] {
        &self.removed
    }

    #[must_use]
    pub fn intercept(&self) -> f32 {
        self.intercept
    }

    #[must_use]
    pub fn towers(&self) -> Option<&TowersDelta> {
        self.towers.as_ref()
    }

    /// Rows that it changes or adds, in all tables.
    #[must_use]
    pub fn changed_rows(&self) -> usize {
        self.ids.len() + self.towers.as_ref().map_or(0, |towers| towers.ids.len())
    }

    /// Rows that it removes, in all tables.
    #[must_use]
    pub fn removed_rows(&self) -> usize {
        self.removed.len() + self.towers.as_ref().map_or(0, |towers| towers.removed.len())
    }

    /// The arrays of its payload.
    #[must_use]
    pub fn to_arrays(&self) -> Arrays {
        let mut arrays = Arrays::new();
        arrays.push_u64(IDS, &[self.ids.len()], &self.ids);
        push_weights(&mut arrays, WEIGHTS, &self.weights, self.half);
        arrays.push_u64(REMOVED, &[self.removed.len()], &self.removed);
        arrays.push_f32(INTERCEPT, &[1], &[self.intercept]);
        if let Some(towers) = &self.towers {
            towers.to_arrays(&mut arrays);
        }
        arrays
    }

    /// Reads what [`Delta::to_arrays`] wrote for a model with these towers: these arrays, with these types and shapes, and no
    /// others.
    pub fn from_arrays(arrays: &Arrays, towers: Option<&Pair>) -> Result<Self> {
        let (ids, removed, intercept) = (arrays.u64s(IDS)?, arrays.u64s(REMOVED)?, arrays.f32s(INTERCEPT)?);
        for (name, length) in [(IDS, ids.len()), (WEIGHTS, ids.len()), (REMOVED, removed.len()), (INTERCEPT, 1)] {
            let shape = arrays.shape(name)?;
            if shape != [length] {
                return wrong(name, &format!("of shape [{length}]"), format!("{shape:?}"));
            }
        }
        sound(IDS, &ids, REMOVED, &removed)?;
        let (weights, half) = read_weights(arrays, WEIGHTS)?;
        finite(&ids, &weights, intercept[0])?;
        let towers = towers.map(|pair| TowersDelta::from_arrays(arrays, pair)).transpose()?;
        let ours = |name: &str| {
            [IDS, WEIGHTS, REMOVED, INTERCEPT].contains(&name)
                || towers.as_ref().is_some_and(|towers| towers.has_array(name))
        };
        if let Some(other) = arrays.iter().find(|array| !ours(&array.name)) {
            return wrong(&other.name, "absent from a delta for a model of this kind", "an array".to_owned());
        }
        Ok(Self { ids, weights, half, removed, intercept: intercept[0], towers })
    }
}

impl TowersDelta {
    fn against(&self, from: &Towers) -> Result<Self> {
        let rounded = round_vectors(&self.ids, &self.rows, from.rows().precision())?;
        let stays = |at: usize| find(from.ids(), self.ids[at]).is_some_and(|old| from.rows().same(old, &rounded, at));
        let (mut ids, mut rows) = (Vec::new(), Vectors::new(rounded.dim(), rounded.precision()));
        for at in (0..self.ids.len()).filter(|at| !stays(*at)) {
            ids.push(self.ids[at]);
            rows.extend(&rounded, at..at + 1);
        }
        let removed = self.removed.iter().copied().filter(|id| find(from.ids(), *id).is_some()).collect();
        Ok(Self { pair: self.pair.clone(), ids, rows, removed, params: self.params.clone() })
    }

    fn apply(&self, from: &Towers, default_rows: &[u64]) -> Result<Towers> {
        if self.rows.precision() != from.rows().precision() || self.rows.dim() != from.rows().dim() {
            return wrong(TOWER_ROWS, "like those of the version that it changes", "other vectors".to_owned());
        }
        let pieces = pieces(from.ids(), &self.ids, &self.removed, TOWER_REMOVED)?;
        let ids = join(&pieces, from.ids(), &self.ids);
        let mut rows = Vectors::new(self.rows.dim(), self.rows.precision());
        for piece in &pieces {
            match piece {
                Piece::Old(range) => rows.extend(from.rows(), range.clone()),
                Piece::New(range) => rows.extend(&self.rows, range.clone()),
            }
        }
        Towers::new(from.layout().clone(), ids, rows, self.params.clone(), default_rows)
    }

    fn to_arrays(&self, arrays: &mut Arrays) {
        arrays.push_u64(TOWER_IDS, &[self.ids.len()], &self.ids);
        self.rows.to_arrays(TOWER_ROWS, arrays);
        arrays.push_u64(TOWER_REMOVED, &[self.removed.len()], &self.removed);
        for (name, shape, at) in names(&self.pair) {
            arrays.push_f32(name, &shape, &self.params[at]);
        }
    }

    fn has_array(&self, name: &str) -> bool {
        [TOWER_IDS, TOWER_REMOVED].contains(&name)
            || self.rows.has_array(TOWER_ROWS, name)
            || names(&self.pair).iter().any(|(other, _, _)| other == name)
    }

    fn from_arrays(arrays: &Arrays, pair: &Pair) -> Result<Self> {
        let (ids, removed) = (arrays.u64s(TOWER_IDS)?, arrays.u64s(TOWER_REMOVED)?);
        sound(TOWER_IDS, &ids, TOWER_REMOVED, &removed)?;
        let rows = Vectors::from_arrays(TOWER_ROWS, arrays)?;
        fit(&ids, &rows)?;
        Ok(Self { pair: pair.clone(), ids, rows, removed, params: read_params(arrays, pair)? })
    }
}

/// Refuses lists of ids that are not strictly ascending, or share one.
fn sound(name: &str, changed: &[u64], removed_name: &str, removed: &[u64]) -> Result<()> {
    ascending(name, changed)?;
    ascending(removed_name, removed)?;
    match removed.iter().find(|id| changed.binary_search(id).is_ok()) {
        Some(id) => wrong(removed_name, &format!("rows that are not in `{name}`"), format!("{id:016x}")),
        None => Ok(()),
    }
}

/// Refuses numbers that are not finite, and one weight too few or too many.
fn finite(ids: &[u64], weights: &[f32], intercept: f32) -> Result<()> {
    if weights.len() != ids.len() {
        return wrong(WEIGHTS, &format!("{} long, like `{IDS}`", ids.len()), weights.len().to_string());
    }
    if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
        return wrong(WEIGHTS, "finite", format!("{} at row {:016x}", weights[at], ids[at]));
    }
    if intercept.is_finite() { Ok(()) } else { wrong(INTERCEPT, "finite", intercept.to_string()) }
}

/// The same of vectors.
fn fit(ids: &[u64], rows: &Vectors) -> Result<()> {
    if rows.len() != ids.len() {
        return wrong(TOWER_ROWS, &format!("{} long, like `{TOWER_IDS}`", ids.len()), rows.len().to_string());
    }
    match rows.unfit() {
        Some(at) => wrong(TOWER_ROWS, "finite", format!("a number that is not in row {:016x}", ids[at])),
        None => Ok(()),
    }
}

fn wrong<T>(name: &str, expected: &str, found: String) -> Result<T> {
    Err(Error::Wrong { name: name.to_owned(), expected: expected.to_owned(), found })
}

/// Positions in `to` of ids that are not in `from` or are there with another row, and ids of `from` that are not in `to`. `same`
/// compares a position in `from` with one in `to`.
fn differences(from: &[u64], to: &[u64], same: impl Fn(usize, usize) -> bool) -> (Vec<usize>, Vec<u64>) {
    let (mut changed, mut removed) = (Vec::new(), Vec::new());
    let (mut a, mut b) = (0, 0);
    while a < from.len() && b < to.len() {
        match from[a].cmp(&to[b]) {
            Ordering::Less => {
                removed.push(from[a]);
                a += 1;
            }
            Ordering::Greater => {
                changed.push(b);
                b += 1;
            }
            Ordering::Equal => {
                if !same(a, b) {
                    changed.push(b);
                }
                (a, b) = (a + 1, b + 1);
            }
        }
    }
    removed.extend_from_slice(&from[a..]);
    changed.extend(b..to.len());
    (changed, removed)
}

/// A stretch of rows that stay, or of rows that are new or other.
enum Piece {
    Old(Range<usize>),
    New(Range<usize>),
}

/// The rows after a delta, in their order. `name` is that of `removed`, for the message.
fn pieces(old: &[u64], changed: &[u64], removed: &[u64], name: &str) -> Result<Vec<Piece>> {
    let mut pieces = Vec::with_capacity(2 * changed.len() + removed.len() + 1);
    let (mut at, mut gone) = (0, removed.iter().copied().peekable());
    // Up to `to`, what is old stays, less what is removed.
    let mut stay = |pieces: &mut Vec<Piece>, at: &mut usize, to: usize| -> Result<()> {
        while let Some(id) = gone.next_if(|id| to == old.len() || *id < old[to]) {
            let Ok(place) = old[*at..to].binary_search(&id) else {
                return wrong(name, "rows of the version that it changes", format!("{id:016x}, which is not there"));
            };
            if place > 0 {
                pieces.push(Piece::Old(*at..*at + place));
            }
            *at += place + 1;
        }
        if *at < to {
            pieces.push(Piece::Old(*at..to));
        }
        *at = to;
        Ok(())
    };
    for (new, id) in changed.iter().enumerate() {
        let (to, there) = match old[at..].binary_search(id) {
            Ok(place) => (at + place, true),
            Err(place) => (at + place, false),
        };
        stay(&mut pieces, &mut at, to)?;
        at += usize::from(there);
        match pieces.last_mut() {
            Some(Piece::New(range)) => range.end = new + 1,
            _ => pieces.push(Piece::New(new..new + 1)),
        }
    }
    stay(&mut pieces, &mut at, old.len())?;
    Ok(pieces)
}

fn join<T: Copy>(pieces: &[Piece], old: &[T], new: &[T]) -> Vec<T> {
    let length = pieces.iter().map(|(Piece::Old(range) | Piece::New(range))| range.len()).sum();
    let mut joined = Vec::with_capacity(length);
    for piece in pieces {
        match piece {
            Piece::Old(range) => joined.extend_from_slice(&old[range.clone()]),
            Piece::New(range) => joined.extend_from_slice(&new[range.clone()]),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::tower::Activation;
    use crate::model::two_tower::{Layout, Side};
    use crate::snapshot::Precision;

    const DIM: usize = 3;
    const DEFAULTS: [u64; 2] = [5 << 56, 9 << 56];

    /// What happens to a row from one version to the next.
    #[derive(Clone, Copy, Debug)]
    enum Step {
        Learn(f32),
        Evict,
    }

    type Table = BTreeMap<u64, [f32; DIM]>;

    fn model(logistic: &Table, vectors: &Table, dense: f32, precision: Precision, with_towers: bool) -> Weights {
        let column = |table: &Table| table.keys().copied().collect::<Vec<u64>>();
        let firsts = logistic.values().map(|row| row[0]).collect();
        let mut weights = Weights::new(column(logistic), firsts, dense, DEFAULTS.to_vec()).unwrap();
        if with_towers {
            let layout = Layout {
                sides: vec![Some(Side::User), Some(Side::Item)],
                keys: vec![0, 0],
                dim: DIM,
                layers: vec![2],
                activation: Activation::Relu,
                layer_norm: false,
                normalize: true,
            };
            let params = (0..layout.pair().len).map(|i| dense + i as f32).collect();
            let rows = Vectors::exact(DIM, vectors.values().flatten().copied().collect());
            weights = weights.with_towers(Towers::new(layout, column(vectors), rows, params, &DEFAULTS).unwrap());
        }
        weights.rounded(precision).unwrap()
    }

    fn steps() -> impl Strategy<Value = Vec<(u64, Step)>> {
        let step = prop_oneof![3 => (-2f32..2.0).prop_map(Step::Learn), 1 => Just(Step::Evict)];
        prop::collection::vec((1u64..40, step), 0..25)
    }

    fn go(table: &mut Table, steps: &[(u64, Step)]) {
        for &(id, step) in steps {
            let id = id << 56 | 1;
            match step {
                Step::Learn(by) => table.entry(id).or_default().iter_mut().for_each(|w| *w += by),
                Step::Evict => _ = table.remove(&id),
            }
        }
    }

    proptest! {
        #[test]
        fn a_full_and_its_deltas_are_the_full_of_the_last_version_byte_for_byte(
            versions in prop::collection::vec((steps(), steps(), -1f32..1.0), 1..6),
            precision in prop_oneof![Just(Precision::F32), Just(Precision::F16), Just(Precision::Int8)],
            with_towers: bool,
            noise: u64,
        ) {
            let (mut logistic, mut vectors) = (Table::new(), Table::new());
            DEFAULTS.iter().for_each(|id| _ = vectors.insert(*id, [0.5; DIM]));
            let mut last: Option<(Weights, Weights)> = None;
            for (first, second, dense) in &versions {
                go(&mut logistic, first);
                go(&mut vectors, second);
                let full = model(&logistic, &vectors, *dense, precision, with_towers);
                let Some((before, followed)) = last else {
                    last = Some((full.clone(), full));
                    continue;
                };
                let delta = Delta::between(&before, &full).unwrap();
                let again = Delta::from_arrays(&delta.to_arrays(), before.towers().map(Towers::pair)).unwrap();
                prop_assert_eq!(&again, &delta);
                let followed = again.apply(&followed).unwrap();
                let bytes = |weights: &Weights| weights.to_arrays().encode("test/1").unwrap().to_vec();
                prop_assert_eq!(bytes(&followed), bytes(&full));
                // Whatever was touched besides, and whatever else is said to be gone, the delta is the same.
                let exact = model(&logistic, &vectors, *dense, Precision::F32, with_towers);
                let some = |at: usize| noise & (1 << (at % 64)) != 0;
                let of = |ids: &[u64], changed: &[u64]| -> Vec<usize> {
                    (0..ids.len()).filter(|at| some(*at) || changed.contains(&ids[*at])).collect()
                };
                let touched = of(exact.ids(), delta.ids());
                let more = |removed: &[u64], there: &[u64]| -> Vec<u64> {
                    let more = (1u64..60).map(|id| id << 56 | 1).filter(|id| some(*id as usize >> 3) && !there.contains(id));
                    let all: std::collections::BTreeSet<u64> = removed.iter().copied().chain(more).collect();
                    all.into_iter().collect()
                };
                let towers = exact.towers().zip(delta.towers()).map(|(towers, delta)| {
                    let touched = of(towers.ids(), delta.ids());
                    let mut rows = Vectors::new(DIM, Precision::F32);
                    touched.iter().for_each(|&at| rows.extend(towers.rows(), at..at + 1));
                    let ids = touched.iter().map(|&at| towers.ids()[at]).collect();
                    let removed = more(delta.removed(), towers.ids());
                    TowersDelta::new(towers.pair().clone(), ids, rows, removed, towers.params().to_vec())
                });
                let ids = touched.iter().map(|&at| exact.ids()[at]).collect();
                let weights = touched.iter().map(|&at| exact.weights()[at]).collect();
                let removed = more(delta.removed(), exact.ids());
                let rough = Delta::touched(ids, weights, removed, exact.intercept(), towers).unwrap();
                prop_assert_eq!(&rough.against(&before).unwrap(), &delta);
                // It names what differs, and nothing else.
                let differ = |id: &u64| before.ids().binary_search(id).map(|at| before.weights()[at].to_bits())
                    != full.ids().binary_search(id).map(|at| full.weights()[at].to_bits());
                let expected: Vec<u64> = full.ids().iter().copied().filter(differ).collect();
                prop_assert_eq!(delta.ids(), &expected[..]);
                let gone: Vec<u64> = before.ids().iter().copied().filter(|id| full.ids().binary_search(id).is_err()).collect();
                prop_assert_eq!(delta.removed(), &gone[..]);
                last = Some((full, followed));
            }
        }
    }

    #[test]
    fn a_delta_for_another_version_is_refused() {
        let row = |id: u64| (id << 56, [1.0; DIM]);
        let table = |ids: &[u64]| ids.iter().map(|id| row(*id)).collect::<Table>();
        let of = |ids: &[u64], towers| model(&table(ids), &table(&[5, 9]), 0.0, Precision::F32, towers);
        let delta = Delta::between(&of(&[1, 2, 3], false), &of(&[1, 3, 4], false)).unwrap();
        let text = |error: Result<Weights>| error.unwrap_err().to_string();
        assert!(text(delta.apply(&of(&[1, 3], false))).contains("0200000000000000, which is not there"));
        assert!(text(delta.apply(&of(&[1, 2, 3], true))).contains("embedding.ids"));
        assert!(Delta::between(&of(&[1], false), &of(&[1], true)).is_none());
        let halves = of(&[1, 2, 3], false).rounded(Precision::F16).unwrap();
        assert!(text(delta.apply(&halves)).contains("precision"));
        let mut arrays = delta.to_arrays();
        arrays.push_u8("extra", &[0], &[]);
        assert!(Delta::from_arrays(&arrays, None).unwrap_err().to_string().contains("`extra`"));
    }

    #[test]
    fn a_row_that_is_changed_and_removed_at_once_is_refused() {
        let mut arrays = Arrays::new();
        arrays.push_u64(IDS, &[2], &[3, 7]);
        arrays.push_f32(WEIGHTS, &[2], &[1.0, 1.0]);
        arrays.push_u64(REMOVED, &[1], &[7]);
        arrays.push_f32(INTERCEPT, &[1], &[0.0]);
        let error = Delta::from_arrays(&arrays, None).unwrap_err().to_string();
        assert!(error.contains("`logistic.removed`") && error.contains("0000000000000007"), "{error}");
    }
}
