//! The loop: watches feed a cache and a queue, workers take names from the queue and make passes.
//!
//! Invariant: a pass plans from the cache; when that asks for a decision it plans again from a fresh observation and only
//! then writes. A pass that fails is tried again with growing, jittered delays and never stops the others.

use jiff::Timestamp;
use kube::Client;
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::apply::{Outcome, Writer};
use crate::cache::{Cache, Kind, follow};
use crate::events::Recorder;
use crate::hearing::Hearing;
use crate::observe::{self, ObserveError, Surroundings};
use crate::plan::{EventNote, Intent, Severity, plan};
use crate::queue::Queue;
use crate::silence;
use crate::unowned::{self, Missed};
use crate::world::{Settings, World};

/// A pass that takes longer has lost its API server.
const PASS_LIMIT: Duration = Duration::from_mins(1);
/// Longest time spent on telling which nodes are silent.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// Longest delay between tries.
const LONGEST_RETRY: Duration = Duration::from_mins(1);

/// Everything the workers share.
pub(crate) struct Controller {
    client: Client,
    cache: Arc<Cache>,
    hearing: Arc<Hearing>,
    queue: Arc<Queue>,
    recorder: Recorder,
    settings: Settings,
    memory: Mutex<BTreeMap<String, Memory>>,
    missed: Missed,
}

/// What is remembered about a resource between passes; losing it costs nothing but a few writes.
#[derive(Debug, Clone, Default)]
struct Memory {
    positions_written: Option<Timestamp>,
    failures: u32,
}

impl Controller {
    pub(crate) fn new(client: Client, identity: String, settings: Settings) -> Self {
        Controller {
            recorder: Recorder::new(client.clone(), identity),
            client,
            cache: Arc::default(),
            hearing: Arc::default(),
            queue: Arc::default(),
            settings,
            memory: Mutex::default(),
            missed: Missed::default(),
        }
    }

    /// Runs until cancelled; returns when everything has stopped.
    pub(crate) async fn run(self, workers: usize, resync: Duration, cancel: CancellationToken) {
        let tracker = TaskTracker::new();
        for kind in Kind::ALL {
            let (cache, hearing, queue) = (self.cache.clone(), self.hearing.clone(), self.queue.clone());
            tracker.spawn(follow(kind, self.client.clone(), cache, hearing, queue, cancel.clone()));
        }
        let controller = Arc::new(self);
        tracker.spawn(controller.clone().resync(resync, cancel.clone()));
        for _ in 0..workers.max(1) {
            tracker.spawn(controller.clone().work(cancel.clone()));
        }
        tracker.close();
        tracker.wait().await;
    }

    /// Silence is not an event: every resource is looked at regularly.
    async fn resync(self: Arc<Self>, every: Duration, cancel: CancellationToken) {
        loop {
            tokio::select! {
                () = cancel.cancelled() => return,
                () = tokio::time::sleep(every) => {}
            }
            let names = self.cache.names(Kind::Resource);
            self.lock().retain(|name, _| names.contains(name));
            self.missed.retain(&self.cache);
            self.tell_silence().await;
            for name in &names {
                self.queue.add(name);
            }
        }
    }

    /// Nothing may hold up the periodic passes: what takes long is tried again.
    async fn tell_silence(&self) {
        if !self.cache.is_complete() {
            return;
        }
        let pass = silence::pass(&self.client, &self.recorder, &self.cache, &self.hearing, &self.settings);
        if tokio::time::timeout(SILENCE_LIMIT, pass).await.is_err() {
            tracing::debug!("the API server has not answered in time: silence of nodes is written later");
        }
    }

    async fn work(self: Arc<Self>, cancel: CancellationToken) {
        loop {
            let name = tokio::select! {
                () = cancel.cancelled() => return,
                name = self.queue.next() => name,
            };
            let result = tokio::select! {
                () = cancel.cancelled() => return,
                result = tokio::time::timeout(PASS_LIMIT, self.pass(&name)) => result,
            };
            let delay = match result {
                Ok(Ok(delay)) => {
                    self.remember(&name, |memory| memory.failures = 0);
                    delay
                }
                Ok(Err(error)) => Some(self.after_failure(&name, &error.to_string())),
                Err(_) => Some(self.after_failure(&name, "the API server has not answered in time")),
            };
            self.queue.done(&name);
            if let Some(delay) = delay {
                self.queue.add_after(&name, delay);
            }
        }
    }

