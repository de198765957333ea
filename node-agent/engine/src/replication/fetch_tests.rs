//! Whom a secondary follows, from whom it fetches, and what it accepts.

use super::*;
use crate::api::{Switches, SyncProgress};
use crate::replication::chunk::ChunkClaim;
use crate::replication::histories::tests::{epoch_id, lineage, position};
use crate::replication::source::tests::MemLog;
use crate::types::Lamport;
use std::time::Duration;
use uuid::Uuid;

pub(crate) fn replica(number: u128) -> ReplicaId {
    ReplicaId(Uuid::from_u128(number))
}

pub(crate) fn designation(number: u64) -> Designation {
    Designation {
        number,
        id: Uuid::from_u128(u128::from(number)),
    }
}

pub(crate) fn own(epochs: &[(u128, u64)], durable: Position) -> ReplicaStatus {
    ReplicaStatus {
        role: Role::Secondary,
        data: DataState::Consistent,
        designation: designation(1),
        size_bytes: 1 << 20,
        appended: durable,
        durable,
        replayed: durable.lsn,
        applied: Position::default(),
        dirty_end: Position::default(),
        log_start: Lsn(0),
        durable_time: Lamport(0),
        applied_time: Lamport(0),
        lineage: lineage(epochs),
        switches: Switches {
            fetch: true,
            replay: true,
            sync: true,
            apply_delay: Duration::ZERO,
        },
        sync: None::<SyncProgress>,
        released: None,
        faults: Vec::new(),
        overlay_bytes: 0,
        log_bytes: 0,
        resumable: None,
        members: Vec::new(),
    }
}

pub(crate) fn member(number: u128, role: Role, held: u64, epochs: &[(u128, u64)], durable: Position) -> Member {
    let mut status = own(epochs, durable);
    status.role = role;
    status.designation = designation(held);
    let status = Some(PeerStatus::of(&status, None));
    Member {
        replica: replica(number),
        reachable: true,
        avoid: false,
        status,
    }
}

fn wish(number: u64, designated: Option<u128>) -> Wish {
    Wish {
        designation: designation(number),
        designated: designated.map(replica),
        ..Wish::default()
    }
}

fn wish_with_epoch(number: u64, designated: Option<u128>, epoch: u128) -> Wish {
    Wish {
        epoch: Some(epoch_id(epoch)),
        ..wish(number, designated)
    }
}

fn status_of(member: &mut Member) -> &mut PeerStatus {
    member.status.as_mut().unwrap()
}

fn source(decision: &Decision) -> (ReplicaId, Option<Lsn>) {
    match decision {
        Decision::Fetch(plan) => (plan.source, plan.until),
        other => panic!("expected a fetch, got {other:?}"),
    }
}

const ONE: &[(u128, u64)] = &[(1, 0)];

#[test]
fn a_secondary_fetches_from_the_primary_even_when_others_have_as_much() {
    let primary = member(1, Role::Primary, 1, ONE, position(1, 100));
    let third = member(3, Role::Secondary, 1, ONE, position(1, 100));
    let decision = decide(&own(ONE, position(1, 40)), &wish(1, Some(1)), &[third, primary]);
    assert_eq!(source(&decision), (replica(1), None));
}

