//! Who this node is: a uuid of our own, the cluster it belongs to, and the boot it runs in.
//!
//! Invariant: none of these is ever derived from a host name, an address or a Kubernetes uid, and a node that belongs
//! to a cluster never works for another one.

use crate::layout::{self, Layout, LayoutError, io_error};
use mars_engine::types::{ClusterId, NodeId};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use uuid::Uuid;

const FORMAT_VERSION: u32 = 1;

/// Why the identity cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Trouble with the file.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Not ours, or damaged.
    #[error(
        "{path} is not a node identity ({reason}): restore it from a backup. Only if this node holds no replica \
         may it be removed, which makes this a new node"
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Written by a newer agent.
    #[error("{path} has format version {found}, this agent knows up to {FORMAT_VERSION}: install the newer agent")]
    Version {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u32,
    },
    /// A cluster other than the one this node belongs to.
    #[error(
        "this node belongs to cluster {ours} (recorded in {path}), but was given cluster {theirs}: nothing was \
         changed. Start it with the state directory of that cluster, or correct the cluster's uuid"
    )]
    OtherCluster {
        /// Recorded.
        ours: Uuid,
        /// Offered.
        theirs: Uuid,
        /// The file.
        path: PathBuf,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IdentityFile {
    format_version: u32,
    node_uuid: Uuid,
    #[serde(default)]
    cluster_uuid: Option<Uuid>,
    /// For people only; never compared.
    created_as: String,
}

/// The recorded identity of this node.
#[derive(Debug, Clone)]
pub struct Identity {
    path: PathBuf,
    file: IdentityFile,
}

impl Identity {
    /// Reads the identity, or creates it when this node has none and holds no replica.
    ///
    /// # Errors
    /// The file is damaged, from a newer agent, or missing although replicas exist.
    pub fn load_or_create(layout: &Layout, node_name: &str) -> Result<Identity, IdentityError> {
        let path = layout.node_dir().join("identity.json");
        match fs::read(&path) {
            Ok(bytes) => Self::parse(path, &bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Self::create(layout, path, node_name),
            Err(error) => Err(io_error("read", &path)(error).into()),
        }
    }

    fn parse(path: PathBuf, bytes: &[u8]) -> Result<Identity, IdentityError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct VersionOnly {
            format_version: u32,
        }
        let corrupt = |error: serde_json::Error| IdentityError::Corrupt {
            path: path.clone(),
            reason: error.to_string(),
        };
        let VersionOnly { format_version: found } = serde_json::from_slice(bytes).map_err(corrupt)?;
        if found != FORMAT_VERSION {
            return Err(IdentityError::Version { path, found });
        }
        let file: IdentityFile = serde_json::from_slice(bytes).map_err(corrupt)?;
        if file.node_uuid.is_nil() {
            return Err(IdentityError::Corrupt {
                path,
                reason: "the node uuid is nil".into(),
            });
        }
        Ok(Identity { path, file })
    }

    fn create(layout: &Layout, path: PathBuf, node_name: &str) -> Result<Identity, IdentityError> {
        let replicas = layout.replicas_dir();
        if fs::read_dir(&replicas)
            .map_err(io_error("list", &replicas))?
            .next()
            .is_some()
        {
            return Err(LayoutError::Missing { path }.into());
        }
        let file = IdentityFile {
            format_version: FORMAT_VERSION,
            node_uuid: Uuid::new_v4(),
            cluster_uuid: None,
            created_as: node_name.to_owned(),
        };
        let identity = Identity { path, file };
        identity.save()?;
        Ok(identity)
    }

    fn save(&self) -> Result<(), IdentityError> {
        let json = serde_json::to_vec_pretty(&self.file).map_err(|error| IdentityError::Corrupt {
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        Ok(layout::write_atomically(&self.path, &json)?)
    }

    /// This node.
    #[must_use]
    pub fn node(&self) -> NodeId {
        NodeId(self.file.node_uuid)
    }

    /// The cluster it belongs to, once known.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.file.cluster_uuid.map(ClusterId)
    }

    /// Adopts a cluster, durably, if there is none yet; otherwise only compares.
    ///
    /// # Errors
    /// Another cluster, or the file cannot be written.
    pub fn adopt(&mut self, cluster: ClusterId) -> Result<(), IdentityError> {
        match self.file.cluster_uuid {
            Some(ours) if ours == cluster.0 => Ok(()),
            Some(ours) => Err(IdentityError::OtherCluster {
                ours,
                theirs: cluster.0,
                path: self.path.clone(),
            }),
            None => {
                self.file.cluster_uuid = Some(cluster.0);
                self.save()
            }
        }
    }
}

/// The boot this process runs in: a different value means that the page cache of the last run is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootId(pub Uuid);

impl BootId {
    /// Reads the boot id from the kernel, or from `file` where several nodes share a kernel.
    ///
    /// # Errors
    /// Not readable or not a uuid.
    pub fn read(file: Option<&Path>) -> Result<BootId, IdentityError> {
        let path = file.unwrap_or(Path::new("/proc/sys/kernel/random/boot_id"));
        let text = fs::read_to_string(path).map_err(io_error("read", path))?;
        Uuid::parse_str(text.trim())
            .map(BootId)
            .map_err(|error| IdentityError::Corrupt {
                path: path.to_path_buf(),
                reason: format!("not a boot id: {error}"),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared(root: &Path) -> (Layout, layout::DirLock) {
        let layout = Layout {
            state_dir: root.to_path_buf(),
            run_dir: root.join("run"),
            dev_dir: root.join("dev"),
        };
        let lock = layout.prepare().unwrap();
        (layout, lock)
    }

    #[test]
    fn a61_a_node_keeps_its_uuid_and_refuses_another_cluster() {
        let root = tempfile::tempdir().unwrap();
        let (layout, _lock) = prepared(root.path());
        let mut first = Identity::load_or_create(&layout, "a").unwrap();
        let cluster = ClusterId(Uuid::new_v4());
        first.adopt(cluster).unwrap();
        let mut again = Identity::load_or_create(&layout, "renamed").unwrap();
        assert_eq!(first.node(), again.node());
        assert_eq!(again.cluster(), Some(cluster));
        let refused = again.adopt(ClusterId(Uuid::new_v4())).unwrap_err();
        assert!(matches!(refused, IdentityError::OtherCluster { .. }));
        assert_eq!(Identity::load_or_create(&layout, "a").unwrap().cluster(), Some(cluster));
    }

    #[test]
    fn a59_a_lost_identity_is_not_replaced_while_replicas_exist() {
        let root = tempfile::tempdir().unwrap();
        let (layout, _lock) = prepared(root.path());
        fs::create_dir(layout.replica_dir(Uuid::new_v4())).unwrap();
        assert!(Identity::load_or_create(&layout, "a").is_err());
    }

    #[test]
    fn damaged_and_newer_identities_are_named() {
        let root = tempfile::tempdir().unwrap();
        let (layout, _lock) = prepared(root.path());
        let path = layout.node_dir().join("identity.json");
        fs::write(&path, b"{\"formatVersion\": 2, \"somethingNew\": 1}").unwrap();
        let newer = Identity::load_or_create(&layout, "a").unwrap_err();
        assert!(matches!(newer, IdentityError::Version { found: 2, .. }));
        fs::write(&path, b"garbage").unwrap();
        let corrupt = Identity::load_or_create(&layout, "a").unwrap_err();
        assert!(matches!(corrupt, IdentityError::Corrupt { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"garbage");
    }
}
