//! Forced changes: by an acknowledged `MarsAction`, or automatic with evidence.
//!
//! Invariant: without a person's acknowledgement nobody is passed over who could still write: the node must be fenced
//! by Kubernetes – the very Node that was recorded while its agent was heard –, silent towards us, and without contact to any other
//! member.

use mars_crds::common::DurationText;
use mars_crds::resource::{DesignationSource, FailoverPolicy, Predecessor};
use std::time::Duration;
use uuid::Uuid;

use super::{Proposal, may_succeed, record, wanted_failover};
use crate::plan::{Context, Draft, actions, losses, wish};
use crate::world::Report;

/// Carries out an acknowledged failover. Says whether one was decided.
pub(super) fn acknowledged(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) -> bool {
    let Some((action, id)) = wanted_failover(context) else {
        return false;
    };
    let node = action.spec.node.as_deref().unwrap_or_default();
    let successor = match may_be_forced(context, node) {
        Ok(successor) => successor,
        Err(message) => {
            draft.waiting.insert(actions::name(action).to_owned(), message);
            return false;
        }
    };
    let predecessor = predecessor(context);
    let reason = format!(
        "the MarsAction {} was acknowledged{}",
        actions::name(action),
        losses::foreseen(context, unreleased(predecessor.as_ref()), successor)
    );
    let proposal = Proposal {
        node: node.to_owned(),
        replica_uuid: Some(successor.replica_uuid),
        source: DesignationSource::Failover,
        reason,
        seen: wish::seen_now(context),
        action: Some(id),
        predecessor,
    };
    record(context, draft, new_id, proposal);
    true
}

/// Only consistency, presence and its data disk are demanded of a forced successor; other switches and lag are not. A detached disk
/// is in the hands of whoever asked for it: taking it back is for people to order.
fn may_be_forced<'a>(context: &'a Context<'_>, node: &str) -> Result<&'a Report, String> {
    match may_succeed(context, node) {
        Ok(report) => Ok(report),
        Err(refusal) => {
            let replica = context.world.replica_on(node);
            let report = replica.and_then(|replica| context.report(replica.spec.replica_uuid));
            let is_primary = report.is_some_and(Report::is_primary);
            if !is_primary && replica.is_some_and(|replica| !replica.spec.switches.attach) {
                return Err(refusal.message);
            }
            let usable = |report: &&Report| {
                report.heard && !report.leaving && report.data == Some(mars_crds::ReplicaData::Consistent)
            };
            report.filter(usable).ok_or(refusal.message)
        }
    }
}

fn predecessor(context: &Context<'_>) -> Option<Predecessor> {
    let designation = context.designation()?;
    let holder = context.holder().filter(|_| context.holder_has_taken_over());
    match holder {
        Some(holder) => Some(Predecessor {
            node: holder.node.clone(),
            replica_uuid: holder.replica_uuid,
            released_end: None,
        }),
        None => designation.predecessor.clone(),
    }
}

/// Whose history may go on beyond what is known of it.
fn unreleased(predecessor: Option<&Predecessor>) -> Option<Uuid> {
    let before = predecessor.filter(|before| before.released_end.is_none())?;
    Some(before.replica_uuid)
}

/// Carries out a failover by policy. Says whether one was decided.
pub(super) fn automatic(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) -> bool {
    let resource = &context.world.resource.spec;
    if resource.failover.policy != FailoverPolicy::Automatic || !context.problems.is_empty() {
        return false;
    }
    let Some(holder) = serving(context) else { return false };
    let Some(evidence) = evidence(context, holder, resource.failover.after) else {
        return false;
    };
    let Some(successor) = best(context, holder) else {
        return false;
    };
    let predecessor = predecessor(context);
    let losses = losses::foreseen(context, unreleased(predecessor.as_ref()), successor);
    let proposal = Proposal {
        node: successor.node.clone(),
        replica_uuid: Some(successor.replica_uuid),
        source: DesignationSource::Failover,
        reason: format!("failover.policy is Automatic and {evidence}{losses}"),
        seen: wish::seen_now(context),
        action: None,
        predecessor,
    };
    record(context, draft, new_id, proposal);
    true
}

/// Who may be writing at present: the designated replica, or the predecessor that has not released.
fn serving<'a>(context: &'a Context<'_>) -> Option<&'a Report> {
    let designation = context.designation()?;
    let unreleased = designation
        .predecessor
        .as_ref()
        .filter(|before| before.released_end.is_none());
    match (context.holder_has_taken_over(), unreleased) {
        (false, Some(before)) if designation.source == DesignationSource::Handover => {
            context.report(before.replica_uuid)
        }
        _ => context.holder(),
    }
}

fn evidence(context: &Context<'_>, holder: &Report, after: Option<DurationText>) -> Option<String> {
    let settings = &context.world.settings;
    let after = after.map_or(settings.failover_after_seconds, |after| {
        i64::try_from(Duration::from(after).as_secs()).unwrap_or(i64::MAX)
    });
    let after = after.max(settings.liveness_seconds);
    let view = context.world.nodes.get(&holder.node)?;
    let fenced = context.world.fenced(&holder.node)?;
    if view.silent_seconds < after {
        return None;
    }
    let now = context.world.now.as_second();
    let in_contact = context.world.replicas.iter().any(|replica| {
        let peers = replica.status.iter().flat_map(|status| &status.peers);
        let heard = context.world.is_heard(&replica.spec.node);
        peers
            .filter(|peer| peer.replica_uuid == holder.replica_uuid)
            .any(|peer| {
                let recent = peer
                    .last_contact
                    .as_ref()
                    .is_some_and(|last| now - last.0.as_second() < after);
                heard && (peer.connected || recent)
            })
    });
    (!in_contact).then(|| {
        format!(
            "{} is fenced ({fenced}) and silent for {} s",
            holder.node, view.silent_seconds
        )
    })
}

/// Why `node` is never failed over from automatically although that is asked for; ends a sentence.
pub(in crate::plan) fn no_evidence(context: &Context<'_>, node: &str) -> String {
    let automatic = context.world.resource.spec.failover.policy == FailoverPolicy::Automatic;
    if !automatic || context.world.recorded_kube_node(node).is_some() {
        return String::new();
    }
    format!(
        ". No automatic failover: there was no Node {node} in Kubernetes while its agent was heard, so nothing can prove that it does not \
         write any more; if it is lost use a MarsAction Failover"
    )
}

/// The wished node if it can, else the one that has most, else the first in the spec.
fn best<'a>(context: &'a Context<'_>, holder: &Report) -> Option<&'a Report> {
    let wished = context.world.resource.spec.attached_to.as_deref().unwrap_or_default();
    let members = context.world.resource.spec.replicas.iter().rev();
    members
        .filter(|member| member.node != holder.node)
        .filter_map(|member| may_succeed(context, &member.node).ok())
        .filter(|report| report.forks.is_empty())
        .max_by_key(|report| (report.node == wished, report.durable_lsn()))
}
