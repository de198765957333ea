//! Keeps the wanted processes of a node running, and its Node object true, for as long as `up` runs.
//!
//! Invariants: a process is started only if it is wanted at that moment, under the node's lock; restarts back off, with
//! jitter, up to 30 s; ending the supervisor ends no process.

use super::node::{Node, Role};
use super::process::Process;
use k8s_openapi::api::core::v1::Node as KubeNode;
use kube::api::{Api, Patch, PatchParams};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::json;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// First pause before a restart.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause before a restart.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// A process that ran this long was healthy: the next restart is quick again.
const HEALTHY_AFTER: Duration = Duration::from_mins(1);
/// How often wishes are read.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// When a process may be started again.
struct Backoff {
    pause: Duration,
    started: Option<Instant>,
    not_before: Instant,
}

impl Backoff {
    fn new() -> Self {
        Self {
            pause: FIRST_PAUSE,
            started: None,
            not_before: Instant::now(),
        }
    }

    /// Notes that the process is gone.
    fn ended(&mut self) {
        if self.started.take().is_some_and(|at| at.elapsed() > HEALTHY_AFTER) {
            self.pause = FIRST_PAUSE;
        }
        self.not_before = Instant::now() + self.pause.mul_f64(rand::random_range(0.75..1.25));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
    }
}

/// Runs until cancelled.
pub(super) async fn run(node: Node, client: kube::Client, stop: CancellationToken) {
    let mut told = None;
    let mut backoffs = [Backoff::new(), Backoff::new()];
    loop {
        let worker = node.clone();
        let looked = tokio::task::spawn_blocking(move || {
            let alive = look(&worker, &mut backoffs);
            (alive, backoffs)
        });
        let alive = match looked.await {
            Ok((alive, returned)) => {
                backoffs = returned;
                alive
            }
            Err(error) => {
                tracing::error!(node = node.name(), %error, "a look at the node's processes failed; starting over");
                backoffs = [Backoff::new(), Backoff::new()];
                continue;
            }
        };
        if told != Some(alive) {
            match report(&client, &node, alive).await {
                Ok(()) => told = Some(alive),
                Err(error) => tracing::warn!(node = node.name(), %error, "writing the Node object; trying again"),
            }
        }
        if stop.run_until_cancelled(tokio::time::sleep(LOOK_EVERY)).await.is_none() {
            return;
        }
    }
}

/// One look at both processes; says whether the agent runs.
fn look(node: &Node, backoffs: &mut [Backoff; 2]) -> bool {
    let wanted = node.wanted();
    let mut agent_runs = false;
    for (i, (role, is_wanted)) in [(Role::Keeper, wanted.keeper), (Role::Agent, wanted.agent)]
        .into_iter()
        .enumerate()
    {
        let backoff = &mut backoffs[i];
        let process = node.process(role);
        if let Some(process) = &process {
            backoff.started.get_or_insert_with(Instant::now);
            agent_runs |= role == Role::Agent && !ends_now(process);
            continue;
        }
        if backoff.started.is_some() {
            if is_wanted {
                tracing::warn!(
                    node = node.name(),
                    "{} has ended; see its log; starting it again",
                    role.word()
                );
            }
            backoff.ended();
        }
        if is_wanted && Instant::now() >= backoff.not_before {
            start(node, role, backoff);
        }
    }
    agent_runs
}

/// Whether the process ends at this very moment.
fn ends_now(process: &Process) -> bool {
    let Some(handle) = process.handle() else { return true };
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut [PollFd::new(&handle, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready > 0)
}

fn start(node: &Node, role: Role, backoff: &mut Backoff) {
    let outcome = node.lock().and_then(|_lock| {
        // A command may have changed its mind while we waited for the lock.
        let wanted = node.wanted();
        let is_wanted = if role == Role::Agent {
            wanted.agent
        } else {
            wanted.keeper
        };
        if is_wanted {
            node.ensure(role).map(Some)
        } else {
            Ok(None)
        }
    });
    match outcome {
        Ok(Some(process)) => {
            tracing::info!(node = node.name(), pid = process.pid, "{} runs", role.word());
            backoff.started = Some(Instant::now());
        }
        Ok(None) => {}
        Err(error) => {
            tracing::error!(node = node.name(), %error, "{} could not be started; trying again", role.word());
            backoff.ended();
        }
    }
}

/// Makes the Node object say whether the node is there.
async fn report(client: &kube::Client, node: &Node, ready: bool) -> Result<(), kube::Error> {
    let api: Api<KubeNode> = Api::all(client.clone());
    let name = node.name();
    let parameters = PatchParams::apply("mars-local").force();
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}}});
    api.patch(name, &parameters, &Patch::Apply(object)).await?;
    let now = crate::meta::now();
    let (status, reason, message) = if ready {
        ("True", "AgentRuns", "mars-local: the agent of this node runs")
    } else {
        (
            "False",
            "AgentStopped",
            "mars-local: the agent of this node does not run",
        )
    };
    let status = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {
        "addresses": [{"type": "InternalIP", "address": node.config.address.ip().to_string()}, {"type": "Hostname", "address": name}],
        "conditions": [{"type": "Ready", "status": status, "reason": reason, "message": message,
            "lastTransitionTime": now, "lastHeartbeatTime": now}],
        "nodeInfo": node_info()}});
    api.patch_status(name, &parameters, &Patch::Apply(status)).await?;
    Ok(())
}

fn node_info() -> serde_json::Value {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let release = read("/etc/os-release");
    let pretty = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or_default();
    json!({"architecture": std::env::consts::ARCH, "bootID": read("/proc/sys/kernel/random/boot_id"),
        "containerRuntimeVersion": "none://", "kernelVersion": read("/proc/sys/kernel/osrelease"), "kubeProxyVersion": "",
        "kubeletVersion": concat!("mars-local-", env!("CARGO_PKG_VERSION")), "machineID": "", "operatingSystem": "linux",
        "osImage": pretty.trim_matches('"'), "systemUUID": ""})
}
