//! The agent's side of the socket.

use super::{DeviceView, Devices, FailoverDone, FailoverRequest, Failure, Status};
use crate::reconcile::context::{NodeContext, ReplicaView};
use crate::reconcile::object::designation_ref;
use crate::reconcile::supervisor::Request;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Json, Router};
use mars_crds::ReplicaData;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tracing::warn;

/// A failover replays local log first; beyond this the asker is told to look at the status.
const FAILOVER_LIMIT: Duration = Duration::from_mins(5);

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another agent answers there.
    #[error("another agent answers on {0}: stop it, or use another --run-dir")]
    InUse(PathBuf),
    /// The system refused.
    #[error("cannot listen on {path}: {source}")]
    Io {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

#[derive(Clone)]
struct Shared {
    node: Arc<NodeContext>,
    requests: mpsc::Sender<Request>,
}

/// Listens, and serves until the agent stops.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(node: Arc<NodeContext>, requests: mpsc::Sender<Request>) -> Result<impl Future<Output = ()>, SocketError> {
    let path = node.layout.socket_path();
    let listener = listen(&path)?;
    let stop = node.stop.clone();
    let router = Router::new()
        .route("/status", get(status))
        .route("/devices", get(devices))
        .route("/failover", post(failover))
        .with_state(Shared { node, requests });
    Ok(async move {
        let served = axum::serve(listener, router)
            .with_graceful_shutdown(stop.cancelled_owned())
            .await;
        if let Err(error) = served {
            warn!(%error, "the local socket is closed");
        }
        // A successor may have made its own by now; then this one is gone already.
        let _ = std::fs::remove_file(path);
    })
}

fn listen(path: &Path) -> Result<RootOnly, SocketError> {
    let failed = |source| SocketError::Io {
        path: path.to_path_buf(),
        source,
    };
    // The node's lock is ours, so a socket without listener is a left-over.
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(SocketError::InUse(path.to_path_buf()));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(RootOnly(listener))
}

/// Accepts connections of root, and of the user the agent runs as.
struct RootOnly(UnixListener);

impl axum::serve::Listener for RootOnly {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        let own = rustix::process::geteuid().as_raw();
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => match stream.peer_cred() {
                    Ok(peer) if peer.uid() == 0 || peer.uid() == own => return (stream, address),
                    Ok(peer) => warn!(uid = peer.uid(), "refused on the local socket: only root may ask"),
                    Err(error) => warn!(%error, "refused on the local socket: its user is not known"),
                },
                // Out of descriptors, for instance: the loop must not spin.
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

fn views(node: &NodeContext) -> Vec<ReplicaView> {
    let mut views: Vec<_> = node.views.borrow().values().map(|view| (**view).clone()).collect();
    // Of two replicas of one resource the one that was given up comes last.
    let rank = |view: &ReplicaView| view.status.data_state == Some(ReplicaData::Quarantined);
    views.sort_by(|a, b| (&a.resource, rank(a)).cmp(&(&b.resource, rank(b))));
    views
}

async fn status(State(shared): State<Shared>) -> Json<Status> {
    let node = &shared.node;
    Json(Status {
        node: node.node_name.clone(),
        node_uuid: node.node.0,
        cluster_uuid: node.cluster.0,
        replicas: views(node),
    })
}

async fn devices(State(shared): State<Shared>) -> Json<Devices> {
    let view = |view: &ReplicaView| {
        let device = view.status.device.as_ref()?;
        Some(DeviceView {
            resource: view.resource.clone(),
            path: device.path.clone(),
            numbers: format!("{}:{}", device.major, device.minor),
            diskseq: device.diskseq,
            frontend: device.frontend.clone(),
            size_bytes: view.status.size_bytes.unwrap_or_default(),
            opened_by: view.status.opened_by.clone(),
        })
    };
    Json(Devices {
        devices: views(&shared.node).iter().filter_map(view).collect(),
    })
}

async fn failover(
    State(shared): State<Shared>,
    Json(request): Json<FailoverRequest>,
) -> Result<Json<FailoverDone>, (StatusCode, Json<Failure>)> {
    let refuse = |code: StatusCode, error: &str| {
        (
            code,
            Json(Failure {
                error: error.to_owned(),
            }),
        )
    };
    let (answer, done) = oneshot::channel();
    let FailoverRequest { resource, acknowledge } = request;
    let request = Request::Failover {
        resource,
        acknowledge,
        answer,
    };
    if shared.requests.send(request).await.is_err() {
        return Err(refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping"));
    }
    match tokio::time::timeout(FAILOVER_LIMIT, done).await {
        Ok(Ok(Ok(designation))) => {
            let designation = designation_ref(designation)
                .ok_or_else(|| refuse(StatusCode::INTERNAL_SERVER_ERROR, "no designation was made"))?;
            Ok(Json(FailoverDone { designation }))
        }
        Ok(Ok(Err(refusal))) => Err(refuse(StatusCode::CONFLICT, &refusal)),
        Ok(Err(_)) => Err(refuse(StatusCode::SERVICE_UNAVAILABLE, "the agent is stopping")),
        Err(_) => Err(refuse(
            StatusCode::GATEWAY_TIMEOUT,
            "not done yet, and going on: look at `mars-node-agent status`",
        )),
    }
}
