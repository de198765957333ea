//! Flipped bits, foreign bytes and left-overs: found before use, named by class, and never mistaken for a torn tail when
//! durable log is hit.

use super::*;
use crate::format::batch::BatchHeader;
use crate::format::record::RecordHeader;
use crate::log::TailClass;
use crate::log::scan::{Verdict, decide};
use crate::store_sim::Op;

/// What a scan of a damaged log came to.
enum Outcome {
    Refused,
    Ended(Box<Scan>),
}

fn scan_damaged(driver: &Driver, from: Position) -> Outcome {
    match Driver::recover(&driver.store, from, driver) {
        Ok((found, _)) => Outcome::Ended(Box::new(found)),
        Err(_) => Outcome::Refused,
    }
}

/// A log of a few durable batches in three segments, with every byte range that was ever written, but for end marks.
fn durable_log(seed: u64, compression: Compression) -> (Driver, Vec<(SegmentName, ByteRange)>) {
    let store = SimStore::new(seed, 0, 64 << 20);
    store.set_trace(true);
    let mut driver = Driver::begin(&store, seed, compression);
    for round in 0..4 {
        for _ in 0..2 {
            let payload = Bytes::from(vec![u8::try_from(round).unwrap() + 1; 300]);
            driver
                .append_this(RecordKind::Write, ByteRange { offset: 0, len: 300 }, &payload)
                .unwrap();
        }
        driver
            .append_this(
                RecordKind::Discard,
                ByteRange {
                    offset: 4096,
                    len: 4096,
                },
                &Bytes::new(),
            )
            .unwrap();
        if round == 1 {
            driver.start_epoch(Cause::Handover).unwrap();
        }
        if round == 2 {
            driver.prepare().unwrap();
            driver.writer.rotate(Lamport(driver.clock)).unwrap();
        }
        driver.sync().unwrap();
    }
    let written = store.take_trace().into_iter().filter_map(|event| match event.file {
        Some(FileId::Segment(name)) if event.op == Op::Write && event.range.len < SEGMENT_BYTES => {
            // Behind the last byte that is not zero nothing tells anything.
            let image = store.peek(&FileId::Segment(name)).unwrap();
            let range = usize::try_from(event.range.offset).unwrap()..usize::try_from(event.range.end()).unwrap();
            let last = image[range].iter().rposition(|byte| *byte != 0).unwrap();
            let len = last as u64 + 1;
            Some((name, ByteRange { len, ..event.range }))
        }
        _ => None,
    });
    let written = written.collect();
    store.set_trace(false);
    (driver, written)
}

#[test]
fn a13_every_flipped_bit_of_every_written_byte_is_found() {
    for compression in [Compression::None, Compression::Lz4] {
        let (driver, written) = durable_log(1, compression);
        let from = driver.view().segments[0].start;
        let durable = driver.writer.durable().lsn;
        let mut bits = 0;
        for (name, range) in written {
            for bit in range.offset * 8..range.end() * 8 {
                driver.store.flip_bit(&FileId::Segment(name), bit);
                if let Outcome::Ended(found) = scan_damaged(&driver, from) {
                    // `recover` has compared every record that came out with what was appended.
                    assert!(found.end.lsn < durable, "{name}: bit {bit} went unnoticed");
                    let verdict = found.decide(durable, true);
                    assert!(
                        matches!(verdict, Verdict::Defect { .. }),
                        "{name}: bit {bit}: {verdict:?}"
                    );
                }
                driver.store.flip_bit(&FileId::Segment(name), bit);
                bits += 1;
            }
        }
        assert!(bits > 20_000);
        assert!(matches!(scan_damaged(&driver, from), Outcome::Ended(found) if found.end.lsn == durable));
    }
}

#[test]
fn a13_a_reader_never_returns_a_record_of_a_damaged_file() {
    let (driver, written) = durable_log(2, Compression::Zstd);
    let view = driver.view();
    let from = view.segments[0].start;
    let expected = driver.expected(from);
    let mut rng = SmallRng::seed_from_u64(2);
    for _ in 0..4000 {
        let (name, range) = &written[rng.random_range(0..written.len())];
        let bit = rng.random_range(range.offset * 8..range.end() * 8);
        driver.store.flip_bit(&FileId::Segment(*name), bit);
        let mut got = Vec::new();
        let failed = match LogReader::open(driver.store.clone(), &view, from) {
            Err(_) => true,
            Ok(mut reader) => loop {
                match reader.next(&view, Lsn(u64::MAX), 1000) {
                    Ok(Next::Records(chunk)) => got.extend(chunk.into_records()),
                    Ok(Next::Epoch(_)) => {}
                    Ok(Next::End) => break false,
                    Err(_) => break true,
                }
            },
        };
        assert!(failed, "{name}: bit {bit} went unnoticed");
        assert!(expected.starts_with(&got), "{name}: bit {bit}: a wrong record came out");
        driver.store.flip_bit(&FileId::Segment(*name), bit);
    }
}

