//! The local transaction log: `writer` appends to it, `scan` recovers it, `reader` serves and replays it.
//!
//! Invariant: a byte of history has one place. A segment's content ends where its successor begins, whatever stands
//! behind in the file, so cutting, poisoning and rewriting never change bytes that were durable.

mod classify;
mod cursor;
pub mod reader;
mod rewrite;
pub mod scan;
pub mod serve;
pub mod writer;

pub use classify::TailClass;
pub use cursor::Stop;
#[cfg(test)]
mod tests;

pub use rewrite::{Rewritten, TailItem, TailRewrite};
pub use writer::{AppendError, Appended, LogWriter, SyncResult};

use crate::store::SegmentName;
use crate::types::{BLOCK_BYTES, Position};

/// One segment of the local log, as its owner knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentMeta {
    /// Its file.
    pub name: SegmentName,
    /// Where its content begins; it ends where the next one begins. The epoch is that of all its records.
    pub start: Position,
    /// Length of the file.
    pub file_bytes: u64,
}

/// The next block boundary at or after `offset`.
fn align_up(offset: u64) -> u64 {
    offset.next_multiple_of(BLOCK_BYTES)
}
