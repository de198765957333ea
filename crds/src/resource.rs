//! `MarsResource`: one replicated block device, as the user wishes it and as the operator sees it.
//!
//! Invariants: the operator never writes `spec`; `status.designation` is changed only by updates conditioned on the
//! resourceVersion, and its number only grows.

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
    Backing, Compression, DataPolicy, DesignationRef, Durability, DurationText, HistoryPosition, Lag, RateLimits,
    Retention, Switches,
};
use crate::replica::{ActualRole, ReplicaData, WishRole};
use crate::size::Size;

/// One replicated block device: what the user wishes.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "mars.storage",
    version = "v1alpha1",
    kind = "MarsResource",
    plural = "marsresources",
    singular = "marsresource",
    shortname = "mars",
    category = "storage",
    status = "MarsResourceStatus",
    derive = "PartialEq",
    doc = "A block device that is replicated asynchronously to several nodes.",
    annotation("helm.sh/resource-policy", "keep"),
    validation = Rule::new("self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 63")
        .message("metadata.name must be a DNS label: at most 63 of a-z, 0-9 and '-', starting and ending with a letter or digit"),
    printcolumn(name = "PRIMARY", type_ = "string", json_path = ".status.primary", description = "Node that is primary now"),
    printcolumn(name = "WISH", type_ = "string", json_path = ".status.wish", description = "Node that shall be primary"),
    printcolumn(name = "STATE", type_ = "string", json_path = ".status.state"),
    printcolumn(name = "REPLICAS", type_ = "string", json_path = ".status.replicasReady", description = "Replicas up to date / all"),
    printcolumn(name = "LAG", type_ = "string", json_path = ".status.lagText", description = "Of the worst replica that is not held back on purpose"),
    printcolumn(name = "SIZE", type_ = "string", json_path = ".spec.size"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "DESIGNATION", type_ = "integer", json_path = ".status.designation.number", priority = 1),
    printcolumn(name = "UUID", type_ = "string", json_path = ".status.uuid", priority = 1)
)]
#[x_kube(
    validation = Rule::new("self.primary == '' || self.replicas.exists(r, r.node == self.primary)")
        .message("primary must be one of replicas[].node, or empty"),
    validation = Rule::new("!has(self.attachedTo) || self.attachedTo == '' || self.replicas.exists(r, r.node == self.attachedTo)")
        .message("attachedTo must be one of replicas[].node, or absent"),
    validation = Rule::new("isQuantity(string(self.size)) && quantity(string(self.size)).isInteger() && quantity(string(self.size)).asInteger() % 4096 == 0 && quantity(string(self.size)).asInteger() > 65536")
        .message("size must be a multiple of 4096 bytes and more than 64Ki"),
    validation = Rule::new("quantity(string(self.size)).compareTo(quantity(string(oldSelf.size))) >= 0")
        .message("size never shrinks: create a smaller resource and copy the data")
)]
#[serde(rename_all = "camelCase")]
pub struct MarsResourceSpec {
    /// Size of the device: a multiple of 4096 bytes, more than 64Ki. May only grow.
    pub size: Size,
    /// Node that shall be primary; empty: none. The wish of the user, never written by MARS.
    #[serde(default)]
    #[schemars(length(max = 253))]
    pub primary: String,
    /// Node to which the CSI driver has attached the volume; written by the CSI driver only. While set it wins over `primary`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub attached_to: Option<String>,
    /// The members.
    #[schemars(length(min = 1, max = 16))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub replicas: Vec<ReplicaMember>,
    /// When a completed write must be on stable storage.
    #[serde(default)]
    pub durability: Durability,
    /// Compression of log and transfer.
    #[serde(default)]
    pub compression: Compression,
    /// Recovery point objective: a replica further behind than this makes the resource Degraded. Never touches the data path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = crate::common::DURATION_PATTERN))]
    pub rpo: Option<DurationText>,
    /// Whether and when the operator fails over by itself.
    #[serde(default)]
    pub failover: Failover,
    /// How long log is kept for members that stay away.
    #[serde(default)]
    pub retention: Retention,
    /// Rate limits of each replica.
    #[serde(default)]
    pub limits: RateLimits,
    /// What deleting the resource, or removing a replica from it, does with the data.
    #[serde(default)]
    pub data_policy: DataPolicy,
}

