//! The dense part: two multi-layer perceptrons over pooled inputs, and the scaled product of what they say.
//!
//! Parameters lie packed in one vector: the user tower, the item tower, then the scale if the outputs are normalised. A layer
//! is `z = x W + b` with `W` `[inputs, outputs]`, row major; hidden layers go on with a layer norm, if asked for, and the
//! activation; the last is linear. The product of an example is `sum u_j v_j`, or `scale * sum û_j v̂_j` where normalised.
//!
//! [`Pair`] does all of it on plain slices, for shards of a fixed size, over `gemm` on one thread; [`Dots`] is the same as an
//! operation of Candle with its own backward, and [`DevicePair`](super::device::DevicePair) says it in Candle's operations, for
//! other devices. Candle's own backward is the oracle of both. The backward of one example is linear in its outer gradient, so
//! the unit gradients are taken in the forward already: an example for which they are no good numbers is known before anything
//! has learned from it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::{CpuStorage, CustomOp3, InplaceOp1, Layout, Shape, Tensor, Var};
use serde::{Deserialize, Serialize};

/// Added to the squared length where outputs are normalised, since the item tower starts at 0.
pub(super) const LEAST_SQUARE: f64 = 1e-4;
/// Added to the variance in a layer norm.
pub(super) const LEAST_VARIANCE: f64 = 1e-5;
/// Largest |product| and largest sum of |unit gradients| of an example; what lies beyond is quarantined.
const LARGEST: f32 = 1e6;
/// Layers of a tower at most: with weights and inputs in their bounds, no activation overflows.
pub const MOST_LAYERS: usize = 4;
/// Outputs of a layer at most.
pub const WIDEST: usize = 1024;

/// What stands between layers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    #[default]
    Relu,
    Tanh,
}

/// f32 in use, f64 where gradients are checked against differences.
pub trait Real:
    Copy
    + Default
    + PartialOrd
    + Send
    + Sync
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + 'static
{
    const ONE: Self;
    fn of(value: f64) -> Self;
    fn root(self) -> Self;
    fn tanh(self) -> Self;
    fn size(self) -> Self;
}

impl Real for f32 {
    const ONE: Self = 1.0;
    fn of(value: f64) -> Self {
        value as Self
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn tanh(self) -> Self {
        libm::tanhf(self)
    }
    fn size(self) -> Self {
        self.abs()
    }
}

impl Real for f64 {
    const ONE: Self = 1.0;
    fn of(value: f64) -> Self {
        value
    }
    fn root(self) -> Self {
        self.sqrt()
    }
    fn tanh(self) -> Self {
        libm::tanh(self)
    }
    fn size(self) -> Self {
        self.abs()
    }
}

/// A matrix in a slice: how far apart rows and columns lie.
#[derive(Clone, Copy)]
struct View<'a, T> {
    data: &'a [T],
    rows: usize,
    cols: usize,
    by_row: usize,
    by_col: usize,
}

fn rows_of<T>(data: &[T], rows: usize, cols: usize) -> View<'_, T> {
    View { data, rows, cols, by_row: cols, by_col: 1 }
}

impl<T> View<'_, T> {
    fn turned(self) -> Self {
        Self { rows: self.cols, cols: self.rows, by_row: self.by_col, by_col: self.by_row, ..self }
    }
}

/// `out (+)= a b`, `out` row major, on this thread.
fn multiply<T: Real>(a: View<'_, T>, b: View<'_, T>, out: &mut [T], add: bool) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    assert!(b.rows == k && out.len() == m * n && a.data.len() == m * k && b.data.len() == k * n);
    // SAFETY: each view covers exactly its slice (rows * cols elements under one of two dense strides, asserted above), and
    // `out` is borrowed alone. Reason: `gemm` has no safe interface, and a plain loop takes five times as long.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a.by_col as isize,
            a.by_row as isize,
            b.data.as_ptr(),
            b.by_col as isize,
            b.by_row as isize,
            T::ONE,
            T::ONE,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// `out += a b` of row-major matrices, each sum in the order of the inner dimension, without fused operations.
