//! Faults on purpose, seeded: errors, lost answers, delays, stale reads, watches that are late, cut, lossy or out of
//! order, and outages.
//!
//! Invariants:
//! - With no plan set, nothing here changes any answer.
//! - Faults change what clients see, never what is stored: a refused request did nothing, a lost answer did everything.
//! - Reordering never swaps two changes of the same object, and a watch hands out what it holds back before it ends,
//!   except for changes it is told to lose. Losing is harsher than a real API server can be; it is off unless asked for.

use crate::error::ApiError;
use crate::storage::Event;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Longest a reordered change is held back when nothing else comes.
const LONGEST_HOLD: Duration = Duration::from_millis(500);

/// What goes wrong. Probabilities are 0 to 1; an empty list of clients or kinds means all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "camelCase")]
pub struct Plan {
    /// Seed of all decisions.
    pub seed: u64,
    /// Clients this applies to: the name in `/via/<name>/` of their server address.
    pub clients: Vec<String>,
    /// Storage kinds this applies to, e.g. `mars.storage/marsreplicas`.
    pub kinds: Vec<String>,
    /// Probability that a request is refused with 500 and nothing done.
    pub error: f64,
    /// Probability that a write is refused with 409 and nothing done.
    pub conflict: f64,
    /// Probability that a write is done and its answer replaced by a 500.
    pub lost_answer: f64,
    /// Probability of a delay before a request is looked at.
    pub delay: f64,
    /// Longest such delay in milliseconds.
    pub delay_ms: u64,
    /// Probability that a read shows an older picture.
    pub stale: f64,
    /// How many revisions older.
    pub stale_revisions: u64,
    /// Longest delay of each watch event in milliseconds.
    pub watch_delay_ms: u64,
    /// Probability that a watch ends after an event.
    pub watch_cut: f64,
    /// Probability that an event comes after later events of other objects.
    pub watch_reorder: f64,
    /// Probability that an event never comes on this watch.
    pub watch_lose: f64,
}

/// A request, as faults see it.
#[derive(Clone, Debug)]
pub struct Call {
    /// Client name, if its address has one.
    pub client: Option<String>,
    /// HTTP method.
    pub method: String,
    /// API group.
    pub group: String,
    /// Plural resource name.
    pub plural: String,
    /// Whether it is a watch.
    pub is_watch: bool,
}

/// What to do with a request.
#[derive(Debug)]
pub enum Verdict {
    /// Answer it.
    Pass,
    /// Refuse it; nothing is done.
    Refuse(ApiError),
    /// Carry it out, then answer this.
    LoseAnswer(ApiError),
}

struct State {
    plan: Option<Plan>,
    random: StdRng,
    outage_until: Option<Instant>,
    /// Cancelled to cut all watches; replaced by a new one at once.
    cut: CancellationToken,
}

/// The faults of one API server.
pub struct Faults {
    state: Mutex<State>,
}

impl Default for Faults {
    fn default() -> Self {
        let state = State {
            plan: None,
            random: StdRng::seed_from_u64(0),
            outage_until: None,
            cut: CancellationToken::new(),
        };
        Self {
            state: Mutex::new(state),
        }
    }
}

impl Plan {
    fn concerns(&self, client: Option<&str>, storage: &str) -> bool {
        let listed = |list: &[String], name: &str| list.is_empty() || list.iter().any(|n| n == name);
        listed(&self.clients, client.unwrap_or_default()) && listed(&self.kinds, storage)
    }
}

impl State {
    fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.random.random::<f64>() < probability
    }

    fn in_outage(&self) -> bool {
        self.outage_until.is_some_and(|until| Instant::now() < until)
    }
}

impl Faults {
    // Decisions are single assignments, so the state behind a poisoned lock is good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the plan (none: no more faults). Running watches keep the plan they started with.
    pub fn set(&self, plan: Option<Plan>) {
        let mut state = self.lock();
        state.random = StdRng::seed_from_u64(plan.as_ref().map_or(0, |p| p.seed));
        state.plan = plan;
    }

    /// The plan in force.
    #[must_use]
    pub fn plan(&self) -> Option<Plan> {
        self.lock().plan.clone()
    }

    /// Ends all watches now, without a word, as a broken connection does.
    pub fn cut_watches(&self) {
        let mut state = self.lock();
        std::mem::replace(&mut state.cut, CancellationToken::new()).cancel();
    }

    /// Serves nobody for a while: watches end, new connections are closed, requests on old ones get 503.
    pub fn outage(&self, length: Duration) {
        self.lock().outage_until = Some(Instant::now() + length);
        self.cut_watches();
    }

    /// Decides about a request; delays happen here.
    pub async fn judge(&self, call: &Call) -> Verdict {
        let (delay, verdict) = self.decide(call);
        if let Some(delay) = delay {
            tokio::time::sleep(delay).await;
        }
        verdict
    }

