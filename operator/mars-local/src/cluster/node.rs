//! One node: its directories, its two processes, and what can happen to it.
//!
//! Invariants: everything that starts or ends a process runs under the node's lock; `wanted.json` says what is to run before
//! anything is done about it, so that a supervisor never undoes what a command does.

use super::cgroup::Groups;
use super::config::{ClusterConfig, NodeConfig};
use super::launch::{Launch, own_program};
use super::process::{Process, kernel_boot_id};
use super::{FileError, StateDir, devices, file_error, write_private};
use mars_engine::types::{ClusterId, NodeId};
use mars_node_agent::identity::{Identity, IdentityError};
use mars_node_agent::layout::{Layout, LayoutError};
use mars_node_agent::replication::pki::{Authority, NODE_VALIDITY, PkiError};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long an agent may drain after SIGTERM; above its own default of 20 s.
const AGENT_GRACE: Duration = Duration::from_secs(30);
/// How long a keeper gets after SIGTERM.
const KEEPER_GRACE: Duration = Duration::from_secs(5);
/// How long a keeper may take until its socket is there.
const KEEPER_READY: Duration = Duration::from_secs(10);
/// How long to wait for another command on the same node.
const LOCK_WITHIN: Duration = Duration::from_mins(1);
/// Certificates are made anew when older than this.
const RENEW_AFTER: Duration = Duration::from_hours(24 * 200);

/// Why something could not be done with a node.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// Trouble with a file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its directories.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Its identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// Its certificates.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// A process could not be started.
    #[error("starting {program} for node {node}: {problem}")]
    Start {
        /// Which node.
        node: String,
        /// Which program.
        program: String,
        /// What happened.
        problem: String,
    },
    /// A program is not there.
    #[error("{0} is missing; build it with: cargo build -p mars-node-agent --bins (or set MARS_BIN_DIR)")]
    NoProgram(PathBuf),
    /// Somebody else works on the node.
    #[error("another command works on node {0} for more than {1} s; wait for it, or see who holds {2}")]
    Locked(String, u64, PathBuf),
    /// A process did not end.
    #[error(
        "{what} of node {node} does not end even after SIGKILL (pid {pid}): it hangs in the kernel; see /proc/{pid}/stack"
    )]
    Stuck {
        /// Which node.
        node: String,
        /// agent or keeper.
        what: &'static str,
        /// Its pid.
        pid: u32,
    },
}

/// Which processes of a node are to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The agent.
    pub agent: bool,
    /// The device keeper.
    pub keeper: bool,
}

/// One of the two processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Agent,
    Keeper,
}

impl Role {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Keeper => "keeper",
        }
    }

    fn program(self) -> &'static str {
        match self {
            Self::Agent => "mars-node-agent",
            Self::Keeper => "mars-device-keeper",
        }
    }
}

/// What a process of a node does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProcessState {
    /// Its pid, if it runs.
    pub pid: Option<u32>,
    /// Since when.
    pub since: Option<String>,
    /// Whether it is to run.
    pub wanted: bool,
}

/// A node of a cluster.
#[derive(Clone, Debug)]
pub struct Node {
    state: StateDir,
    cluster: ClusterConfig,
    /// What the cluster knows of it.
    pub config: NodeConfig,
    groups: Option<Groups>,
}

/// The node's lock; released when dropped.
pub(super) struct NodeLock {
    _file: File,
}

/// Path of a program beside this one.
pub(super) fn program(name: &str) -> Result<PathBuf, NodeError> {
    let beside = || {
        own_program()
            .ok()
            .and_then(|own| own.parent().map(Path::to_owned))
            .unwrap_or_default()
    };
    let dir = std::env::var_os("MARS_BIN_DIR").map_or_else(beside, PathBuf::from);
    let path = dir.join(name);
    if path.is_file() {
        Ok(path)
    } else {
        Err(NodeError::NoProgram(path))
    }
}

