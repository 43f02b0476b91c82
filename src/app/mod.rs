//! Wiring: builds the stages from the last to the first; owns threads, channels and shutdown.

pub mod dead_letters;
pub mod demo;
pub mod keeper;
pub mod publisher;
pub mod train;
