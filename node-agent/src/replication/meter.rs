//! Rates: measured for the status, and limited for thin links.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// Counts bytes; tells a smoothed rate.
#[derive(Debug, Default)]
pub(super) struct Meter {
    total: AtomicU64,
    sampled: Mutex<Option<(Instant, u64, f64)>>,
}

/// How quickly the shown rate follows the measured one (seconds).
const SMOOTHING_S: f64 = 3.0;

impl Meter {
    pub(super) fn add(&self, bytes: u64) {
        self.total.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn total(&self) -> u64 {
        self.total.load(Ordering::Relaxed)
    }

    /// Bytes per second, smoothed over some seconds.
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rate for people"
    )]
    pub(super) fn rate(&self) -> u64 {
        let (now, total) = (Instant::now(), self.total());
        let mut sampled = self.sampled.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((at, before, rate)) = *sampled else {
            *sampled = Some((now, total, 0.0));
            return 0;
        };
        let seconds = now.duration_since(at).as_secs_f64();
        if seconds < 0.2 {
            return rate as u64;
        }
        let weight = 1.0 - (-seconds / SMOOTHING_S).exp();
        let rate = rate + weight * ((total - before) as f64 / seconds - rate);
        *sampled = Some((now, total, rate));
        rate as u64
    }
}

/// Lets so many bytes per second through.
#[derive(Debug, Default)]
pub(super) struct Throttle(Mutex<Option<Instant>>);

impl Throttle {
    /// Waits until `bytes` more fit under the limit. A burst of a quarter of a second is allowed.
    pub(super) async fn pass(&self, bytes: u64, limit: Option<u64>) {
        let Some(limit) = limit.filter(|limit| *limit > 0) else {
            return;
        };
        let wait_until = {
            let mut free_at = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let earliest = Instant::now()
                .checked_sub(Duration::from_millis(250))
                .unwrap_or_else(Instant::now);
            let start = free_at.unwrap_or(earliest).max(earliest);
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit);
            let next = start + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX / 2));
            *free_at = Some(next);
            next
        };
        tokio::time::sleep_until(wait_until).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_throttle_lets_the_agreed_rate_through() {
        let throttle = Throttle::default();
        let began = Instant::now();
        for _ in 0..100 {
            throttle.pass(10_000, Some(100_000)).await;
        }
        let seconds = began.elapsed().as_secs_f64();
        assert!((9.0..10.5).contains(&seconds), "1 MB at 100 kB/s took {seconds} s");
    }

    #[tokio::test(start_paused = true)]
    async fn a_meter_shows_the_rate_and_forgets_it() {
        let meter = Meter::default();
        meter.rate();
        for _ in 0..40 {
            meter.add(500);
            tokio::time::advance(Duration::from_millis(500)).await;
            meter.rate();
        }
        assert!((950..=1000).contains(&meter.rate()), "{}", meter.rate());
        tokio::time::advance(Duration::from_mins(1)).await;
        assert!(meter.rate() < 5);
    }
}
