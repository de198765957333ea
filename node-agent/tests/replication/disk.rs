//! Data disks that fail on real files: nobody waits for them, nothing is lost, and the replicas end equal.

use super::rig::{Cluster, Shape, followed, payload};
use mars_engine::api::{Command, Fault};
use mars_engine::brick::{Disk, Faults, Faulty, Pace, Paced};
use std::sync::Arc;
use std::time::Duration;

/// Puts a brick that fails on demand under each replica, while it runs.
async fn make_faulty(cluster: &Cluster) -> Vec<Arc<Faults>> {
    let mut all = Vec::new();
    for node in &cluster.nodes {
        let faults = Arc::new(Faults::default());
        let disk: Disk = Arc::new(Faulty::new(node.machine.data(), faults.clone()));
        node.machine.order(Command::ExchangeDisk(disk)).await.unwrap();
        all.push(faults);
    }
    all
}

/// Flushed writes on the primary.
async fn write(cluster: &Cluster, from: u64, count: u64) {
    const CHUNK: usize = 32 << 10;
    for index in from..from + count {
        let offset = index * 7 * CHUNK as u64 % cluster.size_bytes;
        cluster.nodes[0].machine.write(offset, payload(index, CHUNK)).await;
    }
    cluster.nodes[0].machine.flush().await;
}

async fn until_equal(cluster: &Cluster) {
    let primary = &cluster.nodes[0];
    primary
        .until("written back", |status| status.applied == status.durable)
        .await;
    cluster.nodes[1].until_like(primary).await;
    let expected = primary.disk();
    assert!(cluster.nodes[1].disk() == expected, "the replicas differ");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a44_data_disks_that_fail_are_named_hold_nobody_up_and_get_everything_later() {
    let cluster = followed(2, Shape::default()).await;
    let faults = make_faulty(&cluster).await;
    for faults in &faults {
        faults.fail_writes(true);
    }
    write(&cluster, 0, 60).await;
    let end = cluster.nodes[0].now().durable;
    for node in &cluster.nodes {
        node.until("all log here, and the disk named", |status| {
            let named = |fault: &Fault| matches!(fault, Fault::DataDiskFailed { .. });
            status.durable == end && status.faults.iter().any(named)
        })
        .await;
    }
    // One disk works again by itself; the other is reached in another way.
    faults[0].fail_writes(false);
    let way = cluster.nodes[1].machine.data();
    cluster.nodes[1]
        .machine
        .order(Command::ExchangeDisk(way))
        .await
        .unwrap();
    until_equal(&cluster).await;
    for node in &cluster.nodes {
        node.until("no fault is left", |status| status.faults.is_empty()).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a44_a_flush_that_fails_once_has_lost_what_was_written_and_it_is_written_again() {
    let cluster = followed(2, Shape::default()).await;
    let faults = make_faulty(&cluster).await;
    for round in 0..4 {
        for faults in &faults {
            faults.lose_until_flush();
        }
        write(&cluster, round * 40, 40).await;
        until_equal(&cluster).await;
    }
    assert!(faults.iter().all(|faults| faults.losses() >= 2), "no flush failed");
}

/// A disk on which each access takes a while.
#[derive(Debug)]
struct Slow;

impl Pace for Slow {
    fn pass(&self, _bytes: u64) {
        std::thread::sleep(Duration::from_millis(3));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a10_disks_are_exchanged_for_slow_ones_and_back_under_load() {
    let cluster = followed(2, Shape::default()).await;
    for round in 0..6 {
        for node in &cluster.nodes {
            let plain = node.machine.data();
            let slow: Disk = Arc::new(Paced::new(node.machine.data(), Arc::new(Slow)));
            let disk = if round % 2 == 0 { slow } else { plain };
            node.machine.order(Command::ExchangeDisk(disk)).await.unwrap();
        }
        write(&cluster, round * 30, 30).await;
    }
    until_equal(&cluster).await;
}
