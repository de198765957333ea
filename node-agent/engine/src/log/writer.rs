//! Appends records to the current segment, one `pwritev` each, and keeps track of what is durable.
//!
//! # How it goes
//! An append writes its record behind the last one, and an end mark behind it; the first of a batch brings the batch header along, in the
//! same write.
//! [`LogWriter::begin_sync`] closes the batch and moves the append position to the next block, so that no sector of it is
//! ever written again; when the sync is done, everything up to the captured end is durable. At most one sync is under way.
//! Segments are made by somebody else, beforehand ([`LogWriter::next_prepared`], [`LogWriter::add_prepared`]).
//!
//! # When something fails
//! After any failed write or sync the files concerned are never written again. Records that were not durable are
//! still here, and [`LogWriter::begin_rewrite`] turns them into a [`TailRewrite`](super::TailRewrite): work that puts them into a new segment
//! that begins at the durable end. Recovery after a restart is the same thing: a writer that begins poisoned.
//!
//! # The chain
//! What was appended can be read after the death of the process, so it may be acknowledged before its payload is hashed. The chain is needed
//! where a batch or a segment begins and where a position is told; [`LogWriter::chain_up`] brings it to the end, and whoever drives the
//! log calls it when nobody waits.
//!
//! Invariants: `durable ≤ appended`; the kept tail leads exactly from `durable` to `appended`; no byte at or below a position that
//! was captured by `begin_sync` is written afterwards; what was captured is chained.

use super::rewrite::TailItem;
use super::{SegmentMeta, align_up};
use crate::api::{Compression, LogView, SegmentView};
use crate::format::FormatError;
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader};
use crate::format::record::{HEADER_LEN, Record, RecordHeader, RecordKind};
use crate::format::segment::{FIRST_BATCH_OFFSET, LogIdentity, SegmentHeader};
use crate::lineage::{EpochEntry, Lineage};
use crate::store::{SegmentName, Store, StoreFile};
use crate::types::{ByteRange, Lamport, Lsn, Position};
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;

mod heal;
mod pack;
mod segments;
mod state;

pub(super) use pack::{Packer, unpack};
pub use state::{AppendError, Appended, LogState, SyncResult};

/// The segment that is being written.
#[derive(Debug)]
struct Current<F> {
    file: F,
    /// Checksum of its header.
    crc: u32,
    file_bytes: u64,
    /// Where the next byte goes.
    offset: u64,
    /// The open batch: compression and the checksum of its header.
    batch: Option<(Compression, u32)>,
    /// Written since the last `begin_sync`.
    dirty: bool,
}

/// Longest end mark: a record may end just in front of a block (bytes).
const LONGEST_MARK: usize = HEADER_LEN + 4096;

/// Zeros where the next record will stand: in a file that was another segment before, they tell "nothing came after" from "something came,
/// and was torn". They go on to the end of a block, so that the kernel never has to read a block of such a file before it takes part of it. The
/// next record, or the next batch, overwrites them.
fn end_mark(end: u64, file_bytes: u64) -> &'static [u8] {
    let until = align_up(end + HEADER_LEN as u64).min(file_bytes);
    let len = usize::try_from(until - end).expect("less than two blocks");
    &[0; LONGEST_MARK][..len]
}

