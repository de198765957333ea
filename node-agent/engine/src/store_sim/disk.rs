//! The simulated machine behind all handles: directory, files, fault schedule, I/O counter and trace.
//!
//! Invariant: every operation of a process passes [`Disk::begin`] once, which counts it, kills or fails it on schedule,
//! and refuses the dead.

use super::inode::{Inode, PAGE};
use crate::store::FileId;
use crate::types::ByteRange;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

pub use super::inode::Survival;

/// Kinds of I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// `StoreFile::read_at`.
    Read,
    /// `StoreFile::write_at`, and the filling of a created file.
    Write,
    /// `StoreFile::zero_range`.
    Zero,
    /// `StoreFile::sync`.
    Sync,
    /// The directory entry of `Store::create`.
    Create,
    /// `Store::open`.
    Open,
    /// `Store::remove`.
    Remove,
    /// `Store::rename`; the file is the one with the old name.
    Rename,
    /// `Store::list`.
    List,
    /// `Store::sync_dir`.
    SyncDir,
}

/// How an I/O goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injected {
    /// Nothing is done, the call fails. (`sync`: dirty bytes are lost at the next power loss.)
    Error(io::ErrorKind),
    /// A write is done up to some byte, then fails.
    Torn(io::ErrorKind),
    /// One bit of the bytes read or written is wrong; the call succeeds.
    BitFlip,
}

/// One I/O as recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IoEvent {
    /// Its number.
    pub io: u64,
    /// Its kind.
    pub op: Op,
    /// The file; `None` for operations on the directory.
    pub file: Option<FileId>,
    /// The bytes it touched; empty where that means nothing.
    pub range: ByteRange,
    /// False when it was made to fail.
    pub ok: bool,
}

/// What `begin` decided.
enum Fate {
    Proceed,
    /// The process dies in this I/O.
    Crash,
    Fault(Injected),
}

#[derive(Debug)]
pub(super) struct Disk {
    rng: SmallRng,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// The directory as processes see it.
    entries: BTreeMap<FileId, u64>,
    /// The directory on the medium.
    durable_entries: BTreeMap<FileId, u64>,
    log_capacity: u64,
    /// Most files that a process may have open; the data disk does not count.
    open_limit: usize,
    generation: u64,
    dead: bool,
    io_count: u64,
    crash_at: Option<u64>,
    at_io: BTreeMap<u64, Injected>,
    at_next: Vec<(Op, Option<FileId>, Injected)>,
    trace: Option<Vec<IoEvent>>,
}

const NOTHING: ByteRange = ByteRange { offset: 0, len: 0 };

fn died() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "simulated: this process is dead")
}

fn injected(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, "simulated: injected failure")
}

impl Disk {
    pub(super) fn new(seed: u64, data_bytes: u64, log_capacity: u64) -> Self {
        let token = Arc::new(());
        let entries = BTreeMap::from([(FileId::Data, 0)]);
        Self {
            rng: SmallRng::seed_from_u64(seed),
            inodes: BTreeMap::from([(0, Inode::new(data_bytes, &token))]),
            next_inode: 1,
            durable_entries: entries.clone(),
            entries,
            log_capacity,
            open_limit: usize::MAX,
            generation: 0,
            dead: false,
            io_count: 0,
            crash_at: None,
            at_io: BTreeMap::new(),
            at_next: Vec::new(),
            trace: None,
        }
    }

    pub(super) fn kill_process(&mut self) {
        self.dead = true;
    }

    pub(super) fn next_generation(&mut self) -> u64 {
        self.generation += 1;
        self.dead = false;
        self.crash_at = None;
        self.forget_unlinked();
        self.generation
    }

    pub(super) fn is_dead(&self, generation: u64) -> bool {
        self.dead || generation != self.generation
    }

    pub(super) fn io_count(&self) -> u64 {
        self.io_count
    }

    pub(super) fn crash_at(&mut self, io: Option<u64>) {
        self.crash_at = io;
    }

    pub(super) fn inject_at(&mut self, io: u64, fault: Injected) {
        self.at_io.insert(io, fault);
    }

    pub(super) fn inject_next(&mut self, op: Op, file: Option<FileId>, fault: Injected) {
        self.at_next.push((op, file, fault));
    }

    pub(super) fn clear_faults(&mut self) {
        self.at_io.clear();
        self.at_next.clear();
    }

    pub(super) fn grow_data(&mut self, bytes: u64) {
        self.inodes
            .get_mut(&0)
            .expect("the data disk is always there")
            .grow(bytes);
    }

    pub(super) fn set_log_capacity(&mut self, bytes: u64) {
        self.log_capacity = bytes;
    }

    pub(super) fn set_trace(&mut self, on: bool) {
        self.trace = on.then(Vec::new);
    }

