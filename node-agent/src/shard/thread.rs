//! A shard thread: one epoll loop over the mailboxes and /dev/fuse descriptors of the replicas that live on it.
//!
//! Invariant: nothing in a turn waits. One replica's turn takes a bounded number of requests, and a failed assertion in
//! one engine ends that replica only: its device pauses (no error, the keeper holds it) and its handle says so.

use super::engine::now;
use super::host::{Host, Message, Received, Source, Taken};
use super::pool::panic_message;
use super::wake::Wake;
use crate::frontend::resident::Buffers;
use rustix::event::{Timespec, epoll};
use rustix::fd::OwnedFd;
use std::collections::HashMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;
use tokio::sync::oneshot;
use tracing::{debug, error, warn};

/// Key of the thread's own wake-up; replicas have `2 × id` (mailbox) and `2 × id + 1` (source).
const CONTROL_KEY: u64 = u64::MAX;
/// Events taken per turn.
const EVENTS: usize = 64;

/// The outside of a shard thread. The thread ends when this is dropped.
pub(crate) struct ShardThread {
    incoming: Option<Sender<Box<Host>>>,
    wake: Arc<Wake>,
}

impl ShardThread {
    pub(crate) fn start(number: usize) -> io::Result<Self> {
        let wake = Arc::new(Wake::new()?);
        let (incoming_to, incoming) = channel();
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(
            &epoll,
            &*wake,
            epoll::EventData::new_u64(CONTROL_KEY),
            epoll::EventFlags::IN,
        )?;
        let mut shard = Shard {
            epoll,
            wake: wake.clone(),
            incoming,
            seats: HashMap::new(),
            buffers: Buffers::new()?,
            open: true,
        };
        std::thread::Builder::new()
            .name(format!("mars-shard-{number}"))
            .spawn(move || shard.run())?;
        Ok(Self {
            incoming: Some(incoming_to),
            wake,
        })
    }

    /// Gives a host to this thread.
    pub(crate) fn adopt(&self, host: Box<Host>) {
        if let Some(incoming) = &self.incoming
            && incoming.send(host).is_err()
        {
            error!("a shard thread has ended: its replicas pause until the agent is restarted");
        }
        self.wake.wake();
    }
}

impl Drop for ShardThread {
    fn drop(&mut self) {
        self.incoming = None;
        self.wake.wake();
    }
}

/// A replica on this thread.
struct Seat {
    host: Box<Host>,
    source: Option<Box<dyn Source>>,
    /// Whether epoll reports the source; not while it holds requests back.
    armed: bool,
}

struct Shard {
    epoll: OwnedFd,
    wake: Arc<Wake>,
    incoming: Receiver<Box<Host>>,
    seats: HashMap<u64, Seat>,
    /// For all devices of the thread, since an engine copies what it keeps.
    buffers: Buffers,
    open: bool,
}

/// What becomes of a replica after a turn.
enum After {
    Stays,
    /// Stopped; the sender learns when it is gone.
    Ends(Option<oneshot::Sender<()>>),
    /// Moves to another thread.
    Leaves(oneshot::Sender<Box<Host>>),
}

impl Shard {
    fn run(&mut self) {
        let mut events = Vec::with_capacity(EVENTS);
        while self.open || !self.seats.is_empty() {
            let timeout = self.timeout();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                timeout.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                // EBADF or EINVAL: a bug in this file; going on would spin.
                Err(errno) => panic!("epoll_wait on the shard's own descriptor failed: {errno}"),
            }
            for event in events.drain(..) {
                match event.data.u64() {
                    CONTROL_KEY => self.take_incoming(),
                    key => self.turn(key / 2, key % 2 == 1),
                }
            }
            self.turn_overdue();
        }
    }

    /// Until the earliest deadline of all replicas; for ever when there is none.
    fn timeout(&self) -> Option<Timespec> {
        let earliest = self.seats.values().filter_map(|seat| seat.host.next_deadline()).min()?;
        let rest = earliest.saturating_sub(now().mono).min(Duration::from_hours(1));
        Timespec::try_from(rest).ok()
    }

    fn take_incoming(&mut self) {
        self.wake.clear();
        loop {
            match self.incoming.try_recv() {
                Ok(host) => self.take(host),
                Err(std::sync::mpsc::TryRecvError::Empty) => return,
                Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                    self.open = false;
                    return;
                }
            }
        }
    }

    fn turn_overdue(&mut self) {
        let time = now().mono;
        let due = |seat: &Seat| seat.host.next_deadline().is_some_and(|deadline| deadline <= time);
        let overdue: Vec<u64> = self
            .seats
            .iter()
            .filter(|(_, seat)| due(seat))
            .map(|(id, _)| *id)
            .collect();
        for id in overdue {
            self.turn(id, false);
        }
    }

    /// One turn of one replica: messages and job results, then requests, then everything the engine wants done.
    fn turn(&mut self, id: u64, source_ready: bool) {
        let Some(mut seat) = self.seats.remove(&id) else { return };
        let (epoll, buffers) = (&self.epoll, &mut self.buffers);
        match catch_unwind(AssertUnwindSafe(|| seat.turn(epoll, buffers, source_ready))) {
            Ok(After::Stays) => {
                self.seats.insert(id, seat);
            }
            Ok(After::Ends(told)) => {
                seat.leave(epoll);
                drop(seat);
                if let Some(told) = told {
                    // Whoever asked may have stopped waiting.
                    let _ = told.send(());
                }
            }
            Ok(After::Leaves(to)) => {
                seat.leave(epoll);
                if let Err(host) = to.send(seat.host) {
                    // Nobody waits for it any more: it stays.
                    self.take(host);
                }
            }
            Err(panic) => {
                let message = panic_message(panic.as_ref());
                error!(
                    replica = seat.host.name,
                    "the engine stopped: {message}; its device pauses until the agent restarts"
                );
                seat.leave(epoll);
            }
        }
    }

    fn take(&mut self, host: Box<Host>) {
        let id = host.id;
        let key = epoll::EventData::new_u64(id * 2);
        if let Err(errno) = epoll::add(&self.epoll, &*host.wake, key, epoll::EventFlags::IN) {
            error!(replica = host.name, %errno, "cannot watch the mailbox of a replica: it is stopped");
            return;
        }
        self.seats.insert(
            id,
            Seat {
                host,
                source: None,
                armed: false,
            },
        );
        // Messages that came while it moved have woken nobody here.
        self.turn(id, false);
    }
}

