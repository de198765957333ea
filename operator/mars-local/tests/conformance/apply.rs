//! Server-side apply and field ownership.

use crate::target::{GROUP, Target, refusal};
use kube::ResourceExt as _;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use serde_json::{Value, json};

fn config(target: &Target, of: &str, spec: &Value) -> Value {
    json!({"apiVersion": format!("{GROUP}/v1"), "kind": "Widget",
        "metadata": {"name": target.name(of), "labels": {"made-by": target.mark().split_once('=').unwrap().1}}, "spec": spec})
}

async fn apply(api: &Api<DynamicObject>, manager: &str, config: &Value) -> Result<DynamicObject, kube::Error> {
    let name = config["metadata"]["name"].as_str().unwrap();
    api.patch(name, &PatchParams::apply(manager), &Patch::Apply(config))
        .await
}

#[tokio::test]
async fn apply_creates_then_updates_and_the_same_again_changes_nothing() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let made = apply(&widgets, "m", &config(&target, "a", &json!({"size": 1})))
        .await
        .unwrap();
    assert_eq!(
        (made.metadata.generation, made.data["spec"]["mode"].as_str()),
        (Some(1), Some("Safe"))
    );
    let changed = apply(&widgets, "m", &config(&target, "a", &json!({"size": 2})))
        .await
        .unwrap();
    assert_eq!(changed.metadata.generation, Some(2));
    let same = apply(&widgets, "m", &config(&target, "a", &json!({"size": 2})))
        .await
        .unwrap();
    assert_eq!(same.resource_version(), changed.resource_version());
    target.finish().await;
}

#[tokio::test]
async fn a_field_of_another_manager_is_a_conflict_that_names_it_unless_forced() {
    let target = Target::start().await;
    let widgets = target.widgets();
    apply(
        &widgets,
        "first",
        &config(&target, "c", &json!({"size": 1, "mode": "Fast"})),
    )
    .await
    .unwrap();
    let wish = config(&target, "c", &json!({"size": 2}));
    let refused = refusal(apply(&widgets, "second", &wish).await);
    assert_eq!((refused.code, refused.reason.as_str()), (409, "Conflict"));
    let cause = &refused.details.unwrap().causes[0];
    assert_eq!(
        (cause.reason.as_str(), cause.field.as_str()),
        ("FieldManagerConflict", ".spec.size")
    );
    assert!(cause.message.contains("first"), "{}", cause.message);
    let name = target.name("c");
    let forced = PatchParams::apply("second").force();
    let taken = widgets.patch(&name, &forced, &Patch::Apply(&wish)).await.unwrap();
    assert_eq!(taken.data["spec"]["size"], 2);
    // Now the first is the one that would take it away.
    let back = apply(
        &widgets,
        "first",
        &config(&target, "c", &json!({"size": 1, "mode": "Fast"})),
    )
    .await;
    assert_eq!(refusal(back).code, 409);
    target.finish().await;
}

#[tokio::test]
async fn what_a_manager_no_longer_applies_goes_unless_another_owns_it() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let nodes = |list: &[&str]| json!(list.iter().map(|n| json!({"node": n, "disk": "d"})).collect::<Vec<_>>());
    apply(
        &widgets,
        "first",
        &config(&target, "g", &json!({"size": 1, "nodes": nodes(&["a", "b"])})),
    )
    .await
    .unwrap();
    apply(
        &widgets,
        "second",
        &config(&target, "g", &json!({"size": 1, "nodes": nodes(&["b", "c"])})),
    )
    .await
    .unwrap();
    let now = apply(&widgets, "first", &config(&target, "g", &json!({"size": 1})))
        .await
        .unwrap();
    let mut left: Vec<&str> = now.data["spec"]["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n["node"].as_str().unwrap())
        .collect();
    left.sort_unstable();
    assert_eq!(left, ["b", "c"]);
    target.finish().await;
}

#[tokio::test]
async fn an_ordinary_update_takes_ownership_of_what_it_changes() {
    let target = Target::start().await;
    let widgets = target.widgets();
    apply(&widgets, "applier", &config(&target, "u", &json!({"size": 1})))
        .await
        .unwrap();
    let parameters = PatchParams {
        field_manager: Some("editor".into()),
        ..PatchParams::default()
    };
    let patch = Patch::Merge(json!({"spec": {"size": 8}}));
    let edited = widgets.patch(&target.name("u"), &parameters, &patch).await.unwrap();
    let managers: Vec<String> = edited
        .metadata
        .managed_fields
        .unwrap()
        .into_iter()
        .filter_map(|entry| entry.manager)
        .collect();
    assert!(managers.contains(&"editor".into()), "{managers:?}");
    let refused = refusal(apply(&widgets, "applier", &config(&target, "u", &json!({"size": 1}))).await);
    assert!(refused.message.contains("\"editor\""), "{}", refused.message);
    target.finish().await;
}

#[tokio::test]
async fn status_is_applied_by_its_own_subresource() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("st").await.name_any();
    let condition = |ty: &str, manager: &str| {
        let status = json!({"apiVersion": format!("{GROUP}/v1"), "kind": "Widget", "metadata": {"name": name},
            "spec": {"size": 50}, "status": {"conditions": [{"type": ty, "status": "True"}]}});
        let (widgets, name, manager) = (widgets.clone(), name.clone(), manager.to_owned());
        async move {
            let parameters = PatchParams::apply(&manager).force();
            widgets
                .patch_status(&name, &parameters, &Patch::Apply(status))
                .await
                .unwrap()
        }
    };
    condition("Ready", "agent").await;
    let both = condition("Synced", "operator").await;
    assert_eq!(
        both.data["status"]["conditions"].as_array().unwrap().len(),
        2,
        "each manager keeps its own condition"
    );
    assert_eq!(
        (both.data["spec"]["size"].clone(), both.metadata.generation),
        (json!(1), Some(1))
    );
    target.finish().await;
}

#[tokio::test]
async fn apply_needs_a_manager_and_checks_the_schema() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let wish = config(&target, "bad", &json!({"size": 1000}));
    assert_eq!(refusal(apply(&widgets, "m", &wish).await).code, 422);
    let anonymous = PatchParams::default();
    let nobody = widgets
        .patch(&target.name("bad"), &anonymous, &Patch::Apply(&wish))
        .await;
    assert!(nobody.is_err());
    assert!(widgets.get_opt(&target.name("bad")).await.unwrap().is_none());
    target.finish().await;
}
