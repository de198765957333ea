//! The `loop` frontend: a FUSE file under a loop device with direct I/O. For kernels without `ublk_drv`.
//!
//! The loop driver turns flushes (and FUA, which it does not have: a write and a flush) into FSYNC, discards into holes,
//! zeroes into zero ranges. With `durability: EveryWrite` its queue is set to "write through", so that nobody flushes.
//!
//! Invariant: the source of requests sits on the owner's thread before the keeper is asked for anything that makes the
//! kernel send requests, and leaves it after the last thing that does.

use super::fuse::{FuseServer, Negotiated};
use super::{
    BlockFrontend, CloseError, Device, FrontendError, FrontendKind, OpenParams, Resized, Seat, loopdev, users,
};
use crate::keeper::{Acquired, Hello, KeeperClient, KeeperError, LoopIdentity, volume_file_name};
use crate::shard::host::Message;
use mars_engine::types::ReplicaId;
use rustix::fd::{AsFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tracing::{info, warn};
use uuid::Uuid;

/// How long to wait for a former agent to end before giving up: it may have much memory to free.
const HOLDER_WAIT: Duration = Duration::from_secs(30);
const HOLDER_POLL: Duration = Duration::from_millis(20);

/// See the module.
pub struct LoopFrontend {
    keeper: KeeperClient,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    devices: HashMap<ReplicaId, Held>,
    /// The life of the keeper that has copies of all descriptors.
    keeper: Option<Uuid>,
}

/// What the agent keeps of an open device.
struct Held {
    size_bytes: Arc<AtomicU64>,
    negotiated: Negotiated,
    /// Copies, for a new keeper if the present one is lost.
    fuse: OwnedFd,
    mount: OwnedFd,
}

impl LoopFrontend {
    /// A frontend whose devices are made by the keeper at `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self {
            keeper: KeeperClient::new(socket),
            open: Mutex::default(),
        }
    }

    fn open_devices(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the former agent to end, within limits.
    fn acquire(&self, replica: ReplicaId) -> Result<Acquired, KeeperError> {
        let deadline = Instant::now() + HOLDER_WAIT;
        loop {
            match self.keeper.acquire(replica) {
                Err(KeeperError::HolderAlive { .. }) if Instant::now() < deadline => std::thread::sleep(HOLDER_POLL),
                result => return result,
            }
        }
    }

    /// Looks whether the keeper is the one that holds our devices; a new one gets copies of what the lost one had.
    ///
    /// # Errors
    /// See [`KeeperError`]; devices go on meanwhile, but would not survive the death of this agent.
    pub fn check_keeper(&self) -> Result<Hello, KeeperError> {
        let hello = self.keeper.hello()?;
        let mut open = self.open_devices();
        if open.keeper != Some(hello.instance) {
            for (replica, held) in &open.devices {
                if hello.held.iter().all(|(known, _)| known != replica) {
                    self.keeper
                        .deposit(*replica, held.negotiated, held.fuse.as_fd(), held.mount.as_fd())?;
                    info!(%replica, "a new device keeper holds this device now");
                }
            }
            open.keeper = Some(hello.instance);
        }
        Ok(hello)
    }

    fn serve(&self, params: &OpenParams, acquired: Acquired, seat: &Seat) -> Result<bool, FrontendError> {
        let Acquired {
            is_new,
            resends,
            negotiated,
            fuse,
            mount,
            ..
        } = acquired;
        let copy = |fd: &OwnedFd| {
            fd.try_clone()
                .map_err(|error| FrontendError::io("copy a descriptor", error))
        };
        let size_bytes = Arc::new(AtomicU64::new(params.size_bytes));
        let held = Held {
            size_bytes: size_bytes.clone(),
            negotiated,
            fuse: copy(&fuse)?,
            mount,
        };
        self.open_devices().devices.insert(params.replica, held);
        let server = FuseServer::new(fuse, volume_file_name(params.replica), size_bytes);
        if !is_new {
            let resent = server.take_over();
            match resent {
                Ok(()) => info!(replica = %params.replica, "took the device over from a former agent"),
                // An older kernel does not know the message; what was in flight then hangs until the device is aborted.
                Err(error) if !resends => warn!(%error, "this kernel cannot resend requests of the former agent"),
                Err(error) => return Err(FrontendError::io("ask for requests of the former agent", error)),
            }
        }
        seat.mailbox
            .ask_blocking(|told| Message::AddSource(Box::new(server), told))?;
        Ok(resends)
    }

    fn forget(&self, replica: ReplicaId, seat: &Seat) -> Result<(), FrontendError> {
        self.open_devices().devices.remove(&replica);
        Ok(seat.mailbox.ask_blocking(Message::RemoveSource)?)
    }
}

