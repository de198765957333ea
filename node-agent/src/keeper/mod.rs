//! The device keeper: a tiny process that makes `loop` devices and holds their /dev/fuse descriptors while agents come
//! and go.
//!
//! ```text
//!  mars-device-keeper                    mars-node-agent (killed, upgraded, restarted at will)
//!  Volume { fuse fd, detached mount, ──SCM_RIGHTS──►  serves /dev/fuse on a shard thread
//!           loop device, holder pidfd }  only when the last holder's pidfd says it has exited
//! ```
//!
//! Why: the kernel fails all requests of a FUSE connection when the last copy of its descriptor is closed. As the keeper
//! has one, a dead agent is only a pause: its unanswered requests wait in the kernel, and the next agent has them
//! sent again (`FUSE_NOTIFY_RESEND`, Linux 6.9; with an older kernel MarsNode says that restarts interrupt I/O).
//!
//! Invariants: the keeper serves no request itself – INIT alone, before anybody else has the descriptor. A descriptor
//! goes to a new agent only after the old one is gone, since a write of the old one that lands late would overwrite a
//! newer one. It waits for the agent only in threads of their own, so a hanging agent never keeps the next one away.
//! A loop device is cleared only when the recorded boot, number, kernel sequence number and file name all say it is ours.
//!
//! **When the keeper itself is lost:** while an agent lives, nothing is seen, because the agent has copies; it deposits them
//! with the next keeper ([`KeeperClient::deposit`]). Keeper and agent lost together (before a deposit) end the
//! connection: users of the device get I/O errors, the next keeper names the device in its log and in `Hello`, clears it as soon as
//! it is closed, and the agent makes a new one. Nothing acknowledged is lost by that: it is in the log.

mod client;
mod protocol;
mod server;
mod state;
mod volume;

pub(crate) use volume::file_name as volume_file_name;

pub use client::{Acquired, KeeperClient};
pub use protocol::{Hello, LoopIdentity};
pub use server::serve;

use std::io;
use std::path::PathBuf;

/// Why the keeper did not do something. Each message says what, where and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// No keeper at the socket.
    #[error("cannot reach it at {}: {source}; start mars-device-keeper with this socket", socket.display())]
    Unreachable {
        /// Where it should be.
        socket: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The two sides are too far apart.
    #[error("speaks protocol version {theirs}, this agent {ours}: drain the node and update the older one")]
    Version {
        /// The agent's version.
        ours: u16,
        /// The keeper's version.
        theirs: u16,
    },
    /// The last holder still runs.
    #[error("process {pid} still holds the device: it must end before another agent takes over")]
    HolderAlive {
        /// Which process.
        pid: u32,
    },
    /// Somebody uses the device.
    #[error("the device is in use")]
    Busy,
    /// The keeper holds no such device.
    #[error("it holds no device of this replica")]
    Unknown,
    /// A system call of the keeper failed, or the message was not understood.
    #[error("{0}")]
    Failed(String),
}
