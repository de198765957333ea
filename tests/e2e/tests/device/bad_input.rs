//! Bad input gets a clear error and loses nothing.

use anyhow::{Context, Result, ensure};
use mars_crds::{MarsReplica, MarsReplicaStatus, ReplicaData};
use mars_e2e::backing::Disk;
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fs, Mount, checksums, differences, sha256};
use mars_e2e::ledger::{Ledger, open_direct};
use mars_e2e::machine::{Cmd, program};
use mars_e2e::volume::{Volume, manifest};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A change that makes a good manifest a bad one.
type Spoil = fn(&mut Value);

#[test]
fn invalid_manifests_are_refused_with_the_reason_and_change_nothing() {
    scenario(Options::two(), |cluster| {
        let good = manifest("bad", "64Mi", "a", &["a", "b"]);
        let spoil = |change: Spoil| {
            let mut bad = good.clone();
            change(&mut bad);
            bad.to_string()
        };
        let cases: [(Spoil, &str); 7] = [
            (|m| m["spec"]["size"] = json!("65Mi1"), "size"),
            (|m| m["spec"]["size"] = json!("70001"), "4096"),
            (|m| m["spec"]["primary"] = json!("z"), "must be one of replicas"),
            (
                |m| m["spec"]["replicas"][0]["device"] = json!("/dev/x"),
                "exactly one of device and pool",
            ),
            (
                |m| m["spec"]["replicas"][0] = json!({ "node": "a", "device": "/dev/../etc/passwd" }),
                "device",
            ),
            (|m| m["spec"]["replicas"] = json!([]), "replicas"),
            (|m| m["metadata"]["name"] = json!("Not.A.Label"), "name"),
        ];
        for (change, words) in cases {
            let said = cluster.apply_refused(&spoil(change))?;
            ensure!(said.contains(words), "the message should speak of {words:?}: {said}");
        }
        ensure!(
            cluster.list::<mars_crds::MarsResource>()?.is_empty(),
            "nothing was created"
        );
        let volume = Volume::create(cluster, "bad", "64Mi", "a", &["a", "b"])?;
        cluster.apply_refused(&manifest("bad", "32Mi", "a", &["a", "b"]).to_string())?;
        ensure!(
            volume.live("a")?.size_bytes == Some(64 << 20),
            "a smaller size is refused"
        );
        Ok(())
    });
}

/// A manifest with a block device on node a and the pool on node b.
fn on_device(name: &str, size: &str, device: &Path) -> Value {
    let mut manifest = manifest(name, size, "a", &["a", "b"]);
    manifest["spec"]["replicas"][0] = json!({ "node": "a", "device": device });
    manifest
}

/// Whether the status says one of these words somewhere where people look.
fn says(status: &MarsReplicaStatus, words: &str) -> bool {
    let conditions = status
        .conditions
        .iter()
        .filter(|condition| condition.status == "True" || condition.type_ == "Ready");
    conditions
        .map(|condition| &condition.message)
        .chain([&status.state])
        .any(|text| text.to_lowercase().contains(words))
}

fn wait_says(cluster: &Cluster, replica: &str, words: &str) -> Result<MarsReplica> {
    cluster.wait(replica, &format!("says {words:?}"), |replica: &MarsReplica| {
        replica.status.as_ref().is_some_and(|status| says(status, words))
    })
}

