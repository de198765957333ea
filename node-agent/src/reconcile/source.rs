//! Where `MarsReplica` objects come from: a watch on the API server, or a directory of manifests.
//!
//! Invariant: what is not seen changes nothing. The API going away, an object that vanishes or cannot be decoded, a file
//! that is half written: all of them leave every replica as it is.

use futures::StreamExt;
use kube::core::DeserializeGuard;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, ResourceExt};
use mars_crds::{LABEL_NODE, MarsReplica};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// How often the directory is looked at.
const POLL: Duration = Duration::from_millis(250);

/// What a source says.
#[derive(Debug)]
pub enum Update {
    /// An object as it is now; of this node.
    Seen(Box<MarsReplica>),
    /// An object is gone. It means nothing for data; the replica goes on.
    Vanished(String),
    /// A complete list has been read since the process started: whatever was not in it does not exist there.
    Listed,
    /// Something about the source, for people.
    Trouble(String),
}

/// Follows the API server until cancelled. Reconnects for ever, with back-off and jitter.
pub async fn watch_api(client: kube::Client, node: String, updates: mpsc::Sender<Update>, stop: CancellationToken) {
    let api: Api<DeserializeGuard<MarsReplica>> = Api::all(client);
    // A node name that is too long for a label value is filtered here only.
    let config = if node.len() <= 63 {
        watcher::Config::default().labels(&format!("{LABEL_NODE}={node}"))
    } else {
        watcher::Config::default()
    };
    let mut events = std::pin::pin!(watcher(api, config).default_backoff());
    let mut reachable = true;
    loop {
        let event = tokio::select! {
            () = stop.cancelled() => return,
            event = events.next() => event,
        };
        let sent = match event {
            None => return,
            Some(Ok(event)) => {
                if !std::mem::replace(&mut reachable, true) {
                    info!("the API server answers again");
                }
                forward(event, &node, &updates).await
            }
            Some(Err(error)) => {
                if std::mem::replace(&mut reachable, false) {
                    warn!(%error, "the API server does not answer: devices and replication go on with the last known specs");
                }
                updates.send(Update::Trouble(error.to_string())).await.is_ok()
            }
        };
        if !sent {
            return;
        }
    }
}

/// False when nobody listens any more.
async fn forward(
    event: watcher::Event<DeserializeGuard<MarsReplica>>,
    node: &str,
    updates: &mpsc::Sender<Update>,
) -> bool {
    let update = match event {
        watcher::Event::Init => return true,
        watcher::Event::InitDone => Update::Listed,
        watcher::Event::Delete(object) => Update::Vanished(object.name_any()),
        watcher::Event::InitApply(object) | watcher::Event::Apply(object) => match object.0 {
            Ok(object) if object.spec.node == node => Update::Seen(Box::new(object)),
            Ok(_) => return true,
            Err(error) => Update::Trouble(format!(
                "MarsReplica {} cannot be decoded: {}; its replica goes on as before",
                error.metadata.name.as_deref().unwrap_or_default(),
                error.error
            )),
        },
    };
    updates.send(update).await.is_ok()
}

/// Follows a directory of manifests (`*.yaml`, `*.yml`, `*.json`, one object each) until cancelled.
pub async fn watch_dir(dir: PathBuf, node: String, updates: mpsc::Sender<Update>, stop: CancellationToken) {
    let mut known: BTreeMap<PathBuf, (SystemTime, u64)> = BTreeMap::new();
    let mut names: BTreeMap<PathBuf, String> = BTreeMap::new();
    let mut listed = false;
    loop {
        let (scanned, dir_to_scan) = (known.clone(), dir.clone());
        let scan = tokio::task::spawn_blocking(move || changed_files(&dir_to_scan, &scanned)).await;
        let Ok((present, changed)) = scan else { return };
        let mut say = Vec::new();
        for (path, object) in changed {
            match object {
                Ok(object) if object.spec.node == node => {
                    names.insert(path, object.name_any());
                    say.push(Update::Seen(Box::new(object)));
                }
                Ok(_) => {}
                Err(error) => say.push(Update::Trouble(format!("{}: {error}", path.display()))),
            }
        }
        for path in known.keys().filter(|path| !present.contains_key(*path)) {
            say.extend(names.remove(path).map(Update::Vanished));
        }
        known = present;
        if !std::mem::replace(&mut listed, true) {
            say.push(Update::Listed);
        }
        for update in say {
            if updates.send(update).await.is_err() {
                return;
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(POLL) => {}
        }
    }
}

type Present = BTreeMap<PathBuf, (SystemTime, u64)>;
type Changed = Vec<(PathBuf, Result<MarsReplica, String>)>;

fn changed_files(dir: &Path, known: &Present) -> (Present, Changed) {
    let (mut present, mut changed) = (Present::new(), Changed::new());
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        let Some(extension) = path.extension().and_then(|extension| extension.to_str()) else {
            continue;
        };
        if !["yaml", "yml", "json"].contains(&extension) {
            continue;
        }
        let Ok(metadata) = entry.metadata() else { continue };
        let stamp = (metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH), metadata.len());
        if known.get(&path) != Some(&stamp) {
            changed.push((path.clone(), read_manifest(&path)));
        }
        present.insert(path, stamp);
    }
    (present, changed)
}

/// YAML is read with the JSON parser's types: a manifest is small and one object.
fn read_manifest(path: &Path) -> Result<MarsReplica, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    serde_yaml::from_str(&text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;

    fn manifest(node: &str, size: u64) -> String {
        let (resource, replica) = (Uuid::from_u128(1), Uuid::from_u128(2));
        format!(
            "apiVersion: mars.storage/v1alpha1\nkind: MarsReplica\nmetadata: {{name: r.{node}}}\nspec:\n  resource: r\n  \
             node: {node}\n  resourceUuid: {resource}\n  replicaUuid: {replica}\n  sizeBytes: {size}\n  backing: {{pool: p}}\n"
        )
    }

    async fn next(updates: &mut mpsc::Receiver<Update>) -> Update {
        tokio::time::timeout(Duration::from_secs(10), updates.recv())
            .await
            .unwrap()
            .unwrap()
    }

    #[tokio::test]
    async fn a_directory_of_manifests_is_followed_for_one_node() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a.yaml"), manifest("a", 1 << 20)).unwrap();
        std::fs::write(dir.path().join("b.yaml"), manifest("b", 1 << 20)).unwrap();
        std::fs::write(dir.path().join("broken.yaml"), "spec: [").unwrap();
        let (send, mut updates) = mpsc::channel(8);
        let stop = CancellationToken::new();
        let watch = tokio::spawn(watch_dir(dir.path().into(), "a".into(), send, stop.clone()));
        let (mut seen, mut trouble) = (0, 0);
        loop {
            match next(&mut updates).await {
                Update::Seen(object) => {
                    assert_eq!(object.spec.node, "a");
                    seen += 1;
                }
                Update::Trouble(_) => trouble += 1,
                Update::Listed => break,
                Update::Vanished(name) => panic!("{name}"),
            }
        }
        assert_eq!((seen, trouble), (1, 1));
        std::fs::write(dir.path().join("a.yaml"), manifest("a", 1 << 30)).unwrap();
        assert!(matches!(next(&mut updates).await, Update::Seen(object) if object.spec.size_bytes == 1 << 30));
        std::fs::remove_file(dir.path().join("a.yaml")).unwrap();
        assert!(matches!(next(&mut updates).await, Update::Vanished(name) if name == "r.a"));
        stop.cancel();
        watch.await.unwrap();
    }
}
