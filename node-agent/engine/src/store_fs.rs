//! Real files: the directory of one replica, and its data disk.
//!
//! ```text
//! <replica directory>/slot-0, slot-1            saved state
//!                    /log/log-000000001-0123abcd  segments
//!                    /log/spare-000000001-0123abcd  what was a segment and will be another one
//!                    /summary/log-000000001-0123abcd  touched extents
//! ```
//! The data disk comes in as an open file: whoever opened it holds it exclusively (`O_EXCL` on a block device). It can be let go
//! of while the replica stays open ([`FsStore::detach_data`]).
//!
//! Whoever has a segment open holds a shared `flock` on it, for as long as any clone of the open file lives: so a spare is taken for a new
//! segment only when no reader of the old one is left, in whatever process.
//!
//! Invariants: nothing is created except by `create` and `create_layout`; a layout that is missing is an error, never made up
//! for. A file has all its blocks written and is in its directory durably before anybody gets it.

mod data_disk;

use crate::store::{FileId, SegmentName, Store, StoreFile};
use crate::types::ByteRange;
use data_disk::{DataDisk, OpenFile};
use rustix::fs::{AtFlags, FallocateFlags, FlockOperation, Mode, OFlags, RenameFlags, SeekFrom};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How much is written at a time when a file is filled (bytes).
const FILL_BYTES: usize = 1 << 20;
static ZEROS: [u8; FILL_BYTES] = [0; FILL_BYTES];
const LOG_DIR: &str = "log";
const SUMMARY_DIR: &str = "summary";
const SEGMENT: &str = "log-";
const SPARE: &str = "spare-";

/// The files of one replica.
#[derive(Debug, Clone)]
pub struct FsStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    root: OwnedFd,
    log: OwnedFd,
    summary: OwnedFd,
    data: Arc<DataDisk>,
}

/// An open file.
#[derive(Debug, Clone)]
pub struct FsFile {
    kind: FsFileKind,
}

#[derive(Debug, Clone)]
enum FsFileKind {
    /// A file of the replica's directory.
    Own(Arc<OpenFile>),
    /// The data disk, which may be detached.
    Data(Arc<DataDisk>),
}

