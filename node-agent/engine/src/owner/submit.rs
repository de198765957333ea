//! Requests of the device: admission, the write path up to the log file, reads, and the completion of what waits for durability.
//!
//! Invariants: a write is answered after its record is in the log file (P1), and after it is durable where that was asked for (P2);
//! records are appended in the order of submission, so log order is compatible with completion order (P3); what cannot be
//! appended now waits in order and is never answered with an error because of a full buffer or a failing log (P8).

use super::saver::Generation;
use super::{MAX_IN_FLIGHT, Owner, Purpose};
use crate::api::{Action, Answer, CommandId, Durability, Fault, Io, IoResult, Now, Role, Submitted};
use crate::format::record::RecordKind;
use crate::jobs::Job;
use crate::overlay::{Content, Lookup};
use crate::store::Store;
use crate::types::{ByteRange, Lsn, MAX_PAYLOAD_BYTES, Position, SECTOR_BYTES};
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;

const EIO: i32 = 5;
const EBUSY: i32 = 16;
const EINVAL: i32 = 22;
const ENOSPC: i32 = 28;
const ESHUTDOWN: i32 = 108;
/// Bit 0 of a record's flags: the write asked for durability by itself.
const FLAG_FUA: u8 = 1;

/// Who is told when a record is durable (or, for a plain write, appended).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Then {
    /// Complete a block request.
    Complete(u64),
    /// Answer a command with the position.
    Reply(CommandId),
    /// Answer a command, once a save is done too.
    Tuned(CommandId, Generation),
    /// The operation under way waits for it.
    Operation,
    /// Nobody: what waits, waits for the record behind it.
    Nobody,
}

/// A change that waits to be appended.
#[derive(Debug)]
struct Held {
    kind: RecordKind,
    offset: u64,
    /// Range of the change; of a write, what is not appended yet.
    len: u64,
    payload: Bytes,
    fua: bool,
    /// Not told before the record is durable.
    when_durable: bool,
    then: Then,
}

#[derive(Debug)]
struct Waiter {
    until: Lsn,
    told: Told,
}

/// Who is told what: a request needs no position, so none is computed for it.
#[derive(Debug, Clone, Copy)]
enum Told {
    Complete(u64),
    Reply(CommandId, Position),
    Tuned(CommandId, Generation),
    Operation(Position),
    Nobody,
}

/// Unanswered requests.
#[derive(Debug, Default)]
pub(super) struct Requests {
    held: VecDeque<Held>,
    /// Ascending by `until`.
    waiters: VecDeque<Waiter>,
    reads: usize,
}

impl Requests {
    pub(super) fn has_held(&self) -> bool {
        !self.held.is_empty()
    }

    pub(super) fn has_waiters(&self) -> bool {
        !self.waiters.is_empty()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.waiters.len() + self.reads
    }
}

impl<S: Store> Owner<S> {
    /// A block request. At most [`MAX_IN_FLIGHT`] may be unanswered at a time.
    pub fn submit(&mut self, now: Now, tag: u64, io: Io<'_>) -> Submitted {
        self.now = now;
        if self.role != Role::Primary {
            return Submitted::Now(IoResult::Errno(ESHUTDOWN));
        }
        if let Some(errno) = self.invalid(&io) {
            return Submitted::Now(IoResult::Errno(errno));
        }
        if self.requests.in_flight() >= MAX_IN_FLIGHT {
            return Submitted::Now(IoResult::Errno(EBUSY));
        }
        let submitted = match io {
            Io::Read { range } => return self.read(tag, range),
            Io::Write { offset, data, fua } => self.change(
                tag,
                RecordKind::Write,
                offset,
                data.len() as u64,
                Bytes::copy_from_slice(data),
                fua,
            ),
            Io::Discard { range } => {
                self.change(tag, RecordKind::Discard, range.offset, range.len, Bytes::new(), false)
            }
            Io::WriteZeroes { range, fua } => {
                self.change(tag, RecordKind::WriteZeroes, range.offset, range.len, Bytes::new(), fua)
            }
            Io::Flush => self.wait_durable(Then::Complete(tag)),
        };
        self.pump();
        submitted
    }

    /// The errno of a request that no device of this size can serve.
    fn invalid(&self, io: &Io<'_>) -> Option<i32> {
        let (range, beyond) = match *io {
            Io::Read { range } => (range, EINVAL),
            Io::Write { offset, data, .. } => (
                ByteRange {
                    offset,
                    len: data.len() as u64,
                },
                ENOSPC,
            ),
            Io::Discard { range } | Io::WriteZeroes { range, .. } => (range, ENOSPC),
            Io::Flush => return None,
        };
        if !range.offset.is_multiple_of(SECTOR_BYTES) || !range.len.is_multiple_of(SECTOR_BYTES) {
            return Some(EINVAL);
        }
        let end = range.offset.checked_add(range.len);
        end.is_none_or(|end| end > self.size_bytes()).then_some(beyond)
    }

