//! What people see: conditions with cause and next command, one line per member, lag, forks.
//!
//! Invariant: the status says what agents report and what was recorded; it decides nothing, but remembers one thing that counts later:
//! which Kubernetes Node each agent had while it was heard. Changes of state are written at once, changes of positions alone only
//! every `positionsEverySeconds`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mars_crds::common::Lag;
use mars_crds::conditions::{self, Truth};
use mars_crds::resource::ReplicaSummary;
use mars_crds::{ActualRole, MarsReplica, MarsResourceStatus, ReplicaData};
use std::time::Duration;

use super::{Context, Draft, Intent, Note, Reason, Severity, intent::role_word, losses};
use crate::world::Report;

/// Conditions of a replica that make the resource `Degraded` when they are True.
const FAULTS: [&str; 7] = [
    "LogStoreFailed",
    "DataDiskFailed",
    "StateFailed",
    "LogDefect",
    "DiskTooSmall",
    "Orphan",
    "PoolAbsent",
];

/// Adds the status, and an event for each condition that has turned, unless nothing worth writing has changed.
pub(super) fn conclude(context: &Context<'_>, draft: &mut Draft) {
    let mut status = context.status.clone();
    summarize(context, draft, &mut status);
    let turned = set_conditions(context, draft, &mut status);
    for (severity, reason, message) in turned {
        draft.event(severity, &reason, message);
    }
    let old = context.world.resource.status.as_ref();
    if let Some(message) = old.and_then(|old| has_answered(old, &status)) {
        draft.event(Severity::Normal, "PredecessorAnswered", message);
    }
    let changed = old.is_none_or(|old| *old != status);
    let only_positions = old.is_some_and(|old| without_positions(old) == without_positions(&status));
    let recent = context.world.positions_written.is_some_and(|written| {
        context.world.now.as_second() - written.as_second() < context.world.settings.positions_every_seconds
    });
    if changed && !(only_positions && recent) {
        draft.push(Intent::SetStatus(Box::new(status)));
    }
}

/// The figure after a failover is final.
fn has_answered(old: &MarsResourceStatus, new: &MarsResourceStatus) -> Option<String> {
    let was = old.left_behind.as_ref().filter(|left| left.at_least)?;
    let now = new.left_behind.as_ref().filter(|left| !left.at_least)?;
    let (node, bytes) = (&now.node, losses::bytes(now.bytes, false));
    (now.replica_uuid == was.replica_uuid).then(|| format!("{node} answers after the failover: {bytes} are only there"))
}

fn without_positions(status: &MarsResourceStatus) -> MarsResourceStatus {
    let mut status = status.clone();
    status.lag = None;
    status.lag_text.clear();
    for replica in &mut status.replicas {
        replica.lag = None;
        replica.sync_percent = None;
    }
    if let Some(left) = &mut status.left_behind {
        left.bytes = 0;
    }
    for fork in &mut status.forks {
        (fork.node_bytes, fork.other_bytes) = (0, 0);
        (fork.node_seconds, fork.other_seconds) = (None, None);
    }
    status
}

fn summarize(context: &Context<'_>, draft: &Draft, status: &mut MarsResourceStatus) {
    let world = context.world;
    let spec = &world.resource.spec;
    let primaries: Vec<&str> = context
        .reports
        .iter()
        .filter(|report| report.is_primary())
        .map(|report| report.node.as_str())
        .collect();
    status.observed_generation = world.resource.metadata.generation;
    status.primary = primaries.join(",");
    let attached = spec.attached_to.clone().filter(|node| !node.is_empty());
    let wished = attached.unwrap_or_else(|| spec.primary.clone());
    // A wish that is not carried out yet is shown beside the fact; without one, who is designated.
    let designated = context.designation().map(|designation| designation.node.clone());
    let counting = super::wish::counting(context).map(|wish| wish.node);
    status.wish = counting.or(designated).unwrap_or(wished);
    status.replicas = world.replicas.iter().map(|replica| summary(context, replica)).collect();
    let ready = context
        .reports
        .iter()
        .filter(|report| is_up_to_date(context, report))
        .count();
    status.replicas_ready = format!("{ready}/{}", spec.replicas.len().max(world.replicas.len()));
    status.lag = worst_lag(context);
    status.lag_text = status.lag.as_ref().map(lag_text).unwrap_or_default();
    status.forks = losses::forks(context);
    status.left_behind = losses::left_behind(context);
    status.state = state(context, draft, status).to_owned();
}

