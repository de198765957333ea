//! Deleting: finalizers, preconditions, owners.

use crate::target::{GROUP, Target, refusal, until};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams, Preconditions};
use serde_json::{Value, json};

async fn set_finalizers(api: &Api<DynamicObject>, name: &str, list: &[&str]) -> Result<DynamicObject, kube::Error> {
    let patch = Patch::Merge(json!({"metadata": {"finalizers": list}}));
    api.patch(name, &PatchParams::default(), &patch).await
}

#[tokio::test]
async fn an_object_without_finalizers_is_gone_at_once() {
    let target = Target::start().await;
    let made = target.create("plain").await;
    let outcome = target
        .widgets()
        .delete(&made.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    let status = outcome.right().expect("a Status, not an object");
    assert_eq!(status.details.unwrap().uid, made.uid().unwrap());
    assert!(target.widgets().get_opt(&made.name_any()).await.unwrap().is_none());
    target.finish().await;
}

#[tokio::test]
async fn finalizers_hold_a_deleted_object_until_the_last_one_is_gone() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("held").await.name_any();
    let held = set_finalizers(&widgets, &name, &["test.io/a", "test.io/b"])
        .await
        .unwrap();
    assert_eq!(held.metadata.generation, Some(1));
    let marked = widgets
        .delete(&name, &DeleteParams::default())
        .await
        .unwrap()
        .left()
        .expect("the object");
    let since = marked.metadata.deletion_timestamp.clone().expect("a deletionTimestamp");
    let again = widgets
        .delete(&name, &DeleteParams::default())
        .await
        .unwrap()
        .left()
        .unwrap();
    assert_eq!(again.metadata.deletion_timestamp, Some(since), "the mark does not move");
    let refused = refusal(set_finalizers(&widgets, &name, &["test.io/a", "test.io/b", "test.io/c"]).await);
    assert_eq!(refused.code, 422, "no new finalizers: {}", refused.message);
    let status = Patch::Merge(json!({"status": {"phase": "Going"}}));
    widgets
        .patch_status(&name, &PatchParams::default(), &status)
        .await
        .unwrap();
    set_finalizers(&widgets, &name, &["test.io/b"]).await.unwrap();
    assert!(widgets.get_opt(&name).await.unwrap().is_some());
    set_finalizers(&widgets, &name, &[]).await.unwrap();
    assert!(widgets.get_opt(&name).await.unwrap().is_none());
    target.finish().await;
}

#[tokio::test]
async fn a_deletion_meant_for_another_object_of_that_name_is_refused() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let first = target.create("again").await;
    widgets
        .delete(&first.name_any(), &DeleteParams::default())
        .await
        .unwrap();
    let second = target.create("again").await;
    let conditions = Preconditions {
        uid: first.uid(),
        resource_version: None,
    };
    let parameters = DeleteParams::default().preconditions(conditions);
    assert_eq!(refusal(widgets.delete(&second.name_any(), &parameters).await).code, 409);
    let conditions = Preconditions {
        uid: second.uid(),
        resource_version: second.resource_version(),
    };
    let parameters = DeleteParams::default().preconditions(conditions);
    widgets.delete(&second.name_any(), &parameters).await.unwrap();
    target.finish().await;
}

async fn owned(target: &Target, of: &str, owner: &DynamicObject, blocks: bool) -> DynamicObject {
    let mut widget = target.widget(of, &json!({"size": 1}));
    let reference: Value = json!([{"apiVersion": format!("{GROUP}/v1"), "kind": "Widget", "name": owner.name_any(),
        "uid": owner.uid(), "blockOwnerDeletion": blocks, "controller": true}]);
    widget.metadata.owner_references = Some(serde_json::from_value(reference).unwrap());
    target.widgets().create(&PostParams::default(), &widget).await.unwrap()
}

async fn gone(target: &Target, name: &str) {
    let widgets = target.widgets();
    until(&format!("{name} is gone"), || async {
        widgets.get_opt(name).await.unwrap().is_none().then_some(())
    })
    .await;
}

#[tokio::test]
async fn dependents_follow_their_owner_in_the_background() {
    let target = Target::start().await;
    let owner = target.create("owner").await;
    let child = owned(&target, "child", &owner, false).await;
    let grandchild = owned(&target, "grandchild", &child, false).await;
    target
        .widgets()
        .delete(&owner.name_any(), &DeleteParams::background())
        .await
        .unwrap();
    assert!(
        target.widgets().get_opt(&owner.name_any()).await.unwrap().is_none(),
        "the owner goes first"
    );
    gone(&target, &child.name_any()).await;
    gone(&target, &grandchild.name_any()).await;
    target.finish().await;
}

#[tokio::test]
async fn an_owner_deleted_in_the_foreground_waits_for_its_dependents() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let owner = target.create("fg-owner").await;
    let child = owned(&target, "fg-child", &owner, true).await.name_any();
    set_finalizers(&widgets, &child, &["test.io/slow"]).await.unwrap();
    widgets
        .delete(&owner.name_any(), &DeleteParams::foreground())
        .await
        .unwrap();
    until("the child is marked", || async {
        widgets
            .get(&child)
            .await
            .unwrap()
            .metadata
            .deletion_timestamp
            .map(|_| ())
    })
    .await;
    assert!(
        widgets.get_opt(&owner.name_any()).await.unwrap().is_some(),
        "the owner waits"
    );
    set_finalizers(&widgets, &child, &[]).await.unwrap();
    gone(&target, &child).await;
    gone(&target, &owner.name_any()).await;
    target.finish().await;
}

#[tokio::test]
async fn orphans_stay_and_forget_their_owner() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let owner = target.create("or-owner").await;
    let child = owned(&target, "or-child", &owner, false).await.name_any();
    widgets
        .delete(&owner.name_any(), &DeleteParams::orphan())
        .await
        .unwrap();
    gone(&target, &owner.name_any()).await;
    until("the child has forgotten its owner", || async {
        widgets
            .get(&child)
            .await
            .unwrap()
            .owner_references()
            .is_empty()
            .then_some(())
    })
    .await;
    target.finish().await;
}

#[tokio::test]
async fn a_collection_is_deleted_by_its_selector() {
    let target = Target::start().await;
    for i in 0..3 {
        target.create(&format!("d{i}")).await;
    }
    let mine = ListParams::default().labels(&target.mark());
    let dry = DeleteParams {
        dry_run: true,
        ..DeleteParams::default()
    };
    target.widgets().delete_collection(&dry, &mine).await.unwrap();
    assert_eq!(target.widgets().list(&mine).await.unwrap().items.len(), 3);
    target
        .widgets()
        .delete_collection(&DeleteParams::default(), &mine)
        .await
        .unwrap();
    until("all are gone", || async {
        target
            .widgets()
            .list(&mine)
            .await
            .unwrap()
            .items
            .is_empty()
            .then_some(())
    })
    .await;
    target.finish().await;
}
