//! Files of segments that are retired become segments again: once written, never written with zeros again.

use super::crash::crash;
use super::{DEVICE, come_back, for_seeds, ok, primary};
use crate::api::Command;
use crate::log::reader::{LogReader, Next, ReadError};
use crate::store::{FileId, Store, StoreFile};
use crate::store_sim::{IoEvent, Op};
use crate::testing::{Load, Rig};
use crate::types::{Lsn, ReplicaId};
use uuid::Uuid;

fn write(rig: &mut Rig, load: &mut Load, count: usize) {
    for _ in 0..count {
        if !rig.is_up() {
            return;
        }
        load.write(rig, false);
        rig.settle_if_up();
    }
    load.collect(rig);
}

fn is_recycling(event: &IoEvent) -> bool {
    event.op == Op::Rename && matches!(event.file, Some(FileId::Spare(_)))
}

/// Length of the files of the log, and how many of them are spares.
fn on_disk(rig: &Rig) -> (u64, usize) {
    let files = rig.store.list().unwrap();
    let log = files
        .iter()
        .filter(|id| matches!(id, FileId::Segment(_) | FileId::Spare(_)));
    let bytes = log.map(|id| rig.store.open(id).unwrap().size().unwrap()).sum();
    let spares = files.iter().filter(|id| matches!(id, FileId::Spare(_))).count();
    (bytes, spares)
}

#[test]
fn retired_segments_become_segments_again_and_few_wait_for_that() {
    for_seeds(4, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        rig.store.set_trace(true);
        let mut most_spares = 0;
        for _ in 0..60 {
            write(&mut rig, &mut load, 10);
            let (bytes, spares) = on_disk(&rig);
            assert_eq!(rig.owner().status().log_bytes, bytes, "what the files take is told");
            most_spares = spares.max(most_spares);
        }
        let trace = rig.store.take_trace();
        let created = trace
            .iter()
            .filter(|event| event.op == Op::Create && matches!(event.file, Some(FileId::Segment(_))))
            .count();
        let recycled = trace.iter().filter(|event| is_recycling(event)).count();
        assert!(recycled > 20 && created < 8, "{recycled} recycled, {created} created");
        assert!((1..=2).contains(&most_spares), "{most_spares} spares at a time");
        assert!(rig.store.peek(&FileId::Data).unwrap() == load.newest());
        // A restart keeps none, and everything is there.
        let spares = |rig: &Rig| {
            let mut files = rig.store.list().unwrap();
            files.retain(|id| matches!(id, FileId::Spare(_)));
            files
        };
        let before = spares(&rig);
        rig.kill();
        rig.open().unwrap();
        come_back(&mut rig).unwrap();
        assert!(rig.content() == load.newest());
        rig.settle();
        assert!(
            spares(&rig).iter().all(|id| !before.contains(id)),
            "spares of an earlier process go"
        );
    });
}

/// The I/Os from the retirement of a segment until records stand in the new segment made of its file, each with each kind of crash.
#[test]
fn a15_crash_at_every_io_of_recycling_loses_nothing_and_reads_nothing_old() {
    const WRITES: usize = 70;
    let (first, window) = {
        let mut rig = primary(11);
        let mut load = Load::new(DEVICE);
        let first = rig.store.io_count();
        rig.store.set_trace(true);
        write(&mut rig, &mut load, WRITES);
        let trace = rig.store.take_trace();
        let renamed: Vec<u64> = trace
            .iter()
            .filter(|event| is_recycling(event))
            .map(|event| event.io)
            .collect();
        assert!(renamed.len() >= 3, "only {} recycled", renamed.len());
        let retired = trace.iter().find(|event| event.op == Op::Rename).unwrap().io;
        (first, retired.saturating_sub(8)..renamed[2] + 40)
    };
    assert!(window.start > first && window.end - window.start > 60, "{window:?}");
    for io in window {
        for kind in 0..5 {
            let mut rig = primary(11);
            let mut load = Load::new(DEVICE);
            rig.store.crash_at_io(io);
            write(&mut rig, &mut load, WRITES);
            assert!(!rig.is_up(), "the machine dies at I/O {io}");
            let worst = crash(&mut rig, kind);
            rig.open().unwrap();
            come_back(&mut rig).unwrap();
            load.judge(&rig.content(), worst);
            write(&mut rig, &mut load, 30);
            let worst = crash(&mut rig, kind + 1);
            rig.open().unwrap();
            come_back(&mut rig).unwrap();
            load.judge(&rig.content(), worst);
        }
    }
}

#[test]
fn a_segment_that_somebody_reads_is_not_recycled_under_him() {
    let mut rig = primary(5);
    let mut load = Load::new(DEVICE);
    let away = ReplicaId(Uuid::from_u128(77));
    ok(rig.command(Command::SetMembers(vec![away])));
    write(&mut rig, &mut load, 60);
    let view = rig.owner().log_view().clone();
    let open = |rig: &Rig| LogReader::open(rig.store.clone(), &view, view.segments[1].start).unwrap();
    let end = view.segments[2].start.lsn;
    let Next::Records(expected) = open(&rig).next(&view, end, u64::MAX).unwrap() else {
        panic!("the segment holds records")
    };
    let mut reader = open(&rig);
    let Next::Records(begun) = reader.next(&view, end, 1).unwrap() else {
        panic!("the segment holds records")
    };
    ok(rig.command(Command::SetMembers(Vec::new())));
    write(&mut rig, &mut load, 120);
    assert!(rig.owner().status().log_start > end, "the segment is retired");
    let Next::Records(rest) = reader.next(&view, end, u64::MAX).unwrap() else {
        panic!("it is read to its end")
    };
    let seen = [begun.into_records(), rest.into_records()].concat();
    assert!(seen == expected.into_records(), "he reads what stood there");
    let next = reader.next(&view, Lsn(u64::MAX), 1);
    assert!(
        matches!(next, Err(ReadError::Io { .. })),
        "the next one is gone: {next:?}"
    );
}
