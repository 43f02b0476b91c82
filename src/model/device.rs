//! The towers on a device of Candle's: what [`Pair`] does on slices, in Candle's operations, a whole batch at once.
//!
//! A device is paid by the launch, not by the example: where all operations of a step are small, their number is its time. So
//! the gradients are written out as in [`tower`](super::tower), not left to Candle's own backward, which would have to walk
//! the graph twice a batch (before and after the logistic part), begins each sum with zeros and pads the gradient of each
//! slice of the parameters to their whole length; and whose `relu` has slope 1 at 0, where ours and PyTorch's have 0.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use candle_nn::{Linear, Module};

use super::tower::{Activation, LEAST_SQUARE, LEAST_VARIANCE, Layer, Pair, Tower, weigh};

/// Both towers on a device, with room for a batch.
///
/// What is computed there stays from [`forward`](Self::forward) to [`gradient`](Self::gradient); a device's stream belongs to
/// the thread that fills it, so one thread calls both.
pub struct DevicePair {
    pair: Arc<Pair>,
    device: Device,
    /// What the towers see, `[examples, width]`; for the caller to fill.
    pub inputs: [Vec<f32>; 2],
    /// Of each example: the product; and that this and its unit gradients are good numbers.
    pub products: Vec<f32>,
    pub fit: Vec<bool>,
    /// d product / d input, `[examples, width]`; weighed by the gradients of the products once these are known.
    pulled: [Vec<f32>; 2],
    kept: Option<Batch>,
}

/// What the gradient of the parameters needs of a batch.
struct Batch {
    /// The user tower's, then the item tower's, each from its first layer on.
    layers: Vec<Pulled>,
    /// `[examples, 1]`, where outputs are normalised: the product without the scale.
    cosines: Option<Tensor>,
}

/// What the forward leaves of a layer.
struct Seen {
    /// `[examples, inputs]`.
    input: Tensor,
    /// Behind the activation, `[examples, outputs]`.
    out: Tensor,
    norm: Option<Norm>,
}

/// What a layer norm leaves: centred and scaled to variance 1, `[examples, outputs]`; the inverse of the deviation, `[examples, 1]`.
struct Norm {
    plain: Tensor,
    spread: Tensor,
}

/// What the backward leaves of a layer.
struct Pulled {
    input: Tensor,
    /// d product / d (`input @ weights`), `[examples, outputs]`.
    delta: Tensor,
    /// Of a layer norm: `plain`, and d product / d what comes out of it, `[examples, outputs]`.
    norm: Option<(Tensor, Tensor)>,
}

impl DevicePair {
    #[must_use]
    pub fn new(pair: Arc<Pair>, device: Device) -> Self {
        let (inputs, pulled) = Default::default();
        Self { pair, device, inputs, products: Vec::new(), fit: Vec::new(), pulled, kept: None }
    }

    /// From `inputs` to `products` and `fit`, under the packed `params`.
    pub fn forward(&mut self, params: &[f32]) -> Result<()> {
        let params = Tensor::from_slice(params, params.len(), &self.device)?;
        self.run(&params)?;
        self.pair.judge(&self.products, [&self.pulled[0], &self.pulled[1]], &mut self.fit);
        if self.fit.iter().all(|fit| *fit) {
            return Ok(());
        }
        // A sum over the examples is no number if what one of them adds is none, whatever its weight. So, again without them.
        for (tower, input) in [&self.pair.user, &self.pair.item].into_iter().zip(&mut self.inputs) {
            let rows = input.chunks_exact_mut(tower.inputs()).zip(&self.fit);
            rows.filter(|(_, fit)| !**fit).for_each(|(row, _)| row.fill(0.0));
        }
        self.run(&params)
    }

    fn run(&mut self, params: &Tensor) -> Result<()> {
        let Pair { ref user, ref item, scale, .. } = *self.pair;
        let (u, user_seen) = forward(user, params, &self.inputs[0])?;
        let (v, item_seen) = forward(item, params, &self.inputs[1])?;
        let product = (&u * &v)?.sum_keepdim(1)?;
        let (products, cosines, du, dv) = if let Some(scale) = scale {
            let scale = params.narrow(0, scale, 1)?;
            let inverse = |x: &Tensor| x.sqr()?.sum_keepdim(1)?.affine(1.0, LEAST_SQUARE)?.sqrt()?.recip();
            let (a, b) = (inverse(&u)?, inverse(&v)?);
            let cosine = ((product * &a)? * &b)?;
            // What moves the product: the other's direction, less what lies along the own.
            let moves = |x: &Tensor, a: &Tensor, other: &Tensor, b: &Tensor| {
                let across = (other.broadcast_mul(b)? - x.broadcast_mul(&(a * &cosine)?)?)?;
                across.broadcast_mul(&a.broadcast_mul(&scale)?)
            };
            let (du, dv) = (moves(&u, &a, &v, &b)?, moves(&v, &b, &u, &a)?);
            (cosine.broadcast_mul(&scale)?, Some(cosine), du, dv)
        } else {
            (product, None, v, u)
        };
        let (du, mut layers) = backward(user, params, du, user_seen)?;
        let (dv, of_item) = backward(item, params, dv, item_seen)?;
        layers.extend(of_item);
        self.pulled = [flat(&du)?, flat(&dv)?];
        self.products = flat(&products)?;
        self.kept = Some(Batch { layers, cosines });
        Ok(())
    }

