//! From what is wanted and what is known to what is done next: a pure function, tested without any machine.
//!
//! Invariants: a device in use is never taken away; nobody becomes or stays primary against a newer designation
//! a replica that was primary goes on after a reboot only with evidence that none is newer (P9); nothing is ever
//! concluded from something that is absent (P12).

mod held;

use super::facts::{Evidence, Facts, Leftover};
use super::todo::{Grant, GrantCause, Todo};
use held::{effective_switches, hold_or_let_go, left_over};
use mars_engine::api::{DataState, Fault, ReplicaStatus, Resumable, Role, Switches, Tuning};
use mars_engine::lineage::Cause;
use mars_engine::types::{Designation, Position, ReplicaId};
use uuid::Uuid;

/// One thing to do now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Tell the engine the members.
    SetMembers(Vec<ReplicaId>),
    /// Tell the engine the switches.
    SetSwitches(Switches),
    /// Tell the engine durability, compression and budgets.
    SetTuning(Tuning),
    /// Persist a designation that names somebody else.
    Observe(Designation),
    /// Go on as the primary this replica was.
    Resume(Designation),
    /// Become primary.
    Promote {
        /// The grant.
        designation: Designation,
        /// Why.
        cause: Cause,
    },
    /// Persist that this replica will never be primary under this designation.
    RefusePromote {
        /// The grant.
        designation: Designation,
        /// Why.
        reason: String,
    },
    /// Make the device.
    Attach,
    /// Remove the device (refused while in use).
    Detach,
    /// Give up the device that a former life of the agent left: its users get I/O errors.
    Discard,
    /// Write the `Close` record.
    Close {
        /// The order.
        designation: Designation,
        /// Successor.
        to: Option<ReplicaId>,
    },
    /// Become secondary because a newer designation names somebody else.
    StepDown(Designation),
    /// Let go of the data disk; everything loaded is written to it and flushed.
    DetachDisk,
    /// Take the data disk back, unless it was changed meanwhile.
    AttachDisk,
    /// Make the data disk larger.
    GrowDisk(u64),
    /// Append a RESIZE record and let the device grow.
    Resize(u64),
    /// Throw away log and claim of consistency.
    Invalidate(Uuid),
    /// Continue in a new segment.
    Rotate(Uuid),
}

/// Why something wanted is not done yet. Shown as a condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// One word.
    pub reason: &'static str,
    /// Cause and next command.
    pub message: String,
    /// An order under this designation is refused for now (`Close`).
    pub refused_close: Option<Designation>,
}

/// What to do now, and what is being waited for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// In this order; the first failure ends the round.
    pub steps: Vec<Step>,
    /// What holds the rest up.
    pub waiting: Vec<Waiting>,
}

impl Plan {
    fn wait(&mut self, reason: &'static str, message: impl Into<String>) {
        self.waiting.push(Waiting {
            reason,
            message: message.into(),
            refused_close: None,
        });
    }
}

/// Plans the next round.
#[must_use]
pub fn plan(todo: &Todo, facts: &Facts) -> Plan {
    let mut plan = Plan::default();
    if todo.deletion.is_some() {
        if !facts.device_users.is_empty() {
            let users = facts.device_users.join("; ");
            plan.wait(
                "DeviceInUse",
                format!("the replica is being deleted, but its device is in use: {users}. Stop them"),
            );
            if facts.leftover == Leftover::Waiting {
                // They wait for somebody who serves them; only then can they stop.
                match (facts.status.role, facts.status.resumable) {
                    (Role::Primary, _) => plan.steps.push(Step::Attach),
                    (Role::Secondary, Some(resumable)) => after_restart(todo, facts, resumable, &mut plan),
                    (Role::Secondary, None) => left_over(todo, facts, &mut plan),
                    (Role::Promoting | Role::Closing, _) => {}
                }
            }
        }
        return plan;
    }
    configure(todo, facts, &mut plan);
    match facts.status.role {
        Role::Primary => while_primary(todo, facts, &mut plan),
        Role::Secondary => while_secondary(todo, facts, &mut plan),
        Role::Promoting => plan.wait("Promoting", "the local log is being replayed before the role is taken"),
        Role::Closing => plan.wait("Closing", "the end of the history is being made durable"),
    }
    plan
}

