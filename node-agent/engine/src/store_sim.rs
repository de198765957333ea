//! The simulated disk: a [`Store`] in memory on which processes die, power fails and media lie, all from one seed.
//!
//! # Fault model
//!
//! What the engine may rely on, and what this disk therefore keeps:
//! - After `sync` returned `Ok`, the bytes written to that file before it survive everything but injected corruption.
//! - After `sync_dir` returned `Ok`, files created or removed before it stay so.
//! - **Process death** ([`SimStore::crash_process`]) loses nothing that was written: the kernel has it. Open files of the
//!   dead process fail from then on. A write under way may have been done up to any page.
//! - **Power loss** ([`SimStore::power_loss`]) loses what was not synced: every dirty sector (512 bytes) on its own reaches the
//!   disk or not, in any order, whole or torn. A torn sector holds neither its old nor its new bytes. Creations,
//!   removals and file lengths that were not synced happen or not; a renamed file may be there under both names, or none.
//! - The kernel may write back a dirty page at any time: an older version of unsynced bytes may be what survives.
//! - **A failed `sync`** marks the dirty sectors clean without writing them. Reads still return them, the next `sync`
//!   succeeds, and they are gone at the next power loss: the behaviour of real kernels that makes retries worthless.
//! - Errors (EIO, ENOSPC), torn writes that fail, and bit flips strike at the n-th I/O or at the next I/O of a kind.
//!
//! Not modelled: sectors that decay without being written (use [`SimStore::flip_bit`]), writes to the wrong address,
//! and reordering between processes. Time costs nothing here.
//!
//! Invariant: the same seed and the same calls give the same disk, bit for bit.

mod disk;
mod inode;

pub use disk::{Injected, IoEvent, Op, Survival};

use crate::store::{FileId, Store, StoreFile};
use crate::types::ByteRange;
use disk::Disk;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A handle of one process generation to the simulated machine. Clones belong to the same process.
#[derive(Clone, Debug)]
pub struct SimStore {
    disk: Arc<Mutex<Disk>>,
    generation: u64,
}

/// An open file of a [`SimStore`].
#[derive(Clone, Debug)]
pub struct SimFile {
    store: SimStore,
    id: FileId,
    inode: u64,
    /// Keeps an unlinked inode alive while somebody has it open.
    _token: Arc<()>,
}

impl SimStore {
    /// A machine whose data disk has `data_bytes` zero bytes and whose log store holds `log_capacity_bytes`.
    #[must_use]
    pub fn new(seed: u64, data_bytes: u64, log_capacity_bytes: u64) -> Self {
        let disk = Disk::new(seed, data_bytes, log_capacity_bytes);
        Self {
            disk: Arc::new(Mutex::new(disk)),
            generation: 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The process dies: what it wrote stays, its handles fail. [`SimStore::restart`] starts the next one.
    pub fn crash_process(&self) {
        self.lock().kill_process();
    }

    /// The power fails: the process dies, and unsynced state survives according to `survival`.
    pub fn power_loss(&self, survival: Survival) {
        self.lock().power_loss(survival);
    }

    /// A handle for a new process; earlier ones, if any is alive, are killed first.
    #[must_use]
    pub fn restart(&self) -> Self {
        let generation = self.lock().next_generation();
        Self {
            disk: Arc::clone(&self.disk),
            generation,
        }
    }

    /// True once the process of this handle is dead (crashed by a hook, or replaced by a restart).
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.lock().is_dead(self.generation)
    }

    /// Number of I/Os done so far on this machine; the next one has this number.
    #[must_use]
    pub fn io_count(&self) -> u64 {
        self.lock().io_count()
    }

    /// The process dies in the middle of I/O number `io`; a write may be partly done.
    pub fn crash_at_io(&self, io: u64) {
        self.lock().crash_at(Some(io));
    }

    /// Takes back [`SimStore::crash_at_io`].
    pub fn never_crash(&self) {
        self.lock().crash_at(None);
    }

    /// I/O number `io` goes wrong in this way.
    pub fn inject_at_io(&self, io: u64, fault: Injected) {
        self.lock().inject_at(io, fault);
    }

    /// The next I/O of kind `op` (on `file`, when given) goes wrong in this way.
    pub fn inject_next(&self, op: Op, file: Option<FileId>, fault: Injected) {
        self.lock().inject_next(op, file, fault);
    }

    /// The next `sync` of any file fails, and with it everything dirty in that file is lost at the next power loss.
    pub fn fail_next_sync(&self) {
        self.inject_next(Op::Sync, None, Injected::Error(io::ErrorKind::Other));
    }

    /// Takes back all faults that have not struck yet.
    pub fn clear_faults(&self) {
        self.lock().clear_faults();
    }

    /// The data disk is enlarged to so many bytes, as by an administrator.
    pub fn grow_data(&self, bytes: u64) {
        self.lock().grow_data(bytes);
    }

    /// Changes the capacity of the log store (bytes); below what is used, every creation fails with `StorageFull`.
    pub fn set_log_capacity(&self, bytes: u64) {
        self.lock().set_log_capacity(bytes);
    }

    /// Most files, beside the data disk, that may be open at a time (`RLIMIT_NOFILE`).
    pub fn set_open_limit(&self, files: usize) {
        self.lock().set_open_limit(files);
    }

    /// Flips one bit of a file on the medium and in the cache: silent corruption.
    ///
    /// # Panics
    /// When the file does not exist or is shorter: a mistake in the test.
    pub fn flip_bit(&self, id: &FileId, bit: u64) {
        self.lock().flip_bit(id, bit);
    }

    /// Overwrites bytes of a file on the medium and in the cache, past all counting: for building test images.
    ///
    /// # Panics
    /// When the file does not exist or is shorter: a mistake in the test.
    pub fn poke(&self, id: &FileId, offset: u64, bytes: &[u8]) {
        self.lock().poke(id, offset, bytes);
    }

    /// Content of a file as a process sees it now; `None` when it does not exist. Not counted as I/O.
    #[must_use]
    pub fn peek(&self, id: &FileId) -> Option<Vec<u8>> {
        self.lock().image(id, false)
    }

    /// Content of a file that would survive a power loss with [`Survival::OnlySynced`]. Not counted as I/O.
    #[must_use]
    pub fn peek_durable(&self, id: &FileId) -> Option<Vec<u8>> {
        self.lock().image(id, true)
    }

    /// Starts to record every I/O (or stops and forgets).
    pub fn set_trace(&self, on: bool) {
        self.lock().set_trace(on);
    }

    /// What was recorded since the last call.
    #[must_use]
    pub fn take_trace(&self) -> Vec<IoEvent> {
        self.lock().take_trace()
    }

    /// A digest of everything on this machine: equal runs have equal digests.
    #[must_use]
    pub fn digest(&self) -> [u8; 32] {
        self.lock().digest()
    }

    fn file(&self, id: &FileId, inode: u64, token: Arc<()>) -> SimFile {
        SimFile {
            store: self.clone(),
            id: id.clone(),
            inode,
            _token: token,
        }
    }
}

impl Store for SimStore {
    type File = SimFile;

