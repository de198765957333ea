//! Who may be primary. Every change of the fencing token is made here.
//!
//! The order of questions: is the record older than what agents know (re-adopt)? · has somebody released who was not
//! expected to (late release)? · is a forced change acknowledged? · is a handover under way? · is the primary proven
//! dead? · does a wish count? Invariants: one designation per pass; its number is one nobody has seen; a handover is
//! taken back only before its release is read, and only by going on to a higher number.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mars_crds::resource::{Designation, DesignationSource, Predecessor};
use mars_crds::{ActualRole, ReplicaData, Verb};
use uuid::Uuid;

use super::wish::{self, Driver, Wish};
use super::{Context, Draft, Intent, Note, Reason, Severity, actions, members};
use crate::world::Report;

mod failover;
pub(super) use failover::no_evidence;
mod progress;
mod readopt;

/// What a new designation is made of, besides number, uuid and time.
struct Proposal {
    node: String,
    replica_uuid: Option<Uuid>,
    source: DesignationSource,
    reason: String,
    seen: (String, String),
    action: Option<Uuid>,
    predecessor: Option<Predecessor>,
}

fn record(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid, proposal: Proposal) {
    let Proposal {
        node,
        replica_uuid,
        source,
        reason,
        seen,
        action,
        predecessor,
    } = proposal;
    let number = context.next_number();
    let severity = match source {
        DesignationSource::Create | DesignationSource::Handover | DesignationSource::Demotion => Severity::Normal,
        _ => Severity::Warning,
    };
    let whom = if node.is_empty() { "nobody" } else { &node };
    let message = format!("designation {number}: {whom} shall be primary ({source:?}); {reason}");
    let designation = Designation {
        number,
        uuid: new_id(),
        node,
        replica_uuid,
        source,
        reason,
        wish_seen: seen.0,
        attached_seen: seen.1,
        action,
        predecessor,
        time: Some(Time(context.world.now)),
    };
    draft.push(Intent::RecordDesignation(Box::new(designation)));
    draft.event(severity, &format!("{source:?}"), message);
}

/// Decides whether the designation changes, and says what it waits for.
pub(super) fn decide(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    if !is_settled(context) {
        return;
    }
    let conflict = conflict(context);
    if failover::acknowledged(context, draft, new_id) {
        return;
    }
    if let Some(message) = conflict {
        draft.split_brain = Some(Note {
            reason: Reason::DesignationConflict,
            message,
        });
        return;
    }
    if readopt::is_needed(context) {
        readopt::readopt(context, draft, new_id);
        return;
    }
    let decided = progress::late_release(context, draft, new_id)
        || failover::automatic(context, draft, new_id)
        || progress::under_way(context, draft, new_id);
    if !decided {
        follow_wish(context, draft, new_id);
    }
}

/// The action that made the present designation must know its number before anything newer is designated.
fn is_settled(context: &Context<'_>) -> bool {
    let made = context.designation().and_then(|designation| designation.action);
    made.is_none_or(|made| {
        let mut known = context
            .world
            .actions
            .iter()
            .filter(|action| actions::id(action) == Some(made));
        known.all(|action| {
            action
                .status
                .as_ref()
                .is_some_and(|status| status.designation_number.is_some())
        })
    })
}

/// Two different designations with the highest number: a split brain in which nobody yields.
fn conflict(context: &Context<'_>) -> Option<String> {
    let highest = context.highest_mentioned()?;
    let recorded = context.designation().map(Designation::token);
    let number = highest.number.max(recorded.map_or(0, |recorded| recorded.number));
    let granted = context
        .world
        .replicas
        .iter()
        .filter_map(|replica| replica.spec.designation);
    let reported = context
        .reports
        .iter()
        .flat_map(|report| [report.designation, report.primary_under])
        .flatten();
    let mut tokens = granted
        .chain(reported)
        .chain(recorded)
        .filter(|token| token.number == number);
    let first = tokens.next()?;
    let other = tokens.find(|token| token.uuid != first.uuid)?;
    Some(format!(
        "designation {number} exists twice ({} and {}): nobody yields; decide with a MarsAction Failover to the replica that \
         shall win",
        first.uuid, other.uuid
    ))
}

