//! Structural schemas: parsed once from `openAPIV3Schema`, then used to prune, default and validate objects.
//!
//! Invariant: an object that is stored has passed, in this order, pruning (unknown fields and nulls go), defaulting and
//! validation against the schema of its kind; so a reader never meets a field of a type the schema does not allow.

mod defaults;
mod prune;
mod validate;

use regex::Regex;
use serde_json::Value;
use std::collections::BTreeMap;

/// JSON type a schema asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// `object`
    Object,
    /// `array`
    Array,
    /// `string`
    String,
    /// `integer`
    Integer,
    /// `number`
    Number,
    /// `boolean`
    Boolean,
}

impl Type {
    /// The word of the schema.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Object => "object",
            Self::Array => "array",
            Self::String => "string",
            Self::Integer => "integer",
            Self::Number => "number",
            Self::Boolean => "boolean",
        }
    }
}

/// How the entries of a list are told apart (`x-kubernetes-list-type`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ListType {
    /// The list is one value.
    #[default]
    Atomic,
    /// Entries are scalars, each at most once.
    Set,
    /// Entries are objects identified by these fields.
    Map(Vec<String>),
}

/// What a map may hold besides its named properties.
#[derive(Clone, Debug, Default)]
pub enum Additional {
    /// Nothing.
    #[default]
    None,
    /// Anything.
    Any,
    /// Values of this schema.
    Of(Box<Schema>),
}

/// A parsed structural schema.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "the independent flags a schema node has")]
pub struct Schema {
    /// Type, if the schema names one.
    pub ty: Option<Type>,
    /// Named fields.
    pub properties: BTreeMap<String, Schema>,
    /// Other fields.
    pub additional: Additional,
    /// Schema of list entries.
    pub items: Option<Box<Schema>>,
    /// How list entries are identified.
    pub list_type: ListType,
    /// Whether the map is one value for server-side apply (`x-kubernetes-map-type: atomic`).
    pub atomic_map: bool,
    /// `x-kubernetes-preserve-unknown-fields`.
    pub preserve_unknown: bool,
    /// `x-kubernetes-int-or-string`.
    pub int_or_string: bool,
    /// `x-kubernetes-embedded-resource`: apiVersion, kind and metadata are known.
    pub embedded: bool,
    /// Whether null is a value.
    pub nullable: bool,
    /// Default, if there is one.
    pub default: Option<Value>,
    required: Vec<String>,
    allowed: Vec<Value>,
    pattern: Option<Regex>,
    format: Option<String>,
    minimum: Option<(f64, bool)>,
    maximum: Option<(f64, bool)>,
    multiple_of: Option<f64>,
    min_length: Option<u64>,
    max_length: Option<u64>,
    min_items: Option<u64>,
    max_items: Option<u64>,
    unique_items: bool,
    min_properties: Option<u64>,
    max_properties: Option<u64>,
    all_of: Vec<Schema>,
    any_of: Vec<Schema>,
    one_of: Vec<Schema>,
    not: Option<Box<Schema>>,
}

/// A schema that cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("schema of {path}: {problem}")]
pub struct SchemaError {
    /// Where in the schema, as a path of properties.
    pub path: String,
    /// What is wrong there.
    pub problem: String,
}

/// Deepest nesting a schema may have; deeper ones are a mistake or an attack.
const MAX_DEPTH: usize = 64;

impl Schema {
    /// Parses an `openAPIV3Schema`.
    ///
    /// # Errors
    /// Unknown types, bad patterns, and nesting beyond 64 levels.
    pub fn parse(raw: &Value) -> Result<Self, SchemaError> {
        Self::parse_at(raw, "", 0)
    }

