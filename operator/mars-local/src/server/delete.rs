//! Deleting: preconditions, finalizers, propagation.
//!
//! Invariant: an object with finalizers is only marked; it goes with the last one. Namespaces and definitions go after
//! what is in them.

use super::read::key;
use super::respond::Answer;
use super::{Api, Incoming, Target};
use crate::error::ApiError;
use crate::meta;
use crate::registry::{CRD_STORAGE, Kind};
use crate::selector::Selector;
use crate::storage::{Committed, Decision, Key};
use axum::http::StatusCode;
use serde_json::{Value, json};

/// Finalizer that holds an owner until its dependents are gone.
pub(crate) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer that holds an owner until its dependents have forgotten it.
pub(crate) const ORPHAN: &str = "orphan";
/// Finalizer that holds a definition until its objects are gone.
pub(crate) const CLEANUP: &str = "customresourcecleanup.apiextensions.k8s.io";
/// Namespaces a cluster cannot be without.
const PROTECTED: [&str; 3] = ["default", "kube-system", "kube-node-lease"];
/// Group whose definitions belong to this program.
const OWN_GROUP: &str = "mars.storage";

/// What happens to dependents.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Propagation {
    Background,
    Foreground,
    Orphan,
}

/// Parsed `DeleteOptions`.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) propagation: Propagation,
    pub(crate) uid: String,
    pub(crate) resource_version: String,
    pub(crate) dry_run: bool,
}

impl Options {
    pub(crate) fn background() -> Self {
        Self {
            propagation: Propagation::Background,
            uid: String::new(),
            resource_version: String::new(),
            dry_run: false,
        }
    }

    fn of(incoming: &Incoming) -> Result<Self, ApiError> {
        let body: Value = if incoming.body.is_empty() {
            json!({})
        } else {
            serde_json::from_slice(&incoming.body)
                .map_err(|e| ApiError::bad_request(format!("reading DeleteOptions: {e}")))?
        };
        let word = match meta::text(&body, &["propagationPolicy"]) {
            "" => incoming.query.text("propagationPolicy"),
            word => word,
        };
        let propagation = match word {
            "" if body["orphanDependents"] == json!(true) => Propagation::Orphan,
            "" | "Background" => Propagation::Background,
            "Foreground" => Propagation::Foreground,
            "Orphan" => Propagation::Orphan,
            other => {
                return Err(ApiError::bad_request(format!(
                    "propagationPolicy: Unsupported value: {other:?}: supported values: \"Background\", \"Foreground\", \"Orphan\""
                )));
            }
        };
        let dry_run = incoming.query.dry_run()? || body["dryRun"] == json!(["All"]);
        Ok(Self {
            propagation,
            uid: meta::text(&body, &["preconditions", "uid"]).to_owned(),
            resource_version: meta::text(&body, &["preconditions", "resourceVersion"]).to_owned(),
            dry_run,
        })
    }
}

