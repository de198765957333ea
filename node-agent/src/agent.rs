//! The running agent: puts the parts together in the one order that is safe, and takes them apart again.
//!
//! ```text
//!  lock of the state directory → identity, boot, cluster → ports → frontends, shards, replication
//!   → replicas from the cache → API watch, MarsNode → (signal) → drain → engines saved → lock released
//! ```
//!
//! Signals: SIGTERM means that this agent ends. Devices in use are served on for `--drain-timeout-s`; what is still in use
//! then is left to the device keeper (its users pause until the next agent takes over). A second SIGTERM, SIGINT, or SIGUSR1
//! leaves devices at once: for a restart whose successor waits already. SIGKILL is always safe (P1).
//!
//! Invariant: nothing is served before the lock is held, and the lock is held until the last engine is saved.

use crate::config::{ConfigError, RunArgs};
use crate::frontend::harden::Hardening;
use crate::frontend::{FrontendChoice, FrontendError, Frontends, FrontendsConfig};
use crate::identity::{BootId, Identity, IdentityError};
use crate::layout::{DirLock, Layout, LayoutError};
use crate::link::ReplicationLink;
use crate::local_socket::{self, SocketError};
use crate::metrics::{self, MetricsError};
use crate::node_status::{NodeReporter, cached_spec, pool_wishes};
use crate::pool::{PoolError, Pools};
use crate::reconcile::cache::Cache;
use crate::reconcile::context::{NodeContext, Views};
use crate::reconcile::object::TuningDefaults;
use crate::reconcile::sink::{Sink, SinkError};
use crate::reconcile::source;
use crate::reconcile::supervisor::Supervisor;
use crate::replication::clock::SharedClock;
use crate::shard::{ReplicaHandle, Runtime, RuntimeConfig};
use mars_engine::types::ClusterId;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{info, warn};

/// How long a starting agent waits for one that still shuts down.
const LOCK_WAIT: Duration = Duration::from_mins(1);
/// How long engines get to save everything at the end.
const SAVE_LIMIT: Duration = Duration::from_secs(30);
/// Between two attempts to learn the cluster's uuid.
const CLUSTER_RETRY: Duration = Duration::from_secs(2);
/// Messages of the API watch that may wait for the supervisor.
const UPDATES: usize = 64;

