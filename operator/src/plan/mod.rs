//! From what is, to what shall be done: pure, total, and the only place where decisions are made.
//!
//! Stages in their order: identity → deletion → actions → designation → members → rollout → status. A stage that records
//! something in the resource ends the pass; the next pass sees the record. Invariants:
//!
//! * A designation number is used once and only grows; it is never below the highest that any agent or grant mentions.
//! * The primary role is granted only from the recorded designation; for a handover only after the predecessor's
//!   release has been recorded, with exactly the released end.
//! * Orders that take the role away are written before the order that gives it.
//! * A world that is not fresh yields no decision, only `Reobserve`.
//! * Nothing is created, deleted or designated because something is absent.

pub(crate) mod actions;
mod designation;
mod intent;
mod losses;
mod members;
mod rollout;
mod status;
mod wish;

pub use intent::{EventNote, Intent, Severity};

use mars_crds::MarsResourceStatus;
use mars_crds::common::DesignationRef;
use mars_crds::resource::Designation;
use mars_crds::validate::{self, Problem};
use std::collections::BTreeMap;
use uuid::Uuid;

use crate::world::{Report, World, reports};

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// What to do, in this order.
    pub intents: Vec<Intent>,
    /// Look again after this time at the latest, also when nothing changes (seconds).
    pub requeue_seconds: i64,
}

/// Why something is as it is; the `reason` of conditions and events.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "each word is its own explanation; the message says the rest")]
pub enum Reason {
    ActionFailed,
    ActionSucceeded,
    CatchingUp,
    Closing,
    Deleting,
    DesignationConflict,
    DeviceInUse,
    DiskTooSmall,
    ForeignReplica,
    HandoverAborted,
    InvalidSpec,
    LeavingPrimary,
    NoPrimaryWished,
    NoSuchResource,
    PeersSilent,
    PredecessorSilent,
    Promoting,
    Readopting,
    ReplicaFault,
    Resizing,
    RpoExceeded,
    SplitBrain,
    SuccessorNotReady,
    Undecodable,
    WaitingForNodes,
}

impl Reason {
    /// The word as conditions carry it.
    #[must_use]
    pub fn word(self) -> String {
        format!("{self:?}")
    }
}

/// A reason with its explanation: cause and next command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Note {
    pub(crate) reason: Reason,
    pub(crate) message: String,
}

/// Everything the stages read.
pub(crate) struct Context<'a> {
    pub(crate) world: &'a World,
    pub(crate) status: MarsResourceStatus,
    pub(crate) reports: Vec<Report>,
    pub(crate) problems: Vec<Problem>,
}

impl<'a> Context<'a> {
    fn new(world: &'a World) -> Self {
        Context {
            status: world.resource.status.clone().unwrap_or_default(),
            reports: reports(world),
            problems: validate::resource(&world.resource, None),
            world,
        }
    }

    pub(crate) fn designation(&self) -> Option<&Designation> {
        self.status.designation.as_ref()
    }

    pub(crate) fn report(&self, replica_uuid: Uuid) -> Option<&Report> {
        self.reports.iter().find(|report| report.replica_uuid == replica_uuid)
    }

    pub(crate) fn report_on(&self, node: &str) -> Option<&Report> {
        let object = self
            .world
            .replica_on(node)
            .and_then(|replica| self.report(replica.spec.replica_uuid));
        object.or_else(|| self.reports.iter().find(|report| report.node == node))
    }

    /// Data of this resource on a node that has no replica object: what would be re-adopted there.
    pub(crate) fn found_on(&self, node: &str) -> Option<&Report> {
        self.reports
            .iter()
            .filter(|report| report.node == node && self.world.replica(report.replica_uuid).is_none())
            .max_by_key(|report| report.designation.map_or(0, |designation| designation.number))
    }

    /// Whether this replica was given up for good.
    pub(crate) fn is_forgotten(&self, replica_uuid: Uuid) -> bool {
        crate::world::tombstones(self.world).contains(&replica_uuid)
    }

    /// The holder of the present designation, as it reports itself.
    pub(crate) fn holder(&self) -> Option<&Report> {
        self.designation()?.replica_uuid.and_then(|uuid| self.report(uuid))
    }

    /// Whether the holder of the present designation has become primary under it.
    pub(crate) fn holder_has_taken_over(&self) -> bool {
        let token = self.designation().map(Designation::token);
        self.holder()
            .is_some_and(|holder| token.is_some_and(|token| holder.holds(token)))
    }