/// One member of a resource.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(
    validation = Rule::new("has(self.device) != has(self.pool)").message("set exactly one of device and pool"),
    validation = Rule::new("!has(self.device) || !self.device.contains('..')").message("device must not contain '..'"),
    validation = Rule::new("has(self.device) == has(oldSelf.device) && (!has(self.device) || self.device == oldSelf.device)")
        .message("device is immutable: remove the replica, then add it with the other device"),
    validation = Rule::new("has(self.pool) == has(oldSelf.pool) && (!has(self.pool) || self.pool == oldSelf.pool)")
        .message("pool is immutable: remove the replica, then add it with the other pool")
)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaMember {
    /// Name of the node.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub node: String,
    /// An existing block device, by absolute path under /dev.
    #[schemars(length(max = 255), regex(pattern = r"^/dev/[A-Za-z0-9_+=:@.,/-]+$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// A pool of the node (`MarsNode.spec.pools`) in which the data disk is made.
    #[schemars(length(max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Use the disk although it carries a foreign signature.
    #[serde(default)]
    pub overwrite: bool,
    /// Replay each record only when it is this old.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = crate::common::DURATION_PATTERN))]
    pub apply_delay: Option<DurationText>,
    /// What this replica shall do.
    #[serde(default)]
    pub switches: Switches,
}

impl ReplicaMember {
    /// The backing as `MarsReplica.spec` carries it.
    #[must_use]
    pub fn backing(&self) -> Backing {
        Backing {
            device: self.device.clone(),
            pool: self.pool.clone(),
        }
    }
}

/// Whether the operator fails over by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FailoverPolicy {
    /// Only by a `MarsAction` of a person.
    #[default]
    Manual,
    /// Also when the primary's node is fenced (the Node that was there while its agent was heard is deleted or replaced, or has the
    /// out-of-service taint) and has not been heard of since.
    Automatic,
}

/// Failover policy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Failover {
    /// Manual or Automatic.
    pub policy: FailoverPolicy,
    /// How long the primary must have been silent, beyond the evidence of fencing; absent: 60s.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = crate::common::DURATION_PATTERN))]
    pub after: Option<DurationText>,
}

/// How a designation came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DesignationSource {
    /// First primary of a resource in which no replica has history.
    Create,
    /// Planned change of the primary.
    Handover,
    /// Planned end of the primary role, without successor.
    Demotion,
    /// Forced change of the primary.
    Failover,
    /// A handover was given up before the old primary had closed: the role goes back.
    Abort,
    /// The new primary has durably refused after the old one had closed: the role goes back.
    Reopen,
    /// Status was lost and is rebuilt from what the agents report.
    Readopt,
}

/// The one record that says who may be primary. Its number only grows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Designation {
    /// Fencing token, first half: only grows.
    pub number: i64,
    /// Fencing token, second half.
    pub uuid: Uuid,
    /// Designated node; empty: none.
    #[serde(default)]
    pub node: String,
    /// Designated replica; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_uuid: Option<Uuid>,
    /// How it came about.
    pub source: DesignationSource,
    /// Why, in words.
    #[serde(default)]
    pub reason: String,
    /// `spec.primary` as it was when it last counted: it counts again once it differs from this.
    #[serde(default)]
    pub wish_seen: String,
    /// `spec.attachedTo` as it was when it last counted; empty: none.
    #[serde(default)]
    pub attached_seen: String,
    /// `status.id` of the `MarsAction` that asked for it, if one did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub action: Option<Uuid>,
    /// Whom it follows: in a handover the old primary, which must close first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<Predecessor>,
    /// When it was recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

