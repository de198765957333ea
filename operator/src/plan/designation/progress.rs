//! A handover or demotion that is under way: close → release → promote, or back.
//!
//! Invariant: before the release is on record the role can go back to the predecessor; afterwards only the successor's
//! durable refusal, or a failover, changes anything. A release that was made for an earlier designation is honoured:
//! the log of the predecessor ends with a `Close` and can only be continued by whom that names.

use mars_crds::ActualRole;
use mars_crds::replica::{RefusedOrder, Released};
use mars_crds::resource::{Designation, DesignationSource, Predecessor};
use uuid::Uuid;

use super::{Proposal, may_succeed, record};
use crate::plan::status::refusal_of_designated;
use crate::plan::{Context, Draft, Intent, Note, Reason, Severity, wish};
use crate::world::Report;

/// A replica that should be primary, or should close under the present designation, has closed under an earlier one.
pub(super) fn late_release(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) -> bool {
    let Some(designation) = context.designation() else {
        return false;
    };
    let suspect = match designation.source {
        DesignationSource::Abort => designation.replica_uuid,
        DesignationSource::Handover | DesignationSource::Demotion => {
            let before = designation.predecessor.as_ref();
            before
                .filter(|before| before.released_end.is_none())
                .map(|before| before.replica_uuid)
        }
        _ => None,
    };
    let Some(report) = suspect.and_then(|uuid| context.report(uuid)) else {
        return false;
    };
    let Some(released) = report
        .released
        .as_ref()
        .filter(|released| released.number < designation.number)
    else {
        return false;
    };
    if report.role != Some(ActualRole::Secondary) {
        return false;
    }
    let before = Predecessor {
        node: report.node.clone(),
        replica_uuid: report.replica_uuid,
        released_end: Some(released.end.clone()),
    };
    continue_with(context, draft, new_id, designation, released, before);
    true
}

fn continue_with(
    context: &Context<'_>,
    draft: &mut Draft,
    new_id: &mut dyn FnMut() -> Uuid,
    designation: &Designation,
    released: &Released,
    before: Predecessor,
) {
    let named = released.to.or(designation.replica_uuid);
    let successor = named.and_then(|uuid| context.world.replica(uuid));
    let reason = format!(
        "{} had closed under designation {} already",
        before.node, released.number
    );
    let (node, replica_uuid, source) = match (successor, released.to) {
        (Some(successor), _) => (
            successor.spec.node.clone(),
            Some(successor.spec.replica_uuid),
            DesignationSource::Handover,
        ),
        (None, None) => (String::new(), None, DesignationSource::Demotion),
        (None, Some(to)) => {
            draft.switching = Some(Note {
                reason: Reason::SuccessorNotReady,
                message: format!(
                    "{} has closed for replica {to}, which is no longer a member: use a MarsAction Failover to {}",
                    before.node, before.node
                ),
            });
            return;
        }
    };
    let seen = (designation.wish_seen.clone(), designation.attached_seen.clone());
    let proposal = Proposal {
        node,
        replica_uuid,
        source,
        reason,
        seen,
        action: None,
        predecessor: Some(before),
    };
    record(context, draft, new_id, proposal);
}

/// Moves a handover or demotion on. Says whether one is under way.
pub(super) fn under_way(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) -> bool {
    let Some(designation) = context.designation() else {
        return false;
    };
    match (designation.source, &designation.predecessor) {
        (DesignationSource::Handover | DesignationSource::Demotion, Some(before)) if before.released_end.is_none() => {
            closing(context, draft, new_id, designation, before);
            true
        }
        (DesignationSource::Demotion, _) => false,
        _ if context.holder_has_taken_over() => false,
        (DesignationSource::Handover, Some(before)) => promoting(context, draft, new_id, designation, before),
        _ => waits_for_holder(context, draft, designation),
    }
}

fn closing(
    context: &Context<'_>,
    draft: &mut Draft,
    new_id: &mut dyn FnMut() -> Uuid,
    designation: &Designation,
    before: &Predecessor,
) {
    let node = &before.node;
    let report = context.report(before.replica_uuid).filter(|report| report.heard);
    let Some(report) = report else {
        draft.switching = Some(Note {
            reason: Reason::PredecessorSilent,
            message: format!(
                "{node} has not said that it has closed and is silent: bring it back, or if it is lost use a MarsAction \
                 Failover (what it has beyond the successor is lost then)"
            ),
        });
        return;
    };
    let token = designation.token();
    if let Some(released) = &report.released
        && (released.number, released.uuid) == (token.number, token.uuid)
        && released.to == designation.replica_uuid
    {
        draft.push(Intent::RecordRelease(released.end.clone()));
        draft.event(
            Severity::Normal,
            "Released",
            format!("{node} has closed at {}", released.end.lsn),
        );
        return;
    }
    if let Some((reason, message)) = give_up(context, designation, report) {
        let seen = wish::seen_by_abort(context, designation, node);
        draft.switching = Some(Note {
            reason,
            message: message.clone(),
        });
        let proposal = Proposal {
            node: node.clone(),
            replica_uuid: Some(before.replica_uuid),
            source: DesignationSource::Abort,
            reason: message,
            seen,
            action: None,
            predecessor: None,
        };
        record(context, draft, new_id, proposal);
        return;
    }
    draft.switching = Some(Note {
        reason: Reason::Closing,
        message: format!(
            "{node} closes under designation {} and writes back; nothing to do",
            token.number
        ),
    });
}

