//! Who is primary: handover, failover, partitions, forks.

use anyhow::{Context, Result, ensure};
use mars_crds::{ActualRole, MarsReplica, MarsResource, ReplicaData, Verb};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fs, Mount};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::link::{Cut, isolate};
use mars_e2e::machine::{POLL, in_vm, until};
use mars_e2e::node::live_in;
use mars_e2e::volume::Volume;
use serde_json::json;
use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const MIN: Duration = Duration::from_mins(1);

/// Asks both agents over and over, and fails when both say at the same time that they are primary.
fn watch_for_two_primaries(dirs: &[PathBuf; 2], resource: &str, stop: &AtomicBool) -> Result<u32> {
    let primary = |dir: &PathBuf| live_in(dir, resource).is_ok_and(|status| status.role == Some(ActualRole::Primary));
    let mut looks = 0;
    while !stop.load(Ordering::SeqCst) {
        // The answers are not of one moment: when both say so, the first is asked again, as the role may have moved in between.
        let both = primary(&dirs[0]) && primary(&dirs[1]) && primary(&dirs[0]);
        ensure!(!both, "both are primary at the same time");
        looks += 1;
        std::thread::sleep(POLL);
    }
    Ok(looks)
}

#[test]
fn a50_handovers_under_load_lose_no_acknowledged_write_and_never_make_two_primaries() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "over", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(2048);
        let stop = &AtomicBool::new(false);
        let dirs = &[cluster.node("a").dir(), cluster.node("b").dir()];
        // There and back in the emulated machine, which is slow.
        let (rounds, before, after) = if in_vm() { (2, 150, 50) } else { (6, 700, 300) };
        std::thread::scope(|scope| {
            let watch = scope.spawn(move || watch_for_two_primaries(dirs, "over", stop));
            let outcome = (1..=rounds).try_for_each(|round| {
                let (here, there) = if round % 2 == 1 { ("a", "b") } else { ("b", "a") };
                // The load goes on until the wish is out; only then is the device closed.
                let device = open_direct(&volume.device(here))?;
                ledger.write(&device, before)?;
                volume.wish_primary(there)?;
                ledger.write(&device, after)?;
                drop(device);
                volume.wait_primary(there)?;
                ensure!(
                    !volume.device(here).exists(),
                    "round {round}: {here} has no device any more"
                );
                let found = ledger.prefix(&volume.device(there))?;
                ensure!(
                    found == ledger.written,
                    "round {round}: {found} of {} acknowledged writes are on {there}",
                    ledger.written
                );
                Ok(())
            });
            stop.store(true, Ordering::SeqCst);
            let looks = watch.join().expect("the watcher does not panic")?;
            ensure!(looks > 10, "the roles were looked at {looks} times only");
            outcome
        })
    });
}

#[test]
fn a50_an_abort_before_the_old_primary_has_closed_leaves_it_primary() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "abort", "64Mi", "a", &["a", "b"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(1024);
        ledger.write(&device, 500)?;
        volume.wish_primary("b")?;
        volume.wait_live("a", "refuses to close", |status| status.refused.is_some())?;
        volume.wish_primary("a")?;
        cluster.wait("abort", "goes back to a", |object: &MarsResource| {
            object
                .status
                .as_ref()
                .and_then(|status| status.designation.as_ref())
                .is_some_and(|designation| designation.node == "a")
        })?;
        // The device was never taken away: the same descriptor still works.
        ledger.write(&device, 500)?;
        device.sync_all()?;
        ensure!(ledger.prefix(&volume.device("a"))? == 1000, "every write is there");
        volume.wait_caught_up("a", "b")
    });
}

#[test]
fn a50_a_successor_that_crashes_in_the_middle_becomes_primary_when_it_is_back() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "crash", "64Mi", "a", &["a", "b", "c"])?;
        let mut ledger = Ledger::new(1024);
        ledger.write(&open_direct(&volume.device("a"))?, 2000)?;
        volume.wish_primary("b")?;
        volume.wait_live("a", "has closed or is closing", |status| {
            status.role != Some(ActualRole::Primary)
        })?;
        cluster.node("b").poweroff()?;
        cluster.node("b").start()?;
        volume.wait_primary("b")?;
        ensure!(
            ledger.prefix(&volume.device("b"))? == 2000,
            "every acknowledged write is on b"
        );
        volume.wait_caught_up("b", "c")
    });
}

