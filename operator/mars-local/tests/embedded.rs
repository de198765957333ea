//! What only the embedded API does: surviving restarts, naming damage, failing on purpose, checking MARS objects.
#![expect(clippy::unwrap_used, reason = "helpers of tests: a panic is the failed test")]

use futures::{StreamExt as _, TryStreamExt as _};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Api, ListParams, Patch, PatchParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt as _};
use mars_local::embedded::{EmbeddedApi, Setup, StartError};
use mars_local::faults::Plan;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const LIMIT: Duration = Duration::from_secs(20);

async fn start(dir: &Path) -> EmbeddedApi {
    EmbeddedApi::start(dir, Setup::bare()).await.unwrap()
}

fn maps(client: &Client) -> Api<ConfigMap> {
    Api::namespaced(client.clone(), "default")
}

fn map(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name}, "data": {"k": value}})).unwrap()
}

async fn put(api: &Api<ConfigMap>, name: &str, value: &str) -> Result<ConfigMap, kube::Error> {
    let patch = Patch::Merge(json!({"data": {"k": value}}));
    api.patch(name, &PatchParams::default(), &patch).await
}

fn value(map: &ConfigMap) -> String {
    map.data
        .as_ref()
        .and_then(|data| data.get("k"))
        .cloned()
        .unwrap_or_default()
}

fn code<T: std::fmt::Debug>(outcome: Result<T, kube::Error>) -> u16 {
    match outcome {
        Err(kube::Error::Api(status)) => status.code,
        other => panic!("should be refused by the API: {other:?}"),
    }
}

#[tokio::test]
async fn objects_survive_a_restart_and_old_watches_are_told_to_list_again() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let made = maps(&api.client().unwrap())
        .create(&PostParams::default(), &map("kept", "v"))
        .await
        .unwrap();
    api.stop().await;
    drop(api);
    let api = start(dir.path()).await;
    let maps = maps(&api.client().unwrap());
    let found = maps.get("kept").await.unwrap();
    assert_eq!(
        (value(&found), found.uid(), found.resource_version()),
        ("v".into(), made.uid(), made.resource_version())
    );
    let version = |map: &ConfigMap| map.resource_version().unwrap().parse::<u64>().unwrap();
    let next = put(&maps, "kept", "w").await.unwrap();
    assert!(version(&next) > version(&made), "versions only grow");
    let mut events = maps
        .watch(&WatchParams::default(), &made.resource_version().unwrap())
        .await
        .unwrap()
        .boxed();
    match events.try_next().await.unwrap() {
        Some(WatchEvent::Error(status)) => assert_eq!(status.code, 410),
        other => panic!("{other:?}"),
    }
    api.stop().await;
}

#[tokio::test]
async fn a_damaged_object_is_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    maps(&api.client().unwrap())
        .create(&PostParams::default(), &map("hurt", "v"))
        .await
        .unwrap();
    api.stop().await;
    drop(api);
    let file = dir.path().join("objects/core/configmaps/default/hurt.json");
    let mut raw = std::fs::read(&file).unwrap();
    let middle = raw.len() / 2;
    raw[middle] ^= 0x10;
    std::fs::write(&file, raw).unwrap();
    let error = EmbeddedApi::start(dir.path(), Setup::bare())
        .await
        .err()
        .expect("must be refused")
        .to_string();
    assert!(error.contains("hurt.json"), "{error}");
}

#[tokio::test]
async fn a_taken_port_and_a_foreign_address_are_refused_with_advice() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(&dir.path().join("one")).await;
    let setup = Setup {
        listen: api.address(),
        ..Setup::bare()
    };
    let error = EmbeddedApi::start(&dir.path().join("two"), setup).await.err().unwrap();
    assert!(
        matches!(error, StartError::Listen { .. }) && error.to_string().contains("up: --api"),
        "{error}"
    );
    let setup = Setup {
        listen: "0.0.0.0:0".parse().unwrap(),
        ..Setup::bare()
    };
    assert!(matches!(
        EmbeddedApi::start(&dir.path().join("two"), setup).await.err(),
        Some(StartError::NotLoopback(_))
    ));
    let again = EmbeddedApi::start(&dir.path().join("one"), Setup::bare())
        .await
        .err()
        .unwrap();
    assert!(again.to_string().contains("in use by another mars-local"), "{again}");
    api.stop().await;
}

#[tokio::test]
async fn a_request_for_another_host_name_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    for (host, expected) in [("localhost:1", "200"), ("[::1]:7780", "200"), ("evil.example", "403")] {
        let mut stream = tokio::net::TcpStream::connect(api.address()).await.unwrap();
        let request = format!("GET /api/v1/namespaces HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {expected}")), "{host}: {answer}");
    }
    api.stop().await;
}

