//! Faults as people see them: forks with what each side has, and conditions with cause and next command.
//!
//! Invariant: a figure that may still grow – the other side does not answer, or our own tail is not durable again – says so.

use super::super::facts::Facts;
use super::super::object::{signed, time_of};
use mars_crds::conditions;
use mars_crds::replica as api;
use mars_engine::api::{Fault, Role};
use mars_engine::types::{Lamport, ReplicaId};

pub(super) fn fork(fault: &Fault, facts: &Facts) -> Option<api::Fork> {
    let Fault::Fork {
        with,
        at,
        since,
        ours_bytes,
        theirs_bytes,
    } = fault
    else {
        return None;
    };
    let theirs = facts.peers.iter().find(|peer| peer.replica == *with);
    Some(api::Fork {
        with: with.0,
        lsn: signed(at.0),
        since: time_of(*since),
        ours_bytes: signed(*ours_bytes),
        theirs_bytes: signed(*theirs_bytes),
        ours_at_least: facts.status.role == Role::Secondary && facts.status.appended.lsn > facts.status.durable.lsn,
        theirs_at_least: may_have_more(*with, facts),
        ours_seconds: seconds_beyond(*since, *ours_bytes, Some(facts.status.durable_time)),
        theirs_seconds: seconds_beyond(*since, *theirs_bytes, theirs.and_then(|peer| peer.durable_time)),
    })
}

/// Whether the other side of a fork may have more beyond it than it was heard to have: it does not answer, and when it last did it had not
/// begun to follow the newest designation as a secondary, which takes nothing beyond the fork.
fn may_have_more(other: ReplicaId, facts: &Facts) -> bool {
    let other = facts.peers.iter().find(|peer| peer.replica == other);
    other.is_none_or(|peer| {
        let follows = peer.role == Some(Role::Secondary)
            && peer
                .designation
                .is_some_and(|known| known.number >= facts.status.designation.number);
        !peer.answers && !follows
    })
}

/// How long a side wrote on after the fork; `None` when that is not known.
fn seconds_beyond(since: Lamport, bytes: u64, last: Option<Lamport>) -> Option<i64> {
    if bytes == 0 {
        return Some(0);
    }
    let last = last.filter(|last| since.0 > 0 && last.0 > 0)?;
    Some(signed(last.0.saturating_sub(since.0) / 1_000_000_000))
}

/// Name of the condition, and what to do.
pub(super) fn describe(fault: &Fault, facts: &Facts) -> (&'static str, String) {
    match fault {
        Fault::LogStoreFailed { message } => (
            "LogStoreFailed",
            format!(
                "the transaction log cannot be written ({message}); writers are held. Repair the log store, then restart this agent"
            ),
        ),
        Fault::DataDiskFailed { message } => (
            "DataDiskFailed",
            format!(
                "the data disk fails ({message}). Hand over to another member, then replace the disk and join anew"
            ),
        ),
        Fault::StateFailed { message } => (
            "StateFailed",
            format!("saved state cannot be written ({message}). Repair the store below the state directory"),
        ),
        Fault::LogDefect {
            segment,
            file_offset,
            lsn,
            class,
        } => (
            "LogDefect",
            format!(
                "the log is damaged in {segment} at byte {file_offset} (position {lsn}, {class}); nothing behind it is used. Check the disk; it is refetched from a member that has it, else invalidate this replica"
            ),
        ),
        Fault::BacklogDefect {
            segment,
            file_offset,
            lsn,
            class,
        } => (
            "LogDefect",
            format!(
                "log that is kept for other members is damaged in {segment} at byte {file_offset} (position {lsn}, {class}): it is not shipped; the data here is whole. Check the disk; a member that needs this log gets it from another one that has it, else invalidate that member"
            ),
        ),
        Fault::DiskTooSmall {
            wanted_bytes,
            disk_bytes,
        } => (
            "DiskTooSmall",
            format!(
                "the resource has grown to {wanted_bytes} bytes, the data disk has {disk_bytes}: replay waits. Enlarge the disk"
            ),
        ),
        Fault::Fork {
            with,
            at,
            ours_bytes,
            theirs_bytes,
            ..
        } => (
            conditions::SPLIT_BRAIN,
            format!(
                "the history forks from that of replica {with} at {at}: {ours_bytes} bytes are only here, {}{theirs_bytes} only there. Decide which one survives, then invalidate the other",
                if may_have_more(*with, facts) { "at least " } else { "" }
            ),
        ),
        Fault::Orphan { reason } => ("Orphan", format!("{reason}. Invalidate this replica to sync it anew")),
    }
}

