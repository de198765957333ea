//! The plan, case by case.

use super::super::facts::{Done, PeerFacts, RefusedPromote};
use super::super::todo::{Designated, Limits, OneShots, PeerTodo};
use super::*;
use crate::frontend::DeviceUser;
use crate::pool::backing::BackingWish;
use crate::reconcile::todo::GrantCause;
use mars_engine::api::{Compression, DataState, Durability, Released, ReplicaStatus, Resumable};
use mars_engine::lineage::{EpochEntry, Lineage};
use mars_engine::types::{Chain, EpochId, Lamport, Lsn, Position, ResourceId};
use std::sync::Arc;

fn designation(number: u64) -> Designation {
    Designation {
        number,
        id: Uuid::from_u128(u128::from(number)),
    }
}

pub(in crate::reconcile) fn replica(number: u128) -> ReplicaId {
    ReplicaId(Uuid::from_u128(number))
}

fn at(lsn: u64) -> Position {
    Position {
        epoch: EpochId(Uuid::from_u128(9)),
        lsn: Lsn(lsn),
        chain: Chain([7; 32]),
    }
}

fn tuning() -> Tuning {
    Tuning {
        durability: Durability::OnFlush,
        compression: Compression::None,
        overlay_budget_bytes: 1 << 20,
        segment_bytes: 1 << 20,
        retention_bytes: 0,
    }
}

fn todo(grant: Grant) -> Todo {
    Todo {
        name: "r.a".into(),
        generation: 1,
        resource: "r".into(),
        resource_id: ResourceId(Uuid::from_u128(1)),
        replica: replica(10),
        size_bytes: 1 << 20,
        backing: BackingWish::Pool("default".into()),
        overwrite: false,
        established: false,
        grant,
        designated: Designated::default(),
        peers: vec![PeerTodo {
            node: "b".into(),
            node_id: None,
            replica: replica(11),
            address: "b:7777".into(),
        }],
        attach: true,
        switches: Switches::default(),
        tuning: tuning(),
        limits: Limits::default(),
        one_shots: OneShots::default(),
        deletion: None,
    }
}

pub(in crate::reconcile) fn status(role: Role, number: u64) -> ReplicaStatus {
    let epoch = EpochEntry {
        id: EpochId(Uuid::from_u128(9)),
        parent: Position::default(),
        origin: replica(10),
        cause: Cause::Create,
        lamport: Lamport(1),
    };
    ReplicaStatus {
        role,
        data: DataState::Consistent,
        designation: designation(number),
        size_bytes: 1 << 20,
        appended: at(100),
        durable: at(100),
        replayed: Lsn(100),
        applied: at(100),
        dirty_end: Position {
            lsn: Lsn(100),
            ..Position::default()
        },
        log_start: Lsn(0),
        durable_time: Lamport(1),
        applied_time: Lamport(1),
        lineage: Lineage(vec![epoch]),
        switches: Switches::default(),
        sync: None,
        released: None,
        faults: Vec::new(),
        overlay_bytes: 0,
        log_bytes: 0,
        resumable: None,
        members: vec![mars_engine::api::MemberStatus {
            replica: replica(11),
            durable: None,
            orphaned: false,
        }],
    }
}

pub(in crate::reconcile) fn peer(number: u64, role: Role) -> PeerFacts {
    PeerFacts {
        replica: replica(11),
        node: "b".into(),
        designation: Some(designation(number)),
        role: Some(role),
        answers: true,
        durable_time: None,
    }
}

pub(in crate::reconcile) fn facts(status: ReplicaStatus) -> Facts {
    Facts {
        device: match status.role {
            Role::Primary => Presence::Served { users: Vec::new() },
            _ => Presence::Absent,
        },
        resize_pending: false,
        device_behind: false,
        status: Arc::new(status),
        tuning: Some(tuning()),
        disk_bytes: 1 << 20,
        copying: false,
        peers: Vec::new(),
        evidence: Evidence {
            from_api: true,
            unanswered: vec!["b".into()],
            asked_long_enough: false,
        },
        done: Done::default(),
    }
}

fn users() -> Vec<DeviceUser> {
    vec![DeviceUser::Mount {
        at: "/srv".into(),
        pid: 7,
        command: "postgres".into(),
    }]
}

fn unknown() -> Presence {
    Presence::Unknown {
        reason: "the keeper is silent".into(),
    }
}

fn primary_grant(number: u64, cause: GrantCause) -> Grant {
    Grant::Primary {
        designation: designation(number),
        cause,
    }
}

fn follow(number: u64) -> Grant {
    Grant::Secondary {
        designation: Some(designation(number)),
        close_for: None,
    }
}

