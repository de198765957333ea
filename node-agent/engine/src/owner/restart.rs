//! Throwing the log away: after an invalidation, and at the beginning of a sync.
//!
//! Invariant: both slots say so before anything is removed or overwritten – a fall-back to the older slot must not find a state
//! that still calls the data consistent (P5, P11).

use super::operation::Operation;
use super::saver::Generation;
use super::{Owner, Purpose};
use crate::api::{CommandId, DataState, Fault};
use crate::jobs::Job;
use crate::lineage::{Cause, EpochEntry, Lineage};
use crate::log::LogWriter;
use crate::log::writer::LogState;
use crate::state::{LogOrigin, SavedRole, SavedSync};
use crate::store::{FileId, SegmentName, Store};
use crate::types::{EpochId, Lamport, Position, ReplicaId};
use std::io;

/// The log is thrown away and begins anew.
#[derive(Debug, Default)]
pub(super) struct Restart {
    start: Position,
    lineage: Lineage,
    sync: Option<SavedSync>,
    size_bytes: Option<u64>,
    /// Segments of the old log.
    old: Vec<SegmentName>,
}

/// Where a restart of the log stands.
#[derive(Debug)]
pub(super) enum Restarting {
    /// Jobs that touch log or data come back first.
    Quiescing,
    /// The first slot is being written, then the second.
    SavingFirst(Generation),
    SavingSecond(Generation),
    /// The old segments are being removed.
    Removing,
}

/// Stands for "no epoch yet" in a log without history.
pub(super) fn blank_epoch(origin: ReplicaId) -> EpochEntry {
    let (id, parent, lamport) = (EpochId::default(), Position::default(), Lamport::default());
    EpochEntry {
        id,
        parent,
        origin,
        cause: Cause::Create,
        lamport,
    }
}

impl<S: Store> Owner<S> {
    pub(super) fn begin_restart(&mut self, id: CommandId, restart: Restart) -> Operation {
        self.refuse_inbound("its log is being thrown away");
        Operation::Restart {
            id,
            restart: Box::new(restart),
            stage: Restarting::Quiescing,
        }
    }

    pub(super) fn restart_for_sync(start: Position, lineage: Lineage, sync: SavedSync, size_bytes: u64) -> Restart {
        Restart {
            start,
            lineage,
            sync: Some(sync),
            size_bytes: Some(size_bytes),
            old: Vec::new(),
        }
    }

    /// Whether the log that is there is about to go: nothing more is loaded from it or written back.
    pub(super) fn is_discarding_log(&self) -> bool {
        matches!(self.operation, Some(Operation::Restart { .. }))
    }

    pub(super) fn step_restart(&mut self, id: CommandId, mut restart: Box<Restart>, stage: Restarting) -> Operation {
        let stage = match stage {
            Restarting::Quiescing => {
                if !self.is_quiet() {
                    return Operation::Restart { id, restart, stage };
                }
                Restarting::SavingFirst(self.save_restart(&mut restart))
            }
            Restarting::SavingFirst(generation) if self.saver.is_durable(generation) => {
                self.moved = true;
                Restarting::SavingSecond(self.saver.request())
            }
            Restarting::SavingSecond(generation) if self.saver.is_durable(generation) => {
                let old = std::mem::take(&mut restart.old)
                    .into_iter()
                    .map(FileId::Segment)
                    .collect();
                self.job(Purpose::Operation, Job::Remove(old));
                Restarting::Removing
            }
            waiting => waiting,
        };
        Operation::Restart { id, restart, stage }
    }

    /// No job is out that reads the log or writes anywhere but to a slot.
    pub(super) fn is_quiet(&self) -> bool {
        self.jobs
            .values()
            .all(|purpose| matches!(purpose, Purpose::Slot | Purpose::DiskSize | Purpose::Read { .. }))
            && self.repair.is_none()
            && self.flight.may_be_dropped()
    }

    pub(super) fn save_restart(&mut self, restart: &mut Restart) -> Generation {
        self.drop_overlay();
        restart.old = self.drop_log(restart.start, &restart.lineage);
        self.replay
            .reset(restart.start, restart.size_bytes.unwrap_or(self.saved.size_bytes));
        self.saved.released = None;
        self.trailing_close = None;
        self.resumable = None;
        self.defect_until = None;
        self.sync.begun();
        self.faults.clear(|fault| {
            matches!(
                fault,
                Fault::LogDefect { .. }
                    | Fault::BacklogDefect { .. }
                    | Fault::Fork { .. }
                    | Fault::Orphan { .. }
                    | Fault::DiskTooSmall { .. }
            )
        });
        let first_segment = self.log.next_number();
        let (start, lineage, sync) = (restart.start, restart.lineage.clone(), restart.sync);
        let size_bytes = self.replay.size_bytes();
        self.save(|saved| {
            saved.data = DataState::Syncing;
            saved.role = SavedRole::Secondary;
            (saved.sync, saved.waypoint) = (sync, None);
            saved.size_bytes = size_bytes;
            (saved.applied, saved.dirty_end, saved.durable) = (start, start, start.lsn);
            saved.log = LogOrigin {
                first_segment,
                start,
                started: false,
            };
            saved.lineage = lineage;
        })
    }

    /// Replaces the log by an empty one that begins at `start`; says which files were the old one.
    pub(super) fn drop_log(&mut self, start: Position, lineage: &Lineage) -> Vec<SegmentName> {
        let mut old: Vec<SegmentName> = self.log.segments().iter().map(|segment| segment.name).collect();
        old.extend(self.log.take_prepared());
        let epoch = lineage.0.last().cloned().unwrap_or_else(|| blank_epoch(self.replica));
        let state = LogState::empty(self.identity, self.log.next_number(), epoch, start);
        self.log = LogWriter::new(state, self.saved.tuning.compression);
        self.tail.clear();
        self.commit.settled_at(start.lsn);
        old
    }

    pub(super) fn operation_job_done(&mut self, result: io::Result<()>) {
        let Some(Operation::Restart { id, .. }) = self.operation.take() else {
            unreachable!("only a restart has jobs")
        };
        if let Err(error) = result {
            // They are not part of the log any more, whatever happens: the next start removes them.
            tracing::warn!(replica = %self.replica, %error, "removing old log segments failed");
        }
        self.changed = true;
        self.done(id);
    }
}
