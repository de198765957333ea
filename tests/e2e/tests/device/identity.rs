//! Who somebody is, and whose data something is.

use anyhow::{Context, Result, ensure};
use mars_crds::{ActualRole, MarsNode, MarsReplica, MarsResource, ReplicaData, Verb};
use mars_e2e::backing::Disk;
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::{Cmd, until};
use mars_e2e::volume::Volume;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;

const MIN: Duration = Duration::from_mins(1);

fn replica_dir(cluster: &Cluster, volume: &Volume<'_>, node: &str) -> Result<PathBuf> {
    let uuid = volume.replica(node)?.spec.replica_uuid.to_string();
    Ok(cluster.node(node).store().join("replicas").join(uuid))
}

#[test]
fn a59_a_replica_directory_of_another_resource_is_refused_and_not_written() {
    scenario(Options::two(), |cluster| {
        let one = Volume::create(cluster, "one", "64Mi", "a", &["a", "b"])?;
        let two = Volume::create(cluster, "two", "64Mi", "a", &["a", "b"])?;
        cluster.node("b").stop()?;
        let (first, second) = (replica_dir(cluster, &one, "b")?, replica_dir(cluster, &two, "b")?);
        let aside = first.with_extension("aside");
        std::fs::rename(&first, &aside)?;
        std::fs::rename(&second, &first)?;
        std::fs::rename(&aside, &second)?;
        let before = (one.data_file("b")?, mars_e2e::device::sha256(&one.data_file("b")?)?);
        cluster.node("b").start()?;
        let mut ledger = Ledger::new(512);
        let device = open_direct(&one.device("a"))?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        cluster.wait("b", "has come up", |node: &MarsNode| {
            node.status.as_ref().is_some_and(|status| status.inventory_complete)
        })?;
        until("b refuses, with a reason", MIN, || {
            let object: MarsReplica = cluster.get("one.b")?;
            let status = object.status.unwrap_or_default();
            Ok(status
                .conditions
                .iter()
                .any(|condition| condition.message.contains("belongs to") || condition.message.contains("another")))
        })?;
        ensure!(
            mars_e2e::device::sha256(&before.0)? == before.1,
            "not a byte was written"
        );
        Ok(())
    });
}

#[test]
fn a59_a_stale_device_link_is_removed_before_it_can_reach_a_foreign_device() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "stale", "64Mi", "a", &["a", "b"])?;
        let foreign = Disk::new(&cluster.scratch("disks")?.join("foreign"), 16 << 20)?;
        cluster.node("b").stop()?;
        std::os::unix::fs::symlink(foreign.device(), volume.device("b"))?;
        cluster.node("b").start()?;
        until("the stale link is gone", MIN, || {
            Ok(std::fs::symlink_metadata(volume.device("b")).is_err())
        })?;
        volume.handover("b").map(drop)
    });
}

#[test]
fn a61_a63_a_peer_without_the_right_certificate_gets_no_further_than_the_handshake() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "tls", "64Mi", "a", &["a", "b"])?;
        let address = cluster.get::<MarsNode>("a")?.status.unwrap_or_default().address;
        let scratch = cluster.scratch("tls")?;
        let own = |file: &str| scratch.join(file).to_string_lossy().into_owned();
        Cmd::new("openssl")
            .args([
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-days",
                "1",
            ])
            .args([
                "-subj",
                "/CN=stranger",
                "-addext",
                "subjectAltName=URI:mars://stranger/stranger",
            ])
            .args(["-keyout", &own("key"), "-out", &own("cert")])
            .run()?;
        let greet = |args: &[&str]| -> Result<String> {
            // TLS 1.3 reports a refused client certificate with the first read, after the handshake; -quiet goes on reading.
            let output = Cmd::new("openssl")
                .args(["s_client", "-connect", &address, "-tls1_3", "-alpn", "h2", "-quiet"])
                .args(args)
                .input("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                .limit(Duration::from_secs(20))
                .output()?;
            Ok(output.stdout + &output.stderr)
        };
        let nobody = greet(&[])?;
        ensure!(
            nobody.to_lowercase().contains("alert"),
            "without a certificate: {nobody}"
        );
        let stranger = greet(&["-cert", &own("cert"), "-key", &own("key")])?;
        ensure!(
            stranger.to_lowercase().contains("alert"),
            "with a certificate of another authority: {stranger}"
        );
        let old = Cmd::new("openssl")
            .args(["s_client", "-connect", &address, "-tls1_2"])
            .limit(Duration::from_secs(20))
            .output()?;
        ensure!(!old.status.success(), "TLS 1.2 must be refused");
        // The members themselves are not disturbed.
        let mut ledger = Ledger::new(512);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 200)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")
    });
}

