//! A cluster of `mars-local` in a directory of its own, and the objects in it as a user sees them.
//!
//! Invariant: dropping a [`Cluster`] ends every process it started and removes everything below its directory; a failing
//! test first prints the objects, the Events and the ends of all logs.

use crate::machine::{Background, Cmd, alive, program, run, signal, until};
use anyhow::{Context, Result, bail, ensure};
use kube::api::{Api, ApiResource, DynamicObject};
use serde_json::Value;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How long a new cluster may take until all nodes are there.
pub const START_LIMIT: Duration = Duration::from_mins(1);
/// How long ordinary changes may take until they show.
pub const CHANGE_LIMIT: Duration = Duration::from_mins(1);

/// What a new cluster looks like.
#[derive(Debug, Clone)]
pub struct Options {
    /// Node names.
    pub nodes: Vec<String>,
    /// Which device frontend the agents use: `loop`, `ublk` or `auto`.
    pub frontend: String,
    /// Further arguments of `mars-local up`.
    pub args: Vec<String>,
    /// Environment of everything in the cluster.
    pub env: Vec<(String, String)>,
    /// Where the directory of the cluster is made; data and logs lie in it.
    pub parent: PathBuf,
}

impl Default for Options {
    fn default() -> Self {
        let in_vm = std::env::var_os("MARS_IN_VM").is_some();
        Self {
            nodes: ["a", "b", "c"].map(str::to_owned).to_vec(),
            frontend: if in_vm { "ublk" } else { "loop" }.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            // In the VM the root file system is RAM over a network file system; /dev/shm is a plain tmpfs.
            parent: if in_vm {
                PathBuf::from("/dev/shm")
            } else {
                std::env::temp_dir()
            },
        }
    }
}

/// Kinds of objects, as the API names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// One replicated block device.
    Resource,
    /// One node's copy.
    Replica,
    /// One node.
    Node,
    /// A one-shot verb.
    Action,
}

impl Kind {
    /// The kind and its plural.
    #[must_use]
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Resource => ("MarsResource", "marsresources"),
            Self::Replica => ("MarsReplica", "marsreplicas"),
            Self::Node => ("MarsNode", "marsnodes"),
            Self::Action => ("MarsAction", "marsactions"),
        }
    }
}

/// A running cluster.
pub struct Cluster {
    up: Option<Background>,
    options: Options,
    runtime: tokio::runtime::Runtime,
    client: Option<kube::Client>,
    dir: Option<TempDir>,
}

impl Cluster {
    /// Three nodes a, b and c, all defaults.
    pub fn three() -> Result<Self> {
        crate::machine::require_test_machine()?;
        Self::start(Options::default())
    }

