//! How two histories relate, as far as lineages and positions tell without reading a log.
//!
//! Invariant: decided from epochs, LSNs and chains only. Within one epoch only one replica ever wrote, so two positions of
//! the same epoch lie on one line; that the bytes are equal too is proven by the chain when a fetch opens.

use crate::lineage::Lineage;
use crate::types::{Lamport, Lsn, Position};

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
    let common = ours
        .0
        .0
        .iter()
        .zip(&theirs.0.0)
        .take_while(|(a, b)| a.id == b.id && a.parent == b.parent)
        .count();
    let ours = Branch::beyond(ours.0, ours.1, common);
    let theirs = Branch::beyond(theirs.0, theirs.1, common);
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
    fn beyond(lineage: &Lineage, end: Position, common: usize) -> Self {
        match lineage.0.get(common) {
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
pub(crate) mod tests {
    use super::*;
    use crate::lineage::{Cause, EpochEntry};
    use crate::types::{Chain, EpochId, ReplicaId};
    use uuid::Uuid;

    pub(crate) fn epoch_id(number: u128) -> EpochId {
        EpochId(Uuid::from_u128(number))
    }

    /// A made-up position; the chain depends on epoch and LSN only.
    pub(crate) fn position(epoch: u128, lsn: u64) -> Position {
        let mut chain = [0; 32];
        chain[..8].copy_from_slice(&lsn.to_le_bytes());
        chain[8] = u8::from(lsn != 0);
        Position {
            epoch: epoch_id(epoch),
            lsn: Lsn(lsn),
            chain: Chain(chain),
        }
    }

    /// A lineage from (epoch, parent LSN) pairs; the origin of each epoch is the replica of the same number.
    pub(crate) fn lineage(epochs: &[(u128, u64)]) -> Lineage {
        let mut before = 0;
        let entry = |&(id, lsn): &(u128, u64)| {
            let parent = if before == 0 {
                Position::default()
            } else {
                position(before, lsn)
            };
            before = id;
            EpochEntry {
                id: epoch_id(id),
                parent,
                origin: ReplicaId(Uuid::from_u128(id)),
                cause: Cause::Create,
                lamport: Lamport(u64::try_from(id).unwrap() * 100),
            }
        };
        Lineage(epochs.iter().map(entry).collect())
    }

    fn swapped(relation: Relation) -> Relation {
        match relation {
            Relation::Behind { bytes } => Relation::Ahead { bytes },
            Relation::Ahead { bytes } => Relation::Behind { bytes },
            Relation::Fork(fork) => Relation::Fork(Fork {
                ours_bytes: fork.theirs_bytes,
                theirs_bytes: fork.ours_bytes,
                ..fork
            }),
            same => same,
        }
    }

    #[test]
    fn a20_every_pair_of_short_histories_gets_the_relation_its_writing_implies() {
        let one = lineage(&[(1, 0)]);
        let two = lineage(&[(1, 0), (2, 100)]);
        let three = lineage(&[(1, 0), (3, 80)]);
        let empty = Lineage::default();
        let fork = |at, since, ours_bytes, theirs_bytes| {
            Relation::Fork(Fork {
                at: Lsn(at),
                since: Lamport(since),
                ours_bytes,
                theirs_bytes,
            })
        };
        let start = Position::default();
        let cases = [
            ((&one, position(1, 50)), (&one, position(1, 50)), Relation::Same),
            (
                (&one, position(1, 50)),
                (&one, position(1, 70)),
                Relation::Behind { bytes: 20 },
            ),
            (
                (&one, position(1, 100)),
                (&two, position(2, 100)),
                Relation::Behind { bytes: 0 },
            ),
            (
                (&one, position(1, 90)),
                (&two, position(2, 300)),
                Relation::Behind { bytes: 210 },
            ),
            (
                (&one, position(1, 110)),
                (&two, position(2, 300)),
                fork(100, 200, 10, 200),
            ),
            (
                (&two, position(2, 300)),
                (&three, position(3, 90)),
                fork(80, 200, 220, 10),
            ),
            (
                (&two, position(2, 100)),
                (&three, position(3, 80)),
                fork(80, 200, 20, 0),
            ),
            ((&empty, start), (&one, position(1, 10)), Relation::Behind { bytes: 10 }),
            ((&empty, start), (&empty, start), Relation::Same),
        ];
        for (ours, theirs, expected) in cases {
            assert_eq!(relate(ours, theirs), expected);
            assert_eq!(relate(theirs, ours), swapped(expected));
        }
    }

    #[test]
    fn a39_equal_epoch_and_lsn_with_another_chain_is_never_the_same() {
        let one = lineage(&[(1, 0)]);
        let mut forged = position(1, 50);
        forged.chain.0[31] ^= 1;
        assert_eq!(
            relate((&one, position(1, 50)), (&one, forged)),
            Relation::Differs { at: Lsn(50) }
        );
    }

    #[test]
    fn histories_without_any_common_epoch_fork_at_the_beginning() {
        let (one, other) = (lineage(&[(1, 0)]), lineage(&[(9, 0)]));
        let relation = relate((&one, position(1, 50)), (&other, position(9, 60)));
        assert!(matches!(
            relation,
            Relation::Fork(Fork {
                at: Lsn(0),
                ours_bytes: 50,
                theirs_bytes: 60,
                ..
            })
        ));
    }
}
