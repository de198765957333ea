//! One replica's task: bring it up, then observe, plan, execute and report for as long as it lives here.
//!
//! Invariants: the task is the only one that gives role orders to its engine; it never holds up the data path, whatever the
//! API server or a peer does; it ends only when the agent stops or when its deletion has been carried out.

use super::context::{LocalReplica, NodeContext, Rates, ReplicaView};
use super::facts::Facts;
use super::lag::LagMeter;
use super::opening::{self, Opened};
use super::peers::{self, FollowOrder};
use super::plan::{Plan, plan};
use super::presence::{DeviceWatch, Presence};
use super::report::{Problem, Surroundings, report, report_problem};
use super::running::Running;
use super::todo::{Grant, Todo};
use super::writer;
use crate::shard::OwnerEngine;
use mars_crds::MarsReplicaStatus;
use mars_engine::api::Role;
use mars_engine::types::Designation;
use rand::Rng;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Between two rounds when nothing happens.
const TICK: Duration = Duration::from_secs(1);
/// After a change: many changes of one moment make one round.
const SETTLE: Duration = Duration::from_millis(30);
/// How often users of the device are looked for while nobody waits for them to go, and while somebody does.
const USERS_IDLE: Duration = Duration::from_secs(10);
const USERS_WANTED: Duration = Duration::from_millis(500);
/// Longest pause after failures.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// What the supervisor wants of a task; newest value only.
#[derive(Debug, Clone)]
pub struct Order {
    /// The spec.
    pub todo: Arc<Todo>,
    /// Read from the source by this process, not from the cache.
    pub from_api: bool,
    /// Given up: by `ForgetNode` while this node was away, or because another replica has taken its place.
    pub forgotten: bool,
    /// Why the newest object could not be followed, if so.
    pub invalid: Option<String>,
}

/// Something a person asks of a replica, over the local socket.
#[derive(Debug)]
pub enum Ask {
    /// Become primary without the API server.
    Failover(oneshot::Sender<Result<Designation, String>>),
}

/// The supervisor's end of a task.
#[derive(Debug, Clone)]
pub struct ReplicaControl {
    /// Orders.
    pub order: watch::Sender<Order>,
    /// Questions.
    pub ask: mpsc::Sender<Ask>,
    /// Cancelled: the object of this name belongs to another replica now, and this one says no more about it.
    pub reporting: CancellationToken,
}

/// Why a task stopped serving.
enum Ended {
    /// The agent stops.
    Stopped,
    /// The replica has to go.
    Delete,
    /// The replica was forgotten.
    Quarantine,
}

pub(super) struct ReplicaTask {
    pub(super) node: Arc<NodeContext>,
    pub(super) orders: watch::Receiver<Order>,
    asks: mpsc::Receiver<Ask>,
    pub(super) status: watch::Sender<Arc<MarsReplicaStatus>>,
    /// The device, while no engine runs.
    pub(super) device: DeviceWatch,
}

/// Starts the task of a replica. It ends when the agent stops or the replica is gone; then the channel closes.
pub fn start(node: Arc<NodeContext>, order: Order, tracker: &tokio_util::task::TaskTracker) -> ReplicaControl {
    let (order_to, orders) = watch::channel(order);
    let (ask_to, asks) = mpsc::channel(4);
    let (status, reports) = watch::channel(Arc::new(MarsReplicaStatus::default()));
    let (name, replica) = {
        let order = orders.borrow();
        (order.todo.name.clone(), order.todo.replica)
    };
    let sink = node.sink.clone();
    let task = ReplicaTask {
        node,
        orders,
        asks,
        status,
        device: DeviceWatch::new(replica),
    };
    tracker.spawn(async move { task.run().await });
    let reporting = CancellationToken::new();
    let silenced = reporting.clone();
    tracker.spawn(silenced.run_until_cancelled_owned(async move {
        let mut reports = reports;
        // Nothing is known before the first report.
        if reports.changed().await.is_ok() {
            writer::run(sink, name, reports).await;
        }
    }));
    ReplicaControl {
        order: order_to,
        ask: ask_to,
        reporting,
    }
}

/// How long to wait after so many failures in a row.
fn pause_after(failures: u32) -> Duration {
    let longest = TICK.saturating_mul(1 << failures.min(8)).min(RETRY_MAX);
    longest.mul_f64(rand::rng().random_range(0.5..1.0))
}

impl ReplicaTask {
    pub(super) fn order(&self) -> Order {
        self.orders.borrow().clone()
    }

