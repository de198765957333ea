//! A real owner on real files, driven by a thread of its own: what the agent's shard threads do, with a write request from the
//! test instead of a block device, and faults on demand.
//!
//! Invariant: as in the agent, a status is published before any answer that depends on it.

use futures::future::BoxFuture;
use mars_engine::api::{Action, Command, Event, Io, IoResult, LogView, Now, ReplicaStatus, Reply, Submitted};
use mars_engine::brick::Disk;
use mars_engine::clock::LamportClock;
use mars_engine::jobs::{Job, run_job};
use mars_engine::log::serve::SegmentLog;
use mars_engine::owner::{OpenParams, Owner};
use mars_engine::replication::digest::DataDisk;
use mars_engine::replication::messages::Refused;
use mars_engine::replication::source::LogReader;
use mars_engine::store::{FileId, Store as _};
use mars_engine::store_fs::{FsFile, FsStore};
use mars_engine::types::Designation;
use mars_node_agent::replication::ReplicaPort;
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{oneshot, watch};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The wall clock of a node: that of the machine, and what a test adds to it (seconds, may be negative).
#[derive(Clone, Default)]
pub(crate) struct Wall(Arc<AtomicI64>);

impl Wall {
    pub(crate) fn is_off_by(&self, seconds: i64) {
        self.0.store(seconds, Ordering::SeqCst);
    }

    pub(crate) fn ns(&self) -> u64 {
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let seconds = self.0.load(Ordering::SeqCst);
        let wall_ns = u64::try_from(wall.as_nanos()).unwrap();
        wall_ns.checked_add_signed(seconds * 1_000_000_000).unwrap()
    }

    fn now(&self) -> Now {
        Now {
            mono: START.elapsed(),
            wall_ns: self.ns(),
        }
    }
}

enum Message {
    Command(Command, oneshot::Sender<Reply>),
    Write(u64, Vec<u8>, oneshot::Sender<IoResult>),
    Flush(oneshot::Sender<IoResult>),
    /// The process dies: nothing is finished, nothing is saved.
    Kill,
}

/// Faults that a test switches on and off.
#[derive(Default)]
pub(crate) struct Faults {
    /// Each fdatasync of the log takes this much longer (milliseconds).
    pub(crate) slow_sync_ms: AtomicU64,
}

/// One running replica.
#[derive(Clone)]
pub(crate) struct Machine {
    to: Sender<Message>,
    store: FsStore,
    status: watch::Receiver<Arc<ReplicaStatus>>,
    view: watch::Receiver<Arc<LogView>>,
    pub(crate) faults: Arc<Faults>,
}

impl Machine {
    pub(crate) fn start(store: FsStore, params: OpenParams, wall: Wall, clock: &LamportClock) -> Self {
        let mut owner = Owner::open(store.clone(), params, wall.now()).expect("the replica opens");
        owner.share_clock(clock, wall.now());
        let (to, from) = channel();
        let (publish_status, status) = watch::channel(Arc::new(owner.status().clone()));
        let (publish_view, view) = watch::channel(Arc::new(owner.log_view().clone()));
        let faults = Arc::new(Faults::default());
        let driver = Driver {
            owner,
            wall,
            store: store.clone(),
            from,
            publish_status,
            publish_view,
            faults: faults.clone(),
            replies: HashMap::new(),
            completions: HashMap::new(),
            next: 1,
        };
        std::thread::Builder::new()
            .name("owner".into())
            .spawn(move || driver.run())
            .unwrap();
        Self {
            to,
            store,
            status,
            view,
            faults,
        }
    }

    pub(crate) async fn order(&self, command: Command) -> Reply {
        self.command(command).await
    }

    async fn io(&self, message: impl FnOnce(oneshot::Sender<IoResult>) -> Message) -> IoResult {
        let (to, answer) = oneshot::channel();
        self.to.send(message(to)).expect("the replica runs");
        tokio::time::timeout(Duration::from_mins(1), answer)
            .await
            .expect("a request ends")
            .expect("the replica runs")
    }

    pub(crate) async fn write(&self, offset: u64, data: Vec<u8>) {
        assert_eq!(self.io(|to| Message::Write(offset, data, to)).await, IoResult::Done);
    }

    pub(crate) async fn flush(&self) {
        assert_eq!(self.io(Message::Flush).await, IoResult::Done);
    }

