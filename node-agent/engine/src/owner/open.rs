//! Opening a replica: slots, log, data disk; then what a restart may believe and do.
//!
//! Opening only reads (a replica that joins now apart, whose slots are made). What is to be written – the unproven tail into a new
//! segment – is left as a repair, which the owner does before it applies anything or completes a flush.
//!
//! Invariants: nothing absent is created for a replica that was there before (P12); nothing unproven counts as durable (P6).

use super::restart::blank_epoch;
use super::segments::{Kept, Segments};
use super::{Owner, commit, exchange, flight, inbound, replay, saver, submit, sync};
use crate::api::{DataState, Now, Released, Role, Tuning};
use crate::brick::Disk;
use crate::clock::LamportClock;
use crate::format::record::{Record, RecordKind};
use crate::format::segment::LogIdentity;
use crate::log::LogWriter;
use crate::log::scan::{Scan, ScanError, ScanParams, Verdict, scan};
use crate::log::writer::LogState;
use crate::overlay::Overlay;
use crate::recovery::{self, LogFacts};
use crate::roles::Close;
use crate::slot::{Loaded, SLOT_BYTES, SlotError, Slots};
use crate::state::{SavedRole, SavedState, Waypoint};
use crate::store::{FileId, SegmentName, Store};
use crate::summary::Summary;
use crate::types::{ClusterId, Lamport, Lsn, Position, ReplicaId, ResourceId};
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use uuid::Uuid;

/// What `open` must know about the replica.
#[derive(Debug, Clone, Copy)]
pub struct OpenParams {
    /// The cluster; must match what is saved.
    pub cluster: ClusterId,
    /// The resource; must match what is saved.
    pub resource: ResourceId,
    /// The incarnation; must match what is saved.
    pub replica: ReplicaId,
    /// Identity of this boot of the node (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: Uuid,
    /// `Some(size in bytes)` only for a replica that joins now and has never held data: its slots are created. `None` for a
    /// known replica: if its slots or log are gone that is [`OpenError::DataMissing`], never a reason to create them.
    pub create: Option<u64>,
    /// Durability, compression, budgets of a replica that joins now; later what was last set with `SetTuning` counts.
    pub tuning: Tuning,
    /// Seed of the owner's random numbers (epoch ids, jitter), from the operating system's randomness.
    pub seed: [u8; 32],
}

/// Why a replica was not opened. Nothing was changed on any disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A known replica without its slots or segments.
    #[error(
        "{what} is missing although this replica has held data: check that the right file system is mounted; nothing was created"
    )]
    DataMissing {
        /// Which file.
        what: String,
    },
    /// Slots, segments or the data disk belong to somebody else, or are damaged in a way that must be looked at.
    #[error("{what}: refused, nothing was changed")]
    Refused {
        /// What and why.
        what: String,
    },
    /// The machine failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> OpenError {
    let what = what.into();
    move |source| OpenError::Io { what, source }
}

/// The log as it was found.
struct Found {
    state: LogState,
    facts: LogFacts,
    /// Files to be removed once the tail is rewritten.
    stale: Vec<SegmentName>,
    last_record: Option<Record>,
}

