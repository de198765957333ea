//! The surface of the `Owner`: what goes in (requests, events, commands) and what comes out (actions).
//!
//! Everything is data. `submit`, `command` and `handle` never block on anything slower than a write into the page
//! cache; slow work leaves as [`Action::Job`] and comes back as [`Event::JobDone`]. Whoever drives an owner (a shard
//! thread of the agent, or the simulator) must run `next_action` until it is empty after each call.

use crate::lineage::{EpochEntry, Lineage};
use crate::types::{ByteRange, Designation, Lamport, Lsn, Position, ReplicaId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Time as the driver sees it at the moment of a call; the engine never reads a clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time since an arbitrary start.
    pub mono: Duration,
    /// Wall clock, nanoseconds since the Unix epoch.
    pub wall_ns: u64,
}

/// A block request of the device. Offsets and lengths are multiples of [`SECTOR_BYTES`](crate::types::SECTOR_BYTES).
#[derive(Debug, Clone, Copy)]
pub enum Io<'a> {
    /// Read `range`.
    Read {
        /// What to read.
        range: ByteRange,
    },
    /// Write `data` at `offset`.
    Write {
        /// Byte address on the device.
        offset: u64,
        /// The bytes; copied before `submit` returns.
        data: &'a [u8],
        /// Complete only when durable.
        fua: bool,
    },
    /// Complete when everything completed before is durable.
    Flush,
    /// The range reads as zeros afterwards, on every replica.
    Discard {
        /// What to discard.
        range: ByteRange,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// What to zero.
        range: ByteRange,
        /// Complete only when durable.
        fua: bool,
    },
}

/// The answer to a block request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IoResult {
    /// The bytes of a read.
    Data(Bytes),
    /// Done.
    Done,
    /// Failed with this errno; only for requests outside the device, or when the local disk fails.
    Errno(i32),
}

/// What `submit` says at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// Completed inline: the usual case of a write with `OnFlush`, and of a read from the overlay.
    Now(IoResult),
    /// Will complete through [`Action::Complete`] with the same tag.
    Later,
}

/// When a completed write must be on stable storage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Durability {
    /// At the next flush (the device advertises a volatile cache).
    #[default]
    OnFlush,
    /// Before it completes.
    EveryWrite,
}

/// How payloads are compressed in the log and on the wire; kept only where smaller.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4 block format.
    Lz4,
    /// Zstandard, level 1.
    Zstd,
}

/// Independent switches of a replica, remembered across restarts; the wish side (`todo`) of each activity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Switches {
    /// Transfer log from other members.
    pub fetch: bool,
    /// Apply local log to the data disk (on a secondary).
    pub replay: bool,
    /// Copy data when a sync is needed.
    pub sync: bool,
    /// Hold each record back until it is this old.
    pub apply_delay: Duration,
}

impl Default for Switches {
    fn default() -> Self {
        Switches {
            fetch: true,
            replay: true,
            sync: true,
            apply_delay: Duration::ZERO,
        }
    }
}

/// The role a replica has now: the fact, not the wish.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Follows; no device.
    Secondary,
    /// Replays what is local, then starts an epoch; no device yet.
    Promoting,
    /// Accepts requests.
    Primary,
    /// Has stopped accepting and makes its `Close` durable; the device is gone.
    Closing,
}

/// Why a data disk does not denote a state that the primary once had.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DataState {
    /// Data disk plus local log from the applied position is a state the primary once had.
    Consistent,
    /// A full or partial copy is needed or under way.
    Syncing,
    /// The log ended below `dirty_end`: the data disk holds bytes whose records are gone.
    LogLost,
}

