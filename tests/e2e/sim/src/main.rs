//! `mars-sim --seed N` runs one seed and prints what happened; `--seeds A..B` runs many. Exit code 1 names the seed that failed.

use anyhow::{Context, Result, bail};
use clap::Parser;
use mars_sim::{Config, run};
use std::panic::catch_unwind;

/// Deterministic simulation of replicated devices.
#[derive(Parser)]
struct Args {
    /// Run exactly this seed, twice, and compare.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run a range of seeds, for example 0..1000.
    #[arg(long, default_value = "0..100")]
    seeds: String,
    /// Random steps per run.
    #[arg(long, default_value_t = 4_000)]
    steps: u32,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let config = |seed| Config {
        steps: args.steps,
        ..Config::new(seed)
    };
    if let Some(seed) = args.seed {
        let (first, second) = (run(config(seed)), run(config(seed)));
        println!("{first:#?}");
        if first != second {
            bail!("seed {seed} does not give the same run twice: {second:#?}");
        }
        return Ok(());
    }
    let (from, to) = args.seeds.split_once("..").context("--seeds wants A..B")?;
    let (from, to): (u64, u64) = (from.parse()?, to.parse()?);
    let (mut ios, mut failed) = (0, Vec::new());
    for seed in from..to {
        let Ok(report) = catch_unwind(|| run(config(seed))) else {
            eprintln!("seed {seed} failed: mars-sim --seed {seed} --steps {}", args.steps);
            failed.push(seed);
            continue;
        };
        ios += report.ios;
    }
    println!("{} seeds, {ios} I/Os, failed: {failed:?}", to - from);
    if failed.is_empty() {
        Ok(())
    } else {
        bail!("{} seeds failed", failed.len())
    }
}
