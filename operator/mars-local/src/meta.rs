//! Small, total accessors to the metadata of an object held as JSON, and the rules for names.
//!
//! Invariant: nothing here panics on an object of a wrong shape; a wrong shape reads as absent, and validation names it.

use crate::error::Cause;
use serde_json::{Map, Value};

/// Empty map, so that an absent one can be borrowed.
static EMPTY: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);

/// A string at `path` below the object, or the empty string.
#[must_use]
pub fn text<'a>(object: &'a Value, path: &[&str]) -> &'a str {
    path.iter()
        .try_fold(object, |v, key| v.get(key))
        .and_then(Value::as_str)
        .unwrap_or_default()
}

/// A map at `path` below the object, or an empty one.
#[must_use]
pub fn map<'a>(object: &'a Value, path: &[&str]) -> &'a Map<String, Value> {
    path.iter()
        .try_fold(object, |v, key| v.get(key))
        .and_then(Value::as_object)
        .unwrap_or(&EMPTY)
}

/// `metadata.name`.
#[must_use]
pub fn name(object: &Value) -> &str {
    text(object, &["metadata", "name"])
}

/// `metadata.namespace`, empty for cluster-scoped objects.
#[must_use]
pub fn namespace(object: &Value) -> &str {
    text(object, &["metadata", "namespace"])
}

/// `metadata.uid`.
#[must_use]
pub fn uid(object: &Value) -> &str {
    text(object, &["metadata", "uid"])
}

/// `metadata.resourceVersion` as written.
#[must_use]
pub fn resource_version(object: &Value) -> &str {
    text(object, &["metadata", "resourceVersion"])
}

/// `metadata.generation`, 0 if absent.
#[must_use]
pub fn generation(object: &Value) -> i64 {
    object
        .pointer("/metadata/generation")
        .and_then(Value::as_i64)
        .unwrap_or(0)
}

/// Whether a deletion has been asked for.
#[must_use]
pub fn is_deleting(object: &Value) -> bool {
    !text(object, &["metadata", "deletionTimestamp"]).is_empty()
}

/// `metadata.finalizers`.
#[must_use]
pub fn finalizers(object: &Value) -> Vec<&str> {
    let list = object.pointer("/metadata/finalizers").and_then(Value::as_array);
    list.map(|l| l.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

/// `metadata.ownerReferences`.
#[must_use]
pub fn owners(object: &Value) -> &[Value] {
    let list = object.pointer("/metadata/ownerReferences").and_then(Value::as_array);
    list.map(Vec::as_slice).unwrap_or_default()
}

/// The object as a map; anything that is no object becomes an empty one first.
pub fn object_mut(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        _ => unreachable!("made an object just above"),
    }
}

/// `metadata` as a map, made if it is not there.
pub fn metadata_mut(object: &mut Value) -> &mut Map<String, Value> {
    object_mut(
        object_mut(object)
            .entry("metadata")
            .or_insert_with(|| Value::Object(Map::new())),
    )
}

/// Puts or removes a metadata field.
pub fn set(object: &mut Value, field: &str, value: Option<Value>) {
    let metadata = metadata_mut(object);
    match value {
        Some(value) => {
            metadata.insert(field.into(), value);
        }
        None => {
            metadata.remove(field);
        }
    }
}

/// Copies a metadata field from another object: absent there, absent here.
pub fn copy(object: &mut Value, from: &Value, field: &str) {
    let value = from.pointer(&format!("/metadata/{field}")).cloned();
    set(object, field, value);
}

/// Now, as Kubernetes writes times: seconds, UTC.
#[must_use]
pub fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn label_char(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit()
}

/// Whether `name` is a DNS label of at most 63 characters.
#[must_use]
pub fn is_dns_label(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 63
        && name.starts_with(label_char)
        && name.ends_with(label_char)
        && name.chars().all(|c| label_char(c) || c == '-')
}

/// Whether `name` is a DNS subdomain of at most 253 characters.
#[must_use]
pub fn is_dns_subdomain(name: &str) -> bool {
    let label = |l: &str| {
        !l.is_empty()
            && l.starts_with(label_char)
            && l.ends_with(label_char)
            && l.chars().all(|c| label_char(c) || c == '-')
    };
    !name.is_empty() && name.len() <= 253 && name.split('.').all(label)
}

fn is_qualified_part(part: &str, max: usize) -> bool {
    let alnum = |c: char| c.is_ascii_alphanumeric();
    !part.is_empty()
        && part.len() <= max
        && part.starts_with(alnum)
        && part.ends_with(alnum)
        && part.chars().all(|c| alnum(c) || matches!(c, '-' | '_' | '.'))
}

/// Whether `key` is a qualified name: `[prefix/]name`.
#[must_use]
pub fn is_qualified_name(key: &str) -> bool {
    match key.split_once('/') {
        Some((prefix, name)) => is_dns_subdomain(prefix) && is_qualified_part(name, 63),
        None => is_qualified_part(key, 63),
    }
}

/// Text of the real API for a bad subdomain name.
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
/// Text of the real API for a bad label name.
const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";

/// Checks name, labels, annotations, finalizers and owner references of an object.
#[must_use]
pub fn validate(object: &Value, name_is_label: bool) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = name(object);
    let (name_ok, rule) = if name_is_label {
        (is_dns_label(name), LABEL)
    } else {
        (is_dns_subdomain(name), SUBDOMAIN)
    };
    if name.is_empty() {
        causes.push(Cause::required("metadata.name", "name or generateName is required"));
    } else if !name_ok {
        causes.push(Cause::invalid("metadata.name", &name.into(), rule));
    }
    for (field, is_label) in [("labels", true), ("annotations", false)] {
        let Some(value) = object.pointer(&format!("/metadata/{field}")).filter(|v| !v.is_null()) else {
            continue;
        };
        let Some(entries) = value.as_object() else {
            causes.push(Cause::wrong_type(format!("metadata.{field}"), value, "object"));
            continue;
        };
        for (key, value) in entries {
            validate_pair(field, key, value, is_label, &mut causes);
        }
    }
    for (i, finalizer) in finalizers(object).iter().enumerate() {
        if !is_qualified_name(finalizer) {
            let field = format!("metadata.finalizers[{i}]");
            causes.push(Cause::invalid(field, &(*finalizer).into(), "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character"));
        }
    }
    for (i, owner) in owners(object).iter().enumerate() {
        for part in ["apiVersion", "kind", "name", "uid"] {
            if text(owner, &[part]).is_empty() {
                let field = format!("metadata.ownerReferences[{i}].{part}");
                causes.push(Cause::invalid(
                    field,
                    &owner[part],
                    &format!("{part} must not be empty"),
                ));
            }
        }
    }
    causes
}

fn validate_pair(field: &str, key: &str, value: &Value, is_label: bool, causes: &mut Vec<Cause>) {
    let path = format!("metadata.{field}");
    let lower = key.to_ascii_lowercase();
    if !is_qualified_name(if is_label { key } else { &lower }) {
        causes.push(Cause::invalid(path, &key.into(), "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc')"));
        return;
    }
    let Some(text) = value.as_str() else {
        causes.push(Cause::wrong_type(format!("{path}.{key}"), value, "string"));
        return;
    };
    if is_label && !text.is_empty() && !is_qualified_part(text, 63) {
        causes.push(Cause::invalid(path, &text.into(), "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345')"));
    }
}
