//! A writer that remembers what it was promised, and judges what it finds after a crash.
//!
//! The judgement: the device holds exactly the effect of a prefix of all changes in the order of submission (P3), at least up to the
//! last one whose survival was promised (P1 after the death of the process, P2 after a power loss). Nothing is invented.

use super::{Rig, Tag};
use crate::api::{Durability, Io, IoResult, Submitted};
use crate::types::{ByteRange, SECTOR_BYTES};
use rand::Rng;
use std::collections::BTreeMap;

/// What was asked of the device, in order of submission.
#[derive(Debug, Clone)]
struct Change {
    range: ByteRange,
    /// `None`: zeros.
    bytes: Option<Vec<u8>>,
}

#[derive(Debug, Clone, Copy)]
enum Asked {
    /// Change number so and so; its completion promises durability?
    Change { index: usize, durable: bool },
    /// Everything completed before is durable on completion: that many changes.
    Flush { covers: usize },
    /// A read: nothing to remember.
    Read,
}

/// Which crash happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The process died.
    Process,
    /// The power failed.
    Power,
}

/// See the module.
#[derive(Debug)]
pub struct Load {
    device: usize,
    /// Content before the first change.
    base: Vec<u8>,
    changes: Vec<Change>,
    asked: BTreeMap<Tag, Asked>,
    /// That many changes are answered at least.
    answered: usize,
    /// That many changes are promised to survive power loss.
    promised: usize,
    stamp: u64,
    /// Longest write (sectors).
    pub max_sectors: u64,
}

impl Load {
    /// On a device whose content is all zeros.
    ///
    /// # Panics
    /// When it does not fit into memory.
    #[must_use]
    pub fn new(device_bytes: u64) -> Self {
        let device = usize::try_from(device_bytes).expect("test devices fit in memory");
        Load {
            device,
            base: vec![0; device],
            changes: Vec::new(),
            asked: BTreeMap::new(),
            answered: 0,
            promised: 0,
            stamp: 1,
            max_sectors: 32,
        }
    }

    /// On a device that holds this.
    #[must_use]
    pub fn with_content(content: Vec<u8>) -> Self {
        Load {
            device: content.len(),
            base: content,
            ..Load::new(0)
        }
    }

    /// The content when all changes submitted so far have taken effect.
    #[must_use]
    pub fn newest(&self) -> Vec<u8> {
        self.content_after(self.changes.len())
    }

    /// The content after the first `count` changes.
    #[must_use]
    pub fn content_after(&self, count: usize) -> Vec<u8> {
        let mut content = self.base.clone();
        self.changes[..count]
            .iter()
            .for_each(|change| change.apply(&mut content));
        content
    }

