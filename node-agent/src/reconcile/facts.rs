//! What is known about one replica at one moment; the other input of [`plan`](super::plan::plan).

use super::presence::Presence;
use super::todo::OneShots;
use crate::pool::witness::Witness;
use mars_engine::api::{ReplicaStatus, Role, Tuning};
use mars_engine::types::{Designation, Lamport, ReplicaId};
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
    /// Whether it answers now: what it said is of this moment.
    pub answers: bool,
    /// When it last wrote (Lamport time of its last durable record); `None` until it has answered.
    pub durable_time: Option<Lamport>,
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
    /// One-shot orders that were done before these, oldest first.
    pub earlier: Vec<Uuid>,
    /// Last refusal of the primary role.
    pub refused_promote: Option<RefusedPromote>,
    /// The designation under which this replica is, or was last, primary.
    pub primary_under: Option<Designation>,
    /// Set while the data disk is let go of.
    pub detached: Option<Detached>,
}

/// So many orders are remembered beside the last ones.
const MOST_EARLIER: usize = 256;

impl Done {
    /// Which of these orders are still to be carried out. One that was done long ago may be ordered again, by objects that were
    /// restored from a backup: it counts as done for good.
    #[must_use]
    pub fn open(&self, orders: OneShots) -> OneShots {
        let open = |order: Option<Uuid>, last| order.filter(|id| last != Some(*id) && !self.earlier.contains(id));
        OneShots {
            invalidate: open(orders.invalidate, self.invalidate),
            fake_sync: open(orders.fake_sync, self.fake_sync),
            rotate: open(orders.rotate, self.rotate),
        }
    }

    /// Keeps in mind what `before` names as done last, and this does not any more.
    pub fn keep_earlier(&mut self, before: &Done) {
        let pairs = [
            (before.invalidate, self.invalidate),
            (before.fake_sync, self.fake_sync),
            (before.rotate, self.rotate),
        ];
        let replaced = pairs.into_iter().filter(|(old, new)| old != new);
        self.earlier.extend(replaced.filter_map(|(old, _)| old));
        let over = self.earlier.len().saturating_sub(MOST_EARLIER);
        self.earlier.drain(..over);
    }
}

/// A data disk that this replica has let go of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Detached {
    /// Its size (bytes).
    pub disk_bytes: u64,
    /// What it was like; `None` when it may be like anything, because everything will be compared anyway.
    pub witness: Option<Witness>,
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
    /// Data is being copied to the data disk.
    pub copying: bool,
    /// The block device, and who uses it.
    pub device: Presence,
    /// The device shows an older, smaller size until it is made anew: this kernel cannot grow an open one.
    pub resize_pending: bool,
    /// The device shows a smaller size for no such reason: it was not told yet.
    pub device_behind: bool,
    /// Other members.
    pub peers: Vec<PeerFacts>,
    /// See [`Evidence`].
    pub evidence: Evidence,
    /// See [`Done`].
    pub done: Done,
}
