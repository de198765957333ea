//! The log as a whole on the simulated disk: a driver that does what an owner does, and the history it expects.

mod corruption;
mod crashes;
mod failures;
mod golden;
mod reading;

use super::reader::{LogReader, Next};
use super::scan::{Scan, ScanError, ScanParams, scan};
use super::writer::LogState;
use super::{AppendError, LogWriter, SyncResult};
use crate::api::{Compression, LogView};
use crate::format::record::{Record, RecordKind};
use crate::format::segment::LogIdentity;
use crate::lineage::{Cause, EpochEntry, Lineage};
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::store_sim::SimStore;
use crate::types::{ByteRange, ClusterId, EpochId, Lamport, Lsn, Position, ReplicaId, ResourceId};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use uuid::Uuid;

const SEGMENT_BYTES: u64 = 48 << 10;

fn identity() -> LogIdentity {
    LogIdentity {
        cluster: ClusterId(Uuid::from_u128(0xc1)),
        resource: ResourceId(Uuid::from_u128(0x4e)),
        replica: ReplicaId(Uuid::from_u128(0xabcd_0123 << 96)),
    }
}

fn epoch(number: u64, parent: Position, cause: Cause) -> EpochEntry {
    EpochEntry {
        id: EpochId(Uuid::from_u128(0xe0_0000 + u128::from(number))),
        parent,
        origin: identity().replica,
        cause,
        lamport: Lamport(number),
    }
}

/// What happened, as far as the outside was told.
#[derive(Debug, Clone, Default)]
struct History {
    /// Every record of which anything may be in the files, with the position behind it.
    records: Vec<(Record, Position)>,
    /// Epochs that were begun, in order.
    epochs: Vec<EpochEntry>,
}

/// A process that writes a log.
struct Driver {
    store: SimStore,
    writer: LogWriter<SimStore>,
    history: History,
    rng: SmallRng,
    clock: u64,
    compression: Compression,
    /// Segments are made of files that were other segments before.
    recycles: bool,
}

/// The process must stop: dead, or the log is poisoned.
#[derive(Debug)]
struct Halt;

impl Driver {
    /// A new log in its first epoch, nothing written yet.
    fn begin(store: &SimStore, seed: u64, compression: Compression) -> Self {
        let first = epoch(1, Position::default(), Cause::Create);
        let start = Position {
            epoch: first.id,
            ..Position::default()
        };
        let state = LogState::empty(identity(), 1, first.clone(), start);
        Self {
            store: store.clone(),
            writer: LogWriter::new(state, compression),
            history: History {
                records: Vec::new(),
                epochs: vec![first],
            },
            rng: SmallRng::seed_from_u64(seed),
            clock: 1000,
            compression,
            recycles: false,
        }
    }

    /// Prepares a segment when one is wanted, as the pool does.
    fn prepare(&mut self) -> Result<(), Halt> {
        let Some(name) = self.writer.next_prepared() else {
            return Ok(());
        };
        if let Ok(file) = self.store.create(&FileId::Segment(name), SEGMENT_BYTES) {
            if self.recycles {
                self.leave_over(name);
            }
            assert!(self.writer.add_prepared(name, file, SEGMENT_BYTES));
            Ok(())
        } else {
            self.writer.prepare_failed(name);
            Err(Halt)
        }
    }

    /// Behind the header stands what the segment before holds (and noise in the first one): the very batches and records that could most
    /// easily be taken for those of the new segment.
    fn leave_over(&mut self, name: SegmentName) {
        let last = self.writer.segments().last();
        let last = last.and_then(|last| self.store.peek(&FileId::Segment(last.name)));
        let mut old = last.unwrap_or_else(|| {
            let mut noise = vec![0; usize::try_from(SEGMENT_BYTES).unwrap()];
            SmallRng::seed_from_u64(5).fill(&mut noise[..]);
            noise
        });
        old.truncate(usize::try_from(SEGMENT_BYTES).unwrap());
        self.store.poke(&FileId::Segment(name), 4096, &old[4096..]);
    }

