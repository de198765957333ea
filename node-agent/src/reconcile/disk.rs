//! Letting go of the data disk of a secondary, and taking it back.
//!
//! Invariants: a disk that is let go of holds exactly the content at the applied position, flushed, and nobody here has it open; it is
//! taken back only if it is the recorded disk and nothing says that it was written to meanwhile. What is persisted says "detached"
//! before the claim is released and until it is ours again, so no crash makes the agent open a disk that somebody else uses.

use super::context::NodeContext;
use super::execute::{Outcome, problem, remember};
use super::facts::Detached;
use super::opening;
use super::report::Problem;
use super::running::Running;
use super::todo::Todo;
use crate::pool::witness::{Verdict, Witness};
use std::sync::Arc;
use tracing::{info, warn};

/// Lets go of the disk; its owner is at rest.
pub(super) fn detach(todo: &Todo, running: &mut Running) -> Outcome {
    let Some(backing) = &running.backing else {
        return Ok(());
    };
    let disk_bytes = backing.size_bytes;
    // Flushing a disk may take long; this replica's round has nothing else to do, and the data path does not need it.
    let taken = tokio::task::block_in_place(|| {
        running.store.detach_data()?;
        Witness::take(backing)
    });
    let witness = match taken {
        Ok(witness) => witness,
        Err(error) => {
            let reopened = backing.open().and_then(|data| running.store.attach_data(data));
            reopened.map_err(|error| problem("DetachFailed", &error))?;
            return Err(problem("DetachFailed", &error));
        }
    };
    let remembered = remember(running, |done| {
        done.detached = Some(Detached {
            disk_bytes,
            witness: Some(witness),
        });
    });
    if let Err(failed) = remembered {
        let backing = running.backing.as_ref();
        let reopened = backing.map_or(Ok(()), |backing| {
            backing.open().and_then(|data| running.store.attach_data(data))
        });
        reopened.map_err(|error| problem("DetachFailed", &error))?;
        return Err(failed);
    }
    let released = running.backing.take();
    let status = running.handle.status().borrow().clone();
    info!(
        replica = todo.name,
        disk = ?released.map(|backing| backing.path),
        applied = %status.applied,
        "the data disk is detached: it holds exactly this position"
    );
    Ok(())
}

/// Takes the disk back, unless it was changed.
pub(super) fn attach(node: &Arc<NodeContext>, todo: &Todo, running: &mut Running) -> Outcome {
    let Some(detached) = running.done.detached.clone() else {
        return Ok(());
    };
    let claimed = tokio::task::block_in_place(|| opening::claim_again(node, todo, &running.dir));
    let backing = claimed.map_err(|error| error.problem())?;
    let now = Witness::take(&backing).map_err(|error| problem("AttachFailed", &error))?;
    match detached.witness.map(|before| before.compare(&now)) {
        None | Some(Verdict::Unchanged) => {}
        Some(Verdict::Unknown) => warn!(
            replica = todo.name,
            disk = %backing.path.display(),
            "whether this disk was written to while it was detached cannot be told: it is believed that it was not"
        ),
        Some(Verdict::Changed) => {
            return Err(Problem {
                reason: "DiskChanged",
                message: format!(
                    "{} was written to while it was detached, so it is not what this replica applied any more: let it sync \
                     again with a MarsAction Invalidate, or restore it and leave the file untouched",
                    backing.path.display()
                ),
            });
        }
    }
    let attached = backing.open().and_then(|data| running.store.attach_data(data));
    attached.map_err(|error| problem("AttachFailed", &error))?;
    running.backing = Some(backing);
    remember(running, |done| done.detached = None)?;
    info!(replica = todo.name, "the data disk is attached again");
    Ok(())
}
