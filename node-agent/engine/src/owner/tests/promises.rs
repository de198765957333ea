//! Sequences in which a promise was once broken: found by reading, kept so that they stay mended.
//!
//! Invariant of each: the state that is told is true on stable storage, whatever happened before.

use super::pair::{begin_sync, catch_up, copy, disk, pair};
use super::restart::damage;
use super::{DEVICE, designation, ok, primary};
use crate::api::{Cause, Command, DataState, Durability, Io, IoResult, Refusal, Role, Switches};
use crate::jobs::Job;
use crate::replication::fetch::{Decision, Member, Wish, decide};
use crate::replication::messages::PeerStatus;
use crate::replication::sync::{SyncNeed, sync_need};
use crate::store::FileId;
use crate::store_sim::{Injected, Op, Survival};
use crate::testing::Rig;
use crate::types::ByteRange;
use bytes::Bytes;

/// Compares and copies like a session of the agent, without a checkpoint; says how many blocks were written.
fn copy_raw(a: &Rig, b: &mut Rig, from: usize, to: usize) -> usize {
    let (theirs, ours) = (disk(a), disk(b));
    let mut count = 0;
    for at in (from..to).step_by(4096) {
        if theirs[at..at + 4096] == ours[at..at + 4096] {
            continue;
        }
        let range = ByteRange {
            offset: at as u64,
            len: 4096,
        };
        let data = Some(Bytes::copy_from_slice(&theirs[at..at + 4096]));
        ok(b.command(Command::SyncWrite { range, data }));
        count += 1;
    }
    count
}

#[test]
fn role_after_handover_before_first_write_is_resumed() {
    let (mut a, mut b, mut load) = pair(21);
    load.write(&mut a, true);
    let to = Some(b.params.replica);
    ok(a.command(Command::Close {
        designation: designation(2),
        to,
    }));
    catch_up(&mut a, &mut b);
    b.settle();
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Handover,
    }));
    b.settle();
    b.kill();
    b.open().unwrap();
    b.settle();
    let s = b.owner().status();
    assert!(
        s.resumable.is_some() && s.released.is_none(),
        "{:?} {:?}",
        s.resumable,
        s.released
    );
}

#[test]
fn failed_flush_of_a_copy_is_not_believed_later() {
    let (mut a, mut b, mut load) = pair(22);
    for _ in 0..20 {
        load.write(&mut a, true);
    }
    a.settle();
    load.collect(&mut a);
    ok(b.command(Command::Invalidate));
    // wipe B's disk so that there is something to copy
    b.store
        .poke(&FileId::Data, 0, &vec![0x5a; usize::try_from(DEVICE).unwrap()]);
    begin_sync(&a, &mut b);
    let device = usize::try_from(DEVICE).unwrap();
    // session 1: writes, then the flush of the checkpoint fails once
    b.store
        .inject_next(Op::Sync, Some(FileId::Data), Injected::Error(std::io::ErrorKind::Other));
    copy_raw(&a, &mut b, 0, device);
    let r = b.command(Command::SyncCheckpoint { done_bytes: DEVICE });
    assert!(matches!(r, Some(Err(Refusal::Io(_)))), "{r:?}");
    // session 2: as the agent does it
    begin_sync(&a, &mut b);
    let from = b.owner().status().sync.unwrap().done_bytes;
    assert_eq!(from, 0);
    assert_eq!(copy_raw(&a, &mut b, 0, device), 0, "in memory everything is equal");
    ok(b.command(Command::SyncCheckpoint { done_bytes: DEVICE }));
    let dirty_end = a.owner().status().dirty_end;
    ok(b.command(Command::FinishSync { dirty_end }));
    catch_up(&mut a, &mut b);
    b.settle();
    assert_eq!(b.owner().status().data, DataState::Consistent);
    b.power_loss(Survival::OnlySynced);
    b.open().unwrap();
    b.settle();
    assert!(
        disk(&b) == disk(&a),
        "a replica that says Consistent differs from the primary"
    );
}

