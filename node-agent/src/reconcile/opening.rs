//! Bringing a replica up: directory, disk, engine – in the order in which nothing can be taken for something else.
//!
//! Invariant: every check comes before the first write. Blocking; runs on a thread for such work.

use super::context::NodeContext;
use super::facts::Done;
use super::inventory;
use super::report::Problem;
use super::superblock::{Belongs, ReplicaDir, Stage, SuperblockError};
use super::todo::Todo;
use crate::layout::{self, LayoutError, io_error};
use crate::pool::PoolError;
use crate::pool::backing::{self, Backing, BackingError, BackingWish, FreshRequest};
use crate::pool::in_use::MarsDevices;
use crate::shard::engine::now;
use mars_engine::owner::{OpenError, OpenParams, Owner};
use mars_engine::store_fs::FsStore;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Everything that belongs to an open replica, except the thread of its engine.
#[derive(Debug)]
pub struct Opened {
    /// Its directory, locked.
    pub dir: ReplicaDir,
    /// Its data disk, claimed; `None` while it is detached.
    pub backing: Option<Backing>,
    /// Its files.
    pub store: FsStore,
    /// Its engine.
    pub owner: Owner<FsStore>,
    /// What was done once and for all.
    pub done: Done,
}

/// Why a replica could not be brought up. Tried again; nothing was created or changed that matters.
#[derive(Debug, thiserror::Error)]
pub enum OpeningError {
    /// Its directory.
    #[error(transparent)]
    Dir(#[from] SuperblockError),
    /// Its disk.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// Its engine.
    #[error(transparent)]
    Engine(#[from] OpenError),
    /// Its store.
    #[error("cannot open the log store in {path}: {source}")]
    Store {
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The state directory is stacked on a MARS device, or cannot be examined.
    #[error(transparent)]
    Stacked(#[from] PoolError),
    /// A small file.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// It was deleted here.
    #[error(
        "replica {0} was deleted on this node and does not come back: remove this MarsReplica, a new member gets a new uuid"
    )]
    Buried(String),
}

impl OpeningError {
    /// As a word and a text for conditions.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let reason = match self {
            OpeningError::Dir(SuperblockError::Missing { .. })
            | OpeningError::Engine(OpenError::DataMissing { .. })
            | OpeningError::Backing(BackingError::DataMissing { .. }) => "DataMissing",
            OpeningError::Backing(BackingError::Pool(PoolError::Absent { .. })) => "PoolAbsent",
            OpeningError::Dir(SuperblockError::Layout(LayoutError::Locked { .. })) => "Locked",
            OpeningError::Backing(BackingError::InUse { .. }) => "DiskInUse",
            OpeningError::Backing(BackingError::ForeignSignature { .. }) => "ForeignSignature",
            OpeningError::Backing(BackingError::Recorded { .. } | BackingError::RecordsUnreadable { .. }) => {
                "DiskOfAnother"
            }
            OpeningError::Backing(BackingError::TooSmall { .. }) => "DiskTooSmall",
            OpeningError::Buried(_) => "Deleted",
            _ => "Refused",
        };
        Problem {
            reason,
            message: self.to_string(),
        }
    }
}

