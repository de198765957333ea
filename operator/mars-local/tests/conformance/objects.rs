//! Single objects and lists, as kube clients use them.

use crate::target::{GROUP, Target, refusal, until};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Node, Secret};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, ValidationDirective};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};
use std::collections::BTreeSet;

#[tokio::test]
async fn create_sets_what_only_the_server_sets() {
    let target = Target::start().await;
    let mut wanted = target.widget("new", &json!({"size": 3}));
    wanted.metadata.uid = Some("made-up".into());
    wanted.metadata.generation = Some(77);
    wanted.data["status"] = json!({"phase": "made up"});
    let made = target.widgets().create(&PostParams::default(), &wanted).await.unwrap();
    assert_ne!(made.uid().unwrap(), "made-up");
    assert_eq!(made.metadata.generation, Some(1));
    assert!(made.creation_timestamp().is_some() && made.resource_version().is_some());
    assert_eq!(
        made.data["spec"],
        json!({"size": 3, "mode": "Safe"}),
        "the default is filled in"
    );
    assert_eq!(made.data.get("status"), None, "status is not set by a create");
    let read = target.widgets().get(&made.name_any()).await.unwrap();
    assert_eq!(read.resource_version(), made.resource_version());
    target.finish().await;
}

#[tokio::test]
async fn refusals_are_typed_statuses() {
    let target = Target::start().await;
    let made = target.create("one").await;
    let widgets = target.widgets();
    let twice = refusal(
        widgets
            .create(&PostParams::default(), &target.widget("one", &json!({"size": 1})))
            .await,
    );
    assert_eq!((twice.code, twice.reason.as_str()), (409, "AlreadyExists"));
    assert_eq!(
        twice.message,
        format!("widgets.{GROUP} \"{}\" already exists", made.name_any())
    );
    let absent = refusal(widgets.get("absent").await);
    assert_eq!((absent.code, absent.reason.as_str()), (404, "NotFound"));
    let details = absent.details.unwrap();
    assert_eq!(
        (details.name.as_str(), details.kind.as_str(), details.group.as_str()),
        ("absent", "widgets", GROUP)
    );
    let other = target.widgets();
    let patched = refusal(
        other
            .patch("absent", &PatchParams::default(), &Patch::Merge(json!({})))
            .await,
    );
    assert_eq!(patched.code, 404);
    let unknown_kind = kube::core::ApiResource::from_gvk_with_plural(
        &kube::core::GroupVersionKind::gvk(GROUP, "v1", "Gizmo"),
        "gizmos",
    );
    let api: Api<kube::api::DynamicObject> = Api::all_with(target.client.clone(), &unknown_kind);
    assert_eq!(refusal(api.list(&ListParams::default()).await).code, 404);
    target.finish().await;
}

#[tokio::test]
async fn a_stale_resource_version_is_a_conflict_and_changes_nothing() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let first = target.create("contended").await;
    let mut mine = first.clone();
    mine.data["spec"]["size"] = 2.into();
    let second = widgets
        .replace(&first.name_any(), &PostParams::default(), &mine)
        .await
        .unwrap();
    let mut theirs = first.clone();
    theirs.data["spec"]["size"] = 3.into();
    let conflict = refusal(
        widgets
            .replace(&first.name_any(), &PostParams::default(), &theirs)
            .await,
    );
    assert_eq!((conflict.code, conflict.reason.as_str()), (409, "Conflict"));
    assert!(
        conflict.message.contains("the object has been modified"),
        "{}",
        conflict.message
    );
    let stale_patch = json!({"metadata": {"resourceVersion": first.resource_version()}, "spec": {"size": 4}});
    let patched = widgets
        .patch(&first.name_any(), &PatchParams::default(), &Patch::Merge(stale_patch))
        .await;
    assert_eq!(refusal(patched).code, 409);
    let now = widgets.get(&first.name_any()).await.unwrap();
    assert_eq!(
        (now.data["spec"]["size"].clone(), now.resource_version()),
        (json!(2), second.resource_version())
    );
    target.finish().await;
}

