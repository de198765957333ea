//! Replay: durable records of the local log move into the overlay, from where write-back applies them.
//!
//! On a secondary this is the steady state; on a promotion or resume it loads everything local first. The cursor is the
//! `replayed` position; on a primary it follows `durable` because its own records are in the overlay already.
//!
//! Invariants: only durable records are loaded (P11), in order, none skipped: a record that cannot be read stops the replay and is
//! named (P10). A RESIZE beyond the local disk stops it before that record.

use super::retry::Retry;
use super::{Owner, Purpose};
use crate::api::{DataState, Fault, Role};
use crate::format::record::{Record, RecordKind};
use crate::jobs::{Job, LogRun, LogSource};
use crate::log::reader::ReadError;
use crate::overlay::Content;
use crate::recovery;
use crate::store::Store;
use crate::types::{ByteRange, Lamport, Lsn, Position};
use std::collections::VecDeque;
use std::io;
use std::time::Duration;

/// Most payload read from the log ahead of its application (bytes).
const AHEAD_BYTES: u64 = 4 << 20;

/// The state of replay.
#[derive(Debug)]
pub(super) struct Replay {
    cursor: Position,
    /// Lamport time of the record before the cursor.
    time: Lamport,
    /// Size of the device as of the applied position (bytes).
    base_size: u64,
    /// Ends of RESIZE records at or before the cursor that are not applied yet, with the new sizes.
    resizes: VecDeque<(Lsn, u64)>,
    /// Records that follow the cursor without a gap.
    ahead: VecDeque<(Record, Position)>,
    ahead_bytes: u64,
    reading: bool,
    /// Stands behind the last record that was read, as long as nothing came from elsewhere.
    reader: Option<(Box<dyn LogSource>, Position)>,
    /// Tells results for a log that was thrown away meanwhile.
    incarnation: u64,
    retry: Retry,
    /// The next record is held back until then by the apply delay.
    wake: Option<Duration>,
    asking_size: bool,
}

impl Replay {
    pub(super) fn new(cursor: Position, time: Lamport, size_bytes: u64) -> Self {
        Replay {
            cursor,
            time,
            base_size: size_bytes,
            resizes: VecDeque::new(),
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            reading: false,
            reader: None,
            incarnation: 0,
            retry: Retry::default(),
            wake: None,
            asking_size: false,
        }
    }

    /// The log was thrown away; it begins anew here.
    pub(super) fn reset(&mut self, cursor: Position, size_bytes: u64) {
        *self = Replay {
            incarnation: self.incarnation + 1,
            ..Replay::new(cursor, Lamport::default(), size_bytes)
        };
    }

    pub(super) fn cursor(&self) -> Position {
        self.cursor
    }

    pub(super) fn time(&self) -> Lamport {
        self.time
    }

    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        [self.retry.deadline(now), self.wake].into_iter().flatten().min()
    }

    /// Own records became durable: they are in the overlay.
    pub(super) fn passed(&mut self, end: Position, time: Lamport) {
        assert!(end.lsn >= self.cursor.lsn, "replay goes forward");
        self.cursor = end;
        self.time = self.time.max(time);
    }

    /// A record from a member became durable: taken if it is the next one and there is room, else read from the log later.
    pub(super) fn offer(&mut self, record: Record, end: Position) {
        let next = self.ahead.back().map_or(self.cursor.lsn, |(_, end)| end.lsn);
        if next.advance(record.lsn_bytes()) == end.lsn && !self.reading && self.ahead_bytes < AHEAD_BYTES {
            self.ahead_bytes += record.lsn_bytes();
            self.ahead.push_back((record, end));
            self.reader = None;
        }
    }

    /// A RESIZE that ends at `end` is in the overlay's range of the log.
    pub(super) fn note_resize(&mut self, end: Lsn, size_bytes: u64) {
        self.resizes.push_back((end, size_bytes));
    }

    /// Size of the device as of the newest record loaded (bytes).
    pub(super) fn size_bytes(&self) -> u64 {
        self.resizes.back().map_or(self.base_size, |(_, size)| *size)
    }

    /// Size of the device as of `applied` (bytes), which only grows.
    pub(super) fn applied_up_to(&mut self, applied: Lsn) -> u64 {
        while let Some((_, size)) = self.resizes.pop_front_if(|(end, _)| *end <= applied) {
            self.base_size = size;
        }
        self.base_size
    }
}

impl<S: Store> Owner<S> {
    pub(super) fn size_bytes(&self) -> u64 {
        self.replay.size_bytes()
    }

    /// Whether everything in the local log is loaded.
    pub(super) fn is_all_replayed(&self) -> bool {
        self.replay.cursor.lsn == self.log.appended_lsn()
    }

    fn may_replay(&self) -> bool {
        match self.role {
            Role::Primary | Role::Closing => false,
            Role::Promoting => true,
            Role::Secondary => {
                let copying = self.saved.data == DataState::Syncing && self.saved.waypoint.is_none();
                self.saved.switches.replay && !copying && !self.is_discarding_log() && !self.is_shutting_down()
            }
        }
    }

