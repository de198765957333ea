//! A settled resource on three nodes, and patches to it.
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod model;

use jiff::Timestamp;
use mars_crds::{MarsAction, MarsReplica, MarsResource};
use mars_operator::{NodeView, Settings, World, with_own_status};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The moment at which every fixture plays.
pub(crate) const NOW: &str = "2030-01-01T12:00:00Z";
/// Nodes of the settled resource.
pub(crate) const NODES: [&str; 3] = ["a", "b", "c"];

/// `$RA` (replica on a), `$NA` (node a), `$U` (resource), `$D5` (designation 5), `$X1` (some id): stable uuids.
pub(crate) fn known_uuid(word: &str) -> Uuid {
    Uuid::new_v5(&Uuid::NAMESPACE_OID, word.as_bytes())
}

/// Replaces `$WORD` by its uuid.
pub(crate) fn expand(text: &str) -> String {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        result.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        result.push_str(&known_uuid(&rest[..end]).to_string());
        rest = &rest[end..];
    }
    result.push_str(rest);
    result
}

/// JSON merge patch (RFC 7396).
pub(crate) fn patched(base: &Value, patch: &Value) -> Value {
    let Value::Object(fields) = patch else {
        return patch.clone();
    };
    let mut result = base.as_object().cloned().unwrap_or_default();
    for (name, value) in fields {
        if value.is_null() {
            result.remove(name);
        } else {
            let before = result.get(name).cloned().unwrap_or(Value::Null);
            result.insert(name.clone(), patched(&before, value));
        }
    }
    Value::Object(result)
}

fn decode<T: DeserializeOwned>(what: &str, value: &Value) -> T {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{what}: {error}: {value}"))
}

fn resource() -> Value {
    json!({
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource",
        "metadata": {"name": "mydata", "generation": 3, "resourceVersion": "100", "finalizers": ["mars.storage/replicas"]},
        "spec": {"size": "1Gi", "primary": "a", "replicas": NODES.map(|node| json!({"node": node, "pool": "p"}))},
        "status": {"uuid": "$U", "designation": {
            "number": 5, "uuid": "$D5", "node": "a", "replicaUuid": "$RA", "source": "Create", "wishSeen": "a"}},
    })
}

fn replica(node: &str) -> Value {
    let primary = node == "a";
    let peers: Vec<Value> = NODES.iter().filter(|other| **other != node).map(|other| json!({
        "node": other, "nodeUuid": format!("$N{}", other.to_uppercase()), "replicaUuid": format!("$R{}", other.to_uppercase()),
        "address": format!("{other}.example:7777")})).collect();
    let epoch =
        json!({"epoch": "$E1", "parent": {"epoch": "$E0", "lsn": 0, "chain": ""}, "origin": "$RA", "cause": "Create"});
    let mut value = json!({
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica",
        "metadata": {"name": format!("mydata.{node}"), "generation": 2, "resourceVersion": "200", "finalizers": ["mars.storage/agent"]},
        "spec": {
            "resource": "mydata", "node": node, "resourceUuid": "$U", "replicaUuid": format!("$R{}", node.to_uppercase()),
            "sizeBytes": 1_i64 << 30, "backing": {"pool": "p"}, "established": true,
            "role": if primary { "Primary" } else { "Secondary" }, "designation": {"number": 5, "uuid": "$D5"},
            "designated": {"replicaUuid": "$RA", "epoch": "$E1"}, "peers": peers},
        "status": {
            "observedGeneration": 2, "role": if primary { "Primary" } else { "Secondary" }, "dataState": "Consistent",
            "state": if primary { "Primary" } else { "Replaying" }, "designation": {"number": 5, "uuid": "$D5"},
            "diskBytes": 1_i64 << 30, "lineage": [epoch],
            "positions": {"durable": {"epoch": "$E1", "lsn": 1000, "chain": "00"}, "applied": 1000, "dirtyEnd": 1000, "logStart": 0},
            "lag": {"bytes": 0, "seconds": 0}},
    });
    if primary {
        value["spec"]["cause"] = json!("Create");
        value["status"]["primaryUnder"] = json!({"number": 5, "uuid": "$D5"});
    }
    value
}

fn node(name: &str) -> Value {
    let upper = name.to_uppercase();
    json!({"silentSeconds": 2, "kubeNode": {"uid": format!("kube-{name}")}, "object": {
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsNode", "metadata": {"name": name, "resourceVersion": "300"},
        "spec": {}, "status": {
            "nodeUuid": format!("$N{upper}"), "address": format!("{name}.example:7777"), "inventoryComplete": true,
            "replicas": [{"replicaUuid": format!("$R{upper}"), "resourceUuid": "$U", "resource": "mydata", "dataState": "Consistent",
                          "designation": {"number": 5, "uuid": "$D5"}}]}}})
}

