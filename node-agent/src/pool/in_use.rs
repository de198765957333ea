//! Who uses a block device, by name, and whether storage lies on a MARS device.
//!
//! Invariant: no probe opens a device.

use super::PoolError;
use super::sysfs::{self, DevNo, Mount};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// File systems of the `loop` frontend have a type with this prefix.
const FRONTEND_FS: &str = "fuse.mars";
/// A message names at most this many users.
const MAX_NAMED: usize = 8;

fn mounts() -> Vec<Mount> {
    sysfs::parse_mountinfo(&fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}

/// Everything that uses `device` or a partition of it: mounts, swap, stacked devices, loop devices, processes.
#[must_use]
pub fn users(device: DevNo) -> Vec<String> {
    let mut devices = device.partitions();
    devices.push(device);
    let name = |device: DevNo| device.name().unwrap_or_else(|| device.to_string());
    let mut users = Vec::new();
    for mount in mounts().iter().filter(|mount| devices.contains(&mount.device)) {
        users.push(format!(
            "{} is mounted on {}",
            name(mount.device),
            mount.mount_point.display()
        ));
    }
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    for area in swaps.lines().skip(1).filter_map(|line| line.split_whitespace().next()) {
        if DevNo::of_block_device(Path::new(area))
            .ok()
            .flatten()
            .is_some_and(|swap| devices.contains(&swap))
        {
            users.push(format!("{area} is swap space"));
        }
    }
    for &used in &devices {
        users.extend(
            used.holders()
                .into_iter()
                .map(|holder| format!("{} is part of {}", name(used), name(holder))),
        );
    }
    for (loop_device, file) in sysfs::loop_devices() {
        if DevNo::of_block_device(&file)
            .ok()
            .flatten()
            .is_some_and(|below| devices.contains(&below))
        {
            users.push(format!("{} is below {}", file.display(), name(loop_device)));
        }
    }
    users.extend(openers(&devices));
    users.truncate(MAX_NAMED);
    users
}

/// Processes other than this one that have one of the devices open.
fn openers(devices: &[DevNo]) -> Vec<String> {
    let own = std::process::id().to_string();
    let Ok(processes) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let mut openers = Vec::new();
    for process in processes.flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if pid == own || !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else {
            continue;
        };
        let opens = descriptors.flatten().any(|fd| {
            fs::metadata(fd.path()).is_ok_and(|metadata| {
                metadata.file_type().is_block_device() && devices.contains(&DevNo::from_raw(metadata.rdev()))
            })
        });
        if opens {
            let command = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            openers.push(format!("process {pid} ({}) has it open", command.trim()));
        }
    }
    openers
}

/// The devices that MARS itself serves on this machine.
#[derive(Debug, Clone, Default)]
pub struct MarsDevices(BTreeSet<DevNo>);

impl MarsDevices {
    /// Finds them: link targets in the device directory, and file systems of the `loop` frontend.
    #[must_use]
    pub fn scan(dev_dir: &Path) -> MarsDevices {
        let links = fs::read_dir(dev_dir).into_iter().flatten().flatten();
        let mut devices: BTreeSet<DevNo> = links
            .filter_map(|link| DevNo::of_block_device(&link.path()).ok().flatten())
            .collect();
        devices.extend(
            mounts()
                .iter()
                .filter(|mount| mount.fs_type.starts_with(FRONTEND_FS))
                .map(|mount| mount.device),
        );
        MarsDevices(devices)
    }

    /// Refuses storage whose stack contains a MARS device: the agent would wait for itself.
    ///
    /// # Errors
    /// [`PoolError::Stacked`], or `path` cannot be examined.
    pub fn refuse_stacked(&self, path: &Path) -> Result<(), PoolError> {
        let metadata = fs::metadata(path).map_err(crate::layout::io_error("examine", path))?;
        let raw = if metadata.file_type().is_block_device() {
            metadata.rdev()
        } else {
            metadata.dev()
        };
        let mut stack = DevNo::from_raw(raw).stack();
        // A file system without a block device of its own number (btrfs) names its device as mount source.
        for mount in mounts()
            .iter()
            .filter(|mount| stack.contains(&mount.device) && mount.device.major == 0)
            .collect::<Vec<_>>()
        {
            if let Ok(Some(source)) = DevNo::of_block_device(&PathBuf::from(&mount.source)) {
                stack.extend(source.stack());
            }
        }
        match stack.intersection(&self.0).next() {
            None => Ok(()),
            Some(device) => Err(PoolError::Stacked {
                path: path.to_path_buf(),
                device: device
                    .name()
                    .map_or_else(|| device.to_string(), |name| format!("{name} ({device})")),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_on_a_mars_device_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let own = DevNo::from_raw(fs::metadata(dir.path()).unwrap().dev());
        MarsDevices::default().refuse_stacked(dir.path()).unwrap();
        let error = MarsDevices([own].into()).refuse_stacked(dir.path()).unwrap_err();
        assert!(matches!(error, PoolError::Stacked { .. }));
    }
}
