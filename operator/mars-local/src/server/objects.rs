//! Writing: create, update, patch, apply – each decided and stored in one transaction on the object.
//!
//! Invariant: what a write is based on cannot change under it: reading the current version, checking the caller's
//! resourceVersion and storing the new one happen under the store's write lock.

use super::read::key;
use super::respond::Answer;
use super::{Api, Incoming, Target, protobuf};
use crate::apply::{Manager, apply, record_update};
use crate::error::ApiError;
use crate::meta;
use crate::patch::Patch;
use crate::registry::{Kind, kinds_of_crd};
use crate::storage::{Committed, Decision, DiskError, Key};
use crate::strategy::{self, FieldValidation};
use axum::http::StatusCode;
use serde_json::Value;

impl From<DiskError> for ApiError {
    fn from(error: DiskError) -> Self {
        Self::internal(error)
    }
}

/// How to write, from the query.
struct Options {
    dry_run: bool,
    validation: FieldValidation,
    manager: String,
    force: bool,
}

impl Options {
    fn of(incoming: &Incoming) -> Result<Self, ApiError> {
        Ok(Self {
            dry_run: incoming.query.dry_run()?,
            validation: FieldValidation::parse(incoming.query.text("fieldValidation"))?,
            manager: incoming.manager(),
            force: incoming.query.flag("force"),
        })
    }
}

/// What a transaction came to: an answer for dry runs is computed, not stored.
enum Written {
    Real(Committed),
    Dry(Value),
}

fn manager<'a>(kind: &Kind, name: &'a str, api_version: &'a str, status: bool) -> Manager<'a> {
    Manager {
        name,
        api_version,
        status,
        has_status: kind.has_status,
    }
}

/// A body as JSON; YAML is read too, and the protobuf form of the few kinds that kubectl creates that way.
fn parse_body(incoming: &Incoming) -> Result<Value, ApiError> {
    match incoming.content_type() {
        "" | "application/json" => serde_json::from_slice(&incoming.body)
            .map_err(|e| ApiError::bad_request(format!("the body of the request is no JSON: {e}"))),
        "application/yaml" | "application/apply-patch+yaml" => serde_yaml::from_slice(&incoming.body)
            .map_err(|e| ApiError::bad_request(format!("error decoding YAML: {e}"))),
        protobuf::MEDIA_TYPE => protobuf::decode(&incoming.body)
            .map_err(|e| ApiError::bad_request(format!("the protobuf body of the request cannot be read: {e}"))),
        other => {
            let supported = "application/json, application/yaml";
            Err(ApiError::unsupported_media_type(other, supported))
        }
    }
}