impl BlockFrontend for LoopFrontend {
    fn kind(&self) -> FrontendKind {
        FrontendKind::Loop
    }

    fn leftover(&self, replica: ReplicaId) -> Result<Option<Device>, FrontendError> {
        let hello = self.check_keeper()?;
        let served_here = self.open_devices().devices.contains_key(&replica);
        if hello.unheld.contains(&replica) && !served_here {
            let reason =
                "was restarted, and the agent that served this device, and still runs, has not given it back yet";
            return Err(KeeperError::Failed(reason.to_owned()).into());
        }
        let identity = hello
            .held
            .iter()
            .find(|(held, _)| *held == replica)
            .and_then(|(_, device)| *device);
        Ok(identity.map(|identity| device_of(replica, identity)))
    }

    fn discard(&self, leftover: &Device) -> Result<(), FrontendError> {
        if self.open_devices().devices.contains_key(&leftover.replica) {
            let reason = "it is open here: close it instead".to_owned();
            let path = leftover.node.clone();
            return Err(FrontendError::InTheWay { path, reason });
        }
        match self.keeper.abort(leftover.replica) {
            Ok(()) | Err(KeeperError::Unknown) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn open(&self, params: &OpenParams, seat: &Seat) -> Result<Device, FrontendError> {
        let acquired = self.acquire(params.replica)?;
        let existed = acquired.device.is_some();
        let survives_restart = self.serve(params, acquired, seat)?;
        let set_up = || -> Result<LoopIdentity, FrontendError> {
            let identity = self
                .keeper
                .set_up(params.replica, params.logical_block_bytes, params.volatile_cache)?;
            if existed {
                // It may have grown while no agent was there.
                self.keeper.resize(params.replica)?;
            }
            wait_for_node(identity.number)?;
            Ok(identity)
        };
        let identity = match set_up() {
            Ok(identity) => identity,
            Err(error) => {
                // A device that existed keeps its connection and waits; a new one leaves nothing behind.
                if !existed && let Err(also) = self.keeper.close(params.replica) {
                    warn!(error = %also, "a device that could not be made could not be removed, either");
                }
                self.forget(params.replica, seat)?;
                return Err(error);
            }
        };
        Ok(Device {
            size_bytes: params.size_bytes,
            survives_restart,
            ..device_of(params.replica, identity)
        })
    }

    fn resize(&self, device: &Device, size_bytes: u64) -> Result<Resized, FrontendError> {
        if let Some(held) = self.open_devices().devices.get(&device.replica) {
            held.size_bytes.store(size_bytes, Ordering::Release);
        }
        self.keeper.resize(device.replica)?;
        Ok(Resized::Done)
    }

    fn set_volatile_cache(&self, device: &Device, volatile: bool) -> Result<(), FrontendError> {
        Ok(self.keeper.set_volatile_cache(device.replica, volatile)?)
    }

    fn close(&self, device: &Device, seat: &Seat) -> Result<(), CloseError> {
        match self.keeper.close(device.replica) {
            Ok(()) => {}
            Err(KeeperError::Busy) => {
                return Err(CloseError::Busy(users::of(device)));
            }
            Err(error) => return Err(FrontendError::from(error).into()),
        }
        Ok(self.forget(device.replica, seat)?)
    }

    fn maintain(&self) -> Result<(), FrontendError> {
        self.check_keeper()?;
        Ok(())
    }
}

/// What the kernel says of a loop device; nobody serves it yet.
fn device_of(replica: ReplicaId, identity: LoopIdentity) -> Device {
    let LoopIdentity {
        number,
        major,
        minor,
        diskseq,
    } = identity;
    Device {
        kind: FrontendKind::Loop,
        replica,
        link: PathBuf::new(),
        node: loopdev::node(number),
        major,
        minor,
        diskseq,
        size_bytes: 0,
        resize_pending: false,
        survives_restart: false,
    }
}

/// The node is made by the kernel (devtmpfs) or by udev.
fn wait_for_node(number: u32) -> Result<(), FrontendError> {
    let (node, deadline) = (loopdev::node(number), Instant::now() + Duration::from_secs(5));
    while !node.exists() {
        if Instant::now() >= deadline {
            let missing = io::Error::from(io::ErrorKind::NotFound);
            return Err(FrontendError::io(
                format!("node {} in the agent's /dev", node.display()),
                missing,
            ));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
