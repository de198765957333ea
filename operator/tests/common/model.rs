//! A cluster in memory: an API server with resourceVersions, agents that obey the contract, and the rules none may break.
//!
//! The agents are deliberately simple: a log is a list of records, everything written is durable. What is modelled
//! faithfully is the handshake: what they read late, what they persist, what they refuse, what they report late.

use super::patched;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use mars_crds::common::{DesignationRef, GrantCause, HistoryPosition};
use mars_crds::replica::{Epoch, Fork, Positions, Refused, RefusedOrder, Released, User};
use mars_crds::{
    ActualRole, MarsAction, MarsNode, MarsReplica, MarsReplicaSpec, MarsReplicaStatus, MarsResource, ReplicaData,
    WishRole, replica_name, validate,
};
use mars_operator::{Intent, NodeView, Settings, World};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use uuid::Uuid;

/// One record of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Record {
    Epoch(Uuid),
    Write(u64),
    Close(Option<Uuid>),
}

/// One agent with its replica.
#[derive(Debug, Clone, Default)]
pub(crate) struct Agent {
    pub(crate) node: String,
    /// The order as last read; orders are read late, but never go back.
    pub(crate) order: Option<MarsReplicaSpec>,
    pub(crate) role: Option<ActualRole>,
    pub(crate) designation: Option<DesignationRef>,
    pub(crate) primary_under: Option<DesignationRef>,
    pub(crate) refused_promote: Option<DesignationRef>,
    pub(crate) refused_close: Option<DesignationRef>,
    pub(crate) log: Vec<Record>,
    pub(crate) open: bool,
    /// The designation under which the trailing `Close` is its own.
    pub(crate) closed: Option<DesignationRef>,
    pub(crate) forks: BTreeSet<Uuid>,
    /// Epochs it has begun itself.
    pub(crate) own_epochs: BTreeSet<Uuid>,
}

/// The API server.
#[derive(Debug)]
pub(crate) struct Api {
    version: u64,
    pub(crate) resource: MarsResource,
    pub(crate) replicas: BTreeMap<String, MarsReplica>,
    pub(crate) actions: BTreeMap<String, MarsAction>,
    /// Every designation ever recorded.
    pub(crate) designations: BTreeMap<i64, Uuid>,
    /// What was broken, if anything.
    pub(crate) violation: Option<String>,
}

fn version_of(metadata: &ObjectMeta) -> Option<&str> {
    metadata.resource_version.as_deref()
}

