//! One fetch session: from the proof to the last item, over one or several connections.
//!
//! Invariants: items reach the owner in order; at most [`WINDOW_BYTES`] of them wait for the owner's answer, so a slow log disk slows
//! the stream down instead of filling memory; any violation ends the session, and nothing of the offending item is used.

use super::client::{self, ClientError, Connection, SILENCE_LIMIT};
use super::entry::{Entry, PeerAddress};
use super::hub::Shared;
use super::meter::{Meter, Throttle};
use super::wire::{self, ItemError, Malformed, pb};
use futures::StreamExt as _;
use futures::future::BoxFuture;
use futures::stream::FuturesOrdered;
use mars_engine::api::{Refusal, ReplicaStatus, Reply};
use mars_engine::replication::fetch::{FetchSession, Plan, Violation};
use mars_engine::replication::messages::Refused;
use mars_engine::types::Lamport;
use prost::bytes::Bytes;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tonic::Streaming;
use uuid::Uuid;

/// Log given to the owner and not yet answered (bytes).
const WINDOW_BYTES: u64 = 8 << 20;
/// The local log must be durable to its end before a session opens; syncs run at the latest every 100 ms.
const DURABLE_LIMIT: Duration = Duration::from_secs(30);

/// Why a session ended before its time.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Status(#[from] Box<tonic::Status>),
    #[error(transparent)]
    Item(#[from] ItemError),
    #[error(transparent)]
    Violation(#[from] Violation),
    #[error("the local log did not take it: {0}")]
    Owner(#[from] Refusal),
    #[error("the source said nothing for {0:?}")]
    Silent(Duration),
    #[error("the local log did not become durable within {0:?}")]
    NotDurable(Duration),
    #[error("the source ended the stream")]
    Ended,
    #[error("the lanes of the stream do not add up")]
    Gap,
    #[error("the source's {0}")]
    Clock(#[from] mars_engine::clock::TooFarAhead),
}

impl From<Malformed> for FetchError {
    fn from(error: Malformed) -> Self {
        Self::Item(error.into())
    }
}

impl FetchError {
    /// What the source refused with, if it did.
    pub(super) fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Item(ItemError::Refused(refused)) => Some(refused),
            _ => None,
        }
    }
}

/// Everything a session needs.
pub(super) struct Fetcher {
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Arc<Entry>,
    pub(super) peer: PeerAddress,
    pub(super) plan: Plan,
    pub(super) meter: Arc<Meter>,
    pub(super) throttle: Arc<Throttle>,
}

impl Fetcher {
    /// Runs until the agreed end; without one, until something happens.
    pub(super) async fn run(self) -> Result<(), FetchError> {
        let own = self.settled().await?;
        let connections = client::connect_bulk(&self.shared, &self.peer).await?;
        let mut lanes = self.open(&own, connections).await?;
        let mut session = FetchSession::new(self.plan.clone(), own.durable);
        let mut pending = Pending::default();
        while !session.finished() {
            let message = tokio::select! {
                biased;
                answered = pending.oldest(), if !pending.is_empty() => {
                    answered?;
                    continue;
                }
                message = tokio::time::timeout(SILENCE_LIMIT, lanes.next()), if !pending.is_full() => {
                    message.map_err(|_| FetchError::Silent(SILENCE_LIMIT))??
                }
            };
            let Some(message) = message else {
                return Err(FetchError::Ended);
            };
            self.take(message, &mut session, &mut pending).await?;
        }
        while !pending.is_empty() {
            pending.oldest().await?;
        }
        Ok(())
    }

    /// The status once everything appended is durable: only such a position is told to others.
    async fn settled(&self) -> Result<Arc<ReplicaStatus>, FetchError> {
        let mut status = self.entry.port.status();
        let settled = status.wait_for(|status| status.durable == status.appended);
        let settled = tokio::time::timeout(DURABLE_LIMIT, settled).await;
        let status = settled.map_err(|_| FetchError::NotDurable(DURABLE_LIMIT))?;
        status.map(|status| status.clone()).map_err(|_| FetchError::Ended)
    }

    async fn open(&self, own: &ReplicaStatus, connections: Vec<Connection>) -> Result<Lanes, FetchError> {
        let stream = Bytes::copy_from_slice(Uuid::new_v4().as_bytes());
        let header = || Some((&self.entry.header(self.plan.source)).into());
        let limit = self.shared.config.connect_limit;
        let mut lanes = Vec::new();
        let count = u32::try_from(connections.len()).map_err(|_| FetchError::Gap)?;
        for (lane, mut connection) in (0..).zip(connections) {
            let opened = if lane == 0 {
                let request = pb::FetchRequest {
                    header: header(),
                    from: Some(own.durable.into()),
                    lineage: wire::lineage_out(&own.lineage),
                    until: self.plan.until.map(|until| until.0),
                    compression: wire::compression_out(self.entry.now_known().compression),
                    lanes: count,
                    stream: stream.clone(),
                };
                tokio::time::timeout(limit, connection.client.fetch(request)).await
            } else {
                let request = pb::FetchLaneRequest {
                    header: header(),
                    stream: stream.clone(),
                    lane,
                };
                tokio::time::timeout(limit, connection.client.fetch_lane(request)).await
            };
            let messages = opened
                .map_err(|_| FetchError::Silent(limit))?
                .map_err(Box::new)?
                .into_inner();
            lanes.push(Lane {
                messages,
                head: None,
                ended: false,
                _connection: connection,
            });
        }
        Ok(Lanes { lanes, expected: 0 })
    }

    async fn take(
        &self,
        message: pb::FetchMessage,
        session: &mut FetchSession,
        pending: &mut Pending,
    ) -> Result<(), FetchError> {
        self.shared.clock.observe(Lamport(message.lamport))?;
        let item = wire::item_in(message.item.ok_or(Malformed("item"))?)?;
        let before = session.expected().lsn;
        let command = session.on_item(item)?;
        let bytes = session.expected().lsn.bytes_since(before);
        if bytes > 0 {
            self.meter.add(bytes);
            self.throttle
                .pass(bytes, self.entry.now_known().fetch_bytes_per_s)
                .await;
        }
        self.entry.book.trust(self.plan.source);
        match command {
            Some(command) => pending.push(self.entry.port.command(command), bytes).await,
            None => Ok(()),
        }
    }
}

/// Orders given to the owner and not yet answered, oldest first.
#[derive(Default)]
struct Pending {
    orders: FuturesOrdered<BoxFuture<'static, (u64, Reply)>>,
    bytes: u64,
}

/// Orders waiting at a time; the owner refuses more than 64.
const MOST_ORDERS: usize = 32;

impl Pending {
    fn is_empty(&self) -> bool {
        self.orders.is_empty()
    }

    fn is_full(&self) -> bool {
        self.bytes >= WINDOW_BYTES || self.orders.len() >= MOST_ORDERS
    }

    async fn push(&mut self, order: BoxFuture<'static, Reply>, bytes: u64) -> Result<(), FetchError> {
        let mut order: BoxFuture<'static, (u64, Reply)> = Box::pin(async move { (bytes, order.await) });
        // Polled once right here: that is what puts it into the owner's mailbox, behind its predecessor.
        match futures::poll!(&mut order) {
            Poll::Ready((_, reply)) => {
                reply?;
            }
            Poll::Pending => {
                self.bytes += bytes;
                self.orders.push_back(order);
            }
        }
        Ok(())
    }

    async fn oldest(&mut self) -> Result<(), FetchError> {
        if let Some((bytes, reply)) = self.orders.next().await {
            self.bytes -= bytes;
            reply?;
        }
        Ok(())
    }
}

/// The connections of a stream; merged by index. At most one item per lane waits here.
struct Lanes {
    lanes: Vec<Lane>,
    expected: u64,
}

struct Lane {
    messages: Streaming<pb::FetchMessage>,
    head: Option<pb::FetchMessage>,
    ended: bool,
    _connection: Connection,
}

impl Lanes {
    async fn next(&mut self) -> Result<Option<pb::FetchMessage>, FetchError> {
        std::future::poll_fn(|cx| {
            for lane in self.lanes.iter_mut().filter(|lane| lane.head.is_none() && !lane.ended) {
                match lane.messages.poll_next_unpin(cx) {
                    Poll::Ready(Some(Ok(message))) => lane.head = Some(message),
                    Poll::Ready(Some(Err(status))) => return Poll::Ready(Err(Box::new(status).into())),
                    Poll::Ready(None) => lane.ended = true,
                    Poll::Pending => {}
                }
            }
            let is_next = |lane: &&mut Lane| lane.head.as_ref().is_some_and(|head| head.index == self.expected);
            if let Some(lane) = self.lanes.iter_mut().find(is_next) {
                self.expected += 1;
                return Poll::Ready(Ok(lane.head.take()));
            }
            if self.lanes.iter().all(|lane| lane.head.is_none() && lane.ended) {
                return Poll::Ready(Ok(None));
            }
            if self.lanes.iter().all(|lane| lane.head.is_some() || lane.ended) {
                return Poll::Ready(Err(FetchError::Gap));
            }
            Poll::Pending
        })
        .await
    }
}
