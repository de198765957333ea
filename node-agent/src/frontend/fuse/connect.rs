//! Making a FUSE connection: a mount that is attached nowhere, and the INIT exchange.
//!
//! Invariant: whoever makes a connection answers its INIT before anybody else sees the descriptor, so no agent can die
//! in the middle of it. The mount never has a path: nothing can walk into it, nothing is left of it when the last user
//! is gone, and no mount namespace pins it.

use super::wire::{self, Body, MAX_IO_BYTES, Op};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use serde::{Deserialize, Serialize};
use std::io;

/// Requests the kernel may have under way; direct I/O of the loop device counts as background.
const BACKGROUND_REQUESTS: u16 = 128;
/// Above this many the kernel calls the device congested.
const CONGESTED_REQUESTS: u16 = 96;

const ASYNC_READ: u64 = 1;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const HAS_RESEND: u64 = 1 << 39;

/// What INIT agreed on, once for the life of the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Negotiated {
    /// Minor version of the protocol that the kernel speaks.
    pub(crate) minor: u32,
    /// Feature bits both sides have.
    pub(crate) flags: u64,
}

impl Negotiated {
    /// Whether requests of a dead agent come again; without it they hang until the device is aborted.
    pub(crate) fn resends(self) -> bool {
        self.flags & HAS_RESEND != 0
    }
}

/// A connection and its mount.
pub(crate) struct Connection {
    /// /dev/fuse, non-blocking.
    pub(crate) fuse: OwnedFd,
    /// The detached mount; `openat` below it reaches the volume file.
    pub(crate) mount: OwnedFd,
    pub(crate) negotiated: Negotiated,
}

/// Makes a connection.
pub(crate) fn connect() -> io::Result<Connection> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let fuse = rustix::fs::open("/dev/fuse", flags, Mode::empty())?;
    let fs = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let set = |key: &str, value: &str| rustix::mount::fsconfig_set_string(&fs, key, value);
    set("source", "mars")?;
    set("fd", &fuse.as_raw_fd().to_string())?;
    set("rootmode", "40000")?;
    set("user_id", "0")?;
    set("group_id", "0")?;
    rustix::mount::fsconfig_create(&fs)?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let negotiated = answer_init(&fuse)?;
    Ok(Connection {
        fuse,
        mount,
        negotiated,
    })
}

fn answer_init(fuse: &OwnedFd) -> io::Result<Negotiated> {
    const WAIT: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
    if poll(&mut [PollFd::new(fuse, PollFlags::IN)], Some(&WAIT))? == 0 {
        return Err(io::Error::new(
            io::ErrorKind::TimedOut,
            "the kernel sent no FUSE INIT within 5 s",
        ));
    }
    let mut buffer = Vec::with_capacity(wire::BUFFER_BYTES);
    rustix::io::read(fuse, rustix::buffer::spare_capacity(&mut buffer))?;
    let request = wire::parse(&buffer).map_err(io::Error::other)?;
    let Op::Init {
        flags: offered,
        minor,
        readahead,
    } = request.op
    else {
        return Err(io::Error::other("the first FUSE request is not INIT"));
    };
    let wanted = ASYNC_READ | BIG_WRITES | ASYNC_DIO | PARALLEL_DIROPS | MAX_PAGES | INIT_EXT | HAS_RESEND;
    let flags = offered & wanted;
    if flags & ASYNC_DIO == 0 || flags & MAX_PAGES == 0 {
        return Err(io::Error::other(
            "this kernel's FUSE lacks ASYNC_DIO or MAX_PAGES: Linux 4.20 or newer is needed",
        ));
    }
    let low = u32::try_from(flags & u64::from(u32::MAX)).expect("masked to 32 bits");
    let high = u32::try_from(flags >> 32).expect("shifted to 32 bits");
    let pages = u16::try_from(MAX_IO_BYTES / 4096).expect("1 MiB is 256 pages");
    let sizes = Body::default().u32(7).u32(minor.min(40)).u32(readahead).u32(low);
    let sizes = sizes
        .u16(BACKGROUND_REQUESTS)
        .u16(CONGESTED_REQUESTS)
        .u32(MAX_IO_BYTES)
        .u32(1)
        .u16(pages)
        .u16(0);
    let (unique, body) = (request.unique, sizes.u32(high).zeros(28).bytes());
    wire::answer(rustix::fd::AsFd::as_fd(fuse), &mut [0; 256], unique, 0, &body)?;
    Ok(Negotiated { minor, flags })
}
