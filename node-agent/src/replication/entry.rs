//! One replica as the replication side sees it: its engine, its members, what they last said.

use super::book::PeerBook;
use futures::future::BoxFuture;
use mars_engine::api::{Command, Compression, LogView, ReplicaStatus, Reply};
use mars_engine::replication::digest::DataDisk;
use mars_engine::replication::fetch::{Member, Wish};
use mars_engine::replication::messages::{Followed, Header, PROTOCOL_MAX, PeerStatus, Refused, check_header};
use mars_engine::replication::source::LogReader;
use mars_engine::types::{ClusterId, EpochId, NodeId, ReplicaId, ResourceId};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::watch;
use uuid::Uuid;

use super::clock::SharedClock;
use super::tls::PeerIdentity;

/// What replication needs of a replica's engine. All methods are cheap except where they say that they block.
pub trait ReplicaPort: Send + Sync + 'static {
    /// Gives an order and waits for its answer. Orders are taken in the order in which these futures were first polled.
    fn command(&self, command: Command) -> BoxFuture<'static, Reply>;
    /// The newest status, and every later one.
    fn status(&self) -> watch::Receiver<Arc<ReplicaStatus>>;
    /// What may be served of the log, and every later state of it.
    fn log_view(&self) -> watch::Receiver<Arc<LogView>>;
    /// A reader of the log files, beside the owner. Blocks.
    ///
    /// # Errors
    /// [`Refused::Io`].
    fn open_log(&self) -> Result<Box<dyn LogReader>, Refused>;
    /// The data disk, for reading only, beside the owner. Blocks.
    ///
    /// # Errors
    /// Any I/O error.
    fn open_data(&self) -> io::Result<Arc<dyn DataDisk>>;
}

/// Another member of the resource, as announced by the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// Its replica.
    pub replica: ReplicaId,
    /// Its node; nothing is said to or taken from it before this is known.
    pub node: Option<NodeId>,
    /// `host:port` of its agent; empty until known.
    pub address: String,
}

/// Everything the agent tells about a replica's surroundings. May change at any time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Membership {
    /// Whom to follow.
    pub wish: Wish,
    /// All other members.
    pub peers: Vec<PeerAddress>,
    /// How what we receive may be compressed.
    pub compression: Compression,
    /// Most bytes of log per second; `None`: no limit.
    pub fetch_bytes_per_s: Option<u64>,
    /// Most bytes of a sync per second; `None`: no limit.
    pub sync_bytes_per_s: Option<u64>,
    /// Take the source's data for equal instead of comparing, once per id: a lie that an administrator answers for.
    pub fake_sync: Option<Uuid>,
}

/// See the module.
pub(super) struct Entry {
    pub(super) cluster: ClusterId,
    pub(super) resource: ResourceId,
    pub(super) replica: ReplicaId,
    pub(super) port: Arc<dyn ReplicaPort>,
    pub(super) membership: watch::Receiver<Arc<Membership>>,
    pub(super) book: PeerBook,
    pub(super) clock: Arc<SharedClock>,
    /// After this long without a word a member counts as unreachable.
    pub(super) liveness: Duration,
    /// Whom we follow, as told to others.
    follows: Mutex<Option<Followed>>,
}

impl Entry {
    pub(super) fn new(
        (cluster, resource, replica): (ClusterId, ResourceId, ReplicaId),
        port: Arc<dyn ReplicaPort>,
        membership: watch::Receiver<Arc<Membership>>,
        clock: Arc<SharedClock>,
        liveness: Duration,
    ) -> Self {
        let book = PeerBook::default();
        Self {
            cluster,
            resource,
            replica,
            port,
            membership,
            book,
            clock,
            liveness,
            follows: Mutex::new(None),
        }
    }

    /// The header of a message to `to`.
    pub(super) fn header(&self, to: ReplicaId) -> Header {
        Header {
            version: PROTOCOL_MAX,
            cluster: self.cluster,
            resource: self.resource,
            from: self.replica,
            to,
            lamport: self.clock.now(),
        }
    }

    pub(super) fn now_known(&self) -> Arc<Membership> {
        self.membership.borrow().clone()
    }

    /// Whether this message may be answered: its header fits, its sender is a member, and it comes from the member's node.
    pub(super) fn check(&self, header: &Header, from: PeerIdentity) -> Result<(), Refused> {
        let membership = self.now_known();
        let members: Vec<ReplicaId> = membership.peers.iter().map(|peer| peer.replica).collect();
        check_header(header, &self.header(header.from), &members)?;
        let peer = membership.peers.iter().find(|peer| peer.replica == header.from);
        if peer.and_then(|peer| peer.node) != Some(from.node) {
            let (replica, node) = (header.from, from.node);
            let detail = format!(
                "replica {replica} of resource {} does not live on node {node}",
                self.resource
            );
            return Err(Refused::NotMember { detail });
        }
        self.clock.observe(header.lamport).map_err(|ahead| Refused::ClockAhead {
            ahead_s: ahead.ahead_ns / 1_000_000_000,
        })
    }

    /// What is told to others now.
    pub(super) fn own_status(&self) -> PeerStatus {
        let follows = self.follows.lock().unwrap_or_else(PoisonError::into_inner).clone();
        PeerStatus::of(&self.port.status().borrow(), follows)
    }

    /// The epoch in which our log ends.
    pub(super) fn own_epoch(&self) -> EpochId {
        self.port.status().borrow().durable.epoch
    }

    pub(super) fn set_follows(&self, leader: Option<Followed>) {
        *self.follows.lock().unwrap_or_else(PoisonError::into_inner) = leader;
    }

    /// All other members, as this one sees them now.
    pub(super) fn members(&self) -> Vec<Member> {
        let membership = self.now_known();
        membership
            .peers
            .iter()
            .map(|peer| self.book.member(peer.replica, self.liveness))
            .collect()
    }
}
