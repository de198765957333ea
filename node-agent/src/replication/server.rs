//! The answering side: what other agents may ask of the replicas that live here.
//!
//! Invariants: every request is checked against the certificate of its connection and the membership of its resource before
//! anything is looked at; file reads happen on blocking threads, never in the owner; what is queued for a slow receiver
//! is bounded.

use super::client::{MAX_MESSAGE_BYTES, MOST_LANES};
use super::entry::Entry;
use super::hub::Shared;
use super::link;
use super::serve_fetch::{self, Lanes};
use super::serve_sync::Sessions;
use super::tls::PeerIdentity;
use super::wire::pb::replication_server::{Replication, ReplicationServer};
use super::wire::{self, Malformed, pb};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use mars_engine::replication::messages::{FetchOpen, Header, PROTOCOL_MAX, PROTOCOL_MIN, Refused, negotiate};
use mars_engine::types::{Lamport, Lsn, NodeId};
use prost::bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};
use uuid::Uuid;

/// One replica as it is served.
pub(super) struct Served {
    pub(super) entry: Arc<Entry>,
    pub(super) stop: CancellationToken,
    pub(super) tasks: TaskTracker,
    pub(super) lanes: Lanes,
    pub(super) sessions: Arc<Sessions>,
}

impl Served {
    pub(super) fn new(entry: Arc<Entry>, stop: CancellationToken) -> Self {
        let tasks = TaskTracker::new();
        let sessions = Arc::new(Sessions::new(entry.clone()));
        tasks.spawn(stop.clone().run_until_cancelled_owned(sessions.clone().watch()));
        Self {
            entry,
            stop,
            tasks,
            lanes: Lanes::default(),
            sessions,
        }
    }

    /// Ends everything that is being served and waits for it.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }
}

/// The gRPC service.
pub(super) struct Service {
    shared: Arc<Shared>,
    /// Ends all streams, so that a server can stop while its peers stay.
    stop: CancellationToken,
}

/// A stream of answers.
type Answers<T> = BoxStream<'static, Result<T, Status>>;

impl From<Malformed> for Status {
    fn from(error: Malformed) -> Self {
        Status::invalid_argument(error.to_string())
    }
}

impl Service {
    pub(super) fn new(shared: Arc<Shared>, stop: CancellationToken) -> Self {
        Self { shared, stop }
    }

    pub(super) fn into_server(self) -> ReplicationServer<Self> {
        ReplicationServer::new(self)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES)
    }

    fn lamport(&self) -> u64 {
        self.shared.clock.now().0
    }

    /// The replica that a request is for, if the sender may ask for it.
    fn admit(&self, header: &Header, from: PeerIdentity) -> Result<Arc<Served>, Refused> {
        let served = self.shared.served(header.resource).ok_or_else(|| Refused::NotMember {
            detail: format!("resource {} is not served on this node", header.resource),
        })?;
        served.entry.check(header, from)?;
        Ok(served)
    }

    /// Ends a stream when its replica, or the server, stops.
    fn until_stop<T: Send + 'static>(
        &self,
        stop: &CancellationToken,
        stream: impl futures::Stream<Item = Result<T, Status>> + Send + 'static,
    ) -> Answers<T> {
        let (replica, server) = (stop.clone(), self.stop.clone());
        let stopped = async move {
            tokio::select! {
                () = replica.cancelled() => {}
                () = server.cancelled() => {}
            }
        };
        stream.take_until(Box::pin(stopped)).boxed()
    }
}

fn peer_of<T>(request: &Request<T>) -> Result<PeerIdentity, Status> {
    let peer = request.extensions().get::<PeerIdentity>().copied();
    peer.ok_or_else(|| Status::unauthenticated("the connection has no identity"))
}

fn single<T: Send + 'static>(message: T) -> Answers<T> {
    futures::stream::iter([Ok(message)]).boxed()
}

#[tonic::async_trait]
impl Replication for Service {
    type ExchangeStream = Answers<pb::StatusMessage>;
    type FetchStream = Answers<pb::FetchMessage>;
    type FetchLaneStream = Answers<pb::FetchMessage>;
    type BlocksStream = Answers<pb::BlocksMessage>;

