//! Slow work as data: what an owner cannot do inline leaves as a [`Job`] and comes back as a [`JobOutcome`].
//!
//! Invariant: a job holds all it needs; it reads nothing of its owner and changes nothing but the files it names. A job is run at
//! most once; one that is lost with its process is made up for by recovery.

use crate::api::{LogView, SegmentView};
use crate::brick::Disk;
use crate::format::record::Record;
use crate::log::reader::{LogReader, Next, ReadError};
use crate::log::{Rewritten, TailRewrite};
use crate::overlay::{Content, Piece};
use crate::slot::SlotWrite;
use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::summary::{Summary, Touched};
use crate::types::{ByteRange, Position};
use crate::writeback::{Extent, MAX_EXTENT_BYTES};
use bytes::{Bytes, BytesMut};
use std::fmt;
use std::io;

/// What stands in front of the first batch of a segment (bytes): a whole block, so that none is read.
const FIRST_BATCH_BYTES: usize = 4096;
const _: () = assert!(FIRST_BATCH_BYTES as u64 == crate::format::segment::FIRST_BATCH_OFFSET);

/// Work for the pool.
#[derive(Debug)]
pub enum Job<F> {
    /// Make all completed writes to these files durable.
    Sync(Vec<F>),
    /// Create a file of zeros; of a segment, only the header need be zeros.
    Create {
        /// Which.
        id: FileId,
        /// How long (bytes).
        len: u64,
        /// Made from this spare, if nobody reads it any more. It is gone afterwards, whatever comes of it.
        spare: Option<SegmentName>,
    },
    /// Remove files, durably.
    Remove(Vec<FileId>),
    /// Read a range of the data disk, with newer parts laid over it.
    Read {
        /// The data disk.
        disk: Disk,
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
        disk: Disk,
        /// What, in this order.
        extents: Vec<Extent>,
        /// Flush the disk afterwards.
        flush: bool,
    },
    /// Read a range of the data disk and write it back as it is, holes apart: what memory wrongly calls clean becomes dirty again.
    Refresh {
        /// The data disk.
        disk: Disk,
        /// What to write again.
        range: ByteRange,
    },
    /// Ask for the length of the data disk.
    Size(Disk),
    /// Write a slot and sync it.
    SaveSlot(SlotWrite<F>),
    /// Put the tail of a poisoned log into new segments.
    Rewrite(TailRewrite),
    /// Read durable records of the local log.
    ReadLog {
        /// A reader that stands at `from`, left over from the job before.
        reader: Option<Box<dyn LogSource>>,
        /// The log.
        view: LogView,
        /// Where to begin.
        from: Position,
        /// Stop after about so many bytes of records.
        max_bytes: u64,
    },
    /// Write the summaries of the oldest segments, then remove these segments, and remove old summaries.
    Retire {
        /// The log as it was with these segments.
        view: LogView,
        /// How many of the oldest go.
        segments: usize,
        /// Those among them that become spares.
        spares: Vec<SegmentName>,
        /// Summaries that nobody needs any more.
        summaries: Vec<SegmentName>,
    },
}

/// A reader of the local log, whatever store it reads from.
pub trait LogSource: Send {
    /// See [`LogReader::next`].
    ///
    /// # Errors
    /// See [`ReadError`].
    fn next(&mut self, view: &LogView, max_bytes: u64) -> Result<Next, ReadError>;
}

impl<S: Store> LogSource for LogReader<S> {
    fn next(&mut self, view: &LogView, max_bytes: u64) -> Result<Next, ReadError> {
        LogReader::next(self, view, view.durable.lsn, max_bytes)
    }
}

impl fmt::Debug for dyn LogSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogSource")
    }
}

/// A run of the local log.
#[derive(Debug)]
pub struct LogRun {
    /// Records with the positions at which they end.
    pub records: Vec<(Record, Position)>,
    /// Stands behind the last of them.
    pub reader: Box<dyn LogSource>,
    /// Where that is, in the epoch that the reader has told of.
    pub at: Position,
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
    /// New segments for the tail.
    Rewritten(io::Result<Rewritten<F>>),
    /// Records.
    Log(Result<LogRun, ReadError>),
}

