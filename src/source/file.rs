//! Files as partitions of a log.
