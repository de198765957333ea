//! Saving the state: one slot write at a time, everything changed meanwhile goes into the next one.
//!
//! Invariant: `durable` counts only changes contained in a slot write that succeeded.

use super::retry::Retry;
use crate::types::Lsn;
use std::time::Duration;

/// Counts changes of the saved state; comparable.
pub(super) type Generation = u64;

/// What is saved and what is still to be saved.
#[derive(Debug, Default)]
pub(super) struct Saver {
    wanted: Generation,
    issued: Generation,
    durable: Generation,
    in_flight: bool,
    /// Backs off while the slots cannot be written.
    pub(super) retry: Retry,
    /// Applied positions in the two slots, the one written last first: segments go only below both.
    applied: [Lsn; 2],
    issued_applied: Lsn,
    /// The durable end has moved since the last save: save it by then, as evidence against later damage.
    evidence_due: Option<Duration>,
}

/// How long the durable end may move without being saved.
const EVIDENCE_DELAY: Duration = Duration::from_secs(1);

impl Saver {
    /// Something changed; says which generation contains it.
    pub(super) fn request(&mut self) -> Generation {
        self.wanted = self.wanted.max(self.issued) + 1;
        self.wanted
    }

    /// The durable end of the log has moved.
    pub(super) fn durable_moved(&mut self, now: Duration) {
        self.evidence_due.get_or_insert(now + EVIDENCE_DELAY);
    }

    /// Turns evidence that has waited long enough into a wanted write.
    pub(super) fn collect_evidence(&mut self, now: Duration) {
        if self.evidence_due.is_some_and(|due| due <= now) {
            self.evidence_due = None;
            self.request();
        }
    }

    /// When there is something to do.
    pub(super) fn deadline(&self, now: Duration) -> Option<Duration> {
        [self.retry.deadline(now), self.evidence_due]
            .into_iter()
            .flatten()
            .min()
    }

    /// Whether a write should begin.
    pub(super) fn is_due(&self) -> bool {
        !self.in_flight && self.wanted > self.durable
    }

    pub(super) fn begin(&mut self, applied: Lsn) {
        assert!(!self.in_flight, "one slot write at a time");
        self.in_flight = true;
        self.issued = self.wanted;
        self.issued_applied = applied;
        self.evidence_due = None;
    }

    /// The write came back; `true` = it succeeded.
    pub(super) fn finish(&mut self, ok: bool) {
        self.in_flight = false;
        if ok {
            self.durable = self.issued;
            self.applied = [self.issued_applied, self.applied[0]];
        }
    }

    /// Whether everything up to `generation` is on stable storage.
    pub(super) fn is_durable(&self, generation: Generation) -> bool {
        self.durable >= generation
    }

    /// Nothing changed since the last successful write.
    pub(super) fn is_clean(&self) -> bool {
        !self.in_flight && self.wanted <= self.durable
    }

    /// What both slots say is applied at least.
    pub(super) fn applied_in_both(&self) -> Lsn {
        self.applied[0].min(self.applied[1])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_during_a_write_is_durable_only_after_the_next_write() {
        let mut saver = Saver::default();
        let first = saver.request();
        saver.begin(Lsn(5));
        let second = saver.request();
        saver.finish(true);
        assert!(saver.is_durable(first) && !saver.is_durable(second) && saver.is_due());
        saver.begin(Lsn(9));
        saver.finish(false);
        assert!(!saver.is_durable(second) && saver.is_due());
        saver.begin(Lsn(9));
        saver.finish(true);
        assert!(saver.is_durable(second) && saver.is_clean());
        assert_eq!(saver.applied_in_both(), Lsn(5));
    }
}
