//! The vocabulary of the engine: positions, identities and ranges as types that cannot be mixed up.
//!
//! Invariant: an LSN counts record headers and uncompressed payload bytes of one history and nothing else, so the
//! same record has the same LSN on every replica whatever its local segments, batches or compression look like.

use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

/// Every device offset and length that enters the engine is a multiple of this (bytes).
pub const SECTOR_BYTES: u64 = 512;
/// Volume sizes, batches in the log and state slots are aligned to this (bytes).
pub const BLOCK_BYTES: u64 = 4096;
/// Size of a serialized record header; together with the uncompressed payload it is what an LSN counts.
pub const RECORD_HEADER_BYTES: u64 = 40;
/// Largest payload of one record (bytes). Larger writes are split, in order, by the owner.
pub const MAX_PAYLOAD_BYTES: u64 = 1 << 20;

/// Log sequence number: byte position in the history of a resource.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lsn(pub u64);

impl Lsn {
    /// The beginning of every history.
    pub const ZERO: Lsn = Lsn(0);

    /// Bytes from `earlier` up to `self`; zero when `earlier` is not earlier.
    #[must_use]
    pub fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }

    /// The position `bytes` further on.
    ///
    /// # Panics
    /// When the history would exceed 2^64 bytes, which no device can write.
    #[must_use]
    pub fn advance(self, bytes: u64) -> Lsn {
        Lsn(self.0.checked_add(bytes).expect("a history is shorter than 2^64 bytes"))
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

macro_rules! uuid_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_newtype!(
    /// Identity of the whole cluster, created once by the operator.
    ClusterId
);
uuid_newtype!(
    /// Identity of one replicated block device, for its whole life.
    ResourceId
);
uuid_newtype!(
    /// Identity of one incarnation of a replica: one (resource, node, data) that was joined once.
    ReplicaId
);
uuid_newtype!(
    /// Identity of a node; our own, never a host name or a Kubernetes uid.
    NodeId
);
uuid_newtype!(
    /// Identity of one epoch: one stay of one replica in the primary role.
    EpochId
);

/// Chain hash over all records of a history up to a position: equal chains prove equal bytes.
///
/// `chain(i) = BLAKE3(chain(i-1), epoch, record header without stored length and crc, BLAKE3(payload))`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Chain(pub [u8; 32]);

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Serialize for Chain {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl<'de> Deserialize<'de> for Chain {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let hash = blake3::Hash::from_hex(&text)
            .map_err(|_| serde::de::Error::custom("a chain hash is 64 hexadecimal digits"))?;
        Ok(Chain(*hash.as_bytes()))
    }
}

/// A provable place in a history. Two replicas with equal positions hold equal logs up to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The epoch that wrote the bytes just before `lsn` (or that starts at it).
    pub epoch: EpochId,
    /// Byte position in the history.
    pub lsn: Lsn,
    /// Chain hash of everything before `lsn`.
    pub chain: Chain,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{:.8}/{}", self.lsn, self.epoch.0.simple(), self.chain)
    }
}

/// Physical Lamport time in nanoseconds since the Unix epoch: never behind the wall clock that the caller passes
/// in, never behind any stamp seen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Lamport(pub u64);

/// The fencing token: who may be primary. Only the operator, or an acknowledged local failover, makes new ones.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Designation {
    /// Only grows.
    pub number: u64,
    /// Tells two designations with the same number apart: that is a split brain, and nobody yields.
    pub id: Uuid,
}

/// A range of bytes of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ByteRange {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub len: u64,
}

impl ByteRange {
    /// The first byte after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}