fn configure(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    let mut members: Vec<ReplicaId> = todo.peers.iter().map(|peer| peer.replica).collect();
    members.sort_unstable();
    let mut known: Vec<ReplicaId> = facts.status.members.iter().map(|member| member.replica).collect();
    known.sort_unstable();
    if members != known {
        plan.steps.push(Step::SetMembers(members));
    }
    let switches = effective_switches(todo, facts);
    if switches != facts.status.switches {
        plan.steps.push(Step::SetSwitches(switches));
    }
    if facts.tuning != Some(todo.tuning) {
        plan.steps.push(Step::SetTuning(todo.tuning));
    }
    if todo.size_bytes > facts.disk_bytes {
        if facts.done.detached.is_none() {
            plan.steps.push(Step::GrowDisk(todo.size_bytes));
        } else {
            plan.wait(
                "Detached",
                format!(
                    "the data disk is detached, so it cannot grow to {} bytes: switch attach on",
                    todo.size_bytes
                ),
            );
        }
    }
}

/// Whether `a` overrules `b`.
fn newer(a: Designation, b: Designation) -> bool {
    a.number > b.number
}

fn while_primary(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    let under = facts.status.designation;
    if let Some(leave) = order_to_leave(todo, facts, under) {
        return leave_primary(facts, leave, plan);
    }
    match todo.grant {
        // An aborted handover is granted back under a newer number: persisted by taking the role again.
        Grant::Primary { designation, cause } if newer(designation, under) => {
            plan.steps.push(Step::Promote {
                designation,
                cause: engine_cause(cause),
            });
        }
        Grant::Primary { designation, .. } if designation != under => plan.wait(
            "StaleGrant",
            format!(
                "the grant has designation {}, this replica is primary under {}",
                designation.number, under.number
            ),
        ),
        Grant::Secondary { .. } if facts.evidence.from_api => plan.wait(
            "NotDesignated",
            "this replica is primary and no newer designation says otherwise: it goes on until one does",
        ),
        _ => {}
    }
    if todo.size_bytes > facts.status.size_bytes {
        plan.steps.push(Step::Resize(todo.size_bytes));
    }
    one_shot(todo.one_shots.rotate, facts.done.rotate, Step::Rotate, plan);
    if todo
        .one_shots
        .invalidate
        .is_some_and(|id| facts.done.invalidate != Some(id))
    {
        plan.wait(
            "InvalidateRefused",
            "a primary's data is never thrown away: hand over first",
        );
    }
    attach_or_detach(todo, facts, plan);
}

/// Why and how a primary has to leave its role.
#[derive(Debug, Clone, Copy)]
enum Leave {
    Close {
        designation: Designation,
        to: Option<ReplicaId>,
    },
    StepDown {
        designation: Designation,
    },
}

fn order_to_leave(todo: &Todo, facts: &Facts, under: Designation) -> Option<Leave> {
    match todo.grant {
        Grant::Secondary {
            designation: Some(designation),
            close_for: Some(to),
        } if newer(designation, under) => {
            return Some(Leave::Close { designation, to });
        }
        Grant::Secondary {
            designation: Some(designation),
            close_for: None,
        } if newer(designation, under) => {
            return Some(Leave::StepDown { designation });
        }
        _ => {}
    }
    // A peer that merely knows a newer number may know it from a handover whose `Close` is still ours to write; one that
    // acts on it is the fact that counts.
    let designation = newest_acting(facts)?;
    newer(designation, under).then_some(Leave::StepDown { designation })
}

/// The newest designation under which another member is primary, or about to be.
fn newest_acting(facts: &Facts) -> Option<Designation> {
    let acting = facts
        .peers
        .iter()
        .filter(|peer| matches!(peer.role, Some(Role::Primary | Role::Promoting)));
    acting
        .filter_map(|peer| peer.designation)
        .max_by_key(|designation| designation.number)
}

fn leave_primary(facts: &Facts, leave: Leave, plan: &mut Plan) {
    let (designation, step) = match leave {
        Leave::Close { designation, to } => (designation, Step::Close { designation, to }),
        Leave::StepDown { designation } => (designation, Step::StepDown(designation)),
    };
    if !facts.device_users.is_empty() {
        let message = format!(
            "the device is in use: {}. Stop its users and the role goes on its way",
            facts.device_users.join("; ")
        );
        let refused_close = matches!(leave, Leave::Close { .. }).then_some(designation);
        plan.waiting.push(Waiting {
            reason: "DeviceInUse",
            message,
            refused_close,
        });
        return;
    }
    if facts.has_device {
        plan.steps.push(Step::Detach);
    }
    plan.steps.push(step);
}

