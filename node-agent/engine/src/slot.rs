//! Saved state in two preallocated, checksummed slots that are overwritten in turn.
//!
//! Saving never allocates blocks, so it works on a full file system, and never touches the slot that holds the newest good state, so
//! a crash at any moment leaves that one. The body is JSON: an administrator can read it with any tool.
//!
//! Invariant: `load` returns a state that was saved completely, the newest of those that are intact, and says whether a newer
//! one may have been lost.

use crate::format::crc32c;
use crate::store::{FileId, Store, StoreFile};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::marker::PhantomData;

/// Default size of a slot file (bytes).
pub const SLOT_BYTES: u64 = 256 << 10;
/// Version of the slot header; the body has its own rules (unknown fields are refused).
pub const SLOT_VERSION: u32 = 1;
const MAGIC: &[u8; 8] = b"MARSSLOT";
/// Magic 8, version 4, body length 4, generation 8, reserved 4, crc32c of header and body 4.
const HEADER_BYTES: usize = 32;
const CRC_AT: usize = 28;

/// Why state could not be loaded or saved.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The store failed.
    #[error("saved state, {what}: {source}")]
    Io {
        /// Which slot, and what was being done.
        what: String,
        /// What the system said.
        source: io::Error,
    },
    /// Neither slot holds a state.
    #[error("saved state: {0}; {1}: restore the replica directory, or invalidate this replica")]
    BothBad(BadSlot, BadSlot),
    /// Written by a newer version.
    #[error("slot-{index}: saved state has version {found}, newer than {SLOT_VERSION}: start the newer program again")]
    Newer {
        /// 0 or 1.
        index: u8,
        /// What was found.
        found: u32,
    },
    /// Too large to be saved.
    #[error("saved state has {bytes} bytes, more than the {limit} that a slot holds")]
    TooLarge {
        /// Serialized size.
        bytes: usize,
        /// What a slot holds.
        limit: u64,
    },
    /// Cannot be put into JSON, or the intact body is not what this version expects.
    #[error("saved state: {0}: it was written by another version; start the version that wrote it")]
    Body(#[from] serde_json::Error),
}

/// A slot that holds no state, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("slot {index} {why}")]
pub struct BadSlot {
    /// 0 or 1.
    pub index: u8,
    /// Never written, unreadable or damaged.
    pub why: String,
    /// True when it was never written: normal before the second save.
    pub never_written: bool,
}

/// What was loaded.
#[derive(Debug)]
pub struct Loaded<T> {
    /// The state.
    pub state: T,
    /// The other slot, if it is bad. Unless it was never written it may have held a newer state: a fallback, which must not
    /// resume the primary role.
    pub bad: Option<BadSlot>,
}

impl<T> Loaded<T> {
    /// Whether a newer state may have been lost.
    #[must_use]
    pub fn is_fallback(&self) -> bool {
        self.bad.as_ref().is_some_and(|bad| !bad.never_written)
    }
}

/// The two slots of one replica.
#[derive(Debug)]
pub struct Slots<S: Store, T> {
    files: [S::File; 2],
    slot_bytes: u64,
    generation: u64,
    _state: PhantomData<fn(T)>,
}

/// Odd generations stand in slot 0, even ones in slot 1.
fn file_of<F>(files: &[F; 2], generation: u64) -> &F {
    &files[usize::from(generation.is_multiple_of(2))]
}

/// What one slot says.
enum Content {
    State { generation: u64, body: Vec<u8> },
    Bad(BadSlot),
}

/// A state that is ready to be written: `run` may block and belongs on a pool.
#[derive(Debug)]
pub struct SlotWrite<F> {
    file: F,
    bytes: Vec<u8>,
}

