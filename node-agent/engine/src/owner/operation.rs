//! Orders: the quick ones, and the ones that take several steps – one of these at a time.
//!
//! Each operation is a state machine whose every state waits for something that an event brings (a save, durability, a job), so a
//! crash between two states leaves what recovery knows how to continue.
//!
//! Invariants: no write is acknowledged after `Close`; the primary role is in the slot before the first request is taken, and the
//! end of it before the release is told; a copy is announced in *both* slots before anything is overwritten (P5, P11).

use super::saver::Generation;
use super::submit::Then;
use super::{Owner, Purpose};
use crate::api::{Answer, Command, CommandId, DataState, Fault, Refusal, Released, Role};
use crate::format::record::RecordKind;
use crate::jobs::Job;
use crate::lineage::{Cause, EpochEntry, Lineage};
use crate::log::LogWriter;
use crate::log::writer::LogState;
use crate::roles::{self, Close, Standing};
use crate::state::{LogOrigin, SavedRole, SavedSync};
use crate::store::{FileId, SegmentName, Store};
use crate::types::{BLOCK_BYTES, Designation, EpochId, Lamport, Position, ReplicaId};
use bytes::Bytes;
use rand::Rng;
use std::io;

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

#[derive(Debug)]
pub(super) enum Promote {
    /// Everything local is made durable and loaded.
    Loading,
    /// Role and lineage are being saved.
    Saving(Generation, Option<EpochEntry>),
    /// The first segment of the epoch is being prepared.
    Beginning(EpochEntry),
}

#[derive(Debug)]
pub(super) enum Closing {
    /// The record waits for what came before it and for durability.
    Recording,
    /// The data disk gets everything up to this end.
    WritingBack(Position),
    /// The role is being saved.
    Saving(Position, Generation),
}

/// The log is thrown away and begins anew.
#[derive(Debug)]
pub(super) struct Restart {
    start: Position,
    lineage: Lineage,
    sync: Option<SavedSync>,
    size_bytes: Option<u64>,
    /// Segments of the old log.
    old: Vec<SegmentName>,
}

#[derive(Debug)]
pub(super) enum Restarting {
    /// Jobs that touch log or data come back first.
    Quiescing,
    /// The first slot is being written, then the second.
    SavingFirst(Generation),
    SavingSecond(Generation),
    /// The old segments are being removed.
    Removing,
}

impl<S: Store> Owner<S> {
    /// Takes an order: done at once, begun, or refused.
    pub(super) fn order(&mut self, id: CommandId, command: Command) {
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
                let generation = self.save(|saved| saved.tuning = tuning);
                self.log.set_compression(tuning.compression);
                self.done_when_saved(id, generation);
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
        if self.operation.is_some() || self.sync.is_flushing() {
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
                let restart = Restart {
                    start: Position::default(),
                    lineage: Lineage::default(),
                    sync: None,
                    size_bytes: None,
                    old: Vec::new(),
                };
                self.begin_restart(id, restart)
            }
            Command::BeginSync {
                source,
                start,
                lineage,
                size_bytes,
            } => {
                self.secondary_only("a primary is never the target of a sync")?;
                match self.plan_sync(source, start, lineage, size_bytes)? {
                    Some(restart) => self.begin_restart(id, restart),
                    None => {
                        let generation = self.saver.request();
                        self.done_when_saved(id, generation);
                        return Ok(());
                    }
                }
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

    fn begin_promote(&mut self, id: CommandId, designation: Designation, cause: Cause) -> Result<(), Refusal> {
        if self.role == Role::Primary {
            roles::check_designation(self.saved.designation, designation)?;
            let generation = self.save(|saved| {
                saved.designation = designation;
                saved.role = SavedRole::Primary { granted: designation };
            });
            self.done_when_saved(id, generation);
            return Ok(());
        }
        let standing = Standing {
            me: self.replica,
            role: self.role,
            data: &self.saved.data,
            known: self.saved.designation,
            trailing_close: self.trailing_close,
            log_defect: self.faults.any(|fault| matches!(fault, Fault::LogDefect { .. })),
            is_blank: self.saved.lineage.0.is_empty(),
            sync_begun: self.saved.sync.is_some(),
        };
        roles::may_promote(&standing, designation, cause)?;
        self.begin_loading(id, designation, Some(cause));
        Ok(())
    }

    fn begin_resume(&mut self, id: CommandId, designation: Designation) -> Result<(), Refusal> {
        let Some(resumable) = self.resumable.filter(|_| self.role == Role::Secondary) else {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "nothing to resume: it was not primary before, or a newer designation is known",
            });
        };
        if resumable.designation != designation {
            let (asked, known) = (designation.number, resumable.designation.number);
            return Err(Refusal::StaleDesignation { asked, known });
        }
        if !self.is_consistent() {
            return Err(Refusal::Inconsistent {
                data: self.saved.data.clone(),
            });
        }
        let cause = self.resume_cause;
        self.begin_loading(id, designation, cause);
        Ok(())
    }