    async fn hello(&self, request: Request<pb::HelloRequest>) -> Result<Response<pb::HelloReply>, Status> {
        use pb::hello_reply::Result as Hello;
        let peer = peer_of(&request)?;
        let hello = request.into_inner();
        let cluster = Uuid::from_slice(&hello.cluster).map_err(|_| Malformed("cluster"))?;
        let node = NodeId(Uuid::from_slice(&hello.node).map_err(|_| Malformed("node"))?);
        let ours = self.shared.config.cluster;
        let observed = self.shared.clock.observe(Lamport(hello.lamport));
        let result = if cluster != ours.0 {
            Err(Refused::WrongCluster {
                ours,
                theirs: mars_engine::types::ClusterId(cluster),
            })
        } else if node != peer.node {
            Err(Refused::NotMember {
                detail: format!("node {node} came with the certificate of {peer}"),
            })
        } else if let Err(ahead) = observed {
            Err(Refused::ClockAhead {
                ahead_s: ahead.ahead_ns / 1_000_000_000,
            })
        } else {
            negotiate(hello.version_min, hello.version_max).ok_or(Refused::Version {
                min: PROTOCOL_MIN,
                max: PROTOCOL_MAX,
            })
        };
        Ok(Response::new(pb::HelloReply {
            lamport: self.lamport(),
            node: Bytes::copy_from_slice(self.shared.config.node.0.as_bytes()),
            result: Some(match result {
                Ok(version) => Hello::Version(version),
                Err(refused) => Hello::Refused(refused.into()),
            }),
            lanes: self.shared.lanes,
        }))
    }

