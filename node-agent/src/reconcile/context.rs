//! What all replicas of a node share.

use super::cache::Cache;
use super::object::TuningDefaults;
use super::peers::LineEnd;
use super::sink::Sink;
use crate::frontend::FrontendChoice;
use crate::identity::BootId;
use crate::layout::Layout;
use crate::pool::Pools;
use crate::replication::clock::SharedClock;
use crate::shard::{ReplicaHandle, Runtime};
use mars_crds::MarsReplicaStatus;
use mars_engine::store_fs::FsStore;
use mars_engine::types::{ClusterId, NodeId, ReplicaId, ResourceId};
use serde::Serialize;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// A replica of this node, as replication needs it.
#[derive(Clone)]
pub struct LocalReplica {
    /// Name of the resource; for people.
    pub name: String,
    /// The resource.
    pub resource: ResourceId,
    /// The replica.
    pub replica: ReplicaId,
    /// Its engine.
    pub handle: ReplicaHandle,
    /// Its files: segments are served from here, beside the owner.
    pub store: FsStore,
}

/// Ends the membership of a replica when dropped: nothing is served, fetched or told any more.
pub type Membership = Box<dyn std::any::Any + Send + Sync>;

/// Replication, as the reconciler sees it.
pub trait Replication: Send + Sync {
    /// Lets a replica take part.
    fn join(&self, replica: LocalReplica, line: LineEnd) -> Membership;
}

/// Bytes per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Growth of the durable log: writes of a primary, fetch of a secondary.
    pub log: u64,
    /// Progress of the data disk along the log.
    pub apply: u64,
    /// Data compared by a sync.
    pub sync: u64,
}

/// Everything shown of a replica on its node; the live form of its status.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaView {
    /// Name of the resource.
    pub resource: String,
    /// The resource.
    pub resource_uuid: Uuid,
    /// The replica.
    pub replica_uuid: Uuid,
    /// Wished role.
    pub wish: &'static str,
    /// Live status.
    pub status: MarsReplicaStatus,
    /// How fast things move.
    pub rates: Rates,
    /// Payload held in memory (bytes).
    pub overlay_bytes: u64,
    /// Log on disk (bytes).
    pub log_bytes: u64,
    /// Lamport time of the last durable record (nanoseconds).
    pub durable_lamport_ns: u64,
    /// Why nothing is fetched or copied, if so.
    pub replication_waits: String,
}

/// All views of a node; changes wake whoever watches.
pub type Views = BTreeMap<ReplicaId, Arc<ReplicaView>>;

/// What all replicas of a node share.
pub struct NodeContext {
    /// Name of the node.
    pub node_name: String,
    /// Directories.
    pub layout: Layout,
    /// The node.
    pub node: NodeId,
    /// The cluster.
    pub cluster: ClusterId,
    /// This boot.
    pub boot: BootId,
    /// Storage pools.
    pub pools: Mutex<Pools>,
    /// Specs and tombstones.
    pub cache: Cache,
    /// Where reports go.
    pub sink: Sink,
    /// Threads of engines and devices.
    pub runtime: Runtime,
    /// Other nodes.
    pub replication: Arc<dyn Replication>,
    /// What stamps messages and records of this node.
    pub clock: Arc<SharedClock>,
    /// How devices are made.
    pub frontend: FrontendChoice,
    /// Budgets.
    pub tuning: TuningDefaults,
    /// How long members may object to a resumed role.
    pub resume_ask: Duration,
    /// Ends everything.
    pub stop: CancellationToken,
    /// What is shown.
    pub views: watch::Sender<Views>,
}

impl NodeContext {
    /// The pools; held for as long as one disk is claimed, on a blocking thread.
    pub fn pools(&self) -> MutexGuard<'_, Pools> {
        self.pools.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
