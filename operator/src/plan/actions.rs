//! `MarsAction`: each is identified before it is carried out, carried out once, and finished with a cause.
//!
//! Invariants: an action whose designation has been recorded is never carried out again: the designation carries the
//! action's id, and the number is noted in the action before anything newer is designated. An action is about the resource that
//! was there when it was made, never about a later one of the same name.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mars_crds::common::OneShot;
use mars_crds::conditions::{self, Truth};
use mars_crds::resource::{DesignationSource, Tombstone};
use mars_crds::{ActionPhase, MarsAction, MarsActionStatus, REPLICA_FINALIZER, ReplicaData, Verb, WishRole, validate};
use uuid::Uuid;

use super::{Context, Draft, EventNote, Intent, Reason, Severity};
use crate::world::Report;

/// Ends the message of a finished action: applying the same manifest again changes nothing, and nothing says so.
const DONE_ONCE: &str = "An action is carried out once; applied again under this name it does nothing: order anew with `kubectl create` \
                         and metadata.generateName";

/// What became of an action in this pass.
enum Step {
    /// Nothing yet.
    Wait(String),
    /// Done.
    Succeeded(String),
    /// Will never be done.
    Failed(String),
}

pub(crate) fn name(action: &MarsAction) -> &str {
    action.metadata.name.as_deref().unwrap_or_default()
}

/// Identity of the order, once recorded.
pub(super) fn id(action: &MarsAction) -> Option<Uuid> {
    action.status.as_ref().and_then(|status| status.id)
}

pub(crate) fn is_finished(action: &MarsAction) -> bool {
    let phase = action.status.as_ref().map(|status| status.phase);
    matches!(phase, Some(ActionPhase::Succeeded | ActionPhase::Failed))
}

/// Identified, unfinished actions of a kind that have not made their designation yet, oldest first.
pub(super) fn active<'a>(context: &'a Context<'_>, verb: Verb) -> impl Iterator<Item = (&'a MarsAction, Uuid)> {
    let made = context.designation().and_then(|designation| designation.action);
    context
        .world
        .actions
        .iter()
        .filter(move |action| action.spec.verb == verb && !is_finished(action))
        .filter(|action| {
            action
                .status
                .as_ref()
                .is_some_and(|status| status.designation_number.is_none())
        })
        .filter_map(|action| Some((action, id(action)?)))
        .filter(move |(_, id)| made != Some(*id))
}

/// Moves every action as far as it goes by itself; designations are made by the stage that follows.
pub(super) fn advance(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    for action in &context.world.actions {
        let status = action.status.clone().unwrap_or_default();
        if is_finished(action) {
            expire(context, draft, action, &status);
            continue;
        }
        if let Some(reason) = is_older_than_resource(context, action) {
            let now = context.world.now;
            let status = finished(action, now, ActionPhase::Failed, Reason::NoSuchResource, &reason);
            conclude(draft, action, status);
            continue;
        }
        let mut problems = validate::action(action, None);
        if let Some(uuid) = context.status.uuid {
            problems.extend(validate::acknowledge(action, uuid).err());
        }
        if !problems.is_empty() {
            finish(context, draft, action, Step::Failed(validate::summary(&problems)));
            continue;
        }
        if status.id.is_none() {
            begin(context, draft, action, new_id());
            continue;
        }
        let step = step(context, draft, action, &status);
        if let Step::Wait(message) = step {
            if is_overdue(context, action) {
                finish(
                    context,
                    draft,
                    action,
                    Step::Failed(format!("not done in time: {message}")),
                );
            } else if !message.is_empty() {
                draft.waiting.insert(name(action).to_owned(), message);
            }
        } else {
            finish(context, draft, action, step);
        }
    }
}

fn expire(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, status: &MarsActionStatus) {
    let over = expires_in(status, action, context.world.now).is_some_and(|seconds| seconds <= 0);
    if over && action.metadata.deletion_timestamp.is_none() {
        draft.push(Intent::DeleteAction {
            action: name(action).to_owned(),
        });
    }
}

/// When a finished action is deleted (seconds from now).
pub(crate) fn expires_in(status: &MarsActionStatus, action: &MarsAction, now: Timestamp) -> Option<i64> {
    let end = status.completion_time.as_ref()?;
    Some(action.spec.ttl_seconds - (now.as_second() - end.0.as_second()))
}

