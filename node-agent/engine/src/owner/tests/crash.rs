//! What survives: process death and power loss at any moment.

use super::{DEVICE, come_back, for_seeds, primary};
use crate::api::Role;
use crate::store::FileId;
use crate::store_sim::Survival;
use crate::testing::{Crash, Load};
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
