//! What a log segment touched, in a few bytes that outlive it: the extents of all its records.
//!
//! Used where two replicas must find out what differs although the log itself is gone. Little-endian: magic 8, version 2, reserved 2,
//! number of extents 4, start and end position (epoch 16, LSN 8, chain 32 each), extents (offset 8, length 8 each), crc32c 4.
//!
//! Invariant: the extents cover every byte that a record of the segment changed – perhaps more, never less. A summary that is missing or
//! damaged means that nothing is known.

use crate::format::crc32c;
use crate::format::record::{RecordHeader, RecordKind};
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::types::{BLOCK_BYTES, ByteRange, Chain, EpochId, Lsn, Position};
use std::collections::BTreeMap;
use std::io;
use uuid::Uuid;

const MAGIC: &[u8; 8] = b"MARSSUMM";
const VERSION: u16 = 1;
const HEADER_BYTES: usize = 8 + 2 + 2 + 4 + 2 * POSITION_BYTES;
const POSITION_BYTES: usize = 16 + 8 + 32;
const EXTENT_BYTES: usize = 16;
/// More extents than this are joined over their gaps, smallest first.
const MAX_EXTENTS: usize = 16 << 10;

/// The extents touched between two positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Where the segment's content began.
    pub start: Position,
    /// Where it ended.
    pub end: Position,
    /// Disjoint, ascending.
    pub extents: Vec<ByteRange>,
}

/// Collects extents.
#[derive(Debug, Default)]
pub struct Touched {
    /// Start → end, disjoint, not adjacent.
    ranges: BTreeMap<u64, u64>,
}

impl Touched {
    /// Takes note of a record.
    pub fn record(&mut self, header: &RecordHeader) {
        match header.kind {
            RecordKind::Write | RecordKind::Discard | RecordKind::WriteZeroes => {
                self.add(header.offset, header.offset + header.len);
            }
            RecordKind::Resize
            | RecordKind::Marker
            | RecordKind::Close
            | RecordKind::EmergencyEnter
            | RecordKind::Resolve => {}
        }
        if self.ranges.len() > 2 * MAX_EXTENTS {
            self.coarsen();
        }
    }

    fn add(&mut self, mut start: u64, mut end: u64) {
        if start == end {
            return;
        }
        while let Some((&from, &to)) = self.ranges.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            self.ranges.remove(&from);
            start = start.min(from);
            end = end.max(to);
        }
        self.ranges.insert(start, end);
    }

    /// Joins neighbours over ever larger gaps until few enough are left.
    fn coarsen(&mut self) {
        let mut gap = BLOCK_BYTES;
        while self.ranges.len() > MAX_EXTENTS {
            let mut joined: Vec<(u64, u64)> = Vec::with_capacity(self.ranges.len());
            for (&from, &to) in &self.ranges {
                match joined.last_mut().filter(|last| from - last.1 <= gap) {
                    Some(last) => last.1 = to,
                    None => joined.push((from, to)),
                }
            }
            self.ranges = joined.into_iter().collect();
            gap *= 2;
        }
    }

    /// The extents so far.
    #[must_use]
    pub fn extents(&mut self) -> Vec<ByteRange> {
        self.coarsen();
        self.ranges
            .iter()
            .map(|(&offset, &end)| ByteRange {
                offset,
                len: end - offset,
            })
            .collect()
    }
}

