//! Copying under writes: the target ends in the source's state, moves about the difference, and resumes.

use super::*;
use crate::api::SyncProgress;
use crate::api::{ReplicaStatus, Role};
use crate::replication::digest::tests::MemDisk;
use crate::replication::digest::{block_digests, differing_runs, region_digests};
use crate::replication::fetch::tests::{designation, member, own, replica};
use crate::replication::histories::tests::{lineage, position};
use crate::types::{BLOCK_BYTES, Lsn, Position};
use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SIZE: usize = 40 << 20;

fn wish() -> Wish {
    Wish {
        designation: designation(1),
        designated: Some(replica(1)),
        ..Wish::default()
    }
}

fn syncing(done_bytes: u64, log_from: u64, durable: Position) -> ReplicaStatus {
    let mut status = own(&[(1, 0)], durable);
    status.data = DataState::Syncing;
    status.applied = position(1, log_from);
    status.log_start = Lsn(log_from);
    status.sync = Some(SyncProgress {
        done_bytes,
        total_bytes: 1 << 20,
        moved_bytes: 0,
        consistent_at: None,
    });
    status
}

fn offer(applied: u64, durable: u64) -> SyncOffer {
    SyncOffer {
        session: 1,
        applied: position(1, applied),
        lineage: lineage(&[(1, 0)]),
        durable: position(1, durable),
        log_start: Lsn(0),
        size_bytes: 1 << 20,
    }
}

/// Runs a session to its end (or for `steps` steps) against a source that is overwritten meanwhile; returns payload bytes moved.
struct Copy {
    target: SyncTarget,
    source: MemDisk,
    disk: MemDisk,
    /// What replay will apply afterwards.
    log: Vec<(usize, u8)>,
    moved: u64,
    saved: u64,
    finish: Option<Lsn>,
}

impl Copy {
    fn new(source: Vec<u8>, disk: Vec<u8>, from: u64) -> Self {
        let target = SyncTarget::new(source.len() as u64, from);
        Self {
            target,
            source: MemDisk(source),
            disk: MemDisk(disk),
            log: Vec::new(),
            moved: 0,
            saved: 0,
            finish: None,
        }
    }

    fn write_at_source(&mut self, block: usize, byte: u8) {
        self.source.0[block * 4096..(block + 1) * 4096].fill(byte);
        self.log.push((block, byte));
    }

    fn apply(&mut self, command: Command) {
        let Command::SyncWrite { range, data } = command else {
            panic!("{command:?}")
        };
        let (start, len) = (
            usize::try_from(range.offset).unwrap(),
            usize::try_from(range.len).unwrap(),
        );
        self.moved += data.as_ref().map_or(0, |data| data.len() as u64);
        let data = data.unwrap_or_else(|| Bytes::from(vec![0; len]));
        self.disk.0[start..start + len].copy_from_slice(&data);
    }

    /// Does one step; false when there is none left.
    fn step(&mut self) -> bool {
        let Some(step) = self.target.next_step() else {
            return false;
        };
        match step {
            Step::Compare { task, span } => {
                let remote = region_digests(&self.source, span).unwrap();
                let local = region_digests(&self.disk, span).unwrap();
                self.target.on_digests(task, &remote, &local).unwrap();
            }
            Step::Transfer { task, regions } => {
                for (region, has_data) in regions.clone() {
                    let have = if has_data {
                        block_digests(&self.disk, region).unwrap()
                    } else {
                        Vec::new()
                    };
                    let runs = differing_runs(&self.source, region, &have).unwrap();
                    for command in writes_of(&regions, runs).unwrap() {
                        self.apply(command);
                    }
                }
                self.target.on_done(task);
            }
            Step::Zero { task, range } => {
                self.apply(Command::SyncWrite { range, data: None });
                self.target.on_done(task);
            }
            Step::Checkpoint { done_bytes } => {
                self.saved = done_bytes;
                self.target.on_checkpoint(done_bytes);
            }
            Step::End => {
                let end = SyncEnd {
                    dirty_end: position(1, self.log.len() as u64),
                    size_bytes: self.source.0.len() as u64,
                };
                self.target.on_end(end);
            }
            Step::Finish(Command::FinishSync { dirty_end }) => self.finish = Some(dirty_end.lsn),
            Step::Finish(other) => panic!("{other:?}"),
        }
        true
    }

    fn replay(&mut self) {
        for (block, byte) in std::mem::take(&mut self.log) {
            self.disk.0[block * 4096..(block + 1) * 4096].fill(byte);
        }
    }
}

fn noise(seed: u64) -> Vec<u8> {
    let mut disk = vec![0u8; SIZE];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut disk);
    disk
}

