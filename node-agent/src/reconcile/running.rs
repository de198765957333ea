//! An open replica: what its task holds on to, and what it remembers between two rounds.

use super::context::Membership;
use super::execute::remember;
use super::facts::Done;
use super::lag::{LagMeter, RateMeter};
use super::peers::{FollowOrder, Line, PeersNow};
use super::presence::DeviceWatch;
use super::report::Problem;
use super::superblock::ReplicaDir;
use super::todo::Todo;
use crate::pool::backing::Backing;
use crate::shard::{ReplicaHandle, Runtime};
use mars_engine::api::{ReplicaStatus, Role, Tuning};
use mars_engine::store_fs::FsStore;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::warn;

/// An open replica.
pub(super) struct Running {
    pub(super) dir: ReplicaDir,
    /// The data disk; `None` while it is detached.
    pub(super) backing: Option<Backing>,
    pub(super) store: FsStore,
    pub(super) handle: ReplicaHandle,
    pub(super) done: Done,
    pub(super) tuning: Option<Tuning>,
    pub(super) line: Line,
    pub(super) membership: Membership,
    pub(super) engine: watch::Receiver<Arc<ReplicaStatus>>,
    pub(super) device: DeviceWatch,
    /// Since when the other members are asked.
    pub(super) joined: Instant,
    pub(super) lag: LagMeter,
    pub(super) rates: [RateMeter; 3],
    pub(super) failed: Option<Problem>,
    pub(super) failures: u32,
}

impl Running {
    /// Remembers what was carried out without an answer to a step: the role taken, the copy believed.
    pub(super) fn note(&mut self, status: &ReplicaStatus, peers: &PeersNow) {
        let under = if status.role == Role::Primary {
            Some(status.designation)
        } else {
            self.done.primary_under
        };
        let believed = peers.fake_synced.or(self.done.fake_sync);
        if under == self.done.primary_under && believed == self.done.fake_sync {
            return;
        }
        let noted = remember(self, |done| {
            done.primary_under = under;
            done.fake_sync = believed;
        });
        if let Err(failed) = noted {
            self.failed = Some(failed);
        }
    }

    /// The highest designation number known to anybody here.
    pub(super) fn highest_designation(&self, todo: &Todo) -> u64 {
        let peers = self.line.now.borrow().clone();
        let heard = peers
            .peers
            .iter()
            .filter_map(|view| Some(view.member.status.as_ref()?.designation.number));
        let own = self.engine.borrow().designation.number;
        heard
            .chain([own])
            .chain(todo.grant.designation().map(|ordered| ordered.number))
            .max()
            .unwrap_or(own)
    }

    /// A disk that its administrator has enlarged makes room for the resource to grow.
    pub(super) fn measure_disk(&mut self, name: &str) {
        if let Some(backing) = &mut self.backing
            && let Err(error) = backing.measure()
        {
            warn!(replica = name, disk = %backing.path.display(), %error, "the data disk cannot be measured");
        }
    }

    /// Size of the data disk (bytes), also while it is detached.
    pub(super) fn disk_bytes(&self) -> u64 {
        let detached = self.done.detached.as_ref().map_or(0, |detached| detached.disk_bytes);
        self.backing.as_ref().map_or(detached, |backing| backing.size_bytes)
    }

    /// Leaves the other members and lets the engine save everything.
    pub(super) async fn end(&mut self, name: &str) {
        drop(std::mem::replace(&mut self.membership, Box::new(())));
        if let Err(error) = self.handle.shutdown().await {
            warn!(replica = name, %error, "the engine could not save everything at the end");
        }
    }

    /// Looks for the device, and for its users when the last look is older than `age`.
    pub(super) async fn look(&mut self, runtime: &Runtime, age: Duration) {
        let served = self.handle.device().borrow().clone();
        self.device.look(runtime, served, age).await;
    }

    /// Tells replication what to follow.
    pub(super) fn follow(&self, todo: &Todo, status: &ReplicaStatus, peers: &PeersNow) {
        let heard = peers
            .peers
            .iter()
            .filter_map(|view| Some(view.member.status.as_ref()?.designation));
        let known = heard
            .chain([status.designation])
            .max_by_key(|designation| designation.number)
            .unwrap_or_default();
        let order = FollowOrder::new(todo, known, &self.done);
        self.line.order.send_if_modified(|current| {
            let changed = **current != order;
            if changed {
                *current = Arc::new(order);
            }
            changed
        });
    }
}
