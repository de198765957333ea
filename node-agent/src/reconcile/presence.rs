//! Whether a replica has a block device here, and who uses it.
//!
//! Invariant: "nobody uses it" is only said after every frontend and the kernel were asked. What could not be found out is
//! [`Presence::Unknown`], and that counts as in use, wherever a device in use holds something up.

use crate::frontend::{Device, DeviceUser, users};
use crate::shard::Runtime;
use mars_engine::types::ReplicaId;
use std::time::{Duration, Instant};
use tracing::warn;

/// How often the frontends are asked for a device that was left, until they answer.
const ASK_AGAIN: Duration = Duration::from_secs(2);

/// The device of a replica on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Every frontend says that there is none.
    Absent,
    /// This agent serves it.
    Served {
        /// Who uses it.
        users: Vec<DeviceUser>,
    },
    /// A former life of the agent left it. Nobody serves it: its users wait.
    LeftBehind {
        /// Who uses it.
        users: Vec<DeviceUser>,
    },
    /// It was given up. Its users get I/O errors until they let go of it; they hold nothing up.
    GivenUp {
        /// Who uses it.
        users: Vec<DeviceUser>,
    },
    /// Not found out yet; counts as in use.
    Unknown {
        /// Why not.
        reason: String,
    },
}

impl Presence {
    /// Who keeps the device from going, in words; `None` when it is proven that nobody does.
    #[must_use]
    pub fn in_use(&self) -> Option<String> {
        match self {
            Presence::Absent | Presence::GivenUp { .. } => None,
            Presence::Served { .. } | Presence::LeftBehind { .. } | Presence::Unknown { .. } => {
                let users = self.users();
                (!users.is_empty()).then(|| users::describe(&users))
            }
        }
    }

    /// Everybody who uses it; while that is not known, somebody who is called so.
    #[must_use]
    pub fn users(&self) -> Vec<DeviceUser> {
        match self {
            Presence::Absent => Vec::new(),
            Presence::Served { users } | Presence::LeftBehind { users } | Presence::GivenUp { users } => users.clone(),
            Presence::Unknown { reason } => vec![DeviceUser::Unknown { reason: reason.clone() }],
        }
    }

    /// Whether a former life of the agent left a device that nobody serves.
    #[must_use]
    pub fn is_left_behind(&self) -> bool {
        matches!(self, Presence::LeftBehind { .. })
    }

    /// Whether this agent serves a device.
    #[must_use]
    pub fn is_served(&self) -> bool {
        matches!(self, Presence::Served { .. })
    }
}

/// Which device there is, without its users.
#[derive(Debug)]
enum Found {
    Unknown { reason: String, asked: Option<Instant> },
    Absent,
    Served(Device),
    LeftBehind(Device),
    GivenUp(Device),
}

/// What one look at the users said, and when.
#[derive(Debug)]
struct Seen {
    device: Device,
    users: Vec<DeviceUser>,
    at: Instant,
}

/// Keeps an eye on the device of one replica, also while its engine does not run.
#[derive(Debug)]
pub(super) struct DeviceWatch {
    replica: ReplicaId,
    found: Found,
    seen: Option<Seen>,
}

impl DeviceWatch {
    /// Nothing is known yet.
    pub(super) fn new(replica: ReplicaId) -> DeviceWatch {
        DeviceWatch {
            replica,
            found: unknown("the frontends have not been asked yet", None),
            seen: None,
        }
    }