/// Larger segments, random damage of up to a few hundred bytes anywhere, padding included: what comes out is a prefix of the
/// truth, and what was durable is never taken for a torn tail.
#[test]
fn a13_random_damage_never_invents_or_skips_anything() {
    for seed in 0..400 {
        let mut rng = SmallRng::seed_from_u64(seed);
        let store = SimStore::new(seed, 0, 64 << 20);
        let mut driver = Driver::begin(&store, seed, Compression::Lz4);
        for _ in 0..40 {
            driver.append().unwrap();
            if rng.random_ratio(1, 3) {
                driver.sync().unwrap();
            }
        }
        driver.sync().unwrap();
        let from = driver.view().segments[0].start;
        let durable = driver.writer.durable().lsn;
        let segment = driver.view().segments[rng.random_range(0..driver.view().segments.len())].name;
        let len = rng.random_range(1..400);
        let offset = rng.random_range(0..SEGMENT_BYTES - len as u64);
        let mut garbage = vec![0; len];
        rng.fill(&mut garbage[..]);
        store.poke(&FileId::Segment(segment), offset, &garbage);
        if let Outcome::Ended(found) = scan_damaged(&driver, from) {
            let complete = found.end.lsn == durable;
            let defect = matches!(found.decide(durable, true), Verdict::Defect { .. });
            assert!(complete != defect, "seed {seed}: {:?} at {}", found.stop, found.end);
        }
    }
}

/// Valid batches behind the damage know that it was durable, even when nobody else does.
#[test]
fn a15_later_batches_prove_a_defect_without_any_other_evidence() {
    let (driver, _) = durable_log(3, Compression::None);
    let first = driver.view().segments[0].clone();
    // In the payload of the first record.
    driver
        .store
        .flip_bit(&FileId::Segment(first.name), (4096 + 128 + 40 + 100) * 8);
    let Outcome::Ended(found) = scan_damaged(&driver, first.start) else {
        panic!("the scan ends at the damage")
    };
    assert_eq!(found.end, first.start);
    match found.decide(Lsn::ZERO, false) {
        Verdict::Defect { stop, durable } => {
            assert_eq!(
                (stop.class, stop.segment, stop.file_offset),
                (TailClass::Digest, first.name, 4096 + 128)
            );
            assert!(durable > found.end.lsn);
        }
        other => panic!("{other:?}"),
    }
    assert!(
        !found.beyond.is_empty() && found.stale.is_empty(),
        "the evidence is not called stale"
    );
}

#[test]
fn a15_a_later_batch_of_the_same_segment_is_evidence_too() {
    let store = SimStore::new(3, 0, 64 << 20);
    let mut driver = Driver::begin(&store, 3, Compression::None);
    for _ in 0..3 {
        let range = ByteRange { offset: 0, len: 600 };
        driver
            .append_this(RecordKind::Write, range, &Bytes::from(vec![1; 600]))
            .unwrap();
        driver.sync().unwrap();
    }
    let segment = driver.view().segments[0].clone();
    store.flip_bit(&FileId::Segment(segment.name), (4096 + 200) * 8);
    let Outcome::Ended(found) = scan_damaged(&driver, segment.start) else {
        panic!("the scan ends at the damage")
    };
    assert_eq!(found.end, segment.start);
    // The third batch knew that the first two were durable.
    assert_eq!(found.proven, driver.history.records[1].1.lsn);
    assert!(matches!(found.decide(Lsn::ZERO, false), Verdict::Defect { .. }));
}

/// A record that stands there twice has a valid checksum both times.
#[test]
fn a15_a_repeated_record_is_a_sequence_jump() {
    let tail = with_tail();
    let image = tail.driver.store.peek(&FileId::Segment(tail.name)).unwrap();
    let at = usize::try_from(tail.batch).unwrap() + 128;
    tail.poke(128 + 1040, &image[at..at + 1040]);
    let from = tail.driver.view().segments[0].start;
    let Outcome::Ended(found) = scan_damaged(&tail.driver, from) else {
        panic!("refused")
    };
    assert_eq!(
        (found.end, found.stop.class),
        (tail.driver.writer.appended(), TailClass::SequenceJump)
    );
    assert_eq!(found.decide(found.end.lsn, true), Verdict::Cut);
}

