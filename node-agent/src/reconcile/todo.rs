//! What the operator wants of one replica, in the engine's terms.
//!
//! Invariant: a [`Todo`] is complete and valid. It is made from a whole `MarsReplica` only (from the API, from the cache on
//! disk, or from a file), so all three take the same path.

use crate::pool::backing::BackingWish;
use mars_engine::api::{Switches, Tuning};
use mars_engine::types::{Designation, EpochId, NodeId, Position, ReplicaId, ResourceId};
use uuid::Uuid;

/// Why the primary role is granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GrantCause {
    /// The resource starts its life here.
    Create,
    /// The predecessor has closed at exactly this position.
    Handover {
        /// Its released end; `None` when the operator did not say: then there is nothing to wait for, and no promotion.
        end: Option<Position>,
    },
    /// Take over with what is here.
    Failover,
}

/// The role that is wished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// Be primary.
    Primary {
        /// The fencing token.
        designation: Designation,
        /// Why.
        cause: GrantCause,
    },
    /// Follow; a primary closes or steps down when the designation is newer than its own.
    Secondary {
        /// The newest designation; it names somebody else, or nobody.
        designation: Option<Designation>,
        /// An order to close with a `Close` record: for this successor, or (inner `None`) for nobody.
        close_for: Option<Option<ReplicaId>>,
    },
}

impl Grant {
    /// The designation that came with it.
    #[must_use]
    pub fn designation(&self) -> Option<Designation> {
        match *self {
            Grant::Primary { designation, .. } => Some(designation),
            Grant::Secondary { designation, .. } => designation,
        }
    }
}

/// Whom the designation of the [`Grant`] names, and whose history counts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Designated {
    /// The replica that shall be primary; `None`: nobody, or the operator did not say.
    pub replica: Option<ReplicaId>,
    /// The one that is followed until a handover or demotion is complete.
    pub predecessor: Option<ReplicaId>,
    /// The newest epoch that the followed one has begun, as far as the operator knows.
    pub epoch: Option<EpochId>,
}

/// Another member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerTodo {
    /// Name of its node; for people.
    pub node: String,
    /// What its certificate must say; `None` until its agent has reported.
    pub node_id: Option<NodeId>,
    /// Its replica.
    pub replica: ReplicaId,
    /// `host:port`; empty until its agent has reported.
    pub address: String,
}

/// Rate limits (bytes per second); `None`: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// Log transfer.
    pub fetch_bytes_per_second: Option<u64>,
    /// Copying.
    pub sync_bytes_per_second: Option<u64>,
}

/// Orders that are done once per id.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OneShots {
    /// Throw away log and claim of consistency.
    pub invalidate: Option<Uuid>,
    /// Believe the data is equal.
    pub fake_sync: Option<Uuid>,
    /// Continue in a new segment.
    pub rotate: Option<Uuid>,
}

/// What a deletion does with the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataPolicy {
    /// Stays.
    Retain,
    /// Goes.
    Delete,
}

/// Everything wanted of one replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Todo {
    /// Name of the `MarsReplica`.
    pub name: String,
    /// Generation of its spec.
    pub generation: i64,
    /// Name of the resource: a DNS label, also the name of the device link.
    pub resource: String,
    /// Identity of the resource.
    pub resource_id: ResourceId,
    /// Identity of the replica.
    pub replica: ReplicaId,
    /// Size of the device (bytes).
    pub size_bytes: u64,
    /// The data disk.
    pub backing: BackingWish,
    /// A foreign signature on it may be overwritten.
    pub overwrite: bool,
    /// The operator knows that this replica has held data.
    pub established: bool,
    /// The role.
    pub grant: Grant,
    /// Whom its designation names.
    pub designated: Designated,
    /// All other members.
    pub peers: Vec<PeerTodo>,
    /// Whether a primary shall have a device.
    pub attach: bool,
    /// Fetch, replay, sync, apply delay.
    pub switches: Switches,
    /// Durability, compression, budgets.
    pub tuning: Tuning,
    /// Rate limits.
    pub limits: Limits,
    /// One-shot orders.
    pub one_shots: OneShots,
    /// Set when the object is being deleted.
    pub deletion: Option<DataPolicy>,
}
