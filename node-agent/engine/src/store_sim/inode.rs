//! One simulated file: sparse 4 KiB pages, each with the image that processes see and the one that the medium holds.
//!
//! Invariant: a page without dirty or lost sectors has one image; `medium` is set exactly while the two may differ.

use rand::Rng;
use rand::rngs::SmallRng;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

/// Bytes of a page.
pub(super) const PAGE: usize = 4096;
/// Bytes of a sector: the unit that is written, lost or torn.
const SECTOR: usize = 512;
const SECTORS_PER_PAGE: usize = PAGE / SECTOR;

type Image = Box<[u8; PAGE]>;

/// A page with content. Pages that were never written are absent and read as zeros.
#[derive(Debug)]
struct Page {
    /// What processes read.
    cached: Image,
    /// What is on the medium, while it may differ.
    medium: Option<Image>,
    /// Sectors that a sync would write (bit per sector).
    dirty: u8,
    /// Sectors whose write-back failed: clean in the eyes of the kernel, not on the medium.
    lost: u8,
}

impl Page {
    fn zero() -> Self {
        Self {
            cached: Box::new([0; PAGE]),
            medium: None,
            dirty: 0,
            lost: 0,
        }
    }
}

/// What a power loss does to unsynced sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// Nothing that was not synced survives.
    OnlySynced,
    /// Everything survives, as after a reset without loss of power.
    Everything,
    /// Each unsynced sector survives or not; none is torn.
    Some,
    /// Each unsynced sector survives, or not, or is torn: neither its old nor its new bytes are there.
    Torn,
}

/// A file that exists, may be linked in the directory or only open.
#[derive(Debug)]
pub(super) struct Inode {
    pages: BTreeMap<u64, Page>,
    /// Pages with dirty sectors.
    dirty: BTreeSet<u64>,
    /// Pages whose two images differ (dirty or lost).
    unsynced: BTreeSet<u64>,
    len: u64,
    medium_len: u64,
    token: Weak<()>,
}

fn page_of(offset: u64) -> u64 {
    offset / PAGE as u64
}

fn within(offset: u64) -> usize {
    usize::try_from(offset % PAGE as u64).expect("a remainder below 4096 fits")
}

/// Bits of the sectors that `start..end` (within one page) touches.
fn sector_mask(start: usize, end: usize) -> u8 {
    (start / SECTOR..end.div_ceil(SECTOR)).fold(0, |mask, sector| mask | 1 << sector)
}

fn sectors(mask: u8) -> impl Iterator<Item = std::ops::Range<usize>> {
    (0..SECTORS_PER_PAGE)
        .filter(move |sector| mask & (1 << sector) != 0)
        .map(|s| s * SECTOR..(s + 1) * SECTOR)
}

impl Inode {
    pub(super) fn new(len: u64, token: &Arc<()>) -> Self {
        Self {
            pages: BTreeMap::new(),
            dirty: BTreeSet::new(),
            unsynced: BTreeSet::new(),
            len,
            medium_len: len,
            token: Arc::downgrade(token),
        }
    }

    /// The token that keeps this inode while it is open; a fresh one when nobody has it open.
    pub(super) fn open_token(&mut self) -> Arc<()> {
        self.token.upgrade().unwrap_or_else(|| {
            let token = Arc::new(());
            self.token = Arc::downgrade(&token);
            token
        })
    }

