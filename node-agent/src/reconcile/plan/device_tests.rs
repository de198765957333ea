//! The plan for a device that is there already, or of which nothing is known.

use super::*;
use crate::reconcile::todo::DataPolicy;

/// Secondary under `persisted`, with a device from the time as primary under 1, which somebody uses.
fn with_leftover(persisted: u64) -> Facts {
    let mut facts = facts(status(Role::Secondary, persisted));
    facts.device = Presence::LeftBehind { users: users() };
    facts.done.primary_under = Some(designation(1));
    facts
}

#[test]
fn a56_a_device_that_nobody_may_serve_again_is_given_up_and_its_users_are_named() {
    let mut facts = with_leftover(2);
    assert!(plan(&todo(follow(2)), &facts).steps.contains(&Step::Discard));
    facts.device = Presence::GivenUp { users: users() };
    let after = plan(&todo(follow(2)), &facts);
    assert_eq!(reasons(&after), ["DeviceStranded"]);
    let message = &after.waiting[0].message;
    assert!(message.contains("/srv") && message.contains("I/O errors"), "{message}");
}

#[test]
fn a55_a_device_that_this_replica_may_serve_again_is_never_given_up() {
    let discards = |todo: &Todo, facts: &Facts| plan(todo, facts).steps.contains(&Step::Discard);
    // Nothing newer is persisted here.
    assert!(!discards(&todo(follow(1)), &with_leftover(1)));
    assert_eq!(reasons(&plan(&todo(follow(1)), &with_leftover(1))), ["DeviceStranded"]);
    // The role has not been decided yet after a restart.
    let mut undecided = with_leftover(2);
    undecided.status = Arc::new(ReplicaStatus {
        designation: designation(2),
        ..resumable(true)
    });
    assert!(!discards(&todo(follow(2)), &undecided));
    // It is named anew: by a grant, or by a handover whose predecessor has not closed yet.
    assert!(!discards(
        &todo(primary_grant(2, GrantCause::Failover)),
        &with_leftover(2)
    ));
    let mut heir = todo(follow(2));
    heir.designated.replica = Some(replica(10));
    assert!(!discards(&heir, &with_leftover(2)));
    // A grant that is older than what is persisted names nobody any more.
    assert!(discards(
        &todo(primary_grant(2, GrantCause::Failover)),
        &with_leftover(3)
    ));
}

#[test]
fn a55_users_of_a_device_that_was_left_are_served_although_attach_is_off_or_the_replica_is_being_deleted() {
    let mut off = todo(primary_grant(1, GrantCause::Create));
    off.attach = false;
    let mut primary = facts(status(Role::Primary, 1));
    primary.device = Presence::LeftBehind { users: users() };
    assert_eq!(plan(&off, &primary).steps, [Step::Attach]);
    let mut gone = todo(primary_grant(1, GrantCause::Create));
    gone.deletion = Some(DataPolicy::Delete);
    assert_eq!(plan(&gone, &primary).steps, [Step::Attach]);
    let mut restarted = facts(resumable(true));
    restarted.evidence.unanswered.clear();
    restarted.device = Presence::LeftBehind { users: users() };
    assert!(matches!(plan(&gone, &restarted).steps[..], [Step::Resume(_)]));
    // Overruled meanwhile: what is wished cannot be served, and the deletion goes on.
    assert_eq!(plan(&gone, &with_leftover(2)).steps, [Step::Discard]);
}

