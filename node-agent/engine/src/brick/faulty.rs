//! A brick that fails on demand: what the simulated disk does to the engine, for agents on real files.
//!
//! Invariant: with no fault armed it is the brick below. A flush that fails has lost what was written since the one before, as a real disk
//! may: whoever believes a second flush finds out.

use super::{Brick, Disk};
use crate::types::ByteRange;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// What shall go wrong; shared with whoever decides that.
#[derive(Debug, Default)]
pub struct Faults {
    reads: AtomicBool,
    writes: AtomicBool,
    losing: AtomicBool,
    /// Flushes that failed.
    lost: AtomicU64,
}

impl Faults {
    /// From now on all reads fail, or none.
    pub fn fail_reads(&self, on: bool) {
        self.reads.store(on, Ordering::SeqCst);
    }

    /// From now on all writes and flushes fail, or none.
    pub fn fail_writes(&self, on: bool) {
        self.writes.store(on, Ordering::SeqCst);
    }

    /// Everything written from now on is accepted and lost; the next flush says so, once.
    pub fn lose_until_flush(&self) {
        self.losing.store(true, Ordering::SeqCst);
    }

    /// How many flushes said that something was lost.
    #[must_use]
    pub fn losses(&self) -> u64 {
        self.lost.load(Ordering::SeqCst)
    }
}

const EIO: i32 = 5;

fn check(fails: &AtomicBool) -> io::Result<()> {
    if fails.load(Ordering::SeqCst) {
        return Err(io::Error::from_raw_os_error(EIO));
    }
    Ok(())
}

/// See the module.
#[derive(Debug, Clone)]
pub struct Faulty {
    below: Disk,
    faults: Arc<Faults>,
}

impl Faulty {
    /// Over `below`, with what `faults` says.
    #[must_use]
    pub fn new(below: Disk, faults: Arc<Faults>) -> Self {
        Self { below, faults }
    }

    fn loses(&self) -> bool {
        self.faults.losing.load(Ordering::SeqCst)
    }
}

impl Brick for Faulty {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        check(&self.faults.reads)?;
        self.below.read_at(buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        check(&self.faults.writes)?;
        if self.loses() {
            return Ok(());
        }
        self.below.write_at(parts, offset)
    }

    fn zero_range(&self, range: ByteRange) -> io::Result<()> {
        check(&self.faults.writes)?;
        if self.loses() {
            return Ok(());
        }
        self.below.zero_range(range)
    }

    fn sync(&self) -> io::Result<()> {
        check(&self.faults.writes)?;
        if self.faults.losing.swap(false, Ordering::SeqCst) {
            self.faults.lost.fetch_add(1, Ordering::SeqCst);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        self.below.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.below.size()
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        check(&self.faults.reads)?;
        self.below.next_data(from)
    }
}
