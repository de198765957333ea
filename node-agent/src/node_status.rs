//! `MarsNode`: read for pools and forgotten replicas, written with what this node is and has.
//!
//! Invariant: the administrator's half is only read, and remembered on disk, so that a restart without the API server knows
//! its pools; the inventory lists every replica in the store, `MarsReplica` or not (P12).

use crate::config::RunArgs;
use crate::frontend::harden::Hardening;
use crate::frontend::{FrontendChoice, FrontendKind};
use crate::layout::{self, LayoutError};
use crate::pool::{self, PoolError, PoolWish, Space};
use crate::reconcile::context::NodeContext;
use crate::reconcile::inventory::{self, Inventory};
use crate::reconcile::object::{signed, time_now};
use crate::reconcile::supervisor::Request;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use mars_crds::Size;
use mars_crds::conditions::{self, Truth};
use mars_crds::node::{Forgotten, Frontend, MarsNodeSpec, MarsNodeStatus, PoolStatus, StoreSpace};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tracing::{debug, warn};

/// How often the node says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(8);
/// How often it looks whether there is something new to say.
const LOOK: Duration = Duration::from_secs(2);

/// Keeps a `MarsNode` current.
pub struct NodeReporter {
    /// What the node has.
    pub node: Arc<NodeContext>,
    /// How it was started.
    pub args: RunArgs,
    /// What the kernel granted.
    pub hardening: Hardening,
    /// To the supervisor.
    pub requests: mpsc::Sender<Request>,
}

/// What `MarsNode.spec` said last, from disk; empty when it never said anything.
#[must_use]
pub fn cached_spec(node_dir: &std::path::Path) -> MarsNodeSpec {
    let path = node_dir.join("node-spec.json");
    let Ok(bytes) = std::fs::read(&path) else {
        return MarsNodeSpec::default();
    };
    serde_json::from_slice(&bytes).unwrap_or_else(|error| {
        warn!(
            "{} is not used: {error}; pools of MarsNode are known once the API server answers",
            path.display()
        );
        MarsNodeSpec::default()
    })
}

fn cache_spec(node_dir: &std::path::Path, spec: &MarsNodeSpec) -> Result<(), LayoutError> {
    let path = node_dir.join("node-spec.json");
    let json = serde_json::to_vec_pretty(spec)
        .map_err(|error| layout::io_error("encode", &path)(std::io::Error::other(error)))?;
    layout::write_atomically(&path, &json)
}

/// All pools: those of the command line win over those of `MarsNode` with the same name.
#[must_use]
pub fn pool_wishes(args: &RunArgs, spec: &MarsNodeSpec) -> Vec<PoolWish> {
    let from_spec = spec.pools.iter().map(|pool| PoolWish {
        name: pool.name.clone(),
        directory: pool.directory.clone().into(),
    });
    from_spec.chain(args.pools.iter().cloned()).collect()
}

/// Space in words and numbers.
fn store_space(space: Space) -> StoreSpace {
    let free = signed(space.available_bytes);
    StoreSpace {
        total_bytes: signed(space.capacity_bytes),
        free_bytes: free,
        free: Size::from_bytes(free / (1 << 20) * (1 << 20)).as_str().to_owned(),
        level: level(space),
    }
}

/// Level of shortage: how many of four reserves of 2 GiB (on small stores 2 %) each are not free any more.
fn level(space: Space) -> i32 {
    const RESERVE_BYTES: u64 = 2 << 30;
    let reserve = RESERVE_BYTES.min(space.capacity_bytes / 50).max(1);
    4 - i32::try_from((space.available_bytes / reserve).min(4)).unwrap_or(4)
}

