//! What is learned: sparse tables and the models on them.
//!
//! A model knows nothing of streams, files or clocks: it takes numbered batches of encoded examples in their order, and
//! the same batches give the same bytes.

pub mod logistic; // per-coordinate AdaGrad / FTRL-Proximal, example by example
pub mod table; // id -> (w, n, touched), three rows a cache line

/// Why a model could not be made from its settings or from a stored state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("`model.{key}` must be {expected}, got {got}")]
    Setting { key: &'static str, expected: &'static str, got: String },
    #[error("the stored {part} does not fit: {what}; it is damaged or of another model, take an older checkpoint")]
    State { part: &'static str, what: String },
}
