//! Deterministic simulation of whole resources: several replicas with the production engine and the production replication
//! protocol, in virtual time, on disks that lose what was not synced, over links that break.
//!
//! Invariant: one seed is one run. Nothing here reads a clock, starts a thread or asks the system for randomness.
//!
//! - [`world`] moves everything: requests, jobs, messages, crashes, role changes.
//! - [`node`] is one machine: a replica, its fetch and its copy.
//! - [`oracle`] remembers every record that was ever durable and judges data disks by it.
#![forbid(unsafe_code)]

pub mod node;
pub mod oracle;
pub mod world;

pub use world::{Config, Report, run};
