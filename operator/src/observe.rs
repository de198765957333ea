//! Builds a [`World`] for one resource: from the watch cache, or read from the API server for a decision.
//!
//! Invariant: a fresh world reads the resource *last*, so that the designation in it is never older than the reports it
//! is compared with. An object that cannot be decoded is named, never passed over.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::Client;
use kube::api::{DynamicObject, ListParams};
use mars_crds::{MarsAction, MarsNode, MarsReplica, MarsResource};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cache::{Cache, Kind, resource_of};
use crate::hearing::Hearing;
use crate::world::{KubeNode, NodeView, Settings, World, with_own_status};

/// The taint an administrator sets after a node was switched off.
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";

/// Objects of all kinds, undecoded.
struct Raw {
    resource: Arc<DynamicObject>,
    replicas: Vec<Arc<DynamicObject>>,
    nodes: Vec<Arc<DynamicObject>>,
    actions: Vec<Arc<DynamicObject>>,
    kube_nodes: Vec<Arc<DynamicObject>>,
}

/// What is needed besides the objects.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Signs of life.
    pub hearing: Arc<Hearing>,
    /// Limits and thresholds.
    pub settings: Settings,
    /// When positions were last written to the status of the resource.
    pub positions_written: Option<Timestamp>,
}

/// A resource that cannot be observed.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The resource itself cannot be decoded.
    #[error("the MarsResource cannot be read: {0}; look at it with `kubectl get mars -o yaml` and correct it")]
    Undecodable(String),
    /// The API server does not answer.
    #[error("the API server did not answer: {0}")]
    Api(#[from] kube::Error),
}

/// From the watch cache; `None` when the resource is not there.
///
/// # Errors
/// When the resource cannot be decoded.
pub fn cached(cache: &Cache, around: &Surroundings, name: &str) -> Result<Option<World>, ObserveError> {
    let Some(resource) = cache.get(Kind::Resource, name) else {
        return Ok(None);
    };
    let raw = Raw {
        resource,
        replicas: cache.list(Kind::Replica),
        nodes: cache.list(Kind::Node),
        actions: cache.list(Kind::Action),
        kube_nodes: cache.list(Kind::KubeNode),
    };
    decode(&raw, around, name, false).map(Some)
}

/// Read from the API server now; `None` when the resource is not there.
///
/// # Errors
/// When the API server does not answer or the resource cannot be decoded.
pub async fn fresh(client: &Client, around: &Surroundings, name: &str) -> Result<Option<World>, ObserveError> {
    let list = |kind: Kind| {
        let api = kind.api(client.clone());
        async move {
            let objects = api.list(&ListParams::default()).await?;
            Ok::<_, kube::Error>(objects.items.into_iter().map(Arc::new).collect::<Vec<_>>())
        }
    };
    let (replicas, nodes, actions, kube_nodes) = tokio::try_join!(
        list(Kind::Replica),
        list(Kind::Node),
        list(Kind::Action),
        list(Kind::KubeNode)
    )?;
    let Some(resource) = Kind::Resource.api(client.clone()).get_opt(name).await? else {
        return Ok(None);
    };
    let raw = Raw {
        resource: Arc::new(resource),
        replicas,
        nodes,
        actions,
        kube_nodes,
    };
    decode(&raw, around, name, true).map(Some)
}

