//! Everything that is sent arrives as it was; whatever else arrives is refused.

use super::*;
use mars_engine::replication::LogChunk;
use mars_engine::replication::messages::BlockRun;
use mars_engine::types::ByteRange;

fn epoch(number: u128) -> EpochEntry {
    EpochEntry {
        id: EpochId(Uuid::from_u128(number)),
        parent: Position {
            epoch: EpochId(Uuid::from_u128(number - 1)),
            lsn: Lsn(77),
            chain: Chain([5; 32]),
        },
        origin: ReplicaId(Uuid::from_u128(9)),
        cause: Cause::Handover,
        lamport: Lamport(123),
    }
}

fn place(lsn: u64) -> Position {
    Position {
        epoch: EpochId(Uuid::from_u128(2)),
        lsn: Lsn(lsn),
        chain: Chain([1; 32]),
    }
}

fn status() -> PeerStatus {
    let lineage = Lineage(vec![epoch(1), epoch(2)]);
    PeerStatus {
        role: Role::Closing,
        data: DataState::LogLost,
        designation: Designation {
            number: 4,
            id: Uuid::from_u128(44),
        },
        durable: place(900),
        durable_time: Lamport(11),
        applied: place(500),
        applied_time: Lamport(10),
        dirty_end: Lsn(600),
        log_start: Lsn(100),
        size_bytes: 1 << 30,
        lineage: lineage.clone(),
        follows: Some(Followed {
            leader: ReplicaId(Uuid::from_u128(8)),
            designation: Designation {
                number: 5,
                id: Uuid::from_u128(55),
            },
            durable: place(1000),
            durable_time: Lamport(12),
            lineage,
        }),
    }
}

fn header_of() -> Header {
    Header {
        version: 1,
        cluster: mars_engine::types::ClusterId(Uuid::from_u128(1)),
        resource: mars_engine::types::ResourceId(Uuid::from_u128(2)),
        from: ReplicaId(Uuid::from_u128(3)),
        to: ReplicaId(Uuid::from_u128(4)),
        lamport: Lamport(5),
    }
}

#[test]
fn a_status_arrives_as_it_was_sent() {
    let message = status_out(&header_of(), &status());
    assert_eq!(header(message.header.as_ref()), Ok(header_of()));
    assert_eq!(status_in(&message), Ok(status()));
}

#[test]
fn a_status_with_a_missing_or_short_field_is_refused_by_name() {
    let good = status_out(&header_of(), &status());
    let bad = pb::StatusMessage {
        durable: None,
        ..good.clone()
    };
    assert_eq!(status_in(&bad), Err(Malformed("position")));
    let bad = pb::StatusMessage {
        role: 77,
        ..good.clone()
    };
    assert_eq!(status_in(&bad), Err(Malformed("role")));
    let mut bad = good;
    bad.applied.as_mut().unwrap().chain = Bytes::from_static(b"short");
    assert_eq!(status_in(&bad), Err(Malformed("chain")));
}

#[test]
fn every_refusal_arrives_with_its_reason() {
    let all = [
        Refused::WrongCluster {
            ours: mars_engine::types::ClusterId(Uuid::from_u128(1)),
            theirs: mars_engine::types::ClusterId(Uuid::from_u128(2)),
        },
        Refused::NotMember { detail: "x".into() },
        Refused::Version { min: 1, max: 2 },
        Refused::ClockAhead { ahead_s: 9 },
        Refused::Unprovable {
            at: place(7),
            have: "y".into(),
        },
        Refused::Fork {
            at: Lsn(1),
            since: Lamport(2),
            caller_bytes: 3,
            source_bytes: 4,
        },
        Refused::TooOld {
            at: Lsn(1),
            log_start: Lsn(2),
        },
        Refused::Behind {
            at: Lsn(3),
            durable: Lsn(2),
        },
        Refused::Inconsistent {
            state: DataState::Syncing,
        },
        Refused::SessionLost,
        Refused::Defect {
            at: Lsn(5),
            message: "z".into(),
            stop: None,
        },
        Refused::Io { message: "disk".into() },
        Refused::Busy {
            message: "too much".into(),
        },
    ];
    for refused in all {
        let wire = pb::Refused::from(refused.clone());
        assert_eq!(Refused::try_from(&wire), Ok(refused));
    }
    assert!(Refused::try_from(&pb::Refused { reason: None }).is_err());
}

#[test]
fn records_and_blocks_arrive_compressed_or_not() {
    use mars_engine::format::record::{Record, RecordHeader, RecordKind};
    let header = RecordHeader {
        kind: RecordKind::Write,
        flags: 1,
        offset: 4096,
        len: 8192,
        sequence: 0,
        lamport: Lamport(6),
    };
    let chunk = LogChunk::build(
        place(10),
        vec![Record {
            header,
            payload: vec![3; 8192].into(),
        }],
    )
    .unwrap();
    let claim = ChunkClaim {
        start: chunk.start(),
        end: chunk.end(),
        records: chunk.records().to_vec(),
    };
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        let item = FetchItem::Records(claim.clone());
        assert_eq!(item_in(item_out(item.clone(), compression)).unwrap(), item);
        let run = BlockRun {
            range: ByteRange {
                offset: 4096,
                len: 8192,
            },
            data: Some(vec![7; 8192].into()),
        };
        assert_eq!(run_in(&run_out(run.clone(), compression)).unwrap(), run);
    }
    let zeros = BlockRun {
        range: ByteRange {
            offset: 0,
            len: 1 << 30,
        },
        data: None,
    };
    assert_eq!(run_in(&run_out(zeros.clone(), Compression::Lz4)).unwrap(), zeros);
}

#[test]
fn block_runs_and_wants_that_lie_about_their_length_are_refused() {
    let mut run = run_out(
        BlockRun {
            range: ByteRange { offset: 0, len: 4096 },
            data: Some(vec![7; 4096].into()),
        },
        Compression::None,
    );
    run.range = Some(pb::Range { offset: 0, len: 8192 });
    assert!(run_in(&run).is_err());
    run.range = Some(pb::Range {
        offset: 0,
        len: 1 << 40,
    });
    assert!(run_in(&run).is_err());
    let want = pb::RegionWant {
        range: Some(pb::Range { offset: 0, len: 8192 }),
        have: vec![0; 33].into(),
    };
    assert!(want_in(&want).is_err());
    let want = pb::RegionWant {
        range: Some(pb::Range {
            offset: u64::MAX,
            len: 2,
        }),
        have: Bytes::new(),
    };
    assert!(want_in(&want).is_err());
}
