//! Who may become primary: pure decisions over what a replica knows about itself, and the content of a `Close` record.
//!
//! Invariants: a designation lower than a known one is never followed, and of two with the same number only the known one; a
//! replica that is not consistent is never promoted (P5); after a `Close` to somebody else only a failover reopens.

use crate::api::{DataState, Refusal, Role};
use crate::lineage::Cause;
use crate::types::{Designation, ReplicaId};
use serde::{Deserialize, Serialize};

/// The payload of a `Close` record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Close {
    /// Successor; `None` for a plain demotion.
    pub to: Option<ReplicaId>,
    /// The designation under which it closed.
    pub designation: Designation,
}

impl Close {
    /// The payload.
    ///
    /// # Panics
    /// Never: the structure has string keys and integers only.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a close has string keys and integers only")
    }

    /// Reads a payload; `None` when no version of this program can have written it.
    #[must_use]
    pub fn decode(payload: &[u8]) -> Option<Self> {
        serde_json::from_slice(payload).ok()
    }
}

/// What a replica knows about itself when it is asked to become primary.
#[derive(Debug, Clone, Copy)]
pub struct Standing<'a> {
    /// Itself.
    pub me: ReplicaId,
    /// Its role.
    pub role: Role,
    /// Its data.
    pub data: &'a DataState,
    /// The highest designation it has seen.
    pub known: Designation,
    /// The close that ends its log, if one does.
    pub trailing_close: Option<Close>,
    /// Its log is damaged below what was durable.
    pub log_defect: bool,
    /// It has no epoch: it was never created nor synced.
    pub is_blank: bool,
    /// A sync has begun to overwrite it.
    pub sync_begun: bool,
}

/// Whether `asked` may be followed by a replica that knows `known`.
///
/// # Errors
/// [`Refusal::StaleDesignation`].
pub fn check_designation(known: Designation, asked: Designation) -> Result<(), Refusal> {
    if asked.number > known.number || asked == known {
        Ok(())
    } else {
        Err(Refusal::StaleDesignation {
            asked: asked.number,
            known: known.number,
        })
    }
}

/// Whether a promotion under this designation with this cause may begin.
///
/// # Errors
/// The reason why not.
pub fn may_promote(standing: &Standing<'_>, designation: Designation, cause: Cause) -> Result<(), Refusal> {
    check_designation(standing.known, designation)?;
    if standing.role != Role::Secondary {
        return Err(Refusal::WrongRole {
            role: standing.role,
            hint: "only a secondary is promoted",
        });
    }
    match cause {
        Cause::Create if !standing.is_blank || standing.sync_begun => {
            return Err(Refusal::Invalid(
                "cause Create is for a replica without history; this one has one: use Handover or Failover".into(),
            ));
        }
        Cause::Create => return Ok(()),
        Cause::Handover | Cause::Failover => {}
        Cause::Recovery | Cause::EmergencyExit => {
            return Err(Refusal::Invalid(format!(
                "cause {cause:?} is found by the replica itself, never ordered"
            )));
        }
    }
    if *standing.data != DataState::Consistent {
        return Err(Refusal::Inconsistent {
            data: standing.data.clone(),
        });
    }
    if standing.log_defect && cause != Cause::Failover {
        return Err(Refusal::Invalid(
            "the log is damaged below what was durable: let it be fetched again, or use an acknowledged failover"
                .into(),
        ));
    }
    match standing.trailing_close.and_then(|close| close.to) {
        Some(to) if to != standing.me && cause != Cause::Failover => Err(Refusal::Closed { to }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn designation(number: u64) -> Designation {
        Designation {
            number,
            id: Uuid::from_u128(u128::from(number)),
        }
    }

    fn standing(data: &DataState) -> Standing<'_> {
        Standing {
            me: ReplicaId(Uuid::from_u128(1)),
            role: Role::Secondary,
            data,
            known: designation(5),
            trailing_close: None,
            log_defect: false,
            is_blank: false,
            sync_begun: false,
        }
    }

    #[test]
    fn a_lower_designation_and_a_twin_are_refused() {
        let data = DataState::Consistent;
        let twin = Designation {
            number: 5,
            id: Uuid::from_u128(99),
        };
        for asked in [designation(4), twin] {
            let refusal = may_promote(&standing(&data), asked, Cause::Failover).unwrap_err();
            assert_eq!(
                refusal,
                Refusal::StaleDesignation {
                    asked: asked.number,
                    known: 5
                }
            );
        }
        for asked in [designation(5), designation(6)] {
            may_promote(&standing(&data), asked, Cause::Handover).unwrap();
        }
    }

    #[test]
    fn inconsistent_data_is_never_promoted() {
        for data in [DataState::Syncing, DataState::LogLost] {
            for cause in [Cause::Handover, Cause::Failover] {
                assert!(may_promote(&standing(&data), designation(6), cause).is_err());
            }
        }
        let blank = Standing {
            is_blank: true,
            ..standing(&DataState::Syncing)
        };
        may_promote(&blank, designation(6), Cause::Create).unwrap();
        assert!(
            may_promote(
                &Standing {
                    sync_begun: true,
                    ..blank
                },
                designation(6),
                Cause::Create
            )
            .is_err()
        );
    }

    #[test]
    fn a50_after_a_close_to_somebody_else_only_a_failover_reopens() {
        let data = DataState::Consistent;
        let close = |to: Option<u128>| {
            let close = Close {
                to: to.map(|id| ReplicaId(Uuid::from_u128(id))),
                designation: designation(5),
            };
            assert_eq!(Close::decode(&close.encode()), Some(close));
            Standing {
                trailing_close: Some(close),
                ..standing(&data)
            }
        };
        assert!(may_promote(&close(Some(2)), designation(6), Cause::Handover).is_err());
        may_promote(&close(Some(2)), designation(6), Cause::Failover).unwrap();
        may_promote(&close(Some(1)), designation(6), Cause::Handover).unwrap();
        may_promote(&close(None), designation(6), Cause::Handover).unwrap();
    }
}