impl<F: StoreFile> SlotWrite<F> {
    /// Writes and syncs. Once begun, it is done or has failed before the next one begins.
    ///
    /// # Errors
    /// Any I/O error: the other slot still holds the state before.
    pub fn run(&self) -> io::Result<()> {
        self.file.write_at(&[&self.bytes], 0)?;
        self.file.sync()
    }
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> SlotError {
    let what = what.into();
    move |source| SlotError::Io { what, source }
}

impl<S: Store, T: Serialize + DeserializeOwned> Slots<S, T> {
    /// Creates both slots for a replica that has none, and saves its first state durably. Slots that a creation left behind that
    /// was interrupted before anything was saved are replaced.
    ///
    /// # Errors
    /// `AlreadyExists` inside [`SlotError::Io`] when there are slots; any other I/O error.
    pub fn create(store: &S, slot_bytes: u64, first: &T) -> Result<Self, SlotError> {
        let make = |index| {
            let id = FileId::Slot(index);
            let what = || io_error(format!("create slot {index}"));
            match store.create(&id, slot_bytes) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    if holds_anything(&store.open(&id).map_err(what())?).map_err(what())? {
                        return Err(what()(error));
                    }
                    store.remove(&id).map_err(what())?;
                    store.create(&id, slot_bytes).map_err(what())
                }
                other => other.map_err(what()),
            }
        };
        let mut slots = Self {
            files: [make(0)?, make(1)?],
            slot_bytes,
            generation: 0,
            _state: PhantomData,
        };
        slots.save(first)?;
        Ok(slots)
    }

    /// Opens both slots and loads the newer intact state.
    ///
    /// # Errors
    /// `NotFound` inside [`SlotError::Io`] when a slot file is missing: nothing is created. See [`SlotError`].
    pub fn open(store: &S) -> Result<(Self, Loaded<T>), SlotError> {
        let open = |index| {
            store
                .open(&FileId::Slot(index))
                .map_err(io_error(format!("open slot {index}")))
        };
        let files = [open(0)?, open(1)?];
        let (generation, body, bad) = newest(&files)?;
        // The process before may have died between its write and its sync. The next save overwrites the other slot, which must
        // not be the only one on stable storage then.
        file_of(&files, generation)
            .sync()
            .map_err(io_error("sync the newer slot"))?;
        let slot_bytes = files[0].size().map_err(io_error("size of slot 0"))?;
        let state = serde_json::from_slice(&body)?;
        Ok((
            Self {
                files,
                slot_bytes,
                generation,
                _state: PhantomData,
            },
            Loaded { state, bad },
        ))
    }

    /// Prepares the next save; it overwrites the older slot. Saves must be run in the order in which they were prepared, and a
    /// failed one repeated (prepared anew) before its state counts as saved.
    ///
    /// # Errors
    /// [`SlotError::TooLarge`] or [`SlotError::Body`]: nothing changes.
    pub fn prepare(&mut self, state: &T) -> Result<SlotWrite<S::File>, SlotError> {
        let body = serde_json::to_vec(state)?;
        let bytes = HEADER_BYTES + body.len();
        let body_len = u32::try_from(body.len())
            .ok()
            .filter(|_| bytes as u64 <= self.slot_bytes);
        let Some(body_len) = body_len else {
            return Err(SlotError::TooLarge {
                bytes,
                limit: self.slot_bytes,
            });
        };
        let generation = self.generation + 1;
        let mut image = Vec::with_capacity(bytes);
        image.extend_from_slice(MAGIC);
        image.extend_from_slice(&SLOT_VERSION.to_le_bytes());
        image.extend_from_slice(&body_len.to_le_bytes());
        image.extend_from_slice(&generation.to_le_bytes());
        image.extend_from_slice(&[0; 4]);
        let crc = crc32c(&[&image[..CRC_AT], &body]);
        image.extend_from_slice(&crc.to_le_bytes());
        image.extend_from_slice(&body);
        let file = file_of(&self.files, generation).clone();
        self.generation = generation;
        Ok(SlotWrite { file, bytes: image })
    }

    /// The prepared save failed: the next one goes to the same slot, so that the good one stays.
    pub fn save_failed(&mut self) {
        // The failed slot may hold anything, also this generation in full. One more keeps the order and, with the parity
        // of the failed one, its place.
        self.generation += 1;
    }

    /// Saves durably, here and now.
    ///
    /// # Errors
    /// See [`SlotError`].
    pub fn save(&mut self, state: &T) -> Result<(), SlotError> {
        let write = self.prepare(state)?;
        if let Err(error) = write.run() {
            self.save_failed();
            return Err(io_error("write")(error));
        }
        Ok(())
    }

    /// Counts saves.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }
}

