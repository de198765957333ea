//! The command line.
//!
//! Invariant: every command ends with 0 only if what it says has happened; errors go to stderr with what to do next.

use crate::cluster::{
    ClusterConfig, ControlRequest, Node, StateDir, UpOptions, ask_up, down, launch, parse_nodes, status, up,
};
use crate::embedded::{DEFAULT_LISTEN, EmbeddedApi, Setup, kubeconfig};
use crate::faults::Plan;
use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::ffi::OsString;
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, filter, fmt};

#[derive(Parser)]
#[command(
    name = "mars-local",
    version,
    about = "A whole MARS cluster on one machine: API, operator, agents"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct State {
    /// Directory of the cluster.
    #[arg(long, env = "MARS_LOCAL_STATE", default_value = "mars-local-state")]
    state: PathBuf,
}

impl State {
    fn open(&self) -> anyhow::Result<StateDir> {
        Ok(StateDir::new(&self.state)?)
    }
}

#[derive(Subcommand)]
enum Command {
    /// Start a cluster (or what is missing of it) and serve its API until Ctrl-C; agents and devices outlive that.
    Up(UpArgs),
    /// End everything the cluster runs and remove its devices; the data stays.
    Down {
        #[command(flatten)]
        state: State,
        /// Also when devices are in use: their users get I/O errors, mounts are detached.
        #[arg(long)]
        force: bool,
        /// Remove the state directory too, with all data in it.
        #[arg(long)]
        purge: bool,
    },
    /// Show what runs.
    Status {
        #[command(flatten)]
        state: State,
    },
    /// Do something to one node; works with and without a running `up`.
    Node {
        /// Its name.
        name: String,
        /// What to do.
        action: NodeAction,
        #[command(flatten)]
        state: State,
    },
    /// Stop or start the operator inside a running `up`.
    Operator {
        /// What to do.
        action: OperatorAction,
        #[command(flatten)]
        state: State,
    },
    /// Make the API of a running `up` misbehave, for tests.
    Faults {
        #[command(subcommand)]
        action: FaultAction,
        #[command(flatten)]
        state: State,
    },
    /// Serve only an embedded API, without operator and agents.
    Api {
        #[command(flatten)]
        state: State,
        /// Loopback address.
        #[arg(long, default_value = DEFAULT_LISTEN)]
        listen: SocketAddr,
        /// Definitions (YAML files) to install besides those of MARS.
        #[arg(long)]
        crd: Vec<PathBuf>,
    },
    /// Become another program in its own session and control group.
    #[command(hide = true)]
    Launch {
        #[arg(long)]
        cgroup_procs: Option<PathBuf>,
        #[arg(last = true, required = true)]
        program: Vec<OsString>,
    },
}

#[derive(Args)]
struct UpArgs {
    #[command(flatten)]
    state: State,
    /// Node names with commas between, or how many (named a, b, c, …). Default: those of the cluster, else a,b,c.
    #[arg(long, value_parser = |text: &str| parse_nodes(text).map(NodeList))]
    nodes: Option<NodeList>,
    /// Address of the API (loopback). Default: that of the cluster, else 127.0.0.1:7780.
    #[arg(long)]
    api: Option<SocketAddr>,
    /// Address of one node's agent; default 127.0.0.11:7777 upwards.
    #[arg(long = "node", value_name = "NAME=IP:PORT", value_parser = parse_node_address)]
    addresses: Vec<(String, SocketAddr)>,
    /// How the agents make block devices.
    #[arg(long, value_parser = ["auto", "loop", "ublk"])]
    frontend: Option<String>,
    /// A further argument of every agent, e.g. --agent-arg=--segment-bytes=1048576; recorded with the cluster.
    #[arg(long = "agent-arg", value_name = "ARGUMENT", allow_hyphen_values = true)]
    agent_args: Vec<String>,
    /// Do not run the operator.
    #[arg(long)]
    no_operator: bool,
}

#[derive(Clone)]
struct NodeList(Vec<String>);