fn multiply_plainly<T: Real>(a: View<'_, T>, b: View<'_, T>, out: &mut [T]) {
    const TILE: usize = 16;
    let n = b.cols;
    for (x, out) in a.data.chunks_exact(a.cols).zip(out.chunks_exact_mut(n)) {
        let mut tiles = out.chunks_exact_mut(TILE);
        for (t, tile) in tiles.by_ref().enumerate() {
            let mut sums = [T::default(); TILE];
            sums.copy_from_slice(tile);
            for (&x, row) in x.iter().zip(b.data.chunks_exact(n)) {
                let row = &row[t * TILE..][..TILE];
                sums.iter_mut().zip(row).for_each(|(sum, &w)| *sum += x * w);
            }
            tile.copy_from_slice(&sums);
        }
        let rest = tiles.into_remainder();
        let start = n - rest.len();
        for (&x, row) in x.iter().zip(b.data.chunks_exact(n)) {
            rest.iter_mut().zip(&row[start..]).for_each(|(sum, &w)| *sum += x * w);
        }
    }
}

/// Where the parameters of a layer lie in the packed vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layer {
    pub inputs: usize,
    pub outputs: usize,
    /// First of `inputs * outputs` weights; the biases follow.
    pub weight: usize,
    /// First of the layer norm's gains, which its shifts follow.
    pub norm: Option<usize>,
}

impl Layer {
    #[must_use]
    pub fn bias(&self) -> usize {
        self.weight + self.inputs * self.outputs
    }
}

/// The layers of one tower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tower {
    pub layers: Vec<Layer>,
    pub(super) activation: Activation,
}

impl Tower {
    /// A tower over `inputs` columns, whose parameters start at `at`. Returns it with where they end.
    fn new(inputs: usize, outputs: &[usize], activation: Activation, layer_norm: bool, mut at: usize) -> (Self, usize) {
        let mut layers = Vec::with_capacity(outputs.len());
        let mut inputs = inputs;
        for (i, &outputs) in outputs.iter().enumerate() {
            let weight = at;
            at += inputs * outputs + outputs;
            let norm = (layer_norm && i + 1 < layers.capacity()).then_some(at);
            at += if norm.is_some() { 2 * outputs } else { 0 };
            layers.push(Layer { inputs, outputs, weight, norm });
            inputs = outputs;
        }
        (Self { layers, activation }, at)
    }

