//! Relations between all pairs of histories of generated trees, against the histories themselves.
//!
//! The model writes real records on real replicas: a replica's history is the list of all its records with their epochs. Two
//! lists have one true relation; `relate` must find it from lineages and end positions alone.

use super::*;
use crate::chain;
use crate::format::record::{RecordHeader, RecordKind};
use crate::types::RECORD_HEADER_BYTES;
use proptest::prelude::*;
use uuid::Uuid;

/// A replica of the model.
#[derive(Debug, Clone, Default)]
struct Replica {
    lineage: Lineage,
    end: Position,
    /// End of every record and beginning of every epoch, in order.
    points: Vec<Position>,
    sequence: u64,
    /// Writes in its last epoch; nobody else does.
    is_primary: bool,
}

impl Replica {
    fn begin_epoch(&mut self, number: u64, cause: Cause) {
        let id = EpochId(Uuid::from_u128(u128::from(number)));
        let entry = EpochEntry {
            id,
            parent: self.end,
            origin: ReplicaId::default(),
            cause,
            lamport: Lamport(number),
        };
        self.lineage.0.push(entry);
        self.end.epoch = id;
        self.sequence = 0;
        self.is_primary = true;
        self.points.push(self.end);
    }

    fn write(&mut self, salt: u64) {
        let header = RecordHeader {
            kind: RecordKind::Discard,
            flags: 0,
            offset: salt * 512,
            len: 512,
            sequence: self.sequence,
            lamport: Lamport(salt),
        };
        self.sequence += 1;
        self.end.lsn = self.end.lsn.advance(RECORD_HEADER_BYTES);
        self.end.chain = chain::advance(self.end.chain, self.end.epoch, &header, &[]);
        self.points.push(self.end);
    }

    /// Follows `source` for up to `steps` points, if its history is a prefix of the source's.
    fn fetch(&mut self, source: &Replica, steps: usize) {
        if !source.points.starts_with(&self.points) {
            return;
        }
        let until = (self.points.len() + steps).min(source.points.len());
        self.cut_of(source, until);
    }

