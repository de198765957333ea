//! What drives one replica's replication: links to all members, at most one fetch and one sync session, faults, status.
//!
//! Invariants: decisions are the engine's ([`decide`], [`sync_need`]), made anew whenever anything they rest on changes; a session that
//! no longer fits the decision has ended before its successor starts.

use super::book::PeerView;
use super::entry::{Entry, Membership, PeerAddress};
use super::fetcher::{FetchError, Fetcher};
use super::hub::Shared;
use super::link;
use super::meter::{Meter, Throttle};
use super::server::Served;
use super::syncer::{SyncError, Syncer};
use mars_engine::api::{Command, Fault, ReplicaStatus};
use mars_engine::replication::fetch::{Decision, Leader, Plan, Wait, decide, find_leader};
use mars_engine::replication::messages::{Followed, Refused};
use mars_engine::replication::sync::{SyncNeed, sync_need};
use mars_engine::types::{Designation, Lsn, Position, ReplicaId};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

/// Decisions are made at most this often, and at least every second (reachability ends with time).
const DECISION_PAUSE: Duration = Duration::from_millis(20);
const DECISION_EVERY: Duration = Duration::from_secs(1);
/// The numbers of a fault that stays are corrected at most this often.
const FAULT_REFRESH: Duration = Duration::from_secs(2);

/// What a fetch or a sync is doing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Activity {
    /// Nothing to do, or nothing possible, and why.
    #[default]
    Unknown,
    /// Waits, and for what.
    Waiting(String),
    /// Runs, from this member.
    From(ReplicaId),
}

/// What there is to know about the replication of one replica.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ReplicationStatus {
    /// The log transfer.
    pub fetch: Activity,
    /// The copy of data.
    pub sync: Activity,
    /// The primary whose history counts, as last heard.
    pub leader: Option<Followed>,
    /// All other members.
    pub peers: Vec<PeerView>,
    /// Bytes of log per second.
    pub fetch_bytes_per_s: u64,
    /// Bytes of payload per second.
    pub sync_bytes_per_s: u64,
    /// Bytes of log received since the start.
    pub fetched_bytes: u64,
    /// Bytes of payload received since the start.
    pub synced_bytes: u64,
    /// The last fake sync that was carried out.
    pub fake_synced: Option<Uuid>,
    /// Why the last session failed, if none has succeeded since.
    pub problem: Option<String>,
}

/// A replica that takes part. Dropping it does not stop it; [`stop`](Self::stop) does.
#[derive(Debug)]
pub struct Follower {
    status: watch::Receiver<Arc<ReplicationStatus>>,
    stop: CancellationToken,
    done: JoinHandle<()>,
}

impl Follower {
    /// The newest status, and every later one (about once per second while nothing happens).
    #[must_use]
    pub fn status(&self) -> watch::Receiver<Arc<ReplicationStatus>> {
        self.status.clone()
    }

    /// Ends all of it: links, sessions, serving. Afterwards nothing orders anything of the replica; a file read that was
    /// under way may still end on its own.
    pub async fn stop(self) {
        self.stop.cancel();
        // A driver that panicked has stopped, too.
        let _ = self.done.await;
    }
}

/// Starts to follow.
pub(super) fn start(shared: &Arc<Shared>, entry: Arc<Entry>, served: Arc<Served>) -> Follower {
    let stop = served.stop.clone();
    let (publish, status) = watch::channel(Arc::default());
    let (events, ended) = mpsc::channel(4);
    let driver = Driver {
        shared: shared.clone(),
        entry,
        served,
        stop: stop.clone(),
        sessions: TaskTracker::new(),
        publish,
        events,
        links: HashMap::new(),
        fetch: None,
        sync: None,
        fetch_meter: Arc::default(),
        sync_meter: Arc::default(),
        fetch_throttle: Arc::default(),
        sync_throttle: Arc::default(),
        not_before: Instant::now(),
        fault: None,
        unprovable: None,
        problem: None,
        leader: None,
        fake_synced: None,
    };
    let done = shared.tasks.spawn(driver.run(ended));
    Follower { status, stop, done }
}

/// How a session ended.
enum Ended {
    Fetch(Result<(), FetchError>),
    /// With the id of the fake sync that it carried out.
    Sync(Result<(), SyncError>, Option<Uuid>),
}