    async fn run(mut self) {
        loop {
            let ended = match self.bring_up().await {
                Ok(opened) => self.serve(opened).await,
                Err(ended) => ended,
            };
            match ended {
                Ended::Stopped => return,
                Ended::Delete => {
                    self.remove().await;
                    return;
                }
                Ended::Quarantine => {
                    if !self.quarantined().await {
                        return;
                    }
                }
            }
        }
    }

    /// Tries until the replica is open, or not wanted any more and provably not in use.
    async fn bring_up(&mut self) -> Result<Running, Ended> {
        let mut failures = 0;
        loop {
            let order = self.orders.borrow_and_update().clone();
            self.device.look(&self.node.runtime, None, Duration::ZERO).await;
            let problem = match (order.todo.deletion, order.forgotten) {
                (None, true) => return Err(Ended::Quarantine),
                (None, false) => self.try_open(&order).await,
                (Some(_), _) => match self.device.presence() {
                    Presence::Absent | Presence::GivenUp { .. } => return Err(Ended::Delete),
                    // A forgotten one is served by nobody: whoever uses it would wait for ever.
                    Presence::LeftBehind { users } if users.is_empty() || order.forgotten => {
                        match self.give_up_device(&order).await {
                            Ok(()) => return Err(Ended::Delete),
                            Err(problem) => Err(problem),
                        }
                    }
                    // Its users are served until they stop.
                    Presence::LeftBehind { .. } => self.try_open(&order).await,
                    used => Err(Problem {
                        reason: "DeviceInUse",
                        message: format!(
                            "the replica is being deleted, but its device is in use: {}",
                            used.in_use().unwrap_or_default()
                        ),
                    }),
                },
            };
            let problem = match problem {
                Ok(running) => return Ok(running),
                Err(problem) => problem,
            };
            if failures == 0 {
                warn!(
                    replica = order.todo.name,
                    reason = problem.reason,
                    "{}",
                    problem.message
                );
            }
            self.say_problem(&problem, &order);
            failures += 1;
            if self.pause(failures).await.is_err() {
                return Err(Ended::Stopped);
            }
        }
    }

    async fn try_open(&mut self, order: &Order) -> Result<Running, Problem> {
        let (node, mut todo) = (self.node.clone(), (*order.todo).clone());
        // Nothing is made for a replica that goes: it is opened only to serve what is there.
        todo.established |= todo.deletion.is_some();
        let opened = tokio::task::spawn_blocking(move || opening::open(&node, &todo)).await;
        match opened {
            Ok(Ok(opened)) => self.start_engine(opened, &order.todo),
            Ok(Err(error)) => Err(error.problem()),
            Err(panic) => Err(Problem {
                reason: "Failed",
                message: format!("opening the replica failed: {panic}"),
            }),
        }
    }

    /// Gives up the device that a former life left, while no engine runs.
    pub(super) async fn give_up_device(&mut self, order: &Order) -> Result<(), Problem> {
        let Some(device) = self.device.left_behind().cloned() else {
            return Ok(());
        };
        warn!(
            replica = order.todo.name,
            device = %device.node.display(),
            "the device of an earlier stay as primary is given up: nobody serves it again"
        );
        let runtime = self.node.runtime.clone();
        let given_up = tokio::task::spawn_blocking(move || runtime.frontends().discard(&device)).await;
        let failed = |message: String| Problem {
            reason: "DiscardFailed",
            message: format!("the device of an earlier stay as primary cannot be given up: {message}"),
        };
        given_up
            .map_err(|panic| failed(panic.to_string()))?
            .map_err(|error| failed(error.to_string()))?;
        self.device.gave_up();
        Ok(())
    }

    fn start_engine(&mut self, opened: Opened, todo: &Todo) -> Result<Running, Problem> {
        let Opened {
            dir,
            backing,
            store,
            owner,
            done,
        } = opened;
        let failed = |error: std::io::Error| Problem {
            reason: "Failed",
            message: format!("no thread for the engine: {error}"),
        };
        let handle = self
            .node
            .runtime
            .add(&todo.name, Box::new(OwnerEngine::new(owner)))
            .map_err(failed)?;
        let engine = handle.status();
        let known = engine.borrow().designation;
        let (line, end) = peers::line(FollowOrder::new(todo, known, &done));
        let local = LocalReplica {
            name: todo.resource.clone(),
            resource: todo.resource_id,
            replica: todo.replica,
            handle: handle.clone(),
            store: store.clone(),
        };
        let membership = self.node.replication.join(local, end);
        info!(replica = todo.name, data = ?backing.as_ref().map(|backing| &backing.path), "replica is open");
        Ok(Running {
            dir,
            backing,
            store,
            handle,
            done,
            tuning: None,
            line,
            membership,
            engine,
            device: std::mem::replace(&mut self.device, DeviceWatch::new(todo.replica)),
            joined: Instant::now(),
            lag: LagMeter::default(),
            rates: Default::default(),
            failed: None,
            failures: 0,
        })
    }

