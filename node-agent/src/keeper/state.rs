//! What a keeper writes down about its loop devices, so that its successor can tell its own from others'.
//!
//! Invariant: a device is recorded before it is configured and forgotten after it is cleared. The record alone never
//! proves anything: boot id, file name and the kernel's sequence number must agree with what sysfs says now.

use mars_engine::types::ReplicaId;
use serde::{Deserialize, Serialize};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// One recorded device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Recorded {
    pub(super) replica: ReplicaId,
    /// N of /dev/loopN.
    pub(super) number: u32,
    /// Unknown between the intent and the configuration.
    pub(super) diskseq: Option<u64>,
    /// The agent that serves it: process id and start time (clock ticks since boot).
    pub(super) holder: Option<(u32, u64)>,
}

/// The file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    pub(super) boot_id: String,
    pub(super) devices: Vec<Recorded>,
}

/// Where it is kept; volatile storage is right, since it means nothing after a reboot.
pub(super) struct StateFile {
    path: PathBuf,
    pub(super) state: State,
}

impl StateFile {
    /// Reads the file of an earlier life. A damaged one is an error: its devices would be forgotten.
    pub(super) fn open(path: PathBuf, boot_id: String) -> io::Result<Self> {
        let old = match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice::<State>(&bytes).map_err(|error| {
                let what = format!(
                    "{}: {error}; if no device of MARS is open on this node, remove the file",
                    path.display()
                );
                io::Error::new(io::ErrorKind::InvalidData, what)
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State::default(),
            Err(error) => return Err(error),
        };
        // After a reboot nothing of it exists any more.
        let devices = if old.boot_id == boot_id {
            old.devices
        } else {
            Vec::new()
        };
        Ok(Self {
            path,
            state: State { boot_id, devices },
        })
    }

    /// Replaces the record of a replica.
    pub(super) fn record(&mut self, recorded: Recorded) -> io::Result<()> {
        self.state.devices.retain(|other| other.replica != recorded.replica);
        self.state.devices.push(recorded);
        self.save()
    }

    /// Notes who serves a device.
    pub(super) fn set_holder(&mut self, replica: ReplicaId, holder: Option<(u32, u64)>) -> io::Result<()> {
        for recorded in self
            .state
            .devices
            .iter_mut()
            .filter(|recorded| recorded.replica == replica)
        {
            recorded.holder = holder;
        }
        self.save()
    }

    /// Forgets a replica's device.
    pub(super) fn forget(&mut self, replica: ReplicaId) -> io::Result<()> {
        self.state.devices.retain(|other| other.replica != replica);
        self.save()
    }

    fn save(&self) -> io::Result<()> {
        let aside = self.path.with_extension("new");
        let mut file = std::fs::File::create(&aside)?;
        file.write_all(&serde_json::to_vec(&self.state)?)?;
        file.sync_data()?;
        std::fs::rename(&aside, &self.path)
    }
}

/// Start time of a process (clock ticks since boot): with the process id it names a process for good.
pub(super) fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).ok()?;
    // The name may contain anything, so count from its closing parenthesis: state is field 3, start time field 22.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_keeper_and_end_with_the_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let replica = ReplicaId(uuid::Uuid::from_u128(7));
        let recorded = Recorded {
            replica,
            number: 3,
            diskseq: Some(9),
            holder: Some((1, 2)),
        };
        let mut file = StateFile::open(path.clone(), "boot-1".into()).unwrap();
        file.record(recorded.clone()).unwrap();
        assert_eq!(
            StateFile::open(path.clone(), "boot-1".into()).unwrap().state.devices,
            [recorded]
        );
        assert_eq!(
            StateFile::open(path.clone(), "boot-2".into()).unwrap().state.devices,
            []
        );
        std::fs::write(&path, "{").unwrap();
        assert!(StateFile::open(path, "boot-1".into()).is_err());
    }

    #[test]
    fn a_process_has_a_start_time_and_a_missing_one_has_none() {
        assert!(start_time(std::process::id()).is_some_and(|ticks| ticks > 0));
        assert_eq!(start_time(u32::MAX), None);
    }
}
