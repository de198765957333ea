//! Delivers reports: state at once, positions at most every 30 s, and nothing twice.
//!
//! Invariant: it runs beside the replica and takes only the newest report, so that an API server that is slow or away delays
//! nothing and gets one write, not a queue, when it is back.

use super::report::differs_in_state;
use super::sink::Sink;
use mars_crds::MarsReplicaStatus;
use rand::Rng;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, warn};

/// Between two writes when only positions change.
const POSITIONS: Duration = Duration::from_secs(30);
/// Between two writes when state changes: many changes of one moment become one write.
const SETTLE: Duration = Duration::from_millis(50);
/// Longest pause after failures.
const RETRY_MAX: Duration = Duration::from_secs(15);

/// Writes until the sender is gone; then tries once more to deliver the last report.
pub(super) async fn run(sink: Sink, name: String, mut reports: watch::Receiver<Arc<MarsReplicaStatus>>) {
    let mut written: Option<(Arc<MarsReplicaStatus>, Instant)> = None;
    let mut failures = 0_u32;
    loop {
        let newest = reports.borrow_and_update().clone();
        let due = match &written {
            None => Some(Instant::now()),
            Some((last, _)) if differs_in_state(last, &newest) => Some(Instant::now()),
            Some((last, at)) if **last != *newest => Some(*at + POSITIONS),
            Some(_) => None,
        };
        let closed = match due {
            Some(due) if due <= Instant::now() => {
                match sink.replica_status(&name, &newest).await {
                    Ok(()) => {
                        written = Some((newest, Instant::now()));
                        failures = 0;
                        tokio::time::sleep(SETTLE).await;
                        false
                    }
                    Err(error) => {
                        // An absent object has nobody who could read a report; it may come back.
                        if failures == 0 && !error.is_absent() {
                            warn!(replica = name, %error, "status not delivered; trying again");
                        } else {
                            debug!(replica = name, %error, "status not delivered");
                        }
                        failures += 1;
                        pause(failures, &mut reports).await
                    }
                }
            }
            Some(due) => tokio::select! {
                changed = reports.changed() => changed.is_err(),
                () = tokio::time::sleep_until(due) => false,
            },
            None => reports.changed().await.is_err(),
        };
        if closed {
            let last = reports.borrow().clone();
            if written.as_ref().is_none_or(|(written, _)| *written != last)
                && let Err(error) = sink.replica_status(&name, &last).await
            {
                debug!(replica = name, %error, "the last status was not delivered");
            }
            return;
        }
    }
}

/// Waits longer after each failure; true when the sender is gone.
async fn pause(failures: u32, reports: &mut watch::Receiver<Arc<MarsReplicaStatus>>) -> bool {
    let longest = Duration::from_millis(250)
        .saturating_mul(1 << failures.min(10))
        .min(RETRY_MAX);
    let until = Instant::now() + longest.mul_f64(rand::rng().random_range(0.5..1.0));
    loop {
        tokio::select! {
            changed = reports.changed() => if changed.is_err() { return true },
            () = tokio::time::sleep_until(until) => return false,
        }
    }
}
