//! What a Kubernetes API has to do so that MARS works against it; the same tests for every API server.
//!
//! Without further settings each test starts an embedded API of its own. With `MARS_CONFORMANCE_KUBECONFIG` naming a
//! kubeconfig, all tests run against that cluster instead; they use names of their own and clean up behind them. Tests that
//! need what only the embedded API can do (compaction on demand) say so and are left out there.
//! `MARS_KUBECTL` names the kubectl to use (default: the one in PATH).

#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the failed test")]

mod apply;
mod deletion;
mod discovery;
mod kubectl;
mod objects;
mod target;
mod watches;
