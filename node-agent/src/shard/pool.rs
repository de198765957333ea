//! The bounded pool that runs slow work for all owners.
//!
//! Invariant: a job runs exactly once, and its outcome (or the fact that it panicked) always reaches the owner that
//! asked. The queue is bounded by construction: each owner hands in at most [`JobPool::share`] jobs at a time and
//! keeps the rest to itself, so one hanging disk cannot take all threads.

use super::engine::{Job, Outcome};
use super::wake::Wake;
use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// `Err` when the job panicked: its effects are unknown, and the engine that asked must not go on.
pub(crate) type JobResult = Result<Outcome, String>;

struct Task {
    job: Job,
    to: Sender<JobResult>,
    wake: Arc<Wake>,
}

#[derive(Default)]
struct Queues {
    urgent: VecDeque<Task>,
    normal: VecDeque<Task>,
    closed: bool,
}

/// Threads and their two queues.
pub(crate) struct JobPool {
    queues: Mutex<Queues>,
    ready: Condvar,
    threads: usize,
}

impl JobPool {
    pub(crate) fn start(threads: usize) -> io::Result<Arc<Self>> {
        let pool = Arc::new(Self {
            queues: Mutex::default(),
            ready: Condvar::new(),
            threads,
        });
        for number in 0..threads {
            let pool = Arc::clone(&pool);
            std::thread::Builder::new()
                .name(format!("mars-job-{number}"))
                .spawn(move || pool.work())?;
        }
        Ok(pool)
    }

    /// Most jobs one owner may have in the pool.
    pub(crate) fn share(&self) -> usize {
        (self.threads / 2).max(1)
    }

    /// Queues a job; its result goes to `to`, followed by a wake-up.
    pub(crate) fn run(&self, job: Job, to: Sender<JobResult>, wake: Arc<Wake>) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let queue = if job.urgent {
            &mut queues.urgent
        } else {
            &mut queues.normal
        };
        queue.push_back(Task { job, to, wake });
        drop(queues);
        self.ready.notify_one();
    }

    fn work(&self) {
        while let Some(Task { job, to, wake }) = self.next() {
            let result = catch_unwind(AssertUnwindSafe(job.run)).map_err(|panic| panic_message(panic.as_ref()));
            // The owner may be gone; then nobody needs the outcome.
            if to.send(result).is_ok() {
                wake.wake();
            }
        }
    }

    fn next(&self) -> Option<Task> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(task) = queues.urgent.pop_front() {
                return Some(task);
            }
            if let Some(task) = queues.normal.pop_front() {
                return Some(task);
            }
            if queues.closed {
                return None;
            }
            queues = self.ready.wait(queues).unwrap_or_else(PoisonError::into_inner);
        }
    }
    /// Lets the threads end once the queues are empty.
    pub(crate) fn close(&self) {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.ready.notify_all();
    }
}

/// What a panic said, as text.
pub(crate) fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_job_that_panics_is_reported_and_the_pool_goes_on() {
        let pool = JobPool::start(2).unwrap();
        let wake = Arc::new(Wake::new().unwrap());
        let (to, from) = channel();
        pool.run(
            Job {
                urgent: false,
                run: Box::new(|| panic!("boom")),
            },
            to.clone(),
            wake.clone(),
        );
        assert_eq!(from.recv().unwrap().err().as_deref(), Some("boom"));
        pool.run(
            Job {
                urgent: true,
                run: Box::new(|| Box::new(7_u32)),
            },
            to,
            wake,
        );
        let outcome = from.recv().unwrap().unwrap();
        assert_eq!(outcome.downcast_ref::<u32>(), Some(&7));
        pool.close();
    }
}