    /// Starts a cluster and waits until all its nodes are there.
    pub fn start(options: Options) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("mars-").tempdir_in(&options.parent)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let mut cluster = Self {
            up: None,
            options,
            runtime,
            client: None,
            dir: Some(dir),
        };
        cluster.control_plane_start()?;
        Ok(cluster)
    }

    /// The state directory of `mars-local`.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.dir
            .as_ref()
            .expect("the directory lives as long as the cluster")
            .path()
            .join("state")
    }

    /// A directory of this cluster for files of the test.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self
            .dir
            .as_ref()
            .expect("the directory lives as long as the cluster")
            .path()
            .join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// The nodes' names, in order.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.options.nodes
    }

    fn mars_local(&self) -> Result<Cmd> {
        Ok(Cmd::new(program("mars-local")?).env("RUST_BACKTRACE", "1"))
    }

    /// Starts API server and operator (and what is missing of agents and keepers).
    pub fn control_plane_start(&mut self) -> Result<()> {
        let dir = self
            .dir
            .as_ref()
            .expect("the directory lives as long as the cluster")
            .path();
        let (out_path, log_path) = (dir.join("up.out"), dir.join("up.log"));
        let append = |path: &Path| File::options().create(true).append(true).open(path);
        // Truncated: `ready` must be the one of this start.
        let out = File::create(&out_path)?;
        let mut command = self
            .mars_local()?
            .arg("up")
            .arg("--state")
            .arg(self.state())
            .args(["--nodes", &self.options.nodes.join(",")])
            .args(["--frontend", &self.options.frontend])
            .args(&self.options.args);
        for (key, value) in &self.options.env {
            command = command.env(key, value);
        }
        let mut up = command.spawn(out, append(&log_path)?)?;
        let started = until("mars-local up prints ready", START_LIMIT, || {
            if std::fs::read_to_string(&out_path)?
                .lines()
                .any(|line| line.trim() == "ready")
            {
                return Ok(true);
            }
            if up.running()? {
                Ok(false)
            } else {
                bail!("mars-local up ended")
            }
        });
        if let Err(error) = started {
            let log = std::fs::read_to_string(&log_path).unwrap_or_default();
            return Err(error.context(format!("mars-local up said:\n{}", last_lines(&log, 40))));
        }
        self.up = Some(up);
        let kubeconfig = kube::config::Kubeconfig::read_from(self.kubeconfig())?;
        self.client = Some(self.runtime.block_on(async {
            let config =
                kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?);
        Ok(())
    }

    /// Ends API server and operator; agents and devices run on.
    pub fn control_plane_stop(&mut self) -> Result<()> {
        if let Some(mut up) = self.up.take() {
            up.terminate(Duration::from_secs(20))?;
        }
        Ok(())
    }

    /// Ends API server and operator without any warning; agents and devices run on.
    pub fn control_plane_kill(&mut self) -> Result<()> {
        if let Some(mut up) = self.up.take() {
            up.signal("KILL")?;
            up.wait(Duration::from_secs(20))?;
        }
        Ok(())
    }

    /// Where kubectl finds the cluster.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.state().join("kubeconfig")
    }

    /// kubectl with arguments.
    #[must_use]
    pub fn kubectl_cmd(&self, args: &[&str]) -> Cmd {
        Cmd::new("kubectl")
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.state())
            .args(args)
    }

    /// Runs kubectl and returns what it printed.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_cmd(args).run()
    }

    /// `kubectl apply -f -`.
    pub fn apply(&self, manifest: &str) -> Result<()> {
        self.kubectl_cmd(&["apply", "-f", "-"]).input(manifest).run().map(drop)
    }

    /// `kubectl apply` that must be refused; returns the message.
    pub fn apply_refused(&self, manifest: &str) -> Result<String> {
        let output = self.kubectl_cmd(&["apply", "-f", "-"]).input(manifest).output()?;
        ensure!(
            !output.status.success(),
            "this manifest must be refused, but was accepted:\n{manifest}"
        );
        Ok(output.stderr)
    }

    /// Merge-patches the spec of a MarsResource.
    pub fn patch_resource(&self, name: &str, spec: &Value) -> Result<()> {
        let patch = serde_json::json!({ "spec": spec }).to_string();
        self.kubectl(&["patch", "marsresource", name, "--type=merge", "-p", &patch])
            .map(drop)
    }

    /// An object as the API has it now; `None` if there is none.
    pub fn find(&self, kind: Kind, name: &str) -> Result<Option<Value>> {
        let api = self.api(kind)?;
        let found = self
            .runtime
            .block_on(async { tokio::time::timeout(Duration::from_secs(10), api.get_opt(name)).await });
        found
            .context("the API server does not answer")??
            .map(serde_json::to_value)
            .transpose()
            .map_err(Into::into)
    }

    /// An object that must be there.
    pub fn get(&self, kind: Kind, name: &str) -> Result<Value> {
        self.find(kind, name)?
            .with_context(|| format!("there is no {} {name}", kind.names().0))
    }

    /// All objects of a kind.
    pub fn list(&self, kind: Kind) -> Result<Vec<Value>> {
        let api = self.api(kind)?;
        let found = self.runtime.block_on(async {
            tokio::time::timeout(Duration::from_secs(10), api.list(&kube::api::ListParams::default())).await
        });
        found
            .context("the API server does not answer")??
            .items
            .into_iter()
            .map(|o| Ok(serde_json::to_value(o)?))
            .collect()
    }

    fn api(&self, kind: Kind) -> Result<Api<DynamicObject>> {
        let client = self.client.clone().context("the cluster has not started")?;
        let (kind, plural) = kind.names();
        let resource = ApiResource {
            group: "mars.storage".into(),
            version: "v1alpha1".into(),
            api_version: "mars.storage/v1alpha1".into(),
            kind: kind.into(),
            plural: plural.into(),
        };
        Ok(Api::all_with(client, &resource))
    }

    /// Waits until an object satisfies `condition`; shows the object when it does not in time.
    pub fn wait_object(&self, kind: Kind, name: &str, what: &str, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        self.wait_object_for(CHANGE_LIMIT, kind, name, what, condition)
    }

    /// The same with a limit.
    pub fn wait_object_for(
        &self,
        limit: Duration,
        kind: Kind,
        name: &str,
        what: &str,
        condition: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let mut last = Value::Null;
        let outcome = until(&format!("{name}: {what}"), limit, || {
            last = self.get(kind, name)?;
            Ok(condition(&last))
        });
        outcome.map_err(|error| {
            let shown = serde_yaml::to_string(&last).unwrap_or_default();
            error.context(format!("{} {name} is:\n{shown}", kind.names().0))
        })?;
        Ok(last)
    }

    /// One node.
    pub fn node(&self, name: &str) -> Node<'_> {
        assert!(
            self.options.nodes.iter().any(|node| node == name),
            "the cluster has no node {name}"
        );
        Node {
            cluster: self,
            name: name.to_owned(),
        }
    }

    /// Everything that helps to understand a failure.
    #[must_use]
    pub fn report(&self) -> String {
        let mut report = Vec::new();
        for args in [
            &["get", "marsresources,marsreplicas,marsnodes,marsactions", "-o", "yaml"][..],
            &["get", "events", "-A", "--sort-by=.lastTimestamp"][..],
        ] {
            let said = self.kubectl_cmd(args).limit(Duration::from_secs(20)).output();
            report.push(format!("---- kubectl {}", args.join(" ")));
            report.push(said.map_or_else(|error| format!("{error:#}"), |output| output.stdout + &output.stderr));
        }
        let mut logs: Vec<PathBuf> = std::fs::read_dir(self.state().join("logs"))
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        logs.sort();
        if let Some(dir) = &self.dir {
            logs.push(dir.path().join("up.log"));
        }
        for log in logs {
            let text = std::fs::read(&log).unwrap_or_default();
            report.push(format!("---- {}", log.display()));
            report.push(last_lines(&String::from_utf8_lossy(&text), 60));
        }
        report.join("\n")
    }

    /// Ends everything, removes everything, and says what could not be removed.
    pub fn stop(&mut self) -> Result<()> {
        let Some(dir) = self.dir.take() else { return Ok(()) };
        crate::machine::shield_clean_up();
        let state = dir.path().join("state");
        if let Some(mut up) = self.up.take() {
            let _ = up.terminate(Duration::from_secs(10));
        }
        let down = self
            .mars_local()?
            .arg("down")
            .arg("--state")
            .arg(&state)
            .arg("--force")
            .run();
        sweep(&state);
        let left = leftovers(&state);
        dir.close().context("cannot remove the directory of the cluster")?;
        down.context("mars-local down")?;
        ensure!(left.is_empty(), "left behind by the cluster: {left:?}");
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.dir.is_some() && std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        if let Err(error) = self.stop() {
            eprintln!("clean-up: {error:#}");
        }
    }
}

