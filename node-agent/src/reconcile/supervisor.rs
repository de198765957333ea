//! All replicas of a node: starts a task for each that is known, and passes on what the source says.
//!
//! Invariants: a replica known from the cache runs before, and without, any word of the API server (A-03); an object that is
//! older than the one acted upon, or that vanishes, changes nothing (P12); one object has one replica: when a new
//! incarnation takes the place of a forgotten one, the old one is quarantined and reports nothing under that name.

use super::context::NodeContext;
use super::object::{InvalidObject, TuningDefaults, to_todo};
use super::replica::{self, Ask, Order, ReplicaControl};
use super::source::Update;
use crate::layout::LayoutError;
use crate::node_status::cached_spec;
use mars_crds::MarsReplica;
use mars_crds::node::Forgotten;
use mars_engine::types::{Designation, ReplicaId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};
use uuid::Uuid;

/// A request to the supervisor.
#[derive(Debug)]
pub enum Request {
    /// An acknowledged failover from the local socket.
    Failover {
        /// Name of the resource.
        resource: String,
        /// Its uuid, as the person gave it.
        acknowledge: Uuid,
        /// Who wants to know.
        answer: oneshot::Sender<Result<Designation, String>>,
    },
    /// The list of replicas given up while this node was away.
    Forgotten(Vec<Forgotten>),
}

/// No replica gets less memory for its overlay (bytes).
const OVERLAY_LEAST_BYTES: u64 = 8 << 20;

/// One replica.
struct Entry {
    object: MarsReplica,
    control: ReplicaControl,
    /// Another replica has the name of this one's object.
    superseded: bool,
}

/// See the module.
pub struct Supervisor {
    node: Arc<NodeContext>,
    tracker: TaskTracker,
    replicas: BTreeMap<ReplicaId, Entry>,
    forgotten: Vec<Forgotten>,
    /// Objects whose deletion was carried out in this life: what a watch still says of them is late.
    ended: BTreeSet<String>,
}

impl Supervisor {
    /// Starts everything that the cache knows.
    ///
    /// # Errors
    /// The cache cannot be read at all.
    pub fn start(node: Arc<NodeContext>, tracker: TaskTracker) -> Result<Supervisor, LayoutError> {
        let (objects, problems) = node.cache.load()?;
        for problem in problems {
            warn!("a cached spec is not used: {problem}; its replica starts when the API server tells it");
        }
        // Before anything is opened: what was given up must not come back to life for a moment.
        let forgotten = cached_spec(&node.layout.node_dir()).forgotten;
        let mut supervisor = Supervisor {
            node,
            tracker,
            replicas: BTreeMap::new(),
            forgotten,
            ended: BTreeSet::new(),
        };
        for object in objects {
            info!(replica = object.metadata.name, "known from the cache");
            supervisor.see(object, false);
        }
        Ok(supervisor)
    }