    fn decide(&self, call: &Call) -> (Option<Duration>, Verdict) {
        let mut state = self.lock();
        if state.in_outage() {
            return (
                None,
                Verdict::Refuse(ApiError::unavailable("the API is down on purpose")),
            );
        }
        let group = if call.group.is_empty() { "core" } else { &call.group };
        let storage = format!("{group}/{}", call.plural);
        let Some(plan) = state
            .plan
            .clone()
            .filter(|p| p.concerns(call.client.as_deref(), &storage))
        else {
            return (None, Verdict::Pass);
        };
        let delay = state
            .chance(plan.delay)
            .then(|| state.random.random_range(0..=plan.delay_ms));
        let is_write = call.method != "GET";
        let verdict = if state.chance(plan.error) {
            Verdict::Refuse(ApiError::internal("failed on purpose, nothing was done"))
        } else if is_write && state.chance(plan.conflict) {
            let subject = crate::error::Subject {
                group: call.group.clone(),
                resource: call.plural.clone(),
                name: String::new(),
            };
            Verdict::Refuse(ApiError::stale(&subject))
        } else if is_write && state.chance(plan.lost_answer) {
            // Not 503 or 504, which clients try again by themselves.
            let error = ApiError::internal("request timed out (on purpose; it was carried out)");
            Verdict::LoseAnswer(error)
        } else {
            Verdict::Pass
        };
        (delay.map(Duration::from_millis), verdict)
    }

    /// By how many revisions this read is to be stale, if at all.
    pub(crate) fn stale_by(&self, client: Option<&str>, storage: &str) -> Option<u64> {
        let mut state = self.lock();
        let plan = state.plan.clone().filter(|p| p.concerns(client, storage))?;
        state.chance(plan.stale).then_some(plan.stale_revisions)
    }

    /// The faults of a new watch.
    pub(crate) fn watch(&self, client: Option<&str>, storage: &str) -> WatchFaults {
        let mut state = self.lock();
        let plan = state.plan.clone().filter(|p| p.concerns(client, storage));
        let seed = state.random.random();
        WatchFaults {
            plan,
            random: StdRng::seed_from_u64(seed),
            held: Vec::new(),
            until: None,
            cut: state.cut.clone(),
        }
    }
}

/// The faults of one watch.
pub(crate) struct WatchFaults {
    plan: Option<Plan>,
    random: StdRng,
    held: Vec<Arc<Event>>,
    until: Option<Instant>,
    cut: CancellationToken,
}

impl WatchFaults {
    fn chance(&mut self, probability: f64) -> bool {
        probability > 0.0 && self.random.random::<f64>() < probability
    }

    /// Resolves when all watches are to be cut.
    pub(crate) async fn cut(&self) {
        self.cut.cancelled().await;
    }

    /// When what is held back has to be released at the latest.
    pub(crate) fn held_until(&self) -> Option<Instant> {
        self.until
    }

    /// Hands out what is held back.
    pub(crate) fn release(&mut self) -> Vec<Arc<Event>> {
        self.until = None;
        std::mem::take(&mut self.held)
    }

    /// What becomes of a change: the changes to pass on now, and whether the watch ends after them.
    pub(crate) async fn pass(&mut self, event: Arc<Event>) -> (Vec<Arc<Event>>, bool) {
        let Some(plan) = self.plan.clone() else {
            return (vec![event], false);
        };
        if plan.watch_delay_ms > 0 {
            let delay = self.random.random_range(0..=plan.watch_delay_ms);
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if self.chance(plan.watch_lose) {
            return (Vec::new(), false);
        }
        let same_object_is_held = self.held.iter().any(|held| held.key == event.key);
        if !same_object_is_held && self.chance(plan.watch_reorder) {
            self.held.push(event);
            self.until = Some(Instant::now() + LONGEST_HOLD);
            return (Vec::new(), false);
        }
        let mut ready = Vec::new();
        if same_object_is_held {
            ready = self.release();
            ready.push(event);
        } else {
            ready.push(event);
            ready.extend(self.release());
        }
        let ends = self.chance(plan.watch_cut);
        (ready, ends)
    }
}

/// A listener that closes new connections while an outage lasts.
pub(crate) struct FaultyListener {
    inner: TcpListener,
    faults: Arc<Faults>,
}

impl FaultyListener {
    pub(crate) fn new(inner: TcpListener, faults: Arc<Faults>) -> Self {
        Self { inner, faults }
    }
}

impl axum::serve::Listener for FaultyListener {
    type Io = TcpStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            match self.inner.accept().await {
                Ok(_) if self.faults.lock().in_outage() => {}
                Ok((stream, address)) => {
                    let _ = stream.set_nodelay(true);
                    return (stream, address);
                }
                // Out of descriptors or the like: the connection stays in the backlog, so a short pause is enough.
                Err(error) => {
                    tracing::warn!(%error, "accepting a connection; trying again");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.inner.local_addr()
    }
}
