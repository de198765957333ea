//! Appends records to the current segment, one `pwritev` each, and keeps track of what is durable.
//!
//! # How it goes
//! An append writes its record behind the last one; the first of a batch brings the batch header along, in the same write.
//! [`LogWriter::begin_sync`] closes the batch and moves the append position to the next block, so that no sector of it is
//! ever written again; when the sync is done, everything up to the captured end is durable. At most one sync is under way.
//! Segments are made by somebody else, beforehand ([`LogWriter::next_prepared`], [`LogWriter::add_prepared`]).
//!
//! # When something fails
//! After any failed write or sync the files concerned are never written again. Records that were not durable are
//! still here, and [`LogWriter::begin_rewrite`] turns them into a [`TailRewrite`]: work that puts them into a new segment
//! that begins at the durable end. Recovery after a restart is the same thing: a writer that begins poisoned.
//!
//! Invariants: `durable ≤ appended`; the kept tail leads exactly from `durable` to `appended`; no byte at or below a position that
//! was captured by `begin_sync` is written afterwards.

use super::rewrite::{Piece, Rewritten, TailItem, TailRewrite};
use super::{SegmentMeta, align_up};
use crate::api::{Compression, LogView, SegmentView};
use crate::chain;
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

mod pack;
pub(super) use pack::{Packer, unpack};

/// Where an appended record stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Its first byte.
    pub start: Lsn,
    /// Just behind it.
    pub end: Position,
}

/// Why nothing was appended; the log is as before.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The current segment is full (or there is none) and no other is prepared yet.
    #[error("the log needs a new segment: hand one over with add_prepared, then append again")]
    NeedSegment,
    /// The log cannot be written until its tail is rewritten.
    #[error("the log cannot be written ({cause}): rewrite its tail into a new segment")]
    Poisoned {
        /// What the system said.
        cause: String,
    },
    /// A record from elsewhere that is not the next one.
    #[error("record {found} does not follow: number {expected} of this epoch is next")]
    NotNext {
        /// Its sequence number.
        found: u64,
        /// The expected one.
        expected: u64,
    },
    /// A record that the format cannot hold.
    #[error("record refused: {0}")]
    Format(#[from] FormatError),
}

/// What has become of a sync.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SyncResult {
    /// Everything up to here is durable.
    Durable(Position),
    /// It failed: the log is poisoned.
    Poisoned,
}

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
    /// Handed out by `next_prepared`, not yet returned.
    requested: Option<SegmentName>,
    next_number: u32,
    /// The epoch at the end.
    epoch: EpochEntry,
    /// The epoch at `durable`.
    durable_epoch: EpochEntry,
    appended: Position,
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

/// Where a log stands that is opened or begun.
#[derive(Debug)]
pub struct LogState {
    /// Whose log it is.
    pub identity: LogIdentity,
    /// The segments that hold it, ascending.
    pub segments: Vec<SegmentMeta>,
    /// Above the number of every file that exists, whatever is in it.
    pub next_number: u32,
    /// The epoch at `durable`; the tail names later ones.
    pub epoch: EpochEntry,
    /// How far it is proven to be on stable storage.
    pub durable: Position,
    /// What follows up to the end, readable but unproven.
    pub tail: VecDeque<TailItem>,
    /// The end.
    pub end: Position,
    /// Sequence of the next record; `None` when no record of this epoch was ever seen here.
    pub next_sequence: Option<u64>,
}

impl LogState {
    /// A log that begins at `start`, without any segment: the position where `epoch` begins, or one within it (sync target).
    ///
    /// # Panics
    /// When `start` names another epoch.
    #[must_use]
    pub fn empty(identity: LogIdentity, next_number: u32, epoch: EpochEntry, start: Position) -> Self {
        assert_eq!(epoch.id, start.epoch, "a log begins in the epoch it names");
        let at_start = epoch.parent.lsn == start.lsn && epoch.parent.chain == start.chain;
        Self {
            identity,
            segments: Vec::new(),
            next_number,
            epoch,
            durable: start,
            tail: VecDeque::new(),
            end: start,
            next_sequence: at_start.then_some(0),
        }
    }
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
            requested: None,
            next_number: next_number.max(1),
            epoch: last_epoch,
            durable_epoch: epoch,
            appended: end,
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