fn follow_wish(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    if !context.problems.is_empty() {
        return;
    }
    let Some(wish) = wish::counting(context) else {
        forget_detached(context, draft);
        if context
            .designation()
            .is_none_or(|designation| designation.node.is_empty())
        {
            draft.not_ready = Some(Note {
                reason: Reason::NoPrimaryWished,
                message: "no node shall be primary: set spec.primary".into(),
            });
        }
        return;
    };
    match context.designation() {
        Some(designation) if designation.node == wish.node => {
            if !matches!(wish.driver, Driver::Action(_)) {
                let (primary, attached) = wish::seen_by(context, &wish);
                draft.push(Intent::RecordWishSeen { primary, attached });
            }
        }
        None => create(context, draft, &wish, new_id),
        // Whoever was to begin has refused, and nobody has data: somebody else may begin.
        Some(designation) if designation.source == DesignationSource::Create && !context.holder_has_taken_over() => {
            create(context, draft, &wish, new_id);
        }
        Some(designation) => match hand_over(context, designation, &wish) {
            Ok(proposal) => record(context, draft, new_id, proposal),
            Err(note) => refuse(context, draft, &wish, note),
        },
    }
}

/// The volume was detached: `attachedTo` may count again when it names the same node later.
fn forget_detached(context: &Context<'_>, draft: &mut Draft) {
    let attached = context.world.resource.spec.attached_to.as_deref().unwrap_or_default();
    if let Some(designation) = context.designation()
        && attached.is_empty()
        && !designation.attached_seen.is_empty()
    {
        let primary = designation.wish_seen.clone();
        draft.push(Intent::RecordWishSeen {
            primary,
            attached: String::new(),
        });
    }
}

fn refuse(context: &Context<'_>, draft: &mut Draft, wish: &Wish, note: Note) {
    if let Driver::Action(id) = wish.driver
        && let Some(action) = context
            .world
            .actions
            .iter()
            .find(|action| actions::id(action) == Some(id))
    {
        draft
            .waiting
            .insert(actions::name(action).to_owned(), note.message.clone());
    }
    draft.switching = Some(note);
}

/// The first designation: only when no replica has history and every member has said what it holds.
fn create(context: &Context<'_>, draft: &mut Draft, wish: &Wish, new_id: &mut dyn FnMut() -> Uuid) {
    let missing = members::without_inventory(context);
    let note = |message: String| {
        Some(Note {
            reason: Reason::WaitingForNodes,
            message,
        })
    };
    if !missing.is_empty() {
        draft.not_ready = note(format!(
            "{} must list what they hold before a first primary is made; start their agents, or take them out of \
             spec.replicas",
            missing.join(", ")
        ));
        return;
    }
    let Some(replica) = context.world.replica_on(&wish.node) else {
        draft.not_ready = note(format!("the replica on {} is being made", wish.node));
        return;
    };
    if !context.world.is_heard(&wish.node) {
        draft.not_ready = note(format!(
            "{} is silent: start its agent, or set spec.primary to another member",
            wish.node
        ));
        return;
    }
    let proposal = Proposal {
        node: wish.node.clone(),
        replica_uuid: Some(replica.spec.replica_uuid),
        source: DesignationSource::Create,
        reason: "no member has data of this resource".into(),
        seen: wish::seen_by(context, wish),
        action: None,
        predecessor: None,
    };
    record(context, draft, new_id, proposal);
}

/// A handover, or with an empty wish a demotion, if nothing speaks against it.
fn hand_over(context: &Context<'_>, designation: &Designation, wish: &Wish) -> Result<Proposal, Note> {
    let predecessor = if designation.node.is_empty() {
        designation
            .predecessor
            .clone()
            .filter(|before| before.released_end.is_some())
    } else {
        let before = context.holder();
        let before = may_close(context, designation, before)?;
        Some(Predecessor {
            node: before.node.clone(),
            replica_uuid: before.replica_uuid,
            released_end: None,
        })
    };
    let action = match wish.driver {
        Driver::Action(id) => Some(id),
        _ => None,
    };
    let seen = wish::seen_by(context, wish);
    if wish.node.is_empty() {
        return Ok(Proposal {
            node: String::new(),
            replica_uuid: None,
            source: DesignationSource::Demotion,
            reason: "spec.primary is empty".into(),
            seen,
            action,
            predecessor,
        });
    }
    let successor = may_succeed(context, &wish.node)?;
    if let Some(before) = &predecessor {
        may_follow(context, before.replica_uuid, successor)?;
    }
    Ok(Proposal {
        node: successor.node.clone(),
        replica_uuid: Some(successor.replica_uuid),
        source: DesignationSource::Handover,
        reason: wish.describe().into(),
        seen,
        action,
        predecessor,
    })
}

