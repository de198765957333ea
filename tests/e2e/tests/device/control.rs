//! Wish and fact, reboots, and life without the API server.

use anyhow::{Context, Result, ensure};
use mars_crds::{ActualRole, MarsAction, MarsReplica, MarsResource, ReplicaData, Verb, WishRole};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fs, Mount, wait_device};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::until;
use mars_e2e::volume::{Volume, manifest};
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
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

#[test]
fn a36_a_detached_data_disk_is_the_primarys_content_at_its_applied_position_and_comes_back_unless_it_was_changed() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "off", "64Mi", "a", &["a", "b"])?;
        let attach = |attach: bool| {
            let members = json!({ "replicas": [
                { "node": "a", "pool": "default" },
                { "node": "b", "pool": "default", "switches": { "attach": attach } },
            ]});
            cluster.patch_resource("off", &members)
        };
        Fs::Ext4.make(&volume.device("a"))?;
        let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "noatime")?;
        std::fs::write(mounted.point().join("before"), vec![3; 1 << 20])?;
        mounted.unmount()?;
        let mut ledger = Ledger::new(512);
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        attach(false)?;
        let status = volume.wait_live("b", "has let go of its disk", |status| status.state == "Detached")?;
        let positions = status.positions.context("positions")?;
        ensure!(
            positions.applied == positions.dirty_end && positions.applied == volume.durable("a")?,
            "at rest, at an exact position: {positions:?}"
        );
        volume.same_data("a", "b")?;
        let frozen = mars_e2e::device::sha256(&volume.data_file("b")?)?;

        // It can be looked at while the primary goes on, and log still arrives; a restart of the agent changes nothing.
        let disk = mars_e2e::backing::ReadOnly::new(&volume.data_file("b")?)?;
        let seen = Mount::new(disk.device(), &cluster.scratch("seen")?, "ro,noload")?;
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 300)?;
        device.sync_all()?;
        cluster.node("b").kill()?;
        cluster.node("b").start()?;
        let end = volume.durable("a")?;
        let status = volume.wait_live("b", "has the log", |status| {
            let durable = status.positions.as_ref().map_or(0, |at| at.durable.lsn);
            status.state == "Detached" && durable >= end
        })?;
        ensure!(
            status.positions.is_some_and(|now| now.applied == positions.applied),
            "nothing was applied"
        );
        ensure!(
            std::fs::read(seen.point().join("before"))? == vec![3; 1 << 20],
            "the backup sees the file"
        );
        ensure!(
            mars_e2e::device::sha256(&volume.data_file("b")?)? == frozen,
            "not a byte has changed"
        );
        // A person who forces the role over is told to attach first.
        let forced = volume.act(Verb::Failover, Some("b"))?;
        cluster.wait(&forced, "says why it waits", |action: &MarsAction| {
            let status = action.status.as_ref();
            status.is_some_and(|status| status.message.contains("attach of b is switched off"))
        })?;
        cluster.kubectl(&["delete", "marsaction", &forced])?;
        seen.unmount()?;
        drop(disk);
        attach(true)?;
        volume.wait_live("b", "replays again", |status| status.state != "Detached")?;
        volume.wait_caught_up("a", "b")?;
        volume.wait_written_back("a")?;
        volume.same_data("a", "b")?;

        // Somebody writes to the detached disk: it is not believed any more.
        attach(false)?;
        volume.wait_live("b", "has let go again", |status| status.state == "Detached")?;
        let data = File::options().write(true).open(volume.data_file("b")?)?;
        data.write_all_at(b"tampered", 8 << 20)?;
        data.sync_all()?;
        drop(data);
        attach(true)?;
        volume.wait_live("b", "refuses the changed disk", |status| {
            status
                .conditions
                .iter()
                .any(|condition| condition.reason == "DiskChanged")
        })?;
        volume.act_and_wait(Verb::Invalidate, Some("b"))?;
        volume.wait_consistent("b")?;
        volume.wait_caught_up("a", "b")?;
        volume.same_data("a", "b")
    });
}

#[test]
fn a37_a_resource_grows_when_its_block_devices_have_grown() {
    scenario(Options::two(), |cluster| {
        let dir = cluster.scratch("disks")?;
        let disks = [
            mars_e2e::backing::Disk::new(&dir.join("a"), 64 << 20)?,
            mars_e2e::backing::Disk::new(&dir.join("b"), 64 << 20)?,
        ];
        let mut resource = manifest("disks", "64Mi", "a", &["a", "b"]);
        for (index, node) in ["a", "b"].iter().enumerate() {
            resource["spec"]["replicas"][index] = json!({ "node": node, "device": disks[index].device() });
        }
        let volume = Volume::apply(cluster, &resource)?;
        let mut ledger = Ledger::new(1024);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 300)?;
        cluster.patch_resource("disks", &json!({ "size": "96Mi" }))?;
        cluster.wait("disks", "names the disk that is too small", |object: &MarsResource| {
            let conditions = object.status.iter().flat_map(|status| &status.conditions);
            conditions
                .into_iter()
                .any(|condition| condition.reason == "DiskTooSmall")
        })?;
        for disk in &disks {
            disk.grow(96 << 20)?;
        }
        until("the device has grown under its user", Duration::from_mins(1), || {
            Ok(mars_e2e::device::size_bytes(&volume.wait_primary("a")?)? == 96 << 20)
        })?;
        drop(device);
        let file = File::options().write(true).open(volume.device("a"))?;
        file.write_all_at(&[42; 8192], (96 << 20) - 8192)?;
        file.sync_all()?;
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        ensure!(disks[0].sha256()? == disks[1].sha256()?, "both disks hold the same");
        ensure!(ledger.prefix(&volume.device("a"))? == 300, "every write is there");
        Ok(())
    });
}

#[test]
fn a32_a_fake_sync_believes_equal_data_without_moving_a_byte() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "fake", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(1024);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 300)?;
        device.sync_all()?;
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        let sync = |on: bool| {
            let members = json!({ "replicas": [
                { "node": "a", "pool": "default" },
                { "node": "b", "pool": "default", "switches": { "sync": on } },
            ]});
            cluster.patch_resource("fake", &members)
        };
        sync(false)?;
        cluster.wait("fake.b", "has been told", |replica: &MarsReplica| {
            !replica.spec.switches.sync
        })?;
        volume.act_and_wait(Verb::Invalidate, Some("b"))?;
        volume.wait_live("b", "needs a sync", |status| {
            status.data_state != Some(ReplicaData::Consistent)
        })?;
        let action = volume.act(Verb::FakeSync, Some("b"))?;
        cluster.wait("fake.b", "has the order", |replica: &MarsReplica| {
            replica.spec.fake_sync.is_some()
        })?;
        // Different on purpose, where nobody has written: a real sync would find it.
        let data = File::options().write(true).open(volume.data_file("b")?)?;
        data.write_all_at(b"different", 60 << 20)?;
        data.sync_all()?;
        sync(true)?;
        cluster.wait(&action, "is done", |action: &MarsAction| {
            action
                .status
                .as_ref()
                .is_some_and(|status| status.phase == mars_crds::ActionPhase::Succeeded)
        })?;
        volume.wait_consistent("b")?;
        ledger.write(&device, 200)?;
        device.sync_all()?;
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        ensure!(
            ledger.prefix(&volume.data_file("b")?)? == 500,
            "what is written afterwards arrives"
        );
        ensure!(
            volume.same_data("a", "b").is_err(),
            "nothing was compared: what differed still does, as the acknowledgement says"
        );
        Ok(())
    });
}
