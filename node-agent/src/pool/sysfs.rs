//! What the kernel knows about block devices: names, holders, what lies below them. Reads sysfs only; no probe here
//! ever opens a device.

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Major and minor number of a block device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevNo {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl DevNo {
    /// Splits a `dev_t`.
    #[must_use]
    pub fn from_raw(raw: u64) -> DevNo {
        DevNo {
            major: rustix::fs::major(raw),
            minor: rustix::fs::minor(raw),
        }
    }

    /// The device number of a block special file; `None` when `path` is something else.
    ///
    /// # Errors
    /// `path` cannot be examined.
    pub fn of_block_device(path: &Path) -> io::Result<Option<DevNo>> {
        use std::os::unix::fs::FileTypeExt;
        let metadata = fs::metadata(path)?;
        Ok(metadata
            .file_type()
            .is_block_device()
            .then(|| DevNo::from_raw(metadata.rdev())))
    }

    fn dir(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }

    /// Kernel name, e.g. `loop3` or `sda1`.
    #[must_use]
    pub fn name(self) -> Option<String> {
        let target = fs::read_link(self.dir()).ok()?;
        Some(target.file_name()?.to_string_lossy().into_owned())
    }

    /// An attribute below the device's directory, trimmed; `None` when there is none or it is empty.
    #[must_use]
    pub fn attribute(self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.dir().join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Sequence number of this very incarnation of the device.
    #[must_use]
    pub fn diskseq(self) -> Option<u64> {
        self.attribute("diskseq")?.parse().ok()
    }

    /// Devices listed in a directory of links such as `holders` or `slaves`.
    fn linked(self, list: &str) -> Vec<DevNo> {
        entries(&self.dir().join(list))
            .iter()
            .filter_map(|path| parse(&fs::read_to_string(path.join("dev")).ok()?))
            .collect()
    }

    /// Devices stacked on this one (dm, md, bcache).
    #[must_use]
    pub fn holders(self) -> Vec<DevNo> {
        self.linked("holders")
    }

    /// Partitions of this disk.
    #[must_use]
    pub fn partitions(self) -> Vec<DevNo> {
        entries(&self.dir())
            .iter()
            .filter(|path| path.join("partition").exists())
            .filter_map(|path| parse(&fs::read_to_string(path.join("dev")).ok()?))
            .collect()
    }

    /// The file below a loop device.
    #[must_use]
    pub fn loop_file(self) -> Option<PathBuf> {
        self.attribute("loop/backing_file").map(PathBuf::from)
    }

    /// Devices directly below: dm/md members, the disk of a partition, the file system of a loop device's file.
    fn below(self) -> Vec<DevNo> {
        let mut below = self.linked("slaves");
        if self.dir().join("partition").exists() {
            let parent = fs::canonicalize(self.dir())
                .ok()
                .and_then(|dir| Some(dir.parent()?.join("dev")));
            below.extend(parent.and_then(|dev| parse(&fs::read_to_string(dev).ok()?)));
        }
        if let Some(metadata) = self.loop_file().and_then(|file| fs::metadata(file).ok()) {
            use std::os::unix::fs::FileTypeExt;
            let raw = if metadata.file_type().is_block_device() {
                metadata.rdev()
            } else {
                metadata.dev()
            };
            below.push(DevNo::from_raw(raw));
        }
        below
    }

    /// This device and everything below it, as far down as the kernel tells.
    #[must_use]
    pub fn stack(self) -> BTreeSet<DevNo> {
        let (mut seen, mut todo) = (BTreeSet::new(), vec![self]);
        while let Some(device) = todo.pop() {
            if seen.insert(device) {
                todo.extend(device.below());
            }
        }
        seen
    }

    /// Attributes that stay with the medium over reboots and renumbering, best first; empty when the kernel knows none.
    #[must_use]
    pub fn medium_identity(self) -> Vec<(String, String)> {
        const STABLE: [&str; 8] = [
            "dm/uuid",
            "wwid",
            "device/wwid",
            "serial",
            "device/serial",
            "md/uuid",
            "loop/backing_file",
            "nsid",
        ];
        let mut found: Vec<_> = STABLE
            .iter()
            .filter_map(|name| Some(((*name).to_owned(), self.attribute(name)?)))
            .collect();
        if self.attribute("partition").is_some() {
            let uevent = self.attribute("uevent").unwrap_or_default();
            let field = |key: &str| {
                uevent
                    .lines()
                    .find_map(|line| line.strip_prefix(key))
                    .map(str::to_owned)
            };
            found.extend(field("PARTUUID=").map(|uuid| ("PARTUUID".to_owned(), uuid)));
            found.extend(field("PARTN=").map(|number| ("PARTN".to_owned(), number)));
        }
        found
    }
}

impl fmt::Display for DevNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// Parses `major:minor`.
#[must_use]
pub fn parse(text: &str) -> Option<DevNo> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(DevNo {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default()
}

/// All loop devices that have a file, with that file.
#[must_use]
pub fn loop_devices() -> Vec<(DevNo, PathBuf)> {
    entries(Path::new("/sys/block"))
        .iter()
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("loop"))
        })
        .filter_map(|path| parse(&fs::read_to_string(path.join("dev")).ok()?))
        .filter_map(|device| Some((device, device.loop_file()?)))
        .collect()
}

/// One line of mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device of the file system.
    pub device: DevNo,
    /// Where it is mounted.
    pub mount_point: PathBuf,
    /// e.g. `ext4` or `fuse.mars`.
    pub fs_type: String,
    /// e.g. `/dev/loop3`.
    pub source: String,
}

/// Parses the text of a mountinfo file; lines that are not understood are left out.
#[must_use]
pub fn parse_mountinfo(text: &str) -> Vec<Mount> {
    text.lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            let mut left = left.split(' ').skip(2);
            let device = parse(left.next()?)?;
            let mount_point = PathBuf::from(unescape(left.nth(1)?));
            let mut right = right.split(' ');
            Some(Mount {
                device,
                mount_point,
                fs_type: right.next()?.to_owned(),
                source: unescape(right.next()?),
            })
        })
        .collect()
}

/// Undoes the octal escapes of mountinfo (space, tab, newline, backslash).
fn unescape(field: &str) -> String {
    let mut plain = String::with_capacity(field.len());
    let mut rest = field;
    while let Some(at) = rest.find('\\') {
        plain.push_str(&rest[..at]);
        match rest
            .get(at + 1..at + 4)
            .and_then(|octal| u8::from_str_radix(octal, 8).ok())
        {
            Some(byte) => {
                plain.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                plain.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_understood_with_its_escapes() {
        let text = "36 35 98:0 /mnt1 /mnt\\040two rw,noatime master:1 - ext3 /dev/root rw,errors=continue\nnonsense\n";
        let mounts = parse_mountinfo(text);
        assert_eq!(mounts.len(), 1);
        assert_eq!(mounts[0].mount_point, PathBuf::from("/mnt two"));
        assert_eq!(
            (mounts[0].device.to_string().as_str(), mounts[0].fs_type.as_str()),
            ("98:0", "ext3")
        );
    }
}
