//! The binary `mars-node-agent`: the agent itself, and questions to one that runs.

use anyhow::Context as _;
use clap::Parser;
use mars_node_agent::agent;
use mars_node_agent::config::{Cli, LocalCommand, RunArgs};
use mars_node_agent::frontend::harden::{self, Mounts};
use mars_node_agent::local_socket::client::Client;
use mars_node_agent::local_socket::table;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Beside engines and devices, which have threads of their own, there is little to do.
const WORKERS: usize = 4;

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    match cli.command {
        None => serve(cli.run),
        Some(LocalCommand::Status { agent, watch, json }) => status(&Client::new(&agent.run_dir), watch, json),
        Some(LocalCommand::Devices { agent, json }) => devices(&Client::new(&agent.run_dir), json),
        Some(LocalCommand::Failover {
            resource,
            acknowledge,
            agent,
        }) => {
            let done = Client::new(&agent.run_dir).failover(&resource, acknowledge)?;
            say(&format!(
                "{resource}: primary here under designation {}\n",
                done.designation.number
            ))
        }
    }
}

fn serve(args: RunArgs) -> anyhow::Result<()> {
    // Before any thread: threads inherit it.
    let hardening = harden::early(Mounts::Follow);
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    hardening.warn();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build();
    let runtime = runtime.context("cannot start threads")?;
    let result = runtime.block_on(agent::run(args, hardening));
    // A job that hangs on a dead disk must not keep the process: whatever was acknowledged is in the log.
    runtime.shutdown_timeout(Duration::from_secs(2));
    Ok(result?)
}

fn status(client: &Client, watch: bool, json: bool) -> anyhow::Result<()> {
    loop {
        let answer = client.status()?;
        let text = if json {
            format!("{answer}\n")
        } else {
            table::status(&answer)
        };
        // On a terminal the table stays in place.
        let clear = if watch && !json && std::io::stdout().is_terminal() {
            "\x1b[H\x1b[2J"
        } else {
            ""
        };
        say(&format!("{clear}{text}"))?;
        if !watch {
            return Ok(());
        }
        std::thread::sleep(Duration::from_secs(1));
    }
}

fn devices(client: &Client, json: bool) -> anyhow::Result<()> {
    let answer = client.devices()?;
    say(&if json {
        serde_json::to_string(&answer)? + "\n"
    } else {
        table::devices(&answer)
    })
}

/// Writes to standard output; a reader that went away (`| head`) is no error.
fn say(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => Ok(other?),
    }
}