#[test]
fn a34_a_third_member_serves_when_the_primary_is_unreachable() {
    let mut primary = member(1, Role::Primary, 1, ONE, position(1, 100));
    primary.reachable = false;
    let third = member(3, Role::Secondary, 1, ONE, position(1, 120));
    let me = own(ONE, position(1, 40));
    // The last thing heard of the primary may be older than what the third member has.
    assert_eq!(
        source(&decide(&me, &wish(1, Some(1)), &[primary.clone(), third.clone()])),
        (replica(3), None)
    );
    // Never heard of the primary since our own restart: the epoch that it is known to have begun is the proof.
    primary.status = None;
    let told = wish_with_epoch(1, Some(1), 1);
    assert_eq!(
        source(&decide(&me, &told, &[primary.clone(), third.clone()])),
        (replica(3), None)
    );
    // Without it nothing proves that what replica 1 once wrote is still its history.
    assert_eq!(
        decide(&me, &wish(1, Some(1)), &[primary.clone(), third.clone()]),
        Decision::Wait(Wait::NoPrimary)
    );
    // Not even told whom the designation names: what the third member has heard counts.
    let mut gossip = third;
    let heard = Followed {
        leader: replica(1),
        designation: designation(1),
        durable: position(1, 130),
        durable_time: Lamport(0),
        lineage: lineage(ONE),
    };
    status_of(&mut gossip).follows = Some(heard);
    assert_eq!(
        source(&decide(&me, &wish(1, None), &[primary, gossip])),
        (replica(3), None)
    );
}

#[test]
fn a34_a_third_member_that_went_another_way_does_not_serve() {
    // Replica 2 took over at 80; the third member still has 100 bytes of the old primary's epoch.
    let mut primary = member(2, Role::Primary, 2, &[(1, 0), (2, 80)], position(2, 300));
    primary.reachable = false;
    let third = member(3, Role::Secondary, 1, ONE, position(1, 100));
    let me = own(ONE, position(1, 70));
    assert_eq!(
        decide(&me, &wish(2, Some(2)), &[primary.clone(), third.clone()]),
        Decision::Wait(Wait::NoSource)
    );
    primary.status = None;
    assert_eq!(
        decide(&me, &wish_with_epoch(2, Some(2), 2), &[primary, third]),
        Decision::Wait(Wait::NoPrimary)
    );
}

#[test]
fn a34_what_the_designated_replica_wrote_in_an_earlier_stay_proves_nothing() {
    // Replica 1 was primary (epoch 1), lost the role, and took over again from its own fork in epoch 11; replica 3 has more of
    // epoch 1 than that fork, and wrote none of it.
    let mut primary = member(1, Role::Primary, 3, &[(1, 0), (11, 60)], position(11, 300));
    (primary.reachable, primary.status) = (false, None);
    let third = member(3, Role::Secondary, 3, ONE, position(1, 100));
    let me = own(ONE, position(1, 50));
    let told = wish_with_epoch(3, Some(1), 11);
    assert_eq!(
        decide(&me, &told, &[primary.clone(), third.clone()]),
        Decision::Wait(Wait::NoPrimary)
    );
    // Somebody else went on after the epoch: that is not the designated replica's history, either.
    let other = member(3, Role::Secondary, 3, &[(1, 0), (2, 80)], position(2, 100));
    assert_eq!(
        decide(&me, &wish_with_epoch(3, Some(1), 1), &[primary, other]),
        Decision::Wait(Wait::NoPrimary)
    );
}

fn pending_handover() -> Wish {
    Wish {
        handover: true,
        predecessor: Some(replica(1)),
        ..wish_with_epoch(2, Some(2), 1)
    }
}

#[test]
fn a50_third_members_follow_the_predecessor_until_the_successor_has_begun() {
    let mut old = member(1, Role::Primary, 1, ONE, position(1, 100));
    let heir = member(2, Role::Secondary, 2, ONE, position(1, 90));
    let me = own(ONE, position(1, 70));
    let members = |old: &Member| [old.clone(), heir.clone()];
    assert_eq!(
        source(&decide(&me, &pending_handover(), &members(&old))),
        (replica(1), None)
    );
    // While it closes it knows the designation that names its successor.
    status_of(&mut old).role = Role::Closing;
    status_of(&mut old).designation = designation(2);
    assert_eq!(
        source(&decide(&me, &pending_handover(), &members(&old))),
        (replica(1), None)
    );
    // Closed, and nobody speaks of it any more: its epoch says whose history there is.
    status_of(&mut old).role = Role::Secondary;
    assert!(
        matches!(decide(&me, &pending_handover(), &members(&old)), Decision::Fetch(plan) if plan.leader.leader == replica(1))
    );
    // The successor has begun: from now on its history counts.
    let heir = member(2, Role::Primary, 2, &[(1, 0), (2, 100)], position(2, 120));
    assert_eq!(
        source(&decide(&me, &pending_handover(), &[old, heir])),
        (replica(2), None)
    );
}