/// Why an action is not about this resource, if so. Both stamps are the API server's.
fn is_older_than_resource(context: &Context<'_>, action: &MarsAction) -> Option<String> {
    let resource = &context.world.resource.metadata;
    let made = resource.creation_timestamp.as_ref()?.0;
    let seconds = made.as_second() - action.metadata.creation_timestamp.as_ref()?.0.as_second();
    (seconds > context.world.settings.action_grace_seconds).then(|| {
        format!(
            "it was made {seconds} s before this MarsResource {}, so it meant another one: look at `kubectl get mars`, then create \
             it again if this one is meant",
            context.world.name()
        )
    })
}

/// The end of an action whose resource is not there.
pub(crate) fn without_resource(action: &MarsAction, now: Timestamp) -> MarsActionStatus {
    let message = format!(
        "there is no MarsResource {}: look for its name with `kubectl get mars`, then create the action for that",
        action.spec.resource
    );
    finished(action, now, ActionPhase::Failed, Reason::NoSuchResource, &message)
}

fn is_overdue(context: &Context<'_>, action: &MarsAction) -> bool {
    let started = action.status.as_ref().and_then(|status| status.start_time.as_ref());
    let age = started.map_or(0, |start| context.world.now.as_second() - start.0.as_second());
    action.spec.deadline_seconds > 0 && age > action.spec.deadline_seconds
}

fn begin(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, id: Uuid) {
    let now = Time(context.world.now);
    let mut status = action.status.clone().unwrap_or_default();
    status.id = Some(id);
    status.phase = ActionPhase::Running;
    status.start_time = Some(now.clone());
    status.observed_generation = action.metadata.generation;
    let generation = action.metadata.generation;
    conditions::set(
        &mut status.conditions,
        conditions::ACCEPTED,
        Truth::True,
        "Valid",
        "",
        generation,
        &now,
    );
    draft.push(Intent::SetActionStatus {
        action: name(action).to_owned(),
        status: Box::new(status),
    });
}

fn finish(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, step: Step) {
    let now = context.world.now;
    let status = match step {
        Step::Succeeded(message) => finished(action, now, ActionPhase::Succeeded, Reason::ActionSucceeded, &message),
        Step::Failed(message) => finished(action, now, ActionPhase::Failed, Reason::ActionFailed, &message),
        Step::Wait(_) => return,
    };
    conclude(draft, action, status);
}

/// The last status of an action. Its condition carries the phase, or a reason that says more.
fn finished(
    action: &MarsAction,
    now: Timestamp,
    phase: ActionPhase,
    reason: Reason,
    message: &str,
) -> MarsActionStatus {
    let now = Time(now);
    let generation = action.metadata.generation;
    let mut status = action.status.clone().unwrap_or_default();
    let word = match reason {
        Reason::ActionFailed | Reason::ActionSucceeded => format!("{phase:?}"),
        reason => reason.word(),
    };
    if status.id.is_none() {
        let refused = if word == "Failed" { "Refused" } else { &word };
        let list = &mut status.conditions;
        conditions::set(
            list,
            conditions::ACCEPTED,
            Truth::False,
            refused,
            message,
            generation,
            &now,
        );
    }
    let truth = Truth::from(phase == ActionPhase::Succeeded);
    let list = &mut status.conditions;
    conditions::set(list, conditions::COMPLETE, truth, &word, message, generation, &now);
    status.phase = phase;
    status.message = format!("{message}. {DONE_ONCE}");
    status.completion_time = Some(now);
    status.observed_generation = generation;
    status
}

fn conclude(draft: &mut Draft, action: &MarsAction, status: MarsActionStatus) {
    let note = verdict(action, &status);
    draft.push(Intent::SetActionStatus {
        action: name(action).to_owned(),
        status: Box::new(status),
    });
    draft.push(Intent::EmitEvent(note));
}

/// How an action ended, as an event.
pub(crate) fn verdict(action: &MarsAction, status: &MarsActionStatus) -> EventNote {
    let complete = conditions::get(&status.conditions, conditions::COMPLETE);
    let message = complete.map_or("", |condition| condition.message.as_str());
    let (severity, reason) = match status.phase {
        ActionPhase::Failed => (Severity::Warning, Reason::ActionFailed),
        _ => (Severity::Normal, Reason::ActionSucceeded),
    };
    EventNote {
        severity,
        reason: reason.word(),
        message: format!("{:?} ({}): {message}", action.spec.verb, name(action)),
    }
}

