//! What a restart may believe and do: pure decisions over saved state and what the log says.
//!
//! Invariants: a role is never resumed from an older slot, after a trailing `Close`, or when a newer designation is known; a log that ends
//! below the dirty end makes the data inconsistent, whatever else is there; nothing durable is ever given up silently.

use crate::api::{DataState, Fault, Resumable};
use crate::lineage::{Cause, EpochEntry, Lineage};
use crate::log::Stop;
use crate::log::scan::Verdict;
use crate::roles::Close;
use crate::state::{SavedRole, SavedState, Waypoint};
use crate::types::{EpochId, Lsn, Position};

/// What the log says, as far as these decisions need it.
#[derive(Debug, Clone)]
pub struct LogFacts {
    /// End of the valid log.
    pub end: Position,
    /// The epochs that its segments name, oldest first.
    pub epochs: Vec<EpochEntry>,
    /// Go on, cut or damaged.
    pub verdict: Verdict,
    /// The `Close` that is the last record.
    pub trailing_close: Option<Close>,
    /// The log leads through exactly the saved dirty end.
    pub dirty_end_proven: bool,
    /// The log leads through exactly the saved waypoint, or did before it was applied.
    pub waypoint_passed: bool,
}

/// How the replica comes up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether the data may be used.
    pub data: DataState,
    /// What replay must pass before it may.
    pub waypoint: Option<Waypoint>,
    /// The role it may be told to resume.
    pub resumable: Option<Resumable>,
    /// With which cause an epoch begins on resumption; `None` = the same epoch goes on.
    pub resume_cause: Option<Cause>,
    /// History up to the end of the log.
    pub lineage: Lineage,
    /// Damage to show, and up to where the log was durable.
    pub defect: Option<(Fault, Lsn)>,
}

/// Decides how a replica comes up.
#[must_use]
pub fn decide(saved: &SavedState, log: &LogFacts, same_boot: bool, fell_back: bool) -> Decision {
    let (lineage, unstarted) = history(saved, log);
    let defect = match &log.verdict {
        Verdict::Defect { stop, durable } => {
            let fault = self::defect(stop);
            Some((fault, *durable))
        }
        Verdict::Continue | Verdict::Cut => None,
    };
    let resume_cause = match (unstarted, &log.verdict) {
        (Some(entry), _) => Some(entry.cause),
        (None, Verdict::Continue) => None,
        (None, Verdict::Cut | Verdict::Defect { .. }) => Some(Cause::Recovery),
    };
    let lost = log.end.lsn < saved.dirty_end.lsn || !log.dirty_end_proven;
    let passed = log.waypoint_passed;
    let (data, waypoint) = match (&saved.data, saved.waypoint) {
        (DataState::Consistent, _) if lost => {
            let at = saved.dirty_end;
            (DataState::LogLost, Some(Waypoint { at, passed: false }))
        }
        (DataState::Consistent, _) => (DataState::Consistent, None),
        (DataState::LogLost, Some(_)) if passed && !lost => (DataState::Consistent, None),
        (other, waypoint) => (other.clone(), waypoint.map(|known| Waypoint { passed, ..known })),
    };
    let resumable = match saved.role {
        SavedRole::Primary { granted }
            if !fell_back
                && defect.is_none()
                && log.trailing_close.is_none()
                && granted == saved.designation
                && data == DataState::Consistent =>
        {
            Some(Resumable {
                designation: granted,
                same_boot,
            })
        }
        SavedRole::Primary { .. } | SavedRole::Secondary => None,
    };
    Decision {
        data,
        waypoint,
        resumable,
        resume_cause,
        lineage,
        defect,
    }
}

/// Damage at `stop`, as it is shown.
#[must_use]
pub fn defect(stop: &Stop) -> Fault {
    Fault::LogDefect {
        segment: stop.segment.to_string(),
        file_offset: stop.file_offset,
        lsn: stop.lsn,
        class: stop.class.to_string(),
    }
}

