//! Replication over a long, thin, lossy line.

use anyhow::{Context, Result, ensure};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::link::Wan;
use mars_e2e::machine::until;
use mars_e2e::volume::Volume;
use std::time::{Duration, Instant};

#[test]
fn log_travels_and_is_replayed_over_a_line_of_50_ms_with_loss_and_100_mbit() {
    scenario(Options::default(), far_away);
}

fn far_away(cluster: &Cluster) -> Result<()> {
    let volume = Volume::create(cluster, "far", "256Mi", "a", &["a", "b"])?;
    let wan = Wan::between(
        "wan",
        &cluster.node("a").address()?,
        &cluster.node("b").address()?,
        25,
        0.1,
        100,
    )?;
    let device = open_direct(&volume.device("a"))?;
    let mut ledger = Ledger::new(32_768);
    // The application does not feel the line.
    let begin = Instant::now();
    ledger.write(&device, 12_000)?;
    device.sync_all()?;
    let written_s = begin.elapsed().as_secs_f64();
    volume.wait_caught_up("a", "b")?;
    let shipped_s = begin.elapsed().as_secs_f64();
    let mib = 12_000.0 * 4136.0 / 1_048_576.0;
    println!(
        "{mib:.0} MiB written in {written_s:.1} s, on b's disk after {shipped_s:.1} s: {:.1} Mbit/s",
        mib * 8.39 / shipped_s
    );
    ensure!(ledger.prefix(&volume.data_file("b")?)? == 12_000, "b has it all");

    // A pulled cable: writes go on; what queued up arrives when it is back.
    wan.pull()?;
    ledger.write(&device, 4000)?;
    device.sync_all()?;
    let b = volume.live("b")?;
    ensure!(b.data_state.is_some(), "b answers");
    wan.plug()?;
    volume.wait_caught_up("a", "b")?;
    ensure!(ledger.prefix(&volume.data_file("b")?)? == 16_000, "b has it all");

    // A line that ends without a word and comes back: connections are made anew.
    drop(wan);
    ledger.write(&device, 1000)?;
    device.sync_all()?;
    let _wan = Wan::between(
        "wan",
        &cluster.node("a").address()?,
        &cluster.node("b").address()?,
        25,
        0.1,
        100,
    )?;
    until("b has caught up", Duration::from_mins(2), || {
        Ok(volume.applied("b")? >= volume.durable("a").context("durable end of a")?)
    })?;
    ensure!(ledger.prefix(&volume.data_file("b")?)? == 17_000, "b has it all");
    Ok(())
}