    /// Width of the pooled input.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.layers[0].inputs
    }

    /// Width of what it says.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.layers[self.layers.len() - 1].outputs
    }

    /// What the tower says of `rows` inputs `[rows, inputs]`; it lies in `work` as `[rows, outputs]`. For scoring: no
    /// graph, no allocation once `work` has grown, and the same bits for a row on every machine, whatever other rows there are.
    pub fn says<'w, T: Real>(&self, params: &[T], x: &[T], rows: usize, work: &'w mut Work<T>) -> &'w [T] {
        self.run(params, x, rows, work, multiply_plainly)
    }

    /// The same by `gemm`, for training.
    fn forward<'w, T: Real>(&self, params: &[T], x: &[T], rows: usize, work: &'w mut Work<T>) -> &'w [T] {
        self.run(params, x, rows, work, |a, b, out| multiply(a, b, out, true))
    }

    fn run<'w, T: Real>(
        &self,
        params: &[T],
        x: &[T],
        rows: usize,
        work: &'w mut Work<T>,
        add_product: impl Fn(View<'_, T>, View<'_, T>, &mut [T]),
    ) -> &'w [T] {
        let last = self.layers.len() - 1;
        work.fit(self);
        for (i, layer) in self.layers.iter().enumerate() {
            let (n, bias) = (layer.outputs, layer.bias());
            let (before, after) = work.layers.split_at_mut(i);
            let input = before.last().map_or(x, |before| before.out.as_slice());
            let Kept { out, plain, spread, .. } = &mut after[0];
            out.clear();
            for _ in 0..rows {
                out.extend_from_slice(&params[bias..bias + n]);
            }
            let weights = rows_of(&params[layer.weight..bias], layer.inputs, n);
            add_product(rows_of(input, rows, layer.inputs), weights, out);
            if let Some(norm) = layer.norm {
                let (gain, shift) = params[norm..norm + 2 * n].split_at(n);
                plain.clear();
                spread.clear();
                let share = T::ONE / T::of(n as f64);
                for row in out.chunks_exact_mut(n) {
                    let mean = row.iter().fold(T::default(), |sum, &z| sum + z) * share;
                    let square = row.iter().fold(T::default(), |sum, &z| sum + (z - mean) * (z - mean)) * share;
                    let inverse = T::ONE / (square + T::of(LEAST_VARIANCE)).root();
                    spread.push(inverse);
                    for ((z, &gain), &shift) in row.iter_mut().zip(gain).zip(shift) {
                        let centred = (*z - mean) * inverse;
                        plain.push(centred);
                        *z = centred * gain + shift;
                    }
                }
            }
            if i < last {
                match self.activation {
                    Activation::Relu => {
                        out.iter_mut().for_each(|z| *z = if *z > T::default() { *z } else { T::default() });
                    }
                    Activation::Tanh => out.iter_mut().for_each(|z| *z = z.tanh()),
                }
            }
        }
        &work.layers[last].out
    }

    /// From the gradients of what the tower said, left in `work` by the caller, to those of all it computed on the way, and
    /// of its inputs, which come to lie in `work.input`.
    fn backward<T: Real>(&self, params: &[T], rows: usize, work: &mut Work<T>) {
        let last = self.layers.len() - 1;
        for (i, layer) in self.layers.iter().enumerate().rev() {
            let n = layer.outputs;
            let (before, after) = work.layers.split_at_mut(i);
            let Kept { out, plain, spread, delta, scaled } = &mut after[0];
            if i < last {
                match self.activation {
                    Activation::Relu => {
                        for (d, &h) in delta.iter_mut().zip(&*out) {
                            *d = if h > T::default() { *d } else { T::default() };
                        }
                    }
                    Activation::Tanh => delta.iter_mut().zip(&*out).for_each(|(d, &h)| *d *= T::ONE - h * h),
                }
            }
            if let Some(norm) = layer.norm {
                let gain = &params[norm..norm + n];
                let share = T::ONE / T::of(n as f64);
                scaled.clear();
                scaled.extend_from_slice(delta); // of the norm's output, which gain and shift need
                for ((row, plain), &inverse) in delta.chunks_exact_mut(n).zip(plain.chunks_exact(n)).zip(&*spread) {
                    let (mut mean, mut along) = (T::default(), T::default());
                    for ((d, &gain), &plain) in row.iter_mut().zip(gain).zip(plain) {
                        *d *= gain;
                        mean += *d;
                        along += *d * plain;
                    }
                    let (mean, along) = (mean * share, along * share);
                    row.iter_mut().zip(plain).for_each(|(d, &plain)| *d = (*d - mean - plain * along) * inverse);
                }
            }
            let weights = rows_of(&params[layer.weight..layer.bias()], layer.inputs, n);
            let into = before.last_mut().map_or(&mut work.input, |before| &mut before.delta);
            into.resize(rows * layer.inputs, T::default());
            multiply(rows_of(delta, rows, n), weights.turned(), into, false);
        }
    }

    /// Adds the gradient of the parameters, `sum over examples of g * d product / d parameter`, to `gradient`. What an
    /// example with a `g` of 0 left behind is not looked at.
    fn collect<T: Real>(&self, x: &[T], g: &[T], work: &mut Work<T>, gradient: &mut [T]) {
        let rows = g.len();
        for (i, layer) in self.layers.iter().enumerate() {
            let (n, bias) = (layer.outputs, layer.bias());
            let (before, after) = work.layers.split_at_mut(i);
            let input = before.last().map_or(x, |before| before.out.as_slice());
            let Kept { plain, delta, scaled, .. } = &mut after[0];
            if let Some(norm) = layer.norm {
                let (gain, shift) = gradient[norm..norm + 2 * n].split_at_mut(n);
                for ((row, plain), &g) in scaled.chunks_exact(n).zip(plain.chunks_exact(n)).zip(g) {
                    if g == T::default() {
                        continue;
                    }
                    for (((&d, &plain), gain), shift) in row.iter().zip(plain).zip(&mut *gain).zip(&mut *shift) {
                        *gain += g * d * plain;
                        *shift += g * d;
                    }
                }
            }
            // From here on the scaled gradients of z.
            scaled.clear();
            for (row, &g) in delta.chunks_exact(n).zip(g) {
                if g == T::default() {
                    scaled.resize(scaled.len() + n, T::default());
                } else {
                    scaled.extend(row.iter().map(|&d| g * d));
                }
            }
            for row in scaled.chunks_exact(n) {
                gradient[bias..bias + n].iter_mut().zip(row).for_each(|(sum, &d)| *sum += d);
            }
            let weights = &mut gradient[layer.weight..bias];
            multiply(rows_of(input, rows, layer.inputs).turned(), rows_of(scaled, rows, n), weights, true);
        }
    }
}

