//! The command line of `mars-node-agent`, and what it means.
//!
//! Invariant: everything that can be checked before a thread starts or a file is written is checked here.

use crate::layout::Layout;
use crate::pool::PoolWish;
use clap::{Args, Parser, Subcommand};
use mars_crds::validate;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use uuid::Uuid;

/// Agent of MARS on one node: block devices, transaction logs, replication.
#[derive(Debug, Parser)]
#[command(
    name = "mars-node-agent",
    version,
    subcommand_negates_reqs = true,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do; without it the agent runs.
    #[command(subcommand)]
    pub command: Option<LocalCommand>,
    /// How the agent runs.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Questions and orders to the agent that runs on this machine, over its local socket.
#[derive(Debug, Subcommand)]
pub enum LocalCommand {
    /// Show all replicas of this node: roles, states, positions, lag, rates.
    Status {
        /// Which agent.
        #[command(flatten)]
        agent: SocketArgs,
        /// Repeat every second until interrupted.
        #[arg(long)]
        watch: bool,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Show the block devices of this node and who uses them.
    Devices {
        /// Which agent.
        #[command(flatten)]
        agent: SocketArgs,
        /// Print JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Make this node primary without the API server. What the old primary had beyond this replica is lost, or forks.
    Failover {
        /// Name of the resource.
        resource: String,
        /// Its uuid (`MarsResource.status.uuid`, also in `status --json`): says that you know what you are doing.
        #[arg(long, value_name = "RESOURCE-UUID")]
        acknowledge: Uuid,
        /// Which agent.
        #[command(flatten)]
        agent: SocketArgs,
    },
}

/// Where the local socket is.
#[derive(Debug, Clone, Args)]
pub struct SocketArgs {
    /// Directory of the agent's socket.
    #[arg(long, env = "MARS_RUN_DIR", default_value = "/run/mars")]
    pub run_dir: PathBuf,
}

/// Options of the running agent.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// Name of this node, as `MarsReplica.spec.node` has it.
    #[arg(long, env = "NODE_NAME", required = true, default_value = "")]
    pub node_name: String,
    /// Durable state; must exist.
    #[arg(long, env = "MARS_STATE_DIR", default_value = "/var/lib/mars")]
    pub state_dir: PathBuf,
    /// Sockets.
    #[arg(long, env = "MARS_RUN_DIR", default_value = "/run/mars")]
    pub run_dir: PathBuf,
    /// Links to the block devices.
    #[arg(long, env = "MARS_DEV_DIR", default_value = "/dev/mars")]
    pub dev_dir: PathBuf,
    /// Address at which other nodes reach this agent, and from which it reaches them.
    #[arg(long, env = "MARS_ADDRESS", required = true, default_value = "127.0.0.1")]
    pub address: IpAddr,
    /// Port for replication.
    #[arg(long, default_value_t = 7777)]
    pub port: u16,
    /// Where metrics, health and readiness are served.
    #[arg(long, env = "MARS_METRICS_ADDRESS")]
    pub metrics_address: Option<SocketAddr>,
    /// How to reach the API server; absent: the cluster this runs in.
    #[arg(long, env = "KUBECONFIG", conflicts_with = "spec_dir")]
    pub kubeconfig: Option<PathBuf>,
    /// Take `MarsReplica` manifests from this directory instead of an API server; status goes to `<dir>/status`.
    #[arg(long)]
    pub spec_dir: Option<PathBuf>,
    /// Certificates of a cluster that signs for itself (mars-local).
    #[arg(long)]
    pub pki_dir: Option<PathBuf>,
    /// Identity of the cluster; absent: from the certificates, or from the Secret `mars-cluster`.
    #[arg(long, env = "MARS_CLUSTER_UUID")]
    pub cluster_uuid: Option<Uuid>,
    /// Namespace of the operator (and of the Secret `mars-cluster`).
    #[arg(long, env = "MARS_NAMESPACE", default_value = "mars-system")]
    pub namespace: String,
    /// Replaces the kernel's boot id, where nodes share a kernel.
    #[arg(long)]
    pub boot_id_file: Option<PathBuf>,
    /// How block devices are made: auto, loop or ublk.
    #[arg(long, default_value = "auto")]
    pub frontend: String,
    /// Socket of the device keeper; absent: `<run-dir>/keeper.sock`.
    #[arg(long)]
    pub keeper_socket: Option<PathBuf>,
    /// A pool for data disks as files; in addition to `MarsNode.spec.pools`.
    #[arg(long = "pool", value_name = "NAME=DIRECTORY", value_parser = parse_pool)]
    pub pools: Vec<PoolWish>,
    /// Memory for payloads that are not written back yet, all replicas together (bytes); absent: a quarter of the memory
    /// this process may use, at most 4 GiB.
    #[arg(long)]
    pub overlay_bytes: Option<u64>,
    /// Size of log segments (bytes).
    #[arg(long, default_value_t = 64 << 20, value_parser = clap::value_parser!(u64).range(1 << 20..=1 << 32))]
    pub segment_bytes: u64,
    /// On SIGTERM, how long devices in use are still served before they are left to the next agent (seconds).
    #[arg(long, default_value_t = 20)]
    pub drain_timeout_s: u64,
    /// After a restart, how long other members get to object, or to prove that log is lost here, before the primary role is resumed (ms).
    #[arg(long, default_value_t = 2000)]
    pub resume_ask_ms: u64,
}

fn parse_pool(text: &str) -> Result<PoolWish, String> {
    let (name, directory) = text.split_once('=').ok_or("a pool is NAME=DIRECTORY")?;
    if !validate::is_dns_label(name) {
        return Err(format!("{name:?} is not a pool name: 1 to 63 of a-z, 0-9 and -"));
    }
    let directory = PathBuf::from(directory);
    if !directory.is_absolute() {
        return Err(format!("{} is not an absolute path", directory.display()));
    }
    Ok(PoolWish {
        name: name.to_owned(),
        directory,
    })
}

/// Why the agent does not start with these options.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not a node name.
    #[error("--node-name {0:?} is not a node name (lower case letters, digits, - and .)")]
    NodeName(String),
    /// An address nobody can connect to.
    #[error("--address {0} is not an address of this node: give the one at which other nodes reach it")]
    Unspecified(IpAddr),
}

