//! What members say to each other, as plain data. `node-agent/proto/replication.proto` is its form on the wire.
//!
//! Invariants: every message names cluster, resource, sender and receiver and carries a Lamport stamp ([`Header`]);
//! positions in messages are durable ones (P6).

use crate::api::{Compression, DataState, ReplicaStatus, Role};
use crate::lineage::{EpochEntry, Lineage};
use crate::log::Stop;
use crate::replication::chunk::ChunkClaim;
use crate::types::{ByteRange, ClusterId, Designation, Lamport, Lsn, NodeId, Position, ReplicaId, ResourceId};
use bytes::Bytes;

/// Oldest protocol version this code speaks.
pub const PROTOCOL_MIN: u32 = 1;
/// Newest protocol version this code speaks.
pub const PROTOCOL_MAX: u32 = 1;

/// The newest version that both sides speak.
#[must_use]
pub fn negotiate(peer_min: u32, peer_max: u32) -> Option<u32> {
    let newest = PROTOCOL_MAX.min(peer_max);
    (newest >= PROTOCOL_MIN.max(peer_min)).then_some(newest)
}

/// First message on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Oldest version the caller speaks.
    pub version_min: u32,
    /// Newest version the caller speaks.
    pub version_max: u32,
    /// The caller's cluster.
    pub cluster: ClusterId,
    /// The caller.
    pub node: NodeId,
    /// When it was sent.
    pub lamport: Lamport,
}

/// Leads every message after [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Negotiated protocol version.
    pub version: u32,
    /// Cluster of the sender.
    pub cluster: ClusterId,
    /// What it is about.
    pub resource: ResourceId,
    /// The sending replica.
    pub from: ReplicaId,
    /// The replica it is meant for.
    pub to: ReplicaId,
    /// When it was sent.
    pub lamport: Lamport,
}

/// What a member tells all others about itself, whenever it changes and at least every few seconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Actual role.
    pub role: Role,
    /// Whether its data disk may be copied from.
    pub data: DataState,
    /// Highest designation it knows.
    pub designation: Designation,
    /// End of its durable log.
    pub durable: Position,
    /// Lamport time of its last durable record.
    pub durable_time: Lamport,
    /// How far its data disk is written and flushed.
    pub applied: Position,
    /// Lamport time of its last applied record.
    pub applied_time: Lamport,
    /// How far its write-back may have begun.
    pub dirty_end: Lsn,
    /// Oldest position it still serves.
    pub log_start: Lsn,
    /// Size of its device (bytes).
    pub size_bytes: u64,
    /// Its history.
    pub lineage: Lineage,
    /// Whose history it follows: lets members learn the primary's history when they cannot reach it.
    pub follows: Option<Followed>,
}

/// The primary as a member last heard of it, directly or from another member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Followed {
    /// The primary.
    pub leader: ReplicaId,
    /// Its designation.
    pub designation: Designation,
    /// Its durable end.
    pub durable: Position,
    /// Lamport time of its last durable record.
    pub durable_time: Lamport,
    /// Its history.
    pub lineage: Lineage,
}

impl PeerStatus {
    /// What may be told of a replica: nothing that is not durable.
    #[must_use]
    pub fn of(status: &ReplicaStatus, follows: Option<Followed>) -> Self {
        Self {
            role: status.role,
            data: status.data.clone(),
            designation: status.designation,
            durable: status.durable,
            durable_time: status.durable_time,
            applied: status.applied,
            applied_time: status.applied_time,
            dirty_end: status.dirty_end.lsn,
            log_start: status.log_start,
            size_bytes: status.size_bytes,
            lineage: status.lineage.clone(),
            follows,
        }
    }
}

/// A secondary asks for log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchOpen {
    /// The durable end of the caller's log: the sender proves that it has exactly this.
    pub from: Position,
    /// The caller's history up to there.
    pub lineage: Lineage,
    /// Send nothing beyond (a fork, or the end of a handover).
    pub until: Option<Lsn>,
    /// How chunks may be compressed.
    pub compression: Compression,
}