fn summary(context: &Context<'_>, replica: &MarsReplica) -> ReplicaSummary {
    let spec = &replica.spec;
    let reported = replica.status.clone().unwrap_or_default();
    let state = if replica.metadata.deletion_timestamp.is_some() {
        "Leaving".to_owned()
    } else {
        reported.state
    };
    ReplicaSummary {
        node: spec.node.clone(),
        replica_uuid: Some(spec.replica_uuid),
        wish: spec.role,
        role: reported.role,
        data: reported.data_state,
        state: if state.is_empty() {
            role_word(reported.role).to_owned()
        } else {
            state
        },
        heard: context.world.is_heard(&spec.node),
        lag: reported.lag,
        sync_percent: reported.sync.map(|sync| sync.percent),
        kube_node_uid: context.world.kube_node_to_record(&spec.node).map(str::to_owned),
    }
}

fn is_up_to_date(context: &Context<'_>, report: &Report) -> bool {
    let near = report
        .lag_bytes
        .is_some_and(|bytes| bytes <= context.world.settings.almost_bytes);
    report.heard
        && !report.leaving
        && report.forks.is_empty()
        && report.data == Some(ReplicaData::Consistent)
        && (report.is_primary() || near)
}

/// Members whose `applyDelay` or switches hold them back on purpose do not count.
fn worst_lag(context: &Context<'_>) -> Option<Lag> {
    let held_back = |node: &str| {
        let member = context
            .world
            .resource
            .spec
            .replicas
            .iter()
            .find(|member| member.node == node);
        member.is_none_or(|member| !member.switches.fetch || !member.switches.attach)
    };
    let lags = context
        .world
        .replicas
        .iter()
        .filter(|replica| !held_back(&replica.spec.node))
        .filter(|replica| {
            !context
                .report(replica.spec.replica_uuid)
                .is_some_and(Report::is_primary)
        })
        .filter_map(|replica| replica.status.as_ref()?.lag.clone());
    lags.max_by_key(|lag| (lag.bytes, lag.seconds))
}

fn lag_text(lag: &Lag) -> String {
    if lag.bytes == 0 {
        return "0".to_owned();
    }
    format!("{} / {} s", human(lag.bytes), lag.seconds)
}

/// Whole units are enough at a glance.
fn human(bytes: i64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, shift)| bytes >> shift > 0);
    unit.map_or_else(
        || format!("{bytes} B"),
        |(name, shift)| format!("{} {name}", bytes >> shift),
    )
}

