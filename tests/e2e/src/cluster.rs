//! A cluster of `mars-local` in a directory of its own, and the objects in it as a user sees them.
//!
//! Invariant: dropping a [`Cluster`] ends every process it started and removes everything below its directory; a failing
//! test first prints the objects, the Events and the ends of all logs.

use crate::leftovers::{leftovers, sweep};
use crate::machine::{Background, Cmd, in_vm, program, until};
use crate::node::Node;
use anyhow::{Context, Result, bail, ensure};
use kube::Resource;
use kube::api::{Api, ListParams};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::cell::RefCell;
use std::fmt::Debug;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

/// How long a new cluster may take until all nodes are there.
pub const START_LIMIT: Duration = Duration::from_mins(1);
pub(crate) const API_LIMIT: Duration = Duration::from_secs(10);
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
    /// Use this directory instead, with what an earlier cluster left in it, and keep it: for tests that pull the plug.
    pub keep: Option<PathBuf>,
}

impl Options {
    /// Two nodes, a and b.
    #[must_use]
    pub fn two() -> Self {
        Self {
            nodes: ["a", "b"].map(str::to_owned).to_vec(),
            ..Self::default()
        }
    }
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: ["a", "b", "c"].map(str::to_owned).to_vec(),
            frontend: if in_vm() { "ublk" } else { "loop" }.to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            // In the VM the root file system is RAM over a network file system; /dev/shm is a plain tmpfs.
            parent: if in_vm() {
                PathBuf::from("/dev/shm")
            } else {
                std::env::temp_dir()
            },
            keep: None,
        }
    }
}

/// A kind of MARS objects, with its status.
pub trait Object:
    Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope> + Clone + Debug + DeserializeOwned + Serialize
{
}
impl<K> Object for K where
    K: Resource<DynamicType = (), Scope = kube::core::ClusterResourceScope>
        + Clone
        + Debug
        + DeserializeOwned
        + Serialize
{
}

/// Where everything of a cluster lies.
enum Home {
    /// Removed with the cluster.
    Temporary(TempDir),
    /// Stays.
    Kept(PathBuf),
}

/// A running cluster.
pub struct Cluster {
    up: RefCell<Option<Background>>,
    pub(crate) options: Options,
    runtime: tokio::runtime::Runtime,
    client: RefCell<Option<kube::Client>>,
    home: Option<Home>,
}

impl Cluster {
    /// Starts a cluster and waits until all its nodes are there.
    pub fn start(options: Options) -> Result<Self> {
        let home = match &options.keep {
            Some(dir) => Home::Kept(dir.clone()),
            None => Home::Temporary(tempfile::Builder::new().prefix("mars-").tempdir_in(&options.parent)?),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()?;
        let cluster = Self {
            up: RefCell::new(None),
            options,
            runtime,
            client: RefCell::new(None),
            home: Some(home),
        };
        cluster.control_plane_start()?;
        Ok(cluster)
    }

    fn home_dir(&self) -> &Path {
        match &self.home {
            Some(Home::Temporary(dir)) => dir.path(),
            Some(Home::Kept(dir)) => dir,
            None => unreachable!("the directory lives as long as the cluster"),
        }
    }

    /// The state directory of `mars-local`.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.home_dir().join("state")
    }

