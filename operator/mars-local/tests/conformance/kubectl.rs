//! The real kubectl: every command that the guides of MARS use.

use crate::target::{GROUP, Target};
use kube::api::DeleteParams;
use kube::api::PatchParams;
use serde_json::json;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt as _, BufReader};

fn manifest(target: &Target, of: &str, spec: &serde_json::Value) -> String {
    json!({"apiVersion": format!("{GROUP}/v1"), "kind": "Widget",
        "metadata": {"name": target.name(of), "labels": {"made-by": target.mark().split_once('=').unwrap().1}}, "spec": spec})
    .to_string()
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

#[tokio::test]
async fn apply_creates_configures_and_leaves_unchanged() {
    let target = Target::start().await;
    let small = manifest(&target, "k", &json!({"size": 1, "nodes": [{"node": "a"}]}));
    let large = manifest(&target, "k", &json!({"size": 2}));
    assert!(target.ok_with(&["apply", "-f", "-"], &small).await.contains(" created"));
    assert!(
        target
            .ok_with(&["apply", "-f", "-"], &small)
            .await
            .contains(" unchanged")
    );
    assert!(
        target
            .ok_with(&["apply", "-f", "-"], &large)
            .await
            .contains(" configured")
    );
    let name = target.name("k");
    let nodes = target
        .ok(&["get", "widget", &name, "-o", "jsonpath={.spec.nodes}{.spec.size}"])
        .await;
    assert_eq!(nodes, "2", "what is no longer in the manifest goes");
    let dry = manifest(&target, "k", &json!({"size": 3}));
    assert!(
        target
            .ok_with(&["apply", "--dry-run=server", "-f", "-"], &dry)
            .await
            .contains("server dry run")
    );
    assert_eq!(
        target.ok(&["get", "wdg", &name, "-o", "jsonpath={.spec.size}"]).await,
        "2"
    );
    target.finish().await;
}

#[tokio::test]
async fn apply_on_the_server_tells_conflicts() {
    let target = Target::start().await;
    let one = manifest(&target, "ssa", &json!({"size": 1}));
    let two = manifest(&target, "ssa", &json!({"size": 2}));
    let apply = ["apply", "--server-side", "-f", "-", "--field-manager"];
    let with = |manager| [&apply[..], &[manager]].concat();
    assert!(target.ok_with(&with("one"), &one).await.contains("serverside-applied"));
    let said = target.fails(&with("two"), &two).await;
    assert!(said.contains("conflict with \"one\": .spec.size"), "{said}");
    target
        .ok_with(&[&with("two")[..], &["--force-conflicts"]].concat(), &two)
        .await;
    assert_eq!(
        target
            .ok(&["get", "wdg", &target.name("ssa"), "-o", "jsonpath={.spec.size}"])
            .await,
        "2"
    );
    target.finish().await;
}

#[tokio::test]
async fn get_prints_the_columns_of_the_definition() {
    let target = Target::start().await;
    let name = target.name("col");
    target
        .ok_with(
            &["create", "-f", "-"],
            &manifest(&target, "col", &json!({"size": 7, "mode": "Fast"})),
        )
        .await;
    let status =
        json!({"status": {"conditions": [{"type": "Other", "status": "False"}, {"type": "Ready", "status": "True"}]}});
    let patch = kube::api::Patch::Merge(&status);
    target
        .widgets()
        .patch_status(&name, &PatchParams::default(), &patch)
        .await
        .unwrap();
    let table = target.ok(&["get", "widgets", "-l", &target.mark()]).await;
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(words(lines[0]), ["NAME", "SIZE", "READY", "AGE"]);
    assert_eq!(words(lines[1])[..3], [name.as_str(), "7", "True"]);
    assert!(words(lines[1])[3].ends_with('s'), "an age in seconds: {table}");
    let wide = target.ok(&["get", "wdg", &name, "-o", "wide", "--no-headers"]).await;
    assert_eq!(words(&wide)[..4], [name.as_str(), "7", "True", "Fast"]);
    assert_eq!(
        target.ok(&["get", "wdg", &name, "-o", "name"]).await.trim(),
        format!("widget.{GROUP}/{name}")
    );
    let yaml = target.ok(&["get", "wdg", &name, "-o", "yaml"]).await;
    assert!(
        yaml.contains("mode: Fast") && yaml.contains("resourceVersion:"),
        "{yaml}"
    );
    let json = target.ok(&["get", "wdg", "-l", &target.mark(), "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["items"][0]["spec"]["size"], 7);
    assert_eq!(
        target
            .ok(&["get", "gadgets", "-l", &target.mark(), "-o", "name"])
            .await
            .trim(),
        format!("widget.{GROUP}/{name}")
    );
    let custom = target
        .ok(&["get", "wdg", &name, "-o", "custom-columns=S:.spec.size", "--no-headers"])
        .await;
    assert_eq!(custom.trim(), "7");
    target.finish().await;
}

#[tokio::test]
async fn refusals_read_as_they_do_from_a_real_cluster() {
    let target = Target::start().await;
    let absent = target.fails(&["get", "wdg", "absent"], "").await;
    assert!(
        absent.contains(&format!(
            "Error from server (NotFound): widgets.{GROUP} \"absent\" not found"
        )),
        "{absent}"
    );
    let bad = manifest(&target, "bad", &json!({"size": 300, "mode": "Slow"}));
    let invalid = target.fails(&["create", "--validate=false", "-f", "-"], &bad).await;
    assert!(
        invalid.contains(&format!("The Widget \"{}\" is invalid:", target.name("bad"))),
        "{invalid}"
    );
    assert!(
        invalid.contains("spec.mode: Unsupported value: \"Slow\": supported values: \"Fast\", \"Safe\""),
        "{invalid}"
    );
    let unknown = manifest(&target, "bad", &json!({"size": 3, "sizze": 4}));
    let strict = target.fails(&["apply", "-f", "-"], &unknown).await;
    assert!(strict.contains("sizze"), "{strict}");
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "twice", &json!({"size": 1})))
        .await;
    let twice = target
        .fails(&["create", "-f", "-"], &manifest(&target, "twice", &json!({"size": 1})))
        .await;
    assert!(twice.contains("(AlreadyExists)"), "{twice}");
    assert!(
        target
            .fails(&["get", "gizmos"], "")
            .await
            .contains("the server doesn't have a resource type \"gizmos\"")
    );
    target.finish().await;
}

#[tokio::test]
async fn patch_label_annotate_and_edit_change_objects() {
    let target = Target::start().await;
    let name = target.name("p");
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "p", &json!({"size": 1})))
        .await;
    let wdg = ["wdg", name.as_str()];
    target
        .ok(&[&["patch"][..], &wdg, &["--type=merge", "-p", r#"{"spec":{"size":2}}"#]].concat())
        .await;
    let json_patch = r#"[{"op":"replace","path":"/spec/size","value":3}]"#;
    target
        .ok(&[&["patch"][..], &wdg, &["--type=json", "-p", json_patch]].concat())
        .await;
    target.ok(&[&["label"][..], &wdg, &["color=red"]].concat()).await;
    target.ok(&[&["annotate"][..], &wdg, &["note=a text"]].concat()).await;
    let editor = target.scratch().join("editor");
    std::fs::write(&editor, "#!/bin/sh\nsed -i 's/size: 3/size: 4/' \"$1\"\n").unwrap();
    std::fs::set_permissions(&editor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut edit = tokio::process::Command::from(target.kubectl());
    let edited = edit
        .arg("edit")
        .args(wdg)
        .env("KUBE_EDITOR", &editor)
        .output()
        .await
        .unwrap();
    assert!(edited.status.success(), "{edited:?}");
    let template = "jsonpath={.spec.size} {.metadata.labels.color} {.metadata.annotations.note} {.metadata.generation}";
    assert_eq!(
        target.ok(&["get", "wdg", &name, "-o", template]).await,
        "4 red a text 4"
    );
    target.ok(&[&["label"][..], &wdg, &["color-"]].concat()).await;
    assert_eq!(
        target
            .ok(&["get", "wdg", &name, "-o", "jsonpath={.metadata.labels.color}"])
            .await,
        ""
    );
    target.finish().await;
}

#[tokio::test]
async fn wait_ends_when_a_condition_a_value_or_a_deletion_comes() {
    let target = Target::start().await;
    let name = target.name("w");
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "w", &json!({"size": 1})))
        .await;
    let object = format!("wdg/{name}");
    let late = async {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        let status = json!({"status": {"phase": "Up", "conditions": [{"type": "Ready", "status": "True"}]}});
        let patch = kube::api::Patch::Merge(&status);
        target
            .widgets()
            .patch_status(&name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    };
    let waits = ["wait", &object, "--for=condition=Ready", "--timeout=30s"];
    let (said, ()) = tokio::join!(target.ok(&waits), late);
    assert!(said.contains("condition met"), "{said}");
    let by_value = ["wait", &object, "--for=jsonpath={.status.phase}=Up", "--timeout=30s"];
    let (success, said) = target.run(&by_value).await;
    // kubectl before 1.23 has no such wait.
    assert!(success || said.contains("unrecognized condition"), "{said}");
    let expired = target
        .fails(&["wait", &object, "--for=condition=Never", "--timeout=1s"], "")
        .await;
    assert!(expired.contains("timed out"), "{expired}");
    let late = async {
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        target.widgets().delete(&name, &DeleteParams::default()).await.unwrap();
    };
    let waits = ["wait", &object, "--for=delete", "--timeout=30s"];
    tokio::join!(target.ok(&waits), late);
    target.finish().await;
}

#[tokio::test]
async fn get_watch_prints_changes_as_they_come() {
    let target = Target::start().await;
    let name = target.name("live");
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "live", &json!({"size": 1})))
        .await;
    // A list: for a single name kubectl watches from "now" and leaves out the first event, which is then whatever came between.
    let only = format!("metadata.name={name}");
    let mut command = tokio::process::Command::from(target.kubectl());
    command
        .args(["get", "wdg", "--field-selector", &only, "--watch"])
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut line = async || {
        let next = tokio::time::timeout(crate::target::LIMIT, lines.next_line())
            .await
            .expect("a line comes");
        next.unwrap().expect("the watch goes on")
    };
    assert!(line().await.starts_with("NAME"));
    assert_eq!(words(&line().await)[1], "1");
    for size in [2, 3] {
        let patch = kube::api::Patch::Merge(json!({"spec": {"size": size}}));
        target
            .widgets()
            .patch(&name, &PatchParams::default(), &patch)
            .await
            .unwrap();
        assert_eq!(words(&line().await)[1], size.to_string());
    }
    child.kill().await.unwrap();
    target.finish().await;
}

