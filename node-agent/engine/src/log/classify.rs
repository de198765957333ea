//! Names what stands where log should go on and does not.
//!
//! The class never decides anything: whether an end is a torn tail or a defect follows from what was durable. It tells people
//! what happened to the bytes.

use serde::{Deserialize, Serialize};
use std::fmt;

/// What stands behind the last valid record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TailClass {
    /// Zeros: nothing was ever written here.
    Zero,
    /// A batch of another segment: left over from an earlier life of the file.
    Recycled,
    /// Something that is no log.
    Foreign,
    /// The same few bytes over and over.
    Repeated,
    /// Valid log of this segment, but not what follows here.
    SequenceJump,
    /// A record whose checksum does not match.
    Digest,
    /// A batch or segment header whose checksum does not match.
    Header,
    /// The file is too short for what it says it holds.
    Truncated,
}

impl TailClass {
    /// Neither a batch nor a record of the segment it stands in, whole or damaged.
    #[must_use]
    pub(super) fn is_nothing_of_ours(self) -> bool {
        match self {
            Self::Zero | Self::Recycled | Self::Foreign | Self::Repeated => true,
            Self::SequenceJump | Self::Digest | Self::Header | Self::Truncated => false,
        }
    }

    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Recycled => "recycled",
            Self::Foreign => "foreign",
            Self::Repeated => "repeated",
            Self::SequenceJump => "sequence jump",
            Self::Digest => "digest",
            Self::Header => "header",
            Self::Truncated => "truncated",
        }
    }
}

impl fmt::Display for TailClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Longest pattern that counts as repeated (bytes).
const LONGEST_PATTERN: usize = 16;

/// The class of bytes that are neither a record nor a batch header.
pub(super) fn of_garbage(bytes: &[u8]) -> TailClass {
    if bytes.iter().all(|byte| *byte == 0) {
        return TailClass::Zero;
    }
    let repeats =
        |len: usize| bytes.len() >= 2 * len && bytes[len..].iter().zip(bytes).all(|(later, earlier)| later == earlier);
    if (1..=LONGEST_PATTERN).any(repeats) {
        TailClass::Repeated
    } else {
        TailClass::Foreign
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_has_three_classes() {
        assert_eq!(of_garbage(&[0; 64]), TailClass::Zero);
        assert_eq!(of_garbage(&[0xff; 64]), TailClass::Repeated);
        assert_eq!(of_garbage(&[1, 2, 3, 1, 2, 3, 1, 2, 3, 1]), TailClass::Repeated);
        let mixed: Vec<u8> = (0..64_u8).map(|i| i.wrapping_mul(i) ^ 0x5a).collect();
        assert_eq!(of_garbage(&mixed), TailClass::Foreign);
    }
}
