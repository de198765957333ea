//! Crashes at every I/O: what was durable is there, what was acknowledged survives the process, and nothing is invented.

use super::*;
use crate::log::scan::Verdict;
use crate::store_sim::Survival;

/// How the machine goes down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Death {
    Process,
    Power(Survival),
}

const DEATHS: [Death; 5] = [
    Death::Process,
    Death::Power(Survival::OnlySynced),
    Death::Power(Survival::Everything),
    Death::Power(Survival::Some),
    Death::Power(Survival::Torn),
];

/// Everything a writer does: appends, syncs with appends behind them, full segments, epochs, rotation, retention.
fn script(driver: &mut Driver) -> Result<(), Halt> {
    driver.prepare()?;
    for round in 0..9 {
        for _ in 0..4 {
            driver.append()?;
        }
        match round {
            2 => driver.start_epoch(Cause::Handover)?,
            4 => {
                driver.prepare()?;
                driver.clock += 1;
                driver.writer.rotate(Lamport(driver.clock)).map_err(|_| Halt)?;
            }
            6 => {
                // An epoch without a single record.
                driver.start_epoch(Cause::Failover)?;
                driver.sync()?;
                driver.start_epoch(Cause::Recovery)?;
            }
            7 => driver.forget_below(Lsn(20_000))?,
            _ => {}
        }
        driver.append()?;
        match round {
            5 => {}
            1 | 3 | 8 => driver.sync_while_appending()?,
            _ => driver.sync()?,
        }
        driver.prepare()?;
    }
    Ok(())
}

fn die(store: &SimStore, death: Death) -> SimStore {
    match death {
        Death::Process => store.crash_process(),
        Death::Power(survival) => store.power_loss(survival),
    }
    store.restart()
}

fn machine(seed: u64) -> SimStore {
    SimStore::new(seed, 0, 64 << 20)
}

/// Runs the script with a death at I/O `io`; returns the driver as it was then.
fn run_until(seed: u64, io: u64, compression: Compression) -> Driver {
    let store = machine(seed);
    store.crash_at_io(io);
    let mut driver = Driver::begin(&store, 7, compression);
    driver.recycles = seed % 2 == 1;
    let _ = script(&mut driver);
    driver
}

/// What must be there after this death.
fn promised(driver: &Driver, death: Death) -> Position {
    match death {
        Death::Process => driver.writer.appended(),
        Death::Power(_) => driver.view().durable,
    }
}

/// Recovers, checks, rewrites, goes on writing and reads everything back.
fn recover_and_go_on(store: &SimStore, from: Position, before: &Driver, must_have: Position, what: &str) -> Driver {
    let (found, mut driver) = Driver::recover(store, from, before).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(
        found.end.lsn >= must_have.lsn,
        "{what}: ends at {}, promised {must_have}",
        found.end
    );
    let verdict = found.decide(must_have.lsn, true);
    assert!(!matches!(verdict, Verdict::Defect { .. }), "{what}: {verdict:?}");
    let (obsolete, _) = found.into_state();
    driver.rewrite().unwrap();
    driver.remove(&obsolete).unwrap();
    driver
}

#[test]
fn a11_a21_a_log_survives_a_crash_at_every_io() {
    let mut ends = std::collections::BTreeSet::new();
    for compression in [Compression::None, Compression::Lz4] {
        let ios = {
            let store = machine(0);
            script(&mut Driver::begin(&store, 7, compression)).unwrap();
            store.io_count()
        };
        for io in 0..ios {
            for death in DEATHS {
                for seed in 0..3 {
                    let what = format!("I/O {io}, {death:?}, seed {seed}, {compression:?}");
                    let before = run_until(seed, io, compression);
                    if before.view().segments.is_empty() {
                        continue;
                    }
                    let must_have = promised(&before, death);
                    // The saved state may be old; the oldest that retention leaves, or the newest.
                    let oldest = before.view().segments[0].start;
                    let from = if seed % 2 == 0 { before.view().durable } else { oldest };
                    let store = die(&before.store, death);
                    let mut after = recover_and_go_on(&store, from, &before, must_have, &what);
                    ends.insert(after.writer.appended().lsn);
                    after.start_epoch(Cause::Recovery).unwrap();
                    after.append().unwrap();
                    after.sync().unwrap();
                    let (records, _) = after.read_all(oldest);
                    assert_eq!(records, after.expected(oldest), "{what}");
                }
            }
        }
    }
    assert!(ends.len() > 40, "the sweep met many different ends: {}", ends.len());
}