impl Node {
    /// The node `config` of a cluster.
    #[must_use]
    pub fn new(state: &StateDir, cluster: &ClusterConfig, config: &NodeConfig) -> Self {
        let groups = Groups::find(&cluster.short_name());
        Self {
            state: state.clone(),
            cluster: cluster.clone(),
            config: config.clone(),
            groups,
        }
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    fn dir(&self) -> PathBuf {
        self.state.node(&self.config.name)
    }

    fn layout(&self) -> Layout {
        let dir = self.dir();
        Layout {
            state_dir: dir.join("store"),
            run_dir: dir.join("run"),
            dev_dir: dir.join("dev"),
        }
    }

    fn group(&self, role: Role) -> String {
        format!("{}-{}", self.config.name, role.word())
    }

    fn record(&self, role: Role) -> PathBuf {
        self.dir().join("run").join(format!("{}.json", role.word()))
    }

    fn pid_file(&self, role: Role) -> PathBuf {
        self.dir().join("run").join(format!("{}.pid", role.word()))
    }

    pub(super) fn process(&self, role: Role) -> Option<Process> {
        Process::load(&self.record(role)).filter(Process::runs)
    }

    /// Which processes are to run; a node without a record is to run.
    #[must_use]
    pub fn wanted(&self) -> Wanted {
        let raw = fs::read(self.dir().join("wanted.json")).unwrap_or_default();
        serde_json::from_slice(&raw).unwrap_or(Wanted {
            agent: true,
            keeper: true,
        })
    }

    fn want(&self, wanted: Wanted) -> Result<(), FileError> {
        write_private(
            &self.dir().join("wanted.json"),
            &serde_json::to_vec(&wanted).unwrap_or_default(),
        )
    }

    /// What its processes do: agent, keeper.
    #[must_use]
    pub fn processes(&self) -> (ProcessState, ProcessState) {
        let wanted = self.wanted();
        let state = |role: Role, wanted: bool| {
            let process = self.process(role);
            ProcessState {
                pid: process.as_ref().map(|p| p.pid),
                since: process.map(|p| p.since),
                wanted,
            }
        };
        (state(Role::Agent, wanted.agent), state(Role::Keeper, wanted.keeper))
    }

    pub(super) fn lock(&self) -> Result<NodeLock, NodeError> {
        let path = self.dir().join("lock");
        let file = File::create(&path).map_err(file_error("creating", &path))?;
        let deadline = Instant::now() + LOCK_WITHIN;
        while rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_err() {
            if Instant::now() > deadline {
                return Err(NodeError::Locked(self.config.name.clone(), LOCK_WITHIN.as_secs(), path));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(NodeLock { _file: file })
    }

    /// Makes the node's directories if it is new, and gives it an identity and certificates.
    ///
    /// # Errors
    /// Its state belongs to another cluster, or the files cannot be written.
    pub fn prepare(&self, authority: &Authority) -> Result<(), NodeError> {
        let (dir, layout) = (self.dir(), self.layout());
        let is_new = !dir.exists();
        for volatile in [&dir, &layout.run_dir, &layout.dev_dir] {
            fs::create_dir_all(volatile).map_err(file_error("making directory", volatile))?;
        }
        let _lock = self.lock()?;
        if is_new {
            for durable in [layout.state_dir.clone(), dir.join("pool")] {
                fs::create_dir(&durable).map_err(file_error("making directory", &durable))?;
            }
            drop(layout.prepare()?);
            self.want(Wanted {
                agent: true,
                keeper: true,
            })?;
            self.new_boot()?;
        }
        self.notice_machine_boot()?;
        if !layout.node_dir().join("identity.json").is_file() && !is_new {
            tracing::warn!(node = self.name(), store = %layout.state_dir.display(), "the node's identity is missing: is its store mounted? nothing is made anew");
            return Ok(());
        }
        let cluster = ClusterId(self.cluster.cluster_uuid);
        let mut identity = Identity::load_or_create(&layout, self.name())?;
        identity.adopt(cluster)?;
        self.equip(authority, cluster, identity.node())
    }

    fn equip(&self, authority: &Authority, cluster: ClusterId, node: NodeId) -> Result<(), NodeError> {
        let dir = self.state.node_pki(self.name());
        let age = fs::metadata(dir.join("node.crt"))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if age.is_none_or(|age| age > RENEW_AFTER) {
            authority.equip(&dir, cluster, node, NODE_VALIDITY)?;
        }
        Ok(())
    }

    /// A new boot id, as a machine has after it lost its memory.
    fn new_boot(&self) -> Result<(), FileError> {
        let text = format!("{}\n", uuid::Uuid::new_v4());
        write_private(&self.dir().join("run").join("boot-id"), text.as_bytes())
    }

    /// When the machine below has booted since, each of its nodes has, too: what a node keeps in memory is gone, whatever lies in
    /// its run directory. The caller holds the lock.
    fn notice_machine_boot(&self) -> Result<(), NodeError> {
        let (path, now) = (self.dir().join("machine-boot"), kernel_boot_id());
        match fs::read_to_string(&path) {
            Ok(before) if before.trim() == now => return Ok(()),
            Ok(_) => self.lose_memory()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(file_error("reading", &path)(error).into()),
        }
        // Last: an attempt that is cut short is made again.
        Ok(write_private(&path, format!("{now}\n").as_bytes())?)
    }

    fn arguments(&self, role: Role) -> Vec<String> {
        let dir = self.dir();
        let path = |below: &str| dir.join(below).display().to_string();
        if role == Role::Keeper {
            return vec!["--dir".into(), path("run")];
        }
        let address = self.config.address;
        let metrics = std::net::SocketAddr::new(address.ip(), address.port() + 1);
        let mut arguments: Vec<String> = [
            ("--node-name", self.config.name.clone()),
            ("--state-dir", path("store")),
            ("--run-dir", path("run")),
            ("--dev-dir", path("dev")),
            ("--address", address.ip().to_string()),
            ("--port", address.port().to_string()),
            ("--kubeconfig", self.state.kubeconfig().display().to_string()),
            ("--pki-dir", self.state.node_pki(self.name()).display().to_string()),
            ("--boot-id-file", path("run/boot-id")),
            ("--frontend", self.cluster.frontend.clone()),
            ("--metrics-address", metrics.to_string()),
            ("--pool", format!("default={}", path("pool"))),
        ]
        .into_iter()
        .flat_map(|(flag, value)| [flag.to_owned(), value])
        .collect();
        arguments.extend(self.cluster.agent_args.iter().cloned());
        arguments
    }

    /// Starts a process unless it runs. The caller holds the lock.
    pub(super) fn ensure(&self, role: Role) -> Result<Process, NodeError> {
        if let Some(process) = self.process(role) {
            return Ok(process);
        }
        let error = |problem: String| NodeError::Start {
            node: self.config.name.clone(),
            program: role.program().into(),
            problem,
        };
        let program = program(role.program())?;
        let group = match self.groups.as_ref().map(|groups| groups.make(&self.group(role))) {
            Some(Ok(group)) => Some(group),
            Some(Err(problem)) => {
                tracing::warn!(node = self.name(), %problem, "no memory control group for {}: buffered writers in the same group can hang", role.word());
                None
            }
            None => None,
        };
        let log = self.state.log(&self.group(role));
        let launch = Launch {
            program: &program,
            arguments: &self.arguments(role),
            log: &log,
            group: group.as_deref(),
        };
        let process = launch.start().map_err(|e| error(e.to_string()))?;
        process.save(&self.record(role))?;
        write_private(&self.pid_file(role), process.pid.to_string().as_bytes())?;
        if role == Role::Keeper {
            let socket = self.dir().join("run").join("keeper.sock");
            let deadline = Instant::now() + KEEPER_READY;
            while !socket.exists() && process.runs() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(10));
            }
            if !process.runs() {
                return Err(error(format!("it ended at once; see {}", log.display())));
            }
        }
        Ok(process)
    }

    /// Starts what is missing, and wants it to run from now on.
    ///
    /// # Errors
    /// A program is missing or ends at once.
    pub fn start(&self) -> Result<(), NodeError> {
        let _lock = self.lock()?;
        self.notice_machine_boot()?;
        self.want(Wanted {
            agent: true,
            keeper: true,
        })?;
        self.ensure(Role::Keeper)?;
        self.ensure(Role::Agent)?;
        Ok(())
    }

    /// Asks the agent to end and waits; the keeper lives on.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&self) -> Result<(), NodeError> {
        let _lock = self.lock()?;
        self.want(Wanted {
            agent: false,
            ..self.wanted()
        })?;
        self.end(Role::Agent, AGENT_GRACE)
    }