    /// The highest designation that any agent has persisted or any grant mentions.
    pub(crate) fn highest_mentioned(&self) -> Option<DesignationRef> {
        let granted = self
            .world
            .replicas
            .iter()
            .filter_map(|replica| replica.spec.designation);
        let reported = self
            .reports
            .iter()
            .flat_map(|report| [report.designation, report.primary_under])
            .flatten();
        granted.chain(reported).max_by_key(|designation| designation.number)
    }

    /// A number that nobody has seen. After a loss or reset of the record it leaves room for what is out of reach.
    pub(crate) fn next_number(&self) -> i64 {
        let recorded = self.designation().map_or(0, |designation| designation.number);
        match self.highest_mentioned() {
            Some(highest) if highest.number > recorded => highest.number + 1000,
            _ => recorded + 1,
        }
    }
}

/// What the stages write.
#[derive(Default)]
pub(crate) struct Draft {
    pub(crate) intents: Vec<Intent>,
    pub(crate) switching: Option<Note>,
    pub(crate) not_ready: Option<Note>,
    pub(crate) split_brain: Option<Note>,
    pub(crate) degraded: Vec<Note>,
    /// Why an unfinished action waits, by name.
    pub(crate) waiting: BTreeMap<String, String>,
}

impl Draft {
    pub(crate) fn push(&mut self, intent: Intent) {
        self.intents.push(intent);
    }

    pub(crate) fn event(&mut self, severity: Severity, reason: &str, message: impl Into<String>) {
        self.push(Intent::EmitEvent(EventNote {
            severity,
            reason: reason.to_owned(),
            message: message.into(),
        }));
    }

    pub(crate) fn degrade(&mut self, reason: Reason, message: impl Into<String>) {
        self.degraded.push(Note {
            reason,
            message: message.into(),
        });
    }

    /// Whether this pass changes the resource object itself, so that nothing more can be written to it.
    pub(crate) fn has_recorded(&self) -> bool {
        self.intents.iter().any(|intent| {
            matches!(
                intent,
                Intent::AddFinalizer
                    | Intent::RemoveFinalizer
                    | Intent::RecordUuid(_)
                    | Intent::RecordDesignation(_)
                    | Intent::RecordRelease(_)
                    | Intent::RecordWishSeen { .. }
                    | Intent::RecordTombstone(_)
            )
        })
    }
}

impl Draft {
    /// Whether the next pass, not this one, knows enough for conditions: the resource or an action has just been written.
    fn is_interim(&self) -> bool {
        self.has_recorded()
            || self
                .intents
                .iter()
                .any(|intent| matches!(intent, Intent::SetActionStatus { .. }))
    }
}

/// Plans one pass over one resource. `new_id` yields fresh random uuids.
pub fn plan(world: &World, new_id: &mut dyn FnMut() -> Uuid) -> Plan {
    let context = Context::new(world);
    let mut draft = Draft::default();
    stages(&context, &mut draft, new_id);
    let interim = draft.is_interim();
    if !interim {
        actions::explain(&context, &mut draft);
        status::conclude(&context, &mut draft);
    }
    let busy = draft.switching.is_some() || draft.not_ready.is_some();
    let mut intents = draft.intents;
    if !world.fresh && intents.iter().any(Intent::is_decision) {
        intents = vec![Intent::Reobserve];
    }
    let requeue_seconds = match (interim, busy) {
        (true, _) => 1,
        (false, true) => 5,
        (false, false) => 30,
    };
    Plan {
        intents,
        requeue_seconds,
    }
}

fn stages(context: &Context<'_>, draft: &mut Draft, new_id: &mut dyn FnMut() -> Uuid) {
    if !context.world.undecodable.is_empty() {
        let list = context.world.undecodable.join("; ");
        draft.degrade(
            Reason::Undecodable,
            format!("cannot be read, so nothing is decided until it is repaired: {list}; see `kubectl get -o yaml`"),
        );
        return;
    }
    if !context.problems.is_empty() {
        let list = validate::summary(&context.problems);
        draft.degrade(
            Reason::InvalidSpec,
            format!("{list}; correct it with `kubectl edit mars {}`", context.world.name()),
        );
    }
    if !members::identity(context, draft, new_id) {
        return;
    }
    if context.world.resource.metadata.deletion_timestamp.is_some() {
        actions::advance(context, draft, new_id);
        if !draft.is_interim() {
            members::delete_all(context, draft);
        }
        return;
    }
    actions::advance(context, draft, new_id);
    if draft.is_interim() {
        return;
    }
    designation::decide(context, draft, new_id);
    if draft.has_recorded() {
        return;
    }
    if context.problems.is_empty() {
        members::membership(context, draft, new_id);
    }
    rollout::rollout(context, draft);
}
