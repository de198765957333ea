//! Log files: one is always prepared ahead, and the oldest go when nobody needs them.
//!
//! Invariants: see [`retention`]. A member that is given up is recorded as an orphan in a slot before log that it
//! needs goes; the extents that a segment touched are on stable storage before the segment goes. A file that was a segment becomes another one
//! only after its old name is gone for good and nobody reads it; at most [`MAX_SPARES`] wait for that.

use super::retry::Retry;
use super::saver::Generation;
use super::{Owner, Purpose};
use crate::api::{CommandId, Fault, Role};
use crate::jobs::Job;
use crate::log::{Stop, TailClass};
use crate::recovery;
use crate::retention::{self, Closed};
use crate::state::{SavedMember, SavedRole};
use crate::store::{FileId, SegmentName, Store};
use crate::types::{Lsn, Position, ReplicaId};
use std::io;
use std::time::Duration;

/// Most files that wait to become segments again, beside the one that is prepared: the log is written once as long as segments come and go at the
/// same pace, and an idle replica does not sit on the space.
const MAX_SPARES: usize = 2;

/// Segments on their way out.
#[derive(Debug)]
pub(super) struct Retire {
    /// Where the newest of them ended.
    end: Lsn,
    /// Those whose files are kept.
    spares: Vec<Spare>,
}

/// A file that waits to become a segment.
#[derive(Debug, Clone, Copy)]
struct Spare {
    /// The segment that it was.
    name: SegmentName,
    bytes: u64,
}

/// A summary that outlives its segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kept {
    pub(super) name: SegmentName,
    pub(super) end: Lsn,
}

/// The state of preparing and retiring.
#[derive(Debug, Default)]
pub(super) struct Segments {
    /// Writers or members wait for a segment.
    urgent: bool,
    retry: Retry,
    /// Something changed that retention depends on.
    look: bool,
    retiring: bool,
    retire_retry: Retry,
    /// Orphans are being recorded before segments go.
    recording: Option<Generation>,
    summaries: Vec<Kept>,
    spares: Vec<Spare>,
}

impl Segments {
    pub(super) fn new(summaries: Vec<Kept>) -> Self {
        Segments {
            summaries,
            look: true,
            ..Segments::default()
        }
    }

    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        [self.retry.deadline(now), self.retire_retry.deadline(now)]
            .into_iter()
            .flatten()
            .min()
    }

    pub(super) fn look_again(&mut self) {
        self.look = true;
    }

    /// Length of all files that wait to become segments (bytes).
    pub(super) fn spare_bytes(&self) -> u64 {
        self.spares.iter().map(|spare| spare.bytes).sum()
    }
}

impl<S: Store> Owner<S> {
    /// Appending cannot go on without a new segment.
    pub(super) fn want_segment(&mut self) {
        if !self.segments.urgent {
            self.segments.urgent = true;
            self.moved = true;
        }
    }

    pub(super) fn step_segments(&mut self) {
        let unfit = self.log.take_unfit().into_iter().map(FileId::Segment);
        self.discarded.extend(unfit);
        let may_prepare = !self.is_shut_down && self.repair.is_none() && self.segments.retry.ready(self.now.mono);
        if may_prepare && let Some(name) = self.log.next_prepared() {
            let len = self.saved.tuning.segment_bytes.max(self.log.least_bytes());
            let id = FileId::Segment(name);
            let spare = self.take_spare(len);
            self.job(Purpose::Prepare { name, bytes: len }, Job::Create { id, len, spare });
        }
        if self.segments.look && !self.segments.retiring && self.segments.retire_retry.ready(self.now.mono) {
            self.segments.look = false;
            self.retire();
        }
    }

    /// A spare of this length; others are of no use any more.
    fn take_spare(&mut self, bytes: u64) -> Option<SegmentName> {
        let others = self.segments.spares.extract_if(.., |spare| spare.bytes != bytes);
        self.discarded.extend(others.map(|spare| FileId::Spare(spare.name)));
        self.segments.spares.pop().map(|spare| spare.name)
    }

