//! Open detection: who uses a block device, found in /proc and sysfs alone.
//!
//! Invariant: nothing here opens the device, waits for it, or asks a file system that may hang; a process that vanishes
//! while we look is no user. What cannot be seen from any process (a mount in a namespace that only a file descriptor
//! keeps alive) still shows through the file system's own entry in sysfs.

use super::{Device, sysfs};
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

/// Somebody who uses a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum DeviceUser {
    /// A mounted file system.
    Mount {
        /// Where, as seen in its namespace.
        at: PathBuf,
        /// A process that sees it.
        pid: u32,
        /// Name of that process.
        command: String,
    },
    /// A process with an open descriptor.
    Open {
        /// Which.
        pid: u32,
        /// Its name.
        command: String,
    },
    /// A device on top: device mapper, md, or another loop device.
    Holder {
        /// Kernel name (`dm-3`).
        name: String,
    },
    /// Swap space.
    Swap,
    /// A mounted file system that no process can be seen with.
    HiddenMount {
        /// Its type.
        file_system: String,
    },
    /// Whether anybody does could not be found out; counts as somebody.
    Unknown {
        /// Why not.
        reason: String,
    },
}

impl fmt::Display for DeviceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount { at, pid, command } => write!(f, "mounted at {} (seen by pid {pid}, {command})", at.display()),
            Self::Open { pid, command } => write!(f, "open by pid {pid} ({command})"),
            Self::Holder { name } => write!(f, "held by {name}"),
            Self::Swap => f.write_str("used as swap space"),
            Self::HiddenMount { file_system } => {
                write!(f, "mounted as {file_system} in a mount namespace without a process")
            }
            Self::Unknown { reason } => write!(f, "not known yet: {reason}"),
        }
    }
}

/// One line for people; long lists are cut.
#[must_use]
pub fn describe(users: &[DeviceUser]) -> String {
    const SHOWN: usize = 5;
    let mut parts: Vec<String> = users.iter().take(SHOWN).map(ToString::to_string).collect();
    if users.len() > SHOWN {
        parts.push(format!("and {} more", users.len() - SHOWN));
    }
    parts.join("; ")
}

/// Who uses the device, its partitions included.
#[must_use]
pub fn of(device: &Device) -> Vec<DeviceUser> {
    of_numbers(device.major, device.minor, &[device.node.clone(), device.link.clone()])
}

/// The same by number; `paths` are further names under which a mount table may call it.
#[must_use]
pub fn of_numbers(major: u32, minor: u32, paths: &[PathBuf]) -> Vec<DeviceUser> {
    let target = Target::new(major, minor, paths);
    let mut found = BTreeSet::new();
    target.in_processes(&mut found);
    target.in_sysfs(&mut found);
    target.as_swap(&mut found);
    found.into_iter().collect()
}

struct Target {
    numbers: BTreeSet<(u32, u32)>,
    names: BTreeSet<String>,
    paths: BTreeSet<PathBuf>,
}

impl Target {
    fn new(major: u32, minor: u32, paths: &[PathBuf]) -> Self {
        let mut numbers = BTreeSet::from([(major, minor)]);
        let mut names: BTreeSet<String> = sysfs::name(major, minor).into_iter().collect();
        let dir = sysfs::dir(major, minor);
        for entry in sysfs::entries(&dir) {
            if dir.join(&entry).join("partition").exists() {
                numbers.extend(
                    sysfs::attribute(&dir.join(&entry).join("dev"))
                        .as_deref()
                        .and_then(sysfs::parse_numbers),
                );
                names.insert(entry);
            }
        }
        let mut paths: BTreeSet<PathBuf> = paths
            .iter()
            .filter(|path| !path.as_os_str().is_empty())
            .cloned()
            .collect();
        paths.extend(names.iter().map(|name| Path::new("/dev").join(name)));
        Self { numbers, names, paths }
    }

