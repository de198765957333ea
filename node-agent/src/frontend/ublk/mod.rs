//! The `ublk` frontend: a block device whose requests arrive on an `io_uring`, through libublk. All of libublk is below here.
//!
//! An open device has one thread. Its ring carries the requests and, by a poll of the owner's eventfd, everything else that
//! concerns the owner – which therefore lives on this thread while the device exists and returns to a shard afterwards.
//!
//! | file | concern |
//! |---|---|
//! | `control` | commands to the driver: make, recover, describe, grow, stop, delete |
//! | `record` | recovery: which device a former life left, and the proof that it is ours |
//! | `device` | the life of one device, from its making to its end |
//! | `ring` | the queue: requests to the owner, answers to the kernel |
//!
//! Invariants: a request is answered only after the owner said so, and doing it twice is the same as doing it once: the device
//! is made with user recovery and reissue, so a killed agent is a pause, and what it had taken comes again. A device that a
//! former life left is taken over only if the record of it (boot id, number, kernel sequence number) agrees with sysfs.

mod control;
mod device;
mod record;
mod ring;

pub(super) use control::is_available;
pub(super) use record::delete_leftovers;

use super::{BlockFrontend, CloseError, Device, FrontendError, FrontendKind, OpenParams, Resized, Seat, sysfs, users};
use crate::shard::host::{Host, Message};
use control::DEVICE_WAIT;
use device::Setup;
use libublk::UblkError;
use mars_engine::types::ReplicaId;
use record::{Records, identity, node};
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tracing::{error, info};

/// See the module.
pub(super) struct UblkFrontend {
    records: Records,
    running: Mutex<HashMap<ReplicaId, Running>>,
}

/// A device that this process serves.
struct Running {
    id: u32,
    /// The owner comes back through this when the device is gone.
    returned: Receiver<Box<Host>>,
    /// Disconnected when its control thread has ended. That thread tidies up, too, after its queue: nobody else may delete the
    /// device before.
    ended: Receiver<()>,
}

fn failed(what: &str, error: &UblkError) -> FrontendError {
    FrontendError::Io {
        what: format!("ublk: {what}"),
        source: io::Error::other(format!("{error:?}")),
    }
}

fn did_not_end(id: u32) -> FrontendError {
    FrontendError::Io {
        what: format!("ublk device {id}"),
        source: io::Error::new(io::ErrorKind::TimedOut, "its thread did not end; restart the agent"),
    }
}

impl UblkFrontend {
    /// Records of devices go to `state_dir`: volatile storage, private to this node.
    pub(super) fn new(state_dir: PathBuf) -> Self {
        Self {
            records: Records::new(state_dir),
            running: Mutex::default(),
        }
    }

    fn running(&self) -> MutexGuard<'_, HashMap<ReplicaId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, params: &OpenParams, recover: Option<u32>, seat: &Seat) -> Result<u32, FrontendError> {
        let host = seat.mailbox.ask_blocking(Message::Leave)?;
        let (ready_to, ready) = channel();
        let (returned_to, returned) = channel();
        let (alive, ended) = channel();
        let served = Arc::new(Mutex::new(Some((host, returned_to))));
        let setup = Setup {
            params: params.clone(),
            recover,
            record: self.records.path(params.replica),
            served: served.clone(),
        };
        let name = format!("mars-ublk-{}", params.name);
        let spawned = std::thread::Builder::new().name(name).spawn(move || {
            device::run(&setup, &ready_to);
            drop(alive);
        });
        let started = match spawned {
            Ok(_) => ready
                .recv_timeout(DEVICE_WAIT)
                .unwrap_or_else(|_| Err((None, "it does not start".to_owned()))),
            Err(error) => Err((None, error.to_string())),
        };
        let (id, text) = match started {
            Ok(id) => {
                self.running().insert(params.replica, Running { id, returned, ended });
                return Ok(id);
            }
            Err(failure) => failure,
        };
        // If no queue took the owner, it is still here; else it comes back when the queue ends.
        let untaken = served.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (untaken, id) {
            (Some((host, _)), _) => seat.runtime.place(host),
            (None, Some(id)) => {
                self.running().insert(params.replica, Running { id, returned, ended });
                self.stop(params.replica, recover.is_none(), None, seat)?;
            }
            (None, None) => error!(replica = %params.replica, "a ublk device hangs while it starts: restart the agent"),
        }
        Err(FrontendError::Io {
            what: format!("ublk device of {}", params.name),
            source: io::Error::other(text),
        })
    }

    /// Stops the device and gives the owner back to a shard. `claim` is released once nobody can open the device any more. A device that
    /// does not stop counts as running: it is not gone at the next attempt either.
    fn stop(&self, replica: ReplicaId, delete: bool, claim: Option<OwnedFd>, seat: &Seat) -> Result<(), FrontendError> {
        let Some(running) = self.running().remove(&replica) else {
            return Ok(());
        };
        let id = running.id;
        let stopped = control::stop(id).and_then(|()| {
            drop(claim);
            running.returned.recv_timeout(DEVICE_WAIT).map_err(|_| did_not_end(id))
        });
        let host = match stopped {
            Ok(host) => host,
            Err(error) => {
                self.running().insert(replica, running);
                return Err(error);
            }
        };
        seat.runtime.place(host);
        let ended = running.ended;
        if ended.recv_timeout(DEVICE_WAIT) == Err(RecvTimeoutError::Timeout) {
            return Err(did_not_end(id));
        }
        if delete {
            control::delete(id)?;
            self.records.remove(replica)?;
        }
        Ok(())
    }
}

