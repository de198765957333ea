//! What the other members of a resource last said, and whether they answer.
//!
//! Invariant: an older statement never replaces a newer one of the same member, whichever connection it came over; what was said is
//! kept for ever (a fork does not vanish because somebody stops answering), only reachability ends with time.

use mars_engine::replication::fetch::Member;
use mars_engine::replication::messages::PeerStatus;
use mars_engine::types::{EpochId, Lamport, Position, ReplicaId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::sync::watch;
use tokio::time::Instant;

/// How long a failing source is avoided at first, and at most.
const AVOID_FIRST: Duration = Duration::from_millis(500);
const AVOID_MOST: Duration = Duration::from_secs(15);

/// See the module.
#[derive(Debug)]
pub(super) struct PeerBook {
    peers: Mutex<HashMap<ReplicaId, Record>>,
    /// Counts changes, for those who wait for one.
    changes: watch::Sender<u64>,
}

impl Default for PeerBook {
    fn default() -> Self {
        Self {
            peers: Mutex::default(),
            changes: watch::channel(0).0,
        }
    }
}

#[derive(Debug, Default)]
struct Record {
    status: Option<PeerStatus>,
    /// Stamp of `status`.
    said_at: Lamport,
    last_contact: Option<(Instant, SystemTime)>,
    /// What the owner was told last, and the epoch our log ended in then: the owner ignores positions of epochs unknown to it.
    reported: Option<(Position, EpochId)>,
    /// The owner has taken a report in this life.
    taken: bool,
    avoid_until: Option<Instant>,
    avoid_for: Duration,
    problem: Option<String>,
}

/// A member for the outside.
#[derive(Debug, Clone, PartialEq)]
pub struct PeerView {
    /// Who.
    pub replica: ReplicaId,
    /// Whether it answers now.
    pub reachable: bool,
    /// When it last said anything.
    pub last_contact: Option<SystemTime>,
    /// What it last said.
    pub status: Option<PeerStatus>,
    /// The owner knows what it has durably, and has drawn its conclusions.
    pub taken: bool,
    /// Why it is not reached, or what it refused last.
    pub problem: Option<String>,
}

impl PeerBook {
    fn peers(&self) -> MutexGuard<'_, HashMap<ReplicaId, Record>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Tells of every change.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A member has said this; a sign of life in any case, a statement unless something newer is known already.
    pub(super) fn heard(&self, replica: ReplicaId, stamp: Lamport, status: PeerStatus) {
        {
            let mut peers = self.peers();
            let record = peers.entry(replica).or_default();
            record.last_contact = Some((Instant::now(), SystemTime::now()));
            record.problem = None;
            let newer = record.status.is_none() || stamp >= record.said_at;
            if newer {
                record.said_at = stamp;
                record.status = Some(status);
            }
        }
        self.changed();
    }

    /// Whether the owner has to be told of a member's durable position; from now on it counts as told.
    pub(super) fn report_is_news(&self, replica: ReplicaId, durable: Position, own_epoch: EpochId) -> bool {
        let mut peers = self.peers();
        let record = peers.entry(replica).or_default();
        record.reported.replace((durable, own_epoch)) != Some((durable, own_epoch))
    }

    /// The owner took it.
    pub(super) fn report_taken(&self, replica: ReplicaId) {
        let before = std::mem::replace(&mut self.peers().entry(replica).or_default().taken, true);
        if !before {
            self.changed();
        }
    }

    /// The owner did not take it.
    pub(super) fn forget_report(&self, replica: ReplicaId) {
        self.peers().entry(replica).or_default().reported = None;
    }

    /// A connection to a member failed, or it refused.
    pub(super) fn problem(&self, replica: ReplicaId, problem: String) {
        self.peers().entry(replica).or_default().problem = Some(problem);
        self.changed();
    }

    /// A source failed: ask others first for a while, longer each time.
    pub(super) fn avoid(&self, replica: ReplicaId, problem: String) {
        {
            let mut peers = self.peers();
            let record = peers.entry(replica).or_default();
            let jitter = rand::random_range(0.8..1.2);
            record.avoid_for = (record.avoid_for * 2).clamp(AVOID_FIRST, AVOID_MOST).mul_f64(jitter);
            record.avoid_until = Some(Instant::now() + record.avoid_for);
            record.problem = Some(problem);
        }
        self.changed();
    }

    /// A source has proven itself.
    pub(super) fn trust(&self, replica: ReplicaId) {
        let mut peers = self.peers();
        let record = peers.entry(replica).or_default();
        record.avoid_for = Duration::ZERO;
        record.avoid_until = None;
        record.problem = None;
    }

    /// How much longer a source is avoided.
    pub(super) fn avoided_until(&self, replica: ReplicaId) -> Option<Instant> {
        self.peers()
            .get(&replica)?
            .avoid_until
            .filter(|until| *until > Instant::now())
    }

    /// A member as the engine's decisions want it.
    pub(super) fn member(&self, replica: ReplicaId, liveness: Duration) -> Member {
        let avoid = self.avoided_until(replica).is_some();
        let view = self.view(replica, liveness);
        Member {
            replica,
            reachable: view.reachable,
            avoid,
            status: view.status,
        }
    }

    /// A member for the outside.
    pub(super) fn view(&self, replica: ReplicaId, liveness: Duration) -> PeerView {
        let peers = self.peers();
        let record = peers.get(&replica);
        let contact = record.and_then(|record| record.last_contact);
        PeerView {
            replica,
            reachable: contact.is_some_and(|(at, _)| at.elapsed() < liveness),
            last_contact: contact.map(|(_, wall)| wall),
            status: record.and_then(|record| record.status.clone()),
            taken: record.is_some_and(|record| record.taken),
            problem: record.and_then(|record| record.problem.clone()),
        }
    }
}