    fn in_processes(&self, found: &mut BTreeSet<DeviceUser>) {
        // Mount tables by namespace: all processes of one show the same.
        let mut namespaces = BTreeSet::new();
        let mut pids: Vec<(bool, u32)> = sysfs::entries(Path::new("/proc"))
            .iter()
            .filter_map(|entry| entry.parse().ok())
            .map(|pid| (is_kernel_thread(pid), pid))
            .collect();
        // A mount is named with the first process that sees it: rather one of people than a thread of the kernel.
        pids.sort_unstable();
        for (_, pid) in pids {
            let entry = pid.to_string();
            let dir = Path::new("/proc").join(&entry);
            if let Ok(namespace) = std::fs::read_link(dir.join("ns/mnt"))
                && namespaces.insert(namespace)
            {
                self.mounts(pid, &dir, found);
            }
            if self.is_open_in(&dir) {
                found.insert(DeviceUser::Open {
                    pid,
                    command: command(&dir),
                });
            }
        }
    }

    fn mounts(&self, pid: u32, dir: &Path, found: &mut BTreeSet<DeviceUser>) {
        let Ok(table) = std::fs::read_to_string(dir.join("mountinfo")) else {
            return;
        };
        for line in table.lines().filter_map(MountLine::parse) {
            // Some file systems (btrfs) have a device number of their own: there the source tells.
            if self.numbers.contains(&line.device) || self.paths.contains(Path::new(&line.source)) {
                let seen = |user: &DeviceUser| matches!(user, DeviceUser::Mount { at, .. } if *at == line.mount_point);
                if !found.iter().any(seen) {
                    found.insert(DeviceUser::Mount {
                        at: line.mount_point,
                        pid,
                        command: command(dir),
                    });
                }
            }
        }
    }

    fn is_open_in(&self, dir: &Path) -> bool {
        let fds = dir.join("fd");
        let mut mounts: Option<HashMap<String, bool>> = None;
        sysfs::entries(&fds).iter().any(|fd| {
            let path = fds.join(fd);
            let Ok(link) = std::fs::read_link(&path) else {
                return false;
            };
            // Sockets, pipes and the like have no path. A node below /dev is on devtmpfs and safe to look at; any
            // other file only if its file system cannot hang.
            if !link.is_absolute() || link.starts_with("/proc") || link.starts_with("/sys") {
                return false;
            }
            if !link.starts_with("/dev") {
                let safe = mounts.get_or_insert_with(|| local_mounts(dir));
                let mount = mount_of_fd(&dir.join("fdinfo").join(fd));
                if !mount.is_some_and(|id| safe.get(&id).copied().unwrap_or(false)) {
                    return false;
                }
            }
            self.is_this(&path)
        })
    }

    fn is_this(&self, path: &Path) -> bool {
        let flags = AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
        let Ok(stat) = statx(CWD, path, flags, StatxFlags::TYPE) else {
            return false;
        };
        let is_block = rustix::fs::FileType::from_raw_mode(stat.stx_mode.into()) == rustix::fs::FileType::BlockDevice;
        is_block && self.numbers.contains(&(stat.stx_rdev_major, stat.stx_rdev_minor))
    }

    fn in_sysfs(&self, found: &mut BTreeSet<DeviceUser>) {
        for (major, minor) in &self.numbers {
            for name in sysfs::entries(&sysfs::dir(*major, *minor).join("holders")) {
                found.insert(DeviceUser::Holder { name });
            }
        }
        for name in sysfs::entries(Path::new("/sys/block"))
            .into_iter()
            .filter(|name| name.starts_with("loop"))
        {
            let backing = sysfs::attribute(&Path::new("/sys/block").join(&name).join("loop/backing_file"));
            if backing.is_some_and(|file| self.paths.contains(Path::new(&file))) {
                found.insert(DeviceUser::Holder { name });
            }
        }
        if !found.iter().any(|user| matches!(user, DeviceUser::Mount { .. })) {
            for file_system in ["ext4", "xfs", "f2fs", "erofs"] {
                if self
                    .names
                    .iter()
                    .any(|name| Path::new("/sys/fs").join(file_system).join(name).exists())
                {
                    found.insert(DeviceUser::HiddenMount {
                        file_system: file_system.to_owned(),
                    });
                }
            }
        }
    }

