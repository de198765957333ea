//! What is in the store of this node, whether an object for it is known or not.
//!
//! Invariants (P12): an inventory is complete only if every directory in the store says what it is – one that is empty, not mounted,
//! damaged or of a newer version may be anything; no disk is given to a new replica while a directory here records it as another's,
//! or might.

use super::context::{NodeContext, Views};
use super::superblock::{self, Superblock};
use crate::layout::{LayoutError, io_error};
use crate::pool::backing::{BackingError, BackingRecord};
use crate::pool::sysfs::DevNo;
use mars_crds::node::FoundReplica;
use mars_engine::types::ReplicaId;
use std::path::{Path, PathBuf};

/// Every replica whose data is in the store.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Those that say who they are.
    pub replicas: Vec<FoundReplica>,
    /// Directories that do not, each with the reason; the inventory is complete when there are none.
    pub unreadable: Vec<String>,
}

/// The directories in a store.
#[derive(Debug, Default)]
struct Scan {
    known: Vec<(PathBuf, Superblock)>,
    unreadable: Vec<String>,
}

/// Takes the inventory.
///
/// # Errors
/// The store cannot be listed: then nothing is known about it.
pub fn take(node: &NodeContext) -> Result<Inventory, LayoutError> {
    let views = node.views.borrow().clone();
    let Scan { known, unreadable } = scan(&node.layout.replicas_dir())?;
    let mut replicas: Vec<_> = known.iter().map(|(_, superblock)| found(superblock, &views)).collect();
    replicas.sort_by_key(|found| found.replica_uuid);
    Ok(Inventory { replicas, unreadable })
}

fn found(superblock: &Superblock, views: &Views) -> FoundReplica {
    let replica = superblock.belongs.replica;
    let live = views.get(&replica).map(|view| &view.status);
    FoundReplica {
        replica_uuid: replica.0,
        resource_uuid: superblock.belongs.resource.0,
        resource: superblock.resource_name.clone(),
        size_bytes: Some(
            live.and_then(|status| status.size_bytes)
                .unwrap_or(super::object::signed(superblock.size_bytes)),
        ),
        role: live.and_then(|status| status.role),
        data_state: live.and_then(|status| status.data_state),
        designation: live.and_then(|status| status.designation),
        primary_under: live.and_then(|status| status.primary_under),
    }
}

fn scan(store: &Path) -> Result<Scan, LayoutError> {
    let mut scan = Scan::default();
    for entry in std::fs::read_dir(store).map_err(io_error("list", store))? {
        let path = entry.map_err(io_error("list", store))?.path();
        // Made by file systems in their root, for themselves.
        if path.file_name().is_some_and(|name| name == "lost+found") {
            continue;
        }
        match std::fs::metadata(&path) {
            Ok(metadata) if !metadata.is_dir() => continue,
            Ok(_) => {}
            Err(error) => {
                scan.unreadable.push(format!("{}: {error}", path.display()));
                continue;
            }
        }
        match superblock::peek(&path) {
            Ok(superblock) => scan.known.push((path, superblock)),
            // Removed by an ordered deletion since it was listed.
            Err(_) if !path.exists() => {}
            Err(error) => scan.unreadable.push(error.to_string()),
        }
    }
    scan.unreadable.sort();
    Ok(scan)
}

/// Refuses the block device at `path` for a new replica if another directory in the store records it, or cannot be read.
///
/// # Errors
/// [`BackingError::Recorded`], [`BackingError::RecordsUnreadable`]; or the store cannot be listed.
pub fn refuse_recorded(store: &Path, replica: ReplicaId, path: &Path) -> Result<(), BackingError> {
    let scan = scan(store)?;
    let own = store.join(replica.to_string());
    for (dir, superblock) in &scan.known {
        if *dir == own {
            continue;
        }
        if let Some(BackingRecord::Device { path: recorded, medium }) = &superblock.backing
            && is_same(path, recorded, medium)
        {
            return Err(BackingError::Recorded {
                path: path.to_path_buf(),
                resource: superblock.resource_name.clone(),
                directory: dir.clone(),
            });
        }
    }
    if scan.unreadable.is_empty() {
        return Ok(());
    }
    Err(BackingError::RecordsUnreadable {
        path: path.to_path_buf(),
        unreadable: scan.unreadable.join("; "),
    })
}

