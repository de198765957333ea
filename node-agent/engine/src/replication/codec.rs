//! How records travel: packed headers and payloads in one buffer, little-endian, optionally compressed as a whole.
//!
//! Invariant: decoding never trusts a length: whatever bytes arrive, it returns records or an error, allocates no more
//! than the stated raw size (itself bounded), and reads nothing outside the buffer. What the records are worth is decided
//! by [`LogChunk::verify`](super::LogChunk::verify), not here.

use crate::api::Compression;
use crate::format::record::{Record, RecordHeader, RecordKind};
use crate::types::{Lamport, MAX_PAYLOAD_BYTES};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of a record header on the wire: kind, flags, offset, length, sequence, Lamport time, payload length.
pub const WIRE_HEADER_BYTES: usize = 1 + 1 + 8 + 8 + 8 + 8 + 4;
/// Largest buffer of packed records (bytes); a chunk is cut before it would exceed this.
pub const MAX_PACKED_BYTES: usize = 3 << 20;

/// Why a buffer holds no records.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// Ends within a record.
    #[error("packed records end within a record at byte {at}")]
    Truncated {
        /// Offset in the buffer (bytes).
        at: usize,
    },
    /// A kind that this version does not know.
    #[error("record kind {number} is unknown to this version: update this agent before the others")]
    UnknownKind {
        /// The number.
        number: u8,
    },
    /// More than any sender packs.
    #[error("{bytes} bytes are more than the {limit} that any sender packs")]
    TooLarge {
        /// What was stated.
        bytes: usize,
        /// What is allowed.
        limit: usize,
    },
    /// Cannot be decompressed to the stated size.
    #[error("compressed records do not decompress: {message}")]
    Decompress {
        /// What the decompressor said.
        message: String,
    },
}

/// Packed records, ready to travel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// How `bytes` are compressed.
    pub compression: Compression,
    /// Size before compression (bytes).
    pub raw_bytes: usize,
    /// The content.
    pub bytes: Bytes,
}

/// Packs records; compressed only where that is smaller.
///
/// # Panics
/// When a payload is larger than 4 GiB; a verified chunk never has one.
#[must_use]
pub fn pack(records: &[Record], compression: Compression) -> Packed {
    let raw_bytes = records
        .iter()
        .map(|record| WIRE_HEADER_BYTES + record.payload.len())
        .sum();
    let mut raw = BytesMut::with_capacity(raw_bytes);
    for Record { header, payload } in records {
        let payload_len = u32::try_from(payload.len()).expect("payloads are at most 1 MiB");
        raw.put_u8(header.kind as u8);
        raw.put_u8(header.flags);
        raw.put_u64_le(header.offset);
        raw.put_u64_le(header.len);
        raw.put_u64_le(header.sequence);
        raw.put_u64_le(header.lamport.0);
        raw.put_u32_le(payload_len);
        raw.put_slice(payload);
    }
    let raw = raw.freeze();
    match compress(&raw, compression) {
        Some(smaller) => Packed {
            compression,
            raw_bytes,
            bytes: smaller,
        },
        None => Packed {
            compression: Compression::None,
            raw_bytes,
            bytes: raw,
        },
    }
}

/// Unpacks records; payloads share the buffer.
///
/// # Errors
/// [`CodecError`] when the buffer does not hold exactly a sequence of records.
pub fn unpack(packed: &Packed) -> Result<Vec<Record>, CodecError> {
    let mut raw = decompress(packed.compression, packed.raw_bytes, &packed.bytes, MAX_PACKED_BYTES)?;
    let total = raw.len();
    let mut records = Vec::new();
    while raw.has_remaining() {
        let truncated = CodecError::Truncated { at: total - raw.len() };
        if raw.len() < WIRE_HEADER_BYTES {
            return Err(truncated);
        }
        let number = raw.get_u8();
        let kind = RecordKind::from_number(number).ok_or(CodecError::UnknownKind { number })?;
        let flags = raw.get_u8();
        let offset = raw.get_u64_le();
        let len = raw.get_u64_le();
        let sequence = raw.get_u64_le();
        let lamport = Lamport(raw.get_u64_le());
        let payload_len = raw.get_u32_le() as usize;
        if payload_len as u64 > MAX_PAYLOAD_BYTES || payload_len > raw.len() {
            return Err(truncated);
        }
        let payload = raw.split_to(payload_len);
        records.push(Record {
            header: RecordHeader {
                kind,
                flags,
                offset,
                len,
                sequence,
                lamport,
            },
            payload,
        });
    }
    Ok(records)
}

