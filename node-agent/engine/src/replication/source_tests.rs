//! The sender proves, serves in order, and never beyond what is durable.

use super::*;
use crate::api::{Compression, SegmentView};
use crate::format::record::{Record, RecordHeader, RecordKind};
use crate::lineage::Cause;
use crate::replication::histories::prefix;
use crate::store::SegmentName;
use crate::types::{Chain, EpochId, Lamport, ReplicaId};
use bytes::Bytes;
use uuid::Uuid;

/// A log in memory: records with their start positions, over several epochs.
#[derive(Debug, Clone, Default)]
pub(crate) struct MemLog {
    pub(crate) lineage: Lineage,
    pub(crate) records: Vec<(Position, Record)>,
    pub(crate) end: Position,
}

impl MemLog {
    pub(crate) fn begin_epoch(&mut self, number: u128) -> EpochEntry {
        let entry = EpochEntry {
            id: EpochId(Uuid::from_u128(number)),
            parent: self.end,
            origin: ReplicaId(Uuid::from_u128(number)),
            cause: Cause::Create,
            lamport: Lamport(1),
        };
        self.end.epoch = entry.id;
        self.lineage.0.push(entry.clone());
        entry
    }

    pub(crate) fn write(&mut self, byte: u8, len: usize) {
        let header = RecordHeader {
            kind: RecordKind::Write,
            flags: 0,
            offset: 0,
            len: len as u64,
            sequence: self
                .records
                .iter()
                .filter(|(start, _)| start.epoch == self.end.epoch)
                .count() as u64,
            lamport: Lamport(1),
        };
        self.push(Record {
            header,
            payload: Bytes::from(vec![byte; len]),
        });
    }

    pub(crate) fn push(&mut self, record: Record) {
        let start = self.end;
        self.end.lsn = start.lsn.advance(record.lsn_bytes());
        self.end.chain = record.chain_after(start.chain, start.epoch);
        self.records.push((start, record));
    }

    pub(crate) fn view(&self) -> LogView {
        self.view_to(self.end)
    }

    pub(crate) fn view_to(&self, durable: Position) -> LogView {
        let segments = vec![SegmentView {
            name: SegmentName { number: 1, origin: 0 },
            start: Position::default(),
        }];
        LogView {
            segments,
            durable,
            lineage: prefix(&self.lineage, durable),
        }
    }
}

impl LogReader for MemLog {
    fn prove(&mut self, _view: &LogView, at: Position) -> Result<(), Refused> {
        let found = at == Position::default()
            || at == self.end
            || self.lineage.0.iter().any(|entry| entry.parent == at)
            || self.records.iter().any(|(start, _)| *start == at);
        if found {
            Ok(())
        } else {
            Err(Refused::Unprovable {
                at,
                have: "something else".into(),
            })
        }
    }

    fn read(
        &mut self,
        _view: &LogView,
        at: Position,
        until: Lsn,
        max_bytes: usize,
    ) -> Result<Option<LogChunk>, Refused> {
        let mut bytes = 0;
        let fits = |(start, record): &&(Position, Record)| {
            let take = start.epoch == at.epoch
                && start.lsn >= at.lsn
                && start.lsn.0 + record.lsn_bytes() <= until.0
                && bytes < max_bytes;
            bytes += if take { record.payload.len() } else { 0 };
            take
        };
        let first = self.records.iter().skip_while(|(start, _)| start.lsn < at.lsn);
        let records: Vec<Record> = first.take_while(fits).map(|(_, record)| record.clone()).collect();
        Ok((!records.is_empty()).then(|| LogChunk::build(at, records).unwrap()))
    }
}

fn open_at(log: &MemLog, from: Position) -> FetchOpen {
    FetchOpen {
        from,
        lineage: prefix(&log.lineage, from),
        until: None,
        compression: Compression::None,
    }
}

fn two_epochs() -> (MemLog, Position) {
    let mut log = MemLog::default();
    log.begin_epoch(1);
    log.write(1, 512);
    log.write(2, 512);
    let end_of_first = log.end;
    log.begin_epoch(2);
    log.write(3, 1024);
    (log, end_of_first)
}