impl BlockFrontend for UblkFrontend {
    fn kind(&self) -> FrontendKind {
        FrontendKind::Ublk
    }

    fn leftover(&self, replica: ReplicaId) -> Result<Option<Device>, FrontendError> {
        let Some(id) = self.records.leftover(replica)? else {
            return Ok(None);
        };
        let (major, minor, diskseq) =
            identity(id).map_err(|error| FrontendError::io(format!("ublk device {id}"), error))?;
        Ok(Some(Device {
            kind: FrontendKind::Ublk,
            replica,
            link: PathBuf::new(),
            node: node(id),
            major,
            minor,
            diskseq,
            size_bytes: 0,
            resize_pending: false,
            survives_restart: true,
        }))
    }

    fn discard(&self, leftover: &Device) -> Result<(), FrontendError> {
        // The record says whose it is; a device that is open here has one, too, but is not left over.
        if self.running().contains_key(&leftover.replica) {
            return Ok(());
        }
        self.records.give_up(leftover.replica)
    }

    fn open(&self, params: &OpenParams, seat: &Seat) -> Result<Device, FrontendError> {
        let leftover = self.records.leftover(params.replica)?;
        if let Some(id) = leftover {
            control::wait_until_quiescent(id)?;
            info!(replica = %params.replica, id, "taking the device over from a former agent");
        }
        let id = self.start(params, leftover, seat)?;
        let (major, minor, diskseq) =
            identity(id).map_err(|error| FrontendError::io(format!("ublk device {id}"), error))?;
        record::write(&self.records.path(params.replica), id, Some(diskseq))?;
        let mut device = Device {
            kind: FrontendKind::Ublk,
            replica: params.replica,
            link: PathBuf::new(),
            node: node(id),
            major,
            minor,
            diskseq,
            size_bytes: params.size_bytes,
            resize_pending: false,
            survives_restart: true,
        };
        self.set_volatile_cache(&device, params.volatile_cache)?;
        if record::shown_bytes(id).is_some_and(|bytes| bytes < params.size_bytes) {
            // It grew while no agent was there.
            device.resize_pending = self.resize(&device, params.size_bytes)? == Resized::AtNextOpen;
        }
        Ok(device)
    }

    fn resize(&self, device: &Device, size_bytes: u64) -> Result<Resized, FrontendError> {
        let id = self.running().get(&device.replica).map(|running| running.id);
        id.map_or(Ok(Resized::AtNextOpen), |id| control::grow(id, size_bytes))
    }

    /// The device is made with a volatile cache and FUA; "write through" makes the block layer drop flushes and FUA.
    fn set_volatile_cache(&self, device: &Device, volatile: bool) -> Result<(), FrontendError> {
        let path = sysfs::dir(device.major, device.minor).join("queue/write_cache");
        let wanted = if volatile { "write back" } else { "write through" };
        std::fs::write(&path, wanted).map_err(|error| FrontendError::io(format!("set {}", path.display()), error))
    }

    fn close(&self, device: &Device, seat: &Seat) -> Result<(), CloseError> {
        // The claim keeps everybody from mounting it from now on.
        let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
        let claim = match rustix::fs::open(&device.node, flags, Mode::empty()) {
            Ok(claim) => claim,
            Err(rustix::io::Errno::BUSY) => return Err(CloseError::Busy(users::of(device))),
            Err(errno) => return Err(FrontendError::io(format!("claim {}", device.node.display()), errno).into()),
        };
        let me = std::process::id();
        let others: Vec<_> = users::of(device)
            .into_iter()
            .filter(|user| !matches!(user, super::DeviceUser::Open { pid, .. } if *pid == me))
            .collect();
        if !others.is_empty() {
            return Err(CloseError::Busy(others));
        }
        rustix::fs::fsync(&claim)
            .map_err(|errno| FrontendError::io(format!("flush {}", device.node.display()), errno))?;
        self.stop(device.replica, true, Some(claim), seat)?;
        Ok(())
    }
}
