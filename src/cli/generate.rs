//! `tidemill generate`
