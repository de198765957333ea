//! What a replica remembers across restarts beside log and data: the content of a slot.
//!
//! Invariants: `applied ≤ dirty_end ≤ durable` at the time of saving; a position is saved only when it is true on stable
//! storage already. Fields that this version does not know are refused, never dropped: the slot header carries the version.

use crate::api::{DataState, Released, Switches, SyncProgress, Tuning};
use crate::lineage::Lineage;
use crate::types::{ByteRange, ClusterId, Designation, EpochId, Lamport, Lsn, Position, ReplicaId, ResourceId};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The role to come back to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SavedRole {
    /// Follows.
    Secondary,
    /// Was primary under this designation.
    Primary {
        /// The grant it had then.
        granted: Designation,
    },
}

/// Where the local log begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogOrigin {
    /// Segments with lower numbers are not part of it: thrown away by an invalidation, whether removed already or not.
    pub first_segment: u32,
    /// Where the first segment of this log began, when it was begun.
    pub start: Position,
    /// Whether a segment has been there: then none at all means that the log store is missing.
    pub started: bool,
}

/// A member as retention sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMember {
    /// Who.
    pub replica: ReplicaId,
    /// Last report on our history.
    pub durable: Option<Position>,
    /// Log that it needs was given up.
    pub orphaned: bool,
}

/// A sync of which this replica is the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedSync {
    /// From whom.
    pub source: ReplicaId,
    /// Last epoch of the source's history when the copy (re)started or was taken over.
    pub epoch: EpochId,
    /// Everything below is equal (bytes).
    pub done_bytes: u64,
    /// What there is to compare (bytes).
    pub total_bytes: u64,
    /// Payload bytes written so far.
    pub moved_bytes: u64,
    /// Blocks copied from earlier sources may hold anything up to here: consistent not before replay has passed it.
    pub floor: Position,
    /// No block above this has been written (device offset, bytes). What lies between `done_bytes` and this may be in memory only, and
    /// called clean there after a flush that failed.
    pub written_to: u64,
}

/// A place in the history that replay must pass before the data means anything: the disk holds bytes from up to there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Waypoint {
    /// Exactly this: as many bytes of another history do not make the data whole.
    pub at: Position,
    /// Whether replay came through it.
    pub passed: bool,
}

impl Waypoint {
    /// Replay has come to `end`.
    pub fn visit(&mut self, end: Position) {
        self.passed |= (end.lsn, end.chain) == (self.at.lsn, self.at.chain);
    }

    /// Replay has come further than that without having come through it: this history never will.
    #[must_use]
    pub fn is_missed(&self, replayed: Lsn) -> bool {
        !self.passed && replayed > self.at.lsn
    }
}

impl SavedSync {
    /// The part that is shown.
    #[must_use]
    pub fn progress(&self, waypoint: Option<Waypoint>) -> SyncProgress {
        SyncProgress {
            done_bytes: self.done_bytes,
            total_bytes: self.total_bytes,
            moved_bytes: self.moved_bytes,
            consistent_at: waypoint.map(|waypoint| waypoint.at),
        }
    }
}

/// Emergency mode: reserved in the format from the start, empty until the mode exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedEmergency {
    /// End of the log before the hole.
    pub hole: Position,
    /// Extents written without a record.
    pub dirty: Vec<ByteRange>,
}

/// The content of a slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedState {
    /// Whose it is.
    pub cluster: ClusterId,
    /// Whose it is.
    pub resource: ResourceId,
    /// Whose it is.
    pub replica: ReplicaId,
    /// Boot of the node in which this was saved.
    pub boot_id: Uuid,
    /// The role to come back to.
    pub role: SavedRole,
    /// The highest designation ever seen, whoever it names.
    pub designation: Designation,
    /// Whether the data denotes a state that the primary once had.
    pub data: DataState,
    /// Size of the device as of `applied` (bytes).
    pub size_bytes: u64,
    /// How far the data disk is written and flushed.
    pub applied: Position,
    /// How far write-back may have begun.
    pub dirty_end: Position,
    /// How far the log was ever known to be on stable storage. If less is found, the log is damaged, not torn.
    pub durable: Lsn,
    /// Lamport time of the last applied record.
    pub applied_time: Lamport,
    /// The Lamport clock.
    pub clock: Lamport,
    /// Where the local log begins.
    pub log: LogOrigin,
    /// History up to the end of the log.
    pub lineage: Lineage,
    /// Wish side of the switches.
    pub switches: Switches,
    /// Durability, compression, budgets.
    pub tuning: Tuning,
    /// Members and their reports.
    pub members: Vec<SavedMember>,
    /// A sync under way, or complete and waiting for replay.
    pub sync: Option<SavedSync>,
    /// While the data is not consistent: what makes it so. Of a copy it is known once that is complete.
    pub waypoint: Option<Waypoint>,
    /// Its last word as a primary, while its `Close` is the end of the log.
    pub released: Option<Released>,
    /// Emergency mode with its dirty map.
    pub emergency: Option<SavedEmergency>,
}

impl SavedState {
    /// A replica that joins now: it has no history and its data means nothing until it is created or synced.
    #[must_use]
    pub fn new(
        (cluster, resource, replica): (ClusterId, ResourceId, ReplicaId),
        boot_id: Uuid,
        size_bytes: u64,
        tuning: Tuning,
    ) -> Self {
        SavedState {
            cluster,
            resource,
            replica,
            boot_id,
            role: SavedRole::Secondary,
            designation: Designation::default(),
            data: DataState::Syncing,
            size_bytes,
            applied: Position::default(),
            dirty_end: Position::default(),
            durable: Lsn::ZERO,
            applied_time: Lamport::default(),
            clock: Lamport::default(),
            log: LogOrigin {
                first_segment: 0,
                start: Position::default(),
                started: false,
            },
            lineage: Lineage::default(),
            switches: Switches::default(),
            tuning,
            members: Vec::new(),
            sync: None,
            waypoint: None,
            released: None,
            emergency: None,
        }
    }

    /// Takes note of a designation, unless a newer one was heard of meanwhile: it never goes down.
    pub fn learn(&mut self, designation: Designation) {
        if designation.number > self.designation.number {
            self.designation = designation;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Compression, Durability};

    fn state() -> SavedState {
        let tuning = Tuning {
            durability: Durability::OnFlush,
            compression: Compression::None,
            overlay_budget_bytes: 1 << 20,
            segment_bytes: 1 << 20,
            retention_bytes: 0,
        };
        SavedState::new(
            (ClusterId::default(), ResourceId::default(), ReplicaId::default()),
            Uuid::nil(),
            1 << 20,
            tuning,
        )
    }

    #[test]
    fn saved_state_round_trips() {
        let state = state();
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<SavedState>(&text).unwrap(), state);
    }

    #[test]
    fn unknown_and_missing_fields_are_refused() {
        let text = serde_json::to_string(&state()).unwrap();
        let unknown = text.replacen('{', "{\"fancy\":1,", 1);
        assert!(
            serde_json::from_str::<SavedState>(&unknown)
                .unwrap_err()
                .to_string()
                .contains("fancy")
        );
        let missing = text.replacen("\"applied_time\"", "\"clock\"", 1);
        assert!(serde_json::from_str::<SavedState>(&missing).is_err());
    }
}
