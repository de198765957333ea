//! Ownership as server-side apply promises it.

use super::*;

fn schema() -> Schema {
    Schema::parse(&json!({"type": "object", "properties": {
        "metadata": {"type": "object", "properties": {"labels": {"type": "object", "additionalProperties": {"type": "string"}}}},
        "spec": {"type": "object", "properties": {
            "size": {"type": "integer"}, "mode": {"type": "string"},
            "tags": {"type": "array", "x-kubernetes-list-type": "set", "items": {"type": "string"}},
            "nodes": {"type": "array", "x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["node"],
                "items": {"type": "object", "properties": {"node": {"type": "string"}, "disk": {"type": "string"}}}}}},
        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}
    }}))
    .unwrap()
}

fn who(name: &str) -> Manager<'_> {
    Manager {
        name,
        api_version: "test.io/v1",
        status: false,
        has_status: true,
    }
}

fn config(spec: &Value) -> Value {
    json!({"apiVersion": "test.io/v1", "kind": "Widget", "metadata": {"name": "w"}, "spec": spec})
}

#[test]
fn a_field_no_longer_applied_goes_unless_another_manager_owns_it() {
    let schema = schema();
    let one = apply(
        None,
        &config(&json!({"size": 1, "mode": "x", "tags": ["p", "q"]})),
        &schema,
        &who("a"),
        false,
    )
    .unwrap();
    let two = apply(
        Some(&one),
        &config(&json!({"size": 1, "tags": ["q"]})),
        &schema,
        &who("b"),
        false,
    )
    .unwrap();
    let three = apply(Some(&two), &config(&json!({})), &schema, &who("a"), false).unwrap();
    assert_eq!(three["spec"], json!({"size": 1, "tags": ["q"]}));
}

#[test]
fn a_conflict_names_field_and_owner_and_force_takes_the_field() {
    let schema = schema();
    let one = apply(None, &config(&json!({"size": 1})), &schema, &who("a"), false).unwrap();
    let error = apply(Some(&one), &config(&json!({"size": 2})), &schema, &who("b"), false).unwrap_err();
    assert_eq!(error.code, 409);
    assert!(
        error.message.contains("conflict with \"a\": .spec.size"),
        "{}",
        error.message
    );
    let two = apply(Some(&one), &config(&json!({"size": 2})), &schema, &who("b"), true).unwrap();
    assert_eq!(two["spec"]["size"], 2);
    let entries = read(&two);
    assert_eq!(entries.len(), 1, "a owns nothing any more: {entries:?}");
}

#[test]
fn list_entries_are_owned_by_key() {
    let schema = schema();
    let one = apply(
        None,
        &config(&json!({"nodes": [{"node": "x", "disk": "1"}]})),
        &schema,
        &who("a"),
        false,
    )
    .unwrap();
    let two = apply(
        Some(&one),
        &config(&json!({"nodes": [{"node": "y", "disk": "2"}]})),
        &schema,
        &who("b"),
        false,
    )
    .unwrap();
    assert_eq!(two["spec"]["nodes"].as_array().unwrap().len(), 2);
    let three = apply(Some(&two), &config(&json!({})), &schema, &who("a"), false).unwrap();
    assert_eq!(three["spec"]["nodes"], json!([{"node": "y", "disk": "2"}]));
}

#[test]
fn an_update_takes_over_what_it_changed_and_a_later_apply_conflicts() {
    let schema = schema();
    let one = apply(
        None,
        &config(&json!({"size": 1, "mode": "x"})),
        &schema,
        &who("a"),
        false,
    )
    .unwrap();
    let mut two = one.clone();
    two["spec"]["size"] = 5.into();
    record_update(Some(&one), &mut two, &schema, &who("editor"));
    let error = apply(
        Some(&two),
        &config(&json!({"size": 1, "mode": "x"})),
        &schema,
        &who("a"),
        false,
    )
    .unwrap_err();
    assert!(
        error
            .message
            .contains("conflict with \"editor\" using test.io/v1: .spec.size"),
        "{}",
        error.message
    );
}

#[test]
fn applying_the_same_twice_changes_nothing() {
    let schema = schema();
    let applied = config(&json!({"size": 1, "nodes": [{"node": "x"}]}));
    let one = apply(None, &applied, &schema, &who("a"), false).unwrap();
    let two = apply(Some(&one), &applied, &schema, &who("a"), false).unwrap();
    assert_eq!(one, two);
}
