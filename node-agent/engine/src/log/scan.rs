//! Recovery: finds out what the log says after a restart, from a position that is known to be durable up to its end.
//!
//! The scan only reads. It proves the start position, walks record by record across segments, stops at the first thing that
//! is not valid log, names it, and collects evidence from valid batches behind it: a batch that knew of a durable end above
//! the stop proves that the log is damaged rather than torn. [`decide`] then says what follows.
//!
//! # What is read, and what not
//! Below the start position: headers only, and the segment that holds the position, from its beginning – a chain can be proven in no other
//! way. That part is applied in the data disk and kept for members that need it; it is verified record by record when it is served. Above:
//! everything, because it is going to be applied, because the end of the log and what stands there decide between a torn tail and a
//! defect, and because a defect can be fetched again only from where the log is cut. Behind a stop: headers, and the contents of the last segment.
//!
//! Invariants: nothing behind the first invalid byte is part of the result; no file is called stale while a damaged header
//! leaves open what it was.

use super::classify::TailClass;
use super::cursor::{Cursor, Step, Stop};
use super::writer::LogState;
use super::{SegmentMeta, TailItem};
use crate::format::FormatError;
use crate::format::record::Record;
use crate::format::segment::{LogIdentity, SegmentHeader};
use crate::lineage::EpochEntry;
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::types::{Lsn, Position};
use std::collections::VecDeque;
use std::io;

mod inventory;
use inventory::{Found, Inventory};

/// What to scan.
#[derive(Debug, Clone, Copy)]
pub struct ScanParams {
    /// Whose log it must be.
    pub identity: LogIdentity,
    /// A position known to be durable: it is proven against the files, and everything up to it counts as durable.
    pub from: Position,
    /// Segments with lower numbers are not part of the log.
    pub first_segment: u32,
}

/// Why there is no result. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum ScanError {
    /// The store failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Written by a newer version.
    #[error("{segment}: {error}")]
    Newer {
        /// Which file.
        segment: SegmentName,
        /// Found and known version.
        error: FormatError,
    },
    /// The log of somebody else.
    #[error("{segment} belongs to {owner}: this directory is not that of the replica; nothing was changed")]
    Foreign {
        /// Which file.
        segment: SegmentName,
        /// Cluster, resource and replica it names.
        owner: String,
    },
    /// The log does not reach back to where it is needed.
    #[error(
        "the log at {wanted} is missing: {present}; check that the right file system is mounted, else this replica needs a sync"
    )]
    Missing {
        /// The position that was wanted.
        wanted: Position,
        /// What is there.
        present: String,
    },
    /// The files hold another history than the saved state says.
    #[error(
        "saved state names {wanted}, but the log in {segment} leads to {found}: it is another history; nothing was changed"
    )]
    NotProven {
        /// The position that was wanted.
        wanted: Position,
        /// Where it should be.
        segment: SegmentName,
        /// What is there.
        found: Position,
    },
}

/// What the log says.
#[derive(Debug)]
pub struct Scan {
    /// Whose log it is.
    pub identity: LogIdentity,
    /// The segments that hold it, ascending.
    pub segments: Vec<SegmentMeta>,
    /// All epochs that these segments name, oldest first.
    pub epochs: Vec<EpochEntry>,
    /// End of the valid log.
    pub end: Position,
    /// Why it ends there.
    pub stop: Stop,
    /// Highest durable end that anything told of: the start position, and every valid header. Above `end`: a defect.
    pub proven: Lsn,
    /// The last record, if the log ends with one of the scanned part and not with the beginning of an epoch.
    pub last_record: Option<Record>,
    /// Sequence number of the next record, if known.
    pub next_sequence: Option<u64>,
    /// Where the unproven tail begins.
    pub tail_start: Position,
    /// The epoch there.
    pub tail_epoch: EpochEntry,
    /// From there to the end.
    pub tail: VecDeque<TailItem>,
    /// Files that never became, or are no longer, part of the log: safe to remove once the tail is rewritten.
    pub stale: Vec<SegmentName>,
    /// Segments behind the stop: stale if the log is cut here, evidence if it is defective.
    pub beyond: Vec<SegmentName>,
    /// Files that are kept although they are no part of the log, and worth a warning: their header is damaged, or they hold
    /// durable log behind a defect that is not fetched again yet.
    pub damaged: Vec<SegmentName>,
    /// Above the number of every file that exists.
    pub next_number: u32,
}

/// What follows from a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The log ends where it ended when the process died: go on in the same epoch.
    Continue,
    /// Everything durable is there; what stands behind is a torn tail or another boot began. A primary goes on in a new
    /// epoch with cause Recovery.
    Cut,
    /// Bytes are damaged that were durable: fetch them again, or stop and name this.
    Defect {
        /// Where, and what stands there.
        stop: Stop,
        /// How far the log was durable.
        durable: Lsn,
    },
}

