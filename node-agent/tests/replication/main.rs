//! Replication between members in one process: real engines on real files, real TLS over loopback, faults in between.
//!
//! Nothing here needs root. Each test has its own directory, ports and certificates.
#![expect(clippy::unwrap_used, reason = "in a test, what must not fail may panic")]

mod clock;
mod disk;
mod fetch;
mod machine;
mod rig;
mod security;
mod sync;