/// Why the role goes back to the predecessor although it was asked to close.
fn give_up(context: &Context<'_>, designation: &Designation, before: &Report) -> Option<(Reason, String)> {
    let token = designation.token();
    let node = &before.node;
    if let Some(refused) = &before.refused
        && refused.order == RefusedOrder::Close
        && (refused.number, refused.uuid) == (token.number, token.uuid)
    {
        let reason = if before.opened_by.is_empty() {
            Reason::HandoverAborted
        } else {
            Reason::DeviceInUse
        };
        return Some((reason, format!("{node} does not close: {}", refused.reason)));
    }
    if before.role == Some(ActualRole::Primary) && !before.opened_by.is_empty() {
        let users = before.users();
        return Some((
            Reason::DeviceInUse,
            format!("the device on {node} is in use by {users}: stop that first"),
        ));
    }
    if !wish::still_wants(context, designation) {
        return Some((Reason::HandoverAborted, "it is no longer asked for".into()));
    }
    if !designation.node.is_empty()
        && let Err(note) = may_succeed(context, &designation.node)
    {
        return Some((Reason::SuccessorNotReady, note.message));
    }
    let started = designation.time.as_ref().map_or(0, |time| time.0.as_second());
    let elapsed = context.world.now.as_second() - started;
    let settings = &context.world.settings;
    let has_read = before.designation == Some(token);
    let restarted = has_read && before.role == Some(ActualRole::Secondary) && before.released.is_none();
    if restarted && elapsed > settings.liveness_seconds {
        return Some((
            Reason::HandoverAborted,
            format!("{node} has restarted and is secondary without having closed"),
        ));
    }
    let limit = settings.handover_timeout_seconds;
    let overdue = elapsed > limit;
    overdue.then(|| {
        (
            Reason::HandoverAborted,
            format!("{node} has not closed within {limit} s"),
        )
    })
}

fn promoting(
    context: &Context<'_>,
    draft: &mut Draft,
    new_id: &mut dyn FnMut() -> Uuid,
    designation: &Designation,
    before: &Predecessor,
) -> bool {
    let node = &designation.node;
    let report = context.holder();
    if let Some(reason) = refusal(context, designation) {
        let message = format!("{node} has refused for good: {reason}");
        draft.switching = Some(Note {
            reason: Reason::HandoverAborted,
            message: message.clone(),
        });
        let proposal = Proposal {
            node: before.node.clone(),
            replica_uuid: Some(before.replica_uuid),
            source: DesignationSource::Reopen,
            reason: message,
            seen: wish::seen_now(context),
            action: None,
            predecessor: None,
        };
        record(context, draft, new_id, proposal);
        return true;
    }
    let heard = report.is_some_and(|report| report.heard);
    let end = before.released_end.as_ref().map_or(0, |end| end.lsn);
    draft.switching = Some(if heard {
        let message = format!(
            "{} has closed at {end}; {node} fetches up to there and starts; nothing to do",
            before.node
        );
        Note {
            reason: Reason::Promoting,
            message,
        }
    } else {
        Note {
            reason: Reason::SuccessorNotReady,
            message: format!(
                "{} has closed for {node}, which is silent: bring it back, or use a MarsAction Failover to {} (nothing \
                 is lost then)",
                before.node, before.node
            ),
        }
    });
    true
}

/// Create, Failover and the like: granted, and not taken yet. A wish has to wait, an acknowledged failover has not.
fn waits_for_holder(context: &Context<'_>, draft: &mut Draft, designation: &Designation) -> bool {
    let node = &designation.node;
    if node.is_empty() {
        return false;
    }
    let source = designation.source;
    let heard = context.holder().is_some_and(|holder| holder.heard);
    let waiting = match refusal(context, designation) {
        Some(reason) => Note {
            reason: Reason::SuccessorNotReady,
            message: format!(
                "{node} is designated ({source:?}) and has refused for good: {reason}; choose another member with \
                 {}",
                if source == DesignationSource::Create {
                    "spec.primary"
                } else {
                    "a MarsAction Failover"
                }
            ),
        },
        None if heard => match refusal_of_designated(context) {
            Some(cause) => Note {
                reason: Reason::SuccessorNotReady,
                message: format!("{node} is designated ({source:?}) and its agent does not run the replica: {cause}"),
            },
            None => Note {
                reason: Reason::Promoting,
                message: format!("{node} is designated ({source:?}) and starts; nothing to do"),
            },
        },
        None => Note {
            reason: Reason::SuccessorNotReady,
            message: format!(
                "{node} is designated and silent: bring it back, or use a MarsAction Failover to another member"
            ),
        },
    };
    draft.switching = Some(waiting);
    let refused_to_begin = source == DesignationSource::Create && refusal(context, designation).is_some();
    !(refused_to_begin && context.reports.iter().all(|report| !report.has_history))
}

/// Why the designated replica will never take the role under this designation, if it has said so for good.
fn refusal<'a>(context: &'a Context<'_>, designation: &Designation) -> Option<&'a str> {
    let refused = context.holder()?.refused.as_ref()?;
    let token = designation.token();
    let matches = refused.order == RefusedOrder::Promote
        && refused.durable
        && (refused.number, refused.uuid) == (token.number, token.uuid);
    matches.then_some(refused.reason.as_str())
}