#[tokio::test]
async fn of_many_writers_that_read_the_same_version_exactly_one_succeeds() {
    let target = Target::start().await;
    let first = target.create("race").await;
    let attempts = (0..16).map(|i| {
        let (widgets, mut mine) = (target.widgets(), first.clone());
        mine.data["spec"]["size"] = (10 + i).into();
        async move { widgets.replace(&mine.name_any(), &PostParams::default(), &mine).await }
    });
    let outcomes = futures::future::join_all(attempts).await;
    let won = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert_eq!(won, 1, "{outcomes:?}");
    target.finish().await;
}

#[tokio::test]
async fn an_update_of_a_custom_resource_needs_a_resource_version() {
    let target = Target::start().await;
    let made = target.create("blind").await;
    let mut blind = made.clone();
    blind.metadata.resource_version = None;
    let refused = refusal(
        target
            .widgets()
            .replace(&made.name_any(), &PostParams::default(), &blind)
            .await,
    );
    assert_eq!(refused.code, 422);
    assert!(
        refused.message.contains("metadata.resourceVersion"),
        "{}",
        refused.message
    );
    target.finish().await;
}

#[tokio::test]
async fn generation_counts_changes_of_the_spec_only() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("counted").await.name_any();
    let patch = |value: Value| {
        let (widgets, name) = (widgets.clone(), name.clone());
        async move {
            widgets
                .patch(&name, &PatchParams::default(), &Patch::Merge(value))
                .await
                .unwrap()
        }
    };
    assert_eq!(
        patch(json!({"metadata": {"annotations": {"a": "b"}}}))
            .await
            .metadata
            .generation,
        Some(1)
    );
    let changed = patch(json!({"spec": {"size": 2}})).await;
    assert_eq!(changed.metadata.generation, Some(2));
    let same = patch(json!({"spec": {"size": 2}})).await;
    assert_eq!(
        same.resource_version(),
        changed.resource_version(),
        "no change, no new version"
    );
    let status = Patch::Merge(json!({"status": {"phase": "Up"}}));
    let told = widgets
        .patch_status(&name, &PatchParams::default(), &status)
        .await
        .unwrap();
    assert_eq!(told.metadata.generation, Some(2));
    assert_ne!(told.resource_version(), changed.resource_version());
    target.finish().await;
}

#[tokio::test]
async fn status_and_spec_are_written_separately() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let mut made = target.create("split").await;
    let name = made.name_any();
    made.data["spec"]["size"] = 9.into();
    made.data["status"] = json!({"phase": "Up"});
    let by_status = widgets
        .replace_status(&name, &PostParams::default(), &made)
        .await
        .unwrap();
    assert_eq!(
        by_status.data["spec"]["size"], 1,
        "a status update does not touch the spec"
    );
    assert_eq!(by_status.data["status"]["phase"], "Up");
    let mut next = by_status.clone();
    next.data["spec"]["size"] = 5.into();
    next.data["status"] = json!({"phase": "Down"});
    let by_spec = widgets.replace(&name, &PostParams::default(), &next).await.unwrap();
    assert_eq!(
        (
            by_spec.data["spec"]["size"].clone(),
            by_spec.data["status"]["phase"].clone()
        ),
        (json!(5), json!("Up"))
    );
    target.finish().await;
}

#[tokio::test]
async fn unknown_fields_are_pruned_or_refused_when_strict() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let odd = target.widget(
        "odd",
        &json!({"size": 1, "sizze": 2, "nodes": [{"node": "a", "disc": "x"}]}),
    );
    let strict = PostParams {
        field_manager: None,
        dry_run: false,
    };
    let made = widgets.create(&strict, &odd).await.unwrap();
    assert_eq!(
        made.data["spec"],
        json!({"size": 1, "mode": "Safe", "nodes": [{"node": "a"}]})
    );
    let parameters = PatchParams {
        field_validation: Some(ValidationDirective::Strict),
        ..PatchParams::default()
    };
    let refused = widgets
        .patch(
            &made.name_any(),
            &parameters,
            &Patch::Merge(json!({"spec": {"sizze": 2}})),
        )
        .await;
    let refused = refusal(refused);
    assert!(refused.code == 400 || refused.code == 422, "{refused:?}");
    assert!(
        refused.message.contains("unknown field \"spec.sizze\""),
        "{}",
        refused.message
    );
    target.finish().await;
}