#[test]
fn a50_during_a_handover_no_other_old_primary_counts() {
    // Replica 4 is still primary under an older designation, on a fork of its own.
    let rogue = member(4, Role::Primary, 1, &[(1, 0), (4, 60)], position(4, 500));
    let me = own(ONE, position(1, 60));
    assert_eq!(
        decide(&me, &pending_handover(), std::slice::from_ref(&rogue)),
        Decision::Wait(Wait::NoPrimary)
    );
    let old = member(1, Role::Primary, 1, ONE, position(1, 100));
    assert!(
        matches!(decide(&own(ONE, position(1, 40)), &pending_handover(), &[rogue, old]), Decision::Fetch(plan) if plan.leader.leader == replica(1))
    );
}

#[test]
fn an_old_primary_is_not_followed_once_a_newer_designation_is_known() {
    let old = member(1, Role::Primary, 1, ONE, position(1, 100));
    let me = own(ONE, position(1, 70));
    assert_eq!(
        decide(&me, &wish(2, Some(2)), std::slice::from_ref(&old)),
        Decision::Wait(Wait::NoPrimary)
    );
    // In a planned handover the predecessor's history is what the successor will continue.
    let handover = Wish {
        handover: true,
        ..wish(2, Some(2))
    };
    assert_eq!(source(&decide(&me, &handover, &[old])), (replica(1), None));
}

#[test]
fn a_primary_with_a_newer_designation_than_ours_is_followed() {
    let newer = member(2, Role::Primary, 5, &[(1, 0), (2, 100)], position(2, 100));
    let old = member(1, Role::Secondary, 4, ONE, position(1, 100));
    let me = own(ONE, position(1, 70));
    assert_eq!(
        source(&decide(&me, &wish(4, Some(1)), &[old, newer])),
        (replica(2), None)
    );
}

#[test]
fn a53_beyond_the_fork_a_secondary_stops_and_says_where() {
    let primary = member(2, Role::Primary, 2, &[(1, 0), (2, 80)], position(2, 300));
    let decision = decide(&own(ONE, position(1, 100)), &wish(2, Some(2)), &[primary]);
    let Decision::Stop(Fault::Fork {
        with,
        at,
        ours_bytes,
        theirs_bytes,
        since,
    }) = decision
    else {
        panic!("{decision:?}")
    };
    assert_eq!((with, at, ours_bytes, theirs_bytes), (replica(2), Lsn(80), 20, 220));
    assert_eq!(since, Lamport(200));
}

#[test]
fn a53_between_two_primaries_a_secondary_goes_to_the_fork_and_stops_there() {
    let old = member(1, Role::Primary, 1, ONE, position(1, 100));
    let new = member(2, Role::Primary, 2, &[(1, 0), (2, 80)], position(2, 300));
    let members = [old, new];
    let decision = decide(&own(ONE, position(1, 70)), &wish(2, Some(2)), &members);
    assert_eq!(source(&decision), (replica(2), Some(Lsn(80))));
    let decision = decide(&own(ONE, position(1, 80)), &wish(2, Some(2)), &members);
    assert!(
        matches!(
            decision,
            Decision::Stop(Fault::Fork {
                at: Lsn(80),
                ours_bytes: 0,
                ..
            })
        ),
        "{decision:?}"
    );
    // Already on the new primary's side: it goes on.
    let beyond = own(&[(1, 0), (2, 80)], position(2, 200));
    assert_eq!(
        source(&decide(&beyond, &wish(2, Some(2)), &members)),
        (replica(2), None)
    );
}

