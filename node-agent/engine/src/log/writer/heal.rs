//! How a poisoned log comes back: its tail, kept in memory, goes into new segments.
//!
//! Invariant: a rewrite changes nothing that is durable, and what it makes says the same as what it replaces.

use super::{Current, LogWriter};
use crate::chain;
use crate::log::SegmentMeta;
use crate::log::rewrite::{Piece, Rewritten, TailItem, TailRewrite};
use crate::store::{SegmentName, Store};

impl<S: Store> LogWriter<S> {
    /// Work that brings a poisoned log back: everything above the durable end goes into new segments, the last with at least
    /// `segment_bytes`. `None` when the log is not poisoned, or a sync or another rewrite is under way.
    pub fn begin_rewrite(&mut self, segment_bytes: u64) -> Option<TailRewrite> {
        if self.poison.is_none() || self.syncing.is_some() || self.rewriting {
            return None;
        }
        self.rewriting = true;
        self.requested = None;
        self.chain_up();
        let mut pieces = self.pieces();
        let names = pieces.iter().map(|_| self.new_name()).collect::<Vec<_>>();
        pieces.iter_mut().zip(names).for_each(|(piece, name)| piece.name = name);
        Some(TailRewrite {
            identity: self.identity,
            previous: self.survivors().last().map_or(0, |segment| segment.name.number),
            durable: self.durable.lsn,
            next_sequence: self.next_sequence,
            compression: self.compression,
            segment_bytes,
            pieces,
        })
    }

    /// The tail, one piece per epoch.
    fn pieces(&self) -> Vec<Piece> {
        let mut at = self.durable;
        let mut pieces = vec![Piece::new(self.durable_epoch.clone(), at)];
        for item in &self.tail {
            match item {
                TailItem::Epoch(entry) => {
                    at.epoch = entry.id;
                    // An epoch that ends where it begins needs a segment only if no other one tells of it.
                    let before = pieces.last().expect("there is a first piece");
                    let known = self
                        .survivors()
                        .iter()
                        .any(|segment| segment.start.epoch == before.epoch.id);
                    if before.records.is_empty() && known {
                        pieces.pop();
                    }
                    pieces.push(Piece::new(entry.clone(), at));
                }
                TailItem::Record(record) => {
                    at.lsn = at.lsn.advance(record.lsn_bytes());
                    at.chain = chain::advance(at.chain, at.epoch, &record.header, &record.payload);
                    pieces
                        .last_mut()
                        .expect("there is a first piece")
                        .records
                        .push(record.clone());
                }
            }
        }
        assert_eq!(at, self.appended, "the tail leads from durable to appended");
        pieces
    }

    /// The segments that hold durable content, or tell of a durable epoch without any: they stay after a rewrite.
    fn survivors(&self) -> &[SegmentMeta] {
        let stays = |segment: &&SegmentMeta| {
            let start = segment.start;
            let is_witness = start.lsn == self.durable.lsn && start.epoch != self.durable.epoch;
            start.lsn < self.durable.lsn || (is_witness && segment.name.number <= self.durable_segment)
        };
        let count = self.segments.iter().take_while(stays).count();
        &self.segments[..count]
    }

    /// Takes over what a [`TailRewrite`] made. The files of the returned names are to be removed: they hold nothing of this
    /// log any more.
    ///
    /// # Panics
    /// When no rewrite is under way.
    pub fn finish_rewrite(&mut self, done: Rewritten<S::File>) -> Vec<SegmentName> {
        assert!(
            std::mem::take(&mut self.rewriting),
            "finish_rewrite answers a begin_rewrite"
        );
        let keep = self.survivors().len();
        let mut obsolete: Vec<SegmentName> = self.segments.drain(keep..).map(|segment| segment.name).collect();
        obsolete.extend(self.prepared.take().map(|prepared| prepared.name));
        self.segments.extend(&done.segments);
        let (file, crc, offset) = done.last;
        let file_bytes = done.segments.last().expect("a rewrite makes a segment").file_bytes;
        self.current = Some(Current {
            file,
            crc,
            file_bytes,
            offset,
            batch: None,
            dirty: false,
        });
        self.left_dirty.clear();
        self.advance_durable(self.appended);
        self.durable_segment = self.segments.last().map_or(0, |last| last.name.number);
        self.poison = None;
        obsolete
    }

    /// The rewrite failed; another one may be tried.
    ///
    /// # Panics
    /// When no rewrite is under way.
    pub fn rewrite_failed(&mut self) {
        assert!(
            std::mem::take(&mut self.rewriting),
            "rewrite_failed answers a begin_rewrite"
        );
    }
}