#[tokio::test]
async fn every_violation_of_the_schema_is_a_cause_and_nothing_is_stored() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let bad = target.widget("bad", &json!({"size": 300, "mode": "Slow", "nodes": [{"disk": "x"}]}));
    let refused = refusal(widgets.create(&PostParams::default(), &bad).await);
    assert_eq!((refused.code, refused.reason.as_str()), (422, "Invalid"));
    let fields: BTreeSet<String> = refused
        .details
        .unwrap()
        .causes
        .into_iter()
        .map(|cause| cause.field)
        .collect();
    for field in ["spec.size", "spec.mode", "spec.nodes[0].node"] {
        assert!(fields.contains(field), "{field} in {fields:?}");
    }
    let wrong_type = target.widget("bad", &json!({"size": "three"}));
    let refused = refusal(widgets.create(&PostParams::default(), &wrong_type).await);
    assert_eq!(refused.code, 422);
    assert!(
        refused.message.contains("must be of type integer"),
        "{}",
        refused.message
    );
    assert!(widgets.get_opt(&target.name("bad")).await.unwrap().is_none());
    let mut nameless = target.widget("x", &json!({"size": 1}));
    nameless.metadata.name = Some("Not_A_Name".into());
    assert_eq!(
        refusal(widgets.create(&PostParams::default(), &nameless).await).code,
        422
    );
    target.finish().await;
}

#[tokio::test]
async fn a_dry_run_answers_as_if_and_changes_nothing() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let dry = PostParams {
        dry_run: true,
        field_manager: None,
    };
    let shown = widgets
        .create(&dry, &target.widget("dry", &json!({"size": 4})))
        .await
        .unwrap();
    assert_eq!(shown.data["spec"]["mode"], "Safe");
    assert!(widgets.get_opt(&shown.name_any()).await.unwrap().is_none());
    let made = target.create("wet").await;
    let parameters = PatchParams {
        dry_run: true,
        ..PatchParams::default()
    };
    let patch = Patch::Merge(json!({"spec": {"size": 7}}));
    let shown = widgets.patch(&made.name_any(), &parameters, &patch).await.unwrap();
    assert_eq!(shown.data["spec"]["size"], 7);
    assert_eq!(
        widgets.get(&made.name_any()).await.unwrap().resource_version(),
        made.resource_version()
    );
    target.finish().await;
}

#[tokio::test]
async fn generated_names_are_distinct() {
    let target = Target::start().await;
    let mut template = target.widget("x", &json!({"size": 1}));
    template.metadata.name = None;
    template.metadata.generate_name = Some(format!("{}-", target.name("gen")));
    let mut names = BTreeSet::new();
    for _ in 0..5 {
        let name = target
            .widgets()
            .create(&PostParams::default(), &template)
            .await
            .unwrap()
            .name_any();
        assert!(
            name.starts_with(&target.name("gen")) && name.len() == target.name("gen").len() + 6,
            "{name}"
        );
        names.insert(name);
    }
    assert_eq!(names.len(), 5);
    target.finish().await;
}

#[tokio::test]
async fn selectors_select() {
    let target = Target::start().await;
    let widgets = target.widgets();
    for (of, color) in [("s1", "red"), ("s2", "blue"), ("s3", "red")] {
        let mut widget = target.widget(of, &json!({"size": 1}));
        widget.labels_mut().insert("color".into(), color.into());
        widgets.create(&PostParams::default(), &widget).await.unwrap();
    }
    let mark = target.mark();
    let names = |parameters: ListParams| {
        let widgets = widgets.clone();
        async move {
            widgets
                .list(&parameters)
                .await
                .unwrap()
                .items
                .iter()
                .map(ResourceExt::name_any)
                .collect::<Vec<_>>()
        }
    };
    let red = names(ListParams::default().labels(&format!("{mark},color=red"))).await;
    assert_eq!(red, [target.name("s1"), target.name("s3")]);
    let sets = names(ListParams::default().labels(&format!("{mark},color in (blue,green)"))).await;
    assert_eq!(sets, [target.name("s2")]);
    let not = names(ListParams::default().labels(&format!("{mark},color!=red"))).await;
    assert_eq!(not, [target.name("s2")]);
    let one = names(ListParams::default().fields(&format!("metadata.name={}", target.name("s2")))).await;
    assert_eq!(one, [target.name("s2")]);
    assert_eq!(
        refusal(widgets.list(&ListParams::default().fields("spec.size=1")).await).code,
        400
    );
    assert_eq!(
        refusal(widgets.list(&ListParams::default().labels("a in b")).await).code,
        400
    );
    target.finish().await;
}