/// One node of a cluster: its directories and its processes.
pub struct Node<'a> {
    cluster: &'a Cluster,
    /// Its name.
    pub name: String,
}

impl Node<'_> {
    /// `<state>/nodes/<name>`.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.cluster.state().join("nodes").join(&self.name)
    }

    /// The device of a resource on this node: a symlink in the node's own directory.
    #[must_use]
    pub fn device(&self, resource: &str) -> PathBuf {
        self.dir().join("dev").join(resource)
    }

    /// The node's log and state directories.
    #[must_use]
    pub fn store(&self) -> PathBuf {
        self.dir().join("store")
    }

    /// The `directory` pool in which data files lie.
    #[must_use]
    pub fn pool(&self) -> PathBuf {
        self.dir().join("pool")
    }

    /// The node's address in the replication network, without port.
    pub fn address(&self) -> Result<String> {
        let object = self.cluster.get(Kind::Node, &self.name)?;
        let address = at(&object, "/status/address")
            .as_str()
            .context("the MarsNode has no address yet")?;
        Ok(address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned())
    }

    fn pid_of(&self, what: &str) -> Result<u32> {
        let path = self.dir().join("run").join(format!("{what}.pid"));
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        text.trim()
            .parse()
            .with_context(|| format!("{}: {text:?}", path.display()))
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> Result<u32> {
        self.pid_of("agent")
    }

    /// Whether the agent runs.
    #[must_use]
    pub fn agent_runs(&self) -> bool {
        self.agent_pid().is_ok_and(alive)
    }

    fn command(&self, verb: &str) -> Result<()> {
        let state = self.cluster.state();
        let mut command = self
            .cluster
            .mars_local()?
            .args(["node", &self.name, verb])
            .arg("--state")
            .arg(state);
        for (key, value) in &self.cluster.options.env {
            command = command.env(key, value);
        }
        command.run().map(drop)
    }

    /// SIGKILL to the agent's whole cgroup; the keeper lives on, nobody restarts the agent.
    pub fn kill(&self) -> Result<()> {
        self.command("kill")
    }

    /// Asks the agent to end.
    pub fn stop(&self) -> Result<()> {
        self.command("stop")
    }

    /// Starts what is missing.
    pub fn start(&self) -> Result<()> {
        self.command("start")
    }

    /// Kills agent and keeper, forgets the devices, and starts both with a new boot id.
    pub fn reboot(&self) -> Result<()> {
        self.command("reboot")
    }

    /// SIGSTOP to the agent: a node that hangs.
    pub fn freeze(&self) -> Result<()> {
        signal(self.agent_pid()?, "STOP")
    }

    /// SIGCONT to the agent.
    pub fn thaw(&self) -> Result<()> {
        signal(self.agent_pid()?, "CONT")
    }
}

