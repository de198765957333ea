//! Moves everything, at random, from one seed: requests, jobs, messages, crashes, broken links, handovers, failovers, copies.
//!
//! What must hold, and is checked all the time: reads return the newest bytes and crashes lose nothing that was promised
//! ([`Load`](mars_engine::testing::Load)); a handover loses nothing at all; a failover takes over exactly a state that the old primary once had; every consistent
//! disk equals the history up to its applied position ([`Oracle`]); no two primaries under one designation; at the end, when all
//! links and machines are back, all replicas become equal.

use crate::node::{self, Node};
use crate::oracle::Oracle;
use mars_engine::api::{Command, CommandId, DataState, Role, Switches};
use mars_engine::lineage::Cause;
use mars_engine::store::FileId;
use mars_engine::testing::{Crash, Rig, small_params};
use mars_engine::types::{Designation, EpochId, Position, ReplicaId};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng};
use std::collections::BTreeMap;
use std::time::Duration;
use uuid::Uuid;

mod crashes;
mod heal;
mod roles;

/// Size of the simulated device (bytes): three regions of a sync.
const DEVICE_BYTES: u64 = 768 << 10;

/// An hour (nanoseconds).
const HOUR_NS: u64 = 3600 * 1_000_000_000;

/// What to run.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// Everything follows from it.
    pub seed: u64,
    /// Random steps before everything is healed.
    pub steps: u32,
    /// Replicas.
    pub nodes: usize,
}

impl Config {
    /// Three replicas, a run of a few thousand I/Os.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            steps: 4_000,
            nodes: 3,
        }
    }
}

/// What happened in a run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Block requests submitted that change the device.
    pub changes: u64,
    /// I/Os of all simulated disks.
    pub ios: u64,
    /// Completed handovers.
    pub handovers: u64,
    /// Completed failovers.
    pub failovers: u64,
    /// Deaths of a process.
    pub kills: u64,
    /// Power losses.
    pub power_losses: u64,
    /// Times that a link broke.
    pub partitions: u64,
    /// Invalidations.
    pub invalidations: u64,
    /// Data disks compared with the history.
    pub disks_checked: u64,
    /// Records compared between replicas.
    pub records_checked: u64,
    /// Digest of the final device, so that two runs can be compared.
    pub digest: String,
}

/// A command whose reply moves the world.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// Promotion under this designation.
    Promote { designation: Designation, cause: Cause },
    /// Going on after a restart; which crash it was.
    Resume { crash: Crash },
    /// Close for a handover.
    Close,
}

/// A planned change of the primary.
#[derive(Debug, Clone, Copy)]
struct Handover {
    from: usize,
    to: usize,
    designation: Designation,
    /// The end of the predecessor's history, once it has closed.
    end: Option<Position>,
    promoting: bool,
}

struct World {
    rng: StdRng,
    ids: Vec<ReplicaId>,
    nodes: Vec<Node>,
    /// `false`: this pair does not hear each other (lower index first).
    links: BTreeMap<(usize, usize), bool>,
    oracle: Oracle,
    designation: Designation,
    designated: usize,
    handover: Option<Handover>,
    /// The newest epoch that a replica has reported as its own while it was the one to follow.
    epoch: Option<(usize, EpochId)>,
    orders: BTreeMap<(usize, CommandId), Order>,
    /// How each node that is down, or not yet resumed, crashed last.
    crashed: BTreeMap<usize, Crash>,
    steps: u64,
    report: Report,
}

/// Runs one seed.
///
/// # Panics
/// When anything that must hold does not: the message says what, the caller knows the seed.
#[must_use]
pub fn run(config: Config) -> Report {
    let mut world = World::new(config);
    world.create();
    for _ in 0..config.steps {
        world.step();
    }
    world.heal();
    world.report()
}

