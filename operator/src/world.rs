//! What `plan` sees: one resource and everything that bears on it, at one moment.
//!
//! Invariant: `World` is data. It holds no client and no clock; `now` and how long a node has been silent are measured
//! by whoever observed. A world that is not `fresh` (it may come from a watch cache) never leads to a decision.

use jiff::Timestamp;
use mars_crds::common::{DesignationRef, HistoryPosition};
use mars_crds::node::FoundReplica;
use mars_crds::replica::{Epoch, Fork, Refused, Released, User};
use mars_crds::{ActualRole, MarsAction, MarsNode, MarsReplica, MarsResource, ReplicaData};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// Time limits and thresholds of decisions.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct Settings {
    /// An agent that has not been heard for this long counts as silent (seconds).
    pub liveness_seconds: i64,
    /// A successor further behind than this is not worth a handover yet (bytes).
    pub handover_lag_bytes: i64,
    /// A handover in which the old primary has not closed by then is given up (seconds).
    pub handover_timeout_seconds: i64,
    /// Replicas no further behind than this count as up to date (bytes).
    pub almost_bytes: i64,
    /// Positions in statuses are written at most this often (seconds).
    pub positions_every_seconds: i64,
    /// Silence demanded before an automatic failover when `failover.after` is absent (seconds).
    pub failover_after_seconds: i64,
    /// An agent that has not been heard for this long is called silent in its `MarsNode` (seconds); longer than `livenessSeconds`.
    pub node_silent_seconds: i64,
    /// Within this time an action may be older than its resource: one manifest makes both (seconds).
    pub action_grace_seconds: i64,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            liveness_seconds: 30,
            handover_lag_bytes: 64 << 20,
            handover_timeout_seconds: 120,
            almost_bytes: 10 << 20,
            positions_every_seconds: 30,
            failover_after_seconds: 60,
            node_silent_seconds: 60,
            action_grace_seconds: 30,
        }
    }
}

/// What is known about a node.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct NodeView {
    /// Its `MarsNode`, if there is one.
    pub object: Option<MarsNode>,
    /// How long the observer has seen no sign of life, by the observer's own clock (seconds).
    pub silent_seconds: i64,
    /// The Kubernetes Node of this name, if there is one.
    pub kube_node: Option<KubeNode>,
}

/// What counts of a Kubernetes Node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct KubeNode {
    /// Which one of this name.
    pub uid: String,
    /// The taint an administrator sets after switching it off, if it has that.
    pub taint: Option<String>,
}

/// Everything `plan` may know.
#[derive(Debug, Clone)]
pub struct World {
    /// The moment of the observation.
    pub now: Timestamp,
    /// Read from the API server for this very decision, the resource last; otherwise possibly from a cache.
    pub fresh: bool,
    /// The resource.
    pub resource: MarsResource,
    /// Its replicas.
    pub replicas: Vec<MarsReplica>,
    /// Nodes by name: all that are members, have a replica, or hold data of the resource.
    pub nodes: BTreeMap<String, NodeView>,
    /// Its actions, oldest first.
    pub actions: Vec<MarsAction>,
    /// Names of objects that belong here but could not be decoded, each with the reason.
    pub undecodable: Vec<String>,
    /// When positions were last written to the status, if that is known.
    pub positions_written: Option<Timestamp>,
    /// Limits and thresholds.
    pub settings: Settings,
}

impl World {
    /// Name of the resource.
    #[must_use]
    pub fn name(&self) -> &str {
        self.resource.metadata.name.as_deref().unwrap_or_default()
    }

    /// Whether the agent of `node` has been heard within the liveness window.
    #[must_use]
    pub fn is_heard(&self, node: &str) -> bool {
        self.nodes.get(node).is_some_and(|view| {
            view.object.as_ref().is_some_and(|object| object.status.is_some())
                && view.silent_seconds <= self.settings.liveness_seconds
        })
    }

    /// uid of the Kubernetes Node that `node` had while its agent was heard, if that was recorded.
    #[must_use]
    pub fn recorded_kube_node(&self, node: &str) -> Option<&str> {
        let status = self.resource.status.as_ref()?;
        let summary = status.replicas.iter().find(|summary| summary.node == node)?;
        summary.kube_node_uid.as_deref()
    }

    /// The same as it shall be recorded now: a Node proves nothing unless it was there, and not fenced, while the agent was heard.
    #[must_use]
    pub fn kube_node_to_record(&self, node: &str) -> Option<&str> {
        let present = self.nodes.get(node).and_then(|view| view.kube_node.as_ref());
        let living = present.filter(|kube_node| self.is_heard(node) && kube_node.taint.is_none());
        living
            .map(|kube_node| kube_node.uid.as_str())
            .or(self.recorded_kube_node(node))
    }