    /// Follows source and requests until the agent stops.
    pub async fn run(mut self, mut updates: mpsc::Receiver<Update>, mut requests: mpsc::Receiver<Request>) {
        let stop = self.node.stop.clone();
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(update) = updates.recv() => self.update(update),
                Some(request) = requests.recv() => self.request(request),
                else => return,
            }
        }
    }

    fn update(&mut self, update: Update) {
        match update {
            Update::Seen(object) => self.see(*object, true),
            Update::Vanished(name) => {
                info!(
                    replica = name,
                    "its MarsReplica is gone: nothing changes here until a deletion is seen"
                );
            }
            Update::Listed => debug!("the list of replicas has been read"),
            Update::Trouble(trouble) => warn!("{trouble}"),
        }
    }

    /// Takes over an object, unless it is older than the one acted upon.
    fn see(&mut self, object: MarsReplica, from_api: bool) {
        let replica = ReplicaId(object.spec.replica_uuid);
        self.replicas.retain(|_, entry| {
            let ended = entry.control.order.is_closed();
            if ended {
                self.ended.extend(entry.object.metadata.uid.clone());
            }
            !ended
        });
        if object.metadata.uid.as_ref().is_some_and(|uid| self.ended.contains(uid)) {
            debug!(
                replica = object.metadata.name,
                "its deletion was carried out: a late word is ignored"
            );
            return;
        }
        self.supersede(replica, &object, from_api);
        let joins = usize::from(!self.replicas.contains_key(&replica));
        let share = self.share_bytes(self.replicas.len() + joins);
        let todo = to_todo(
            &object,
            TuningDefaults {
                overlay_budget_bytes: share,
                ..self.node.tuning
            },
        );
        let Some(entry) = self.replicas.get_mut(&replica) else {
            return self.begin(replica, object, todo, from_api);
        };
        if is_older(&object, &entry.object) {
            debug!(
                replica = object.metadata.name,
                "an object older than the one acted upon is ignored"
            );
            return;
        }
        entry.control.order.send_modify(|order| match todo {
            Ok(todo) => {
                order.todo = Arc::new(todo);
                order.from_api |= from_api;
                order.invalid = None;
            }
            Err(invalid) => {
                warn!("{invalid}");
                order.invalid = Some(invalid.to_string());
            }
        });
        if entry.control.order.borrow().invalid.is_none() {
            if let Err(error) = self.node.cache.store(&object) {
                warn!(%error, "the spec could not be cached: a restart without the API server would use an older one");
            }
            entry.object = object;
        }
        self.share_memory();
    }

    fn begin(
        &mut self,
        replica: ReplicaId,
        object: MarsReplica,
        todo: Result<super::todo::Todo, InvalidObject>,
        from_api: bool,
    ) {
        let todo = match todo {
            Ok(todo) => todo,
            Err(invalid) => return warn!("{invalid}"),
        };
        // Before anything is made for it: a replica that exists must be known after a restart.
        if let Err(error) = self.node.cache.store(&object) {
            warn!(replica = todo.name, %error, "the spec could not be cached: not started; tried again when it changes or the agent restarts");
            return;
        }
        let superseded = self.has_successor(replica, &object);
        let order = Order {
            todo: Arc::new(todo),
            from_api,
            forgotten: superseded || self.is_forgotten(replica),
            invalid: None,
        };
        let control = replica::start(self.node.clone(), order, &self.tracker);
        if superseded {
            control.reporting.cancel();
        }
        let entry = Entry {
            object,
            control,
            superseded,
        };
        self.replicas.insert(replica, entry);
        self.share_memory();
    }

    /// Replicas whose object's name this one has now are given up: their data is kept, and they say nothing any more.
    fn supersede(&mut self, replica: ReplicaId, object: &MarsReplica, from_api: bool) {
        let forgotten: Vec<Uuid> = self.forgotten.iter().map(|forgotten| forgotten.replica_uuid).collect();
        for (other, entry) in &mut self.replicas {
            let given_up = from_api || forgotten.contains(&other.0);
            let takes_over = *other != replica && succeeds(object, &entry.object, given_up);
            if takes_over && !entry.superseded {
                info!(%other, %replica, name = object.metadata.name, "another replica has taken the place of this one");
                entry.superseded = true;
                entry.control.reporting.cancel();
                entry.control.order.send_modify(|order| order.forgotten = true);
            }
        }
    }

    /// Whether a replica that is already here has the name of this object.
    fn has_successor(&self, replica: ReplicaId, object: &MarsReplica) -> bool {
        let given_up = self.is_forgotten(replica);
        let mut others = self
            .replicas
            .iter()
            .filter(|(other, entry)| **other != replica && !entry.superseded);
        others.any(|(_, entry)| succeeds(&entry.object, object, given_up))
    }

    /// What one of `count` replicas gets of the node's overlay memory (bytes).
    fn share_bytes(&self, count: usize) -> u64 {
        let count = u64::try_from(count).unwrap_or(u64::MAX).max(1);
        (self.node.tuning.overlay_budget_bytes / count).max(OVERLAY_LEAST_BYTES)
    }

    /// Divides the node's overlay memory anew.
    fn share_memory(&self) {
        let share = self.share_bytes(self.replicas.len());
        for entry in self.replicas.values() {
            entry.control.order.send_if_modified(|order| {
                let changed = order.todo.tuning.overlay_budget_bytes != share;
                if changed {
                    let mut todo = (*order.todo).clone();
                    todo.tuning.overlay_budget_bytes = share;
                    order.todo = Arc::new(todo);
                }
                changed
            });
        }
    }

    fn is_forgotten(&self, replica: ReplicaId) -> bool {
        self.forgotten
            .iter()
            .any(|forgotten| forgotten.replica_uuid == replica.0)
    }

    fn request(&mut self, request: Request) {
        match request {
            Request::Failover {
                resource,
                acknowledge,
                answer,
            } => self.failover(&resource, acknowledge, answer),
            Request::Forgotten(forgotten) => {
                self.forgotten = forgotten;
                for (replica, entry) in &self.replicas {
                    let forgotten = entry.superseded || self.is_forgotten(*replica);
                    entry.control.order.send_if_modified(|order| {
                        let changed = order.forgotten != forgotten;
                        order.forgotten = forgotten;
                        changed
                    });
                }
            }
        }
    }

    fn failover(&self, resource: &str, acknowledge: Uuid, answer: oneshot::Sender<Result<Designation, String>>) {
        let mut named = self
            .replicas
            .values()
            .filter(|entry| entry.object.spec.resource == resource && !entry.superseded);
        let found = named.next();
        let refusal = match found {
            None => format!("this node has no replica of a resource {resource:?}"),
            Some(entry) if entry.object.spec.resource_uuid != acknowledge => format!(
                "the acknowledgement does not match: {resource} has uuid {}; look at what would be lost, then repeat with it",
                entry.object.spec.resource_uuid
            ),
            Some(entry) => match entry.control.ask.try_send(Ask::Failover(answer)) {
                Ok(()) => return,
                Err(mpsc::error::TrySendError::Full(ask) | mpsc::error::TrySendError::Closed(ask)) => {
                    let Ask::Failover(answer) = ask;
                    let _ = answer.send(Err("the replica is busy: ask again".into()));
                    return;
                }
            },
        };
        // The asker may have gone.
        let _ = answer.send(Err(refusal));
    }
}