fn step(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, status: &MarsActionStatus) -> Step {
    match action.spec.verb {
        Verb::Handover | Verb::Failover => switch(context, draft, action, status),
        Verb::Invalidate | Verb::FakeSync | Verb::RotateLog => one_shot(context, draft, action, status),
        Verb::ForgetNode => forget(context, draft, action),
        Verb::Resolve | Verb::Verify | Verb::ExitEmergency => Step::Failed("not available in this version".into()),
    }
}

/// Handover and Failover: whether their designation stands, has been overtaken, or is still to be made.
fn switch(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, status: &MarsActionStatus) -> Step {
    if context.world.resource.metadata.deletion_timestamp.is_some() {
        return Step::Failed("the resource is being deleted".into());
    }
    let node = action.spec.node.as_deref().unwrap_or_default();
    if !context
        .world
        .resource
        .spec
        .replicas
        .iter()
        .any(|member| member.node == node)
    {
        return Step::Failed(format!("{node} is not in spec.replicas"));
    }
    let Some(designation) = context.designation() else {
        return Step::Wait(String::new());
    };
    if designation.action == status.id {
        if status.designation_number.is_none() {
            let mut status = status.clone();
            status.designation_number = Some(designation.number);
            draft.push(Intent::SetActionStatus {
                action: name(action).to_owned(),
                status: Box::new(status),
            });
            return Step::Wait(String::new());
        }
        return if context.holder_has_taken_over() {
            Step::Succeeded(format!("{node} is primary under designation {}", designation.number))
        } else {
            Step::Wait(String::new())
        };
    }
    match status.designation_number {
        Some(number) if designation.number > number => Step::Failed(format!(
            "overtaken by designation {} ({:?}): {}",
            designation.number, designation.source, designation.reason
        )),
        Some(number) => Step::Failed(format!(
            "designation {number} is no longer on record: create the action again"
        )),
        None if designation.node == node && context.holder_has_taken_over() && !has_rival(context, node) => {
            Step::Succeeded(format!("{node} is primary already"))
        }
        None => Step::Wait(String::new()),
    }
}

/// Whether somebody else also reports to be primary: then a failover to the designated node still means something.
fn has_rival(context: &Context<'_>, node: &str) -> bool {
    context.reports.iter().any(|report| {
        report.node != node
            && report.is_primary()
            && !matches!(
                context.designation().map(|designation| designation.source),
                Some(DesignationSource::Failover)
            )
    })
}

/// Invalidate, `FakeSync`, `RotateLog`: the id goes into the order of the replica and comes back in its status.
fn one_shot(context: &Context<'_>, draft: &mut Draft, action: &MarsAction, status: &MarsActionStatus) -> Step {
    let Some(id) = status.id else {
        return Step::Wait(String::new());
    };
    let verb = action.spec.verb;
    let holder = context
        .designation()
        .map(|designation| designation.node.clone())
        .unwrap_or_default();
    let node = match verb {
        Verb::RotateLog => action.spec.node.clone().unwrap_or_else(|| holder.clone()),
        _ => action.spec.node.clone().unwrap_or_default(),
    };
    let Some(replica) = context.world.replica_on(&node) else {
        return Step::Failed(format!("there is no replica on {node:?}"));
    };
    let reported = replica.status.clone().unwrap_or_default();
    let (ordered, done) = match verb {
        Verb::Invalidate => (replica.spec.invalidate, reported.invalidated),
        Verb::FakeSync => (replica.spec.fake_sync, reported.fake_synced),
        _ => (replica.spec.rotate_log, reported.log_rotated),
    };
    if done == Some(id) {
        return Step::Succeeded(format!("done on {node}"));
    }
    if ordered.is_some_and(|order| order.id == id) {
        return Step::Wait(format!("ordered; {node} has not reported it done yet"));
    }
    if let Some(refusal) = one_shot_refusal(context, verb, &node, &holder) {
        return Step::Failed(refusal);
    }
    let mut spec = replica.spec.clone();
    let order = Some(OneShot { id });
    match verb {
        Verb::Invalidate => spec.invalidate = order,
        Verb::FakeSync => spec.fake_sync = order,
        _ => spec.rotate_log = order,
    }
    draft.push(Intent::PatchReplica(Box::new(spec)));
    Step::Wait(format!("ordered; {node} has not reported it done yet"))
}