#[derive(Clone, Copy, ValueEnum)]
enum NodeAction {
    /// Ask the agent to end; the keeper lives on.
    Stop,
    /// SIGKILL to the agent's control group; the keeper lives on, nobody restarts the agent.
    Kill,
    /// Start what is missing.
    Start,
    /// The machine dies: agent, keeper and devices are gone, a new boot id is written.
    Poweroff,
    /// Poweroff, then start.
    Reboot,
}

#[derive(Clone, Copy, ValueEnum)]
enum OperatorAction {
    /// Stop it.
    Stop,
    /// Start it.
    Start,
}

#[derive(Subcommand)]
enum FaultAction {
    /// Set a plan (JSON file, `-` for stdin); see the crate documentation of `faults::Plan`.
    Set {
        /// The file.
        plan: PathBuf,
    },
    /// No more faults.
    Clear,
    /// Serve nobody for this many milliseconds.
    Outage {
        /// How long.
        millis: u64,
    },
    /// Cut all watches.
    Cut,
    /// Forget the history: watches that resume get 410 Gone.
    Compact,
}

fn parse_node_address(text: &str) -> Result<(String, SocketAddr), String> {
    let (name, address) = text.split_once('=').ok_or("NAME=IP:PORT")?;
    let address = address.parse().map_err(|e| format!("{address:?} is no IP:PORT: {e}"))?;
    Ok((name.to_owned(), address))
}

/// Parses the command line and runs it.
#[must_use]
pub fn run() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Up(args) => run_up(args),
        Command::Down { state, force, purge } => {
            log_to_stderr();
            state.open().and_then(|state| down(&state, force, purge))
        }
        Command::Status { state } => run_status(&state),
        Command::Node { name, action, state } => run_node(&name, action, &state),
        Command::Operator { action, state } => {
            let request = match action {
                OperatorAction::Stop => ControlRequest::OperatorStop,
                OperatorAction::Start => ControlRequest::OperatorStart,
            };
            run_control(&state, &request)
        }
        Command::Faults { action, state } => run_faults(action, &state),
        Command::Api { state, listen, crd } => {
            log_to_stderr();
            state.open().and_then(|state| serve_api(&state, listen, &crd))
        }
        Command::Launch { cgroup_procs, program } => run_launch(cgroup_procs.as_deref(), &program),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mars-local: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn env_filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into())
}

fn log_to_stderr() {
    tracing_subscriber::registry()
        .with(env_filter())
        .with(fmt::layer().with_writer(std::io::stderr))
        .init();
}

/// Logs to stderr, and to `<state>/logs/operator.log` and `api.log`. Only the first call counts.
///
/// # Errors
/// The files cannot be opened.
pub(crate) fn log_to(state: &StateDir) -> anyhow::Result<()> {
    static DONE: OnceLock<()> = OnceLock::new();
    if DONE.set(()).is_err() {
        return Ok(());
    }
    let open = |name: &str| -> anyhow::Result<Arc<File>> {
        let path = state.log(name);
        let file = File::options().create(true).append(true).open(&path);
        Ok(Arc::new(file.with_context(|| format!("opening {}", path.display()))?))
    };
    let is_operator = |metadata: &tracing::Metadata<'_>| metadata.target().starts_with("mars_operator");
    let to_file = |file: Arc<File>, operator: bool| {
        let mine = filter::filter_fn(move |metadata| is_operator(metadata) == operator);
        fmt::layer()
            .with_ansi(false)
            .with_writer(file)
            .with_filter(env_filter())
            .with_filter(mine)
            .boxed()
    };
    let to_stderr = fmt::layer()
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .with_filter(env_filter())
        .boxed();
    let layers = vec![
        to_stderr,
        to_file(open("operator")?, true),
        to_file(open("api")?, false),
    ];
    // A subscriber that is there already (a test's) stays.
    let _ = tracing_subscriber::registry().with(layers).try_init();
    Ok(())
}

/// Cancelled by SIGINT and SIGTERM.
fn stop_on_signals() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let stop = CancellationToken::new();
    let token = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        token.cancel();
    });
    Ok(stop)
}

