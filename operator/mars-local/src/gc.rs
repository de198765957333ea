//! What a controller manager would do: dependents of deleted owners, contents of deleted namespaces and definitions,
//! expired Events.
//!
//! Invariant: an object goes only when EVERY owner it names is provably absent (its kind is served here and no object has
//! that uid); an owner of an unknown kind counts as present.

use crate::error::ApiError;
use crate::meta;
use crate::registry::{CRD_STORAGE, Registry};
use crate::server::{Api, CLEANUP, DeleteOptions, FOREGROUND, ORPHAN, Propagation};
use crate::storage::{Decision, Key, Object};
use serde_json::{Value, json};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// How long Events are kept, as the real API server does.
const EVENT_SECONDS: i64 = 3_600;
/// Most Events kept, the oldest go first: a loop that emits Events must not fill the disk.
const MOST_EVENTS: usize = 5_000;
/// Longest time between two rounds.
const ROUND: Duration = Duration::from_secs(30);
/// Changes that come together are handled together.
const GATHER: Duration = Duration::from_millis(20);

/// Runs until the API stops. Rounds follow changes.
pub async fn run(api: Arc<Api>) {
    let mut revisions = api.store.subscribe();
    loop {
        let worker = Arc::clone(&api);
        let _ = tokio::task::spawn_blocking(move || round(&worker)).await;
        tokio::select! {
            () = api.stop.cancelled() => return,
            changed = revisions.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(ROUND) => {}
        }
        tokio::time::sleep(GATHER).await;
        revisions.mark_unchanged();
    }
}

type Row = (Key, Arc<Object>);

/// One look at everything.
fn round(api: &Api) {
    let all = api.store.all();
    let registry = api.registry();
    let uids: HashSet<&str> = all.iter().map(|(_, o)| meta::uid(&o.value)).collect();
    for (key, object) in &all {
        let outcome = if meta::is_deleting(&object.value) {
            finish_deletion(api, &registry, &all, key, &object.value)
        } else if is_garbage(&registry, &uids, &object.value) {
            delete(api, &registry, key, meta::uid(&object.value), Propagation::Background)
        } else {
            Ok(())
        };
        if let Err(error) = outcome
            && !matches!(error.code, 404 | 409)
        {
            tracing::warn!(kind = %key.kind, name = %key.name, %error, "collecting garbage; trying again after the next change");
        }
    }
    expire_events(api, &registry, &all);
}

fn is_garbage(registry: &Registry, uids: &HashSet<&str>, object: &Value) -> bool {
    let owners = meta::owners(object);
    let absent = |owner: &Value| {
        registry
            .by_kind(meta::text(owner, &["apiVersion"]), meta::text(owner, &["kind"]))
            .is_some()
            && !uids.contains(meta::text(owner, &["uid"]))
    };
    !owners.is_empty() && owners.iter().all(absent)
}

fn delete(api: &Api, registry: &Registry, key: &Key, uid: &str, propagation: Propagation) -> Result<(), ApiError> {
    let Some(kind) = registry.by_storage(&key.kind) else {
        return Ok(());
    };
    let options = DeleteOptions {
        propagation,
        uid: uid.to_owned(),
        ..DeleteOptions::background()
    };
    api.delete_key(&kind, key, &options).map(drop)
}