impl<S: Store> Owner<S> {
    /// Opens a replica and recovers it: reads slots and log, decides what it may do. Blocks on file I/O for as long as
    /// reading the log from the applied position takes; call it on a pool thread.
    ///
    /// The replica comes up as `Secondary`; when it was primary before, `status().resumable` says so.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(store: S, params: OpenParams, now: Now) -> Result<Self, OpenError> {
        let data: Disk = Arc::new(open_data(&store)?);
        let disk_bytes = data.size().map_err(io_error("size of the data disk"))?;
        let (slots, saved, fell_back) = open_slots(&store, &params)?;
        check_identity(&saved, &params, disk_bytes)?;
        let same_boot = saved.boot_id == params.boot_id;
        let identity = LogIdentity {
            cluster: params.cluster,
            resource: params.resource,
            replica: params.replica,
        };
        let found = open_log(&store, identity, &saved, same_boot)?;
        let (summaries, spares) = beside_the_log(&store)?;
        let Found {
            state,
            facts,
            stale,
            last_record,
        } = found;
        let mut owner = Self::assemble(store, &params, now, (data, disk_bytes), (slots, saved), state);
        owner.stale = stale;
        // Whatever a crash has left them as: they are made anew.
        owner.discarded = spares;
        owner.segments = Segments::new(summaries);
        owner.decide(&facts, last_record.as_ref(), same_boot, fell_back);
        owner.pump();
        Ok(owner.first_status())
    }

    fn assemble(
        store: S,
        params: &OpenParams,
        now: Now,
        (data, disk_bytes): (Disk, u64),
        (slots, saved): (Slots<S, SavedState>, SavedState),
        log: LogState,
    ) -> Self {
        let (identity, durable) = (log.identity, log.durable);
        let log = LogWriter::new(log, saved.tuning.compression);
        let mut owner = Owner {
            store,
            now,
            clock: saved_clock(&saved, now),
            rng: StdRng::from_seed(params.seed),
            replica: params.replica,
            identity,
            boot_id: params.boot_id,
            data,
            disk_bytes,
            role: Role::Secondary,
            resumable: None,
            resume_cause: None,
            log,
            tail: VecDeque::new(),
            durable_time: saved.applied_time,
            overlay: Overlay::default(),
            replay: replay::Replay::new(saved.applied, saved.applied_time, saved.size_bytes),
            saved,
            saver: saver::Saver::default(),
            slots,
            saved_waiters: VecDeque::new(),
            requests: submit::Requests::default(),
            commit: commit::Commit::default(),
            repair: None,
            flight: flight::Flight::default(),
            inbound: inbound::Inbound::default(),
            operation: None,
            sync: sync::Target::default(),
            exchange: exchange::Exchange::default(),
            segments: Segments::default(),
            faults: super::faults::Faults::default(),
            defect_until: None,
            trailing_close: None,
            discarded: Vec::new(),
            stale: Vec::new(),
            is_shut_down: false,
            jobs: BTreeMap::new(),
            next_job: 1,
            actions: VecDeque::new(),
            changed: true,
            moved: false,
            status: super::publish::blank_status(),
            view: crate::api::LogView::default(),
        };
        owner.commit.settled_at(durable.lsn);
        owner
    }

    /// Takes over what follows from the log.
    fn decide(&mut self, facts: &LogFacts, last_record: Option<&Record>, same_boot: bool, fell_back: bool) {
        let decision = recovery::decide(&self.saved, facts, same_boot, fell_back);
        if let Some(record) = last_record {
            self.durable_time = self.durable_time.max(record.header.lamport);
            // A stamp of our own log, made under the same rules: it is seen whatever the wall clock says now.
            self.clock = LamportClock::new(self.clock.last().max(record.header.lamport));
        }
        if facts.end.lsn <= self.saved.applied.lsn {
            // What was applied beyond is told by the dirty end; replay goes on from where the log is, in the epoch that is there.
            self.saved.applied = facts.end;
        }
        self.replay = replay::Replay::new(self.saved.applied, self.saved.applied_time, self.saved.size_bytes);
        self.saved.data = decision.data;
        self.saved.waypoint = decision.waypoint;
        if self.saved.data == DataState::Syncing && facts.end.lsn < self.saved.dirty_end.lsn {
            (self.saved.sync, self.saved.waypoint) = (None, None);
        }
        self.saved.lineage = decision.lineage;
        self.resumable = decision.resumable;
        self.resume_cause = decision.resume_cause;
        self.trailing_close = facts.trailing_close;
        self.close_found(facts.end);
        self.release_if_durable();
        // The role in the slot stays until a `Close` found in an unproven tail is durable: should power fail before, that `Close` was never
        // told to anybody, and the role goes on.
        if self.resumable.is_none() && self.trailing_close.is_none() {
            self.saved.role = SavedRole::Secondary;
        }
        if let Some((fault, until)) = decision.defect {
            tracing::error!(replica = %self.replica, ?fault, %until, "the log is damaged below what was durable");
            self.faults.set(fault);
            self.defect_until = Some(until);
            // What proves it may be overwritten or removed: it is remembered here.
            self.saved.durable = self.saved.durable.max(until);
        }
        match self.log.poisoned().map(str::to_owned) {
            Some(cause) => self.begin_repair(cause),
            None => self
                .discarded
                .extend(std::mem::take(&mut self.stale).into_iter().map(FileId::Segment)),
        }
        // A crash between the save of what was applied last and this conclusion: nothing else may ever be applied.
        self.consistency_may_have_come();
        self.saver.request();
    }

    /// A trailing `Close` of our own is a release, whether the slot says so or not.
    fn close_found(&mut self, end: Position) {
        let ours = self
            .saved
            .lineage
            .0
            .last()
            .is_some_and(|entry| entry.origin == self.replica);
        let release = |Close { to, designation }| Released { designation, to, end };
        self.saved.released = self.trailing_close.filter(|_| ours).map(release);
    }

    /// A release counts, and ends the role in the slot, once its `Close` is on stable storage.
    pub(super) fn release_if_durable(&mut self) {
        let durable = self.log.durable().lsn;
        let Some(released) = self.saved.released.filter(|released| released.end.lsn <= durable) else {
            return;
        };
        if self.role == Role::Secondary && self.saved.role != SavedRole::Secondary {
            self.save(|saved| {
                saved.role = SavedRole::Secondary;
                saved.learn(released.designation);
            });
        }
    }
}