impl Api {
    pub(crate) fn new(nodes: &[&str]) -> Self {
        let members: Vec<_> = nodes.iter().map(|node| json!({"node": node, "pool": "p"})).collect();
        let resource = json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource",
            "metadata": {"name": "mydata", "generation": 1, "resourceVersion": "1"},
            "spec": {"size": "1Gi", "primary": nodes[0], "replicas": members}});
        Api {
            version: 1,
            resource: serde_json::from_value(resource).expect("a resource"),
            replicas: BTreeMap::new(),
            actions: BTreeMap::new(),
            designations: BTreeMap::new(),
            violation: None,
        }
    }

    fn bump(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    /// What users do; not conditioned.
    pub(crate) fn edit(&mut self, change: impl FnOnce(&mut MarsResource)) {
        change(&mut self.resource);
        self.resource.metadata.resource_version = Some(self.bump());
    }

    pub(crate) fn act(&mut self, name: &str, verb: &str, node: &str, now: Timestamp) {
        let acknowledge = self.resource.status.as_ref().and_then(|status| status.uuid);
        let base = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction", "metadata": {"name": name},
            "spec": {"resource": "mydata", "verb": verb, "node": node, "deadlineSeconds": 600, "ttlSeconds": 100_000}});
        let spec = acknowledge.map_or(json!({}), |uuid| json!({"spec": {"acknowledge": uuid}}));
        let mut action: MarsAction = serde_json::from_value(patched(&base, &spec)).expect("an action");
        action.metadata.resource_version = Some(self.bump());
        action.metadata.creation_timestamp = Some(Time(now));
        self.actions.insert(name.to_owned(), action);
    }

    /// The report of an agent; conditioned on nothing but existence, as its status has one writer.
    pub(crate) fn report(&mut self, agent: &Agent) {
        let version = self.bump();
        if let Some(replica) = self.replicas.get_mut(&agent.node) {
            replica.status = Some(agent.status());
            replica.metadata.resource_version = Some(version);
        }
    }

    /// Carries out one intent planned from `world`. `false`: refused as a conflict.
    pub(crate) fn apply(&mut self, world: &World, intent: &Intent) -> bool {
        match intent {
            Intent::Reobserve | Intent::EmitEvent(_) => true,
            Intent::CreateReplica(spec) => self.create(spec),
            Intent::PatchReplica(spec) => self.patch(world, spec),
            Intent::SetActionStatus { action, status } => {
                let seen = world
                    .actions
                    .iter()
                    .find(|seen| seen.metadata.name.as_ref() == Some(action))
                    .cloned();
                let version = self.bump();
                let (Some(seen), Some(present)) = (seen, self.actions.get_mut(action)) else {
                    return false;
                };
                if version_of(&seen.metadata) != version_of(&present.metadata) {
                    return false;
                }
                present.status = Some(status.as_ref().clone());
                present.metadata.resource_version = Some(version);
                true
            }
            Intent::DeleteAction { action } => self.actions.remove(action).is_some(),
            Intent::DeleteReplica { .. }
            | Intent::ReleaseReplica { .. }
            | Intent::Forget { .. }
            | Intent::RemoveFinalizer
            | Intent::RecordTombstone(_) => {
                self.violation = Some(format!("nobody asked for {intent}"));
                false
            }
            Intent::AddFinalizer
            | Intent::RecordUuid(_)
            | Intent::RecordDesignation(_)
            | Intent::RecordRelease(_)
            | Intent::RecordWishSeen { .. }
            | Intent::SetStatus(_) => self.change_resource(world, intent),
        }
    }

    fn create(&mut self, spec: &MarsReplicaSpec) -> bool {
        if self.replicas.contains_key(&spec.node) {
            return false;
        }
        let mut replica = MarsReplica::new(&replica_name(&spec.resource, &spec.node), spec.clone());
        replica.metadata.resource_version = Some(self.bump());
        replica.metadata.finalizers = Some(vec![mars_crds::REPLICA_FINALIZER.to_owned()]);
        self.replicas.insert(spec.node.clone(), replica);
        true
    }

    fn patch(&mut self, world: &World, spec: &MarsReplicaSpec) -> bool {
        let version = self.bump();
        let (Some(seen), Some(present)) = (world.replica_on(&spec.node), self.replicas.get_mut(&spec.node)) else {
            return false;
        };
        if version_of(&seen.metadata) != version_of(&present.metadata) {
            return false;
        }
        let new = MarsReplica {
            spec: spec.clone(),
            ..present.clone()
        };
        let problems = validate::replica(&new, Some(present));
        if !problems.is_empty() {
            self.violation = Some(format!("an invalid order: {}", validate::summary(&problems)));
            return false;
        }
        *present = MarsReplica {
            metadata: ObjectMeta {
                resource_version: Some(version),
                ..new.metadata
            },
            ..new
        };
        true
    }

    fn change_resource(&mut self, world: &World, intent: &Intent) -> bool {
        if version_of(&world.resource.metadata) != version_of(&self.resource.metadata) {
            return false;
        }
        let version = self.bump();
        self.resource.metadata.resource_version = Some(version);
        if *intent == Intent::AddFinalizer {
            self.resource.metadata.finalizers = Some(vec![mars_crds::RESOURCE_FINALIZER.to_owned()]);
            return true;
        }
        // As `apply` does: the status of the observed world, changed.
        let mut status = world.resource.status.clone().unwrap_or_default();
        match intent {
            Intent::RecordUuid(uuid) => status.uuid = Some(*uuid),
            Intent::RecordDesignation(designation) => {
                let number = designation.number;
                let highest = self.designations.keys().next_back().copied().unwrap_or(0);
                if number <= highest {
                    self.violation = Some(format!("designation {number} after {highest}"));
                }
                self.designations.insert(number, designation.uuid);
                status.designation = Some(designation.as_ref().clone());
            }
            Intent::RecordRelease(end) => {
                let before = status
                    .designation
                    .as_mut()
                    .and_then(|designation| designation.predecessor.as_mut());
                before.expect("a predecessor").released_end = Some(end.clone());
            }
            Intent::RecordWishSeen { primary, attached } => {
                let designation = status.designation.as_mut().expect("a designation");
                designation.wish_seen.clone_from(primary);
                designation.attached_seen.clone_from(attached);
            }
            Intent::SetStatus(new) => status.clone_from(new),
            other => panic!("{other} does not change the resource"),
        }
        self.resource.status = Some(status);
        true
    }
}