    /// End of the log, in the kernel.
    #[must_use]
    pub fn appended(&self) -> Position {
        self.appended
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

    /// Above the number of every segment that was ever named here.
    #[must_use]
    pub fn next_number(&self) -> u32 {
        self.next_number
    }

    /// Takes back the prepared segment: the log ends, and its file is to be removed.
    pub fn take_prepared(&mut self) -> Option<SegmentName> {
        self.prepared.take().map(|prepared| prepared.name)
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

    /// Appends a record as it stands in another member's log: it must be the next one.
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
        let start = self.appended;
        if let Err(error) = self.write_record(&record) {
            let name = self.segments.last().expect("a segment is being written").name;
            return Err(self.poison(format!("write to {name}: {error}")));
        }
        self.appended.lsn = start.lsn.advance(record.lsn_bytes());
        self.appended.chain = chain::advance(start.chain, self.epoch.id, &record.header, &record.payload);
        self.next_sequence = Some(record.header.sequence + 1);
        self.tail_bytes += record.lsn_bytes();
        self.tail.push_back(TailItem::Record(record));
        Ok(Appended {
            start: start.lsn,
            end: self.appended,
        })
    }

    /// The one write of a record: with the batch header when it opens a batch.
    fn write_record(&mut self, record: &Record) -> io::Result<()> {
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
        let mut written = (header.len() + stored.len()) as u64;
        // From here on the file may have changed, also after an error.
        current.dirty = true;
        match &opening {
            Some(batch) => {
                written += batch.len() as u64;
                current.file.write_at(&[batch, &header, stored], current.offset)?;
            }
            None => current.file.write_at(&[&header, stored], current.offset)?,
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
                Err(FormatError::Field("payload is larger than a segment").into())
            }
            Some(_) => self.switch_segment(Some(header.sequence), header.lamport),
        }
    }

