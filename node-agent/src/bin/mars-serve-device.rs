//! `mars-serve-device`: one block device from one engine, without Kubernetes, peers or an operator. For measuring, for
//! trying frontends on a new kernel, and for the tests that kill it.
//!
//! It speaks on stdin and stdout, one line each: `resize BYTES`, `durability on-flush|every-write`, `users`, `detach`,
//! `stop`. Each command is answered by `ok …` or `error …`. `stop` (or the end of stdin with `--stop-at-eof`) leaves the
//! device to the next life of this program; `detach` removes it.
//!
//! Invariant: like the agent, it promises nothing that is not in the engine: killed at any moment, the next start with
//! the same arguments takes the device over.

use anyhow::{Context, bail};
use clap::Parser;
use mars_engine::api::{Cause, Command, Compression, Durability, Role, Tuning};
use mars_engine::owner::{OpenParams, Owner};
use mars_engine::store_fs::FsStore;
use mars_engine::types::{ClusterId, Designation, ReplicaId, ResourceId};
use mars_node_agent::frontend::harden::{self, Mounts};
use mars_node_agent::frontend::{DeviceName, FrontendChoice, Frontends, FrontendsConfig};

use mars_node_agent::shard::plain::PlainEngine;
use mars_node_agent::shard::{AttachParams, Engine, OwnerEngine, ReplicaHandle, Runtime, RuntimeConfig};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::io::{AsyncBufReadExt, BufReader};

/// Serves one block device.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// Name of the link.
    #[arg(long, default_value = "device")]
    name: DeviceName,
    /// Directory of the link.
    #[arg(long)]
    link_dir: PathBuf,
    /// Identity of the replica: the same for each life of one device.
    #[arg(long)]
    replica: uuid::Uuid,
    /// Socket of mars-device-keeper, for `loop`.
    #[arg(long)]
    keeper: Option<PathBuf>,
    /// Where `ublk` devices are recorded, for `ublk`.
    #[arg(long)]
    ublk_state_dir: Option<PathBuf>,
    /// auto, loop or ublk.
    #[arg(long, default_value = "auto")]
    frontend: FrontendChoice,
    /// Serve this file in place, without a log.
    #[arg(long, required_unless_present = "store")]
    plain: Option<PathBuf>,
    /// Serve a replica: directory of its log and state (made when it is empty), with --data.
    #[arg(long, requires = "data", conflicts_with = "plain")]
    store: Option<PathBuf>,
    /// With --store: the data disk, a file or block device; its length is the size of the device.
    #[arg(long)]
    data: Option<PathBuf>,
    /// With --store: most payload bytes held in memory before writers wait.
    #[arg(long, default_value_t = 64 << 20)]
    overlay_bytes: u64,
    /// With --plain: answer through the job pool, so that requests overlap and complete out of order.
    #[arg(long)]
    defer: bool,
    /// Complete writes only when they are durable; the device then advertises no volatile cache.
    #[arg(long)]
    every_write: bool,
    /// Logical block size (bytes).
    #[arg(long, default_value_t = 512)]
    logical_block_bytes: u32,
    /// Stop when stdin ends.
    #[arg(long)]
    stop_at_eof: bool,
}

fn main() -> anyhow::Result<()> {
    let hardening = harden::early(Mounts::Follow);
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter("info")
        .init();
    hardening.warn();
    let arguments = Arguments::parse();
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?
        .block_on(serve(arguments))
}

/// What the engine needs, and the lock that keeps a second process away from the replica directory.
struct Opened {
    engine: Box<dyn Engine>,
    _lock: Option<File>,
}

fn open(arguments: &Arguments) -> anyhow::Result<Opened> {
    match (&arguments.plain, &arguments.store, &arguments.data) {
        (Some(path), ..) => {
            let engine = Box::new(PlainEngine::new(open_file(path)?, arguments.defer)?);
            Ok(Opened { engine, _lock: None })
        }
        (None, Some(store), Some(data)) => open_replica(arguments, store, data),
        _ => bail!("either --plain, or --store and --data"),
    }
}

fn open_file(path: &Path) -> anyhow::Result<File> {
    let file = File::options().read(true).write(true).open(path);
    file.with_context(|| format!("open {}", path.display()))
}

