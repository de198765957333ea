//! The status and the log view as others see them.
//!
//! Invariant: of positions only what is true on stable storage is told to other members (P6): the log view ends at `durable`.

use super::Owner;
use crate::api::{LogView, MemberStatus, ReplicaStatus};
use crate::store::Store;
use crate::types::Lsn;

impl<S: Store> Owner<S> {
    pub(super) fn publish(&mut self) {
        self.status = self.compose_status();
        self.view = self.served_log();
    }

    /// The durable log, for those who read segment files themselves.
    pub(super) fn served_log(&self) -> LogView {
        let durable = self.log.durable();
        let segments = self.log.segments().iter().filter(|segment| segment.start.lsn <= durable.lsn).cloned().collect();
        LogView { segments, durable, lineage: self.durable_lineage() }
    }

    /// Epochs that begin at or before the durable end.
    fn durable_lineage(&self) -> crate::lineage::Lineage {
        let durable = self.log.durable().lsn;
        let known = self.saved.lineage.0.iter().filter(|entry| entry.parent.lsn <= durable);
        crate::lineage::Lineage(known.cloned().collect())
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
            dirty_end: saved.dirty_end.lsn,
            log_start: self.log_start(),
            durable_time: self.durable_time,
            applied_time: saved.applied_time,
            lineage: self.durable_lineage(),
            switches: saved.switches.clone(),
            sync: saved.sync.map(|sync| sync.progress()),
            released: self.released,
            faults: self.faults.list().to_vec(),
            overlay_bytes: self.overlay.memory_bytes(),
            log_bytes: self.log.bytes(),
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

    /// Where the log that is served begins.
    pub(super) fn log_start(&self) -> Lsn {
        self.log.segments().first().map_or(self.log.durable().lsn, |first| first.start.lsn)
    }
}
