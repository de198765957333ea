//! Where status goes: the API server, or files beside a directory of manifests.
//!
//! Invariant: a report that cannot be delivered delays nothing but itself. Only status and our own finalizer are written.

use crate::layout::{self, LayoutError};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client};
use mars_crds::{
    CLUSTER_SECRET, CLUSTER_UUID_KEY, MarsNode, MarsNodeStatus, MarsReplica, MarsReplicaStatus, REPLICA_FINALIZER,
};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

/// One request to the API server takes at most this long.
const REQUEST: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Clone)]
pub enum Sink {
    /// The API server.
    Api(Client),
    /// `<dir>/status/<name>.json`.
    Dir(PathBuf),
}

/// Why a report was not delivered. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    /// The API server refused or did not answer.
    #[error("API server: {0}")]
    Api(#[from] Box<kube::Error>),
    /// The API server took too long.
    #[error("the API server did not answer within {} s", REQUEST.as_secs())]
    Timeout,
    /// The file could not be written.
    #[error(transparent)]
    File(#[from] LayoutError),
    /// The value cannot be encoded or decoded.
    #[error("{0}")]
    Value(String),
}

impl SinkError {
    /// Whether the object does not exist.
    #[must_use]
    pub fn is_absent(&self) -> bool {
        matches!(self, SinkError::Api(error) if matches!(&**error, kube::Error::Api(status) if status.code == 404))
    }
}

async fn limited<T>(request: impl Future<Output = Result<T, kube::Error>>) -> Result<T, SinkError> {
    match tokio::time::timeout(REQUEST, request).await {
        Ok(answer) => answer.map_err(|error| SinkError::Api(Box::new(error))),
        Err(_) => Err(SinkError::Timeout),
    }
}

/// Fields that are left out of `status` when unset must be removed by the merge: they are sent as null.
fn with_nulls(status: &impl serde::Serialize, optional: &[&str]) -> Result<Value, SinkError> {
    let mut value = serde_json::to_value(status).map_err(|error| SinkError::Value(error.to_string()))?;
    if let Some(fields) = value.as_object_mut() {
        for name in optional {
            fields.entry((*name).to_owned()).or_insert(Value::Null);
        }
    }
    Ok(value)
}

/// Fields of `MarsReplicaStatus` that come and go.
const REPLICA_OPTIONAL: [&str; 19] = [
    "observedGeneration",
    "role",
    "dataState",
    "designation",
    "primaryUnder",
    "bootId",
    "nodeUuid",
    "replicaUuid",
    "sizeBytes",
    "diskBytes",
    "positions",
    "lag",
    "sync",
    "released",
    "refused",
    "device",
    "invalidated",
    "fakeSynced",
    "logRotated",
];

impl Sink {
    /// Replaces the status of a `MarsReplica`.
    ///
    /// # Errors
    /// Not delivered.
    pub async fn replica_status(&self, name: &str, status: &MarsReplicaStatus) -> Result<(), SinkError> {
        let value = with_nulls(status, &REPLICA_OPTIONAL)?;
        match self {
            Sink::Api(client) => {
                let api: Api<MarsReplica> = Api::all(client.clone());
                let patch = Patch::Merge(json!({ "status": value }));
                limited(api.patch_status(name, &PatchParams::default(), &patch))
                    .await
                    .map(drop)
            }
            Sink::Dir(dir) => write_status(dir, name, &value),
        }
    }

    /// Removes our finalizer from a `MarsReplica`; one that is gone or has none is fine.
    ///
    /// # Errors
    /// Not delivered.
    pub async fn remove_finalizer(&self, name: &str) -> Result<(), SinkError> {
        let Sink::Api(client) = self else {
            return Ok(());
        };
        let api: Api<MarsReplica> = Api::all(client.clone());
        let Some(object) = limited(api.get_opt(name)).await? else {
            return Ok(());
        };
        if object.metadata.deletion_timestamp.is_none() {
            // It was made anew under this name: its own deletion has not been ordered.
            return Ok(());
        }
        let finalizers = object.metadata.finalizers.unwrap_or_default();
        if !finalizers.iter().any(|finalizer| finalizer == REPLICA_FINALIZER) {
            return Ok(());
        }
        let kept: Vec<_> = finalizers
            .into_iter()
            .filter(|finalizer| finalizer != REPLICA_FINALIZER)
            .collect();
        // With the resourceVersion a finalizer that somebody adds meanwhile is not lost.
        let version = object.metadata.resource_version;
        let patch = json!({ "metadata": { "finalizers": kept, "resourceVersion": version } });
        match limited(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).await {
            Err(error) if error.is_absent() => Ok(()),
            other => other.map(drop),
        }
    }

    /// The `MarsNode` of this node, made with an empty spec when there is none.
    ///
    /// # Errors
    /// Not reachable.
    pub async fn node(&self, name: &str) -> Result<MarsNode, SinkError> {
        let Sink::Api(client) = self else {
            return Ok(MarsNode::new(name, mars_crds::MarsNodeSpec::default()));
        };
        let api: Api<MarsNode> = Api::all(client.clone());
        if let Some(node) = limited(api.get_opt(name)).await? {
            return Ok(node);
        }
        let node = MarsNode::new(name, mars_crds::MarsNodeSpec::default());
        limited(api.create(&PostParams::default(), &node)).await
    }

    /// Replaces the status of this node's `MarsNode`.
    ///
    /// # Errors
    /// Not delivered.
    pub async fn node_status(&self, name: &str, status: &MarsNodeStatus) -> Result<(), SinkError> {
        let value = with_nulls(status, &["nodeUuid", "clusterUuid", "bootId", "logStore", "lastSeen"])?;
        match self {
            Sink::Api(client) => {
                let api: Api<MarsNode> = Api::all(client.clone());
                let patch = Patch::Merge(json!({ "status": value }));
                limited(api.patch_status(name, &PatchParams::default(), &patch))
                    .await
                    .map(drop)
            }
            Sink::Dir(dir) => write_status(dir, &format!("node.{name}"), &value),
        }
    }

    /// The cluster uuid in the Secret of the operator; `None` while there is none.
    ///
    /// # Errors
    /// Not reachable, or not a uuid.
    pub async fn cluster_uuid(&self, namespace: &str) -> Result<Option<Uuid>, SinkError> {
        let Sink::Api(client) = self else { return Ok(None) };
        let api: Api<Secret> = Api::namespaced(client.clone(), namespace);
        let Some(secret) = limited(api.get_opt(CLUSTER_SECRET)).await? else {
            return Ok(None);
        };
        let bytes = secret.data.unwrap_or_default().remove(CLUSTER_UUID_KEY);
        let Some(bytes) = bytes else { return Ok(None) };
        let text = String::from_utf8_lossy(&bytes.0).trim().to_owned();
        let bad = |error: uuid::Error| {
            SinkError::Value(format!(
                "Secret {namespace}/{CLUSTER_SECRET}, key {CLUSTER_UUID_KEY}: {text:?} is not a uuid ({error})"
            ))
        };
        Uuid::parse_str(&text).map(Some).map_err(bad)
    }
}

fn write_status(dir: &std::path::Path, name: &str, value: &Value) -> Result<(), SinkError> {
    let dir = dir.join("status");
    std::fs::create_dir_all(&dir).map_err(layout::io_error("create", &dir))?;
    let json = serde_json::to_vec_pretty(value).map_err(|error| SinkError::Value(error.to_string()))?;
    Ok(layout::write_atomically(&dir.join(format!("{name}.json")), &json)?)
}