/// Does what the finalizers of this server wait for.
fn finish_deletion(api: &Api, registry: &Registry, all: &[Row], key: &Key, object: &Value) -> Result<(), ApiError> {
    let uid = meta::uid(object);
    let dependents = || {
        all.iter()
            .filter(|(_, o)| meta::owners(&o.value).iter().any(|w| w["uid"] == uid))
    };
    if *key.kind == *"core/namespaces" {
        let inside: Vec<&Row> = all.iter().filter(|(k, _)| k.namespace == key.name).collect();
        for (key, object) in &inside {
            if !meta::is_deleting(&object.value) {
                delete(api, registry, key, meta::uid(&object.value), Propagation::Background)?;
            }
        }
        return if inside.is_empty() {
            release(api, key, uid, None)
        } else {
            Ok(())
        };
    }
    for finalizer in meta::finalizers(object) {
        match finalizer {
            FOREGROUND => {
                let mut blocked = false;
                for (key, dependent) in dependents() {
                    let owner = meta::owners(&dependent.value).iter().find(|w| w["uid"] == uid);
                    blocked |= owner.is_some_and(|w| w["blockOwnerDeletion"] == json!(true));
                    if !meta::is_deleting(&dependent.value) {
                        delete(api, registry, key, meta::uid(&dependent.value), Propagation::Foreground)?;
                    }
                }
                if !blocked {
                    release(api, key, uid, Some(FOREGROUND))?;
                }
            }
            ORPHAN => {
                for (key, _) in dependents() {
                    forget_owner(api, key, uid)?;
                }
                release(api, key, uid, Some(ORPHAN))?;
            }
            CLEANUP if *key.kind == *CRD_STORAGE => {
                let storage = format!(
                    "{}/{}",
                    meta::text(object, &["spec", "group"]),
                    meta::text(object, &["spec", "names", "plural"])
                );
                let inside: Vec<&Row> = all.iter().filter(|(k, _)| *k.kind == *storage).collect();
                for (key, object) in &inside {
                    if !meta::is_deleting(&object.value) {
                        delete(api, registry, key, meta::uid(&object.value), Propagation::Background)?;
                    }
                }
                if inside.is_empty() {
                    release(api, key, uid, Some(CLEANUP))?;
                }
            }
            _ => {}
        }
    }
    Ok(())
}

/// Takes a finalizer away (or none, for namespaces); with the last one the object goes.
fn release(api: &Api, key: &Key, uid: &str, finalizer: Option<&str>) -> Result<(), ApiError> {
    let committed = api.store.transact(key, |current| {
        let Some(current) = current.filter(|c| meta::uid(&c.value) == uid) else {
            return Ok(Decision::Keep);
        };
        let mut new = current.value.clone();
        let rest: Vec<&str> = meta::finalizers(&current.value)
            .into_iter()
            .filter(|f| Some(*f) != finalizer)
            .collect();
        meta::set(&mut new, "finalizers", (!rest.is_empty()).then(|| json!(rest)));
        Ok::<_, ApiError>(if rest.is_empty() {
            Decision::Remove(new)
        } else {
            Decision::Put(new)
        })
    })?;
    api.definitions_changed(&committed)
}

fn forget_owner(api: &Api, key: &Key, uid: &str) -> Result<(), ApiError> {
    api.store.transact(key, |current| {
        let Some(current) = current else {
            return Ok(Decision::Keep);
        };
        let mut new = current.value.clone();
        let rest: Vec<Value> = meta::owners(&current.value)
            .iter()
            .filter(|w| w["uid"] != uid)
            .cloned()
            .collect();
        meta::set(
            &mut new,
            "ownerReferences",
            (!rest.is_empty()).then_some(Value::Array(rest)),
        );
        Ok::<_, ApiError>(Decision::Put(new))
    })?;
    Ok(())
}

fn expire_events(api: &Api, registry: &Registry, all: &[Row]) {
    let mut events: Vec<&Row> = all.iter().filter(|(key, _)| *key.kind == *"core/events").collect();
    // The newest write is what counts: a repeated Event is patched, not made anew.
    events.sort_by_key(|(_, object)| object.revision);
    let surplus = events.len().saturating_sub(MOST_EVENTS);
    let now = jiff::Timestamp::now();
    for (i, (key, object)) in events.iter().enumerate() {
        let times = [
            &["series", "lastObservedTime"][..],
            &["lastTimestamp"],
            &["metadata", "creationTimestamp"],
        ];
        let last = times
            .iter()
            .filter_map(|path| meta::text(&object.value, path).parse::<jiff::Timestamp>().ok())
            .max();
        let old = last.is_some_and(|last| now.duration_since(last).as_secs() > EVENT_SECONDS);
        if old || i < surplus {
            let _ = delete(api, registry, key, meta::uid(&object.value), Propagation::Background);
        }
    }
}
