//! Strategic merge: a merge patch that knows keyed lists and sets, with `$patch` directives.
//!
//! Invariant: lists whose entries have no identity are replaced whole; directives never end up in the object.

use crate::error::ApiError;
use crate::schema::{ListType, Schema};
use serde_json::{Map, Value};

/// Merges `patch` into `object`.
pub(super) fn merge(object: &mut Value, patch: &Value, schema: Option<&Schema>) -> Result<(), ApiError> {
    let Value::Object(patch) = patch else {
        *object = patch.clone();
        return Ok(());
    };
    match patch.get("$patch").and_then(Value::as_str) {
        Some("replace") => {
            *object = Value::Object(without_directives(patch));
            return Ok(());
        }
        Some("delete") => {
            *object = Value::Object(Map::new());
            return Ok(());
        }
        Some("merge") | None => {}
        Some(other) => return Err(ApiError::bad_request(format!("unknown $patch directive {other:?}"))),
    }
    let target = crate::meta::object_mut(object);
    if let Some(keep) = patch.get("$retainKeys").and_then(Value::as_array) {
        target.retain(|name, _| keep.iter().any(|k| k == name.as_str()));
    }
    for (name, value) in patch {
        if let Some(list) = name.strip_prefix("$deleteFromPrimitiveList/") {
            let gone = value.as_array().map(Vec::as_slice).unwrap_or_default();
            if let Some(Value::Array(entries)) = target.get_mut(list) {
                entries.retain(|entry| !gone.contains(entry));
            }
        } else if !name.starts_with('$') {
            merge_field(target, name, value, schema.and_then(|s| s.field(name)))?;
        }
    }
    for (name, order) in patch {
        if let Some(list) = name.strip_prefix("$setElementOrder/") {
            set_order(target.get_mut(list), order, schema.and_then(|s| s.field(list)));
        }
    }
    Ok(())
}

fn merge_field(
    target: &mut Map<String, Value>,
    name: &str,
    value: &Value,
    schema: Option<&Schema>,
) -> Result<(), ApiError> {
    match value {
        Value::Null => {
            target.remove(name);
        }
        Value::Object(_) => {
            let child = target.entry(name).or_insert_with(|| Value::Object(Map::new()));
            merge(child, value, schema)?;
            if value.get("$patch").and_then(Value::as_str) == Some("delete") {
                target.remove(name);
            }
        }
        Value::Array(entries) => {
            let child = target.entry(name).or_insert_with(|| Value::Array(Vec::new()));
            match (child, schema.map(|s| &s.list_type)) {
                (Value::Array(list), Some(ListType::Map(keys))) if !keys.is_empty() => {
                    merge_list(list, entries, &keys[0], schema.and_then(|s| s.items.as_deref()))?;
                }
                (Value::Array(list), Some(ListType::Set)) => {
                    let new: Vec<Value> = entries.iter().filter(|e| !list.contains(e)).cloned().collect();
                    list.extend(new);
                }
                (child, _) => *child = value.clone(),
            }
        }
        scalar => {
            target.insert(name.to_owned(), scalar.clone());
        }
    }
    Ok(())
}

fn merge_list(list: &mut Vec<Value>, entries: &[Value], key: &str, items: Option<&Schema>) -> Result<(), ApiError> {
    if entries
        .iter()
        .any(|e| e.get("$patch").and_then(Value::as_str) == Some("replace"))
    {
        let plain = entries.iter().filter(|e| e.get("$patch").is_none());
        *list = plain.cloned().collect();
        return Ok(());
    }
    for entry in entries {
        let id = entry.get(key);
        if id.is_none() {
            return Err(ApiError::bad_request(format!(
                "map: {entry} does not contain declared merge key: {key}"
            )));
        }
        let at = list.iter().position(|other| other.get(key) == id);
        let delete = entry.get("$patch").and_then(Value::as_str) == Some("delete");
        match (at, delete) {
            (Some(at), true) => {
                list.remove(at);
            }
            (None, true) => {}
            (Some(at), false) => merge(&mut list[at], entry, items)?,
            (None, false) => {
                let mut new = Value::Object(Map::new());
                merge(&mut new, entry, items)?;
                list.push(new);
            }
        }
    }
    Ok(())
}

/// Orders a list as the client wants it; entries it does not name keep their places behind.
fn set_order(list: Option<&mut Value>, order: &Value, schema: Option<&Schema>) {
    let (Some(Value::Array(list)), Value::Array(order)) = (list, order) else {
        return;
    };
    let rank = |entry: &Value| {
        let at = order.iter().position(|wanted| match schema.map(|s| &s.list_type) {
            Some(ListType::Map(keys)) => keys.first().is_some_and(|k| wanted.get(k) == entry.get(k)),
            _ => wanted == entry,
        });
        at.unwrap_or(order.len())
    };
    list.sort_by_key(rank);
}

fn without_directives(patch: &Map<String, Value>) -> Map<String, Value> {
    patch
        .iter()
        .filter(|(name, _)| !name.starts_with('$'))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn conditions_of_a_node_merge_by_type() {
        let kinds = crate::registry::builtin_kinds();
        let node = kinds.iter().find(|k| k.kind == "Node").unwrap();
        let mut object = json!({"metadata": {"finalizers": ["a/x", "a/y"], "labels": {"k": "v", "gone": "1"}},
            "status": {"conditions": [{"type": "Ready", "status": "False", "reason": "r"}, {"type": "Disk", "status": "True"}]}});
        let patch = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/x"], "labels": {"gone": null}},
            "status": {"$setElementOrder/conditions": [{"type": "Disk"}, {"type": "Ready"}],
                "conditions": [{"type": "Ready", "status": "True"}, {"type": "Net", "status": "True"},
                    {"type": "Absent", "$patch": "delete"}]}});
        merge(&mut object, &patch, Some(&node.schema)).unwrap();
        assert_eq!(object["metadata"], json!({"finalizers": ["a/y"], "labels": {"k": "v"}}));
        assert_eq!(
            object["status"]["conditions"],
            json!([{"type": "Disk", "status": "True"},
            {"type": "Ready", "status": "True", "reason": "r"}, {"type": "Net", "status": "True"}])
        );
    }
}