/// The clock goes on where it was saved. A wall clock that was 30 days ahead and is right again must not keep this replica apart for a
/// month: then only what is recorded counts.
fn saved_clock(saved: &SavedState, now: Now) -> LamportClock {
    let clock = LamportClock::default();
    if let Err(error) = clock.see(saved.clock, now.wall_ns) {
        tracing::warn!(replica = %saved.replica, %error, "the saved clock is not used");
    }
    let epoch = saved.lineage.0.last().map_or(Lamport::default(), |entry| entry.lamport);
    LamportClock::new(clock.last().max(saved.applied_time).max(epoch))
}

fn open_data<S: Store>(store: &S) -> Result<S::File, OpenError> {
    store.open(&FileId::Data).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => OpenError::DataMissing {
            what: "the data disk".into(),
        },
        _ => OpenError::Io {
            what: "open the data disk".into(),
            source: error,
        },
    })
}

type OpenSlots<S> = (Slots<S, SavedState>, SavedState, bool);

fn open_slots<S: Store>(store: &S, params: &OpenParams) -> Result<OpenSlots<S>, OpenError> {
    match Slots::open(store) {
        Ok((slots, loaded)) => {
            let fell_back = loaded.is_fallback();
            let Loaded { state, bad } = loaded;
            if let Some(bad) = bad.filter(|_| fell_back) {
                tracing::warn!(replica = %params.replica, %bad, "using the older saved state; the primary role is not resumed from it");
            }
            Ok((slots, state, fell_back))
        }
        Err(error) => match params.create.filter(|_| was_never_saved(&error)) {
            Some(size_bytes) => create_slots(store, params, size_bytes),
            None => Err(slot_error(error)),
        },
    }
}

/// Whether the slots are missing, or were made and never written: a creation that was interrupted looks like this, too.
fn was_never_saved(error: &SlotError) -> bool {
    match error {
        SlotError::Io { source, .. } => source.kind() == io::ErrorKind::NotFound,
        SlotError::BothBad(first, second) => first.never_written && second.never_written,
        SlotError::Newer { .. } | SlotError::TooLarge { .. } | SlotError::Body(_) => false,
    }
}

