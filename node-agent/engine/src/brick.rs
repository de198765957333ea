//! The small block trait: bytes at any address, on pool threads. What an owner calls its data disk is a stack of these.
//!
//! Everything below an owner is called by jobs, which may block: that is the asynchrony of this engine, so the methods of a brick are
//! plain calls. Bricks stack by holding the one below: [`Paced`] (no faster than somebody allows), [`Faulty`] (for
//! tests on real files); at the bottom stands any open file of a store. The stack under a running device is exchanged with
//! `Command::ExchangeDisk`.
//!
//! Invariant: a brick changes when and whether things happen, never what: bytes that were read were written, or the call fails.

mod faulty;
mod paced;

pub use faulty::{Faults, Faulty};
pub use paced::{Pace, Paced};

use crate::store::StoreFile;
use crate::types::ByteRange;
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

/// See the module. Methods may be called from any thread, several at a time.
pub trait Brick: Debug + Send + Sync + 'static {
    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// Any I/O error; `UnexpectedEof` behind the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    /// Writes all of `parts`, one behind the other, at `offset`.
    ///
    /// # Errors
    /// Any I/O error; how much was written is then unknown.
    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()>;
    /// Makes a range read as zeros.
    ///
    /// # Errors
    /// Any I/O error.
    fn zero_range(&self, range: ByteRange) -> io::Result<()>;
    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// Any I/O error: then nothing written since the last success may be believed durable, ever.
    fn sync(&self) -> io::Result<()>;
    /// Length (bytes).
    ///
    /// # Errors
    /// Any I/O error.
    fn size(&self) -> io::Result<u64>;
    /// The next range at or after `from` that may hold something other than zeros.
    ///
    /// # Errors
    /// Any I/O error.
    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>>;
}

/// The top of a stack.
pub type Disk = Arc<dyn Brick>;

impl<F: StoreFile> Brick for F {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        StoreFile::read_at(self, buffer, offset)
    }

    fn write_at(&self, parts: &[&[u8]], offset: u64) -> io::Result<()> {
        StoreFile::write_at(self, parts, offset)
    }

    fn zero_range(&self, range: ByteRange) -> io::Result<()> {
        StoreFile::zero_range(self, range.offset, range.len)
    }

    fn sync(&self) -> io::Result<()> {
        StoreFile::sync(self)
    }

    fn size(&self) -> io::Result<u64> {
        StoreFile::size(self)
    }

    fn next_data(&self, from: u64) -> io::Result<Option<ByteRange>> {
        StoreFile::next_data(self, from)
    }
}