    pub(super) fn take_trace(&mut self) -> Vec<IoEvent> {
        self.trace.as_mut().map(std::mem::take).unwrap_or_default()
    }

    /// Unsynced bytes, entries and lengths survive or not; the process is dead.
    pub(super) fn power_loss(&mut self, survival: Survival) {
        self.dead = true;
        let changed: Vec<FileId> = self
            .entries
            .keys()
            .chain(self.durable_entries.keys())
            .filter(|id| self.entries.get(id) != self.durable_entries.get(id))
            .cloned()
            .collect();
        for id in changed {
            let survives = match survival {
                Survival::OnlySynced => false,
                Survival::Everything => true,
                Survival::Some | Survival::Torn => self.rng.random(),
            };
            if survives {
                match self.entries.get(&id) {
                    Some(inode) => self.durable_entries.insert(id, *inode),
                    None => self.durable_entries.remove(&id),
                };
            }
        }
        self.entries = self.durable_entries.clone();
        for inode in self.inodes.values_mut() {
            inode.power_loss(survival, &mut self.rng);
        }
    }

    /// Counts an I/O and says what becomes of it.
    fn begin(&mut self, generation: u64, op: Op, file: Option<&FileId>, range: ByteRange) -> io::Result<Fate> {
        if self.is_dead(generation) {
            return Err(died());
        }
        let io = self.io_count;
        self.io_count += 1;
        let fate = if self.crash_at == Some(io) {
            self.dead = true;
            Fate::Crash
        } else if let Some(fault) = self.at_io.remove(&io) {
            Fate::Fault(fault)
        } else {
            let due = self
                .at_next
                .iter()
                .position(|(o, f, _)| *o == op && (f.is_none() || f.as_ref() == file));
            due.map_or(Fate::Proceed, |i| Fate::Fault(self.at_next.remove(i).2))
        };
        if let Some(trace) = &mut self.trace {
            let ok = matches!(fate, Fate::Proceed | Fate::Fault(Injected::BitFlip));
            trace.push(IoEvent {
                io,
                op,
                file: file.cloned(),
                range,
                ok,
            });
        }
        Ok(fate)
    }

    /// For operations that are done entirely or not at all.
    fn begin_simple(&mut self, generation: u64, op: Op, file: Option<&FileId>) -> io::Result<()> {
        match self.begin(generation, op, file, NOTHING)? {
            Fate::Proceed | Fate::Fault(Injected::BitFlip) => Ok(()),
            Fate::Crash => Err(died()),
            Fate::Fault(Injected::Error(kind) | Injected::Torn(kind)) => Err(injected(kind)),
        }
    }

    fn inode(&mut self, inode: u64) -> &mut Inode {
        self.inodes.get_mut(&inode).expect("an open file keeps its inode")
    }

    fn used(&self) -> u64 {
        let logs = self.entries.iter().filter(|(id, _)| **id != FileId::Data);
        logs.map(|(_, inode)| self.inodes[inode].len()).sum()
    }

    fn forget_unlinked(&mut self) {
        let linked: std::collections::BTreeSet<u64> = self
            .entries
            .values()
            .chain(self.durable_entries.values())
            .copied()
            .collect();
        self.inodes
            .retain(|number, inode| linked.contains(number) || inode.is_open());
    }

