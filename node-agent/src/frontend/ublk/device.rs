//! The thread that makes (or recovers) one device and waits beside its queue until it is stopped.
//!
//! Invariant: the owner that came in goes out again: to whoever asked for the device if no queue took it, else through the
//! channel it came with. The device outlives this process unless it is closed on purpose.

use super::{FrontendError, control, record, ring};
use crate::frontend::OpenParams;
use crate::shard::host::Host;
use libublk::ctrl::UblkCtrl;
use libublk::io::UblkDev;
use std::path::PathBuf;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

/// The owner on its way to the queue thread, and the way back.
pub(super) type Served = Arc<Mutex<Option<(Box<Host>, Sender<Box<Host>>)>>>;

/// What the control thread of a device gets.
pub(super) struct Setup {
    pub(super) params: OpenParams,
    pub(super) recover: Option<u32>,
    pub(super) record: PathBuf,
    pub(super) served: Served,
}

/// Number of the device, or how far it came and what happened.
pub(super) type Started = Result<u32, (Option<u32>, String)>;

/// Makes (or recovers) a device and runs it until it is stopped; on a thread of its own, since libublk's rings are
/// thread-local.
pub(super) fn run(setup: &Setup, ready: &Sender<Started>) {
    let make = || -> Result<UblkCtrl, FrontendError> {
        let control = control::make(setup.recover)?;
        // The device outlives this process unless it is closed on purpose.
        control.disown();
        if setup.recover.is_none() {
            record::write(&setup.record, control.dev_info().dev_id, None)?;
        }
        Ok(control)
    };
    let control = match make() {
        Ok(control) => control,
        Err(error) => {
            // Whoever waits may have given up.
            let _ = ready.send(Err((None, error.to_string())));
            return;
        }
    };
    let id = control.dev_info().dev_id;
    let (served, started) = (setup.served.clone(), ready.clone());
    let serve = move |queue: u16, device: &UblkDev| {
        let taken = served.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some((host, returned)) = taken else { return };
        if let Some(host) = ring::serve_queue(queue, device, host) {
            let _ = returned.send(host);
        }
    };
    let announce = move |_: &UblkCtrl| {
        let _ = started.send(Ok(id));
    };
    let describe = |device: &mut UblkDev| {
        control::describe(device, &setup.params);
        Ok(())
    };
    if let Err(error) = control.run_target(describe, serve, announce) {
        let _ = ready.send(Err((Some(id), format!("{error:?}"))));
    }
}
