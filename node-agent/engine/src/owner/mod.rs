//! The one owner of a replica's state: requests, commands and events go in, actions come out.
//!
//! One file per concern: `submit` (requests of the device), `commit` (group commit), `repair` (a poisoned log segment), `flight`
//! (write-back), `replay` (local log → overlay), `inbound` (log from members), `operation` (orders; those that
//! take several steps are `promote`, `close`, `restart`), `exchange` (another stack under the device), `sync` (target of a copy), `segments` (preparing and retiring log files), `saver` (slots), `publish`
//! (status). Each has a `step` that does whatever is possible now and never waits; `pump` runs them until none moves.
//!
//! Invariant: nobody else changes the log, the slots or the data disk of this replica while the owner lives; and
//! `appended ≥ durable ≥ replayed ≥ applied`, `dirty_end ≥ applied` hold after each call (checked, also in release).

mod close;
mod commit;
mod exchange;
mod faults;
mod flight;
mod inbound;
mod open;
mod operation;
mod promote;
mod publish;
mod repair;
mod replay;
mod restart;
mod retry;
mod saver;
mod segments;
mod slots;
mod submit;
mod sync;

pub use open::{OpenError, OpenParams};

use crate::api::{
    Action, Answer, Command, CommandId, DataState, Event, JobId, LogView, Now, Refusal, ReplicaStatus, Reply,
    Resumable, Role,
};
use crate::brick::Disk;
use crate::clock::LamportClock;
use crate::format::record::Record;
use crate::format::segment::LogIdentity;
use crate::jobs::{Job, JobOutcome};
use crate::lineage::Cause;
use crate::log::LogWriter;
use crate::overlay::Overlay;
use crate::roles::Close;
use crate::slot::Slots;
use crate::state::SavedState;
use crate::store::{FileId, SegmentName, Store};
use crate::types::{Lamport, Lsn, Position, ReplicaId};
use rand::rngs::StdRng;
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;
use uuid::Uuid;

/// Most unanswered block requests of one device; one more is answered with `EBUSY`.
pub const MAX_IN_FLIGHT: usize = 4096;

/// A record that is in the log but not known to be durable.
#[derive(Debug)]
struct TailRecord {
    /// Of records from members, with where they end: to be replayed from memory. Our own are in the overlay already.
    record: Option<(Record, Position)>,
    lamport: Lamport,
    /// Where it ends.
    end: Lsn,
}

/// What a job was for.
#[derive(Debug)]
enum Purpose {
    LogSync,
    Prepare { name: SegmentName, bytes: u64 },
    Rewrite,
    Read { tag: u64 },
    Flight,
    Slot,
    Replay { incarnation: u64 },
    DiskSize,
    NewDisk,
    Retire(segments::Retire),
    Operation,
    SyncWrite { id: CommandId, moved_bytes: u64 },
    SyncFlush,
    SyncRefresh { id: CommandId },
    Discard,
}

/// All state of one replica.
#[derive(Debug)]
pub struct Owner<S: Store> {
    store: S,
    now: Now,
    clock: LamportClock,
    rng: StdRng,
    replica: ReplicaId,
    identity: LogIdentity,
    data: Disk,
    /// Length of the data disk when last asked (bytes).
    disk_bytes: u64,
    role: Role,
    resumable: Option<Resumable>,
    /// With which cause a resumed role begins an epoch; `None` = the same one goes on.
    resume_cause: Option<Cause>,
    log: LogWriter<S>,
    tail: VecDeque<TailRecord>,
    durable_time: Lamport,
    overlay: Overlay,
    /// What the next slot write will say; role, positions and lineage in it are kept current.
    saved: SavedState,
    saver: saver::Saver,
    slots: Slots<S, SavedState>,
    boot_id: Uuid,
    /// Who is told when the state is saved; ascending.
    saved_waiters: VecDeque<(saver::Generation, CommandId)>,
    requests: submit::Requests,
    commit: commit::Commit,
    repair: Option<repair::Repair>,
    flight: flight::Flight,
    replay: replay::Replay,
    inbound: inbound::Inbound,
    operation: Option<operation::Operation>,
    sync: sync::Target,
    exchange: exchange::Exchange,
    segments: segments::Segments,
    faults: faults::Faults,
    /// The `Close` that is the last record of the log.
    trailing_close: Option<Close>,
    /// Files that are no part of the log any more, to be removed.
    discarded: Vec<FileId>,
    /// Files that are removed once the tail found at start is rewritten.
    stale: Vec<SegmentName>,
    /// The log is damaged, and whole again when it is durable up to here.
    defect_until: Option<Lsn>,
    is_shut_down: bool,
    jobs: BTreeMap<JobId, Purpose>,
    next_job: JobId,
    actions: VecDeque<Action<S::File>>,
    /// The status must be rebuilt and announced.
    changed: bool,
    /// A step did something: run all of them once more.
    moved: bool,
    status: ReplicaStatus,
    view: LogView,
}