/// What a fetch session rests on: another one, and it must be opened anew.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FetchKey {
    source: ReplicaId,
    leader: ReplicaId,
    designation: Designation,
    until: Option<Lsn>,
}

impl From<&Plan> for FetchKey {
    fn from(plan: &Plan) -> Self {
        let (leader, designation) = (plan.leader.leader, plan.leader.designation);
        Self {
            source: plan.source,
            leader,
            designation,
            until: plan.until,
        }
    }
}

struct Running<K> {
    key: K,
    stop: CancellationToken,
}

struct SyncRun {
    source: ReplicaId,
    begun: watch::Receiver<bool>,
}

struct Driver {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
    served: Arc<Served>,
    stop: CancellationToken,
    sessions: TaskTracker,
    publish: watch::Sender<Arc<ReplicationStatus>>,
    events: mpsc::Sender<Ended>,
    links: HashMap<ReplicaId, (PeerAddress, CancellationToken)>,
    fetch: Option<Running<FetchKey>>,
    sync: Option<Running<SyncRun>>,
    fetch_meter: Arc<Meter>,
    sync_meter: Arc<Meter>,
    fetch_throttle: Arc<Throttle>,
    sync_throttle: Arc<Throttle>,
    /// No new session before this.
    not_before: Instant,
    /// The fault given to the owner last, and when.
    fault: Option<(Option<Fault>, Instant)>,
    /// The primary could not prove this position of ours.
    unprovable: Option<(Position, Refused)>,
    problem: Option<String>,
    leader: Option<Followed>,
    fake_synced: Option<Uuid>,
}

impl Driver {
    async fn run(mut self, mut ended: mpsc::Receiver<Ended>) {
        let (mut status, mut membership) = (self.entry.port.status(), self.entry.membership.clone());
        let mut book = self.entry.book.changes();
        let stop = self.stop.clone();
        let report = link::report(self.entry.clone());
        self.sessions.spawn(stop.clone().run_until_cancelled_owned(report));
        while !stop.is_cancelled() {
            status.mark_unchanged();
            book.mark_unchanged();
            let known = membership.borrow_and_update().clone();
            self.keep_links(&known);
            let own = self.entry.port.status().borrow().clone();
            self.act(&own, &known).await;
            tokio::select! {
                () = stop.cancelled() => break,
                Some(event) = ended.recv() => self.session_ended(event),
                changed = status.changed() => if changed.is_err() { break },
                changed = membership.changed() => if changed.is_err() { break },
                _ = book.changed() => {}
                () = tokio::time::sleep(DECISION_EVERY) => {}
            }
            tokio::select! {
                () = stop.cancelled() => break,
                () = tokio::time::sleep(DECISION_PAUSE) => {}
            }
        }
        self.stop.cancel();
        for (_, link) in self.links.values() {
            link.cancel();
        }
        ended.close();
        self.sessions.close();
        self.sessions.wait().await;
        self.served.end().await;
        // Last: until here nobody else may take part for this resource.
        self.shared.withdraw(self.entry.resource);
    }

    /// One link per member whose address is known.
    fn keep_links(&mut self, known: &Membership) {
        self.links.retain(|_, (peer, stop)| {
            let keep = known.peers.contains(peer);
            if !keep {
                stop.cancel();
            }
            keep
        });
        for peer in &known.peers {
            let reachable = peer.node.is_some() && !peer.address.is_empty();
            if !reachable || self.links.contains_key(&peer.replica) {
                continue;
            }
            let stop = self.stop.child_token();
            let link = link::run(self.shared.clone(), self.entry.clone(), peer.clone(), stop.clone());
            self.sessions.spawn(link);
            self.links.insert(peer.replica, (peer.clone(), stop));
        }
    }