fn close_for_peer(number: u64) -> Grant {
    Grant::Secondary {
        designation: Some(designation(number)),
        close_for: Some(Some(replica(11))),
    }
}

fn resumable(same_boot: bool) -> ReplicaStatus {
    let mut status = status(Role::Secondary, 3);
    status.resumable = Some(Resumable {
        designation: designation(3),
        same_boot,
    });
    status
}

fn reasons(plan: &Plan) -> Vec<&'static str> {
    plan.waiting.iter().map(|waiting| waiting.reason).collect()
}

#[test]
fn nothing_to_do_is_an_empty_plan() {
    let plan = plan(
        &todo(primary_grant(3, GrantCause::Create)),
        &facts(status(Role::Primary, 3)),
    );
    assert_eq!(plan, Plan::default());
}

#[test]
fn a02_configuration_follows_the_spec_in_every_role() {
    for role in [Role::Primary, Role::Secondary] {
        let mut todo = todo(if role == Role::Primary {
            primary_grant(3, GrantCause::Create)
        } else {
            follow(3)
        });
        todo.switches.replay = false;
        todo.peers.clear();
        todo.tuning.durability = Durability::EveryWrite;
        let plan = plan(&todo, &facts(status(role, 3)));
        let expected = [
            Step::SetMembers(vec![]),
            Step::SetSwitches(todo.switches),
            Step::SetTuning(todo.tuning),
        ];
        assert_eq!(plan.steps, expected, "{role:?}");
    }
}

#[test]
fn a_blank_replica_is_promoted_by_create_only() {
    let blank = || {
        let mut blank = status(Role::Secondary, 0);
        blank.lineage = Lineage::default();
        blank.data = DataState::Syncing;
        facts(blank)
    };
    let create = plan(&todo(primary_grant(1, GrantCause::Create)), &blank());
    assert_eq!(
        create.steps,
        [Step::Promote {
            designation: designation(1),
            cause: Cause::Create
        }]
    );
    let failover = plan(&todo(primary_grant(1, GrantCause::Failover)), &blank());
    assert_eq!((failover.steps.len(), reasons(&failover)), (0, vec!["NotConsistent"]));
}

#[test]
fn a31_a_replica_that_syncs_is_not_promoted_by_anything() {
    let mut syncing = status(Role::Secondary, 0);
    syncing.data = DataState::Syncing;
    for cause in [GrantCause::Failover, GrantCause::Handover { end: Some(at(100)) }] {
        let plan = plan(&todo(primary_grant(5, cause)), &facts(syncing.clone()));
        assert_eq!(
            (plan.steps.len(), reasons(&plan)),
            (0, vec!["NotConsistent"]),
            "{cause:?}"
        );
    }
}

#[test]
fn a50_a_handover_promotes_exactly_at_the_released_end() {
    let grant = |end| todo(primary_grant(4, GrantCause::Handover { end: Some(end) }));
    let facts = facts(status(Role::Secondary, 3));
    let there = plan(&grant(at(100)), &facts);
    assert_eq!(
        there.steps,
        [Step::Promote {
            designation: designation(4),
            cause: Cause::Handover
        }]
    );
    let behind = plan(&grant(at(150)), &facts);
    assert_eq!((behind.steps.len(), reasons(&behind)), (0, vec!["CatchingUp"]));
    let other_bytes = Position {
        chain: Chain([8; 32]),
        ..at(100)
    };
    for end in [other_bytes, at(90)] {
        let fork = plan(&grant(end), &facts);
        assert!(matches!(fork.steps[..], [Step::RefusePromote { .. }]), "{fork:?}");
    }
    // Without an end the handover was given up, and this replica may have the role back.
    let given_up = plan(&todo(primary_grant(4, GrantCause::Handover { end: None })), &facts);
    assert_eq!(given_up.steps, there.steps);
    // Unless somebody else has begun an epoch meanwhile: then it went on without this replica.
    let mut passed = status(Role::Secondary, 3);
    passed.lineage.0[0].origin = replica(11);
    let passed = plan(
        &todo(primary_grant(4, GrantCause::Handover { end: None })),
        &self::facts(passed),
    );
    assert_eq!((passed.steps.len(), reasons(&passed)), (0, vec!["NotOwnEpoch"]));
    let mut closed = status(Role::Secondary, 3);
    closed.released = Some(Released {
        designation: designation(3),
        to: Some(replica(11)),
        end: at(100),
    });
    let closed = plan(
        &todo(primary_grant(4, GrantCause::Handover { end: None })),
        &self::facts(closed),
    );
    assert_eq!((closed.steps.len(), reasons(&closed)), (0, vec!["ClosedFor"]));
}

