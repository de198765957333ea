//! Messages of the FUSE protocol (7.x) as bytes: all numbers in native order.
//!
//! Invariant: parsing never reads behind the message the kernel delivered, and an operation that is not known is
//! answered with ENOSYS, which tells the kernel never to ask again.

use rustix::fd::BorrowedFd;
use std::io;

/// Size of the header of each request (bytes).
pub(super) const IN_HEADER_BYTES: usize = 40;
/// Size of the fixed part of a WRITE after the header (bytes).
pub(super) const WRITE_IN_BYTES: usize = 40;
/// Size of the header of each answer (bytes).
const OUT_HEADER_BYTES: usize = 16;
/// Largest payload of one request (bytes).
pub(super) const MAX_IO_BYTES: u32 = 1 << 20;
/// What a read of /dev/fuse must offer: payload and headers.
pub(crate) const BUFFER_BYTES: usize = MAX_IO_BYTES as usize + 8192;
/// Inode number of the root directory, given by the protocol.
pub(super) const ROOT_INODE: u64 = 1;
/// Inode number of the volume file.
pub(super) const VOLUME_INODE: u64 = 2;
/// How long names and attributes stay valid (seconds): nobody but us changes them, and we say when.
const CACHE_SECONDS: u64 = 1 << 30;
/// Block size shown by statfs; the loop driver takes its discard granularity from it.
const BLOCK_BYTES: u32 = 4096;

/// Open flags of an answer: no page cache below the loop device, and no lock between writes.
const FOPEN_DIRECT_IO: u32 = 1 << 0;
const FOPEN_NOFLUSH: u32 = 1 << 5;
const FOPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const NOTIFY_RESEND: i32 = 7;

/// One request: what it asks for, and how to answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    pub(super) unique: u64,
    pub(super) inode: u64,
    pub(super) op: Op<'a>,
}

/// The operations we know.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Op<'a> {
    Init {
        flags: u64,
        minor: u32,
        readahead: u32,
    },
    Lookup {
        name: &'a [u8],
    },
    Attributes,
    Open,
    Read {
        offset: u64,
        len: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
    },
    Fsync,
    Allocate {
        offset: u64,
        len: u64,
        mode: u32,
    },
    StatFs,
    /// Needs an empty answer.
    Release,
    /// Needs no answer.
    Silent,
    Unknown,
}

/// A message shorter than its operation says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kernel sent a FUSE request of {0} bytes, which is too short for its operation")]
pub(super) struct Truncated(usize);

struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (first, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*first)
    }
    fn u32(&mut self) -> Option<u32> {
        self.bytes().map(u32::from_ne_bytes)
    }
    fn u64(&mut self) -> Option<u64> {
        self.bytes().map(u64::from_ne_bytes)
    }
    fn rest(self) -> &'a [u8] {
        self.0
    }
}

/// Parses what one read of /dev/fuse returned.
pub(super) fn parse(message: &[u8]) -> Result<Request<'_>, Truncated> {
    let truncated = Truncated(message.len());
    let mut fields = Fields(message);
    let mut header = || {
        let _len = fields.u32()?;
        let opcode = fields.u32()?;
        let unique = fields.u64()?;
        let inode = fields.u64()?;
        Some((opcode, unique, inode))
    };
    let (opcode, unique, inode) = header().ok_or(truncated)?;
    let body = message.get(IN_HEADER_BYTES..).ok_or(truncated)?;
    let op = parse_op(opcode, body).ok_or(truncated)?;
    Ok(Request { unique, inode, op })
}

fn parse_op(opcode: u32, body: &[u8]) -> Option<Op<'_>> {
    let mut fields = Fields(body);
    Some(match opcode {
        1 => Op::Lookup {
            name: body.strip_suffix(b"\0")?,
        },
        // FORGET, INTERRUPT (everything we do ends soon anyway), BATCH_FORGET
        2 | 36 | 42 => Op::Silent,
        // GETATTR, SETATTR (nobody can change anything; shown as it is)
        3 | 4 => Op::Attributes,
        // OPEN, OPENDIR
        14 | 27 => Op::Open,
        15 => {
            let _handle = fields.u64()?;
            Op::Read {
                offset: fields.u64()?,
                len: fields.u32()?,
            }
        }
        16 => {
            let _handle = fields.u64()?;
            let (offset, len) = (fields.u64()?, fields.u32()?);
            let data = body.get(WRITE_IN_BYTES..)?.get(..usize::try_from(len).ok()?)?;
            Op::Write { offset, data }
        }
        17 => Op::StatFs,
        // RELEASE, RELEASEDIR, DESTROY
        18 | 29 | 38 => Op::Release,
        // FSYNC, SYNCFS
        20 | 50 => Op::Fsync,
        26 => {
            let _major = fields.u32()?;
            let (minor, readahead, low) = (fields.u32()?, fields.u32()?, fields.u32()?);
            let high = fields.u32().unwrap_or(0);
            Op::Init {
                flags: u64::from(low) | u64::from(high) << 32,
                minor,
                readahead,
            }
        }
        43 => {
            let _handle = fields.u64()?;
            let (offset, len) = (fields.u64()?, fields.u64()?);
            let mode = Fields(fields.rest()).u32()?;
            Op::Allocate { offset, len, mode }
        }
        _ => Op::Unknown,
    })
}