/// Why a member gives no log, or no data. Every text says what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Another cluster.
    #[error("belongs to cluster {ours}, not to {theirs}: check the address of this peer")]
    WrongCluster {
        /// Of the refusing side.
        ours: ClusterId,
        /// Of the asking side.
        theirs: ClusterId,
    },
    /// The resource, the replica incarnation or the caller is not known here.
    #[error(
        "is not a member together with the caller: {detail}; wait for the operator to announce it, or remove the stale side"
    )]
    NotMember {
        /// Which part did not match.
        detail: String,
    },
    /// No common version.
    #[error("speaks protocol versions {min} to {max}: update the older agent")]
    Version {
        /// Oldest that the refusing side speaks.
        min: u32,
        /// Newest that the refusing side speaks.
        max: u32,
    },
    /// A Lamport stamp more than the allowed slip ahead of the wall clock.
    #[error("saw a time stamp {ahead_s} s ahead of its clock: correct the clock of the sending node")]
    ClockAhead {
        /// By how much (seconds).
        ahead_s: u64,
    },
    /// The position is not in this member's history although its epoch is: the bytes differ.
    #[error("cannot prove {at}: its own history has {have} there; a sync is needed (invalidate the caller)")]
    Unprovable {
        /// What was asked.
        at: Position,
        /// What there is at this LSN, as text.
        have: String,
    },
    /// The caller's history forks from this member's.
    #[error(
        "history forks at {at}: the caller has {caller_bytes} bytes beyond it, this member {source_bytes}; resolve the split brain"
    )]
    Fork {
        /// The last common position.
        at: Lsn,
        /// When the histories parted: start of the later epoch.
        since: Lamport,
        /// Bytes that only the caller has.
        caller_bytes: u64,
        /// Bytes that only this member has.
        source_bytes: u64,
    },
    /// Older than what is still there.
    #[error(
        "keeps log from {log_start} on, the caller is at {at}: ask another member, or sync (invalidate the caller)"
    )]
    TooOld {
        /// What was asked.
        at: Lsn,
        /// Oldest position that is served.
        log_start: Lsn,
    },
    /// The caller has more than this member.
    #[error("has log up to {durable}, less than the caller at {at}: ask another member")]
    Behind {
        /// What was asked.
        at: Lsn,
        /// What there is.
        durable: Lsn,
    },
    /// Its data is itself not consistent.
    #[error("is itself not consistent ({state:?}): sync from another member")]
    Inconsistent {
        /// Its state.
        state: DataState,
    },
    /// The sync session is over here: its source was restarted or lost consistency.
    #[error("does not know this sync session any more: open it again")]
    SessionLost,
    /// Its own log is damaged: never shipped (P10).
    #[error("has a defect in its log at {at} ({message}): ask another member")]
    Defect {
        /// Where reading stopped.
        at: Lsn,
        /// What was found.
        message: String,
        /// The same for the member itself, which names it; it does not travel.
        stop: Option<Stop>,
    },
    /// Something failed on its machine.
    #[error("failed to read: {message}")]
    Io {
        /// What the system said.
        message: String,
    },
    /// Too many requests at once.
    #[error("is busy: {message}; try again")]
    Busy {
        /// With what.
        message: String,
    },
}

/// What flows after a successful [`FetchOpen`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FetchItem {
    /// First: the sender has found exactly the asked position in its own log.
    Proven {
        /// The position, as found.
        at: Position,
    },
    /// The history goes on in this epoch, which starts where the stream is.
    Epoch(EpochEntry),
    /// The next records.
    Records(ChunkClaim),
    /// Nothing to send just now; keeps the stream alive.
    Idle {
        /// The sender's durable end.
        durable: Position,
    },
}

/// A target asks to copy from this member's data disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncOpen {
    /// The target's durable log end, default if it has none.
    pub durable: Position,
}

/// What the source offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SyncOffer {
    /// Names the session: valid while the source stays consistent and its agent runs.
    pub session: u64,
    /// Everything up to here is on the source's data disk; its log from here on is kept for the target.
    pub applied: Position,
    /// History up to the source's durable end.
    pub lineage: Lineage,
    /// Durable end of the source.
    pub durable: Position,
    /// Oldest position of the source's log.
    pub log_start: Lsn,
    /// Size of the source's device (bytes).
    pub size_bytes: u64,
}

/// Summary of a stretch of data disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RegionDigest {
    /// All zeros, or a hole.
    Zero,
    /// BLAKE3 of the bytes.
    Hash([u8; 32]),
}

