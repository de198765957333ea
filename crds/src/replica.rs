//! `MarsReplica`: one node's copy. `spec` is the order of the operator, `status` the report of that node's agent.
//!
//! Invariant: each half has one writer; neither is inferred from the other. Positions in `status` are durable ones only.

#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive copies each struct into a function body"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::common::{
    Backing, Compression, DataPolicy, DesignationRef, Durability, DurationText, GrantCause, HistoryPosition, Lag,
    OneShot, RateLimits, Retention, Switches,
};

/// The role that is granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WishRole {
    /// Serve the device, under `designation`.
    Primary,
    /// Follow.
    #[default]
    Secondary,
}

/// The role that is a fact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActualRole {
    /// Follows; no device.
    Secondary,
    /// Replays what is local, then starts an epoch; no device yet.
    Promoting,
    /// Accepts requests.
    Primary,
    /// Has stopped accepting and makes its `Close` durable.
    Closing,
}

/// State of the data of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReplicaData {
    /// Nothing here yet: waits for `Create`, or for a source to sync from.
    Blank,
    /// Data disk plus local log from the applied position is a state the primary once had.
    Consistent,
    /// A full or partial copy is needed or under way.
    Syncing,
    /// The log ended below what may have been written back: needs a sync.
    LogLost,
    /// A known replica whose disk, directory or pool is absent. Never recreated.
    Missing,
    /// Forgotten while its node was away: kept, not announced, not erased.
    Quarantined,
}

/// The order of the operator to one agent.
#[derive(CustomResource, Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "mars.storage",
    version = "v1alpha1",
    kind = "MarsReplica",
    plural = "marsreplicas",
    singular = "marsreplica",
    shortname = "marsrep",
    category = "storage",
    status = "MarsReplicaStatus",
    derive = "PartialEq",
    doc = "The copy of a MarsResource on one node. Made by the operator; not meant to be edited.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "RESOURCE", type_ = "string", json_path = ".spec.resource"),
    printcolumn(name = "NODE", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "WISH", type_ = "string", json_path = ".spec.role"),
    printcolumn(name = "ROLE", type_ = "string", json_path = ".status.role"),
    printcolumn(name = "DATA", type_ = "string", json_path = ".status.dataState"),
    printcolumn(name = "STATE", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "DURABLE", type_ = "integer", json_path = ".status.positions.durable.lsn"),
    printcolumn(name = "APPLIED", type_ = "integer", json_path = ".status.positions.applied"),
    printcolumn(name = "LAG-BYTES", type_ = "integer", json_path = ".status.lag.bytes"),
    printcolumn(name = "LAG-SECONDS", type_ = "integer", json_path = ".status.lag.seconds"),
    printcolumn(name = "SYNC%", type_ = "integer", json_path = ".status.sync.percent"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(
        name = "REPLAYED",
        type_ = "integer",
        json_path = ".status.positions.replayed",
        priority = 1
    ),
    printcolumn(
        name = "LOG-START",
        type_ = "integer",
        json_path = ".status.positions.logStart",
        priority = 1
    ),
    printcolumn(name = "AS-OF", type_ = "date", json_path = ".status.lag.asOf", priority = 1),
    printcolumn(name = "DEVICE", type_ = "string", json_path = ".status.device.path", priority = 1),
    printcolumn(
        name = "DESIGNATION",
        type_ = "integer",
        json_path = ".spec.designation.number",
        priority = 1
    )
)]
#[x_kube(
    validation = Rule::new("self.resource == oldSelf.resource && self.node == oldSelf.node && self.resourceUuid == oldSelf.resourceUuid && self.replicaUuid == oldSelf.replicaUuid")
        .message("resource, node, resourceUuid and replicaUuid are immutable"),
    validation = Rule::new("self.sizeBytes >= oldSelf.sizeBytes").message("sizeBytes never shrinks"),
    validation = Rule::new("!has(oldSelf.designation) || (has(self.designation) && self.designation.number >= oldSelf.designation.number)")
        .message("the designation number never goes back"),
    validation = Rule::new("self.role != 'Primary' || has(self.designation)").message("a grant of the primary role needs a designation")
)]
#[serde(rename_all = "camelCase")]
pub struct MarsReplicaSpec {
    /// Name of the `MarsResource`.
    #[schemars(length(min = 1, max = 63))]
    pub resource: String,
    /// Name of the node.
    #[schemars(length(min = 1, max = 253))]
    pub node: String,
    /// Identity of the resource; made by the operator.
    pub resource_uuid: Uuid,
    /// Identity of this incarnation of the replica; made by the operator.
    pub replica_uuid: Uuid,
    /// Size of the device (bytes).
    #[schemars(range(min = 65537))]
    pub size_bytes: i64,
    /// The data disk.
    pub backing: Backing,
    /// Use the disk although it carries a foreign signature.
    #[serde(default)]
    pub overwrite: bool,
    /// This replica has had data: if its agent finds none it reports `Missing` and never starts afresh.
    #[serde(default)]
    pub established: bool,
    /// Granted role.
    #[serde(default)]
    pub role: WishRole,
    /// The newest designation, whoever it names; absent before the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub designation: Option<DesignationRef>,
    /// Whom `designation` names, and whose history counts; absent when nobody was ever designated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub designated: Option<Designated>,
    /// Why the primary role is granted; meaningful with `role: Primary`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<GrantCause>,
    /// Handover or demotion: close under `designation`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub close_for: Option<CloseFor>,
    /// The predecessor's released end: with `cause: Handover`, promote when exactly this is durable here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handover_end: Option<HistoryPosition>,
    /// All other members.
    #[serde(default)]
    #[schemars(length(max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub peers: Vec<Peer>,
    /// What this replica shall do.
    #[serde(default)]
    pub switches: Switches,
    /// Replay each record only when it is this old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = crate::common::DURATION_PATTERN))]
    pub apply_delay: Option<DurationText>,
    /// When a completed write must be on stable storage.
    #[serde(default)]
    pub durability: Durability,
    /// Compression of log and transfer.
    #[serde(default)]
    pub compression: Compression,
    /// How long log is kept for members that stay away.
    #[serde(default)]
    pub retention: Retention,
    /// Rate limits.
    #[serde(default)]
    pub limits: RateLimits,
    /// Throw away log and claim of consistency and sync afresh; done once per id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub invalidate: Option<OneShot>,
    /// Believe that the data equals the source's without comparing; done once per id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fake_sync: Option<OneShot>,
    /// Continue in a new log segment; done once per id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate_log: Option<OneShot>,
    /// What the deletion of this object does with the data.
    #[serde(default)]
    pub data_policy: DataPolicy,
}

