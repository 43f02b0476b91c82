//! Wiring: builds the stages from the last to the first; owns threads, channels and shutdown.

pub mod control;
pub mod dead_letters;
pub mod demo;
pub mod examples;
pub mod exporter;
pub mod handover;
pub mod input;
pub mod job;
pub mod keeper;
pub mod objects;
pub mod operator;
pub mod predictions;
pub mod publisher;
pub mod recorder;
pub mod replay;
pub mod retrain;
pub mod summary;
pub mod topics;
pub mod train;
pub mod verify;
pub mod warm;

/// Puts a small document under a name, where a reader finds the one before or all of this one.
fn put_json(path: &std::path::Path, value: &impl serde::Serialize) -> std::io::Result<()> {
    let staged = path.with_extension("json.tmp");
    std::fs::write(&staged, serde_json::to_vec_pretty(value)?)?;
    std::fs::rename(&staged, path)
}

/// Drives what talks to a store, where one thing is done after the other.
fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}
