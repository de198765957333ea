//! The cluster of processes, with stand-ins for agent and keeper: what is started, adopted, ended, and what never is.
//!
//! Needs root (as `mars-local up` does); left out otherwise. Real agents are tested by the device tier.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the failed test")]

use kube::api::{Api, Patch, PatchParams};
use mars_crds::MarsNode;
use serde_json::json;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

struct Cluster {
    dir: tempfile::TempDir,
    port: u16,
    up: Option<Child>,
}

fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {LIMIT:?} until {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

impl Cluster {
    /// A cluster of nodes a and b that is not started; none if this is not root.
    fn new() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        std::fs::create_dir(&bin).unwrap();
        let script = |name: &str, text: &str| {
            std::fs::write(bin.join(name), text).unwrap();
            std::fs::set_permissions(bin.join(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        };
        script(
            "mars-node-agent",
            &format!(
                "#!/bin/sh\necho \"$@\" > {}/args-$2\nexec sleep 1000\n",
                dir.path().display()
            ),
        );
        script(
            "mars-device-keeper",
            "#!/bin/sh\n: > \"$2/keeper.sock\"\nexec sleep 1000\n",
        );
        let free = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        Some(Self {
            port: free.local_addr().unwrap().port(),
            dir,
            up: None,
        })
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn node(&self, name: &str) -> PathBuf {
        self.state().join("nodes").join(name)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mars-local"));
        command
            .args(arguments)
            .arg("--state")
            .arg(self.state())
            .env("MARS_BIN_DIR", self.dir.path().join("bin"));
        command.env("RUST_BACKTRACE", "0");
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(!output.status.success(), "{arguments:?} should fail");
        String::from_utf8(output.stderr).unwrap()
    }

    fn spawn_up(&mut self) {
        let out = std::fs::File::create(self.dir.path().join("out")).unwrap();
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.path().join("log"))
            .unwrap();
        let api = format!("127.0.0.1:{}", self.port);
        let mut command = self.command(&["up", "--nodes", "a,b", "--api", &api, "--no-operator"]);
        self.up = Some(command.stdin(Stdio::null()).stdout(out).stderr(log).spawn().unwrap());
    }

    fn is_ready(&self) -> bool {
        std::fs::read_to_string(self.dir.path().join("out")).unwrap() == "ready\n"
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Does what the agents would do: tells the API about a node.
    async fn announce(&self, name: &str) {
        let config = mars_local::embedded::client_config(&format!("http://127.0.0.1:{}", self.port));
        let nodes: Api<MarsNode> = Api::all(kube::Client::try_from(config).unwrap());
        let object =
            json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsNode", "metadata": {"name": name}, "spec": {}});
        let parameters = PatchParams::apply("test").force();
        let deadline = Instant::now() + LIMIT;
        while let Err(error) = nodes.patch(name, &parameters, &Patch::Apply(&object)).await {
            assert!(Instant::now() < deadline, "{error}: {}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let status = json!({"status": {"address": "127.0.0.11:7777", "nodeUuid": uuid::Uuid::nil(), "lastSeen": "2026-01-01T00:00:00Z"}});
        nodes
            .patch_status(name, &PatchParams::default(), &Patch::Merge(status))
            .await
            .unwrap();
    }

    async fn up(&mut self) {
        self.spawn_up();
        for name in ["a", "b"] {
            self.announce(name).await;
        }
        until("up says ready", || self.is_ready().then_some(()));
    }

    fn kill_up(&mut self) {
        let mut up = self.up.take().unwrap();
        up.kill().unwrap();
        up.wait().unwrap();
    }

    fn pid(&self, node: &str, role: &str) -> Option<u32> {
        let text = std::fs::read_to_string(self.node(node).join("run").join(format!("{role}.pid"))).ok()?;
        let pid = text.trim().parse().ok()?;
        runs(pid).then_some(pid)
    }

    fn pids(&self) -> Vec<u32> {
        let roles = [("a", "agent"), ("a", "keeper"), ("b", "agent"), ("b", "keeper")];
        roles
            .iter()
            .map(|(node, role)| until(role, || self.pid(node, role)))
            .collect()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.run(&["down", "--force"]);
        if let Some(mut up) = self.up.take() {
            let _ = up.kill();
            let _ = up.wait();
        }
    }
}

/// Whether a process runs (a zombie does not).
fn runs(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn up_starts_every_node_and_is_ready_when_all_have_reported() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.spawn_up();
    cluster.announce("a").await;
    cluster.pids();
    assert!(!cluster.is_ready(), "b has not reported");
    cluster.announce("b").await;
    until("up says ready", || cluster.is_ready().then_some(()));
    let arguments = std::fs::read_to_string(cluster.dir.path().join("args-b")).unwrap();
    for part in [
        "--node-name b",
        "--address 127.0.0.12",
        "nodes/b/store",
        "nodes/b/run",
        "nodes/b/dev",
        "pki/nodes/b",
        "--pool default=",
    ] {
        assert!(arguments.contains(part), "{part} in {arguments}");
    }
    for file in ["ca.crt", "node.crt", "node.key"] {
        assert!(cluster.state().join("pki/nodes/b").join(file).is_file(), "{file}");
    }
    let said = cluster.ok(&["status"]);
    assert!(
        said.contains("operator stopped") && said.matches("runs (pid").count() == 4,
        "{said}"
    );
    assert!(!cluster.ok(&["operator", "start"]).contains("error"));
    assert!(cluster.ok(&["status"]).contains("operator runs"));
}

#[tokio::test(flavor = "multi_thread")]
async fn agent_and_keeper_have_control_groups_of_their_own() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    let group = |pid: u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let line = text
            .lines()
            .find(|line| line.contains(":memory:"))
            .or_else(|| text.lines().next_back());
        line.unwrap().rsplit(':').next().unwrap().to_owned()
    };
    let mut groups: Vec<String> = cluster.pids().into_iter().map(group).collect();
    groups.push(group(std::process::id()));
    groups.sort();
    let all = groups.len();
    groups.dedup();
    assert_eq!(groups.len(), all, "{groups:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_agent_is_started_again_but_a_killed_one_only_on_request() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    let first = cluster.pids()[0];
    signal(first, rustix::process::Signal::KILL);
    let second = until("the agent is back", || {
        cluster.pid("a", "agent").filter(|pid| *pid != first)
    });
    let keeper = cluster.pid("a", "keeper").unwrap();
    cluster.ok(&["node", "a", "kill"]);
    assert!(!runs(second) && runs(keeper), "the keeper lives on");
    // Longer than a first restart takes; b's agent shows that supervision goes on.
    let other = cluster.pid("b", "agent").unwrap();
    signal(other, rustix::process::Signal::KILL);
    until("b's agent is back", || {
        cluster.pid("b", "agent").filter(|pid| *pid != other)
    });
    assert_eq!(cluster.pid("a", "agent"), None);
    cluster.ok(&["node", "a", "start"]);
    assert!(cluster.pid("a", "agent").is_some());
    cluster.ok(&["node", "a", "stop"]);
    assert_eq!(cluster.pid("a", "agent"), None);
    assert!(cluster.fails(&["node", "z", "stop"]).contains("there is no node \"z\""));
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_outlive_up_and_the_next_up_adopts_them() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    let before = cluster.pids();
    cluster.kill_up();
    assert!(before.iter().all(|pid| runs(*pid)));
    cluster.ok(&["node", "b", "stop"]);
    cluster.ok(&["node", "b", "start"]);
    let changed = cluster.pids();
    assert_ne!(before[2], changed[2], "node commands work without up");
    cluster.spawn_up();
    until("up says ready: the MarsNodes are stored", || {
        cluster.is_ready().then_some(())
    });
    assert_eq!(cluster.pids(), changed);
    // A polite end does not touch them either.
    let mut up = cluster.up.take().unwrap();
    signal(up.id(), rustix::process::Signal::TERM);
    assert!(up.wait().unwrap().success());
    assert_eq!(cluster.pids(), changed);
}

#[tokio::test(flavor = "multi_thread")]
async fn poweroff_ends_a_node_and_its_memory_and_keeps_its_store() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    cluster.pids();
    let boot = |cluster: &Cluster| std::fs::read_to_string(cluster.node("a").join("run/boot-id")).unwrap();
    let (before, identity) = (
        boot(&cluster),
        std::fs::read(cluster.node("a").join("store/node/identity.json")).unwrap(),
    );
    std::fs::write(cluster.node("a").join("store/kept"), "x").unwrap();
    std::os::unix::fs::symlink("/dev/null", cluster.node("a").join("dev/stale")).unwrap();
    cluster.ok(&["node", "a", "poweroff"]);
    assert_eq!((cluster.pid("a", "agent"), cluster.pid("a", "keeper")), (None, None));
    assert_ne!(boot(&cluster), before);
    assert!(!cluster.node("a").join("dev/stale").is_symlink());
    assert!(cluster.node("a").join("store/kept").is_file());
    assert_eq!(
        std::fs::read(cluster.node("a").join("store/node/identity.json")).unwrap(),
        identity
    );
    let off = boot(&cluster);
    cluster.ok(&["node", "a", "reboot"]);
    cluster.pids();
    assert_ne!(boot(&cluster), off);
}

#[tokio::test(flavor = "multi_thread")]
async fn a01_after_a_boot_of_the_machine_each_of_its_nodes_has_booted() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    cluster.pids();
    cluster.ok(&["down"]);
    assert!(cluster.up.take().unwrap().wait().unwrap().success(), "up has ended");
    let boot = |cluster: &Cluster| std::fs::read_to_string(cluster.node("a").join("run/boot-id")).unwrap();
    for machine_booted in [false, true] {
        let before = boot(&cluster);
        if machine_booted {
            std::fs::write(cluster.node("a").join("machine-boot"), "an earlier boot\n").unwrap();
            // What a machine that lost its power leaves on its disk.
            std::fs::write(cluster.node("a").join("run/keeper.sock"), "").unwrap();
            std::os::unix::fs::symlink("/dev/null", cluster.node("a").join("dev/stale")).unwrap();
        }
        cluster.spawn_up();
        until("up says ready", || cluster.is_ready().then_some(()));
        cluster.pids();
        assert_eq!(boot(&cluster) != before, machine_booted);
        assert!(!cluster.node("a").join("dev/stale").is_symlink());
        cluster.kill_up();
        for role in ["agent", "keeper"] {
            let pid = cluster.pid("a", role).unwrap();
            signal(pid, rustix::process::Signal::KILL);
            until("its end", || (!runs(pid)).then_some(()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn down_ends_everything_keeps_the_data_and_up_starts_again() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    let pids = cluster.pids();
    let uuid = std::fs::read_to_string(cluster.state().join("cluster.json")).unwrap();
    cluster.ok(&["down"]);
    assert!(pids.iter().all(|pid| !runs(*pid)));
    assert!(cluster.up.take().unwrap().wait().unwrap().success(), "up has ended");
    cluster.ok(&["down"]);
    cluster.spawn_up();
    until("up says ready", || cluster.is_ready().then_some(()));
    let again = cluster.pids();
    assert!(again.iter().all(|pid| !pids.contains(pid)));
    assert_eq!(
        std::fs::read_to_string(cluster.state().join("cluster.json")).unwrap(),
        uuid
    );
    cluster.ok(&["down", "--purge"]);
    assert!(!cluster.state().exists());
    // Whoever names the wrong directory hears of it: the cluster he means still runs.
    assert!(cluster.fails(&["down"]).contains("holds no cluster"));
    std::fs::create_dir(cluster.state()).unwrap();
    assert!(cluster.fails(&["down"]).contains("holds no cluster"));
    std::fs::write(cluster.state().join("precious"), "data").unwrap();
    assert!(cluster.fails(&["down", "--purge"]).contains("holds no cluster"));
    assert!(cluster.state().join("precious").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_up_a_taken_port_and_a_foreign_directory_are_refused_and_start_nothing() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    let before = cluster.pids();
    let second = cluster.fails(&["up", "--nodes", "a,b"]);
    assert!(second.contains("listen") || second.contains("in use"), "{second}");
    let moved = cluster.fails(&["up", "--api", "127.0.0.1:1"]);
    assert!(
        moved.contains("127.0.0.1:1") || moved.contains("knows the API"),
        "{moved}"
    );
    assert_eq!(cluster.pids(), before);
    let other = |state: &Path, api: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mars-local"));
        command.arg("up");
        if !api.is_empty() {
            command.args(["--api", api]);
        }
        command
            .arg("--state")
            .arg(state)
            .env("MARS_BIN_DIR", cluster.dir.path().join("bin"));
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let taken = format!("127.0.0.1:{}", cluster.port);
    let fresh = cluster.dir.path().join("fresh");
    assert!(other(&fresh, &taken).contains(&taken));
    assert!(!fresh.exists(), "nothing is left behind");
    // The default port, too; it is left out where somebody else has it.
    if let Ok(held) = std::net::TcpListener::bind(("127.0.0.1", 7780)) {
        let said = other(&fresh, "");
        assert!(said.contains("127.0.0.1:7780") && said.contains("--api"), "{said}");
        assert!(!said.contains("--listen") && !fresh.exists(), "{said}");
        drop(held);
    }
    assert!(other(&fresh, "192.0.2.1:7780").contains("loopback") && !fresh.exists());
    let foreign = cluster.dir.path().join("foreign");
    std::fs::create_dir(&foreign).unwrap();
    std::fs::write(foreign.join("precious"), "data").unwrap();
    let said = other(&foreign, "127.0.0.1:0");
    assert!(said.contains("holds no cluster"), "{said}");
    assert_eq!(std::fs::read_dir(&foreign).unwrap().count(), 1);
    std::fs::remove_file(cluster.dir.path().join("bin/mars-device-keeper")).unwrap();
    assert!(cluster.fails(&["up"]).contains("mars-device-keeper is missing"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_store_is_never_made_again() {
    let Some(mut cluster) = Cluster::new() else { return };
    cluster.up().await;
    cluster.ok(&["down"]);
    cluster.up.take().unwrap().wait().unwrap();
    std::fs::rename(cluster.node("a").join("store"), cluster.dir.path().join("unmounted")).unwrap();
    std::fs::rename(
        cluster.node("b").join("pool"),
        cluster.dir.path().join("unmounted-pool"),
    )
    .unwrap();
    cluster.spawn_up();
    until("up says what is missing", || {
        cluster.log().contains("the node's identity is missing").then_some(())
    });
    cluster.pids();
    assert!(!cluster.node("a").join("store").exists() && !cluster.node("b").join("pool").exists());
}