/// Whom a designation names, and how to know the history to follow when that replica does not answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Designated {
    /// The replica that shall be primary; absent: nobody shall.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica_uuid: Option<Uuid>,
    /// While a handover or demotion is under way: the replica whose history is followed until the successor has begun its epoch.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<Uuid>,
    /// The newest epoch that the replica to follow (`predecessor`, else `replicaUuid`) has reported as its own: members whose
    /// history goes through it may stand in for that replica.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epoch: Option<Uuid>,
}

/// An order to close. Absent `replicaUuid`: a plain demotion.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CloseFor {
    /// Successor.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica_uuid: Option<Uuid>,
}

/// Another member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Peer {
    /// Name of its node.
    pub node: String,
    /// Identity of its node, once its agent has reported it; what its certificate must carry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_uuid: Option<Uuid>,
    /// Its replica.
    pub replica_uuid: Uuid,
    /// host:port of its agent; empty until reported.
    #[serde(default)]
    pub address: String,
}

/// Durable positions of a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Positions {
    /// End of the local log on stable storage.
    pub durable: HistoryPosition,
    /// How far the data disk is written and flushed.
    pub applied: i64,
    /// How far write-back may have begun.
    pub dirty_end: i64,
    /// Oldest position still served from the local log.
    pub log_start: i64,
    /// How far the log is loaded for apply.
    #[serde(default)]
    pub replayed: i64,
}

/// One stay of one replica in the primary role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Epoch {
    /// Its identity.
    pub epoch: Uuid,
    /// Where it continues.
    pub parent: HistoryPosition,
    /// The replica that was primary.
    pub origin: Uuid,
    /// Create, Handover, Failover, Recovery or `EmergencyExit`.
    pub cause: String,
    /// When it began.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// Final word of a primary that has closed: the only thing that counts as a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Released {
    /// Designation under which it closed, first half.
    pub number: i64,
    /// Designation under which it closed, second half.
    pub uuid: Uuid,
    /// Successor; absent for a plain demotion.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<Uuid>,
    /// End of its history, the durable `Close` included.
    pub end: HistoryPosition,
}

/// What an agent does not carry out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RefusedOrder {
    /// It does not close: for instance because the device is in use.
    Close,
    /// It will never become primary under this designation, and has persisted that.
    Promote,
}

