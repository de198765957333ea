//! The root-only unix socket of an agent: live status, devices, and the acknowledged failover without the API server.
//!
//! HTTP/1.1 with JSON, so that `curl --unix-socket` does, too:
//!
//! ```text
//! GET  /status                                       {"node", "nodeUuid", "clusterUuid", "replicas": [{"resource", …, "status"}]}
//! GET  /devices                                      {"devices": [{"resource", "path", "frontend", "openedBy", …}]}
//! POST /failover {"resource", "acknowledge": uuid}   {"designation": {"number", "uuid"}}, or {"error"} with 409
//! ```
//!
//! Invariant: nothing is answered to a process of another user, whatever the permissions of the file became.

pub mod client;
mod server;
pub mod table;

pub use server::{SocketError, serve};

use crate::reconcile::context::ReplicaView;
use mars_crds::DesignationRef;
use mars_crds::replica::User;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Answer to `GET /status`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name of the node.
    pub node: String,
    /// The node.
    pub node_uuid: Uuid,
    /// The cluster.
    pub cluster_uuid: Uuid,
    /// All replicas, by name of their resource.
    pub replicas: Vec<ReplicaView>,
}

/// Answer to `GET /devices`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Devices {
    /// All devices of this node.
    pub devices: Vec<DeviceView>,
}

/// One device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceView {
    /// Name of the resource.
    pub resource: String,
    /// Link for users.
    pub path: String,
    /// major:minor.
    pub numbers: String,
    /// Tells it from a later one with the same number.
    pub diskseq: i64,
    /// ublk or loop.
    pub frontend: String,
    /// Size (bytes).
    pub size_bytes: i64,
    /// Who uses it.
    pub opened_by: Vec<User>,
}

/// Body of `POST /failover`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailoverRequest {
    /// Name of the resource.
    pub resource: String,
    /// Its uuid.
    pub acknowledge: Uuid,
}

/// Answer to a failover that was done.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FailoverDone {
    /// The new designation.
    pub designation: DesignationRef,
}

/// Answer to anything that was not done.
#[derive(Debug, Serialize, Deserialize)]
pub struct Failure {
    /// Cause and next command.
    pub error: String,
}