    pub(super) fn is_open(&self) -> bool {
        self.token.strong_count() > 0
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// The administrator enlarged the disk: durable at once.
    pub(super) fn grow(&mut self, len: u64) {
        self.len = self.len.max(len);
        self.medium_len = self.medium_len.max(len);
    }

    pub(super) fn set_len(&mut self, len: u64) {
        self.len = len;
    }

    /// Fills `buffer`; the caller has checked the bounds.
    pub(super) fn read(&self, mut buffer: &mut [u8], mut offset: u64) {
        while !buffer.is_empty() {
            let start = within(offset);
            let count = buffer.len().min(PAGE - start);
            let (now, rest) = buffer.split_at_mut(count);
            match self.pages.get(&page_of(offset)) {
                Some(page) => now.copy_from_slice(&page.cached[start..start + count]),
                None => now.fill(0),
            }
            buffer = rest;
            offset += count as u64;
        }
    }

    /// Writes into the cache. Bytes that were dirty before may by chance have been written back already.
    pub(super) fn write(&mut self, mut bytes: &[u8], mut offset: u64, rng: &mut SmallRng) {
        while !bytes.is_empty() {
            let start = within(offset);
            let count = bytes.len().min(PAGE - start);
            let (now, rest) = bytes.split_at(count);
            let number = page_of(offset);
            let page = self.pages.entry(number).or_insert_with(Page::zero);
            let mask = sector_mask(start, start + count);
            if page.medium.is_none() {
                page.medium = Some(page.cached.clone());
            }
            let rewritten = page.dirty & mask;
            if rewritten != 0 && rng.random_ratio(1, 8) {
                let medium = page.medium.as_mut().expect("set just above");
                sectors(rewritten).for_each(|range| medium[range.clone()].copy_from_slice(&page.cached[range]));
            }
            page.cached[start..start + count].copy_from_slice(now);
            page.dirty |= mask;
            page.lost &= !mask;
            self.dirty.insert(number);
            self.unsynced.insert(number);
            bytes = rest;
            offset += count as u64;
        }
    }

    /// Like writing zeros, without allocating pages that are absent already.
    pub(super) fn zero(&mut self, offset: u64, len: u64, rng: &mut SmallRng) {
        let end = offset + len;
        let touched: Vec<u64> = self
            .pages
            .range(page_of(offset)..=page_of(end))
            .map(|(number, _)| *number)
            .collect();
        for number in touched {
            let first = (number * PAGE as u64).max(offset);
            let last = ((number + 1) * PAGE as u64).min(end);
            if first < last {
                let count = usize::try_from(last - first).expect("at most a page");
                self.write(&[0; PAGE][..count], first, rng);
            }
        }
    }

    /// A successful fdatasync.
    pub(super) fn sync(&mut self) {
        for number in std::mem::take(&mut self.dirty) {
            let page = self.pages.get_mut(&number).expect("dirty pages exist");
            if page.lost == 0 {
                page.medium = None;
                self.unsynced.remove(&number);
            } else {
                let medium = page.medium.as_mut().expect("unsynced pages have two images");
                sectors(page.dirty).for_each(|range| medium[range.clone()].copy_from_slice(&page.cached[range]));
            }
            page.dirty = 0;
        }
        self.medium_len = self.len;
    }

    /// An fdatasync that failed: dirty sectors become clean without having been written.
    pub(super) fn fail_sync(&mut self) {
        for number in std::mem::take(&mut self.dirty) {
            let page = self.pages.get_mut(&number).expect("dirty pages exist");
            page.lost |= std::mem::take(&mut page.dirty);
        }
    }

    /// The machine loses power: afterwards there is one image again.
    pub(super) fn power_loss(&mut self, survival: Survival, rng: &mut SmallRng) {
        self.dirty.clear();
        for number in std::mem::take(&mut self.unsynced) {
            let page = self.pages.get_mut(&number).expect("unsynced pages exist");
            let mut medium = page.medium.take().expect("unsynced pages have two images");
            let keep_page = rng.random_ratio(1, 3);
            for range in sectors(page.dirty) {
                match survival {
                    Survival::OnlySynced => {}
                    Survival::Everything => medium[range.clone()].copy_from_slice(&page.cached[range]),
                    Survival::Some | Survival::Torn => {
                        let fate = rng.random_range(0..6);
                        if keep_page || fate < 3 {
                            medium[range.clone()].copy_from_slice(&page.cached[range]);
                        } else if fate == 3 && survival == Survival::Torn {
                            tear(&mut medium[range.clone()], &page.cached[range], rng);
                        }
                    }
                }
            }
            page.cached = medium;
            page.dirty = 0;
            page.lost = 0;
        }
        let longer = match survival {
            Survival::OnlySynced => false,
            Survival::Everything => true,
            Survival::Some | Survival::Torn => rng.random(),
        };
        if longer {
            self.medium_len = self.len;
        }
        self.len = self.medium_len;
        let len = self.len;
        self.pages.retain(|number, _| number * (PAGE as u64) < len);
    }

    /// Changes bytes in both images.
    pub(super) fn poke(&mut self, bytes: &[u8], offset: u64) {
        for (i, byte) in bytes.iter().enumerate() {
            let at = offset + i as u64;
            let page = self.pages.entry(page_of(at)).or_insert_with(Page::zero);
            page.cached[within(at)] = *byte;
            if let Some(medium) = &mut page.medium {
                medium[within(at)] = *byte;
            }
        }
    }

    /// The whole content, cached or as on the medium.
    pub(super) fn image(&self, medium: bool) -> Vec<u8> {
        let len = if medium { self.medium_len } else { self.len };
        let mut bytes = vec![0; usize::try_from(len).expect("simulated files fit into memory")];
        for (number, page) in &self.pages {
            let start = usize::try_from(*number).expect("simulated files fit into memory") * PAGE;
            let end = bytes.len().min(start + PAGE);
            if start < end {
                let source = page.medium.as_ref().filter(|_| medium).unwrap_or(&page.cached);
                bytes[start..end].copy_from_slice(&source[..end - start]);
            }
        }
        bytes
    }

    /// First allocated run of pages at or after `from`: (offset, len).
    pub(super) fn next_data(&self, from: u64) -> Option<(u64, u64)> {
        let first = *self.pages.range(page_of(from)..).next()?.0;
        let mut end = first;
        for (number, _) in self.pages.range(first..) {
            if *number != end {
                break;
            }
            end += 1;
        }
        let start = (first * PAGE as u64).max(from);
        let end = (end * PAGE as u64).min(self.len);
        (start < end).then(|| (start, end - start))
    }

    pub(super) fn hash_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&self.len.to_le_bytes());
        hasher.update(&self.medium_len.to_le_bytes());
        for (number, page) in &self.pages {
            hasher.update(&number.to_le_bytes());
            hasher.update(&page.cached[..]);
            hasher.update(page.medium.as_ref().map_or(&page.cached[..], |medium| &medium[..]));
            hasher.update(&[page.dirty, page.lost]);
        }
    }
}

/// Leaves in `old` a mixture of old, new and garbage.
fn tear(old: &mut [u8], new: &[u8], rng: &mut SmallRng) {
    let cut = rng.random_range(0..old.len());
    old[..cut].copy_from_slice(&new[..cut]);
    match rng.random_range(0..3) {
        0 => {}
        1 => old[cut..].fill(0),
        _ => rng.fill(&mut old[cut..]),
    }
}
