//! What a node's devices are, who uses them, and how they are removed when the node is powered off.
//!
//! Invariant: only loop devices whose backing file carries the uuid of a replica in this node's own store are touched.

use mars_node_agent::frontend::users::{self, DeviceUser};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A block device of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeDevice {
    /// `/dev/loop3`, `/dev/ublkb0`.
    pub(super) node: PathBuf,
    major: u32,
    minor: u32,
}

fn sysfs(name: &str, attribute: &str) -> String {
    fs::read_to_string(format!("/sys/block/{name}/{attribute}"))
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn device(name: &str) -> Option<NodeDevice> {
    let numbers = sysfs(name, "dev");
    let (major, minor) = numbers.split_once(':')?;
    Some(NodeDevice {
        node: Path::new("/dev").join(name),
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    })
}

/// Uuids of the replicas in a store, as its directory names have them.
fn replicas(store: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(store.join("replicas")).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| uuid::Uuid::try_parse(name).is_ok()).collect()
}

/// Devices of a node: loop devices over volumes of its replicas, and whatever its links lead to.
pub(super) fn of_node(store: &Path, dev: &Path) -> Vec<NodeDevice> {
    let replicas = replicas(store);
    let mut names = BTreeSet::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let backing = sysfs(&name, "loop/backing_file");
        let file = Path::new(&backing)
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if replicas.iter().any(|uuid| file.starts_with(uuid.as_str())) {
            names.insert(name);
        }
    }
    for entry in fs::read_dir(dev).into_iter().flatten().flatten() {
        // A link may be stale and lead to somebody else's device by now: only ublk devices have no other mark.
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("ublkb") {
            names.insert(name);
        }
    }
    names.iter().filter_map(|name| device(name)).collect()
}

/// Users of a device, other than the processes in `ours`.
pub(super) fn users_of(device: &NodeDevice, ours: &[u32]) -> Vec<DeviceUser> {
    let mut found = users::of_numbers(device.major, device.minor, std::slice::from_ref(&device.node));
    found.retain(|user| !matches!(user, DeviceUser::Open { pid, .. } if ours.contains(pid)));
    found
}

/// Removes the devices of a node whose agent and keeper are gone. A device in use goes when its last user closes it; its
/// users get I/O errors from now on. Says what could not be removed.
pub(super) fn remove(store: &Path, dev: &Path) -> Vec<String> {
    let mut failed = Vec::new();
    for device in of_node(store, dev) {
        let name = device
            .node
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if !name.starts_with("loop") {
            // ublk devices are deleted by the code that knows their records.
            continue;
        }
        let output = Command::new("losetup").arg("--detach").arg(&device.node).output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) if !sysfs(&name, "loop/backing_file").is_empty() => {
                let why = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                failed.push(format!("{}: {why}", device.node.display()));
            }
            Ok(_) => {}
            Err(error) => failed.push(format!(
                "{}: losetup: {error}; install util-linux",
                device.node.display()
            )),
        }
    }
    for entry in fs::read_dir(dev).into_iter().flatten().flatten() {
        if entry.path().is_symlink() {
            let _ = fs::remove_file(entry.path());
        }
    }
    failed
}

/// Lazily unmounts what is mounted from a device in this mount namespace.
pub(super) fn unmount_lazily(device: &NodeDevice) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let numbers = format!("{}:{}", device.major, device.minor);
    let mut points: Vec<String> = table
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ').skip(2);
            (fields.next()? == numbers).then_some(())?;
            Some(fields.nth(1)?.replace("\\040", " "))
        })
        .collect();
    points.sort_by_key(|point| std::cmp::Reverse(point.len()));
    for point in points {
        if let Err(error) = rustix::mount::unmount(point.as_str(), rustix::mount::UnmountFlags::DETACH) {
            tracing::warn!(%point, %error, "unmounting");
        }
    }
}
