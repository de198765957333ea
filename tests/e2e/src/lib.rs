//! Harness for scenarios on real block devices: a whole cluster of processes on this machine, driven as a user drives it.
//!
//! Invariant: whatever a scenario started – processes, mounts, loop devices, links, files – is gone when its guards are
//! dropped, also when it failed or was interrupted.
#![forbid(unsafe_code)]
#![expect(
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "an error or panic of the harness is the failure of a test, and says its own story"
)]

pub mod backing;
pub mod cluster;
pub mod device;
pub mod ledger;
pub mod leftovers;
pub mod link;
pub mod machine;
pub mod node;
pub mod postgres;
pub mod volume;