#[tokio::test]
async fn the_pages_of_a_list_show_one_picture() {
    let target = Target::start().await;
    let widgets = target.widgets();
    for i in 0..7 {
        target.create(&format!("p{i}")).await;
    }
    let parameters = ListParams::default().labels(&target.mark()).limit(3);
    let first = widgets.list(&parameters).await.unwrap();
    assert_eq!(first.items.len(), 3);
    // What happens between pages does not show on the later ones.
    target.create("p9-late").await;
    widgets
        .delete(&target.name("p5"), &DeleteParams::default())
        .await
        .unwrap();
    let mut names: Vec<String> = first.items.iter().map(ResourceExt::name_any).collect();
    let mut token = first.metadata.continue_.clone();
    while let Some(next) = token.filter(|t| !t.is_empty()) {
        let page = widgets.list(&parameters.clone().continue_token(&next)).await.unwrap();
        assert_eq!(page.metadata.resource_version, first.metadata.resource_version);
        names.extend(page.items.iter().map(ResourceExt::name_any));
        token = page.metadata.continue_;
    }
    let expected: Vec<String> = (0..7).map(|i| target.name(&format!("p{i}"))).collect();
    assert_eq!(names, expected);
    target.finish().await;
}

#[tokio::test]
async fn json_patches_test_before_they_change() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("jp").await.name_any();
    let patch = |value: Value| Patch::Json::<()>(serde_json::from_value(value).unwrap());
    let good = patch(
        json!([{"op": "test", "path": "/spec/size", "value": 1}, {"op": "replace", "path": "/spec/size", "value": 2},
        {"op": "add", "path": "/metadata/labels/extra", "value": "x"}]),
    );
    let changed = widgets.patch(&name, &PatchParams::default(), &good).await.unwrap();
    assert_eq!(
        (changed.data["spec"]["size"].clone(), changed.labels()["extra"].as_str()),
        (json!(2), "x")
    );
    let bad = patch(
        json!([{"op": "replace", "path": "/spec/size", "value": 3}, {"op": "test", "path": "/spec/size", "value": 1}]),
    );
    assert_eq!(
        refusal(widgets.patch(&name, &PatchParams::default(), &bad).await).code,
        422
    );
    assert_eq!(widgets.get(&name).await.unwrap().data["spec"]["size"], 2);
    target.finish().await;
}

#[tokio::test]
async fn strategic_patches_merge_lists_by_key_and_are_for_built_in_kinds_only() {
    let target = Target::start().await;
    let nodes: Api<Node> = Api::all(target.client.clone());
    let name = target.name("node");
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}});
    nodes
        .create(&PostParams::default(), &serde_json::from_value(node).unwrap())
        .await
        .unwrap();
    for (ty, status) in [("A", "True"), ("B", "False"), ("A", "False")] {
        let patch = json!({"status": {"conditions": [{"type": ty, "status": status}]}});
        nodes
            .patch_status(&name, &PatchParams::default(), &Patch::Strategic(patch))
            .await
            .unwrap();
    }
    let conditions = nodes.get(&name).await.unwrap().status.unwrap().conditions.unwrap();
    let mut found: Vec<(&str, &str)> = conditions
        .iter()
        .map(|c| (c.type_.as_str(), c.status.as_str()))
        .collect();
    found.sort_unstable();
    assert_eq!(found, [("A", "False"), ("B", "False")]);
    nodes.delete(&name, &DeleteParams::default()).await.unwrap();
    let widget = target.create("strategic").await.name_any();
    let refused = target
        .widgets()
        .patch(&widget, &PatchParams::default(), &Patch::Strategic(json!({})))
        .await;
    assert_eq!(refusal(refused).code, 415);
    target.finish().await;
}