    /// Evidence that `node` cannot write any more: the Node that it had while it lived is gone, or tainted out-of-service. A Node
    /// that was never there says nothing.
    #[must_use]
    pub fn fenced(&self, node: &str) -> Option<String> {
        let recorded = self.recorded_kube_node(node)?;
        match &self.nodes.get(node)?.kube_node {
            None => Some("its Node is deleted".to_owned()),
            Some(present) if present.uid != recorded => Some("its Node was replaced by another one".to_owned()),
            Some(present) => present.taint.as_ref().map(|taint| format!("taint {taint}")),
        }
    }

    /// The replica object on `node`.
    #[must_use]
    pub fn replica_on(&self, node: &str) -> Option<&MarsReplica> {
        self.replicas.iter().find(|replica| replica.spec.node == node)
    }

    /// The replica object with this incarnation.
    #[must_use]
    pub fn replica(&self, uuid: Uuid) -> Option<&MarsReplica> {
        self.replicas.iter().find(|replica| replica.spec.replica_uuid == uuid)
    }

    /// Data of this resource found on nodes, with the name of the node.
    pub fn found(&self) -> impl Iterator<Item = (&str, &FoundReplica)> {
        let resource_uuid = self.resource.status.as_ref().and_then(|status| status.uuid);
        let name = self.name();
        self.nodes.iter().flat_map(move |(node, view)| {
            let list = view
                .object
                .as_ref()
                .and_then(|object| object.status.as_ref())
                .map(|status| &status.replicas);
            list.into_iter().flatten().filter_map(move |found| {
                let ours = resource_uuid.map_or(found.resource == name, |uuid| found.resource_uuid == uuid);
                ours.then_some((node.as_str(), found))
            })
        })
    }
}

/// The object with its status only if that is about this very incarnation. After `ForgetNode` and a new join the last words of
/// the incarnation before may still arrive under the same name; taken for its successor's they would, for instance, make a new
/// replica look as if it had held data.
#[must_use]
pub fn with_own_status(mut replica: MarsReplica) -> MarsReplica {
    let ours = replica.spec.replica_uuid;
    replica.status = replica
        .status
        .filter(|status| status.replica_uuid.is_none_or(|uuid| uuid == ours));
    replica
}

/// What one replica says about itself, from its `MarsReplica` and from the inventory of its node.
#[derive(Debug, Clone)]
pub struct Report {
    /// Node.
    pub node: String,
    /// Incarnation.
    pub replica_uuid: Uuid,
    /// Whether its agent is heard.
    pub heard: bool,
    /// Whether the replica is being deleted.
    pub leaving: bool,
    /// Actual role.
    pub role: Option<ActualRole>,
    /// State of its data.
    pub data: Option<ReplicaData>,
    /// The highest designation persisted there.
    pub designation: Option<DesignationRef>,
    /// The designation under which it is (was last) primary.
    pub primary_under: Option<DesignationRef>,
    /// Its release, if its history ends with a `Close`.
    pub released: Option<Released>,
    /// What it refuses.
    pub refused: Option<Refused>,
    /// Users of its device.
    pub opened_by: Vec<User>,
    /// Forks it has found.
    pub forks: Vec<Fork>,
    /// End of its durable log.
    pub durable: Option<HistoryPosition>,
    /// Its history, oldest epoch first.
    pub lineage: Vec<Epoch>,
    /// Size of its device, as of the applied position (bytes).
    pub size_bytes: Option<i64>,
    /// Lag it reports itself (bytes).
    pub lag_bytes: Option<i64>,
    /// Whether it has data that nothing may be put in place of.
    pub has_history: bool,
}

impl Report {
    /// Whether it accepts writes now, or may.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        matches!(self.role, Some(ActualRole::Primary | ActualRole::Closing))
    }

    /// Whether it has taken the primary role under this designation (and may have restarted since).
    #[must_use]
    pub fn holds(&self, token: DesignationRef) -> bool {
        self.primary_under == Some(token) || (self.role == Some(ActualRole::Primary) && self.designation == Some(token))
    }

    /// End of its durable log, as a number.
    #[must_use]
    pub fn durable_lsn(&self) -> Option<i64> {
        self.durable.as_ref().map(|position| position.lsn)
    }

    /// Whether, by what both report, the end of `other` lies in this history. `None`: not enough is known.
    ///
    /// Epochs and positions only: the chain is proven between the agents, before a byte is applied.
    #[must_use]
    pub fn contains_end_of(&self, other: &Report) -> Option<bool> {
        let end = other.durable.as_ref()?;
        if self.lineage.is_empty() {
            return None;
        }
        let index = self.lineage.iter().position(|epoch| epoch.epoch == end.epoch);
        let next = index.and_then(|index| self.lineage.get(index + 1));
        Some(index.is_some() && next.is_none_or(|next| end.lsn <= next.parent.lsn))
    }

    /// Names the users of the device, for people.
    #[must_use]
    pub fn users(&self) -> String {
        let name = |user: &User| match user.pid {
            Some(pid) => format!("{} {} (pid {pid})", user.kind, user.name),
            None => format!("{} {}", user.kind, user.name),
        };
        self.opened_by.iter().map(name).collect::<Vec<_>>().join(", ")
    }
}

