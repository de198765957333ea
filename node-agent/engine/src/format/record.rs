//! One record: a header of 40 bytes and, for kinds that carry one, a payload.
//!
//! Invariant: what a record does to a device is a function of its header and uncompressed payload alone.

use crate::types::{Chain, EpochId, Lamport, RECORD_HEADER_BYTES};
use bytes::Bytes;

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
        let header = &self.header;
        let mut fixed = [0u8; 34];
        fixed[0] = header.kind as u8;
        fixed[1] = header.flags;
        fixed[2..10].copy_from_slice(&header.offset.to_le_bytes());
        fixed[10..18].copy_from_slice(&header.len.to_le_bytes());
        fixed[18..26].copy_from_slice(&header.sequence.to_le_bytes());
        fixed[26..34].copy_from_slice(&header.lamport.0.to_le_bytes());
        let mut hasher = blake3::Hasher::new();
        hasher.update(&before.0);
        hasher.update(epoch.0.as_bytes());
        hasher.update(&fixed);
        hasher.update(blake3::hash(&self.payload).as_bytes());
        Chain(*hasher.finalize().as_bytes())
    }

    /// By how much this record advances the LSN (bytes).
    #[must_use]
    pub fn lsn_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES + self.payload.len() as u64
    }
}
