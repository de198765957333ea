//! The target of a sync: compares its data disk with a source's, region by region, and takes over what differs, while the
//! source goes on being written.
//!
//! Why the result is right: the log of the target begins at the source's applied position `start`, and every block is
//! read from the source's data disk after that. A block can only differ from the state at `start` by records after `start`,
//! and by none later than the source's `dirty_end` read after the last block (P11 on the source). Replaying the log from
//! `start` over whatever mixture was copied therefore ends, at `dirty_end`, in exactly the primary's state there.
//!
//! Invariants: the target stays not consistent until `FinishSync`, and the owner until replay has passed `dirty_end` (P5,
//! A-31); a block counts as done only when its write was acknowledged, and survives a restart only when a checkpoint has flushed it;
//! memory is bounded by [`MAX_SPANS`] and [`MAX_TRANSFERS`].

use crate::api::{Command, DataState, ReplicaStatus};
use crate::replication::digest::{REGION_BYTES, SPAN_BYTES, regions};
use crate::replication::fetch::{Leader, Member, Wish, find_leader};
use crate::replication::histories::{Relation, prefix, relate};
use crate::replication::messages::{BlockRun, RegionDigest, SyncEnd, SyncOffer};
use crate::types::{ByteRange, ReplicaId};
use std::collections::{BTreeMap, VecDeque};

/// Spans compared or being copied at a time.
pub const MAX_SPANS: usize = 4;
/// Transfers (of at most [`TRANSFER_REGIONS`] regions) under way at a time.
pub const MAX_TRANSFERS: usize = 8;
/// Regions per transfer.
pub const TRANSFER_REGIONS: usize = 4;
/// A checkpoint is taken whenever so many more bytes are done.
pub const CHECKPOINT_BYTES: u64 = 256 << 20;

/// Whether this replica needs to copy, and from whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SyncNeed {
    /// Nothing to copy: consistent, or waiting for replay only.
    None,
    /// The switch is off.
    Paused,
    /// Needed, but nobody can be copied from now.
    NoSource,
    /// Copy from this member.
    From(ReplicaId),
}

/// Decides whether to copy and from whom: the primary if possible, else a consistent member on its history.
///
/// `log_stuck`: the fetch decision says that the local log can never be continued (fork or too old); a copy that waits for replay
/// is then worth nothing and starts anew.
#[must_use]
pub fn sync_need(own: &ReplicaStatus, wish: &Wish, members: &[Member], log_stuck: bool) -> SyncNeed {
    if own.data != DataState::Syncing {
        return SyncNeed::None;
    }
    if own.sync.is_some_and(|sync| sync.consistent_at.is_some()) && !log_stuck {
        return SyncNeed::None;
    }
    if !own.switches.sync {
        return SyncNeed::Paused;
    }
    let Leader::Found(leader) = find_leader(wish, members) else {
        return SyncNeed::NoSource;
    };
    let usable = members.iter().filter(|member| {
        let Some(status) = &member.status else { return false };
        member.reachable && status.data == DataState::Consistent && !status.lineage.0.is_empty() && {
            let relation = relate((&leader.lineage, leader.durable), (&status.lineage, status.durable));
            member.replica == leader.leader || matches!(relation, Relation::Same | Relation::Ahead { .. })
        }
    });
    let best = usable.min_by_key(|member| (member.avoid, member.replica != leader.leader));
    best.map_or(SyncNeed::NoSource, |member| SyncNeed::From(member.replica))
}

/// What to tell the owner before a session with `source`; afterwards its status says where the copy goes on.
///
/// The owner keeps the blocks already copied when the source's history, and the log that the source still has, make that right.
#[must_use]
pub fn begin(source: ReplicaId, offer: &SyncOffer) -> Command {
    Command::BeginSync {
        source,
        start: offer.applied,
        lineage: prefix(&offer.lineage, offer.applied),
        size_bytes: offer.size_bytes,
        log_start: offer.log_start,
    }
}

/// Where a copy goes on according to the owner (device offset, bytes); `None` when no copy is under way.
#[must_use]
pub fn resume_point(own: &ReplicaStatus) -> Option<u64> {
    let sync = own
        .sync
        .filter(|sync| own.data == DataState::Syncing && sync.consistent_at.is_none())?;
    Some(sync.done_bytes - sync.done_bytes % REGION_BYTES)
}

/// Identifies work under way.
pub type TaskId = u64;

