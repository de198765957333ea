//! An open replica: what its task holds on to, and what it remembers between two rounds.

use super::context::Membership;
use super::execute::remember;
use super::facts::Done;
use super::lag::{LagMeter, RateMeter};
use super::peers::{FollowOrder, Line, PeersNow};
use super::report::Problem;
use super::superblock::ReplicaDir;
use super::todo::Todo;
use crate::frontend::{Device, DeviceUser, users};
use crate::pool::backing::Backing;
use crate::shard::ReplicaHandle;
use mars_engine::api::{ReplicaStatus, Role, Tuning};
use mars_engine::store_fs::FsStore;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::warn;

/// How often the frontends are asked for a device that was left, until they answer.
const LEFTOVER_AGAIN: Duration = Duration::from_secs(2);

/// What is known about a device that a former life of the agent left.
#[derive(Debug, Default)]
pub(super) enum LeftoverDevice {
    /// Not asked yet, or no answer.
    #[default]
    Unknown,
    /// None, or it is served.
    None,
    /// There is one.
    Found(Device),
    /// There was one, and somebody still uses it.
    GivenUp(Device),
}

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
    pub(super) users: Vec<DeviceUser>,
    pub(super) users_seen: Option<Instant>,
    pub(super) leftover: LeftoverDevice,
    pub(super) leftover_asked: Option<Instant>,
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

    /// Asks the frontends once whether a former life of the agent left a device; until they have answered, every now and then.
    pub(super) async fn look_for_leftover(&mut self, todo: &Todo) {
        if self.handle.device().borrow().is_some() {
            // Taken over, or made here: nothing else is left.
            self.leftover = LeftoverDevice::None;
        }
        let asked = self.leftover_asked;
        if !matches!(self.leftover, LeftoverDevice::Unknown) || asked.is_some_and(|at| at.elapsed() < LEFTOVER_AGAIN) {
            return;
        }
        self.leftover_asked = Some(Instant::now());
        match self.handle.leftover(todo.replica).await {
            Ok(Some(device)) => self.leftover = LeftoverDevice::Found(device),
            Ok(None) => self.leftover = LeftoverDevice::None,
            Err(error) => {
                warn!(replica = todo.name, %error, "whether a device is left from before is not known yet");
            }
        }
    }

    /// Looks for users of the device, or of the one that is left, when the last look is older than `age`.
    pub(super) async fn refresh_users(&mut self, age: Duration) {
        let served = self.handle.device().borrow().clone();
        let device = served.or_else(|| match &self.leftover {
            LeftoverDevice::Found(device) | LeftoverDevice::GivenUp(device) => Some(device.clone()),
            LeftoverDevice::Unknown | LeftoverDevice::None => None,
        });
        let Some(device) = device else {
            self.users.clear();
            self.users_seen = None;
            return;
        };
        if self.users_seen.is_some_and(|seen| seen.elapsed() < age) {
            return;
        }
        // A panic while looking leaves the last answer, which errs on the side of "in use".
        let look = move || {
            // A number that belongs to somebody else by now has users of its own.
            if device.is_there() {
                users::of(&device)
            } else {
                Vec::new()
            }
        };
        if let Ok(users) = tokio::task::spawn_blocking(look).await {
            self.users = users;
            self.users_seen = Some(Instant::now());
            if self.users.is_empty() && matches!(self.leftover, LeftoverDevice::GivenUp(_)) {
                self.leftover = LeftoverDevice::None;
            }
        }
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
        let order = FollowOrder::new(todo, known);
        self.line.order.send_if_modified(|current| {
            let changed = **current != order;
            if changed {
                *current = Arc::new(order);
            }
            changed
        });
    }
}
