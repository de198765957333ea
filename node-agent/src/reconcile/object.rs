//! `MarsReplica` objects to [`Todo`]s, and engine values to API values.
//!
//! Invariant: an object that does not pass every check yields no [`Todo`] at all; the replica goes on with its last one.

use super::todo::{DataPolicy, Designated, Grant, GrantCause, Limits, OneShots, PeerTodo, Todo};
use crate::pool::backing::BackingWish;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mars_crds::common::{self, DesignationRef, HistoryPosition, OneShot};
use mars_crds::replica::{MarsReplicaSpec, WishRole};
use mars_crds::{MarsReplica, Size, validate};
use mars_engine::api::{Compression, Durability, Switches, Tuning};
use mars_engine::types::{Chain, Designation, EpochId, Lamport, Lsn, NodeId, Position, ReplicaId, ResourceId};
use std::time::Duration;

/// Why an object cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("MarsReplica {name} cannot be followed: {problems}; the last valid spec stays in force")]
pub struct InvalidObject {
    /// Its name.
    pub name: String,
    /// Everything that is wrong.
    pub problems: String,
}

/// What the node decides about tuning; the rest comes from the object.
#[derive(Debug, Clone, Copy)]
pub struct TuningDefaults {
    /// Share of one replica in the node's overlay memory (bytes).
    pub overlay_budget_bytes: u64,
    /// Size of new segments (bytes).
    pub segment_bytes: u64,
}

/// Checks and converts an object.
///
/// # Errors
/// Everything that is wrong with it, at once.
pub fn to_todo(object: &MarsReplica, defaults: TuningDefaults) -> Result<Todo, InvalidObject> {
    let name = object.metadata.name.clone().unwrap_or_default();
    let invalid = |problems: String| InvalidObject {
        name: name.clone(),
        problems,
    };
    let problems = validate::replica(object, None);
    if !problems.is_empty() {
        return Err(invalid(validate::summary(&problems)));
    }
    let spec = &object.spec;
    Ok(Todo {
        name: name.clone(),
        generation: object.metadata.generation.unwrap_or_default(),
        resource: spec.resource.clone(),
        resource_id: ResourceId(spec.resource_uuid),
        replica: ReplicaId(spec.replica_uuid),
        size_bytes: unsigned("spec.sizeBytes", spec.size_bytes).map_err(invalid)?,
        backing: backing(spec).map_err(invalid)?,
        overwrite: spec.overwrite,
        established: spec.established,
        grant: grant(spec).map_err(invalid)?,
        designated: designated(spec),
        peers: spec.peers.iter().map(peer).collect(),
        attach: spec.switches.attach,
        switches: switches(spec).map_err(invalid)?,
        tuning: tuning(spec, defaults).map_err(invalid)?,
        limits: Limits {
            fetch_bytes_per_second: size(spec.limits.fetch_per_second.as_ref()).map_err(invalid)?,
            sync_bytes_per_second: size(spec.limits.sync_per_second.as_ref()).map_err(invalid)?,
        },
        one_shots: OneShots {
            invalidate: id(spec.invalidate),
            fake_sync: id(spec.fake_sync),
            rotate: id(spec.rotate_log),
        },
        deletion: object
            .metadata
            .deletion_timestamp
            .is_some()
            .then_some(match spec.data_policy {
                common::DataPolicy::Retain => DataPolicy::Retain,
                common::DataPolicy::Delete => DataPolicy::Delete,
            }),
    })
}

fn id(order: Option<OneShot>) -> Option<uuid::Uuid> {
    order.map(|order| order.id)
}

fn unsigned(field: &str, value: i64) -> Result<u64, String> {
    u64::try_from(value).map_err(|_| format!("{field} is negative ({value})"))
}

fn size(size: Option<&Size>) -> Result<Option<u64>, String> {
    let Some(size) = size else { return Ok(None) };
    let bytes = size.bytes().map_err(|error| error.to_string())?;
    // A limit of nothing would stop the activity for ever: that is what the switches are for.
    Ok(Some(unsigned("limit", bytes)?).filter(|bytes| *bytes > 0))
}

