//! Real agents with real devices, told what to do by files: each node has its own directories, address, keeper and boot id.
//!
//! Invariant: whatever a test does, its devices, mounts and processes are gone afterwards.

use mars_engine::types::ClusterId;
use mars_node_agent::identity::Identity;
use mars_node_agent::layout::Layout;
use mars_node_agent::replication::pki::Authority;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Nothing here takes longer on a busy machine.
const LIMIT: Duration = Duration::from_mins(1);
pub(crate) const SIZE: u64 = 64 << 20;

/// Polls until `check` has something.
pub(crate) fn eventually<T>(what: &str, mut check: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(value) = check() {
            return value;
        }
        assert!(Instant::now() < deadline, "not within {} s: {what}", LIMIT.as_secs());
        std::thread::sleep(Duration::from_millis(50));
    }
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

pub(crate) struct Cluster {
    pub(crate) root: tempfile::TempDir,
    pub(crate) id: ClusterId,
    authority: Authority,
    subnet: u8,
    pub(crate) nodes: Vec<Node>,
    mounts: RefCell<Vec<PathBuf>>,
}

pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) dir: PathBuf,
    pub(crate) address: String,
    pub(crate) uuid: Uuid,
    pub(crate) cluster: ClusterId,
    agent: RefCell<Option<Child>>,
    keeper: RefCell<Option<Child>>,
}

/// What the operator would write.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    pub(crate) resource: String,
    pub(crate) resource_uuid: Uuid,
    pub(crate) replicas: BTreeMap<String, Uuid>,
}

impl Spec {
    pub(crate) fn new(resource: &str, nodes: &[Node]) -> Spec {
        let replicas = nodes.iter().map(|node| (node.name.clone(), Uuid::new_v4())).collect();
        Spec {
            resource: resource.to_owned(),
            resource_uuid: Uuid::new_v4(),
            replicas,
        }
    }
}

pub(crate) fn designation(number: u64) -> Value {
    json!({"number": number, "uuid": Uuid::from_u128(u128::from(number))})
}

