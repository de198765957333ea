//! `up`, `down` and `status`.
//!
//! Invariants:
//! - `up` is the only one of its state directory (the API store's lock says so) and its end ends nothing but API, operator and
//!   supervision: agents, keepers and devices run on, and the next `up` adopts them.
//! - `down` removes nothing that is in use unless forced, and never data unless told to purge.

use super::config::{ConfigError, DEFAULT_API, Wish};
use super::control::{self, Request};
use super::node::{Node, program};
use super::operator::{NAMESPACE, OperatorSlot};
use super::process::Process;
use super::{ClusterConfig, StateDir, file_error, supervise, write_private};
use crate::embedded::{DEFAULT_HISTORY_LIMIT, EmbeddedApi, Setup, StartError, kubeconfig};
use anyhow::{Context as _, bail};
use kube::api::{Api, ListParams};
use mars_crds::{CLUSTER_SECRET, CLUSTER_UUID_KEY, MarsNode};
use mars_engine::types::ClusterId;
use mars_node_agent::replication::pki::Authority;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How often to say which nodes are missing.
const REMIND_EVERY: Duration = Duration::from_secs(15);
/// How long `down` waits for a running `up`.
const UP_ENDS_WITHIN: Duration = Duration::from_secs(20);

/// What `up` was asked for.
#[derive(Clone, Debug, Default)]
pub struct UpOptions {
    /// Node names.
    pub nodes: Option<Vec<String>>,
    /// Addresses of single nodes.
    pub addresses: Vec<(String, SocketAddr)>,
    /// Address of the API.
    pub api: Option<SocketAddr>,
    /// Frontend of the agents.
    pub frontend: Option<String>,
    /// Further arguments of agents.
    pub agent_args: Vec<String>,
    /// Do not start the operator.
    pub no_operator: bool,
}

/// A cluster that is being brought up.
struct Up {
    state: StateDir,
    config: ClusterConfig,
    nodes: Vec<Node>,
    api: Arc<EmbeddedApi>,
    operator: Arc<OperatorSlot>,
}

/// Checks that can be made before anything is written.
fn preflight() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("mars-local up makes block devices and control groups: run it as root (only the API: mars-local api)");
    }
    for name in ["mars-node-agent", "mars-device-keeper"] {
        program(name)?;
    }
    Ok(())
}

/// Before anything is written: a taken port must not leave half a cluster behind.
fn check_port(state: &StateDir, wish: Option<SocketAddr>) -> anyhow::Result<()> {
    let recorded = || ClusterConfig::load(state).ok().map(|config| config.api);
    let api = wish.or_else(recorded).unwrap_or(DEFAULT_API);
    if !api.ip().is_loopback() {
        return Err(StartError::NotLoopback(api).into());
    }
    std::net::TcpListener::bind(api).map(drop).with_context(|| {
        format!("the API cannot listen on {api} (another mars-local up, or another program?); choose another address with --api")
    })
}

/// Runs a cluster until SIGINT or SIGTERM; prints `ready` on stdout once all wanted nodes are there.
///
/// # Errors
/// Not root, programs missing, port taken, a state directory that cannot be used.
pub async fn up(state: &StateDir, options: UpOptions, stop: CancellationToken) -> anyhow::Result<()> {
    preflight()?;
    check_port(state, options.api)?;
    let no_operator = options.no_operator;
    let up = Up::prepare(state, options).await?;
    let pid_file = state.join("run/up.json");
    if let Some(process) = Process::observe(std::process::id()) {
        process.save(&pid_file)?;
    }
    let tasks = TaskTracker::new();
    if !no_operator {
        up.operator.start().await;
    }
    for node in &up.nodes {
        if !node.wanted().agent {
            tracing::warn!(
                node = node.name(),
                "this node was stopped and stays so; start it with: mars-local node NAME start"
            );
        }
        tasks.spawn(supervise::run(node.clone(), up.api.client()?, stop.clone()));
    }
    let control = tokio::spawn(control_loop(
        state.control_socket(),
        Arc::clone(&up.api),
        Arc::clone(&up.operator),
    ));
    let mut ready = std::pin::pin!(up.wait_ready());
    let mut said = false;
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            outcome = &mut ready, if !said => {
                outcome?;
                said = true;
                say_ready();
            }
        }
    }
    tracing::info!("API and operator end; agents and devices run on (mars-local down ends them)");
    control.abort();
    up.operator.stop().await;
    tasks.close();
    tasks.wait().await;
    let _ = std::fs::remove_file(pid_file);
    let _ = std::fs::remove_file(state.control_socket());
    up.api.stop().await;
    Ok(())
}

#[expect(clippy::print_stdout, reason = "the one word that scripts wait for")]
fn say_ready() {
    println!("ready");
}

