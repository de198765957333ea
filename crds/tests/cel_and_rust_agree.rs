//! Objects that CEL rules and the Rust checks must judge alike: each row is a patch to a good object.

use kube::core::cel::Validator;
use mars_crds::{MarsAction, MarsReplica, MarsResource, generate, validate};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

const UUID: &str = "6a0e4e9e-6b0f-4c0b-9a55-0d5a1fd6d0a1";
const OTHER_UUID: &str = "0b6ad3b5-1a6e-4e86-a7ff-5f4c7a3c0e11";

/// JSON merge patch (RFC 7396), enough for tests.
fn patched(base: &Value, patch: &Value) -> Value {
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

fn schema(kind: &str) -> Value {
    let crd = generate::crds()
        .into_iter()
        .find(|crd| crd.spec.names.kind == kind)
        .expect("the kind exists");
    serde_json::to_value(crd).expect("encodes")["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// CEL plus the keywords (`pattern`, `maxLength`, …) of the schema, as an API server would judge.
fn api_server_refuses(schema: &Value, new: &Value, old: Option<&Value>) -> Option<String> {
    if let Some(message) = keyword_problem("", schema, new) {
        return Some(message);
    }
    Validator::new()
        .validate(schema, new, old)
        .err()
        .map(|errors| format!("{errors:?}"))
}

fn keyword_problem(path: &str, schema: &Value, value: &Value) -> Option<String> {
    if let Some(text) = value.as_str() {
        let pattern = schema.get("pattern").and_then(Value::as_str);
        if pattern.is_some_and(|pattern| !regex::Regex::new(pattern).expect("a pattern").is_match(text)) {
            return Some(format!("{path}: {text:?} does not match"));
        }
        let longest = schema.get("maxLength").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let shortest = schema.get("minLength").and_then(Value::as_u64).unwrap_or(0);
        if !(shortest..=longest).contains(&(text.len() as u64)) {
            return Some(format!("{path}: length"));
        }
    }
    if let Some(list) = value.as_array() {
        let most = schema.get("maxItems").and_then(Value::as_u64).unwrap_or(u64::MAX);
        let least = schema.get("minItems").and_then(Value::as_u64).unwrap_or(0);
        if !(least..=most).contains(&(list.len() as u64)) {
            return Some(format!("{path}: number of items"));
        }
        if let Some(key) = schema
            .get("x-kubernetes-list-map-keys")
            .and_then(|keys| keys[0].as_str())
        {
            let mut seen = std::collections::BTreeSet::new();
            if !list.iter().all(|item| seen.insert(item[key].to_string())) {
                return Some(format!("{path}: key twice"));
            }
        }
        return list
            .iter()
            .find_map(|item| keyword_problem(&format!("{path}[]"), &schema["items"], item));
    }
    let properties = schema.get("properties")?.as_object()?;
    properties.iter().find_map(|(name, property)| {
        value
            .get(name)
            .and_then(|value| keyword_problem(&format!("{path}.{name}"), property, value))
    })
}

type Check<T> = fn(&T, Option<&T>) -> Vec<validate::Problem>;

fn judge<T: DeserializeOwned>(kind: &str, base: &Value, check: Check<T>, rows: &[(&str, Value, bool)]) {
    let schema = schema(kind);
    let decode = |value: &Value| -> T { serde_json::from_value(value.clone()).expect("decodes") };
    for (name, patch, good) in rows {
        let (patch, old) = match patch.get("then") {
            Some(then) => (then, Some(patched(base, &patch["first"]))),
            None => (patch, None),
        };
        let new = patched(base, patch);
        let cel = api_server_refuses(&schema, &new, old.as_ref());
        let rust = check(&decode(&new), old.as_ref().map(decode).as_ref());
        assert_eq!(cel.is_none(), *good, "{kind} {name}: API server says {cel:?}");
        assert_eq!(rust.is_empty(), *good, "{kind} {name}: Rust says {rust:?}");
    }
}

#[test]
fn resources_are_judged_alike() {
    let base = json!({
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource", "metadata": {"name": "mydata"},
        "spec": {"size": "1Gi", "primary": "a", "replicas": [{"node": "a", "device": "/dev/sda"}, {"node": "b", "pool": "main"}]},
    });
    let replicas = |list: Value| json!({"spec": {"replicas": list}});
    let many: Vec<Value> = (0..17)
        .map(|i| json!({"node": if i == 0 { "a".into() } else { format!("n{i}") }, "pool": "p"}))
        .collect();
    judge::<MarsResource>(
        "MarsResource",
        &base,
        validate::resource,
        &[
            ("as it is", json!({}), true),
            ("a name with a dot", json!({"metadata": {"name": "my.data"}}), false),
            ("a name in capitals", json!({"metadata": {"name": "Mydata"}}), false),
            ("a long name", json!({"metadata": {"name": "x".repeat(64)}}), false),
            ("no primary", json!({"spec": {"primary": ""}}), true),
            ("a primary that is no member", json!({"spec": {"primary": "c"}}), false),
            ("attached to a member", json!({"spec": {"attachedTo": "b"}}), true),
            ("attached elsewhere", json!({"spec": {"attachedTo": "c"}}), false),
            ("an odd size", json!({"spec": {"size": "1000001"}}), false),
            ("a size as a number", json!({"spec": {"size": 1_073_741_824}}), true),
            ("a tiny size", json!({"spec": {"size": "64Ki"}}), false),
            ("a size that is none", json!({"spec": {"size": "big"}}), false),
            ("a fractional size", json!({"spec": {"size": "1.5Gi"}}), false),
            ("growing", json!({"first": {}, "then": {"spec": {"size": "2Gi"}}}), true),
            (
                "shrinking",
                json!({"first": {}, "then": {"spec": {"size": "512Mi"}}}),
                false,
            ),
            ("no replicas", json!({"spec": {"primary": "", "replicas": []}}), false),
            ("too many replicas", replicas(Value::Array(many)), false),
            (
                "a node twice",
                replicas(json!([{"node": "a", "pool": "p"}, {"node": "a", "pool": "q"}])),
                false,
            ),
            (
                "device and pool",
                replicas(json!([{"node": "a", "pool": "p", "device": "/dev/sda"}])),
                false,
            ),
            ("neither", replicas(json!([{"node": "a"}])), false),
            (
                "a relative device",
                replicas(json!([{"node": "a", "device": "sda"}])),
                false,
            ),
            (
                "a device elsewhere",
                replicas(json!([{"node": "a", "device": "/etc/passwd"}])),
                false,
            ),
            (
                "a device that climbs",
                replicas(json!([{"node": "a", "device": "/dev/../etc/passwd"}])),
                false,
            ),
            (
                "a device by id",
                replicas(json!([{"node": "a", "device": "/dev/disk/by-id/wwn-0x5000:1"}])),
                true,
            ),
            (
                "another device",
                json!({"first": {}, "then": replicas(json!([{"node": "a", "device": "/dev/sdb"}]))}),
                false,
            ),
            (
                "from device to pool",
                json!({"first": {}, "then": replicas(json!([{"node": "a", "pool": "p"}]))}),
                false,
            ),
            (
                "a member leaves",
                json!({"first": {}, "then": replicas(json!([{"node": "a", "device": "/dev/sda"}]))}),
                true,
            ),
            (
                "a bad limit",
                json!({"spec": {"limits": {"syncPerSecond": "fast"}}}),
                false,
            ),
            (
                "a bad retention",
                json!({"spec": {"retention": {"maxLog": "-1"}}}),
                false,
            ),
        ],
    );
}

#[test]
fn replicas_are_judged_alike() {
    let base = json!({
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsReplica", "metadata": {"name": "mydata.a"},
        "spec": {"resource": "mydata", "node": "a", "resourceUuid": UUID, "replicaUuid": OTHER_UUID, "sizeBytes": 1_048_576,
                 "backing": {"pool": "p"}, "designation": {"number": 5, "uuid": UUID}},
    });
    judge::<MarsReplica>(
        "MarsReplica",
        &base,
        validate::replica,
        &[
            ("as it is", json!({}), true),
            ("primary with designation", json!({"spec": {"role": "Primary"}}), true),
            (
                "primary without designation",
                json!({"spec": {"role": "Primary", "designation": null}}),
                false,
            ),
            (
                "both backings",
                json!({"spec": {"backing": {"device": "/dev/sda"}}}),
                false,
            ),
            (
                "another identity",
                json!({"first": {}, "then": {"spec": {"replicaUuid": UUID}}}),
                false,
            ),
            (
                "a lower number",
                json!({"first": {}, "then": {"spec": {"designation": {"number": 4}}}}),
                false,
            ),
            (
                "a higher number",
                json!({"first": {}, "then": {"spec": {"designation": {"number": 6}}}}),
                true,
            ),
            (
                "no designation any more",
                json!({"first": {}, "then": {"spec": {"designation": null}}}),
                false,
            ),
            (
                "smaller",
                json!({"first": {}, "then": {"spec": {"sizeBytes": 524_288}}}),
                false,
            ),
        ],
    );
}

#[test]
fn actions_are_judged_alike() {
    let base = json!({
        "apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction", "metadata": {"name": "do-it"},
        "spec": {"verb": "Failover", "resource": "mydata", "node": "b", "acknowledge": UUID,
                 "deadlineSeconds": 600, "ttlSeconds": 60},
    });
    let verb = |verb: &str| json!({"spec": {"verb": verb}});
    judge::<MarsAction>(
        "MarsAction",
        &base,
        validate::action,
        &[
            ("as it is", json!({}), true),
            ("without acknowledge", json!({"spec": {"acknowledge": null}}), false),
            ("without node", json!({"spec": {"node": null}}), false),
            (
                "handover needs no acknowledge",
                json!({"spec": {"verb": "Handover", "acknowledge": null}}),
                true,
            ),
            (
                "rotate needs no node",
                json!({"spec": {"verb": "RotateLog", "acknowledge": null, "node": null}}),
                true,
            ),
            ("resolve", verb("Resolve"), false),
            ("verify", verb("Verify"), false),
            ("exit emergency", verb("ExitEmergency"), false),
            ("a change", json!({"first": {}, "then": {"spec": {"node": "c"}}}), false),
        ],
    );
}

#[test]
fn a_dangerous_action_must_acknowledge_the_resource_it_harms() {
    let action = |verb: &str, acknowledge: Option<&str>| -> MarsAction {
        serde_json::from_value(json!({
            "apiVersion": "mars.storage/v1alpha1", "kind": "MarsAction", "metadata": {"name": "x"},
            "spec": {"verb": verb, "resource": "mydata", "node": "b", "acknowledge": acknowledge},
        }))
        .expect("decodes")
    };
    let uuid = UUID.parse().expect("a uuid");
    assert!(validate::acknowledge(&action("Failover", Some(UUID)), uuid).is_ok());
    let problem = validate::acknowledge(&action("Failover", Some(OTHER_UUID)), uuid).expect_err("another resource");
    assert!(problem.message.contains("kubectl get marsresource mydata"), "{problem}");
    assert!(validate::acknowledge(&action("Invalidate", None), uuid).is_err());
    assert!(validate::acknowledge(&action("Handover", None), uuid).is_ok());
}
