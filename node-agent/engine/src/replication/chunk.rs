//! A run of log records that proves its own place in a history.
//!
//! Invariant: a [`LogChunk`] exists only after the chain hash was recomputed over its records, here or by the walk that read them from
//! this replica's own log. Whoever holds one may rely on `end` following from `start` by exactly these records, and need not hash
//! them again.

use crate::format::record::{Record, RecordHeader};
use crate::types::{Chain, Lsn, MAX_PAYLOAD_BYTES, Position};

/// What a sender says about a run of records: not to be believed before [`LogChunk::verify`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkClaim {
    /// Where the first record begins.
    pub start: Position,
    /// Where the last one ends, according to the sender.
    pub end: Position,
    /// The records, in order.
    pub records: Vec<Record>,
}

/// A run of records of one epoch, proven: `end.chain` was recomputed from `start.chain` over these very records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogChunk {
    start: Position,
    end: Position,
    records: Vec<Record>,
    /// The chain behind each record.
    chains: Vec<Chain>,
}

/// Why a run of records proves nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChunkError {
    /// No record at all.
    #[error("log chunk at {at} is empty")]
    Empty {
        /// Where it claims to start.
        at: Position,
    },
    /// A run never crosses an epoch.
    #[error("log chunk from {start} to {end} crosses an epoch")]
    CrossesEpoch {
        /// Claimed start.
        start: Position,
        /// Claimed end.
        end: Position,
    },
    /// A record that no writer can have written.
    #[error("record {index} of the log chunk at {at} is malformed: {what}")]
    Malformed {
        /// Where the chunk starts.
        at: Position,
        /// Which record (0 is the first).
        index: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The chain over the records does not lead to the claimed end: bytes differ from what the primary wrote.
    #[error("a log chunk claims to lead to {claimed}, but leads to {computed}: refused")]
    ChainBroken {
        /// Claimed end.
        claimed: Position,
        /// What the records lead to.
        computed: Position,
    },
}

impl LogChunk {
    /// Proves that `records` lead from `start` to a certain position, and says to which.
    ///
    /// # Errors
    /// [`ChunkError`] when the run is empty or holds a record that no writer can have written.
    pub fn build(start: Position, records: Vec<Record>) -> Result<Self, ChunkError> {
        if records.is_empty() {
            return Err(ChunkError::Empty { at: start });
        }
        let mut end = start;
        let mut chains = Vec::with_capacity(records.len());
        let mut expected_sequence = records[0].header.sequence;
        for (index, record) in records.iter().enumerate() {
            let malformed = |what| ChunkError::Malformed { at: start, index, what };
            check_shape(&record.header, record.payload.len()).map_err(malformed)?;
            if record.header.sequence != expected_sequence {
                return Err(malformed("its sequence number does not follow"));
            }
            expected_sequence = expected_sequence.wrapping_add(1);
            let lsn = end
                .lsn
                .0
                .checked_add(record.lsn_bytes())
                .ok_or_else(|| malformed("the position overflows"))?;
            end.lsn = Lsn(lsn);
            end.chain = record.chain_after(end.chain, start.epoch);
            chains.push(end.chain);
        }
        Ok(Self {
            start,
            end,
            records,
            chains,
        })
    }

    /// What a walk through this replica's own log has read: the walk has recomputed the chain behind each record. `None` for no record.
    ///
    /// # Panics
    /// When the parts contradict each other.
    pub(crate) fn walked(start: Position, end: Position, walked: Vec<(Record, Chain)>) -> Option<Self> {
        let (records, chains): (Vec<Record>, Vec<Chain>) = walked.into_iter().unzip();
        let last = *chains.last()?;
        let bytes: u64 = records.iter().map(Record::lsn_bytes).sum();
        assert_eq!(
            (start.epoch, start.lsn.advance(bytes), last),
            (end.epoch, end.lsn, end.chain),
            "a chunk ends where its walk stands"
        );
        Some(Self {
            start,
            end,
            records,
            chains,
        })
    }

    /// Proves a claim from outside.
    ///
    /// # Errors
    /// [`ChunkError`]; nothing of the claim may be used then.
    pub fn verify(claim: ChunkClaim) -> Result<Self, ChunkError> {
        if claim.start.epoch != claim.end.epoch {
            return Err(ChunkError::CrossesEpoch {
                start: claim.start,
                end: claim.end,
            });
        }
        let chunk = Self::build(claim.start, claim.records)?;
        if chunk.end != claim.end {
            return Err(ChunkError::ChainBroken {
                claimed: claim.end,
                computed: chunk.end,
            });
        }
        Ok(chunk)
    }

    /// Where the first record begins.
    #[must_use]
    pub fn start(&self) -> Position {
        self.start
    }

    /// Where the last record ends.
    #[must_use]
    pub fn end(&self) -> Position {
        self.end
    }

