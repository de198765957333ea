//! The agent's Lamport clock, as far as messages are concerned: one for all replicas and connections.
//!
//! Invariants: those of the engine's [`LamportClock`]; a stamp too far ahead of the wall clock is refused together with its message.

use mars_engine::clock::{LamportClock, TooFarAhead};
use mars_engine::types::Lamport;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Shared by everything that sends or receives.
#[derive(Debug, Default)]
pub struct SharedClock(Mutex<LamportClock>);

impl SharedClock {
    /// A clock that has seen everything up to `last`.
    #[must_use]
    pub fn new(last: Lamport) -> Self {
        Self(Mutex::new(LamportClock::new(last)))
    }

    fn lock(&self) -> MutexGuard<'_, LamportClock> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stamp for a message.
    #[must_use]
    pub fn now(&self) -> Lamport {
        self.lock().stamp(wall_ns())
    }

    /// The last stamp made or seen.
    #[must_use]
    pub fn last(&self) -> Lamport {
        self.lock().last()
    }

    /// Takes note of a stamp that came in.
    ///
    /// # Errors
    /// [`TooFarAhead`]: the message must not be used.
    pub fn observe(&self, stamp: Lamport) -> Result<(), TooFarAhead> {
        self.lock().see(stamp, wall_ns())
    }

    /// How far this clock is ahead of the wall clock.
    #[must_use]
    pub fn slip(&self) -> Duration {
        Duration::from_nanos(self.last().0.saturating_sub(wall_ns()))
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
