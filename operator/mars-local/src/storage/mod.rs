//! The object store: current state in memory, each object in a file of its own, and a bounded history of changes.
//!
//! Invariants:
//! - Revisions only grow, also across restarts and deletions (the disk keeps a ceiling that is never reused).
//! - A change is on stable storage before anybody can read or watch it.
//! - Readers never wait for the disk: writers are serialised by one lock, readers take another.
//! - History is bounded; a position that has fallen out of it is reported as compacted, never as "no changes".

mod disk;

pub use disk::DiskError;

use disk::Disk;
use serde_json::Value;
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio::sync::watch;

/// Changes kept for watchers that resume and for lists at an older revision.
pub const DEFAULT_HISTORY: usize = 20_000;

/// Where an object lives. Ordered as lists are: kind, namespace, name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// `<group>/<plural>` of the storage kind; the core group is `core`.
    pub kind: Arc<str>,
    /// Namespace, empty for cluster-scoped kinds.
    pub namespace: Arc<str>,
    /// Object name.
    pub name: Arc<str>,
}

/// One stored version of an object. `value` carries the same revision as `metadata.resourceVersion`.
#[derive(Debug, PartialEq)]
pub struct Object {
    /// Revision of the change that made this version.
    pub revision: u64,
    /// The object.
    pub value: Value,
}

/// One change, as history keeps it.
#[derive(Debug)]
pub struct Event {
    /// Revision of the change.
    pub revision: u64,
    /// What changed.
    pub key: Key,
    /// The version before, none if the object was created.
    pub before: Option<Arc<Object>>,
    /// The version after; for a deletion the last state, with the revision of the deletion.
    pub object: Arc<Object>,
    /// Whether the object is gone.
    pub deleted: bool,
}

/// What a transaction wants done.
#[derive(Debug)]
pub enum Decision {
    /// Nothing changes.
    Keep,
    /// The object gets this value.
    Put(Value),
    /// The object goes; this was its last state.
    Remove(Value),
}

/// What a transaction did.
#[derive(Clone, Debug)]
pub enum Committed {
    /// Nothing changed; the current version, if there is one.
    Unchanged(Option<Arc<Object>>),
    /// The new version.
    Stored(Arc<Object>),
    /// The last state of the object that is gone.
    Removed(Arc<Object>),
}

/// The wanted revision is older than the history reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("revision {wanted} is older than the history, which begins after {oldest}")]
pub struct Compacted {
    /// The revision asked for.
    pub wanted: u64,
    /// The oldest revision changes can be listed from.
    pub oldest: u64,
}

struct State {
    objects: BTreeMap<Key, Arc<Object>>,
    history: VecDeque<Arc<Event>>,
    /// Newest revision that is NOT in the history any more.
    compacted: u64,
    revision: u64,
}

/// The store. Cheap to share; see the module for its invariants.
pub struct Store {
    state: RwLock<State>,
    disk: Mutex<Disk>,
    history_limit: usize,
    revisions: watch::Sender<u64>,
}

impl Store {
    /// Opens the store in `dir` (made if absent), with the default history.
    ///
    /// # Errors
    /// The directory is in use, not usable, or a file in it is damaged: the error names every such file.
    pub fn open(dir: &Path) -> Result<Self, DiskError> {
        Self::open_with_history(dir, DEFAULT_HISTORY)
    }

