//! What one side has and the other has not: forks, and what a failover has left behind.
//!
//! Invariant: what was last heard of a node that may have written on is a lower bound, and is called so – in the field beside the
//! figure and in words – until the node has answered.

use mars_crds::replica::Fork;
use mars_crds::resource::{Designation, DesignationSource, ForkReport, LeftBehind};
use uuid::Uuid;

use super::Context;
use crate::world::Report;

/// `N bytes`, or `at least N bytes`.
pub(super) fn bytes(bytes: i64, at_least: bool) -> String {
    format!("{}{bytes} bytes", if at_least { "at least " } else { "" })
}

/// All forks, each once.
pub(super) fn forks(context: &Context<'_>) -> Vec<ForkReport> {
    let mut forks: Vec<ForkReport> = Vec::new();
    for report in &context.reports {
        for fork in &report.forks {
            let Some(other) = context.report(fork.with) else {
                continue;
            };
            let known = forks.iter().any(|known| {
                (known.node == report.node && known.other == other.node)
                    || (known.node == other.node && known.other == report.node)
            });
            if known {
                continue;
            }
            // The other side may know what this one does not.
            let back = other.forks.iter().find(|back| back.with == report.replica_uuid);
            forks.push(ForkReport {
                node: report.node.clone(),
                other: other.node.clone(),
                lsn: fork.lsn,
                since: fork.since.clone(),
                node_bytes: fork.ours_bytes.max(back.map_or(0, |back| back.theirs_bytes)),
                other_bytes: fork.theirs_bytes.max(back.map_or(0, |back| back.ours_bytes)),
                node_at_least: !is_exact((report, Some(fork)), (other, back)),
                other_at_least: !is_exact((other, back), (report, Some(fork))),
                node_seconds: fork.ours_seconds.or_else(|| back?.theirs_seconds),
                other_seconds: fork.theirs_seconds.or_else(|| back?.ours_seconds),
            });
        }
    }
    forks
}

/// Whether what one side has beyond a fork is known: from itself, or while it is not heard from the other side.
fn is_exact((side, own): (&Report, Option<&Fork>), (other, told): (&Report, Option<&Fork>)) -> bool {
    match (own.filter(|_| side.heard), told.filter(|_| other.heard)) {
        (Some(own), _) => !own.ours_at_least,
        (None, Some(told)) => !told.theirs_at_least,
        (None, None) => false,
    }
}

/// What the primary before the failover has and the present one has not. Kept over later changes of the role while it has not answered.
pub(super) fn left_behind(context: &Context<'_>) -> Option<LeftBehind> {
    let designation = context.designation()?;
    let earlier = context.status.left_behind.as_ref();
    let before = designation.predecessor.as_ref().filter(|before| {
        designation.source == DesignationSource::Failover
            && before.released_end.is_none()
            && designation.replica_uuid != Some(before.replica_uuid)
    });
    let Some(before) = before else {
        let left = earlier.filter(|left| left.at_least && designation.replica_uuid != Some(left.replica_uuid))?;
        let old = context.report(left.replica_uuid)?;
        return (!has_answered(old, designation)).then(|| left.clone());
    };
    let (old, successor) = (context.report(before.replica_uuid)?, context.holder()?);
    // Its answer counts for good, however often it is away later.
    let known = earlier.filter(|left| left.number == designation.number && !left.at_least);
    if let Some(known) = known.filter(|_| !old.heard) {
        return Some(known.clone());
    }
    let begun = context.holder_has_taken_over().then(|| began_at(successor)).flatten();
    Some(LeftBehind {
        node: old.node.clone(),
        replica_uuid: old.replica_uuid,
        number: designation.number,
        bytes: beyond(old, successor, begun.or(successor.durable_lsn())),
        at_least: known.is_none() && !has_answered(old, designation),
    })
}

/// Whether an old primary has said everything: it follows the designation, and what it found after a restart is durable again.
fn has_answered(old: &Report, designation: &Designation) -> bool {
    let follows = old.designation.is_some_and(|known| known.number >= designation.number);
    old.heard && !old.is_primary() && follows && old.forks.iter().all(|fork| !fork.ours_at_least)
}

/// Where the last failover to this replica continued the history.
fn began_at(successor: &Report) -> Option<i64> {
    let mut epochs = successor.lineage.iter().rev();
    let own = epochs.find(|epoch| epoch.origin == successor.replica_uuid && epoch.cause == "Failover")?;
    Some(own.parent.lsn)
}

/// Bytes of `old` that are not in the history of `successor`, which goes on from `end`.
fn beyond(old: &Report, successor: &Report, end: Option<i64>) -> i64 {
    if successor.contains_end_of(old) == Some(true) {
        return 0;
    }
    let by_position = old.durable_lsn().zip(end).map(|(old, end)| old - end);
    let with = |report: &Report, with: Uuid| report.forks.iter().find(|fork| fork.with == with).cloned();
    let told = with(successor, old.replica_uuid).map(|fork| fork.theirs_bytes);
    let own = with(old, successor.replica_uuid).map(|fork| fork.ours_bytes);
    [by_position, told, own].into_iter().flatten().max().unwrap_or(0).max(0)
}

/// What a failover to `successor` leaves behind, as far as it is known beforehand; ends a sentence.
pub(super) fn foreseen(context: &Context<'_>, old: Option<Uuid>, successor: &Report) -> String {
    let old = old.filter(|old| *old != successor.replica_uuid);
    let Some(old) = old.and_then(|old| context.report(old)) else {
        return String::new();
    };
    // Ends in one history are compared: what the successor has is not yet told by an epoch of its own.
    let more = old
        .durable_lsn()
        .zip(successor.durable_lsn())
        .map_or(0, |(old, here)| (old - here).max(0));
    format!(
        "; by what {} was last heard to have, {} of it are not on {}",
        old.node,
        bytes(more, true),
        successor.node
    )
}