impl Cluster {
    /// Nodes `a`, `b`, … without agents yet.
    pub(crate) fn new(count: u8) -> Cluster {
        static NEXT: AtomicU8 = AtomicU8::new(1);
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests make block devices: run them as root"
        );
        let root = tempfile::Builder::new().prefix("mars-agents-").tempdir().unwrap();
        let id = ClusterId(Uuid::new_v4());
        let authority = Authority::generate(id).unwrap();
        // Tests of one process differ in the third byte of their addresses, processes in the second.
        let process = u8::try_from(std::process::id() % 200).unwrap() + 30;
        let mut cluster = Cluster {
            root,
            id,
            authority,
            subnet: process,
            nodes: Vec::new(),
            mounts: RefCell::default(),
        };
        let third = NEXT.fetch_add(1, Ordering::Relaxed);
        for number in 0..count {
            let node = cluster.node(number, third);
            cluster.nodes.push(node);
        }
        cluster
    }

    fn node(&self, number: u8, third: u8) -> Node {
        let name = char::from(b'a' + number).to_string();
        let dir = self.root.path().join(&name);
        for below in ["store", "run", "dev", "pool", "specs", "pki"] {
            fs::create_dir_all(dir.join(below)).unwrap();
        }
        let layout = Layout {
            state_dir: dir.join("store"),
            run_dir: dir.join("run"),
            dev_dir: dir.join("dev"),
        };
        let lock = layout.prepare().unwrap();
        let mut identity = Identity::load_or_create(&layout, &name).unwrap();
        identity.adopt(self.id).unwrap();
        drop(lock);
        self.authority
            .equip(&dir.join("pki"), self.id, identity.node(), Duration::from_hours(24))
            .unwrap();
        let address = format!("127.{}.{third}.{}", self.subnet, number + 1);
        let node = Node {
            name,
            dir,
            address,
            uuid: identity.node().0,
            cluster: self.id,
            agent: RefCell::default(),
            keeper: RefCell::default(),
        };
        node.new_boot();
        node
    }

    /// Starts keepers and agents of all nodes.
    pub(crate) fn start(&self) {
        for node in &self.nodes {
            node.start_keeper();
            node.start_agent();
        }
    }

    /// Writes what one node shall do; `order` is laid over the common part.
    pub(crate) fn order(&self, spec: &Spec, node: &Node, order: &Value) {
        let peer = |peer: &Node| {
            json!({"node": peer.name, "nodeUuid": peer.uuid, "replicaUuid": spec.replicas[&peer.name],
                "address": format!("{}:7777", peer.address)})
        };
        let members = self
            .nodes
            .iter()
            .filter(|peer| peer.name != node.name && spec.replicas.contains_key(&peer.name));
        let path = node.dir.join("specs").join(format!("{}.json", spec.resource));
        let known: Value = fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        let generation = known["metadata"]["generation"].as_u64().unwrap_or(0) + 1;
        let mut object = json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica",
            "metadata": {"name": format!("{}.{}", spec.resource, node.name), "uid": spec.resource_uuid, "generation": generation},
            "spec": {
                "resource": spec.resource, "node": node.name, "resourceUuid": spec.resource_uuid,
                "replicaUuid": spec.replicas[&node.name], "sizeBytes": SIZE, "backing": {"pool": "default"},
                "peers": members.map(peer).collect::<Vec<_>>(),
            },
        });
        for (field, value) in order.as_object().unwrap() {
            let place = if field == "deletionTimestamp" {
                "metadata"
            } else {
                "spec"
            };
            object[place][field] = value.clone();
        }
        let aside = path.with_extension("aside");
        fs::write(&aside, serde_json::to_vec_pretty(&object).unwrap()).unwrap();
        fs::rename(&aside, &path).unwrap();
    }

    /// The first primary, and followers.
    pub(crate) fn create(&self, spec: &Spec) {
        for (index, node) in self.nodes.iter().enumerate() {
            let role = if index == 0 {
                json!({"role": "Primary", "cause": "Create"})
            } else {
                json!({})
            };
            let mut order = json!({"designation": designation(1)});
            order.as_object_mut().unwrap().extend(role.as_object().unwrap().clone());
            self.order(spec, node, &order);
        }
        self.nodes[0].wait_device(&spec.resource);
        for node in &self.nodes[1..] {
            node.wait_for(&spec.resource, "consistent", |status| {
                status["dataState"] == "Consistent"
            });
        }
    }

    pub(crate) fn mount(&self, device: &Path) -> PathBuf {
        let at = self.root.path().join(format!("mnt-{}", Uuid::new_v4().simple()));
        fs::create_dir(&at).unwrap();
        run("mount", &[device.to_str().unwrap(), at.to_str().unwrap()]);
        self.mounts.borrow_mut().push(at.clone());
        at
    }

    pub(crate) fn umount(&self, at: &Path) {
        run("umount", &[at.to_str().unwrap()]);
        self.mounts.borrow_mut().retain(|mount| mount != at);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for node in &self.nodes {
                eprintln!("== agent {}:\n{}", node.name, node.log());
            }
        }
        for at in self.mounts.borrow().iter() {
            let _ = Command::new("umount").arg("-l").arg(at).output();
        }
        for node in &self.nodes {
            node.destroy();
        }
    }
}

impl Node {
    pub(crate) fn new_boot(&self) {
        fs::write(self.dir.join("run").join("boot-id"), Uuid::new_v4().to_string()).unwrap();
    }

