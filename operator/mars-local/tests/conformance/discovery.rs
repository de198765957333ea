//! Discovery and OpenAPI, as kube clients read them.

use crate::target::{GROUP, Target};
use kube::discovery::{Discovery, Scope, verbs};
use serde_json::Value;

async fn raw(target: &Target, path: &str, accept: &str) -> Value {
    let request = http::Request::get(path)
        .header("accept", accept)
        .body(Vec::new())
        .unwrap();
    serde_json::from_str(&target.client.request_text(request).await.unwrap()).unwrap()
}

#[tokio::test]
async fn discovery_finds_every_kind_with_scope_verbs_and_status() {
    let target = Target::start().await;
    let discovery = Discovery::new(target.client.clone()).run().await.unwrap();
    let gvk = kube::core::GroupVersionKind::gvk(GROUP, "v1", "Widget");
    let (resource, capabilities) = discovery.resolve_gvk(&gvk).expect("the test kind is found");
    assert_eq!(
        (resource.plural.as_str(), capabilities.scope.clone()),
        ("widgets", Scope::Cluster)
    );
    for verb in [
        verbs::GET,
        verbs::LIST,
        verbs::WATCH,
        verbs::PATCH,
        verbs::DELETE_COLLECTION,
    ] {
        assert!(capabilities.supports_operation(verb), "{verb}");
    }
    assert!(capabilities.subresources.iter().any(|(sub, _)| sub.plural == "status"));
    for (group, version, kind, scope) in [
        ("", "v1", "Node", Scope::Cluster),
        ("", "v1", "Namespace", Scope::Cluster),
        ("", "v1", "Event", Scope::Namespaced),
        ("", "v1", "Secret", Scope::Namespaced),
        ("", "v1", "ConfigMap", Scope::Namespaced),
        ("coordination.k8s.io", "v1", "Lease", Scope::Namespaced),
        ("events.k8s.io", "v1", "Event", Scope::Namespaced),
        ("apiextensions.k8s.io", "v1", "CustomResourceDefinition", Scope::Cluster),
    ] {
        let gvk = kube::core::GroupVersionKind::gvk(group, version, kind);
        let (_, capabilities) = discovery.resolve_gvk(&gvk).unwrap_or_else(|| panic!("{gvk:?}"));
        assert_eq!(capabilities.scope, scope, "{gvk:?}");
    }
    target.finish().await;
}

#[tokio::test]
async fn aggregated_discovery_says_the_same() {
    let target = Target::start().await;
    if target.embedded.is_none() {
        eprintln!("left out: needs a server with apidiscovery.k8s.io/v2");
        return target.finish().await;
    }
    let body = raw(
        &target,
        "/apis",
        "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList",
    )
    .await;
    let groups = body["items"].as_array().unwrap();
    let ours = groups.iter().find(|group| group["metadata"]["name"] == GROUP).unwrap();
    let resource = &ours["versions"][0]["resources"][0];
    assert_eq!(
        (resource["resource"].as_str(), resource["scope"].as_str()),
        (Some("widgets"), Some("Cluster"))
    );
    assert_eq!(resource["subresources"][0]["subresource"], "status");
    target.finish().await;
}

#[tokio::test]
async fn openapi_describes_the_test_kind() {
    let target = Target::start().await;
    let find = |schemas: &Value| {
        let found = schemas
            .as_object()
            .unwrap()
            .values()
            .find(|schema| schema["x-kubernetes-group-version-kind"][0]["kind"] == "Widget");
        found.expect("the schema of the test kind").clone()
    };
    let v2 = raw(&target, "/openapi/v2", "application/json").await;
    assert_eq!(
        find(&v2["definitions"])["properties"]["spec"]["properties"]["size"]["type"],
        "integer"
    );
    if target.embedded.is_some() {
        let index = raw(&target, "/openapi/v3", "application/json").await;
        let url = index["paths"][format!("apis/{GROUP}/v1")]["serverRelativeURL"]
            .as_str()
            .unwrap()
            .to_owned();
        let v3 = raw(&target, &url, "application/json").await;
        assert_eq!(
            find(&v3["components"]["schemas"])["properties"]["spec"]["required"][0],
            "size"
        );
    }
    target.finish().await;
}

#[tokio::test]
async fn the_version_and_health_are_served() {
    let target = Target::start().await;
    let version = target.client.apiserver_version().await.unwrap();
    assert_eq!(version.major, "1");
    let request = http::Request::get("/healthz").body(Vec::new()).unwrap();
    assert_eq!(target.client.request_text(request).await.unwrap(), "ok");
    target.finish().await;
}
