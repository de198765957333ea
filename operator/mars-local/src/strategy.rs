//! What happens to an object before it is stored: pruning, defaulting, what the server sets, validation.
//!
//! Invariants: uid, creationTimestamp and generation are the server's alone; a write to the object never changes its
//! status and a write to the status never changes anything else; generation counts changes outside metadata and status.

use crate::error::{ApiError, Cause};
use crate::meta;
use crate::registry::{CRD_STORAGE, Kind, kinds_of_crd};
use base64::Engine as _;
use serde_json::{Value, json};

/// A further check of whole objects, with the old version on updates; returns what is wrong.
pub type Admission = dyn Fn(&Kind, Option<&Value>, &Value) -> Vec<Cause> + Send + Sync;

/// What to do about fields a schema does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FieldValidation {
    /// Drop them.
    Ignore,
    /// Drop them and say so in a warning.
    Warn,
    /// Refuse the object.
    Strict,
}

impl FieldValidation {
    /// Parses the query parameter; absent means Warn.
    ///
    /// # Errors
    /// 400 for an unknown word.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        match text {
            "Ignore" => Ok(Self::Ignore),
            "" | "Warn" => Ok(Self::Warn),
            "Strict" => Ok(Self::Strict),
            other => Err(ApiError::bad_request(format!(
                "fieldValidation: Unsupported value: {other:?}"
            ))),
        }
    }
}

/// Checks that a body is an object of this kind, for this namespace and name; fills in the namespace.
///
/// # Errors
/// 400 with what does not fit.
pub fn check_identity(kind: &Kind, body: &mut Value, namespace: &str, name: Option<&str>) -> Result<(), ApiError> {
    if !body.is_object() {
        return Err(ApiError::bad_request("the body of the request is no object"));
    }
    let (api_version, found) = (
        meta::text(body, &["apiVersion"]).to_owned(),
        meta::text(body, &["kind"]).to_owned(),
    );
    // Typed clients leave both out.
    if found.is_empty() && api_version.is_empty() {
        if kind.custom {
            return Err(ApiError::bad_request(
                "Object 'Kind' is missing in the body of the request",
            ));
        }
        let fields = meta::object_mut(body);
        fields.insert("kind".into(), kind.kind.clone().into());
        fields.insert("apiVersion".into(), kind.api_version().into());
    } else if found != kind.kind {
        let message = format!(
            "the kind in the data ({found}) does not match the expected kind ({})",
            kind.kind
        );
        return Err(ApiError::bad_request(message));
    } else if api_version != kind.api_version() {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({api_version}) does not match the expected API version ({})",
            kind.api_version()
        )));
    }
    let given = meta::namespace(body);
    if !given.is_empty() && given != namespace {
        return Err(ApiError::bad_request(
            "the namespace of the provided object does not match the namespace sent on the request",
        ));
    }
    if kind.namespaced {
        meta::set(body, "namespace", Some(namespace.into()));
    } else {
        meta::set(body, "namespace", None);
    }
    if let Some(name) = name {
        let given = meta::name(body).to_owned();
        if given.is_empty() {
            meta::set(body, "name", Some(name.into()));
        } else if given != name {
            let message = format!("the name of the object ({given}) does not match the name on the URL ({name})");
            return Err(ApiError::bad_request(message));
        }
    }
    Ok(())
}

/// Prunes unknown fields; returns warnings, or refuses when strict. Works on the form the client sent.
///
/// # Errors
/// 400 that names each unknown field, with `Strict`.
pub fn prune(kind: &Kind, object: &mut Value, validation: FieldValidation) -> Result<Vec<String>, ApiError> {
    let unknown = kind.schema.prune_object(object);
    let texts: Vec<String> = unknown
        .iter()
        .map(|field| format!("unknown field \"{field}\""))
        .collect();
    match validation {
        FieldValidation::Ignore => Ok(Vec::new()),
        FieldValidation::Warn => Ok(texts),
        FieldValidation::Strict if texts.is_empty() => Ok(texts),
        FieldValidation::Strict => {
            let message = format!(
                "{} in version \"{}\" cannot be handled as a {}: strict decoding error: {}",
                kind.kind,
                kind.version,
                kind.kind,
                texts.join(", ")
            );
            Err(ApiError::bad_request(message))
        }
    }
}

/// Makes a new object ready for storage: everything the server sets, defaults.
pub fn prepare_create(kind: &Kind, object: &mut Value) {
    if meta::name(object).is_empty() {
        let prefix = meta::text(object, &["metadata", "generateName"]).to_owned();
        if !prefix.is_empty() {
            meta::set(object, "name", Some(generate_name(&prefix).into()));
        }
    }
    if kind.has_status && (kind.custom || *kind.storage == *"core/pods") {
        meta::object_mut(object).remove("status");
    }
    for field in [
        "resourceVersion",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "selfLink",
        "managedFields",
    ] {
        meta::set(object, field, None);
    }
    meta::set(object, "uid", Some(uuid::Uuid::new_v4().to_string().into()));
    meta::set(object, "creationTimestamp", Some(meta::now().into()));
    meta::set(object, "generation", kind.has_generation.then(|| 1.into()));
    kind.schema.apply_defaults(object);
    finish(kind, object);
}

/// Letters that generated names end with: no vowels, so that no words come out.
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

fn generate_name(prefix: &str) -> String {
    let keep: String = prefix.chars().take(58 + 190).collect();
    let suffix: String = (0..5)
        .map(|_| char::from(SUFFIX_LETTERS[rand::random_range(0..SUFFIX_LETTERS.len())]))
        .collect();
    format!("{keep}{suffix}")
}

