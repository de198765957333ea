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
        self.saved_waiters.push_back((generation, id));
        self.moved = true;
    }

    pub(super) fn step_saver(&mut self) {
        if !self.saver.is_due() || !self.saver.retry.ready(self.now.mono) {
            return;
        }
        self.saved.durable = self.log.durable();
        self.saved.clock = self.lamport();
        if let Some(first) = self.log.segments().first() {
            self.saved.log.started = true;
            self.saved.log.first_segment = self.saved.log.first_segment.min(first.name.number);
        }
        self.saver.begin(self.saved.applied.lsn);
        let image = self.slots.next(&self.saved.encode());
        self.job(Purpose::Slot, Job::SaveSlot(image));
    }

    pub(super) fn slot_saved(&mut self, result: io::Result<()>) {
        self.saver.finish(result.is_ok());
        match result {
            Ok(()) => {
                self.slots.saved();
                self.saver.retry.succeeded();
                self.changed |= self.faults.clear(|fault| matches!(fault, Fault::StateFailed { .. }));
                while let Some((_, id)) = self.saved_waiters.pop_front_if(|(wanted, _)| self.saver.is_durable(*wanted)) {
                    self.done(id);
                }
                self.segments.look_again();
            }
            Err(error) => {
                let message = format!("saving the state: {error}; retrying");
                tracing::error!(replica = %self.replica, message);
                self.changed |= self.faults.set(Fault::StateFailed { message });
                self.saver.retry.failed(self.now.mono, &mut self.rng);
            }
        }
        self.moved = true;
    }
}
