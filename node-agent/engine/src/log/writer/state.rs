//! What a writer starts from, and what it answers.
//!
//! Invariant: a state leads from its proven part through its tail to its end, epoch by epoch.

use crate::format::FormatError;
use crate::format::segment::LogIdentity;
use crate::lineage::EpochEntry;
use crate::log::{SegmentMeta, TailItem};
use crate::types::{Lsn, Position};
use std::collections::VecDeque;

/// Where an appended record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its first byte.
    pub start: Lsn,
    /// Just behind it.
    pub end: Lsn,
}

/// Why nothing was appended; the log is as before.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The current segment is full (or there is none) and no other is prepared yet.
    #[error("the log needs a new segment: hand one over with add_prepared, then append again")]
    NeedSegment,
    /// The log cannot be written until its tail is rewritten.
    #[error("the log cannot be written ({cause}): rewrite its tail into a new segment")]
    Poisoned {
        /// What the system said.
        cause: String,
    },
    /// A record from elsewhere that is not the next one.
    #[error("record {found} does not follow: number {expected} of this epoch is next")]
    NotNext {
        /// Its sequence number.
        found: u64,
        /// The expected one.
        expected: u64,
    },
    /// A record that the format cannot hold.
    #[error("record refused: {0}")]
    Format(#[from] FormatError),
}

/// What has become of a sync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyncResult {
    /// Everything up to here is durable.
    Durable(Position),
    /// It failed: the log is poisoned.
    Poisoned,
}

/// Where a log stands that is opened or begun.
#[derive(Debug)]
pub struct LogState {
    /// Whose log it is.
    pub identity: LogIdentity,
    /// The segments that hold it, ascending.
    pub segments: Vec<SegmentMeta>,
    /// Above the number of every file that exists, whatever is in it.
    pub next_number: u32,
    /// The epoch at `durable`; the tail names later ones.
    pub epoch: EpochEntry,
    /// How far it is proven to be on stable storage.
    pub durable: Position,
    /// What follows up to the end, readable but unproven.
    pub tail: VecDeque<TailItem>,
    /// The end.
    pub end: Position,
    /// Sequence of the next record; `None` when no record of this epoch was ever seen here.
    pub next_sequence: Option<u64>,
}

impl LogState {
    /// A log that begins at `start`, without any segment: the position where `epoch` begins, or one within it (sync target).
    ///
    /// # Panics
    /// When `start` names another epoch.
    #[must_use]
    pub fn empty(identity: LogIdentity, next_number: u32, epoch: EpochEntry, start: Position) -> Self {
        assert_eq!(epoch.id, start.epoch, "a log begins in the epoch it names");
        let at_start = epoch.parent.lsn == start.lsn && epoch.parent.chain == start.chain;
        Self {
            identity,
            segments: Vec::new(),
            next_number,
            epoch,
            durable: start,
            tail: VecDeque::new(),
            end: start,
            next_sequence: at_start.then_some(0),
        }
    }
}
