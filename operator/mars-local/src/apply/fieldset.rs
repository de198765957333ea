//! Sets of fields, as `managedFields` writes them (`FieldsV1`).
//!
//! Invariant: a set names fields only – map keys (`f:`), list entries by key (`k:`) or by value (`v:`) – never list
//! positions, so it stays right when entries move.

use crate::schema::{Additional, ListType, Schema};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// A tree of fields; `owned` says whether the field itself belongs to the set, not only fields below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSet {
    owned: bool,
    children: BTreeMap<String, FieldSet>,
}

/// One path: elements in the form `f:name`, `k:{…}`, `v:…`.
pub(super) type FieldPath = Vec<String>;

impl FieldSet {
    /// The fields of an object, as deep as its schema lets them be owned separately.
    #[must_use]
    pub fn of(value: &Value, schema: Option<&Schema>) -> Self {
        let mut set = Self::default();
        match value {
            Value::Object(fields) if !fields.is_empty() && !schema.is_some_and(|s| s.atomic_map) => {
                for (name, child) in fields {
                    let named = schema.is_some_and(|s| s.properties.contains_key(name));
                    let mut below = Self::of(child, schema.and_then(|s| s.field(name)));
                    // A key that the schema does not name (a label, say) is itself something one can own.
                    below.owned |= below.children.is_empty()
                        || (!named && schema.is_some_and(|s| matches!(s.additional, Additional::Of(_))));
                    set.children.insert(format!("f:{name}"), below);
                }
            }
            Value::Array(entries) if !entries.is_empty() => match schema.map(|s| &s.list_type) {
                Some(ListType::Map(keys)) => {
                    for entry in entries {
                        let mut below = Self::of(entry, schema.and_then(|s| s.items.as_deref()));
                        below.owned = true;
                        set.children.insert(key_element(entry, keys), below);
                    }
                }
                Some(ListType::Set) => {
                    for entry in entries {
                        set.children.insert(format!("v:{entry}"), Self::leaf());
                    }
                }
                _ => set.owned = true,
            },
            _ => set.owned = true,
        }
        set
    }

    fn leaf() -> Self {
        Self {
            owned: true,
            children: BTreeMap::new(),
        }
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.owned && self.children.is_empty()
    }

    /// Reads `FieldsV1`; anything of another shape is an empty set.
    #[must_use]
    pub fn from_json(value: &Value) -> Self {
        let mut set = Self::default();
        for (name, below) in crate::meta::map(value, &[]) {
            if name == "." {
                set.owned = true;
                continue;
            }
            let mut child = Self::from_json(below);
            child.owned |= child.children.is_empty();
            set.children.insert(name.clone(), child);
        }
        set
    }

    /// Writes `FieldsV1`.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        if self.owned && !self.children.is_empty() {
            map.insert(".".into(), Value::Object(Map::new()));
        }
        for (name, child) in &self.children {
            map.insert(name.clone(), child.to_json());
        }
        Value::Object(map)
    }

    /// Adds all fields of `other`.
    pub fn merge(&mut self, other: &Self) {
        self.owned |= other.owned;
        for (name, child) in &other.children {
            self.children.entry(name.clone()).or_default().merge(child);
        }
    }

    /// Keeps the fields for which `keep` says so; it gets the path and whether the field is a leaf of the set.
    pub(super) fn retain(&mut self, keep: &mut impl FnMut(&FieldPath, bool) -> bool) {
        self.retain_below(&mut Vec::new(), keep);
    }

    fn retain_below(&mut self, path: &mut FieldPath, keep: &mut impl FnMut(&FieldPath, bool) -> bool) {
        let leaf = self.children.is_empty();
        self.children.retain(|name, child| {
            path.push(name.clone());
            child.retain_below(path, keep);
            path.pop();
            !child.is_empty()
        });
        if self.owned && !path.is_empty() {
            self.owned = keep(path, leaf);
        }
    }

    /// Whether the set owns exactly this field.
    #[must_use]
    pub fn contains(&self, path: &[String]) -> bool {
        let end = path.iter().try_fold(self, |set, element| set.children.get(element));
        end.is_some_and(|set| set.owned)
    }

    /// Whether the set owns this field or something below it.
    #[must_use]
    pub fn touches(&self, path: &[String]) -> bool {
        path.iter()
            .try_fold(self, |set, element| set.children.get(element))
            .is_some()
    }

    /// All owned fields, with whether each is a leaf of the set.
    #[must_use]
    pub(super) fn paths(&self) -> Vec<(FieldPath, bool)> {
        let mut all = Vec::new();
        let mut copy = self.clone();
        copy.retain(&mut |path, leaf| {
            all.push((path.clone(), leaf));
            true
        });
        all
    }

    /// Drops what lies under these top-level fields (or metadata fields), which are nobody's to own.
    pub fn without(&mut self, top: &[&str], metadata: &[&str]) {
        for name in top {
            self.children.remove(&format!("f:{name}"));
        }
        if let Some(below) = self.children.get_mut("f:metadata") {
            for name in metadata {
                below.children.remove(&format!("f:{name}"));
            }
            below.owned = false;
            if below.children.is_empty() {
                self.children.remove("f:metadata");
            }
        }
    }

    /// Keeps only what lies under one top-level field.
    pub fn only(&mut self, top: &str) {
        let wanted = format!("f:{top}");
        self.children.retain(|name, _| *name == wanted);
    }
}