/// A replica that carries the recorded designation has been told whom it names, too, unless a fixture says otherwise.
fn told(replica: &mut Value, recorded: &Value, taken_over: bool) {
    if recorded.is_null() || replica["spec"]["designation"]["uuid"] != recorded["uuid"] {
        return;
    }
    let hands_over = ["Handover", "Demotion"]
        .iter()
        .any(|source| recorded["source"] == *source);
    let mut designated = json!({});
    if !recorded["replicaUuid"].is_null() {
        designated["replicaUuid"] = recorded["replicaUuid"].clone();
    }
    if hands_over && !taken_over && !recorded["predecessor"].is_null() {
        designated["predecessor"] = recorded["predecessor"]["replicaUuid"].clone();
    }
    let first = known_uuid("RA").to_string();
    let followed = designated.get("predecessor").or(designated.get("replicaUuid"));
    if followed.is_some_and(|followed| *followed == first) {
        designated["epoch"] = json!(known_uuid("E1"));
    }
    replica["spec"]["designated"] = designated;
}

/// The settled resource: primary on a, secondaries on b and c, designation 5 – changed by the patches in `given`
/// (`resource`, `replicas.<node>`, `nodes.<node>`, `actions[]`, `fresh`, `undecodable`, `settings`). `null` removes.
pub(crate) fn world(given: &Value) -> World {
    let given: Value = serde_json::from_str(&expand(&given.to_string())).expect("still JSON");
    let base = |value: Value| -> Value { serde_json::from_str(&expand(&value.to_string())).expect("still JSON") };
    let patch = |path: &str| given.pointer(path).cloned();
    let part = |path: String, value: Value| -> Option<Value> {
        match patch(&path) {
            Some(Value::Null) => None,
            Some(change) => Some(patched(&base(value), &change)),
            None => Some(base(value)),
        }
    };
    let resource = part("/resource".into(), resource()).expect("a resource");
    let mut names: Vec<String> = NODES.iter().map(|node| (*node).to_owned()).collect();
    for key in ["nodes", "replicas"] {
        let extra = given
            .get(key)
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(|map| map.keys().cloned());
        names.extend(extra.collect::<Vec<_>>());
    }
    names.sort();
    names.dedup();
    let mut replicas = Vec::new();
    let mut nodes = BTreeMap::new();
    for name in &names {
        if let Some(value) = part(format!("/replicas/{name}"), replica(name))
            && (NODES.contains(&name.as_str()) || given.pointer(&format!("/replicas/{name}")).is_some())
        {
            replicas.push((name.clone(), value));
        }
        let view =
            part(format!("/nodes/{name}"), node(name)).map_or_else(NodeView::default, |value| decode(name, &value));
        nodes.insert(name.clone(), view);
    }
    let recorded = &resource["status"]["designation"];
    let taken_over = replicas.iter().any(|(_, value)| {
        value["spec"]["replicaUuid"] == recorded["replicaUuid"]
            && value["status"]["primaryUnder"]["uuid"] == recorded["uuid"]
    });
    for (name, value) in &mut replicas {
        if given.pointer(&format!("/replicas/{name}/spec/designated")).is_none() {
            told(value, recorded, taken_over);
        }
    }
    let replicas = replicas.iter().map(|(name, value)| decode::<MarsReplica>(name, value));
    let action = |patch: &Value| {
        let base = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction",
            "metadata": {"name": "act", "generation": 1, "resourceVersion": "400"}, "spec": {"resource": "mydata"}});
        decode::<MarsAction>("action", &patched(&base, patch))
    };
    World {
        now: given
            .get("now")
            .and_then(Value::as_str)
            .unwrap_or(NOW)
            .parse::<Timestamp>()
            .expect("a time"),
        fresh: given.get("fresh").and_then(Value::as_bool).unwrap_or(true),
        resource: decode::<MarsResource>("resource", &resource),
        replicas: replicas.map(with_own_status).collect(),
        nodes,
        actions: given
            .get("actions")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .map(action)
            .collect(),
        undecodable: patch("/undecodable")
            .map(|list| decode("undecodable", &list))
            .unwrap_or_default(),
        positions_written: patch("/positionsWritten").map(|time| decode("positionsWritten", &time)),
        settings: patch("/settings").map_or_else(Settings::default, |value| decode("settings", &value)),
    }
}

/// A source of ids that differ from each other and from all known ones.
pub(crate) fn ids() -> impl FnMut() -> Uuid {
    let mut count = 0;
    move || {
        count += 1;
        known_uuid(&format!("new{count}"))
    }
}
