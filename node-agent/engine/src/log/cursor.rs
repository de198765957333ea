//! Walks the records of one segment: the one place where bytes of a log are believed.
//!
//! Invariant: a record comes out only if its checksum, its batch, its sequence number and its place in the history are as
//! expected; at the first that is not, the walk stops and never goes on behind it.

use super::align_up;
use super::classify::{TailClass, of_garbage};
use super::writer::unpack;
use crate::api::Compression;
use crate::chain;
use crate::format::FormatError;
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader};
use crate::format::record::{HEADER_LEN, RawHeader, Record};
use crate::format::segment::{FIRST_BATCH_OFFSET, SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::store::{SegmentName, StoreFile};
use crate::types::{BLOCK_BYTES, Lsn, Position};
use bytes::Bytes;
use std::io;

/// How much is read at a time (bytes).
const WINDOW_BYTES: u64 = 256 << 10;

/// Where and why a walk cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stop {
    /// In which segment.
    pub segment: SegmentName,
    /// Where in its file (bytes).
    pub file_offset: u64,
    /// How far the history is valid.
    pub lsn: Lsn,
    /// What stands there.
    pub class: TailClass,
    /// The log just ended here: an end mark, and nothing behind it that this segment wrote. Left-overs of an earlier life of the file
    /// do not matter.
    pub ended: bool,
}

/// One step of a walk.
#[derive(Debug)]
pub(super) enum Step {
    /// The next record; the cursor stands behind it.
    Record(Record),
    /// The limit is reached.
    Limit,
    /// There is no valid record.
    Stop(Stop),
}

/// A window over a file, refilled on demand.
#[derive(Debug)]
pub(super) struct Window<F> {
    file: F,
    file_bytes: u64,
    bytes: Vec<u8>,
    start: u64,
}

impl<F: StoreFile> Window<F> {
    pub(super) fn new(file: F, file_bytes: u64) -> Self {
        Self {
            file,
            file_bytes,
            bytes: Vec::new(),
            start: 0,
        }
    }

    /// What was read may have changed: read it again.
    pub(super) fn forget(&mut self) {
        self.bytes.clear();
    }

    /// `len` bytes at `offset`; `None` when the file ends before.
    pub(super) fn get(&mut self, offset: u64, len: usize) -> io::Result<Option<&[u8]>> {
        let end = offset + len as u64;
        if end > self.file_bytes {
            return Ok(None);
        }
        if offset < self.start || end > self.start + self.bytes.len() as u64 {
            let count = (len as u64).max(WINDOW_BYTES).min(self.file_bytes - offset);
            self.bytes
                .resize(usize::try_from(count).expect("a window fits in memory"), 0);
            self.start = offset;
            if let Err(error) = self.file.read_at(&mut self.bytes, offset) {
                self.forget();
                return Err(error);
            }
        }
        let from = usize::try_from(offset - self.start).expect("a window fits in memory");
        Ok(Some(&self.bytes[from..from + len]))
    }
}

/// The batch that is being read.
#[derive(Debug, Clone, Copy)]
struct OpenBatch {
    compression: Compression,
    crc: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Cursor<F> {
    header: SegmentHeader,
    header_crc: u32,
    window: Window<F>,
    offset: u64,
    batch: Option<OpenBatch>,
    at: Position,
    sequence: Option<u64>,
    proven: Lsn,
}

impl<F: StoreFile> Cursor<F> {
    /// Reads the header of a segment, with its checksum.
    pub(super) fn read_header(file: &F) -> io::Result<Result<(SegmentHeader, u32), FormatError>> {
        let mut bytes = [0; SEGMENT_HEADER_BYTES];
        match file.read_at(&mut bytes, 0) {
            Ok(()) => Ok(SegmentHeader::decode(&bytes)),
            // A creation that was interrupted.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(Err(FormatError::Zero)),
            Err(error) => Err(error),
        }
    }

    /// At the beginning of the content.
    pub(super) fn new(file: F, header: SegmentHeader, header_crc: u32) -> io::Result<Self> {
        let file_bytes = file.size()?;
        Ok(Self {
            at: header.start(),
            sequence: header.first_sequence,
            proven: header.durable,
            header,
            header_crc,
            window: Window::new(file, file_bytes),
            offset: FIRST_BATCH_OFFSET,
            batch: None,
        })
    }

    /// How far the walk has come.
    pub(super) fn at(&self) -> Position {
        self.at
    }

    /// Sequence number of the next record, if known.
    pub(super) fn sequence(&self) -> Option<u64> {
        self.sequence
    }

    /// The highest durable end that headers so far tell of.
    pub(super) fn proven(&self) -> Lsn {
        self.proven
    }

    /// What the walk through the segment before has learned, when the header does not know.
    pub(super) fn expect_sequence(&mut self, sequence: Option<u64>) {
        self.sequence = self.sequence.or(sequence);
    }

    pub(super) fn header(&self) -> &SegmentHeader {
        &self.header
    }

    /// Bytes behind the durable end may have been read before they were written: call this before going on.
    pub(super) fn forget_window(&mut self) {
        self.window.forget();
    }

