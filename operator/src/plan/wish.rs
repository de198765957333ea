//! What the users want at present: the primary they ask for, and who asks.
//!
//! Invariant: a wish counts once. `spec.primary` counts again only when it differs from what the designation has seen,
//! so a failover is not undone by an old wish; `attachedTo` wins over it while it is set.

use mars_crds::resource::Designation;
use mars_crds::{MarsAction, Verb};
use uuid::Uuid;

use super::{Context, actions};

/// Who asks for a primary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Driver {
    /// `spec.primary`.
    Primary,
    /// `spec.attachedTo`.
    Attached,
    /// A `MarsAction` Handover, by its order id.
    Action(Uuid),
}

/// A wish that counts now. An empty node asks for no primary at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) node: String,
    pub(super) driver: Driver,
}

impl Wish {
    pub(super) fn describe(&self) -> &'static str {
        match self.driver {
            Driver::Primary => "spec.primary asks for it",
            Driver::Attached => "spec.attachedTo asks for it",
            Driver::Action(_) => "a MarsAction Handover asks for it",
        }
    }
}

/// The wish that counts, if there is one.
pub(super) fn counting(context: &Context<'_>) -> Option<Wish> {
    let spec = &context.world.resource.spec;
    if let Some((action, id)) = actions::active(context, Verb::Handover).next() {
        let node = action.spec.node.clone().unwrap_or_default();
        return Some(Wish {
            node,
            driver: Driver::Action(id),
        });
    }
    let seen = context.designation();
    let attached = spec.attached_to.as_deref().unwrap_or_default();
    if !attached.is_empty() {
        let counts = seen.is_none_or(|seen| seen.attached_seen != attached);
        return counts.then(|| Wish {
            node: attached.to_owned(),
            driver: Driver::Attached,
        });
    }
    let counts = seen.map_or(!spec.primary.is_empty(), |seen| seen.wish_seen != spec.primary);
    counts.then(|| Wish {
        node: spec.primary.clone(),
        driver: Driver::Primary,
    })
}

/// What a new designation shall remember as seen: all of it.
pub(super) fn seen_now(context: &Context<'_>) -> (String, String) {
    let spec = &context.world.resource.spec;
    (spec.primary.clone(), spec.attached_to.clone().unwrap_or_default())
}

/// What a designation that satisfies `wish` shall remember: a wish that has not counted yet stays open, so that
/// `spec.primary`, changed while the volume was attached, counts after that.
pub(super) fn seen_by(context: &Context<'_>, wish: &Wish) -> (String, String) {
    let (primary, attached) = seen_now(context);
    let before = context.designation();
    match wish.driver {
        Driver::Primary | Driver::Action(_) => (primary, attached),
        Driver::Attached => (before.map_or(primary, |before| before.wish_seen.clone()), attached),
    }
}

/// What an abort shall remember, so that whoever asked for the handover counts again.
pub(super) fn seen_by_abort(context: &Context<'_>, given_up: &Designation, back_to: &str) -> (String, String) {
    let attached = context.world.resource.spec.attached_to.as_deref().unwrap_or_default();
    if given_up.action.is_some() {
        (given_up.wish_seen.clone(), given_up.attached_seen.clone())
    } else if !attached.is_empty() && attached == given_up.node {
        (given_up.wish_seen.clone(), String::new())
    } else {
        (back_to.to_owned(), given_up.attached_seen.clone())
    }
}

/// Whether the handover that is under way is still wanted.
pub(super) fn still_wants(context: &Context<'_>, designation: &Designation) -> bool {
    if let Some(id) = designation.action {
        let mut known = context
            .world
            .actions
            .iter()
            .filter(|action| actions::id(action) == Some(id));
        return known.any(|action: &MarsAction| !actions::is_finished(action));
    }
    counting(context).is_none_or(|wish| wish.node == designation.node)
}
