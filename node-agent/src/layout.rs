//! Where the agent keeps things, and the only ways it writes small files.
//!
//! ```text
//! <state-dir>/node/identity.json            who this node is (0600)
//! <state-dir>/node/lock                     held by the one agent of this state directory
//! <state-dir>/node/specs/<replica>.json     last MarsReplica seen, for restarts without an API server (0600)
//! <state-dir>/node/tombstones/<replica>.json   replicas whose deletion was carried out here
//! <state-dir>/replicas/<replica>/           one replica: superblock, slots, log segments
//! ```
//!
//! Invariant: the state directory itself is never created here. A missing one is a missing mount, not a new node.

use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use uuid::Uuid;

/// Paths of one agent.
#[derive(Debug, Clone)]
pub struct Layout {
    /// Durable state: identities, logs, saved state. Must exist.
    pub state_dir: PathBuf,
    /// Sockets; made at start.
    pub run_dir: PathBuf,
    /// Device links; made at start.
    pub dev_dir: PathBuf,
}

/// Why the directories cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// The state directory, or the part of it that must be there, is not.
    #[error(
        "{path} is missing: it holds this node's identity and logs, and is never recreated by the agent. \
         Mount it (or, on a new node, create the empty directory), then start again"
    )]
    Missing {
        /// What is missing.
        path: PathBuf,
    },
    /// Somebody else holds the lock.
    #[error(
        "{path} is locked by another process{holder}: only one agent may use it. Stop that one first \
         (a node agent that is still shutting down keeps the lock until its devices are safe)"
    )]
    Locked {
        /// The lock file or directory.
        path: PathBuf,
        /// ` (pid 123 name)`, when it could be found.
        holder: String,
    },
    /// Any other trouble with a file.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// Adds operation and path to an I/O error.
pub(crate) fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LayoutError {
    let path = path.to_path_buf();
    move |source| LayoutError::Io { what, path, source }
}

impl Layout {
    /// Directory of everything that belongs to the node rather than to one replica.
    #[must_use]
    pub fn node_dir(&self) -> PathBuf {
        self.state_dir.join("node")
    }

    /// Directory of all replicas.
    #[must_use]
    pub fn replicas_dir(&self) -> PathBuf {
        self.state_dir.join("replicas")
    }

    /// Directory of one replica.
    #[must_use]
    pub fn replica_dir(&self, replica: Uuid) -> PathBuf {
        self.replicas_dir().join(replica.to_string())
    }

    /// Cached specs.
    #[must_use]
    pub fn specs_dir(&self) -> PathBuf {
        self.node_dir().join("specs")
    }

    /// Records of deletions carried out.
    #[must_use]
    pub fn tombstones_dir(&self) -> PathBuf {
        self.node_dir().join("tombstones")
    }

    /// The local root-only socket.
    #[must_use]
    pub fn socket_path(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// Checks the state directory, makes what may be made on a first start, and takes the lock of the node.
    ///
    /// # Errors
    /// The state directory is missing, half of it is missing, or another agent holds it.
    pub fn prepare(&self) -> Result<DirLock, LayoutError> {
        if !self.state_dir.is_dir() {
            return Err(LayoutError::Missing {
                path: self.state_dir.clone(),
            });
        }
        let (node, replicas) = (self.node_dir(), self.replicas_dir());
        match (node.is_dir(), replicas.is_dir()) {
            (true, false) => return Err(LayoutError::Missing { path: replicas }),
            (false, true) if directory_has_entries(&replicas)? => return Err(LayoutError::Missing { path: node }),
            _ => {}
        }
        // `replicas` first: a crash in between must not look like a lost `replicas`.
        for dir in [&replicas, &node, &self.specs_dir(), &self.tombstones_dir()] {
            create_private_dir(dir)?;
        }
        for dir in [&self.run_dir, &self.dev_dir] {
            fs::create_dir_all(dir).map_err(io_error("create", dir))?;
        }
        sync_dir(&self.state_dir)?;
        DirLock::take(&node.join("lock"))
    }
}

fn directory_has_entries(dir: &Path) -> Result<bool, LayoutError> {
    Ok(fs::read_dir(dir).map_err(io_error("list", dir))?.next().is_some())
}

/// Creates a directory that only root may enter; an existing one is fine.
pub(crate) fn create_private_dir(dir: &Path) -> Result<(), LayoutError> {
    use std::os::unix::fs::DirBuilderExt;
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other.map_err(io_error("create", dir)),
    }
}

