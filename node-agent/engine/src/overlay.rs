//! The memory between log and data disk: five interval maps, one per stage that a written byte passes.
//!
//! Newest first: `open` (appended, no sync issued) → `syncing` (covered by the sync under way) → `durable` → `flight` (being
//! written back) → `settled` (on the data disk and flushed; kept until the applied position is saved).
//!
//! Invariants: each stage covers one contiguous range of LSNs, newer stages hold later ones; within a stage ranges do not
//! overlap and hold the newest bytes of that stage. So the first stage that knows a byte, newest first, has its newest
//! version (P4), and only bytes whose records are durable can reach `flight` (P11).

use crate::types::ByteRange;
use bytes::Bytes;
use std::collections::BTreeMap;

/// What a range holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Exactly as many bytes as the range is long.
    Bytes(Bytes),
    /// Zeros; no memory behind them.
    Zeros,
}

/// A range and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where on the device.
    pub range: ByteRange,
    /// What.
    pub content: Content,
}

/// What a lookup found: the known parts, and the parts that only the data disk knows.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lookup {
    /// Known parts, disjoint, in no particular order.
    pub hits: Vec<Piece>,
    /// The rest, disjoint, ascending.
    pub gaps: Vec<ByteRange>,
}

/// Memory charged for an entry beside its payload (bytes): tree node, buffer header.
const ENTRY_BYTES: u64 = 128;
/// A fragment smaller than its buffer divided by this is copied out, so that it does not keep the buffer alive.
const FRAGMENT_DIVISOR: u64 = 4;

#[derive(Debug, Clone)]
struct Entry {
    len: u64,
    /// `None` reads as zeros.
    data: Option<Bytes>,
    /// Size of the buffer that `data` is a slice of (bytes).
    backing: u64,
}

impl Entry {
    fn memory(&self) -> u64 {
        ENTRY_BYTES + self.data.as_ref().map_or(0, |data| data.len() as u64)
    }

    /// The part `[from, to)`, relative to the start of this entry.
    fn part(&self, from: u64, to: u64) -> Entry {
        let len = to - from;
        let Some(data) = &self.data else {
            return Entry {
                len,
                data: None,
                backing: 0,
            };
        };
        let slice = data.slice(index(from)..index(to));
        if len < self.backing / FRAGMENT_DIVISOR {
            Entry {
                len,
                data: Some(Bytes::copy_from_slice(&slice)),
                backing: len,
            }
        } else {
            Entry {
                len,
                data: Some(slice),
                backing: self.backing,
            }
        }
    }

    fn content(&self, from: u64, to: u64) -> Content {
        match &self.data {
            Some(data) => Content::Bytes(data.slice(index(from)..index(to))),
            None => Content::Zeros,
        }
    }
}

/// An offset inside one buffer in memory.
fn index(offset: u64) -> usize {
    usize::try_from(offset).expect("offsets inside a buffer fit in memory")
}

/// One stage: disjoint ranges with their newest content.
#[derive(Debug, Default, Clone)]
pub struct Layer {
    entries: BTreeMap<u64, Entry>,
    memory: u64,
}