    /// A directory of this cluster for files of the test.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.home_dir().join(name);
        std::fs::create_dir_all(&path)?;
        Ok(path)
    }

    /// The nodes' names, in order.
    #[must_use]
    pub fn nodes(&self) -> &[String] {
        &self.options.nodes
    }

    /// Starts API server and operator (and what is missing of agents and keepers).
    pub fn control_plane_start(&self) -> Result<()> {
        let dir = self.home_dir();
        let (out_path, log_path) = (dir.join("up.out"), dir.join("up.log"));
        let append = |path: &Path| File::options().create(true).append(true).open(path);
        // Truncated: `ready` must be the one of this start.
        let out = File::create(&out_path)?;
        let mut command = mars_local()?
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
        self.up.replace(Some(up));
        let kubeconfig = kube::config::Kubeconfig::read_from(self.kubeconfig())?;
        let client = self.runtime.block_on(async {
            let config =
                kube::Config::from_custom_kubeconfig(kubeconfig, &kube::config::KubeConfigOptions::default()).await?;
            anyhow::Ok(kube::Client::try_from(config)?)
        })?;
        self.client.replace(Some(client));
        Ok(())
    }

    /// Ends API server and operator; agents and devices run on.
    pub fn control_plane_stop(&self) -> Result<()> {
        if let Some(mut up) = self.up.take() {
            up.terminate(Duration::from_secs(20))?;
        }
        Ok(())
    }

    /// Ends API server and operator without any warning; agents and devices run on.
    pub fn control_plane_kill(&self) -> Result<()> {
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
    pub fn find<K: Object>(&self, name: &str) -> Result<Option<K>> {
        let api = self.api::<K>()?;
        let answer = async { tokio::time::timeout(API_LIMIT, api.get_opt(name)).await };
        Ok(self
            .runtime
            .block_on(answer)
            .context("the API server does not answer")??)
    }

    /// An object that must be there.
    pub fn get<K: Object>(&self, name: &str) -> Result<K> {
        self.find(name)?
            .with_context(|| format!("there is no {} {name}", K::kind(&())))
    }

    /// All objects of a kind.
    pub fn list<K: Object>(&self) -> Result<Vec<K>> {
        let api = self.api::<K>()?;
        let all = ListParams::default();
        let answer = async { tokio::time::timeout(API_LIMIT, api.list(&all)).await };
        Ok(self
            .runtime
            .block_on(answer)
            .context("the API server does not answer")??
            .items)
    }

    fn api<K: Object>(&self) -> Result<Api<K>> {
        Ok(Api::all(
            self.client.borrow().clone().context("the cluster has not started")?,
        ))
    }

    /// Waits until an object satisfies `condition`; shows the object when it does not in time.
    pub fn wait<K: Object>(&self, name: &str, what: &str, condition: impl Fn(&K) -> bool) -> Result<K> {
        self.wait_for(CHANGE_LIMIT, name, what, condition)
    }

    /// The same with a limit.
    pub fn wait_for<K: Object>(
        &self,
        limit: Duration,
        name: &str,
        what: &str,
        condition: impl Fn(&K) -> bool,
    ) -> Result<K> {
        let mut last = None;
        let outcome = until(&format!("{} {name}: {what}", K::kind(&())), limit, || {
            last = self.find::<K>(name)?;
            Ok(last.as_ref().is_some_and(&condition))
        });
        match (outcome, last) {
            (Ok(()), Some(object)) => Ok(object),
            (Ok(()), None) => bail!("{name} has vanished"),
            (Err(error), last) => {
                Err(error.context(format!("it is:\n{}", serde_yaml::to_string(&last).unwrap_or_default())))
            }
        }
    }

    /// Events about MARS objects, oldest first, as kubectl prints them.
    pub fn events(&self) -> Result<String> {
        self.kubectl(&["get", "events", "-A"])
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
        logs.push(self.home_dir().join("up.log"));
        for log in logs {
            let text = std::fs::read(&log).unwrap_or_default();
            report.push(format!("---- {}", log.display()));
            report.push(last_lines(&String::from_utf8_lossy(&text), 60));
        }
        report.join("\n")
    }

    /// Ends everything, removes everything, and says what could not be removed.
    pub fn stop(&mut self) -> Result<()> {
        if self.home.is_none() {
            return Ok(());
        }
        crate::machine::shield_clean_up();
        let state = self.state();
        if let Some(mut up) = self.up.take() {
            let _ = up.terminate(Duration::from_secs(10));
        }
        let down = mars_local()?
            .arg("down")
            .arg("--state")
            .arg(&state)
            .arg("--force")
            .run();
        sweep(&state);
        let left = leftovers(&state);
        if let Some(Home::Temporary(dir)) = self.home.take() {
            dir.close().context("cannot remove the directory of the cluster")?;
        }
        down.context("mars-local down")?;
        ensure!(left.is_empty(), "left behind by the cluster: {left:?}");
        Ok(())
    }
}

/// Runs a story on a new cluster; a story that fails shows the cluster, and one that leaves something behind fails.
pub fn scenario(options: Options, story: impl FnOnce(&Cluster) -> Result<()>) {
    let outcome = crate::machine::require_test_machine().and_then(|()| {
        let mut cluster = Cluster::start(options)?;
        story(&cluster).inspect_err(|error| {
            eprintln!("{}\nfailed: {error:#}", cluster.report());
        })?;
        cluster.stop()
    });
    if let Err(error) = outcome {
        panic!("{error:#}");
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.home.is_some() && std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        if let Err(error) = self.stop() {
            eprintln!("clean-up: {error:#}");
        }
    }
}

pub(crate) fn mars_local() -> Result<Cmd> {
    Ok(Cmd::new(program("mars-local")?).env("RUST_BACKTRACE", "1"))
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
