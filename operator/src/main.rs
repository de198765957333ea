//! `mars-operator`: connects to the cluster it runs in (or that KUBECONFIG names) and runs until it is told to stop.

#![forbid(unsafe_code)]

use anyhow::Context;
use clap::Parser;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;
use uuid::Uuid;

#[derive(Parser)]
#[command(about = "Turns MarsResources into roles on nodes", version)]
struct Arguments {
    /// Namespace of the Lease and of the Secret mars-cluster.
    #[arg(long, env = "MARS_NAMESPACE", default_value = "mars-system")]
    namespace: String,
    /// Name of this operator among its rivals for the lease; default: the host name.
    #[arg(long, env = "HOSTNAME")]
    identity: Option<String>,
    /// Act at once instead of competing for the lease.
    #[arg(long)]
    no_leader_election: bool,
    /// Adopt this cluster uuid instead of making one.
    #[arg(long, env = "MARS_CLUSTER_UUID")]
    cluster_uuid: Option<Uuid>,
    /// Passes at the same time.
    #[arg(long, default_value_t = 4)]
    workers: usize,
    /// Look at every resource this often (seconds).
    #[arg(long, default_value_t = 10)]
    resync_seconds: u64,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).json().init();
    let client = kube::Client::try_default().await.context(
        "no API server to talk to: run inside a cluster with a ServiceAccount, or set KUBECONFIG to a usable file",
    )?;
    let defaults = mars_operator::Config::default();
    let config = mars_operator::Config {
        namespace: arguments.namespace,
        identity: arguments.identity.unwrap_or(defaults.identity.clone()),
        leader_election: !arguments.no_leader_election,
        workers: arguments.workers,
        resync: Duration::from_secs(arguments.resync_seconds.max(1)),
        adopt_cluster_uuid: arguments.cluster_uuid,
        ..defaults
    };
    let cancel = CancellationToken::new();
    let stop = cancel.clone();
    tokio::spawn(async move {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).ok();
        let terminated = async {
            match &mut terminate {
                Some(signal) => drop(signal.recv().await),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = tokio::signal::ctrl_c() => {}
            () = terminated => {}
        }
        stop.cancel();
    });
    mars_operator::run(client, config, cancel)
        .await
        .context("the operator stops")
}