fn open_replica(arguments: &Arguments, dir: &Path, data: &Path) -> anyhow::Result<Opened> {
    std::fs::create_dir_all(dir)?;
    let lock = File::open(dir)?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive).context("lock the replica directory")?;
    let mut data = open_file(data)?;
    let size_bytes = data.seek(SeekFrom::End(0))?;
    let is_new = !dir.join("log").exists();
    if is_new {
        FsStore::create_layout(dir)?;
    }
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let params = OpenParams {
        cluster: ClusterId(arguments.replica),
        resource: ResourceId(arguments.replica),
        replica: ReplicaId(arguments.replica),
        boot_id: boot_id.trim().parse()?,
        create: is_new.then_some(size_bytes),
        tuning: tuning(arguments.overlay_bytes, durability(arguments.every_write)),
        seed: rand::random(),
    };
    let owner = Owner::open(FsStore::open(dir, data)?, params, mars_node_agent::shard::engine::now())?;
    Ok(Opened {
        engine: Box::new(OwnerEngine::new(owner)),
        _lock: Some(lock),
    })
}

/// Makes the replica primary: again, if it was before, else for the first time.
async fn promote(replica: &ReplicaHandle, arguments: &Arguments) -> anyhow::Result<()> {
    let status = replica.status().borrow().clone();
    if status.role == Role::Primary {
        return Ok(());
    }
    let first = Designation {
        number: 1,
        id: arguments.replica,
    };
    let order = match status.resumable {
        Some(before) => Command::Resume {
            designation: before.designation,
        },
        None => Command::Promote {
            designation: first,
            cause: Cause::Create,
        },
    };
    replica.command(order).await?;
    let tuning = tuning(arguments.overlay_bytes, durability(arguments.every_write));
    replica.command(Command::SetTuning(tuning)).await?;
    Ok(())
}

fn durability(every_write: bool) -> Durability {
    if every_write {
        Durability::EveryWrite
    } else {
        Durability::OnFlush
    }
}

async fn serve(arguments: Arguments) -> anyhow::Result<()> {
    let config = FrontendsConfig {
        link_dir: arguments.link_dir.clone(),
        keeper_socket: arguments.keeper.clone(),
        ublk_state_dir: arguments.ublk_state_dir.clone(),
    };
    let runtime = Runtime::start(&RuntimeConfig::default(), Arc::new(Frontends::new(&config)))?;
    let opened = open(&arguments)?;
    let replica = runtime.add(arguments.name.as_str(), opened.engine)?;
    promote(&replica, &arguments).await?;
    let params = AttachParams {
        name: arguments.name.clone(),
        replica: ReplicaId(arguments.replica),
        frontend: arguments.frontend,
        tuning: tuning(arguments.overlay_bytes, durability(arguments.every_write)),
        logical_block_bytes: arguments.logical_block_bytes,
    };
    let device = replica.attach(params).await?;
    let numbers = format!("{}:{} {}", device.major, device.minor, device.diskseq);
    say(&format!(
        "ready {} {} {numbers}",
        device.link.display(),
        device.node.display()
    ))?;

    let mut lines = BufReader::new(tokio::io::stdin()).lines();
    while let Some(line) = lines.next_line().await? {
        let stop = line.trim() == "stop";
        match perform(&replica, line.trim()).await {
            Ok(text) => say(format!("ok {text}").trim_end())?,
            Err(error) => say(&format!("error {error:#}"))?,
        }
        if stop {
            return Ok(());
        }
    }
    if arguments.stop_at_eof {
        replica.shutdown().await?;
        return Ok(());
    }
    std::future::pending().await
}

async fn perform(replica: &ReplicaHandle, line: &str) -> anyhow::Result<String> {
    match line.split_whitespace().collect::<Vec<_>>()[..] {
        ["resize", bytes] => {
            replica
                .command(Command::Resize {
                    size_bytes: bytes.parse()?,
                })
                .await?;
        }
        ["durability", wish @ ("on-flush" | "every-write")] => {
            let tuning = tuning(64 << 20, durability(wish == "every-write"));
            replica.command(Command::SetTuning(tuning)).await?;
        }
        ["users"] => {
            let users = replica.users().await;
            return Ok(mars_node_agent::frontend::users::describe(&users));
        }
        ["detach"] => replica.detach().await?,
        ["stop"] => replica.shutdown().await?,
        _ => bail!("not understood: {line:?}"),
    }
    Ok(String::new())
}

fn tuning(overlay_budget_bytes: u64, durability: Durability) -> Tuning {
    Tuning {
        durability,
        compression: Compression::None,
        overlay_budget_bytes,
        segment_bytes: 64 << 20,
        retention_bytes: 0,
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
