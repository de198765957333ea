//! Between the engine's messages and their form on the wire.
//!
//! Invariant: nothing that comes in is trusted to be complete or well-formed; whatever does not convert is refused with the name
//! of the field.

use mars_engine::api::{Compression, DataState, Role};
use mars_engine::lineage::{Cause, EpochEntry, Lineage};
use mars_engine::replication::ChunkClaim;
use mars_engine::replication::codec::{self, Packed};
use mars_engine::replication::messages::{FetchItem, Followed, Header, PeerStatus, Refused};
use mars_engine::types::{Chain, Designation, EpochId, Lamport, Lsn, Position, ReplicaId};
use prost::bytes::Bytes;
use uuid::Uuid;

#[path = "wire_copy.rs"]
mod copy;

pub(super) use copy::{digests_in, digests_out, offer_in, offer_out, range, run_in, run_out, want_in, want_out};

/// The generated code.
#[expect(
    unreachable_pub,
    clippy::pedantic,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated from proto/replication.proto"
)]
pub(super) mod pb {
    tonic::include_proto!("mars.replication.v1");
}

/// Longest lineage that is believed: one entry is some 150 bytes, and one arises per change of primary.
const MAX_LINEAGE: usize = 100_000;

/// A message that makes no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub struct Malformed(pub &'static str);

fn uuid(bytes: &Bytes, field: &'static str) -> Result<Uuid, Malformed> {
    Uuid::from_slice(bytes).map_err(|_| Malformed(field))
}

fn bytes(uuid: Uuid) -> Bytes {
    Bytes::copy_from_slice(uuid.as_bytes())
}

/// A replica id.
///
/// # Errors
/// [`Malformed`] unless it has 16 bytes.
pub(super) fn replica(bytes: &Bytes) -> Result<ReplicaId, Malformed> {
    uuid(bytes, "replica id").map(ReplicaId)
}

impl From<Position> for pb::Position {
    fn from(position: Position) -> Self {
        Self {
            epoch: bytes(position.epoch.0),
            lsn: position.lsn.0,
            chain: Bytes::copy_from_slice(&position.chain.0),
        }
    }
}

impl TryFrom<&pb::Position> for Position {
    type Error = Malformed;

    fn try_from(position: &pb::Position) -> Result<Self, Malformed> {
        let chain = position.chain.as_ref().try_into().map_err(|_| Malformed("chain"))?;
        Ok(Self {
            epoch: EpochId(uuid(&position.epoch, "epoch")?),
            lsn: Lsn(position.lsn),
            chain: Chain(chain),
        })
    }
}

/// A position that must be there.
///
/// # Errors
/// [`Malformed`].
pub(super) fn position(position: Option<&pb::Position>) -> Result<Position, Malformed> {
    position.ok_or(Malformed("position"))?.try_into()
}

impl From<Designation> for pb::Designation {
    fn from(designation: Designation) -> Self {
        Self {
            number: designation.number,
            id: bytes(designation.id),
        }
    }
}

fn designation(designation: Option<&pb::Designation>) -> Result<Designation, Malformed> {
    let designation = designation.ok_or(Malformed("designation"))?;
    Ok(Designation {
        number: designation.number,
        id: uuid(&designation.id, "designation")?,
    })
}

impl From<&EpochEntry> for pb::EpochEntry {
    fn from(entry: &EpochEntry) -> Self {
        Self {
            id: bytes(entry.id.0),
            parent: Some(entry.parent.into()),
            origin: bytes(entry.origin.0),
            cause: entry.cause as u32,
            lamport: entry.lamport.0,
        }
    }
}

impl TryFrom<&pb::EpochEntry> for EpochEntry {
    type Error = Malformed;

    fn try_from(entry: &pb::EpochEntry) -> Result<Self, Malformed> {
        let cause = match entry.cause {
            1 => Cause::Create,
            2 => Cause::Handover,
            3 => Cause::Failover,
            4 => Cause::Recovery,
            5 => Cause::EmergencyExit,
            _ => return Err(Malformed("cause of an epoch")),
        };
        Ok(Self {
            id: EpochId(uuid(&entry.id, "epoch")?),
            parent: position(entry.parent.as_ref())?,
            origin: replica(&entry.origin)?,
            cause,
            lamport: Lamport(entry.lamport),
        })
    }
}

