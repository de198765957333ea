//! Pruning, defaulting and validation on one small schema.

use super::*;
use serde_json::json;

fn schema() -> Schema {
    Schema::parse(&json!({
        "type": "object",
        "required": ["spec"],
        "properties": {"spec": {
            "type": "object",
            "required": ["size"],
            "properties": {
                "size": {"x-kubernetes-int-or-string": true},
                "mode": {"type": "string", "enum": ["Fast", "Safe"], "default": "Safe"},
                "count": {"type": "integer", "minimum": 1, "maximum": 5},
                "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 4},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "nodes": {
                    "type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["node"],
                    "items": {"type": "object", "required": ["node"], "properties": {
                        "node": {"type": "string"},
                        "up": {"type": "boolean", "default": true}
                    }}
                }
            }
        }}
    }))
    .unwrap()
}

#[test]
fn unknown_fields_are_pruned_and_named() {
    let mut object = json!({"apiVersion": "v1", "metadata": {"name": "x"}, "spec": {
        "size": 1, "other": 2, "free": {"anything": 1}, "count": null,
        "nodes": [{"node": "a", "typo": 1}]}, "extra": 1});
    let unknown = schema().prune_object(&mut object);
    assert_eq!(unknown, ["extra", "spec.nodes[0].typo", "spec.other"]);
    assert_eq!(
        object["spec"],
        json!({"size": 1, "free": {"anything": 1}, "nodes": [{"node": "a"}]})
    );
    assert_eq!(object["metadata"]["name"], "x");
}

#[test]
fn defaults_fill_absent_fields_only() {
    let mut object = json!({"spec": {"size": 1, "nodes": [{"node": "a"}, {"node": "b", "up": false}]}});
    schema().apply_defaults(&mut object);
    assert_eq!(object["spec"]["mode"], "Safe");
    assert_eq!(
        object["spec"]["nodes"],
        json!([{"node": "a", "up": true}, {"node": "b", "up": false}])
    );
    let mut empty = json!({});
    schema().apply_defaults(&mut empty);
    assert_eq!(empty, json!({}));
}

#[test]
fn every_violation_is_reported_with_its_path() {
    let object = json!({"spec": {"mode": "Slow", "count": 9, "name": "toolong1", "labels": {"a": 1},
        "nodes": [{"node": "a"}, {"node": "a"}, {"up": "yes"}]}});
    let causes = schema().validate(&object, "");
    let got: Vec<(&str, &str)> = causes.iter().map(|c| (c.reason, c.field.as_str())).collect();
    assert_eq!(
        got,
        [
            ("FieldValueRequired", "spec.size"),
            ("FieldValueInvalid", "spec.count"),
            ("FieldValueTypeInvalid", "spec.labels.a"),
            ("FieldValueNotSupported", "spec.mode"),
            ("FieldValueTooLong", "spec.name"),
            ("FieldValueInvalid", "spec.name"),
            ("FieldValueDuplicate", "spec.nodes[1]"),
            ("FieldValueRequired", "spec.nodes[2].node"),
            ("FieldValueTypeInvalid", "spec.nodes[2].up"),
        ]
    );
    assert!(schema().validate(&json!({"spec": {"size": "1Gi"}}), "").is_empty());
}