#[tokio::test]
async fn a_failed_request_did_nothing_and_a_lost_answer_did_everything() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let maps = maps(&api.client().unwrap());
    maps.create(&PostParams::default(), &map("m", "0")).await.unwrap();
    api.api().faults.set(Some(Plan {
        error: 1.0,
        ..Plan::default()
    }));
    assert_eq!(code(put(&maps, "m", "1").await), 500);
    api.api().faults.set(Some(Plan {
        conflict: 1.0,
        ..Plan::default()
    }));
    assert_eq!(code(put(&maps, "m", "2").await), 409);
    assert_eq!(
        value(&maps.get("m").await.unwrap()),
        "0",
        "reads are not refused, and nothing was done"
    );
    api.api().faults.set(Some(Plan {
        lost_answer: 1.0,
        ..Plan::default()
    }));
    assert_eq!(code(put(&maps, "m", "3").await), 500);
    api.api().faults.set(None);
    assert_eq!(value(&maps.get("m").await.unwrap()), "3");
    api.stop().await;
}

#[tokio::test]
async fn faults_hit_only_the_clients_and_kinds_they_are_meant_for() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let plan = Plan {
        clients: vec!["victim".into()],
        kinds: vec!["core/configmaps".into()],
        error: 1.0,
        ..Plan::default()
    };
    api.api().faults.set(Some(plan));
    let victim = api.client_named(Some("victim")).unwrap();
    assert_eq!(code(maps(&victim).list(&ListParams::default()).await), 500);
    let nodes: Api<k8s_openapi::api::core::v1::Node> = Api::all(victim);
    assert!(nodes.list(&ListParams::default()).await.is_ok());
    let other = api.client_named(Some("other")).unwrap();
    assert!(maps(&other).list(&ListParams::default()).await.is_ok());
    assert!(maps(&api.client().unwrap()).list(&ListParams::default()).await.is_ok());
    api.stop().await;
}

#[tokio::test]
async fn the_same_seed_makes_the_same_faults() {
    let mut runs = Vec::new();
    for _ in 0..2 {
        let dir = tempfile::tempdir().unwrap();
        let api = start(dir.path()).await;
        let maps = maps(&api.client().unwrap());
        maps.create(&PostParams::default(), &map("m", "0")).await.unwrap();
        api.api().faults.set(Some(Plan {
            seed: 7,
            error: 0.3,
            conflict: 0.3,
            ..Plan::default()
        }));
        let mut outcomes = Vec::new();
        for i in 0..40 {
            outcomes.push(put(&maps, "m", &i.to_string()).await.is_ok());
        }
        api.stop().await;
        runs.push(outcomes);
    }
    assert_eq!(runs[0], runs[1]);
    assert!(runs[0].contains(&true) && runs[0].contains(&false));
}

#[tokio::test]
async fn stale_reads_show_an_older_picture_but_writes_still_conflict() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let maps = maps(&api.client().unwrap());
    let mut first = maps.create(&PostParams::default(), &map("m", "0")).await.unwrap();
    put(&maps, "m", "1").await.unwrap();
    api.api().faults.set(Some(Plan {
        stale: 1.0,
        stale_revisions: 1,
        ..Plan::default()
    }));
    let seen = maps.get("m").await.unwrap();
    assert_eq!(
        (value(&seen), seen.resource_version()),
        ("0".into(), first.resource_version())
    );
    assert_eq!(value(&maps.list(&ListParams::default()).await.unwrap().items[0]), "0");
    first.data = map("m", "2").data;
    assert_eq!(code(maps.replace("m", &PostParams::default(), &first).await), 409);
    api.stop().await;
}

/// What a watch tells while `count` objects are changed `rounds` times each.
async fn told(api: &EmbeddedApi, plan: Plan, count: usize, rounds: usize) -> Vec<(String, usize)> {
    let maps = maps(&api.client().unwrap());
    for i in 0..count {
        maps.create(&PostParams::default(), &map(&format!("m{i}"), "0"))
            .await
            .unwrap();
    }
    let from = maps
        .list(&ListParams::default())
        .await
        .unwrap()
        .metadata
        .resource_version
        .unwrap();
    api.api().faults.set(Some(plan));
    let mut events = maps.watch(&WatchParams::default(), &from).await.unwrap().boxed();
    for round in 1..=rounds {
        for i in 0..count {
            put(&maps, &format!("m{i}"), &round.to_string()).await.unwrap();
        }
    }
    let mut seen = Vec::new();
    let quiet = Duration::from_secs(2);
    while let Ok(Ok(Some(event))) = tokio::time::timeout(quiet, events.try_next()).await {
        if let WatchEvent::Modified(map) = event {
            seen.push((map.name_any(), value(&map).parse().unwrap()));
        }
    }
    api.api().faults.set(None);
    seen
}

#[tokio::test]
async fn reordered_watches_keep_the_order_of_each_object_and_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let plan = Plan {
        seed: 3,
        watch_reorder: 0.5,
        ..Plan::default()
    };
    let seen = told(&api, plan, 4, 10).await;
    assert_eq!(seen.len(), 40, "{seen:?}");
    for i in 0..4 {
        let of_one: Vec<usize> = seen
            .iter()
            .filter(|(name, _)| *name == format!("m{i}"))
            .map(|(_, v)| *v)
            .collect();
        assert_eq!(of_one, (1..=10).collect::<Vec<_>>(), "m{i}");
    }
    let mut sorted = seen.clone();
    sorted.sort_by_key(|(name, round)| (*round, name.clone()));
    assert_ne!(seen, sorted, "something was reordered");
    api.stop().await;
}

