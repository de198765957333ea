//! The data disk of one replica: claimed exclusively, checked before the first byte, recognised on return.
//!
//! Invariant (P12, A-59): a disk or file that is not provably the one recorded is refused untouched, and what is
//! recorded but missing is `DataMissing`, never made again.

use super::in_use::MarsDevices;
use super::signature;
use super::sysfs::DevNo;
use super::{Pool, PoolError, Pools};
use crate::frontend::{DeviceUser, users};
use crate::layout::{LayoutError, io_error, sync_dir};
use mars_engine::types::{BLOCK_BYTES, ReplicaId};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Where a replica's data shall be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackingWish {
    /// A block device.
    Device(PathBuf),
    /// A file in this pool.
    Pool(String),
}

/// Where a replica's data is, as recorded in its superblock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "kind")]
pub enum BackingRecord {
    /// A block device, with what identifies the medium.
    Device {
        /// As configured.
        path: PathBuf,
        /// Stable attributes (serial, wwid, …) when it was first claimed; all of them must still be the same.
        medium: Vec<(String, String)>,
    },
    /// A file in a pool.
    File {
        /// Name of the pool.
        pool: String,
        /// Its uuid.
        pool_uuid: Uuid,
        /// File name in the pool's directory.
        file: String,
    },
}

/// Why a data disk was refused. Nothing was written to it.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The pool is the problem.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A file operation failed.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// No such device.
    #[error("{path} does not exist: attach the disk, or correct the replica's device")]
    NoDevice {
        /// As configured.
        path: PathBuf,
    },
    /// A file, a directory, a character device.
    #[error("{path} is not a block device: `device` takes block devices only; use a pool of type directory for files")]
    NotABlockDevice {
        /// As configured.
        path: PathBuf,
    },
    /// Somebody uses it.
    #[error("{path} is in use: {users}. Free it, or choose another device")]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who.
        users: String,
    },
    /// Too small.
    #[error("{path} has {have_bytes} bytes, the resource needs {need_bytes}: use a larger disk")]
    TooSmall {
        /// The disk.
        path: PathBuf,
        /// Its size.
        have_bytes: u64,
        /// Size of the resource.
        need_bytes: u64,
    },
    /// It holds something.
    #[error(
        "{path} holds a foreign {found}: not a byte was written. Set `overwrite: true` on this replica if it may be lost"
    )]
    ForeignSignature {
        /// The disk.
        path: PathBuf,
        /// What it holds.
        found: &'static str,
    },
    /// It holds the data of another replica.
    #[error(
        "{path} is recorded in {directory} as the data disk of another replica (of resource {resource}): not touched, also with \
         `overwrite: true`. Choose another device; or, once nothing on it is needed, move that directory out of the store"
    )]
    Recorded {
        /// The device.
        path: PathBuf,
        /// Name of the resource whose data it holds.
        resource: String,
        /// Where that is recorded.
        directory: PathBuf,
    },
    /// Whose data it holds cannot be told.
    #[error(
        "{path} is not given to a new replica while directories in the store cannot be read, since it may be theirs: {unreadable}. \
         Mount or restore them, or move them out of the store"
    )]
    RecordsUnreadable {
        /// The device.
        path: PathBuf,
        /// The directories, with reasons.
        unreadable: String,
    },
    /// Recorded data is not there.
    #[error(
        "the data of this replica is missing: {path} ({reason}). It is not created again: bring the disk or pool \
         back, or remove this replica from the resource and join it anew"
    )]
    DataMissing {
        /// Where it should be.
        path: PathBuf,
        /// What was found instead.
        reason: String,
    },
    /// The path leads to another medium now.
    #[error("{path} is another disk now: {attribute} was {was:?} and is {is:?}. Not touched; attach the right disk")]
    OtherMedium {
        /// The device.
        path: PathBuf,
        /// Which attribute differs.
        attribute: String,
        /// Recorded.
        was: String,
        /// Found.
        is: String,
    },
    /// Spec and record differ.
    #[error(
        "this replica's data is on {recorded}, its spec says {wished}: moving data is not done by editing; leave and join instead"
    )]
    Moved {
        /// Recorded place.
        recorded: String,
        /// Place in the spec.
        wished: String,
    },
    /// Not enough room in the pool.
    #[error(
        "pool {pool} has {available_bytes} bytes left, the replica needs {need_bytes}: make room or use another pool"
    )]
    PoolFull {
        /// The pool.
        pool: String,
        /// Room.
        available_bytes: u64,
        /// Need.
        need_bytes: u64,
    },
}

