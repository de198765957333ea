//! Reads segment files for a sender of log: the file side of [`replication::source`](crate::replication::source).
//!
//! Invariant: what is returned was proven against the files of this replica, in this call or an unbroken row of calls.

use super::reader::{LogReader, Next, ReadError};
use crate::api::LogView;
use crate::replication::LogChunk;
use crate::replication::messages::Refused;
use crate::replication::source;
use crate::store::Store;
use crate::types::{Lsn, Position};

/// Serves the log in `store`.
pub struct SegmentLog<S: Store> {
    store: S,
    reader: Option<LogReader<S>>,
}

impl<S: Store> std::fmt::Debug for SegmentLog<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let at = self.reader.as_ref().map(LogReader::position);
        f.debug_struct("SegmentLog").field("at", &at).finish_non_exhaustive()
    }
}

impl<S: Store> SegmentLog<S> {
    /// Nothing is opened yet.
    #[must_use]
    pub fn new(store: S) -> Self {
        Self { store, reader: None }
    }

    /// A reader that stands at `at`: the one that is there, or a new one that proves it.
    fn reader_at(&mut self, view: &LogView, at: Position) -> Result<&mut LogReader<S>, ReadError> {
        let stands_there = self.reader.as_mut().is_some_and(|reader| reader.is_at(at));
        if !stands_there {
            self.reader = Some(LogReader::open(self.store.clone(), view, at)?);
        }
        Ok(self.reader.as_mut().expect("set just above"))
    }

    fn read_chunk(
        &mut self,
        view: &LogView,
        at: Position,
        until: Lsn,
        max_bytes: usize,
    ) -> Result<Option<LogChunk>, ReadError> {
        let reader = self.reader_at(view, at)?;
        match reader.next(view, until, max_bytes as u64) {
            Ok(Next::Records(chunk)) => Ok(Some(chunk)),
            Ok(Next::Epoch(_) | Next::End) => Ok(None),
            Err(error) => {
                // Where it stands now is anybody's guess.
                self.reader = None;
                Err(error)
            }
        }
    }
}

fn refused(error: ReadError, at: Position) -> Refused {
    match error {
        ReadError::Gone { log_start, .. } => Refused::TooOld { at: at.lsn, log_start },
        ReadError::NotProven { found, .. } => Refused::Unprovable { at, have: found },
        ReadError::Defect(stop) => {
            let message = format!("{}: {} at byte {}", stop.segment, stop.class, stop.file_offset);
            Refused::Defect {
                at: stop.lsn,
                message,
                stop: Some(stop),
            }
        }
        error @ ReadError::Recycled { .. } => Refused::Busy {
            message: error.to_string(),
        },
        ReadError::Io { what, source } => Refused::Io {
            message: format!("{what}: {source}"),
        },
    }
}

impl<S: Store> source::LogReader for SegmentLog<S> {
    fn prove(&mut self, view: &LogView, at: Position) -> Result<(), Refused> {
        self.reader = None;
        self.reader_at(view, at).map(|_| ()).map_err(|error| refused(error, at))
    }

    fn read(
        &mut self,
        view: &LogView,
        at: Position,
        until: Lsn,
        max_bytes: usize,
    ) -> Result<Option<LogChunk>, Refused> {
        self.read_chunk(view, at, until, max_bytes)
            .map_err(|error| refused(error, at))
    }
}
