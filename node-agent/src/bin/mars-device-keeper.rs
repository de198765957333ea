//! `mars-device-keeper`: makes `loop` devices and holds their /dev/fuse descriptors while agents come and go.
//!
//! Invariant: it serves no request of a device, so nothing here can wait for memory that only a device could free, and
//! it has next to no reason ever to be restarted.

use clap::Parser;
use mars_node_agent::frontend::harden::{self, Mounts};
use std::path::PathBuf;

/// Holds the kernel's side of MARS block devices across restarts of the node agent.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Directory of its socket (keeper.sock) and state, the run directory of the agent; root only, on volatile storage.
    #[arg(long, default_value = "/run/mars", env = "MARS_KEEPER_DIR")]
    dir: PathBuf,
}

fn main() -> anyhow::Result<()> {
    // Before any thread: threads inherit it. Its mounts are attached nowhere, so it needs no namespace of its own.
    let hardening = harden::early(Mounts::Keep);
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    hardening.warn();
    let arguments = Arguments::parse();
    mars_node_agent::keeper::serve(&arguments.dir)
        .map_err(|error| anyhow::anyhow!("device keeper in {}: {error}", arguments.dir.display()))
}