impl Seat {
    fn turn(&mut self, epoll: &OwnedFd, buffers: &mut Buffers, source_ready: bool) -> After {
        self.host.wake.clear();
        let after = loop {
            match self.host.take_messages() {
                Taken::Nothing => break After::Stays,
                Taken::Abandoned => break After::Ends(None),
                Taken::Message(Message::Stop(told)) => break After::Ends(Some(told)),
                Taken::Message(Message::Leave(to)) if self.source.is_none() => break After::Leaves(to),
                // Dropping the sender is the refusal.
                Taken::Message(Message::Leave(_)) => {
                    warn!(replica = self.host.name, "cannot move while a device is served");
                }
                Taken::Message(Message::AddSource(source, told)) => self.add_source(epoll, source, told),
                Taken::Message(Message::RemoveSource(told)) => {
                    self.remove_source(epoll);
                    let _ = told.send(());
                }
                Taken::Message(Message::Command(..)) => unreachable!("take_messages hands commands to the engine"),
            }
        };
        if source_ready {
            self.receive(epoll, buffers);
        }
        self.pump(buffers);
        self.arm(epoll);
        after
    }

    fn receive(&mut self, epoll: &OwnedFd, buffers: &mut Buffers) {
        let Some(source) = &mut self.source else { return };
        let host = &mut self.host;
        if source.receive(buffers, &mut |io| host.submit(io)) == Received::Ended {
            debug!(replica = self.host.name, "the kernel's side of the device is gone");
            self.remove_source(epoll);
        }
    }

    fn pump(&mut self, buffers: &mut Buffers) {
        let source = &mut self.source;
        self.host.pump(&mut |tag, result| {
            if let Some(source) = source {
                source.complete(buffers, tag, result);
            }
        });
    }

    fn add_source(&mut self, epoll: &OwnedFd, source: Box<dyn Source>, told: oneshot::Sender<()>) {
        self.remove_source(epoll);
        let key = epoll::EventData::new_u64(self.host.id * 2 + 1);
        match epoll::add(epoll, source.descriptor(), key, epoll::EventFlags::IN) {
            Ok(()) => {
                (self.source, self.armed) = (Some(source), true);
                let _ = told.send(());
            }
            // Dropping the sender is the refusal.
            Err(errno) => error!(replica = self.host.name, %errno, "cannot watch the descriptor of a device"),
        }
    }

    fn remove_source(&mut self, epoll: &OwnedFd) {
        if let Some(source) = self.source.take()
            && let Err(errno) = epoll::delete(epoll, source.descriptor())
        {
            error!(replica = self.host.name, %errno, "cannot stop watching the descriptor of a device");
        }
    }

    /// Back-pressure: while the source holds requests back, its descriptor is not watched.
    fn arm(&mut self, epoll: &OwnedFd) {
        let Some(source) = &self.source else { return };
        let wanted = source.accepts();
        if wanted == self.armed {
            return;
        }
        let flags = if wanted {
            epoll::EventFlags::IN
        } else {
            epoll::EventFlags::empty()
        };
        let key = epoll::EventData::new_u64(self.host.id * 2 + 1);
        match epoll::modify(epoll, source.descriptor(), key, flags) {
            Ok(()) => self.armed = wanted,
            Err(errno) => error!(replica = self.host.name, %errno, "cannot change the watch on a device"),
        }
    }

    /// Takes everything of this replica out of the thread's epoll.
    fn leave(&mut self, epoll: &OwnedFd) {
        self.remove_source(epoll);
        if let Err(errno) = epoll::delete(epoll, &*self.host.wake) {
            error!(replica = self.host.name, %errno, "cannot stop watching a mailbox");
        }
    }
}
