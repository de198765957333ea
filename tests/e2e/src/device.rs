//! What users do with a block device – file systems, files, verified load – and proof of whose device it is.
//!
//! Invariant: a mount made here is gone when its [`Mount`] is dropped, lazily if something still uses it.

use crate::machine::{Cmd, run, until};
use anyhow::{Context, Result, bail, ensure};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Longest that mkfs, fsck and fio may take.
pub const TOOL_LIMIT: Duration = Duration::from_mins(5);

/// File systems that the scenarios use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fs {
    /// ext4.
    Ext4,
    /// XFS.
    Xfs,
}

impl Fs {
    /// Makes the file system; whatever was there is overwritten.
    pub fn make(self, device: &Path) -> Result<()> {
        let cmd = match self {
            Self::Ext4 => Cmd::new("mkfs.ext4").args(["-q", "-F"]),
            Self::Xfs => Cmd::new("mkfs.xfs").args(["-q", "-f"]),
        };
        cmd.arg(device).limit(TOOL_LIMIT).run().map(drop)
    }

    /// Checks an unmounted file system without changing it; an error describes the damage.
    pub fn check(self, device: &Path) -> Result<()> {
        let cmd = match self {
            Self::Ext4 => Cmd::new("e2fsck").args(["-f", "-n"]),
            Self::Xfs => Cmd::new("xfs_repair").arg("-n"),
        };
        cmd.arg(device).limit(TOOL_LIMIT).run().map(drop)
    }
}

/// A mounted device.
#[derive(Debug)]
pub struct Mount {
    point: PathBuf,
    mounted: bool,
}

