//! How two histories relate, seen from the replication side: see [`crate::lineage`], where this is decided.

pub use crate::lineage::{Fork, Relation, prefix, relate};

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::lineage::{Cause, EpochEntry, Lineage};
    use crate::types::{Chain, EpochId, Lamport, Lsn, Position, ReplicaId};
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
