//! Watches, and what kube's watcher and reflector make of them.

use crate::target::{LIMIT, Target, until, widget_resource};
use futures::{Stream, StreamExt as _, TryStreamExt as _};
use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::runtime::reflector::store::Writer;
use kube::runtime::{WatchStreamExt as _, watcher};
use serde_json::json;
use std::pin::Pin;
use std::time::Duration;

type Events = Pin<Box<dyn Stream<Item = Result<WatchEvent<DynamicObject>, kube::Error>> + Send>>;

async fn watch(api: &Api<DynamicObject>, parameters: &WatchParams, from: &str) -> Events {
    Box::pin(api.watch(parameters, from).await.unwrap())
}

/// The next event that is no bookmark, as (type, name, size).
async fn next(events: &mut Events) -> (&'static str, String, i64) {
    loop {
        let event = tokio::time::timeout(LIMIT, events.try_next())
            .await
            .expect("an event comes")
            .unwrap();
        let (ty, object) = match event.expect("the watch goes on") {
            WatchEvent::Added(object) => ("ADDED", object),
            WatchEvent::Modified(object) => ("MODIFIED", object),
            WatchEvent::Deleted(object) => ("DELETED", object),
            WatchEvent::Bookmark(_) => continue,
            WatchEvent::Error(error) => panic!("{error:?}"),
        };
        return (ty, object.name_any(), object.data["spec"]["size"].as_i64().unwrap());
    }
}

async fn resize(api: &Api<DynamicObject>, name: &str, size: i64) {
    let patch = Patch::Merge(json!({"spec": {"size": size}}));
    api.patch(name, &PatchParams::default(), &patch).await.unwrap();
}

#[tokio::test]
async fn a_watch_from_a_list_tells_everything_after_it_in_order() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("old").await.name_any();
    let mark = target.mark();
    let list = widgets.list(&ListParams::default().labels(&mark)).await.unwrap();
    let from = list.metadata.resource_version.unwrap();
    resize(&widgets, &name, 2).await;
    let later = target.create("young").await.name_any();
    let mut events = watch(&widgets, &WatchParams::default().labels(&mark), &from).await;
    assert_eq!(next(&mut events).await, ("MODIFIED", name.clone(), 2));
    assert_eq!(next(&mut events).await, ("ADDED", later.clone(), 1));
    widgets.delete(&name, &DeleteParams::default()).await.unwrap();
    assert_eq!(next(&mut events).await, ("DELETED", name, 2));
    resize(&widgets, &later, 3).await;
    assert_eq!(next(&mut events).await, ("MODIFIED", later, 3));
    target.finish().await;
}

#[tokio::test]
async fn a_watch_that_resumes_loses_and_repeats_nothing() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("w").await.name_any();
    let only = WatchParams::default().fields(&format!("metadata.name={name}"));
    let mut version = widgets.get(&name).await.unwrap().resource_version().unwrap();
    for round in 0..5 {
        resize(&widgets, &name, 2 + 2 * round).await;
        resize(&widgets, &name, 3 + 2 * round).await;
        for expected in [2 + 2 * round, 3 + 2 * round] {
            // A new connection for every event.
            let mut events = watch(&widgets, &only, &version).await;
            let event = events.try_next().await.unwrap().unwrap();
            let WatchEvent::Modified(object) = event else {
                panic!("{event:?}")
            };
            assert_eq!(object.data["spec"]["size"], expected);
            version = object.resource_version().unwrap();
        }
    }
    target.finish().await;
}

#[tokio::test]
async fn an_object_that_leaves_or_enters_the_selection_is_deleted_or_added() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let made = target.create("moving").await;
    let from = made.resource_version().unwrap();
    let selected = WatchParams::default().labels(&format!("{},color=red", target.mark()));
    let mut events = watch(&widgets, &selected, &from).await;
    let color = |color: serde_json::Value| {
        let (widgets, name) = (widgets.clone(), made.name_any());
        async move {
            let patch = Patch::Merge(json!({"metadata": {"labels": {"color": color}}}));
            widgets.patch(&name, &PatchParams::default(), &patch).await.unwrap();
        }
    };
    color(json!("red")).await;
    assert_eq!(next(&mut events).await.0, "ADDED");
    color(json!("blue")).await;
    assert_eq!(next(&mut events).await.0, "DELETED");
    color(json!("red")).await;
    assert_eq!(next(&mut events).await.0, "ADDED");
    color(json!(null)).await;
    assert_eq!(next(&mut events).await.0, "DELETED");
    target.finish().await;
}

