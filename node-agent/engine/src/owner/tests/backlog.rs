//! A start that finds much log: what is applied and only kept for others is not read, and not held open.

use super::pair::{catch_up, disk, pair};
use super::{DEVICE, come_back, designation, for_seeds, ok, primary};
use crate::api::{Cause, Command, Compression, Fault, Role, Switches};
use crate::format::record::Record;
use crate::log::serve::SegmentLog;
use crate::replication::histories::prefix;
use crate::replication::messages::{FetchItem, FetchOpen, Refused};
use crate::replication::source::SourceStream;
use crate::store::{FileId, Store, StoreFile};
use crate::store_sim::Op;
use crate::testing::{Load, Rig};
use crate::types::ReplicaId;
use uuid::Uuid;

const HEADER_BYTES: u64 = 512;

/// A primary that keeps so many segments, all of them applied but the last, for a member that is away.
fn with_backlog(seed: u64, segments: usize) -> (Rig, Load) {
    let mut rig = primary(seed);
    let mut load = Load::new(DEVICE);
    ok(rig.command(Command::SetMembers(vec![ReplicaId(Uuid::from_u128(77))])));
    while rig.owner().log_view().segments.len() < segments {
        load.write(&mut rig, false);
        rig.settle();
    }
    load.collect(&mut rig);
    let status = rig.owner().status();
    assert_eq!(status.applied, status.durable, "everything is written back");
    (rig, load)
}

/// Bytes read from such files since tracing began.
fn bytes_read(rig: &Rig, which: fn(&FileId) -> bool) -> u64 {
    let trace = rig.store.take_trace();
    let reads = trace
        .iter()
        .filter(|event| event.op == Op::Read && event.file.as_ref().is_some_and(which));
    reads.map(|event| event.range.len).sum()
}

fn is_segment(id: &FileId) -> bool {
    matches!(id, FileId::Segment(_))
}

fn is_summary(id: &FileId) -> bool {
    matches!(id, FileId::Summary(_))
}

#[test]
fn of_log_that_is_applied_a_start_reads_the_headers_and_one_segment() {
    for_seeds(3, |seed| {
        for segments in [20, 80] {
            let (mut rig, mut load) = with_backlog(seed, segments);
            rig.kill();
            rig.store.set_trace(true);
            rig.open().unwrap();
            let read = bytes_read(&rig, is_segment);
            let kept = rig.owner().log_view().segments.len() as u64;
            assert!(kept >= segments as u64 - 1, "the backlog is still there");
            // A segment that holds the applied position, what stands behind its end, one that was prepared.
            let bound = (kept + 4) * HEADER_BYTES + 3 * rig.params.tuning.segment_bytes;
            assert!(read <= bound, "{segments} segments: {read} bytes read, at most {bound}");
            come_back(&mut rig).unwrap();
            load.write(&mut rig, false);
            load.collect(&mut rig);
            assert!(rig.content() == load.newest());
        }
    });
}

#[test]
fn a_start_does_not_open_all_segments_at_the_same_time() {
    let (mut rig, load) = with_backlog(4, 60);
    rig.kill();
    rig.store.set_open_limit(8);
    rig.open().unwrap();
    come_back(&mut rig).unwrap();
    assert!(rig.content() == load.newest());
}

/// The member that is away holds back summaries even when log was given up.
#[test]
fn of_summaries_a_start_reads_the_fixed_part() {
    let mut params = crate::testing::small_params(1, 6);
    params.tuning.retention_bytes = 256 << 10;
    let mut rig = Rig::create_with(params, 6, DEVICE);
    ok(rig.command(Command::Promote {
        designation: designation(1),
        cause: Cause::Create,
    }));
    let mut load = Load::new(DEVICE);
    ok(rig.command(Command::SetMembers(vec![ReplicaId(Uuid::from_u128(77))])));
    let summaries = |rig: &Rig| {
        let mut files = rig.store.list().unwrap();
        files.retain(is_summary);
        files
    };
    while summaries(&rig).len() < 40 {
        load.write(&mut rig, false);
        rig.settle();
    }
    let kept = summaries(&rig);
    let sizes = kept.iter().map(|id| rig.store.open(id).unwrap().size().unwrap());
    let whole: u64 = sizes.sum();
    rig.kill();
    rig.store.set_trace(true);
    rig.open().unwrap();
    let read = bytes_read(&rig, is_summary);
    assert!(
        read <= kept.len() as u64 * 128 && read < whole,
        "{read} of {whole} bytes"
    );
    rig.settle();
    let still = summaries(&rig);
    assert!(
        kept.iter().all(|id| still.contains(id)),
        "they are kept as long as before"
    );
}

