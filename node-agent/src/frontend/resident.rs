//! Memory from and to which the kernel can copy at any moment, also while the process is being killed.
//!
//! Why it matters: the FUSE driver copies a request into the reader's memory after it took the request from its queue. Where a
//! page is not there yet it must be faulted in, which the kernel refuses to a process that has a SIGKILL pending; the copy
//! fails, and the driver then ends the *request* with EIO: the user of the device gets an I/O error because the agent was
//! killed. With the pages in place the copy succeeds, the request counts as taken, and the next agent gets it again. The same
//! holds for answers.
//!
//! Invariant: every page was written to before anybody sees the buffer, and nothing takes it away again: it is not shared with
//! a forked child (which would make it copy-on-write), not merged into a huge page, and locked where the machine allows.

use super::fuse::MESSAGE_BYTES;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// What a thread needs to talk to the kernel; one pair for all devices that it serves.
pub(crate) struct Buffers {
    /// Where a request is read.
    pub(crate) request: Resident,
    /// Where an answer is put together.
    pub(crate) answer: Resident,
}

impl Buffers {
    /// Room for the largest message of either direction.
    ///
    /// # Errors
    /// When there is no memory.
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            request: Resident::new(MESSAGE_BYTES)?,
            answer: Resident::new(MESSAGE_BYTES)?,
        })
    }
}

/// A buffer of fixed size; see the module.
pub(crate) struct Resident {
    start: NonNull<u8>,
    len: usize,
}

#[expect(unsafe_code, reason = "memory with properties that an allocator does not promise")]
impl Resident {
    fn new(len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses; nothing else refers to it.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, protection, MapFlags::PRIVATE) }?;
        let start = NonNull::new(start.cast::<u8>()).ok_or_else(|| io::Error::other("a mapping at address zero"))?;
        let mut buffer = Self { start, len };
        for advice in [Advice::LinuxDontFork, Advice::LinuxNoHugepage] {
            // SAFETY: the range is the whole mapping; neither advice changes its content for this process. A kernel without huge
            // pages refuses the second one, and has no need of it.
            let _ = unsafe { rustix::mm::madvise(buffer.start.as_ptr().cast(), len, advice) };
        }
        // Not zero: it must be plain that this is no leave-out for a clever compiler or a shared page of zeros.
        buffer.fill(0xFF);
        // SAFETY: the range is the whole mapping. Refused where the process may not lock memory, which `harden` reports.
        let _ = unsafe { rustix::mm::mlock(buffer.start.as_ptr().cast(), len) };
        Ok(buffer)
    }
}

#[expect(unsafe_code, reason = "a slice over the mapping")]
impl Deref for Resident {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `len` bytes are mapped, initialised (anonymous pages are) and owned by this value.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

#[expect(unsafe_code, reason = "a slice over the mapping")]
impl DerefMut for Resident {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` is the only way to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[expect(unsafe_code, reason = "the mapping belongs to the value, not to a thread")]
// SAFETY: nothing but this value refers to the mapping.
unsafe impl Send for Resident {}

#[expect(unsafe_code, reason = "the end of the mapping")]
impl Drop for Resident {
    fn drop(&mut self) {
        // SAFETY: exactly what `new` mapped; no slice outlives the value.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert_eq!(unmapped, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `/proc/self/smaps` says of the mapping that begins at `start`.
    fn smaps(start: usize, field: &str) -> Option<String> {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in text.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((low, high)) = range.split_once('-')
                && let (Ok(low), Ok(high)) = (usize::from_str_radix(low, 16), usize::from_str_radix(high, 16))
            {
                inside = (low..high).contains(&start);
            } else if inside && line.starts_with(field) {
                return Some(line[field.len()..].trim().to_owned());
            }
        }
        None
    }

    #[test]
    fn every_page_is_there_before_it_is_used_and_stays_with_this_process() {
        let buffer = Resident::new(MESSAGE_BYTES).unwrap();
        let start = buffer.as_ptr() as usize;
        let resident = smaps(start, "Rss:").unwrap();
        let kib: usize = resident.trim_end_matches(" kB").trim().parse().unwrap();
        assert!(kib * 1024 >= buffer.len(), "{resident} of {} bytes", buffer.len());
        let flags = smaps(start, "VmFlags:").unwrap();
        assert!(flags.split(' ').any(|flag| flag == "dc"), "not copied on fork: {flags}");
    }
}
