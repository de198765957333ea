//! Two or three real agents on loopback addresses, real block devices, orders by files: the whole path from
//! `MarsReplica.spec` to a device, without an API server.

#![expect(clippy::unwrap_used, reason = "a test and its harness fail by panicking")]

mod harness;
mod left_behind;

use harness::{Cluster, SIZE, Spec, designation, eventually, run};
use mars_engine::types::ClusterId;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        u8::try_from(state >> 56).unwrap()
    };
    (0..len).map(|_| next()).collect()
}

fn write_synced(path: &std::path::Path, offset: u64, bytes: &[u8]) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.sync_all().unwrap();
}

fn read(path: &std::path::Path, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    fs::File::open(path).unwrap().read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn lsn(status: &Value) -> i64 {
    status["positions"]["durable"]["lsn"].as_i64().unwrap_or(-1)
}

#[test]
fn a03_an_agent_restarted_under_a_mounted_file_system_resumes_without_any_source_of_specs() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("alone", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    let device = a.wait_device("alone");
    run("mkfs.ext4", &["-q", "-F", device.to_str().unwrap()]);
    let at = cluster.mount(&device);
    fs::write(at.join("before"), pattern(1, 4 << 20)).unwrap();
    a.kill_agent();
    // The source of specs is away: only the cache knows.
    fs::rename(a.dir.join("specs"), a.dir.join("specs-away")).unwrap();
    let writer = std::thread::spawn({
        let path = at.join("during");
        move || {
            fs::File::create(&path).and_then(|file| {
                file.write_all_at(&pattern(2, 1 << 20), 0)
                    .and_then(|()| file.sync_all())
            })
        }
    });
    a.start_agent();
    writer.join().unwrap().unwrap();
    let status = a.wait_for("alone", "in use", |status| {
        !status["openedBy"].as_array().unwrap().is_empty()
    });
    assert_eq!(status["role"], "Primary");
    assert_eq!(fs::read(at.join("before")).unwrap(), pattern(1, 4 << 20));
    assert_eq!(fs::read(at.join("during")).unwrap(), pattern(2, 1 << 20));
    cluster.umount(&at);
    run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
}

#[test]
fn a50_a55_a_handover_waits_for_users_of_the_device_and_loses_nothing() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("moved", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    let device = a.wait_device("moved");
    run("mkfs.ext4", &["-q", "-F", device.to_str().unwrap()]);
    let at = cluster.mount(&device);
    fs::write(at.join("file"), pattern(3, 8 << 20)).unwrap();
    let close = json!({"designation": designation(2), "closeFor": {"replicaUuid": spec.replicas["b"]}});
    cluster.order(&spec, b, &json!({"designation": designation(2), "established": true}));
    cluster.order(&spec, a, &close);
    let refused = a.wait_for("moved", "a refusal", |status| status["refused"]["order"] == "Close");
    assert!(
        refused["refused"]["reason"]
            .as_str()
            .unwrap()
            .contains(at.to_str().unwrap()),
        "{refused:#}"
    );
    assert_eq!(
        (&refused["role"], &refused["released"]),
        (&json!("Primary"), &Value::Null)
    );
    cluster.umount(&at);
    let closed = a.wait_for("moved", "released", |status| status["released"]["number"] == 2);
    assert!(!device.exists(), "the link goes with the device");
    let end = closed["released"]["end"].clone();
    cluster.order(
        &spec,
        b,
        &json!({"designation": designation(2), "role": "Primary", "cause": "Handover", "handoverEnd": end, "established": true}),
    );
    let at = cluster.mount(&b.wait_device("moved"));
    assert_eq!(fs::read(at.join("file")).unwrap(), pattern(3, 8 << 20));
    cluster.umount(&at);
    cluster.order(&spec, a, &json!({"designation": designation(2), "established": true}));
    // A follows: the same bytes on both disks once everything is applied.
    write_synced(&b.dir.join("dev/moved"), 40 << 20, &pattern(4, 1 << 20));
    let goal = lsn(&b.status("moved").unwrap());
    a.wait_for("moved", "applied", |status| {
        status["positions"]["applied"].as_i64().unwrap_or(-1) >= goal
    });
    let (ours, theirs) = (a.data_file(&spec), b.data_file(&spec));
    eventually("equal disks", || {
        let len = usize::try_from(SIZE).unwrap();
        (read(&ours, 0, len) == read(&theirs, 0, len)).then_some(())
    });
}

#[test]
fn a51_a56_a_local_failover_needs_the_acknowledgement_and_the_old_primary_reports_its_fork() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("taken", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    let device = a.wait_device("taken");
    write_synced(&device, 0, &pattern(5, 1 << 20));
    let shipped = lsn(&a.status("taken").unwrap());
    b.wait_for("taken", "everything", |status| lsn(status) >= shipped);
    // B is cut off, A writes on, and dies.
    cluster.order(
        &spec,
        b,
        &json!({"designation": designation(1), "switches": {"fetch": false}, "established": true}),
    );
    b.wait_for("taken", "paused", |status| status["state"] == "PausedFetch");
    write_synced(&device, 8 << 20, &pattern(6, 1 << 20));
    a.kill_agent();
    let wrong = json!({"resource": "taken", "acknowledge": uuid::Uuid::nil()});
    let (code, refusal) = b.ask("POST", "/failover", &wrong).unwrap();
    assert_eq!(code, 409, "{refusal}");
    assert!(
        refusal["error"]
            .as_str()
            .unwrap()
            .contains(&spec.resource_uuid.to_string())
    );
    let (code, done) = b
        .ask(
            "POST",
            "/failover",
            &json!({"resource": "taken", "acknowledge": spec.resource_uuid}),
        )
        .unwrap();
    assert_eq!((code, &done["designation"]["number"]), (200, &json!(2)), "{done}");
    let taken = b.wait_device("taken");
    assert_eq!(read(&taken, 0, 1 << 20), pattern(5, 1 << 20));
    assert_eq!(read(&taken, 8 << 20, 1 << 20), vec![0; 1 << 20]);
    write_synced(&taken, 16 << 20, &pattern(7, 4096));
    a.start_agent();
    let old = a.wait_for("taken", "its fork", |status| {
        !status["forks"].as_array().unwrap().is_empty()
    });
    assert_eq!(old["role"], "Secondary");
    assert!(old["forks"][0]["oursBytes"].as_i64().unwrap() >= 1 << 20, "{old:#}");
}

#[test]
fn p9_a_disk_that_cannot_grow_keeps_nobody_from_a_role_or_a_device() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("large", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    write_synced(&a.wait_device("large"), 0, &pattern(5, 1 << 20));
    let shipped = lsn(&a.status("large").unwrap());
    b.wait_for("large", "everything", |status| lsn(status) >= shipped);
    let larger = |role: Value| {
        let mut order = json!({"designation": designation(1), "sizeBytes": 1_u64 << 50, "established": true});
        order.as_object_mut().unwrap().extend(role.as_object().unwrap().clone());
        order
    };
    cluster.order(&spec, a, &larger(json!({"role": "Primary", "cause": "Create"})));
    cluster.order(&spec, b, &larger(json!({})));
    let refused = |status: &Value| status["conditions"].to_string().contains("DiskTooSmall");
    for node in [a, b] {
        node.wait_for("large", "no room", refused);
    }
    a.kill_agent();
    a.start_agent();
    assert_eq!(read(&a.wait_device("large"), 0, 1 << 20), pattern(5, 1 << 20));
    a.kill_agent();
    let acknowledged = json!({"resource": "large", "acknowledge": spec.resource_uuid});
    let (code, done) = b.ask("POST", "/failover", &acknowledged).unwrap();
    assert_eq!(code, 200, "{done}");
    assert_eq!(read(&b.wait_device("large"), 0, 1 << 20), pattern(5, 1 << 20));
}

#[test]
fn a56_after_a_reboot_a_primary_waits_for_evidence() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("booted", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    write_synced(&a.wait_device("booted"), 0, &pattern(8, 1 << 20));
    b.kill_agent();
    fs::rename(a.dir.join("specs"), a.dir.join("specs-away")).unwrap();
    a.reboot_without_start();
    // An empty directory is a source that has not said anything about this replica.
    fs::create_dir(a.dir.join("specs")).unwrap();
    a.start_keeper();
    a.start_agent();
    let message = a.wait_reason("booted", "ResumeWaits");
    assert!(message.contains("failover"), "{message}");
    assert!(!a.dir.join("dev/booted").exists());
    b.start_agent();
    let device = a.wait_device("booted");
    assert_eq!(read(&device, 0, 1 << 20), pattern(8, 1 << 20));
    let causes = a.status("booted").unwrap()["lineage"].as_array().unwrap().len();
    assert_eq!(causes, 2, "a reboot begins an epoch");
}

#[test]
fn a62_a_deletion_takes_data_once_and_nothing_comes_back() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("gone", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    let device = a.wait_device("gone");
    write_synced(&device, 0, &pattern(9, 4096));
    // B sleeps through it, A is used meanwhile.
    b.kill_agent();
    let open = fs::File::open(&device).unwrap();
    let delete =
        json!({"designation": designation(1), "dataPolicy": "Delete", "deletionTimestamp": "2026-01-01T00:00:00Z"});
    for node in [a, b] {
        cluster.order(&spec, node, &delete);
    }
    a.wait_reason("gone", "DeviceInUse");
    assert!(a.data_file(&spec).exists());
    drop(open);
    eventually("A's data to go", || {
        (!a.data_file(&spec).exists() && !a.replica_dir(&spec).exists()).then_some(())
    });
    b.start_agent();
    eventually("B's data to go", || {
        (!b.data_file(&spec).exists() && !b.replica_dir(&spec).exists()).then_some(())
    });
    let cached = b
        .dir
        .join("store/node/specs")
        .join(format!("{}.json", spec.replicas["b"]));
    eventually("B's spec to be forgotten", || (!cached.exists()).then_some(()));
    // A late word brings nothing back.
    b.kill_agent();
    fs::remove_file(b.dir.join("specs/gone.json")).unwrap();
    cluster.order(&spec, b, &json!({"designation": designation(1)}));
    b.start_agent();
    b.wait_reason("gone", "Deleted");
    assert!(!b.replica_dir(&spec).exists());
}

#[test]
fn a59_missing_data_is_reported_and_never_made_again() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("lost", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    write_synced(&a.wait_device("lost"), 0, &pattern(10, 4096));
    a.reboot_without_start();
    fs::rename(a.dir.join("pool"), a.dir.join("pool-away")).unwrap();
    fs::create_dir(a.dir.join("pool")).unwrap();
    a.start_keeper();
    a.start_agent();
    a.wait_reason("lost", "PoolAbsent");
    assert_eq!(fs::read_dir(a.dir.join("pool")).unwrap().count(), 0);
    fs::remove_dir(a.dir.join("pool")).unwrap();
    fs::rename(a.dir.join("pool-away"), a.dir.join("pool")).unwrap();
    let device = a.wait_device("lost");
    assert_eq!(read(&device, 0, 4096), pattern(10, 4096));
    // Now the file itself, and then the replica's directory.
    a.reboot_without_start();
    let data = a.data_file(&spec);
    fs::rename(&data, data.with_extension("away")).unwrap();
    a.start_keeper();
    a.start_agent();
    let missing = a.wait_reason("lost", "DataMissing");
    assert!(missing.contains(data.to_str().unwrap()), "{missing}");
    assert_eq!(a.status("lost").unwrap()["dataState"], "Missing");
    assert!(!data.exists());
}

#[test]
fn a59_a_disk_with_foreign_content_is_refused_until_it_may_be_overwritten() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("foreign", &cluster.nodes);
    let a = &cluster.nodes[0];
    let image = a.dir.join("disk.img");
    fs::File::create(&image).unwrap().set_len(SIZE + (4 << 20)).unwrap();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
    let before = fs::read(&image).unwrap();
    let disk = run("losetup", &["-f", "--show", image.to_str().unwrap()])
        .trim()
        .to_owned();
    let _detach = Detach(disk.clone());
    cluster.start();
    let order = |overwrite: bool| json!({"backing": {"device": disk}, "overwrite": overwrite, "role": "Primary", "cause": "Create", "designation": designation(1)});
    cluster.order(&spec, a, &order(false));
    let message = a.wait_reason("foreign", "ForeignSignature");
    assert!(message.contains("ext2/3/4"), "{message}");
    assert!(fs::read(&image).unwrap() == before, "a refused disk was changed");
    // In use: refused with the name of the user.
    let at = cluster.mount(std::path::Path::new(&disk));
    cluster.order(&spec, a, &order(true));
    let message = a.wait_reason("foreign", "DiskInUse");
    assert!(message.contains(at.to_str().unwrap()), "{message}");
    cluster.umount(&at);
    a.wait_device("foreign");
    a.kill_agent();
}