/// What the driver has to do next. Several may be under way at a time.
#[derive(Debug)]
pub enum Step {
    /// Get the digests of `span` from the source and from the local disk, then call `on_digests`.
    Compare {
        /// Names it.
        task: TaskId,
        /// What to compare.
        span: ByteRange,
    },
    /// Get the blocks of these regions that differ, give `writes_of` them to the owner, then call `on_done`.
    Transfer {
        /// Names it.
        task: TaskId,
        /// The regions, and whether the local ones hold anything but zeros (then digests of their blocks are worth sending).
        regions: Vec<(ByteRange, bool)>,
    },
    /// Make a range zero (a `SyncWrite` without data), then call `on_done`.
    Zero {
        /// Names it.
        task: TaskId,
        /// What is zero at the source and not here.
        range: ByteRange,
    },
    /// Give `SyncCheckpoint` to the owner, then call `on_checkpoint`.
    Checkpoint {
        /// Everything below is written (bytes).
        done_bytes: u64,
    },
    /// Everything is copied and flushed: ask the source for its dirty end, then call `on_end`.
    End,
    /// Give this to the owner: the session is over.
    Finish(Command),
}

/// The source's or our own answer did not fit the question.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{side} answered {got} region digests for a span of {wanted}: the session is opened anew")]
pub struct WrongDigests {
    /// Who.
    pub side: &'static str,
    /// How many came.
    pub got: usize,
    /// How many there should be.
    pub wanted: usize,
}

/// A sync session on its target.
#[derive(Debug)]
pub struct SyncTarget {
    total_bytes: u64,
    /// Compared, or being compared, up to here.
    next_bytes: u64,
    /// Done without a gap up to here.
    done_bytes: u64,
    /// Where this session began.
    began_bytes: u64,
    /// Done and flushed up to here; `None` before the first checkpoint of this session.
    saved_bytes: Option<u64>,
    checkpoint_runs: bool,
    end: EndState,
    /// By device offset: end of the span and how many tasks of it are open.
    spans: BTreeMap<u64, OpenSpan>,
    tasks: BTreeMap<TaskId, Task>,
    waiting: VecDeque<Step>,
    transfers: usize,
    last_task: TaskId,
}

#[derive(Debug)]
struct OpenSpan {
    end: u64,
    tasks: usize,
}

#[derive(Debug)]
struct Task {
    span: u64,
    is_compare: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum EndState {
    Copying,
    Asked,
    Known(SyncEnd),
    Finished,
}

impl SyncTarget {
    /// A session over a device of `total_bytes` that goes on at `from_bytes`.
    ///
    /// # Panics
    /// When `from_bytes` is neither a region boundary nor the end.
    #[must_use]
    pub fn new(total_bytes: u64, from_bytes: u64) -> Self {
        let from_bytes = from_bytes.min(total_bytes);
        assert!(
            from_bytes.is_multiple_of(REGION_BYTES) || from_bytes == total_bytes,
            "a sync resumes at a region boundary"
        );
        Self {
            total_bytes,
            next_bytes: from_bytes,
            done_bytes: from_bytes,
            began_bytes: from_bytes,
            saved_bytes: None,
            checkpoint_runs: false,
            end: EndState::Copying,
            spans: BTreeMap::new(),
            tasks: BTreeMap::new(),
            waiting: VecDeque::new(),
            transfers: 0,
            last_task: 0,
        }
    }

    /// Done without a gap (bytes).
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Whether `FinishSync` has been handed out.
    #[must_use]
    pub fn finished(&self) -> bool {
        self.end == EndState::Finished
    }

    /// The next thing to do; `None` while enough is under way.
    pub fn next_step(&mut self) -> Option<Step> {
        // A checkpoint flushes everything that was written: no write may be under way beside it.
        let due = self.checkpoint_is_due();
        if due && self.transfers == 0 && !self.checkpoint_runs {
            self.checkpoint_runs = true;
            return Some(Step::Checkpoint {
                done_bytes: self.done_bytes,
            });
        }
        if !due
            && self.transfers < MAX_TRANSFERS
            && let Some(step) = self.waiting.pop_front()
        {
            self.transfers += 1;
            return Some(step);
        }
        if self.next_bytes < self.total_bytes && self.spans.len() < MAX_SPANS {
            let span = ByteRange {
                offset: self.next_bytes,
                len: SPAN_BYTES.min(self.total_bytes - self.next_bytes),
            };
            self.next_bytes = span.end();
            self.spans.insert(
                span.offset,
                OpenSpan {
                    end: span.end(),
                    tasks: 0,
                },
            );
            let task = self.open_task(span.offset, true);
            return Some(Step::Compare { task, span });
        }
        self.ending()
    }

    fn checkpoint_is_due(&self) -> bool {
        let saved = self.saved_bytes.unwrap_or(self.began_bytes);
        let complete = self.done_bytes == self.total_bytes && self.saved_bytes != Some(self.total_bytes);
        self.checkpoint_runs || complete || self.done_bytes - saved >= CHECKPOINT_BYTES
    }

