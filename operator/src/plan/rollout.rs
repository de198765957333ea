//! Orders to the replicas, derived from the recorded designation and the spec of the resource.
//!
//! Invariant: orders are level-based: the same record yields the same orders, whoever plans. Orders that take the
//! primary role away, or tell of a newer designation, come before the one order that grants it. A replica is never
//! given a designation lower than the one it carries.

use mars_crds::common::GrantCause;
use mars_crds::replica::{CloseFor, Designated, MarsReplicaSpec, Peer};
use mars_crds::resource::{Designation, DesignationSource};
use mars_crds::{ActualRole, MarsReplica, WishRole};
use uuid::Uuid;

use super::{Context, Draft, Intent, Note, Reason};

/// Writes what differs.
pub(super) fn rollout(context: &Context<'_>, draft: &mut Draft) {
    let mut grants = Vec::new();
    for replica in &context.world.replicas {
        if replica.metadata.deletion_timestamp.is_some() {
            continue;
        }
        let behind = |designation: &Designation| {
            replica
                .spec
                .designation
                .is_some_and(|present| present.number > designation.number)
        };
        if context.designation().is_none_or(behind) && replica.spec.designation.is_some() {
            continue;
        }
        let mut spec = pending(draft, replica);
        spec.size_bytes = size(context, draft, replica);
        spec.established |= context
            .report(spec.replica_uuid)
            .is_some_and(|report| report.has_history);
        fill(context, &mut spec);
        if spec == replica.spec {
            continue;
        }
        let intent = Intent::PatchReplica(Box::new(spec));
        let Intent::PatchReplica(order) = &intent else { continue };
        if order.role == WishRole::Primary {
            grants.push(intent);
        } else {
            draft.push(intent);
        }
    }
    draft.intents.extend(grants);
}

/// An earlier stage may have orders for the same replica: they become one.
fn pending(draft: &mut Draft, replica: &MarsReplica) -> MarsReplicaSpec {
    let same = |intent: &Intent| matches!(intent, Intent::PatchReplica(spec) if spec.node == replica.spec.node);
    match draft
        .intents
        .iter()
        .position(same)
        .map(|index| draft.intents.remove(index))
    {
        Some(Intent::PatchReplica(spec)) => *spec,
        _ => replica.spec.clone(),
    }
}

/// Sets everything that follows from the resource: role, designation, peers, switches, tuning.
pub(super) fn fill(context: &Context<'_>, spec: &mut MarsReplicaSpec) {
    let resource = &context.world.resource.spec;
    grant(context, spec);
    spec.peers = peers(context, spec);
    spec.durability = resource.durability;
    spec.compression = resource.compression;
    spec.retention = resource.retention.clone();
    spec.limits = resource.limits.clone();
    if let Some(member) = resource.replicas.iter().find(|member| member.node == spec.node) {
        spec.switches = member.switches;
        spec.apply_delay = member.apply_delay;
        spec.overwrite = member.overwrite;
    }
}

fn grant(context: &Context<'_>, spec: &mut MarsReplicaSpec) {
    spec.role = WishRole::Secondary;
    spec.cause = None;
    spec.close_for = None;
    spec.handover_end = None;
    let Some(designation) = context.designation() else {
        return;
    };
    spec.designated = Some(designated(context, designation, spec));
    spec.designation = Some(designation.token());
    let closes = matches!(
        designation.source,
        DesignationSource::Handover | DesignationSource::Demotion
    );
    let before = designation.predecessor.as_ref().filter(|_| closes);
    let released = before.is_none_or(|before| before.released_end.is_some());
    if designation.replica_uuid == Some(spec.replica_uuid) && released {
        spec.role = WishRole::Primary;
        let (cause, end) = match designation.source {
            DesignationSource::Create => (GrantCause::Create, None),
            DesignationSource::Failover | DesignationSource::Reopen | DesignationSource::Readopt => {
                (GrantCause::Failover, None)
            }
            DesignationSource::Handover | DesignationSource::Abort | DesignationSource::Demotion => (
                GrantCause::Handover,
                before.and_then(|before| before.released_end.clone()),
            ),
        };
        spec.cause = Some(cause);
        spec.handover_end = end;
    } else if !released && before.is_some_and(|before| before.replica_uuid == spec.replica_uuid) {
        spec.close_for = Some(CloseFor {
            replica_uuid: designation.replica_uuid,
        });
    }
}

/// Whom the record names, and whose history the members follow meanwhile.
fn designated(context: &Context<'_>, designation: &Designation, before: &MarsReplicaSpec) -> Designated {
    let hands_over = matches!(
        designation.source,
        DesignationSource::Handover | DesignationSource::Demotion
    ) && !context.holder_has_taken_over();
    let predecessor = designation
        .predecessor
        .as_ref()
        .filter(|_| hands_over)
        .map(|predecessor| predecessor.replica_uuid);
    let followed = predecessor.or(designation.replica_uuid);
    let reported = followed.and_then(|followed| begun_epoch(context, designation, followed, predecessor.is_some()));
    Designated {
        replica_uuid: designation.replica_uuid,
        predecessor,
        epoch: reported.or_else(|| known_epoch(designation, followed, before)),
    }
}

