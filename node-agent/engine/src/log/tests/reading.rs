//! Readers: what was appended comes out again, from every position, through every change of segments.

use super::*;
use crate::log::reader::ReadError;
use crate::log::serve::SegmentLog;
use crate::replication::messages::Refused;
use crate::replication::source::LogReader as _;
use crate::types::MAX_PAYLOAD_BYTES;
use proptest::prelude::{ProptestConfig, any, prop, prop_assert_eq, proptest};

fn written(seed: u64, compression: Compression) -> Driver {
    let store = SimStore::new(seed, 0, 256 << 20);
    let mut driver = Driver::begin(&store, seed, compression);
    for round in 0..12 {
        for _ in 0..5 {
            driver.append().unwrap();
        }
        if round % 4 == 3 {
            driver.start_epoch(Cause::Handover).unwrap();
        }
        driver.sync().unwrap();
    }
    driver
}

#[test]
fn every_record_boundary_is_a_start_and_nothing_else_is() {
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let driver = written(1, compression);
        let view = driver.view();
        let start = view.segments[0].start;
        let ends: Vec<Position> = driver.history.records.iter().map(|(_, end)| *end).collect();
        for from in std::iter::once(start).chain(ends) {
            let (records, epochs) = driver.read_all(from);
            assert_eq!(records, driver.expected(from), "from {from}");
            let later = driver
                .history
                .epochs
                .iter()
                .filter(|entry| entry.parent.lsn >= from.lsn && entry.id != from.epoch);
            let later: Vec<_> = later
                .filter(|entry| entry.parent != Position::default())
                .cloned()
                .collect();
            assert_eq!(epochs, later, "from {from}");
            let mut other_chain = from;
            other_chain.chain.0[5] ^= 1;
            let between = Position {
                lsn: Lsn(from.lsn.0 + 1),
                ..from
            };
            for wrong in [other_chain, between] {
                let refused = LogReader::open(driver.store.clone(), &view, wrong).err();
                assert!(
                    matches!(refused, Some(ReadError::NotProven { .. })),
                    "{wrong}: {refused:?}"
                );
            }
        }
    }
}

#[test]
fn a39_positions_that_are_not_in_the_log_are_refused_by_name() {
    let mut driver = written(2, Compression::None);
    driver.forget_below(driver.writer.segments()[3].start.lsn).unwrap();
    let view = driver.view();
    let serve = |at| SegmentLog::new(driver.store.clone()).prove(&view, at);
    let start = view.segments[0].start;
    assert!(serve(start).is_ok());
    let early = Position {
        lsn: Lsn(start.lsn.0 - 1),
        ..start
    };
    assert!(matches!(serve(early), Err(Refused::TooOld { .. })));
    let ahead = Position {
        lsn: Lsn(view.durable.lsn.0 + 40),
        ..view.durable
    };
    assert!(matches!(serve(ahead), Err(Refused::Unprovable { .. })));
    let foreign = Position {
        epoch: EpochId(Uuid::from_u128(0xbad)),
        ..view.durable
    };
    assert!(matches!(serve(foreign), Err(Refused::Unprovable { .. })));
}

#[test]
fn the_end_of_an_epoch_whose_segments_are_gone_is_still_proven_by_the_next_one() {
    let mut driver = written(3, Compression::None);
    let second = driver.history.epochs[1].clone();
    driver.forget_below(second.parent.lsn).unwrap();
    assert_ne!(
        driver.view().segments[0].start.epoch,
        second.id,
        "a member may stand at the end of the first epoch"
    );
    driver.forget_below(Lsn(second.parent.lsn.0 + 1)).unwrap();
    assert_eq!(driver.view().segments[0].start.epoch, second.id);
    let (records, epochs) = driver.read_all(second.parent);
    assert_eq!(epochs[0], second);
    assert_eq!(records, driver.expected(second.parent));
    let mut forged = second.parent;
    forged.chain.0[0] ^= 1;
    let refused = LogReader::open(driver.store.clone(), &driver.view(), forged).err();
    assert!(matches!(refused, Some(ReadError::NotProven { .. })), "{refused:?}");
}

