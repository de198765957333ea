//! Histories: which epochs led to a position, and how two histories relate.
//!
//! Invariant: relations are decided from epochs, LSNs and chain hashes only; never from names, clocks or reachability.

use crate::types::{EpochId, Lamport, Position, ReplicaId};
use serde::{Deserialize, Serialize};

/// Why an epoch began. Numbers are on disk and on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum Cause {
    /// The resource was created here.
    Create = 1,
    /// The old primary closed for us.
    Handover = 2,
    /// An acknowledged or fenced take-over.
    Failover = 3,
    /// The log was cut after a crash, or the boot id changed.
    Recovery = 4,
    /// Logging resumed after emergency mode.
    EmergencyExit = 5,
}

impl Cause {
    /// The cause with this number, if this version knows it.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Create,
            2 => Self::Handover,
            3 => Self::Failover,
            4 => Self::Recovery,
            5 => Self::EmergencyExit,
            _ => return None,
        })
    }
}

/// One stay of one replica in the primary role.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochEntry {
    /// Its own identity.
    pub id: EpochId,
    /// Where it continues: the end of the parent epoch. The first epoch has the default position.
    pub parent: Position,
    /// The replica that was primary.
    pub origin: ReplicaId,
    /// Why it began.
    pub cause: Cause,
    /// When it began.
    pub lamport: Lamport,
}

/// All epochs that lead to a position, oldest first; `parent.epoch` of each is the id of the one before.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage(pub Vec<EpochEntry>);
