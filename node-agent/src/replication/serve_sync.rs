//! Serving a sync: sessions over the data disk of this replica, read beside its owner.
//!
//! Invariants: a session ends for good the moment this replica is not consistent (what it read before would be worth
//! nothing); the log from the offered position is kept for the target before the offer is made; the dirty end is taken after a round trip through
//! the owner, so it covers every write-back that was under way when the last block was read.

use super::entry::Entry;
use mars_engine::api::{Command, DataState};
use mars_engine::replication::digest::{DataDisk, differing_runs, region_digests, region_is_valid, span_is_valid};
use mars_engine::replication::messages::{BlockRun, Refused, RegionDigest, RegionWant, SyncEnd, SyncOffer};
use mars_engine::types::{ByteRange, Position, ReplicaId};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::Instant;

/// Reads of the data disk at a time, over all targets.
const MOST_READS: usize = 4;
/// Targets at a time.
const MOST_SESSIONS: usize = 16;
/// A session nobody asks for this long is forgotten.
const SESSION_IDLE: Duration = Duration::from_mins(10);

struct Session {
    target: ReplicaId,
    start: Position,
    disk: Arc<dyn DataDisk>,
    used: Instant,
}

/// All sessions of one source.
pub(super) struct Sessions {
    entry: Arc<Entry>,
    open: Mutex<HashMap<u64, Session>>,
    reads: Semaphore,
}

fn io_refused(what: &str) -> impl FnOnce(io::Error) -> Refused {
    let what = what.to_owned();
    move |error| Refused::Io {
        message: format!("{what}: {error}"),
    }
}

impl Sessions {
    pub(super) fn new(entry: Arc<Entry>) -> Self {
        Self {
            entry,
            open: Mutex::default(),
            reads: Semaphore::new(MOST_READS),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<u64, Session>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends all sessions whenever this replica is not consistent.
    pub(super) async fn watch(self: Arc<Self>) {
        let mut status = self.entry.port.status();
        let inconsistent = |status: &Arc<mars_engine::api::ReplicaStatus>| status.data != DataState::Consistent;
        while status.wait_for(inconsistent).await.is_ok() {
            self.sessions().clear();
            if status.changed().await.is_err() {
                return;
            }
        }
    }

    fn check_consistent(&self) -> Result<(), Refused> {
        match self.entry.port.status().borrow().data.clone() {
            DataState::Consistent => Ok(()),
            state => Err(Refused::Inconsistent { state }),
        }
    }

    /// Offers this disk to a target, and keeps the log that it will need.
    pub(super) async fn open(&self, target: ReplicaId) -> Result<SyncOffer, Refused> {
        self.check_consistent()?;
        let port = self.entry.port.clone();
        let disk = spawn_blocking(move || port.open_data())
            .await
            .map_err(|error| Refused::Io {
                message: error.to_string(),
            })?;
        let disk = disk.map_err(io_refused("opening the data disk"))?;
        for _ in 0..5 {
            let start = self.entry.port.status().borrow().applied;
            self.barrier(target, start).await?;
            self.check_consistent()?;
            let status = self.entry.port.status().borrow().clone();
            // The log may have been cut between our look and the owner's note; after it, it is kept.
            if status.log_start > start.lsn {
                continue;
            }
            let session = rand::random();
            self.register(
                session,
                Session {
                    target,
                    start,
                    disk,
                    used: Instant::now(),
                },
            )?;
            return Ok(SyncOffer {
                session,
                applied: start,
                lineage: status.lineage.clone(),
                durable: status.durable,
                log_start: status.log_start,
                size_bytes: status.size_bytes,
            });
        }
        Err(Refused::Busy {
            message: "cutting its log".into(),
        })
    }

    /// A round trip through the owner that also says what the target needs of the log.
    async fn barrier(&self, target: ReplicaId, start: Position) -> Result<(), Refused> {
        let report = Command::PeerReport {
            peer: target,
            durable: start,
        };
        self.entry.book.forget_report(target);
        let reply = self.entry.port.command(report).await;
        reply.map(|_| ()).map_err(|refusal| Refused::Io {
            message: refusal.to_string(),
        })
    }

    fn register(&self, id: u64, session: Session) -> Result<(), Refused> {
        let mut sessions = self.sessions();
        sessions.retain(|_, other| other.target != session.target && other.used.elapsed() < SESSION_IDLE);
        if sessions.len() >= MOST_SESSIONS {
            return Err(Refused::Busy {
                message: format!("serving {MOST_SESSIONS} syncs"),
            });
        }
        sessions.insert(id, session);
        Ok(())
    }

    fn session(&self, target: ReplicaId, id: u64) -> Result<(Arc<dyn DataDisk>, Position), Refused> {
        self.check_consistent()?;
        let mut sessions = self.sessions();
        let session = sessions.get_mut(&id).filter(|session| session.target == target);
        let session = session.ok_or(Refused::SessionLost)?;
        session.used = Instant::now();
        Ok((session.disk.clone(), session.start))
    }

    /// Reads on a blocking thread; what was read counts only if the session is still there afterwards.
    async fn read<T: Send + 'static>(
        &self,
        target: ReplicaId,
        id: u64,
        read: impl FnOnce(&dyn DataDisk) -> io::Result<T> + Send + 'static,
    ) -> Result<T, Refused> {
        let (disk, _) = self.session(target, id)?;
        let permit = self.reads.acquire().await.map_err(|_| Refused::SessionLost)?;
        let done = spawn_blocking(move || read(disk.as_ref())).await;
        drop(permit);
        let result = done.map_err(|error| Refused::Io {
            message: error.to_string(),
        })?;
        self.session(target, id)?;
        result.map_err(io_refused("reading the data disk"))
    }

    fn size_bytes(&self) -> u64 {
        self.entry.port.status().borrow().size_bytes
    }

    pub(super) async fn digests(
        &self,
        target: ReplicaId,
        id: u64,
        span: ByteRange,
    ) -> Result<Vec<RegionDigest>, Refused> {
        if !span_is_valid(span, self.size_bytes()) {
            return Err(Refused::Io {
                message: format!("no such span: {} bytes at {}", span.len, span.offset),
            });
        }
        self.read(target, id, move |disk| region_digests(disk, span)).await
    }

    pub(super) async fn blocks(&self, target: ReplicaId, id: u64, want: RegionWant) -> Result<Vec<BlockRun>, Refused> {
        let region = want.range;
        if !region_is_valid(region, self.size_bytes()) {
            return Err(Refused::Io {
                message: format!("no such region: {} bytes at {}", region.len, region.offset),
            });
        }
        self.read(target, id, move |disk| differing_runs(disk, region, &want.have))
            .await
    }

    /// The last word of a session.
    pub(super) async fn end(&self, target: ReplicaId, id: u64) -> Result<SyncEnd, Refused> {
        let (_, start) = self.session(target, id)?;
        let known = self
            .entry
            .book
            .member(target, Duration::MAX)
            .status
            .map(|status| status.durable);
        self.barrier(
            target,
            known.filter(|durable| durable.lsn >= start.lsn).unwrap_or(start),
        )
        .await?;
        self.session(target, id)?;
        let status = self.entry.port.status().borrow().clone();
        Ok(SyncEnd {
            dirty_end: status.dirty_end,
            size_bytes: status.size_bytes,
        })
    }
}