#[test]
fn a_stream_proves_first_and_then_carries_all_epochs_to_the_durable_end() {
    let (log, _) = two_epochs();
    let view = log.view();
    let (mut stream, first) = SourceStream::open(log.clone(), &view, open_at(&log, Position::default())).unwrap();
    assert_eq!(
        first,
        FetchItem::Proven {
            at: Position::default()
        }
    );
    let mut kinds = Vec::new();
    while let Some(item) = stream.next(&view).unwrap() {
        kinds.push(match item {
            FetchItem::Epoch(entry) => format!("epoch {}", entry.id.0.as_u128()),
            FetchItem::Records(claim) => {
                let chunk = LogChunk::verify(claim).unwrap();
                format!("{} records", chunk.records().len())
            }
            other => panic!("unexpected {other:?}"),
        });
    }
    assert_eq!(kinds, ["epoch 1", "2 records", "epoch 2", "1 records"]);
    assert_eq!(stream.at(), log.end);
}

#[test]
fn a21_nothing_beyond_the_durable_end_is_sent_and_the_rest_follows_when_it_is_durable() {
    let (mut log, first_end) = two_epochs();
    log.write(4, 512);
    let durable = log.records[2].0;
    assert_eq!(durable.lsn, first_end.lsn);
    let view = log.view_to(durable);
    let (mut stream, _) = SourceStream::open(log.clone(), &view, open_at(&log, first_end)).unwrap();
    assert!(matches!(stream.next(&view).unwrap(), Some(FetchItem::Epoch(_))));
    assert_eq!(stream.next(&view).unwrap(), None);
    assert!(matches!(stream.next(&log.view()).unwrap(), Some(FetchItem::Records(_))));
    assert_eq!(stream.at(), log.end);
}

#[test]
fn a39_a_position_that_is_not_ours_is_never_proven() {
    let (log, first_end) = two_epochs();
    let mut forged = first_end;
    forged.lsn = Lsn(first_end.lsn.0 - 552);
    forged.chain = Chain([7; 32]);
    let refused = SourceStream::open(log.clone(), &log.view(), open_at(&log, forged)).unwrap_err();
    assert!(matches!(refused, Refused::Unprovable { .. }), "{refused}");
}

#[test]
fn a53_a_caller_beyond_the_fork_learns_where_it_is_and_gets_nothing() {
    let (log, first_end) = two_epochs();
    let mut other = log.clone();
    other.lineage = prefix(&log.lineage, first_end);
    other.records.truncate(2);
    other.end = first_end;
    other.begin_epoch(9);
    other.write(9, 2048);
    let refused = SourceStream::open(log.clone(), &log.view(), open_at(&other, other.end)).unwrap_err();
    let Refused::Fork {
        at,
        caller_bytes,
        source_bytes,
        ..
    } = refused
    else {
        panic!("{refused}")
    };
    assert_eq!((at, caller_bytes, source_bytes), (first_end.lsn, 2088, 1064));
}

#[test]
fn a35_a_caller_older_than_the_kept_log_is_told_where_it_begins() {
    let (log, first_end) = two_epochs();
    let mut view = log.view();
    view.segments[0].start = first_end;
    let refused = SourceStream::open(log.clone(), &view, open_at(&log, log.records[1].0)).unwrap_err();
    assert_eq!(
        refused,
        Refused::TooOld {
            at: log.records[1].0.lsn,
            log_start: first_end.lsn
        }
    );
}

#[test]
fn a_caller_ahead_of_the_source_is_sent_elsewhere() {
    let (log, first_end) = two_epochs();
    let refused = SourceStream::open(log.clone(), &log.view_to(first_end), open_at(&log, log.end)).unwrap_err();
    assert!(matches!(refused, Refused::Behind { .. }), "{refused}");
}

#[test]
fn a_limit_ends_the_stream_exactly_there() {
    let (log, first_end) = two_epochs();
    let view = log.view();
    let open = FetchOpen {
        until: Some(first_end.lsn),
        ..open_at(&log, Position::default())
    };
    let (mut stream, _) = SourceStream::open(log, &view, open).unwrap();
    while stream.next(&view).unwrap().is_some() {}
    assert_eq!(stream.at(), first_end);
    assert!(stream.finished());
}

#[test]
fn a_source_whose_own_log_was_cut_ends_its_streams() {
    let (log, first_end) = two_epochs();
    let view = log.view();
    let (mut stream, _) = SourceStream::open(log.clone(), &view, open_at(&log, log.end)).unwrap();
    assert_eq!(stream.next(&view).unwrap(), None);
    assert!(stream.next(&log.view_to(first_end)).is_err());
}
