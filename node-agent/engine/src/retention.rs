//! Which log segments may go, and who is given up for it: a pure decision.
//!
//! Invariants: a segment goes only below the applied position of both saved slots; it stays while any member, alive or not, has not
//! reported it durable – unless the retention budget is exceeded, and then exactly the members that still need it are recorded as
//! orphans before it goes. Nobody's silence alone ever deletes log.

use crate::state::SavedMember;
use crate::types::{Lsn, ReplicaId};

/// One closed segment; the one being written is never offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Closed {
    /// Where its content ends.
    pub end: Lsn,
    /// Size of its file (bytes).
    pub bytes: u64,
}

/// What retention wants.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// That many of the oldest segments go.
    pub segments: usize,
    /// These members still need one of them and are given up.
    pub orphans: Vec<ReplicaId>,
}

/// Decides over the closed segments, oldest first. `total_bytes` counts all log files; `budget_bytes` 0 means no limit.
#[must_use]
pub fn plan(
    closed: &[Closed],
    applied_in_both: Lsn,
    members: &[SavedMember],
    total_bytes: u64,
    budget_bytes: u64,
) -> Plan {
    let mut plan = Plan::default();
    let mut left_bytes = total_bytes;
    for segment in closed {
        if segment.end > applied_in_both {
            break;
        }
        let needs = |member: &&SavedMember| {
            !member.orphaned
                && !plan.orphans.contains(&member.replica)
                && member.durable.is_none_or(|durable| durable.lsn < segment.end)
        };
        let needed_by: Vec<ReplicaId> = members.iter().filter(needs).map(|member| member.replica).collect();
        if !needed_by.is_empty() && (budget_bytes == 0 || left_bytes <= budget_bytes) {
            break;
        }
        plan.orphans.extend(needed_by);
        plan.segments += 1;
        left_bytes = left_bytes.saturating_sub(segment.bytes);
    }
    plan
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Position;
    use uuid::Uuid;

    fn member(id: u128, durable: Option<u64>) -> SavedMember {
        let durable = durable.map(|lsn| Position {
            lsn: Lsn(lsn),
            ..Position::default()
        });
        SavedMember {
            replica: ReplicaId(Uuid::from_u128(id)),
            durable,
            orphaned: false,
        }
    }

    fn closed() -> Vec<Closed> {
        [100, 200, 300]
            .map(|end| Closed {
                end: Lsn(end),
                bytes: 10,
            })
            .to_vec()
    }

    #[test]
    fn a_segment_stays_while_any_member_needs_it_or_it_is_not_applied() {
        let passed = [member(1, Some(300)), member(2, Some(250))];
        assert_eq!(plan(&closed(), Lsn(300), &passed, 40, 0).segments, 2);
        assert_eq!(plan(&closed(), Lsn(199), &passed, 40, 0).segments, 1);
        let silent = [member(1, Some(300)), member(2, None)];
        assert_eq!(plan(&closed(), Lsn(300), &silent, 40, 0), Plan::default());
        assert_eq!(plan(&closed(), Lsn(300), &[], 40, 0).segments, 3);
    }

    #[test]
    fn a35_over_budget_the_lagging_member_is_orphaned_and_nobody_else() {
        let members = [member(1, Some(300)), member(2, Some(50)), member(3, Some(150))];
        let plan = plan(&closed(), Lsn(300), &members, 40, 35);
        assert_eq!(
            plan,
            Plan {
                segments: 1,
                orphans: vec![members[1].replica]
            }
        );
    }

    #[test]
    fn the_budget_never_reaches_above_the_applied_position() {
        assert_eq!(plan(&closed(), Lsn(99), &[member(1, None)], 1_000, 1), Plan::default());
    }
}
