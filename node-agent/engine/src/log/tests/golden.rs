//! The format byte by byte: if one of these fails, logs that exist can no longer be read, and the version must change.

use super::*;
use crate::format::batch::{BATCH_HEADER_BYTES, BatchHeader};
use crate::format::record::{HEADER_LEN, RawHeader, RecordHeader};
use crate::format::segment::{FIRST_BATCH_OFFSET, SEGMENT_HEADER_BYTES, SegmentHeader};
use crate::format::{FORMAT_VERSION, FormatError, crc32c};
use crate::types::Chain;
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn header() -> SegmentHeader {
    let parent = Position {
        epoch: EpochId(Uuid::from_u128(0x0a0b)),
        lsn: Lsn(0x1122),
        chain: Chain([0xcc; 32]),
    };
    SegmentHeader {
        identity: identity(),
        name: SegmentName {
            number: 7,
            origin: identity().origin(),
        },
        previous: 6,
        start_lsn: Lsn(0x3344_5566),
        start_chain: Chain([0xdd; 32]),
        first_sequence: Some(42),
        durable: Lsn(0x3344_0000),
        lamport: Lamport(0x0102_0304_0506_0708),
        epoch: epoch(3, parent, Cause::Failover),
    }
}

fn batch() -> BatchHeader {
    BatchHeader {
        segment: SegmentName {
            number: 7,
            origin: 0xabcd_0123,
        },
        file_offset: 0x3000,
        start: Position {
            epoch: EpochId(Uuid::from_u128(0xee)),
            lsn: Lsn(0x99),
            chain: Chain([0x11; 32]),
        },
        first_sequence: 5,
        durable: Lsn(0x88),
        compression: Compression::Zstd,
    }
}

fn record() -> RecordHeader {
    RecordHeader {
        kind: RecordKind::Write,
        flags: 1,
        offset: 0x1000,
        len: 3,
        sequence: 0x0000_aabb_ccdd_eeff,
        lamport: Lamport(0x0102_0304_0506_0708),
    }
}

#[test]
fn the_checksum_is_crc32c() {
    assert_eq!(crc32c(&[b"123456789"]), 0xe306_9283);
    assert_eq!(crc32c(&[b"1234", b"", b"56789"]), 0xe306_9283);
}

#[test]
fn the_segment_header_has_not_changed() {
    let (bytes, crc) = header().encode();
    assert_eq!(hex(&bytes[..16]), "4d4152535345474d0100000000000000");
    assert_eq!(
        hex(&bytes[16..64]),
        "000000000000000000000000000000c10000000000000000000000000000004eabcd0123000000000000000000000000"
    );
    assert_eq!(hex(&bytes[64..88]), "070000002301cdab06000000000000006655443300000000");
    assert_eq!(hex(&bytes[88..120]), "dd".repeat(32));
    assert_eq!(
        hex(&bytes[120..144]),
        "2a0000000000000000004433000000000807060504030201"
    );
    assert_eq!(
        hex(&bytes[144..184]),
        "00000000000000000000000000e00003abcd01230000000000000000000000000300000000000000"
    );
    assert_eq!(
        hex(&bytes[184..208]),
        "00000000000000000000000000000a0b2211000000000000"
    );
    assert_eq!(hex(&bytes[208..240]), "cc".repeat(32));
    assert_eq!(bytes[240], 3);
    assert!(bytes[241..508].iter().all(|byte| *byte == 0));
    assert_eq!(bytes[508..], crc.to_le_bytes());
    assert_eq!(crc, crc32c(&[&bytes[..508]]));
    assert_eq!(SegmentHeader::decode(&bytes).unwrap(), (header(), crc));
}

#[test]
fn the_batch_header_has_not_changed() {
    let (bytes, crc) = batch().encode(0x0102_0304);
    assert_eq!(hex(&bytes[..24]), "4d42415402000000070000002301cdab0300000000000000");
    assert_eq!(
        hex(&bytes[24..64]),
        "990000000000000005000000000000008800000000000000000000000000000000000000000000ee"
    );
    assert_eq!(hex(&bytes[64..96]), "11".repeat(32));
    assert!(bytes[96..124].iter().all(|byte| *byte == 0));
    assert_eq!(crc, crc32c(&[&[4, 3, 2, 1], &bytes[..124]]));
    assert_eq!(bytes[124..], crc.to_le_bytes());
    assert_eq!(BatchHeader::decode(&bytes, 0x0102_0304).unwrap(), (batch(), crc));
    assert_eq!(BatchHeader::decode(&bytes, 0x0102_0305), Err(FormatError::Checksum));
}