impl Layer {
    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Memory held (bytes), with an allowance for bookkeeping.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.memory
    }

    /// Puts `content` over whatever `range` held.
    ///
    /// # Panics
    /// When the length of the bytes is not that of the range.
    pub fn insert(&mut self, range: ByteRange, content: Content) {
        if range.len == 0 {
            return;
        }
        let data = match content {
            Content::Bytes(bytes) => {
                assert_eq!(
                    bytes.len() as u64,
                    range.len,
                    "a piece holds exactly the bytes of its range"
                );
                Some(bytes)
            }
            Content::Zeros => None,
        };
        let backing = data.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.place(
            range.offset,
            Entry {
                len: range.len,
                data,
                backing,
            },
        );
    }

    /// Moves everything of `newer` over this layer.
    pub fn merge(&mut self, newer: Layer) {
        if self.is_empty() {
            *self = newer;
            return;
        }
        for (offset, entry) in newer.entries {
            self.place(offset, entry);
        }
    }

    /// All pieces, ascending.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.entries.iter().map(|(&offset, entry)| Piece {
            range: ByteRange { offset, len: entry.len },
            content: entry.content(0, entry.len),
        })
    }

    fn place(&mut self, offset: u64, entry: Entry) {
        self.clear(offset, offset + entry.len);
        self.memory += entry.memory();
        self.entries.insert(offset, entry);
    }

    /// Forgets `[start, end)`, splitting what sticks out.
    fn clear(&mut self, start: u64, end: u64) {
        if let Some((&offset, entry)) = self.entries.range(..start).next_back() {
            let entry_end = offset + entry.len;
            if entry_end > start {
                let head = entry.part(0, start - offset);
                let tail = (entry_end > end).then(|| entry.part(end - offset, entry.len));
                self.replace(offset, head);
                if let Some(tail) = tail {
                    self.memory += tail.memory();
                    self.entries.insert(end, tail);
                    return;
                }
            }
        }
        while let Some((&offset, entry)) = self.entries.range(start..end).next() {
            let entry_end = offset + entry.len;
            let tail = (entry_end > end).then(|| entry.part(end - offset, entry.len));
            let old = self.entries.remove(&offset).expect("the entry was just found");
            self.memory -= old.memory();
            if let Some(tail) = tail {
                self.memory += tail.memory();
                self.entries.insert(end, tail);
                return;
            }
        }
    }

    fn replace(&mut self, offset: u64, entry: Entry) {
        self.memory += entry.memory();
        let old = self
            .entries
            .insert(offset, entry)
            .expect("only present entries are replaced");
        self.memory -= old.memory();
    }

    /// Splits `want` into what this layer knows (pushed to `hits`) and what it does not (pushed to `gaps`, ascending).
    fn lookup(&self, want: ByteRange, hits: &mut Vec<Piece>, gaps: &mut Vec<ByteRange>) {
        let (mut at, end) = (want.offset, want.end());
        let first = self
            .entries
            .range(..=at)
            .next_back()
            .filter(|(offset, entry)| *offset + entry.len > at);
        let rest = self.entries.range(at.saturating_add(1)..end.max(at.saturating_add(1)));
        for (&offset, entry) in first.into_iter().chain(rest) {
            if offset > at {
                gaps.push(ByteRange {
                    offset: at,
                    len: offset - at,
                });
                at = offset;
            }
            let to = (offset + entry.len).min(end);
            let range = ByteRange {
                offset: at,
                len: to - at,
            };
            hits.push(Piece {
                range,
                content: entry.content(at - offset, to - offset),
            });
            at = to;
        }
        if at < end {
            gaps.push(ByteRange {
                offset: at,
                len: end - at,
            });
        }
    }
}

/// The five stages.
#[derive(Debug, Default)]
pub struct Overlay {
    open: Layer,
    syncing: Layer,
    durable: Layer,
    flight: Layer,
    settled: Layer,
}

impl Overlay {
    /// A record was appended to the open batch.
    pub fn append(&mut self, range: ByteRange, content: Content) {
        self.open.insert(range, content);
    }

    /// A durable record of the local log is to be applied (replay, recovery); nothing newer may be in `open` or `syncing`.
    ///
    /// # Panics
    /// When something newer is there: replay would be shadowed by what it must overwrite.
    pub fn replay(&mut self, range: ByteRange, content: Content) {
        assert!(
            self.open.is_empty() && self.syncing.is_empty(),
            "replay never overtakes appended records"
        );
        self.durable.insert(range, content);
    }

    /// A log sync was issued that covers everything appended.
    ///
    /// # Panics
    /// When one is under way already.
    pub fn sync_issued(&mut self) {
        assert!(self.syncing.is_empty(), "one log sync at a time");
        self.syncing = std::mem::take(&mut self.open);
    }

    /// The log sync succeeded.
    pub fn sync_succeeded(&mut self) {
        let layer = std::mem::take(&mut self.syncing);
        self.durable.merge(layer);
    }

    /// The log sync failed: what it covered is as unproven as what was appended since.
    pub fn sync_failed(&mut self) {
        let newer = std::mem::replace(&mut self.open, std::mem::take(&mut self.syncing));
        self.open.merge(newer);
    }

    /// Everything durable goes into a write-back flight.
    ///
    /// # Panics
    /// When a flight is under way.
    pub fn launch(&mut self) -> &Layer {
        assert!(self.flight.is_empty(), "one flight at a time");
        self.flight = std::mem::take(&mut self.durable);
        &self.flight
    }

    /// The flight, for writing it again after the data disk failed.
    #[must_use]
    pub fn flight(&self) -> &Layer {
        &self.flight
    }

    /// The flight is on the data disk and flushed.
    pub fn landed(&mut self) {
        let layer = std::mem::take(&mut self.flight);
        self.settled.merge(layer);
    }

    /// The applied position behind the last landed flight is saved: its memory is free.
    pub fn release(&mut self) {
        self.settled = Layer::default();
    }

    /// Whether bytes wait for a flight.
    #[must_use]
    pub fn has_durable(&self) -> bool {
        !self.durable.is_empty()
    }

    /// Memory of the bytes that wait for a flight.
    #[must_use]
    pub fn durable_bytes(&self) -> u64 {
        self.durable.memory
    }

