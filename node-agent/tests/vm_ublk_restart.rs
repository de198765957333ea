//! The `ublk` frontend when its agent dies, with the real engine behind it: the device pauses, the next life takes it over and
//! gets again what the dead one had taken; and devices whose agent never comes back are deleted, and only those.
//!
//! Ignored elsewhere; the tier `vm` runs these in a virtual machine.
#![allow(clippy::unwrap_used, reason = "in a test a failed step is a failed test")]

mod common;

use common::{Engine, Rig, Served, run, text, wait_until};
use mars_node_agent::frontend::delete_ublk_leftovers;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

const MIB: u64 = 1 << 20;

fn killed_under_fio(engine: Engine, kills: u32) {
    let rig = Rig::for_ublk();
    rig.storage(64 * MIB);
    let mut served = common::killed_under_fio(&rig, engine, kills, "32M");
    assert!(rig.log_text("server.log").contains("taking the device over"));
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a19_ublk_killed_again_and_again_under_fio_no_error_and_no_byte_wrong() {
    killed_under_fio(Engine::Plain, common::kills());
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a19_ublk_a_replica_killed_a_hundred_times_under_fio_no_error_and_no_byte_wrong() {
    killed_under_fio(Engine::Replica, common::kills().max(100));
}

/// Stops the server, so that what is written from now on is taken by it, or waits for it, and is answered by nobody.
fn freeze(served: &Served) {
    run("kill", &["-STOP", &served.pid().to_string()]);
}

/// Requests of a device that the kernel has given to its driver.
fn in_flight(served: &Served) -> u64 {
    let counts = served.sysfs("inflight");
    counts
        .split_whitespace()
        .map(|count| count.parse::<u64>().unwrap())
        .sum()
}

/// Writes one block directly, in a process of its own: a write that nobody answers must not hang the test.
fn writer(target: &Path, byte: u8, offset_blocks: u64) -> Child {
    let script = format!(
        "head -c 4096 /dev/zero | tr '\\0' '\\{byte:o}' | dd of={} bs=4096 count=1 seek={offset_blocks} oflag=direct conv=notrunc iflag=fullblock",
        text(target)
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]).stderr(Stdio::null());
    command.spawn().unwrap()
}

fn block(device: &Path, number: u64) -> Vec<u8> {
    let (file, mut block) = (File::open(device).unwrap(), vec![0; 4096]);
    run("blockdev", &["--flushbufs", text(device)]);
    file.read_exact_at(&mut block, number * 4096).unwrap();
    block
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn p1_requests_in_flight_at_the_death_of_the_agent_are_issued_again_to_the_next_one() {
    for engine in Engine::ALL {
        let rig = Rig::for_ublk();
        rig.storage(64 * MIB);
        let served = rig.serve(engine, &[]);
        let node = served.node.clone();
        freeze(&served);
        let mut writers: Vec<Child> = (0..8).map(|n| writer(&node, n + 1, n.into())).collect();
        wait_until("all writes to be under way", || in_flight(&served) == 8);
        served.kill();
        assert!(
            writers.iter_mut().all(|writer| writer.try_wait().unwrap().is_none()),
            "{engine:?}: a write was answered by nobody"
        );
        let mut served = rig.serve(engine, &[]);
        for writer in &mut writers {
            assert!(writer.wait().unwrap().success(), "{engine:?}: a write failed");
        }
        for n in 0..8 {
            assert!(block(&node, n.into()) == [n + 1; 4096], "{engine:?}: block {n}");
        }
        wait_until("the end of all use", || served.ok("users").is_empty());
        served.ok("detach");
    }
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn p1_a_mounted_file_system_survives_agents_that_are_killed_and_restarted() {
    let mut rig = Rig::for_ublk();
    rig.storage(128 * MIB);
    let mut served = rig.serve(Engine::Replica, &[]);
    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.mount(&served.node.clone(), "defaults");
    let pattern = |round: u32| -> Vec<u8> {
        (0..2 * MIB)
            .map(|n| u8::try_from((n * 7 + u64::from(round)) % 251).unwrap())
            .collect()
    };
    for round in 0..5 {
        // Some of it is in the log, some only in the page cache when the agent dies.
        std::fs::write(at.join(format!("before{round}")), pattern(round)).unwrap();
        if round % 2 == 0 {
            run("sync", &["-f", text(&at)]);
        }
        served.kill();
        // It may need blocks of the device, and then waits for the next agent.
        let (during, content) = (at.join(format!("during{round}")), pattern(round + 100));
        let writer = std::thread::spawn(move || std::fs::write(during, content));
        served = rig.serve(Engine::Replica, &[]);
        writer.join().unwrap().unwrap();
    }
    rig.umount();
    run("fsck.ext4", &["-fn", served.device()]);
    let at = rig.mount(&served.node.clone(), "ro");
    for round in 0..5 {
        for (name, wanted) in [("before", pattern(round)), ("during", pattern(round + 100))] {
            let name = format!("{name}{round}");
            assert!(std::fs::read(at.join(&name)).unwrap() == wanted, "{name} differs");
        }
    }
    rig.umount();
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a_ublk_device_pauses_over_a_planned_restart_with_a_file_system_mounted() {
    let mut rig = Rig::for_ublk();
    rig.storage(64 * MIB);
    let mut served = rig.serve(Engine::Replica, &[]);
    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.mount(&served.node.clone(), "defaults");
    served.ok("stop");
    drop(served);
    let mut writer = Command::new("dd");
    writer.args([
        "if=/dev/zero",
        &format!("of={}", at.join("f").display()),
        "bs=1M",
        "count=4",
        "oflag=direct",
    ]);
    let mut writer = writer.stderr(Stdio::null()).spawn().unwrap();
    let mut served = rig.serve(Engine::Replica, &[]);
    assert!(writer.wait().unwrap().success());
    rig.umount();
    run("fsck.ext4", &["-fn", served.device()]);
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}

/// The one record in a rig's directory of ublk records.
fn record(rig: &Rig) -> std::path::PathBuf {
    let entries = std::fs::read_dir(rig.path("ublk")).unwrap();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(paths.len(), 1, "{paths:?}");
    paths.remove(0)
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a_device_whose_agent_is_gone_for_good_is_deleted_and_its_users_get_errors() {
    let mut rig = Rig::for_ublk();
    rig.storage(128 * MIB);
    let served = rig.serve(Engine::Replica, &[]);
    let (node, directory) = (served.node.clone(), rig.path("ublk"));
    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.mount(&node, "defaults");
    std::fs::write(at.join("flushed"), "flushed").unwrap();
    run("sync", &["-f", text(&at)]);
    freeze(&served);
    // One write that the dead agent has taken, and one to a file that waits behind it.
    let mut waiting = writer(&at.join("direct"), 7, 0);
    wait_until("the write to be under way", || in_flight(&served) > 0);
    served.kill();
    assert!(record(&rig).exists());

    assert_eq!(delete_ublk_leftovers(&directory), Vec::<String>::new());
    assert!(
        !waiting.wait().unwrap().success(),
        "its user gets an error, and does not wait for ever"
    );
    assert_eq!(
        std::fs::read_dir(&directory).unwrap().count(),
        0,
        "the record goes with the device"
    );
    rig.umount();
    wait_until("the device to be gone", || !node.exists());
    assert_eq!(
        delete_ublk_leftovers(&directory),
        Vec::<String>::new(),
        "again: nothing to do"
    );

    // The node comes back: a new device, with all that was flushed.
    let mut served = rig.serve(Engine::Replica, &[]);
    let at = rig.mount(&served.node.clone(), "defaults");
    assert_eq!(std::fs::read(at.join("flushed")).unwrap(), b"flushed");
    rig.umount();
    run("fsck.ext4", &["-fn", served.device()]);
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a59_a_stale_record_never_leads_to_the_device_of_somebody_else() {
    let (gone, other) = (Rig::for_ublk(), Rig::for_ublk());
    gone.storage(16 * MIB);
    other.storage(16 * MIB);
    gone.serve(Engine::Plain, &[]).kill();
    let stale = record(&gone);
    let kept = std::fs::read(&stale).unwrap();
    let old_node = {
        let record: serde_json::Value = serde_json::from_slice(&kept).unwrap();
        format!("/dev/ublkb{}", record["id"])
    };
    assert_eq!(delete_ublk_leftovers(stale.parent().unwrap()), Vec::<String>::new());
    wait_until("the first device to be gone", || !Path::new(&old_node).exists());

    // The number is used again, by another replica; then the old record is there once more.
    let mut served = other.serve(Engine::Plain, &[]);
    assert_eq!(text(&served.node), old_node, "the kernel gives the number away again");
    std::fs::write(&stale, kept).unwrap();
    assert_eq!(delete_ublk_leftovers(stale.parent().unwrap()), Vec::<String>::new());
    assert!(!stale.exists(), "a record that leads nowhere is forgotten");
    let file = File::options().read(true).write(true).open(&served.node).unwrap();
    file.write_all_at(&[3; 4096], 0).unwrap();
    file.sync_all().unwrap();
    drop(file);

    // The rig that lost its device makes a new one, beside the other.
    let mut again = gone.serve(Engine::Plain, &[]);
    assert_ne!(again.node, served.node);
    for served in [&mut again, &mut served] {
        wait_until("the end of all use", || served.ok("users").is_empty());
        served.ok("detach");
    }
}