#[test]
fn a55_a_device_of_which_nothing_is_known_counts_as_in_use() {
    let mut primary = facts(status(Role::Primary, 3));
    primary.device = unknown();
    let close = plan(&todo(close_for_peer(4)), &primary);
    assert_eq!(close.steps, []);
    assert_eq!(close.waiting[0].refused_close, Some(designation(4)));
    assert!(close.waiting[0].message.contains("the keeper is silent"), "{close:?}");
    assert_eq!(plan(&todo(follow(4)), &primary).steps, []);
    let mut off = todo(primary_grant(3, GrantCause::Create));
    off.attach = false;
    let off = plan(&off, &primary);
    assert_eq!((off.steps.len(), reasons(&off)), (0, vec!["DeviceUnknown"]));

    let mut secondary = facts(status(Role::Secondary, 3));
    secondary.device = unknown();
    let mut gone = todo(follow(3));
    gone.deletion = Some(DataPolicy::Delete);
    let gone = plan(&gone, &secondary);
    assert_eq!((gone.steps.len(), reasons(&gone)), (0, vec!["DeviceInUse"]));
    let mut invalidate = todo(follow(3));
    invalidate.one_shots.invalidate = Some(Uuid::from_u128(5));
    let invalidate = plan(&invalidate, &secondary);
    assert_eq!(
        (invalidate.steps.len(), reasons(&invalidate)),
        (0, vec!["InvalidateRefused"])
    );
    let promote = plan(&todo(primary_grant(4, GrantCause::Failover)), &secondary);
    assert_eq!((promote.steps.len(), reasons(&promote)), (0, vec!["DeviceUnknown"]));
}

#[test]
fn a55_a_restart_between_a_refused_close_and_its_withdrawal_serves_the_users_and_refuses_again() {
    let mut restarted = facts(resumable(true));
    restarted.evidence.asked_long_enough = true;
    restarted.device = Presence::LeftBehind { users: users() };
    assert_eq!(
        plan(&todo(close_for_peer(4)), &restarted).steps,
        [Step::Resume(designation(3))]
    );
    let mut resumed = facts(status(Role::Primary, 3));
    resumed.device = Presence::LeftBehind { users: users() };
    let refused = plan(&todo(close_for_peer(4)), &resumed);
    assert_eq!(refused.steps, [Step::Attach]);
    assert_eq!(refused.waiting[0].refused_close, Some(designation(4)));
    // Nobody uses it any more: taken over, then removed in order, then the end is written.
    resumed.device = Presence::LeftBehind { users: Vec::new() };
    let unused = plan(&todo(close_for_peer(4)), &resumed);
    assert_eq!((unused.steps, unused.waiting), (vec![Step::Attach], vec![]));
}

#[test]
fn a54_a_device_of_an_earlier_stay_is_not_taken_over_on_a_history_that_others_have_continued() {
    let grant = |cause| todo(primary_grant(4, cause));
    let promotion = |cause| Step::Promote {
        designation: designation(4),
        cause,
    };
    for (cause, engine) in [
        (GrantCause::Failover, Cause::Failover),
        (GrantCause::Handover { end: Some(at(100)) }, Cause::Handover),
    ] {
        // Nobody else has written: its users go on where they stopped.
        let mut own = facts(status(Role::Secondary, 3));
        own.device = Presence::LeftBehind { users: users() };
        assert_eq!(plan(&grant(cause), &own).steps, [promotion(engine)]);
        let mut other = own.clone();
        let mut continued = status(Role::Secondary, 3);
        continued.lineage.0[0].origin = replica(11);
        other.status = Arc::new(continued);
        assert_eq!(plan(&grant(cause), &other).steps, [Step::Discard, promotion(engine)]);
        // The newest epoch is ours, and nothing of it is here: the end that is here is older than what its users know.
        let mut older = status(Role::Secondary, 3);
        older.durable.epoch = EpochId(Uuid::from_u128(8));
        other.status = Arc::new(older);
        let steps = plan(&grant(GrantCause::Failover), &other).steps;
        assert_eq!(steps, [Step::Discard, promotion(Cause::Failover)]);
    }
}

#[test]
fn a55_data_under_a_device_that_waits_is_not_thrown_away() {
    let id = Uuid::from_u128(77);
    let mut order = todo(follow(3));
    order.one_shots.invalidate = Some(id);
    let mut secondary = facts(status(Role::Secondary, 3));
    secondary.device = Presence::LeftBehind { users: users() };
    let refused = plan(&order, &secondary);
    assert_eq!(refused.steps, []);
    assert!(reasons(&refused).contains(&"InvalidateRefused"), "{refused:?}");
    // Unused, it goes first: it must not come back to life over other data.
    secondary.device = Presence::LeftBehind { users: Vec::new() };
    assert_eq!(plan(&order, &secondary).steps, [Step::Discard, Step::Invalidate(id)]);
    secondary.device = Presence::GivenUp { users: users() };
    assert_eq!(plan(&order, &secondary).steps, [Step::Invalidate(id)]);
}