impl Summary {
    /// The bytes.
    ///
    /// # Panics
    /// Never: the number of extents is bounded.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.extents.len()).expect("the number of extents is bounded");
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.extents.len() * EXTENT_BYTES + 4);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&count.to_le_bytes());
        for position in [&self.start, &self.end] {
            bytes.extend_from_slice(position.epoch.0.as_bytes());
            bytes.extend_from_slice(&position.lsn.0.to_le_bytes());
            bytes.extend_from_slice(&position.chain.0);
        }
        for extent in &self.extents {
            bytes.extend_from_slice(&extent.offset.to_le_bytes());
            bytes.extend_from_slice(&extent.len.to_le_bytes());
        }
        bytes.extend_from_slice(&crc32c(&[&bytes]).to_le_bytes());
        bytes
    }

    /// Reads the bytes; `None` when they are no intact summary of a version that is known.
    #[must_use]
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let version = u16::from_le_bytes(array(bytes, 8)?);
        if bytes.get(..8)? != MAGIC || version != VERSION {
            return None;
        }
        let count = usize::try_from(u32::from_le_bytes(array(bytes, 12)?)).ok()?;
        let end = HEADER_BYTES.checked_add(count.checked_mul(EXTENT_BYTES)?)?;
        if u32::from_le_bytes(array(bytes, end)?) != crc32c(&[bytes.get(..end)?]) {
            return None;
        }
        let extent = |index: usize| {
            let at = HEADER_BYTES + index * EXTENT_BYTES;
            let (offset, len) = (array(bytes, at)?, array(bytes, at + 8)?);
            Some(ByteRange {
                offset: u64::from_le_bytes(offset),
                len: u64::from_le_bytes(len),
            })
        };
        Some(Summary {
            start: position(bytes, 16)?,
            end: position(bytes, 16 + POSITION_BYTES)?,
            extents: (0..count).map(extent).collect::<Option<_>>()?,
        })
    }

    /// Writes the summary of a segment durably, in place of a damaged one if there is one.
    ///
    /// # Errors
    /// Any I/O error.
    pub fn save<S: Store>(&self, store: &S, name: SegmentName) -> io::Result<()> {
        let id = FileId::Summary(name);
        let bytes = self.encode();
        let file = match store.create(&id, bytes.len() as u64) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                store.remove(&id)?;
                store.sync_dir()?;
                store.create(&id, bytes.len() as u64)?
            }
            created => created?,
        };
        file.write_at(&[&bytes], 0)?;
        file.sync()
    }

    /// Where the segment ended, from the fixed part of its summary alone: summaries are many and may be large, and who asks only wants to
    /// know how long to keep this one. Not verified – removed too early it counts as missing, like any that is damaged – so nothing
    /// else may be built on it. `None` when it is missing or tells nothing.
    ///
    /// # Errors
    /// Any I/O error but `NotFound` and a file that is too short.
    pub fn load_end<S: Store>(store: &S, name: SegmentName) -> io::Result<Option<Lsn>> {
        let mut bytes = [0; HEADER_BYTES];
        let read = store
            .open(&FileId::Summary(name))
            .and_then(|file| file.read_at(&mut bytes, 0));
        match read {
            Ok(()) => Ok(Self::decode_end(&bytes)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::UnexpectedEof) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn decode_end(bytes: &[u8; HEADER_BYTES]) -> Option<Lsn> {
        let is_known = bytes[..8] == *MAGIC && bytes[8..10] == VERSION.to_le_bytes();
        let end = position(bytes, 16 + POSITION_BYTES)?;
        is_known.then_some(end.lsn)
    }

    /// Loads the summary of a segment; `None` when it is missing or damaged.
    ///
    /// # Errors
    /// Any I/O error but `NotFound`.
    pub fn load<S: Store>(store: &S, name: SegmentName) -> io::Result<Option<Self>> {
        let file = match store.open(&FileId::Summary(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened?,
        };
        let len = file.size()?.min((HEADER_BYTES + MAX_EXTENTS * EXTENT_BYTES + 4) as u64);
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, 0)?;
        Ok(Self::decode(&bytes))
    }
}

fn array<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn position(bytes: &[u8], at: usize) -> Option<Position> {
    Some(Position {
        epoch: EpochId(Uuid::from_bytes(array(bytes, at)?)),
        lsn: Lsn(u64::from_le_bytes(array(bytes, at + 16)?)),
        chain: Chain(array(bytes, at + 24)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store_sim::SimStore;
    use crate::types::Lamport;
    use proptest::prelude::*;

    fn write(offset: u64, len: u64) -> RecordHeader {
        RecordHeader {
            kind: RecordKind::Write,
            flags: 0,
            offset,
            len,
            sequence: 0,
            lamport: Lamport(0),
        }
    }

    proptest! {
        #[test]
        fn the_extents_cover_every_touched_byte(ranges in prop::collection::vec((0..400_u64, 1..40_u64), 0..60)) {
            let mut touched = Touched::default();
            for (offset, len) in &ranges {
                touched.record(&write(*offset, *len));
            }
            let extents = touched.extents();
            for byte in 0..450 {
                let wanted = ranges.iter().any(|(offset, len)| (*offset..offset + len).contains(&byte));
                let found = extents.iter().any(|extent| (extent.offset..extent.end()).contains(&byte));
                prop_assert_eq!(wanted, found);
            }
            prop_assert!(extents.windows(2).all(|pair| pair[0].end() < pair[1].offset));
        }
    }

    #[test]
    fn too_many_extents_are_joined_and_still_cover_everything() {
        let mut touched = Touched::default();
        let count = 2 * MAX_EXTENTS as u64 + 10;
        (0..count).for_each(|index| touched.record(&write(index * 8192, 512)));
        let extents = touched.extents();
        assert!(extents.len() <= MAX_EXTENTS);
        assert!((0..count).all(|index| {
            extents
                .iter()
                .any(|extent| (extent.offset..extent.end()).contains(&(index * 8192)))
        }));
    }

    #[test]
    fn a_summary_round_trips_and_damage_is_found() {
        let store = SimStore::new(1, 4096, 1 << 20);
        let name = SegmentName { number: 3, origin: 9 };
        let extents = vec![
            ByteRange { offset: 512, len: 1024 },
            ByteRange { offset: 8192, len: 512 },
        ];
        let summary = Summary {
            start: Position::default(),
            end: Position {
                lsn: Lsn(77),
                ..Position::default()
            },
            extents,
        };
        assert_eq!(Summary::load(&store, name).unwrap(), None);
        summary.save(&store, name).unwrap();
        assert_eq!(Summary::load(&store, name).unwrap(), Some(summary.clone()));
        assert_eq!(Summary::load_end(&store, name).unwrap(), Some(Lsn(77)));
        store.flip_bit(&FileId::Summary(name), 8);
        assert_eq!(Summary::load_end(&store, name).unwrap(), None, "no summary at all");
        store.flip_bit(&FileId::Summary(name), 8);
        for bit in (0..summary.encode().len() as u64 * 8).step_by(13) {
            store.flip_bit(&FileId::Summary(name), bit);
            let found = Summary::load(&store, name).unwrap();
            assert!(found.is_none() || found == Some(summary.clone()), "bit {bit}");
            store.flip_bit(&FileId::Summary(name), bit);
        }
    }
}
