//! `MarsNode`: a node that runs an agent. Made by the agent with an empty spec; `spec` belongs to the administrator,
//! except `spec.forgotten`, which the operator writes.
//!
//! Invariant: `status.replicas` is the complete inventory of replica data found on the node, whether or not a
//! `MarsReplica` exists for it: what makes a rebuilt control plane re-adopt instead of recreate (P12). The status is the agent's, but
//! for the condition `Silent`, by which the operator says that the agent has not been heard; the agent's next report removes it.

#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive copies each struct into a function body"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::common::DesignationRef;
use crate::replica::{ActualRole, ReplicaData};
use crate::size::Size;

/// What the administrator says about a node.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "mars.storage",
    version = "v1alpha1",
    kind = "MarsNode",
    plural = "marsnodes",
    singular = "marsnode",
    category = "storage",
    status = "MarsNodeStatus",
    derive = "PartialEq",
    doc = "A node that runs a MARS agent: pools, space, address, versions.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "STATE", type_ = "string", json_path = ".status.state"),
    printcolumn(
        name = "SILENT",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Silent\")].status"
    ),
    printcolumn(name = "ADDRESS", type_ = "string", json_path = ".status.address"),
    printcolumn(name = "FRONTEND", type_ = "string", json_path = ".status.frontend"),
    printcolumn(name = "LOG-FREE", type_ = "string", json_path = ".status.logStore.free"),
    printcolumn(name = "LEVEL", type_ = "integer", json_path = ".status.logStore.level"),
    printcolumn(name = "VERSION", type_ = "string", json_path = ".status.agentVersion"),
    printcolumn(name = "LAST-SEEN", type_ = "date", json_path = ".status.lastSeen"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase", default)]
pub struct MarsNodeSpec {
    /// Where data disks can be made.
    #[schemars(length(max = 32))]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub pools: Vec<Pool>,
    /// Limits of the node.
    pub limits: NodeLimits,
    /// Replicas given up by `ForgetNode`; written by the operator. Their data is quarantined.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["replicaUuid"]))]
    pub forgotten: Vec<Forgotten>,
}

/// A place in which data disks can be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = Rule::new("!self.directory.contains('..')").message("directory must not contain '..'"))]
#[serde(rename_all = "camelCase")]
pub struct Pool {
    /// Name, used by `replicas[].pool`.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Absolute path of a directory; data disks are files in it.
    #[schemars(length(min = 2, max = 255), regex(pattern = r"^/[A-Za-z0-9_+=:@.,/-]+$"))]
    pub directory: String,
}

/// Limits of a node; absent: the default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeLimits {
    /// Memory for payloads that are not written back yet, all replicas of the node together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Size>,
    /// Log transfer per second, all replicas together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch_per_second: Option<Size>,
    /// Copying per second, all replicas together.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_per_second: Option<Size>,
}

/// A replica that was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Forgotten {
    /// The incarnation.
    pub replica_uuid: Uuid,
    /// Name of its resource.
    #[serde(default)]
    pub resource: String,
}

/// Replica data found on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FoundReplica {
    /// The incarnation.
    pub replica_uuid: Uuid,
    /// Identity of its resource.
    pub resource_uuid: Uuid,
    /// Name of its resource when it was last known.
    pub resource: String,
    /// Size of the device (bytes).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<i64>,
    /// Actual role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<ActualRole>,
    /// State of the data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data_state: Option<ReplicaData>,
    /// The highest designation persisted here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub designation: Option<DesignationRef>,
    /// The designation under which it is (or was last) primary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub primary_under: Option<DesignationRef>,
}

/// A way to make block devices.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Frontend {
    /// ublk or loop.
    pub name: String,
    /// Whether this machine can.
    pub available: bool,
    /// Why not, or what is limited.
    #[serde(default)]
    pub reason: String,
}

/// Space of a store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct StoreSpace {
    /// Size (bytes).
    pub total_bytes: i64,
    /// Free (bytes).
    pub free_bytes: i64,
    /// Free, in words.
    pub free: String,
    /// Level of shortage, 0 (none) to 4.
    pub level: i32,
}

/// State of a pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolStatus {
    /// Name.
    pub name: String,
    /// Identity in its marker file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// Ready or `PoolAbsent`.
    pub state: String,
    /// Space.
    #[serde(default)]
    pub space: StoreSpace,
}

/// The report of the agent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MarsNodeStatus {
    /// Identity of the node; our own, kept on its disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_uuid: Option<Uuid>,
    /// Cluster to which its log store belongs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_uuid: Option<Uuid>,
    /// Boot of the machine.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_id: Option<String>,
    /// In a word: Ready, Degraded, Refused …
    pub state: String,
    /// host:port at which its agent serves replication.
    pub address: String,
    /// host:port of its metrics.
    pub metrics_address: String,
    /// Version of the agent.
    pub agent_version: String,
    /// Version of the kernel.
    pub kernel_version: String,
    /// The frontend that `auto` picks.
    pub frontend: String,
    /// All frontends.
    pub frontends: Vec<Frontend>,
    /// Space for transaction logs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_store: Option<StoreSpace>,
    /// Pools.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub pools: Vec<PoolStatus>,
    /// Lamport clock ahead of the wall clock (milliseconds).
    pub lamport_slip_ms: i64,
    /// When the agent last wrote this; at least every 10 s while it runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<Time>,
    /// Whether `replicas` is complete: the agent has looked through its whole store since it started.
    pub inventory_complete: bool,
    /// Every replica whose data was found on this node, `MarsReplica` or not.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["replicaUuid"]))]
    pub replicas: Vec<FoundReplica>,
    /// Each with cause and next command.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
