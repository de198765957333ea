//! The files of a writer: which one comes next, and which ones may go.
//!
//! Invariant: every name is used once; numbers only grow.

use super::{LogWriter, Prepared};
use crate::log::SegmentMeta;
use crate::store::{SegmentName, Store};
use crate::types::Lsn;

impl<S: Store> LogWriter<S> {
    /// Above the number of every segment that was ever named here.
    #[must_use]
    pub fn next_number(&self) -> u32 {
        self.next_number
    }

    /// Takes back the prepared segment: the log ends, and its file is to be removed.
    pub fn take_prepared(&mut self) -> Option<SegmentName> {
        self.prepared.take().map(|prepared| prepared.name)
    }

    /// Prepared segments that turned out too small for a record: their files are to be removed.
    pub fn take_unfit(&mut self) -> Vec<SegmentName> {
        std::mem::take(&mut self.unfit)
    }

    /// How long the next prepared segment must be at least (bytes).
    #[must_use]
    pub fn least_bytes(&self) -> u64 {
        self.least_bytes
    }

    /// Length of the prepared segment (bytes).
    #[must_use]
    pub fn prepared_bytes(&self) -> u64 {
        self.prepared.as_ref().map_or(0, |prepared| prepared.file_bytes)
    }

    /// Name of the segment that should be created now, so that one is always prepared ahead. Each name is handed out once:
    /// answer it with `add_prepared` or `prepare_failed`.
    pub fn next_prepared(&mut self) -> Option<SegmentName> {
        if self.prepared.is_some() || self.requested.is_some() {
            return None;
        }
        self.requested = Some(self.new_name());
        self.requested
    }

    pub(super) fn new_name(&mut self) -> SegmentName {
        let number = self.next_number;
        self.next_number = number.checked_add(1).expect("a log has fewer than 2^32 segments");
        SegmentName {
            number,
            origin: self.identity.origin(),
        }
    }

    /// Takes a created segment. `false`: it is no longer wanted and its file should be removed.
    #[must_use]
    pub fn add_prepared(&mut self, name: SegmentName, file: S::File, file_bytes: u64) -> bool {
        if self.requested != Some(name) {
            return false;
        }
        self.requested = None;
        if file_bytes >= self.least_bytes {
            self.least_bytes = 0;
        }
        self.prepared = Some(Prepared { name, file, file_bytes });
        true
    }

    /// The creation failed; the next attempt gets another name.
    pub fn prepare_failed(&mut self, name: SegmentName) {
        if self.requested == Some(name) {
            self.requested = None;
        }
    }

    /// Segments whose content lies below `lsn` leave the log; their files are to be removed in this order. Never the last one,
    /// and not the end of an epoch exactly at `lsn`: a member may stand there in that epoch.
    pub fn forget_segments_below(&mut self, lsn: Lsn) -> Vec<SegmentName> {
        let limit = lsn.min(self.durable.lsn);
        let passed = |pair: &&[SegmentMeta]| {
            let end = pair[1].start;
            end.lsn < limit || (end.lsn == limit && end.epoch == pair[0].start.epoch)
        };
        let gone = self.segments.windows(2).take_while(passed).count();
        self.segments.drain(..gone).map(|segment| segment.name).collect()
    }
}
