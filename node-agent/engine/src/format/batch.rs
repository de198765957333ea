//! The header of a batch: what one group commit begins with, at a block boundary.
//!
//! It says where in the history the batch begins, so that whatever else may stand at this place in the file (zeros, left-overs, a
//! payload that looks like log) is told apart from the continuation of this very log.

use super::{FormatError, array, crc32c, get_u32, get_u64, is_zero, put};
use crate::api::Compression;
use crate::store::SegmentName;
use crate::types::{BLOCK_BYTES, Chain, EpochId, Lsn, Position};
use uuid::Uuid;

/// Serialized size (bytes).
pub const BATCH_HEADER_BYTES: usize = 128;
const MAGIC: &[u8; 4] = b"MBAT";
const CRC_AT: usize = BATCH_HEADER_BYTES - 4;

/// The header of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// The segment it stands in.
    pub segment: SegmentName,
    /// Where it stands (file offset in bytes, a multiple of 4,096).
    pub file_offset: u64,
    /// Epoch, LSN and chain before its first record.
    pub start: Position,
    /// Sequence number of its first record.
    pub first_sequence: u64,
    /// End of the durable log when the batch was begun.
    pub durable: Lsn,
    /// How payloads of this batch may be compressed.
    pub compression: Compression,
}

/// Number on disk.
fn compression_number(compression: Compression) -> u8 {
    match compression {
        Compression::None => 0,
        Compression::Lz4 => 1,
        Compression::Zstd => 2,
    }
}

impl BatchHeader {
    /// The bytes, and their checksum, which seeds the checksums of the records. `segment_crc` is the checksum of the
    /// segment header.
    #[must_use]
    pub fn encode(&self, segment_crc: u32) -> ([u8; BATCH_HEADER_BYTES], u32) {
        let mut bytes = [0; BATCH_HEADER_BYTES];
        put(&mut bytes, 0, MAGIC);
        bytes[4] = compression_number(self.compression);
        put(&mut bytes, 8, &self.segment.number.to_le_bytes());
        put(&mut bytes, 12, &self.segment.origin.to_le_bytes());
        put(&mut bytes, 16, &(self.file_offset / BLOCK_BYTES).to_le_bytes());
        put(&mut bytes, 24, &self.start.lsn.0.to_le_bytes());
        put(&mut bytes, 32, &self.first_sequence.to_le_bytes());
        put(&mut bytes, 40, &self.durable.0.to_le_bytes());
        put(&mut bytes, 48, self.start.epoch.0.as_bytes());
        put(&mut bytes, 64, &self.start.chain.0);
        let crc = crc32c(&[&segment_crc.to_le_bytes(), &bytes[..CRC_AT]]);
        put(&mut bytes, CRC_AT, &crc.to_le_bytes());
        (bytes, crc)
    }

    /// Reads a header, and its checksum. What it says is still to be compared with what is expected at this place.
    ///
    /// # Errors
    /// [`FormatError::Zero`] when nothing was written; else what is wrong.
    pub fn decode(bytes: &[u8], segment_crc: u32) -> Result<(Self, u32), FormatError> {
        let bytes = &bytes[..BATCH_HEADER_BYTES];
        if &bytes[..4] != MAGIC {
            return Err(if is_zero(bytes) {
                FormatError::Zero
            } else {
                FormatError::Magic
            });
        }
        let crc = get_u32(bytes, CRC_AT);
        if crc != crc32c(&[&segment_crc.to_le_bytes(), &bytes[..CRC_AT]]) {
            return Err(FormatError::Checksum);
        }
        let compression = match bytes[4] {
            0 => Compression::None,
            1 => Compression::Lz4,
            2 => Compression::Zstd,
            _ => return Err(FormatError::Field("compression")),
        };
        if !is_zero(&bytes[5..8]) || !is_zero(&bytes[96..CRC_AT]) {
            return Err(FormatError::Field("reserved bytes"));
        }
        let header = Self {
            segment: SegmentName {
                number: get_u32(bytes, 8),
                origin: get_u32(bytes, 12),
            },
            file_offset: get_u64(bytes, 16).saturating_mul(BLOCK_BYTES),
            start: Position {
                epoch: EpochId(Uuid::from_bytes(array(bytes, 48))),
                lsn: Lsn(get_u64(bytes, 24)),
                chain: Chain(array(bytes, 64)),
            },
            first_sequence: get_u64(bytes, 32),
            durable: Lsn(get_u64(bytes, 40)),
            compression,
        };
        Ok((header, crc))
    }

    /// The segment that a batch claims to belong to, checksum or not: tells left-overs of a recycled file from damage.
    #[must_use]
    pub fn claimed_segment(bytes: &[u8]) -> SegmentName {
        SegmentName {
            number: get_u32(bytes, 8),
            origin: get_u32(bytes, 12),
        }
    }
}
