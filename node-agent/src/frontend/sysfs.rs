//! What sysfs says about block devices. Reading it opens no device.

use std::path::{Path, PathBuf};

/// Kernel name of a device (`loop3`, `sda1`), by number.
pub(crate) fn name(major: u32, minor: u32) -> Option<String> {
    let target = std::fs::read_link(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// Directory of a device, by number; also for partitions.
pub(crate) fn dir(major: u32, minor: u32) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

/// Contents of an attribute without the line end; `None` when it is not there.
pub(crate) fn attribute(path: &Path) -> Option<String> {
    Some(std::fs::read_to_string(path).ok()?.trim_end().to_owned())
}

/// Parses `major:minor`.
pub(crate) fn parse_numbers(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Names in a directory, none when it is not there.
pub(crate) fn entries(path: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}
