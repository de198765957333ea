//! Becoming primary: load everything local, save role and lineage, begin the epoch.
//!
//! Invariants: the role is in the slot before the first request is taken; everything local is in the overlay or on the data disk
//! before that; an epoch begins exactly at the durable end of the log.

use super::Owner;
use super::operation::Operation;
use super::saver::Generation;
use crate::api::{Answer, CommandId, DataState, Fault, Refusal, Role};
use crate::lineage::{Cause, EpochEntry};
use crate::roles::{self, Standing};
use crate::state::SavedRole;
use crate::store::Store;
use crate::types::{Designation, EpochId};
use rand::Rng;

/// Where a promotion stands.
#[derive(Debug)]
pub(super) enum Promote {
    /// Everything local is made durable and loaded.
    Loading,
    /// Role and lineage are being saved.
    Saving(Generation, Option<EpochEntry>),
    /// The first segment of the epoch is being prepared.
    Beginning(EpochEntry),
}

impl<S: Store> Owner<S> {
    pub(super) fn begin_promote(
        &mut self,
        id: CommandId,
        designation: Designation,
        cause: Cause,
    ) -> Result<(), Refusal> {
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

    pub(super) fn begin_resume(&mut self, id: CommandId, designation: Designation) -> Result<(), Refusal> {
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

    pub(super) fn begin_loading(&mut self, id: CommandId, designation: Designation, cause: Option<Cause>) {
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
    pub(super) fn abort_loading(&mut self) {
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

    pub(super) fn step_promote(
        &mut self,
        id: CommandId,
        designation: Designation,
        cause: Option<Cause>,
        stage: Promote,
    ) -> Option<Operation> {
        if let Err(refusal) = roles::check_designation(self.saved.designation, designation) {
            self.promotion_overtaken(cause, stage);
            self.refuse(id, refusal);
            return None;
        }
        let next = match stage {
            Promote::Loading => {
                if let Some(refusal) = self.loading_failed() {
                    self.role = Role::Secondary;
                    self.changed = true;
                    self.refuse(id, refusal);
                    return None;
                }
                let loaded = self.is_all_replayed() && self.log.durable() == self.log.appended();
                if !loaded || self.commit.is_in_flight() || self.repair.is_some() {
                    Promote::Loading
                } else {
                    let entry = cause.map(|cause| self.new_epoch(cause));
                    let for_slot = entry.clone();
                    // Going on without the damaged part of a log is what the order says: it is not missed at the next start.
                    let durable = self.log.durable().lsn;
                    self.defect_until = None;
                    let generation = self.save(|saved| {
                        saved.designation = designation;
                        saved.role = SavedRole::Primary { granted: designation };
                        saved.data = DataState::Consistent;
                        (saved.sync, saved.waypoint) = (None, None);
                        saved.durable = durable;
                        if let Some(entry) = for_slot {
                            saved.lineage.push(entry);
                        }
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

    /// A newer designation was heard of before the epoch began: the role is not taken, and no history forks.
    fn promotion_overtaken(&mut self, cause: Option<Cause>, stage: Promote) {
        tracing::warn!(replica = %self.replica, "a newer designation ends a promotion before its epoch");
        self.role = Role::Secondary;
        self.resumable = None;
        self.changed = true;
        let entry = match stage {
            Promote::Loading => None,
            Promote::Saving(_, entry) => entry,
            Promote::Beginning(entry) => Some(entry),
        };
        self.save(|saved| {
            saved.role = SavedRole::Secondary;
            if let Some(entry) = entry {
                saved.lineage.0.retain(|known| known.id != entry.id);
            }
            if cause == Some(Cause::Create) && saved.lineage.0.is_empty() {
                saved.data = DataState::Syncing;
            }
        });
    }

    pub(super) fn loading_failed(&self) -> Option<Refusal> {
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

    pub(super) fn new_epoch(&mut self, cause: Cause) -> EpochEntry {
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

    pub(super) fn promoted(&mut self, id: CommandId) -> Option<Operation> {
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
}
