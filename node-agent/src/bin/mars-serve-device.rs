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
use mars_engine::api::{Command, Compression, Durability, Tuning};
use mars_engine::types::ReplicaId;
use mars_node_agent::frontend::harden::{self, Mounts};
use mars_node_agent::frontend::{DeviceName, FrontendChoice, Frontends, FrontendsConfig};
use mars_node_agent::shard::plain::PlainEngine;
use mars_node_agent::shard::{AttachParams, Engine, ReplicaHandle, Runtime, RuntimeConfig};
use std::io::Write;
use std::path::PathBuf;
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
    #[arg(long)]
    plain: PathBuf,
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

fn engine(arguments: &Arguments) -> anyhow::Result<Box<dyn Engine>> {
    let path = &arguments.plain;
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path);
    let file = file.with_context(|| format!("open {}", path.display()))?;
    Ok(Box::new(PlainEngine::new(file, arguments.defer)?))
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
    let replica = runtime.add(arguments.name.as_str(), engine(&arguments)?)?;
    let params = AttachParams {
        name: arguments.name.clone(),
        replica: ReplicaId(arguments.replica),
        frontend: arguments.frontend,
        durability: durability(arguments.every_write),
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
            replica
                .command(Command::SetTuning(tuning(durability(wish == "every-write"))))
                .await?;
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

fn tuning(durability: Durability) -> Tuning {
    Tuning {
        durability,
        compression: Compression::None,
        overlay_budget_bytes: 64 << 20,
        segment_bytes: 64 << 20,
        retention_bytes: 0,
    }
}

fn say(line: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")?;
    Ok(out.flush()?)
}
