//! Two replicas: log goes from one to the other and is replayed there.

use super::{DEVICE, designation, for_seeds, ok, primary};
use crate::api::{Answer, Cause, Command, DataState, Fault, Io, IoResult, Refusal, Role, Switches};
use crate::log::reader::{LogReader, Next, ReadError};
use crate::replication::histories::prefix;
use crate::store::FileId;
use crate::store_sim::Survival;
use crate::testing::{Load, Rig};
use crate::types::{ByteRange, Lsn};
use bytes::Bytes;
use rand::Rng;
use std::time::Duration;

/// Sends the next piece of log from `a` to `b`; `false`: nothing to send.
pub(super) fn ship(a: &Rig, b: &mut Rig, max_bytes: u64) -> bool {
    let view = a.owner().log_view();
    let from = b.owner().status().appended;
    let mut reader = match LogReader::open(a.store.clone(), view, from) {
        Ok(reader) => reader,
        Err(ReadError::NotProven { .. }) => return false,
        Err(error) => panic!("{error}"),
    };
    let command = match reader.next(view, Lsn(u64::MAX), max_bytes).unwrap() {
        Next::End => return false,
        Next::Epoch(entry) => Command::AcceptEpoch(entry),
        Next::Records(chunk) => Command::AcceptLog(chunk),
    };
    match b.command(command) {
        None => false,
        Some(reply) => {
            reply.unwrap();
            true
        }
    }
}

/// Makes durable what is appended; a secondary does so by itself.
pub(super) fn flush(rig: &mut Rig) {
    if rig.owner().status().role == Role::Primary {
        assert_eq!(rig.io(Io::Flush), Some(IoResult::Done));
    } else {
        rig.run_until(|rig| rig.owner().status().durable == rig.owner().status().appended);
    }
}

/// Ships until `b` has durably what `a` has.
pub(super) fn catch_up(a: &mut Rig, b: &mut Rig) {
    for _ in 0..10_000 {
        flush(a);
        while ship(a, b, 8 << 10) {}
        if b.owner().status().durable == a.owner().status().durable {
            return;
        }
        b.step();
    }
    panic!("never catches up: {:?} {:?}", a.owner().status(), b.owner().status());
}

/// The bytes of the data disk, past the owner.
pub(super) fn disk(rig: &Rig) -> Vec<u8> {
    rig.store.peek(&FileId::Data).unwrap()
}

/// The order to copy from `a`.
pub(super) fn begin(a: &Rig) -> Command {
    let status = a.owner().status();
    Command::BeginSync {
        source: a.params.replica,
        start: status.applied,
        lineage: prefix(&status.lineage, status.applied),
        size_bytes: status.size_bytes,
        log_start: status.log_start,
    }
}

pub(super) fn begin_sync(a: &Rig, b: &mut Rig) {
    ok(b.command(begin(a)));
}

/// Copies `[from, to)` from the underlying disk of `a`, as far as it differs.
pub(super) fn copy(a: &Rig, b: &mut Rig, from: usize, to: usize) {
    let (theirs, ours) = (disk(a), disk(b));
    for at in (from..to).step_by(4096) {
        if theirs[at..at + 4096] != ours[at..at + 4096] {
            let range = ByteRange {
                offset: at as u64,
                len: 4096,
            };
            let data = Some(Bytes::copy_from_slice(&theirs[at..at + 4096]));
            ok(b.command(Command::SyncWrite { range, data }));
        }
    }
    ok(b.command(Command::SyncCheckpoint { done_bytes: to as u64 }));
}

/// A whole sync; `None` when the target died.
pub(super) fn try_sync(a: &mut Rig, b: &mut Rig) -> Option<()> {
    b.command(begin(a))?.unwrap();
    let device = usize::try_from(DEVICE).unwrap();
    for from in (0..device).step_by(device / 4) {
        let (theirs, ours) = (disk(a), disk(b));
        for at in (from..from + device / 4).step_by(4096) {
            if theirs[at..at + 4096] != ours[at..at + 4096] {
                let range = ByteRange {
                    offset: at as u64,
                    len: 4096,
                };
                let data = Some(Bytes::copy_from_slice(&theirs[at..at + 4096]));
                b.command(Command::SyncWrite { range, data })?.unwrap();
            }
        }
        b.command(Command::SyncCheckpoint {
            done_bytes: (from + device / 4) as u64,
        })?
        .unwrap();
        a.step();
    }
    b.command(Command::FinishSync {
        dirty_end: a.owner().status().dirty_end,
    })?
    .unwrap();
    Some(())
}

