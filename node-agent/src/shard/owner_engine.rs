//! The real engine: an [`Owner`] on its store, as the threads see it.
//!
//! Invariant: each job of the owner is run once by the pool and its outcome goes back to this owner and no other.

use super::engine::{Engine, Job, Outcome, Step};
use mars_engine::api::{Action, Command, CommandId, Event, Io, JobId, LogView, Now, ReplicaStatus, Submitted};
use mars_engine::jobs::{self, JobOutcome};
use mars_engine::owner::Owner;
use mars_engine::store::Store;
use std::time::Duration;

/// See the module.
pub struct OwnerEngine<S: Store> {
    owner: Owner<S>,
}

impl<S: Store> OwnerEngine<S> {
    /// Drives an opened owner.
    #[must_use]
    pub fn new(owner: Owner<S>) -> Self {
        Self { owner }
    }

    fn job(&self, id: JobId, job: jobs::Job<S::File>) -> Job {
        // Somebody waits for these, and for a segment that is made too late everybody does; the rest has time.
        let urgent = matches!(
            job,
            jobs::Job::Sync(_)
                | jobs::Job::Read { .. }
                | jobs::Job::Rewrite(_)
                | jobs::Job::SaveSlot(_)
                | jobs::Job::Create { .. }
        );
        let store = self.owner.store().clone();
        let run = move || Box::new((id, jobs::run_job(&store, job))) as Outcome;
        Job {
            urgent,
            run: Box::new(run),
        }
    }
}

impl<S: Store> Engine for OwnerEngine<S>
where
    Owner<S>: Send,
    jobs::Job<S::File>: Send,
    JobOutcome<S::File>: Send,
{
    fn submit(&mut self, now: Now, tag: u64, io: Io<'_>) -> Submitted {
        self.owner.submit(now, tag, io)
    }

    fn command(&mut self, now: Now, id: CommandId, command: Command) {
        self.owner.command(now, id, command);
    }

    fn finished(&mut self, now: Now, outcome: Outcome) {
        let outcome = outcome.downcast::<(JobId, JobOutcome<S::File>)>();
        let (id, outcome) = *outcome.expect("a job's outcome returns to the engine that asked for it");
        self.owner.handle(now, Event::JobDone(id, outcome));
    }

    fn tick(&mut self, now: Now) {
        self.owner.handle(now, Event::Tick);
    }

    fn next_step(&mut self) -> Option<Step> {
        Some(match self.owner.next_action()? {
            Action::Complete { tag, result } => Step::Complete { tag, result },
            Action::Job(id, job) => Step::Job(self.job(id, job)),
            Action::Reply(id, reply) => Step::Reply(id, reply),
            Action::Changed => Step::Changed,
        })
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.owner.next_deadline()
    }

    fn status(&self) -> ReplicaStatus {
        self.owner.status().clone()
    }

    fn log_view(&self) -> LogView {
        self.owner.log_view().clone()
    }
}
