//! Saving the state: composing it, the slot job, and those who wait for it.
//!
//! Invariant: what is saved is true on stable storage at the time of saving.

use super::saver::Generation;
use super::{Owner, Purpose};
use crate::api::{CommandId, Fault};
use crate::jobs::Job;
use crate::store::Store;
use std::io;

impl<S: Store> Owner<S> {
    /// Answers `Done` once `generation` is on stable storage.
    pub(super) fn done_when_saved(&mut self, id: CommandId, generation: Generation) {
        if self.saver.is_durable(generation) {
            return self.done(id);
        }
        self.saved_waiters.push_back((generation, id));
        self.moved = true;
    }

    pub(super) fn step_saver(&mut self) {
        if !self.is_shut_down {
            self.saver.collect_evidence(self.now.mono);
        }
        if !self.saver.is_due() || !self.saver.retry.ready(self.now.mono) {
            return;
        }
        // Only grows: a tail that is being rewritten, and damage that is to be fetched again, must not make us forget how far the log was
        // durable. Throwing a log away, or going on without its damaged part, sets it by itself.
        self.saved.durable = self.saved.durable.max(self.log.durable().lsn);
        self.saved.clock = self.clock.last();
        if self.resumable.is_none() {
            self.saved.boot_id = self.boot_id;
        }
        match self.slots.prepare(&self.saved) {
            Ok(write) => {
                self.saver.begin(self.saved.applied.lsn);
                self.job(Purpose::Slot, Job::SaveSlot(write));
            }
            Err(error) => self.saving_failed(&error.to_string()),
        }
    }

    fn saving_failed(&mut self, why: &str) {
        let message = format!("saving the state: {why}; retrying");
        tracing::error!(replica = %self.replica, message);
        self.changed |= self.faults.set(Fault::StateFailed { message });
        self.saver.retry.failed(self.now.mono, &mut self.rng);
    }

    pub(super) fn slot_saved(&mut self, result: io::Result<()>) {
        self.saver.finish(result.is_ok());
        match result {
            Ok(()) => {
                self.saver.retry.succeeded();
                self.changed |= self.faults.clear(|fault| matches!(fault, Fault::StateFailed { .. }));
                self.checkpoint_saved();
                while let Some((_, id)) = self
                    .saved_waiters
                    .pop_front_if(|(wanted, _)| self.saver.is_durable(*wanted))
                {
                    self.done(id);
                }
                self.segments.look_again();
            }
            Err(error) => {
                self.slots.save_failed();
                self.saving_failed(&error.to_string());
            }
        }
        self.moved = true;
    }
}