impl Designation {
    /// The fencing token of this record, as grants repeat it.
    #[must_use]
    pub fn token(&self) -> DesignationRef {
        DesignationRef {
            number: self.number,
            uuid: self.uuid,
        }
    }
}

/// The holder of the role before a designation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Predecessor {
    /// Its node.
    pub node: String,
    /// Its replica.
    pub replica_uuid: Uuid,
    /// End of its history, copied from its release; present once the release has been read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub released_end: Option<HistoryPosition>,
}

/// What is known about one member.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaSummary {
    /// Node.
    pub node: String,
    /// Incarnation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replica_uuid: Option<Uuid>,
    /// Role as granted.
    pub wish: WishRole,
    /// Role as reported; absent: not reported yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<ActualRole>,
    /// State of its data as reported.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<ReplicaData>,
    /// In a word.
    pub state: String,
    /// Whether its agent is heard.
    pub heard: bool,
    /// How far it is behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lag: Option<Lag>,
    /// Progress of a sync.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sync_percent: Option<i32>,
    /// uid of its Kubernetes Node, recorded while its agent was heard: what an automatic failover demands to be fenced. Absent: there
    /// was none, so there is never evidence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kube_node_uid: Option<String>,
}

/// Two histories that have parted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForkReport {
    /// One side.
    pub node: String,
    /// The other side.
    pub other: String,
    /// Where they part (byte position in the history).
    pub lsn: i64,
    /// When they parted, as far as known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// Bytes only `node` has.
    pub node_bytes: i64,
    /// Bytes only `other` has.
    pub other_bytes: i64,
    /// `nodeBytes` is a lower bound: as last heard of a node that may have written on.
    #[serde(default)]
    pub node_at_least: bool,
    /// `otherBytes` is a lower bound.
    #[serde(default)]
    pub other_at_least: bool,
    /// Seconds between the fork and the last write of `node`; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_seconds: Option<i64>,
    /// Seconds between the fork and the last write of `other`; absent while that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_seconds: Option<i64>,
}

/// What only the primary before a failover has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LeftBehind {
    /// Its node.
    pub node: String,
    /// Its replica.
    pub replica_uuid: Uuid,
    /// Number of the designation that was the failover.
    pub number: i64,
    /// Bytes that the primary of now does not have.
    pub bytes: i64,
    /// `bytes` is a lower bound, as last heard: the old primary has not answered since the failover.
    pub at_least: bool,
}

/// A replica that was given up by `ForgetNode`. When its node returns, the data is quarantined: never announced, never erased.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tombstone {
    /// The forgotten incarnation.
    pub replica_uuid: Uuid,
    /// Its node.
    pub node: String,
    /// When.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
}

/// What the operator knows; all of it can be rebuilt from the agents.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MarsResourceStatus {
    /// Generation of the spec this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Identity of the resource for its whole life; what `acknowledge` of a dangerous action must repeat.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// Who may be primary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub designation: Option<Designation>,
    /// Node(s) that report to be primary; several: a split brain.
    pub primary: String,
    /// Node that shall be primary at present.
    pub wish: String,
    /// In a word: Healthy, Creating, Syncing, `CatchingUp`, Switching, Degraded, `SplitBrain`, `NoPrimary`, Invalid, Deleting …
    pub state: String,
    /// Replicas up to date / all.
    pub replicas_ready: String,
    /// Lag in words.
    pub lag_text: String,
    /// Lag of the worst replica that is not held back on purpose.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lag: Option<Lag>,
    /// One entry per member.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["node"]))]
    pub replicas: Vec<ReplicaSummary>,
    /// Histories that have parted.
    pub forks: Vec<ForkReport>,
    /// After a failover: what only the primary before it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub left_behind: Option<LeftBehind>,
    /// Replicas given up by `ForgetNode`.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["replicaUuid"]))]
    pub tombstones: Vec<Tombstone>,
    /// Ready, Replicating, Synced, `SplitBrain`, Emergency, Switching, Degraded; each with cause and next command.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
