//! The `loop` frontend and the keeper on real kernel devices. What must hold for users of the device is tried over a plain file
//! (then a fault is one of the frontend) and over a replica with its log.
#![allow(clippy::unwrap_used, reason = "in a test a failed step is a failed test")]

mod common;

use common::{Engine, Rig, attempt, own_loops, run, text, wait_until};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

#[test]
fn file_systems_are_made_used_and_found_clean() {
    let ext4 = (&["mkfs.ext4", "-q", "-F"][..], &["fsck.ext4", "-fn"][..]);
    let xfs = (&["mkfs.xfs", "-q", "-f"][..], &["xfs_repair", "-n"][..]);
    for (engine, (make, check)) in Engine::ALL
        .into_iter()
        .flat_map(|engine| [(engine, ext4), (engine, xfs)])
    {
        let mut rig = Rig::new();
        rig.storage(400 * MIB);
        let mut served = rig.serve(engine, &[]);
        let device = served.link.clone();
        run(make[0], &[&make[1..], &[text(&device)]].concat());
        let at = rig.mount(&device, "discard");
        let pattern: Vec<u8> = (0..24 * MIB).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
        std::fs::write(at.join("a"), &pattern).unwrap();
        run("sync", &["-f", text(&at)]);
        std::fs::write(at.join("b"), &pattern[..1000]).unwrap();
        std::fs::remove_file(at.join("b")).unwrap();
        rig.umount();
        run(check[0], &[&check[1..], &[text(&device)]].concat());
        let at = rig.mount(&device, "ro");
        assert!(
            std::fs::read(at.join("a")).unwrap() == pattern,
            "{engine:?}, {make:?}: file differs after remount"
        );
        rig.umount();
        served.ok("detach");
        assert!(!device.is_symlink(), "the link goes with the device");
        assert_eq!(own_loops(rig.replica), []);
    }
}

#[test]
fn a12_many_requests_in_flight_are_answered_out_of_order_and_right() {
    for engine in Engine::ALL {
        let rig = Rig::new();
        rig.storage(128 * MIB);
        let served = rig.serve(engine, &[]);
        let filename = format!("--filename={}", served.device());
        let job = [
            "--name=v",
            "--rw=randwrite",
            "--bsrange=512-256k",
            "--iodepth=64",
            "--ioengine=libaio",
            "--direct=1",
        ];
        let verify = [
            "--size=96M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--do_verify=1",
            &filename,
        ];
        run("fio", &[&job[..], &verify[..]].concat());
    }
}

fn killed_under_fio(engine: Engine) {
    let rig = Rig::new();
    rig.storage(64 * MIB);
    let mut served = common::killed_under_fio(&rig, engine, common::kills(), "64M");
    assert!(rig.log_text("server.log").contains("took the device over"));
    served.ok("detach");
}

#[test]
fn a19_killed_again_and_again_under_fio_no_error_and_no_byte_wrong() {
    killed_under_fio(Engine::Plain);
}

#[test]
fn a19_a_replica_killed_again_and_again_under_fio_no_error_and_no_byte_wrong() {
    killed_under_fio(Engine::Replica);
}

#[test]
fn a37_discard_and_zeroes_read_as_zeros_and_free_the_storage() {
    Engine::ALL.into_iter().for_each(discard_and_zeroes);
}

fn discard_and_zeroes(engine: Engine) {
    let rig = Rig::new();
    let storage = rig.storage(64 * MIB);
    let mut served = rig.serve(engine, &[]);
    let used = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&storage).unwrap()) * 512;
    assert!(served.sysfs("queue/discard_max_bytes").parse::<u64>().unwrap() >= MIB * 1024);
    assert!(served.sysfs("queue/write_zeroes_max_bytes").parse::<u64>().unwrap() >= MIB * 1024);
    let mut device = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&served.node)
        .unwrap();
    device
        .write_all(&vec![0xAB; usize::try_from(48 * MIB).unwrap()])
        .unwrap();
    device.sync_all().unwrap();
    if engine == Engine::Plain {
        assert!(used() >= 48 * MIB);
    }
    run(
        "blkdiscard",
        &["-f", "-o", "4096", "-l", &(16 * MIB).to_string(), served.device()],
    );
    run(
        "blkdiscard",
        &["-f", "-z", "-o", &(32 * MIB).to_string(), "-l", "8192", served.device()],
    );
    // A replica writes back when it sees fit.
    wait_until("the space to be given back", || used() <= 33 * MIB);
    let mut all = Vec::new();
    device.seek(SeekFrom::Start(0)).unwrap();
    device.read_to_end(&mut all).unwrap();
    let expect = |offset: u64| {
        let zero = (4096..4096 + 16 * MIB).contains(&offset) || (32 * MIB..32 * MIB + 8192).contains(&offset);
        if zero || offset >= 48 * MIB { 0 } else { 0xAB }
    };
    let wrong = all.iter().zip(0..).find(|(byte, offset)| **byte != expect(*offset));
    assert_eq!(wrong, None);
    drop(device);
    served.ok("detach");
}