    /// Continues in the prepared segment.
    fn switch_segment(&mut self, first_sequence: Option<u64>, lamport: Lamport) -> Result<(), AppendError> {
        let Some(Prepared { name, file, file_bytes }) = self.prepared.take() else {
            return Err(AppendError::NeedSegment);
        };
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

    /// Name of the segment that should be created now, so that one is always prepared ahead. Each name is handed out once:
    /// answer it with `add_prepared` or `prepare_failed`.
    pub fn next_prepared(&mut self) -> Option<SegmentName> {
        if self.prepared.is_some() || self.requested.is_some() {
            return None;
        }
        self.requested = Some(self.new_name());
        self.requested
    }

    fn new_name(&mut self) -> SegmentName {
        let number = self.next_number;
        self.next_number = number.checked_add(1).expect("a log has fewer than 2^32 segments");
        SegmentName {
            number,
            origin: self.identity.origin(),
        }
    }

    /// Takes a created segment. `false`: it is no longer wanted and its file should be removed.
    #[must_use]
    pub fn add_prepared(&mut self, name: SegmentName, file: S::File, file_bytes: u64) -> bool {
        if self.requested != Some(name) {
            return false;
        }
        self.requested = None;
        self.prepared = Some(Prepared { name, file, file_bytes });
        true
    }

    /// The creation failed; the next attempt gets another name.
    pub fn prepare_failed(&mut self, name: SegmentName) {
        if self.requested == Some(name) {
            self.requested = None;
        }
    }

    /// Segments whose content lies below `lsn` leave the log; their files are to be removed in this order. Never the last one,
    /// and not the end of an epoch exactly at `lsn`: a member may stand there in that epoch.
    pub fn forget_segments_below(&mut self, lsn: Lsn) -> Vec<SegmentName> {
        let limit = lsn.min(self.durable.lsn);
        let passed = |pair: &&[SegmentMeta]| {
            let end = pair[1].start;
            end.lsn < limit || (end.lsn == limit && end.epoch == pair[0].start.epoch)
        };
        let gone = self.segments.windows(2).take_while(passed).count();
        self.segments.drain(..gone).map(|segment| segment.name).collect()
    }

    /// Work that brings a poisoned log back: everything above the durable end goes into new segments, the last with at least
    /// `segment_bytes`. `None` when the log is not poisoned, or a sync or another rewrite is under way.
    pub fn begin_rewrite(&mut self, segment_bytes: u64) -> Option<TailRewrite> {
        if self.poison.is_none() || self.syncing.is_some() || self.rewriting {
            return None;
        }
        self.rewriting = true;
        self.requested = None;
        let mut pieces = self.pieces();
        let names = pieces.iter().map(|_| self.new_name()).collect::<Vec<_>>();
        pieces.iter_mut().zip(names).for_each(|(piece, name)| piece.name = name);
        Some(TailRewrite {
            identity: self.identity,
            previous: self.survivors().last().map_or(0, |segment| segment.name.number),
            durable: self.durable.lsn,
            next_sequence: self.next_sequence,
            compression: self.compression,
            segment_bytes,
            pieces,
        })
    }

    /// The tail, one piece per epoch.
    fn pieces(&self) -> Vec<Piece> {
        let mut at = self.durable;
        let mut pieces = vec![Piece::new(self.durable_epoch.clone(), at)];
        for item in &self.tail {
            match item {
                TailItem::Epoch(entry) => {
                    at.epoch = entry.id;
                    // An epoch that ends where it begins needs a segment only if no other one tells of it.
                    let before = pieces.last().expect("there is a first piece");
                    let known = self
                        .survivors()
                        .iter()
                        .any(|segment| segment.start.epoch == before.epoch.id);
                    if before.records.is_empty() && known {
                        pieces.pop();
                    }
                    pieces.push(Piece::new(entry.clone(), at));
                }
                TailItem::Record(record) => {
                    at.lsn = at.lsn.advance(record.lsn_bytes());
                    at.chain = chain::advance(at.chain, at.epoch, &record.header, &record.payload);
                    pieces
                        .last_mut()
                        .expect("there is a first piece")
                        .records
                        .push(record.clone());
                }
            }
        }
        assert_eq!(at, self.appended, "the tail leads from durable to appended");
        pieces
    }

    /// The segments that hold durable content, or tell of a durable epoch without any: they stay after a rewrite.
    fn survivors(&self) -> &[SegmentMeta] {
        let stays = |segment: &&SegmentMeta| {
            let start = segment.start;
            let is_witness = start.lsn == self.durable.lsn && start.epoch != self.durable.epoch;
            start.lsn < self.durable.lsn || (is_witness && segment.name.number <= self.durable_segment)
        };
        let count = self.segments.iter().take_while(stays).count();
        &self.segments[..count]
    }

    /// Takes over what a [`TailRewrite`] made. The files of the returned names are to be removed: they hold nothing of this
    /// log any more.
    ///
    /// # Panics
    /// When no rewrite is under way.
    pub fn finish_rewrite(&mut self, done: Rewritten<S::File>) -> Vec<SegmentName> {
        assert!(
            std::mem::take(&mut self.rewriting),
            "finish_rewrite answers a begin_rewrite"
        );
        let keep = self.survivors().len();
        let mut obsolete: Vec<SegmentName> = self.segments.drain(keep..).map(|segment| segment.name).collect();
        obsolete.extend(self.prepared.take().map(|prepared| prepared.name));
        self.segments.extend(&done.segments);
        let (file, crc, offset) = done.last;
        let file_bytes = done.segments.last().expect("a rewrite makes a segment").file_bytes;
        self.current = Some(Current {
            file,
            crc,
            file_bytes,
            offset,
            batch: None,
            dirty: false,
        });
        self.left_dirty.clear();
        self.advance_durable(self.appended);
        self.durable_segment = self.segments.last().map_or(0, |last| last.name.number);
        self.poison = None;
        obsolete
    }

    /// The rewrite failed; another one may be tried.
    ///
    /// # Panics
    /// When no rewrite is under way.
    pub fn rewrite_failed(&mut self) {
        assert!(
            std::mem::take(&mut self.rewriting),
            "rewrite_failed answers a begin_rewrite"
        );
    }
}
