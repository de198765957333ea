//! The clock of a node: messages of the agent and records of all its replicas are stamped by it.
//!
//! Invariants: those of the engine's [`LamportClock`]; a stamp too far ahead of the wall clock is refused together with its message
//!

use mars_engine::clock::{LamportClock, TooFarAhead};
use mars_engine::types::Lamport;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Shared by everything that sends, receives or records.
pub struct SharedClock {
    clock: LamportClock,
    wall_ns: Box<dyn Fn() -> u64 + Send + Sync>,
}

impl fmt::Debug for SharedClock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedClock")
            .field("last", &self.last())
            .finish_non_exhaustive()
    }
}

impl Default for SharedClock {
    fn default() -> Self {
        Self::with_wall(wall_ns)
    }
}

impl SharedClock {
    /// A clock over another wall clock than that of this machine (nanoseconds since the Unix epoch).
    #[must_use]
    pub fn with_wall(wall_ns: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        Self {
            clock: LamportClock::default(),
            wall_ns: Box::new(wall_ns),
        }
    }

    /// What the replicas of this node stamp their records with.
    #[must_use]
    pub fn engine(&self) -> &LamportClock {
        &self.clock
    }

    /// A stamp for a message.
    #[must_use]
    pub fn now(&self) -> Lamport {
        self.clock.stamp((self.wall_ns)())
    }

    /// The last stamp made or seen.
    #[must_use]
    pub fn last(&self) -> Lamport {
        self.clock.last()
    }

    /// Takes note of a stamp that came in.
    ///
    /// # Errors
    /// [`TooFarAhead`]: the message must not be used.
    pub fn observe(&self, stamp: Lamport) -> Result<(), TooFarAhead> {
        self.clock.see(stamp, (self.wall_ns)())
    }

    /// How far this clock is ahead of the wall clock.
    #[must_use]
    pub fn slip(&self) -> Duration {
        Duration::from_nanos(self.clock.slip_ns((self.wall_ns)()))
    }
}

fn wall_ns() -> u64 {
    let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a60_stamps_come_after_everything_seen_and_a_stamp_from_next_year_is_refused() {
        let clock = SharedClock::default();
        let first = clock.now();
        let hour_ns = 3600 * 1_000_000_000;
        clock.observe(Lamport(first.0 + hour_ns)).unwrap();
        let second = clock.now();
        assert!(second.0 > first.0 + hour_ns);
        assert!(clock.observe(Lamport(first.0 + 24 * 365 * hour_ns)).is_err());
        assert!(clock.now().0 < second.0 + hour_ns, "a refused stamp leaves no trace");
        assert!(clock.slip() > Duration::from_mins(50));
    }
}