/// A history, oldest epoch first.
#[must_use]
pub(super) fn lineage_out(lineage: &Lineage) -> Vec<pb::EpochEntry> {
    lineage.0.iter().map(Into::into).collect()
}

/// A history, oldest epoch first.
///
/// # Errors
/// [`Malformed`].
pub(super) fn lineage_in(entries: &[pb::EpochEntry]) -> Result<Lineage, Malformed> {
    if entries.len() > MAX_LINEAGE {
        return Err(Malformed("lineage is too long"));
    }
    entries
        .iter()
        .map(TryInto::try_into)
        .collect::<Result<_, _>>()
        .map(Lineage)
}

/// A compression.
#[must_use]
pub(super) fn compression_out(compression: Compression) -> i32 {
    match compression {
        Compression::None => pb::Compression::None,
        Compression::Lz4 => pb::Compression::Lz4,
        Compression::Zstd => pb::Compression::Zstd,
    }
    .into()
}

/// A compression.
///
/// # Errors
/// [`Malformed`] when this version does not know it.
pub(super) fn compression_in(number: i32) -> Result<Compression, Malformed> {
    match pb::Compression::try_from(number).map_err(|_| Malformed("compression"))? {
        pb::Compression::None => Ok(Compression::None),
        pb::Compression::Lz4 => Ok(Compression::Lz4),
        pb::Compression::Zstd => Ok(Compression::Zstd),
    }
}

impl From<&Header> for pb::Header {
    fn from(header: &Header) -> Self {
        Self {
            version: header.version,
            cluster: bytes(header.cluster.0),
            resource: bytes(header.resource.0),
            from_replica: bytes(header.from.0),
            to_replica: bytes(header.to.0),
            lamport: header.lamport.0,
        }
    }
}

/// A header that must be there.
///
/// # Errors
/// [`Malformed`].
pub(super) fn header(header: Option<&pb::Header>) -> Result<Header, Malformed> {
    let header = header.ok_or(Malformed("header"))?;
    Ok(Header {
        version: header.version,
        cluster: mars_engine::types::ClusterId(uuid(&header.cluster, "cluster")?),
        resource: mars_engine::types::ResourceId(uuid(&header.resource, "resource")?),
        from: replica(&header.from_replica)?,
        to: replica(&header.to_replica)?,
        lamport: Lamport(header.lamport),
    })
}

fn role_out(role: Role) -> i32 {
    match role {
        Role::Secondary => pb::Role::Secondary,
        Role::Promoting => pb::Role::Promoting,
        Role::Primary => pb::Role::Primary,
        Role::Closing => pb::Role::Closing,
    }
    .into()
}

fn role_in(number: i32) -> Result<Role, Malformed> {
    match pb::Role::try_from(number) {
        Ok(pb::Role::Secondary) => Ok(Role::Secondary),
        Ok(pb::Role::Promoting) => Ok(Role::Promoting),
        Ok(pb::Role::Primary) => Ok(Role::Primary),
        Ok(pb::Role::Closing) => Ok(Role::Closing),
        Ok(pb::Role::Unspecified) | Err(_) => Err(Malformed("role")),
    }
}

fn data_out(data: &DataState) -> i32 {
    match data {
        DataState::Consistent => pb::DataState::Consistent,
        DataState::Syncing => pb::DataState::Syncing,
        DataState::LogLost => pb::DataState::LogLost,
    }
    .into()
}

fn data_in(number: i32) -> Result<DataState, Malformed> {
    match pb::DataState::try_from(number) {
        Ok(pb::DataState::Consistent) => Ok(DataState::Consistent),
        Ok(pb::DataState::Syncing) => Ok(DataState::Syncing),
        Ok(pb::DataState::LogLost) => Ok(DataState::LogLost),
        Ok(pb::DataState::Unspecified) | Err(_) => Err(Malformed("data state")),
    }
}

