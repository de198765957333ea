//! Orders: the quick ones, and the ones that take several steps – one of these at a time.
//!
//! Each operation is a state machine whose every state waits for something that an event brings (a save, durability, a job), so a
//! crash between two states leaves what recovery knows how to continue.
//!
//! Invariant: one such operation at a time; a second one is refused, never mixed in.

use super::close::Closing;
use super::promote::Promote;
use super::restart::{Restart, Restarting};
use super::saver::Generation;
use super::submit::Then;
use super::{Owner, Purpose};
use crate::api::{Answer, Command, CommandId, Durability, Fault, Refusal, Role};
use crate::format::record::RecordKind;
use crate::jobs::Job;
use crate::lineage::Cause;
use crate::roles::{self, Close};
use crate::store::Store;
use crate::types::{BLOCK_BYTES, Designation};
use bytes::Bytes;

/// An order under way.
#[derive(Debug)]
pub(super) enum Operation {
    Promote {
        id: CommandId,
        designation: Designation,
        cause: Option<Cause>,
        stage: Promote,
    },
    Close {
        id: CommandId,
        close: Close,
        stage: Closing,
    },
    StepDown {
        id: CommandId,
        designation: Designation,
        saving: Option<Generation>,
    },
    Restart {
        id: CommandId,
        restart: Box<Restart>,
        stage: Restarting,
    },
    Resize {
        id: CommandId,
        size_bytes: u64,
    },
    Rotate {
        id: CommandId,
    },
    Shutdown {
        id: CommandId,
    },
}

impl<S: Store> Owner<S> {
    /// Takes an order: done at once, begun, or refused.
    pub(super) fn order(&mut self, id: CommandId, command: Command) {
        if self.is_shut_down {
            return self.refuse(
                id,
                Refusal::WrongRole {
                    role: self.role,
                    hint: "the replica is shut down: open it again",
                },
            );
        }
        match command {
            Command::AcceptLog(chunk) => self.accept_log(id, chunk),
            Command::AcceptEpoch(entry) => self.accept_epoch(id, entry),
            Command::PeerReport { peer, durable } => self.peer_report(id, peer, durable),
            Command::SetMembers(members) => self.set_members(id, &members),
            Command::SetSwitches(switches) => {
                let generation = self.save(|saved| saved.switches = switches);
                self.done_when_saved(id, generation);
            }
            Command::SetTuning(tuning) => {
                if let Err(what) = tuning.check() {
                    return self.refuse(id, Refusal::Invalid(what));
                }
                let generation = self.save(|saved| saved.tuning = tuning);
                self.log.set_compression(tuning.compression);
                if tuning.durability == Durability::EveryWrite {
                    self.harden_writes(id, generation);
                } else {
                    self.done_when_saved(id, generation);
                }
            }
            Command::SetReplicationFault(fault) => {
                self.changed |= self
                    .faults
                    .clear(|fault| matches!(fault, Fault::Fork { .. } | Fault::Orphan { .. }));
                if let Some(fault) = fault {
                    self.changed |= self.faults.set(fault);
                }
                self.done(id);
            }
            Command::NameDefect(stop) => self.served_defect(id, &stop),
            Command::ExchangeDisk(disk) => self.begin_exchange(id, disk),
            Command::Observe { designation } => self.observe(id, designation),
            Command::SyncWrite { range, data } => self.sync_write(id, range, data),
            Command::SyncCheckpoint { done_bytes } => self.sync_checkpoint(id, done_bytes),
            Command::FinishSync { dirty_end } => self.finish_sync(id, dirty_end),
            Command::Mark { name } => match self.role {
                Role::Primary => self.append_control(RecordKind::Marker, 0, Bytes::from(name), Then::Reply(id)),
                role => self.refuse(
                    id,
                    Refusal::WrongRole {
                        role,
                        hint: "markers are set on the primary",
                    },
                ),
            },
            command @ (Command::Promote { .. }
            | Command::Resume { .. }
            | Command::Close { .. }
            | Command::StepDown { .. }
            | Command::Invalidate
            | Command::BeginSync { .. }
            | Command::Resize { .. }
            | Command::Rotate
            | Command::Shutdown) => {
                if let Err(refusal) = self.begin_operation(id, command) {
                    self.refuse(id, refusal);
                }
            }
        }
    }