/// Writes on a, of which the last part does not reach b and c; a loses its power; returns (shipped, written) and the cuts, which
/// must stay until somebody else is primary: the kernel goes on sending what a dead process left in its sockets.
fn die_with_unshipped_writes(
    cluster: &Cluster,
    volume: &Volume<'_>,
    ledger: &mut Ledger,
) -> Result<(u64, u64, Vec<Cut>)> {
    let device = open_direct(&volume.device("a"))?;
    ledger.write(&device, 1500)?;
    device.sync_all()?;
    for node in volume.others("a") {
        volume.wait_caught_up("a", &node)?;
    }
    let shipped = ledger.written;
    let cuts = isolate(
        &cluster.node("a").address()?,
        &[&cluster.node("b").address()?, &cluster.node("c").address()?],
    )?;
    ledger.write(&device, 700)?;
    device.sync_all()?;
    cluster.node("a").poweroff()?;
    Ok((shipped, ledger.written, cuts))
}

#[test]
fn a51_a_failover_continues_from_exactly_what_had_arrived_and_the_reported_loss_is_the_rest() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "loss", "64Mi", "a", &["a", "b", "c"])?;
        let mut ledger = Ledger::new(2048);
        let (shipped, written, cuts) = die_with_unshipped_writes(cluster, &volume, &mut ledger)?;
        let epochs = volume.live("c")?.lineage.len();
        volume.failover("c")?;
        let found = ledger.prefix(&volume.device("c"))?;
        ensure!(
            found == shipped,
            "{found} writes are on c, {shipped} had arrived of {written}"
        );
        let lineage = volume.live("c")?.lineage;
        ensure!(lineage.len() == epochs + 1, "a failover starts a new epoch");
        ensure!(
            lineage.last().is_some_and(|epoch| epoch.cause == "Failover"),
            "{lineage:?}"
        );
        volume.wait_live("b", "follows c", |status| status.lineage.len() == lineage.len())?;

        drop(cuts);
        cluster.node("a").start()?;
        let lost = i64::try_from(written - shipped)? * mars_e2e::ledger::LSN_PER_WRITE;
        // What is found at start counts as durable only once it has been written again: until then the fork looks smaller.
        let status = volume.wait_live("a", "reports all of its fork", |status| {
            status.forks.first().is_some_and(|fork| fork.ours_bytes >= lost)
        })?;
        ensure!(status.role == Some(ActualRole::Secondary), "a came back as a secondary");
        let fork = &status.forks[0];
        // A restart may close the tail with records of its own; the writes are the bulk of it.
        ensure!(
            (lost..lost + 4096).contains(&fork.ours_bytes),
            "the loss was {lost} bytes, reported are {}",
            fork.ours_bytes
        );
        Ok(())
    });
}

#[test]
fn a52_partition_planned_a_secondary_waits_and_switches_when_the_network_is_back() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "part", "64Mi", "a", &["a", "b"])?;
        Fs::Ext4.make(&volume.device("a"))?;
        let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "noatime")?;
        let cut = Cut::between(&cluster.node("a").address()?, &cluster.node("b").address()?)?;
        // The partition itself changes nothing: writes go on, the lag grows.
        std::fs::write(mounted.point().join("during"), "partition\n".repeat(10_000))?;
        // umount and secondary: fine.
        mounted.unmount()?;
        volume.wish_primary("")?;
        volume.wait_secondary("a")?;
        let end = volume.durable("a")?;
        ensure!(!volume.device("a").exists(), "a has no device any more");
        // primary on B: it cannot have a's last writes, so it waits.
        volume.wish_primary("b")?;
        volume.wait_live("b", "knows of the order", |status| {
            status.role != Some(ActualRole::Primary)
        })?;
        ensure!(
            volume.durable("b")? < end && !volume.device("b").exists(),
            "b must not become primary without a's last writes"
        );
        cut.heal()?;
        volume.wait_primary("b")?;
        let mounted = Mount::new(&volume.device("b"), &cluster.scratch("mnt")?, "noatime")?;
        ensure!(
            std::fs::read_to_string(mounted.point().join("during"))?.len() == 100_000,
            "the last write on a is on b"
        );
        mounted.unmount()?;
        ensure!(volume.live("a")?.forks.is_empty(), "no split brain");
        Fs::Ext4.check(&volume.device("b"))
    });
}

