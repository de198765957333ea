//! What agent and keeper say to each other: one JSON message per packet of a root-only Unix socket, descriptors beside.
//!
//! Invariant: every message is bounded, carries the protocol version, and is answered by exactly one message.

use super::KeeperError;
use crate::frontend::fuse::Negotiated;
use mars_engine::types::ReplicaId;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Version of this protocol. A change that the other side could misunderstand raises it.
pub(super) const VERSION: u16 = 1;
/// Largest message (bytes).
const MAX_MESSAGE_BYTES: usize = 64 << 10;
/// Most descriptors beside a message.
const MAX_DESCRIPTORS: usize = 2;

/// What an agent asks.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub(super) version: u16,
    pub(super) op: Op,
}

/// See [`super::KeeperClient`] for what each means.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Op {
    Hello,
    Acquire {
        replica: ReplicaId,
    },
    SetUp {
        replica: ReplicaId,
        logical_block_bytes: u32,
        volatile_cache: bool,
    },
    Resize {
        replica: ReplicaId,
    },
    SetVolatileCache {
        replica: ReplicaId,
        volatile: bool,
    },
    Close {
        replica: ReplicaId,
    },
    Abort {
        replica: ReplicaId,
    },
    Deposit {
        replica: ReplicaId,
        negotiated: Negotiated,
    },
}

/// What the keeper answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Response {
    pub(super) version: u16,
    pub(super) result: Result<Answer, Failure>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Hello(Hello),
    /// Descriptors beside: /dev/fuse, the mount.
    Acquired {
        is_new: bool,
        negotiated: Negotiated,
        device: Option<LoopIdentity>,
    },
    Device(LoopIdentity),
    Done,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Failure {
    Version,
    HolderAlive { pid: u32 },
    Busy,
    Unknown,
    Failed(String),
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Failed(error.to_string())
    }
}

impl Failure {
    /// With what was tried.
    pub(super) fn of(what: &str, error: &dyn std::fmt::Display) -> Self {
        Self::Failed(format!("{what}: {error}"))
    }

    pub(super) fn into_error(self, theirs: u16) -> KeeperError {
        match self {
            Self::Version => KeeperError::Version { ours: VERSION, theirs },
            Self::HolderAlive { pid } => KeeperError::HolderAlive { pid },
            Self::Busy => KeeperError::Busy,
            Self::Unknown => KeeperError::Unknown,
            Self::Failed(text) => KeeperError::Failed(text),
        }
    }
}

/// What a keeper is and holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Differs for each life of a keeper: after a change, open devices must be deposited.
    pub instance: uuid::Uuid,
    /// Replicas whose devices it holds, and the loop device of each if it is set up.
    pub held: Vec<(ReplicaId, Option<LoopIdentity>)>,
    /// Devices of an earlier keeper that a living agent still serves: it must deposit them.
    pub unheld: Vec<ReplicaId>,
    /// Devices lost together with an earlier keeper and its agent: their users got I/O errors.
    pub lost: Vec<ReplicaId>,
}

/// A loop device, so that it cannot be taken for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoopIdentity {
    /// N of /dev/loopN.
    pub number: u32,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The kernel's count of devices.
    pub diskseq: u64,
}

/// Sends one message and descriptors.
pub(super) fn send<T: Serialize>(socket: &OwnedFd, message: &T, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_MESSAGE_BYTES {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "message too long"));
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
    }
    sendmsg(
        socket.as_fd(),
        &[IoSlice::new(&bytes)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Receives one message and the descriptors beside it. A closed socket is `UnexpectedEof`.
pub(super) fn receive<T: DeserializeOwned>(socket: &OwnedFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut buffer = vec![0; MAX_MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        socket.as_fd(),
        &mut [IoSliceMut::new(&mut buffer)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let message = serde_json::from_slice(&buffer[..received.bytes])?;
    Ok((message, descriptors))
}