    /// Waits longer after each failure; a new order ends the wait. `Err`: the agent stops.
    pub(super) async fn pause(&mut self, failures: u32) -> Result<(), ()> {
        tokio::select! {
            () = self.node.stop.cancelled() => Err(()),
            () = tokio::time::sleep(pause_after(failures)) => Ok(()),
            changed = self.orders.changed() => changed.map_err(drop),
            ask = self.asks.recv() => {
                if let Some(Ask::Failover(answer)) = ask {
                    // The asker may have gone; then nobody needs the answer.
                    let _ = answer.send(Err("this replica is not open: see `mars-node-agent status`".into()));
                }
                Ok(())
            }
        }
    }

    async fn serve(&mut self, mut running: Running) -> Ended {
        loop {
            let order = self.orders.borrow_and_update().clone();
            if let Some(ended) = self.leaving(&order, &mut running).await {
                return ended;
            }
            let facts = self.observe(&order, &mut running).await;
            let plan = plan(&order.todo, &facts);
            let progress = self.execute(&order.todo, &plan, &mut running).await;
            let facts = self.observe(&order, &mut running).await;
            self.say(&order, &facts, &plan, &mut running);
            running.failures = if running.failed.is_some() {
                running.failures + 1
            } else {
                0
            };
            if progress && running.failed.is_none() {
                continue;
            }
            if self.wait(&mut running).await.is_err() {
                // A device is left to the next agent.
                running.end(&order.todo.name).await;
                return Ended::Stopped;
            }
        }
    }

    /// Whether the replica has to end here, and did: its device is gone then, its engine stopped.
    async fn leaving(&mut self, order: &Order, running: &mut Running) -> Option<Ended> {
        let ended = match (order.todo.deletion, order.forgotten) {
            (Some(_), _) => Ended::Delete,
            (None, true) => Ended::Quarantine,
            (None, false) => return None,
        };
        running.look(&self.node.runtime, Duration::ZERO).await;
        let device = running.device.presence();
        // In quarantine nothing is lost, and what nobody serves now must not be served by a replica that was given up.
        let holds = device.is_served() || matches!(ended, Ended::Delete);
        if holds && device.in_use().is_some() {
            return None;
        }
        let removed = match running.device.left_behind() {
            Some(device) if matches!(ended, Ended::Delete) => {
                let discarded = running.handle.discard(device.clone()).await;
                discarded.map_err(|error| error.to_string())
            }
            _ => running.handle.detach().await.map_err(|error| error.to_string()),
        };
        if let Err(error) = removed {
            let message = format!("the replica cannot end yet: {error}");
            running.failed = Some(Problem {
                reason: "DetachFailed",
                message,
            });
            return None;
        }
        running.end(&order.todo.name).await;
        Some(ended)
    }

    async fn observe(&self, order: &Order, running: &mut Running) -> Facts {
        let todo = &order.todo;
        let wanted = match todo.grant {
            Grant::Secondary { .. } => true,
            Grant::Primary { .. } => !todo.attach,
        };
        let device = running.handle.device().borrow().clone();
        let resize_pending = device.as_ref().is_some_and(|device| device.resize_pending);
        running.measure_disk(&todo.name);
        running
            .look(
                &self.node.runtime,
                if wanted || resize_pending {
                    USERS_WANTED
                } else {
                    USERS_IDLE
                },
            )
            .await;
        let status = running.engine.borrow_and_update().clone();
        let peers = running.line.now.borrow_and_update().clone();
        running.note(&status, &peers);
        running.follow(todo, &status, &peers);
        Facts {
            tuning: running.tuning,
            disk_bytes: running.disk_bytes(),
            copying: peers.sync_source.is_some(),
            device: running.device.presence(),
            resize_pending,
            device_behind: device.is_some_and(|device| !device.resize_pending && device.size_bytes < status.size_bytes),
            peers: peers::peer_facts(todo, &peers),
            evidence: peers::evidence(
                todo,
                &peers,
                order.from_api,
                running.joined.elapsed() >= self.node.resume_ask,
            ),
            done: running.done.clone(),
            status,
        }
    }

