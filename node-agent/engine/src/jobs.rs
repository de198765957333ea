//! Slow work as data: what an owner cannot do inline leaves as a [`Job`] and comes back as a [`JobOutcome`].
//!
//! Invariant: a job holds all it needs; it reads nothing of its owner and changes nothing but the files it names. A job is run at
//! most once; one that is lost with its process is made up for by recovery.

use crate::overlay::{Content, Piece};
use crate::store::{FileId, Store, StoreFile};
use crate::types::ByteRange;
use crate::writeback::Extent;
use bytes::{Bytes, BytesMut};
use std::io;

/// Work for the pool.
#[derive(Debug)]
pub enum Job<F> {
    /// Make all completed writes to these files durable.
    Sync(Vec<F>),
    /// Create a file of zeros.
    Create {
        /// Which.
        id: FileId,
        /// How long (bytes).
        len: u64,
    },
    /// Remove files, durably.
    Remove(Vec<FileId>),
    /// Read a range of the data disk, with newer parts laid over it.
    Read {
        /// The data disk.
        file: F,
        /// What to read.
        range: ByteRange,
        /// Parts that are newer than the disk.
        hits: Vec<Piece>,
        /// Parts that the disk knows.
        gaps: Vec<ByteRange>,
    },
    /// Write to the data disk.
    Write {
        /// The data disk.
        file: F,
        /// What, in this order.
        extents: Vec<Extent>,
        /// Flush the disk afterwards.
        flush: bool,
    },
    /// Ask for the length of the data disk.
    Size(F),
}

/// What came of it.
#[derive(Debug)]
pub enum JobOutcome<F> {
    /// Of jobs that only succeed or fail.
    Done(io::Result<()>),
    /// A created file.
    File(io::Result<F>),
    /// Bytes read.
    Data(io::Result<Bytes>),
    /// A length (bytes).
    Size(io::Result<u64>),
}

/// Does a job, on any thread; blocks for as long as the disk takes.
pub fn run_job<S: Store>(store: &S, job: Job<S::File>) -> JobOutcome<S::File> {
    match job {
        Job::Sync(files) => JobOutcome::Done(files.iter().try_for_each(StoreFile::sync)),
        Job::Create { id, len } => JobOutcome::File(store.create(&id, len)),
        Job::Remove(ids) => JobOutcome::Done(
            ids.iter()
                .try_for_each(|id| store.remove(id))
                .and_then(|()| store.sync_dir()),
        ),
        Job::Read {
            file,
            range,
            hits,
            gaps,
        } => JobOutcome::Data(read(&file, range, &hits, &gaps)),
        Job::Write { file, extents, flush } => JobOutcome::Done(write(&file, &extents, flush)),
        Job::Size(file) => JobOutcome::Size(file.size()),
    }
}

/// Puts together a read from disk and newer parts.
///
/// # Errors
/// Any error of the disk.
fn read<F: StoreFile>(file: &F, range: ByteRange, hits: &[Piece], gaps: &[ByteRange]) -> io::Result<Bytes> {
    let mut buffer = BytesMut::zeroed(in_memory(range.len));
    for gap in gaps {
        let from = in_memory(gap.offset - range.offset);
        file.read_at(&mut buffer[from..from + in_memory(gap.len)], gap.offset)?;
    }
    lay_over(&mut buffer, range.offset, hits);
    Ok(buffer.freeze())
}

/// Lays `hits` over `buffer`, which begins at device offset `start`. Zeros need no copy: the buffer began as zeros.
pub fn lay_over(buffer: &mut [u8], start: u64, hits: &[Piece]) {
    for piece in hits {
        let from = in_memory(piece.range.offset - start);
        match &piece.content {
            Content::Bytes(bytes) => buffer[from..from + bytes.len()].copy_from_slice(bytes),
            Content::Zeros => buffer[from..from + in_memory(piece.range.len)].fill(0),
        }
    }
}

fn write<F: StoreFile>(file: &F, extents: &[Extent], flush: bool) -> io::Result<()> {
    for extent in extents {
        match extent {
            Extent::Bytes { offset, parts } => {
                let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
                file.write_at(&parts, *offset)?;
            }
            Extent::Zeros(range) => file.zero_range(range.offset, range.len)?,
        }
    }
    if flush { file.sync() } else { Ok(()) }
}

/// A length that was checked against the size of a request or buffer before.
fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("requests and buffers fit in memory")
}