/// Whether a path leads to a recorded device, to a part of it, or to the whole of which it is a part.
fn is_same(path: &Path, recorded: &Path, medium: &[(String, String)]) -> bool {
    if path == recorded {
        return true;
    }
    let number = |path: &Path| DevNo::of_block_device(path).ok().flatten();
    let Some(now) = number(path) else { return false };
    let overlaps = |other: DevNo| now == other || now.whole_disk() == Some(other) || other.whole_disk() == Some(now);
    let same_medium = |medium: &[(String, String)]| {
        // A number in a controller says nothing about the medium.
        medium.iter().any(|(attribute, _)| attribute != "nsid") && now.medium_identity() == medium
    };
    number(recorded).is_some_and(overlaps) || same_medium(medium)
}

#[cfg(test)]
mod tests {
    use super::super::superblock::{Belongs, ReplicaDir};
    use super::*;
    use mars_engine::types::{ClusterId, NodeId, ResourceId};
    use uuid::Uuid;

    fn replica(store: &Path, number: u128, device: &str) -> ReplicaId {
        let id = Uuid::from_u128;
        let replica = ReplicaId(id(number));
        let belongs = Belongs {
            cluster: ClusterId(id(1)),
            node: NodeId(id(2)),
            resource: ResourceId(id(3)),
            replica,
        };
        let mut dir = ReplicaDir::open(&store.join(replica.to_string()), belongs, "r", 1 << 20, false).unwrap();
        dir.update(|superblock| {
            superblock.backing = Some(BackingRecord::Device {
                path: device.into(),
                medium: Vec::new(),
            });
        })
        .unwrap();
        replica
    }

    #[test]
    fn a59_what_cannot_be_read_makes_an_inventory_incomplete_and_is_named() {
        let store = tempfile::tempdir().unwrap();
        replica(store.path(), 10, "/dev/x");
        std::fs::create_dir(store.path().join("lost+found")).unwrap();
        std::fs::write(store.path().join("notes"), "of an administrator").unwrap();
        let whole = scan(store.path()).unwrap();
        assert_eq!((whole.known.len(), whole.unreadable), (1, vec![]));
        let damaged = replica(store.path(), 11, "/dev/y");
        std::fs::write(store.path().join(damaged.to_string()).join(superblock::FILE), "{").unwrap();
        // The directory over which a file system should be mounted.
        let unmounted = store.path().join(Uuid::from_u128(12).to_string());
        std::fs::create_dir(&unmounted).unwrap();
        let scan = scan(store.path()).unwrap();
        assert_eq!((scan.known.len(), scan.unreadable.len()), (1, 2));
        assert!(scan.unreadable[0].contains(&damaged.to_string()), "{scan:?}");
        assert!(scan.unreadable[1].contains(unmounted.to_str().unwrap()), "{scan:?}");
    }

    #[test]
    fn a59_a_disk_that_another_directory_records_is_refused_and_so_is_any_while_one_is_unreadable() {
        let store = tempfile::tempdir().unwrap();
        let owner = replica(store.path(), 10, "/dev/disk-of-10");
        let joins = ReplicaId(Uuid::from_u128(20));
        let ask = |replica, path: &str| refuse_recorded(store.path(), replica, Path::new(path));
        let refused = ask(joins, "/dev/disk-of-10").unwrap_err().to_string();
        assert!(refused.contains(&owner.to_string()), "{refused}");
        ask(owner, "/dev/disk-of-10").unwrap();
        ask(joins, "/dev/another").unwrap();
        std::fs::write(store.path().join(owner.to_string()).join(superblock::FILE), "{").unwrap();
        let refused = ask(joins, "/dev/another").unwrap_err();
        assert!(matches!(refused, BackingError::RecordsUnreadable { .. }), "{refused}");
    }
}