fn open_dir(parent: &impl std::os::fd::AsFd, name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn named(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    let path = path.display().to_string();
    move |error| io::Error::new(error.kind(), format!("{path}: {error}"))
}

impl FsStore {
    /// Makes the layout of a replica that is new on this node, durably. Safe to repeat.
    ///
    /// # Errors
    /// Any I/O error; the directory itself and its parent must exist.
    pub fn create_layout(path: &Path) -> io::Result<()> {
        for name in [LOG_DIR, SUMMARY_DIR] {
            let dir = path.join(name);
            match std::fs::create_dir(&dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(named(&dir)(error)),
                _ => {}
            }
        }
        let root = File::open(path).map_err(named(path))?;
        root.sync_all().map_err(named(path))
    }

    /// Opens the directory of a replica. `data` is its data disk, opened for reading and writing.
    ///
    /// # Errors
    /// `NotFound` when the layout is not there; any I/O error.
    pub fn open(path: &Path, data: File) -> io::Result<Self> {
        Self::open_with(path, DataDisk::attached(OpenFile::new(data)?))
    }

    /// Opens the directory of a replica whose data disk is detached; it had this size (bytes).
    ///
    /// # Errors
    /// As for [`FsStore::open`].
    pub fn open_detached(path: &Path, size_bytes: u64) -> io::Result<Self> {
        Self::open_with(path, DataDisk::detached(size_bytes))
    }

    fn open_with(path: &Path, data: DataDisk) -> io::Result<Self> {
        let root: OwnedFd = File::open(path).map_err(named(path))?.into();
        let log = open_dir(&root, LOG_DIR).map_err(named(&path.join(LOG_DIR)))?;
        let summary = open_dir(&root, SUMMARY_DIR).map_err(named(&path.join(SUMMARY_DIR)))?;
        Ok(Self {
            shared: Arc::new(Shared {
                path: path.to_owned(),
                root,
                log,
                summary,
                data: Arc::new(data),
            }),
        })
    }

    /// The two slot files of a replica that need not be open here, to be read only: nothing can be written through them, and nobody is
    /// held up.
    ///
    /// # Errors
    /// `NotFound` when one is not there; any I/O error.
    pub fn slots_to_read(path: &Path) -> io::Result<[FsFile; 2]> {
        let open = |index: u8| {
            let path = path.join(format!("slot-{index}"));
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| named(&path)(errno.into()))?;
            FsFile::new(File::from(fd)).map_err(named(&path))
        };
        Ok([open(0)?, open(1)?])
    }

    /// The directory this store was opened with.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Lets go of the data disk: everything written to it is durable, and the file is closed, when this returns. The caller has
    /// brought its owner to rest (no replay, no copy, everything loaded is applied): what the owner asks of the disk now fails.
    ///
    /// # Errors
    /// The disk cannot be flushed; then nothing has changed.
    pub fn detach_data(&self) -> io::Result<()> {
        self.shared.data.detach(size_of_open)
    }

    /// Takes the data disk back. It holds what it held when it was let go of: the caller has made sure.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn attach_data(&self, data: File) -> io::Result<()> {
        self.shared.data.attach(OpenFile::new(data)?);
        Ok(())
    }

    fn place(&self, id: &FileId) -> (&OwnedFd, String) {
        let shared = &self.shared;
        match id {
            FileId::Data => unreachable!("the data disk is not in the directory"),
            FileId::Slot(index) => (&shared.root, format!("slot-{index}")),
            FileId::Segment(name) => (&shared.log, name.to_string()),
            FileId::Spare(name) => (&shared.log, format!("{SPARE}{}", &name.to_string()[SEGMENT.len()..])),
            FileId::Summary(name) => (&shared.summary, name.to_string()),
        }
    }

    fn open_existing(&self, id: &FileId) -> io::Result<FsFile> {
        let (dir, name) = self.place(id);
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        FsFile::new(File::from(rustix::fs::openat(dir, &name, flags, Mode::empty())?))
    }

    fn sync_dir_fd(dir: &OwnedFd) -> io::Result<()> {
        Ok(rustix::fs::fsync(dir)?)
    }

    fn list_dir(&self, dir: &OwnedFd, parse: fn(&str) -> Option<FileId>, into: &mut Vec<FileId>) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(dir)? {
            let entry = entry?;
            match entry.file_name().to_str().ok().and_then(parse) {
                Some(id) => into.push(id),
                None if matches!(entry.file_name().to_bytes(), b"." | b".." | b"lost+found") => {}
                None => {
                    let path = &self.shared.path;
                    tracing::warn!(path = %path.display(), file = ?entry.file_name(), "not a file of a replica: left alone");
                }
            }
        }
        Ok(())
    }
}

/// A file of the log directory.
fn parse_log_file(text: &str) -> Option<FileId> {
    match text.strip_prefix(SPARE) {
        Some(rest) => parse_segment_name(&format!("{SEGMENT}{rest}")).map(FileId::Spare),
        None => parse_segment_name(text).map(FileId::Segment),
    }
}

/// Reads `log-<9 or more digits>-<8 hexadecimal digits>`; only the form that is written.
fn parse_segment_name(text: &str) -> Option<SegmentName> {
    let (number, origin) = text.strip_prefix(SEGMENT)?.split_once('-')?;
    let name = SegmentName {
        number: number.parse().ok()?,
        origin: u32::from_str_radix(origin, 16).ok()?,
    };
    (name.to_string() == text).then_some(name)
}

impl Store for FsStore {
    type File = FsFile;

