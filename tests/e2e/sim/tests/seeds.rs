//! Many random histories of one resource. `mars-sim --seed N` (this package's binary) replays one that failed.

use mars_sim::{Config, Report, run};
use std::panic::catch_unwind;

const SEEDS: std::ops::Range<u64> = 0..300;

fn add(total: &mut Report, run: &Report) {
    total.changes += run.changes;
    total.ios += run.ios;
    total.handovers += run.handovers;
    total.failovers += run.failovers;
    total.kills += run.kills;
    total.power_losses += run.power_losses;
    total.partitions += run.partitions;
    total.invalidations += run.invalidations;
    total.disks_checked += run.disks_checked;
    total.records_checked += run.records_checked;
}

/// at once, on a simulated machine park.
#[test]
fn a50_no_random_history_loses_invents_or_reorders_a_write() {
    let mut total = Report::default();
    for seed in SEEDS {
        let report = catch_unwind(|| run(Config::new(seed)));
        let report =
            report.unwrap_or_else(|_| panic!("seed {seed} failed; replay: cargo run -p mars-sim -- --seed {seed}"));
        add(&mut total, &report);
    }
    println!("{SEEDS:?}: {total:?}");
    // A run in which nothing happens proves nothing.
    for (what, count) in [
        ("handovers", total.handovers),
        ("failovers", total.failovers),
        ("kills", total.kills),
        ("power losses", total.power_losses),
        ("partitions", total.partitions),
        ("invalidations", total.invalidations),
        ("disks compared", total.disks_checked),
    ] {
        assert!(count >= 20, "only {count} {what} in {SEEDS:?}");
    }
}

#[test]
fn one_seed_is_one_run() {
    for seed in [3, 77] {
        assert_eq!(run(Config::new(seed)), run(Config::new(seed)), "seed {seed}");
    }
}
