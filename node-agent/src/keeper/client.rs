//! The agent's side of the keeper's socket: one connection per operation, each with a time limit.

use super::KeeperError;
use super::protocol::{self, Answer, Hello, LoopIdentity, Op, Request, Response, VERSION};
use crate::frontend::fuse::Negotiated;
use mars_engine::types::ReplicaId;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long the keeper may take; longer than its own waits.
const ANSWER_WAIT: Duration = Duration::from_mins(1);

/// Asks a keeper for devices.
#[derive(Debug, Clone)]
pub struct KeeperClient {
    socket: PathBuf,
}

/// A FUSE connection, handed over.
#[derive(Debug)]
pub struct Acquired {
    /// No agent had it before: nothing to have sent again.
    pub is_new: bool,
    /// The loop device over it, if there is one already.
    pub device: Option<LoopIdentity>,
    /// Whether requests survive the death of an agent.
    pub resends: bool,
    pub(crate) negotiated: Negotiated,
    pub(crate) fuse: OwnedFd,
    pub(crate) mount: OwnedFd,
}

impl KeeperClient {
    /// A client for the keeper at `socket`; connects with each operation.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// What the keeper holds.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn hello(&self) -> Result<Hello, KeeperError> {
        match self.ask(Op::Hello, &[])? {
            (Answer::Hello(hello), _) => Ok(hello),
            _ => Err(confused()),
        }
    }

    /// The connection of a replica's device, new or from a former life. This process is its holder from now on.
    ///
    /// # Errors
    /// [`KeeperError::HolderAlive`] while the last holder has not exited.
    pub fn acquire(&self, replica: ReplicaId) -> Result<Acquired, KeeperError> {
        match self.ask(Op::Acquire { replica }, &[])? {
            (
                Answer::Acquired {
                    is_new,
                    negotiated,
                    device,
                },
                descriptors,
            ) => {
                let [fuse, mount] = <[OwnedFd; 2]>::try_from(descriptors).map_err(|_| confused())?;
                Ok(Acquired {
                    is_new,
                    device,
                    resends: negotiated.resends(),
                    negotiated,
                    fuse,
                    mount,
                })
            }
            _ => Err(confused()),
        }
    }

    /// Makes the loop device, or finds it made. The connection must be served already.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn set_up(
        &self,
        replica: ReplicaId,
        logical_block_bytes: u32,
        volatile_cache: bool,
    ) -> Result<LoopIdentity, KeeperError> {
        match self.ask(
            Op::SetUp {
                replica,
                logical_block_bytes,
                volatile_cache,
            },
            &[],
        )? {
            (Answer::Device(device), _) => Ok(device),
            _ => Err(confused()),
        }
    }

    /// Has the loop device take the size that the agent shows now.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn resize(&self, replica: ReplicaId) -> Result<(), KeeperError> {
        self.done(Op::Resize { replica })
    }

    /// Changes whether users of the device flush.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn set_volatile_cache(&self, replica: ReplicaId, volatile: bool) -> Result<(), KeeperError> {
        self.done(Op::SetVolatileCache { replica, volatile })
    }

    /// Removes the device.
    ///
    /// # Errors
    /// [`KeeperError::Busy`] while somebody uses it; then nothing has changed.
    pub fn close(&self, replica: ReplicaId) -> Result<(), KeeperError> {
        self.done(Op::Close { replica })
    }

    /// Gives a device up although it may be in use: its users get I/O errors. For a device that must never be served
    /// again, because its replica is not primary any more.
    ///
    /// # Errors
    /// See [`KeeperError`].
    pub fn abort(&self, replica: ReplicaId) -> Result<(), KeeperError> {
        self.done(Op::Abort { replica })
    }

    /// Gives a new keeper what this agent still has from the lost one.
    pub(crate) fn deposit(
        &self,
        replica: ReplicaId,
        negotiated: Negotiated,
        fuse: BorrowedFd<'_>,
        mount: BorrowedFd<'_>,
    ) -> Result<(), KeeperError> {
        match self.ask(Op::Deposit { replica, negotiated }, &[fuse, mount])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(confused()),
        }
    }

    fn done(&self, op: Op) -> Result<(), KeeperError> {
        match self.ask(op, &[])? {
            (Answer::Done, _) => Ok(()),
            _ => Err(confused()),
        }
    }

    fn ask(&self, op: Op, descriptors: &[BorrowedFd<'_>]) -> Result<(Answer, Vec<OwnedFd>), KeeperError> {
        let exchange = || -> io::Result<(Response, Vec<OwnedFd>)> {
            let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
            for direction in [Timeout::Recv, Timeout::Send] {
                set_socket_timeout(&socket, direction, Some(ANSWER_WAIT))?;
            }
            connect(socket.as_fd(), &SocketAddrUnix::new(&self.socket)?)?;
            protocol::send(&socket, &Request { version: VERSION, op }, descriptors)?;
            protocol::receive(&socket)
        };
        let unreachable = |source| KeeperError::Unreachable {
            socket: self.socket.clone(),
            source,
        };
        let (Response { version, result }, descriptors) = exchange().map_err(unreachable)?;
        result
            .map(|answer| (answer, descriptors))
            .map_err(|failure| failure.into_error(version))
    }
}

fn confused() -> KeeperError {
    KeeperError::Failed("it answered something else than was asked: is it of another version?".into())
}
