//! The plan after a restart of the agent or of its machine, and while a role is being taken.

use super::*;

#[test]
fn a03_a_restarted_agent_resumes_without_the_api_server_after_asking_its_peers() {
    let grant = primary_grant(3, GrantCause::Create);
    let mut facts = facts(resumable(true));
    facts.evidence.from_api = false;
    assert_eq!(reasons(&plan(&todo(grant), &facts)), ["ResumeWaits"]);
    facts.evidence.asked_long_enough = true;
    assert_eq!(plan(&todo(grant), &facts).steps, [Step::Resume(designation(3))]);
    facts.peers = vec![peer(4, Role::Secondary)];
    assert_eq!(plan(&todo(grant), &facts).steps, [Step::Observe(designation(4))]);
}

#[test]
fn a56_after_a_reboot_the_role_is_resumed_only_with_evidence() {
    let grant = primary_grant(3, GrantCause::Create);
    let mut facts = facts(resumable(false));
    facts.evidence = Evidence {
        from_api: false,
        unanswered: vec!["b".into()],
        asked_long_enough: true,
    };
    let silent = plan(&todo(grant), &facts);
    assert_eq!((silent.steps.len(), reasons(&silent)), (0, vec!["ResumeWaits"]));
    let mut all_answered = facts.clone();
    all_answered.evidence.unanswered.clear();
    all_answered.peers = vec![peer(3, Role::Secondary)];
    assert_eq!(plan(&todo(grant), &all_answered).steps, [Step::Resume(designation(3))]);
    facts.evidence.from_api = true;
    assert_eq!(plan(&todo(grant), &facts).steps, [Step::Resume(designation(3))]);
    assert_eq!(plan(&todo(follow(4)), &facts).steps, [Step::Observe(designation(4))]);
}

#[test]
fn a15_after_a_reboot_members_are_asked_for_lost_log_although_the_api_server_names_nobody_else() {
    let grant = primary_grant(3, GrantCause::Create);
    let mut facts = facts(resumable(false));
    facts.evidence = Evidence {
        from_api: true,
        unanswered: vec!["b".into()],
        asked_long_enough: false,
    };
    let asking = plan(&todo(grant), &facts);
    assert_eq!((asking.steps.len(), reasons(&asking)), (0, vec!["ResumeWaits"]));
    assert!(asking.waiting[0].message.contains('b'), "{asking:?}");
    let mut answered = facts.clone();
    answered.evidence.unanswered.clear();
    assert_eq!(plan(&todo(grant), &answered).steps, [Step::Resume(designation(3))]);
    // One that stays silent does not hold the application up for longer than that.
    facts.evidence.asked_long_enough = true;
    assert_eq!(plan(&todo(grant), &facts).steps, [Step::Resume(designation(3))]);
}

#[test]
fn a50_a_restart_in_the_middle_of_a_handover_resumes_to_write_its_own_close() {
    let mut facts = facts(resumable(true));
    facts.evidence.asked_long_enough = true;
    facts.peers = vec![peer(4, Role::Secondary)];
    assert_eq!(
        plan(&todo(close_for_peer(4)), &facts).steps,
        [Step::Resume(designation(3))]
    );
    facts.peers = vec![peer(4, Role::Primary)];
    assert_eq!(
        plan(&todo(close_for_peer(4)), &facts).steps,
        [Step::Observe(designation(4))]
    );
    facts.peers = vec![peer(5, Role::Secondary)];
    assert_eq!(
        plan(&todo(close_for_peer(4)), &facts).steps,
        [Step::Observe(designation(5))]
    );
}

#[test]
fn a50_an_aborted_handover_is_taken_up_again_under_the_newer_number() {
    let grant = primary_grant(5, GrantCause::Failover);
    let mut restarted = facts(resumable(true));
    restarted.evidence.asked_long_enough = true;
    restarted.peers = vec![peer(4, Role::Secondary)];
    assert_eq!(plan(&todo(grant), &restarted).steps, [Step::Resume(designation(3))]);
    let running = plan(&todo(grant), &facts(status(Role::Primary, 3)));
    assert_eq!(
        running.steps,
        [Step::Promote {
            designation: designation(5),
            cause: Cause::Failover
        }]
    );
}

#[test]
fn a_grant_from_the_cache_needs_the_api_server_or_all_members() {
    let mut facts = facts(status(Role::Secondary, 3));
    facts.evidence = Evidence {
        from_api: false,
        unanswered: vec!["b".into()],
        asked_long_enough: true,
    };
    let grant = primary_grant(4, GrantCause::Failover);
    assert_eq!(reasons(&plan(&todo(grant), &facts)), ["GrantFromCache"]);
    facts.evidence.unanswered.clear();
    assert_eq!(plan(&todo(grant), &facts).steps.len(), 1);
}

#[test]
fn a56_who_is_overruled_while_its_log_is_loaded_takes_no_role() {
    let mut facts = facts(status(Role::Promoting, 3));
    let observe = |number| vec![Step::Observe(designation(number))];
    assert_eq!(plan(&todo(follow(4)), &facts).steps, observe(4));
    assert_eq!(
        plan(&todo(close_for_peer(4)), &facts).steps,
        [],
        "its Close is still to be written"
    );
    facts.peers = vec![peer(5, Role::Secondary)];
    assert_eq!(
        plan(&todo(follow(3)), &facts).steps,
        [],
        "it may have heard of an order to us"
    );
    facts.peers = vec![peer(5, Role::Primary)];
    assert_eq!(plan(&todo(follow(3)), &facts).steps, observe(5));
}