/// The compressed form, if it is smaller.
#[must_use]
pub fn compress(raw: &Bytes, compression: Compression) -> Option<Bytes> {
    let packed = match compression {
        Compression::None => return None,
        Compression::Lz4 => lz4_flex::block::compress(raw),
        Compression::Zstd => zstd::bulk::compress(raw, 1).ok()?,
    };
    (packed.len() < raw.len()).then(|| Bytes::from(packed))
}

/// Undoes [`compress`].
///
/// # Errors
/// [`CodecError::TooLarge`] or [`CodecError::Decompress`].
pub fn decompress(
    compression: Compression,
    raw_bytes: usize,
    bytes: &Bytes,
    limit: usize,
) -> Result<Bytes, CodecError> {
    if raw_bytes > limit {
        return Err(CodecError::TooLarge {
            bytes: raw_bytes,
            limit,
        });
    }
    let raw = match compression {
        Compression::None => bytes.clone(),
        Compression::Lz4 => {
            Bytes::from(
                lz4_flex::block::decompress(bytes, raw_bytes).map_err(|error| CodecError::Decompress {
                    message: error.to_string(),
                })?,
            )
        }
        Compression::Zstd => {
            Bytes::from(
                zstd::bulk::decompress(bytes, raw_bytes).map_err(|error| CodecError::Decompress {
                    message: error.to_string(),
                })?,
            )
        }
    };
    if raw.len() != raw_bytes {
        return Err(CodecError::Decompress {
            message: format!("{} bytes instead of {raw_bytes}", raw.len()),
        });
    }
    Ok(raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_record() -> impl Strategy<Value = Record> {
        (1u8..=8, any::<[u64; 4]>(), prop::collection::vec(any::<u8>(), 0..3000)).prop_map(
            |(kind, numbers, payload)| {
                let [offset, len, sequence, lamport] = numbers;
                let kind = RecordKind::from_number(kind).unwrap();
                let header = RecordHeader {
                    kind,
                    flags: 1,
                    offset,
                    len,
                    sequence,
                    lamport: Lamport(lamport),
                };
                Record {
                    header,
                    payload: Bytes::from(payload),
                }
            },
        )
    }

    proptest! {
        #[test]
        fn records_survive_packing(records in prop::collection::vec(any_record(), 0..20), which in 0..3usize) {
            let compression = [Compression::None, Compression::Lz4, Compression::Zstd][which];
            prop_assert_eq!(unpack(&pack(&records, compression)).unwrap(), records);
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..500), raw in 0..600usize, which in 0..3usize) {
            let compression = [Compression::None, Compression::Lz4, Compression::Zstd][which];
            let _ = unpack(&Packed { compression, raw_bytes: raw, bytes: Bytes::from(bytes) });
        }
    }

    #[test]
    fn a_stated_size_beyond_the_limit_is_refused_before_memory_is_taken() {
        let packed = Packed {
            compression: Compression::Lz4,
            raw_bytes: usize::MAX,
            bytes: Bytes::from_static(b"x"),
        };
        assert!(matches!(unpack(&packed), Err(CodecError::TooLarge { .. })));
    }

    #[test]
    fn repeating_payloads_travel_smaller_and_random_ones_uncompressed() {
        let header = RecordHeader {
            kind: RecordKind::Write,
            flags: 0,
            offset: 0,
            len: 65536,
            sequence: 0,
            lamport: Lamport(1),
        };
        let zeros = Record {
            header,
            payload: Bytes::from(vec![0; 65536]),
        };
        assert!(pack(&[zeros], Compression::Lz4).bytes.len() < 1000);
        let noise: Vec<u8> = (0..65536u64 / 32)
            .flat_map(|i| *blake3::hash(&i.to_le_bytes()).as_bytes())
            .collect();
        let packed = pack(
            &[Record {
                header,
                payload: Bytes::from(noise),
            }],
            Compression::Lz4,
        );
        assert_eq!(packed.compression, Compression::None);
    }
}