    pub(super) fn create(&mut self, generation: u64, id: &FileId) -> io::Result<(u64, Arc<()>)> {
        self.begin_simple(generation, Op::Create, Some(id))?;
        if self.entries.contains_key(id) {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("simulated: {id:?} exists"),
            ));
        }
        let number = self.next_inode;
        self.next_inode += 1;
        let token = Arc::new(());
        self.inodes.insert(number, Inode::new(0, &token));
        self.entries.insert(id.clone(), number);
        Ok((number, token))
    }

    /// Gives a created file its length; a crash leaves any part of it.
    pub(super) fn fill_zeros(&mut self, generation: u64, id: &FileId, inode: u64, len: u64) -> io::Result<()> {
        let fate = self.begin(generation, Op::Write, Some(id), ByteRange { offset: 0, len })?;
        let part = self.rng.random_range(0..=len);
        match fate {
            Fate::Fault(Injected::Error(kind)) => Err(injected(kind)),
            Fate::Fault(Injected::Torn(kind)) => {
                self.inode(inode).set_len(part);
                Err(injected(kind))
            }
            Fate::Crash => {
                self.inode(inode).set_len(part);
                Err(died())
            }
            Fate::Proceed | Fate::Fault(Injected::BitFlip) => {
                if self.used() + len > self.log_capacity {
                    return Err(io::Error::new(
                        io::ErrorKind::StorageFull,
                        "simulated: log store is full",
                    ));
                }
                self.inode(inode).set_len(len);
                Ok(())
            }
        }
    }

    /// Cleaning up after a failed creation; a dead process cannot.
    pub(super) fn unlink_quietly(&mut self, generation: u64, id: &FileId) {
        if !self.is_dead(generation) {
            self.entries.remove(id);
        }
    }

    pub(super) fn open(&mut self, generation: u64, id: &FileId) -> io::Result<(u64, Arc<()>)> {
        self.begin_simple(generation, Op::Open, Some(id))?;
        let Some(&number) = self.entries.get(id) else {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("simulated: no {id:?}")));
        };
        let open = |disk: &Self| disk.inodes.values().filter(|inode| inode.is_open()).count();
        if self.open_limit < usize::MAX && *id != FileId::Data && open(self) > self.open_limit {
            return Err(io::Error::other("simulated: too many open files"));
        }
        Ok((number, self.inode(number).open_token()))
    }

    pub(super) fn set_open_limit(&mut self, files: usize) {
        self.open_limit = files;
    }

    pub(super) fn open_alone(&mut self, generation: u64, id: &FileId) -> io::Result<Option<(u64, Arc<()>)>> {
        let is_open = |disk: &Self| disk.entries.get(id).is_some_and(|inode| disk.inodes[inode].is_open());
        let held = is_open(self);
        let (number, token) = self.open(generation, id)?;
        Ok((!held).then_some((number, token)))
    }

    pub(super) fn rename(&mut self, generation: u64, from: &FileId, to: &FileId) -> io::Result<()> {
        self.begin_simple(generation, Op::Rename, Some(from))?;
        if self.entries.contains_key(to) {
            let message = format!("simulated: {to:?} exists");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
        }
        let Some(inode) = self.entries.remove(from) else {
            return Err(io::Error::new(
                io::ErrorKind::NotFound,
                format!("simulated: no {from:?}"),
            ));
        };
        self.entries.insert(to.clone(), inode);
        Ok(())
    }

    pub(super) fn remove(&mut self, generation: u64, id: &FileId) -> io::Result<()> {
        self.begin_simple(generation, Op::Remove, Some(id))?;
        self.entries.remove(id);
        Ok(())
    }

    pub(super) fn list(&mut self, generation: u64) -> io::Result<Vec<FileId>> {
        self.begin_simple(generation, Op::List, None)?;
        let logs = self
            .entries
            .keys()
            .filter(|id| matches!(id, FileId::Segment(_) | FileId::Spare(_) | FileId::Summary(_)));
        Ok(logs.cloned().collect())
    }

    pub(super) fn sync_dir(&mut self, generation: u64) -> io::Result<()> {
        self.begin_simple(generation, Op::SyncDir, None)?;
        self.durable_entries = self.entries.clone();
        self.forget_unlinked();
        Ok(())
    }

    pub(super) fn free_bytes(&mut self, generation: u64) -> io::Result<u64> {
        if self.is_dead(generation) {
            return Err(died());
        }
        Ok(self.log_capacity.saturating_sub(self.used()))
    }

    pub(super) fn read(
        &mut self,
        generation: u64,
        id: &FileId,
        inode: u64,
        buffer: &mut [u8],
        offset: u64,
    ) -> io::Result<()> {
        let range = ByteRange {
            offset,
            len: buffer.len() as u64,
        };
        let fate = self.begin(generation, Op::Read, Some(id), range)?;
        if range.end() > self.inode(inode).len() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("simulated: {id:?} ends before"),
            ));
        }
        match fate {
            Fate::Crash => return Err(died()),
            Fate::Fault(Injected::Error(kind) | Injected::Torn(kind)) => return Err(injected(kind)),
            Fate::Proceed => self.inode(inode).read(buffer, offset),
            Fate::Fault(Injected::BitFlip) => {
                self.inode(inode).read(buffer, offset);
                self.flip_one(buffer);
            }
        }
        Ok(())
    }

    pub(super) fn write(
        &mut self,
        generation: u64,
        id: &FileId,
        inode: u64,
        parts: &[&[u8]],
        offset: u64,
    ) -> io::Result<()> {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let range = ByteRange {
            offset,
            len: len as u64,
        };
        let fate = self.begin(generation, Op::Write, Some(id), range)?;
        assert!(
            range.end() <= self.inode(inode).len(),
            "{id:?} is written behind its end: {range:?}"
        );
        match fate {
            Fate::Proceed => {
                let mut at = offset;
                for part in parts {
                    self.write_part(inode, part, at);
                    at += part.len() as u64;
                }
                Ok(())
            }
            Fate::Fault(Injected::Error(kind)) => Err(injected(kind)),
            Fate::Fault(Injected::BitFlip) => {
                let mut bytes = parts.concat();
                self.flip_one(&mut bytes);
                self.write_part(inode, &bytes, offset);
                Ok(())
            }
            Fate::Crash => {
                self.write_prefix(inode, &parts.concat(), offset);
                Err(died())
            }
            Fate::Fault(Injected::Torn(kind)) => {
                self.write_prefix(inode, &parts.concat(), offset);
                Err(injected(kind))
            }
        }
    }

    fn write_part(&mut self, inode: u64, bytes: &[u8], offset: u64) {
        let file = self.inodes.get_mut(&inode).expect("an open file keeps its inode");
        file.write(bytes, offset, &mut self.rng);
    }

    /// The kernel copies page by page: an interrupted write is done up to some page boundary of the file, or entirely.
    fn write_prefix(&mut self, inode: u64, bytes: &[u8], offset: u64) {
        let end = offset + bytes.len() as u64;
        let cut = self.rng.random_range(offset..=end);
        let cut = if cut == end {
            end
        } else {
            (cut / PAGE as u64 * PAGE as u64).max(offset)
        };
        let count = usize::try_from(cut - offset).expect("a part of a slice");
        self.write_part(inode, &bytes[..count], offset);
    }

    fn flip_one(&mut self, bytes: &mut [u8]) {
        if !bytes.is_empty() {
            let bit = self.rng.random_range(0..bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    pub(super) fn zero(&mut self, generation: u64, id: &FileId, inode: u64, range: ByteRange) -> io::Result<()> {
        let fate = self.begin(generation, Op::Zero, Some(id), range)?;
        assert!(
            range.end() <= self.inode(inode).len(),
            "{id:?} is zeroed behind its end: {range:?}"
        );
        let (len, result) = match fate {
            Fate::Proceed | Fate::Fault(Injected::BitFlip) => (range.len, Ok(())),
            Fate::Fault(Injected::Error(kind)) => (0, Err(injected(kind))),
            Fate::Fault(Injected::Torn(kind)) => (self.rng.random_range(0..=range.len), Err(injected(kind))),
            Fate::Crash => (self.rng.random_range(0..=range.len), Err(died())),
        };
        let file = self.inodes.get_mut(&inode).expect("an open file keeps its inode");
        file.zero(range.offset, len, &mut self.rng);
        result
    }

    pub(super) fn sync(&mut self, generation: u64, id: &FileId, inode: u64) -> io::Result<()> {
        match self.begin(generation, Op::Sync, Some(id), NOTHING)? {
            Fate::Proceed | Fate::Fault(Injected::BitFlip) => self.inode(inode).sync(),
            // Whether the last sync before a death was done is for the coin: both happen.
            Fate::Crash => {
                if self.rng.random() {
                    self.inode(inode).sync();
                }
                return Err(died());
            }
            Fate::Fault(Injected::Error(kind) | Injected::Torn(kind)) => {
                self.inode(inode).fail_sync();
                return Err(injected(kind));
            }
        }
        Ok(())
    }

    pub(super) fn size(&mut self, generation: u64, inode: u64) -> io::Result<u64> {
        if self.is_dead(generation) {
            return Err(died());
        }
        Ok(self.inode(inode).len())
    }

    pub(super) fn next_data(&mut self, generation: u64, inode: u64, from: u64) -> io::Result<Option<ByteRange>> {
        if self.is_dead(generation) {
            return Err(died());
        }
        Ok(self
            .inode(inode)
            .next_data(from)
            .map(|(offset, len)| ByteRange { offset, len }))
    }

    pub(super) fn poke(&mut self, id: &FileId, offset: u64, bytes: &[u8]) {
        let number = *self.entries.get(id).expect("the test pokes a file that exists");
        let inode = self.inode(number);
        assert!(
            offset + bytes.len() as u64 <= inode.len(),
            "the test pokes behind the end of {id:?}"
        );
        inode.poke(bytes, offset);
    }

    pub(super) fn flip_bit(&mut self, id: &FileId, bit: u64) {
        let number = *self
            .entries
            .get(id)
            .expect("the test flips a bit of a file that exists");
        let inode = self.inode(number);
        assert!(bit / 8 < inode.len(), "the test flips a bit behind the end of {id:?}");
        let mut byte = [0];
        inode.read(&mut byte, bit / 8);
        byte[0] ^= 1 << (bit % 8);
        inode.poke(&byte, bit / 8);
    }

    pub(super) fn image(&self, id: &FileId, medium: bool) -> Option<Vec<u8>> {
        let entries = if medium { &self.durable_entries } else { &self.entries };
        entries.get(id).map(|number| self.inodes[number].image(medium))
    }

    pub(super) fn digest(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for entries in [&self.entries, &self.durable_entries] {
            for (id, number) in entries {
                hasher.update(format!("{id:?}={number};").as_bytes());
            }
        }
        self.inodes.values().for_each(|inode| inode.hash_into(&mut hasher));
        *hasher.finalize().as_bytes()
    }
}
