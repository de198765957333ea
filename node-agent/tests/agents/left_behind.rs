//! Devices that are in use while the agent that served them is away: whoever uses them goes on, or is told; nothing that is wanted
//! of the replica meanwhile happens under them.

use super::harness::{Cluster, Node, Spec, designation, eventually, run};
use super::{pattern, read, write_synced};
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A mounted file system with a file in it.
fn mounted(cluster: &Cluster, node: &Node, resource: &str) -> PathBuf {
    let device = node.wait_device(resource);
    run("mkfs.ext4", &["-q", "-F", device.to_str().unwrap()]);
    let at = cluster.mount(&device);
    write(&at.join("before"), 1).unwrap();
    at
}

fn write(path: &Path, seed: u64) -> std::io::Result<()> {
    let file = fs::File::create(path)?;
    file.write_all_at(&pattern(seed, 1 << 20), 0)?;
    file.sync_all()
}

/// Restarts an agent that cannot reach its keeper, looks, and lets it reach it.
fn restarted_without_keeper(node: &Node, look: impl FnOnce()) {
    let (socket, aside) = (node.dir.join("run/keeper.sock"), node.dir.join("run/keeper.aside"));
    node.kill_agent();
    fs::rename(&socket, &aside).unwrap();
    node.start_agent();
    look();
    fs::rename(&aside, &socket).unwrap();
}

fn is_served(status: &Value) -> bool {
    status["role"] == "Primary" && status["device"].is_object() && status["openedBy"][0]["kind"] == "mount"
}

fn says_unknown(status: &Value) -> bool {
    status["openedBy"][0]["kind"] == "unknown"
}

#[test]
fn a55_a62_an_agent_restarted_under_a_mounted_file_system_deletes_nothing_until_it_is_unmounted() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("leaving", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    let at = mounted(&cluster, a, "leaving");
    let delete =
        json!({"designation": designation(1), "dataPolicy": "Delete", "deletionTimestamp": "2026-01-01T00:00:00Z"});
    cluster.order(&spec, a, &delete);
    a.wait_reason("leaving", "DeviceInUse");
    a.kill_agent();
    a.start_agent();
    a.wait_for("leaving", "its user is served", is_served);
    write(&at.join("after"), 2).unwrap();
    // The same while nobody can say whether there is a device.
    restarted_without_keeper(a, || {
        let status = a.wait_for("leaving", "that it does not know", says_unknown);
        assert!(status["device"].is_null(), "{status:#}");
        a.wait_reason("leaving", "DeviceInUse");
    });
    a.wait_for("leaving", "its user is served", is_served);
    write(&at.join("later"), 3).unwrap();
    assert!(a.data_file(&spec).exists() && a.replica_dir(&spec).exists());
    run("sh", &["-c", "echo 3 > /proc/sys/vm/drop_caches"]);
    for (file, seed) in [("before", 1), ("after", 2), ("later", 3)] {
        assert!(fs::read(at.join(file)).unwrap() == pattern(seed, 1 << 20), "{file}");
    }
    cluster.umount(&at);
    eventually("the data goes once nobody uses it", || {
        (!a.data_file(&spec).exists() && !a.replica_dir(&spec).exists()).then_some(())
    });
}

#[test]
fn a55_a_restart_between_a_refused_close_and_its_withdrawal_neither_closes_nor_stops_the_users() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("asked", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    let at = mounted(&cluster, a, "asked");
    let close = json!({"designation": designation(2), "closeFor": {"replicaUuid": spec.replicas["b"]}});
    cluster.order(&spec, a, &close);
    let refuses = |status: &Value| status["refused"]["order"] == "Close" && status["released"].is_null();
    a.wait_for("asked", "a refusal", refuses);
    a.kill_agent();
    a.start_agent();
    a.wait_for("asked", "served and refused", |status| {
        is_served(status) && refuses(status)
    });
    write(&at.join("asked"), 2).unwrap();
    restarted_without_keeper(a, || {
        let status = a.wait_for("asked", "that it does not know, and refuses", |status| {
            says_unknown(status) && refuses(status)
        });
        assert_eq!(status["role"], "Primary");
    });
    a.wait_for("asked", "served and refused", |status| {
        is_served(status) && refuses(status)
    });
    write(&at.join("again"), 3).unwrap();
    let back = json!({"designation": designation(3), "role": "Primary", "cause": "Failover", "established": true});
    cluster.order(&spec, a, &back);
    a.wait_for("asked", "the role under the newer number", |status| {
        is_served(status) && status["designation"]["number"] == 3 && status["refused"].is_null()
    });
    assert!(fs::read(at.join("asked")).unwrap() == pattern(2, 1 << 20));
    cluster.umount(&at);
}

