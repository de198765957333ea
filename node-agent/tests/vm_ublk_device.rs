//! The `ublk` frontend on a kernel that has `ublk_drv`, over an engine without a log: what is wrong here is wrong in the
//! frontend. Ignored elsewhere; the tier `vm` runs these in a virtual machine.
#![allow(clippy::unwrap_used, reason = "in a test a failed step is a failed test")]

mod common;

use common::{Rig, run, text, wait_until};
use std::os::unix::fs::FileExt;

const MIB: u64 = 1 << 20;

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn ublk_file_systems_are_made_used_and_found_clean() {
    for (make, check) in [
        (&["mkfs.ext4", "-q", "-F"][..], &["fsck.ext4", "-fn"][..]),
        (&["mkfs.xfs", "-q", "-f"][..], &["xfs_repair", "-n"][..]),
    ] {
        let mut rig = Rig::for_ublk();
        rig.storage(400 * MIB);
        let mut served = rig.serve_plain(&["--defer"]);
        let device = served.link.clone();
        run(make[0], &[&make[1..], &[text(&device)]].concat());
        let at = rig.mount(&device, "discard");
        let pattern: Vec<u8> = (0..8 * MIB).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
        std::fs::write(at.join("a"), &pattern).unwrap();
        run("sync", &["-f", text(&at)]);
        rig.umount();
        run(check[0], &[&check[1..], &[text(&device)]].concat());
        let at = rig.mount(&device, "ro");
        assert!(
            std::fs::read(at.join("a")).unwrap() == pattern,
            "{make:?}: file differs after remount"
        );
        rig.umount();
        served.ok("detach");
        assert!(!device.is_symlink(), "the link goes with the device");
        assert!(!served.node.exists(), "the device is gone");
    }
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a11_ublk_advertises_cache_fua_discard_and_zeroes() {
    let rig = Rig::for_ublk();
    rig.storage(64 * MIB);
    let mut served = rig.serve_plain(&[]);
    assert_eq!(served.sysfs("queue/write_cache"), "write back");
    assert_eq!(served.sysfs("queue/fua"), "1");
    assert_eq!(served.sysfs("queue/logical_block_size"), "512");
    assert_eq!(served.sysfs("queue/physical_block_size"), "4096");
    for attribute in ["queue/discard_max_bytes", "queue/write_zeroes_max_bytes"] {
        assert!(
            served.sysfs(attribute).parse::<u64>().unwrap() >= 1 << 30,
            "{attribute}"
        );
    }
    served.ok("durability every-write");
    assert_eq!(served.sysfs("queue/write_cache"), "write through");
    served.ok("durability on-flush");
    assert_eq!(served.sysfs("queue/write_cache"), "write back");

    let device = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&served.node)
        .unwrap();
    device.write_all_at(&vec![0xAB; 1 << 20], 0).unwrap();
    device.sync_all().unwrap();
    run("blkdiscard", &["-f", "-o", "4096", "-l", "8192", served.device()]);
    run(
        "blkdiscard",
        &["-f", "-z", "-o", "65536", "-l", "4096", served.device()],
    );
    let mut now = vec![0; 1 << 20];
    device.read_exact_at(&mut now, 0).unwrap();
    let zero = |at: usize| (4096..4096 + 8192).contains(&at) || (65536..65536 + 4096).contains(&at);
    assert!(
        now.iter()
            .enumerate()
            .all(|(at, byte)| *byte == if zero(at) { 0 } else { 0xAB })
    );
    drop(device);
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn ublk_grows_at_once_or_at_the_next_open() {
    let rig = Rig::for_ublk();
    rig.storage(64 * MIB);
    let mut served = rig.serve_plain(&[]);
    served.ok(&format!("resize {}", 128 * MIB));
    let sectors = served.sysfs("size");
    assert!(
        sectors == (64 * MIB / 512).to_string() || sectors == (128 * MIB / 512).to_string(),
        "{sectors}"
    );
    served.ok("detach");
    drop(served);
    let mut served = rig.serve_plain(&[]);
    assert_eq!(served.sysfs("size"), (128 * MIB / 512).to_string());
    served.ok("detach");
}

#[test]
#[ignore = "needs ublk_drv: `make vm` runs it in a virtual machine"]
fn a55_a_ublk_device_in_use_is_not_taken_away() {
    let mut rig = Rig::for_ublk();
    rig.storage(64 * MIB);
    let mut served = rig.serve_plain(&[]);
    run("mkfs.ext4", &["-q", "-F", served.device()]);
    let at = rig.mount(&served.node.clone(), "defaults");
    let refused = served.ask("detach");
    assert!(
        refused.starts_with("error") && refused.contains(&format!("mounted at {}", at.display())),
        "{refused}"
    );
    assert!(served.link.is_symlink());
    std::fs::write(at.join("still"), "works").unwrap();
    run("sync", &["-f", text(&at)]);
    rig.umount();
    let file = std::fs::File::open(&served.node).unwrap();
    assert!(
        served
            .ask("detach")
            .contains(&format!("open by pid {}", std::process::id()))
    );
    drop(file);
    wait_until("the end of all use", || served.ok("users").is_empty());
    served.ok("detach");
}
