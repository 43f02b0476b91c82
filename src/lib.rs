//! Tidemill turns the stream of impressions and clicks into a click-through model that is never more than moments old.
//!
//! Data walks through the rooms in this order; imports follow the data and never point back:
//!
//! [`source`] → [`merge`] → [`join`] → [`batch`] → [`train`] → [`snapshot`]
//!
//! with [`feature`] saying how raw fields become ids and numbers, [`model`] holding what is learned, and [`app`] wiring
//! the rooms to threads. Start with `docs/architecture.md`.

pub mod event; // words: what a record, a chunk and an example are
pub mod position; // words: where in a partition something stands
pub mod clock; // words: the only place that asks what time it is
pub mod telemetry; // words: every metric by name, with its unit

pub mod feature; // raw fields -> ids and numbers, one schema for training and serving
pub mod source; // files -> decoded records with positions
pub mod merge; // many partitions -> one ordered stream; pure
pub mod join; // ordered events -> labelled examples; pure
pub mod batch; // examples -> mini-batches, cut by count and event time; pure
pub mod model; // sparse tables and the models on them
pub mod train; // score, learn, measure, checkpoint
pub mod snapshot; // versioned weights in a store
pub mod serve; // versions swapped in under requests, and scored
pub mod generate; // a synthetic stream with a known truth

pub mod app; // wiring: threads, channels, shutdown
pub mod cli; // one file per command
pub mod config; // each room's settings, checked once
