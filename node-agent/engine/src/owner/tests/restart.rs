//! Restarts: what is resumed, what is refused, what is found damaged or missing.

use super::pair::{catch_up, disk, pair};
use super::{DEVICE, come_back, designation, for_seeds, ok, primary};
use crate::api::{Cause, Command, DataState, Fault, Io, IoResult, Refusal, Role};
use crate::owner::OpenError;
use crate::store::{FileId, Store};
use crate::store_sim::Survival;
use crate::testing::{Crash, Load, Rig};
use crate::types::{ByteRange, Lsn, Position, ReplicaId};
use rand::Rng;
use uuid::Uuid;

#[test]
fn a_reboot_begins_a_new_epoch_and_stays_a_reboot_until_the_role_is_decided() {
    let mut rig = primary(1);
    assert_eq!(
        rig.io(Io::Write {
            offset: 0,
            data: &[1; 4096],
            fua: true
        }),
        Some(IoResult::Done)
    );
    rig.power_loss(Survival::OnlySynced);
    for _ in 0..3 {
        // However often the agent restarts in this boot: nobody has said yet that none is newer.
        rig.open().unwrap();
        rig.settle();
        assert!(!rig.owner().status().resumable.unwrap().same_boot);
        rig.kill();
    }
    rig.open().unwrap();
    come_back(&mut rig).unwrap();
    rig.settle();
    let status = rig.owner().status();
    let causes: Vec<Cause> = status.lineage.0.iter().map(|entry| entry.cause).collect();
    assert_eq!(causes, [Cause::Create, Cause::Recovery]);
    rig.kill();
    rig.open().unwrap();
    assert!(rig.owner().status().resumable.unwrap().same_boot);
}

#[test]
fn the_primary_role_is_never_resumed_from_an_older_slot() {
    let mut rig = primary(2);
    rig.settle();
    rig.kill();
    damage_newer_slot(&rig);
    rig.open().unwrap();
    let status = rig.owner().status();
    assert_eq!((status.resumable, status.role), (None, Role::Secondary));
    // Both damaged: refused, and nothing is written.
    rig.kill();
    rig.store.flip_bit(&FileId::Slot(0), 8 * 100);
    rig.store.flip_bit(&FileId::Slot(1), 8 * 100 + 1);
    let before = rig.store.digest();
    assert!(matches!(rig.open(), Err(OpenError::Refused { .. })));
    assert_eq!(rig.store.digest(), before);
}

#[test]
fn a59_missing_slots_log_or_disk_of_another_replica_are_refused_and_nothing_is_created() {
    let gone: [fn(&Rig); 2] = [
        |rig| rig.store.remove(&FileId::Slot(1)).unwrap(),
        |rig| {
            for id in rig
                .store
                .list()
                .unwrap()
                .iter()
                .filter(|id| matches!(id, FileId::Segment(_)))
            {
                rig.store.remove(id).unwrap();
            }
        },
    ];
    for remove in gone {
        let mut rig = primary(3);
        rig.io(Io::Write {
            offset: 0,
            data: &[1; 4096],
            fua: true,
        });
        rig.settle();
        rig.kill();
        remove(&rig);
        let files = rig.store.list().unwrap();
        let error = rig.open().unwrap_err();
        assert!(matches!(error, OpenError::DataMissing { .. }), "{error}");
        assert_eq!(rig.store.list().unwrap(), files, "nothing is created");
        assert!(rig.store.peek(&FileId::Slot(1)).is_none() || rig.store.peek(&FileId::Slot(0)).is_some());
    }
    let mut rig = primary(4);
    rig.settle();
    rig.kill();
    rig.params.replica = ReplicaId(Uuid::from_u128(77));
    assert!(matches!(rig.open(), Err(OpenError::Refused { .. })));
    rig.params.create = Some(DEVICE);
    assert!(
        matches!(rig.open(), Err(OpenError::Refused { .. })),
        "also when it is told to join anew"
    );
}

/// Flips a bit of a durable record of `rig`, in the middle of the log between `applied` and the end.
pub(super) fn damage(rig: &Rig) {
    let name = rig.owner().log_view().segments.last().unwrap().name;
    let image = rig.store.peek(&FileId::Segment(name)).unwrap();
    let used = image.iter().rposition(|byte| *byte != 0).unwrap();
    // Inside a payload, not in the padding behind a batch.
    let run = image[used / 2..used]
        .windows(64)
        .position(|window| window.iter().all(|byte| *byte != 0))
        .unwrap();
    rig.store
        .flip_bit(&FileId::Segment(name), (used / 2 + run + 32) as u64 * 8);
}