/// Log behind a defect is evidence, and kept; but how much of it there is does not matter to a start.
#[test]
fn of_log_behind_a_defect_a_start_reads_the_headers_and_one_segment() {
    let (mut a, mut b, mut load) = pair(5);
    a.store.set_log_capacity(256 << 20);
    ok(b.command(Command::SetSwitches(Switches {
        replay: false,
        ..Switches::default()
    })));
    while b.owner().log_view().segments.len() < 40 {
        load.write(&mut a, true);
        a.settle();
        catch_up(&mut a, &mut b);
    }
    load.collect(&mut a);
    let durable = b.owner().status().durable;
    let damaged = b.owner().log_view().segments[2].name;
    b.kill();
    b.store.flip_bit(&FileId::Segment(damaged), (4096 + 128 + 20) * 8);
    for _ in 0..3 {
        b.store.set_trace(true);
        b.open().unwrap();
        let read = bytes_read(&b, is_segment);
        let bound = 45 * HEADER_BYTES + 6 * b.params.tuning.segment_bytes;
        assert!(read <= bound, "{read} bytes read, at most {bound}");
        assert!(matches!(b.owner().status().faults[..], [Fault::LogDefect { .. }]));
        b.settle();
        b.kill();
    }
    b.open().unwrap();
    catch_up(&mut a, &mut b);
    assert!(b.owner().status().durable.lsn >= durable.lsn);
    assert!(b.owner().status().faults.is_empty(), "{:?}", b.owner().status().faults);
    ok(b.command(Command::SetSwitches(Switches::default())));
    b.settle();
    assert_eq!(b.owner().status().role, Role::Secondary);
    assert!(disk(&b) == load.newest());
}

/// What a member gets that asks from the beginning of the log: so many records, and why it ended.
fn serve(rig: &Rig) -> (Vec<Record>, Option<Refused>) {
    let view = rig.owner().log_view();
    let from = view.segments[0].start;
    let open = FetchOpen {
        from,
        lineage: prefix(&view.lineage, from),
        until: None,
        compression: Compression::None,
    };
    let mut records = Vec::new();
    let (mut stream, _) = match SourceStream::open(SegmentLog::new(rig.store.clone()), view, open) {
        Ok(opened) => opened,
        Err(refused) => return (records, Some(refused)),
    };
    loop {
        match stream.next(view) {
            Ok(None) => return (records, None),
            Ok(Some(FetchItem::Records(claim))) => records.extend(claim.records),
            Ok(Some(_)) => {}
            Err(refused) => return (records, Some(refused)),
        }
    }
}

fn faults(rig: &Rig) -> &[Fault] {
    &rig.owner().status().faults
}

#[test]
fn a13_damage_that_a_start_does_not_read_is_named_when_it_is_served_and_never_shipped() {
    for_seeds(8, |seed| {
        let (mut rig, mut load) = with_backlog(seed, 20);
        let (whole, refused) = serve(&rig);
        assert_eq!(refused, None);
        let victim = rig.owner().log_view().segments[4 + usize::try_from(seed).unwrap() % 8].clone();
        rig.kill();
        // In the first record of the segment.
        rig.store
            .flip_bit(&FileId::Segment(victim.name), (4096 + 128 + 20 + seed) * 8);
        rig.open().unwrap();
        assert_eq!(faults(&rig), [], "what is only kept is not read");
        come_back(&mut rig).unwrap();
        assert!(rig.content() == load.newest());
        let (shipped, refused) = serve(&rig);
        assert!(
            !shipped.is_empty() && shipped.len() < whole.len() && shipped == whole[..shipped.len()],
            "what comes before is shipped, as it was"
        );
        let Some(Refused::Defect {
            at, stop: Some(stop), ..
        }) = refused
        else {
            panic!("{refused:?}")
        };
        assert_eq!((at, stop.segment), (victim.start.lsn, victim.name));
        ok(rig.command(Command::NameDefect(stop.clone())));
        let [Fault::BacklogDefect { segment, lsn, .. }] = faults(&rig) else {
            panic!("{:?}", faults(&rig))
        };
        assert_eq!((segment, *lsn), (&victim.name.to_string(), at));
        // It is no reason not to go on here, nor to take the role back after a close.
        load.write(&mut rig, true);
        load.collect(&mut rig);
        let next = designation(rig.owner().status().designation.number + 1);
        ok(rig.command(Command::Close {
            designation: next,
            to: None,
        }));
        let again = designation(next.number + 1);
        ok(rig.command(Command::Promote {
            designation: again,
            cause: Cause::Handover,
        }));
        assert!(
            matches!(faults(&rig), [Fault::BacklogDefect { .. }]),
            "{:?}",
            faults(&rig)
        );
        // It is over when nobody needs that log any more.
        ok(rig.command(Command::SetMembers(Vec::new())));
        rig.settle();
        assert!(rig.owner().status().log_start > at);
        assert_eq!(faults(&rig), []);
        ok(rig.command(Command::NameDefect(stop)));
        assert_eq!(faults(&rig), [], "what is not in the log is not named");
        assert!(rig.content() == load.newest());
    });
}

/// On a replica that has not applied it yet it is its own trouble, too.
#[test]
fn a13_damage_ahead_of_replay_that_is_found_when_served_stops_a_handover() {
    let (mut a, mut b, mut load) = pair(9);
    ok(b.command(Command::SetSwitches(Switches {
        replay: false,
        ..Switches::default()
    })));
    for _ in 0..30 {
        load.write(&mut a, true);
        a.settle();
    }
    catch_up(&mut a, &mut b);
    b.settle();
    super::restart::damage(&b);
    let (_, refused) = serve(&b);
    let Some(Refused::Defect { stop: Some(stop), .. }) = refused else {
        panic!("{refused:?}")
    };
    ok(b.command(Command::NameDefect(stop)));
    assert!(matches!(faults(&b), [Fault::LogDefect { .. }]), "{:?}", faults(&b));
    let refused = b.command(Command::Promote {
        designation: designation(2),
        cause: Cause::Handover,
    });
    assert!(matches!(refused, Some(Err(_))), "{refused:?}");
}