    /// The next record below `limit`.
    pub(super) fn next(&mut self, limit: Lsn) -> io::Result<Step> {
        if self.at.lsn >= limit {
            return Ok(Step::Limit);
        }
        let mut here = TailClass::Zero;
        let mut here_offset = self.offset;
        loop {
            let mut marked = true;
            if let Some(batch) = self.batch {
                match self.try_record(batch, limit)? {
                    Ok(record) => return Ok(Step::Record(record)),
                    Err(class) => {
                        marked = class == TailClass::Zero;
                        if here == TailClass::Zero {
                            (here, here_offset) = (class, self.offset);
                        }
                    }
                }
            }
            let boundary = align_up(self.offset);
            if let Err(class) = self.try_batch(boundary)? {
                // What stands where the next record would is more telling than an empty block behind it; but in a file with a
                // past, garbage behind the last record is normal.
                let behind = class == TailClass::Zero || here == TailClass::Digest || here == TailClass::SequenceJump;
                let (class, file_offset) = if here != TailClass::Zero && behind {
                    (here, here_offset)
                } else {
                    (class, boundary)
                };
                let ended = marked && class.is_nothing_of_ours();
                return Ok(Step::Stop(self.stop(file_offset, class, ended)));
            }
        }
    }

    fn stop(&self, file_offset: u64, class: TailClass, ended: bool) -> Stop {
        Stop {
            segment: self.header.name,
            file_offset,
            lsn: self.at.lsn,
            class,
            ended,
        }
    }

    /// Whether the file is still this segment. A file is cleared of its header, durably, before anything else is written into it: what was
    /// read before this says yes was read from this segment.
    pub(super) fn is_still_there(&self) -> io::Result<bool> {
        let found = Self::read_header(&self.window.file)?;
        Ok(found.is_ok_and(|(header, crc)| header == self.header && crc == self.header_crc))
    }

    /// The record at the present place of this batch, or what stands there instead.
    fn try_record(&mut self, batch: OpenBatch, limit: Lsn) -> io::Result<Result<Record, TailClass>> {
        let Some(bytes) = self.window.get(self.offset, HEADER_LEN)? else {
            return Ok(Err(TailClass::Zero));
        };
        let raw = match RawHeader::parse(bytes) {
            Ok(raw) => raw,
            Err(FormatError::Zero) => return Ok(Err(TailClass::Zero)),
            Err(_) => return Ok(Err(of_garbage(bytes))),
        };
        let Some(stored) = self.window.get(self.offset + HEADER_LEN as u64, raw.stored_len)? else {
            return Ok(Err(TailClass::Truncated));
        };
        if !raw.is_intact(stored, batch.crc) {
            return Ok(Err(TailClass::Digest));
        }
        let len = usize::try_from(raw.header.payload_len()).expect("payloads are at most 1 MiB");
        let Some(payload) = unpack(batch.compression, stored, len) else {
            return Ok(Err(TailClass::Digest));
        };
        let record = Record {
            header: raw.header,
            payload: Bytes::from(payload),
        };
        let end = self.at.lsn.advance(record.lsn_bytes());
        if self.sequence != Some(record.header.sequence) || end > limit {
            return Ok(Err(TailClass::SequenceJump));
        }
        self.at.chain = chain::advance(self.at.chain, self.at.epoch, &record.header, &record.payload);
        self.at.lsn = end;
        self.sequence = Some(record.header.sequence + 1);
        self.offset += (HEADER_LEN + raw.stored_len) as u64;
        Ok(Ok(record))
    }

    /// Opens the batch at `boundary` if it continues exactly here.
    fn try_batch(&mut self, boundary: u64) -> io::Result<Result<(), TailClass>> {
        let Some(bytes) = self.window.get(boundary, BATCH_HEADER_BYTES)? else {
            return Ok(Err(TailClass::Zero));
        };
        let (batch, crc) = match BatchHeader::decode(bytes, self.header_crc) {
            Ok(found) => found,
            Err(FormatError::Zero) => {
                // Zeros that a torn sector left behind may hide something in the rest of the block.
                let rest = self.window.get(boundary, usize::try_from(BLOCK_BYTES).expect("fits"))?;
                return Ok(Err(rest.map_or(TailClass::Zero, of_garbage)));
            }
            Err(FormatError::Magic) => return Ok(Err(of_garbage(bytes))),
            Err(_) if BatchHeader::claimed_segment(bytes) != self.header.name => return Ok(Err(TailClass::Recycled)),
            Err(_) => return Ok(Err(TailClass::Header)),
        };
        let expected_sequence = self.sequence.is_none_or(|expected| expected == batch.first_sequence);
        let here = batch.file_offset == boundary && batch.segment == self.header.name;
        if !here || batch.start != self.at || !expected_sequence {
            return Ok(Err(TailClass::SequenceJump));
        }
        self.proven = self.proven.max(batch.durable);
        self.sequence = Some(batch.first_sequence);
        self.batch = Some(OpenBatch {
            compression: batch.compression,
            crc,
        });
        self.offset = boundary + BATCH_HEADER_BYTES as u64;
        Ok(Ok(()))
    }

    /// What valid batch headers behind the present place tell about durability: the walk stopped here, but if a later
    /// batch knew of more, then the log is damaged, not torn.
    pub(super) fn proven_by_later_batches(&mut self) -> io::Result<Lsn> {
        let mut proven = self.proven;
        let mut boundary = align_up(self.offset);
        while let Some(bytes) = self.window.get(boundary, BATCH_HEADER_BYTES)? {
            if let Ok((batch, _)) = BatchHeader::decode(bytes, self.header_crc)
                && batch.file_offset == boundary
                && batch.segment == self.header.name
            {
                proven = proven.max(batch.durable);
            }
            boundary += BLOCK_BYTES;
        }
        Ok(proven)
    }
}