/// A world from what was read: replicas and actions earlier, the resource later.
pub(crate) fn observe(
    read: &(BTreeMap<String, MarsReplica>, BTreeMap<String, MarsAction>),
    resource: &MarsResource,
    nodes: &BTreeMap<String, i64>,
    now: Timestamp,
    fresh: bool,
) -> World {
    let view = |(node, silent): (&String, &i64)| {
        let object = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsNode", "metadata": {"name": node}, "spec": {},
            "status": {"inventoryComplete": true, "address": format!("{node}:7777")}});
        let object: MarsNode = serde_json::from_value(object).expect("a node");
        (
            node.clone(),
            NodeView {
                object: Some(object),
                silent_seconds: *silent,
                kube_node: None,
            },
        )
    };
    let mut actions: Vec<MarsAction> = read.1.values().cloned().collect();
    actions.sort_by_key(|action| (action.metadata.creation_timestamp.clone(), action.metadata.name.clone()));
    World {
        now,
        fresh,
        resource: resource.clone(),
        replicas: read.0.values().cloned().collect(),
        nodes: nodes.iter().map(view).collect(),
        actions,
        undecodable: Vec::new(),
        positions_written: None,
        settings: Settings::default(),
    }
}

impl Agent {
    pub(crate) fn new(node: &str) -> Self {
        Agent {
            node: node.to_owned(),
            ..Agent::default()
        }
    }

    fn end(&self) -> HistoryPosition {
        Self::position(&self.log)
    }

    fn position(log: &[Record]) -> HistoryPosition {
        let epochs = log.iter().rev().filter_map(|record| {
            if let Record::Epoch(id) = record {
                Some(*id)
            } else {
                None
            }
        });
        let epoch = { epochs }.next().unwrap_or_default();
        HistoryPosition {
            epoch,
            lsn: i64::try_from(log.len()).expect("short"),
            chain: format!("{log:?}"),
        }
    }

    fn lineage(&self) -> Vec<Epoch> {
        let epoch = |(index, record): (usize, &Record)| match record {
            Record::Epoch(id) => Some(Epoch {
                epoch: *id,
                parent: Self::position(&self.log[..index]),
                origin: Uuid::nil(),
                cause: "Create".to_owned(),
                time: None,
            }),
            _ => None,
        };
        self.log.iter().enumerate().filter_map(epoch).collect()
    }

    pub(crate) fn is_primary(&self) -> bool {
        self.role == Some(ActualRole::Primary)
    }

    /// Only its own trailing `Close` is a release: a secondary that fetched one has not released anything.
    fn released(&self) -> Option<Released> {
        let token = self.closed?;
        let Some(Record::Close(to)) = self.log.last() else {
            return None;
        };
        Some(Released {
            number: token.number,
            uuid: token.uuid,
            to: *to,
            end: self.end(),
        })
    }

    /// Fetches up to `count` records from `source`. A history that is not a continuation is a fork.
    pub(crate) fn fetch(&mut self, source: &Agent, source_uuid: Uuid, count: usize) {
        if self.is_primary() || source.log.len() <= self.log.len() {
            return;
        }
        if !source.log.starts_with(&self.log) {
            self.forks.insert(source_uuid);
            return;
        }
        self.forks.remove(&source_uuid);
        let end = source.log.len().min(self.log.len() + count);
        self.log = source.log[..end].to_vec();
        self.closed = None;
    }

