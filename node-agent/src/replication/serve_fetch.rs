//! Serving log: one producer per stream reads and proves on blocking threads; one or several lanes carry its items.
//!
//! Invariants: at most [`QUEUE`] items wait per stream, so a slow receiver stops the reading, not the memory; damage that ends a stream is
//! named on the replica it was found on (P10).

use super::entry::Entry;
use super::server::Served;
use super::tls::PeerIdentity;
use super::wire::{self, pb};
use mars_engine::api::{Command, Compression, LogView};
use mars_engine::replication::messages::{FetchItem, FetchOpen, Refused};
use mars_engine::replication::source::{LogReader, SourceStream};
use mars_engine::types::ReplicaId;
use smol::channel::{Receiver, Sender, bounded};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::{JoinError, spawn_blocking};
use uuid::Uuid;

/// Items that wait to be taken by a lane.
const QUEUE: usize = 2;
/// An idle stream says so this often.
const IDLE_EVERY: Duration = Duration::from_secs(1);

type Stream = SourceStream<Box<dyn LogReader>>;

/// Streams whose further lanes may still come.
#[derive(Debug, Default)]
pub(super) struct Lanes(Mutex<HashMap<Uuid, (ReplicaId, Receiver<pb::FetchMessage>)>>);

impl Lanes {
    /// Another lane of a stream, for the replica that opened it.
    pub(super) fn join(&self, stream: Uuid, to: ReplicaId) -> Option<Receiver<pb::FetchMessage>> {
        let streams = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        streams
            .get(&stream)
            .filter(|(owner, _)| *owner == to)
            .map(|(_, messages)| messages.clone())
    }

    fn open(&self, stream: Uuid, to: ReplicaId, messages: Receiver<pb::FetchMessage>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(stream, (to, messages));
    }

    fn close(&self, stream: Uuid) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&stream);
    }
}

/// A stream that says no and ends.
pub(super) fn refusal(lamport: u64, refused: Refused) -> pb::FetchMessage {
    let item = Some(pb::fetch_message::Item::Refused(refused.into()));
    pb::FetchMessage {
        lamport,
        index: 0,
        item,
    }
}

/// Starts a stream; what comes out is its first lane.
pub(super) fn start(
    served: &Arc<Served>,
    to: ReplicaId,
    peer: PeerIdentity,
    open: FetchOpen,
    stream: Uuid,
    lanes: u32,
) -> Receiver<pb::FetchMessage> {
    let (sink, messages) = bounded(QUEUE);
    if lanes > 1 {
        served.lanes.open(stream, to, messages.clone());
    }
    let host = served.clone();
    served.tasks.spawn(async move {
        let mut producer = Producer {
            entry: host.entry.clone(),
            sink,
            index: 0,
            compression: open.compression,
        };
        let ended = host.stop.run_until_cancelled(producer.run(to, peer, open)).await;
        if let Some(Err(refused)) = ended {
            let resource = host.entry.resource;
            tracing::info!(%resource, peer = %to, %refused, "a fetch from here ended");
            if let Refused::Defect { stop: Some(stop), .. } = &refused {
                // Whoever asked is told below; people look at the member whose disk it is.
                let named = host.entry.port.command(Command::NameDefect(stop.clone()));
                let _ = host.stop.run_until_cancelled(named).await;
            }
            let _ = host.stop.run_until_cancelled(producer.send_refusal(refused)).await;
        }
        host.lanes.close(stream);
    });
    messages
}

struct Producer {
    entry: Arc<Entry>,
    sink: Sender<pb::FetchMessage>,
    index: u64,
    compression: Compression,
}

fn crashed(error: &JoinError) -> Refused {
    Refused::Io {
        message: format!("reading the log: {error}"),
    }
}

impl Producer {
    /// Sends until the receiver is gone or has everything it asked for.
    async fn run(&mut self, to: ReplicaId, peer: PeerIdentity, open: FetchOpen) -> Result<(), Refused> {
        let mut views = self.entry.port.log_view();
        let port = self.entry.port.clone();
        let view = views.borrow_and_update().clone();
        let opened = spawn_blocking(move || Stream::open(port.open_log()?, &view, open)).await;
        let (mut stream, first) = opened.map_err(|error| crashed(&error))??;
        if !self.send(first).await {
            return Ok(());
        }
        loop {
            // Members may be removed while a stream runs.
            self.entry.check(
                &mars_engine::replication::messages::Header {
                    from: to,
                    to: self.entry.replica,
                    ..self.entry.header(to)
                },
                peer,
            )?;
            let view = views.borrow_and_update().clone();
            let (next, back) = Self::next(stream, view.clone()).await?;
            stream = back;
            let alive = match next {
                Some(item) => self.send(item).await,
                None if stream.finished() => return Ok(()),
                None => match tokio::time::timeout(IDLE_EVERY, views.changed()).await {
                    Ok(Ok(())) => true,
                    Ok(Err(_)) => return Ok(()),
                    Err(_) => self.send(FetchItem::Idle { durable: view.durable }).await,
                },
            };
            if !alive {
                return Ok(());
            }
        }
    }

    async fn next(mut stream: Stream, view: Arc<LogView>) -> Result<(Option<FetchItem>, Stream), Refused> {
        let read = spawn_blocking(move || stream.next(&view).map(|item| (item, stream))).await;
        read.map_err(|error| crashed(&error))?
    }

    async fn send(&mut self, item: FetchItem) -> bool {
        let compression = self.compression;
        let item = if compression == Compression::None {
            wire::item_out(item, compression)
        } else {
            let packed = spawn_blocking(move || wire::item_out(item, compression)).await;
            let Ok(item) = packed else { return false };
            item
        };
        self.send_message(item).await
    }

    async fn send_refusal(&mut self, refused: Refused) -> bool {
        self.send_message(pb::fetch_message::Item::Refused(refused.into()))
            .await
    }

    async fn send_message(&mut self, item: pb::fetch_message::Item) -> bool {
        let message = pb::FetchMessage {
            lamport: self.entry.clock.now().0,
            index: self.index,
            item: Some(item),
        };
        self.index += 1;
        self.sink.send(message).await.is_ok()
    }
}