#[test]
fn a15_damage_below_the_durable_end_is_named_and_fetched_again() {
    let (mut a, mut b, mut load) = pair(6);
    ok(b.command(Command::SetSwitches(crate::api::Switches {
        replay: false,
        ..Default::default()
    })));
    for _ in 0..20 {
        load.write(&mut a, true);
        a.settle();
    }
    load.collect(&mut a);
    catch_up(&mut a, &mut b);
    b.settle();
    damage(&b);
    b.kill();
    b.open().unwrap();
    let status = b.owner().status();
    assert!(
        matches!(status.faults[..], [Fault::LogDefect { .. }]),
        "{:?}",
        status.faults
    );
    assert_eq!(status.data, DataState::Consistent, "what was applied is whole");
    assert!(status.durable.lsn < a.owner().status().durable.lsn);
    let refused = b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Handover,
    });
    assert!(matches!(refused, Some(Err(Refusal::Invalid(_)))), "{refused:?}");
    // Restarted before it is whole again, at once and after the tail was rewritten over the evidence: still named.
    for _ in 0..2 {
        b.kill();
        b.open().unwrap();
        assert!(matches!(b.owner().status().faults[..], [Fault::LogDefect { .. }]));
        b.settle();
    }
    catch_up(&mut a, &mut b);
    assert!(b.owner().status().faults.is_empty(), "{:?}", b.owner().status().faults);
    ok(b.command(Command::SetSwitches(crate::api::Switches::default())));
    b.settle();
    assert!(disk(&b) == load.newest());
}

#[test]
fn a_log_that_ends_below_the_dirty_end_makes_the_data_inconsistent_until_it_is_there_again() {
    let (mut a, mut b, mut load) = pair(7);
    ok(b.command(Command::SetSwitches(crate::api::Switches {
        replay: false,
        ..Default::default()
    })));
    for _ in 0..12 {
        load.write(&mut a, true);
        a.settle();
    }
    load.collect(&mut a);
    catch_up(&mut a, &mut b);
    // Everything is loaded and announced, nothing of it is written to the end.
    b.hold = |job| matches!(job, crate::jobs::Job::Write { .. });
    ok(b.command(Command::SetSwitches(crate::api::Switches::default())));
    b.settle();
    assert!(b.owner().status().dirty_end.lsn > b.owner().status().applied.lsn);
    damage(&b);
    b.kill();
    b.hold = |_| false;
    b.open().unwrap();
    assert_eq!(b.owner().status().data, DataState::LogLost);
    let refused = b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    });
    assert!(
        matches!(refused, Some(Err(Refusal::Inconsistent { .. }))),
        "{refused:?}"
    );
    b.kill();
    b.open().unwrap();
    assert_eq!(b.owner().status().data, DataState::LogLost);
    let before = b.owner().status().applied.lsn;
    b.settle();
    assert!(b.owner().status().applied.lsn > before, "what is left is applied");
    assert_eq!(
        b.owner().status().data,
        DataState::LogLost,
        "what is left of the log does not lead that far"
    );
    catch_up(&mut a, &mut b);
    b.settle();
    assert_eq!(
        b.owner().status().data,
        DataState::Consistent,
        "replay has passed exactly the dirty end"
    );
    assert!(disk(&b) == load.newest());
}

