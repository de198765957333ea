//! Puts the tail of a log into new segments: after a failed write or sync, and after every restart.
//!
//! A new segment takes effect with its header, so the content goes first and is synced, the header last. With several (the tail
//! spans epochs), the header of the last one is written first: a process that dies in between leaves old segments that still
//! hold, in the kernel, what lies below the new ones.
//!
//! Invariant: until the first header is written the log is unchanged; afterwards it says the same from new files.

use super::{SegmentMeta, align_up};
use crate::api::Compression;
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader};
use crate::format::record::{HEADER_LEN, Record};
use crate::format::segment::{FIRST_BATCH_OFFSET, LogIdentity, SegmentHeader};
use crate::lineage::EpochEntry;
use crate::log::writer::Packer;
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::types::{Lsn, Position};
use std::io;

/// How much is collected before it is written (bytes).
const CHUNK_BYTES: usize = 1 << 20;

/// Part of a log above its durable end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TailItem {
    /// A record of the epoch that is current here.
    Record(Record),
    /// An epoch begins here.
    Epoch(EpochEntry),
}

impl TailItem {
    /// By how much it advances the LSN (bytes).
    #[must_use]
    pub fn lsn_bytes(&self) -> u64 {
        match self {
            Self::Record(record) => record.lsn_bytes(),
            Self::Epoch(_) => 0,
        }
    }

    /// The epoch that begins here, if one does.
    #[must_use]
    pub fn epoch(&self) -> Option<&EpochEntry> {
        match self {
            Self::Record(_) => None,
            Self::Epoch(entry) => Some(entry),
        }
    }
}

/// One new segment.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) name: SegmentName,
    pub(super) epoch: EpochEntry,
    pub(super) start: Position,
    pub(super) records: Vec<Record>,
}

impl Piece {
    /// Without name and records yet.
    pub(super) fn new(epoch: EpochEntry, start: Position) -> Self {
        Self {
            name: SegmentName { number: 0, origin: 0 },
            epoch,
            start,
            records: Vec::new(),
        }
    }
}

/// The work of rewriting a tail: run it where it may block, then hand the outcome to the writer it came from.
#[derive(Debug)]
pub struct TailRewrite {
    pub(super) identity: LogIdentity,
    /// The segment whose content the first piece continues; 0 for none.
    pub(super) previous: u32,
    pub(super) durable: Lsn,
    pub(super) next_sequence: Option<u64>,
    pub(super) compression: Compression,
    pub(super) segment_bytes: u64,
    pub(super) pieces: Vec<Piece>,
}

/// What a rewrite made; all of it is durable.
#[derive(Debug)]
pub struct Rewritten<F> {
    pub(super) segments: Vec<SegmentMeta>,
    /// The last segment: file, checksum of its header, where appends continue (file offset).
    pub(super) last: (F, u32, u64),
}

/// A piece whose content is on stable storage, without its header.
struct Filled<F> {
    file: F,
    file_bytes: u64,
    end_offset: u64,
    header: SegmentHeader,
}

impl TailRewrite {
    /// The files that will be created.
    #[must_use]
    pub fn files(&self) -> Vec<FileId> {
        self.pieces.iter().map(|piece| FileId::Segment(piece.name)).collect()
    }

    /// Bytes of history that will be written.
    #[must_use]
    pub fn lsn_bytes(&self) -> u64 {
        self.pieces
            .iter()
            .flat_map(|piece| &piece.records)
            .map(Record::lsn_bytes)
            .sum()
    }

    /// Does it. On failure the files made so far are removed as far as the store allows; what is left of them is unused.
    ///
    /// # Errors
    /// Any I/O error. The log in the old files is as it was.
    pub fn run<S: Store>(self, store: &S) -> io::Result<Rewritten<S::File>> {
        let files = self.files();
        let result = self.run_inner(store);
        if result.is_err() {
            // Lowest first: a header that is there already is the last one's, and it holds until its file goes.
            let removed = files
                .iter()
                .try_for_each(|id| store.remove(id))
                .and_then(|()| store.sync_dir());
            if let Err(error) = removed {
                tracing::warn!(%error, ?files, "segments of a failed rewrite stay behind");
            }
        }
        result
    }