#[test]
fn the_record_header_has_not_changed() {
    let bytes = record().encode(b"abc", 0x0a0b_0c0d);
    let fixed = "0101ffeeddccbbaa0010000000000000030000000000000008070605040302010300000";
    assert_eq!(hex(&bytes[..36]), format!("{fixed}0"));
    assert_eq!(
        bytes[36..],
        crc32c(&[&[0x0d, 0x0c, 0x0b, 0x0a], &bytes[..36], b"abc"]).to_le_bytes()
    );
    let raw = RawHeader::parse(&bytes).unwrap();
    assert_eq!((raw.header, raw.stored_len), (record(), 3));
    assert!(raw.is_intact(b"abc", 0x0a0b_0c0d));
    assert!(!raw.is_intact(b"abd", 0x0a0b_0c0d));
    assert!(!raw.is_intact(b"abc", 0x0a0b_0c0e));
}

/// A whole segment: where the pieces stand.
#[test]
fn a_segment_has_not_changed() {
    let store = SimStore::new(0, 0, 1 << 20);
    let mut driver = Driver::begin(&store, 1, Compression::None);
    let range = |offset, len| ByteRange { offset, len };
    driver
        .append_this(RecordKind::Write, range(4096, 512), &Bytes::from(vec![0xaa; 512]))
        .unwrap();
    driver
        .append_this(RecordKind::Discard, range(8192, 4096), &Bytes::new())
        .unwrap();
    driver.sync().unwrap();
    driver
        .append_this(RecordKind::Marker, range(0, 4), &Bytes::from_static(b"name"))
        .unwrap();
    let name = driver.writer.segments()[0].name;
    assert_eq!(name.to_string(), "log-000000001-abcd0123");
    let bytes = store.peek(&FileId::Segment(name)).unwrap();
    let second = 4096 + usize::try_from(FIRST_BATCH_OFFSET).unwrap();
    assert_eq!(&bytes[4096..4100], b"MBAT");
    assert_eq!(bytes[4096 + 128], RecordKind::Write as u8);
    assert_eq!(bytes[4096 + 128 + 40 + 512], RecordKind::Discard as u8);
    assert_eq!(&bytes[second..second + 4], b"MBAT");
    assert_eq!(
        bytes[second + 40..second + 48],
        (40_u64 + 512 + 40).to_le_bytes(),
        "the second batch knows the first as durable"
    );
    assert_eq!(&bytes[second + 168..second + 172], b"name");
    assert_eq!(
        blake3::hash(&bytes).to_hex().as_str(),
        "424dc67b4b1bd665c2dfff7a526f6edb8240c5f0e17b017966d6928e8002b36d"
    );
    assert_eq!(driver.writer.appended().chain.to_string(), "08774e63aebcd2c2");
}

#[test]
fn newer_versions_are_refused_by_name_and_damage_is_told_apart() {
    let (mut bytes, _) = header().encode();
    bytes[8] = 2;
    assert_eq!(
        SegmentHeader::decode(&bytes),
        Err(FormatError::Checksum),
        "a flipped version bit is damage"
    );
    let crc = crc32c(&[&bytes[..508]]);
    bytes[508..].copy_from_slice(&crc.to_le_bytes());
    let error = SegmentHeader::decode(&bytes).unwrap_err();
    assert_eq!(
        error,
        FormatError::Newer {
            found: FORMAT_VERSION + 1
        }
    );
    assert!(error.to_string().contains("newer"));
    assert_eq!(
        SegmentHeader::decode(&[0; SEGMENT_HEADER_BYTES]),
        Err(FormatError::Zero)
    );
    assert_eq!(
        SegmentHeader::decode(&[9; SEGMENT_HEADER_BYTES]),
        Err(FormatError::Magic)
    );
}