#[test]
fn a52_partition_forced_b_works_at_once_and_a_reports_the_split_when_the_network_is_back() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "split", "64Mi", "a", &["a", "b"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(1024);
        ledger.write(&device, 500)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")?;
        let cut = Cut::between(&cluster.node("a").address()?, &cluster.node("b").address()?)?;
        ledger.write(&device, 300)?;
        device.sync_all()?;
        drop(device);
        // The agent of a hears of nothing while it is frozen, as one behind a partition from the API would.
        cluster.node("a").freeze()?;
        volume.failover("b")?;
        ensure!(
            ledger.prefix(&volume.device("b"))? == 500,
            "b works with what had arrived"
        );
        cluster.node("a").thaw()?;
        cut.heal()?;
        volume.wait_secondary("a")?;
        volume.wait_live("a", "reports the split", |status| !status.forks.is_empty())?;
        cluster.wait("split", "shows the split", |object: &MarsResource| {
            object
                .status
                .as_ref()
                .is_some_and(|status| !status.forks.is_empty() && status.state == "SplitBrain")
        })?;
        Ok(())
    });
}

#[test]
fn a53_two_primaries_both_run_on_and_secondaries_stop_before_the_fork() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "twins", "64Mi", "a", &["a", "b", "c"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(1024);
        ledger.write(&device, 500)?;
        device.sync_all()?;
        for node in ["b", "c"] {
            volume.wait_caught_up("a", node)?;
        }
        let (a, b) = (cluster.node("a").address()?, cluster.node("b").address()?);
        let cut = Cut::between(&a, &b)?;
        // c follows a for a while: it has log that b will never have, since b does not hear c, either.
        let also = Cut::between(&b, &cluster.node("c").address()?)?;
        ledger.write(&device, 200)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "c")?;
        let cuts = isolate(&a, &[&cluster.node("c").address()?])?;
        ledger.write(&device, 100)?;
        // The device is in use on a, so a stays primary although it hears of b.
        volume.failover("b")?;
        let other = open_direct(&volume.device("b"))?;
        let mut branch = Ledger::new(1024);
        other.sync_all()?;
        branch.write(&other, 50)?;
        other.sync_all()?;
        cut.heal()?;
        also.heal()?;
        drop(cuts);

        ledger.write(&device, 10)?;
        branch.write(&other, 10)?;
        let object: MarsResource = cluster.wait("twins", "reports the split brain", |object: &MarsResource| {
            object
                .status
                .as_ref()
                .is_some_and(|status| status.state == "SplitBrain" && !status.forks.is_empty())
        })?;
        let status = object.status.context("status")?;
        ensure!(
            status
                .forks
                .iter()
                .all(|fork| fork.lsn > 0 && fork.node_bytes + fork.other_bytes > 0),
            "{:?}",
            status.forks
        );
        ensure!(
            volume.live("a")?.role == Some(ActualRole::Primary) && volume.live("b")?.role == Some(ActualRole::Primary),
            "both run on"
        );
        let c = volume.live("c")?;
        ensure!(
            c.role == Some(ActualRole::Secondary) && c.data_state == Some(ReplicaData::Consistent),
            "c is consistent: {c:?}"
        );
        ensure!(
            ledger.prefix(&volume.data_file("c")?)? <= 700,
            "c denotes a state before the fork, on a's side"
        );
        Ok(())
    });
}