#[tokio::test]
async fn lossy_and_cut_watches_do_what_they_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let seen = told(
        &api,
        Plan {
            seed: 5,
            watch_lose: 0.5,
            ..Plan::default()
        },
        2,
        10,
    )
    .await;
    assert!((1..20).contains(&seen.len()), "some are lost: {}", seen.len());
    api.stop().await;
    drop(api);
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let seen = told(
        &api,
        Plan {
            seed: 5,
            watch_cut: 1.0,
            ..Plan::default()
        },
        2,
        3,
    )
    .await;
    assert_eq!(seen, [("m0".to_owned(), 1)], "the watch ends after its first event");
    api.stop().await;
}

#[tokio::test]
async fn an_outage_serves_nobody_and_ends_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let api = start(dir.path()).await;
    let client = api.client().unwrap();
    let maps = maps(&client);
    let mut events = maps.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    api.api().faults.outage(Duration::from_hours(1));
    let ended = tokio::time::timeout(LIMIT, async { while let Ok(Some(_)) = events.try_next().await {} }).await;
    assert!(ended.is_ok(), "watches end");
    assert_eq!(greet(&api).await, "", "a new connection is closed without an answer");
    api.api().faults.outage(Duration::from_millis(200));
    let deadline = Instant::now() + LIMIT;
    while !greet(&api).await.starts_with("HTTP/1.1 200") {
        assert!(Instant::now() < deadline, "the outage ends");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    api.stop().await;
}

/// What a new connection is answered.
async fn greet(api: &EmbeddedApi) -> String {
    let mut stream = tokio::net::TcpStream::connect(api.address()).await.unwrap();
    let _ = stream
        .write_all(b"GET /api/v1/namespaces HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        .await;
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer).await;
    answer
}

fn mars() -> Setup {
    Setup {
        definitions: mars_local::mars::definitions(),
        admission: mars_local::mars::admission(),
        ..Setup::bare()
    }
}

fn resource(name: &str, spec: &Value) -> mars_crds::MarsResource {
    let object = json!({"apiVersion": "mars.storage/v1alpha1", "kind": "MarsResource", "metadata": {"name": name}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

#[tokio::test]
async fn objects_that_cel_would_refuse_are_refused_with_the_same_words() {
    let dir = tempfile::tempdir().unwrap();
    let api = EmbeddedApi::start(dir.path(), mars()).await.unwrap();
    let resources: Api<mars_crds::MarsResource> = Api::all(api.client().unwrap());
    let good = json!({"size": "1Gi", "primary": "a", "replicas": [{"node": "a", "pool": "default"}]});
    let made = resources
        .create(&PostParams::default(), &resource("mydata", &good))
        .await
        .unwrap();
    assert_eq!(made.metadata.generation, Some(1));
    let odd = json!({"size": "1000000", "primary": "a", "replicas": [{"node": "a", "pool": "default"}]});
    let wrong = resource("odd", &odd);
    let problems = mars_crds::validate::resource(&wrong, None);
    assert!(!problems.is_empty());
    match resources.create(&PostParams::default(), &wrong).await {
        Err(kube::Error::Api(status)) => {
            assert_eq!(status.code, 422);
            for problem in problems {
                assert!(
                    status.message.contains(&problem.message),
                    "{} in {}",
                    problem.message,
                    status.message
                );
            }
        }
        other => panic!("{other:?}"),
    }
    let shrink = Patch::Merge(json!({"spec": {"size": "512Mi"}}));
    assert_eq!(
        code(resources.patch("mydata", &PatchParams::default(), &shrink).await),
        422
    );
    api.stop().await;
}

#[tokio::test]
async fn newer_definitions_of_mars_replace_stored_ones_and_keep_the_objects() {
    let dir = tempfile::tempdir().unwrap();
    let mut setup = mars();
    for definition in &mut setup.definitions {
        definition["spec"]["names"]["shortNames"] = json!([]);
    }
    let api = EmbeddedApi::start(dir.path(), setup).await.unwrap();
    let resources: Api<mars_crds::MarsResource> = Api::all(api.client().unwrap());
    let spec = json!({"size": "1Gi", "replicas": [{"node": "a", "pool": "default"}]});
    resources
        .create(&PostParams::default(), &resource("kept", &spec))
        .await
        .unwrap();
    api.stop().await;
    drop(api);
    let api = EmbeddedApi::start(dir.path(), mars()).await.unwrap();
    let kind = api
        .api()
        .registry()
        .find("mars.storage", "v1alpha1", "marsresources")
        .unwrap();
    assert!(!kind.short_names.is_empty());
    let resources: Api<mars_crds::MarsResource> = Api::all(api.client().unwrap());
    assert!(resources.get("kept").await.is_ok());
    api.stop().await;
}