/// A data disk that is ours while this value lives.
#[derive(Debug)]
pub struct Backing {
    /// Where to open it.
    pub path: PathBuf,
    /// Its size (bytes), rounded down to whole blocks.
    pub size_bytes: u64,
    /// What the superblock says about it.
    pub record: BackingRecord,
    claim: File,
}

impl Backing {
    /// The disk, open for reading and writing; the claim holds until this and the value itself are gone.
    ///
    /// # Errors
    /// No more descriptors.
    pub fn open(&self) -> io::Result<File> {
        self.claim.try_clone()
    }

    /// Looks how large it is now: a block device may have been enlarged while it is open.
    ///
    /// # Errors
    /// It cannot be measured; then the size is as it was.
    pub fn measure(&mut self) -> io::Result<()> {
        // All other I/O names its offset, so that the shared file position does not matter.
        self.size_bytes = whole_blocks((&self.claim).seek(SeekFrom::End(0))?);
        Ok(())
    }

    /// Smallest unit that the disk can write (bytes).
    #[must_use]
    pub fn logical_block_bytes(&self) -> u32 {
        let device = match &self.record {
            BackingRecord::Device { path, .. } => DevNo::of_block_device(path).ok().flatten(),
            BackingRecord::File { .. } => None,
        };
        let told = device.and_then(DevNo::logical_block_bytes);
        told.filter(|bytes| *bytes == 4096).unwrap_or(512)
    }
}

impl BackingWish {
    fn describe(&self) -> String {
        match self {
            BackingWish::Device(path) => format!("device {}", path.display()),
            BackingWish::Pool(name) => format!("pool {name}"),
        }
    }
}

impl BackingRecord {
    fn describe(&self) -> String {
        match self {
            BackingRecord::Device { path, .. } => format!("device {}", path.display()),
            BackingRecord::File { pool, .. } => format!("pool {pool}"),
        }
    }

    /// Whether the spec still asks for the place that is recorded.
    ///
    /// # Errors
    /// [`BackingError::Moved`].
    pub fn check_wish(&self, wish: &BackingWish) -> Result<(), BackingError> {
        let same = match (self, wish) {
            (BackingRecord::Device { path, .. }, BackingWish::Device(wished)) => path == wished,
            (BackingRecord::File { pool, .. }, BackingWish::Pool(wished)) => pool == wished,
            _ => false,
        };
        if same {
            Ok(())
        } else {
            Err(BackingError::Moved {
                recorded: self.describe(),
                wished: wish.describe(),
            })
        }
    }
}

/// What a fresh replica needs.
#[derive(Debug, Clone, Copy)]
pub struct FreshRequest<'a> {
    /// Where.
    pub wish: &'a BackingWish,
    /// For whom.
    pub replica: ReplicaId,
    /// Size of the resource (bytes).
    pub size_bytes: u64,
    /// Content of the disk may be lost.
    pub overwrite: bool,
}

/// Claims the disk of a replica that is recorded as fresh; for a pool, creates its file.
///
/// # Errors
/// Any doubt about the disk; nothing is written then.
pub fn claim_fresh(request: FreshRequest<'_>, pools: &mut Pools, mars: &MarsDevices) -> Result<Backing, BackingError> {
    match request.wish {
        BackingWish::Device(path) => {
            let backing = claim_device(path, mars)?;
            check_size(path, backing.size_bytes, request.size_bytes)?;
            let found = signature::find(&backing.claim, backing.size_bytes).map_err(io_error("read", path))?;
            match found {
                Some(found) if !request.overwrite => Err(BackingError::ForeignSignature {
                    path: path.clone(),
                    found,
                }),
                _ => Ok(backing),
            }
        }
        BackingWish::Pool(name) => {
            let pool = pools.open(name)?;
            mars.refuse_stacked(&pool.directory)?;
            create_file(&pool, request.replica, request.size_bytes)
        }
    }
}

