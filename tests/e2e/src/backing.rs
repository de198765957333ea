//! Disks for nodes: loop devices over files of the test, and small file systems that can be filled.
//!
//! Invariant: a loop device is detached when its [`Disk`] is dropped.

use crate::device::{Fs, Mount};
use crate::machine::{Cmd, until};
use anyhow::{Context, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A loop device over a sparse file.
#[derive(Debug)]
pub struct Disk {
    device: PathBuf,
    file: PathBuf,
}

impl Disk {
    /// Makes a file of this size and a block device of it.
    pub fn new(file: &Path, bytes: u64) -> Result<Self> {
        File::create(file)?.set_len(bytes)?;
        let mut device = String::new();
        // Others look for a free device at the same moment.
        until("a loop device is free", Duration::from_secs(20), || {
            device = Cmd::new("losetup").args(["--find", "--show"]).arg(file).run()?;
            Ok(true)
        })?;
        Ok(Self {
            device: device.trim().into(),
            file: file.to_owned(),
        })
    }

    /// The block device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }

    /// Makes it larger.
    pub fn grow(&self, bytes: u64) -> Result<()> {
        File::options().write(true).open(&self.file)?.set_len(bytes)?;
        Cmd::new("losetup")
            .arg("--set-capacity")
            .arg(&self.device)
            .run()
            .map(drop)
    }

    /// SHA-256 of everything on it.
    pub fn sha256(&self) -> Result<String> {
        Cmd::new("blockdev").arg("--flushbufs").arg(&self.device).run()?;
        crate::device::sha256(&self.file)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Cmd::new("losetup").arg("--detach").arg(&self.device).run();
    }
}

/// A read-only loop device over a file that is somebody else's.
#[derive(Debug)]
pub struct ReadOnly {
    device: PathBuf,
}

impl ReadOnly {
    /// Makes it.
    pub fn new(file: &Path) -> Result<Self> {
        let mut device = String::new();
        until("a loop device is free", Duration::from_secs(20), || {
            device = Cmd::new("losetup")
                .args(["--find", "--show", "--read-only"])
                .arg(file)
                .run()?;
            Ok(true)
        })?;
        Ok(Self {
            device: device.trim().into(),
        })
    }

    /// The block device.
    #[must_use]
    pub fn device(&self) -> &Path {
        &self.device
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = Cmd::new("losetup").arg("--detach").arg(&self.device).run();
    }
}

/// A file system of its own, small enough to be filled.
#[derive(Debug)]
pub struct SmallStore {
    // Order matters: unmounted before the device is detached.
    mount: Mount,
    _disk: Disk,
    dir: tempfile::TempDir,
}

impl SmallStore {
    /// Makes and mounts it.
    pub fn new(bytes: u64) -> Result<Self> {
        let dir = tempfile::tempdir()?;
        let disk = Disk::new(&dir.path().join("image"), bytes)?;
        Fs::Ext4.make(disk.device())?;
        let mount = Mount::new(disk.device(), &dir.path().join("mnt"), "noatime")?;
        Ok(Self {
            mount,
            _disk: disk,
            dir,
        })
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.mount.point()
    }

    /// Takes all space that is left, but for `leave` bytes.
    pub fn fill(&self, leave: u64) -> Result<Filler> {
        let space = rustix::fs::statvfs(self.path())?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        let path = self.path().join("filler");
        let file = File::create(&path)?;
        rustix::fs::fallocate(
            &file,
            rustix::fs::FallocateFlags::empty(),
            0,
            free.saturating_sub(leave),
        )
        .with_context(|| format!("fill {}", self.dir.path().display()))?;
        Ok(Filler { path })
    }
}

/// The file that takes the space; gone when dropped.
#[derive(Debug)]
pub struct Filler {
    path: PathBuf,
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
