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