impl Mount {
    /// Mounts a device on a directory, which is made if needed.
    pub fn new(device: &Path, point: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir_all(point)?;
        Cmd::new("mount").args(["-o", options]).arg(device).arg(point).run()?;
        Ok(Self {
            point: point.to_owned(),
            mounted: true,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Unmounts it, waiting for short-lived users.
    pub fn unmount(mut self) -> Result<()> {
        self.try_unmount()
    }

    fn try_unmount(&mut self) -> Result<()> {
        until(
            &format!("umount {}", self.point.display()),
            Duration::from_secs(20),
            || Cmd::new("umount").arg(&self.point).run().map(|_| true),
        )?;
        self.mounted = false;
        Ok(())
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.mounted && self.try_unmount().is_err() {
            let _ = Cmd::new("umount").arg("--lazy").arg(&self.point).run();
        }
    }
}

/// Waits until a device link leads to a block device that answers, and returns the device behind it.
pub fn wait_device(link: &Path, limit: Duration) -> Result<PathBuf> {
    let mut target = PathBuf::new();
    until(&format!("{} is a block device", link.display()), limit, || {
        target = std::fs::canonicalize(link)?;
        Ok(std::fs::metadata(&target)?.file_type().is_block_device() && size_bytes(&target)? > 0)
    })?;
    Ok(target)
}

/// Size of a block device.
pub fn size_bytes(device: &Path) -> Result<u64> {
    let said = Cmd::new("blockdev").arg("--getsize64").arg(device).run()?;
    said.trim().parse().with_context(|| format!("blockdev said {said:?}"))
}

/// BLAKE3 would do; the tests use the system's own tool, so that no code of ours judges our data.
pub fn sha256(path: &Path) -> Result<String> {
    let said = Cmd::new("sha256sum").arg(path).limit(TOOL_LIMIT).run()?;
    Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
}

/// SHA-256 of every regular file below a directory, by relative path.
pub fn checksums(dir: &Path) -> Result<BTreeMap<String, String>> {
    let said = Cmd::new("sh")
        .args([
            "-c",
            "cd \"$1\" && find . -xdev -type f -print0 | sort -z | xargs -0 -r sha256sum --zero",
            "sh",
        ])
        .arg(dir)
        .limit(TOOL_LIMIT)
        .run()?;
    let entries = said.split('\0').filter(|entry| !entry.is_empty());
    entries
        .map(|entry| {
            let (sum, path) = entry
                .split_once("  ")
                .with_context(|| format!("sha256sum said {entry:?}"))?;
            Ok((path.to_owned(), sum.to_owned()))
        })
        .collect()
}

/// Differences between two trees of checksums, in words; empty when equal.
#[must_use]
pub fn differences(wanted: &BTreeMap<String, String>, got: &BTreeMap<String, String>) -> Vec<String> {
    let mut found = Vec::new();
    for (path, sum) in wanted {
        match got.get(path) {
            None => found.push(format!("{path} is missing")),
            Some(other) if other != sum => found.push(format!("{path} has other content")),
            Some(_) => {}
        }
    }
    found.extend(
        got.keys()
            .filter(|path| !wanted.contains_key(*path))
            .map(|path| format!("{path} is new")),
    );
    found
}

/// fio with verification: random offsets, mixed sizes, four jobs over disjoint parts, then everything is read back.
#[derive(Debug, Clone)]
pub struct Fio {
    /// Bytes that each of the four jobs writes.
    pub bytes_per_job: u64,
    /// Requests in flight per job.
    pub depth: u32,
    /// fio's `fdatasync`: flush after that many writes; 0 = never.
    pub flush_every: u32,
}

impl Fio {
    /// Arguments of one fio run over a device of this size.
    #[must_use]
    pub fn command(&self, device: &Path, device_bytes: u64) -> Cmd {
        let part = device_bytes / 4 / 1_048_576 * 1_048_576;
        Cmd::new("fio")
            .args([
                "--name=verify",
                "--rw=randwrite",
                "--bsrange=4k-256k",
                "--blockalign=4k",
                "--ioengine=libaio",
                "--direct=1",
            ])
            .args([
                "--numjobs=4",
                "--group_reporting",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--do_verify=1",
                "--end_fsync=1",
            ])
            .args([
                "--verify_state_save=0",
                "--randrepeat=0",
                "--max_latency=0",
                "--output-format=terse",
            ])
            .arg(format!("--filename={}", device.display()))
            .arg(format!("--iodepth={}", self.depth))
            .arg(format!("--fdatasync={}", self.flush_every))
            .arg(format!("--size={part}"))
            .arg(format!("--offset_increment={part}"))
            .arg(format!("--io_size={}", self.bytes_per_job))
            .limit(TOOL_LIMIT)
    }

    /// Writes and verifies; an error names the first wrong block.
    pub fn run(&self, device: &Path) -> Result<()> {
        let bytes = size_bytes(device)?;
        self.command(device, bytes).run().map(drop)
    }
}

/// What the kernel says about a loop device: whose file it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// major:minor.
    pub number: String,
    /// Changes with every new device, also when the number is used again.
    pub diskseq: u64,
    /// The file behind a loop device; `None` for other kinds.
    pub backing_file: Option<PathBuf>,
}

/// Reads the identity of a block device from sysfs.
pub fn identity(device: &Path) -> Result<Identity> {
    let number = std::fs::metadata(device)?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let sysfs = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    let diskseq = std::fs::read_to_string(sysfs.join("diskseq"))?.trim().parse()?;
    let backing_file = std::fs::read_to_string(sysfs.join("loop/backing_file")).ok();
    Ok(Identity {
        number: format!("{major}:{minor}"),
        diskseq,
        backing_file: backing_file.map(|text| text.trim_end().into()),
    })
}

/// Reads a range of a file or device without the page cache of earlier reads getting in the way.
pub fn read_at(path: &Path, offset: u64, length: usize) -> Result<Vec<u8>> {
    let mut bytes = vec![0; length];
    let file = File::open(path).with_context(|| path.display().to_string())?;
    drop_cache(path)?;
    file.read_exact_at(&mut bytes, offset)
        .with_context(|| format!("{} at {offset}", path.display()))?;
    Ok(bytes)
}

/// Forgets cached pages of a file or block device.
pub fn drop_cache(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    if file.metadata()?.file_type().is_block_device() {
        Cmd::new("blockdev").arg("--flushbufs").arg(path).run()?;
    }
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

/// Compares the beginnings of two files or devices and names the first difference.
pub fn same_content(one: &Path, other: &Path, bytes: u64) -> Result<()> {
    drop_cache(one)?;
    drop_cache(other)?;
    let (mut left, mut right) = (File::open(one)?.take(bytes), File::open(other)?.take(bytes));
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut offset = 0_u64;
    loop {
        let (n, m) = (read_full(&mut left, &mut a)?, read_full(&mut right, &mut b)?);
        if a[..n] != b[..m] {
            let at = a[..n].iter().zip(&b[..m]).position(|(x, y)| x != y).unwrap_or(n.min(m));
            bail!(
                "{} and {} differ at byte {}",
                one.display(),
                other.display(),
                offset + at as u64
            );
        }
        if n == 0 {
            ensure!(
                offset == bytes,
                "{} and {} end at byte {offset} of {bytes}",
                one.display(),
                other.display()
            );
            return Ok(());
        }
        offset += n as u64;
    }
}

fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..])? {
            0 => break,
            n => filled += n,
        }
    }
    Ok(filled)
}

/// Loads a directory of real files found on this machine, up to about `bytes`, into `target`.
pub fn copy_real_files(target: &Path, bytes: u64) -> Result<u64> {
    std::fs::create_dir_all(target)?;
    let mut copied = 0;
    for source in [
        "/usr/share/doc",
        "/usr/share/zoneinfo",
        "/usr/share/perl",
        "/usr/lib/python3",
        "/usr/lib/gcc",
        "/usr/bin",
    ] {
        for entry in walk(Path::new(source)) {
            let size = entry.metadata().map_or(0, |data| data.len());
            if size == 0 || size > bytes / 4 {
                continue;
            }
            let relative = entry.strip_prefix("/usr").unwrap_or(&entry);
            let to = target.join(relative);
            std::fs::create_dir_all(to.parent().context("a file has a directory")?)?;
            std::fs::copy(&entry, &to).with_context(|| format!("copy {}", entry.display()))?;
            copied += size;
            if copied >= bytes {
                return Ok(copied);
            }
            ensure!(!crate::machine::interrupted(), "interrupted");
        }
    }
    Ok(copied)
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let (mut files, mut dirs) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => dirs.push(entry.path()),
                Ok(kind) if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    files.sort();
    files
}

/// Whether anything has a file or device open, by fuser's word.
#[must_use]
pub fn in_use(path: &Path) -> bool {
    run("fuser", &["--silent", &path.to_string_lossy()]).is_ok()
}
