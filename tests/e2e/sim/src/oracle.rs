//! Remembers every record that was ever durable anywhere, and what a device holds at each point of a history.
//!
//! Invariants it checks: one (epoch, LSN) names one record for ever, on whatever replica it is found (P3, P7, P10); a consistent data disk with
//! nothing under way equals the history up to its applied position, byte for byte (P5, P11); stamps ascend along every history.

use mars_engine::api::LogView;
use mars_engine::format::record::{Record, RecordKind};
use mars_engine::lineage::{EpochEntry, Lineage};
use mars_engine::log::reader::{LogReader, Next};
use mars_engine::store_sim::SimStore;
use mars_engine::types::{EpochId, Lsn, Position};
use std::collections::BTreeMap;

/// All that is known of one epoch.
#[derive(Debug)]
struct Epoch {
    entry: EpochEntry,
    /// By the LSN at which each record begins.
    records: BTreeMap<u64, Record>,
    /// Everything from the start of the epoch up to here is known.
    known_to: Lsn,
}

impl Epoch {
    /// Whatever the clocks of the nodes do: stamps ascend along a history, and its epochs begin between them.
    fn check_stamps(&self, at: Lsn, record: &Record) {
        let stamp = record.header.lamport;
        let before = self
            .records
            .range(..at.0)
            .next_back()
            .map(|(_, record)| record.header.lamport);
        assert!(
            before.unwrap_or(self.entry.lamport) < stamp,
            "the record at {at} of epoch {} is stamped before its predecessor",
            self.entry.id
        );
        let after = self.records.range(at.0 + 1..).next();
        assert!(
            after.is_none_or(|(_, after)| stamp < after.header.lamport),
            "the record at {at} of epoch {} is stamped after its successor",
            self.entry.id
        );
    }

    fn extend(&mut self) {
        while let Some(record) = self.records.get(&self.known_to.0) {
            self.known_to = self.known_to.advance(record.lsn_bytes());
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Oracle {
    epochs: BTreeMap<EpochId, Epoch>,
    device_bytes: usize,
    calls: u64,
    /// Records compared so far, for the report.
    pub records_checked: u64,
}

impl Oracle {
    /// For devices of this size that begin as zeros.
    #[must_use]
    pub fn new(device_bytes: usize) -> Self {
        Self {
            device_bytes,
            ..Self::default()
        }
    }

    /// Learns what this log shows, and compares what is known already.
    ///
    /// # Panics
    /// When a record differs from one that was durable under the same (epoch, LSN), or durable log cannot be read.
    pub fn learn(&mut self, who: usize, store: &SimStore, view: &LogView) {
        for entry in &view.lineage.0 {
            let known = self.epochs.entry(entry.id).or_insert_with(|| Epoch {
                entry: entry.clone(),
                records: BTreeMap::new(),
                known_to: entry.parent.lsn,
            });
            assert_eq!(known.entry, *entry, "node {who} tells another story of an epoch");
        }
        let Some(from) = self.first_unknown(view) else { return };
        let mut reader = match LogReader::open(store.clone(), view, from) {
            Ok(reader) => reader,
            Err(_) if store.is_dead() => return,
            Err(error) => panic!("node {who} cannot prove its own log at {from}: {error}"),
        };
        loop {
            match reader.next(view, view.durable.lsn, 1 << 20) {
                Ok(Next::Records(chunk)) => {
                    let (mut at, epoch) = (chunk.start().lsn, chunk.start().epoch);
                    let known = self
                        .epochs
                        .get_mut(&epoch)
                        .expect("the lineage names every epoch of its log");
                    for record in chunk.records() {
                        let before = known.records.insert(at.0, record.clone());
                        assert!(
                            before.is_none_or(|before| before == *record),
                            "node {who} holds another record at {at} of epoch {epoch}"
                        );
                        known.check_stamps(at, record);
                        at = at.advance(record.lsn_bytes());
                        self.records_checked += 1;
                    }
                    known.extend();
                }
                Ok(Next::Epoch(_)) => {}
                Ok(Next::End) => return,
                Err(_) if store.is_dead() => return,
                Err(error) => panic!("node {who} cannot read its own durable log: {error}"),
            }
        }
    }

    /// The start of the first segment with content that is not known yet; now and then everything is compared again.
    fn first_unknown(&mut self, view: &LogView) -> Option<Position> {
        self.calls += 1;
        if self.calls.is_multiple_of(64) {
            return view.segments.first().map(|segment| segment.start);
        }
        let ends = view.segments.iter().skip(1).map(|next| next.start.lsn);
        let ends = ends.chain([view.durable.lsn]);
        let known =
            |start: Position, end: Lsn| self.epochs.get(&start.epoch).is_some_and(|epoch| end <= epoch.known_to);
        let unknown = view
            .segments
            .iter()
            .zip(ends)
            .find(|(segment, end)| !known(segment.start, *end));
        unknown.map(|(segment, _)| segment.start)
    }

    /// What the device holds at `at` of this history.
    ///
    /// # Panics
    /// When a record in between was never seen.
    #[must_use]
    pub fn content_at(&self, lineage: &Lineage, at: Position) -> Vec<u8> {
        let mut content = vec![0; self.device_bytes];
        for (index, entry) in lineage.0.iter().enumerate() {
            if entry.parent.lsn >= at.lsn && entry.id != at.epoch {
                break;
            }
            let end = lineage
                .0
                .get(index + 1)
                .map_or(at.lsn, |next| next.parent.lsn.min(at.lsn));
            let epoch = &self.epochs[&entry.id];
            let mut next = entry.parent.lsn;
            for (&start, record) in epoch.records.range(entry.parent.lsn.0..end.0) {
                assert_eq!(start, next.0, "epoch {} has an unseen record at {next}", entry.id);
                apply(&mut content, record);
                next = next.advance(record.lsn_bytes());
            }
            assert_eq!(next, end, "epoch {} has unseen records before {end}", entry.id);
        }
        content
    }
}

fn apply(content: &mut [u8], record: &Record) {
    let header = &record.header;
    let from = usize::try_from(header.offset).expect("simulated devices fit in memory");
    let len = usize::try_from(header.len).expect("simulated devices fit in memory");
    match header.kind {
        RecordKind::Write => content[from..from + len].copy_from_slice(&record.payload),
        RecordKind::Discard | RecordKind::WriteZeroes => content[from..from + len].fill(0),
        RecordKind::Resize
        | RecordKind::Marker
        | RecordKind::Close
        | RecordKind::EmergencyEnter
        | RecordKind::Resolve => {}
    }
}
