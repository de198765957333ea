//! Objects on disk: `<dir>/objects/<group>/<plural>/<namespace or _>/<name>.json`, and `<dir>/revision`.
//!
//! Invariants:
//! - A file is written aside, synced, renamed over the old one, and its directory synced: a torn write leaves the old
//!   version of this object and touches no other.
//! - A file's first line carries a digest of the rest. A file that does not fit it is an error that names the file; it is
//!   never skipped, because a silently missing object reads as "deleted".
//! - No revision is ever given out above the ceiling in `<dir>/revision`; after a restart numbering goes on above it.

use super::{Key, Object};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// First words of each file; the number is the format's version.
const MAGIC: &str = "mars-local/1";
/// Revisions reserved by one write of the ceiling.
const RESERVE: u64 = 1_000;
/// Directory name of the empty namespace. Not a valid namespace, so it cannot clash.
const CLUSTER_SCOPED: &str = "_";
/// Names longer than this are shortened in file names (255 bytes with suffix is the limit of most file systems).
const LONGEST_FILE_STEM: usize = 200;

/// Why objects cannot be loaded or stored.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// An operating system error, with what was being done to which file.
    #[error("{doing} {path}: {source}; free space, permissions and the file system's health decide whether to retry")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another process has the directory.
    #[error("{0} is in use by another mars-local; end it (mars-local down) or choose another --state directory")]
    InUse(PathBuf),
    /// Files whose content does not fit their digest, name or place.
    #[error(
        "damaged API objects, nothing was started: {}; restore these files from a backup, or move them away to go on without them",
        .0.join("; ")
    )]
    Damaged(Vec<String>),
    /// An earlier write failed half-way, so nothing more is written.
    #[error(
        "the object store refuses writes since an earlier failure ({0}); restart mars-local to read back what the disk holds"
    )]
    Poisoned(String),
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { doing, path, source }
}

/// The directory, its lock, and the revision numbers reserved in it.
pub(super) struct Disk {
    dir: PathBuf,
    /// Revisions up to here may be given out.
    ceiling: u64,
    /// Revision the store starts with after opening.
    first: u64,
    poisoned: Option<String>,
    /// Holds the flock for as long as the store lives.
    _lock: File,
}

impl Disk {
    pub(super) fn open(dir: &Path) -> Result<(Self, BTreeMap<Key, Arc<Object>>), DiskError> {
        let objects_dir = dir.join("objects");
        fs::create_dir_all(&objects_dir).map_err(io_error("making directory", &objects_dir))?;
        let lock_path = dir.join("lock");
        let lock = File::create(&lock_path).map_err(io_error("creating", &lock_path))?;
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| DiskError::InUse(dir.to_owned()))?;
        let mut load = Load::default();
        load.directory(&objects_dir, &mut Vec::new())?;
        let ceiling = read_ceiling(&dir.join("revision"), &mut load.damaged)?;
        if !load.damaged.is_empty() {
            return Err(DiskError::Damaged(load.damaged));
        }
        let highest = load.objects.values().map(|o| o.revision).max().unwrap_or(0);
        // Without a ceiling the highest stored revision is all that is known; deletions after it may have used more.
        let first = ceiling
            .unwrap_or(if highest == 0 { 1 } else { highest + 10 * RESERVE })
            .max(highest);
        let mut disk = Self {
            dir: dir.to_owned(),
            ceiling: first,
            first,
            poisoned: None,
            _lock: lock,
        };
        disk.reserve(first)?;
        Ok((disk, load.objects))
    }

    pub(super) fn first_revision(&self) -> u64 {
        self.first
    }

    /// The number after `current`, reserved on disk.
    pub(super) fn next_revision(&mut self, current: u64) -> Result<u64, DiskError> {
        if let Some(why) = &self.poisoned {
            return Err(DiskError::Poisoned(why.clone()));
        }
        let next = current + 1;
        if next > self.ceiling {
            self.reserve(next)?;
        }
        Ok(next)
    }

    fn reserve(&mut self, from: u64) -> Result<(), DiskError> {
        let ceiling = from + RESERVE;
        replace(&self.dir.join("revision"), format!("{ceiling}\n").as_bytes())?;
        self.ceiling = ceiling;
        Ok(())
    }

    pub(super) fn put(&mut self, key: &Key, value: &Value) -> Result<(), DiskError> {
        let path = self.path(key);
        let parent = path.parent().unwrap_or(&self.dir);
        if !parent.is_dir() {
            make_dirs(parent)?;
        }
        let outcome = replace(&path, value.to_string().as_bytes());
        self.note(outcome)
    }

    pub(super) fn remove(&mut self, key: &Key) -> Result<(), DiskError> {
        let path = self.path(key);
        let outcome = fs::remove_file(&path)
            .map_err(io_error("removing", &path))
            .and_then(|()| sync_parent(&path));
        self.note(outcome)
    }

    /// After a failed write it is unknown which version a restart would find, so no other write may build on it.
    fn note(&mut self, outcome: Result<(), DiskError>) -> Result<(), DiskError> {
        if let Err(error) = &outcome {
            self.poisoned = Some(error.to_string());
        }
        outcome
    }

    fn path(&self, key: &Key) -> PathBuf {
        let namespace = if key.namespace.is_empty() {
            CLUSTER_SCOPED
        } else {
            &key.namespace
        };
        self.dir
            .join("objects")
            .join(&*key.kind)
            .join(namespace)
            .join(file_name(&key.name))
    }
}