#[test]
fn a50_a_refusal_holds_for_its_designation_and_not_for_a_newer_one() {
    let mut facts = facts(status(Role::Secondary, 3));
    facts.done.refused_promote = Some(RefusedPromote {
        designation: designation(4),
        reason: "fork".into(),
    });
    let refused = plan(&todo(primary_grant(4, GrantCause::Failover)), &facts);
    assert_eq!((refused.steps.len(), reasons(&refused)), (0, vec!["PromoteRefused"]));
    assert_eq!(
        plan(&todo(primary_grant(5, GrantCause::Failover)), &facts).steps.len(),
        1
    );
}

#[test]
fn a55_a_device_in_use_is_never_taken_away() {
    let mut facts = facts(status(Role::Primary, 3));
    facts.device = Presence::Served { users: users() };
    for (grant, refused) in [(close_for_peer(4), Some(designation(4))), (follow(4), None)] {
        let plan = plan(&todo(grant), &facts);
        assert_eq!(plan.steps, []);
        assert_eq!(plan.waiting[0].refused_close, refused);
        assert!(plan.waiting[0].message.contains("/srv"), "{plan:?}");
    }
    let mut detach = todo(primary_grant(3, GrantCause::Create));
    detach.attach = false;
    let plan = plan(&detach, &facts);
    assert_eq!((plan.steps.len(), reasons(&plan)), (0, vec!["DeviceInUse"]));
}

#[test]
fn a37_a_device_that_cannot_grow_while_open_is_made_anew_once_nobody_uses_it() {
    let mut facts = facts(status(Role::Primary, 3));
    facts.resize_pending = true;
    let order = todo(primary_grant(3, GrantCause::Create));
    assert_eq!(plan(&order, &facts).steps, [Step::Detach, Step::Attach]);
    facts.device = Presence::Served { users: users() };
    assert_eq!(plan(&order, &facts), Plan::default(), "its users go on");
    (facts.resize_pending, facts.device_behind) = (false, true);
    assert_eq!(
        plan(&order, &facts).steps,
        [Step::GrowDevice],
        "one that was not told is told"
    );
}

#[test]
fn a50_an_unused_primary_removes_its_device_and_then_closes() {
    let plan = plan(&todo(close_for_peer(4)), &facts(status(Role::Primary, 3)));
    let close = Step::Close {
        designation: designation(4),
        to: Some(replica(11)),
    };
    assert_eq!(plan.steps, [Step::Detach, close]);
}

#[test]
fn a56_a_primary_steps_down_for_a_newer_designation_from_the_operator_or_from_an_acting_peer() {
    let ordered = plan(&todo(follow(4)), &facts(status(Role::Primary, 3)));
    assert_eq!(ordered.steps, [Step::Detach, Step::StepDown(designation(4))]);
    let mut seen = facts(status(Role::Primary, 3));
    seen.peers = vec![peer(4, Role::Primary)];
    let seen_plan = plan(&todo(primary_grant(3, GrantCause::Create)), &seen);
    assert_eq!(seen_plan.steps, ordered.steps);
    // A peer that has only heard of it may have heard of a handover whose `Close` we still have to write.
    seen.peers = vec![peer(4, Role::Secondary)];
    assert_eq!(plan(&todo(primary_grant(3, GrantCause::Create)), &seen).steps, []);
}

#[test]
fn a53_with_equal_numbers_nobody_yields() {
    let mut facts = facts(status(Role::Primary, 3));
    let twin = Designation {
        number: 3,
        id: Uuid::from_u128(99),
    };
    facts.peers = vec![PeerFacts {
        designation: Some(twin),
        ..peer(3, Role::Primary)
    }];
    assert_eq!(plan(&todo(primary_grant(3, GrantCause::Create)), &facts).steps, []);
    let grant = Grant::Secondary {
        designation: Some(twin),
        close_for: None,
    };
    assert_eq!(plan(&todo(grant), &facts).steps, []);
}

#[test]
fn a58_a_spec_without_designation_demotes_nobody() {
    let grant = Grant::Secondary {
        designation: None,
        close_for: None,
    };
    let running = plan(&todo(grant), &facts(status(Role::Primary, 3)));
    assert_eq!((running.steps.len(), reasons(&running)), (0, vec!["NotDesignated"]));
    let mut rebooted = facts(resumable(false));
    rebooted.evidence.asked_long_enough = true;
    assert_eq!(plan(&todo(grant), &rebooted).steps, [Step::Resume(designation(3))]);
}

