//! One device that the keeper holds: FUSE connection, loop device, and the agent that serves it.
//!
//! Invariant: `holder` and `device` are locked for moments only. Work that waits for the agent (making, growing and
//! clearing the loop device all send requests to it) holds `working` instead, so a new agent can always take over – and
//! by serving the very requests such work waits for, it also sets that work free.

use super::protocol::{Failure, LoopIdentity};
use super::state::start_time;
use crate::frontend::fuse::{self, Negotiated};
use crate::frontend::loopdev;
use crate::frontend::stacked::VOLUME_SUFFIX;
use mars_engine::types::ReplicaId;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long an operation waits for an earlier one on the same device.
const WORK_WAIT: Duration = Duration::from_secs(20);
/// How long a cleared device may take to go, before somebody must have it open.
const CLEAR_WAIT: Duration = Duration::from_secs(5);
const POLL_STEP: Duration = Duration::from_millis(5);

/// The agent that was given the descriptor.
struct Holder {
    pidfd: OwnedFd,
    pid: u32,
}

/// See the module.
pub(super) struct Volume {
    pub(super) replica: ReplicaId,
    pub(super) negotiated: Negotiated,
    fuse: OwnedFd,
    mount: OwnedFd,
    holder: Mutex<Option<Holder>>,
    device: Mutex<Option<LoopIdentity>>,
    working: Mutex<()>,
}

