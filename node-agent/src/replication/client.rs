//! A connection to another agent, with its protocol version agreed.

use super::entry::PeerAddress;
use super::hub::Shared;
use super::net::{DialError, KEEPALIVE_LIMIT};
use super::tls::PeerIdentity;
use super::wire::pb::hello_reply::Result as Hello;
use super::wire::pb::replication_client::ReplicationClient;
use super::wire::{Malformed, pb};
use mars_engine::replication::messages::{PROTOCOL_MAX, PROTOCOL_MIN, Refused};
use mars_engine::types::Lamport;
use prost::bytes::Bytes;
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;

/// Largest message that is read (bytes): a chunk of log with its envelope.
pub(super) const MAX_MESSAGE_BYTES: usize = 8 << 20;
/// Most connections that bulk data is spread over.
pub(super) const MOST_LANES: u32 = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("the member's node or address is not known yet")]
    Unknown,
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error("greeting the peer: {0}")]
    Hello(#[from] Box<tonic::Status>),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("the peer {0}")]
    Refused(Refused),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the peer's {0}")]
    Clock(#[from] mars_engine::clock::TooFarAhead),
}

/// An open connection.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) client: ReplicationClient<Channel>,
    /// Who is there, by certificate.
    pub(super) identity: PeerIdentity,
    /// Over how many connections the other side would spread bulk data.
    pub(super) lanes: u32,
}

/// Connects and greets.
pub(super) async fn connect(shared: &Shared, peer: &PeerAddress) -> Result<Connection, ClientError> {
    let node = peer
        .node
        .filter(|_| !peer.address.is_empty())
        .ok_or(ClientError::Unknown)?;
    let identity = PeerIdentity {
        cluster: shared.config.cluster,
        node,
    };
    let channel = shared.dialer.connect(&peer.address, identity).await?;
    let mut client = ReplicationClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let hello = pb::HelloRequest {
        version_min: PROTOCOL_MIN,
        version_max: PROTOCOL_MAX,
        cluster: Bytes::copy_from_slice(shared.config.cluster.0.as_bytes()),
        node: Bytes::copy_from_slice(shared.config.node.0.as_bytes()),
        lamport: shared.clock.now().0,
    };
    let limit = shared.config.connect_limit;
    let reply = tokio::time::timeout(limit, client.hello(hello)).await;
    let reply = reply
        .map_err(|_| ClientError::Timeout(limit))?
        .map_err(Box::new)?
        .into_inner();
    shared.clock.observe(Lamport(reply.lamport))?;
    match reply.result.ok_or(Malformed("greeting"))? {
        Hello::Refused(refused) => Err(ClientError::Refused((&refused).try_into()?)),
        Hello::Version(version) if (PROTOCOL_MIN..=PROTOCOL_MAX).contains(&version) => Ok(Connection {
            client,
            identity,
            lanes: reply.lanes.clamp(1, MOST_LANES),
        }),
        Hello::Version(_) => Err(Malformed("protocol version").into()),
    }
}

/// Connects once per lane that the other side would like to have.
pub(super) async fn connect_bulk(shared: &Arc<Shared>, peer: &PeerAddress) -> Result<Vec<Connection>, ClientError> {
    let first = connect(shared, peer).await?;
    let more = (1..first.lanes).map(|_| connect(shared, peer));
    let more = futures::future::try_join_all(more).await?;
    Ok(std::iter::once(first).chain(more).collect())
}

/// An answer to a single question may take this long: reading 16 MiB from a busy disk, and the way.
pub(super) const ANSWER_LIMIT: Duration = Duration::from_mins(1);
/// A stream that says nothing for this long is dead: sources send something every second.
pub(super) const SILENCE_LIMIT: Duration = KEEPALIVE_LIMIT;
