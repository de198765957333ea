//! Slots under crashes, damage, full disks and newer versions.

use super::*;
use crate::store_sim::{Injected, Op, SimStore, Survival};

type Saved = Vec<u64>;
const SIZE: u64 = 16 << 10;

fn create(seed: u64) -> (SimStore, Slots<SimStore, Saved>) {
    let store = SimStore::new(seed, 0, 1 << 20);
    let slots = Slots::create(&store, SIZE, &vec![0]).unwrap();
    (store, slots)
}

fn load(store: &SimStore) -> Loaded<Saved> {
    Slots::<_, Saved>::open(store).unwrap().1
}

/// A state whose size depends on its number, so that a torn mixture of two is noticed.
fn state(number: u64) -> Saved {
    (0..=number % 300).map(|i| number * 1000 + i).collect()
}

#[test]
fn the_newest_state_is_loaded_whatever_the_number_of_saves() {
    let (store, mut slots) = create(1);
    for number in 0..7 {
        slots.save(&state(number)).unwrap();
        let loaded = load(&store);
        assert_eq!(loaded.state, state(number));
        assert!(!loaded.is_fallback());
    }
}

#[test]
fn a_crash_at_every_io_of_every_save_leaves_the_state_before_or_after() {
    let saves = 6;
    let (store, mut slots) = create(0);
    let first_io = store.io_count();
    (1..=saves).for_each(|number| slots.save(&state(number)).unwrap());
    let last_io = store.io_count();
    for io in first_io..last_io {
        for survival in [
            None,
            Some(Survival::OnlySynced),
            Some(Survival::Some),
            Some(Survival::Torn),
        ] {
            for seed in 0..8 {
                let (store, mut slots) = create(seed);
                store.crash_at_io(io);
                let done = (1..=saves)
                    .take_while(|number| slots.save(&state(*number)).is_ok())
                    .last();
                if let Some(survival) = survival {
                    store.power_loss(survival);
                }
                let store = store.restart();
                let loaded = load(&store).state;
                let before = done.map_or(vec![0], state);
                let after = state(done.unwrap_or(0) + 1);
                assert!(
                    loaded == before || loaded == after,
                    "seed {seed}, I/O {io}, {survival:?}: {loaded:?}"
                );
            }
        }
    }
}

#[test]
fn an_interrupted_creation_is_repeated_but_slots_in_use_are_never_replaced() {
    let (store, _) = create(0);
    for io in 0..store.io_count() {
        for survival in [Survival::OnlySynced, Survival::Torn, Survival::Everything] {
            let store = SimStore::new(io, 0, 1 << 20);
            store.crash_at_io(io);
            assert!(Slots::create(&store, SIZE, &state(1)).is_err());
            store.power_loss(survival);
            let store = store.restart();
            if let Err(error) = Slots::create(&store, SIZE, &state(1)) {
                let saved =
                    matches!(&error, SlotError::Io { source, .. } if source.kind() == io::ErrorKind::AlreadyExists);
                assert!(saved, "I/O {io}, {survival:?}: {error}");
            }
        }
    }
    assert!(Slots::create(&store, SIZE, &state(1)).is_err());
    assert_eq!(load(&store).state, vec![0]);
}

/// A process dies between write and sync; the next one finds its bytes in the page cache only, and the power fails while it saves.
#[test]
fn a_state_that_only_the_page_cache_holds_never_costs_both_slots() {
    for seed in 0..400 {
        let (store, mut slots) = create(seed);
        slots.save(&state(1)).unwrap();
        let write = slots.prepare(&state(2)).unwrap();
        // The write is done, the sync is not.
        store.crash_at_io(store.io_count() + 1);
        assert!(write.run().is_err());
        let store = store.restart();
        let (mut slots, loaded) = Slots::<_, Saved>::open(&store).unwrap();
        assert_eq!(loaded.state, state(2));
        store.crash_at_io(store.io_count() + 1);
        assert!(slots.save(&state(3)).is_err());
        store.power_loss(Survival::Torn);
        let loaded = load(&store.restart()).state;
        assert!(loaded == state(2) || loaded == state(3), "seed {seed}: {loaded:?}");
    }
}

