//! The engine of a real replica: an [`Owner`] on any store, driven as an [`Engine`].
//!
//! Invariant: nothing is decided here; each job runs once against the owner's own store and its outcome goes back under the
//! same id.

use super::engine::{Engine, Job, Outcome, Step};
use mars_engine::api::{Action, Command, CommandId, Event, Io, JobId, LogView, Now, ReplicaStatus, Submitted};
use mars_engine::jobs::{self, JobOutcome, run_job};
use mars_engine::owner::Owner;
use mars_engine::store::Store;
use std::time::Duration;

/// See the module.
pub struct OwnedEngine<S: Store>(Owner<S>);

impl<S: Store> OwnedEngine<S> {
    /// Drives an opened owner.
    #[must_use]
    pub fn new(owner: Owner<S>) -> Self {
        Self(owner)
    }
}

/// Writers, flushes and readers wait for these; the rest is work in the background.
fn is_urgent<F>(job: &jobs::Job<F>) -> bool {
    match job {
        jobs::Job::Sync(_) | jobs::Job::Read { .. } | jobs::Job::Rewrite(_) | jobs::Job::SaveSlot(_) => true,
        // The next segment is made ahead of time, but when it is late every writer waits for it.
        jobs::Job::Create { .. } => true,
        jobs::Job::Remove(_)
        | jobs::Job::Write { .. }
        | jobs::Job::Size(_)
        | jobs::Job::ReadLog { .. }
        | jobs::Job::Retire { .. } => false,
    }
}

type Returned<S> = (JobId, JobOutcome<<S as Store>::File>);

impl<S: Store> Engine for OwnedEngine<S> {
    fn submit(&mut self, now: Now, tag: u64, io: Io<'_>) -> Submitted {
        self.0.submit(now, tag, io)
    }

    fn command(&mut self, now: Now, id: CommandId, command: Command) {
        self.0.command(now, id, command);
    }

    fn finished(&mut self, now: Now, outcome: Outcome) {
        let returned = outcome.downcast::<Returned<S>>();
        let (id, outcome) = *returned.expect("an outcome comes back to the engine that asked for it");
        self.0.handle(now, Event::JobDone(id, outcome));
    }

    fn tick(&mut self, now: Now) {
        self.0.handle(now, Event::Tick);
    }

    fn next_step(&mut self) -> Option<Step> {
        Some(match self.0.next_action()? {
            Action::Complete { tag, result } => Step::Complete { tag, result },
            Action::Reply(id, reply) => Step::Reply(id, reply),
            Action::Changed => Step::Changed,
            Action::Job(id, job) => {
                let (urgent, store) = (is_urgent(&job), self.0.store().clone());
                let run = move || -> Outcome {
                    let returned: Returned<S> = (id, run_job(&store, job));
                    Box::new(returned)
                };
                Step::Job(Job {
                    urgent,
                    run: Box::new(run),
                })
            }
        })
    }

    fn next_deadline(&self) -> Option<Duration> {
        self.0.next_deadline()
    }

    fn status(&self) -> ReplicaStatus {
        self.0.status().clone()
    }

    fn log_view(&self) -> LogView {
        self.0.log_view().clone()
    }
}