#[tokio::test]
async fn delete_waits_for_finalizers() {
    let target = Target::start().await;
    let name = target.name("fin");
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "fin", &json!({"size": 1})))
        .await;
    target
        .ok(&[
            "patch",
            "wdg",
            &name,
            "--type=merge",
            "-p",
            r#"{"metadata":{"finalizers":["test.io/x"]}}"#,
        ])
        .await;
    target.ok(&["delete", "wdg", &name, "--wait=false"]).await;
    assert_ne!(
        target
            .ok(&["get", "wdg", &name, "-o", "jsonpath={.metadata.deletionTimestamp}"])
            .await,
        ""
    );
    let release = async {
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        let patch = kube::api::Patch::Merge(json!({"metadata": {"finalizers": null}}));
        target
            .widgets()
            .patch(&name, &PatchParams::default(), &patch)
            .await
            .unwrap();
    };
    let object = format!("wdg/{name}");
    let waits = ["wait", &object, "--for=delete", "--timeout=30s"];
    tokio::join!(target.ok(&waits), release);
    target
        .ok_with(&["create", "-f", "-"], &manifest(&target, "fg", &json!({"size": 1})))
        .await;
    target
        .ok(&[
            "delete",
            "wdg",
            &target.name("fg"),
            "--cascade=foreground",
            "--timeout=30s",
        ])
        .await;
    let gone = target.ok(&["get", "wdg", "-l", &target.mark(), "-o", "name"]).await;
    assert_eq!(gone.trim(), "");
    target.finish().await;
}

