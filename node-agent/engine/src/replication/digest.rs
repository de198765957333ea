//! Comparing data disks by digest: regions of 256 KiB, and blocks of 4 KiB where a region differs.
//!
//! Invariant: a hole, or a region of zeros, is never read twice nor sent; what is sent is exactly what was read from the
//! data disk itself, never from an overlay (P11).

use crate::replication::messages::{BlockRun, RegionDigest};
use crate::store::StoreFile;
use crate::types::{BLOCK_BYTES, ByteRange};
use bytes::Bytes;
use std::io;

/// Unit of the first level (bytes).
pub const REGION_BYTES: u64 = 256 << 10;
/// What one digest request covers at most (bytes).
pub const SPAN_BYTES: u64 = 64 * REGION_BYTES;
/// Bytes of a digest of the second level.
pub const BLOCK_DIGEST_BYTES: usize = 16;

/// The data disk, as the replication side sees it: read only.
pub trait DataDisk: Send + Sync + 'static {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Any I/O error.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// See [`StoreFile::next_data`].
    ///
    /// # Errors
    /// Any I/O error.
    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>>;
}

impl<F: StoreFile> DataDisk for F {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        StoreFile::read_at(self, buffer, offset)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        StoreFile::next_data(self, from)
    }
}

/// The regions of a span: all [`REGION_BYTES`] long except perhaps the last.
pub fn regions(span: ByteRange) -> impl Iterator<Item = ByteRange> {
    let count = span.len.div_ceil(REGION_BYTES);
    (0..count).map(move |index| {
        let offset = span.offset + index * REGION_BYTES;
        ByteRange {
            offset,
            len: REGION_BYTES.min(span.end() - offset),
        }
    })
}

/// Whether a span may be asked for: aligned, not empty, inside the device, not longer than [`SPAN_BYTES`].
#[must_use]
pub fn span_is_valid(span: ByteRange, size_bytes: u64) -> bool {
    span.len > 0
        && span.len <= SPAN_BYTES
        && span.offset.is_multiple_of(REGION_BYTES)
        && span.len.is_multiple_of(BLOCK_BYTES)
        && span.offset.checked_add(span.len).is_some_and(|end| end <= size_bytes)
}

/// Whether a region may be asked for: like a span, but at most one region.
#[must_use]
pub fn region_is_valid(region: ByteRange, size_bytes: u64) -> bool {
    region.len <= REGION_BYTES && span_is_valid(region, size_bytes)
}

/// One digest per region of `span`, in order.
///
/// # Errors
/// Any error of reading the disk.
pub fn region_digests(disk: &dyn DataDisk, span: ByteRange) -> io::Result<Vec<RegionDigest>> {
    let mut buffer = Vec::new();
    regions(span)
        .map(|region| region_digest(disk, region, &mut buffer))
        .collect()
}

fn region_digest(disk: &dyn DataDisk, region: ByteRange, buffer: &mut Vec<u8>) -> io::Result<RegionDigest> {
    if is_hole(disk, region)? {
        return Ok(RegionDigest::Zero);
    }
    read_region(disk, region, buffer)?;
    Ok(if is_zero(buffer) {
        RegionDigest::Zero
    } else {
        RegionDigest::Hash(*blake3::hash(buffer).as_bytes())
    })
}

fn is_hole(disk: &dyn DataDisk, region: ByteRange) -> io::Result<bool> {
    Ok(disk
        .next_data(region.offset)?
        .is_none_or(|data| data.offset >= region.end()))
}

fn read_region(disk: &dyn DataDisk, region: ByteRange, buffer: &mut Vec<u8>) -> io::Result<()> {
    let len = usize::try_from(region.len).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    buffer.resize(len, 0);
    disk.read_at(buffer, region.offset)
}

/// Whether all bytes are zero.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    let mut words = bytes.chunks_exact(16);
    words.by_ref().all(|word| word == [0; 16]) && words.remainder().iter().all(|byte| *byte == 0)
}

/// The digests of the second level of a region.
///
/// # Errors
/// Any error of reading the disk.
pub fn block_digests(disk: &dyn DataDisk, region: ByteRange) -> io::Result<Vec<[u8; BLOCK_DIGEST_BYTES]>> {
    let mut buffer = Vec::new();
    read_region(disk, region, &mut buffer)?;
    Ok(blocks(&buffer).map(block_digest).collect())
}

fn blocks(region: &[u8]) -> std::slice::Chunks<'_, u8> {
    const BLOCK: usize = 4096;
    region.chunks(BLOCK)
}

fn block_digest(block: &[u8]) -> [u8; BLOCK_DIGEST_BYTES] {
    let mut short = [0; BLOCK_DIGEST_BYTES];
    short.copy_from_slice(&blake3::hash(block).as_bytes()[..BLOCK_DIGEST_BYTES]);
    short
}

