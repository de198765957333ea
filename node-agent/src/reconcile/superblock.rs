//! The identity file of a replica's directory: whose log this is, where its data is, and whether it ever held any.
//!
//! ```text
//! (no directory) ─► Fresh, no backing ─► Fresh, backing claimed ─► engine files made ─► Established
//! ```
//! Invariants: everything up to `Established` may be started over, since no device was ever shown; from then on nothing is
//! created, and what is missing is `DataMissing` (P12). A directory that names another cluster, node, resource or replica
//! is refused untouched (A-59).

use crate::layout::{self, DirLock, LayoutError, create_private_dir, io_error, sync_dir};
use crate::pool::backing::BackingRecord;
use mars_engine::types::{ClusterId, NodeId, ReplicaId, ResourceId};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// File name in the replica's directory.
pub const FILE: &str = "replica.json";
const FORMAT_VERSION: u32 = 1;

/// Whether the replica may still be made from nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// Being made; was never in use.
    Fresh,
    /// Has (or may have) held data.
    Established,
}

/// All four identities of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Belongs {
    /// Cluster.
    pub cluster: ClusterId,
    /// Node.
    pub node: NodeId,
    /// Resource.
    pub resource: ResourceId,
    /// Replica.
    pub replica: ReplicaId,
}

/// Content of the identity file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Superblock {
    format_version: u32,
    /// Whose it is.
    pub belongs: Belongs,
    /// Name of the resource; for people.
    pub resource_name: String,
    /// Size that the data disk must have at least (bytes).
    pub size_bytes: u64,
    /// See [`Stage`].
    pub stage: Stage,
    /// Where the data is; `None` until the disk was claimed.
    pub backing: Option<BackingRecord>,
}

/// Why a replica directory is not used. Nothing in it was changed.
#[derive(Debug, thiserror::Error)]
pub enum SuperblockError {
    /// A file operation failed, or somebody else holds the directory.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The directory is gone.
    #[error(
        "{path} is missing although this replica has held data: mount the log store, or remove this replica from the \
         resource and join it anew. Nothing was created"
    )]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// The directory belongs to something else.
    #[error("{path} belongs to another {what} ({found}, wanted {wanted}): refused, nothing was changed")]
    Foreign {
        /// The file.
        path: PathBuf,
        /// cluster, node, resource or replica.
        what: &'static str,
        /// Its uuid in the file.
        found: String,
        /// The uuid it should have.
        wanted: String,
    },
    /// Files without an identity.
    #[error(
        "{path} holds files but no {FILE}: it is not known whose they are. Restore {FILE}, or move the directory away"
    )]
    Unidentified {
        /// The directory.
        path: PathBuf,
    },
    /// Damaged or from a newer version.
    #[error("{path}: {reason}. Nothing was changed; restore it, or start the agent that wrote it")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// A replica's directory, locked by this process.
#[derive(Debug)]
pub struct ReplicaDir {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub superblock: Superblock,
    _lock: DirLock,
}

