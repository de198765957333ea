//! Defaulting: absent fields get the default of their schema, from the outside in.
//!
//! Invariant: a field that is present is never changed; a default inside an absent map does not create the map.

use super::{Additional, Schema};
use serde_json::Value;

impl Schema {
    /// Fills in defaults below `value`.
    pub fn apply_defaults(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => {
                for (name, schema) in &self.properties {
                    if let (None, Some(default)) = (fields.get(name), &schema.default) {
                        fields.insert(name.clone(), default.clone());
                    }
                    if let Some(child) = fields.get_mut(name) {
                        schema.apply_defaults(child);
                    }
                }
                if let Additional::Of(schema) = &self.additional {
                    for (name, child) in fields.iter_mut() {
                        if !self.properties.contains_key(name) {
                            schema.apply_defaults(child);
                        }
                    }
                }
            }
            Value::Array(entries) => {
                let Some(items) = &self.items else { return };
                for entry in entries {
                    items.apply_defaults(entry);
                }
            }
            _ => {}
        }
    }
}