    /// Decides, and makes it so.
    async fn act(&mut self, own: &ReplicaStatus, known: &Membership) {
        let members = self.entry.members();
        let mut decision = decide(own, &known.wish, &members);
        if let Some((at, refused)) = &self.unprovable {
            if *at == own.durable && matches!(decision, Decision::Fetch(_)) {
                decision = Decision::Stop(Fault::Orphan {
                    reason: format!("the primary {refused}"),
                });
            } else if *at != own.durable {
                self.unprovable = None;
            }
        }
        let leader = match (&decision, find_leader(&known.wish, &members)) {
            (Decision::Fetch(plan), _) => Some(plan.leader.clone()),
            (_, Leader::Found(leader)) => Some(leader),
            (_, Leader::None | Leader::Ambiguous) => None,
        };
        // Kept while nobody speaks of it: others may still learn it from us.
        if leader.is_some() {
            self.leader.clone_from(&leader);
            self.entry.set_follows(leader);
        }
        let stuck = matches!(decision, Decision::Stop(_));
        let need = sync_need(own, &known.wish, &members, stuck);
        self.steer_sync(need);
        self.steer_fetch(&decision, known);
        self.tell_fault(own, &decision).await;
        self.publish_status(known, &decision, need);
    }

    fn steer_sync(&mut self, need: SyncNeed) {
        let wanted = match need {
            SyncNeed::From(source) => Some(source),
            SyncNeed::None | SyncNeed::Paused | SyncNeed::NoSource => None,
        };
        if let Some(running) = &self.sync {
            // A source that is still there goes on; a better one is no reason to begin anew.
            let lost = wanted.is_none();
            let changed = wanted.is_some_and(|source| source != running.key.source && !*running.key.begun.borrow());
            if lost || changed {
                running.stop.cancel();
            }
            return;
        }
        let Some(source) = wanted else { return };
        let Some(peer) = self.startable(source) else { return };
        let (begun, is_begun) = watch::channel(false);
        let fake = self
            .entry
            .now_known()
            .fake_sync
            .filter(|id| self.fake_synced != Some(*id));
        let stop = self.stop.child_token();
        let syncer = Syncer {
            shared: self.shared.clone(),
            entry: self.entry.clone(),
            peer,
            meter: self.sync_meter.clone(),
            throttle: self.sync_throttle.clone(),
            begun,
            fake: fake.is_some(),
        };
        // While the local log is about to begin elsewhere, nothing may be appended to it.
        if let Some(fetch) = &self.fetch {
            fetch.stop.cancel();
        }
        let (events, token) = (self.events.clone(), stop.clone());
        self.sessions.spawn(async move {
            let result = token.run_until_cancelled(syncer.run()).await;
            let fake = fake.filter(|_| matches!(result, Some(Ok(()))));
            let _ = events.send(Ended::Sync(result.unwrap_or(Ok(())), fake)).await;
        });
        self.sync = Some(Running {
            key: SyncRun {
                source,
                begun: is_begun,
            },
            stop,
        });
    }

    fn steer_fetch(&mut self, decision: &Decision, known: &Membership) {
        let sync_begins = self.sync.as_ref().is_some_and(|sync| !*sync.key.begun.borrow());
        let plan = match decision {
            Decision::Fetch(plan) if !sync_begins => Some(plan),
            _ => None,
        };
        if let Some(running) = &self.fetch {
            if plan.map(FetchKey::from).as_ref() != Some(&running.key) {
                running.stop.cancel();
            }
            return;
        }
        let Some(plan) = plan else { return };
        let Some(peer) = self.startable(plan.source).filter(|peer| known.peers.contains(peer)) else {
            return;
        };
        let stop = self.stop.child_token();
        let fetcher = Fetcher {
            shared: self.shared.clone(),
            entry: self.entry.clone(),
            peer,
            plan: plan.clone(),
            meter: self.fetch_meter.clone(),
            throttle: self.fetch_throttle.clone(),
        };
        let (events, token) = (self.events.clone(), stop.clone());
        self.sessions.spawn(async move {
            let ended = token.run_until_cancelled(fetcher.run()).await.unwrap_or(Ok(()));
            let _ = events.send(Ended::Fetch(ended)).await;
        });
        self.fetch = Some(Running { key: plan.into(), stop });
    }

    /// The address of a source, unless it is too early to ask it again.
    fn startable(&self, source: ReplicaId) -> Option<PeerAddress> {
        if Instant::now() < self.not_before || self.entry.book.avoided_until(source).is_some() {
            return None;
        }
        self.entry
            .now_known()
            .peers
            .iter()
            .find(|peer| peer.replica == source)
            .cloned()
    }