    fn begin_operation(&mut self, id: CommandId, command: Command) -> Result<(), Refusal> {
        if matches!(command, Command::Shutdown) {
            self.abort_loading();
        }
        let role = self.role;
        if self.operation.is_some() || self.sync.is_busy() {
            return Err(Refusal::WrongRole {
                role,
                hint: "another operation is under way: try again after it",
            });
        }
        let operation = match command {
            Command::Promote { designation, cause } => return self.begin_promote(id, designation, cause),
            Command::Resume { designation } => return self.begin_resume(id, designation),
            Command::Close { designation, to } => return self.begin_close(id, Close { to, designation }),
            Command::StepDown { designation } => {
                roles::check_designation(self.saved.designation, designation)?;
                if role == Role::Primary {
                    self.role = Role::Closing;
                }
                Operation::StepDown {
                    id,
                    designation,
                    saving: None,
                }
            }
            Command::Invalidate => {
                self.secondary_only("hand over first, then invalidate")?;
                self.begin_restart(id, Restart::default())
            }
            Command::BeginSync {
                source,
                start,
                lineage,
                size_bytes,
                log_start,
            } => {
                self.secondary_only("a primary is never the target of a sync")?;
                let Some(restart) = self.plan_sync((source, start), lineage, size_bytes, log_start)? else {
                    self.go_on_with_sync(id);
                    return Ok(());
                };
                self.begin_restart(id, restart)
            }
            Command::Resize { size_bytes } => {
                self.check_resize(size_bytes)?;
                self.job(Purpose::DiskSize, Job::Size(self.data.clone()));
                Operation::Resize { id, size_bytes }
            }
            Command::Rotate => Operation::Rotate { id },
            Command::Shutdown => {
                self.refuse_inbound("the replica is being shut down");
                if role == Role::Primary {
                    self.role = Role::Closing;
                }
                Operation::Shutdown { id }
            }
            other => unreachable!("{other:?} is not an operation"),
        };
        self.operation = Some(operation);
        self.changed = true;
        self.moved = true;
        Ok(())
    }

    fn secondary_only(&self, hint: &'static str) -> Result<(), Refusal> {
        if self.role == Role::Secondary {
            Ok(())
        } else {
            Err(Refusal::WrongRole { role: self.role, hint })
        }
    }

    fn observe(&mut self, id: CommandId, designation: Designation) {
        if let Err(refusal) = roles::check_designation(self.saved.designation, designation) {
            return self.refuse(id, refusal);
        }
        let generation = self.save(|saved| saved.designation = designation);
        if self
            .resumable
            .is_some_and(|resumable| resumable.designation != designation)
        {
            self.resumable = None;
        }
        self.done_when_saved(id, generation);
    }

    fn check_resize(&self, size_bytes: u64) -> Result<(), Refusal> {
        if self.role != Role::Primary {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "resize on the primary; the others follow through the log",
            });
        }
        if !size_bytes.is_multiple_of(BLOCK_BYTES) || size_bytes < self.size_bytes() {
            let now = self.size_bytes();
            return Err(Refusal::Invalid(format!(
                "size {size_bytes} must be a multiple of {BLOCK_BYTES} and not smaller than the present {now} bytes"
            )));
        }
        Ok(())
    }

    /// Whether the operation under way waits for the data disk to hold everything.
    pub(super) fn wants_all_applied(&self) -> bool {
        matches!(
            self.operation,
            Some(
                Operation::Close {
                    stage: Closing::WritingBack(_),
                    ..
                } | Operation::Shutdown { .. }
            )
        )
    }

    /// A secondary that is being shut down loads nothing more.
    pub(super) fn is_shutting_down(&self) -> bool {
        matches!(self.operation, Some(Operation::Shutdown { .. }))
    }

    /// Moves the operation under way as far as it goes now.
    pub(super) fn step_operation(&mut self) {
        let Some(operation) = self.operation.take() else { return };
        self.operation = match operation {
            Operation::Promote {
                id,
                designation,
                cause,
                stage,
            } => self.step_promote(id, designation, cause, stage),
            Operation::Close { id, close, stage } => self.step_close(id, close, stage),
            Operation::StepDown {
                id,
                designation,
                saving,
            } => self.step_down(id, designation, saving),
            Operation::Restart { id, restart, stage } => Some(self.step_restart(id, restart, stage)),
            Operation::Rotate { id } => self.step_rotate(id),
            Operation::Shutdown { id } => self.step_shutdown(id),
            waiting @ Operation::Resize { .. } => Some(waiting),
        };
    }

    fn step_rotate(&mut self, id: CommandId) -> Option<Operation> {
        let lamport = self.lamport();
        match self.log.rotate(lamport) {
            Ok(()) => {
                self.reply(id, Ok(Answer::At(self.log.appended())));
                None
            }
            Err(error) => {
                self.append_failed(error);
                Some(Operation::Rotate { id })
            }
        }
    }

    /// The data disk was asked for its size: a resize goes on, or is refused.
    pub(super) fn resize_answered(&mut self) {
        let Some(Operation::Resize { id, size_bytes }) = self.operation else {
            return;
        };
        self.operation = None;
        if size_bytes > self.disk_bytes {
            let disk = self.disk_bytes;
            let message = format!(
                "the local disk has {disk} bytes: enlarge it (on every member) before the device grows to {size_bytes}"
            );
            self.refuse(id, Refusal::Invalid(message));
        } else {
            self.append_resize(size_bytes, Then::Reply(id));
        }
    }
}
