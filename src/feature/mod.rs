//! Raw fields to ids and numbers.
pub mod encode;
pub mod schema;
