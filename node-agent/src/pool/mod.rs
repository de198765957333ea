//! Storage for data disks: block devices, and pools of files in a directory.
//!
//! A pool is known by the uuid in its marker file, not by its path: a directory without the marker is a mount that
//! is missing (`PoolAbsent`), and a data file that is not in it is missing data (`DataMissing`), never a reason to
//! create either again.
//!
//! Invariant (P12): only a replica recorded as fresh gets a data file created or a disk claimed for the first time.

pub mod backing;
pub mod in_use;
pub mod signature;
pub mod sysfs;
pub mod witness;

use crate::layout::{self, LayoutError, io_error};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Name of the marker file in a pool's directory.
pub const MARKER: &str = ".mars-pool.json";

/// A pool as it was asked for: by `MarsNode.spec.pools` or on the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolWish {
    /// Name used by `MarsReplica.spec.backing.pool`.
    pub name: String,
    /// Its directory; must exist.
    pub directory: PathBuf,
}

/// A pool that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub uuid: Uuid,
    /// Its directory.
    pub directory: PathBuf,
}

/// Room in a file system (bytes).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// All of it.
    pub capacity_bytes: u64,
    /// What may still be allocated.
    pub available_bytes: u64,
}

/// Why a pool or a backing disk cannot be used. Nothing was written when one of these is returned.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// The marker is not there.
    #[error(
        "pool {name} (uuid {uuid}) is absent: {directory} does not hold its marker {MARKER}. Mount the pool's file \
         system there; nothing is created in the empty directory"
    )]
    Absent {
        /// Pool.
        name: String,
        /// Recorded uuid.
        uuid: Uuid,
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// The directory is not there and no pool of this name was ever seen.
    #[error("pool {name}: directory {directory} does not exist. Create it (or mount it) and it becomes the pool")]
    NoDirectory {
        /// Pool.
        name: String,
        /// Directory.
        directory: PathBuf,
    },
    /// Not configured.
    #[error("this node has no pool named {name}: add it to MarsNode.spec.pools (known: {known})")]
    Unknown {
        /// Pool.
        name: String,
        /// What there is.
        known: String,
    },
    /// The marker is somebody else's.
    #[error("pool {name}: {directory} belongs to {owner}; nothing was changed. Use another directory")]
    Foreign {
        /// Pool.
        name: String,
        /// Directory.
        directory: PathBuf,
        /// Whose.
        owner: String,
    },
    /// The marker cannot be read.
    #[error("pool {name}: marker {path} is damaged ({reason}): restore it, its uuid is {uuid}")]
    Marker {
        /// Pool.
        name: String,
        /// The marker.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// What it should say, or "not known here".
        uuid: String,
    },
    /// Storage that lies on a MARS device would wait for itself.
    #[error(transparent)]
    Stacked(#[from] crate::frontend::stacked::Stacked),
    /// Any other trouble with a file.
    #[error(transparent)]
    Layout(#[from] LayoutError),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Marker {
    format_version: u32,
    pool_uuid: Uuid,
    node_uuid: Uuid,
    name: String,
}

/// The pools this node knows, remembered in `node/pools.json` with their uuids.
#[derive(Debug)]
pub struct Pools {
    path: PathBuf,
    node_uuid: Uuid,
    known: BTreeMap<String, Uuid>,
    wishes: BTreeMap<String, PathBuf>,
}

impl Pools {
    /// Reads what is remembered.
    ///
    /// # Errors
    /// The record exists and cannot be read.
    pub fn load(node_dir: &Path, node_uuid: Uuid) -> Result<Pools, PoolError> {
        let path = node_dir.join("pools.json");
        let known = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|error| io_error("parse", &path)(io::Error::new(io::ErrorKind::InvalidData, error)))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(io_error("read", &path)(error).into()),
        };
        Ok(Pools {
            path,
            node_uuid,
            known,
            wishes: BTreeMap::new(),
        })
    }

    /// Replaces the configured pools. Those no longer configured keep their recorded uuid.
    pub fn configure(&mut self, wishes: impl IntoIterator<Item = PoolWish>) {
        self.wishes = wishes.into_iter().map(|wish| (wish.name, wish.directory)).collect();
    }

    /// Names of all configured pools.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.wishes.keys().cloned().collect()
    }

    /// The directory configured for a pool.
    #[must_use]
    pub fn directory(&self, name: &str) -> Option<&Path> {
        self.wishes.get(name).map(PathBuf::as_path)
    }

    /// Finds a pool and proves its identity. A directory that was never a pool of this node becomes one, unless it
    /// is somebody else's.
    ///
    /// # Errors
    /// Not configured, absent, foreign, or on a MARS device.
    pub fn open(&mut self, name: &str) -> Result<Pool, PoolError> {
        let Some(directory) = self.wishes.get(name).cloned() else {
            let known = self.names().join(", ");
            return Err(PoolError::Unknown {
                name: name.into(),
                known: if known.is_empty() { "none".into() } else { known },
            });
        };
        let marker_path = directory.join(MARKER);
        let recorded = self.known.get(name).copied();
        let uuid = match (read_marker(name, &marker_path, recorded)?, recorded) {
            (None, Some(uuid)) => {
                return Err(PoolError::Absent {
                    name: name.into(),
                    uuid,
                    directory,
                });
            }
            (None, None) if !directory.is_dir() => {
                return Err(PoolError::NoDirectory {
                    name: name.into(),
                    directory,
                });
            }
            (None, None) => self.found(name, &marker_path)?,
            (Some(marker), Some(uuid)) if marker.pool_uuid == uuid => uuid,
            (Some(marker), None) if marker.node_uuid == self.node_uuid => self.remember(name, marker.pool_uuid)?,
            (Some(marker), _) => {
                let owner = format!(
                    "pool {} (uuid {}) of node {}",
                    marker.name, marker.pool_uuid, marker.node_uuid
                );
                return Err(PoolError::Foreign {
                    name: name.into(),
                    directory,
                    owner,
                });
            }
        };
        Ok(Pool {
            name: name.into(),
            uuid,
            directory,
        })
    }

    /// Makes a directory a pool: its uuid is recorded here first, so that a marker is never there without a record.
    fn found(&mut self, name: &str, marker_path: &Path) -> Result<Uuid, PoolError> {
        let marker = Marker {
            format_version: 1,
            pool_uuid: Uuid::new_v4(),
            node_uuid: self.node_uuid,
            name: name.to_owned(),
        };
        let json = serde_json::to_vec_pretty(&marker)
            .map_err(|error| io_error("encode", marker_path)(io::Error::other(error)))?;
        layout::write_atomically(marker_path, &json)?;
        self.remember(name, marker.pool_uuid)
    }

    fn remember(&mut self, name: &str, uuid: Uuid) -> Result<Uuid, PoolError> {
        self.known.insert(name.to_owned(), uuid);
        let json = serde_json::to_vec_pretty(&self.known)
            .map_err(|error| io_error("encode", &self.path)(io::Error::other(error)))?;
        layout::write_atomically(&self.path, &json)?;
        Ok(uuid)
    }
}

