//! Copying data from member to member: how much travels, and that it goes on after kills on either side.

use super::rig::{Cluster, Node, Shape};
use mars_engine::api::{Cause, Command, DataState};
use mars_node_agent::replication::Membership;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const SIZE_BYTES: usize = 256 << 20;
const SIZE: u64 = SIZE_BYTES as u64;

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

fn shape() -> Shape {
    Shape {
        size_bytes: SIZE,
        segment_bytes: 16 << 20,
        ..Shape::default()
    }
}

/// Fills the data disks before anybody uses them.
fn fill(node: &Node, content: impl Fn(&File)) {
    let disk = File::options().write(true).open(node.disk_path()).unwrap();
    content(&disk);
    disk.sync_all().unwrap();
}

async fn until_equal(target: &Node, source: &Node) {
    target
        .until("consistent", |status| status.data == DataState::Consistent)
        .await;
    target.until_like(source).await;
    source
        .until("written back", |status| status.applied == status.durable)
        .await;
    assert!(target.disk() == source.disk(), "the disks differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a32_a_copy_of_equal_disks_moves_less_than_half_a_percent() {
    let cluster = Cluster::new(2, shape()).await;
    for node in &cluster.nodes {
        fill(node, |disk| disk.write_all_at(&noise(1, SIZE_BYTES), 0).unwrap());
    }
    cluster.promote(0, 1, Cause::Create).await;
    until_equal(&cluster.nodes[1], &cluster.nodes[0]).await;
    let travelled = cluster.nodes[0].wire.sent.load(Ordering::Relaxed);
    assert_eq!(cluster.nodes[1].replication().synced_bytes, 0);
    assert!(
        travelled < SIZE / 200,
        "{travelled} bytes travelled for {SIZE} equal ones"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a32_a_copy_of_nearly_equal_disks_moves_about_the_difference() {
    let cluster = Cluster::new(2, shape()).await;
    for node in &cluster.nodes {
        fill(node, |disk| disk.write_all_at(&noise(1, SIZE_BYTES), 0).unwrap());
    }
    let changed = 500u64;
    fill(&cluster.nodes[1], |disk| {
        for index in 0..changed {
            disk.write_all_at(b"changed!", index * 131 * 4096 + 100).unwrap();
        }
    });
    cluster.promote(0, 1, Cause::Create).await;
    until_equal(&cluster.nodes[1], &cluster.nodes[0]).await;
    assert_eq!(cluster.nodes[1].replication().synced_bytes, changed * 4096);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a32_a_copy_of_a_sparse_disk_moves_almost_nothing_and_clears_old_content() {
    let cluster = Cluster::new(2, shape()).await;
    fill(&cluster.nodes[0], |disk| {
        disk.write_all_at(&noise(2, 100_000), 50 << 20).unwrap();
    });
    fill(&cluster.nodes[1], |disk| {
        disk.write_all_at(&noise(3, 5 << 20), 7 << 20).unwrap();
    });
    cluster.promote(0, 1, Cause::Create).await;
    until_equal(&cluster.nodes[1], &cluster.nodes[0]).await;
    assert!(cluster.nodes[1].replication().synced_bytes < 120_000);
}

/// Writes scattered blocks on the primary until told to stop.
fn load(node: &Node) -> (tokio::task::JoinHandle<u64>, tokio::sync::oneshot::Sender<()>) {
    let machine = node.machine.clone();
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let writer = tokio::spawn(async move {
        let mut count = 0;
        while stopped.try_recv().is_err() {
            let block = (count * 7919) % (SIZE / 4096);
            machine.write(block * 4096, noise(count, 4096)).await;
            count += 1;
            if count % 16 == 0 {
                machine.flush().await;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
        machine.flush().await;
        count
    });
    (writer, stop)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a31_a_copy_under_writes_ends_equal_and_is_not_consistent_before() {
    let cluster = Cluster::new(2, shape()).await;
    fill(&cluster.nodes[0], |disk| {
        disk.write_all_at(&noise(1, SIZE_BYTES), 0).unwrap();
    });
    cluster.promote(0, 1, Cause::Create).await;
    let (writer, stop) = load(&cluster.nodes[0]);
    let target = &cluster.nodes[1];
    let copied = target
        .until("copied", |status| {
            status.data == DataState::Consistent || status.sync.is_some_and(|sync| sync.consistent_at.is_some())
        })
        .await;
    if let Some(sync) = copied.sync {
        assert_eq!(copied.data, DataState::Syncing);
        let consistent = target
            .until("consistent", |status| status.data == DataState::Consistent)
            .await;
        assert!(
            consistent.applied.lsn >= sync.consistent_at.unwrap().lsn,
            "consistent before replay had passed the dirty end"
        );
    }
    let _ = stop.send(());
    assert!(writer.await.unwrap() > 0);
    until_equal(target, &cluster.nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a32_killed_on_either_side_a_copy_goes_on_and_ends_equal() {
    let size = 768 << 20;
    let mut cluster = Cluster::new(
        2,
        Shape {
            size_bytes: size,
            ..shape()
        },
    )
    .await;
    let content = noise(1, 1 << 20);
    fill(&cluster.nodes[0], |disk| {
        for index in 0..size >> 20 {
            disk.write_all_at(&content, index << 20).unwrap();
        }
    });
    cluster.promote(0, 1, Cause::Create).await;
    // Slow enough to be met in the middle, whatever the machine does besides.
    let limit = |node: &Node, bytes_per_s| {
        let change = |known: &mut Arc<Membership>| Arc::make_mut(known).sync_bytes_per_s = bytes_per_s;
        node.membership.send_modify(change);
    };
    limit(&cluster.nodes[1], Some(96 << 20));
    let past = |bytes: u64| {
        move |status: &mars_engine::api::ReplicaStatus| {
            status.sync.is_some_and(|sync| sync.done_bytes >= bytes) || status.data == DataState::Consistent
        }
    };
    let first = cluster.nodes[1].until("a first checkpoint", past(1)).await;
    assert_eq!(
        first.data,
        DataState::Syncing,
        "the copy was over too early for this test"
    );
    cluster.nodes[1].kill().await;
    cluster.nodes[1].restart().await;
    let resumed = cluster.nodes[1].now();
    assert!(
        resumed.sync.is_some_and(|sync| sync.done_bytes >= 1),
        "progress survives: {:?}",
        resumed.sync
    );
    cluster.nodes[1]
        .until("a second checkpoint", past(first.sync.unwrap().done_bytes + 1))
        .await;
    limit(&cluster.nodes[1], None);
    // Now the source: it comes back as the primary that it was.
    cluster.nodes[0].kill().await;
    cluster.nodes[0].restart().await;
    let resumable = cluster.nodes[0].now().resumable.expect("it was primary");
    cluster.nodes[0]
        .machine
        .order(Command::Resume {
            designation: resumable.designation,
        })
        .await
        .unwrap();
    until_equal(&cluster.nodes[1], &cluster.nodes[0]).await;
    let moved = cluster.nodes[1].replication().synced_bytes;
    assert!(
        moved < size - 1,
        "{moved} bytes were copied after the restart: nothing was kept"
    );
}
