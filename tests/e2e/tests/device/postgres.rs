//! A real database on a device that changes hands under it.

use anyhow::{Context, Result, ensure};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fs, Mount};
use mars_e2e::link::isolate;
use mars_e2e::machine::{in_vm, on_disk, until};
use mars_e2e::postgres::Postgres;
use mars_e2e::volume::Volume;
use std::time::Duration;

#[test]
fn postgresql_survives_two_handovers_mid_load_and_a_failover_loses_exactly_what_was_not_shipped() {
    let options = Options {
        parent: on_disk(),
        ..Options::default()
    };
    scenario(options, database);
}

/// The emulated machine does some ten transactions a second.
fn scaled(transactions: u32) -> u32 {
    if in_vm() { transactions / 5 } else { transactions }
}

fn database(cluster: &Cluster) -> Result<()> {
    let volume = Volume::create(cluster, "pgdata", "512Mi", "a", &["a", "b", "c"])?;
    let scratch = cluster.scratch("pg")?;
    let mount = |node: &str| Mount::new(&volume.device(node), &cluster.scratch("pgmount")?, "noatime");
    Fs::Ext4.make(&volume.device("a"))?;
    let mut mounted = mount("a")?;
    let mut server = Postgres::create(mounted.point(), &scratch)?;
    server.bench_prepare(if in_vm() { 1 } else { 5 })?;

    for (from, to) in [("a", "b"), ("b", "a")] {
        let before = server.history()?;
        let mut load = server.bench_until_stopped()?;
        until("transactions are under way", Duration::from_mins(1), || {
            Ok(server.history()? > before + u64::from(scaled(200)))
        })?;
        let seen = server.history()?;
        server.stop().with_context(|| format!("on {from}"))?;
        load.wait(Duration::from_secs(30))?;
        mounted.unmount()?;
        volume.handover(to)?;
        mounted = mount(to)?;
        server = Postgres::start(mounted.point(), &scratch)?;
        ensure!(
            server.history()? >= seen,
            "after the handover to {to} a committed transaction is missing"
        );
        server.check().with_context(|| format!("after the handover to {to}"))?;
    }

    // What is shipped is known exactly: the load stands still while the others catch up, then the line is cut.
    server.bench_exactly(scaled(400))?;
    let shipped = server.history()?;
    server.sql("CHECKPOINT")?;
    for node in ["b", "c"] {
        volume.wait_caught_up("a", node)?;
    }
    let cuts = isolate(
        &cluster.node("a").address()?,
        &[&cluster.node("b").address()?, &cluster.node("c").address()?],
    )?;
    server.bench_exactly(scaled(200))?;
    ensure!(server.history()? == shipped + u64::from(scaled(200)), "committed on a");
    cluster.node("a").poweroff()?;
    server.die();
    drop(mounted);

    volume.failover("c")?;
    // Only now: the kernel goes on sending what a dead process left in its sockets.
    drop(cuts);
    let mounted = mount("c")?;
    let server = Postgres::start(mounted.point(), &scratch)?;
    let found = server.history()?;
    ensure!(
        found == shipped,
        "{shipped} transactions had been shipped, {found} are there"
    );
    server.check().context("after the failover")?;
    server.bench_exactly(scaled(100))?;
    server.stop()?;
    mounted.unmount()?;
    Fs::Ext4.check(&volume.device("c"))
}