/// Does a job, on any thread; blocks for as long as the disk takes.
pub fn run_job<S: Store>(store: &S, job: Job<S::File>) -> JobOutcome<S::File> {
    match job {
        Job::Sync(files) => JobOutcome::Done(files.iter().try_for_each(StoreFile::sync)),
        Job::Create { id, len, spare } => JobOutcome::File(make(store, &id, len, spare)),
        Job::Remove(ids) => JobOutcome::Done(
            ids.iter()
                .try_for_each(|id| store.remove(id))
                .and_then(|()| store.sync_dir()),
        ),
        Job::Read {
            disk,
            range,
            hits,
            gaps,
        } => JobOutcome::Data(read(&disk, range, &hits, &gaps)),
        Job::Write { disk, extents, flush } => JobOutcome::Done(write(&disk, &extents, flush)),
        Job::Refresh { disk, range } => JobOutcome::Done(refresh(&disk, range)),
        Job::Size(disk) => JobOutcome::Size(disk.size()),
        Job::SaveSlot(write) => JobOutcome::Done(write.run()),
        Job::Rewrite(rewrite) => JobOutcome::Rewritten(rewrite.run(store)),
        Job::ReadLog {
            reader,
            view,
            from,
            max_bytes,
        } => JobOutcome::Log(read_log(store, reader, &view, from, max_bytes)),
        Job::Retire {
            view,
            segments,
            spares,
            summaries,
        } => JobOutcome::Done(retire(store, &view, segments, &spares, &summaries)),
    }
}