/// Asks for the digests of a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DigestRequest {
    /// From [`SyncOffer`].
    pub session: u64,
    /// The span; starts at a region boundary.
    pub span: ByteRange,
}

/// One digest per region of the span, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DigestReply {
    /// The digests.
    pub regions: Vec<RegionDigest>,
}

/// What the target needs of one region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegionWant {
    /// The region.
    pub range: ByteRange,
    /// The target's own block digests (first 16 bytes of BLAKE3), in order: only blocks that differ are sent. Empty:
    /// the target holds only zeros there.
    pub have: Vec<[u8; 16]>,
}

/// Asks for the blocks that differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlocksRequest {
    /// From [`SyncOffer`].
    pub session: u64,
    /// The regions.
    pub regions: Vec<RegionWant>,
    /// How the answer may be compressed.
    pub compression: Compression,
}

/// A stretch of blocks that differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockRun {
    /// Where.
    pub range: ByteRange,
    /// The bytes; `None` means zeros.
    pub data: Option<Bytes>,
}

/// The blocks that differ, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlocksReply {
    /// The stretches.
    pub runs: Vec<BlockRun>,
}

/// Answer to the end of a sync, taken after the last block was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SyncEnd {
    /// No byte that was read is younger than this; provable, so that the copy cannot be taken for one of another history.
    pub dirty_end: Position,
    /// Size of the source's device now (bytes).
    pub size_bytes: u64,
}

/// Why a header is not accepted.
///
/// # Errors
/// [`Refused`]: another cluster, resource or incarnation, or an unknown version.
pub fn check_header(header: &Header, ours: &Header, members: &[ReplicaId]) -> Result<(), Refused> {
    if header.version < PROTOCOL_MIN || header.version > PROTOCOL_MAX {
        return Err(Refused::Version {
            min: PROTOCOL_MIN,
            max: PROTOCOL_MAX,
        });
    }
    if header.cluster != ours.cluster {
        return Err(Refused::WrongCluster {
            ours: ours.cluster,
            theirs: header.cluster,
        });
    }
    let detail = if header.resource != ours.resource {
        format!("resource {} is not served here", header.resource)
    } else if header.to != ours.from {
        format!("replica {} is not the one that lives here ({})", header.to, ours.from)
    } else if !members.contains(&header.from) {
        format!(
            "replica {} is not a member of resource {}",
            header.from, header.resource
        )
    } else {
        return Ok(());
    };
    Err(Refused::NotMember { detail })
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn header() -> Header {
        Header {
            version: 1,
            cluster: ClusterId(Uuid::from_u128(1)),
            resource: ResourceId(Uuid::from_u128(2)),
            from: ReplicaId(Uuid::from_u128(3)),
            to: ReplicaId(Uuid::from_u128(4)),
            lamport: Lamport(5),
        }
    }

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(negotiate(PROTOCOL_MIN, PROTOCOL_MAX + 3), Some(PROTOCOL_MAX));
        assert_eq!(negotiate(PROTOCOL_MAX + 1, PROTOCOL_MAX + 3), None);
        assert_eq!(negotiate(0, PROTOCOL_MIN - 1), None);
    }

    #[test]
    fn a61_a_header_of_another_cluster_resource_or_incarnation_is_refused() {
        let theirs = header();
        let ours = Header {
            from: theirs.to,
            to: theirs.from,
            ..theirs
        };
        let members = [theirs.from];
        assert_eq!(check_header(&theirs, &ours, &members), Ok(()));
        let other = Uuid::from_u128(99);
        let wrong_cluster = Header {
            cluster: ClusterId(other),
            ..theirs
        };
        assert!(matches!(
            check_header(&wrong_cluster, &ours, &members),
            Err(Refused::WrongCluster { .. })
        ));
        for wrong in [
            Header {
                resource: ResourceId(other),
                ..theirs
            },
            Header {
                to: ReplicaId(other),
                ..theirs
            },
            Header {
                from: ReplicaId(other),
                ..theirs
            },
        ] {
            assert!(matches!(
                check_header(&wrong, &ours, &members),
                Err(Refused::NotMember { .. })
            ));
        }
        let wrong_version = Header {
            version: PROTOCOL_MAX + 1,
            ..theirs
        };
        assert!(matches!(
            check_header(&wrong_version, &ours, &members),
            Err(Refused::Version { .. })
        ));
    }
}