    async fn exchange(
        &self,
        request: Request<Streaming<pb::StatusMessage>>,
    ) -> Result<Response<Self::ExchangeStream>, Status> {
        let peer = peer_of(&request)?;
        let mut incoming = request.into_inner();
        let liveness = self.shared.config.liveness;
        let first = tokio::time::timeout(liveness, incoming.message());
        let first = first.await.map_err(|_| Status::deadline_exceeded("no status came"))??;
        let first = first.ok_or_else(|| Status::invalid_argument("no status came"))?;
        let header = wire::header(first.header.as_ref())?;
        let served = match self.admit(&header, peer) {
            Ok(served) => served,
            Err(refused) => {
                let message = pb::StatusMessage {
                    refused: Some(refused.into()),
                    ..pb::StatusMessage::default()
                };
                return Ok(Response::new(single(message)));
            }
        };
        let (sink, outgoing) = mpsc::channel(link::STATUS_QUEUE);
        let heartbeat = self.shared.config.heartbeat;
        let entry = served.entry.clone();
        let answers = link::send_statuses(entry.clone(), header.from, heartbeat, sink.clone(), Ok);
        served
            .tasks
            .spawn(served.stop.clone().run_until_cancelled_owned(answers));
        let listen = async move {
            let ended = listen(&entry, peer, &header, first, incoming, liveness).await;
            if let Err(error) = ended {
                tracing::debug!(resource = %entry.resource, peer = %header.from, %error, "a member's exchange ended");
                let _ = sink.send(Err(Status::aborted(error.to_string()))).await;
            }
        };
        served
            .tasks
            .spawn(served.stop.clone().run_until_cancelled_owned(listen));
        Ok(Response::new(
            self.until_stop(&served.stop, ReceiverStream::new(outgoing)),
        ))
    }

    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let open = FetchOpen {
            from: wire::position(request.from.as_ref())?,
            lineage: wire::lineage_in(&request.lineage)?,
            until: request.until.map(Lsn),
            compression: wire::compression_in(request.compression)?,
        };
        let stream = Uuid::from_slice(&request.stream).map_err(|_| Malformed("stream"))?;
        let lanes = request.lanes.clamp(1, MOST_LANES);
        let served = match self.admit(&header, peer) {
            Ok(served) => served,
            Err(refused) => return Ok(Response::new(single(serve_fetch::refusal(self.lamport(), refused)))),
        };
        let messages = serve_fetch::start(&served, header.from, peer, open, stream, lanes);
        Ok(Response::new(self.until_stop(&served.stop, messages.map(Ok))))
    }

    async fn fetch_lane(
        &self,
        request: Request<pb::FetchLaneRequest>,
    ) -> Result<Response<Self::FetchLaneStream>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let stream = Uuid::from_slice(&request.stream).map_err(|_| Malformed("stream"))?;
        let served = match self.admit(&header, peer) {
            Ok(served) => served,
            Err(refused) => return Ok(Response::new(single(serve_fetch::refusal(self.lamport(), refused)))),
        };
        match served.lanes.join(stream, header.from) {
            Some(messages) => Ok(Response::new(self.until_stop(&served.stop, messages.map(Ok)))),
            None => Err(Status::not_found("no such stream: open the fetch again")),
        }
    }

    async fn sync_open(&self, request: Request<pb::SyncOpenRequest>) -> Result<Response<pb::SyncOpenReply>, Status> {
        use pb::sync_open_reply::Result as Reply;
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let result = match self.admit(&header, peer) {
            Ok(served) => served.sessions.open(header.from).await,
            Err(refused) => Err(refused),
        };
        let result = match result {
            Ok(offer) => Reply::Offer(wire::offer_out(&offer)),
            Err(refused) => Reply::Refused(refused.into()),
        };
        Ok(Response::new(pb::SyncOpenReply {
            lamport: self.lamport(),
            result: Some(result),
        }))
    }

    async fn digests(&self, request: Request<pb::DigestsRequest>) -> Result<Response<pb::DigestsReply>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let span = wire::range(request.span.as_ref())?;
        let result = match self.admit(&header, peer) {
            Ok(served) => served.sessions.digests(header.from, request.session, span).await,
            Err(refused) => Err(refused),
        };
        let mut reply = pb::DigestsReply {
            lamport: self.lamport(),
            ..pb::DigestsReply::default()
        };
        match result {
            Ok(digests) => reply.regions = wire::digests_out(&digests),
            Err(refused) => reply.refused = Some(refused.into()),
        }
        Ok(Response::new(reply))
    }

    async fn blocks(&self, request: Request<pb::BlocksRequest>) -> Result<Response<Self::BlocksStream>, Status> {
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let compression = wire::compression_in(request.compression)?;
        let regions = request
            .regions
            .iter()
            .map(wire::want_in)
            .collect::<Result<Vec<_>, _>>()?;
        let clock = self.shared.clock.clone();
        let message = move |result: Result<Vec<_>, Refused>| {
            let mut message = pb::BlocksMessage {
                lamport: clock.now().0,
                ..pb::BlocksMessage::default()
            };
            match result {
                Ok(runs) => message.runs = runs.into_iter().map(|run| wire::run_out(run, compression)).collect(),
                Err(refused) => message.refused = Some(refused.into()),
            }
            message
        };
        let served = match self.admit(&header, peer) {
            Ok(served) => served,
            Err(refused) => return Ok(Response::new(single(message(Err(refused))))),
        };
        let (from, session, sessions) = (header.from, request.session, served.sessions.clone());
        // One region at a time, read only when the one before has left: a slow receiver holds one region in memory.
        let answers = futures::stream::iter(regions).then(move |want| {
            let (sessions, message) = (sessions.clone(), message.clone());
            async move { Ok(message(sessions.blocks(from, session, want).await)) }
        });
        Ok(Response::new(self.until_stop(&served.stop, answers)))
    }

    async fn sync_end(&self, request: Request<pb::SyncEndRequest>) -> Result<Response<pb::SyncEndReply>, Status> {
        use pb::sync_end_reply::{End, Result as Reply};
        let peer = peer_of(&request)?;
        let request = request.into_inner();
        let header = wire::header(request.header.as_ref())?;
        let result = match self.admit(&header, peer) {
            Ok(served) => served.sessions.end(header.from, request.session).await,
            Err(refused) => Err(refused),
        };
        let result = match result {
            Ok(end) => Reply::End(End {
                dirty_end: Some(end.dirty_end.into()),
                size_bytes: end.size_bytes,
            }),
            Err(refused) => Reply::Refused(refused.into()),
        };
        Ok(Response::new(pb::SyncEndReply {
            lamport: self.lamport(),
            result: Some(result),
        }))
    }
}

/// Takes a member's statuses until it falls silent or breaks the rules.
async fn listen(
    entry: &Entry,
    peer: PeerIdentity,
    header: &Header,
    first: pb::StatusMessage,
    mut incoming: Streaming<pb::StatusMessage>,
    liveness: Duration,
) -> Result<(), link::LinkError> {
    link::take_status(entry, header.from, &first)?;
    loop {
        let next = tokio::time::timeout(liveness, incoming.message()).await;
        let Some(message) = next.map_err(|_| link::LinkError::Silent(liveness))?.map_err(Box::new)? else {
            return Ok(());
        };
        let header = wire::header(message.header.as_ref())?;
        entry.check(&header, peer).map_err(link::LinkError::RefusedHere)?;
        link::take_status(entry, header.from, &message)?;
    }
}