    fn as_swap(&self, found: &mut BTreeSet<DeviceUser>) {
        let Ok(table) = std::fs::read_to_string("/proc/swaps") else {
            return;
        };
        let path = |line: &str| line.split_whitespace().next().map(unescape);
        if table
            .lines()
            .skip(1)
            .filter_map(path)
            .any(|path| self.paths.contains(Path::new(&path)))
        {
            found.insert(DeviceUser::Swap);
        }
    }
}

/// What we need of a line of mountinfo.
struct MountLine {
    id: String,
    device: (u32, u32),
    mount_point: PathBuf,
    file_system: String,
    source: String,
}

impl MountLine {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue`
    fn parse(line: &str) -> Option<Self> {
        let (first, second) = line.split_once(" - ")?;
        let mut first = first.split(' ');
        let id = first.next()?.to_owned();
        let device = sysfs::parse_numbers(first.nth(1)?)?;
        let mount_point = PathBuf::from(unescape(first.nth(1)?));
        let mut second = second.split(' ');
        let file_system = second.next()?.to_owned();
        let source = unescape(second.next()?);
        Some(Self {
            id,
            device,
            mount_point,
            file_system,
            source,
        })
    }
}

/// The kernel writes blanks, tabs, line ends and backslashes as `\ooo`.
fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\').then(|| tail.get(..3)).flatten();
        let code = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match code {
            Some(code) => (bytes.push(code), rest = &tail[3..]),
            None => (bytes.push(first), rest = tail),
        };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Mount ids of a process, and whether looking at an inode there can never wait for another machine or process.
fn local_mounts(dir: &Path) -> HashMap<String, bool> {
    let local = [
        "ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "tmpfs", "devtmpfs", "ramfs", "overlay", "zfs",
    ];
    let table = std::fs::read_to_string(dir.join("mountinfo")).unwrap_or_default();
    table
        .lines()
        .filter_map(MountLine::parse)
        .map(|line| (line.id, local.contains(&line.file_system.as_str())))
        .collect()
}

fn mount_of_fd(fdinfo: &Path) -> Option<String> {
    let text = std::fs::read_to_string(fdinfo).ok()?;
    Some(
        text.lines()
            .find_map(|line| line.strip_prefix("mnt_id:"))?
            .trim()
            .to_owned(),
    )
}

/// Threads of the kernel have no program.
fn is_kernel_thread(pid: u32) -> bool {
    std::fs::read_link(format!("/proc/{pid}/exe")).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

fn command(dir: &Path) -> String {
    sysfs::attribute(&dir.join("comm")).unwrap_or_else(|| "ended meanwhile".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines_with_blanks_and_optional_fields_are_understood() {
        let line = r"36 35 7:3 / /mnt/my\040data rw,noatime shared:1 master:2 - ext4 /dev/mars/mydata rw";
        let line = MountLine::parse(line).unwrap();
        assert_eq!((line.id.as_str(), line.device), ("36", (7, 3)));
        assert_eq!(line.mount_point, Path::new("/mnt/my data"));
        assert_eq!(
            (line.file_system.as_str(), line.source.as_str()),
            ("ext4", "/dev/mars/mydata")
        );
        assert!(MountLine::parse("garbage").is_none());
        assert_eq!(unescape(r"a\\b\1"), r"a\\b\1");
    }

    #[test]
    fn a_device_that_nobody_uses_has_no_users() {
        // Number 0:0 belongs to no block device.
        assert_eq!(of_numbers(0, 0, &[]), []);
    }
}