#[test]
fn a59_a_disk_with_the_data_of_another_replica_is_refused_even_if_it_may_be_overwritten() {
    let cluster = Cluster::new(1);
    let (kept, taker) = (Spec::new("kept", &cluster.nodes), Spec::new("taker", &cluster.nodes));
    let a = &cluster.nodes[0];
    let image = a.dir.join("disk.img");
    fs::File::create(&image).unwrap().set_len(SIZE + (4 << 20)).unwrap();
    let disk = run("losetup", &["-f", "--show", image.to_str().unwrap()])
        .trim()
        .to_owned();
    let _detach = Detach(disk.clone());
    cluster.start();
    let order = json!({"backing": {"device": disk}, "overwrite": true, "role": "Primary", "cause": "Create", "designation": designation(1)});
    cluster.order(&kept, a, &order);
    write_synced(&a.wait_device("kept"), 0, &pattern(12, 1 << 20));
    // The replica goes, its data stays.
    let mut leaves = order.clone();
    leaves["dataPolicy"] = json!("Retain");
    leaves["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
    cluster.order(&kept, a, &leaves);
    eventually("it is gone", || a.status("kept").is_none().then_some(()));
    let before = fs::read(&image).unwrap();
    cluster.order(&taker, a, &order);
    let message = a.wait_reason("taker", "DiskOfAnother");
    assert!(
        message.contains(a.replica_dir(&kept).to_str().unwrap()) && message.contains("kept"),
        "{message}"
    );
    assert!(fs::read(&image).unwrap() == before, "a refused disk was changed");
    fs::rename(a.replica_dir(&kept), a.dir.join("kept-aside")).unwrap();
    a.wait_device("taker");
    a.kill_agent();
}

struct Detach(String);

impl Drop for Detach {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").arg("-d").arg(&self.0).output();
    }
}