    pub(super) fn step_replay(&mut self) {
        self.replay.wake = None;
        if !self.may_replay() {
            return;
        }
        while self.replay_next() {
            self.moved = true;
        }
        let caught_up = self.replay.cursor.lsn >= self.log.durable().lsn;
        if !self.replay.ahead.is_empty() || self.replay.reading || caught_up || !self.replay.retry.ready(self.now.mono)
        {
            return;
        }
        self.replay.reading = true;
        let view = self.served_log();
        let (reader, from) = match self.replay.reader.take() {
            Some((reader, at)) => (Some(reader), at),
            None => (None, self.replay.cursor),
        };
        let purpose = Purpose::Replay {
            incarnation: self.replay.incarnation,
        };
        self.job(
            purpose,
            Job::ReadLog {
                reader,
                view,
                from,
                max_bytes: AHEAD_BYTES,
            },
        );
    }

    /// Loads the next record; `false`: there is none, or it must wait.
    fn replay_next(&mut self) -> bool {
        let Some((record, _)) = self.replay.ahead.front() else {
            return false;
        };
        let header = record.header;
        if self.is_over_budget() || self.is_held_back(header.lamport) {
            return false;
        }
        if header.kind == RecordKind::Resize && header.offset > self.disk_bytes {
            self.ask_disk_size();
            return false;
        }
        let (record, end) = self.replay.ahead.pop_front().expect("it was looked at");
        self.replay.ahead_bytes -= record.lsn_bytes();
        let range = ByteRange {
            offset: record.header.offset,
            len: record.header.len,
        };
        match record.header.kind {
            RecordKind::Write => self.overlay.replay(range, Content::Bytes(record.payload)),
            RecordKind::Discard | RecordKind::WriteZeroes => self.overlay.replay(range, Content::Zeros),
            RecordKind::Resize => self.replay.note_resize(end.lsn, record.header.offset),
            RecordKind::Marker | RecordKind::Close | RecordKind::EmergencyEnter | RecordKind::Resolve => {}
        }
        self.replay.passed(end, record.header.lamport);
        self.visit_waypoint(end);
        true
    }

    /// Replay has come to `end`. A copy whose end lies in another history than the one replayed here is worth nothing.
    fn visit_waypoint(&mut self, end: Position) {
        let Some(waypoint) = &mut self.saved.waypoint else {
            return;
        };
        waypoint.visit(end);
        if waypoint.is_missed(end.lsn) && self.saved.data == DataState::Syncing {
            tracing::warn!(replica = %self.replica, at = %waypoint.at, "the history that was copied ended elsewhere: the copy starts anew");
            self.save(|saved| (saved.sync, saved.waypoint) = (None, None));
        }
    }

    /// Whether the apply delay holds back a record of that time; remembers when it is over.
    fn is_held_back(&mut self, stamp: Lamport) -> bool {
        if self.role == Role::Promoting || self.saved.switches.apply_delay.is_zero() {
            return false;
        }
        let delay_ns = u64::try_from(self.saved.switches.apply_delay.as_nanos()).unwrap_or(u64::MAX);
        let left_ns = stamp.0.saturating_add(delay_ns).saturating_sub(self.now.wall_ns);
        if left_ns > 0 {
            self.replay.wake = Some(self.now.mono + Duration::from_nanos(left_ns));
        }
        left_ns > 0
    }

    pub(super) fn replay_read(&mut self, incarnation: u64, result: Result<LogRun, ReadError>) {
        if incarnation != self.replay.incarnation {
            return;
        }
        self.replay.reading = false;
        match result {
            Ok(LogRun { records, reader, at }) => {
                assert!(
                    self.replay.ahead.is_empty(),
                    "nothing is offered while a read is under way"
                );
                self.replay.ahead_bytes = records.iter().map(|(record, _)| record.lsn_bytes()).sum();
                self.replay.ahead = records.into();
                self.replay.reader = Some((reader, at));
                self.replay.retry.succeeded();
            }
            Err(error) => {
                tracing::error!(replica = %self.replica, %error, "reading the local log for replay failed");
                self.replay.retry.failed(self.now.mono, &mut self.rng);
                if let ReadError::Defect(stop) = &error {
                    self.changed |= self.faults.set(recovery::defect(stop));
                }
            }
        }
        self.moved = true;
    }

    fn ask_disk_size(&mut self) {
        if !self.replay.asking_size && self.replay.retry.ready(self.now.mono) {
            self.replay.asking_size = true;
            self.job(Purpose::DiskSize, Job::Size(self.data.clone()));
        }
    }

    pub(super) fn disk_size_known(&mut self, result: &io::Result<u64>) {
        self.replay.asking_size = false;
        if let Ok(bytes) = result {
            self.disk_bytes = *bytes;
        }
        let disk_bytes = self.disk_bytes;
        let next = self.replay.ahead.front().map(|(record, _)| record.header);
        let wanted = next
            .filter(|next| next.kind == RecordKind::Resize)
            .map(|next| next.offset);
        if let Some(wanted_bytes) = wanted.filter(|wanted| *wanted > disk_bytes) {
            self.changed |= self.faults.set(Fault::DiskTooSmall {
                wanted_bytes,
                disk_bytes,
            });
            self.replay.retry.failed(self.now.mono, &mut self.rng);
        } else {
            self.changed |= self.faults.clear(|fault| matches!(fault, Fault::DiskTooSmall { .. }));
            self.replay.retry.succeeded();
        }
        self.resize_answered();
        self.moved = true;
    }
}
