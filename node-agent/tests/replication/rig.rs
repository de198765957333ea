//! Several nodes of one cluster in one process: certificates, hubs, replicas, and a switchable wire between them.

use super::machine::{Machine, Wall};
use mars_engine::api::{Cause, Command, Compression, DataState, Durability, ReplicaStatus, Switches, Tuning};
use mars_engine::owner::OpenParams;
use mars_engine::replication::fetch::Wish;
use mars_engine::store_fs::FsStore;
use mars_engine::types::{ClusterId, Designation, Lamport, NodeId, ReplicaId, ResourceId};
use mars_node_agent::replication::certs::{CertSource, DirectorySource};
use mars_node_agent::replication::clock::SharedClock;
use mars_node_agent::replication::pki::{Authority, NODE_VALIDITY};
use mars_node_agent::replication::tls::PeerIdentity;
use mars_node_agent::replication::{Congestion, Follower, Hub, HubConfig, Membership, PeerAddress, ReplicationStatus};
use std::fs::File;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Nothing in a test takes longer, also on a loaded machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(90);

pub(crate) struct Cluster {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) id: ClusterId,
    pub(crate) resource: ResourceId,
    pub(crate) authority: Authority,
    pub(crate) nodes: Vec<Node>,
    pub(crate) size_bytes: u64,
}

/// What tests choose.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) size_bytes: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) retention_bytes: u64,
    pub(crate) congestion: Congestion,
    pub(crate) compression: Compression,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            size_bytes: 64 << 20,
            segment_bytes: 4 << 20,
            retention_bytes: 0,
            congestion: Congestion::Bbr,
            compression: Compression::None,
        }
    }
}

pub(crate) struct Node {
    pub(crate) index: usize,
    pub(crate) identity: PeerIdentity,
    pub(crate) replica: ReplicaId,
    pub(crate) pki_dir: PathBuf,
    pub(crate) certs: Arc<DirectorySource>,
    dir: PathBuf,
    shape: Shape,
    resource: ResourceId,
    pub(crate) machine: Machine,
    /// Its wall clock.
    pub(crate) wall: Wall,
    pub(crate) hub: Hub,
    stop: CancellationToken,
    pub(crate) membership: watch::Sender<Arc<Membership>>,
    pub(crate) follower: Option<Follower>,
    /// Where the server really listens.
    pub(crate) server: SocketAddr,
    /// What the others dial: leads to the server while the wire is whole.
    pub(crate) wire: Wire,
}

