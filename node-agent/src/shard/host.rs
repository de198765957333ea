//! One engine with everything that can reach it: mailbox, job results, wake-up descriptor, published status.
//!
//! Invariant: a host is whole. It may be moved to another thread between two calls; nothing that talks to it notices,
//! and every command it has taken is answered exactly once or its answer channel is dropped with the host. A status is
//! published before any answer that follows from it.

use super::engine::{Engine, Job, Step, now};
use super::pool::{JobPool, JobResult};
use super::wake::Wake;
use crate::frontend::resident::Buffers;
use mars_engine::api::{Command, CommandId, Io, IoResult, LogView, ReplicaStatus, Reply, Submitted};
use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};

/// Most messages that wait for an owner; senders wait when it is full.
const MAILBOX_MESSAGES: usize = 256;

/// What is sent to a replica, wherever it lives.
pub(crate) enum Message {
    /// An order for the engine.
    Command(Command, oneshot::Sender<Reply>),
    /// From now on serve this source of block requests too.
    AddSource(Box<dyn Source>, oneshot::Sender<()>),
    /// Stop serving it; requests in flight are no longer answered.
    RemoveSource(oneshot::Sender<()>),
    /// Give the host away, to live on another thread. Refused (by dropping the sender) while it has a source.
    Leave(oneshot::Sender<Box<Host>>),
    /// Drop the engine. Whoever wants it clean sends `Command::Shutdown` before.
    Stop(oneshot::Sender<()>),
}

/// A source of block requests with a descriptor to wait for. It lives beside its owner, on the same thread.
pub(crate) trait Source: Send {
    /// Readable when there are requests.
    fn descriptor(&self) -> rustix::fd::BorrowedFd<'_>;
    /// Whether it may take requests now; `false` holds them back in the kernel until enough have been answered.
    fn accepts(&self) -> bool;
    /// Takes a bounded number of requests. `submit` returns the tag under which a later answer comes.
    fn receive(&mut self, buffers: &mut Buffers, submit: &mut dyn FnMut(Io<'_>) -> (u64, Submitted)) -> Received;
    /// Answers a request; a tag that is not (or no longer) known is ignored.
    fn complete(&mut self, buffers: &mut Buffers, tag: u64, result: IoResult);
}

/// What [`Source::receive`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// Took what there was, or as much as it may in one turn.
    Some,
    /// The kernel's side is gone; nothing will ever come again.
    Ended,
}

/// The sending side of a replica's mailbox, and what it publishes.
#[derive(Clone)]
pub(crate) struct Mailbox {
    messages: mpsc::Sender<Message>,
    wake: Arc<Wake>,
    pub(crate) status: watch::Receiver<Arc<ReplicaStatus>>,
    pub(crate) log_view: watch::Receiver<Arc<LogView>>,
}

/// The replica's engine is gone: shut down, or stopped by a failed assertion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the engine of this replica has stopped: see the agent's log for the cause; restarting the agent recovers it")]
pub struct Stopped;

impl Mailbox {
    /// Sends, waiting for room.
    pub(crate) async fn send(&self, message: Message) -> Result<(), Stopped> {
        self.messages.send(message).await.map_err(|_| Stopped)?;
        self.wake.wake();
        Ok(())
    }

    /// Sends a message that is answered through a oneshot, and waits for the answer. Not for async contexts.
    pub(crate) fn ask_blocking<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Stopped> {
        let (to, from) = oneshot::channel();
        self.messages.blocking_send(make(to)).map_err(|_| Stopped)?;
        self.wake.wake();
        from.blocking_recv().map_err(|_| Stopped)
    }

    /// The same for async contexts.
    pub(crate) async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Message) -> Result<T, Stopped> {
        let (to, from) = oneshot::channel();
        self.send(make(to)).await?;
        from.await.map_err(|_| Stopped)
    }
}

/// See the module.
pub(crate) struct Host {
    pub(crate) id: u64,
    pub(crate) name: String,
    pub(crate) wake: Arc<Wake>,
    engine: Box<dyn Engine>,
    messages: mpsc::Receiver<Message>,
    replies: HashMap<CommandId, oneshot::Sender<Reply>>,
    next_command: CommandId,
    next_tag: u64,
    pool: Arc<JobPool>,
    results_to: Sender<JobResult>,
    results: Receiver<JobResult>,
    /// Jobs that are not in the pool yet; somebody waits for these.
    urgent_jobs: VecDeque<Job>,
    other_jobs: VecDeque<Job>,
    running_jobs: usize,
    status: watch::Sender<Arc<ReplicaStatus>>,
    log_view: watch::Sender<Arc<LogView>>,
}

