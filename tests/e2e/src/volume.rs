//! One MarsResource in a cluster, driven through the API as a user would.
//!
//! Invariant: every wait is for a fact (an agent's status, a device that answers), never for a wish.

use crate::cluster::{CHANGE_LIMIT, Cluster};
use crate::device::{same_content, wait_device};
use crate::machine::until;
use anyhow::{Context, Result, ensure};
use mars_crds::{ActionPhase, ActualRole, MarsAction, MarsReplica, MarsReplicaStatus, MarsResource, ReplicaData, Verb};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// A MarsResource of a cluster.
pub struct Volume<'a> {
    cluster: &'a Cluster,
    /// Its name.
    pub name: String,
    /// Nodes it is on.
    pub members: Vec<String>,
}

/// A manifest with every member on the pool `default` of its node.
#[must_use]
pub fn manifest(name: &str, size: &str, primary: &str, members: &[&str]) -> Value {
    let replicas: Vec<Value> = members
        .iter()
        .map(|node| json!({ "node": node, "pool": "default" }))
        .collect();
    json!({
        "apiVersion": "mars.storage/v1alpha1",
        "kind": "MarsResource",
        "metadata": { "name": name },
        "spec": { "size": size, "primary": primary, "replicas": replicas },
    })
}

impl<'a> Volume<'a> {
    /// Applies a manifest and waits until the primary serves the device and every other member is consistent.
    pub fn create(cluster: &'a Cluster, name: &str, size: &str, primary: &str, members: &[&str]) -> Result<Self> {
        Self::apply(cluster, &manifest(name, size, primary, members))
    }

    /// The same with a manifest of one's own.
    pub fn apply(cluster: &'a Cluster, manifest: &Value) -> Result<Self> {
        cluster.apply(&manifest.to_string())?;
        let name = manifest["metadata"]["name"]
            .as_str()
            .context("a manifest has a name")?
            .to_owned();
        let nodes = manifest["spec"]["replicas"]
            .as_array()
            .context("a manifest has replicas")?;
        let members = nodes
            .iter()
            .filter_map(|replica| replica["node"].as_str().map(str::to_owned))
            .collect();
        let volume = Self { cluster, name, members };
        let primary = manifest["spec"]["primary"].as_str().unwrap_or_default();
        if !primary.is_empty() {
            volume.wait_primary(primary)?;
        }
        for member in volume.others(primary) {
            volume.wait_consistent(&member)?;
        }
        Ok(volume)
    }

    /// A resource that was applied by other means.
    #[must_use]
    pub fn existing(cluster: &'a Cluster, name: &str, members: &[String]) -> Self {
        Self {
            cluster,
            name: name.to_owned(),
            members: members.to_vec(),
        }
    }

    /// Members other than one.
    #[must_use]
    pub fn others(&self, node: &str) -> Vec<String> {
        self.members.iter().filter(|member| *member != node).cloned().collect()
    }

    /// The object.
    pub fn object(&self) -> Result<MarsResource> {
        self.cluster.get(&self.name)
    }

    /// The MarsReplica of a member.
    pub fn replica(&self, node: &str) -> Result<MarsReplica> {
        self.cluster.get(&mars_crds::replica_name(&self.name, node))
    }

    /// What the agent of a member says now, without the API server.
    pub fn live(&self, node: &str) -> Result<MarsReplicaStatus> {
        self.cluster.node(node).live(&self.name)
    }

    /// Where users find the device on a node.
    #[must_use]
    pub fn device(&self, node: &str) -> PathBuf {
        self.cluster.node(node).device(&self.name)
    }

    /// Waits until a member is primary in fact and its device answers; returns the block device behind the link.
    pub fn wait_primary(&self, node: &str) -> Result<PathBuf> {
        self.wait_live(node, "is primary", |status| status.role == Some(ActualRole::Primary))?;
        wait_device(&self.device(node), CHANGE_LIMIT)
    }

    /// Waits until a member is secondary in fact.
    pub fn wait_secondary(&self, node: &str) -> Result<()> {
        self.wait_live(node, "is secondary", |status| {
            status.role == Some(ActualRole::Secondary)
        })
        .map(drop)
    }

    /// Waits until the data of a member is consistent.
    pub fn wait_consistent(&self, node: &str) -> Result<()> {
        self.wait_live_for(Duration::from_mins(3), node, "is consistent", |status| {
            status.data_state == Some(ReplicaData::Consistent) && status.positions.is_some()
        })
        .map(drop)
    }

    /// Waits for something that the agent of a member says.
    pub fn wait_live(
        &self,
        node: &str,
        what: &str,
        condition: impl Fn(&MarsReplicaStatus) -> bool,
    ) -> Result<MarsReplicaStatus> {
        self.wait_live_for(CHANGE_LIMIT, node, what, condition)
    }

    /// The same with a limit.
    pub fn wait_live_for(
        &self,
        limit: Duration,
        node: &str,
        what: &str,
        condition: impl Fn(&MarsReplicaStatus) -> bool,
    ) -> Result<MarsReplicaStatus> {
        let mut last = MarsReplicaStatus::default();
        until(&format!("{} on {node} {what}", self.name), limit, || {
            last = self.live(node)?;
            Ok(condition(&last))
        })
        .map_err(|error| {
            error.context(format!(
                "the agent of {node} says:\n{}",
                serde_yaml::to_string(&last).unwrap_or_default()
            ))
        })?;
        Ok(last)
    }