/// Something that needs a person or a repair. Named once, shown until it is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Log writes or syncs fail; writers are held (until emergency mode exists).
    LogStoreFailed {
        /// What the system said.
        message: String,
    },
    /// The data disk fails.
    DataDiskFailed {
        /// What the system said.
        message: String,
    },
    /// Saved state cannot be written.
    StateFailed {
        /// What the system said.
        message: String,
    },
    /// The log is damaged below what is known to be durable.
    LogDefect {
        /// File name of the segment.
        segment: String,
        /// Byte offset in the file.
        file_offset: u64,
        /// Position in the history.
        lsn: Lsn,
        /// zero, foreign, repeated, sequence jump, digest, header, truncated.
        class: String,
    },
    /// A part of the log that is loaded here, and kept for other members, is damaged: found when it was to be served. The data is whole.
    BacklogDefect {
        /// File name of the segment.
        segment: String,
        /// Byte offset in the file.
        file_offset: u64,
        /// Position in the history.
        lsn: Lsn,
        /// As for `LogDefect`.
        class: String,
    },
    /// A RESIZE record waits for a larger local disk.
    DiskTooSmall {
        /// Size the record asks for (bytes).
        wanted_bytes: u64,
        /// Size of the local disk (bytes).
        disk_bytes: u64,
    },
    /// The other side's history forks from ours; replay and fetch stop before the fork.
    Fork {
        /// With whom.
        with: ReplicaId,
        /// Where.
        at: Lsn,
        /// Lamport time of the fork point, 0 when unknown.
        since: Lamport,
        /// Bytes only we have.
        ours_bytes: u64,
        /// Bytes only they have.
        theirs_bytes: u64,
    },
    /// Needs a sync: the log it would need is gone everywhere, with the reason.
    Orphan {
        /// Why.
        reason: String,
    },
}

/// Final word of a primary that closed for a handover or demotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The designation under which it closed.
    pub designation: Designation,
    /// To whom it closed; `None` for a plain demotion.
    pub to: Option<ReplicaId>,
    /// End of its history, the durable `Close` record included.
    pub end: Position,
}

/// Progress of a sync on its target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SyncProgress {
    /// Everything below this device offset is copied or known equal (bytes).
    pub done_bytes: u64,
    /// What there is to compare (bytes).
    pub total_bytes: u64,
    /// Payload bytes received so far.
    pub moved_bytes: u64,
    /// Replay must pass exactly this before the replica is consistent; known once the copy is complete.
    pub consistent_at: Option<Position>,
}

/// What a member has reported, as far as log retention is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// Who.
    pub replica: ReplicaId,
    /// Last reported durable position on our history; `None` before the first report: then all log is kept for it.
    pub durable: Option<Position>,
    /// Set when log that it still needs was given up (retention budget exceeded): it comes back by a sync.
    pub orphaned: bool,
}

/// After `open`: this replica was primary when it stopped, and nothing newer is persisted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumable {
    /// The designation under which it was primary.
    pub designation: Designation,
    /// Same boot id: the agent may send `Resume` unless a peer that answers knows a newer designation. Otherwise only after
    /// the API, or all members, said that none is newer.
    pub same_boot: bool,
}

/// Everything worth knowing about a replica at one moment; published whenever it changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// Actual role.
    pub role: Role,
    /// Whether the data may be used for promotion.
    pub data: DataState,
    /// Designation under which the role was taken; the highest number ever granted here.
    pub designation: Designation,
    /// Size of the device as of the applied position (bytes).
    pub size_bytes: u64,
    /// End of the local log, in the kernel.
    pub appended: Position,
    /// End of the local log on stable storage: the only position ever told to others.
    pub durable: Position,
    /// How far the log is loaded for apply (overlay or disk).
    pub replayed: Lsn,
    /// How far the data disk is known to be written and flushed.
    pub applied: Position,
    /// How far write-back may have begun.
    pub dirty_end: Position,
    /// Oldest position still served from the local log.
    pub log_start: Lsn,
    /// Lamport time of the last durable record.
    pub durable_time: Lamport,
    /// Lamport time of the last applied record.
    pub applied_time: Lamport,
    /// History.
    pub lineage: Lineage,
    /// Wish side of the switches, as persisted.
    pub switches: Switches,
    /// A sync that is needed or under way.
    pub sync: Option<SyncProgress>,
    /// Set while the trailing record is a `Close`.
    pub released: Option<Released>,
    /// What is wrong, if anything.
    pub faults: Vec<Fault>,
    /// Bytes of payload held in memory.
    pub overlay_bytes: u64,
    /// Bytes of log files on disk.
    pub log_bytes: u64,
    /// Set between `open` and the decision about the role it had before.
    pub resumable: Option<Resumable>,
    /// Members whose reports hold back log deletion.
    pub members: Vec<MemberStatus>,
}

