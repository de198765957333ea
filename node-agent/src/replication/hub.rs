//! All replication of one agent: its server, its connections, its replicas.

use super::certs::CertSource;
use super::clock::SharedClock;
use super::entry::{Entry, Membership, ReplicaPort};
use super::follower::{self, Follower};
use super::net::{self, Congestion, Dialer};
use super::server::{self, Service};
use mars_engine::types::{ClusterId, NodeId, ReplicaId, ResourceId};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// What replication must know about its agent.
#[derive(Debug, Clone)]
pub struct HubConfig {
    /// The cluster.
    pub cluster: ClusterId,
    /// This node.
    pub node: NodeId,
    /// Outgoing connections come from this address, if set.
    pub bind: Option<IpAddr>,
    /// How often a status is sent even if nothing changes.
    pub heartbeat: Duration,
    /// After this long without a word a member counts as unreachable.
    pub liveness: Duration,
    /// Limit for connecting and greeting.
    pub connect_limit: Duration,
    /// Longest pause between two attempts to connect.
    pub reconnect_limit: Duration,
    /// Congestion control of bulk connections.
    pub congestion: Congestion,
    /// Connections for bulk data where the congestion control is the kernel's default.
    pub lanes: u32,
}

impl HubConfig {
    /// The defaults for a node.
    #[must_use]
    pub fn new(cluster: ClusterId, node: NodeId) -> Self {
        Self {
            cluster,
            node,
            bind: None,
            heartbeat: Duration::from_secs(1),
            liveness: Duration::from_secs(5),
            connect_limit: Duration::from_secs(10),
            reconnect_limit: Duration::from_secs(10),
            congestion: Congestion::probe(),
            lanes: 4,
        }
    }

    fn wanted_lanes(&self) -> u32 {
        if self.congestion == Congestion::Bbr {
            1
        } else {
            self.lanes
        }
    }
}

/// A resource or replica was joined twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("resource {resource} has a replica on this node already ({replica}): stop that one first")]
pub struct JoinedTwice {
    /// Which.
    pub resource: ResourceId,
    /// The present one.
    pub replica: ReplicaId,
}

/// What all parts share.
pub(super) struct Shared {
    pub(super) config: HubConfig,
    pub(super) clock: Arc<SharedClock>,
    pub(super) dialer: Dialer,
    pub(super) tasks: TaskTracker,
    pub(super) lanes: u32,
    served: RwLock<HashMap<ResourceId, Arc<server::Served>>>,
}

impl Shared {
    pub(super) fn served(&self, resource: ResourceId) -> Option<Arc<server::Served>> {
        self.served
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&resource)
            .cloned()
    }

    pub(super) fn withdraw(&self, resource: ResourceId) {
        self.served
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&resource);
    }
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Hub {
    shared: Arc<Shared>,
    certs: Arc<dyn CertSource>,
}

impl Hub {
    /// Does nothing yet; see [`serve`](Self::serve) and [`join`](Self::join).
    #[must_use]
    pub fn new(config: HubConfig, certs: Arc<dyn CertSource>, clock: Arc<SharedClock>) -> Self {
        let dialer = Dialer {
            certs: certs.clone(),
            bind: config.bind,
            congestion: config.congestion,
            connect_limit: config.connect_limit,
        };
        let lanes = config.wanted_lanes();
        let shared = Shared {
            config,
            clock,
            dialer,
            tasks: TaskTracker::new(),
            lanes,
            served: RwLock::default(),
        };
        Self {
            shared: Arc::new(shared),
            certs,
        }
    }

    /// Serves other agents until `stop`; then all connections end.
    ///
    /// # Errors
    /// When the server itself fails; single connections never end it.
    pub async fn serve(&self, listener: TcpListener, stop: CancellationToken) -> Result<(), tonic::transport::Error> {
        let congestion = self.shared.config.congestion;
        let accepted = net::accept(
            listener,
            self.certs.clone(),
            congestion,
            &self.shared.tasks,
            stop.clone(),
        );
        let service = Service::new(self.shared.clone(), stop.clone());
        tonic::transport::Server::builder()
            .http2_keepalive_interval(Some(net::KEEPALIVE_EVERY))
            .http2_keepalive_timeout(Some(net::KEEPALIVE_LIMIT))
            .initial_stream_window_size(net::STREAM_WINDOW_BYTES)
            .initial_connection_window_size(net::CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(Some(1024))
            .add_service(service.into_server())
            .serve_with_incoming_shutdown(ReceiverStream::new(accepted), stop.cancelled_owned())
            .await
    }

    /// Takes part in the replication of a resource: serves it to its members, and follows them.
    ///
    /// # Errors
    /// [`JoinedTwice`].
    pub fn join(
        &self,
        resource: ResourceId,
        replica: ReplicaId,
        port: Arc<dyn ReplicaPort>,
        membership: watch::Receiver<Arc<Membership>>,
    ) -> Result<Follower, JoinedTwice> {
        let config = &self.shared.config;
        let ids = (config.cluster, resource, replica);
        let entry = Arc::new(Entry::new(
            ids,
            port,
            membership,
            self.shared.clock.clone(),
            config.liveness,
        ));
        let stop = CancellationToken::new();
        let served = Arc::new(server::Served::new(entry.clone(), stop));
        {
            let mut all = self.shared.served.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(present) = all.get(&resource) {
                let replica = present.entry.replica;
                served.stop.cancel();
                return Err(JoinedTwice { resource, replica });
            }
            all.insert(resource, served.clone());
        }
        Ok(follower::start(&self.shared, entry, served))
    }

    /// The clock that stamps messages.
    #[must_use]
    pub fn clock(&self) -> &Arc<SharedClock> {
        &self.shared.clock
    }
}
