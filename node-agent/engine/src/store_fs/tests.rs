//! Real files behave as the engine expects of a store.

use super::*;

fn replica(data_bytes: u64) -> (tempfile::TempDir, FsStore) {
    let dir = tempfile::tempdir().unwrap();
    let data_path = dir.path().join("data");
    let data = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&data_path)
        .unwrap();
    data.set_len(data_bytes).unwrap();
    FsStore::create_layout(dir.path()).unwrap();
    FsStore::create_layout(dir.path()).unwrap();
    let store = FsStore::open(dir.path(), data).unwrap();
    (dir, store)
}

const NAME: SegmentName = SegmentName {
    number: 12,
    origin: 0xab,
};

#[test]
fn a_created_file_is_all_zeros_with_all_blocks_and_is_never_replaced() {
    use std::os::unix::fs::MetadataExt;
    let (dir, store) = replica(0);
    let id = FileId::Segment(NAME);
    let file = store.create(&id, 3 << 20).unwrap();
    assert_eq!(file.size().unwrap(), 3 << 20);
    let path = dir.path().join("log/log-000000012-000000ab");
    assert!(std::fs::read(&path).unwrap().iter().all(|byte| *byte == 0));
    assert!(
        std::fs::metadata(&path).unwrap().blocks() * 512 >= 3 << 20,
        "blocks are allocated"
    );
    assert_eq!(store.create(&id, 1).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(store.list().unwrap(), vec![id.clone()]);
    store.remove(&id).unwrap();
    store.remove(&id).unwrap();
    store.sync_dir().unwrap();
    assert!(store.list().unwrap().is_empty());
    assert_eq!(store.open(&id).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn any_number_of_parts_is_written_behind_one_another() {
    let (_dir, store) = replica(1 << 20);
    let data = store.open(&FileId::Data).unwrap();
    for count in [1, 2, 3, 4, 7, 1030, 3000] {
        let parts: Vec<Vec<u8>> = (0..count)
            .map(|i| vec![u8::try_from(i % 251).unwrap(); i % 5])
            .collect();
        let slices: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let whole = parts.concat();
        data.write_at(&slices, 77).unwrap();
        let mut back = vec![0; whole.len()];
        data.read_at(&mut back, 77).unwrap();
        assert_eq!(back, whole, "{count} parts");
    }
    data.sync().unwrap();
    assert_eq!(
        data.read_at(&mut [0; 2], (1 << 20) - 1).unwrap_err().kind(),
        io::ErrorKind::UnexpectedEof
    );
}

#[test]
fn zeroed_ranges_read_as_zeros_and_holes_are_skipped() {
    let (_dir, store) = replica(1 << 20);
    let data = store.open(&FileId::Data).unwrap();
    assert_eq!(data.next_data(0).unwrap(), None);
    data.write_at(&[&vec![7; 128 << 10]], 256 << 10).unwrap();
    let range = data.next_data(0).unwrap().unwrap();
    assert!(range.offset <= 256 << 10 && range.end() >= 384 << 10);
    data.zero_range((256 << 10) + 512, (128 << 10) - 1024).unwrap();
    data.zero_range(0, 0).unwrap();
    let mut back = vec![1; 128 << 10];
    data.read_at(&mut back, 256 << 10).unwrap();
    let edges = [&back[..512], &back[(128 << 10) - 512..]].concat();
    assert!(back[512..(128 << 10) - 512].iter().all(|byte| *byte == 0));
    assert_eq!(edges, [7; 1024]);
    assert_eq!(data.next_data(1 << 20).unwrap(), None);
}

#[test]
fn a_missing_layout_is_an_error_and_stays_missing() {
    let dir = tempfile::tempdir().unwrap();
    let data = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(dir.path().join("data"))
        .unwrap();
    let error = FsStore::open(dir.path(), data).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    assert!(error.to_string().contains("log"), "{error}");
    assert!(!dir.path().join("log").exists());
}

#[test]
fn only_names_that_are_written_are_read() {
    assert_eq!(parse_segment_name("log-000000012-000000ab"), Some(NAME));
    assert_eq!(
        parse_segment_name("log-4000000000-ffffffff").unwrap().number,
        4_000_000_000
    );
    for wrong in [
        "log-12-000000ab",
        "log-000000012-ab",
        "log-000000012-000000AB",
        "log-+00000012-000000ab",
        "slot-0",
    ] {
        assert_eq!(parse_segment_name(wrong), None, "{wrong}");
    }
    let (dir, store) = replica(0);
    std::fs::write(dir.path().join("log/notes.txt"), "mine").unwrap();
    assert!(store.list().unwrap().is_empty());
    assert!(store.free_bytes().unwrap() > 0);
}

/// Writer, scan, rewrite and reader on a real file system: what one process wrote, the next one finds.
#[test]
fn a_log_on_real_files_is_found_again_by_the_next_process() {
    use crate::api::Compression;
    use crate::format::record::RecordKind;
    use crate::format::segment::LogIdentity;
    use crate::lineage::{Cause, EpochEntry, Lineage};
    use crate::log::reader::{LogReader, Next};
    use crate::log::scan::{ScanParams, Verdict, scan};
    use crate::log::writer::LogState;
    use crate::log::{AppendError, LogWriter};
    use crate::types::{ClusterId, EpochId, Lamport, Lsn, Position, ReplicaId, ResourceId};

    const SEGMENT_BYTES: u64 = 256 << 10;
    let (dir, store) = replica(0);
    let replica = ReplicaId(uuid::Uuid::from_u128(7 << 96));
    let identity = LogIdentity {
        cluster: ClusterId::default(),
        resource: ResourceId::default(),
        replica,
    };
    let (id, parent) = (EpochId(uuid::Uuid::from_u128(1)), Position::default());
    let epoch = EpochEntry {
        id,
        parent,
        origin: replica,
        cause: Cause::Create,
        lamport: Lamport(1),
    };
    let start = Position {
        epoch: epoch.id,
        ..Position::default()
    };
    let mut writer: LogWriter<FsStore> = LogWriter::new(LogState::empty(identity, 1, epoch, start), Compression::Lz4);
    let mut payloads = Vec::new();
    for round in 0..120_u8 {
        let payload = bytes::Bytes::from(vec![round; 512 * (1 + usize::from(round % 13))]);
        let range = ByteRange {
            offset: 0,
            len: payload.len() as u64,
        };
        let lamport = Lamport(u64::from(round) + 2);
        while let Err(error) = writer.append(RecordKind::Write, 0, range, payload.clone(), lamport) {
            assert!(matches!(error, AppendError::NeedSegment), "{error}");
            let name = writer.next_prepared().unwrap();
            let file = store.create(&FileId::Segment(name), SEGMENT_BYTES).unwrap();
            assert!(writer.add_prepared(name, file, SEGMENT_BYTES));
        }
        payloads.push(payload);
        if round % 50 == 49 {
            let files = writer.begin_sync().unwrap();
            files.iter().try_for_each(StoreFile::sync).unwrap();
            writer.sync_done(Ok(()));
        }
    }
    let (appended, durable) = (writer.appended(), writer.durable());
    assert!(durable.lsn < appended.lsn);
    drop((writer, store));
    let data = File::options()
        .read(true)
        .write(true)
        .open(dir.path().join("data"))
        .unwrap();
    let store = FsStore::open(dir.path(), data).unwrap();
    let found = scan(
        &store,
        &ScanParams {
            identity,
            from: start,
            first_segment: 1,
        },
        &mut |_, _| {},
    )
    .unwrap();
    assert_eq!(
        (found.end, found.decide(durable.lsn, true)),
        (appended, Verdict::Continue)
    );
    let (obsolete, state) = found.into_state();
    let mut writer: LogWriter<FsStore> = LogWriter::new(state, Compression::None);
    let done = writer.begin_rewrite(SEGMENT_BYTES).unwrap().run(&store).unwrap();
    let removed = obsolete.into_iter().chain(writer.finish_rewrite(done));
    removed.for_each(|name| store.remove(&FileId::Segment(name)).unwrap());
    let view = writer.view(Lineage::default());
    assert_eq!(view.durable, appended);
    let mut reader = LogReader::open(store, &view, start).unwrap();
    let mut read = Vec::new();
    while let Next::Records(chunk) = reader.next(&view, Lsn(u64::MAX), 64 << 10).unwrap() {
        read.extend(chunk.into_records().into_iter().map(|record| record.payload));
    }
    assert_eq!(read, payloads);
}

#[test]
fn a_spare_is_taken_only_when_nobody_has_it_open_and_keeps_its_blocks() {
    let (dir, store) = replica(0);
    let (old, spare) = (FileId::Segment(NAME), FileId::Spare(NAME));
    let new = FileId::Segment(SegmentName { number: 13, ..NAME });
    let file = store.create(&old, 8192).unwrap();
    file.write_at(&[b"content"], 4096).unwrap();
    let reader = store.open(&old).unwrap();
    store.rename(&old, &spare).unwrap();
    assert!(dir.path().join("log/spare-000000012-000000ab").exists());
    assert_eq!(store.list().unwrap(), vec![spare.clone()]);
    assert!(store.open_alone(&spare).unwrap().is_none(), "its writer has it open");
    drop(file);
    assert!(store.open_alone(&spare).unwrap().is_none(), "a reader has it open");
    let other = FsStore::open(dir.path(), tempfile::tempfile().unwrap()).unwrap();
    assert!(other.open_alone(&spare).unwrap().is_none(), "whoever asks");
    drop(reader);
    let alone = store.open_alone(&spare).unwrap().expect("nobody has it open");
    assert!(store.open_alone(&spare).unwrap().is_none(), "it is taken");
    store.rename(&spare, &new).unwrap();
    let opened = store.open(&new).unwrap();
    let mut content = [0; 7];
    opened.read_at(&mut content, 4096).unwrap();
    assert_eq!(&content, b"content");
    assert_eq!(alone.size().unwrap(), 8192);
    // A name is never taken from a file that has it.
    store.create(&old, 4096).unwrap();
    assert_eq!(
        store.rename(&old, &new).unwrap_err().kind(),
        io::ErrorKind::AlreadyExists
    );
    assert_eq!(store.open_alone(&spare).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn a36_a_detached_data_disk_is_closed_and_untouched_until_it_is_attached_again() {
    let (dir, store) = replica(1 << 20);
    let path = dir.path().join("data");
    let open = || File::options().read(true).write(true).open(&path).unwrap();
    // What the engine has opened before goes with it.
    let data = store.open(&FileId::Data).unwrap();
    data.write_at(&[b"before"], 0).unwrap();
    store.detach_data().unwrap();
    store.detach_data().unwrap();
    assert_eq!(data.size().unwrap(), 1 << 20, "the size is known nevertheless");
    let mut buffer = [0; 6];
    let refused = [
        data.read_at(&mut buffer, 0),
        data.write_at(&[b"lost"], 0),
        data.zero_range(0, 4096),
        data.sync(),
        data.next_data(0).map(drop),
    ];
    for error in refused.map(Result::unwrap_err) {
        assert_eq!(error.kind(), io::ErrorKind::NotConnected);
        assert!(error.to_string().contains("attach"), "{error}");
    }
    let opened = || {
        let links = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        links
            .filter_map(|link| std::fs::read_link(link.path()).ok())
            .any(|target| target == path)
    };
    assert!(!opened(), "nobody holds it");
    store.attach_data(open()).unwrap();
    assert!(opened());
    data.read_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"before");
    drop((data, store));
    let store = FsStore::open_detached(dir.path(), 4096).unwrap();
    assert_eq!(store.open(&FileId::Data).unwrap().size().unwrap(), 4096);
}