fn decode(raw: &Raw, around: &Surroundings, name: &str, fresh: bool) -> Result<World, ObserveError> {
    let resource: MarsResource = parse(&raw.resource).map_err(|(_, reason)| ObserveError::Undecodable(reason))?;
    let mut undecodable = Vec::new();
    let replicas: Vec<MarsReplica> = ours(&raw.replicas, name, &mut undecodable);
    let mut replicas: Vec<MarsReplica> = replicas.into_iter().map(with_own_status).collect();
    replicas.sort_by(|left, right| left.spec.node.cmp(&right.spec.node));
    let mut bad_actions = Vec::new();
    let mut actions: Vec<MarsAction> = ours(&raw.actions, name, &mut bad_actions);
    for bad in bad_actions {
        tracing::warn!(
            resource = name,
            action = bad,
            "an action cannot be read and is passed over"
        );
    }
    actions.sort_by_key(|action| (action.metadata.creation_timestamp.clone(), action.metadata.name.clone()));
    let now = Timestamp::now();
    let nodes = nodes(raw, &resource, &replicas, around, now, &mut undecodable);
    Ok(World {
        now,
        fresh,
        resource,
        replicas,
        nodes,
        actions,
        undecodable,
        positions_written: around.positions_written,
        settings: around.settings.clone(),
    })
}

fn ours<T: DeserializeOwned + kube::Resource>(
    raw: &[Arc<DynamicObject>],
    resource: &str,
    undecodable: &mut Vec<String>,
) -> Vec<T> {
    let belongs = |object: &Arc<DynamicObject>| {
        let by_name = object.metadata.name.as_deref().and_then(|name| name.split('.').next()) == Some(resource);
        resource_of(object).map_or(by_name, |owner| owner == resource)
    };
    let mut objects = Vec::new();
    for object in raw.iter().filter(|object| belongs(object)) {
        match parse(object) {
            Ok(decoded) => objects.push(decoded),
            Err((name, reason)) => undecodable.push(format!("{name}: {reason}")),
        }
    }
    objects
}

fn parse<T: DeserializeOwned + kube::Resource>(object: &DynamicObject) -> Result<T, (String, String)> {
    let name = object.metadata.name.clone().unwrap_or_default();
    object.clone().try_parse().map_err(|error| (name, error.to_string()))
}

fn nodes(
    raw: &Raw,
    resource: &MarsResource,
    replicas: &[MarsReplica],
    around: &Surroundings,
    now: Timestamp,
    undecodable: &mut Vec<String>,
) -> BTreeMap<String, NodeView> {
    let mut views: BTreeMap<String, NodeView> = BTreeMap::new();
    let members = resource.spec.replicas.iter().map(|member| member.node.clone());
    for node in members.chain(replicas.iter().map(|replica| replica.spec.node.clone())) {
        views.entry(node).or_default();
    }
    for object in &raw.nodes {
        let name = object.metadata.name.clone().unwrap_or_default();
        match parse::<MarsNode>(object) {
            Ok(node) => {
                around.hearing.note(&node, now);
                let holds_ours = node.status.iter().flat_map(|status| &status.replicas).any(|found| {
                    Some(&found.resource) == resource.metadata.name.as_ref()
                        || resource.status.as_ref().and_then(|status| status.uuid) == Some(found.resource_uuid)
                });
                if holds_ours || views.contains_key(&name) {
                    views.entry(name).or_default().object = Some(node);
                }
            }
            Err((name, reason)) if views.contains_key(&name) => undecodable.push(format!("MarsNode {name}: {reason}")),
            Err(_) => {}
        }
    }
    for (name, view) in &mut views {
        view.silent_seconds = around.hearing.silent_seconds(name);
        let mut kube_nodes = raw.kube_nodes.iter();
        view.kube_node = kube_nodes
            .find(|object| object.metadata.name.as_ref() == Some(name))
            .map(|object| kube_node(object));
    }
    views
}

/// A Node that cannot be decoded is there; that it is tainted nobody can say.
fn kube_node(object: &DynamicObject) -> KubeNode {
    let decoded = parse::<Node>(object).ok();
    let spec = decoded.and_then(|node| node.spec).unwrap_or_default();
    let mut taints = spec.taints.into_iter().flatten();
    KubeNode {
        uid: object.metadata.uid.clone().unwrap_or_default(),
        taint: taints.find(|taint| taint.key == OUT_OF_SERVICE).map(|taint| taint.key),
    }
}
