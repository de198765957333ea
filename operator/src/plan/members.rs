//! Who belongs: the identity of the resource, joining, leaving, deletion.
//!
//! Invariant: data that exists is re-adopted, never made anew; an object is created for a node only after the node has
//! listed everything it holds, and removed only because the user removed it from the spec or deleted the resource.

use mars_crds::common::{DataPolicy, Switches};
use mars_crds::replica::{MarsReplicaSpec, WishRole};
use mars_crds::resource::ReplicaMember;
use mars_crds::{RESOURCE_FINALIZER, replica_name};
use std::collections::BTreeSet;
use uuid::Uuid;

use super::{Context, Draft, Intent, Note, Reason, actions, rollout};

/// Settles finalizer and uuid. Says whether the other stages may run.
pub(super) fn identity(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) -> bool {
    let world = context.world;
    let metadata = &world.resource.metadata;
    let deleting = metadata.deletion_timestamp.is_some();
    let has_finalizer = metadata
        .finalizers
        .iter()
        .flatten()
        .any(|name| name == RESOURCE_FINALIZER);
    if !deleting && !has_finalizer {
        draft.push(Intent::AddFinalizer);
        return false;
    }
    if deleting && !has_finalizer {
        return false;
    }
    let Some(uuid) = context.status.uuid else {
        if deleting && world.replicas.is_empty() {
            draft.push(Intent::RemoveFinalizer);
            return false;
        }
        settle_uuid(context, draft, new_id);
        return false;
    };
    if let Some(foreign) = world.replicas.iter().find(|replica| replica.spec.resource_uuid != uuid) {
        let name = foreign.metadata.name.as_deref().unwrap_or_default();
        draft.degrade(
            Reason::ForeignReplica,
            format!(
                "{name} belongs to another resource of this name ({}); if that is gone for good, delete it with \
                 `kubectl delete marsreplica {name}`",
                foreign.spec.resource_uuid
            ),
        );
        return false;
    }
    true
}

/// Without recorded uuid: the one that replica objects carry, else the one that data on the nodes carries, else a new one.
fn settle_uuid(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    let world = context.world;
    let mut known: BTreeSet<Uuid> = world
        .replicas
        .iter()
        .map(|replica| replica.spec.resource_uuid)
        .collect();
    if known.is_empty() {
        let missing = without_inventory(context);
        if !missing.is_empty() {
            draft.not_ready = Some(Note {
                reason: Reason::WaitingForNodes,
                message: format!(
                    "{} must list what they hold before {} can be made or re-adopted; start their agents, or take them \
                     out of spec.replicas",
                    missing.join(", "),
                    world.name()
                ),
            });
            return;
        }
        known = world.found().map(|(_, found)| found.resource_uuid).collect();
    }
    let mut known = known.into_iter();
    match (known.next(), known.next()) {
        (None, _) => draft.push(Intent::RecordUuid(new_id())),
        (Some(uuid), None) => draft.push(Intent::RecordUuid(uuid)),
        (Some(one), Some(other)) => draft.degrade(
            Reason::ForeignReplica,
            format!(
                "data of several resources of this name exists ({one}, {other}, …): nothing is touched; forget or remove \
                 all but one"
            ),
        ),
    }
}

/// Members whose node has not listed what it holds.
pub(super) fn without_inventory(context: &Context<'_>) -> Vec<String> {
    let members = &context.world.resource.spec.replicas;
    members
        .iter()
        .filter(|member| !has_inventory(context, &member.node))
        .map(|member| member.node.clone())
        .collect()
}

fn has_inventory(context: &Context<'_>, node: &str) -> bool {
    let object = context.world.nodes.get(node).and_then(|view| view.object.as_ref());
    object
        .and_then(|object| object.status.as_ref())
        .is_some_and(|status| status.inventory_complete)
}

/// Creates what is missing and lets go what has left the spec. Nodes that hold forgotten data are told so.
pub(super) fn membership(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    let world = context.world;
    for (node, found) in world.found() {
        if context
            .status
            .tombstones
            .iter()
            .any(|stone| stone.replica_uuid == found.replica_uuid)
        {
            actions::remind(context, draft, node, found.replica_uuid);
        }
    }
    for member in &world.resource.spec.replicas {
        match world.replica_on(&member.node) {
            None => join(context, draft, member, new_id),
            Some(replica) if replica.metadata.deletion_timestamp.is_some() => draft.degrade(
                Reason::Deleting,
                format!(
                    "{} still leaves; it joins again after that. If its node is lost, use a MarsAction ForgetNode",
                    member.node
                ),
            ),
            Some(_) => {}
        }
    }
    for replica in &world.replicas {
        let node = &replica.spec.node;
        let stays = world.resource.spec.replicas.iter().any(|member| member.node == *node);
        if !stays && replica.metadata.deletion_timestamp.is_none() {
            leave(context, draft, node, replica.spec.replica_uuid);
        }
    }
}