    fn change(&mut self, tag: u64, kind: RecordKind, offset: u64, len: u64, payload: Bytes, fua: bool) -> Submitted {
        if len == 0 {
            return Submitted::Now(IoResult::Done);
        }
        let when_durable = fua || self.saved.tuning.durability == Durability::EveryWrite;
        let mut held = Held {
            kind,
            offset,
            len,
            payload,
            fua,
            when_durable,
            then: Then::Complete(tag),
        };
        if self.requests.has_held() || !self.append_all(&mut held) {
            self.requests.held.push_back(held);
            return Submitted::Later;
        }
        if when_durable {
            self.wait_durable(held.then)
        } else {
            Submitted::Now(IoResult::Done)
        }
    }

    /// Queues a record that is not a request of the device: resize, marker, close. `then` is told when it is durable.
    pub(super) fn append_control(&mut self, kind: RecordKind, offset: u64, payload: Bytes, then: Then) {
        let len = payload.len() as u64;
        self.hold_control(kind, ByteRange { offset, len }, payload, then);
    }

    /// Queues a new size. What comes into view reads as zeros on every member, whatever their disks held there.
    pub(super) fn append_resize(&mut self, size_bytes: u64, then: Then) {
        let old = self.size_bytes();
        if size_bytes == old {
            return self.append_control(RecordKind::Resize, size_bytes, Bytes::new(), then);
        }
        self.append_control(RecordKind::Resize, size_bytes, Bytes::new(), Then::Nobody);
        let grown = ByteRange {
            offset: old,
            len: size_bytes - old,
        };
        self.hold_control(RecordKind::WriteZeroes, grown, Bytes::new(), then);
    }

    fn hold_control(&mut self, kind: RecordKind, range: ByteRange, payload: Bytes, then: Then) {
        let ByteRange { offset, len } = range;
        self.requests.held.push_back(Held {
            kind,
            offset,
            len,
            payload,
            fua: false,
            when_durable: true,
            then,
        });
        self.moved = true;
    }

    /// From now on the device promises that what is complete is durable, and nobody flushes any more. Told when that is true of all that
    /// was complete before; what still waits to be appended is complete only when it is durable.
    pub(super) fn harden_writes(&mut self, id: CommandId, generation: Generation) {
        for held in &mut self.requests.held {
            held.when_durable = true;
        }
        if self.log.durable().lsn == self.log.appended_lsn() {
            self.done_when_saved(id, generation);
        } else {
            self.push_waiter(Then::Tuned(id, generation));
            self.moved = true;
        }
    }

    /// Appends a change, in records of at most [`MAX_PAYLOAD_BYTES`]; `false`: it must wait, `held` is what is left of it.
    fn append_all(&mut self, held: &mut Held) -> bool {
        loop {
            if self.is_over_budget() {
                return false;
            }
            let longest = MAX_PAYLOAD_BYTES.min(self.saved.tuning.segment_bytes / 2);
            let len = if held.kind == RecordKind::Write {
                held.len.min(longest)
            } else {
                held.len
            };
            let part = usize::try_from(len).map_or(held.payload.len(), |len| len.min(held.payload.len()));
            let payload = held.payload.slice(..part);
            if !self.append(
                held.kind,
                if held.fua { FLAG_FUA } else { 0 },
                held.offset,
                len,
                payload,
            ) {
                return false;
            }
            held.payload = held.payload.slice(part..);
            if held.kind == RecordKind::Resize {
                return true;
            }
            held.offset += len;
            held.len -= len;
            if held.len == 0 {
                return true;
            }
        }
    }

    /// Appends one record of our own; `false`: the log takes none now.
    fn append(&mut self, kind: RecordKind, flags: u8, offset: u64, len: u64, payload: Bytes) -> bool {
        if self.repair.is_some() {
            return false;
        }
        let lamport = self.lamport();
        let range = ByteRange { offset, len };
        match self.log.append(kind, flags, range, payload.clone(), lamport) {
            Ok(appended) => {
                self.appended(kind, range, payload, lamport, appended.end);
                true
            }
            Err(error) => {
                self.append_failed(error);
                false
            }
        }
    }

