//! Status between members: each dials every other one, and both directions of each exchange carry both sides' status.
//!
//! Invariant: every member gets to know every durable position, also those that nobody fetches from it: that is what
//! log retention and split-brain detection rest on.

use super::client;
use super::entry::{Entry, PeerAddress};
use super::hub::Shared;
use super::wire::{self, Malformed, pb};
use backon::BackoffBuilder;
use mars_engine::api::Command;
use mars_engine::replication::messages::{PeerStatus, Refused};
use mars_engine::types::ReplicaId;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// Statuses that change quickly are sent at most this often.
const STATUS_PAUSE: Duration = Duration::from_millis(50);
/// Statuses that wait to be sent.
pub(super) const STATUS_QUEUE: usize = 2;

/// Why an exchange ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Client(#[from] client::ClientError),
    #[error("{0}")]
    Status(#[from] Box<tonic::Status>),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the peer {0}")]
    RefusedByPeer(Refused),
    #[error("this side refuses: {0}")]
    RefusedHere(Refused),
    #[error("silent for {0:?}")]
    Silent(Duration),
    #[error("the peer closed the exchange")]
    Closed,
}

/// Sends our status to `to` whenever it changes, and as a heartbeat, until the receiver is gone.
pub(super) async fn send_statuses<T>(
    entry: Arc<Entry>,
    to: ReplicaId,
    heartbeat: Duration,
    sink: mpsc::Sender<T>,
    wrap: impl Fn(pb::StatusMessage) -> T,
) {
    let mut changes = entry.port.status();
    let mut last: Option<(PeerStatus, Instant)> = None;
    loop {
        changes.mark_unchanged();
        let status = entry.own_status();
        let due = last
            .as_ref()
            .is_none_or(|(sent, at)| *sent != status || at.elapsed() >= heartbeat);
        if due {
            let message = wire::status_out(&entry.header(to), &status);
            if sink.send(wrap(message)).await.is_err() {
                return;
            }
            last = Some((status, Instant::now()));
        }
        tokio::time::sleep(STATUS_PAUSE).await;
        tokio::select! {
            next = changes.changed() => if next.is_err() { return },
            () = tokio::time::sleep(heartbeat) => {}
            () = sink.closed() => return,
        }
    }
}

/// Takes what a member says about itself into the book.
pub(super) fn take_status(entry: &Entry, from: ReplicaId, message: &pb::StatusMessage) -> Result<(), LinkError> {
    let header = wire::header(message.header.as_ref())?;
    if header.from != from {
        return Err(Malformed("sender changed within an exchange").into());
    }
    entry.book.heard(from, header.lamport, wire::status_in(message)?);
    Ok(())
}

/// Tells the owner what members have durably, for log retention; apart from the links, so that a busy owner never makes a member look
/// unreachable. Runs until dropped.
pub(super) async fn report(entry: Arc<Entry>) {
    let mut changes = entry.book.changes();
    loop {
        changes.mark_unchanged();
        for peer in &entry.now_known().peers {
            let Some(status) = entry.book.member(peer.replica, entry.liveness).status else {
                continue;
            };
            let durable = status.durable;
            if !entry.book.report_is_news(peer.replica, durable, entry.own_epoch()) {
                continue;
            }
            // A refusal is about our own state; the next heartbeat brings the next attempt.
            let report = Command::PeerReport {
                peer: peer.replica,
                durable,
            };
            match entry.port.command(report).await {
                Ok(_) => entry.book.report_taken(peer.replica),
                Err(refusal) => {
                    tracing::debug!(resource = %entry.resource, peer = %peer.replica, %refusal, "a member's report was not taken");
                    entry.book.forget_report(peer.replica);
                }
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps an exchange with one member going until `stop`.
pub(super) async fn run(shared: Arc<Shared>, entry: Arc<Entry>, peer: PeerAddress, stop: CancellationToken) {
    let retries = || {
        backon::ExponentialBuilder::default()
            .with_min_delay(Duration::from_millis(100))
            .with_max_delay(shared.config.reconnect_limit)
            .without_max_times()
            .with_jitter()
            .build()
    };
    let mut pauses = retries();
    while !stop.is_cancelled() {
        let began = Instant::now();
        let Some(ended) = stop.run_until_cancelled(exchange(&shared, &entry, &peer)).await else {
            return;
        };
        let error = ended.err().unwrap_or(LinkError::Closed);
        tracing::debug!(resource = %entry.resource, peer = %peer.replica, address = peer.address, %error, "exchange ended");
        entry.book.problem(peer.replica, error.to_string());
        if began.elapsed() > 2 * entry.liveness {
            pauses = retries();
        }
        let pause = pauses.next().unwrap_or(shared.config.reconnect_limit);
        let _ = stop.run_until_cancelled(tokio::time::sleep(pause)).await;
    }
}

async fn exchange(shared: &Shared, entry: &Arc<Entry>, peer: &PeerAddress) -> Result<(), LinkError> {
    let mut connection = client::connect(shared, peer).await?;
    let (sink, statuses) = mpsc::channel(STATUS_QUEUE);
    let heartbeat = shared.config.heartbeat;
    let sender = send_statuses(entry.clone(), peer.replica, heartbeat, sink, |message| message);
    let receiver = async {
        let opened = connection.client.exchange(ReceiverStream::new(statuses));
        let opened = tokio::time::timeout(shared.config.connect_limit, opened).await;
        let mut answers = opened
            .map_err(|_| LinkError::Silent(shared.config.connect_limit))?
            .map_err(Box::new)?
            .into_inner();
        loop {
            let next = tokio::time::timeout(entry.liveness, answers.message()).await;
            let message = next.map_err(|_| LinkError::Silent(entry.liveness))?.map_err(Box::new)?;
            let Some(message) = message else {
                return Err(LinkError::Closed);
            };
            if let Some(refused) = &message.refused {
                return Err(LinkError::RefusedByPeer(refused.try_into()?));
            }
            let header = wire::header(message.header.as_ref())?;
            let identity = connection.identity;
            entry.check(&header, identity).map_err(LinkError::RefusedHere)?;
            take_status(entry, peer.replica, &message)?;
        }
    };
    tokio::select! {
        () = sender => Ok(()),
        ended = receiver => ended,
    }
}