#[test]
fn a_copy_from_a_lost_history_never_becomes_consistent() {
    let (mut a, mut b, mut load) = pair(31);
    let mut c = Rig::create(3, 4031, DEVICE);
    ok(a.command(Command::SetMembers(vec![b.params.replica, c.params.replica])));
    load.write(&mut a, true);
    a.settle();
    // The copy begins: the log of C starts at what A has applied.
    begin_sync(&a, &mut c);
    load.write(&mut a, true);
    catch_up(&mut a, &mut b);
    catch_up(&mut a, &mut c);
    b.settle();
    let have = b.owner().status().durable;
    // A goes on, B and C do not hear of it (WAN lag), but the copy reads A's disk.
    for _ in 0..10 {
        load.write(&mut a, true);
    }
    a.settle();
    let device = usize::try_from(DEVICE).unwrap();
    copy(&a, &mut c, 0, device);
    let dirty_end = a.owner().status().dirty_end;
    ok(c.command(Command::FinishSync { dirty_end }));
    assert!(dirty_end.lsn > have.lsn);
    // The site of A is lost. B takes over, C follows B.
    let last_words = a.owner().status().clone();
    let lost = a.params.replica;
    drop(a);
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    let block = vec![7_u8; 512];
    while b.owner().status().durable.lsn <= dirty_end.lsn {
        b.io(Io::Write {
            offset: 0,
            data: &block,
            fua: true,
        });
    }
    let wish = Wish {
        designation: designation(2),
        designated: Some(b.params.replica),
        ..Wish::default()
    };
    let members = [
        Member {
            replica: lost,
            reachable: false,
            avoid: false,
            status: Some(PeerStatus::of(&last_words, None)),
        },
        Member {
            replica: b.params.replica,
            reachable: true,
            avoid: false,
            status: Some(PeerStatus::of(b.owner().status(), None)),
        },
    ];
    let decision = decide(c.owner().status(), &wish, &members);
    assert!(
        matches!(&decision, Decision::Fetch(plan) if plan.source == b.params.replica),
        "{decision:?}"
    );
    assert_eq!(sync_need(c.owner().status(), &wish, &members, false), SyncNeed::None);
    catch_up(&mut b, &mut c);
    c.settle();
    b.settle();
    let (theirs, ours) = (disk(&b), disk(&c));
    let differ = theirs.chunks(512).zip(ours.chunks(512)).filter(|(a, b)| a != b).count();
    assert!(
        c.owner().status().data != DataState::Consistent || differ == 0,
        "Consistent, and {differ} sectors differ from the primary"
    );
}