/// What a replica may show of its log to other members at one moment. A server of log reads the segment files
/// itself, from this, without going through the owner; nothing beyond `durable` is in it (P6).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogView {
    /// The segments that hold durable records, ascending; each ends where the next one begins, the last at `durable`.
    pub segments: Vec<SegmentView>,
    /// End of the local log on stable storage.
    pub durable: Position,
    /// History up to `durable`.
    pub lineage: Lineage,
}

/// One segment of a [`LogView`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentView {
    /// Its file.
    pub name: crate::store::SegmentName,
    /// Where its content begins in the history.
    pub start: Position,
}

/// Why an epoch begins.
pub use crate::lineage::Cause;

/// Orders from the agent. Each is answered by exactly one [`Action::Reply`] with the id given to `command`.
#[derive(Debug)]
pub enum Command {
    /// Become primary: replay everything local, start an epoch with this cause, then reply. Refused while syncing, after a
    /// `Close` to somebody else (unless `Failover`), and for a lower designation.
    Promote {
        /// The grant.
        designation: Designation,
        /// `Create`, `Handover` or `Failover`.
        cause: Cause,
    },
    /// Go on as the primary that this replica was before a restart (see [`Resumable`]): loads the local log, keeps the epoch
    /// after a mere restart, else starts one with cause `Recovery`, then replies with where it goes on.
    Resume {
        /// Exactly the designation of [`Resumable`]; refused when a newer one is persisted.
        designation: Designation,
    },
    /// Become secondary because a newer designation names somebody else: stop accepting, make everything durable and persist
    /// the role, without a `Close` record (so that a history that did not fork stays unforked), then reply with the end.
    /// The caller has made sure that the device is not in use.
    StepDown {
        /// The newer designation.
        designation: Designation,
    },
    /// Stop accepting, make `Close(to, number)` durable, write back, become secondary, then reply.
    Close {
        /// The designation that asks for it.
        designation: Designation,
        /// Successor; `None` for a plain demotion.
        to: Option<ReplicaId>,
    },
    /// Persist a designation that names somebody else; lower ones are refused.
    Observe {
        /// What the operator or a peer said.
        designation: Designation,
    },
    /// Persist new switches.
    SetSwitches(Switches),
    /// Durability, compression and the like may change at any time.
    SetTuning(Tuning),
    /// The members whose reports hold back log deletion (this replica excluded), alive or not.
    SetMembers(Vec<ReplicaId>),
    /// A member reported what it has durably.
    PeerReport {
        /// Who.
        peer: ReplicaId,
        /// Its durable position.
        durable: Position,
    },
    /// Log from a member, proven to continue ours. Replies once the records are in the kernel; durability shows in status.
    AcceptLog(crate::replication::LogChunk),
    /// The source's history goes on in a new epoch that starts at our end.
    AcceptEpoch(EpochEntry),
    /// Append a RESIZE record and grow (primary).
    Resize {
        /// New size (bytes), not smaller than the present one.
        size_bytes: u64,
    },
    /// Append a named marker (primary); replies with its position.
    Mark {
        /// Name carried in the record.
        name: String,
    },
    /// Continue in a new segment.
    Rotate,
    /// Throw away log and claim of consistency and become the target of a sync. Recorded durably before anything is touched.
    Invalidate,
    /// Begin (or resume) a sync whose source is at this position with this lineage. Only for data that is to be copied already: whatever
    /// else is here is thrown away by `Invalidate` alone.
    BeginSync {
        /// From whom.
        source: ReplicaId,
        /// The source's applied position: our log begins there.
        start: Position,
        /// The source's history up to there.
        lineage: Lineage,
        /// Size of the source's device (bytes).
        size_bytes: u64,
        /// Where the source's log begins: a local log that ends before cannot be continued, and a copy that rests on it is given up.
        log_start: Lsn,
    },
    /// Bytes of a sync; `data: None` means zeros. Replies when written (not flushed).
    SyncWrite {
        /// Where.
        range: ByteRange,
        /// What.
        data: Option<Bytes>,
    },
    /// Everything below `done_bytes` is equal now: flush the disk, then persist it.
    SyncCheckpoint {
        /// Device offset (bytes).
        done_bytes: u64,
    },
    /// The copy is complete; consistent once replay has passed the source's dirty end.
    FinishSync {
        /// The source's dirty end when the last block had been read: exactly this must lie in the history that is replayed here.
        dirty_end: Position,
    },
    /// A server of log has found durable log damaged: to be named. Ignored when that segment is no longer part of the log.
    NameDefect(crate::log::Stop),
    /// A named fault found by the replication side (fork, orphan), or its end.
    SetReplicationFault(Option<Fault>),
    /// Reach the data disk through another stack of bricks from now on: one that leads to the same bytes. Replies once nothing is under
    /// way through the old one; meanwhile no request fails. Refused while a copy is needed or under way, and for a disk that is too small.
    ExchangeDisk(crate::brick::Disk),
    /// Write back everything, save state, close: reply means the disk may be detached.
    Shutdown,
}

