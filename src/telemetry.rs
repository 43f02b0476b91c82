//! Every metric by name, with its unit: one function per event.
