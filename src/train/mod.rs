//! train
pub mod checkpoint;
pub mod progressive;
