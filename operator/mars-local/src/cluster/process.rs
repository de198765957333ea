//! Processes by identity: pid, start time and boot, so that a number used again is never mistaken for ours.
//!
//! Invariant: a signal is sent only through a pidfd that was opened before the identity was checked, so it cannot reach
//! another process.

use super::{FileError, write_private};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use std::path::Path;
use std::time::{Duration, Instant};

/// A process that was started by this program, now or earlier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Start time in clock ticks since boot.
    pub(super) start_ticks: u64,
    /// The kernel's boot id.
    pub(super) boot_id: String,
    /// When it was started, for people.
    pub(super) since: String,
}

/// What the kernel calls this boot.
pub(super) fn kernel_boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    text.trim().to_owned()
}

/// Start time and state letter of a process.
fn stat(pid: u32) -> Option<(u64, char)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command name may hold anything, so count from the last parenthesis.
    let rest = text.rsplit_once(')')?.1;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?.chars().next()?;
    let start = fields.nth(18)?.parse().ok()?;
    Some((start, state))
}

impl Process {
    /// The process with this pid, as it is now.
    pub(super) fn observe(pid: u32) -> Option<Self> {
        let (start_ticks, _) = stat(pid)?;
        Some(Self {
            pid,
            start_ticks,
            boot_id: kernel_boot_id(),
            since: crate::meta::now(),
        })
    }

    /// Reads a record; one that is damaged or absent says nothing about any process.
    pub(super) fn load(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Writes the record.
    pub(super) fn save(&self, path: &Path) -> Result<(), FileError> {
        write_private(path, &serde_json::to_vec(self).unwrap_or_default())
    }

    /// A handle on the process if it still runs.
    pub(super) fn handle(&self) -> Option<OwnedFd> {
        if self.boot_id != kernel_boot_id() {
            return None;
        }
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let handle = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        let (start, state) = stat(self.pid)?;
        (start == self.start_ticks && state != 'Z' && state != 'X').then_some(handle)
    }

    /// Whether it still runs.
    pub(super) fn runs(&self) -> bool {
        self.handle().is_some()
    }

    /// Sends a signal; says whether there was a process to get it.
    pub(super) fn signal(&self, signal: Signal) -> bool {
        self.handle()
            .is_some_and(|handle| pidfd_send_signal(&handle, signal).is_ok())
    }

    /// Waits until it has ended; says whether it did within the time. Blocks.
    pub(super) fn wait(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        loop {
            let Some(handle) = self.handle() else { return true };
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(rest.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: rest.subsec_nanos().into(),
            };
            let _ = poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&timeout));
        }
    }

    /// Ends it: SIGTERM, and after `grace` SIGKILL. Says whether the first was enough. Blocks.
    pub(super) fn end(&self, grace: Duration) -> bool {
        self.signal(Signal::TERM);
        // A stopped process hears SIGTERM only when it goes on.
        self.signal(Signal::CONT);
        if self.wait(grace) {
            return true;
        }
        self.signal(Signal::KILL);
        self.wait(Duration::from_secs(10));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_more_than_its_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::observe(child.id()).unwrap();
        assert!(process.runs());
        let other = Process {
            start_ticks: process.start_ticks + 1,
            ..process.clone()
        };
        assert!(
            !other.runs() && !other.signal(Signal::KILL),
            "another start time is another process"
        );
        let other_boot = Process {
            boot_id: "x".into(),
            ..process.clone()
        };
        assert!(!other_boot.signal(Signal::KILL));
        assert!(process.end(Duration::from_secs(10)));
        assert!(!process.runs(), "a zombie does not run");
        child.wait().unwrap();
    }
}