    fn create(&self, id: &FileId, len: u64) -> io::Result<FsFile> {
        assert!(*id != FileId::Data, "the data disk is never created by the engine");
        let (dir, name) = self.place(id);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat(dir, &name, flags, Mode::RUSR | Mode::WUSR)?;
        let file = FsFile::new(File::from(fd))?;
        file.mark_open(id);
        let filled = file
            .fill(len)
            .and_then(|()| file.with(|open| open.file.sync_all()))
            .and_then(|()| Self::sync_dir_fd(dir));
        if let Err(error) = filled {
            if let Err(unlink) = rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
                tracing::warn!(file = name, error = %unlink, "an incomplete file stays behind");
            }
            return Err(error);
        }
        Ok(file)
    }

    fn open(&self, id: &FileId) -> io::Result<FsFile> {
        if *id == FileId::Data {
            let kind = FsFileKind::Data(self.shared.data.clone());
            return Ok(FsFile { kind });
        }
        let file = self.open_existing(id)?;
        file.mark_open(id);
        Ok(file)
    }

    fn open_alone(&self, id: &FileId) -> io::Result<Option<FsFile>> {
        assert!(*id != FileId::Data, "the data disk is always open");
        let file = self.open_existing(id)?;
        if file.lock(FlockOperation::NonBlockingLockExclusive).is_err() {
            return Ok(None);
        }
        // From now on others may read it, too.
        file.lock(FlockOperation::NonBlockingLockShared)?;
        Ok(Some(file))
    }

    fn rename(&self, from: &FileId, to: &FileId) -> io::Result<()> {
        let ((from_dir, from), (to_dir, to)) = (self.place(from), self.place(to));
        Ok(rustix::fs::renameat_with(
            from_dir,
            from,
            to_dir,
            to,
            RenameFlags::NOREPLACE,
        )?)
    }

    fn remove(&self, id: &FileId) -> io::Result<()> {
        assert!(*id != FileId::Data, "the data disk is never removed by the engine");
        let (dir, name) = self.place(id);
        match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Err(Errno::NOENT) | Ok(()) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn list(&self) -> io::Result<Vec<FileId>> {
        let mut files = Vec::new();
        self.list_dir(&self.shared.log, parse_log_file, &mut files)?;
        let summary = |text: &str| parse_segment_name(text).map(FileId::Summary);
        self.list_dir(&self.shared.summary, summary, &mut files)?;
        Ok(files)
    }

    fn sync_dir(&self) -> io::Result<()> {
        Self::sync_dir_fd(&self.shared.log)?;
        Self::sync_dir_fd(&self.shared.summary)?;
        Self::sync_dir_fd(&self.shared.root)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.shared.log)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

fn size_of_open(open: &OpenFile) -> io::Result<u64> {
    if open.is_block_device {
        // All other I/O names its offset, so that the shared file position does not matter.
        return Ok(rustix::fs::seek(&open.file, SeekFrom::End(0))?);
    }
    Ok(open.file.metadata()?.len())
}

impl FsFile {
    fn new(file: File) -> io::Result<Self> {
        Ok(Self {
            kind: FsFileKind::Own(Arc::new(OpenFile::new(file)?)),
        })
    }

    /// A segment that is open is not recycled. Where the file system knows no locks, `open_alone` fails, and nothing ever is.
    fn mark_open(&self, id: &FileId) {
        if matches!(id, FileId::Segment(_))
            && let Err(error) = self.lock(FlockOperation::NonBlockingLockShared)
        {
            tracing::debug!(?id, %error, "an open segment is not marked as such");
        }
    }

    fn lock(&self, operation: FlockOperation) -> io::Result<()> {
        self.with(|open| Ok(rustix::fs::flock(&open.file, operation)?))
    }

    fn with<T>(&self, work: impl FnOnce(&OpenFile) -> io::Result<T>) -> io::Result<T> {
        match &self.kind {
            FsFileKind::Own(open) => work(open),
            FsFileKind::Data(disk) => disk.with(work),
        }
    }

    /// Writes `len` zeros from the start: written blocks, not unwritten extents, so that later syncs change no metadata.
    fn fill(&self, len: u64) -> io::Result<()> {
        let mut offset = 0;
        while offset < len {
            let count = usize::try_from(len - offset).map_or(FILL_BYTES, |rest| rest.min(FILL_BYTES));
            self.write_at(&[&ZEROS[..count]], offset)?;
            offset += count as u64;
        }
        Ok(())
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let count = usize::try_from(end - at).map_or(FILL_BYTES, |rest| rest.min(FILL_BYTES));
            self.write_at(&[&ZEROS[..count]], at)?;
            at += count as u64;
        }
        Ok(())
    }
}