fn attach_or_detach(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    // Users of a device that was left are served until they stop, whatever is wished.
    let attach = todo.attach || facts.leftover == Leftover::Waiting;
    match (attach, facts.has_device) {
        (true, false) => plan.steps.push(Step::Attach),
        // Its next user opens a device of the right size: it is made anew while nobody has it open.
        (true, true) if facts.resize_pending && facts.device_users.is_empty() => {
            plan.steps.extend([Step::Detach, Step::Attach]);
        }
        (false, true) if facts.device_users.is_empty() => plan.steps.push(Step::Detach),
        (false, true) => plan.wait(
            "DeviceInUse",
            format!(
                "attach is off, but the device is in use: {}. It stays until they stop",
                facts.device_users.join("; ")
            ),
        ),
        _ => {}
    }
}

fn one_shot(order: Option<Uuid>, done: Option<Uuid>, step: impl Fn(Uuid) -> Step, plan: &mut Plan) {
    if let Some(id) = order.filter(|id| done != Some(*id)) {
        plan.steps.push(step(id));
    }
}

fn while_secondary(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    if facts.has_device {
        // Left over from a stay as primary that has ended.
        if facts.device_users.is_empty() {
            plan.steps.push(Step::Detach);
        } else {
            plan.wait(
                "DeviceStranded",
                format!(
                    "this replica is not primary any more, but its device is still in use: {}. Stop them",
                    facts.device_users.join("; ")
                ),
            );
        }
    }
    if let Some(resumable) = facts.status.resumable {
        return after_restart(todo, facts, resumable, plan);
    }
    left_over(todo, facts, plan);
    match todo.grant {
        Grant::Primary { designation, cause } => granted(designation, cause, facts, plan),
        Grant::Secondary { designation, .. } => {
            if let Some(designation) = designation.filter(|designation| newer(*designation, facts.status.designation)) {
                plan.steps.push(Step::Observe(designation));
            }
        }
    }
    one_shot(todo.one_shots.invalidate, facts.done.invalidate, Step::Invalidate, plan);
    if todo
        .one_shots
        .fake_sync
        .is_some_and(|id| facts.done.fake_sync != Some(id))
    {
        plan.wait(
            "FakeSync",
            "waits for a sync that needs a source, to take its data for equal",
        );
    }
    one_shot(todo.one_shots.rotate, facts.done.rotate, Step::Rotate, plan);
    hold_or_let_go(todo, facts, plan);
}

/// This replica was primary when it stopped (P9).
fn after_restart(todo: &Todo, facts: &Facts, resumable: Resumable, plan: &mut Plan) {
    let under = resumable.designation;
    // Our own `Close` for this designation is still to be written, and only a primary can write it.
    let close_is_ours = |designation: Designation| matches!(todo.grant, Grant::Secondary { designation: Some(ordered), close_for: Some(_) } if ordered == designation);
    // A grant to ourselves does not speak against going on, nor does a peer that has only heard of that grant.
    let (ordered, ours) = match todo.grant {
        Grant::Secondary { designation, .. } => (designation, None),
        Grant::Primary { designation, .. } => (None, Some(designation)),
    };
    let acting = newest_acting(facts).filter(|designation| newer(*designation, under));
    let heard = facts.peers.iter().filter_map(|peer| peer.designation).chain(ordered);
    let against = heard
        .filter(|designation| newer(*designation, under) && ours.is_none_or(|ours| newer(*designation, ours)))
        .filter(|designation| !close_is_ours(*designation))
        .chain(acting)
        .max_by_key(|designation| designation.number);
    if let Some(against) = against {
        plan.steps.push(Step::Observe(against));
        return;
    }
    match facts.evidence.may_resume(resumable.same_boot) {
        Ok(()) => plan.steps.push(Step::Resume(under)),
        Err(missing) => plan.wait("ResumeWaits", missing),
    }
}

impl Evidence {
    /// Whether enough was heard to go on as primary after a restart in which nothing newer was seen.
    fn may_resume(&self, same_boot: bool) -> Result<(), String> {
        if same_boot && (self.asked_long_enough || self.unanswered.is_empty()) {
            return Ok(());
        }
        if same_boot {
            return Err(format!(
                "asking the other members for a newer designation ({})",
                self.unanswered.join(", ")
            ));
        }
        if self.from_api || self.unanswered.is_empty() {
            return Ok(());
        }
        Err(format!(
            "the node was rebooted: the primary role is resumed once the API server or all members say that no newer \
             designation exists; silent: the API server, {}. If the others are lost: `mars-node-agent failover <resource> --acknowledge <resource uuid>`",
            self.unanswered.join(", ")
        ))
    }
}

