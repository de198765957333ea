//! Facts to `MarsReplica.status`: one pure function, and the rule when a report is worth a write.
//!
//! Invariant: everything here is what was observed; the wish is not an input, except for its generation and for the reasons
//! why it is not fulfilled yet.

mod faults;

use super::facts::{Done, Facts};
use super::lag::LagNow;
use super::object::{designation_ref, history_position, signed, time_now, time_of};
use super::plan::{Plan, is_blank};
use super::presence::Presence;
use crate::frontend::{Device, DeviceUser, FrontendKind};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use mars_crds::conditions::{self, Truth};
use mars_crds::replica::{self as api, ActualRole, MarsReplicaStatus, ReplicaData};
use mars_engine::api::{DataState, ReplicaStatus, Role};
use mars_engine::types::{Designation, ReplicaId};
use uuid::Uuid;

/// Newest epochs shown.
const LINEAGE_SHOWN: usize = 64;

/// Why a replica has no engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// One word: `DataMissing`, `PoolAbsent`, `Refused`, …
    pub reason: &'static str,
    /// Cause and next command.
    pub message: String,
}

/// Contact with another member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contact {
    /// Its replica.
    pub replica: ReplicaId,
    /// Name of its node.
    pub node: String,
    /// Whether it answers now.
    pub connected: bool,
    /// When it last answered.
    pub last_contact: Option<Time>,
}

/// What a report is made of, besides the facts.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// Boot of the node.
    pub boot_id: Uuid,
    /// The node.
    pub node: Uuid,
    /// The replica.
    pub replica: ReplicaId,
    /// Generation of the spec that was acted upon.
    pub generation: i64,
    /// Device, if there is one.
    pub device: Option<Device>,
    /// Other members.
    pub contacts: Vec<Contact>,
    /// How far behind.
    pub lag: Option<LagNow>,
    /// From whom data is being copied.
    pub sync_source: Option<ReplicaId>,
    /// An order that failed, with the engine's or the frontend's words.
    pub failed: Option<Problem>,
    /// A spec that could not be followed.
    pub invalid_spec: Option<String>,
}

/// The status of a replica whose engine runs.
#[must_use]
pub fn report(facts: &Facts, plan: &Plan, around: &Surroundings, previous: &[Condition]) -> MarsReplicaStatus {
    let status = &*facts.status;
    let mut report = MarsReplicaStatus {
        observed_generation: Some(around.generation),
        role: Some(role(status.role)),
        data_state: Some(data_state(status)),
        state: state_word(facts, around).to_owned(),
        designation: designation_ref(status.designation),
        primary_under: facts.done.primary_under.and_then(designation_ref),
        boot_id: Some(around.boot_id.to_string()),
        node_uuid: Some(around.node),
        replica_uuid: Some(around.replica.0),
        size_bytes: Some(signed(status.size_bytes)),
        disk_bytes: Some(signed(facts.disk_bytes)),
        positions: Some(positions(status)),
        lineage: lineage(status),
        lag: lag(status, around),
        sync: sync(status, around),
        released: status.released.map(released),
        refused: refused(plan, &facts.done),
        device: around.device.as_ref().map(device),
        opened_by: users(&facts.device),
        invalidated: facts.done.invalidate,
        fake_synced: facts.done.fake_sync,
        log_rotated: facts.done.rotate,
        forks: status
            .faults
            .iter()
            .filter_map(|fault| faults::fork(fault, facts))
            .collect(),
        peers: around.contacts.iter().map(contact).collect(),
        conditions: previous.to_vec(),
    };
    set_conditions(&mut report, facts, plan, around);
    report
}

/// The status of a replica whose engine does not run, and why. What was known before stays, but it is no primary. A device of an
/// earlier stay as primary, that waits, still has its users.
#[must_use]
pub fn report_problem(
    problem: &Problem,
    around: &Surroundings,
    waiting: &Presence,
    previous: &MarsReplicaStatus,
) -> MarsReplicaStatus {
    let mut report = previous.clone();
    report.observed_generation = Some(around.generation);
    report.boot_id = Some(around.boot_id.to_string());
    report.node_uuid = Some(around.node);
    report.replica_uuid = Some(around.replica.0);
    problem.reason.clone_into(&mut report.state);
    report.role = None;
    report.device = None;
    report.opened_by = users(waiting);
    report.data_state = match problem.reason {
        "DataMissing" | "PoolAbsent" => Some(ReplicaData::Missing),
        "Quarantined" => Some(ReplicaData::Quarantined),
        _ => None,
    };
    let now = time_now();
    let generation = Some(around.generation);
    conditions::set(
        &mut report.conditions,
        conditions::READY,
        Truth::False,
        problem.reason,
        &problem.message,
        generation,
        &now,
    );
    conditions::set(
        &mut report.conditions,
        conditions::DEGRADED,
        Truth::True,
        problem.reason,
        &problem.message,
        generation,
        &now,
    );
    report
}