impl Up {
    async fn prepare(state: &StateDir, options: UpOptions) -> anyhow::Result<Self> {
        let recorded = ClusterConfig::load(state).ok();
        let wish = Wish {
            nodes: options.nodes,
            addresses: options.addresses,
            api: options.api,
            frontend: options.frontend,
            agent_args: options.agent_args,
        };
        if let (Some(recorded), Some(api)) = (&recorded, wish.api) {
            check_api_address(state, recorded, api)?;
        }
        let config = ClusterConfig::load_or_create(state, &wish)?;
        for dir in ["run", "logs", "nodes"] {
            let dir = state.join(dir);
            std::fs::create_dir_all(&dir).map_err(file_error("making directory", &dir))?;
        }
        crate::cli::log_to(state)?;
        let setup = Setup {
            listen: config.api,
            definitions: crate::mars::definitions(),
            admission: crate::mars::admission(),
            history: DEFAULT_HISTORY_LIMIT,
        };
        let api = EmbeddedApi::start(&state.join("api"), setup).await?;
        write_private(&state.kubeconfig(), kubeconfig(&api.url()).as_bytes())?;
        seed(&api, &config)?;
        let authority = Authority::load_or_create(&state.join("pki"), ClusterId(config.cluster_uuid))?;
        let nodes: Vec<Node> = config
            .nodes
            .iter()
            .map(|node| Node::new(state, &config, node))
            .collect();
        for node in &nodes {
            node.prepare(&authority)?;
        }
        let operator = Arc::new(OperatorSlot::new(api.client()?, config.cluster_uuid));
        Ok(Self {
            state: state.clone(),
            config,
            nodes,
            api: Arc::new(api),
            operator,
        })
    }

