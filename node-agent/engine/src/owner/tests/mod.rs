//! Tests of the owner on a simulated machine.

mod backlog;
mod copies;
mod crash;
mod exchange;
mod handover;
mod pair;
mod promises;
mod recycle;
mod restart;
mod writes;

use crate::api::{Answer, Cause, Command, Reply, Role};
use crate::testing::Rig;
use crate::types::Designation;
use uuid::Uuid;

/// The seeds that a random test runs: `MARS_SEED=<n>` runs one, `MARS_SOAK=<factor>` that many times more.
fn seeds(count: u64) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    match (number("MARS_SEED"), number("MARS_SOAK")) {
        (Some(seed), _) => vec![seed],
        (None, factor) => (1..=count * factor.unwrap_or(1)).collect(),
    }
}

/// Runs `test` for each seed; a failure names the seed and how to run it alone.
fn for_seeds(count: u64, test: impl Fn(u64) + std::panic::RefUnwindSafe) {
    for seed in seeds(count) {
        if let Err(panic) = std::panic::catch_unwind(|| test(seed)) {
            eprintln!("failed with seed {seed}; replay with MARS_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

fn designation(number: u64) -> Designation {
    Designation {
        number,
        id: Uuid::from_u128(u128::from(number)),
    }
}

fn ok(reply: Option<Reply>) -> Answer {
    reply.expect("the machine is alive").expect("the command is accepted")
}

const DEVICE: u64 = 256 << 10;

/// A new replica that has become primary.
fn primary(seed: u64) -> Rig {
    let mut rig = Rig::create(1, seed, DEVICE);
    ok(rig.command(Command::Promote {
        designation: designation(1),
        cause: Cause::Create,
    }));
    assert_eq!(rig.owner().status().role, Role::Primary);
    rig
}

/// Brings a restarted replica back to the primary role: resumed if it may be, else by an acknowledged failover.
fn come_back(rig: &mut Rig) -> Option<()> {
    let status = rig.owner().status();
    let reply = match status.resumable {
        Some(resumable) => rig.command(Command::Resume {
            designation: resumable.designation,
        })?,
        None if status.lineage.0.is_empty() => {
            let next = designation(status.designation.number + 1);
            rig.command(Command::Promote {
                designation: next,
                cause: Cause::Create,
            })?
        }
        None => {
            let next = designation(status.designation.number + 1);
            rig.command(Command::Promote {
                designation: next,
                cause: Cause::Failover,
            })?
        }
    };
    reply.expect("the role is taken up again");
    Some(())
}