/// Claims the disk of a replica that has data already.
///
/// # Errors
/// It is missing, another one, too small, or in use.
pub fn claim_known(
    record: &BackingRecord,
    size_bytes: u64,
    pools: &mut Pools,
    mars: &MarsDevices,
) -> Result<Backing, BackingError> {
    let backing = match record {
        BackingRecord::Device { path, medium } => {
            let missing = |error: BackingError| match error {
                BackingError::NoDevice { path } => BackingError::DataMissing {
                    path,
                    reason: "no such device".into(),
                },
                other => other,
            };
            let backing = claim_device(path, mars).map_err(missing)?;
            check_medium(path, medium, &backing.record)?;
            Backing {
                record: record.clone(),
                ..backing
            }
        }
        BackingRecord::File { pool, pool_uuid, file } => {
            let found = pools.open(pool)?;
            let path = found.directory.join(file);
            if found.uuid != *pool_uuid {
                let reason = format!("pool {pool} now has uuid {}, the data is in {pool_uuid}", found.uuid);
                return Err(BackingError::DataMissing { path, reason });
            }
            mars.refuse_stacked(&found.directory)?;
            open_file(path, record.clone())?
        }
    };
    check_size(&backing.path, backing.size_bytes, size_bytes)?;
    Ok(backing)
}

/// Erases the data of a replica whose deletion was ordered with `dataPolicy: Delete`. A file is removed; a block
/// device only loses our claim: its content is the administrator's.
///
/// # Errors
/// The pool is absent, or the file cannot be removed.
pub fn delete(record: &BackingRecord, pools: &mut Pools) -> Result<(), BackingError> {
    let BackingRecord::File { pool, pool_uuid, file } = record else {
        return Ok(());
    };
    let found = pools.open(pool)?;
    if found.uuid != *pool_uuid {
        let reason = format!("pool {pool} now has uuid {}, the data is in {pool_uuid}", found.uuid);
        return Err(BackingError::DataMissing {
            path: found.directory.join(file),
            reason,
        });
    }
    Ok(crate::layout::remove_durably(&found.directory.join(file))?)
}

fn check_size(path: &Path, have_bytes: u64, need_bytes: u64) -> Result<(), BackingError> {
    if have_bytes >= need_bytes {
        return Ok(());
    }
    Err(BackingError::TooSmall {
        path: path.to_path_buf(),
        have_bytes,
        need_bytes,
    })
}

fn check_medium(path: &Path, recorded: &[(String, String)], now: &BackingRecord) -> Result<(), BackingError> {
    let BackingRecord::Device { medium: now, .. } = now else {
        return Ok(());
    };
    for (attribute, was) in recorded {
        let is = now
            .iter()
            .find(|(name, _)| name == attribute)
            .map_or("", |(_, value)| value);
        if is != was {
            return Err(BackingError::OtherMedium {
                path: path.to_path_buf(),
                attribute: attribute.clone(),
                was: was.clone(),
                is: is.to_owned(),
            });
        }
    }
    Ok(())
}

/// Opens a block device exclusively; the kernel refuses when it is mounted, swap, or part of something.
fn claim_device(path: &Path, mars: &MarsDevices) -> Result<Backing, BackingError> {
    let device = match DevNo::of_block_device(path) {
        Ok(Some(device)) => device,
        Ok(None) => {
            return Err(BackingError::NotABlockDevice {
                path: path.to_path_buf(),
            });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(BackingError::NoDevice {
                path: path.to_path_buf(),
            });
        }
        Err(error) => return Err(io_error("examine", path)(error).into()),
    };
    mars.refuse_stacked(path)?;
    let in_use = |found: &[DeviceUser]| {
        let users = if found.is_empty() {
            "the kernel says busy".to_owned()
        } else {
            users::describe(found)
        };
        BackingError::InUse {
            path: path.to_path_buf(),
            users,
        }
    };
    // Exclusive opening does not see plain openers and loop devices on top; both could write.
    let found = users::of_numbers(device.major, device.minor, &[path.to_path_buf()]);
    if !found.is_empty() {
        return Err(in_use(&found));
    }
    let flags = OFlags::RDWR | OFlags::EXCL | OFlags::CLOEXEC;
    let mut claim: File = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => fd.into(),
        Err(rustix::io::Errno::BUSY) => return Err(in_use(&[])),
        Err(errno) => return Err(io_error("open", path)(errno.into()).into()),
    };
    let size_bytes = claim.seek(SeekFrom::End(0)).map_err(io_error("measure", path))?;
    let record = BackingRecord::Device {
        path: path.to_path_buf(),
        medium: device.medium_identity(),
    };
    Ok(Backing {
        path: path.to_path_buf(),
        size_bytes: whole_blocks(size_bytes),
        record,
        claim,
    })
}

