//! The simulated disk keeps what it promises, and loses what it may.

use super::*;
use crate::store::SegmentName;

const SEGMENT: FileId = FileId::Segment(SegmentName { number: 1, origin: 7 });
const LEN: u64 = 64 * 1024;

fn machine(seed: u64) -> (SimStore, SimFile) {
    let store = SimStore::new(seed, 1 << 20, 1 << 20);
    let file = store.create(&SEGMENT, LEN).unwrap();
    (store, file)
}

fn read(file: &SimFile, offset: u64, len: usize) -> Vec<u8> {
    let mut buffer = vec![0xee; len];
    file.read_at(&mut buffer, offset).unwrap();
    buffer
}

#[test]
fn process_death_keeps_written_bytes_and_kills_handles() {
    let (store, file) = machine(1);
    file.write_at(&[b"abc", b"def"], 5000).unwrap();
    store.crash_process();
    assert!(file.read_at(&mut [0], 0).is_err());
    assert!(store.is_dead());
    let store = store.restart();
    assert_eq!(read(&store.open(&SEGMENT).unwrap(), 5000, 6), b"abcdef");
}

#[test]
fn power_loss_keeps_only_synced_bytes_and_entries() {
    let (store, file) = machine(2);
    file.write_at(&[&[1; 8192]], 0).unwrap();
    file.sync().unwrap();
    file.write_at(&[&[2; 8192]], 4096).unwrap();
    store.remove(&SEGMENT).unwrap();
    store.power_loss(Survival::OnlySynced);
    let store = store.restart();
    let file = store.open(&SEGMENT).unwrap();
    assert_eq!(read(&file, 0, 8192), [1; 8192]);
    assert_eq!(read(&file, 8192, 4096), [0; 4096]);
}

#[test]
fn torn_power_loss_destroys_sectors_but_never_synced_neighbours() {
    let mut torn = 0;
    for seed in 0..50 {
        let (store, file) = machine(seed);
        file.write_at(&[&[1; 4096]], 0).unwrap();
        file.sync().unwrap();
        file.write_at(&[&[2; 1024]], 1024).unwrap();
        store.power_loss(Survival::Torn);
        let store = store.restart();
        let bytes = read(&store.open(&SEGMENT).unwrap(), 0, 4096);
        assert!(
            bytes[..1024].iter().chain(&bytes[2048..]).all(|byte| *byte == 1),
            "seed {seed}"
        );
        torn += bytes[1024..2048]
            .chunks(512)
            .filter(|s| s.iter().any(|byte| *byte != s[0]))
            .count();
    }
    assert!(torn > 0, "some sector was torn in 50 runs");
}

#[test]
fn a_failed_sync_loses_its_bytes_although_the_next_one_succeeds() {
    let (store, file) = machine(3);
    file.write_at(&[&[7; 4096]], 0).unwrap();
    store.fail_next_sync();
    assert!(file.sync().is_err());
    assert_eq!(read(&file, 0, 4096), [7; 4096], "still in the cache");
    file.write_at(&[&[8; 512]], 0).unwrap();
    file.sync().unwrap();
    store.power_loss(Survival::Everything);
    let store = store.restart();
    let bytes = read(&store.open(&SEGMENT).unwrap(), 0, 4096);
    assert_eq!(bytes[..512], [8; 512]);
    assert_eq!(bytes[512..], [0; 4096 - 512]);
}

#[test]
fn the_crash_hook_stops_everything_from_that_io_on() {
    let (store, file) = machine(4);
    let next = store.io_count();
    store.crash_at_io(next + 1);
    file.write_at(&[&[1; 16384]], 0).unwrap();
    assert!(file.write_at(&[&[2; 16384]], 0).is_err());
    assert!(file.sync().is_err());
    assert_eq!(store.io_count(), next + 2);
    let store = store.restart();
    let bytes = read(&store.open(&SEGMENT).unwrap(), 0, 16384);
    let cut = bytes.iter().position(|byte| *byte == 1).unwrap_or(16384);
    assert!(cut % 4096 == 0 && bytes[cut..].iter().all(|byte| *byte == 1));
}

#[test]
fn a_full_store_refuses_creation_and_leaves_no_file() {
    let store = SimStore::new(5, 0, LEN + 1);
    store.create(&SEGMENT, LEN).unwrap();
    let second = FileId::Segment(SegmentName { number: 2, origin: 7 });
    assert_eq!(
        store.create(&second, LEN).unwrap_err().kind(),
        io::ErrorKind::StorageFull
    );
    assert_eq!(store.list().unwrap(), vec![SEGMENT]);
    assert_eq!(
        store.create(&SEGMENT, 1).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    assert_eq!(store.free_bytes().unwrap(), 1);
}

#[test]
fn a_crash_anywhere_in_creation_leaves_no_file_or_a_zero_one() {
    for step in 0..4 {
        for survival in [
            Survival::OnlySynced,
            Survival::Some,
            Survival::Torn,
            Survival::Everything,
        ] {
            let store = SimStore::new(step, 0, 1 << 20);
            store.crash_at_io(store.io_count() + step);
            assert!(store.create(&SEGMENT, LEN).is_err());
            store.power_loss(survival);
            let store = store.restart();
            if let Ok(file) = store.open(&SEGMENT) {
                let len = usize::try_from(file.size().unwrap()).unwrap();
                assert!(read(&file, 0, len).iter().all(|byte| *byte == 0));
            }
        }
    }
}

#[test]
fn data_ranges_are_what_was_written() {
    let (_store, file) = machine(6);
    assert_eq!(file.next_data(0).unwrap(), None);
    file.write_at(&[&[1; 8192]], 8192).unwrap();
    assert_eq!(
        file.next_data(0).unwrap(),
        Some(ByteRange {
            offset: 8192,
            len: 8192
        })
    );
    assert_eq!(
        file.next_data(9000).unwrap(),
        Some(ByteRange {
            offset: 9000,
            len: 16384 - 9000
        })
    );
    assert_eq!(file.next_data(16384).unwrap(), None);
}

#[test]
fn one_seed_gives_one_machine() {
    let run = |seed| {
        let (store, file) = machine(seed);
        for i in 0..40_u8 {
            file.write_at(&[&[i; 700]], u64::from(i) * 600).unwrap();
            if i % 7 == 0 {
                file.sync().unwrap();
            }
        }
        store.power_loss(Survival::Torn);
        store.digest()
    };
    assert_eq!(run(9), run(9));
    assert_ne!(run(9), run(10));
}

#[test]
fn the_trace_tells_every_io_in_order() {
    let (store, file) = machine(11);
    store.set_trace(true);
    file.write_at(&[b"x"], 3).unwrap();
    file.sync().unwrap();
    store.inject_next(Op::Read, None, Injected::Error(io::ErrorKind::Other));
    assert!(file.read_at(&mut [0], 0).is_err());
    let trace = store.take_trace();
    let seen: Vec<(Op, bool)> = trace.iter().map(|event| (event.op, event.ok)).collect();
    assert_eq!(seen, [(Op::Write, true), (Op::Sync, true), (Op::Read, false)]);
    assert_eq!(trace[0].range, ByteRange { offset: 3, len: 1 });
}