#[tokio::test]
async fn describe_shows_the_object_and_its_events() {
    let target = Target::start().await;
    let name = target.name("desc");
    let made = target.create("desc").await;
    let event = json!({"apiVersion": "v1", "kind": "Event", "metadata": {"name": target.name("ev"), "namespace": "default"},
        "involvedObject": {"apiVersion": format!("{GROUP}/v1"), "kind": "Widget", "name": name, "uid": made.metadata.uid},
        "type": "Warning", "reason": "TooSmall", "message": "size 1 is very small", "count": 3,
        "source": {"component": "conformance"},
        "firstTimestamp": "2026-01-02T03:04:05Z", "lastTimestamp": "2026-01-02T03:04:05Z"});
    target.ok_with(&["create", "-f", "-"], &event.to_string()).await;
    let said = target.ok(&["describe", "wdg", &name]).await;
    for part in ["Size:", "Safe", "TooSmall", "size 1 is very small"] {
        assert!(said.contains(part), "{part} in:\n{said}");
    }
    let events = target
        .ok(&[
            "get",
            "events",
            "-n",
            "default",
            "--field-selector",
            &format!("involvedObject.name={name}"),
        ])
        .await;
    let lines: Vec<&str> = events.lines().collect();
    assert_eq!(words(lines[0]), ["LAST", "SEEN", "TYPE", "REASON", "OBJECT", "MESSAGE"]);
    assert!(
        lines[1].contains(&format!("widget/{name}")) && lines[1].contains("Warning"),
        "{events}"
    );
    assert!(
        target
            .ok(&["describe", "namespace", "default"])
            .await
            .contains("Active")
    );
    target
        .ok(&["delete", "event", "-n", "default", &target.name("ev")])
        .await;
    target.finish().await;
}

