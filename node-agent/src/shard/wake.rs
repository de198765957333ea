//! An eventfd that wakes the thread on which a replica lives.
//!
//! Invariant: whoever puts something into a queue of that thread calls [`Wake::wake`] afterwards; the thread clears
//! first and looks into the queues afterwards, so nothing is overlooked.

use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use std::io;

/// The waking side and the sleeping side are the same descriptor.
#[derive(Debug)]
pub(crate) struct Wake(OwnedFd);

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Wakes the thread; harmless when it is awake.
    pub(crate) fn wake(&self) {
        // The only error is EAGAIN, when the counter is full: then a wake-up is pending already.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Takes back all wake-ups so far.
    pub(crate) fn clear(&self) {
        let mut counter = [0; 8];
        // EAGAIN: nothing was pending.
        let _ = rustix::io::read(&self.0, &mut counter);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
