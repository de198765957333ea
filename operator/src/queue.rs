//! Names of resources that need a pass, each at most once, each worked on by one worker at a time.
//!
//! Invariant: bounded by the number of resources; a name added while it is worked on is worked on again afterwards.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

#[derive(Debug, Default)]
struct State {
    due: BTreeMap<String, Instant>,
    busy: BTreeSet<String>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Notify,
}

impl Queue {
    /// Asks for a pass as soon as possible.
    pub fn add(&self, name: &str) {
        self.add_after(name, Duration::ZERO);
    }

    /// Asks for a pass after `delay`; an earlier request stands.
    pub fn add_after(&self, name: &str, delay: Duration) {
        let at = Instant::now() + delay;
        let mut state = self.lock();
        let due = state.due.entry(name.to_owned()).or_insert(at);
        *due = (*due).min(at);
        drop(state);
        self.changed.notify_one();
    }

    /// Waits for the next name; the caller must call [`done`](Self::done) with it.
    pub async fn next(&self) -> String {
        loop {
            let wait = match self.take() {
                Ok(name) => return name,
                Err(wait) => wait,
            };
            tokio::select! {
                () = self.changed.notified() => {}
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// The pass over `name` has ended.
    pub fn done(&self, name: &str) {
        self.lock().busy.remove(name);
        self.changed.notify_one();
    }

    fn take(&self) -> Result<String, Duration> {
        const LONG: Duration = Duration::from_mins(1);
        let now = Instant::now();
        let mut state = self.lock();
        let next = state
            .due
            .iter()
            .filter(|(name, _)| !state.busy.contains(*name))
            .min_by_key(|(_, at)| **at);
        let Some((name, at)) = next.map(|(name, at)| (name.clone(), *at)) else {
            return Err(LONG);
        };
        if at > now {
            return Err((at - now).min(LONG));
        }
        state.due.remove(&name);
        state.busy.insert(name.clone());
        let more = !state.due.is_empty();
        drop(state);
        if more {
            self.changed.notify_one();
        }
        Ok(name)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::Queue;
    use std::time::Duration;

    #[tokio::test]
    async fn a_name_is_worked_on_once_at_a_time_and_again_when_it_was_added_meanwhile() {
        let queue = Queue::default();
        queue.add("a");
        queue.add("a");
        assert_eq!(queue.next().await, "a");
        queue.add("a");
        queue.add("b");
        assert_eq!(queue.next().await, "b", "a is being worked on");
        assert!(queue.take().is_err(), "nothing else is due");
        queue.done("a");
        assert_eq!(queue.next().await, "a");
    }

    #[tokio::test]
    async fn the_earlier_of_two_requests_stands() {
        let queue = Queue::default();
        queue.add_after("a", Duration::from_hours(1));
        assert!(queue.take().is_err());
        queue.add("a");
        queue.add_after("a", Duration::from_hours(1));
        assert_eq!(queue.next().await, "a");
    }
}