/// What one layer leaves for its backward.
#[derive(Clone, Debug, Default)]
struct Kept<T> {
    /// Behind the activation.
    out: Vec<T>,
    /// Centred and scaled to variance 1, before gain and shift; and the inverse of the deviation, a row each.
    plain: Vec<T>,
    spread: Vec<T>,
    /// d product / d z.
    delta: Vec<T>,
    scaled: Vec<T>,
}

/// Room for one shard in one tower, used again and again.
#[derive(Clone, Debug, Default)]
pub struct Work<T> {
    layers: Vec<Kept<T>>,
    /// d product / d input, `[rows, inputs]`.
    input: Vec<T>,
}

impl<T: Real> Work<T> {
    fn fit(&mut self, tower: &Tower) {
        self.layers.resize_with(tower.layers.len(), Kept::default);
    }
}

/// Both towers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub user: Tower,
    pub item: Tower,
    /// Where the scale lies, if outputs are normalised.
    pub scale: Option<usize>,
    /// Number of parameters.
    pub len: usize,
}

/// Room for one shard in both towers.
#[derive(Clone, Debug, Default)]
pub struct PairWork<T> {
    user: Work<T>,
    item: Work<T>,
    /// Of each example, where outputs are normalised: the product without the scale.
    cosines: Vec<T>,
    /// Of each example: product and unit gradients are good numbers.
    fit: Vec<bool>,
}

impl Pair {
    /// Towers over `inputs` (user, item) columns with layers of `outputs`.
    #[must_use]
    pub fn new(
        inputs: [usize; 2],
        outputs: &[usize],
        activation: Activation,
        layer_norm: bool,
        normalize: bool,
    ) -> Self {
        let (user, at) = Tower::new(inputs[0], outputs, activation, layer_norm, 0);
        let (item, at) = Tower::new(inputs[1], outputs, activation, layer_norm, at);
        Self { user, item, scale: normalize.then_some(at), len: at + usize::from(normalize) }
    }

    /// The product of each of `rows` examples, added to `products`; in `work` their gradients are left for [`Pair::gradient`].
    fn forward<T: Real>(&self, params: &[T], x: [&[T]; 2], rows: usize, work: &mut PairWork<T>, products: &mut Vec<T>) {
        let PairWork { user, item, cosines, .. } = work;
        self.user.forward(params, x[0], rows, user);
        self.item.forward(params, x[1], rows, item);
        let n = self.user.outputs();
        let (user_last, item_last) = (user.layers.last_mut(), item.layers.last_mut());
        let (Some(u), Some(v)) = (user_last, item_last) else { return };
        u.delta.clear();
        v.delta.clear();
        cosines.clear();
        for (u_row, v_row) in u.out.chunks_exact(n).zip(v.out.chunks_exact(n)) {
            let mut product = inner(u_row, v_row);
            if let Some(scale) = self.scale {
                let scale = params[scale];
                let (a, b) = (T::ONE / length(u_row), T::ONE / length(v_row));
                let cosine = product * a * b;
                cosines.push(cosine);
                product = scale * cosine;
                let pairs = || u_row.iter().zip(v_row);
                u.delta.extend(pairs().map(|(&u, &v)| scale * (v * b - u * a * cosine) * a));
                v.delta.extend(pairs().map(|(&u, &v)| scale * (u * a - v * b * cosine) * b));
            } else {
                u.delta.extend_from_slice(v_row);
                v.delta.extend_from_slice(u_row);
            }
            products.push(product);
        }
        self.user.backward(params, rows, user);
        self.item.backward(params, rows, item);
    }

    /// Marks the examples whose product and unit gradients (of both inputs) are finite and bounded.
    pub fn judge(&self, products: &[f32], unit: [&[f32]; 2], fit: &mut Vec<bool>) {
        let inputs = unit[0].chunks_exact(self.user.inputs()).zip(unit[1].chunks_exact(self.item.inputs()));
        fit.clear();
        fit.extend(products.iter().zip(inputs).map(|(product, (u, v))| {
            // False for NaN.
            product.abs() <= LARGEST && total(u) + total(v) <= LARGEST
        }));
    }

