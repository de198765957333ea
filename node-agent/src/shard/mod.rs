//! The runtime of owners: which thread drives which replica, and the handle by which everybody else talks to it.
//!
//! ```text
//!  agent, replication (async)            shard threads (few)                     job pool (bounded)
//!  ReplicaHandle ── mailbox ──────────►  Host { engine, mailbox, source }  ──►   Job
//!        ▲        (bounded) + eventfd     epoll: eventfds, /dev/fuse       ◄──   outcome + eventfd
//!        └── watch: status, log view ───  │
//!                                         └─ moves as a whole to the thread of an open ublk device, and back
//! ```
//!
//! Invariant: an engine is touched by one thread at a time. A [`host::Host`] owns its engine, its mailbox and the
//! descriptor that wakes it, so moving a replica to another thread moves everything that can reach it, and no
//! message needs to know where it lives.

pub mod engine;
mod handle;
pub(crate) mod host;
mod owner_engine;
pub mod plain;
pub(crate) mod pool;
pub(crate) mod thread;
pub(crate) mod wake;

pub use engine::{Engine, Step};
pub use handle::{AttachError, AttachParams, DetachError, ReplicaHandle};
pub use owner_engine::OwnerEngine;

use crate::frontend::Frontends;
use pool::JobPool;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use thread::ShardThread;

/// How many threads serve how many replicas.
#[derive(Debug, Clone)]
pub struct RuntimeConfig {
    /// Threads that drive owners of secondaries and of `loop` devices.
    pub shards: usize,
    /// Threads that do slow work (fdatasync, data disk I/O, allocation) for all replicas together. One replica never
    /// holds more than half of them, so that a hanging disk leaves the others some.
    pub job_threads: usize,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            shards: 2,
            job_threads: 16,
        }
    }
}

/// All shard threads and the job pool of one agent.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

struct Inner {
    shards: Vec<ShardThread>,
    pool: Arc<JobPool>,
    frontends: Arc<Frontends>,
    next_shard: AtomicUsize,
    next_host: AtomicU64,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.pool.close();
    }
}

impl Runtime {
    /// Starts the threads.
    ///
    /// # Errors
    /// When a thread, an eventfd or an epoll descriptor cannot be made.
    pub fn start(config: &RuntimeConfig, frontends: Arc<Frontends>) -> io::Result<Self> {
        let shards = (0..config.shards.max(1))
            .map(ShardThread::start)
            .collect::<io::Result<Vec<_>>>()?;
        let pool = JobPool::start(config.job_threads.max(2))?;
        watch_frontends(Arc::downgrade(&frontends))?;
        let (next_shard, next_host) = (AtomicUsize::new(0), AtomicU64::new(0));
        Ok(Self {
            inner: Arc::new(Inner {
                shards,
                pool,
                frontends,
                next_shard,
                next_host,
            }),
        })
    }

    /// Gives an opened engine a thread and returns the handle to it. `name` is for people: it stands in log messages.
    ///
    /// # Errors
    /// When the eventfd of its mailbox cannot be made.
    pub fn add(&self, name: &str, engine: Box<dyn Engine>) -> io::Result<ReplicaHandle> {
        let id = self.inner.next_host.fetch_add(1, Ordering::Relaxed);
        let (host, mailbox) = host::Host::new(id, name.to_owned(), engine, self.inner.pool.clone())?;
        let handle = ReplicaHandle::new(mailbox, self.inner.frontends.clone(), self.clone());
        self.place(Box::new(host));
        Ok(handle)
    }

    /// Puts a host on the next shard thread.
    pub(crate) fn place(&self, host: Box<host::Host>) {
        let next = self.inner.next_shard.fetch_add(1, Ordering::Relaxed);
        self.inner.shards[next % self.inner.shards.len()].adopt(host);
    }

    /// The device frontends of this agent.
    #[must_use]
    pub fn frontends(&self) -> &Frontends {
        &self.inner.frontends
    }
}

/// How often the frontends look after what keeps devices alive.
const MAINTENANCE: Duration = Duration::from_secs(2);

fn watch_frontends(frontends: Weak<Frontends>) -> io::Result<()> {
    let watch = move || {
        while let Some(frontends) = frontends.upgrade() {
            frontends.maintain();
            drop(frontends);
            std::thread::sleep(MAINTENANCE);
        }
    };
    std::thread::Builder::new()
        .name("mars-frontends".into())
        .spawn(watch)
        .map(drop)
}