#[test]
fn a_mounted_device_grows() {
    for engine in Engine::ALL {
        let mut rig = Rig::new();
        let disk_bytes = if engine == Engine::Plain { 320 * MIB } else { 600 * MIB };
        rig.storage(320 * MIB);
        let mut served = rig.serve(engine, &[]);
        // The data disk of a replica grows first, by its administrator.
        rig.storage(disk_bytes);
        run("mkfs.xfs", &["-q", "-f", served.device()]);
        let at = rig.mount(&served.node.clone(), "defaults");
        served.ok(&format!("resize {}", 512 * MIB));
        assert_eq!(served.sysfs("size"), (512 * MIB / 512).to_string());
        // ext4 would ask for CAP_SYS_RESOURCE here, which not every machine gives its root.
        run("xfs_growfs", &[text(&at)]);
        let now = rustix::fs::statvfs(&at).unwrap();
        assert!(now.f_blocks * now.f_frsize > 400 * MIB, "{} blocks", now.f_blocks);
        rig.umount();
        run("xfs_repair", &["-n", served.device()]);
        assert!(
            served.ask(&format!("resize {}", 64 * MIB)).starts_with("error"),
            "a device never shrinks"
        );
        served.kill();
        let served = rig.serve(engine, &[]);
        assert_eq!(served.sysfs("size"), (512 * MIB / 512).to_string());
    }
}

#[test]
fn a_device_that_grew_while_no_agent_was_there_shows_it() {
    let rig = Rig::new();
    rig.storage(16 * MIB);
    rig.serve(Engine::Plain, &[]).kill();
    rig.storage(32 * MIB);
    let served = rig.serve(Engine::Plain, &[]);
    assert_eq!(served.sysfs("size"), (32 * MIB / 512).to_string());
}

#[test]
fn a11_a_volatile_cache_is_advertised_exactly_with_on_flush() {
    let rig = Rig::new();
    rig.storage(16 * MIB);
    let mut served = rig.serve_plain(&[]);
    assert_eq!(served.sysfs("queue/write_cache"), "write back");
    served.ok("durability every-write");
    assert_eq!(served.sysfs("queue/write_cache"), "write through");
    served.ok("durability on-flush");
    assert_eq!(served.sysfs("queue/write_cache"), "write back");
    served.kill();
    let served = rig.serve_plain(&["--every-write"]);
    assert_eq!(
        served.sysfs("queue/write_cache"),
        "write through",
        "a takeover sets what is wished now"
    );
}

#[test]
fn the_logical_block_size_is_512_or_that_of_the_disk() {
    for (size, argument) in [("512", "512"), ("4096", "4096")] {
        let rig = Rig::new();
        rig.storage(16 * MIB);
        let served = rig.serve_plain(&["--logical-block-bytes", argument]);
        assert_eq!(served.sysfs("queue/logical_block_size"), size);
        assert_eq!(served.sysfs("loop/dio"), "1", "direct I/O, no second cache");
        let direct = |bytes: &str| {
            let output = format!("of={}", served.device());
            attempt(
                "dd",
                &[
                    "if=/dev/zero",
                    &output,
                    &format!("bs={bytes}"),
                    "count=1",
                    "oflag=direct",
                    "conv=notrunc",
                ],
            )
            .0
        };
        assert!(direct("4096"));
        assert_eq!(direct("512"), size == "512");
    }
}

#[test]
fn a55_a_device_in_use_is_not_taken_away_and_the_user_is_named() {
    let mut rig = Rig::new();
    rig.storage(64 * MIB);
    let mut served = rig.serve_plain(&[]);
    let link = served.link.clone();
    assert_eq!(served.ok("users"), "");

    let file = std::fs::File::open(&served.node).unwrap();
    let me = format!("open by pid {} (", std::process::id());
    wait_until("open detection", || served.ok("users").contains(&me));
    let refused = served.ask("detach");
    assert!(refused.starts_with("error") && refused.contains(&me), "{refused}");
    assert!(link.is_symlink(), "a refused detach leaves the link");
    drop(file);

    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.mount(&served.node.clone(), "defaults");
    let refused = served.ask("detach");
    assert!(refused.contains(&format!("mounted at {}", at.display())), "{refused}");
    std::fs::write(at.join("still"), "works").unwrap();
    run("sync", &["-f", text(&at)]);
    rig.umount();

    let upper = run("losetup", &["-f", "--show", served.device()]);
    let upper = upper.trim();
    let refused = served.ask("detach");
    run("losetup", &["-d", upper]);
    assert!(
        refused.contains(&format!("held by {}", upper.trim_start_matches("/dev/"))),
        "{refused}"
    );
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
    assert!(!link.is_symlink());
}

