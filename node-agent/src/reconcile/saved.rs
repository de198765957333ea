//! What a replica that is not open remembers: read from its slots, without opening the replica.
//!
//! Invariants: nothing is locked, created or changed; what cannot be read for certain – also one damaged slot, for the newer state may have
//! stood in it – is named, and what is told then is only a lower bound.

use super::facts::Done;
use super::opening::read_done;
use super::superblock::{Stage, Superblock};
use mars_engine::slot::{self, Loaded, SlotError};
use mars_engine::state::{SavedRole, SavedState};
use mars_engine::store_fs::{FsFile, FsStore};
use mars_engine::types::Designation;
use std::path::Path;
use std::time::Duration;

/// An engine that is just being opened here may be saving: what looks damaged is looked at again, so often and after such a pause.
const LOOKS: usize = 3;
const PAUSE: Duration = Duration::from_millis(20);

/// What is remembered of designations.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Remembered {
    /// The highest one ever seen, whoever it names.
    pub(super) designation: Option<Designation>,
    /// The one under which this replica is to come back as primary, or was primary last.
    pub(super) primary_under: Option<Designation>,
    /// Why there may be more than this.
    pub(super) unreadable: Option<String>,
}

/// Looks at the replica in `dir`, whose identity file says `superblock`.
pub(super) fn remembered(dir: &Path, superblock: &Superblock) -> Remembered {
    // Was never shown to anybody; its slots may not have been made yet.
    if superblock.stage == Stage::Fresh {
        return Remembered::default();
    }
    let done = read_done(dir);
    let saved = saved(dir, superblock);
    let problems = [
        done.as_ref().err().map(ToString::to_string),
        saved.as_ref().err().cloned(),
        saved.as_ref().ok().and_then(|loaded| {
            let bad = loaded.bad.as_ref().filter(|_| loaded.is_fallback())?;
            Some(format!("{}: {bad}, the other one is intact", dir.display()))
        }),
    ];
    let problems: Vec<String> = problems.into_iter().flatten().collect();
    let state = saved.ok().map(|loaded| loaded.state);
    let granted = state.as_ref().and_then(|state| match state.role {
        SavedRole::Primary { granted } => Some(granted),
        SavedRole::Secondary => None,
    });
    let was = done.ok().and_then(|Done { primary_under, .. }| primary_under);
    let known = |designation: &Designation| *designation != Designation::default();
    let newest = |all: [Option<Designation>; 3]| all.into_iter().flatten().filter(known).max_by_key(|it| it.number);
    Remembered {
        designation: newest([state.map(|state| state.designation), granted, was]),
        primary_under: newest([granted, was, None]),
        unreadable: (!problems.is_empty()).then(|| problems.join("; ")),
    }
}

fn saved(dir: &Path, superblock: &Superblock) -> Result<Loaded<SavedState>, String> {
    let said = |error: String| format!("{}: {error}", dir.display());
    let files = FsStore::slots_to_read(dir).map_err(|error| error.to_string())?;
    let loaded = settled(&files).map_err(|error| said(error.to_string()))?;
    let (state, belongs) = (&loaded.state, &superblock.belongs);
    if (state.cluster, state.resource, state.replica) != (belongs.cluster, belongs.resource, belongs.replica) {
        return Err(said(format!("its saved state is that of replica {}", state.replica)));
    }
    Ok(loaded)
}

fn settled(files: &[FsFile; 2]) -> Result<Loaded<SavedState>, SlotError> {
    let mut looked = slot::peek(files);
    for _ in 1..LOOKS {
        if looked
            .as_ref()
            .is_ok_and(|loaded: &Loaded<SavedState>| !loaded.is_fallback())
        {
            break;
        }
        std::thread::sleep(PAUSE);
        looked = slot::peek(files);
    }
    looked
}
