//! A cluster of processes on this machine: its directory, its nodes, and what starts and ends them.
//!
//! ```text
//! <state>/cluster.json              what the cluster is: uuid, nodes, addresses (0600)
//! <state>/kubeconfig                for kubectl and for the agents
//! <state>/api/                      the API objects
//! <state>/pki/                      the authority; pki/nodes/<n> is what node n gets
//! <state>/run/                      pid and control socket of `up`
//! <state>/logs/                     logs of every process
//! <state>/nodes/<n>/store           durable state of the agent         never made again once lost
//! <state>/nodes/<n>/pool            data disks as files                 never made again once lost
//! <state>/nodes/<n>/{dev,run}       what a machine loses when it dies
//! <state>/nodes/<n>/wanted.json     which processes are to run
//! ```
//!
//! Invariants:
//! - Processes belong to the state directory, not to `up`: they outlive it, and any command finds them by the recorded pid,
//!   start time and boot id. A process is ended only if all three still fit.
//! - Whoever starts or ends a process of a node holds the node's lock.
//! - `store` and `pool` are made when a node is added and never again (an absent directory is a missing mount).

mod cgroup;
mod config;
mod control;
mod devices;
mod launch;
mod node;
mod operator;
mod process;
mod supervise;
mod up;

pub use config::{ClusterConfig, ConfigError, NodeConfig, parse_nodes};
pub use control::{Request as ControlRequest, ask as ask_up};
pub use launch::launch;
pub use node::{Node, NodeError, ProcessState, Wanted};
pub use up::{UpOptions, down, status, up};

use std::io;
use std::path::{Path, PathBuf};

/// An operating system error, with what was being done to which file.
#[derive(Debug, thiserror::Error)]
#[error("{doing} {path}: {source}")]
pub struct FileError {
    doing: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn file_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FileError {
    let path = path.to_owned();
    move |source| FileError { doing, path, source }
}

/// Paths of a cluster.
#[derive(Clone, Debug)]
pub struct StateDir(PathBuf);

impl StateDir {
    /// The directory, made absolute: processes are given paths in it.
    ///
    /// # Errors
    /// When the current directory is not known.
    pub fn new(path: &Path) -> Result<Self, FileError> {
        std::path::absolute(path)
            .map(Self)
            .map_err(file_error("resolving", path))
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// A path below it.
    #[must_use]
    pub fn join(&self, below: &str) -> PathBuf {
        self.0.join(below)
    }

    /// Directory of a node.
    #[must_use]
    pub fn node(&self, name: &str) -> PathBuf {
        self.0.join("nodes").join(name)
    }

    /// Log file of a process.
    #[must_use]
    pub fn log(&self, name: &str) -> PathBuf {
        self.0.join("logs").join(format!("{name}.log"))
    }

    /// The kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.join("kubeconfig")
    }

    /// Certificates of a node.
    #[must_use]
    pub fn node_pki(&self, name: &str) -> PathBuf {
        self.0.join("pki").join("nodes").join(name)
    }

    /// The control socket of `up`.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.0.join("run").join("control.sock")
    }
}

/// Replaces a small file as a whole, durably, for root only.
fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    mars_node_agent::layout::write_atomically(path, content)
        .map_err(|error| file_error("writing", path)(io::Error::other(error)))
}