#[test]
fn a35_a_member_that_stays_away_is_orphaned_over_budget_and_pinned_again_by_a_report() {
    let mut rig = primary(8);
    let away = ReplicaId(Uuid::from_u128(50));
    ok(rig.command(Command::SetMembers(vec![away])));
    let mut load = Load::new(DEVICE);
    let mut write = |rig: &mut Rig, count: usize| {
        for _ in 0..count {
            load.write(rig, false);
            rig.settle();
        }
    };
    write(&mut rig, 60);
    let status = rig.owner().status();
    assert_eq!(status.log_start, Lsn::ZERO, "nothing goes while a member needs it");
    assert!(!status.members[0].orphaned);
    // Beside the segments with content one is prepared.
    let content = |rig: &Rig| rig.owner().log_view().segments.len() as u64 * rig.params.tuning.segment_bytes;
    assert_eq!(status.log_bytes, content(&rig) + rig.params.tuning.segment_bytes);
    let kept = content(&rig);
    let tuning = crate::api::Tuning {
        retention_bytes: kept / 2,
        ..rig.params.tuning
    };
    ok(rig.command(Command::SetTuning(tuning)));
    write(&mut rig, 10);
    let status = rig.owner().status();
    assert!(status.members[0].orphaned && status.log_start > Lsn::ZERO);
    assert!(content(&rig) <= kept / 2 + 128 * 1024, "{} of {kept}", content(&rig));
    let summaries = rig
        .store
        .list()
        .unwrap()
        .iter()
        .filter(|id| matches!(id, FileId::Summary(_)))
        .count();
    assert!(summaries > 0, "what went left its extents");
    // It begins to sync from here: its report holds the log again.
    let here = status.applied;
    ok(rig.command(Command::PeerReport {
        peer: away,
        durable: here,
    }));
    assert!(!rig.owner().status().members[0].orphaned);
    // It has everything: log and summaries go.
    let durable = rig.owner().status().durable;
    ok(rig.command(Command::PeerReport { peer: away, durable }));
    write(&mut rig, 1);
    let summaries = rig
        .store
        .list()
        .unwrap()
        .iter()
        .filter(|id| matches!(id, FileId::Summary(_)))
        .count();
    assert_eq!(summaries, 0);
}

#[test]
fn a_shutdown_leaves_nothing_to_replay_and_the_role_is_resumed() {
    let mut rig = primary(9);
    let mut load = Load::new(DEVICE);
    for _ in 0..40 {
        load.step(&mut rig);
    }
    ok(rig.command(Command::Shutdown));
    load.collect(&mut rig);
    assert!(disk(&rig) == load.newest());
    let refused = rig.command(Command::Rotate);
    assert!(matches!(refused, Some(Err(Refusal::WrongRole { .. }))), "{refused:?}");
    rig.power_loss(Survival::OnlySynced);
    rig.params.boot_id = Uuid::from_u128(100);
    rig.open().unwrap();
    let status = rig.owner().status();
    assert_eq!(status.applied.lsn, status.durable.lsn);
    come_back(&mut rig).unwrap();
    load.judge(&rig.content(), Crash::Process);
}

/// A secondary dies at every I/O while it follows, replays and writes back; it always comes back with all that it told others.
#[test]
fn a14_a_secondary_crashes_at_every_io_and_ends_with_the_primarys_bytes() {
    let follow = |seed: u64, crash: Option<(u64, Survival)>| -> u64 {
        let (mut a, mut b, mut load) = pair(seed);
        let first = b.store.io_count();
        if let Some((io, _)) = crash {
            b.store.crash_at_io(first + io);
        }
        let mut told = b.owner().status().durable;
        for _ in 0..25 {
            load.write(&mut a, false);
            load.step(&mut a);
            a.settle();
            for _ in 0..4 {
                if b.is_up() && b.rng().random_bool(0.6) {
                    super::pair::ship(&a, &mut b, 6 << 10);
                }
                if b.is_up() {
                    b.step();
                    told = if b.is_up() { b.owner().log_view().durable } else { told };
                }
            }
        }
        let ios = b.store.io_count() - first;
        if let Some((_, survival)) = crash {
            b.power_loss(survival);
            b.open().unwrap();
            b.run_until(|rig| rig.pending_jobs() == 0);
            assert!(b.owner().status().durable.lsn >= told.lsn, "told {told}");
        }
        load.collect(&mut a);
        catch_up(&mut a, &mut b);
        b.settle();
        assert_eq!(b.owner().status().data, DataState::Consistent);
        assert!(disk(&b) == load.newest());
        ios
    };
    let total = follow(3, None);
    assert!(total > 100, "only {total} I/Os");
    let survivals = [
        Survival::OnlySynced,
        Survival::Some,
        Survival::Torn,
        Survival::Everything,
    ];
    for io in (0..total).step_by(2) {
        follow(3, Some((io, survivals[usize::try_from(io / 2 % 4).unwrap()])));
    }
}

