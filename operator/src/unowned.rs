//! Actions whose resource does not exist: they end, so that none of them waits for a resource that somebody makes later.
//!
//! Invariant: an action fails here only after this process has missed its resource for the whole grace time by its own clock, and the
//! API server has then said that there is none. The write is guarded by what was read with that.

use kube::api::PostParams;
use kube::{Api, Client};
use mars_crds::{MarsAction, MarsResource};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::apply::{FIELD_MANAGER, guarded};
use crate::cache::{Cache, Kind, resource_of};
use crate::events::Recorder;
use crate::plan::actions;

/// The cache was behind, or somebody else has written: look again.
const SOON: Duration = Duration::from_millis(200);
/// Longest time until finished actions are looked at again.
const LONG: Duration = Duration::from_mins(10);

/// Since when resources of actions are missed, by the uid of the action.
#[derive(Debug, Default)]
pub(crate) struct Missed {
    since: Mutex<BTreeMap<String, Instant>>,
}

impl Missed {
    fn since(&self, uid: &str) -> Instant {
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        *since.entry(uid.to_owned()).or_insert_with(Instant::now)
    }

    /// Forgets actions that are gone.
    pub(crate) fn retain(&self, cache: &Cache) {
        let uids: Vec<_> = cache
            .list(Kind::Action)
            .iter()
            .filter_map(|action| action.metadata.uid.clone())
            .collect();
        let mut since = self.since.lock().unwrap_or_else(PoisonError::into_inner);
        since.retain(|uid, _| uids.contains(uid));
    }
}

/// One pass over the actions of a resource that the cache does not know. Says when to look again.
pub(crate) async fn pass(
    (client, recorder): (&Client, &Recorder),
    cache: &Cache,
    missed: &Missed,
    resource: &str,
    grace: Duration,
) -> Result<Option<Duration>, kube::Error> {
    let mut next = None;
    for object in cache.list(Kind::Action) {
        if resource_of(&object).as_deref() != Some(resource) {
            continue;
        }
        let Ok(action) = object.as_ref().clone().try_parse::<MarsAction>() else {
            continue;
        };
        let wait = if actions::is_finished(&action) {
            expire(client, &action).await?
        } else {
            let since = missed.since(action.metadata.uid.as_deref().unwrap_or_default());
            match grace.checked_sub(since.elapsed()).filter(|left| !left.is_zero()) {
                Some(left) => left,
                None => fail(client, recorder, &action).await?,
            }
        };
        next = Some(next.map_or(wait, |next: Duration| next.min(wait)));
    }
    Ok(next)
}

/// Ends an action after asking the API server once more for everything.
async fn fail(client: &Client, recorder: &Recorder, cached: &MarsAction) -> Result<Duration, kube::Error> {
    let resources: Api<MarsResource> = Api::all(client.clone());
    if resources.get_metadata_opt(&cached.spec.resource).await?.is_some() {
        return Ok(SOON);
    }
    let api: Api<MarsAction> = Api::all(client.clone());
    let name = actions::name(cached);
    let Some(mut action) = api.get_opt(name).await? else {
        return Ok(SOON);
    };
    if action.metadata.uid != cached.metadata.uid || actions::is_finished(&action) {
        return Ok(SOON);
    }
    let status = actions::without_resource(&action, jiff::Timestamp::now());
    let note = actions::verdict(&action, &status);
    action.status = Some(status);
    let post = PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    };
    match api.replace_status(name, &post, &action).await {
        Ok(_) => {
            tracing::info!(action = name, resource = action.spec.resource, "{}", note.message);
            recorder.emit(&action, &note).await;
            Ok(SOON)
        }
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(SOON),
        Err(error) => Err(error),
    }
}

/// Deletes a finished action whose time is over.
async fn expire(client: &Client, action: &MarsAction) -> Result<Duration, kube::Error> {
    let status = action.status.clone().unwrap_or_default();
    let left = actions::expires_in(&status, action, jiff::Timestamp::now()).unwrap_or(i64::MAX);
    if left > 0 || action.metadata.deletion_timestamp.is_some() {
        let left = Duration::from_secs(u64::try_from(left).unwrap_or_default());
        return Ok(left.clamp(SOON, LONG));
    }
    let api: Api<MarsAction> = Api::all(client.clone());
    match api.delete(actions::name(action), &guarded(&action.metadata)).await {
        Ok(_) => Ok(LONG),
        Err(kube::Error::Api(status)) if status.is_conflict() || status.is_not_found() => Ok(SOON),
        Err(error) => Err(error),
    }
}
