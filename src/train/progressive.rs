//! Progressive validation.
