//! What identifies a block device and its medium. Reads sysfs only; no probe here ever opens a device.

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

    /// An attribute below the device's directory, trimmed; `None` when there is none or it is empty.
    #[must_use]
    pub fn attribute(self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.dir().join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    }

    /// Logical block size (bytes), also of a partition.
    #[must_use]
    pub fn logical_block_bytes(self) -> Option<u32> {
        let own = self.attribute("queue/logical_block_size");
        own.or_else(|| self.attribute("../queue/logical_block_size"))?
            .parse()
            .ok()
    }

    /// The disk of which this is a partition; `None` when it is none.
    #[must_use]
    pub fn whole_disk(self) -> Option<DevNo> {
        self.attribute("partition")?;
        let dir = fs::canonicalize(self.dir()).ok()?;
        let numbers = fs::read_to_string(dir.parent()?.join("dev")).ok()?;
        let (major, minor) = numbers.trim().split_once(':')?;
        Some(DevNo {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_block_devices_have_a_number() {
        assert_eq!(DevNo::of_block_device(Path::new("/dev/null")).unwrap(), None);
        assert!(DevNo::of_block_device(Path::new("/nonexistent")).is_err());
    }
}
