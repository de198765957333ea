//! The receiving side: whom to fetch from, how far, and what to accept.
//!
//! Invariants: only the designated primary's history is followed, from whomever it comes; nothing is fetched beyond
//! a fork; nothing is accepted that does not continue the local log exactly.

use crate::api::{Command, DataState, Fault, ReplicaStatus, Role};
use crate::lineage::{EpochEntry, Lineage};
use crate::replication::chunk::{ChunkError, LogChunk};
use crate::replication::histories::{Fork, Relation, relate};
use crate::replication::messages::{FetchItem, Followed, PeerStatus, Refused};
use crate::types::{Designation, EpochId, Lamport, Lsn, Position, ReplicaId};
use std::cmp::Ordering;

/// What the agent knows and wants, besides the replica's own state.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Newest designation known to this agent.
    pub designation: Designation,
    /// The replica it names, if known.
    pub designated: Option<ReplicaId>,
    /// The designation is a planned handover or demotion: until the successor has started its epoch, the predecessor's
    /// history is still the one to follow.
    pub handover: bool,
    /// Whose history that is, if known; nobody else's older designation counts then.
    pub predecessor: Option<ReplicaId>,
    /// The newest epoch that the replica to follow (the predecessor during a handover, else the designated one) is known to
    /// have begun. A history that goes through it, and in which nobody else wrote afterwards, is that replica's.
    pub epoch: Option<EpochId>,
    /// This replica is the successor: fetch to exactly this position, from anyone who has it.
    pub handover_end: Option<Position>,
}

/// Another member, as this one sees it.
#[derive(Debug, Clone)]
pub struct Member {
    /// Who.
    pub replica: ReplicaId,
    /// Whether it answers now.
    pub reachable: bool,
    /// It refused or broke off a moment ago: ask others first.
    pub avoid: bool,
    /// What it last said, however long ago.
    pub status: Option<PeerStatus>,
}

/// What to do about the log of a secondary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// Fetch.
    Fetch(Plan),
    /// Nothing to do, or nothing possible; says why.
    Wait(Wait),
    /// Stop, and say so until it changes.
    Stop(Fault),
}

/// A fetch to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// From whom.
    pub source: ReplicaId,
    /// Whose history is followed.
    pub leader: Followed,
    /// Not beyond this.
    pub until: Option<Lsn>,
}

/// Why nothing is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Wait {
    /// Not a secondary.
    #[error("not a secondary")]
    NotSecondary,
    /// The switch is off.
    #[error("fetch is switched off")]
    Paused,
    /// No log of its own yet: a sync sets its start.
    #[error("waits for a sync to begin")]
    NeedsSync,
    /// The end of the handover is here.
    #[error("has the predecessor's log to its end")]
    HandoverComplete,
    /// Nobody known holds the designation.
    #[error("no primary is known for the newest designation")]
    NoPrimary,
    /// Two replicas hold designations with the same number.
    #[error("two replicas claim the same designation number: split brain, resolve it")]
    Ambiguous,
    /// The primary, and everyone who could serve its log, is unreachable or has no more than we have.
    #[error("nobody reachable has more of the primary's log")]
    NoSource,
}

/// Decides anew; cheap enough to be asked whenever anything changes.
#[must_use]
pub fn decide(own: &ReplicaStatus, wish: &Wish, members: &[Member]) -> Decision {
    if own.role != Role::Secondary {
        return match fork_of_primaries(own, members) {
            Some(fault) => Decision::Stop(fault),
            None => Decision::Wait(Wait::NotSecondary),
        };
    }
    if own.lineage.0.is_empty() && own.data != DataState::Consistent {
        return Decision::Wait(Wait::NeedsSync);
    }
    let leader = match (wish.handover_end, find_leader(wish, members)) {
        (Some(end), _) => return decide_handover(own, end, members),
        (None, Leader::None) => return Decision::Wait(Wait::NoPrimary),
        (None, Leader::Ambiguous) => return Decision::Wait(Wait::Ambiguous),
        (None, Leader::Found(leader)) => leader,
    };
    if let Relation::Fork(fork) = relate_own(own, (&leader.lineage, leader.durable)) {
        return Decision::Stop(fork_fault(leader.leader, fork));
    }
    let until = match rival_fork(own, &leader, members) {
        Some((rival, fork)) if own.durable.lsn == fork.at => {
            // We stand before the fork: both sides have bytes that we do not have.
            return Decision::Stop(fork_fault(rival, Fork { ours_bytes: 0, ..fork }));
        }
        Some((_, fork)) => Some(fork.at),
        None => None,
    };
    if !own.switches.fetch {
        return Decision::Wait(Wait::Paused);
    }
    match find_source(own, &leader, members) {
        Source::From(source) => Decision::Fetch(Plan { source, leader, until }),
        Source::Nobody => Decision::Wait(Wait::NoSource),
        Source::TooOld(reason) => Decision::Stop(Fault::Orphan { reason }),
    }
}

