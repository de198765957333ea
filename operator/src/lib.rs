//! The operator of MARS: observe → validate → plan → apply → status.
//!
//! * [`observe`] builds a [`World`] from the watch [`cache`] or, for decisions, freshly from the API server;
//! * validation (`mars_crds::validate`) and all decisions happen in [`mod@plan`], which is pure;
//! * [`apply`] writes what was planned, each write guarded by a resourceVersion;
//! * [`controller`] drives passes, [`leader`] lets usually one operator act.
//!
//! Invariant: two operators that act at the same time never grant the primary role twice; leader election only saves work.

#![forbid(unsafe_code)]

pub mod apply;
pub mod cache;
pub mod cluster;
mod controller;
pub mod events;
pub mod hearing;
pub mod leader;
pub mod observe;
pub mod plan;
pub mod queue;
mod silence;
mod unowned;
pub mod world;

pub use plan::{Intent, Plan, plan};
pub use world::{KubeNode, NodeView, Settings, World, with_own_status};

use kube::Client;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use controller::Controller;
use leader::{Candidate, Election};

/// How an operator runs.
#[derive(Debug, Clone)]
pub struct Config {
    /// Namespace of the Lease and of the Secret `mars-cluster`.
    pub namespace: String,
    /// Who this operator is; unique among operators (pod name).
    pub identity: String,
    /// Whether to compete for the Lease; without, this operator acts at once.
    pub leader_election: bool,
    /// How long a lease lasts without renewal.
    pub lease_duration: Duration,
    /// Passes at the same time.
    pub workers: usize,
    /// Every resource is looked at this often.
    pub resync: Duration,
    /// The cluster has this uuid already (chart value); `None`: make one if there is none.
    pub adopt_cluster_uuid: Option<Uuid>,
    /// Limits and thresholds.
    pub settings: Settings,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            namespace: "mars-system".to_owned(),
            identity: format!("operator-{}", Uuid::new_v4().simple()),
            leader_election: true,
            lease_duration: Duration::from_secs(15),
            workers: 4,
            resync: Duration::from_secs(10),
            adopt_cluster_uuid: None,
            settings: Settings::default(),
        }
    }
}

/// Runs an operator until `cancel`.
///
/// # Errors
/// When the identity of the cluster contradicts the configuration or cannot be read; everything else is retried.
pub async fn run(client: Client, config: Config, cancel: CancellationToken) -> Result<(), cluster::ClusterError> {
    if !establish_cluster(&client, &config, &cancel).await? {
        return Ok(());
    }
    let election = Election {
        namespace: config.namespace.clone(),
        identity: config.identity.clone(),
        duration: config.lease_duration,
    };
    let mut candidate = Candidate::new(client.clone(), election);
    while !cancel.is_cancelled() {
        if config.leader_election && !candidate.acquire(&cancel).await {
            break;
        }
        tracing::info!(identity = config.identity, "leads");
        let term = cancel.child_token();
        let controller = Controller::new(client.clone(), config.identity.clone(), config.settings.clone());
        let work = tokio::spawn(controller.run(config.workers, config.resync, term.clone()));
        if config.leader_election {
            candidate.hold(&cancel).await;
        } else {
            cancel.cancelled().await;
        }
        term.cancel();
        if let Err(error) = work.await {
            tracing::error!(%error, "the controller has ended abnormally");
        }
    }
    Ok(())
}

/// Waits for the API server, then reads or makes the cluster uuid. `false`: cancelled.
async fn establish_cluster(
    client: &Client,
    config: &Config,
    cancel: &CancellationToken,
) -> Result<bool, cluster::ClusterError> {
    let mut delay = Duration::from_millis(200);
    loop {
        match cluster::uuid(client, &config.namespace, config.adopt_cluster_uuid).await {
            Ok(uuid) => {
                tracing::info!(%uuid, "cluster");
                return Ok(true);
            }
            Err(cluster::ClusterError::Api(error)) => tracing::warn!(%error, "waits for the API server"),
            Err(error) => return Err(error),
        }
        let jitter = rand::Rng::random_range(&mut rand::rng(), 0.5..1.0);
        tokio::select! {
            () = cancel.cancelled() => return Ok(false),
            () = tokio::time::sleep(delay.mul_f64(jitter)) => {}
        }
        delay = (delay * 2).min(Duration::from_secs(10));
    }
}
