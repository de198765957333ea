//! Failed writes and syncs: the segment is poisoned for good, and the tail comes back from memory.

use super::*;
use crate::store_sim::{Injected, Op, Survival};
use std::io::ErrorKind;

fn started(seed: u64) -> Driver {
    let store = SimStore::new(seed, 0, 64 << 20);
    let mut driver = Driver::begin(&store, seed, Compression::None);
    for _ in 0..3 {
        driver.append().unwrap();
    }
    driver.sync().unwrap();
    driver.prepare().unwrap();
    driver
}

/// After the power failed with nothing but synced bytes left: is everything there that was durable?
fn check_after_power_loss(driver: &Driver, what: &str) {
    driver.store.power_loss(Survival::OnlySynced);
    let store = driver.store.restart();
    let from = driver.view().segments[0].start;
    let (found, _) = Driver::recover(&store, from, driver).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        found.end.lsn >= driver.writer.durable().lsn,
        "{what}: ends at {}",
        found.end
    );
}

#[test]
fn a16_a_failed_sync_poisons_for_good_and_a_second_one_is_never_tried() {
    let mut driver = started(1);
    let durable = driver.writer.durable();
    driver.append().unwrap();
    driver.store.fail_next_sync();
    assert!(driver.sync().is_err());
    assert_eq!(driver.writer.durable(), durable);
    assert!(driver.writer.poisoned().is_some());
    assert!(driver.append().is_err(), "nothing is written into a poisoned segment");
    driver.history.records.pop();
    assert!(
        driver.writer.begin_sync().is_none(),
        "a retried fsync is never believed"
    );
    driver.rewrite().unwrap();
    assert_eq!(driver.writer.poisoned(), None);
    driver.append().unwrap();
    driver.sync().unwrap();
    check_after_power_loss(&driver, "after the rewrite");
}

/// One fault of each kind at every write and sync of a run; the run goes on with rewrites and loses nothing.
#[test]
fn a16_a_fault_at_every_io_loses_nothing() {
    let run = |seed: u64, fault: Option<(u64, Injected)>| {
        let mut driver = started(seed);
        let first = driver.store.io_count();
        if let Some((io, fault)) = fault {
            driver.store.inject_at_io(first + io, fault);
        }
        let mut rewrites = 0;
        let mut again = |driver: &mut Driver, result: Result<(), Halt>| {
            if result.is_err() && driver.writer.poisoned().is_some() {
                rewrites += 1;
                if driver.rewrite().is_err() && driver.writer.poisoned().is_some() {
                    driver.rewrite().unwrap();
                }
            }
        };
        for round in 0..24 {
            let appended = driver.append();
            again(&mut driver, appended);
            if round == 9 {
                let begun = driver.start_epoch(Cause::Handover);
                if begun.is_err() && driver.writer.epoch().id != driver.history.epochs.last().unwrap().id {
                    driver.history.epochs.pop();
                }
                again(&mut driver, begun);
            }
            if round % 3 == 0 {
                let synced = driver.sync();
                again(&mut driver, synced);
                let prepared = driver.prepare();
                again(&mut driver, prepared);
            }
        }
        let synced = driver.sync();
        again(&mut driver, synced);
        (driver, rewrites, first)
    };
    let (clean, _, first) = run(3, None);
    let ios = clean.store.io_count() - first;
    let mut rewrites = 0;
    for io in 0..ios {
        for kind in [ErrorKind::Other, ErrorKind::StorageFull] {
            for fault in [Injected::Error(kind), Injected::Torn(kind)] {
                let what = format!("{fault:?} at I/O {io}");
                let (driver, count, _) = run(3, Some((io, fault)));
                rewrites += count;
                assert_eq!(driver.writer.durable(), driver.writer.appended(), "{what}");
                let from = driver.view().segments[0].start;
                assert_eq!(driver.read_all(from).0, driver.expected(from), "{what}");
                check_after_power_loss(&driver, &what);
            }
        }
    }
    assert!(rewrites > 50, "most faults poison: {rewrites}");
}

/// Also while the rewrite itself fails or the process dies in it, acknowledged records stay.
#[test]
fn a16_a_crash_at_every_io_of_a_rewrite_keeps_acknowledged_records() {
    for io in 0..30 {
        for seed in 0..6 {
            let mut driver = started(seed);
            driver.append().unwrap();
            driver.start_epoch(Cause::Failover).unwrap();
            driver.append().unwrap();
            let from = driver.view().segments[0].start;
            let appended = driver.writer.appended();
            driver.store.fail_next_sync();
            assert!(driver.sync().is_err());
            driver.store.crash_at_io(driver.store.io_count() + io);
            let finished = driver.rewrite().is_ok();
            driver.store.crash_process();
            let store = driver.store.restart();
            let (found, _) = Driver::recover(&store, from, &driver).unwrap();
            assert_eq!(
                found.end.lsn, appended.lsn,
                "I/O {io}, seed {seed}, finished: {finished}"
            );
        }
    }
}

#[test]
fn a16_a_failed_write_poisons_and_its_record_is_not_in_the_log() {
    for fault in [Injected::Error(ErrorKind::Other), Injected::Torn(ErrorKind::Other)] {
        let mut driver = started(2);
        let before = driver.writer.appended();
        driver.store.inject_next(Op::Write, None, fault);
        assert!(driver.append().is_err());
        assert_eq!(driver.writer.appended(), before);
        driver.rewrite().unwrap();
        driver.append().unwrap();
        assert_eq!(driver.writer.epoch().id, before.epoch);
        check_after_power_loss(&driver, "write failed");
    }
}

#[test]
fn a_full_store_only_stops_the_creation_of_segments() {
    let mut driver = started(4);
    driver.store.set_log_capacity(0);
    let mut appended = 0;
    while driver.append().is_ok() {
        appended += 1;
    }
    assert!(appended > 3, "the prepared segment is used up first");
    assert_eq!(driver.writer.poisoned(), None);
    driver.sync().unwrap();
    driver.store.set_log_capacity(64 << 20);
    driver.append().unwrap();
    driver.sync().unwrap();
    check_after_power_loss(&driver, "after ENOSPC");
}
