//! What the engine needs of the machine: files it can write, sync, create and remove. Nothing else.
//!
//! The same engine runs on real files (`store_fs`) and on the simulated disk
//! (`store_sim`), where process death and power loss are different events.
//!
//! Invariant: the engine assumes nothing durable that was not covered by a `sync` (file contents) or a `sync_dir`
//! (existence of files) that returned `Ok` after the change, and believes no retry of a `sync` that failed once.

use std::fmt;
use std::io;

/// Every file of a replica, by purpose.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileId {
    /// The data disk: a block device, or a file in a directory pool.
    Data,
    /// Saved state, slot 0 or 1.
    Slot(u8),
    /// One transaction log segment, `log-<9 digits>-<origin>`.
    Segment(SegmentName),
    /// A file that was this segment and waits to become another one. No part of the log, whatever is in it.
    Spare(SegmentName),
    /// Extents touched by a segment, kept longer than the segment itself.
    Summary(SegmentName),
}

/// Name of a segment: its number in the local log and the first 8 hex digits of the incarnation that wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentName {
    /// Counts up within one local log; gaps are allowed, order is not negotiable.
    pub number: u32,
    /// First 8 hexadecimal digits of the writing incarnation, as a number.
    pub origin: u32,
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "log-{:09}-{:08x}", self.number, self.origin)
    }
}

/// An open file. Cloning shares the open file; all methods may be called from any thread.
pub trait StoreFile: Clone + fmt::Debug + Send + Sync + 'static {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Any I/O error; `UnexpectedEof` when the file is shorter.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `parts`, one behind the other, at `offset`. After `Ok` the bytes survive the death of the process.
    ///
    /// # Errors
    /// Any I/O error; how much was written is then unknown.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Makes a range read as zeros, cheaply where the file system can.
    ///
    /// # Errors
    /// Any I/O error.
    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Makes all completed writes durable (fdatasync).
    ///
    /// # Errors
    /// Any I/O error: then nothing written since the last success may be believed durable, ever.
    fn sync(&self) -> io::Result<()>;
    /// Current length in bytes.
    ///
    /// # Errors
    /// Any I/O error.
    fn size(&self) -> io::Result<u64>;
    /// The next range at or after `from` that may hold something other than zeros (`SEEK_DATA`/`SEEK_HOLE`); `None`
    /// when only holes follow. A store that cannot tell returns everything as one range.
    ///
    /// # Errors
    /// Any I/O error.
    fn next_data(&self, from: u64) -> io::Result<Option<crate::types::ByteRange>>;
}

/// The directory of one replica, and its data disk.
pub trait Store: Clone + Send + Sync + 'static {
    /// An open file of this store.
    type File: StoreFile;
    /// Creates a file of `len` zero bytes with all blocks written (so that a later sync needs no journal commit),
    /// syncs it, and syncs the directory. Refuses to replace an existing file. Never used for [`FileId::Data`].
    ///
    /// # Errors
    /// `AlreadyExists`, `StorageFull`, or any I/O error.
    fn create(&self, id: &FileId, len: u64) -> io::Result<Self::File>;
    /// Opens an existing file.
    ///
    /// # Errors
    /// `NotFound` or any I/O error.
    fn open(&self, id: &FileId) -> io::Result<Self::File>;
    /// Opens an existing file that nobody else has open, in this process or another; `None` while somebody has, or when that
    /// cannot be known.
    ///
    /// # Errors
    /// `NotFound` or any I/O error.
    fn open_alone(&self, id: &FileId) -> io::Result<Option<Self::File>>;
    /// Gives a log file another name; durable after the next `sync_dir`. Refuses to replace an existing file. Open files stay open. Never
    /// used for [`FileId::Data`].
    ///
    /// # Errors
    /// `NotFound`, `AlreadyExists`, or any I/O error.
    fn rename(&self, from: &FileId, to: &FileId) -> io::Result<()>;
    /// Removes a log, summary or slot file; durable after the next `sync_dir`. Never used for [`FileId::Data`].
    ///
    /// # Errors
    /// Any I/O error; a file that is not there is no error.
    fn remove(&self, id: &FileId) -> io::Result<()>;
    /// All segments, spares and summaries that exist, in no particular order.
    ///
    /// # Errors
    /// Any I/O error.
    fn list(&self) -> io::Result<Vec<FileId>>;
    /// Makes creations, removals and new names durable.
    ///
    /// # Errors
    /// Any I/O error.
    fn sync_dir(&self) -> io::Result<()>;
    /// Free bytes of the log store.
    ///
    /// # Errors
    /// Any I/O error.
    fn free_bytes(&self) -> io::Result<u64>;
}