    fn begin_loading(&mut self, id: CommandId, designation: Designation, cause: Option<Cause>) {
        self.refuse_inbound("it is being promoted");
        self.role = Role::Promoting;
        self.operation = Some(Operation::Promote {
            id,
            designation,
            cause,
            stage: Promote::Loading,
        });
        self.changed = true;
        self.moved = true;
    }

    /// A shutdown does not wait for a promotion that still loads.
    fn abort_loading(&mut self) {
        if let Some(Operation::Promote {
            id,
            stage: Promote::Loading,
            ..
        }) = self.operation
        {
            self.operation = None;
            self.role = Role::Secondary;
            self.refuse(
                id,
                Refusal::WrongRole {
                    role: Role::Secondary,
                    hint: "the replica is being shut down",
                },
            );
        }
    }

    fn begin_close(&mut self, id: CommandId, close: Close) -> Result<(), Refusal> {
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

    fn begin_restart(&mut self, id: CommandId, restart: Restart) -> Operation {
        self.refuse_inbound("its log is being thrown away");
        Operation::Restart {
            id,
            restart: Box::new(restart),
            stage: Restarting::Quiescing,
        }
    }

    pub(super) fn restart_for_sync(start: Position, lineage: Lineage, sync: SavedSync, size_bytes: u64) -> Restart {
        Restart {
            start,
            lineage,
            sync: Some(sync),
            size_bytes: Some(size_bytes),
            old: Vec::new(),
        }
    }

    fn check_resize(&self, size_bytes: u64) -> Result<(), Refusal> {
        if self.role != Role::Primary {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "resize on the primary; the others follow through the log",
            });
        }
        if size_bytes % BLOCK_BYTES != 0 || size_bytes < self.size_bytes() {
            let now = self.size_bytes();
            return Err(Refusal::Invalid(format!(
                "size {size_bytes} must be a multiple of {BLOCK_BYTES} and not smaller than the present {now} bytes"
            )));
        }
        Ok(())
    }

    /// Whether the log that is there is about to go: nothing more is loaded from it or written back.
    pub(super) fn is_discarding_log(&self) -> bool {
        matches!(self.operation, Some(Operation::Restart { .. }))
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
            Operation::Restart { id, restart, stage } => self.step_restart(id, restart, stage),
            Operation::Rotate { id } => self.step_rotate(id),
            Operation::Shutdown { id } => self.step_shutdown(id),
            waiting @ Operation::Resize { .. } => Some(waiting),
        };
    }

    fn step_promote(
        &mut self,
        id: CommandId,
        designation: Designation,
        cause: Option<Cause>,
        stage: Promote,
    ) -> Option<Operation> {
        let next = match stage {
            Promote::Loading => {
                if let Some(refusal) = self.loading_failed() {
                    self.role = Role::Secondary;
                    self.refuse(id, refusal);
                    return None;
                }
                let loaded = self.is_all_replayed() && self.log.durable() == self.log.appended();
                if !loaded || self.commit.is_in_flight() || self.repair.is_some() {
                    Promote::Loading
                } else {
                    let entry = cause.map(|cause| self.new_epoch(cause));
                    let for_slot = entry.clone();
                    let generation = self.save(|saved| {
                        saved.designation = designation;
                        saved.role = SavedRole::Primary { granted: designation };
                        saved.data = DataState::Consistent;
                        saved.lineage.0.extend(for_slot);
                    });
                    Promote::Saving(generation, entry)
                }
            }
            Promote::Saving(generation, entry) if self.saver.is_durable(generation) => match entry {
                Some(entry) => {
                    self.moved = true;
                    Promote::Beginning(entry)
                }
                None => return self.promoted(id),
            },
            Promote::Beginning(entry) => match self.begin_epoch(entry.clone()) {
                Ok(()) => return self.promoted(id),
                Err(error) => {
                    self.append_failed(error);
                    Promote::Beginning(entry)
                }
            },
            waiting @ Promote::Saving(..) => waiting,
        };
        Some(Operation::Promote {
            id,
            designation,
            cause,
            stage: next,
        })
    }

    fn loading_failed(&self) -> Option<Refusal> {
        self.faults.list().iter().find_map(|fault| match fault {
            Fault::LogDefect { lsn, .. } if *lsn >= self.replay.cursor().lsn && *lsn < self.log.durable().lsn => {
                Some(Refusal::Io(format!(
                    "the local log is damaged at {lsn}: let it be fetched again from a member"
                )))
            }
            Fault::DiskTooSmall {
                wanted_bytes,
                disk_bytes,
            } => Some(Refusal::Io(format!(
                "the local disk has {disk_bytes} bytes, the log asks for {wanted_bytes}: enlarge it first"
            ))),
            _ => None,
        })
    }

    fn new_epoch(&mut self, cause: Cause) -> EpochEntry {
        let id = EpochId(uuid::Builder::from_random_bytes(self.rng.random()).into_uuid());
        let lamport = self.lamport();
        EpochEntry {
            id,
            parent: self.log.appended(),
            origin: self.replica,
            cause,
            lamport,
        }
    }

    fn promoted(&mut self, id: CommandId) -> Option<Operation> {
        self.role = Role::Primary;
        self.resumable = None;
        self.saved.released = None;
        self.trailing_close = None;
        self.faults
            .clear(|fault| matches!(fault, Fault::LogDefect { .. } | Fault::Orphan { .. }));
        self.replay.passed(self.log.durable(), self.durable_time);
        self.changed = true;
        self.reply(id, Ok(Answer::At(self.log.appended())));
        None
    }

    fn step_close(&mut self, id: CommandId, close: Close, stage: Closing) -> Option<Operation> {
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
                        saved.designation = close.designation;
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

    fn become_secondary(&mut self) {
        assert!(
            self.tail.is_empty(),
            "a role ends only when everything appended is durable"
        );
        self.role = Role::Secondary;
        self.resumable = None;
        self.changed = true;
        self.moved = true;
    }

    fn step_down(&mut self, id: CommandId, designation: Designation, saving: Option<Generation>) -> Option<Operation> {
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
                saved.designation = designation;
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
    fn is_drained(&self) -> bool {
        let durable = self.log.durable().lsn == self.log.appended().lsn;
        durable && !self.requests.has_held() && !self.commit.is_in_flight() && self.repair.is_none()
    }

    fn step_restart(&mut self, id: CommandId, mut restart: Box<Restart>, stage: Restarting) -> Option<Operation> {
        let stage = match stage {
            Restarting::Quiescing => {
                if !self.is_quiet() {
                    return Some(Operation::Restart { id, restart, stage });
                }
                Restarting::SavingFirst(self.save_restart(&mut restart))
            }
            Restarting::SavingFirst(generation) if self.saver.is_durable(generation) => {
                self.moved = true;
                Restarting::SavingSecond(self.saver.request())
            }
            Restarting::SavingSecond(generation) if self.saver.is_durable(generation) => {
                let old = std::mem::take(&mut restart.old)
                    .into_iter()
                    .map(FileId::Segment)
                    .collect();
                self.job(Purpose::Operation, Job::Remove(old));
                Restarting::Removing
            }
            waiting => waiting,
        };
        Some(Operation::Restart { id, restart, stage })
    }

    /// No job is out that reads the log or writes anywhere but to a slot.
    fn is_quiet(&self) -> bool {
        self.jobs
            .values()
            .all(|purpose| matches!(purpose, Purpose::Slot | Purpose::DiskSize | Purpose::Read { .. }))
            && self.repair.is_none()
            && self.flight.may_be_dropped()
    }

    fn save_restart(&mut self, restart: &mut Restart) -> Generation {
        self.drop_overlay();
        restart.old = self.drop_log(restart.start, &restart.lineage);
        self.replay
            .reset(restart.start, restart.size_bytes.unwrap_or(self.saved.size_bytes));
        self.saved.released = None;
        self.trailing_close = None;
        self.resumable = None;
        self.defect_until = None;
        self.faults.clear(|fault| {
            matches!(
                fault,
                Fault::LogDefect { .. } | Fault::Fork { .. } | Fault::Orphan { .. } | Fault::DiskTooSmall { .. }
            )
        });
        let first_segment = self.log.next_number();
        let (start, lineage, sync) = (restart.start, restart.lineage.clone(), restart.sync);
        let size_bytes = self.replay.size_bytes();
        self.save(|saved| {
            saved.data = DataState::Syncing;
            saved.role = SavedRole::Secondary;
            saved.sync = sync;
            saved.size_bytes = size_bytes;
            (saved.applied, saved.dirty_end, saved.durable) = (start, start, start);
            saved.log = LogOrigin {
                first_segment,
                start,
                started: false,
            };
            saved.lineage = lineage;
        })
    }

    /// Replaces the log by an empty one that begins at `start`; says which files were the old one.
    fn drop_log(&mut self, start: Position, lineage: &Lineage) -> Vec<SegmentName> {
        let mut old: Vec<SegmentName> = self.log.segments().iter().map(|segment| segment.name).collect();
        old.extend(self.log.take_prepared());
        let epoch = lineage.0.last().cloned().unwrap_or_else(|| blank_epoch(self.replica));
        let state = LogState::empty(self.identity, self.log.next_number(), epoch, start);
        self.log = LogWriter::new(state, self.saved.tuning.compression);
        self.tail.clear();
        self.commit.settled_at(start.lsn);
        old
    }

    pub(super) fn operation_job_done(&mut self, result: io::Result<()>) {
        let Some(Operation::Restart { id, .. }) = self.operation.take() else {
            unreachable!("only a restart has jobs")
        };
        if let Err(error) = result {
            // They are not part of the log any more, whatever happens: the next start removes them.
            tracing::warn!(replica = %self.replica, %error, "removing old log segments failed");
        }
        self.changed = true;
        self.done(id);
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
            self.append_control(RecordKind::Resize, size_bytes, Bytes::new(), Then::Reply(id));
        }
    }

    fn step_shutdown(&mut self, id: CommandId) -> Option<Operation> {
        if self.saver.is_clean() && self.is_drained() && self.is_all_applied() && self.is_quiet() {
            self.done(id);
            self.is_shut_down = true;
            return None;
        }
        Some(Operation::Shutdown { id })
    }
}

/// Stands for "no epoch yet" in a log without history.
pub(super) fn blank_epoch(origin: ReplicaId) -> EpochEntry {
    let (id, parent, lamport) = (EpochId::default(), Position::default(), Lamport::default());
    EpochEntry {
        id,
        parent,
        origin,
        cause: Cause::Create,
        lamport,
    }
}