fn state(context: &Context<'_>, draft: &Draft, status: &MarsResourceStatus) -> &'static str {
    let has = |data| context.reports.iter().any(|report| report.data == Some(data));
    let primary = context
        .reports
        .iter()
        .any(|report| report.role == Some(ActualRole::Primary));
    let members = context.world.resource.spec.replicas.len();
    if context.world.resource.metadata.deletion_timestamp.is_some() {
        "Deleting"
    } else if !context.problems.is_empty() {
        "Invalid"
    } else if !status.forks.is_empty() || draft.split_brain.is_some() {
        "SplitBrain"
    } else if emergency(context).is_some() {
        "Emergency"
    } else if context.designation().is_none() {
        if draft
            .not_ready
            .as_ref()
            .is_some_and(|note| note.reason == Reason::NoPrimaryWished)
        {
            "NoPrimary"
        } else {
            "Creating"
        }
    } else if refusal_of_designated(context).is_some() {
        "Degraded"
    } else if draft.switching.as_ref().is_some_and(|note| is_under_way(note.reason)) {
        "Switching"
    } else if !primary {
        "NoPrimary"
    } else if has(ReplicaData::Syncing) || has(ReplicaData::Blank) {
        "Syncing"
    } else if degraded(context, draft).1 == Truth::True {
        "Degraded"
    } else if context
        .reports
        .iter()
        .filter(|report| is_up_to_date(context, report))
        .count()
        < members
    {
        "CatchingUp"
    } else {
        "Healthy"
    }
}

fn silent<'a>(context: &'a Context<'_>) -> Vec<&'a str> {
    let members = context
        .world
        .resource
        .spec
        .replicas
        .iter()
        .map(|member| member.node.as_str());
    members.filter(|node| !context.world.is_heard(node)).collect()
}

/// Faults that agents report, as `node: message`.
fn faults(context: &Context<'_>) -> Vec<String> {
    let mut faults = Vec::new();
    for replica in &context.world.replicas {
        let node = &replica.spec.node;
        let status = replica.status.clone().unwrap_or_default();
        for condition in &status.conditions {
            if condition.status == "True" && FAULTS.contains(&condition.type_.as_str()) {
                faults.push(format!("{node}: {}: {}", condition.type_, condition.message));
            }
        }
        if let Some(refusal) = refusal(replica) {
            faults.push(format!("{node}: {refusal}"));
            continue;
        }
        match status.data_state {
            Some(ReplicaData::Missing) => faults.push(format!("{node}: its data is missing; bring the disk back")),
            Some(ReplicaData::Quarantined) => {
                faults.push(format!("{node}: its data is quarantined; remove and add it"));
            }
            Some(ReplicaData::LogLost) => faults.push(format!(
                "{node}: its log ended below what was written back; let it sync with a MarsAction Invalidate"
            )),
            _ => {}
        }
    }
    faults
}

/// Why the agent does not run this replica at all: it says no role, and what is in the way.
fn refusal(replica: &MarsReplica) -> Option<String> {
    let status = replica.status.as_ref().filter(|status| status.role.is_none())?;
    let cause = conditions::get(&status.conditions, conditions::DEGRADED)?;
    let shown_by_data = matches!(
        status.data_state,
        Some(ReplicaData::Missing | ReplicaData::Quarantined | ReplicaData::LogLost)
    );
    (cause.status == "True" && !shown_by_data).then(|| format!("{}: {}", cause.reason, cause.message))
}

/// The same of the replica that shall be primary.
pub(super) fn refusal_of_designated(context: &Context<'_>) -> Option<String> {
    refusal(context.world.replica_on(&context.designation()?.node)?)
}

fn emergency(context: &Context<'_>) -> Option<String> {
    context.world.replicas.iter().find_map(|replica| {
        let status = replica.status.as_ref()?;
        let condition = conditions::get(&status.conditions, conditions::EMERGENCY)?;
        (condition.status == "True").then(|| format!("{}: {}", replica.spec.node, condition.message))
    })
}

type Verdict = (&'static str, Truth, String, String);

fn verdict(type_: &'static str, truth: impl Into<Truth>, reason: &str, message: impl Into<String>) -> Verdict {
    (type_, truth.into(), reason.to_owned(), message.into())
}

fn set_conditions(
    context: &Context<'_>,
    draft: &Draft,
    status: &mut MarsResourceStatus,
) -> Vec<(Severity, String, String)> {
    let now = Time(context.world.now);
    let generation = context.world.resource.metadata.generation;
    let verdicts = [
        ready(context, draft),
        switching(draft),
        replicating(context),
        synced(context),
        split_brain(draft, status),
        emergency(context).map_or_else(
            || verdict(conditions::EMERGENCY, false, "LogStoresFine", ""),
            |message| verdict(conditions::EMERGENCY, true, "LogStoreFull", message),
        ),
        degraded(context, draft),
    ];
    let mut turned = Vec::new();
    for (type_, truth, reason, message) in verdicts {
        let before = conditions::get(&status.conditions, type_).map(|condition| condition.status.clone());
        conditions::set(
            &mut status.conditions,
            type_,
            truth,
            &reason,
            &message,
            generation,
            &now,
        );
        let bad = if matches!(type_, conditions::READY | conditions::REPLICATING | conditions::SYNCED) {
            Truth::False
        } else {
            Truth::True
        };
        let known = before.is_some();
        if before.as_deref() != Some(truth.as_str()) && (known || truth == bad) && type_ != conditions::SWITCHING {
            let severity = if truth == bad && known && reason != "Switching" {
                Severity::Warning
            } else {
                Severity::Normal
            };
            turned.push((
                severity,
                reason.clone(),
                format!("{type_} is {}: {message}", truth.as_str()),
            ));
        }
    }
    turned
}

fn ready(context: &Context<'_>, draft: &Draft) -> Verdict {
    if let Some(Note { reason, message }) = &draft.not_ready {
        return verdict(conditions::READY, false, &reason.word(), message);
    }
    let node = context
        .designation()
        .map(|designation| designation.node.clone())
        .unwrap_or_default();
    match context.holder() {
        Some(holder) if holder.role == Some(ActualRole::Primary) && holder.heard => {
            verdict(conditions::READY, true, "Primary", format!("{node} is primary"))
        }
        Some(holder) if holder.role == Some(ActualRole::Primary) => verdict(
            conditions::READY,
            Truth::Unknown,
            &Reason::PeersSilent.word(),
            format!(
                "{node} was primary when it was last heard; look after its agent{}",
                super::designation::no_evidence(context, &node)
            ),
        ),
        _ => {
            if let Some(refusal) = refusal_of_designated(context) {
                return verdict(
                    conditions::READY,
                    false,
                    &Reason::ReplicaFault.word(),
                    format!("{node}: {refusal}"),
                );
            }
            let why = draft
                .switching
                .as_ref()
                .map_or("its agent has not taken the role yet", |note| note.message.as_str());
            let message = if node.is_empty() {
                "no node is designated".to_owned()
            } else {
                format!("{node}: {why}")
            };
            let moving = draft.switching.as_ref().is_some_and(|note| is_under_way(note.reason));
            verdict(
                conditions::READY,
                false,
                if moving { "Switching" } else { "NoPrimary" },
                message,
            )
        }
    }
}

/// Whether the role is on its way, as opposed to being held up.
fn is_under_way(reason: Reason) -> bool {
    matches!(reason, Reason::Closing | Reason::Promoting)
}

fn switching(draft: &Draft) -> Verdict {
    match &draft.switching {
        None => verdict(conditions::SWITCHING, false, "Settled", ""),
        Some(Note { reason, message }) => {
            verdict(conditions::SWITCHING, is_under_way(*reason), &reason.word(), message)
        }
    }
}

fn replicating(context: &Context<'_>) -> Verdict {
    let silent = silent(context);
    let held: Vec<&str> = context
        .world
        .resource
        .spec
        .replicas
        .iter()
        .filter(|member| !member.switches.fetch || !member.switches.attach)
        .map(|member| member.node.as_str())
        .collect();
    if !silent.is_empty() {
        let message = format!("{} silent: start their agents; log is kept for them", silent.join(", "));
        return verdict(conditions::REPLICATING, false, &Reason::PeersSilent.word(), message);
    }
    let message = if held.is_empty() {
        String::new()
    } else {
        format!("switched off on {}", held.join(", "))
    };
    verdict(conditions::REPLICATING, true, "AllHeard", message)
}

fn synced(context: &Context<'_>) -> Verdict {
    let behind: Vec<String> = context
        .world
        .resource
        .spec
        .replicas
        .iter()
        .filter_map(
            |member| match context.report_on(&member.node).and_then(|report| report.data) {
                Some(ReplicaData::Consistent) => None,
                Some(state) => Some(format!("{} ({state:?})", member.node)),
                None => Some(format!("{} (not reported)", member.node)),
            },
        )
        .collect();
    if behind.is_empty() {
        return verdict(conditions::SYNCED, true, "AllConsistent", "");
    }
    verdict(
        conditions::SYNCED,
        false,
        "NotConsistent",
        format!("not consistent: {}", behind.join(", ")),
    )
}

fn split_brain(draft: &Draft, status: &MarsResourceStatus) -> Verdict {
    if let Some(note) = &draft.split_brain {
        return verdict(conditions::SPLIT_BRAIN, true, &note.reason.word(), &note.message);
    }
    if status.forks.is_empty() {
        return verdict(conditions::SPLIT_BRAIN, false, "OneHistory", "");
    }
    let only_on = |node: &str, (bytes, at_least): (i64, bool), seconds: Option<i64>| {
        let seconds = seconds.map_or_else(String::new, |seconds| format!(" / {seconds} s"));
        format!("{}{seconds} only on {node}", losses::bytes(bytes, at_least))
    };
    let list: Vec<String> = status
        .forks
        .iter()
        .map(|fork| {
            format!(
                "{} and {} fork at {} ({}, {})",
                fork.node,
                fork.other,
                fork.lsn,
                only_on(&fork.node, (fork.node_bytes, fork.node_at_least), fork.node_seconds),
                only_on(&fork.other, (fork.other_bytes, fork.other_at_least), fork.other_seconds)
            )
        })
        .collect();
    let message = format!(
        "{}; stop the device on the node that shall lose and use a MarsAction Invalidate there",
        list.join("; ")
    );
    verdict(conditions::SPLIT_BRAIN, true, &Reason::SplitBrain.word(), message)
}

fn degraded(context: &Context<'_>, draft: &Draft) -> Verdict {
    let mut causes: Vec<(String, String)> = draft
        .degraded
        .iter()
        .map(|note| (note.reason.word(), note.message.clone()))
        .collect();
    causes.extend(
        faults(context)
            .into_iter()
            .map(|fault| (Reason::ReplicaFault.word(), fault)),
    );
    if let Some(rpo) = context.world.resource.spec.rpo {
        let limit = i64::try_from(Duration::from(rpo).as_secs()).unwrap_or(i64::MAX);
        if let Some(lag) = worst_lag(context).filter(|lag| lag.bytes > 0 && lag.seconds > limit) {
            let message = format!(
                "a replica is {} s behind, more than rpo allows ({limit} s)",
                lag.seconds
            );
            causes.push((Reason::RpoExceeded.word(), message));
        }
    }
    if let Some(left) = losses::left_behind(context).filter(|left| left.at_least) {
        let message = format!(
            "{} was primary before the failover and has not settled since: {} of it are not on the primary; how many is known when it \
             answers: start its agent",
            left.node,
            losses::bytes(left.bytes, true)
        );
        causes.push((Reason::PredecessorSilent.word(), message));
    }
    let silent = silent(context);
    if !silent.is_empty() {
        let message = format!("{} silent: start their agents", silent.join(", "));
        causes.push((Reason::PeersSilent.word(), message));
    }
    match causes.first() {
        None => verdict(conditions::DEGRADED, false, "Fine", ""),
        Some((reason, _)) => {
            let list: Vec<&str> = causes.iter().map(|(_, message)| message.as_str()).collect();
            verdict(conditions::DEGRADED, true, reason, list.join("; "))
        }
    }
}
