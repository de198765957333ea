//! `MarsAction`: a one-shot verb with permissions and an audit trail of its own.
//!
//! Invariant: the spec is immutable, and dangerous verbs carry the uuid of the resource they may harm.

#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive copies each struct into a function body"
)]

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Verb {
    /// Planned change of the primary to `node`.
    Handover,
    /// Forced change of the primary to `node`: what it does not have is lost. Dangerous.
    Failover,
    /// Throw away log and claim of consistency of the replica on `node` and sync it afresh. Dangerous.
    Invalidate,
    /// Believe that the replica on `node` equals its source without comparing. Dangerous.
    FakeSync,
    /// Let the primary continue in a new log segment.
    RotateLog,
    /// End a split brain. Not available yet.
    Resolve,
    /// Compare the replicas. Not available yet.
    Verify,
    /// Give up the replica of a lost node for good. Dangerous.
    ForgetNode,
    /// Leave emergency mode. Not available yet.
    ExitEmergency,
}

impl Verb {
    /// Whether data can be lost, so that `acknowledge` must carry the uuid of the resource.
    #[must_use]
    pub fn is_dangerous(self) -> bool {
        match self {
            Verb::Failover | Verb::Invalidate | Verb::FakeSync | Verb::ForgetNode | Verb::Resolve => true,
            Verb::Handover | Verb::RotateLog | Verb::Verify | Verb::ExitEmergency => false,
        }
    }

    /// Whether the verb acts on one node.
    #[must_use]
    pub fn needs_node(self) -> bool {
        match self {
            Verb::Handover | Verb::Failover | Verb::Invalidate | Verb::FakeSync | Verb::ForgetNode => true,
            Verb::RotateLog | Verb::Resolve | Verb::Verify | Verb::ExitEmergency => false,
        }
    }

    /// Whether this version can do it.
    #[must_use]
    pub fn is_available(self) -> bool {
        !matches!(self, Verb::Resolve | Verb::Verify | Verb::ExitEmergency)
    }
}

/// A one-shot order.
#[derive(CustomResource, Debug, Clone, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "mars.storage",
    version = "v1alpha1",
    kind = "MarsAction",
    plural = "marsactions",
    singular = "marsaction",
    shortname = "marsact",
    category = "storage",
    status = "MarsActionStatus",
    derive = "PartialEq",
    doc = "A one-shot verb on a MarsResource.",
    annotation("helm.sh/resource-policy", "keep"),
    printcolumn(name = "VERB", type_ = "string", json_path = ".spec.verb"),
    printcolumn(name = "RESOURCE", type_ = "string", json_path = ".spec.resource"),
    printcolumn(name = "NODE", type_ = "string", json_path = ".spec.node"),
    printcolumn(name = "PHASE", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "MESSAGE", type_ = "string", json_path = ".status.message"),
    printcolumn(name = "AGE", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[x_kube(
    validation = Rule::new("self == oldSelf").message("the spec of a MarsAction is immutable: create another one"),
    validation = Rule::new("!(self.verb in ['Resolve', 'Verify', 'ExitEmergency'])")
        .message("the verbs Resolve, Verify and ExitEmergency are not available in this version"),
    validation = Rule::new("!(self.verb in ['Handover', 'Failover', 'Invalidate', 'FakeSync', 'ForgetNode']) || (has(self.node) && self.node != '')")
        .message("this verb needs node"),
    validation = Rule::new("!(self.verb in ['Failover', 'Invalidate', 'FakeSync', 'ForgetNode']) || has(self.acknowledge)")
        .message("this verb can lose data: set acknowledge to status.uuid of the MarsResource")
)]
#[serde(rename_all = "camelCase")]
pub struct MarsActionSpec {
    /// What to do.
    pub verb: Verb,
    /// Name of the `MarsResource`.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub resource: String,
    /// The node it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 253))]
    pub node: Option<String>,
    /// `status.uuid` of the resource: needed by the verbs that can lose data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub acknowledge: Option<Uuid>,
    /// Give up when it has not succeeded by then; 0: never.
    #[serde(default = "default_deadline_seconds")]
    #[schemars(range(min = 0, max = 604_800))]
    pub deadline_seconds: i64,
    /// The finished object is deleted after this time.
    #[serde(default = "default_ttl_seconds")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub ttl_seconds: i64,
}

fn default_deadline_seconds() -> i64 {
    600
}

fn default_ttl_seconds() -> i64 {
    86_400
}

/// How far an action is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ActionPhase {
    /// Not looked at yet, or waiting for what it needs.
    #[default]
    Pending,
    /// Under way.
    Running,
    /// Done.
    Succeeded,
    /// Refused or given up; `message` says why.
    Failed,
}

/// Progress of an action.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct MarsActionStatus {
    /// Generation this status is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Identity of the order; recorded before anything is done, so that it is done once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<Uuid>,
    /// How far it is.
    pub phase: ActionPhase,
    /// Cause and next command.
    pub message: String,
    /// The designation it has made, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub designation_number: Option<i64>,
    /// When it began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Accepted, Complete.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}