impl Host {
    pub(crate) fn new(
        id: u64,
        name: String,
        engine: Box<dyn Engine>,
        pool: Arc<JobPool>,
    ) -> io::Result<(Self, Mailbox)> {
        let wake = Arc::new(Wake::new()?);
        let (messages_to, messages) = mpsc::channel(MAILBOX_MESSAGES);
        let (results_to, results) = channel();
        let (status_to, status) = watch::channel(Arc::new(engine.status()));
        let (view_to, log_view) = watch::channel(Arc::new(engine.log_view()));
        let mailbox = Mailbox {
            messages: messages_to,
            wake: wake.clone(),
            status,
            log_view,
        };
        let host = Self {
            id,
            name,
            wake,
            engine,
            messages,
            replies: HashMap::new(),
            next_command: 0,
            next_tag: 0,
            pool,
            results_to,
            results,
            urgent_jobs: VecDeque::new(),
            other_jobs: VecDeque::new(),
            running_jobs: 0,
            status: status_to,
            log_view: view_to,
        };
        Ok((host, mailbox))
    }

    /// Hands a request to the engine. Tags are never used twice, also not by the next source of this replica.
    pub(crate) fn submit(&mut self, io: Io<'_>) -> (u64, Submitted) {
        let tag = self.next_tag;
        self.next_tag += 1;
        (tag, self.engine.submit(now(), tag, io))
    }

    /// The next message that is not for the engine itself; commands and job results on the way are handed to it.
    ///
    /// # Panics
    /// When a job panicked: its effects are unknown, so this engine must not go on.
    pub(crate) fn take_messages(&mut self) -> Taken {
        while let Ok(result) = self.results.try_recv() {
            self.running_jobs -= 1;
            match result {
                Ok(outcome) => self.engine.finished(now(), outcome),
                Err(panic) => panic!("a job of this engine panicked: {panic}"),
            }
        }
        loop {
            match self.messages.try_recv() {
                Ok(Message::Command(command, reply)) => {
                    let id = self.next_command;
                    self.next_command += 1;
                    self.replies.insert(id, reply);
                    self.engine.command(now(), id, command);
                }
                Ok(other) => return Taken::Message(other),
                Err(mpsc::error::TryRecvError::Empty) => return Taken::Nothing,
                Err(mpsc::error::TryRecvError::Disconnected) => return Taken::Abandoned,
            }
        }
    }

    /// Calls the engine's deadline if it has passed, takes all steps there are, and publishes what has changed.
    pub(crate) fn pump(&mut self, complete: &mut dyn FnMut(u64, IoResult)) {
        // Once per turn: an engine that always wants to be called at once must not keep the thread from the others.
        if self
            .engine
            .next_deadline()
            .is_some_and(|deadline| deadline <= now().mono)
        {
            self.engine.tick(now());
        }
        // A change comes before the answers that follow from it, and is published at once: whoever sees the answer to a request or
        // an order sees a status that knows it.
        while let Some(step) = self.engine.next_step() {
            match step {
                Step::Complete { tag, result } => complete(tag, result),
                Step::Job(job) if job.urgent => self.urgent_jobs.push_back(job),
                Step::Job(job) => self.other_jobs.push_back(job),
                Step::Reply(id, reply) => {
                    if let Some(to) = self.replies.remove(&id) {
                        // Whoever asked may have stopped waiting.
                        let _ = to.send(reply);
                    }
                }
                Step::Changed => {
                    self.status.send_replace(Arc::new(self.engine.status()));
                    self.log_view.send_replace(Arc::new(self.engine.log_view()));
                }
            }
        }
        self.hand_in_jobs();
    }

    fn hand_in_jobs(&mut self) {
        while self.running_jobs < self.pool.share() {
            let Some(job) = self.urgent_jobs.pop_front().or_else(|| self.other_jobs.pop_front()) else {
                return;
            };
            self.running_jobs += 1;
            self.pool.run(job, self.results_to.clone(), self.wake.clone());
        }
    }

    /// When [`Host::pump`] must be called again at the latest, on the scale of `now().mono`.
    pub(crate) fn next_deadline(&self) -> Option<Duration> {
        self.engine.next_deadline()
    }
}

/// What [`Host::take_messages`] found.
pub(crate) enum Taken {
    /// Something for whoever drives the host.
    Message(Message),
    /// No more now.
    Nothing,
    /// All handles are gone: nobody will ever ask again.
    Abandoned,
}
