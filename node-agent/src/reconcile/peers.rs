//! The line between reconciling and replication: what is wished goes one way, what members say comes back.
//!
//! Invariant: both directions are newest-value channels, so neither side ever waits for the other.

use super::facts::{Done, Evidence, PeerFacts};
use super::report::Contact;
use super::todo::{Grant, GrantCause, Limits, PeerTodo, Todo};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use mars_engine::api::Compression;
use mars_engine::replication::fetch::{Member, Wish};
use mars_engine::types::{Designation, Lsn, ReplicaId};
use std::sync::Arc;
use std::time::SystemTime;
use tokio::sync::watch;
use uuid::Uuid;

/// What replication shall do for one replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FollowOrder {
    /// Whose history to follow, and how far.
    pub wish: Wish,
    /// All other members.
    pub peers: Vec<PeerTodo>,
    /// Rate limits.
    pub limits: Limits,
    /// How transfers may be compressed.
    pub compression: Compression,
    /// Take the source's data for equal instead of comparing; repeated in [`PeersNow`] when done.
    pub fake_sync: Option<Uuid>,
}

impl FollowOrder {
    /// From the spec, the newest designation known (which may come from elsewhere), and what was done of the spec already: an order to
    /// believe a copy counts once, not again for the next copy in a later life of the agent.
    #[must_use]
    pub fn new(todo: &Todo, known: Designation, done: &Done) -> FollowOrder {
        let ordered = todo
            .grant
            .designation()
            .filter(|ordered| ordered.number >= known.number);
        let mut wish = Wish {
            designation: ordered.unwrap_or(known),
            ..Wish::default()
        };
        // What the spec says about roles counts only while it is the newest word.
        if ordered.is_some() {
            wish.designated = todo.designated.replica;
            wish.predecessor = todo.designated.predecessor;
            wish.handover = wish.predecessor.is_some();
            wish.epoch = todo.designated.epoch;
            match todo.grant {
                Grant::Primary { cause, .. } => {
                    wish.designated = Some(todo.replica);
                    if let GrantCause::Handover { end } = cause {
                        wish.handover = true;
                        wish.handover_end = end;
                    }
                }
                Grant::Secondary {
                    close_for: Some(to), ..
                } => {
                    wish.designated = to;
                    wish.handover = true;
                }
                Grant::Secondary { close_for: None, .. } => {}
            }
        }
        FollowOrder {
            wish,
            peers: todo.peers.clone(),
            limits: todo.limits,
            compression: todo.tuning.compression,
            fake_sync: done.open(todo.one_shots).fake_sync,
        }
    }
}

/// A member as replication knows it.
#[derive(Debug, Clone)]
pub struct PeerView {
    /// What the engine's decisions look at.
    pub member: Member,
    /// The engine has drawn its conclusions from what the member has durably.
    pub taken: bool,
    /// When it last answered in this life of the agent.
    pub last_contact: Option<SystemTime>,
}

/// What replication knows about one replica's surroundings.
#[derive(Debug, Clone, Default)]
pub struct PeersNow {
    /// All other members.
    pub peers: Vec<PeerView>,
    /// From whom log is being fetched.
    pub fetch_source: Option<ReplicaId>,
    /// From whom data is being copied.
    pub sync_source: Option<ReplicaId>,
    /// Durable end of the history that is followed, as far as heard, and when.
    pub leader_end: Option<(Lsn, SystemTime)>,
    /// Why nothing is fetched or copied, in words; empty when something is, or nothing needs to be.
    pub waits: String,
    /// The last `fakeSync` that was carried out.
    pub fake_synced: Option<Uuid>,
}

/// The reconciler's end of the line.
#[derive(Debug)]
pub struct Line {
    /// To replication.
    pub order: watch::Sender<Arc<FollowOrder>>,
    /// From replication.
    pub now: watch::Receiver<Arc<PeersNow>>,
}

/// Replication's end of the line.
#[derive(Debug)]
pub struct LineEnd {
    /// From the reconciler.
    pub order: watch::Receiver<Arc<FollowOrder>>,
    /// To the reconciler.
    pub now: watch::Sender<Arc<PeersNow>>,
}

/// Makes a line.
#[must_use]
pub fn line(order: FollowOrder) -> (Line, LineEnd) {
    let (order_to, order_from) = watch::channel(Arc::new(order));
    let (now_to, now_from) = watch::channel(Arc::new(PeersNow::default()));
    (
        Line {
            order: order_to,
            now: now_from,
        },
        LineEnd {
            order: order_from,
            now: now_to,
        },
    )
}

fn node_of(todo: &Todo, replica: ReplicaId) -> String {
    let peer = todo.peers.iter().find(|peer| peer.replica == replica);
    peer.map_or_else(|| replica.to_string(), |peer| peer.node.clone())
}