/// Writes one answer, put together in `buffer`; the request may have been given up meanwhile, which is no error.
pub(super) fn answer(fuse: BorrowedFd<'_>, buffer: &mut [u8], unique: u64, errno: i32, body: &[u8]) -> io::Result<()> {
    let len = OUT_HEADER_BYTES + body.len();
    buffer[..OUT_HEADER_BYTES].copy_from_slice(&header(len, -errno, unique));
    buffer[OUT_HEADER_BYTES..len].copy_from_slice(body);
    match rustix::io::write(fuse, &buffer[..len]) {
        Ok(_) | Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn header(len: usize, code: i32, unique: u64) -> [u8; OUT_HEADER_BYTES] {
    let len = u32::try_from(len).expect("an answer is at most one payload and a header");
    let mut bytes = [0; OUT_HEADER_BYTES];
    bytes[..4].copy_from_slice(&len.to_ne_bytes());
    bytes[4..8].copy_from_slice(&code.to_ne_bytes());
    bytes[8..].copy_from_slice(&unique.to_ne_bytes());
    bytes
}

/// Asks the kernel to queue again what a dead process had taken and not answered.
pub(super) fn resend(fuse: BorrowedFd<'_>) -> io::Result<()> {
    rustix::io::write(fuse, &header(OUT_HEADER_BYTES, NOTIFY_RESEND, 0))?;
    Ok(())
}

/// Collects the fields of an answer.
#[derive(Default)]
pub(super) struct Body(Vec<u8>);

impl Body {
    pub(super) fn u16(mut self, value: u16) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    pub(super) fn u32(mut self, value: u32) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    pub(super) fn u64(mut self, value: u64) -> Self {
        self.0.extend_from_slice(&value.to_ne_bytes());
        self
    }
    pub(super) fn zeros(mut self, count: usize) -> Self {
        self.0.resize(self.0.len() + count, 0);
        self
    }
    pub(super) fn bytes(self) -> Vec<u8> {
        self.0
    }

    fn attributes(self, inode: u64, size_bytes: u64) -> Self {
        const VOLUME_MODE: u32 = 0o100_600;
        const ROOT_MODE: u32 = 0o040_700;
        let mode = if inode == VOLUME_INODE { VOLUME_MODE } else { ROOT_MODE };
        // times 0: they are not the device's, and would change over restarts
        let sized = self
            .u64(inode)
            .u64(size_bytes)
            .u64(size_bytes / 512)
            .zeros(3 * 8 + 3 * 4);
        sized.u32(mode).u32(1).u32(0).u32(0).u32(0).u32(BLOCK_BYTES).u32(0)
    }
}

fn size_of(inode: u64, volume_bytes: u64) -> u64 {
    if inode == VOLUME_INODE { volume_bytes } else { 0 }
}

/// Answer to LOOKUP of the volume file.
pub(super) fn entry(volume_bytes: u64) -> Vec<u8> {
    let times = Body::default()
        .u64(VOLUME_INODE)
        .u64(0)
        .u64(CACHE_SECONDS)
        .u64(CACHE_SECONDS)
        .u32(0)
        .u32(0);
    times.attributes(VOLUME_INODE, volume_bytes).bytes()
}

/// Answer to GETATTR. The size may change at any time, so it is asked for each time.
pub(super) fn attributes(inode: u64, volume_bytes: u64) -> Vec<u8> {
    Body::default()
        .u64(0)
        .u32(0)
        .u32(0)
        .attributes(inode, size_of(inode, volume_bytes))
        .bytes()
}

/// Answer to OPEN: one handle, the same for ever.
pub(super) fn opened() -> Vec<u8> {
    Body::default()
        .u64(1)
        .u32(FOPEN_DIRECT_IO | FOPEN_NOFLUSH | FOPEN_PARALLEL_DIRECT_WRITES)
        .u32(0)
        .bytes()
}

/// Answer to WRITE.
pub(super) fn written(len: u32) -> Vec<u8> {
    Body::default().u32(len).u32(0).bytes()
}

/// Answer to STATFS.
pub(super) fn file_system(volume_bytes: u64) -> Vec<u8> {
    let blocks = volume_bytes / u64::from(BLOCK_BYTES);
    let counts = Body::default().u64(blocks).u64(0).u64(0).u64(1).u64(0);
    counts
        .u32(BLOCK_BYTES)
        .u32(255)
        .u32(BLOCK_BYTES)
        .u32(0)
        .zeros(24)
        .bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn message(opcode: u32, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(IN_HEADER_BYTES + body.len()).unwrap();
        let header = Body::default()
            .u32(len)
            .u32(opcode)
            .u64(77)
            .u64(VOLUME_INODE)
            .zeros(16)
            .bytes();
        [header, body.to_vec()].concat()
    }

    #[test]
    fn a_write_carries_its_data_and_a_cut_one_is_refused() {
        let fixed = Body::default().u64(1).u64(4096).u32(4).zeros(20).bytes();
        let whole = message(16, &[fixed.clone(), b"data".to_vec()].concat());
        let request = parse(&whole).unwrap();
        assert_eq!(request.unique, 77);
        assert_eq!(
            request.op,
            Op::Write {
                offset: 4096,
                data: b"data"
            }
        );
        for len in 0..whole.len() {
            assert!(parse(&whole[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn answers_have_the_sizes_the_kernel_demands() {
        assert_eq!(entry(4096).len(), 128);
        assert_eq!(attributes(VOLUME_INODE, 4096).len(), 104);
        assert_eq!(opened().len(), 16);
        assert_eq!(file_system(4096).len(), 80);
        assert_eq!(written(1).len(), 8);
    }

    proptest! {
        #[test]
        fn no_message_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), opcode in 0u32..60) {
            let _ = parse(&bytes);
            let _ = parse(&message(opcode, &bytes));
        }
    }
}
