//! The target side of a copy: writes without a log record, allowed only while the data says Syncing in both slots.
//!
//! Invariants: nothing is written before the announcement is durable (P5, P11); progress is saved only after the data disk was
//! flushed; the waypoint is never before what any source may have had on its disk when a block was read from it, and lies in its history.

use super::restart::Restart;
use super::saver::Generation;
use super::{Owner, Purpose};
use crate::api::{CommandId, DataState, Fault, Refusal, Role, SyncProgress};
use crate::jobs::Job;
use crate::lineage::{Cause, Lineage};
use crate::state::{SavedSync, Waypoint};
use crate::store::Store;
use crate::types::{ByteRange, Lsn, Position, ReplicaId, SECTOR_BYTES};
use crate::writeback::Extent;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;

/// What is to be saved once the data disk is flushed.
#[derive(Debug, Clone, Copy)]
enum After {
    Checkpoint { done_bytes: u64 },
    Finish { dirty_end: Position },
}

/// The state of a copy beside what is saved of it.
#[derive(Debug, Default)]
pub(super) struct Target {
    flushing: Option<(CommandId, After)>,
    /// What was written and not flushed is being written again.
    refreshing: bool,
    /// Every write of this copy since its last checkpoint was seen to succeed, and no flush has failed: what the disk reads as is what it will
    /// hold. Not so at first: what an earlier process saw is unknown.
    is_trusted: bool,
    /// Writes that wait until `written_to` is on stable storage.
    announced: VecDeque<(Generation, SyncWrite)>,
    /// A checkpoint that is being saved, and the one before (device offset, bytes).
    unsaved: Option<(Generation, u64)>,
    /// Payload written since progress was saved last (bytes).
    moved_bytes: u64,
    writing: usize,
}

/// One write of a copy.
#[derive(Debug)]
struct SyncWrite {
    id: CommandId,
    extent: Extent,
    moved_bytes: u64,
}

const DISTRUSTED: &str = "a write or flush of this copy failed: begin the sync again";
/// `written_to` moves in steps of this (bytes): a copy costs one slot write per step.
const ANNOUNCE_BYTES: u64 = 256 << 20;

impl Target {
    pub(super) fn is_busy(&self) -> bool {
        self.flushing.is_some() || self.refreshing
    }

    /// A copy begins from nothing: there is nothing to distrust.
    pub(super) fn begun(&mut self) {
        self.is_trusted = true;
        self.unsaved = None;
    }
}

/// The later of two positions of one history.
fn later(one: Position, other: Position) -> Position {
    if other.lsn > one.lsn { other } else { one }
}

impl<S: Store> Owner<S> {
    /// Decides how a sync begins: `None` = the one under way goes on where it is.
    pub(super) fn plan_sync(
        &mut self,
        (source, start): (ReplicaId, Position),
        lineage: Lineage,
        size_bytes: u64,
        log_start: Lsn,
    ) -> Result<Option<Restart>, Refusal> {
        if self.saved.data != DataState::Syncing {
            // It may have become consistent since the copy was thought to be needed.
            return Err(Refusal::Invalid(format!(
                "the data here is {:?} and not to be copied: invalidate it first, if it may be thrown away",
                self.saved.data
            )));
        }
        let Some(last) = lineage.0.last().filter(|last| last.id == start.epoch) else {
            return Err(Refusal::Invalid(
                "the source's history does not end in the epoch of its position".into(),
            ));
        };
        if size_bytes > self.disk_bytes {
            let disk = self.disk_bytes;
            // It may have been enlarged since: the next try knows.
            self.job(Purpose::DiskSize, Job::Size(self.data.clone()));
            return Err(Refusal::Invalid(format!(
                "the local disk has {disk} bytes, the source {size_bytes}: enlarge it first"
            )));
        }
        if let Some(sync) = self
            .saved
            .sync
            .filter(|_| self.saved.data == DataState::Syncing && self.saved.waypoint.is_none())
            && self.log.durable().lsn >= log_start
            && self.may_continue(&sync, source, start, &lineage)
        {
            let floor = if source == sync.source {
                sync.floor
            } else {
                later(sync.floor, last.parent)
            };
            let epoch = last.id;
            self.save(|saved| {
                saved.sync = Some(SavedSync {
                    source,
                    epoch,
                    floor,
                    ..sync
                });
            });
            return Ok(None);
        }
        let sync = SavedSync {
            source,
            epoch: last.id,
            done_bytes: 0,
            total_bytes: size_bytes,
            moved_bytes: 0,
            floor: start,
            written_to: 0,
        };
        Ok(Some(Self::restart_for_sync(start, lineage, sync, size_bytes)))
    }

