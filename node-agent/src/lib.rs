//! The node agent of MARS: it turns `MarsReplica.spec` into engine commands and block devices, and reports facts.
//!
//! Invariant: the data path (shards, frontends, replication) never waits for the API server, and nothing that is
//! absent – an object, a directory, a mount – makes the agent delete, recreate or overwrite data.

pub mod agent;
pub mod config;
pub mod frontend;
pub mod identity;
pub mod keeper;
pub mod layout;
pub mod link;
pub mod local_socket;
pub mod metrics;
pub mod node_status;
pub mod pool;
pub mod reconcile;
pub mod replication;
pub mod shard;
