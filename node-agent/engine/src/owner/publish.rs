//! The status and the log view as others see them.
//!
//! Invariant: of positions only what is true on stable storage is told to other members (P6): the log view ends at `durable`.

use super::Owner;
use crate::api::{DataState, LogView, MemberStatus, ReplicaStatus, Role, SegmentView, Switches};
use crate::lineage::Lineage;
use crate::store::Store;
use crate::types::{Designation, Lamport, Lsn, Position};

impl<S: Store> Owner<S> {
    pub(super) fn publish(&mut self) {
        self.status = self.compose_status();
        self.view = self.served_log();
    }

    /// The durable log, for those who read segment files themselves.
    pub(super) fn served_log(&self) -> LogView {
        let durable = self.log.durable();
        let segments = self
            .log
            .segments()
            .iter()
            .filter(|segment| segment.start.lsn <= durable.lsn);
        let segments = segments
            .map(|segment| SegmentView {
                name: segment.name,
                start: segment.start,
            })
            .collect();
        LogView {
            segments,
            durable,
            lineage: self.durable_lineage(),
        }
    }

    /// Epochs up to the one of the durable end: a later one is not proven to be on stable storage.
    fn durable_lineage(&self) -> Lineage {
        let epochs = &self.saved.lineage.0;
        let last = epochs.iter().position(|entry| entry.id == self.log.durable().epoch);
        Lineage(epochs[..last.map_or(0, |last| last + 1)].to_vec())
    }

    pub(super) fn compose_status(&self) -> ReplicaStatus {
        let saved = &self.saved;
        let members = saved.members.iter().map(|member| MemberStatus {
            replica: member.replica,
            durable: member.durable,
            orphaned: member.orphaned,
        });
        ReplicaStatus {
            role: self.role,
            data: saved.data.clone(),
            designation: saved.designation,
            size_bytes: self.size_bytes(),
            appended: self.log.appended(),
            durable: self.log.durable(),
            replayed: self.replay.cursor().lsn,
            applied: saved.applied,
            dirty_end: saved.dirty_end,
            log_start: self.log_start(),
            durable_time: self.durable_time,
            applied_time: saved.applied_time,
            lineage: self.durable_lineage(),
            switches: saved.switches.clone(),
            sync: self.sync_progress(),
            // Told only once its `Close` is on stable storage: the successor's orders rest on it (P6).
            released: saved
                .released
                .filter(|released| self.role == Role::Secondary && released.end.lsn <= self.log.durable().lsn),
            faults: self.faults.list().to_vec(),
            overlay_bytes: self.overlay.memory_bytes(),
            log_bytes: self.log_bytes(),
            resumable: self.resumable,
            members: members.collect(),
        }
    }

    /// Before anything was told.
    pub(super) fn first_status(mut self) -> Self {
        self.publish();
        self.changed = true;
        self
    }

    /// Length of all segments that hold log (bytes).
    pub(super) fn content_bytes(&self) -> u64 {
        self.log.segments().iter().map(|segment| segment.file_bytes).sum()
    }

    /// Length of all files of the log: segments, the prepared one, those that wait to become segments again (bytes).
    pub(super) fn log_bytes(&self) -> u64 {
        self.content_bytes() + self.log.prepared_bytes() + self.segments.spare_bytes()
    }

    /// Where the log that is served begins.
    pub(super) fn log_start(&self) -> Lsn {
        self.log
            .segments()
            .first()
            .map_or(self.log.durable().lsn, |first| first.start.lsn)
    }
}

/// Stands in until the first status is composed, within `open`.
pub(super) fn blank_status() -> ReplicaStatus {
    ReplicaStatus {
        role: Role::Secondary,
        data: DataState::Syncing,
        designation: Designation::default(),
        size_bytes: 0,
        appended: Position::default(),
        durable: Position::default(),
        replayed: Lsn::ZERO,
        applied: Position::default(),
        dirty_end: Position::default(),
        log_start: Lsn::ZERO,
        durable_time: Lamport::default(),
        applied_time: Lamport::default(),
        lineage: Lineage::default(),
        switches: Switches::default(),
        sync: None,
        released: None,
        faults: Vec::new(),
        overlay_bytes: 0,
        log_bytes: 0,
        resumable: None,
        members: Vec::new(),
    }
}