#[test]
fn a53_each_of_two_primaries_reports_the_fork() {
    let mut me = own(ONE, position(1, 100));
    me.role = Role::Primary;
    let other = member(2, Role::Primary, 2, &[(1, 0), (2, 80)], position(2, 300));
    let decision = decide(&me, &wish(1, Some(1)), std::slice::from_ref(&other));
    assert!(matches!(decision, Decision::Stop(Fault::Fork { at: Lsn(80), .. })));
    me.durable = position(1, 80);
    assert_eq!(
        decide(&me, &wish(1, Some(1)), &[other]),
        Decision::Wait(Wait::NotSecondary)
    );
}

#[test]
fn a56_an_old_primary_that_knows_the_newest_designation_is_not_taken_for_its_holder() {
    // Its device is in use, so it is still primary, and it has more bytes than the new one.
    let old = member(1, Role::Primary, 2, ONE, position(1, 900));
    let new = member(2, Role::Primary, 2, &[(1, 0), (2, 80)], position(2, 300));
    let me = own(&[(1, 0), (2, 80)], position(2, 200));
    for members in [[old.clone(), new.clone()], [new, old]] {
        assert_eq!(source(&decide(&me, &wish(2, None), &members)), (replica(2), None));
    }
}

#[test]
fn two_designations_with_one_number_are_never_chosen_between() {
    let one = member(1, Role::Primary, 3, ONE, position(1, 100));
    let mut two = member(2, Role::Primary, 3, &[(1, 0), (2, 50)], position(2, 100));
    status_of(&mut two).designation.id = Uuid::from_u128(77);
    let mut unknown = wish(3, None);
    unknown.designation.number = 2;
    let decision = decide(&own(ONE, position(1, 40)), &unknown, &[one, two]);
    assert_eq!(decision, Decision::Wait(Wait::Ambiguous));
}

#[test]
fn a35_log_that_nobody_keeps_makes_an_orphan_with_the_reason() {
    let mut primary = member(1, Role::Primary, 1, ONE, position(1, 1000));
    status_of(&mut primary).log_start = Lsn(500);
    let mut third = member(3, Role::Secondary, 1, ONE, position(1, 900));
    let me = own(ONE, position(1, 40));
    let members = [primary.clone(), third.clone()];
    assert_eq!(source(&decide(&me, &wish(1, Some(1)), &members)), (replica(3), None));
    status_of(&mut third).log_start = Lsn(41);
    let decision = decide(&me, &wish(1, Some(1)), &[primary, third]);
    let Decision::Stop(Fault::Orphan { reason }) = decision else {
        panic!("{decision:?}")
    };
    assert!(
        reason.contains("ends at 40") && reason.contains("begins at 41"),
        "{reason}"
    );
}

#[test]
fn a_source_that_just_failed_is_asked_last() {
    let mut primary = member(1, Role::Primary, 1, ONE, position(1, 100));
    let third = member(3, Role::Secondary, 1, ONE, position(1, 100));
    primary.avoid = true;
    let me = own(ONE, position(1, 40));
    assert_eq!(
        source(&decide(&me, &wish(1, Some(1)), &[primary.clone(), third])),
        (replica(3), None)
    );
    assert_eq!(source(&decide(&me, &wish(1, Some(1)), &[primary])), (replica(1), None));
}

#[test]
fn a50_the_successor_fetches_to_exactly_the_released_end_from_anyone() {
    let released = position(1, 200);
    let old = member(1, Role::Secondary, 2, ONE, released);
    let wish = Wish {
        handover_end: Some(released),
        ..wish(2, Some(2))
    };
    assert_eq!(
        source(&decide(&own(ONE, position(1, 40)), &wish, &[old])),
        (replica(1), Some(Lsn(200)))
    );
    assert_eq!(
        decide(&own(ONE, released), &wish, &[]),
        Decision::Wait(Wait::HandoverComplete)
    );
}

