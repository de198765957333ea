//! The built-in kinds: schemas generated from the Kubernetes API types, columns as the real API prints them.
//!
//! Invariant: only kinds something in a MARS cluster uses are here; each behaves as its real counterpart does in what it
//! serves (status separation, generation, unconditional updates).

use super::{Cell, Column, Kind, View};
use crate::meta;
use crate::schema::Schema;
use crate::table::age;
use schemars::JsonSchema;
use serde_json::{Map, Value, json};
use std::sync::{Arc, LazyLock};

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Event, Namespace, Node, Pod, Secret};
use k8s_openapi::api::events::v1::Event as NewEvent;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

/// Lists whose entries are identified by fields, as (path in the object, keys); the generated schemas do not say it.
const KEYED_LISTS: [(&str, &[&str]); 9] = [
    ("metadata.ownerReferences", &["uid"]),
    ("status.conditions", &["type"]),
    ("status.addresses", &["type"]),
    ("spec.containers", &["name"]),
    ("spec.initContainers", &["name"]),
    ("spec.volumes", &["name"]),
    ("spec.tolerations", &["key"]),
    ("spec.imagePullSecrets", &["name"]),
    ("status.podIPs", &["ip"]),
];
/// Lists of distinct scalars.
const SETS: [&str; 2] = ["metadata.finalizers", "spec.podCIDRs"];

static METADATA: LazyLock<Value> = LazyLock::new(|| {
    let mut whole = json!({"type": "object", "properties": {"metadata": generate::<ObjectMeta>()}});
    annotate(&mut whole);
    whole["properties"]["metadata"].take()
});

/// The schema of `metadata`, with list types.
pub(super) fn metadata_schema() -> Value {
    METADATA.clone()
}

/// The schema of a Kubernetes type, self-contained.
fn generate<T: JsonSchema>() -> Value {
    let settings = schemars::generate::SchemaSettings::openapi3().with(|s| s.inline_subschemas = true);
    let mut schema = settings.into_generator().into_root_schema_for::<T>().to_value();
    meta::object_mut(&mut schema).retain(|name, _| !matches!(name.as_str(), "$schema" | "title" | "components"));
    open_bare_objects(&mut schema);
    schema
}

/// A generated map without fields (raw JSON, `FieldsV1`) may hold anything; pruning has to know.
fn open_bare_objects(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            let bare = fields.get("type") == Some(&json!("object"))
                && !fields.contains_key("properties")
                && !fields.contains_key("additionalProperties");
            if bare {
                fields.insert("x-kubernetes-preserve-unknown-fields".into(), true.into());
            }
            fields.values_mut().for_each(open_bare_objects);
        }
        Value::Array(list) => list.iter_mut().for_each(open_bare_objects),
        _ => {}
    }
}

fn annotate(schema: &mut Value) {
    let property = |schema: &mut Value, path: &str, edit: &dyn Fn(&mut Map<String, Value>)| {
        let pointer = format!("/properties/{}", path.replace('.', "/properties/"));
        if let Some(Value::Object(list)) = schema.pointer_mut(&pointer) {
            edit(list);
        }
    };
    for (path, keys) in KEYED_LISTS {
        property(schema, path, &|list| {
            list.insert("x-kubernetes-list-type".into(), "map".into());
            list.insert("x-kubernetes-list-map-keys".into(), json!(keys));
            list.insert("x-kubernetes-patch-merge-key".into(), json!(keys[0]));
            list.insert("x-kubernetes-patch-strategy".into(), "merge".into());
        });
    }
    for path in SETS {
        property(schema, path, &|list| {
            list.insert("x-kubernetes-list-type".into(), "set".into());
            list.insert("x-kubernetes-patch-strategy".into(), "merge".into());
        });
    }
}

/// The first column of every kind.
pub(super) fn name_column() -> Column {
    Column {
        name: "Name".into(),
        ty: "string".into(),
        format: "name".into(),
        description: "Name must be unique within a namespace.".into(),
        priority: 0,
        cell: Cell::Code(|object| meta::name(object).into()),
    }
}

fn column(name: &str, priority: i64, cell: fn(&Value) -> Value) -> Column {
    Column {
        name: name.into(),
        ty: "string".into(),
        format: String::new(),
        description: name.into(),
        priority,
        cell: Cell::Code(cell),
    }
}