    /// The records, in order; never empty.
    #[must_use]
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// The records, in order; never empty.
    #[must_use]
    pub fn into_records(self) -> Vec<Record> {
        self.records
    }

    /// The records, each with the position behind it.
    pub fn into_steps(self) -> impl Iterator<Item = (Record, Position)> {
        let mut at = self.start;
        self.records.into_iter().zip(self.chains).map(move |(record, chain)| {
            at = Position {
                lsn: at.lsn.advance(record.lsn_bytes()),
                chain,
                ..at
            };
            (record, at)
        })
    }

    /// How far the chunk leads (bytes of history).
    #[must_use]
    pub fn lsn_bytes(&self) -> u64 {
        self.end.lsn.bytes_since(self.start.lsn)
    }
}

/// What holds for every record, whatever wrote it.
fn check_shape(header: &RecordHeader, payload_len: usize) -> Result<(), &'static str> {
    let payload_bytes = payload_len as u64;
    if payload_bytes > MAX_PAYLOAD_BYTES {
        return Err("its payload is larger than any writer makes");
    }
    if header.kind.has_payload() {
        if header.len != payload_bytes {
            return Err("its length differs from its payload");
        }
    } else if payload_bytes != 0 {
        return Err("its kind carries no payload");
    }
    if header.offset.checked_add(header.len).is_none() {
        return Err("its range overflows");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::RecordKind;
    use crate::types::{Chain, EpochId, Lamport};
    use bytes::Bytes;
    use uuid::Uuid;

    fn write(sequence: u64, payload: &[u8]) -> Record {
        Record {
            header: RecordHeader {
                kind: RecordKind::Write,
                flags: 0,
                offset: 4096 * sequence,
                len: payload.len() as u64,
                sequence,
                lamport: Lamport(1000 + sequence),
            },
            payload: Bytes::copy_from_slice(payload),
        }
    }

    fn start() -> Position {
        Position {
            epoch: EpochId(Uuid::from_u128(7)),
            lsn: Lsn(80),
            chain: Chain([3; 32]),
        }
    }

    fn claim() -> ChunkClaim {
        let records = vec![write(4, &[1; 512]), write(5, &[2; 1024])];
        let end = LogChunk::build(start(), records.clone()).unwrap().end();
        ChunkClaim {
            start: start(),
            end,
            records,
        }
    }

    #[test]
    fn an_honest_claim_is_proven_and_counts_headers_and_payload() {
        let chunk = LogChunk::verify(claim()).unwrap();
        assert_eq!(chunk.end().lsn, Lsn(80 + 40 + 512 + 40 + 1024));
        let steps: Vec<(Record, Position)> = chunk.clone().into_steps().collect();
        let first = LogChunk::build(start(), claim().records[..1].to_vec()).unwrap();
        assert_eq!([steps[0].1, steps[1].1], [first.end(), chunk.end()]);
    }

    #[test]
    fn a39_log_with_any_changed_bit_is_refused() {
        type Change = fn(&mut ChunkClaim);
        let changes: [(&str, Change); 8] = [
            ("payload", |c| c.records[1].payload = Bytes::from(vec![9; 1024])),
            ("offset", |c| c.records[0].header.offset += 512),
            ("lamport", |c| c.records[0].header.lamport.0 += 1),
            ("flags", |c| c.records[1].header.flags ^= 1),
            ("kind", |c| c.records[1].header.kind = RecordKind::Marker),
            ("start chain", |c| c.start.chain.0[31] ^= 1),
            ("end chain", |c| c.end.chain.0[0] ^= 1),
            ("record missing", |c| drop(c.records.pop())),
        ];
        for (name, change) in changes {
            let mut claim = claim();
            change(&mut claim);
            assert!(
                matches!(LogChunk::verify(claim), Err(ChunkError::ChainBroken { .. })),
                "{name} went unnoticed"
            );
        }
    }

    #[test]
    fn a39_the_same_records_in_another_epoch_or_order_are_refused() {
        let mut other_epoch = claim();
        other_epoch.start.epoch = EpochId(Uuid::from_u128(8));
        other_epoch.end.epoch = other_epoch.start.epoch;
        assert!(matches!(
            LogChunk::verify(other_epoch),
            Err(ChunkError::ChainBroken { .. })
        ));
        let mut swapped = claim();
        swapped.records.swap(0, 1);
        assert!(matches!(LogChunk::verify(swapped), Err(ChunkError::Malformed { .. })));
    }

    #[test]
    fn records_that_no_writer_makes_are_refused() {
        let mut longer = claim();
        longer.records[0].header.len += 1;
        assert!(matches!(
            LogChunk::verify(longer),
            Err(ChunkError::Malformed { index: 0, .. })
        ));
        assert!(matches!(
            LogChunk::build(start(), Vec::new()),
            Err(ChunkError::Empty { .. })
        ));
    }
}
