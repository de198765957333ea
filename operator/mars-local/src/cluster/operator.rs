//! The operator in this process: started, stopped and started again on request.
//!
//! Invariant: at most one runs; it is the same code, through the same client, as in a cluster.

use mars_operator::Config;
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

/// Namespace of the operator's Lease and Secret.
pub(super) const NAMESPACE: &str = "mars-system";
/// Longest a stop waits.
const STOP_WITHIN: Duration = Duration::from_secs(10);
/// Pause before an operator that ended is started again.
const AGAIN_AFTER: Duration = Duration::from_secs(2);

/// The operator's place in this process.
pub(super) struct OperatorSlot {
    client: kube::Client,
    cluster: Uuid,
    running: Mutex<Option<(CancellationToken, JoinHandle<()>)>>,
}

impl OperatorSlot {
    pub(super) fn new(client: kube::Client, cluster: Uuid) -> Self {
        Self {
            client,
            cluster,
            running: Mutex::new(None),
        }
    }

    /// Starts the operator unless it runs; says whether it did.
    pub(super) async fn start(&self) -> bool {
        let mut running = self.running.lock().await;
        if running.is_some() {
            return false;
        }
        let stop = CancellationToken::new();
        let task = tokio::spawn(keep(self.client.clone(), self.cluster, stop.clone()));
        *running = Some((stop, task));
        true
    }

    /// Stops the operator if it runs, and waits (at most 10 s); says whether it ran.
    pub(super) async fn stop(&self) -> bool {
        let Some((stop, task)) = self.running.lock().await.take() else {
            return false;
        };
        stop.cancel();
        let abort = task.abort_handle();
        if tokio::time::timeout(STOP_WITHIN, task).await.is_err() {
            tracing::warn!(
                "the operator did not stop within {} s; it is aborted",
                STOP_WITHIN.as_secs()
            );
            abort.abort();
        }
        true
    }

    /// Whether it runs.
    pub(super) async fn runs(&self) -> bool {
        self.running
            .lock()
            .await
            .as_ref()
            .is_some_and(|(_, task)| !task.is_finished())
    }
}

async fn keep(client: kube::Client, cluster: Uuid, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let config = Config {
            namespace: NAMESPACE.into(),
            identity: format!("mars-local-{}", std::process::id()),
            // Nobody else can lead: the state directory has one `up` at a time.
            leader_election: false,
            adopt_cluster_uuid: Some(cluster),
            ..Config::default()
        };
        match mars_operator::run(client.clone(), config, stop.child_token()).await {
            Ok(()) if stop.is_cancelled() => return,
            Ok(()) => tracing::error!("the operator has ended; starting it again"),
            Err(error) => tracing::error!(%error, "the operator has ended; starting it again"),
        }
        stop.run_until_cancelled(tokio::time::sleep(AGAIN_AFTER)).await;
    }
}