#[tokio::test]
async fn a_watch_without_a_version_begins_with_everything() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let names = [
        target.create("i1").await.name_any(),
        target.create("i2").await.name_any(),
    ];
    let mut events = watch(&widgets, &WatchParams::default().labels(&target.mark()), "0").await;
    for name in names {
        assert_eq!(next(&mut events).await, ("ADDED", name, 1));
    }
    target.finish().await;
}

#[tokio::test]
async fn a_watch_ends_when_its_time_is_over() {
    let target = Target::start().await;
    let parameters = WatchParams::default().timeout(1);
    let mut events = watch(&target.widgets(), &parameters, "0").await;
    let ended = tokio::time::timeout(LIMIT, async { while events.next().await.is_some() {} }).await;
    assert!(ended.is_ok());
    target.finish().await;
}

#[tokio::test]
async fn a_streamed_list_ends_with_a_bookmark() {
    let target = Target::start().await;
    if target.embedded.is_none() {
        eprintln!("left out: needs a server with WatchList");
        return target.finish().await;
    }
    target.create("streamed").await;
    let parameters = WatchParams {
        send_initial_events: true,
        bookmarks: true,
        label_selector: Some(target.mark()),
        ..WatchParams::default()
    };
    let mut events = watch(&target.widgets(), &parameters, "").await;
    assert!(matches!(events.try_next().await.unwrap(), Some(WatchEvent::Added(_))));
    let Some(WatchEvent::Bookmark(bookmark)) = events.try_next().await.unwrap() else {
        panic!("a bookmark follows")
    };
    assert_eq!(bookmark.metadata.annotations["k8s.io/initial-events-end"], "true");
    assert!(bookmark.metadata.resource_version.parse::<u64>().is_ok());
    target.finish().await;
}

#[tokio::test]
async fn a_version_older_than_the_history_is_gone() {
    let target = Target::start().await;
    let Some(embedded) = &target.embedded else {
        eprintln!("left out: needs compaction on demand");
        return target.finish().await;
    };
    let widgets = target.widgets();
    let old = target.create("ancient").await;
    resize(&widgets, &old.name_any(), 2).await;
    embedded.api().store.compact();
    let mut events = watch(&widgets, &WatchParams::default(), &old.resource_version().unwrap()).await;
    match events.try_next().await.unwrap() {
        Some(WatchEvent::Error(status)) => assert_eq!((status.code, status.reason.as_str()), (410, "Expired")),
        other => panic!("{other:?}"),
    }
    assert!(events.try_next().await.unwrap().is_none(), "nothing follows");
    target.finish().await;
}

#[tokio::test]
async fn a_reflector_follows_through_cut_watches_and_lost_history() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let keep = target.create("kept").await.name_any();
    let writer: Writer<DynamicObject> = Writer::new(widget_resource());
    let store = writer.as_reader();
    let config = watcher::Config::default().labels(&target.mark());
    let stream = watcher(widgets.clone(), config)
        .default_backoff()
        .reflect(writer)
        .for_each(|_| async {});
    let follower = tokio::spawn(stream);
    tokio::time::timeout(LIMIT, store.wait_until_ready())
        .await
        .unwrap()
        .unwrap();
    for round in 1..=3 {
        let name = target.create(&format!("r{round}")).await.name_any();
        if let Some(embedded) = &target.embedded {
            embedded.api().faults.cut_watches();
            embedded.api().store.compact();
        }
        resize(&widgets, &keep, 10 + round).await;
        widgets.delete(&name, &DeleteParams::default()).await.unwrap();
        until("the reflector shows the change", || async {
            let state = store.state();
            let sizes: Vec<i64> = state.iter().map(|o| o.data["spec"]["size"].as_i64().unwrap()).collect();
            (sizes == [10 + round]).then_some(())
        })
        .await;
    }
    follower.abort();
    target.finish().await;
}

#[tokio::test]
async fn a_client_that_reads_slowly_gets_everything_that_is_in_the_history() {
    let target = Target::start().await;
    let widgets = target.widgets();
    let name = target.create("slow").await.name_any();
    let from = widgets.get(&name).await.unwrap().resource_version().unwrap();
    let only = WatchParams::default().fields(&format!("metadata.name={name}"));
    let mut events = watch(&widgets, &only, &from).await;
    for size in 2..=60 {
        resize(&widgets, &name, size).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    for size in 2..=60 {
        assert_eq!(next(&mut events).await, ("MODIFIED", name.clone(), size));
    }
    target.finish().await;
}