    /// Progress survives when what the earlier source had on its disk is certain to be part of this source's history: the same source
    /// (nothing reaches a disk before it is durable), or a new one that took over by a handover, after the `Close`. And its disk must
    /// not be older than where the local log begins: records before that are nowhere to be replayed from.
    fn may_continue(&self, sync: &SavedSync, source: ReplicaId, start: Position, lineage: &Lineage) -> bool {
        if start.lsn < self.saved.applied.lsn {
            return false;
        }
        let Some(index) = lineage.0.iter().position(|entry| entry.id == sync.epoch) else {
            return false;
        };
        let since = &lineage.0[index + 1..];
        let ours = self.log.appended();
        let is_ours = lineage.0.iter().any(|entry| entry.id == ours.epoch);
        let handed_over = since.last().is_some_and(|last| last.origin == source)
            && lineage.0[index].origin == sync.source
            && since.iter().all(|entry| entry.cause == Cause::Handover);
        let same = source == sync.source
            && since
                .iter()
                .all(|entry| matches!(entry.cause, Cause::Handover | Cause::Recovery));
        is_ours && (same || handed_over)
    }

    fn check_copying(&self) -> Result<SavedSync, Refusal> {
        if self.role != Role::Secondary || self.operation.is_some() {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "not while another operation is under way",
            });
        }
        match self.saved.sync {
            Some(sync) if self.saved.data == DataState::Syncing && self.saved.waypoint.is_none() => Ok(sync),
            _ => Err(Refusal::Invalid("no copy is under way: begin a sync first".into())),
        }
    }

    pub(super) fn sync_write(&mut self, id: CommandId, range: ByteRange, data: Option<Bytes>) {
        let sync = match self.check_copying() {
            Ok(sync) => sync,
            Err(refusal) => return self.refuse(id, refusal),
        };
        let aligned = range.offset.is_multiple_of(SECTOR_BYTES) && range.len.is_multiple_of(SECTOR_BYTES);
        let inside = range
            .offset
            .checked_add(range.len)
            .is_some_and(|end| end <= sync.total_bytes);
        let fits = data.as_ref().is_none_or(|data| data.len() as u64 == range.len);
        if !aligned || !inside || !fits {
            let message = format!(
                "bytes {}..+{} do not fit the device of {}",
                range.offset, range.len, sync.total_bytes
            );
            return self.refuse(id, Refusal::Invalid(message));
        }
        if !self.sync.is_trusted {
            return self.refuse(id, Refusal::Invalid(DISTRUSTED.into()));
        }
        self.sync.writing += 1;
        let moved_bytes = data.as_ref().map_or(0, |data| data.len() as u64);
        let extent = match data {
            Some(data) => Extent::Bytes {
                offset: range.offset,
                parts: vec![data],
            },
            None => Extent::Zeros(range),
        };
        let generation = self.announce_writes(sync, range.end());
        let write = SyncWrite {
            id,
            extent,
            moved_bytes,
        };
        self.sync.announced.push_back((generation, write));
        self.moved = true;
    }

    /// Saves that blocks up to `end` may have been written; says which save must be done before they are.
    fn announce_writes(&mut self, sync: SavedSync, end: u64) -> Generation {
        if end > sync.written_to {
            let written_to = end.next_multiple_of(ANNOUNCE_BYTES).min(sync.total_bytes);
            return self.save(|saved| saved.sync = Some(SavedSync { written_to, ..sync }));
        }
        // Perhaps announced by a save that is still under way.
        self.sync.announced.back().map_or(0, |(generation, _)| *generation)
    }

    /// Writes what is announced.
    pub(super) fn step_sync(&mut self) {
        while let Some((_, write)) = self
            .sync
            .announced
            .pop_front_if(|(generation, _)| self.saver.is_durable(*generation))
        {
            let SyncWrite {
                id,
                extent,
                moved_bytes,
            } = write;
            if let Err(refusal) = self.check_copying() {
                self.sync.writing -= 1;
                self.refuse(id, refusal);
                continue;
            }
            let job = Job::Write {
                disk: self.data.clone(),
                extents: vec![extent],
                flush: false,
            };
            self.job(Purpose::SyncWrite { id, moved_bytes }, job);
        }
    }

    /// A copy goes on. A flush that failed leaves blocks in memory that count as clean and are not on the disk: whatever was written and
    /// not flushed before is read and written once more, so that comparing with the source, and the next flush, tell the truth.
    pub(super) fn go_on_with_sync(&mut self, id: CommandId) {
        let unflushed = self.saved.sync.map(|sync| ByteRange {
            offset: sync.done_bytes,
            len: sync.written_to.saturating_sub(sync.done_bytes),
        });
        if let Some(range) = unflushed.filter(|range| range.len > 0 && !self.sync.is_trusted) {
            self.sync.refreshing = true;
            let disk = self.data.clone();
            return self.job(Purpose::SyncRefresh { id }, Job::Refresh { disk, range });
        }
        self.sync.is_trusted = true;
        let generation = self.saver.request();
        self.done_when_saved(id, generation);
    }

    /// Progress as it would survive a crash now.
    pub(super) fn sync_progress(&self) -> Option<SyncProgress> {
        let mut progress = self.saved.sync?.progress(self.saved.waypoint);
        if let Some((_, done_before)) = self.sync.unsaved {
            progress.done_bytes = done_before;
        }
        Some(progress)
    }

    /// Slots were saved: a checkpoint in them may be told.
    pub(super) fn checkpoint_saved(&mut self) {
        if self
            .sync
            .unsaved
            .take_if(|(generation, _)| self.saver.is_durable(*generation))
            .is_some()
        {
            self.changed = true;
        }
    }

    pub(super) fn sync_refreshed(&mut self, id: CommandId, result: io::Result<()>) {
        self.sync.refreshing = false;
        match result {
            Ok(()) => {
                self.sync.is_trusted = true;
                let generation = self.saver.request();
                self.done_when_saved(id, generation);
            }
            Err(error) => self.copy_failed(id, &error),
        }
    }

    pub(super) fn sync_written(&mut self, id: CommandId, moved_bytes: u64, result: io::Result<()>) {
        self.sync.writing -= 1;
        self.sync.moved_bytes += moved_bytes;
        match result {
            Ok(()) => self.done(id),
            Err(error) => self.copy_failed(id, &error),
        }
    }

    fn copy_failed(&mut self, id: CommandId, error: &io::Error) {
        self.sync.is_trusted = false;
        let message = format!("writing a copy to the data disk: {error}");
        self.changed |= self.faults.set(Fault::DataDiskFailed {
            message: message.clone(),
        });
        self.refuse(id, Refusal::Io(message));
    }

    pub(super) fn sync_checkpoint(&mut self, id: CommandId, done_bytes: u64) {
        self.flush_then(id, After::Checkpoint { done_bytes });
    }

    pub(super) fn finish_sync(&mut self, id: CommandId, dirty_end: Position) {
        self.flush_then(id, After::Finish { dirty_end });
    }

    fn flush_then(&mut self, id: CommandId, after: After) {
        if let Err(refusal) = self.check_copying() {
            return self.refuse(id, refusal);
        }
        if !self.sync.is_trusted {
            return self.refuse(id, Refusal::Invalid(DISTRUSTED.into()));
        }
        if self.sync.is_busy() || self.sync.writing > 0 {
            return self.refuse(id, Refusal::Invalid("wait for the replies to all writes first".into()));
        }
        self.sync.flushing = Some((id, after));
        let flush = Job::Write {
            disk: self.data.clone(),
            extents: Vec::new(),
            flush: true,
        };
        self.job(Purpose::SyncFlush, flush);
    }

    pub(super) fn sync_flushed(&mut self, result: io::Result<()>) {
        let Some((id, after)) = self.sync.flushing.take() else {
            unreachable!("a flush was under way")
        };
        if let Err(error) = result {
            // What was written since the last checkpoint is in doubt: see `go_on_with_sync`.
            return self.copy_failed(id, &error);
        }
        self.changed |= self.faults.clear(|fault| matches!(fault, Fault::DataDiskFailed { .. }));
        let moved_bytes = std::mem::take(&mut self.sync.moved_bytes);
        let cursor = self.replay.cursor();
        let done_before = self.saved.sync.map_or(0, |sync| sync.done_bytes);
        let generation = self.save(|saved| {
            let Some(sync) = &mut saved.sync else { return };
            sync.moved_bytes += moved_bytes;
            match after {
                After::Checkpoint { done_bytes } => sync.done_bytes = done_bytes.min(sync.total_bytes),
                After::Finish { dirty_end } => {
                    sync.done_bytes = sync.total_bytes;
                    let mut waypoint = Waypoint {
                        at: later(dirty_end, sync.floor),
                        passed: false,
                    };
                    waypoint.visit(cursor);
                    saved.waypoint = Some(waypoint);
                }
            }
        });
        self.sync.unsaved = Some((generation, done_before));
        self.done_when_saved(id, generation);
        self.consistency_may_have_come();
    }
}