/// Whether two reports differ in state; positions, lag and times alone do not count.
#[must_use]
pub fn differs_in_state(a: &MarsReplicaStatus, b: &MarsReplicaStatus) -> bool {
    let state_only = |status: &MarsReplicaStatus| {
        let mut status = status.clone();
        status.positions = None;
        status.lag = None;
        // Ten percent of a copy are worth a write, a byte is not.
        status.sync = status.sync.map(|sync| api::SyncStatus {
            percent: sync.percent / 10,
            source: sync.source,
            ..Default::default()
        });
        for peer in &mut status.peers {
            peer.last_contact = None;
        }
        for fork in &mut status.forks {
            (fork.ours_bytes, fork.theirs_bytes) = (0, 0);
            (fork.ours_seconds, fork.theirs_seconds) = (None, None);
        }
        status
    };
    state_only(a) != state_only(b)
}

fn role(role: Role) -> ActualRole {
    match role {
        Role::Secondary => ActualRole::Secondary,
        Role::Promoting => ActualRole::Promoting,
        Role::Primary => ActualRole::Primary,
        Role::Closing => ActualRole::Closing,
    }
}

fn data_state(status: &ReplicaStatus) -> ReplicaData {
    match status.data {
        _ if is_blank(status) => ReplicaData::Blank,
        DataState::Consistent => ReplicaData::Consistent,
        DataState::Syncing => ReplicaData::Syncing,
        DataState::LogLost => ReplicaData::LogLost,
    }
}

/// One word for people; the first that applies.
fn state_word(facts: &Facts, around: &Surroundings) -> &'static str {
    let status = &*facts.status;
    if let Some((name, ..)) = status.faults.iter().map(|fault| faults::describe(fault, facts)).next() {
        return name;
    }
    let connected = around.contacts.iter().any(|contact| contact.connected);
    match (status.role, &status.data) {
        (Role::Primary, _) => "Primary",
        (Role::Promoting, _) => "Promoting",
        (Role::Closing, _) => "Closing",
        (Role::Secondary, _) if status.resumable.is_some() => "ResumeWaits",
        (Role::Secondary, _) if facts.done.detached.is_some() => "Detached",
        (Role::Secondary, DataState::LogLost) => "LogLost",
        (Role::Secondary, DataState::Syncing) if is_blank(status) => "Blank",
        (Role::Secondary, DataState::Syncing) if !status.switches.sync => "PausedSync",
        (Role::Secondary, DataState::Syncing) => "Syncing",
        (Role::Secondary, DataState::Consistent) if !status.switches.fetch => "PausedFetch",
        (Role::Secondary, DataState::Consistent) if !status.switches.replay => "PausedReplay",
        (Role::Secondary, DataState::Consistent) if status.released.is_some() => "Released",
        (Role::Secondary, DataState::Consistent) if !connected => "PeersUnreachable",
        (Role::Secondary, DataState::Consistent) => "Replaying",
    }
}

fn positions(status: &ReplicaStatus) -> api::Positions {
    api::Positions {
        durable: history_position(status.durable),
        applied: signed(status.applied.lsn.0),
        dirty_end: signed(status.dirty_end.lsn.0),
        log_start: signed(status.log_start.0),
        replayed: signed(status.replayed.0),
    }
}

fn lineage(status: &ReplicaStatus) -> Vec<api::Epoch> {
    let epochs = &status.lineage.0;
    let newest = epochs.iter().skip(epochs.len().saturating_sub(LINEAGE_SHOWN));
    let epoch = |entry: &mars_engine::lineage::EpochEntry| api::Epoch {
        epoch: entry.id.0,
        parent: history_position(entry.parent),
        origin: entry.origin.0,
        cause: format!("{:?}", entry.cause),
        time: time_of(entry.lamport),
    };
    newest.map(epoch).collect()
}

fn lag(status: &ReplicaStatus, around: &Surroundings) -> Option<mars_crds::Lag> {
    if status.role == Role::Primary {
        return Some(mars_crds::Lag {
            bytes: 0,
            seconds: 0,
            as_of: Some(time_now()),
        });
    }
    around.lag.map(|lag| mars_crds::Lag {
        bytes: signed(lag.bytes),
        seconds: signed(lag.seconds),
        as_of: jiff::Timestamp::try_from(lag.as_of).ok().map(Time),
    })
}

fn sync(status: &ReplicaStatus, around: &Surroundings) -> Option<api::SyncStatus> {
    status.sync.map(|sync| api::SyncStatus {
        percent: percent(sync.done_bytes, sync.total_bytes),
        done_bytes: signed(sync.done_bytes),
        total_bytes: signed(sync.total_bytes),
        moved_bytes: signed(sync.moved_bytes),
        source: around.sync_source.map(|source| source.0),
    })
}

