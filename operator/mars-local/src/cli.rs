//! The command line.
//!
//! Invariant: every command ends with 0 only if what it says has happened; errors go to stderr with what to do next.

use crate::embedded::{DEFAULT_LISTEN, EmbeddedApi, Setup, kubeconfig};
use anyhow::Context as _;
use clap::{Parser, Subcommand};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "mars-local", version, about = "A whole MARS cluster on one machine")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve only the embedded API, without operator and agents.
    Api {
        /// State directory; objects go to <state>/api, the kubeconfig to <state>/kubeconfig.
        #[arg(long)]
        state: PathBuf,
        /// Loopback address.
        #[arg(long, default_value = DEFAULT_LISTEN)]
        listen: SocketAddr,
        /// Definitions (YAML files) to install besides those of MARS.
        #[arg(long)]
        crd: Vec<PathBuf>,
    },
}

/// Parses the command line and runs it.
#[must_use]
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let outcome = match cli.command {
        Command::Api { state, listen, crd } => serve_api(&state, listen, &crd),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mars-local: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[tokio::main]
async fn serve_api(state: &std::path::Path, listen: SocketAddr, crds: &[PathBuf]) -> anyhow::Result<()> {
    let mut setup = Setup {
        listen,
        ..Setup::bare()
    };
    for path in crds {
        let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        setup
            .definitions
            .push(serde_yaml::from_str(&text).with_context(|| format!("parsing {}", path.display()))?);
    }
    let api = EmbeddedApi::start(&state.join("api"), setup).await?;
    let config = state.join("kubeconfig");
    std::fs::write(&config, kubeconfig(&api.url())).with_context(|| format!("writing {}", config.display()))?;
    tracing::info!(url = api.url(), kubeconfig = %config.display(), "the API is served; Ctrl-C ends it");
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    tokio::select! {
        _ = terminate.recv() => {}
        outcome = tokio::signal::ctrl_c() => outcome?,
    }
    api.stop().await;
    Ok(())
}
