//! Group commit: one fdatasync of the log at a time, shared by all who wait.
//!
//! Invariants: `durable` becomes the end captured before the call, never later (P2, P6); a sync starts at the latest
//! [`COMMIT_DELAY`] or [`COMMIT_BYTES`] after an append, also when nobody flushes.

use super::{Owner, Purpose, TailRecord};
use crate::api::{Fault, Role};
use crate::format::record::{Record, RecordKind};
use crate::jobs::Job;
use crate::log::{AppendError, SyncResult};
use crate::overlay::Content;
use crate::roles::Close;
use crate::store::Store;
use crate::types::{ByteRange, Lamport, Lsn, Position};
use bytes::Bytes;
use std::io;
use std::time::Duration;

/// Longest time from an append to the sync that covers it.
const COMMIT_DELAY: Duration = Duration::from_millis(100);
/// A secondary answers to its peers, not to writers: it syncs this long after the first append.
const COMMIT_DELAY_SECONDARY: Duration = Duration::from_millis(10);
/// Most bytes appended without a sync.
const COMMIT_BYTES: u64 = 4 << 20;

/// The state of group commit.
#[derive(Debug, Default)]
pub(super) struct Commit {
    in_flight: bool,
    /// End of what the last sync issued covers.
    issued: Lsn,
    /// When the oldest append that no sync covers must be synced.
    due: Option<Duration>,
}

impl Commit {
    pub(super) fn is_in_flight(&self) -> bool {
        self.in_flight
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        if self.in_flight { None } else { self.due }
    }

    /// All that is appended is durable, by other means than a sync.
    pub(super) fn settled_at(&mut self, end: Lsn) {
        assert!(!self.in_flight, "a log sync is under way");
        *self = Commit {
            issued: end,
            ..Commit::default()
        };
    }
}

impl<S: Store> Owner<S> {
    /// Books a record of our own that has just been appended.
    pub(super) fn appended(&mut self, kind: RecordKind, range: ByteRange, payload: Bytes, lamport: Lamport, end: Lsn) {
        match kind {
            RecordKind::Write => self.overlay.append(range, Content::Bytes(payload)),
            RecordKind::Discard | RecordKind::WriteZeroes => self.overlay.append(range, Content::Zeros),
            RecordKind::Resize => self.replay.note_resize(end, range.offset),
            RecordKind::Marker | RecordKind::Close | RecordKind::EmergencyEnter | RecordKind::Resolve => {}
        }
        self.tail.push_back(TailRecord {
            record: None,
            lamport,
            end,
        });
        self.sync_by(COMMIT_DELAY);
    }

    /// Books a record from a member that has just been appended.
    pub(super) fn accepted(&mut self, record: Record, end: Position) {
        self.trailing_close = if record.header.kind == RecordKind::Close {
            Close::decode(&record.payload)
        } else {
            None
        };
        let lamport = record.header.lamport;
        self.tail.push_back(TailRecord {
            record: Some((record, end)),
            lamport,
            end: end.lsn,
        });
        self.sync_by(COMMIT_DELAY_SECONDARY);
    }

    /// What was just appended must be synced after `delay` at the latest.
    pub(super) fn sync_by(&mut self, delay: Duration) {
        let due = self.now.mono + delay;
        self.commit.due = Some(self.commit.due.map_or(due, |known| known.min(due)));
    }

    /// Whether what is appended comes from our own device, and so is in the overlay already.
    fn writes_itself(&self) -> bool {
        matches!(self.role, Role::Primary | Role::Closing)
    }

    pub(super) fn append_failed(&mut self, error: AppendError) {
        match error {
            AppendError::NeedSegment => self.want_segment(),
            AppendError::Poisoned { cause } => self.begin_repair(cause),
            AppendError::NotNext { .. } | AppendError::Format(_) => {
                unreachable!("own records are numbered by the log and checked before: {error}")
            }
        }
    }

    /// Issues a sync when one is due.
    pub(super) fn step_commit(&mut self) {
        if self.commit.in_flight || self.repair.is_some() {
            return;
        }
        if !self.log.needs_sync() {
            self.commit.due = None;
            return;
        }
        let uncovered = self.log.appended_lsn().bytes_since(self.commit.issued);
        let due = self.commit.due.is_some_and(|due| due <= self.now.mono);
        let wanted = due
            || uncovered >= COMMIT_BYTES
            || self.requests.has_waiters()
            || self.requests.has_held()
            || self.is_under_pressure()
            || self.operation.is_some();
        if !wanted {
            return;
        }
        let Some(files) = self.log.begin_sync() else { return };
        self.overlay.sync_issued();
        self.commit.in_flight = true;
        self.commit.issued = self.log.appended_lsn();
        self.commit.due = None;
        self.job(Purpose::LogSync, Job::Sync(files));
    }

    pub(super) fn log_synced(&mut self, result: io::Result<()>) {
        self.commit.in_flight = false;
        match self.log.sync_done(result.map_err(|error| error.to_string())) {
            SyncResult::Durable(_) => {
                self.overlay.sync_succeeded();
                self.became_durable();
            }
            SyncResult::Poisoned => {
                self.overlay.sync_failed();
                let cause = self.log.poisoned().unwrap_or("unknown").to_owned();
                self.begin_repair(cause);
            }
        }
    }

    /// The durable position has moved: records leave the tail, waiters are told, replay may go on.
    pub(super) fn became_durable(&mut self) {
        let durable = self.log.durable();
        while let Some(first) = self.tail.pop_front_if(|first| first.end <= durable.lsn) {
            self.durable_time = self.durable_time.max(first.lamport);
            if let Some((record, end)) = first.record {
                self.replay.offer(record, end);
            }
        }
        if self.writes_itself() {
            self.replay.passed(durable, self.durable_time);
        }
        let applied = self.saved.applied;
        if durable.lsn == applied.lsn && durable.epoch != applied.epoch {
            // A new epoch without records: nothing is left to apply, and positions are told in the epoch that goes on.
            self.replay.passed(durable, self.durable_time);
            self.save(|saved| {
                saved.applied = durable;
                if saved.dirty_end.lsn == durable.lsn {
                    saved.dirty_end = durable;
                }
            });
        }
        if !self.saved.log.started {
            self.save(|saved| saved.log.started = true);
        }
        self.release_if_durable();
        if self.defect_until.is_some_and(|until| until <= durable.lsn) {
            self.defect_until = None;
            self.faults.clear(|fault| matches!(fault, Fault::LogDefect { .. }));
        }
        self.saver.durable_moved(self.now.mono);
        self.complete_durable();
        self.changed = true;
        self.moved = true;
    }
}