#[test]
fn reserved_bytes_must_be_zero() {
    for at in (10..16).chain(76..80).chain(241..508) {
        let (mut bytes, _) = header().encode();
        bytes[at] = 1;
        let crc = crc32c(&[&bytes[..508]]);
        bytes[508..].copy_from_slice(&crc.to_le_bytes());
        assert!(
            matches!(SegmentHeader::decode(&bytes), Err(FormatError::Field(_))),
            "byte {at}"
        );
    }
    for at in (5..8).chain(96..124) {
        let (mut bytes, _) = batch().encode(1);
        bytes[at] = 1;
        let crc = crc32c(&[&1_u32.to_le_bytes(), &bytes[..124]]);
        bytes[124..].copy_from_slice(&crc.to_le_bytes());
        assert!(
            matches!(BatchHeader::decode(&bytes, 1), Err(FormatError::Field(_))),
            "byte {at}"
        );
    }
}

fn any_position() -> impl Strategy<Value = Position> {
    (any::<u128>(), any::<u64>(), any::<[u8; 32]>()).prop_map(|(id, lsn, chain)| Position {
        epoch: EpochId(Uuid::from_u128(id)),
        lsn: Lsn(lsn),
        chain: Chain(chain),
    })
}

proptest! {
    #[test]
    fn segment_headers_round_trip(
        parent in any_position(), ahead in any::<u32>(), numbers in any::<[u64; 3]>(), names in any::<[u32; 3]>(),
        chain in any::<[u8; 32]>(), cause in 1..=5_u8, known in any::<bool>()
    ) {
        let header = SegmentHeader {
            name: SegmentName { number: names[0], origin: names[1] },
            previous: names[2],
            start_lsn: Lsn(parent.lsn.0.saturating_add(u64::from(ahead))),
            start_chain: Chain(chain),
            first_sequence: known.then_some(numbers[0] >> 1),
            durable: Lsn(numbers[1]),
            lamport: Lamport(numbers[2]),
            epoch: epoch(numbers[0], parent, Cause::from_number(cause).unwrap()),
            ..header()
        };
        let (bytes, crc) = header.encode();
        prop_assert_eq!(SegmentHeader::decode(&bytes).unwrap(), (header, crc));
    }

    #[test]
    fn batch_headers_round_trip(
        start in any_position(), numbers in any::<[u64; 2]>(), block in any::<u32>(), seed in any::<u32>()
    ) {
        let header = BatchHeader {
            file_offset: u64::from(block) * 4096, start, first_sequence: numbers[0], durable: Lsn(numbers[1]), ..batch()
        };
        let (bytes, crc) = header.encode(seed);
        prop_assert_eq!(BatchHeader::decode(&bytes, seed).unwrap(), (header, crc));
        prop_assert_eq!(bytes.len(), BATCH_HEADER_BYTES);
    }

    #[test]
    fn record_headers_round_trip(
        kind in 1..=8_u8, flags in 0..=1_u8, offset in any::<u32>(), sequence in 0..1_u64 << 48, lamport in any::<u64>(),
        payload in prop::collection::vec(any::<u8>(), 1..600), seed in any::<u32>()
    ) {
        let kind = RecordKind::from_number(kind).unwrap();
        let stored: &[u8] = if kind.has_payload() { &payload } else { &[] };
        let header = RecordHeader {
            kind, flags, offset: u64::from(offset), len: payload.len() as u64, sequence, lamport: Lamport(lamport)
        };
        let bytes = header.encode(stored, seed);
        let raw = RawHeader::parse(&bytes).unwrap();
        prop_assert_eq!(raw.header, header);
        prop_assert_eq!(raw.stored_len, stored.len());
        prop_assert!(raw.is_intact(stored, seed));
    }

    /// Whatever stands where a record should be: no panic, and never taken for one of another batch.
    #[test]
    fn arbitrary_bytes_are_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 512..=512)) {
        let _ = RawHeader::parse(&bytes[..HEADER_LEN]);
        let _ = BatchHeader::decode(&bytes, 1);
        let _ = SegmentHeader::decode(bytes[..].try_into().unwrap());
    }
}