/// A sender follows a log that grows, is rewritten after a failure, and loses its oldest segments.
#[test]
fn a_reader_follows_a_living_log_and_never_sees_what_is_not_durable() {
    for seed in 0..20 {
        let store = SimStore::new(seed, 0, 256 << 20);
        let mut driver = Driver::begin(&store, seed, Compression::Lz4);
        let mut reader: Option<LogReader<SimStore>> = None;
        let mut got: Vec<Record> = Vec::new();
        let start = driver.writer.durable();
        for step in 0..300 {
            match driver.rng.random_range(0..20) {
                0 => driver.start_epoch(Cause::Failover).unwrap(),
                1 => {
                    driver.append().unwrap();
                    if driver.writer.needs_sync() {
                        driver.store.fail_next_sync();
                        assert!(driver.sync().is_err());
                        driver.rewrite().unwrap();
                    }
                }
                2 => {
                    let read_to = reader.as_ref().map_or(Lsn::ZERO, |reader| reader.position().lsn);
                    driver.forget_below(read_to).unwrap();
                }
                3..6 => driver.sync().unwrap(),
                _ => driver.append().unwrap(),
            }
            let view = driver.view();
            if view.segments.is_empty() {
                continue;
            }
            if reader.is_none() {
                reader = Some(LogReader::open(store.clone(), &view, start).unwrap());
            }
            let reader = reader.as_mut().unwrap();
            if step % 3 == 0 {
                match reader.next(&view, Lsn(u64::MAX), 20_000).unwrap() {
                    Next::Records(chunk) => {
                        assert!(chunk.end().lsn <= view.durable.lsn);
                        got.extend(chunk.into_records());
                    }
                    Next::Epoch(_) | Next::End => {}
                }
            }
        }
        let view = driver.view();
        let reader = reader.as_mut().unwrap();
        while reader.position() != view.durable {
            if let Next::Records(chunk) = reader.next(&view, Lsn(u64::MAX), 20_000).unwrap() {
                got.extend(chunk.into_records());
            }
        }
        assert_eq!(got, driver.expected(start), "seed {seed}");
    }
}

#[test]
fn a_chunk_never_crosses_the_wanted_end() {
    let driver = written(5, Compression::None);
    let view = driver.view();
    let from = view.segments[0].start;
    for (_, until) in driver
        .history
        .records
        .iter()
        .filter(|(_, end)| end.lsn <= view.durable.lsn)
        .step_by(3)
    {
        let mut reader = LogReader::open(driver.store.clone(), &view, from).unwrap();
        loop {
            match reader.next(&view, until.lsn, 1 << 20).unwrap() {
                Next::Records(chunk) => assert!(chunk.end().lsn <= until.lsn),
                Next::Epoch(_) => {}
                Next::End => break,
            }
        }
        assert_eq!(reader.position().lsn, until.lsn);
    }
    // An end that is no record boundary is simply not reached.
    let mut reader = LogReader::open(driver.store.clone(), &view, from).unwrap();
    assert!(matches!(
        reader.next(&view, Lsn(from.lsn.0 + 1), 1 << 20),
        Ok(Next::End)
    ));
}

/// Records as they arrive from elsewhere keep everything, whatever the local segments look like.
#[test]
fn a_secondary_that_stores_the_same_records_has_the_same_positions() {
    let source = written(6, Compression::None);
    let (records, epochs) = source.read_all(source.view().segments[0].start);
    let store = SimStore::new(9, 0, 64 << 20);
    let mut target = Driver::begin(&store, 6, Compression::Zstd);
    let mut epochs = epochs.into_iter().peekable();
    for record in records {
        while let Some(entry) = epochs.next_if(|entry| entry.parent == target.writer.appended()) {
            target.prepare().unwrap();
            target.writer.start_epoch(entry).unwrap();
        }
        let wrong = Record {
            header: crate::format::record::RecordHeader {
                sequence: record.header.sequence + 1,
                ..record.header
            },
            ..record.clone()
        };
        let refused = target.writer.append_record(wrong);
        assert!(matches!(refused, Err(AppendError::NotNext { .. })), "{refused:?}");
        while let Err(error) = target.writer.append_record(record.clone()) {
            assert!(matches!(error, AppendError::NeedSegment), "{error}");
            target.prepare().unwrap();
        }
    }
    for entry in epochs {
        target.prepare().unwrap();
        target.writer.start_epoch(entry).unwrap();
    }
    target.sync().unwrap();
    assert_eq!(target.writer.durable(), source.writer.durable());
}

/// A sync target begins in the middle of an epoch and learns the sequence from its first record.
#[test]
fn a_log_that_begins_within_an_epoch_is_recovered_before_and_after_its_first_record() {
    let source = written(7, Compression::None);
    let at = source.history.records[3].1;
    let state = LogState::empty(identity(), 5, source.history.epochs[0].clone(), at);
    assert_eq!(state.next_sequence, None);
    let store = SimStore::new(3, 0, 64 << 20);
    let mut target = Driver::begin(&store, 1, Compression::None);
    target.writer = LogWriter::new(state, Compression::None);
    target.history = source.history.clone();
    target.prepare().unwrap();
    target.writer.rotate(Lamport(1)).unwrap();
    target.sync().unwrap();
    let store = store.restart();
    let (found, mut target) = Driver::recover(&store, at, &target).unwrap();
    assert_eq!((found.end, found.next_sequence), (at, None));
    target.rewrite().unwrap();
    let record = source.history.records[4].0.clone();
    target.prepare().unwrap();
    target.writer.append_record(record).unwrap();
    target.sync().unwrap();
    target.history = source.history.clone();
    let store = store.restart();
    let (found, _) = Driver::recover(&store, at, &target).unwrap();
    assert_eq!((found.end, found.next_sequence), (source.history.records[4].1, Some(5)));
}