    pub(super) fn segment_prepared(&mut self, name: SegmentName, bytes: u64, result: io::Result<S::File>) {
        match result {
            Ok(file) => {
                self.segments.urgent = false;
                self.segments.retry.succeeded();
                if !self.log.add_prepared(name, file, bytes) {
                    self.discarded.push(FileId::Segment(name));
                }
                if self.repair.is_none() {
                    self.changed |= self.faults.clear(|fault| matches!(fault, Fault::LogStoreFailed { .. }));
                }
            }
            Err(error) => {
                tracing::error!(replica = %self.replica, %name, %error, "creating a log segment failed");
                if self.segments.urgent {
                    let message = format!("creating {name}: {error}; writers wait");
                    self.changed |= self.faults.set(Fault::LogStoreFailed { message });
                }
                self.log.prepare_failed(name);
                self.segments.retry.failed(self.now.mono, &mut self.rng);
            }
        }
        self.moved = true;
    }

    pub(super) fn set_members(&mut self, id: CommandId, members: &[ReplicaId]) {
        let known = std::mem::take(&mut self.saved.members);
        let members = members
            .iter()
            .filter(|member| **member != self.replica)
            .map(|&replica| {
                let known = known.iter().find(|member| member.replica == replica).copied();
                known.unwrap_or(SavedMember {
                    replica,
                    durable: None,
                    orphaned: false,
                })
            });
        self.saved.members = members.collect();
        let generation = self.save(|_| {});
        self.segments.look_again();
        self.done_when_saved(id, generation);
    }

    /// A report counts as far as it lies on our history. It is saved with the next slot: an older one only keeps more log.
    pub(super) fn peer_report(&mut self, id: CommandId, peer: ReplicaId, durable: Position) {
        self.hear_evidence(durable);
        let start = self.log.segments().first().map_or(Lsn::ZERO, |first| first.start.lsn);
        if let Some(end) = self.common_end(durable)
            && let Some(member) = self.saved.members.iter_mut().find(|member| member.replica == peer)
        {
            member.durable = Some(end);
            member.orphaned &= end.lsn < start;
            self.segments.look_again();
            self.changed = true;
        }
        self.done(id);
    }

    /// A member that has more of an epoch than the one who wrote it proves that durable log is lost here: only durable bytes are
    /// ever shipped. Such a replica does not resume its role; it fetches what is missing.
    fn hear_evidence(&mut self, reported: Position) {
        let end = self.log.appended();
        let wrote_it = self
            .saved
            .lineage
            .0
            .last()
            .is_some_and(|entry| entry.origin == self.replica);
        if self.role != Role::Secondary || !wrote_it || reported.epoch != end.epoch || reported.lsn <= end.lsn {
            return;
        }
        let segment = self
            .log
            .segments()
            .last()
            .map_or_else(String::new, |last| last.name.to_string());
        let fault = Fault::LogDefect {
            segment,
            file_offset: 0,
            lsn: end.lsn,
            class: TailClass::Truncated.to_string(),
        };
        tracing::error!(replica = %self.replica, %reported, %end, "a member has durable log that is lost here");
        self.faults.set(fault);
        self.defect_until = Some(reported.lsn);
        self.resumable = None;
        self.save(|saved| {
            saved.durable = saved.durable.max(reported.lsn);
            saved.role = SavedRole::Secondary;
        });
    }

    /// A server of log has come to a bad record. What is loaded is in the data disk, or is on its way there from memory: then only others
    /// miss it. Else replay will stop there, too.
    pub(super) fn served_defect(&mut self, id: CommandId, stop: &Stop) {
        let is_ours = self.log.segments().iter().any(|segment| segment.name == stop.segment);
        if is_ours && stop.lsn < self.log.durable().lsn {
            let fault = if stop.lsn < self.replay.cursor().lsn {
                Fault::BacklogDefect {
                    segment: stop.segment.to_string(),
                    file_offset: stop.file_offset,
                    lsn: stop.lsn,
                    class: stop.class.to_string(),
                }
            } else {
                recovery::defect(stop)
            };
            if self.faults.set(fault) {
                tracing::error!(replica = %self.replica, ?stop, "log that a member asked for is damaged here: it is not shipped");
                self.changed = true;
            }
        }
        self.done(id);
    }

    /// Damage that has left the log with its segment is over.
    fn forget_backlog_defect(&mut self) {
        let segments = self.log.segments();
        self.changed |= self.faults.clear(|fault| match fault {
            Fault::BacklogDefect { segment, .. } => !segments.iter().any(|kept| kept.name.to_string() == *segment),
            _ => false,
        });
    }

