//! A brick that is no faster than somebody allows: rate limits, and slow disks for tests.
//!
//! Invariant: every byte that is read, written or zeroed was allowed before; a flush counts as no bytes.

use super::{Brick, Disk};
use crate::types::ByteRange;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

/// Says when something may happen. The engine has no clock: whoever stacks the brick brings one.
pub trait Pace: Debug + Send + Sync + 'static {
    /// Blocks until `bytes` more may pass; called with 0 before a flush.
    fn pass(&self, bytes: u64);
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Paced {
    below: Disk,
    pace: Arc<dyn Pace>,
}

impl Paced {
    /// Over `below`, at this pace.
    #[must_use]
    pub fn new(below: Disk, pace: Arc<dyn Pace>) -> Self {
        Self { below, pace }
    }
}

impl Brick for Paced {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.pace.pass(buffer.len() as u64);
        self.below.read_at(buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        self.pace.pass(parts.iter().map(|part| part.len() as u64).sum());
        self.below.write_at(parts, offset)
    }

    fn zero_range(&self, range: ByteRange) -> io::Result<()> {
        self.pace.pass(range.len);
        self.below.zero_range(range)
    }

    fn sync(&self) -> io::Result<()> {
        self.pace.pass(0);
        self.below.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.below.size()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        self.below.next_data(from)
    }
}