#[test]
fn a59_a_disk_that_is_too_small_busy_or_carries_a_foreign_signature_is_not_touched() {
    scenario(Options::two(), |cluster| {
        let dir = cluster.scratch("disks")?;
        let small = Disk::new(&dir.join("small"), 32 << 20)?;
        let before = small.sha256()?;
        cluster.apply(&on_device("small", "64Mi", small.device()).to_string())?;
        wait_says(cluster, "small.a", "small")?;
        ensure!(small.sha256()? == before, "a disk that is too small was written to");

        let busy = Disk::new(&dir.join("busy"), 64 << 20)?;
        Fs::Ext4.make(busy.device())?;
        let mounted = Mount::new(busy.device(), &cluster.scratch("mnt")?, "ro,noload")?;
        let before = busy.sha256()?;
        let mut wish = on_device("busy", "64Mi", busy.device());
        wish["spec"]["replicas"][0]["overwrite"] = json!(true);
        cluster.apply(&wish.to_string())?;
        wait_says(cluster, "busy.a", &mounted.point().to_string_lossy().to_lowercase())?;
        ensure!(busy.sha256()? == before, "a mounted disk was written to");
        mounted.unmount()?;

        let foreign = Disk::new(&dir.join("foreign"), 64 << 20)?;
        Fs::Xfs
            .make(foreign.device())
            .or_else(|_| Fs::Ext4.make(foreign.device()))?;
        let before = foreign.sha256()?;
        cluster.apply(&on_device("foreign", "64Mi", foreign.device()).to_string())?;
        wait_says(cluster, "foreign.a", "overwrite")?;
        ensure!(foreign.sha256()? == before, "a foreign file system was written to");
        let mut wish = on_device("foreign", "64Mi", foreign.device());
        wish["spec"]["replicas"][0]["overwrite"] = json!(true);
        Volume::apply(cluster, &wish).map(drop)
    });
}

#[test]
fn a59_a_missing_pool_directory_or_data_file_is_named_and_never_recreated() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "gone", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(512);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 800)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")?;
        // As an unmounted file system would look: the directory is there, empty.
        let node = cluster.node("b");
        let (pool, aside) = (node.pool(), node.dir().join("pool-aside"));
        node.stop()?;
        std::fs::rename(&pool, &aside)?;
        std::fs::create_dir(&pool)?;
        node.start()?;
        volume.wait_live("b", "says that its data is missing", |status| {
            status.data_state == Some(ReplicaData::Missing)
        })?;
        ensure!(
            std::fs::read_dir(&pool)?.next().is_none(),
            "nothing was made in the empty directory"
        );
        node.stop()?;
        std::fs::remove_dir(&pool)?;
        std::fs::rename(&aside, &pool)?;
        node.start()?;
        volume.wait_consistent("b")?;
        ledger.write(&device, 100)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")?;
        ensure!(
            ledger.prefix(&volume.data_file("b")?)? == 900,
            "b follows again, with all its data"
        );
        ensure!(
            volume.live("b")?.sync.is_none_or(|sync| sync.moved_bytes == 0),
            "and without a sync"
        );
        Ok(())
    });
}

/// Log segments of the one replica of a resource on a node, by number.
fn segments(cluster: &Cluster, volume: &Volume<'_>, node: &str) -> Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = std::fs::read_dir(replica_dir(cluster, volume, node)?.join("log"))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .is_some_and(|name| name.to_string_lossy().starts_with("log-"))
        })
        .collect();
    found.sort();
    Ok(found)
}

fn replica_dir(cluster: &Cluster, volume: &Volume<'_>, node: &str) -> Result<PathBuf> {
    let uuid = volume.replica(node)?.spec.replica_uuid.to_string();
    Ok(cluster.node(node).store().join("replicas").join(uuid))
}

fn flip_a_bit(path: &Path, offset: u64) -> Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset)?;
    file.write_all_at(&[byte[0] ^ 0x10], offset)?;
    Ok(file.sync_all()?)
}

