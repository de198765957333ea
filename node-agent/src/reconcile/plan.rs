//! From what is wanted and what is known to what is done next: a pure function, tested without any machine.
//!
//! Invariants: a device in use is never taken away; nobody becomes or stays primary against a newer designation
//! a replica that was primary goes on after a reboot only with evidence that none is newer (P9); nothing is ever
//! concluded from something that is absent (P12).

mod held;
mod promotion;

pub use promotion::{ends_in_own_epoch, is_blank};

use super::facts::{Evidence, Facts};
use super::presence::Presence;
use super::todo::{Grant, Todo};
use held::{effective_switches, hold_or_let_go, invalidate, left_over};
use mars_engine::api::{DataState, Resumable, Role, Switches, Tuning};
use mars_engine::lineage::Cause;
use mars_engine::types::{Designation, ReplicaId};
use promotion::{engine_cause, granted};
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
    /// Let the device grow to the size that the engine has already.
    GrowDevice,
    /// Throw away log and claim of consistency.
    Invalidate(Uuid),
    /// The order to believe a copy has come to data that is consistent without it: it must not wait for a later copy.
    NothingToFake(Uuid),
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
        if let Some(users) = facts.device.in_use() {
            plan.wait(
                "DeviceInUse",
                format!("the replica is being deleted, but its device is in use: {users}. Stop them"),
            );
            if let Presence::LeftBehind { .. } = facts.device {
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
        Role::Secondary => {
            while_secondary(todo, facts, &mut plan);
            grow(todo, facts, &mut plan);
        }
        Role::Promoting => while_promoting(todo, facts, &mut plan),
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
}

/// Last of all: a disk that cannot grow must not keep anybody from a role, or from a device.
fn grow(todo: &Todo, facts: &Facts, plan: &mut Plan) {
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
    let open = facts.done.open(todo.one_shots);
    plan.steps.extend(open.rotate.map(Step::Rotate));
    if open.invalidate.is_some() {
        plan.wait(
            "InvalidateRefused",
            "a primary's data is never thrown away: hand over first",
        );
    }
    attach_or_detach(todo, facts, plan);
    grow(todo, facts, plan);
    if todo.size_bytes > facts.status.size_bytes {
        plan.steps.push(Step::Resize(todo.size_bytes));
    }
}

/// Loading the local log may take long. Who is overruled meanwhile takes no role; one whose own `Close` is still to be written has to.
fn while_promoting(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    let ordered = match todo.grant {
        Grant::Secondary {
            designation,
            close_for: None,
        } => designation,
        _ => None,
    };
    let against = newest_acting(facts)
        .into_iter()
        .chain(ordered)
        .filter(|designation| newer(*designation, facts.status.designation))
        .max_by_key(|designation| designation.number);
    plan.steps.extend(against.map(Step::Observe));
    plan.wait("Promoting", "the local log is being replayed before the role is taken");
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
    if let Presence::LeftBehind { .. } = facts.device {
        // Whoever uses it waits to be served, and goes on until the role is really given up. Unused, it is removed in order:
        // what the kernel still wants to write arrives before the end of the history.
        plan.steps.push(Step::Attach);
    }
    if let Some(users) = facts.device.in_use() {
        let refused_close = matches!(leave, Leave::Close { .. }).then_some(designation);
        plan.waiting.push(Waiting {
            reason: "DeviceInUse",
            message: format!("the device is in use: {users}. Stop its users and the role goes on its way"),
            refused_close,
        });
        return;
    }
    match facts.device {
        Presence::LeftBehind { .. } => return,
        Presence::Served { .. } => plan.steps.push(Step::Detach),
        Presence::Absent | Presence::GivenUp { .. } | Presence::Unknown { .. } => {}
    }
    plan.steps.push(step);
}

fn attach_or_detach(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    match (&facts.device, todo.attach) {
        // Users of a device that was left are served until they stop, whatever is wished. One that is not known of is found
        // while a device is made, or none is made.
        (Presence::LeftBehind { .. }, _)
        | (Presence::Absent | Presence::GivenUp { .. } | Presence::Unknown { .. }, true) => {
            plan.steps.push(Step::Attach);
        }
        (Presence::Served { .. }, false) => match facts.device.in_use() {
            None => plan.steps.push(Step::Detach),
            Some(users) => plan.wait(
                "DeviceInUse",
                format!("attach is off, but the device is in use: {users}. It stays until they stop"),
            ),
        },
        // Its next user opens a device of the right size: it is made anew while nobody has it open.
        (Presence::Served { .. }, true) if facts.resize_pending && facts.device.in_use().is_none() => {
            plan.steps.extend([Step::Detach, Step::Attach]);
        }
        (Presence::Served { .. }, true) if facts.device_behind => plan.steps.push(Step::GrowDevice),
        (Presence::Unknown { reason }, false) => plan.wait("DeviceUnknown", device_unknown(reason)),
        (Presence::Served { .. }, true) | (Presence::Absent | Presence::GivenUp { .. }, false) => {}
    }
}

fn device_unknown(reason: &str) -> String {
    format!(
        "whether a device of an earlier stay as primary is in use here cannot be told ({reason}); until then it counts as in \
         use. Look at the device keeper of this node"
    )
}

fn while_secondary(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    if facts.device.is_served() {
        // Left over from a stay as primary that has ended.
        match facts.device.in_use() {
            None => plan.steps.push(Step::Detach),
            Some(users) => plan.wait(
                "DeviceStranded",
                format!("this replica is not primary any more, but its device is still in use: {users}. Stop them"),
            ),
        }
    }
    if let Some(resumable) = facts.status.resumable {
        return after_restart(todo, facts, resumable, plan);
    }
    left_over(todo, facts, plan);
    match todo.grant {
        Grant::Primary { designation, cause } => granted(todo, designation, cause, facts, plan),
        Grant::Secondary { designation, .. } => {
            if let Some(designation) = designation.filter(|designation| newer(*designation, facts.status.designation)) {
                plan.steps.push(Step::Observe(designation));
            }
        }
    }
    invalidate(todo, facts, plan);
    let open = facts.done.open(todo.one_shots);
    match open.fake_sync {
        Some(id) if facts.status.data == DataState::Consistent && open.invalidate.is_none() => {
            plan.steps.push(Step::NothingToFake(id));
        }
        Some(_) => plan.wait(
            "FakeSync",
            "waits for a sync that needs a source, to take its data for equal",
        ),
        None => {}
    }
    plan.steps.extend(open.rotate.map(Step::Rotate));
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
        if self.unanswered.is_empty() || (self.from_api && self.asked_long_enough) {
            return Ok(());
        }
        if self.from_api {
            // What stood only in memory is gone: who has a later end of the log must have had the time to say so, before a new
            // epoch begins at ours.
            return Err(format!(
                "the node was rebooted: asking the other members whether they have more of the log ({})",
                self.unanswered.join(", ")
            ));
        }
        Err(format!(
            "the node was rebooted: the primary role is resumed once the API server or all members say that no newer \
             designation exists; silent: the API server, {}. If the others are lost: `mars-node-agent failover <resource> --acknowledge <resource uuid>`",
            self.unanswered.join(", ")
        ))
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
pub(super) mod tests;