    fn payload(&mut self) -> Bytes {
        let len = *[512, 1024, 4096, 4096, 6144, 12_288]
            .get(self.rng.random_range(0..6))
            .unwrap();
        let mut bytes = vec![0; len];
        // Half of it compresses.
        self.rng.fill(&mut bytes[len / 2..]);
        Bytes::from(bytes)
    }

    /// Appends a record of a random kind.
    fn append(&mut self) -> Result<(), Halt> {
        let kind = if self.rng.random_ratio(1, 5) {
            RecordKind::Discard
        } else {
            RecordKind::Write
        };
        let payload = if kind.has_payload() {
            self.payload()
        } else {
            Bytes::new()
        };
        let len = if kind.has_payload() { payload.len() as u64 } else { 8192 };
        let offset = self.rng.random_range(0..64) * 4096;
        self.append_this(kind, ByteRange { offset, len }, &payload)
    }

    fn append_this(&mut self, kind: RecordKind, range: ByteRange, payload: &Bytes) -> Result<(), Halt> {
        self.clock += 1;
        let lamport = Lamport(self.clock);
        loop {
            let before = self.writer.appended();
            let sequence = self.writer.next_sequence().unwrap();
            let outcome = self.writer.append(kind, 0, range, payload.clone(), lamport);
            if !matches!(outcome, Err(AppendError::NeedSegment)) {
                // Also after an error the record may be in the file.
                let header = crate::format::record::RecordHeader {
                    kind,
                    flags: 0,
                    offset: range.offset,
                    len: range.len,
                    sequence,
                    lamport,
                };
                let record = Record {
                    header,
                    payload: payload.clone(),
                };
                let chain = record.chain_after(before.chain, before.epoch);
                let end = Position {
                    epoch: before.epoch,
                    lsn: before.lsn.advance(record.lsn_bytes()),
                    chain,
                };
                self.history.records.push((record, end));
            }
            match outcome {
                Ok(appended) => {
                    let end = self.history.records.last().unwrap().1;
                    assert_eq!((appended.end, self.writer.appended()), (end.lsn, end));
                    if end.lsn.0.is_multiple_of(3) {
                        self.writer.chain_up();
                    }
                    return Ok(());
                }
                Err(AppendError::NeedSegment) => self.prepare()?,
                Err(AppendError::Poisoned { .. }) => return Err(Halt),
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn sync(&mut self) -> Result<(), Halt> {
        let Some(files) = self.writer.begin_sync() else {
            return Ok(());
        };
        let result = files
            .iter()
            .try_for_each(StoreFile::sync)
            .map_err(|error| error.to_string());
        match self.writer.sync_done(result) {
            SyncResult::Durable(_) => Ok(()),
            SyncResult::Poisoned => Err(Halt),
        }
    }

    /// A sync that takes its time: appends go on while it is under way, and it covers none of them.
    fn sync_while_appending(&mut self) -> Result<(), Halt> {
        let Some(files) = self.writer.begin_sync() else {
            return Ok(());
        };
        let captured = self.writer.appended();
        let result = files
            .iter()
            .try_for_each(StoreFile::sync)
            .map_err(|error| error.to_string());
        let appended = self.append().and_then(|()| self.append());
        assert!(self.writer.begin_sync().is_none(), "one sync at a time");
        match self.writer.sync_done(result) {
            SyncResult::Durable(end) => assert_eq!(end, captured),
            SyncResult::Poisoned => return Err(Halt),
        }
        appended
    }

    fn start_epoch(&mut self, cause: Cause) -> Result<(), Halt> {
        self.prepare()?;
        let entry = epoch(self.history.epochs.len() as u64 + 1, self.writer.appended(), cause);
        self.history.epochs.push(entry.clone());
        self.writer.start_epoch(entry).map_err(|_| Halt)
    }

    /// Rewrites a poisoned tail. The log is whole again afterwards, or `Halt` if the store does not let us.
    fn rewrite(&mut self) -> Result<(), Halt> {
        let rewrite = self
            .writer
            .begin_rewrite(SEGMENT_BYTES)
            .expect("only called when poisoned");
        if let Ok(done) = rewrite.run(&self.store) {
            let obsolete = self.writer.finish_rewrite(done);
            assert_eq!(self.writer.durable(), self.writer.appended());
            // What may or may not have been in the file is not in the log now.
            let end = self.writer.appended().lsn;
            self.history.records.retain(|(_, position)| position.lsn <= end);
            self.remove(&obsolete)
        } else {
            self.writer.rewrite_failed();
            Err(Halt)
        }
    }

    fn remove(&self, names: &[SegmentName]) -> Result<(), Halt> {
        let removed = names
            .iter()
            .try_for_each(|name| self.store.remove(&FileId::Segment(*name)));
        removed.and_then(|()| self.store.sync_dir()).map_err(|_| Halt)
    }

    /// Retention: what lies below goes.
    fn forget_below(&mut self, lsn: Lsn) -> Result<(), Halt> {
        let names = self.writer.forget_segments_below(lsn);
        self.remove(&names)
    }

    fn view(&self) -> LogView {
        self.writer.view(Lineage::default())
    }

    /// A new process finds the log as it is on the disk. `history` is what the outside knows.
    fn recover(store: &SimStore, from: Position, before: &Driver) -> Result<(Scan, Self), ScanError> {
        let mut seen = Vec::new();
        let params = ScanParams {
            identity: identity(),
            from,
            first_segment: 1,
        };
        let found = scan(store, &params, &mut |record, end| seen.push((record.clone(), end)))?;
        check_prefix(&before.history, from, &found, &seen);
        let mut history = before.history.clone();
        history.records.retain(|(_, end)| end.lsn <= found.end.lsn);
        // An epoch of which nothing is left never was.
        history
            .epochs
            .retain(|entry| found.epochs.contains(entry) || entry.parent.lsn < found.end.lsn);
        let copy = scan(store, &params, &mut |_, _| {})?;
        let (_, state) = copy.into_state();
        let driver = Self {
            store: store.clone(),
            writer: LogWriter::new(state, before.compression),
            history,
            rng: before.rng.clone(),
            clock: before.clock,
            compression: before.compression,
            recycles: before.recycles,
        };
        Ok((found, driver))
    }

    /// Everything from `from` to the durable end as a reader gets it.
    fn read_all(&self, from: Position) -> (Vec<Record>, Vec<EpochEntry>) {
        let view = self.view();
        let mut reader = LogReader::open(self.store.clone(), &view, from).unwrap();
        let (mut records, mut epochs) = (Vec::new(), Vec::new());
        loop {
            match reader.next(&view, Lsn(u64::MAX), 10_000).unwrap() {
                Next::Records(chunk) => records.extend(chunk.into_records()),
                Next::Epoch(entry) => epochs.push(entry),
                Next::End => break,
            }
        }
        assert_eq!(reader.position(), view.durable);
        (records, epochs)
    }

    /// Records behind `from`, up to the durable end, as they were appended.
    fn expected(&self, from: Position) -> Vec<Record> {
        let durable = self.writer.durable().lsn;
        let range = |end: &Position| end.lsn > from.lsn && end.lsn <= durable;
        self.history
            .records
            .iter()
            .filter(|(_, end)| range(end))
            .map(|(record, _)| record.clone())
            .collect()
    }
}

/// What a scan saw is what was appended, in order, up to its end: nothing invented, nothing skipped.
fn check_prefix(history: &History, from: Position, found: &Scan, seen: &[(Record, Position)]) {
    let behind = |end: &Position| end.lsn > from.lsn && end.lsn <= found.end.lsn;
    let expected: Vec<_> = history.records.iter().filter(|(_, end)| behind(end)).cloned().collect();
    assert_eq!(
        seen.len(),
        expected.len(),
        "scan saw up to {}, history {:?}",
        found.end,
        expected.last().map(|e| e.1)
    );
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen.1, expected.1);
        assert!(seen.0 == expected.0, "record before {} differs", seen.1);
    }
    let is_known_end = found.end.lsn == from.lsn
        || history
            .records
            .iter()
            .any(|(_, end)| end.lsn == found.end.lsn && end.chain == found.end.chain);
    assert!(
        is_known_end || found.end.lsn < from.lsn,
        "the log ends at {}, where it never ended",
        found.end
    );
}
