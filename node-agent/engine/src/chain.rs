//! The chain hash: one BLAKE3 value per record that stands for everything before and including it.
//!
//! `chain(i) = BLAKE3(chain(i-1) ‖ epoch ‖ kind ‖ flags ‖ offset ‖ length ‖ sequence ‖ Lamport time ‖ BLAKE3(payload))`,
//! all numbers little-endian, the payload uncompressed.
//!
//! Invariant: nothing local enters it (stored length, checksums, batches, segments), so equal chains at equal LSNs prove
//! equal histories on different replicas.

use crate::format::record::RecordHeader;
use crate::types::{Chain, EpochId};

/// The chain after a record of `epoch`, given the chain before it.
#[must_use]
pub fn advance(before: Chain, epoch: EpochId, header: &RecordHeader, payload: &[u8]) -> Chain {
    let mut bytes = [0; 32 + 16 + 34 + 32];
    bytes[..32].copy_from_slice(&before.0);
    bytes[32..48].copy_from_slice(epoch.0.as_bytes());
    bytes[48] = header.kind as u8;
    bytes[49] = header.flags;
    bytes[50..58].copy_from_slice(&header.offset.to_le_bytes());
    bytes[58..66].copy_from_slice(&header.len.to_le_bytes());
    bytes[66..74].copy_from_slice(&header.sequence.to_le_bytes());
    bytes[74..82].copy_from_slice(&header.lamport.0.to_le_bytes());
    bytes[82..].copy_from_slice(blake3::hash(payload).as_bytes());
    Chain(*blake3::hash(&bytes).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::RecordKind;
    use crate::types::Lamport;
    use uuid::Uuid;

    /// The definition, from the outside: if this fails, replicas of different versions no longer understand each other.
    #[test]
    fn the_chain_is_the_documented_hash() {
        let header = RecordHeader {
            kind: RecordKind::Write,
            flags: 1,
            offset: 4096,
            len: 3,
            sequence: 9,
            lamport: Lamport(77),
        };
        let epoch = EpochId(Uuid::from_u128(5));
        let mut input = vec![7; 32];
        input.extend_from_slice(epoch.0.as_bytes());
        input.extend_from_slice(&[1, 1]);
        for number in [4096_u64, 3, 9, 77] {
            input.extend_from_slice(&number.to_le_bytes());
        }
        input.extend_from_slice(blake3::hash(b"abc").as_bytes());
        let expected = Chain(*blake3::hash(&input).as_bytes());
        assert_eq!(advance(Chain([7; 32]), epoch, &header, b"abc"), expected);
    }
}
