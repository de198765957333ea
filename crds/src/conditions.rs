//! Names of conditions and how to set one without losing the time of its last change.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

/// The device can be used, or will be as soon as its primary runs.
pub const READY: &str = "Ready";
/// Every member that shall follow does.
pub const REPLICATING: &str = "Replicating";
/// Every member's data is consistent.
pub const SYNCED: &str = "Synced";
/// Two histories have parted.
pub const SPLIT_BRAIN: &str = "SplitBrain";
/// A member runs without log because its log store is full.
pub const EMERGENCY: &str = "Emergency";
/// The primary role is on its way to another node.
pub const SWITCHING: &str = "Switching";
/// Something needs attention.
pub const DEGRADED: &str = "Degraded";
/// Of a node: its agent has not been heard; the one condition there that the operator writes.
pub const SILENT: &str = "Silent";
/// Of an action: it may be done.
pub const ACCEPTED: &str = "Accepted";
/// Of an action: it is done, or will never be.
pub const COMPLETE: &str = "Complete";

/// The three values of a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truth {
    /// It holds.
    True,
    /// It does not.
    False,
    /// Nobody can say.
    Unknown,
}

impl Truth {
    /// As Kubernetes writes it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Truth::True => "True",
            Truth::False => "False",
            Truth::Unknown => "Unknown",
        }
    }
}

impl From<bool> for Truth {
    fn from(value: bool) -> Self {
        if value { Truth::True } else { Truth::False }
    }
}

/// Sets `type_` in `conditions`; `lastTransitionTime` moves only when the status does. Says whether anything changed.
pub fn set(
    conditions: &mut Vec<Condition>,
    type_: &str,
    truth: Truth,
    reason: &str,
    message: &str,
    generation: Option<i64>,
    now: &Time,
) -> bool {
    let old = conditions.iter().position(|condition| condition.type_ == type_);
    let changed_at = old
        .map(|index| &conditions[index])
        .filter(|condition| condition.status == truth.as_str())
        .map_or_else(|| now.clone(), |condition| condition.last_transition_time.clone());
    let new = Condition {
        type_: type_.to_owned(),
        status: truth.as_str().to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        last_transition_time: changed_at,
    };
    match old {
        Some(index) if conditions[index] == new => false,
        Some(index) => {
            conditions[index] = new;
            true
        }
        None => {
            conditions.push(new);
            true
        }
    }
}

/// Finds a condition.
#[must_use]
pub fn get<'a>(conditions: &'a [Condition], type_: &str) -> Option<&'a Condition> {
    conditions.iter().find(|condition| condition.type_ == type_)
}