    /// Looks: at the device that is `served` here, else for one that was left. The frontends are asked until they have answered,
    /// users are looked for when the last look is older than `age`.
    pub(super) async fn look(&mut self, runtime: &Runtime, served: Option<Device>, age: Duration) {
        match (served, &self.found) {
            (Some(device), _) => self.found = Found::Served(device),
            // Removed by this agent, which waited until it was gone.
            (None, Found::Served(_)) => self.found = Found::Absent,
            (None, Found::Unknown { asked, .. }) => {
                if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN) {
                    self.ask(runtime).await;
                }
            }
            (None, _) => {}
        }
        self.look_for_users(age).await;
    }

    async fn ask(&mut self, runtime: &Runtime) {
        let (runtime, replica) = (runtime.clone(), self.replica);
        let asked = tokio::task::spawn_blocking(move || runtime.frontends().leftover(replica)).await;
        let answer = match asked {
            Ok(answer) => answer.map_err(|error| error.to_string()),
            Err(panic) => Err(format!("looking for it failed: {panic}")),
        };
        self.found = match answer {
            Ok(Some(device)) => Found::LeftBehind(device),
            Ok(None) => Found::Absent,
            Err(reason) => {
                if !matches!(&self.found, Found::Unknown { reason: known, .. } if *known == reason) {
                    warn!(replica = %self.replica, reason, "whether a device is left from before is not known yet");
                }
                unknown(&reason, Some(Instant::now()))
            }
        };
    }

    async fn look_for_users(&mut self, age: Duration) {
        let (Found::Served(device) | Found::LeftBehind(device) | Found::GivenUp(device)) = &self.found else {
            self.seen = None;
            return;
        };
        let device = device.clone();
        let is_same = |seen: &Seen| {
            (seen.device.major, seen.device.minor, seen.device.diskseq) == (device.major, device.minor, device.diskseq)
        };
        if self
            .seen
            .as_ref()
            .is_some_and(|seen| is_same(seen) && seen.at.elapsed() < age)
        {
            return;
        }
        self.seen = self.seen.take().filter(is_same);
        // A look that fails leaves the last answer; without one the users are not known.
        let looked = tokio::task::spawn_blocking(move || {
            // A number that belongs to somebody else by now has users of its own.
            let users = if device.is_there() {
                users::of(&device)
            } else {
                Vec::new()
            };
            (device, users)
        });
        if let Ok((device, users)) = looked.await {
            if users.is_empty() && matches!(self.found, Found::GivenUp(_)) {
                self.found = Found::Absent;
            }
            let at = Instant::now();
            self.seen = Some(Seen { device, users, at });
        }
    }

    /// What is known now.
    pub(super) fn presence(&self) -> Presence {
        let users = || match &self.seen {
            Some(seen) => seen.users.clone(),
            None => vec![DeviceUser::Unknown {
                reason: "looking for its users failed".into(),
            }],
        };
        match &self.found {
            Found::Unknown { reason, .. } => Presence::Unknown { reason: reason.clone() },
            Found::Absent => Presence::Absent,
            Found::Served(_) => Presence::Served { users: users() },
            Found::LeftBehind(_) => Presence::LeftBehind { users: users() },
            Found::GivenUp(_) => Presence::GivenUp { users: users() },
        }
    }

    /// The device that was left, if there is one.
    pub(super) fn left_behind(&self) -> Option<&Device> {
        match &self.found {
            Found::LeftBehind(device) => Some(device),
            _ => None,
        }
    }

    /// Notes that the device that was left has been given up.
    pub(super) fn gave_up(&mut self) {
        if let Found::LeftBehind(device) = std::mem::replace(&mut self.found, Found::Absent) {
            self.found = Found::GivenUp(device);
        }
    }
}

fn unknown(reason: &str, asked: Option<Instant>) -> Found {
    Found::Unknown {
        reason: reason.to_owned(),
        asked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_proven_to_be_unused_is_unused() {
        let users = || vec![DeviceUser::Swap];
        assert_eq!(Presence::Absent.in_use(), None);
        assert_eq!(Presence::GivenUp { users: users() }.in_use(), None);
        for used in [
            Presence::Served { users: users() },
            Presence::LeftBehind { users: users() },
            Presence::Unknown {
                reason: "the keeper is silent".into(),
            },
            DeviceWatch::new(ReplicaId(uuid::Uuid::nil())).presence(),
        ] {
            assert!(used.in_use().is_some(), "{used:?}");
        }
        assert_eq!(Presence::LeftBehind { users: Vec::new() }.in_use(), None);
    }
}
