//! Field ownership (`managedFields`) and server-side apply.
//!
//! Invariants:
//! - Each field of an object is owned by the managers that set it; a field a manager no longer applies goes only if
//!   nobody else owns it.
//! - An apply that would change a field somebody else owns is a conflict unless forced, and then nothing is changed.
//! - A manager appears at most once per operation, version and subresource; fields that are gone are owned by nobody.

mod fieldset;
mod merge;

pub use fieldset::FieldSet;

use crate::error::ApiError;
use crate::meta;
use crate::schema::Schema;
use fieldset::{display, remove_at, value_at};
use serde_json::{Value, json};

/// Top-level fields that the server sets.
const UNOWNED: [&str; 2] = ["apiVersion", "kind"];
/// Metadata fields that the server sets.
const UNOWNED_METADATA: [&str; 11] = [
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
    "generateName",
];

/// How a manager came to its fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Server-side apply.
    Apply,
    /// Create, update, or any other patch.
    Update,
}

impl Operation {
    fn word(self) -> &'static str {
        match self {
            Self::Apply => "Apply",
            Self::Update => "Update",
        }
    }
}

/// Who writes, and to which part of the object.
#[derive(Clone, Debug)]
pub struct Manager<'a> {
    /// Name of the field manager.
    pub name: &'a str,
    /// `group/version` the manager speaks.
    pub api_version: &'a str,
    /// Whether only `.status` is written.
    pub status: bool,
    /// Whether the kind has a status subresource, so that other writes cannot touch `.status`.
    pub has_status: bool,
}

#[derive(Clone, Debug)]
struct Entry {
    manager: String,
    operation: Operation,
    api_version: String,
    subresource: String,
    time: String,
    fields: FieldSet,
}

impl Entry {
    fn is(&self, who: &Manager<'_>, operation: Operation) -> bool {
        self.manager == who.name
            && self.operation == operation
            && self.api_version == who.api_version
            && self.subresource == subresource(who)
    }

    fn describe(&self) -> String {
        let sub = if self.subresource.is_empty() {
            String::new()
        } else {
            format!(" with subresource {:?}", self.subresource)
        };
        match self.operation {
            Operation::Apply => format!("{:?}{sub}", self.manager),
            Operation::Update => format!("{:?}{sub} using {}", self.manager, self.api_version),
        }
    }
}