/// The newest epoch of the replica to follow, from one report in which it says that it is primary. A replica that was
/// designated anew says so under that very designation: what it wrote in an earlier stay is not what counts now.
fn begun_epoch(context: &Context<'_>, designation: &Designation, followed: Uuid, is_predecessor: bool) -> Option<Uuid> {
    let status = context.world.replica(followed)?.status.as_ref()?;
    let is_primary = matches!(status.role, Some(ActualRole::Primary | ActualRole::Closing));
    let under_this = status.primary_under == Some(designation.token());
    let newest = status.lineage.last().filter(|epoch| epoch.origin == followed)?;
    (is_primary && (is_predecessor || under_this)).then_some(newest.epoch)
}

/// What was known stays while the same replica goes on with the same history: under the same designation, or one that was made
/// for a handover that it was asked for.
fn known_epoch(designation: &Designation, followed: Option<Uuid>, before: &MarsReplicaSpec) -> Option<Uuid> {
    let known = before.designated?;
    let same_designation = before.designation == Some(designation.token());
    let goes_on = matches!(
        designation.source,
        DesignationSource::Handover | DesignationSource::Demotion | DesignationSource::Abort
    );
    let same_replica = followed.is_some() && known.predecessor.or(known.replica_uuid) == followed;
    known.epoch.filter(|_| same_replica && (same_designation || goes_on))
}

/// All members that are not leaving. One whose object is missing, and will be made again, still is one: whoever is told of one member less
/// lets go of the log that was kept for it. An address that cannot be looked up at present stays as it was.
fn peers(context: &Context<'_>, spec: &MarsReplicaSpec) -> Vec<Peer> {
    let peer = |(node, replica_uuid): (&str, Uuid)| {
        let before = spec.peers.iter().find(|peer| peer.replica_uuid == replica_uuid);
        let object = context.world.nodes.get(node).and_then(|view| view.object.as_ref());
        let status = object.and_then(|object| object.status.as_ref());
        let address = status
            .map(|status| status.address.clone())
            .filter(|address| !address.is_empty());
        Peer {
            node: node.to_owned(),
            node_uuid: status
                .and_then(|status| status.node_uuid)
                .or_else(|| before.and_then(|peer| peer.node_uuid)),
            replica_uuid,
            address: address
                .or_else(|| before.map(|peer| peer.address.clone()))
                .unwrap_or_default(),
        }
    };
    let present = context
        .world
        .replicas
        .iter()
        .filter(|replica| replica.spec.replica_uuid != spec.replica_uuid)
        .filter(|replica| replica.metadata.deletion_timestamp.is_none())
        .map(|replica| (replica.spec.node.as_str(), replica.spec.replica_uuid));
    let members = &context.world.resource.spec.replicas;
    let absent = members
        .iter()
        .map(|member| member.node.as_str())
        .filter(|node| *node != spec.node && context.world.replica_on(node).is_none())
        .filter_map(|node| {
            let known = spec.peers.iter().find(|peer| peer.node == node);
            let known = known
                .map(|peer| peer.replica_uuid)
                .filter(|uuid| !context.is_forgotten(*uuid));
            let found = context.found_on(node).map(|report| report.replica_uuid);
            Some((node, found.or(known)?))
        });
    let mut peers: Vec<Peer> = present.chain(absent).map(peer).collect();
    peers.sort_by(|left, right| left.node.cmp(&right.node));
    peers
}

/// Disks grow first, everywhere; the device of the primary last, once every other member has room.
fn size(context: &Context<'_>, draft: &mut Draft, replica: &MarsReplica) -> i64 {
    let present = replica.spec.size_bytes;
    let Ok(wanted) = context.world.resource.spec.size.bytes() else {
        return present;
    };
    if wanted <= present || !context.problems.is_empty() {
        return present;
    }
    let uuid = Some(replica.spec.replica_uuid);
    let disk = |other: &MarsReplica| other.status.as_ref().and_then(|status| status.disk_bytes);
    let is_designated = context
        .designation()
        .is_some_and(|designation| designation.replica_uuid == uuid);
    let too_small = |other: &&MarsReplica| disk(other).is_none_or(|bytes| bytes < wanted);
    if replica.spec.backing.device.is_some() && too_small(&replica) {
        let node = &replica.spec.node;
        let present = disk(replica).map_or_else(|| "unknown".to_owned(), |bytes| format!("{bytes} bytes"));
        let message = format!(
            "the disk of {node} ({present}) is too small for {wanted} bytes: enlarge it; the size stays until then"
        );
        // Before whatever waits for it.
        draft.degraded.insert(
            0,
            Note {
                reason: Reason::DiskTooSmall,
                message,
            },
        );
        return replica.spec.size_bytes;
    }
    let others = || {
        context
            .world
            .replicas
            .iter()
            .filter(|other| other.metadata.deletion_timestamp.is_none())
    };
    let waits_for: Vec<&str> = others()
        .filter(|other| Some(other.spec.replica_uuid) != uuid)
        .filter(too_small)
        .map(|other| other.spec.node.as_str())
        .collect();
    if is_designated && !waits_for.is_empty() {
        let note = Note {
            reason: Reason::Resizing,
            message: format!(
                "waits until the disks of {} have grown to {wanted} bytes",
                waits_for.join(", ")
            ),
        };
        draft.degraded.push(note);
        return present;
    }
    wanted
}
