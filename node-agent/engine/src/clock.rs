//! The Lamport clock: physical time that never contradicts the order of causes and effects.
//!
//! A node has one: the messages of its agent and the records of all its replicas are stamped by clones of the same clock. So what is
//! recorded after a message came in is stamped later than the message, with no way to tell the owner of a replica.
//!
//! Invariants: a stamp is never behind the wall clock it was made with, and always above every stamp made or seen before, by
//! whichever clone. A stamp more than 30 days ahead of the wall clock is refused, so that one broken clock cannot carry all others
//! away.

use crate::types::Lamport;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// See the module. Clones are the same clock.
#[derive(Debug, Clone, Default)]
pub struct LamportClock {
    /// The order of stamps follows from this one number, whatever thread looks at it.
    last: Arc<AtomicU64>,
}

impl LamportClock {
    /// A clock that has seen everything up to `last`, as persisted.
    #[must_use]
    pub fn new(last: Lamport) -> Self {
        Self {
            last: Arc::new(AtomicU64::new(last.0)),
        }
    }

    /// The last stamp made or seen: what is to be persisted.
    #[must_use]
    pub fn last(&self) -> Lamport {
        Lamport(self.last.load(Ordering::Acquire))
    }

    /// A stamp for something that happens now.
    #[must_use]
    pub fn stamp(&self, wall_ns: u64) -> Lamport {
        let next = |last: u64| wall_ns.max(last.saturating_add(1));
        let update = self
            .last
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |last| Some(next(last)));
        let (Ok(before) | Err(before)) = update;
        Lamport(next(before))
    }

    /// Takes note of a stamp from elsewhere: everything stamped here from now on comes after it.
    ///
    /// # Errors
    /// [`TooFarAhead`]; the clock is unchanged.
    pub fn see(&self, stamp: Lamport, wall_ns: u64) -> Result<(), TooFarAhead> {
        let ahead_ns = stamp.0.saturating_sub(wall_ns);
        if ahead_ns > MAX_AHEAD_NS {
            return Err(TooFarAhead {
                stamp_ns: stamp.0,
                ahead_ns,
            });
        }
        self.last.fetch_max(stamp.0, Ordering::AcqRel);
        Ok(())
    }

    /// How far this clock runs ahead of the wall clock (nanoseconds).
    #[must_use]
    pub fn slip_ns(&self, wall_ns: u64) -> u64 {
        self.last().0.saturating_sub(wall_ns)
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
            let clocks = [LamportClock::default(), LamportClock::default()];
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
        let clock = LamportClock::new(Lamport(5));
        assert!(clock.see(Lamport(100 + MAX_AHEAD_NS), 100).is_ok());
        let before = clock.last();
        let refused = clock.see(Lamport(101 + MAX_AHEAD_NS), 100).unwrap_err();
        assert_eq!(refused.ahead_ns, MAX_AHEAD_NS + 1);
        assert_eq!(clock.last(), before);
        assert_eq!(clock.slip_ns(100), MAX_AHEAD_NS);
    }

    /// Two threads share a clock; no stamp is made twice, and each thread's own ascend.
    #[test]
    fn a60_clones_on_other_threads_never_make_the_same_stamp() {
        let clock = LamportClock::new(Lamport(7));
        let stamps = |clock: LamportClock| (0..20_000).map(|_| clock.stamp(3)).collect::<Vec<_>>();
        let (ours, theirs) = std::thread::scope(|scope| {
            let theirs = scope.spawn(|| stamps(clock.clone()));
            (stamps(clock.clone()), theirs.join().unwrap())
        });
        assert!(ours.is_sorted_by(|a, b| a < b) && theirs.is_sorted_by(|a, b| a < b));
        let mut all = [ours, theirs].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!((all.len(), clock.last()), (40_000, Lamport(40_007)));
    }
}
