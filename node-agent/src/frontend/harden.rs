//! What makes a process fit to serve block devices that this machine itself uses.
//!
//! Invariant: [`early`] runs before any thread is started, since a thread inherits these properties when it is made. A
//! step that the machine refuses is reported, never silently skipped: the caller shows it (condition `IoFlusher=False`).

use rustix::mount::{MountPropagationFlags, mount_change};
use std::io;
use tracing::warn;

/// What [`early`] achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hardening {
    /// Memory reclaim for this process never waits for write-back through this process. `Err` says why not.
    pub io_flusher: Result<(), String>,
    /// Pages stay in memory once touched.
    pub memory_locked: Result<(), String>,
    /// The kernel kills others first.
    pub oom_protected: Result<(), String>,
    /// Mounts made outside are seen here and their removal, too; mounts made here stay here.
    pub mounts_follow: Result<(), String>,
}

impl Hardening {
    /// Writes one warning per refused step. Call it once logging works.
    pub fn warn(&self) {
        let advice = [
            (
                &self.io_flusher,
                "PR_SET_IO_FLUSHER",
                "under memory pressure the node may stall: grant CAP_SYS_RESOURCE",
            ),
            (
                &self.memory_locked,
                "mlockall",
                "paging may delay I/O: grant CAP_IPC_LOCK or raise RLIMIT_MEMLOCK",
            ),
            (
                &self.oom_protected,
                "oom_score_adj",
                "the agent may be killed first when memory ends: grant CAP_SYS_RESOURCE",
            ),
            (
                &self.mounts_follow,
                "mount namespace",
                "a file system on a MARS device may stay busy after umount: grant CAP_SYS_ADMIN",
            ),
        ];
        for (result, what, consequence) in advice {
            if let Err(reason) = result {
                warn!("{what} refused ({reason}): {consequence}");
            }
        }
    }
}

/// Whether the mount namespace is left alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mounts {
    /// Make one of our own that follows the outside (`rslave`).
    Follow,
    /// Stay in the one we are in: for a container whose volume mounts are `HostToContainer` already.
    Keep,
}

/// Takes all steps. Never fails; the report says what was refused.
#[must_use]
pub fn early(mounts: Mounts) -> Hardening {
    let text = |result: io::Result<()>| result.map_err(|error| error.to_string());
    Hardening {
        io_flusher: text(rustix::process::configure_io_flusher_behavior(true).map_err(Into::into)),
        memory_locked: text(lock_memory()),
        oom_protected: text(std::fs::write("/proc/self/oom_score_adj", "-999")),
        mounts_follow: text(if mounts == Mounts::Follow {
            follow_mounts()
        } else {
            Ok(())
        }),
    }
}

/// Locks pages when they are first touched, so that the bound is what is used, not what is reserved.
fn lock_memory() -> io::Result<()> {
    use rustix::mm::{MlockAllFlags, mlockall};
    let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock);
    let privileged = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::IPC_LOCK));
    // With a small limit later allocations would fail instead of being pageable: then better not at all.
    if limit.current.is_some() && !privileged {
        return Err(io::Error::other(
            "the memory lock limit is smaller than what an agent needs",
        ));
    }
    Ok(mlockall(
        MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT,
    )?)
}

/// A *private* namespace would keep file systems mounted that were unmounted outside, and so pin our own devices.
/// Where the outside is not shared (a bare init, a container without propagation), nothing would follow: then we stay in
/// the outside's own namespace, in which nothing of ours can pin anything, either.
fn follow_mounts() -> io::Result<()> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    if !root_is_shared(&mounts) {
        return Ok(());
    }
    unshare_mounts()?;
    Ok(mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?)
}

/// Whether the mount that is `/` passes its mounts and unmounts on.
fn root_is_shared(mountinfo: &str) -> bool {
    let root = mountinfo.lines().rfind(|line| line.split(' ').nth(4) == Some("/"));
    let optional = root.and_then(|line| line.split(" - ").next());
    optional.is_some_and(|fields| fields.split(' ').skip(6).any(|field| field.starts_with("shared:")))
}

#[expect(
    unsafe_code,
    reason = "rustix marks unshare unsafe because of CLONE_FILES, which is not used here"
)]
fn unshare_mounts() -> io::Result<()> {
    // SAFETY: only the mount namespace is unshared; no descriptor table is split behind the back of other code.
    Ok(unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?)
}

#[cfg(test)]
mod tests {
    use super::root_is_shared;

    #[test]
    fn a_root_that_is_not_shared_is_not_left() {
        assert!(root_is_shared(
            "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        ));
        assert!(!root_is_shared("27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"));
        assert!(!root_is_shared(
            "27 1 254:0 / /mnt rw shared:1 - ext4 /dev/vda rw\n28 1 254:0 / / rw - ext4 /dev/vda rw\n"
        ));
    }
}