#[tokio::main]
async fn run_up(args: UpArgs) -> anyhow::Result<()> {
    let state = args.state.open()?;
    let options = UpOptions {
        nodes: args.nodes.map(|list| list.0),
        addresses: args.addresses,
        api: args.api,
        frontend: args.frontend,
        agent_args: args.agent_args,
        no_operator: args.no_operator,
    };
    up(&state, options, stop_on_signals()?).await
}

#[tokio::main(flavor = "current_thread")]
async fn run_status(state: &State) -> anyhow::Result<()> {
    print!("{}", status(&state.open()?).await?);
    Ok(())
}

fn run_node(name: &str, action: NodeAction, state: &State) -> anyhow::Result<()> {
    log_to_stderr();
    let state = state.open()?;
    let config = ClusterConfig::load(&state)?;
    let node = Node::new(&state, &config, config.node(name)?);
    match action {
        NodeAction::Stop => node.stop(),
        NodeAction::Kill => node.kill(),
        NodeAction::Start => node.start(),
        NodeAction::Poweroff => node.poweroff(),
        NodeAction::Reboot => node.reboot(),
    }?;
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn run_control(state: &State, request: &ControlRequest) -> anyhow::Result<()> {
    let socket = state.open()?.control_socket();
    ask_up(&socket, request).await.map(drop).map_err(anyhow::Error::msg)
}

fn run_faults(action: FaultAction, state: &State) -> anyhow::Result<()> {
    let request = match action {
        FaultAction::Set { plan } => {
            let text = if plan.as_os_str() == "-" {
                std::io::read_to_string(std::io::stdin())
            } else {
                std::fs::read_to_string(&plan)
            };
            let text = text.with_context(|| format!("reading {}", plan.display()))?;
            let plan: Plan = serde_json::from_str(&text).with_context(|| format!("parsing {}", plan.display()))?;
            ControlRequest::Faults { plan: Some(plan) }
        }
        FaultAction::Clear => ControlRequest::Faults { plan: None },
        FaultAction::Outage { millis } => ControlRequest::Outage { millis },
        FaultAction::Cut => ControlRequest::CutWatches,
        FaultAction::Compact => ControlRequest::Compact,
    };
    run_control(state, &request)
}

#[tokio::main]
async fn serve_api(state: &StateDir, listen: SocketAddr, crds: &[PathBuf]) -> anyhow::Result<()> {
    let mut setup = Setup {
        listen,
        definitions: crate::mars::definitions(),
        admission: crate::mars::admission(),
        ..Setup::bare()
    };
    for path in crds {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        setup
            .definitions
            .push(serde_yaml::from_str(&text).with_context(|| format!("parsing {}", path.display()))?);
    }
    let api = EmbeddedApi::start(&state.join("api"), setup).await?;
    let config = state.kubeconfig();
    std::fs::write(&config, kubeconfig(&api.url())).with_context(|| format!("writing {}", config.display()))?;
    tracing::info!(url = api.url(), kubeconfig = %config.display(), "the API is served; Ctrl-C ends it");
    stop_on_signals()?.cancelled().await;
    api.stop().await;
    Ok(())
}

fn run_launch(group: Option<&std::path::Path>, program: &[OsString]) -> anyhow::Result<()> {
    let Some((program, arguments)) = program.split_first() else {
        anyhow::bail!("no program");
    };
    let arguments: Vec<String> = arguments.iter().map(|a| a.to_string_lossy().into_owned()).collect();
    let error = launch(group, std::path::Path::new(program), &arguments);
    Err(anyhow::Error::new(error).context(format!("starting {}", program.to_string_lossy())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
        for line in [
            "mars-local up --state s --nodes a,b --api 127.0.0.1:1 --node a=127.0.0.9:1 --frontend loop --agent-arg=--x",
            "mars-local node a poweroff --state s",
            "mars-local operator stop --state s",
            "mars-local faults --state s outage 500",
            "mars-local down --state s --force --purge",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
        for line in [
            "mars-local up --nodes A",
            "mars-local node a explode",
            "mars-local up --frontend magic",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_err(), "{line}");
        }
    }
}