    /// SIGKILL to the agent and everything in its control group; the keeper lives on.
    ///
    /// # Errors
    /// It does not end.
    pub fn kill(&self) -> Result<(), NodeError> {
        let _lock = self.lock()?;
        self.want(Wanted {
            agent: false,
            ..self.wanted()
        })?;
        self.kill_role(Role::Agent)
    }

    /// The machine dies: both processes are killed, devices go (their users get I/O errors), and so does everything that
    /// a machine keeps in memory.
    ///
    /// # Errors
    /// A process does not end.
    pub fn poweroff(&self) -> Result<(), NodeError> {
        let _lock = self.lock()?;
        self.want(Wanted {
            agent: false,
            keeper: false,
        })?;
        // A stopped process dies of SIGKILL too.
        self.kill_role(Role::Agent)?;
        self.kill_role(Role::Keeper)?;
        self.lose_memory()
    }

    /// The machine dies and starts again.
    ///
    /// # Errors
    /// As [`Node::poweroff`] and [`Node::start`].
    pub fn reboot(&self) -> Result<(), NodeError> {
        self.poweroff()?;
        self.start()
    }

    /// Ends both processes in order, then removes devices. For `down`.
    pub(super) fn shut_down(&self) -> Result<(), NodeError> {
        let _lock = self.lock()?;
        self.want(Wanted {
            agent: false,
            keeper: false,
        })?;
        self.end(Role::Agent, AGENT_GRACE)?;
        self.end(Role::Keeper, KEEPER_GRACE)?;
        self.lose_memory()?;
        // Not a wish of the user's: the next `up` starts the node again.
        Ok(self.want(Wanted {
            agent: true,
            keeper: true,
        })?)
    }

