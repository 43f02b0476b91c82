//! The feature schema.
