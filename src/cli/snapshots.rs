//! `tidemill snapshots`