/// What the plan wants to know of the members.
#[must_use]
pub fn peer_facts(todo: &Todo, now: &PeersNow) -> Vec<PeerFacts> {
    let facts = |view: &PeerView| PeerFacts {
        replica: view.member.replica,
        node: node_of(todo, view.member.replica),
        designation: view.member.status.as_ref().map(|status| status.designation),
        role: view.member.status.as_ref().map(|status| status.role),
        answers: view.member.reachable,
        durable_time: view.member.status.as_ref().map(|status| status.durable_time),
    };
    now.peers.iter().map(facts).collect()
}

/// Which members have not said anything yet. One whose words the engine has not weighed yet has not: it may prove that log is lost.
#[must_use]
pub fn evidence(todo: &Todo, now: &PeersNow, from_api: bool, asked_long_enough: bool) -> Evidence {
    let answered = |replica: ReplicaId| {
        now.peers
            .iter()
            .any(|view| view.member.replica == replica && view.member.status.is_some() && view.taken)
    };
    let silent = todo.peers.iter().filter(|peer| !answered(peer.replica));
    Evidence {
        from_api,
        unanswered: silent.map(|peer| peer.node.clone()).collect(),
        asked_long_enough,
    }
}

/// Contacts for the report.
#[must_use]
pub fn contacts(todo: &Todo, now: &PeersNow) -> Vec<Contact> {
    let contact = |peer: &PeerTodo| {
        let view = now.peers.iter().find(|view| view.member.replica == peer.replica);
        Contact {
            replica: peer.replica,
            node: peer.node.clone(),
            connected: view.is_some_and(|view| view.member.reachable),
            last_contact: view
                .and_then(|view| view.last_contact)
                .and_then(|at| jiff::Timestamp::try_from(at).ok())
                .map(Time),
        }
    };
    todo.peers.iter().map(contact).collect()
}

#[cfg(test)]
mod tests {
    use super::super::object::{TuningDefaults, to_todo};
    use super::*;
    use serde_json::json;

    fn todo(more: &serde_json::Value) -> Todo {
        let mut object = json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica", "metadata": {"name": "r.c"},
            "spec": {
                "resource": "r", "node": "c", "resourceUuid": Uuid::from_u128(1), "replicaUuid": Uuid::from_u128(13),
                "sizeBytes": 1_048_576, "backing": {"pool": "default"},
                "designation": {"number": 7, "uuid": Uuid::from_u128(7)},
            },
        });
        for (field, value) in more.as_object().unwrap() {
            object["spec"][field] = value.clone();
        }
        let defaults = TuningDefaults {
            overlay_budget_bytes: 1,
            segment_bytes: 1,
        };
        to_todo(&serde_json::from_value(object).unwrap(), defaults).unwrap()
    }

    fn designation(number: u64) -> Designation {
        Designation {
            number,
            id: Uuid::from_u128(u128::from(number)),
        }
    }

    #[test]
    fn a50_a_third_member_is_told_of_predecessor_and_epoch_only_while_the_spec_is_the_newest_word() {
        let [a, b] = [11, 12].map(|number| ReplicaId(Uuid::from_u128(number)));
        let told = todo(&json!({"designated": {"replicaUuid": b.0, "predecessor": a.0, "epoch": Uuid::from_u128(5)}}));
        let wish = FollowOrder::new(&told, designation(6), &Done::default()).wish;
        assert_eq!(
            (wish.designated, wish.predecessor, wish.handover),
            (Some(b), Some(a), true)
        );
        assert_eq!(wish.epoch.map(|epoch| epoch.0), Some(Uuid::from_u128(5)));
        // Somebody knows a newer designation: what this spec says of the roles does not count any more.
        let wish = FollowOrder::new(&told, designation(8), &Done::default()).wish;
        let nothing = Wish {
            designation: designation(8),
            ..Wish::default()
        };
        assert_eq!(wish, nothing);
        // The handover is over.
        let settled = todo(&json!({"designated": {"replicaUuid": b.0}}));
        let wish = FollowOrder::new(&settled, designation(7), &Done::default()).wish;
        assert_eq!(
            (wish.designated, wish.predecessor, wish.handover),
            (Some(b), None, false)
        );
    }

    #[test]
    fn a32_an_order_to_believe_a_copy_is_not_followed_again_by_a_later_life_of_the_agent() {
        let id = Uuid::from_u128(20);
        let told = todo(&json!({"fakeSync": {"id": id}}));
        let order = |done: &Done| FollowOrder::new(&told, designation(6), done).fake_sync;
        let mut done = Done::default();
        assert_eq!(order(&done), Some(id));
        done.fake_sync = Some(id);
        assert_eq!(order(&done), None, "the next copy is a real one");
        let before = done.clone();
        done.fake_sync = Some(Uuid::from_u128(21));
        done.keep_earlier(&before);
        assert_eq!(order(&done), None, "also when the order comes back from a backup");
    }
}
