//! snapshot
pub mod codec;
pub mod decide;
pub mod manifest;
pub mod retain;
pub mod store;