/// A status with its header.
#[must_use]
pub(super) fn status_out(header: &Header, status: &PeerStatus) -> pb::StatusMessage {
    pb::StatusMessage {
        header: Some(header.into()),
        role: role_out(status.role),
        data: data_out(&status.data),
        designation: Some(status.designation.into()),
        durable: Some(status.durable.into()),
        durable_time: status.durable_time.0,
        applied: Some(status.applied.into()),
        applied_time: status.applied_time.0,
        dirty_end: status.dirty_end.0,
        log_start: status.log_start.0,
        size_bytes: status.size_bytes,
        lineage: lineage_out(&status.lineage),
        follows: status.follows.as_ref().map(|followed| pb::Followed {
            leader: bytes(followed.leader.0),
            designation: Some(followed.designation.into()),
            durable: Some(followed.durable.into()),
            durable_time: followed.durable_time.0,
            lineage: lineage_out(&followed.lineage),
        }),
        refused: None,
    }
}

/// The status in a message; the header is looked at by the caller.
///
/// # Errors
/// [`Malformed`].
pub(super) fn status_in(message: &pb::StatusMessage) -> Result<PeerStatus, Malformed> {
    let followed = |followed: &pb::Followed| {
        Ok(Followed {
            leader: replica(&followed.leader)?,
            designation: designation(followed.designation.as_ref())?,
            durable: position(followed.durable.as_ref())?,
            durable_time: Lamport(followed.durable_time),
            lineage: lineage_in(&followed.lineage)?,
        })
    };
    Ok(PeerStatus {
        role: role_in(message.role)?,
        data: data_in(message.data)?,
        designation: designation(message.designation.as_ref())?,
        durable: position(message.durable.as_ref())?,
        durable_time: Lamport(message.durable_time),
        applied: position(message.applied.as_ref())?,
        applied_time: Lamport(message.applied_time),
        dirty_end: Lsn(message.dirty_end),
        log_start: Lsn(message.log_start),
        size_bytes: message.size_bytes,
        lineage: lineage_in(&message.lineage)?,
        follows: message.follows.as_ref().map(followed).transpose()?,
    })
}

impl From<Refused> for pb::Refused {
    fn from(refused: Refused) -> Self {
        use pb::refused::{self as r, Reason};
        let reason = match refused {
            Refused::WrongCluster { ours, theirs } => Reason::WrongCluster(r::WrongCluster {
                ours: bytes(ours.0),
                theirs: bytes(theirs.0),
            }),
            Refused::NotMember { detail } => Reason::NotMember(r::NotMember { detail }),
            Refused::Version { min, max } => Reason::Version(r::Version { min, max }),
            Refused::ClockAhead { ahead_s } => Reason::ClockAhead(r::ClockAhead { ahead_s }),
            Refused::Unprovable { at, have } => Reason::Unprovable(r::Unprovable {
                at: Some(at.into()),
                have,
            }),
            Refused::Fork {
                at,
                since,
                caller_bytes,
                source_bytes,
            } => Reason::Fork(r::Fork {
                at: at.0,
                since: since.0,
                caller_bytes,
                source_bytes,
            }),
            Refused::TooOld { at, log_start } => Reason::TooOld(r::TooOld {
                at: at.0,
                log_start: log_start.0,
            }),
            Refused::Behind { at, durable } => Reason::Behind(r::Behind {
                at: at.0,
                durable: durable.0,
            }),
            Refused::Inconsistent { state } => Reason::Inconsistent(r::Inconsistent {
                state: data_out(&state),
            }),
            Refused::SessionLost => Reason::SessionLost(r::SessionLost {}),
            Refused::Defect { at, message, stop: _ } => Reason::Defect(r::Defect { at: at.0, message }),
            Refused::Io { message } => Reason::Io(r::Io { message }),
            Refused::Busy { message } => Reason::Busy(r::Busy { message }),
        };
        Self { reason: Some(reason) }
    }
}

impl TryFrom<&pb::Refused> for Refused {
    type Error = Malformed;