impl Api {
    pub(super) fn create(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Answer, ApiError> {
        let options = Options::of(incoming)?;
        let mut object = parse_body(incoming)?;
        let namespace = target.namespace.clone().unwrap_or_default();
        if kind.namespaced && namespace.is_empty() {
            return Err(ApiError::method_not_allowed());
        }
        strategy::check_identity(kind, &mut object, &namespace, None)?;
        if !meta::resource_version(&object).is_empty() {
            return Err(ApiError::bad_request(
                "resourceVersion should not be set on objects to be created",
            ));
        }
        let warnings = strategy::prune(kind, &mut object, options.validation)?;
        let new = self.ready_to_create(kind, object, &options)?;
        let target = Target {
            name: Some(meta::name(&new).to_owned()),
            ..target.clone()
        };
        let key = key(kind, &target);
        let subject = kind.subject(&key.name);
        let written = self.write(&key, options.dry_run, |current| match current {
            Some(_) => Err(ApiError::already_exists(&subject)),
            None => Ok(Decision::Put(new)),
        })?;
        let mut answer = self.answer(kind, StatusCode::CREATED, written)?;
        answer.warnings = warnings;
        Ok(answer)
    }

    /// A pruned object as it will be stored: server's fields, defaults, validation, ownership.
    fn ready_to_create(&self, kind: &Kind, mut object: Value, options: &Options) -> Result<Value, ApiError> {
        kind.store(&mut object);
        strategy::prepare_create(kind, &mut object);
        self.check_namespace(kind, &object)?;
        strategy::validate(kind, None, &object, &self.admission)?;
        let api_version = kind.api_version();
        record_update(
            None,
            &mut object,
            &kind.schema,
            &manager(kind, &options.manager, &api_version, false),
        );
        Ok(object)
    }

    /// Objects go into namespaces that exist and stay.
    fn check_namespace(&self, kind: &Kind, object: &Value) -> Result<(), ApiError> {
        if !kind.namespaced {
            return Ok(());
        }
        let name = meta::namespace(object);
        let key = Key {
            kind: "core/namespaces".into(),
            namespace: "".into(),
            name: name.into(),
        };
        let Some(namespace) = self.store.get(&key) else {
            let subject = crate::error::Subject {
                group: String::new(),
                resource: "namespaces".into(),
                name: name.into(),
            };
            return Err(ApiError::not_found(&subject));
        };
        if meta::is_deleting(&namespace.value) {
            let why = format!("unable to create new content in namespace {name} because it is being terminated");
            return Err(ApiError::forbidden(&kind.subject(meta::name(object)), &why));
        }
        Ok(())
    }

    pub(super) fn update(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Answer, ApiError> {
        let options = Options::of(incoming)?;
        let mut object = parse_body(incoming)?;
        let namespace = target.namespace.clone().unwrap_or_default();
        strategy::check_identity(kind, &mut object, &namespace, target.name.as_deref())?;
        let warnings = strategy::prune(kind, &mut object, options.validation)?;
        let key = key(kind, target);
        let subject = kind.subject(&key.name);
        let given = meta::resource_version(&object).to_owned();
        if given.is_empty() && !kind.unconditional_update {
            let cause =
                crate::error::Cause::invalid("metadata.resourceVersion", &0.into(), "must be specified for an update");
            if self.store.get(&key).is_some() || !kind.create_on_update {
                return Err(match self.store.get(&key) {
                    Some(_) => ApiError::invalid(&kind.group, &kind.kind, &key.name, &[cause]),
                    None => ApiError::not_found(&subject),
                });
            }
        }
        let mut created = false;
        let written = self.write(&key, options.dry_run, |current| match current {
            Some(current) => {
                kind.store(&mut object);
                self.decide_update(kind, target, &current.value, object, &options)
            }
            None if kind.create_on_update => {
                created = true;
                self.ready_to_create(kind, object, &options).map(Decision::Put)
            }
            None => Err(ApiError::not_found(&subject)),
        })?;
        let code = if created { StatusCode::CREATED } else { StatusCode::OK };
        let mut answer = self.answer(kind, code, written)?;
        answer.warnings = warnings;
        Ok(answer)
    }

    /// What becomes of an object that a client wants to be `new`.
    fn decide_update(
        &self,
        kind: &Kind,
        target: &Target,
        old: &Value,
        new: Value,
        options: &Options,
    ) -> Result<Decision, ApiError> {
        let status_only = target.subresource.as_deref() == Some("status");
        check_preconditions(kind, old, &new)?;
        let mut new = new;
        strategy::prepare_update(kind, old, &mut new, status_only);
        let api_version = kind.api_version();
        record_update(
            Some(old),
            &mut new,
            &kind.schema,
            &manager(kind, &options.manager, &api_version, status_only),
        );
        self.settle(kind, old, new)
    }

    /// Validates a changed object and decides whether it stays, changes or, with its last finalizer, goes.
    fn settle(&self, kind: &Kind, old: &Value, new: Value) -> Result<Decision, ApiError> {
        if new == *old {
            return Ok(Decision::Keep);
        }
        strategy::validate(kind, Some(old), &new, &self.admission)?;
        let is_namespace = *kind.storage == *"core/namespaces";
        if meta::is_deleting(&new) && meta::finalizers(&new).is_empty() && !is_namespace {
            return Ok(Decision::Remove(new));
        }
        Ok(Decision::Put(new))
    }

    pub(super) fn patch(&self, incoming: &Incoming, kind: &Kind, target: &Target) -> Result<Answer, ApiError> {
        let options = Options::of(incoming)?;
        if incoming.content_type() == "application/apply-patch+yaml" {
            return self.apply(incoming, kind, target, &options);
        }
        let patch = Patch::parse(kind, incoming.content_type(), &incoming.body)?;
        let key = key(kind, target);
        let subject = kind.subject(&key.name);
        let mut warnings = Vec::new();
        let written = self.write(&key, options.dry_run, |current| {
            let old = current.ok_or_else(|| ApiError::not_found(&subject))?;
            let mut new = patch.apply(kind, &kind.show(&old.value))?;
            let namespace = target.namespace.clone().unwrap_or_default();
            strategy::check_identity(kind, &mut new, &namespace, target.name.as_deref())?;
            warnings = strategy::prune(kind, &mut new, options.validation)?;
            kind.store(&mut new);
            self.decide_update(kind, target, &old.value, new, &options)
        })?;
        let mut answer = self.answer(kind, StatusCode::OK, written)?;
        answer.warnings = warnings;
        Ok(answer)
    }

    fn apply(&self, incoming: &Incoming, kind: &Kind, target: &Target, options: &Options) -> Result<Answer, ApiError> {
        if incoming.query.text("fieldManager").is_empty() {
            return Err(ApiError::bad_request(
                "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
            ));
        }
        let mut applied = parse_body(incoming)?;
        let namespace = target.namespace.clone().unwrap_or_default();
        strategy::check_identity(kind, &mut applied, &namespace, target.name.as_deref())?;
        if applied.pointer("/metadata/managedFields").is_some_and(|m| !m.is_null()) {
            return Err(ApiError::bad_request("metadata.managedFields must be nil"));
        }
        let warnings = strategy::prune(kind, &mut applied, options.validation)?;
        kind.store(&mut applied);
        let status_only = target.subresource.as_deref() == Some("status");
        let api_version = kind.api_version();
        let who = manager(kind, &options.manager, &api_version, status_only);
        let key = key(kind, target);
        let subject = kind.subject(&key.name);
        let mut created = false;
        let written = self.write(&key, options.dry_run, |current| {
            let Some(current) = current else {
                if status_only || !meta::resource_version(&applied).is_empty() || !meta::uid(&applied).is_empty() {
                    return Err(ApiError::not_found(&subject));
                }
                created = true;
                let mut new = apply(None, &applied, &kind.schema, &who, options.force)?;
                let managed = new.pointer("/metadata/managedFields").cloned();
                strategy::prepare_create(kind, &mut new);
                meta::set(&mut new, "managedFields", managed);
                self.check_namespace(kind, &new)?;
                strategy::validate(kind, None, &new, &self.admission)?;
                return Ok(Decision::Put(new));
            };
            check_preconditions(kind, &current.value, &applied)?;
            let mut new = apply(Some(&current.value), &applied, &kind.schema, &who, options.force)?;
            strategy::prepare_update(kind, &current.value, &mut new, status_only);
            self.settle(kind, &current.value, new)
        })?;
        let code = if created { StatusCode::CREATED } else { StatusCode::OK };
        let mut answer = self.answer(kind, code, written)?;
        answer.warnings = warnings;
        Ok(answer)
    }

    /// Stores what `decide` says, or with `dry_run` only works it out.
    fn write(
        &self,
        key: &Key,
        dry_run: bool,
        decide: impl FnOnce(Option<&std::sync::Arc<crate::storage::Object>>) -> Result<Decision, ApiError>,
    ) -> Result<Written, ApiError> {
        if !dry_run {
            return self.store.transact(key, decide).map(Written::Real);
        }
        let current = self.store.get(key);
        Ok(Written::Dry(match decide(current.as_ref())? {
            Decision::Put(new) | Decision::Remove(new) => new,
            Decision::Keep => current.map(|c| c.value.clone()).unwrap_or_default(),
        }))
    }

    fn answer(&self, kind: &Kind, code: StatusCode, written: Written) -> Result<Answer, ApiError> {
        let object = match written {
            Written::Dry(value) => return Ok(Answer::value(code, value)),
            Written::Real(committed) => {
                self.definitions_changed(&committed)?;
                match committed {
                    Committed::Stored(object) | Committed::Removed(object) | Committed::Unchanged(Some(object)) => {
                        object
                    }
                    Committed::Unchanged(None) => return Err(ApiError::internal(format!("{} vanished", kind.plural))),
                }
            }
        };
        Ok(Answer::stored(code, &object))
    }

    /// Serves, or stops serving, the kinds of a definition that was written.
    pub(crate) fn definitions_changed(&self, committed: &Committed) -> Result<(), ApiError> {
        let is_definition = |o: &Value| meta::text(o, &["kind"]) == "CustomResourceDefinition";
        match committed {
            Committed::Stored(object) if is_definition(&object.value) => {
                let kinds = kinds_of_crd(&object.value).map_err(ApiError::internal)?;
                let (group, plural) = (kinds[0].group.clone(), kinds[0].plural.clone());
                self.change_registry(|registry| {
                    registry.remove(&group, &plural);
                    for kind in kinds {
                        registry.add(kind);
                    }
                });
            }
            Committed::Removed(object) if is_definition(&object.value) => {
                let (group, plural) = (
                    meta::text(&object.value, &["spec", "group"]),
                    meta::text(&object.value, &["spec", "names", "plural"]),
                );
                self.change_registry(|registry| registry.remove(group, plural));
            }
            _ => {}
        }
        Ok(())
    }

    /// Creates an object from inside the process unless it is there; for what every cluster has.
    ///
    /// # Errors
    /// As a create request would fail.
    pub fn ensure(&self, group: &str, plural: &str, object: Value) -> Result<(), ApiError> {
        let kind = self.find_kind(group, plural)?;
        let options = Options {
            dry_run: false,
            validation: FieldValidation::Strict,
            manager: "mars-local".into(),
            force: false,
        };
        let key = Key {
            kind: kind.storage.clone(),
            namespace: meta::namespace(&object).into(),
            name: meta::name(&object).into(),
        };
        if self.store.get(&key).is_some() {
            return Ok(());
        }
        let mut object = object;
        strategy::prune(&kind, &mut object, options.validation)?;
        let new = self.ready_to_create(&kind, object, &options)?;
        let committed = self.store.transact(&key, |current| {
            Ok::<_, ApiError>(if current.is_some() {
                Decision::Keep
            } else {
                Decision::Put(new)
            })
        })?;
        self.definitions_changed(&committed)
    }

    /// Puts a definition in its newest form; what this program was built with wins over what is stored.
    ///
    /// # Errors
    /// A definition that cannot be used.
    pub fn install_definition(&self, definition: &Value) -> Result<(), ApiError> {
        self.ensure("apiextensions.k8s.io", "customresourcedefinitions", definition.clone())?;
        let kind = self.find_kind("apiextensions.k8s.io", "customresourcedefinitions")?;
        let key = Key {
            kind: kind.storage.clone(),
            namespace: "".into(),
            name: meta::name(definition).into(),
        };
        let committed = self.store.transact(&key, |current| {
            let Some(current) = current else {
                return Ok(Decision::Keep);
            };
            let mut new = current.value.clone();
            meta::object_mut(&mut new).insert("spec".into(), definition["spec"].clone());
            strategy::prepare_update(&kind, &current.value, &mut new, false);
            self.settle(&kind, &current.value, new)
        })?;
        self.definitions_changed(&committed)
    }

    fn find_kind(&self, group: &str, plural: &str) -> Result<std::sync::Arc<Kind>, ApiError> {
        let registry = self.registry();
        let found = registry
            .iter()
            .find(|k| k.group == group && k.plural == plural)
            .cloned();
        found.ok_or_else(ApiError::no_such_path)
    }
}

/// The caller's resourceVersion and uid, where given, have to be the current ones.
fn check_preconditions(kind: &Kind, old: &Value, new: &Value) -> Result<(), ApiError> {
    let subject = kind.subject(meta::name(old));
    let (given, current) = (meta::resource_version(new), meta::resource_version(old));
    if !given.is_empty() && given != "0" && given != current {
        if given.parse::<u64>().is_err() {
            let cause = crate::error::Cause::invalid("metadata.resourceVersion", &given.into(), "must be a number");
            return Err(ApiError::invalid(&kind.group, &kind.kind, meta::name(old), &[cause]));
        }
        return Err(ApiError::stale(&subject));
    }
    let (given, current) = (meta::uid(new), meta::uid(old));
    if !given.is_empty() && given != current {
        let why = format!("Precondition failed: UID in precondition: {given}, UID in object meta: {current}");
        return Err(ApiError::conflict(&subject, &why));
    }
    Ok(())
}
