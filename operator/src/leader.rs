//! Leader election by a Lease, so that usually one operator acts.
//!
//! Invariant: safety does not rest on this: every write is guarded by a resourceVersion. The lease of another is taken
//! over only when it has not changed for its whole duration *by our own clock*; clocks of others are not compared.

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::PostParams;
use kube::{Api, Client};
use rand::Rng;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Name of the Lease.
pub const LEASE: &str = "mars-operator";

/// Who competes, and how fast.
#[derive(Debug, Clone)]
pub struct Election {
    /// Namespace of the Lease.
    pub namespace: String,
    /// Who we are; unique among competitors.
    pub identity: String,
    /// How long a lease lasts without renewal.
    pub duration: Duration,
}

/// A competitor.
pub struct Candidate {
    api: Api<Lease>,
    election: Election,
    /// The lease as last seen, and since when it looks like that.
    seen: Option<(Option<String>, Instant)>,
}

impl Candidate {
    /// Competes in `election`.
    #[must_use]
    pub fn new(client: Client, election: Election) -> Self {
        Candidate {
            api: Api::namespaced(client, &election.namespace),
            election,
            seen: None,
        }
    }

    /// Waits until we lead, or until cancelled (`false`).
    pub async fn acquire(&mut self, cancel: &CancellationToken) -> bool {
        loop {
            match self.try_hold().await {
                Ok(true) => return true,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "the lease cannot be read or written"),
            }
            if !self.pause(cancel).await {
                return false;
            }
        }
    }

    /// Renews until the lease is lost or we are cancelled. Gives the lease up in the latter case.
    pub async fn hold(&mut self, cancel: &CancellationToken) {
        let mut renewed = Instant::now();
        while self.pause(cancel).await {
            let limit = self.election.duration.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(limit, self.try_hold()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => {
                    tracing::warn!("another operator leads now");
                    return;
                }
                Ok(Err(error)) => tracing::warn!(%error, "the lease could not be renewed"),
                Err(_) => {}
            }
            if renewed.elapsed() >= self.election.duration {
                tracing::warn!("the lease has run out: stops deciding");
                return;
            }
        }
        if let Err(error) = self.give_up().await {
            tracing::debug!(%error, "the lease could not be given up; it runs out by itself");
        }
    }

    /// A third of the duration, with jitter. `false`: cancelled.
    async fn pause(&self, cancel: &CancellationToken) -> bool {
        let third = self.election.duration / 3;
        let jitter = rand::rng().random_range(0.8..1.0);
        tokio::select! {
            () = cancel.cancelled() => false,
            () = tokio::time::sleep(third.mul_f64(jitter)) => true,
        }
    }

    async fn try_hold(&mut self) -> Result<bool, kube::Error> {
        let Some(present) = self.api.get_opt(LEASE).await? else {
            return self.write(Lease::default(), true).await;
        };
        let spec = present.spec.clone().unwrap_or_default();
        let holder = spec.holder_identity.clone().unwrap_or_default();
        if holder == self.election.identity || holder.is_empty() || self.has_run_out(&present, &spec) {
            return self.write(present, false).await;
        }
        Ok(false)
    }

    fn has_run_out(&mut self, present: &Lease, spec: &LeaseSpec) -> bool {
        let version = present.metadata.resource_version.clone();
        let seconds = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        let duration = seconds.map_or(self.election.duration, Duration::from_secs);
        match &self.seen {
            Some((seen, since)) if *seen == version => since.elapsed() >= duration,
            _ => {
                self.seen = Some((version, Instant::now()));
                false
            }
        }
    }

    /// Guarded by the resourceVersion in `lease`.
    async fn write(&mut self, mut lease: Lease, create: bool) -> Result<bool, kube::Error> {
        let now = Some(MicroTime(Timestamp::now()));
        let mut spec = lease.spec.take().unwrap_or_default();
        if spec.holder_identity.as_deref() != Some(&self.election.identity) {
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0) + 1);
            spec.acquire_time.clone_from(&now);
        }
        spec.holder_identity = Some(self.election.identity.clone());
        spec.lease_duration_seconds = i32::try_from(self.election.duration.as_secs()).ok();
        spec.renew_time = now;
        lease.spec = Some(spec);
        lease.metadata.name = Some(LEASE.to_owned());
        let written = if create {
            self.api.create(&PostParams::default(), &lease).await
        } else {
            self.api.replace(LEASE, &PostParams::default(), &lease).await
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.is_conflict() || status.is_already_exists() => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn give_up(&self) -> Result<(), kube::Error> {
        let Some(mut lease) = self.api.get_opt(LEASE).await? else {
            return Ok(());
        };
        let Some(spec) = &mut lease.spec else { return Ok(()) };
        if spec.holder_identity.as_deref() == Some(&self.election.identity) {
            spec.holder_identity = None;
            self.api.replace(LEASE, &PostParams::default(), &lease).await?;
        }
        Ok(())
    }
}