impl World {
    fn new(config: Config) -> Self {
        let replica = |index: usize| index as u128 + 1;
        let ids: Vec<ReplicaId> = (0..config.nodes)
            .map(|index| small_params(replica(index), 0).replica)
            .collect();
        let node = |index: usize| {
            let seed = config.seed.wrapping_mul(31).wrapping_add(index as u64);
            Node::new(ids[index], Rig::create(replica(index), seed, DEVICE_BYTES))
        };
        let nodes = (0..config.nodes).map(node).collect();
        let device_bytes = usize::try_from(DEVICE_BYTES).expect("it is small");
        World {
            rng: StdRng::seed_from_u64(config.seed),
            ids,
            nodes,
            links: BTreeMap::new(),
            oracle: Oracle::new(device_bytes),
            designation: Designation::default(),
            designated: 0,
            handover: None,
            epoch: None,
            orders: BTreeMap::new(),
            crashed: BTreeMap::new(),
            steps: 0,
            report: Report::default(),
        }
    }

    fn create(&mut self) {
        for at in 0..self.nodes.len() {
            self.set_members(at);
        }
        let designation = self.new_designation(0);
        self.promote(0, designation, Cause::Create);
        while self.nodes[0].role() != Some(Role::Primary) {
            self.nodes[0].rig.step();
            self.collect();
        }
    }

    fn set_members(&mut self, at: usize) {
        let others = self.ids.iter().copied().filter(|id| *id != self.ids[at]).collect();
        self.nodes[at].rig.order(Command::SetMembers(others));
    }

    fn new_designation(&mut self, node: usize) -> Designation {
        self.designation = Designation {
            number: self.designation.number + 1,
            id: Uuid::from_u128(self.rng.random()),
        };
        self.designated = node;
        self.designation
    }

    fn any(&mut self) -> usize {
        self.rng.random_range(0..self.nodes.len())
    }

    fn connected(links: &BTreeMap<(usize, usize), bool>, a: usize, b: usize) -> bool {
        links.get(&(a.min(b), a.max(b))).copied().unwrap_or(true)
    }

    fn step(&mut self) {
        match self.rng.random_range(0..1000) {
            0..=299 => self.use_devices(),
            300..=599 => {
                let at = self.any();
                self.nodes[at].rig.run_one_job();
            }
            600..=699 => self.talk(),
            700..=819 => self.transfer(),
            820..=899 => {
                let at = self.any();
                let links = self.links.clone();
                node::step_copy(&mut self.nodes, &self.ids, at, &|a, b| Self::connected(&links, a, b));
            }
            900..=949 => self.pass_time(),
            950..=959 => self.check(),
            960..=969 => self.switch_something(),
            970..=979 => self.break_or_mend_a_link(),
            980..=984 => self.crash_somebody(),
            985..=994 => self.start_somebody(),
            995..=997 => self.begin_handover(),
            998 => self.fail_over(),
            _ => self.repair(),
        }
        self.collect();
        self.drive_handover();
        self.note_deaths();
        self.steps += 1;
        if self.steps.is_multiple_of(8) {
            (0..self.nodes.len()).for_each(|at| self.learn(at));
        }
    }

    fn use_devices(&mut self) {
        for node in &mut self.nodes {
            let Some(load) = node.load.as_mut().filter(|load| load.outstanding() < 16) else {
                continue;
            };
            if node.rig.is_up() && node.rig.owner().status().role == Role::Primary {
                load.step(&mut node.rig);
                self.report.changes += 1;
            }
        }
    }

    fn pass_time(&mut self) {
        let by = Duration::from_micros(self.rng.random_range(100..60_000));
        for node in &mut self.nodes {
            node.rig.advance(by);
        }
        if self.rng.random_ratio(1, 64) {
            // Somebody sets a clock, by hours, forward or back.
            let at = self.any();
            let wall_ns = self.nodes[at].rig.now.wall_ns;
            let off_ns = self.rng.random_range(0..12 * HOUR_NS);
            self.nodes[at].rig.now.wall_ns = wall_ns / (24 * HOUR_NS) * (24 * HOUR_NS) + off_ns;
        }
    }

    fn talk(&mut self) {
        let (from, to) = (self.any(), self.any());
        if from != to && Self::connected(&self.links, from, to) {
            node::gossip(&mut self.nodes, &self.ids, from, to);
            self.learn(from);
        }
    }

    fn transfer(&mut self) {
        let at = self.any();
        let links = self.links.clone();
        self.set_wish(at);
        node::step_fetch(&mut self.nodes, &self.ids, at, &|a, b| Self::connected(&links, a, b));
    }