#[test]
fn a13_a_corrupt_segment_on_a_secondary_is_found_and_never_reaches_the_disk() {
    scenario(Options::two(), |cluster| {
        let mut wish = manifest("rot", "64Mi", "a", &["a", "b"]);
        wish["spec"]["replicas"][1]["switches"] = json!({ "replay": false });
        let volume = Volume::apply(cluster, &wish)?;
        let mut ledger = Ledger::new(1024);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 2000)?;
        device.sync_all()?;
        volume.wait_live("b", "has the log", |status| {
            status
                .positions
                .as_ref()
                .is_some_and(|at| at.durable.lsn >= 2000 * mars_e2e::ledger::LSN_PER_WRITE)
        })?;
        cluster.node("b").stop()?;
        let segment = segments(cluster, &volume, "b")?
            .into_iter()
            .next_back()
            .context("b has a segment")?;
        flip_a_bit(&segment, 3 << 20)?;
        cluster.node("b").start()?;
        cluster.patch_resource(
            "rot",
            &json!({ "replicas": [{ "node": "a", "pool": "default" }, { "node": "b", "pool": "default" }] }),
        )?;
        // Either it fetches the range again, or it stops and names the place; it never applies it.
        volume.wait_live_for(Duration::from_mins(2), "b", "has mended it or names it", |status| {
            let whole = status
                .positions
                .as_ref()
                .is_some_and(|at| at.applied >= 2000 * mars_e2e::ledger::LSN_PER_WRITE);
            whole || says(status, "segment") || says(status, "log")
        })?;
        ledger
            .prefix(&volume.data_file("b")?)
            .context("what is on b's disk is a state of the order")?;
        Ok(())
    });
}

#[test]
fn a_corrupt_state_slot_is_survived_by_the_other_one() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "slot", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(1024);
        let device = open_direct(&volume.device("a"))?;
        ledger.write(&device, 1000)?;
        device.sync_all()?;
        volume.wait_caught_up("a", "b")?;
        let slots: Vec<PathBuf> = std::fs::read_dir(replica_dir(cluster, &volume, "b")?)?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| {
                path.file_name()
                    .is_some_and(|name| name.to_string_lossy().contains("slot"))
            })
            .collect();
        ensure!(slots.len() == 2, "two slots: {slots:?}");
        for slot in &slots {
            cluster.node("b").stop()?;
            flip_a_bit(slot, 100)?;
            cluster.node("b").start()?;
            ledger.write(&device, 100)?;
            device.sync_all()?;
            volume.wait_caught_up("a", "b")?;
        }
        ensure!(ledger.prefix(&volume.data_file("b")?)? == 1200, "b has it all");
        Ok(())
    });
}

/// CRC-32C bit by bit, as the format document says: no code of ours makes the checksum of what ours must refuse.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0_u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                (crc >> 1) ^ 0x82f6_3b78
            } else {
                crc >> 1
            }
        })
    })
}

/// The next version in a segment: magic, version (2 bytes at 8), checksum over the 508 bytes before it.
fn newer_segment(bytes: &mut [u8]) {
    bytes[8] += 1;
    let crc = crc32c(&bytes[..508]);
    bytes[508..512].copy_from_slice(&crc.to_le_bytes());
}

/// The same in a state slot: magic, version (4 bytes at 8), length of the body at 12, checksum at 28 over all but itself.
fn newer_slot(bytes: &mut [u8]) {
    bytes[8] += 1;
    let length = usize::from(bytes[12]) | usize::from(bytes[13]) << 8 | usize::from(bytes[14]) << 16;
    let crc = crc32c(&[&bytes[..28], &bytes[32..32 + length]].concat());
    bytes[28..32].copy_from_slice(&crc.to_le_bytes());
}

/// The same in the identity of a replica, which is JSON.
fn newer_identity(bytes: &mut [u8]) {
    let key = b"\"formatVersion\": ";
    let at = bytes.windows(key.len()).position(|window| window == key);
    bytes[at.expect("an identity has a version") + key.len()] += 1;
}

/// The file of a replica directory that is made newer: the last segment in use, a slot that was written, or the identity.
fn file_to_age(cluster: &Cluster, volume: &Volume<'_>, node: &str, what: &str) -> Result<PathBuf> {
    let dir = replica_dir(cluster, volume, node)?;
    let candidates = match what {
        "segment" => segments(cluster, volume, node)?,
        "slot" => vec![dir.join("slot-0"), dir.join("slot-1")],
        _ => vec![dir.join("replica.json")],
    };
    let mut begun = [0; 8];
    let in_use =
        |path: &PathBuf| File::open(path).and_then(|file| file.read_exact_at(&mut begun, 0).map(|()| begun != [0; 8]));
    let used: Vec<bool> = candidates.iter().map(in_use).collect::<std::io::Result<_>>()?;
    let mut used = candidates
        .into_iter()
        .zip(used)
        .filter(|(_, used)| *used)
        .map(|(path, _)| path);
    used.next_back().with_context(|| format!("{node} has a {what} in use"))
}

