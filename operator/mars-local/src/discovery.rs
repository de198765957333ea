//! Discovery: which groups, versions and resources there are, and everything else that is no object.
//!
//! Invariant: what discovery lists is exactly what the registry serves at that moment.

use crate::error::ApiError;
use crate::openapi;
use crate::registry::{Kind, Registry};
use crate::server::{Api, Incoming, Route, raw};
use axum::http::Method;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The Kubernetes version this API behaves like; clients choose features by it.
const MINOR: &str = "32";

/// Answers a route that is no object.
pub(crate) fn answer(api: &Api, incoming: &Incoming, route: &Route) -> Response {
    if !matches!(incoming.method, Method::GET | Method::HEAD) {
        return ApiError::method_not_allowed().into_response();
    }
    let registry = api.registry();
    let body = match route {
        Route::Version => version(),
        Route::Health => return raw("text/plain", "ok"),
        Route::CoreVersions if incoming.accept.aggregated => return aggregated(&registry, true),
        Route::Groups if incoming.accept.aggregated => return aggregated(&registry, false),
        Route::CoreVersions => json!({"kind": "APIVersions", "versions": ["v1"],
            "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": "127.0.0.1"}]}),
        Route::Groups => {
            let groups: Vec<Value> = registry.groups().into_iter().map(|(name, v)| group(name, &v)).collect();
            json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        }
        Route::Group(name) => match registry.groups().get(name.as_str()) {
            Some(versions) => {
                let mut body = group(name, versions);
                body["kind"] = "APIGroup".into();
                body["apiVersion"] = "v1".into();
                body
            }
            None => return ApiError::no_such_path().into_response(),
        },
        Route::Resources { group, version } => {
            let kinds = registry.resources(group, version);
            if kinds.is_empty() {
                return ApiError::no_such_path().into_response();
            }
            let name = kinds[0].api_version();
            let resources: Vec<Value> = kinds.iter().flat_map(|kind| resources(kind)).collect();
            json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": name, "resources": resources})
        }
        Route::OpenApiV2 => return openapi::v2(&registry, incoming),
        Route::OpenApiV3 => openapi::v3_index(&registry),
        Route::OpenApiV3Of(path) => match openapi::v3(&registry, path) {
            Some(body) => body,
            None => return ApiError::no_such_path().into_response(),
        },
        Route::Objects(_) => return ApiError::no_such_path().into_response(),
    };
    raw("application/json", body.to_string())
}

fn version() -> Value {
    json!({"major": "1", "minor": MINOR, "gitVersion": format!("v1.{MINOR}.0+mars-local"), "gitCommit": "",
        "gitTreeState": "clean", "buildDate": "1970-01-01T00:00:00Z", "goVersion": "", "compiler": "rustc",
        "platform": "linux/amd64"})
}

/// Versions in order of preference: the newest stable first.
fn group(name: &str, versions: &[&str]) -> Value {
    let list: Vec<Value> = versions
        .iter()
        .rev()
        .map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v}))
        .collect();
    json!({"name": name, "versions": list, "preferredVersion": list[0]})
}

fn resources(kind: &Kind) -> Vec<Value> {
    let mut resource = json!({"name": kind.plural, "singularName": kind.singular, "namespaced": kind.namespaced,
        "kind": kind.kind, "verbs": kind.verbs(), "storageVersionHash": ""});
    if !kind.short_names.is_empty() {
        resource["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        resource["categories"] = json!(kind.categories);
    }
    let mut all = vec![resource];
    if kind.has_status {
        all.push(
            json!({"name": format!("{}/status", kind.plural), "singularName": "", "namespaced": kind.namespaced,
            "kind": kind.kind, "verbs": ["get", "patch", "update"]}),
        );
    }
    all
}

/// Everything in one answer, for clients that ask for it.
fn aggregated(registry: &Registry, core: bool) -> Response {
    let mut groups: BTreeMap<&str, BTreeMap<&str, Vec<&Arc<Kind>>>> = BTreeMap::new();
    for kind in registry.iter().filter(|kind| kind.group.is_empty() == core) {
        groups
            .entry(&kind.group)
            .or_default()
            .entry(&kind.version)
            .or_default()
            .push(kind);
    }
    let items: Vec<Value> = groups
        .iter()
        .map(|(group, versions)| {
            let versions: Vec<Value> = versions
                .iter()
                .rev()
                .map(|(version, kinds)| {
                    let resources: Vec<Value> = kinds.iter().map(|kind| aggregated_resource(kind)).collect();
                    json!({"version": version, "freshness": "Current", "resources": resources})
                })
                .collect();
            let metadata = if group.is_empty() {
                json!({})
            } else {
                json!({"name": group})
            };
            json!({"metadata": metadata, "versions": versions})
        })
        .collect();
    let body = json!({"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items});
    raw(
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
        body.to_string(),
    )
}

fn aggregated_resource(kind: &Kind) -> Value {
    let response_kind = json!({"group": kind.group, "version": kind.version, "kind": kind.kind});
    let mut resource = json!({"resource": kind.plural, "responseKind": response_kind,
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" }, "singularResource": kind.singular,
        "verbs": kind.verbs()});
    if !kind.short_names.is_empty() {
        resource["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        resource["categories"] = json!(kind.categories);
    }
    if kind.has_status {
        resource["subresources"] =
            json!([{"subresource": "status", "responseKind": response_kind, "verbs": ["get", "patch", "update"]}]);
    }
    resource
}