    /// The gradient of the parameters, added to `gradient`, of `sum g * product`.
    fn gradient<T: Real>(&self, x: [&[T]; 2], g: &[T], work: &mut PairWork<T>, gradient: &mut [T]) {
        self.user.collect(x[0], g, &mut work.user, gradient);
        self.item.collect(x[1], g, &mut work.item, gradient);
        if let Some(scale) = self.scale {
            let sum = |sum: T, (&g, &cosine): (&T, &T)| if g == T::default() { sum } else { sum + g * cosine };
            gradient[scale] += g.iter().zip(&work.cosines).fold(T::default(), sum);
        }
    }

    /// What a user and an item vector, as the towers said them, come to.
    #[must_use]
    pub fn product(&self, params: &[f32], u: &[f32], v: &[f32]) -> f32 {
        let product = inner(u, v);
        match self.scale {
            Some(scale) => params[scale] * (product * (1.0 / length(u)) * (1.0 / length(v))),
            None => product,
        }
    }
}

fn inner<T: Real>(a: &[T], b: &[T]) -> T {
    a.iter().zip(b).fold(T::default(), |sum, (&a, &b)| sum + a * b)
}

/// The sum of sizes, in lanes: a chain of additions would take as long as a layer.
fn total(values: &[f32]) -> f32 {
    let mut lanes = [0.0; 16];
    let chunks = values.chunks_exact(lanes.len());
    let rest: f32 = chunks.remainder().iter().map(|value| value.abs()).sum();
    chunks.for_each(|chunk| lanes.iter_mut().zip(chunk).for_each(|(lane, value)| *lane += value.abs()));
    lanes.iter().sum::<f32>() + rest
}

fn length<T: Real>(a: &[T]) -> T {
    (inner(a, a) + T::of(LEAST_SQUARE)).root()
}

/// [`Pair`] as one operation of Candle on the CPU: (user input, item input, packed parameters) to products.
///
/// Between forward and backward its room holds what the backward needs, so each shard has its own, and one forward is in
/// flight on it.
#[derive(Clone)]
pub struct Dots {
    pair: Arc<Pair>,
    work: Arc<Mutex<PairWork<f32>>>,
}

impl Dots {
    #[must_use]
    pub fn new(pair: Arc<Pair>) -> Self {
        Self { pair, work: Arc::default() }
    }

    fn work(&self) -> MutexGuard<'_, PairWork<f32>> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of each example of the last forward: its product and unit gradients are good numbers.
    pub fn fit(&self, into: &mut Vec<bool>) {
        into.clear();
        into.extend_from_slice(&self.work().fit);
    }

    /// The backward of the last forward, which was of inputs `x`: without a graph, for this operation is all of it, and
    /// without copies. `g` are the gradients of the products; what falls to the inputs takes the place of what was in
    /// `inputs`, what falls to the parameters is added to `params`.
    pub fn pull(&self, x: [&[f32]; 2], g: &[f32], inputs: &mut [Vec<f32>; 2], params: &mut [f32]) {
        let mut work = self.work();
        self.pair.gradient(x, g, &mut work, params);
        let PairWork { user, item, .. } = &mut *work;
        for ((work, width), into) in
            [(user, self.pair.user.inputs()), (item, self.pair.item.inputs())].into_iter().zip(inputs)
        {
            weigh(&mut work.input, width, g);
            std::mem::swap(&mut work.input, into);
        }
    }
}

/// Multiplies each row, of `width`, by its `g`.
pub(super) fn weigh(rows: &mut [f32], width: usize, g: &[f32]) {
    for (row, &g) in rows.chunks_exact_mut(width).zip(g) {
        if g == 0.0 {
            row.fill(0.0); // what an example without a gradient left may be no number
        } else {
            row.iter_mut().for_each(|d| *d *= g);
        }
    }
}

/// The elements of a contiguous f32 tensor on the CPU.
fn elements<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(all), Some((start, end))) => Ok(&all[start..end]),
        _ => candle_core::bail!("the towers take contiguous f32 tensors"),
    }
}