/// A defect makes the log go on at a lower end. What lies behind it stays on disk until the log has passed it again.
#[test]
fn log_behind_a_defect_is_kept_until_it_is_there_again() {
    let (driver, _) = durable_log(9, Compression::None);
    let from = driver.view().segments[0].start;
    let durable = driver.writer.durable().lsn;
    let behind = driver.view().segments.last().unwrap().name;
    let second = driver.history.records[1].1;
    driver
        .store
        .flip_bit(&FileId::Segment(driver.view().segments[0].name), (8192 + 200) * 8);
    let (found, mut repaired) = Driver::recover(&driver.store, from, &driver).unwrap();
    assert!(matches!(found.decide(durable, true), Verdict::Defect { .. }));
    assert!(found.end.lsn > second.lsn && found.beyond.contains(&behind));
    repaired.rewrite().unwrap();
    let (found, _) = Driver::recover(&driver.store, from, &repaired).unwrap();
    assert!(
        found.damaged.contains(&behind) && !found.stale.contains(&behind),
        "{:?}",
        found.stale
    );
    while repaired.writer.appended().lsn <= durable {
        repaired.append().unwrap();
    }
    repaired.sync().unwrap();
    let (found, _) = Driver::recover(&driver.store, from, &repaired).unwrap();
    assert!(found.stale.contains(&behind));
}

/// One log with an unsynced batch at its end, and what to do to that batch.
struct Tail {
    driver: Driver,
    name: SegmentName,
    /// Where the last batch begins in the file.
    batch: u64,
    /// End of the log without it.
    durable: Position,
}

fn with_tail() -> Tail {
    let store = SimStore::new(4, 0, 64 << 20);
    let mut driver = Driver::begin(&store, 4, Compression::None);
    let range = ByteRange { offset: 0, len: 1000 };
    driver
        .append_this(RecordKind::Write, range, &Bytes::from(vec![1; 1000]))
        .unwrap();
    driver.sync().unwrap();
    driver
        .append_this(
            RecordKind::Write,
            range,
            &Bytes::from((0..1000_u32).map(|i| (i * i % 251) as u8).collect::<Vec<_>>()),
        )
        .unwrap();
    let name = driver.writer.segments()[0].name;
    let durable = driver.writer.durable();
    Tail {
        driver,
        name,
        batch: 8192,
        durable,
    }
}

#[test]
fn a15_every_tail_class_is_named_and_ends_the_log_silently_above_durable() {
    type Damage = fn(&Tail);
    // With whether the log just ended there, as far as the bytes tell: behind an end mark, nothing of this segment.
    let cases: [(TailClass, bool, Damage); 10] = [
        (TailClass::Zero, true, |tail| tail.poke(0, &[0; 2000])),
        (TailClass::Foreign, true, |tail| tail.poke(0, &noise(2000))),
        (TailClass::Repeated, true, |tail| tail.poke(0, &[0xa5; 4096])),
        (TailClass::Header, false, |tail| tail.flip(40)),
        (TailClass::Digest, false, |tail| tail.flip(128 + 40 + 500)),
        (TailClass::Foreign, false, |tail| tail.poke(128, &noise(40))),
        (TailClass::Recycled, true, |tail| {
            let left_over = BatchHeader {
                segment: SegmentName { number: 3, ..tail.name },
                file_offset: tail.batch,
                start: Position::default(),
                first_sequence: 0,
                durable: Lsn(1 << 40),
                compression: Compression::None,
            };
            tail.poke(0, &left_over.encode(0x1234).0);
        }),
        (TailClass::SequenceJump, false, |tail| {
            // The first batch again, at the place of the second.
            let image = tail.driver.store.peek(&FileId::Segment(tail.name)).unwrap();
            tail.poke(0, &image[4096..4096 + 1168]);
        }),
        (TailClass::SequenceJump, false, |tail| {
            // A batch of this very segment and place, but of another history.
            let start = Position {
                chain: crate::types::Chain([7; 32]),
                ..tail.durable
            };
            tail.poke(0, &tail.batch_header(start).encode(tail.segment_crc()).0);
        }),
        (TailClass::Truncated, false, |tail| {
            // A record that is longer than the rest of the file.
            let (batch, batch_crc) = tail.batch_header(tail.durable).encode(tail.segment_crc());
            let header = RecordHeader {
                kind: RecordKind::Write,
                flags: 0,
                offset: 0,
                len: 1 << 20,
                sequence: 1,
                lamport: Lamport(1),
            };
            tail.poke(0, &[&batch[..], &header.encode(&vec![0; 1 << 20], batch_crc)].concat());
        }),
    ];
    for (class, ended, damage) in cases {
        let tail = with_tail();
        damage(&tail);
        let from = tail.driver.view().segments[0].start;
        let Outcome::Ended(found) = scan_damaged(&tail.driver, from) else {
            panic!("{class}: refused")
        };
        assert_eq!((found.end, found.stop.class), (tail.durable, class));
        let verdict = found.decide(tail.durable.lsn, true);
        let expected = if ended { Verdict::Continue } else { Verdict::Cut };
        assert_eq!(verdict, expected, "{class}");
        assert_eq!(
            found.decide(tail.durable.lsn, false),
            Verdict::Cut,
            "{class}: another boot"
        );
        // The same bytes below what a peer has seen are a defect of that class.
        match found.decide(tail.durable.lsn.advance(1), true) {
            Verdict::Defect { stop, .. } => assert_eq!(stop.class, class),
            other => panic!("{class}: {other:?}"),
        }
    }
}