/// Replicas that were given up. The lists of the nodes outlive a status: what was forgotten stays so when the resource is made anew.
#[must_use]
pub fn tombstones(world: &World) -> Vec<Uuid> {
    let stones = world.resource.status.iter().flat_map(|status| &status.tombstones);
    let objects = world.nodes.values().filter_map(|view| view.object.as_ref());
    let forgotten = objects.flat_map(|node| &node.spec.forgotten);
    stones
        .map(|stone| stone.replica_uuid)
        .chain(forgotten.map(|forgotten| forgotten.replica_uuid))
        .collect()
}

/// All reports about the resource, by node: replica objects first, completed by what the nodes' inventories say.
/// Forgotten incarnations do not report, and forks with them are no forks any more.
#[must_use]
pub fn reports(world: &World) -> Vec<Report> {
    let tombstones = tombstones(world);
    let mut reports: Vec<Report> = world
        .replicas
        .iter()
        .filter(|replica| !tombstones.contains(&replica.spec.replica_uuid))
        .map(|replica| from_object(world, replica))
        .collect();
    for (node, found) in world.found() {
        if tombstones.contains(&found.replica_uuid) {
            continue;
        }
        match reports
            .iter_mut()
            .find(|report| report.replica_uuid == found.replica_uuid)
        {
            Some(report) => complete(report, found),
            None => reports.push(from_inventory(world, node, found)),
        }
    }
    let known: Vec<Uuid> = reports.iter().map(|report| report.replica_uuid).collect();
    for report in &mut reports {
        report.forks.retain(|fork| known.contains(&fork.with));
    }
    reports.sort_by(|left, right| left.node.cmp(&right.node));
    reports
}

fn from_object(world: &World, replica: &MarsReplica) -> Report {
    let spec = &replica.spec;
    let status = replica.status.clone().unwrap_or_default();
    let data = status.data_state;
    let has_history = status.primary_under.is_some()
        || !status.lineage.is_empty()
        || matches!(
            data,
            Some(ReplicaData::Consistent | ReplicaData::LogLost | ReplicaData::Missing)
        );
    Report {
        node: spec.node.clone(),
        replica_uuid: spec.replica_uuid,
        heard: world.is_heard(&spec.node) && replica.status.is_some(),
        leaving: replica.metadata.deletion_timestamp.is_some(),
        role: status.role,
        data,
        designation: status.designation,
        primary_under: status.primary_under,
        released: status.released,
        refused: status.refused,
        opened_by: status.opened_by,
        forks: status.forks,
        durable: status.positions.map(|positions| positions.durable),
        lineage: status.lineage,
        size_bytes: status.size_bytes,
        lag_bytes: status.lag.map(|lag| lag.bytes),
        has_history: has_history || spec.established,
    }
}

fn from_inventory(world: &World, node: &str, found: &FoundReplica) -> Report {
    let blank = found.primary_under.is_none() && matches!(found.data_state, Some(ReplicaData::Blank));
    Report {
        node: node.to_owned(),
        replica_uuid: found.replica_uuid,
        // One that is not open says what it remembers, but not how its history ends.
        heard: world.is_heard(node) && found.data_state.is_some(),
        leaving: false,
        role: found.role,
        data: found.data_state,
        designation: found.designation,
        primary_under: found.primary_under,
        released: None,
        refused: None,
        opened_by: Vec::new(),
        forks: Vec::new(),
        durable: None,
        lineage: Vec::new(),
        size_bytes: found.size_bytes,
        lag_bytes: None,
        has_history: !blank,
    }
}

/// After a loss of status the inventory may know what the object does not say.
fn complete(report: &mut Report, found: &FoundReplica) {
    let newer = |left: Option<DesignationRef>, right: Option<DesignationRef>| match (left, right) {
        (Some(left), Some(right)) if right.number > left.number => Some(right),
        (None, right) => right,
        (left, _) => left,
    };
    report.designation = newer(report.designation, found.designation);
    report.primary_under = newer(report.primary_under, found.primary_under);
    if report.role.is_none() && report.data.is_none() {
        report.role = found.role;
        report.data = found.data_state;
    }
    report.has_history |= found.primary_under.is_some()
        || matches!(
            found.data_state,
            Some(ReplicaData::Consistent | ReplicaData::LogLost | ReplicaData::Missing)
        );
}
