//! Rebuilding the record from what agents report: after a loss or reset of status, or a failover that was acknowledged
//! on a node while the API was away.
//!
//! Invariant: nobody is designated who is not known to hold the newest history. Where somebody is silent who might,
//! nothing is decided until it is heard or a person acknowledges a failover.

use mars_crds::resource::{Designation, DesignationSource, Predecessor};
use uuid::Uuid;

use super::{Proposal, record};
use crate::plan::{Context, Draft, Note, Reason, wish};
use crate::world::Report;

/// Whether agents or grants mention something newer than the record, or there is history and no record.
pub(super) fn is_needed(context: &Context<'_>) -> bool {
    let recorded = context.designation().map(|designation| designation.number);
    let newer = context
        .highest_mentioned()
        .is_some_and(|highest| recorded.is_none_or(|number| highest.number > number));
    newer || (recorded.is_none() && context.reports.iter().any(|report| report.has_history))
}

/// Designates the replica that is known to be the newest primary.
pub(super) fn readopt(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    let highest = context.highest_mentioned();
    let number = highest.map_or(0, |highest| highest.number);
    let primaries: Vec<&Report> = context
        .reports
        .iter()
        .filter(|report| report.heard && report.is_primary())
        .collect();
    let under = |report: &Report| report.primary_under.map_or(0, |token| token.number);
    let newest_primary = primaries
        .iter()
        .copied()
        .filter(|report| under(report) == number && number > 0);
    let all_heard = silent(context).is_empty();
    let chosen = newest_primary.max_by_key(|report| under(report)).or_else(|| {
        let candidates = if primaries.is_empty() {
            context.reports.iter().collect()
        } else {
            primaries.clone()
        };
        let newest = candidates
            .into_iter()
            .filter(|report| under(report) > 0)
            .max_by_key(|report| under(report));
        newest.filter(|_| all_heard)
    });
    let unlearned = holder_may_be_unlearned(context, number);
    if !unlearned.is_empty() {
        draft.not_ready = Some(Note {
            reason: Reason::Readopting,
            message: format!(
                "agents know designation {number} and nobody says to be its holder yet: waits until {} can tell. If that does not \
                 come, choose with a MarsAction Failover",
                unlearned.join(", ")
            ),
        });
        return;
    }
    let Some(chosen) = chosen.filter(|chosen| chosen.heard) else {
        draft.not_ready = Some(explain(context, chosen));
        return;
    };
    propose(context, draft, new_id, chosen, number);
}

/// Who may hold the newest designation without having said so: it can stem from a failover that a node acknowledged while the API was away, and
/// a third member may tell of it before its holder does. A report that does not know it is an old one. Nobody is waited for if the record knows
/// the designation, if its holder has reported, or if a `Close` under it says who follows.
fn holder_may_be_unlearned(context: &Context<'_>, number: i64) -> Vec<String> {
    let is_newer = context.designation().is_some_and(|recorded| recorded.number < number);
    let tells_holder = |report: &Report| {
        let held = report.primary_under.is_some_and(|token| token.number == number);
        held || report
            .released
            .as_ref()
            .is_some_and(|released| released.number == number)
    };
    if !is_newer || context.reports.iter().any(tells_holder) {
        return Vec::new();
    }
    let knows = |report: &&Report| report.designation.is_some_and(|token| token.number >= number);
    let unlearned = context.reports.iter().filter(|report| report.heard && !knows(report));
    unlearned.map(|report| report.node.clone()).collect()
}

fn propose(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid, chosen: &Report, number: i64) {
    let recorded = context.designation().map(Designation::token);
    let why = match recorded {
        None => format!("the status was lost; the highest designation that can be learned is {number}"),
        Some(token) => format!(
            "agents know designation {number}, newer than the recorded {}",
            token.number
        ),
    };
    let seen = wish::seen_now(context);
    let successor = chosen
        .released
        .as_ref()
        .filter(|_| !chosen.is_primary())
        .and_then(|released| Some((released, context.world.replica(released.to?)?)));
    let proposal = match successor {
        Some((released, successor)) => Proposal {
            node: successor.spec.node.clone(),
            replica_uuid: Some(successor.spec.replica_uuid),
            source: DesignationSource::Handover,
            reason: format!("{why}; {} had closed for it", chosen.node),
            seen,
            action: None,
            predecessor: Some(Predecessor {
                node: chosen.node.clone(),
                replica_uuid: chosen.replica_uuid,
                released_end: Some(released.end.clone()),
            }),
        },
        None => Proposal {
            node: chosen.node.clone(),
            replica_uuid: Some(chosen.replica_uuid),
            source: DesignationSource::Readopt,
            reason: why,
            seen,
            action: None,
            predecessor: None,
        },
    };
    record(context, draft, new_id, proposal);
}

/// Members that have not been heard, or have not said anything yet.
fn silent(context: &Context<'_>) -> Vec<String> {
    let members = context
        .world
        .resource
        .spec
        .replicas
        .iter()
        .map(|member| member.node.as_str());
    let replicas = context.world.replicas.iter().map(|replica| replica.spec.node.as_str());
    let mut nodes: Vec<&str> = members.chain(replicas).collect();
    nodes.sort_unstable();
    nodes.dedup();
    let is_silent = |node: &&str| !context.report_on(node).is_some_and(|report| report.heard);
    nodes.into_iter().filter(is_silent).map(str::to_owned).collect()
}

fn explain(context: &Context<'_>, newest: Option<&Report>) -> Note {
    let silent = silent(context);
    let name = context.world.name();
    let message = if let (true, Some(newest)) = (silent.is_empty(), newest) {
        format!(
            "{node} was primary of {name} last and its data there is closed: add {node} to spec.replicas, or choose with a \
             MarsAction Failover to the replica that shall win",
            node = newest.node
        )
    } else if silent.is_empty() {
        format!(
            "data of {name} exists but no replica says that it was primary last: choose with a MarsAction Failover to the \
             replica that shall win"
        )
    } else {
        format!(
            "data of {name} exists and the record of its primary is lost or too old; waits to hear from {}. If they are \
             lost, choose with a MarsAction Failover",
            silent.join(", ")
        )
    };
    Note {
        reason: Reason::Readopting,
        message,
    }
}