    /// As the operator learns it: what the one to follow reports as primary, under the newest designation or on the way to the next.
    fn learn_epoch(&mut self) {
        let leader = self.handover.map_or(self.designated, |handover| handover.from);
        let known = self.epoch.filter(|(replica, _)| *replica == leader);
        let node = &self.nodes[leader];
        let begun = node.is_up().then(|| node.rig.owner().status()).and_then(|status| {
            let counts = known.is_some() || self.handover.is_some() || status.designation == self.designation;
            let newest = status.lineage.0.last()?;
            (counts && status.role == Role::Primary && newest.origin == self.ids[leader]).then_some(newest.id)
        });
        self.epoch = begun.map(|id| (leader, id)).or(known);
    }

    fn set_wish(&mut self, at: usize) {
        self.learn_epoch();
        let handover = self.handover;
        let wish = &mut self.nodes[at].wish;
        wish.designation = self.designation;
        wish.designated = Some(self.ids[self.designated]);
        // As the agent reads its orders: the successor learns of the handover with its end, the predecessor with the order to close.
        wish.handover_end = handover
            .filter(|handover| handover.to == at)
            .and_then(|handover| handover.end);
        wish.predecessor = handover.map(|handover| self.ids[handover.from]);
        wish.handover = wish.predecessor.is_some();
        wish.epoch = self.epoch.map(|(_, id)| id);
    }

    fn learn(&mut self, at: usize) {
        let node = &self.nodes[at];
        if node.is_up() {
            let view = node.rig.owner().log_view();
            self.oracle.learn(at, &node.rig.store, view);
        }
    }

    /// Compares every consistent disk on which nothing is under way with the history.
    fn check(&mut self) {
        for at in 0..self.nodes.len() {
            self.learn(at);
        }
        let mut holders: BTreeMap<u64, usize> = BTreeMap::new();
        for (at, node) in self.nodes.iter().enumerate().filter(|(_, node)| node.is_up()) {
            let status = node.rig.owner().status();
            if status.role == Role::Primary {
                let twin = holders.insert(status.designation.number, at);
                assert!(
                    twin.is_none(),
                    "nodes {twin:?} and {at} are primary under one designation"
                );
            }
            let settled = status.applied.lsn == status.dirty_end.lsn && !status.lineage.0.is_empty();
            if status.data == DataState::Consistent && settled {
                let disk = node.rig.store.peek(&FileId::Data).expect("every node has a data disk");
                let expected = self.oracle.content_at(&status.lineage, status.applied);
                assert!(
                    disk == expected,
                    "the disk of node {at} is not the history at {}",
                    status.applied
                );
                self.report.disks_checked += 1;
            }
        }
    }

    fn switch_something(&mut self) {
        let at = self.any();
        let switches = Switches {
            fetch: self.rng.random_bool(0.8),
            replay: self.rng.random_bool(0.7),
            sync: self.rng.random_bool(0.9),
            apply_delay: Duration::ZERO,
        };
        self.nodes[at].rig.order(Command::SetSwitches(switches));
    }

    fn break_or_mend_a_link(&mut self) {
        let (a, b) = (self.any(), self.any());
        if a == b {
            return;
        }
        let works = self.rng.random_bool(0.6);
        self.links.insert((a.min(b), a.max(b)), works);
        if !works {
            self.report.partitions += 1;
            self.nodes[a].disconnect(b);
            self.nodes[b].disconnect(a);
        }
    }

    fn report(mut self) -> Report {
        let leader = self.designated;
        let content = self.nodes[leader].rig.content();
        for node in &self.nodes {
            let disk = node.rig.store.peek(&FileId::Data).expect("every node has a data disk");
            assert!(disk == content, "a replica differs from the device at the end");
        }
        self.report.ios = self.nodes.iter().map(|node| node.rig.store.io_count()).sum();
        self.report.records_checked = self.oracle.records_checked;
        self.report.digest = format!("{:016x}", fingerprint(&content));
        self.report
    }
}

/// FNV-1a, for comparing two runs.
fn fingerprint(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