impl<S: Store> Owner<S> {
    /// An order; answered by exactly one [`Action::Reply`].
    pub fn command(&mut self, now: Now, id: CommandId, command: Command) {
        self.now = now;
        self.order(id, command);
        self.pump();
    }

    /// A job came back, or the deadline has passed.
    ///
    /// # Panics
    /// When a job comes back that was not given out or came back before.
    pub fn handle(&mut self, now: Now, event: Event<S::File>) {
        self.now = now;
        if let Event::JobDone(id, outcome) = event {
            let purpose = self.jobs.remove(&id).expect("each job comes back once");
            self.job_done(purpose, outcome);
        }
        self.pump();
    }

    /// What the driver must do next; `None` when nothing is left for now.
    ///
    /// A change of status comes before the answers that follow from it: who has seen a flush return finds a durable end that covers
    /// it, wherever he looks.
    pub fn next_action(&mut self) -> Option<Action<S::File>> {
        if self.changed {
            self.changed = false;
            self.publish();
            return Some(Action::Changed);
        }
        if self.actions.is_empty() {
            // Nobody waits: now is the time to hash what was acknowledged.
            self.log.chain_up();
        }
        self.actions.pop_front()
    }

    /// When `handle(Event::Tick)` is wanted at the latest (on the monotonic clock of [`Now`]).
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        if self.is_shut_down {
            return None;
        }
        let mono = self.now.mono;
        [
            self.commit.deadline().filter(|_| self.repair.is_none()),
            self.flight.deadline(mono),
            self.replay.deadline(mono),
            self.saver.deadline(mono),
            self.segments.deadline(mono),
            self.repair.as_ref().and_then(|repair| repair.deadline(mono)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// The status as of the last [`Action::Changed`].
    #[must_use]
    pub fn status(&self) -> &ReplicaStatus {
        &self.status
    }

    /// What may be served to members, as of the last [`Action::Changed`]: durable log only (P6).
    #[must_use]
    pub fn log_view(&self) -> &LogView {
        &self.view
    }

    /// From now on this replica stamps with `clock`, the one of its node: whatever a message to or from this node carried, what is
    /// recorded here later comes after it (and messages come after what was recorded).
    ///
    /// A replica whose own log is stamped more than 30 days ahead keeps a clock of its own, so that it carries nobody away.
    pub fn share_clock(&mut self, clock: &LamportClock, now: Now) {
        match clock.see(self.clock.last(), now.wall_ns) {
            Ok(()) => self.clock = clock.clone(),
            Err(error) => {
                tracing::error!(replica = %self.replica, %error, "the log of this replica has a clock of its own");
            }
        }
    }

    /// The store, for those who read segments themselves.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }

    fn job_done(&mut self, purpose: Purpose, outcome: JobOutcome<S::File>) {
        match (purpose, outcome) {
            (Purpose::LogSync, JobOutcome::Done(result)) => self.log_synced(result),
            (Purpose::Prepare { name, bytes }, JobOutcome::File(result)) => self.segment_prepared(name, bytes, result),
            (Purpose::Rewrite, JobOutcome::Rewritten(result)) => self.tail_rewritten(result),
            (Purpose::Read { tag }, JobOutcome::Data(result)) => self.read_done(tag, result),
            (Purpose::Flight, JobOutcome::Done(result)) => self.flight_done(result),
            (Purpose::Slot, JobOutcome::Done(result)) => self.slot_saved(result),
            (Purpose::Replay { incarnation }, JobOutcome::Log(result)) => self.replay_read(incarnation, result),
            (Purpose::DiskSize, JobOutcome::Size(result)) => self.disk_size_known(&result),
            (Purpose::NewDisk, JobOutcome::Size(result)) => self.new_disk_measured(result),
            (Purpose::Retire(retire), JobOutcome::Done(result)) => self.segments_retired(retire, result),
            (Purpose::Operation, JobOutcome::Done(result)) => self.operation_job_done(result),
            (Purpose::SyncWrite { id, moved_bytes }, JobOutcome::Done(result)) => {
                self.sync_written(id, moved_bytes, result);
            }
            (Purpose::SyncFlush, JobOutcome::Done(result)) => self.sync_flushed(result),
            (Purpose::SyncRefresh { id }, JobOutcome::Done(result)) => self.sync_refreshed(id, result),
            (Purpose::Discard, JobOutcome::Done(result)) => self.discard_done(result),
            (purpose, _) => unreachable!("not an outcome of {purpose:?}"),
        }
    }

    /// Runs all steps until none of them moves any more.
    fn pump(&mut self) {
        loop {
            self.moved = false;
            self.step_repair();
            self.step_discard();
            self.step_segments();
            self.step_inbound();
            self.step_held();
            self.step_commit();
            self.step_replay();
            self.step_exchange();
            self.step_sync();
            self.step_flight();
            self.step_operation();
            self.step_saver();
            if !self.moved {
                break;
            }
        }
        self.check_positions();
    }

    fn check_positions(&self) {
        let (appended, durable) = (self.log.appended_lsn(), self.log.durable().lsn);
        let (replayed, applied) = (self.replay.cursor().lsn, self.saved.applied.lsn);
        assert!(appended >= durable, "appended {appended} is behind durable {durable}");
        assert!(durable >= replayed, "durable {durable} is behind replayed {replayed}");
        assert!(replayed >= applied, "replayed {replayed} is behind applied {applied}");
        assert!(
            self.saved.dirty_end.lsn >= applied,
            "dirty end {} is behind applied {applied}",
            self.saved.dirty_end
        );
    }

    fn job(&mut self, purpose: Purpose, job: Job<S::File>) {
        let id = self.next_job;
        self.next_job += 1;
        self.jobs.insert(id, purpose);
        self.actions.push_back(Action::Job(id, job));
        self.moved = true;
    }

    fn reply(&mut self, id: CommandId, reply: Reply) {
        self.actions.push_back(Action::Reply(id, reply));
        self.moved = true;
    }

    fn done(&mut self, id: CommandId) {
        self.reply(id, Ok(Answer::Done));
    }

    fn refuse(&mut self, id: CommandId, refusal: Refusal) {
        self.reply(id, Err(refusal));
    }

    /// Changes what is saved; says from when on it is durable.
    fn save(&mut self, change: impl FnOnce(&mut SavedState)) -> saver::Generation {
        change(&mut self.saved);
        self.moved = true;
        self.changed = true;
        self.saver.request()
    }

    fn lamport(&mut self) -> Lamport {
        self.clock.stamp(self.now.wall_ns)
    }

    fn is_consistent(&self) -> bool {
        self.saved.data == DataState::Consistent
    }

    /// Memory charged to the budget: payload in all stages, and of records kept for a rewrite of the tail.
    fn memory_bytes(&self) -> u64 {
        self.overlay.memory_bytes() + self.log.unsynced_bytes()
    }

    /// Writers wait, or will soon: everything that frees memory is urgent.
    fn is_under_pressure(&self) -> bool {
        self.memory_bytes() >= self.saved.tuning.overlay_budget_bytes / 2
    }

    fn is_over_budget(&self) -> bool {
        self.memory_bytes() >= self.saved.tuning.overlay_budget_bytes
    }
}

#[cfg(test)]
mod tests;