/// Whether the present primary can close now.
fn may_close<'a>(
    context: &Context<'_>,
    designation: &Designation,
    holder: Option<&'a Report>,
) -> Result<&'a Report, Note> {
    let node = &designation.node;
    let silent = |what: &str| Note {
        reason: Reason::PredecessorSilent,
        message: format!(
            "{node} is designated primary and {what}: bring it back, or if it is lost use a MarsAction Failover (what it \
             has beyond the successor is lost then)"
        ),
    };
    let holder = holder.ok_or_else(|| silent("has no replica"))?;
    if !holder.heard {
        return Err(silent("is silent"));
    }
    if !holder.opened_by.is_empty() {
        return Err(Note {
            reason: Reason::DeviceInUse,
            message: format!(
                "the device on {node} is in use by {}: stop that first (umount, or stop the pod)",
                holder.users()
            ),
        });
    }
    if !context.holder_has_taken_over() || holder.role != Some(ActualRole::Primary) {
        return Err(Note {
            reason: Reason::Promoting,
            message: format!("{node} is designated primary and not primary yet: wait, or use a MarsAction Failover"),
        });
    }
    Ok(holder)
}

/// Whether `node` can become primary at all.
fn may_succeed<'a>(context: &'a Context<'_>, node: &str) -> Result<&'a Report, Note> {
    let not_ready = |message: String| Note {
        reason: Reason::SuccessorNotReady,
        message,
    };
    let replica = context.world.replica_on(node);
    let replica = replica.filter(|replica| replica.metadata.deletion_timestamp.is_none());
    let replica = replica.ok_or_else(|| not_ready(format!("{node} has no replica yet")))?;
    let report = context.report(replica.spec.replica_uuid);
    let report = report.filter(|report| report.heard);
    let report = report.ok_or_else(|| not_ready(format!("{node} is silent: start its agent")))?;
    let next = match report.data {
        Some(ReplicaData::Consistent) => None,
        Some(ReplicaData::Syncing | ReplicaData::Blank) => Some("wait for its sync"),
        Some(ReplicaData::LogLost) => Some("let it sync again with a MarsAction Invalidate"),
        Some(ReplicaData::Missing) => Some("bring its disk back, or remove and add the replica"),
        Some(ReplicaData::Quarantined) => Some("remove and add the replica"),
        None => Some("its agent has not said yet what it holds"),
    };
    if let Some(next) = next {
        return Err(not_ready(format!(
            "the data on {node} is not consistent ({:?}): {next}",
            report.data
        )));
    }
    let switches = &replica.spec.switches;
    let off: Vec<&str> = [
        ("attach", switches.attach),
        ("fetch", switches.fetch),
        ("replay", switches.replay),
    ]
    .into_iter()
    .filter_map(|(name, on)| (!on).then_some(name))
    .collect();
    if !off.is_empty() {
        return Err(not_ready(format!(
            "{} of {node} is switched off: switch it on in spec.replicas",
            off.join(", ")
        )));
    }
    Ok(report)
}

/// Whether the successor's history can continue the predecessor's, soon.
fn may_follow(context: &Context<'_>, before: Uuid, successor: &Report) -> Result<(), Note> {
    let Some(before) = context.report(before) else {
        return Ok(());
    };
    let forks = |one: &Report, other: &Report| one.forks.iter().any(|fork| fork.with == other.replica_uuid);
    if forks(before, successor) || forks(successor, before) {
        return Err(Note {
            reason: Reason::SplitBrain,
            message: format!(
                "the histories of {} and {} have parted: let one of them sync again with a MarsAction Invalidate",
                before.node, successor.node
            ),
        });
    }
    if before.contains_end_of(successor) == Some(false) {
        return Err(Note {
            reason: Reason::SplitBrain,
            message: format!(
                "the history of {} is not known to be a part of that of {}: wait until it has fetched; if it has \
                 forked, let it sync again with a MarsAction Invalidate",
                successor.node, before.node
            ),
        });
    }
    let ends = before.durable_lsn().zip(successor.durable_lsn());
    let by_positions = ends.map(|(end, here)| (end - here).max(0));
    let behind = successor.lag_bytes.or(by_positions);
    if behind.is_none_or(|behind| behind > context.world.settings.handover_lag_bytes) {
        let amount = behind.map_or_else(|| "an unknown amount".to_owned(), |bytes| format!("{bytes} bytes"));
        return Err(Note {
            reason: Reason::CatchingUp,
            message: format!(
                "{} is {amount} behind {}: wait until it has caught up",
                successor.node, before.node
            ),
        });
    }
    Ok(())
}

/// Acknowledged failovers that wait for their designation.
fn wanted_failover<'a>(context: &'a Context<'_>) -> Option<(&'a mars_crds::MarsAction, Uuid)> {
    actions::active(context, Verb::Failover).next()
}
