//! Carries out intents, in order, each guarded by the resourceVersion of the world it was planned from.
//!
//! Invariant: nothing is written unguarded. The first conflict ends the pass: the world has moved, and the next pass
//! plans from the new one.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Api, Client};
use mars_crds::common::HistoryPosition;
use mars_crds::node::Forgotten;
use mars_crds::validate::is_dns_label;
use mars_crds::{
    LABEL_NODE, LABEL_RESOURCE, MarsAction, MarsNode, MarsReplica, MarsReplicaSpec, MarsResource, MarsResourceStatus,
    REPLICA_FINALIZER, RESOURCE_FINALIZER, replica_name,
};
use serde_json::json;
use std::collections::BTreeMap;

use crate::events::Recorder;
use crate::plan::Intent;
use crate::world::World;

/// How a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Everything was written.
    Done,
    /// Somebody else has written meanwhile: plan again.
    Conflict,
}

/// Name under which writes appear in `managedFields`.
pub const FIELD_MANAGER: &str = "mars-operator";

/// Writes for one world.
pub struct Writer<'a> {
    client: &'a Client,
    recorder: &'a Recorder,
    world: &'a World,
}

impl<'a> Writer<'a> {
    /// For intents planned from `world`.
    #[must_use]
    pub fn new(client: &'a Client, recorder: &'a Recorder, world: &'a World) -> Self {
        Writer {
            client,
            recorder,
            world,
        }
    }

    /// Carries out `intents`.
    ///
    /// # Errors
    /// When the API server refuses or does not answer; what was written before stays written.
    pub async fn apply(&self, intents: &[Intent]) -> Result<Outcome, kube::Error> {
        for intent in intents {
            if !matches!(intent, Intent::SetStatus(_)) {
                tracing::info!(resource = self.world.name(), %intent, "carries out");
            }
            match self.one(intent).await {
                Ok(()) => {}
                Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => {
                    tracing::debug!(resource = self.world.name(), %intent, "the object has changed meanwhile");
                    return Ok(Outcome::Conflict);
                }
                Err(kube::Error::Api(status)) if status.is_not_found() => return Ok(Outcome::Conflict),
                Err(error) => return Err(error),
            }
        }
        Ok(Outcome::Done)
    }

    async fn one(&self, intent: &Intent) -> Result<(), kube::Error> {
        match intent {
            Intent::Reobserve => Ok(()),
            Intent::AddFinalizer => self.set_finalizer(true).await,
            Intent::RemoveFinalizer => self.set_finalizer(false).await,
            Intent::RecordUuid(uuid) => self.record(|status| status.uuid = Some(*uuid)).await,
            Intent::RecordDesignation(designation) => {
                self.record(|status| status.designation = Some(designation.as_ref().clone()))
                    .await
            }
            Intent::RecordRelease(end) => self.record(|status| release(status, end)).await,
            Intent::RecordWishSeen { primary, attached } => {
                self.record(|status| {
                    if let Some(designation) = &mut status.designation {
                        designation.wish_seen.clone_from(primary);
                        designation.attached_seen.clone_from(attached);
                    }
                })
                .await
            }
            Intent::RecordTombstone(stone) => self.record(|status| status.tombstones.push(stone.clone())).await,
            Intent::SetStatus(status) => self.record(|present| present.clone_from(status)).await,
            Intent::CreateReplica(spec) => self.create_replica(spec).await,
            Intent::PatchReplica(spec) => self.replace_replica(spec).await,
            Intent::DeleteReplica { node } => self.delete_replica(node).await,
            Intent::ReleaseReplica { node } => self.release_replica(node).await,
            Intent::Forget { node, replica_uuid } => self.forget(node, *replica_uuid).await,
            Intent::SetActionStatus { action, status } => {
                let Some(present) = self.action(action) else {
                    return Ok(());
                };
                let object = MarsAction {
                    status: Some(status.as_ref().clone()),
                    ..present.clone()
                };
                let api: Api<MarsAction> = Api::all(self.client.clone());
                api.replace_status(action, &post(), &object).await.map(drop)
            }
            Intent::DeleteAction { action } => {
                let Some(present) = self.action(action) else {
                    return Ok(());
                };
                let api: Api<MarsAction> = Api::all(self.client.clone());
                api.delete(action, &guarded(&present.metadata)).await.map(drop)
            }
            Intent::EmitEvent(note) => {
                self.recorder.emit(&self.world.resource, note).await;
                Ok(())
            }
        }
    }

    fn action(&self, name: &str) -> Option<&MarsAction> {
        self.world
            .actions
            .iter()
            .find(|action| action.metadata.name.as_deref() == Some(name))
    }

