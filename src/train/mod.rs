//! Score, learn, measure, checkpoint.
pub mod checkpoint;
pub mod compare;
pub mod core;
pub mod digest;
pub mod fresh;
pub mod image;
pub mod progressive;
