//! What a secondary lets go, and when.

use super::super::super::facts::Detached;
use super::*;

fn detached() -> Detached {
    Detached {
        disk_bytes: 1 << 20,
        witness: None,
    }
}

fn without_disk_io() -> Switches {
    Switches {
        replay: false,
        sync: false,
        ..Switches::default()
    }
}

#[test]
fn a36_a_data_disk_is_let_go_of_only_at_rest() {
    let mut todo = todo(follow(1));
    todo.attach = false;
    let mut facts = facts(status(Role::Secondary, 1));
    // First nothing more may be loaded or copied; log is fetched as before.
    assert_eq!(plan(&todo, &facts).steps, [Step::SetSwitches(without_disk_io())]);
    let at_rest = ReplicaStatus {
        switches: without_disk_io(),
        ..status(Role::Secondary, 1)
    };
    for (what, busy) in [
        (
            "loaded, not applied",
            ReplicaStatus {
                replayed: Lsn(120),
                ..at_rest.clone()
            },
        ),
        (
            "a write-back is under way",
            ReplicaStatus {
                dirty_end: Position {
                    lsn: Lsn(120),
                    ..Position::default()
                },
                ..at_rest.clone()
            },
        ),
    ] {
        facts.status = Arc::new(busy);
        let plan = plan(&todo, &facts);
        assert_eq!((plan.steps.len(), reasons(&plan)), (0, vec!["Detaching"]), "{what}");
    }
    facts.status = Arc::new(at_rest);
    facts.copying = true;
    assert_eq!(reasons(&plan(&todo, &facts)), ["Detaching"]);
    facts.copying = false;
    assert_eq!(plan(&todo, &facts).steps, [Step::DetachDisk]);
    facts.done.detached = Some(detached());
    assert_eq!(plan(&todo, &facts), Plan::default());
}

#[test]
fn a_detached_disk_is_taken_back_before_anything_touches_it() {
    let mut facts = facts(ReplicaStatus {
        switches: without_disk_io(),
        ..status(Role::Secondary, 1)
    });
    facts.done.detached = Some(detached());
    assert_eq!(plan(&todo(follow(1)), &facts).steps, [Step::AttachDisk]);
    facts.done.detached = None;
    assert_eq!(
        plan(&todo(follow(1)), &facts).steps,
        [Step::SetSwitches(Switches::default())]
    );
}

#[test]
fn a_detached_replica_is_not_promoted_and_says_what_to_do() {
    let mut todo = todo(primary_grant(2, GrantCause::Failover));
    todo.attach = false;
    let mut facts = facts(ReplicaStatus {
        switches: without_disk_io(),
        ..status(Role::Secondary, 1)
    });
    facts.done.detached = Some(detached());
    let refused = plan(&todo, &facts);
    assert_eq!((refused.steps.len(), reasons(&refused)), (0, vec!["Detached"]));
    assert!(refused.waiting[0].message.contains("switch attach on"));
    // With attach on again the disk comes first, then the role.
    todo.attach = true;
    assert_eq!(plan(&todo, &facts).steps, [Step::AttachDisk]);
    facts.done.detached = None;
    let steps = plan(&todo, &facts).steps;
    assert!(
        steps.iter().any(|step| matches!(step, Step::Promote { .. })),
        "{steps:?}"
    );
    // One that holds its disk when it is granted the role keeps it: attach off means no device then.
    todo.attach = false;
    facts.status = Arc::new(status(Role::Secondary, 1));
    assert!(!plan(&todo, &facts).steps.contains(&Step::DetachDisk));
}

/// Secondary under `persisted`, with a device from the time as primary under 1, which somebody uses.
fn with_leftover(persisted: u64) -> Facts {
    let mut facts = facts(status(Role::Secondary, persisted));
    facts.leftover = Leftover::Waiting;
    facts.device_users = vec!["mounted at /srv".into()];
    facts.done.primary_under = Some(designation(1));
    facts
}

#[test]
fn a56_a_device_that_nobody_may_serve_again_is_given_up_and_its_users_are_named() {
    let mut facts = with_leftover(2);
    assert!(plan(&todo(follow(2)), &facts).steps.contains(&Step::Discard));
    facts.leftover = Leftover::GivenUp;
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
    primary.has_device = false;
    primary.leftover = Leftover::Waiting;
    primary.device_users = vec!["mounted at /srv".into()];
    assert_eq!(plan(&off, &primary).steps, [Step::Attach]);
    let mut gone = todo(primary_grant(1, GrantCause::Create));
    gone.deletion = Some(super::super::super::todo::DataPolicy::Delete);
    assert_eq!(plan(&gone, &primary).steps, [Step::Attach]);
    let mut restarted = facts(resumable(true));
    restarted.evidence.unanswered.clear();
    restarted.leftover = Leftover::Waiting;
    restarted.device_users = vec!["mounted at /srv".into()];
    assert!(matches!(plan(&gone, &restarted).steps[..], [Step::Resume(_)]));
    // Overruled meanwhile: what is wished cannot be served, and the deletion goes on.
    assert_eq!(plan(&gone, &with_leftover(2)).steps, [Step::Discard]);
}