    fn log_file(&self, name: &str) -> fs::File {
        fs::File::options()
            .create(true)
            .append(true)
            .open(self.dir.join(format!("{name}.log")))
            .unwrap()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.dir.join("agent.log")).unwrap_or_default()
    }

    fn path(&self, below: &str) -> String {
        self.dir.join(below).to_str().unwrap().to_owned()
    }

    pub(crate) fn start_keeper(&self) {
        let child = Command::new(env!("CARGO_BIN_EXE_mars-device-keeper"))
            .args(["--dir", &self.path("run")])
            .stdin(Stdio::null())
            .stdout(self.log_file("keeper"))
            .stderr(self.log_file("keeper"))
            .spawn()
            .unwrap();
        self.keeper.replace(Some(child));
        eventually("keeper socket", || {
            self.dir.join("run/keeper.sock").exists().then_some(())
        });
    }

    pub(crate) fn command(&self) -> Command {
        self.command_in(self.cluster, &self.path("store"))
    }

    /// An agent of this node that was given another cluster or state directory.
    pub(crate) fn command_in(&self, cluster: ClusterId, state_dir: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mars-node-agent"));
        let pool = format!("default={}", self.path("pool"));
        command.args([
            "--node-name",
            &self.name,
            "--address",
            &self.address,
            "--frontend",
            "loop",
            "--pool",
            &pool,
        ]);
        command.args([
            "--state-dir",
            state_dir,
            "--run-dir",
            &self.path("run"),
            "--dev-dir",
            &self.path("dev"),
        ]);
        command.args(["--spec-dir", &self.path("specs"), "--pki-dir", &self.path("pki")]);
        command.args([
            "--boot-id-file",
            &self.path("run/boot-id"),
            "--cluster-uuid",
            &cluster.to_string(),
        ]);
        command.args([
            "--segment-bytes",
            "4194304",
            "--overlay-bytes",
            "67108864",
            "--drain-timeout-s",
            "5",
        ]);
        command.stdin(Stdio::null());
        command
    }

    pub(crate) fn start_agent(&self) {
        let child = self
            .command()
            .stdout(self.log_file("agent"))
            .stderr(self.log_file("agent"))
            .spawn()
            .unwrap();
        self.agent.replace(Some(child));
    }

    pub(crate) fn agent_pid(&self) -> rustix::process::Pid {
        let agent = self.agent.borrow();
        rustix::process::Pid::from_child(agent.as_ref().unwrap())
    }

    pub(crate) fn kill_agent(&self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            agent.wait().unwrap();
        }
    }

    /// SIGTERM, and the exit code.
    pub(crate) fn end_agent(&self) -> Option<i32> {
        rustix::process::kill_process(self.agent_pid(), rustix::process::Signal::TERM).unwrap();
        let mut agent = self.agent.take().unwrap();
        let status = eventually("the agent ends", || agent.try_wait().unwrap());
        status.code()
    }

    /// The machine dies: processes, devices, page cache of the agent's own knowledge.
    pub(crate) fn reboot_without_start(&self) {
        self.destroy();
        self.new_boot();
    }

    fn destroy(&self) {
        self.kill_agent();
        let devices: Vec<PathBuf> = fs::read_dir(self.dir.join("dev"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|link| fs::canonicalize(link.path()).ok())
            .collect();
        if let Some(mut keeper) = self.keeper.take() {
            let _ = keeper.kill();
            keeper.wait().unwrap();
        }
        // Without keeper and agent the connection is gone; the loop device above it is ours to remove.
        for device in devices {
            let _ = Command::new("losetup").arg("-d").arg(&device).output();
        }
        for link in fs::read_dir(self.dir.join("dev")).into_iter().flatten().flatten() {
            let _ = fs::remove_file(link.path());
        }
    }

    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
        let mut stream = UnixStream::connect(self.dir.join("run/agent.sock")).ok()?;
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.0\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        Some((head.split(' ').nth(1)?.parse().ok()?, serde_json::from_str(body).ok()?))
    }

    pub(crate) fn status(&self, resource: &str) -> Option<Value> {
        let (_, answer) = self.ask("GET", "/status", &Value::Null)?;
        let replica = answer["replicas"]
            .as_array()?
            .iter()
            .find(|replica| replica["resource"] == resource)?;
        Some(replica["status"].clone())
    }

    pub(crate) fn wait_for(&self, resource: &str, what: &str, check: impl Fn(&Value) -> bool) -> Value {
        let last = RefCell::new(None);
        let deadline = Instant::now() + LIMIT;
        loop {
            let status = self.status(resource);
            if let Some(status) = status.filter(|status| {
                last.replace(Some(status.clone()));
                check(status)
            }) {
                return status;
            }
            let last = last.borrow();
            assert!(
                Instant::now() < deadline,
                "{} never says {what}; last: {last:#?}",
                self.name
            );
            drop(last);
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until the agent says why it waits.
    pub(crate) fn wait_reason(&self, resource: &str, reason: &str) -> String {
        let ready = |status: &Value| {
            let conditions = status["conditions"].as_array()?;
            let ready = conditions.iter().find(|condition| condition["type"] == "Ready")?;
            (ready["reason"] == reason).then(|| ready["message"].as_str().unwrap_or_default().to_owned())
        };
        let status = self.wait_for(resource, reason, |status| ready(status).is_some());
        ready(&status).unwrap()
    }

    pub(crate) fn wait_device(&self, resource: &str) -> PathBuf {
        self.wait_for(resource, "a device", |status| {
            status["role"] == "Primary" && status["device"].is_object()
        });
        self.dir.join("dev").join(resource)
    }

    pub(crate) fn data_file(&self, spec: &Spec) -> PathBuf {
        self.dir
            .join("pool")
            .join(format!("{}.data", spec.replicas[&self.name]))
    }

    pub(crate) fn replica_dir(&self, spec: &Spec) -> PathBuf {
        self.dir
            .join("store/replicas")
            .join(spec.replicas[&self.name].to_string())
    }
}