/// Decides what a stop means. `known_durable` is the highest durable end of this log that anybody knows: saved state, valid
/// headers, peers.
#[must_use]
pub fn decide(end: Lsn, stop: &Stop, known_durable: Lsn, anything_beyond: bool, same_boot: bool) -> Verdict {
    if end < known_durable {
        return Verdict::Defect {
            stop: stop.clone(),
            durable: known_durable,
        };
    }
    if same_boot && stop.ended && !anything_beyond {
        Verdict::Continue
    } else {
        Verdict::Cut
    }
}

impl Scan {
    /// See [`decide`]; `known_durable` comes on top of what the scan has found itself.
    #[must_use]
    pub fn decide(&self, known_durable: Lsn, same_boot: bool) -> Verdict {
        let known = self.proven.max(known_durable);
        decide(self.end.lsn, &self.stop, known, !self.beyond.is_empty(), same_boot)
    }

    /// The log as it is continued: cut at its end. The files named first are to be removed once the writer has rewritten the tail.
    #[must_use]
    pub fn into_state(self) -> (Vec<SegmentName>, LogState) {
        let mut obsolete = self.stale;
        obsolete.extend(self.beyond);
        let state = LogState {
            identity: self.identity,
            segments: self.segments,
            next_number: self.next_number,
            epoch: self.tail_epoch,
            durable: self.tail_start,
            tail: self.tail,
            end: self.end,
            next_sequence: self.next_sequence,
        };
        (obsolete, state)
    }
}

/// Scans the log of a replica. `visit` sees every record behind `params.from` with the position behind it.
///
/// # Errors
/// See [`ScanError`]; a log that merely ends too early is no error but a result.
pub fn scan<S: Store>(
    store: &S,
    params: &ScanParams,
    visit: &mut dyn FnMut(&Record, Position),
) -> Result<Scan, ScanError> {
    let inventory = Inventory::take(store, params)?;
    Walk::start(store, params, inventory)?.run(visit)
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ScanError {
    let what = what.into();
    move |source| ScanError::Io { what, source }
}

/// The walk over the segments from the one that holds `from`.
struct Walk<'a, S: Store> {
    store: &'a S,
    params: ScanParams,
    inventory: Inventory,
    /// The segment being walked.
    index: usize,
    cursor: Cursor<S::File>,
    proven: Lsn,
    last_record: Option<Record>,
    /// Set when `from` is proven: where the tail begins, and its epoch.
    tail_start: Option<(Position, EpochEntry)>,
    tail: VecDeque<(TailItem, Position)>,
}

impl<'a, S: Store> Walk<'a, S> {
    fn start(store: &'a S, params: &ScanParams, mut inventory: Inventory) -> Result<Self, ScanError> {
        let starts_below = |found: &Found| found.header.start_lsn < params.from.lsn;
        let below = inventory
            .segments
            .iter()
            .take_while(|found| starts_below(found))
            .count();
        let Some(first) = inventory.segments.first() else {
            return Err(inventory.missing(params));
        };
        if below == 0 && first.header.start_lsn > params.from.lsn {
            return Err(inventory.missing(params));
        }
        // A segment that begins exactly at the start position needs no predecessor; one that is there may be the left-over of a
        // removal of which only part survived a power loss.
        let begins_here = |found: &Found| found.header.start_lsn == params.from.lsn;
        let index = if inventory.segments.get(below).is_some_and(begins_here) {
            inventory.forget_strangers_before(store, below)?.saturating_sub(1)
        } else {
            inventory.forget_strangers_before(store, below.saturating_sub(1))?
        };
        let cursor = inventory.segments[index].cursor(store)?;
        Ok(Self {
            store,
            params: *params,
            inventory,
            index,
            cursor,
            proven: params.from.lsn,
            last_record: None,
            tail_start: None,
            tail: VecDeque::new(),
        })
    }

    fn run(mut self, visit: &mut dyn FnMut(&Record, Position)) -> Result<Scan, ScanError> {
        loop {
            self.prove_from()?;
            let next = self.inventory.segments.get(self.index + 1);
            let limit = next.map_or(Lsn(u64::MAX), |next| next.header.start_lsn);
            let name = self.cursor.header().name;
            match self.cursor.next(limit).map_err(io_error(format!("read {name}")))? {
                Step::Record(record) => self.take(record, visit),
                Step::Limit => {
                    if let Some(stop) = self.enter_next()? {
                        return self.finish(stop);
                    }
                }
                Step::Stop(stop) => {
                    let stop = self.inventory.blame_damaged_header(stop);
                    return self.finish(stop);
                }
            }
        }
    }

    /// At the start position: is it the one that was saved?
    fn prove_from(&mut self) -> Result<(), ScanError> {
        let (at, from) = (self.cursor.at(), self.params.from);
        if self.tail_start.is_some() || at.lsn < from.lsn {
            return Ok(());
        }
        if at.lsn > from.lsn || at.chain != from.chain {
            return Err(ScanError::NotProven {
                wanted: from,
                segment: self.cursor.header().name,
                found: at,
            });
        }
        self.tail_start = Some((at, self.cursor.header().epoch.clone()));
        Ok(())
    }

