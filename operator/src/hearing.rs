//! How long each node has been silent, by our own clock.
//!
//! Invariant: agents' clocks are not trusted. A node is heard when its `lastSeen` *changes*; what it says counts only the
//! first time we see it, to tell a node that reported a moment ago from one that died long before we started.

use mars_crds::MarsNode;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// First sight of a node whose own stamp is no older than this counts as heard.
const FRESH_AT_FIRST_SIGHT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
struct Heard {
    stamp: Option<String>,
    at: Instant,
    /// How long it had been silent already at `at`.
    silent_before: Duration,
    /// Its stamp has moved since we look: it does not only claim to live.
    moved: bool,
}

/// Signs of life of all nodes.
#[derive(Debug)]
pub struct Hearing {
    started: Instant,
    nodes: Mutex<BTreeMap<String, Heard>>,
}

impl Default for Hearing {
    fn default() -> Self {
        Hearing {
            started: Instant::now(),
            nodes: Mutex::default(),
        }
    }
}

impl Hearing {
    /// Takes note of a `MarsNode` as it has just been seen.
    pub fn note(&self, node: &MarsNode, wall: jiff::Timestamp) {
        let name = node.metadata.name.clone().unwrap_or_default();
        let last_seen = node
            .status
            .as_ref()
            .and_then(|status| status.last_seen.as_ref())
            .map(|time| time.0);
        let stamp = last_seen.map(|time| time.to_string());
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let moved = nodes.contains_key(&name);
        let silent_before = match nodes.get(&name) {
            Some(known) if known.stamp == stamp => return,
            Some(_) => Duration::ZERO,
            None => last_seen.map_or(Duration::MAX / 4, |time| {
                let age = wall.duration_since(time);
                let age = Duration::try_from(age.abs()).unwrap_or(Duration::MAX / 4);
                if age <= FRESH_AT_FIRST_SIGHT {
                    Duration::ZERO
                } else {
                    age
                }
            }),
        };
        nodes.insert(
            name,
            Heard {
                stamp,
                at: Instant::now(),
                silent_before,
                moved,
            },
        );
    }

    /// For how long we have looked without hearing it (seconds): nothing that it says about itself counts.
    pub fn unheard_seconds(&self, node: &str) -> i64 {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let since = nodes.get(node).map_or(self.started, |heard| heard.at);
        i64::try_from(since.elapsed().as_secs()).unwrap_or(i64::MAX)
    }

    /// Whether the node has reported since we look, at whatever time.
    pub fn is_alive(&self, node: &str) -> bool {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(node).is_some_and(|heard| heard.moved)
    }

    /// How long the node has been silent (seconds); for a node never seen, since this process started.
    pub fn silent_seconds(&self, node: &str) -> i64 {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let silent = nodes.get(node).map_or_else(
            || self.started.elapsed(),
            |heard| heard.silent_before.saturating_add(heard.at.elapsed()),
        );
        i64::try_from(silent.as_secs()).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::Hearing;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use mars_crds::{MarsNode, MarsNodeSpec, MarsNodeStatus};

    fn node(seconds: i64) -> MarsNode {
        let mut node = MarsNode::new("a", MarsNodeSpec::default());
        let stamp = jiff::Timestamp::from_second(seconds).expect("in range");
        node.status = Some(MarsNodeStatus {
            last_seen: Some(Time(stamp)),
            ..MarsNodeStatus::default()
        });
        node
    }

    #[test]
    fn a60_a_node_with_a_clock_hours_off_is_heard_as_soon_as_its_stamp_moves() {
        let hearing = Hearing::default();
        let wall = jiff::Timestamp::from_second(1_000_000).expect("in range");
        hearing.note(&node(1_000_000 - 7200), wall);
        assert!(hearing.silent_seconds("a") >= 7200, "died long ago, for all we know");
        assert!(hearing.unheard_seconds("a") < 60, "but we have only begun to look");
        assert!(!hearing.is_alive("a"));
        hearing.note(&node(1_000_000 - 7200), wall);
        assert!(
            hearing.silent_seconds("a") >= 7200,
            "the same stamp again is no sign of life"
        );
        hearing.note(&node(1_000_000 - 7190), wall);
        assert!(
            hearing.silent_seconds("a") < 60,
            "its stamp has moved: it lives, whatever its clock says"
        );
        assert!(hearing.is_alive("a"));
    }

    #[test]
    fn a_node_that_reported_a_moment_before_we_started_is_heard_at_once() {
        let hearing = Hearing::default();
        let wall = jiff::Timestamp::from_second(1_000_000).expect("in range");
        hearing.note(&node(999_995), wall);
        assert!(hearing.silent_seconds("a") < 60);
        assert!(
            hearing.silent_seconds("never-seen") < 60,
            "silence is counted from our start at the earliest"
        );
    }
}