fn age_column() -> Column {
    column("Age", 0, |object| {
        age(meta::text(object, &["metadata", "creationTimestamp"])).into()
    })
}

struct Draft {
    group: &'static str,
    kind: &'static str,
    plural: &'static str,
    short: &'static [&'static str],
    namespaced: bool,
    schema: Value,
    columns: Vec<Column>,
}

fn build(draft: Draft) -> Kind {
    let Draft {
        group,
        kind,
        plural,
        short,
        namespaced,
        mut schema,
        columns,
    } = draft;
    let properties = meta::object_mut(&mut schema)
        .entry("properties")
        .or_insert_with(|| json!({}));
    meta::object_mut(properties).insert("metadata".into(), metadata_schema());
    annotate(&mut schema);
    // The generated types require fields that the real API defaults or checks elsewhere.
    meta::object_mut(&mut schema).remove("required");
    let parsed = Schema::parse(&schema).expect("schemas generated from the API types are usable; a test parses all");
    let mut all = vec![name_column()];
    all.extend(columns);
    Kind {
        group: group.into(),
        version: "v1".into(),
        kind: kind.into(),
        plural: plural.into(),
        singular: kind.to_lowercase(),
        short_names: short.iter().map(|s| (*s).to_owned()).collect(),
        categories: Vec::new(),
        namespaced,
        storage: format!("{}/{plural}", if group.is_empty() { "core" } else { group }).into(),
        schema: Arc::new(parsed),
        openapi: Arc::new(schema),
        has_status: false,
        has_generation: false,
        unconditional_update: true,
        create_on_update: false,
        name_is_label: false,
        custom: false,
        columns: all,
        selectable: Vec::new(),
        view: View::Same,
    }
}

/// All built-in kinds.
#[must_use]
pub fn kinds() -> Vec<Kind> {
    vec![
        namespace(),
        node(),
        config_map(),
        secret(),
        pod(),
        event(),
        new_event(),
        lease(),
        definition(),
    ]
}

fn namespace() -> Kind {
    let columns = vec![
        column("Status", 0, |o| meta::text(o, &["status", "phase"]).into()),
        age_column(),
    ];
    let draft = Draft {
        group: "",
        kind: "Namespace",
        plural: "namespaces",
        short: &["ns"],
        namespaced: false,
        schema: generate::<Namespace>(),
        columns,
    };
    Kind {
        has_status: true,
        name_is_label: true,
        ..build(draft)
    }
}

fn node() -> Kind {
    let columns = vec![
        column("Status", 0, node_status),
        column("Roles", 0, node_roles),
        age_column(),
        column("Version", 0, |o| {
            meta::text(o, &["status", "nodeInfo", "kubeletVersion"]).into()
        }),
        column("Internal-IP", 1, |o| node_address(o, "InternalIP")),
        column("External-IP", 1, |o| node_address(o, "ExternalIP")),
        column("OS-Image", 1, |o| {
            or_unknown(meta::text(o, &["status", "nodeInfo", "osImage"]))
        }),
        column("Kernel-Version", 1, |o| {
            or_unknown(meta::text(o, &["status", "nodeInfo", "kernelVersion"]))
        }),
        column("Container-Runtime", 1, |o| {
            or_unknown(meta::text(o, &["status", "nodeInfo", "containerRuntimeVersion"]))
        }),
    ];
    let draft = Draft {
        group: "",
        kind: "Node",
        plural: "nodes",
        short: &["no"],
        namespaced: false,
        schema: generate::<Node>(),
        columns,
    };
    Kind {
        has_status: true,
        selectable: vec!["spec.unschedulable".into()],
        ..build(draft)
    }
}

fn or_unknown(text: &str) -> Value {
    if text.is_empty() {
        "<unknown>".into()
    } else {
        text.into()
    }
}

fn node_status(node: &Value) -> Value {
    let conditions = node.pointer("/status/conditions").and_then(Value::as_array);
    let ready = conditions
        .into_iter()
        .flatten()
        .find(|c| c["type"] == "Ready")
        .map(|c| meta::text(c, &["status"]));
    let mut words = vec![match ready {
        Some("True") => "Ready",
        Some(_) => "NotReady",
        None => "Unknown",
    }];
    if node.pointer("/spec/unschedulable") == Some(&Value::Bool(true)) {
        words.push("SchedulingDisabled");
    }
    words.join(",").into()
}