    /// Appends what waits, in order, as far as the log and the budget allow.
    pub(super) fn step_held(&mut self) {
        while let Some(mut held) = self.requests.held.pop_front() {
            let before = held.len;
            if !self.append_all(&mut held) {
                self.moved |= held.len != before;
                self.requests.held.push_front(held);
                return;
            }
            self.moved = true;
            if held.when_durable {
                self.push_waiter(held.then);
            } else {
                self.tell(self.told(held.then));
            }
        }
    }

    /// Told once everything appended so far is durable, and everybody can know it.
    fn wait_durable(&mut self, then: Then) -> Submitted {
        let appended = self.log.appended_lsn();
        if self.status.durable.lsn == appended {
            return Submitted::Now(IoResult::Done);
        }
        if self.log.durable().lsn == appended {
            self.tell(self.told(then));
            return Submitted::Later;
        }
        self.push_waiter(then);
        Submitted::Later
    }

    fn push_waiter(&mut self, then: Then) {
        let waiter = Waiter {
            until: self.log.appended_lsn(),
            told: self.told(then),
        };
        self.requests.waiters.push_back(waiter);
    }

    /// Tells those whose records are durable now.
    pub(super) fn complete_durable(&mut self) {
        let durable = self.log.durable().lsn;
        while let Some(waiter) = self.requests.waiters.pop_front_if(|waiter| waiter.until <= durable) {
            self.tell(waiter.told);
        }
    }

    /// What is to be told about the record that was appended last.
    fn told(&self, then: Then) -> Told {
        match then {
            Then::Complete(tag) => Told::Complete(tag),
            Then::Reply(id) => Told::Reply(id, self.log.appended()),
            Then::Tuned(id, generation) => Told::Tuned(id, generation),
            Then::Operation => Told::Operation(self.log.appended()),
            Then::Nobody => Told::Nobody,
        }
    }

    fn tell(&mut self, told: Told) {
        match told {
            Told::Complete(tag) => self.actions.push_back(Action::Complete {
                tag,
                result: IoResult::Done,
            }),
            Told::Reply(id, at) => self.reply(id, Ok(Answer::At(at))),
            Told::Tuned(id, generation) => self.done_when_saved(id, generation),
            Told::Operation(at) => self.control_durable(at),
            Told::Nobody => {}
        }
    }

    fn read(&mut self, tag: u64, range: ByteRange) -> Submitted {
        match self.look_up(range) {
            Ok(bytes) => Submitted::Now(IoResult::Data(bytes)),
            Err(found) => {
                self.requests.reads += 1;
                self.read_disk(tag, range, found);
                Submitted::Later
            }
        }
    }

    /// A read that waited for another stack under the device.
    pub(super) fn read_again(&mut self, tag: u64, range: ByteRange) {
        match self.look_up(range) {
            Ok(bytes) => {
                self.requests.reads -= 1;
                let result = IoResult::Data(bytes);
                self.actions.push_back(Action::Complete { tag, result });
            }
            Err(found) => self.read_disk(tag, range, found),
        }
    }

    /// The newest bytes, if memory has all of them.
    fn look_up(&self, range: ByteRange) -> Result<Bytes, Lookup> {
        let found = self.overlay.lookup(range);
        if let ([hit], true) = (found.hits.as_slice(), found.gaps.is_empty())
            && let Content::Bytes(bytes) = &hit.content
        {
            return Ok(bytes.clone());
        }
        if !found.gaps.is_empty() {
            return Err(found);
        }
        let mut buffer = vec![0; usize::try_from(range.len).expect("a request fits in memory")];
        crate::jobs::lay_over(&mut buffer, range.offset, &found.hits);
        Ok(Bytes::from(buffer))
    }

    fn read_disk(&mut self, tag: u64, range: ByteRange, found: Lookup) {
        if self.is_exchanging() {
            return self.exchange.hold(tag, range);
        }
        let read = Job::Read {
            disk: self.data.clone(),
            range,
            hits: found.hits,
            gaps: found.gaps,
        };
        self.job(Purpose::Read { tag }, read);
    }

    pub(super) fn read_done(&mut self, tag: u64, result: io::Result<Bytes>) {
        self.requests.reads -= 1;
        let result = match result {
            Ok(bytes) => {
                if !self.flight.has_failed() {
                    self.changed |= self.faults.clear(|fault| matches!(fault, Fault::DataDiskFailed { .. }));
                }
                IoResult::Data(bytes)
            }
            Err(error) => {
                let message = format!("reading the data disk: {error}; the request failed with it");
                tracing::error!(replica = %self.replica, message);
                self.changed |= self.faults.set(Fault::DataDiskFailed { message });
                IoResult::Errno(error.raw_os_error().unwrap_or(EIO))
            }
        };
        self.actions.push_back(Action::Complete { tag, result });
    }
}