fn read_marker(name: &str, path: &Path, recorded: Option<Uuid>) -> Result<Option<Marker>, PoolError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(io_error("read", path)(error).into()),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| PoolError::Marker {
            name: name.to_owned(),
            path: path.to_path_buf(),
            reason: error.to_string(),
            uuid: recorded.map_or_else(|| "not known here".to_owned(), |uuid| uuid.to_string()),
        })
}

/// Room in the file system of `path`.
///
/// # Errors
/// The system cannot tell.
pub fn space(path: &Path) -> Result<Space, LayoutError> {
    let stat = rustix::fs::statvfs(path).map_err(|errno| io_error("statvfs", path)(errno.into()))?;
    Ok(Space {
        capacity_bytes: stat.f_blocks.saturating_mul(stat.f_frsize),
        available_bytes: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pools(root: &Path, directory: &Path) -> Pools {
        let mut pools = Pools::load(root, Uuid::from_u128(7)).unwrap();
        pools.configure([PoolWish {
            name: "fast".into(),
            directory: directory.to_path_buf(),
        }]);
        pools
    }

    #[test]
    fn a59_an_unmounted_pool_is_absent_and_nothing_is_written_into_the_empty_directory() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = pools(root.path(), directory.path()).open("fast").unwrap();
        let again = pools(root.path(), directory.path()).open("fast").unwrap();
        assert_eq!(first, again);
        let unmounted = tempfile::tempdir().unwrap();
        let error = pools(root.path(), unmounted.path()).open("fast").unwrap_err();
        assert!(
            matches!(error, PoolError::Absent { uuid, .. } if uuid == first.uuid),
            "{error}"
        );
        assert_eq!(fs::read_dir(unmounted.path()).unwrap().count(), 0);
    }

    #[test]
    fn a59_the_pool_of_another_node_is_refused() {
        let (root, directory) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let other = tempfile::tempdir().unwrap();
        pools(root.path(), directory.path()).open("fast").unwrap();
        let mut theirs = Pools::load(other.path(), Uuid::from_u128(8)).unwrap();
        theirs.configure([PoolWish {
            name: "fast".into(),
            directory: directory.path().to_path_buf(),
        }]);
        assert!(matches!(theirs.open("fast"), Err(PoolError::Foreign { .. })));
    }

    #[test]
    fn a_pool_that_is_not_configured_or_not_there_is_named() {
        let root = tempfile::tempdir().unwrap();
        let mut pools = pools(root.path(), Path::new("/nonexistent/pool"));
        assert!(matches!(pools.open("slow"), Err(PoolError::Unknown { .. })));
        assert!(matches!(pools.open("fast"), Err(PoolError::NoDirectory { .. })));
    }
}
