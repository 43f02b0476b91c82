//! train
pub mod progressive;
pub mod checkpoint;