/// The element that names an entry of a keyed list.
fn key_element(entry: &Value, keys: &[String]) -> String {
    let pairs: Map<String, Value> = keys
        .iter()
        .map(|key| (key.clone(), entry.get(key).cloned().unwrap_or_default()))
        .collect();
    format!("k:{}", Value::Object(pairs))
}

/// Position of the entry that a `k:` or `v:` element names.
fn position(entries: &[Value], element: &str) -> Option<usize> {
    if let Some(keys) = element.strip_prefix("k:") {
        let keys: Map<String, Value> = serde_json::from_str(keys).ok()?;
        return entries
            .iter()
            .position(|e| keys.iter().all(|(k, v)| e.get(k).unwrap_or(&Value::Null) == v));
    }
    let wanted: Value = serde_json::from_str(element.strip_prefix("v:")?).ok()?;
    entries.iter().position(|e| *e == wanted)
}

/// The value of a field, if it is there.
#[must_use]
pub(super) fn value_at<'a>(object: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter()
        .try_fold(object, |value, element| match element.strip_prefix("f:") {
            Some(name) => value.get(name),
            None => value
                .as_array()
                .and_then(|list| position(list, element).map(|i| &list[i])),
        })
}

/// Removes a field, and maps and lists that became empty by that.
pub(super) fn remove_at(object: &mut Value, path: &[String]) {
    let Some((first, rest)) = path.split_first() else {
        return;
    };
    match (object, first.strip_prefix("f:")) {
        (Value::Object(fields), Some(name)) => {
            let remove = match fields.get_mut(name) {
                Some(child) if !rest.is_empty() => {
                    remove_at(child, rest);
                    is_hollow(child)
                }
                _ => true,
            };
            if remove {
                fields.remove(name);
            }
        }
        (Value::Array(list), None) => {
            if let Some(i) = position(list, first) {
                if rest.is_empty() {
                    list.remove(i);
                } else {
                    remove_at(&mut list[i], rest);
                }
            }
        }
        _ => {}
    }
}

fn is_hollow(value: &Value) -> bool {
    value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

/// A path as people read it: `.spec.replicas[node="a"].device`.
#[must_use]
pub(super) fn display(path: &[String]) -> String {
    let mut text = String::new();
    for element in path {
        if let Some(name) = element.strip_prefix("f:") {
            text.push('.');
            text.push_str(name);
        } else if let Some(keys) = element.strip_prefix("k:") {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let list: Vec<String> = keys.iter().map(|(k, v)| format!("{k}={v}")).collect();
            text.extend(["[", &list.join(","), "]"]);
        } else {
            text.extend(["[=", element.strip_prefix("v:").unwrap_or(element), "]"]);
        }
    }
    text
}
