//! One node of a cluster: where its things lie, how to hurt it, and what its agent says without the API server.
//!
//! Invariant: a process is addressed by the pid file of its own node, never by name.

use crate::cluster::{API_LIMIT, Cluster, mars_local};
use crate::machine::{alive, signal};
use anyhow::{Context, Result, ensure};
use mars_crds::{MarsNode, MarsReplicaStatus};
use serde_json::Value;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// One node of a cluster: its directories and its processes.
pub struct Node<'a> {
    pub(crate) cluster: &'a Cluster,
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
        let object: MarsNode = self.cluster.get(&self.name)?;
        let address = object.status.unwrap_or_default().address;
        ensure!(!address.is_empty(), "the MarsNode has no address yet");
        Ok(address.rsplit_once(':').map_or(&*address, |(host, _)| host).to_owned())
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

    /// What the agent itself says about its replica of a resource, by its local socket: live, and without the API server.
    pub fn live(&self, resource: &str) -> Result<MarsReplicaStatus> {
        live_in(&self.dir(), resource).with_context(|| format!("the agent of {}", self.name))
    }

    fn command(&self, verb: &str) -> Result<()> {
        let state = self.cluster.state();
        let mut command = mars_local()?.args(["node", &self.name, verb]).arg("--state").arg(state);
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

    /// The machine dies: agent and keeper are killed, users of its devices get I/O errors.
    pub fn poweroff(&self) -> Result<()> {
        self.command("poweroff")
    }

    /// The machine dies and starts again, with a new boot id.
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

/// What the agent whose directory this is says about its replica of a resource.
pub fn live_in(node_dir: &Path, resource: &str) -> Result<MarsReplicaStatus> {
    let answer = ask(&node_dir.join("run/agent.sock"), "/status")?;
    let found = answer["replicas"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|replica| replica["resource"] == resource);
    let found = found.with_context(|| format!("it knows no replica of {resource}"))?;
    Ok(serde_json::from_value(found["status"].clone())?)
}

fn ask(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
    stream.set_read_timeout(Some(API_LIMIT))?;
    // HTTP/1.0: the answer is not chunked, and its end is the end of the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("not an HTTP answer")?;
    ensure!(
        head.lines().next().is_some_and(|line| line.contains(" 200 ")),
        "{path}: {answer}"
    );
    Ok(serde_json::from_str(body)?)
}
