//! What is in the store of this node, whether an object for it is known or not.
//!
//! Invariants (P12): an inventory is complete only if every directory in the store says what it is – one that is empty, not mounted,
//! damaged or of a newer version may be anything –, and what designation it has seen: a number that is forgotten could be issued again; no
//! disk is given to a new replica while a directory here records it as another's, or might.

use super::context::{NodeContext, Views};
use super::object::designation_ref;
use super::saved::{self, Remembered};
use super::superblock::{self, Superblock};
use crate::layout::{LayoutError, io_error};
use crate::pool::backing::{BackingError, BackingRecord};
use crate::pool::sysfs::DevNo;
use mars_crds::ActualRole;
use mars_crds::node::{Forgotten, FoundReplica};
use mars_engine::types::ReplicaId;
use std::path::{Path, PathBuf};

/// Every replica whose data is in the store.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Those that say who they are.
    pub replicas: Vec<FoundReplica>,
    /// Directories that do not, or not what they have seen, each with the reason; the inventory is complete when there are none.
    pub unreadable: Vec<String>,
}

/// The directories in a store.
#[derive(Debug, Default)]
struct Scan {
    known: Vec<(PathBuf, Superblock)>,
    unreadable: Vec<String>,
}

/// Takes the inventory. What was given up is listed, but whatever it remembers counts no more.
///
/// # Errors
/// The store cannot be listed: then nothing is known about it.
pub fn take(node: &NodeContext, forgotten: &[Forgotten]) -> Result<Inventory, LayoutError> {
    let views = node.views.borrow().clone();
    list(&node.layout.replicas_dir(), &views, forgotten)
}

fn list(store: &Path, views: &Views, forgotten: &[Forgotten]) -> Result<Inventory, LayoutError> {
    let Scan { known, mut unreadable } = scan(store)?;
    let mut replicas = Vec::new();
    for (dir, superblock) in &known {
        let replica = superblock.belongs.replica;
        // A running engine tells more than its slots, which it may be writing.
        let runs = views.get(&replica).is_some_and(|view| view.status.role.is_some());
        let given_up = forgotten.iter().any(|forgotten| forgotten.replica_uuid == replica.0);
        let mut remembered = if runs || given_up {
            Remembered::default()
        } else {
            saved::remembered(dir, superblock)
        };
        // Removed by an ordered deletion since it was listed.
        if let Some(problem) = remembered.unreadable.take()
            && dir.exists()
        {
            unreadable.push(problem);
        }
        replicas.push(found(superblock, views, &remembered));
    }
    replicas.sort_by_key(|found| found.replica_uuid);
    unreadable.sort();
    Ok(Inventory { replicas, unreadable })
}