/// A created, empty segment.
#[derive(Debug)]
struct Prepared<F> {
    name: SegmentName,
    file: F,
    file_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub struct LogWriter<S: Store> {
    identity: LogIdentity,
    segments: Vec<SegmentMeta>,
    current: Option<Current<S::File>>,
    prepared: Option<Prepared<S::File>>,
    /// Prepared segments that turned out too small.
    unfit: Vec<SegmentName>,
    /// The next prepared segment must be at least this long (bytes).
    least_bytes: u64,
    /// Handed out by `next_prepared`, not yet returned.
    requested: Option<SegmentName>,
    next_number: u32,
    /// The epoch at the end.
    epoch: EpochEntry,
    /// The epoch at `durable`.
    durable_epoch: EpochEntry,
    /// The end; its chain does not cover the last `unchained` records of the tail yet.
    appended: Position,
    unchained: usize,
    durable: Position,
    /// Sequence of the next record; `None` while a sync target has not seen the first one.
    next_sequence: Option<u64>,
    /// Everything between `durable` and `appended`.
    tail: VecDeque<TailItem>,
    tail_bytes: u64,
    /// Segments left behind with unsynced content.
    left_dirty: Vec<S::File>,
    /// What the sync under way captured: the end, and the number of the last segment.
    syncing: Option<(Position, u32)>,
    /// Number of the last segment whose header is durable.
    durable_segment: u32,
    rewriting: bool,
    poison: Option<String>,
    compression: Compression,
    packer: Packer,
}

impl<S: Store> LogWriter<S> {
    /// Takes over a log that was begun or recovered. A recovered one is poisoned at first: what is not proven durable
    /// is to be rewritten before anything else, and no old file is ever continued.
    ///
    /// # Panics
    /// When the parts of the state contradict each other.
    #[must_use]
    pub fn new(state: LogState, compression: Compression) -> Self {
        let LogState {
            identity,
            segments,
            next_number,
            epoch,
            durable,
            tail,
            end,
            next_sequence,
        } = state;
        assert!(
            durable.lsn <= end.lsn,
            "the proven part of a log is not longer than the log"
        );
        assert!(!tail.is_empty() || durable == end, "an empty tail leads nowhere");
        assert_eq!(epoch.id, durable.epoch, "the durable end lies in its epoch");
        let last_epoch = tail.iter().rev().find_map(TailItem::epoch).unwrap_or(&epoch).clone();
        assert_eq!(last_epoch.id, end.epoch, "the end lies in the last epoch");
        let recovered = !segments.is_empty() || !tail.is_empty();
        let poison = recovered.then(|| "its end as found at start is not proven durable".to_owned());
        Self {
            identity,
            segments,
            current: None,
            prepared: None,
            unfit: Vec::new(),
            least_bytes: 0,
            requested: None,
            next_number: next_number.max(1),
            epoch: last_epoch,
            durable_epoch: epoch,
            appended: end,
            unchained: 0,
            durable,
            next_sequence,
            tail_bytes: tail.iter().map(TailItem::lsn_bytes).sum(),
            tail,
            left_dirty: Vec::new(),
            syncing: None,
            durable_segment: 0,
            rewriting: false,
            poison,
            compression,
            packer: Packer::default(),
        }
    }

    /// End of the log, in the kernel. Hashes what is not chained yet; who wants only to compare asks [`LogWriter::appended_lsn`].
    #[must_use]
    pub fn appended(&self) -> Position {
        let mut end = self.appended;
        for item in self.tail.range(self.tail.len() - self.unchained..) {
            if let TailItem::Record(record) = item {
                end.chain = record.chain_after(end.chain, end.epoch);
            }
        }
        end
    }

    /// End of the log, in the kernel.
    #[must_use]
    pub fn appended_lsn(&self) -> Lsn {
        self.appended.lsn
    }

    /// Brings the chain to the end of the log.
    pub fn chain_up(&mut self) {
        if self.unchained > 0 {
            self.appended = self.appended();
            self.unchained = 0;
        }
    }

    /// End of the log on stable storage.
    #[must_use]
    pub fn durable(&self) -> Position {
        self.durable
    }

    /// Bytes of history that are not durable yet; their payload is kept in memory.
    #[must_use]
    pub fn unsynced_bytes(&self) -> u64 {
        self.tail_bytes
    }

    /// The epoch that appends go to.
    #[must_use]
    pub fn epoch(&self) -> &EpochEntry {
        &self.epoch
    }

    /// Sequence number of the next record, if known.
    #[must_use]
    pub fn next_sequence(&self) -> Option<u64> {
        self.next_sequence
    }

    /// The segments, ascending; the last one is written.
    #[must_use]
    pub fn segments(&self) -> &[SegmentMeta] {
        &self.segments
    }

    /// What may be shown to other members: nothing that is not durable.
    #[must_use]
    pub fn view(&self, lineage: Lineage) -> LogView {
        let segments = self
            .segments
            .iter()
            .filter(|segment| segment.name.number <= self.durable_segment)
            .map(|segment| SegmentView {
                name: segment.name,
                start: segment.start,
            })
            .collect();
        LogView {
            segments,
            durable: self.durable,
            lineage,
        }
    }

    /// Why the log must be rewritten, if it must.
    #[must_use]
    pub fn poisoned(&self) -> Option<&str> {
        self.poison.as_deref()
    }

    /// Whether a sync would make anything durable and none is under way.
    #[must_use]
    pub fn needs_sync(&self) -> bool {
        let dirty = !self.left_dirty.is_empty() || self.current.as_ref().is_some_and(|current| current.dirty);
        dirty && self.syncing.is_none() && self.poison.is_none()
    }

    /// Applies to batches begun from now on.
    pub fn set_compression(&mut self, compression: Compression) {
        self.compression = compression;
    }

    /// Appends a record of this replica's own epoch and gives it the next sequence number.
    ///
    /// # Errors
    /// See [`AppendError`]. After `Poisoned` the record may or may not be in the file; it is not in the log.
    pub fn append(
        &mut self,
        kind: RecordKind,
        flags: u8,
        range: ByteRange,
        payload: Bytes,
        lamport: Lamport,
    ) -> Result<Appended, AppendError> {
        let sequence = self.next_sequence.unwrap_or(0);
        let header = RecordHeader {
            kind,
            flags,
            offset: range.offset,
            len: range.len,
            sequence,
            lamport,
        };
        self.append_record(Record { header, payload })
    }

