//! What tells whether a data disk was written to while nobody here held it.
//!
//! A file keeps the time of its last change; for a block device the kernel counts what is written to it, from its appearance on.
//! Neither sees everything: the counters begin anew with each boot and each time the device appears, can be switched off
//! (`queue/iostats`), and do not see what was written below the device (the other legs of a mirror, a snapshot rolled back). What
//! cannot be told is [`Verdict::Unknown`], never "unchanged".

use super::backing::{Backing, BackingRecord};
use super::sysfs::DevNo;
use rustix::fs::{AtFlags, StatxFlags, statx};
use serde::{Deserialize, Serialize};
use std::io;

/// State of a disk at one moment, to be compared with a later one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "kind")]
pub enum Witness {
    /// A file: which one, how long, and when it was last written.
    File {
        /// Inode number.
        inode: u64,
        /// Length (bytes).
        size_bytes: u64,
        /// Last change of its content: seconds, nanoseconds.
        changed: (i64, u32),
    },
    /// A block device: this appearance of it, and what was written to it since then.
    Device {
        /// The boot in which the counters began.
        boot: String,
        /// The kernel's count of devices: tells this appearance from another one.
        diskseq: String,
        /// Sectors written and sectors discarded.
        sectors: (u64, u64),
    },
    /// Nothing is known.
    None,
}

/// What a comparison says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was written, as far as the machine can tell.
    Unchanged,
    /// Something was written, or it is another disk.
    Changed,
    /// Cannot be told.
    Unknown,
}

impl Witness {
    /// Takes down the state of a disk that is ours; what was written before must be flushed.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn take(backing: &Backing) -> io::Result<Witness> {
        match &backing.record {
            BackingRecord::File { .. } => {
                let file = backing.open()?;
                let mask = StatxFlags::INO | StatxFlags::SIZE | StatxFlags::MTIME;
                let stat = statx(&file, "", AtFlags::EMPTY_PATH, mask)?;
                Ok(Witness::File {
                    inode: stat.stx_ino,
                    size_bytes: stat.stx_size,
                    changed: (stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
                })
            }
            BackingRecord::Device { path, .. } => {
                let device = DevNo::of_block_device(path)?;
                Ok(device.and_then(of_device).unwrap_or(Witness::None))
            }
        }
    }

    /// Compares with the state of the same disk later.
    #[must_use]
    pub fn compare(&self, later: &Witness) -> Verdict {
        match (self, later) {
            (Witness::None, _) | (_, Witness::None) => Verdict::Unknown,
            (
                Witness::Device { boot, diskseq, .. },
                Witness::Device {
                    boot: now,
                    diskseq: seq,
                    ..
                },
            ) if (boot, diskseq) != (now, seq) => Verdict::Unknown,
            (before, later) if before == later => Verdict::Unchanged,
            _ => Verdict::Changed,
        }
    }
}

fn of_device(device: DevNo) -> Option<Witness> {
    let whole = |name: &str| {
        device
            .attribute(name)
            .or_else(|| device.attribute(&format!("../{name}")))
    };
    // Without accounting the counters stand still whatever is written.
    if whole("queue/iostats")? != "1" {
        return None;
    }
    let stat = device.attribute("stat")?;
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Witness::Device {
        boot: std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()?
            .trim()
            .to_owned(),
        diskseq: whole("diskseq")?,
        sectors: (*fields.get(6)?, *fields.get(13)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(changed: (i64, u32)) -> Witness {
        Witness::File {
            inode: 1,
            size_bytes: 4096,
            changed,
        }
    }

    fn device(boot: &str, diskseq: &str, sectors: (u64, u64)) -> Witness {
        Witness::Device {
            boot: boot.into(),
            diskseq: diskseq.into(),
            sectors,
        }
    }

    #[test]
    fn what_cannot_be_told_is_never_taken_for_unchanged() {
        assert_eq!(file((1, 2)).compare(&file((1, 2))), Verdict::Unchanged);
        assert_eq!(file((1, 2)).compare(&file((1, 3))), Verdict::Changed);
        let before = device("b", "7", (10, 0));
        assert_eq!(before.compare(&device("b", "7", (10, 0))), Verdict::Unchanged);
        assert_eq!(before.compare(&device("b", "7", (18, 0))), Verdict::Changed);
        assert_eq!(before.compare(&device("b", "7", (10, 8))), Verdict::Changed);
        // After a reboot, or when it was unplugged, the counters began anew.
        assert_eq!(before.compare(&device("c", "7", (10, 0))), Verdict::Unknown);
        assert_eq!(before.compare(&device("b", "8", (10, 0))), Verdict::Unknown);
        assert_eq!(before.compare(&Witness::None), Verdict::Unknown);
        assert_eq!(before.compare(&file((1, 2))), Verdict::Changed);
    }
}
