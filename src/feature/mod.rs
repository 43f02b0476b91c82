//! Raw fields to ids and numbers: one [`Schema`] for training, scoring and serving.
//!
//! The rules are written down, with test vectors, in `docs/encoding.md`.
pub mod encode;
pub mod overlay;
pub mod schema;

pub use encode::{Encoder, Mismatch};
pub use overlay::Overlay;
pub use schema::{CrossSettings, FeatureSettings, Schema};

/// Why a schema cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A key of `[[features]]` or `[[crosses]]` has a value that cannot work.
    #[error("`{key}` {problem}")]
    Setting { key: String, problem: String },
    /// The schema in a manifest is not one.
    #[error("not a feature schema: {0}")]
    Json(String),
    /// The schema in a manifest was made by another version of the encoding.
    #[error("the schema uses encoding {found}, this build knows encoding {known}; use the build that wrote it")]
    Version { found: u32, known: u32 },
}