fn backing(spec: &MarsReplicaSpec) -> Result<BackingWish, String> {
    match (&spec.backing.device, &spec.backing.pool) {
        (Some(device), None) => Ok(BackingWish::Device(device.into())),
        (None, Some(pool)) => Ok(BackingWish::Pool(pool.clone())),
        _ => Err("spec.backing: set exactly one of device and pool".into()),
    }
}

fn peer(peer: &mars_crds::replica::Peer) -> PeerTodo {
    PeerTodo {
        node: peer.node.clone(),
        node_id: peer.node_uuid.map(NodeId),
        replica: ReplicaId(peer.replica_uuid),
        address: peer.address.clone(),
    }
}

fn grant(spec: &MarsReplicaSpec) -> Result<Grant, String> {
    let designation = spec.designation.map(designation).transpose()?;
    if spec.role == WishRole::Secondary {
        let close_for = spec.close_for.map(|order| order.replica_uuid.map(ReplicaId));
        return Ok(Grant::Secondary { designation, close_for });
    }
    let designation = designation.ok_or("spec.designation: a grant of the primary role needs one")?;
    let cause = match spec.cause.ok_or("spec.cause: a grant of the primary role needs one")? {
        common::GrantCause::Create => GrantCause::Create,
        common::GrantCause::Handover => GrantCause::Handover {
            end: spec.handover_end.as_ref().map(position).transpose()?,
        },
        common::GrantCause::Failover => GrantCause::Failover,
    };
    Ok(Grant::Primary { designation, cause })
}

fn designated(spec: &MarsReplicaSpec) -> Designated {
    let api = spec.designated.unwrap_or_default();
    Designated {
        replica: api.replica_uuid.map(ReplicaId),
        predecessor: api.predecessor.map(ReplicaId),
        epoch: api.epoch.map(EpochId),
    }
}

fn switches(spec: &MarsReplicaSpec) -> Result<Switches, String> {
    let common::Switches {
        attach: _,
        fetch,
        replay,
        sync,
    } = spec.switches;
    let apply_delay = match &spec.apply_delay {
        None => Duration::ZERO,
        Some(delay) if delay.is_negative() => return Err(format!("spec.applyDelay: {delay:?} is negative")),
        Some(delay) => Duration::from(*delay),
    };
    Ok(Switches {
        fetch,
        replay,
        sync,
        apply_delay,
    })
}

fn tuning(spec: &MarsReplicaSpec, defaults: TuningDefaults) -> Result<Tuning, String> {
    Ok(Tuning {
        durability: match spec.durability {
            common::Durability::OnFlush => Durability::OnFlush,
            common::Durability::EveryWrite => Durability::EveryWrite,
        },
        compression: match spec.compression {
            common::Compression::None => Compression::None,
            common::Compression::Lz4 => Compression::Lz4,
            common::Compression::Zstd => Compression::Zstd,
        },
        overlay_budget_bytes: defaults.overlay_budget_bytes,
        segment_bytes: defaults.segment_bytes,
        retention_bytes: size(spec.retention.max_log.as_ref())?.unwrap_or(0),
    })
}

/// An API designation in the engine's form.
///
/// # Errors
/// A negative number.
pub fn designation(api: DesignationRef) -> Result<Designation, String> {
    Ok(Designation {
        number: unsigned("designation.number", api.number)?,
        id: api.uuid,
    })
}

/// A designation in the API's form; `None` for "never any".
#[must_use]
pub fn designation_ref(designation: Designation) -> Option<DesignationRef> {
    (designation != Designation::default()).then(|| DesignationRef {
        number: signed(designation.number),
        uuid: designation.id,
    })
}

/// An API position in the engine's form.
///
/// # Errors
/// A negative LSN, or a chain that is not 64 hexadecimal digits.
pub fn position(api: &HistoryPosition) -> Result<Position, String> {
    let chain: Chain = serde_json::from_value(serde_json::Value::String(api.chain.clone()))
        .map_err(|error| format!("chain {:?}: {error}", api.chain))?;
    Ok(Position {
        epoch: EpochId(api.epoch),
        lsn: Lsn(unsigned("lsn", api.lsn)?),
        chain,
    })
}