    fn take(&mut self, record: Record, visit: &mut dyn FnMut(&Record, Position)) {
        self.proven = self.proven.max(self.cursor.proven());
        if self.tail_start.is_some() {
            let end = self.cursor.at();
            visit(&record, end);
            self.tail.push_back((TailItem::Record(record.clone()), end));
            self.drop_proven();
        }
        self.last_record = Some(record);
    }

    /// What is proven durable need not be kept.
    fn drop_proven(&mut self) {
        let Some((start, epoch)) = &mut self.tail_start else {
            return;
        };
        while let Some((item, end)) = self.tail.front() {
            let is_proven = match item {
                TailItem::Record(_) => end.lsn <= self.proven,
                // The header of its segment is durable for certain once something behind it is.
                TailItem::Epoch(_) => end.lsn < self.proven,
            };
            if !is_proven {
                break;
            }
            *start = *end;
            if let TailItem::Epoch(entry) = item {
                *epoch = entry.clone();
            }
            self.tail.pop_front();
        }
    }

    /// Goes on in the next segment if it continues exactly here; else says why not.
    fn enter_next(&mut self) -> Result<Option<Stop>, ScanError> {
        let at = self.cursor.at();
        let next = &self.inventory.segments[self.index + 1];
        let header = &next.header;
        let same_epoch = header.epoch.id == at.epoch;
        let continues = header.start_lsn == at.lsn && header.start_chain == at.chain;
        let sequence_fits = match (header.first_sequence, self.cursor.sequence()) {
            (Some(first), Some(next)) if same_epoch => first == next,
            _ => true,
        };
        if !continues || !sequence_fits || !(same_epoch || header.epoch.parent == at) {
            let class = TailClass::SequenceJump;
            return Ok(Some(Stop {
                segment: header.name,
                file_offset: 0,
                lsn: at.lsn,
                class,
                ended: false,
            }));
        }
        if !same_epoch {
            // A `Close` behind which an epoch begins is not the last word any more.
            self.last_record = None;
            if self.tail_start.is_some() {
                let behind = header.start();
                self.tail.push_back((TailItem::Epoch(header.epoch.clone()), behind));
            }
        }
        self.proven = self.proven.max(header.durable);
        let known = self.cursor.sequence().filter(|_| same_epoch);
        self.cursor = next.cursor(self.store)?;
        self.cursor.expect_sequence(known);
        self.index += 1;
        Ok(None)
    }

    fn finish(mut self, stop: Stop) -> Result<Scan, ScanError> {
        let end = self.cursor.at();
        self.proven = self.proven.max(self.cursor.proven());
        let what = || io_error(format!("read {} behind its end", stop.segment));
        self.proven = self.proven.max(self.cursor.proven_by_later_batches().map_err(what())?);
        let later = self.inventory.segments.split_off(self.index + 1);
        for found in &later {
            self.proven = self.proven.max(found.header.durable);
        }
        // A header was written after everything in the segments before it, and knew at least as much: only what is in the last one can
        // tell more than the headers.
        if let Some(last) = later.last() {
            let known = last.cursor(self.store)?.proven_by_later_batches().map_err(what())?;
            self.proven = self.proven.max(known);
        }
        let last = self.cursor.header().name;
        let (behind, damaged): (Vec<_>, Vec<_>) = self.inventory.damaged.iter().partition(|name| **name > last);
        let mut beyond: Vec<SegmentName> = later.iter().map(|found| found.header.name).chain(behind).collect();
        beyond.sort_unstable();
        // What was given up because of a defect, and is not fetched again yet, is not stale: somebody may want to look at it.
        let mut damaged: Vec<SegmentName> = damaged;
        for found in &self.inventory.superseded {
            let name = found.header.name;
            let is_evidence = found.header.durable > end.lsn
                || found.cursor(self.store)?.proven_by_later_batches().map_err(what())? > end.lsn;
            if is_evidence {
                damaged.push(name);
            } else {
                self.inventory.stale.push(name);
            }
        }
        damaged.sort_unstable();
        self.inventory.stale.sort_unstable();
        self.drop_proven();
        // A log that ends before the start position has no tail: all that is left of it was durable.
        let (tail_start, tail_epoch) = self.tail_start.unwrap_or((end, self.cursor.header().epoch.clone()));
        let mut epochs: Vec<EpochEntry> = Vec::new();
        for found in &self.inventory.segments {
            if epochs.last().is_none_or(|last| last.id != found.header.epoch.id) {
                epochs.push(found.header.epoch.clone());
            }
        }
        Ok(Scan {
            identity: self.params.identity,
            segments: self.inventory.segments.iter().map(Found::meta).collect(),
            epochs,
            end,
            stop,
            proven: self.proven,
            last_record: self.last_record,
            next_sequence: self.cursor.sequence(),
            tail_start,
            tail_epoch,
            tail: self.tail.into_iter().map(|(item, _)| item).collect(),
            stale: self.inventory.stale,
            beyond,
            damaged,
            next_number: self.inventory.next_number,
        })
    }
}