fn one_shot_refusal(context: &Context<'_>, verb: Verb, node: &str, holder: &str) -> Option<String> {
    let report = context.report_on(node);
    let replica = context.world.replica_on(node)?;
    let is_primary = node == holder || replica.spec.role == WishRole::Primary || report.is_some_and(Report::is_primary);
    match verb {
        Verb::RotateLog => (!is_primary).then(|| format!("{node} is not primary: only a primary writes log")),
        Verb::Invalidate | Verb::FakeSync if node == holder => Some(format!(
            "{node} is the designated primary: hand over or fail over first"
        )),
        Verb::Invalidate if report.is_some_and(|report| !report.opened_by.is_empty()) => Some(format!(
            "the device on {node} is in use by {}: stop that first",
            report.map(Report::users).unwrap_or_default()
        )),
        Verb::Invalidate | Verb::FakeSync if holder.is_empty() => {
            Some("there is no designated primary to sync from: set spec.primary first".to_owned())
        }
        Verb::FakeSync if report.is_some_and(|report| report.data == Some(ReplicaData::Consistent)) => {
            Some(format!("{node} is consistent: there is no sync to fake"))
        }
        _ => None,
    }
}

/// `ForgetNode`: tombstone, note to the node, and only then the finalizer that the lost agent cannot remove.
fn forget(context: &Context<'_>, draft: &mut Draft, action: &MarsAction) -> Step {
    let world = context.world;
    let node = action.spec.node.as_deref().unwrap_or_default();
    let stone = context.status.tombstones.iter().find(|stone| stone.node == node);
    let Some(replica) = world.replica_on(node) else {
        return match stone {
            Some(_) => Step::Succeeded(format!(
                "the replica on {node} is forgotten; its data, if it returns, is quarantined"
            )),
            None => Step::Failed(format!("there is no replica on {node}")),
        };
    };
    let deleting = world.resource.metadata.deletion_timestamp.is_some();
    if !deleting && world.resource.spec.replicas.iter().any(|member| member.node == node) {
        return Step::Wait(format!("{node} is still wanted: take it out of spec.replicas first"));
    }
    if world.is_heard(node) {
        return Step::Failed(format!(
            "{node} is not lost: its agent is heard and leaves in an orderly way"
        ));
    }
    let uuid = replica.spec.replica_uuid;
    if !deleting
        && context
            .designation()
            .is_some_and(|designation| designation.replica_uuid == Some(uuid))
    {
        return Step::Wait(format!(
            "{node} is the designated primary: use a MarsAction Failover to another member first"
        ));
    }
    if replica.metadata.deletion_timestamp.is_none() {
        return Step::Wait(format!("{node} has not been told to leave yet"));
    }
    if !context.status.tombstones.iter().any(|stone| stone.replica_uuid == uuid) {
        let stone = Tombstone {
            replica_uuid: uuid,
            node: node.to_owned(),
            time: Some(Time(world.now)),
        };
        draft.push(Intent::RecordTombstone(stone));
        draft.event(
            Severity::Warning,
            "NodeForgotten",
            format!("the replica on {node} is given up by {}", name(action)),
        );
        return Step::Wait(String::new());
    }
    remind(context, draft, node, uuid);
    if replica
        .metadata
        .finalizers
        .iter()
        .flatten()
        .any(|name| name == REPLICA_FINALIZER)
    {
        draft.push(Intent::ReleaseReplica { node: node.to_owned() });
    }
    Step::Wait(String::new())
}

/// Writes a tombstone into the node that still holds the data.
pub(super) fn remind(context: &Context<'_>, draft: &mut Draft, node: &str, replica_uuid: Uuid) {
    let Some(object) = context.world.nodes.get(node).and_then(|view| view.object.as_ref()) else {
        return;
    };
    let intent = Intent::Forget {
        node: node.to_owned(),
        replica_uuid,
    };
    let known = object
        .spec
        .forgotten
        .iter()
        .any(|forgotten| forgotten.replica_uuid == replica_uuid);
    if !known && !draft.intents.contains(&intent) {
        draft.push(intent);
    }
}

/// Puts into each waiting action why it waits.
pub(super) fn explain(context: &Context<'_>, draft: &mut Draft) {
    let waiting = std::mem::take(&mut draft.waiting);
    for action in &context.world.actions {
        let Some(message) = waiting.get(name(action)) else {
            continue;
        };
        let changed = draft
            .intents
            .iter()
            .any(|intent| matches!(intent, Intent::SetActionStatus { action: other, .. } if other == name(action)));
        let mut status = action.status.clone().unwrap_or_default();
        if status.message != *message && !changed {
            status.message.clone_from(message);
            draft.push(Intent::SetActionStatus {
                action: name(action).to_owned(),
                status: Box::new(status),
            });
        }
    }
}