    fn parse_at(raw: &Value, path: &str, depth: usize) -> Result<Self, SchemaError> {
        let error = |problem: String| SchemaError {
            path: path.to_owned(),
            problem,
        };
        if depth > MAX_DEPTH {
            return Err(error(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        let child = |raw: &Value, name: &str| {
            let path = if path.is_empty() {
                name.to_owned()
            } else {
                format!("{path}.{name}")
            };
            Self::parse_at(raw, &path, depth + 1)
        };
        let mut schema = Self {
            ty: parse_type(raw).map_err(error)?,
            ..Self::default()
        };
        for (name, property) in raw.get("properties").and_then(Value::as_object).into_iter().flatten() {
            schema.properties.insert(name.clone(), child(property, name)?);
        }
        schema.additional = match raw.get("additionalProperties") {
            None | Some(Value::Bool(false)) => Additional::None,
            Some(Value::Bool(true)) => Additional::Any,
            Some(of) => Additional::Of(Box::new(child(of, "*")?)),
        };
        if let Some(items) = raw.get("items") {
            schema.items = Some(Box::new(child(items, "[]")?));
        }
        for (field, into) in [
            ("allOf", &mut schema.all_of),
            ("anyOf", &mut schema.any_of),
            ("oneOf", &mut schema.one_of),
        ] {
            for alternative in raw.get(field).and_then(Value::as_array).into_iter().flatten() {
                into.push(child(alternative, field)?);
            }
        }
        if let Some(not) = raw.get("not") {
            schema.not = Some(Box::new(child(not, "not")?));
        }
        if let Some(pattern) = raw.get("pattern").and_then(Value::as_str) {
            schema.pattern = Some(Regex::new(pattern).map_err(|e| error(format!("pattern: {e}")))?);
        }
        schema.parse_extensions(raw);
        schema.parse_limits(raw);
        Ok(schema)
    }

    fn parse_extensions(&mut self, raw: &Value) {
        let flag = |name: &str| raw.get(name) == Some(&Value::Bool(true));
        let keys = || -> Vec<String> {
            let keys = raw.get("x-kubernetes-list-map-keys").and_then(Value::as_array);
            keys.into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .map(ToOwned::to_owned)
                .collect()
        };
        self.list_type = match raw.get("x-kubernetes-list-type").and_then(Value::as_str) {
            Some("map") => ListType::Map(keys()),
            Some("set") => ListType::Set,
            _ => ListType::Atomic,
        };
        self.atomic_map = raw.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic");
        self.preserve_unknown = flag("x-kubernetes-preserve-unknown-fields");
        self.int_or_string = flag("x-kubernetes-int-or-string");
        self.embedded = flag("x-kubernetes-embedded-resource");
        self.nullable = flag("nullable");
        self.default = raw.get("default").cloned();
    }

    fn parse_limits(&mut self, raw: &Value) {
        let number = |name: &str| raw.get(name).and_then(Value::as_f64);
        let count = |name: &str| raw.get(name).and_then(Value::as_u64);
        let flag = |name: &str| raw.get(name) == Some(&Value::Bool(true));
        self.required = raw
            .get("required")
            .and_then(Value::as_array)
            .map(|list| list.iter().filter_map(Value::as_str).map(ToOwned::to_owned).collect())
            .unwrap_or_default();
        self.allowed = raw.get("enum").and_then(Value::as_array).cloned().unwrap_or_default();
        self.format = raw.get("format").and_then(Value::as_str).map(ToOwned::to_owned);
        self.minimum = number("minimum").map(|v| (v, flag("exclusiveMinimum")));
        self.maximum = number("maximum").map(|v| (v, flag("exclusiveMaximum")));
        self.multiple_of = number("multipleOf");
        self.min_length = count("minLength");
        self.max_length = count("maxLength");
        self.min_items = count("minItems");
        self.max_items = count("maxItems");
        self.unique_items = flag("uniqueItems");
        self.min_properties = count("minProperties");
        self.max_properties = count("maxProperties");
    }

    /// The schema of a field, whether named or additional.
    #[must_use]
    pub fn field(&self, name: &str) -> Option<&Self> {
        self.properties.get(name).or(match &self.additional {
            Additional::Of(schema) => Some(schema),
            Additional::None | Additional::Any => None,
        })
    }
}

fn parse_type(raw: &Value) -> Result<Option<Type>, String> {
    let Some(word) = raw.get("type").and_then(Value::as_str) else {
        return Ok(None);
    };
    Ok(Some(match word {
        "object" => Type::Object,
        "array" => Type::Array,
        "string" => Type::String,
        "integer" => Type::Integer,
        "number" => Type::Number,
        "boolean" => Type::Boolean,
        other => return Err(format!("unknown type {other:?}")),
    }))
}

/// Path of a field below `path`.
fn join(path: &str, field: &str) -> String {
    if path.is_empty() {
        field.to_owned()
    } else {
        format!("{path}.{field}")
    }
}

#[cfg(test)]
mod tests;
