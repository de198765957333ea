//! The replication protocol, sans-io: what is said between members, and what each side does with it.

use crate::format::record::Record;
use crate::types::Position;

/// A run of records of one epoch, proven: `end.chain` was recomputed from `start.chain` over these very records.
#[derive(Debug, Clone)]
pub struct LogChunk {
    /// Where the first record begins.
    pub start: Position,
    /// Where the last one ends.
    pub end: Position,
    /// The records, in order.
    pub records: Vec<Record>,
}
