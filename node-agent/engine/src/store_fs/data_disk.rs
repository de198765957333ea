//! The data disk of a replica: an open file that may be let go of, and taken back, while the replica stays open.
//!
//! Invariant: once [`DataDisk::detach`] has returned, no I/O of this process is under way on the disk or will begin, and the file is
//! closed; whatever is asked of it meanwhile fails with an error that says so, and its size is the one it had.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::{PoisonError, RwLock};

/// An open file, and whether it is a block device.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) file: File,
    pub(super) is_block_device: bool,
}

impl OpenFile {
    pub(super) fn new(file: File) -> io::Result<Self> {
        let is_block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self { file, is_block_device })
    }
}

#[derive(Debug)]
enum Place {
    Attached(OpenFile),
    Detached { size_bytes: u64 },
}

/// See the module.
#[derive(Debug)]
pub(super) struct DataDisk {
    place: RwLock<Place>,
}

fn detached() -> io::Error {
    io::Error::new(
        io::ErrorKind::NotConnected,
        "the data disk is detached: switch attach on for this replica",
    )
}

impl DataDisk {
    pub(super) fn attached(file: OpenFile) -> Self {
        Self {
            place: RwLock::new(Place::Attached(file)),
        }
    }

    pub(super) fn detached(size_bytes: u64) -> Self {
        Self {
            place: RwLock::new(Place::Detached { size_bytes }),
        }
    }

    /// Does something with the open file; it stays open meanwhile.
    pub(super) fn with<T>(&self, work: impl FnOnce(&OpenFile) -> io::Result<T>) -> io::Result<T> {
        match &*self.place.read().unwrap_or_else(PoisonError::into_inner) {
            Place::Attached(file) => work(file),
            Place::Detached { .. } => Err(detached()),
        }
    }

    /// The size while it is detached.
    pub(super) fn remembered_size(&self) -> Option<u64> {
        match &*self.place.read().unwrap_or_else(PoisonError::into_inner) {
            Place::Attached(_) => None,
            Place::Detached { size_bytes } => Some(*size_bytes),
        }
    }

    /// Makes everything written durable, waits for I/O under way, and closes the file.
    pub(super) fn detach(&self, size: impl FnOnce(&OpenFile) -> io::Result<u64>) -> io::Result<()> {
        let mut place = self.place.write().unwrap_or_else(PoisonError::into_inner);
        if let Place::Attached(open) = &*place {
            open.file.sync_all()?;
            let size_bytes = size(open)?;
            *place = Place::Detached { size_bytes };
        }
        Ok(())
    }

    pub(super) fn attach(&self, file: OpenFile) {
        *self.place.write().unwrap_or_else(PoisonError::into_inner) = Place::Attached(file);
    }
}
