//! What the watches have brought, undecoded.
//!
//! Invariant: objects are kept as they came, so that one that cannot be decoded never stalls a watch; whoever observes
//! decodes and names what it cannot read.

use futures::StreamExt;
use kube::api::{ApiResource, DynamicObject};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client};
use mars_crds::{MarsAction, MarsNode, MarsReplica, MarsResource};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, RwLock};
use tokio_util::sync::CancellationToken;

use crate::hearing::Hearing;
use crate::queue::Queue;

/// The kinds that are watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// `MarsResource`.
    Resource,
    /// `MarsReplica`.
    Replica,
    /// `MarsNode`.
    Node,
    /// `MarsAction`.
    Action,
    /// The Kubernetes Node, for evidence of fencing.
    KubeNode,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 5] = [Kind::Resource, Kind::Replica, Kind::Node, Kind::Action, Kind::KubeNode];

    /// How the API server calls it.
    #[must_use]
    pub fn api_resource(self) -> ApiResource {
        match self {
            Kind::Resource => ApiResource::erase::<MarsResource>(&()),
            Kind::Replica => ApiResource::erase::<MarsReplica>(&()),
            Kind::Node => ApiResource::erase::<MarsNode>(&()),
            Kind::Action => ApiResource::erase::<MarsAction>(&()),
            Kind::KubeNode => ApiResource::erase::<k8s_openapi::api::core::v1::Node>(&()),
        }
    }

    /// Untyped access to all objects of the kind.
    #[must_use]
    pub fn api(self, client: Client) -> Api<DynamicObject> {
        Api::all_with(client, &self.api_resource())
    }
}

type Objects = BTreeMap<String, Arc<DynamicObject>>;

/// The latest state of every watched object.
#[derive(Debug, Default)]
pub struct Cache {
    kinds: RwLock<BTreeMap<Kind, Objects>>,
}

impl Cache {
    /// One object.
    pub fn get(&self, kind: Kind, name: &str) -> Option<Arc<DynamicObject>> {
        self.read(kind, |objects| objects.get(name).cloned())
    }

    /// All objects of a kind.
    pub fn list(&self, kind: Kind) -> Vec<Arc<DynamicObject>> {
        self.read(kind, |objects| objects.values().cloned().collect())
    }

    /// Names of all objects of a kind.
    pub fn names(&self, kind: Kind) -> Vec<String> {
        self.read(kind, |objects| objects.keys().cloned().collect())
    }

    /// Whether every kind has been listed at least once.
    pub fn is_complete(&self) -> bool {
        let kinds = self.kinds.read().unwrap_or_else(PoisonError::into_inner);
        Kind::ALL.iter().all(|kind| kinds.contains_key(kind))
    }

    fn read<T: Default>(&self, kind: Kind, with: impl FnOnce(&Objects) -> T) -> T {
        let kinds = self.kinds.read().unwrap_or_else(PoisonError::into_inner);
        kinds.get(&kind).map(with).unwrap_or_default()
    }

    fn replace(&self, kind: Kind, objects: Objects) -> Objects {
        let mut kinds = self.kinds.write().unwrap_or_else(PoisonError::into_inner);
        kinds.insert(kind, objects).unwrap_or_default()
    }

    fn put(&self, kind: Kind, name: String, object: Option<Arc<DynamicObject>>) -> Option<Arc<DynamicObject>> {
        let mut kinds = self.kinds.write().unwrap_or_else(PoisonError::into_inner);
        let objects = kinds.entry(kind).or_default();
        match object {
            Some(object) => objects.insert(name, object),
            None => objects.remove(&name),
        }
    }
}

/// Keeps `cache` up to date for one kind and marks the resources concerned in `queue`, until cancelled.
pub async fn follow(
    kind: Kind,
    client: Client,
    cache: Arc<Cache>,
    hearing: Arc<Hearing>,
    queue: Arc<Queue>,
    cancel: CancellationToken,
) {
    let stream = watcher(kind.api(client), watcher::Config::default()).default_backoff();
    let mut stream = std::pin::pin!(stream);
    let mut listing = Objects::new();
    loop {
        let event = tokio::select! {
            () = cancel.cancelled() => return,
            event = stream.next() => event,
        };
        let touched: Vec<Arc<DynamicObject>> = match event {
            None => return,
            Some(Err(error)) => {
                tracing::warn!(?kind, %error, "the watch broke and is tried again");
                continue;
            }
            Some(Ok(watcher::Event::Init)) => {
                listing.clear();
                continue;
            }
            Some(Ok(watcher::Event::InitApply(object))) => {
                listing.insert(name(&object), Arc::new(object));
                continue;
            }
            Some(Ok(watcher::Event::InitDone)) => {
                let listed = std::mem::take(&mut listing);
                let present: Vec<_> = listed.values().cloned().collect();
                let before = cache.replace(kind, listed);
                present.into_iter().chain(before.into_values()).collect()
            }
            Some(Ok(watcher::Event::Apply(object))) => {
                let object = Arc::new(object);
                let before = cache.put(kind, name(&object), Some(object.clone()));
                if before.is_some_and(|before| is_heartbeat(kind, &before, &object)) {
                    note(&hearing, kind, &object);
                    continue;
                }
                vec![object]
            }
            Some(Ok(watcher::Event::Delete(object))) => {
                cache.put(kind, name(&object), None);
                vec![Arc::new(object)]
            }
        };
        for object in &touched {
            note(&hearing, kind, object);
        }
        mark(kind, &cache, &queue, &touched);
    }
}

fn name(object: &DynamicObject) -> String {
    object.metadata.name.clone().unwrap_or_default()
}

fn note(hearing: &Hearing, kind: Kind, object: &DynamicObject) {
    if kind == Kind::Node
        && let Ok(node) = object.clone().try_parse::<MarsNode>()
    {
        hearing.note(&node, jiff::Timestamp::now());
    }
}

/// Heartbeats of nodes concern nobody; how long a node is silent is looked at in every periodic pass.
fn is_heartbeat(kind: Kind, before: &DynamicObject, after: &DynamicObject) -> bool {
    let essence = |object: &DynamicObject| {
        let mut data = object.data.clone();
        let status = data.get_mut("status").and_then(serde_json::Value::as_object_mut);
        match (kind, status) {
            (Kind::Node, Some(status)) => {
                for volatile in ["lastSeen", "lamportSlipMs", "logStore", "pools"] {
                    status.remove(volatile);
                }
            }
            (Kind::KubeNode, Some(status)) => status.clear(),
            _ => {}
        }
        data
    };
    matches!(kind, Kind::Node | Kind::KubeNode) && essence(before) == essence(after)
}

fn mark(kind: Kind, cache: &Cache, queue: &Queue, touched: &[Arc<DynamicObject>]) {
    let names: BTreeSet<String> = match kind {
        Kind::Resource => touched.iter().map(|object| name(object)).collect(),
        Kind::Replica | Kind::Action => touched.iter().filter_map(|object| resource_of(object)).collect(),
        Kind::Node | Kind::KubeNode => cache.names(Kind::Resource).into_iter().collect(),
    };
    for name in names {
        queue.add(&name);
    }
}

/// The resource a replica or action says it belongs to, read without decoding the rest.
#[must_use]
pub fn resource_of(object: &DynamicObject) -> Option<String> {
    object
        .data
        .pointer("/spec/resource")
        .and_then(serde_json::Value::as_str)
        .map(str::to_owned)
}
