//! The first block of a segment: whose log this is, where its content begins, and the epoch that wrote it.
//!
//! The header fills one sector, so that it is there as a whole or not at all. Its first 16 bytes and the place of its checksum are
//! the same in all versions: damage and a newer version can always be told apart.

use super::{FORMAT_VERSION, FormatError, array, crc32c, get_u16, get_u32, get_u64, is_zero, put};
use crate::lineage::{Cause, EpochEntry};
use crate::store::SegmentName;
use crate::types::{BLOCK_BYTES, Chain, ClusterId, EpochId, Lamport, Lsn, Position, ReplicaId, ResourceId};
use uuid::Uuid;

/// Serialized size: one sector (bytes).
pub const SEGMENT_HEADER_BYTES: usize = 512;
/// Where the first batch begins (bytes).
pub const FIRST_BATCH_OFFSET: u64 = BLOCK_BYTES;
const MAGIC: &[u8; 8] = b"MARSSEGM";
const CRC_AT: usize = SEGMENT_HEADER_BYTES - 4;
/// Stands for "not known": a sync target learns the sequence from the first record.
const UNKNOWN_SEQUENCE: u64 = u64::MAX;

/// Whose log it is; the same in every segment of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogIdentity {
    /// The cluster.
    pub cluster: ClusterId,
    /// The resource.
    pub resource: ResourceId,
    /// The incarnation that holds this log.
    pub replica: ReplicaId,
}

impl LogIdentity {
    /// The `origin` part of the names of its segments.
    #[must_use]
    pub fn origin(&self) -> u32 {
        self.replica.0.as_fields().0
    }
}

/// The header of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Whose log it is.
    pub identity: LogIdentity,
    /// Number and origin, as in the file name.
    pub name: SegmentName,
    /// Number of the segment whose content ends where this one begins; 0 for the first of a log.
    pub previous: u32,
    /// Byte position where the content begins.
    pub start_lsn: Lsn,
    /// Chain hash there.
    pub start_chain: Chain,
    /// Sequence number of the first record; `None` while a sync target does not know it.
    pub first_sequence: Option<u64>,
    /// End of the durable log when this was written.
    pub durable: Lsn,
    /// When the segment was begun.
    pub lamport: Lamport,
    /// The epoch of all its records.
    pub epoch: EpochEntry,
}

impl SegmentHeader {
    /// Where the content begins.
    #[must_use]
    pub fn start(&self) -> Position {
        Position {
            epoch: self.epoch.id,
            lsn: self.start_lsn,
            chain: self.start_chain,
        }
    }

    /// The bytes, and their checksum, which seeds the checksums of the batches.
    #[must_use]
    pub fn encode(&self) -> ([u8; SEGMENT_HEADER_BYTES], u32) {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        put(&mut bytes, 0, MAGIC);
        put(&mut bytes, 8, &FORMAT_VERSION.to_le_bytes());
        put(&mut bytes, 16, self.identity.cluster.0.as_bytes());
        put(&mut bytes, 32, self.identity.resource.0.as_bytes());
        put(&mut bytes, 48, self.identity.replica.0.as_bytes());
        put(&mut bytes, 64, &self.name.number.to_le_bytes());
        put(&mut bytes, 68, &self.name.origin.to_le_bytes());
        put(&mut bytes, 72, &self.previous.to_le_bytes());
        put(&mut bytes, 80, &self.start_lsn.0.to_le_bytes());
        put(&mut bytes, 88, &self.start_chain.0);
        put(
            &mut bytes,
            120,
            &self.first_sequence.unwrap_or(UNKNOWN_SEQUENCE).to_le_bytes(),
        );
        put(&mut bytes, 128, &self.durable.0.to_le_bytes());
        put(&mut bytes, 136, &self.lamport.0.to_le_bytes());
        put(&mut bytes, 144, self.epoch.id.0.as_bytes());
        put(&mut bytes, 160, self.epoch.origin.0.as_bytes());
        put(&mut bytes, 176, &self.epoch.lamport.0.to_le_bytes());
        put(&mut bytes, 184, self.epoch.parent.epoch.0.as_bytes());
        put(&mut bytes, 200, &self.epoch.parent.lsn.0.to_le_bytes());
        put(&mut bytes, 208, &self.epoch.parent.chain.0);
        bytes[240] = self.epoch.cause as u8;
        let crc = crc32c(&[&bytes[..CRC_AT]]);
        put(&mut bytes, CRC_AT, &crc.to_le_bytes());
        (bytes, crc)
    }

    /// Reads a header, and its checksum.
    ///
    /// # Errors
    /// [`FormatError::Zero`] for an unused segment; else what is wrong.
    pub fn decode(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Result<(Self, u32), FormatError> {
        if is_zero(bytes) {
            return Err(FormatError::Zero);
        }
        if &bytes[..8] != MAGIC {
            return Err(FormatError::Magic);
        }
        let crc = get_u32(bytes, CRC_AT);
        if crc != crc32c(&[&bytes[..CRC_AT]]) {
            return Err(FormatError::Checksum);
        }
        let version = get_u16(bytes, 8);
        if version > FORMAT_VERSION {
            return Err(FormatError::Newer { found: version });
        }
        if version == 0 || !is_zero(&bytes[10..16]) || !is_zero(&bytes[76..80]) {
            return Err(FormatError::Field("version or reserved bytes"));
        }
        if !is_zero(&bytes[241..CRC_AT]) {
            return Err(FormatError::Field("reserved bytes"));
        }
        let uuid = |at| Uuid::from_bytes(array(bytes, at));
        let sequence = get_u64(bytes, 120);
        let header = Self {
            identity: LogIdentity {
                cluster: ClusterId(uuid(16)),
                resource: ResourceId(uuid(32)),
                replica: ReplicaId(uuid(48)),
            },
            name: SegmentName {
                number: get_u32(bytes, 64),
                origin: get_u32(bytes, 68),
            },
            previous: get_u32(bytes, 72),
            start_lsn: Lsn(get_u64(bytes, 80)),
            start_chain: Chain(array(bytes, 88)),
            first_sequence: (sequence != UNKNOWN_SEQUENCE).then_some(sequence),
            durable: Lsn(get_u64(bytes, 128)),
            lamport: Lamport(get_u64(bytes, 136)),
            epoch: EpochEntry {
                id: EpochId(uuid(144)),
                origin: ReplicaId(uuid(160)),
                lamport: Lamport(get_u64(bytes, 176)),
                parent: Position {
                    epoch: EpochId(uuid(184)),
                    lsn: Lsn(get_u64(bytes, 200)),
                    chain: Chain(array(bytes, 208)),
                },
                cause: Cause::from_number(bytes[240]).ok_or(FormatError::Field("cause of the epoch"))?,
            },
        };
        if header.start_lsn < header.epoch.parent.lsn {
            return Err(FormatError::Field("it starts before its epoch"));
        }
        Ok((header, crc))
    }
}