/// The history up to the end of the log, and the epoch that was granted but never got as far as the log.
fn history(saved: &SavedState, log: &LogFacts) -> (Lineage, Option<EpochEntry>) {
    let mut lineage = saved.lineage.clone();
    for entry in &log.epochs {
        if !lineage.0.iter().any(|known| known.id == entry.id) && entry.id != EpochId::default() {
            // The log went on after the slot was saved: what follows its parent there is superseded.
            let parent = lineage.0.iter().position(|known| known.id == entry.parent.epoch);
            lineage.0.truncate(parent.map_or(0, |parent| parent + 1));
            lineage.push(entry.clone());
        }
    }
    let reached = lineage
        .0
        .iter()
        .position(|entry| entry.id == log.end.epoch)
        .map_or(0, |index| index + 1);
    let unstarted = lineage.0.get(reached).cloned();
    lineage.0.truncate(reached);
    (lineage, unstarted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::{Compression, Durability, Tuning};
    use crate::log::TailClass;
    use crate::store::SegmentName;
    use crate::types::{ClusterId, Designation, Lamport, ReplicaId, ResourceId};
    use uuid::Uuid;

    fn epoch(id: u128, parent: Position) -> EpochEntry {
        let (id, origin) = (EpochId(Uuid::from_u128(id)), ReplicaId(Uuid::from_u128(1)));
        EpochEntry {
            id,
            parent,
            origin,
            cause: Cause::Handover,
            lamport: Lamport(1),
        }
    }

    fn at(epoch: u128, lsn: u64) -> Position {
        Position {
            epoch: EpochId(Uuid::from_u128(epoch)),
            lsn: Lsn(lsn),
            ..Position::default()
        }
    }

    fn saved() -> SavedState {
        let tuning = Tuning {
            durability: Durability::OnFlush,
            compression: Compression::None,
            overlay_budget_bytes: 1 << 20,
            segment_bytes: 1 << 20,
            retention_bytes: 0,
        };
        let mut saved = SavedState::new(
            (ClusterId::default(), ResourceId::default(), ReplicaId::default()),
            Uuid::nil(),
            1 << 20,
            tuning,
        );
        saved.designation = Designation {
            number: 3,
            id: Uuid::from_u128(3),
        };
        saved.role = SavedRole::Primary {
            granted: saved.designation,
        };
        saved.data = DataState::Consistent;
        saved.lineage = Lineage(vec![epoch(1, Position::default())]);
        (saved.applied, saved.dirty_end, saved.durable) = (at(1, 100), at(1, 200), Lsn(300));
        saved
    }

    fn facts(verdict: Verdict) -> LogFacts {
        let epochs = vec![epoch(1, Position::default())];
        LogFacts {
            end: at(1, 400),
            epochs,
            verdict,
            trailing_close: None,
            dirty_end_proven: true,
            waypoint_passed: false,
        }
    }

    #[test]
    fn a_mere_restart_resumes_the_same_epoch_and_a_cut_begins_a_new_one() {
        let decision = decide(&saved(), &facts(Verdict::Continue), true, false);
        assert!(decision.resumable.unwrap().same_boot);
        assert_eq!((decision.resume_cause, decision.data), (None, DataState::Consistent));
        let decision = decide(&saved(), &facts(Verdict::Cut), false, false);
        assert!(!decision.resumable.unwrap().same_boot);
        assert_eq!(decision.resume_cause, Some(Cause::Recovery));
    }

    #[test]
    fn the_role_is_not_resumed_from_an_older_slot_after_a_close_or_when_a_newer_designation_is_known() {
        assert_eq!(decide(&saved(), &facts(Verdict::Continue), true, true).resumable, None);
        let close = Close {
            to: None,
            designation: saved().designation,
        };
        let closed = LogFacts {
            trailing_close: Some(close),
            ..facts(Verdict::Continue)
        };
        assert_eq!(decide(&saved(), &closed, true, false).resumable, None);
        let newer = SavedState {
            designation: Designation {
                number: 4,
                id: Uuid::from_u128(4),
            },
            ..saved()
        };
        assert_eq!(decide(&newer, &facts(Verdict::Continue), true, false).resumable, None);
    }

    #[test]
    fn a_log_that_ends_below_the_dirty_end_makes_the_data_inconsistent() {
        let short = LogFacts {
            end: at(1, 150),
            dirty_end_proven: false,
            ..facts(Verdict::Cut)
        };
        let decision = decide(&saved(), &short, true, false);
        assert_eq!((decision.data, decision.resumable), (DataState::LogLost, None));
        let elsewhere = LogFacts {
            dirty_end_proven: false,
            ..facts(Verdict::Cut)
        };
        assert_eq!(decide(&saved(), &elsewhere, true, false).data, DataState::LogLost);
    }

    #[test]
    fn a15_damage_below_the_durable_end_is_named_and_never_resumed() {
        let name = SegmentName { number: 7, origin: 1 };
        let stop = Stop {
            segment: name,
            file_offset: 4096,
            lsn: Lsn(250),
            class: TailClass::Digest,
            ended: false,
        };
        let damaged = LogFacts {
            end: at(1, 250),
            ..facts(Verdict::Defect {
                stop,
                durable: Lsn(300),
            })
        };
        let decision = decide(&saved(), &damaged, true, false);
        let Some((Fault::LogDefect { lsn, .. }, durable)) = decision.defect else {
            panic!("no defect")
        };
        assert_eq!((lsn, durable, decision.resumable), (Lsn(250), Lsn(300), None));
    }

    #[test]
    fn an_epoch_that_never_reached_the_log_is_begun_anew() {
        let mut saved = saved();
        saved.lineage.0.push(EpochEntry {
            cause: Cause::Failover,
            ..epoch(2, at(1, 400))
        });
        let decision = decide(&saved, &facts(Verdict::Continue), true, false);
        assert_eq!(
            (decision.lineage.0.len(), decision.resume_cause),
            (1, Some(Cause::Failover))
        );
    }

    #[test]
    fn epochs_that_the_slot_does_not_know_come_from_the_segments() {
        let mut log = facts(Verdict::Continue);
        log.epochs.push(epoch(5, at(1, 350)));
        log.end = at(5, 400);
        let decision = decide(&saved(), &log, true, false);
        assert_eq!(decision.lineage.0.last().unwrap().id, log.end.epoch);
    }
}
