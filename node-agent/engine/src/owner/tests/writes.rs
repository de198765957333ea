//! The write path: order, durability before data, failures of the log, a full buffer.

use super::{DEVICE, come_back, designation, for_seeds, ok, primary};
use crate::api::{Cause, Command, Durability, Fault, Io, IoResult, Submitted};
use crate::jobs::Job;
use crate::log::reader::{LogReader, Next};
use crate::store::{FileId, Store};
use crate::store_sim::{Injected, Op, SimFile, Survival};
use crate::testing::{Crash, Load, Rig, small_params};
use crate::types::{ByteRange, Lsn, Position};
use crate::writeback::Extent;
use rand::Rng;
use std::io;
use std::time::Duration;

/// The payloads of all records in the durable log, in order.
fn logged(rig: &Rig) -> Vec<(u64, Vec<u8>)> {
    let view = rig.owner().log_view();
    let mut reader = LogReader::open(rig.store.clone(), view, Position::default()).unwrap();
    let mut records = Vec::new();
    loop {
        match reader.next(view, Lsn(u64::MAX), 1 << 20).unwrap() {
            Next::End => return records,
            Next::Epoch(_) => {}
            Next::Records(chunk) => {
                records.extend(
                    chunk
                        .records()
                        .iter()
                        .map(|record| (record.header.offset, record.payload.to_vec())),
                );
            }
        }
    }
}

#[test]
fn a12_log_order_is_the_order_of_submission_with_1_to_128_in_flight() {
    for_seeds(12, |seed| {
        let mut params = small_params(1, seed);
        params.tuning.durability = if seed % 2 == 0 {
            Durability::EveryWrite
        } else {
            Durability::OnFlush
        };
        let mut rig = Rig::create_with(params, seed, DEVICE);
        // Nobody has reported anything: no log goes.
        ok(rig.command(Command::SetMembers(vec![crate::types::ReplicaId(
            uuid::Uuid::from_u128(9),
        )])));
        ok(rig.command(Command::Promote {
            designation: designation(1),
            cause: Cause::Create,
        }));
        let depth = [1, 2, 8, 32, 128][usize::try_from(seed % 5).unwrap()];
        let mut expected = Vec::new();
        let mut open = Vec::new();
        for stamp in 0..400_u64 {
            let data = stamp.to_le_bytes().repeat(64);
            let offset = rig.rng().random_range(0..DEVICE / 512) * 512;
            let fua = rig.rng().random_bool(0.3);
            let (tag, submitted) = rig.submit(Io::Write {
                offset,
                data: &data,
                fua,
            });
            expected.push((offset, data));
            if submitted == Submitted::Later {
                open.push(tag);
            }
            while open.len() >= depth {
                assert!(rig.step());
                open.retain(|tag| rig.completion(*tag).is_none());
            }
        }
        rig.settle();
        assert!(logged(&rig) == expected, "the log holds the writes in another order");
    });
}

/// Whether `bytes` are on stable storage in some log segment.
fn is_logged_durably(rig: &Rig, bytes: &[u8]) -> bool {
    rig.store
        .list()
        .unwrap()
        .iter()
        .filter(|id| matches!(id, FileId::Segment(_)))
        .any(|id| {
            let image = rig.store.peek_durable(id).unwrap_or_default();
            image.windows(bytes.len()).any(|window| window == bytes)
        })
}

/// The highest dirty end that a slot on stable storage names.
fn saved_dirty_end(rig: &Rig) -> Lsn {
    let slots = [0, 1].map(|index| rig.store.peek_durable(&FileId::Slot(index)).unwrap());
    let ends = slots.iter().filter_map(|image| {
        let len = usize::try_from(u32::from_le_bytes(image[12..16].try_into().unwrap())).unwrap();
        serde_json::from_slice::<crate::state::SavedState>(image.get(32..32 + len)?).ok()
    });
    ends.map(|saved| saved.dirty_end.lsn).max().unwrap()
}

fn a17_watch(rig: &Rig, job: &Job<SimFile>) {
    let Job::Write { extents, .. } = job else { return };
    assert_eq!(
        saved_dirty_end(rig),
        rig.owner().status().dirty_end.lsn,
        "the dirty end is saved before the first byte is written"
    );
    for extent in extents {
        let Extent::Bytes { parts, .. } = extent else { continue };
        for part in parts {
            assert!(
                is_logged_durably(rig, &part[..32.min(part.len())]),
                "a byte goes to the data disk before its record is durable"
            );
        }
    }
}