    /// The part of a reported position that lies on our history; `None`: its epoch is unknown here.
    fn common_end(&self, reported: Position) -> Option<Position> {
        if reported == Position::default() {
            return Some(reported);
        }
        let lineage = &self.saved.lineage.0;
        let index = lineage.iter().position(|entry| entry.id == reported.epoch)?;
        match lineage.get(index + 1) {
            Some(next) if next.parent.lsn < reported.lsn => Some(next.parent),
            _ => Some(reported),
        }
    }

    fn retire(&mut self) {
        let segments = self.log.segments();
        let starts = segments.iter().skip(1).map(|next| next.start.lsn);
        let closed: Vec<Closed> = segments
            .iter()
            .zip(starts)
            .map(|(segment, end)| Closed {
                end,
                bytes: segment.file_bytes,
            })
            .collect();
        let (applied, budget) = (self.saver.applied_in_both(), self.saved.tuning.retention_bytes);
        let plan = retention::plan(&closed, applied, &self.saved.members, self.content_bytes(), budget);
        if !plan.orphans.is_empty() {
            tracing::warn!(replica = %self.replica, orphans = ?plan.orphans, "log kept for absent members exceeds the retention budget: given up");
            let generation = self.save(|saved| {
                for member in &mut saved.members {
                    member.orphaned |= plan.orphans.contains(&member.replica);
                }
            });
            self.segments.recording = Some(generation);
            return;
        }
        if self
            .segments
            .recording
            .is_some_and(|generation| !self.saver.is_durable(generation))
        {
            return;
        }
        self.segments.recording = None;
        let view = self.served_log();
        let end = plan.segments.checked_sub(1).map_or(Lsn::ZERO, |last| closed[last].end);
        let gone = self.log.forget_segments_below(end);
        assert!(
            gone.iter()
                .eq(view.segments[..gone.len()].iter().map(|segment| &segment.name)),
            "the oldest segments go"
        );
        self.forget_backlog_defect();
        for (name, closed) in gone.iter().zip(&closed) {
            self.segments.summaries.push(Kept {
                name: *name,
                end: closed.end,
            });
        }
        let summaries = self.passed_summaries();
        if gone.is_empty() && summaries.is_empty() {
            return;
        }
        let spares = self.choose_spares(&gone, &closed);
        let names = spares.iter().map(|spare| spare.name).collect();
        self.segments.retiring = true;
        self.changed = true;
        self.job(
            Purpose::Retire(Retire { end, spares }),
            Job::Retire {
                view,
                segments: gone.len(),
                spares: names,
                summaries,
            },
        );
    }

    /// Which files of the segments that go are worth keeping.
    fn choose_spares(&self, gone: &[SegmentName], closed: &[Closed]) -> Vec<Spare> {
        let room = MAX_SPARES.saturating_sub(self.segments.spares.len());
        let files = gone.iter().zip(closed).map(|(name, closed)| Spare {
            name: *name,
            bytes: closed.bytes,
        });
        files
            .filter(|spare| spare.bytes == self.saved.tuning.segment_bytes)
            .take(room)
            .collect()
    }

    /// Summaries that all members have passed.
    fn passed_summaries(&mut self) -> Vec<SegmentName> {
        let passed = self
            .saved
            .members
            .iter()
            .map(|member| member.durable.map_or(Lsn::ZERO, |durable| durable.lsn))
            .min();
        let passed = passed.unwrap_or(self.saved.applied.lsn);
        let (gone, kept) = std::mem::take(&mut self.segments.summaries)
            .into_iter()
            .partition(|kept| kept.end <= passed);
        self.segments.summaries = kept;
        let gone: Vec<Kept> = gone;
        gone.into_iter().map(|kept| kept.name).collect()
    }

    pub(super) fn segments_retired(&mut self, retire: Retire, result: io::Result<()>) {
        self.segments.retiring = false;
        if let Err(error) = result {
            // The files are out of the log already; the next start removes what is left of them.
            tracing::warn!(replica = %self.replica, up_to = %retire.end, %error, "removing old log segments failed");
            self.segments.retire_retry.failed(self.now.mono, &mut self.rng);
        } else {
            self.segments.retire_retry.succeeded();
            self.segments.spares.extend(retire.spares);
            self.segments.look = true;
        }
        self.changed = true;
    }
}