/// What may change while a replica runs; persisted, so that a restart without the API server keeps it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// When writes must be durable.
    pub durability: Durability,
    /// Compression of new batches.
    pub compression: Compression,
    /// Most payload bytes held in memory before writers wait.
    pub overlay_budget_bytes: u64,
    /// Size of new segments (bytes).
    pub segment_bytes: u64,
    /// Most log bytes kept for members that stay away; 0 = no limit.
    pub retention_bytes: u64,
}

impl Tuning {
    /// Whether an engine can work with these values.
    ///
    /// # Errors
    /// What is wrong and what to do, for people.
    pub fn check(&self) -> Result<(), String> {
        let least = 64 * 1024;
        if self.segment_bytes < least || !self.segment_bytes.is_multiple_of(crate::types::BLOCK_BYTES) {
            return Err(format!(
                "segments of {} bytes: choose a multiple of 4096, at least {least}",
                self.segment_bytes
            ));
        }
        if self.overlay_budget_bytes < crate::types::BLOCK_BYTES {
            return Err(format!(
                "a buffer of {} bytes holds no write: choose more",
                self.overlay_budget_bytes
            ));
        }
        Ok(())
    }
}

/// Why a command was not done. Each message says what, where and what to do next.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Lower (or equal with another id) than what is persisted here.
    #[error(
        "designation {asked} is not newer than {known}, which this replica has persisted: ask the operator for a newer one"
    )]
    StaleDesignation {
        /// What came.
        asked: u64,
        /// What is known.
        known: u64,
    },
    /// Not possible in this role.
    #[error("not possible while {role:?}: {hint}")]
    WrongRole {
        /// Present role.
        role: Role,
        /// What to do.
        hint: &'static str,
    },
    /// The data is not consistent.
    #[error("the data is not consistent ({data:?}): wait for the sync, or promote another replica")]
    Inconsistent {
        /// Present state.
        data: DataState,
    },
    /// Log that does not continue ours.
    #[error("log at {offered} does not continue this replica's history, which ends at {ours}")]
    NotContinuing {
        /// What came.
        offered: Position,
        /// What we have.
        ours: Position,
    },
    /// The trailing `Close` names another successor.
    #[error("this replica closed for a handover to {to}: only its refusal or an acknowledged failover reopens it")]
    Closed {
        /// The successor.
        to: ReplicaId,
    },
    /// Bad argument.
    #[error("{0}")]
    Invalid(String),
    /// The machine failed.
    #[error("{0}")]
    Io(String),
}

/// Answer to a command.
pub type Reply = Result<Answer, Refusal>;

/// The useful part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// Done, at this position (epoch start, marker, close).
    At(Position),
}

/// Identifies a command to its caller.
pub type CommandId = u64;
/// Identifies a job to its owner.
pub type JobId = u64;

/// What happened outside.
#[derive(Debug)]
pub enum Event<F> {
    /// A job came back.
    JobDone(JobId, crate::jobs::JobOutcome<F>),
    /// The deadline of `next_deadline` has passed.
    Tick,
}

/// What the driver must do.
#[derive(Debug)]
pub enum Action<F> {
    /// Answer a block request.
    Complete {
        /// The tag given to `submit`.
        tag: u64,
        /// The answer.
        result: IoResult,
    },
    /// Run this on the pool (any thread, any order relative to other jobs) and bring the outcome back.
    Job(JobId, crate::jobs::Job<F>),
    /// Answer a command.
    Reply(CommandId, Reply),
    /// The status (and with it what may be served to peers) has changed; publish `status()` and `log_view()` before taking the next
    /// action: answers follow that must not be seen before what they follow from.
    Changed,
}
