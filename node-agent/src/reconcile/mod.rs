//! From `MarsReplica.spec` to engine commands and devices, and from facts to `MarsReplica.status`.
//!
//! ```text
//!  source (API watch | spec directory) ─► supervisor ─► one task per replica: observe facts → plan → execute → report
//!                      cache on disk  ─┘                      ▲ engine status, peers, device users, timer
//! ```
//!
//! Invariant: an object that is absent changes nothing. Data goes only with a `MarsReplica` that is being deleted with
//! `dataPolicy: Delete`.

pub mod cache;
pub mod context;
mod disk;
mod execute;
pub mod facts;
pub mod inventory;
pub mod lag;
pub mod object;
pub mod opening;
pub mod peers;
pub mod plan;
pub mod presence;
mod quarantine;
mod removal;
pub mod replica;
pub mod report;
mod running;
mod saved;
pub mod sink;
pub mod source;
pub mod superblock;
pub mod supervisor;
pub mod todo;
mod writer;
