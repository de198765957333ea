//! The stack under a running device is exchanged: no request fails, none is answered wrongly, and nothing goes the old way afterwards.

use super::pair::{begin_sync, pair};
use super::{DEVICE, for_seeds, ok, primary};
use crate::api::{Command, Fault, Io, IoResult, Refusal, Submitted};
use crate::brick::{Brick, Disk, Faults, Faulty, Pace, Paced};
use crate::store::{FileId, Store};
use crate::testing::{Load, Rig};
use crate::types::ByteRange;
use rand::Rng;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A brick that must not be used any more once it is out of the stack.
#[derive(Debug)]
struct Guarded {
    below: Disk,
    out: Arc<AtomicBool>,
}

impl Guarded {
    fn check(&self) -> &Disk {
        assert!(
            !self.out.load(Ordering::SeqCst),
            "a brick is used after it was exchanged"
        );
        &self.below
    }
}

impl Brick for Guarded {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.check().read_at(buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.check().write_at(parts, offset)
    }

    fn zero_range(&self, range: ByteRange) -> io::Result<()> {
        self.check().zero_range(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.check().sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.check().size()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.check().next_data(from)
    }
}

/// Counts what passes.
#[derive(Debug, Default)]
struct Count(AtomicU64);

impl Pace for Count {
    fn pass(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::SeqCst);
    }
}

fn bottom(rig: &Rig) -> Disk {
    Arc::new(rig.store.open(&FileId::Data).unwrap())
}

fn has_failed(rig: &Rig) -> bool {
    let faults = &rig.owner().status().faults;
    faults.iter().any(|fault| matches!(fault, Fault::DataDiskFailed { .. }))
}

#[test]
fn a10_exchanged_under_load_again_and_again_no_request_fails_or_reads_old_bytes() {
    for_seeds(20, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        let mut out = Arc::new(AtomicBool::new(false));
        let count = Arc::new(Count::default());
        let mut pending = None;
        let mut exchanges = 0;
        for _ in 0..600 {
            load.step(&mut rig);
            if rig.rng().random_bool(0.4) {
                rig.run_one_job();
            }
            if rig.rng().random_bool(0.02) {
                rig.settle();
                load.collect(&mut rig);
            }
            match &pending {
                None if rig.rng().random_bool(0.1) => {
                    let new = Arc::new(AtomicBool::new(false));
                    let guarded = Guarded {
                        below: bottom(&rig),
                        out: new.clone(),
                    };
                    let disk: Disk = Arc::new(Paced::new(Arc::new(guarded), count.clone()));
                    pending = Some((rig.order(Command::ExchangeDisk(disk)), new));
                }
                Some((id, new)) => {
                    if let Some(reply) = rig.reply(*id) {
                        reply.unwrap();
                        std::mem::replace(&mut out, new.clone()).store(true, Ordering::SeqCst);
                        pending = None;
                        exchanges += 1;
                    }
                }
                None => {}
            }
        }
        rig.settle();
        load.collect(&mut rig);
        assert_eq!(load.outstanding(), 0, "everything is answered");
        assert!(exchanges > 5, "only {exchanges} exchanges");
        assert!(count.0.load(Ordering::SeqCst) > 100_000, "the bricks are used");
        assert!(rig.content() == load.newest());
        assert!(rig.store.peek(&FileId::Data).unwrap() == load.newest());
    });
}

#[test]
fn a_disk_that_fails_is_replaced_by_another_way_to_it_and_everything_is_written_back() {
    let mut rig = primary(3);
    let mut load = Load::new(DEVICE);
    let faults = Arc::new(Faults::default());
    let dead: Disk = Arc::new(Faulty::new(bottom(&rig), faults.clone()));
    ok(rig.command(Command::ExchangeDisk(dead)));
    faults.fail_writes(true);
    (0..8).for_each(|_| load.write(&mut rig, true));
    assert!(rig.run_until(has_failed), "the failure is named");
    load.collect(&mut rig);
    assert_eq!(load.outstanding(), 0, "the log answers for the disk");
    let way = bottom(&rig);
    ok(rig.command(Command::ExchangeDisk(way)));
    rig.settle();
    assert!(!has_failed(&rig));
    assert!(rig.store.peek(&FileId::Data).unwrap() == load.newest());
}