    fn create(&self, id: &FileId, len: u64) -> io::Result<SimFile> {
        assert!(*id != FileId::Data, "the data disk is never created by the engine");
        // Each step is an I/O of its own, as on a real file system, so that a crash can fall between any two.
        let (inode, token) = self.lock().create(self.generation, id)?;
        let mut filled = self.lock().fill_zeros(self.generation, id, inode, len);
        if filled.is_ok() {
            filled = self.lock().sync(self.generation, id, inode);
        }
        if let Err(error) = filled {
            self.lock().unlink_quietly(self.generation, id);
            return Err(error);
        }
        self.lock().sync_dir(self.generation)?;
        Ok(self.file(id, inode, token))
    }

    fn open(&self, id: &FileId) -> io::Result<SimFile> {
        let (inode, token) = self.lock().open(self.generation, id)?;
        Ok(self.file(id, inode, token))
    }

    fn open_alone(&self, id: &FileId) -> io::Result<Option<SimFile>> {
        let opened = self.lock().open_alone(self.generation, id)?;
        Ok(opened.map(|(inode, token)| self.file(id, inode, token)))
    }

    fn rename(&self, from: &FileId, to: &FileId) -> io::Result<()> {
        assert!(
            *from != FileId::Data && *to != FileId::Data,
            "the data disk is never renamed"
        );
        self.lock().rename(self.generation, from, to)
    }

    fn remove(&self, id: &FileId) -> io::Result<()> {
        assert!(*id != FileId::Data, "the data disk is never removed by the engine");
        self.lock().remove(self.generation, id)
    }

    fn list(&self) -> io::Result<Vec<FileId>> {
        self.lock().list(self.generation)
    }

    fn sync_dir(&self) -> io::Result<()> {
        self.lock().sync_dir(self.generation)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.lock().free_bytes(self.generation)
    }
}

impl StoreFile for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.store
            .lock()
            .read(self.store.generation, &self.id, self.inode, buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.store
            .lock()
            .write(self.store.generation, &self.id, self.inode, parts, offset)
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        self.store
            .lock()
            .zero(self.store.generation, &self.id, self.inode, ByteRange { offset, len })
    }

    fn sync(&self) -> io::Result<()> {
        self.store.lock().sync(self.store.generation, &self.id, self.inode)
    }

    fn size(&self) -> io::Result<u64> {
        self.store.lock().size(self.store.generation, self.inode)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.store.lock().next_data(self.store.generation, self.inode, from)
    }
}

#[cfg(test)]
mod tests;