    /// Afterwards `now()` knows everything that was answered before.
    pub(crate) async fn barrier(&self) {
        // Refused or not: answers come after the status.
        let _ = self
            .order(Command::Observe {
                designation: Designation::default(),
            })
            .await;
    }

    /// The data disk itself.
    pub(crate) fn data(&self) -> Disk {
        Arc::new(self.store.open(&FileId::Data).expect("the data disk is there"))
    }

    pub(crate) fn kill(&self) {
        let _ = self.to.send(Message::Kill);
    }

    pub(crate) fn now(&self) -> Arc<ReplicaStatus> {
        self.status.borrow().clone()
    }
}

impl ReplicaPort for Machine {
    fn command(&self, command: Command) -> BoxFuture<'static, Reply> {
        let to = self.to.clone();
        Box::pin(async move {
            let (reply, answer) = oneshot::channel();
            let stopped = || mars_engine::api::Refusal::Io("the replica has stopped".into());
            to.send(Message::Command(command, reply)).map_err(|_| stopped())?;
            answer.await.map_err(|_| stopped())?
        })
    }

    fn status(&self) -> watch::Receiver<Arc<ReplicaStatus>> {
        self.status.clone()
    }

    fn log_view(&self) -> watch::Receiver<Arc<LogView>> {
        self.view.clone()
    }

    fn open_log(&self) -> Result<Box<dyn LogReader>, Refused> {
        Ok(Box::new(SegmentLog::new(self.store.clone())))
    }

    fn open_data(&self) -> io::Result<Arc<dyn DataDisk>> {
        Ok(Arc::new(self.store.open(&FileId::Data)?))
    }
}

struct Driver {
    owner: Owner<FsStore>,
    wall: Wall,
    store: FsStore,
    from: Receiver<Message>,
    publish_status: watch::Sender<Arc<ReplicaStatus>>,
    publish_view: watch::Sender<Arc<LogView>>,
    faults: Arc<Faults>,
    replies: HashMap<u64, oneshot::Sender<Reply>>,
    completions: HashMap<u64, oneshot::Sender<IoResult>>,
    next: u64,
}

impl Driver {
    fn run(mut self) {
        loop {
            self.pump();
            let wait = self
                .owner
                .next_deadline()
                .map_or(Duration::from_secs(1), |at| at.saturating_sub(START.elapsed()));
            match self.from.recv_timeout(wait) {
                Ok(Message::Kill) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(message) => self.take(message),
                Err(RecvTimeoutError::Timeout) => self.owner.handle(self.wall.now(), Event::Tick),
            }
        }
    }

    fn take(&mut self, message: Message) {
        let id = self.next;
        self.next += 1;
        let (submitted, to) = match message {
            Message::Command(command, to) => {
                self.replies.insert(id, to);
                self.owner.command(self.wall.now(), id, command);
                return;
            }
            Message::Write(offset, data, to) => (
                self.owner.submit(
                    self.wall.now(),
                    id,
                    Io::Write {
                        offset,
                        data: &data,
                        fua: false,
                    },
                ),
                to,
            ),
            Message::Flush(to) => (self.owner.submit(self.wall.now(), id, Io::Flush), to),
            Message::Kill => unreachable!("handled by the caller"),
        };
        match submitted {
            Submitted::Now(result) => drop(to.send(result)),
            Submitted::Later => drop(self.completions.insert(id, to)),
        }
    }

    fn pump(&mut self) {
        while let Some(action) = self.owner.next_action() {
            match action {
                Action::Complete { tag, result } => {
                    if let Some(to) = self.completions.remove(&tag) {
                        let _ = to.send(result);
                    }
                }
                Action::Job(id, job) => {
                    self.slow_down(&job);
                    let outcome = run_job(&self.store, job);
                    self.owner.handle(self.wall.now(), Event::JobDone(id, outcome));
                }
                Action::Reply(id, reply) => {
                    if let Some(to) = self.replies.remove(&id) {
                        let _ = to.send(reply);
                    }
                }
                Action::Changed => {
                    self.publish_status.send_replace(Arc::new(self.owner.status().clone()));
                    self.publish_view.send_replace(Arc::new(self.owner.log_view().clone()));
                }
            }
        }
    }

    fn slow_down(&self, job: &Job<FsFile>) {
        let pause_ms = self.faults.slow_sync_ms.load(Ordering::Relaxed);
        if pause_ms > 0 && matches!(job, Job::Sync(_)) {
            std::thread::sleep(Duration::from_millis(pause_ms));
        }
    }
}
