//! How a value becomes table rows. Pure; the same code in training, scoring and on a serving node.