/// Opens a known replica, or makes a new one.
///
/// # Errors
/// See [`OpeningError`].
pub fn open(node: &NodeContext, todo: &Todo) -> Result<Opened, OpeningError> {
    if node.cache.is_buried(todo.replica) {
        return Err(OpeningError::Buried(todo.replica.to_string()));
    }
    let mars = MarsDevices::scan(&node.layout.dev_dir);
    mars.refuse_stacked(&node.layout.state_dir)?;
    let belongs = Belongs {
        cluster: node.cluster,
        node: node.node,
        resource: todo.resource_id,
        replica: todo.replica,
    };
    let path = node.layout.replica_dir(todo.replica.0);
    let mut dir = ReplicaDir::open(&path, belongs, &todo.resource, todo.size_bytes, todo.established)?;
    let fresh = dir.superblock.stage == Stage::Fresh;
    let done = read_done(&path)?;
    // Whoever uses a detached disk meanwhile goes on; it is taken back when that is wished, after a check.
    let backing = match &done.detached {
        Some(_) => None,
        None if fresh => Some(claim_fresh(node, todo, &mut dir, &mars)?),
        None => Some(claim_known(node, todo, &dir, &mars)?),
    };
    let store_error = |source| OpeningError::Store {
        path: path.clone(),
        source,
    };
    if fresh {
        FsStore::create_layout(&path).map_err(store_error)?;
    }
    let store = match &backing {
        Some(backing) => backing.open().and_then(|data| FsStore::open(&path, data)),
        None => FsStore::open_detached(&path, done.detached.as_ref().map_or(0, |detached| detached.disk_bytes)),
    };
    let store = store.map_err(store_error)?;
    let params = OpenParams {
        cluster: node.cluster,
        resource: todo.resource_id,
        replica: todo.replica,
        boot_id: node.boot.0,
        create: fresh.then_some(todo.size_bytes),
        tuning: todo.tuning,
        seed: rand::random(),
    };
    let mut owner = Owner::open(store.clone(), params, now())?;
    owner.share_clock(node.clock.engine(), now());
    if fresh {
        dir.update(|superblock| superblock.stage = Stage::Established)?;
    }
    Ok(Opened {
        dir,
        backing,
        store,
        owner,
        done,
    })
}

fn claim_fresh(
    node: &NodeContext,
    todo: &Todo,
    dir: &mut ReplicaDir,
    mars: &MarsDevices,
) -> Result<Backing, OpeningError> {
    if let BackingWish::Device(path) = &todo.backing {
        inventory::refuse_recorded(&node.layout.replicas_dir(), todo.replica, path)?;
    }
    let request = FreshRequest {
        wish: &todo.backing,
        replica: todo.replica,
        size_bytes: todo.size_bytes,
        overwrite: todo.overwrite,
    };
    let backing = backing::claim_fresh(request, &mut node.pools(), mars)?;
    dir.start_over()?;
    dir.update(|superblock| {
        superblock.size_bytes = todo.size_bytes;
        superblock.backing = Some(backing.record.clone());
    })?;
    Ok(backing)
}

/// Claims the data disk of a replica that had let go of it.
///
/// # Errors
/// It is missing, another one, in use, or too small.
pub fn claim_again(node: &NodeContext, todo: &Todo, dir: &ReplicaDir) -> Result<Backing, OpeningError> {
    claim_known(node, todo, dir, &MarsDevices::scan(&node.layout.dev_dir))
}

fn claim_known(node: &NodeContext, todo: &Todo, dir: &ReplicaDir, mars: &MarsDevices) -> Result<Backing, OpeningError> {
    let superblock = &dir.superblock;
    let Some(record) = &superblock.backing else {
        let path = dir.path.join(super::superblock::FILE);
        return Err(SuperblockError::Unreadable {
            path,
            reason: "established, but without a data disk".into(),
        }
        .into());
    };
    record.check_wish(&todo.backing)?;
    Ok(backing::claim_known(
        record,
        superblock.size_bytes,
        &mut node.pools(),
        mars,
    )?)
}

fn done_path(dir: &Path) -> PathBuf {
    dir.join("done.json")
}

/// What was done once and for all; nothing when nothing was.
///
/// # Errors
/// It cannot be read.
pub(super) fn read_done(dir: &Path) -> Result<Done, LayoutError> {
    let path = done_path(dir);
    match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| io_error("parse", &path)(io::Error::new(io::ErrorKind::InvalidData, error))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Done::default()),
        Err(error) => Err(io_error("read", &path)(error)),
    }
}

/// Persists what was done once and for all.
///
/// # Errors
/// It cannot be written: then it does not count as done.
pub fn write_done(dir: &Path, done: &Done) -> Result<(), LayoutError> {
    let path = done_path(dir);
    let json = serde_json::to_vec_pretty(done).map_err(|error| io_error("encode", &path)(io::Error::other(error)))?;
    layout::write_atomically(&path, &json)
}