#[test]
fn a56_grants_older_than_what_is_known_are_not_followed() {
    let stale = plan(
        &todo(primary_grant(2, GrantCause::Failover)),
        &facts(status(Role::Secondary, 3)),
    );
    assert_eq!((stale.steps.len(), reasons(&stale)), (0, vec!["StaleGrant"]));
    let mut facts = facts(status(Role::Secondary, 3));
    facts.peers = vec![peer(5, Role::Secondary)];
    let elsewhere = plan(&todo(primary_grant(4, GrantCause::Failover)), &facts);
    assert_eq!(
        (elsewhere.steps.len(), reasons(&elsewhere)),
        (0, vec!["NewerElsewhere"])
    );
}

#[test]
fn orders_with_an_id_are_done_once() {
    let id = Uuid::from_u128(77);
    let mut todo = todo(follow(3));
    todo.one_shots = OneShots {
        invalidate: Some(id),
        fake_sync: None,
        rotate: Some(id),
    };
    let mut facts = facts(status(Role::Secondary, 3));
    assert_eq!(plan(&todo, &facts).steps, [Step::Invalidate(id), Step::Rotate(id)]);
    facts.done = Done {
        invalidate: Some(id),
        rotate: Some(id),
        ..Done::default()
    };
    assert_eq!(plan(&todo, &facts).steps, []);
    let before = facts.done.clone();
    (facts.done.invalidate, facts.done.rotate) = (Some(Uuid::from_u128(78)), None);
    facts.done.keep_earlier(&before);
    assert_eq!(plan(&todo, &facts).steps, [], "a restored backup orders nothing anew");
    todo.one_shots.fake_sync = Some(Uuid::from_u128(79));
    let moot = Step::NothingToFake(Uuid::from_u128(79));
    assert_eq!(plan(&todo, &facts).steps, [moot], "it does not wait for a later copy");
    todo.one_shots.fake_sync = None;
    let mut primary = self::facts(status(Role::Primary, 3));
    primary.done.rotate = Some(id);
    todo.grant = primary_grant(3, GrantCause::Create);
    let refused = plan(&todo, &primary);
    assert_eq!((refused.steps.len(), reasons(&refused)), (0, vec!["InvalidateRefused"]));
}

#[test]
fn a37_growing_goes_from_the_disk_to_the_device() {
    let mut todo = todo(primary_grant(3, GrantCause::Create));
    todo.size_bytes = 2 << 20;
    let growing = plan(&todo, &facts(status(Role::Primary, 3)));
    assert_eq!(growing.steps, [Step::GrowDisk(2 << 20), Step::Resize(2 << 20)]);
    todo.grant = follow(3);
    assert_eq!(
        plan(&todo, &facts(status(Role::Secondary, 3))).steps,
        [Step::GrowDisk(2 << 20)]
    );
}

#[test]
fn a56_a_device_left_over_from_the_time_as_primary_goes_once_nobody_uses_it() {
    let mut facts = facts(status(Role::Secondary, 4));
    facts.device = Presence::Served { users: Vec::new() };
    assert_eq!(plan(&todo(follow(4)), &facts).steps, [Step::Detach]);
    facts.device = Presence::Served { users: users() };
    let stranded = plan(&todo(follow(4)), &facts);
    assert_eq!((stranded.steps.len(), reasons(&stranded)), (0, vec!["DeviceStranded"]));
}

#[test]
fn a56_a_role_that_was_lost_is_not_taken_again_under_the_same_designation() {
    let mut facts = facts(status(Role::Secondary, 3));
    facts.done.primary_under = Some(designation(3));
    let lost = plan(&todo(primary_grant(3, GrantCause::Failover)), &facts);
    assert_eq!((lost.steps.len(), reasons(&lost)), (0, vec!["RoleLost"]));
    assert_eq!(
        plan(&todo(primary_grant(4, GrantCause::Failover)), &facts).steps.len(),
        1
    );
}

#[test]
fn a58_create_never_takes_over_data() {
    let plan = plan(
        &todo(primary_grant(4, GrantCause::Create)),
        &facts(status(Role::Secondary, 3)),
    );
    assert_eq!((plan.steps.len(), reasons(&plan)), (0, vec!["CreateOnData"]));
}

#[test]
fn a62_a_replica_that_is_being_deleted_gets_no_more_orders() {
    let mut todo = todo(primary_grant(4, GrantCause::Failover));
    todo.deletion = Some(crate::reconcile::todo::DataPolicy::Delete);
    let mut facts = facts(status(Role::Secondary, 3));
    assert_eq!(plan(&todo, &facts), Plan::default());
    facts.device = Presence::Served { users: users() };
    assert_eq!(reasons(&plan(&todo, &facts)), ["DeviceInUse"]);
}

#[path = "plan/device_tests.rs"]
mod device_tests;

#[path = "plan/held_tests.rs"]
mod held_tests;

#[path = "plan/restart_tests.rs"]
mod restart_tests;
