//! Numbered writes to a device, and the check that what is found is exactly the state after some first k of them.
//!
//! Write number i goes to a block that depends only on i, and says so in its content. So a reader can tell from the bytes
//! alone which prefix of the order it sees, and whether it is one: any lost, reordered, torn or invented write shows.
//!
//! Invariant: a [`Ledger`] never writes number i + 1 before write i has completed.

use anyhow::{Context, Result, ensure};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Size of one block.
pub const BLOCK_BYTES: usize = 4096;
/// What a write adds to the history: its record header and the block.
pub const LSN_PER_WRITE: i64 = 40 + 4096;

/// Memory at an address that direct I/O accepts.
#[derive(Debug)]
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// `length` zero bytes.
    #[must_use]
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK_BYTES];
        let start = bytes.as_ptr().align_offset(BLOCK_BYTES);
        Self { bytes, start, length }
    }

    /// The bytes.
    #[must_use]
    pub fn get(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }

    /// The bytes, to change.
    pub fn get_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Opens a device or file past the page cache.
pub fn open_direct(path: &Path) -> Result<File> {
    let file = rustix::fs::open(path, OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC, Mode::empty());
    Ok(File::from(
        file.with_context(|| format!("open {} for direct I/O", path.display()))?,
    ))
}

/// The numbered writes of one test.
#[derive(Debug)]
pub struct Ledger {
    /// Blocks used, from the beginning of the device.
    pub slots: u64,
    /// Writes completed so far.
    pub written: u64,
    /// Tells runs apart, so that left-overs of another run are recognised as foreign.
    seed: u64,
    block: Aligned,
}

impl Ledger {
    /// A ledger over the first `slots` blocks of a device.
    #[must_use]
    pub fn new(slots: u64) -> Self {
        let seed = rand::random();
        eprintln!("ledger seed {seed:#x}");
        Self::with_seed(slots, seed)
    }

    /// The ledger of an earlier run.
    #[must_use]
    pub fn with_seed(slots: u64, seed: u64) -> Self {
        Self {
            slots,
            written: 0,
            seed,
            block: Aligned::new(BLOCK_BYTES),
        }
    }

    fn slot_of(&self, number: u64) -> u64 {
        mix(self.seed ^ number) % self.slots
    }

    fn fill(&self, number: u64, block: &mut [u8]) {
        let mut word = mix(self.seed.rotate_left(17) ^ number);
        block[..8].copy_from_slice(&number.to_le_bytes());
        block[8..16].copy_from_slice(&self.seed.to_le_bytes());
        for chunk in block[16..].chunks_exact_mut(8) {
            word = mix(word);
            chunk.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// Does the next `count` writes, one after the other.
    pub fn write(&mut self, device: &File, count: u64) -> Result<()> {
        for _ in 0..count {
            let number = self.written + 1;
            let mut block = std::mem::replace(&mut self.block, Aligned::new(0));
            self.fill(number, block.get_mut());
            let offset = self.slot_of(number) * BLOCK_BYTES as u64;
            let done = device.write_all_at(block.get(), offset);
            self.block = block;
            done.with_context(|| format!("write {number} at byte {offset}"))?;
            self.written = number;
        }
        Ok(())
    }

    /// Finds the k such that the content of `path` is the state after exactly the first k writes, or says what is wrong.
    pub fn prefix(&self, path: &Path) -> Result<u64> {
        let file = open_direct(path)?;
        let mut buffer = Aligned::new(256 * BLOCK_BYTES);
        let mut numbers = Vec::new();
        let mut slot = 0;
        while slot < self.slots {
            let count = usize::try_from((self.slots - slot).min(256))?;
            let bytes = &mut buffer.get_mut()[..count * BLOCK_BYTES];
            file.read_exact_at(bytes, slot * BLOCK_BYTES as u64)
                .with_context(|| format!("read block {slot}"))?;
            for block in bytes.chunks_exact(BLOCK_BYTES) {
                numbers.push(
                    self.number_in(block)
                        .with_context(|| format!("block {}", numbers.len()))?,
                );
            }
            slot += count as u64;
        }
        let last = numbers.iter().copied().max().unwrap_or(0);
        let mut wanted = vec![0; numbers.len()];
        for number in 1..=last {
            wanted[usize::try_from(self.slot_of(number))?] = number;
        }
        for (slot, (found, wanted)) in numbers.iter().zip(&wanted).enumerate() {
            ensure!(
                found == wanted,
                "{}: write {last} is there, but block {slot} holds write {found} instead of {wanted}: not a state of the order",
                path.display()
            );
        }
        Ok(last)
    }

    /// Which write a block holds; 0 for an untouched block.
    fn number_in(&self, block: &[u8]) -> Result<u64> {
        if block.iter().all(|byte| *byte == 0) {
            return Ok(0);
        }
        let number = u64::from_le_bytes(block[..8].try_into()?);
        let mut wanted = vec![0; BLOCK_BYTES];
        self.fill(number, &mut wanted);
        ensure!(
            block == wanted,
            "holds bytes that no write of this ledger made (it says number {number}): torn or foreign"
        );
        Ok(number)
    }
}

/// splitmix64: every input bit reaches every output bit.
fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_BYTES, Ledger};
    use std::os::unix::fs::FileExt;

    fn file_with(ledger: &mut Ledger, writes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(ledger.slots * BLOCK_BYTES as u64).unwrap();
        ledger.write(file.as_file(), writes).unwrap();
        file
    }

    #[test]
    fn a_prefix_is_recognised() {
        let mut ledger = Ledger::new(64);
        let file = file_with(&mut ledger, 500);
        assert_eq!(ledger.prefix(file.path()).unwrap(), 500);
        assert_eq!(Ledger::new(64).slots, 64);
    }

    #[test]
    fn a_lost_a_torn_and_a_foreign_write_are_found() {
        let mut ledger = Ledger::new(64);
        let lost = file_with(&mut ledger, 500);
        let victim = (1..=499)
            .rev()
            .find(|number| ledger.slot_of(*number) != ledger.slot_of(500))
            .unwrap();
        let at = ledger.slot_of(victim) * BLOCK_BYTES as u64;
        lost.as_file().write_all_at(&[0; BLOCK_BYTES], at).unwrap();
        assert!(ledger.prefix(lost.path()).is_err());

        let mut ledger = Ledger::new(64);
        let torn = file_with(&mut ledger, 500);
        torn.as_file().write_all_at(&[7; 512], 3 * 512).unwrap();
        assert!(ledger.prefix(torn.path()).is_err());

        let other = file_with(&mut Ledger::new(64), 500);
        assert!(ledger.prefix(other.path()).is_err());
    }
}