    fn after_failure(&self, name: &str, error: &str) -> Duration {
        let failures = self.remember(name, |memory| {
            memory.failures = memory.failures.saturating_add(1);
            memory.failures
        });
        let delay = Duration::from_millis(250)
            .saturating_mul(1 << failures.min(8))
            .min(LONGEST_RETRY);
        let delay = delay.mul_f64(rand::rng().random_range(0.5..1.0));
        tracing::warn!(resource = name, error, ?delay, "the pass failed and is tried again");
        delay
    }

    /// One pass; says when to look again.
    async fn pass(&self, name: &str) -> Result<Option<Duration>, kube::Error> {
        if !self.cache.is_complete() {
            return Ok(Some(Duration::from_millis(200)));
        }
        let around = Surroundings {
            hearing: self.hearing.clone(),
            settings: self.settings.clone(),
            positions_written: self.remember(name, |memory| memory.positions_written),
        };
        let world = match observe::cached(&self.cache, &around, name) {
            Ok(Some(world)) => world,
            Ok(None) => return self.without_resource(name).await,
            Err(ObserveError::Api(error)) => return Err(error),
            Err(error @ ObserveError::Undecodable(_)) => return Ok(self.cannot_read(name, &error).await),
        };
        let mut new_id = Uuid::new_v4;
        let first = plan(&world, &mut new_id);
        if !first.intents.contains(&Intent::Reobserve) {
            return self.carry_out(&world, &first.intents, first.requeue_seconds).await;
        }
        match observe::fresh(&self.client, &around, name).await {
            Ok(Some(world)) => {
                let second = plan(&world, &mut new_id);
                self.carry_out(&world, &second.intents, second.requeue_seconds).await
            }
            Ok(None) => Ok(None),
            Err(ObserveError::Api(error)) => Err(error),
            Err(error @ ObserveError::Undecodable(_)) => Ok(self.cannot_read(name, &error).await),
        }
    }

    async fn without_resource(&self, name: &str) -> Result<Option<Duration>, kube::Error> {
        let grace = Duration::from_secs(u64::try_from(self.settings.action_grace_seconds).unwrap_or_default());
        let api = (&self.client, &self.recorder);
        unowned::pass(api, &self.cache, &self.missed, name, grace).await
    }

    async fn carry_out(
        &self,
        world: &World,
        intents: &[Intent],
        requeue_seconds: i64,
    ) -> Result<Option<Duration>, kube::Error> {
        let outcome = Writer::new(&self.client, &self.recorder, world).apply(intents).await?;
        if outcome == Outcome::Conflict {
            return Ok(Some(Duration::from_millis(rand::rng().random_range(20..200))));
        }
        if intents.iter().any(|intent| matches!(intent, Intent::SetStatus(_))) {
            self.remember(world.name(), |memory| memory.positions_written = Some(world.now));
        }
        Ok(Some(Duration::from_secs(u64::try_from(requeue_seconds).unwrap_or(30))))
    }

    async fn cannot_read(&self, name: &str, error: &ObserveError) -> Option<Duration> {
        tracing::warn!(resource = name, %error, "passed over");
        if let Some(object) = self.cache.get(Kind::Resource, name) {
            let mut shell = mars_crds::MarsResource::new(name, mars_crds::MarsResourceSpec::default());
            shell.metadata = object.metadata.clone();
            let note = EventNote {
                severity: Severity::Warning,
                reason: "Undecodable".to_owned(),
                message: error.to_string(),
            };
            self.recorder.emit(&shell, &note).await;
        }
        Some(LONGEST_RETRY)
    }

    fn remember<T>(&self, name: &str, with: impl FnOnce(&mut Memory) -> T) -> T {
        with(self.lock().entry(name.to_owned()).or_default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Memory>> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