/// Lends the elements of a contiguous f32 tensor on the CPU.
pub fn with_elements<R>(tensor: &Tensor, of: impl FnOnce(&[f32]) -> R) -> candle_core::Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        candle_core::Storage::Cpu(cpu) => Ok(of(elements(cpu, layout)?)),
        _ => candle_core::bail!("the tensor does not lie on the CPU"),
    }
}

impl CustomOp3 for Dots {
    fn name(&self) -> &'static str {
        "two towers"
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let rows = l1.shape().dims2()?.0;
        let mut products = Vec::with_capacity(rows);
        let mut work = self.work();
        let x = [elements(s1, l1)?, elements(s2, l2)?];
        self.pair.forward(elements(s3, l3)?, x, rows, &mut work, &mut products);
        let PairWork { user, item, fit, .. } = &mut *work;
        self.pair.judge(&products, [&user.input, &item.input], fit);
        Ok((CpuStorage::F32(products), Shape::from(rows)))
    }

    fn bwd(
        &self,
        user: &Tensor,
        item: &Tensor,
        params: &Tensor,
        _: &Tensor,
        g: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (mut inputs, mut gradient) = ([Vec::new(), Vec::new()], vec![0.0; self.pair.len]);
        let pull = |g: &[f32]| {
            with_elements(user, |u| with_elements(item, |v| self.pull([u, v], g, &mut inputs, &mut gradient)))
        };
        with_elements(g, pull)???;
        let [u, v] = inputs;
        let u = Tensor::from_vec(u, user.shape(), user.device())?;
        let v = Tensor::from_vec(v, item.shape(), item.device())?;
        let gradient = Tensor::from_vec(gradient, params.shape(), params.device())?;
        Ok((Some(u), Some(v), Some(gradient)))
    }
}

/// Writes into a variable's own memory, on the CPU.
struct Write<'a>(&'a [f32]);

impl InplaceOp1 for Write<'_> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        match (storage, layout.contiguous_offsets()) {
            (CpuStorage::F32(all), Some((start, end))) if end - start == self.0.len() => {
                all[start..end].copy_from_slice(self.0);
                Ok(())
            }
            _ => candle_core::bail!("the variable does not hold {} f32 in a row", self.0.len()),
        }
    }
}

/// Gives a variable on the CPU new values, in place.
pub fn assign(var: &Var, values: &[f32]) -> candle_core::Result<()> {
    var.as_tensor().inplace_op1(&Write(values))
}

#[cfg(test)]
pub(super) mod tests {
    use candle_core::Device;
    use rand_pcg::Pcg64Mcg;
    use rand_pcg::rand_core::{Rng, SeedableRng};

    use super::*;

    fn pairs() -> Vec<Pair> {
        let mut all = Vec::new();
        for activation in [Activation::Relu, Activation::Tanh] {
            for (layer_norm, normalize) in [(false, false), (true, false), (false, true), (true, true)] {
                all.push(Pair::new([5, 3], &[7, 6, 4], activation, layer_norm, normalize));
            }
        }
        all.push(Pair::new([4, 2], &[3], Activation::Relu, true, false));
        all
    }