#[test]
fn a55_a_device_in_use_is_served_again_after_a_restart_although_attach_is_off() {
    let cluster = Cluster::new(1);
    let spec = Spec::new("off", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let a = &cluster.nodes[0];
    let at = mounted(&cluster, a, "off");
    let off = json!({"designation": designation(1), "role": "Primary", "cause": "Create", "established": true,
        "switches": {"attach": false}});
    cluster.order(&spec, a, &off);
    a.wait_reason("off", "DeviceInUse");
    a.kill_agent();
    a.start_agent();
    a.wait_for("off", "its user is served", is_served);
    write(&at.join("after"), 2).unwrap();
    cluster.umount(&at);
    a.wait_for("off", "no device", |status| status["device"].is_null());
}

#[test]
fn a54_writes_in_flight_of_an_earlier_stay_never_reach_a_history_that_another_member_has_continued() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("stale", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    let device = a.wait_device("stale");
    write_synced(&device, 0, &pattern(1, 1 << 20));
    let has = |bytes: i64| move |status: &Value| status["positions"]["durable"]["lsn"].as_i64() >= Some(bytes);
    b.wait_for("stale", "everything", has(1 << 20));
    // A write waits in the device while A's agent is away, and B takes over and writes to the same place.
    let open = fs::File::options().write(true).open(&device).unwrap();
    a.kill_agent();
    let writer = std::thread::spawn(move || {
        open.write_all_at(&pattern(2, 1 << 20), 0)
            .and_then(|()| open.sync_all())
    });
    let ask = json!({"resource": "stale", "acknowledge": spec.resource_uuid});
    let (code, done) = b.ask("POST", "/failover", &ask).unwrap();
    assert_eq!(code, 200, "{done}");
    write_synced(&b.wait_device("stale"), 0, &pattern(3, 1 << 20));
    // A returns as the successor of B: it follows B's history, and gets the role.
    let named = json!({"replicaUuid": spec.replicas["a"], "predecessor": spec.replicas["b"]});
    cluster.order(
        &spec,
        a,
        &json!({"designation": designation(3), "designated": named, "established": true}),
    );
    a.start_agent();
    a.wait_for("stale", "B's history", has(2 << 20));
    assert_eq!(a.status("stale").unwrap()["role"], "Secondary");
    let close =
        json!({"designation": designation(3), "closeFor": {"replicaUuid": spec.replicas["a"]}, "established": true});
    cluster.order(&spec, b, &close);
    let closed = b.wait_for("stale", "released", |status| status["released"]["number"] == 3);
    let grant = json!({"designation": designation(3), "role": "Primary", "cause": "Handover",
        "handoverEnd": closed["released"]["end"], "established": true});
    cluster.order(&spec, a, &grant);
    let device = a.wait_device("stale");
    assert!(
        writer.join().unwrap().is_err(),
        "a write from before must not be acknowledged"
    );
    assert!(
        read(&device, 0, 1 << 20) == pattern(3, 1 << 20),
        "what B wrote was overwritten"
    );
}

#[test]
fn a62_users_of_the_device_of_a_replica_that_was_given_up_get_errors_and_its_data_stays() {
    let cluster = Cluster::new(2);
    let spec = Spec::new("given", &cluster.nodes);
    cluster.start();
    cluster.create(&spec);
    let [a, b] = &cluster.nodes[..] else { unreachable!() };
    let at = mounted(&cluster, a, "given");
    run("sync", &["-f", at.to_str().unwrap()]);
    a.wait_for("given", "everything on its data disk", |status| {
        status["positions"]["applied"] == status["positions"]["durable"]["lsn"]
    });
    // Nobody answers A when it comes back, so it does not resume its role before it learns that another replica has taken its place.
    a.kill_agent();
    b.kill_agent();
    let files = |spec: &Spec| {
        (
            fs::read(a.data_file(spec)).unwrap(),
            a.replica_dir(spec).join("slot-0").exists(),
        )
    };
    let before = files(&spec);
    let anew = Spec {
        resource: spec.resource.clone(),
        resource_uuid: spec.resource_uuid,
        replicas: Spec::new("given", &cluster.nodes).replicas,
    };
    cluster.order(&anew, a, &json!({"designation": designation(2)}));
    a.start_agent();
    // Whoever hangs here would hang the test: it waits in a thread of its own.
    let (told, errors) = std::sync::mpsc::channel();
    let path = at.join("after");
    std::thread::spawn(move || {
        while write(&path, 2).is_ok() {
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = told.send(());
    });
    assert!(
        errors.recv_timeout(Duration::from_secs(20)).is_ok(),
        "the user of its device hangs"
    );
    let old = spec.replicas["a"].to_string();
    let message = eventually("it is named", || {
        let (_, answer) = a.ask("GET", "/status", &Value::Null)?;
        let mut replicas = answer["replicas"].as_array()?.iter();
        let status = replicas.find(|replica| replica["replicaUuid"] == old)?["status"].clone();
        let mut conditions = status["conditions"].as_array()?.iter();
        let ready = conditions.find(|condition| condition["reason"] == "Quarantined")?;
        let message = ready["message"].as_str()?.to_owned();
        message.contains("get I/O errors").then_some(message)
    });
    assert!(message.contains(at.to_str().unwrap()), "{message}");
    assert!(files(&spec) == before, "no byte of it was touched");
    run("umount", &["-l", at.to_str().unwrap()]);
}
