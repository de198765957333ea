//! Metrics, health and readiness over HTTP.
//!
//! Invariant: a scrape reads what replicas have published last; it asks no engine and no disk.

use crate::reconcile::context::{NodeContext, ReplicaView};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// Why metrics are not served.
#[derive(Debug, thiserror::Error)]
#[error("cannot serve metrics on {address}: {source}. Free the port, or use another --metrics-address")]
pub struct MetricsError {
    address: SocketAddr,
    source: io::Error,
}

struct Shared {
    registry: Registry,
    ready: Arc<AtomicBool>,
}

/// Reads the views at each scrape.
struct ViewCollector(Arc<NodeContext>);

impl std::fmt::Debug for ViewCollector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ViewCollector")
    }
}

/// One metric: its name, its help, and its value for a replica that has one.
type Metric = (&'static str, &'static str, fn(&ReplicaView) -> Option<i64>);

const METRICS: [Metric; 15] = [
    (
        "mars_replica_primary",
        "1 while this replica is the actual primary",
        |view| Some(i64::from(view.status.role == Some(mars_crds::ActualRole::Primary))),
    ),
    (
        "mars_replica_consistent",
        "1 while the data may be used for promotion",
        |view| {
            Some(i64::from(
                view.status.data_state == Some(mars_crds::ReplicaData::Consistent),
            ))
        },
    ),
    ("mars_replica_degraded", "1 while something needs attention", |view| {
        let degraded = mars_crds::conditions::get(&view.status.conditions, mars_crds::conditions::DEGRADED)?;
        Some(i64::from(degraded.status == "True"))
    }),
    ("mars_replica_split_brain", "Number of forks found", |view| {
        i64::try_from(view.status.forks.len()).ok()
    }),
    ("mars_replica_designation", "Highest designation number known", |view| {
        view.status.designation.map(|designation| designation.number)
    }),
    (
        "mars_replica_durable_lsn",
        "End of the local log on stable storage (bytes of history)",
        |view| view.status.positions.as_ref().map(|positions| positions.durable.lsn),
    ),
    (
        "mars_replica_applied_lsn",
        "How far the data disk is written and flushed (bytes of history)",
        |view| view.status.positions.as_ref().map(|positions| positions.applied),
    ),
    (
        "mars_replica_log_start_lsn",
        "Oldest position still served (bytes of history)",
        |view| view.status.positions.as_ref().map(|positions| positions.log_start),
    ),
    (
        "mars_replica_lag_bytes",
        "History of the primary that is not durable here",
        |view| view.status.lag.as_ref().map(|lag| lag.bytes),
    ),
    (
        "mars_replica_lag_seconds",
        "Age of the oldest byte that is not durable here",
        |view| view.status.lag.as_ref().map(|lag| lag.seconds),
    ),
    (
        "mars_replica_overlay_bytes",
        "Payload held in memory until it is written back",
        |view| i64::try_from(view.overlay_bytes).ok(),
    ),
    ("mars_replica_log_bytes", "Transaction log on disk", |view| {
        i64::try_from(view.log_bytes).ok()
    }),
    (
        "mars_replica_sync_done_bytes",
        "Compared by the sync under way",
        |view| view.status.sync.as_ref().map(|sync| sync.done_bytes),
    ),
    (
        "mars_replica_sync_total_bytes",
        "To compare by the sync under way",
        |view| view.status.sync.as_ref().map(|sync| sync.total_bytes),
    ),
    ("mars_replica_peers_connected", "Members that answer", |view| {
        i64::try_from(view.status.peers.iter().filter(|peer| peer.connected).count()).ok()
    }),
];

impl Collector for ViewCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let views = self.0.views.borrow().clone();
        for (name, help, value) in METRICS {
            let gauge = ConstGauge::new(0_i64);
            let mut family = encoder.encode_descriptor(name, help, None, gauge.metric_type())?;
            for view in views.values() {
                if let Some(value) = value(view) {
                    let labels = [
                        ("resource", view.resource.clone()),
                        ("replica", view.replica_uuid.to_string()),
                    ];
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

/// Listens, and serves until the agent stops. `ready` turns true when the agent has taken up its replicas.
///
/// # Errors
/// The port is taken, or the address is not this machine's.
pub async fn serve(
    address: SocketAddr,
    node: Arc<NodeContext>,
    ready: Arc<AtomicBool>,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()>, MetricsError> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| MetricsError { address, source })?;
    let mut registry = Registry::default();
    registry.register_collector(Box::new(ViewCollector(node)));
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readiness))
        .with_state(Arc::new(Shared { registry, ready }));
    Ok(async move {
        if let Err(error) = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await
        {
            warn!(%error, "metrics are not served any more");
        }
    })
}

async fn metrics(State(shared): State<Arc<Shared>>) -> impl IntoResponse {
    const FORMAT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let mut text = String::new();
    match encode(&mut text, &shared.registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, FORMAT)], text),
        Err(error) => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [(header::CONTENT_TYPE, "text/plain")],
            error.to_string(),
        ),
    }
}

async fn readiness(State(shared): State<Arc<Shared>>) -> (StatusCode, &'static str) {
    if shared.ready.load(Ordering::Relaxed) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "taking up its replicas\n")
    }
}