impl Cluster {
    /// `count` members that know each other; nobody is primary yet.
    pub(crate) async fn new(count: usize, shape: Shape) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let id = ClusterId(Uuid::new_v4());
        let resource = ResourceId(Uuid::new_v4());
        let authority = Authority::generate(id).unwrap();
        let mut cluster = Self {
            dir,
            id,
            resource,
            authority,
            nodes: Vec::new(),
            size_bytes: shape.size_bytes,
        };
        for index in 0..count {
            let node = Node::start(&cluster, index, shape.clone()).await;
            cluster.nodes.push(node);
        }
        cluster.announce(|_| Wish::default());
        cluster
    }

    /// Tells all members of each other.
    pub(crate) fn announce(&self, wish: impl Fn(usize) -> Wish) {
        for node in &self.nodes {
            let peers = self
                .nodes
                .iter()
                .filter(|peer| peer.index != node.index)
                .map(Node::address)
                .collect();
            let membership = Membership {
                wish: wish(node.index),
                peers,
                compression: node.shape.compression,
                ..Membership::default()
            };
            node.membership.send_replace(Arc::new(membership));
        }
    }

    /// Makes a member primary under the next designation, and tells all.
    pub(crate) async fn promote(&self, index: usize, number: u64, cause: Cause) {
        let designation = designation(number);
        let members: Vec<ReplicaId> = self.nodes.iter().map(|node| node.replica).collect();
        for node in &self.nodes {
            let others = members
                .iter()
                .copied()
                .filter(|replica| *replica != node.replica)
                .collect();
            node.machine.order(Command::SetMembers(others)).await.unwrap();
        }
        self.nodes[index]
            .machine
            .order(Command::Promote { designation, cause })
            .await
            .unwrap();
        let replica = self.nodes[index].replica;
        self.announce(|_| Wish {
            designation,
            designated: Some(replica),
            ..Wish::default()
        });
    }

    /// Waits until a node has seen something stamped `stamp` or later.
    pub(crate) async fn until_heard(&self, index: usize, stamp: Lamport) {
        let deadline = Instant::now() + LIMIT;
        while self.nodes[index].hub.clock().last() < stamp {
            assert!(Instant::now() < deadline, "node {index} never hears of {stamp:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Bytes that follow from a number.
pub(crate) fn payload(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// Members that are consistent and follow node 0.
pub(crate) async fn followed(count: usize, shape: Shape) -> Cluster {
    let cluster = Cluster::new(count, shape).await;
    cluster.promote(0, 1, Cause::Create).await;
    for node in &cluster.nodes[1..] {
        node.until("consistent after joining", |status| {
            status.data == DataState::Consistent
        })
        .await;
    }
    cluster
}

pub(crate) fn designation(number: u64) -> Designation {
    Designation {
        number,
        id: Uuid::from_u128(u128::from(number)),
    }
}

pub(crate) fn all_on() -> Switches {
    Switches {
        fetch: true,
        replay: true,
        sync: true,
        apply_delay: Duration::ZERO,
    }
}

impl Node {
    async fn start(cluster: &Cluster, index: usize, shape: Shape) -> Self {
        let identity = PeerIdentity {
            cluster: cluster.id,
            node: NodeId(Uuid::new_v4()),
        };
        let dir = cluster.dir.path().join(format!("node-{index}"));
        let pki_dir = dir.join("pki");
        std::fs::create_dir_all(&dir).unwrap();
        cluster
            .authority
            .equip(&pki_dir, cluster.id, identity.node, NODE_VALIDITY)
            .unwrap();
        let certs = Arc::new(DirectorySource::open(&pki_dir, identity).unwrap());
        let replica = ReplicaId(Uuid::new_v4());
        FsStore::create_layout(&dir).unwrap();
        let data = File::create_new(dir.join("data")).unwrap();
        data.set_len(shape.size_bytes).unwrap();
        let (wall, clock) = new_clock(Wall::default());
        let ids = (cluster.id, cluster.resource, replica);
        let machine = open_machine(&dir, ids, &shape, true, (&wall, &clock));
        machine.order(Command::SetSwitches(all_on())).await.unwrap();
        let (hub, server, stop) = start_hub(identity, certs.clone(), &shape, clock).await;
        let wire = Wire::new(server).await;
        let (membership, wishes) = watch::channel(Arc::default());
        let follower = hub
            .join(cluster.resource, replica, Arc::new(machine.clone()), wishes)
            .unwrap();
        Self {
            index,
            identity,
            replica,
            pki_dir,
            certs,
            dir,
            resource: cluster.resource,
            shape,
            machine,
            wall,
            hub,
            stop,
            membership,
            follower: Some(follower),
            server,
            wire,
        }
    }

    pub(crate) fn address(&self) -> PeerAddress {
        PeerAddress {
            replica: self.replica,
            node: Some(self.identity.node),
            address: self.wire.address.to_string(),
        }
    }

    pub(crate) fn now(&self) -> Arc<ReplicaStatus> {
        self.machine.now()
    }

    pub(crate) fn replication(&self) -> Arc<ReplicationStatus> {
        self.follower.as_ref().unwrap().status().borrow().clone()
    }

    /// The agent dies without a word; what it held in memory is gone, its machine runs on.
    pub(crate) async fn kill(&mut self) {
        self.machine.kill();
        self.stop.cancel();
        if let Some(follower) = self.follower.take() {
            follower.stop().await;
        }
    }

    /// A new agent after `kill`, with the same disk, identity and address.
    pub(crate) async fn restart(&mut self) {
        let (wall, clock) = new_clock(self.wall.clone());
        let ids = (self.identity.cluster, self.resource, self.replica);
        self.machine = open_machine(&self.dir, ids, &self.shape, false, (&wall, &clock));
        let (hub, server, stop) = start_hub(self.identity, self.certs.clone(), &self.shape, clock).await;
        self.wire.lead_to(server);
        let port = Arc::new(self.machine.clone());
        self.follower = Some(
            hub.join(self.resource, self.replica, port, self.membership.subscribe())
                .unwrap(),
        );
        (self.hub, self.server, self.stop) = (hub, server, stop);
    }

    /// Waits until the replica's status is as wanted.
    pub(crate) async fn until(&self, what: &str, wanted: impl Fn(&ReplicaStatus) -> bool) -> Arc<ReplicaStatus> {
        let mut status = mars_node_agent::replication::ReplicaPort::status(&self.machine);
        match tokio::time::timeout(LIMIT, status.wait_for(|status| wanted(status))).await {
            Ok(status) => status.expect("the replica runs").clone(),
            Err(elapsed) => panic!(
                "node {} never got there ({elapsed}): {what}\n{:#?}\n{:#?}",
                self.index,
                self.machine.now(),
                self.replication()
            ),
        }
    }

    /// Waits until replication is as wanted.
    pub(crate) async fn until_replication(&self, what: &str, wanted: impl Fn(&ReplicationStatus) -> bool) {
        let mut status = self.follower.as_ref().unwrap().status();
        let came = tokio::time::timeout(LIMIT, status.wait_for(|status| wanted(status))).await;
        assert!(came.is_ok(), "node {}: {what}: {:#?}", self.index, self.replication());
    }

    /// Waits until this replica has what `other` has, durably and on its data disk.
    pub(crate) async fn until_like(&self, other: &Node) {
        let deadline = Instant::now() + LIMIT;
        loop {
            other.machine.barrier().await;
            let (ours, end) = (self.now(), other.now().durable);
            if ours.durable == end && ours.applied == end {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "node {} has not what node {} has:\n{ours:#?}\n{:#?}",
                self.index,
                other.index,
                self.replication()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub(crate) fn disk(&self) -> Vec<u8> {
        std::fs::read(self.dir.join("data")).unwrap()
    }

    /// Flips a bit of these bytes, wherever in the log they stand.
    pub(crate) fn damage_log(&self, bytes: &[u8]) {
        for entry in std::fs::read_dir(self.dir.join("log")).unwrap() {
            let path = entry.unwrap().path();
            let mut image = std::fs::read(&path).unwrap();
            if let Some(at) = image.windows(bytes.len()).position(|window| window == bytes) {
                image[at] ^= 1;
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&image[at..=at], at as u64).unwrap();
                return;
            }
        }
        panic!("the log does not hold these bytes");
    }

    pub(crate) fn disk_path(&self) -> PathBuf {
        self.dir.join("data")
    }
}

/// The clock of a node, for its messages and its records.
fn new_clock(wall: Wall) -> (Wall, Arc<SharedClock>) {
    let asked = wall.clone();
    (wall, Arc::new(SharedClock::with_wall(move || asked.ns())))
}

fn open_machine(
    dir: &Path,
    (cluster, resource, replica): (ClusterId, ResourceId, ReplicaId),
    shape: &Shape,
    create: bool,
    (wall, clock): (&Wall, &SharedClock),
) -> Machine {
    let data = File::options().read(true).write(true).open(dir.join("data")).unwrap();
    let store = FsStore::open(dir, data).unwrap();
    let params = OpenParams {
        cluster,
        resource,
        replica,
        boot_id: Uuid::from_u128(1),
        create: create.then_some(shape.size_bytes),
        tuning: Tuning {
            durability: Durability::OnFlush,
            compression: Compression::None,
            overlay_budget_bytes: 32 << 20,
            segment_bytes: shape.segment_bytes,
            retention_bytes: shape.retention_bytes,
        },
        seed: *Uuid::new_v4().as_bytes().repeat(2).first_chunk().unwrap(),
    };
    Machine::start(store, params, wall.clone(), clock.engine())
}

async fn start_hub(
    identity: PeerIdentity,
    certs: Arc<dyn CertSource>,
    shape: &Shape,
    clock: Arc<SharedClock>,
) -> (Hub, SocketAddr, CancellationToken) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = listener.local_addr().unwrap();
    let config = HubConfig {
        heartbeat: Duration::from_millis(200),
        liveness: Duration::from_secs(2),
        reconnect_limit: Duration::from_secs(1),
        congestion: shape.congestion,
        lanes: 3,
        ..HubConfig::new(identity.cluster, identity.node)
    };
    let hub = Hub::new(config, certs, clock);
    let stop = CancellationToken::new();
    let (serving, token) = (hub.clone(), stop.clone());
    tokio::spawn(async move { serving.serve(listener, token).await });
    (hub, server, stop)
}

/// A forwarder in front of a server: counts bytes, can be cut, and can go on after a cut.
#[derive(Clone)]
pub(crate) struct Wire {
    pub(crate) address: SocketAddr,
    target: Arc<watch::Sender<SocketAddr>>,
    whole: Arc<AtomicBool>,
    cut: Arc<watch::Sender<u64>>,
    /// Bytes from the server to those who dialled it.
    pub(crate) sent: Arc<AtomicU64>,
}

impl Wire {
    async fn new(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wire = Self {
            address: listener.local_addr().unwrap(),
            target: Arc::new(watch::channel(server).0),
            whole: Arc::new(AtomicBool::new(true)),
            cut: Arc::new(watch::channel(0).0),
            sent: Arc::default(),
        };
        let accepting = wire.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if accepting.whole.load(Ordering::SeqCst) {
                    tokio::spawn(accepting.clone().forward(client));
                }
            }
        });
        wire
    }

    fn lead_to(&self, server: SocketAddr) {
        self.target.send_replace(server);
    }

    /// All connections break at once; new ones are refused until `heal`.
    pub(crate) fn cut(&self) {
        self.whole.store(false, Ordering::SeqCst);
        self.cut.send_modify(|count| *count += 1);
    }

    pub(crate) fn heal(&self) {
        self.whole.store(true, Ordering::SeqCst);
    }

    /// All connections break; new ones work at once.
    pub(crate) fn disturb(&self) {
        self.cut();
        self.heal();
    }

    async fn forward(self, client: TcpStream) {
        let mut cut = self.cut.subscribe();
        cut.mark_unchanged();
        let target = *self.target.borrow();
        let Ok(server) = TcpStream::connect(target).await else {
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        let (mut client_in, mut client_out) = client.into_split();
        let (mut server_in, mut server_out) = server.into_split();
        let up = async { tokio::io::copy(&mut client_in, &mut server_out).await.map(drop) };
        let down = async {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let count = server_in.read(&mut buffer).await?;
                if count == 0 {
                    return std::io::Result::Ok(());
                }
                self.sent.fetch_add(count as u64, Ordering::Relaxed);
                client_out.write_all(&buffer[..count]).await?;
            }
        };
        tokio::select! {
            _ = cut.changed() => {}
            _ = up => {}
            _ = down => {}
        }
    }
}