/// Name of the volume file: the only name in its file system, and what sysfs shows below the loop device.
pub(crate) fn file_name(replica: ReplicaId) -> String {
    format!("{replica}{VOLUME_SUFFIX}")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Volume {
    /// Makes a new connection; no loop device yet, since that needs somebody who serves.
    pub(super) fn create(replica: ReplicaId) -> io::Result<Self> {
        let fuse::Connection {
            fuse,
            mount,
            negotiated,
        } = fuse::connect()?;
        Ok(Self::adopt(replica, negotiated, fuse, mount, None))
    }

    /// Takes over what an earlier keeper made.
    pub(super) fn adopt(
        replica: ReplicaId,
        negotiated: Negotiated,
        fuse: OwnedFd,
        mount: OwnedFd,
        device: Option<LoopIdentity>,
    ) -> Self {
        let (holder, device, working) = (Mutex::new(None), Mutex::new(device), Mutex::new(()));
        Self {
            replica,
            negotiated,
            fuse,
            mount,
            holder,
            device,
            working,
        }
    }

    pub(super) fn device(&self) -> Option<LoopIdentity> {
        *lock(&self.device)
    }

    /// The descriptors that go to an agent.
    pub(super) fn descriptors(&self) -> [BorrowedFd<'_>; 2] {
        [self.fuse.as_fd(), self.mount.as_fd()]
    }

    /// Makes a process the holder, if the last one has ended (or is the same). Returns its process id and start time.
    pub(super) fn hand_to(&self, pidfd: OwnedFd, pid: u32) -> Result<Option<(u32, u64)>, Failure> {
        let mut holder = lock(&self.holder);
        if let Some(old) = holder.as_ref()
            && old.pid != pid
            && !has_ended(&old.pidfd)?
        {
            return Err(Failure::HolderAlive { pid: old.pid });
        }
        *holder = Some(Holder { pidfd, pid });
        Ok(start_time(pid).map(|ticks| (pid, ticks)))
    }

    /// Waits for an earlier operation on this device, within limits.
    fn work(&self) -> Result<MutexGuard<'_, ()>, Failure> {
        let deadline = Instant::now() + WORK_WAIT;
        loop {
            match self.working.try_lock() {
                Ok(guard) => return Ok(guard),
                Err(std::sync::TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(std::sync::TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(POLL_STEP),
                Err(std::sync::TryLockError::WouldBlock) => {
                    return Err(Failure::Failed(
                        "an earlier operation on this device still waits for an agent to serve it".into(),
                    ));
                }
            }
        }
    }

    /// Makes the loop device, or finds it made. `record` is told the number before anything is configured.
    pub(super) fn set_up(
        &self,
        logical_block_bytes: u32,
        record: &mut dyn FnMut(u32, Option<u64>) -> io::Result<()>,
    ) -> Result<LoopIdentity, Failure> {
        let _working = self.work()?;
        if let Some(device) = self.device() {
            return Ok(device);
        }
        let name = file_name(self.replica);
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.mount, name.as_str(), flags, Mode::empty())
            .map_err(|error| Failure::of("open the volume file", &error))?;
        let number = loopdev::configure(file.as_fd(), logical_block_bytes, &name, &mut |number| {
            record(number, None)
        })
        .map_err(|error| Failure::of("make a loop device", &error))?;
        let device = loopdev::identity(number).map_err(|error| Failure::of("identify the loop device", &error))?;
        record(number, Some(device.diskseq))?;
        *lock(&self.device) = Some(device);
        Ok(device)
    }

    /// Has the loop driver take the size that the agent shows now.
    pub(super) fn resize(&self) -> Result<(), Failure> {
        let _working = self.work()?;
        let device = self.device().ok_or(Failure::Unknown)?;
        // The loop driver uses the size the file system knows: have it ask the agent.
        let sync = rustix::fs::AtFlags::STATX_FORCE_SYNC;
        rustix::fs::statx(&self.mount, file_name(self.replica), sync, rustix::fs::StatxFlags::SIZE)
            .map_err(|error| Failure::of("ask for the size of the volume file", &error))?;
        loopdev::update_size(device.number).map_err(|error| Failure::of("grow the loop device", &error))
    }

    pub(super) fn set_volatile_cache(&self, volatile: bool) -> Result<(), Failure> {
        let device = self.device().ok_or(Failure::Unknown)?;
        loopdev::set_volatile_cache(device.number, volatile)
            .map_err(|error| Failure::of("set write_cache of the loop device", &error))
    }

    /// Clears the loop device unless it is in use; then nothing has changed.
    pub(super) fn close(&self) -> Result<(), Failure> {
        let _working = self.work()?;
        let Some(device) = self.device() else { return Ok(()) };
        if !self.is_ours(device) {
            *lock(&self.device) = None;
            return Ok(());
        }
        match loopdev::clear(device.number) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(Failure::Busy),
            other => other.map_err(|error| Failure::of("clear the loop device", &error))?,
        }
        let deadline = Instant::now() + CLEAR_WAIT;
        while self.is_ours(device) {
            if Instant::now() >= deadline {
                // Somebody has it open without a claim. It would go when they close it; it must rather stay.
                match loopdev::keep(device.number) {
                    Ok(()) => return Err(Failure::Busy),
                    // They have just closed it.
                    Err(_) if !self.is_ours(device) => break,
                    Err(error) => return Err(Failure::of("keep the loop device", &error)),
                }
            }
            std::thread::sleep(POLL_STEP);
        }
        *lock(&self.device) = None;
        Ok(())
    }

    /// Lets go of the connection, so that all its requests fail, and clears the loop device as soon as its users let go of that.
    /// For a device that nobody will serve again.
    pub(super) fn give_up(volume: Arc<Volume>) {
        let device = volume.device().filter(|device| volume.is_ours(*device));
        // Before the clearing: that may wait for requests which only fail when the last descriptor is closed.
        drop(volume);
        if let Some(device) = device
            && let Err(error) = loopdev::clear_when_closed(device.number)
        {
            tracing::warn!(number = device.number, %error, "cannot clear the loop device of an aborted volume");
        }
    }

    fn is_ours(&self, device: LoopIdentity) -> bool {
        loopdev::backing_name(device.number).is_some_and(|name| name == file_name(self.replica))
            && loopdev::identity(device.number).is_ok_and(|now| now.diskseq == device.diskseq)
    }
}

/// Whether the process behind a pidfd has exited.
fn has_ended(pidfd: &OwnedFd) -> io::Result<bool> {
    Ok(poll(
        &mut [PollFd::new(pidfd, PollFlags::IN)],
        Some(&Timespec { tv_sec: 0, tv_nsec: 0 }),
    )? > 0)
}
