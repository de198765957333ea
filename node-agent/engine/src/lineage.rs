//! Histories: which epochs led to a position, and how two histories relate.
//!
//! Invariant: relations are decided from epochs, LSNs and chain hashes only; never from names, clocks or reachability. Within
//! one epoch only one replica ever wrote, so two positions of the same epoch lie on one line; that the bytes are equal too is
//! proven by the chain when a fetch opens.

use crate::types::{EpochId, Lamport, Lsn, Position, ReplicaId};
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

/// Most epochs that a history remembers: it must fit into a slot. A member that is further behind needs a sync.
pub const MAX_EPOCHS: usize = 512;

impl Lineage {
    /// Adds the epoch that begins now; the oldest are forgotten beyond [`MAX_EPOCHS`].
    pub fn push(&mut self, entry: EpochEntry) {
        self.0.push(entry);
        let over = self.0.len().saturating_sub(MAX_EPOCHS);
        self.0.drain(..over);
    }

    /// Whether each epoch begins in the one before it, and not before that one.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn check(&self) -> Result<(), String> {
        for (before, entry) in self.0.iter().zip(self.0.iter().skip(1)) {
            if entry.parent.epoch != before.id {
                return Err(format!("epoch {} does not continue {}", entry.id, before.id));
            }
            if entry.parent.lsn < before.parent.lsn {
                return Err(format!(
                    "epoch {} begins before {}, which it continues",
                    entry.id, before.id
                ));
            }
        }
        Ok(())
    }
}

/// How our history relates to theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    /// Both end at the same place.
    Same,
    /// Theirs continues ours.
    Behind {
        /// By this much.
        bytes: u64,
    },
    /// Ours continues theirs.
    Ahead {
        /// By this much.
        bytes: u64,
    },
    /// They part.
    Fork(Fork),
    /// Same epoch and LSN, but another chain: one side's log is damaged or forged.
    Differs {
        /// Where.
        at: Lsn,
    },
}

/// Where two histories part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fork {
    /// Last common position.
    pub at: Lsn,
    /// When they parted: start of the first epoch that is not common; zero when unknown.
    pub since: Lamport,
    /// Bytes only we have.
    pub ours_bytes: u64,
    /// Bytes only they have.
    pub theirs_bytes: u64,
}

/// Compares two histories: ours first.
#[must_use]
pub fn relate(ours: (&Lineage, Position), theirs: (&Lineage, Position)) -> Relation {
    let (our_epochs, their_epochs) = align(&ours.0.0, &theirs.0.0);
    let common = our_epochs
        .iter()
        .zip(their_epochs)
        .take_while(|(a, b)| a.id == b.id && a.parent == b.parent)
        .count();
    let ours = Branch::beyond(our_epochs, ours.1, common);
    let theirs = Branch::beyond(their_epochs, theirs.1, common);
    // `left` is where each side leaves the last common epoch; a side with later epochs cannot come back to it.
    let at = ours.left.lsn.min(theirs.left.lsn);
    let fork = || {
        let since = [ours.next_began, theirs.next_began]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_default();
        let (ours_bytes, theirs_bytes) = (ours.end.bytes_since(at), theirs.end.bytes_since(at));
        Relation::Fork(Fork {
            at,
            since,
            ours_bytes,
            theirs_bytes,
        })
    };
    if common > 0 && ours.left.lsn == theirs.left.lsn && ours.left.chain != theirs.left.chain {
        return Relation::Differs { at };
    }
    let bytes = ours.end.0.abs_diff(theirs.end.0);
    match (ours.next_began.is_some(), theirs.next_began.is_some()) {
        (true, true) => fork(),
        (false, true) if ours.left.lsn > theirs.left.lsn => fork(),
        (true, false) if theirs.left.lsn > ours.left.lsn => fork(),
        (false, false) if bytes == 0 => Relation::Same,
        (false, true) => Relation::Behind { bytes },
        (false, false) if ours.end < theirs.end => Relation::Behind { bytes },
        (true | false, false) => Relation::Ahead { bytes },
    }
}

/// Long histories forget their oldest epochs, not all at the same time: both from the first epoch that both may know.
fn align<'a>(ours: &'a [EpochEntry], theirs: &'a [EpochEntry]) -> (&'a [EpochEntry], &'a [EpochEntry]) {
    let begins = |epochs: &[EpochEntry], other: &[EpochEntry]| {
        let first = other.first()?;
        epochs.iter().position(|entry| entry.id == first.id)
    };
    if let Some(at) = begins(ours, theirs) {
        (&ours[at..], theirs)
    } else if let Some(at) = begins(theirs, ours) {
        (ours, &theirs[at..])
    } else {
        (ours, theirs)
    }
}

/// The history up to `at`: the epochs that begin at or before it, its own the last.
#[must_use]
pub fn prefix(lineage: &Lineage, at: Position) -> Lineage {
    let own = lineage.0.iter().position(|entry| entry.id == at.epoch);
    Lineage(lineage.0[..own.map_or(0, |index| index + 1)].to_vec())
}

/// One side, seen from the last common epoch.
struct Branch {
    /// Its position at the end of the last common epoch.
    left: Position,
    /// When its first own epoch began, if it has one.
    next_began: Option<Lamport>,
    /// Its very end.
    end: Lsn,
}

impl Branch {
    fn beyond(epochs: &[EpochEntry], end: Position, common: usize) -> Self {
        match epochs.get(common) {
            Some(next) => Self {
                left: next.parent,
                next_began: Some(next.lamport),
                end: end.lsn,
            },
            None => Self {
                left: end,
                next_began: None,
                end: end.lsn,
            },
        }
    }
}

#[cfg(test)]
mod tests;