fn node_roles(node: &Value) -> Value {
    let labels = meta::map(node, &["metadata", "labels"]);
    let roles: Vec<&str> = labels
        .keys()
        .filter_map(|l| l.strip_prefix("node-role.kubernetes.io/"))
        .collect();
    if roles.is_empty() {
        "<none>".into()
    } else {
        roles.join(",").into()
    }
}

fn node_address(node: &Value, ty: &str) -> Value {
    let addresses = node.pointer("/status/addresses").and_then(Value::as_array);
    let found = addresses
        .into_iter()
        .flatten()
        .find(|a| a["type"] == ty)
        .map(|a| meta::text(a, &["address"]));
    found.unwrap_or("<none>").into()
}

fn config_map() -> Kind {
    let count = |o: &Value| (meta::map(o, &["data"]).len() + meta::map(o, &["binaryData"]).len()).into();
    let columns = vec![column("Data", 0, count), age_column()];
    build(Draft {
        group: "",
        kind: "ConfigMap",
        plural: "configmaps",
        short: &["cm"],
        namespaced: true,
        schema: generate::<ConfigMap>(),
        columns,
    })
}

fn secret() -> Kind {
    let columns = vec![
        column("Type", 0, |o| meta::text(o, &["type"]).into()),
        column("Data", 0, |o| meta::map(o, &["data"]).len().into()),
        age_column(),
    ];
    let draft = Draft {
        group: "",
        kind: "Secret",
        plural: "secrets",
        short: &[],
        namespaced: true,
        schema: generate::<Secret>(),
        columns,
    };
    Kind {
        selectable: vec!["type".into()],
        ..build(draft)
    }
}

/// Pods never run here; the kind is served because clients ask for the pods of a node.
fn pod() -> Kind {
    let columns = vec![
        column("Ready", 0, |_| "0/0".into()),
        column("Status", 0, |o| meta::text(o, &["status", "phase"]).into()),
        column("Restarts", 0, |_| "0".into()),
        age_column(),
    ];
    let draft = Draft {
        group: "",
        kind: "Pod",
        plural: "pods",
        short: &["po"],
        namespaced: true,
        schema: generate::<Pod>(),
        columns,
    };
    Kind {
        has_status: true,
        selectable: vec!["spec.nodeName".into(), "status.phase".into()],
        ..build(draft)
    }
}

fn event_columns() -> Vec<Column> {
    vec![
        column("Last Seen", 0, |o| age(event_last_seen(o)).into()),
        column("Type", 0, |o| meta::text(o, &["type"]).into()),
        column("Reason", 0, |o| meta::text(o, &["reason"]).into()),
        column("Object", 0, |o| {
            let (kind, name) = (
                meta::text(o, &["involvedObject", "kind"]),
                meta::text(o, &["involvedObject", "name"]),
            );
            format!("{}/{name}", kind.to_lowercase()).into()
        }),
        column("Subobject", 1, |o| {
            meta::text(o, &["involvedObject", "fieldPath"]).into()
        }),
        column("Source", 1, |o| match meta::text(o, &["source", "component"]) {
            "" => meta::text(o, &["reportingComponent"]).into(),
            component => component.into(),
        }),
        column("Message", 0, |o| meta::text(o, &["message"]).trim().into()),
        column("First Seen", 1, |o| match meta::text(o, &["firstTimestamp"]) {
            "" => age(meta::text(o, &["eventTime"])).into(),
            time => age(time).into(),
        }),
        column("Count", 1, |o| {
            let count = |path: &str| o.pointer(path).and_then(Value::as_i64).filter(|n| *n > 0);
            count("/series/count").or(count("/count")).unwrap_or(1).into()
        }),
        Column {
            priority: 1,
            ..name_column()
        },
    ]
}

fn event_last_seen(event: &Value) -> &str {
    [
        &["series", "lastObservedTime"][..],
        &["lastTimestamp"],
        &["eventTime"],
        &["metadata", "creationTimestamp"],
    ]
    .iter()
    .map(|path| meta::text(event, path))
    .find(|time| !time.is_empty())
    .unwrap_or_default()
}

