//! What is written down about a device, so that the next life of the agent finds it again, and what sysfs says about it.
//!
//! Invariant: a device that a former life left counts as ours only if its record (boot id, number, kernel sequence number)
//! agrees with sysfs. Nothing else is ever taken over or deleted.

use super::control;
use crate::frontend::{FrontendError, sysfs};
use mars_engine::types::{ReplicaId, SECTOR_BYTES};
use serde::{Deserialize, Serialize};
use std::io;
use std::path::{Path, PathBuf};
use tracing::warn;

/// The content of a record.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    id: u32,
    /// Unknown until the device has started.
    diskseq: Option<u64>,
}

/// The records of this node.
#[derive(Debug, Clone)]
pub(super) struct Records {
    state_dir: PathBuf,
}

impl Records {
    /// Records lie in `state_dir`: volatile storage, private to this node.
    pub(super) fn new(state_dir: PathBuf) -> Self {
        Self { state_dir }
    }

    /// The record of a replica's device.
    pub(super) fn path(&self, replica: ReplicaId) -> PathBuf {
        self.state_dir.join(format!("ublk-{replica}"))
    }

    /// Forgets a device that is gone.
    pub(super) fn remove(&self, replica: ReplicaId) -> Result<(), FrontendError> {
        let path = self.path(replica);
        std::fs::remove_file(&path).map_err(|error| FrontendError::io(format!("remove {}", path.display()), error))
    }

    /// Number of the device that a former life left for this replica, if it is there and provably ours.
    pub(super) fn leftover(&self, replica: ReplicaId) -> Result<Option<u32>, FrontendError> {
        let path = self.path(replica);
        let fail = |error| FrontendError::io(format!("record {}", path.display()), error);
        let record: Record = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| fail(error.into()))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(fail(error)),
        };
        let same_boot = boot_id().map_err(fail)? == record.boot_id;
        let now = identity(record.id).ok().map(|identity| identity.2);
        if same_boot && now.is_some() && now == record.diskseq {
            return Ok(Some(record.id));
        }
        if same_boot && record.diskseq.is_none() {
            warn!(%replica, id = record.id, "a former agent died while it made this ublk device: if /dev/ublkc{} is unused, \
                  delete it by hand", record.id);
        }
        std::fs::remove_file(&path).map_err(fail)?;
        Ok(None)
    }

    /// Deletes the device that a former life left, if it is provably ours: users get I/O errors, as when a machine dies.
    pub(super) fn give_up(&self, replica: ReplicaId) -> Result<(), FrontendError> {
        let Some(id) = self.leftover(replica)? else {
            return Ok(());
        };
        delete(id).map_err(|text| FrontendError::io(format!("give up ublk device {id}"), io::Error::other(text)))?;
        self.remove(replica)
    }

    /// Replicas of which there are records.
    fn replicas(&self) -> impl Iterator<Item = ReplicaId> {
        let entries = std::fs::read_dir(&self.state_dir).into_iter().flatten().flatten();
        entries.filter_map(|entry| {
            let name = entry.file_name().to_string_lossy().into_owned();
            uuid::Uuid::parse_str(name.strip_prefix("ublk-")?).ok().map(ReplicaId)
        })
    }
}

/// Writes down a device; `diskseq` is unknown until it has started.
pub(super) fn write(path: &Path, id: u32, diskseq: Option<u64>) -> Result<(), FrontendError> {
    let write = || -> io::Result<()> {
        std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
        let aside = path.with_extension("new");
        std::fs::write(
            &aside,
            serde_json::to_vec(&Record {
                boot_id: boot_id()?,
                id,
                diskseq,
            })?,
        )?;
        std::fs::rename(&aside, path)
    };
    write().map_err(|error| FrontendError::io(format!("record {}", path.display()), error))
}

/// Deletes the devices that are recorded in `state_dir` and provably ours, for a node whose agent is gone for good: users get
/// I/O errors, as when a machine dies. Says what could not be deleted.
pub(crate) fn delete_leftovers(state_dir: &Path) -> Vec<String> {
    let records = Records::new(state_dir.to_owned());
    let failed = |replica| {
        let problem = records.give_up(replica).err()?;
        Some(format!("ublk device of replica {replica}: {problem}"))
    };
    records.replicas().filter_map(failed).collect()
}

/// Deletes one device, on a thread of its own: libublk's control ring belongs to the thread that made it.
fn delete(id: u32) -> Result<(), String> {
    let work = move || control::stop(id).and_then(|()| control::delete(id));
    let thread = std::thread::Builder::new()
        .name(format!("mars-ublk-del-{id}"))
        .spawn(work);
    let ended = thread.map_err(|error| error.to_string())?.join();
    let deleted = ended.map_err(|_| format!("the deletion of ublk device {id} failed abnormally"))?;
    deleted.map_err(|error| format!("device {id}: {error}"))
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// The kernel's node of a device.
pub(super) fn node(id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/ublkb{id}"))
}

fn sys_block(id: u32) -> PathBuf {
    Path::new("/sys/block").join(format!("ublkb{id}"))
}

/// Major, minor and diskseq, from sysfs alone.
pub(super) fn identity(id: u32) -> io::Result<(u32, u32, u64)> {
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} has no identity", sys_block(id).display()),
        )
    };
    let numbers = sysfs::attribute(&sys_block(id).join("dev"))
        .as_deref()
        .and_then(sysfs::parse_numbers);
    let (major, minor) = numbers.ok_or_else(missing)?;
    let diskseq = sysfs::attribute(&sys_block(id).join("diskseq")).and_then(|text| text.parse().ok());
    Ok((major, minor, diskseq.ok_or_else(missing)?))
}

/// The size a device shows (bytes).
pub(super) fn shown_bytes(id: u32) -> Option<u64> {
    Some(sysfs::attribute(&sys_block(id).join("size"))?.parse::<u64>().ok()? * SECTOR_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> (tempfile::TempDir, Records, ReplicaId) {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("ublk"));
        (dir, records, ReplicaId(uuid::Uuid::new_v4()))
    }

    #[test]
    fn a_record_of_another_boot_or_of_a_device_that_is_not_there_is_forgotten() {
        let (_dir, records, replica) = records();
        let path = records.path(replica);
        assert_eq!(records.leftover(replica).unwrap(), None, "no record, no device");
        // Far beyond what any kernel numbers its devices.
        write(&path, 1_000_000, Some(7)).unwrap();
        assert_eq!(records.replicas().collect::<Vec<_>>(), [replica]);
        assert_eq!(records.leftover(replica).unwrap(), None);
        assert!(!path.exists());
        let other_boot = Record {
            boot_id: "another".into(),
            id: 0,
            diskseq: Some(1),
        };
        std::fs::write(&path, serde_json::to_vec(&other_boot).unwrap()).unwrap();
        assert_eq!(records.leftover(replica).unwrap(), None);
        assert!(!path.exists());
    }

    #[test]
    fn a_damaged_record_is_named_and_stays() {
        let (_dir, records, replica) = records();
        let path = records.path(replica);
        write(&path, 0, None).unwrap();
        std::fs::write(&path, b"{").unwrap();
        let said = records.leftover(replica).unwrap_err().to_string();
        assert!(said.contains(&path.display().to_string()), "{said}");
        let said = delete_leftovers(&records.state_dir);
        assert!(said.len() == 1 && said[0].contains(&replica.to_string()), "{said:?}");
        assert!(path.exists(), "nothing is deleted on the word of a damaged record");
    }
}