fn subresource(who: &Manager<'_>) -> &'static str {
    if who.status { "status" } else { "" }
}

fn read(object: &Value) -> Vec<Entry> {
    let list = object.pointer("/metadata/managedFields").and_then(Value::as_array);
    let entry = |raw: &Value| Entry {
        manager: meta::text(raw, &["manager"]).to_owned(),
        operation: if meta::text(raw, &["operation"]) == "Apply" {
            Operation::Apply
        } else {
            Operation::Update
        },
        api_version: meta::text(raw, &["apiVersion"]).to_owned(),
        subresource: meta::text(raw, &["subresource"]).to_owned(),
        time: meta::text(raw, &["time"]).to_owned(),
        fields: FieldSet::from_json(&raw["fieldsV1"]),
    };
    list.into_iter()
        .flatten()
        .map(entry)
        .filter(|e| !e.fields.is_empty())
        .collect()
}

fn write(object: &mut Value, entries: &[Entry]) {
    let list: Vec<Value> = entries
        .iter()
        .filter(|e| !e.fields.is_empty())
        .map(|e| {
            let mut raw = json!({"manager": e.manager, "operation": e.operation.word(), "apiVersion": e.api_version,
                "time": e.time, "fieldsType": "FieldsV1", "fieldsV1": e.fields.to_json()});
            if !e.subresource.is_empty() {
                raw["subresource"] = e.subresource.clone().into();
            }
            raw
        })
        .collect();
    meta::set(
        object,
        "managedFields",
        (!list.is_empty()).then_some(Value::Array(list)),
    );
}

/// The fields of `object` that the writer may own.
fn ownable(object: &Value, schema: &Schema, who: &Manager<'_>) -> FieldSet {
    let mut set = FieldSet::of(object, Some(schema));
    set.without(&UNOWNED, &UNOWNED_METADATA);
    if who.status {
        set.only("status");
    } else if who.has_status {
        set.without(&["status"], &[]);
    }
    set
}

/// Records the outcome of a create, update or ordinary patch in `new`'s managedFields: what differs from `old` now
/// belongs to `who`, and to nobody else. A client may replace the list itself (`old` and `new` differ in it).
pub fn record_update(old: Option<&Value>, new: &mut Value, schema: &Schema, who: &Manager<'_>) {
    let cleared = new.pointer("/metadata/managedFields") == Some(&json!([{}]));
    let mut entries = if cleared { Vec::new() } else { read(new) };
    if entries.is_empty() && !cleared {
        entries = old.map(read).unwrap_or_default();
    }
    let mut changed = ownable(new, schema, who);
    if let Some(old) = old {
        changed.retain(&mut |path, leaf| match (value_at(old, path), leaf) {
            (None, _) => true,
            (Some(before), true) => value_at(new, path) != Some(before),
            (Some(_), false) => false,
        });
    }
    for entry in &mut entries {
        let mine = entry.is(who, Operation::Update);
        let here = &*new;
        entry
            .fields
            .retain(&mut |path, leaf| value_at(here, path).is_some() && (mine || !leaf || !changed.contains(path)));
    }
    if !changed.is_empty() {
        match entries.iter_mut().find(|e| e.is(who, Operation::Update)) {
            Some(entry) => {
                entry.fields.merge(&changed);
                entry.time = meta::now();
            }
            None => entries.push(new_entry(who, Operation::Update, changed)),
        }
    }
    write(new, &entries);
}

fn new_entry(who: &Manager<'_>, operation: Operation, fields: FieldSet) -> Entry {
    Entry {
        manager: who.name.to_owned(),
        operation,
        api_version: who.api_version.to_owned(),
        subresource: subresource(who).to_owned(),
        time: meta::now(),
        fields,
    }
}

/// Applies a configuration to the live object (or to nothing) and returns the outcome with its managedFields.
///
/// # Errors
/// A conflict that names each field that somebody else owns with another value, unless `force`.
pub fn apply(
    live: Option<&Value>,
    applied: &Value,
    schema: &Schema,
    who: &Manager<'_>,
    force: bool,
) -> Result<Value, ApiError> {
    let wanted = ownable(applied, schema, who);
    let mut entries = live.map(read).unwrap_or_default();
    let mut conflicts = Vec::new();
    if let Some(live) = live {
        for entry in entries.iter_mut().filter(|e| !e.is(who, Operation::Apply)) {
            let owner = entry.describe();
            entry.fields.retain(&mut |path, leaf| {
                let differs = leaf && wanted.contains(path) && value_at(live, path) != value_at(applied, path);
                if differs {
                    conflicts.push((owner.clone(), display(path)));
                }
                !differs
            });
        }
    }
    if !conflicts.is_empty() && !force {
        return Err(ApiError::apply_conflict(&conflicts));
    }
    let mut new = live.cloned().unwrap_or_else(|| json!({}));
    merge::merge(&mut new, &relevant(applied, who), Some(schema));
    let mine = entries.iter().position(|e| e.is(who, Operation::Apply));
    if let Some(mine) = mine {
        // A list entry goes before its fields: without its key nobody would find it.
        let mut paths = entries[mine].fields.paths();
        paths.sort_by_key(|(path, _)| path.len());
        for (path, _) in paths {
            let others = entries
                .iter()
                .enumerate()
                .any(|(i, e)| i != mine && e.fields.touches(&path));
            if !wanted.touches(&path) && !others {
                remove_at(&mut new, &path);
            }
        }
    }
    match mine {
        Some(mine) if entries[mine].fields == wanted => {}
        Some(mine) => {
            entries[mine].fields = wanted;
            entries[mine].time = meta::now();
        }
        None => entries.push(new_entry(who, Operation::Apply, wanted)),
    }
    for entry in &mut entries {
        let here = &new;
        entry.fields.retain(&mut |path, _| value_at(here, path).is_some());
    }
    write(&mut new, &entries);
    Ok(new)
}

/// The part of a configuration that this request may write.
fn relevant(applied: &Value, who: &Manager<'_>) -> Value {
    let mut part = applied.clone();
    let fields = meta::object_mut(&mut part);
    if who.status {
        fields.retain(|name, _| matches!(name.as_str(), "apiVersion" | "kind" | "metadata" | "status"));
    } else if who.has_status {
        fields.remove("status");
    }
    let metadata = meta::metadata_mut(&mut part);
    metadata.remove("managedFields");
    metadata.retain(|name, _| !UNOWNED_METADATA.contains(&name.as_str()) || name == "name" || name == "namespace");
    if who.status {
        metadata.retain(|name, _| name == "name" || name == "namespace");
    }
    part
}

#[cfg(test)]
mod tests;
