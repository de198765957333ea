//! Serves the volume file of one device: requests from /dev/fuse become block requests of the owner and back.
//!
//! Invariants: a request is answered once, and only after the owner said so; requests are answered in any order. What
//! the owner has not answered is bounded by number and by bytes: beyond that requests stay in the kernel.

use super::wire::{self, Op, Request};
use crate::frontend::resident::Buffers;
use crate::shard::host::{Received, Source};
use mars_engine::api::{Io, IoResult, Submitted};
use mars_engine::types::{ByteRange, SECTOR_BYTES};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tracing::{debug, error};

/// Requests taken in one turn, so that one device cannot keep the thread from the others.
const TURN_REQUESTS: usize = 32;
/// Most requests the owner may have unanswered.
const MAX_IN_FLIGHT: usize = 256;
/// Most bytes of writes the owner may have unanswered; it holds copies of them.
const MAX_WRITE_BYTES: u64 = 16 << 20;

const FALLOC_KEEP_SIZE: u32 = 1;
const FALLOC_PUNCH_HOLE: u32 = 2;
const FALLOC_ZERO_RANGE: u32 = 0x10;

/// See the module.
pub(crate) struct FuseServer {
    fuse: OwnedFd,
    /// Name of the volume file.
    file_name: Vec<u8>,
    /// Shared with the frontend, which changes it before the loop device asks for it.
    size_bytes: Arc<AtomicU64>,
    in_flight: HashMap<u64, Pending>,
    write_bytes: u64,
}

/// A request that the owner has.
struct Pending {
    unique: u64,
    /// Length of a write (bytes), for its answer.
    written: Option<u32>,
}

impl FuseServer {
    pub(crate) fn new(fuse: OwnedFd, file_name: String, size_bytes: Arc<AtomicU64>) -> Self {
        let file_name = file_name.into_bytes();
        Self {
            fuse,
            file_name,
            size_bytes,
            in_flight: HashMap::new(),
            write_bytes: 0,
        }
    }

    /// Has the kernel queue again what a dead agent left unanswered. Only after that agent is gone entirely: work of it
    /// that still lands could overwrite newer data.
    pub(crate) fn take_over(&self) -> io::Result<()> {
        wire::resend(self.fuse.as_fd())
    }

    fn handle(&mut self, request: &Request<'_>, buffer: &mut [u8], submit: &mut dyn FnMut(Io<'_>) -> (u64, Submitted)) {
        let Request { unique, inode, op } = request;
        let size = self.size_bytes.load(Ordering::Acquire);
        match *op {
            Op::Read { .. } | Op::Write { .. } | Op::Fsync | Op::Allocate { .. } => match block_request(op, size) {
                Ok(io) => {
                    let written = match op {
                        Op::Write { data, .. } => u32::try_from(data.len()).ok(),
                        _ => None,
                    };
                    self.submit(
                        Pending {
                            unique: *unique,
                            written,
                        },
                        io,
                        buffer,
                        submit,
                    );
                }
                Err(errno) => self.answer(buffer, *unique, errno, &[]),
            },
            Op::Lookup { name } if *inode == wire::ROOT_INODE && name == self.file_name => {
                self.answer(buffer, *unique, 0, &wire::entry(size));
            }
            Op::Lookup { .. } => self.answer(buffer, *unique, libc::ENOENT, &[]),
            Op::Attributes => self.answer(buffer, *unique, 0, &wire::attributes(*inode, size)),
            Op::Open => self.answer(buffer, *unique, 0, &wire::opened()),
            Op::StatFs => self.answer(buffer, *unique, 0, &wire::file_system(size)),
            Op::Release => self.answer(buffer, *unique, 0, &[]),
            Op::Silent => {}
            // INIT was answered when the connection was made; a second one is not in the protocol.
            Op::Init { .. } | Op::Unknown => self.answer(buffer, *unique, libc::ENOSYS, &[]),
        }
    }

    fn submit(
        &mut self,
        pending: Pending,
        io: Io<'_>,
        buffer: &mut [u8],
        submit: &mut dyn FnMut(Io<'_>) -> (u64, Submitted),
    ) {
        match submit(io) {
            (_, Submitted::Now(result)) => self.finish(buffer, &pending, &result),
            (tag, Submitted::Later) => {
                self.write_bytes += pending.written.map_or(0, u64::from);
                self.in_flight.insert(tag, pending);
            }
        }
    }

    fn finish(&self, buffer: &mut [u8], pending: &Pending, result: &IoResult) {
        match (result, pending.written) {
            (IoResult::Data(data), _) => self.answer(buffer, pending.unique, 0, data),
            (IoResult::Done, Some(len)) => self.answer(buffer, pending.unique, 0, &wire::written(len)),
            (IoResult::Done, None) => self.answer(buffer, pending.unique, 0, &[]),
            (IoResult::Errno(errno), _) => self.answer(buffer, pending.unique, *errno, &[]),
        }
    }

    fn answer(&self, buffer: &mut [u8], unique: u64, errno: i32, body: &[u8]) {
        if let Err(error) = wire::answer(self.fuse.as_fd(), buffer, unique, errno, body)
            && error.raw_os_error() != Some(libc::ENODEV)
        {
            // EINVAL here means that the answer was malformed: the request would hang, so it must be seen.
            error!(unique, errno, %error, "cannot answer a request of the device");
        }
    }
}