/// Two actual primaries whose histories part: both go on, both say so.
fn fork_of_primaries(own: &ReplicaStatus, members: &[Member]) -> Option<Fault> {
    members.iter().find_map(|member| {
        let theirs = member.status.as_ref().filter(|status| status.role == Role::Primary)?;
        match relate_own(own, (&theirs.lineage, theirs.durable)) {
            Relation::Fork(fork) => Some(fork_fault(member.replica, fork)),
            _ => None,
        }
    })
}

fn relate_own(own: &ReplicaStatus, theirs: (&Lineage, Position)) -> Relation {
    relate((&own.lineage, own.durable), theirs)
}

fn fork_fault(with: ReplicaId, fork: Fork) -> Fault {
    Fault::Fork {
        with,
        at: fork.at,
        since: fork.since,
        ours_bytes: fork.ours_bytes,
        theirs_bytes: fork.theirs_bytes,
    }
}

/// The successor of a handover needs exactly the log up to `end`, whoever has it.
fn decide_handover(own: &ReplicaStatus, end: Position, members: &[Member]) -> Decision {
    if own.durable.lsn >= end.lsn {
        return Decision::Wait(Wait::HandoverComplete);
    }
    let has_end = |member: &&Member| {
        member.reachable
            && member.status.as_ref().is_some_and(|status| {
                status.durable.lsn >= end.lsn
                    && status.log_start <= own.durable.lsn
                    && matches!(
                        relate_own(own, (&status.lineage, status.durable)),
                        Relation::Behind { .. }
                    )
            })
    };
    let mut able: Vec<&Member> = members.iter().filter(has_end).collect();
    able.sort_by_key(|member| {
        (
            member.avoid,
            member.status.as_ref().is_none_or(|status| status.durable != end),
        )
    });
    let Some((source, status)) = able
        .first()
        .and_then(|member| Some((member.replica, member.status.as_ref()?)))
    else {
        return Decision::Wait(Wait::NoSource);
    };
    Decision::Fetch(Plan {
        source,
        leader: followed(source, status),
        until: Some(end.lsn),
    })
}

fn followed(leader: ReplicaId, status: &PeerStatus) -> Followed {
    Followed {
        leader,
        designation: status.designation,
        durable: status.durable,
        durable_time: status.durable_time,
        lineage: status.lineage.clone(),
    }
}

/// Whose history counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Leader {
    /// The holder of the newest designation.
    Found(Followed),
    /// Nobody known.
    None,
    /// Two with the same number.
    Ambiguous,
}

/// Finds the designated primary's history: from itself, from what others last heard of it, or – when nobody has heard of it
/// since we started – from a member whose history goes through the epoch that it is known to have begun.
#[must_use]
pub fn find_leader(wish: &Wish, members: &[Member]) -> Leader {
    let mut best: Option<Followed> = None;
    for candidate in candidates(members).filter(|candidate| counts(wish, candidate)) {
        if let Some(best) = &best
            && candidate.designation.number == best.designation.number
            && candidate.designation.id != best.designation.id
        {
            return Leader::Ambiguous;
        }
        if best.as_ref().is_none_or(|best| standing(&candidate) > standing(best)) {
            best = Some(candidate);
        }
    }
    match best.or_else(|| written_by_designated(wish, members)) {
        Some(leader) => Leader::Found(leader),
        None => Leader::None,
    }
}

/// What makes one claim to lead better than another: the designation, then the newest epoch (an old primary may know the newest
/// designation without being the one it names), then the more recent report of the same history.
fn standing(candidate: &Followed) -> (u64, Lamport, Lsn) {
    let began = candidate
        .lineage
        .0
        .last()
        .map(|epoch| epoch.lamport)
        .unwrap_or_default();
    (candidate.designation.number, began, candidate.durable.lsn)
}