#[tokio::test]
async fn explain_and_api_resources_know_the_kinds() {
    let target = Target::start().await;
    let spec = target.ok(&["explain", "widget.spec"]).await;
    assert!(
        spec.contains("What is wanted.") && spec.contains("Size in pieces."),
        "{spec}"
    );
    let conditions = target.ok(&["explain", "node.status.conditions"]).await;
    assert!(conditions.contains("lastTransitionTime"), "{conditions}");
    let resources = target.ok(&["api-resources"]).await;
    let line = resources
        .lines()
        .find(|line| line.starts_with("widgets "))
        .expect("widgets are listed");
    assert!(line.contains("wdg") && line.contains("Widget"), "{line}");
    let versions = target.ok(&["api-versions"]).await;
    assert!(versions.lines().any(|line| line == format!("{GROUP}/v1")), "{versions}");
    target.finish().await;
}

#[tokio::test]
async fn built_in_kinds_have_their_usual_tables() {
    let target = Target::start().await;
    let (name, map) = (target.name("ns"), target.name("map"));
    target.ok(&["create", "namespace", &name]).await;
    target
        .ok(&["create", "configmap", &map, "-n", &name, "--from-literal=a=b"])
        .await;
    target
        .ok(&["create", "secret", "generic", &map, "-n", &name, "--from-literal=a=b"])
        .await;
    let maps = target.ok(&["get", "cm", &map, "-n", &name, "--no-headers"]).await;
    assert_eq!(words(&maps)[..2], [map.as_str(), "1"]);
    let secrets = target.ok(&["get", "secret", &map, "-n", &name, "--no-headers"]).await;
    assert_eq!(words(&secrets)[..3], [map.as_str(), "Opaque", "1"]);
    let everywhere = target.ok(&["get", "cm", "-A", "--no-headers"]).await;
    assert!(
        everywhere
            .lines()
            .any(|line| words(line)[..2] == [name.as_str(), map.as_str()]),
        "{everywhere}"
    );
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": target.name("node")}});
    target.ok_with(&["apply", "-f", "-"], &node.to_string()).await;
    let taints = [
        "taint",
        "node",
        &target.name("node"),
        "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute",
    ];
    target.ok(&taints).await;
    let nodes = target.ok(&["get", "nodes", &target.name("node")]).await;
    assert_eq!(
        words(nodes.lines().next().unwrap()),
        ["NAME", "STATUS", "ROLES", "AGE", "VERSION"]
    );
    target.ok(&["delete", "node", &target.name("node")]).await;
    target.ok(&["delete", "namespace", &name, "--timeout=60s"]).await;
    target.finish().await;
}