fn found(superblock: &Superblock, views: &Views, remembered: &Remembered) -> FoundReplica {
    let replica = superblock.belongs.replica;
    let live = views.get(&replica).map(|view| &view.status);
    let saved = |designation: Option<_>| designation.and_then(designation_ref);
    FoundReplica {
        replica_uuid: replica.0,
        resource_uuid: superblock.belongs.resource.0,
        resource: superblock.resource_name.clone(),
        size_bytes: Some(
            live.and_then(|status| status.size_bytes)
                .unwrap_or(super::object::signed(superblock.size_bytes)),
        ),
        // One that is not open takes no writes, whatever role it may come back to.
        role: live
            .and_then(|status| status.role)
            .or(remembered.designation.map(|_| ActualRole::Secondary)),
        data_state: live.and_then(|status| status.data_state),
        // What an ended engine has told last is in its slots, too.
        designation: saved(remembered.designation).or(live.and_then(|status| status.designation)),
        primary_under: saved(remembered.primary_under).or(live.and_then(|status| status.primary_under)),
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
    use super::super::facts::Done;
    use super::super::opening::write_done;
    use super::super::superblock::{Belongs, ReplicaDir, Stage};
    use super::*;
    use mars_engine::api::{Compression, Durability, Tuning};
    use mars_engine::slot::{SLOT_BYTES, Slots};
    use mars_engine::state::{SavedRole, SavedState};
    use mars_engine::store_fs::FsStore;
    use mars_engine::types::{ClusterId, Designation, NodeId, ResourceId};
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

    /// A replica with data that nobody opens: designation 7 was the last it heard of, under 5 it was primary itself.
    fn closed(store: &Path, number: u128) -> (PathBuf, SavedState) {
        let replica = replica(store, number, "/dev/x");
        let dir = store.join(replica.to_string());
        let superblock = superblock::peek(&dir).unwrap();
        ReplicaDir::open(&dir, superblock.belongs, "r", 1 << 20, false)
            .unwrap()
            .update(|superblock| superblock.stage = Stage::Established)
            .unwrap();
        let tuning = Tuning {
            durability: Durability::OnFlush,
            compression: Compression::None,
            overlay_budget_bytes: 1 << 20,
            segment_bytes: 1 << 20,
            retention_bytes: 0,
        };
        let belongs = superblock.belongs;
        let ids = (belongs.cluster, belongs.resource, belongs.replica);
        let mut state = SavedState::new(ids, Uuid::nil(), 1 << 20, tuning);
        state.designation = designation(7);
        FsStore::create_layout(&dir).unwrap();
        let files = FsStore::open_detached(&dir, 1 << 20).unwrap();
        let mut slots = Slots::create(&files, SLOT_BYTES, &state).unwrap();
        slots.save(&state).unwrap();
        let done = Done {
            primary_under: Some(designation(5)),
            ..Done::default()
        };
        write_done(&dir, &done).unwrap();
        (dir, state)
    }

    fn designation(number: u64) -> Designation {
        let id = Uuid::from_u128(1000 + u128::from(number));
        Designation { number, id }
    }

    fn files_of(dir: &Path) -> Vec<(PathBuf, Vec<u8>, std::time::SystemTime)> {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries
            .filter(|path| path.is_file())
            .map(|path| {
                (
                    path.clone(),
                    std::fs::read(&path).unwrap(),
                    path.metadata().unwrap().modified().unwrap(),
                )
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a58_a_replica_that_is_not_open_tells_the_highest_designation_it_has_seen_and_nothing_is_touched() {
        let store = tempfile::tempdir().unwrap();
        let (dir, state) = closed(store.path(), 10);
        let before = files_of(&dir);
        // Also while somebody else holds the directory.
        let held = ReplicaDir::open(&dir, superblock::peek(&dir).unwrap().belongs, "r", 1 << 20, true).unwrap();
        let inventory = list(store.path(), &Views::new(), &[]).unwrap();
        assert_eq!((files_of(&dir), inventory.unreadable), (before, vec![]));
        drop(held);
        let found = &inventory.replicas[0];
        assert_eq!(found.designation, designation_ref(designation(7)));
        assert_eq!(found.primary_under, designation_ref(designation(5)));
        assert_eq!(found.role, Some(ActualRole::Secondary));
        // It was primary when its agent died: under its newest designation, which `done.json` may not have yet.
        let files = FsStore::open_detached(&dir, 1 << 20).unwrap();
        let (mut slots, _) = Slots::open(&files).unwrap();
        let granted = designation(8);
        slots
            .save(&SavedState {
                role: SavedRole::Primary { granted },
                ..state
            })
            .unwrap();
        let found = list(store.path(), &Views::new(), &[]).unwrap().replicas.remove(0);
        assert_eq!(found.designation, designation_ref(designation(8)));
        assert_eq!(found.primary_under, designation_ref(designation(8)));
        assert_eq!(found.role, Some(ActualRole::Secondary), "nobody writes to it now");
    }

    #[test]
    fn a58_a_replica_whose_saved_state_is_damaged_makes_the_inventory_incomplete_unless_it_was_given_up() {
        let store = tempfile::tempdir().unwrap();
        let (dir, _) = closed(store.path(), 10);
        let damage = |slot: &str| {
            let path = dir.join(slot);
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[40] ^= 1;
            std::fs::write(&path, bytes).unwrap();
        };
        damage("slot-1");
        let inventory = list(store.path(), &Views::new(), &[]).unwrap();
        assert!(inventory.unreadable[0].contains("slot 1 is damaged"), "{inventory:?}");
        assert_eq!(inventory.replicas[0].designation, designation_ref(designation(7)));
        damage("slot-0");
        let inventory = list(store.path(), &Views::new(), &[]).unwrap();
        assert!(inventory.unreadable[0].contains("slot 0 is damaged"), "{inventory:?}");
        assert_eq!(inventory.replicas.len(), 1, "it is there, whatever it remembers");
        std::fs::remove_file(dir.join("slot-0")).unwrap();
        let inventory = list(store.path(), &Views::new(), &[]).unwrap();
        assert!(inventory.unreadable[0].contains("slot-0"), "{inventory:?}");
        let forgotten = Forgotten {
            replica_uuid: Uuid::from_u128(10),
            resource: "r".into(),
        };
        let inventory = list(store.path(), &Views::new(), &[forgotten]).unwrap();
        assert_eq!((inventory.replicas.len(), inventory.unreadable), (1, vec![]));
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