#[test]
fn a17_no_byte_reaches_the_data_disk_before_its_record_and_the_dirty_end_are_durable() {
    for_seeds(4, |seed| {
        let mut rig = primary(seed);
        rig.watch = a17_watch;
        let mut load = Load::new(DEVICE);
        load.max_sectors = 4;
        for step in 0..250 {
            load.step(&mut rig);
            if rig.rng().random_bool(0.4) {
                rig.run_one_job();
            }
            if step % 60 == 59 {
                rig.settle();
            }
        }
    });
}

#[test]
fn a16_a_failed_log_sync_or_write_is_repaired_and_never_believed_later() {
    for_seeds(60, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        for _ in 0..150 {
            load.step(&mut rig);
            if rig.rng().random_bool(0.5) {
                rig.run_one_job();
            }
            if rig.rng().random_bool(0.06) {
                let segment = rig
                    .owner()
                    .log_view()
                    .segments
                    .last()
                    .map(|segment| FileId::Segment(segment.name));
                match rig.rng().random_range(0..3) {
                    0 => rig
                        .store
                        .inject_next(Op::Sync, segment, Injected::Error(io::ErrorKind::Other)),
                    1 => rig
                        .store
                        .inject_next(Op::Write, segment, Injected::Torn(io::ErrorKind::Other)),
                    _ => rig
                        .store
                        .inject_next(Op::Write, segment, Injected::Error(io::ErrorKind::StorageFull)),
                }
            }
        }
        rig.store.clear_faults();
        rig.run_until(|rig| rig.pending_jobs() == 0);
        load.collect(&mut rig);
        let survival = if seed % 2 == 0 {
            Survival::OnlySynced
        } else {
            Survival::Torn
        };
        rig.power_loss(survival);
        rig.open().unwrap();
        come_back(&mut rig).unwrap();
        load.judge(&rig.content(), Crash::Power);
    });
}

#[test]
fn a16_when_the_tail_cannot_be_rewritten_writers_are_held_and_reads_go_on() {
    let mut rig = primary(3);
    let mut load = Load::new(DEVICE);
    for _ in 0..20 {
        load.write(&mut rig, false);
    }
    rig.settle();
    load.collect(&mut rig);
    let segment = rig
        .owner()
        .log_view()
        .segments
        .last()
        .map(|segment| FileId::Segment(segment.name));
    rig.store
        .inject_next(Op::Sync, segment, Injected::Error(io::ErrorKind::Other));
    rig.store.set_log_capacity(0);
    load.write(&mut rig, true);
    let failed = |rig: &Rig| {
        rig.owner()
            .status()
            .faults
            .iter()
            .any(|fault| matches!(fault, Fault::LogStoreFailed { .. }))
    };
    assert!(rig.run_until(failed));
    let (tag, submitted) = rig.submit(Io::Write {
        offset: 0,
        data: &[9; 4096],
        fua: false,
    });
    assert_eq!(submitted, Submitted::Later, "writers are held");
    let range = ByteRange { offset: 0, len: DEVICE };
    let Some(IoResult::Data(bytes)) = rig.io(Io::Read { range }) else {
        panic!("reads go on")
    };
    assert!(bytes[..] == load.newest()[..]);
    for _ in 0..5 {
        rig.step();
        rig.advance(Duration::from_secs(1));
    }
    assert!(rig.completion(tag).is_none() && failed(&rig));
    rig.store.set_log_capacity(64 << 20);
    assert!(rig.run_until(|rig| rig.has_completion(tag) && !failed(rig)));
    assert_eq!(rig.completion(tag), Some(IoResult::Done));
    load.collect(&mut rig);
    assert_eq!(load.outstanding(), 0);
}

#[test]
fn a_full_buffer_holds_writers_in_order_until_a_flight_frees_memory() {
    for_seeds(10, |seed| {
        let mut params = small_params(1, seed);
        params.tuning.overlay_budget_bytes = 40 << 10;
        let mut rig = Rig::create_with(params, seed, DEVICE);
        ok(rig.command(Command::Promote {
            designation: designation(1),
            cause: Cause::Create,
        }));
        let mut load = Load::new(DEVICE);
        let mut most = 0;
        let mut held = false;
        for _ in 0..300 {
            load.write(&mut rig, false);
            held |= load.outstanding() > 0;
            most = most.max(rig.owner().status().overlay_bytes);
            if rig.rng().random_bool(0.3) {
                rig.run_one_job();
                load.collect(&mut rig);
            }
        }
        assert!(held, "the buffer was full");
        rig.settle();
        load.collect(&mut rig);
        assert_eq!(load.outstanding(), 0);
        assert!(
            most <= (40 << 10) + (32 << 10),
            "at most one request beyond the budget: {most}"
        );
        assert!(rig.content() == load.newest());
    });
}

