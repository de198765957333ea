//! The plan of a write-back flight: which bytes go to the data disk, in which order, in how large pieces.
//!
//! Invariant: the plan writes exactly the pieces it is given, each byte once, ascending, neighbours merged.

use crate::overlay::{Content, Piece};
use crate::types::ByteRange;
use bytes::Bytes;

/// Longest run of bytes written with one call (bytes).
pub const MAX_EXTENT_BYTES: u64 = 1 << 20;
/// Most buffers gathered into one call.
pub const MAX_EXTENT_PARTS: usize = 256;

/// One write to the data disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extent {
    /// `parts`, one behind the other, at `offset`.
    Bytes {
        /// Byte address on the device.
        offset: u64,
        /// Together at most [`MAX_EXTENT_BYTES`] unless a single part is longer.
        parts: Vec<Bytes>,
    },
    /// This range becomes zeros.
    Zeros(ByteRange),
}

impl Extent {
    /// What it covers.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        match self {
            Extent::Bytes { offset, parts } => ByteRange {
                offset: *offset,
                len: parts.iter().map(|part| part.len() as u64).sum(),
            },
            Extent::Zeros(range) => *range,
        }
    }

    /// Takes in `piece` when it directly follows and the limits allow.
    fn absorb(&mut self, piece: &Piece) -> bool {
        let mine = self.range();
        if mine.end() != piece.range.offset {
            return false;
        }
        match (self, &piece.content) {
            (Extent::Zeros(range), Content::Zeros) => {
                range.len += piece.range.len;
                true
            }
            (Extent::Bytes { parts, .. }, Content::Bytes(bytes))
                if mine.len + piece.range.len <= MAX_EXTENT_BYTES && parts.len() < MAX_EXTENT_PARTS =>
            {
                parts.push(bytes.clone());
                true
            }
            _ => false,
        }
    }
}

/// Merges disjoint, ascending pieces into writes.
///
/// # Panics
/// When pieces overlap or are not ascending: that would write an older version over a newer one.
pub fn plan(pieces: impl Iterator<Item = Piece>) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for piece in pieces {
        if let Some(last) = extents.last_mut() {
            assert!(
                last.range().end() <= piece.range.offset,
                "pieces come ascending and disjoint"
            );
            if last.absorb(&piece) {
                continue;
            }
        }
        extents.push(match piece.content {
            Content::Bytes(bytes) => Extent::Bytes {
                offset: piece.range.offset,
                parts: vec![bytes],
            },
            Content::Zeros => Extent::Zeros(piece.range),
        });
    }
    extents
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes(offset: u64, len: u64) -> Piece {
        let fill = u8::try_from(offset % 251).unwrap();
        let content = Content::Bytes(Bytes::from(vec![fill; usize::try_from(len).unwrap()]));
        Piece {
            range: ByteRange { offset, len },
            content,
        }
    }

    #[test]
    fn neighbours_merge_and_zeros_stay_apart() {
        let zeros = |offset, len| Piece {
            range: ByteRange { offset, len },
            content: Content::Zeros,
        };
        let plan = plan(
            [
                bytes(0, 512),
                bytes(512, 512),
                zeros(1024, 512),
                zeros(1536, 512),
                bytes(4096, 512),
            ]
            .into_iter(),
        );
        let ranges: Vec<_> = plan
            .iter()
            .map(|extent| (extent.range().offset, extent.range().len))
            .collect();
        assert_eq!(ranges, [(0, 1024), (1024, 1024), (4096, 512)]);
        assert!(matches!(plan[1], Extent::Zeros(_)));
    }

    proptest! {
        #[test]
        fn a_plan_covers_exactly_its_pieces(lens in prop::collection::vec((0_u64..3, 1_u64..900_000), 0..40)) {
            let mut at = 0;
            let pieces: Vec<Piece> = lens.iter().map(|(gap, len)| {
                let piece = bytes(at + gap * 512, *len);
                at = piece.range.end();
                piece
            }).collect();
            let plan = plan(pieces.iter().cloned());
            let mut covered = Vec::new();
            for extent in &plan {
                prop_assert!(extent.range().len <= MAX_EXTENT_BYTES);
                let Extent::Bytes { offset, parts } = extent else { panic!("no zeros were given") };
                let mut offset = *offset;
                for part in parts {
                    covered.push((offset, part.clone()));
                    offset += part.len() as u64;
                }
            }
            let expected: Vec<_> = pieces.into_iter().map(|piece| match piece.content {
                Content::Bytes(bytes) => (piece.range.offset, bytes),
                Content::Zeros => unreachable!(),
            }).collect();
            prop_assert_eq!(covered, expected);
        }
    }
}
