//! Replication as the reconciler sees it: orders go in, what the members say comes out.
//!
//! Invariant: only newest values travel in either direction, so neither side ever waits for the other; when the reconciler lets go of
//! a membership, everything of it ends.

use super::entry::{Membership, PeerAddress};
use super::follower::{Activity, Follower, ReplicationStatus};
use super::hub::Hub;
use super::port::EnginePort;
use crate::reconcile::context::{self, LocalReplica, Replication};
use crate::reconcile::peers::{FollowOrder, LineEnd, PeerView, PeersNow};
use mars_engine::replication::fetch::Member;
use std::sync::Arc;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};

/// Between two attempts to join while an earlier membership of the same resource is still ending: at first, and later.
const JOIN_PAUSE: std::time::Duration = std::time::Duration::from_millis(100);
const JOIN_PAUSE_LATER: std::time::Duration = std::time::Duration::from_secs(2);
const QUICK_ATTEMPTS: u32 = 100;

/// See the module.
#[derive(Clone)]
pub struct LocalReplication {
    hub: Hub,
    runtime: tokio::runtime::Handle,
}

impl LocalReplication {
    /// Over this hub; must be made within a tokio runtime.
    #[must_use]
    pub fn new(hub: Hub) -> Self {
        Self {
            hub,
            runtime: tokio::runtime::Handle::current(),
        }
    }
}

impl Replication for LocalReplication {
    fn join(&self, replica: LocalReplica, line: LineEnd) -> context::Membership {
        let stop = CancellationToken::new();
        let guard: DropGuard = stop.clone().drop_guard();
        let hub = self.hub.clone();
        self.runtime.spawn(take_part(hub, replica, line, stop));
        Box::new(guard)
    }
}

fn membership_of(order: &FollowOrder) -> Membership {
    let peer = |peer: &crate::reconcile::todo::PeerTodo| PeerAddress {
        replica: peer.replica,
        node: peer.node_id,
        address: peer.address.clone(),
    };
    Membership {
        wish: order.wish.clone(),
        peers: order.peers.iter().map(peer).collect(),
        compression: order.compression,
        fetch_bytes_per_s: order.limits.fetch_bytes_per_second,
        sync_bytes_per_s: order.limits.sync_bytes_per_second,
        fake_sync: order.fake_sync,
    }
}

fn peers_now(status: &ReplicationStatus) -> PeersNow {
    let source = |activity: &Activity| match activity {
        Activity::From(source) => Some(*source),
        Activity::Unknown | Activity::Waiting(_) => None,
    };
    let words = |activity: &Activity| match activity {
        Activity::Waiting(reason) => reason.clone(),
        Activity::Unknown | Activity::From(_) => String::new(),
    };
    let heard_from = status.leader.as_ref().and_then(|leader| {
        let view = status.peers.iter().find(|peer| peer.replica == leader.leader)?;
        Some((leader.durable.lsn, view.last_contact?))
    });
    let peer = |view: &super::book::PeerView| PeerView {
        member: Member {
            replica: view.replica,
            reachable: view.reachable,
            avoid: false,
            status: view.status.clone(),
        },
        taken: view.taken,
        last_contact: view.last_contact,
    };
    let mut waits = words(&status.fetch);
    if let Some(problem) = status.problem.as_ref().filter(|_| source(&status.fetch).is_none()) {
        waits = format!("{waits} ({problem})");
    }
    PeersNow {
        peers: status.peers.iter().map(peer).collect(),
        fetch_source: source(&status.fetch),
        sync_source: source(&status.sync),
        leader_end: heard_from,
        waits,
        fake_synced: status.fake_synced,
    }
}

async fn take_part(hub: Hub, replica: LocalReplica, line: LineEnd, stop: CancellationToken) {
    let LineEnd { mut order, now } = line;
    let (to_follower, membership) = watch::channel(Arc::new(membership_of(&order.borrow_and_update())));
    let Some(follower) = stop.run_until_cancelled(join(&hub, &replica, &membership)).await else {
        return;
    };
    let mut status = follower.status();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            changed = order.changed() => {
                if changed.is_err() {
                    break;
                }
                to_follower.send_replace(Arc::new(membership_of(&order.borrow_and_update())));
            }
            changed = status.changed() => {
                if changed.is_err() {
                    break;
                }
                now.send_replace(Arc::new(peers_now(&status.borrow_and_update())));
            }
        }
    }
    follower.stop().await;
}

/// Joins; waits while an earlier membership of the same resource is still letting go. That one may belong to a replica that was
/// given up and whose device is still in use, so the wait ends only with the membership.
async fn join(hub: &Hub, replica: &LocalReplica, membership: &watch::Receiver<Arc<Membership>>) -> Follower {
    let mut attempt = 0_u32;
    loop {
        let port = Arc::new(EnginePort::new(replica.handle.clone(), replica.store.clone()));
        match hub.join(replica.resource, replica.replica, port, membership.clone()) {
            Ok(follower) => return follower,
            Err(twice) if attempt.is_multiple_of(QUICK_ATTEMPTS) => {
                tracing::info!(name = replica.name, %twice, "waiting to take part");
            }
            Err(_) => {}
        }
        let pause = if attempt < QUICK_ATTEMPTS {
            JOIN_PAUSE
        } else {
            JOIN_PAUSE_LATER
        };
        tokio::time::sleep(pause).await;
        attempt = attempt.saturating_add(1);
    }
}