    /// Durable end of a member (byte position in the history).
    pub fn durable(&self, node: &str) -> Result<i64> {
        Ok(self.live(node)?.positions.context("no positions yet")?.durable.lsn)
    }

    /// How far the data disk of a member is written and flushed.
    pub fn applied(&self, node: &str) -> Result<i64> {
        Ok(self.live(node)?.positions.context("no positions yet")?.applied)
    }

    /// Waits until a member has durably, and on its disk, all that the primary has durably now. The primary's published end may
    /// be a little older than a flush that has just returned: what counts is what it shows after twenty looks.
    pub fn wait_caught_up(&self, primary: &str, node: &str) -> Result<()> {
        let (mut looks, mut wanted) = (0, 0);
        let what = format!("{} on {node} has applied what {primary} has", self.name);
        until(&what, Duration::from_mins(3), || {
            looks += 1;
            if looks <= 20 {
                wanted = self.durable(primary)?;
                return Ok(false);
            }
            let status = self.live(node)?;
            let positions = status.positions.as_ref();
            Ok(positions.is_some_and(|at| at.durable.lsn >= wanted && at.applied >= wanted))
        })
    }

    /// Waits until the primary's own disk has all that is durable in its log now.
    pub fn wait_written_back(&self, primary: &str) -> Result<()> {
        self.wait_caught_up(primary, primary)
    }

    /// The wish: `spec.primary`.
    pub fn wish_primary(&self, node: &str) -> Result<()> {
        self.cluster.patch_resource(&self.name, &json!({ "primary": node }))
    }

    /// Waits until the resource says, about its present spec, that the role does not move because the device is in use, and
    /// names `user` (a mount point, a pid).
    pub fn wait_device_in_use(&self, user: &str) -> Result<()> {
        let named = |resource: &MarsResource| {
            let status = resource.status.as_ref();
            status
                .into_iter()
                .flat_map(|status| &status.conditions)
                .any(|condition| {
                    condition.type_ == "Switching"
                        && condition.reason == "DeviceInUse"
                        && condition.message.contains(user)
                        && condition.observed_generation == resource.metadata.generation
                })
        };
        let what = format!("says that {user} keeps the role from moving");
        self.cluster.wait(&self.name, &what, named).map(drop)
    }

    /// Planned change of the primary, by the wish; waits until it is a fact.
    pub fn handover(&self, node: &str) -> Result<PathBuf> {
        self.wish_primary(node)?;
        self.wait_primary(node)
    }

    /// Creates a MarsAction with acknowledgement and returns its name.
    pub fn act(&self, verb: Verb, node: Option<&str>) -> Result<String> {
        let uuid = self
            .object()?
            .status
            .unwrap_or_default()
            .uuid
            .context("the resource has no uuid yet")?;
        let verb = serde_json::to_value(verb)?;
        let name = format!("{}-{}", self.name, uuid::Uuid::new_v4().simple());
        let mut spec = json!({ "verb": verb, "resource": self.name, "acknowledge": uuid });
        if let Some(node) = node {
            spec["node"] = json!(node);
        }
        let action = json!({ "apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction", "metadata": { "name": name }, "spec": spec });
        self.cluster.apply(&action.to_string())?;
        Ok(name)
    }

    /// Creates a MarsAction and waits until it has succeeded.
    pub fn act_and_wait(&self, verb: Verb, node: Option<&str>) -> Result<()> {
        let name = self.act(verb, node)?;
        let done: MarsAction = self.cluster.wait(&name, "is over", |action: &MarsAction| {
            let phase = action.status.as_ref().map(|status| status.phase).unwrap_or_default();
            matches!(phase, ActionPhase::Succeeded | ActionPhase::Failed)
        })?;
        let status = done.status.unwrap_or_default();
        ensure!(
            status.phase == ActionPhase::Succeeded,
            "{:?} failed: {}",
            done.spec.verb,
            status.message
        );
        Ok(())
    }

    /// Forced change of the primary; waits until it is a fact.
    pub fn failover(&self, node: &str) -> Result<PathBuf> {
        self.act_and_wait(Verb::Failover, Some(node))?;
        self.wait_primary(node)
    }

    /// The file in the pool of a node in which this resource's data lies.
    pub fn data_file(&self, node: &str) -> Result<PathBuf> {
        let uuid = self.replica(node)?.spec.replica_uuid;
        let file = self.cluster.node(node).pool().join(format!("{uuid}.data"));
        ensure!(
            file.is_file(),
            "{} should be the data of {} on {node}",
            file.display(),
            self.name
        );
        Ok(file)
    }

    /// Compares the data files of two nodes over the size of the device; both must be quiet and applied.
    pub fn same_data(&self, one: &str, other: &str) -> Result<()> {
        let bytes = self.live(one)?.size_bytes.context("the device has no size yet")?;
        same_content(&self.data_file(one)?, &self.data_file(other)?, u64::try_from(bytes)?)
    }

    /// Deletes the resource and waits until all its objects are gone.
    pub fn delete(self) -> Result<()> {
        self.cluster
            .kubectl(&["delete", "marsresource", &self.name, "--wait=false"])?;
        until(
            &format!("{} and its replicas are gone", self.name),
            CHANGE_LIMIT,
            || {
                let replicas: Vec<MarsReplica> = self.cluster.list()?;
                let left = replicas.iter().any(|replica| replica.spec.resource == self.name);
                Ok(!left && self.cluster.find::<MarsResource>(&self.name)?.is_none())
            },
        )
    }
}