    /// Compare-and-swap on the status of the resource.
    async fn record(&self, change: impl FnOnce(&mut MarsResourceStatus)) -> Result<(), kube::Error> {
        let mut object = self.world.resource.clone();
        change(object.status.get_or_insert_default());
        let api: Api<MarsResource> = Api::all(self.client.clone());
        api.replace_status(self.world.name(), &post(), &object).await.map(drop)
    }

    async fn set_finalizer(&self, present: bool) -> Result<(), kube::Error> {
        let metadata = &self.world.resource.metadata;
        let others = metadata
            .finalizers
            .iter()
            .flatten()
            .filter(|name| *name != RESOURCE_FINALIZER)
            .cloned();
        let finalizers: Vec<String> = others.chain(present.then(|| RESOURCE_FINALIZER.to_owned())).collect();
        let api: Api<MarsResource> = Api::all(self.client.clone());
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": metadata.resource_version}});
        api.patch(self.world.name(), &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop)
    }

    async fn create_replica(&self, spec: &MarsReplicaSpec) -> Result<(), kube::Error> {
        let mut labels = BTreeMap::from([(LABEL_RESOURCE.to_owned(), spec.resource.clone())]);
        if is_dns_label(&spec.node) {
            labels.insert(LABEL_NODE.to_owned(), spec.node.clone());
        }
        let mut object = MarsReplica::new(&replica_name(&spec.resource, &spec.node), spec.clone());
        object.metadata.labels = Some(labels);
        object.metadata.annotations = None;
        object.metadata.finalizers = Some(vec![REPLICA_FINALIZER.to_owned()]);
        let api: Api<MarsReplica> = Api::all(self.client.clone());
        api.create(&post(), &object).await.map(drop)
    }

    async fn replace_replica(&self, spec: &MarsReplicaSpec) -> Result<(), kube::Error> {
        let Some(present) = self.world.replica_on(&spec.node) else {
            return Ok(());
        };
        let object = MarsReplica {
            spec: spec.clone(),
            ..present.clone()
        };
        let name = object.metadata.name.clone().unwrap_or_default();
        let api: Api<MarsReplica> = Api::all(self.client.clone());
        api.replace(&name, &post(), &object).await.map(drop)
    }

    async fn delete_replica(&self, node: &str) -> Result<(), kube::Error> {
        let Some(present) = self.world.replica_on(node) else {
            return Ok(());
        };
        let name = present.metadata.name.clone().unwrap_or_default();
        let api: Api<MarsReplica> = Api::all(self.client.clone());
        api.delete(&name, &guarded(&present.metadata)).await.map(drop)
    }

    async fn release_replica(&self, node: &str) -> Result<(), kube::Error> {
        let Some(present) = self.world.replica_on(node) else {
            return Ok(());
        };
        let metadata = &present.metadata;
        let finalizers: Vec<&String> = metadata
            .finalizers
            .iter()
            .flatten()
            .filter(|name| *name != REPLICA_FINALIZER)
            .collect();
        let patch = json!({"metadata": {"finalizers": finalizers, "resourceVersion": metadata.resource_version}});
        let api: Api<MarsReplica> = Api::all(self.client.clone());
        let name = metadata.name.clone().unwrap_or_default();
        api.patch(&name, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop)
    }

    async fn forget(&self, node: &str, replica_uuid: uuid::Uuid) -> Result<(), kube::Error> {
        let Some(present) = self.world.nodes.get(node).and_then(|view| view.object.as_ref()) else {
            return Ok(());
        };
        let mut forgotten = present.spec.forgotten.clone();
        forgotten.push(Forgotten {
            replica_uuid,
            resource: self.world.name().to_owned(),
        });
        let version = &present.metadata.resource_version;
        let patch = json!({"metadata": {"resourceVersion": version}, "spec": {"forgotten": forgotten}});
        let api: Api<MarsNode> = Api::all(self.client.clone());
        api.patch(node, &PatchParams::default(), &Patch::Merge(patch))
            .await
            .map(drop)
    }
}

fn release(status: &mut MarsResourceStatus, end: &HistoryPosition) {
    let designation = status.designation.as_mut();
    if let Some(predecessor) = designation.and_then(|designation| designation.predecessor.as_mut()) {
        predecessor.released_end = Some(end.clone());
    }
}

fn post() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

pub(crate) fn guarded(metadata: &ObjectMeta) -> DeleteParams {
    let preconditions = Preconditions {
        uid: metadata.uid.clone(),
        resource_version: metadata.resource_version.clone(),
    };
    DeleteParams {
        preconditions: Some(preconditions),
        ..DeleteParams::default()
    }
}
