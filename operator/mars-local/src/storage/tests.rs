//! What the store promises: durability per object, growing revisions, bounded history, damage named.

use super::*;
use serde_json::json;

fn key(name: &str) -> Key {
    Key {
        kind: "test.io/widgets".into(),
        namespace: "default".into(),
        name: name.into(),
    }
}

fn widget(name: &str, size: u64) -> Value {
    json!({"metadata": {"name": name, "namespace": "default"}, "spec": {"size": size}})
}

fn put(store: &Store, name: &str, size: u64) -> u64 {
    let done = store
        .transact::<DiskError>(&key(name), |_| Ok(Decision::Put(widget(name, size))))
        .unwrap();
    match done {
        Committed::Stored(object) => object.revision,
        other => panic!("not stored: {other:?}"),
    }
}

fn remove(store: &Store, name: &str) {
    let done = store.transact::<DiskError>(&key(name), |o| Ok(Decision::Remove(o.unwrap().value.clone())));
    assert!(matches!(done.unwrap(), Committed::Removed(_)));
}

#[test]
fn state_and_growing_revisions_survive_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    put(&store, "a", 1);
    put(&store, "b", 2);
    let last = put(&store, "c", 3);
    remove(&store, "c");
    let deleted_at = store.revision();
    assert!(deleted_at > last);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    let (objects, revision) = store.list("test.io/widgets", None);
    assert_eq!(
        objects.iter().map(|o| crate::meta::name(&o.value)).collect::<Vec<_>>(),
        ["a", "b"]
    );
    assert!(
        revision > deleted_at,
        "{revision} must be above the deletion at {deleted_at}"
    );
    assert!(
        store.changes("test.io/widgets", None, deleted_at, 10).is_err(),
        "history does not survive"
    );
}

#[test]
fn a_torn_write_of_one_object_loses_no_object() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    put(&store, "a", 1);
    put(&store, "b", 2);
    drop(store);
    std::fs::write(dir.path().join("objects/test.io/widgets/default/a.new"), b"mars-lo").unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(store.list("test.io/widgets", None).0.len(), 2);
    assert_eq!(store.get(&key("a")).unwrap().value["spec"]["size"], 1);
}

#[test]
fn a_flipped_bit_is_named_and_nothing_starts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    put(&store, "a", 1);
    put(&store, "b", 2);
    drop(store);
    let file = dir.path().join("objects/test.io/widgets/default/b.json");
    let mut raw = std::fs::read(&file).unwrap();
    let last = raw.len() - 4;
    raw[last] ^= 1;
    std::fs::write(&file, raw).unwrap();
    let error = Store::open(dir.path())
        .err()
        .expect("a damaged file must be refused")
        .to_string();
    assert!(
        error.contains("b.json") && error.contains("digest") && !error.contains("a.json"),
        "{error}"
    );
}

#[test]
fn a_second_opener_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _store = Store::open(dir.path()).unwrap();
    assert!(matches!(Store::open(dir.path()), Err(DiskError::InUse(_))));
}

#[test]
fn an_older_picture_is_rebuilt_from_history_until_it_is_compacted() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open_with_history(dir.path(), 3).unwrap();
    put(&store, "a", 1);
    let then = put(&store, "b", 1);
    put(&store, "b", 2);
    remove(&store, "a");
    put(&store, "c", 1);
    let names = |list: Vec<Arc<Object>>| {
        list.iter()
            .map(|o| format!("{}{}", crate::meta::name(&o.value), o.value["spec"]["size"]))
            .collect::<Vec<_>>()
    };
    assert_eq!(
        names(store.list_at("test.io/widgets", None, then).unwrap()),
        ["a1", "b1"]
    );
    assert_eq!(names(store.list("test.io/widgets", None).0), ["b2", "c1"]);
    put(&store, "d", 1);
    assert!(store.list_at("test.io/widgets", None, then).is_err());
    assert!(store.changes("test.io/widgets", None, then + 1, 100).is_ok());
}

#[test]
fn a_long_name_is_stored_and_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let name = format!("{}.x", "a".repeat(250));
    let store = Store::open(dir.path()).unwrap();
    put(&store, &name, 1);
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    assert!(store.get(&key(&name)).is_some());
}
