//! The CRD files beside the sources are what the types say, and keep to the rules of structural schemas.

use serde_json::Value;

#[test]
fn the_crd_files_are_up_to_date() {
    for (name, text) in mars_crds::generate::files() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(&name);
        let present = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            present == text,
            "crds/{name} differs from the types: run `cargo run -p mars-crds --bin crdgen`"
        );
    }
}

/// Every schema has a type (or is int-or-string), no reference, no unsigned format, and lists of objects are keyed.
#[test]
fn the_schemas_are_structural_and_without_unsigned_formats() {
    fn walk(path: &str, schema: &Value) {
        let int_or_string = schema.get("x-kubernetes-int-or-string").is_some();
        assert!(
            schema.get("type").is_some() || int_or_string,
            "{path} has no type: {schema}"
        );
        assert!(
            schema.get("$ref").is_none() && schema.get("oneOf").is_none() && schema.get("anyOf").is_none(),
            "{path}"
        );
        if let Some(format) = schema.get("format").and_then(Value::as_str) {
            assert!(!format.starts_with("uint"), "{path}: {format}");
        }
        if schema.get("x-kubernetes-list-type").is_some_and(|kind| kind == "map") {
            let items = &schema["items"];
            for key in schema["x-kubernetes-list-map-keys"].as_array().expect("keys") {
                let required = items["required"].as_array().expect("a keyed list has required fields");
                assert!(required.contains(key), "{path}: the key {key} is not required");
            }
        }
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            for (name, property) in properties {
                walk(&format!("{path}.{name}"), property);
            }
        }
        if let Some(items) = schema.get("items") {
            walk(&format!("{path}[]"), items);
        }
    }
    for crd in mars_crds::generate::crds() {
        let crd = serde_json::to_value(crd).expect("encodes");
        let version = &crd["spec"]["versions"][0];
        assert_eq!(version["subresources"]["status"], serde_json::json!({}));
        walk(
            crd["spec"]["names"]["kind"].as_str().expect("a kind"),
            &version["schema"]["openAPIV3Schema"],
        );
    }
}

/// The property that a path of plain fields leads to; a filter on a list leads to its items.
fn property<'a>(schema: &'a Value, path: &str) -> Option<&'a Value> {
    let mut at = schema;
    let mut rest = path.strip_prefix('.')?;
    while !rest.is_empty() {
        let end = rest.find(['.', '[']).unwrap_or(rest.len());
        at = &at["properties"][&rest[..end]];
        rest = &rest[end..];
        if let Some(filter) = rest.strip_prefix('[') {
            at = &at["items"];
            rest = &filter[filter.find(']')? + 1..];
        }
        rest = rest.strip_prefix('.').unwrap_or(rest);
    }
    (!at.is_null()).then_some(at)
}

#[test]
fn printer_columns_lead_to_fields_and_tell_the_positions_of_a_replica() {
    let mut names = Vec::new();
    for crd in mars_crds::generate::crds() {
        let version = serde_json::to_value(crd).expect("JSON")["spec"]["versions"][0].take();
        for column in version["additionalPrinterColumns"].as_array().expect("columns") {
            let path = column["jsonPath"].as_str().expect("a path");
            let is_meta = path.starts_with(".metadata.");
            assert!(
                is_meta || property(&version["schema"]["openAPIV3Schema"], path).is_some(),
                "{path} leads nowhere"
            );
            names.push(column["name"].as_str().unwrap_or_default().to_owned());
        }
    }
    for name in ["DURABLE", "APPLIED", "LAG-BYTES", "LAST-SEEN", "SILENT"] {
        assert!(names.iter().any(|known| known == name), "no column {name}: {names:?}");
    }
}