/// A position in the API's form.
#[must_use]
pub fn history_position(position: Position) -> HistoryPosition {
    let chain = position
        .chain
        .0
        .iter()
        .fold(String::with_capacity(64), |mut text, byte| {
            use std::fmt::Write as _;
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        });
    HistoryPosition {
        epoch: position.epoch.0,
        lsn: signed(position.lsn.0),
        chain,
    }
}

/// API integers are signed; a value beyond 2^63 is shown as the largest there is.
#[must_use]
pub fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The time now.
#[must_use]
pub fn time_now() -> Time {
    Time(Timestamp::now())
}

/// A Lamport stamp as a time; `None` for "unknown".
#[must_use]
pub fn time_of(stamp: Lamport) -> Option<Time> {
    let nanoseconds = i128::from(stamp.0);
    (nanoseconds > 0)
        .then(|| Timestamp::from_nanosecond(nanoseconds).ok().map(Time))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use uuid::Uuid;

    fn object(change: impl FnOnce(&mut serde_json::Value)) -> MarsReplica {
        let mut object = json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica",
            "metadata": {"name": "r.a", "generation": 4},
            "spec": {
                "resource": "r", "node": "a",
                "resourceUuid": Uuid::from_u128(1), "replicaUuid": Uuid::from_u128(2),
                "sizeBytes": 1_048_576, "backing": {"pool": "default"},
                "role": "Primary", "cause": "Handover",
                "designation": {"number": 7, "uuid": Uuid::from_u128(3)},
                "handoverEnd": {"epoch": Uuid::from_u128(4), "lsn": 99, "chain": "ab".repeat(32)},
                "peers": [{"node": "b", "replicaUuid": Uuid::from_u128(5), "address": "127.0.0.12:7777"}],
                "applyDelay": "1h30m", "compression": "Lz4", "retention": {"maxLog": "1Gi"},
            },
        });
        change(&mut object);
        serde_json::from_value(object).unwrap()
    }

    const DEFAULTS: TuningDefaults = TuningDefaults {
        overlay_budget_bytes: 1,
        segment_bytes: 2,
    };

    #[test]
    fn a_whole_object_becomes_a_todo() {
        let todo = to_todo(&object(|_| {}), DEFAULTS).unwrap();
        assert_eq!(
            (todo.name.as_str(), todo.generation, todo.size_bytes),
            ("r.a", 4, 1 << 20)
        );
        assert_eq!(todo.switches.apply_delay, Duration::from_mins(90));
        assert_eq!(todo.tuning.retention_bytes, 1 << 30);
        let Grant::Primary {
            designation,
            cause: GrantCause::Handover { end: Some(end) },
        } = todo.grant
        else {
            panic!("{:?}", todo.grant)
        };
        assert_eq!((designation.number, end.lsn), (7, Lsn(99)));
        assert_eq!(position(&history_position(end)).unwrap(), end);
        assert_eq!(todo.deletion, None);
    }

    #[test]
    fn an_object_with_any_fault_yields_no_todo() {
        for (what, change) in [
            ("size", json!({"sizeBytes": -4096})),
            ("backing", json!({"backing": {"pool": "x", "device": "/dev/x"}})),
            ("cause", json!({"cause": null})),
            (
                "chain",
                json!({"handoverEnd": {"epoch": Uuid::nil(), "lsn": 1, "chain": "xyz"}}),
            ),
            (
                "designation",
                json!({"designation": {"number": -1, "uuid": Uuid::nil()}}),
            ),
            ("resource", json!({"resource": "../etc"})),
        ] {
            let broken = object(|object| {
                for (field, value) in change.as_object().unwrap() {
                    object["spec"][field] = value.clone();
                }
            });
            assert!(to_todo(&broken, DEFAULTS).is_err(), "{what}");
        }
    }

    #[test]
    fn a62_only_a_deletion_timestamp_makes_a_deletion() {
        let policy = |object: &mut serde_json::Value| object["spec"]["dataPolicy"] = json!("Delete");
        assert_eq!(to_todo(&object(policy), DEFAULTS).unwrap().deletion, None);
        let deleted = object(|object| {
            policy(object);
            object["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        });
        assert_eq!(to_todo(&deleted, DEFAULTS).unwrap().deletion, Some(DataPolicy::Delete));
    }
}
