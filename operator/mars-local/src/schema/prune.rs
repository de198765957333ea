//! Pruning: fields that the schema does not know go, and so do nulls where null is no value.
//!
//! Invariant: pruning never changes a field that stays; what it removed as unknown is reported by path.

use super::{Additional, Schema, join};
use serde_json::Value;

/// Fields that every object and embedded object has, whatever its schema says.
const OBJECT_FIELDS: [&str; 3] = ["apiVersion", "kind", "metadata"];

impl Schema {
    /// Removes unknown fields and meaningless nulls from a whole object; returns the paths of the unknown fields.
    pub fn prune_object(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Vec::new();
        self.prune(object, "", true, &mut unknown);
        unknown
    }

    fn prune(&self, value: &mut Value, path: &str, is_object: bool, unknown: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                let names: Vec<String> = fields.keys().cloned().collect();
                for name in names {
                    let is_known = is_object && OBJECT_FIELDS.contains(&name.as_str());
                    if is_known && !self.properties.contains_key(&name) {
                        continue;
                    }
                    let here = join(path, &name);
                    let Some(schema) = self.field(&name) else {
                        let keep = self.preserve_unknown || matches!(self.additional, Additional::Any);
                        if !keep {
                            fields.remove(&name);
                            unknown.push(here);
                        }
                        continue;
                    };
                    match fields.get_mut(&name) {
                        Some(Value::Null) if !schema.nullable => {
                            fields.remove(&name);
                        }
                        Some(child) => schema.prune(child, &here, schema.embedded, unknown),
                        None => {}
                    }
                }
            }
            Value::Array(entries) => {
                let Some(items) = &self.items else { return };
                for (i, entry) in entries.iter_mut().enumerate() {
                    items.prune(entry, &format!("{path}[{i}]"), items.embedded, unknown);
                }
            }
            _ => {}
        }
    }
}