fn whole_blocks(bytes: u64) -> u64 {
    bytes / BLOCK_BYTES * BLOCK_BYTES
}

fn create_file(pool: &Pool, replica: ReplicaId, size_bytes: u64) -> Result<Backing, BackingError> {
    let name = format!("{replica}.data");
    let path = pool.directory.join(&name);
    let record = BackingRecord::File {
        pool: pool.name.clone(),
        pool_uuid: pool.uuid,
        file: name,
    };
    // A file of this very replica, which is still recorded as fresh, is the rest of an attempt that was cut short.
    if !path.exists() {
        let available_bytes = super::space(&pool.directory)?.available_bytes;
        if available_bytes < size_bytes {
            return Err(BackingError::PoolFull {
                pool: pool.name.clone(),
                available_bytes,
                need_bytes: size_bytes,
            });
        }
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file: File = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| io_error("create", &path)(errno.into()))?
        .into();
    file.set_len(0).map_err(io_error("truncate", &path))?;
    let room = rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, size_bytes);
    let made = match room {
        // Not every file system can reserve; there the file is sparse and the pool's space is watched instead.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(size_bytes),
        Err(errno) => Err(errno.into()),
        Ok(()) => Ok(()),
    };
    if let Err(error) = made.and_then(|()| file.sync_all()) {
        crate::layout::remove_durably(&path)?;
        return Err(io_error("reserve the size of", &path)(error).into());
    }
    sync_dir(&pool.directory)?;
    drop(file);
    open_file(path, record)
}

/// Grows the file of a replica in a pool to at least `size_bytes`; a block device is only measured again.
///
/// # Errors
/// No room, or the device is still too small.
pub fn grow(backing: &mut Backing, size_bytes: u64) -> Result<(), BackingError> {
    if let BackingRecord::File { pool, .. } = &backing.record
        && backing.size_bytes < size_bytes
    {
        let available_bytes = super::space(&backing.path)?.available_bytes;
        let need_bytes = size_bytes - backing.size_bytes;
        if available_bytes < need_bytes {
            return Err(BackingError::PoolFull {
                pool: pool.clone(),
                available_bytes,
                need_bytes,
            });
        }
        let grow = rustix::fs::fallocate(&backing.claim, FallocateFlags::empty(), backing.size_bytes, need_bytes);
        match grow {
            Err(rustix::io::Errno::OPNOTSUPP) => backing.claim.set_len(size_bytes),
            Err(errno) => Err(errno.into()),
            Ok(()) => Ok(()),
        }
        .and_then(|()| backing.claim.sync_all())
        .map_err(io_error("grow", &backing.path))?;
    }
    backing.measure().map_err(io_error("measure", &backing.path))?;
    check_size(&backing.path, backing.size_bytes, size_bytes)
}

fn open_file(path: PathBuf, record: BackingRecord) -> Result<Backing, BackingError> {
    let missing = |reason: &str| BackingError::DataMissing {
        path: path.clone(),
        reason: reason.to_owned(),
    };
    match fs::symlink_metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing("no such file")),
        Err(error) => return Err(io_error("examine", &path)(error).into()),
        Ok(metadata) if !metadata.is_file() => return Err(missing("not a regular file")),
        Ok(_) => {}
    }
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut claim: File = rustix::fs::open(&path, flags, Mode::empty())
        .map_err(|errno| io_error("open", &path)(errno.into()))?
        .into();
    match rustix::fs::flock(&claim, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            return Err(BackingError::InUse {
                path,
                users: "another process has locked it".into(),
            });
        }
        Err(errno) => return Err(io_error("lock", &path)(errno.into()).into()),
    }
    let size_bytes = claim.seek(SeekFrom::End(0)).map_err(io_error("measure", &path))?;
    Ok(Backing {
        path,
        size_bytes: whole_blocks(size_bytes),
        record,
        claim,
    })
}
