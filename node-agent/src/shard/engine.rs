//! What a thread drives: the engine of one replica, seen as a trait so that frontends and their tests do not depend
//! on how a request is stored.
//!
//! Invariant: no method waits for anything slower than a write into the page cache; slow work leaves as a
//! [`Step::Job`], runs once on any thread, and its outcome comes back through [`Engine::finished`] of the same engine.

use mars_engine::api::{Command, CommandId, Io, IoResult, LogView, Now, ReplicaStatus, Reply, Submitted};
use std::any::Any;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What a job leaves behind; only the engine that asked for it knows what is inside.
pub type Outcome = Box<dyn Any + Send>;

/// Slow work, to be run once on any thread.
pub struct Job {
    /// Writers or flushes wait for it: it overtakes work nobody waits for.
    pub urgent: bool,
    /// The work.
    pub run: Box<dyn FnOnce() -> Outcome + Send>,
}

/// What the driver must do next for an engine.
pub enum Step {
    /// Answer the request submitted with this tag.
    Complete {
        /// The tag given to `submit`.
        tag: u64,
        /// The answer.
        result: IoResult,
    },
    /// Run this and bring the outcome back.
    Job(Job),
    /// Answer the command with this id.
    Reply(CommandId, Reply),
    /// Status or log view have changed: publish them before the next step, so that no answer is seen before what it follows from.
    Changed,
}

/// One replica's engine. After each call the driver takes steps until there are none.
pub trait Engine: Send {
    /// Takes a block request.
    fn submit(&mut self, now: Now, tag: u64, io: Io<'_>) -> Submitted;
    /// Takes an order; answered by exactly one [`Step::Reply`].
    fn command(&mut self, now: Now, id: CommandId, command: Command);
    /// Takes the outcome of a job.
    fn finished(&mut self, now: Now, outcome: Outcome);
    /// The deadline has passed.
    fn tick(&mut self, now: Now);
    /// The next thing to do, if any.
    fn next_step(&mut self) -> Option<Step>;
    /// When to call `tick`, on the scale of [`Now::mono`].
    fn next_deadline(&self) -> Option<Duration>;
    /// Everything worth knowing.
    fn status(&self) -> ReplicaStatus;
    /// What may be served to peers.
    fn log_view(&self) -> LogView;
}

static PROCESS_START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The clocks as engines see them. One scale for all threads, since owners move between them.
#[must_use]
pub fn now() -> Now {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // 2^64 ns end in the year 2554; a clock beyond that is refused as too far in the future anyway.
    Now {
        mono: PROCESS_START.elapsed(),
        wall_ns: u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX),
    }
}