fn slot_error(error: SlotError) -> OpenError {
    match error {
        SlotError::Io { what, source } if source.kind() == io::ErrorKind::NotFound => OpenError::DataMissing {
            what: format!("saved state ({what})"),
        },
        SlotError::Io { what, source } => OpenError::Io {
            what: format!("saved state, {what}"),
            source,
        },
        other => OpenError::Refused {
            what: other.to_string(),
        },
    }
}

fn create_slots<S: Store>(store: &S, params: &OpenParams, size_bytes: u64) -> Result<OpenSlots<S>, OpenError> {
    params.tuning.check().map_err(|what| OpenError::Refused { what })?;
    let files = store.list().map_err(io_error("list the log directory"))?;
    if let Some(FileId::Segment(name)) = files.iter().find(|id| matches!(id, FileId::Segment(_))) {
        let what = format!("saved state is missing, but there is log ({name}): this is no new replica");
        return Err(OpenError::Refused { what });
    }
    for slot in [FileId::Slot(0), FileId::Slot(1)] {
        // Left over from a creation that was interrupted: never written, as was just seen, or one of them missing.
        store.remove(&slot).map_err(io_error("remove an unused slot"))?;
    }
    store.sync_dir().map_err(io_error("sync the replica directory"))?;
    let ids = (params.cluster, params.resource, params.replica);
    let state = SavedState::new(ids, params.boot_id, size_bytes, params.tuning);
    let slots = Slots::create(store, SLOT_BYTES, &state).map_err(slot_error)?;
    Ok((slots, state, false))
}

fn check_identity(saved: &SavedState, params: &OpenParams, disk_bytes: u64) -> Result<(), OpenError> {
    let refused = |what: String| Err(OpenError::Refused { what });
    if (saved.cluster, saved.resource, saved.replica) != (params.cluster, params.resource, params.replica) {
        return refused(format!(
            "saved state belongs to cluster {}, resource {}, replica {}, not to {}, {}, {}",
            saved.cluster, saved.resource, saved.replica, params.cluster, params.resource, params.replica
        ));
    }
    if disk_bytes < saved.size_bytes {
        return refused(format!(
            "the data disk has {disk_bytes} bytes, the replica {}: it is not the disk of this replica, or was shrunk",
            saved.size_bytes
        ));
    }
    Ok(())
}

/// Summaries, and the spares that an earlier process has left.
fn beside_the_log<S: Store>(store: &S) -> Result<(Vec<Kept>, Vec<FileId>), OpenError> {
    let files = store.list().map_err(io_error("list the log directory"))?;
    let (mut kept, mut spares) = (Vec::new(), Vec::new());
    for id in files {
        if let FileId::Spare(_) = id {
            spares.push(id);
        } else if let FileId::Summary(name) = id {
            let end = Summary::load_end(store, name).map_err(io_error(format!("read the summary of {name}")))?;
            // A damaged one tells nothing: it may go with the next that all members have passed.
            kept.push(Kept {
                name,
                end: end.unwrap_or(Lsn::ZERO),
            });
        }
    }
    Ok((kept, spares))
}

fn open_log<S: Store>(
    store: &S,
    identity: LogIdentity,
    saved: &SavedState,
    same_boot: bool,
) -> Result<Found, OpenError> {
    let params = ScanParams {
        identity,
        from: saved.applied,
        first_segment: saved.log.first_segment,
    };
    let mut proofs = Proofs::new(saved);
    let mut visit = |_: &Record, end: Position| proofs.visit(end);
    match scan(store, &params, &mut visit) {
        Ok(scan) => Ok(found(scan, saved, same_boot, &proofs)),
        Err(ScanError::Missing { .. }) if !saved.log.started => empty_log(store, identity, saved),
        Err(ScanError::Missing { wanted, present }) => Err(OpenError::DataMissing {
            what: format!("the log at {wanted} ({present})"),
        }),
        Err(ScanError::Io { what, source }) => Err(OpenError::Io { what, source }),
        Err(error) => Err(OpenError::Refused {
            what: error.to_string(),
        }),
    }
}