/// What single kinds need on each write.
fn finish(kind: &Kind, object: &mut Value) {
    match &*kind.storage {
        "core/namespaces" => {
            let fields = meta::object_mut(object);
            fields.insert("spec".into(), json!({"finalizers": ["kubernetes"]}));
            let phase = if meta::is_deleting(object) {
                "Terminating"
            } else {
                "Active"
            };
            meta::object_mut(object).insert("status".into(), json!({"phase": phase}));
            let name = meta::name(object).to_owned();
            let labels = meta::metadata_mut(object).entry("labels").or_insert_with(|| json!({}));
            meta::object_mut(labels).insert("kubernetes.io/metadata.name".into(), name.into());
        }
        "core/secrets" => {
            let fields = meta::object_mut(object);
            if let Some(Value::Object(plain)) = fields.remove("stringData") {
                let data = meta::object_mut(fields.entry("data").or_insert_with(|| json!({})));
                for (name, value) in plain {
                    let encoded = base64::engine::general_purpose::STANDARD.encode(value.as_str().unwrap_or_default());
                    data.insert(name, encoded.into());
                }
            }
            fields.entry("type").or_insert_with(|| "Opaque".into());
        }
        CRD_STORAGE => {
            let names = object.pointer("/spec/names").cloned().unwrap_or_default();
            let versions = object.pointer("/spec/versions").and_then(Value::as_array);
            let stored: Vec<Value> = versions
                .into_iter()
                .flatten()
                .filter(|v| v["storage"] == json!(true))
                .map(|v| v["name"].clone())
                .collect();
            let created = meta::text(object, &["metadata", "creationTimestamp"]).to_owned();
            let condition = |ty: &str, reason: &str| json!({"type": ty, "status": "True", "reason": reason, "message": "", "lastTransitionTime": created});
            let status = json!({"acceptedNames": names, "storedVersions": stored, "conditions": [
                condition("NamesAccepted", "NoConflicts"), condition("Established", "InitialNamesAccepted")]});
            meta::object_mut(object).insert("status".into(), status);
        }
        _ => {}
    }
}

/// Makes a changed object ready for storage: what may not change is put back, defaults, generation.
pub fn prepare_update(kind: &Kind, old: &Value, new: &mut Value, status_only: bool) {
    if status_only {
        let status = new.get("status").cloned();
        let managed = new.pointer("/metadata/managedFields").cloned();
        *new = old.clone();
        match status {
            Some(status) => meta::object_mut(new).insert("status".into(), status),
            None => meta::object_mut(new).remove("status"),
        };
        meta::set(new, "managedFields", managed);
    } else if kind.has_status {
        match old.get("status") {
            Some(status) => meta::object_mut(new).insert("status".into(), status.clone()),
            None => meta::object_mut(new).remove("status"),
        };
    }
    for field in [
        "name",
        "namespace",
        "uid",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
        "resourceVersion",
        "generateName",
    ] {
        meta::copy(new, old, field);
    }
    // An empty map or list in metadata says nothing; real servers do not store it either.
    let hollow = |v: &Value| {
        v.is_null() || v.as_object().is_some_and(serde_json::Map::is_empty) || v.as_array().is_some_and(Vec::is_empty)
    };
    for field in ["labels", "annotations", "finalizers", "ownerReferences"] {
        if new["metadata"].get(field).is_some_and(hollow) {
            meta::set(new, field, None);
        }
    }
    kind.schema.apply_defaults(new);
    finish(kind, new);
    if kind.has_generation && !same_intent(old, new) {
        meta::set(new, "generation", Some((meta::generation(old) + 1).into()));
    }
}

/// Whether two versions are the same apart from metadata and status.
fn same_intent(old: &Value, new: &Value) -> bool {
    let intent = |object: &Value| {
        let mut fields = meta::map(object, &[]).clone();
        fields.remove("metadata");
        fields.remove("status");
        fields
    };
    intent(old) == intent(new)
}

/// Checks an object (an update, if `old` is given) that has been prepared.
///
/// # Errors
/// 422 with every violation.
pub fn validate(kind: &Kind, old: Option<&Value>, new: &Value, admission: &Admission) -> Result<(), ApiError> {
    let mut causes = meta::validate(new, kind.name_is_label);
    causes.extend(
        kind.schema
            .validate(new, "")
            .into_iter()
            .filter(|c| !is_metadata_detail(c)),
    );
    if let Some(old) = old.filter(|old| meta::is_deleting(old)) {
        let before = meta::finalizers(old);
        let added: Vec<&str> = meta::finalizers(new)
            .into_iter()
            .filter(|f| !before.contains(f))
            .collect();
        if !added.is_empty() {
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
            );
            causes.push(Cause::forbidden("metadata.finalizers", &detail));
        }
    }
    if &*kind.storage == CRD_STORAGE
        && let Err(error) = kinds_of_crd(new)
    {
        causes.push(Cause {
            reason: "FieldValueInvalid",
            field: String::new(),
            message: error.to_string(),
        });
    }
    if causes.is_empty() {
        causes = admission(kind, old, new);
    }
    if causes.is_empty() {
        return Ok(());
    }
    Err(ApiError::invalid(&kind.group, &kind.kind, meta::name(new), &causes))
}

/// Required fields of generated metadata schemas are checked by [`meta::validate`] in better words.
fn is_metadata_detail(cause: &Cause) -> bool {
    cause.reason == "FieldValueRequired" && cause.field.starts_with("metadata.")
}
