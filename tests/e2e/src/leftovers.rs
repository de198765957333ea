//! What a cluster could leave behind on the machine – mounts, loop devices, processes, control groups – found and removed.
//!
//! Invariant: only things that name the state directory of that one cluster are ever touched.

use crate::machine::{alive, run, signal, until};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Mount points below a directory, deepest first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir))
        .collect();
    found.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    found
}

/// Loop devices whose backing file lies below a directory.
fn loops_below(dir: &Path) -> Vec<String> {
    let listed = run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).unwrap_or_default();
    let below = dir.display().to_string();
    listed
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, file)| file.trim().starts_with(&below))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Processes (other than this one) whose command line mentions a directory.
fn processes_about(dir: &Path) -> Vec<u32> {
    let about = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(&about) && alive(pid) {
            found.push(pid);
        }
    }
    found
}

/// What belongs to a state directory and is still there: mounts, loop devices, processes, control groups.
#[must_use]
pub fn leftovers(state: &Path) -> Vec<String> {
    let mut left: Vec<String> = mounts_below(state)
        .into_iter()
        .map(|point| format!("mount {}", point.display()))
        .collect();
    left.extend(
        loops_below(state)
            .into_iter()
            .map(|device| format!("loop device {device}")),
    );
    left.extend(processes_about(state).into_iter().map(|pid| format!("process {pid}")));
    left
}

/// The second line of defence after `mars-local down`: whatever is left of this state directory ends now.
pub(crate) fn sweep(state: &Path) {
    for pid in processes_about(state) {
        let _ = signal(pid, "KILL");
    }
    let _ = until("processes are gone", Duration::from_secs(5), || {
        Ok(processes_about(state).is_empty())
    });
    for device in loops_below(state) {
        let _ = run("losetup", &["--detach", &device]);
    }
    for point in mounts_below(state) {
        let _ = run("umount", &["--lazy", &point.to_string_lossy()]);
    }
}
