//! How far behind the primary this replica is, in bytes and seconds, and how fast things move.
//!
//! Invariant: lag is stated "as of" the last word of the primary, never extrapolated (P6: durable positions only).

use mars_engine::types::Lsn;
use std::collections::VecDeque;
use std::time::{Duration, Instant, SystemTime};

/// Most samples kept; when full, the one goes that is closest to its neighbours: long lag is measured in coarser steps.
const SAMPLES: usize = 512;

/// A statement about lag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LagNow {
    /// History that is durable at the primary and not here (bytes).
    pub bytes: u64,
    /// Age of the oldest such byte (seconds, rounded up).
    pub seconds: u64,
    /// When the primary said so.
    pub as_of: SystemTime,
}

/// Remembers when the primary's history had which length.
#[derive(Debug, Default)]
pub struct LagMeter {
    /// Durable end of the primary, and when it was first seen that long. Ascending.
    samples: VecDeque<(Lsn, Instant)>,
    last_word: Option<(Lsn, Instant, SystemTime)>,
}

impl LagMeter {
    /// The primary said that its history is durable up to `end`. A shorter one than before is another history.
    pub fn primary_at(&mut self, end: Lsn, now: Instant, wall: SystemTime) {
        match self.samples.back() {
            Some((last, _)) if end < *last => self.samples.clear(),
            Some((last, _)) if end == *last => {
                self.last_word = Some((end, now, wall));
                return;
            }
            _ => {}
        }
        self.samples.push_back((end, now));
        self.last_word = Some((end, now, wall));
        if self.samples.len() > SAMPLES {
            self.drop_densest();
        }
    }

    /// Drops the sample whose loss blurs least: the one with the smallest gap around it.
    fn drop_densest(&mut self) {
        let gap = |index: &usize| {
            self.samples[index + 1]
                .1
                .saturating_duration_since(self.samples[index - 1].1)
        };
        if let Some(index) = (1..self.samples.len() - 1).min_by_key(gap) {
            self.samples.remove(index);
        }
    }

    /// Lag of a replica whose history is durable up to `own`; `None` before the primary has said anything.
    pub fn lag(&mut self, own: Lsn) -> Option<LagNow> {
        let (end, heard, as_of) = self.last_word?;
        while self.samples.front().is_some_and(|(lsn, _)| *lsn <= own) {
            self.samples.pop_front();
        }
        let bytes = end.bytes_since(own);
        let since = self.samples.front().map_or(heard, |(_, since)| *since);
        let age = if bytes == 0 {
            Duration::ZERO
        } else {
            heard.saturating_duration_since(since)
        };
        Some(LagNow {
            bytes,
            seconds: age.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX),
            as_of,
        })
    }
}

/// Bytes per second over the last few seconds.
#[derive(Debug, Default)]
pub struct RateMeter {
    samples: VecDeque<(u64, Instant)>,
}

/// The stretch of time a rate is averaged over.
const RATE_WINDOW: Duration = Duration::from_secs(5);

impl RateMeter {
    /// The counter has this value now; answers the rate. A counter that falls starts over.
    pub fn at(&mut self, value: u64, now: Instant) -> u64 {
        if self.samples.back().is_some_and(|(last, _)| value < *last) {
            self.samples.clear();
        }
        self.samples.push_back((value, now));
        // One sample from before the window stays, as its left end.
        while self
            .samples
            .get(1)
            .is_some_and(|(_, at)| now.saturating_duration_since(*at) > RATE_WINDOW)
        {
            self.samples.pop_front();
        }
        let Some((first, since)) = self.samples.front() else {
            return 0;
        };
        let millis = now.saturating_duration_since(*since).as_millis();
        if millis == 0 {
            return 0;
        }
        u64::try_from(u128::from(value - first) * 1000 / millis).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lag_is_the_age_of_the_oldest_missing_byte() {
        let (start, wall) = (Instant::now(), SystemTime::UNIX_EPOCH);
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut meter = LagMeter::default();
        assert_eq!(meter.lag(Lsn(0)), None);
        for second in 0..10 {
            meter.primary_at(Lsn(second * 100), at(second), wall);
        }
        let behind = meter.lag(Lsn(450)).unwrap();
        // Bytes 450 to 500 were first seen at second 5, the last word came at second 9.
        assert_eq!((behind.bytes, behind.seconds), (450, 4));
        let current = meter.lag(Lsn(900)).unwrap();
        assert_eq!((current.bytes, current.seconds), (0, 0));
        // A write after an idle hour is not an hour old.
        meter.primary_at(Lsn(900), at(3600), wall);
        meter.primary_at(Lsn(901), at(3601), wall);
        assert_eq!(meter.lag(Lsn(900)).unwrap().seconds, 0);
    }

    #[test]
    fn the_meter_is_bounded() {
        let start = Instant::now();
        let mut meter = LagMeter::default();
        for step in 0..100_000_u32 {
            meter.primary_at(
                Lsn(u64::from(step)),
                start + Duration::from_secs(1) * step,
                SystemTime::UNIX_EPOCH,
            );
        }
        assert!(meter.samples.len() <= SAMPLES);
        let lag = meter.lag(Lsn(0)).unwrap();
        assert!(lag.seconds > 90_000, "{lag:?}");
    }

    #[test]
    fn a_rate_forgets_the_past_and_survives_a_counter_that_falls() {
        let start = Instant::now();
        let mut meter = RateMeter::default();
        for second in 0..20_u32 {
            meter.at(
                u64::from(second.min(10)) * 1000,
                start + Duration::from_secs(1) * second,
            );
        }
        assert_eq!(meter.at(10_000, start + Duration::from_secs(30)), 0);
        assert_eq!(meter.at(5, start + Duration::from_secs(31)), 0);
    }
}