/// Every primary anybody has heard of.
fn candidates(members: &[Member]) -> impl Iterator<Item = Followed> {
    members
        .iter()
        .filter_map(|member| Some((member.replica, member.status.as_ref()?)))
        .flat_map(|(replica, status)| {
            let leads = matches!(status.role, Role::Primary | Role::Closing);
            let itself = leads.then(|| followed(replica, status));
            itself.into_iter().chain(status.follows.clone())
        })
}

fn counts(wish: &Wish, candidate: &Followed) -> bool {
    let (theirs, known) = (candidate.designation, wish.designation);
    let precedes = |before: ReplicaId| wish.handover && before == candidate.leader;
    match theirs.number.cmp(&known.number) {
        Ordering::Greater => true,
        // A predecessor that closes knows the designation that names its successor.
        Ordering::Equal => {
            let is_named = wish.designated.is_none_or(|id| id == candidate.leader);
            (known.id.is_nil() || theirs.id == known.id) && (is_named || wish.predecessor.is_some_and(precedes))
        }
        Ordering::Less => wish.handover && wish.predecessor.is_none_or(precedes),
    }
}

/// Nobody has heard of the replica to follow: a reachable member whose history goes through the epoch that it is known to have
/// begun, and that nobody else has continued, has a part of its history. That it once wrote the last epoch of a member would
/// prove nothing: it may have gone another way since (P7).
fn written_by_designated(wish: &Wish, members: &[Member]) -> Option<Followed> {
    let (leader, begun) = (
        wish.predecessor.filter(|_| wish.handover).or(wish.designated)?,
        wish.epoch?,
    );
    let written = |member: &&Member| {
        let Some(status) = member.status.as_ref().filter(|_| member.reachable) else {
            return false;
        };
        let mut since = status.lineage.0.iter().skip_while(|epoch| epoch.id != begun).peekable();
        since.peek().is_some() && since.all(|epoch| epoch.origin == leader)
    };
    let status = members
        .iter()
        .filter(written)
        .filter_map(|member| member.status.as_ref());
    let status = status.max_by_key(|status| status.durable.lsn)?;
    Some(Followed {
        leader,
        designation: wish.designation,
        ..followed(leader, status)
    })
}

/// A second primary that answers, whose history parts from the leader's at or beyond our end.
fn rival_fork(own: &ReplicaStatus, leader: &Followed, members: &[Member]) -> Option<(ReplicaId, Fork)> {
    let rivals = members
        .iter()
        .filter(|member| member.reachable && member.replica != leader.leader);
    let forks = rivals.filter_map(|member| {
        let status = member.status.as_ref().filter(|status| status.role == Role::Primary)?;
        match relate((&leader.lineage, leader.durable), (&status.lineage, status.durable)) {
            Relation::Fork(fork) if own.durable.lsn <= fork.at => Some((member.replica, fork)),
            _ => None,
        }
    });
    forks.min_by_key(|(_, fork)| fork.at)
}

enum Source {
    From(ReplicaId),
    Nobody,
    TooOld(String),
}

fn find_source(own: &ReplicaStatus, leader: &Followed, members: &[Member]) -> Source {
    let on_line = |member: &&Member| {
        let Some(status) = &member.status else { return false };
        member.reachable
            && match relate_own(own, (&status.lineage, status.durable)) {
                Relation::Behind { .. } => is_on_line(leader, status),
                // Up to date: keep a stream to the primary open for what comes next.
                Relation::Same | Relation::Ahead { .. } => member.replica == leader.leader,
                Relation::Fork(_) | Relation::Differs { .. } => false,
            }
    };
    let able: Vec<&Member> = members.iter().filter(on_line).collect();
    let start = |member: &Member| member.status.as_ref().map_or(Lsn(u64::MAX), |status| status.log_start);
    let keeps = able.iter().filter(|member| start(member) <= own.durable.lsn);
    if let Some(best) = keeps.min_by_key(|member| (member.avoid, member.replica != leader.leader)) {
        return Source::From(best.replica);
    }
    match able.iter().map(|member| start(member)).min() {
        Some(oldest) => {
            let away = members.iter().filter(|member| !member.reachable).count();
            let at = own.durable.lsn;
            Source::TooOld(format!(
                "its log ends at {at}, the oldest log that any reachable member keeps begins at {oldest} ({away} members \
                 are unreachable): invalidate this replica to copy the data again"
            ))
        }
        None => Source::Nobody,
    }
}