impl StoreFile for FsFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|open| std::os::unix::fs::FileExt::read_exact_at(&open.file, buffer, offset))
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.with(|open| write_parts(&open.file, parts, offset))
    }

    fn zero_range(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let is_done = self.with(|open| zero_cheaply(open, offset, len))?;
        if is_done { Ok(()) } else { self.write_zeros(offset, len) }
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|open| open.file.sync_data())
    }

    fn size(&self) -> io::Result<u64> {
        if let FsFileKind::Data(disk) = &self.kind
            && let Some(size_bytes) = disk.remembered_size()
        {
            return Ok(size_bytes);
        }
        self.with(size_of_open)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.with(|open| next_data(open, from))
    }
}

/// Makes a range read as zeros where that is cheap; `false`: it is not.
fn zero_cheaply(open: &OpenFile, offset: u64, len: u64) -> io::Result<bool> {
    // A hole in a file; on a block device the kernel unmaps only where that is sure to read as zeros afterwards.
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(&open.file, punch, offset, len) {
        Ok(()) => return Ok(true),
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NODEV) => {}
        Err(error) => return Err(error.into()),
    }
    let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
    Ok(open.is_block_device && rustix::fs::fallocate(&open.file, zero, offset, len).is_ok())
}

fn next_data(open: &OpenFile, from: u64) -> io::Result<Option<ByteRange>> {
    let size = size_of_open(open)?;
    if from >= size {
        return Ok(None);
    }
    let everything = ByteRange {
        offset: from,
        len: size - from,
    };
    if open.is_block_device {
        return Ok(Some(everything));
    }
    let offset = match rustix::fs::seek(&open.file, SeekFrom::Data(from)) {
        Ok(offset) => offset,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL) => return Ok(Some(everything)),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(&open.file, SeekFrom::Hole(offset))?;
    Ok((offset < end).then(|| ByteRange {
        offset,
        len: end - offset,
    }))
}

fn write_parts(file: &File, parts: &[&[u8]], offset: u64) -> io::Result<()> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    let done = match parts {
        [one] => pwrite_once(file, &[IoSlice::new(one)], offset)?,
        [one, two] => pwrite_once(file, &[IoSlice::new(one), IoSlice::new(two)], offset)?,
        [one, two, three] => pwrite_once(file, &[one, two, three].map(|part| IoSlice::new(part)), offset)?,
        [one, two, three, four] => pwrite_once(file, &[one, two, three, four].map(|part| IoSlice::new(part)), offset)?,
        _ => 0,
    };
    if done == total {
        Ok(())
    } else {
        write_rest(file, parts, offset, done)
    }
}

fn pwrite_once(file: &File, slices: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
    loop {
        match rustix::io::pwritev(file, slices, offset) {
            Err(Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Most parts that one `pwritev` takes (`IOV_MAX`).
const MAX_PARTS: usize = 1024;

/// What a short write left, and lists of more than four parts.
#[cold]
fn write_rest(file: &File, parts: &[&[u8]], offset: u64, mut done: usize) -> io::Result<()> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    while done < total {
        let mut skip = done;
        let mut slices = Vec::with_capacity(parts.len().min(MAX_PARTS));
        for part in parts {
            if skip >= part.len() {
                skip -= part.len();
            } else if slices.len() < MAX_PARTS {
                slices.push(IoSlice::new(&part[std::mem::take(&mut skip)..]));
            }
        }
        match pwrite_once(file, &slices, offset + done as u64)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => done += count,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