#[test]
fn failover_on_a_damaged_log_is_resumed_after_a_restart() {
    let (mut a, mut b, mut load) = pair(33);
    ok(b.command(Command::SetSwitches(Switches {
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
    b.settle();
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    b.io(Io::Write {
        offset: 0,
        data: &[9; 512],
        fua: true,
    });
    b.settle();
    assert_eq!(b.owner().status().role, Role::Primary);
    b.kill();
    b.open().unwrap();
    let s = b.owner().status();
    assert!(s.resumable.is_some(), "the role is not resumed: {:?}", s.faults);
}

#[test]
fn a_larger_segment_size_does_not_stop_the_engine() {
    let mut rig = primary(41);
    rig.settle();
    let mut tuning = rig.params.tuning;
    tuning.segment_bytes = 4 << 20;
    tuning.overlay_budget_bytes = 8 << 20;
    ok(rig.command(Command::SetTuning(tuning)));
    let data = vec![3_u8; 200 << 10];
    assert_eq!(
        rig.io(Io::Write {
            offset: 0,
            data: &data,
            fua: true
        }),
        Some(IoResult::Done)
    );
}
#[test]
fn tuning_to_every_write_makes_earlier_writes_durable_first() {
    let mut rig = primary(43);
    rig.settle();
    assert_eq!(
        rig.io(Io::Write {
            offset: 0,
            data: &[5; 4096],
            fua: false
        }),
        Some(IoResult::Done)
    );
    let mut tuning = rig.params.tuning;
    tuning.durability = Durability::EveryWrite;
    rig.hold = |job| matches!(job, Job::Sync(_));
    let r = rig.order(Command::SetTuning(tuning));
    for _ in 0..200 {
        if !rig.run_one_job() {
            break;
        }
    }
    let replied = rig.reply(r);
    let s = rig.owner().status();
    assert!(
        replied.is_none() || s.durable == s.appended,
        "told done while a completed write is not durable"
    );
}

#[test]
fn log_lost_on_another_history_stays_log_lost_after_a_restart() {
    let (mut a, mut b, _) = pair(51);
    ok(b.command(Command::SetMembers(vec![a.params.replica])));
    for i in 0..30_u8 {
        a.io(Io::Write {
            offset: u64::from(i) * 2048,
            data: &[1 + i; 2048],
            fua: false,
        });
    }
    a.io(Io::Flush);
    a.settle();
    catch_up(&mut a, &mut b);
    b.settle();
    let common = b.owner().status().durable.lsn;
    for i in 0..5_u8 {
        a.io(Io::Write {
            offset: u64::from(40 + i) * 2048,
            data: &[0x80 + i; 2048],
            fua: false,
        });
    }
    a.io(Io::Flush);
    a.settle();
    let written_to = a.owner().status().dirty_end;
    assert!(written_to.lsn > common);
    damage(&a);
    a.kill();
    a.open().unwrap();
    ok(a.command(Command::Observe {
        designation: designation(2),
    }));
    a.settle();
    let s = a.owner().status();
    assert_eq!(s.data, DataState::LogLost);
    assert!(s.durable.lsn <= common, "damage is below what B has");
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    while b.owner().status().durable.lsn <= written_to.lsn {
        b.io(Io::Write {
            offset: 0,
            data: &[7_u8; 512],
            fua: true,
        });
    }
    catch_up(&mut b, &mut a);
    a.settle();
    b.settle();
    a.kill();
    a.open().unwrap();
    a.settle();
    let (theirs, ours) = (disk(&b), disk(&a));
    let differ = theirs.chunks(512).zip(ours.chunks(512)).filter(|(a, b)| a != b).count();
    assert!(
        a.owner().status().data != DataState::Consistent || differ == 0,
        "Consistent, {differ} sectors differ"
    );
}

#[test]
fn growing_shows_the_same_bytes_on_every_member() {
    let (mut a, mut b, mut load) = pair(61);
    load.write(&mut a, true);
    // Block devices larger than the volume, with what they held before.
    for (rig, fill) in [(&mut a, 0xaa_u8), (&mut b, 0xbb)] {
        rig.store.grow_data(DEVICE * 2);
        rig.store
            .poke(&FileId::Data, DEVICE, &vec![fill; usize::try_from(DEVICE).unwrap()]);
    }
    ok(a.command(Command::Resize { size_bytes: DEVICE * 2 }));
    catch_up(&mut a, &mut b);
    a.settle();
    b.settle();
    assert_eq!(b.owner().status().size_bytes, DEVICE * 2);
    assert_eq!(b.owner().status().data, DataState::Consistent);
    let range = ByteRange {
        offset: DEVICE,
        len: 4096,
    };
    let Some(IoResult::Data(before)) = a.io(Io::Read { range }) else {
        panic!()
    };
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    let Some(IoResult::Data(after)) = b.io(Io::Read { range }) else {
        panic!()
    };
    assert!(
        before == after,
        "the device reads {:x} before and {:x} after the failover",
        before[0],
        after[0]
    );
}

#[test]
fn a_release_is_told_only_when_its_close_is_durable() {
    let (mut a, b, mut load) = pair(71);
    load.write(&mut a, true);
    a.settle();
    a.hold = |job| matches!(job, Job::Sync(_) | Job::Rewrite(_));
    a.order(Command::Close {
        designation: designation(2),
        to: Some(b.params.replica),
    });
    a.kill();
    a.open().unwrap();
    while a.run_one_job() {}
    let s = a.owner().status().clone();
    a.power_loss(Survival::OnlySynced);
    a.hold = |_| false;
    a.open().unwrap();
    a.settle();
    let back = a.owner().status();
    assert!(
        back.resumable.is_some() || back.released.is_some(),
        "either the close survived, or nobody was told of it and the role goes on"
    );
    assert!(
        s.released.is_none_or(|r| r.end.lsn <= s.durable.lsn),
        "a release beyond the durable end was told"
    );
}