#[test]
fn a32_equal_disks_move_no_payload() {
    let mut copy = Copy::new(noise(1), noise(1), 0);
    while copy.step() {}
    assert_eq!(copy.moved, 0);
    assert_eq!(copy.finish, Some(Lsn(0)));
}

#[test]
fn a32_nearly_equal_disks_move_exactly_the_blocks_that_differ() {
    let mut other = noise(1);
    for block in [3, 64, 65, 9000] {
        other[block * 4096 + 17] ^= 1;
    }
    let mut copy = Copy::new(noise(1), other, 0);
    while copy.step() {}
    assert_eq!(copy.moved, 4 * BLOCK_BYTES);
    assert!(copy.disk.0 == copy.source.0);
}

#[test]
fn a32_a_sparse_source_moves_only_what_it_holds_and_clears_the_rest() {
    let mut sparse = vec![0u8; SIZE];
    sparse[5 << 20] = 1;
    let mut copy = Copy::new(sparse, noise(2), 0);
    while copy.step() {}
    assert_eq!(copy.moved, BLOCK_BYTES);
    assert!(copy.disk.0 == copy.source.0);
    assert!(copy.target.finished());
}

#[test]
fn a32_after_a_restart_only_what_was_not_checkpointed_is_compared_again() {
    let size = 600 << 20;
    let source = vec![7u8; size];
    let mut copy = Copy::new(source, vec![0; size], 0);
    while copy.saved == 0 {
        assert!(copy.step());
    }
    let saved = copy.saved;
    assert!(saved >= CHECKPOINT_BYTES);
    let Copy { source, disk, .. } = copy;
    let mut resumed = Copy::new(source.0, disk.0, saved);
    while resumed.step() {}
    assert!(resumed.moved < size as u64 - saved + MAX_TRANSFERS as u64 * SPAN_BYTES);
    assert!(resumed.disk.0 == resumed.source.0);
}

#[test]
fn a31_copying_under_writes_and_then_replaying_gives_the_sources_state() {
    for seed in 0..8 {
        let mut random = StdRng::seed_from_u64(seed);
        let mut copy = Copy::new(noise(seed), noise(seed / 2), 0);
        loop {
            for _ in 0..random.random_range(0..3) {
                let block = random.random_range(0..SIZE / 4096);
                copy.write_at_source(block, random.random());
            }
            if !copy.step() {
                break;
            }
        }
        assert!(copy.finish.is_some(), "seed {seed}: the session did not end");
        copy.replay();
        assert!(copy.disk.0 == copy.source.0, "seed {seed}: the disks differ");
    }
}

#[test]
fn a31_the_end_is_asked_only_after_the_last_block_is_flushed() {
    let mut target = SyncTarget::new(1 << 20, 0);
    let Some(Step::Compare { task, span }) = target.next_step() else {
        panic!()
    };
    assert!(target.next_step().is_none());
    let remote = vec![RegionDigest::Hash([1; 32]); 4];
    target.on_digests(task, &remote, &[RegionDigest::Zero; 4]).unwrap();
    let Some(Step::Transfer { task, regions }) = target.next_step() else {
        panic!()
    };
    assert_eq!(regions.len(), 4);
    assert_eq!(span.len, 1 << 20);
    assert!(
        target.next_step().is_none(),
        "nothing may follow before the writes are acknowledged"
    );
    target.on_done(task);
    let Some(Step::Checkpoint { done_bytes }) = target.next_step() else {
        panic!()
    };
    assert!(
        target.next_step().is_none(),
        "the end may not be asked before the flush"
    );
    target.on_checkpoint(done_bytes);
    assert!(matches!(target.next_step(), Some(Step::End)));
    assert!(target.next_step().is_none());
}

#[test]
fn a_checkpoint_runs_with_no_write_under_way_and_holds_new_writes_back() {
    let span = usize::try_from(SPAN_BYTES / REGION_BYTES).unwrap();
    let mut target = SyncTarget::new(4 * CHECKPOINT_BYTES, 0);
    let mut transfers = Vec::new();
    let checkpoint = loop {
        match target.next_step() {
            Some(Step::Compare { task, .. }) => {
                let mut remote = vec![RegionDigest::Zero; span];
                remote[0] = RegionDigest::Hash([1; 32]);
                target
                    .on_digests(task, &remote, &vec![RegionDigest::Zero; span])
                    .unwrap();
            }
            Some(Step::Transfer { task, .. }) => transfers.push(task),
            Some(Step::Checkpoint { done_bytes }) => break done_bytes,
            Some(other) => panic!("{other:?}"),
            None => target.on_done(transfers.remove(0)),
        }
    };
    assert!(
        transfers.is_empty(),
        "the checkpoint came beside {} writes",
        transfers.len()
    );
    assert!(checkpoint >= CHECKPOINT_BYTES);
    while let Some(step) = target.next_step() {
        let Step::Compare { task, .. } = step else {
            panic!("{step:?} beside a checkpoint")
        };
        let mut remote = vec![RegionDigest::Zero; span];
        remote[0] = RegionDigest::Hash([1; 32]);
        target
            .on_digests(task, &remote, &vec![RegionDigest::Zero; span])
            .unwrap();
    }
    target.on_checkpoint(checkpoint);
    assert!(matches!(target.next_step(), Some(Step::Transfer { .. })));
}