    /// Appends a record as it stands in another member's log, proven to lead to `end`: it must be the next one.
    ///
    /// # Errors
    /// See [`AppendError`].
    ///
    /// # Panics
    /// When it does not lead from here to there.
    pub fn append_proven(&mut self, record: Record, end: Position) -> Result<Appended, AppendError> {
        self.chain_up();
        let appended = self.append_record(record)?;
        assert_eq!(
            (self.epoch.id, appended.end),
            (end.epoch, end.lsn),
            "a proven record leads to its end"
        );
        (self.appended, self.unchained) = (end, 0);
        Ok(appended)
    }

    /// Appends a record with its sequence number: it must be the next one.
    ///
    /// # Errors
    /// See [`AppendError`].
    ///
    /// # Panics
    /// Never: a segment is there once there is room.
    pub fn append_record(&mut self, record: Record) -> Result<Appended, AppendError> {
        self.check_writable()?;
        let header = &record.header;
        header.check()?;
        if header.payload_len() != record.payload.len() as u64 {
            return Err(FormatError::Field("length differs from the payload").into());
        }
        if let Some(expected) = self.next_sequence
            && expected != header.sequence
        {
            return Err(AppendError::NotNext {
                found: header.sequence,
                expected,
            });
        }
        self.make_room(record.payload.len(), header)?;
        let start = self.appended.lsn;
        if let Err(error) = self.write_record(&record) {
            let name = self.segments.last().expect("a segment is being written").name;
            return Err(self.poison(format!("write to {name}: {error}")));
        }
        let end = start.advance(record.lsn_bytes());
        self.appended.lsn = end;
        self.next_sequence = Some(record.header.sequence + 1);
        self.tail_bytes += record.lsn_bytes();
        self.tail.push_back(TailItem::Record(record));
        self.unchained += 1;
        Ok(Appended { start, end })
    }

    /// The one write of a record: with the batch header when it opens a batch.
    fn write_record(&mut self, record: &Record) -> io::Result<()> {
        if self.current.as_ref().is_some_and(|current| current.batch.is_none()) {
            self.chain_up();
        }
        let current = self.current.as_mut().expect("make_room found a segment");
        let (opening, (compression, batch_crc)) = if let Some(batch) = current.batch {
            (None, batch)
        } else {
            current.offset = align_up(current.offset);
            let header = BatchHeader {
                segment: self.segments.last().expect("a segment is being written").name,
                file_offset: current.offset,
                start: self.appended,
                first_sequence: record.header.sequence,
                durable: self.durable.lsn,
                compression: self.compression,
            };
            let (bytes, crc) = header.encode(current.crc);
            (Some(bytes), (self.compression, crc))
        };
        let stored = self.packer.pack(compression, &record.payload);
        let header = record.header.encode(stored, batch_crc);
        let opening_len = opening.as_ref().map_or(0, |batch| batch.len());
        let written = (opening_len + header.len() + stored.len()) as u64;
        let mark = end_mark(current.offset + written, current.file_bytes);
        // From here on the file may have changed, also after an error.
        current.dirty = true;
        match &opening {
            Some(batch) => current.file.write_at(&[batch, &header, stored, mark], current.offset)?,
            None => current.file.write_at(&[&header, stored, mark], current.offset)?,
        }
        current.batch = Some((compression, batch_crc));
        current.offset += written;
        Ok(())
    }

    fn check_writable(&self) -> Result<(), AppendError> {
        match &self.poison {
            Some(cause) => Err(AppendError::Poisoned { cause: cause.clone() }),
            None => Ok(()),
        }
    }

    fn poison(&mut self, cause: String) -> AppendError {
        tracing::warn!(%cause, "log poisoned");
        self.poison.get_or_insert_with(|| cause.clone());
        AppendError::Poisoned { cause }
    }

    /// Makes sure that the current segment takes a record with this payload, if need be by going to the next one.
    fn make_room(&mut self, payload_len: usize, header: &RecordHeader) -> Result<(), AppendError> {
        let wanted = (HEADER_LEN + payload_len) as u64;
        let fits = |current: &Current<S::File>| {
            let begin = match current.batch {
                Some(_) => current.offset,
                None => align_up(current.offset) + BATCH_HEADER_BYTES as u64,
            };
            begin + wanted <= current.file_bytes
        };
        if self.current.as_ref().is_some_and(fits) {
            return Ok(());
        }
        let room = FIRST_BATCH_OFFSET + BATCH_HEADER_BYTES as u64 + wanted;
        match &self.prepared {
            None => Err(AppendError::NeedSegment),
            Some(prepared) if prepared.file_bytes < room => {
                // It was made for smaller records: of another segment size, or of a member with larger ones.
                self.unfit.push(prepared.name);
                self.prepared = None;
                self.least_bytes = align_up(room);
                Err(AppendError::NeedSegment)
            }
            Some(_) => self.switch_segment(Some(header.sequence), header.lamport),
        }
    }