#[test]
fn the_fetch_switch_and_a_missing_log_hold_it_back() {
    let primary = [member(1, Role::Primary, 1, ONE, position(1, 100))];
    let mut paused = own(ONE, position(1, 40));
    paused.switches.fetch = false;
    assert_eq!(
        decide(&paused, &wish(1, Some(1)), &primary),
        Decision::Wait(Wait::Paused)
    );
    let mut fresh = own(&[], Position::default());
    fresh.data = DataState::Syncing;
    assert_eq!(
        decide(&fresh, &wish(1, Some(1)), &primary),
        Decision::Wait(Wait::NeedsSync)
    );
}

fn session(log: &MemLog, from: Position, until: Option<Lsn>) -> FetchSession {
    let leader = Followed {
        leader: replica(1),
        designation: designation(1),
        durable: log.end,
        durable_time: Lamport(0),
        lineage: log.lineage.clone(),
    };
    FetchSession::new(
        Plan {
            source: replica(3),
            leader,
            until,
        },
        from,
    )
}

fn claim_of(log: &MemLog, index: usize) -> ChunkClaim {
    let (start, record) = log.records[index].clone();
    let chunk = LogChunk::build(start, vec![record]).unwrap();
    ChunkClaim {
        start,
        end: chunk.end(),
        records: chunk.into_records(),
    }
}

fn small_log() -> MemLog {
    let mut log = MemLog::default();
    log.begin_epoch(1);
    log.write(1, 512);
    log.write(2, 512);
    log
}

#[test]
fn a39_log_without_proof_or_out_of_order_is_refused() {
    let log = small_log();
    let from = log.records[0].0;
    let mut unproven = session(&log, from, None);
    let violation = unproven.on_item(FetchItem::Records(claim_of(&log, 0))).unwrap_err();
    assert!(matches!(violation, Violation::Unproven { .. }), "{violation}");
    let mut elsewhere = session(&log, from, None);
    assert!(elsewhere.on_item(FetchItem::Proven { at: log.end }).is_err());
    let mut skipping = session(&log, from, None);
    skipping.on_item(FetchItem::Proven { at: from }).unwrap();
    let violation = skipping.on_item(FetchItem::Records(claim_of(&log, 1))).unwrap_err();
    assert!(matches!(violation, Violation::NotContinuing { .. }), "{violation}");
    let mut flipped = session(&log, from, None);
    flipped.on_item(FetchItem::Proven { at: from }).unwrap();
    let mut claim = claim_of(&log, 0);
    claim.records[0].payload = vec![9; 512].into();
    assert!(matches!(
        flipped.on_item(FetchItem::Records(claim)),
        Err(Violation::Chunk(_))
    ));
}

#[test]
fn proven_log_becomes_commands_in_order() {
    let log = small_log();
    let from = log.records[0].0;
    let mut session = session(&log, from, Some(log.end.lsn));
    assert!(session.on_item(FetchItem::Proven { at: from }).unwrap().is_none());
    for index in 0..2 {
        let command = session.on_item(FetchItem::Records(claim_of(&log, index))).unwrap();
        assert!(matches!(command, Some(Command::AcceptLog(_))));
    }
    assert!(session.finished());
    assert_eq!(session.expected(), log.end);
}

#[test]
fn log_beyond_the_agreed_end_is_refused() {
    let log = small_log();
    let from = log.records[0].0;
    let mut session = session(&log, from, Some(log.records[1].0.lsn));
    session.on_item(FetchItem::Proven { at: from }).unwrap();
    session.on_item(FetchItem::Records(claim_of(&log, 0))).unwrap();
    assert!(matches!(
        session.on_item(FetchItem::Records(claim_of(&log, 1))),
        Err(Violation::Beyond { .. })
    ));
}

#[test]
fn p7_a_third_member_cannot_lead_into_an_epoch_that_is_not_the_primarys() {
    let mut log = small_log();
    let from = log.end;
    let mut session = session(&log, from, None);
    session.on_item(FetchItem::Proven { at: from }).unwrap();
    let foreign = log.begin_epoch(9);
    assert!(matches!(
        session.on_item(FetchItem::Epoch(foreign)),
        Err(Violation::ForeignEpoch { .. })
    ));
}