impl NodeReporter {
    /// Runs until the agent stops. The first report comes as soon as the API server answers.
    pub async fn run(self) {
        let stop = self.node.stop.clone();
        let mut spec = cached_spec(&self.node.layout.node_dir());
        let (mut written, mut last_write) = (None::<MarsNodeStatus>, None::<tokio::time::Instant>);
        let mut reachable = true;
        loop {
            let due = last_write.is_none_or(|at| at.elapsed() >= HEARTBEAT);
            let status = self
                .status(
                    &spec,
                    written
                        .as_ref()
                        .map(|status| status.conditions.as_slice())
                        .unwrap_or_default(),
                )
                .await;
            let changed = written.as_ref().is_none_or(|written| differs(written, &status));
            if due || changed {
                match self.exchange(&mut spec, &status).await {
                    Ok(()) => {
                        (written, reachable) = (Some(status), true);
                    }
                    Err(error) if reachable => {
                        warn!(%error, "MarsNode not delivered; trying again");
                        reachable = false;
                    }
                    Err(error) => debug!(%error, "MarsNode not delivered"),
                }
                last_write = Some(tokio::time::Instant::now());
            }
            // Without an API server the next try waits for the heartbeat; else a change is told within moments.
            let pause = if reachable { LOOK } else { HEARTBEAT };
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    async fn exchange(
        &self,
        spec: &mut MarsNodeSpec,
        status: &MarsNodeStatus,
    ) -> Result<(), crate::reconcile::sink::SinkError> {
        let name = &self.node.node_name;
        let told = self.node.sink.node(name).await?.spec;
        if told != *spec {
            let problems = mars_crds::validate::node(&mars_crds::MarsNode::new(name, told.clone()));
            if problems.is_empty() {
                self.take_spec(&told);
                *spec = told;
            } else {
                warn!(
                    "MarsNode {name} is not followed: {}",
                    mars_crds::validate::summary(&problems)
                );
            }
        }
        // The receiver is gone only when the agent stops.
        let _ = self.requests.send(Request::Forgotten(spec.forgotten.clone())).await;
        self.node.sink.node_status(name, status).await
    }

    fn take_spec(&self, spec: &MarsNodeSpec) {
        self.node.pools().configure(pool_wishes(&self.args, spec));
        if let Err(error) = cache_spec(&self.node.layout.node_dir(), spec) {
            warn!(%error, "pools could not be remembered: a restart without the API server would not know them");
        }
    }

    async fn status(&self, spec: &MarsNodeSpec, previous: &[Condition]) -> MarsNodeStatus {
        let (node, forgotten) = (self.node.clone(), spec.forgotten.clone());
        let looked = tokio::task::spawn_blocking(move || look(&node, &forgotten)).await;
        let found = looked.unwrap_or_default();
        let inventory = found.inventory.unwrap_or_else(|| Inventory {
            replicas: Vec::new(),
            unreadable: vec!["the store of replicas cannot be listed".to_owned()],
        });
        let node = &self.node;
        let frontends = node.runtime.frontends();
        let available = frontends.names();
        let mut status = MarsNodeStatus {
            node_uuid: Some(node.node.0),
            cluster_uuid: Some(node.cluster.0),
            boot_id: Some(node.boot.0.to_string()),
            state: "Ready".to_owned(),
            address: self.args.replication_address().to_string(),
            metrics_address: self
                .args
                .metrics_address
                .map(|address| address.to_string())
                .unwrap_or_default(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_version: rustix::system::uname().release().to_string_lossy().into_owned(),
            frontend: picked(node.frontend, &available).to_owned(),
            frontends: frontend_list(&available),
            log_store: found.log_store.map(store_space),
            pools: found.pools,
            lamport_slip_ms: found.lamport_slip_ms,
            last_seen: Some(time_now()),
            inventory_complete: inventory.unreadable.is_empty(),
            replicas: inventory.replicas,
            conditions: previous.to_vec(),
        };
        self.set_conditions(spec, &inventory.unreadable, &mut status);
        status
    }

    fn set_conditions(&self, spec: &MarsNodeSpec, unreadable: &[String], status: &mut MarsNodeStatus) {
        let now = time_now();
        let absent: Vec<&str> = status
            .pools
            .iter()
            .filter(|pool| pool.state != "Ready")
            .map(|pool| pool.name.as_str())
            .collect();
        let absent = absent.join(", ");
        let trouble = self.node.runtime.frontends().trouble();
        let no_frontend = status
            .frontend
            .is_empty()
            .then(|| "no block devices can be made: start the device keeper, or load ublk_drv".to_owned());
        let incomplete = (!unreadable.is_empty()).then(|| {
            format!(
                "what the store holds is not known, so nothing new is made here: {}. Mount or restore it, or move it out of the store",
                unreadable.join("; ")
            )
        });
        let problem = no_frontend
            .or_else(|| incomplete.clone())
            .or_else(|| trouble.clone())
            .or((!absent.is_empty()).then(|| format!("pools not there: {absent}. Mount them; their replicas wait")));
        if problem.is_some() {
            "Degraded".clone_into(&mut status.state);
        }
        let list = &mut status.conditions;
        let mut set = |name: &str, truth: Truth, reason: &str, message: &str| {
            conditions::set(list, name, truth, reason, message, None, &now);
        };
        match &problem {
            Some(message) => set(conditions::READY, Truth::False, "Degraded", message),
            None => set(conditions::READY, Truth::True, "Running", "the agent serves"),
        }
        match &trouble {
            Some(message) => set("DevicesSurvive", Truth::False, "KeeperTrouble", message),
            None => set(
                "DevicesSurvive",
                Truth::True,
                "Kept",
                "open devices survive the death of this agent",
            ),
        }
        match &incomplete {
            Some(message) => set("InventoryComplete", Truth::False, "Unreadable", message),
            None => set(
                "InventoryComplete",
                Truth::True,
                "AllRead",
                "every directory in the store says whose it is and what it has seen",
            ),
        }
        let slip = "reclaim of memory may wait for this agent: grant CAP_SYS_RESOURCE";
        match &self.hardening.io_flusher {
            Ok(()) => set(
                "IoFlusher",
                Truth::True,
                "Granted",
                "memory reclaim never waits for this agent",
            ),
            Err(reason) => set("IoFlusher", Truth::False, "Refused", &format!("{reason}: {slip}")),
        }
        if !spec.forgotten.is_empty() {
            let names: Vec<&str> = spec
                .forgotten
                .iter()
                .map(|forgotten| forgotten.resource.as_str())
                .collect();
            set(
                "Quarantine",
                Truth::True,
                "Forgotten",
                &format!("given up while the node was away: {}", names.join(", ")),
            );
        }
    }
}

/// Whether a report is worth a write before the next heartbeat.
fn differs(a: &MarsNodeStatus, b: &MarsNodeStatus) -> bool {
    let lasting = |status: &MarsNodeStatus| {
        let mut status = status.clone();
        status.last_seen = None;
        status.lamport_slip_ms = 0;
        for space in status
            .log_store
            .iter_mut()
            .chain(status.pools.iter_mut().map(|pool| &mut pool.space))
        {
            (space.free_bytes, space.free) = (0, String::new());
        }
        status
    };
    lasting(a) != lasting(b)
}

fn kind_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::Loop => "loop",
        FrontendKind::Ublk => "ublk",
    }
}

/// Name of the frontend that new devices get; empty when there is none.
fn picked(choice: FrontendChoice, available: &[FrontendKind]) -> &'static str {
    let fits = |kind: &&FrontendKind| match choice {
        FrontendChoice::Auto => true,
        FrontendChoice::Loop => **kind == FrontendKind::Loop,
        FrontendChoice::Ublk => **kind == FrontendKind::Ublk,
    };
    available.iter().find(fits).map_or("", |kind| kind_name(*kind))
}

