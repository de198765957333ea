//! Kinds from CustomResourceDefinitions.
//!
//! Invariant: a definition is taken whole or refused with the reason; a kind without a usable schema is never served.

use super::{Cell, Column, Kind, View};
use crate::jsonpath::JsonPath;
use crate::meta;
use crate::schema::{Schema, SchemaError};
use serde_json::{Value, json};
use std::sync::Arc;

/// Storage name of the definitions themselves.
pub const CRD_STORAGE: &str = "apiextensions.k8s.io/customresourcedefinitions";

/// Why a definition is refused.
#[derive(Debug, thiserror::Error)]
pub enum CrdError {
    /// A field is missing or wrong.
    #[error("{field}: {problem}")]
    Field {
        /// Path in the definition.
        field: String,
        /// What is wrong.
        problem: String,
    },
    /// A schema cannot be used.
    #[error("version {version}: {source}")]
    Schema {
        /// Which version.
        version: String,
        /// Why.
        source: SchemaError,
    },
}

fn strings(value: &Value, path: &str) -> Vec<String> {
    let list = value.pointer(path).and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(ToOwned::to_owned)
        .collect()
}

/// The kinds a definition serves, one per served version.
///
/// # Errors
/// Missing names, a name that is not `<plural>.<group>`, unusable schemas or column paths.
pub fn kinds_of(crd: &Value) -> Result<Vec<Kind>, CrdError> {
    let text = |path: &[&str]| {
        let found = meta::text(crd, path);
        if found.is_empty() {
            return Err(CrdError::Field {
                field: path.join("."),
                problem: "Required value".into(),
            });
        }
        Ok(found.to_owned())
    };
    let group = text(&["spec", "group"])?;
    let plural = text(&["spec", "names", "plural"])?;
    let kind = text(&["spec", "names", "kind"])?;
    let scope = text(&["spec", "scope"])?;
    if meta::name(crd) != format!("{plural}.{group}") {
        let problem = format!("must be spec.names.plural+\".\"+spec.group, that is {plural}.{group}");
        return Err(CrdError::Field {
            field: "metadata.name".into(),
            problem,
        });
    }
    let singular = match meta::text(crd, &["spec", "names", "singular"]) {
        "" => kind.to_lowercase(),
        name => name.to_owned(),
    };
    let versions = crd
        .pointer("/spec/versions")
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default();
    let mut kinds = Vec::new();
    for version in versions.iter().filter(|v| v["served"] != json!(false)) {
        let name = meta::text(version, &["name"]).to_owned();
        let raw = version
            .pointer("/schema/openAPIV3Schema")
            .cloned()
            .unwrap_or_else(|| json!({"type": "object"}));
        let raw = with_metadata(raw);
        let schema = Schema::parse(&raw).map_err(|source| CrdError::Schema {
            version: name.clone(),
            source,
        })?;
        kinds.push(Kind {
            storage: format!("{group}/{plural}").into(),
            columns: columns(version)?,
            has_status: version.pointer("/subresources/status").is_some(),
            schema: Arc::new(schema),
            openapi: Arc::new(raw),
            group: group.clone(),
            version: name,
            kind: kind.clone(),
            plural: plural.clone(),
            singular: singular.clone(),
            short_names: strings(crd, "/spec/names/shortNames"),
            categories: strings(crd, "/spec/names/categories"),
            namespaced: scope == "Namespaced",
            has_generation: true,
            unconditional_update: false,
            create_on_update: false,
            name_is_label: false,
            custom: true,
            selectable: selectable(version),
            view: View::Same,
        });
    }
    if kinds.is_empty() {
        return Err(CrdError::Field {
            field: "spec.versions".into(),
            problem: "no version is served".into(),
        });
    }
    Ok(kinds)
}

fn selectable(version: &Value) -> Vec<String> {
    let fields = version.get("selectableFields").and_then(Value::as_array);
    let path = |f: &Value| meta::text(f, &["jsonPath"]).trim_start_matches('.').to_owned();
    fields.into_iter().flatten().map(path).collect()
}

/// The schema with the fields every object has.
fn with_metadata(mut raw: Value) -> Value {
    let properties = meta::object_mut(
        meta::object_mut(&mut raw)
            .entry("properties")
            .or_insert_with(|| json!({})),
    );
    for field in ["apiVersion", "kind"] {
        properties.entry(field).or_insert_with(|| json!({"type": "string"}));
    }
    properties.insert("metadata".into(), super::builtin::metadata_schema());
    raw
}

fn columns(version: &Value) -> Result<Vec<Column>, CrdError> {
    let mut columns = vec![super::builtin::name_column()];
    let custom = version.get("additionalPrinterColumns").and_then(Value::as_array);
    let default = [json!({"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"})];
    for raw in custom.map_or(default.as_slice(), Vec::as_slice) {
        let path = meta::text(raw, &["jsonPath"]);
        let path = JsonPath::parse(path).map_err(|problem| CrdError::Field {
            field: format!("additionalPrinterColumns[{}].jsonPath", meta::text(raw, &["name"])),
            problem,
        })?;
        columns.push(Column {
            name: meta::text(raw, &["name"]).into(),
            ty: meta::text(raw, &["type"]).into(),
            format: meta::text(raw, &["format"]).into(),
            description: meta::text(raw, &["description"]).into(),
            priority: raw.get("priority").and_then(Value::as_i64).unwrap_or(0),
            cell: Cell::Path(path),
        });
    }
    Ok(columns)
}