fn percent(done: u64, total: u64) -> i32 {
    let percent = u128::from(done) * 100 / u128::from(total.max(1));
    i32::try_from(percent.min(100)).unwrap_or(100)
}

fn released(released: mars_engine::api::Released) -> api::Released {
    api::Released {
        number: signed(released.designation.number),
        uuid: released.designation.id,
        to: released.to.map(|to| to.0),
        end: history_position(released.end),
    }
}

fn refused(plan: &Plan, done: &Done) -> Option<api::Refused> {
    let refused = |order, designation: Designation, reason: &str, durable| api::Refused {
        order,
        number: signed(designation.number),
        uuid: designation.id,
        reason: reason.to_owned(),
        durable,
    };
    let close = plan.waiting.iter().find_map(|waiting| {
        let designation = waiting.refused_close?;
        Some(refused(api::RefusedOrder::Close, designation, &waiting.message, false))
    });
    let promote = done.refused_promote.as_ref();
    close.or_else(|| promote.map(|it| refused(api::RefusedOrder::Promote, it.designation, &it.reason, true)))
}

fn device(device: &Device) -> api::Device {
    api::Device {
        path: device.link.display().to_string(),
        major: i64::from(device.major),
        minor: i64::from(device.minor),
        diskseq: signed(device.diskseq),
        frontend: match device.kind {
            FrontendKind::Loop => "loop".to_owned(),
            FrontendKind::Ublk => "ublk".to_owned(),
        },
    }
}

fn users(device: &Presence) -> Vec<api::User> {
    device.users().iter().map(user).collect()
}

fn user(user: &DeviceUser) -> api::User {
    let (kind, name, pid) = match user {
        DeviceUser::Mount { at, .. } => ("mount", at.display().to_string(), None),
        DeviceUser::Open { pid, command } => ("process", command.clone(), Some(i64::from(*pid))),
        DeviceUser::Holder { name } => ("holder", name.clone(), None),
        DeviceUser::Swap => ("swap", "swap space".to_owned(), None),
        DeviceUser::HiddenMount { file_system } => {
            ("mount", format!("{file_system}, in a namespace without process"), None)
        }
        DeviceUser::Unknown { .. } => ("unknown", user.to_string(), None),
    };
    api::User {
        kind: kind.to_owned(),
        name,
        pid,
    }
}

fn contact(contact: &Contact) -> api::PeerContact {
    api::PeerContact {
        replica_uuid: contact.replica.0,
        node: contact.node.clone(),
        connected: contact.connected,
        last_contact: contact.last_contact.clone(),
    }
}

fn set_conditions(report: &mut MarsReplicaStatus, facts: &Facts, plan: &Plan, around: &Surroundings) {
    let (now, generation) = (time_now(), Some(around.generation));
    let list = &mut report.conditions;
    let mut set = |name: &str, truth: Truth, reason: &str, message: &str| {
        conditions::set(list, name, truth, reason, message, generation, &now);
    };
    let faults = faults::named(facts);
    for (name, message) in &faults {
        set(name, Truth::True, name, message);
    }
    let waiting = plan
        .waiting
        .first()
        .map(|waiting| (waiting.reason, waiting.message.as_str()));
    let invalid = around.invalid_spec.as_deref().map(|message| ("InvalidSpec", message));
    let failed = around
        .failed
        .as_ref()
        .map(|failed| (failed.reason, failed.message.as_str()));
    let fault = faults.first().map(|(name, message)| (*name, message.as_str()));
    let trouble = fault.or(failed).or(invalid);
    match trouble {
        Some((reason, message)) => set(conditions::DEGRADED, Truth::True, reason, message),
        None => set(conditions::DEGRADED, Truth::False, "AsWanted", "nothing is wrong"),
    }
    match trouble.or(waiting) {
        Some((reason, message)) => set(conditions::READY, Truth::False, reason, message),
        None => set(
            conditions::READY,
            Truth::True,
            "AsWanted",
            "this replica is as its spec wants it",
        ),
    }
    let pending = around.device.as_ref().is_some_and(|device| device.resize_pending);
    if pending {
        set(
            "ResizePending",
            Truth::True,
            "DeviceOpen",
            "this kernel shows the larger size when all users have closed the device",
        );
    }
    for name in faults::FAULTS.into_iter().chain(["ResizePending"]) {
        let holds = faults.iter().any(|(fault, _)| *fault == name) || (name == "ResizePending" && pending);
        if !holds && conditions::get(list, name).is_some_and(|condition| condition.status == "True") {
            conditions::set(list, name, Truth::False, "Over", "not any more", generation, &now);
        }
    }
}
