//! The Lamport clock: physical time that never contradicts the order of causes and effects.
//!
//! Invariants: a stamp is never behind the wall clock it was made with, and always above every stamp made or seen before. A stamp
//! more than 30 days ahead of the wall clock is refused, so that one broken clock cannot carry all others away.

use crate::types::Lamport;

/// How far ahead of the local wall clock a foreign stamp may be (nanoseconds): 30 days.
pub const MAX_AHEAD_NS: u64 = 30 * 24 * 3600 * 1_000_000_000;

/// A stamp that is too far ahead to be true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "time stamp {stamp_ns} ns is {ahead_ns} ns ahead of this node's clock, more than 30 days: refused; set the clocks of both nodes"
)]
pub struct TooFarAhead {
    /// The stamp (nanoseconds since the Unix epoch).
    pub stamp_ns: u64,
    /// By how much it is ahead (nanoseconds).
    pub ahead_ns: u64,
}

/// See the module.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LamportClock {
    last: Lamport,
}

impl LamportClock {
    /// A clock that has seen everything up to `last`, as persisted.
    #[must_use]
    pub fn new(last: Lamport) -> Self {
        Self { last }
    }

    /// The last stamp made or seen: what is to be persisted.
    #[must_use]
    pub fn last(&self) -> Lamport {
        self.last
    }

    /// A stamp for something that happens now.
    pub fn stamp(&mut self, wall_ns: u64) -> Lamport {
        self.last = Lamport(wall_ns.max(self.last.0.saturating_add(1)));
        self.last
    }

    /// Takes note of a stamp from elsewhere: everything stamped here from now on comes after it.
    ///
    /// # Errors
    /// [`TooFarAhead`]; the clock is unchanged.
    pub fn see(&mut self, stamp: Lamport, wall_ns: u64) -> Result<(), TooFarAhead> {
        let ahead_ns = stamp.0.saturating_sub(wall_ns);
        if ahead_ns > MAX_AHEAD_NS {
            return Err(TooFarAhead {
                stamp_ns: stamp.0,
                ahead_ns,
            });
        }
        self.last = self.last.max(stamp);
        Ok(())
    }

    /// How far this clock runs ahead of the wall clock (nanoseconds).
    #[must_use]
    pub fn slip_ns(&self, wall_ns: u64) -> u64 {
        self.last.0.saturating_sub(wall_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Two nodes with wall clocks that jump at will exchange stamps: every effect is stamped later than its cause.
        #[test]
        fn a60_causal_order_holds_with_skewed_and_jumping_clocks(
            steps in prop::collection::vec((0..2_usize, 0..1_000_000_000_u64, any::<bool>()), 1..100)
        ) {
            let mut clocks = [LamportClock::default(); 2];
            let mut last_of = [Lamport(0); 2];
            for (node, wall_ns, send) in steps {
                let stamp = clocks[node].stamp(wall_ns);
                prop_assert!(stamp.0 >= wall_ns, "behind the wall clock");
                prop_assert!(stamp > last_of[node], "not after what this node knew");
                last_of[node] = stamp;
                if send {
                    let peer = 1 - node;
                    clocks[peer].see(stamp, wall_ns).unwrap();
                    last_of[peer] = last_of[peer].max(stamp);
                }
            }
        }
    }

    #[test]
    fn a60_more_than_thirty_days_ahead_is_refused() {
        let mut clock = LamportClock::new(Lamport(5));
        assert!(clock.see(Lamport(100 + MAX_AHEAD_NS), 100).is_ok());
        let before = clock;
        let refused = clock.see(Lamport(101 + MAX_AHEAD_NS), 100).unwrap_err();
        assert_eq!(refused.ahead_ns, MAX_AHEAD_NS + 1);
        assert_eq!(clock, before);
        assert_eq!(clock.slip_ns(100), MAX_AHEAD_NS);
    }
}
