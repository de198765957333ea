//! The main job, end to end, on this machine: a manifest becomes a replicated block device that survives its node.
//!
//! Invariant: whatever happens – success, failure, Ctrl-C – nothing of the demo is left on the machine afterwards.
#![forbid(unsafe_code)]

mod screen;
mod story;

use anyhow::{Context, Result, ensure};
use mars_e2e::machine;
use screen::Screen;
use std::process::ExitCode;

/// Data disks, logs and copies of three nodes.
const SPACE_BYTES: u64 = 5 << 30;

fn main() -> ExitCode {
    if let Err(error) = prepare() {
        eprintln!("mars-demo: {error:#}");
        return ExitCode::FAILURE;
    }
    let screen = Screen::new();
    match story::tell(&screen) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.unwatch();
            screen.bad(&format!("\nmars-demo: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn prepare() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "it makes block devices and mounts them: run it as root"
    );
    for program in ["mars-local", "mars-node-agent"] {
        machine::program(program)?;
    }
    let dir = std::env::temp_dir();
    let space = rustix::fs::statvfs(&dir).with_context(|| dir.display().to_string())?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    ensure!(
        free >= SPACE_BYTES,
        "{} has {} MiB free, the demo needs {} MiB: set TMPDIR to a directory with more space",
        dir.display(),
        free >> 20,
        SPACE_BYTES >> 20
    );
    // The first Ctrl-C (or TERM, or a closed terminal) ends all waits; guards then clean up.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            let watch = || anyhow::Ok((signal(SignalKind::terminate())?, signal(SignalKind::hangup())?));
            match watch() {
                Ok((mut terminate, mut hangup)) => {
                    tokio::select! {
                        _ = tokio::signal::ctrl_c() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                    machine::interrupt();
                    // Later ones are swallowed: clean-up runs to its end.
                    loop {
                        let _ = tokio::signal::ctrl_c().await;
                    }
                }
                Err(error) => eprintln!("mars-demo: no signal handling: {error:#}"),
            }
        });
    });
    Ok(())
}
