//! Block devices: how the kernel's requests reach the owner of a replica, and how a device appears, grows and goes.
//!
//! ```text
//!  loop:  /dev/loopN ── loop driver (direct I/O) ── one FUSE file ── /dev/fuse ── shard thread of the owner
//!                                    the keeper made both and holds /dev/fuse across restarts of the agent
//!  ublk:  /dev/ublkbN ── io_uring of a thread of its own, to which the owner moves
//! ```
//!
//! Invariants: the link `/dev/mars/<resource>` appears after the device is ready and goes before anything else; a
//! device in use is never taken away; no probe opens a device. The logical block size is 512 bytes unless the data disk
//! itself has 4,096: existing file systems and partition tables were made for 512 and could not be used on a device
//! with larger sectors, and a member that takes over must show the same. Both frontends show the same size, so that a
//! handover between nodes with different kernels is not seen above.

pub mod fuse;
pub mod harden;
pub mod link;
pub mod loopback;
pub(crate) mod loopdev;
pub(crate) mod resident;
pub mod stacked;
mod sysfs;
mod ublk;
pub mod users;

pub use users::DeviceUser;

use crate::shard::Runtime;
use crate::shard::host::Mailbox;
use mars_engine::types::ReplicaId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use tracing::{info, warn};

/// Name of a resource as it may stand in a path: a DNS label.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeviceName(String);

impl DeviceName {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for DeviceName {
    type Err = FrontendError;

    fn from_str(text: &str) -> Result<Self, FrontendError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let inner = !text.is_empty() && text.len() <= 63 && text.bytes().all(allowed);
        if inner && !text.starts_with('-') && !text.ends_with('-') {
            Ok(Self(text.to_owned()))
        } else {
            Err(FrontendError::Name(text.to_owned()))
        }
    }
}

/// Which frontend is wished.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontendChoice {
    /// `ublk` where the kernel has it, else `loop`.
    #[default]
    Auto,
    /// FUSE under a loop device.
    Loop,
    /// `ublk_drv`.
    Ublk,
}

impl FromStr for FrontendChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "loop" => Ok(Self::Loop),
            "ublk" => Ok(Self::Ublk),
            other => Err(format!("no frontend is called {other:?}: use auto, loop or ublk")),
        }
    }
}

/// Which frontend serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrontendKind {
    /// FUSE under a loop device.
    Loop,
    /// `ublk_drv`.
    Ublk,
}

/// What a frontend needs to make a device.
#[derive(Debug, Clone)]
pub struct OpenParams {
    /// Name of the resource.
    pub name: DeviceName,
    /// Whose device it is; how a restarted agent finds it again.
    pub replica: ReplicaId,
    /// Size of the device (bytes, a multiple of 4,096).
    pub size_bytes: u64,
    /// Logical block size (bytes): 512 or 4,096.
    pub logical_block_bytes: u32,
    /// Whether the device advertises a volatile cache, so that users flush.
    pub volatile_cache: bool,
}

/// A block device that is ready for use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Which frontend serves it.
    pub kind: FrontendKind,
    /// Whose device it is.
    pub replica: ReplicaId,
    /// The link in this node's device directory; empty until it is made.
    pub link: PathBuf,
    /// The kernel's device node.
    pub node: PathBuf,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The kernel's count of devices: tells this device from an earlier one with the same number.
    pub diskseq: u64,
    /// The size it shows (bytes).
    pub size_bytes: u64,
    /// The kernel shows a larger size only when all users have closed the device.
    pub resize_pending: bool,
    /// Whether its users see only a pause when the agent dies.
    pub survives_restart: bool,
}

impl Device {
    /// Whether the kernel still has this very device; its number may belong to another one by now.
    #[must_use]
    pub fn is_there(&self) -> bool {
        let diskseq = sysfs::attribute(&sysfs::dir(self.major, self.minor).join("diskseq"));
        diskseq.is_some_and(|now| now.parse() == Ok(self.diskseq))
    }
}

/// How a change of size went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resized {
    /// The device shows the new size.
    Done,
    /// The kernel cannot grow this device while it is open.
    AtNextOpen,
}

