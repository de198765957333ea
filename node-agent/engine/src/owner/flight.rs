//! Write-back: everything durable goes to the data disk in flights, one at a time.
//!
//! The order of a flight: dirty end saved → written, ascending and merged → data disk flushed → applied saved → memory freed. The
//! save of `applied` of one flight is usually also the save of the dirty end of the next.
//!
//! Invariants: nothing is written before the dirty end that covers it is on stable storage; only durable records fly (P11);
//! a flight that failed is written again in full, because a flush that failed once is never believed.

use super::retry::Retry;
use super::saver::Generation;
use super::{Owner, Purpose};
use crate::api::{DataState, Fault, Role};
use crate::jobs::Job;
use crate::state::Waypoint;
use crate::store::Store;
use crate::types::{Lamport, Position};
use crate::writeback;
use std::io;
use std::time::Duration;

/// Durable bytes rest this long in memory, so that overwritten ones need not be written.
const REST: Duration = Duration::from_millis(500);
/// A flight starts at this size whatever the age (bytes), or at a quarter of the budget if that is less.
const FULL_BYTES: u64 = 32 << 20;

/// Up to where a flight brings the data disk.
#[derive(Debug, Clone, Copy)]
struct Target {
    end: Position,
    time: Lamport,
}

#[derive(Debug, Default)]
enum Stage {
    #[default]
    Idle,
    /// The dirty end is being saved.
    Announced(Target, Generation),
    /// The job is out.
    Writing(Target),
    /// The data disk failed; everything is to be written again.
    Failed(Target),
}

/// The state of write-back.
#[derive(Debug, Default)]
pub(super) struct Flight {
    stage: Stage,
    /// Set while memory waits for this save of `applied`.
    landed: Option<Generation>,
    /// When what is durable has rested long enough.
    due: Option<Duration>,
    retry: Retry,
}

impl Flight {
    /// The data disk is reached in another way now: what failed is tried again at once.
    pub(super) fn try_now(&mut self) {
        self.retry.succeeded();
    }

    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        let due = if matches!(self.stage, Stage::Idle) {
            self.due
        } else {
            None
        };
        [due, self.retry.deadline(now)].into_iter().flatten().min()
    }

    /// The last flight failed and waits for its next try.
    pub(super) fn has_failed(&self) -> bool {
        matches!(self.stage, Stage::Failed(_))
    }

    /// Nothing is on its way to the disk now; a flight that failed may be forgotten with the log that it came from.
    pub(super) fn may_be_dropped(&self) -> bool {
        matches!(self.stage, Stage::Idle | Stage::Failed(_)) && self.landed.is_none()
    }

    /// Nothing is on its way to the disk, and nothing waits for a save.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.stage, Stage::Idle) && self.landed.is_none()
    }
}

impl<S: Store> Owner<S> {
    /// The data disk holds everything, and the slots say so.
    pub(super) fn is_all_applied(&self) -> bool {
        self.flight.is_idle() && self.saved.applied.lsn == self.replay.cursor().lsn
    }

    pub(super) fn step_flight(&mut self) {
        if self
            .flight
            .landed
            .is_some_and(|generation| self.saver.is_durable(generation))
        {
            self.flight.landed = None;
            self.overlay.release();
            self.consistency_may_have_come();
            self.moved = true;
        }
        match self.flight.stage {
            Stage::Idle => self.launch(),
            Stage::Announced(..) | Stage::Failed(_) if self.is_exchanging() => {}
            Stage::Announced(target, generation) if self.saver.is_durable(generation) => self.write_flight(target),
            Stage::Failed(target) if self.flight.retry.ready(self.now.mono) => self.write_flight(target),
            Stage::Announced(..) | Stage::Writing(_) | Stage::Failed(_) => {}
        }
    }

    fn launch(&mut self) {
        let end = self.replay.cursor();
        if end.lsn <= self.saved.applied.lsn || self.is_discarding_log() {
            self.flight.due = None;
            return;
        }
        let due = *self.flight.due.get_or_insert(self.now.mono + REST);
        let full = FULL_BYTES.min(self.saved.tuning.overlay_budget_bytes / 4);
        let wanted = due <= self.now.mono
            || self.overlay.durable_bytes() >= full
            || self.is_under_pressure()
            || self.requests.has_held()
            || self.wants_all_applied();
        if !wanted {
            return;
        }
        self.flight.due = None;
        let target = Target {
            end,
            time: self.replay.time(),
        };
        if self.overlay.launch().is_empty() {
            return self.land(target);
        }
        let generation = self.save(|saved| {
            if saved.dirty_end.lsn <= end.lsn {
                saved.dirty_end = end;
            }
        });
        self.flight.stage = Stage::Announced(target, generation);
    }

    fn write_flight(&mut self, target: Target) {
        assert!(self.log.durable().lsn >= target.end.lsn, "only durable records fly");
        assert!(
            self.saved.dirty_end.lsn >= target.end.lsn,
            "the dirty end covers the flight"
        );
        let extents = writeback::plan(self.overlay.flight().pieces());
        self.flight.stage = Stage::Writing(target);
        self.job(
            Purpose::Flight,
            Job::Write {
                disk: self.data.clone(),
                extents,
                flush: true,
            },
        );
    }

    pub(super) fn flight_done(&mut self, result: io::Result<()>) {
        let Stage::Writing(target) = self.flight.stage else {
            unreachable!("a flight was under way")
        };
        match result {
            Ok(()) => {
                self.flight.retry.succeeded();
                self.changed |= self.faults.clear(|fault| matches!(fault, Fault::DataDiskFailed { .. }));
                self.overlay.landed();
                self.land(target);
            }
            Err(error) => {
                let message = format!("write-back to the data disk: {error}; the log keeps everything, retrying");
                tracing::error!(replica = %self.replica, message);
                self.changed |= self.faults.set(Fault::DataDiskFailed { message });
                self.flight.retry.failed(self.now.mono, &mut self.rng);
                self.flight.stage = Stage::Failed(target);
            }
        }
        self.moved = true;
    }

    fn land(&mut self, target: Target) {
        self.flight.stage = Stage::Idle;
        let size_bytes = self.replay.applied_up_to(target.end.lsn);
        let generation = self.save(|saved| {
            saved.applied = target.end;
            saved.applied_time = saved.applied_time.max(target.time);
            saved.size_bytes = size_bytes;
            if saved.dirty_end.lsn < target.end.lsn {
                saved.dirty_end = target.end;
            }
        });
        self.flight.landed = Some(generation);
    }

    /// The log is thrown away: what was loaded from it means nothing any more. Nothing may be on its way to the disk.
    pub(super) fn drop_overlay(&mut self) {
        assert!(self.flight.may_be_dropped(), "a flight is under way");
        self.flight = Flight::default();
        self.overlay = crate::overlay::Overlay::default();
    }

    /// An inconsistent replica becomes consistent once the data disk has passed all that was ever written to it, on the history it came from.
    pub(super) fn consistency_may_have_come(&mut self) {
        let applied = self.saved.applied.lsn;
        let reached = match self.saved.waypoint {
            Some(Waypoint { at, passed }) => passed && applied >= at.lsn,
            None => false,
        };
        if reached && self.role == Role::Secondary {
            tracing::info!(replica = %self.replica, %applied, "the data is consistent now");
            self.save(|saved| {
                saved.data = DataState::Consistent;
                (saved.sync, saved.waypoint) = (None, None);
            });
        }
    }
}
