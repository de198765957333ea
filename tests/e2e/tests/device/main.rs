//! Scenarios on real block devices, one cluster each. Run by `make device` as root, one after the other, in a network
//! namespace of their own; the same program runs inside the VM, over ublk, with a kernel that has it.
//!
//! Invariant: each test states one promise in its name, and fails when that promise is broken.

mod bad_input;
mod control;
mod files;
mod identity;
mod log;
mod postgres;
mod power;
mod replication;
mod restart;
mod roles;
mod space;
mod wan;