#[tokio::test]
async fn namespaced_objects_need_their_namespace_and_go_with_it() {
    let target = Target::start().await;
    let (namespaces, name) = (Api::<Namespace>::all(target.client.clone()), target.name("ns"));
    let maps: Api<ConfigMap> = Api::namespaced(target.client.clone(), &name);
    let map: ConfigMap = serde_json::from_value(json!({"metadata": {"name": "m"}, "data": {"k": "v"}})).unwrap();
    let refused = refusal(maps.create(&PostParams::default(), &map).await);
    assert_eq!(
        (refused.code, refused.message.as_str()),
        (404, format!("namespaces \"{name}\" not found").as_str())
    );
    let namespace = serde_json::from_value(json!({"metadata": {"name": name}})).unwrap();
    let made: Namespace = namespaces.create(&PostParams::default(), &namespace).await.unwrap();
    assert_eq!(made.status.unwrap().phase.as_deref(), Some("Active"));
    maps.create(&PostParams::default(), &map).await.unwrap();
    // Built-in kinds can be replaced without a resourceVersion.
    let other: ConfigMap = serde_json::from_value(json!({"metadata": {"name": "m"}, "data": {"k": "w"}})).unwrap();
    maps.replace("m", &PostParams::default(), &other).await.unwrap();
    namespaces.delete(&name, &DeleteParams::default()).await.unwrap();
    until("the namespace is gone", || async {
        namespaces.get_opt(&name).await.unwrap().is_none().then_some(())
    })
    .await;
    assert!(maps.get_opt("m").await.unwrap().is_none());
    target.finish().await;
}

#[tokio::test]
async fn plain_text_of_secrets_is_encoded() {
    let target = Target::start().await;
    let secrets: Api<Secret> = Api::namespaced(target.client.clone(), "default");
    let name = target.name("secret");
    let secret: Secret =
        serde_json::from_value(json!({"metadata": {"name": name}, "stringData": {"uuid": "plain"}})).unwrap();
    let made = secrets.create(&PostParams::default(), &secret).await.unwrap();
    assert_eq!(made.data.unwrap()["uuid"].0, b"plain");
    assert_eq!((made.string_data, made.type_.as_deref()), (None, Some("Opaque")));
    secrets.delete(&name, &DeleteParams::default()).await.unwrap();
    target.finish().await;
}

#[tokio::test]
async fn events_of_both_groups_are_the_same_objects() {
    use k8s_openapi::api::core::v1::Event as CoreEvent;
    use k8s_openapi::api::events::v1::Event as NewEvent;
    let target = Target::start().await;
    let made = target.create("subject").await;
    let reference = made.object_ref(&crate::target::widget_resource());
    let name = target.name("event");
    let event = json!({"metadata": {"name": name, "namespace": "default"}, "regarding": reference, "type": "Normal",
        "reason": "Tested", "note": "said in the new words", "action": "Test", "reportingController": "test",
        "reportingInstance": "test-0", "eventTime": "2026-01-02T03:04:05.000000Z"});
    let new: Api<NewEvent> = Api::namespaced(target.client.clone(), "default");
    new.create(&PostParams::default(), &serde_json::from_value(event).unwrap())
        .await
        .unwrap();
    let core: Api<CoreEvent> = Api::namespaced(target.client.clone(), "default");
    let seen = core.get(&name).await.unwrap();
    assert_eq!(seen.message.as_deref(), Some("said in the new words"));
    assert_eq!(seen.involved_object.name.as_deref(), Some(made.name_any().as_str()));
    let about = ListParams::default().fields(&format!("involvedObject.uid={}", made.uid().unwrap()));
    assert_eq!(core.list(&about).await.unwrap().items.len(), 1);
    core.delete(&name, &DeleteParams::default()).await.unwrap();
    target.finish().await;
}

#[tokio::test]
async fn a_body_of_another_kind_or_name_is_refused() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let mut wrong = target.widget("x", &json!({"size": 1}));
    wrong.types.as_mut().unwrap().kind = "Gadget".into();
    assert_eq!(refusal(widgets.create(&PostParams::default(), &wrong).await).code, 400);
    let made = target.create("named").await;
    let mut renamed = made.clone();
    renamed.metadata.name = Some(target.name("other"));
    assert_eq!(
        refusal(
            widgets
                .replace(&made.name_any(), &PostParams::default(), &renamed)
                .await
        )
        .code,
        400
    );
    let mut foreign = made.clone();
    foreign.metadata.uid = Some("00000000-0000-0000-0000-000000000001".into());
    assert_eq!(
        refusal(
            widgets
                .replace(&made.name_any(), &PostParams::default(), &foreign)
                .await
        )
        .code,
        409
    );
    target.finish().await;
}
