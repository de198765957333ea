//! Replication between agents: gRPC over mutual TLS 1.3, driving the engine's sans-io protocol.
//!
//! Invariants: nothing here waits for the API server, and nothing here makes the data path wait (P8): a source reads segment
//! files and the data disk itself, beside the owner; every queue is bounded, every wait has a limit, every retry jitter.

mod book;
pub mod certs;
mod client;
pub mod clock;
mod entry;
mod fetcher;
mod follower;
mod hub;
mod link;
mod local;
mod meter;
mod net;
pub mod pki;
mod port;
mod serve_fetch;
mod serve_sync;
mod server;
mod syncer;
pub mod tls;
mod wire;

pub use book::PeerView;
pub use entry::{Membership, PeerAddress, ReplicaPort};
pub use follower::{Activity, Follower, ReplicationStatus};
pub use hub::{Hub, HubConfig, JoinedTwice};
pub use local::LocalReplication;
pub use net::Congestion;
pub use port::EnginePort;
pub use wire::Malformed;
