//! The last spec of every replica, and the deletions carried out, on the node's own disk (0600).
//!
//! Invariants: a cached object is a whole `MarsReplica` as the API gave it, so that a restart without an API server takes
//! the same path as any other (A-03); a replica with a tombstone never comes back, whatever a late object says (A-62).

use crate::layout::{self, Layout, LayoutError, io_error};
use mars_crds::MarsReplica;
use mars_engine::types::ReplicaId;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::PathBuf;
use uuid::Uuid;

/// A deletion that was carried out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Tombstone {
    /// The replica.
    pub replica_uuid: Uuid,
    /// Name of its resource.
    pub resource: String,
    /// Whether its data was deleted; otherwise it was left where it is.
    pub data_deleted: bool,
    /// When.
    pub time: String,
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Cache {
    specs: PathBuf,
    tombstones: PathBuf,
}

impl Cache {
    /// The cache of a prepared state directory.
    #[must_use]
    pub fn new(layout: &Layout) -> Cache {
        Cache {
            specs: layout.specs_dir(),
            tombstones: layout.tombstones_dir(),
        }
    }

    /// Remembers an object, without what belongs to others (status, managed fields).
    ///
    /// # Errors
    /// It cannot be written; the one before is still there.
    pub fn store(&self, object: &MarsReplica) -> Result<(), LayoutError> {
        let mut object = object.clone();
        object.status = None;
        object.metadata.managed_fields = None;
        let path = self.spec_path(ReplicaId(object.spec.replica_uuid));
        let json =
            serde_json::to_vec_pretty(&object).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
        if fs::read(&path).is_ok_and(|old| old == json) {
            return Ok(());
        }
        layout::write_atomically(&path, &json)
    }

    /// Everything remembered. Files that cannot be read are named beside, and left where they are.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn load(&self) -> Result<(Vec<MarsReplica>, Vec<String>), LayoutError> {
        let (mut objects, mut problems) = (Vec::new(), Vec::new());
        for path in json_files(&self.specs)? {
            let parsed = fs::read(&path)
                .map_err(|error| error.to_string())
                .and_then(|bytes| serde_json::from_slice::<MarsReplica>(&bytes).map_err(|error| error.to_string()));
            match parsed {
                Ok(object) => objects.push(object),
                Err(error) => problems.push(format!("{}: {error}", path.display())),
            }
        }
        Ok((objects, problems))
    }

    /// Forgets a spec; after its tombstone was written.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn forget(&self, replica: ReplicaId) -> Result<(), LayoutError> {
        layout::remove_durably(&self.spec_path(replica))
    }

    /// Records a deletion, durably, before its finalizer is removed.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn bury(&self, tombstone: &Tombstone) -> Result<(), LayoutError> {
        let path = self.tombstone_path(ReplicaId(tombstone.replica_uuid));
        let json =
            serde_json::to_vec_pretty(tombstone).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
        layout::write_atomically(&path, &json)
    }

    /// Whether a replica was deleted here.
    #[must_use]
    pub fn is_buried(&self, replica: ReplicaId) -> bool {
        self.tombstone_path(replica).exists()
    }

    fn spec_path(&self, replica: ReplicaId) -> PathBuf {
        self.specs.join(format!("{replica}.json"))
    }

    fn tombstone_path(&self, replica: ReplicaId) -> PathBuf {
        self.tombstones.join(format!("{replica}.json"))
    }
}

fn json_files(dir: &std::path::Path) -> Result<Vec<PathBuf>, LayoutError> {
    let entries = fs::read_dir(dir).map_err(io_error("list", dir))?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prepared() -> (tempfile::TempDir, layout::DirLock, Cache) {
        let root = tempfile::tempdir().unwrap();
        let layout = Layout {
            state_dir: root.path().to_path_buf(),
            run_dir: root.path().join("run"),
            dev_dir: root.path().join("dev"),
        };
        let lock = layout.prepare().unwrap();
        let cache = Cache::new(&layout);
        (root, lock, cache)
    }

    fn object() -> MarsReplica {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica", "metadata": {"name": "r.a"},
            "spec": {"resource": "r", "node": "a", "resourceUuid": Uuid::from_u128(1),
                "replicaUuid": Uuid::from_u128(2), "sizeBytes": 1_048_576, "backing": {"pool": "default"}},
        }))
        .unwrap()
    }

    #[test]
    fn a03_specs_survive_and_a_damaged_one_hides_no_other() {
        let (_root, _lock, cache) = prepared();
        cache.store(&object()).unwrap();
        fs::write(cache.specs.join("damaged.json"), b"{").unwrap();
        let (objects, problems) = cache.load().unwrap();
        assert_eq!((objects.len(), problems.len()), (1, 1));
        assert_eq!(objects[0].spec, object().spec);
    }

    #[test]
    fn a62_a_tombstone_outlives_the_spec() {
        let (_root, _lock, cache) = prepared();
        let replica = ReplicaId(Uuid::from_u128(2));
        cache.store(&object()).unwrap();
        assert!(!cache.is_buried(replica));
        let tombstone = Tombstone {
            replica_uuid: replica.0,
            resource: "r".into(),
            data_deleted: true,
            time: String::new(),
        };
        cache.bury(&tombstone).unwrap();
        cache.forget(replica).unwrap();
        assert!(cache.is_buried(replica));
        assert_eq!(cache.load().unwrap().0.len(), 0);
    }
}
