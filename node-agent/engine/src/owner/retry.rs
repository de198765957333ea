//! When to try again: exponential, with jitter, with an upper limit.
//!
//! Invariant: two tries are never closer than the first delay, and never further apart than the longest.

use rand::Rng;
use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
const LONGEST: Duration = Duration::from_secs(10);

/// The state of one thing that is tried again and again.
#[derive(Debug, Default)]
pub(super) struct Retry {
    at: Option<Duration>,
    failures: u32,
}

impl Retry {
    /// It failed just now.
    pub(super) fn failed(&mut self, now: Duration, rng: &mut impl Rng) {
        let delay = FIRST.saturating_mul(1 << self.failures.min(10)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.at = Some(now + delay.mul_f64(rng.random_range(0.75..1.0)).max(FIRST));
    }

    /// It worked.
    pub(super) fn succeeded(&mut self) {
        *self = Retry::default();
    }

    /// Whether a try is allowed now.
    pub(super) fn ready(&self, now: Duration) -> bool {
        self.at.is_none_or(|at| at <= now)
    }

    /// When the next try is allowed, if that is later than `now`.
    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        self.at.filter(|at| *at > now)
    }
}