    fn end(&self, role: Role, grace: Duration) -> Result<(), NodeError> {
        if let Some(process) = self.process(role)
            && !process.end(grace)
        {
            tracing::warn!(
                node = self.name(),
                pid = process.pid,
                "{} did not end on SIGTERM within {} s and was killed",
                role.word(),
                grace.as_secs()
            );
        }
        // Also what it may have started.
        self.kill_role(role)
    }

    fn kill_role(&self, role: Role) -> Result<(), NodeError> {
        let process = self.process(role);
        let empty = self.groups.as_ref().is_none_or(|groups| groups.kill(&self.group(role)));
        if let Some(process) = process {
            process.signal(Signal::KILL);
            if !process.wait(Duration::from_secs(10)) || !empty {
                return Err(NodeError::Stuck {
                    node: self.config.name.clone(),
                    what: role.word(),
                    pid: process.pid,
                });
            }
        }
        for file in [self.record(role), self.pid_file(role)] {
            let _ = fs::remove_file(file);
        }
        if let Some(groups) = &self.groups {
            groups.remove(&self.group(role));
        }
        Ok(())
    }

    /// Devices, links and the run directory go; the next start is a new boot.
    fn lose_memory(&self) -> Result<(), NodeError> {
        let layout = self.layout();
        let mut problems = devices::remove(&layout.state_dir, &layout.dev_dir);
        problems.extend(mars_node_agent::frontend::delete_ublk_leftovers(
            &layout.run_dir.join("ublk"),
        ));
        for problem in problems {
            tracing::warn!(node = self.name(), problem, "a device could not be removed");
        }
        for entry in fs::read_dir(&layout.run_dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let _ = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
        }
        Ok(self.new_boot()?)
    }

    /// Who uses the node's devices, as texts.
    #[must_use]
    pub fn device_users(&self) -> Vec<String> {
        let layout = self.layout();
        let ours: Vec<u32> = [Role::Agent, Role::Keeper]
            .iter()
            .filter_map(|role| self.process(*role))
            .map(|p| p.pid)
            .collect();
        let mut texts = Vec::new();
        for device in devices::of_node(&layout.state_dir, &layout.dev_dir) {
            for user in devices::users_of(&device, &ours) {
                texts.push(format!(
                    "node {}: {} is {user}",
                    self.config.name,
                    device.node.display()
                ));
            }
        }
        texts
    }

    /// Lazily unmounts what is mounted from the node's devices.
    pub(super) fn unmount_lazily(&self) {
        let layout = self.layout();
        for device in devices::of_node(&layout.state_dir, &layout.dev_dir) {
            devices::unmount_lazily(&device);
        }
    }

    /// Removes the cluster's control groups, once all nodes are down.
    pub(super) fn remove_groups(cluster: &ClusterConfig) {
        if let Some(groups) = Groups::find(&cluster.short_name()) {
            groups.remove_all();
        }
    }
}