#[test]
fn a_failing_data_disk_is_shown_and_nothing_is_lost() {
    for_seeds(20, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        for _ in 0..60 {
            load.write(&mut rig, false);
            rig.run_one_job();
        }
        let op = if seed % 2 == 0 { Op::Sync } else { Op::Write };
        rig.store
            .inject_next(op, Some(FileId::Data), Injected::Error(io::ErrorKind::Other));
        let failed = |rig: &Rig| {
            rig.owner()
                .status()
                .faults
                .iter()
                .any(|fault| matches!(fault, Fault::DataDiskFailed { .. }))
        };
        assert!(rig.run_until(failed));
        rig.settle();
        assert!(!failed(&rig), "the fault is over when the disk works again");
        load.collect(&mut rig);
        rig.power_loss(Survival::OnlySynced);
        rig.open().unwrap();
        come_back(&mut rig).unwrap();
        assert!(
            rig.content() == load.newest(),
            "everything was synced before the power failed"
        );
    });
}

#[test]
fn a21_no_durable_end_that_was_ever_published_is_lost_in_a_power_cut() {
    for_seeds(40, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        let mut published = Position::default();
        for _ in 0..120 {
            load.step(&mut rig);
            if rig.rng().random_bool(0.5) {
                rig.run_one_job();
            }
            let durable = rig.owner().log_view().durable;
            assert_eq!(durable, rig.owner().status().durable);
            assert!(durable.lsn >= published.lsn, "durable never goes back");
            published = durable;
        }
        rig.power_loss([Survival::OnlySynced, Survival::Torn, Survival::Some][usize::try_from(seed % 3).unwrap()]);
        rig.open().unwrap();
        rig.run_until(|rig| rig.pending_jobs() == 0);
        let view = rig.owner().log_view();
        assert!(
            view.durable.lsn >= published.lsn,
            "{} was published, {} is there",
            published,
            view.durable
        );
        LogReader::open(rig.store.clone(), view, published).expect("what was published is still provable");
    });
}

#[test]
fn requests_outside_the_device_are_refused_with_the_right_errno() {
    let mut rig = primary(1);
    let data = [0; 1024];
    let mut errno = |io: Io<'_>| match rig.submit(io).1 {
        Submitted::Now(IoResult::Errno(errno)) => errno,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        errno(Io::Write {
            offset: DEVICE - 512,
            data: &data,
            fua: false
        }),
        28
    );
    assert_eq!(
        errno(Io::Read {
            range: ByteRange {
                offset: DEVICE,
                len: 512
            }
        }),
        22
    );
    assert_eq!(
        errno(Io::Write {
            offset: 100,
            data: &data,
            fua: false
        }),
        22
    );
    assert_eq!(
        errno(Io::Discard {
            range: ByteRange {
                offset: u64::MAX - 511,
                len: 512
            }
        }),
        28
    );
}

/// Requests come in between a job's return and the moment at which its consequences are announced: the answers wait for that.
#[test]
fn whoever_has_seen_a_flush_return_finds_a_published_durable_end_that_covers_it() {
    for_seeds(20, |seed| {
        let mut rig = primary(seed);
        rig.settle();
        let mut end = rig.owner().status().durable.lsn;
        let mut flushes = Vec::new();
        for _ in 0..300 {
            rig.busy = rig.rng().random_bool(0.4);
            match rig.rng().random_range(0..4) {
                0 | 1 => {
                    let write = Io::Write {
                        offset: 4096,
                        data: &[5; 512],
                        fua: false,
                    };
                    assert_eq!(rig.submit(write).1, Submitted::Now(IoResult::Done));
                    end = end.advance(40 + 512);
                }
                2 => match rig.submit(Io::Flush) {
                    (_, Submitted::Now(_)) => assert!(rig.announced().unwrap() >= end, "answered, not announced"),
                    (tag, Submitted::Later) => flushes.push((tag, end)),
                },
                _ => drop(rig.run_one_job()),
            }
        }
        rig.busy = false;
        rig.settle();
        assert!(flushes.len() > 10, "no flush waited");
        for (tag, end) in flushes {
            assert!(
                rig.announced_at(tag).expect("answered") >= end,
                "answered before it was announced"
            );
        }
    });
}
