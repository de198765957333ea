//! One sync session on its target: digests and blocks over the network, comparison and writes on this side.
//!
//! Invariant: what is written goes through the owner, and only while it says Syncing; the local disk is only read here.

use super::client::{self, ANSWER_LIMIT, ClientError, Connection};
use super::entry::{Entry, PeerAddress};
use super::hub::Shared;
use super::meter::{Meter, Throttle};
use super::wire::{self, ItemError, Malformed, pb};
use futures::future::try_join_all;
use mars_engine::api::{Command, Refusal};
use mars_engine::replication::digest::{DataDisk, block_digests, region_digests};
use mars_engine::replication::messages::{Refused, RegionDigest, RegionWant, SyncEnd, SyncOffer};
use mars_engine::replication::sync::{self, Step, SyncTarget, TaskId, WrongDigests, writes_of};
use mars_engine::types::{ByteRange, Lamport, ReplicaId};
use std::io;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinSet, spawn_blocking};

/// Why a session ended before its time. Nothing is lost: the next one goes on at the last checkpoint.
#[derive(Debug, thiserror::Error)]
pub(super) enum SyncError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Status(#[from] Box<tonic::Status>),
    #[error("the source {0}")]
    Refused(Refused),
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Blocks(#[from] ItemError),
    #[error("the source sent bytes nobody asked for: {} at {}", .0.len, .0.offset)]
    Unasked(ByteRange),
    #[error(transparent)]
    Digests(#[from] WrongDigests),
    #[error("this replica refuses: {0}")]
    Owner(#[from] Refusal),
    #[error("the owner does not say where the copy goes on")]
    NotBegun,
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("reading the local disk: {0}")]
    Local(#[from] io::Error),
    #[error("a task of the sync ended: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error("the source's {0}")]
    Clock(#[from] mars_engine::clock::TooFarAhead),
}

/// Everything a session needs.
pub(super) struct Syncer {
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Arc<Entry>,
    pub(super) peer: PeerAddress,
    pub(super) meter: Arc<Meter>,
    pub(super) throttle: Arc<Throttle>,
    /// Set once the owner's log begins where this sync wants it: from then on log may be fetched beside the copy.
    pub(super) begun: watch::Sender<bool>,
    /// Compare nothing: an administrator says that the data is equal.
    pub(super) fake: bool,
}

/// What tasks share.
struct Context {
    entry: Arc<Entry>,
    source: ReplicaId,
    session: u64,
    disk: Arc<dyn DataDisk>,
    connections: Vec<Connection>,
    meter: Arc<Meter>,
    throttle: Arc<Throttle>,
}

/// What a task brings back.
enum Done {
    Compared(TaskId, Vec<RegionDigest>, Vec<RegionDigest>),
    Written(TaskId),
    Saved(u64),
    Ended(SyncEnd),
}

async fn answer<T>(question: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>) -> Result<T, SyncError> {
    let answer = tokio::time::timeout(ANSWER_LIMIT, question)
        .await
        .map_err(|_| SyncError::Timeout(ANSWER_LIMIT))?;
    Ok(answer.map_err(Box::new)?.into_inner())
}

fn refused(refused: &pb::Refused) -> SyncError {
    match refused.try_into() {
        Ok(refused) => SyncError::Refused(refused),
        Err(malformed) => SyncError::Malformed(malformed),
    }
}

impl Syncer {
    /// Copies until `FinishSync` is given to the owner.
    pub(super) async fn run(self) -> Result<(), SyncError> {
        let connections = client::connect_bulk(&self.shared, &self.peer).await?;
        let offer = self.open(&connections[0]).await?;
        self.entry.port.command(sync::begin(self.peer.replica, &offer)).await?;
        let own = self.entry.port.status().borrow().clone();
        let from_bytes = sync::resume_point(&own).ok_or(SyncError::NotBegun)?;
        let total_bytes = own.sync.ok_or(SyncError::NotBegun)?.total_bytes;
        self.begun.send_replace(true);
        let port = self.entry.port.clone();
        let disk = spawn_blocking(move || port.open_data()).await??;
        let from_bytes = if self.fake { total_bytes } else { from_bytes };
        tracing::info!(
            resource = %self.entry.resource, source = %self.peer.replica, from_bytes, total_bytes, fake = self.fake, "sync begins"
        );
        let context = Arc::new(Context {
            entry: self.entry.clone(),
            source: self.peer.replica,
            session: offer.session,
            disk,
            connections,
            meter: self.meter,
            throttle: self.throttle,
        });
        self.entry.book.trust(self.peer.replica);
        drive(context, SyncTarget::new(total_bytes, from_bytes)).await
    }

    async fn open(&self, connection: &Connection) -> Result<SyncOffer, SyncError> {
        use pb::sync_open_reply::Result as Reply;
        let request = pb::SyncOpenRequest {
            header: Some((&self.entry.header(self.peer.replica)).into()),
            durable: Some(self.entry.port.status().borrow().durable.into()),
        };
        let mut client = connection.client.clone();
        let reply = answer(client.sync_open(request)).await?;
        self.entry.clock.observe(Lamport(reply.lamport))?;
        match reply.result.ok_or(Malformed("offer"))? {
            Reply::Offer(offer) => Ok(wire::offer_in(&offer)?),
            Reply::Refused(reason) => Err(refused(&reason)),
        }
    }
}

/// Does what the engine's machine says, several things at a time.
async fn drive(context: Arc<Context>, mut target: SyncTarget) -> Result<(), SyncError> {
    // Dropped on any error, which ends all tasks.
    let mut tasks: JoinSet<Result<Done, SyncError>> = JoinSet::new();
    loop {
        while let Some(step) = target.next_step() {
            let context = context.clone();
            match step {
                Step::Compare { task, span } => drop(tasks.spawn(async move { context.compare(task, span).await })),
                Step::Transfer { task, regions } => {
                    tasks.spawn(async move { context.transfer(task, regions).await });
                }
                Step::Zero { task, range } => {
                    tasks.spawn(async move {
                        context
                            .entry
                            .port
                            .command(Command::SyncWrite { range, data: None })
                            .await?;
                        Ok(Done::Written(task))
                    });
                }
                Step::Checkpoint { done_bytes } => {
                    tasks.spawn(async move {
                        context
                            .entry
                            .port
                            .command(Command::SyncCheckpoint { done_bytes })
                            .await?;
                        Ok(Done::Saved(done_bytes))
                    });
                }
                Step::End => drop(tasks.spawn(async move { context.end().await.map(Done::Ended) })),
                Step::Finish(command) => {
                    context.entry.port.command(command).await?;
                    return Ok(());
                }
            }
        }
        let Some(done) = tasks.join_next().await else {
            return Err(SyncError::NotBegun);
        };
        match done?? {
            Done::Compared(task, remote, local) => target.on_digests(task, &remote, &local)?,
            Done::Written(task) => target.on_done(task),
            Done::Saved(done_bytes) => target.on_checkpoint(done_bytes),
            Done::Ended(end) => target.on_end(end),
        }
    }
}

impl Context {
    fn header(&self) -> pb::Header {
        (&self.entry.header(self.source)).into()
    }

    /// Tasks take the connections in turn.
    fn connection(&self, task: TaskId) -> Connection {
        let count = self.connections.len() as u64;
        let index = usize::try_from(task % count).unwrap_or_default();
        self.connections[index].clone()
    }

    async fn compare(&self, task: TaskId, span: ByteRange) -> Result<Done, SyncError> {
        let disk = self.disk.clone();
        let local = async { Ok::<_, SyncError>(spawn_blocking(move || region_digests(disk.as_ref(), span)).await??) };
        let remote = async {
            let request = pb::DigestsRequest {
                header: Some(self.header()),
                session: self.session,
                span: Some(span.into()),
            };
            let mut client = self.connection(task).client;
            let reply = answer(client.digests(request)).await?;
            self.entry.clock.observe(Lamport(reply.lamport))?;
            match &reply.refused {
                Some(reason) => Err(refused(reason)),
                None => Ok(wire::digests_in(&reply.regions)?),
            }
        };
        let (remote, local) = tokio::try_join!(remote, local)?;
        Ok(Done::Compared(task, remote, local))
    }

    async fn transfer(&self, task: TaskId, regions: Vec<(ByteRange, bool)>) -> Result<Done, SyncError> {
        let (disk, asked) = (self.disk.clone(), regions.clone());
        let wants = spawn_blocking(move || {
            let want = |(range, has_data): (ByteRange, bool)| {
                let have = if has_data {
                    block_digests(disk.as_ref(), range)?
                } else {
                    Vec::new()
                };
                Ok(RegionWant { range, have })
            };
            asked.into_iter().map(want).collect::<io::Result<Vec<_>>>()
        });
        let wants = wants.await??;
        let known = self.entry.now_known();
        let request = pb::BlocksRequest {
            header: Some(self.header()),
            session: self.session,
            regions: wants.iter().map(wire::want_out).collect(),
            compression: wire::compression_out(known.compression),
        };
        let mut client = self.connection(task).client;
        let mut messages = answer(client.blocks(request)).await?;
        let mut regions_left = regions.len();
        loop {
            let next = tokio::time::timeout(ANSWER_LIMIT, messages.message()).await;
            let Some(message) = next.map_err(|_| SyncError::Timeout(ANSWER_LIMIT))?.map_err(Box::new)? else {
                break;
            };
            self.entry.clock.observe(Lamport(message.lamport))?;
            if let Some(reason) = &message.refused {
                return Err(refused(reason));
            }
            regions_left = regions_left
                .checked_sub(1)
                .ok_or(Malformed("more regions than asked for"))?;
            self.write(&regions, &message.runs, known.sync_bytes_per_s).await?;
        }
        if regions_left > 0 {
            return Err(Malformed("fewer regions than asked for").into());
        }
        Ok(Done::Written(task))
    }

    async fn write(
        &self,
        regions: &[(ByteRange, bool)],
        runs: &[pb::BlockRun],
        limit: Option<u64>,
    ) -> Result<(), SyncError> {
        let moved: u64 = runs.iter().map(|run| run.data.len() as u64).sum();
        let runs = runs.iter().map(wire::run_in).collect::<Result<Vec<_>, _>>()?;
        let writes = writes_of(regions, runs).map_err(SyncError::Unasked)?;
        try_join_all(writes.into_iter().map(|write| self.entry.port.command(write))).await?;
        self.meter.add(moved);
        self.throttle.pass(moved, limit).await;
        Ok(())
    }

    async fn end(&self) -> Result<SyncEnd, SyncError> {
        use pb::sync_end_reply::Result as Reply;
        let request = pb::SyncEndRequest {
            header: Some(self.header()),
            session: self.session,
        };
        let mut client = self.connection(0).client;
        let reply = answer(client.sync_end(request)).await?;
        self.entry.clock.observe(Lamport(reply.lamport))?;
        match reply.result.ok_or(Malformed("end of the sync"))? {
            Reply::End(end) => Ok(SyncEnd {
                dirty_end: wire::position(end.dirty_end.as_ref())?,
                size_bytes: end.size_bytes,
            }),
            Reply::Refused(reason) => Err(refused(&reason)),
        }
    }
}
