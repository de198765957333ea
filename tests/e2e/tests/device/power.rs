//! A machine that loses its power, whole: run in the VM by `scripts/vm-tests`, which pulls the plug between the two parts.
//!
//! The first part writes and flushes for ever and says after each flush how much was flushed; the second, on the next boot, looks.

use anyhow::{Context, Result, ensure};
use mars_e2e::cluster::{Options, scenario};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::volume::Volume;
use std::io::Write;
use std::path::PathBuf;

/// Tells this ledger from left-overs; both parts must agree.
const SEED: u64 = 0x6d61_7273;
const SLOTS: u64 = 2048;

fn options() -> Options {
    Options {
        keep: std::env::var_os("MARS_POWER_DIR").map(PathBuf::from),
        ..Options::two()
    }
}

#[test]
#[ignore = "needs a machine whose plug can be pulled: run by the VM tier"]
fn power_first_part_writes_until_the_plug_is_pulled() {
    scenario(options(), |cluster| {
        let volume = Volume::create(cluster, "power", "64Mi", "a", &["a", "b"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::with_seed(SLOTS, SEED);
        let mut out = std::io::stdout();
        loop {
            // A varying number of writes between flushes, so that the plug finds flushed and unflushed ones.
            ledger.write(&device, 1 + ledger.written % 37)?;
            device.sync_all()?;
            writeln!(out, "flushed {}", ledger.written)?;
            out.flush()?;
        }
    });
}

#[test]
#[ignore = "needs a machine whose plug can be pulled: run by the VM tier"]
fn a11_flushed_writes_survive_a_power_loss_of_the_whole_machine() {
    scenario(options(), |cluster| -> Result<()> {
        let flushed: u64 = std::env::var("MARS_POWER_FLUSHED")
            .context("MARS_POWER_FLUSHED")?
            .parse()?;
        let volume = Volume::existing(cluster, "power", &["a".into(), "b".into()]);
        // P9: after a reboot the role is resumed only once nobody knows of a newer designation; here that is so.
        let device = volume.wait_primary("a")?;
        let mut ledger = Ledger::with_seed(SLOTS, SEED);
        let found = ledger.prefix(&device)?;
        println!("{flushed} writes were flushed, {found} are there");
        ensure!(found >= flushed, "{flushed} writes were flushed, {found} are there");
        ensure!(flushed > 0, "the first part flushed nothing");
        ledger.written = found;
        let device = open_direct(&device)?;
        ledger.write(&device, 100)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")?;
        ensure!(
            ledger.prefix(&volume.data_file("b")?)? == found + 100,
            "b follows, with the same content"
        );
        Ok(())
    });
}
