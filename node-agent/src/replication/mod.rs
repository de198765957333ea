//! Replication between agents: gRPC over mutual TLS 1.3, driving the engine's sans-io protocol.
//!
//! Invariants: nothing here waits for the API server, and nothing here makes the data path wait (P8): a source reads segment
//! files and the data disk itself, beside the owner; every queue is bounded, every wait has a limit, every retry jitter.

pub mod certs;
pub mod pki;
pub mod tls;