impl Tail {
    fn poke(&self, at: u64, bytes: &[u8]) {
        self.driver
            .store
            .poke(&FileId::Segment(self.name), self.batch + at, bytes);
    }

    fn flip(&self, byte: u64) {
        self.driver
            .store
            .flip_bit(&FileId::Segment(self.name), (self.batch + byte) * 8);
    }

    /// The header of a batch at the place of the last one.
    fn batch_header(&self, start: Position) -> BatchHeader {
        BatchHeader {
            segment: self.name,
            file_offset: self.batch,
            start,
            first_sequence: 1,
            durable: start.lsn,
            compression: Compression::None,
        }
    }

    fn segment_crc(&self) -> u32 {
        let image = self.driver.store.peek(&FileId::Segment(self.name)).unwrap();
        crate::format::segment::SegmentHeader::decode(image[..512].try_into().unwrap())
            .unwrap()
            .1
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    SmallRng::seed_from_u64(99).fill(&mut bytes[..]);
    bytes
}

#[test]
fn a15_the_verdict_follows_from_what_was_durable_alone() {
    let stop = |class, ended| super::super::Stop {
        segment: SegmentName { number: 1, origin: 1 },
        file_offset: 0,
        lsn: Lsn(100),
        class,
        ended,
    };
    for class in [
        TailClass::Zero,
        TailClass::Digest,
        TailClass::Recycled,
        TailClass::Foreign,
        TailClass::Header,
    ] {
        for known in [0, 99, 100, 101, 500] {
            for (beyond, same_boot, ended) in (0..8).map(|bits| (bits & 1 > 0, bits & 2 > 0, bits & 4 > 0)) {
                let verdict = decide(Lsn(100), &stop(class, ended), Lsn(known), beyond, same_boot);
                let clean = ended && !beyond && same_boot;
                let expected = match (known > 100, clean) {
                    (true, _) => Verdict::Defect {
                        stop: stop(class, ended),
                        durable: Lsn(known),
                    },
                    (false, true) => Verdict::Continue,
                    (false, false) => Verdict::Cut,
                };
                assert_eq!(verdict, expected);
            }
        }
    }
}

#[test]
fn a_damaged_segment_header_is_named_and_nothing_is_called_stale() {
    let (driver, _) = durable_log(5, Compression::None);
    let view = driver.view();
    let from = view.segments[0].start;
    for index in 1..view.segments.len() {
        let name = view.segments[index].name;
        driver.store.flip_bit(&FileId::Segment(name), 8 * 130);
        let Outcome::Ended(found) = scan_damaged(&driver, from) else {
            panic!("{name}: refused")
        };
        assert_eq!(
            (found.stop.segment, found.stop.class, found.stop.file_offset),
            (name, TailClass::Header, 0)
        );
        assert_eq!(found.end.lsn, view.segments[index].start.lsn);
        assert!(matches!(
            found.decide(driver.writer.durable().lsn, true),
            Verdict::Defect { .. }
        ));
        assert!(
            !found
                .stale
                .iter()
                .any(|stale| *stale <= view.segments.last().unwrap().name),
            "{:?}",
            found.stale
        );
        driver.store.flip_bit(&FileId::Segment(name), 8 * 130);
    }
    let name = view.segments[0].name;
    driver.store.flip_bit(&FileId::Segment(name), 8 * 130);
    let error = Driver::recover(&driver.store, from, &driver).err().unwrap();
    assert!(
        error.to_string().contains("damaged") && error.to_string().contains(&name.to_string()),
        "{error}"
    );
}

#[test]
fn a59_the_log_of_somebody_else_and_of_a_newer_version_is_refused_by_name() {
    let (driver, _) = durable_log(6, Compression::None);
    let from = driver.view().segments[0].start;
    let refused = |identity| {
        let params = ScanParams {
            identity,
            from,
            first_segment: 1,
        };
        scan(&driver.store, &params, &mut |_, _| {}).unwrap_err()
    };
    let mine = identity();
    let others = [
        LogIdentity {
            cluster: ClusterId(Uuid::from_u128(9)),
            ..mine
        },
        LogIdentity {
            resource: ResourceId(Uuid::from_u128(9)),
            ..mine
        },
        LogIdentity {
            replica: ReplicaId(Uuid::from_u128(9)),
            ..mine
        },
    ];
    for other in others {
        let error = refused(other);
        assert!(matches!(error, ScanError::Foreign { .. }), "{error}");
    }
    let name = driver.view().segments[1].name;
    let mut header = driver.store.peek(&FileId::Segment(name)).unwrap()[..512].to_vec();
    header[8] = 2;
    let crc = crate::format::crc32c(&[&header[..508]]);
    header[508..].copy_from_slice(&crc.to_le_bytes());
    driver.store.poke(&FileId::Segment(name), 0, &header);
    let error = refused(mine);
    assert!(matches!(error, ScanError::Newer { .. }), "{error}");
    assert!(
        error.to_string().contains("version 2") && error.to_string().contains(&name.to_string()),
        "{error}"
    );
}

#[test]
fn another_history_than_the_saved_one_is_refused() {
    let (driver, _) = durable_log(7, Compression::None);
    let mut from = driver.history.records[1].1;
    assert!(matches!(scan_damaged(&driver, from), Outcome::Ended(_)));
    from.chain.0[9] ^= 4;
    assert!(matches!(
        Driver::recover(&driver.store, from, &driver),
        Err(ScanError::NotProven { .. })
    ));
    let early = Position {
        lsn: Lsn(from.lsn.0 + 1),
        ..driver.history.records[1].1
    };
    assert!(matches!(
        Driver::recover(&driver.store, early, &driver),
        Err(ScanError::NotProven { .. })
    ));
}

/// Retention that was interrupted leaves old segments of a branch that was cut long ago: they are not part of the log.
#[test]
fn left_overs_of_an_interrupted_removal_are_not_part_of_the_log() {
    let store = SimStore::new(8, 0, 64 << 20);
    let mut driver = Driver::begin(&store, 8, Compression::None);
    (0..12).for_each(|_| driver.append().unwrap());
    driver.sync().unwrap();
    let (stray, image) = {
        let meta = *driver.writer.segments().last().unwrap();
        (meta.name, store.peek(&FileId::Segment(meta.name)).unwrap())
    };
    // The tail from within the stray segment on is written anew, and the stray file is removed.
    driver.append().unwrap();
    store.fail_next_sync();
    assert!(driver.sync().is_err());
    driver.rewrite().unwrap();
    let rewritten = *driver.writer.segments().last().unwrap();
    (0..12).for_each(|_| driver.append().unwrap());
    driver.sync().unwrap();
    let from = rewritten.start;
    driver.forget_below(Lsn(driver.writer.durable().lsn.0)).unwrap();
    let first = driver.view().segments[0].clone();
    assert!(first.start.lsn > from.lsn, "retention has passed the rewritten segment");
    // The removal of the oldest one is undone by a power loss.
    store.create(&FileId::Segment(stray), SEGMENT_BYTES).unwrap();
    store.poke(&FileId::Segment(stray), 0, &image);
    let (found, _) = Driver::recover(&store, driver.writer.durable(), &driver).unwrap();
    assert_eq!(found.segments[0].name, first.name);
    assert!(found.stale.contains(&stray));
    assert_eq!(found.end, driver.writer.durable());
}
