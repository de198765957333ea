//! Log that is applied and only kept for others.

use super::pair::{catch_up, pair};
use super::{DEVICE, come_back, designation, for_seeds, ok, primary};
use crate::api::{Cause, Command, Compression, Fault, Switches};
use crate::format::record::Record;
use crate::log::serve::SegmentLog;
use crate::replication::histories::prefix;
use crate::replication::messages::{FetchItem, FetchOpen, Refused};
use crate::replication::source::SourceStream;
use crate::store::FileId;
use crate::testing::{Load, Rig};
use crate::types::ReplicaId;
use uuid::Uuid;

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
