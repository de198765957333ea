//! The part of the FUSE protocol that one file under a loop device needs.
//!
//! Invariant: everything the kernel can hold on to – inode numbers, file handles, negotiated features, attributes – is a
//! constant of this module or kept by the keeper, so that a new agent answers as the old one would have. Every request
//! may come twice (the dead agent did it and could not answer): all that are served are idempotent.

mod connect;
mod server;
mod wire;

pub(crate) use connect::{Connection, Negotiated, connect};
pub(crate) use server::FuseServer;
pub(crate) use wire::BUFFER_BYTES as MESSAGE_BYTES;