/// A refusal under one designation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Refused {
    /// What is refused.
    pub order: RefusedOrder,
    /// Designation, first half.
    pub number: i64,
    /// Designation, second half.
    pub uuid: Uuid,
    /// Cause and next command.
    pub reason: String,
    /// Persisted before it was reported: will be kept after any crash. Required of `Promote` for the role to go back.
    #[serde(default)]
    pub durable: bool,
}

/// The device as the kernel knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Device {
    /// Path for users (`/dev/mars/<resource>`).
    pub path: String,
    /// Device number, first half.
    pub major: i64,
    /// Device number, second half.
    pub minor: i64,
    /// Tells this device from a later one with the same number.
    #[serde(default)]
    pub diskseq: i64,
    /// ublk or loop.
    #[serde(default)]
    pub frontend: String,
}

/// Who has the device open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct User {
    /// process, mount, holder or swap; unknown while the agent cannot tell whether anybody uses the device, which counts as use.
    pub kind: String,
    /// Command name, mount point or device.
    pub name: String,
    /// Process id, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<i64>,
}

/// Progress of a sync.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SyncStatus {
    /// Whole percents compared.
    pub percent: i32,
    /// Compared so far (bytes).
    pub done_bytes: i64,
    /// To compare (bytes).
    pub total_bytes: i64,
    /// Transferred (bytes).
    pub moved_bytes: i64,
    /// Source.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<Uuid>,
}

/// A history that forks from this replica's, as its agent has found it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Fork {
    /// With whom.
    pub with: Uuid,
    /// Where.
    pub lsn: i64,
    /// When the histories parted, as far as known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Bytes only this replica has.
    pub ours_bytes: i64,
    /// Bytes only the other has.
    pub theirs_bytes: i64,
    /// `oursBytes` is a lower bound: the end of the log found after a restart has not been made durable again yet.
    #[serde(default)]
    pub ours_at_least: bool,
    /// `theirsBytes` is a lower bound, as last heard: the other does not answer, and may have written on.
    #[serde(default)]
    pub theirs_at_least: bool,
    /// Seconds between the fork and this replica's last write; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ours_seconds: Option<i64>,
    /// Seconds between the fork and the other's last write, as far as it has told; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub theirs_seconds: Option<i64>,
}

/// Contact with another member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerContact {
    /// Its replica.
    pub replica_uuid: Uuid,
    /// Its node.
    #[serde(default)]
    pub node: String,
    /// Whether a connection stands.
    pub connected: bool,
    /// When it last answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_contact: Option<Time>,
}

/// The report of the agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MarsReplicaStatus {
    /// Generation of the spec that has been read and acted upon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Actual role.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<ActualRole>,
    /// State of the data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data_state: Option<ReplicaData>,
    /// In a word, for people: Primary, Replaying, Syncing, `PausedFetch`, Orphan, `SplitBrain` …
    pub state: String,
    /// The highest designation persisted here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub designation: Option<DesignationRef>,
    /// The designation under which this replica is (or was last) primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub primary_under: Option<DesignationRef>,
    /// Boot of the machine under which this was reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// Identity of the node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_uuid: Option<Uuid>,
    /// Incarnation that this report is about: a report of another one than `spec.replicaUuid` is a late one and does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replica_uuid: Option<Uuid>,
    /// Size of the device as of the applied position (bytes).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// Size of the data disk (bytes): what the device could grow to here.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<i64>,
    /// Durable positions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub positions: Option<Positions>,
    /// History, oldest first; at most the newest 64 epochs.
    #[schemars(length(max = 64))]
    pub lineage: Vec<Epoch>,
    /// How far behind the primary's durable end, by this replica's own knowledge.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<Lag>,
    /// A sync that is needed or under way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync: Option<SyncStatus>,
    /// Set while the trailing record is a `Close`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub released: Option<Released>,
    /// What is refused at present.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refused>,
    /// The device, while there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<Device>,
    /// Users of the device.
    pub opened_by: Vec<User>,
    /// Id of the last `invalidate` that was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub invalidated: Option<Uuid>,
    /// Id of the last `fakeSync` that was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fake_synced: Option<Uuid>,
    /// Id of the last `rotateLog` that was done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_rotated: Option<Uuid>,
    /// Forks found.
    pub forks: Vec<Fork>,
    /// Contact with the other members.
    pub peers: Vec<PeerContact>,
    /// Each with cause and next command.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