    fn try_from(refused: &pb::Refused) -> Result<Self, Malformed> {
        use pb::refused::Reason;
        Ok(match refused.reason.as_ref().ok_or(Malformed("reason of a refusal"))? {
            Reason::WrongCluster(r) => Self::WrongCluster {
                ours: mars_engine::types::ClusterId(uuid(&r.ours, "cluster")?),
                theirs: mars_engine::types::ClusterId(uuid(&r.theirs, "cluster")?),
            },
            Reason::NotMember(r) => Self::NotMember {
                detail: r.detail.clone(),
            },
            Reason::Version(r) => Self::Version { min: r.min, max: r.max },
            Reason::ClockAhead(r) => Self::ClockAhead { ahead_s: r.ahead_s },
            Reason::Unprovable(r) => Self::Unprovable {
                at: position(r.at.as_ref())?,
                have: r.have.clone(),
            },
            Reason::Fork(r) => Self::Fork {
                at: Lsn(r.at),
                since: Lamport(r.since),
                caller_bytes: r.caller_bytes,
                source_bytes: r.source_bytes,
            },
            Reason::TooOld(r) => Self::TooOld {
                at: Lsn(r.at),
                log_start: Lsn(r.log_start),
            },
            Reason::Behind(r) => Self::Behind {
                at: Lsn(r.at),
                durable: Lsn(r.durable),
            },
            Reason::Inconsistent(r) => Self::Inconsistent {
                state: data_in(r.state)?,
            },
            Reason::SessionLost(_) => Self::SessionLost,
            Reason::Defect(r) => Self::Defect {
                at: Lsn(r.at),
                message: r.message.clone(),
                stop: None,
            },
            Reason::Io(r) => Self::Io {
                message: r.message.clone(),
            },
            Reason::Busy(r) => Self::Busy {
                message: r.message.clone(),
            },
        })
    }
}

/// An item of a fetch; records are packed and perhaps compressed.
#[must_use]
pub(super) fn item_out(item: FetchItem, compression: Compression) -> pb::fetch_message::Item {
    use pb::fetch_message::Item;
    match item {
        FetchItem::Proven { at } => Item::Proven(at.into()),
        FetchItem::Epoch(entry) => Item::Epoch((&entry).into()),
        FetchItem::Idle { durable } => Item::IdleDurable(durable.into()),
        FetchItem::Records(claim) => {
            let packed = codec::pack(&claim.records, compression);
            Item::Records(pb::Records {
                start: Some(claim.start.into()),
                end: Some(claim.end.into()),
                compression: compression_out(packed.compression),
                raw_bytes: packed.raw_bytes as u64,
                packed: packed.bytes,
            })
        }
    }
}

/// What came instead of an item.
#[derive(Debug, thiserror::Error)]
pub(super) enum ItemError {
    /// Makes no sense.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// Records that do not unpack.
    #[error(transparent)]
    Codec(#[from] codec::CodecError),
    /// The source says no.
    #[error("the source {0}")]
    Refused(Refused),
}

/// An item of a fetch. Nothing is proven yet.
///
/// # Errors
/// See [`ItemError`].
pub(super) fn item_in(item: pb::fetch_message::Item) -> Result<FetchItem, ItemError> {
    use pb::fetch_message::Item;
    Ok(match item {
        Item::Proven(at) => FetchItem::Proven { at: (&at).try_into()? },
        Item::Epoch(entry) => FetchItem::Epoch((&entry).try_into()?),
        Item::IdleDurable(durable) => FetchItem::Idle {
            durable: (&durable).try_into()?,
        },
        Item::Refused(refused) => return Err(ItemError::Refused((&refused).try_into()?)),
        Item::Records(records) => {
            let packed = Packed {
                compression: compression_in(records.compression)?,
                raw_bytes: usize::try_from(records.raw_bytes).map_err(|_| Malformed("raw size"))?,
                bytes: records.packed,
            };
            FetchItem::Records(ChunkClaim {
                start: position(records.start.as_ref())?,
                end: position(records.end.as_ref())?,
                records: codec::unpack(&packed)?,
            })
        }
    })
}

#[cfg(test)]
#[path = "wire_tests.rs"]
mod tests;
