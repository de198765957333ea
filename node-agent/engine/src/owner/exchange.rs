//! Another stack under a running device: one more brick, one less, another way to the same bytes.
//!
//! Everything that is under way through the old stack comes back first; meanwhile reads that need the disk and write-back wait, and
//! writes go on into the log. So no job ever sees both, and a flush covers what was written through the same stack.
//!
//! Invariants: no request fails because of an exchange, or waits for longer than what was under way; a stack that cannot hold the device is
//! refused, and then the old one goes on.

use super::{Owner, Purpose};
use crate::api::{CommandId, DataState, Refusal, Role};
use crate::brick::Disk;
use crate::jobs::Job;
use crate::store::Store;
use crate::types::ByteRange;
use std::collections::VecDeque;
use std::io;

/// An exchange that waits.
#[derive(Debug)]
struct Pending {
    id: CommandId,
    disk: Disk,
    /// Length of the new stack, once known (bytes).
    bytes: Option<u64>,
}

/// The state of an exchange.
#[derive(Debug, Default)]
pub(super) struct Exchange {
    pending: Option<Pending>,
    /// Reads that wait for it, by tag.
    held: VecDeque<(u64, ByteRange)>,
}

impl Exchange {
    pub(super) fn hold(&mut self, tag: u64, range: ByteRange) {
        self.held.push_back((tag, range));
    }
}

fn too_small(bytes: u64, wanted_bytes: u64) -> Refusal {
    Refusal::Invalid(format!(
        "the new disk has {bytes} bytes, the device {wanted_bytes}: it stays on the old one"
    ))
}

impl<S: Store> Owner<S> {
    pub(super) fn is_exchanging(&self) -> bool {
        self.exchange.pending.is_some()
    }

    pub(super) fn begin_exchange(&mut self, id: CommandId, disk: Disk) {
        if let Err(refusal) = self.may_exchange() {
            return self.refuse(id, refusal);
        }
        self.job(Purpose::NewDisk, Job::Size(disk.clone()));
        self.exchange.pending = Some(Pending { id, disk, bytes: None });
    }

    fn may_exchange(&self) -> Result<(), Refusal> {
        let role = self.role;
        if self.is_exchanging() || (self.operation.is_some() && role != Role::Primary) {
            let hint = "another operation is under way: try again after it";
            return Err(Refusal::WrongRole { role, hint });
        }
        if self.saved.data == DataState::Syncing {
            // What was copied since the last checkpoint is flushed through the stack that it was written through, or not at all.
            let hint = "a copy is needed or under way: exchange the disk after it";
            return Err(Refusal::WrongRole { role, hint });
        }
        Ok(())
    }

    pub(super) fn new_disk_measured(&mut self, result: io::Result<u64>) {
        let Some(pending) = &mut self.exchange.pending else {
            unreachable!("an exchange was pending")
        };
        let id = pending.id;
        let wanted_bytes = self.replay.size_bytes();
        let refusal = match result {
            Ok(bytes) if bytes >= wanted_bytes => {
                pending.bytes = Some(bytes);
                self.moved = true;
                return;
            }
            Ok(bytes) => too_small(bytes, wanted_bytes),
            Err(error) => Refusal::Io(format!(
                "the new disk does not tell its size: {error}; the device stays on the old one"
            )),
        };
        self.exchange.pending = None;
        self.refuse(id, refusal);
        self.go_on();
    }

    /// Exchanges once nothing is under way through the old stack.
    pub(super) fn step_exchange(&mut self) {
        let busy = self.jobs.values().any(|purpose| {
            matches!(
                purpose,
                Purpose::Read { .. }
                    | Purpose::Flight
                    | Purpose::DiskSize
                    | Purpose::SyncWrite { .. }
                    | Purpose::SyncFlush
                    | Purpose::SyncRefresh { .. }
            )
        });
        if busy {
            return;
        }
        let ready = |pending: &mut Pending| pending.bytes.is_some();
        let Some(Pending { id, disk, bytes }) = self.exchange.pending.take_if(ready) else {
            return;
        };
        if self.saved.data == DataState::Syncing {
            let (role, hint) = (self.role, "a copy began meanwhile: exchange the disk after it");
            self.refuse(id, Refusal::WrongRole { role, hint });
        } else if let Some(bytes) = bytes.filter(|bytes| *bytes < self.size_bytes()) {
            self.refuse(id, too_small(bytes, self.size_bytes()));
        } else {
            tracing::info!(replica = %self.replica, ?disk, "the data disk is reached in another way from now on");
            self.data = disk;
            self.disk_bytes = bytes.unwrap_or(self.disk_bytes);
            self.flight.try_now();
            self.done(id);
        }
        self.go_on();
    }

    /// What waited goes through the stack that is there now.
    fn go_on(&mut self) {
        for (tag, range) in std::mem::take(&mut self.exchange.held) {
            self.read_again(tag, range);
        }
        self.moved = true;
    }
}
