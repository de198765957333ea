//! A log segment that failed is never written again: everything above the durable end is written anew, into a new segment.
//!
//! While that is not done, writers and members wait; reads and write-back of what is durable go on. If it fails too, it is tried
//! again with further segments, and the fault is shown.
//!
//! Invariants: a sync that failed is never asked again; nobody is told "durable" for what only a failed segment holds.

use super::retry::Retry;
use super::{Owner, Purpose};
use crate::api::Fault;
use crate::jobs::Job;
use crate::log::Rewritten;
use crate::store::{FileId, Store};
use std::io;
use std::time::Duration;

/// The state of a repair.
#[derive(Debug)]
pub(super) struct Repair {
    cause: String,
    retry: Retry,
    rewriting: bool,
}

impl Repair {
    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        self.retry.deadline(now)
    }
}

impl<S: Store> Owner<S> {
    /// The log is poisoned: nothing is appended before its tail is rewritten.
    pub(super) fn begin_repair(&mut self, cause: String) {
        if self.repair.is_none() {
            tracing::error!(replica = %self.replica, cause, "a log segment failed: rewriting what is not durable into a new one");
            self.repair = Some(Repair {
                cause,
                retry: Retry::default(),
                rewriting: false,
            });
            self.moved = true;
        }
    }

    pub(super) fn step_repair(&mut self) {
        let now = self.now.mono;
        if !self
            .repair
            .as_ref()
            .is_some_and(|repair| !repair.rewriting && repair.retry.ready(now))
        {
            return;
        }
        // `None` while the sync that may still succeed is under way: its result decides what is to be rewritten.
        let Some(rewrite) = self.log.begin_rewrite(self.saved.tuning.segment_bytes) else {
            return;
        };
        if let Some(repair) = &mut self.repair {
            repair.rewriting = true;
        }
        self.job(Purpose::Rewrite, Job::Rewrite(rewrite));
    }

    pub(super) fn tail_rewritten(&mut self, result: io::Result<Rewritten<S::File>>) {
        let Some(mut repair) = self.repair.take() else {
            unreachable!("a repair was under way")
        };
        match result {
            Ok(done) => {
                let replaced = self.log.finish_rewrite(done);
                let gone = replaced.into_iter().chain(std::mem::take(&mut self.stale));
                self.discarded.extend(gone.map(FileId::Segment));
                self.overlay.sync_issued();
                self.overlay.sync_succeeded();
                self.commit.settled_at(self.log.durable().lsn);
                self.changed |= self.faults.clear(|fault| matches!(fault, Fault::LogStoreFailed { .. }));
                self.became_durable();
            }
            Err(error) => {
                self.log.rewrite_failed();
                repair.rewriting = false;
                repair.retry.failed(self.now.mono, &mut self.rng);
                let message = format!(
                    "{}; rewriting the tail failed too: {error}; writers wait, retrying",
                    repair.cause
                );
                tracing::error!(replica = %self.replica, message);
                self.changed |= self.faults.set(Fault::LogStoreFailed { message });
                self.repair = Some(repair);
            }
        }
        self.moved = true;
    }

    /// Removes files that are not part of the log any more.
    pub(super) fn step_discard(&mut self) {
        if self.discarded.is_empty() {
            return;
        }
        let ids = std::mem::take(&mut self.discarded);
        self.job(Purpose::Discard, Job::Remove(ids));
    }

    pub(super) fn discard_done(&mut self, result: io::Result<()>) {
        if let Err(error) = result {
            tracing::warn!(replica = %self.replica, %error, "removing unused log files failed; the next start removes them");
        }
        self.moved = true;
    }
}