    fn draw(random: &mut Pcg64Mcg, count: usize) -> Vec<f64> {
        (0..count).map(|_| (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0).collect()
    }

    /// The products in Candle's own operations, which know their gradients.
    pub fn composed(pair: &Pair, user: &Tensor, item: &Tensor, params: &Tensor) -> candle_core::Result<Tensor> {
        let tower = |tower: &Tower, x: &Tensor| -> candle_core::Result<Tensor> {
            let mut x = x.clone();
            for (i, layer) in tower.layers.iter().enumerate() {
                let n = layer.outputs;
                let weight = params.narrow(0, layer.weight, layer.inputs * n)?.reshape((layer.inputs, n))?;
                x = x.matmul(&weight)?.broadcast_add(&params.narrow(0, layer.bias(), n)?)?;
                if let Some(norm) = layer.norm {
                    let (gain, shift) = (params.narrow(0, norm, n)?, params.narrow(0, norm + n, n)?);
                    x = candle_nn::ops::layer_norm_slow(&x, &gain, &shift, LEAST_VARIANCE as f32)?;
                }
                if i + 1 < tower.layers.len() {
                    x = match tower.activation {
                        Activation::Relu => x.relu()?,
                        Activation::Tanh => x.tanh()?,
                    };
                }
            }
            Ok(x) // [shard, outputs]
        };
        let (u, v) = (tower(&pair.user, user)?, tower(&pair.item, item)?);
        let product = (&u * &v)?.sum(1)?;
        let Some(scale) = pair.scale else { return Ok(product) };
        let length = |x: &Tensor| x.sqr()?.sum(1)?.affine(1.0, LEAST_SQUARE)?.sqrt();
        product.div(&length(&u)?)?.div(&length(&v)?)?.broadcast_mul(&params.narrow(0, scale, 1)?)
    }

    pub struct Case {
        pub pair: Pair,
        pub params: Vec<f64>,
        pub x: [Vec<f64>; 2],
        pub g: Vec<f64>,
    }

    pub fn cases(rows: usize) -> Vec<Case> {
        let seed = 20_261_125;
        println!("seed {seed}");
        let mut random = Pcg64Mcg::seed_from_u64(seed);
        let case = |pair: Pair| {
            let params = draw(&mut random, pair.len);
            let x = [draw(&mut random, rows * pair.user.inputs()), draw(&mut random, rows * pair.item.inputs())];
            let mut g = draw(&mut random, rows);
            g[rows / 2] = 0.0;
            Case { pair, params, x, g }
        };
        pairs().into_iter().map(case).collect()
    }

    fn loss(case: &Case, params: &[f64], x: [&[f64]; 2]) -> f64 {
        let mut products = Vec::new();
        case.pair.forward(params, x, case.g.len(), &mut PairWork::default(), &mut products);
        inner(&products, &case.g)
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for case in cases(6) {
            let (rows, x) = (case.g.len(), [case.x[0].as_slice(), case.x[1].as_slice()]);
            let mut work = PairWork::default();
            case.pair.forward(&case.params, x, rows, &mut work, &mut Vec::new());
            let mut gradient = vec![0.0; case.pair.len];
            case.pair.gradient(x, &case.g, &mut work, &mut gradient);
            let h = 1e-6;
            for (i, &gradient) in gradient.iter().enumerate() {
                let at = |by: f64| {
                    let mut params = case.params.clone();
                    params[i] += by;
                    loss(&case, &params, x)
                };
                let numeric = (at(h) - at(-h)) / (2.0 * h);
                assert!((gradient - numeric).abs() < 1e-6, "{:?}, parameter {i}: {gradient}, {numeric}", case.pair);
            }
            for side in 0..2 {
                let (unit, width) = match side {
                    0 => (&work.user.input, case.pair.user.inputs()),
                    _ => (&work.item.input, case.pair.item.inputs()),
                };
                for (i, &unit) in unit.iter().enumerate() {
                    let at = |by: f64| {
                        let mut moved = case.x.clone();
                        moved[side][i] += by;
                        loss(&case, &case.params, [&moved[0], &moved[1]])
                    };
                    let numeric = (at(h) - at(-h)) / (2.0 * h);
                    let ours = unit * case.g[i / width];
                    assert!((ours - numeric).abs() < 1e-6, "{:?}, input {side} {i}: {ours}, {numeric}", case.pair);
                }
            }
        }
    }

    #[test]
    fn scoring_equals_the_forward_of_training_and_each_row_stands_alone() {
        for case in cases(37) {
            for (tower, x) in [(&case.pair.user, &case.x[0]), (&case.pair.item, &case.x[1])] {
                let (mut work, mut alone, mut trained) = (Work::default(), Work::default(), Work::default());
                let all = tower.says(&case.params, x, 37, &mut work);
                for (row, x) in x.chunks_exact(tower.inputs()).enumerate() {
                    let one = tower.says(&case.params, x, 1, &mut alone);
                    assert_eq!(one, &all[row * tower.outputs()..][..tower.outputs()]);
                }
                let trained = tower.forward(&case.params, x, 37, &mut trained);
                assert!(all.iter().zip(trained).all(|(a, b)| (a - b).abs() < 1e-12));
            }
        }
        // Wider than a tile, with a rest.
        let (tower, len) = Tower::new(40, &[37, 20], Activation::Relu, true, 0);
        let mut random = Pcg64Mcg::seed_from_u64(5);
        let (params, x) = (draw(&mut random, len), draw(&mut random, 40 * 9));
        let (mut work, mut trained) = (Work::default(), Work::default());
        let (says, forward) = (tower.says(&params, &x, 9, &mut work), tower.forward(&params, &x, 9, &mut trained));
        assert!(says.len() == 180 && says.iter().zip(forward).all(|(a, b)| (a - b).abs() < 1e-12));
    }

    #[test]
    fn the_fused_operation_equals_candle_s_own_operations() {
        for case in cases(37) {
            let to_f32 = |values: &[f64]| values.iter().map(|&v| v as f32).collect::<Vec<f32>>();
            let rows = case.g.len();
            let var = |values: &[f64], shape: &[usize]| {
                Var::from_tensor(&Tensor::from_vec(to_f32(values), shape, &Device::Cpu).unwrap()).unwrap()
            };
            let user = var(&case.x[0], &[rows, case.pair.user.inputs()]);
            let item = var(&case.x[1], &[rows, case.pair.item.inputs()]);
            let params = var(&case.params, &[case.pair.len]);
            let g = Tensor::from_vec(to_f32(&case.g), rows, &Device::Cpu).unwrap();
            let fused = user.apply_op3(&item, &params, Dots::new(Arc::new(case.pair.clone()))).unwrap();
            let composed = composed(&case.pair, &user, &item, &params).unwrap();
            let close = |a: &Tensor, b: &Tensor, what: &str| {
                let (a, b) = (a.flatten_all().unwrap(), b.flatten_all().unwrap());
                for (i, (a, b)) in a.to_vec1::<f32>().unwrap().iter().zip(b.to_vec1::<f32>().unwrap()).enumerate() {
                    assert!((a - b).abs() <= 2e-5 * b.abs().max(1.0), "{:?}: {what} {i}: {a}, {b}", case.pair);
                }
            };
            close(&fused, &composed, "product");
            let backward = |products: &Tensor| (products * &g).unwrap().sum_all().unwrap().backward().unwrap();
            let (fused, composed) = (backward(&fused), backward(&composed));
            for (var, what) in [(&user, "user input"), (&item, "item input"), (&params, "parameter")] {
                close(fused.get(var).unwrap(), composed.get(var).unwrap(), what);
            }
        }
    }

    #[test]
    fn an_example_that_overflows_is_found_and_leaves_the_others_alone() {
        let pair = Arc::new(Pair::new([2, 2], &[3, 2], Activation::Relu, false, false));
        let mut random = Pcg64Mcg::seed_from_u64(3);
        let params: Vec<f32> = draw(&mut random, pair.len).iter().map(|&p| p as f32).collect();
        let run = |x: [Vec<f32>; 2], g: Vec<f32>| {
            let rows = g.len();
            let var = |x: Vec<f32>| Var::from_tensor(&Tensor::from_vec(x, (rows, 2), &Device::Cpu).unwrap()).unwrap();
            let [user, item] = x.map(var);
            let params = Var::from_tensor(&Tensor::new(params.as_slice(), &Device::Cpu).unwrap()).unwrap();
            let op = Dots::new(Arc::clone(&pair));
            let products = user.apply_op3(&item, &params, op.clone()).unwrap();
            let mut fit = Vec::new();
            op.fit(&mut fit);
            let g = Tensor::from_vec(g, rows, &Device::Cpu).unwrap();
            // NaN times 0 is NaN in the sum, but the gradient that reaches the operation is g.
            let grads = (products * g).unwrap().sum_all().unwrap().backward().unwrap();
            (fit, grads.get(&params).unwrap().to_vec1::<f32>().unwrap())
        };
        let (fit, with) =
            run([vec![0.5, 1.0, 1e5, 1e5, 1.0, 2.0], vec![1.0, 1.0, 1e5, 1e5, 0.5, 0.25]], vec![1.0, 0.0, 2.0]);
        assert_eq!(fit, [true, false, true]);
        let (_, without) = run([vec![0.5, 1.0, 1.0, 2.0], vec![1.0, 1.0, 0.5, 0.25]], vec![1.0, 2.0]);
        assert!(with.iter().zip(&without).all(|(a, b)| (a - b).abs() < 1e-6), "{with:?} {without:?}");
    }
}