fn join(context: &Context<'_>, draft: &mut Draft, member: &ReplicaMember, new_id: &mut dyn FnMut() -> Uuid) {
    let world = context.world;
    if !has_inventory(context, &member.node) {
        draft.degrade(
            Reason::WaitingForNodes,
            format!(
                "{} has not listed what it holds, so nothing is made there; start its agent, or take it out of \
                 spec.replicas",
                member.node
            ),
        );
        return;
    }
    let (Some(resource_uuid), Ok(size_bytes)) = (context.status.uuid, world.resource.spec.size.bytes()) else {
        return;
    };
    let found = context.found_on(&member.node);
    if let Some(larger) = found
        .and_then(|report| report.size_bytes)
        .filter(|found| *found > size_bytes)
    {
        draft.degrade(
            Reason::InvalidSpec,
            format!(
                "the data found on {} is {larger} bytes large and never shrinks: set spec.size to that, or remove the \
                 data there",
                member.node
            ),
        );
        return;
    }
    let replica_uuid = found.map_or_else(new_id, |report| report.replica_uuid);
    let mut spec = first_order(context, member, (resource_uuid, replica_uuid), size_bytes);
    spec.established = found.is_some_and(|report| report.has_history);
    rollout::fill(context, &mut spec);
    let verb = if found.is_some() {
        "is re-adopted with the data found there"
    } else {
        "joins"
    };
    draft.push(Intent::CreateReplica(Box::new(spec)));
    draft.event(
        super::Severity::Normal,
        "ReplicaCreated",
        format!("{} {verb}", member.node),
    );
}

/// What a new replica object says before designation, peers and switches are filled in.
fn first_order(
    context: &Context<'_>,
    member: &ReplicaMember,
    (resource_uuid, replica_uuid): (Uuid, Uuid),
    size_bytes: i64,
) -> MarsReplicaSpec {
    let resource = &context.world.resource.spec;
    MarsReplicaSpec {
        resource: context.world.name().to_owned(),
        node: member.node.clone(),
        resource_uuid,
        replica_uuid,
        size_bytes,
        backing: member.backing(),
        overwrite: member.overwrite,
        established: false,
        role: WishRole::Secondary,
        designation: None,
        designated: None,
        cause: None,
        close_for: None,
        handover_end: None,
        peers: Vec::new(),
        switches: Switches::default(),
        apply_delay: None,
        durability: resource.durability,
        compression: resource.compression,
        retention: resource.retention.clone(),
        limits: resource.limits.clone(),
        invalidate: None,
        fake_sync: None,
        rotate_log: None,
        data_policy: DataPolicy::Retain,
    }
}

fn leave(context: &Context<'_>, draft: &mut Draft, node: &str, replica_uuid: Uuid) {
    let designation = context.designation();
    let is_designated = designation.is_some_and(|designation| designation.replica_uuid == Some(replica_uuid));
    let is_predecessor = designation.is_some_and(|designation| {
        designation
            .predecessor
            .as_ref()
            .is_some_and(|before| before.replica_uuid == replica_uuid)
            && !context.holder_has_taken_over()
            && !designation.node.is_empty()
    });
    let report = context.report(replica_uuid);
    if is_designated || is_predecessor || report.is_some_and(crate::world::Report::is_primary) {
        draft.degrade(
            Reason::LeavingPrimary,
            format!(
                "{node} is no longer in spec.replicas but holds the primary role: set spec.primary to another member; it \
                 leaves after the handover"
            ),
        );
        return;
    }
    delete(context, draft, node);
    draft.event(
        super::Severity::Normal,
        "ReplicaLeaves",
        format!("{node} is no longer in spec.replicas"),
    );
}

/// The data policy first, in the object, then the deletion.
fn delete(context: &Context<'_>, draft: &mut Draft, node: &str) {
    let Some(replica) = context.world.replica_on(node) else {
        return;
    };
    let policy = context.world.resource.spec.data_policy;
    if replica.spec.data_policy == policy {
        draft.push(Intent::DeleteReplica { node: node.to_owned() });
    } else {
        let spec = MarsReplicaSpec {
            data_policy: policy,
            ..replica.spec.clone()
        };
        draft.push(Intent::PatchReplica(Box::new(spec)));
    }
}

/// The resource is being deleted: all replicas go, but not while the device is in use.
pub(super) fn delete_all(context: &Context<'_>, draft: &mut Draft) {
    let world = context.world;
    if world.replicas.is_empty() {
        draft.push(Intent::RemoveFinalizer);
        return;
    }
    if let Some(used) = context.reports.iter().find(|report| !report.opened_by.is_empty()) {
        draft.not_ready = Some(Note {
            reason: Reason::DeviceInUse,
            message: format!(
                "is to be deleted, but its device on {} is in use by {}: stop that first; until then everything stays",
                used.node,
                used.users()
            ),
        });
        return;
    }
    let mut silent = Vec::new();
    for replica in &world.replicas {
        let node = &replica.spec.node;
        if replica.metadata.deletion_timestamp.is_none() {
            delete(context, draft, node);
        } else if !world.is_heard(node) {
            silent.push(format!("{node} (`{}`)", replica_name(world.name(), node)));
        }
    }
    let message = if silent.is_empty() {
        "the agents give up their replicas".to_owned()
    } else {
        format!(
            "waits for {}, which are silent; they clean up when they return. If they are lost, use a MarsAction ForgetNode",
            silent.join(", ")
        )
    };
    draft.not_ready = Some(Note {
        reason: Reason::Deleting,
        message,
    });
}
