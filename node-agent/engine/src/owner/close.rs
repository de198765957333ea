//! Ceasing to be primary: close for a handover, step down, shut down.
//!
//! Invariants: no write is acknowledged after `Close`; the release is told only after `Close` and the slot are durable; what was
//! accepted before is in the log, whatever comes.

use super::Owner;
use super::operation::Operation;
use super::saver::Generation;
use super::submit::Then;
use crate::api::{Answer, CommandId, Fault, Refusal, Released, Role};
use crate::format::record::RecordKind;
use crate::roles::{self, Close};
use crate::state::SavedRole;
use crate::store::Store;
use crate::types::{Designation, Position};
use bytes::Bytes;

/// Where a close stands.
#[derive(Debug)]
pub(super) enum Closing {
    /// The record waits for what came before it and for durability.
    Recording,
    /// The data disk gets everything up to this end.
    WritingBack(Position),
    /// The role is being saved.
    Saving(Position, Generation),
}

impl<S: Store> Owner<S> {
    pub(super) fn begin_close(&mut self, id: CommandId, close: Close) -> Result<(), Refusal> {
        if let Some(released) = self
            .saved
            .released
            .filter(|released| released.designation == close.designation)
        {
            self.reply(id, Ok(Answer::At(released.end)));
            return Ok(());
        }
        roles::check_designation(self.saved.designation, close.designation)?;
        if self.role != Role::Primary {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "only a primary closes; Observe persists the designation",
            });
        }
        self.role = Role::Closing;
        self.append_control(RecordKind::Close, 0, Bytes::from(close.encode()), Then::Operation);
        self.operation = Some(Operation::Close {
            id,
            close,
            stage: Closing::Recording,
        });
        self.changed = true;
        Ok(())
    }

    /// The control record of the operation under way is durable.
    pub(super) fn control_durable(&mut self, at: Position) {
        if let Some(Operation::Close { stage, .. }) = &mut self.operation {
            *stage = Closing::WritingBack(at);
            self.moved = true;
        }
    }

    pub(super) fn step_close(&mut self, id: CommandId, close: Close, stage: Closing) -> Option<Operation> {
        let stage = match stage {
            Closing::WritingBack(end) => {
                // A data disk that fails must not hold the service: the log keeps everything.
                let disk_failed = self.faults.any(|fault| matches!(fault, Fault::DataDiskFailed { .. }));
                if !self.is_all_applied() && !disk_failed {
                    Closing::WritingBack(end)
                } else {
                    let released = Released {
                        designation: close.designation,
                        to: close.to,
                        end,
                    };
                    let generation = self.save(|saved| {
                        saved.learn(close.designation);
                        saved.role = SavedRole::Secondary;
                        saved.released = Some(released);
                    });
                    Closing::Saving(end, generation)
                }
            }
            Closing::Saving(end, generation) if self.saver.is_durable(generation) => {
                self.become_secondary();
                self.trailing_close = Some(close);
                self.reply(id, Ok(Answer::At(end)));
                return None;
            }
            waiting @ (Closing::Recording | Closing::Saving(..)) => waiting,
        };
        Some(Operation::Close { id, close, stage })
    }

    pub(super) fn become_secondary(&mut self) {
        assert!(
            self.tail.is_empty(),
            "a role ends only when everything appended is durable"
        );
        self.role = Role::Secondary;
        self.resumable = None;
        self.changed = true;
        self.moved = true;
    }

    pub(super) fn step_down(
        &mut self,
        id: CommandId,
        designation: Designation,
        saving: Option<Generation>,
    ) -> Option<Operation> {
        let saving = match saving {
            Some(generation) if self.saver.is_durable(generation) => {
                if self.role == Role::Closing {
                    self.become_secondary();
                }
                self.resumable = None;
                self.reply(id, Ok(Answer::At(self.log.durable())));
                return None;
            }
            None if self.role == Role::Secondary || self.is_drained() => Some(self.save(|saved| {
                saved.learn(designation);
                saved.role = SavedRole::Secondary;
            })),
            waiting => waiting,
        };
        Some(Operation::StepDown {
            id,
            designation,
            saving,
        })
    }

    /// Nothing waits to be appended, and everything appended is durable.
    pub(super) fn is_drained(&self) -> bool {
        let durable = self.log.durable().lsn == self.log.appended_lsn();
        durable && !self.requests.has_held() && !self.commit.is_in_flight() && self.repair.is_none()
    }

    pub(super) fn step_shutdown(&mut self, id: CommandId) -> Option<Operation> {
        if self.saver.is_clean() && self.is_drained() && self.is_all_applied() && self.is_quiet() {
            self.done(id);
            self.is_shut_down = true;
            return None;
        }
        Some(Operation::Shutdown { id })
    }
}
