//! Merging an applied configuration into the live object, as the schema says how.
//!
//! Invariant: merging only adds and changes what the configuration names; removal is decided by ownership, elsewhere.

use crate::schema::{ListType, Schema};
use serde_json::Value;

/// Merges `applied` into `live`.
pub(super) fn merge(live: &mut Value, applied: &Value, schema: Option<&Schema>) {
    match (live, applied) {
        (Value::Object(live), Value::Object(applied)) if !schema.is_some_and(|s| s.atomic_map) => {
            for (name, value) in applied {
                let below = schema.and_then(|s| s.field(name));
                match live.get_mut(name) {
                    Some(child) => merge(child, value, below),
                    None => {
                        live.insert(name.clone(), value.clone());
                    }
                }
            }
        }
        (Value::Array(live), Value::Array(applied)) => merge_list(live, applied, schema),
        (live, applied) => *live = applied.clone(),
    }
}

fn merge_list(live: &mut Vec<Value>, applied: &[Value], schema: Option<&Schema>) {
    match schema.map(|s| &s.list_type) {
        Some(ListType::Map(keys)) => {
            let items = schema.and_then(|s| s.items.as_deref());
            for entry in applied {
                let same = |other: &&mut Value| keys.iter().all(|k| other.get(k) == entry.get(k));
                match live.iter_mut().find(same) {
                    Some(found) => merge(found, entry, items),
                    None => live.push(entry.clone()),
                }
            }
        }
        Some(ListType::Set) => {
            for entry in applied {
                if !live.contains(entry) {
                    live.push(entry.clone());
                }
            }
        }
        _ => live.splice(.., applied.iter().cloned()).for_each(drop),
    }
}