impl RunArgs {
    /// Checks what clap cannot.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        if !validate::is_node_name(&self.node_name) {
            return Err(ConfigError::NodeName(self.node_name.clone()));
        }
        if self.address.is_unspecified() {
            return Err(ConfigError::Unspecified(self.address));
        }
        Ok(())
    }

    /// The directories.
    #[must_use]
    pub fn layout(&self) -> Layout {
        Layout {
            state_dir: self.state_dir.clone(),
            run_dir: self.run_dir.clone(),
            dev_dir: self.dev_dir.clone(),
        }
    }

    /// Where replication is served.
    #[must_use]
    pub fn replication_address(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.port)
    }

    /// Socket of the device keeper.
    #[must_use]
    pub fn keeper_socket(&self) -> PathBuf {
        self.keeper_socket
            .clone()
            .unwrap_or_else(|| self.run_dir.join("keeper.sock"))
    }

    /// How long members get to object to a resumed role.
    #[must_use]
    pub fn resume_ask(&self) -> Duration {
        Duration::from_millis(self.resume_ask_ms)
    }

    /// How long devices in use are served after SIGTERM.
    #[must_use]
    pub fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.drain_timeout_s)
    }

    /// Overlay memory of the node (bytes).
    #[must_use]
    pub fn overlay_bytes(&self) -> u64 {
        const MOST_BYTES: u64 = 4 << 30;
        const LEAST_BYTES: u64 = 16 << 20;
        self.overlay_bytes
            .unwrap_or_else(|| (memory_limit_bytes() / 4).min(MOST_BYTES))
            .max(LEAST_BYTES)
    }
}

/// The smaller of this machine's memory and the limits of our control groups (bytes).
fn memory_limit_bytes() -> u64 {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total_kib = meminfo.lines().find_map(|line| {
        line.strip_prefix("MemTotal:")?
            .trim()
            .strip_suffix(" kB")?
            .parse::<u64>()
            .ok()
    });
    let machine = total_kib.map_or(1 << 30, |kib| kib * 1024);
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        let file = match controllers {
            "" => format!("/sys/fs/cgroup{path}/memory.max"),
            "memory" => format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
            _ => return None,
        };
        std::fs::read_to_string(file).ok()?.trim().parse::<u64>().ok()
    });
    limits.fold(machine, u64::min)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn what_mars_local_passes_is_understood() {
        let line = "mars-node-agent --node-name a --state-dir /s --run-dir /r --dev-dir /d --address 127.0.0.11 \
            --kubeconfig /k --pki-dir /p --boot-id-file /b --frontend loop --metrics-address 127.0.0.11:7778 \
            --pool default=/s/pool";
        let cli = Cli::try_parse_from(line.split_whitespace()).unwrap();
        assert!(cli.command.is_none());
        cli.run.check().unwrap();
        assert_eq!(cli.run.replication_address().to_string(), "127.0.0.11:7777");
        assert_eq!(
            cli.run.pools,
            [PoolWish {
                name: "default".into(),
                directory: "/s/pool".into()
            }]
        );
        assert!(cli.run.overlay_bytes() >= 16 << 20);
    }

    #[test]
    fn bad_options_are_refused() {
        for line in [
            "x",
            "x --node-name a",
            "x --node-name a --address 1.2.3.4 --pool nodir",
            "x --address 1.2.3.4",
        ] {
            assert!(Cli::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
        let cli = Cli::try_parse_from("x --node-name A_B --address 0.0.0.0".split_whitespace()).unwrap();
        assert!(cli.run.check().is_err());
    }

    #[test]
    fn questions_need_no_options_of_the_running_agent() {
        let cli = Cli::try_parse_from(["x", "status", "--json", "--run-dir", "/r"]).unwrap();
        assert!(matches!(cli.command, Some(LocalCommand::Status { json: true, .. })));
        let uuid = Uuid::from_u128(1).to_string();
        assert!(Cli::try_parse_from(["x", "failover", "mydata", "--acknowledge", &uuid]).is_ok());
        assert!(Cli::try_parse_from(["x", "failover", "mydata"]).is_err());
    }
}