    fn run_inner<S: Store>(self, store: &S) -> io::Result<Rewritten<S::File>> {
        let mut previous = self.previous;
        let mut filled = Vec::with_capacity(self.pieces.len());
        for (index, piece) in self.pieces.iter().enumerate() {
            filled.push(self.fill(store, piece, previous, index + 1 == self.pieces.len())?);
            previous = piece.name.number;
        }
        let mut last_crc = None;
        for Filled { file, header, .. } in filled.iter().rev() {
            let (bytes, crc) = header.encode();
            file.write_at(&[&bytes], 0)?;
            file.sync()?;
            last_crc.get_or_insert(crc);
        }
        let segments = filled
            .iter()
            .map(|filled| SegmentMeta {
                name: filled.header.name,
                start: filled.header.start(),
                file_bytes: filled.file_bytes,
            })
            .collect();
        let last = filled.pop().expect("a rewrite has a piece");
        let crc = last_crc.expect("a rewrite has a piece");
        Ok(Rewritten {
            segments,
            last: (last.file, crc, last.end_offset),
        })
    }

    /// Creates the file of a piece and writes its content: one batch, synced.
    fn fill<S: Store>(&self, store: &S, piece: &Piece, previous: u32, is_last: bool) -> io::Result<Filled<S::File>> {
        let begins_epoch = piece.start.lsn == piece.epoch.parent.lsn;
        let first_sequence = match piece.records.first() {
            Some(record) => Some(record.header.sequence),
            None if is_last => self.next_sequence,
            None => begins_epoch.then_some(0),
        };
        let header = SegmentHeader {
            identity: self.identity,
            name: piece.name,
            previous,
            start_lsn: piece.start.lsn,
            start_chain: piece.start.chain,
            first_sequence,
            durable: self.durable,
            lamport: piece
                .records
                .last()
                .map_or(piece.epoch.lamport, |record| record.header.lamport),
            epoch: piece.epoch.clone(),
        };
        let content: usize = piece
            .records
            .iter()
            .map(|record| HEADER_LEN + record.payload.len())
            .sum();
        let needed = align_up(FIRST_BATCH_OFFSET + (BATCH_HEADER_BYTES + content) as u64);
        let file_bytes = if is_last {
            needed.max(self.segment_bytes)
        } else {
            needed
        };
        let file = store.create(&FileId::Segment(piece.name), file_bytes)?;
        let end_offset = self.write_content(&file, piece, header.encode().1)?;
        file.sync()?;
        Ok(Filled {
            file,
            file_bytes,
            end_offset,
            header,
        })
    }

    /// Returns where the content ends (file offset).
    fn write_content<F: StoreFile>(&self, file: &F, piece: &Piece, segment_crc: u32) -> io::Result<u64> {
        let Some(first) = piece.records.first() else {
            return Ok(FIRST_BATCH_OFFSET);
        };
        let batch = BatchHeader {
            segment: piece.name,
            file_offset: FIRST_BATCH_OFFSET,
            start: piece.start,
            first_sequence: first.header.sequence,
            durable: self.durable,
            compression: self.compression,
        };
        let (bytes, batch_crc) = batch.encode(segment_crc);
        let mut packer = Packer::default();
        let mut buffer = Vec::with_capacity(CHUNK_BYTES + (64 << 10));
        let mut offset = FIRST_BATCH_OFFSET;
        buffer.extend_from_slice(&bytes);
        for record in &piece.records {
            let stored = packer.pack(self.compression, &record.payload);
            buffer.extend_from_slice(&record.header.encode(stored, batch_crc));
            buffer.extend_from_slice(stored);
            if buffer.len() >= CHUNK_BYTES {
                file.write_at(&[&buffer], offset)?;
                offset += buffer.len() as u64;
                buffer.clear();
            }
        }
        file.write_at(&[&buffer], offset)?;
        Ok(offset + buffer.len() as u64)
    }
}
