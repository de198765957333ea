//! The embedded API with agents of the model behind it: real clients, real watches, real conflicts.

use crate::common::model::Agent;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, Node};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mars_crds::node::FoundReplica;
use mars_crds::{
    MarsAction, MarsNode, MarsNodeSpec, MarsNodeStatus, MarsReplica, MarsResource, ReplicaData, replica_name,
};
use mars_local::embedded::{EmbeddedApi, Setup};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Longest a test waits for anything.
const PATIENCE: Duration = Duration::from_mins(1);
pub(crate) const RESOURCE: &str = "mydata";

/// What a node's disk holds, besides the log.
#[derive(Debug, Clone, Copy)]
struct Identity {
    replica: Uuid,
    resource: Uuid,
}

/// Shared by the agents, as the disks and the network between them would be.
#[derive(Default)]
pub(crate) struct Machines {
    pub(crate) agents: BTreeMap<String, Agent>,
    identities: BTreeMap<String, Identity>,
    /// What was broken, if anything.
    pub(crate) violation: Option<String>,
    pub(crate) promotions: usize,
    /// A failover was forced: two primaries for a while are what was asked for.
    pub(crate) forced: bool,
    /// Nodes that are switched off.
    pub(crate) off: Vec<String>,
}

pub(crate) struct Cluster {
    pub(crate) api: EmbeddedApi,
    pub(crate) client: Client,
    pub(crate) machines: Arc<Mutex<Machines>>,
    stop: CancellationToken,
    _directory: tempfile::TempDir,
}

impl Cluster {
    /// As a real API server would be; with other `definitions`, nothing but those is checked.
    pub(crate) async fn start(nodes: &[&str], definitions: Option<Vec<Value>>) -> Cluster {
        let directory = tempfile::tempdir().expect("a directory");
        let setup = match definitions {
            Some(definitions) => Setup {
                definitions,
                ..Setup::bare()
            },
            None => Setup {
                definitions: mars_local::mars::definitions(),
                admission: mars_local::mars::admission(),
                ..Setup::bare()
            },
        };
        let api = EmbeddedApi::start(directory.path(), setup)
            .await
            .expect("the API starts");
        let client = api.client().expect("a client");
        let cluster = Cluster {
            client,
            api,
            machines: Arc::default(),
            stop: CancellationToken::new(),
            _directory: directory,
        };
        for node in nodes {
            cluster
                .machines
                .lock()
                .expect("sound")
                .agents
                .insert((*node).to_owned(), Agent::new(node));
            let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
            let object: Node = serde_json::from_value(object).expect("a Node");
            let nodes: Api<Node> = Api::all(cluster.client.clone());
            nodes.create(&PostParams::default(), &object).await.expect("a Node");
            let mars: Api<MarsNode> = Api::all(cluster.client.clone());
            let object = MarsNode::new(node, MarsNodeSpec::default());
            mars.create(&PostParams::default(), &object).await.expect("a MarsNode");
            let (client, machines, stop) = (cluster.client.clone(), cluster.machines.clone(), cluster.stop.clone());
            tokio::spawn(run_agent((*node).to_owned(), client, machines, stop));
        }
        cluster
    }

    pub(crate) async fn finish(self) {
        self.stop.cancel();
        assert_eq!(self.machines.lock().expect("sound").violation, None);
        self.api.stop().await;
    }

    pub(crate) fn resources(&self) -> Api<MarsResource> {
        Api::all(self.client.clone())
    }

    pub(crate) async fn create(&self, name: &str, spec: &Value) {
        let object = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource", "metadata": {"name": name}, "spec": spec});
        let object: MarsResource = serde_json::from_value(object).expect("a resource");
        self.resources()
            .create(&PostParams::default(), &object)
            .await
            .expect("created");
    }