/// Everything that a replica has on disk, by path.
fn on_disk_of(cluster: &Cluster, volume: &Volume<'_>, node: &str) -> Result<BTreeMap<String, String>> {
    let mut files = checksums(&replica_dir(cluster, volume, node)?)?;
    files.insert("data".into(), sha256(&volume.data_file(node)?)?);
    Ok(files)
}

#[test]
fn files_of_a_newer_format_version_are_refused_by_name_and_nothing_is_lost() {
    type Age = fn(&mut [u8]);
    let kinds: [(&str, Age); 3] = [
        ("segment", newer_segment),
        ("slot", newer_slot),
        ("identity", newer_identity),
    ];
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "newer", "64Mi", "a", &["a", "b"])?;
        let mut ledger = Ledger::new(1024);
        // The secondary while the primary works on; then the primary itself, with writes that exist nowhere else.
        for (node, (what, age)) in ["b", "a"].into_iter().flat_map(|node| kinds.map(|kind| (node, kind))) {
            let device = open_direct(&volume.wait_primary("a")?)?;
            ledger.write(&device, 300)?;
            device.sync_all()?;
            drop(device);
            if node == "b" {
                volume.wait_caught_up("a", "b")?;
            }
            let expected = ledger.written;
            cluster.node(node).stop()?;
            let file = file_to_age(cluster, &volume, node, what)?;
            let original = std::fs::read(&file)?;
            let mut newer = original.clone();
            age(&mut newer);
            std::fs::write(&file, &newer)?;
            let before = on_disk_of(cluster, &volume, node)?;

            cluster.node(node).start()?;
            let name = file
                .file_name()
                .context("a file has a name")?
                .to_string_lossy()
                .into_owned();
            let said = wait_says(cluster, &format!("newer.{node}"), "version 2")?;
            let status = said.status.context("a replica that speaks has a status")?;
            ensure!(says(&status, &name), "{name} should be named: {:?}", status.conditions);
            if node == "b" {
                let device = open_direct(&volume.device("a"))?;
                ledger.write(&device, 100)?;
                device.sync_all()?;
            }
            cluster.node(node).stop()?;
            let wrong = differences(&before, &on_disk_of(cluster, &volume, node)?);
            ensure!(wrong.is_empty(), "what cannot be read must not be changed: {wrong:?}");

            std::fs::write(&file, &original)?;
            cluster.node(node).start()?;
            let found = ledger.prefix(&volume.wait_primary("a")?)?;
            ensure!(
                found == ledger.written,
                "{node}, {what}: {found} of {} writes are there, {expected} were before",
                ledger.written
            );
            volume.wait_caught_up("a", "b")?;
            ensure!(
                ledger.prefix(&volume.data_file("b")?)? == found,
                "{node}, {what}: b follows"
            );
        }
        Ok(())
    });
}

#[test]
fn a_taken_port_is_named_before_anything_is_started() {
    scenario(Options::two(), |cluster| {
        let taken = TcpListener::bind(("127.0.0.1", 0))?;
        let state = cluster.scratch("other")?.join("state");
        let output = Cmd::new(program("mars-local")?)
            .args([
                "up",
                "--nodes",
                "a",
                "--api",
                &taken.local_addr()?.to_string(),
                "--state",
            ])
            .arg(&state)
            .limit(Duration::from_secs(30))
            .output()?;
        let _ = Cmd::new(program("mars-local")?)
            .args(["down", "--force", "--state"])
            .arg(&state)
            .output();
        ensure!(!output.status.success(), "it must refuse");
        ensure!(
            output.stderr.contains(&taken.local_addr()?.port().to_string()),
            "the message names the port: {}",
            output.stderr
        );
        Ok(())
    });
}