    fn say(&self, order: &Order, facts: &Facts, plan: &Plan, running: &mut Running) {
        let now = Instant::now();
        let peers = running.line.now.borrow().clone();
        if let Some((end, wall)) = peers.leader_end {
            running.lag.primary_at(end, now, wall);
        }
        let status = &facts.status;
        let around = Surroundings {
            boot_id: self.node.boot.0,
            node: self.node.node.0,
            replica: order.todo.replica,
            generation: order.todo.generation,
            device: running.handle.device().borrow().clone(),
            contacts: peers::contacts(&order.todo, &peers),
            lag: running
                .lag
                .lag(status.durable.lsn)
                .filter(|_| status.role == Role::Secondary),
            sync_source: peers.sync_source,
            failed: running.failed.clone(),
            invalid_spec: order.invalid.clone(),
        };
        let report = report(facts, plan, &around, &self.status.borrow().conditions);
        let [log, apply, sync] = &mut running.rates;
        let rates = Rates {
            log: log.at(status.durable.lsn.0, now),
            apply: apply.at(status.applied.lsn.0, now),
            sync: sync.at(status.sync.map_or(0, |sync| sync.done_bytes), now),
        };
        self.show(order, report, |view| {
            view.rates = rates;
            view.overlay_bytes = status.overlay_bytes;
            view.log_bytes = status.log_bytes;
            view.durable_lamport_ns = status.durable_time.0;
            view.replication_waits.clone_from(&peers.waits);
        });
    }

    /// Reports that there is no engine, and why.
    pub(super) fn say_problem(&self, problem: &Problem, order: &Order) {
        let around = Surroundings {
            boot_id: self.node.boot.0,
            node: self.node.node.0,
            replica: order.todo.replica,
            generation: order.todo.generation,
            device: None,
            contacts: Vec::new(),
            lag: None,
            sync_source: None,
            failed: None,
            invalid_spec: order.invalid.clone(),
        };
        let report = report_problem(problem, &around, &self.device.presence(), &self.status.borrow());
        self.show(order, report, |_| {});
    }

    fn show(&self, order: &Order, report: MarsReplicaStatus, more: impl FnOnce(&mut ReplicaView)) {
        let todo = &order.todo;
        let mut view = ReplicaView {
            resource: todo.resource.clone(),
            resource_uuid: todo.resource_id.0,
            replica_uuid: todo.replica.0,
            wish: match todo.grant {
                Grant::Primary { .. } => "Primary",
                Grant::Secondary { .. } => "Secondary",
            },
            status: report.clone(),
            rates: Rates::default(),
            overlay_bytes: 0,
            log_bytes: 0,
            durable_lamport_ns: 0,
            replication_waits: String::new(),
        };
        more(&mut view);
        self.node.views.send_modify(|views| {
            views.insert(todo.replica, Arc::new(view));
        });
        if **self.status.borrow() != report {
            self.status.send_replace(Arc::new(report));
        }
    }

    /// Until something has changed, or it is time to look again: after failures later, and only for what people say. `Err`: the agent stops.
    async fn wait(&mut self, running: &mut Running) -> Result<(), ()> {
        let has_failed = running.failures > 0;
        let pause = if has_failed {
            pause_after(running.failures)
        } else {
            TICK
        };
        tokio::select! {
            () = self.node.stop.cancelled() => return Err(()),
            changed = self.orders.changed() => return changed.map_err(drop),
            ask = self.asks.recv() => {
                if let Some(Ask::Failover(answer)) = ask {
                    let result = self.failover(running).await;
                    // The asker may have gone; the role is taken nevertheless.
                    let _ = answer.send(result);
                }
                return Ok(());
            }
            changed = running.engine.changed(), if !has_failed => {
                if changed.is_err() {
                    // Its engine has stopped after a failed assertion: looked at once per tick until the agent is restarted.
                    let message = "the engine has stopped; its device pauses. Look at the agent's log, then restart the agent".into();
                    running.failed = Some(Problem { reason: "EngineStopped", message });
                    tokio::time::sleep(TICK).await;
                }
            }
            changed = running.line.now.changed(), if !has_failed => {
                if changed.is_err() {
                    tokio::time::sleep(TICK).await;
                }
            }
            () = tokio::time::sleep(pause) => return Ok(()),
        }
        tokio::time::sleep(SETTLE).await;
        Ok(())
    }
}