    /// Waits until every wanted node has a MarsNode with an address.
    async fn wait_ready(&self) -> anyhow::Result<()> {
        let api: Api<MarsNode> = Api::all(self.api.client()?);
        let mut remind = tokio::time::Instant::now() + REMIND_EVERY;
        loop {
            let present: Vec<String> = api
                .list(&ListParams::default())
                .await
                .map(|list| list.items)
                .unwrap_or_default()
                .into_iter()
                .filter(|node| node.status.as_ref().is_some_and(|status| !status.address.is_empty()))
                .filter_map(|node| node.metadata.name)
                .collect();
            let missing: Vec<&str> = self
                .nodes
                .iter()
                .filter(|node| node.wanted().agent)
                .map(Node::name)
                .filter(|name| !present.iter().any(|p| p == name))
                .collect();
            if missing.is_empty() {
                return Ok(());
            }
            if tokio::time::Instant::now() > remind {
                let logs = self.state.join("logs");
                tracing::warn!(nodes = missing.join(","), logs = %logs.display(), cluster = %self.config.cluster_uuid, "still waiting for the MarsNodes of these nodes; their logs say why");
                remind = tokio::time::Instant::now() + REMIND_EVERY;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Running agents have the old address; they would lose the API for good.
fn check_api_address(state: &StateDir, recorded: &ClusterConfig, api: SocketAddr) -> anyhow::Result<()> {
    let running = recorded
        .nodes
        .iter()
        .find(|n| Node::new(state, recorded, n).processes().0.pid.is_some());
    if let Some(node) = running.filter(|_| recorded.api != api) {
        bail!(
            "the agent of node {} runs and knows the API as {}; use that address, or end the cluster first: mars-local down --state {}",
            node.name,
            recorded.api,
            state.path().display()
        );
    }
    Ok(())
}

/// What a MARS cluster has from the start: the operator's namespace and the cluster's identity.
fn seed(api: &EmbeddedApi, config: &ClusterConfig) -> anyhow::Result<()> {
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
    api.api().ensure("", "namespaces", namespace)?;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "Opaque", "immutable": true,
        "metadata": {"name": CLUSTER_SECRET, "namespace": NAMESPACE},
        "stringData": {CLUSTER_UUID_KEY: config.cluster_uuid.to_string()}});
    api.api().ensure("", "secrets", secret)?;
    let key = crate::storage::Key {
        kind: "core/secrets".into(),
        namespace: NAMESPACE.into(),
        name: CLUSTER_SECRET.into(),
    };
    let stored = api
        .api()
        .store
        .get(&key)
        .map(|o| o.value["data"][CLUSTER_UUID_KEY].clone())
        .unwrap_or_default();
    let ours = base64::Engine::encode(
        &base64::engine::general_purpose::STANDARD,
        config.cluster_uuid.to_string(),
    );
    if stored != Value::String(ours) {
        bail!(
            "the API objects in this state directory belong to another cluster than its cluster.json says ({}): the directory was put together from two; restore it from one backup",
            config.cluster_uuid
        );
    }
    Ok(())
}

async fn control_loop(socket: std::path::PathBuf, api: Arc<EmbeddedApi>, operator: Arc<OperatorSlot>) {
    let handle = move |request: Request| {
        let (api, operator) = (Arc::clone(&api), Arc::clone(&operator));
        async move {
            Ok(match request {
                Request::Status => json!({"api": api.url(), "operator": operator.runs().await,
                    "revision": api.api().store.revision(), "faults": api.api().faults.plan()}),
                Request::OperatorStop => json!({"stopped": operator.stop().await}),
                Request::OperatorStart => json!({"started": operator.start().await}),
                Request::Faults { plan } => {
                    api.api().faults.set(plan);
                    json!({})
                }
                Request::Outage { millis } => {
                    api.api().faults.outage(Duration::from_millis(millis));
                    json!({})
                }
                Request::CutWatches => {
                    api.api().faults.cut_watches();
                    json!({})
                }
                Request::Compact => {
                    api.api().store.compact();
                    json!({})
                }
            })
        }
    };
    if let Err(error) = control::serve(&socket, handle).await {
        tracing::error!(socket = %socket.display(), %error, "the control socket cannot be served; commands to the operator will fail");
    }
}

/// Ends everything the cluster runs; with `purge` also removes the state directory.
///
/// # Errors
/// No cluster there, a device is in use (without `force`), or a process does not end.
pub fn down(state: &StateDir, force: bool, purge: bool) -> anyhow::Result<()> {
    let config = match ClusterConfig::load(state) {
        Err(ConfigError::Absent(path)) => {
            bail!("{path} holds no cluster, nothing was ended; name the directory of the cluster with --state")
        }
        loaded => loaded?,
    };
    let nodes: Vec<Node> = config
        .nodes
        .iter()
        .map(|node| Node::new(state, &config, node))
        .collect();
    let users: Vec<String> = nodes.iter().flat_map(Node::device_users).collect();
    if !users.is_empty() && !force {
        bail!(
            "devices are in use, nothing was ended:\n  {}\nend these users, or use --force (they get I/O errors)",
            users.join("\n  ")
        );
    }
    if let Some(process) = Process::load(&state.join("run/up.json"))
        && !process.end(UP_ENDS_WITHIN)
    {
        tracing::warn!(pid = process.pid, "mars-local up did not end in time and was killed");
    }
    let failed: Vec<String> = std::thread::scope(|scope| {
        let ends: Vec<_> = nodes
            .iter()
            .map(|node| {
                scope.spawn(move || {
                    if force {
                        node.unmount_lazily();
                    }
                    node.shut_down().err().map(|error| error.to_string())
                })
            })
            .collect();
        ends.into_iter()
            .filter_map(|end| end.join().unwrap_or_else(|_| Some("a thread failed".into())))
            .collect()
    });
    if !failed.is_empty() {
        bail!("{}", failed.join("; "));
    }
    Node::remove_groups(&config);
    for file in ["run/up.json", "run/control.sock"] {
        let _ = std::fs::remove_file(state.join(file));
    }
    if purge {
        std::fs::remove_dir_all(state.path()).with_context(|| format!("removing {}", state.path().display()))?;
    }
    Ok(())
}

/// What runs, as a table for people.
///
/// # Errors
/// No cluster there.
pub async fn status(state: &StateDir) -> anyhow::Result<String> {
    let config = ClusterConfig::load(state)?;
    let mut lines = vec![format!("cluster  {}", config.cluster_uuid)];
    match control::ask(&state.control_socket(), &Request::Status).await {
        Ok(answer) => {
            lines.push(format!(
                "api      http://{} (kubeconfig {})",
                config.api,
                state.kubeconfig().display()
            ));
            let runs = answer["operator"] == json!(true);
            lines.push(format!("operator {}", if runs { "runs" } else { "stopped" }));
            if !answer["faults"].is_null() {
                lines.push(format!("faults   {}", answer["faults"]));
            }
        }
        Err(_) => lines.extend(["api      stopped".to_owned(), "operator stopped".to_owned()]),
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<12} {:<20} {:<24} {:<24}",
        "NODE", "ADDRESS", "AGENT", "KEEPER"
    ));
    for node in &config.nodes {
        let (agent, keeper) = Node::new(state, &config, node).processes();
        let word = |process: super::ProcessState| match (process.pid, process.wanted) {
            (Some(pid), _) => format!("runs (pid {pid})"),
            (None, true) => "does not run".into(),
            (None, false) => "stopped".into(),
        };
        lines.push(format!(
            "{:<12} {:<20} {:<24} {:<24}",
            node.name,
            node.address,
            word(agent),
            word(keeper)
        ));
    }
    lines.push(String::new());
    Ok(lines.join("\n"))
}