    /// The gradient of the packed parameters, of `sum g * product` over the examples of the last [`forward`](Self::forward), and
    /// in [`pulled`](Self::pulled) that of the inputs. `g` is 0 for those that are not fit.
    pub fn gradient(&mut self, g: &[f32]) -> Result<Vec<f32>> {
        let Some(Batch { layers, cosines }) = self.kept.take() else { candle_core::bail!("a forward comes first") };
        for (tower, pulled) in [&self.pair.user, &self.pair.item].into_iter().zip(&mut self.pulled) {
            weigh(pulled, tower.inputs(), g);
        }
        let g = Tensor::from_slice(g, (g.len(), 1), &self.device)?;
        let mut parts = Vec::new();
        for Pulled { input, delta, norm } in layers {
            let delta = delta.broadcast_mul(&g)?;
            parts.extend([input.t()?.matmul(&delta)?.flatten_all()?, delta.sum(0)?]);
            if let Some((plain, delta)) = norm {
                let delta = delta.broadcast_mul(&g)?;
                parts.extend([(&delta * plain)?.sum(0)?, delta.sum(0)?]);
            }
        }
        if let Some(cosines) = cosines {
            parts.push((cosines * g)?.sum(0)?);
        }
        flat(&Tensor::cat(&parts, 0)?)
    }

    /// The gradients of the inputs of `examples`, `[examples, width]`.
    #[must_use]
    pub fn pulled(&self, examples: Range<usize>) -> [&[f32]; 2] {
        let Self { pair, pulled: [user, item], .. } = self;
        [(user, &pair.user), (item, &pair.item)]
            .map(|(pulled, tower)| &pulled[examples.start * tower.inputs()..examples.end * tower.inputs()])
    }
}

/// What a tower says of inputs `[examples, width]`, `[examples, outputs]`, and what its layers saw.
fn forward(tower: &Tower, params: &Tensor, input: &[f32]) -> Result<(Tensor, Vec<Seen>)> {
    let shape = (input.len() / tower.inputs(), tower.inputs());
    let (mut x, mut seen) = (Tensor::from_slice(input, shape, params.device())?, Vec::new());
    for (i, layer) in tower.layers.iter().enumerate() {
        let n = layer.outputs;
        let linear = Linear::new(weights(layer, params)?.t()?, Some(params.narrow(0, layer.bias(), n)?));
        let z = linear.forward(&x)?;
        let input = std::mem::replace(&mut x, z);
        let mut norm = None;
        if let Some(at) = layer.norm {
            let centred = x.broadcast_sub(&x.mean_keepdim(1)?)?;
            let spread = centred.sqr()?.mean_keepdim(1)?.affine(1.0, LEAST_VARIANCE)?.sqrt()?.recip()?;
            let plain = centred.broadcast_mul(&spread)?;
            x = plain.broadcast_mul(&params.narrow(0, at, n)?)?.broadcast_add(&params.narrow(0, at + n, n)?)?;
            norm = Some(Norm { plain, spread });
        }
        if i + 1 < tower.layers.len() {
            x = match tower.activation {
                Activation::Relu => x.relu()?,
                Activation::Tanh => x.tanh()?,
            };
        }
        seen.push(Seen { input, out: x.clone(), norm });
    }
    Ok((x, seen))
}

/// From d product / d what the tower says to d product / d what it sees, `[examples, width]`, and to what its layers need.
fn backward(tower: &Tower, params: &Tensor, mut delta: Tensor, seen: Vec<Seen>) -> Result<(Tensor, Vec<Pulled>)> {
    let mut pulled = Vec::with_capacity(seen.len());
    for (i, (layer, Seen { input, out, norm })) in tower.layers.iter().zip(seen).enumerate().rev() {
        if i + 1 < tower.layers.len() {
            delta = match tower.activation {
                Activation::Relu => (delta * out.sign()?)?,
                Activation::Tanh => (delta * out.sqr()?.affine(-1.0, 1.0)?)?,
            };
        }
        let mut of_norm = None;
        if let (Some(at), Some(Norm { plain, spread })) = (layer.norm, norm) {
            let gained = delta.broadcast_mul(&params.narrow(0, at, layer.outputs)?)?;
            let along = plain.broadcast_mul(&(&gained * &plain)?.mean_keepdim(1)?)?;
            let before = (gained.broadcast_sub(&gained.mean_keepdim(1)?)? - along)?.broadcast_mul(&spread)?;
            of_norm = Some((plain, std::mem::replace(&mut delta, before)));
        }
        let below = delta.matmul(&weights(layer, params)?.t()?)?;
        pulled.push(Pulled { input, delta: std::mem::replace(&mut delta, below), norm: of_norm });
    }
    pulled.reverse();
    Ok((delta, pulled))
}

