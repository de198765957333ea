//! What `plan` wants done, as data. `apply` carries intents out in their order and stops at the first conflict.
//!
//! Invariant: an intent names the object it is about and carries everything needed, so that it can be compared in
//! tests; whoever applies it adds the resourceVersion of the world it was planned from.

use mars_crds::common::HistoryPosition;
use mars_crds::resource::{Designation, Tombstone};
use mars_crds::{ActualRole, MarsActionStatus, MarsReplicaSpec, MarsResourceStatus, WishRole};
use std::fmt;
use uuid::Uuid;

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Intent {
    /// Plan again from a fresh world: what follows is a decision.
    Reobserve,
    /// Keep the resource object until its replicas are gone.
    AddFinalizer,
    /// Its replicas are gone.
    RemoveFinalizer,
    /// The resource gets its identity.
    RecordUuid(Uuid),
    /// A new designation, by compare-and-swap on the resource.
    RecordDesignation(Box<Designation>),
    /// The predecessor has closed; its end goes into the present designation, by compare-and-swap on the resource.
    RecordRelease(HistoryPosition),
    /// The wish has counted; the present designation satisfies it already. Compare-and-swap on the resource.
    RecordWishSeen {
        /// `spec.primary`.
        primary: String,
        /// `spec.attachedTo`.
        attached: String,
    },
    /// A replica of a lost node is given up. Compare-and-swap on the resource.
    RecordTombstone(Tombstone),
    /// A new replica object.
    CreateReplica(Box<MarsReplicaSpec>),
    /// New orders for a replica, by compare-and-swap on the replica.
    PatchReplica(Box<MarsReplicaSpec>),
    /// The agent shall give the replica up.
    DeleteReplica {
        /// Which.
        node: String,
    },
    /// The lost agent will not remove its finalizer: do it for it.
    ReleaseReplica {
        /// Which.
        node: String,
    },
    /// Tells a node that one of its replicas was given up.
    Forget {
        /// Node.
        node: String,
        /// Incarnation.
        replica_uuid: Uuid,
    },
    /// Progress of an action, by compare-and-swap on the action.
    SetActionStatus {
        /// Name of the action.
        action: String,
        /// New status.
        status: Box<MarsActionStatus>,
    },
    /// A finished action whose time is over.
    DeleteAction {
        /// Name of the action.
        action: String,
    },
    /// Conditions and summary, by compare-and-swap on the resource.
    SetStatus(Box<MarsResourceStatus>),
    /// Tells people why.
    EmitEvent(EventNote),
}

/// Whether an event is news or a warning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// Information.
    Normal,
    /// Needs attention.
    Warning,
}

/// Text of a Kubernetes Event on the resource.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventNote {
    /// News or warning.
    pub severity: Severity,
    /// `CamelCase` word.
    pub reason: String,
    /// Cause and, where there is one, the next command.
    pub message: String,
}

impl Intent {
    /// Whether this needs a fresh world: everything but words.
    #[must_use]
    pub fn is_decision(&self) -> bool {
        !matches!(self, Intent::Reobserve | Intent::SetStatus(_) | Intent::EmitEvent(_))
    }
}

impl fmt::Display for Intent {
    /// One line per intent, stable, for logs and tests.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Intent::Reobserve => f.write_str("Reobserve"),
            Intent::AddFinalizer => f.write_str("AddFinalizer"),
            Intent::RemoveFinalizer => f.write_str("RemoveFinalizer"),
            Intent::RecordUuid(_) => f.write_str("RecordUuid"),
            Intent::RecordDesignation(designation) => {
                let node = if designation.node.is_empty() {
                    "-"
                } else {
                    &designation.node
                };
                write!(
                    f,
                    "RecordDesignation {} {node} {:?}",
                    designation.number, designation.source
                )
            }
            Intent::RecordRelease(end) => write!(f, "RecordRelease {}", end.lsn),
            Intent::RecordWishSeen { primary, attached } => write!(f, "RecordWishSeen {primary:?} {attached:?}"),
            Intent::RecordTombstone(stone) => write!(f, "RecordTombstone {}", stone.node),
            Intent::CreateReplica(spec) => write!(f, "CreateReplica {}", order(spec)),
            Intent::PatchReplica(spec) => write!(f, "PatchReplica {}", order(spec)),
            Intent::DeleteReplica { node } => write!(f, "DeleteReplica {node}"),
            Intent::ReleaseReplica { node } => write!(f, "ReleaseReplica {node}"),
            Intent::Forget { node, .. } => write!(f, "Forget {node}"),
            Intent::SetActionStatus { action, status } => {
                write!(f, "SetActionStatus {action} {:?}", status.phase)?;
                status
                    .designation_number
                    .map_or(Ok(()), |number| write!(f, " designation={number}"))
            }
            Intent::DeleteAction { action } => write!(f, "DeleteAction {action}"),
            Intent::SetStatus(status) => write!(f, "SetStatus {}", status.state),
            Intent::EmitEvent(note) => write!(f, "EmitEvent {:?} {}", note.severity, note.reason),
        }
    }
}

fn order(spec: &MarsReplicaSpec) -> String {
    let number = spec
        .designation
        .map_or_else(|| "-".to_owned(), |designation| designation.number.to_string());
    let mut words = vec![spec.node.clone(), format!("{:?}", spec.role), number];
    if let (WishRole::Primary, Some(cause)) = (spec.role, spec.cause) {
        words.push(format!("{cause:?}"));
    }
    words.extend(spec.handover_end.as_ref().map(|end| format!("end={}", end.lsn)));
    let flags = [
        ("close", spec.close_for.is_some()),
        ("established", spec.established),
        ("invalidate", spec.invalidate.is_some()),
        ("fakeSync", spec.fake_sync.is_some()),
        ("rotateLog", spec.rotate_log.is_some()),
    ];
    words.extend(flags.iter().filter(|(_, set)| *set).map(|(name, _)| (*name).to_owned()));
    words.join(" ")
}

/// A role in a word.
#[must_use]
pub(super) fn role_word(role: Option<ActualRole>) -> &'static str {
    match role {
        None => "unknown",
        Some(ActualRole::Secondary) => "secondary",
        Some(ActualRole::Promoting) => "promoting",
        Some(ActualRole::Primary) => "primary",
        Some(ActualRole::Closing) => "closing",
    }
}
