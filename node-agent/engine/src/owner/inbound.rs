//! Log from members: proven chunks and new epochs are appended to the local log in the order in which they came.
//!
//! Invariants: a chunk is taken only if it begins exactly where the local log ends (P7); the local chain goes on as it was
//! proven when the chunk was made, so nothing is hashed on this thread. Nothing here is told to anybody before it is durable (P6): the reply means "in the kernel" only.

use super::Owner;
use crate::api::{CommandId, Refusal, Role};
use crate::format::record::Record;
use crate::lineage::EpochEntry;
use crate::log::AppendError;
use crate::replication::LogChunk;
use crate::store::Store;
use crate::types::{Lamport, Position};
use std::collections::VecDeque;
use std::time::Duration;

/// Most chunks and epochs that may wait.
const MAX_WAITING: usize = 64;
/// Most bytes appended but not durable: a slow log disk slows the transfer, not the memory.
const MAX_UNSYNCED_BYTES: u64 = 16 << 20;

#[derive(Debug)]
enum Item {
    Chunk {
        id: CommandId,
        /// Each with the position behind it, as proven.
        records: VecDeque<(Record, Position)>,
        end: Position,
    },
    Epoch {
        id: CommandId,
        entry: EpochEntry,
    },
}

impl Item {
    fn id(&self) -> CommandId {
        match self {
            Item::Chunk { id, .. } | Item::Epoch { id, .. } => *id,
        }
    }
}

/// What came and is not appended yet.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    waiting: VecDeque<Item>,
}

impl Inbound {
    fn end(&self) -> Option<Position> {
        self.waiting.back().map(|item| match item {
            Item::Chunk { end, .. } => *end,
            Item::Epoch { entry, .. } => Position {
                epoch: entry.id,
                ..entry.parent
            },
        })
    }
}

impl<S: Store> Owner<S> {
    pub(super) fn accept_log(&mut self, id: CommandId, chunk: LogChunk) {
        let latest = chunk
            .records()
            .iter()
            .map(|record| record.header.lamport)
            .max()
            .unwrap_or_default();
        if let Err(refusal) = self.may_accept(chunk.start(), latest) {
            return self.refuse(id, refusal);
        }
        let end = chunk.end();
        self.inbound.waiting.push_back(Item::Chunk {
            id,
            records: chunk.into_steps().collect(),
            end,
        });
        self.moved = true;
    }

    pub(super) fn accept_epoch(&mut self, id: CommandId, entry: EpochEntry) {
        if let Err(refusal) = self.may_accept(entry.parent, entry.lamport) {
            return self.refuse(id, refusal);
        }
        self.inbound.waiting.push_back(Item::Epoch { id, entry });
        self.moved = true;
    }

    fn may_accept(&mut self, offered: Position, latest: Lamport) -> Result<(), Refusal> {
        if self.role != Role::Secondary {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "only a secondary takes log from others",
            });
        }
        if self.operation.is_some() {
            return Err(Refusal::WrongRole {
                role: self.role,
                hint: "an operation is under way: try again after it",
            });
        }
        let ours = self.inbound.end().unwrap_or_else(|| self.log.appended());
        if offered != ours {
            return Err(Refusal::NotContinuing { offered, ours });
        }
        if self.inbound.waiting.len() >= MAX_WAITING {
            return Err(Refusal::Invalid(
                "too many chunks wait for the log: send the next one after a reply".into(),
            ));
        }
        // Everything stamped here from now on comes after what is taken; a stamp that is too far ahead is refused.
        self.clock
            .see(latest, self.now.wall_ns)
            .map_err(|error| Refusal::Invalid(error.to_string()))
    }

    /// Nothing that waits will be appended any more: the log is thrown away, or the role changes.
    pub(super) fn refuse_inbound(&mut self, hint: &'static str) {
        for item in std::mem::take(&mut self.inbound.waiting) {
            self.refuse(item.id(), Refusal::WrongRole { role: self.role, hint });
        }
    }

    pub(super) fn step_inbound(&mut self) {
        while self.repair.is_none() && self.log.unsynced_bytes() < MAX_UNSYNCED_BYTES {
            let Some(mut item) = self.inbound.waiting.pop_front() else {
                return;
            };
            match self.take(&mut item) {
                Ok(()) => self.done(item.id()),
                Err(error @ (AppendError::NeedSegment | AppendError::Poisoned { .. })) => {
                    self.inbound.waiting.push_front(item);
                    return self.append_failed(error);
                }
                Err(error @ (AppendError::NotNext { .. } | AppendError::Format(_))) => {
                    // Nothing after it can continue our log either.
                    self.refuse(item.id(), Refusal::Invalid(error.to_string()));
                    self.refuse_inbound("log before it was refused: ask for the position again");
                }
            }
            self.moved = true;
        }
    }

    /// Appends as much of an item as the log takes; on an error the rest stays in it.
    fn take(&mut self, item: &mut Item) -> Result<(), AppendError> {
        match item {
            Item::Epoch { entry, .. } => {
                self.begin_epoch(entry.clone())?;
                let entry = entry.clone();
                self.save(|saved| saved.lineage.push(entry));
                self.saved.released = None;
                self.trailing_close = None;
            }
            Item::Chunk { records, end, .. } => {
                while let Some((record, end)) = records.front() {
                    self.log.append_proven(record.clone(), *end)?;
                    if let Some((record, end)) = records.pop_front() {
                        self.accepted(record, end);
                    }
                }
                assert_eq!(
                    self.log.appended(),
                    *end,
                    "the local log has come to where the chunk leads"
                );
            }
        }
        self.changed = true;
        Ok(())
    }

    /// Starts an epoch in the log; `Ok` also when its first segment failed after it had begun: the repair includes it.
    pub(super) fn begin_epoch(&mut self, entry: EpochEntry) -> Result<(), AppendError> {
        let epoch = entry.id;
        match self.log.start_epoch(entry) {
            Err(error) if self.log.epoch().id == epoch => self.append_failed(error),
            Err(error) => return Err(error),
            Ok(()) => {}
        }
        self.sync_by(Duration::ZERO);
        Ok(())
    }
}