#[test]
fn a61_a_node_of_another_cluster_is_refused() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "alien", "64Mi", "a", &["a", "b"])?;
        cluster.node("b").stop()?;
        let identity = cluster.node("b").store().join("node/identity.json");
        let original = std::fs::read_to_string(&identity)?;
        let mut changed: Value = serde_json::from_str(&original)?;
        let key = changed
            .as_object()
            .and_then(|object| {
                object
                    .keys()
                    .find(|key| key.to_lowercase().contains("cluster"))
                    .cloned()
            })
            .context("the identity names the cluster")?;
        changed[&key] = json!(uuid::Uuid::new_v4());
        std::fs::write(&identity, changed.to_string())?;
        let log = cluster.state().join("logs/b-agent.log");
        let before = std::fs::metadata(&log)?.len();
        let _ = cluster.node("b").start();
        until("the agent says why it refuses", MIN, || {
            let text = std::fs::read_to_string(&log)?;
            Ok(text[usize::try_from(before)?..].contains("cluster"))
        })?;
        ensure!(
            cluster.node("b").live("alien").is_err(),
            "an agent of another cluster must not serve"
        );
        // Its data is as it was: with the right identity it goes on.
        let _ = cluster.node("b").kill();
        std::fs::write(&identity, original)?;
        cluster.node("b").start()?;
        let mut ledger = Ledger::new(512);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 200)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")
    });
}

#[test]
fn a62_a_deleted_resource_stays_deleted_and_a_node_that_slept_through_it_cleans_up() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "gone", "64Mi", "a", &["a", "b", "c"])?;
        cluster.patch_resource("gone", &json!({ "dataPolicy": "Delete" }))?;
        let files: Vec<PathBuf> = ["a", "b", "c"]
            .iter()
            .map(|node| volume.data_file(node))
            .collect::<Result<_>>()?;
        cluster.node("c").poweroff()?;
        cluster.kubectl(&["delete", "marsresource", "gone", "--wait=false"])?;
        until("a and b have cleaned up", MIN, || {
            Ok(!files[0].exists() && !files[1].exists())
        })?;
        ensure!(!volume.device("a").exists(), "the device is gone");
        ensure!(files[2].exists(), "c has slept");
        cluster.node("c").start()?;
        until("everything is gone", MIN, || {
            let replicas: Vec<MarsReplica> = cluster.list()?;
            Ok(!files[2].exists() && replicas.is_empty() && cluster.find::<MarsResource>("gone")?.is_none())
        })?;
        // Nothing of it comes back, also after all agents have started again.
        for node in cluster.nodes() {
            cluster.node(node).reboot()?;
        }
        for node in cluster.nodes() {
            cluster.wait(node, "has looked through its store", |node: &MarsNode| {
                node.status
                    .as_ref()
                    .is_some_and(|status| status.inventory_complete && status.replicas.is_empty())
            })?;
        }
        ensure!(
            cluster.list::<MarsReplica>()?.is_empty() && cluster.list::<MarsResource>()?.is_empty(),
            "nothing was resurrected"
        );
        Ok(())
    });
}

#[test]
fn deletion_with_retain_keeps_every_byte() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "keep", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(512);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        drop(device);
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        let files = [volume.data_file("a")?, volume.data_file("b")?];
        volume.delete()?;
        for file in files {
            ensure!(ledger.prefix(&file)? == 500, "{} is still there, whole", file.display());
        }
        Ok(())
    });
}

#[test]
fn a_device_in_use_keeps_its_resource_from_being_deleted() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "held", "64Mi", "a", &["a", "b"])?;
        let device = open_direct(&volume.device("a"))?;
        cluster.kubectl(&["delete", "marsresource", "held", "--wait=false"])?;
        cluster.wait("held.a", "is being deleted", |replica: &MarsReplica| {
            replica.metadata.deletion_timestamp.is_some()
        })?;
        let mut ledger = Ledger::new(512);
        ledger.write(&device, 200)?;
        ensure!(
            volume.live("a")?.role == Some(ActualRole::Primary),
            "the device still works"
        );
        // The one who remembers that it is in use dies.
        for _ in ["once", "again"] {
            cluster.node("a").kill()?;
            cluster.node("a").start()?;
            ledger.write(&device, 50)?;
            device.sync_all()?;
            volume.wait_live("a", "serves its user again", |status| {
                status.role == Some(ActualRole::Primary) && !status.opened_by.is_empty()
            })?;
        }
        ensure!(
            cluster.find::<MarsResource>("held")?.is_some() && volume.data_file("a")?.exists(),
            "nothing was deleted under it"
        );
        ensure!(ledger.prefix(&volume.device("a"))? == 300, "every write is there");
        drop(device);
        until("it is gone once the device is closed", MIN, || {
            Ok(cluster.find::<MarsResource>("held")?.is_none())
        })
    });
}