#[test]
fn damage_of_one_slot_is_named_and_falls_back() {
    let (store, mut slots) = create(2);
    slots.save(&state(1)).unwrap();
    slots.save(&state(2)).unwrap();
    // Generation 3 is in slot 0.
    store.flip_bit(&FileId::Slot(0), 8 * 40 + 3);
    let loaded = load(&store);
    assert_eq!(loaded.state, state(1));
    assert!(loaded.is_fallback());
    assert_eq!(loaded.bad.unwrap().index, 0);
    store.flip_bit(&FileId::Slot(1), 8 * 20);
    let error = Slots::<_, Saved>::open(&store).unwrap_err();
    assert!(matches!(error, SlotError::BothBad(..)), "{error}");
}

#[test]
fn every_flipped_bit_is_found() {
    let (store, mut slots) = create(3);
    slots.save(&state(1)).unwrap();
    slots.save(&state(4)).unwrap();
    let used = (HEADER_BYTES + serde_json::to_vec(&state(4)).unwrap().len()) as u64;
    for bit in 0..used * 8 {
        store.flip_bit(&FileId::Slot(0), bit);
        match Slots::<_, Saved>::open(&store) {
            Ok((_, loaded)) => assert!(
                loaded.is_fallback() && loaded.state == state(1),
                "bit {bit} went unnoticed"
            ),
            Err(error) => panic!("bit {bit}: {error}"),
        }
        store.flip_bit(&FileId::Slot(0), bit);
    }
}

#[test]
fn a_failed_save_is_repeated_into_the_same_slot_and_the_good_one_stays() {
    for fault in [
        Injected::Error(io::ErrorKind::Other),
        Injected::Torn(io::ErrorKind::Other),
    ] {
        for op in [Op::Write, Op::Sync] {
            for seed in 0..20 {
                let (store, mut slots) = create(seed);
                slots.save(&state(1)).unwrap();
                store.inject_next(op, None, fault);
                assert!(slots.save(&state(2)).is_err());
                store.inject_next(op, None, fault);
                assert!(slots.save(&state(2)).is_err());
                store.power_loss(Survival::Torn);
                let store = store.restart();
                let (mut slots, loaded) = Slots::<_, Saved>::open(&store).unwrap();
                assert!(
                    [state(1), state(2)].contains(&loaded.state),
                    "seed {seed}: {:?}",
                    loaded.state
                );
                slots.save(&state(5)).unwrap();
                slots.save(&state(6)).unwrap();
                assert_eq!(load(&store).state, state(6));
            }
        }
    }
}

#[test]
fn saving_works_on_a_full_file_system() {
    let (store, mut slots) = create(4);
    store.set_log_capacity(0);
    slots.save(&state(9)).unwrap();
    assert_eq!(load(&store).state, state(9));
}

#[test]
fn missing_slots_are_never_created_by_opening() {
    let store = SimStore::new(5, 0, 1 << 20);
    let error = Slots::<_, Saved>::open(&store).unwrap_err();
    assert!(
        matches!(&error, SlotError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound),
        "{error}"
    );
    assert!(store.peek(&FileId::Slot(0)).is_none());
}

#[test]
fn a_newer_version_is_refused_and_a_too_large_state_too() {
    let (store, mut slots) = create(6);
    let error = slots.save(&(0..10_000).collect()).unwrap_err();
    assert!(matches!(error, SlotError::TooLarge { .. }), "{error}");
    let mut image = store.peek(&FileId::Slot(0)).unwrap();
    image[8] = 2;
    let len = u32::from_le_bytes(image[12..16].try_into().unwrap()) as usize;
    let crc = crc32c(&[&image[..CRC_AT], &image[HEADER_BYTES..HEADER_BYTES + len]]);
    image[CRC_AT..HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    store.poke(&FileId::Slot(0), 0, &image);
    let error = Slots::<_, Saved>::open(&store).unwrap_err();
    assert!(matches!(error, SlotError::Newer { index: 0, found: 2 }), "{error}");
}
