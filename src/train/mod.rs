//! Score, learn, measure, checkpoint.
pub mod checkpoint;
pub mod compare;
pub mod core;
pub mod fresh;
pub mod image;
pub mod mark;
pub mod progressive;