#[test]
fn a16_a_flush_of_the_data_disk_that_failed_once_is_not_believed_the_second_time() {
    for_seeds(10, |seed| {
        let mut rig = primary(seed);
        let mut load = Load::new(DEVICE);
        let faults = Arc::new(Faults::default());
        let losing: Disk = Arc::new(Faulty::new(bottom(&rig), faults.clone()));
        ok(rig.command(Command::ExchangeDisk(losing)));
        for _ in 0..10 {
            faults.lose_until_flush();
            for _ in 0..10 {
                load.step(&mut rig);
                rig.step();
            }
            rig.settle();
            load.collect(&mut rig);
        }
        load.write(&mut rig, false);
        rig.settle();
        load.collect(&mut rig);
        assert!(faults.losses() >= 5, "the flush fails");
        assert!(rig.content() == load.newest());
        assert!(
            rig.store.peek(&FileId::Data).unwrap() == load.newest(),
            "what was lost is written again"
        );
    });
}

#[test]
fn a_stack_that_cannot_hold_the_device_is_refused_and_reads_that_waited_go_on() {
    let mut rig = primary(4);
    rig.settle();
    let range = ByteRange { offset: 0, len: 4096 };
    rig.hold = |job| matches!(job, crate::jobs::Job::Read { .. });
    let (first, submitted) = rig.submit(Io::Read { range });
    assert_eq!(submitted, Submitted::Later);
    let small: Disk = Arc::new(rig.store.create(&FileId::Slot(7), DEVICE - 4096).unwrap());
    let id = rig.order(Command::ExchangeDisk(small));
    let (second, _) = rig.submit(Io::Read { range });
    let again = rig.command(Command::ExchangeDisk(bottom(&rig)));
    assert!(
        matches!(again, Some(Err(Refusal::WrongRole { .. }))),
        "one at a time: {again:?}"
    );
    rig.hold = |_| false;
    rig.settle();
    let refused = rig.reply(id);
    assert!(matches!(refused, Some(Err(Refusal::Invalid(_)))), "{refused:?}");
    for tag in [first, second] {
        assert!(matches!(rig.completion(tag), Some(IoResult::Data(_))));
    }
    let (a, mut b, _) = pair(5);
    ok(b.command(Command::Invalidate));
    begin_sync(&a, &mut b);
    let way = bottom(&b);
    let refused = b.command(Command::ExchangeDisk(way));
    assert!(
        matches!(refused, Some(Err(Refusal::WrongRole { .. }))),
        "while copying: {refused:?}"
    );
}

#[test]
fn a37_a_device_that_grows_while_its_stack_is_exchanged_does_not_end_on_a_disk_that_is_too_small() {
    let mut rig = primary(8);
    rig.settle();
    let larger: Disk = Arc::new(rig.store.create(&FileId::Slot(8), 2 * DEVICE).unwrap());
    ok(rig.command(Command::ExchangeDisk(larger)));
    // A read holds up the exchange with a disk that is large enough for the present size, while the device grows.
    rig.hold = |job| matches!(job, crate::jobs::Job::Read { .. });
    let range = ByteRange { offset: 0, len: 4096 };
    assert_eq!(rig.submit(Io::Read { range }).1, Submitted::Later);
    let small: Disk = Arc::new(rig.store.create(&FileId::Slot(7), DEVICE).unwrap());
    let exchange = rig.order(Command::ExchangeDisk(small));
    while rig.run_one_job() {}
    ok(rig.command(Command::Resize { size_bytes: 2 * DEVICE }));
    rig.hold = |_| false;
    rig.settle();
    let refused = rig.reply(exchange);
    assert!(matches!(refused, Some(Err(Refusal::Invalid(_)))), "{refused:?}");
}