#[test]
fn a_mount_in_a_foreign_namespace_is_found() {
    let rig = Rig::new();
    rig.storage(64 * MIB);
    let mut served = rig.serve_plain(&[]);
    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.path("inner");
    std::fs::create_dir(&at).unwrap();
    let script = format!("mount {} {} && echo mounted && read _", served.device(), at.display());
    let mut inner = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut word = [0; 7];
    inner.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
    let users = served.ok("users");
    drop(inner.stdin.take());
    inner.wait().unwrap();
    assert!(users.contains(&format!("mounted at {}", at.display())), "{users:?}");
    wait_until("the end of the namespace", || served.ok("users").is_empty());
    served.ok("detach");
}

#[test]
fn a_keeper_that_dies_is_replaced_without_anybody_noticing() {
    let mut rig = Rig::new();
    rig.storage(32 * MIB);
    let served = rig.serve_plain(&[]);
    let identity = (served.numbers.clone(), served.diskseq.clone());
    let node = served.node.clone();
    rig.kill_keeper();
    let file = std::fs::File::options().read(true).write(true).open(&node).unwrap();
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    rig.start_keeper();
    wait_until("the deposit", || {
        rig.log_text("keeper.log").contains("device deposited by its agent")
    });
    // From now on an agent may die again.
    served.kill();
    let mut served = rig.serve_plain(&[]);
    assert_eq!((served.numbers.clone(), served.diskseq.clone()), identity);
    file.write_all_at(&[2; 4096], 4096).unwrap();
    file.sync_all().unwrap();
    drop(file);
    served.ok("detach");
    assert_eq!(own_loops(rig.replica), []);
}

#[test]
fn keeper_and_agent_lost_together_is_named_and_the_device_is_made_again() {
    let mut rig = Rig::new();
    rig.storage(32 * MIB);
    let served = rig.serve_plain(&[]);
    let old = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&served.node)
        .unwrap();
    old.write_all_at(&[7; 4096], 0).unwrap();
    old.sync_all().unwrap();
    rig.kill_keeper();
    served.kill();
    assert!(old.sync_all().is_err() || old.write_all_at(&[8; 4096], 0).and_then(|()| old.sync_all()).is_err());
    rig.start_keeper();
    wait_until("the report", || {
        rig.log_text("keeper.log")
            .contains("keeper and agent were lost together")
    });
    let served = rig.serve_plain(&[]);
    let new = std::fs::File::open(&served.node).unwrap();
    let mut block = [0; 4096];
    new.read_exact_at(&mut block, 0).unwrap();
    assert_eq!(block, [7; 4096], "what was flushed is there");
    drop(old);
    wait_until("the old device to go", || own_loops(rig.replica).len() == 1);
}

#[test]
fn a59_foreign_files_and_stale_links_are_never_followed() {
    let rig = Rig::new();
    rig.storage(16 * MIB);
    std::fs::create_dir(rig.path("dev")).unwrap();
    std::fs::write(rig.path("dev/device"), "precious").unwrap();
    let mut command = rig.server(&[]);
    command.arg("--plain").arg(rig.path("storage"));
    let served = common::Served::start_unready(command);
    assert_eq!(served.line(), "ended");
    assert!(rig.log_text("server.log").contains("it is not a symbolic link of ours"));
    assert_eq!(std::fs::read(rig.path("dev/device")).unwrap(), b"precious");
    assert_eq!(own_loops(rig.replica), [], "no device was made for nothing");

    std::fs::remove_file(rig.path("dev/device")).unwrap();
    std::os::unix::fs::symlink("/dev/null", rig.path("dev/device")).unwrap();
    let served = rig.serve_plain(&[]);
    assert_eq!(
        std::fs::read_link(&served.link).unwrap(),
        served.node,
        "a stale link is replaced"
    );
}

#[test]
fn a_second_agent_gets_nothing_while_the_first_lives() {
    let rig = Rig::new();
    rig.storage(16 * MIB);
    let mut first = rig.serve_plain(&[]);
    let mut command = rig.server(&[]);
    command.arg("--plain").arg(rig.path("storage"));
    let second = common::Served::start_unready(command);
    wait_until("the refusal", || rig.log_text("keeper.log").contains("HolderAlive"));
    assert_eq!(first.ok("users"), "");
    first.kill();
    let ready = second.line();
    assert!(
        ready.starts_with("ready"),
        "it takes over as soon as the first is gone: {ready}"
    );
}
