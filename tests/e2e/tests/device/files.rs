//! What users put on a device: file systems, verified load.

use anyhow::{Result, ensure};
use mars_e2e::cluster::{Cluster, Options, scenario};
use mars_e2e::device::{Fio, Fs, Mount, checksums, copy_real_files, differences, identity, same_content};
use mars_e2e::machine::in_vm;
use mars_e2e::volume::Volume;

fn file_system_survives_a_handover(cluster: &Cluster, fs: Fs) -> Result<()> {
    let volume = Volume::create(cluster, "fs", "512Mi", "a", &["a", "b"])?;
    fs.make(&volume.device("a"))?;
    let mounted = Mount::new(&volume.device("a"), &cluster.scratch("mnt")?, "discard")?;
    // The emulated machine reads files of the host slowly.
    copy_real_files(mounted.point(), if in_vm() { 6 << 20 } else { 64 << 20 })?;
    let files = checksums(mounted.point())?;
    std::fs::remove_dir_all(mounted.point().join("share/doc"))?;
    let rest = checksums(mounted.point())?;
    ensure!(
        rest.len() < files.len(),
        "something was removed, so that discards travel too"
    );
    mounted.unmount()?;
    fs.check(&volume.device("a"))?;

    volume.handover("b")?;
    fs.check(&volume.device("b"))?;
    let mounted = Mount::new(&volume.device("b"), &cluster.scratch("mnt")?, "discard")?;
    let wrong = differences(&rest, &checksums(mounted.point())?);
    ensure!(wrong.is_empty(), "on b: {wrong:?}");
    mounted.unmount()?;
    volume.wait_written_back("b")?;
    volume.wait_caught_up("b", "a")?;
    volume.same_data("a", "b")
}

#[test]
fn an_ext4_file_system_survives_use_discard_and_handover() {
    scenario(Options::two(), |cluster| {
        file_system_survives_a_handover(cluster, Fs::Ext4)
    });
}

#[test]
fn an_xfs_file_system_survives_use_discard_and_handover() {
    scenario(Options::two(), |cluster| {
        file_system_survives_a_handover(cluster, Fs::Xfs)
    });
}

#[test]
fn fio_verifies_random_writes_of_mixed_sizes_by_four_jobs() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "fio", "256Mi", "a", &["a", "b"])?;
        Fio {
            bytes_per_job: if in_vm() { 16 << 20 } else { 64 << 20 },
            depth: 8,
            flush_every: 32,
        }
        .run(&volume.device("a"))?;
        volume.wait_written_back("a")?;
        volume.wait_caught_up("a", "b")?;
        volume.same_data("a", "b")
    });
}

/// A test that reads node B's device must be reading node B's data.
#[test]
fn the_device_of_a_node_is_backed_by_the_data_of_that_node() {
    scenario(Options::two(), |cluster| {
        let volume = Volume::create(cluster, "own", "64Mi", "a", &["a", "b"])?;
        let on_a = identity(&volume.wait_primary("a")?)?;
        Fio {
            bytes_per_job: 8 << 20,
            depth: 4,
            flush_every: 0,
        }
        .run(&volume.device("a"))?;
        let device = volume.handover("b")?;
        let on_b = identity(&device)?;
        ensure!(
            on_a.diskseq != on_b.diskseq,
            "node b's device is another device: {on_a:?} {on_b:?}"
        );
        ensure!(!volume.device("a").exists(), "node a has no device any more");
        if let Some(file) = &on_b.backing_file {
            let uuid = volume.replica("b")?.spec.replica_uuid.to_string();
            ensure!(
                file.to_string_lossy().contains(&uuid),
                "node b's device is served from {}",
                file.display()
            );
        }
        // Bytes that node a never hears of: written through b's device while a is away.
        cluster.node("a").poweroff()?;
        mars_e2e::machine::run("blkdiscard", &[&device.to_string_lossy()])?;
        let mut ledger = mars_e2e::ledger::Ledger::new(1024);
        ledger.write(&mars_e2e::ledger::open_direct(&device)?, 3000)?;
        mars_e2e::ledger::open_direct(&device)?.sync_all()?;
        volume.wait_written_back("b")?;
        same_content(&device, &volume.data_file("b")?, 64 << 20)?;
        ensure!(
            ledger.prefix(&volume.data_file("b")?)? == 3000,
            "node b's data file holds what was written on b"
        );
        ensure!(
            ledger.prefix(&volume.data_file("a")?).is_err(),
            "node a's data file does not"
        );
        cluster.node("a").start()
    });
}
