//! The loop driver: its ioctls and what sysfs says about its devices.
//!
//! Invariant: only devices that the caller has proven to be its own are cleared; configuring one never takes a device
//! that anybody else configured meanwhile (the kernel answers EBUSY and the next free one is tried).

use super::sysfs;
use crate::keeper::LoopIdentity;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LOOP_CLR_FD: libc::Ioctl = 0x4C01;
const LOOP_SET_STATUS64: libc::Ioctl = 0x4C04;
const LOOP_GET_STATUS64: libc::Ioctl = 0x4C05;
const LOOP_SET_CAPACITY: libc::Ioctl = 0x4C07;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;

const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Without it the loop driver caches a second time, and waits in one thread.
const LO_FLAGS_DIRECT_IO: u32 = 16;
const NAME_BYTES: usize = 64;
/// How often another free device is tried when somebody else was faster.
const CONFIGURE_ATTEMPTS: u32 = 64;
/// How long the node of a new device may take to appear.
const NODE_WAIT: Duration = Duration::from_secs(5);

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const EMPTY_INFO: LoopInfo = LoopInfo {
    device: 0,
    inode: 0,
    rdevice: 0,
    offset: 0,
    size_limit: 0,
    number: 0,
    encrypt_type: 0,
    encrypt_key_size: 0,
    flags: 0,
    file_name: [0; NAME_BYTES],
    crypt_name: [0; NAME_BYTES],
    encrypt_key: [0; 32],
    init: [0; 2],
};

/// Path of a loop device's node.
pub(crate) fn node(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

fn open(number: u32, flags: OFlags) -> io::Result<OwnedFd> {
    let deadline = Instant::now() + NODE_WAIT;
    loop {
        match rustix::fs::open(node(number), flags | OFlags::CLOEXEC, Mode::empty()) {
            Ok(device) => return Ok(device),
            Err(rustix::io::Errno::NOENT) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
            Err(rustix::io::Errno::NOENT) => {
                let text = format!(
                    "{} does not appear: the keeper needs the node's own /dev",
                    node(number).display()
                );
                return Err(io::Error::new(io::ErrorKind::NotFound, text));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[expect(unsafe_code, reason = "ioctls of the loop driver that take a number or nothing")]
fn ioctl(device: BorrowedFd<'_>, request: libc::Ioctl, argument: libc::c_ulong) -> io::Result<i32> {
    // SAFETY: the callers pass requests whose argument is a plain number.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, argument) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

#[expect(unsafe_code, reason = "ioctls of the loop driver that take a structure")]
fn ioctl_struct<T>(device: BorrowedFd<'_>, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: the callers pair each request with the structure that linux/loop.h gives it, in #[repr(C)].
    let result = unsafe { libc::ioctl(device.as_raw_fd(), request, std::ptr::from_mut(argument)) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Makes a loop device over `file` with direct I/O; returns its number. `intend` is told each number before it is tried.
pub(crate) fn configure(
    file: BorrowedFd<'_>,
    logical_block_bytes: u32,
    name: &str,
    intend: &mut dyn FnMut(u32) -> io::Result<()>,
) -> io::Result<u32> {
    let control = rustix::fs::open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let mut info = LoopInfo {
        flags: LO_FLAGS_DIRECT_IO,
        ..EMPTY_INFO
    };
    for (to, from) in info.file_name.iter_mut().take(NAME_BYTES - 1).zip(name.bytes()) {
        *to = from;
    }
    let fd = u32::try_from(file.as_raw_fd()).expect("an open descriptor is not negative");
    for _ in 0..CONFIGURE_ATTEMPTS {
        let free = ioctl(control.as_fd(), LOOP_CTL_GET_FREE, 0)?;
        let number = u32::try_from(free).expect("the kernel returned a number, not an error");
        intend(number)?;
        let device = open(number, OFlags::RDWR)?;
        let mut config = LoopConfig {
            fd,
            block_size: logical_block_bytes,
            info,
            reserved: [0; 8],
        };
        match ioctl_struct(device.as_fd(), LOOP_CONFIGURE, &mut config) {
            Ok(()) => return Ok(number),
            // Somebody else took it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::ResourceBusy,
        "other programs take every free loop device first: try again",
    ))
}

fn sys(number: u32) -> PathBuf {
    Path::new("/sys/block").join(format!("loop{number}"))
}

/// Name of the file below a loop device, without directory.
pub(crate) fn backing_name(number: u32) -> Option<String> {
    let path = sysfs::attribute(&sys(number).join("loop/backing_file"))?;
    Some(path.rsplit('/').next()?.to_owned())
}

/// Which device this is; from sysfs alone.
pub(crate) fn identity(number: u32) -> io::Result<LoopIdentity> {
    let missing = |what: &str| {
        io::Error::new(
            io::ErrorKind::NotFound,
            format!("{} has no {what}", sys(number).display()),
        )
    };
    let numbers = sysfs::attribute(&sys(number).join("dev"))
        .as_deref()
        .and_then(sysfs::parse_numbers);
    let (major, minor) = numbers.ok_or_else(|| missing("device number"))?;
    let diskseq = sysfs::attribute(&sys(number).join("diskseq")).and_then(|text| text.parse().ok());
    Ok(LoopIdentity {
        number,
        major,
        minor,
        diskseq: diskseq.ok_or_else(|| missing("diskseq (Linux 5.15)"))?,
    })
}

/// Has the driver ask the file for its size again.
pub(crate) fn update_size(number: u32) -> io::Result<()> {
    ioctl(open(number, OFlags::RDONLY)?.as_fd(), LOOP_SET_CAPACITY, 0).map(drop)
}

/// Whether users flush. The driver says so by itself (the file has fsync); with "write through" the block layer drops
/// every flush and every FUA, which is right exactly when each completed write is durable already.
pub(crate) fn set_volatile_cache(number: u32, volatile: bool) -> io::Result<()> {
    let path = sys(number).join("queue/write_cache");
    let wanted = if volatile { "write back" } else { "write through" };
    std::fs::write(&path, wanted)?;
    match sysfs::attribute(&path) {
        Some(now) if now == wanted => Ok(()),
        now => Err(io::Error::other(format!(
            "{} says {now:?} after {wanted:?} was written",
            path.display()
        ))),
    }
}

/// Clears a device that nobody has claimed (mounted, swap, device mapper). `EBUSY` otherwise.
pub(crate) fn clear(number: u32) -> io::Result<()> {
    ioctl(open(number, OFlags::RDONLY | OFlags::EXCL)?.as_fd(), LOOP_CLR_FD, 0).map(drop)
}

/// Clears a device now or, while it is in use, when it is closed.
pub(crate) fn clear_when_closed(number: u32) -> io::Result<()> {
    ioctl(open(number, OFlags::RDONLY)?.as_fd(), LOOP_CLR_FD, 0).map(drop)
}

/// Takes back the clearing of a device that somebody still has open.
pub(crate) fn keep(number: u32) -> io::Result<()> {
    let device = open(number, OFlags::RDONLY)?;
    let mut info = EMPTY_INFO;
    ioctl_struct(device.as_fd(), LOOP_GET_STATUS64, &mut info)?;
    info.flags &= !LO_FLAGS_AUTOCLEAR;
    ioctl_struct(device.as_fd(), LOOP_SET_STATUS64, &mut info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_sizes_of_the_kernel() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