#[test]
fn a14_a_crash_during_recovery_loses_nothing_more() {
    let ios = {
        let store = machine(0);
        script(&mut Driver::begin(&store, 7, Compression::None)).unwrap();
        store.io_count()
    };
    for io in (0..ios).step_by(7) {
        for second in 0..40 {
            for death in DEATHS {
                let what = format!("I/O {io}, then {second} of recovery, {death:?}");
                let before = run_until(second, io, Compression::None);
                if before.view().segments.is_empty() {
                    continue;
                }
                let must_have = before.writer.appended();
                let from = before.view().durable;
                let store = die(&before.store, Death::Process);
                store.crash_at_io(store.io_count() + second);
                let Ok((found, mut during)) = Driver::recover(&store, from, &before) else {
                    assert!(store.is_dead(), "{what}: only the crash may stop a scan");
                    let store = die(&store, Death::Process);
                    recover_and_go_on(&store, from, &before, must_have, &what);
                    continue;
                };
                let rewritten = during.rewrite().is_ok();
                let (obsolete, _) = found.into_state();
                let _ = during.remove(&obsolete);
                // Once the tail is rewritten all of it is durable; before, the loss of power may still take it.
                let promised = if rewritten || death == Death::Process {
                    must_have
                } else {
                    from
                };
                let store = die(&store, death);
                let mut after = recover_and_go_on(&store, from, &before, promised, &what);
                after.append().unwrap();
                after.sync().unwrap();
                assert_eq!(after.read_all(from).0, after.expected(from), "{what}");
            }
        }
    }
}

#[test]
fn a14_scanning_twice_and_from_earlier_positions_gives_the_same_log() {
    let store = machine(5);
    let mut driver = Driver::begin(&store, 7, Compression::Zstd);
    script(&mut driver).unwrap();
    let store = die(&store, Death::Power(Survival::Torn));
    let oldest = driver.view().segments[0].start;
    let mut ends = Vec::new();
    for from in [oldest, driver.view().segments[1].start, driver.view().durable, oldest] {
        let (found, _) = Driver::recover(&store, from, &driver).unwrap();
        ends.push((
            found.end,
            found.proven.max(driver.view().durable.lsn),
            found.next_number,
        ));
    }
    assert!(ends.iter().all(|end| *end == ends[0]), "{ends:?}");
}

#[test]
fn a11_random_runs_with_random_deaths_keep_their_promises() {
    for seed in 0..300 {
        let store = machine(seed);
        let mut rng = SmallRng::seed_from_u64(seed);
        let mut driver = Driver::begin(&store, seed, Compression::Lz4);
        driver.recycles = seed % 2 == 1;
        let mut from = driver.writer.durable();
        for life in 0..4 {
            let what = format!("seed {seed}, life {life}");
            driver
                .store
                .crash_at_io(driver.store.io_count() + rng.random_range(5..120));
            let _ = driver.prepare();
            for _ in 0..200 {
                let result = match rng.random_range(0..12) {
                    0 => driver.start_epoch(Cause::Handover),
                    1 | 2 => driver.sync(),
                    3 => driver.sync_while_appending(),
                    _ => driver.append(),
                };
                if result.is_err() {
                    break;
                }
            }
            let death = DEATHS[rng.random_range(0..DEATHS.len())];
            let must_have = promised(&driver, death);
            let begun = !driver.view().segments.is_empty();
            let durable = driver.view().durable;
            let store = die(&driver.store, death);
            if !begun {
                break;
            }
            driver = recover_and_go_on(&store, from, &driver, must_have, &what);
            if rng.random() {
                from = if rng.random() { driver.writer.durable() } else { durable };
            }
        }
    }
}

/// An agent that is restarted between two writes finds that its log just ends there, also when the file held another segment before, with
/// records of the same length at the same places. When it died within a write, it finds that something was torn.
#[test]
fn a15_the_end_of_a_log_is_told_from_the_left_overs_of_a_recycled_file() {
    let mut torn = 0;
    for uniform in [true, false] {
        for count in 0..130 {
            let store = machine(count);
            let mut driver = Driver::begin(&store, 7, Compression::None);
            driver.recycles = true;
            driver.prepare().unwrap();
            for index in 0..count {
                if uniform {
                    let range = ByteRange { offset: 0, len: 4096 };
                    let payload = Bytes::from(vec![u8::try_from(index % 251).unwrap(); 4096]);
                    driver.append_this(RecordKind::Write, range, &payload).unwrap();
                } else {
                    driver.append().unwrap();
                }
                if index % 5 == 4 {
                    driver.sync().unwrap();
                }
                driver.prepare().unwrap();
            }
            if driver.writer.segments().is_empty() || driver.view().segments.is_empty() {
                continue;
            }
            let (end, from) = (driver.writer.appended(), driver.writer.durable());
            let what = format!("{count} records, uniform: {uniform}");
            let dies_within_a_write = count % 2 == 1;
            if dies_within_a_write {
                store.crash_at_io(store.io_count());
                assert!(driver.append().is_err(), "{what}");
            }
            let store = die(&store, Death::Process);
            let (found, _) = Driver::recover(&store, from, &driver).unwrap();
            let verdict = found.decide(from.lsn, true);
            if found.end == end && found.stop.ended {
                assert_eq!(verdict, Verdict::Continue, "{what}: {:?}", found.stop);
            } else {
                assert!(dies_within_a_write, "{what}: {:?}", found.stop);
                torn += u32::from(verdict == Verdict::Cut);
            }
        }
    }
    assert!(torn > 5, "only {torn} torn writes were met");
}
