//! The block engine of MARS: transaction log, overlay, write-back, recovery, lineage and replication protocol.
//!
//! Sans-io: no threads, no sockets, no clock of its own. The agent drives it on real files, the simulator on a
//! simulated disk; both drive the same code.
#![forbid(unsafe_code)]

pub mod api;
pub mod brick;
pub mod chain;
pub mod clock;
pub mod format;
pub mod jobs;
pub mod lineage;
pub mod log;
pub mod overlay;
pub mod owner;
pub mod recovery;
pub mod replication;
pub mod retention;
pub mod roles;
pub mod slot;
pub mod state;
pub mod store;
pub mod store_fs;
pub mod store_sim;
pub mod summary;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod types;
pub mod writeback;
