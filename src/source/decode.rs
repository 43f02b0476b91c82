//! JSON lines to encoded records.