#[test]
fn a62_a_forgotten_node_that_returns_joins_anew_beside_its_quarantined_data() {
    scenario(Options::default(), |cluster| {
        let volume = Volume::create(cluster, "again", "64Mi", "a", &["a", "b", "c"])?;
        let mut ledger = Ledger::new(2048);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "c")?;
        let (old, old_dir, old_data) = (
            volume.replica("c")?.spec.replica_uuid,
            replica_dir(cluster, &volume, "c")?,
            volume.data_file("c")?,
        );
        cluster.node("c").poweroff()?;
        let before = mars_e2e::device::sha256(&old_data)?;
        let members = |nodes: &[&str]| {
            let list: Vec<Value> = nodes
                .iter()
                .map(|node| json!({ "node": node, "pool": "default" }))
                .collect();
            cluster.patch_resource("again", &json!({ "replicas": list }))
        };
        members(&["a", "b"])?;
        until("c counts as lost and is forgotten", Duration::from_mins(2), || {
            volume.act_and_wait(Verb::ForgetNode, Some("c")).map(|()| true)
        })?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        members(&["a", "b", "c"])?;
        cluster.wait("again.c", "is made anew", |replica: &MarsReplica| {
            replica.spec.replica_uuid != old
        })?;
        cluster.node("c").start()?;
        for _ in ["it returned", "it was restarted"] {
            cluster.wait(
                "again.c",
                "reports about the new incarnation",
                |replica: &MarsReplica| {
                    let status = replica.status.as_ref();
                    status.is_some_and(|status| {
                        status.replica_uuid == Some(replica.spec.replica_uuid)
                            && status.data_state == Some(ReplicaData::Consistent)
                    })
                },
            )?;
            volume.wait_caught_up("a", "c")?;
            volume.wait_written_back("a")?;
            volume.same_data("a", "c")?;
            ensure!(
                old_dir.is_dir() && mars_e2e::device::sha256(&old_data)? == before,
                "the quarantined data is as it was"
            );
            cluster.node("c").kill()?;
            cluster.node("c").start()?;
        }
        volume.wait_live("c", "still follows", |status| {
            status.role == Some(ActualRole::Secondary) && status.data_state == Some(ReplicaData::Consistent)
        })?;
        ensure!(ledger.prefix(&volume.data_file("c")?)? == 1000, "everything is there");
        Ok(())
    });
}

#[test]
fn a58_a_resource_deleted_with_retain_is_taken_back_with_data_and_role_when_it_is_applied_again() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "back", "64Mi", "b", &["a", "b"])?;
        let mut ledger = Ledger::new(512);
        let device = open_direct(&volume.device("b"))?;
        ledger.write(&device, 500)?;
        device.sync_all()?;
        drop(device);
        volume.wait_written_back("b")?;
        volume.wait_caught_up("b", "a")?;
        let uuid = |volume: &Volume<'_>| -> Result<_> { Ok(volume.object()?.status.unwrap_or_default().uuid) };
        let before = (
            uuid(&volume)?,
            volume.replica("a")?.spec.replica_uuid,
            volume.live("b")?.lineage.len(),
        );
        volume.delete()?;
        let volume = Volume::create(cluster, "back", "64Mi", "b", &["a", "b"])?;
        ensure!(
            (uuid(&volume)?, volume.replica("a")?.spec.replica_uuid) == (before.0, before.1),
            "it is the same resource"
        );
        ensure!(
            volume.replica("b")?.spec.established,
            "nothing is ever made afresh here"
        );
        ensure!(ledger.prefix(&volume.device("b"))? == 500, "with all its data");
        ensure!(
            cluster.events()?.contains("re-adopted with the data found there"),
            "and people are told"
        );
        let device = open_direct(&volume.device("b"))?;
        ledger.write(&device, 100)?;
        device.sync_all()?;
        drop(device);
        volume.wait_caught_up("b", "a")?;
        volume.wait_written_back("b")?;
        volume.same_data("b", "a")?;
        // A smaller one of that name is refused: data is never cut off.
        volume.delete()?;
        cluster.apply(&mars_e2e::volume::manifest("back", "32Mi", "b", &["a", "b"]).to_string())?;
        cluster.wait("back", "says why it waits", |object: &MarsResource| {
            let conditions = object.status.iter().flat_map(|status| &status.conditions);
            conditions
                .into_iter()
                .any(|condition| condition.message.contains("never shrinks"))
        })?;
        Ok(())
    });
}