/// What a file operation means for the device.
fn block_request<'a>(op: &Op<'a>, size_bytes: u64) -> Result<Io<'a>, i32> {
    let range = |offset: u64, len: u64| {
        let aligned = offset.is_multiple_of(SECTOR_BYTES) && len.is_multiple_of(SECTOR_BYTES) && len > 0;
        let inside = offset.checked_add(len).is_some_and(|end| end <= size_bytes);
        if aligned && inside {
            Ok(ByteRange { offset, len })
        } else {
            Err(libc::EINVAL)
        }
    };
    match *op {
        Op::Read { offset, len } => Ok(Io::Read {
            range: range(offset, len.into())?,
        }),
        Op::Write { offset, data } => {
            range(offset, data.len() as u64)?;
            Ok(Io::Write {
                offset,
                data,
                fua: false,
            })
        }
        Op::Allocate { offset, len, mode } => {
            let range = range(offset, len)?;
            match mode & !FALLOC_KEEP_SIZE {
                // The loop driver sends a hole for a discard, and for zeroes that may be unmapped: zeros in any case.
                FALLOC_PUNCH_HOLE => Ok(Io::Discard { range }),
                FALLOC_ZERO_RANGE => Ok(Io::WriteZeroes { range, fua: false }),
                _ => Err(libc::EOPNOTSUPP),
            }
        }
        _ => Ok(Io::Flush),
    }
}

impl Source for FuseServer {
    fn descriptor(&self) -> BorrowedFd<'_> {
        self.fuse.as_fd()
    }

    fn accepts(&self) -> bool {
        self.in_flight.len() < MAX_IN_FLIGHT && self.write_bytes < MAX_WRITE_BYTES
    }

    fn receive(&mut self, buffers: &mut Buffers, submit: &mut dyn FnMut(Io<'_>) -> (u64, Submitted)) -> Received {
        let Buffers { request, answer } = buffers;
        for _ in 0..TURN_REQUESTS {
            if !self.accepts() {
                break;
            }
            match rustix::io::read(&self.fuse, &mut **request) {
                Ok(len) => match wire::parse(&request[..len]) {
                    Ok(request) => self.handle(&request, answer, submit),
                    Err(error) => error!(%error, "request of the device dropped"),
                },
                Err(rustix::io::Errno::AGAIN) => break,
                // Given up before we got it.
                Err(rustix::io::Errno::NOENT | rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::NODEV) => return Received::Ended,
                Err(errno) => {
                    error!(%errno, "cannot read requests of the device");
                    return Received::Ended;
                }
            }
        }
        Received::Some
    }

    fn complete(&mut self, buffers: &mut Buffers, tag: u64, result: IoResult) {
        let Some(pending) = self.in_flight.remove(&tag) else {
            debug!(tag, "an answer for a request of an earlier device");
            return;
        };
        self.write_bytes -= pending.written.map_or(0, u64::from);
        self.finish(&mut buffers.answer, &pending, &result);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_outside_the_device_or_off_the_sector_grid_are_refused() {
        let data = vec![0; 512];
        assert!(
            block_request(
                &Op::Write {
                    offset: 4096 - 512,
                    data: &data
                },
                4096
            )
            .is_ok()
        );
        for (offset, size) in [(4096, 4096), (1, 4096), (u64::MAX - 511, 4096)] {
            assert_eq!(
                block_request(&Op::Write { offset, data: &data }, size).unwrap_err(),
                libc::EINVAL
            );
        }
        assert_eq!(
            block_request(&Op::Read { offset: 0, len: 0 }, 4096).unwrap_err(),
            libc::EINVAL
        );
    }

    #[test]
    fn a37_holes_are_discards_and_zero_ranges_are_zeroes() {
        let ask = |mode| {
            block_request(
                &Op::Allocate {
                    offset: 0,
                    len: 4096,
                    mode,
                },
                4096,
            )
        };
        assert!(matches!(
            ask(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE),
            Ok(Io::Discard { .. })
        ));
        assert!(matches!(ask(FALLOC_ZERO_RANGE), Ok(Io::WriteZeroes { fua: false, .. })));
        assert_eq!(ask(0).unwrap_err(), libc::EOPNOTSUPP);
    }
}