/// Whether everything a member has lies on the leader's history.
fn is_on_line(leader: &Followed, status: &PeerStatus) -> bool {
    match relate((&leader.lineage, leader.durable), (&status.lineage, status.durable)) {
        Relation::Same | Relation::Ahead { .. } => true,
        // It knows more of the leader than we have heard: fine as long as the leader wrote it.
        Relation::Behind { .. } => {
            let known = leader.lineage.0.len();
            status
                .lineage
                .0
                .iter()
                .skip(known)
                .all(|epoch| epoch.origin == leader.leader)
        }
        Relation::Fork(_) | Relation::Differs { .. } => false,
    }
}

/// Why an open fetch ends; the sender is avoided for a while.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The sender said no.
    #[error("the source {0}")]
    Refused(Refused),
    /// The first message was not the proof.
    #[error("the source sent log before proving {at}: refused")]
    Unproven {
        /// The asked position.
        at: Position,
    },
    /// Does not continue the local log.
    #[error("log from {start} does not continue the local log, which ends at {expected}: refused")]
    NotContinuing {
        /// What came.
        start: Position,
        /// What would continue.
        expected: Position,
    },
    /// Does not prove itself.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// More than was asked for.
    #[error("log up to {end} goes beyond the agreed end {until}: refused")]
    Beyond {
        /// What came.
        end: Lsn,
        /// What was asked.
        until: Lsn,
    },
    /// A member goes on in an epoch that the primary's history, as known here, does not have.
    #[error("the source goes on in epoch {epoch}, not known to belong to the primary's history: asking again")]
    ForeignEpoch {
        /// Its id.
        epoch: EpochId,
    },
}

/// An open fetch as the receiver sees it.
#[derive(Debug)]
pub struct FetchSession {
    plan: Plan,
    /// Where the next item must start.
    expected: Position,
    proven: bool,
}

impl FetchSession {
    /// A fetch from the durable end of the local log.
    #[must_use]
    pub fn new(plan: Plan, from: Position) -> Self {
        Self {
            plan,
            expected: from,
            proven: false,
        }
    }

    /// Where the next item must start.
    #[must_use]
    pub fn expected(&self) -> Position {
        self.expected
    }

    /// Whether the agreed end is reached.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.proven && self.plan.until.is_some_and(|until| self.expected.lsn >= until)
    }

    /// Checks an item; the command, if any, goes to the owner in this order.
    ///
    /// # Errors
    /// [`Violation`]: nothing of the item may be used, the stream ends.
    pub fn on_item(&mut self, item: FetchItem) -> Result<Option<Command>, Violation> {
        match item {
            FetchItem::Proven { at } if !self.proven && at == self.expected => {
                self.proven = true;
                Ok(None)
            }
            _ if !self.proven => Err(Violation::Unproven { at: self.expected }),
            FetchItem::Proven { at } => Err(Violation::NotContinuing {
                start: at,
                expected: self.expected,
            }),
            FetchItem::Idle { .. } => Ok(None),
            FetchItem::Epoch(entry) => self.on_epoch(entry).map(Some),
            FetchItem::Records(claim) => {
                let chunk = LogChunk::verify(claim)?;
                self.on_chunk(chunk).map(Some)
            }
        }
    }

    fn on_epoch(&mut self, entry: EpochEntry) -> Result<Command, Violation> {
        if entry.parent != self.expected {
            return Err(Violation::NotContinuing {
                start: entry.parent,
                expected: self.expected,
            });
        }
        let leader = &self.plan.leader;
        let known = leader.lineage.0.iter().any(|epoch| epoch.id == entry.id);
        if !known && entry.origin != leader.leader && self.plan.source != leader.leader {
            return Err(Violation::ForeignEpoch { epoch: entry.id });
        }
        self.expected.epoch = entry.id;
        Ok(Command::AcceptEpoch(entry))
    }

    fn on_chunk(&mut self, chunk: LogChunk) -> Result<Command, Violation> {
        if chunk.start() != self.expected {
            return Err(Violation::NotContinuing {
                start: chunk.start(),
                expected: self.expected,
            });
        }
        if let Some(until) = self.plan.until.filter(|until| chunk.end().lsn > *until) {
            return Err(Violation::Beyond {
                end: chunk.end().lsn,
                until,
            });
        }
        self.expected = chunk.end();
        Ok(Command::AcceptLog(chunk))
    }
}

#[cfg(test)]
#[path = "fetch_tests.rs"]
pub(crate) mod tests;