    /// Opens the store with a history of at most `history_limit` changes.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_history(dir: &Path, history_limit: usize) -> Result<Self, DiskError> {
        let (disk, objects) = Disk::open(dir)?;
        let revision = disk.first_revision();
        let state = State {
            objects,
            history: VecDeque::new(),
            compacted: revision,
            revision,
        };
        let revisions = watch::Sender::new(revision);
        Ok(Self {
            state: RwLock::new(state),
            disk: Mutex::new(disk),
            history_limit,
            revisions,
        })
    }

    /// Revision of the newest change.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.read().revision
    }

    /// Tells about each new revision.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.revisions.subscribe()
    }

    /// The current version of an object.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Arc<Object>> {
        self.read().objects.get(key).cloned()
    }

    /// All objects of a kind (in one namespace, if given) in order, and the revision of this picture.
    #[must_use]
    pub fn list(&self, kind: &str, namespace: Option<&str>) -> (Vec<Arc<Object>>, u64) {
        let state = self.read();
        let list = range(&state.objects, kind, namespace)
            .map(|(_, object)| Arc::clone(object))
            .collect();
        (list, state.revision)
    }

    /// Every stored object; for owner look-ups.
    #[must_use]
    pub fn all(&self) -> Vec<(Key, Arc<Object>)> {
        self.read()
            .objects
            .iter()
            .map(|(k, o)| (k.clone(), Arc::clone(o)))
            .collect()
    }

    /// The objects of a kind as they were at `revision`, by undoing what history has since then.
    ///
    /// # Errors
    /// [`Compacted`] if history does not reach back that far.
    pub fn list_at(&self, kind: &str, namespace: Option<&str>, revision: u64) -> Result<Vec<Arc<Object>>, Compacted> {
        let state = self.read();
        let mut objects: BTreeMap<Key, Arc<Object>> = range(&state.objects, kind, namespace)
            .map(|(k, o)| (k.clone(), Arc::clone(o)))
            .collect();
        for event in state.since(revision)?.rev() {
            if !matches(&event.key, kind, namespace) {
                continue;
            }
            match &event.before {
                Some(before) => objects.insert(event.key.clone(), Arc::clone(before)),
                None => objects.remove(&event.key),
            };
        }
        Ok(objects.into_values().collect())
    }

    /// At most `limit` changes of a kind after `revision`, and the revision up to which this answer is complete.
    ///
    /// # Errors
    /// [`Compacted`] if history does not reach back that far.
    pub fn changes(
        &self,
        kind: &str,
        namespace: Option<&str>,
        revision: u64,
        limit: usize,
    ) -> Result<(Vec<Arc<Event>>, u64), Compacted> {
        let state = self.read();
        let mut found = Vec::new();
        for event in state.since(revision)? {
            if matches(&event.key, kind, namespace) {
                found.push(Arc::clone(event));
                if found.len() == limit {
                    return Ok((found, event.revision));
                }
            }
        }
        Ok((found, state.revision))
    }

    /// Forgets the history, as the real API server's compaction does: older positions answer [`Compacted`].
    pub fn compact(&self) {
        let mut state = self.write();
        state.history.clear();
        state.compacted = state.revision;
    }

    /// Decides on the current version and stores the outcome, alone among writers. Blocks on the disk.
    ///
    /// # Errors
    /// What `decide` returns, or a [`DiskError`]: then nothing has changed for readers, and if it is unknown what the
    /// disk holds, all later writes are refused too.
    pub fn transact<E: From<DiskError>>(
        &self,
        key: &Key,
        decide: impl FnOnce(Option<&Arc<Object>>) -> Result<Decision, E>,
    ) -> Result<Committed, E> {
        let mut disk = self.lock_disk();
        let before = self.get(key);
        let (mut value, deleted) = match decide(before.as_ref())? {
            Decision::Keep => return Ok(Committed::Unchanged(before)),
            Decision::Put(value) => (value, false),
            Decision::Remove(value) => (value, true),
        };
        let revision = disk.next_revision(self.revision())?;
        crate::meta::set(&mut value, "resourceVersion", Some(revision.to_string().into()));
        let object = Arc::new(Object { revision, value });
        if deleted {
            disk.remove(key)?;
        } else {
            disk.put(key, &object.value)?;
        }
        let event = Arc::new(Event {
            revision,
            key: key.clone(),
            before,
            object: Arc::clone(&object),
            deleted,
        });
        self.publish(event);
        Ok(if deleted {
            Committed::Removed(object)
        } else {
            Committed::Stored(object)
        })
    }

    fn publish(&self, event: Arc<Event>) {
        let revision = event.revision;
        let mut state = self.write();
        if event.deleted {
            state.objects.remove(&event.key);
        } else {
            state.objects.insert(event.key.clone(), Arc::clone(&event.object));
        }
        state.revision = revision;
        state.history.push_back(event);
        while state.history.len() > self.history_limit {
            if let Some(old) = state.history.pop_front() {
                state.compacted = old.revision;
            }
        }
        drop(state);
        self.revisions.send_replace(revision);
    }

    // A panic while a lock is held cannot leave these half-changed: all changes are single inserts made after the
    // disk has the object, so the state behind a poisoned lock is good.
    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Events after `revision`, oldest first.
    fn since(&self, revision: u64) -> Result<impl DoubleEndedIterator<Item = &Arc<Event>>, Compacted> {
        if revision < self.compacted {
            return Err(Compacted {
                wanted: revision,
                oldest: self.compacted,
            });
        }
        let first = self.history.partition_point(|event| event.revision <= revision);
        Ok(self.history.range(first..))
    }
}

fn matches(key: &Key, kind: &str, namespace: Option<&str>) -> bool {
    *key.kind == *kind && namespace.is_none_or(|ns| *key.namespace == *ns)
}

fn range<'a>(
    objects: &'a BTreeMap<Key, Arc<Object>>,
    kind: &'a str,
    namespace: Option<&'a str>,
) -> impl Iterator<Item = (&'a Key, &'a Arc<Object>)> {
    let first = Key {
        kind: kind.into(),
        namespace: namespace.unwrap_or_default().into(),
        name: Arc::from(""),
    };
    objects
        .range(first..)
        .take_while(move |(key, _)| matches(key, kind, namespace))
}

#[cfg(test)]
mod tests;