/// Why a device could not be made or changed. Each message says what, where and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// Not a DNS label.
    #[error("{0:?} is not a resource name: 1 to 63 of a-z, 0-9 and -, not at the ends")]
    Name(String),
    /// A frontend that is not there was asked for.
    #[error("frontend {frontend} is not available: {reason}")]
    Unavailable {
        /// Its name.
        frontend: &'static str,
        /// Why not, and what would help.
        reason: String,
    },
    /// The keeper did not do it.
    #[error("device keeper: {0}")]
    Keeper(#[from] crate::keeper::KeeperError),
    /// Something that is not ours stands where a device or link should be.
    #[error("{} is in the way: {reason}", path.display())]
    InTheWay {
        /// What.
        path: PathBuf,
        /// What it is and what to do.
        reason: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, where.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// The engine is gone.
    #[error(transparent)]
    Stopped(#[from] crate::shard::host::Stopped),
}

impl FrontendError {
    pub(crate) fn io(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}

/// Why a device is still there.
#[derive(Debug, thiserror::Error)]
pub enum CloseError {
    /// Somebody uses it; nothing was changed.
    #[error("in use: {}", users::describe(.0))]
    Busy(Vec<DeviceUser>),
    /// See there.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
}

/// Where the owner of a replica lives: lets a frontend put a source of requests beside it, or take it to a thread of
/// the frontend's own.
#[derive(Clone)]
pub struct Seat {
    pub(crate) mailbox: Mailbox,
    pub(crate) runtime: Runtime,
}

impl Seat {
    pub(crate) fn new(mailbox: Mailbox, runtime: Runtime) -> Self {
        Self { mailbox, runtime }
    }
}

/// One way to make block devices. All methods may block for seconds and are never called on the thread of an owner.
pub trait BlockFrontend: Send + Sync {
    /// Which one this is.
    fn kind(&self) -> FrontendKind;

    /// The device of this replica that a former life of the agent left, if there is one. It is not served and has no link.
    ///
    /// # Errors
    /// When that cannot be found out: then no other frontend may make one either.
    fn leftover(&self, replica: ReplicaId) -> Result<Option<Device>, FrontendError>;

    /// Gives up a device that is left and that nobody may serve any more: its users get I/O errors, as when a machine dies.
    /// Never for a device that is open here.
    ///
    /// # Errors
    /// See [`FrontendError`]; then it is still there.
    fn discard(&self, leftover: &Device) -> Result<(), FrontendError>;

    /// Makes the device, or takes over the one that is left, and serves it. Ready for use on return.
    ///
    /// # Errors
    /// See [`FrontendError`].
    fn open(&self, params: &OpenParams, seat: &Seat) -> Result<Device, FrontendError>;

    /// Shows a new size.
    ///
    /// # Errors
    /// See [`FrontendError`].
    fn resize(&self, device: &Device, size_bytes: u64) -> Result<Resized, FrontendError>;

    /// Changes whether users are told to flush.
    ///
    /// # Errors
    /// See [`FrontendError`].
    fn set_volatile_cache(&self, device: &Device, volatile: bool) -> Result<(), FrontendError>;

    /// Removes the device, unless somebody uses it.
    ///
    /// # Errors
    /// See [`CloseError`].
    fn close(&self, device: &Device, seat: &Seat) -> Result<(), CloseError>;

    /// Called every few seconds: repairs what keeps devices alive across restarts of the agent.
    ///
    /// # Errors
    /// What is missing now; open devices go on meanwhile.
    fn maintain(&self) -> Result<(), FrontendError> {
        Ok(())
    }
}

/// Where devices of this agent are made.
#[derive(Debug, Clone)]
pub struct FrontendsConfig {
    /// Directory of the links, `/dev/mars` on a node of its own; private where nodes share a kernel.
    pub link_dir: PathBuf,
    /// Socket of the device keeper; `None`: no `loop` devices.
    pub keeper_socket: Option<PathBuf>,
    /// Where `ublk` devices are recorded for the next life of the agent: volatile storage, private to this node. `None`: no
    /// `ublk` devices.
    pub ublk_state_dir: Option<PathBuf>,
}

/// All frontends of this agent.
pub struct Frontends {
    link_dir: PathBuf,
    available: Vec<Box<dyn BlockFrontend>>,
    trouble: Mutex<Option<String>>,
}

/// Deletes the ublk devices recorded in `state_dir` (`<run-dir>/ublk`) of a node that is gone for good; for whoever simulates
/// the death of a machine, or takes a node down. Returns what could not be deleted, as texts.
#[must_use]
pub fn delete_ublk_leftovers(state_dir: &Path) -> Vec<String> {
    if ublk::is_available() {
        ublk::delete_leftovers(state_dir)
    } else {
        Vec::new()
    }
}

impl Frontends {
    /// Looks what this kernel offers. Nothing is opened or created.
    #[must_use]
    pub fn new(config: &FrontendsConfig) -> Self {
        let mut available: Vec<Box<dyn BlockFrontend>> = Vec::new();
        if let Some(dir) = config.ublk_state_dir.as_ref().filter(|_| ublk::is_available()) {
            available.push(Box::new(ublk::UblkFrontend::new(dir.clone())));
        }
        if let Some(socket) = &config.keeper_socket {
            available.push(Box::new(loopback::LoopFrontend::new(socket.clone())));
        }
        Self {
            link_dir: config.link_dir.clone(),
            available,
            trouble: Mutex::new(None),
        }
    }

    /// Only this one.
    #[cfg(test)]
    pub(crate) fn only(frontend: Box<dyn BlockFrontend>, link_dir: PathBuf) -> Self {
        Self {
            link_dir,
            available: vec![frontend],
            trouble: Mutex::new(None),
        }
    }

    /// Repairs what keeps devices alive across restarts of the agent, and remembers what could not be repaired.
    pub(crate) fn maintain(&self) {
        let failed = self.available.iter().find_map(|frontend| frontend.maintain().err());
        let now = failed.map(|error| error.to_string());
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if *trouble != now {
            if let Some(text) = &now {
                warn!("devices would not survive the death of this agent: {text}");
            } else {
                info!("devices survive the death of this agent again");
            }
            *trouble = now;
        }
    }

    /// Why open devices would not survive the death of this agent now, if so; for MarsNode.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Names of the frontends that can be used, best first; for MarsNode.
    #[must_use]
    pub fn names(&self) -> Vec<FrontendKind> {
        self.available.iter().map(|frontend| frontend.kind()).collect()
    }

    /// Directory of the links.
    #[must_use]
    pub fn link_dir(&self) -> &Path {
        &self.link_dir
    }

    /// Opens with the frontend that has a device of this replica already, else with the chosen one; then links it.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn open(&self, choice: FrontendChoice, params: &OpenParams, seat: &Seat) -> Result<Device, FrontendError> {
        link::check(&self.link_dir, &params.name)?;
        let frontend = self.pick(choice, params.replica)?;
        let mut device = frontend.open(params, seat)?;
        device.link = link::create(&self.link_dir, &params.name, &device.node)?;
        Ok(device)
    }

    fn pick(&self, choice: FrontendChoice, replica: ReplicaId) -> Result<&dyn BlockFrontend, FrontendError> {
        for frontend in &self.available {
            if frontend.leftover(replica)?.is_some() {
                return Ok(frontend.as_ref());
            }
        }
        let wanted = match choice {
            FrontendChoice::Auto => None,
            FrontendChoice::Loop => Some(FrontendKind::Loop),
            FrontendChoice::Ublk => Some(FrontendKind::Ublk),
        };
        let fits = |frontend: &&dyn BlockFrontend| wanted.is_none_or(|kind| frontend.kind() == kind);
        self.available
            .iter()
            .map(AsRef::as_ref)
            .find(fits)
            .ok_or_else(|| match choice {
                FrontendChoice::Loop => FrontendError::Unavailable {
                    frontend: "loop",
                    reason: "this agent was started without the socket of a device keeper".into(),
                },
                FrontendChoice::Ublk => FrontendError::Unavailable {
                    frontend: "ublk",
                    reason: "this kernel has no /dev/ublk-control: load ublk_drv, or use loop".into(),
                },
                FrontendChoice::Auto => FrontendError::Unavailable {
                    frontend: "auto",
                    reason: "neither ublk (needs the module ublk_drv) nor loop (needs the device keeper) can be used"
                        .into(),
                },
            })
    }

    /// See [`BlockFrontend::leftover`].
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn leftover(&self, replica: ReplicaId) -> Result<Option<Device>, FrontendError> {
        for frontend in &self.available {
            if let Some(device) = frontend.leftover(replica)? {
                return Ok(Some(device));
            }
        }
        Ok(None)
    }

    /// See [`BlockFrontend::discard`].
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn discard(&self, leftover: &Device) -> Result<(), FrontendError> {
        self.of(leftover)?.discard(leftover)
    }

    fn of(&self, device: &Device) -> Result<&dyn BlockFrontend, FrontendError> {
        let found = self.available.iter().find(|frontend| frontend.kind() == device.kind);
        found.map(AsRef::as_ref).ok_or_else(|| FrontendError::Unavailable {
            frontend: "of this device",
            reason: "it was made by another life of the agent with other frontends".into(),
        })
    }

    /// See [`BlockFrontend::resize`].
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn resize(&self, device: &Device, size_bytes: u64) -> Result<Resized, FrontendError> {
        self.of(device)?.resize(device, size_bytes)
    }

    /// See [`BlockFrontend::set_volatile_cache`].
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn set_volatile_cache(&self, device: &Device, volatile: bool) -> Result<(), FrontendError> {
        self.of(device)?.set_volatile_cache(device, volatile)
    }

    /// Removes link and device; when it is in use, both stay.
    ///
    /// # Errors
    /// See [`CloseError`].
    pub fn close(&self, device: &Device, seat: &Seat) -> Result<(), CloseError> {
        let frontend = self.of(device)?;
        let using = users::of(device);
        if !using.is_empty() {
            return Err(CloseError::Busy(using));
        }
        link::remove(&device.link, &device.node)?;
        let closed = frontend.close(device, seat);
        if let Err(CloseError::Busy(_)) = &closed {
            // Somebody was faster; the device goes on as before, so its link comes back.
            link::restore(&device.link, &device.node)?;
        }
        closed
    }
}