/// What differs between a region of this disk and what the other side has (see [`RegionWant`](super::messages::RegionWant)):
/// runs of adjacent blocks, in order, zeros without bytes.
///
/// # Errors
/// Any error of reading the disk.
pub fn differing_runs(
    disk: &dyn DataDisk,
    region: ByteRange,
    have: &[[u8; BLOCK_DIGEST_BYTES]],
) -> io::Result<Vec<BlockRun>> {
    let mut buffer = Vec::new();
    read_region(disk, region, &mut buffer)?;
    let bytes = Bytes::from(buffer);
    let mut runs: Vec<Run> = Vec::new();
    let mut offset = 0;
    for (index, block) in blocks(&bytes).enumerate() {
        let zero = is_zero(block);
        let differs = match have.get(index) {
            Some(theirs) => block_digest(block) != *theirs,
            None => !zero || !have.is_empty(),
        };
        if differs {
            match runs.last_mut() {
                Some(run) if run.zero == zero && run.start + run.len == offset => run.len += block.len(),
                _ => runs.push(Run {
                    start: offset,
                    len: block.len(),
                    zero,
                }),
            }
        }
        offset += block.len();
    }
    Ok(runs
        .into_iter()
        .map(|run| run.into_block_run(region.offset, &bytes))
        .collect())
}

struct Run {
    start: usize,
    len: usize,
    zero: bool,
}

impl Run {
    fn into_block_run(self, base: u64, bytes: &Bytes) -> BlockRun {
        BlockRun {
            range: ByteRange {
                offset: base + self.start as u64,
                len: self.len as u64,
            },
            data: (!self.zero).then(|| bytes.slice(self.start..self.start + self.len)),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A disk in memory whose zero blocks are holes.
    pub(crate) struct MemDisk(pub(crate) Vec<u8>);

    impl DataDisk for MemDisk {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
            let start = usize::try_from(offset).unwrap();
            buffer.copy_from_slice(&self.0[start..start + buffer.len()]);
            Ok(())
        }

        fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
            // Looks ahead one region only: "may hold data" beyond that is a permitted answer.
            let from = usize::try_from(from).unwrap();
            let horizon = self.0.len().min(from + 262_144);
            let found = self.0[from..horizon]
                .iter()
                .position(|byte| *byte != 0)
                .map_or(horizon, |at| from + at);
            let len = (self.0.len() - found) as u64;
            Ok((len > 0).then_some(ByteRange {
                offset: found as u64,
                len,
            }))
        }
    }

    fn blocks_of(content: &[u8]) -> Vec<u8> {
        content.iter().flat_map(|byte| [*byte; 4096]).collect()
    }

    proptest! {
        #[test]
        fn applying_the_differing_runs_makes_two_regions_equal_and_moves_only_them(
            ours in prop::collection::vec(0u8..3, 64), theirs in prop::collection::vec(0u8..3, 64)
        ) {
            let source = MemDisk(blocks_of(&ours));
            let mut target = MemDisk(blocks_of(&theirs));
            let region = ByteRange { offset: 0, len: REGION_BYTES };
            let have = block_digests(&target, region).unwrap();
            let runs = differing_runs(&source, region, &have).unwrap();
            let touched: u64 = runs.iter().map(|run| run.range.len).sum();
            let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count() as u64;
            prop_assert_eq!(touched, differing * BLOCK_BYTES);
            for BlockRun { range, data } in runs {
                let start = usize::try_from(range.offset).unwrap();
                let len = usize::try_from(range.len).unwrap();
                let zeros = Bytes::from(vec![0; len]);
                target.0[start..start + len].copy_from_slice(&data.unwrap_or(zeros));
            }
            prop_assert_eq!(target.0, source.0);
        }
    }

    #[test]
    fn a_target_that_holds_only_zeros_gets_only_what_is_not_zero() {
        let mut content = [0u8; 64];
        content[3] = 1;
        content[4] = 1;
        let source = MemDisk(blocks_of(&content));
        let region = ByteRange {
            offset: 0,
            len: REGION_BYTES,
        };
        let runs = differing_runs(&source, region, &[]).unwrap();
        assert_eq!(runs.len(), 1);
        assert_eq!(
            runs[0].range,
            ByteRange {
                offset: 3 * 4096,
                len: 2 * 4096
            }
        );
    }

    #[test]
    fn holes_and_zeros_are_told_apart_from_data_without_content() {
        let mut disk = MemDisk(vec![0; 3 * 262_144 - 4096]);
        disk.0[262_144] = 1;
        let span = ByteRange {
            offset: 0,
            len: disk.0.len() as u64,
        };
        let digests = region_digests(&disk, span).unwrap();
        assert_eq!(digests.len(), 3);
        assert_eq!(digests[0], RegionDigest::Zero);
        assert!(matches!(digests[1], RegionDigest::Hash(_)));
        assert_eq!(digests[2], RegionDigest::Zero);
    }

    #[test]
    fn spans_outside_the_device_or_unaligned_are_refused() {
        let size = 10 * REGION_BYTES + 4096;
        let span = |offset, len| ByteRange { offset, len };
        assert!(span_is_valid(span(0, size), size));
        assert!(region_is_valid(span(10 * REGION_BYTES, 4096), size));
        for bad in [
            span(0, 0),
            span(512, 4096),
            span(0, 100),
            span(REGION_BYTES, size),
            span(u64::MAX - REGION_BYTES + 1, REGION_BYTES),
            span(0, SPAN_BYTES + 4096),
        ] {
            assert!(!span_is_valid(bad, size), "{bad:?}");
        }
    }
}
