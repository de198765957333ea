//! The agent's way to other nodes: credentials, the replication port, the hub.
//!
//! Invariants: without credentials nobody is answered and nobody is called; devices never wait for credentials (P8) – a
//! replica that joins before they are there takes part once they are.

use crate::config::RunArgs;
use crate::reconcile::context::{LocalReplica, Membership, Replication};
use crate::reconcile::peers::LineEnd;
use crate::replication::certs::DirectorySource;
use crate::replication::clock::SharedClock;
use crate::replication::tls::PeerIdentity;
use crate::replication::{Hub, HubConfig, LocalReplication};
use mars_engine::types::{ClusterId, NodeId};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{error, info, warn};

/// How often new certificates are looked for, once there are some, and before.
const RELOAD: Duration = Duration::from_secs(10);
const FIRST: Duration = Duration::from_millis(250);

/// Why there is no replication.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The port is taken, or the address is not this machine's.
    #[error("cannot serve replication on {address}: {source}. Free the port, or use another --address or --port")]
    Port {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// See the module.
pub struct ReplicationLink {
    ready: watch::Receiver<Option<LocalReplication>>,
    tracker: TaskTracker,
}

impl ReplicationLink {
    /// Takes the port; serves as soon as there are credentials, until `stop`. `clock` is the one of the node.
    ///
    /// # Errors
    /// The port is taken.
    pub async fn start(
        args: &RunArgs,
        cluster: ClusterId,
        node: NodeId,
        clock: Arc<SharedClock>,
        tracker: &TaskTracker,
        stop: CancellationToken,
    ) -> Result<Self, LinkError> {
        let (ready_to, ready) = watch::channel(None);
        let link = Self {
            ready,
            tracker: tracker.clone(),
        };
        let Some(dir) = args.pki_dir.clone() else {
            warn!("no --pki-dir: this agent replicates with nobody");
            return Ok(link);
        };
        let address = args.replication_address();
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| LinkError::Port { address, source })?;
        let mut config = HubConfig::new(cluster, node);
        config.bind = Some(args.address);
        tracker.spawn(async move {
            let Some(source) = certificates(dir, PeerIdentity { cluster, node }, &stop).await else {
                return;
            };
            let source = Arc::new(source);
            let hub = Hub::new(config, source.clone(), clock);
            ready_to.send_replace(Some(LocalReplication::new(hub.clone())));
            info!(%address, "replication is served");
            let watching = source.watch(RELOAD, stop.clone());
            let (served, ()) = tokio::join!(hub.serve(listener, stop), watching);
            if let Err(error) = served {
                error!(%error, "replication is not served any more: devices go on, restart the agent");
            }
        });
        Ok(link)
    }
}

/// Tries until the certificates can be used; `None` when the agent stops before.
async fn certificates(dir: PathBuf, identity: PeerIdentity, stop: &CancellationToken) -> Option<DirectorySource> {
    let mut said = String::new();
    loop {
        let problem = match DirectorySource::open(&dir, identity) {
            Ok(source) => return Some(source),
            Err(problem) => problem.to_string(),
        };
        if problem != said {
            warn!("no replication yet: {problem}");
            said = problem;
        }
        stop.run_until_cancelled(tokio::time::sleep(FIRST)).await?;
    }
}

impl Replication for ReplicationLink {
    fn join(&self, replica: LocalReplica, line: LineEnd) -> Membership {
        let (stop, mut ready) = (CancellationToken::new(), self.ready.clone());
        let guard = stop.clone().drop_guard();
        self.tracker.spawn(async move {
            // Without credentials for ever the line just stays open: the reconciler sees members that are silent.
            let arrival = async {
                ready
                    .wait_for(Option::is_some)
                    .await
                    .ok()
                    .and_then(|ready| ready.clone())
            };
            let Some(replication) = stop.run_until_cancelled(arrival).await else {
                return;
            };
            let kept = match replication {
                Some(replication) => replication.join(replica, line),
                None => Box::new((replica, line)),
            };
            stop.cancelled().await;
            drop(kept);
        });
        Box::new(guard)
    }
}