    fn ending(&mut self) -> Option<Step> {
        match self.end {
            EndState::Copying if self.saved_bytes == Some(self.total_bytes) => {
                self.end = EndState::Asked;
                Some(Step::End)
            }
            EndState::Known(SyncEnd { dirty_end, .. }) => {
                self.end = EndState::Finished;
                Some(Step::Finish(Command::FinishSync { dirty_end }))
            }
            _ => None,
        }
    }

    fn open_task(&mut self, span: u64, is_compare: bool) -> TaskId {
        self.last_task += 1;
        self.tasks.insert(self.last_task, Task { span, is_compare });
        let open = self.spans.get_mut(&span).expect("a task belongs to an open span");
        open.tasks += 1;
        self.last_task
    }

    /// Both digests of a `Compare`, in region order.
    ///
    /// # Errors
    /// [`WrongDigests`]: the session is worth nothing.
    ///
    /// # Panics
    /// When the task is not known.
    pub fn on_digests(
        &mut self,
        task: TaskId,
        remote: &[RegionDigest],
        local: &[RegionDigest],
    ) -> Result<(), WrongDigests> {
        let offset = self.tasks.get(&task).expect("a known task").span;
        let span = ByteRange {
            offset,
            len: self.spans[&offset].end - offset,
        };
        let wanted: Vec<ByteRange> = regions(span).collect();
        for (side, digests) in [("the source", remote), ("the local disk", local)] {
            if digests.len() != wanted.len() {
                return Err(WrongDigests {
                    side,
                    got: digests.len(),
                    wanted: wanted.len(),
                });
            }
        }
        let mut copy: Vec<(ByteRange, bool)> = Vec::new();
        let mut zero: Option<ByteRange> = None;
        for ((region, theirs), ours) in wanted.into_iter().zip(remote).zip(local) {
            match (theirs, ours) {
                (theirs, ours) if theirs == ours => {}
                (RegionDigest::Hash(_), ours) => copy.push((region, *ours != RegionDigest::Zero)),
                (RegionDigest::Zero, _) => match &mut zero {
                    Some(run) if run.end() == region.offset => run.len += region.len,
                    _ => {
                        let before = zero.replace(region);
                        self.queue_zero(offset, before);
                    }
                },
            }
        }
        self.queue_zero(offset, zero);
        for group in copy.chunks(TRANSFER_REGIONS) {
            let task = self.open_task(offset, false);
            self.waiting.push_back(Step::Transfer {
                task,
                regions: group.to_vec(),
            });
        }
        self.on_done(task);
        Ok(())
    }

    fn queue_zero(&mut self, span: u64, range: Option<ByteRange>) {
        if let Some(range) = range {
            let task = self.open_task(span, false);
            self.waiting.push_back(Step::Zero { task, range });
        }
    }

    /// A `Transfer` or `Zero` is complete: the owner has acknowledged all its writes.
    ///
    /// # Panics
    /// When the task is not known.
    pub fn on_done(&mut self, task: TaskId) {
        let Task { span, is_compare } = self.tasks.remove(&task).expect("a task ends once");
        if !is_compare {
            self.transfers -= 1;
        }
        let open = self.spans.get_mut(&span).expect("a task belongs to an open span");
        open.tasks -= 1;
        while let Some(entry) = self.spans.first_entry()
            && entry.get().tasks == 0
        {
            self.done_bytes = entry.remove().end;
        }
    }

    /// The checkpoint at `done_bytes` is durable.
    pub fn on_checkpoint(&mut self, done_bytes: u64) {
        self.checkpoint_runs = false;
        self.saved_bytes = Some(done_bytes);
    }

    /// The source has answered `End`.
    pub fn on_end(&mut self, end: SyncEnd) {
        self.end = EndState::Known(end);
    }
}

/// The writes that a reply to a `Transfer` asks for; refuses runs outside the asked regions.
///
/// # Errors
/// The offending range.
pub fn writes_of(regions: &[(ByteRange, bool)], runs: Vec<BlockRun>) -> Result<Vec<Command>, ByteRange> {
    let inside = |range: ByteRange| {
        range.offset.checked_add(range.len).is_some_and(|end| {
            regions
                .iter()
                .any(|(region, _)| range.offset >= region.offset && end <= region.end())
        })
    };
    let to_write = |BlockRun { range, data }| {
        let fits = data.as_ref().is_none_or(|data| data.len() as u64 == range.len);
        if range.len == 0 || !fits || !inside(range) {
            return Err(range);
        }
        Ok(Command::SyncWrite { range, data })
    };
    runs.into_iter().map(to_write).collect()
}

#[cfg(test)]
#[path = "sync_tests.rs"]
mod tests;