fn event() -> Kind {
    let draft = Draft {
        group: "",
        kind: "Event",
        plural: "events",
        short: &["ev"],
        namespaced: true,
        schema: generate::<Event>(),
        columns: Vec::new(),
    };
    let parts = [
        "kind",
        "namespace",
        "name",
        "uid",
        "apiVersion",
        "resourceVersion",
        "fieldPath",
    ];
    let mut selectable: Vec<String> = parts.iter().map(|part| format!("involvedObject.{part}")).collect();
    selectable.extend(["reason", "reportingComponent", "source", "type"].map(ToOwned::to_owned));
    Kind {
        columns: event_columns(),
        create_on_update: true,
        selectable,
        ..build(draft)
    }
}

fn new_event() -> Kind {
    let draft = Draft {
        group: "events.k8s.io",
        kind: "Event",
        plural: "events",
        short: &["ev"],
        namespaced: true,
        schema: generate::<NewEvent>(),
        columns: Vec::new(),
    };
    let parts = [
        "kind",
        "namespace",
        "name",
        "uid",
        "apiVersion",
        "resourceVersion",
        "fieldPath",
    ];
    let mut selectable: Vec<String> = parts.iter().map(|part| format!("regarding.{part}")).collect();
    selectable.extend(["reason", "reportingController", "type"].map(ToOwned::to_owned));
    let storage: Arc<str> = "core/events".into();
    Kind {
        columns: event_columns(),
        create_on_update: true,
        selectable,
        storage,
        view: View::NewEvents,
        ..build(draft)
    }
}

/// Field names of an Event: (core v1, events.k8s.io/v1).
const EVENT_NAMES: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
    ("reportingComponent", "reportingController"),
];

/// Renames the fields of an Event between its two API groups.
pub(super) fn rename_event(event: &mut Value, to_core: bool) {
    let fields = meta::object_mut(event);
    for (core, new) in EVENT_NAMES {
        let (from, to) = if to_core { (new, core) } else { (core, new) };
        if let Some(value) = fields.remove(from) {
            fields.insert(to.into(), value);
        }
    }
}

/// The fieldSelector name of core v1 for one of events.k8s.io/v1.
pub(crate) fn core_event_field(field: &str) -> String {
    let (first, rest) = field.split_once('.').unwrap_or((field, ""));
    let core = EVENT_NAMES
        .iter()
        .find(|(_, new)| *new == first)
        .map_or(first, |(core, _)| core);
    if rest.is_empty() {
        core.to_owned()
    } else {
        format!("{core}.{rest}")
    }
}

fn lease() -> Kind {
    let columns = vec![
        column("Holder", 0, |o| meta::text(o, &["spec", "holderIdentity"]).into()),
        age_column(),
    ];
    let draft = Draft {
        group: "coordination.k8s.io",
        kind: "Lease",
        plural: "leases",
        short: &[],
        namespaced: true,
        schema: generate::<Lease>(),
        columns,
    };
    Kind {
        unconditional_update: false,
        create_on_update: true,
        ..build(draft)
    }
}

/// CustomResourceDefinitions; their schema is recursive, so it is checked by parsing, not by a schema of its own.
fn definition() -> Kind {
    let schema = json!({"type": "object", "description": "Defines a custom resource.", "properties": {
        "apiVersion": {"type": "string"}, "kind": {"type": "string"},
        "spec": {"type": "object", "x-kubernetes-preserve-unknown-fields": true},
        "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}}});
    let created = column("Created At", 0, |o| {
        meta::text(o, &["metadata", "creationTimestamp"]).into()
    });
    let draft = Draft {
        group: "apiextensions.k8s.io",
        kind: "CustomResourceDefinition",
        plural: "customresourcedefinitions",
        short: &["crd", "crds"],
        namespaced: false,
        schema,
        columns: vec![created],
    };
    Kind {
        has_status: true,
        has_generation: true,
        ..build(draft)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_built_in_schema_parses_and_knows_its_keyed_lists() {
        let all = kinds();
        assert_eq!(all.len(), 9);
        let node = all.iter().find(|k| k.kind == "Node").unwrap();
        let conditions = node.schema.field("status").and_then(|s| s.field("conditions")).unwrap();
        assert_eq!(conditions.list_type, crate::schema::ListType::Map(vec!["type".into()]));
        let node =
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "a", "labels": {"x": "y"}}, "spec": {}});
        assert_eq!(
            all.iter()
                .find(|k| k.kind == "Node")
                .unwrap()
                .schema
                .validate(&node, ""),
            vec![]
        );
    }
}