/// Puts together a read from disk and newer parts.
///
/// # Errors
/// Any error of the disk.
fn read(disk: &Disk, range: ByteRange, hits: &[Piece], gaps: &[ByteRange]) -> io::Result<Bytes> {
    let mut buffer = BytesMut::zeroed(in_memory(range.len));
    for gap in gaps {
        let from = in_memory(gap.offset - range.offset);
        disk.read_at(&mut buffer[from..from + in_memory(gap.len)], gap.offset)?;
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

fn write(disk: &Disk, extents: &[Extent], flush: bool) -> io::Result<()> {
    for extent in extents {
        match extent {
            Extent::Bytes { offset, parts } => {
                let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
                disk.write_at(&parts, *offset)?;
            }
            Extent::Zeros(range) => disk.zero_range(*range)?,
        }
    }
    if flush { disk.sync() } else { Ok(()) }
}

/// Most bytes that are read and written back at once.
const REFRESH_BYTES: u64 = 1 << 20;

fn refresh(disk: &Disk, range: ByteRange) -> io::Result<()> {
    let mut at = range.offset;
    let mut buffer = vec![0; in_memory(REFRESH_BYTES.min(range.len))];
    while let Some(data) = disk.next_data(at)?.filter(|data| data.offset < range.end()) {
        at = data.offset.max(at);
        let end = data.end().min(range.end());
        while at < end {
            let part = &mut buffer[..in_memory(REFRESH_BYTES.min(end - at))];
            disk.read_at(part, at)?;
            disk.write_at(&[part], at)?;
            at += part.len() as u64;
        }
    }
    Ok(())
}

/// A length that was checked against the size of a request or buffer before.
fn in_memory(len: u64) -> usize {
    usize::try_from(len).expect("requests and buffers fit in memory")
}

fn read_log<S: Store>(
    store: &S,
    reader: Option<Box<dyn LogSource>>,
    view: &LogView,
    from: Position,
    max_bytes: u64,
) -> Result<LogRun, ReadError> {
    let mut reader = match reader {
        Some(reader) => reader,
        None => Box::new(LogReader::open(store.clone(), view, from)?),
    };
    let mut at = from;
    let mut records = Vec::new();
    while at.lsn.bytes_since(from.lsn) < max_bytes {
        match reader.next(view, max_bytes)? {
            Next::End => break,
            Next::Epoch(entry) => at.epoch = entry.id,
            Next::Records(chunk) => {
                at = chunk.end();
                records.extend(chunk.into_steps());
            }
        }
    }
    Ok(LogRun { records, reader, at })
}

/// Summaries first, then the segments go, oldest first, so that a crash in between leaves a log without gaps. What becomes of their
/// files is no matter of the log.
fn retire<S: Store>(
    store: &S,
    view: &LogView,
    segments: usize,
    spares: &[SegmentName],
    summaries: &[SegmentName],
) -> io::Result<()> {
    for index in 0..segments {
        let (segment, next) = (&view.segments[index], &view.segments[index + 1]);
        if summaries.contains(&segment.name) {
            // All members have passed it: nobody will ever ask.
            continue;
        }
        if let Err(error) = summarize(store, view, segment, next) {
            // Without a summary a later resolve compares everything; keeping the segment could fill the store for good.
            tracing::warn!(segment = %segment.name, %error, "no summary of a log segment that goes");
        }
    }
    for name in view.segments[..segments].iter().map(|segment| segment.name) {
        // First out of the log, under another name; overwritten only when that is durable.
        let kept = spares.contains(&name) && store.rename(&FileId::Segment(name), &FileId::Spare(name)).is_ok();
        if !kept {
            store.remove(&FileId::Segment(name))?;
        }
    }
    summaries
        .iter()
        .try_for_each(|name| store.remove(&FileId::Summary(*name)))?;
    store.sync_dir()
}

/// A segment from a spare if possible: its blocks are written already, and writing the log once is enough.
fn make<S: Store>(store: &S, id: &FileId, len: u64, spare: Option<SegmentName>) -> io::Result<S::File> {
    if let Some(spare) = spare.map(FileId::Spare) {
        match recycle(store, &spare, id, len) {
            Ok(Some(file)) => return Ok(file),
            Ok(None) => {}
            Err(error) => tracing::warn!(?spare, %error, "a spare log file cannot be used"),
        }
        store.remove(&spare)?;
        // It may have its new name already, without that being durable.
        store.remove(id)?;
    }
    store.create(id, len)
}

/// Only the header is cleared: checksums are seeded with it, so nothing that stands behind it will ever fit. `None`: somebody still reads
/// what the spare was, or its length is another.
fn recycle<S: Store>(store: &S, spare: &FileId, id: &FileId, len: u64) -> io::Result<Option<S::File>> {
    let Some(file) = store.open_alone(spare)? else {
        return Ok(None);
    };
    if file.size()? != len {
        return Ok(None);
    }
    file.write_at(&[&[0; FIRST_BATCH_BYTES]], 0)?;
    file.sync()?;
    store.rename(spare, id)?;
    store.sync_dir()?;
    Ok(Some(file))
}

fn summarize<S: Store>(store: &S, view: &LogView, segment: &SegmentView, next: &SegmentView) -> io::Result<()> {
    let part = LogView {
        segments: vec![segment.clone(), next.clone()],
        durable: Position {
            epoch: segment.start.epoch,
            ..next.start
        },
        lineage: view.lineage.clone(),
    };
    let mut touched = Touched::default();
    let mut at = segment.start;
    let mut reader = LogReader::open(store.clone(), &part, at).map_err(io::Error::other)?;
    while at.lsn < next.start.lsn {
        match reader
            .next(&part, part.durable.lsn, MAX_EXTENT_BYTES)
            .map_err(io::Error::other)?
        {
            Next::Records(chunk) => {
                chunk.records().iter().for_each(|record| touched.record(&record.header));
                at = chunk.end();
            }
            Next::Epoch(_) | Next::End => break,
        }
    }
    Summary {
        start: segment.start,
        end: at,
        extents: touched.extents(),
    }
    .save(store, segment.name)
}