    /// Memory held by all stages (bytes), with an allowance for bookkeeping.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        self.layers().map(|layer| layer.memory).into_iter().sum()
    }

    /// The newest content of a range.
    #[must_use]
    pub fn lookup(&self, range: ByteRange) -> Lookup {
        let mut found = Lookup {
            hits: Vec::new(),
            gaps: Vec::new(),
        };
        if range.len == 0 {
            return found;
        }
        found.gaps.push(range);
        for layer in self.layers() {
            if layer.is_empty() {
                continue;
            }
            for gap in std::mem::take(&mut found.gaps) {
                layer.lookup(gap, &mut found.hits, &mut found.gaps);
            }
            if found.gaps.is_empty() {
                break;
            }
        }
        found
    }

    fn layers(&self) -> [&Layer; 5] {
        [&self.open, &self.syncing, &self.durable, &self.flight, &self.settled]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DEVICE: usize = 256;

    fn read(overlay: &Overlay, disk: &[u8]) -> Vec<u8> {
        let mut out = disk.to_vec();
        let found = overlay.lookup(ByteRange {
            offset: 0,
            len: DEVICE as u64,
        });
        let mut covered: Vec<ByteRange> = found.gaps.clone();
        for piece in &found.hits {
            covered.push(piece.range);
            let (from, to) = (index(piece.range.offset), index(piece.range.end()));
            match &piece.content {
                Content::Bytes(bytes) => out[from..to].copy_from_slice(bytes),
                Content::Zeros => out[from..to].fill(0),
            }
        }
        covered.sort();
        let mut at = 0;
        for range in covered {
            assert_eq!(range.offset, at, "hits and gaps cover the range exactly once");
            at = range.end();
        }
        assert_eq!(at, DEVICE as u64);
        out
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, usize, u8),
        Zero(usize, usize),
        Issue,
        Success,
        Failure,
        Launch,
        Land,
        Release,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let range = (0..DEVICE - 1, 1..64_usize).prop_map(|(from, len)| (from, len.min(DEVICE - from)));
        let step = prop_oneof![
            6 => (range.clone(), any::<u8>()).prop_map(|((from, len), fill)| Step::Write(from, len, fill)),
            2 => range.prop_map(|(from, len)| Step::Zero(from, len)),
            2 => Just(Step::Issue),
            2 => Just(Step::Success),
            1 => Just(Step::Failure),
            2 => Just(Step::Launch),
            2 => Just(Step::Land),
            1 => Just(Step::Release),
        ];
        prop::collection::vec(step, 1..120)
    }

    proptest! {
        /// The overlay over a disk always reads like a flat array that was written directly.
        #[test]
        fn a10_reads_return_the_newest_bytes_through_all_stages(steps in steps()) {
            let mut overlay = Overlay::default();
            let mut disk = vec![7_u8; DEVICE];
            let mut model = disk.clone();
            for step in steps {
                match step {
                    Step::Write(from, len, fill) => {
                        let range = ByteRange { offset: from as u64, len: len as u64 };
                        overlay.append(range, Content::Bytes(Bytes::from(vec![fill; len])));
                        model[from..from + len].fill(fill);
                    }
                    Step::Zero(from, len) => {
                        overlay.append(ByteRange { offset: from as u64, len: len as u64 }, Content::Zeros);
                        model[from..from + len].fill(0);
                    }
                    Step::Issue if overlay.syncing.is_empty() => overlay.sync_issued(),
                    Step::Success => overlay.sync_succeeded(),
                    Step::Failure => overlay.sync_failed(),
                    Step::Launch if overlay.flight.is_empty() => {
                        overlay.launch();
                    }
                    Step::Land => {
                        for piece in overlay.flight().pieces() {
                            let (from, to) = (index(piece.range.offset), index(piece.range.end()));
                            match piece.content {
                                Content::Bytes(bytes) => disk[from..to].copy_from_slice(&bytes),
                                Content::Zeros => disk[from..to].fill(0),
                            }
                        }
                        overlay.landed();
                    }
                    Step::Release => overlay.release(),
                    Step::Issue | Step::Launch => {}
                }
                prop_assert_eq!(read(&overlay, &disk), model.clone());
                for layer in overlay.layers() {
                    let memory: u64 = layer.entries.values().map(Entry::memory).sum();
                    prop_assert_eq!(layer.memory, memory);
                }
            }
        }
    }

    #[test]
    fn small_fragments_do_not_keep_large_buffers_alive() {
        let mut layer = Layer::default();
        layer.insert(
            ByteRange { offset: 0, len: 4096 },
            Content::Bytes(Bytes::from(vec![1; 4096])),
        );
        layer.insert(ByteRange { offset: 512, len: 3584 }, Content::Zeros);
        assert_eq!(layer.entries[&0].backing, 512);
        assert_eq!(layer.memory_bytes(), 512 + 2 * ENTRY_BYTES);
    }
}
