//! The one owner of a replica's state: requests, commands and events go in, actions come out.
//!
//! Invariant: nobody else changes the log, the slots or the data disk of this replica while the owner lives.

use crate::api::{Action, Command, CommandId, Event, Io, Now, ReplicaStatus, Submitted, Tuning};
use crate::store::Store;
use crate::types::{ClusterId, ReplicaId, ResourceId};
use std::io;
use std::time::Duration;
use uuid::Uuid;

/// What `open` must know about the replica.
#[derive(Debug, Clone)]
pub struct OpenParams {
    /// The cluster; must match what is saved.
    pub cluster: ClusterId,
    /// The resource; must match what is saved.
    pub resource: ResourceId,
    /// The incarnation; must match what is saved.
    pub replica: ReplicaId,
    /// Identity of this boot of the node (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: Uuid,
    /// `Some(size in bytes)` only for a replica that joins now and has never held data: its slots are created. `None` for a
    /// known replica: if its slots or log are gone that is [`OpenError::DataMissing`], never a reason to create them.
    pub create: Option<u64>,
    /// Durability, compression, budgets.
    pub tuning: Tuning,
    /// Seed of the owner's random numbers (epoch ids, jitter), from the operating system's randomness.
    pub seed: [u8; 32],
}

/// Why a replica was not opened. Nothing was changed on any disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A known replica without its slots or segments.
    #[error(
        "{what} is missing although this replica has held data: check that the right file system is mounted; nothing was created"
    )]
    DataMissing {
        /// Which file.
        what: String,
    },
    /// Slots, segments or the data disk belong to somebody else, or are damaged in a way that must be looked at.
    #[error("{what}: refused, nothing was changed")]
    Refused {
        /// What and why.
        what: String,
    },
    /// The machine failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// All state of one replica.
#[derive(Debug)]
pub struct Owner<S: Store> {
    store: S,
    status: ReplicaStatus,
}

impl<S: Store> Owner<S> {
    /// Opens a replica and recovers it: reads slots and log, rewrites the unproven tail, decides what it may do. Blocks on
    /// file I/O for as long as reading the log from the applied position takes; call it on a pool thread.
    ///
    /// The replica comes up as `Secondary`; when it was primary before, `status().resumable` says so.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(_store: S, _params: OpenParams, _now: Now) -> Result<Self, OpenError> {
        unimplemented!("skeleton")
    }

    /// A block request. At most [`MAX_IN_FLIGHT`](crate::owner::MAX_IN_FLIGHT) may be unanswered at a time.
    pub fn submit(&mut self, _now: Now, _tag: u64, _io: Io<'_>) -> Submitted {
        unimplemented!("skeleton")
    }

    /// An order; answered by exactly one [`Action::Reply`].
    pub fn command(&mut self, _now: Now, _id: CommandId, _command: Command) {
        unimplemented!("skeleton")
    }

    /// A job came back, or the deadline has passed.
    pub fn handle(&mut self, _now: Now, _event: Event<S::File>) {
        unimplemented!("skeleton")
    }

    /// What the driver must do next; `None` when nothing is left for now.
    pub fn next_action(&mut self) -> Option<Action<S::File>> {
        unimplemented!("skeleton")
    }

    /// When `handle(Event::Tick)` is wanted at the latest (on the monotonic clock of [`Now`]).
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        unimplemented!("skeleton")
    }

    /// The present status; worth asking after [`Action::Changed`].
    #[must_use]
    pub fn status(&self) -> &ReplicaStatus {
        &self.status
    }

    /// The store, for those who read segments themselves.
    #[must_use]
    pub fn store(&self) -> &S {
        &self.store
    }
}

/// Most unanswered block requests of one device; one more is answered with `EBUSY`.
pub const MAX_IN_FLIGHT: usize = 4096;
