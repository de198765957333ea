//! OpenAPI documents from the registry: v3 per group and version, v2 as one document (JSON, or protobuf for old clients).
//!
//! Invariant: the schema published for a kind is the one its objects are checked against.

mod proto;

use crate::registry::{Kind, Registry};
use crate::server::{Incoming, raw};
use axum::response::Response;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// Media type of the protobuf form of v2, as kubectl 1.20 asks for it.
const V2_PROTOBUF: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// Path of a group and version: `api/v1`, `apis/<group>/<version>`.
fn group_path(kind: &Kind) -> String {
    if kind.group.is_empty() {
        format!("api/{}", kind.version)
    } else {
        format!("apis/{}/{}", kind.group, kind.version)
    }
}

/// Name of a kind's schema: its group reversed, version, kind.
fn schema_name(kind: &Kind) -> String {
    let group = if kind.group.is_empty() {
        "io.k8s.api.core".to_owned()
    } else {
        reversed(&kind.group)
    };
    format!("{group}.{}.{}", kind.version, kind.kind)
}

fn reversed(group: &str) -> String {
    let mut parts: Vec<&str> = group.split('.').collect();
    parts.reverse();
    parts.join(".")
}

fn gvk(kind: &Kind) -> Value {
    json!({"group": kind.group, "version": kind.version, "kind": kind.kind})
}

/// The index of v3 documents.
pub(crate) fn v3_index(registry: &Registry) -> Value {
    let mut paths = Map::new();
    for kind in registry.iter() {
        let path = group_path(kind);
        // The hash makes clients that keep documents fetch a changed one.
        let hash = blake3::hash(v3(registry, &path).unwrap_or_default().to_string().as_bytes()).to_hex();
        paths
            .entry(path.clone())
            .or_insert_with(|| json!({"serverRelativeURL": format!("/openapi/v3/{path}?hash={}", &hash[..16])}));
    }
    json!({"paths": paths})
}

/// The v3 document of one group and version.
pub(crate) fn v3(registry: &Registry, path: &str) -> Option<Value> {
    let kinds: Vec<&Arc<Kind>> = registry.iter().filter(|kind| group_path(kind) == path).collect();
    if kinds.is_empty() {
        return None;
    }
    let (mut schemas, mut paths) = (Map::new(), Map::new());
    for kind in kinds {
        schemas.insert(schema_name(kind), published(kind, false));
        add_paths(kind, &mut paths, "#/components/schemas/", true);
    }
    Some(
        json!({"openapi": "3.0.0", "info": {"title": "mars-local", "version": "v1"}, "paths": paths,
        "components": {"schemas": schemas}}),
    )
}

/// The v2 document in the form asked for.
pub(crate) fn v2(registry: &Registry, incoming: &Incoming) -> Response {
    let document = v2_document(registry);
    let accept = incoming
        .headers
        .get("accept")
        .and_then(|v| v.to_str().ok())
        .unwrap_or_default();
    if accept.contains("proto-openapi.spec.v2") {
        return raw(V2_PROTOBUF, proto::encode(&document));
    }
    raw("application/json", document.to_string())
}

fn v2_document(registry: &Registry) -> Value {
    let (mut definitions, mut paths) = (Map::new(), Map::new());
    for kind in registry.iter() {
        definitions.insert(schema_name(kind), published(kind, true));
        add_paths(kind, &mut paths, "#/definitions/", false);
    }
    json!({"swagger": "2.0", "info": {"title": "mars-local", "version": "v1"}, "paths": paths, "definitions": definitions})
}

/// A kind's schema as published.
fn published(kind: &Kind, for_v2: bool) -> Value {
    let mut schema = (*kind.openapi).clone();
    if for_v2 {
        to_v2(&mut schema);
    }
    crate::meta::object_mut(&mut schema).insert("x-kubernetes-group-version-kind".into(), json!([gvk(kind)]));
    schema
}

/// OpenAPI v2 has no nullable, no anyOf and the like; fields that may hold anything lose their type there, so that
/// clients which check by v2 accept what the server accepts.
fn to_v2(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            for name in ["nullable", "anyOf", "oneOf", "not"] {
                if !fields
                    .get(name)
                    .is_some_and(|v| v.is_object() && v.get("type").is_some())
                {
                    fields.remove(name);
                }
            }
            if fields.get("x-kubernetes-int-or-string") == Some(&json!(true)) {
                fields.insert("type".into(), "string".into());
                fields.insert("format".into(), "int-or-string".into());
            }
            if fields.get("x-kubernetes-preserve-unknown-fields") == Some(&json!(true))
                && !fields.contains_key("properties")
            {
                fields.remove("additionalProperties");
            }
            fields.values_mut().for_each(to_v2);
        }
        Value::Array(list) => list.iter_mut().for_each(to_v2),
        _ => {}
    }
}

fn add_paths(kind: &Kind, paths: &mut Map<String, Value>, prefix: &str, v3: bool) {
    let base = if kind.namespaced {
        format!("/{}/namespaces/{{namespace}}/{}", group_path(kind), kind.plural)
    } else {
        format!("/{}/{}", group_path(kind), kind.plural)
    };
    let operation = |action: &str, verb: &str, parameters: &[&str]| {
        let parameter = |name: &&str| {
            if v3 {
                json!({"name": name, "in": "query", "schema": {"type": "string"}})
            } else {
                json!({"name": name, "in": "query", "type": "string"})
            }
        };
        let schema = json!({"$ref": format!("{prefix}{}", schema_name(kind))});
        let response = if v3 {
            json!({"description": "OK", "content": {"application/json": {"schema": schema}}})
        } else {
            json!({"description": "OK", "schema": schema})
        };
        json!({"operationId": format!("{verb}{}{}", kind.kind, kind.version), "x-kubernetes-action": action,
            "x-kubernetes-group-version-kind": gvk(kind), "responses": {"200": response},
            "parameters": parameters.iter().map(parameter).collect::<Vec<_>>()})
    };
    let write = ["dryRun", "fieldManager", "fieldValidation"];
    let list = operation(
        "list",
        "list",
        &["labelSelector", "fieldSelector", "limit", "continue", "watch"],
    );
    paths.insert(
        base.clone(),
        json!({"get": list, "post": operation("post", "create", &write)}),
    );
    paths.insert(
        format!("{base}/{{name}}"),
        json!({
            "get": operation("get", "read", &[]),
            "put": operation("put", "replace", &write),
            "patch": operation("patch", "patch", &["dryRun", "fieldManager", "fieldValidation", "force"]),
            "delete": operation("delete", "delete", &["dryRun", "propagationPolicy"]),
        }),
    );
}
