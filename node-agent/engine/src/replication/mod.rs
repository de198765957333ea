//! The replication protocol, sans-io: what is said between members, and what each side does with it.
//!
//! A secondary pulls. Nothing here opens a socket, reads a file or a clock: the agent (`node-agent/src/replication`) and
//! the simulator drive the same decisions.
//!
//! Invariants: log travels only as a [`LogChunk`], which exists only after its chain was recomputed (P7, P10); only
//! durable positions are told to others (P6); data is copied only into a replica that says it is not consistent (P5, P11).

pub mod chunk;
pub mod codec;
pub mod digest;
pub mod fetch;
pub mod histories;
pub mod messages;
pub mod source;
pub mod sync;

pub use chunk::{ChunkClaim, ChunkError, LogChunk};
