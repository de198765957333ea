//! Wish and fact, reboots, and life without the API server.

use anyhow::{Context, Result, ensure};
use mars_crds::{ActualRole, MarsReplica, WishRole};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::wait_device;
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::until;
use mars_e2e::volume::{Volume, manifest};
use serde_json::json;
use std::fs::File;
use std::time::Duration;

/// What must be the same after a reboot: role, data state, switches, designation, end of the log, device size.
fn facts(volume: &Volume<'_>, node: &str) -> Result<String> {
    let live = volume.live(node)?;
    let switches = volume.replica(node)?.spec.switches;
    let end = live.positions.as_ref().context("positions")?.durable.lsn;
    Ok(format!(
        "{:?} {:?} {switches:?} {:?} {end} {:?}",
        live.role, live.data_state, live.designation, live.size_bytes
    ))
}

#[test]
fn a01_after_a_reboot_of_every_node_roles_switches_and_positions_are_as_before() {
    scenario(Options::default(), |cluster| {
        let one = Volume::create(cluster, "one", "64Mi", "a", &["a", "b", "c"])?;
        let two = Volume::create(cluster, "two", "64Mi", "b", &["a", "b"])?;
        cluster.patch_resource(
            "one",
            &json!({ "replicas": [
                { "node": "a", "pool": "default" },
                { "node": "b", "pool": "default" },
                { "node": "c", "pool": "default", "switches": { "replay": false } },
            ]}),
        )?;
        cluster.wait("one.c", "has been told", |replica: &MarsReplica| {
            !replica.spec.switches.replay
        })?;
        let mut ledger = Ledger::new(1024);
        let device = open_direct(&one.device("a"))?;
        ledger.write(&device, 2000)?;
        device.sync_all()?;
        drop(device);
        one.wait_caught_up("a", "b")?;
        until("c has the log", Duration::from_mins(1), || {
            Ok(one.durable("c")? == one.durable("a")?)
        })?;
        let places = [(&one, "a"), (&one, "b"), (&one, "c"), (&two, "a"), (&two, "b")];
        let before: Vec<String> = places
            .iter()
            .map(|(volume, node)| facts(volume, node))
            .collect::<Result<_>>()?;

        for node in cluster.nodes() {
            cluster.node(node).poweroff()?;
        }
        cluster.control_plane_kill()?;
        cluster.control_plane_start()?;
        for node in cluster.nodes() {
            cluster.node(node).start()?;
        }
        for ((volume, node), before) in places.iter().zip(&before) {
            until(
                &format!("{} on {node} is as before", volume.name),
                Duration::from_mins(1),
                || {
                    let now = facts(volume, node)?;
                    // A reboot may cut an unproven tail and starts a new epoch: only the end of the log may differ, and only upwards.
                    ensure!(&now == before, "it is {now}, it was {before}");
                    Ok(true)
                },
            )?;
        }
        one.wait_primary("a")?;
        two.wait_primary("b")?;
        ensure!(ledger.prefix(&one.device("a"))? == 2000, "every flushed write is there");
        Ok(())
    });
}

#[test]
fn a02_wish_and_fact_differ_for_as_long_as_they_must_and_both_are_shown() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "wish", "64Mi", "a", &["a", "b"])?;
        // Device busy: the wish moves, the fact does not.
        let user = File::open(volume.device("a"))?;
        volume.wish_primary("b")?;
        volume.wait_device_in_use(&std::process::id().to_string())?;
        let replica: MarsReplica =
            cluster.wait("wish.a", "names the user of the device", |replica: &MarsReplica| {
                let status = replica.status.as_ref();
                status.is_some_and(|status| !status.opened_by.is_empty())
            })?;
        ensure!(
            replica
                .status
                .as_ref()
                .is_some_and(|status| status.role == Some(ActualRole::Primary)),
            "a is still primary"
        );
        let shown = cluster.kubectl(&["get", "mars", "wish", "--no-headers"])?;
        let words: Vec<&str> = shown.split_whitespace().collect();
        ensure!(
            words.get(1) == Some(&"a") && words.get(2) == Some(&"b"),
            "PRIMARY a and WISH b are both shown: {shown}"
        );
        drop(user);
        volume.wait_primary("b")?;

        // Peer down: the wish for it stays a wish.
        cluster.node("a").kill()?;
        volume.wish_primary("a")?;
        cluster.wait("wish.a", "shows the last report", |replica: &MarsReplica| {
            replica
                .status
                .as_ref()
                .is_some_and(|status| status.role == Some(ActualRole::Secondary))
        })?;
        ensure!(
            volume.live("b")?.role != Some(ActualRole::Secondary),
            "b does not give up the role for a node that does not answer"
        );
        cluster.node("a").start()?;
        volume.wait_primary("a")?;
        volume.wait_secondary("b")
    });
}

#[test]
fn a03_data_path_replication_and_agent_restart_work_while_the_api_server_is_down() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "alone", "64Mi", "a", &["a", "b", "c"])?;
        let device = open_direct(&volume.device("a"))?;
        let mut ledger = Ledger::new(2048);
        ledger.write(&device, 500)?;
        cluster.control_plane_kill()?;

        ledger.write(&device, 500)?;
        cluster.node("a").kill()?;
        cluster.node("b").kill()?;
        cluster.node("a").start()?;
        cluster.node("b").start()?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        volume.wait_written_back("a")?;
        for node in ["b", "c"] {
            volume.wait_caught_up("a", node)?;
        }
        let end = volume.durable("a")?;

        cluster.control_plane_start()?;
        volume.wait_primary("a")?;
        for node in ["a", "b", "c"] {
            cluster.wait(
                &format!("alone.{node}"),
                "its status has caught up",
                |replica: &MarsReplica| {
                    replica
                        .status
                        .as_ref()
                        .and_then(|status| status.positions.as_ref())
                        .is_some_and(|positions| positions.durable.lsn >= end)
                },
            )?;
        }
        ensure!(ledger.prefix(&volume.device("a"))? == 1500, "every write is there");
        volume.same_data("a", "b")?;
        volume.same_data("a", "c")
    });
}

#[test]
fn a_resource_without_wish_gets_replicas_and_no_primary() {
    scenario(Options::default(), |cluster: &Cluster| {
        cluster.apply(&manifest("nobody", "64Mi", "", &["a", "b"]).to_string())?;
        cluster.wait("nobody.a", "is there as a secondary", |replica: &MarsReplica| {
            replica.spec.role == WishRole::Secondary
                && replica
                    .status
                    .as_ref()
                    .is_some_and(|status| status.role != Some(ActualRole::Primary))
        })?;
        let volume = Volume::existing(cluster, "nobody", &["a".into(), "b".into()]);
        ensure!(
            !volume.device("a").exists() && !volume.device("b").exists(),
            "no device without a primary"
        );
        volume.wish_primary("b")?;
        wait_device(&volume.device("b"), Duration::from_mins(1)).map(drop)
    });
}
