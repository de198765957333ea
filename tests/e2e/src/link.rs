//! Links between nodes: cut, slow, lossy. Works on the addresses of the agents, in the network namespace of the test.
//!
//! Invariant: a cut or a slow link is gone when its guard is dropped.

use crate::machine::{Background, Cmd, run, until, workspace};
use anyhow::Result;
use std::fs::File;
use std::time::Duration;

const TABLE: &str = "mars_e2e";

/// A cut between two addresses: packets vanish in both directions, without a word to either side.
#[derive(Debug)]
pub struct Cut {
    chain: String,
}

impl Cut {
    /// Cuts the link.
    pub fn between(one: &str, other: &str) -> Result<Self> {
        let chain = format!(
            "cut_{}_{}",
            one.replace(['.', ':'], "_"),
            other.replace(['.', ':'], "_")
        );
        let rules = format!(
            "add table inet {TABLE}
             add chain inet {TABLE} {chain} {{ type filter hook input priority 0; policy accept; }}
             flush chain inet {TABLE} {chain}
             add rule inet {TABLE} {chain} ip saddr {one} ip daddr {other} drop
             add rule inet {TABLE} {chain} ip saddr {other} ip daddr {one} drop\n"
        );
        Cmd::new("nft").args(["-f", "-"]).input(rules).run()?;
        Ok(Self { chain })
    }

    /// Heals the link; the same as dropping it, with the error.
    pub fn heal(mut self) -> Result<()> {
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        if !self.chain.is_empty() {
            run(
                "nft",
                &["delete", "chain", "inet", TABLE, &std::mem::take(&mut self.chain)],
            )?;
        }
        Ok(())
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        let _ = self.remove();
    }
}

/// Cuts one address off from all the others given.
pub fn isolate(one: &str, others: &[&str]) -> Result<Vec<Cut>> {
    others.iter().map(|other| Cut::between(one, other)).collect()
}

/// A wide-area link between two addresses; see `scripts/wan`.
#[derive(Debug)]
pub struct Wan {
    relay: Background,
}

impl Wan {
    /// Puts the link in place: one-way delay, loss per packet, rate per direction.
    pub fn between(name: &str, one: &str, other: &str, delay_ms: u32, loss_percent: f64, mbit: u32) -> Result<Self> {
        let out = tempfile::NamedTempFile::new()?;
        let mut relay = Cmd::new(workspace().join("tests/e2e/scripts/wan"))
            .args([name, one, other])
            .args([delay_ms.to_string(), loss_percent.to_string(), mbit.to_string()])
            .spawn(out.reopen()?, File::options().write(true).open("/dev/null")?)?;
        until("the wide-area link is ready", Duration::from_secs(10), || {
            anyhow::ensure!(relay.running()?, "scripts/wan ended");
            Ok(std::fs::read_to_string(out.path())?.contains("ready"))
        })?;
        Ok(Self { relay })
    }

    /// Swallows everything, as a pulled cable does.
    pub fn pull(&self) -> Result<()> {
        self.relay.signal("STOP")
    }

    /// Plugs it in again; what queued up arrives late.
    pub fn plug(&self) -> Result<()> {
        self.relay.signal("CONT")
    }
}
