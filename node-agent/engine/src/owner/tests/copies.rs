//! A replica that becomes equal to another one: the target side of a copy.

use super::pair::{begin, begin_sync, catch_up, copy, disk, flush, pair, ship};
use super::{DEVICE, designation, for_seeds, ok, primary};
use crate::api::{Cause, Command, DataState, Refusal};
use crate::testing::{Load, Rig};
use crate::types::Lsn;
use rand::Rng;

#[test]
fn a31_sync_under_writes_is_consistent_only_after_replay_has_passed_the_dirty_end() {
    for_seeds(12, |seed| {
        let mut a = primary(seed);
        let mut b = Rig::create(2, seed + 1000, DEVICE);
        ok(a.command(Command::SetMembers(vec![b.params.replica])));
        let mut load = Load::new(DEVICE);
        for _ in 0..60 {
            load.step(&mut a);
            a.step();
        }
        a.run_until(|rig| rig.owner().status().applied.lsn > Lsn::ZERO);
        begin_sync(&a, &mut b);
        let device = usize::try_from(DEVICE).unwrap();
        let part = device / 16;
        for from in (0..device).step_by(part) {
            for _ in 0..8 {
                load.step(&mut a);
                a.step();
            }
            copy(&a, &mut b, from, from + part);
            if b.rng().random_bool(0.3) {
                ship(&a, &mut b, 8 << 10);
            }
            if b.rng().random_bool(0.2) {
                // Killed: it goes on where it was.
                b.kill();
                b.open().unwrap();
                assert_eq!(b.owner().status().sync.unwrap().done_bytes, (from + part) as u64);
                begin_sync(&a, &mut b);
            }
            let refused = b.command(Command::Promote {
                designation: designation(5),
                cause: Cause::Failover,
            });
            assert!(
                matches!(refused, Some(Err(Refusal::Inconsistent { .. }))),
                "{refused:?}"
            );
        }
        let dirty_end = a.owner().status().dirty_end;
        ok(b.command(Command::FinishSync { dirty_end }));
        while b.run_one_job() {}
        let status = b.owner().status();
        assert_eq!(
            status.data == DataState::Consistent,
            status.applied.lsn >= dirty_end.lsn
        );
        for _ in 0..10_000 {
            let status = b.owner().status();
            if status.data == DataState::Consistent {
                assert!(
                    status.applied.lsn >= dirty_end.lsn,
                    "{} is below {dirty_end}",
                    status.applied
                );
                break;
            }
            flush(&mut a);
            ship(&a, &mut b, 2 << 10);
            b.step();
        }
        load.collect(&mut a);
        catch_up(&mut a, &mut b);
        b.settle();
        assert_eq!(b.owner().status().data, DataState::Consistent);
        assert!(disk(&b) == load.newest());
    });
}

#[test]
fn an_invalidated_replica_starts_over_and_its_old_log_is_gone() {
    let (mut a, mut b, mut load) = pair(11);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    ok(b.command(Command::Invalidate));
    let status = b.owner().status();
    assert_eq!(
        (&status.data, status.lineage.0.len(), status.durable.lsn),
        (&DataState::Syncing, 0, Lsn::ZERO)
    );
    b.kill();
    b.open().unwrap();
    assert_eq!(b.owner().status().data, DataState::Syncing);
    begin_sync(&a, &mut b);
    copy(&a, &mut b, 0, usize::try_from(DEVICE).unwrap());
    ok(b.command(Command::FinishSync {
        dirty_end: a.owner().status().dirty_end,
    }));
    catch_up(&mut a, &mut b);
    b.settle();
    a.settle();
    assert_eq!(b.owner().status().data, DataState::Consistent);
    assert!(disk(&a) == disk(&b));
}

#[test]
fn p12_a_copy_that_begins_too_late_does_not_throw_consistent_data_away() {
    let (mut a, mut b, mut load) = pair(5);
    for _ in 0..20 {
        load.step(&mut a);
    }
    flush(&mut a);
    catch_up(&mut a, &mut b);
    let before = b.owner().status().clone();
    assert_eq!(before.data, DataState::Consistent);
    let refused = b.command(begin(&a));
    assert!(matches!(refused, Some(Err(Refusal::Invalid(_)))), "{refused:?}");
    for rig in [&mut a, &mut b] {
        rig.settle();
    }
    let now = b.owner().status();
    assert_eq!((&now.data, now.durable), (&DataState::Consistent, before.durable));
    assert_eq!(disk(&b), disk(&a), "everything is still applied");
}

#[test]
fn a33_a_copy_whose_log_is_gone_at_the_source_starts_anew() {
    let mut a = primary(6);
    let mut b = Rig::create(2, 1006, DEVICE);
    let mut load = Load::new(DEVICE);
    load.write(&mut a, false);
    flush(&mut a);
    begin_sync(&a, &mut b);
    copy(&a, &mut b, 0, 64 << 10);
    let done_bytes = |rig: &Rig| rig.owner().status().sync.unwrap().done_bytes;
    assert_eq!(done_bytes(&b), 64 << 10);
    ok(b.command(begin(&a)));
    assert_eq!(done_bytes(&b), 64 << 10, "it goes on");
    let Command::BeginSync {
        source,
        start,
        lineage,
        size_bytes,
        ..
    } = begin(&a)
    else {
        unreachable!("it begins a copy")
    };
    let log_start = Lsn(b.owner().status().durable.lsn.0 + 1);
    ok(b.command(Command::BeginSync {
        source,
        start,
        lineage,
        size_bytes,
        log_start,
    }));
    assert_eq!(done_bytes(&b), 0, "what would have to be replayed over it is nowhere");
}

#[test]
fn a31_a_death_at_the_very_end_of_a_copy_leaves_nobody_inconsistent_for_ever() {
    let mut ends = 0;
    for steps in 0..60 {
        let mut a = primary(7);
        let mut b = Rig::create(2, 1007, DEVICE);
        ok(a.command(Command::SetMembers(vec![b.params.replica])));
        let mut load = Load::new(DEVICE);
        load.write(&mut a, false);
        flush(&mut a);
        a.settle();
        begin_sync(&a, &mut b);
        load.write(&mut a, false);
        flush(&mut a);
        a.settle();
        catch_up(&mut a, &mut b);
        copy(&a, &mut b, 0, usize::try_from(DEVICE).unwrap());
        let dirty_end = a.owner().status().dirty_end;
        b.order(Command::FinishSync { dirty_end });
        for _ in 0..steps {
            b.step();
        }
        // Nothing is ever written again that could remind it.
        b.kill();
        b.open().unwrap();
        b.settle();
        let status = b.owner().status();
        let was_finished = status.sync.is_none_or(|sync| sync.consistent_at.is_some());
        assert!(
            !was_finished || status.data == DataState::Consistent,
            "after {steps} steps: {:?}, {:?}",
            status.data,
            status.sync
        );
        ends += u32::from(was_finished);
    }
    assert!(ends > 10, "the end of the copy was among them: {ends}");
}