/// The state in the slots of a replica that is not open here. Only reads; the newer state need not be on stable storage yet. While
/// an owner saves, a slot may look damaged.
///
/// # Errors
/// Neither slot holds a state, or one of a newer version. See [`SlotError`].
pub fn peek<F: StoreFile, T: DeserializeOwned>(files: &[F; 2]) -> Result<Loaded<T>, SlotError> {
    let (_, body, bad) = newest(files)?;
    let state = serde_json::from_slice(&body)?;
    Ok(Loaded { state, bad })
}

/// Generation and body of the newer intact slot, and what is wrong with the other one.
fn newest<F: StoreFile>(files: &[F; 2]) -> Result<(u64, Vec<u8>, Option<BadSlot>), SlotError> {
    let (first, second) = (read(&files[0], 0)?, read(&files[1], 1)?);
    match (first, second) {
        (Content::Bad(first), Content::Bad(second)) => Err(SlotError::BothBad(first, second)),
        (Content::State { generation, body }, Content::Bad(bad))
        | (Content::Bad(bad), Content::State { generation, body }) => Ok((generation, body, Some(bad))),
        (
            Content::State { generation, .. },
            Content::State {
                generation: other,
                body: newer,
            },
        ) if generation < other => Ok((other, newer, None)),
        (Content::State { generation, body }, Content::State { .. }) => Ok((generation, body, None)),
    }
}

/// Whether a slot file was ever written to.
fn holds_anything<F: StoreFile>(file: &F) -> io::Result<bool> {
    let len = file.size()?.min(HEADER_BYTES as u64);
    let mut header = vec![0; usize::try_from(len).expect("a header fits in memory")];
    file.read_at(&mut header, 0)?;
    Ok(header.iter().any(|byte| *byte != 0))
}

fn read<F: StoreFile>(file: &F, index: u8) -> Result<Content, SlotError> {
    let bad = |why: &str, never_written| {
        Content::Bad(BadSlot {
            index,
            why: why.to_owned(),
            never_written,
        })
    };
    let size = file.size().map_err(io_error(format!("size of slot {index}")))?;
    let mut header = [0; HEADER_BYTES];
    if size < HEADER_BYTES as u64 {
        return Ok(bad("is too short", false));
    }
    if let Err(error) = file.read_at(&mut header, 0) {
        return Ok(bad(&format!("cannot be read ({error})"), false));
    }
    if header.iter().all(|byte| *byte == 0) {
        return Ok(bad("was never written", true));
    }
    let number = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes"));
    let body_len = usize::try_from(number(12)).unwrap_or(usize::MAX);
    if &header[..8] != MAGIC || (HEADER_BYTES as u64).saturating_add(body_len as u64) > size {
        return Ok(bad("is damaged (header)", false));
    }
    let mut body = vec![0; body_len];
    if let Err(error) = file.read_at(&mut body, HEADER_BYTES as u64) {
        return Ok(bad(&format!("cannot be read ({error})"), false));
    }
    if number(CRC_AT) != crc32c(&[&header[..CRC_AT], &body]) {
        return Ok(bad("is damaged (checksum)", false));
    }
    if number(8) > SLOT_VERSION {
        let found = number(8);
        return Err(SlotError::Newer { index, found });
    }
    let generation = u64::from_le_bytes(header[16..24].try_into().expect("eight bytes"));
    Ok(Content::State { generation, body })
}

#[cfg(test)]
mod tests;
