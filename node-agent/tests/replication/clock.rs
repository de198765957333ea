//! Clocks that differ by hours, and jump: what happens after a message is stamped after it, on whatever node.

use super::rig::{Cluster, Shape, all_on, designation, followed, payload};
use mars_engine::api::{Cause, Command};
use mars_engine::types::Lamport;

const HOUR: i64 = 3600;

fn ns(hours: i64) -> u64 {
    u64::try_from(hours * HOUR).unwrap() * 1_000_000_000
}

/// Writes on a primary, and the stamp of what it wrote.
async fn write(cluster: &Cluster, index: usize) -> Lamport {
    let machine = &cluster.nodes[index].machine;
    machine.write(0, payload(u64::try_from(index).unwrap(), 4096)).await;
    machine.flush().await;
    machine.now().durable_time
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a60_what_a_primary_writes_after_a_message_is_stamped_after_the_message() {
    let cluster = followed(2, Shape::default()).await;
    let early = write(&cluster, 0).await;
    // The secondary's clock is five hours ahead; it only sends messages.
    cluster.nodes[1].wall.is_off_by(5 * HOUR);
    let sent = cluster.nodes[1].hub.clock().now();
    assert!(sent.0 > early.0 + ns(4));
    cluster.until_heard(0, sent).await;
    let late = write(&cluster, 0).await;
    assert!(late > sent, "{late:?} was written after a message of {sent:?} came in");
    // And back again, an hour behind everybody: nothing is undone.
    cluster.nodes[0].wall.is_off_by(-HOUR);
    let later = write(&cluster, 0).await;
    assert!(later > late);
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a60_a_successor_whose_clock_is_hours_behind_stamps_after_its_predecessor() {
    let mut cluster = followed(2, Shape::default()).await;
    cluster.nodes[0].wall.is_off_by(3 * HOUR);
    let by_first = write(&cluster, 0).await;
    // The last thing heard of it is a message, not a record; then it is gone.
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    let said = cluster.nodes[0].hub.clock().now();
    cluster.until_heard(1, said).await;
    cluster.nodes[0].kill().await;
    let (designation, cause) = (designation(2), Cause::Failover);
    let machine = &cluster.nodes[1].machine;
    machine.order(Command::Promote { designation, cause }).await.unwrap();
    let by_second = write(&cluster, 1).await;
    assert!(by_second > said && said > by_first);
    let lineage = cluster.nodes[1].now().lineage.clone();
    let epoch = lineage.0.last().unwrap();
    assert!(epoch.lamport > said && epoch.lamport < by_second);
    // A restarted agent on a clock that is right again goes on after all of it.
    cluster.nodes[1].kill().await;
    cluster.nodes[1].restart().await;
    assert!(cluster.nodes[1].hub.clock().now() > by_second);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a60_a_node_that_is_more_than_thirty_days_ahead_is_refused_and_moves_nobodys_clock() {
    let mut cluster = followed(2, Shape::default()).await;
    let before = write(&cluster, 0).await;
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
    cluster.nodes[1].wall.is_off_by(31 * 24 * HOUR);
    let sent = cluster.nodes[1].hub.clock().now();
    cluster.nodes[0]
        .until_replication("the members part", |status| {
            status.peers.iter().all(|peer| !peer.reachable)
        })
        .await;
    let after = write(&cluster, 0).await;
    assert!(after > before && after.0 < sent.0 - ns(24 * 29), "its clock went along");
    // It saves what its clock says, is set right and started again: a clock that nobody can believe is not believed here either.
    let machine = &cluster.nodes[1].machine;
    machine.order(Command::SetSwitches(all_on())).await.unwrap();
    cluster.nodes[1].wall.is_off_by(0);
    cluster.nodes[1].kill().await;
    cluster.nodes[1].restart().await;
    assert!(cluster.nodes[1].hub.clock().now().0 < sent.0 - ns(24 * 29));
    let last = write(&cluster, 0).await;
    assert!(last > after);
    cluster.nodes[1].until_like(&cluster.nodes[0]).await;
}