fn granted(designation: Designation, cause: GrantCause, facts: &Facts, plan: &mut Plan) {
    let status = &*facts.status;
    if newer(status.designation, designation) {
        return plan.wait(
            "StaleGrant",
            format!(
                "designation {} is not newer than {}, which is persisted here: the operator has to issue a newer one",
                designation.number, status.designation.number
            ),
        );
    }
    if let Some(peer) = facts
        .peers
        .iter()
        .find(|peer| peer.designation.is_some_and(|theirs| newer(theirs, designation)))
    {
        return plan.wait(
            "NewerElsewhere",
            format!(
                "{} knows a newer designation: not becoming primary under {}",
                peer.node, designation.number
            ),
        );
    }
    if facts.done.detached.is_some() {
        return plan.wait(
            "Detached",
            format!(
                "the role is granted under designation {}, but the data disk is detached (attach is off): unmount it, then \
                 switch attach on in spec.replicas; or designate another member",
                designation.number
            ),
        );
    }
    if facts
        .done
        .refused_promote
        .as_ref()
        .is_some_and(|refused| refused.designation == designation)
    {
        return plan.wait(
            "PromoteRefused",
            "refused for good under this designation: see status.refused",
        );
    }
    if !facts.evidence.from_api && !facts.evidence.unanswered.is_empty() {
        return plan.wait(
            "GrantFromCache",
            format!(
                "the grant is from before the restart: waiting for the API server, or an answer of {}",
                facts.evidence.unanswered.join(", ")
            ),
        );
    }
    if facts.done.primary_under == Some(designation) {
        // Carried out before, and given up since: by a newer designation, or because the saved state was damaged.
        return plan.wait(
            "RoleLost",
            format!(
                "this replica was primary under {} and may not simply go on: the operator has to issue a newer designation",
                designation.number
            ),
        );
    }
    let promote = Step::Promote {
        designation,
        cause: engine_cause(cause),
    };
    match cause {
        GrantCause::Create if is_blank(status) => plan.steps.push(promote),
        GrantCause::Create => plan.wait(
            "CreateOnData",
            "cause Create is for a replica without data, and this one has some: it has to be designated by a failover",
        ),
        GrantCause::Handover { end: Some(end) } => handover(designation, end, facts, promote, plan),
        GrantCause::Handover { end: None } => match status.released.and_then(|released| released.to) {
            Some(to) => plan.wait(
                "ClosedFor",
                format!("this replica has closed for {to}: only its refusal or a failover leads back"),
            ),
            None => when_consistent(status, promote, plan),
        },
        GrantCause::Failover => when_consistent(status, promote, plan),
    }
}

fn when_consistent(status: &ReplicaStatus, promote: Step, plan: &mut Plan) {
    match status.data {
        DataState::Consistent => plan.steps.push(promote),
        _ => plan.wait(
            "NotConsistent",
            "the data is not consistent: it can be promoted when the sync is complete; designate another member or wait",
        ),
    }
}

/// Promotes exactly at the end that the predecessor released; refuses for good when that can never be reached.
fn handover(designation: Designation, end: Position, facts: &Facts, promote: Step, plan: &mut Plan) {
    let status = &*facts.status;
    if let Some(broken) = status.faults.iter().find(|fault| disqualifies(fault)) {
        let reason = format!("this replica cannot be primary: {broken:?}");
        return plan.steps.push(Step::RefusePromote { designation, reason });
    }
    if status.durable == end {
        when_consistent(status, promote, plan);
    } else if status.durable.lsn >= end.lsn && status.data == DataState::Consistent {
        let reason = format!(
            "the history here ({}) is not the one that was released ({end})",
            status.durable
        );
        plan.steps.push(Step::RefusePromote { designation, reason });
    } else {
        plan.wait(
            "CatchingUp",
            format!(
                "{} bytes of log are missing up to the released end",
                end.lsn.bytes_since(status.durable.lsn)
            ),
        );
    }
}

/// Faults with which a replica must not take over.
fn disqualifies(fault: &Fault) -> bool {
    match fault {
        Fault::LogStoreFailed { .. }
        | Fault::DataDiskFailed { .. }
        | Fault::StateFailed { .. }
        | Fault::LogDefect { .. } => true,
        Fault::DiskTooSmall { .. } | Fault::Fork { .. } | Fault::Orphan { .. } => false,
    }
}

/// Never held data: no history, no sync.
#[must_use]
pub fn is_blank(status: &ReplicaStatus) -> bool {
    status.data == DataState::Syncing && status.lineage.0.is_empty() && status.sync.is_none()
}

fn engine_cause(cause: GrantCause) -> Cause {
    match cause {
        GrantCause::Create => Cause::Create,
        GrantCause::Handover { .. } => Cause::Handover,
        GrantCause::Failover => Cause::Failover,
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
