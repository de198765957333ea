//! Taking the primary role because it was granted.
//!
//! Invariants: nobody becomes primary under a grant that something known speaks against; with a device of an earlier stay at hand only if
//! its users go on where they stopped.

use super::{Plan, Step, device_unknown, newer};
use crate::reconcile::facts::Facts;
use crate::reconcile::presence::Presence;
use crate::reconcile::todo::{GrantCause, Todo};
use mars_engine::api::{DataState, Fault, ReplicaStatus};
use mars_engine::lineage::Cause;
use mars_engine::types::{Designation, Position, ReplicaId};

pub(super) fn granted(todo: &Todo, designation: Designation, cause: GrantCause, facts: &Facts, plan: &mut Plan) {
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
    if let Presence::Unknown { reason } = &facts.device {
        return plan.wait("DeviceUnknown", device_unknown(reason));
    }
    let promote = Step::Promote {
        designation,
        cause: engine_cause(cause),
    };
    let before = plan.steps.len();
    promotion(todo, cause, (designation, promote), facts, plan);
    let promotes = plan.steps[before..]
        .iter()
        .any(|step| matches!(step, Step::Promote { .. }));
    if promotes && facts.device.is_left_behind() && !ends_in_own_epoch(todo.replica, status) {
        // Its users know older data than is here now: what they would write is not meant for it.
        plan.steps.insert(before, Step::Discard);
    }
}

/// Whether everything that users of a device which was left here have written and seen is still the end of the history: since then
/// nobody else has written, and no other data has been taken.
#[must_use]
pub fn ends_in_own_epoch(replica: ReplicaId, status: &ReplicaStatus) -> bool {
    let newest = status.lineage.0.last();
    status.data == DataState::Consistent
        && newest.is_some_and(|epoch| epoch.origin == replica && epoch.id == status.durable.epoch)
}

fn promotion(
    todo: &Todo,
    cause: GrantCause,
    (designation, promote): (Designation, Step),
    facts: &Facts,
    plan: &mut Plan,
) {
    let status = &*facts.status;
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
            None if status.lineage.0.last().is_none_or(|epoch| epoch.origin != todo.replica) => plan.wait(
                "NotOwnEpoch",
                "a handover without a released end gives the role back to the replica that had it last, and the newest epoch \
                 here is another one's: only a handover with an end, or a failover, leads to this replica",
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
        Fault::BacklogDefect { .. } | Fault::DiskTooSmall { .. } | Fault::Fork { .. } | Fault::Orphan { .. } => false,
    }
}

/// Never held data: no history, no sync.
#[must_use]
pub fn is_blank(status: &ReplicaStatus) -> bool {
    status.data == DataState::Syncing && status.lineage.0.is_empty() && status.sync.is_none()
}

pub(super) fn engine_cause(cause: GrantCause) -> Cause {
    match cause {
        GrantCause::Create => Cause::Create,
        GrantCause::Handover { .. } => Cause::Handover,
        GrantCause::Failover => Cause::Failover,
    }
}
