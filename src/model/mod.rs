//! model
pub mod logistic;
pub mod table;