/// Places that the log must lead through, for what is on the data disk to mean anything.
struct Proofs {
    dirty_end: Waypoint,
    waypoint: Option<Waypoint>,
}

impl Proofs {
    /// What was applied is known to have been on the way there; of the rest, only what is in the log.
    fn new(saved: &SavedState) -> Self {
        let applied = saved.applied;
        let mut dirty_end = Waypoint {
            at: saved.dirty_end,
            passed: false,
        };
        dirty_end.visit(applied);
        let waypoint = saved.waypoint.map(|known| {
            let passed = known.passed && known.at.lsn <= applied.lsn;
            let mut waypoint = Waypoint { passed, ..known };
            waypoint.visit(applied);
            waypoint
        });
        Self { dirty_end, waypoint }
    }

    fn visit(&mut self, end: Position) {
        self.dirty_end.visit(end);
        if let Some(waypoint) = &mut self.waypoint {
            waypoint.visit(end);
        }
    }
}

fn found(scan: Scan, saved: &SavedState, same_boot: bool, proofs: &Proofs) -> Found {
    let verdict = scan.decide(saved.durable, same_boot);
    if !scan.damaged.is_empty() {
        let files: Vec<String> = scan.damaged.iter().map(ToString::to_string).collect();
        tracing::warn!(
            replica = %saved.replica,
            files = files.join(", "),
            "these log files are damaged or hold durable log behind a defect: they are no part of the log and are kept; once the replica \
             has caught up, or was invalidated, remove them"
        );
    }
    let (end, epochs, last_record) = (scan.end, scan.epochs.clone(), scan.last_record.clone());
    let trailing_close = last_record
        .as_ref()
        .filter(|record| record.header.kind == RecordKind::Close)
        .and_then(|record| Close::decode(&record.payload));
    let is_defect = matches!(verdict, Verdict::Defect { .. });
    let beyond = scan.beyond.clone();
    let (mut unused, state) = scan.into_state();
    if is_defect {
        // What stands behind the damage is evidence, and perhaps worth a lot.
        unused.retain(|name| !beyond.contains(name));
    }
    Found {
        state,
        facts: LogFacts {
            end,
            epochs,
            verdict,
            trailing_close,
            dirty_end_proven: proofs.dirty_end.passed,
            waypoint_passed: proofs.waypoint.is_some_and(|waypoint| waypoint.passed),
        },
        stale: unused,
        last_record,
    }
}

/// A log that has never had a segment: it begins where the saved state says.
fn empty_log<S: Store>(store: &S, identity: LogIdentity, saved: &SavedState) -> Result<Found, OpenError> {
    let files = store.list().map_err(io_error("list the log directory"))?;
    let unused: Vec<SegmentName> = files
        .into_iter()
        .filter_map(|id| {
            if let FileId::Segment(name) = id {
                Some(name)
            } else {
                None
            }
        })
        .collect();
    let above = unused
        .iter()
        .map(|name| name.number.saturating_add(1))
        .max()
        .unwrap_or(1);
    let start = saved.log.start;
    let known = saved.lineage.0.iter().find(|entry| entry.id == start.epoch).cloned();
    let epoch = known.unwrap_or_else(|| blank_epoch(identity.replica));
    let state = LogState::empty(identity, above.max(saved.log.first_segment), epoch, start);
    let facts = LogFacts {
        end: start,
        epochs: Vec::new(),
        verdict: Verdict::Continue,
        trailing_close: None,
        dirty_end_proven: true,
        waypoint_passed: Proofs::new(saved).waypoint.is_some_and(|waypoint| waypoint.passed),
    };
    Ok(Found {
        state,
        facts,
        stale: unused,
        last_record: None,
    })
}