/// `[inputs, outputs]`, a view.
fn weights(layer: &Layer, params: &Tensor) -> Result<Tensor> {
    params.narrow(0, layer.weight, layer.inputs * layer.outputs)?.reshape((layer.inputs, layer.outputs))
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.flatten_all()?.to_vec1()
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::super::tower::Dots;
    use super::super::tower::tests::{Case, cases, composed};
    use super::*;

    fn to_f32(values: &[f64]) -> Vec<f32> {
        values.iter().map(|&value| value as f32).collect()
    }

    fn close(a: &[f32], b: &[f32], what: &str) {
        assert_eq!(a.len(), b.len(), "{what}");
        for (i, (a, b)) in a.iter().zip(b).enumerate() {
            assert!((a - b).abs() <= 2e-5 * b.abs().max(1.0), "{what} {i}: {a}, {b}");
        }
    }

    /// Products, gradients of both inputs and of the parameters.
    fn run(case: &Case, device: &Device) -> (DevicePair, Vec<f32>) {
        let mut towers = DevicePair::new(Arc::new(case.pair.clone()), device.clone());
        towers.inputs = case.x.each_ref().map(|x| to_f32(x));
        towers.forward(&to_f32(&case.params)).unwrap();
        let gradient = towers.gradient(&to_f32(&case.g)).unwrap();
        (towers, gradient)
    }

    fn equals_candle_s_own_gradients(device: &Device) {
        for case in cases(37).into_iter().chain(cases(1)) {
            let rows = case.g.len();
            let (towers, gradient) = run(&case, device);
            let var = |values: &[f64], shape: &[usize]| {
                Var::from_tensor(&Tensor::from_vec(to_f32(values), shape, &Device::Cpu).unwrap()).unwrap()
            };
            let user = var(&case.x[0], &[rows, case.pair.user.inputs()]);
            let item = var(&case.x[1], &[rows, case.pair.item.inputs()]);
            let params = var(&case.params, &[case.pair.len]);
            let products = composed(&case.pair, &user, &item, &params).unwrap();
            close(&towers.products, &flat(&products).unwrap(), "product");
            assert!(towers.fit.iter().all(|fit| *fit));
            let g = Tensor::from_vec(to_f32(&case.g), rows, &Device::Cpu).unwrap();
            let grads = (products * g).unwrap().sum_all().unwrap().backward().unwrap();
            let of = |var: &Var| flat(grads.get(var).unwrap()).unwrap();
            let [u, v] = towers.pulled(0..rows);
            close(u, &of(&user), "user input");
            close(v, &of(&item), "item input");
            close(&gradient, &of(&params), "parameter");
        }
    }

    #[test]
    fn what_is_computed_there_equals_candle_s_own_gradients() {
        equals_candle_s_own_gradients(&Device::Cpu);
    }

    #[test]
    #[cfg_attr(not(feature = "cuda"), ignore = "needs a GPU: scripts/build_cuda.sh test --lib on_a_gpu")]
    fn on_a_gpu_what_is_computed_equals_candle_s_own_gradients_on_the_cpu() {
        // Without a GPU it fails: nothing was compared.
        equals_candle_s_own_gradients(&Device::new_cuda(0).expect("NOT RUN: this test needs a GPU that CUDA can use"));
    }

    #[test]
    fn an_example_that_is_no_number_is_found_as_the_fused_operation_finds_it_and_weighs_nothing() {
        let mut found = 0;
        // Where nothing is normalised, for there numbers that large come out as good ones.
        let plain = |case: &Case| case.pair.scale.is_none() && case.pair.user.layers.iter().all(|l| l.norm.is_none());
        for mut case in cases(9).into_iter().filter(plain) {
            let [u, v] = case.x.each_mut().map(|x| {
                let width = x.len() / 9;
                x[3 * width..4 * width].iter_mut().for_each(|x| *x *= 3e38); // what comes of it is infinite
                Var::from_slice(&to_f32(x), (9, width), &Device::Cpu).unwrap()
            });
            let params = Var::from_slice(&to_f32(&case.params), case.pair.len, &Device::Cpu).unwrap();
            let (dots, mut fit) = (Dots::new(Arc::new(case.pair.clone())), Vec::new());
            u.apply_op3(&v, &params, dots.clone()).unwrap();
            dots.fit(&mut fit);
            case.g.iter_mut().zip(&fit).filter(|(_, fit)| !**fit).for_each(|(g, _)| *g = 0.0);
            let (with, gradient) = run(&case, &Device::Cpu);
            assert_eq!(with.fit, fit);
            if fit[3] {
                continue; // tanh lets nothing through
            }
            found += 1;
            case.x.iter_mut().for_each(|x| drop(x.drain(x.len() / 9 * 3..x.len() / 9 * 4)));
            case.g.remove(3);
            let (without, expected) = run(&case, &Device::Cpu);
            close(&gradient, &expected, "parameter");
            for side in 0..2 {
                close(with.pulled(0..3)[side], without.pulled(0..3)[side], "input");
                assert!(with.pulled(3..4)[side].iter().all(|d| *d == 0.0));
                close(with.pulled(4..9)[side], without.pulled(3..8)[side], "input");
            }
        }
        assert!(found > 0);
    }
}