    /// Becomes `source` as it was after `until` points.
    fn cut_of(&mut self, source: &Replica, until: usize) {
        self.points = source.points[..until].to_vec();
        self.end = self.points.last().copied().unwrap_or_default();
        self.lineage = prefix(&source.lineage, self.end);
        self.is_primary = false;
        let of_epoch = self.points.iter().filter(|point| point.epoch == self.end.epoch).count();
        self.sequence = of_epoch.saturating_sub(1) as u64;
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// A replica begins an epoch: handover, failover, recovery or the end of an emergency look the same from here.
    Epoch(usize, u8),
    Write(usize, u8),
    Fetch {
        to: usize,
        from: usize,
        steps: usize,
    },
    /// Recovery after a power cut: the unsynced suffix is gone, and a new epoch begins.
    Cut {
        replica: usize,
        lost: usize,
    },
    /// Resolve or invalidate: the loser takes over the winner's history from its log start.
    Invalidate {
        loser: usize,
        winner: usize,
    },
}

const REPLICAS: usize = 4;

fn step() -> impl Strategy<Value = Step> {
    let replica = 0..REPLICAS;
    prop_oneof![
        2 => (replica.clone(), 2..6_u8).prop_map(|(replica, cause)| Step::Epoch(replica, cause)),
        4 => (replica.clone(), 1..5_u8).prop_map(|(replica, count)| Step::Write(replica, count)),
        4 => (replica.clone(), replica.clone(), 0..8_usize).prop_map(|(to, from, steps)| Step::Fetch { to, from, steps }),
        1 => (replica.clone(), 0..4_usize).prop_map(|(replica, lost)| Step::Cut { replica, lost }),
        1 => (replica.clone(), replica).prop_map(|(loser, winner)| Step::Invalidate { loser, winner }),
    ]
}

fn run(steps: &[Step]) -> Vec<Replica> {
    let mut replicas = vec![Replica::default(); REPLICAS];
    let mut next_epoch = 1;
    replicas[0].begin_epoch(next_epoch, Cause::Create);
    for (salt, step) in steps.iter().enumerate() {
        let salt = salt as u64 + 1;
        match *step {
            Step::Epoch(replica, cause) => {
                next_epoch += 1;
                replicas[replica].begin_epoch(next_epoch, Cause::from_number(cause).unwrap());
            }
            Step::Write(replica, count) => {
                if replicas[replica].is_primary {
                    (0..count).for_each(|_| replicas[replica].write(salt));
                }
            }
            Step::Fetch { to, from, .. } if to == from => {}
            Step::Fetch { to, from, steps } => {
                let source = replicas[from].clone();
                replicas[to].fetch(&source, steps);
            }
            Step::Cut { replica, lost } => {
                let before = replicas[replica].clone();
                // What others have was durable, and is never lost.
                let shared = replicas
                    .iter()
                    .enumerate()
                    .filter(|(index, _)| *index != replica)
                    .map(|(_, other)| {
                        other
                            .points
                            .iter()
                            .zip(&before.points)
                            .take_while(|(theirs, ours)| theirs == ours)
                            .count()
                    })
                    .max()
                    .unwrap();
                let until = before
                    .points
                    .len()
                    .saturating_sub(lost)
                    .max(shared)
                    .max(1)
                    .min(before.points.len());
                if !before.points.is_empty() {
                    replicas[replica].cut_of(&before, until);
                }
                next_epoch += 1;
                replicas[replica].begin_epoch(next_epoch, Cause::Recovery);
            }
            Step::Invalidate { loser, winner } if loser != winner => {
                replicas[loser] = Replica {
                    is_primary: false,
                    ..replicas[winner].clone()
                };
            }
            Step::Invalidate { .. } => {}
        }
    }
    replicas
}

/// The relation as the full histories tell it.
fn truth(ours: &Replica, theirs: &Replica) -> Relation {
    let common = ours
        .points
        .iter()
        .zip(&theirs.points)
        .take_while(|(a, b)| a == b)
        .count();
    let at = common.checked_sub(1).map_or(Lsn::ZERO, |last| ours.points[last].lsn);
    let (ours_bytes, theirs_bytes) = (ours.end.lsn.bytes_since(at), theirs.end.lsn.bytes_since(at));
    match (common == ours.points.len(), common == theirs.points.len()) {
        (true, true) => Relation::Same,
        (true, false) => Relation::Behind { bytes: theirs_bytes },
        (false, true) => Relation::Ahead { bytes: ours_bytes },
        (false, false) => Relation::Fork(Fork {
            at,
            since: Lamport::default(),
            ours_bytes,
            theirs_bytes,
        }),
    }
}

fn without_time(relation: Relation) -> Relation {
    match relation {
        Relation::Fork(fork) => Relation::Fork(Fork {
            since: Lamport::default(),
            ..fork
        }),
        other => other,
    }
}

fn check_all_pairs(steps: &[Step]) {
    let replicas = run(steps);
    for ours in &replicas {
        ours.lineage.check().unwrap();
        for theirs in &replicas {
            let found = without_time(relate((&ours.lineage, ours.end), (&theirs.lineage, theirs.end)));
            assert_eq!(found, truth(ours, theirs), "ours {ours:#?}\ntheirs {theirs:#?}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn a20_relations_in_random_history_trees_are_what_the_histories_say(steps in prop::collection::vec(step(), 0..60)) {
        check_all_pairs(&steps);
    }
}

/// Every sequence of up to five steps from a small alphabet: nothing short is left to chance.
#[test]
fn a20_relations_in_all_small_history_trees_are_what_the_histories_say() {
    let alphabet = [
        Step::Epoch(0, 2),
        Step::Epoch(1, 3),
        Step::Write(0, 1),
        Step::Write(1, 2),
        Step::Fetch {
            to: 1,
            from: 0,
            steps: 2,
        },
        Step::Fetch {
            to: 0,
            from: 1,
            steps: 9,
        },
        Step::Cut { replica: 0, lost: 1 },
        Step::Invalidate { loser: 0, winner: 1 },
    ];
    let count = alphabet.len();
    for code in 0..count.pow(5) {
        let steps: Vec<Step> = (0..5_u32)
            .map(|place| alphabet[code / count.pow(place) % count].clone())
            .collect();
        check_all_pairs(&steps);
    }
}

#[test]
fn a_lineage_with_a_gap_is_named() {
    let mut replica = Replica::default();
    replica.begin_epoch(1, Cause::Create);
    replica.write(1);
    replica.begin_epoch(2, Cause::Handover);
    replica.begin_epoch(3, Cause::Failover);
    assert!(replica.lineage.check().is_ok());
    replica.lineage.0.remove(1);
    assert!(replica.lineage.check().unwrap_err().contains("does not continue"));
}

#[test]
fn a20_a_history_that_forgot_its_oldest_epochs_still_compares() {
    let mut long = Lineage::default();
    let mut at = Position::default();
    for index in 1..=1000_u64 {
        let id = EpochId(uuid::Uuid::from_u128(u128::from(index)));
        let (origin, cause, lamport) = (ReplicaId::default(), Cause::Handover, Lamport(index));
        long.push(EpochEntry {
            id,
            parent: at,
            origin,
            cause,
            lamport,
        });
        at = Position {
            epoch: id,
            lsn: at.lsn.advance(100),
            chain: at.chain,
        };
    }
    assert_eq!(long.0.len(), MAX_EPOCHS);
    let behind = long.0[300].parent;
    let shorter = prefix(&long, behind);
    let older = Lineage(shorter.0[100..].to_vec());
    for theirs in [&shorter, &older] {
        let bytes = at.lsn.bytes_since(behind.lsn);
        assert_eq!(relate((&long, at), (theirs, behind)), Relation::Ahead { bytes });
        assert_eq!(relate((theirs, behind), (&long, at)), Relation::Behind { bytes });
    }
    // Nothing in common any more: never taken for the same history.
    let forgotten = Lineage(vec![EpochEntry {
        id: EpochId(uuid::Uuid::from_u128(3)),
        ..long.0[0].clone()
    }]);
    assert!(matches!(
        relate((&long, at), (&forgotten, forgotten.0[0].parent)),
        Relation::Fork(_)
    ));
}