#[test]
fn a_source_with_the_wrong_number_of_digests_or_foreign_ranges_is_refused() {
    let mut target = SyncTarget::new(1 << 20, 0);
    let Some(Step::Compare { task, .. }) = target.next_step() else {
        panic!()
    };
    assert!(
        target
            .on_digests(task, &[RegionDigest::Zero; 3], &[RegionDigest::Zero; 4])
            .is_err()
    );
    let asked = [(
        ByteRange {
            offset: 262_144,
            len: 262_144,
        },
        true,
    )];
    let run = |offset, len| BlockRun {
        range: ByteRange { offset, len },
        data: None,
    };
    assert!(writes_of(&asked, vec![run(262_144, 4096)]).is_ok());
    assert!(writes_of(&asked, vec![run(0, 4096)]).is_err());
    assert!(writes_of(&asked, vec![run(520_192, 8192)]).is_err());
    let short = BlockRun {
        range: ByteRange {
            offset: 262_144,
            len: 8192,
        },
        data: Some(Bytes::from(vec![1; 4096])),
    };
    assert!(writes_of(&asked, vec![short]).is_err());
}

#[test]
fn a33_a_log_that_can_never_be_continued_is_given_up_before_a_session() {
    let gone = SyncOffer {
        log_start: Lsn(95),
        ..offer(96, 100)
    };
    let command = begin(replica(1), &gone);
    let Command::BeginSync { log_start, .. } = command else {
        panic!("{command:?}")
    };
    assert_eq!(log_start, Lsn(95), "the owner is told");
    // The history given to the owner ends where its log begins, even if the source is already in a later epoch.
    let later = SyncOffer {
        lineage: lineage(&[(1, 0), (2, 95)]),
        durable: position(2, 200),
        ..offer(60, 0)
    };
    let command = begin(replica(1), &later);
    let Command::BeginSync { start, lineage, .. } = command else {
        panic!("{command:?}")
    };
    assert_eq!((start, lineage.0.len()), (position(1, 60), 1));
}

#[test]
fn a32_a_copy_goes_on_where_the_owner_says_and_only_while_one_is_under_way() {
    let mut me = syncing(300 << 10, 50, position(1, 90));
    assert_eq!(resume_point(&me), Some(262_144));
    me.sync.as_mut().unwrap().consistent_at = Some(position(1, 70));
    assert_eq!(resume_point(&me), None);
}

#[test]
fn a33_a_target_copies_from_the_primary_or_a_consistent_member_on_its_history_never_from_another_target() {
    let me = syncing(0, 50, position(1, 90));
    let primary = member(1, Role::Primary, 1, &[(1, 0)], position(1, 100));
    let third = member(3, Role::Secondary, 1, &[(1, 0)], position(1, 100));
    let members = [third.clone(), primary.clone()];
    assert_eq!(sync_need(&me, &wish(), &members, false), SyncNeed::From(replica(1)));
    let mut away = primary.clone();
    away.reachable = false;
    assert_eq!(
        sync_need(&me, &wish(), &[third.clone(), away.clone()], false),
        SyncNeed::From(replica(3))
    );
    let mut target = third.clone();
    target.status.as_mut().unwrap().data = DataState::Syncing;
    assert_eq!(
        sync_need(&me, &wish(), &[target, away.clone()], false),
        SyncNeed::NoSource
    );
    let forked = member(4, Role::Secondary, 1, &[(1, 0), (4, 50)], position(4, 60));
    assert_eq!(sync_need(&me, &wish(), &[forked, away], false), SyncNeed::NoSource);
    let mut paused = me.clone();
    paused.switches.sync = false;
    assert_eq!(sync_need(&paused, &wish(), &members, false), SyncNeed::Paused);
    assert_eq!(
        sync_need(&own(&[(1, 0)], position(1, 5)), &wish(), &members, false),
        SyncNeed::None
    );
    let mut copied = me;
    copied.sync.as_mut().unwrap().consistent_at = Some(position(1, 95));
    assert_eq!(sync_need(&copied, &wish(), &members, false), SyncNeed::None);
    assert_eq!(sync_need(&copied, &wish(), &members, true), SyncNeed::From(replica(1)));
}