/// Conditions that only appear while they hold, and say False afterwards.
pub(super) const FAULTS: [&str; 7] = [
    "LogStoreFailed",
    "DataDiskFailed",
    "StateFailed",
    "LogDefect",
    "DiskTooSmall",
    conditions::SPLIT_BRAIN,
    "Orphan",
];

/// What is wrong, as conditions. Both kinds of damaged log are one: of the two, the one that stops this replica is shown.
pub(super) fn named(facts: &Facts) -> Vec<(&'static str, String)> {
    let faults = &facts.status.faults;
    let is_worse = faults.iter().any(|fault| matches!(fault, Fault::LogDefect { .. }));
    let shown = faults
        .iter()
        .filter(|fault| !(is_worse && matches!(fault, Fault::BacklogDefect { .. })));
    shown.map(|fault| describe(fault, facts)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reconcile::plan::tests::{facts, peer, replica, status};
    use mars_engine::types::Lsn;

    #[test]
    fn of_two_damaged_places_the_one_that_stops_the_replica_is_shown() {
        let (segment, class) = (|name: &str| name.to_owned(), "digest".to_owned());
        let kept = Fault::BacklogDefect {
            segment: segment("log-1"),
            file_offset: 4096,
            lsn: Lsn(1),
            class: class.clone(),
        };
        let ahead = Fault::LogDefect {
            segment: segment("log-2"),
            file_offset: 4096,
            lsn: Lsn(2),
            class,
        };
        let names = |faults: &[Fault]| {
            let mut status = status(Role::Primary, 6);
            status.faults = faults.to_vec();
            let named = named(&facts(status));
            assert!(named.iter().all(|(name, _)| FAULTS.contains(name)));
            named.into_iter().map(|(_, message)| message).collect::<Vec<_>>()
        };
        assert!(matches!(&names(std::slice::from_ref(&kept))[..], [message] if message.contains("log-1")));
        for both in [[kept.clone(), ahead.clone()], [ahead, kept]] {
            assert!(matches!(&names(&both)[..], [message] if message.contains("log-2")));
        }
    }

    #[test]
    fn a53_what_the_other_side_of_a_fork_has_is_a_lower_bound_until_it_answers_or_follows() {
        let fault = Fault::Fork {
            with: replica(11),
            at: Lsn(50),
            since: Lamport(0),
            ours_bytes: 50,
            theirs_bytes: 70,
        };
        let told = |known: Option<(u64, Role, bool)>| {
            let mut facts = facts(status(Role::Primary, 6));
            facts.peers = known
                .into_iter()
                .map(|(number, role, answers)| {
                    let mut peer = peer(number, role);
                    peer.answers = answers;
                    peer
                })
                .collect();
            let at_least = fork(&fault, &facts).unwrap().theirs_at_least;
            assert_eq!(describe(&fault, &facts).1.contains("at least 70 only there"), at_least);
            at_least
        };
        assert!(told(None), "it never answered");
        assert!(told(Some((5, Role::Primary, false))), "it may be writing");
        assert!(told(Some((5, Role::Secondary, false))), "it may be fetching");
        assert!(!told(Some((5, Role::Primary, true))), "as of now");
        assert!(
            !told(Some((6, Role::Secondary, false))),
            "it takes nothing beyond the fork any more"
        );
    }

    #[test]
    fn a53_what_a_restarted_replica_has_not_made_durable_again_is_still_to_come() {
        let fault = Fault::Fork {
            with: replica(11),
            at: Lsn(50),
            since: Lamport(0),
            ours_bytes: 50,
            theirs_bytes: 70,
        };
        let mut status = status(Role::Secondary, 6);
        assert!(!fork(&fault, &facts(status.clone())).unwrap().ours_at_least);
        status.appended.lsn = Lsn(120);
        assert!(fork(&fault, &facts(status)).unwrap().ours_at_least);
    }
}