/// A value inside an object by JSON pointer; null when absent.
#[must_use]
pub fn at<'a>(object: &'a Value, pointer: &str) -> &'a Value {
    object.pointer(pointer).unwrap_or(&Value::Null)
}

/// A condition of an object by type, as (status, reason, message).
#[must_use]
pub fn condition(object: &Value, kind: &str) -> Option<(String, String, String)> {
    let conditions = object.pointer("/status/conditions")?.as_array()?;
    let found = conditions.iter().find(|condition| condition["type"] == kind)?;
    let text = |key: &str| found[key].as_str().unwrap_or_default().to_owned();
    Some((text("status"), text("reason"), text("message")))
}

/// Whether a condition has status True.
#[must_use]
pub fn is_true(object: &Value, kind: &str) -> bool {
    condition(object, kind).is_some_and(|(status, _, _)| status == "True")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

/// Mount points below a directory, deepest first.
fn mounts_below(dir: &Path) -> Vec<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(dir))
        .collect();
    found.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
    found
}

/// Loop devices whose backing file lies below a directory.
fn loops_below(dir: &Path) -> Vec<String> {
    let listed = run("losetup", &["--list", "--noheadings", "--output", "NAME,BACK-FILE"]).unwrap_or_default();
    let below = dir.display().to_string();
    listed
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, file)| file.trim().starts_with(&below))
        .map(|(name, _)| name.to_owned())
        .collect()
}

/// Processes (other than this one) whose command line mentions a directory.
fn processes_about(dir: &Path) -> Vec<u32> {
    let about = dir.display().to_string();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if pid != std::process::id() && String::from_utf8_lossy(&line).contains(&about) && alive(pid) {
            found.push(pid);
        }
    }
    found
}

/// What belongs to a state directory and is still there: mounts, loop devices, processes, control groups.
#[must_use]
pub fn leftovers(state: &Path) -> Vec<String> {
    let mut left: Vec<String> = mounts_below(state)
        .into_iter()
        .map(|point| format!("mount {}", point.display()))
        .collect();
    left.extend(
        loops_below(state)
            .into_iter()
            .map(|device| format!("loop device {device}")),
    );
    left.extend(processes_about(state).into_iter().map(|pid| format!("process {pid}")));
    left
}

/// The second line of defence after `mars-local down`: whatever is left of this state directory ends now.
fn sweep(state: &Path) {
    for pid in processes_about(state) {
        let _ = signal(pid, "KILL");
    }
    let _ = until("processes are gone", Duration::from_secs(5), || {
        Ok(processes_about(state).is_empty())
    });
    for device in loops_below(state) {
        let _ = run("losetup", &["--detach", &device]);
    }
    for point in mounts_below(state) {
        let _ = run("umount", &["--lazy", &point.to_string_lossy()]);
    }
}