/// Why the agent does not run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Options.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Directories.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Pools.
    #[error(transparent)]
    Pools(#[from] PoolError),
    /// Frontends.
    #[error(transparent)]
    Frontend(#[from] FrontendError),
    /// The local socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Metrics.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// Replication.
    #[error(transparent)]
    Replication(#[from] crate::link::LinkError),
    /// The way to the API server.
    #[error("{path}: {reason}. Give a readable --kubeconfig, or run inside the cluster", path = path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The name of the frontend.
    #[error("--frontend: {0}")]
    FrontendName(String),
    /// Threads, signals.
    #[error("{what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> AgentError {
    move |source| AgentError::System { what, source }
}

/// Runs the agent until it is told to end.
///
/// # Errors
/// See [`AgentError`]: it does not start.
pub async fn run(args: RunArgs, hardening: Hardening) -> Result<(), AgentError> {
    args.check()?;
    let frontend: FrontendChoice = args.frontend.parse().map_err(AgentError::FrontendName)?;
    let mut signals = Signals::listen()?;
    let layout = args.layout();
    // What is wrong with the way to the API server is said before anything is touched.
    let sink = sink(&args).await?;
    let Some(lock) = take_lock(&layout, &mut signals).await? else {
        return Ok(());
    };
    let boot = BootId::read(args.boot_id_file.as_deref())?;
    let mut identity = Identity::load_or_create(&layout, &args.node_name)?;
    let Some(cluster) = learn_cluster(&args, &sink, &mut identity, &mut signals).await? else {
        return Ok(());
    };
    info!(node = args.node_name, uuid = %identity.node(), %cluster, boot = %boot.0, "starting");
    let parts = Parts {
        layout,
        identity,
        cluster,
        boot,
        sink,
        frontend,
    };
    let running = Running::start(args, hardening, parts).await?;
    running.until_told(&mut signals).await;
    running.end().await;
    drop(lock);
    info!("ended");
    Ok(())
}

async fn sink(args: &RunArgs) -> Result<Sink, AgentError> {
    if let Some(dir) = &args.spec_dir {
        return Ok(Sink::Dir(dir.clone()));
    }
    let path = args
        .kubeconfig
        .clone()
        .unwrap_or_else(|| PathBuf::from("in-cluster configuration"));
    let failed = |reason: String| AgentError::Kubeconfig {
        path: path.clone(),
        reason,
    };
    let config = match &args.kubeconfig {
        Some(file) => {
            let kubeconfig = kube::config::Kubeconfig::read_from(file).map_err(|error| failed(error.to_string()))?;
            let options = kube::config::KubeConfigOptions::default();
            kube::Config::from_custom_kubeconfig(kubeconfig, &options)
                .await
                .map_err(|error| failed(error.to_string()))?
        }
        None => kube::Config::incluster().map_err(|error| failed(error.to_string()))?,
    };
    Ok(Sink::Api(
        kube::Client::try_from(config).map_err(|error| failed(error.to_string()))?,
    ))
}

/// Takes the lock of the node; an agent that is still saving gets its time. `None`: told to end meanwhile.
async fn take_lock(layout: &Layout, signals: &mut Signals) -> Result<Option<DirLock>, AgentError> {
    let deadline = Instant::now() + LOCK_WAIT;
    let mut said = false;
    loop {
        match layout.prepare() {
            Ok(lock) => return Ok(Some(lock)),
            Err(error @ LayoutError::Locked { .. }) if Instant::now() < deadline => {
                if !std::mem::replace(&mut said, true) {
                    warn!("{error}; waiting for it for {} s", LOCK_WAIT.as_secs());
                }
            }
            Err(error) => return Err(error.into()),
        }
        tokio::select! {
            _ = signals.any() => return Ok(None),
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
    }
}

/// The cluster this node belongs to, from whoever knows it; everybody who knows must agree (A-61). `None`: told to end
/// while waiting for the API server.
async fn learn_cluster(
    args: &RunArgs,
    sink: &Sink,
    identity: &mut Identity,
    signals: &mut Signals,
) -> Result<Option<ClusterId>, AgentError> {
    if let Some(given) = args.cluster_uuid {
        identity.adopt(ClusterId(given))?;
    }
    let mut said = false;
    loop {
        let asked = sink.cluster_uuid(&args.namespace).await;
        let told = match asked {
            Ok(Some(told)) => {
                identity.adopt(ClusterId(told))?;
                None
            }
            Ok(None) => Some(SinkError::Value(
                "it has no Secret mars-cluster yet: is the operator running?".into(),
            )),
            Err(error) => Some(error),
        };
        if let Some(cluster) = identity.cluster() {
            return Ok(Some(cluster));
        }
        if let Some(reason) = told.filter(|_| !std::mem::replace(&mut said, true)) {
            warn!(
                "this node belongs to no cluster yet, and the API server does not tell ({reason}); asking again. Or give --cluster-uuid"
            );
        }
        tokio::select! {
            _ = signals.any() => return Ok(None),
            () = tokio::time::sleep(CLUSTER_RETRY) => {}
        }
    }
}

/// What was found out before anything runs.
struct Parts {
    layout: Layout,
    identity: Identity,
    cluster: ClusterId,
    boot: BootId,
    sink: Sink,
    frontend: FrontendChoice,
}

/// The agent while it runs.
struct Running {
    node: Arc<NodeContext>,
    args: RunArgs,
    tracker: TaskTracker,
}

impl Running {
    async fn start(args: RunArgs, hardening: Hardening, parts: Parts) -> Result<Running, AgentError> {
        let Parts {
            layout,
            identity,
            cluster,
            boot,
            sink,
            frontend,
        } = parts;
        let (stop, tracker) = (CancellationToken::new(), TaskTracker::new());
        let clock = Arc::new(SharedClock::default());
        let node_id = identity.node();
        let link = ReplicationLink::start(&args, cluster, node_id, clock.clone(), &tracker, stop.clone()).await?;
        let mut pools = Pools::load(&layout.node_dir(), identity.node().0)?;
        pools.configure(pool_wishes(&args, &cached_spec(&layout.node_dir())));
        let node = Arc::new(NodeContext {
            node_name: args.node_name.clone(),
            node: identity.node(),
            cluster,
            boot,
            pools: Mutex::new(pools),
            cache: Cache::new(&layout),
            sink,
            runtime: devices(&args, &layout)?,
            replication: Arc::new(link),
            clock,
            frontend,
            tuning: TuningDefaults {
                overlay_budget_bytes: args.overlay_bytes(),
                segment_bytes: args.segment_bytes,
            },
            resume_ask: args.resume_ask(),
            stop: stop.clone(),
            views: watch::channel(Views::new()).0,
            layout,
        });
        let ready = Arc::new(AtomicBool::new(false));
        if let Some(address) = args.metrics_address {
            tracker.spawn(metrics::serve(address, node.clone(), ready.clone(), stop.clone()).await?);
        }
        let (request_to, requests) = mpsc::channel(UPDATES);
        tracker.spawn(local_socket::serve(node.clone(), request_to.clone())?);
        let supervisor = Supervisor::start(node.clone(), tracker.clone())?;
        let (update_to, updates) = mpsc::channel(UPDATES);
        tracker.spawn(supervisor.run(updates, requests));
        match (&node.sink, &args.spec_dir) {
            (Sink::Api(client), _) => {
                tracker.spawn(source::watch_api(
                    client.clone(),
                    args.node_name.clone(),
                    update_to,
                    stop.clone(),
                ));
            }
            (Sink::Dir(dir), _) => {
                tracker.spawn(source::watch_dir(
                    dir.clone(),
                    args.node_name.clone(),
                    update_to,
                    stop.clone(),
                ));
            }
        }
        let reporter = NodeReporter {
            node: node.clone(),
            args: args.clone(),
            hardening,
            requests: request_to,
        };
        tracker.spawn(reporter.run());
        ready.store(true, Ordering::Relaxed);
        Ok(Running { node, args, tracker })
    }

    /// Serves until a signal says otherwise, and then until devices are closed or the time for that is over.
    async fn until_told(&self, signals: &mut Signals) {
        if signals.any().await == Told::Leave {
            info!("told to leave devices to the next agent");
            return;
        }
        let limit = self.args.drain_timeout();
        let deadline = Instant::now() + limit;
        let mut said = Vec::new();
        loop {
            let in_use = self.in_use();
            if in_use.is_empty() {
                info!("told to end; no device is in use");
                return;
            }
            if in_use != said {
                warn!(
                    "told to end; devices in use are served for up to {} s: {}",
                    limit.as_secs(),
                    in_use.join("; ")
                );
                said = in_use;
            }
            tokio::select! {
                _ = signals.any() => return info!("told again: devices in use are left to the next agent"),
                () = tokio::time::sleep_until(deadline) => {
                    return warn!("devices still in use are left to the next agent; their users pause until it takes over");
                }
                () = tokio::time::sleep(Duration::from_millis(500)) => {}
            }
        }
    }

    /// Devices that are served here, with their users, in words. One that nobody serves cannot be waited for.
    fn in_use(&self) -> Vec<String> {
        let views = self.node.views.borrow().clone();
        let used = |view: &Arc<crate::reconcile::context::ReplicaView>| {
            let users: Vec<&str> = view.status.opened_by.iter().map(|user| user.name.as_str()).collect();
            let is_served = view.status.device.is_some();
            (is_served && !users.is_empty()).then(|| format!("{} by {}", view.resource, users.join(", ")))
        };
        views.values().filter_map(used).collect()
    }

    async fn end(self) {
        self.node.stop.cancel();
        self.tracker.close();
        if tokio::time::timeout(SAVE_LIMIT, self.tracker.wait()).await.is_err() {
            warn!(
                "not everything was saved within {} s: what was acknowledged is in the log and is recovered at the next start",
                SAVE_LIMIT.as_secs()
            );
        }
    }
}

fn devices(args: &RunArgs, layout: &Layout) -> Result<Runtime, AgentError> {
    let frontends = Arc::new(Frontends::new(&FrontendsConfig {
        link_dir: layout.dev_dir.clone(),
        keeper_socket: Some(args.keeper_socket()),
        ublk_state_dir: Some(args.run_dir.join("ublk")),
    }));
    // Links of a former life may lead to devices that belong to somebody else by now; those of devices that live on are made
    // again when they are taken over.
    for link in ReplicaHandle::remove_stale_links(&frontends, &[])? {
        info!(link = %link.display(), "removed a link of a former life");
    }
    Runtime::start(&RuntimeConfig::default(), frontends).map_err(system("cannot start the threads of engines"))
}

/// What a signal means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// End, but serve devices in use for a while.
    End,
    /// Leave devices to the next agent at once.
    Leave,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    user: Signal,
}

impl Signals {
    fn listen() -> Result<Signals, AgentError> {
        let listen = |kind| signal(kind).map_err(system("cannot listen for signals"));
        Ok(Signals {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            user: listen(SignalKind::user_defined1())?,
        })
    }

    async fn any(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::End,
            _ = self.interrupt.recv() => Told::Leave,
            _ = self.user.recv() => Told::Leave,
        }
    }
}