    fn session_ended(&mut self, event: Ended) {
        self.not_before = Instant::now() + 5 * DECISION_PAUSE;
        let (resource, problem, source) = match event {
            Ended::Fetch(result) => {
                let source = self.fetch.take().map(|running| running.key.source);
                if let Err(error) = &result
                    && let Some(refused @ Refused::Unprovable { at, .. }) = error.refused()
                    && source == self.leader.as_ref().map(|leader| leader.leader)
                {
                    self.unprovable = Some((*at, refused.clone()));
                }
                (
                    self.entry.resource,
                    result.err().map(|error| format!("fetch: {error}")),
                    source,
                )
            }
            Ended::Sync(result, fake) => {
                self.fake_synced = fake.or(self.fake_synced);
                let source = self.sync.take().map(|running| running.key.source);
                (
                    self.entry.resource,
                    result.err().map(|error| format!("sync: {error}")),
                    source,
                )
            }
        };
        if let (Some(problem), Some(source)) = (&problem, source) {
            tracing::warn!(%resource, %source, problem, "a replication session ended");
            self.entry.book.avoid(source, problem.clone());
        }
        self.problem = problem;
    }

    /// Gives the owner the fault that the decision stands for, or takes it back once it is certain that it is over.
    async fn tell_fault(&mut self, own: &ReplicaStatus, decision: &Decision) {
        let wanted = match decision {
            Decision::Stop(fault) => Some(fault.clone()),
            // Not knowing is no reason to forget.
            Decision::Wait(Wait::NoPrimary | Wait::Ambiguous | Wait::NoSource) => return,
            Decision::Wait(_) | Decision::Fetch(_) => None,
        };
        let is_ours = |fault: &&Fault| matches!(fault, Fault::Fork { .. } | Fault::Orphan { .. });
        if own.faults.iter().find(is_ours) == wanted.as_ref() {
            return;
        }
        if let Some((told, at)) = &self.fault {
            let same_kind = match (told, &wanted) {
                (None, None) => true,
                (Some(told), Some(wanted)) => std::mem::discriminant(told) == std::mem::discriminant(wanted),
                _ => false,
            };
            if same_kind && at.elapsed() < FAULT_REFRESH {
                return;
            }
        }
        if let Some(fault) = &wanted {
            tracing::warn!(resource = %self.entry.resource, ?fault, "replication stops");
        }
        self.fault = Some((wanted.clone(), Instant::now()));
        if let Err(refusal) = self.entry.port.command(Command::SetReplicationFault(wanted)).await {
            tracing::debug!(resource = %self.entry.resource, %refusal, "the fault was not recorded");
        }
    }

    fn publish_status(&self, known: &Membership, decision: &Decision, need: SyncNeed) {
        let fetch = match (&self.fetch, decision) {
            (Some(running), _) => Activity::From(running.key.source),
            (None, Decision::Fetch(plan)) => Activity::Waiting(format!("will ask {} again", plan.source)),
            (None, Decision::Wait(reason)) => Activity::Waiting(reason.to_string()),
            (None, Decision::Stop(fault)) => Activity::Waiting(format!("stopped: {fault:?}")),
        };
        let sync = match (&self.sync, need) {
            (Some(running), _) => Activity::From(running.key.source),
            (None, SyncNeed::None) => Activity::Waiting("no copy is needed".into()),
            (None, SyncNeed::Paused) => Activity::Waiting("sync is switched off".into()),
            (None, SyncNeed::NoSource) => {
                Activity::Waiting("no consistent member on the primary's history answers".into())
            }
            (None, SyncNeed::From(source)) => Activity::Waiting(format!("will ask {source} again")),
        };
        let view = |peer: &PeerAddress| self.entry.book.view(peer.replica, self.entry.liveness);
        let status = ReplicationStatus {
            fetch,
            sync,
            leader: self.leader.clone(),
            peers: known.peers.iter().map(view).collect(),
            fetch_bytes_per_s: self.fetch_meter.rate(),
            sync_bytes_per_s: self.sync_meter.rate(),
            fetched_bytes: self.fetch_meter.total(),
            synced_bytes: self.sync_meter.total(),
            fake_synced: self.fake_synced,
            problem: self.problem.clone(),
        };
        self.publish.send_if_modified(|present| {
            let changed = **present != status;
            if changed {
                *present = Arc::new(status);
            }
            changed
        });
    }
}