fn file_name(name: &str) -> String {
    if name.len() <= LONGEST_FILE_STEM {
        return format!("{name}.json");
    }
    let stem: String = name.chars().take(150).collect();
    let digest = blake3::hash(name.as_bytes()).to_hex();
    format!("{stem}~{}.json", &digest[..32])
}

/// Makes directories and syncs the parents of those that are new.
fn make_dirs(dir: &Path) -> Result<(), DiskError> {
    if let Some(parent) = dir.parent().filter(|p| !p.is_dir()) {
        make_dirs(parent)?;
    }
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(io_error("making directory", dir)(e)),
        _ => sync_parent(dir),
    }
}

fn sync_parent(path: &Path) -> Result<(), DiskError> {
    let parent = path.parent().unwrap_or(Path::new("."));
    File::open(parent)
        .and_then(|d| d.sync_all())
        .map_err(io_error("syncing directory", parent))
}

/// Replaces `path` by a file with a digest line and `content`, durably and at once.
fn replace(path: &Path, content: &[u8]) -> Result<(), DiskError> {
    let aside = path.with_extension("new");
    let digest = blake3::hash(content).to_hex();
    let write = || -> io::Result<()> {
        let mut file = File::create(&aside)?;
        writeln!(file, "{MAGIC} {digest}")?;
        file.write_all(content)?;
        file.sync_all()
    };
    write().map_err(io_error("writing", &aside))?;
    fs::rename(&aside, path).map_err(io_error("renaming to", path))?;
    sync_parent(path)
}

/// The content of a file made by [`replace`], or what is wrong with it.
fn verified(path: &Path) -> Result<Result<Vec<u8>, String>, DiskError> {
    let raw = fs::read(path).map_err(io_error("reading", path))?;
    let Some(end) = raw.iter().position(|b| *b == b'\n') else {
        return Ok(Err(format!("{}: no first line", path.display())));
    };
    let (head, content) = (String::from_utf8_lossy(&raw[..end]).into_owned(), &raw[end + 1..]);
    let expected = format!("{MAGIC} {}", blake3::hash(content).to_hex());
    if head == expected {
        return Ok(Ok(content.to_vec()));
    }
    let why = match head.split_once(' ') {
        Some((MAGIC, _)) => "content does not fit its digest".to_owned(),
        Some((other, _)) if other.starts_with("mars-local/") => {
            format!("format {other} is not known here (this is {MAGIC}); use the newer mars-local that wrote it")
        }
        _ => "not a file of mars-local".to_owned(),
    };
    Ok(Err(format!("{}: {why}", path.display())))
}

fn read_ceiling(path: &Path, damaged: &mut Vec<String>) -> Result<Option<u64>, DiskError> {
    if !path.exists() {
        return Ok(None);
    }
    match verified(path)? {
        Ok(content) => match std::str::from_utf8(&content).ok().and_then(|t| t.trim().parse().ok()) {
            Some(ceiling) => return Ok(Some(ceiling)),
            None => damaged.push(format!("{}: no number in it", path.display())),
        },
        Err(why) => damaged.push(why),
    }
    Ok(None)
}

#[derive(Default)]
struct Load {
    objects: BTreeMap<Key, Arc<Object>>,
    damaged: Vec<String>,
}

impl Load {
    /// Reads `<group>/<plural>/<namespace>/<file>` below `dir`; `above` holds the names walked so far.
    fn directory(&mut self, dir: &Path, above: &mut Vec<String>) -> Result<(), DiskError> {
        let entries = fs::read_dir(dir).map_err(io_error("listing", dir))?;
        for entry in entries {
            let path = entry.map_err(io_error("listing", dir))?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match (above.len(), path.is_dir()) {
                (0..3, true) => {
                    above.push(name);
                    self.directory(&path, above)?;
                    above.pop();
                }
                // Left by a crash between writing aside and renaming: the old version is the valid one.
                (3, false) if path.extension().is_some_and(|e| e == "new") => {
                    fs::remove_file(&path).map_err(io_error("removing", &path))?;
                }
                (3, false) => self.file(&path, above)?,
                _ => self.damaged.push(format!("{}: does not belong here", path.display())),
            }
        }
        Ok(())
    }

    fn file(&mut self, path: &Path, above: &[String]) -> Result<(), DiskError> {
        let content = match verified(path)? {
            Ok(content) => content,
            Err(why) => {
                self.damaged.push(why);
                return Ok(());
            }
        };
        let Ok(value) = serde_json::from_slice::<Value>(&content) else {
            self.damaged.push(format!("{}: no JSON in it", path.display()));
            return Ok(());
        };
        let namespace = if above[2] == CLUSTER_SCOPED { "" } else { &above[2] };
        let name = crate::meta::name(&value);
        let revision = crate::meta::resource_version(&value).parse::<u64>().unwrap_or(0);
        let fits = crate::meta::namespace(&value) == namespace
            && revision > 0
            && path.file_name().is_some_and(|f| f.to_string_lossy() == file_name(name));
        if !fits {
            self.damaged
                .push(format!("{}: holds another object than its place says", path.display()));
            return Ok(());
        }
        let key = Key {
            kind: format!("{}/{}", above[0], above[1]).into(),
            namespace: namespace.into(),
            name: name.into(),
        };
        self.objects.insert(key, Arc::new(Object { revision, value }));
        Ok(())
    }
}