    pub(crate) fn status(&self) -> MarsReplicaStatus {
        let blank = self.log.is_empty();
        let refused = |order, token: DesignationRef, durable| Refused {
            order,
            number: token.number,
            uuid: token.uuid,
            reason: "refused".to_owned(),
            durable,
        };
        let close = self
            .refused_close
            .map(|token| refused(RefusedOrder::Close, token, false));
        let fork = |with: &Uuid| Fork {
            with: *with,
            lsn: 0,
            since: None,
            ours_bytes: 1,
            theirs_bytes: 1,
            ours_at_least: false,
            theirs_at_least: false,
            ours_seconds: None,
            theirs_seconds: None,
        };
        let user = User {
            kind: "process".to_owned(),
            name: "writer".to_owned(),
            pid: Some(1),
        };
        MarsReplicaStatus {
            role: Some(self.role.unwrap_or(ActualRole::Secondary)),
            data_state: Some(if blank {
                ReplicaData::Blank
            } else {
                ReplicaData::Consistent
            }),
            designation: self.designation,
            primary_under: self.primary_under,
            released: self.released(),
            refused: close.or(self
                .refused_promote
                .map(|token| refused(RefusedOrder::Promote, token, true))),
            opened_by: if self.open { vec![user] } else { Vec::new() },
            forks: self.forks.iter().map(fork).collect(),
            lag: Some(mars_crds::Lag {
                bytes: 0,
                seconds: 0,
                as_of: None,
            }),
            lineage: self.lineage(),
            positions: (!blank).then(|| Positions {
                durable: self.end(),
                applied: 0,
                dirty_end: 0,
                log_start: 0,
                replayed: 0,
            }),
            ..MarsReplicaStatus::default()
        }
    }

    /// Acts upon the order as last read. `refuse`: this time a promotion is refused for good.
    pub(crate) fn act(&mut self, refuse: bool, fresh_epoch: Uuid) {
        let Some(order) = self.order.clone() else { return };
        let Some(token) = order.designation else { return };
        let known = self.designation.map_or(0, |designation| designation.number);
        if token.number < known {
            return;
        }
        self.refused_close = None;
        match (self.is_primary(), order.role) {
            (true, WishRole::Primary) => {
                self.designation = Some(token);
                self.primary_under = Some(token);
            }
            (true, WishRole::Secondary) if Some(token) == self.primary_under => {}
            (true, WishRole::Secondary) => self.leave(&order, token),
            (false, WishRole::Primary) => self.promote(&order, token, refuse, fresh_epoch),
            (false, WishRole::Secondary) => self.designation = Some(token),
        }
    }

    fn leave(&mut self, order: &MarsReplicaSpec, token: DesignationRef) {
        if self.open {
            self.refused_close = order.close_for.map(|_| token);
            return;
        }
        self.designation = Some(token);
        if let Some(close) = order.close_for {
            self.log.push(Record::Close(close.replica_uuid));
            self.closed = Some(token);
        }
        self.role = Some(ActualRole::Secondary);
    }

    fn promote(&mut self, order: &MarsReplicaSpec, token: DesignationRef, refuse: bool, fresh_epoch: Uuid) {
        self.designation = Some(token);
        let closed_for_other = match self.log.last() {
            Some(Record::Close(Some(to))) => *to != order.replica_uuid,
            _ => false,
        };
        if self.refused_promote == Some(token) {
            return;
        }
        let resumes = self.primary_under == Some(token) && self.released().is_none();
        let may = match (order.cause.unwrap_or_default(), &order.handover_end) {
            _ if resumes => true,
            (GrantCause::Create, _) => self.log.is_empty() && !order.established,
            (GrantCause::Handover, Some(end)) => *end == self.end(),
            (GrantCause::Handover, None) => !closed_for_other && self.own_epochs.contains(&self.end().epoch),
            (GrantCause::Failover, _) => !self.log.is_empty(),
        };
        let hopeless = !self.forks.is_empty();
        if !resumes && order.handover_end.is_some() && ((may && refuse) || (!may && hopeless)) {
            self.refused_promote = Some(token);
        } else if may {
            self.log.push(Record::Epoch(fresh_epoch));
            self.own_epochs.insert(fresh_epoch);
            self.role = Some(ActualRole::Primary);
            self.primary_under = Some(token);
            self.closed = None;
        }
    }

    /// The agent restarts: it is secondary until it has read its orders again.
    pub(crate) fn crash(&mut self) {
        if self.open {
            self.open = false;
        }
        self.role = Some(ActualRole::Secondary);
        self.refused_close = None;
        self.order = None;
    }
}