#[test]
fn bad_starts_are_named_and_change_nothing() {
    let cluster = Cluster::new(1);
    let a = &cluster.nodes[0];
    let said = |command: &mut std::process::Command| {
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let taken = std::net::TcpListener::bind(format!("{}:7777", a.address)).unwrap();
    let message = said(&mut a.command());
    assert!(message.contains("7777") && message.contains("--port"), "{message}");
    drop(taken);
    let message = said(&mut a.command_in(ClusterId(uuid::Uuid::nil()), a.dir.join("store").to_str().unwrap()));
    assert!(message.contains("belongs to cluster"), "{message}");
    let message = said(&mut a.command_in(a.cluster, "/nonexistent/mars"));
    assert!(
        message.contains("/nonexistent/mars") && message.contains("never recreated"),
        "{message}"
    );
    fs::write(a.dir.join("store/node/identity.json"), "{\"formatVersion\": 9}").unwrap();
    let message = said(&mut a.command());
    assert!(message.contains("format version 9"), "{message}");
}

#[test]
fn sigterm_ends_an_agent_whose_devices_are_idle_and_leaves_used_ones_to_the_next() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("ended", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    let device = a.wait_device("ended");
    write_synced(&device, 0, &pattern(11, 4096));
    assert_eq!(a.end_agent(), Some(0));
    a.start_agent();
    let device = a.wait_device("ended");
    let open = fs::File::open(&device).unwrap();
    a.wait_for("ended", "its user", |status| {
        !status["openedBy"].as_array().unwrap().is_empty()
    });
    assert_eq!(a.end_agent(), Some(0));
    assert!(a.log().contains("left to the next agent"), "{}", a.log());
    a.start_agent();
    let mut bytes = vec![0; 4096];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, pattern(11, 4096));
    // Linked again: that is how the device is found and removed at the end.
    a.wait_device("ended");
}
