//! Reads the durable log from a proven position: for other members, and for replay.
//!
//! A reader works from the [`LogView`] that the owner publishes and opens segment files itself. It may be given a newer
//! view at each step; when its segment has left the log meanwhile, it proves its position again in the new one.
//!
//! Invariant: the first record comes only after (epoch, LSN, chain) of the start were found in the files, and no byte at or behind
//! the durable end of the view is ever looked at. A file that is recycled under a reader is noticed before anything read from it comes
//! out.

use super::TailClass;
use super::cursor::{Cursor, Step, Stop};
use crate::api::{LogView, SegmentView};
use crate::format::FormatError;
use crate::lineage::EpochEntry;
use crate::replication::LogChunk;
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::types::{Lsn, Position};
use std::io;

/// Why nothing can be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The store failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The log no longer reaches back that far.
    #[error("the log at {wanted} is no longer here: it starts at {log_start}")]
    Gone {
        /// The position that was wanted.
        wanted: Position,
        /// Where the log starts now.
        log_start: Lsn,
    },
    /// This log does not hold that position: another history, or one that goes on elsewhere.
    #[error("{wanted} is not in this log, which {found}")]
    NotProven {
        /// The position that was wanted.
        wanted: Position,
        /// What the log holds instead.
        found: String,
    },
    /// The segment left the log while it was read, and its file holds something else now.
    #[error("{segment} left the log while it was read: ask again")]
    Recycled {
        /// Which one it was.
        segment: SegmentName,
    },
    /// Durable log is damaged.
    #[error("{}: {} at byte {}, log position {}: durable log is damaged", .0.segment, .0.class, .0.file_offset, .0.lsn)]
    Defect(Stop),
}

/// What comes next in the log.
#[derive(Debug)]
pub enum Next {
    /// Records of one epoch.
    Records(LogChunk),
    /// An epoch begins here.
    Epoch(EpochEntry),
    /// The durable end of the view is reached.
    End,
}

/// See the module.
#[derive(Debug)]
pub struct LogReader<S: Store> {
    store: S,
    cursor: Cursor<S::File>,
    /// The epoch of the segment that was entered last is still to be told.
    pending: Option<EpochEntry>,
}

fn io_error(what: &str, name: SegmentName) -> impl FnOnce(io::Error) -> ReadError {
    let what = format!("{what} {name}");
    move |source| ReadError::Io { what, source }
}

fn defect(segment: SegmentName, lsn: Lsn, class: TailClass) -> ReadError {
    ReadError::Defect(Stop {
        segment,
        file_offset: 0,
        lsn,
        class,
        ended: false,
    })
}

/// What a walk that cannot go on means: damage, or a file that became another segment meanwhile.
fn stopped<F: StoreFile>(cursor: &Cursor<F>, stop: Stop) -> ReadError {
    match still_there(cursor) {
        Ok(()) => ReadError::Defect(stop),
        Err(error) => error,
    }
}

fn still_there<F: StoreFile>(cursor: &Cursor<F>) -> Result<(), ReadError> {
    let segment = cursor.header().name;
    let found = cursor.is_still_there();
    if found.map_err(io_error("read the header of", segment))? {
        Ok(())
    } else {
        Err(ReadError::Recycled { segment })
    }
}

/// Where the content of `segment` ends in this view.
fn end_of(view: &LogView, index: usize) -> Lsn {
    view.segments
        .get(index + 1)
        .map_or(view.durable.lsn, |next| next.start.lsn.min(view.durable.lsn))
}

impl<S: Store> LogReader<S> {
    /// Proves `from` and stands there.
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn open(store: S, view: &LogView, from: Position) -> Result<Self, ReadError> {
        let log_start = view.segments.first().map_or(view.durable.lsn, |first| first.start.lsn);
        if from.lsn < log_start {
            return Err(ReadError::Gone {
                wanted: from,
                log_start,
            });
        }
        if from.lsn > view.durable.lsn {
            let found = format!("ends at {}", view.durable);
            return Err(ReadError::NotProven { wanted: from, found });
        }
        let holds = |segment: &&SegmentView| segment.start.lsn <= from.lsn && segment.start.epoch == from.epoch;
        let Some(index) = view.segments.iter().rposition(|segment| holds(&segment)) else {
            return Self::open_behind(store, view, from);
        };
        let mut cursor = open_segment(&store, &view.segments[index])?;
        let limit = end_of(view, index);
        while cursor.at().lsn < from.lsn {
            let name = view.segments[index].name;
            match cursor.next(limit).map_err(io_error("read", name))? {
                Step::Record(_) => {}
                Step::Stop(stop) => return Err(stopped(&cursor, stop)),
                Step::Limit => break,
            }
        }
        still_there(&cursor)?;
        let at = cursor.at();
        if at != from {
            let found = format!("leads through {at}");
            return Err(ReadError::NotProven { wanted: from, found });
        }
        Ok(Self {
            store,
            cursor,
            pending: None,
        })
    }

