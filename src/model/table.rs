//! Sparse parameters.
