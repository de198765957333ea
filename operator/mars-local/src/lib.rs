//! A whole MARS cluster on one machine: an embedded Kubernetes API on loopback, the operator in the same process, and
//! agents and device keepers as processes.
//!
//! Invariant: the embedded API treats its clients as the real one does – same verbs, same answers, same refusals – so what
//! is tested here holds there; the conformance suite runs against both.
#![forbid(unsafe_code)]

pub mod apply;
pub mod cli;
pub mod cluster;
pub mod discovery;
pub mod embedded;
pub mod error;
pub mod faults;
pub mod gc;
pub mod jsonpath;
pub mod mars;
pub mod meta;
pub mod openapi;
pub mod patch;
pub mod registry;
pub mod schema;
pub mod selector;
pub mod server;
pub mod storage;
pub mod strategy;
pub mod table;
pub mod watch;
