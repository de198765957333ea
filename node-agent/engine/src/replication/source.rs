//! The sending side: which position it proves, what it then sends, and what it never sends.
//!
//! Invariants: nothing is sent before the caller's (epoch, LSN, chain) was found in the local log (P7); nothing beyond the
//! durable end is sent (P6); a record that does not verify ends the stream and is named, never shipped (P10). Any member may
//! be a source; whether its history is the wanted one is for the secondary to decide.

use crate::api::LogView;
use crate::lineage::{EpochEntry, Lineage};
use crate::replication::chunk::{ChunkClaim, LogChunk};
use crate::replication::histories::{Relation, relate};
use crate::replication::messages::{FetchItem, FetchOpen, Refused};
use crate::types::{Lsn, Position};

/// Target size of one chunk (bytes of history).
pub const CHUNK_BYTES: usize = 1 << 20;

/// Reads a local log in order; may keep an open segment between calls. All calls block on file reads.
pub trait LogReader: Send {
    /// Finds `at` in the log: recomputes the chain from the start of its segment.
    ///
    /// # Errors
    /// [`Refused::Unprovable`], [`Refused::TooOld`], [`Refused::Behind`], [`Refused::Defect`] or [`Refused::Io`].
    fn prove(&mut self, view: &LogView, at: Position) -> Result<(), Refused>;

    /// Records from `at` (the last proven or read position) on, of its epoch only, not beyond `until`, about `max_bytes`
    /// of them but at least one. `None` when there is nothing between `at` and `until`.
    ///
    /// # Errors
    /// [`Refused::Defect`] or [`Refused::Io`].
    fn read(&mut self, view: &LogView, at: Position, until: Lsn, max_bytes: usize)
    -> Result<Option<LogChunk>, Refused>;
}

impl<R: LogReader + ?Sized> LogReader for Box<R> {
    fn prove(&mut self, view: &LogView, at: Position) -> Result<(), Refused> {
        (**self).prove(view, at)
    }

    fn read(
        &mut self,
        view: &LogView,
        at: Position,
        until: Lsn,
        max_bytes: usize,
    ) -> Result<Option<LogChunk>, Refused> {
        (**self).read(view, at, until, max_bytes)
    }
}

/// Decides from the histories alone whether a fetch may be tried.
///
/// # Errors
/// [`Refused`] when the caller's history is not a prefix of this one, or begins before what is kept.
pub fn admit(view: &LogView, lineage: &Lineage, from: Position) -> Result<(), Refused> {
    let log_start = view
        .segments
        .first()
        .map_or(view.durable.lsn, |segment| segment.start.lsn);
    match relate((&view.lineage, view.durable), (lineage, from)) {
        Relation::Same | Relation::Ahead { .. } => {}
        Relation::Behind { .. } => {
            return Err(Refused::Behind {
                at: from.lsn,
                durable: view.durable.lsn,
            });
        }
        Relation::Fork(fork) => {
            return Err(Refused::Fork {
                at: fork.at,
                since: fork.since,
                caller_bytes: fork.theirs_bytes,
                source_bytes: fork.ours_bytes,
            });
        }
        Relation::Differs { at } => {
            return Err(Refused::Unprovable {
                at: from,
                have: format!("{at} with another chain"),
            });
        }
    }
    if from.lsn < log_start {
        return Err(Refused::TooOld {
            at: from.lsn,
            log_start,
        });
    }
    Ok(())
}

/// One fetch as the sender sees it: what to send next.
#[derive(Debug)]
pub struct SourceStream<R> {
    reader: R,
    /// The next record begins here.
    at: Position,
    /// History of the caller, epochs sent meanwhile included.
    lineage: Lineage,
    until: Option<Lsn>,
}

impl<R: LogReader> SourceStream<R> {
    /// Proves the caller's position; the first item to send comes with it.
    ///
    /// # Errors
    /// [`Refused`], with the reason for the caller.
    pub fn open(mut reader: R, view: &LogView, open: FetchOpen) -> Result<(Self, FetchItem), Refused> {
        admit(view, &open.lineage, open.from)?;
        reader.prove(view, open.from)?;
        let stream = Self {
            reader,
            at: open.from,
            lineage: open.lineage,
            until: open.until,
        };
        Ok((stream, FetchItem::Proven { at: open.from }))
    }

    /// How far the stream is.
    #[must_use]
    pub fn at(&self) -> Position {
        self.at
    }

    /// Whether everything that may be sent was sent: the caller's limit is reached.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.until.is_some_and(|until| self.at.lsn >= until)
    }

    /// The next item, from the newest view; `None` when everything durable was sent.
    ///
    /// # Errors
    /// [`Refused`]: the stream ends. Also when this member's own history no longer contains what it has sent (it was
    /// invalidated, or found its own log cut after a crash).
    ///
    /// # Panics
    /// When the reader breaks its contract: better no log than the wrong one.
    pub fn next(&mut self, view: &LogView) -> Result<Option<FetchItem>, Refused> {
        if self.finished() {
            return Ok(None);
        }
        admit(view, &self.lineage, self.at)?;
        if let Some(next) = next_epoch(&view.lineage, self.at) {
            self.at = Position {
                epoch: next.id,
                ..self.at
            };
            self.lineage.0.push(next.clone());
            return Ok(Some(FetchItem::Epoch(next)));
        }
        let end = epoch_end(view, self.at).min(self.until.unwrap_or(Lsn(u64::MAX)));
        let Some(chunk) = self.reader.read(view, self.at, end, CHUNK_BYTES)? else {
            return Ok(None);
        };
        assert!(
            chunk.start() == self.at,
            "a reader returns records from where it was asked"
        );
        assert!(chunk.end().lsn <= end, "a reader never goes beyond the durable end");
        self.at = chunk.end();
        Ok(Some(FetchItem::Records(ChunkClaim {
            start: chunk.start(),
            end: chunk.end(),
            records: chunk.into_records(),
        })))
    }
}

/// The epoch that begins exactly at `at`, if the history goes on in another one there.
fn next_epoch(lineage: &Lineage, at: Position) -> Option<EpochEntry> {
    // A caller without any history yet stands before the first epoch, whose parent is the default position.
    lineage
        .0
        .iter()
        .find(|entry| entry.parent == at && entry.id != at.epoch)
        .cloned()
}

/// Where the epoch of `at` ends in this history.
fn epoch_end(view: &LogView, at: Position) -> Lsn {
    let successor = view
        .lineage
        .0
        .iter()
        .find(|entry| entry.parent.epoch == at.epoch && entry.id != at.epoch);
    successor.map_or(view.durable.lsn, |entry| entry.parent.lsn.min(view.durable.lsn))
}

#[cfg(test)]
#[path = "source_tests.rs"]
pub(crate) mod tests;
