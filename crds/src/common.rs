//! Pieces shared by several kinds.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::core::Duration;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::size::Size;

/// A fencing token: (number, uuid). Equal numbers with different uuids are a split brain in which nobody yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DesignationRef {
    /// Only grows.
    pub number: i64,
    /// Tells two designations with the same number apart.
    pub uuid: Uuid,
}

/// Why a role is granted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum GrantCause {
    /// The resource starts its life here: no replica has history.
    #[default]
    Create,
    /// The predecessor has closed and said where its history ends.
    Handover,
    /// An acknowledged or fenced take-over: continue from what is here.
    Failover,
}

/// A provable place in a history; mirrors the engine's `Position`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct HistoryPosition {
    /// The epoch that wrote the bytes just before `lsn`.
    pub epoch: Uuid,
    /// Byte position in the history.
    pub lsn: i64,
    /// Chain hash of everything before `lsn`, 64 hexadecimal digits.
    pub chain: String,
}

/// Independent switches; what is wished, remembered also when there is nothing to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four independent switches are what the users see"
)]
pub struct Switches {
    /// Hold the data disk. Off on a primary: no device. Off on a secondary: the data disk is let go of at rest, with the content at
    /// the applied position, so that it can be mounted read-only; log is still fetched, nothing is applied.
    pub attach: bool,
    /// Transfer log from other members.
    pub fetch: bool,
    /// Apply local log to the data disk.
    pub replay: bool,
    /// Copy data when a sync is needed.
    pub sync: bool,
}

impl Default for Switches {
    fn default() -> Self {
        Switches {
            attach: true,
            fetch: true,
            replay: true,
            sync: true,
        }
    }
}

/// When a completed write must be on stable storage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Durability {
    /// At the next flush; the device advertises a volatile cache.
    #[default]
    OnFlush,
    /// Before it completes.
    EveryWrite,
}

/// How payloads are compressed in the log and on the wire; kept only where smaller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4 block format.
    Lz4,
    /// Zstandard, level 1.
    Zstd,
}

/// What a deletion does with the data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataPolicy {
    /// Disk and files stay as they are.
    #[default]
    Retain,
    /// The data is deleted by the agent, and only for a `MarsReplica` that is being deleted.
    Delete,
}

/// How long transaction log is kept for members that stay away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Retention {
    /// Most log kept on one node; absent: as much as the log store holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_log: Option<Size>,
}

/// Rate limits of one replica, in bytes per second; absent: none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RateLimits {
    /// Log transfer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fetch_per_second: Option<Size>,
    /// Copying of data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sync_per_second: Option<Size>,
}

/// Where the data disk of a replica comes from: exactly one of the two.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
#[schemars(extend("x-kubernetes-validations" = [{"rule": "has(self.device) != has(self.pool)", "message": "set exactly one of device and pool"}]))]
pub struct Backing {
    /// An existing block device, by absolute path under /dev.
    #[schemars(length(max = 255), regex(pattern = r"^/dev/[A-Za-z0-9_+=:@.,/-]+$"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// A pool of the node (`MarsNode.spec.pools`) in which the data disk is made.
    #[schemars(length(max = 63))]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
}

/// How far a replica is behind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lag {
    /// Bytes of history not yet durable (or, in a summary, not yet durable on the worst reachable replica).
    pub bytes: i64,
    /// Age of the oldest such byte (seconds).
    pub seconds: i64,
    /// When this was true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub as_of: Option<Time>,
}

/// Does something exactly once per id; the agent repeats the id in its status when it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OneShot {
    /// Identity of the order.
    pub id: Uuid,
}

/// A span of time in Go notation (`90s`, `1h30m`).
pub type DurationText = Duration;
/// What API servers accept as a [`DurationText`]: not negative, whole or decimal numbers with units.
pub const DURATION_PATTERN: &str = r"^([0-9]+(\.[0-9]+)?(ns|us|ms|s|m|h))+$";