fn frontend_list(available: &[FrontendKind]) -> Vec<Frontend> {
    let reason = |kind| match kind {
        FrontendKind::Loop => "needs the device keeper",
        FrontendKind::Ublk => "needs the kernel module ublk_drv",
    };
    let entry = |kind| {
        let is_there = available.contains(&kind);
        let reason = if is_there {
            String::new()
        } else {
            reason(kind).to_owned()
        };
        Frontend {
            name: kind_name(kind).to_owned(),
            available: is_there,
            reason,
        }
    };
    [FrontendKind::Ublk, FrontendKind::Loop].map(entry).to_vec()
}

/// What takes a look at disks.
#[derive(Default)]
struct Found {
    log_store: Option<Space>,
    pools: Vec<PoolStatus>,
    inventory: Option<Inventory>,
    lamport_slip_ms: i64,
}

fn look(node: &NodeContext, forgotten: &[Forgotten]) -> Found {
    let inventory = inventory::take(node, forgotten)
        .map_err(|error| warn!(%error, "the inventory is not complete"))
        .ok();
    Found {
        log_store: pool::space(&node.layout.replicas_dir()).ok(),
        pools: pools(node),
        inventory,
        lamport_slip_ms: i64::try_from(node.clock.slip().as_millis()).unwrap_or(i64::MAX),
    }
}

fn pools(node: &NodeContext) -> Vec<PoolStatus> {
    let mut pools = node.pools();
    let names = pools.names();
    let mut status = |name: String| match pools.open(&name) {
        Ok(pool) => PoolStatus {
            uuid: Some(pool.uuid),
            state: "Ready".to_owned(),
            space: pool::space(&pool.directory).map(store_space).unwrap_or_default(),
            name,
        },
        Err(error) => {
            let (uuid, state) = match error {
                PoolError::Absent { uuid, .. } => (Some(uuid), "PoolAbsent"),
                PoolError::NoDirectory { .. } => (None, "NoDirectory"),
                PoolError::Foreign { .. } => (None, "Foreign"),
                _ => (None, "Failed"),
            };
            debug!(pool = name, %error, "pool not usable");
            PoolStatus {
                name,
                uuid,
                state: state.to_owned(),
                space: StoreSpace::default(),
            }
        }
    };
    names.into_iter().map(&mut status).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortage_has_four_levels() {
        let level_at = |capacity_bytes, available_bytes| {
            level(Space {
                capacity_bytes,
                available_bytes,
            })
        };
        assert_eq!(
            [500, 80, 79, 59, 39, 19, 0].map(|free| level_at(1000, free)),
            [0, 0, 1, 2, 3, 4, 4]
        );
        assert_eq!([9, 7, 1].map(|gib| level_at(1 << 40, gib << 30)), [0, 1, 4]);
    }

    #[test]
    fn a_frontend_that_was_asked_for_is_not_replaced_by_another() {
        assert_eq!(
            picked(FrontendChoice::Auto, &[FrontendKind::Ublk, FrontendKind::Loop]),
            "ublk"
        );
        assert_eq!(
            picked(FrontendChoice::Loop, &[FrontendKind::Ublk, FrontendKind::Loop]),
            "loop"
        );
        assert_eq!(picked(FrontendChoice::Ublk, &[FrontendKind::Loop]), "");
    }
}
