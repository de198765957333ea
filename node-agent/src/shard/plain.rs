//! An engine without a log: a file, read and written in place. For measuring and testing the device frontends alone.
//!
//! Invariant: what completed is in the file; a repeated request does no harm. There is no replication, no history, no
//! promise beyond that of the file – never use it for a replica.

use super::engine::{Engine, Job, Outcome, Step};
use mars_engine::api::{
    Answer, Command, CommandId, DataState, Io, IoResult, LogView, Now, Refusal, ReplicaStatus, Role, Submitted,
    Switches,
};
use mars_engine::lineage::Lineage;
use mars_engine::types::{Designation, Lamport, Lsn, Position};
use rustix::fs::FallocateFlags;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

/// See the module.
pub struct PlainEngine {
    file: Arc<File>,
    size_bytes: u64,
    /// Answer everything through the job pool, so that requests overlap and complete out of order.
    defer: bool,
    steps: VecDeque<Step>,
}

impl PlainEngine {
    /// An engine over `file`, whose length is the size of the device.
    ///
    /// # Errors
    /// When the length cannot be read.
    pub fn new(file: File, defer: bool) -> io::Result<Self> {
        let size_bytes = file.metadata()?.len();
        Ok(Self {
            file: Arc::new(file),
            size_bytes,
            defer,
            steps: VecDeque::new(),
        })
    }
}

/// A request that owns its bytes.
enum Work {
    Read { offset: u64, len: usize },
    Write { offset: u64, data: Vec<u8>, sync: bool },
    Sync,
    Zero { offset: u64, len: u64, sync: bool },
}

impl Work {
    fn of(io: &Io<'_>) -> Self {
        match *io {
            Io::Read { range } => Work::Read {
                offset: range.offset,
                len: usize::try_from(range.len).unwrap_or(usize::MAX),
            },
            Io::Write { offset, data, fua } => Work::Write {
                offset,
                data: data.to_vec(),
                sync: fua,
            },
            Io::Flush => Work::Sync,
            Io::Discard { range } => Work::Zero {
                offset: range.offset,
                len: range.len,
                sync: false,
            },
            Io::WriteZeroes { range, fua } => Work::Zero {
                offset: range.offset,
                len: range.len,
                sync: fua,
            },
        }
    }

    fn run(self, file: &File) -> IoResult {
        let done = match self {
            Work::Read { offset, len } => {
                let mut data = vec![0; len];
                return match file.read_exact_at(&mut data, offset) {
                    Ok(()) => IoResult::Data(data.into()),
                    Err(error) => IoResult::Errno(errno(&error)),
                };
            }
            Work::Write { offset, data, sync } => file
                .write_all_at(&data, offset)
                .and_then(|()| if sync { file.sync_data() } else { Ok(()) }),
            Work::Sync => file.sync_data(),
            Work::Zero { offset, len, sync } => rustix::fs::fallocate(
                file,
                FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
                offset,
                len,
            )
            .map_err(io::Error::from)
            .and_then(|()| if sync { file.sync_data() } else { Ok(()) }),
        };
        match done {
            Ok(()) => IoResult::Done,
            Err(error) => IoResult::Errno(errno(&error)),
        }
    }
}

fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

impl Engine for PlainEngine {
    fn submit(&mut self, _now: Now, tag: u64, io: Io<'_>) -> Submitted {
        let work = Work::of(&io);
        if !self.defer {
            return Submitted::Now(work.run(&self.file));
        }
        let file = self.file.clone();
        let run = Box::new(move || Box::new((tag, work.run(&file))) as Outcome);
        self.steps.push_back(Step::Job(Job { urgent: false, run }));
        Submitted::Later
    }

    fn command(&mut self, _now: Now, id: CommandId, command: Command) {
        let reply = match command {
            Command::Resize { size_bytes } if size_bytes < self.size_bytes => Err(Refusal::Invalid(format!(
                "{size_bytes} bytes is less than the present {}",
                self.size_bytes
            ))),
            Command::Resize { size_bytes } => match self.file.set_len(size_bytes) {
                Ok(()) => {
                    self.size_bytes = size_bytes;
                    self.steps.push_back(Step::Changed);
                    Ok(Answer::Done)
                }
                Err(error) => Err(Refusal::Io(error.to_string())),
            },
            _ => Ok(Answer::Done),
        };
        self.steps.push_back(Step::Reply(id, reply));
    }

    fn finished(&mut self, _now: Now, outcome: Outcome) {
        if let Ok(done) = outcome.downcast::<(u64, IoResult)>() {
            let (tag, result) = *done;
            self.steps.push_back(Step::Complete { tag, result });
        }
    }

    fn tick(&mut self, _now: Now) {}

    fn next_step(&mut self) -> Option<Step> {
        self.steps.pop_front()
    }

    fn next_deadline(&self) -> Option<Duration> {
        None
    }

    fn status(&self) -> ReplicaStatus {
        ReplicaStatus {
            role: Role::Primary,
            data: DataState::Consistent,
            designation: Designation::default(),
            size_bytes: self.size_bytes,
            appended: Position::default(),
            durable: Position::default(),
            replayed: Lsn::ZERO,
            applied: Position::default(),
            dirty_end: Position::default(),
            log_start: Lsn::ZERO,
            durable_time: Lamport::default(),
            applied_time: Lamport::default(),
            lineage: Lineage::default(),
            switches: Switches {
                fetch: false,
                replay: false,
                sync: false,
                apply_delay: Duration::ZERO,
            },
            sync: None,
            released: None,
            faults: Vec::new(),
            overlay_bytes: 0,
            log_bytes: 0,
            members: Vec::new(),
            resumable: None,
        }
    }

    fn log_view(&self) -> LogView {
        LogView::default()
    }
}