    /// `from` is the end of an epoch whose segments are gone, but the next one names it as its parent.
    fn open_behind(store: S, view: &LogView, from: Position) -> Result<Self, ReadError> {
        for segment in view.segments.iter().filter(|segment| segment.start.lsn == from.lsn) {
            let cursor = open_segment(&store, segment)?;
            if cursor.header().epoch.parent == from {
                let pending = Some(cursor.header().epoch.clone());
                return Ok(Self { store, cursor, pending });
            }
        }
        let found = format!("has nothing of epoch {} at {}", from.epoch, from.lsn);
        Err(ReadError::NotProven { wanted: from, found })
    }

    /// Where the next record begins. Just after an [`Next::Epoch`] it is the beginning of that epoch.
    #[must_use]
    pub fn position(&self) -> Position {
        match &self.pending {
            Some(entry) => entry.parent,
            None => self.cursor.at(),
        }
    }

    /// Whether the reader stands at `at`. Where one epoch ends and the next begins it can stand at both.
    pub fn is_at(&mut self, at: Position) -> bool {
        if self.pending.as_ref().is_some_and(|entry| entry.id == at.epoch) {
            self.pending = None;
        }
        self.position() == at
    }

    /// Reads on, up to `until` and the durable end of `view`: at least one record and about `max_bytes` of history (more
    /// than that by less than one record).
    ///
    /// # Errors
    /// See [`ReadError`].
    pub fn next(&mut self, view: &LogView, until: Lsn, max_bytes: u64) -> Result<Next, ReadError> {
        if let Some(entry) = self.pending.take() {
            return Ok(Next::Epoch(entry));
        }
        loop {
            let name = self.cursor.header().name;
            let Some(index) = view.segments.iter().position(|segment| segment.name == name) else {
                *self = Self::open(self.store.clone(), view, self.position())?;
                if let Some(entry) = self.pending.take() {
                    return Ok(Next::Epoch(entry));
                }
                continue;
            };
            let start = self.cursor.at();
            let end = end_of(view, index);
            if start.lsn < end {
                let chunk = if start.lsn < until {
                    self.read(start, end, until, max_bytes)?
                } else {
                    None
                };
                return Ok(chunk.map_or(Next::End, Next::Records));
            }
            match view.segments.get(index + 1) {
                None => return Ok(Next::End),
                Some(next) => {
                    if let Some(entry) = self.enter(next)? {
                        return Ok(Next::Epoch(entry));
                    }
                }
            }
        }
    }

    /// `None` when the first record would cross `until`.
    fn read(&mut self, start: Position, end: Lsn, until: Lsn, max_bytes: u64) -> Result<Option<LogChunk>, ReadError> {
        let name = self.cursor.header().name;
        self.cursor.forget_window();
        let mut walked = Vec::new();
        let mut bytes = 0;
        while bytes < max_bytes || walked.is_empty() {
            match self.cursor.next(end.min(until)).map_err(io_error("read", name))? {
                Step::Record(record) => {
                    bytes += record.lsn_bytes();
                    walked.push((record, self.cursor.at().chain));
                }
                Step::Limit => break,
                Step::Stop(stop) if until < end && stop.class == TailClass::SequenceJump => break,
                Step::Stop(stop) => return Err(stopped(&self.cursor, stop)),
            }
        }
        still_there(&self.cursor)?;
        Ok(LogChunk::walked(start, self.cursor.at(), walked))
    }

    /// Goes on in the next segment; says so when an epoch begins with it.
    fn enter(&mut self, next: &SegmentView) -> Result<Option<EpochEntry>, ReadError> {
        let at = self.cursor.at();
        let mut cursor = open_segment(&self.store, next)?;
        let header = cursor.header();
        let same_epoch = header.epoch.id == at.epoch;
        let joins = header.start_lsn == at.lsn && header.start_chain == at.chain;
        if !joins || !(same_epoch || header.epoch.parent == at) {
            return Err(defect(next.name, at.lsn, TailClass::SequenceJump));
        }
        let entry = (!same_epoch).then(|| header.epoch.clone());
        cursor.expect_sequence(self.cursor.sequence().filter(|_| same_epoch));
        self.cursor = cursor;
        Ok(entry)
    }
}

/// Opens a segment and checks that it is the one that the view means.
fn open_segment<S: Store>(store: &S, segment: &SegmentView) -> Result<Cursor<S::File>, ReadError> {
    let name = segment.name;
    let file = store.open(&FileId::Segment(name)).map_err(io_error("open", name))?;
    let (header, crc) = Cursor::read_header(&file)
        .map_err(io_error("read the header of", name))?
        .map_err(|error| match error {
            FormatError::Zero => defect(name, segment.start.lsn, TailClass::Zero),
            _ => defect(name, segment.start.lsn, TailClass::Header),
        })?;
    if header.name != name || header.start() != segment.start {
        return Err(defect(name, segment.start.lsn, TailClass::Header));
    }
    Cursor::new(file, header, crc).map_err(io_error("open", name))
}