    /// Continues in the prepared segment.
    fn switch_segment(&mut self, first_sequence: Option<u64>, lamport: Lamport) -> Result<(), AppendError> {
        let Some(Prepared { name, file, file_bytes }) = self.prepared.take() else {
            return Err(AppendError::NeedSegment);
        };
        self.chain_up();
        let header = SegmentHeader {
            identity: self.identity,
            name,
            previous: self.segments.last().map_or(0, |last| last.name.number),
            start_lsn: self.appended.lsn,
            start_chain: self.appended.chain,
            first_sequence,
            durable: self.durable.lsn,
            lamport,
            epoch: self.epoch.clone(),
        };
        let (bytes, crc) = header.encode();
        let written = file.write_at(&[&bytes], 0);
        if let Some(old) = self.current.take()
            && old.dirty
        {
            self.left_dirty.push(old.file);
        }
        self.segments.push(SegmentMeta {
            name,
            start: self.appended,
            file_bytes,
        });
        let offset = FIRST_BATCH_OFFSET;
        self.current = Some(Current {
            file,
            crc,
            file_bytes,
            offset,
            batch: None,
            dirty: true,
        });
        written.map_err(|error| self.poison(format!("write to {name}: {error}")))
    }

    /// Begins an epoch at the end of the log, in a segment of its own.
    ///
    /// # Errors
    /// `NeedSegment` (nothing happened) or `Poisoned` (the epoch has begun and is part of the tail to be rewritten).
    ///
    /// # Panics
    /// When the entry does not continue this log.
    pub fn start_epoch(&mut self, entry: EpochEntry) -> Result<(), AppendError> {
        self.chain_up();
        assert_eq!(
            entry.parent, self.appended,
            "an epoch begins at the end of the one before"
        );
        self.check_writable()?;
        if self.prepared.is_none() {
            return Err(AppendError::NeedSegment);
        }
        let lamport = entry.lamport;
        self.appended.epoch = entry.id;
        self.epoch = entry.clone();
        self.next_sequence = Some(0);
        self.tail.push_back(TailItem::Epoch(entry));
        self.switch_segment(Some(0), lamport)
    }

    /// Continues in a new segment, unless the current one is empty.
    ///
    /// # Errors
    /// `NeedSegment` or `Poisoned`.
    pub fn rotate(&mut self, lamport: Lamport) -> Result<(), AppendError> {
        self.check_writable()?;
        self.chain_up();
        let empty = self.segments.last().is_some_and(|last| last.start == self.appended);
        if self.current.is_some() && empty {
            Ok(())
        } else {
            self.switch_segment(self.next_sequence, lamport)
        }
    }

    /// Begins a sync if one is needed and none is under way: the files to sync, in any order. The captured end becomes durable with
    /// [`LogWriter::sync_done`]; appends go on meanwhile, in a new batch behind the next block boundary.
    pub fn begin_sync(&mut self) -> Option<Vec<S::File>> {
        if !self.needs_sync() {
            return None;
        }
        self.chain_up();
        let mut files = std::mem::take(&mut self.left_dirty);
        if let Some(current) = &mut self.current
            && std::mem::take(&mut current.dirty)
        {
            current.batch = None;
            files.push(current.file.clone());
        }
        let last = self.segments.last().map_or(0, |last| last.name.number);
        self.syncing = Some((self.appended, last));
        Some(files)
    }

    /// The sync came back. Even success counts only up to the end captured before it began.
    ///
    /// # Panics
    /// When no sync is under way.
    pub fn sync_done(&mut self, result: Result<(), String>) -> SyncResult {
        let (end, segment) = self.syncing.take().expect("sync_done answers a begin_sync");
        match result {
            Ok(()) => {
                self.advance_durable(end);
                self.durable_segment = segment;
                SyncResult::Durable(end)
            }
            Err(cause) => {
                self.poison(format!("fdatasync: {cause}"));
                SyncResult::Poisoned
            }
        }
    }

    fn advance_durable(&mut self, end: Position) {
        assert!(
            self.durable.lsn <= end.lsn && end.lsn <= self.appended.lsn,
            "durable only grows, up to appended"
        );
        let mut at = self.durable.lsn;
        let mut epoch = self.durable.epoch;
        while (at, epoch) != (end.lsn, end.epoch) {
            let item = self.tail.pop_front().expect("the tail leads to every captured end");
            at = at.advance(item.lsn_bytes());
            self.tail_bytes -= item.lsn_bytes();
            if let TailItem::Epoch(entry) = item {
                epoch = entry.id;
                self.durable_epoch = entry;
            }
        }
        self.durable = end;
    }
}