    /// Number of changes so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing was changed yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Requests without an answer.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.asked.len()
    }

    /// One random request.
    pub fn step(&mut self, rig: &mut Rig) {
        match rig.rng().random_range(0..100) {
            0..=64 => self.write(rig, false),
            65..=74 => self.write(rig, true),
            75..=79 => self.zero(rig, true),
            80..=84 => self.zero(rig, false),
            85..=92 => self.flush(rig),
            _ => self.read(rig),
        }
        self.collect(rig);
    }

    fn range(&self, rig: &mut Rig) -> ByteRange {
        let sectors = self.device as u64 / SECTOR_BYTES;
        let len = rig.rng().random_range(1..=self.max_sectors.min(sectors));
        let from = rig.rng().random_range(0..=sectors - len);
        ByteRange {
            offset: from * SECTOR_BYTES,
            len: len * SECTOR_BYTES,
        }
    }

    /// A write of recognizable bytes.
    ///
    /// # Panics
    /// When it is answered with an error.
    pub fn write(&mut self, rig: &mut Rig, fua: bool) {
        let range = self.range(rig);
        self.stamp += 1;
        let stamp = self.stamp.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        let bytes: Vec<u8> = stamp
            .iter()
            .copied()
            .cycle()
            .take(usize::try_from(range.len).expect("fits"))
            .collect();
        let durable = fua || rig.params.tuning.durability == Durability::EveryWrite;
        self.changes.push(Change {
            range,
            bytes: Some(bytes.clone()),
        });
        let asked = Asked::Change {
            index: self.changes.len() - 1,
            durable,
        };
        let (tag, submitted) = rig.submit(Io::Write {
            offset: range.offset,
            data: &bytes,
            fua,
        });
        self.submitted(tag, asked, submitted);
    }

    fn zero(&mut self, rig: &mut Rig, discard: bool) {
        let range = self.range(rig);
        let durable = rig.params.tuning.durability == Durability::EveryWrite;
        self.changes.push(Change { range, bytes: None });
        let asked = Asked::Change {
            index: self.changes.len() - 1,
            durable,
        };
        let io = if discard {
            Io::Discard { range }
        } else {
            Io::WriteZeroes { range, fua: false }
        };
        let (tag, submitted) = rig.submit(io);
        self.submitted(tag, asked, submitted);
    }

    /// A flush.
    pub fn flush(&mut self, rig: &mut Rig) {
        let asked = Asked::Flush { covers: self.answered };
        let (tag, submitted) = rig.submit(Io::Flush);
        self.submitted(tag, asked, submitted);
    }

    fn read(&mut self, rig: &mut Rig) {
        let range = self.range(rig);
        let quiet = self.outstanding() == 0;
        let (tag, submitted) = rig.submit(Io::Read { range });
        if let Submitted::Now(result) = submitted {
            if quiet {
                self.check_read(range, &result);
            }
        } else if quiet && rig.is_up() {
            // Only with nothing else under way is there one right answer.
            rig.run_until(|rig| rig.has_completion(tag));
            if let Some(result) = rig.completion(tag) {
                self.check_read(range, &result);
            }
        } else {
            self.asked.insert(tag, Asked::Read);
        }
    }

    fn check_read(&self, range: ByteRange, result: &IoResult) {
        let IoResult::Data(bytes) = result else {
            panic!("read of {range:?}: {result:?}")
        };
        let (from, to) = (
            usize::try_from(range.offset).expect("fits"),
            usize::try_from(range.end()).expect("fits"),
        );
        assert!(
            self.newest()[from..to] == bytes[..],
            "a read of {range:?} does not return the newest bytes"
        );
    }

    fn submitted(&mut self, tag: Tag, asked: Asked, submitted: Submitted) {
        match submitted {
            Submitted::Now(result) => self.answered(asked, &result),
            Submitted::Later => {
                self.asked.insert(tag, asked);
            }
        }
    }

    fn answered(&mut self, asked: Asked, result: &IoResult) {
        assert!(
            !matches!(result, IoResult::Errno(_)),
            "{asked:?} was answered with {result:?}"
        );
        match asked {
            Asked::Change { index, durable } => {
                self.answered = self.answered.max(index + 1);
                if durable {
                    self.promised = self.promised.max(index + 1);
                }
            }
            Asked::Flush { covers } => self.promised = self.promised.max(covers),
            Asked::Read => {}
        }
    }

    /// Takes note of answers that came meanwhile.
    ///
    /// # Panics
    /// When one of them is an error.
    pub fn collect(&mut self, rig: &mut Rig) {
        let tags: Vec<Tag> = self.asked.keys().copied().collect();
        for tag in tags {
            if let Some(result) = rig.completion(tag) {
                let asked = self.asked.remove(&tag).expect("it was listed");
                self.answered(asked, &result);
            }
        }
    }

    /// Judges the content after a crash and a recovery, and goes on from there. Returns how many changes survived.
    ///
    /// # Panics
    /// When a promise was broken.
    pub fn judge(&mut self, content: &[u8], crash: Crash) -> usize {
        let least = match crash {
            Crash::Process => self.answered.max(self.promised),
            Crash::Power => self.promised,
        };
        let mut expected = self.content_after(least);
        let mut survived = None;
        for count in least..=self.changes.len() {
            if count > least {
                self.changes[count - 1].apply(&mut expected);
            }
            if expected == content {
                survived = Some(count);
            }
        }
        let Some(survived) = survived else {
            panic!(
                "after {crash:?} the device holds no prefix of at least {least} of {} changes",
                self.changes.len()
            );
        };
        self.base = content.to_vec();
        self.changes.clear();
        self.asked.clear();
        (self.answered, self.promised) = (0, 0);
        survived
    }
}

impl Change {
    fn apply(&self, content: &mut [u8]) {
        let (from, to) = (usize::try_from(self.range.offset), usize::try_from(self.range.end()));
        let target = &mut content[from.expect("fits")..to.expect("fits")];
        match &self.bytes {
            Some(bytes) => target.copy_from_slice(bytes),
            None => target.fill(0),
        }
    }
}
