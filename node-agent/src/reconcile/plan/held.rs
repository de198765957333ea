//! What a secondary holds on to, and what it lets go: its data disk when attach is off, and a device that is left from an earlier
//! stay as primary.
//!
//! Invariants: a disk is let go of only at rest, and nothing touches it before it is taken back; a device is given up only once it is
//! certain that this replica will not serve it again; data is never thrown away under one that somebody uses.

use super::super::facts::Facts;
use super::super::presence::Presence;
use super::super::todo::{Grant, Todo};
use super::{Plan, Step, device_unknown, newer};
use crate::frontend::users;
use mars_engine::api::{DataState, Role, Switches};
use mars_engine::types::Designation;

/// Whether a secondary shall hold its data disk. A primary always does, and so does who was primary until that is decided.
fn lets_disk_go(todo: &Todo, facts: &Facts) -> bool {
    let follows = facts.status.role == Role::Secondary
        && facts.status.resumable.is_none()
        && matches!(todo.grant, Grant::Secondary { .. });
    !todo.attach && (follows || facts.done.detached.is_some())
}

/// Nothing touches a data disk that is let go of: no replay, no copy. Log is fetched nevertheless.
pub(super) fn effective_switches(todo: &Todo, facts: &Facts) -> Switches {
    let touches_disk = facts.done.detached.is_none() && !lets_disk_go(todo, facts);
    Switches {
        replay: todo.switches.replay && touches_disk,
        sync: todo.switches.sync && touches_disk,
        ..todo.switches.clone()
    }
}

/// Lets the data disk of a secondary go, or takes it back.
pub(super) fn hold_or_let_go(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    let status = &*facts.status;
    if facts.done.detached.is_some() {
        if todo.attach {
            plan.steps.push(Step::AttachDisk);
        }
        return;
    }
    if !lets_disk_go(todo, facts) {
        return;
    }
    let off = !status.switches.replay && !status.switches.sync && !facts.copying;
    let written = status.applied.lsn == status.replayed;
    // While a copy is needed the dirty end lies ahead for another reason.
    let clean = status.dirty_end.lsn == status.applied.lsn || status.data != DataState::Consistent;
    if off && written && clean {
        plan.steps.push(Step::DetachDisk);
    } else {
        plan.wait(
            "Detaching",
            "what is loaded is written to the data disk before it is let go of",
        );
    }
}

/// A device that a former life of the agent left on a replica that is secondary now. Nobody serves it, so its users hang; it is given
/// up once it is certain that this replica will not serve it again.
pub(super) fn left_over(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    match &facts.device {
        Presence::LeftBehind { .. } if is_overruled(todo, facts) => {
            plan.steps.push(Step::Discard);
        }
        Presence::LeftBehind { .. } => plan.wait(
            "DeviceStranded",
            format!(
                "the device of an earlier stay as primary waits to be served (users: {}): it goes on when this replica is \
                 primary again, and is given up when a newer designation names another one. See `kubectl describe mars {}`",
                facts.device.in_use().as_deref().unwrap_or("none"),
                todo.resource
            ),
        ),
        Presence::GivenUp { users } => plan.wait(
            "DeviceStranded",
            format!(
                "designation {} counts, so the device of the earlier stay as primary was given up: {} get I/O errors, as when \
                 a machine dies. Stop them (umount, or stop the pod)",
                facts.status.designation.number,
                users::describe(users)
            ),
        ),
        // Who was never primary has left nothing behind, and does not alarm anybody.
        Presence::Unknown { reason } if facts.done.primary_under.is_some() => {
            plan.wait("DeviceUnknown", device_unknown(reason));
        }
        Presence::Absent | Presence::Served { .. } | Presence::Unknown { .. } => {}
    }
}

/// Whether it is certain that this replica will not go on under the designation it was primary under, and is not named anew.
fn is_overruled(todo: &Todo, facts: &Facts) -> bool {
    let persisted = facts.status.designation;
    let counts = |designation: Designation| !newer(persisted, designation);
    let named = match todo.grant {
        Grant::Primary { designation, .. } => counts(designation),
        Grant::Secondary { designation, .. } => {
            todo.designated.replica == Some(todo.replica) && designation.is_none_or(counts)
        }
    };
    let under = facts.done.primary_under;
    !named && facts.status.resumable.is_none() && under.is_some_and(|under| newer(persisted, under))
}

/// Throws the data away, unless somebody waits on it: their device would be served from other data afterwards.
pub(super) fn invalidate(todo: &Todo, facts: &Facts, plan: &mut Plan) {
    let Some(id) = facts.done.open(todo.one_shots).invalidate else {
        return;
    };
    if let Some(users) = facts.device.in_use() {
        return plan.wait(
            "InvalidateRefused",
            format!(
                "the device of an earlier stay as primary is in use: {users}. Stop them, then the data is thrown away"
            ),
        );
    }
    if facts.device.is_left_behind() {
        plan.steps.push(Step::Discard);
    }
    plan.steps.push(Step::Invalidate(id));
}
