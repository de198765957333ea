//! Refuses storage that lies on a MARS device.
//!
//! Invariant: what a request waits for must never wait for a request: log, state and data of a replica, and swap, must
//! not be on a device that this system serves. Otherwise writing out memory for the one waits for the other, for ever.

use super::sysfs;
use rustix::fs::{FileType, stat};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// File names below a loop device that mark it as one of ours; see the keeper.
pub(crate) const VOLUME_SUFFIX: &str = ".mars";

/// A storage path that lies on a MARS device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} lies on {device}, which is a MARS device: this would wait for itself; use other storage", path.display())]
pub struct Stacked {
    /// What was looked at.
    pub path: PathBuf,
    /// Kernel name of the MARS device below it.
    pub device: String,
}

/// Checks files, directories or block devices, and all swap space. `own` are the numbers of devices known to be ours.
///
/// # Errors
/// Names the first path that is stacked. A path that is not there is somebody else's error.
pub fn refuse(paths: &[PathBuf], own: &[(u32, u32)]) -> Result<(), Stacked> {
    let swaps = std::fs::read_to_string("/proc/swaps").unwrap_or_default();
    let swap = |line: &str| line.split_whitespace().next().map(PathBuf::from);
    let swaps: Vec<PathBuf> = swaps.lines().skip(1).filter_map(swap).collect();
    for path in paths.iter().chain(&swaps) {
        for (major, minor) in below(path) {
            if own.contains(&(major, minor)) || is_ours(major, minor) {
                let device = sysfs::name(major, minor).unwrap_or_else(|| format!("{major}:{minor}"));
                return Err(Stacked {
                    path: path.clone(),
                    device,
                });
            }
        }
    }
    Ok(())
}

/// A loop device over a volume file of a keeper, this node's or another's on the same kernel.
fn is_ours(major: u32, minor: u32) -> bool {
    let backing = sysfs::attribute(&sysfs::dir(major, minor).join("loop/backing_file"));
    backing.is_some_and(|file| file.ends_with(VOLUME_SUFFIX) && file.starts_with('/') && !file[1..].contains('/'))
}

/// All block devices below a path: the one it is or lies on, and everything that is made of.
fn below(path: &Path) -> BTreeSet<(u32, u32)> {
    let mut found = BTreeSet::new();
    let mut todo: Vec<(u32, u32)> = device_of(path).into_iter().collect();
    while let Some((major, minor)) = todo.pop() {
        if !found.insert((major, minor)) {
            continue;
        }
        let dir = sysfs::dir(major, minor);
        let numbers = |path: PathBuf| sysfs::attribute(&path).as_deref().and_then(sysfs::parse_numbers);
        for slave in sysfs::entries(&dir.join("slaves")) {
            todo.extend(numbers(dir.join("slaves").join(slave).join("dev")));
        }
        if dir.join("partition").exists() {
            // The parent directory of a partition is its disk.
            todo.extend(
                std::fs::canonicalize(&dir)
                    .ok()
                    .and_then(|dir| numbers(dir.parent()?.join("dev"))),
            );
        }
        if let Some(file) = sysfs::attribute(&dir.join("loop/backing_file"))
            && !is_ours(major, minor)
        {
            todo.extend(device_of(Path::new(&file)));
        }
    }
    found
}

/// The block device that a path is, or on which it lies.
fn device_of(path: &Path) -> Option<(u32, u32)> {
    let stat = stat(path).ok()?;
    let device = if FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice {
        stat.st_rdev
    } else {
        stat.st_dev
    };
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // 0 is the major number of file systems without a block device of their own.
    (major != 0).then_some((major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinary_storage_is_accepted_and_storage_on_a_known_device_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let paths = [dir.path().to_owned()];
        refuse(&paths, &[]).unwrap();
        let Some(number) = device_of(dir.path()) else { return };
        let error = refuse(&paths, &[number]).unwrap_err();
        assert_eq!(error.path, dir.path());
    }
}