/// A primary and a secondary that follows it, consistent.
pub(super) fn pair(seed: u64) -> (Rig, Rig, Load) {
    let mut a = primary(seed);
    let mut b = Rig::create(2, seed + 1000, DEVICE);
    ok(a.command(Command::SetMembers(vec![b.params.replica])));
    a.settle();
    begin_sync(&a, &mut b);
    copy(&a, &mut b, 0, usize::try_from(DEVICE).unwrap());
    ok(b.command(Command::FinishSync {
        dirty_end: a.owner().status().dirty_end,
    }));
    catch_up(&mut a, &mut b);
    b.settle();
    assert_eq!(b.owner().status().data, DataState::Consistent);
    (a, b, Load::new(DEVICE))
}

/// What the device of `a` held at every LSN: after each submission, the end of the log and the content then.
struct Tape(Vec<(Lsn, usize)>);

impl Tape {
    fn note(&mut self, a: &mut Rig, load: &mut Load) {
        // With nothing held back, the end of the log belongs to the changes so far.
        load.collect(a);
        if load.outstanding() == 0 {
            flush(a);
            self.0.push((a.owner().status().durable.lsn, load.len()));
        }
    }

    fn changes_at(&self, lsn: Lsn) -> Option<usize> {
        self.0
            .iter()
            .rev()
            .find(|(end, _)| *end == lsn)
            .map(|(_, changes)| *changes)
    }
}

#[test]
fn a36_the_secondarys_disk_is_the_primarys_content_at_its_applied_lsn() {
    let compared = std::sync::atomic::AtomicUsize::new(0);
    for_seeds(8, |seed| {
        let (mut a, mut b, mut load) = pair(seed);
        let mut tape = Tape(Vec::new());
        tape.note(&mut a, &mut load);
        for _ in 0..150 {
            load.write(&mut a, false);
            load.step(&mut a);
            tape.note(&mut a, &mut load);
            load.collect(&mut a);
            while b.rng().random_bool(0.6) && ship(&a, &mut b, 4 << 10) {}
            for _ in 0..4 {
                b.step();
            }
            if b.rng().random_bool(0.1) {
                b.settle();
            }
            let status = b.owner().status();
            let quiet = b.pending_jobs() == 0 && status.applied.lsn == status.dirty_end.lsn;
            if let Some(changes) = tape.changes_at(status.applied.lsn).filter(|_| quiet) {
                assert!(
                    disk(&b) == load.content_after(changes),
                    "another content at {}",
                    status.applied
                );
                compared.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        }
        a.settle();
        load.collect(&mut a);
        catch_up(&mut a, &mut b);
        b.settle();
        assert!(disk(&b) == load.newest());
        let report = b.owner().status().durable;
        ok(a.command(Command::PeerReport {
            peer: b.params.replica,
            durable: report,
        }));
        a.settle();
        let starts = a
            .owner()
            .log_view()
            .segments
            .iter()
            .map(|segment| segment.start.lsn)
            .collect::<Vec<_>>();
        // The older slot names an older applied position, so a little more may stay.
        assert!(starts.len() <= 4, "log that everybody has is gone: {starts:?}");
    });
    let compared = compared.into_inner();
    assert!(
        compared >= 100 || std::env::var("MARS_SEED").is_ok(),
        "compared at {compared} moments only"
    );
}

#[test]
fn a30_replay_held_back_while_fetch_is_current_and_promotion_replays_first() {
    for_seeds(6, |seed| {
        let (mut a, mut b, mut load) = pair(seed);
        let switches = Switches {
            apply_delay: Duration::from_hours(1),
            ..Switches::default()
        };
        ok(b.command(Command::SetSwitches(switches.clone())));
        let before = disk(&b);
        for _ in 0..80 {
            load.write(&mut a, false);
            a.advance(Duration::from_secs(10));
            b.advance(Duration::from_secs(10));
        }
        a.settle();
        catch_up(&mut a, &mut b);
        while b.run_one_job() {}
        assert_eq!(
            b.owner().status().durable,
            a.owner().status().durable,
            "fetch is current"
        );
        assert!(disk(&b) == before, "nothing is applied within the hour");
        if seed % 3 == 0 {
            // Fast-forward.
            ok(b.command(Command::SetSwitches(Switches::default())));
            b.settle();
            assert!(disk(&b) == load.newest());
        } else if seed % 3 == 1 {
            // Paused altogether: an hour later still nothing.
            ok(b.command(Command::SetSwitches(Switches {
                replay: false,
                ..switches
            })));
            b.advance(Duration::from_hours(2));
            while b.run_one_job() {}
            assert!(disk(&b) == before);
            return;
        } else {
            // The hour passes: what is old enough is applied.
            b.advance(Duration::from_hours(1));
            b.settle();
            assert!(disk(&b) == load.newest());
            return;
        }
        let promote = Command::Promote {
            designation: designation(2),
            cause: Cause::Failover,
        };
        let Answer::At(start) = ok(b.command(promote)) else {
            panic!("a promotion answers with its epoch")
        };
        assert_eq!(start.lsn, a.owner().status().durable.lsn);
        assert!(b.content() == load.newest(), "a promoted replica has everything local");
    });
}

#[test]
fn a30_a_held_back_replica_that_is_promoted_replays_everything_local_first() {
    let (mut a, mut b, mut load) = pair(4);
    ok(b.command(Command::SetSwitches(Switches {
        replay: false,
        ..Switches::default()
    })));
    // Much more than fits into the buffer.
    for _ in 0..120 {
        load.write(&mut a, false);
        a.settle();
        load.collect(&mut a);
    }
    catch_up(&mut a, &mut b);
    b.settle();
    assert!(b.owner().status().applied.lsn < b.owner().status().durable.lsn);
    ok(b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Failover,
    }));
    assert_eq!(b.owner().status().role, Role::Primary);
    assert!(b.content() == load.newest());
}