/// An exclusive flock, released when dropped or when the process dies.
#[derive(Debug)]
pub struct DirLock {
    _file: File,
}

impl DirLock {
    /// Locks `path`: a directory, or a file that is created when absent.
    ///
    /// # Errors
    /// Held by somebody else (who is named when that is possible), or not accessible.
    pub fn take(path: &Path) -> Result<DirLock, LayoutError> {
        let flags = if path.is_dir() {
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC
        } else {
            OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC
        };
        let file: File = rustix::fs::open(path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|errno| io_error("open", path)(errno.into()))?
            .into();
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(DirLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(LayoutError::Locked {
                path: path.to_path_buf(),
                holder: lock_holder(&file),
            }),
            Err(errno) => Err(io_error("lock", path)(errno.into())),
        }
    }
}

/// ` (pid N, name)` of whoever holds an flock on the file, from /proc/locks; empty when unknown.
fn lock_holder(file: &File) -> String {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = file.metadata() else {
        return String::new();
    };
    let Ok(locks) = fs::read_to_string("/proc/locks") else {
        return String::new();
    };
    let inode = format!(":{}", metadata.ino());
    locks
        .lines()
        .filter(|line| line.contains("FLOCK"))
        .find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let at = fields.iter().position(|field| field.ends_with(&inode))?;
            let pid = fields.get(at.checked_sub(1)?)?;
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            Some(format!(" (pid {pid}, {})", name.trim()))
        })
        .unwrap_or_default()
}

/// Replaces a small file as a whole, readable by root only: after `Ok` it is there after a power loss, and at no
/// moment is there half of it.
///
/// # Errors
/// Any I/O error; the old content is then still there.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<(), LayoutError> {
    let aside = path.with_extension("new");
    let write = |aside: &Path| -> io::Result<()> {
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(aside)?;
        file.write_all(content)?;
        file.sync_all()
    };
    write(&aside).map_err(io_error("write", &aside))?;
    fs::rename(&aside, path).map_err(io_error("replace", path))?;
    sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Makes the entries of a directory durable.
///
/// # Errors
/// Any I/O error.
pub fn sync_dir(dir: &Path) -> Result<(), LayoutError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("sync", dir))
}

/// Removes a file, durably; one that is not there is fine.
///
/// # Errors
/// Any other I/O error.
pub fn remove_durably(path: &Path) -> Result<(), LayoutError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(io_error("remove", path)(error)),
        Ok(()) => sync_dir(path.parent().unwrap_or(Path::new("/"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(root: &Path) -> Layout {
        Layout {
            state_dir: root.join("store"),
            run_dir: root.join("run"),
            dev_dir: root.join("dev"),
        }
    }

    #[test]
    fn a59_a_missing_state_directory_is_refused_and_not_created() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        assert!(matches!(layout.prepare(), Err(LayoutError::Missing { .. })));
        assert!(!layout.state_dir.exists());
    }

    #[test]
    fn a59_a_state_directory_that_lost_a_half_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        fs::create_dir(&layout.state_dir).unwrap();
        drop(layout.prepare().unwrap());
        fs::remove_dir(layout.replicas_dir()).unwrap();
        assert!(matches!(layout.prepare(), Err(LayoutError::Missing { path }) if path.ends_with("replicas")));
        fs::create_dir(layout.replicas_dir()).unwrap();
        fs::create_dir(layout.replicas_dir().join("x")).unwrap();
        fs::remove_dir_all(layout.node_dir()).unwrap();
        assert!(matches!(layout.prepare(), Err(LayoutError::Missing { path }) if path.ends_with("node")));
    }

    #[test]
    fn two_agents_cannot_share_a_state_directory() {
        let root = tempfile::tempdir().unwrap();
        let layout = layout(root.path());
        fs::create_dir(&layout.state_dir).unwrap();
        let first = layout.prepare().unwrap();
        let message = layout.prepare().unwrap_err().to_string();
        assert!(message.contains(&format!("pid {}", std::process::id())), "{message}");
        drop(first);
        layout.prepare().unwrap();
    }

    #[test]
    fn small_files_are_private_and_replaced_as_a_whole() {
        use std::os::unix::fs::PermissionsExt;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("file.json");
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