/// The primary dies at every I/O of a handover. Whatever was told holds; either it is still primary, or the close counts.
#[test]
fn a50_a_crash_at_every_io_of_a_close_leaves_exactly_one_who_may_be_primary() {
    let close = |io: Option<u64>, survival: Survival| -> u64 {
        let (mut a, b, mut load) = pair(13);
        for _ in 0..15 {
            load.write(&mut a, false);
        }
        let first = a.store.io_count();
        if let Some(io) = io {
            a.store.crash_at_io(first + io);
        }
        let order = a.order(Command::Close {
            designation: designation(2),
            to: Some(b.params.replica),
        });
        a.settle_if_up();
        let told = if a.is_up() { a.reply(order) } else { None };
        let ios = a.store.io_count() - first;
        a.power_loss(survival);
        a.open().unwrap();
        a.run_until(|rig| rig.pending_jobs() == 0);
        let status = a.owner().status();
        if told.is_some() {
            assert!(status.released.is_some() && status.resumable.is_none());
        }
        assert!(
            status.released.is_none() || status.resumable.is_none(),
            "released and resumable at once"
        );
        if status.released.is_none() && status.resumable.is_none() {
            // Only an older slot leads here: then nobody is primary until somebody is told to be.
            assert!(matches!(survival, Survival::Torn | Survival::Some), "{status:?}");
        }
        ios
    };
    let total = close(None, Survival::OnlySynced);
    for io in 0..total {
        for survival in [
            Survival::OnlySynced,
            Survival::Some,
            Survival::Torn,
            Survival::Everything,
        ] {
            close(Some(io), survival);
        }
    }
}

#[test]
fn a_sync_target_that_dies_anywhere_never_says_consistent_too_early() {
    for_seeds(40, |seed| {
        let (mut a, mut b, mut load) = pair(seed);
        for _ in 0..20 {
            load.write(&mut a, false);
            a.step();
        }
        let dies = b.store.io_count() + b.rng().random_range(0..80);
        b.store.crash_at_io(dies);
        if b.command(Command::Invalidate).is_some() {
            super::pair::try_sync(&mut a, &mut b);
        }
        b.power_loss([Survival::OnlySynced, Survival::Torn, Survival::Everything][usize::try_from(seed % 3).unwrap()]);
        b.open().unwrap();
        b.run_until(|rig| rig.pending_jobs() == 0);
        let status = b.owner().status();
        if status.data == DataState::Consistent {
            // Not begun, or completed: the disk with the log is a state that the primary had.
            assert!(status.sync.is_none());
        } else {
            super::pair::try_sync(&mut a, &mut b).expect("nothing dies this time");
        }
        load.collect(&mut a);
        catch_up(&mut a, &mut b);
        a.settle();
        b.settle();
        assert_eq!(b.owner().status().data, DataState::Consistent);
        assert!(disk(&b) == disk(&a));
        let range = ByteRange { offset: 0, len: DEVICE };
        assert!(matches!(a.io(Io::Read { range }), Some(IoResult::Data(bytes)) if bytes[..] == load.newest()[..]));
    });
}

#[test]
fn a_promotion_is_on_stable_storage_before_it_is_told() {
    for_seeds(10, |seed| {
        let mut rig = primary(seed);
        rig.power_loss(Survival::OnlySynced);
        rig.open().unwrap();
        let resumable = rig.owner().status().resumable.expect("the role is in the slot");
        assert_eq!(resumable.designation, designation(1));
        come_back(&mut rig).unwrap();
        rig.settle();
        assert_eq!(rig.owner().status().lineage.0[0].cause, Cause::Create);
    });
}

/// The slot that was written last is damaged.
fn damage_newer_slot(rig: &Rig) {
    let generation = |index| {
        let image = rig.store.peek(&FileId::Slot(index)).unwrap();
        u64::from_le_bytes(image[16..24].try_into().unwrap())
    };
    rig.store
        .flip_bit(&FileId::Slot(u8::from(generation(1) > generation(0))), 8 * 100);
}

#[test]
fn an_invalidation_is_in_both_slots_before_anything_is_removed() {
    let (mut a, mut b, mut load) = pair(14);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    b.settle();
    ok(b.command(Command::Invalidate));
    b.kill();
    damage_newer_slot(&b);
    b.open().unwrap();
    assert_eq!(
        b.owner().status().data,
        DataState::Syncing,
        "the older slot says so, too"
    );
}