#[test]
fn what_the_format_cannot_hold_is_refused_and_changes_nothing() {
    let store = SimStore::new(1, 0, 64 << 20);
    let mut driver = Driver::begin(&store, 1, Compression::None);
    driver.append().unwrap();
    let before = driver.writer.appended();
    let too_long = Bytes::from(vec![0; usize::try_from(MAX_PAYLOAD_BYTES).unwrap() + 1]);
    let range = ByteRange {
        offset: 0,
        len: too_long.len() as u64,
    };
    let mut refused = |flags, range, payload| {
        driver
            .writer
            .append(RecordKind::Write, flags, range, payload, Lamport(1))
    };
    assert!(matches!(refused(0, range, too_long), Err(AppendError::Format(_))));
    let small = Bytes::from_static(&[0; 512]);
    assert!(matches!(
        refused(2, ByteRange { offset: 0, len: 512 }, small.clone()),
        Err(AppendError::Format(_))
    ));
    assert!(matches!(
        refused(0, ByteRange { offset: 0, len: 513 }, small.clone()),
        Err(AppendError::Format(_))
    ));
    assert!(matches!(
        refused(
            0,
            ByteRange {
                offset: u64::MAX,
                len: 512
            },
            small
        ),
        Err(AppendError::Format(_))
    ));
    assert_eq!(driver.writer.appended(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]
    /// Random payloads of all lengths, random syncs, all compressions: out comes what went in.
    #[test]
    fn any_records_round_trip(
        lens in prop::collection::vec((0..40_000_usize, any::<bool>(), any::<bool>()), 1..40), which in 0..3_usize, seed in any::<u64>()
    ) {
        let compression = [Compression::None, Compression::Lz4, Compression::Zstd][which];
        let store = SimStore::new(seed, 0, 256 << 20);
        let mut driver = Driver::begin(&store, seed, compression);
        let start = driver.writer.durable();
        for (len, random, sync) in lens {
            let mut payload = vec![7; len];
            if random {
                driver.rng.fill(&mut payload[..]);
            }
            let range = ByteRange { offset: 512, len: len as u64 };
            driver.append_this(RecordKind::Write, range, &Bytes::from(payload)).unwrap();
            if sync {
                driver.sync().unwrap();
            }
        }
        driver.sync().unwrap();
        prop_assert_eq!(driver.read_all(start).0, driver.expected(start));
    }
}

/// Nothing keeps the file here as it was, as a reader that has it open does: the reader must notice by itself.
#[test]
fn p10_a_file_that_is_recycled_under_a_reader_is_noticed_and_nothing_of_it_is_read() {
    for offset in [None, Some(4096), Some(8192), Some(20_000)] {
        let store = SimStore::new(3, 0, 64 << 20);
        let mut driver = Driver::begin(&store, 3, Compression::None);
        for _ in 0..30 {
            driver.append().unwrap();
        }
        driver.sync().unwrap();
        let view = driver.view();
        let start = view.segments[0].start;
        let mut reader = LogReader::open(store.clone(), &view, start).unwrap();
        assert!(matches!(
            reader.next(&view, Lsn(u64::MAX), 1).unwrap(),
            Next::Records(_)
        ));
        let (old, new) = (FileId::Segment(view.segments[0].name), view.segments[1].name);
        store.poke(&old, 0, &[0; 512]);
        if let Some(offset) = offset {
            // It has become another segment, and is written already.
            let image = store.peek(&FileId::Segment(new)).unwrap();
            store.poke(&old, 0, &image[..512]);
            store.poke(&old, offset, &image[4096..12_000]);
        }
        let seen = reader.next(&view, Lsn(u64::MAX), 1 << 20);
        assert!(
            matches!(seen, Err(ReadError::Recycled { segment }) if FileId::Segment(segment) == old),
            "{seen:?}"
        );
        let again = LogReader::open(store.clone(), &view, start);
        assert!(
            matches!(again, Err(ReadError::Defect(_))),
            "a view that still names it is wrong: {again:?}"
        );
    }
}