/// Whether `new` took the place of `old`: an object of the same name that was made later; of two made at the same time the one that
/// is not `given_up`.
fn succeeds(new: &MarsReplica, old: &MarsReplica, old_given_up: bool) -> bool {
    let made = |object: &MarsReplica| object.metadata.creation_timestamp.clone();
    let later = match (made(new), made(old)) {
        (Some(new), Some(old)) if new != old => new > old,
        _ => old_given_up,
    };
    new.metadata.name == old.metadata.name && later
}

/// A late word of a watch: a lower generation of the same object, or the deletion of one that was made before it. An earlier object
/// that lives is followed: it came back from a backup.
fn is_older(new: &MarsReplica, known: &MarsReplica) -> bool {
    let (new, known) = (&new.metadata, &known.metadata);
    if new.uid.is_none() || new.uid != known.uid {
        return match (&new.creation_timestamp, &known.creation_timestamp) {
            (Some(made), Some(known)) => new.deletion_timestamp.is_some() && made < known,
            _ => false,
        };
    }
    new.generation < known.generation || (known.deletion_timestamp.is_some() && new.deletion_timestamp.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(uid: &str, generation: i64, made: &str, deleted: bool) -> MarsReplica {
        let mut object = json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica",
            "metadata": {"name": "r.a", "uid": uid, "generation": generation, "creationTimestamp": made},
            "spec": {"resource": "r", "node": "a", "resourceUuid": Uuid::from_u128(1),
                "replicaUuid": Uuid::from_u128(2), "sizeBytes": 1_048_576, "backing": {"pool": "default"}},
        });
        if deleted {
            object["metadata"]["deletionTimestamp"] = json!("2030-01-01T13:00:00Z");
        }
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a62_a_late_word_of_an_object_that_was_deleted_is_not_followed_by_its_successor() {
        let (noon, later) = ("2030-01-01T12:00:00Z", "2030-01-01T14:00:00Z");
        let known = object("second", 1, later, false);
        assert!(is_older(&object("first", 9, noon, true), &known));
        assert!(!is_older(&object("first", 9, noon, false), &known), "a restored backup");
        assert!(!is_older(&known, &object("first", 9, noon, true)));
        assert!(!is_older(&object("second", 2, later, false), &known));
        assert!(is_older(&known, &object("second", 2, later, false)));
        assert!(is_older(&known, &object("second", 1, later, true)));
    }
}