#[test]
fn a33_a_copy_goes_on_after_a_handover_and_starts_over_after_a_failover() {
    for cause in [Cause::Handover, Cause::Failover] {
        let (mut a, mut b, mut load) = pair(15);
        let mut c = Rig::create(3, 77, DEVICE);
        super::pair::begin_sync(&a, &mut c);
        let half = usize::try_from(DEVICE / 2).unwrap();
        super::pair::copy(&a, &mut c, 0, half);
        for _ in 0..5 {
            load.write(&mut a, true);
            a.settle();
        }
        load.collect(&mut a);
        // What follows was on the disk of A before the last block was read from it.
        super::pair::copy(&a, &mut c, 0, half);
        let was_dirty = a.owner().status().dirty_end;
        if cause == Cause::Handover {
            ok(a.command(Command::Close {
                designation: designation(2),
                to: Some(b.params.replica),
            }));
            catch_up(&mut a, &mut b);
        }
        ok(b.command(Command::Promote {
            designation: designation(2),
            cause,
        }));
        b.settle();
        super::pair::begin_sync(&b, &mut c);
        let sync = c.owner().status().sync.unwrap();
        if cause == Cause::Failover {
            assert_eq!(sync.done_bytes, 0, "blocks copied from A may hold what B never had");
            continue;
        }
        assert_eq!(sync.done_bytes, half as u64, "progress survives a handover");
        super::pair::copy(&b, &mut c, half, 2 * half);
        // Whatever the new source says of its own disk: blocks of the old one hold more.
        ok(c.command(Command::FinishSync {
            dirty_end: Position::default(),
        }));
        let consistent_at = c.owner().status().sync.unwrap().consistent_at.unwrap();
        assert!(
            consistent_at.lsn >= was_dirty.lsn,
            "{consistent_at} is below {was_dirty}"
        );
        catch_up(&mut b, &mut c);
        c.settle();
        assert_eq!(c.owner().status().data, DataState::Consistent);
        assert!(disk(&c) == load.newest());
    }
}

#[test]
fn a_member_that_has_more_than_the_writer_keeps_it_from_resuming() {
    let (mut a, mut b, mut load) = pair(16);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    a.settle();
    let told = b.owner().status().durable;
    a.kill();
    a.open().unwrap();
    let resumable = a.owner().status().resumable.unwrap();
    let more = crate::types::Position {
        lsn: told.lsn.advance(100),
        ..a.owner().status().durable
    };
    ok(a.command(Command::PeerReport {
        peer: b.params.replica,
        durable: more,
    }));
    let status = a.owner().status();
    assert!(matches!(status.faults[..], [Fault::LogDefect { .. }]) && status.resumable.is_none());
    let refused = a.command(Command::Resume {
        designation: resumable.designation,
    });
    assert!(matches!(refused, Some(Err(Refusal::WrongRole { .. }))));
}

#[test]
fn tuning_that_no_engine_can_work_with_is_refused() {
    let mut rig = primary(17);
    for (segment_bytes, overlay_budget_bytes) in [(0, 1 << 20), (65_537, 1 << 20), (1 << 20, 0)] {
        let tuning = crate::api::Tuning {
            overlay_budget_bytes,
            segment_bytes,
            ..rig.params.tuning
        };
        assert!(matches!(
            rig.command(Command::SetTuning(tuning)),
            Some(Err(Refusal::Invalid(_)))
        ));
    }
}

#[test]
fn a_removal_of_segments_of_which_only_part_survived_is_no_gap() {
    let mut rig = primary(18);
    ok(rig.command(Command::SetMembers(vec![ReplicaId(Uuid::from_u128(50))])));
    let mut load = Load::new(DEVICE);
    for _ in 0..2 {
        load.write(&mut rig, true);
        rig.settle();
        load.collect(&mut rig);
        ok(rig.command(Command::Rotate));
    }
    rig.settle();
    let status = rig.owner().status();
    let segments = rig.owner().log_view().segments.clone();
    assert_eq!((segments.len(), segments[2].start.lsn), (3, status.applied.lsn));
    rig.kill();
    // The first two were being removed; the power failed when only the second removal had reached the disk.
    rig.store.remove(&FileId::Segment(segments[1].name)).unwrap();
    rig.store.sync_dir().unwrap();
    rig.open().unwrap();
    assert_eq!(rig.owner().status().data, DataState::Consistent);
    come_back(&mut rig).unwrap();
    load.judge(&rig.content(), Crash::Process);
    rig.settle();
    let left = rig.store.list().unwrap();
    assert!(
        !left.contains(&FileId::Segment(segments[0].name)),
        "what is left of the removal goes: {left:?}"
    );
}
