//! What is known about one replica at one moment; the other input of [`plan`](super::plan::plan).

use mars_engine::api::{ReplicaStatus, Role, Tuning};
use mars_engine::types::{Designation, ReplicaId};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use uuid::Uuid;

/// Another member, as it last answered in this life of the agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerFacts {
    /// Its replica.
    pub replica: ReplicaId,
    /// Name of its node; for people.
    pub node: String,
    /// The highest designation it knows; `None` until it has answered.
    pub designation: Option<Designation>,
    /// Its actual role; `None` until it has answered.
    pub role: Option<Role>,
}

/// What speaks for there being no newer designation than those seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Evidence {
    /// The spec was read from the API server (or the spec directory) by this process.
    pub from_api: bool,
    /// Names of the nodes whose members have not answered since this process began to ask.
    pub unanswered: Vec<String>,
    /// Members that are alive have had their time to answer.
    pub asked_long_enough: bool,
}

/// A promotion that will never happen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedPromote {
    /// Under which designation.
    pub designation: Designation,
    /// Why.
    pub reason: String,
}

/// One-shot orders that were done, and refusals that hold for good; persisted in the replica's directory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Done {
    /// Last `invalidate`.
    pub invalidate: Option<Uuid>,
    /// Last `fakeSync`.
    pub fake_sync: Option<Uuid>,
    /// Last `rotateLog`.
    pub rotate: Option<Uuid>,
    /// Last refusal of the primary role.
    pub refused_promote: Option<RefusedPromote>,
    /// The designation under which this replica is, or was last, primary.
    pub primary_under: Option<Designation>,
}

/// Everything the plan looks at.
#[derive(Debug, Clone)]
pub struct Facts {
    /// The engine's own words.
    pub status: Arc<ReplicaStatus>,
    /// Tuning that the engine was given last in this life; `None` before the first time.
    pub tuning: Option<Tuning>,
    /// Size of the data disk (bytes).
    pub disk_bytes: u64,
    /// Whether there is a device.
    pub has_device: bool,
    /// The device shows an older, smaller size until it is made anew: this kernel cannot grow an open one.
    pub resize_pending: bool,
    /// Who uses it, in words.
    pub device_users: Vec<String>,
    /// Other members.
    pub peers: Vec<PeerFacts>,
    /// See [`Evidence`].
    pub evidence: Evidence,
    /// See [`Done`].
    pub done: Done,
}
