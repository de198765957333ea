//! One record: a header of 40 bytes and, for kinds that carry one, a payload.
//!
//! Invariant: what a record does to a device is a function of its header and uncompressed payload alone.

use super::{FormatError, array, crc32c, get_u32, get_u64, is_zero, put};
use crate::chain;
use crate::types::{Chain, EpochId, Lamport, MAX_PAYLOAD_BYTES, RECORD_HEADER_BYTES};
use bytes::Bytes;

/// Serialized size of a record header (bytes).
pub const HEADER_LEN: usize = 40;
const _: () = assert!(HEADER_LEN as u64 == RECORD_HEADER_BYTES);
/// Sequence numbers have 48 bits on disk.
pub const MAX_SEQUENCE: u64 = (1 << 48) - 1;
/// The flags that this version knows.
const KNOWN_FLAGS: u8 = 1;
const STORED_AT: usize = 32;
const CRC_AT: usize = 36;

/// What a record does. Numbers are on disk and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RecordKind {
    /// `payload` at `offset`.
    Write = 1,
    /// `len` bytes at `offset` read as zeros; no payload.
    Discard = 2,
    /// `len` bytes at `offset` read as zeros; no payload.
    WriteZeroes = 3,
    /// The device has `offset` bytes from here on; no payload.
    Resize = 4,
    /// A named point; the payload is its name.
    Marker = 5,
    /// The primary closed; the payload is a serialized `Close`.
    Close = 6,
    /// Logging stopped after this point: a hole follows (emergency mode).
    EmergencyEnter = 7,
    /// A resolve decision for a split brain; the payload names it.
    Resolve = 8,
}

impl RecordKind {
    /// The kind with this number, if this version knows it.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::Discard,
            3 => Self::WriteZeroes,
            4 => Self::Resize,
            5 => Self::Marker,
            6 => Self::Close,
            7 => Self::EmergencyEnter,
            8 => Self::Resolve,
            _ => return None,
        })
    }

    /// Whether records of this kind carry `len` bytes of payload.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Self::Write | Self::Marker | Self::Close | Self::Resolve)
    }
}

/// The fixed part of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecordHeader {
    /// What it does.
    pub kind: RecordKind,
    /// Bit 0: the write was FUA. Others are zero.
    pub flags: u8,
    /// Device offset (bytes), or the new size of a resize.
    pub offset: u64,
    /// Payload length, or the length of the affected range (bytes).
    pub len: u64,
    /// Counts records within an epoch, from 0.
    pub sequence: u64,
    /// When it was submitted.
    pub lamport: Lamport,
}

/// A record in memory; the payload is uncompressed and shared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// The fixed part.
    pub header: RecordHeader,
    /// Empty for kinds without payload.
    pub payload: Bytes,
}

impl Record {
    /// The chain hash after this record of `epoch`, given the one before it. Depends on nothing local: not on compression,
    /// batches or segments.
    #[must_use]
    pub fn chain_after(&self, before: Chain, epoch: EpochId) -> Chain {
        chain::advance(before, epoch, &self.header, &self.payload)
    }

    /// By how much this record advances the LSN (bytes).
    #[must_use]
    pub fn lsn_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES + self.payload.len() as u64
    }
}

impl RecordHeader {
    /// Length of the uncompressed payload (bytes).
    #[must_use]
    pub fn payload_len(&self) -> u64 {
        if self.kind.has_payload() { self.len } else { 0 }
    }

    /// What holds for every record, whatever wrote it.
    ///
    /// # Errors
    /// [`FormatError::Field`] naming what no writer writes.
    pub fn check(&self) -> Result<(), FormatError> {
        if self.flags & !KNOWN_FLAGS != 0 {
            return Err(FormatError::Field("flags"));
        }
        if self.sequence > MAX_SEQUENCE {
            return Err(FormatError::Field("sequence number"));
        }
        if self.payload_len() > MAX_PAYLOAD_BYTES {
            return Err(FormatError::Field("length of the payload"));
        }
        if self.offset.checked_add(self.len).is_none() {
            return Err(FormatError::Field("range on the device"));
        }
        Ok(())
    }

    /// The bytes in the log. `stored` is the payload as stored; `batch_crc` the checksum of the batch header.
    ///
    /// # Panics
    /// When a limit of the format is exceeded: [`RecordHeader::check`] was not called.
    #[must_use]
    pub fn encode(&self, stored: &[u8], batch_crc: u32) -> [u8; HEADER_LEN] {
        assert!(self.sequence <= MAX_SEQUENCE, "an epoch has fewer than 2^48 records");
        let stored_len = u32::try_from(stored.len()).expect("a payload is at most 1 MiB");
        let mut bytes = [0; HEADER_LEN];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags;
        put(&mut bytes, 2, &self.sequence.to_le_bytes()[..6]);
        put(&mut bytes, 8, &self.offset.to_le_bytes());
        put(&mut bytes, 16, &self.len.to_le_bytes());
        put(&mut bytes, 24, &self.lamport.0.to_le_bytes());
        put(&mut bytes, STORED_AT, &stored_len.to_le_bytes());
        let crc = crc32c(&[&batch_crc.to_le_bytes(), &bytes[..CRC_AT], stored]);
        put(&mut bytes, CRC_AT, &crc.to_le_bytes());
        bytes
    }
}

/// A record header as read: plausible, but the checksum is still to be verified together with the stored payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawHeader {
    /// What the header says.
    pub header: RecordHeader,
    /// Length of the payload as stored (bytes); less than uncompressed when it is compressed.
    pub stored_len: usize,
    fixed: [u8; CRC_AT],
    crc: u32,
}

impl RawHeader {
    /// Reads a header without its checksum.
    ///
    /// # Errors
    /// [`FormatError::Zero`] when nothing was written; [`FormatError::Field`] for what no writer writes.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        let bytes = &bytes[..HEADER_LEN];
        if is_zero(bytes) {
            return Err(FormatError::Zero);
        }
        let header = RecordHeader {
            kind: RecordKind::from_number(bytes[0]).ok_or(FormatError::Field("kind"))?,
            flags: bytes[1],
            sequence: get_u64(bytes, 0) >> 16,
            offset: get_u64(bytes, 8),
            len: get_u64(bytes, 16),
            lamport: Lamport(get_u64(bytes, 24)),
        };
        header.check()?;
        let stored = get_u32(bytes, STORED_AT);
        if u64::from(stored) > header.payload_len() || (stored == 0) != (header.payload_len() == 0) {
            return Err(FormatError::Field("stored length"));
        }
        let stored_len = usize::try_from(stored).map_err(|_| FormatError::Field("stored length"))?;
        Ok(Self {
            header,
            stored_len,
            fixed: array(bytes, 0),
            crc: get_u32(bytes, CRC_AT),
        })
    }

    /// Whether header and stored payload are what was written into this batch.
    #[must_use]
    pub fn is_intact(&self, stored: &[u8], batch_crc: u32) -> bool {
        self.crc == crc32c(&[&batch_crc.to_le_bytes(), &self.fixed, stored])
    }
}