#[test]
fn a37_resize_discard_and_zeroes_take_effect_at_the_same_point_and_a_small_disk_stops_before() {
    let (mut a, mut b, mut load) = pair(5);
    for _ in 0..30 {
        load.step(&mut a);
        a.step();
        load.collect(&mut a);
    }
    let bigger = DEVICE + (64 << 10);
    let refused = a.command(Command::Resize { size_bytes: bigger }).unwrap().unwrap_err();
    assert!(
        matches!(refused, Refusal::Invalid(_)),
        "the disk is too small: {refused}"
    );
    a.store.grow_data(bigger);
    ok(a.command(Command::Resize { size_bytes: bigger }));
    assert_eq!(a.owner().status().size_bytes, bigger);
    assert_eq!(
        a.io(Io::Write {
            offset: DEVICE,
            data: &[7; 4096],
            fua: true
        }),
        Some(IoResult::Done)
    );
    let range = ByteRange {
        offset: DEVICE,
        len: 512,
    };
    assert_eq!(a.io(Io::Discard { range }), Some(IoResult::Done));
    catch_up(&mut a, &mut b);
    b.run_until(|rig| {
        rig.owner()
            .status()
            .faults
            .iter()
            .any(|fault| matches!(fault, Fault::DiskTooSmall { .. }))
    });
    let status = b.owner().status();
    assert!(matches!(status.faults[..], [Fault::DiskTooSmall { wanted_bytes, .. }] if wanted_bytes == bigger));
    assert_eq!(status.size_bytes, DEVICE, "it stops before the RESIZE");
    b.store.grow_data(bigger);
    b.settle();
    a.settle();
    let status = b.owner().status();
    assert!(status.faults.is_empty() && status.size_bytes == bigger);
    assert!(disk(&a) == disk(&b));
    // Replayed twice: from the log again, after a power loss.
    b.power_loss(Survival::Torn);
    b.open().unwrap();
    b.settle();
    assert_eq!(b.owner().status().size_bytes, bigger);
    assert!(disk(&a) == disk(&b));
}