#[test]
fn a55_a_device_in_use_is_never_taken_away_and_the_user_is_named() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "busy", "64Mi", "a", &["a", "b"])?;
        Fs::Ext4.make(&volume.device("a"))?;
        let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "noatime")?;
        for wish in ["b", ""] {
            volume.wish_primary(wish)?;
            volume.wait_device_in_use(&mounted.point().to_string_lossy())?;
            let replica: MarsReplica = cluster.wait("busy.a", "names the mount", |replica: &MarsReplica| {
                let point = mounted.point().to_string_lossy();
                let status = replica.status.as_ref();
                status.is_some_and(|status| status.opened_by.iter().any(|user| user.name.contains(&*point)))
            })?;
            ensure!(
                replica
                    .status
                    .is_some_and(|status| status.role == Some(ActualRole::Primary)),
                "a stays primary"
            );
            std::fs::write(mounted.point().join("still"), "works\n")?;
        }
        mounted.unmount()?;
        volume.wait_secondary("a")?;
        volume.handover("b")?;
        let mounted = Mount::new(&volume.device("b"), &cluster.scratch("mnt")?, "noatime")?;
        ensure!(
            std::fs::read_to_string(mounted.point().join("still"))? == "works\n",
            "written while it was refused"
        );
        mounted.unmount()
    });
}

#[test]
fn a56_a_returning_old_primary_never_writes_under_the_old_designation() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "return", "64Mi", "a", &["a", "b"])?;
        for way in ["crash", "reboot"] {
            let (old, new) = if way == "crash" { ("a", "b") } else { ("b", "a") };
            let device = File::options().write(true).open(volume.wait_primary(old)?)?;
            device.sync_all()?;
            drop(device);
            until("the other side has it all", MIN, || {
                Ok(volume.durable(new)? == volume.durable(old)?)
            })?;
            match way {
                "crash" => cluster.node(old).kill()?,
                _ => cluster.node(old).poweroff()?,
            }
            volume.failover(new)?;
            cluster.node(old).start()?;
            volume.wait_secondary(old)?;
            until("the old device is gone", MIN, || Ok(!volume.device(old).exists()))?;
            volume.wait_live(old, "follows the new primary", |status| {
                status.forks.is_empty() && status.data_state == Some(ReplicaData::Consistent)
            })?;
            volume.wait_caught_up(new, old)?;
        }
        cluster.patch_resource("return", &json!({ "primary": "a" }))
    });
}

#[test]
fn a56_users_of_a_device_whose_role_was_lost_get_errors_instead_of_hanging_and_the_replica_can_come_back() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "stranded", "64Mi", "a", &["a", "b"])?;
        Fs::Ext4.make(&volume.device("a"))?;
        let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "noatime")?;
        let write = |point: PathBuf, name: &str| -> std::io::Result<()> {
            let mut file = File::create(point.join(name))?;
            std::io::Write::write_all(&mut file, &vec![7; 1 << 20])?;
            file.sync_all()
        };
        write(mounted.point().to_owned(), "before")?;
        volume.wait_caught_up("a", "b")?;
        cluster.node("a").kill()?;
        // Nobody serves the device; whoever writes waits for the agent to come back.
        let (told, outcome) = std::sync::mpsc::channel();
        let point = mounted.point().to_owned();
        std::thread::spawn(move || told.send(write(point, "during")));
        volume.failover("b")?;
        cluster.node("a").start()?;

        let failed = outcome.recv_timeout(MIN).context("the writer still hangs")?;
        ensure!(failed.is_err(), "what nobody stores must not be acknowledged");
        let named = mounted.point().to_string_lossy().into_owned();
        let status = volume.wait_live("a", "names the users that must stop", |status| {
            status
                .conditions
                .iter()
                .any(|condition| condition.reason == "DeviceStranded" && condition.message.contains(&named))
        })?;
        ensure!(
            status.role == Some(ActualRole::Secondary) && status.device.is_none() && !status.opened_by.is_empty(),
            "{status:?}"
        );
        ensure!(!volume.device("a").exists(), "no link leads to it");
        mounted.unmount()?;
        volume.wait_live("a", "has no stranded device any more", |status| {
            status.opened_by.is_empty()
                && status
                    .conditions
                    .iter()
                    .all(|condition| condition.reason != "DeviceStranded")
        })?;
        // The winner goes on, and the loser can follow it.
        let mounted = Mount::new(&volume.device("b"), &cluster.scratch("mnt-b")?, "noatime")?;
        ensure!(mounted.point().join("before").is_file(), "what had arrived is on b");
        mounted.unmount()?;
        volume.act_and_wait(Verb::Invalidate, Some("a"))?;
        volume.wait_consistent("a")?;
        volume.wait_caught_up("b", "a")?;
        volume.wait_written_back("b")?;
        volume.same_data("b", "a")
    });
}