impl ReplicaDir {
    /// Opens the directory of a replica, or makes it for one that has never held data.
    ///
    /// # Errors
    /// See [`SuperblockError`].
    pub fn open(
        path: &Path,
        belongs: Belongs,
        resource_name: &str,
        size_bytes: u64,
        established: bool,
    ) -> Result<ReplicaDir, SuperblockError> {
        if !path.is_dir() {
            if established {
                return Err(SuperblockError::Missing {
                    path: path.to_path_buf(),
                });
            }
            create_private_dir(path)?;
            sync_dir(path.parent().unwrap_or(Path::new("/")))?;
        }
        let lock = DirLock::take(path)?;
        let file = path.join(FILE);
        let superblock = match fs::read(&file) {
            Ok(bytes) => parse(&file, &bytes)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if established || !is_unused(path)? {
                    return Err(SuperblockError::Unidentified {
                        path: path.to_path_buf(),
                    });
                }
                let fresh = Superblock {
                    format_version: FORMAT_VERSION,
                    belongs,
                    resource_name: resource_name.to_owned(),
                    size_bytes,
                    stage: Stage::Fresh,
                    backing: None,
                };
                write(&file, &fresh)?;
                fresh
            }
            Err(error) => return Err(io_error("read", &file)(error).into()),
        };
        check(&file, &superblock.belongs, &belongs)?;
        if established && superblock.stage == Stage::Fresh {
            return Err(SuperblockError::Missing {
                path: path.to_path_buf(),
            });
        }
        Ok(ReplicaDir {
            path: path.to_path_buf(),
            superblock,
            _lock: lock,
        })
    }

    /// Changes the identity file, durably.
    ///
    /// # Errors
    /// It cannot be written; the old content is then still there.
    pub fn update(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<(), SuperblockError> {
        let mut changed = self.superblock.clone();
        change(&mut changed);
        write(&self.path.join(FILE), &changed)?;
        self.superblock = changed;
        Ok(())
    }

    /// Removes what an earlier, unfinished attempt to make this replica has left. Only for a fresh one.
    ///
    /// # Errors
    /// A file cannot be removed.
    ///
    /// # Panics
    /// When the replica is established: its files are never removed here.
    pub fn start_over(&self) -> Result<(), SuperblockError> {
        assert_eq!(
            self.superblock.stage,
            Stage::Fresh,
            "only a replica that was never in use is made again"
        );
        self.clear()?;
        Ok(sync_dir(&self.path)?)
    }

    /// Removes everything but the identity file.
    fn clear(&self) -> Result<(), LayoutError> {
        for entry in fs::read_dir(&self.path)
            .map_err(io_error("list", &self.path))?
            .flatten()
        {
            if entry.file_name() == FILE {
                continue;
            }
            let path = entry.path();
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_dir {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
            removed.map_err(io_error("remove", &path))?;
        }
        Ok(())
    }

    /// Removes the whole directory, for a deletion that was ordered. The identity file goes last, so that an interrupted
    /// removal is still recognised and finished.
    ///
    /// # Errors
    /// A file cannot be removed; try again.
    pub fn remove(self) -> Result<(), SuperblockError> {
        self.clear()?;
        sync_dir(&self.path)?;
        fs::remove_file(self.path.join(FILE)).map_err(io_error("remove", &self.path))?;
        fs::remove_dir(&self.path).map_err(io_error("remove", &self.path))?;
        Ok(sync_dir(self.path.parent().unwrap_or(Path::new("/")))?)
    }
}

/// Reads an identity file without locking anything; for the inventory.
///
/// # Errors
/// It is missing or not understood.
pub fn peek(dir: &Path) -> Result<Superblock, SuperblockError> {
    let file = dir.join(FILE);
    let bytes = fs::read(&file).map_err(io_error("read", &file))?;
    parse(&file, &bytes)
}

/// Empty, or only the rest of an identity file that never got its name.
fn is_unused(dir: &Path) -> Result<bool, LayoutError> {
    let aside = Path::new(FILE).with_extension("new");
    let mut entries = fs::read_dir(dir).map_err(io_error("list", dir))?.flatten();
    Ok(entries.all(|entry| entry.file_name() == aside.as_os_str()))
}

fn write(file: &Path, superblock: &Superblock) -> Result<(), SuperblockError> {
    let json = serde_json::to_vec_pretty(superblock).map_err(|error| SuperblockError::Unreadable {
        path: file.to_path_buf(),
        reason: error.to_string(),
    })?;
    Ok(layout::write_atomically(file, &json)?)
}

fn parse(file: &Path, bytes: &[u8]) -> Result<Superblock, SuperblockError> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct VersionOnly {
        format_version: u32,
    }
    let unreadable = |reason: String| SuperblockError::Unreadable {
        path: file.to_path_buf(),
        reason,
    };
    let version: VersionOnly = serde_json::from_slice(bytes).map_err(|error| unreadable(error.to_string()))?;
    if version.format_version != FORMAT_VERSION {
        let found = version.format_version;
        return Err(unreadable(format!(
            "format version {found}, this agent knows up to {FORMAT_VERSION}"
        )));
    }
    serde_json::from_slice(bytes).map_err(|error| unreadable(error.to_string()))
}

