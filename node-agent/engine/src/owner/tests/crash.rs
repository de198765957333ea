//! What survives: process death and power loss at any moment.

use super::{DEVICE, come_back, for_seeds, primary};
use crate::api::{Cause, Command, Durability, Role};

use crate::store::FileId;
use crate::store_sim::Survival;
use crate::testing::{Crash, Load, Rig, small_params};
use rand::Rng;

#[test]
fn a10_reads_are_right_during_and_after_write_back() {
    for_seeds(20, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        for _ in 0..300 {
            load.step(&mut rig);
            if rig.rng().random_bool(0.5) {
                rig.run_one_job();
            }
            if rig.rng().random_bool(0.02) {
                rig.settle();
                load.collect(&mut rig);
            }
        }
        rig.settle();
        load.collect(&mut rig);
        assert_eq!(load.outstanding(), 0, "everything is answered");
        assert!(rig.content() == load.newest());
        assert!(
            rig.store.peek(&FileId::Data).unwrap() == load.newest(),
            "everything is written back"
        );
    });
}

#[test]
fn a10_a_restarted_process_goes_on_with_every_acknowledged_write() {
    for_seeds(20, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        for _ in 0..8 {
            for _ in 0..60 {
                load.step(&mut rig);
                if rig.rng().random_bool(0.4) {
                    rig.run_one_job();
                }
            }
            let epochs = rig.owner().status().lineage.0.len();
            rig.kill();
            rig.open().unwrap();
            assert!(rig.owner().status().resumable.unwrap().same_boot);
            come_back(&mut rig).unwrap();
            assert_eq!(rig.owner().status().role, Role::Primary);
            assert_eq!(rig.owner().status().lineage.0.len(), epochs, "the same epoch goes on");
            load.judge(&rig.content(), Crash::Process);
        }
    });
}

#[test]
fn a11_flushed_write_survives_power_loss() {
    for_seeds(30, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        for round in 0..8 {
            for _ in 0..60 {
                load.step(&mut rig);
                if rig.rng().random_bool(0.4) {
                    rig.run_one_job();
                }
            }
            let survival = [
                Survival::OnlySynced,
                Survival::Some,
                Survival::Torn,
                Survival::Everything,
            ][round % 4];
            rig.power_loss(survival);
            rig.open().unwrap();
            come_back(&mut rig).unwrap();
            load.judge(&rig.content(), Crash::Power);
        }
    });
}

/// A rich workload: all kinds of requests, flushes, write-back, several segments, retention, a rotation, a resize, a marker.
fn rich(rig: &mut Rig, load: &mut Load) {
    for step in 0..140 {
        if !rig.is_up() {
            return;
        }
        load.step(rig);
        if rig.rng().random_bool(0.5) {
            rig.run_one_job();
        }
        match step {
            40 => drop(rig.order(Command::Rotate)),
            70 => drop(rig.order(Command::Mark { name: "here".into() })),
            60 | 100 => {
                rig.run_until(|rig| rig.pending_jobs() == 0);
            }
            _ => {}
        }
    }
    rig.settle_if_up();
    load.collect(rig);
}

fn prepared(seed: u64, durability: Durability) -> (Rig, Load) {
    let mut params = small_params(1, seed);
    params.tuning.durability = durability;
    let mut rig = Rig::create_with(params, seed, DEVICE);
    super::ok(rig.command(Command::Promote {
        designation: super::designation(1),
        cause: Cause::Create,
    }));
    let mut load = Load::new(DEVICE);
    load.max_sectors = 16;
    (rig, load)
}

/// One crash of a kind: process death, or power loss with one of four fates for what was not synced.
pub(super) fn crash(rig: &mut Rig, kind: u64) -> Crash {
    match kind % 5 {
        0 => {
            rig.kill();
            Crash::Process
        }
        kind => {
            let survivals = [
                Survival::OnlySynced,
                Survival::Some,
                Survival::Torn,
                Survival::Everything,
            ];
            rig.power_loss(survivals[usize::try_from(kind).unwrap() - 1]);
            Crash::Power
        }
    }
}

/// Crash at I/O number `io` of the workload, crash again during the recovery, recover, judge, crash once more: same content.
fn crash_at(seed: u64, io: u64, kind: u64, durability: Durability) {
    let (mut rig, mut load) = prepared(seed, durability);
    let first = rig.store.io_count();
    rig.store.crash_at_io(first + io);
    rich(&mut rig, &mut load);
    assert!(!rig.is_up() || io >= 250, "the machine dies at I/O {io}");
    let mut worst = crash(&mut rig, kind);
    // The recovery dies, too, somewhere.
    let more = rig.store.io_count() + rig.rng().random_range(0..60);
    rig.store.crash_at_io(more);
    if rig.open().is_ok() && come_back(&mut rig).is_some() && rig.is_up() {
        rig.run_until(|rig| rig.pending_jobs() == 0);
    }
    if crash(&mut rig, kind + 1) == Crash::Power {
        worst = Crash::Power;
    }
    rig.open().unwrap();
    come_back(&mut rig).unwrap();
    let content = rig.content();
    load.judge(&content, worst);
    rig.run_until(|rig| rig.pending_jobs() == 0);
    crash(&mut rig, kind + 2);
    rig.open().unwrap();
    come_back(&mut rig).unwrap();
    assert!(rig.content() == content, "replayed twice, the disk is another one");
    rig.settle();
    assert!(
        rig.store.peek(&FileId::Data).unwrap() == content,
        "written back, the disk is another one"
    );
}

#[test]
fn a14_crash_at_every_io_and_replay_twice_gives_the_same_disk() {
    let (mut rig, mut load) = prepared(7, Durability::OnFlush);
    let before = rig.store.io_count();
    rich(&mut rig, &mut load);
    let total = rig.store.io_count() - before;
    assert!(total > 300, "the workload has only {total} I/Os");
    eprintln!("crashing at each of {total} I/Os");
    for io in 0..total {
        crash_at(7, io, io, Durability::OnFlush);
    }
}

#[test]
fn a14_crash_anywhere_with_other_seeds_and_every_write_durable() {
    for_seeds(150, |seed| {
        let durability = if seed % 2 == 0 {
            Durability::EveryWrite
        } else {
            Durability::OnFlush
        };
        crash_at(seed, seed * 7 % 300, seed / 3, durability);
    });
}