impl Api {
    pub(super) fn delete(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Answer, ApiError> {
        if target.subresource.is_some() {
            return Err(ApiError::method_not_allowed());
        }
        let options = Options::of(incoming)?;
        let key = key(kind, target);
        let (object, gone) = self.delete_key(kind, &key, &options)?;
        if !gone {
            return Ok(Answer::value(StatusCode::OK, object));
        }
        let mut details = json!({"name": &*key.name, "kind": kind.plural, "uid": meta::uid(&object)});
        if !kind.group.is_empty() {
            details["group"] = kind.group.clone().into();
        }
        Ok(Answer::plain(
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details}),
        ))
    }

    /// Deletes one object, or marks it; returns its state and whether it is gone.
    pub(crate) fn delete_key(&self, kind: &Kind, key: &Key, options: &Options) -> Result<(Value, bool), ApiError> {
        let subject = kind.subject(&key.name);
        if *kind.storage == *"core/namespaces" && PROTECTED.contains(&&*key.name) {
            return Err(ApiError::forbidden(&subject, "this namespace may not be deleted"));
        }
        if *kind.storage == *CRD_STORAGE && key.name.ends_with(&format!(".{OWN_GROUP}")) {
            return Err(ApiError::forbidden(
                &subject,
                "mars-local cannot be without this definition; delete its objects instead",
            ));
        }
        let decide = |current: Option<&std::sync::Arc<crate::storage::Object>>| -> Result<Decision, ApiError> {
            let old = &current.ok_or_else(|| ApiError::not_found(&subject))?.value;
            check(kind, old, options)?;
            Ok(mark(kind, old, options.propagation))
        };
        if options.dry_run {
            let current = self.store.get(key);
            let gone = matches!(decide(current.as_ref())?, Decision::Remove(_));
            return Ok((current.map(|c| c.value.clone()).unwrap_or_default(), gone));
        }
        let committed = self.store.transact(key, decide)?;
        self.definitions_changed(&committed)?;
        Ok(match committed {
            Committed::Removed(object) => (object.value.clone(), true),
            Committed::Stored(object) | Committed::Unchanged(Some(object)) => (object.value.clone(), false),
            Committed::Unchanged(None) => return Err(ApiError::not_found(&subject)),
        })
    }

    pub(super) fn delete_collection(
        &self,
        incoming: &Incoming,
        kind: &Kind,
        target: &Target,
    ) -> Result<Answer, ApiError> {
        let options = Options::of(incoming)?;
        let query = &incoming.query;
        let selector = Selector::parse(kind, query.text("labelSelector"), query.text("fieldSelector"))?;
        let (list, revision) = self.store.list(&kind.storage, target.namespace.as_deref());
        let mut items = Vec::new();
        for object in list.iter().filter(|o| selector.matches(&o.value)) {
            let key = Key {
                kind: kind.storage.clone(),
                namespace: meta::namespace(&object.value).into(),
                name: meta::name(&object.value).into(),
            };
            match self.delete_key(kind, &key, &options) {
                Ok((value, _)) => items.push(kind.show(&value)),
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Answer::plain(
            json!({"kind": kind.list_kind(), "apiVersion": kind.api_version(),
            "metadata": {"resourceVersion": revision.to_string()}, "items": items}),
        ))
    }
}

fn check(kind: &Kind, old: &Value, options: &Options) -> Result<(), ApiError> {
    let subject = kind.subject(meta::name(old));
    let wrong = |what: &str, given: &str, current: &str| {
        let why = format!(
            "the {what} in the precondition ({given}) does not match the {what} in record ({current}). The object might have been deleted and then recreated"
        );
        Err(ApiError::conflict(&subject, &why))
    };
    if !options.uid.is_empty() && options.uid != meta::uid(old) {
        return wrong("UID", &options.uid, meta::uid(old));
    }
    if !options.resource_version.is_empty() && options.resource_version != meta::resource_version(old) {
        return wrong(
            "ResourceVersion",
            &options.resource_version,
            meta::resource_version(old),
        );
    }
    Ok(())
}

/// The object removed, or marked with what holds it.
fn mark(kind: &Kind, old: &Value, propagation: Propagation) -> Decision {
    let mut finalizers: Vec<&str> = meta::finalizers(old)
        .into_iter()
        .filter(|f| !matches!(*f, FOREGROUND | ORPHAN))
        .collect();
    match propagation {
        Propagation::Background => {}
        Propagation::Foreground => finalizers.push(FOREGROUND),
        Propagation::Orphan => finalizers.push(ORPHAN),
    }
    let is_namespace = *kind.storage == *"core/namespaces";
    if *kind.storage == *CRD_STORAGE && !finalizers.contains(&CLEANUP) {
        finalizers.push(CLEANUP);
    }
    if finalizers.is_empty() && !is_namespace {
        return Decision::Remove(old.clone());
    }
    let mut new = old.clone();
    meta::set(
        &mut new,
        "finalizers",
        (!finalizers.is_empty()).then(|| json!(finalizers)),
    );
    if !meta::is_deleting(old) {
        meta::set(&mut new, "deletionTimestamp", Some(meta::now().into()));
        meta::set(&mut new, "deletionGracePeriodSeconds", Some(0.into()));
        if kind.has_generation {
            meta::set(&mut new, "generation", Some((meta::generation(old) + 1).into()));
        }
    }
    if is_namespace {
        meta::object_mut(&mut new).insert("status".into(), json!({"phase": "Terminating"}));
    }
    if new == *old {
        Decision::Keep
    } else {
        Decision::Put(new)
    }
}