    pub(crate) async fn patch(&self, patch: Value) {
        // Faults may be on for others, never for this client.
        self.resources()
            .patch(RESOURCE, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .expect("patched");
    }

    pub(crate) async fn act(&self, name: &str, spec: Value) {
        let object = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction", "metadata": {"name": name}, "spec": spec});
        let object: MarsAction = serde_json::from_value(object).expect("an action");
        let actions: Api<MarsAction> = Api::all(self.client.clone());
        actions.create(&PostParams::default(), &object).await.expect("created");
    }

    pub(crate) async fn resource(&self) -> Option<MarsResource> {
        self.resources().get_opt(RESOURCE).await.expect("readable")
    }

    pub(crate) async fn events(&self) -> Vec<String> {
        let events: Api<Event> = Api::namespaced(self.client.clone(), "default");
        let list = events.list(&ListParams::default()).await.expect("listed");
        list.items.into_iter().filter_map(|event| event.reason).collect()
    }

    /// Waits until the resource is as `wanted`.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&MarsResource) -> bool) -> MarsResource {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let resource = self.resource().await;
            if let Some(resource) = resource.as_ref().filter(|resource| wanted(resource)) {
                return resource.clone();
            }
            assert!(
                Instant::now() < deadline,
                "{what}: not within {PATIENCE:?}: {resource:#?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) async fn until_gone(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Some(resource) = self.resource().await {
            assert!(Instant::now() < deadline, "not gone: {resource:#?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Removes an object as a disaster would: without asking anybody.
    pub(crate) async fn destroy_all(&self) {
        let replicas: Api<MarsReplica> = Api::all(self.client.clone());
        let nobody = Patch::Merge(json!({"metadata": {"finalizers": null}}));
        for replica in replicas.list(&ListParams::default()).await.expect("listed") {
            let name = replica.metadata.name.unwrap_or_default();
            replicas
                .patch(&name, &PatchParams::default(), &nobody)
                .await
                .expect("patched");
            replicas.delete(&name, &DeleteParams::default()).await.expect("deleted");
        }
        self.resources()
            .patch(RESOURCE, &PatchParams::default(), &nobody)
            .await
            .expect("patched");
        self.resources()
            .delete(RESOURCE, &DeleteParams::default())
            .await
            .expect("deleted");
    }
}

async fn run_agent(node: String, client: Client, machines: Arc<Mutex<Machines>>, stop: CancellationToken) {
    let mut beat = 0;
    while !stop.is_cancelled() {
        if machines.lock().expect("sound").off.contains(&node) {
            tokio::time::sleep(Duration::from_millis(15)).await;
            continue;
        }
        // An agent lives on through every error of the API.
        if beat % 10 == 0 {
            let _ = heartbeat(&node, &client, &machines).await;
        }
        beat += 1;
        let _ = agent_round(&node, &client, &machines).await;
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
}

async fn heartbeat(node: &str, client: &Client, machines: &Mutex<Machines>) -> Result<(), kube::Error> {
    let api: Api<MarsNode> = Api::all(client.clone());
    let mut object = api.get(node).await?;
    let found: Vec<FoundReplica> = {
        let machines = machines.lock().expect("sound");
        let agent = &machines.agents[node];
        let identity = machines.identities.get(node);
        identity.into_iter().map(|identity| found(agent, *identity)).collect()
    };
    object.status = Some(MarsNodeStatus {
        node_uuid: Some(Uuid::new_v5(&Uuid::NAMESPACE_OID, node.as_bytes())),
        address: format!("{node}:7777"),
        inventory_complete: true,
        replicas: found,
        last_seen: Some(Time(Timestamp::now())),
        lamport_slip_ms: Timestamp::now().as_millisecond() % 1000,
        ..MarsNodeStatus::default()
    });
    api.replace_status(node, &PostParams::default(), &object)
        .await
        .map(drop)
}

fn found(agent: &Agent, identity: Identity) -> FoundReplica {
    FoundReplica {
        replica_uuid: identity.replica,
        resource_uuid: identity.resource,
        resource: RESOURCE.to_owned(),
        size_bytes: None,
        role: agent.role,
        data_state: Some(if agent.log.is_empty() {
            ReplicaData::Blank
        } else {
            ReplicaData::Consistent
        }),
        designation: agent.designation,
        primary_under: agent.primary_under,
    }
}

async fn agent_round(node: &str, client: &Client, machines: &Mutex<Machines>) -> Result<(), kube::Error> {
    let api: Api<MarsReplica> = Api::all(client.clone());
    let name = replica_name(RESOURCE, node);
    let Some(mut object) = api.get_opt(&name).await? else {
        return Ok(());
    };
    let mut leaves = false;
    {
        let mut machines = machines.lock().expect("sound");
        let before = object.status.take();
        object.status = Some(act(&mut machines, node, &object));
        if object.metadata.deletion_timestamp.is_some() && !machines.agents[node].open {
            machines.agents.insert(node.to_owned(), Agent::new(node));
            machines.identities.remove(node);
            leaves = true;
        } else if object.status == before {
            return Ok(());
        }
    }
    if leaves {
        let patch = json!({"metadata": {"finalizers": null}});
        return api
            .patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop);
    }
    api.replace_status(&name, &PostParams::default(), &object)
        .await
        .map(drop)
}

fn act(machines: &mut Machines, node: &str, object: &MarsReplica) -> mars_crds::MarsReplicaStatus {
    let identity = Identity {
        replica: object.spec.replica_uuid,
        resource: object.spec.resource_uuid,
    };
    let known = *machines.identities.entry(node.to_owned()).or_insert(identity);
    let others: Vec<(Uuid, Agent)> = object
        .spec
        .peers
        .iter()
        .filter_map(|peer| Some((peer.replica_uuid, machines.agents.get(&peer.node)?.clone())))
        .collect();
    let agent = machines.agents.get_mut(node).expect("an agent");
    if known.replica == identity.replica {
        agent.order = Some(object.spec.clone());
        let was_primary = agent.is_primary();
        agent.act(false, Uuid::new_v4());
        machines.promotions += usize::from(agent.is_primary() && !was_primary);
        for (uuid, other) in &others {
            agent.fetch(other, *uuid, 100);
        }
    }
    let status = agent.status();
    let primaries: Vec<&String> = machines
        .agents
        .iter()
        .filter(|(_, agent)| agent.is_primary())
        .map(|(node, _)| node)
        .collect();
    if primaries.len() > 1 && !machines.forced && machines.violation.is_none() {
        machines.violation = Some(format!("several primaries: {primaries:?}"));
    }
    status
}