fn check(file: &Path, found: &Belongs, wanted: &Belongs) -> Result<(), SuperblockError> {
    let pairs = [
        ("cluster", found.cluster.0, wanted.cluster.0),
        ("node", found.node.0, wanted.node.0),
        ("resource", found.resource.0, wanted.resource.0),
        ("replica", found.replica.0, wanted.replica.0),
    ];
    match pairs.into_iter().find(|(_, found, wanted)| found != wanted) {
        None => Ok(()),
        Some((what, found, wanted)) => Err(SuperblockError::Foreign {
            path: file.to_path_buf(),
            what,
            found: found.to_string(),
            wanted: wanted.to_string(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn belongs() -> Belongs {
        let id = Uuid::from_u128;
        Belongs {
            cluster: ClusterId(id(1)),
            node: NodeId(id(2)),
            resource: ResourceId(id(3)),
            replica: ReplicaId(id(4)),
        }
    }

    fn open(dir: &Path, belongs: Belongs, established: bool) -> Result<ReplicaDir, SuperblockError> {
        ReplicaDir::open(&dir.join("replica"), belongs, "r", 1 << 20, established)
    }

    #[test]
    fn a59_a_directory_of_another_cluster_node_resource_or_replica_is_refused() {
        let root = tempfile::tempdir().unwrap();
        drop(open(root.path(), belongs(), false).unwrap());
        let other = Uuid::from_u128(99);
        let strangers = [
            Belongs {
                cluster: ClusterId(other),
                ..belongs()
            },
            Belongs {
                node: NodeId(other),
                ..belongs()
            },
            Belongs {
                resource: ResourceId(other),
                ..belongs()
            },
            Belongs {
                replica: ReplicaId(other),
                ..belongs()
            },
        ];
        let before = fs::read(root.path().join("replica").join(FILE)).unwrap();
        for stranger in strangers {
            assert!(matches!(
                open(root.path(), stranger, false),
                Err(SuperblockError::Foreign { .. })
            ));
        }
        assert_eq!(fs::read(root.path().join("replica").join(FILE)).unwrap(), before);
    }

    #[test]
    fn a59_an_established_replica_is_never_made_again() {
        let root = tempfile::tempdir().unwrap();
        assert!(matches!(
            open(root.path(), belongs(), true),
            Err(SuperblockError::Missing { .. })
        ));
        assert!(!root.path().join("replica").exists());
        drop(open(root.path(), belongs(), false).unwrap());
        assert!(matches!(
            open(root.path(), belongs(), true),
            Err(SuperblockError::Missing { .. })
        ));
    }

    #[test]
    fn a59_files_without_an_identity_are_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("replica");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("log-000000001-00000001"), b"x").unwrap();
        assert!(matches!(
            open(root.path(), belongs(), false),
            Err(SuperblockError::Unidentified { .. })
        ));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn an_attempt_that_was_cut_short_is_started_over() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("replica");
        fs::create_dir(&dir).unwrap();
        fs::write(dir.join("replica.new"), b"{").unwrap();
        let opened = open(root.path(), belongs(), false).unwrap();
        fs::write(dir.join("slot-0"), b"half").unwrap();
        opened.start_over().unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a62_a_removal_takes_the_identity_last() {
        let root = tempfile::tempdir().unwrap();
        let opened = open(root.path(), belongs(), false).unwrap();
        fs::create_dir(opened.path.join("log")).unwrap();
        fs::write(opened.path.join("log").join("log-000000001-00000001"), b"x").unwrap();
        opened.remove().unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
