//! Memory control groups for agents and keepers.
//!
//! Why: a process that writes through the page cache to a MARS device, and the agent that serves the device, must not share
//! a memory control group, or the writer's dirty pages can keep the agent from getting memory for ever.
//! Invariant: each agent and each keeper has a group of its own wherever this machine lets us make one; where it does not,
//! that is said, not hidden.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Where groups are made.
#[derive(Clone, Debug)]
pub(super) struct Groups {
    /// The hierarchy's directory for this cluster.
    base: PathBuf,
    unified: bool,
}

impl Groups {
    /// The hierarchy with the memory controller, if this machine has one; `name` is the cluster's.
    pub(super) fn find(name: &str) -> Option<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        if v1.join("cgroup.procs").exists() {
            return Some(Self {
                base: v1.join(name),
                unified: false,
            });
        }
        let v2 = Path::new("/sys/fs/cgroup");
        v2.join("cgroup.procs").exists().then(|| Self {
            base: v2.join(name),
            unified: true,
        })
    }

    /// Directory of one group.
    pub(super) fn path(&self, group: &str) -> PathBuf {
        self.base.join(group)
    }

    /// Makes a group; returns the file a process writes 0 to in order to join it.
    pub(super) fn make(&self, group: &str) -> io::Result<PathBuf> {
        if self.unified {
            // Children have a memory controller only if every level above hands it down.
            for level in [self.base.parent(), Some(self.base.as_path())].into_iter().flatten() {
                fs::create_dir_all(level)?;
                fs::write(level.join("cgroup.subtree_control"), "+memory")?;
            }
        }
        let path = self.path(group);
        fs::create_dir_all(&path)?;
        Ok(path.join("cgroup.procs"))
    }

    /// SIGKILL to everything in a group, and waits until it is empty (at most 10 s). Says whether it is.
    pub(super) fn kill(&self, group: &str) -> bool {
        let path = self.path(group);
        let deadline = Instant::now() + Duration::from_secs(10);
        while Instant::now() < deadline {
            let Ok(listed) = fs::read_to_string(path.join("cgroup.procs")) else {
                return true;
            };
            let pids: Vec<i32> = listed.lines().filter_map(|line| line.trim().parse().ok()).collect();
            if pids.is_empty() {
                return true;
            }
            if fs::write(path.join("cgroup.kill"), "1").is_err() {
                for pid in pids.into_iter().filter_map(rustix::process::Pid::from_raw) {
                    // Members of our own group: nobody else puts processes there.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        false
    }

    /// Removes a group that is empty.
    pub(super) fn remove(&self, group: &str) {
        let _ = fs::remove_dir(self.path(group));
    }

    /// Removes the cluster's directory once no group is left in it.
    pub(super) fn remove_all(&self) {
        for entry in fs::read_dir(&self.base).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                let _ = fs::remove_dir(entry.path());
            }
        }
        let _ = fs::remove_dir(&self.base);
    }
}
