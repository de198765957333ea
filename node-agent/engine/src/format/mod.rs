//! Bytes on disk: segment headers, batch headers and records. `docs/format.md` describes them with reasons.
//!
//! Invariant: nothing is believed before its checksum is verified, and nothing that this version does not know
//! completely is read at all.

pub mod batch;
pub mod record;
pub mod segment;

use crc_fast::{CrcAlgorithm, Digest};

/// The one version of the segment format that this code writes and reads.
pub const FORMAT_VERSION: u16 = 1;

/// Why bytes are not what they should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// All zero: nothing was ever written here.
    #[error("nothing was written here")]
    Zero,
    /// Another kind of data.
    #[error("this is something else (wrong magic number)")]
    Magic,
    /// The checksum does not match.
    #[error("checksum mismatch: the bytes are damaged")]
    Checksum,
    /// Written by a newer version.
    #[error(
        "format version {found} is newer than {FORMAT_VERSION}, the newest this program reads: start the newer program again"
    )]
    Newer {
        /// What was found.
        found: u16,
    },
    /// Correct checksum, impossible content.
    #[error("invalid field: {0}")]
    Field(&'static str),
}

/// CRC-32C over several parts, as if they were one.
#[must_use]
pub fn crc32c(parts: &[&[u8]]) -> u32 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    let [_, _, _, _, a, b, c, d] = digest.finalize().to_be_bytes();
    u32::from_be_bytes([a, b, c, d])
}

/// `N` bytes at `at`; the callers pass fixed layouts.
fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().expect("the range has N bytes")
}

fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

fn get_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

fn get_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}
